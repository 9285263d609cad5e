"""Levenberg–Marquardt over maps, many candidates at once (Levenberg 1944, Marquardt 1963)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from regkit.registration.equations import Equations, Side, equations
from regkit.registration.run import Run
from regkit.space import Model

LEAST_BEND = 0.1  # steps are lengthened ten times at most
_CHUNK = 200_000  # points × candidates evaluated at a time: bounds memory, and leaves several jobs to share out


def evaluate(sides: Sequence[Side], maps: Tensor, residual: str, *, slopes: bool = True, run: Run = map) -> Equations:
    """Mean over the sides for maps (N, D+1, D+1) in the frame. Sides and chunks of maps are independent jobs for `run`."""
    per = max(1, _CHUNK // max(side.u.shape[0] * len(side.features) for side in sides))
    chunks = maps.split(per)
    jobs = [(side, chunk) for side in sides for chunk in chunks]
    done = list(run(lambda job: equations(job[0], job[1], residual, slopes=slopes), jobs))
    total: Equations | None = None
    for start in range(0, len(done), len(chunks)):  # always added in the same order: the same bits whoever ran them
        parts = done[start: start + len(chunks)]
        one = Equations(torch.cat([p.similarity for p in parts]) / len(sides), torch.cat([p.share for p in parts]) / len(sides),
                        torch.cat([p.normal for p in parts]) if slopes else parts[0].normal,
                        torch.cat([p.slope for p in parts]) if slopes else parts[0].slope)
        total = one if total is None else total + one
    assert total is not None
    return total


def levenberg_marquardt(sides: Sequence[Side], maps: Tensor, model: Model, residual: str, *, iterations: int, tolerance: float,
                        reach: float, slack: float = 0.0, run: Run = map) -> tuple[Tensor, Tensor]:
    """Refine maps (N, D+1, D+1), given in the frame, within the model: accepted steps are composed into the map.

    tolerance: stop when no point of the frame's unit cube moves further, in frame units. reach: the longest step.
    slack: by how much of itself the shared field of view may shrink at no cost. Over long ways it must cost, or maps part;
    near the end it pulls a map towards more overlap than there is.
    run: a `map` that may share jobs among threads. → maps and their scores (N,). No map gets worse.

    Scans of different people agree in part only, so the slope changes by less than the normal matrix says and its steps are
    several times too short. Each step therefore measures the ratio, and the next one is lengthened by it (Barzilai & Borwein
    1988, in the metric of the normal matrix).
    """
    d = maps.shape[-1] - 1
    generators = model.generators(d)[:, :d].reshape(-1, d * (d + 1)).to(maps.device)
    model_step = model.exp
    now = evaluate(sides, maps, residual, run=run)
    least = now.share * (1 - slack) if slack else torch.ones_like(now.share)

    def merit(found: Equations, which: Tensor) -> Tensor:
        return found.similarity * (found.share / least[which].clamp_min(1e-6)).clamp_max(1).sqrt()

    damping = torch.full((len(maps),), 1e-3, dtype=torch.float64, device=maps.device)
    bend = torch.ones_like(damping)
    active = torch.ones(len(maps), dtype=torch.bool, device=maps.device)
    for _ in range(iterations):
        which = active.nonzero()[:, 0]
        normal = generators @ now.normal[which] @ generators.mT
        slope = now.slope[which] @ generators.mT
        diagonal = normal.diagonal(dim1=-2, dim2=-1)
        floor = 1e-6 * diagonal.amax(-1, keepdim=True) + 1e-12
        lifted = normal * bend[which, None, None] + torch.diag_embed((diagonal + floor) * damping[which, None] + floor)
        theta = torch.linalg.solve(lifted, slope)
        theta = theta * (reach / theta.norm(dim=1, keepdim=True).clamp_min(reach))
        tried = maps[which] @ model_step(theta, d)
        new = evaluate(sides, tried, residual, run=run)
        better = merit(new, which) > merit(Equations(now.similarity[which], now.share[which], now.normal, now.slope), which)
        size = theta.abs().amax(1)
        win = which[better]
        # how much less than the normal matrix says the slope has changed along the step
        expected = (theta[:, None] @ normal @ theta[..., None]).flatten().clamp_min(1e-30)
        change = ((slope - new.slope @ generators.mT) * theta).sum(1) / expected
        bend[which] = torch.where(better, change.clamp(LEAST_BEND, 1), (bend[which] * 4).clamp_max(1))
        maps = maps.index_copy(0, win, tried[better])
        now = Equations(now.similarity.index_copy(0, win, new.similarity[better]), now.share.index_copy(0, win, new.share[better]),
                        now.normal.index_copy(0, win, new.normal[better]),
                        now.slope.index_copy(0, win, new.slope[better]))
        damping[which] = torch.where(better, damping[which] / 5, damping[which] * 10).clamp(1e-7, 1e4)
        done = (better & (size < tolerance)) | (~better & ((size < tolerance) | (damping[which] > 1e3)))
        active[which[done]] = False
        if not bool(active.any()):
            break
    return maps, now.score
