"""How good a net is on scans it was not trained on."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from regkit.image import Image
from regkit.registration.align import align
from regkit.similarity import similarity
from regkit.space import MODELS, Frame, Grid, Matrix
from regkit.space.models import nearest_rotation
from regkit.training.losses import displacement, moved_by
from regkit.training.pairs import Drawer
from regkit.training.poses import Poses
from regkit.training.scans import Scan

ANGLES = (45, 90, 135, 180)  # degrees up to which pairs are counted together
CAPTURED = 20.0  # degrees from which refinement was seen to find home
CASES = 12  # pairs that are looked at on the way
Say = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Case:
    """Two scans on canvases (1, 1, *S) in poses of their own, the map that is known where they are one scan, and label maps or none."""

    fixed: Tensor
    moving: Tensor
    known: Tensor | None
    labels: tuple[Tensor, Tensor] | None
    angle: float


def cases(scans: list[Scan], drawer: Drawer, draw: Poses, labels: list[int], count: int, seed: int) -> list[Case]:
    """Half of them one scan twice, half two scans; turned from 0 to all that `draw` allows, evenly."""
    found, generator = [], torch.Generator().manual_seed(seed)
    d = scans[0].grid.ndim
    for number in range(count):
        a = number // 2 % len(scans)
        b = a if number % 2 == 0 or len(scans) == 1 else (a + 1 + number // 2 // len(scans) % (len(scans) - 1)) % len(scans)
        angle = draw.turn * (number // 2) / max(1, (count - 1) // 2)
        one = Poses(0.0, draw.shift, draw.scale, draw.stretch).draw(1, d, generator)
        two = Poses(0.0, draw.shift, draw.scale, draw.stretch).draw(1, d, generator)
        axis = torch.randn(d * (d - 1) // 2, generator=generator, dtype=torch.float64)
        theta = torch.zeros(1, MODELS["rigid"].count(d), dtype=torch.float64)
        theta[0, d:] = angle * axis / axis.norm()
        two = MODELS["rigid"].exp(theta, d) @ two
        marked = (drawer.marked(scans[a], one, labels), drawer.marked(scans[b], two, labels)) if labels else None
        found.append(Case(drawer.shown(scans[a], one), drawer.shown(scans[b], two), torch.linalg.inv(two) @ one if a == b else None, marked,
                          math.degrees(angle)))
    return found


def measure(say: Say, cases: list[Case], drawer: Drawer, measure_name: str) -> dict[str, float]:
    """Medians over cases. say: (fixed, moving) → map (1, D+1, D+1) in half edges.

    tre_mm and turn: distance and angle to the known map; captured: share of angles below CAPTURED, of all and of pairs turned by up
    to so many degrees; alike: the similarity's loss of different scans; dice: of their labels."""
    far, turns, alike, dice, by_angle = [], [], [], [], {}
    for case in cases:
        map = say(case.fixed, case.moving).double().cpu()
        if case.known is not None:
            far.append(float(displacement(map, case.known)) * drawer.half)
            turns.append(angle(map, case.known))
            by_angle.setdefault(next(a for a in ANGLES if case.angle <= a + 1e-6), []).append(turns[-1] < CAPTURED)
        else:
            moved = moved_by(map, case.moving, case.fixed.shape[2:])
            alike.append(float(similarity(measure_name).loss(moved, case.fixed, None)))
        if case.labels is not None and case.known is None:
            moved, fixed = moved_by(map, case.labels[1], case.fixed.shape[2:]).flatten(2), case.labels[0].flatten(2)
            both = 2 * (moved * fixed).sum(2) / (moved.sum(2) + fixed.sum(2)).clamp_min(1e-3)
            dice.append(float(both[fixed.sum(2) > 0].mean()))
    found = {"tre_mm": _median(far), "turn": _median(turns), "captured": sum(t < CAPTURED for t in turns) / max(1, len(turns))}
    found |= {f"captured_{a}": sum(hits) / len(hits) for a, hits in sorted(by_angle.items())}
    if alike:
        found["alike"] = sum(alike) / len(alike)
    if dice:
        found["dice"] = sum(dice) / len(dice)
    return found


def of_net(net: nn.Module) -> Say:
    """What `measure` asks of a net."""
    def say(fixed: Tensor, moving: Tensor) -> Tensor:
        with torch.no_grad():
            device = next(net.parameters()).device
            found = net(fixed.to(device), moving.to(device))
            return found[0] if isinstance(found, tuple) else found

    return say


def of_start(name: str, refined: bool = False) -> Say:
    """What `measure` asks of a start of `regkit.align`, with or without what comes after it."""
    def say(fixed: Tensor, moving: Tensor) -> Tensor:
        d, edge = fixed.ndim - 2, fixed.shape[-1]
        affine = torch.eye(d + 1, dtype=torch.float64)
        affine[:d, :d] *= 100 / edge
        affine[:d, d] = 50 / edge - 50
        grid = Grid((edge,) * d, affine)
        found = align(Image(fixed, grid), Image(moving, grid), start=name, levels="auto" if refined else "0", no_retry=True)
        frame = Frame(torch.zeros(1, d, dtype=torch.float64), 50.0)
        assert isinstance(found.transform, Matrix)
        return frame.matrix @ found.transform.matrix @ frame.inverse

    return say


def angle(one: Tensor, two: Tensor) -> float:
    """Degrees between the rotations nearest to two maps (1, D+1, D+1)."""
    d = one.shape[-1] - 1
    turn = nearest_rotation(one[:, :d, :d])[0].mT @ nearest_rotation(two[:, :d, :d])[0]
    trace = float(turn.diagonal().sum())
    return math.degrees(math.acos(max(-1.0, min(1.0, (trace - 1) / 2 if d == 3 else trace / 2))))


def _median(values: list[float]) -> float:
    return float(torch.tensor(values, dtype=torch.float64).median()) if values else math.nan
