"""What every stage of the walk is made of: looking at a level, refining maps on it, scoring one."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from regkit.registration.equations import Side
from regkit.registration.gradient import climb, information
from regkit.registration.level import has_turned, sides_of
from regkit.registration.pyramid import Canvas, without_background
from regkit.registration.refine import evaluate, levenberg_marquardt
from regkit.registration.run import Run
from regkit.similarity import SIMILARITIES
from regkit.space import MODELS, Frame, Model

POINTS = (4_000, 12_000, 25_000, 40_000)  # compared in each direction at the coarsest, the second, the third and all finer levels
ITERATIONS = (8, 10, 8, 12)
INFORMATION_POINTS = 20_000  # mutual information needs no more than its histogram has room for


@dataclass(frozen=True, eq=False)
class Scene:
    """What every step of the walk needs: canvases (fixed, moving) coarse to fine, the frame, the model, the seed, and a
    `map` that may share jobs among threads."""

    canvases: list[tuple[Canvas, Canvas]]
    frame: Frame
    model: Model
    seed: int
    run: Run = map

    def hiding(self, fixed: bool, moving: bool) -> Scene:
        """The scene in which a scan's constant background carries no weight."""
        return replace(self, canvases=[(without_background(f) if fixed else f, without_background(m) if moving else m)
                                       for f, m in self.canvases])

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
           iterations: int | None = None, slack: float = 0.0) -> tuple[Tensor, Tensor]:
    """Refine maps (N, D+1, D+1) in the frame at one level under the mean of the measures, through the models in turn
    → maps, scores (N,). points, iterations: other than the level's. slack: see
    `levenberg_marquardt`."""
    fixed, moving = scene.canvases[level]
    iterations = iterations or scene.effort(level)[1]
    step = max(fixed.mm, moving.mm) / scene.frame.scale
    options = {"iterations": iterations, "tolerance": 0.02 * step, "reach": 4 * step, "slack": slack}
    if names == ("mi",):
        sides = look(scene, level, names, None, min(scene.effort(level)[0], INFORMATION_POINTS))
        climbed = [climb(sides, one, models[-1], iterations=3 * iterations) for one in maps.split(1)]
        return torch.cat([m for m, _ in climbed]), torch.cat([s for _, s in climbed])
    if oriented(names) and len(maps) > 1:
        each = [refine(scene, level, names, one, models, points=points, iterations=iterations, slack=slack) for one in maps.split(1)]
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


def compare(scene: Scene, level: int, names: tuple[str, ...], one: Tensor) -> tuple[float, float]:
    """Of one map (1, D+1, D+1) in the frame: the similarity of what both scans see, in [-1, 1], and the share of features seen
    (1 for mutual information, which has it in its value)."""
    if names == ("mi",):
        return float(information(look(scene, level, names, one, INFORMATION_POINTS), one)), 1.0
    found = evaluate(look(scene, level, names, one, slopes=False), one, residual(names), slopes=False, run=scene.run)
    return float(found.similarity), float(found.share)


def score(scene: Scene, level: int, names: tuple[str, ...], one: Tensor) -> float:
    """The score of one map (1, D+1, D+1) in the frame: [-1, 1], 1 is best; zero overlap is 0."""
    similarity, share = compare(scene, level, names, one)
    return similarity * share**0.5
