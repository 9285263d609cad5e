"""Filters: scipy, numpy and torch as oracles; no axis is ever taken for another."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.ndimage as ndi
import torch

from regkit import filters
from regkit.filters import SHARP, along, gaussian, gradient, sharp, sharp_one, smooth, spline_coefficients

both = pytest.mark.parametrize("ndim", [2, 3], ids=["2D", "3D"])
SHAPES = {2: (13, 22), 3: (13, 22, 9)}


def noise(ndim, n=2, c=3, dtype=torch.float64):
    return torch.randn(n, c, *SHAPES[ndim], dtype=dtype, generator=torch.Generator().manual_seed(ndim))


@both
def test_along_never_swaps_axes(ndim):
    data = noise(ndim)
    matrices = [torch.randn(m, n, dtype=torch.float64, generator=torch.Generator().manual_seed(m))
                for m, n in zip((4, 30, 11), SHAPES[ndim], strict=False)]
    letters = {2: ("ai,bj,ncij->ncab", 2), 3: ("ai,bj,dk,ncijk->ncabd", 3)}[ndim]
    torch.testing.assert_close(along(data, matrices), torch.einsum(letters[0], *matrices, data))
    for axis in range(ndim):
        alone = along(data, [m if a == axis else None for a, m in enumerate(matrices)])
        expected = torch.tensordot(data, matrices[axis], dims=([axis + 2], [1])).movedim(-1, axis + 2)
        torch.testing.assert_close(alone, expected)
    assert along(data, [None] * ndim) is data


@both
def test_along_takes_a_matrix_for_each_item(ndim):
    data = noise(ndim, n=3)
    each = [torch.randn(3, m, n, dtype=torch.float64, generator=torch.Generator().manual_seed(m))
            for m, n in zip((4, 30, 11), SHAPES[ndim], strict=False)]
    found = along(data, each)
    for i in range(3):
        torch.testing.assert_close(found[i: i + 1], along(data[i: i + 1], [m[i] for m in each]))
    mixed = along(data, [each[0], None, *[m[0] for m in each[2:]]])
    for i in range(3):
        expected = along(data[i: i + 1], [each[0][i], None, *[m[0] for m in each[2:]]])
        torch.testing.assert_close(mixed[i: i + 1], expected)


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("batch", [False, True])
def test_long_narrow_matrices_are_applied_as_whole_ones_are(axis, batch):
    """They are cut into blocks of rows with the columns that are not zero there."""
    shape = [5, 4, 3]
    shape[axis] = 400
    data = torch.randn(2, 2, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(axis))
    for matrix in (gaussian(400, 2.0), gaussian(400, 5.0, 7), sharp_one(400, 3.3), sharp_one(400, 8.0, 4), spline_coefficients(400, 2),
                   torch.zeros(130, 400), torch.eye(400)[[399, *range(200)]]):
        matrix = torch.stack([matrix, matrix.roll(3, 1)]) if batch else matrix
        found = along(data, [matrix if a == axis else None for a in range(3)])
        letters = "ncijk"
        expected = torch.einsum(f"{'n' if batch else ''}m{letters[axis + 2]},{letters}->{letters.replace(letters[axis + 2], 'm')}",
                                matrix.double(), data)
        torch.testing.assert_close(found, expected)


@both
def test_along_of_a_view_is_along_of_its_copy(ndim):
    data = noise(ndim).transpose(2, 3)
    matrices = [gaussian(n, 1.3) for n in data.shape[2:]]
    torch.testing.assert_close(along(data, matrices), along(data.contiguous(), matrices))


@both
def test_a_constant_stays_constant_up_to_the_border(ndim):
    data = torch.full((1, 2, *SHAPES[ndim]), 7.5)
    for sigma in (0.3, 1.0, 6.0):
        torch.testing.assert_close(smooth(data, [sigma] * ndim), data)
    few = smooth(data, [2.0] * ndim, (4, 3, 2)[:ndim])
    torch.testing.assert_close(few, torch.full_like(few, 7.5))
    coefficients = along(data, [spline_coefficients(n, 2) for n in SHAPES[ndim]])
    torch.testing.assert_close(coefficients, torch.full_like(coefficients, 7.5))
    assert gradient(data).abs().max() == 0


@both
def test_smooth_is_scipys_gaussian_in_the_interior(ndim):
    data = noise(ndim)
    sigma = (1.1, 0.7, 0.5)[:ndim]
    expected = data.numpy()
    for axis, s in enumerate(sigma):
        expected = ndi.gaussian_filter1d(expected, s, axis=axis + 2, truncate=4.0)
    inner = (..., *[slice(int(4 * s) + 1, -int(4 * s) - 1) for s in sigma])
    # where exactly each cuts it at 4 σ makes the difference
    np.testing.assert_allclose(smooth(data, sigma).numpy()[inner], expected[inner], atol=2e-4)
    assert smooth(data, [0.0] * ndim) is data


@both
def test_smooth_blurs_only_the_axis_it_is_told(ndim):
    data = noise(ndim)
    for axis in range(ndim):
        found = smooth(data, [2.0 if a == axis else 0.0 for a in range(ndim)])
        expected = data.movedim(axis + 2, -1) @ gaussian(SHAPES[ndim][axis], 2.0).double().T
        torch.testing.assert_close(found.movedim(axis + 2, -1), expected)


@both
def test_smooth_in_steps_reads_the_blur_at_the_middles_of_blocks(ndim):
    data = noise(ndim)
    steps = (3, 5, 1)[:ndim]  # odd: the middle of a block is a voxel
    whole = smooth(data, [1.4] * ndim)
    expected = whole[(..., *[slice(k // 2, n // k * k, k) for n, k in zip(SHAPES[ndim], steps, strict=True)])]
    torch.testing.assert_close(smooth(data, [1.4] * ndim, steps), expected)


def test_smooth_in_even_steps_reads_between_the_voxels():
    ramp = torch.arange(40.0).reshape(1, 1, 40, 1)
    found = smooth(ramp, [2.0, 0.0], (4, 1))[0, 0, :, 0]
    torch.testing.assert_close(found[3:7], torch.tensor([13.5, 17.5, 21.5, 25.5]))
    # all voxels count, also those beyond the last whole block
    assert float(smooth(torch.eye(6)[5].reshape(1, 1, 6, 1), [2.0, 0.0], (4, 1))) > 0.01


def keys(x):
    """The cubic convolution kernel (Keys 1981)."""
    x = np.abs(x)
    return np.where(x < 1, 1.5 * x**3 - 2.5 * x**2 + 1, np.where(x < 2, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2, 0))


@pytest.mark.parametrize(("n", "step"), [(40, 1), (41, 1), (40, 3), (37, 4), (2, 1), (1, 1)])
def test_sharp_is_keys_kernel_with_rows_that_sum_to_one(n, step):
    widths = torch.tensor([1.0, SHARP, 1.5, 2.5, 6.0], dtype=torch.float64)
    found = sharp(n, widths, step)
    assert found.shape == (5, n // step, n)
    torch.testing.assert_close(found.sum(-1), torch.ones(5, n // step, dtype=torch.float64))
    if step == 1:
        assert torch.equal(found[0], torch.eye(n, dtype=torch.float64)) and torch.equal(found[1], torch.eye(n, dtype=torch.float64))
    centres = np.arange(n // step) * step + (step - 1) / 2
    for k in (2, 3, 4):
        wide = 1 + filters._WIDER * (float(widths[k]) - SHARP)
        expected = keys((centres[:, None] - np.arange(n)) / wide)
        np.testing.assert_allclose(found[k].numpy(), expected / expected.sum(1, keepdims=True), atol=1e-12)
        torch.testing.assert_close(sharp_one(n, float(widths[k]), step), found[k].float())


def test_sharp_overshoots_little_at_a_hard_edge_and_keeps_ramps():
    edge, ramp = (torch.arange(60) >= 30).double(), torch.arange(60, dtype=torch.float64)
    for width in (1.5, 2.0, 4.0, 6.0):
        filtered = sharp_one(60, width).double() @ edge
        assert 1.005 < float(filtered.max()) < 1.08 and -0.08 < float(filtered.min()) < -0.005
        torch.testing.assert_close((sharp_one(60, width).double() @ ramp)[16:-16], ramp[16:-16], atol=1e-4, rtol=0)


def test_sharp_takes_out_what_a_step_cannot_show_and_keeps_what_it_can():
    x = torch.arange(400, dtype=torch.float64)
    for width in (2.0, 3.0, 5.0):
        def left(cycles, width=width):
            """Of a wave of so many cycles a step: the share of its amplitude in the middle."""
            filtered = sharp_one(400, width).double() @ torch.cos(2 * np.pi * cycles / width * x + 0.4)
            return float(filtered[50:-50].square().mean().sqrt()) * 2**0.5

        assert left(1 / 8) > 0.95 and left(1 / 4) > 0.8 and left(1.0) < 0.1


@pytest.mark.parametrize("n", [1, 2, 3, 5, 40, 300])
def test_spline_coefficients_are_scipys(n):
    data = torch.randn(n, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(n))
    found = spline_coefficients(n).double() @ data
    expected = ndi.spline_filter1d(data.numpy(), order=3, axis=0, mode="mirror") if n > 1 else data.numpy()
    np.testing.assert_allclose(found.numpy(), expected, atol=2e-6)
    margin = np.pad(expected, ((2, 2), (0, 0)), mode="reflect") if n > 1 else np.repeat(expected, 5, 0)
    np.testing.assert_allclose((spline_coefficients(n, 2).double() @ data).numpy(), margin, atol=2e-6)


def test_no_filter_holds_subnormal_numbers():
    """They would make every product ten times slower."""
    tiny = torch.finfo(torch.float32).tiny
    for matrix in (spline_coefficients(400, 2), gaussian(400, 3.0), gaussian(400, 3.0, 4), sharp_one(400, 3.0), sharp_one(400, 3.0, 4)):
        assert not bool(((matrix != 0) & (matrix.abs() < tiny)).any())


@both
def test_gradient_is_numpys(ndim):
    data = noise(ndim)
    found = gradient(data)
    assert found.shape == (2, 3, ndim, *SHAPES[ndim])
    for axis in range(ndim):
        np.testing.assert_allclose(found[:, :, axis].numpy(), np.gradient(data.numpy(), axis=axis + 2), atol=1e-12)


def test_gradient_along_an_axis_of_one_voxel_is_zero():
    found = gradient(torch.tensor([[[[1.0], [3.0]]]]))
    assert found[0, 0].flatten(1).tolist() == [[2.0, 2.0], [0.0, 0.0]]


@both
def test_gradients(ndim):
    draw = torch.Generator().manual_seed(0)
    data = torch.randn(1, 2, *(4, 5, 2)[:ndim], dtype=torch.float64, generator=draw).requires_grad_()
    for f in (lambda d: smooth(d, [0.8] * ndim), gradient, lambda d: along(d, [spline_coefficients(n, 2) for n in d.shape[2:]]),
              lambda d: smooth(d, [0.8] * ndim, [2] * ndim)):
        assert torch.autograd.gradcheck(f, data)


@both
def test_filters_keep_float32_under_autocast(ndim):
    data = noise(ndim, dtype=torch.float32)
    expected = smooth(data, [1.0] * ndim)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(smooth(data, [1.0] * ndim), expected)


@both
def test_filters_first_used_under_inference_mode_serve_gradients_later(ndim):
    for kept in (gaussian, spline_coefficients, sharp_one):
        kept.cache_clear()
    data = noise(ndim, dtype=torch.float32)
    uses = (lambda d: smooth(d, [1.2] * ndim), gradient, lambda d: along(d, [spline_coefficients(n) for n in d.shape[2:]]),
            lambda d: along(d, [sharp_one(n, 2.0) for n in d.shape[2:]]))
    with torch.inference_mode():
        for use in uses:
            use(data)
    assert filters.gaussian.cache_info().currsize > 0
    for use in uses:
        wanted = data.clone().requires_grad_()
        (use(wanted) ** 2).sum().backward()
        assert wanted.grad.abs().sum() > 0
