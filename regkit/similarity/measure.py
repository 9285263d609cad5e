"""What every similarity measure is, and the few weighted operations they share.

A weight is (N, 1, *S) ≥ 0, or None for all ones. Voxels of zero weight may hold anything, NaN included.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, ParamSpec, Protocol

import torch
from torch import Tensor

from regkit.filters import smooth

_P = ParamSpec("_P")
TINY = 1e-30


class Loss(Protocol):
    def __call__(self, moved: Tensor, fixed: Tensor, weight: Tensor | None = None, /) -> Tensor: ...


class Features(Protocol):
    def __call__(self, image: Tensor, weight: Tensor | None = None, /) -> Tensor: ...


@dataclass(frozen=True)
class Similarity:
    """One measure of how well two scans lie on each other.

    loss: (moved (N, C, *S), fixed (N, C, *S), weight) → (N,); smaller is better, finite for whatever images, and the
      loss of unrelated images where the total weight is zero.
    features: (image (N, 1, *S), weight) → (N, F, *S), zero where the weight is zero; None if least squares cannot have it.
    residual: how least squares compares features: by their difference, their correlation, or as a correlation ratio.
    oriented: the features turn with the frame, so they must be computed in the frame in which they are compared.
    """

    name: str
    loss: Loss
    features: Features | None
    residual: Literal["difference", "correlation", "ratio", "none"]
    oriented: bool


def full_precision(function: Callable[_P, Tensor]) -> Callable[_P, Tensor]:
    """`function` on tensors of at least float32 and outside autocast: sums over a scan do not fit into half precision."""

    @functools.wraps(function)
    def wrapped(*args: _P.args, **kwargs: _P.kwargs) -> Tensor:
        raised = [a.float() if isinstance(a, Tensor) and a.dtype != torch.float64 else a for a in args]
        kwargs.update({k: v.float() for k, v in kwargs.items() if isinstance(v, Tensor) and v.dtype != torch.float64})
        device = next(v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)).device.type
        with torch.autocast(device, enabled=False):
            return function(*raised, **kwargs)  # pyright: ignore[reportCallIssue]

    return wrapped


def null(image: Tensor, weight: Tensor | None) -> Tensor:
    """`image` with zeros where the weight is zero; a product would leave NaN there, in the value or in the gradient."""
    return image if weight is None else torch.where(weight > 0, image, 0)


def mean(data: Tensor, weight: Tensor | None) -> Tensor:
    """Weighted mean over space, (N, C, *S) → (N, C, *1); 0 for zero total weight."""
    space = tuple(range(2, data.ndim))
    if weight is None:
        return data.mean(space, keepdim=True)
    return (data * weight).sum(space, keepdim=True) / weight.sum(space, keepdim=True).clamp_min(TINY)


def ratio(above: Tensor, below: Tensor, otherwise: float = 0.0) -> Tensor:
    """above / below, and `otherwise` (with zero gradient) where below is not positive."""
    ok = below > 0
    return torch.where(ok, above / torch.where(ok, below, 1), otherwise)


def centre(image: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor]:
    """`image` less its weighted mean, and its variance (N, C, *1), which is 0 if it is no more than rounding."""
    centred = image - mean(image, weight)
    variance = mean(centred**2, weight)
    return centred, torch.where(variance > 1e-10 * mean(image**2, weight), variance, 0)


def standardise(image: Tensor, weight: Tensor | None) -> Tensor:
    """`image` with weighted mean 0 and variance 1 in every channel; a constant becomes 0. What follows can then use
    absolute floors."""
    centred, variance = centre(null(image, weight), weight)
    ok = variance > 0
    return torch.where(ok, centred * torch.where(ok, variance, 1).rsqrt(), 0)


def fill(image: Tensor, weight: Tensor | None, sigma: float = 2.0) -> Tensor:
    """`image` (N, 1, *S) with voxels of zero weight replaced by the weighted mean around them (normalised convolution,
    Knutsson & Westin 1993), so that windows and differences at the border of a mask see no edge that is not there."""
    if weight is None:
        return image
    both = smooth(torch.cat([null(image, weight) * weight, weight], 1), [sigma] * (image.ndim - 2))
    return torch.where(weight > 0, image, both[:, :1] / both[:, 1:].clamp_min(1e-20))


def each_channel(data: Tensor | None, channels: int) -> Tensor | None:
    """(N, C|1, *S) → (N·C, 1, *S): the channels as items of their own, a weight repeated for each."""
    return None if data is None else data.expand(-1, channels, *data.shape[2:]).reshape(-1, 1, *data.shape[2:])
