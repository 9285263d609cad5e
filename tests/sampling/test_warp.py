"""Images carried onto other grids against SimpleITK and brute force; labels by vote; any fill, dtype and kind of transform."""

from __future__ import annotations

import itertools
import math
import sys

import pytest
import SimpleITK as sitk
import torch

from regkit import sampling
from regkit.errors import GeometryError, OptionError
from regkit.image import Image
from regkit.sampling import inside, sample, warp
from regkit.space import Composite, Frame, Grid, Matrix, SplineModel, model

from .conftest import both, correlation, grid, noise, rotation, scans, texture

WARP = sys.modules["regkit.sampling.warp"]  # the name regkit.sampling.warp is the function


def to_sitk(image):
    """World as it stands: both libraries get the same numbers, so no handedness enters."""
    d = image.ndim
    out = sitk.GetImageFromArray(image.data[0, 0].permute(*reversed(range(d))).contiguous().numpy())
    spacing = image.grid.spacing[0]
    out.SetSpacing(spacing.tolist())
    out.SetDirection((image.grid.affine[0, :d, :d] / spacing).flatten().tolist())
    out.SetOrigin(image.grid.affine[0, :d, d].tolist())
    return out


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
    found = warp(image, transform, fixed, kernel=kernel, fill=-30.0, antialias="none")
    scale = float(image.data.max() - image.data.min())
    assert 0.4 < float((expected != -30).float().mean()) < 0.99  # much is seen, and some is outside
    assert float((found.data[0, 0] - expected).abs().max()) < 1e-4 * scale
    assert found.grid is fixed


@both
@pytest.mark.parametrize("kernel", ["linear", "cubic", "nearest"])
def test_warp_of_integers_is_simpleitks_rounded(ndim, kernel):
    image, transform, fixed = scans(ndim)
    exact = warp(image.with_data(image.data.round()), transform, fixed, kernel=kernel, antialias="none").data
    found = warp(image.with_data(image.data.round().to(torch.int16)), transform, fixed, kernel=kernel, antialias="none").data
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
    share = warp(image.with_data(mask.float()), transform, fixed, kernel=kernel, antialias="none").data
    found = warp(image.with_data(mask), transform, fixed, kernel=kernel, antialias="none").data
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
@pytest.mark.parametrize("antialias", ["auto", "none"])
def test_channels_and_batch_items_are_independent(ndim, kernel, antialias):
    """One item that is shrunk, and so smoothed, leaves the others sharp."""
    image, transform, fixed = scans(ndim)
    wide = model("similarity")
    theta = torch.zeros(1, wide.count(ndim), dtype=torch.float64)
    theta[0, -1] = 0.8
    data = torch.cat([image.data, noise(image.grid.shape, 7, dtype=torch.float32)], 1)
    data = torch.cat([data, 3 + noise(image.grid.shape, 8, c=2, dtype=torch.float32)]).mul(5).round()
    maps = Matrix(torch.cat([transform.matrix, Frame.of(image.grid).world(wide.exp(theta, ndim)) @ transform.matrix]))
    found = warp(image.with_data(data), maps, fixed, kernel=kernel, antialias=antialias).data
    for n, c in itertools.product(range(2), range(2)):
        alone = warp(image.with_data(data[n: n + 1, c: c + 1]), Matrix(maps.matrix[n]), fixed, kernel=kernel,
                     antialias=antialias).data
        torch.testing.assert_close(found[n: n + 1, c: c + 1], alone)


@both
@pytest.mark.parametrize("kernel", sampling.KERNELS)
@pytest.mark.parametrize("antialias", ["auto", "none"])
def test_small_chunks_give_the_same(ndim, kernel, antialias, monkeypatch):
    image, transform, fixed = scans(ndim)
    fixed = fixed.shrink((2,) * ndim)
    image = image.with_data((image.data / 20).round())
    ways = (transform, Composite((transform,)))
    whole = [warp(image, t, fixed, kernel=kernel, fill=3, antialias=antialias).data for t in ways]
    for chunk in (1, 37):
        monkeypatch.setattr(WARP, "_CHUNK", chunk)
        for t, before in zip(ways, whole, strict=True):
            torch.testing.assert_close(warp(image, t, fixed, kernel=kernel, fill=3, antialias=antialias).data, before,
                                       atol=1e-5, rtol=1e-5)


