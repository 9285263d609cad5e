"""Whether the outline of a cut-out scan means anything to the other scan.

Where one scan has a constant background and the other has tissue, the first was cut out (skull-stripped, say) and the second
was not. Its background then says nothing and must carry no weight, from the search for the pose on.
"""

from __future__ import annotations

import torch
from torch import Tensor

from regkit.filters import gradient
from regkit.registration.pyramid import SAME, Canvas
from regkit.registration.steps import Outcome, Scene

TISSUE = 0.45  # share of the other scan's edges on a background: 0.6 and more for a brain in a head or template, else 0.37 at most


def inside(scene: Scene) -> Scene:
    """The scene without any constant background, by which poses are judged; the scene itself if there is none."""
    there = _there(scene)
    return scene.hiding(*there) if any(there) else scene


def stripped(scene: Scene) -> list[Scene]:
    """Scenes without one scan's background or the other's."""
    there = _there(scene)
    return [scene.hiding(*which) for which in ((True, False), (False, True)) if there[which.index(True)]]


def without_idle(scene: Scene, pose: Tensor, outcome: Outcome) -> Scene:
    """The scene without the backgrounds that say nothing at a pose (1, D+1, D+1)."""
    there, second = _there(scene), min(1, len(scene.canvases) - 1)
    if not any(there):
        return scene
    hidden = [bool(a and b > TISSUE) for a, b in zip(there, _on_background(*scene.canvases[second], scene, pose), strict=True)]
    for name, one in zip(("fixed", "moving"), hidden, strict=True):
        if one:
            outcome.notes.append(f"{name}: its background lies on tissue of the other scan, as that of a cut-out (skull-stripped) scan "
                                 "does, and carries no weight")
    return scene.hiding(*hidden) if any(hidden) else scene


def _there(scene: Scene) -> tuple[bool, bool]:
    fixed, moving = scene.canvases[0]
    return fixed.background is not None, moving.background is not None


def _on_background(fixed: Canvas, moving: Canvas, scene: Scene, pose: Tensor) -> tuple[float, float]:
    """Share of the moving scan's edges, by steepness, that lies on the fixed one's background, and the other way round."""
    shares = []
    for home, away, way in ((fixed, moving, pose), (moving, fixed, torch.linalg.inv(pose))):
        values, seen = away.source.read(home.grid, scene.frame.world(way))
        tissue = gradient(values)[:, 0].square().sum(1, keepdim=True).sqrt() * seen * home.weight
        bare = home.weight.new_zeros(()) if home.background is None else ((home.data - home.background).abs() <= SAME).float()
        shares.append(float((tissue * bare).sum() / tissue.sum().clamp_min(1e-12)))
    return shares[0], shares[1]
