"""Points found in both scans and the map that fits them: the fit in closed form, the detector's laws, what both refuse."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from regkit.errors import GeometryError, OptionError
from regkit.localisation import NETS, Detector, KeypointNet
from regkit.localisation.keypoints import _blocks, centres, fit, fitting, standardised
from regkit.space import MODELS

both = pytest.mark.parametrize("ndim", [2, 3], ids=["2D", "3D"])
every = pytest.mark.parametrize("name", ["translation", "rigid", "similarity", "affine"])


def small(ndim, points=5, seed=0, **settings):
    torch.manual_seed(seed)
    return Detector(points, ndim, **{"width": 8, "depth": 1, **settings})


def canvases(ndim, n=1, edge=12, seed=0):
    return torch.rand(n, 1, *[edge] * ndim, generator=torch.Generator().manual_seed(seed))


def some_map(name, ndim, n=1, seed=0, size=0.5):
    draw = torch.Generator().manual_seed(seed)
    theta = size * torch.randn(n, MODELS[name].count(ndim), generator=draw, dtype=torch.float64)
    return MODELS[name].exp(theta, ndim)


def some_points(ndim, n=1, count=20, seed=1):
    return torch.rand(n, count, ndim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2 - 1


def carried(maps, points):
    d = points.shape[-1]
    return points @ maps[:, :d, :d].mT + maps[:, None, :d, d]


# --------------------------------------------------------------------------------------------------------------- the fit

@both
@every
def test_a_known_map_is_recovered(ndim, name):
    truth, p = some_map(name, ndim, 3), some_points(ndim, 3)
    weight = torch.rand(3, 20, generator=torch.Generator().manual_seed(2)) + 0.1
    found = fit(fitting(name), p, carried(truth, p), weight)
    # the affine fit has a ridge of 1e-6 towards the similarity
    torch.testing.assert_close(found, truth, atol=1e-5 if name == "affine" else 1e-10, rtol=0)
    assert found.dtype == torch.float64


@both
@every
def test_float32_points_are_fitted_in_float64(ndim, name):
    truth, p = some_map(name, ndim), some_points(ndim).float()
    found = fit(fitting(name), p, carried(truth, p.double()).float(), torch.ones(1, 20))
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, truth, atol=1e-5, rtol=0)


@both
@every
def test_what_does_not_agree_with_the_rest_hardly_counts(ndim, name):
    truth, p = some_map(name, ndim, 2), some_points(ndim, 2, 40)
    q = carried(truth, p)
    q[:, :8] += 0.5 + torch.rand(2, 8, ndim, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    one = torch.ones(2, 40)
    robust, plain = fit(fitting(name), p, q, one), fitting(name).fit(p, q, one.double())
    away = [float((carried(found, p) - carried(truth, p)).norm(dim=-1).mean()) for found in (robust, plain)]
    assert away[0] < 0.02 < 0.1 < away[1]


@both
@every
@pytest.mark.parametrize("rounds", [1, 4])
def test_weights_are_cauchys_and_send_no_gradient(ndim, name, rounds):
    """Written out: 1 / (1 + r²), r the distance in 1.5 times the median one, but no less than 0.01; they are not differentiated."""
    model, p = fitting(name), some_points(ndim, 2)
    q = carried(some_map(name, ndim, 2), p) + 0.2 * some_points(ndim, 2, seed=3).pow(5)
    q.requires_grad_()
    weight = torch.rand(2, 20, generator=torch.Generator().manual_seed(2), dtype=torch.float64) ** 3 + 0.01
    total = weight
    for _ in range(rounds):
        away = (carried(model.fit(p, q.detach(), total), p) - q.detach()).norm(dim=2)
        total = weight / (1 + (away / (1.5 * away.median(1, keepdim=True).values).clamp_min(0.01)) ** 2)
    found, wanted = fit(model, p, q, weight, rounds), model.fit(p, q, total)
    torch.testing.assert_close(found, wanted, atol=1e-10, rtol=0)
    grads = [torch.autograd.grad(one.square().sum(), q)[0] for one in (found, wanted)]
    torch.testing.assert_close(*grads, atol=1e-9, rtol=0)


@both
@every
def test_points_without_weight_do_not_count(ndim, name):
    truth, p = some_map(name, ndim), some_points(ndim)
    q = carried(truth, p)
    q[:, :6] += 0.3
    weight = torch.ones(1, 20)
    weight[:, :6] = 0
    torch.testing.assert_close(fit(fitting(name), p, q, weight), truth, atol=1e-5, rtol=0)
    noisy = q + 0.05 * torch.randn(q.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    alone = fit(fitting(name), p[:, 6:], noisy[:, 6:], weight[:, 6:], rounds=0)
    torch.testing.assert_close(fit(fitting(name), p, noisy, weight, rounds=0), alone, atol=1e-10, rtol=0)


@both
def test_weights_are_those_of_a_mean(ndim):
    """Of two groups that were shifted differently, without a second look at who agrees."""
    p = some_points(ndim)
    q, weight = p.clone(), torch.ones(1, 20)
    q[:, 10:] += 1
    weight[:, 10:] = 3
    found = fit(fitting("translation"), p, q, weight, rounds=0)
    torch.testing.assert_close(found[0, :ndim, ndim], torch.full((ndim,), 0.75, dtype=torch.float64))
    torch.testing.assert_close(fit(fitting("translation"), p, q, 1000 * weight, rounds=0), found)


@both
@every
def test_items_are_fitted_each_by_itself(ndim, name):
    p, q = some_points(ndim, 3), some_points(ndim, 3, seed=5)
    weight = torch.rand(3, 20, generator=torch.Generator().manual_seed(6))
    found = fit(fitting(name), p, q, weight)
    for n in range(3):
        torch.testing.assert_close(fit(fitting(name), p[n: n + 1], q[n: n + 1], weight[n: n + 1]), found[n: n + 1], atol=1e-10, rtol=0)


@both
@every
def test_the_fit_is_differentiable(ndim, name):
    """Of noisy points without robust weights, which send no gradient, and with them where all points agree and they are 1."""
    p, model = some_points(ndim, count=8), fitting(name)
    noisy = (carried(some_map(name, ndim), p) + 0.1 * some_points(ndim, count=8, seed=7)).requires_grad_()
    weight = torch.rand(1, 8, generator=torch.Generator().manual_seed(8), dtype=torch.float64) + 0.5
    p, weight = p.requires_grad_(), weight.requires_grad_()
    assert torch.autograd.gradcheck(lambda p, q, w: fit(model, p, q, w, rounds=0)[:, :ndim], (p, noisy, weight))
    exact = carried(some_map(name, ndim), p.detach()).requires_grad_()
    assert torch.autograd.gradcheck(lambda p, q, w: fit(model, p, q, w)[:, :ndim], (p, exact, weight), atol=1e-4)


def test_only_models_that_points_can_be_fitted_by():
    assert fitting("rigid") is MODELS["rigid"]
    with pytest.raises(OptionError, match=r"model: 'afine' is not known; use one of .*affine \(nearest: affine\)"):
        fitting("afine")
    for name in ("projective", "tps", "attention"):
        with pytest.raises(OptionError, match=f"model: '{name}' is not known"):
            KeypointNet(small(2), model_name=name)


# ------------------------------------------------------------------------------------------------------------ its pieces

@both
def test_blocks_are_those_that_unfold_makes(ndim):
    canvas = torch.rand(2, 1, *(6, 4, 8)[:ndim])
    unfolded = canvas
    for axis in range(ndim):
        unfolded = unfolded.unfold(2 + axis, 2, 2)
    oracle = unfolded.flatten(2 + ndim).movedim(-1, 2)[:, 0]
    found = _blocks(canvas)
    assert found.shape == (2, 2**ndim, *(3, 2, 4)[:ndim])
    assert torch.equal(found, oracle)


@both
def test_centres_are_those_of_voxels(ndim):
    edge = 6
    found = centres(edge, ndim, torch.zeros(1, dtype=torch.float64))
    assert found.shape == (edge**ndim, ndim) and found.dtype == torch.float64
    index = torch.stack(torch.meshgrid(*[torch.arange(edge)] * ndim, indexing="ij"), -1).reshape(-1, ndim)
    torch.testing.assert_close(found, -1 + (index.double() + 0.5) * 2 / edge)  # a canvas of half edges -1 to 1


@both
def test_a_heat_map_shifted_by_a_voxel_moves_its_point_by_one(ndim):
    edge = 8
    heat = torch.full((2, 3, *[edge] * ndim), -torch.inf)
    inner = (..., *[slice(2, edge - 2)] * ndim)  # nothing falls off
    heat[inner] = torch.randn(heat[inner].shape, generator=torch.Generator().manual_seed(0))
    place = centres(edge, ndim, heat)
    point = heat.flatten(2).softmax(2) @ place
    for axis in range(ndim):
        step = torch.zeros(ndim)
        step[axis] = 2 / edge
        moved = heat.roll(1, 2 + axis).flatten(2).softmax(2) @ place
        torch.testing.assert_close(moved - point, step.expand(2, 3, ndim), atol=1e-6, rtol=0)


@both
def test_standardised_canvases_have_mean_0_and_variance_1(ndim):
    canvas = 7 + 30 * canvases(ndim, 3)
    found = standardised(canvas)
    for one in found:
        assert float(one.mean()) == pytest.approx(0, abs=1e-5) and float(one.std(correction=0)) == pytest.approx(1, abs=1e-4)
    torch.testing.assert_close(standardised(canvas[1:2]), found[1:2])
    assert not standardised(torch.full((1, 1, *[4] * ndim), 3.0)).any()  # of nothing but air: no noise out of rounding


# ---------------------------------------------------------------------------------------------------------- the detector

@both
@pytest.mark.parametrize("depth", [1, 2])
def test_a_detector_says_points_and_how_far_off_they_may_be(ndim, depth):
    edge = 2 * 2 ** (1 + depth)
    net = small(ndim, points=7, depth=depth)
    points, deviation = net(canvases(ndim, 2, edge))
    assert points.shape == (2, 7, ndim) and deviation.shape == (2, 7)
    assert float(points.detach().abs().max()) < 1 and bool(points.isfinite().all())
    again, _, heat = net.maps_too(canvases(ndim, 2, edge))
    assert heat.shape == (2, 7, (edge // 2) ** ndim) and torch.equal(again, points)
    torch.testing.assert_close(heat.exp().sum(2), torch.ones(2, 7))
    torch.testing.assert_close(heat.exp() @ centres(edge // 2, ndim, heat), points)
    nn.init.constant_(net.deviation.bias, 100.0)  # a deviation that may grow without end would leave a point no weight
    assert bool((net(canvases(ndim, 2, edge))[1] == 1).all())
    nn.init.constant_(net.deviation.bias, -100.0)
    assert bool((net(canvases(ndim, 2, edge))[1] == -5).all())


@both
def test_channels_double_to_the_most(ndim):
    net = small(ndim, width=8, depth=3, most=20)
    assert [block.layers[0].in_channels for block in net.down] == [8, 16, 20, 20]
    assert [block.layers[0].in_channels for block in net.up] == [8, 16, 20]
    assert net(canvases(ndim, edge=16))[0].shape == (1, 5, ndim)


@pytest.mark.parametrize("width", [1, 7, 12, 17, 25, 30])
def test_any_width_fits(width):
    """Also one that groups of about eight channels do not divide."""
    points, _ = small(2, width=width, most=2 * width - 1)(canvases(2))
    assert bool(points.isfinite().all())


@both
def test_canvases_are_looked_at_each_by_itself(ndim):
    net = small(ndim).train()
    looked = canvases(ndim, 3)
    points, deviation = net(looked)
    looked[1:] = 1000 * looked[1:].square()
    for state in (net.train(), net.eval()):
        again, said = state(looked)
        torch.testing.assert_close(again[:1], points[:1], atol=1e-5, rtol=0)
        torch.testing.assert_close(said[:1], deviation[:1], atol=1e-4, rtol=0)
    assert float((again[1:] - points[1:]).detach().abs().max()) > 1e-3  # it looks at them at all
    assert not list(net.buffers())  # no statistics of batches


@both
def test_brightness_does_not_matter(ndim):
    net, looked = small(ndim), canvases(ndim, 2)
    points, deviation = net(looked)
    for scale, offset in ((100.0, 0.0), (1.0, 50.0), (0.1, -3.0)):
        again, said = net(scale * looked + offset)
        torch.testing.assert_close(again, points, atol=1e-4, rtol=0)
        torch.testing.assert_close(said, deviation, atol=1e-4, rtol=0)
    assert float((net(looked.square())[0] - points).detach().abs().max()) > 1e-3


@both
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_what_is_shifted_by_whole_steps_has_shifted_heat_maps(ndim, axis):
    """On a canvas that wraps around, so that no border breaks the law: blocks, halvings and widenings keep every axis in its place."""
    if axis >= ndim:
        axis -= 2
    net = small(ndim, depth=2)
    for module in net.modules():
        if isinstance(module, (nn.Conv2d, nn.Conv3d)):
            module.padding_mode = "circular"
    looked, step = canvases(ndim, 2, edge=16), 8
    heat, moved = (net.maps_too(x)[2].reshape(2, 5, *[8] * ndim) for x in (looked, looked.roll(step, 2 + axis)))
    torch.testing.assert_close(moved, heat.roll(step // 2, 2 + axis), atol=1e-4, rtol=0)
    assert float((moved - heat).detach().abs().max()) > 1e-2


@both
def test_all_of_it_receives_a_gradient(ndim):
    net = small(ndim, depth=2)
    points, deviation = net(canvases(ndim, 2, edge=16))
    (points.square().sum() + deviation.sum()).backward()
    for name, p in net.named_parameters():
        assert p.grad is not None and bool(p.grad.isfinite().all()), name
        assert float(p.grad.abs().sum()) > 0 or name == "maps.bias", name  # what is added to a whole map moves no point


@both
def test_what_a_detector_cannot_look_at_is_named(ndim):
    net = small(ndim, depth=2)
    for shape in ((1, 1, *[12] * ndim), (1, 1, *[16] * (ndim - 1), 8), (1, 2, *[16] * ndim), (1, *[16] * ndim), (1, 1, *[16] * (5 - ndim))):
        with pytest.raises(GeometryError, match=rf"canvas: \({', '.join(map(str, shape))}\); .*\(N, 1{', S' * ndim}\), S a multiple of 8"):
            net(torch.zeros(shape))
    for name in ("points", "width", "depth"):
        with pytest.raises(OptionError, match=f"{name}: 0; expected 1 or more"):
            Detector(**{"points": 4, "ndim": ndim, name: 0})
    with pytest.raises(OptionError, match="ndim: 4; expected 2 or 3"):
        Detector(4, 4)


@both
def test_a_detector_learns_where_a_bright_blob_is(ndim):
    edge = (16, 12)[ndim - 2]
    net = small(ndim, points=1)
    draw = torch.Generator().manual_seed(1)
    place = centres(edge, ndim, torch.zeros(1))

    def blobs(n):
        truth = torch.rand(n, 1, ndim, generator=draw) * 1.2 - 0.6
        image = torch.exp(-(place - truth).square().sum(-1) / (2 * 0.2**2)) + 0.1 * torch.rand(n, len(place), generator=draw)
        return image.reshape(n, 1, *[edge] * ndim), truth

    fresh, truth = blobs(32)
    before = float((net(fresh)[0].detach() - truth).norm(dim=-1).mean())
    optimiser = torch.optim.Adam(net.parameters(), lr=1e-2)
    for _ in range(40):
        images, wanted = blobs(8)
        optimiser.zero_grad()
        (net(images)[0] - wanted).square().mean().backward()
        optimiser.step()
    after = float((net(fresh)[0].detach() - truth).norm(dim=-1).mean())
    assert after < 0.12 < 0.3 < before


# --------------------------------------------------------------------------------------------------------------- the net

@both
@every
def test_identical_canvases_are_not_moved(ndim, name):
    net, looked = KeypointNet(small(ndim, points=12), model_name=name), canvases(ndim, 2)
    found = net(looked, looked)
    assert found.shape == (2, ndim + 1, ndim + 1) and found.dtype == torch.float64
    torch.testing.assert_close(found, torch.eye(ndim + 1, dtype=torch.float64).expand_as(found), atol=1e-5, rtol=0)


@both
@every
def test_the_map_carries_fixed_points_to_moving_ones(ndim, name):
    """Whatever canvases are called: fixed comes first, and every pair is fitted by itself."""
    net = KeypointNet(small(ndim, points=20), model_name=name)
    p, truth = some_points(ndim, 2), some_map(name, ndim, 2)
    seen = {0: p[:1], 1: p[1:], 2: carried(truth, p)[:1], 3: carried(truth, p)[1:]}
    net.detector.forward = lambda canvas: (torch.cat([seen[int(c)] for c in canvas.flatten(1)[:, 0]]), torch.zeros(len(canvas), 20))
    numbers = torch.arange(4.0).reshape(4, 1, *[1] * ndim).expand(4, 1, *[12] * ndim)
    torch.testing.assert_close(net(numbers[:2], numbers[2:]), truth, atol=1e-5, rtol=0)


@both
@pytest.mark.parametrize("unsure", ["fixed", "moving"])
def test_points_that_either_scan_is_unsure_of_hardly_count(ndim, unsure):
    net = KeypointNet(small(ndim, points=20))
    p, truth = some_points(ndim), some_map("affine", ndim)
    q = carried(truth, p)
    q[:, ::2] += 0.4  # half of the points: more than robust weights could put right
    deviation = torch.full((2, 20), -5.0)
    deviation[("fixed", "moving").index(unsure), ::2] = 1
    net.detector.forward = lambda canvas: (torch.cat([p, q]), deviation)
    found = net(torch.zeros(1), torch.zeros(1))
    assert float((carried(found, p) - carried(truth, p)).norm(dim=-1).max()) < 1e-3
    net.detector.forward = lambda canvas: (torch.cat([p, q]), torch.full((2, 20), -5.0))
    assert float((carried(net(torch.zeros(1), torch.zeros(1)), p) - carried(truth, p)).norm(dim=-1).max()) > 0.1


@both
def test_the_pose_carries_home_onto_a_scan(ndim):
    home, truth = some_points(ndim)[0].float(), some_map("similarity", ndim, 2)
    net = KeypointNet(small(ndim, points=20), home)
    where = carried(truth, home.double()[None])
    net.detector.forward = lambda canvas: (where, torch.zeros(2, 20))
    torch.testing.assert_close(net.pose(torch.zeros(2, 1, *[12] * ndim))[0], truth, atol=1e-6, rtol=0)
    where[:, ::2] -= 0.5
    deviation = torch.full((2, 20), -5.0)
    deviation[:, ::2] = 1
    net.detector.forward = lambda canvas: (where, deviation)
    torch.testing.assert_close(net.pose(torch.zeros(2, 1, *[12] * ndim))[0], truth, atol=1e-3, rtol=0)


@both
@pytest.mark.parametrize("homed", [True, False], ids=["home", "no home"])
def test_a_net_is_built_again_from_its_settings(ndim, homed):
    home = some_points(ndim, count=5)[0].float() if homed else None
    net = KeypointNet(small(ndim, depth=2, most=12), home, "similarity")
    settings = net.settings
    assert NETS[net.kind] is KeypointNet and settings == {
        "points": 5, "ndim": ndim, "width": 8, "depth": 2, "most": 12, "model": "similarity", "home": homed}
    again = KeypointNet.of(settings)
    assert again.settings == settings == net.settings  # what was given is not used up
    assert not again.home.any()
    again.load_state_dict(net.state_dict())
    f, m = canvases(ndim, 2, edge=8), canvases(ndim, 2, edge=8, seed=1)
    assert torch.equal(again(f, m), net(f, m)) and torch.equal(again.home, net.home)
    if home is not None:
        home += 1  # a net's own copy
        assert not torch.equal(net.home, home)


@both
def test_a_gradient_reaches_the_detector_through_the_map(ndim):
    net = KeypointNet(small(ndim, points=12))
    f, m = canvases(ndim, 2), canvases(ndim, 2, seed=1)
    net(f, m).square().sum().backward()
    grads = [p.grad for name, p in net.named_parameters() if name != "detector.maps.bias"]
    assert all(g is not None and bool(g.isfinite().all()) for g in grads)
    assert math.fsum(float(g.abs().sum()) for g in grads) > 0
