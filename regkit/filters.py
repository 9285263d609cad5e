"""Separable linear filters, each a small dense matrix applied along its axis.

A matrix product along an axis is the fastest filter a CPU has for scans of up to some hundred voxels a side, it is
differentiable, runs on any device, and 2D and 3D are one code.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

SHARP = 1.15  # voxels a step up to which nothing need be smoothed: linear interpolation takes out as much
_WIDER = 1.17  # of what a step is longer, see `sharp`
_BAND = 64  # columns to which a block of rows of a banded matrix belongs
_looked_at = WeakIdKeyDictionary()  # the bands of matrices that are kept, and so met again
_PLAIN = torch.inference_mode(False)  # what is kept may be first asked for under inference_mode, and later need gradients


def along(data: Tensor, matrices: Sequence[Tensor | None]) -> Tensor:
    """Apply matrix a, (m_a, n_a) or one for each item (N, m_a, n_a), along spatial axis a of data (N, C, *S); None leaves an axis
    as it is. → (N, C, *M)."""
    with torch.autocast(data.device.type, enabled=False):  # voxels keep their precision
        for axis, matrix in enumerate(matrices):
            if matrix is None:
                continue
            matrix, shape = matrix.to(data), data.shape
            if axis == len(matrices) - 1:
                flat = data.reshape(-1, shape[-1]) if matrix.ndim == 2 else data.flatten(1, -2)
                parts = [flat[..., take] @ matrix[..., give, take].mT for give, take in _bands(matrix)]
                data = (parts[0] if len(parts) == 1 else torch.cat(parts, -1)).reshape(*shape[:-1], -1)
                continue
            flat = data.reshape(*(() if matrix.ndim == 2 else shape[:1]), -1, shape[axis + 2], math.prod(shape[axis + 3:]))
            matrix = matrix if matrix.ndim == 2 else matrix[:, None]
            parts = [matrix[..., give, take] @ flat[..., take, :] for give, take in _bands(matrix)]
            data = parts[0] if len(parts) == 1 else torch.cat(parts, -2)
            data = data.reshape(*shape[: axis + 2], matrix.shape[-2], *shape[axis + 3:])
    return data


def along_first(read: Callable[[slice], Tensor], matrix: Tensor) -> Tensor:
    """Apply matrix (m, n) along the first spatial axis of data (N, C, n, *S) that `read` makes, slab by slab: of a scan that is not kept
    as floating numbers, no more than a slab is at a time. → (N, C, m, *S)."""
    parts = []
    for give, take in _bands(matrix):
        slab = read(take)
        with torch.autocast(slab.device.type, enabled=False):
            part = matrix[give, take].to(slab) @ slab.reshape(-1, slab.shape[2], math.prod(slab.shape[3:]))
        parts.append(part.reshape(*slab.shape[:2], -1, *slab.shape[3:]))
        del slab
    return parts[0] if len(parts) == 1 else torch.cat(parts, 2)


def _bands(matrix: Tensor) -> list[tuple[slice, slice]]:
    """A long narrow-banded matrix as blocks of rows, each with the columns that are not zero in it; else one block."""
    rows, columns = matrix.shape[-2:]
    if columns < 2 * _BAND or rows < 2 or torch.compiler.is_compiling():
        return [(slice(None), slice(None))]
    if matrix in _looked_at:
        return _looked_at[matrix]
    step = max(1, round(_BAND * rows / columns))
    filled = (matrix.detach() != 0).reshape(-1, rows, columns).any(0)
    found = []
    for low in range(0, rows, step):
        used = filled[low: low + step].any(0).nonzero()
        first, last = (int(used[0]), int(used[-1]) + 1) if len(used) else (0, 1)
        found.append((slice(low, min(low + step, rows)), slice(first, last)))
    _looked_at[matrix] = found
    return found


@lru_cache(maxsize=256)
@_PLAIN
def gaussian(n: int, sigma: float, step: int = 1) -> Tensor:
    """(n // step, n) Gaussian of `sigma` voxels, cut at 4 σ, centred on each voxel, or on each block of `step` voxels.

    Rows sum to 1, so a constant stays constant up to the border."""
    x = torch.arange(n, dtype=torch.float64)
    centres = torch.arange(n // step, dtype=torch.float64) * step + (step - 1) / 2
    distance = (centres[:, None] - x) / sigma
    weights = torch.exp(-0.5 * distance**2) * (distance.abs() <= 4)
    return (weights / weights.sum(1, keepdim=True)).float()


def sharp(n: int, width: Tensor, step: int = 1) -> Tensor:
    """(N, n // step, n) cubic convolution kernels (Keys 1981) for steps of `width` (N,) voxels, centred on each voxel, or on each
    block of `step` voxels. Up to a width of SHARP it is the identity; rows sum to 1.

    As good as a Gaussian at taking out what a step cannot show, and it keeps what it can, of which a Gaussian takes a fifth; in
    exchange it overshoots by 4 % at a hard edge. A little wider than the step: with linear interpolation behind it, both what is let
    through and what is lost are small at half and at once the finest detail."""
    x = torch.arange(n, dtype=width.dtype, device=width.device)
    centres = torch.arange(n // step, dtype=width.dtype, device=width.device) * step + (step - 1) / 2
    x = ((centres[:, None] - x) / (1 + _WIDER * (width - SHARP).clamp_min(0))[:, None, None]).abs()
    weights = torch.where(x < 1, (1.5 * x - 2.5) * x * x + 1, torch.where(x < 2, ((2.5 - 0.5 * x) * x - 4) * x + 2, 0))
    return weights / weights.sum(-1, keepdim=True)


@lru_cache(maxsize=128)
@_PLAIN
def sharp_one(n: int, width: float, step: int = 1) -> Tensor:
    """(n // step, n): one kernel of `sharp`, kept."""
    return sharp(n, torch.tensor([width], dtype=torch.float64), step)[0].float()


@lru_cache(maxsize=64)
@_PLAIN
def spline_coefficients(n: int, margin: int = 0) -> Tensor:
    """(n + 2 margin, n) samples → cubic B-spline coefficients, whole-sample mirrored at the ends (Unser 1999), as ITK and
    scipy have it; the margin holds the mirrored ones beyond each end."""
    band = torch.zeros(n, n, dtype=torch.float64)
    i = torch.arange(n)
    band[i, i] = 4 / 6
    band[i[:-1], i[:-1] + 1] = 1 / 6
    band[i[1:], i[1:] - 1] = 1 / 6
    if n > 1:
        band[0, 1], band[-1, -2] = 2 / 6, 2 / 6
    else:
        band[0, 0] = 1
    inverse = torch.linalg.inv(band)
    inverse[inverse.abs() < 1e-12] = 0  # below float32's normal range products become ten times slower
    period = max(2 * n - 2, 1)
    place = torch.arange(-margin, n + margin).remainder(period)
    return inverse[torch.minimum(place, (period - place).remainder(period))].float()


def smooth(data: Tensor, sigma: Sequence[float], steps: Sequence[int] | None = None) -> Tensor:
    """Gaussian smoothing of data (N, C, *S) by `sigma` voxels an axis; nothing below a quarter of a voxel, where one cut at 4 σ
    reaches no neighbour.

    steps: read only at the centres of blocks of so many voxels, → (N, C, *(S // steps))."""
    steps = (1,) * len(sigma) if steps is None else steps
    return along(data, gaussians(data.shape[2:], sigma, steps))


def gaussians(shape: Sequence[int], sigma: Sequence[float], steps: Sequence[int]) -> list[Tensor | None]:
    """What `smooth` applies along the axes of an image of `shape` voxels."""
    return [gaussian(n, round(float(s), 4), k) if s > (0.25 if k == 1 else 0.05) and n > 1 else None
            for n, s, k in zip(shape, sigma, steps, strict=True)]


def gradient(data: Tensor) -> Tensor:
    """Central differences per voxel step, one-sided at the ends, zero along an axis of one voxel: (N, C, *S) → (N, C, D, *S)."""
    return torch.stack([torch.gradient(data, dim=axis)[0] if data.shape[axis] > 1 else torch.zeros_like(data)
                        for axis in range(2, data.ndim)], 2)
