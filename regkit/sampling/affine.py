"""Affine maps between index grids: on lines they are ramps, so neither points nor what is seen must be computed one by one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from regkit.sampling.kernels import read
from regkit.space import Grid

EDGE = 1e-5  # voxels by which a point may lie off an outer edge: rounding


def starts(grid: Grid, mapping: Tensor, low: int, high: int) -> Tensor:
    """Points (N, lines, D), float64, where an affine map of the grid's indices takes the first points of its lines."""
    return _starts(grid.shape, mapping, torch.arange(low, high, device=grid.device))


def _starts(shape: Sequence[int], mapping: Tensor, number: Tensor) -> Tensor:
    d = len(shape)
    start = mapping[:, :d, d, None]  # (N, D, lines)
    for axis in reversed(range(d - 1)):
        start = start + mapping[:, :d, axis, None] * number.remainder(shape[axis])
        number = number.div(shape[axis], rounding_mode="floor")
    return start.expand(-1, -1, len(number)).mT


def lines(grid: Grid, mapping: Tensor, low: int, high: int) -> Tensor:
    """Points (N, P, D), float64, where an affine map of the grid's indices takes its lines low … high along the last axis."""
    d = grid.ndim
    steps = torch.arange(grid.shape[-1], dtype=torch.float64, device=grid.device)
    start = starts(grid, mapping, low, high).mT
    return (start[..., None] + mapping[:, :d, d - 1, None, None] * steps).flatten(2).mT


def seen(start: Tensor, step: Tensor, count: int, shape: Sequence[int]) -> Tensor:
    """Which points of lines lie in a field of view of `shape` voxels, outer edges included: start (N, lines, D) and step (N, D)
    in its index → (N, lines, count) bool."""
    low = torch.tensor([-0.5 - EDGE] * len(shape), dtype=start.dtype, device=start.device) - start
    high = torch.tensor([n - 0.5 + EDGE for n in shape], dtype=start.dtype, device=start.device) - start
    still = (step.abs() < 1e-12)[:, None]
    pace = torch.where(still, 1.0, step[:, None])
    a, b = low / pace, high / pace
    begin, end = torch.minimum(a, b), torch.maximum(a, b)
    within = (low <= 0) & (high >= 0)
    begin = torch.where(still, torch.where(within, -1.0, count), begin).amax(-1).ceil().clamp(-1, count)
    end = torch.where(still, torch.where(within, count, -1.0), end).amin(-1).floor().clamp(-1, count)
    middle, half = ((begin + end) / 2).float(), ((end - begin) / 2).float()  # halves of whole numbers: exact
    number = torch.arange(count, dtype=torch.float32, device=start.device)
    return (number - middle[..., None]).abs_() <= half[..., None]


def read_lines(data: Tensor, mapping: Tensor, grid: Grid, low: int, high: int, shape: tuple[int, ...],
               blocks: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Linear values (N, C, P) along lines low … high of the grid under one affine map (1, D+1, D+1), and whether each point
    lies in the field of view (1, P). Three times as fast as by single points."""
    d, n = grid.ndim, grid.shape[-1]
    first, step = starts(grid, mapping, low, high), mapping[:, :d, d - 1]
    size = torch.tensor(data.shape[2:], dtype=torch.float64, device=grid.device)
    scale = 2 / size / torch.tensor(blocks, dtype=torch.float64, device=grid.device)  # index → torch's coordinates
    start = ((first[0] + 0.5) * scale - 1).flip(-1).to(data.dtype)
    count = torch.arange(n, device=grid.device)
    coordinates = torch.addcmul(start[:, None], count.to(data.dtype)[:, None], (step[0] * scale).flip(-1).to(data.dtype))
    return read(data, coordinates.reshape(1, -1, d).expand(data.shape[0], -1, -1)), seen(first, step, n, shape).reshape(1, -1)


def read_affine(data: Tensor, mapping: Tensor, shape: Sequence[int], blocks: Sequence[int], padding: str) -> Tensor:
    """Linear values (N, C, *shape) of data (N|1, C, *S / blocks) under index maps (N|1, D+1, D+1), differentiable in both; what lies
    outside is as torch's `padding` border or reflection has it.

    Coordinates are the sum of those of a line's start and of a ramp along it: a third of the time of torch's `affine_grid`."""
    d, n = len(shape), max(data.shape[0], mapping.shape[0])
    theta = normalised(mapping, shape, [m * k for m, k in zip(data.shape[2:], blocks, strict=True)]).to(data.dtype)
    ramps = [torch.arange(m, dtype=data.dtype, device=data.device) * (2 / m) + (1 / m - 1) for m in shape]
    rest = torch.stack([*(g.flatten() for g in reversed(torch.meshgrid(*ramps[:-1], indexing="ij"))),
                        ramps[0].new_ones(shape[:-1]).flatten()], -1)  # (lines, D)
    # torch threads its 3D CPU kernel over the batch only: part the lines among an expanded batch
    parts = torch.get_num_threads() // n if d == 3 and data.device.type == "cpu" and not torch.compiler.is_compiling() else 1
    parts = parts if parts > 1 and len(rest) % parts == 0 else 1
    with torch.autocast(data.device.type, enabled=False):  # coordinates keep their precision
        start, along = rest @ theta[:, :, 1:].mT, ramps[-1][:, None] * theta[:, None, :, 0]
        grid = (start[:, :, None] + along[:, None]).expand(n, -1, -1, -1)
        grid = grid.reshape(n * parts, *[1] * (d - 2), -1, shape[-1], d)
        batch = data.expand(n, *data.shape[1:])
        batch = batch if parts == 1 else batch[:, None].expand(-1, parts, *data.shape[1:]).flatten(0, 1)
        values = F.grid_sample(batch, grid, padding_mode=padding, align_corners=False)
    if parts > 1:
        values = values.reshape(n, parts, data.shape[1], -1).transpose(1, 2)
    return values.reshape(n, data.shape[1], *shape)


def normalised(mapping: Tensor, shape: Sequence[int], extent: Sequence[float]) -> Tensor:
    """Index maps (N, D+1, D+1) as torch has them (N, D, D+1): between coordinates that are ±1 at the outer edges of a target of
    `shape` and a source of `extent` voxels, axes reversed."""
    d = len(shape)
    goal = [[(n / 2 if i == j else 0.0) for j in range(d)] + [(n - 1) / 2] for i, n in enumerate(shape)] + [[0.0] * d + [1.0]]
    home = [[(2 / n if i == j else 0.0) for j in range(d)] + [1 / n - 1] for i, n in enumerate(extent)] + [[0.0] * d + [1.0]]
    whole = mapping.new_tensor(home) @ mapping @ mapping.new_tensor(goal)
    return torch.cat([whole[:, :d, :d].flip(1, 2), whole[:, :d, d:].flip(1)], 2)
