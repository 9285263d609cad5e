"""The sampler against scipy, SimpleITK and brute force; no axis is ever taken for another."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import scipy.ndimage as ndi
import SimpleITK as sitk
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from regkit import sampling
from regkit.errors import GeometryError, OptionError
from regkit.filters import smooth
from regkit.image import Image
from regkit.sampling import inside, prepare, sample, warp
from regkit.space import Composite, Frame, Grid, Matrix, model

both = pytest.mark.parametrize("ndim", [2, 3], ids=["2D", "3D"])
SHAPES = {2: (14, 23), 3: (14, 23, 9)}
KERNELS = ["linear", "nearest", "cubic"]


def noise(shape, seed=0, n=1, c=1, dtype=torch.float64):
    return torch.randn(n, c, *shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def rotation(ndim, angles):
    m = model("rigid")
    theta = torch.zeros(1, m.count(ndim), dtype=torch.float64)
    theta[0, ndim:] = torch.tensor(angles[: m.count(ndim) - ndim])
    return m.exp(theta, ndim)[0, :ndim, :ndim]


def grid(shape, spacing=(1.0, 1.0, 1.0), angles=(0.0, 0.0, 0.0), flips=(1, 1, 1), centre=(0.0, 0.0, 0.0)):
    d = len(shape)
    a = torch.eye(d + 1, dtype=torch.float64)
    a[:d, :d] = rotation(d, angles) * torch.tensor([s * f for s, f in zip(spacing, flips, strict=True)][:d])
    middle = torch.tensor([(n - 1) / 2 for n in shape], dtype=torch.float64)
    a[:d, d] = torch.tensor(centre[:d], dtype=torch.float64) - a[:d, :d] @ middle
    return Grid(shape, a)


def profile(values, axis, shape):
    """(1, 1, *shape): values along one axis, constant along the others."""
    return values.reshape([-1 if a == axis else 1 for a in range(len(shape))]).expand(shape)[None, None].contiguous()


def points_in(shape, count, seed=1, n=1, reach=-0.5):
    """Random index points within `reach` voxels beyond the outer centres."""
    draw = torch.rand(n, count, len(shape), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    size = torch.tensor(shape, dtype=torch.float64)
    return draw * (size - 1 + 2 * reach) - reach


# ---------------------------------------------------------------------------------------------------------------- sample

@both
@pytest.mark.parametrize("kernel", KERNELS)
def test_voxel_centres_give_the_voxels(ndim, kernel):
    data = noise(SHAPES[ndim], n=2, c=3, dtype=torch.float32)
    index = grid(SHAPES[ndim]).index_points()
    torch.testing.assert_close(sample(prepare(data, kernel), index, kernel), data.flatten(2), atol=3e-5, rtol=0)


@both
@pytest.mark.parametrize("kernel", ["linear", "cubic"])
def test_a_ramp_along_one_axis_is_read_along_that_axis(ndim, kernel):
    shape = SHAPES[ndim]
    index = points_in(shape, 200, reach=-3.0)  # away from the ends, where a spline mirrors the ramp
    for axis in range(ndim):
        ramp = profile(torch.arange(shape[axis], dtype=torch.float64), axis, shape)
        found = sample(prepare(ramp, kernel), index, kernel)
        torch.testing.assert_close(found[0, 0], index[0, :, axis], atol=2e-2 if kernel == "cubic" else 1e-9, rtol=0)


@both
@pytest.mark.parametrize(("kernel", "order", "mode", "reach"), [
    ("linear", 1, "nearest", 0.5), ("cubic", 3, "mirror", 0.499), ("nearest", 0, "nearest", 0.499)])
def test_values_are_scipys(ndim, kernel, order, mode, reach):
    data = noise(SHAPES[ndim], n=2, c=2)
    index = points_in(SHAPES[ndim], 500, n=2, reach=reach)
    found = sample(prepare(data, kernel), index, kernel)
    assert found.shape == (2, 2, 500)
    for n, c in itertools.product(range(2), range(2)):
        expected = ndi.map_coordinates(data[n, c].numpy(), index[n].T.numpy(), order=order, mode=mode)
        np.testing.assert_allclose(found[n, c].numpy(), expected, atol=1e-5)


@both
@pytest.mark.parametrize("kernel", ["linear", "cubic"])
def test_beyond_the_field_of_view_the_outermost_value_holds(ndim, kernel):
    data = prepare(noise(SHAPES[ndim]), kernel)
    index = points_in(SHAPES[ndim], 100, reach=20.0)
    edge = torch.minimum(index.clamp_min(-0.5), torch.tensor(SHAPES[ndim]) - 0.5)
    assert not bool(inside(index, SHAPES[ndim]).all())
    torch.testing.assert_close(sample(data, index, kernel), sample(data, edge, kernel))


@pytest.mark.parametrize("shape", [(1, 6), (2, 6), (3, 1), (1, 1), (1, 5, 2), (4, 1, 1)], ids=str)
@pytest.mark.parametrize("kernel", KERNELS)
def test_axes_of_one_or_two_voxels(shape, kernel):
    data = noise(shape)
    index = points_in(shape, 60, reach=0.499)
    order, mode = {"linear": (1, "nearest"), "cubic": (3, "mirror"), "nearest": (0, "nearest")}[kernel]
    found = sample(prepare(data, kernel), index, kernel)[0, 0]
    wide = data[0, 0].numpy()
    place = index[0].clone()
    for axis, n in enumerate(shape):  # scipy has no mirror for a single voxel: repeat it
        if n == 1:
            wide = wide.repeat(9, axis)
            place[:, axis] = 4.0
    np.testing.assert_allclose(found.numpy(), ndi.map_coordinates(wide, place.T.numpy(), order=order, mode=mode), atol=1e-5)


@both
@pytest.mark.parametrize("kernel", ["linear", "cubic"])
def test_gradients_in_data_and_index(ndim, kernel):
    shape = (4, 6, 3)[:ndim]
    data = noise(shape, c=2).requires_grad_()
    index = (points_in(shape, 4, seed=3, n=2, reach=-0.05)).requires_grad_()
    assert torch.autograd.gradcheck(lambda d, i: sample(prepare(d, kernel), i, kernel), (data, index))


@both
@pytest.mark.parametrize("kernel", KERNELS)
def test_one_image_at_many_places_and_many_images_at_one(ndim, kernel):
    data, index = noise(SHAPES[ndim], n=3, c=2), points_in(SHAPES[ndim], 50, n=3)
    ready = prepare(data, kernel)
    for i in range(3):
        alone = sample(ready[i: i + 1], index[i: i + 1], kernel)
        torch.testing.assert_close(sample(ready, index, kernel)[i: i + 1], alone)
        torch.testing.assert_close(sample(ready[i: i + 1], index, kernel)[i: i + 1], alone)
        torch.testing.assert_close(sample(ready, index[i: i + 1], kernel)[i: i + 1], alone)


@both
@pytest.mark.parametrize("kernel", KERNELS)
def test_threads_and_odd_counts_change_nothing(ndim, kernel):
    data = prepare(noise(SHAPES[ndim], c=2, dtype=torch.float32), kernel)
    index = points_in(SHAPES[ndim], 5003).float()  # a prime: no number of threads divides it
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(sample(data, index, kernel))
    finally:
        torch.set_num_threads(before)
    results.append(torch.cat([sample(data, part, kernel) for part in index.split(777, 1)], -1))
    assert all(torch.equal(results[0], other) for other in results[1:])


@both
def test_nearest_keeps_any_dtype_and_rounds_halves_up(ndim):
    shape = SHAPES[ndim]
    for dtype in (torch.uint8, torch.int16, torch.int64, torch.bool, torch.float16):
        data = (noise(shape) * 40).to(dtype)
        assert sample(data, points_in(shape, 5), "nearest").dtype == dtype
    ramp = profile(torch.arange(shape[0]), 0, shape)
    index = torch.zeros(1, 4, ndim)
    index[0, :, 0] = torch.tensor([-0.5, 0.49, 0.5, 1.5])
    assert sample(ramp, index, "nearest").flatten().tolist() == [0, 0, 1, 2]


@both
def test_inside_includes_the_outer_edges(ndim):
    shape = SHAPES[ndim]
    for axis in range(ndim):
        index = torch.zeros(1, 4, ndim)
        index[0, :, axis] = torch.tensor([-0.5, -0.5001, shape[axis] - 0.5, shape[axis] - 0.4999])
        assert inside(index, shape)[0].tolist() == [True, False, True, False]


def test_an_unknown_kernel_is_told_the_nearest():
    with pytest.raises(OptionError, match="nearest: linear"):
        sample(noise((4, 4)), points_in((4, 4), 2), "linaer")
    image = Image(noise((4, 4)), grid((4, 4)))
    with pytest.raises(OptionError, match=r"interpolation: 'cubik'.*nearest: cubic"):
        warp(image, Matrix.identity(2), image.grid, kernel="cubik")


# ------------------------------------------------------------------------------------------------------------------ warp

def to_sitk(image):
    """World as it stands: both libraries get the same numbers, so no handedness enters."""
    d = image.ndim
    out = sitk.GetImageFromArray(image.data[0, 0].permute(*reversed(range(d))).contiguous().numpy())
    spacing = image.grid.spacing[0]
    out.SetSpacing(spacing.tolist())
    out.SetDirection((image.grid.affine[0, :d, :d] / spacing).flatten().tolist())
    out.SetOrigin(image.grid.affine[0, :d, d].tolist())
    return out


def scans(ndim, dtype=torch.float32):
    """A texture on an oblique, anisotropic, mirrored grid; another such grid; an affine map between their worlds."""
    moving = grid((15, 24, 11)[:ndim], (1.5, 0.8, 2.4), (0.3, -0.2, 0.1), (1, -1, 1), (12.0, -7.0, 3.0))
    fixed = grid((21, 12, 14)[:ndim], (0.9, 1.7, 1.2), (-0.2, 0.5, 0.3), (-1, 1, 1), (-4.0, 9.0, 1.0))
    image = Image((100 * smooth(noise(moving.shape, seed=4), [0.7] * ndim)).to(dtype), moving)
    m = torch.eye(ndim + 1, dtype=torch.float64)
    m[:ndim, :ndim] = rotation(ndim, (0.4, -0.3, 0.2)) * torch.tensor([1.1, 0.9, 1.05])[:ndim]
    m[:ndim, ndim] = moving.centre[0] - m[:ndim, :ndim] @ fixed.centre[0] + torch.tensor([1.3, -0.6, 0.4])[:ndim]
    return image, Matrix(m), fixed


def resample_by_sitk(image, transform, fixed, interpolator, fill):
    d = image.ndim
    reference = to_sitk(Image(torch.zeros(1, 1, *fixed.shape), fixed))
    way = sitk.AffineTransform(d)
    way.SetMatrix(transform.matrix[0, :d, :d].flatten().tolist())
    way.SetTranslation(transform.matrix[0, :d, d].tolist())
    out = sitk.Resample(to_sitk(image), reference, way, interpolator, fill)
    return torch.from_numpy(sitk.GetArrayFromImage(out)).permute(*reversed(range(d)))


@both
@pytest.mark.parametrize(("kernel", "interpolator"), [
    ("linear", sitk.sitkLinear), ("cubic", sitk.sitkBSpline), ("nearest", sitk.sitkNearestNeighbor)])
def test_warp_is_simpleitks_resample(ndim, kernel, interpolator):
    image, transform, fixed = scans(ndim)
    expected = resample_by_sitk(image, transform, fixed, interpolator, -30.0)
    found = warp(image, transform, fixed, kernel=kernel, fill=-30.0, smoothing=False)
    scale = float(image.data.max() - image.data.min())
    assert 0.4 < float((expected != -30).float().mean()) < 0.99  # much is seen, and some is outside
    assert float((found.data[0, 0] - expected).abs().max()) < 1e-4 * scale
    assert found.grid is fixed


@both
@pytest.mark.parametrize("kernel", ["linear", "cubic", "nearest"])
def test_warp_of_integers_is_simpleitks_rounded(ndim, kernel):
    image, transform, fixed = scans(ndim)
    exact = warp(image.with_data(image.data.round()), transform, fixed, kernel=kernel, smoothing=False).data
    found = warp(image.with_data(image.data.round().to(torch.int16)), transform, fixed, kernel=kernel, smoothing=False).data
    assert found.dtype == torch.int16
    assert torch.equal(found, exact.round().to(torch.int16))


@both
def test_cubic_overshoot_is_kept_in_the_range_of_integers(ndim):
    shape = (12, 16, 10)[:ndim]
    step = torch.zeros(1, 1, *shape, dtype=torch.uint8)
    step[:, :, 6:] = 255
    image, shifted = Image(step, grid(shape)), Matrix.shift(torch.full((1, ndim), 0.4, dtype=torch.float64))
    loose = warp(image.with_data(step.float()), shifted, image.grid, kernel="cubic").data
    assert float(loose.max()) > 260 and float(loose.min()) < -5
    found = warp(image, shifted, image.grid, kernel="cubic").data
    assert found.dtype == torch.uint8
    assert torch.equal(found, loose.round().clamp(0, 255).to(torch.uint8))


@both
@pytest.mark.parametrize("kernel", ["linear", "cubic"])
def test_warp_of_masks_is_half_or_more(ndim, kernel):
    image, transform, fixed = scans(ndim)
    mask = image.data > 0
    share = warp(image.with_data(mask.float()), transform, fixed, kernel=kernel, smoothing=False).data
    found = warp(image.with_data(mask), transform, fixed, kernel=kernel, smoothing=False).data
    assert found.dtype == torch.bool and torch.equal(found, share >= 0.5)


@both
@pytest.mark.parametrize("kernel", sampling.KERNELS)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.float32, torch.float64], ids=str)
def test_an_identity_returns_the_very_voxels(ndim, kernel, dtype):
    here = grid((9, 7, 5)[:ndim], (0.7, 1.1, 3.0), (0.4, 0.1, -0.8), (1, -1, 1), (99.0, 3.0, -44.0))
    image = Image((1e3 * noise(here.shape)).abs().to(dtype), here)
    turn = Matrix(torch.block_diag(rotation(ndim, (0.3, 0.2, 0.1)), torch.ones(1, 1, dtype=torch.float64)))
    there = Grid(here.shape, (turn.matrix @ here.affine)[0])
    assert torch.equal(warp(image, Matrix.identity(ndim), here, kernel=kernel).data, image.data)
    found = warp(image, turn.inverse(), there, kernel=kernel)  # the same voxels, told in another world
    assert torch.equal(found.data, image.data) and found.grid is there
    assert not torch.equal(warp(image, turn.inverse(), here, kernel=kernel).data, image.data)


@both
def test_every_map_of_a_batch_gives_an_item_even_the_identity(ndim):
    image, transform, fixed = scans(ndim)
    found = warp(image, Matrix(transform.matrix.repeat(3, 1, 1)), fixed)
    assert found.data.shape == (3, 1, *fixed.shape)
    same = warp(image, Matrix(torch.eye(ndim + 1, dtype=torch.float64).repeat(3, 1, 1)), image.grid)
    assert torch.equal(same.data, image.data.expand(3, *image.data.shape[1:]))


@both
@pytest.mark.parametrize("kernel", sampling.KERNELS)
@pytest.mark.parametrize("smoothing", [True, False])
def test_channels_and_batch_items_are_independent(ndim, kernel, smoothing):
    """One item that is shrunk, and so smoothed, leaves the others sharp."""
    image, transform, fixed = scans(ndim)
    wide = model("similarity")
    theta = torch.zeros(1, wide.count(ndim), dtype=torch.float64)
    theta[0, -1] = 0.8
    data = torch.cat([image.data, noise(image.grid.shape, 7, dtype=torch.float32)], 1)
    data = torch.cat([data, 3 + noise(image.grid.shape, 8, c=2, dtype=torch.float32)]).mul(5).round()
    maps = Matrix(torch.cat([transform.matrix, Frame.of(image.grid).world(wide.exp(theta, ndim)) @ transform.matrix]))
    found = warp(image.with_data(data), maps, fixed, kernel=kernel, smoothing=smoothing).data
    for n, c in itertools.product(range(2), range(2)):
        alone = warp(image.with_data(data[n: n + 1, c: c + 1]), Matrix(maps.matrix[n]), fixed, kernel=kernel,
                     smoothing=smoothing).data
        torch.testing.assert_close(found[n: n + 1, c: c + 1], alone)


@both
@pytest.mark.parametrize("kernel", sampling.KERNELS)
@pytest.mark.parametrize("smoothing", [True, False])
def test_small_chunks_give_the_same(ndim, kernel, smoothing, monkeypatch):
    image, transform, fixed = scans(ndim)
    fixed = fixed.shrink((2,) * ndim)
    image = image.with_data((image.data / 20).round())
    ways = (transform, Composite((transform,)))
    whole = [warp(image, t, fixed, kernel=kernel, fill=3, smoothing=smoothing).data for t in ways]
    for chunk in (1, 37):
        monkeypatch.setattr(sampling, "_CHUNK", chunk)
        for t, before in zip(ways, whole, strict=True):
            torch.testing.assert_close(warp(image, t, fixed, kernel=kernel, fill=3, smoothing=smoothing).data, before,
                                       atol=1e-5, rtol=1e-5)


@both
@pytest.mark.parametrize("kernel", sampling.KERNELS)
@pytest.mark.parametrize("shrink", [1, 3])
def test_a_transform_of_another_kind_is_treated_like_its_matrix(ndim, kernel, shrink):
    image, transform, fixed = scans(ndim)
    image = image.with_data((image.data / 10).round())
    fixed = fixed.shrink((shrink,) * ndim)
    expected = warp(image, transform, fixed, kernel=kernel, fill=-7).data
    found = warp(image, Composite((transform,)), fixed, kernel=kernel, fill=-7).data
    same = (found - expected).abs() < 1e-3
    assert float(same.float().mean()) > (1 - 1e-9 if kernel in ("linear", "cubic") else 0.99)  # rounding may turn a tie


@both
def test_a_projective_matrix_divides(ndim):
    image, transform, fixed = scans(ndim)
    m = transform.matrix.clone()
    m[:, ndim, :ndim] = torch.tensor([0.01, -0.006, 0.004])[:ndim]
    found = warp(image, Matrix(m), fixed, smoothing=False).data
    index = image.grid.to_index(Matrix(m)(fixed.points())).float()
    expected = sample(image.data, index) * inside(index, image.grid.shape)[:, None]
    torch.testing.assert_close(found.flatten(2), expected, atol=1e-3, rtol=0)
    assert (found - warp(image, transform, fixed, smoothing=False).data).abs().max() > 10


@both
def test_fill(ndim):
    image, _, fixed = scans(ndim)
    away = Matrix.shift(torch.full((1, ndim), 1e4, dtype=torch.float64))
    assert (warp(image, away, fixed, fill=-1000).data == -1000).all()
    assert torch.isnan(warp(image, away, fixed, fill=math.nan).data).all()
    for kernel in sampling.KERNELS:
        byte = image.with_data(image.data.abs().clamp(max=255).to(torch.uint8))
        for fill, expected in ((7.0, 7), (2.6, 3), (-1000.0, 0), (1000.0, 255)):
            assert (warp(byte, away, fixed, kernel=kernel, fill=fill).data == expected).all()
        for fill in (math.nan, math.inf):
            with pytest.raises(OptionError, match=r"fill: (nan|inf) does not fit voxels of torch.uint8"):
                warp(byte, away, fixed, kernel=kernel, fill=fill)


@both
def test_mixed_dimensions_are_refused(ndim):
    image, transform, fixed = scans(ndim)
    other = 5 - ndim
    _, wrong, wrong_grid = scans(other)
    for t, g in ((wrong, fixed), (transform, wrong_grid), (wrong, wrong_grid)):
        with pytest.raises(GeometryError, match=rf"warp: a {ndim}D image.*do not go together"):
            warp(image, t, g)


@both
def test_gradients_pass_through_a_warp(ndim):
    image, transform, fixed = scans(ndim)
    data = image.data.clone().requires_grad_()
    weight = noise(fixed.shape, 3, dtype=torch.float32)
    (warp(image.with_data(data), transform, fixed).data * weight).sum().backward()
    step = noise(image.grid.shape, 5, dtype=torch.float32)
    change = (warp(image.with_data(step), transform, fixed).data * weight).sum()  # linear in the voxels
    torch.testing.assert_close((data.grad * step).sum(), change, rtol=1e-4, atol=1e-3)


# ---------------------------------------------------------------------------------------------------------------- labels

@both
def test_nearest_keeps_big_labels(ndim):
    image, transform, fixed = scans(ndim)
    labels = (image.data * 10).round().long() + 2**40 + 1  # float32 ends at 2**24, float64 at 2**53
    found = warp(image.with_data(labels), transform, fixed, kernel="nearest", fill=2**24 + 1).data
    assert set(found.unique().tolist()) <= {*labels.unique().tolist(), 2**24 + 1}
    assert float((found > 2**40).float().mean()) > 0.3
    voted = warp(image.with_data(labels), transform, fixed, kernel="vote").data
    assert set(voted.unique().tolist()) <= {*labels.unique().tolist(), 0}


@both
def test_vote_without_shrinking_moves_whole_voxels_unchanged(ndim):
    image, _, _ = scans(ndim)
    labels = image.with_data((image.data / 20).round().to(torch.int16))
    unit = Image(labels.data, grid(image.grid.shape))
    offset = torch.tensor([[1.0, 2.0, 1.0]], dtype=torch.float64)[:, :ndim]
    found = warp(unit, Matrix.shift(offset), unit.grid, kernel="vote").data
    inner = (..., *[slice(None, n - int(o)) for n, o in zip(unit.grid.shape, offset[0].tolist(), strict=True)])
    moved = (..., *[slice(int(o), None) for o in offset[0].tolist()])
    assert torch.equal(found[inner], labels.data[moved])


@both
@pytest.mark.parametrize("factor", [2, 3, 4])
def test_vote_is_the_commonest_label_of_the_area(ndim, factor):
    shape = tuple(factor * n for n in (5, 7, 4)[:ndim])
    draw = torch.Generator().manual_seed(factor)
    labels = torch.randint(0, 3, (1, 1, *shape), generator=draw) * 1000 + 5
    labels[(..., slice(0, shape[-1] // 2))] = 5  # half of it is one region
    checker = sum(torch.meshgrid(*[torch.arange(n) for n in shape], indexing="ij")) % 2
    labels[:, :, : 2 * factor] = checker[: 2 * factor] * 7
    image = Image(labels, grid(shape))
    small = image.grid.shrink((factor,) * ndim)
    found = warp(image, Matrix.identity(ndim), small, kernel="vote").data[0, 0]
    for block in itertools.product(*map(range, small.shape)):
        members = labels[0, 0][tuple(slice(b * factor, (b + 1) * factor) for b in block)].flatten().tolist()
        assert members.count(int(found[block])) == max(members.count(v) for v in members)


@both
def test_vote_does_not_paint_thin_sheets_thick(ndim):
    """Sheets of one voxel in three, each in the middle of an output voxel."""
    shape = (30, 24, 12)[:ndim]
    labels = torch.zeros(1, 1, *shape, dtype=torch.int64)
    labels[:, :, 1::3] = 9
    image = Image(labels, grid(shape))
    small = image.grid.shrink((3,) * ndim)
    assert (warp(image, Matrix.identity(ndim), small, kernel="nearest").data == 9).all()
    assert (warp(image, Matrix.identity(ndim), small, kernel="vote").data == 0).all()


# --------------------------------------------------------------------------------------------------------- anti-aliasing

def wave(shape, axis, period):
    x = torch.arange(shape[axis], dtype=torch.float32) + 0.5
    return profile(torch.cos(2 * math.pi * x / period), axis, shape)


@both
@pytest.mark.parametrize("kernel", ["linear", "cubic"])
@pytest.mark.parametrize(("period", "factor"), [(3.0, 4), (2.4, 2.5), (7.0, 9)])
def test_patterns_above_the_outputs_nyquist_vanish(ndim, kernel, period, factor):
    for axis in range(ndim):
        shape = tuple(90 if a == axis else 6 for a in range(ndim))
        image = Image(wave(shape, axis, period), grid(shape))
        spacing = tuple(factor if a == axis else 1.0 for a in range(3))
        coarse = grid(tuple(int(n / s) - 2 if s > 1 else n for n, s in zip(shape, spacing, strict=False)), spacing,
                      centre=image.grid.centre[0].tolist())
        raw = warp(image, Matrix.identity(ndim), coarse, kernel=kernel, smoothing=False).data
        clean = warp(image, Matrix.identity(ndim), coarse, kernel=kernel).data
        inner = [slice(None)] * (ndim + 2)
        inner[axis + 2] = slice(1, -1)
        inner = tuple(inner)
        assert float(raw[inner].std()) > 0.1  # it would alias
        assert 20 * math.log10(float(raw[inner].std()) / max(float(clean[inner].std()), 1e-12)) > 20


@both
@pytest.mark.parametrize("kernel", ["linear", "cubic"])
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
    texture = Image(1 + noise(shape, dtype=torch.float32).abs(), grid(shape))
    assert float(warp(texture, Matrix.identity(ndim), small, kernel=kernel).data.mean()) == \
        pytest.approx(float(texture.data.mean()), rel=0.01)


@both
@pytest.mark.parametrize("kernel", ["linear", "cubic"])
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
    torch.testing.assert_close(warp(image, near, fine).data, warp(image, near, fine, smoothing=False).data, atol=0, rtol=0)
    coarse = grid((5, 5, 5)[:ndim], (4.0, 4.0, 4.0))
    assert not torch.equal(warp(image, near, coarse).data, warp(image, near, coarse, smoothing=False).data)


@both
def test_labels_are_never_smoothed(ndim):
    image, transform, fixed = scans(ndim)
    labels = image.with_data((image.data / 20).round())
    coarse = fixed.shrink((3,) * ndim)
    assert torch.equal(warp(labels, transform, coarse, kernel="nearest").data,
                       warp(labels, transform, coarse, kernel="nearest", smoothing=False).data)


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
