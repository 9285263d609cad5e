"""The last step of a projective or thin-plate-spline registration: from the refined affine map on, by Gauss–Newton.

T = A ∘ S with A the affine map and S near the identity, acting on fixed points. The value read at a fixed point u changes by
h · δ(u) with h the fixed features' gradient, as in the affine refinement, and δ(u) = Σ_q θ_q V_q(u): for the projective model V_q
is what a generator does to u; for the spline, how far u follows each control point. So both are one least-squares problem.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from regkit.registration.equations import Side, compare
from regkit.registration.level import sides_of
from regkit.registration.steps import Scene
from regkit.sampling import inside, sample
from regkit.similarity import SIMILARITIES
from regkit.space import Matrix, Model, Spline, SplineModel
from regkit.space.grid import apply_matrix

ROUNDS = 15  # Gauss–Newton steps at a level
STIFF = 0.02  # similarity that a bending energy of 2 costs; 0.003 fits noise in chest scans, 0.1 gives half of what it could in brains
_STEP = 0.1  # of half the longest edge: the longest way of a step
_ENOUGH = 1e-4  # of similarity, less cost of bending: a smaller gain ends a level


@dataclass(frozen=True, eq=False)
class _Problem:
    """One forward side. moved: a state of S → where its points (P, D) go. drawn: a pull on the points (P, D) → on the parameters
    (Q,). normal: (Q, Q) were all points seen."""

    side: Side
    residual: str
    moved: Callable[[Tensor], Tensor]
    drawn: Callable[[Tensor], Tensor]
    normal: Tensor


def bend(scene: Scene, names: tuple[str, ...], one: Tensor, model: Model | SplineModel) -> tuple[Matrix | Spline, list[float]]:
    """From an affine map (1, D+1, D+1) in the frame to S, a map of world points such that A ∘ S is more alike: the similarity at each
    level before and after; never less alike. names: least-squares measures, compared together."""
    d = one.shape[-1] - 1
    if isinstance(model, SplineModel):
        found = torch.zeros(model.count(d), dtype=torch.float64, device=one.device)
        step: Callable[[Tensor, Tensor], Tensor] = torch.add
        stiff = (STIFF + model.stiffness) * torch.kron(model.energy(scene.frame).contiguous(), torch.eye(d).to(found))
    else:
        found = torch.eye(d + 1, dtype=torch.float64, device=one.device)
        step = lambda m, theta: m @ model.exp(theta[None], d)[0]  # noqa: E731
        stiff = None
    values = []
    for level in range(min(1, len(scene.canvases) - 1), len(scene.canvases)):
        problems = [_problem(side, scene, model, SIMILARITIES[name].residual) for name in names
                    for side in _forward(scene, level, name, one)]
        found, before, after = _descend(problems, one, found, step, stiff)
        values += [before, after]
    if isinstance(model, SplineModel):
        return model.transform(found[None], scene.frame), values
    world = scene.frame.world(found[None])
    return Matrix(model.project(world, scene.frame.centre)), values


def _forward(scene: Scene, level: int, name: str, one: Tensor) -> list[Side]:
    measure = SIMILARITIES[name]
    sides = sides_of(*scene.canvases[level], measure, scene.frame, scene.effort(level)[0], scene.seed,
                     one if measure.oriented else None, scene.run, True)
    return [side for side in sides if side.forward]


def _problem(side: Side, scene: Scene, model: Model | SplineModel, residual: str) -> _Problem:
    u, d = side.u, side.u.shape[1]
    h = torch.stack(side.gradient)  # (D, C, P)
    outer = torch.einsum("acp,bcp->abp", h, h) * side.weight  # how much a way of each point weighs
    if isinstance(model, SplineModel):
        basis = model.basis(u, scene.frame)  # in the frame as u is; (P, K)
        blocks = [torch.stack([(basis * outer[a, b][:, None]).mT @ basis for b in range(d)], -1) for a in range(d)]
        normal = torch.stack(blocks, 1).reshape(model.count(d), model.count(d))  # (K, D, K, D)
        return _Problem(side, residual, lambda theta: u + basis @ theta.to(u).reshape(-1, d),
                        lambda pull: (basis.mT @ pull).flatten().double(), normal.double())
    lifted = torch.cat([u, torch.ones_like(u[:, :1])], 1)
    taken = torch.einsum("qij,pj->pqi", model.generators(d).to(u), lifted)
    ways = taken[..., :d] - taken[..., d:] * u[:, None]  # (P, Q, D)
    return _Problem(side, residual, lambda m: apply_matrix(m[None], u[None])[0],
                    lambda pull: torch.einsum("pqd,pd->q", ways, pull).double(),
                    torch.einsum("pqa,abp,prb->qr", ways, outer, ways).double())


def _look(problem: _Problem, one: Tensor, found: Tensor) -> tuple[float, Tensor, Tensor]:
    """Similarity of one side, its slope (Q,) and normal matrix (Q, Q)."""
    side = problem.side
    index = apply_matrix(side.to_index[None], apply_matrix(one, problem.moved(found)[None]))
    values = sample(side.volume, index)
    seen = values[:, -1] * inside(index, tuple(side.volume.shape[2:]))
    weight = side.weight * seen
    share = ((seen @ side.energy) / side.energy.sum().clamp_min(1e-12)).clamp(0, 1)
    similarity, pull, scale = compare(side, values[:, : len(side.features)], weight, weight.sum(1).clamp_min(1e-6), problem.residual)
    drawn = torch.stack([(pull[0] * h).sum(0) for h in side.gradient], 1)  # (P, D)
    return float(similarity * share.sqrt()), problem.drawn(drawn) * scale, problem.normal * (scale * share)


def _descend(problems: list[_Problem], one: Tensor, found: Tensor, step: Callable[[Tensor, Tensor], Tensor],
             stiff: Tensor | None) -> tuple[Tensor, float, float]:
    """Levenberg–Marquardt from a state of S → the state reached, similarity before and after. stiff: (Q, Q), what bending costs."""

    def look(state: Tensor) -> tuple[float, float, Tensor, Tensor]:
        parts = [_look(problem, one, state) for problem in problems]
        value = sum(v for v, _, _ in parts) / len(parts)
        slope = torch.stack([s for _, s, _ in parts]).mean(0)
        normal = torch.stack([n for _, _, n in parts]).mean(0)
        if stiff is None:
            return value, value, slope, normal
        return value, value - 0.5 * float(state @ stiff @ state), slope - stiff @ state, normal + stiff

    value, merit, slope, normal = look(found)
    first, damping = value, 1e-3
    for _ in range(ROUNDS):
        diagonal = normal.diagonal()
        floor = 1e-5 * diagonal.max() + 1e-12
        theta = torch.linalg.solve(normal + torch.diag((diagonal + floor) * damping + floor), slope)
        theta = theta * (_STEP / theta.abs().max().clamp_min(_STEP))
        tried = step(found, theta)
        new = look(tried)
        if new[1] > merit:
            gain = new[1] - merit
            found, damping = tried, max(damping / 5, 1e-7)
            value, merit, slope, normal = new
            if gain < _ENOUGH:
                break
        else:
            damping *= 10
            if damping > 1e3:
                break
    return found, first, value
