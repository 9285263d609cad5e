"""Transform models: groups, their parameters, closed-form fits and projections."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from regkit.errors import GeometryError, OptionError
from regkit.space import MODEL_NAMES, MODELS, Frame, SplineModel, model

both = pytest.mark.parametrize("ndim", [2, 3], ids=["2D", "3D"])
NAMES = list(MODELS)
every = pytest.mark.parametrize("name", NAMES)
COUNTS = {"translation": (2, 3), "attention": (3, 4), "rigid": (3, 6), "similarity": (4, 7), "affine": (6, 12), "projective": (8, 15)}
number = st.floats(-1.2, 1.2)


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def member(name, ndim, seed=0, size=0.4, n=1):
    return model(name).exp(size * normal(n, model(name).count(ndim), seed=seed), ndim)


def perspective(ndim, seed=0, size=0.2, n=1, centre=5.0, scale=9.0):
    """Projective maps of the world in a frame there: the horizon stays away from points in that frame's unit ball."""
    found = Frame(torch.full((1, ndim), centre, dtype=torch.float64), scale).world(member("projective", ndim, seed, size, n))
    return scaled(found)


def carry(matrix, points):
    lifted = torch.cat([points, torch.ones_like(points[..., :1])], -1) @ matrix.mT
    return lifted[..., :-1] / lifted[..., -1:]


def scaled(matrix):
    """Of all matrices that are the same map, the one whose last entry is 1."""
    return matrix / matrix[:, -1:, -1:]


def belongs(name, matrix):
    """How far matrices (N, D+1, D+1) are from the model."""
    d = matrix.shape[-1] - 1
    linear = matrix[:, :d, :d]
    scale = torch.ones(len(matrix), dtype=matrix.dtype)
    if name == "projective":
        return 0.0
    last = float((matrix[:, d] - torch.eye(d + 1, dtype=matrix.dtype)[d]).abs().max())
    if name == "affine":
        return last
    if name in ("translation", "attention"):
        scale = linear[:, 0, 0] if name == "attention" else scale
        return last + float((linear - scale[:, None, None] * torch.eye(d, dtype=matrix.dtype)).abs().max() + (-scale).clamp_min(0).max())
    if name == "similarity":
        scale = torch.linalg.det(linear) ** (1 / d)
    turn = linear / scale[:, None, None]
    return last + float((turn @ turn.mT - torch.eye(d, dtype=matrix.dtype)).abs().max() + (torch.linalg.det(turn) - 1).abs().max())


@both
def test_generators_are_nested_prefixes(ndim):
    chain = [model(name).generators(ndim) for name in ("translation", "rigid", "similarity", "affine", "projective")]
    for small, large in itertools.pairwise(chain):
        assert torch.equal(large[: len(small)], small)
    attention = model("attention").generators(ndim)
    assert torch.equal(attention[:-1], chain[0]) and torch.equal(attention[-1], chain[2][-1])
    for name, counts in COUNTS.items():
        assert model(name).count(ndim) == len(model(name).generators(ndim)) == counts[ndim - 2]
    for generators, rank in zip(chain[-2:], (ndim**2 + ndim, (ndim + 1) ** 2 - 1), strict=True):
        assert int(torch.linalg.matrix_rank(generators.flatten(1))) == len(generators) == rank  # a basis
    assert not chain[-2][:, ndim].any()
    tilts = chain[-1][len(chain[-2]):]
    assert torch.equal(tilts[:, ndim, :ndim], torch.eye(ndim, dtype=torch.float64)) and int((tilts != 0).sum()) == ndim


@both
@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16], ids=str)
def test_theta_zero_is_exactly_the_identity(ndim, name, dtype):
    m = model(name)
    found = m.exp(torch.zeros(3, m.count(ndim), dtype=dtype), ndim)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.equal(found, torch.eye(ndim + 1, dtype=found.dtype).expand(3, -1, -1))


@both
@every
@settings(deadline=None, max_examples=15)
@given(values=st.lists(number, min_size=15, max_size=15))
def test_exp_stays_in_the_model(ndim, name, values):
    m = model(name)
    theta = torch.tensor([values], dtype=torch.float64)[:, : m.count(ndim)]
    found = m.exp(theta, ndim)
    assert belongs(name, found) < 1e-9
    assert float(torch.linalg.det(found[0])) > 0
    if name != "projective":
        assert torch.equal(found[0, ndim], torch.eye(ndim + 1, dtype=torch.float64)[ndim])
    elif not theta[0, -ndim:].any():
        torch.testing.assert_close(found[0, ndim], torch.eye(ndim + 1, dtype=torch.float64)[ndim])
    torch.testing.assert_close(m.exp(-theta, ndim) @ found, torch.eye(ndim + 1, dtype=torch.float64)[None], atol=1e-9, rtol=0)
    if name == "translation":
        torch.testing.assert_close(found[0, :ndim, ndim], theta[0], rtol=1e-12, atol=1e-12)


