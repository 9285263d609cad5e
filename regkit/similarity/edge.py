"""Edge strength: edges at the same places, whatever the contrast and whichever way either scan is turned."""

from __future__ import annotations

from torch import Tensor

from regkit.filters import gradient
from regkit.similarity import ncc
from regkit.similarity.measure import fill, full_precision, mean, null, standardise


@full_precision
def loss(moved: Tensor, fixed: Tensor, weight: Tensor | None = None) -> Tensor:
    """1 − weighted Pearson correlation of `features`: (N, C, *S), (N, C, *S), (N, 1, *S) → (N,) in [0, 2]."""
    n, c = moved.shape[:2]
    pair = [features(image.reshape(n * c, 1, *image.shape[2:]), None if weight is None else
                     weight.expand(n, c, *weight.shape[2:]).reshape(n * c, 1, *weight.shape[2:])).reshape(image.shape)
            for image in (moved, fixed)]
    return ncc.loss(pair[0], pair[1], weight)


@full_precision
def features(image: Tensor, weight: Tensor | None = None) -> Tensor:
    """`|∇I| / (|∇I| + ε)`, ε the weighted mean of |∇I|: (N, 1, *S) → (N, 1, *S). Unlike NGF's direction it does not turn
    with the frame, so one computation serves all poses."""
    slope = gradient(fill(standardise(image, weight), weight))[:, 0]
    steep = ((slope * slope).sum(1, keepdim=True) + 1e-20).sqrt()
    return null(steep / (steep + mean(steep, weight) + 1e-6), weight)
