"""The walk of one pair down the pyramid: candidates, a few survivors, refinement with growing degrees of freedom."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from regkit.registration.equations import Side
from regkit.registration.level import has_turned, sides_of
from regkit.registration.pyramid import Canvas
from regkit.registration.refine import evaluate, levenberg_marquardt
from regkit.registration.start import Candidate, about, angle_between, mass, middle, moments, rotations, spread_out, upright
from regkit.similarity import SIMILARITIES, Similarity
from regkit.space import MODELS, Frame, Model

POINTS = {"search": 1500, "coarse": 4000, "middle": 20_000, "fine": 80_000}
MARGIN = 0.05  # by how much (of what is left to 1) another orientation must beat the header's, at two levels


def growth(model: Model) -> list[Model]:
    """The models a coarse start passes through: fewer degrees of freedom first."""
    chain = ["translation", "rigid", "similarity", "affine"]
    return [MODELS[name] for name in chain[1: chain.index(model.name) + 1]] if model.name != "translation" else [model]


def refine(canvases: tuple[Canvas, Canvas], measure: Similarity, frame: Frame, maps: Tensor, models: list[Model], *, points: int,
           iterations: int, seed: int) -> tuple[Tensor, Tensor]:
    """Levenberg–Marquardt at one level through the models in turn: maps (N, D+1, D+1) in the frame → refined maps, scores (N,)."""
    fixed, moving = canvases
    step = fixed.mm / frame.scale
    options = {"tolerance": 0.01 * step, "reach": 4 * step}
    if not measure.oriented:
        sides = sides_of(fixed, moving, measure, frame, points, seed)
        scores = torch.zeros(len(maps))
        for model in models:
            maps, scores = levenberg_marquardt(sides, maps, model, measure.residual, iterations=iterations, **options)
        return maps, scores
    done, scores = [], []
    for one in maps.split(1):
        around, score = one, torch.zeros(1)
        sides = sides_of(fixed, moving, measure, frame, points, seed, around)
        for model in models:
            for _ in range(4):
                one, score = levenberg_marquardt(sides, one, model, measure.residual, iterations=iterations, **options)
                if not has_turned(one, around):
                    break
                around = one
                sides = sides_of(fixed, moving, measure, frame, points, seed, around)
        done.append(one)
        scores.append(score)
    return torch.cat(done), torch.cat(scores)


def search(fixed: Canvas, moving: Canvas, sides: list[Side], frame: Frame, residual: str, count: int) -> list[Candidate]:
    """The best poses of a rotation grid about the centres of mass and about the middles of the fields of view."""
    d = fixed.grid.ndim
    turns = rotations(d).to(fixed.data.device)
    maps = torch.cat([about(turns, mass(fixed, frame)[0], mass(moving, frame)[0]),
                      about(turns, middle(fixed, frame), middle(moving, frame))])
    scores = evaluate(sides, maps, residual, slopes=False).score
    best = spread_out(maps, scores, count, 0.25)
    return [Candidate(maps[k], "search", False) for k in best.tolist()]
