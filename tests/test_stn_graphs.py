"""The spatial transformer traced and under deterministic algorithms: the same numbers as eager."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from regkit.filters import spline_coefficients
from regkit.localisation import FreeParameters, localiser
from regkit.space import model
from regkit.stn import Parallel, SpatialTransformer

from .test_stn import SHAPES, Says, both, some_theta, texture

traced = pytest.mark.parametrize("name", ["affine", "projective", "tps"])


def gentle(name, ndim, n=1, seed=3):
    """θ that enlarges everywhere: nothing is smoothed."""
    theta = some_theta(name, ndim, n, seed=seed, size=0.01 if name == "tps" else 0.03)
    if name == "tps":
        rest = torch.linspace(-1, 1, 4)
        ends = [rest * s / max(SHAPES[ndim]) for s in SHAPES[ndim]]
        theta -= 0.3 * torch.stack(torch.meshgrid(*ends, indexing="ij"), -1).flatten()
    else:
        theta[:, model("rigid").count(ndim)] = -0.3
    return theta


class Net(nn.Module):
    """A localiser away from the identity, a transformer behind it."""

    def __init__(self, name, ndim, **options):
        super().__init__()
        net = localiser((1, *SHAPES[ndim]), name, width=4, hidden=8)
        with torch.no_grad():
            net[-1].weight += 0.003 * torch.randn(net[-1].weight.shape, generator=torch.Generator().manual_seed(1))
            net[-1].bias += gentle(name, ndim)[0]
        self.layer = SpatialTransformer(net, name, **options)

    def forward(self, moving):
        return self.layer(moving)


@pytest.fixture
def fresh():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.fixture
def deterministic():
    """Puts torch back, whatever happens."""
    before = torch.get_num_threads()
    yield lambda on: torch.use_deterministic_algorithms(on)
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(before)


@pytest.mark.parametrize(("name", "ndim", "kernel", "padding", "antialias"), [
    ("affine", 2, "linear", "zeros", "auto"), ("affine", 3, "linear", "reflection", "auto"), ("affine", 2, "cubic", "border", "auto"),
    ("affine", 3, "nearest", "zeros", "auto"), ("projective", 3, "linear", "border", "none"), ("tps", 2, "linear", "reflection", "auto"),
    ("tps", 3, "cubic", "zeros", "none")])
def test_compiled_is_eager_where_nothing_shrinks(ndim, name, kernel, padding, antialias, fresh):
    moving = texture(SHAPES[ndim], n=2)
    layer = SpatialTransformer(Says(gentle(name, ndim, 2)), name, kernel=kernel, antialias=antialias, padding=padding)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    close = (compiled(moving) - layer(moving)).abs() < 1e-5
    assert float(close.float().mean()) > (0.995 if kernel == "nearest" else 1 - 1e-9)  # rounding may turn a tie


@pytest.mark.parametrize(("name", "ndim"), [("affine", 2), ("projective", 3)])
def test_gradients_of_the_compiled_net_are_those_of_the_eager_one(ndim, name, fresh):
    net, moving = Net(name, ndim, antialias="auto" if name == "affine" else "none"), texture(SHAPES[ndim], n=2).requires_grad_()
    found = []
    for f in (net, torch.compile(net, backend="aot_eager", fullgraph=True)):
        net.zero_grad()
        moving.grad = None
        moved = f(moving)
        moved.square().sum().backward()
        found.append([moved.detach(), moving.grad, *[p.grad for p in net.parameters()]])
    for eager, compiled in zip(*found, strict=True):
        torch.testing.assert_close(compiled, eager, atol=1e-5 * max(1, float(eager.abs().max())), rtol=1e-4)


@both
@pytest.mark.parametrize("kernel", ["linear", "cubic"])
def test_compiled_smooths_as_eager_where_the_image_shrinks_alike(ndim, kernel, fresh):
    moving, theta = texture(SHAPES[ndim], n=2, sigma=0.6), some_theta("affine", ndim, 2, size=0.01)
    theta[:, model("rigid").count(ndim)] = torch.tensor([0.25, 0.6])  # less than two voxels a step: in no blocks
    layer = SpatialTransformer(Says(theta), kernel=kernel)
    moved = torch.compile(layer, backend="eager", fullgraph=True)(moving)
    torch.testing.assert_close(moved, layer(moving), atol=1e-5, rtol=0)
    assert float((moved - SpatialTransformer(Says(theta), kernel=kernel, antialias="none")(moving)).abs().max()) > 0.1


@pytest.mark.parametrize(("name", "ndim"), [("projective", 2), ("tps", 2)])
def test_a_curved_map_that_shrinks_is_smoothed_in_a_graph_too(ndim, name, fresh):
    """From three octaves of a scale-space, whatever is due: close, and far from what nothing does."""
    shape, size = (40, 52, 28)[:ndim], (14, 17, 10)[:ndim]
    moving = texture(shape, n=2, sigma=0.6)
    layer = SpatialTransformer(Says(some_theta(name, ndim, 2, size=0.02)), name, size=size, padding="border")
    rough = SpatialTransformer(layer.localisation, name, size=size, padding="border", antialias="none")
    found, eager = torch.compile(layer, backend="eager", fullgraph=True)(moving), layer(moving)
    assert float((found - eager).norm() / eager.norm()) < 0.1 < 0.5 < float((rough(moving) - eager).norm() / eager.norm())


@both
@traced
def test_exported_is_eager(ndim, name):
    # the levels of a scale-space are long to trace: once they are seen to be
    net = Net(name, ndim, antialias="auto" if name == "affine" or (name, ndim) == ("tps", 2) else "none").eval()
    moving = texture(SHAPES[ndim], n=2)
    exported = torch.export.export(net, (moving,)).module()
    torch.testing.assert_close(exported(moving), net(moving), atol=1e-5, rtol=0)
    other = texture(SHAPES[ndim], n=2, seed=4)
    torch.testing.assert_close(exported(other), net(other), atol=1e-5, rtol=0)


def test_an_export_leaves_nothing_behind_that_holds_no_numbers():
    """Filters are kept from call to call; those of a graph must not be."""
    spline_coefficients.cache_clear()
    net, moving = Net("affine", 2, kernel="cubic").eval(), texture(SHAPES[2], n=2)
    exported = torch.export.export(net, (moving,)).module()
    found = net(moving)
    assert type(found.detach()) is torch.Tensor and bool(found.isfinite().all())
    torch.testing.assert_close(exported(moving), found, atol=1e-5, rtol=0)


@both
@traced
def test_deterministic_algorithms_change_nothing_and_repeat_to_the_bit(ndim, name, deterministic):
    found = []
    for on in (False, True, True):
        deterministic(on)
        torch.set_num_threads(2)
        free, moving = FreeParameters(model(name).count(ndim)), texture(SHAPES[ndim], n=2, c=2).requires_grad_()
        with torch.no_grad():
            free.theta += some_theta(name, ndim, size=0.05)
        for padding, kernel in (("zeros", "linear"), ("reflection", "linear"), ("border", "cubic")):
            layer = SpatialTransformer(free, name, padding=padding, kernel=kernel, size=(7, 12, 5)[:ndim])
            moved = layer(moving)
            moved.square().mean().backward()
            found.append((moved.detach(), free.theta.grad.clone(), moving.grad.clone()))
    plain, fixed, again = found[:3], found[3:6], found[6:]
    for a, b, c in zip(plain, fixed, again, strict=True):
        for x, y, z in zip(a, b, c, strict=True):
            torch.testing.assert_close(y, x, atol=1e-5, rtol=1e-3)
            assert torch.equal(y, z)


def test_transformers_side_by_side_and_one_behind_the_other_are_compiled(fresh):
    half = tuple(n // 2 for n in SHAPES[2])
    first = [SpatialTransformer(Says(gentle(name, 2)), name) for name in ("affine", "similarity")]
    net = nn.Sequential(Parallel(*first), SpatialTransformer(Says(torch.zeros(1, 3)), "attention", size=half))
    moving = texture(SHAPES[2], n=2)
    assert net(moving).shape == (2, 2, *half)
    # twice as long a step is smoothed in blocks by eager, and in none in a graph
    torch.testing.assert_close(torch.compile(net, backend="eager", fullgraph=True)(moving), net(moving), atol=0.05, rtol=0)


@pytest.mark.parametrize("antialias", ["none", "auto"])
@pytest.mark.parametrize("name", ["affine", "projective", "tps"])
def test_an_exported_batch_may_be_of_any_size(name, antialias):
    torch.manual_seed(0)
    net = SpatialTransformer(localiser((1, 20, 26), name, width=4), name, antialias=antialias)
    torch.nn.init.normal_(net.localisation[-1].weight, std=0.02)
    batch = torch.export.Dim("N", min=2, max=64)
    graph = torch.export.export(net, (torch.rand(4, 1, 20, 26),), dynamic_shapes={"moving": {0: batch}}).module()
    images = torch.rand(7, 1, 20, 26)
    torch.testing.assert_close(graph(images), net(images), atol=1e-5, rtol=0)
