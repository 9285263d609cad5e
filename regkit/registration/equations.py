"""The least-squares equations of one level: similarity and its normal matrix for many candidate maps at once.

A `Side` is one direction of the comparison. Forward: points of the fixed scan, moving features read at T(x). Backward:
points of the moving scan, fixed features read at T⁻¹(y). Using both makes align(a, b) and align(b, a)⁻¹ agree.

All geometry is in the frame F of `space.Frame`: u = F(x). For a step T ← T ∘ F⁻¹ exp(Σ θ_p G_p) F the value read at a point
changes by `h · (G_p ũ)` with h the feature's gradient in frame coordinates and ũ = (u, 1): a matrix of D × (D+1) numbers
that all models share, so sums are made once and then contracted with the model's generators.

The gradient is the home scan's, as in inverse composition (Baker & Matthews 2004): where scans agree both have the same, the
Jacobian and its normal matrix are then made once a side, and a step costs one look at the other scan and one product. With
both sides together a step follows the mean of both scans' gradients, which converges at second order (Benhimane & Malis
2004). The correlation ratio, whose scans differ in contrast, takes the other scan's gradient anew at every step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from regkit.filters import gradient
from regkit.sampling import inside, sample
from regkit.space import Frame, Grid

_ROUNDING = 1e-5  # of the sum of squares: a variance below is what single precision leaves of none


@dataclass(frozen=True, eq=False)
class Side:
    """One direction of a comparison.

    u: (P, D) frame coordinates of the home points. features: (C, P) and weight: (P,) there. energy: (P,), how much of what
    is to be compared each point carries. forward: whether the home points are the fixed scan's.
    volume: (1, C + 1, *S) features and weight of the other scan; for the correlation ratio (1, 2 + D, *S), index gradients
    between them. to_index: (D+1, D+1) float64, from the frame to the index of `volume`, after the map has been applied.
    gradient: D × (C, P), home gradients h in the frame; normal: (D (D+1), D (D+1)) of h ⊗ ũ were all points seen.
    basis: (Q, P) functions of the home intensity, for the correlation ratio, which needs neither.
    """

    u: Tensor
    features: Tensor
    weight: Tensor
    energy: Tensor
    volume: Tensor
    to_index: Tensor
    forward: bool
    gradient: tuple[Tensor, ...] = ()
    normal: Tensor | None = None
    basis: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Equations:
    """Of what both scans see, the similarity (N,) in [-1, 1], 1 is best; the share (N,) of the home scan's feature energy
    that is seen; and, for a step θ in all D (D+1) matrix entries, normal matrix and gradient."""

    similarity: Tensor
    share: Tensor
    normal: Tensor
    slope: Tensor

    @property
    def score(self) -> Tensor:
        """(N,): zero overlap scores zero."""
        return self.similarity * self.share.sqrt()

    def __add__(self, other: Equations) -> Equations:
        return Equations(self.similarity + other.similarity, self.share + other.share, self.normal + other.normal,
                         self.slope + other.slope)


def volume_of(features: Tensor, weight: Tensor, residual: str) -> Tensor:
    """What a side reads of the other scan: features (1, C, *S), for the ratio their gradients per index step, the weight."""
    parts = [features, gradient(features).flatten(1, 2), weight] if residual == "ratio" else [features, weight]
    return torch.cat([part.movedim(1, -1) for part in parts], -1).movedim(-1, 1)  # channels last: one voxel, one row


def make_side(home: Tensor, home_weight: Tensor, home_grid: Grid, chosen: Tensor, away: Tensor, to_index: Tensor, frame: Frame,
              forward: bool, residual: str, slopes: bool) -> Side:
    """A side from home features (1, C, *S) at the `chosen` voxels (P,) (flat), and the other scan's volume.

    slopes: whether steps will be taken, or only scores looked at."""
    strides = [math.prod(home_grid.shape[axis + 1:]) for axis in range(home_grid.ndim)]
    index = [chosen // stride % size for stride, size in zip(strides, home_grid.shape, strict=True)]
    u = ((home_grid.to_world(torch.stack(index, -1).double()[None])[0] - frame.centre[0]) / frame.scale).float()
    rows = home[0].flatten(1)
    features, weight = rows[:, chosen], home_weight.flatten()[chosen]
    centred = features - (features @ weight)[:, None] / weight.sum().clamp_min(1e-6)
    # one channel that is zero on the mean of every window, and is so by design, is as it is
    energy = (features if residual == "correlation" and len(features) == 1 else centred).square().sum(0) * weight
    side = Side(u, features, weight, energy, away, to_index, forward)
    if residual == "ratio":
        return replace(side, basis=spline_basis(features[0]))
    if not slopes:
        return side
    steps = []
    for size, at, stride in zip(home_grid.shape, index, strides, strict=True):
        up, down = (at < size - 1).long(), (at > 0).long()  # central differences, one-sided at the ends
        steps.append((rows[:, chosen + up * stride] - rows[:, chosen - down * stride]) / (up + down).clamp_min(1))
    to_frame = (home_grid.inverse[0] @ frame.inverse[0])[:-1, :-1].float()
    h = (to_frame.mT @ torch.stack(steps).flatten(1)).reshape(len(steps), *features.shape)  # (D, C, P)
    return replace(side, gradient=h.unbind(0), normal=_normal(h, centred, u, weight, residual))


def _normal(h: Tensor, centred: Tensor, u: Tensor, weight: Tensor, residual: str) -> Tensor:
    """Normal matrix of h ⊗ ũ for h (D, C, P), u (P, D), weight (P,), less what the means of the channels and the norm of
    the features (C, P) take out where they are to be correlated."""
    d = len(h)
    ut = torch.cat([u, torch.ones_like(u[:, :1])], 1)
    hh = torch.stack([(a * b).sum(0) for a in h for b in h]) * weight  # (D D, P)
    normal = hh @ (ut[:, :, None] * ut[:, None]).flatten(1)
    normal = normal.reshape(d, d, d + 1, d + 1).transpose(1, 2).reshape(d * (d + 1), -1)
    if residual != "correlation":
        return normal
    means = ((h * weight) @ ut).transpose(0, 1).flatten(1)  # (C, D (D+1))
    along = (((h * centred).sum(1) * weight) @ ut).flatten()
    return normal - means.mT @ means / weight.sum().clamp_min(1e-6) \
        - along[:, None] * along / (centred.square() @ weight).sum().clamp_min(1e-12)


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
    channels = len(side.features)
    z, index, linear = place(side, maps)
    values = sample(side.volume, index)
    seen = values[:, -1] * inside(index, tuple(side.volume.shape[2:]))
    read, weight = values[:, :channels], side.weight * seen  # (N, C, P), (N, P)
    total = weight.sum(1).clamp_min(1e-6)
    share = ((seen @ side.energy) / side.energy.sum().clamp_min(1e-12)).clamp(0, 1)
    if residual == "ratio":
        score, normal, slope = _ratio(side, read, values[:, channels:-1], weight, total, z, linear, slopes)
    else:
        score, pull, scale = compare(side, read, weight, total, residual)
        normal = slope = maps.new_zeros(())
        if slopes:
            assert side.normal is not None
            drawn = torch.stack([(pull * h).sum(1) for h in side.gradient], 1)  # (N, D, P)
            ut = torch.cat([side.u, torch.ones_like(side.u[:, :1])], 1)
            slope = (drawn @ ut).flatten(1).double() * scale[:, None]
            normal = side.normal.double() * (scale * share)[:, None, None]
            if not side.forward:
                # the step acts at z = T⁻¹(v), not at the home point v: h_z = -Aᵀ h_v, z̃ = T⁻¹ ṽ
                d = side.u.shape[-1]
                carry = -torch.einsum("nji,nkl->nikjl", maps[:, :d, :d], torch.linalg.inv(maps))
                carry = carry.reshape(len(maps), d * (d + 1), -1)
                slope, normal = (carry @ slope[..., None])[..., 0], carry @ normal @ carry.mT
    return Equations(score, share, normal, slope)


def compare(side: Side, read: Tensor, weight: Tensor, total: Tensor, residual: str) -> tuple[Tensor, Tensor, Tensor]:
    """Similarity (N,), weighted pull (N, C, P) and scale (N,) of the equations, of what was read (N, C, P) of the other scan."""
    return (_difference if residual == "difference" else _correlation)(side, read, weight, total)


def _correlation(side: Side, read: Tensor, weight: Tensor, total: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The correlation ρ of features zero-mean (a channel) and of unit norm under the current weights (else negative gain
    wins, or a flat patch scores perfectly); weighted pull; scale of the equations. ρ = 1 - |f̂ - m̂|² / 2.

    The Jacobian of m̂ is (1 - f̂ f̂ᵀ) h / |f|, so its product with the residual f̂ - m̂ is that of h with ρ f̂ - m̂."""
    f, w, n = side.features[None], weight[:, None], total[:, None]
    wm = read * w
    mean_f, mean_m = weight @ side.features.mT / n, wm.sum(2) / n
    sum_f, sum_m = weight @ side.features.square().sum(0), (wm * read).sum((1, 2))
    ff, mm = (sum_f - (mean_f.square() * n).sum(1)).clamp_min(1e-12), (sum_m - (mean_m.square() * n).sum(1)).clamp_min(1e-12)
    there = (ff > _ROUNDING * sum_f) & (mm > _ROUNDING * sum_m)  # of a few points, or of a flat patch, only rounding errors are left
    rho = ((wm.flatten(1) @ side.features.flatten()) - (mean_f * mean_m * n).sum(1)) * (ff * mm).rsqrt()
    rho = torch.where(there, rho, 0).clamp(-1, 1)
    gain = (ff / mm).sqrt()
    pull = torch.addcmul(w * torch.addcmul((gain[:, None] * mean_m - rho[:, None] * mean_f)[..., None], rho[:, None, None], f),
                         wm, -gain[:, None, None])
    return rho, pull, torch.where(there, 1 / ff, 0)


