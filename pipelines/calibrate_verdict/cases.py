"""Cases with known truth: pairs turned, changed, cut, begun well and badly, paired wrongly; and how good a map is for one.

A case is drawn from its number alone, so that any one can be made again. Scans are not resampled when they are turned: their headers
are, which is the same to regkit, whose levels lie along the world's axes.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

import regkit
from regkit.filters import smooth
from regkit.space import MODELS as MODELS_OF
from regkit.space import Grid, Matrix
from regkit.training.poses import turned

Pair = dict[str, Any]

# anatomies that share a part of the body, or might: no map between them is surely wrong
KIN = ({"brain", "head", "hippocampus", "spinal"}, {"lung", "abdomen", "cardiac", "spinal"})
VARIANTS = ("as it is", "as it is", "inverted", "noisy", "gamma", "shaded", "cropped", "blurred")
# begun, given: from the map of the pair as it is, moved; refined, and as it is
STARTS = ("auto", "header", "centre", "mass", "moments", "bare", "given", "given", "begun", "begun", "begun")
MODELS = ("affine", "affine", "affine", "similarity", "rigid")
TURNS = (0.0, 0.25, 1.0, math.pi)  # radians at most
WRONG, HOPELESS = 0.15, 0.04  # shares of the cases
POSES, SHIFT, SCALES = (45, 90, 180), 0.15, (0.85, 1.15)  # degrees; of the edge; times
STRANGE = 200
BLOCKS = 6  # along an edge, of a scan whose blocks are exchanged


@dataclass(frozen=True)
class Case:
    """One registration to be judged: what is aligned to what, from where, and the maps that undo how both were laid."""

    number: int
    kind: str  # plain, related, wrong or hopeless
    group: str
    id: str
    start: str
    model: str
    variant: str
    turn: float
    fixed: regkit.Image
    moving: regkit.Image
    fixed_laid: Tensor
    moving_laid: Tensor
    given: Tensor | None
    seed: int


def anatomy(pair: Pair) -> str:
    return pair["group"].split("-")[0]


def strange(pairs: list[Pair]) -> list[tuple[Pair, Pair]]:
    """All two pairs whose scans show nothing in common."""
    return [(a, b) for a, b in itertools.permutations(pairs, 2)
            if a.get("ndim", 3) == b.get("ndim", 3) and anatomy(a) != anatomy(b)
            and not any({anatomy(a), anatomy(b)} <= kin for kin in KIN)]


@lru_cache(maxsize=12)
def scan(path: str) -> regkit.Image:
    """One channel, float, from 0 to 1 but for a few voxels."""
    image = regkit.read_image(path).luminance()
    data = torch.nan_to_num(image.data.float())
    values = data.flatten()[:: max(1, data.numel() // 10**6)]
    low, high = values.min(), values.quantile(0.999)
    return image.with_data(((data - low) / (high - low).clamp_min(1e-6)).clamp(0, 1.2))


def changed(image: regkit.Image, variant: str, rng: np.random.Generator) -> regkit.Image:
    """The scan under another contrast, or in part."""
    data, generator = image.data, torch.Generator().manual_seed(int(rng.integers(2**31)))
    if variant == "inverted":
        data = torch.where(data > 0.02, 1.22 - data, torch.zeros_like(data))
    elif variant == "noisy":
        data = data + float(rng.uniform(0.05, 0.25)) * torch.randn(data.shape, generator=generator)
    elif variant == "gamma":
        data = data.clamp_min(0) ** float(np.exp(rng.uniform(-0.9, 0.9)))
    elif variant == "shaded":
        ramps = torch.meshgrid(*[torch.linspace(-1, 1, n) for n in data.shape[2:]], indexing="ij")
        data = data * sum(float(rng.normal(0, 0.6)) * r for r in ramps).exp()  # type: ignore[union-attr]
    elif variant == "blurred":
        data = smooth(data, [float(rng.uniform(0.015, 0.04)) * max(data.shape[2:])] * (data.ndim - 2))
    elif variant == "cropped":
        share = rng.uniform(0.55, 0.9, image.ndim)
        first = [int(rng.integers(0, n - max(int(n * s), 4) + 1)) if n > 8 else 0 for n, s in zip(data.shape[2:], share, strict=True)]
        size = [max(int(n * s), 4) if n > 8 else n for n, s in zip(data.shape[2:], share, strict=True)]
        data = data[(..., *[slice(a, a + n) for a, n in zip(first, size, strict=True)])]
        shift = torch.eye(image.ndim + 1, dtype=torch.float64)
        shift[:-1, -1] = torch.tensor(first, dtype=torch.float64)
        return replace(image, data=data, grid=Grid(tuple(size), image.grid.affine @ shift), slice_affine=None)
    return image.with_data(data)


def spoilt(image: regkit.Image, rng: np.random.Generator) -> tuple[str, regkit.Image]:
    """A scan that nothing can be aligned to: smooth noise, or its own blocks exchanged."""
    generator = torch.Generator().manual_seed(int(rng.integers(2**31)))
    if rng.random() < 0.5:
        return "noise", image.with_data(smooth(torch.randn(image.data.shape, generator=generator),
                                                              [float(rng.uniform(0.5, 4))] * image.ndim))
    data = image.data.clone()
    edges = [[n * k // BLOCKS for k in range(BLOCKS)] for n in data.shape[2:]]
    size = [n // BLOCKS for n in data.shape[2:]]
    places = [(..., *[slice(a, a + n) for a, n in zip(at, size, strict=True)]) for at in itertools.product(*edges)]
    for here, there in zip(places, rng.permutation(len(places)), strict=True):
        data[here] = image.data[places[there]]
    return "exchanged", image.with_data(data)


def laid(image: regkit.Image, map: Tensor) -> regkit.Image:
    """The scan with its header carried on by a map (1, D+1, D+1) in mm."""
    return replace(image, grid=Grid(image.grid.shape, map @ image.grid.affine), slice_affine=None, source=None)


def about(linear: Tensor, image: regkit.Image, shift: Tensor) -> Tensor:
    """(1, D+1, D+1): a linear map (D, D) about the middle of a scan, and a shift (D,) in mm."""
    d, centre = image.ndim, image.grid.centre[0]
    map = torch.eye(d + 1, dtype=torch.float64)[None].clone()
    map[0, :d, :d], map[0, :d, d] = linear, centre - linear @ centre + shift
    return map


def edge(image: regkit.Image) -> float:
    corners = image.grid.corners()[0]
    return float((corners.amax(0) - corners.amin(0)).max())


def pose(image: regkit.Image, most: float, reach: float, scale: float, rng: np.random.Generator) -> Tensor:
    """A random map (1, D+1, D+1) that turns by at most `most`, shifts by a share of the edge, and scales."""
    generator = torch.Generator().manual_seed(int(rng.integers(2**31)))
    turn = turned(1, image.ndim, most, generator)[0] if most else torch.eye(image.ndim, dtype=torch.float64)
    shift = torch.tensor(rng.uniform(-reach, reach, image.ndim)) * edge(image)
    return about(turn * float(np.exp(rng.uniform(-scale, scale))), image, shift)


def case(number: int, pairs: list[Pair], seed: int, best: dict[str, Tensor], moved: bool = False) -> Case:
    """Case `number`: the pairs as they are come first. best: the map of each pair as it is, for starts that are given. moved: of the
    others only maps that are given, and not refined."""
    rng = np.random.default_rng([seed, number])
    if number < len(pairs):
        pair, eye = pairs[number], torch.eye(pairs[number].get("ndim", 3) + 1, dtype=torch.float64)[None]
        fixed, moving = (scan(pair[side]) for side in ("fixed", "moving"))
        return Case(number, "plain", pair["group"], pair["id"], "auto", "affine", "as it is", 0.0, fixed, moving,
                    eye, eye, None, seed)
    groups = sorted({pair["group"] for pair in pairs})
    draw, kind = rng.random(), "related"
    start, model, variant, most = (options[int(rng.integers(len(options)))] for options in (STARTS, MODELS, VARIANTS, TURNS))
    if moved:
        start, draw = "given", 1.0
    if draw < WRONG:
        ways = strange(pairs)
        names = sorted({(a["group"], b["group"]) for a, b in ways})
        name = names[int(rng.integers(len(names)))]
        ways = [(a, b) for a, b in ways if (a["group"], b["group"]) == name]
        one, other = ways[int(rng.integers(len(ways)))]
        kind, group, id = "wrong", f"{one['group']} | {other['group']}", f"{one['id']} | {other['id']}"
        fixed, moving = scan(one["fixed"]), changed(scan(other["moving"]), variant, rng)
        start = "bare" if start in ("given", "begun") else start
    else:
        group = groups[int(rng.integers(len(groups)))]
        some = [pair for pair in pairs if pair["group"] == group]
        one = some[int(rng.integers(len(some)))]
        id = one["id"]
        fixed, moving = scan(one["fixed"]), changed(scan(one["moving"]), variant, rng)
        if draw < WRONG + HOPELESS:
            variant, moving = spoilt(moving, rng)
            kind, start = "hopeless", "bare" if start in ("given", "begun") else start
    scale = 0.1 if model != "rigid" or rng.random() < 0.25 else 0.0  # a rigid map cannot follow
    a, b = (pose(image, most, 0.1, scale, rng) for image in (fixed, moving))
    given = None
    if start in ("given", "begun"):
        off = pose(fixed, float(rng.choice([0.05, 0.15, 0.5, math.pi])), float(rng.choice([0.0, 0.03, 0.1, 0.3])), 0.08, rng)
        given = b @ best[id] @ off @ torch.linalg.inv(a) if id in best else None
        start = start if given is not None else "auto"
    return Case(number, kind, group, id, start, model, variant, most, laid(fixed, a), laid(moving, b), a, b, given, seed)


def accepted(number: int, pairs: list[Pair], seed: int) -> Case:
    """Case `number` of those on which the verdict is held to its promise, all begun with auto: the pairs as they are, each turned by
    every one of POSES, and STRANGE that cannot be aligned."""
    rng, count = np.random.default_rng([seed, number, 1]), len(pairs)
    if number < count:
        return case(number, pairs, seed, {})
    if number < count * (1 + len(POSES)):
        pair, degrees = pairs[number % count], POSES[number // count - 1]
        fixed, moving = (scan(pair[side]) for side in ("fixed", "moving"))
        generator = torch.Generator().manual_seed(int(rng.integers(2**31)))
        axis = MODELS_OF["rigid"].exp(_turn(fixed.ndim, math.radians(degrees), generator), fixed.ndim)[0, :-1, :-1]
        shift = torch.tensor(rng.uniform(-SHIFT, SHIFT, fixed.ndim)) * edge(moving)
        a, b = torch.eye(fixed.ndim + 1, dtype=torch.float64)[None], about(axis * float(rng.uniform(*SCALES)), moving, shift)
        return Case(number, "turned", pair["group"], pair["id"], "auto", "affine", "as it is", math.radians(degrees), fixed,
                    laid(moving, b), a, b, None, seed)
    ways, kind = strange(pairs), "wrong"
    names = sorted({(a["group"], b["group"]) for a, b in ways})
    some: list[tuple[Pair, Pair]] = []
    while not some:  # a name is drawn for every two pairs
        some = [(a, b) for a, b in ways if (a["group"], b["group"]) == names[int(rng.integers(len(names)))]]
    one, other = some[int(rng.integers(len(some)))]
    group, id, variant = f"{one['group']} | {other['group']}", f"{one['id']} | {other['id']}", "as it is"
    fixed, moving = scan(one["fixed"]), scan(other["moving"])
    if number % 10 == 0:
        kind, group, id = "hopeless", one["group"], one["id"]
        variant, moving = spoilt(scan(one["moving"]), rng)
    eye = torch.eye(fixed.ndim + 1, dtype=torch.float64)[None]
    return Case(number, kind, group, id, "auto", "affine", variant, 0.0, fixed, moving, eye, eye, None, seed)


def _turn(ndim: int, angle: float, generator: torch.Generator) -> Tensor:
    """(1, P): rigid parameters that turn by an angle about a random axis."""
    theta = torch.zeros(1, MODELS_OF["rigid"].count(ndim), dtype=torch.float64)
    axis = torch.randn(theta.shape[1] - ndim, generator=generator, dtype=torch.float64)
    theta[0, ndim:] = angle * axis / axis.norm()
    return theta


@lru_cache(maxsize=24)
def _marks(path: str, image: str, kind: str) -> tuple[Any, Tensor, Tensor]:
    """Of points: names, world (P, D). Of labels: their numbers, the grid's inverse, and the array."""
    if kind == "points":
        like = regkit.read_image(image)
        return None, regkit.read_points(path, image=like).world, like.grid.spacing[0]
    labels = regkit.read_image(path)
    return labels.grid, labels.data[0, 0].round().long(), labels.grid.spacing[0]


