"""Padding: the constant border that cutting, turning and resampling leave around a scan is no part of it.

Taken for anatomy, the walls of a turned box are the strongest edges in the scan, and a rotation is found that lays one box on
the other. Skull-stripped scans and air have a constant border too, but what is inside is round.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
import torch
from scipy.spatial import ConvexHull, QhullError
from torch import Tensor

_ACROSS = 64  # voxels an axis that are looked at
_FULL = 0.97  # share inside above which there is nothing worth taking off
_DENSE = 0.9  # share of the hull that must differ from the border's value
_FLAT = 0.85  # share of the hull's area that must lie on its 2 D largest planes
_ALIKE = math.cos(math.radians(6))


def scanned(data: Tensor) -> Tensor | None:
    """Where a scan (1, 1, *S) was measured, if that is a box in a constant border: (1, 1, *S) of 0 and 1, else None.

    The border is what has the value that all corners share. A box has a dense convex hull whose surface is 2 D planes."""
    volume = data[0, 0]
    corners = [volume[at] for at in itertools.product((0, -1), repeat=volume.ndim)]
    if any(bool(c != corners[0]) for c in corners):
        return None
    steps = [max(1, n // _ACROSS) for n in volume.shape]
    differs = (volume[tuple(slice(None, None, s) for s in steps)] != corners[0]).cpu().numpy()
    if not 0.05 < differs.mean() < _FULL:
        return None
    planes = _planes(differs)
    if planes is None:
        return None
    inside = torch.ones(volume.shape, dtype=torch.bool, device=data.device)
    axes = [torch.arange(n, dtype=torch.float32, device=data.device).reshape([-1 if a == b else 1 for b in range(volume.ndim)])
            for a, n in enumerate(volume.shape)]
    for *normal, offset in planes:
        fine = [n / s for n, s in zip(normal, steps, strict=True)]  # the plane was found among every s-th voxel
        margin = sum(abs(n) for n in fine)  # the outermost voxel is a blend of the scan and the border
        inside &= sum(n * axis for n, axis in zip(fine, axes, strict=True)) <= -offset - margin  # type: ignore[operator]
    return inside[None, None].float()


def _planes(differs: np.ndarray) -> np.ndarray | None:
    """(2 D, D + 1) outward normals and offsets of the box that fills `differs`, or None if that is no box."""
    ndim = differs.ndim
    rows = np.argwhere(differs.any(0))
    first = differs.argmax(0)[tuple(rows.T)]
    last = differs.shape[0] - 1 - differs[::-1].argmax(0)[tuple(rows.T)]
    try:
        hull = ConvexHull(np.concatenate([np.c_[first, rows], np.c_[last, rows]]))
    except QhullError:
        return None
    if differs.sum() < _DENSE * hull.volume:
        return None
    corners = hull.points[hull.simplices]
    edges = corners[:, 1:] - corners[:, :1]
    areas = np.sqrt(np.maximum(np.linalg.det(edges @ edges.transpose(0, 2, 1)), 0)) / math.factorial(ndim - 1)
    normals, left, planes = hull.equations[:, :-1], areas.copy(), []
    for _ in range(2 * ndim):
        alike = (normals @ normals[left.argmax()] > _ALIKE) & (left > 0)
        if not alike.any():
            return None
        normal = left[alike] @ normals[alike]
        normal /= np.linalg.norm(normal)
        planes.append([*normal, -(hull.points @ normal).max()])
        left[alike] = 0
    return np.array(planes) if left.sum() < (1 - _FLAT) * areas.sum() else None
