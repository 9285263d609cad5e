"""One level of the pyramid as least squares sees it: features of both scans and the points where they are compared."""

from __future__ import annotations

import torch
from torch import Tensor

from regkit.registration.equations import Side, make_side, volume_of
from regkit.registration.pyramid import Canvas, features_of, made_of
from regkit.registration.run import Run
from regkit.similarity import Similarity
from regkit.space import Frame, Grid

MARGIN = 8  # voxels beyond which no filter of a measure reaches
TURN = 0.035  # radians (2°): oriented features are renewed when the map has turned or stretched by more


def sides_of(fixed: Canvas, moving: Canvas, measure: Similarity, frame: Frame, count: int, seed: int,
             around: Tensor | None = None, run: Run = map, slopes: bool = True) -> list[Side]:
    """Both directions of the comparison, `count` points each; `slopes`: whether steps will be taken from them.

    around: (1, D+1, D+1) map in the frame about which oriented features (MIND, NGF) hold: the other scan is carried
    through it before its features are computed, since such features turn with the frame they are computed in."""
    own = dict(zip((True, False), run(lambda canvas: features_of(canvas, measure), (fixed, moving)), strict=True))
    maps = {True: around, False: None if around is None else torch.linalg.inv(around)}

    def side(forward: bool) -> Side:
        home, away = (fixed, moving) if forward else (moving, fixed)
        turned = maps[forward]
        if turned is None:
            seen, weight, grid = own[not forward], away.weight, away.grid
            to_index = grid.inverse[0] @ frame.inverse[0]
        else:
            there = _within(home.grid, away.source.grid, frame.world(turned))
            data, weight, grid = _seen(*away.source.read(there, frame.world(turned)), there)
            seen = made_of(data, weight, measure)
            to_index = grid.inverse[0] @ frame.inverse[0] @ torch.linalg.inv(turned)[0]
        chosen = choose_points(home.weight, count, seed)
        return make_side(own[forward], home.weight, home.grid, chosen, volume_of(seen, weight, measure.residual), to_index, frame, forward,
                         measure.residual, slopes)

    return list(run(side, (True, False)))


def _within(home: Grid, away: Grid, world: Tensor) -> Grid:
    """The box of the home grid in which the away scan's field of view lies under a map (1, D+1, D+1) of home to away in mm, and enough
    around it; the grid itself where they lie apart."""
    corners = home.to_index(away.corners() @ torch.linalg.inv(world)[:, :-1, :-1].mT + torch.linalg.inv(world)[:, None, :-1, -1])[0]
    ends = torch.stack([corners.amin(0).floor() - MARGIN, corners.amax(0).ceil() + MARGIN + 1])
    size = torch.tensor(home.shape, dtype=ends.dtype, device=ends.device)
    low, high = (end.clamp_min(0).minimum(size) for end in ends)
    return _cut(home, low.int().tolist(), high.int().tolist()) if bool((low < high).all()) else home


def _seen(data: Tensor, weight: Tensor, grid: Grid) -> tuple[Tensor, Tensor, Grid]:
    """Values and weights (1, 1, *S) on a grid, cut to the box where the weights are not zero and `MARGIN` around it: of a head, what
    a small block covers."""
    low, high, there = [], [], weight[0, 0] > 0
    for axis, n in enumerate(grid.shape):
        places = there.any(tuple(a for a in range(grid.ndim) if a != axis)).nonzero()[:, 0]
        if len(places) == 0:
            return data, weight, grid
        low.append(max(int(places[0]) - MARGIN, 0))
        high.append(min(int(places[-1]) + 1 + MARGIN, n))
    box = (..., *(slice(a, b) for a, b in zip(low, high, strict=True)))
    return data[box], weight[box], _cut(grid, low, high)


def _cut(grid: Grid, low: list[int], high: list[int]) -> Grid:
    """The voxels of a grid from `low` to before `high`."""
    shift = torch.eye(grid.ndim + 1, dtype=torch.float64, device=grid.device)
    shift[:-1, -1] = torch.tensor(low, dtype=torch.float64)
    return Grid(tuple(b - a for a, b in zip(low, high, strict=True)), grid.affine @ shift)


def choose_points(weight: Tensor, count: int, seed: int) -> Tensor:
    """Flat positions of at most `count` voxels that count, one drawn from each of so many equal shares of the scan."""
    valid = (weight.flatten() > 0.5).nonzero()[:, 0]
    if len(valid) == 0:
        valid = (weight.flatten() > 0).nonzero()[:, 0]
    if len(valid) <= count:
        return valid
    place = torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + torch.arange(count)
    return valid[(place * (len(valid) / count)).long().clamp_(max=len(valid) - 1).to(valid.device)]


def has_turned(now: Tensor, around: Tensor) -> bool:
    """Whether a map (1, D+1, D+1) has turned or stretched away from another by more than `TURN`."""
    d = now.shape[-1] - 1
    change = torch.linalg.inv(around[:, :d, :d]) @ now[:, :d, :d] - torch.eye(d, dtype=now.dtype, device=now.device)
    return float(torch.linalg.matrix_norm(change, 2).max()) > TURN
