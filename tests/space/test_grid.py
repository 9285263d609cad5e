"""Grids and frames: where voxels lie, whatever way a scan is stored."""

from __future__ import annotations

import itertools
import math

import nibabel as nib
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from regkit.errors import GeometryError
from regkit.space import Frame, Grid, Matrix, model

both = pytest.mark.parametrize("ndim", [2, 3], ids=["2D", "3D"])
SHAPES = {2: (7, 12), 3: (7, 12, 5)}


def rotation(ndim, angles):
    skews = model("rigid").generators(ndim)[ndim:, :ndim, :ndim]
    return torch.linalg.matrix_exp(torch.einsum("p,pij->ij", torch.as_tensor(angles, dtype=torch.float64)[: len(skews)], skews))


def affine(ndim, angles=(0.3, -0.2, 0.5), spacing=(0.7, 1.3, 4.0), flips=(1, -1, 1), offset=(-50.0, 20.0, 7.5)):
    """An oblique, anisotropic, mirrored affine."""
    a = torch.eye(ndim + 1, dtype=torch.float64)
    a[:ndim, :ndim] = rotation(ndim, angles) * torch.tensor([s * f for s, f in zip(spacing, flips, strict=True)][:ndim])
    a[:ndim, ndim] = torch.tensor(offset[:ndim])
    return a


angle = st.floats(-math.pi, math.pi)
place = st.floats(-300, 300)


@both
@settings(deadline=None, max_examples=25)
@given(angles=st.tuples(angle, angle, angle), spacing=st.tuples(*[st.floats(0.05, 20)] * 3),
       flips=st.tuples(*[st.sampled_from([-1, 1])] * 3), point=st.tuples(place, place, place))
def test_index_to_world_and_back(ndim, angles, spacing, flips, point):
    grid = Grid(SHAPES[ndim], affine(ndim, angles, spacing, flips))
    index = torch.tensor([[point[:ndim]]], dtype=torch.float64)
    world = grid.to_world(index)
    expected = nib.affines.apply_affine(grid.affine[0].numpy(), index[0, 0].numpy())
    np.testing.assert_allclose(world[0, 0].numpy(), expected, atol=1e-9)
    torch.testing.assert_close(grid.to_index(world), index, atol=1e-7, rtol=0)
    torch.testing.assert_close(grid.spacing[0], torch.tensor(spacing[:ndim], dtype=torch.float64))


@both
def test_points_follow_the_array(ndim):
    grid = Grid(SHAPES[ndim], affine(ndim))
    values = torch.arange(math.prod(grid.shape)).reshape(grid.shape)
    index = grid.index_points(torch.int64)[0]
    assert torch.equal(values[tuple(index.T)], values.flatten())
    torch.testing.assert_close(grid.points(), grid.to_world(index[None].double()))
    torch.testing.assert_close(grid.centre, grid.points().mean(1))
    torch.testing.assert_close(grid.corners().mean(1), grid.centre)
    ends = grid.to_index(grid.corners())
    assert {tuple(round(v, 6) for v in corner) for corner in ends[0].tolist()} == \
        set(itertools.product(*[(-0.5, n - 0.5) for n in grid.shape]))


@both
def test_an_affine_inverse_is_affine_to_the_last_bit(ndim):
    last = torch.eye(ndim + 1, dtype=torch.float64)[ndim]
    grid = Grid(SHAPES[ndim], affine(ndim))
    for matrix in (grid.inverse, Frame.of(grid).inverse, Matrix(grid.affine).inverse().matrix):
        assert torch.equal(matrix[0, ndim], last)


@both
def test_shrink_keeps_the_lower_outer_edges_and_the_centres_of_blocks(ndim):
    grid = Grid((12, 7, 9)[:ndim], affine(ndim))
    factors = (3, 2, 4)[:ndim]
    small = grid.shrink(factors)
    assert small.shape == (4, 3, 2)[:ndim]
    edge = torch.full((1, 1, ndim), -0.5, dtype=torch.float64)
    torch.testing.assert_close(small.to_world(edge), grid.to_world(edge))
    torch.testing.assert_close(small.spacing, grid.spacing * torch.tensor(factors, dtype=torch.float64))
    centres = small.points()[0].reshape(*small.shape, ndim)
    voxels = grid.points()[0].reshape(*grid.shape, ndim)
    for block in itertools.product(*map(range, small.shape)):
        members = voxels[tuple(slice(b * k, (b + 1) * k) for b, k in zip(block, factors, strict=True))]
        torch.testing.assert_close(centres[block], members.reshape(-1, ndim).mean(0))


@both
def test_shrink_where_factors_divide_keeps_the_field_of_view(ndim):
    grid = Grid((12, 8, 6)[:ndim], affine(ndim))
    torch.testing.assert_close(grid.shrink((3, 2, 6)[:ndim]).corners(), grid.corners())


