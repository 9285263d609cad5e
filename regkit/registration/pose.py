"""From many candidates to one pose: a sift by few points, a few survivors of each measure, one judgement of all."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from regkit.registration.refine import evaluate
from regkit.registration.start import Candidate, spread_out
from regkit.registration.steps import Outcome, Scene, growth, look, refine, residual, score

MARGIN = 0.05  # of what its score leaves to the best: by so much another orientation must beat the header's
SIFT_POINTS, SIFT_ITERATIONS, SIFTED = 1_000, 5, 6  # a first look at all candidates, and how many of them go on
SETTLE_POINTS, SETTLED = 6_000, 3  # at the second level, and for how many candidates
UNSURE = 0.15  # a MIND score at the second level that no right pose of 112 had (least 0.25), and no wrong one exceeded


@dataclass(frozen=True, eq=False)
class Poses:
    """Poses at the second level, best first: maps (N, D+1, D+1), whether each keeps the header's orientation, and scores."""

    maps: Tensor
    upright: Tensor
    judged: Tensor
    mind: Tensor


def settle(scene: Scene, name: str, pool: list[Candidate], outcome: Outcome) -> Tensor:
    """The best pose (1, D+1, D+1) that a measure finds from the candidates.

    The header's orientation is the prior: another must win by a margin."""
    poses = _few(scene, name, name, pool, outcome)
    if len(pool) > 1 and float(poses.mind.max()) < UNSURE:
        # intensities lead nowhere: look for poses by edges, and let only MIND decide
        edges = _few(scene, "edge", name, pool, outcome)
        poses = Poses(*(torch.cat(both) for both in zip(vars(poses).values(), vars(edges).values(), strict=True)))
        poses = replace(poses, judged=1 + poses.mind)
        outcome.notes.append(f"no pose found by {name} convinces; of those found by edges and by it, MIND chose (score "
                             f"{float(poses.mind.max()):.2f}, of right poses 0.25 and more)")
    maps, kept, judged = poses.maps, poses.upright, poses.judged
    win = int(judged.argmax())
    if bool(kept.any()) and not bool(kept[win]):
        home = int(torch.where(kept, judged, -torch.inf).argmax())
        if float(judged[win] - judged[home]) <= MARGIN * (2 - float(judged[home])):
            win = home
        else:
            means = f"{float(judged[win]) / 2:.3f} for the turned pose, {float(judged[home]) / 2:.3f} for the headers' orientation"
            outcome.notes.append(f"the scans lie turned against their headers: {name} and MIND together score {means}")
    return maps[win: win + 1]


def _few(scene: Scene, name: str, judge: str, pool: list[Candidate], outcome: Outcome) -> Poses:
    """One measure's best few poses of a pool: all candidates through the coarsest level, some through the second, judged
    there by `judge` and MIND together.

    The correlation ratio takes scans for what they are as a whole (a blurred or skull-stripped one for a brain, where local
    measures are drawn to the outer skull); MIND tells near-symmetric poses apart, and unrelated scans from related ones."""
    models, second = growth(scene.model), min(1, len(scene.canvases) - 1)
    maps = torch.stack([c.map for c in pool])
    upright = torch.tensor([c.upright for c in pool], device=maps.device)
    maps, scores = refine(scene, 0, (name,), maps, models[:1], points=SIFT_POINTS, iterations=SIFT_ITERATIONS)
    outcome.candidates += [{"origin": c.origin, "measure": name, "score": round(v, 4)} for c, v in zip(pool, scores.tolist(), strict=True)]
    header = torch.tensor([c.origin == "header" for c in pool], device=maps.device)
    for place, (count, some) in enumerate(((SIFTED, models[:2]), (SETTLED, models[:2][-1:]))):
        few = _best(maps, scores, (upright, header), count)
        maps, upright, header = maps[few], upright[few], header[few]
        maps, scores = refine(scene, second * place, (name,), maps, some, points=SETTLE_POINTS if place else None)
    if judge != name:
        sides = look(scene, second, (judge,), None, SETTLE_POINTS, slopes=False)
        scores = evaluate(sides, maps, residual((judge,)), slopes=False, run=scene.run).score
    alone = replace(scene, run=map)  # poses, not halves of one score, are the jobs to share out
    mind = torch.tensor(list(scene.run(lambda one: score(alone, second, ("mind",), one), maps.split(1))))
    order = (scores.cpu() + mind).argsort(descending=True)
    return Poses(maps[order.to(maps.device)], upright.cpu()[order], (scores.cpu() + mind)[order], mind[order])


def _best(maps: Tensor, scores: Tensor, always: tuple[Tensor, ...], count: int) -> Tensor:
    """Places of the best `count` maps that differ, and the best of each kind (N,) that always stays."""
    few = [spread_out(maps, scores, count, 0.1)]
    few += [torch.where(kind, scores, -torch.inf).argmax()[None] for kind in always if bool(kind.any())]
    return torch.unique(torch.cat(few))
