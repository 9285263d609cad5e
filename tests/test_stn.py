"""The spatial transformer module: identity at θ = 0, the known map at a known θ, gradients, and its place in a net.

Its transform and what other libraries make of the same θ: `test_stn_transform.py`; traced and deterministic: `test_stn_graphs.py`."""

from __future__ import annotations

import math
import pickle

import numpy as np
import pytest
import torch
from torch import nn

from regkit.errors import GeometryError, OptionError
from regkit.filters import smooth
from regkit.image import Image
from regkit.localisation import FreeParameters
from regkit.sampling import inside, warp
from regkit.similarity import similarity
from regkit.space import MODEL_NAMES, Frame, Grid, Matrix, SplineModel, model
from regkit.stn import Parallel, SpatialTransformer, unit_grid

both = pytest.mark.parametrize("ndim", [2, 3], ids=["2D", "3D"])
every = pytest.mark.parametrize("name", MODEL_NAMES)
kernels = pytest.mark.parametrize("kernel", ["linear", "nearest", "cubic"])
SHAPES = {2: (14, 23), 3: (14, 23, 10)}


class Says(nn.Module):
    """A localisation that says what it was told."""

    def __init__(self, theta):
        super().__init__()
        self.theta = theta

    def forward(self, *images):
        return self.theta