@both
def test_a_skew_parameter_is_an_angle_in_radians(ndim):
    planes = {2: [(0, 1)], 3: [(0, 1), (0, 2), (1, 2)]}[ndim]
    for p, (i, j) in enumerate(planes):
        theta = torch.zeros(1, model("rigid").count(ndim), dtype=torch.float64)
        theta[0, ndim + p] = 0.6
        turn = model("rigid").exp(theta, ndim)[0, :ndim, :ndim]
        x = torch.zeros(ndim, dtype=torch.float64)
        x[i] = 1
        y = turn @ x
        assert math.atan2(y[j], y[i]) == pytest.approx(0.6)
        assert float(turn.trace()) == pytest.approx(ndim - 2 + 2 * math.cos(0.6))


@both
def test_the_scale_parameter_is_the_logarithm_of_the_factor(ndim):
    theta = torch.zeros(1, model("similarity").count(ndim), dtype=torch.float64)
    theta[0, -1] = math.log(1.7)
    found = model("similarity").exp(theta, ndim)[0, :ndim, :ndim]
    torch.testing.assert_close(found, 1.7 * torch.eye(ndim, dtype=torch.float64))


@both
@every
def test_exp_gradients(ndim, name):
    m = model(name)
    for size in (0.0, 0.5):  # at the start, where training begins, and away from it
        theta = (size * normal(2, m.count(ndim))).requires_grad_()
        assert torch.autograd.gradcheck(lambda t: m.exp(t, ndim), theta)


@both
@every
def test_fit_recovers_members_from_noise_free_points(ndim, name):
    truth = perspective(ndim, seed=3, n=4) if name == "projective" else member(name, ndim, seed=3, size=0.8, n=4)
    p = normal(4, 20, ndim, seed=4) * 3 + 5
    q = carry(truth, p)
    found = model(name).fit(p, q)
    torch.testing.assert_close(scaled(found), truth, atol=1e-4 if name == "affine" else 1e-9, rtol=0)  # the affine fit has a ridge
    assert belongs(name, found) < 1e-9


@both
@every
def test_fit_reaches_large_rotations(ndim, name):
    if name == "translation":
        truth = member(name, ndim, size=50.0)
    else:
        theta = torch.zeros(1, model(name).count(ndim), dtype=torch.float64)
        theta[0, ndim] = math.pi - 1e-3
        truth = model(name).exp(theta, ndim)
    p = normal(1, 12, ndim, seed=4)
    torch.testing.assert_close(model(name).fit(p, carry(truth, p)), truth, atol=1e-4, rtol=0)


@both
@every
def test_points_of_zero_weight_are_not_looked_at(ndim, name):
    truth = perspective(ndim, seed=5, centre=0.0, scale=3.0) if name == "projective" else member(name, ndim, seed=5)
    p = normal(1, 30, ndim, seed=6)
    q = carry(truth, p)
    q[:, 20:] += 100 * normal(1, 10, ndim, seed=7)
    w = torch.rand(1, 30, dtype=torch.float64, generator=torch.Generator().manual_seed(8)) + 0.1
    w[:, 20:] = 0
    found = model(name).fit(p, q, w)
    torch.testing.assert_close(scaled(found), truth, atol=1e-4, rtol=0)
    torch.testing.assert_close(found, model(name).fit(p[:, :20], q[:, :20], w[:, :20]))
    torch.testing.assert_close(found, model(name).fit(p, q, 7 * w))


@both
@every
def test_fit_is_optimal(ndim, name):
    m = model(name)
    p = normal(1, 40, ndim, seed=9) + 2
    q = carry(member("affine", ndim, seed=10), p) + 0.3 * normal(1, 40, ndim, seed=11)
    w = torch.rand(1, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(12))

    def error(matrix):
        return float((w[..., None] * (carry(matrix, p) - q) ** 2).sum())

    found = m.fit(p, q, w)
    least = error(found)
    for k in range(m.count(ndim)):
        for step in (-0.01, 0.01):
            theta = torch.zeros(1, m.count(ndim), dtype=torch.float64)
            theta[0, k] = step
            assert error(m.exp(theta, ndim) @ found) > least
            assert error(found @ m.exp(theta, ndim)) > least
    assert error(m.fit(p, q)) > least  # the weights are what made it optimal


