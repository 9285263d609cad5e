"""From many candidates to one pose: a sift by few points, a few survivors of each measure, one judgement of all."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from regkit.registration.pyramid import features_of
from regkit.registration.shifts import shifted
from regkit.registration.start import TURNLESS, Candidate, angle_between, search_structure, spread_out
from regkit.registration.steps import Outcome, Scene, growth, refine, score
from regkit.similarity import SIMILARITIES
from regkit.space import MODELS

MARGIN = 0.05  # of what its score leaves to the best: by so much another orientation must beat the header's
SIFT_POINTS, SIFT_ITERATIONS, SIFTED = 1_000, 5, 6  # a first look at all candidates, and how many of them go on
SETTLE_POINTS, SETTLED = 6_000, 2  # at the second level, and for how many candidates by the measure, and by MIND
STRUCTURED = 8  # poses that the search by structure proposes
LOOKED_ALONG = 3  # turned poses along which shifts are looked for
APART = 0.1  # radians: nearer poses are one
SAME_POSE = 0.04  # of a map's entries together: nearer maps will end as one
LEADING = 0.5  # of what its MIND score leaves to the best: a map so far ahead at the coarsest level won at the next, too
NEARBY = 16  # poses tried around the best where it does not convince
NEAR_TURN, NEAR_SHIFT, NEAR_SCALE = 0.3, 0.25, 0.12  # radians, of the frame, logarithm: how far from them at most
CONVINCING = 0.4  # a MIND score at the second level, inside both scans, at which no wrong pose was seen: nothing more is tried
UNSURE = 0.15  # a MIND score at the second level that no right pose of 112 had (least 0.25), and no wrong one exceeded
UNSURE_INSIDE = 0.35  # the same for a turned pose where a background carries no weight: a wrong one reached 0.32


@dataclass(frozen=True, eq=False)
class Poses:
    """Poses at the second level: maps (N, D+1, D+1), whether each keeps the header's orientation, and its MIND score."""

    maps: Tensor
    upright: Tensor
    judged: Tensor

    def __add__(self, other: Poses) -> Poses:
        return Poses(*(torch.cat(both) for both in zip(vars(self).values(), vars(other).values(), strict=True)))


def by_structure(scene: Scene, judge: Scene, name: str, poses: Poses, outcome: Outcome, wide: bool) -> Poses:
    """The poses, and if none of them can be right (`wide`: in any case) those found among all shifts of many rotations by MIND."""
    best = poses.judged.argmax()
    asked = UNSURE if judge is scene or bool(poses.upright[best]) else UNSURE_INSIDE
    if scene.model.name in TURNLESS or (float(poses.judged[best]) >= asked and not wide):
        return poses
    found = search_structure(*judge.canvases[0], scene.frame, STRUCTURED, scene.run)
    if not found:
        return poses
    poses = poses + settle(judge, "mind", found, judge, outcome)
    outcome.notes.append(f"no pose found by {name} convinces; all shifts of many rotations were looked at by structure (MIND score "
                         f"{float(poses.judged.max()):.2f}, of right poses mostly 0.4 and more)")
    return poses


def nearby(scene: Scene, judge: Scene, poses: Poses, outcome: Outcome) -> Poses:
    """The poses, and those found by structure around the best: where two bodies share a part only, a search over whole scans ends
    near the right pose, locked on neighbouring structures."""
    d, best = poses.maps.shape[-1] - 1, int(poses.judged.argmax())
    model = MODELS[scene.model.name if scene.model.name in (*TURNLESS, "rigid") else "similarity"]
    linear = model.generators(d)[:, :d, :d]
    turns = linear.diagonal(dim1=-2, dim2=-1).abs().sum(-1) == 0
    reach = torch.where(linear.abs().sum((1, 2)) == 0, NEAR_SHIFT, torch.where(turns, NEAR_TURN, NEAR_SCALE))
    random = torch.rand(NEARBY, len(reach), generator=torch.Generator().manual_seed(scene.seed), dtype=torch.float64)
    steps = model.exp(((2 * random - 1) * reach).to(poses.maps.device), d)
    pool = [Candidate(one, "nearby", bool(poses.upright[best])) for one in poses.maps[best] @ steps]
    return poses + settle(judge, "mind", pool, judge, outcome)


def choose(poses: Poses, outcome: Outcome) -> tuple[Tensor, float]:
    """The best pose (1, D+1, D+1) and its MIND score. The header's orientation is the prior: another must win by a margin."""
    maps, kept, judged = poses.maps, poses.upright, poses.judged
    win = int(judged.argmax())
    if bool(kept.any()) and not bool(kept[win]):
        home = int(torch.where(kept, judged, -torch.inf).argmax())
        if float(judged[win] - judged[home]) <= MARGIN * (1 - float(judged[home])):
            win = home
        else:
            header = torch.eye(maps.shape[-1], dtype=maps.dtype, device=maps.device)[None]
            degrees = math.degrees(float(angle_between(maps[win: win + 1], header)))
            outcome.notes.append(f"the coarse pose turns by {degrees:.0f}° against the headers' orientation, in which MIND scores "
                                 f"{float(judged[home]):.3f} instead of {float(judged[win]):.3f}")
    return maps[win: win + 1], float(judged[win])


