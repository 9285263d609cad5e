"""The walk of one pair down the pyramid: candidates, one pose, refinement with growing degrees of freedom."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable

import torch
from torch import Tensor

from regkit.registration.blocks import agree
from regkit.registration.outline import inside, stripped, without_idle
from regkit.registration.pose import CONVINCING, MARGIN, by_structure, choose, nearby, settle
from regkit.registration.pyramid import forget
from regkit.registration.refine import evaluate
from regkit.registration.start import Candidate, candidates
from regkit.registration.steps import POINTS, Outcome, Scene, compare, growth, look, oriented, refine, residual, score

# a local correlation at the finest level below this says that intensities do not go together; where that level is coarse
# the scans' outlines alone correlate (T1 and T2 of one stripped brain: 0.85, 0.32, -0.22 at the first three levels)
UNRELATED = {1: 0.9, 2: 0.4}
UNRELATED_FINE = 0.1
FEW_LEVELS = 2  # scans of so few voxels leave local windows little to go by: the correlation as a whole joins
SLACK = 0.1  # by so much of itself the shared field of view may shrink at the finest level at no cost
COST = 0.03  # of similarity, that agreeing blocks may cost: 0.015 at most for 130 pairs
# what stands in for a measure while poses are far apart: cheap, turns freely, and pulls from afar
COARSE = {"mse": "mse", "ncc": "ncc"}


def walk(scene: Scene, similarity: str, start: str, given: list[Candidate], refined: bool,
         progress: Callable[[str, float], None], wide: bool = False) -> Outcome:
    """From a start to the finest level; not `refined`: the best start as it is. wide: no pose is so convincing that others need not be
    looked for.

    start: a name of `settings.START_NAMES`. given: what is known beforehand, from a file or by a net: one more candidate with
    `auto`, and else the only one."""
    clock = time.perf_counter()
    outcome = Outcome(torch.zeros(0), similarity)
    progress("start", 0.15)
    name = COARSE.get(similarity, "cr")
    near = start == "auto" and bool(given) and refined and name != "mse" and not wide  # a net may spare the search
    pool = _pool(scene, similarity, "near" if near else start, given)
    clock = _lap(outcome, "start", clock)
    if not refined:
        return _pick(scene, pool, outcome)
    progress("coarse", 0.3)
    one, scene = _pose(scene, name, pool, near, lambda other, what: _pool(other, similarity, what, given if what != "far" else []), start,
                       outcome, wide)
    if similarity == "auto":
        _choose(scene, one, outcome)
    clock = _lap(outcome, "coarse", clock)
    outcome.map = _descend(scene, one, outcome, progress)
    _guard(scene, torch.stack([c.map for c in pool]), outcome, progress)
    clock = _lap(outcome, "fine", clock)
    if similarity == "auto":
        progress("blocks", 0.9)
        _agree(scene, outcome)
        _lap(outcome, "blocks", clock)
    return outcome


def _pose(scene: Scene, name: str, pool: list[Candidate], near: bool, repool: Callable[[Scene, str], list[Candidate]], start: str,
          outcome: Outcome, wide: bool) -> tuple[Tensor, Scene]:
    """The pose (1, D+1, D+1) from which to go on, and the scene with the backgrounds that count there. near: the pool leaves out the
    search, which is made up for where nothing else convinces."""
    if name == "mse":  # compares intensities as they are, the background's too
        return choose(settle(scene, name, pool, scene, outcome), outcome)[0], scene
    judge = inside(scene)
    poses = settle(scene, name, pool, judge, outcome)
    if near and float(poses.judged.max()) < CONVINCING:
        more = repool(scene, "far")
        poses = poses + settle(scene, name, more, judge, outcome)
        pool += more
    if len(pool) > 1 and (wide or float(poses.judged.max()) < CONVINCING):
        poses = poses + settle(scene, name, pool, judge, outcome, along=True)
        for other in stripped(scene):
            poses = poses + settle(other, name, repool(other, start), judge, outcome, along=True)
        poses = by_structure(scene, judge, name, poses, outcome, wide)
        poses = nearby(scene, judge, poses, outcome)
    one, agreed = choose(poses, outcome)
    for canvas in itertools.chain(*scene.canvases, *judge.canvases):
        forget(canvas)  # MIND's, twelve channels
    if judge is not scene:
        outcome.scores["inside"] = agreed
    return one, without_idle(scene, one, outcome)


def _pool(scene: Scene, similarity: str, start: str, given: list[Candidate]) -> list[Candidate]:
    if given and start not in ("auto", "near"):
        return given
    return given + candidates(*scene.canvases[0], scene.frame, scene.model, start, similarity, scene.seed, scene.run)


def _descend(scene: Scene, one: Tensor, outcome: Outcome, progress: Callable[[str, float], None]) -> Tensor:
    """A pose refined from the second level to the finest, under the chosen measure."""
    names, count, chain = tuple(outcome.similarity.split("+")), len(scene.canvases), growth(scene.model)
    for level in range(min(1, count - 1), count):
        progress(f"{scene.canvases[level][0].mm:.3g} mm", 0.6 + 0.3 * level / count)
        # full freedom waits for the finer half of the levels: before, whole structures fit their neighbours by shear
        models = chain[:2][-1:] if level < count // 2 else chain[-2:] if level <= 1 else chain[-1:]
        one, _ = refine(scene, level, names, one, models, slack=SLACK if level == count - 1 else 0.0)
    return one


def _agree(scene: Scene, outcome: Outcome) -> None:
    """The refined map moved to where most blocks of both scans agree, unless that costs similarity at the second level."""
    one = agree(scene, len(scene.canvases) - 1, outcome.map)
    similarity, share = compare(scene, min(1, len(scene.canvases) - 1), tuple(outcome.similarity.split("+")), one)
    reached, before = similarity * share**0.5, outcome.scores["end"]
    if reached < before - COST:
        outcome.notes.append(f"most small blocks of the scans agree on another map, which is less alike ({reached:.3f}, {before:.3f}); "
                             "the refined one was kept")
    else:
        outcome.map, outcome.scores["end"] = one, reached


def _lap(outcome: Outcome, name: str, since: float) -> float:
    now = time.perf_counter()
    outcome.seconds[name] = outcome.seconds.get(name, 0.0) + now - since
    return now


def _pick(scene: Scene, pool: list[Candidate], outcome: Outcome) -> Outcome:
    """The best start unrefined, by the coarsest level; the header's orientation again has the prior."""
    name = COARSE.get(outcome.similarity, "cr")
    maps = torch.stack([c.map for c in pool])
    upright = torch.tensor([c.upright for c in pool], device=maps.device)
    values = evaluate(look(scene, 0, (name,), None, slopes=False), maps, residual((name,)), slopes=False, run=scene.run).score
    outcome.candidates = [{"origin": c.origin, "measure": name, "score": round(v, 4)} for c, v in zip(pool, values.tolist(), strict=True)]
    win = int(values.argmax())
    if bool(upright.any()) and not bool(upright[win]):
        home = int(torch.where(upright, values, -torch.inf).argmax())
        win = win if float(values[win] - values[home]) > MARGIN * (1 - float(values[home])) else home
    outcome.map, outcome.similarity, outcome.why = maps[win: win + 1], name, "the measure that ranks starts; nothing was refined"
    outcome.scores |= {"best_start": float(values[win]), "end": float(values[win])}
    return outcome


