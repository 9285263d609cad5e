"""Pictures drawn from an anatomy: where things come to lie, what each chance does, and that nothing but the generator decides."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch

from regkit.space import Frame, Grid, Matrix
from regkit.training.poses import Bends, Poses
from regkit.training.synthesis import Anatomy, Looks, _box, canvas_points, curve, draw, smooth_factor

both = pytest.mark.parametrize("ndim", [2, 3], ids=["2D", "3D"])
PLAIN = Looks(scanned=0, cut_out=0, bright_air=0, inverted=0, bias=0, noise=0, blurred=0, framed=0, cropped=0, lesions=0)
EDGE = 24


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def grid(ndim):
    """Oblique, mirrored, of uneven voxels, somewhere in the world."""
    affine = torch.eye(ndim + 1, dtype=torch.float64)
    affine[:ndim, :ndim] = torch.tensor([[-2.0, 0.3, 0.0], [0.4, 1.8, -0.2], [0.1, 0.0, 2.5]], dtype=torch.float64)[:ndim, :ndim]
    affine[:ndim, ndim] = torch.tensor([90.0, -120.0, 30.0], dtype=torch.float64)[:ndim]
    return Grid((44, 48, 36)[:ndim], affine)


def ball(where, place, mm):
    return ((mm - (place - where).norm(dim=-1)) / 2 + 0.5).clamp(0, 1).float()


def anatomy(ndim, offsets=((6.0, -4.0, 3.0),), inner=(False,), mm=14.0, values=None):
    """Balls, a part each, at offsets from the grid's centre; and where they are (K, D), and the frame: 40 mm around the centre."""
    lattice = grid(ndim)
    places = lattice.centre + torch.tensor([off[:ndim] for off in offsets], dtype=torch.float64)
    parts = torch.stack([ball(where, lattice.points()[0], mm) for where in places]).reshape(-1, *lattice.shape)
    values = torch.full((1, *lattice.shape), 0.5) if values is None else values(parts)
    return Anatomy(parts, values, lattice, tuple(inner)), places, Frame(lattice.centre, 40.0)


def still(ndim, n=1):
    return Bends(torch.zeros(n, ndim, *[8] * ndim))


def eye(ndim, n=1):
    return torch.eye(ndim + 1, dtype=torch.float64).repeat(n, 1, 1)


def mass(picture):
    """(D,) in half edges of the canvas."""
    weight = picture.flatten().double()
    return weight @ canvas_points(tuple(picture.shape[2:]))[0].double() / weight.sum()


def in_frame(frame, places):
    return Matrix(frame.matrix)(places[None])


