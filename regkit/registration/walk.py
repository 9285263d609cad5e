"""The walk of one pair down the pyramid: candidates, a few survivors, refinement with growing degrees of freedom."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from regkit.registration.equations import Side
from regkit.registration.gradient import climb, information
from regkit.registration.level import has_turned, sides_of
from regkit.registration.pyramid import Canvas, Run
from regkit.registration.refine import evaluate, levenberg_marquardt
from regkit.registration.start import Candidate, candidates, spread_out
from regkit.similarity import SIMILARITIES
from regkit.space import MODELS, Frame, Model

POINTS = (4_000, 20_000, 50_000)  # compared in each direction at the coarsest, the second and all finer levels
ITERATIONS = (12, 10, 12)
SIFT_POINTS, SIFT_ITERATIONS, SIFTED = 1_000, 5, 6  # a first look at all candidates, and how many of them go on
SETTLE_POINTS = 6_000  # at the second level, for the few candidates that are left
INFORMATION_POINTS = 20_000  # mutual information needs no more than its histogram has room for
MARGIN = 0.05  # of what its score leaves to the best: by so much another orientation must beat the header's
# a local correlation at the finest level below this says that intensities do not go together; where that level is coarse
# the scans' outlines alone correlate (T1 and T2 of one stripped brain: 0.85, 0.32, -0.22 at the first three levels)
UNRELATED = {1: 0.9, 2: 0.4}
UNRELATED_FINE = 0.1
# what stands in for a measure while poses are far apart: cheap, turns freely, and pulls from afar. The correlation ratio is
# the one that takes a blurred or skull-stripped scan for what it is: local and edge measures are drawn to the outer skull
COARSE = {"mse": "mse", "ncc": "ncc"}


@dataclass(frozen=True, eq=False)
class Scene:
    """What every step of the walk needs: canvases (fixed, moving) coarse to fine, the frame, the model, the seed, and a
    `map` that may share jobs among threads."""

    canvases: list[tuple[Canvas, Canvas]]
    frame: Frame
    model: Model
    seed: int
    run: Run = map

    def effort(self, level: int) -> tuple[int, int]:
        """Points and iterations at a level."""
        place = min(level, len(POINTS) - 1)
        return POINTS[place], ITERATIONS[place]


@dataclass(eq=False)
class Outcome:
    """Where the walk ended: map (1, D+1, D+1) in the frame, and the notes it took."""

    map: Tensor
    similarity: str
    why: str = "asked for"
    candidates: list[dict[str, object]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    scores: dict[str, float] = field(default_factory=dict)


def growth(model: Model) -> list[Model]:
    """The models a coarse start passes through, fewest degrees of freedom first."""
    chain = ["rigid", "similarity", "affine"]
    return [MODELS[name] for name in chain[: chain.index(model.name) + 1]] if model.name in chain else [model]


def look(scene: Scene, level: int, names: tuple[str, ...], around: Tensor | None, points: int | None = None, *,
         slopes: bool = True) -> list[Side]:
    """What is compared at a level under one or several measures; oriented ones hold about the map `around`. slopes:
    whether steps will be taken."""
    fixed, moving = scene.canvases[level]
    count = points or scene.effort(level)[0]
    sides: list[Side] = []
    for name in names:
        measure = SIMILARITIES["ncc" if name == "mi" else name]
        sides += sides_of(fixed, moving, measure, scene.frame, count, scene.seed, around if measure.oriented else None,
                          scene.run, slopes)
    return sides


def oriented(names: tuple[str, ...]) -> bool:
    return any(SIMILARITIES[name].oriented for name in names)


def residual(names: tuple[str, ...]) -> str:
    """How the features of measures taken together are compared; those that are have the same."""
    return SIMILARITIES[names[0]].residual


def refine(scene: Scene, level: int, names: tuple[str, ...], maps: Tensor, models: list[Model], *, points: int | None = None,
           iterations: int | None = None) -> tuple[Tensor, Tensor]:
    """Refine maps (N, D+1, D+1) in the frame at one level under the mean of the measures, through the models in turn
    → maps, scores (N,). points, iterations: other than the level's."""
    fixed, moving = scene.canvases[level]
    iterations = iterations or scene.effort(level)[1]
    step = max(fixed.mm, moving.mm) / scene.frame.scale
    options = {"iterations": iterations, "tolerance": 0.01 * step, "reach": 4 * step}
    if names == ("mi",):
        sides = look(scene, level, names, None, min(scene.effort(level)[0], INFORMATION_POINTS))
        climbed = [climb(sides, one, models[-1], iterations=3 * iterations) for one in maps.split(1)]
        return torch.cat([m for m, _ in climbed]), torch.cat([s for _, s in climbed])
    if oriented(names) and len(maps) > 1:
        each = [refine(scene, level, names, one, models, points=points, iterations=iterations) for one in maps.split(1)]
        return torch.cat([m for m, _ in each]), torch.cat([s for _, s in each])
    around, scores = maps, maps.new_zeros(len(maps))
    sides = look(scene, level, names, around, points)
    for model in models:
        for _ in range(4):
            maps, scores = levenberg_marquardt(sides, maps, model, residual(names), run=scene.run, **options)
            if not oriented(names) or not has_turned(maps, around):
                break
            around = maps  # the features were made for another pose: make them anew
            sides = look(scene, level, names, around, points)
    return maps, scores


