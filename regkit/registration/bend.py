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
STIFF = 3e-3  # similarity that a bending energy of 1 costs, where the spline itself is not stiff
_STEP = 0.1  # of half the longest edge: the longest way of a step


@dataclass(frozen=True, eq=False)
class _Problem:
    """One forward side, with how its points move under each parameter: (P, Q, D), and the normal matrix (Q, Q) were all seen."""

    side: Side
    ways: Tensor
    normal: Tensor
    residual: str


def bend(scene: Scene, names: tuple[str, ...], one: Tensor, model: Model | SplineModel) -> tuple[Matrix | Spline, list[float]]:
    """From an affine map (1, D+1, D+1) in the frame to S, a map of world points such that A ∘ S is more alike: the similarity at each
    level, before and after; never less alike. names: least-squares measures, compared together."""
    d = one.shape[-1] - 1
    theta = torch.zeros(1, model.count(d), dtype=torch.float64, device=one.device)
    penalty = _penalty(scene, model)
    if isinstance(model, SplineModel):
        start, act, step = theta[0], lambda t, p: p.side.u + torch.einsum("pqd,q->pd", p.ways, t.to(p.ways)), torch.add
    else:
        start = torch.eye(d + 1, dtype=torch.float64, device=one.device)
        act, step = lambda m, p: apply_matrix(m[None], p.side.u[None])[0], lambda m, t: m @ model.exp(t[None], d)[0]
    found, values = start, []
    for level in range(min(1, len(scene.canvases) - 1), len(scene.canvases)):
        problems = [_problem(side, scene, model, SIMILARITIES[name].residual) for name in names
                    for side in _forward(scene, level, name, one)]
        found, before, after = _descend(problems, one, found, act, step, penalty)
        values += [before, after]
    if isinstance(model, SplineModel):
        return model.transform(found[None], scene.frame), values
    world = scene.frame.world(found[None])
    return Matrix(world / world[:, d:, d:]), values


def unit(scene: Scene):
    """The frame as it sees itself: centred, of scale 1."""
    return type(scene.frame)(torch.zeros_like(scene.frame.centre), 1.0, scene.frame.edges)


def _forward(scene: Scene, level: int, name: str, one: Tensor) -> list[Side]:
    measure = SIMILARITIES[name]
    sides = sides_of(*scene.canvases[level], measure, scene.frame, scene.effort(level)[0], scene.seed,
                     one if measure.oriented else None, scene.run, True)
    return [side for side in sides if side.forward]


def _problem(side: Side, scene: Scene, model: Model | SplineModel, residual: str) -> _Problem:
    u, d = side.u, side.u.shape[1]
    if isinstance(model, SplineModel):
        basis = model.basis(u.double(), unit(scene)).float()
        ways = torch.einsum("pk,de->pkde", basis, torch.eye(d, device=u.device)).flatten(1, 2)
    else:
        lifted = torch.cat([u, torch.ones_like(u[:, :1])], 1)
        moved = torch.einsum("qij,pj->pqi", model.generators(d).to(u), lifted)
        ways = moved[..., :d] - moved[..., d:] * u[:, None]
    h = torch.stack(side.gradient)  # (D, C, P)
    outer = torch.einsum("acp,bcp->pab", h, h) * side.weight[:, None, None]
    values, vectors = torch.linalg.eigh(outer)  # its root: half the work, and symmetric to the last bit
    rows = torch.einsum("pqa,pab->pbq", ways, vectors * values.clamp_min(0).sqrt()[:, None]).flatten(0, 1)
    return _Problem(side, ways, (rows.mT @ rows).double(), residual)


def _penalty(scene: Scene, model: Model | SplineModel) -> Tensor:
    """(Q, Q) whose form in θ is what bending costs."""
    d = scene.frame.centre.shape[-1]
    if isinstance(model, Model):
        return torch.zeros(model.count(d), model.count(d), dtype=torch.float64, device=scene.frame.centre.device)
    energy = model.energy(unit(scene))
    return (STIFF + model.stiffness) * torch.einsum("kl,de->kdle", energy, torch.eye(d).to(energy)).reshape(model.count(d), -1)


def _look(problem: _Problem, one: Tensor, found: Tensor, act: Callable[[Tensor, _Problem], Tensor], slopes: bool = True):
    """Similarity, its slope (Q,) and normal matrix (Q, Q) of one side."""
    side = problem.side
    z = apply_matrix(one, act(found, problem)[None])
    index = apply_matrix(side.to_index[None], z)
    values = sample(side.volume, index)
    seen = values[:, -1] * inside(index, tuple(side.volume.shape[2:]))
    weight = side.weight * seen
    total = weight.sum(1).clamp_min(1e-6)
    share = ((seen @ side.energy) / side.energy.sum().clamp_min(1e-12)).clamp(0, 1)
    similarity, pull, scale = compare(side, values[:, : len(side.features)], weight, total, problem.residual)
    value = float(similarity * share.sqrt())
    if not slopes:
        return value, None, None
    drawn = torch.stack([(pull[0] * h).sum(0) for h in side.gradient], 1)  # (P, D)
    slope = torch.einsum("pqd,pd->q", problem.ways, drawn).double() * scale
    return value, slope, problem.normal * (scale * share)


def _descend(problems: list[_Problem], one: Tensor, found: Tensor, act: Callable, step: Callable, penalty: Tensor,
             ) -> tuple[Tensor, float, float]:
    def cost(state: Tensor) -> float:
        return 0.5 * float(state @ penalty @ state) if state.ndim == 1 else 0.0

    def look(state: Tensor, slopes: bool = True):
        parts = [_look(p, one, state, act, slopes) for p in problems]
        value = sum(v for v, *_ in parts) / len(parts)
        if not slopes:
            return value, None, None
        return value, sum(s for _, s, _ in parts) / len(parts), sum(n for *_, n in parts) / len(parts)

    value, slope, normal = look(found)
    first, damping = value, 1e-3
    for _ in range(ROUNDS):
        gradient = slope - penalty @ found if found.ndim == 1 else slope
        diagonal = normal.diagonal()
        floor = 1e-5 * diagonal.max() + 1e-12
        theta = torch.linalg.solve(normal + penalty + torch.diag((diagonal + floor) * damping + floor), gradient)
        theta = theta * (_STEP / theta.abs().max().clamp_min(_STEP))
        tried = step(found, theta)
        new, *_ = look(tried, False)
        if new - cost(tried) > value - cost(found):
            gain = new - cost(tried) - value + cost(found)
            found, damping = tried, max(damping / 5, 1e-7)
            value, slope, normal = look(found)
            if gain < 1e-5:
                break
        else:
            damping *= 10
            if damping > 1e3:
                break
    return found, first, value