@both
@every
def test_fit_of_mirrored_points_never_mirrors(ndim, name):
    p = normal(3, 25, ndim, seed=13) * torch.tensor([3.0, 2.0, 1.0])[:ndim]
    q = p.clone()
    q[..., 0] *= -1
    found = model(name).fit(p, q)
    assert bool((torch.linalg.det(found) > 0).all())
    assert belongs(name, found) < 1e-9


@both
def test_affine_fit_of_too_few_points_falls_back_to_the_similarity(ndim):
    truth = member("similarity", ndim, seed=14)
    line = torch.zeros(1, 5, ndim, dtype=torch.float64)
    line[0, :, :2] = normal(1, 5, 1, seed=15)[0] if ndim == 2 else normal(1, 5, 2, seed=15)[0]
    found = model("affine").fit(line, carry(truth, line))
    torch.testing.assert_close(carry(found, line), carry(truth, line), atol=1e-5, rtol=0)
    assert float(torch.linalg.det(found[0])) > 0


@both
@every
def test_fit_refuses_points_that_do_not_pair(ndim, name):
    with pytest.raises(GeometryError, match=r"points: shapes .* expected equal \(N, P, D\)"):
        model(name).fit(normal(1, 5, ndim), normal(1, 6, ndim))
    with pytest.raises(GeometryError, match="points"):
        model(name).fit(normal(5, ndim), normal(5, ndim))


@both
@every
def test_projection_is_a_member_is_idempotent_and_keeps_the_centre(ndim, name):
    m = model(name)
    given_ = member("affine", ndim, seed=16, size=0.5, n=3)
    centre = 40 * normal(1, ndim, seed=17)
    once = m.project(given_, centre)
    assert belongs(name, once) < 1e-9
    torch.testing.assert_close(carry(once, centre[None]), carry(given_, centre[None]))
    torch.testing.assert_close(m.project(once, centre), once)
    own = member(name, ndim, seed=18, n=3)
    torch.testing.assert_close(scaled(m.project(own, centre)), scaled(own))


@both
@every
def test_a_projective_map_is_projected_by_its_linearisation(ndim, name):
    """Which keeps the centre's image and its derivative there."""
    centre = 5 + normal(3, ndim, seed=20)
    given_ = perspective(ndim, seed=21, n=3)
    if name == "projective":
        torch.testing.assert_close(scaled(model(name).project(given_ * 7, centre)), given_)
        return
    found = model(name).project(given_, centre)
    torch.testing.assert_close(carry(found, centre[:, None]), carry(given_, centre[:, None]))
    steps = 1e-5 * torch.cat([torch.eye(ndim, dtype=torch.float64), -torch.eye(ndim, dtype=torch.float64)])
    around = carry(given_, centre[:, None] + steps)
    slope = (around[:, :ndim] - around[:, ndim:]).mT / 2e-5
    torch.testing.assert_close(found[:, :ndim, :ndim], model(name).nearest(slope), atol=1e-8, rtol=1e-8)


@both
def test_projective_maps_keep_lines_and_compose(ndim):
    maps = perspective(ndim, seed=22, n=2)
    ends = 5 + normal(1, 2, ndim, seed=23)
    share = torch.linspace(0, 1, 5, dtype=torch.float64)[None, :, None]
    line = carry(maps, ends[:, :1] * (1 - share) + ends[:, 1:] * share)
    along = line[:, 1:] - line[:, :1]
    assert int(torch.linalg.matrix_rank(along, tol=1e-9).max()) == 1
    steps = (line[:, 1:] - line[:, :-1]).norm(dim=-1)
    assert float((steps.amax(1) / steps.amin(1)).min()) > 1.005  # what an affine map keeps: equal steps
    p = 5 + normal(1, 9, ndim, seed=24)
    torch.testing.assert_close(carry(maps[:1] @ maps[1:], p), carry(maps[:1], carry(maps[1:], p)))
    torch.testing.assert_close(carry(torch.linalg.inv(maps), carry(maps, p)), p.expand(2, -1, -1))


