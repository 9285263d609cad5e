"""Anti-aliasing: what a step cannot show is gone, what it can show stays; zone plates, waves and brute force as judges."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from regkit import filters
from regkit.image import Image
from regkit.sampling import How, IndexMap, inside, resample, warp
from regkit.sampling import antialias as aa
from regkit.space import Composite, Grid, Matrix, model
from regkit.stn import SpatialTransformer, unit_grid

from .conftest import between, both, correlation, grid, noise, scans, texture, wave

smoothing = pytest.mark.parametrize("kernel", ["linear", "cubic"])
PLATES = {2: ((192, 256), (48, 64)), 3: ((128, 160, 96), (32, 40, 24))}


class Says(nn.Module):
    """A localisation that says what it was told."""

    def __init__(self, theta):
        super().__init__()
        self.theta = theta

    def forward(self, *images):
        return self.theta


def indices(shape):
    axes = [torch.arange(n, dtype=torch.float64) for n in shape]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).reshape(1, -1, len(shape))


# ----------------------------------------------------------------------------------------------------------- zone plates

def plate(shape):
    """cos(π Σ x² / n): its frequency along each axis grows from 0 in the middle to 0.5 cycles a voxel at the edge."""
    away = indices(shape)[0] - (torch.tensor(shape, dtype=torch.float64) - 1) / 2
    phase = math.pi * (away**2 / torch.tensor(shape)).sum(-1)
    return phase.cos().reshape(1, 1, *shape).float()


def judged(found, raw, way, source, target):
    """dB by which the energy lies below that of `raw` where a frequency along an axis of the target is above Nyquist, and dB of gain
    where all is below half of Nyquist."""
    d, size = len(source), torch.tensor(source, dtype=torch.float64)
    index, half = indices(target), 0.5 * torch.eye(len(source), dtype=torch.float64)
    away = way(index)[0] - (size - 1) / 2
    slope = torch.stack([way(index + h)[0] - way(index - h)[0] for h in half], -1)  # of the source by the target
    frequency = (slope.mT @ (away / size)[..., None])[..., 0]
    ideal = torch.cos(math.pi * (away**2 / size).sum(-1))
    seen = (away.abs() < size / 2 - (8 if d == 2 else 6)).all(-1)
    high, low = seen & (frequency.abs().amax(-1) > 0.5), seen & (frequency.norm(dim=-1) < 0.25)
    found, raw = found.flatten().double(), raw.flatten().double()
    stop = 10 * math.log10(float((found[high] ** 2).mean() / (raw[high] ** 2).mean()))
    return stop, 20 * math.log10(float((found[low] * ideal[low]).sum() / (ideal[low] ** 2).sum()))


def by_resample(image, mapping, target, kernel):
    return [resample(image, IndexMap(mapping), target, How(kernel, antialias=on)) for on in (True, False)]


def by_scale_space(image, mapping, target, kernel):
    return [resample(image, IndexMap(bend=IndexMap(mapping)), target, How(kernel, antialias=on)) for on in (True, False)]


def by_module(image, mapping, target, kernel):
    d = len(target)
    theta = torch.zeros(1, model("rigid").count(d))
    theta[0, d] = math.atan2(mapping[0, 1, 0], mapping[0, 0, 0])
    return [SpatialTransformer(Says(theta), "rigid", size=target, kernel=kernel, antialias=a)(image) for a in ("auto", "none")]


def by_warp(image, mapping, target, kernel):
    here = unit_grid(tuple(image.shape[2:]))
    there = unit_grid(target, here)
    turn = Matrix(mapping @ torch.linalg.inv(there.affine))
    return [warp(Image(image, here), turn, there, kernel=kernel, antialias=a).data for a in ("auto", "none")]


@both
@smoothing
@pytest.mark.parametrize("angle", [0.0, 0.5], ids=["straight", "turned"])
@pytest.mark.parametrize("way", [by_resample, by_scale_space, by_module, by_warp], ids=lambda f: f.__name__)
def test_a_zone_plate_at_a_quarter_keeps_its_middle_and_loses_its_moire(ndim, kernel, angle, way):
    source, target = PLATES[ndim]
    mapping = between(source, target, (4.0, 4.0, 4.0), (angle, 0.0, 0.0))
    stop, gain = judged(*way(plate(source), mapping, target, kernel), IndexMap(mapping), source, target)
    assert stop < -20 and abs(gain) < (1 if ndim == 2 else 1.5)  # along three axes a little is lost three times


@both
@smoothing
def test_a_zone_plate_in_perspective(ndim, kernel):
    source, target = PLATES[ndim]
    tilt, middle = torch.eye(ndim + 1, dtype=torch.float64), torch.eye(ndim + 1, dtype=torch.float64)
    middle[:ndim, ndim] = torch.tensor([(n - 1) / 2 for n in target])
    tilt[ndim, :ndim] = torch.tensor([0.6, -0.4, 0.3])[:ndim] / torch.tensor(target[:ndim])
    mapping = between(source, target, (4.0, 4.0, 4.0), (0.2, 0.0, 0.0)) @ middle @ tilt @ torch.linalg.inv(middle)
    way = IndexMap(mapping, affine=False)
    found = [resample(plate(source), way, target, How(kernel, antialias=on)) for on in (True, False)]
    stop, gain = judged(*found, way, source, target)
    assert stop < -20 and abs(gain) < (1 if ndim == 2 else 1.5)  # along three axes a little is lost three times


@smoothing
@pytest.mark.parametrize("factor", [2.0, 2.5, 4.0, 7.0])
def test_how_much_of_a_wave_is_left(kernel, factor):
    source, target = (480, 7), (int(480 / factor) - 4, 7)
    mapping = between(source, target, (factor, 1.0), shift=0.3)

    def left(frequency):
        """dB, of a wave of so many cycles a step of the target."""
        image = wave(source, 0, factor / frequency)
        found = resample(image, IndexMap(mapping), target, How(kernel, "border"))[0, 0, 6:-6, 3].double()
        phase = 2 * math.pi * frequency * torch.arange(6, target[0] - 6, dtype=torch.float64)
        fitted = torch.linalg.lstsq(torch.stack([phase.cos(), phase.sin()], 1), found[:, None]).solution
        return 20 * math.log10(float(fitted.norm()))

    assert left(1 / 8) > -0.3 and left(1 / 4) > -1.6
    assert left(0.75) < -20 and left(1.2) < -20


# ---------------------------------------------------------------------------------------------------------- thick slices

SLICES = {2: ((90, 120), (70, 15), (1.0, 6.0), (math.pi / 6, 0.0, 0.0)),
          3: ((60, 54, 70), (40, 36, 9), (1.0, 1.0, 6.0), (0.0, math.pi / 6, 0.0))}


def keys(x):
    """The cubic convolution kernel (Keys 1981)."""
    x = np.abs(x)
    return np.where(x < 1, 1.5 * x**3 - 2.5 * x**2 + 1, np.where(x < 2, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2, 0))


@both
def test_oblique_thick_slices_are_parted_into_sub_points(ndim):
    source, target, steps, angles = SLICES[ndim]
    none, maps = (1,) * ndim, [between(source, target, steps, angles),
                               between(source, target, steps),  # along the source's axes filters do
                               between(source, target, (6.0, 6.0, 6.0), angles),  # and where the step is round
                               between(source, target, (0.2, 0.5, 0.7), angles)]
    assert aa.supersampling(torch.cat(maps)) == [(*none[1:], 6), none, none, none]


@both
@pytest.mark.parametrize("by", ["resample", "warp"])
def test_oblique_thick_slices_are_what_brute_force_makes_of_them(ndim, by):
    """48 sub-points through the slice, weighted as the kernel says; and 8 an axis averaged, which is no kernel of ours."""
    source, target, steps, angles = SLICES[ndim]
    mapping, image = between(source, target, steps, angles, shift=0.2), texture(source, sigma=0.8)
    if by == "resample":
        found, raw = by_resample(image, mapping, target, "linear")
    else:
        found, raw = (warp(Image(image, unit_grid(source)), Matrix.identity(ndim), Grid(target, mapping), antialias=a).data
                      for a in ("auto", "none"))

    def at(*counts):
        shape, scale = aa.finer(target, counts, mapping)
        return resample(image, IndexMap(mapping @ scale), shape, How(padding="border", antialias=False))

    within = (..., *[slice(4, -4)] * (ndim - 1), slice(2, -2))
    place = (np.arange(48 * target[-1]) + 0.5) / 48 - 0.5
    weights = keys((np.arange(target[-1])[:, None] - place) * 6 / (1 + filters._WIDER * (6 - filters.SHARP)))
    weights = torch.from_numpy(weights / weights.sum(1, keepdims=True)).float()
    exact = (at(*[1] * (ndim - 1), 48) @ weights.mT)[within]
    miss = [float((v[within] - exact).norm() / exact.norm()) for v in (found, raw)]
    assert miss[0] < 0.03 and miss[1] > 0.5
    mean = (F.avg_pool2d, F.avg_pool3d)[ndim - 2](at(*[8] * ndim), 8)[within]
    assert correlation(found[within], mean) > 0.95 and correlation(raw[within], mean) < 0.85


@both
@smoothing
@pytest.mark.parametrize("padding", ["zeros", "border", "reflection"])
def test_thick_slices_of_a_constant_are_constant_where_they_are_seen(ndim, kernel, padding):
    source, target, steps, angles = SLICES[ndim]
    mapping = between(source, target, steps, angles, shift=11.0)
    found = resample(torch.full((1, 2, *source), 5.0), IndexMap(mapping), target, How(kernel, padding))
    seen = inside(IndexMap(mapping)(indices(target)), source).reshape(1, 1, *target) if padding == "zeros" else torch.ones(1, 1, *target)
    assert padding != "zeros" or 0.5 < float(seen.float().mean()) < 0.95
    torch.testing.assert_close(found, (5.0 * seen).expand_as(found), rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------------------------------------ items, means, no shrink

@both
@smoothing
def test_items_are_smoothed_each_by_its_own_map(ndim, kernel):
    """By filters along the axes, in blocks or not, by sub-points, and not at all: in one batch as alone."""
    source, target = SLICES[ndim][:2]
    angles = SLICES[ndim][3]
    maps = torch.cat([between(source, target, steps, turned) for steps, turned in (
        ((1.0, 1.0, 1.0), angles), (SLICES[ndim][2], angles), ((1.6, 1.2, 1.0), (0.0,) * 3), ((0.5, 0.8, 0.6), angles),
        ((5.0, 4.0, 6.0), (0.0,) * 3), ((4.0, 4.0, 4.0), angles))])
    image = texture(source, n=6, c=2, sigma=0.6)
    whole = resample(image, IndexMap(maps), target, How(kernel))
    single = resample(image[:1], IndexMap(maps), target, How(kernel))
    for i in range(6):
        alone = resample(image[i: i + 1], IndexMap(maps[i: i + 1]), target, How(kernel))
        torch.testing.assert_close(whole[i: i + 1], alone, atol=1e-5, rtol=0)
        other = resample(image[:1], IndexMap(maps[i: i + 1]), target, How(kernel))
        torch.testing.assert_close(single[i: i + 1], other, atol=1e-5, rtol=0)
    sharp = resample(image, IndexMap(maps), target, How(kernel, antialias=False))
    unchanged = [bool(torch.allclose(a, b, atol=1e-5)) for a, b in zip(whole, sharp, strict=True)]
    assert unchanged == [True, False, False, True, False, False]


@both
@smoothing
def test_items_of_curved_maps_are_smoothed_each_by_its_own(ndim, kernel):
    source, target = (40, 52, 30)[:ndim], (14, 19, 9)[:ndim]
    steps = (0.8, 1.05, 0.99 * filters.SHARP, 1.3, 2.0, 3.3)  # up to SHARP nothing is due
    maps = torch.cat([between(source, target, (k,) * 3, (0.2, 0.1, 0.3)) for k in steps])
    image = texture(source, n=len(steps), sigma=0.6)
    whole = resample(image, IndexMap(maps, affine=False), target, How(kernel))
    for i in range(len(steps)):
        alone = resample(image[i: i + 1], IndexMap(maps[i: i + 1], affine=False), target, How(kernel))
        torch.testing.assert_close(whole[i: i + 1], alone, atol=1e-5, rtol=0)


@both
@smoothing
@pytest.mark.parametrize("padding", ["zeros", "border", "reflection"])
def test_nothing_is_smoothed_where_nothing_shrinks(ndim, kernel, padding):
    source, target = (14, 23, 9)[:ndim], (20, 17, 22)[:ndim]
    image = texture(source, sigma=0.6)
    for mapping in (between(source, target, (1.0, 1.0, 1.0), (0.3, 0.2, 0.1)), between(source, target, (0.3, 0.6, 0.9), (0.7, -0.2, 0.4))):
        for way in (IndexMap(mapping), IndexMap(bend=IndexMap(mapping)), IndexMap(mapping, affine=False)):
            found = [resample(image, way, target, How(kernel, padding, on)) for on in (True, False)]
            assert torch.equal(*found)


@both
@smoothing
@pytest.mark.parametrize("curved", [False, True], ids=["affine", "curved"])
def test_the_mean_stays_and_so_does_a_constant(ndim, kernel, curved):
    source, target = (72, 60, 44)[:ndim], (18, 20, 22)[:ndim]
    mapping = between(source, target, (4.0, 3.0, 2.0))
    way = IndexMap(bend=IndexMap(mapping)) if curved else IndexMap(mapping)
    image = 1 + noise(source, dtype=torch.float32).abs()
    assert float(resample(image, way, target, How(kernel)).mean()) == pytest.approx(float(image.mean()), rel=0.01)
    found = resample(torch.full_like(image, 50.0), way, target, How(kernel))
    torch.testing.assert_close(found, torch.full_like(found, 50.0), rtol=1e-5, atol=0)


@both
def test_the_longest_step_of_a_map_is_found_where_it_is(ndim):
    shape = (30, 41, 12)[:ndim]
    mapping = between((50, 60, 40)[:ndim], shape, (3.0, 1.2, 0.7), (0.4, -0.3, 0.2))
    steps = aa.local_steps(IndexMap(mapping), shape, torch.device("cpu"))
    assert steps.shape == (1, 1, *[min(n, 9) for n in shape])
    torch.testing.assert_close(steps, torch.full_like(steps, math.log2(3.0)), atol=1e-3, rtol=0)
    grows = aa.local_steps(lambda i: i**2 / 4, shape, torch.device("cpu"))[0, 0]
    ends = torch.linspace(0, shape[0] - 1, 9, dtype=torch.float64)
    along = grows.flatten(1).amin(1)[1:]
    torch.testing.assert_close(along, (ends[1:] / 2).log2(), atol=1e-2, rtol=0)
    assert bool(aa.local_steps(lambda i: i * 0, shape, torch.device("cpu")).isfinite().all())


@both
def test_a_scale_space_holds_only_the_levels_that_are_read(ndim):
    data, shape = noise((40, 36, 20)[:ndim], dtype=torch.float32), (10, 12, 8)[:ndim]

    def steps(low, high):
        return torch.tensor([low, high], dtype=torch.float64).log2().reshape(1, 1, 2, *[1] * (ndim - 1))

    assert aa.Scales.of(data, steps(0.5, 1.0), shape, "linear") is None
    assert list(aa.Scales.of(data, steps(0.5, 2.0), shape, "linear").levels) == [0, 1, 2]
    assert list(aa.Scales.of(data, steps(2.0, 5.0), shape, "linear").levels) == [2, 3, 4, 5]
    assert list(aa.Scales.of(data, steps(4.0, 4.0), shape, "linear").levels) == [4]


# ------------------------------------------------------------------------------------------------------------------ warp

@both
@smoothing
@pytest.mark.parametrize(("period", "factor"), [(3.0, 4), (2.4, 2.5), (7.0, 9)])
def test_patterns_above_the_outputs_nyquist_vanish(ndim, kernel, period, factor):
    for axis in range(ndim):
        shape = tuple(90 if a == axis else 6 for a in range(ndim))
        image = Image(wave(shape, axis, period), grid(shape))
        spacing = tuple(factor if a == axis else 1.0 for a in range(3))
        coarse = grid(tuple(int(n / s) - 2 if s > 1 else n for n, s in zip(shape, spacing, strict=False)), spacing,
                      centre=image.grid.centre[0].tolist())
        raw = warp(image, Matrix.identity(ndim), coarse, kernel=kernel, antialias="none").data
        clean = warp(image, Matrix.identity(ndim), coarse, kernel=kernel).data
        inner = [slice(None)] * (ndim + 2)
        inner[axis + 2] = slice(1, -1)
        inner = tuple(inner)
        assert float(raw[inner].std()) > 0.1  # it would alias
        assert 20 * math.log10(float(raw[inner].std()) / max(float(clean[inner].std()), 1e-12)) > 20


@both
@smoothing
def test_slow_structures_and_the_mean_survive(ndim, kernel):
    shape = (96, 64, 40)[:ndim]
    period = 48.0
    slow = 3 + sum(wave(shape, axis, period) for axis in range(ndim))
    image = Image(slow, grid(shape))
    small = image.grid.shrink((4, 3, 2)[:ndim])
    found = warp(image, Matrix.identity(ndim), small, kernel=kernel)
    index = image.grid.to_index(small.points())[0] + 0.5
    expected = 3 + torch.cos(2 * math.pi * index / period).sum(-1).reshape(small.shape)
    inner = (..., *[slice(2, -2)] * ndim)
    assert float((found.data[0, 0] - expected)[inner].abs().max()) < 0.05 * ndim
    rough = Image(1 + noise(shape, dtype=torch.float32).abs(), grid(shape))
    assert float(warp(rough, Matrix.identity(ndim), small, kernel=kernel).data.mean()) == pytest.approx(float(rough.data.mean()), rel=0.01)


@both
@smoothing
@settings(deadline=None, max_examples=8)
@given(factor=st.floats(1.0, 9.0), shift=st.floats(-2, 2), angle=st.floats(-0.5, 0.5))
def test_a_constant_stays_constant_wherever_the_image_is_seen(ndim, kernel, factor, shift, angle):
    """Also in the last voxels, which fill no block of the anti-aliasing."""
    shape = (23, 17, 11)[:ndim]
    image = Image(torch.full((1, 1, *shape), 50.0), grid(shape, (1.0, 1.5, 2.0)))
    coarse = grid((5, 6, 4)[:ndim], (factor, factor, factor), (angle, 0.0, 0.0), centre=(shift, shift, shift))
    for transform in (Matrix.identity(ndim), Composite((Matrix.identity(ndim),))):
        found = warp(image, transform, coarse, kernel=kernel, fill=-1).data.flatten()
        seen = inside(image.grid.to_index(coarse.points()).float(), shape)[0]
        torch.testing.assert_close(found[seen], torch.full_like(found[seen], 50.0), rtol=1e-4, atol=0)
        assert (found[~seen] == -1).all()


@both
def test_smoothing_touches_nothing_where_nothing_shrinks(ndim):
    image, _, _ = scans(ndim)
    fine = grid((20, 22, 24)[:ndim], (0.5, 0.5, 0.5))
    near = Matrix.shift(image.grid.centre)
    torch.testing.assert_close(warp(image, near, fine).data, warp(image, near, fine, antialias="none").data, atol=0, rtol=0)
    coarse = grid((5, 5, 5)[:ndim], (4.0, 4.0, 4.0))
    assert not torch.equal(warp(image, near, coarse).data, warp(image, near, coarse, antialias="none").data)


@both
def test_labels_are_never_smoothed(ndim):
    image, transform, fixed = scans(ndim)
    labels = image.with_data((image.data / 20).round())
    coarse = fixed.shrink((3,) * ndim)
    assert torch.equal(warp(labels, transform, coarse, kernel="nearest").data,
                       warp(labels, transform, coarse, kernel="nearest", antialias="none").data)


@both
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_voxels_are_computed_in_float32(ndim, dtype):
    image, transform, fixed = scans(ndim)
    data = image.data.to(dtype)
    for coarse in (fixed, fixed.shrink((3,) * ndim)):
        for kernel in ("linear", "cubic"):
            found = warp(image.with_data(data), transform, coarse, kernel=kernel).data
            assert found.dtype == dtype
            assert torch.equal(found, warp(image.with_data(data.float()), transform, coarse, kernel=kernel).data.to(dtype))
