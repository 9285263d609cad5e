"""Whether a map folds, and whether its inverse is one."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from regkit.space import Grid, Matrix, Transform

_CHUNK = 100_000


@dataclass(frozen=True)
class Regularity:
    """folds: per cent of voxels whose Jacobian determinant is not positive. sdlogj: standard deviation of the
    logarithm of the determinant, floored at 1e-9."""

    folds: float
    sdlogj: float
    least: float


def regularity(transform: Transform, grid: Grid) -> Regularity:
    """Jacobian determinant of a map (fixed → moving, mm) at the voxels of a grid, by central differences over one voxel, as
    Learn2Reg has it (Hering 2023). An affine map has one determinant everywhere."""
    if isinstance(transform, Matrix) and transform.affine:
        d = transform.ndim
        least = float(torch.linalg.det(transform.matrix[0, :d, :d]))
        return Regularity(0.0 if least > 0 else 100.0, 0.0, least)
    found = torch.cat([_determinants(transform, grid, index) for index in grid.index_points(torch.float64)[0].split(_CHUNK)])
    values = found.numpy()
    return Regularity(float(100 * np.mean(values <= 0)), float(np.log(np.clip(values, 1e-9, 1e9)).std()), float(values.min()))


def _determinants(transform: Transform, grid: Grid, index: torch.Tensor) -> torch.Tensor:
    d = grid.ndim
    top = torch.tensor([n - 1 for n in grid.shape], dtype=torch.float64)
    columns, rows = [], []
    for axis in range(d):
        step = torch.zeros(d, dtype=torch.float64)
        step[axis] = 1.0
        ends = [index + way * step for way in (1, -1)]
        if grid.shape[axis] > 1:  # one-sided at the ends
            ends = [torch.minimum(end.clamp_min(0), top) for end in ends]
        ends = [grid.to_world(end[None]) for end in ends]
        up, down = (transform(end)[0] for end in ends)
        columns.append(up - down)
        rows.append((ends[0] - ends[1])[0])
    moved, home = torch.stack(columns, -1), torch.stack(rows, -1)
    return torch.linalg.det(moved) / torch.linalg.det(home)


def inconsistency(forward: Transform, back: Transform, grid: Grid) -> float:
    """Mean distance in mm between a grid's voxels and where going there and back takes them: |B(F(x)) - x|."""
    steps = tuple(max(1, n // 32) for n in grid.shape)
    points = grid.shrink(steps).points()
    return float((back(forward(points)) - points).norm(dim=-1).mean())
