"""Mutual information: any statistical relation between the intensities of two scans."""

from __future__ import annotations

import torch
from torch import Tensor

from regkit.similarity.measure import TINY, each_channel, full_precision, ratio
from regkit.similarity.windows import places, summed, windows


@full_precision
def loss(moved: Tensor, fixed: Tensor, weight: Tensor | None = None, *, bins: int = 32, normalised: bool = False) -> Tensor:
    """−MI in nats, mean over channels: (N, C, *S), (N, C, *S), (N, 1, *S) → (N,); 0 for unrelated images. See `joint`."""
    c = moved.shape[1]
    w = each_channel(torch.ones_like(moved[:, :1]) if weight is None else weight, c)
    assert w is not None
    value = joint(moved.reshape(len(w), -1), fixed.reshape(len(w), -1), w.flatten(1), bins=bins, normalised=normalised)
    return -value.reshape(-1, c).mean(1)


@full_precision
def joint(moved: Tensor, fixed: Tensor, weight: Tensor, *, bins: int = 32, normalised: bool = False) -> Tensor:
    """Mutual information of values at sample points: (N, P), (N, P), (N, P) → (N,), in nats, ≥ 0.

    `Σ p log(p / p_m p_f)` of the joint histogram with cubic B-spline windows for both scans (Thévenaz & Unser 2000), and so
    symmetric. normalised: divided by the joint entropy, in [0, 1] (Studholme's 1999 measure less one, which depends
    less on the overlap)."""
    share = weight / weight.sum(1, keepdim=True).clamp_min(TINY)
    p = summed(lambda m, f, w: (windows(m, bins) * w[..., None]).mT @ windows(f, bins),
               places(moved, weight, bins), places(fixed, weight, bins), share)
    p_m, p_f = p.sum(2), p.sum(1)
    together = _entropy(p.flatten(1))
    information = _entropy(p_m) + _entropy(p_f) - together
    return ratio(information, together) if normalised else information


def _entropy(p: Tensor) -> Tensor:
    return -(p * torch.log(p.clamp_min(1e-12))).sum(1)
