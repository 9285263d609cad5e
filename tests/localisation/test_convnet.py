"""The localiser: it fits any image, starts at the identity, and learns, alone and with others."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from regkit.errors import GeometryError, OptionError
from regkit.filters import smooth
from regkit.localisation import localiser
from regkit.space import MODEL_NAMES, SplineModel, model
from regkit.stn import Parallel, SpatialTransformer

both = pytest.mark.parametrize("ndim", [2, 3], ids=["2D", "3D"])
every = pytest.mark.parametrize("name", MODEL_NAMES)
SHAPES = {2: (17, 29), 3: (17, 29, 11)}


def texture(shape, n=1, c=1, seed=0, sigma=2.0):
    data = smooth(torch.randn(n, c, *shape, generator=torch.Generator().manual_seed(seed)), [sigma] * len(shape))
    return data / data.std()


@both
@every
def test_it_starts_at_the_identity(ndim, name):
    moving = texture(SHAPES[ndim], n=3, c=2)
    net = localiser((2, *SHAPES[ndim]), name)
    theta = net(moving)
    assert theta.shape == (3, model(name).count(ndim)) and not theta.any()
    torch.testing.assert_close(SpatialTransformer(net, name)(moving), moving, atol=2e-5, rtol=0)
    assert all(p.requires_grad and bool(p.isfinite().all()) for p in net.parameters())


@both
@pytest.mark.parametrize("images", [1, 2, 3])
def test_several_images_are_looked_at_together(ndim, images):
    looked = [texture(SHAPES[ndim], n=2, c=2, seed=k) for k in range(images)]
    net = localiser((2, *SHAPES[ndim]), "rigid", images=images)
    last = [m for m in net.modules() if isinstance(m, nn.Linear)][-1]
    nn.init.normal_(last.weight)
    theta = net(*looked).detach()
    assert theta.shape == (2, model("rigid").count(ndim))
    for k in range(images):
        other = [*looked[:k], texture(SHAPES[ndim], n=2, c=2, seed=99), *looked[k + 1:]]
        assert float((net(*other).detach() - theta).abs().max()) > 1e-3
    assert SpatialTransformer(net, "rigid")(*looked).shape == looked[0].shape


@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (2, 3), (4, 1), (5, 4), (7, 33), (8, 9), (64, 5), (1, 1, 1), (1, 2, 5), (3, 1, 4),
                                   (5, 5, 2), (9, 4, 17), (13, 1, 30)], ids=str)
def test_any_size_fits(shape):
    ndim = len(shape)
    net = localiser((3, *shape), "affine", width=4, hidden=5)
    moving = torch.randn(2, 3, *shape, generator=torch.Generator().manual_seed(0))
    moved = SpatialTransformer(net)(moving)
    torch.testing.assert_close(moved, moving, atol=1e-4, rtol=0)
    moved.square().sum().backward()
    grads = [p.grad for p in net.parameters()]
    assert all(g is not None and bool(g.isfinite().all()) for g in grads)
    assert net(moving).shape == (2, model("affine").count(ndim))


@both
def test_it_halves_until_an_axis_has_fewer_than_eight_voxels(ndim):
    shape = (64, 20, 7)[:ndim]
    net = localiser((1, *shape), "affine", width=6)
    pools = [m.kernel_size for m in net if isinstance(m, (nn.AvgPool2d, nn.AvgPool3d))]
    assert pools == [(2, 2, 1)[:ndim], (2, 2, 1)[:ndim], (2, 1, 1)[:ndim], (2, 1, 1)[:ndim]]
    widths = [m.out_channels for m in net if isinstance(m, (nn.Conv2d, nn.Conv3d))]
    assert widths == [6, 12, 24, 24, 24]
    first = next(m for m in net if isinstance(m, nn.Linear))
    assert first.in_features == 24 * torch.Size((4, 5, 7)[:ndim]).numel()


@both
def test_models_are_given_by_name_or_as_they_are(ndim):
    for given, count in (("tps", ndim * 4**ndim), (SplineModel(3, 0.1), ndim * 3**ndim), (model("projective"), (ndim + 1) ** 2 - 1)):
        assert localiser((1, *SHAPES[ndim]), given)(texture(SHAPES[ndim])).shape == (1, count)


@both
def test_items_are_normalised_each_by_itself(ndim):
    """No statistics of batches: an item says the same alone, in training too, and however bright or large the others are."""
    net = localiser((1, *SHAPES[ndim]), "affine").train()
    nn.init.normal_(net[-1].weight)
    looked = texture(SHAPES[ndim], n=3)
    alone = net(looked[:1])
    looked[1:] *= 1000
    torch.testing.assert_close(net(looked)[:1], alone, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(net.eval()(looked)[:1], alone, atol=1e-4, rtol=1e-4)
    assert not list(net.buffers())


@both
def test_what_does_not_fit_is_named(ndim):
    for shape in ((8, 8), (1, 8), (1, 8, 8, 8, 8), (0, 8, 8), (1, 8, 0)):
        with pytest.raises(GeometryError, match=r"shape: .*expected \(C, H, W\) or \(C, H, W, D\)"):
            localiser(shape)
    for name in ("width", "hidden", "images"):
        with pytest.raises(OptionError, match=rf"{name}: 0; expected 1 or more"):
            localiser((1, *SHAPES[ndim]), **{name: 0})
    with pytest.raises(OptionError, match=r"model: 'afine' is not known.*nearest: affine"):
        localiser((1, *SHAPES[ndim]), "afine")
    net = localiser((1, *SHAPES[ndim]), "rigid")
    with pytest.raises(GeometryError, match=rf"the affine model in {ndim}D needs"):
        SpatialTransformer(net, "affine")(texture(SHAPES[ndim]))


@both
def test_it_is_copied_saved_and_loaded(ndim):
    net, other = (SpatialTransformer(localiser((1, *SHAPES[ndim]), "tps"), "tps") for _ in range(2))
    nn.init.normal_(net.localisation[-1].weight, std=1e-3)
    moving = texture(SHAPES[ndim])
    moved = net(moving)
    other.load_state_dict(net.state_dict())
    assert torch.equal(other(moving), moved) and torch.equal(copy.deepcopy(net)(moving), moved)
    assert all(key.startswith("localisation.") for key in net.state_dict())


# -------------------------------------------------------------------------------------------------------------- training

def squares(ndim, n=24, seed=0):
    """Two kinds of pictures, a bar along either axis, anywhere in them, and which kind each is."""
    draw = torch.Generator().manual_seed(seed)
    shape = (18, 22, 14)[:ndim]
    kind = torch.arange(n) % 2
    images = 0.1 * torch.randn(n, 1, *shape, generator=draw)
    for image, k in zip(images, kind, strict=True):
        corner = [int(torch.randint(0, s - 8, (1,), generator=draw)) for s in shape]
        size = [8 if a == int(k) else 3 for a in range(ndim)]
        image[(0, *[slice(c, c + s) for c, s in zip(corner, size, strict=True)])] += 1
    return images, kind


@both
@pytest.mark.parametrize("how", ["parallel", "in sequence"])
def test_two_transformers_train(ndim, how):
    torch.manual_seed(0)
    images, kind = squares(ndim)
    shape, size = images.shape[2:], (9, 11, 7)[:ndim]

    def layer(name, here):
        return SpatialTransformer(localiser((1, *here), name, width=4, hidden=8), name, size=size)

    first, voxels = layer("attention", shape), torch.Size(size).numel()
    if how == "parallel":
        net = nn.Sequential(Parallel(first, layer("affine", shape)), nn.Flatten(), nn.Linear(2 * voxels, 2))
    else:
        net = nn.Sequential(first, layer("affine", size), nn.Flatten(), nn.Linear(voxels, 2))
    optimiser = torch.optim.Adam(net.parameters(), lr=3e-3)
    losses = []
    for _ in range(30):
        optimiser.zero_grad()
        loss = nn.functional.cross_entropy(net(images), kind)
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]
    localisers = [m.localisation for m in net.modules() if isinstance(m, SpatialTransformer)]
    assert all(float(m[-1].weight.detach().abs().sum()) > 0 for m in localisers)  # both have left the identity
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in net.parameters())


@both
def test_a_pair_is_aligned_by_a_localiser_that_sees_both(ndim):
    torch.manual_seed(1)
    shape = (24, 30, 16)[:ndim]
    fixed = texture(shape, n=4, sigma=3.0)
    theta = 0.15 * (torch.rand(4, ndim) * 2 - 1)
    known = nn.Module()
    known.forward = lambda *images: theta
    moving = SpatialTransformer(known, "translation", padding="border")(fixed)
    layer = SpatialTransformer(localiser((1, *shape), "translation", images=2, width=8), "translation", padding="border")
    optimiser = torch.optim.Adam(layer.parameters(), lr=2e-3)
    losses = []
    for _ in range(60):
        optimiser.zero_grad()
        loss = (layer(moving, fixed) - fixed).square().mean()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]
    assert float((layer.localisation(moving, fixed).detach() + theta).abs().mean()) < 0.5 * float(theta.abs().mean())


@both
def test_a_tenth_of_the_gradient_arrives_in_the_localiser(ndim):
    moving = texture(SHAPES[ndim], n=2)
    net = localiser((1, *SHAPES[ndim]), "affine", width=4)
    nn.init.normal_(net[-1].weight, std=0.01)
    grads = []
    for scale in (1.0, 0.1):
        net.zero_grad()
        before = nn.Conv2d(1, 1, 1) if ndim == 2 else nn.Conv3d(1, 1, 1)
        nn.init.ones_(before.weight)
        nn.init.zeros_(before.bias)
        features = before(moving)
        features.retain_grad()
        SpatialTransformer(_Detached(net), gradient_scale=scale)(features).square().sum().backward()
        grads.append(([p.grad.clone() for p in net.parameters()], features.grad.clone()))
    for full, tenth in zip(grads[0][0], grads[1][0], strict=True):
        torch.testing.assert_close(tenth, 0.1 * full, rtol=1e-3, atol=1e-4 * float(full.abs().max()))
    torch.testing.assert_close(grads[1][1], grads[0][1], rtol=1e-4, atol=1e-5)  # through the sampler


class _Detached(nn.Module):
    """A localisation that sends no gradient into what it looks at, so that only the sampler's arrives there."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, images):
        return self.net(images.detach())


def test_images_it_was_not_built_for_are_refused():
    net = localiser((1, 12, 10), "rigid", images=2)
    image = torch.zeros(2, 1, 12, 10)
    for wrong in ((image,), (image, image, image), (image, image[..., 1:]), (image, image[:, [0, 0]]), ()):
        with pytest.raises(GeometryError, match=r"localiser: was built for 2 of \(N, 1, 12, 10\), got"):
            net(*wrong)