@both
def test_shrink_makes_one_block_of_an_axis_shorter_than_its_factor(ndim):
    grid = Grid((2, 8, 8)[:ndim], affine(ndim))
    torch.testing.assert_close(grid.shrink((5, 4, 4)[:ndim]).corners(), grid.corners())


def stored(grid, axes, flips):
    """The same voxels under another order and direction of the axes."""
    d = grid.ndim
    turn = torch.zeros(d + 1, d + 1, dtype=torch.float64)
    turn[d, d] = 1
    for new, (old, flip) in enumerate(zip(axes, flips, strict=True)):
        turn[old, new] = -1 if flip else 1
        turn[old, d] = grid.shape[old] - 1 if flip else 0
    return Grid(tuple(grid.shape[a] for a in axes), grid.affine @ turn)


@both
def test_canonical_is_one_canvas_for_every_way_of_storing(ndim):
    a = torch.diag(torch.tensor([*(1.5, 0.8, 3.0)[:ndim], 1.0], dtype=torch.float64))
    a[:ndim, ndim] = torch.tensor([-31.0, 12.0, 4.5])[:ndim]
    grid = Grid((20, 31, 9)[:ndim], a)
    canvas = grid.canonical(2.0)
    assert canvas.orientation == "RAS"[:ndim]
    torch.testing.assert_close(canvas.spacing, torch.full((1, ndim), 2.0, dtype=torch.float64))
    seen = set()
    for axes in itertools.permutations(range(ndim)):
        for flips in itertools.product([False, True], repeat=ndim):
            copy = stored(grid, axes, flips)
            seen.add(copy.orientation)
            assert copy.canonical(2.0).same_as(canvas, 1e-9)
    assert len(seen) == math.factorial(ndim) * 2**ndim  # 8 or 48 orientations, among them LAS, LPS, PIR


@both
def test_canonical_covers_the_corners_and_is_no_larger_than_needed(ndim):
    for mm in (0.9, 2.0, 7.0):
        grid = Grid(SHAPES[ndim], affine(ndim))
        canvas = grid.canonical(mm)
        corners, ends = grid.corners()[0], canvas.corners()[0]
        assert bool((ends.amin(0) <= corners.amin(0) + 1e-2 * mm).all())
        assert bool((ends.amax(0) >= corners.amax(0) - 1e-2 * mm).all())
        slack = (ends.amax(0) - ends.amin(0)) - (corners.amax(0) - corners.amin(0))
        assert bool((slack <= mm).all())
        torch.testing.assert_close((ends.amax(0) + ends.amin(0)) / 2, (corners.amax(0) + corners.amin(0)) / 2)


@both
@settings(deadline=None, max_examples=40)
@given(turns=st.tuples(*[st.integers(0, 3)] * 3), wobble=st.tuples(*[st.floats(-0.25, 0.25)] * 3),
       flips=st.tuples(*[st.sampled_from([-1, 1])] * 3))
def test_orientation_is_nibabels(ndim, turns, wobble, flips):
    a = affine(ndim, wobble, flips=flips)
    for quarter in range(3):  # by whole quarter turns about each axis, and a little oblique
        turn = rotation(ndim, [t * math.pi / 2 if i == quarter else 0.0 for i, t in enumerate(turns)])
        a[:ndim, :ndim] = turn @ a[:ndim, :ndim]
    assert Grid(SHAPES[ndim], a).orientation == "".join(nib.aff2axcodes(a.numpy()))


@both
def test_same_as(ndim):
    grid = Grid(SHAPES[ndim], affine(ndim))
    near, far = affine(ndim), affine(ndim)
    near[0, ndim] += 1e-4
    far[0, ndim] += 0.01
    assert grid.same_as(Grid(SHAPES[ndim], near))
    assert not grid.same_as(Grid(SHAPES[ndim], far))
    assert grid.same_as(Grid(SHAPES[ndim], far), tolerance=0.1)
    assert not grid.same_as(Grid((*SHAPES[ndim][:-1], 6), affine(ndim)))
    turned = affine(ndim)
    turned[:ndim, 0] *= 1.01  # the first corner stays almost, the far ones move
    assert not grid.same_as(Grid(SHAPES[ndim], turned))


@both
def test_batches_of_grids(ndim):
    one, two = affine(ndim), affine(ndim, offset=(1.0, 2.0, 3.0))
    grid = Grid(SHAPES[ndim], torch.stack([one, two]))
    index = grid.index_points(torch.float64)
    for item, a in enumerate((one, two)):
        alone = Grid(SHAPES[ndim], a)
        torch.testing.assert_close(grid.to_world(index)[item], alone.to_world(index)[0])
        torch.testing.assert_close(grid.centre[item], alone.centre[0])
        torch.testing.assert_close(grid.shrink((2,) * ndim).affine[item], alone.shrink((2,) * ndim).affine[0])


@both
def test_points_keep_their_dtype_also_under_autocast(ndim):
    grid = Grid(SHAPES[ndim], affine(ndim))
    index = grid.index_points()
    expected = grid.to_world(index)
    assert expected.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(grid.to_world(index), expected)


