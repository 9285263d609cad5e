"""Thin-plate splines: smooth maps that carry a lattice of control points where they are told (Duchon 1977, Bookstein 1989)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from regkit.errors import GeometryError, OptionError
from regkit.space.grid import Frame, apply_matrix

_ROUNDS, _ENOUGH = 40, 1e-9  # Newton steps of the inverse, and the miss, in units of the frame, at which it has settled
_CHUNK = 4_000_000  # points × control points looked at in one go: bounds memory


def _kernel(squared: Tensor, ndim: int) -> tuple[Tensor, Tensor]:
    """The fundamental solution of the biharmonic equation, r² log r in 2D and -r in 3D, and its derivative by r²; of r² (P, K)."""
    if ndim == 2:
        logarithm = squared.clamp_min(1e-30).log()
        return 0.5 * squared * logarithm, 0.5 * (logarithm + 1)
    r = squared.clamp_min(1e-24).sqrt()
    return -r, -0.5 / r.clamp_min(1e-6)  # nearer, differences of large numbers would be all that is left


def _squared(u: Tensor, centres: Tensor) -> Tensor:
    """Squared distances (…, P, K) of points (…, P, D) from control points (K, D): axis by axis, which needs a third of the memory."""
    first, *others = (u[..., a, None] - centres[:, a] for a in range(centres.shape[1]))
    return sum((away * away for away in others), first * first)


@dataclass(frozen=True)
class SplineModel:
    """The thin-plate spline as a transform model: θ (N, P) moves control points, P = D · control^D.

    The control points are a regular lattice over the fixed image, its outer edges included, `control` along each axis, last
    axis fastest; θ is where each moves, D numbers a point, in half the image's longest edge. θ = 0 is the identity.
    stiffness: λ ≥ 0 of the smoothing spline (Wahba 1990): 0 goes through the moved control points, more bends less and lets
    them miss; affine maps cost nothing.

    Raises OptionError for fewer than 2 control points or a negative stiffness.
    """

    control: int = 4
    stiffness: float = 0.0
    name: str = field(default="tps", init=False)

    def __post_init__(self) -> None:
        if not isinstance(self.control, int) or self.control < 2:
            raise OptionError(f"control: {self.control}; a thin-plate spline needs 2 or more control points along each axis")
        if not 0 <= self.stiffness < math.inf:
            raise OptionError(f"stiffness: {self.stiffness}; expected a number from 0 on")

    def count(self, ndim: int) -> int:
        """Number of parameters P."""
        return ndim * self.control**ndim

    def points(self, frame: Frame) -> Tensor:
        """(K, D) float64: the control points at rest, in the frame."""
        ends = [torch.linspace(-r, r, self.control, dtype=torch.float64, device=frame.centre.device) for r in frame.half]
        return torch.stack(torch.meshgrid(*ends, indexing="ij"), -1).reshape(-1, len(ends))

    def _solved(self, centres: Tensor) -> Tensor:
        """(K + D + 1, K): displacements of the control points → weights of the kernels and of 1, u."""
        k, d = centres.shape
        ones = torch.cat([torch.ones_like(centres[:, :1]), centres], 1)
        kernel = _kernel(_squared(centres, centres), d)[0]
        system = torch.zeros(k + d + 1, k + d + 1, dtype=centres.dtype, device=centres.device)
        system[:k, :k] = kernel + self.stiffness * torch.eye(k, dtype=centres.dtype, device=centres.device)
        system[:k, k:], system[k:, :k] = ones, ones.T
        return torch.linalg.inv(system)[:, :k]

    def energy(self, frame: Frame) -> Tensor:
        """(K, K): the form, in one coordinate of θ, of the bending energy of the spline through the moved control points, the integral
        of squared second derivatives but for a constant factor."""
        solved = SplineModel(self.control)._solved(self.points(frame))[: self.control ** len(frame.half)]
        return (solved + solved.mT) / 2

    def basis(self, u: Tensor, frame: Frame) -> Tensor:
        """(P, K): how far each of the points u (P, D), in the frame, follows each control point."""
        centres = self.points(frame)
        solved, centres = self._solved(centres).to(u), centres.to(u)
        return _kernel(_squared(u, centres), u.shape[-1])[0] @ solved[: len(centres)] + solved[len(centres)] + u @ solved[len(centres) + 1:]

    def transform(self, theta: Tensor, frame: Frame) -> Spline:
        """The map of world points that θ (N, P) stands for in a frame."""
        return Spline(theta, frame, self)

    def fit(self, p: Tensor, q: Tensor, w: Tensor | None, frame: Frame) -> Spline:
        """The spline that maps world points p (N, P, D) best to q, weights w (N, P) ≥ 0: least squares over the control points,
        with a slight pull towards the identity, which decides where points say nothing."""
        if p.shape != q.shape or p.ndim != 3:
            raise GeometryError(f"points: shapes {tuple(p.shape)} and {tuple(q.shape)}; expected equal (N, P, D)")
        found = []
        for i, (a, b) in enumerate(zip(p.double(), q.double(), strict=True)):
            u, v = (apply_matrix(frame.matrix, x[None])[0] for x in (a, b))
            basis = self.basis(u, frame)
            heavy = basis.mT if w is None else basis.mT * w[i].double()
            normal = heavy @ basis
            ridge = 1e-9 * normal.diagonal().mean() * torch.eye(len(normal), dtype=normal.dtype, device=normal.device)
            found.append(torch.linalg.solve(normal + ridge, heavy @ (v - u)).flatten())
        return Spline(torch.stack(found), frame, self)


@dataclass(frozen=True, eq=False)
class Spline:
    """A thin-plate spline, fixed world → moving world, RAS+ mm: `T = F⁻¹ S_θ F`, with S_θ(u) = u + Σ_k B_k(u) θ_k.

    theta: (N, P), see `SplineModel`. frame: of the fixed image. Raises GeometryError if θ does not fit or is not finite.
    """

    theta: Tensor
    frame: Frame
    model: SplineModel

    def __post_init__(self) -> None:
        count = self.model.count(self.ndim)
        if self.theta.ndim != 2 or self.theta.shape[1] != count:
            raise GeometryError(f"theta: shape {tuple(self.theta.shape)}; {self.model.control} control points an axis in {self.ndim}D "
                                f"need (N, {count})")
        if not bool(torch.isfinite(self.theta.detach()).all()):
            raise GeometryError("theta: holds NaN or infinity; a transform must be finite")

    @property
    def ndim(self) -> int:
        return self.frame.centre.shape[-1]

    def _moves(self, dtype: torch.dtype) -> Tensor:
        return self.theta.to(dtype).reshape(len(self.theta), -1, self.ndim)

    def _weights(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The control points (K, D), and the weights (N, K + D + 1, D) of their kernels and of 1, u in what is added to u."""
        centres = self.model.points(self.frame)
        return centres.to(dtype), (self.model._solved(centres) @ self._moves(torch.float64)).to(dtype)

    def bend(self, u: Tensor) -> Tensor:
        """S_θ of points u (N|1, P, D) in the frame → (N, P, D)."""
        centres, weights = self._weights(u.dtype)
        k, parts = len(centres), []
        for part in u.split(max(1, _CHUNK // k), 1):
            kernel = _kernel(_squared(part, centres), self.ndim)[0]
            parts.append(part + kernel @ weights[:, :k] + weights[:, None, k] + part @ weights[:, k + 1:])
        return torch.cat(parts, 1)

    def jacobian(self, u: Tensor) -> Tensor:
        """Derivative (N, P, D, D) of S_θ at points u (N|1, P, D) in the frame."""
        centres, weights = self._weights(u.dtype)
        k, d = centres.shape
        slope = 2 * _kernel(_squared(u, centres), d)[1]
        # Σ_k φ'_k (u - c_k) w_kᵀ, its two terms apart: products of matrices, where differences would fill the memory
        near = slope @ weights[:, :k]
        far = slope @ (centres[:, :, None] * weights[:, :k, None]).flatten(2)
        steps = u[..., None] * near[:, :, None] - far.reshape(*far.shape[:2], d, d) + weights[:, None, k + 1:]
        return steps.mT + torch.eye(d, dtype=u.dtype, device=u.device)

    def __call__(self, points: Tensor) -> Tensor:
        if points.ndim != 3 or points.shape[-1] != self.ndim:
            raise GeometryError(f"points: shape {tuple(points.shape)}; expected (N, P, {self.ndim})")
        return apply_matrix(self.frame.inverse, self.bend(apply_matrix(self.frame.matrix, points)))

    def inverse(self) -> InverseSpline:
        return InverseSpline(self)

    def to(self, device: torch.device | str) -> Spline:
        return Spline(self.theta.to(device), self.frame.to(device), self.model)

    def __repr__(self) -> str:
        furthest = self._moves(torch.float64).detach().norm(dim=-1).max() * self.frame.scale
        return (f"Spline({self.ndim}D, {self.model.control}^{self.ndim} control points, stiffness {self.model.stiffness:g}, moved by up to "
                f"{float(furthest):.3g} mm, fixed → moving)")


@dataclass(frozen=True, eq=False)
class InverseSpline:
    """The inverse of a spline by damped Newton steps: exact to rounding where the spline does not fold.

    Where it folds, several points are mapped to one and one of them is found, or the nearest miss. Differentiable.
    """

    forward: Spline

    @property
    def ndim(self) -> int:
        return self.forward.ndim

    def __call__(self, points: Tensor) -> Tensor:
        frame, count = self.forward.frame, self.forward.model.count(1) ** self.ndim
        goal = apply_matrix(frame.matrix, points.double())
        parts = [self._unbend(part) for part in goal.split(max(1, _CHUNK // count // 4), 1)]
        return apply_matrix(frame.inverse, torch.cat(parts, 1)).to(points.dtype)

    def _unbend(self, goal: Tensor) -> Tensor:
        spline = self.forward
        n = max(len(goal), len(spline.theta))
        with torch.no_grad():
            each = zip(goal.expand(n, -1, -1).split(1), spline.theta.expand(n, -1).split(1), strict=True)
            u = torch.cat([_newton(Spline(theta.detach(), spline.frame, spline.model), one) for one, theta in each])
        if not torch.is_grad_enabled() or not (goal.requires_grad or spline.theta.requires_grad):
            return u
        # one step more carries the gradient (implicit function theorem)
        return u + _solve(spline.jacobian(u).detach(), goal - spline.bend(u))

    def inverse(self) -> Spline:
        return self.forward

    def to(self, device: torch.device | str) -> InverseSpline:
        return InverseSpline(self.forward.to(device))

    def __repr__(self) -> str:
        return f"inverse of {self.forward!r}"


def _solve(jacobian: Tensor, miss: Tensor) -> Tensor:
    """The step (N, P, D) that makes up for a miss, by least squares: where a spline folds or collapses the derivative is singular."""
    square = jacobian.mT @ jacobian
    ridge = 1e-14 * square.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None] + 1e-30
    return torch.linalg.solve(square + ridge * torch.eye(miss.shape[-1]).to(miss), jacobian.mT @ miss[..., None])[..., 0]


def _newton(spline: Spline, goal: Tensor) -> Tensor:
    """Points u (1, P, D) with S(u) = goal, by Newton steps that are shortened where they would miss by more."""
    u = goal.clone()
    miss = goal - spline.bend(u)
    for _ in range(_ROUNDS):
        open_ = (miss[0].abs().amax(-1) >= _ENOUGH).nonzero()[:, 0]  # points that have not settled
        if len(open_) == 0:
            break
        here, there, away = u[:, open_], goal[:, open_], miss[:, open_]
        step = _solve(spline.jacobian(here), away)
        step = step * (0.5 / step.norm(dim=-1, keepdim=True).clamp_min(1e-30)).clamp_max(1)
        for _ in range(4):
            other = there - spline.bend(here + step)
            worse = other.norm(dim=-1, keepdim=True) > away.norm(dim=-1, keepdim=True)
            if not bool(worse.any()):
                break
            step = torch.where(worse, step / 4, step)
        better = other.norm(dim=-1, keepdim=True) < away.norm(dim=-1, keepdim=True)
        if not bool(better.any()):
            break
        u[:, open_], miss[:, open_] = torch.where(better, here + step, here), torch.where(better, other, away)
    return u