def _difference(side: Side, read: Tensor, weight: Tensor, total: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean squared difference; scored as 1 - |f - m|² / (|f|² + |m|²), both about the mean of f."""
    w = weight[:, None]
    r = side.features - read
    centre = (side.features * w).sum((1, 2), keepdim=True) / total[:, None, None]
    energy = (((side.features - centre).square() + (read - centre).square()) * w).sum((1, 2)).clamp_min(1e-12)
    return (1 - (r.square() * w).sum((1, 2)) / energy).clamp(-1, 1), r * w, 1 / energy


def _ratio(side: Side, read: Tensor, steps: Tensor, weight: Tensor, total: Tensor, z: Tensor, linear: Tensor,
           slopes: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Correlation ratio (Roche 1998): what of the read intensity the home intensity's B-splines do not explain.
    → its root, normal matrix and slope."""
    assert side.basis is not None
    m = read[:, 0] - (read[:, 0] * weight).sum(1, keepdim=True) / total[:, None]
    mm = (m.square() * weight).sum(1).clamp_min(1e-12)
    m = m * mm.rsqrt()[:, None]
    bw = side.basis * weight[:, None]  # (N, Q, P)
    ridge = (1e-4 * total / len(side.basis))[:, None, None] * torch.eye(len(side.basis), device=weight.device)
    inverse = torch.linalg.inv((bw @ side.basis.mT + ridge).double()).float()
    r = m - ((inverse @ (bw @ m[..., None])).mT @ side.basis)[:, 0]
    eta = 1 - (r.square() * weight).sum(1)
    score = eta.clamp(0, 1).sqrt()
    if not slopes:
        return score, read.new_zeros(()), read.new_zeros(())
    # J = (1 - P) K / |m|, residual r: descend, so the pull is -(r - |r|² m)
    h = linear.mT @ steps  # (N, D, P), gradient in frame coordinates
    h = h if side.forward else -h
    zt = torch.cat([z, torch.ones_like(z[..., :1])], -1).mT.expand(len(read), -1, -1)  # (N, D+1, P)
    outer = (h[:, :, None] * zt[:, None]).flatten(1, 2)  # (N, D (D+1), P)
    b = bw @ outer.mT
    normal = (outer * weight[:, None]) @ outer.mT - b.mT @ inverse @ b
    slope = outer @ ((-(r - (1 - eta)[:, None] * m)) * weight)[..., None]
    return score, (normal / mm[:, None, None]).double(), (slope[..., 0] * mm.rsqrt()[:, None]).double()
