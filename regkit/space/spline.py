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
    return -r, -0.5 / r


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
        if int(self.control) != self.control or self.control < 2:
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
        kernel = _kernel((centres[:, None] - centres).square().sum(-1), d)[0]
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
        squared = (u[:, None] - centres).square().sum(-1)
        return _kernel(squared, u.shape[-1])[0] @ solved[: len(centres)] + solved[len(centres)] + u @ solved[len(centres) + 1:]

    def slopes(self, u: Tensor, frame: Frame) -> Tensor:
        """(P, K, D): derivative of `basis` by u."""
        centres = self.points(frame)
        solved, centres = self._solved(centres).to(u), centres.to(u)
        away = u[:, None] - centres  # (P, K, D)
        steps = 2 * away * _kernel(away.square().sum(-1), u.shape[-1])[1][..., None]
        return torch.einsum("pkd,kj->pjd", steps, solved[: len(centres)]) + solved[len(centres) + 1:].mT

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

    def bend(self, u: Tensor) -> Tensor:
        """S_θ of points u (N|1, P, D) in the frame → (N, P, D)."""
        moves = self._moves(u.dtype)
        step = max(1, _CHUNK // moves.shape[1])
        if len(u) == 1:
            return torch.cat([part + self.model.basis(part[0], self.frame) @ moves for part in u.split(step, 1)], 1)
        return torch.stack([torch.cat([part + self.model.basis(part, self.frame) @ m for part in one.split(step)])
                            for one, m in zip(u, moves.expand(len(u), -1, -1), strict=True)])

    def jacobian(self, u: Tensor) -> Tensor:
        """Derivative (N, P, D, D) of S_θ at points u (N|1, P, D) in the frame."""
        moves, eye = self._moves(u.dtype), torch.eye(self.ndim, dtype=u.dtype, device=u.device)
        n = max(len(u), len(moves))
        return torch.stack([eye + torch.einsum("pkd,ke->ped", self.model.slopes(one, self.frame), m)
                            for one, m in zip(u.expand(n, -1, -1), moves.expand(n, -1, -1), strict=True)])

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
        with torch.no_grad():
            u = goal.expand(max(len(goal), len(spline.theta)), -1, -1).clone()
            miss = goal - spline.bend(u)
            for _ in range(_ROUNDS):
                if miss.numel() == 0 or float(miss.abs().max()) < _ENOUGH:
                    break
                step = self._step(u, miss)
                step = step * (0.5 / step.norm(dim=-1, keepdim=True).clamp_min(1e-30)).clamp_max(1)
                for _ in range(6):  # shorten where a full step would miss by more
                    other = goal - spline.bend(u + step)
                    worse = other.norm(dim=-1) > miss.norm(dim=-1)
                    if not bool(worse.any()):
                        break
                    step = torch.where(worse[..., None], step / 4, step)
                better = (other.norm(dim=-1) <= miss.norm(dim=-1))[..., None]
                u, miss = torch.where(better, u + step, u), torch.where(better, other, miss)
        if not torch.is_grad_enabled() or not (goal.requires_grad or spline.theta.requires_grad):
            return u
        return u + self._step(u, goal - spline.bend(u))  # one step more carries the gradient (implicit function theorem)

    def _step(self, u: Tensor, miss: Tensor) -> Tensor:
        # where the spline is flat there is no step
        return torch.linalg.solve_ex(self.forward.jacobian(u).detach(), miss[..., None])[0][..., 0].nan_to_num(0.0, 0.0, 0.0)

    def inverse(self) -> Spline:
        return self.forward

    def to(self, device: torch.device | str) -> InverseSpline:
        return InverseSpline(self.forward.to(device))

    def __repr__(self) -> str:
        return f"inverse of {self.forward!r}"