def score(scene: Scene, level: int, names: tuple[str, ...], one: Tensor) -> float:
    """The score of one map (1, D+1, D+1) in the frame: [-1, 1], 1 is best; zero overlap is 0."""
    if names == ("mi",):
        return float(information(look(scene, level, names, one, INFORMATION_POINTS), one))
    sides = look(scene, level, names, one, slopes=False)
    return float(evaluate(sides, one, residual(names), slopes=False, run=scene.run).score)


def walk(scene: Scene, similarity: str, start: str, given: Tensor | None, refined: bool,
         progress: Callable[[str, float], None]) -> Outcome:
    """From a start to the finest level; not `refined`: the best start as it is.

    start: a name of `settings.START_NAMES`, or anything with `given`, a map (1, D+1, D+1) in the frame."""
    clock = time.perf_counter()
    outcome = Outcome(torch.zeros(0), similarity)
    progress("start", 0.15)
    pool = [Candidate(given[0], "given", True)] if given is not None else \
        candidates(*scene.canvases[0], scene.frame, scene.model, start, similarity, scene.seed, scene.run)
    clock = _lap(outcome, "start", clock)
    maps = torch.stack([c.map for c in pool])
    upright = torch.tensor([c.upright for c in pool], device=maps.device)
    if not refined:
        return _pick(scene, pool, maps, upright, outcome)
    progress("coarse", 0.3)
    one = _settle(scene, COARSE.get(similarity, "cr"), pool, maps, upright, outcome)
    if similarity == "auto":
        _choose(scene, one, outcome)
    clock = _lap(outcome, "coarse", clock)
    for level in range(min(1, len(scene.canvases) - 1), len(scene.canvases)):
        progress(f"{scene.canvases[level][0].mm:.3g} mm", 0.6 + 0.3 * level / len(scene.canvases))
        models = growth(scene.model)[-2:] if level <= 1 else [scene.model]
        one, _ = refine(scene, level, tuple(outcome.similarity.split("+")), one, models)
    _lap(outcome, "fine", clock)
    outcome.map = one
    _guard(scene, maps, outcome)
    return outcome


def _lap(outcome: Outcome, name: str, since: float) -> float:
    now = time.perf_counter()
    outcome.seconds[name] = outcome.seconds.get(name, 0.0) + now - since
    return now


