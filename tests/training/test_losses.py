"""What nets are trained by: each term smallest at the truth, with a gradient that leads there, and there exactly when it is asked for."""

from __future__ import annotations

import math

import pytest
import torch

from regkit.localisation import Detector, KeypointNet, RegressionNet
from regkit.localisation.keypoints import centres
from regkit.registration.settings import SIMILARITY_NAMES
from regkit.space import MODELS
from regkit.space.grid import apply_matrix
from regkit.training.losses import Localising, Loss, displacement, moved_by, point_loss, stretches
from regkit.training.synthesis import canvas_points

both = pytest.mark.parametrize("ndim", [2, 3], ids=["2D", "3D"])
EDGE = 16


def some_map(name, ndim, n=1, seed=0, size=0.3):
    draw = torch.Generator().manual_seed(seed)
    return MODELS[name].exp(size * torch.randn(n, MODELS[name].count(ndim), generator=draw, dtype=torch.float64), ndim)


def identity(ndim, n=1):
    return torch.eye(ndim + 1, dtype=torch.float64).repeat(n, 1, 1)


def shifted(ndim, *by):
    """A map that shifts by so many voxels along each axis."""
    maps = identity(ndim)
    maps[0, :ndim, ndim] = torch.tensor([*by, 0.0, 0.0][:ndim], dtype=torch.float64) * 2 / EDGE
    return maps


def blobs(ndim, maps=None, seed=0, count=7):
    """Canvases (N, 1, *S) of smooth blobs, as they look where maps carry a canvas' points."""
    draw = torch.Generator().manual_seed(seed)
    middles, heights = 0.9 * torch.rand(count, ndim, generator=draw, dtype=torch.float64) - 0.45, torch.rand(count, generator=draw) + 0.3
    at = canvas_points((EDGE,) * ndim).double()
    at = at if maps is None else apply_matrix(maps, at)
    found = (heights * torch.exp(-torch.cdist(at, middles[None]).square() / (2 * 0.2**2))).sum(-1)
    return (found / found.amax(1, keepdim=True)).float().reshape(-1, 1, *[EDGE] * ndim)


def batch(ndim, truth, **more):
    """Two items: the second one of two scans that have no known map."""
    fixed = torch.cat([blobs(ndim, truth), blobs(ndim, truth, seed=1)])
    moving = torch.cat([blobs(ndim), blobs(ndim)])
    return {"fixed": fixed, "moving": moving, "fixed_seen": fixed, "moving_seen": moving, "known": truth.repeat(2, 1, 1),
            "is_known": torch.tensor([1.0, 0.0]), **more}


def with_points(ndim, truth, points=4):
    moving = 0.8 * torch.rand(2, points, ndim, generator=torch.Generator().manual_seed(3)) - 0.4
    back = apply_matrix(torch.linalg.inv(truth), moving.double()).float()
    return {"fixed_points": back, "moving_points": moving, "has_points": torch.tensor([1.0, 0.0])}


def with_labels(ndim, truth):
    marks = {name: (blobs(ndim, maps) > 0.4).float().repeat(2, 1, *[1] * ndim)
             for name, maps in (("fixed_labels", truth), ("moving_labels", None))}
    return {key: torch.cat([value, value > 1], 1).float() for key, value in marks.items()}  # the second label is nowhere


def saying(maps):
    """A net that says these maps, and no points."""
    return lambda fixed, moving: (maps, None)


# -------------------------------------------------------------------------------------------------------------- what is moved

