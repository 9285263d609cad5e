"""Batches of images under index maps: scipy as oracle, paddings, dtypes, gradients, deterministic algorithms."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import scipy.ndimage as ndi
import torch

from regkit.sampling import PADDINGS, How, IndexMap, inside, prepare, reflect, resample, sample

from .conftest import SHAPES, between, both, grid, noise, texture

TARGETS = {2: (11, 17), 3: (11, 17, 6)}
ANGLES = (0.4, -0.3, 0.2)
kernels = pytest.mark.parametrize("kernel", ["linear", "nearest", "cubic"])
paddings = pytest.mark.parametrize("padding", PADDINGS)
kinds = pytest.mark.parametrize("kind", ["affine", "projective", "bend"])


@pytest.fixture
def deterministic():
    """Puts torch back, whatever happens."""
    before = torch.get_num_threads()
    yield lambda on: torch.use_deterministic_algorithms(on)
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(before)


def maps(ndim, kind="affine", n=3, steps=(1.3, 0.9, 1.6), source=None, target=None):
    source, target = source or SHAPES[ndim], target or TARGETS[ndim]
    matrix = torch.cat([between(source, target, steps, [(k + 1) * a for a in ANGLES], shift=1.5 * k) for k in range(n)])
    if kind == "affine":
        return IndexMap(matrix)
    matrix[:, ndim, :ndim] = torch.tensor([0.01, -0.008, 0.02])[:ndim] * 5 / max(target)
    if kind == "projective":
        return IndexMap(matrix, affine=False)
    return IndexMap(bend=lambda index: IndexMap(matrix)(index) + 0.8 * (index / 3).sin())


def points(way, shape):
    return way(grid(shape).index_points(torch.float64))


# ---------------------------------------------------------------------------------------------------------------- values

@both
@kinds
@kernels
@paddings
def test_values_are_those_at_the_points(ndim, kind, kernel, padding):
    data, way, shape = noise(SHAPES[ndim], n=3, c=2), maps(ndim, kind), TARGETS[ndim]
    found = resample(data, way, shape, How(kernel, padding, antialias=False))
    where = points(way, shape)
    within = inside(where, SHAPES[ndim])
    assert found.shape == (3, 2, *shape) and 0.3 < float(within.float().mean()) < 0.99
    expected = sample(prepare(data, kernel), reflect(where, SHAPES[ndim]) if padding == "reflection" else where, kernel)
    expected = expected * within[:, None] if padding == "zeros" else expected
    torch.testing.assert_close(found.flatten(2), expected, atol=1e-8, rtol=1e-8)


@both
@kinds
@pytest.mark.parametrize(("padding", "mode"), [("border", "nearest"), ("reflection", "reflect"), ("zeros", "nearest")])
def test_linear_values_are_scipys(ndim, kind, padding, mode):
    data, way, shape = noise(SHAPES[ndim], n=3, c=2), maps(ndim, kind), TARGETS[ndim]
    found = resample(data, way, shape, How("linear", padding, antialias=False))
    for n, c in itertools.product(range(3), range(2)):
        where = points(way, shape)[n]
        expected = ndi.map_coordinates(data[n, c].numpy(), where.T.numpy(), order=1, mode=mode)
        if padding == "zeros":
            expected = expected * inside(where[None], SHAPES[ndim])[0].numpy()
        np.testing.assert_allclose(found[n, c].flatten().numpy(), expected, atol=1e-8)


@both
@kernels
@paddings
def test_float32_is_as_good_as_its_coordinates(ndim, kernel, padding):
    data = texture(SHAPES[ndim], n=3)
    for kind in ("affine", "projective", "bend"):
        found = resample(data, maps(ndim, kind), TARGETS[ndim], How(kernel, padding, False))
        exact = resample(data.double(), maps(ndim, kind), TARGETS[ndim], How(kernel, padding, False))
        close = (found - exact).abs() < 2e-5
        assert float(close.float().mean()) > (0.995 if kernel == "nearest" else 1 - 1e-9)  # rounding may turn a tie


@both
@kinds
@kernels
@pytest.mark.parametrize("antialias", [False, True])
def test_one_serves_many_and_items_are_independent(ndim, kind, kernel, antialias):
    data, shape = texture(SHAPES[ndim], n=3, c=2), TARGETS[ndim]
    way, how = maps(ndim, kind), How(kernel, "zeros", antialias)
    whole, many = resample(data, way, shape, how), resample(data[:1], way, shape, how)
    first = IndexMap(way.matrix[:1], way.affine) if way.matrix is not None else IndexMap(bend=lambda i: way.bend(i)[:1])
    one = resample(data, first, shape, how)
    assert whole.shape == many.shape == one.shape == (3, 2, *shape)
    torch.testing.assert_close(many[:1], whole[:1], atol=1e-5, rtol=0)
    torch.testing.assert_close(one[:1], whole[:1], atol=1e-5, rtol=0)
    torch.testing.assert_close(one[1:2], resample(data[1:2], first, shape, how), atol=1e-5, rtol=0)
    alone = resample(data[1:2, 1:], first, shape, how)  # one channel of one item
    torch.testing.assert_close(alone, one[1:2, 1:], atol=1e-5, rtol=0)


@both
def test_a_projective_matrix_that_is_affine_is_that_affine_map(ndim):
    data, way = texture(SHAPES[ndim], n=3), maps(ndim)
    for padding in PADDINGS:
        expected = resample(data, way, TARGETS[ndim], How("linear", padding, False))
        for scale in (1.0, -2.5):  # a homogeneous matrix means the same times any number
            found = resample(data, IndexMap(way.matrix * scale, affine=False), TARGETS[ndim], How("linear", padding, False))
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


@both
@kernels
@paddings
def test_the_horizon_is_no_place_where_numbers_end(ndim, kernel, padding):
    """Points of the target whose divisor is exactly zero."""
    shape = (15, 21, 9)[:ndim]
    matrix = torch.eye(ndim + 1, dtype=torch.float64)[None].clone()
    matrix[0, ndim, 0] = -1 / 8
    matrix.requires_grad_()
    way = IndexMap(matrix, affine=False)
    assert bool(points(way, shape).isfinite().all())
    data = texture(shape).requires_grad_()
    for antialias in (False, True):
        found = resample(data, way, shape, How(kernel, padding, antialias))
        assert bool(found.isfinite().all())
        for grad in torch.autograd.grad(found.square().sum(), (data, matrix), allow_unused=kernel == "nearest"):
            assert grad is None or bool(grad.isfinite().all())


# ---------------------------------------------------------------------------------------------------------------- dtypes

@both
@kinds
@kernels
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_computed_in_float32(ndim, kind, kernel, dtype):
    data, way = texture(SHAPES[ndim], n=3).to(dtype), maps(ndim, kind)
    for shape in (TARGETS[ndim], tuple(n // 3 for n in TARGETS[ndim])):
        found = resample(data, way, shape, How(kernel))
        assert found.dtype == dtype
        assert torch.equal(found, resample(data.float(), way, shape, How(kernel)).to(dtype))


@both
@kinds
def test_nearest_keeps_any_dtype(ndim, kind):
    for dtype in (torch.uint8, torch.int16, torch.int64, torch.bool):
        data = (noise(SHAPES[ndim], n=3) * 40).to(dtype)
        found = resample(data, maps(ndim, kind), TARGETS[ndim], How("nearest", "border"))
        assert found.dtype == dtype and set(found.unique().tolist()) <= set(data.unique().tolist())


# ------------------------------------------------------------------------------------------------------------- gradients

@both
@pytest.mark.parametrize("kind", ["affine", "projective"])
@pytest.mark.parametrize("kernel", ["linear", "cubic"])
@paddings
def test_gradients_in_the_voxels_and_in_the_map(ndim, kind, kernel, padding):
    source, target = (5, 6, 4)[:ndim], (3, 4, 2)[:ndim]
    data = noise(source, n=2, c=2).requires_grad_()
    way = maps(ndim, kind, n=2, source=source, target=target)
    matrix = way.matrix.clone().requires_grad_()

    def see(d, m):
        return resample(d, IndexMap(m, way.affine), target, How(kernel, padding, False))

    assert torch.autograd.gradcheck(see, (data, matrix), fast_mode=True)


@both
@kinds
@kernels
def test_nearest_and_smoothed_images_pass_gradients_to_the_voxels(ndim, kind, kernel):
    source, target = (9, 11, 7)[:ndim], (3, 4, 2)[:ndim]
    data = noise(source, n=2).requires_grad_()
    way = maps(ndim, kind, n=2, steps=(2.5, 2.0, 3.0), source=source, target=target)
    assert torch.autograd.gradcheck(lambda d: resample(d, way, target, How(kernel, "border")), data, fast_mode=True, atol=1e-4)
    grad = torch.autograd.grad(resample(data, way, target, How(kernel, "border")).sum(), data)[0]
    assert float(grad.sum()) == pytest.approx(2 * torch.Size(target).numel(), rel=1e-4)  # every value is an average


@both
@pytest.mark.parametrize(("kind", "steps", "kernel", "padding"), [
    ("affine", (0.8, 0.9, 0.7), "linear", "border"), ("affine", (3.0, 2.2, 4.0), "linear", "reflection"),
    ("affine", (0.9, 1.0, 7.0), "cubic", "zeros"), ("projective", (3.0, 2.2, 4.0), "linear", "zeros"),
    ("bend", (0.8, 0.9, 0.7), "cubic", "reflection")], ids=["alike", "shrunk", "thick", "scale-space", "bent"])
def test_deterministic_algorithms_change_nothing(ndim, kind, kernel, padding, steps, deterministic):
    found = []
    for on in (False, True, True):
        deterministic(on)
        torch.set_num_threads(2)
        data = texture(SHAPES[ndim], n=2, c=2).requires_grad_()
        way = maps(ndim, kind, n=2, steps=steps)
        values = resample(data, way, TARGETS[ndim], How(kernel, padding))
        found.append((values, torch.autograd.grad(values.square().sum(), data)[0]))
    for plain, fixed, again in zip(*found, strict=True):
        torch.testing.assert_close(fixed, plain, atol=1e-4, rtol=1e-4)
        assert torch.equal(fixed, again)
