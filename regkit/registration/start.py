"""Where a registration may begin: candidate maps from the header, the centres, the moments, and a search over rotations."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from regkit.registration.level import sides_of
from regkit.registration.pyramid import Canvas, features_of
from regkit.registration.refine import evaluate
from regkit.registration.run import Run
from regkit.registration.shifts import shifted, shifts
from regkit.registration.turns import rotations
from regkit.similarity import SIMILARITIES
from regkit.space import Frame, Model
from regkit.space.models import nearest_rotation


@dataclass(frozen=True, eq=False)
class Candidate:
    """A map (D+1, D+1) given in the frame, where it came from, and whether it keeps the header's orientation."""

    map: Tensor
    origin: str
    upright: bool


def mass(canvas: Canvas, frame: Frame) -> tuple[Tensor, Tensor]:
    """Centre (D,) and second central moments (D, D) of the intensities, in the frame."""
    points = ((canvas.grid.points()[0] - frame.centre[0]) / frame.scale).to(canvas.data.device)
    weight = (canvas.data * canvas.weight).flatten().double()
    weight = weight / weight.sum().clamp_min(1e-12)
    centre = weight @ points
    spread = points - centre
    return centre, (spread * weight[:, None]).mT @ spread


def middle(canvas: Canvas, frame: Frame) -> Tensor:
    """Geometric centre (D,) of what is seen, in the frame."""
    seen = (canvas.weight[0, 0] > 0.5).nonzero().double()
    ends = torch.stack([seen.amin(0), seen.amax(0)]).mean(0) if len(seen) else torch.zeros(canvas.grid.ndim, dtype=torch.float64)
    return (canvas.grid.to_world(ends[None, None])[0, 0] - frame.centre[0]) / frame.scale


def about(linear: Tensor, at: Tensor, to: Tensor) -> Tensor:
    """Maps (N, D+1, D+1) with linear parts (N, D, D) that take the point `at` (D,) to `to` (D,)."""
    n, d, _ = linear.shape
    m = torch.eye(d + 1, dtype=torch.float64, device=linear.device).repeat(n, 1, 1)
    m[:, :d, :d] = linear
    m[:, :d, d] = to - linear @ at
    return m


def moments(fixed: Canvas, moving: Canvas, frame: Frame) -> Tensor:
    """Maps that lay the principal axes on each other, one for every pairing of directions with determinant 1."""
    (cf, sf), (cm, sm) = mass(fixed, frame), mass(moving, frame)
    d = len(cf)
    ef, em = torch.linalg.eigh(sf).eigenvectors, torch.linalg.eigh(sm).eigenvectors
    signs = torch.cartesian_prod(*[torch.tensor([1.0, -1.0], dtype=torch.float64, device=cf.device)] * d)
    turns = em @ torch.diag_embed(signs) @ ef.mT
    turns = turns[torch.linalg.det(turns) > 0]
    return about(nearest_rotation(turns), cf, cm)


def upright(fixed: Canvas, moving: Canvas, frame: Frame) -> list[Candidate]:
    """The header's own pose, and the header's orientation shifted so that centres or masses meet."""
    d = fixed.grid.ndim
    eye = torch.eye(d, dtype=torch.float64, device=fixed.data.device)[None]
    pairs = {"header": (torch.zeros_like(middle(fixed, frame)),) * 2,
             "centre": (middle(fixed, frame), middle(moving, frame)),
             "mass": (mass(fixed, frame)[0], mass(moving, frame)[0])}
    return [Candidate(about(eye, a, b)[0], name, True) for name, (a, b) in pairs.items()]


def slid(fixed: Canvas, moving: Canvas, frame: Frame, run: Run = map) -> list[Candidate]:
    """The header's orientation at the shifts where the scans' intensities, and where their edges, correlate best."""
    jobs = (("intensity", fixed.data, moving.data), ("edge", *(features_of(canvas, SIMILARITIES["edge"]) for canvas in (fixed, moving))))
    found = run(lambda job: shifts(fixed, moving, job[1], job[2], frame, 3), jobs)
    return [Candidate(one, f"shift by {job[0]}", True) for job, maps in zip(jobs, found, strict=True) for one, _ in maps]


def angle_between(a: Tensor, b: Tensor) -> Tensor:
    """Angles (N, M) in radians between the rotations nearest to maps (N, D+1, D+1) and (M, D+1, D+1)."""
    d = a.shape[-1] - 1
    ra, rb = nearest_rotation(a[:, :d, :d]), nearest_rotation(b[:, :d, :d])
    trace = torch.einsum("nij,mij->nm", ra, rb)
    return torch.acos(((trace - 1) / 2 if d == 3 else trace / 2).clamp(-1, 1))


