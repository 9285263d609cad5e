"""Soft bins of intensities: cubic B-spline Parzen windows (Thévenaz & Unser 2000; Mattes 2003)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

CHUNK = 2**20  # points of a batch at a time: 32 windows of so many float32 values are 128 MiB


def places(values: Tensor, weight: Tensor, bins: int) -> Tensor:
    """Where values (N, P) lie among the knots: the least of positive weight (N, P) at 0, the greatest at bins − 3.

    A constant lies at 0, and so does what has no weight."""
    low = torch.where(weight > 0, values, torch.inf).amin(1, keepdim=True)
    high = torch.where(weight > 0, values, -torch.inf).amax(1, keepdim=True)
    wide = (high - low > 1e-6 * torch.maximum(low.abs(), high.abs())) & torch.isfinite(high - low)
    low, width = torch.where(wide, low, 0), torch.where(wide, high - low, 1)
    inside = wide & (weight > 0)
    return torch.where(inside, (torch.where(inside, values, 0) - low) / width, 0) * (bins - 3)


def windows(place: Tensor, bins: int) -> Tensor:
    """Cubic B-splines at places (N, P) in 0 … bins − 3 → (N, P, bins); rows sum to 1.

    Four windows a value are computed and scattered into dense rows, for what comes then is one matrix product: faster
    than adding up scattered values, and exact in float32, which long running sums are not."""
    first = place.detach().floor().clamp(0, bins - 4)
    t = place - first
    s = 1 - t
    four = torch.stack([s**3 / 6, 2 / 3 - t * t * (1 - t / 2), 2 / 3 - s * s * (1 - s / 2), t**3 / 6], 2)
    index = first.long()[..., None] + torch.arange(4, device=place.device)
    return place.new_zeros(*place.shape, bins).scatter(2, index, four)


def summed(function: Callable[..., Tensor], *points: Tensor) -> Tensor:
    """Σ function(chunk of every (N, P) tensor) over chunks of points, whose windows are computed anew for the gradient:
    the memory of a large scan's windows is that of one chunk's."""
    size = max(1, CHUNK // max(1, len(points[0])))
    if points[0].shape[1] <= size:
        return function(*points)
    total = torch.zeros((), dtype=points[0].dtype, device=points[0].device)
    for piece in zip(*(p.split(size, 1) for p in points), strict=True):
        part = checkpoint(function, *piece, use_reentrant=False, preserve_rng_state=False)
        assert isinstance(part, Tensor)
        total = total + part
    return total
