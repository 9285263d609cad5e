"""The segmenter, two localisations, and the segmenter with and without a spatial transformer in front."""

from __future__ import annotations

from collections.abc import Callable

import torch
from scans import SIDE
from torch import Tensor, nn

import regkit
from regkit.localisation import localiser
from regkit.space import model

AWAY = -6.0  # a part's logit where the segmenter did not look: background
POINTS = 8


def block(channels: int, out: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv3d(channels, out, 3, stride, 1, bias=False), nn.InstanceNorm3d(out, affine=True), nn.LeakyReLU(0.1))


class Segmenter(nn.Module):
    """A small U-Net: scan (N, 1, *S), S divisible by 8 → logits of the two parts against the background's 0, (N, 2, *S).

    At full resolution there is one convolution, which reads the scan once more; most of the time would go there otherwise."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        a, b, c = channels, 2 * channels, 4 * channels
        self.down = nn.ModuleList([nn.Sequential(block(i, o, 2), block(o, o)) for i, o in ((1, a), (a, b), (b, c))])
        self.grow = nn.ModuleList([nn.ConvTranspose3d(i, o, 2, 2) for i, o in ((c, b), (b, a), (a, a // 2))])
        self.join = nn.ModuleList([block(2 * b, b), block(2 * a, a)])
        self.last = nn.Conv3d(a // 2 + 1, 2, 3, padding=1)

    def forward(self, scan: Tensor) -> Tensor:
        fine = self.down[0](scan)
        middle = self.down[1](fine)
        middle = self.join[0](torch.cat([self.grow[0](self.down[2](middle)), middle], 1))
        fine = self.join[1](torch.cat([self.grow[1](middle), fine], 1))
        return self.last(torch.cat([self.grow[2](fine), scan], 1))


class Keypoints(nn.Module):
    """Where `count` points of the anatomy lie in a scan (N, 1, *S): the centres of mass of heat maps, in mm about the middle of a cube
    of `SIDE` → (N, count, 3). The points move with the anatomy however far that is, which a regression has to learn (as in KeyMorph:
    Wang, Evans, Dalca, Sabuncu 2023)."""

    def __init__(self, count: int, channels: int = 8) -> None:
        super().__init__()
        a, b, c = channels, 2 * channels, 4 * channels
        self.middle = nn.Sequential(block(1, a, 2), block(a, b, 2), block(b, b))
        self.deep = nn.Sequential(block(b, c, 2), block(c, c))
        self.grow, self.join = nn.ConvTranspose3d(c, b, 2, 2), block(2 * b, b)
        self.heat = nn.Conv3d(b, count, 1)

    def forward(self, scan: Tensor) -> Tensor:
        middle = self.middle(scan)
        heat = self.heat(self.join(torch.cat([self.grow(self.deep(middle)), middle], 1)))
        share = heat.flatten(2).softmax(-1).reshape(heat.shape)
        centres = []
        for axis, n in enumerate(heat.shape[2:], 2):
            place = ((torch.arange(n, device=heat.device) + 0.5) / n - 0.5) * SIDE
            centres.append(share.sum([k for k in (2, 3, 4) if k != axis]) @ place)
        return torch.stack(centres, -1)


class Fitted(regkit.SpatialTransformer):
    """A spatial transformer with a localisation of points: its map is the closest fit of learnt places, the pose in which the segmenter
    wants the anatomy, to the points found. The fit is solved, not learnt, and reaches every turn."""

    def __init__(self, localisation: nn.Module, name: str, count: int) -> None:
        super().__init__(localisation, name, antialias="none")
        self.fit = model(name).fit
        self.places = nn.Parameter(12 * torch.randn(count, 3, generator=torch.Generator().manual_seed(0)))

    def transform(self, moving: Tensor, *others: Tensor, moving_grid: regkit.Grid | None = None,
                  fixed_grid: regkit.Grid | None = None) -> regkit.Matrix:
        found = self.localisation(moving).double()
        return regkit.Matrix(self.fit(self.places.double().expand_as(found), found))


class Net(nn.Module):
    """A segmenter, with a spatial transformer in front of it or without one."""

    def __init__(self, channels: int, layer: regkit.SpatialTransformer | None = None) -> None:
        super().__init__()
        self.segmenter, self.layer = Segmenter(channels), layer

    def forward(self, scan: Tensor, grid: regkit.Grid) -> tuple[Tensor, regkit.Matrix | None]:
        """scan (N, 1, *S) on `grid` → logits (N, 2, *S) there, and the map of the learnt pose to it."""
        if self.layer is None:
            return self.segmenter(scan), None
        transform = self.layer.transform(scan, moving_grid=grid, fixed_grid=grid)
        upright = self.layer.resample(scan, transform, grid, grid)
        return back(self.layer, self.segmenter(upright), transform, grid), transform


def back(layer: regkit.SpatialTransformer, logits: Tensor, transform: regkit.Matrix, grid: regkit.Grid) -> Tensor:
    """What was said in the learnt pose, carried back to where the scan lies; `AWAY` beyond it."""
    return layer.resample(logits - AWAY, transform.inverse(), grid, grid) + AWAY


def _regression(voxels: int) -> Net:
    return Net(12, regkit.SpatialTransformer(localiser((1,) + (voxels,) * 3, "rigid", width=8), "rigid", antialias="none"))


def _keypoints(voxels: int) -> Net:
    return Net(14, Fitted(Keypoints(POINTS), "rigid", POINTS))


# channels are chosen so that all have about 300 000 parameters
NETS: dict[str, Callable[[int], Net]] = {"plain": lambda voxels: Net(16), "regression": _regression, "keypoints": _keypoints}
# the localisation's rate beside the segmenter's: a regression that learns as fast as Adam lets it throws the scan out of view
PACE = {"plain": 1.0, "regression": 0.1, "keypoints": 0.3}
