"""Levels: both scans on isotropic canvases of the same mm, so that every window has the same support in both and nothing
depends on how a scan is stored."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from regkit.filters import along, along_first, gaussians
from regkit.image import Image
from regkit.registration.pair import Pair
from regkit.registration.run import Run
from regkit.sampling import inside, sample, shrinkage
from regkit.similarity import Similarity
from regkit.space import Grid

_COARSE, _WIDEST = 20, 60  # voxels across the smaller scan at the coarsest level, 10 mm for a human head; and across the larger at most:
# a scan that is ten times as large by a wrong header would take hours
MOST = {2: 600_000, 3: 2_500_000}  # voxels of a canvas
_LARGE = 1_000_000  # voxels of a canvas from which on features are kept only as long as they are needed
SAME = 0.01  # of a scan's range of intensities: what differs from the background by less is background


@dataclass(frozen=True, eq=False)
class Smoothed:
    """A scan ready to be read at steps of about one size: anti-aliased voxels, with their weights where not all count.

    stack: (1, 1 or 2, *S / blocks), values times weights, and weights if `weighted`. grid: before blocks were averaged.
    hidden: a value that counts as not seen, see `background`."""

    stack: Tensor
    weighted: bool
    grid: Grid
    blocks: tuple[int, ...]
    hidden: float | None = None

    @staticmethod
    def of(data: Tensor, weight: Tensor | None, grid: Grid, factors: list[float], window: tuple[float, float] | None = None) -> Smoothed:
        """data, weight: (1, 1, *S), of any dtype, weight None if all ones. factors: voxels a step, by axis. window: what becomes 0 and 1
        first, what lies beyond is clamped."""

        def stack(part: slice) -> Tensor:
            values = data[:, :, part]
            if window is not None:
                values = torch.sub(values, window[0]).div_(window[1] - window[0]).clamp_(0, 1)
            if weight is None:
                return values
            share = weight[:, :, part].to(values)
            return torch.cat([values * share, share], 1)

        blurred, blocks = _blurred(stack, tuple(data.shape[2:]), factors)
        return Smoothed(blurred, weight is not None, grid, blocks)

    def read(self, target: Grid, world: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Values and weights (1, 1, *target) by normalised convolution; world: (1, D+1, D+1) map of target to scan in mm."""
        mapping = self.grid.inverse @ target.affine if world is None else self.grid.inverse @ world @ target.affine
        d, device = target.ndim, mapping.device
        blocks = torch.tensor(self.blocks, device=device)
        where = mapping[:, :d, d].reshape(d, *[1] * d)
        for axis, n in enumerate(target.shape):  # a sum of ramps: exact in float64, without a point list
            ramp = torch.arange(n, dtype=torch.float64, device=device) * mapping[0, :d, axis, None]
            where = where + ramp.reshape(d, *[n if a == axis else 1 for a in range(d)])
        where = where.float().flatten(1).mT[None]
        seen = inside(where, self.grid.shape).float()[:, None]
        values = sample(self.stack, (where - (blocks - 1) / 2) / blocks)
        if self.weighted:
            share = values[:, 1:]
            values, seen = values[:, :1] / share.clamp_min(1e-3), seen * share * (share > 0.05)
        if self.hidden is not None:
            seen = seen * ((values - self.hidden).abs() > SAME)
        return values.reshape(1, 1, *target.shape), seen.reshape(1, 1, *target.shape)