def settle(scene: Scene, name: str, pool: list[Candidate], judge: Scene, outcome: Outcome, along: bool = False) -> Poses:
    """One measure's best few poses of a pool: all candidates through the coarsest level, some through the second, judged
    there by MIND in the scene `judge`. along: look for shifts along the best turns, for a scan that is turned rightly may
    still lie along the other by its outline.

    The correlation ratio takes scans for what they are as a whole (a blurred or skull-stripped one for a brain, where local
    measures are drawn to the outer skull), but prefers full overlap; MIND tells near-symmetric poses apart, finds where
    fields of view overlap in part, and knows unrelated scans from related ones."""
    models, second = growth(scene.model), min(1, len(scene.canvases) - 1)
    maps = torch.stack([c.map for c in pool])
    upright = torch.tensor([c.upright for c in pool], device=maps.device)
    maps, scores = refine(scene, 0, (name,), maps, models[:1], points=SIFT_POINTS, iterations=SIFT_ITERATIONS)
    outcome.candidates += [{"origin": c.origin, "measure": name, "score": round(v, 4)} for c, v in zip(pool, scores.tolist(), strict=True)]
    header = torch.tensor([c.origin == "header" for c in pool], device=maps.device)
    few = torch.unique(torch.cat([spread_out(maps, scores, SIFTED, APART), *_best(scores, upright, header)]))
    maps, scores, upright, header = _distinct(maps[few], scores[few], upright[few], header[few])
    maps, scores = refine(scene, 0, (name,), maps, models[:2][-1:])
    if along:
        turned = torch.unique(torch.cat([_turns(maps, scores, LOOKED_ALONG), *_best(scores, upright)]))
        fixed, moving = scene.canvases[0]
        f = features_of(fixed, SIMILARITIES["mind"])
        slid = list(scene.run(lambda one: shifted(fixed, moving, f, maps[one: one + 1], scene.frame, 2), turned.tolist()))
        more = torch.cat([maps[:0], *(m[None] for found in slid for m, _ in found)])
        more, better = refine(scene, 0, (name,), more, models[:2]) if len(more) else (more, scores[:0])
        maps, scores = torch.cat([maps, more]), torch.cat([scores, better])
        upright = torch.cat([upright, upright[turned].repeat_interleave(torch.tensor([len(found) for found in slid], device=maps.device))])
        header = torch.cat([header, torch.zeros(len(more), dtype=torch.bool, device=header.device)])
    maps, scores, upright, header = _distinct(maps, scores, upright, header)
    mind = _mind(judge, 0, maps)
    if _leads(mind, scores):
        few = mind.argmax()[None]
    else:
        ahead = (spread_out(maps, some, SETTLED, APART) for some in (scores, mind))
        few = torch.unique(torch.cat([*ahead, *_best(scores, upright, header)]))
    maps, upright = maps[few], upright[few]
    maps, scores = refine(scene, second, (name,), maps, models[:2][-1:], points=SETTLE_POINTS)
    maps, scores, upright = _distinct(maps, scores, upright)
    return Poses(maps, upright, _mind(judge, second, maps))


def _leads(mind: Tensor, scores: Tensor) -> bool:
    """Whether the best by MIND (N,) is so far ahead of all others, and the best by the measure, too, that it alone goes on."""
    first, *others = mind.sort(descending=True).values.tolist()
    return int(mind.argmax()) == int(scores.argmax()) and (not others or first - others[0] > LEADING * (1 - others[0]))


def _distinct(maps: Tensor, scores: Tensor, *kinds: Tensor) -> tuple[Tensor, ...]:
    """Maps, scores and kinds (N,) of those that differ, the best of each; it is of the kinds of all that fell together with it."""
    near = torch.cdist(maps.flatten(1), maps.flatten(1)) < SAME_POSE
    kept: list[int] = []
    for place in scores.argsort(descending=True).tolist():
        if not bool(near[place, kept].any()):
            kept.append(place)
    kept.sort()
    return maps[kept], scores[kept], *((near[kept] & kind).any(1) for kind in kinds)


def _turns(maps: Tensor, scores: Tensor, count: int) -> Tensor:
    """Places of the best maps (at most `count`) whose rotations differ."""
    kept: list[int] = []
    for place in scores.argsort(descending=True).tolist():
        if len(kept) < count and (not kept or bool((angle_between(maps[place: place + 1], maps[kept]) > 4 * APART).all())):
            kept.append(place)
    return torch.tensor(kept, device=maps.device)


def _mind(scene: Scene, level: int, maps: Tensor) -> Tensor:
    """MIND scores (N,) of maps at a level; poses, not the halves of one score, are the jobs to share out."""
    alone = replace(scene, run=map)
    return torch.tensor(list(scene.run(lambda one: score(alone, level, ("mind",), one), maps.split(1))), device=maps.device)


def _best(scores: Tensor, *kinds: Tensor) -> list[Tensor]:
    """The place (1,) of the best score of each kind (N,) that there is."""
    return [torch.where(kind, scores, -torch.inf).argmax()[None] for kind in kinds if bool(kind.any())]
