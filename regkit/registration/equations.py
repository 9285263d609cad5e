"""The least-squares equations of one level: similarity and its normal matrix for many candidate maps at once.

A `Side` is one direction of the comparison. Forward: points of the fixed scan, moving features read at T(x). Backward:
points of the moving scan, fixed features read at T⁻¹(y). Using both makes align(a, b) and align(b, a)⁻¹ agree.

All geometry is in the frame F of `space.Frame`: u = F(x). For a step T ← T ∘ F⁻¹ exp(Σ θ_p G_p) F the value read at a point
changes by `h · (G_p ũ)` with h the feature's gradient in frame coordinates and ũ = (u, 1): a matrix of D × (D+1) numbers
that all models share, so sums are made once and then contracted with the model's generators.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from regkit.filters import gradient
from regkit.sampling import inside, sample
from regkit.space import Frame, Grid


@dataclass(frozen=True, eq=False)
class Side:
    """One direction of a comparison.

    u: (P, D) frame coordinates of the home points. features: (C, P) and weight: (P,) there.
    stack: (1, C (1 + D) + 1, *S) features, their index gradients and weight of the other scan.
    to_index: (D+1, D+1) float64, from the frame to the index of `stack`, after the map has been applied.
    forward: whether the home points are the fixed scan's.
    basis: (Q, P) functions of the home intensity, for the correlation ratio.
    """

    u: Tensor
    features: Tensor
    weight: Tensor
    stack: Tensor
    to_index: Tensor
    forward: bool
    basis: Tensor | None = None

    @cached_property
    def values(self) -> Tensor:
        """(1, C + 1, *S): the stack without its gradients."""
        return torch.cat([self.stack[:, : len(self.features)], self.stack[:, -1:]], 1)


@dataclass(frozen=True, eq=False)
class Equations:
    """Similarity (N,) in [-1, 1], 1 is best, and, for a step θ in all D (D+1) matrix entries, normal matrix and gradient."""

    score: Tensor
    normal: Tensor
    slope: Tensor

    def __add__(self, other: Equations) -> Equations:
        return Equations(self.score + other.score, self.normal + other.normal, self.slope + other.slope)


def stack_of(features: Tensor, weight: Tensor) -> Tensor:
    """Features (1, C, *S), their gradients per index step and the weight, as channels of one tensor."""
    steps = gradient(features)
    return torch.cat([features, steps.reshape(1, -1, *features.shape[2:]), weight], 1).contiguous()


def make_side(home: Tensor, home_weight: Tensor, home_grid: Grid, chosen: Tensor, away: Tensor, to_index: Tensor, frame: Frame,
              forward: bool, residual: str) -> Side:
    """A side from home features (1, C, *S) at the `chosen` voxels (P,) (flat), and the other scan's stack."""
    index = torch.stack(torch.unravel_index(chosen, home_grid.shape), -1).double()[None]
    u = (home_grid.to_world(index)[0] - frame.centre[0]) / frame.scale
    features = home.reshape(home.shape[1], -1)[:, chosen]
    weight = home_weight.flatten()[chosen]
    return Side(u.float(), features, weight, away, to_index, forward,
                spline_basis(features[0]) if residual == "ratio" else None)


def spline_basis(values: Tensor, count: int = 16) -> Tensor:
    """(Q, P): quadratic B-splines of an intensity, knots at its quantiles, so that each carries like many points; and the
    intensity itself, so that one contrast is explained without a rest."""
    ranks = torch.empty_like(values)
    order = values.argsort()
    ordered = values[order]
    # equal values must get equal rank: the place of the middle of each run
    _, inverse, counts = torch.unique_consecutive(ordered, return_inverse=True, return_counts=True)
    ends = counts.cumsum(0).float()
    ranks[order] = (ends - counts.float() / 2)[inverse]
    x = ranks / len(values) * (count - 2)
    distance = (x[None] - (torch.arange(count, device=values.device)[:, None] - 0.5)).abs()
    splines = torch.where(distance < 0.5, 0.75 - distance**2, 0.5 * (1.5 - distance).clamp_min(0) ** 2)
    return torch.cat([splines, ((values - values.mean()) / values.std().clamp_min(1e-6))[None]])


