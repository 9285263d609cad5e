"""Padding: the constant border that cutting, turning and resampling leave around a scan is no part of it.

Taken for anatomy, the walls of a turned box are the strongest edges in the scan, and a rotation is found that lays one box on
the other. Skull-stripped scans and air have a constant border too, but what is inside is round.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from regkit.image import Image
from regkit.registration.turns import rotations
from regkit.space import MODELS

_ACROSS = 64  # voxels an axis that are looked at
_FULL = 0.97  # share inside above which there is nothing worth taking off
_DENSE = 0.87  # of the smallest box around it an ellipsoid fills 0.52, a cylinder 0.79, a box all but its rim


def scanned(image: Image) -> Tensor | None:
    """Where a scan (1, 1, *S) was measured, if that is a box in a constant border: (1, 1, *S), bool, else None.

    The border is what has the value that all corners share. Boxes are turned in mm, whatever the voxels' shape."""
    volume = image.data[0, 0]
    corners = [volume[at] for at in itertools.product((0, -1), repeat=volume.ndim)]
    if any(bool(c != corners[0]) for c in corners):
        return None
    steps = [max(1, n // _ACROSS) for n in volume.shape]
    differs = volume[tuple(slice(None, None, s) for s in steps)] != corners[0]
    if not 0.05 < float(differs.float().mean()) < _FULL:
        return None
    spacing = image.grid.spacing[0].float()
    coarse = spacing * torch.tensor(steps, device=spacing.device)
    turn, low, high = _smallest_box(_surface(differs) * coarse)
    if float(differs.sum() * coarse.prod()) < _DENSE * float((high - low + coarse.amin()).prod()):
        return None
    inside = torch.ones(volume.shape, dtype=torch.bool, device=volume.device)
    for normal, least, most in zip(turn, low.tolist(), high.tolist(), strict=True):
        margin = float((normal.abs() * spacing).sum())  # the outermost voxel is a blend of the scan and the border
        first, *others = [torch.arange(n, device=volume.device) * (normal[axis] * spacing[axis]) for axis, n in enumerate(volume.shape)]
        for plane, start in zip(inside, first, strict=True):  # plane by plane: scans are large
            along = start
            for axis, ramp in enumerate(others):
                along = along + ramp.reshape([-1 if axis == other else 1 for other in range(volume.ndim - 1)])
            plane &= (along >= least + margin) & (along <= most - margin)
    return inside[None, None]


def _surface(differs: Tensor) -> Tensor:
    """(P, D) index points: the first and the last voxel of every line along the first axis."""
    lines = differs.any(0).nonzero()
    first = differs.int().argmax(0)[tuple(lines.mT)]
    last = differs.shape[0] - 1 - differs.flip(0).int().argmax(0)[tuple(lines.mT)]
    return torch.cat([torch.cat([end[:, None], lines], 1) for end in (first, last)]).float()


def _smallest_box(points: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The box of least volume around points (P, D): its axes (D, D) as rows, and its ends (D,) along them."""
    d = points.shape[1]

    def ends(turns: Tensor, some: Tensor) -> tuple[Tensor, Tensor]:
        along = turns.flatten(0, 1) @ some.mT
        return along.amin(1).reshape(-1, d), along.amax(1).reshape(-1, d)

    def best(turns: Tensor, some: Tensor) -> Tensor:
        low, high = ends(turns, some)
        return turns[(high - low).prod(1).argmin()]

    grid = rotations(d).float().to(points.device)
    turn = best(grid, points[:: max(1, len(points) // 1000)])
    count = MODELS["rigid"].count(d) - d
    moves = torch.cartesian_prod(*[torch.tensor([-1.0, 0.0, 1.0])] * count).reshape(-1, count).to(points.device)
    for halving in range(8):
        theta = torch.cat([torch.zeros(len(moves), d, device=points.device), 0.15 * 0.5**halving * moves], 1)
        turn = best(MODELS["rigid"].exp(theta, d)[:, :d, :d].to(points) @ turn, points)
    low, high = ends(turn[None], points)
    return turn, low[0], high[0]
