"""What a net says of a pair: what it is shown, and the map its answers make in the world, however the scans are stored."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from regkit.errors import CheckpointError, OptionError
from regkit.filters import smooth
from regkit.image import Image
from regkit.localisation import RegressionNet
from regkit.registration import nets, predict
from regkit.registration.nets import Trained, load, save
from regkit.registration.pair import make_pair
from regkit.registration.predict import View, chosen
from regkit.registration.pyramid import build
from regkit.sampling import warp
from regkit.space import MODELS, Frame, Grid, Matrix
from regkit.training.synthesis import canvas_points
from tests.registration.test_frames import stored

EDGE, MM = 16, 4.0
HALF = EDGE * MM / 2


class Stub(nn.Module):
    """Says what it was told to say, one answer a look, and keeps what it was shown."""

    def __init__(self, ndim, maps, poses=()):
        super().__init__()
        self.settings, self.maps, self.poses, self.seen = {"ndim": ndim}, list(maps), list(poses), []
        if poses:
            self.home = torch.zeros(3, ndim)

    def forward(self, fixed, moving):
        self.seen += [fixed, moving]
        return self.maps.pop(0)

    def pose(self, canvases):
        """Is shown a scan as it is and inverted, and is surer of the first."""
        assert len(canvases) == 2
        torch.testing.assert_close(canvases[1:], 1 - canvases[:1])
        self.seen.append(canvases[:1])
        return torch.cat([self.poses.pop(0)] * 2), torch.tensor([0.0, 1.0])


def trained(net, mm=MM, edge=EDGE):
    return Trained(net, edge, mm, "stub", {})


def some_map(name, ndim, seed=0, size=0.15):
    draw = torch.Generator().manual_seed(seed)
    return MODELS[name].exp(size * torch.randn(1, MODELS[name].count(ndim), generator=draw, dtype=torch.float64), ndim)


def turned_grid(shape, spacing, origin, turn=0.5):
    """Oblique in the plane, and in 3D off it."""
    d = len(shape)
    theta = torch.zeros(1, MODELS["rigid"].count(d), dtype=torch.float64)
    theta[0, d:] = turn * torch.tensor([1.0, -0.6, 0.4], dtype=torch.float64)[: d * (d - 1) // 2]
    affine = MODELS["rigid"].exp(theta, d)[0] @ torch.diag(torch.tensor([*spacing[:d], 1.0], dtype=torch.float64))
    affine[:d, d] = torch.tensor(origin[:d], dtype=torch.float64)
    return Grid(shape, affine)


def blob(grid, where, mm=9.0):
    """A scan of a bright ball around a world point (D,), with a plateau: its robust bounds are 0 and 1."""
    away = (grid.points()[0] - where).norm(dim=-1)
    data = ((mm - away) / 3 + 0.5).clamp(0, 1).float()
    data[0] = 1e-3  # within a border of one value all around, a ball could pass for a box that was measured
    return Image(data.reshape(1, 1, *grid.shape), grid)


def textured(grid, seed=0):
    """A smooth scan between 0 and 1, which both occur often enough to be its robust bounds."""
    noise = smooth(torch.randn(1, 1, *grid.shape, generator=torch.Generator().manual_seed(seed)), [3.0] * grid.ndim)
    return Image((0.5 + 0.3 * noise / noise.std()).clamp(0, 1), grid)


def scans(ndim, make=blob):
    """A pair whose scans have other voxels, origins and axes, and their centres of mass."""
    grids = turned_grid((40, 36, 30)[:ndim], (2.0, 2.2, 2.4), (10.0, -50.0, 3.0)), \
        turned_grid((38, 40, 32)[:ndim], (2.1, 2.0, 2.3), (-200.0, 7.0, 90.0), -0.7)
    offs = ((5.0, -3.0, 2.0), (-4.0, 6.0, -5.0))
    made = [make(grid, grid.centre[0] + torch.tensor(off[:ndim], dtype=torch.float64) if make is blob else seed)
            for seed, (grid, off) in enumerate(zip(grids, offs, strict=True))]
    return made, [mass(scan) for scan in made]


def mass(scan):
    weight = scan.data.flatten().double()
    return weight @ scan.grid.points()[0] / weight.sum()


def said(net, fixed, moving, levels=(8.0, MM), **given):
    """The map of world points that `predict` gives, as `align` asks for it."""
    pair = make_pair(fixed, moving)
    frame = Frame.of(pair.fixed.grid)
    return frame.world(predict.predict(trained(net), build(pair, levels), frame, **given))


def seat(middle, half=HALF):
    """The map (1, D+1, D+1) of a canvas' half edges into the world, around a point."""
    d = len(middle)
    matrix = half * torch.eye(d + 1, dtype=torch.float64)[None]
    matrix[0, :d, d], matrix[0, d, d] = middle, 1
    return matrix