def error(pair: Pair, map: Tensor) -> float | None:
    """Mean distance of the landmarks in mm, of a map (1, D+1, D+1) of fixed to moving."""
    if not pair.get("fixed_points"):
        return None
    (_, here, _), (_, there, _) = (_marks(pair[f"{side}_points"], pair[side], "points") for side in ("fixed", "moving"))
    return float((Matrix(map)(here[None])[0] - there).norm(dim=1).mean())


def least(pair: Pair) -> float:
    """The error of the affine map that fits the landmarks best, but no less than a voxel of the fixed scan."""
    (_, here, spacing), (_, there, _) = (_marks(pair[f"{side}_points"], pair[side], "points") for side in ("fixed", "moving"))
    return max(error(pair, MODELS_OF["affine"].fit(here[None], there[None])) or 0.0, float(spacing.mean()))


def overlap(pair: Pair, map: Tensor, most: int = 400_000) -> float | None:
    """Mean Dice over the fixed scan's labels, at every so many voxels of its grid."""
    if not pair.get("fixed_labels"):
        return None
    (grid, fixed, _), (other, moving, _) = (_marks(pair[f"{side}_labels"], pair[side], "labels") for side in ("fixed", "moving"))
    step = max(1, math.ceil((fixed.numel() / most) ** (1 / fixed.ndim)))
    few = tuple(slice(None, None, step) for _ in fixed.shape)
    here = fixed[few].flatten()
    index = torch.stack(torch.meshgrid(*[torch.arange(0, n, step, dtype=torch.float64) for n in fixed.shape], indexing="ij"), -1)
    there = other.to_index(Matrix(map)(grid.to_world(index.reshape(1, -1, fixed.ndim))))[0].round().long()
    seen = ((there >= 0) & (there < torch.tensor(moving.shape))).all(1)
    there = there.clamp_min(0).minimum(torch.tensor(moving.shape) - 1)
    found = torch.where(seen, moving[tuple(there.unbind(1))], 0)
    top = int(max(here.max(), found.max())) + 1
    both, one, two = (torch.bincount(v, minlength=top)[1:].double() for v in (here[here == found], here, found))
    return float((2 * both / (one + two).clamp_min(1))[one > 0].mean())


