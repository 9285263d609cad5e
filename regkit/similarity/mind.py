"""Modality independent neighbourhood descriptor, self-similarity context (Heinrich et al., MICCAI 2013): scans whose
intensities are unrelated but whose structure repeats itself at the same places."""

from __future__ import annotations

from itertools import combinations

import torch
from torch import Tensor
from torch.nn import functional

from regkit.filters import smooth
from regkit.similarity.measure import each_channel, fill, full_precision, mean, null, standardise

UNRELATED = 0.25  # of unrelated noise, measured: 0.24 to 0.26 in 2D, 0.14 to 0.2 in 3D


@full_precision
def loss(moved: Tensor, fixed: Tensor, weight: Tensor | None = None, *, sigma: float = 0.6, dilation: int = 1) -> Tensor:
    """Weighted mean squared difference of the descriptors: (N, C, *S), (N, C, *S), (N, 1, *S) → (N,)."""
    n, c = moved.shape[:2]
    w = each_channel(weight, c)
    difference = _descriptor(moved.reshape(n * c, 1, *moved.shape[2:]), w, sigma, dilation) \
        - _descriptor(fixed.reshape(n * c, 1, *fixed.shape[2:]), w, sigma, dilation)
    value = mean(difference**2, w).reshape(n, -1).mean(1)
    return value if weight is None else torch.where(weight.flatten(1).sum(1) > 0, value, UNRELATED)


@full_precision
def features(image: Tensor, weight: Tensor | None = None, *, sigma: float = 0.6, dilation: int = 1) -> Tensor:
    """`exp(−(SSD_e − min SSD) / var)` for each edge e between neighbours √2·dilation apart, less its mean over the edges, so
    that flat places are zero and count nothing: (N, 1, *S) → (N, 12 | 4, *S).

    SSD_e: squared difference of the Gaussian patches (`sigma` voxels) at the edge's two ends; var: its mean over the
    edges, kept within 0.001 to 1000 times the scan's mean."""
    descriptor = _descriptor(image, weight, sigma, dilation)
    return null(descriptor - descriptor.mean(1, keepdim=True), weight)


def edges(ndim: int) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """(displacement, start) of the edges of the 2·ndim neighbours, those of one displacement next to each other."""
    def unit(axis: int, sign: int) -> tuple[int, ...]:
        return tuple(sign * (a == axis) for a in range(ndim))

    return [(tuple(p + q for p, q in zip(unit(i, 1), unit(j, s), strict=True)), start)
            for i, j in combinations(range(ndim), 2) for s in (1, -1) for start in (unit(i, -1), unit(j, -s))]


def _descriptor(image: Tensor, weight: Tensor | None, sigma: float, dilation: int) -> Tensor:
    ndim, k = image.ndim - 2, dilation
    scan = functional.pad(fill(standardise(image, weight), weight), [2 * k] * (2 * ndim), mode="replicate")
    inner = [n + 2 * k for n in image.shape[2:]]
    here = _crop(scan, inner, [k] * ndim)
    # Two edges share each displacement: one map of patch distances, read at two places, serves both.
    maps = torch.cat([(here - _crop(scan, inner, [k + k * o for o in d])) ** 2 for d, _ in edges(ndim)[::2]], 1)
    maps = smooth(maps, [sigma] * ndim)
    distance = torch.cat([_crop(maps[:, e // 2, None], image.shape[2:], [k + k * o for o in start])
                          for e, (_, start) in enumerate(edges(ndim))], 1)
    distance = distance - distance.amin(1, keepdim=True)
    variance = distance.mean(1, keepdim=True)
    usual = mean(variance, weight).clamp_min(1e-10)
    variance = torch.minimum(torch.maximum(variance, 0.001 * usual), 1000 * usual)
    return torch.exp(distance * (-1 / variance))


def _crop(data: Tensor, shape: list[int] | torch.Size, start: list[int]) -> Tensor:
    for axis, (n, s) in enumerate(zip(shape, start, strict=True)):
        data = data.narrow(axis + 2, s, n)
    return data
