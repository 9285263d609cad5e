"""Filters: scipy, numpy and torch as oracles; no axis is ever taken for another."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.ndimage as ndi
import torch

from regkit import filters
from regkit.filters import along, gaussian, gradient, smooth, spline_coefficients

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
    for matrix in (spline_coefficients(400, 2), gaussian(400, 3.0), gaussian(400, 3.0, 4)):
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
    for kept in (gaussian, spline_coefficients):
        kept.cache_clear()
    data = noise(ndim, dtype=torch.float32)
    uses = (lambda d: smooth(d, [1.2] * ndim), gradient, lambda d: along(d, [spline_coefficients(n) for n in d.shape[2:]]))
    with torch.inference_mode():
        for use in uses:
            use(data)
    assert filters.gaussian.cache_info().currsize > 0
    for use in uses:
        wanted = data.clone().requires_grad_()
        (use(wanted) ** 2).sum().backward()
        assert wanted.grad.abs().sum() > 0
