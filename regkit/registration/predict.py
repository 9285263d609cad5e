"""What a localisation net says of a pair, without looking for anything better."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from regkit.errors import CheckpointError, OptionError
from regkit.registration.nets import SHIPPED, Trained, load, shipped
from regkit.registration.pyramid import Canvas, Smoothed
from regkit.registration.settings import NET
from regkit.registration.start import TURNLESS, Candidate
from regkit.registration.steps import Scene
from regkit.sampling import shrinkage
from regkit.space import Frame, Grid

Pose = Callable[[Tensor], tuple[Tensor, Tensor]]
LOOKS = 2  # how often a net looks: the second time at scans in the pose it found, which it knows best
_AIR = 0.1  # of a scan's range, by which air differs from air
_STEP = 1.05  # a level may be this much coarser than the net's canvas before a finer one is taken


def chosen(start: str, model: str, ndim: int) -> list[Trained]:
    """The nets that are asked where to begin: the one that is named, all that are shipped for scans of `ndim` axes, or none."""
    if start.startswith(NET):
        found = [load(start.removeprefix(NET))]
    elif start in ("net", "auto") and (model not in TURNLESS or start == "net"):
        found = [_kept(name) for name in shipped(ndim)]
    else:
        return []
    if start == "net" and not found:
        raise OptionError(f"start: no net for {ndim}D scans is shipped; train one (regkit train) and give {NET}FOLDER, or --start search")
    for net in found:
        if net.ndim != ndim:
            raise OptionError(f"start: {net.name} is a net for {net.ndim}D scans, these are {ndim}D; give another one, or --start auto")
    return found


@cache
def _kept(name: str) -> Trained:
    """A shipped net, whatever lies in the working folder under its name."""
    return replace(load(SHIPPED / f"{name}.safetensors"), name=name)


def said(nets: list[Trained], scene: Scene) -> list[Candidate]:
    """What nets say of a pair, as members of the scene's model. Raises CheckpointError for a net of the user's that says no numbers; one
    that is shipped is not asked then."""
    d = scene.frame.centre.shape[-1]
    found = []
    for net in nets:
        try:
            map = predict(net, scene.canvases, scene.frame)
            map = scene.model.project(map, torch.zeros(1, d, dtype=torch.float64, device=map.device))
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined] of what is not finite
            map = torch.full((1, 1), torch.nan)
        if bool(torch.isfinite(map).all()):
            found.append(Candidate(map[0], f"net {net.name}", False))
        elif net.name not in shipped():
            raise CheckpointError(f"start: the net {net.name} answers with NaN or infinity; its weights may be damaged, give another one, "
                                  "or --start auto")
    return found


def predict(trained: Trained, canvases: list[tuple[Canvas, Canvas]], frame: Frame, looks: int = LOOKS) -> Tensor:
    """The map (1, D+1, D+1) of fixed to moving points, in the frame.

    canvases: the pair's levels, coarse to fine; the coarsest that shows what the net can see is read."""
    with torch.no_grad():
        fine = [pair for pair in canvases if pair[0].mm <= _STEP * min(trained.millimetres(canvas.grid) for canvas in pair)]
        views = [View.of(canvas, trained) for canvas in (fine[0] if fine else canvases[-1])]
        net, device = trained.net.to(views[0].device), views[0].device
        pose: Pose | None = getattr(net, "pose", None) if len(getattr(net, "home", ())) else None
        for look in range(looks):
            if look + 1 < looks and pose is not None:
                views = [_upright(view, pose) for view in views]
            else:
                views[1] = views[1].moved(net(*[view.shown() for view in views]))
        world = views[1].pose @ torch.linalg.inv(views[0].pose)
        return (frame.matrix.to(device) @ world @ frame.inverse.to(device)).to(device)


def _upright(view: View, pose: Pose) -> View:
    """A scan by itself, put into the usual pose: as it is, or bright for dark if the net is surer of that."""
    ways = [view, replace(view, negative=True)]
    maps, unsure = pose(torch.cat([way.shown() for way in ways]))
    best = int(unsure.argmin())
    return ways[best].moved(maps[best: best + 1])


@dataclass(frozen=True, eq=False)
class View:
    """A scan as a net sees it: what is read, what is shown where nothing was seen, the pose (1, D+1, D+1) that carries the canvas'
    half edges into the world, and whether bright is shown as dark."""

    source: Smoothed
    beyond: float
    pose: Tensor
    trained: Trained
    negative: bool = False

    @property
    def device(self) -> torch.device:
        return self.pose.device

    @staticmethod
    def of(canvas: Canvas, trained: Trained) -> View:
        """Around the scan's centre of mass, upright."""
        weight = None if bool((canvas.weight == 1).all()) else canvas.weight
        mm = trained.millimetres(canvas.grid)
        target = canvas.grid.canonical(mm)
        source = Smoothed.of(canvas.data, weight, canvas.grid, shrinkage(canvas.grid.inverse @ target.affine))
        d = canvas.grid.ndim
        pose = torch.eye(d + 1, dtype=torch.float64, device=canvas.data.device)[None].clone()
        pose[:, :d, :d] *= mm * trained.edge / 2
        beyond = _air(canvas)
        pose[:, :d, d] = _middle(canvas, beyond)
        return View(source, beyond, pose, trained)

    def shown(self) -> Tensor:
        """The canvas (1, 1, *S): where nothing was seen, air goes on beyond the rim, so that no frame is seen."""
        d, edge = self.pose.shape[-1] - 1, self.trained.edge
        affine = torch.eye(d + 1, dtype=torch.float64, device=self.device)
        affine[:d, :d] *= 2 / edge
        affine[:d, d] = 1 / edge - 1
        values, seen = self.source.read(Grid((edge,) * d, affine), self.pose)
        canvas = torch.where(seen > 0.5, values, self.beyond)
        return 1 - canvas if self.negative else canvas

    def moved(self, map: Tensor) -> View:
        """The view whose canvas shows what a map in half edges carries its points to."""
        return replace(self, pose=self.pose @ map.to(self.pose))


def _air(canvas: Canvas) -> float:
    """What air looks like: the usual value along the edge of what was seen, or 0 where that is no air but of many values."""
    d = canvas.grid.ndim
    seen = (canvas.weight > 0.5).float().expand(canvas.data.shape)
    pool = (F.avg_pool2d, F.avg_pool3d)[d - 2]
    rim = canvas.data[(seen > 0.5) & (pool(F.pad(seen, [1] * 2 * d), 3, 1) < 0.999)]
    usual = rim.median() if rim.numel() else torch.zeros(())
    return float(usual) if bool(((rim - usual).abs() < _AIR).float().mean() > 0.5) else 0.0


def _middle(canvas: Canvas, beyond: float) -> Tensor:
    """(1, D) mm: the centre of mass of what is seen, by how far it differs from air."""
    weight = ((canvas.data - beyond).abs() * canvas.weight).flatten().double()
    return (weight / weight.sum().clamp_min(1e-12))[None] @ canvas.grid.points()[0].to(weight.device)
