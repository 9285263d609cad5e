"""The spatial transformer module: identity at θ = 0, the known map at a known θ, gradients, and its place in a net."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from regkit.errors import GeometryError, OptionError
from regkit.filters import smooth
from regkit.image import Image
from regkit.localisation import FreeParameters
from regkit.sampling import inside, warp
from regkit.similarity import similarity
from regkit.space import MODELS, Frame, Grid, Matrix, model
from regkit.stn import SpatialTransformer, unit_grid

both = pytest.mark.parametrize("ndim", [2, 3], ids=["2D", "3D"])
every = pytest.mark.parametrize("name", list(MODELS))
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
@kernels
@pytest.mark.parametrize("padding", ["zeros", "border"])
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
    moving = texture(SHAPES[ndim], n=2, c=2)
    theta = some_theta(name, ndim, 2)
    moved = SpatialTransformer(Says(theta), name, kernel=kernel)(moving)
    grid = unit_grid(SHAPES[ndim])
    truth = Matrix(Frame.of(grid).world(model(name).exp(theta.double(), ndim)))
    expected = warp(Image(moving, grid), truth, grid, kernel=kernel).data
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
    truth = centre @ Matrix(frame.world(model("affine").exp(theta.double(), ndim)))
    found = layer.transform(moving, moving_grid=moving_grid, fixed_grid=fixed_grid)
    torch.testing.assert_close(found.matrix, truth.matrix)
    assert found.affine
    moved = layer(moving, moving_grid=moving_grid, fixed_grid=fixed_grid)
    expected = warp(Image(moving, moving_grid), truth, fixed_grid, kernel=kernel).data
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
    theta = some_theta(name, ndim, seed=3, size=0.15, dtype=torch.float64).requires_grad_()

    def see(t):
        layer = SpatialTransformer(Says(t), name, kernel=kernel, padding="border", size=(3, 4, 3)[:ndim], smoothing=False)
        return layer(moving)

    assert torch.autograd.gradcheck(see, theta)


@both
@every
def test_gradients_reach_the_localisation_and_the_image(ndim, name):
    fixed, moving = texture(SHAPES[ndim], n=2), texture(SHAPES[ndim], n=2, seed=1).requires_grad_()
    net = Looks(ndim, model(name).count(ndim))
    layer = SpatialTransformer(net, name)
    layer(moving, fixed).square().mean().backward()
    for p in layer.parameters():
        assert bool(p.grad.isfinite().all()) and bool(p.grad.abs().sum() > 0)
    assert bool(moving.grad.isfinite().all()) and bool((moving.grad != 0).float().mean() > 0.3)


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
        torch.testing.assert_close(middle[1:-1], expected[1:-1], atol=half_a_voxel if kernel == "nearest" else 2e-3, rtol=0)


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
    assert not torch.allclose(SpatialTransformer(free, size=size, kernel=kernel, smoothing=False)(checker), smoothed, atol=0.05)


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
@pytest.mark.parametrize("name", ["rigid", "affine"])
def test_free_parameters_learn_a_known_map(ndim, name):
    shape = (28, 22) if ndim == 2 else (18, 16, 14)
    truth = some_theta(name, ndim, seed=2, size=0.1)
    moving = texture(shape, sigma=2.5)
    fixed = SpatialTransformer(Says(truth), name, padding="border")(moving)
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
    maps = [Matrix(Frame.of(grid).world(model(name).exp(t.detach().double(), ndim))) for t in (free.theta, truth)]
    corners = grid.corners()
    off, before = (maps[0](corners) - maps[1](corners)).norm(dim=-1).max(), (corners - maps[1](corners)).norm(dim=-1).max()
    assert float(before) > 1.0  # voxels
    assert float(off) < 0.1


@both
def test_what_does_not_fit_is_named(ndim):
    moving = texture(SHAPES[ndim], n=2)
    count = model("affine").count(ndim)
    text = rf"localisation: gave θ of shape .*affine model in {ndim}D needs \(N, {count}\)"
    for theta in (torch.zeros(2, count - 1), torch.zeros(count), torch.zeros(2, 1, count)):
        with pytest.raises(GeometryError, match=text):
            SpatialTransformer(Says(theta))(moving)
    with pytest.raises(GeometryError, match="localisation: gave 3 θ for 2 moving images"):
        SpatialTransformer(Says(torch.zeros(3, count)))(moving)
    with pytest.raises(GeometryError, match=r"matrix: singular or not finite"):
        SpatialTransformer(Says(torch.full((2, count), torch.nan)))(moving)
    layer = SpatialTransformer(FreeParameters(count))
    with pytest.raises(GeometryError, match=r"moving: voxels .* do not fit moving_grid"):
        layer(moving, moving_grid=unit_grid([4] * ndim))
    with pytest.raises(GeometryError, match=rf"fixed_grid: is {5 - ndim}D, moving is {ndim}D"):
        layer(moving, fixed_grid=unit_grid([4] * (5 - ndim)))
    with pytest.raises(GeometryError, match=rf"size: .* has {5 - ndim} axes, moving has {ndim}"):
        SpatialTransformer(FreeParameters(count), size=[4] * (5 - ndim))(moving)


@pytest.mark.parametrize(("option", "value", "nearest"), [
    ("kernel", "cubick", "cubic"), ("kernel", "bilinear", "linear"), ("padding", "zero", "zeros"), ("model", "rigit", "rigid"),
    ("kernel", "vote", "cubic|linear|nearest")])
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
