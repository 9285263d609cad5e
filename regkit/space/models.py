"""Linear and projective transform models as data: generators of a matrix group, a fit to points, and a projection.

A parameter vector θ (N, P) speaks in a centred, isotropically scaled frame F and relative to a start T₀:
`T = T₀ ∘ F⁻¹ exp(Σ θ_p G_p) F`, so θ = 0 is the start. The generators of the models are nested: those of `rigid` are the
first of `similarity`, which are the first of `affine`, which are the first of `projective`; refinement can let the degrees of
freedom grow.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from regkit.errors import GeometryError, OptionError, choose
from regkit.space.spline import SplineModel


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


def _affine_basis(d: int) -> list[Tensor]:
    return _shifts(d) + _skews(d) + _scale(d) + _stretches(d)


def _tilts(d: int) -> list[Tensor]:
    """Perspective: what lies further along an axis is divided by more; θ is the change of the divisor over half the longest edge."""
    return [_unit(d, {(d, i): 1.0}) for i in range(d)]


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


def _fit_attention(p: Tensor, q: Tensor, w: Tensor) -> Tensor:
    pc, qc, p, q, w = _moments(p, q, w)
    scale = ((w * p * q).sum((1, 2)) / (w * p * p).sum((1, 2)).clamp_min(1e-12)).clamp_min(1e-6)
    return _assemble(scale[:, None, None] * torch.eye(p.shape[-1], dtype=p.dtype, device=p.device), pc, qc)


def _fit_projective(p: Tensor, q: Tensor, w: Tensor) -> Tensor:
    """Gauss–Newton on the distances in mm from the affine fit on, damped where a step does not help (Hartley & Zisserman 2004, 4.2):
    the algebraic solution minimises no distance, and with noise it may put the horizon among the points."""
    n, count, d = p.shape
    start = _fit_affine(p, q, w)
    scales = [torch.sqrt((_moments(x, x, w)[2].square().sum(-1) * w).sum(1) / w.sum(1) / d).clamp_min(1e-12) for x in (p, q)]
    frames = [_assemble((1 / s)[:, None, None] * torch.eye(d, dtype=p.dtype, device=p.device), x, torch.zeros_like(x))
              for s, x in zip(scales, (_moments(p, q, w)[0], _moments(p, q, w)[1]), strict=True)]
    u, v = (_homogeneous(m, x) for m, x in zip(frames, (p, q), strict=True))
    total = frames[1] @ start @ torch.linalg.inv(frames[0])
    generators = torch.stack(_affine_basis(d) + _tilts(d)).to(p)
    damping = p.new_full((n,), 1e-3)

    def error(m: Tensor) -> Tensor:
        """Infinite where the horizon comes near the points."""
        depth = u @ m[:, d, :d, None] + m[:, d, d, None, None]
        far = ((_homogeneous(m, u) - v).square().sum(-1) * w).sum(1)
        return torch.where(((depth[..., 0] < 0.05) & (w > 0)).any(1), torch.inf, far)

    for _ in range(30):
        z = _homogeneous(total, u)
        lifted = torch.cat([z, torch.ones_like(z[..., :1])], -1)
        moved = torch.einsum("qij,npj->npqi", generators, lifted)  # a step acts where the point has gone
        jacobian = (moved[..., :d] - moved[..., d:] * z[:, :, None]) * w.sqrt()[..., None, None]
        jacobian = jacobian.transpose(2, 3).reshape(n, count * d, -1)
        rest = ((v - z) * w.sqrt()[..., None]).reshape(n, -1, 1)
        normal = jacobian.mT @ jacobian
        ridge = damping[:, None, None] * torch.diag_embed(normal.diagonal(dim1=1, dim2=2)) + 1e-12 * torch.eye(len(generators)).to(p)
        step = torch.linalg.solve(normal + ridge, jacobian.mT @ rest)[..., 0]
        new = torch.linalg.matrix_exp(torch.einsum("nq,qij->nij", step, generators)) @ total
        better = error(new) < error(total)
        total = torch.where(better[:, None, None], new, total)
        damping = torch.where(better, damping / 10, damping * 10)
        if float(step.abs().max()) < 1e-12:
            break
    return _upright(torch.linalg.inv(frames[1]) @ total @ frames[0], _moments(p, q, w)[0])


def _upright(matrix: Tensor, centre: Tensor) -> Tensor:
    """The same projective map with a divisor of 1 at a centre (N, D): its sign tells which side of the horizon is meant."""
    d = centre.shape[-1]
    return matrix / ((matrix[:, d, :d] * centre).sum(-1) + matrix[:, d, d])[:, None, None]


def _homogeneous(matrix: Tensor, points: Tensor) -> Tensor:
    d = points.shape[-1]
    mapped = points @ matrix[:, :d, :d].mT + matrix[:, None, :d, d]
    return mapped / (points @ matrix[:, d, :d, None] + matrix[:, None, d:, d])


def _project_attention(linear: Tensor) -> Tensor:
    d = linear.shape[-1]
    scale = (linear.diagonal(dim1=-2, dim2=-1).sum(-1) / d).clamp_min(1e-6)
    return scale[:, None, None] * torch.eye(d, dtype=linear.dtype, device=linear.device)


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
    nearest: linear part (N, D, D) → nearest linear part of the model. affine: whether lines stay parallel.
    """

    name: str
    basis: Callable[[int], list[Tensor]]
    _fit: Callable[[Tensor, Tensor, Tensor], Tensor]
    nearest: Callable[[Tensor], Tensor]
    affine: bool = True

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
        if not self.affine:
            return found
        last = torch.eye(ndim + 1, dtype=theta.dtype, device=theta.device)[ndim:]
        # affine to the last bit, which matrix_exp is not
        return torch.cat([found[:, :ndim], last.expand(found.shape[0], 1, -1)], 1)

    def fit(self, p: Tensor, q: Tensor, w: Tensor | None = None) -> Tensor:
        """The member that maps p (N, P, D) best to q, weights w (N, P) ≥ 0: (N, D+1, D+1), determinant > 0."""
        if p.shape != q.shape or p.ndim != 3:
            raise GeometryError(f"points: shapes {tuple(p.shape)} and {tuple(q.shape)}; expected equal (N, P, D)")
        return self._fit(p, q, torch.ones_like(p[..., 0]) if w is None else w)

    def project(self, matrix: Tensor, centre: Tensor) -> Tensor:
        """The member nearest to `matrix` (N, D+1, D+1) that maps `centre` (N|1, D) where `matrix` maps it; of a projective matrix,
        unless the model is, by its linearisation there."""
        d = matrix.shape[-1] - 1
        if not self.affine:
            return _upright(matrix, centre.expand(len(matrix), d))
        image = _homogeneous(matrix, centre.expand(len(matrix), d)[:, None])[:, 0]
        depth = (matrix[:, d, :d] * centre).sum(-1) + matrix[:, d, d]
        linear = (matrix[:, :d, :d] - image[..., None] * matrix[:, d, None, :d]) / depth[:, None, None]
        return _assemble(self.nearest(linear), centre.expand_as(image), image)