@both
def test_the_identity_moves_nothing(ndim):
    canvas = torch.rand(2, 3, *[EDGE] * ndim, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(moved_by(identity(ndim, 2), canvas, canvas.shape[2:]), canvas, atol=1e-5, rtol=0)


@both
@pytest.mark.parametrize("axis", [0, 1, -1])
def test_a_shift_by_whole_voxels_is_a_roll(ndim, axis):
    """Of every channel; what comes from outside is nothing. A map leads from fixed to moving points: what lay 3 voxels further comes."""
    canvas = torch.rand(1, 2, *[EDGE] * ndim, generator=torch.Generator().manual_seed(0))
    by = [0.0] * ndim
    by[axis] = 3.0
    oracle = canvas.roll(-3, 2 + axis % ndim)
    oracle.narrow(2 + axis % ndim, EDGE - 3, 3).zero_()
    torch.testing.assert_close(moved_by(shifted(ndim, *by), canvas, canvas.shape[2:]), oracle, atol=1e-5, rtol=0)


@both
def test_items_are_moved_each_by_its_map(ndim):
    maps, canvas = some_map("affine", ndim, 3), torch.rand(3, 1, *[EDGE] * ndim, generator=torch.Generator().manual_seed(0))
    found = moved_by(maps, canvas, canvas.shape[2:])
    for n in range(3):
        torch.testing.assert_close(moved_by(maps[n: n + 1], canvas[n: n + 1], canvas.shape[2:]), found[n: n + 1])


@both
def test_a_picture_drawn_under_a_map_is_moved_back_by_it(ndim):
    truth = some_map("affine", ndim, size=0.15)
    moved, fixed = moved_by(truth, blobs(ndim), torch.Size([EDGE] * ndim)), blobs(ndim, truth)
    seen = moved_by(truth, torch.ones_like(fixed), fixed.shape[2:]) > 0
    scale = float(fixed[seen].max() / moved[seen].max())  # each is scaled to its own brightest
    assert float((moved * scale - fixed)[seen].abs().mean()) < 0.01 < 0.05 < float((blobs(ndim) - fixed)[seen].abs().mean())


# ------------------------------------------------------------------------------------------------------- how far maps are apart

@both
def test_displacement_is_the_mean_over_a_ball(ndim):
    draw = torch.Generator().manual_seed(0)
    points = torch.randn(200_000, ndim, generator=draw, dtype=torch.float64)
    points = points / points.norm(dim=1, keepdim=True) * 0.5 * torch.rand(200_000, 1, generator=draw, dtype=torch.float64) ** (1 / ndim)
    maps, truth = some_map("affine", ndim, 3), some_map("affine", ndim, 3, seed=1)
    oracle = (apply_matrix(maps, points[None]) - apply_matrix(truth, points[None])).square().sum(-1).mean(1).sqrt()
    torch.testing.assert_close(displacement(maps, truth), oracle, rtol=0.01, atol=0)


@both
def test_displacement_of_simple_maps(ndim):
    """A shift's length; nothing for equal maps, with a gradient that is a number."""
    torch.testing.assert_close(displacement(shifted(ndim, 3.0, -4.0), identity(ndim)), torch.tensor([5 * 2 / EDGE], dtype=torch.float64))
    maps = some_map("affine", ndim, 2).requires_grad_()
    found = displacement(maps, maps.detach())
    found.sum().backward()
    assert float(found.detach().max()) < 1e-5 and bool(maps.grad.isfinite().all())
    other = some_map("affine", ndim, 2, seed=1)
    assert torch.autograd.gradcheck(lambda m: displacement(m, other), (maps.detach().requires_grad_(),))


# -------------------------------------------------------------------------------------------------------------------- regularity

def squares(maps):
    return stretches(maps).square().sum(1)


@both
def test_turned_and_shifted_is_not_stretched(ndim):
    maps = some_map("rigid", ndim, 10, size=2.0)
    assert float(stretches(maps).abs().max()) < 1e-12


@both
def test_near_the_identity_it_is_the_logarithms_of_the_stretches(ndim):
    for size in (0.01, 0.05):
        maps = some_map("affine", ndim, 10, size=size)
        logs = torch.linalg.svdvals(maps[:, :ndim, :ndim]).log().square().sum(1)
        torch.testing.assert_close(squares(maps), logs, rtol=10 * size**2 + 1e-3, atol=1e-9)


@both
def test_it_grows_with_every_stretch_and_shrinking_is_as_bad(ndim):
    """However far: no stretch is free, and none draws to an even larger one."""
    factors = torch.tensor([1.0, 1.1, 1.3, math.sqrt(2), math.sqrt(3), 2.0, 3.0, 10.0], dtype=torch.float64)
    maps = identity(ndim, 8)
    maps[:, 0, 0] = factors
    found, turned = squares(maps), squares(some_map("rigid", ndim, size=2.0) @ maps)
    assert bool((found.diff() > 0).all())
    torch.testing.assert_close(turned, found)
    torch.testing.assert_close(squares(torch.linalg.inv(maps)), found)
    torch.testing.assert_close(found, factors.log().tanh().square())


@both
def test_its_gradient_is_a_number_everywhere(ndim):
    """Where stretches are equal, where a map is the identity, and where it is flat or a mirror."""
    flat, mirror = identity(ndim), identity(ndim)
    flat[0, 0, 0], mirror[0, 0, 0] = 0, -1
    for maps in (identity(ndim), 2 * identity(ndim), flat, mirror, 0 * identity(ndim), some_map("affine", ndim)):
        maps = maps.clone().requires_grad_()
        squares(maps).sum().backward()
        assert bool(maps.grad.isfinite().all())
    assert torch.autograd.gradcheck(squares, (some_map("affine", ndim, 2).requires_grad_(),))


# ------------------------------------------------------------------------------------------------------------------------ points

def heat_at(truth, width=0.8, edge=8):
    """Logarithms of heat maps (N, K, P) around points."""
    place = centres(edge, truth.shape[-1], truth)
    return (-(place - truth[:, :, None]).square().sum(-1) / (2 * (width * 2 / edge) ** 2)).log_softmax(2)


def said_points(ndim, n=2, count=3):
    return 1.4 * torch.rand(n, count, ndim, generator=torch.Generator().manual_seed(0)) - 0.7


@both
def test_points_are_best_at_the_truth(ndim):
    truth, one = said_points(ndim), torch.ones(2)
    deviation = torch.full((2, 3), -1.0)
    best = float(point_loss(heat_at(truth), truth, deviation, truth, one))
    for axis in range(ndim):
        for by in (-0.3, -0.05, 0.05, 0.3):
            other = truth.clone()
            other[..., axis] += by
            assert float(point_loss(heat_at(other), truth, deviation, truth, one)) > best + 1e-3
            assert float(point_loss(heat_at(truth), other, deviation, truth, one)) > best + 1e-3
    for width in (0.4, 1.6):  # heat maps shall be as wide as that
        assert float(point_loss(heat_at(truth, width), truth, deviation, truth, one)) > best + 0.01


@both
def test_a_deviation_is_best_where_it_tells_the_distance(ndim):
    """The likelihood's: of a distance r, r (D - 1) / D."""
    truth, r = said_points(ndim), 0.2
    off = truth.clone()
    off[..., 0] += r
    best = math.log(r * (ndim - 1) / ndim)
    deviation = torch.full((2, 3), best, requires_grad=True)
    loss = point_loss(heat_at(truth), off, deviation, truth, torch.ones(2))
    loss.backward()
    assert float(deviation.grad.abs().max()) < 1e-5
    for by in (-0.5, 0.5):
        assert float(point_loss(heat_at(truth), off, deviation.detach() + by, truth, torch.ones(2))) > float(loss.detach()) + 0.01


@both
def test_its_gradient_leads_to_the_truth(ndim):
    truth = said_points(ndim)
    points = (truth + 0.2).requires_grad_()
    heat = torch.zeros(2, 3, 8**ndim, requires_grad=True)
    point_loss(heat.log_softmax(2), points, torch.zeros(2, 3), truth, torch.ones(2)).backward()
    assert bool((points.grad > 0).all())
    drawn = (-heat.grad).flatten(0, 1).argmax(1)  # the voxel whose heat shall grow most
    assert float((centres(8, ndim, truth)[drawn] - truth.flatten(0, 1)).abs().max()) <= 1 / 8 + 1e-6


@both
def test_items_without_known_points_do_not_count(ndim):
    truth = said_points(ndim, 3)
    heat, points, deviation = heat_at(truth + 0.1), truth + 0.1, torch.zeros(3, 3)
    parts = [float(point_loss(heat[n: n + 1], points[n: n + 1], deviation[n: n + 1], truth[n: n + 1], torch.ones(1))) for n in range(3)]
    found = float(point_loss(heat, points, deviation, truth, torch.tensor([1.0, 0.0, 1.0])))
    assert found == pytest.approx((parts[0] + parts[2]) / 2, rel=1e-5) and parts[1] != pytest.approx(found, rel=1e-3)
    points = points.requires_grad_()
    none = point_loss(heat, points, deviation, truth, torch.zeros(3))
    none.backward()
    assert float(none.detach()) == 0 and not points.grad.any()


@both
def test_no_heat_is_asked_for_outside_of_the_canvas(ndim):
    """A point that left the canvas lies nowhere in it; where it was said to be still counts."""
    truth = said_points(ndim, 1)
    truth[0, 1, 0] = 1.2
    heat = torch.zeros(1, 3, 8**ndim, requires_grad=True)
    points = torch.zeros(1, 3, ndim, requires_grad=True)
    point_loss(heat.log_softmax(2), points, torch.zeros(1, 3), truth, torch.ones(1)).backward()
    assert not heat.grad[0, 1].any() and heat.grad[0, 0].any() and bool(points.grad.any(-1).all())


# --------------------------------------------------------------------------------------------------------------------- the terms

@both
def test_terms_are_there_exactly_when_they_are_asked_for(ndim):
    truth = some_map("affine", ndim, size=0.1)
    maps = identity(ndim, 2)
    plain, marked = batch(ndim, truth), batch(ndim, truth, **with_labels(ndim, truth))
    for k, name in enumerate(("known", "similar", "regular", "labels")):
        assert set(Loss("ncc", *(float(k == n) for n in range(4)))(saying(maps), marked)) == {"loss", name}
    assert set(Loss("ncc", 1.0, 1.0, 1.0, 1.0)(saying(maps), marked)) == {"loss", "known", "similar", "regular", "labels"}
    assert set(Loss("ncc", 1.0, 1.0, 1.0, 1.0)(saying(maps), plain)) == {"loss", "known", "similar", "regular"}  # no label maps
    pointed = batch(ndim, truth, **with_points(ndim, truth))
    net = Localising(KeypointNet(Detector(4, ndim, width=8)))
    assert set(Loss("ncc", 1.0, 0.0, 0.0, 0.0)(net, pointed)) == {"loss", "known", "points"}
    assert set(Loss("ncc", 1.0, 0.0, 0.0, 0.0)(net, plain)) == {"loss", "known"}  # no reference
    assert set(Loss("ncc", 0.0, 1.0, 0.0, 0.0)(net, pointed)) == {"loss", "similar"}
    assert set(Loss("ncc", 1.0, 0.0, 0.0, 0.0)(saying(maps), pointed)) == {"loss", "known"}  # a net without points


@both
def test_the_loss_is_their_weighted_sum(ndim):
    truth = some_map("affine", ndim, size=0.1)
    torch.manual_seed(0)
    net = Localising(KeypointNet(Detector(4, ndim, width=8)))
    found = Loss("lncc", 0.7, 0.3, 0.2, 0.4)(net, batch(ndim, truth, **with_points(ndim, truth), **with_labels(ndim, truth)))
    total = 0.7 * (found["points"] + 10 * found["known"]) + 0.3 * found["similar"] + 0.2 * found["regular"] + 0.4 * found["labels"]
    torch.testing.assert_close(found["loss"].detach(), total)
    assert found["loss"].requires_grad and not any(value.requires_grad for key, value in found.items() if key != "loss")
    assert all(value.dtype == torch.float32 and value.ndim == 0 for value in found.values())


@both
def test_known_poses_count_where_they_are_known(ndim):
    truth = some_map("affine", ndim, size=0.1)
    maps = torch.cat([shifted(ndim, 2.0) @ truth, identity(ndim)])
    given = batch(ndim, truth)
    found = Loss("ncc", 1.0, 0.0, 0.0, 0.0)(saying(maps), given)["known"]
    torch.testing.assert_close(found, displacement(maps[:1], truth)[0].square().float())
    assert float(Loss("ncc", 1.0, 0.0, 0.0, 0.0)(saying(truth.repeat(2, 1, 1)), given)["known"]) < 1e-10
    given["is_known"] = torch.zeros(2)
    assert float(Loss("ncc", 1.0, 0.0, 0.0, 0.0)(saying(maps), given)["known"]) == 0


@both
def test_what_is_not_covered_costs(ndim):
    """Else a scan shifted out of sight, or shrunk to what agrees, would be as good as one that is aligned."""
    given = {key: value[:1] for key, value in batch(ndim, identity(ndim)).items()}
    given["fixed"] = given["moving"] = torch.ones_like(given["fixed"])  # alike wherever both are seen
    costs = [float(Loss("mse", 0.0, 1.0, 0.0, 0.0)(saying(shifted(ndim, by)), given)["similar"]) for by in (0.0, 4.0, 8.0, 40.0)]
    assert costs[:3] == pytest.approx([0.5 * by / EDGE for by in (0.0, 4.0, 8.0)], abs=1e-3) and 0.5 <= costs[3] < 10
    given["fixed"] = blobs(ndim) * 0  # nor is what is empty asked to be covered
    assert math.isfinite(float(Loss("mse", 0.0, 1.0, 0.0, 0.0)(saying(shifted(ndim, 40.0)), given)["similar"]))


@both
def test_dice_of_label_maps(ndim):
    """A label that is drawn nowhere does not count."""
    truth = shifted(ndim, 2.0, -3.0)
    given = batch(ndim, truth, **with_labels(ndim, truth))
    dice = {by: float(Loss("ncc", 0.0, 0.0, 0.0, 1.0)(saying(shifted(ndim, *by).repeat(2, 1, 1)), given)["labels"])
            for by in ((2.0, -3.0), (1.0, -3.0), (0.0, 0.0), (40.0, 0.0))}
    found = list(dice.values())
    assert found[0] < 0.02 < found[1] < found[2] < found[3] == 1
    given["fixed_labels"] = torch.zeros_like(given["fixed_labels"])
    assert math.isfinite(float(Loss("ncc", 0.0, 0.0, 0.0, 1.0)(saying(identity(ndim, 2)), given)["labels"]))


@both
@pytest.mark.parametrize("name", SIMILARITY_NAMES)
def test_every_similarity_is_best_at_the_truth(ndim, name):
    truth = shifted(ndim, 2.0, -1.0)
    given = {key: value[:1] for key, value in batch(ndim, truth).items()}
    loss = Loss(name, 0.0, 1.0, 0.0, 0.0)
    best = float(loss(saying(truth), given)["loss"])
    for by in ((4.0, -1.0), (0.0, -1.0), (2.0, 2.0), (2.0, -4.0)):
        assert float(loss(saying(shifted(ndim, *by)), given)["loss"]) > best + 1e-3
    maps = shifted(ndim, 1.0, 0.0).requires_grad_()
    loss(saying(maps), given)["loss"].backward()
    assert bool(maps.grad.isfinite().all()) and float(maps.grad.abs().sum()) > 0


# --------------------------------------------------------------------------------------------------------------------- gradients

@both
@pytest.mark.parametrize("kind", ["keypoints", "regression"])
def test_all_of_a_net_receives_finite_gradients(ndim, kind):
    """Regression in its second step: in the first nothing before the last layer moves a thing."""
    torch.manual_seed(0)
    net = KeypointNet(Detector(4, ndim, width=8)) if kind == "keypoints" else RegressionNet(EDGE, ndim, width=8, hidden=8)
    if kind == "regression":
        torch.nn.init.normal_(net.head[-1].weight, std=0.1)
    truth = some_map("affine", ndim, size=0.1)
    given = batch(ndim, truth, **with_points(ndim, truth), **with_labels(ndim, truth))
    found = Loss("lncc", 1.0, 1.0, 0.05, 0.5)(Localising(net), given)
    found["loss"].backward()
    assert all(bool(value.isfinite()) for value in found.values())
    for name, p in net.named_parameters():
        assert p.grad is not None and bool(p.grad.isfinite().all()), name
        assert float(p.grad.abs().sum()) > 0 or name == "detector.maps.bias", name  # what is added to a whole map moves no point


@both
def test_empty_canvases_leave_finite_gradients(ndim):
    """A scan may be drawn where nothing of it is seen."""
    torch.manual_seed(0)
    net = Localising(KeypointNet(Detector(4, ndim, width=8)))
    given = batch(ndim, identity(ndim))
    for key in ("fixed", "moving", "fixed_seen", "moving_seen"):
        given[key] = torch.zeros_like(given[key])
    for name in ("lncc", "mind", "mi"):
        net.zero_grad()
        Loss(name, 1.0, 1.0, 0.05, 0.0)(net, given)["loss"].backward()
        assert all(bool(p.grad.isfinite().all()) for p in net.parameters() if p.grad is not None)


@both
@pytest.mark.parametrize("name", ["lncc", "mse", "mi"])
def test_descent_finds_a_small_shift(ndim, name):
    """Of free parameters, as of a net that says the same for every pair."""
    truth = shifted(ndim, 1.5, -1.0)
    given = {key: value[:1] for key, value in batch(ndim, truth).items()}
    theta = torch.zeros(1, MODELS["affine"].count(ndim), dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.Adam([theta], 0.02)
    loss = Loss(name, 0.0, 1.0, 0.05, 0.0)
    for _ in range(60):
        optimiser.zero_grad()
        loss(saying(MODELS["affine"].exp(theta, ndim)), given)["loss"].backward()
        optimiser.step()
    away = float(displacement(MODELS["affine"].exp(theta.detach(), ndim), truth)) * EDGE / 2
    # voxels; mutual information is also drawn by what overlaps
    assert away < (0.6 if name == "mi" else 0.3) and float(displacement(identity(ndim), truth)) * EDGE / 2 > 1.5


# ------------------------------------------------------------------------------------------------------------ a net in training

@both
def test_a_net_says_in_training_what_it_says_in_use(ndim):
    torch.manual_seed(0)
    fixed, moving = torch.rand(2, 2, 1, *[EDGE] * ndim)
    points = KeypointNet(Detector(4, ndim, width=8), model_name="similarity")
    regression = RegressionNet(EDGE, ndim, width=8, hidden=8)
    torch.nn.init.normal_(regression.head[-1].weight, std=0.1)
    for net in (points, regression):
        maps, found = Localising(net)(fixed, moving)
        torch.testing.assert_close(maps, net(fixed, moving))
        assert (found is None) == (net is regression)
    maps, (places, deviation, heat) = Localising(points)(fixed, moving)
    said, spread = points.detector(torch.cat([fixed, moving]))
    assert torch.equal(places, said) and torch.equal(deviation, spread) and heat.shape == (4, 4, (EDGE // 2) ** ndim)
