"""Pictures of an anatomy in contrasts nobody scanned: parts of random brightness, so that a net learns shape and not contrast.

After B. Billot et al., SynthSeg (Medical Image Analysis 2023), and M. Hoffmann et al., SynthMorph (IEEE TMI 2022).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from regkit.filters import smooth
from regkit.sampling import inside, sample
from regkit.space import Frame, Grid
from regkit.space.grid import apply_matrix
from regkit.training.poses import Bends, turned


@dataclass(frozen=True, eq=False)
class Anatomy:
    """What is where in one scan.

    parts: (C, *S) shares in [0, 1] of each voxel, what they leave to 1 being air. values: (1, *S), the scan itself. grid: where they lie.
    inner: which parts (C,) a cut-out scan keeps, a stripped brain's for example; none where there is nothing to cut out.
    """

    parts: Tensor
    values: Tensor
    grid: Grid
    inner: tuple[bool, ...]

    def read(self, points: Tensor, centre: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """Parts (N, C, P) and values (N, 1, P) at points (N, P, D) of the frame with a centre (D,) and scale in mm."""
        index = apply_matrix(self.grid.inverse @ Frame(centre[None], scale).inverse, points)
        found = sample(self._together, index) * inside(index, self.grid.shape)[:, None]
        return found[:, :-1], found[:, -1:]

    @cached_property
    def _together(self) -> Tensor:
        """Parts and values (1, C + 1, *S), what belongs to a voxel side by side in memory."""
        return torch.cat([self.parts, self.values]).movedim(0, -1).contiguous().movedim(-1, 0)[None]


@dataclass(frozen=True)
class Looks:
    """How the pictures are drawn; chances are shares of all pictures."""

    scanned: float = 0.4
    """Chance that brightness is a random curve of the scan itself, instead of a random one a part."""
    cut_out: float = 0.5
    """Chance that only the inner parts are shown."""
    bright_air: float = 0.25
    inverted: float = 0.25
    """Chance that bright is dark."""
    bias: float = 0.3
    """Standard deviation of the logarithm of a smooth factor."""
    noise: float = 0.06
    """Most noise, of the range of brightness."""
    blurred: float = 0.4
    """Chance of a blur, of up to `blur` voxels along an axis."""
    blur: float = 1.2
    framed: float = 0.3
    """Chance that the field of view's edges are seen: a box in any pose around most of it, and beyond it, at times, another brightness."""
    cropped: float = 0.2
    """Chance of a partial field of view."""
    lesions: float = 0.2


def draw(anatomy: Anatomy, frame: Frame, shape: tuple[int, ...], maps: Tensor, bends: Bends, looks: Looks,
         generator: torch.Generator) -> Tensor:
    """Pictures (N, 1, *shape) in [0, 1] on a canvas of equal edges; maps (N, D+1, D+1) and then bends lead from the canvas' frame to
    the anatomy's, which is `frame`."""
    d, n = len(shape), len(maps)
    canvas = canvas_points(shape).expand(n, -1, -1)
    there = bends(canvas @ maps[:, :d, :d].mT.float() + maps[:, None, :d, d].float())
    parts, values = anatomy.read(there, frame.centre[0], frame.scale)
    return torch.cat([_one(parts[i: i + 1], values[i: i + 1], canvas[:1], shape, anatomy.inner, looks, generator) for i in range(n)])


def canvas_points(shape: tuple[int, ...]) -> Tensor:
    """(1, P, D): centres of a canvas' voxels in half edges from its centre."""
    longest = max(shape)
    ramps = [(torch.arange(s) + 0.5) * (2 / longest) - s / longest for s in shape]
    return torch.stack(torch.meshgrid(*ramps, indexing="ij"), -1).reshape(1, -1, len(shape))