def away(a, b, middle, reach=30.0):
    """mm: how far apart two maps take points around a place, at most."""
    d = len(middle)
    points = middle + reach * torch.cat([torch.eye(d), -torch.eye(d), torch.zeros(1, d)]).double()
    return float((Matrix(a)(points[None]) - Matrix(b)(points[None])).norm(dim=-1).max())


# ------------------------------------------------------------------------------------------------------------ in the world

def test_nothing_said_puts_centre_of_mass_on_centre_of_mass(ndim):
    (fixed, moving), (f, m) = scans(ndim)
    eye = torch.eye(ndim + 1, dtype=torch.float64)[None]
    found = said(Stub(ndim, [eye, eye]), fixed, moving)
    assert found.shape == (1, ndim + 1, ndim + 1) and found.dtype == torch.float64
    assert away(found, Matrix.shift((m - f)[None]).matrix, f) < 0.1


@pytest.mark.parametrize("name", ["rigid", "affine"])
def test_two_looks_are_composed(name, ndim):
    """The second map leads from the fixed canvas to what the first showed of the moving scan."""
    (fixed, moving), (f, m) = scans(ndim)
    first, second = some_map(name, ndim, 3, 0.3), some_map(name, ndim, 4, 0.3)
    once = said(Stub(ndim, [first]), fixed, moving, looks=1)
    assert away(once, seat(m) @ first @ torch.linalg.inv(seat(f)), f) < 0.1
    net = Stub(ndim, [first, second])
    twice = said(net, fixed, moving)
    assert away(twice, seat(m) @ first @ second @ torch.linalg.inv(seat(f)), f) < 0.1
    assert away(twice, seat(m) @ second @ first @ torch.linalg.inv(seat(f)), f) > 1  # the other way round would be another map
    assert not net.maps and len(net.seen) == 4 and torch.equal(net.seen[0], net.seen[2])


def test_each_scan_is_first_put_into_the_usual_pose_if_the_net_knows_one(ndim):
    (fixed, moving), (f, m) = scans(ndim)
    poses, last = [some_map("similarity", ndim, seed) for seed in (3, 4)], some_map("affine", ndim, 5)
    net = Stub(ndim, [last], poses)
    found = said(net, fixed, moving)
    assert away(found, seat(m) @ poses[1] @ last @ torch.linalg.inv(seat(f) @ poses[0]), f) < 0.1
    assert not net.maps and not net.poses and len(net.seen) == 4
    alone = said(Stub(ndim, [last], poses), fixed, moving, looks=1)  # one look is one at both
    assert away(alone, seat(m) @ last @ torch.linalg.inv(seat(f)), f) < 0.1


def test_a_scan_is_shown_bright_for_dark_where_the_net_is_surer_of_that(ndim):
    class Knowing(Stub):
        """Is sure of dark air only, and turns what it is not sure of another way."""

        def pose(self, canvases):
            bright = canvases.flatten(1)[:, 0]
            return torch.where(bright[:, None, None] > 0.5, *self.poses), bright

    (fixed, moving), _ = scans(ndim)
    eye = torch.eye(ndim + 1, dtype=torch.float64)[None]
    poses = [some_map("similarity", ndim, seed, 0.3) for seed in (3, 4)]
    nets = [Knowing(ndim, [eye], poses) for _ in range(2)]
    found = [said(net, fixed, scan) for net, scan in zip(nets, (moving, moving.with_data(1 - moving.data)), strict=True)]
    torch.testing.assert_close(found[1], found[0], atol=1e-3, rtol=1e-3)
    for shown, again in zip(nets[0].seen, nets[1].seen, strict=True):
        torch.testing.assert_close(again, shown, atol=1e-2, rtol=0)


@pytest.mark.parametrize("which", [0, 1])
def test_how_a_scan_is_stored_changes_nothing(which, ndim):
    """Axes flipped and in another order."""
    (fixed, moving), (f, _) = scans(ndim)
    maps = [some_map("affine", ndim, seed) for seed in (1, 2)]
    order = (tuple(range(ndim)), tuple(reversed(range(ndim))))[which]
    again = [stored(scan, order, (0,) if which == 0 else tuple(range(ndim))) for scan in (fixed, moving)]
    assert again[0].grid.orientation != fixed.grid.orientation and again[1].grid.orientation != moving.grid.orientation
    plain, other = Stub(ndim, maps), Stub(ndim, maps)
    assert away(said(plain, fixed, moving), said(other, *again), f) < 1e-3
    for a, b in zip(plain.seen, other.seen, strict=True):
        torch.testing.assert_close(b, a, atol=1e-3, rtol=0)