def rich(ndim):
    """Seven parts, side by side, and values that vary within them."""
    offsets = [(12.0 * (k % 3 - 1), 12.0 * (k // 3 - 1), 5.0 * (-1) ** k) for k in range(7)]
    return anatomy(ndim, offsets, [True, True, True, False, False, False, False], 8.0,
                   lambda parts: (parts.sum(0, keepdim=True) * torch.rand(parts.shape[1:], generator=seeded())).clamp(0, 1))


# ---------------------------------------------------------------------------------------------------------------- geometry

@both
def test_canvas_points_are_the_centres_of_voxels(ndim):
    shape = (6, 4, 5)[:ndim]
    found = canvas_points(shape)
    lattice = Grid(shape, torch.eye(ndim + 1, dtype=torch.float64))
    torch.testing.assert_close(found.double(), Matrix(Frame.of(lattice).matrix)(lattice.points()))


@both
@pytest.mark.parametrize("count", [1, 7], ids=["one part", "seven parts"])
def test_an_anatomy_is_read_where_its_voxels_lie(ndim, count):
    """At voxel centres what they hold, beyond the field of view nothing; however many parts, which are read in different ways."""
    lattice = grid(ndim)
    parts, values = torch.rand(count, *lattice.shape, generator=seeded()), torch.rand(1, *lattice.shape, generator=seeded(1))
    made, frame = Anatomy(parts, values, lattice, (False,) * count), Frame(lattice.centre + 3, 40.0)
    found, read = made.read(Matrix(frame.matrix)(lattice.points()).expand(2, -1, -1), frame.centre[0], frame.scale)
    assert found.shape == (2, count, lattice.points().shape[1]) and read.shape == (2, 1, lattice.points().shape[1])
    for item in range(2):
        torch.testing.assert_close(found[item], parts.flatten(1), atol=1e-4, rtol=0)
        torch.testing.assert_close(read[item], values.flatten(1), atol=1e-4, rtol=0)
    outside = Matrix(frame.matrix)(lattice.to_world(torch.tensor([[[-0.6] * ndim, [200.0] * ndim]], dtype=torch.float64)))
    assert not any(one.any() for one in made.read(outside, frame.centre[0], frame.scale))


@both
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_maps_and_bends_move_the_anatomy_where_they_should(ndim, seed):
    """They lead from the canvas to the anatomy: a part is seen where they come from."""
    made, places, frame = anatomy(ndim)
    maps = Poses(turn=2.0, shift=0.15, scale=0.15, stretch=0.05).draw(2, ndim, seeded(seed))
    bends = Bends.draw(2, ndim, 0.05, 3, seeded(seed + 10))
    pictures = draw(made, frame, (EDGE,) * ndim, maps, bends, PLAIN, seeded(seed))
    assert pictures.shape == (2, 1, *[EDGE] * ndim)
    wanted = Matrix(torch.linalg.inv(maps))(bends.back(in_frame(frame, places).expand(2, -1, -1)))[:, 0]
    voxel = 2 / EDGE
    for picture, where in zip(pictures, wanted, strict=True):
        assert float((mass(picture[None]) - where).norm()) < 0.35 * voxel
    plain = draw(made, frame, (EDGE,) * ndim, eye(ndim), still(ndim), PLAIN, seeded(seed))
    torch.testing.assert_close(mass(plain), in_frame(frame, places)[0, 0], atol=0.1 * voxel, rtol=0)
    assert float((wanted - mass(plain)).norm(dim=1).min()) > voxel  # they did move


@both
def test_a_finer_canvas_shows_the_same(ndim):
    made, _, frame = anatomy(ndim)
    maps = Poses(shift=0.1).draw(1, ndim, seeded(1))
    coarse, fine = (draw(made, frame, (edge,) * ndim, maps, still(ndim), PLAIN, seeded()) for edge in (16, 32))
    torch.testing.assert_close(mass(coarse), mass(fine), atol=0.2 / 16, rtol=0)


# ---------------------------------------------------------------------------------------------- from the generator alone

def test_the_same_numbers_draw_the_same_pictures_and_others_others():
    made, _, frame = rich(2)
    maps, bends = Poses().draw(3, 2, seeded()), Bends.draw(3, 2, 0.03, 4, seeded())
    torch.manual_seed(0)
    one = draw(made, frame, (EDGE,) * 2, maps, bends, Looks(), seeded(5))
    torch.manual_seed(1)
    before = torch.get_rng_state()
    assert torch.equal(draw(made, frame, (EDGE,) * 2, maps, bends, Looks(), seeded(5)), one)
    assert torch.equal(torch.get_rng_state(), before)  # nothing is taken from torch's own numbers
    other = draw(made, frame, (EDGE,) * 2, maps, bends, Looks(), seeded(6))
    assert float((other - one).abs().mean()) > 0.01
    same = draw(made, frame, (EDGE,) * 2, maps[:1].repeat(2, 1, 1), Bends(bends.field[:1].repeat(2, 1, 1, 1)), PLAIN, seeded(5))
    assert float((same[0] - same[1]).abs().mean()) > 0.01  # two looks of one pose


@both
def test_pictures_lie_between_0_and_1(ndim):
    made, _, frame = rich(ndim)
    n = 40
    pictures = draw(made, frame, (EDGE,) * ndim, Poses().draw(n, ndim, seeded()), Bends.draw(n, ndim, 0.03, 4, seeded()), Looks(), seeded())
    assert pictures.dtype == torch.float32 and bool(pictures.isfinite().all())
    assert float(pictures.min()) == 0 and float(pictures.max()) == 1
    assert float((pictures.flatten(1).amax(1) > 0.9).float().mean()) > 0.9
    assert float((pictures.flatten(1).std(1) > 0.03).float().mean()) > 0.9  # something is to be seen


def test_what_shows_nothing_is_black():
    """An anatomy that lies outside of the canvas, without noise: no 0 is divided by 0."""
    made, _, frame = anatomy(2)
    maps = eye(2)
    maps[:, :2, 2] = 50
    assert not draw(made, frame, (EDGE,) * 2, maps, still(2), PLAIN, seeded()).any()


# ------------------------------------------------------------------------------------------------------------------- looks

def drawn(looks, ndim=2, count=24, made=None, seed=0):
    made, places, frame = made or rich(ndim)
    return draw(made, frame, (EDGE,) * ndim, eye(ndim, count), still(ndim, count), looks, seeded(seed)), in_frame(frame, places)[0]


def at(pictures, where):
    """(N,): the pictures' values at a point (D,) of the canvas."""
    nearest = (canvas_points(tuple(pictures.shape[2:]))[0] - where).norm(dim=1).argmin()
    return pictures.flatten(1)[:, nearest]


@both
def test_a_cut_out_scan_shows_the_inner_parts_only(ndim):
    offsets = ((-16.0, 0.0, 0.0), (16.0, 0.0, 0.0))
    made = anatomy(ndim, offsets, (True, False), 9.0)
    shown, places = drawn(replace(PLAIN, cut_out=1), ndim, made=made)
    assert not at(shown, places[1]).any() and float((at(shown, places[0]) > 0.5).float().mean()) > 0.8
    whole, _ = drawn(PLAIN, ndim, made=made)
    assert float((at(whole, places[1]) > 0.05).float().mean()) > 0.5
    nothing = anatomy(ndim, offsets, (False, False), 9.0)  # nothing to cut out: all is shown
    assert torch.equal(drawn(replace(PLAIN, cut_out=1), ndim, made=nothing)[0], drawn(PLAIN, ndim, made=nothing)[0])


@both
def test_bright_air_is_where_no_part_is(ndim):
    made = anatomy(ndim, ((0.0, 0.0, 0.0),), (False,), 12.0)
    corner = torch.full((ndim,), -0.95)
    assert not at(drawn(PLAIN, ndim, made=made)[0], corner).any()
    bright = at(drawn(replace(PLAIN, bright_air=1), ndim, made=made)[0], corner)
    assert float((bright > 0.5).float().mean()) > 0.2


@both
def test_a_scanned_look_is_a_curve_of_the_values(ndim):
    """Of equal values equal brightness, within the body; which values are bright changes from picture to picture."""
    made = anatomy(ndim, ((0.0, 0.0, 0.0),), (False,), 25.0, lambda parts: torch.where(
        (grid(ndim).points()[0, :, 0] < grid(ndim).centre[0, 0]).reshape(1, *parts.shape[1:]), 0.2, 0.8))
    pictures, _ = drawn(replace(PLAIN, scanned=1), ndim, made=made)
    assert not at(pictures, torch.full((ndim,), -0.95)).any()  # air stays black, whatever its values
    place = canvas_points((EDGE,) * ndim)[0]
    inner = place.norm(dim=1) < 0.45
    sides = [pictures.flatten(1)[:, inner & (place[:, 0] * side > 0.15)] for side in (-1, 1)]
    assert all(float(side.std(1).max()) < 1e-3 for side in sides)
    left, right = (side.mean(1) for side in sides)
    assert 0.1 < float((left > right).float().mean()) < 0.9 and float((left - right).abs().mean()) > 0.1


def test_inverting_swaps_bright_and_dark_within_the_body():
    made = rich(2)
    plain, inverted = (torch.cat([drawn(looks, count=1, made=made, seed=seed)[0] for seed in range(24)])
                       for looks in (PLAIN, replace(PLAIN, inverted=1)))
    places = drawn(PLAIN, made=made)[1]
    brightness = torch.stack([torch.stack([at(pictures, where) for where in places], 1) for pictures in (plain, inverted)])
    centred = brightness - brightness.mean(2, keepdim=True)
    alike = (centred[0] * centred[1]).sum(1) / centred.norm(dim=2).prod(0)
    assert float(alike.max()) < -0.9
    air = at(inverted, torch.full((2,), -0.95))
    assert 0.1 < float((air > 0.5).float().mean()) < 0.7 and float((air == 0).float().mean()) > 0.3  # a third inverts the air, too


@pytest.mark.parametrize(("name", "value"), [
    ("scanned", 1.0), ("cut_out", 1.0), ("bright_air", 1.0), ("inverted", 1.0), ("bias", 0.5), ("noise", 0.2), ("blurred", 1.0),
    ("cropped", 1.0), ("lesions", 1.0)])
def test_every_look_changes_the_picture(name, value):
    changed, plain = drawn(replace(PLAIN, **{name: value}))[0], drawn(PLAIN)[0]
    assert float((changed - plain).abs().mean()) > 0.005
    assert name in {field.name for field in fields(Looks)}


@both
def test_a_cropped_scan_is_nothing_outside_of_a_box(ndim):
    canvas, shape = canvas_points((EDGE,) * ndim), (EDGE,) * ndim
    shares = []
    for seed in range(30):
        box = _box(canvas, shape, 0.4, 1.0, 0.2, seeded(seed))
        assert box.shape == (1, 1, *shape) and set(box.unique().tolist()) <= {0.0, 1.0}
        kept = canvas[0][box.flatten() > 0]
        middle = kept.mean(0)
        # convex: what lies between the middle and any point that is kept is kept as well
        between = middle + (kept - middle) * 0.8
        index = (((between + 1) * EDGE / 2).floor().long()).clamp(0, EDGE - 1)
        assert float(box[0, 0][tuple(index.mT)].mean()) > 0.98
        shares.append(float(box.mean()))
    assert 0.05 < min(shares) < 0.5 < max(shares) and len(set(shares)) > 20
    made = anatomy(ndim, ((0.0, 0.0, 0.0),), (False,), 60.0)  # all of the canvas is body
    for part, least in (("cropped", 0.2), ("framed", 0.1)):  # what lies beyond is one brightness, at times another than nothing
        shown, _ = drawn(replace(PLAIN, **{part: 1}), ndim, made=made)
        usual = shown.flatten(1).mode(1).values
        assert float((shown.flatten(1) == usual[:, None]).float().mean()) > least


def test_curves_run_between_0_and_1_and_half_of_them_rise():
    values, rising = torch.linspace(-0.1, 1.1, 121).reshape(1, 1, -1), 0
    for seed in range(200):
        found = curve(values, seeded(seed))
        assert found.shape == values.shape and float(found.min()) >= 0 and float(found.max()) <= 1
        for ends in (found[..., :11], found[..., 110:]):  # values outside of [0, 1] count as its ends
            torch.testing.assert_close(ends, ends[..., :1].expand(1, 1, 11), atol=1e-5, rtol=0)
        bends = (found[..., 10:111].diff().diff().abs() > 1e-4)[0, 0].nonzero()[:, 0]
        assert set((bends + 1).tolist()) <= {19, 20, 21, 39, 40, 41, 59, 60, 61, 79, 80, 81}  # straight between six knots
        rising += bool((found.diff() >= -1e-6).all())
    assert 70 < rising < 130


@both
def test_a_smooth_factor_has_the_spread_it_is_asked_for(ndim):
    shape = (EDGE,) * ndim
    assert torch.equal(smooth_factor(shape, 0.0, seeded()), torch.ones(1, 1, *shape))
    logs = torch.cat([smooth_factor(shape, 0.3, seeded(seed)).log() for seed in range(60)])
    corners = logs.reshape(60, -1)[:, [0, -1]]
    assert float(corners.std()) == pytest.approx(0.3, rel=0.25) and float(logs.mean()) == pytest.approx(0, abs=0.05)
    steps = max(float(logs.diff(dim=axis).abs().max()) for axis in range(2, 2 + ndim))
    assert steps < 0.3 * 6 * 3 / (EDGE - 1)  # 3 cells across: from one cell to the next by at most six deviations
