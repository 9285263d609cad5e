"""Local normalised cross-correlation: gain and offset may differ from place to place (bias fields, contrast changes)."""

from __future__ import annotations

import torch
from torch import Tensor

from regkit.filters import smooth
from regkit.similarity.measure import full_precision, null, ratio, standardise

FLOOR = 3e-3  # share of the scan's variance: a local deviation of 5 % of the global one counts half


@full_precision
def loss(moved: Tensor, fixed: Tensor, weight: Tensor | None = None, *, sigma: float = 2.0, floor: float = FLOOR) -> Tensor:
    """1 − mean local correlation in Gaussian windows of `sigma` voxels: (N, C, *S), (N, C, *S), (N, 1, *S) → (N,).

    With local (co)variances under the weights (normalised convolution) of the scans at unit global variance,
    `1 − Σ w cov / √((var_m + ε)(var_f + ε)) / Σ w ½ (var_m / (var_m + ε) + var_f / (var_f + ε))`. The correlation keeps its
    sign; where both scans are flat nothing counts, where one is that counts as unrelated; 0 exactly for equal scans, 1 for
    unrelated ones, at most 2. Half the mean squared difference of `features`, normalised, where texture is finer than the
    window. Cachier & Pennec 2000; Avants et al. 2008.
    """
    m, f = standardise(moved, weight), standardise(fixed, weight)
    mean_m, mean_f, mm, ff, mf = _window(torch.cat([m, f, m * m, f * f, m * f], 1), weight, sigma).chunk(5, 1)
    var_m, var_f = (mm - mean_m**2).clamp_min(0), (ff - mean_f**2).clamp_min(0)
    together = (mf - mean_m * mean_f) * ((var_m + floor) * (var_f + floor)).rsqrt()
    confidence = (var_m / (var_m + floor) + var_f / (var_f + floor)) / 2
    if weight is not None:
        together, confidence = together * weight, confidence * weight
    return 1 - ratio(together.flatten(1).sum(1), confidence.flatten(1).sum(1))


@full_precision
def features(image: Tensor, weight: Tensor | None = None, *, sigma: float = 2.0, floor: float = FLOOR) -> Tensor:
    """The locally standardised image `(I − μ) / √(var + ε)`, Gaussian windows of `sigma` voxels: (N, 1, *S) → (N, 1, *S)."""
    scan = standardise(image, weight)
    middle, square = _window(torch.cat([scan, scan * scan], 1), weight, sigma).chunk(2, 1)
    return null((scan - middle) * ((square - middle**2).clamp_min(0) + floor).rsqrt(), weight)


def _window(data: Tensor, weight: Tensor | None, sigma: float) -> Tensor:
    """Weighted mean of data (N, C, *S) in a Gaussian window around every voxel."""
    sigmas = [sigma] * (data.ndim - 2)
    if weight is None:
        return smooth(data, sigmas)
    both = smooth(torch.cat([data * weight, weight], 1), sigmas)
    return both[:, :-1] / both[:, -1:].clamp_min(1e-20)