def place(side: Side, maps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Where a side's points fall under maps (N, D+1, D+1) given in the frame: z (N|1, P, D), index (N, P, D), linear (N, D, D)."""
    d = side.u.shape[-1]
    if side.forward:
        m = side.to_index @ maps
        z = side.u[None]
        linear = m[:, :d, :d].float()
        return z, z @ linear.mT + m[:, None, :d, d].float(), linear
    back = torch.linalg.inv(maps)
    z = side.u[None] @ back[:, :d, :d].float().mT + back[:, None, :d, d].float()
    linear = side.to_index[None, :d, :d].float()
    return z, z @ linear.mT + side.to_index[None, None, :d, d].float(), linear.expand(len(maps), d, d)


def equations(side: Side, maps: Tensor, residual: str, *, slopes: bool = True) -> Equations:
    """Similarity and normal equations of one side for N maps (N, D+1, D+1), given in the frame (F T F⁻¹)."""
    d, channels = side.u.shape[-1], len(side.features)
    z, index, linear = place(side, maps)
    seen = inside(index, tuple(side.stack.shape[2:]))
    if slopes:
        values = sample(side.stack, index)
        read, steps, away = values[:, :channels], values[:, channels:-1], values[:, -1]
    else:
        values = sample(side.values, index)
        read, steps, away = values[:, :channels], None, values[:, -1]
    weight = side.weight * away * seen  # (N, P)
    total = weight.sum(1).clamp_min(1e-6)
    home = side.features[None]
    if residual == "difference":
        terms = _difference(home, read, weight)
    elif residual == "ratio":
        terms = _ratio(side, read, weight, total)
    else:
        terms = _correlation(home, read, weight, total)
    score, pull, norm, project = terms
    score = score * _seen_share(side, weight, residual)
    if steps is None:
        return Equations(score, maps.new_zeros(()), maps.new_zeros(()))
    g = steps.reshape(len(maps), channels, d, -1)
    h = torch.einsum("ncip,nij->ncjp", g, linear)  # gradient in frame coordinates
    h = h if side.forward else -h
    zt = torch.cat([z, torch.ones_like(z[..., :1])], -1).expand(len(maps), -1, -1)  # (N, P, D+1)
    k = len(maps)
    hh = torch.einsum("ncip,ncjp->npij", h, h) * weight[..., None, None]
    zz = (zt[..., :, None] * zt[..., None, :]).reshape(k, -1, (d + 1) ** 2)
    normal = (hh.reshape(k, -1, d * d).mT @ zz).reshape(k, d, d, d + 1, d + 1).permute(0, 1, 3, 2, 4).reshape(k, d * (d + 1), -1)
    normal = normal - project(h, zt)
    slope = (torch.einsum("ncip,ncp->nip", h, pull) * weight[:, None]) @ zt  # (N, D, D+1)
    scale = norm[:, None, None]
    return Equations(score, (normal * scale).double(), (slope.reshape(k, -1) * norm[:, None]).double())


def _seen_share(side: Side, weight: Tensor, residual: str) -> Tensor:
    """Square root of the share of the home scan's feature energy that is seen: zero overlap scores zero."""
    f = side.features
    if residual != "correlation" or len(f) > 1:
        f = f - (f * side.weight).sum(1, keepdim=True) / side.weight.sum().clamp_min(1e-6)
    energy = f.square().sum(0)
    return ((weight @ energy) / (side.weight @ energy).clamp_min(1e-12)).clamp(0, 1).sqrt()


def _moment(h: Tensor, zt: Tensor, factor: Tensor) -> Tensor:
    """Σ_p factor h ⊗ ũ for factor (N, Q, P), h (N, 1, D, P): (N, Q, D (D+1))."""
    n = len(factor)
    outer = (h[:, 0].mT[..., :, None] * zt[..., None, :]).reshape(n, zt.shape[1], -1)
    return factor @ outer


def _correlation(home: Tensor, read: Tensor, weight: Tensor, total: Tensor):
    """1 - |f̂ - m̂|² / 2, both zero-mean (a channel) and of unit norm under the current weights, else negative gain wins or
    a flat patch scores perfectly."""
    w = weight[:, None]
    f = home - (home * w).sum(2, keepdim=True) / total[:, None, None]
    m = read - (read * w).sum(2, keepdim=True) / total[:, None, None]
    nf = (f.square() * w).sum((1, 2)).clamp_min(1e-12).sqrt()
    nm = (m.square() * w).sum((1, 2)).clamp_min(1e-12).sqrt()
    f, m = f / nf[:, None, None], m / nm[:, None, None]
    rho = (f * m * w).sum((1, 2))

    def project(h: Tensor, zt: Tensor) -> Tensor:
        mean = (h * w[:, :, None]) @ zt[:, None]  # (N, C, D, D+1)
        mean = mean.reshape(*mean.shape[:2], -1)
        along = ((h * (m * w)[:, :, None]) @ zt[:, None]).sum(1).reshape(len(m), 1, -1)
        return mean.mT @ (mean / total[:, None, None]) + along.mT @ along

    # residual f̂ - m̂, Jacobian -(1 - m̂ m̂ᵀ) K / |m|: slope Kᵀ (f̂ - ρ m̂) / |m|; dividing by |m|² once makes both alike
    return rho, (f - rho[:, None, None] * m) * nm[:, None, None], 1 / nm.square(), project


def _difference(home: Tensor, read: Tensor, weight: Tensor):
    """Mean squared difference; scored as 1 - |f - m|² / (|f|² + |m|²), both about the mean of f."""
    w = weight[:, None]
    r = home - read
    centre = (home * w).sum((1, 2), keepdim=True) / w.sum((1, 2), keepdim=True).clamp_min(1e-6)
    energy = (((home - centre).square() + (read - centre).square()) * w).sum((1, 2)).clamp_min(1e-12)
    score = 1 - (r.square() * w).sum((1, 2)) / energy
    return score.clamp(-1, 1), r, 1 / energy, lambda h, zt: 0.0


def _ratio(side: Side, read: Tensor, weight: Tensor, total: Tensor):
    """Correlation ratio (Roche 1998): what of the read intensity the home intensity's B-splines do not explain."""
    assert side.basis is not None
    w = weight[:, None]
    m = read - (read * w).sum(2, keepdim=True) / total[:, None, None]
    m = m / (m.square() * w).sum((1, 2), keepdim=True).clamp_min(1e-12).sqrt()
    nm = (read - (read * w).sum(2, keepdim=True) / total[:, None, None]).square().mul(w).sum((1, 2)).clamp_min(1e-12).sqrt()
    bw = side.basis[None] * w  # (N, Q, P)
    gram = bw @ side.basis.mT
    ridge = (1e-4 * total / len(side.basis))[:, None, None] * torch.eye(len(side.basis), device=w.device)
    inverse = torch.linalg.inv((gram + ridge).double()).float()
    explained = (inverse @ (bw @ m.mT)).mT @ side.basis  # (N, 1, P)
    r = m - explained
    eta = 1 - (r.square() * w).sum((1, 2))

    def project(h: Tensor, zt: Tensor) -> Tensor:
        b = _moment(h, zt, bw)
        return b.mT @ inverse @ b

    # J = (1 - P) K / |m|, residual r: descend, so the pull is -(r - |r|² m)
    pull = -(r - (1 - eta)[:, None, None] * m) * nm[:, None, None]
    return eta.clamp(0, 1).sqrt(), pull, 1 / nm.square(), project
