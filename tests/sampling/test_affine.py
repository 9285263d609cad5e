"""Affine maps of whole grids: ramps for points, what is seen of a line, and torch's own sampler as oracle."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from regkit.sampling import inside, prepare, sample
from regkit.sampling.affine import EDGE, lines, normalised, read_affine, read_lines, seen, starts

from .conftest import SHAPES, between, both, grid, noise

TARGETS = {2: (11, 17), 3: (11, 17, 6)}
ANGLES = (0.4, -0.3, 0.2)


def maps(ndim, n=3):
    """Turned, stretched, partly outside."""
    return torch.cat([between(SHAPES[ndim], TARGETS[ndim], (1.4, 0.9, 1.7), [(k + 1) * a for a in ANGLES], shift=1.5 * k)
                      for k in range(n)])


def moved(mapping, shape):
    d = len(shape)
    return grid(shape).index_points(torch.float64) @ mapping[:, :d, :d].mT + mapping[:, None, :d, d]


@both
def test_lines_are_the_mapped_points_in_order(ndim):
    shape, count = TARGETS[ndim], math.prod(TARGETS[ndim][:-1])
    mapping, here = maps(ndim), grid(TARGETS[ndim])
    expected = moved(mapping, shape)
    torch.testing.assert_close(lines(here, mapping, 0, count), expected)
    torch.testing.assert_close(lines(here, mapping, 3, 8), expected[:, 3 * shape[-1]: 8 * shape[-1]])
    torch.testing.assert_close(starts(here, mapping, 0, count), expected[:, ::shape[-1]])


@both
def test_what_is_seen_of_lines_is_what_lies_inside(ndim):
    shape, count = TARGETS[ndim], math.prod(TARGETS[ndim][:-1])
    for mapping in (maps(ndim), between(SHAPES[ndim], shape, (1.0, 1.0, 1.0)), between(SHAPES[ndim], shape, (2.0, 3.0, 2.5))):
        first = starts(grid(shape), mapping, 0, count)
        found = seen(first, mapping[:, :ndim, ndim - 1], shape[-1], SHAPES[ndim])
        expected = inside(moved(mapping, shape), SHAPES[ndim]).reshape(found.shape)
        assert 0.05 < float(found.float().mean()) <= 1
        assert torch.equal(found, expected)


@both
def test_what_is_seen_includes_the_outer_edges_and_rounding(ndim):
    step, n = torch.zeros(1, ndim, dtype=torch.float64), SHAPES[ndim][-1]
    step[0, -1] = 1.0
    for axis in range(ndim - 1):  # lines along the last axis, at an edge of another
        first = torch.zeros(1, 3, ndim, dtype=torch.float64)
        first[0, :, axis] = torch.tensor([-0.5, -0.5 - EDGE / 2, -0.5 - 2 * EDGE])
        first[0, :, -1] = -1.0
        within = [False, *[True] * n, False]
        assert seen(first, step, n + 2, SHAPES[ndim])[0].tolist() == [within, within, [False] * (n + 2)]


@both
@pytest.mark.parametrize("channels", [1, 3])
def test_lines_are_read_as_points_are(ndim, channels):
    shape, count = TARGETS[ndim], math.prod(TARGETS[ndim][:-1])
    data = noise(SHAPES[ndim], c=channels)
    for mapping in maps(ndim).split(1):
        found, within = read_lines(data, mapping, grid(shape), 0, count, SHAPES[ndim], (1,) * ndim)
        torch.testing.assert_close(found, sample(data, moved(mapping, shape)), atol=1e-9, rtol=1e-9)
        assert torch.equal(within, inside(moved(mapping, shape), SHAPES[ndim]))


@both
@pytest.mark.parametrize("padding", ["border", "reflection"])
@pytest.mark.parametrize("threads", [1, 2])
def test_whole_grids_are_read_as_torch_reads_them(ndim, padding, threads):
    """affine_grid and grid_sample, from maps written in torch's own coordinates."""
    shape, data = TARGETS[ndim], noise(SHAPES[ndim], n=3, c=2)
    theta = normalised(maps(ndim), shape, SHAPES[ndim])
    where = F.affine_grid(theta, [3, 1, *shape], align_corners=False)
    expected = F.grid_sample(data, where, padding_mode=padding, align_corners=False)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        found = read_affine(data, maps(ndim), shape, (1,) * ndim, padding)
        single = read_affine(data[:1], maps(ndim)[:1], shape, (1,) * ndim, padding)
        many = read_affine(data[:1], maps(ndim), shape, (1,) * ndim, padding)
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(found, expected, atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(single, expected[:1], atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(many[:1], expected[:1], atol=1e-9, rtol=1e-9)
    if padding == "border":
        torch.testing.assert_close(found.flatten(2), sample(prepare(data, "linear"), moved(maps(ndim), shape)), atol=1e-9, rtol=1e-9)


@both
def test_torchs_coordinates_are_one_at_the_outer_edges(ndim):
    shape = TARGETS[ndim]
    theta = normalised(maps(ndim, 1), shape, SHAPES[ndim])
    assert theta.shape == (1, ndim, ndim + 1)
    for corner in itertools.product(*[(-0.5, n - 0.5) for n in shape]):
        index = torch.tensor([corner], dtype=torch.float64)
        there = (index @ maps(ndim, 1)[0, :ndim, :ndim].mT + maps(ndim, 1)[0, :ndim, ndim])[0]
        expected = ((there + 0.5) * 2 / torch.tensor(SHAPES[ndim]) - 1).flip(0)
        signs = torch.tensor([1.0 if c > 0 else -1.0 for c in reversed(corner)] + [1.0], dtype=torch.float64)
        torch.testing.assert_close(theta[0] @ signs, expected)


@both
@pytest.mark.parametrize("padding", ["border", "reflection"])
def test_gradients_in_the_voxels_and_in_the_map(ndim, padding):
    shape = (3, 4, 2)[:ndim]
    data = noise((5, 6, 4)[:ndim], n=2, c=2).requires_grad_()
    mapping = torch.cat([between((5, 6, 4)[:ndim], shape, (1.3, 0.8, 1.1), ANGLES, shift=0.3 * k) for k in range(2)]).requires_grad_()
    assert torch.autograd.gradcheck(lambda v, m: read_affine(v, m, shape, (1,) * ndim, padding), (data, mapping), fast_mode=True)
