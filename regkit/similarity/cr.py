"""Correlation ratio (Roche et al., MICCAI 1998): the moved intensity is some function of the fixed one."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from regkit.similarity import mse
from regkit.similarity.measure import TINY, centre, each_channel, full_precision, null, ratio
from regkit.similarity.windows import places, summed, windows

RIDGE = 1e-6  # of the total weight: settles the coefficients of windows that are (nearly) empty

features = mse.features  # the image itself: least squares projects the windows of the fixed scan out of it


@full_precision
def loss(moved: Tensor, fixed: Tensor, weight: Tensor | None = None, *, bins: int = 24) -> Tensor:
    """1 − η²(moved | fixed), mean over channels: (N, C, *S), (N, C, *S), (N, 1, *S) → (N,).

    η² is the share of moved's weighted variance that ridge regression on `bins` cubic B-splines of the fixed intensity
    explains: `bᵀ (A + λ)⁻¹ b / var`, A = BᵀWB, b = BᵀWm. In [0, 1]; 1 for unrelated images. Not symmetric."""
    c = moved.shape[1]
    w = each_channel(torch.ones_like(moved[:, :1]) if weight is None else weight, c)
    assert w is not None
    w = w.flatten(2)
    m, variance = centre(null(moved.reshape(len(w), 1, -1), w), w)
    share = w[:, 0] / w.sum(2).clamp_min(TINY)
    both = summed(_products(bins), places(fixed.reshape(len(w), -1), w[:, 0], bins), m[:, 0], share).double()
    # The small system is solved in float64: nearly empty windows make it ill-conditioned.
    gram = both[..., :bins] + RIDGE * torch.eye(bins, dtype=torch.float64, device=both.device)
    right = both[..., bins:]
    explained = (right * torch.linalg.solve(gram, right)).sum((1, 2)).to(m)
    return (1 - ratio(explained, variance.reshape(-1)).clamp(0, 1)).reshape(-1, c).mean(1)


def _products(bins: int) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    def products(place: Tensor, values: Tensor, share: Tensor) -> Tensor:
        """BᵀWB and, beside it, BᵀWm: (N, bins, bins + 1)."""
        base = windows(place, bins)
        return (base * share[..., None]).mT @ torch.cat([base, values[..., None]], 2)

    return products
