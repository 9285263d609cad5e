"""Random poses and shapes: the same numbers give the same ones, they keep their limits, and bends can be undone."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import stats

from regkit.space import Frame, Grid
from regkit.space.models import nearest_rotation
from regkit.training.poses import Bends, Poses, turned

both = pytest.mark.parametrize("ndim", [2, 3], ids=["2D", "3D"])


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def angles(rotations):
    """(N,) radians of rotations (N, D, D), from 0 to π."""
    d = rotations.shape[-1]
    trace = rotations.diagonal(dim1=1, dim2=2).sum(1)
    return ((trace - (d - 2)) / 2).clamp(-1, 1).acos()


# --------------------------------------------------------------------------------------------------------------- rotations

@both
@pytest.mark.parametrize("turn", [0.0, 0.3, 2.0, math.pi])
def test_rotations_are_proper_and_within_their_limit(ndim, turn):
    found = turned(2000, ndim, turn, seeded())
    assert found.shape == (2000, ndim, ndim) and found.dtype == torch.float64
    eye = torch.eye(ndim, dtype=torch.float64).expand_as(found)
    torch.testing.assert_close(found @ found.mT, eye, atol=1e-9, rtol=0)
    torch.testing.assert_close(torch.linalg.det(found), torch.ones(2000, dtype=torch.float64))
    said = angles(found)
    assert 0.95 * turn <= float(said.max()) <= turn + 1e-6  # no further, and all the way
    if turn:
        assert float(said.min()) < 0.1 * turn or turn == math.pi


def test_rotations_of_space_are_spread_evenly():
    """Over all of SO(3): the mean of the trace is 0, every axis goes everywhere, and angles have Haar's density (1 - cos) / π."""
    found = turned(4000, 3, math.pi, seeded())
    assert float(found.diagonal(dim1=1, dim2=2).sum(1).mean()) == pytest.approx(0, abs=0.06)  # its standard error is 0.016
    assert float(found.mean(0).abs().max()) < 0.04
    for column in found.unbind(2):
        assert all(stats.kstest(component.numpy(), "uniform", (-1, 2)).pvalue > 1e-3 for component in column.unbind(1))  # Archimedes
    assert stats.kstest(angles(found).numpy(), lambda a: (a - torch.sin(torch.as_tensor(a)).numpy()) / math.pi).pvalue > 1e-3


def test_smaller_turns_are_even_in_their_angle_about_any_axis():
    found = turned(4000, 3, 1.2, seeded())
    assert stats.kstest(angles(found).numpy(), "uniform", (0, 1.2)).pvalue > 1e-3
    axis = torch.stack([found[:, 2, 1] - found[:, 1, 2], found[:, 0, 2] - found[:, 2, 0], found[:, 1, 0] - found[:, 0, 1]], 1)
    axis = axis / axis.norm(dim=1, keepdim=True)
    assert all(stats.kstest(component.numpy(), "uniform", (-1, 2)).pvalue > 1e-3 for component in axis.unbind(1))


@pytest.mark.parametrize("turn", [0.5, math.pi])
def test_turns_of_the_plane_are_even_to_either_side(turn):
    found = turned(4000, 2, turn, seeded())
    said = torch.atan2(found[:, 1, 0], found[:, 0, 0])
    assert stats.kstest(said.numpy(), "uniform", (-turn, 2 * turn)).pvalue > 1e-3


# ------------------------------------------------------------------------------------------------------------------- poses

@both
def test_the_same_numbers_give_the_same_poses(ndim):
    torch.manual_seed(0)
    one = Poses().draw(5, ndim, seeded(3))
    torch.manual_seed(1)  # nothing comes from elsewhere
    assert torch.equal(Poses().draw(5, ndim, seeded(3)), one)
    assert not torch.allclose(Poses().draw(5, ndim, seeded(4)), one)
    assert float((one[1:] - one[:-1]).abs().amax((1, 2)).min()) > 0.01  # each item another pose
    draw = seeded(3)
    first, second = Poses().draw(5, ndim, draw), Poses().draw(5, ndim, draw)
    assert torch.equal(first, one) and not torch.allclose(second, one)


@both
def test_no_differences_are_the_identity(ndim):
    found = Poses(0, 0, 0, 0).draw(3, ndim, seeded())
    assert found.dtype == torch.float64
    assert torch.equal(found, torch.eye(ndim + 1, dtype=torch.float64).expand(3, -1, -1))


@both
def test_each_number_does_what_it_says(ndim):
    """Standard deviations of the shift and of the logarithms of size and stretches, cut off at three."""
    poses = Poses(turn=0.7, shift=0.2, scale=0.15, stretch=0.05)
    found = poses.draw(4000, ndim, seeded())
    assert torch.equal(found[:, ndim], torch.eye(ndim + 1, dtype=torch.float64)[ndim].expand(4000, -1))
    shift, linear = found[:, :ndim, ndim], found[:, :ndim, :ndim]
    assert shift.std(0).tolist() == pytest.approx([0.2] * ndim, rel=0.06) and float(shift.mean(0).abs().max()) < 0.02
    assert 0.5 < float(shift.abs().max()) <= 0.6 + 1e-9
    turn = nearest_rotation(linear)
    assert float(angles(turn).max()) <= 0.7 + 1e-6
    size = torch.linalg.det(linear).log() / ndim
    assert float(size.std()) == pytest.approx(0.15, rel=0.06) and float(size.abs().max()) <= 0.45 + 1e-9
    only = Poses(turn=0, shift=0, scale=0, stretch=0.05).draw(4000, ndim, seeded())[:, :ndim, :ndim]
    torch.testing.assert_close(torch.linalg.det(only), torch.ones(4000, dtype=torch.float64))
    assert float(only[:, 0, 1].std()) == pytest.approx(0.05 / 2, rel=0.1)
    assert float((only - only.mT).abs().max()) < 1e-12


