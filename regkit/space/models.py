"""Transform models as data: generators of a matrix group, a closed-form fit to points, and a projection.

A parameter vector θ (N, P) speaks in a centred, isotropically scaled frame F and relative to a start T₀:
`T = T₀ ∘ F⁻¹ exp(Σ θ_p G_p) F`, so θ = 0 is the start. The generators of the models are nested: those of `rigid` are the
first of `similarity`, which are the first of `affine`; refinement can let the degrees of freedom grow.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from regkit.errors import GeometryError, choose


def _unit(ndim: int, entries: dict[tuple[int, int], float]) -> Tensor:
    g = torch.zeros(ndim + 1, ndim + 1, dtype=torch.float64)
    for (i, j), value in entries.items():
        g[i, j] = value
    return g


def _shifts(d: int) -> list[Tensor]:
    return [_unit(d, {(i, d): 1.0}) for i in range(d)]


def _skews(d: int) -> list[Tensor]:
    """One rotation in each coordinate plane; θ is its angle in radians."""
    return [_unit(d, {(i, j): -1.0, (j, i): 1.0}) for i, j in itertools.combinations(range(d), 2)]


def _scale(d: int) -> list[Tensor]:
    """Isotropic scale; θ is the logarithm of the factor."""
    return [_unit(d, {(i, i): 1.0 for i in range(d)})]


def _stretches(d: int) -> list[Tensor]:
    """Symmetric, traceless: stretches along and between the axes."""
    along = [_unit(d, {**{(i, i): 1.0 / (k + 1) for i in range(k + 1)}, (k + 1, k + 1): -1.0}) for k in range(d - 1)]
    return along + [_unit(d, {(i, j): 0.5, (j, i): 0.5}) for i, j in itertools.combinations(range(d), 2)]


def _moments(p: Tensor, q: Tensor, w: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    total = w.sum(1, keepdim=True)
    w = (w / total)[..., None]
    pc, qc = (w * p).sum(1), (w * q).sum(1)
    p, q = p - pc[:, None], q - qc[:, None]
    return pc, qc, p, q, w


def _assemble(linear: Tensor, pc: Tensor, qc: Tensor) -> Tensor:
    n, d, _ = linear.shape
    m = torch.eye(d + 1, dtype=linear.dtype, device=linear.device).repeat(n, 1, 1)
    shift = qc - (linear @ pc[..., None])[..., 0]
    return torch.cat([torch.cat([linear, shift[..., None]], -1), m[:, d:]], 1)


def nearest_rotation(linear: Tensor) -> Tensor:
    """The rotation (det = +1) nearest to each (N, D, D) matrix, by singular values (Kabsch 1976)."""
    u, _, vh = torch.linalg.svd(linear)
    sign = torch.ones(linear.shape[:-1], dtype=linear.dtype, device=linear.device)
    sign[:, -1] = torch.sign(torch.linalg.det(u @ vh))
    return u @ (sign[..., None] * vh)


def _fit_translation(p: Tensor, q: Tensor, w: Tensor) -> Tensor:
    pc, qc, *_ = _moments(p, q, w)
    return _assemble(torch.eye(p.shape[-1], dtype=p.dtype, device=p.device).repeat(len(p), 1, 1), pc, qc)


def _fit_rigid(p: Tensor, q: Tensor, w: Tensor) -> Tensor:
    pc, qc, p, q, w = _moments(p, q, w)
    return _assemble(nearest_rotation((w * q).mT @ p), pc, qc)


def _fit_similarity(p: Tensor, q: Tensor, w: Tensor) -> Tensor:
    """Umeyama 1991."""
    pc, qc, p, q, w = _moments(p, q, w)
    cov = (w * q).mT @ p
    r = nearest_rotation(cov)
    scale = torch.einsum("nij,nij->n", r, cov) / (w * p * p).sum((1, 2)).clamp_min(1e-12)
    return _assemble(r * scale.clamp_min(1e-6)[:, None, None], pc, qc)


def _fit_affine(p: Tensor, q: Tensor, w: Tensor) -> Tensor:
    """Least squares with a ridge towards the similarity, which decides where points are too few or in one plane."""
    d = p.shape[-1]
    similar = _fit_similarity(p, q, w)[:, :d, :d]
    pc, qc, p, q, w = _moments(p, q, w)
    normal = (w * p).mT @ p
    ridge = 1e-6 * normal.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None] * torch.eye(d, dtype=p.dtype, device=p.device)
    linear = torch.linalg.solve(normal + ridge, ((w * q).mT @ p + similar @ ridge).mT).mT
    flipped = (torch.linalg.det(linear) <= 0)[:, None, None]
    return _assemble(torch.where(flipped, similar, linear), pc, qc)


def _project_translation(linear: Tensor) -> Tensor:
    return torch.eye(linear.shape[-1], dtype=linear.dtype, device=linear.device).expand_as(linear).clone()


def _project_similarity(linear: Tensor) -> Tensor:
    r = nearest_rotation(linear)
    scale = torch.einsum("nij,nij->n", r, linear) / linear.shape[-1]
    return r * scale.clamp_min(1e-6)[:, None, None]


@dataclass(frozen=True)
class Model:
    """A transform model: what may move.

    basis: D → list of (D+1, D+1) generators. fit: weighted points p, q (N, P, D), w (N, P) → (N, D+1, D+1), det > 0.
    nearest: linear part (N, D, D) → nearest linear part of the model.
    """

    name: str
    basis: Callable[[int], list[Tensor]]
    _fit: Callable[[Tensor, Tensor, Tensor], Tensor]
    nearest: Callable[[Tensor], Tensor]

    def generators(self, ndim: int) -> Tensor:
        """(P, D+1, D+1) float64."""
        return torch.stack(self.basis(ndim))

    def count(self, ndim: int) -> int:
        """Number of parameters P."""
        return len(self.basis(ndim))

    def exp(self, theta: Tensor, ndim: int) -> Tensor:
        """θ (N, P) → matrices (N, D+1, D+1) in the frame; θ = 0 is exactly the identity. Differentiable; at least float32."""
        theta = theta if theta.dtype == torch.float64 else theta.float()
        found = torch.linalg.matrix_exp(torch.einsum("np,pij->nij", theta, self.generators(ndim).to(theta)))
        last = torch.eye(ndim + 1, dtype=theta.dtype, device=theta.device)[ndim:]
        # affine to the last bit, which matrix_exp is not
        return torch.cat([found[:, :ndim], last.expand(len(found), 1, -1)], 1)

    def fit(self, p: Tensor, q: Tensor, w: Tensor | None = None) -> Tensor:
        """The member that maps p (N, P, D) best to q, weights w (N, P) ≥ 0: (N, D+1, D+1), determinant > 0."""
        if p.shape != q.shape or p.ndim != 3:
            raise GeometryError(f"points: shapes {tuple(p.shape)} and {tuple(q.shape)}; expected equal (N, P, D)")
        return self._fit(p, q, torch.ones_like(p[..., 0]) if w is None else w)

    def project(self, matrix: Tensor, centre: Tensor) -> Tensor:
        """The member nearest to `matrix` (N, D+1, D+1) that maps `centre` (N|1, D) where `matrix` maps it."""
        d = matrix.shape[-1] - 1
        image = (matrix[:, :d, :d] @ centre[..., None])[..., 0] + matrix[:, :d, d]
        return _assemble(self.nearest(matrix[:, :d, :d]), centre.expand_as(image), image)


MODELS: dict[str, Model] = {
    "translation": Model("translation", _shifts, _fit_translation, _project_translation),
    "rigid": Model("rigid", lambda d: _shifts(d) + _skews(d), _fit_rigid, nearest_rotation),
    "similarity": Model("similarity", lambda d: _shifts(d) + _skews(d) + _scale(d), _fit_similarity, _project_similarity),
    "affine": Model("affine", lambda d: _shifts(d) + _skews(d) + _scale(d) + _stretches(d), _fit_affine, lambda linear: linear),
}


def model(name: str) -> Model:
    """The model of that name; raises OptionError naming the nearest right one."""
    return MODELS[choose("model", name, MODELS)]