# named, not lambdas: a layer that holds a model can be pickled
def _attention_basis(d: int) -> list[Tensor]:
    return _shifts(d) + _scale(d)


def _rigid_basis(d: int) -> list[Tensor]:
    return _shifts(d) + _skews(d)


def _similarity_basis(d: int) -> list[Tensor]:
    return _shifts(d) + _skews(d) + _scale(d)


def _projective_basis(d: int) -> list[Tensor]:
    return _affine_basis(d) + _tilts(d)


def _itself(linear: Tensor) -> Tensor:
    return linear


MODELS: dict[str, Model] = {
    "translation": Model("translation", _shifts, _fit_translation, _project_translation),
    "attention": Model("attention", _attention_basis, _fit_attention, _project_attention),
    "rigid": Model("rigid", _rigid_basis, _fit_rigid, nearest_rotation),
    "similarity": Model("similarity", _similarity_basis, _fit_similarity, _project_similarity),
    "affine": Model("affine", _affine_basis, _fit_affine, _itself),
    "projective": Model("projective", _projective_basis, _fit_projective, _itself, affine=False),
}


MODEL_NAMES = (*MODELS, "tps")


def model(name: str, *, control: int | None = None, stiffness: float | None = None) -> Model | SplineModel:
    """The model of that name; `tps` with so many control points along each axis (4) and such a stiffness (0).

    Raises OptionError naming the nearest right one, or for what means nothing to that model."""
    if choose("model", name, MODEL_NAMES) == "tps":
        return SplineModel(4 if control is None else control, 0.0 if stiffness is None else stiffness)
    if control is not None or stiffness is not None:
        raise OptionError(f"model: {name} has neither control points nor stiffness; give them with tps alone")
    return MODELS[name]