def centres(pair: Pair, map: Tensor) -> float | None:
    """Mean distance in mm of the centres of the labels that both scans hold, where there are enough to speak of."""
    if not pair.get("fixed_labels"):
        return None
    where = []
    for side in ("fixed", "moving"):
        grid, labels, _ = _marks(pair[f"{side}_labels"], pair[side], "labels")
        at = labels.nonzero()
        label = labels[tuple(at.unbind(1))]
        count = torch.bincount(label, minlength=int(label.max()) + 1).double()
        total = torch.zeros(len(count), labels.ndim, dtype=torch.float64).index_add_(0, label, at.double())
        middle = grid.to_world((total / count.clamp_min(1)[:, None])[None])[0]
        where.append({k: middle[k] for k in range(1, len(count)) if count[k] > 0})
    both = sorted(set(where[0]) & set(where[1]))
    if not both:
        return None
    here, there = (torch.stack([side[k] for k in both]) for side in where)
    return float((Matrix(map)(here[None])[0] - there).norm(dim=1).mean())


def labelled(pair: Pair) -> int:
    """How many labels the fixed scan's map holds."""
    labels = _marks(pair["fixed_labels"], pair["fixed"], "labels")[1]
    return int((torch.bincount(labels.flatten())[1:] > 0).sum())
