"""Constant background: what skull stripping, thresholding or cutting out has left of a scan.

Two stripped brains are laid on each other well by their outlines. Against a whole head the outline of a stripped brain is no
edge of the other scan: taken for one, it is stretched over the skull.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

_LEAST = 0.1  # share of the voxels from which on there is a background to speak of
_CONSTANT = 0.002  # of the range of intensities: interpolation leaves ripples around what was cut out


def background(data: Tensor, weight: Tensor | None = None) -> float | None:
    """The value that most corners of a scan (1, 1, *S) share, if a tenth of its voxels or more, of those that count, have it."""
    volume = data[0, 0]
    corners = torch.stack([volume[at] for at in itertools.product((0, -1), repeat=volume.ndim)]).float()
    value = corners.median()
    few = tuple(slice(None, None, max(1, n // 64)) for n in volume.shape)
    some = volume[few].float()  # integers as narrow as these cannot hold their own range
    near = _CONSTANT * float(some.max() - some.min())
    if int(((corners - value).abs() <= near).sum()) < len(corners) // 2:
        return None
    counts = torch.ones_like(some) if weight is None else (weight[0, 0][few] > 0).to(some)
    share = float((((some - value).abs() <= near) * counts).sum() / counts.sum().clamp_min(1))
    return float(value) if share >= _LEAST else None
