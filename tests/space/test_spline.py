"""Thin-plate splines: scipy as oracle, round trips, gradients, fits, and what stiffness does at both its ends."""

from __future__ import annotations

import math
import sys

import numpy as np
import pytest
import torch
from scipy.interpolate import RBFInterpolator

from regkit.errors import GeometryError, OptionError
from regkit.space import Frame, Grid, Matrix, Spline, SplineModel, Transform, model
from regkit.space.transform import Composite, compose, curved

both = pytest.mark.parametrize("ndim", [2, 3], ids=["2D", "3D"])
stiff = pytest.mark.parametrize("stiffness", [0.0, 0.02, 3.0])
SHAPES = {2: (14, 23), 3: (14, 23, 10)}


def grid(ndim, spacing=(1.5, 0.7, 3.0), centre=(20.0, -8.0, 5.0)):
    a = torch.eye(ndim + 1, dtype=torch.float64)
    a[:ndim, :ndim] = torch.diag(torch.tensor(spacing[:ndim], dtype=torch.float64))
    a[:ndim, ndim] = torch.tensor(centre[:ndim]) - a[:ndim, :ndim] @ torch.tensor([(n - 1) / 2 for n in SHAPES[ndim]], dtype=torch.float64)
    return Grid(SHAPES[ndim], a)