def _one(parts: Tensor, values: Tensor, canvas: Tensor, shape: tuple[int, ...], inner: tuple[bool, ...], looks: Looks,
         generator: torch.Generator) -> Tensor:
    """One picture (1, 1, *shape) of parts (1, C, P) and values (1, 1, P)."""
    def chance(share: float) -> bool:
        return float(torch.rand((), generator=generator)) < share

    def uniform(low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=generator))

    shown = torch.ones(1, parts.shape[1], 1)
    if any(inner) and chance(looks.cut_out):
        shown = torch.tensor(inner, dtype=torch.float32).reshape(1, -1, 1)
        if chance(0.5):  # cut generously, or too closely
            body = (parts * shown).sum(1, keepdim=True)
            edge = uniform(0.2, 0.8)
            keep = ((body - edge) * 4 + 0.5).clamp(0, 1)
            parts, shown = parts * keep, torch.ones_like(shown)
    body = (parts * shown).sum(1, keepdim=True).clamp(0, 1)
    air = uniform(0, 1) if chance(looks.bright_air) else 0.0
    if chance(looks.scanned):
        picture = curve(values, generator) * body
    else:
        level = torch.rand(1, parts.shape[1], 1, generator=generator)
        grain = torch.randn(1, parts.shape[1], 1, generator=generator) * uniform(0, 0.4)
        picture = (parts * shown * (level + grain * (values - 0.5))).sum(1, keepdim=True)
    if chance(looks.lesions):
        where = canvas[:, torch.randint(canvas.shape[1], (), generator=generator)] * 0.5
        spot = torch.exp(-((canvas - where) / uniform(0.04, 0.2)).square().sum(-1, keepdim=True) ** 2).mT
        picture = picture + spot * (uniform(0, 1) - picture)
        picture = picture * body if chance(0.8) else picture
    picture = picture + air * (1 - body)
    if chance(looks.inverted):
        kind = uniform(0, 3)  # the body, with a rim of the air about it, or all
        rim = smooth(body.reshape(1, 1, *shape), [uniform(0.5, 2.0)] * len(shape)).reshape(body.shape)
        within = body if kind < 1 else (4 * rim).clamp(0, 1) if kind < 2 else torch.ones_like(body)
        picture = within * (float(picture.max()) - picture)
    picture = picture.reshape(1, 1, *shape)
    picture = picture * smooth_factor(shape, looks.bias * uniform(0, 1), generator)
    if chance(looks.blurred):
        picture = smooth(picture, [uniform(0, looks.blur) for _ in shape])
    picture = picture + uniform(0, looks.noise) * float(picture.std() * 3) * torch.randn(picture.shape, generator=generator)
    for share, least, most, away in ((looks.framed, 0.7, 1.2, 0.06), (looks.cropped, 0.5, 1.5, 0.1)):
        if chance(share):
            seen = _box(canvas, shape, least, most, away, generator)
            beyond = uniform(0, 1) * float(picture.amax()) if chance(0.3) else 0.0
            picture = picture * seen + beyond * (1 - seen)
    low, high = picture.amin(), torch.quantile(picture.flatten()[::3], uniform(0.985, 1.0))
    return ((picture - low) / (high - low).clamp_min(1e-4)).clamp(0, 1)


def curve(values: Tensor, generator: torch.Generator, knots: int = 6) -> Tensor:
    """values (N, 1, P) in [0, 1] through a random curve, straight between its knots; half of the curves rise all the way."""
    heights = torch.rand(knots, generator=generator)
    if float(torch.rand((), generator=generator)) < 0.5:
        heights = heights.sort().values
    place = values.clamp(0, 1) * (knots - 1)
    low = place.floor().clamp(max=knots - 2).long()
    return torch.lerp(heights[low], heights[low + 1], place - low)


def smooth_factor(shape: tuple[int, ...], size: float, generator: torch.Generator, cells: int = 4) -> Tensor:
    """(1, 1, *shape): a smooth factor whose logarithm has the standard deviation `size`, as of receiving coils."""
    coarse = size * torch.randn(1, 1, *[cells] * len(shape), generator=generator)
    return F.interpolate(coarse, size=shape, mode=("bilinear", "trilinear")[len(shape) - 2], align_corners=True).exp()


def _box(canvas: Tensor, shape: tuple[int, ...], least: float, most: float, away: float, generator: torch.Generator) -> Tensor:
    """(1, 1, *shape): 1 in a box in any pose, whose half edges are from `least` to `most` and whose middle is `away`, as a rule."""
    d = canvas.shape[-1]
    turn = turned(1, d, math.pi, generator).float()[0] if float(torch.rand((), generator=generator)) < 0.5 else torch.eye(d)
    half = least + (most - least) * torch.rand(d, generator=generator)
    place = away * torch.randn(d, generator=generator).clamp(-2, 2)
    return (((canvas[0] - place) @ turn).abs() < half).all(-1).float().reshape(1, 1, *shape)

