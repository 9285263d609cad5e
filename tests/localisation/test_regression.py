"""The net that says the map outright: the identity at the start, members of its model ever after, rotations without a seam."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from regkit.errors import GeometryError, OptionError
from regkit.localisation import NETS, RegressionNet
from regkit.localisation.regression import rotation
from regkit.space import MODELS
from regkit.space.models import nearest_rotation

both = pytest.mark.parametrize("ndim", [2, 3], ids=["2D", "3D"])
every = pytest.mark.parametrize("name", ["translation", "rigid", "similarity", "affine"])
NUMBERS = {2: 2, 3: 6}


def small(ndim, name="affine", seed=0, moved=0.0, **settings):
    """A net for canvases of 8 voxels; moved: how far its last layer is from the start."""
    torch.manual_seed(seed)
    net = RegressionNet(8, ndim, name, **{"width": 8, "depth": 1, "hidden": 16, **settings})
    if moved:
        nn.init.normal_(net.head[-1].weight, std=moved)
        nn.init.normal_(net.head[-1].bias, std=moved)
    return net


def canvases(ndim, n=2, edge=8, seed=0):
    return torch.rand(n, 1, *[edge] * ndim, generator=torch.Generator().manual_seed(seed))


def some_numbers(ndim, n, seed=0):
    return torch.randn(n, NUMBERS[ndim], generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def some_rotations(ndim, n, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return nearest_rotation(torch.randn(n, ndim, ndim, generator=draw, dtype=torch.float64))


# --------------------------------------------------------------------------------------------------------- the rotations

@both
def test_any_numbers_say_a_proper_rotation(ndim):
    found = rotation(3 * some_numbers(ndim, 500), ndim)
    eye = torch.eye(ndim, dtype=torch.float64).expand_as(found)
    torch.testing.assert_close(found @ found.mT, eye, atol=1e-9, rtol=0)
    torch.testing.assert_close(torch.linalg.det(found), torch.ones(500, dtype=torch.float64))
    assert float((found - eye).norm(dim=(1, 2)).max()) > 2.5  # some turn by nearly 180°


@both
def test_zero_is_exactly_the_identity(ndim):
    found = rotation(torch.zeros(3, NUMBERS[ndim], dtype=torch.float64), ndim)
    assert torch.equal(found, torch.eye(ndim, dtype=torch.float64).expand_as(found))


@both
def test_any_rotation_can_be_said(ndim):
    """By its first columns, less those of the identity; half turns, where rotation vectors jump, are no exception."""
    half = torch.diag(torch.tensor([-1.0, -1.0, 1.0][:ndim], dtype=torch.float64))
    wanted = torch.cat([some_rotations(ndim, 50), half[None]])
    columns = (wanted - torch.eye(ndim, dtype=torch.float64)).mT[:, : ndim - 1]
    torch.testing.assert_close(rotation(columns.flatten(1), ndim), wanted, atol=1e-9, rtol=0)


@both
def test_rotations_are_differentiable(ndim):
    numbers = some_numbers(ndim, 4).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: rotation(x, ndim), numbers)


@both
def test_a_turn_through_180_degrees_has_no_seam(ndim):
    angles = torch.linspace(170, 190, 41, dtype=torch.float64).deg2rad()
    turning = torch.zeros(41, NUMBERS[ndim], dtype=torch.float64)
    turning[:, 0], turning[:, 1] = angles.cos() - 1, angles.sin()
    if ndim == 3:
        turning[:, 3], turning[:, 4] = -angles.sin(), angles.cos() - 1
    steps = rotation(turning, ndim).diff(dim=0).norm(dim=(1, 2))
    assert float(steps.max()) < 1.01 * float(steps.min()) < 0.02


# --------------------------------------------------------------------------------------------------------------- the net

@both
@every
def test_it_starts_exactly_at_the_identity(ndim, name):
    found = small(ndim, name)(canvases(ndim, 3), canvases(ndim, 3, seed=1))
    assert found.dtype == torch.float64
    assert torch.equal(found, torch.eye(ndim + 1, dtype=torch.float64).expand(3, -1, -1))


@both
@every
def test_maps_are_members_of_the_model(ndim, name):
    found = small(ndim, name, moved=0.5)(canvases(ndim, 6), canvases(ndim, 6, seed=1)).detach()
    last = torch.eye(ndim + 1, dtype=torch.float64)[ndim].expand(6, -1)
    linear, shift = found[:, :ndim, :ndim], found[:, :ndim, ndim]
    assert torch.equal(found[:, ndim], last)
    assert float(shift.abs().min(1).values.max()) > 0.05
    torch.testing.assert_close(linear, MODELS[name].nearest(linear), atol=1e-6, rtol=0)
    assert float(torch.linalg.det(linear).min()) > 0
    gram, eye = linear @ linear.mT, torch.eye(ndim, dtype=torch.float64)
    size = torch.einsum("nii->n", gram)[:, None, None] / ndim
    if name == "translation":
        assert torch.equal(linear, eye.expand_as(linear))
        return
    assert float((linear - linear.mT).norm(dim=(1, 2)).max()) > 0.1  # turned
    if name == "rigid":
        torch.testing.assert_close(gram, eye.expand_as(gram), atol=1e-9, rtol=0)
    elif name == "similarity":
        torch.testing.assert_close(gram, size * eye, atol=1e-6, rtol=0)
        assert float((size - 1).abs().max()) > 0.1
    else:
        assert float((gram - size * eye).norm(dim=(1, 2)).max()) > 0.1


@both
@every
def test_gradients_are_finite_at_the_start_and_after(ndim, name):
    for moved in (0.0, 0.3):
        net = small(ndim, name, moved=moved)
        target = torch.randn(2, ndim + 1, ndim + 1, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        (net(canvases(ndim), canvases(ndim, seed=1)) * target).sum().backward()
        grads = {key: p.grad for key, p in net.named_parameters()}
        assert all(g is not None and bool(g.isfinite().all()) for g in grads.values())
        learns = grads if moved else {"head.3.bias", "head.3.weight"}  # behind weights of zero nothing learns in the first step
        assert all(float(grads[key].abs().sum()) > 0 for key in learns)


@both
def test_every_number_of_the_last_layer_moves_the_map(ndim):
    net = small(ndim)
    looked = canvases(ndim, 1), canvases(ndim, 1, seed=1)
    found = torch.autograd.functional.jacobian(
        lambda bias: torch.func.functional_call(net, {"head.3.bias": bias}, looked)[0, :ndim].flatten(), net.head[3].bias.detach())
    count = MODELS["affine"].count(ndim)
    assert int(torch.linalg.matrix_rank(found.double())) == count == ndim * (ndim + 1)  # any affine map near the identity
    eye = torch.eye(ndim, dtype=torch.float64).to(found)
    torch.testing.assert_close(found.reshape(ndim, ndim + 1, -1)[:, ndim, :ndim], eye)  # a shift in half edges


@both
def test_canvases_are_looked_at_each_by_itself(ndim):
    net = small(ndim, moved=0.3).train()
    f, m = canvases(ndim, 3), canvases(ndim, 3, seed=1)
    alone = net(f[:1], m[:1])
    f[1:] = 1000 * f[1:].square()
    for state in (net.train(), net.eval()):
        found = state(f, m)
        torch.testing.assert_close(found[:1], alone, atol=1e-4, rtol=0)
    assert float((found[1:] - alone).detach().abs().max()) > 1e-2
    assert not list(net.buffers())


@both
def test_brightness_does_not_matter_and_which_scan_is_fixed_does(ndim):
    net, f, m = small(ndim, moved=0.3), canvases(ndim), canvases(ndim, seed=1)
    found = net(f, m)
    torch.testing.assert_close(net(50 * f - 3, 0.5 * m + 8), found, atol=5e-4, rtol=0)
    assert float((net(m, f) - found).detach().abs().max()) > 1e-2


@both
def test_depth_and_widths_fit_the_canvas(ndim):
    net = RegressionNet(16, ndim, width=8, depth=2, most=12, hidden=5)
    assert net.head[1].in_features == 12 * 2**ndim and net.head[1].out_features == 5
    looked = canvases(ndim, edge=16)
    assert net(looked, looked).shape == (2, ndim + 1, ndim + 1)


@both
def test_a_net_is_built_again_from_its_settings(ndim):
    net = small(ndim, "similarity", moved=0.3, most=12)
    settings = copy.deepcopy(net.settings)
    assert NETS[net.kind] is RegressionNet and settings == {
        "edge": 8, "ndim": ndim, "model": "similarity", "width": 8, "depth": 1, "most": 12, "hidden": 16}
    again = RegressionNet.of(settings)
    assert again.settings == settings == net.settings
    again.load_state_dict(net.state_dict())
    f, m = canvases(ndim), canvases(ndim, seed=1)
    assert torch.equal(again(f, m), net(f, m))


@both
def test_what_does_not_fit_is_named(ndim):
    for edge, depth in ((12, 2), (0, 1), (-8, 1), (4, 2)):
        with pytest.raises(OptionError, match=rf"edge: {edge} voxels in {ndim}D; expected a multiple of {2 ** (1 + depth)}, in 2D or 3D"):
            RegressionNet(edge, ndim, depth=depth)
    with pytest.raises(OptionError, match="in 4D"):
        RegressionNet(8, 4, depth=1)
    with pytest.raises(OptionError, match=r"model: 'afine' is not known; .*nearest: affine"):
        small(ndim, "afine")
    net, right = small(ndim), canvases(ndim)
    for wrong in (canvases(ndim, edge=16), canvases(5 - ndim), right[:, 0], right.repeat(1, 2, *[1] * ndim)):
        for pair in ((wrong, right), (right, wrong)):
            with pytest.raises(GeometryError, match=rf"canvas: .*{wrong.shape[-1]}\); the net was built for \(N, 1{', 8' * ndim}\)"):
                net(*pair)


@both
def test_it_learns_to_say_a_shift(ndim):
    """A blob's place in one canvas from its place in the other."""
    net = small(ndim, "translation", width=8)
    draw = torch.Generator().manual_seed(1)
    ramp = (torch.arange(8) + 0.5) / 4 - 1
    place = torch.stack(torch.meshgrid(*[ramp] * ndim, indexing="ij"), -1).reshape(-1, ndim)

    def pairs(n):
        where = torch.rand(2, n, 1, ndim, generator=draw) - 0.5
        f, m = torch.exp(-(place - where).square().sum(-1) / (2 * 0.3**2)).reshape(2, n, 1, *[8] * ndim)
        return f, m, (where[1] - where[0])[:, 0]

    fixed, moving, truth = pairs(32)
    optimiser = torch.optim.Adam(net.parameters(), lr=5e-3)
    for _ in range(60):
        f, m, wanted = pairs(16)
        optimiser.zero_grad()
        (net(f, m)[:, :ndim, ndim] - wanted).square().mean().backward()
        optimiser.step()
    with torch.no_grad():
        away = (net(fixed, moving)[:, :ndim, ndim] - truth).norm(dim=1).mean()
    assert float(away) < 0.4 * float(truth.norm(dim=1).mean())