def spread_out(maps: Tensor, scores: Tensor, count: int, apart: float) -> Tensor:
    """Places of the best `count` maps no two of which are turned by less than `apart` radians and also shifted little."""
    d = maps.shape[-1] - 1
    kept: list[int] = []
    order = scores.argsort(descending=True).tolist()[: 40 * count]
    for place in order:
        near = [k for k in kept if float((maps[k, :d, d] - maps[place, :d, d]).norm()) < 0.15]
        if not near or bool((angle_between(maps[place: place + 1], maps[near]) > apart).all()):
            kept.append(place)
        if len(kept) == count:
            break
    return torch.tensor(kept, device=maps.device)


SEARCH_POINTS = (160, 1000)  # for all rotations, and for the better ones
TURNED, TURNS_WORK = 700, 40e6  # rotations each of whose shifts are looked at where all else fails, and in how many voxels in all
LEAST_TURNED, MOST_TURNED = 80, 500_000  # rotations; and voxels from which on it would take minutes
LARGER = 2  # times as many voxels
SEARCHED = 40  # rotations a measure that are looked at again
# what ranks the rotations: a global measure sees far, a local one tells symmetric poses apart, cr sees through contrast
TURNLESS = ("translation", "attention")  # models that keep the orientation
_RANKED_BY = {"auto": ("ncc", "lncc", "cr", "edge"), "mse": ("ncc",), "ncc": ("ncc",), "lncc": ("ncc", "lncc")}


def search(fixed: Canvas, moving: Canvas, frame: Frame, measures: tuple[str, ...], count: int, seed: int,
           run: Run = map) -> list[Candidate]:
    """The best `count` poses by each measure of a rotation grid about the masses and about the middles of the fields of
    view: all by few points of the fixed scan, the better ones by more points of both."""
    turns = rotations(fixed.grid.ndim).to(fixed.data.device)
    maps = torch.cat([about(turns, mass(fixed, frame)[0], mass(moving, frame)[0]),
                      about(turns, middle(fixed, frame), middle(moving, frame))])

    def ranked(name: str) -> list[Candidate]:
        measure, better = SIMILARITIES[name], maps
        for points in SEARCH_POINTS:
            sides = sides_of(fixed, moving, measure, frame, points, seed, slopes=False)
            sides = sides[:1] if points == SEARCH_POINTS[0] else sides
            scores = evaluate(sides, better, measure.residual, slopes=False).score
            if points == SEARCH_POINTS[0]:
                better = better[scores.topk(min(SEARCHED, len(scores))).indices]
        return [Candidate(better[k], f"search by {name}", False) for k in spread_out(better, scores, count, 0.25).tolist()]

    return [one for found in run(ranked, measures) for one in found]


def search_structure(fixed: Canvas, moving: Canvas, frame: Frame, count: int, run: Run = map) -> list[Candidate]:
    """The best `count` poses by MIND among all shifts of some hundred rotations: for what nothing else finds, at its price;
    none where that is too high."""
    voxels = math.prod(a + b for a, b in zip(fixed.data.shape[2:], moving.data.shape[2:], strict=True))
    if voxels > MOST_TURNED:
        return []
    turns = rotations(fixed.grid.ndim, max(LEAST_TURNED, min(TURNED, int(TURNS_WORK / voxels)))).to(fixed.data.device)
    large = moving.data.numel() > LARGER * fixed.data.numel()  # what is turned is made anew for every turn: the small one, then
    home, away = (moving, fixed) if large else (fixed, moving)
    poses, features, known = about(turns, middle(home, frame), middle(away, frame)), features_of(home, SIMILARITIES["mind"]), {}
    found = [best for one in run(lambda pose: shifted(home, away, features, pose, frame, 1, known), poses.split(1)) for best in one]
    maps, scores = torch.stack([m for m, _ in found]), torch.tensor([s for _, s in found], device=poses.device)
    maps = torch.linalg.inv(maps) if large else maps
    return [Candidate(maps[k], "search by structure", False) for k in spread_out(maps, scores, count, 0.25).tolist()]


def candidates(fixed: Canvas, moving: Canvas, frame: Frame, model: Model, start: str, similarity: str, seed: int,
               run: Run = map) -> list[Candidate]:
    """Where to begin for one of the start names, or for `near`, the upright part of auto, and `far`, the rest of it; what cannot turn
    keeps the header's orientation."""
    straight = upright(fixed, moving, frame) if start != "far" else []
    if start in ("auto", "near"):
        straight += slid(fixed, moving, frame, run)
    if start in ("header", "centre", "mass"):
        return [c for c in straight if c.origin == start]
    if model.name in TURNLESS or start == "near":
        return straight
    turned = [Candidate(m, "moments", False) for m in moments(fixed, moving, frame)]
    if start == "moments":
        return turned
    looked = search(fixed, moving, frame, _RANKED_BY.get(similarity, ("cr",)), 6, seed, run)
    return looked if start == "search" else straight + turned + looked
