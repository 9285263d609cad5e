"""Normalised gradient fields (Haber & Modersitzki, MICCAI 2006): edges at the same places in the same or opposite
direction, whatever the intensities."""

from __future__ import annotations

from itertools import combinations_with_replacement

import torch
from torch import Tensor

from regkit.filters import gradient
from regkit.similarity.measure import each_channel, fill, full_precision, mean, null, ratio, standardise


@full_precision
def loss(moved: Tensor, fixed: Tensor, weight: Tensor | None = None) -> Tensor:
    """`1 − Σ w (n·n')² / Σ w ½ (|n|⁴ + |n'|⁴)`: (N, C, *S), (N, C, *S), (N, 1, *S) → (N,).

    Haber & Modersitzki's 1 − (n·n')², normalised by the edges there are, so that flat regions count nothing: 0 for
    equal scans, 1 where no edge meets another (unrelated scans' edges cross at all angles: about 0.6 in 2D, 0.7 in 3D)
    and for zero total weight. Half the mean squared difference of `features`, normalised."""
    n, c = moved.shape[:2]
    w = each_channel(weight, c)
    m, f = (_field(image.reshape(n * c, 1, *image.shape[2:]), w) for image in (moved, fixed))
    together = mean((m * f).sum(1, keepdim=True) ** 2, w)
    apart = mean(((m * m).sum(1, keepdim=True) ** 2 + (f * f).sum(1, keepdim=True) ** 2) / 2, w)
    return (1 - ratio(together, apart)).reshape(n, c).mean(1)


@full_precision
def features(image: Tensor, weight: Tensor | None = None) -> Tensor:
    """What lies on and above the diagonal of n nᵀ, row by row, the latter times √2: (N, 1, *S) → (N, 6 | 3, *S). Free of n's
    sign, with the Frobenius norm: `|F − F'|² = |n|⁴ + |n'|⁴ − 2 (n·n')²`."""
    n = _field(image, weight).unbind(1)
    return torch.stack([a * (b if a is b else 2**0.5 * b) for a, b in combinations_with_replacement(n, 2)], 1)


def _field(image: Tensor, weight: Tensor | None) -> Tensor:
    """∇I / √(|∇I|² + ε²), ε the weighted mean of |∇I|, and zero where the weight is: (N, 1, *S) → (N, D, *S)."""
    slope = gradient(fill(standardise(image, weight), weight))[:, 0]
    square = (slope * slope).sum(1, keepdim=True)
    # The summands keep roots and quotients finite; on a scan of unit variance they are below any edge.
    edge = mean((square + 1e-20).sqrt(), weight)
    return slope * null((square + edge**2 + 1e-12).rsqrt(), weight)