def test_a_header_turned_in_the_world_turns_nothing_that_the_net_says(ndim):
    """The net sees world axes: of a moving scan with another header it says another map, from another canvas, of the same frame."""
    (fixed, moving), (f, m) = scans(ndim)
    turn = Matrix(seat(torch.zeros(ndim, dtype=torch.float64), 1.0) @ MODELS["rigid"].exp(
        torch.tensor([[30.0, -20.0, 9.0][:ndim] + [0.4, -0.3, 0.2][: ndim * (ndim - 1) // 2]], dtype=torch.float64), ndim))
    header = Image(moving.data, Grid(moving.grid.shape, turn.matrix @ moving.grid.affine))
    maps = [some_map("affine", ndim, seed) for seed in (1, 2)]
    there = turn(m[None, None])[0, 0]
    assert float((there - m).norm()) > 20
    found = said(Stub(ndim, maps), fixed, header)
    assert away(found, seat(there) @ maps[0] @ maps[1] @ torch.linalg.inv(seat(f)), f) < 0.15


class Pointing(nn.Module):
    """A net that sees: the shift from what is brightest in the fixed canvas to what is brightest in the moving one."""

    def __init__(self, ndim):
        super().__init__()
        self.settings = {"ndim": ndim}

    def forward(self, fixed, moving):
        d = fixed.ndim - 2
        place = canvas_points((EDGE,) * d)[0]
        bright = [(canvas.flatten() - 0.65).clamp_min(0) for canvas in (fixed, moving)]
        where = [weight @ place / weight.sum() for weight in bright]
        return Matrix.shift((where[1] - where[0])[None].double()).matrix


def test_what_a_net_sees_is_carried_onto_each_other(ndim):
    """A dim body, elsewhere in either scan, draws the centre of mass away from the bright ball that shall be aligned."""
    (fixed, moving), (f, m) = scans(ndim)
    dim = [blob(scan.grid, where + torch.tensor(off[:ndim], dtype=torch.float64), 12.0).data * 0.5
           for scan, where, off in ((fixed, f, (18.0, 10.0, 0.0)), (moving, m, (-10.0, -20.0, 4.0)))]
    pair = [scan.with_data(torch.maximum(scan.data, other)) for scan, other in zip((fixed, moving), dim, strict=True)]
    eye = torch.eye(ndim + 1, dtype=torch.float64)[None]
    before = Matrix(said(Stub(ndim, [eye, eye]), *pair))(f[None, None])[0, 0]
    after = Matrix(said(Pointing(ndim), *pair))(f[None, None])[0, 0]
    assert float((after - m).norm()) < 0.5 * MM < 2 * MM < float((before - m).norm())


# ------------------------------------------------------------------------------------------------------- what a net is shown

@pytest.mark.parametrize("pose", ["upright", "turned"])
def test_a_net_is_shown_what_warp_shows(pose, ndim):
    """Levels and canvas as fine as the scan, so that nothing need be smoothed."""
    scan = textured(turned_grid((40, 36, 30)[:ndim], (2.0, 2.0, 2.0), (10.0, -50.0, 3.0)))
    canvas = build(make_pair(scan, scan), (1.0,))[0][0]
    view = View.of(canvas, trained(Stub(ndim, []), mm=2.0, edge=20))
    torch.testing.assert_close(view.pose, seat(mass(scan), 20.0), atol=0.3, rtol=0)
    if pose == "turned":
        view = view.moved(some_map("similarity", ndim, 7))
    affine = torch.diag(torch.tensor([*[2 / 20] * ndim, 1.0], dtype=torch.float64))
    affine[:ndim, ndim] = 1 / 20 - 1
    oracle = warp(scan, Matrix(view.pose), Grid((20,) * ndim, affine), antialias="none").data
    found = view.shown()
    assert found.shape == (1, 1, *[20] * ndim)
    inner = (oracle > 0) & (found > 0)  # not the edge of the field of view
    assert float(inner.float().mean()) > 0.9
    assert float((found - oracle)[inner].abs().mean()) < 0.02 < 0.1 < float(oracle.std())


def test_the_second_look_shows_the_scan_as_the_first_map_carries_it(ndim):
    (fixed, moving), _ = scans(ndim, textured)
    maps = [some_map("similarity", ndim, 7), some_map("affine", ndim, 8)]
    net = Stub(ndim, maps)
    said(net, fixed, moving)
    pair = build(make_pair(fixed, moving), (8.0, MM))[-1]
    view = View.of(pair[1], trained(net))
    torch.testing.assert_close(net.seen[1], view.shown())
    torch.testing.assert_close(net.seen[3], view.moved(maps[0]).shown())
    assert float((net.seen[3] - net.seen[1]).abs().mean()) > 0.03


def test_a_map_moves_what_is_shown_the_other_way(ndim):
    """A canvas shows what its points are carried to: a shift by 2 voxels brings what lies 2 voxels further on."""
    scan = textured(turned_grid((40, 36, 30)[:ndim], (2.0, 2.0, 2.0), (10.0, -50.0, 3.0)))
    view = View.of(build(make_pair(scan, scan), (2.0,))[0][0], trained(Stub(ndim, []), mm=2.0, edge=20))
    for axis in range(ndim):
        step = torch.zeros(1, ndim, dtype=torch.float64)
        step[0, axis] = 2 * 2 / 20
        shown, moved = view.shown(), view.moved(Matrix.shift(step).matrix).shown()
        torch.testing.assert_close(moved.narrow(2 + axis, 0, 18), shown.narrow(2 + axis, 2, 18), atol=1e-3, rtol=0)


def test_what_was_not_seen_is_shown_as_nothing(ndim):
    """Beyond the field of view, under no mask, and not a number."""
    grid = Grid((30, 30, 30)[:ndim], torch.diag(torch.tensor([*[2.0] * ndim, 1.0], dtype=torch.float64)))
    scan = textured(grid)
    scan = scan.with_data(0.5 + 0.5 * scan.data)  # nothing that is seen is 0
    half = torch.ones_like(scan.data)
    half[:, :, :15] = 0
    spoilt = scan.with_data(torch.where(half > 0, scan.data, torch.nan))
    for fixed, mask in ((scan, Image(half, grid)), (spoilt, None)):
        view = View.of(build(make_pair(fixed, textured(grid), mask), (2.0,), literal=True)[0][0], trained(Stub(ndim, []), mm=2.0, edge=60))
        index = Matrix(view.pose)(canvas_points((60,) * ndim).double())[0] / 2
        low = torch.tensor([14.5, -0.5, -0.5][:ndim])
        depth = torch.minimum(index - low, 29.5 - index).amin(1)  # voxels from the edge of what is seen
        shown = view.shown().flatten()
        assert bool(shown.isfinite().all()) and not shown[depth < -1.5].any() and bool((shown[depth > 1.5] > 0.4).all())
        assert int((depth > 1.5).sum()) > 100


@pytest.mark.parametrize("air", [0.0, 0.3, 1.0])
def test_air_goes_on_beyond_the_scan(air, ndim):
    """Whatever it looks like: no frame is seen, and the canvas is about the anatomy, not about the air."""
    grid = turned_grid((40, 36, 30)[:ndim], (2.0, 2.0, 2.0), (10.0, -50.0, 3.0))
    where = grid.centre[0] + torch.tensor([8.0, -6.0, 5.0][:ndim], dtype=torch.float64)
    ball = blob(grid, where, 12.0).data
    scan = Image(air + (0.6 if air < 0.5 else -0.6) * ball, grid)
    noisy = scan.with_data((scan.data + 0.01 * torch.randn(scan.data.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 1))
    view = View.of(build(make_pair(noisy, noisy), (2.0,), literal=True)[0][0], trained(Stub(ndim, []), mm=2.0, edge=60))
    assert float((view.pose[0, :ndim, ndim] - where).norm()) < 4 < 10 < float((grid.centre[0] - where).norm())
    far = canvas_points((60,) * ndim)[0].norm(dim=-1) > 0.4
    shown = view.shown().flatten()
    usual = shown[far].median()
    assert bool(((shown[far] - usual).abs() < 0.15).all()) and float((shown[~far] - usual).abs().max()) > 0.4


@pytest.mark.parametrize(("levels", "read"), [
    ((16.0, 8.0, 4.0, 2.0), 4.0), ((8.0, 4.15, 2.0), 4.15), ((8.0, 4.5, 3.0), 3.0), ((16.0, 8.0), 8.0)], ids=str)
def test_the_coarsest_level_that_is_fine_enough_is_read(levels, read, ndim, monkeypatch):
    (fixed, moving), _ = scans(ndim)
    eye, mm, of = torch.eye(ndim + 1, dtype=torch.float64)[None], [], View.of
    monkeypatch.setattr(View, "of", staticmethod(lambda canvas, net: (mm.append(canvas.mm), of(canvas, net))[1]))
    said(Stub(ndim, [eye, eye]), fixed, moving, levels)
    assert mm == pytest.approx([read, read])


def test_a_canvas_as_wide_as_the_scan(ndim, monkeypatch):
    """A net without mm: each scan fills its canvas, and maps speak of each in its own half edges. The level is fine enough for both."""
    mm, of = [], View.of
    monkeypatch.setattr(View, "of", staticmethod(lambda canvas, net: (mm.append(canvas.mm), of(canvas, net))[1]))
    grids = [Grid((n, n - 6, n - 4)[:ndim], torch.diag(torch.tensor([*[mm] * ndim, 1.0], dtype=torch.float64)))
             for n, mm in ((32, 2.0), (40, 4.0))]
    middles = [grid.centre[0] for grid in grids]
    pair = make_pair(blob(grids[0], middles[0], 12.0), blob(grids[1], middles[1], 24.0))
    frame, first = Frame.of(pair.fixed.grid), some_map("similarity", ndim, 1)
    found = frame.world(predict.predict(trained(Stub(ndim, [first]), None), build(pair, (8.0, 4.0, 2.0)), frame, looks=1))
    assert mm == [4.0, 4.0]
    assert away(found, seat(middles[1], 80.0) @ first @ torch.linalg.inv(seat(middles[0], 32.0)), middles[0]) < 0.2


def test_nothing_is_learnt_meanwhile(ndim):
    """No graph is kept, and a net that could learn is not asked to."""
    (fixed, moving), _ = scans(ndim)
    net = RegressionNet(EDGE, ndim, width=8, depth=1, hidden=8)
    found = said(net, fixed, moving)
    assert not found.requires_grad and all(p.grad is None for p in net.parameters())


# ------------------------------------------------------------------------------------------------------- which net is asked

@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package with a net for 3D scans and none for 2D."""
    for module in (nets, predict):
        monkeypatch.setattr(module, "SHIPPED", tmp_path / "package")
    monkeypatch.chdir(tmp_path)
    predict._kept.cache_clear()
    save(RegressionNet(8, 3, width=8, depth=1, hidden=8), tmp_path / "package" / "head-3d.safetensors", edge=8, mm=20.0)
    save(RegressionNet(8, 2, width=8, depth=1, hidden=8), tmp_path / "mine" / "net.safetensors", edge=8, mm=10.0)
    yield tmp_path
    predict._kept.cache_clear()


def test_the_net_that_is_named_is_asked_else_those_that_are_shipped(package):
    assert [net.name for net in chosen("net", "rigid", 3)] == [net.name for net in chosen("auto", "affine", 3)] == ["head-3d"]
    assert chosen("auto", "affine", 3)[0] is chosen("net", "affine", 3)[0]  # read once
    assert [(net.name, net.ndim) for net in chosen("net:mine", "affine", 2)] == [("mine", 2)]
    assert chosen("auto", "affine", 2) == [] == chosen("header", "affine", 3) == chosen("search", "affine", 3)
    assert chosen("auto", "translation", 3) == [] and [net.name for net in chosen("net", "translation", 3)] == ["head-3d"]


def test_nets_that_cannot_be_asked_are_named(package):
    with pytest.raises(OptionError, match=r"start: no net for 2D scans is shipped; train one \(regkit train\) and give net:FOLDER"):
        chosen("net", "affine", 2)
    with pytest.raises(OptionError, match="start: mine is a net for 2D scans, these are 3D; give another one, or --start auto"):
        chosen("net:mine", "affine", 3)
    with pytest.raises(CheckpointError, match=r"net: 'yours' is not there; give .*head-3d"):
        chosen("net:yours", "affine", 3)


def test_a_folder_of_a_shipped_nets_name_hides_nothing(package):
    (package / "head-3d").mkdir()
    assert [net.ndim for net in chosen("auto", "affine", 3)] == [3]
    assert math.isclose(chosen("net", "affine", 3)[0].mm, 20.0)


def test_a_net_that_answers_with_no_numbers_is_named_unless_it_is_shipped(package, monkeypatch):
    """Finite weights can still be so large that what they say is not."""
    net = load("mine")
    scene = SimpleNamespace(frame=Frame(torch.zeros(1, 2, dtype=torch.float64), 1.0), canvases=[], model=MODELS["affine"])

    def failed(*_):
        raise torch.linalg.LinAlgError("not finite")

    for answer in (lambda *_: torch.full((1, 3, 3), torch.nan, dtype=torch.float64), failed):
        monkeypatch.setattr(predict, "predict", answer)
        with pytest.raises(CheckpointError, match="start: the net mine answers with NaN or infinity"):
            predict.said([net], scene)
        assert predict.said([replace(net, name="head-3d")], scene) == []