@both
@pytest.mark.parametrize("kernel", sampling.KERNELS)
@pytest.mark.parametrize("shrink", [1, 3])
def test_a_transform_of_another_kind_is_treated_like_its_matrix(ndim, kernel, shrink):
    image, transform, fixed = scans(ndim)
    image = image.with_data((image.data / 10).round())
    fixed = fixed.shrink((shrink,) * ndim)
    expected = warp(image, transform, fixed, kernel=kernel, fill=-7, antialias="none").data
    found = warp(image, Composite((transform,)), fixed, kernel=kernel, fill=-7, antialias="none").data
    same = (found - expected).abs() < 1e-3
    assert float(same.float().mean()) > (1 - 1e-9 if kernel in ("linear", "cubic") else 0.99)  # rounding may turn a tie


@both
@pytest.mark.parametrize("kernel", ["linear", "cubic"])
def test_what_is_smoothed_of_slow_structures_hardly_depends_on_the_kind_of_transform(ndim, kernel):
    """An affine matrix is smoothed by filters, any other transform from a scale-space."""
    image, transform, fixed = scans(ndim)
    image = image.with_data(texture(image.grid.shape, sigma=3.0))
    coarse = fixed.shrink((2,) * ndim)
    seen = warp(image.with_data(torch.ones_like(image.data)), transform, coarse).data > 0.5
    expected = warp(image, transform, coarse, kernel=kernel).data[seen]
    found = warp(image, Composite((transform,)), coarse, kernel=kernel).data[seen]
    assert correlation(found, expected) > 0.98
    assert not torch.equal(found, warp(image, Composite((transform,)), coarse, kernel=kernel, antialias="none").data[seen])


@both
def test_a_projective_matrix_divides(ndim):
    image, transform, fixed = scans(ndim)
    m = transform.matrix.clone()
    m[:, ndim, :ndim] = torch.tensor([0.01, -0.006, 0.004])[:ndim]
    found = warp(image, Matrix(m), fixed, antialias="none").data
    index = image.grid.to_index(Matrix(m)(fixed.points())).float()
    expected = sample(image.data, index) * inside(index, image.grid.shape)[:, None]
    torch.testing.assert_close(found.flatten(2), expected, atol=1e-3, rtol=0)
    assert (found - warp(image, transform, fixed, antialias="none").data).abs().max() > 10


@both
@pytest.mark.parametrize("kernel", sampling.KERNELS)
def test_a_spline_reads_where_it_says(ndim, kernel):
    image, transform, fixed = scans(ndim)
    image = image.with_data((image.data / 10).round())
    m = SplineModel(3)
    bent = Composite((transform, m.transform(0.03 * noise((1,), c=m.count(ndim))[..., 0], Frame.of(fixed))))
    found = warp(image, bent, fixed, kernel="nearest" if kernel == "vote" else kernel, antialias="none", fill=-7).data
    index = image.grid.to_index(bent(fixed.points())).float()
    kernel = "nearest" if kernel == "vote" else kernel
    expected = sample(sampling.prepare(image.data, kernel), index, kernel)
    expected = torch.where(inside(index, image.grid.shape)[:, None], expected, -7.0)
    assert float(((found.flatten(2) - expected).abs() < 1e-3).float().mean()) > 0.999
    assert float((found != warp(image, transform, fixed, kernel=kernel, antialias="none", fill=-7).data).float().mean()) > 0.1


@both
def test_an_unknown_word_is_told_the_nearest(ndim):
    image, transform, fixed = scans(ndim)
    with pytest.raises(OptionError, match=r"interpolation: 'cubik'.*nearest: cubic"):
        warp(image, transform, fixed, kernel="cubik")
    with pytest.raises(OptionError, match=r"antialias: 'non' is not known.*nearest: none"):
        warp(image, transform, fixed, antialias="non")


@both
def test_linear_warps_stay_in_the_images_range_though_the_filter_overshoots(ndim):
    shape = (36, 32, 24)[:ndim]
    step = torch.zeros(1, 1, *shape)
    step[:, :, 17:] = 1000
    coarse = grid(shape, centre=grid(shape).centre[0].tolist()).shrink((3,) * ndim)
    for transform in (Matrix.identity(ndim), Composite((Matrix.identity(ndim),))):
        found = warp(Image(step, grid(shape)), transform, coarse).data
        assert float(found.min()) == 0 and float(found.max()) == 1000
        loose = warp(Image(step, grid(shape)), transform, coarse, kernel="cubic").data
        assert -60 < float(loose.min()) < -5 and 1005 < float(loose.max()) < 1060


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