@both
def test_projective_fits_of_noisy_points_are_no_worse_than_affine_ones_and_keep_the_horizon_away(ndim):
    p = 5 + 3 * normal(30, 30, ndim, seed=25)
    q = carry(perspective(ndim, seed=26, n=30, size=0.1), p.clamp(-2, 12)) + 1.5 * normal(30, 30, ndim, seed=27)
    found, affine = model("projective").fit(p, q), model("affine").fit(p, q)
    error = [(carry(m, p) - q).square().sum((1, 2)) for m in (found, affine)]
    assert bool((error[0] < error[1]).all())
    depth = (torch.cat([p, torch.ones_like(p[..., :1])], -1) @ found[:, ndim, :, None])[..., 0]
    assert bool((depth > 0).all()) and bool((torch.linalg.det(found) > 0).all())
    alone = model("projective").fit(p[3:4], q[3:4])
    torch.testing.assert_close(found[3:4], alone, atol=1e-6, rtol=1e-6)


@both
@pytest.mark.parametrize("centre", [0.0, 100.0, 300.0])
def test_projective_fits_keep_their_orientation_wherever_the_world_has_its_origin(ndim, centre):
    """Also where the origin lies behind the horizon."""
    theta = torch.zeros(1, model("projective").count(ndim), dtype=torch.float64)
    theta[0, -ndim] = 0.3
    frame = Frame(torch.full((1, ndim), centre, dtype=torch.float64), 50.0)
    truth = frame.world(model("projective").exp(theta, ndim))
    p = centre + 50 * (torch.rand(1, 30, ndim, dtype=torch.float64, generator=torch.Generator().manual_seed(30)) * 2 - 1)
    found = model("projective").fit(p, carry(truth, p))
    torch.testing.assert_close(carry(found, p), carry(truth, p), atol=1e-6, rtol=0)
    assert float(torch.linalg.det(found[0])) > 0


@both
def test_projective_fits_of_too_few_points_are_finite(ndim):
    p = normal(1, ndim + 1, ndim, seed=28)
    q = p + 0.1 * normal(1, ndim + 1, ndim, seed=29)
    found = model("projective").fit(p, q)
    assert bool(found.isfinite().all()) and float(torch.linalg.det(found[0])) > 0
    torch.testing.assert_close(carry(found, p), q, atol=1e-3, rtol=0)


@both
@every
def test_projection_is_the_nearest_member(ndim, name):
    m = model(name)
    given_ = member("affine", ndim, seed=19, size=0.5)
    linear = given_[:, :ndim, :ndim]
    found = m.project(given_, torch.zeros(1, ndim, dtype=torch.float64))[:, :ndim, :ndim]
    least = float((found - linear).norm())
    steps = m.generators(ndim)[ndim:, :ndim, :ndim]
    if name in ("affine", "projective"):
        assert least == 0
        return
    for g in steps:
        for size in (-0.05, 0.05):
            assert float((torch.linalg.matrix_exp(size * g) @ found - linear).norm()) > least
    if name == "translation":
        assert torch.equal(found[0], torch.eye(ndim, dtype=torch.float64))


@both
@pytest.mark.parametrize("name", ["rigid", "similarity"])
def test_projection_of_a_mirror_is_proper(ndim, name):
    mirror = torch.eye(ndim + 1, dtype=torch.float64)[None].clone()
    mirror[0, 0, 0] = -1.5
    mirror[0, 1, 1] = 2.0
    found = model(name).project(mirror, torch.zeros(1, ndim, dtype=torch.float64))
    assert float(torch.linalg.det(found[0])) > 0
    assert belongs(name, found) < 1e-9


def test_models_by_name():
    assert list(MODEL_NAMES) == [*MODELS, "tps"]
    assert [MODELS[name].name for name in MODELS] == list(MODELS)
    assert [name for name in MODELS if not MODELS[name].affine] == ["projective"]
    spline = model("tps", control=3, stiffness=0.25)
    assert spline == SplineModel(3, 0.25) and spline.name == "tps" and spline.count(2) == 18 and spline.count(3) == 81
    assert model("tps") == SplineModel(4, 0.0)


@pytest.mark.parametrize(("wrong", "nearest"), [
    ("afine", "affine"), ("Rigid", "rigid"), ("similar", "similarity"), ("tsp", "tps"), ("projectiv", "projective")])
def test_a_wrong_name_is_told_the_nearest(wrong, nearest):
    with pytest.raises(OptionError, match=f"model: '{wrong}' is not known.*nearest: {nearest}"):
        model(wrong)