def _settle(scene: Scene, name: str, pool: list[Candidate], maps: Tensor, upright: Tensor, outcome: Outcome) -> Tensor:
    """One measure's best pose (1, D+1, D+1): all candidates at the coarsest level, a few at the second.

    The header's orientation is the prior: another must win by a margin at both levels, or near-symmetric anatomy flips."""
    models = growth(scene.model)
    found, sifted = refine(scene, 0, (name,), maps, models[:1], points=SIFT_POINTS, iterations=SIFT_ITERATIONS)
    for candidate, value in zip(pool, sifted.tolist(), strict=True):
        outcome.candidates.append({"origin": candidate.origin, "measure": name, "score": round(value, 4)})
    few = _best(found, sifted, upright, SIFTED)
    found, kept = found[few], upright[few]
    found, coarse = refine(scene, 0, (name,), found, models[:2])
    if len(pool) == 1:
        return found
    few = _best(found, coarse, kept, 3)
    found, kept = found[few], kept[few]
    second = min(1, len(scene.canvases) - 1)
    later, finer = refine(scene, second, (name,), found, models[-2:], points=SETTLE_POINTS)
    # MIND, which no pose was optimised for, joins the judgement: it tells near-symmetric poses apart
    judged = finer.cpu() + torch.tensor([score(scene, second, ("mind",), one[None]) for one in later])
    win = int(judged.argmax())
    if bool(kept.any()) and not bool(kept[win]):
        home = int(torch.where(kept.cpu(), judged, -torch.inf).argmax())
        if float(judged[win] - judged[home]) <= MARGIN * (2 - float(judged[home])):
            win = home
        else:
            means = f"{float(judged[win]) / 2:.3f} for the turned pose, {float(judged[home]) / 2:.3f} for the headers' orientation"
            outcome.notes.append(f"the scans lie turned against their headers: {name} and MIND together score {means}")
    return later[win: win + 1]


def _best(maps: Tensor, scores: Tensor, upright: Tensor, count: int) -> Tensor:
    """Places of the best `count` maps that differ, and of the best that keeps the header's orientation."""
    few = spread_out(maps, scores, count, 0.1)
    if bool(upright.any()):
        few = torch.unique(torch.cat([few, torch.where(upright, scores, -torch.inf).argmax()[None]]))
    return few


def _pick(scene: Scene, pool: list[Candidate], maps: Tensor, upright: Tensor, outcome: Outcome) -> Outcome:
    """The best start unrefined, by the coarsest level; the header's orientation again has the prior."""
    name = COARSE.get(outcome.similarity, "cr")
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
    """The measure of the finer levels: the local correlation at the coarse pose tells whether intensities go together."""
    local = score(scene, len(scene.canvases) - 1, ("lncc",), pose)
    related = local >= UNRELATED.get(len(scene.canvases), UNRELATED_FINE)
    outcome.similarity = "lncc+ngf" if related else "ngf"
    outcome.why = (f"the local correlation is {local:.2f} at the coarse pose, "
                   + ("intensities and edges go together" if related else "only edges can be relied on"))


def _guard(scene: Scene, starts: Tensor, outcome: Outcome) -> None:
    """Never worse than the best start, by one measure on one sample set: the chosen one at the second level."""
    level = min(1, len(scene.canvases) - 1)
    names = tuple(outcome.similarity.split("+"))
    quick = ("cr",) if names == ("mi",) or oriented(names) else names  # ranks the starts; the measure itself compares
    values = evaluate(look(scene, level, quick, None, POINTS[0], slopes=False), starts, residual(quick), slopes=False, run=scene.run).score
    best = starts[int(values.argmax())][None]
    before, after = (score(scene, level, names, one) for one in (best, outcome.map))
    outcome.scores |= {"best_start": before, "end": after}
    if after < before:
        outcome.map = best
        outcome.scores["end"] = before
        outcome.notes.append(f"refinement made it worse ({outcome.similarity} {before:.3f} → {after:.3f}); the best start was kept")
