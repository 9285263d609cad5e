"""Normalised cross-correlation: intensities related by one gain and one offset."""

from __future__ import annotations

import torch
from torch import Tensor

from regkit.similarity import mse
from regkit.similarity.measure import centre, full_precision, mean, null

features = mse.features  # the image itself: least squares standardises it under the weights of the moment


@full_precision
def loss(moved: Tensor, fixed: Tensor, weight: Tensor | None = None) -> Tensor:
    """1 − weighted Pearson correlation, channels pooled after each has lost its mean: (N, C, *S) ×2, (N, 1, *S) → (N,).

    In [0, 2]; 1 for unrelated images, which a constant is to everything."""
    (m, var_m), (f, var_f) = centre(null(moved, weight), weight), centre(null(fixed, weight), weight)
    covariance, product = mean(m * f, weight).flatten(1).sum(1), var_m.flatten(1).sum(1) * var_f.flatten(1).sum(1)
    ok = product > 0
    return 1 - torch.where(ok, covariance * torch.where(ok, product, 1).rsqrt(), 0)