@both
def test_a_grid_first_used_under_inference_mode_serves_gradients_later(ndim):
    grid = Grid(SHAPES[ndim], affine(ndim))
    with torch.inference_mode():
        grid.to_index(grid.points())
    m = torch.eye(ndim + 1, dtype=torch.float64)[None].requires_grad_()
    (grid.inverse @ m).sum().backward()
    torch.testing.assert_close(m.grad[0], grid.inverse[0].sum(0)[:, None].expand(-1, ndim + 1))


def broken(ndim, kind):
    a = affine(ndim)
    if kind == "singular":
        a[:, 1] = 2 * a[:, 0]
    elif kind == "zero":
        a[:ndim, 0] = 0
    else:
        a[0, ndim] = float(kind)
    return a


@both
@pytest.mark.parametrize(("kind", "text"), [("singular", "singular.*repair the header"), ("zero", "singular.*no length"),
                                            ("nan", "NaN or infinity"), ("inf", "NaN or infinity")])
def test_broken_affines_are_named(ndim, kind, text):
    with pytest.raises(GeometryError, match=text):
        Grid(SHAPES[ndim], broken(ndim, kind))


@both
def test_wrong_shapes_are_named(ndim):
    with pytest.raises(GeometryError, match=rf"a {ndim}D grid needs \({ndim + 1}, {ndim + 1}\)"):
        Grid(SHAPES[ndim], torch.eye(6 - ndim))
    with pytest.raises(GeometryError, match="empty axis"):
        Grid((0, 4, 4)[:ndim], affine(ndim))
    with pytest.raises(GeometryError, match="2 or 3 spatial axes"):
        Grid((4,) * (3 * ndim - 5), torch.eye(3 * ndim - 4))  # 1 and 4 axes


@both
def test_anisotropy_is_no_singularity(ndim):
    a = torch.diag(torch.tensor([*[1e-4, 30.0, 0.02][:ndim], 1.0], dtype=torch.float64))
    assert Grid(SHAPES[ndim], a).spacing[0].tolist() == pytest.approx([1e-4, 30.0, 0.02][:ndim])


@both
def test_repr_tells_what_one_debugs(ndim):
    grid = Grid(SHAPES[ndim], affine(ndim, (0.0, 0.0, 0.0)))
    assert repr(grid) == {2: "Grid(7×12, 0.7×1.3 mm, RP, cpu)", 3: "Grid(7×12×5, 0.7×1.3×4 mm, RPS, cpu)"}[ndim]
    assert "batch 2" in repr(Grid(SHAPES[ndim], affine(ndim).repeat(2, 1, 1)))


@both
def test_frame_is_centred_and_isotropic(ndim):
    grid = Grid((40, 10, 20)[:ndim], affine(ndim, (0.0, 0.0, 0.0)))
    frame = Frame.of(grid)
    torch.testing.assert_close(frame.centre, grid.centre)
    edges = grid.spacing[0] * torch.tensor(grid.shape)
    assert frame.scale == pytest.approx(float(edges.max()) / 2)
    seen = grid.corners()[0] @ frame.matrix[0, :ndim, :ndim].T + frame.matrix[0, :ndim, ndim]
    assert float(seen.abs().max()) == pytest.approx(1)
    assert bool((seen.abs() <= 1 + 1e-9).all())


@both
def test_rigid_in_the_frame_is_rigid_in_mm_for_unequal_extents(ndim):
    grid = Grid((200, 30, 12)[:ndim], affine(ndim))
    frame = Frame.of(grid)
    theta = torch.tensor([[0.1, -0.3, 0.2, 0.7, -0.4, 0.9]], dtype=torch.float64)[:, : model("rigid").count(ndim)]
    world = frame.world(model("rigid").exp(theta, ndim))
    turn = world[0, :ndim, :ndim]
    torch.testing.assert_close(turn @ turn.T, torch.eye(ndim, dtype=torch.float64))
    points = grid.corners()
    mapped = points @ world[:, :ndim, :ndim].mT + world[:, None, :ndim, ndim]
    torch.testing.assert_close(torch.cdist(mapped, mapped), torch.cdist(points, points))


@both
def test_frame_world_is_the_map_seen_from_the_world(ndim):
    frame = Frame.of(Grid(SHAPES[ndim], torch.stack([affine(ndim), affine(ndim, offset=(9.0, 8.0, 7.0))])))
    m = model("affine")
    theta = 0.3 * torch.randn(2, m.count(ndim), dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    inner = m.exp(theta, ndim)
    x = torch.randn(2, 9, ndim, dtype=torch.float64, generator=torch.Generator().manual_seed(2)) * 30
    u = (x - frame.centre[:, None]) / frame.scale
    v = u @ inner[:, :ndim, :ndim].mT + inner[:, None, :ndim, ndim]
    expected = v * frame.scale + frame.centre[:, None]
    torch.testing.assert_close(Matrix(frame.world(inner))(x), expected)
