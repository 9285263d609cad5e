"""Mean squared difference: scans of one modality on one intensity scale."""

from __future__ import annotations

import torch
from torch import Tensor

from regkit.similarity.measure import full_precision, mean, null


@full_precision
def loss(moved: Tensor, fixed: Tensor, weight: Tensor | None = None) -> Tensor:
    """Σ w (m − f)² / Σ w, mean over channels: (N, C, *S), (N, C, *S), (N, 1, *S) → (N,).

    Unrelated images have no fixed value here; zero total weight gives 1, that of intensities of order one."""
    difference = null(moved, weight) - null(fixed, weight)
    value = mean(difference**2, weight).flatten(1).mean(1)
    return value if weight is None else torch.where(weight.flatten(1).sum(1) > 0, value, 1)


@full_precision
def features(image: Tensor, weight: Tensor | None = None) -> Tensor:
    """The image itself, zero where the weight is: (N, 1, *S) → (N, 1, *S)."""
    return null(image, weight)
