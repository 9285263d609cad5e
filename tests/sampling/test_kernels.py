"""Values of an image at points against scipy and numpy; no axis is ever taken for another."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import scipy.ndimage as ndi
import torch

from regkit.errors import OptionError
from regkit.sampling import inside, prepare, reflect, sample

from .conftest import SHAPES, both, grid, noise, points_in, profile

KERNELS = ["linear", "nearest", "cubic"]


@pytest.fixture
def deterministic():
    """Puts torch back, whatever happens."""
    yield lambda on: torch.use_deterministic_algorithms(on)
    torch.use_deterministic_algorithms(False)


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


# ------------------------------------------------------------------------------------------------------------ reflection

@both
@pytest.mark.parametrize("shape", [(4, 7, 3), (1, 5, 2), (6, 1, 1)], ids=str)
def test_reflection_is_numpys_symmetric_padding(ndim, shape):
    """At the voxels and between them: the mirror lies at the outer edges, half a voxel beyond the last centres."""
    shape, far = shape[:ndim], 15
    data = noise(shape, c=2)
    wide = torch.from_numpy(np.pad(data.numpy(), [(0, 0)] * 2 + [(far, far)] * ndim, mode="symmetric"))
    near = points_in(shape, 300, reach=far - 1.0)
    whole = near.floor()
    for index, kernel in ((whole, "nearest"), (whole, "linear"), (whole, "cubic"), (near, "nearest"), (near, "linear")):
        found = sample(prepare(data, kernel), reflect(index, shape), kernel)
        expected = sample(prepare(wide, kernel if kernel != "cubic" else "linear"), index + far, kernel if kernel != "cubic" else "linear")
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@both
def test_reflection_stays_inside_and_leaves_what_is_there(ndim):
    shape = SHAPES[ndim]
    index = points_in(shape, 200, reach=0.5)
    torch.testing.assert_close(reflect(index, shape), index)
    far = points_in(shape, 200, reach=1e4)
    assert bool(((reflect(far, shape) >= -0.5) & (reflect(far, shape) <= torch.tensor(shape) - 0.5)).all())
    period = 2 * torch.tensor(shape, dtype=torch.float64)
    torch.testing.assert_close(reflect(far + 3 * period, shape), reflect(far, shape), atol=1e-8, rtol=0)
    inner = points_in(shape, 9, reach=9.0).requires_grad_()
    assert torch.autograd.gradcheck(lambda i: reflect(i, shape), inner)


# ---------------------------------------------------------------------------------------- the integer kernel's gradient

@both
def test_nearest_passes_gradients_to_the_voxels_it_reads(ndim):
    data = noise(SHAPES[ndim], n=2, c=2).requires_grad_()
    index = points_in(SHAPES[ndim], 400, n=2, reach=3.0)
    counts = torch.zeros(2, *SHAPES[ndim], dtype=torch.float64)
    for n in range(2):
        place = tuple(i.clamp(0, m - 1) for i, m in zip((index[n] + 0.5).floor().long().T, SHAPES[ndim], strict=True))
        counts[n].index_put_(place, torch.ones(400, dtype=torch.float64), accumulate=True)
    sample(data, index, "nearest").sum().backward()
    torch.testing.assert_close(data.grad, counts[:, None].expand_as(data))
    small = noise((3, 4, 2)[:ndim]).requires_grad_()
    assert torch.autograd.gradcheck(lambda d: sample(d, points_in((3, 4, 2)[:ndim], 20, reach=1.0), "nearest"), small)


# ------------------------------------------------------------------------------------------------ other ways to the same

@both
@pytest.mark.parametrize("channels", [1, 9])
def test_voxels_that_lie_channels_last_are_read_alike(ndim, channels):
    data = noise(SHAPES[ndim], c=channels)
    index = points_in(SHAPES[ndim], 300, n=2, reach=2.0)
    last = data.movedim(1, -1).contiguous().movedim(-1, 1)
    assert last.stride() != data.stride() or channels == 1
    for kernel in KERNELS:
        torch.testing.assert_close(sample(prepare(last, kernel), index, kernel), sample(prepare(data, kernel), index, kernel))


@both
@pytest.mark.parametrize("kernel", KERNELS)
def test_deterministic_algorithms_give_the_same_values_and_gradients(ndim, kernel, deterministic):
    found = []
    for on in (False, True):
        deterministic(on)
        data = noise(SHAPES[ndim], n=2, c=2).requires_grad_()
        index = points_in(SHAPES[ndim], 200, n=2, reach=0.4).requires_grad_()
        values = sample(prepare(data, kernel), index, kernel)
        grads = torch.autograd.grad(values.square().sum(), (data, index), allow_unused=True)
        found.append((values, *[g for g in grads if g is not None]))
    assert len(found[0]) == (2 if kernel == "nearest" else 3)
    for plain, fixed in zip(*found, strict=True):
        torch.testing.assert_close(fixed, plain, atol=1e-9, rtol=1e-9)


@both
def test_deterministic_reading_holds_the_outermost_value_too(ndim, deterministic):
    data, index = noise(SHAPES[ndim]), points_in(SHAPES[ndim], 200, reach=20.0)
    before = sample(data, index)
    deterministic(True)
    torch.testing.assert_close(sample(data, index), before)