class Looks(nn.Module):
    """A small localisation net that starts at the identity."""

    def __init__(self, ndim, count):
        super().__init__()
        conv = (nn.Conv2d, nn.Conv3d)[ndim - 2]
        self.body = nn.Sequential(conv(2, 3, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(count))

    def forward(self, moving, fixed):
        return self.body(torch.cat([moving, fixed], 1))


def texture(shape, n=1, c=1, seed=0, dtype=torch.float32, sigma=1.5):
    draw = torch.Generator().manual_seed(seed)
    data = smooth(torch.randn(n, c, *shape, generator=draw, dtype=dtype), [sigma] * len(shape))
    return data / data.std()


def some_theta(name, ndim, n=1, seed=0, size=0.25, dtype=torch.float32):
    return size * torch.randn(n, model(name).count(ndim), generator=torch.Generator().manual_seed(seed), dtype=dtype)


def truth(name, theta, grid):
    """The map that θ stands for, on a grid."""
    frame = Frame.of(grid)
    if name == "tps":
        return model(name).transform(theta.double(), frame)
    return Matrix(frame.world(model(name).exp(theta.double(), grid.ndim)))


def oblique(shape, spacing=(1.5, 0.7, 3.0), centre=(20.0, -8.0, 5.0), angle=0.4):
    d = len(shape)
    theta = torch.zeros(1, model("rigid").count(d), dtype=torch.float64)
    theta[0, d] = angle
    a = torch.eye(d + 1, dtype=torch.float64)
    a[:d, :d] = model("rigid").exp(theta, d)[0, :d, :d] * torch.tensor(spacing[:d])
    a[:d, d] = torch.tensor(centre[:d]) - a[:d, :d] @ torch.tensor([(n - 1) / 2 for n in shape], dtype=torch.float64)
    return Grid(shape, a)


@both
@every
@pytest.mark.parametrize("kernel", ["linear", "nearest", "integer", "cubic"])
@pytest.mark.parametrize("padding", ["zeros", "border", "reflection"])
def test_theta_zero_is_the_identity(ndim, name, kernel, padding):
    moving = texture(SHAPES[ndim], n=2, c=3)
    layer = SpatialTransformer(FreeParameters(model(name).count(ndim)), name, kernel=kernel, padding=padding)
    moved = layer(moving).detach()
    assert moved.shape == moving.shape
    assert float((moved - moving).abs().max()) < 1e-5 * float(moving.max() - moving.min())


@both
@every
@kernels
def test_a_known_theta_is_the_known_map(ndim, name, kernel):
    moving, grid = texture(SHAPES[ndim], n=2, c=2), unit_grid(SHAPES[ndim])
    theta = some_theta(name, ndim, 2, size=0.05 if name == "tps" else 0.25)
    antialias = "none" if name in ("projective", "tps") else "auto"  # warp looks for the steps of both items together there
    moved = SpatialTransformer(Says(theta), name, kernel=kernel, antialias=antialias)(moving)
    expected = warp(Image(moving, grid), truth(name, theta, grid), grid, kernel=kernel, antialias=antialias).data
    same = (moved - expected).abs() < 1e-4
    assert float(same.float().mean()) > (0.995 if kernel == "nearest" else 1 - 1e-9)  # rounding may turn a tie
    assert float((moved - moving).abs().max()) > 0.5


@both
@pytest.mark.parametrize("kernel", ["linear", "cubic"])
def test_grids_give_millimetres(ndim, kernel):
    moving_grid, fixed_grid = oblique(SHAPES[ndim]), oblique((9, 12, 11)[:ndim], (2.0, 1.1, 1.4), (-50.0, 3.0, 9.0), -0.7)
    moving = texture(moving_grid.shape)
    theta = some_theta("affine", ndim)
    layer = SpatialTransformer(Says(theta), kernel=kernel)
    frame = Frame.of(fixed_grid)
    centre = Matrix.shift(moving_grid.centre - fixed_grid.centre)
    expected = centre @ Matrix(frame.world(model("affine").exp(theta.double(), ndim)))
    found = layer.transform(moving, moving_grid=moving_grid, fixed_grid=fixed_grid)
    torch.testing.assert_close(found.matrix, expected.matrix)
    assert found.affine
    moved = layer(moving, moving_grid=moving_grid, fixed_grid=fixed_grid)
    expected = warp(Image(moving, moving_grid), expected, fixed_grid, kernel=kernel).data
    torch.testing.assert_close(moved, expected, atol=2e-4, rtol=0)
    assert float((expected != 0).float().mean()) > 0.3


@both
def test_rigid_stays_rigid_in_mm_and_theta_zero_lays_centre_on_centre(ndim):
    moving_grid, fixed_grid = oblique(SHAPES[ndim]), oblique((9, 12, 11)[:ndim], centre=(-50.0, 3.0, 9.0))
    moving = texture(moving_grid.shape)
    turn = SpatialTransformer(Says(some_theta("rigid", ndim, size=0.6)), "rigid").transform(
        moving, moving_grid=moving_grid, fixed_grid=fixed_grid).matrix[0, :ndim, :ndim]
    torch.testing.assert_close(turn @ turn.T, torch.eye(ndim, dtype=torch.float64), atol=1e-6, rtol=0)
    start = SpatialTransformer(FreeParameters(model("rigid").count(ndim)), "rigid").transform(
        moving, moving_grid=moving_grid, fixed_grid=fixed_grid)
    torch.testing.assert_close(start(fixed_grid.centre[None])[0], moving_grid.centre)


@both
def test_shift_and_turn_go_where_the_conventions_say(ndim):
    """T maps fixed to moving: the output shows at x what the input has at T(x); a shift of 1 is half the longest edge."""
    shape = (20, 12, 8)[:ndim]
    moving = torch.zeros(1, 1, *shape)
    moving[(0, 0, 12, *[3] * (ndim - 1))] = 1
    theta = torch.zeros(1, model("rigid").count(ndim))
    theta[0, 0] = 0.5  # 5 voxels
    moved = SpatialTransformer(Says(theta), "rigid")(moving)
    assert moved[0, 0].argmax() == moving.roll(-5, 2)[0, 0].argmax()
    square = torch.zeros(1, 1, *(11, 11, 5)[:ndim])
    square[(0, 0, 9, 5, *[2] * (ndim - 2))] = 1
    theta = torch.zeros(1, model("rigid").count(ndim))
    theta[0, ndim] = torch.pi / 2  # the point at +i is fetched to where a quarter turn takes to it: -j
    moved = SpatialTransformer(Says(theta), "rigid")(square)
    assert [int(v) for v in (moved[0, 0] == moved.max()).nonzero()[0]] == [5, 1, 2][:ndim]


@both
@every
@pytest.mark.parametrize("kernel", ["linear", "cubic"])
def test_gradients_in_theta(ndim, name, kernel):
    moving = texture((6, 8, 5)[:ndim], c=2, dtype=torch.float64)
    which = SplineModel(2) if name == "tps" else model(name)
    theta = 0.15 * torch.randn(1, which.count(ndim), generator=torch.Generator().manual_seed(3), dtype=torch.float64)

    def see(t, padding):
        layer = SpatialTransformer(Says(t), which, kernel=kernel, padding=padding, size=(3, 4, 3)[:ndim], antialias="none")
        return layer(moving)

    for padding in ("border", "reflection"):
        assert torch.autograd.gradcheck(lambda t, p=padding: see(t, p), theta.requires_grad_(), fast_mode=ndim == 3)


@both
@every
@pytest.mark.parametrize("kernel", ["linear", "nearest", "cubic"])
def test_gradients_in_the_image(ndim, name, kernel):
    moving = texture((6, 8, 5)[:ndim], c=2, dtype=torch.float64).requires_grad_()
    layer = SpatialTransformer(Says(some_theta(name, ndim, seed=3, size=0.1)), name, kernel=kernel, size=(4, 5, 3)[:ndim])
    assert torch.autograd.gradcheck(layer, moving, fast_mode=True, atol=1e-4)  # filters are float32


@both
@every
def test_gradients_reach_the_localisation_and_the_image(ndim, name):
    fixed, moving = texture(SHAPES[ndim], n=2), texture(SHAPES[ndim], n=2, seed=1).requires_grad_()
    net = Looks(ndim, model(name).count(ndim))
    net(moving, fixed)  # makes the lazy layer
    with torch.no_grad():
        net.body[-1].weight *= 0.3
    layer = SpatialTransformer(net, name, size=tuple(n * 2 // 3 for n in SHAPES[ndim]))  # smooths
    layer(moving, fixed).square().mean().backward()
    for p in layer.parameters():
        assert bool(p.grad.isfinite().all()) and bool(p.grad.abs().sum() > 0)
    assert bool(moving.grad.isfinite().all()) and bool((moving.grad != 0).float().mean() > 0.3)


@both
@every
def test_gradients_are_finite_at_the_start_whatever_is_smoothed(ndim, name):
    """θ = 0, where a spline's kernels have their corner at the control points."""
    for size in (SHAPES[ndim], tuple(n // 2 for n in SHAPES[ndim]), tuple(n * 2 for n in SHAPES[ndim])):
        for padding in ("zeros", "reflection"):
            free = FreeParameters(model(name).count(ndim))
            SpatialTransformer(free, name, size=size, padding=padding)(texture(SHAPES[ndim], n=2)).square().sum().backward()
            assert bool(free.theta.grad.isfinite().all()) and bool(free.theta.grad.abs().sum() > 0)


@both
@kernels
def test_a_smaller_output_sees_the_same_field_of_view(ndim, kernel):
    shape, size = (24, 17, 12)[:ndim], (8, 5, 6)[:ndim]
    for axis in range(ndim):
        ramp = (torch.arange(shape[axis], dtype=torch.float32) + 0.5) / shape[axis]  # 0 and 1 at the outer edges
        moving = ramp.reshape([-1 if a == axis else 1 for a in range(ndim)]).expand(1, 1, *shape)
        layer = SpatialTransformer(FreeParameters(model("affine").count(ndim)), size=size, kernel=kernel)
        moved = layer(moving).detach()
        assert moved.shape == (1, 1, *size)
        expected = (torch.arange(size[axis], dtype=torch.float32) + 0.5) / size[axis]
        middle = moved[0, 0].movedim(axis, 0).flatten(1).mean(1)
        half_a_voxel = 0.51 / shape[axis]
        # the filter is cut at the image's ends, which the outer values see: of the ramp, 1 / size is a step
        torch.testing.assert_close(middle[1:-1], expected[1:-1], atol=half_a_voxel if kernel == "nearest" else 0.05 / size[axis], rtol=0)


@both
@pytest.mark.parametrize("kernel", ["linear", "cubic"])
def test_a_smaller_output_is_anti_aliased_and_a_constant_stays(ndim, kernel):
    shape, size = (23, 19, 14)[:ndim], (5, 6, 3)[:ndim]  # factors that divide nothing
    checker = (sum(torch.meshgrid(*[torch.arange(n) for n in shape], indexing="ij")) % 2 * 2.0 - 1)[None, None]
    free = FreeParameters(model("affine").count(ndim))
    inner = (..., *[slice(1, -1)] * ndim)
    smoothed = SpatialTransformer(free, size=size, kernel=kernel)(checker).detach()
    raw = SpatialTransformer(free, size=size, kernel="nearest")(checker).detach()
    assert float(raw.abs().min()) == 1 and float(smoothed[inner].abs().max()) < 0.05
    constant = SpatialTransformer(free, size=size, kernel=kernel)(torch.full((1, 1, *shape), 4.0))
    torch.testing.assert_close(constant, torch.full((1, 1, *size), 4.0))
    assert not torch.allclose(SpatialTransformer(free, size=size, kernel=kernel, antialias="none")(checker), smoothed, atol=0.05)


@both
@pytest.mark.parametrize("kernel", ["linear", "cubic"])
def test_zeros_lie_exactly_outside_the_moving_image(ndim, kernel):
    """Also when its last voxels fill no block of the anti-aliasing."""
    shape, size = (23, 19, 14)[:ndim], (7, 6, 5)[:ndim]
    theta = some_theta("affine", ndim, seed=5, size=0.4)
    layer = SpatialTransformer(Says(theta), size=size, kernel=kernel)
    moved = layer(torch.full((1, 2, *shape), 3.0))
    moving_grid = unit_grid(shape)
    fixed_grid = unit_grid(size, moving_grid)
    transform = layer.transform(torch.zeros(1, 2, *shape), moving_grid=moving_grid, fixed_grid=fixed_grid)
    seen = inside(moving_grid.to_index(transform(fixed_grid.points())), shape).reshape(1, 1, *size)
    assert 0.1 < float(seen.float().mean()) < 0.99
    torch.testing.assert_close(moved, (3.0 * seen).expand(1, 2, *size), atol=1e-4, rtol=0)


@both
def test_border_padding_continues_the_outermost_voxels(ndim):
    moving = texture(SHAPES[ndim])
    theta = torch.zeros(1, ndim)
    theta[0, 0] = 10.0
    far = SpatialTransformer(Says(theta), "translation", padding="border")(moving)
    torch.testing.assert_close(far, moving[:, :, -1:].expand_as(moving), atol=1e-4, rtol=0)
    assert not SpatialTransformer(Says(theta), "translation", padding="zeros")(moving).any()


@both
def test_reflection_padding_mirrors_at_the_outer_edges(ndim):
    """Whole voxels: numpy's symmetric padding, cut out elsewhere."""
    shape = SHAPES[ndim]
    moving, by, longest = texture(shape, c=2), (5, -9, 3)[:ndim], max(shape)
    wide = torch.from_numpy(np.pad(moving.numpy(), [(0, 0)] * 2 + [(12, 12)] * ndim, mode="symmetric"))
    expected = wide[(..., *[slice(12 + b, 12 + b + n) for b, n in zip(by, shape, strict=True)])]
    theta = torch.tensor([[2 * b / longest for b in by]])
    for kernel in ("linear", "nearest", "cubic"):
        moved = SpatialTransformer(Says(theta), "translation", kernel=kernel, padding="reflection")(moving)
        torch.testing.assert_close(moved, expected, atol=5e-5, rtol=0)


@both
@every
@pytest.mark.parametrize("antialias", ["auto", "none"])
def test_items_of_every_model_are_independent(ndim, name, antialias):
    moving, theta = texture(SHAPES[ndim], n=3, c=2), some_theta(name, ndim, 3, seed=4, size=0.1)
    layer = SpatialTransformer(Says(theta), name, antialias=antialias)
    moved, many = layer(moving), layer(moving[:1])
    for i in range(3):
        alone = SpatialTransformer(Says(theta[i: i + 1]), name, antialias=antialias)
        torch.testing.assert_close(alone(moving[i: i + 1]), moved[i: i + 1], atol=2e-5, rtol=0)
        torch.testing.assert_close(alone(moving[:1]), many[i: i + 1], atol=2e-5, rtol=0)
        torch.testing.assert_close(alone(moving)[i: i + 1], moved[i: i + 1], atol=2e-5, rtol=0)


@both
@kernels
def test_batch_items_are_independent(ndim, kernel):
    """One item that is shrunk, and so smoothed, leaves the others sharp."""
    moving, theta = texture(SHAPES[ndim], n=3, sigma=0.5), some_theta("affine", ndim, 3)
    theta[:, model("rigid").count(ndim)] = torch.tensor([-0.3, 0.0, 1.0])
    moved = SpatialTransformer(Says(theta), kernel=kernel)(moving)
    for i in range(3):
        alone = SpatialTransformer(Says(theta[i: i + 1]), kernel=kernel)(moving[i: i + 1])
        torch.testing.assert_close(alone, moved[i: i + 1], atol=1e-5, rtol=0)
    many = SpatialTransformer(Says(theta), kernel=kernel)(moving[:1])
    torch.testing.assert_close(many[:1], moved[:1])
    assert many.shape == (3, 1, *SHAPES[ndim])
    one = SpatialTransformer(Says(theta[:1]), kernel=kernel)(moving)
    torch.testing.assert_close(one[:1], moved[:1])
    assert one.shape == moving.shape


def test_a_layer_of_a_2d_net():
    """Feature maps, H ≠ W, inside nn.Sequential; the whole learns."""
    count = model("affine").count(2)
    localisation = nn.Sequential(nn.Conv2d(4, 2, 3), nn.ReLU(), nn.AdaptiveAvgPool2d((3, 5)), nn.Flatten(),
                                 nn.Linear(30, count))
    nn.init.zeros_(localisation[-1].weight)
    nn.init.zeros_(localisation[-1].bias)
    net = nn.Sequential(nn.Conv2d(1, 4, 3), SpatialTransformer(localisation, size=(6, 10)), nn.Flatten(), nn.Linear(240, 3))
    images = texture((12, 20), n=2)
    features = net[0](images)
    assert features.shape[2:] == (10, 18)
    torch.testing.assert_close(SpatialTransformer(localisation)(features), features, atol=1e-5, rtol=0)
    out = net(images)
    assert out.shape == (2, 3)
    out.square().sum().backward()
    assert localisation[-1].weight.grad.abs().sum() > 0 and net[0].weight.grad.abs().sum() > 0
    state = {k for k in net.state_dict() if k.startswith("1.localisation.")}
    assert len(state) == 4


@both
def test_the_gradient_into_the_localisation_is_scaled_and_nothing_else(ndim):
    moving = texture(SHAPES[ndim], n=2)
    grads = []
    for scale in (1.0, 0.1, 0.0):
        free, image = FreeParameters(model("affine").count(ndim)), moving.clone().requires_grad_()
        with torch.no_grad():
            free.theta += some_theta("affine", ndim, size=0.1)
        moved = SpatialTransformer(free, gradient_scale=scale)(image)
        moved.square().sum().backward()
        grads.append((moved.detach(), free.theta.grad, image.grad))
    for scale, (moved, theta, image) in zip((1.0, 0.1, 0.0), grads, strict=True):
        torch.testing.assert_close(moved, grads[0][0], atol=1e-5, rtol=0)
        torch.testing.assert_close(theta, scale * grads[0][1], rtol=1e-3, atol=1e-4 * float(grads[0][1].abs().max()))
        torch.testing.assert_close(image, grads[0][2], atol=1e-4, rtol=0)
    for wrong in (-0.1, math.nan, math.inf):
        with pytest.raises(OptionError, match=r"gradient_scale: .*expected a number from 0 on"):
            SpatialTransformer(free, gradient_scale=wrong)


@both
def test_parallel_lays_its_modules_outputs_side_by_side(ndim):
    moving, fixed = texture(SHAPES[ndim], n=2, c=3), texture(SHAPES[ndim], n=2, seed=1)
    layers = [SpatialTransformer(Says(some_theta(name, ndim, 2)), name, size=(5, 7, 4)[:ndim]) for name in ("attention", "affine")]
    both_ = Parallel(*layers)
    moved = both_(moving, fixed)
    assert moved.shape == (2, 6, *(5, 7, 4)[:ndim])
    assert torch.equal(moved, torch.cat([layer(moving, fixed) for layer in layers], 1))
    assert len(list(both_.children())) == 1 and len(both_.branches) == 2


@both
@pytest.mark.parametrize("kernel", ["linear", "cubic", "nearest"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_dtype_out_is_dtype_in_and_grids_are_no_coarser_than_float32(ndim, kernel, dtype):
    shape = (30, 41, 8)[:ndim]
    moving = texture(shape).to(dtype)
    theta = some_theta("affine", ndim, size=0.1)
    for size in (None, (9, 12, 4)[:ndim]):
        moved = SpatialTransformer(Says(theta), kernel=kernel, size=size)(moving)
        assert moved.dtype == dtype
        exact = SpatialTransformer(Says(theta), kernel=kernel, size=size)(moving.float())
        bound = {torch.float16: 2e-3, torch.bfloat16: 2e-2, torch.float64: 1e-4}[dtype]
        close = (moved.float() - exact).abs() < bound
        assert float(close.float().mean()) > (0.995 if kernel == "nearest" else 1 - 1e-9)


@both
@pytest.mark.parametrize("kernel", ["linear", "cubic"])
def test_autocast_touches_no_voxel_and_no_grid(ndim, kernel):
    moving = texture((30, 41, 8)[:ndim])
    layer = SpatialTransformer(Says(some_theta("affine", ndim, size=0.1)), kernel=kernel, size=(9, 12, 4)[:ndim])
    expected = layer(moving)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(moving), expected)


@both
def test_a_run_under_inference_mode_leaves_training_possible(ndim):
    shape, size = (21, 27, 13)[:ndim], (7, 9, 4)[:ndim]  # sizes no other test uses: nothing is kept yet
    layer = SpatialTransformer(FreeParameters(model("affine").count(ndim)), kernel="cubic", size=size)
    moving = texture(shape)
    with torch.inference_mode():
        layer(moving)
    layer(moving).square().sum().backward()
    assert layer.localisation.theta.grad.abs().sum() > 0


@both
@pytest.mark.parametrize("name", ["rigid", "affine", "projective", "tps"])
def test_free_parameters_learn_a_known_map(ndim, name):
    shape = (28, 22) if ndim == 2 else (18, 16, 14)
    known = some_theta(name, ndim, seed=2, size=0.04 if name == "tps" else 0.1)
    if name == "tps":
        known += 0.1
    moving = texture(shape, sigma=2.5)
    fixed = SpatialTransformer(Says(known), name, padding="border")(moving)
    free = FreeParameters(model(name).count(ndim))
    layer = SpatialTransformer(free, name, padding="border")
    optimiser = torch.optim.Adam(free.parameters(), lr=0.02)
    loss = similarity("mse").loss
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, 80)
    for _ in range(80):
        optimiser.zero_grad()
        loss(layer(moving), fixed, None).sum().backward()
        optimiser.step()
        schedule.step()
    grid = unit_grid(shape)
    maps = [truth(name, t.detach(), grid) for t in (free.theta, known)]
    if name == "tps":  # many parameters, few of which the corners say anything of
        off, before = ((m(grid.points()) - maps[1](grid.points())).norm(dim=-1).mean() for m in (maps[0], lambda x: x))
    else:
        off, before = ((m(grid.corners()) - maps[1](grid.corners())).norm(dim=-1).max() for m in (maps[0], lambda x: x))
    assert float(before) > 1.0  # voxels
    assert float(off) < (0.3 if name == "tps" else 0.1)


@both
def test_what_does_not_fit_is_named(ndim):
    moving = texture(SHAPES[ndim], n=2)
    count = model("affine").count(ndim)
    text = rf"localisation: gave θ of shape .*affine model in {ndim}D needs \(N, {count}\)"
    for theta in (torch.zeros(2, count - 1), torch.zeros(count), torch.zeros(2, 2, count)):
        with pytest.raises(GeometryError, match=text):
            SpatialTransformer(Says(theta))(moving)
    with pytest.raises(GeometryError, match="localisation: gave 3 θ for 2 moving images"):
        SpatialTransformer(Says(torch.zeros(3, count)))(moving)
    for bad in (torch.nan, torch.inf):
        with pytest.raises(GeometryError, match=r"localisation: gave θ with NaN or infinity; lower the learning rate"):
            SpatialTransformer(Says(torch.full((2, count), bad)))(moving)
    tps = model("tps").count(ndim)
    with pytest.raises(GeometryError, match=rf"the tps model in {ndim}D needs \(N, {tps}\)"):
        SpatialTransformer(Says(torch.zeros(2, count)), "tps")(moving)
    with pytest.raises(GeometryError, match=r"moving: shape .*expected a tensor \(N, C, H, W\) or \(N, C, H, W, D\)"):
        SpatialTransformer(Says(torch.zeros(2, count)))(moving[..., 0] if ndim == 2 else moving[..., None])
    layer = SpatialTransformer(FreeParameters(count))
    with pytest.raises(GeometryError, match=r"moving: voxels .* do not fit moving_grid"):
        layer(moving, moving_grid=unit_grid([4] * ndim))
    with pytest.raises(GeometryError, match=rf"fixed_grid: is {5 - ndim}D, moving is {ndim}D"):
        layer(moving, fixed_grid=unit_grid([4] * (5 - ndim)))
    with pytest.raises(GeometryError, match=rf"size: .* has {5 - ndim} axes, moving has {ndim}"):
        SpatialTransformer(FreeParameters(count), size=[4] * (5 - ndim))(moving)


@both
@every
def test_theta_is_no_matrix(ndim, name):
    """torch's (N, D, D+1) would be read as parameters, and its identity as no identity."""
    moving, theta = texture(SHAPES[ndim], n=2), some_theta(name, ndim, 2, size=0.05)
    expected = SpatialTransformer(Says(theta), name)(moving)
    torch.testing.assert_close(SpatialTransformer(Says(theta.double()), name)(moving), expected, atol=1e-5, rtol=0)
    with pytest.raises(GeometryError, match="θ is no matrix, and 0 is the identity"):
        SpatialTransformer(Says(theta[:, None]), name)(moving)


@both
@pytest.mark.parametrize("name", ["translation", "affine", "projective", "tps"])
@pytest.mark.parametrize("kernel", ["linear", "cubic", "nearest"])
def test_a_theta_that_collapses_the_image_or_exceeds_all_numbers_gives_no_nonsense(ndim, name, kernel):
    """exp(-60) is no step at all; exp(1000) is no number: it is refused, as NaN is."""
    moving = texture(SHAPES[ndim]).requires_grad_()
    place = {"translation": 0, "affine": model("rigid").count(ndim), "projective": model("rigid").count(ndim), "tps": 0}[name]
    for value in (-60.0, 20.0, 1000.0, 1e30):
        theta = torch.zeros(1, model(name).count(ndim))
        theta[0, place] = value
        layer = SpatialTransformer(Says(theta.requires_grad_()), name, kernel=kernel, antialias="auto")
        if value == 1e30 or (name in ("affine", "projective") and value >= 1000):
            with pytest.raises(GeometryError, match="localisation: gave θ"):
                layer(moving)
            continue
        moved = layer(moving)
        assert bool(moved.isfinite().all())
        for grad in torch.autograd.grad(moved.square().sum(), (moving, theta), allow_unused=kernel == "nearest"):
            assert grad is None or bool(grad.isfinite().all())


@pytest.mark.parametrize(("option", "value", "nearest"), [
    ("kernel", "cubick", "cubic"), ("kernel", "bilinear", "linear"), ("padding", "zero", "zeros"), ("model", "rigit", "rigid"),
    ("kernel", "vote", "cubic|linear|nearest|integer"), ("antialias", "automatic", "auto"), ("padding", "reflect", "reflection"),
    ("model", "tpss", "tps"), ("model", "homography", "projective|affine|similarity|rigid|tps|translation|attention")])
def test_a_wrong_word_is_told_the_nearest(option, value, nearest):
    with pytest.raises(OptionError, match=rf"{option}: '{value}' is not known.*nearest: ({nearest})"):
        SpatialTransformer(FreeParameters(6), **{option: value})


@both
def test_unit_grid_covers_the_field_of_view(ndim):
    like = oblique(SHAPES[ndim])
    for shape in ((5, 9, 3)[:ndim], (40, 50, 30)[:ndim]):
        small = unit_grid(shape, like)
        assert small.shape == shape
        torch.testing.assert_close(small.corners(), like.corners())
    torch.testing.assert_close(unit_grid(SHAPES[ndim]).spacing, torch.ones(1, ndim, dtype=torch.float64))


@both
@pytest.mark.parametrize("kernel", ["linear", "cubic", "nearest"])
def test_integers_are_rounded_and_never_wrap_around(ndim, kernel):
    shape = SHAPES[ndim]
    moving = torch.zeros(1, 1, *shape, dtype=torch.uint8)
    moving[(..., *[slice(n // 4, 3 * n // 4) for n in shape])] = 255
    theta = torch.zeros(1, model("attention").count(ndim))
    theta[0, -1] = 0.8
    layer = SpatialTransformer(Says(theta), "attention", kernel=kernel)
    exact = layer(moving.double())
    assert torch.equal(layer(moving), exact.round().clamp(0, 255).to(torch.uint8))


@both
def test_what_is_found_in_a_crop_is_carried_back_to_its_place(ndim):
    shape, size = (40, 48, 36)[:ndim], (20, 24, 18)[:ndim]
    moving = texture(shape, n=2, sigma=3.0)
    layer = SpatialTransformer(Says(some_theta("rigid", ndim, 2, size=0.15)), "rigid", size=size, padding="border")
    back = layer.carry_back(layer(moving), layer.transform(moving), moving)
    assert back.shape == moving.shape
    inner = (..., *[slice(n // 4, 3 * n // 4) for n in shape])
    assert float((back - moving)[inner].std()) < 0.3 * float(moving[inner].std())


@both
@every
def test_a_layer_is_pickled_and_an_empty_batch_passes(ndim, name):
    layer = SpatialTransformer(FreeParameters(model(name).count(ndim)), name)
    moving = texture(SHAPES[ndim])
    moved = layer(moving)
    again = pickle.loads(pickle.dumps(layer))
    assert not again._kept and torch.equal(again(moving), moved)
    assert layer(moving[:0]).shape == (0, *moving.shape[1:])


@pytest.mark.parametrize("size", [(0, 10), (-3, 5), 10, ("a", 3), (2.5, 3), (4,), (1, 2, 3, 4)])
def test_sizes_that_are_none_are_refused(size):
    with pytest.raises(OptionError, match=r"size: .*expected whole numbers from 1 on"):
        SpatialTransformer(FreeParameters(6), size=size)


@pytest.mark.parametrize("moving", [torch.zeros(2, 1, 0, 5), torch.zeros(3, 4), torch.zeros(1, 1, 4, 5, dtype=torch.complex64), None])
def test_what_is_no_image_is_refused(moving):
    with pytest.raises(GeometryError, match=r"moving: .*expected a tensor"):
        SpatialTransformer(FreeParameters(6))(moving)


def test_what_is_no_module_is_refused():
    with pytest.raises(OptionError, match="localisation: a NoneType"):
        SpatialTransformer(None)
    with pytest.raises(OptionError, match="gradient_scale: None"):
        SpatialTransformer(FreeParameters(6), gradient_scale=None)
    for wrong in ((), ([FreeParameters(6)],)):
        with pytest.raises(OptionError, match="modules: expected one or more torch modules"):
            Parallel(*wrong)
    with pytest.raises(OptionError, match="affine has neither control points nor stiffness"):
        model("affine", control=3)