@both
def test_the_turn_comes_after_the_stretch(ndim):
    """Which are drawn first: the same numbers without a turn give the stretches alone."""
    (found, alone) = (Poses(turn=turn, stretch=0.2).draw(50, ndim, seeded())[:, :ndim, :ndim] for turn in (1.0, 0.0))
    turn = found @ torch.linalg.inv(alone)
    torch.testing.assert_close(turn @ turn.mT, torch.eye(ndim, dtype=torch.float64).expand_as(turn), atol=1e-9, rtol=0)
    assert float((alone - alone.mT).abs().max()) < 1e-9 and float(angles(turn).max()) > 0.8


@both
def test_shifts_do_not_depend_on_the_turn(ndim):
    """The shift acts last: the centre goes where it says, however the rest is turned."""
    found = Poses(turn=math.pi, shift=0.1, scale=0.3).draw(4000, ndim, seeded())
    assert found[:, :ndim, ndim].std(0).tolist() == pytest.approx([0.1] * ndim, rel=0.06)


# ------------------------------------------------------------------------------------------------------------------- bends

@both
def test_bends_are_undone_by_back(ndim):
    bends = Bends.draw(3, ndim, 0.03, 4, seeded()) + Bends.draw(3, ndim, 0.01, 8, seeded(1))
    points = torch.rand(3, 200, ndim, generator=seeded(2), dtype=torch.float64) * 2 - 1
    assert float((bends(points) - points).norm(dim=-1).max()) > 0.03
    torch.testing.assert_close(bends(bends.back(points)), points, atol=1e-5, rtol=0)
    torch.testing.assert_close(bends.back(bends(points)), points, atol=1e-5, rtol=0)
    assert bends.back(points).dtype == bends(points).dtype == torch.float64
    assert bends(points.float()).dtype == torch.float32


@both
def test_the_same_numbers_give_the_same_bends(ndim):
    torch.manual_seed(0)
    one = Bends.draw(2, ndim, 0.1, 4, seeded(3)).field
    torch.manual_seed(1)
    assert torch.equal(Bends.draw(2, ndim, 0.1, 4, seeded(3)).field, one)
    assert not torch.allclose(Bends.draw(2, ndim, 0.1, 4, seeded(4)).field, one)
    assert not torch.allclose(one[0], one[1])


@both
def test_a_field_is_read_where_its_lattice_lies(ndim):
    """One and a half times as wide as the frame, around its centre: the lattice's points are displaced by what the field holds there."""
    field = torch.rand(2, ndim, *[12] * ndim, generator=seeded())
    lattice = Grid((12,) * ndim, torch.diag(torch.tensor([*[3 / 12] * ndim, 1.0], dtype=torch.float64)))
    places = lattice.points() - lattice.centre[:, None]
    assert float(Frame.of(lattice).scale) == pytest.approx(1.5)
    torch.testing.assert_close(Bends(field)(places), places + field.flatten(2).mT.double(), atol=1e-5, rtol=0)


@both
def test_a_bend_is_zero_on_average_and_as_large_as_it_is_asked_to_be(ndim):
    points = torch.rand(1, 500, ndim, generator=seeded(2), dtype=torch.float64) * 2 - 1
    moved = Bends.draw(60, ndim, 0.1, 4, seeded())(points) - points
    assert moved.shape == (60, 500, ndim) and float(moved.mean()) == pytest.approx(0, abs=0.01)
    # between the points that are drawn and behind the smoothing it is smaller than at them
    assert 0.3 * 0.1 < float(moved.std()) < 0.1
    twice = Bends.draw(60, ndim, 0.2, 4, seeded())(points) - points
    torch.testing.assert_close(twice, 2 * moved, atol=1e-5, rtol=0)


@both
def test_more_cells_bend_more_tightly(ndim):
    """What lies a quarter of the frame apart moves alike under few cells, and independently under many."""
    points = torch.rand(1, 200, ndim, generator=seeded(2), dtype=torch.float64) - 0.5
    aside = points.clone()
    aside[..., 0] += 0.5

    def alike(cells):
        bends = Bends.draw(80, ndim, 0.1, cells, seeded())
        a, b = bends(points) - points, bends(aside) - aside
        return float((a * b).mean() / (a.square().mean() * b.square().mean()).sqrt())

    assert alike(2) > 0.5 > 0.2 > alike(8)


@both
def test_bends_are_added(ndim):
    a, b = Bends.draw(2, ndim, 0.1, 4, seeded()), Bends.draw(2, ndim, 0.1, 4, seeded(1))
    points = torch.rand(2, 100, ndim, generator=seeded(2), dtype=torch.float64) * 2 - 1
    torch.testing.assert_close((a + b)(points) - points, a(points) + b(points) - 2 * points, atol=1e-5, rtol=0)
    fine = Bends.draw(2, ndim, 0.1, 8, seeded(1))
    assert (a + fine).field.shape == a.field.shape  # read on the first one's lattice
    away = (a + fine)(points) - points - (a(points) + fine(points) - 2 * points)
    assert float(away.std()) < 0.3 * float((fine(points) - points).std())