def _blurred(read: Callable[[slice], Tensor], shape: tuple[int, ...], factors: list[float]) -> tuple[Tensor, tuple[int, ...]]:
    """Data (N, C, *S), read by slabs of their first spatial axis, smoothed for reading at steps of `factors` voxels an axis, and the
    blocks of voxels it is kept for.

    By the Gaussian that leaves two voxels of width k the blur one voxel has: σ² = (k² - 1) / (8 ln 2) (Cardoso 2015). The sampler's
    own filter is sharper and has negative lobes: there weights would become negative, and sharp edges draw less from afar. It is
    computed at no more places than the step needs: one in each block of half a step."""
    blocks = tuple(max(1, min(int(k / 2), n // 2)) for k, n in zip(factors, shape, strict=True))
    sigma = [math.sqrt((k * k - 1) / (8 * math.log(2))) if k > 1.01 else 0.0 for k in factors]
    first, *others = gaussians(shape, sigma, blocks)
    data = read(slice(None)) if first is None else along_first(read, first)
    return along(data, [None, *others]), blocks


@dataclass(frozen=True, eq=False)
class Canvas:
    """A scan at one level: values and weights (1, 1, *S) on an isotropic grid; weight 0 where nothing was seen.

    source: what it was read from, for reading it in another pose without interpolating twice.
    background: the scan's constant background as a value of `data`, where there is one. made: see `features_of`."""

    data: Tensor
    weight: Tensor
    grid: Grid
    source: Smoothed
    background: float | None = None
    made: dict[str, Tensor] = field(default_factory=dict, repr=False)

    @property
    def mm(self) -> float:
        return float(self.grid.spacing[0, 0])


def features_of(canvas: Canvas, measure: Similarity) -> Tensor:
    """A measure's features (1, F, *S) in the canvas' own frame; they are kept, for many poses are looked at, see `forget`."""
    found = canvas.made.get(measure.name)
    if found is None:
        found = made_of(canvas.data, canvas.weight, measure)
        canvas.made[measure.name] = found
    return found


def forget(canvas: Canvas) -> None:
    """Free the features of a canvas that is large."""
    if canvas.data.numel() > _LARGE:
        canvas.made.clear()


def made_of(data: Tensor, weight: Tensor, measure: Similarity) -> Tensor:
    """A measure's features (1, F, *S) of values and weights (1, 1, *S); where all count alike, weights need not be smoothed."""
    assert measure.features is not None
    return measure.features(data, None if bool((weight == 1).all()) else weight)


def without_background(canvas: Canvas) -> Canvas:
    """The canvas with no weight where nothing but the constant background is."""
    if canvas.background is None:
        return canvas
    weight = canvas.weight * ((canvas.data - canvas.background).abs() > SAME)
    return replace(canvas, weight=weight, source=replace(canvas.source, hidden=canvas.background), made={})


def bounds(data: Tensor, weight: Tensor | None) -> tuple[float, float]:
    """The 0.2 and 99.8 percentiles of what counts, or its ends where those are one value."""
    values = data[weight > 0] if weight is not None else data
    values = values.flatten()[:: max(1, values.numel() // 200_000)].sort().values
    low, high = float(values[int(0.002 * (len(values) - 1))]), float(values[int(0.998 * (len(values) - 1))])
    return (low, high) if high > low else (float(data.min()), float(data.max()))


def extent(grid: Grid) -> float:
    """mm: the geometric mean of the grid's edges."""
    edges = grid.spacing[0] * torch.tensor(grid.shape, dtype=torch.float64, device=grid.device)
    return float(edges.log().mean().exp())


def choose_levels(pair: Pair) -> tuple[float, ...]:
    """Working resolutions in mm, see `levels_of`."""
    return levels_of(pair.fixed.grid, pair.moving.grid)


def levels_of(fixed: Grid, moving: Grid) -> tuple[float, ...]:
    """Working resolutions in mm: about 20 voxels across the smaller scan, halved as far as the scans resolve and time allows."""
    small, large = sorted((extent(fixed), extent(moving)))
    coarse = max(small / _COARSE, large / _WIDEST)
    finest_voxel = max(float(fixed.spacing.min()), float(moving.spacing.min()))
    levels = [max(coarse, finest_voxel)]
    while len(levels) < (3 if fixed.ndim == 3 else 5) and levels[-1] / 2 > 0.6 * finest_voxel:
        levels.append(levels[-1] / 2)
    return tuple(levels)


def fitting(grid: Grid, mm: float, most: int) -> float:
    """`mm`, or the finest size at which the canvas of this grid has at most so many voxels."""
    corners = grid.corners()[0]
    volume = float((corners.amax(0) - corners.amin(0)).prod())
    return max(mm, (volume / most) ** (1 / grid.ndim))


def build(pair: Pair, levels: tuple[float, ...], *, literal: bool = False, run: Run = map,
          most: int | None = None) -> list[tuple[Canvas, Canvas]]:
    """(fixed, moving) canvases for each level, coarse to fine; a level too fine for memory is made coarser in both scans.
    The scans are independent jobs for `run`. most: voxels of a canvas, where memory allows fewer than MOST; levels that become one by
    it are one.

    Intensities are made robust: what `bounds` gives becomes 0 … 1 and what lies beyond is clamped, by each scan's own
    bounds or, `literal`, by common ones, for measures that compare intensities as they are."""
    bound = MOST[pair.ndim] if most is None else most
    levels = tuple(max(fitting(scan.grid, mm, bound) for scan in (pair.fixed, pair.moving)) for mm in levels)
    levels = levels if bound == MOST[pair.ndim] else tuple(dict.fromkeys(levels))
    scans = ((pair.fixed, pair.fixed_weight, pair.fixed_background), (pair.moving, pair.moving_weight, pair.moving_background))
    limits = [bounds(image.data, weight) for image, weight, _ in scans]
    if literal:
        limits = [(min(low for low, _ in limits), max(high for _, high in limits))] * 2

    def canvases(job: tuple[Image, Tensor | None, float | None, tuple[float, float]]) -> list[Canvas]:
        image, weight, constant, (low, high) = job
        constant = None if constant is None else min(max((constant - low) / (high - low), 0.0), 1.0)
        data, grid, made, window = image.data, image.grid, [], (low, high)
        for mm in sorted(levels):
            target = image.grid.canonical(mm)
            source = Smoothed.of(data, weight, grid, shrinkage(grid.inverse @ target.affine), window)
            values, seen = source.read(target)
            made.insert(0, Canvas(values, seen, target, source, constant))
            if mm == min(levels):  # coarser levels are made from the finest: the same scan, less work
                data, weight, grid, window = values, seen, target, None
        return made

    return list(zip(*run(canvases, [(*scan, bound) for scan, bound in zip(scans, limits, strict=True)]), strict=True))
