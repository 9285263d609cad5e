"""One attempt at a pair: from the settings' start to a map, what the guard finds, the evidence and the verdict."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from regkit.errors import OverlapError
from regkit.io import read_transform
from regkit.registration.bend import bend
from regkit.registration.evidence import gather
from regkit.registration.guard import look, overlap
from regkit.registration.nets import Trained
from regkit.registration.pair import Pair
from regkit.registration.predict import chosen, said
from regkit.registration.pyramid import build, choose_levels
from regkit.registration.run import Run
from regkit.registration.settings import NET, START_NAMES, Settings
from regkit.registration.start import Candidate
from regkit.registration.steps import Outcome, Scene, score
from regkit.registration.verdict import Verdict, judge
from regkit.registration.walk import walk
from regkit.similarity import SIMILARITIES
from regkit.space import MODELS, Frame, Matrix, Transform, model
from regkit.space.transform import compose, linearised

CURVED = ("projective", "tps")  # models that begin where the affine map ends


@dataclass(frozen=True, eq=False)
class Attempt:
    """What one way of going about a pair came to. settings: as they were for this attempt."""

    settings: Settings
    outcome: Outcome
    transform: Transform
    levels: tuple[float, ...]
    nets: tuple[Trained, ...]
    guard: dict[str, Any]
    evidence: dict[str, float]
    verdict: Verdict


class Ground:
    """What all attempts at a pair share. most: voxels that a canvas may have."""

    def __init__(self, pair: Pair, settings: Settings, run: Run, most: int | None):
        self.pair, self.run, self.most = pair, run, most
        self.frame = Frame.of(pair.fixed.grid)
        self.model = MODELS["affine" if settings.model in CURVED else settings.model]
        self._scenes: dict[tuple[tuple[float, ...], bool], Scene] = {}

    def scene(self, levels: tuple[float, ...], literal: bool, seed: int) -> Scene:
        """The pair at some levels; made once."""
        key = (levels, literal)
        if key not in self._scenes:
            canvases = build(self.pair, levels, literal=literal, run=self.run, most=self.most)
            self._scenes[key] = Scene(canvases, self.frame, self.model, seed, self.run)
        return replace(self._scenes[key], seed=seed)

    def seen(self, seed: int) -> Scene:
        """The pair as evidence looks at it: at the levels that are usual for it, whatever was asked for."""
        usual = choose_levels(self.pair)
        return self.scene(usual if (usual, False) in self._scenes else usual[:2], False, seed)


def attempt(ground: Ground, settings: Settings, tell: Callable[[str, float], None], wide: bool = False) -> Attempt:
    """Align the pair as the settings say. wide: look for poses everywhere, however convincing the first ones are.

    Raises OptionError, FormatError and OverlapError as `align` does."""
    pair, frame, began = ground.pair, ground.frame, time.perf_counter()
    given, notes = _given(pair, settings)
    nets = chosen(settings.start, settings.model, pair.ndim)
    asked = settings.level_list()
    levels = choose_levels(pair) if asked is None else asked
    scene = ground.scene(levels or _bare(pair, nets), settings.similarity == "mse", settings.seed)
    built = time.perf_counter()
    start = settings.start if settings.start in START_NAMES else "given"
    known = [Candidate(in_frame(given, frame)[0], "given", True)] if given is not None else said(nets, scene)
    asked_nets = time.perf_counter()
    outcome = walk(scene, settings.similarity, start, known, bool(levels), tell, wide)
    transform: Transform = _finish(outcome, scene)
    canvases, eye = scene.canvases, in_frame(Matrix.identity(pair.ndim).to(pair.fixed.grid.device), frame)
    outcome.scores["header"] = score(scene, min(1, len(canvases) - 1), tuple(outcome.similarity.split("+")), eye)
    bent = _bend(scene, outcome, settings, bool(levels), tell) if settings.model in CURVED else None
    transform = transform if bent is None else compose(transform, bent)
    findings = look(pair, transform, outcome.scores)
    walked = time.perf_counter()
    tell("verdict", 0.96)
    evidence = {**gather(ground.seen(settings.seed), outcome.map), "scale": findings["scale"], "shear": findings["shear"]}
    verdict = judge(evidence, findings["findings"], findings["hopeless"])
    outcome.seconds = {"pyramid": built - began, **({"net": asked_nets - built} if nets else {}), **outcome.seconds,
                       "verdict": time.perf_counter() - walked}
    outcome.notes[:0] = notes
    return Attempt(settings, outcome, transform, tuple(round(c[0].mm, 5) for c in canvases) if levels else (), tuple(nets), findings,
                   {name: round(value, 5) for name, value in evidence.items()}, verdict)


def _given(pair: Pair, settings: Settings) -> tuple[Matrix | None, list[str]]:
    """The start read from a file, as a member of the model."""
    if settings.start in START_NAMES or settings.start.startswith(NET):
        if settings.start == "header" and overlap(pair, Matrix.identity(pair.ndim)) == 0:
            raise OverlapError("start: the scans do not overlap where their headers put them; use --start auto or centre")
        return None, []
    given = read_transform(settings.start, ndim=pair.ndim)
    if overlap(pair, given) == 0:
        raise OverlapError(f"start: {settings.start} carries the scans apart, they do not overlap; check that it belongs to this pair")
    kind = "affine" if settings.model in CURVED else settings.model
    centre, corners = pair.fixed.grid.centre.cpu(), pair.fixed.grid.corners().cpu()
    member = MODELS[kind].project(given.matrix if isinstance(given, Matrix) else _touching(given, centre), centre)
    away = float((Matrix(member)(corners) - given(corners)).norm(dim=-1).max())
    if away < 1e-4:
        return Matrix(member).to(pair.fixed.grid.device), []
    return Matrix(member).to(pair.fixed.grid.device), [f"start: {settings.start} is no {kind} map; the nearest one was taken "
                                                       f"(corners of the scan shift by up to {away:.3g} mm)"]


def _bare(pair: Pair, nets: list[Trained]) -> tuple[float, ...]:
    """The level on which starts are compared where nothing is refined: the coarsest, or what a net is to see."""
    return (min(choose_levels(pair)[0], *(net.millimetres(pair.fixed.grid) for net in nets)),) if nets else choose_levels(pair)[:1]


def _touching(transform: Transform, centre: torch.Tensor) -> torch.Tensor:
    """The affine map (1, D+1, D+1) that touches a curved one at a point (1, D)."""
    linear = linearised(transform, centre, 1.0)
    matrix = torch.eye(centre.shape[-1] + 1, dtype=linear.dtype)[None].clone()
    matrix[:, :-1, :-1], matrix[0, :-1, -1] = linear, transform(centre[None])[0, 0] - linear[0] @ centre[0]
    return matrix


def _bend(scene: Scene, outcome: Outcome, settings: Settings, refined: bool, tell: Callable[[str, float], None]) -> Transform | None:
    """What bends the affine map, acting before it; None where nothing is to be refined."""
    if not refined:
        outcome.notes.append(f"nothing was refined, so the map is affine and not {settings.model}")
        return None
    began = time.perf_counter()
    tell("bend", 0.95)
    names = tuple(name for name in outcome.similarity.split("+") if SIMILARITIES[name].residual in ("correlation", "difference"))
    if not names:
        outcome.notes.append(f"the map was bent under mind, which least squares can follow; {outcome.similarity} led to the affine map")
    kind = model("tps", control=settings.control, stiffness=settings.stiffness) if settings.model == "tps" else MODELS[settings.model]
    found, values = bend(scene, names or ("mind",), outcome.map, kind)
    outcome.scores |= {"affine": values[-2], "bent": values[-1]}
    outcome.seconds["bend"] = time.perf_counter() - began
    return found


def in_frame(transform: Matrix, frame: Frame) -> torch.Tensor:
    return frame.matrix @ transform.matrix @ frame.inverse


def _finish(outcome: Outcome, scene: Scene) -> Matrix:
    """The map in the world; rounding collected over many composed steps is taken out of rigid and similar ones."""
    world = scene.frame.world(outcome.map)
    if scene.model.name != "affine":
        world = scene.model.project(world, scene.frame.centre)
    d = scene.frame.centre.shape[-1]
    return Matrix(torch.cat([world[:, :d], torch.eye(d + 1, dtype=world.dtype, device=world.device)[None, d:]], 1))