def frame(ndim):
    return Frame.of(grid(ndim))


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def inner(ndim, count=40, n=1, seed=1, reach=1.0):
    """World points within the image's edges, times `reach`."""
    share = torch.rand(n, count, ndim, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    f = frame(ndim)
    return f.centre + share * reach * torch.tensor(f.half, dtype=torch.float64) * f.scale


def spline(ndim, n=1, size=0.05, control=4, stiffness=0.0, seed=0):
    m = SplineModel(control, stiffness)
    return m.transform(size * normal(n, m.count(ndim), seed=seed), frame(ndim))


def in_frame(points, ndim):
    f = frame(ndim)
    return (points - f.centre) / f.scale


# ------------------------------------------------------------------------------------------------------------ the lattice

@both
@pytest.mark.parametrize("control", [2, 3, 5])
def test_control_points_span_the_images_outer_edges_last_axis_fastest(ndim, control):
    m, f = SplineModel(control), frame(ndim)
    assert m.count(ndim) == ndim * control**ndim
    points = f.centre + m.points(f) * f.scale
    assert points.shape == (control**ndim, ndim)
    corners = grid(ndim).corners()[0]
    torch.testing.assert_close(points.amin(0), corners.amin(0))
    torch.testing.assert_close(points.amax(0), corners.amax(0))
    lattice = points.reshape(*[control] * ndim, ndim)
    for axis in range(ndim):
        steps = lattice.diff(dim=axis)
        assert bool((steps[..., axis] > 0).all()) and float(steps.std(dim=axis).abs().max() if control > 2 else 0) < 1e-9
        assert float(steps[..., [a for a in range(ndim) if a != axis]].abs().max()) < 1e-9


@both
def test_a_frame_without_edges_has_a_lattice_of_equal_sides(ndim):
    bare = Frame(torch.zeros(1, ndim, dtype=torch.float64), 5.0)
    points = SplineModel(3).points(bare)
    assert points.amin(0).tolist() == [-1] * ndim and points.amax(0).tolist() == [1] * ndim


# --------------------------------------------------------------------------------------------------------------- the map

@both
@stiff
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_theta_zero_is_the_identity(ndim, stiffness, dtype):
    still = spline(ndim, n=2, size=0.0, stiffness=stiffness)
    x = inner(ndim, n=2, reach=3.0).to(dtype)
    for found in (still(x), still.inverse()(x)):
        assert found.dtype == dtype
        torch.testing.assert_close(found, x, rtol=0, atol=1e-10 if dtype == torch.float64 else 1e-4)


@both
def test_without_stiffness_control_points_go_where_they_are_told(ndim):
    f, m = frame(ndim), SplineModel(4)
    bent = spline(ndim, n=3, size=0.2)
    points = m.points(f)
    found = bent(f.centre + points[None] * f.scale)
    told = f.centre + (points + bent.theta.reshape(3, -1, ndim)) * f.scale
    torch.testing.assert_close(found, told, atol=1e-8, rtol=0)
    soft = spline(ndim, n=3, size=0.2, stiffness=0.05)(f.centre + points[None] * f.scale)
    assert float((soft - told).abs().max()) > 0.01 * f.scale


@both
@stiff
@pytest.mark.parametrize("control", [2, 4])
def test_the_map_is_scipys(ndim, stiffness, control):
    bent = spline(ndim, n=2, size=0.1, control=control, stiffness=stiffness)
    x = inner(ndim, n=2, count=60, reach=1.5)
    centres = bent.model.points(bent.frame).numpy()
    kernel = {2: "thin_plate_spline", 3: "linear"}[ndim]
    for i in range(2):
        moves = bent.theta[i].reshape(-1, ndim).numpy()
        u = in_frame(x[i], ndim).numpy()
        expected = u + RBFInterpolator(centres, moves, kernel=kernel, degree=1, smoothing=stiffness)(u)
        np.testing.assert_allclose(in_frame(bent(x)[i], ndim).numpy(), expected, atol=1e-9)


@both
@stiff
def test_affine_moves_cost_nothing(ndim, stiffness):
    f, m = frame(ndim), SplineModel(3, stiffness)
    affine = model("affine").exp(0.3 * normal(1, model("affine").count(ndim), seed=4), ndim)
    moves = (m.points(f)[None] @ affine[:, :ndim, :ndim].mT + affine[:, None, :ndim, ndim]) - m.points(f)
    bent = m.transform(moves.reshape(1, -1), f)
    x = inner(ndim, reach=4.0)
    torch.testing.assert_close(bent(x), Matrix(f.world(affine))(x), atol=1e-8, rtol=0)


@both
def test_a_very_stiff_spline_is_the_affine_fit_of_the_moves(ndim):
    m, f = SplineModel(4, 1e7), frame(ndim)
    theta = 0.2 * normal(2, m.count(ndim), seed=5)
    points = m.points(f)
    ones = torch.cat([points, torch.ones_like(points[:, :1])], 1)
    fitted = torch.linalg.lstsq(ones.expand(2, -1, -1), theta.reshape(2, -1, ndim)).solution  # (2, D + 1, D)
    u = in_frame(inner(ndim), ndim)
    expected = u + torch.cat([u, torch.ones_like(u[..., :1])], -1) @ fitted
    torch.testing.assert_close(in_frame(m.transform(theta, f)(inner(ndim)), ndim), expected, atol=1e-6, rtol=0)


@both
def test_more_stiffness_bends_less(ndim):
    x = inner(ndim, 200)

    def roughness(stiffness):
        bent = spline(ndim, stiffness=stiffness, seed=6)
        u = in_frame(x, ndim)
        ones = torch.cat([u, torch.ones_like(u[..., :1])], -1)[0]
        moves = in_frame(bent(x), ndim)[0] - u[0]
        return float((moves - ones @ torch.linalg.lstsq(ones, moves).solution).norm())

    rough = [roughness(s) for s in (0.0, 0.01, 0.1, 1.0, 10.0)]
    assert rough == sorted(rough, reverse=True) and rough[-1] < 0.3 * rough[0]


@both
@stiff
def test_the_jacobian_is_the_derivative(ndim, stiffness):
    bent = spline(ndim, n=2, stiffness=stiffness)
    u = in_frame(inner(ndim, 7, n=2), ndim)
    rows = torch.autograd.functional.jacobian(bent.bend, u)  # (2, 7, D, 2, 7, D)
    expected = torch.stack([torch.stack([rows[n, p, :, n, p] for p in range(7)]) for n in range(2)])
    torch.testing.assert_close(bent.jacobian(u), expected, atol=1e-9, rtol=0)


@both
def test_items_are_independent_and_one_serves_many(ndim):
    bent, x = spline(ndim, n=3), inner(ndim, n=3)
    for i in range(3):
        alone = Spline(bent.theta[i: i + 1], bent.frame, bent.model)
        torch.testing.assert_close(bent(x)[i: i + 1], alone(x[i: i + 1]))
        torch.testing.assert_close(bent(x[:1])[i: i + 1], alone(x[:1]))
        torch.testing.assert_close(alone(x)[i: i + 1], alone(x[i: i + 1]))
        torch.testing.assert_close(bent.inverse()(x)[i: i + 1], alone.inverse()(x[i: i + 1]), atol=1e-7, rtol=0)
        torch.testing.assert_close(bent.inverse()(x[:1])[i: i + 1], alone.inverse()(x[:1]), atol=1e-7, rtol=0)


@both
def test_points_in_pieces_give_the_same(ndim, monkeypatch):
    bent, x = spline(ndim, n=2), inner(ndim, 50, n=2)
    whole = [t(p) for t in (bent, bent.inverse()) for p in (x, x[:1])]
    monkeypatch.setattr(sys.modules["regkit.space.spline"], "_CHUNK", 300)
    pieces = [t(p) for t in (bent, bent.inverse()) for p in (x, x[:1])]
    for a, b in zip(whole, pieces, strict=True):
        torch.testing.assert_close(a, b, atol=1e-7, rtol=0)


# ----------------------------------------------------------------------------------------------------------- the inverse

@both
@stiff
@pytest.mark.parametrize("control", [2, 4])
def test_the_inverse_undoes(ndim, stiffness, control):
    bent = spline(ndim, n=3, control=control, stiffness=stiffness, seed=7)
    x = inner(ndim, 200, n=3, reach=1.3)
    there = bent(x)
    assert float((there - x).norm(dim=-1).max()) > 0.05 * bent.frame.scale
    back = bent.inverse()
    torch.testing.assert_close(in_frame(back(there), ndim), in_frame(x, ndim), atol=1e-8, rtol=0)
    torch.testing.assert_close(in_frame(bent(back(x)), ndim), in_frame(x, ndim), atol=1e-8, rtol=0)
    assert back.inverse() is bent and back.ndim == bent.ndim == ndim
    assert isinstance(bent, Transform) and isinstance(back, Transform) and curved(bent) and curved(back)


@both
def test_a_composite_with_a_matrix_is_undone_too(ndim):
    shift = Matrix.shift(normal(1, ndim, seed=8) * 30)
    whole = compose(shift, spline(ndim))
    assert isinstance(whole, Composite)
    x = inner(ndim)
    torch.testing.assert_close(whole(x), shift(spline(ndim)(x)))
    torch.testing.assert_close(in_frame(whole.inverse()(whole(x)), ndim), in_frame(x, ndim), atol=1e-8, rtol=0)


@both
def test_a_folded_spline_gives_finite_points_either_way(ndim):
    bent = spline(ndim, n=2, size=1.5, seed=9)
    x = inner(ndim, 100, reach=1.5)
    assert bool((torch.linalg.det(bent.jacobian(in_frame(x, ndim))) < 0).any())  # it folds
    back = bent.inverse()(x)
    assert bool(bent(x).isfinite().all()) and bool(back.isfinite().all())
    near = spline(ndim, n=1, size=0.0).inverse()(inner(ndim, 0))
    assert near.shape == (1, 0, ndim)
    # no step makes a miss larger
    assert bool(((bent(back) - x).norm(dim=-1) <= (bent(x) - x).norm(dim=-1) + 1e-6).all())


@both
@pytest.mark.parametrize("axes", [1, 3], ids=["to a plane", "to a point"])
def test_the_inverse_of_a_spline_that_collapses_is_finite(ndim, axes):
    f, m = frame(ndim), SplineModel(3)
    moves = m.points(f).clone()
    moves[:, axes:] = 0
    flat = m.transform(-moves.reshape(1, -1), f)
    x = inner(ndim)
    assert float(in_frame(flat(x), ndim)[..., :axes].abs().max()) < 1e-9
    assert bool(flat.inverse()(x).isfinite().all())


# ------------------------------------------------------------------------------------------------------------- gradients

@both
@stiff
def test_gradients_forwards_and_backwards(ndim, stiffness):
    m, f = SplineModel(2 if ndim == 3 else 3, stiffness), frame(ndim)
    theta = (0.05 * normal(2, m.count(ndim), seed=10)).requires_grad_()
    x = inner(ndim, 3).requires_grad_()
    assert torch.autograd.gradcheck(lambda t, p: m.transform(t, f)(p), (theta, x), fast_mode=True)
    assert torch.autograd.gradcheck(lambda t, p: m.transform(t, f).inverse()(p), (theta, x), fast_mode=True, eps=1e-5)
    with torch.no_grad():
        assert not m.transform(theta, f).inverse()(x).requires_grad


@both
def test_gradients_at_the_control_points_are_finite(ndim):
    """Where the kernels' own derivatives have their corner."""
    m, f = SplineModel(3), frame(ndim)
    theta = (0.05 * normal(1, m.count(ndim), seed=11)).requires_grad_()
    x = (f.centre + m.points(f)[None] * f.scale).requires_grad_()
    for way in (m.transform(theta, f), m.transform(theta, f).inverse()):
        for grad in torch.autograd.grad(way(x).square().sum(), (theta, x)):
            assert bool(grad.isfinite().all())


# ------------------------------------------------------------------------------------------------------------------- fit

@both
@pytest.mark.parametrize("stiffness", [0.0, 0.02])
def test_fit_recovers_a_spline_from_noise_free_points(ndim, stiffness):
    m = SplineModel(3, stiffness)
    truth = m.transform(0.1 * normal(2, m.count(ndim), seed=12), frame(ndim))
    p = inner(ndim, 200, n=2)
    found = m.fit(p, truth(p), None, frame(ndim))
    assert isinstance(found, Spline) and found.model == m
    other = inner(ndim, 100, n=2, seed=13)
    torch.testing.assert_close(found(other), truth(other), atol=1e-3, rtol=0)  # mm; the pull towards the identity
    if stiffness == 0:
        torch.testing.assert_close(found.theta, truth.theta, atol=1e-4, rtol=0)


@both
def test_fit_honours_weights_and_is_least_squares(ndim):
    m, f = SplineModel(3), frame(ndim)
    truth = m.transform(0.1 * normal(1, m.count(ndim), seed=14), f)
    p = inner(ndim, 240)
    q = truth(p) + 0.3 * normal(1, 240, ndim, seed=15)
    q[:, 200:] += 50
    w = torch.ones(1, 240, dtype=torch.float64)
    w[:, 200:] = 0
    found = m.fit(p, q, w, f)
    torch.testing.assert_close(found.theta, m.fit(p[:, :200], q[:, :200], None, f).theta, atol=1e-6, rtol=0)
    w[:, :200] = torch.rand(1, 200, dtype=torch.float64, generator=torch.Generator().manual_seed(16)) + 0.1
    best = m.fit(p, q, w, f)

    def error(theta):
        return float((w[..., None] * (Spline(theta, f, m)(p) - q) ** 2).sum())

    for seed in range(5):
        assert error(best.theta + 1e-3 * normal(1, m.count(ndim), seed=seed)) > error(best.theta)
    assert error(best.theta) < error(found.theta) < error(torch.zeros_like(best.theta))


@both
def test_fit_of_too_few_points_pulls_towards_the_identity(ndim):
    m, f = SplineModel(4), frame(ndim)
    p = inner(ndim, 3)
    q = p + 0.5
    found = m.fit(p, q, None, f)
    torch.testing.assert_close(found(p), q, atol=1e-3, rtol=0)
    assert float(found.theta.abs().max()) < 5 * 0.5 / f.scale
    for wrong in (q[:, :2], q[0]):
        with pytest.raises(GeometryError, match=r"points: shapes .* expected equal \(N, P, D\)"):
            m.fit(p if wrong.ndim == 3 else p[0], wrong, None, f)


# ------------------------------------------------------------------------------------------------- what it says and refuses

@both
def test_what_does_not_fit_is_named(ndim):
    m, f = SplineModel(3), frame(ndim)
    for shape in ((1, m.count(ndim) - 1), (m.count(ndim),), (1, 3**ndim, ndim)):
        with pytest.raises(GeometryError, match=rf"theta: shape .*3 control points an axis in {ndim}D need \(N, {m.count(ndim)}\)"):
            m.transform(torch.zeros(shape), f)
    for bad in (math.nan, math.inf):
        with pytest.raises(GeometryError, match="theta: holds NaN or infinity"):
            m.transform(torch.full((1, m.count(ndim)), bad), f)
    with pytest.raises(GeometryError, match=rf"points: shape .* expected \(N, P, {ndim}\)"):
        spline(ndim)(torch.zeros(1, 4, 5 - ndim))
    with pytest.raises(GeometryError, match="points"):
        spline(ndim)(torch.zeros(4, ndim))


def test_wrong_numbers_are_refused():
    for control in (1, 0, -3, 2.5):
        with pytest.raises(OptionError, match=r"control: .*2 or more control points along each axis"):
            SplineModel(control)
    for stiffness in (-0.1, math.nan, math.inf):
        with pytest.raises(OptionError, match=r"stiffness: .*expected a number from 0 on"):
            model("tps", stiffness=stiffness)


@both
def test_it_says_what_it_is_and_goes_to_a_device(ndim):
    bent = spline(ndim, n=2, size=0.0, control=3, stiffness=0.25)
    bent.theta[0, 0] = 0.5
    furthest = f"{0.5 * bent.frame.scale:.3g} mm"
    assert repr(bent) == f"Spline({ndim}D, 3^{ndim} control points, stiffness 0.25, moved by up to {furthest}, fixed → moving)"
    there = bent.to("cpu")
    assert isinstance(there, Spline) and torch.equal(there(inner(ndim)), bent(inner(ndim))) and there.frame.half == bent.frame.half