def _choose(scene: Scene, pose: Tensor, outcome: Outcome) -> None:
    """The measure of the finer levels: the local correlation at the coarse pose tells whether intensities go together, and
    whether MIND sees more than it does (then contrasts differ, and MIND is worth its price) or edges are enough."""
    count = len(scene.canvases)
    local = score(scene, count - 1, ("lncc",), pose)
    filled = inside(scene) is scene  # no constant background, so no outline that alone would correlate
    asked = UNRELATED_FINE if filled else UNRELATED.get(count, UNRELATED_FINE)
    related = local >= asked
    smooth, structure = (score(scene, min(1, count - 1), (name,), pose) for name in ("lncc", "mind"))
    detail = "mind" if structure > smooth else "ngf"
    outcome.similarity = f"lncc+{detail}" if related else detail
    if related and filled and count <= FEW_LEVELS:
        outcome.similarity += "+ncc"
    outcome.why = (("intensities and structure go together" if related else "only structure can be relied on")
                   + f": the local correlation is {local:.2f} at the coarse pose (asked with {count} level{'s' * (count > 1)}: {asked}); "
                   f"MIND scores {structure:.2f} where local correlation scores {smooth:.2f}")


def _guard(scene: Scene, starts: Tensor, outcome: Outcome, progress: Callable[[str, float], None]) -> None:
    """Never worse than the best start, by one measure on one sample set: the chosen one at the second level.

    The shared field of view may shrink by SLACK at no cost, here as in the refinement."""
    level = min(1, len(scene.canvases) - 1)
    names = tuple(outcome.similarity.split("+"))
    quick = ("cr",) if names == ("mi",) or oriented(names) else names  # ranks the starts; the measure itself compares
    sides = look(scene, level, quick, None, POINTS[0] // 4, slopes=False)
    values = evaluate(sides, starts, residual(quick), slopes=False, run=scene.run).score
    best = starts[int(values.argmax())][None]
    before, least = compare(scene, level, names, best)

    def reached() -> float:
        similarity, share = compare(scene, level, names, outcome.map)
        outcome.scores["end"] = similarity * share**0.5
        return similarity * min(1.0, share / max((1 - SLACK) * least, 1e-6)) ** 0.5

    outcome.scores["best_start"] = before * least**0.5
    after = reached()
    if after < before:  # the pose that was chosen is none: go down again from the best start
        outcome.map = _descend(scene, best, outcome, progress)
        again = reached()
        outcome.notes.append(f"the first pose ended below the best start ({outcome.similarity} {after:.3f}, {before:.3f}); refined "
                             f"from there: {again:.3f}")
        if again < before:
            outcome.map, outcome.scores["end"] = best, outcome.scores["best_start"]
            outcome.notes.append("that was no better either; the best start was kept as it is")
