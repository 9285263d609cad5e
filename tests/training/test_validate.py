"""How nets are measured: a net that is right has no error, one that says nothing has the pairs' own, and starts say what `align` says."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from regkit.localisation import RegressionNet
from regkit.registration.settings import Settings
from regkit.space import MODELS, Matrix
from regkit.training import validate
from regkit.training.losses import displacement
from regkit.training.pairs import Drawer, poses
from regkit.training.poses import Poses
from regkit.training.validate import Case, angle, cases, measure, of_net, of_start
from tests.training.test_pairs import MM, ball, blobs, placed

pytestmark = pytest.mark.usefixtures("unjudged")

both = pytest.mark.parametrize("ndim", [2, 3], ids=["2D", "3D"])
EDGE = 24


def made(ndim, scans=2, count=12, labels=(), draw=None, seed=0):
    found = [placed(ndim, blobs(k), voxels=20, labels=lambda points: (points[:, 0] > 0).int() + 1) for k in range(scans)]
    return cases(found, Drawer(EDGE, MM), poses(180.0) if draw is None else draw, list(labels), count, seed)


def identity(fixed, moving=None):
    return torch.eye(fixed.ndim - 1, dtype=torch.float64)[None]


class Right:
    """A net that knows the map of every pair; of two scans it says the identity."""

    def __init__(self, looked):
        self.looked = iter(looked)

    def __call__(self, fixed, moving):
        case = next(self.looked)
        assert case.fixed is fixed and case.moving is moving
        return identity(fixed) if case.known is None else case.known


def by_axis(ndim, degrees):
    theta = torch.zeros(1, MODELS["rigid"].count(ndim), dtype=torch.float64)
    theta[0, -1] = math.radians(degrees)
    return MODELS["rigid"].exp(theta, ndim)


# ----------------------------------------------------------------------------------------------------------------- the cases

@both
def test_half_of_the_cases_are_one_scan_twice_turned_evenly_up_to_all(ndim):
    found = made(ndim, count=12)
    assert [case.known is not None for case in found] == [True, False] * 6
    assert [case.angle for case in found] == pytest.approx([a for k in range(6) for a in (180 * k / 5,) * 2])
    for case in found[::2]:
        away = angle(case.known, identity(case.fixed))
        assert away == pytest.approx(case.angle, abs=6)  # but for small stretches
    assert all(case.fixed.shape == case.moving.shape == (1, 1, *[EDGE] * ndim) and case.labels is None for case in found)


@pytest.mark.parametrize("scans", [2, 3, 5])
def test_the_other_half_are_different_scans(scans):
    """However many cases are asked of few scans: every scan is shown, and with each of the others in turn."""
    found = [placed(2, ball((k + 1) / scans), voxels=12) for k in range(scans)]
    pairs = []
    for case in cases(found, Drawer(12, MM), poses(180.0), [], 4 * scans * scans, 0):
        places = tuple(round(float(canvas.max()) * scans) - 1 for canvas in (case.fixed, case.moving))
        assert (case.known is None) == (places[0] != places[1])
        pairs += [places] if case.known is None else []
    assert set(pairs) == {(a, b) for a in range(scans) for b in range(scans) if a != b}


def test_one_scan_alone_is_always_itself():
    found = made(2, scans=1, count=6)
    assert all(case.known is not None for case in found)
    row = measure(identity_of, found, Drawer(EDGE, MM), "ncc")
    assert "alike" not in row and math.isfinite(row["tre_mm"])


def identity_of(fixed, moving):
    return identity(fixed)


@both
def test_the_same_seed_gives_the_same_cases(ndim):
    first, again, other = made(ndim, count=4), made(ndim, count=4), made(ndim, count=4, seed=1)
    assert all(torch.equal(a.fixed, b.fixed) and torch.equal(a.moving, b.moving) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0].fixed, other[0].fixed)


# -------------------------------------------------------------------------------------------------------------- the measures

@both
def test_a_net_that_is_right_has_no_error(ndim):
    looked, drawer = made(ndim), Drawer(EDGE, MM)
    found = measure(Right(looked), looked, drawer, "ncc")
    assert found["tre_mm"] < 1e-3 and found["turn"] < 1e-3 and found["captured"] == 1
    assert {key: value for key, value in found.items() if key.startswith("captured_")} == {f"captured_{a}": 1.0 for a in (45, 90, 135, 180)}
    assert 0 < found["alike"] < 2 and "dice" not in found


@both
def test_one_that_says_nothing_has_the_pairs_own(ndim):
    looked, drawer = made(ndim), Drawer(EDGE, MM)
    found = measure(identity_of, looked, drawer, "ncc")
    known = [case for case in looked if case.known is not None]
    turns = sorted(angle(case.known, identity(case.fixed)) for case in known)
    assert found["turn"] == pytest.approx(turns[2]) and found["captured"] == pytest.approx(1 / 6)  # of 0, 36, 72, … degrees
    far = sorted(float(displacement(case.known, identity(case.fixed))) * MM / 2 for case in known)
    assert found["tre_mm"] == pytest.approx(far[2]) and far[2] > 5
    assert (found["captured_45"], found["captured_90"], found["captured_135"], found["captured_180"]) == (0.5, 0.0, 0.0, 0.0)


@both
def test_a_distance_is_in_millimetres_of_the_canvas(ndim):
    """A map that is 6 mm off, on canvases of any width."""
    for wide in (50.0, 200.0):
        shift = identity(torch.zeros(1, 1, *[4] * ndim))
        shift[0, 0, ndim] = 6 / (wide / 2)
        case = Case(torch.zeros(1, 1, *[4] * ndim), torch.zeros(1, 1, *[4] * ndim), shift, None, 0.0)
        assert measure(identity_of, [case], Drawer(4, wide), "ncc")["tre_mm"] == pytest.approx(6.0)


@both
@pytest.mark.parametrize(("degrees", "captured"), [(19.0, 1.0), (21.0, 0.0)])
def test_a_turn_is_captured_below_20_degrees(ndim, degrees, captured):
    nothing = torch.zeros(1, 1, *[4] * ndim)
    case = Case(nothing, nothing, by_axis(ndim, degrees), None, 90.0)
    found = measure(identity_of, [case], Drawer(4, MM), "ncc")
    assert found["turn"] == pytest.approx(degrees) and found["captured"] == found["captured_90"] == captured


@both
def test_agreement_of_different_scans_and_of_their_labels(ndim):
    """A pair of one scan, said to be two, is as alike as can be under the map it was drawn with."""
    looked = made(ndim, count=4, labels=(1, 2), draw=Poses(math.pi, 0.05, 0.05, 0.0))
    hidden = [Case(c.fixed, c.moving, None, c.labels, c.angle) for c in looked if c.known is not None]
    truth = iter([c.known for c in looked if c.known is not None])
    right = measure(lambda fixed, moving: next(truth), hidden, Drawer(EDGE, MM), "ncc")
    nothing = measure(identity_of, hidden, Drawer(EDGE, MM), "ncc")
    assert 5 * right["alike"] < nothing["alike"] and right["dice"] > 0.9 > 0.8 > nothing["dice"]
    assert math.isnan(right["tre_mm"]) and right["captured"] == 0  # nothing is known of them
    assert measure(identity_of, looked, Drawer(EDGE, MM), "ncc").keys() >= {"tre_mm", "alike", "dice"}


def test_angles_between_maps():
    """Whatever they stretch, and about any axis."""
    for degrees in (0.0, 1.0, 90.0, 179.0, 180.0):
        for ndim in (2, 3):
            start = Poses(2.0, 0.1, 0.0, 0.0).draw(1, ndim, torch.Generator().manual_seed(0))
            assert angle(start, start @ by_axis(ndim, degrees)) == pytest.approx(degrees, abs=1e-4)
            assert angle(2.5 * start, start @ by_axis(ndim, degrees)) == pytest.approx(degrees, abs=1e-4)


# ---------------------------------------------------------------------------------------------------------------- who is asked

@both
def test_a_net_is_asked_without_learning(ndim):
    net = RegressionNet(EDGE, ndim, width=8, hidden=8)
    nn.init.normal_(net.head[-1].weight, std=0.1)
    fixed, moving = torch.rand(2, 1, 1, *[EDGE] * ndim, generator=torch.Generator().manual_seed(0))
    found = of_net(net)(fixed, moving)
    assert not found.requires_grad and torch.equal(found, net(fixed, moving).detach())

    class Telling(nn.Module):
        """As nets are while they learn: the map, and more."""

        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, fixed, moving):
            return self.net(fixed, moving), None

    assert torch.equal(of_net(Telling())(fixed, moving), found)


@both
def test_the_headers_start_is_the_identity(ndim):
    case = made(ndim, count=4)[2]
    torch.testing.assert_close(of_start("header")(case.fixed, case.moving), identity(case.fixed), atol=1e-6, rtol=0)


@both
@pytest.mark.parametrize("refined", [False, True])
def test_canvases_are_aligned_in_a_world_around_their_middles(ndim, refined, monkeypatch):
    """What `align` says there in mm becomes half edges; starts are asked for without refinement."""
    asked, map = [], Poses(0.5, 0.2, 0.1, 0.1).draw(1, ndim, torch.Generator().manual_seed(0))
    world = map.clone()
    world[:, :ndim, ndim] *= 50  # mm a half edge

    def aligned(fixed, moving, **options):
        asked.append((fixed, moving, options))
        return SimpleNamespace(transform=Matrix(world))

    monkeypatch.setattr(validate, "align", aligned)
    canvases = torch.rand(2, 1, 1, *[EDGE] * ndim)
    torch.testing.assert_close(of_start("mass", refined=refined)(*canvases), map)
    (fixed, moving, options), = asked
    assert options["start"] == "mass" and (Settings.of(**options).level_list() == ()) == (not refined)
    for image, canvas in ((fixed, canvases[0]), (moving, canvases[1])):
        assert torch.equal(image.data, canvas)
        torch.testing.assert_close(image.grid.centre, torch.zeros(1, ndim, dtype=torch.float64))
        torch.testing.assert_close(image.grid.spacing, torch.full((1, ndim), 100 / EDGE, dtype=torch.float64))


@both
def test_starts_and_refinement_say_maps_of_the_canvas(ndim):
    """In its half edges, of fixed to moving points: by the centres of mass the shift between them, and refined the map that is known."""
    looked = [case for case in made(ndim, count=4, draw=Poses(0.2, 0.08, 0.03, 0.0)) if case.known is not None]
    fixed, moving, known = looked[1].fixed, looked[1].moving, looked[1].known
    ramp = (torch.arange(EDGE) + 0.5) * 2 / EDGE - 1
    points = torch.stack(torch.meshgrid(*[ramp] * ndim, indexing="ij"), -1).reshape(-1, ndim).double()
    f, m = (canvas.flatten().double() @ points / canvas.double().sum() for canvas in (fixed, moving))
    shift = identity(fixed)
    shift[0, :ndim, ndim] = m - f
    torch.testing.assert_close(of_start("mass")(fixed, moving), shift, atol=0.02, rtol=0)
    refined = of_start("mass", refined=True)(fixed, moving)
    away = [float(displacement(map, known)) * MM / 2 for map in (refined, identity(fixed))]
    assert away[0] < 1.0 < 3.0 < away[1]  # mm; a voxel has 4
