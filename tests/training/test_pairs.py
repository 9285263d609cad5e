"""Pairs: what is drawn depends on its number alone, and what is said to be known of it is true."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from regkit.errors import FormatError
from regkit.image import Image
from regkit.sampling import sample, warp
from regkit.space import Grid, Matrix
from regkit.space.grid import apply_matrix
from regkit.space.models import nearest_rotation
from regkit.training import pairs as module
from regkit.training.losses import moved_by
from regkit.training.pairs import Drawer, Pairs, poses, spread
from regkit.training.poses import Bends, Poses
from regkit.training.scans import Listed, Scan
from regkit.training.synthesis import canvas_points

both = pytest.mark.parametrize("ndim", [2, 3], ids=["2D", "3D"])
MM = 100.0  # edge of the canvas
OFF = (7.0, -20.0, 4.0)  # where the scans' middles lie in the world
EDGES = {2: 32, 3: 20}


def placed(ndim, of, person="", labels=None, voxels=None):
    """A scan of 80 mm and more whose values are a function of mm from its middle; the function's or another place's."""
    n = voxels or {2: 44, 3: 28}[ndim]
    shape = tuple(n - 2 * k for k in range(ndim))
    mm = 96 / n
    affine = mm * torch.eye(ndim + 1, dtype=torch.float64)
    affine[ndim, ndim] = 1
    middle = torch.tensor(OFF[:ndim], dtype=torch.float64)
    affine[:ndim, ndim] = middle - mm * (torch.tensor(shape, dtype=torch.float64) - 1) / 2
    grid = Grid(shape, affine)
    points = grid.points()[0] - middle
    values = of(points).reshape(1, *shape).numpy().astype(np.float16)
    marks = None if labels is None else labels(points).reshape(shape).numpy().astype(np.int32)
    return Scan(Listed(Path("scan"), None, person), values, marks, grid, middle)


def blobs(seed=0, count=12, width=9.0):
    def of(points):
        draw = torch.Generator().manual_seed(seed)
        centres = 25 * (2 * torch.rand(count, points.shape[1], generator=draw, dtype=torch.float64) - 1)
        heights = torch.rand(count, generator=draw, dtype=torch.float64) + 0.3
        found = (heights * torch.exp(-torch.cdist(points, centres).square() / (2 * width**2))).sum(1)
        return found / found.max()

    return of


def ball(value):
    """A ball of 30 mm of one value, by which the scan is known again."""
    return lambda points: torch.where(points.norm(dim=1) < 30, value, 0.0)


def pairs(scans, ndim, **given):
    drawer = Drawer(given.pop("edge", EDGES[ndim]), MM)
    return Pairs(**{"scans": scans, "drawer": drawer, "poses": poses(60.0), "rule": "all", "steps": 100, "seed": 0, "augment": 0.0,
                    "reference": torch.zeros(0, ndim), "labels": [], **given})


def some_pose(ndim, seed=0):
    return Poses(0.8, 0.1, 0.1, 0.05).draw(1, ndim, torch.Generator().manual_seed(seed))


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(value, b[key]) for key, value in a.items())


# ---------------------------------------------------------------------------------------------------------------- canvases

@both
def test_a_canvas_is_what_warp_shows(ndim):
    scan, drawer, pose = placed(ndim, blobs()), Drawer(EDGES[ndim], 80.0), some_pose(ndim)
    seat = 40.0 * torch.eye(ndim + 1, dtype=torch.float64)[None]
    seat[0, :ndim, ndim], seat[0, ndim, ndim] = scan.middle, 1
    edge = drawer.edge
    affine = torch.diag(torch.tensor([*[2 / edge] * ndim, 1.0], dtype=torch.float64))
    affine[:ndim, ndim] = 1 / edge - 1
    oracle = warp(Image(torch.tensor(scan.values.astype(np.float32))[None], scan.grid), Matrix(seat @ pose), Grid((edge,) * ndim, affine),
                  antialias="none").data
    found = drawer.shown(scan, pose)
    assert found.shape == (1, 1, *[edge] * ndim) and found.dtype == torch.float32
    torch.testing.assert_close(found, oracle, atol=1e-4, rtol=0)
    assert float(found.std()) > 0.1


@both
def test_a_bent_canvas_shows_what_lies_where_it_is_bent_to(ndim):
    of, pose = blobs(width=14.0), some_pose(ndim)
    scan, drawer, bends = placed(ndim, of), Drawer(EDGES[ndim], 80.0), Bends.draw(1, ndim, 0.05, 4, torch.Generator().manual_seed(1))
    there = bends(apply_matrix(pose, canvas_points((drawer.edge,) * ndim)))[0] * 40.0  # mm from the middle
    oracle = of(torch.cat([there, scan.grid.points()[0] - scan.middle]))  # of the same brightest, which the scan's is 1 of
    oracle = (oracle[: len(there)] / oracle[len(there):].max()).float()
    found = drawer.shown(scan, pose, bends)[0, 0].flatten()
    inside = (there.abs() < 36).all(1)
    assert float((found - oracle)[inside].abs().max()) < 0.03 < float((drawer.shown(scan, pose)[0, 0].flatten() - found).abs().max())


@both
def test_at_home_the_canvas_lies_around_the_middle_upright(ndim):
    """And as many mm as it is wide are half edges, however fine the scan's voxels."""
    eye = torch.eye(ndim + 1, dtype=torch.float64)[None]
    corners = torch.tensor([[0.0] * ndim, [1.0] * ndim, [-1.0] + [0.0] * (ndim - 1)], dtype=torch.float64)[None]
    for voxels in (20, 33):
        scan = placed(ndim, blobs(), voxels=voxels)
        world = scan.grid.to_world(apply_matrix(Drawer(16, MM).home(scan) @ eye, corners))[0]
        torch.testing.assert_close(world - scan.middle, corners[0] * MM / 2)


@both
def test_what_was_not_seen_is_nothing(ndim):
    scan = placed(ndim, lambda points: torch.ones(len(points)))
    found = Drawer(EDGES[ndim], 2 * MM).shown(scan, torch.eye(ndim + 1, dtype=torch.float64)[None])
    assert bool(((found < 1e-6) | (found > 1 - 1e-6)).all())
    seen = np.prod([n * 96 / max(scan.grid.shape) for n in scan.grid.shape])  # mm² or mm³
    assert float(found.mean()) == pytest.approx(seen / (2 * MM) ** ndim, rel=0.15)


@both
def test_labels_are_drawn_where_warp_puts_them(ndim):
    def marks(points):
        return (points[:, 0] > 0).int() * 3 + (points[:, 1] > 5).int() * 4

    scan, drawer, pose = placed(ndim, blobs(), labels=marks), Drawer(EDGES[ndim], MM), some_pose(ndim, 1)
    found = drawer.marked(scan, pose, [4, 7, 3])
    assert found.shape == (1, 3, *[drawer.edge] * ndim) and set(found.unique().tolist()) == {0.0, 1.0}
    picture = replace(scan, values=scan.labels[None].astype(np.float32))
    smooth = drawer.shown(picture, pose)  # linear: exact where its neighbours agree
    for channel, label in enumerate((4, 7, 3)):
        sure = smooth[:, 0] == label
        assert int(sure.sum()) > 50 and bool((found[:, channel][sure] == 1).all())
    assert float(found.sum(1).max()) == 1


# ---------------------------------------------------------------------------------------------------------------- the items

@both
def test_an_item_depends_on_seed_step_and_place_alone(ndim):
    """Not on those beside it, on those before, or on anybody's random state."""
    scans, reference = [placed(ndim, blobs(k), voxels=16) for k in range(3)], torch.rand(5, ndim) - 0.5
    given = {"augment": 1.0, "reference": reference, "edge": 16}
    whole = pairs(scans, ndim, **given)(7, range(6))
    torch.manual_seed(99)
    np.random.seed(99)  # MONAI could have drawn from it
    again = pairs(scans, ndim, **given)
    again(3, range(2))
    parts = [again(7, range(4, 6)), again(7, range(4))]
    assert same({key: torch.cat([parts[1][key], parts[0][key]]) for key in whole}, whole)
    for other in (pairs(scans, ndim, **given, seed=1)(7, range(6)), again(8, range(6)), again(7, range(6, 12))):
        assert not torch.equal(other["fixed"], whole["fixed"]) and not torch.equal(other["known"], whole["known"])
    assert len({float(one.sum()) for one in whole["fixed"]}) == 6


@both
def test_a_batch_holds_what_a_loss_asks_for(ndim):
    scans = [placed(ndim, blobs(k), labels=lambda points: (points[:, 0] > 0).int()) for k in range(2)]
    plain = pairs(scans, ndim)(0, range(3))
    assert {key: tuple(value.shape) for key, value in plain.items()} == {
        **dict.fromkeys(("fixed", "moving", "fixed_seen", "moving_seen"), (3, 1, *[EDGES[ndim]] * ndim)), "known": (3, ndim + 1, ndim + 1),
        "is_known": (3,)}
    assert torch.equal(plain["fixed_seen"], plain["fixed"]) and torch.equal(plain["moving_seen"], plain["moving"])  # augment is 0
    more = pairs(scans, ndim, reference=torch.zeros(4, ndim), labels=[1], augment=1.0)(0, range(3))
    assert more.keys() - plain.keys() == {"fixed_points", "moving_points", "has_points", "fixed_labels", "moving_labels"}
    assert more["fixed_points"].shape == (3, 4, ndim) and more["fixed_labels"].shape == (3, 1, *[EDGES[ndim]] * ndim)
    assert all(value.dtype == torch.float32 for key, value in more.items() if key != "known")
    # contrasts are changed for the net alone: what it is judged by is the scan
    assert not torch.equal(more["fixed_seen"], more["fixed"])


@both
def test_known_maps_carry_fixed_points_to_moving_ones(ndim):
    """The moving canvas pulled through the map is the fixed one, for one scan twice, and for no other pair."""
    made = pairs([placed(ndim, blobs(k)) for k in range(3)], ndim)
    batch = made(60, range(24))
    fixed, moved = batch["fixed"], moved_by(batch["known"], batch["moving"], batch["fixed"].shape[2:])
    seen = moved_by(batch["known"], torch.ones_like(fixed), fixed.shape[2:]) > 0
    away = torch.tensor([float((a - b)[s].abs().mean()) for a, b, s in zip(fixed, moved, seen, strict=True)])
    known = batch["is_known"] > 0
    assert 6 <= int(known.sum()) <= 18 and int(seen.flatten(1).sum(1).min()) > 0.4 * fixed[0].numel()
    assert float(away[known].max()) < 0.015 < 0.03 < float(away[~known].min())
    before = torch.tensor([float((a - b).abs().mean()) for a, b in zip(fixed, batch["moving"], strict=True)])
    assert float(before[known].median()) > 2 * float(away[known].max())


@both
def test_points_of_the_reference_lie_where_they_are_seen(ndim, monkeypatch):
    """A scan of bright blobs at these points shows them there, on both canvases, however it is bent; others' points are said to be none."""
    monkeypatch.setattr(module, "BENT", 0.12)  # so much that it can be seen
    ring = torch.tensor([[0.3, 0.0, 0.1], [-0.25, 0.2, 0.0], [0.0, -0.35, -0.2], [0.1, 0.3, 0.25]], dtype=torch.float64)[:, :ndim]
    seen = placed(ndim, lambda points: torch.exp(-torch.cdist(points, ring * MM / 2).square() / (2 * 7.0**2)).amax(1))
    batch = pairs([seen, placed(ndim, blobs(1))], ndim, reference=ring.float())(60, range(30))
    has = batch["has_points"] > 0
    assert 3 <= int(has.sum()) <= 15 and bool((batch["is_known"][has] == 0).all())  # bent each in a way of its own
    for name in ("fixed", "moving"):
        points, edge = batch[f"{name}_points"], EDGES[ndim]
        values, others = (sample(batch[name], (at + 1) * edge / 2 - 0.5)[:, 0][has] for at in (points, -points))
        inside = (points.abs() < 1 - 1 / edge).all(-1)[has]
        assert float(values[inside].min()) > 0.7 > 0.5 > float(others[inside].mean())
    carried = apply_matrix(batch["known"][has], batch["fixed_points"][has].double())
    away = (carried - batch["moving_points"][has]).norm(dim=-1)
    assert 0.05 < float(away.mean()) < 0.6  # by the bends alone


@both
def test_labels_lie_on_the_scan_in_its_pose(ndim, monkeypatch):
    monkeypatch.setattr(module, "BENT", 0.12)

    def marks(points):
        return (torch.cdist(points, torch.full((1, ndim), 10.0, dtype=points.dtype))[:, 0] < 15).int() * 2

    scans = [placed(ndim, lambda points: (marks(points) > 0).double(), labels=marks) for _ in range(2)]
    batch = pairs(scans, ndim, labels=[5, 2], reference=torch.zeros(1, ndim))(60, range(10))
    assert batch["has_points"].any()  # the bent reference is among them
    for name in ("fixed", "moving"):
        assert not batch[f"{name}_labels"][:, 0].any()
        share = (batch[f"{name}_labels"][:, 1] - batch[name][:, 0]).abs().flatten(1).sum(1) / batch[name].flatten(1).sum(1)
        assert float(share.max()) < 0.35  # the edge of what is linear
        assert bool((batch[f"{name}_labels"][:, 1][batch[name][:, 0] > 0.95] == 1).all())


# ---------------------------------------------------------------------------------------------------------------- the rules

def shown(ndim, persons, **given):
    """Which scans 200 pairs show: (fixed, moving, is known, has points)."""
    count = len(persons)
    scans = [placed(ndim, ball((k + 1) / count), person, voxels=12) for k, person in enumerate(persons)]
    batch = pairs(scans, ndim, edge=8, **given)(50, range(200))
    places = [(batch[name].flatten(1).amax(1) * count).round().int().sub(1).tolist() for name in ("fixed", "moving")]
    points = batch["has_points"].tolist() if "has_points" in batch else [0.0] * 200
    return list(zip(*places, batch["is_known"].tolist(), points, strict=True))


def test_all_pairs_everybody_with_everybody_and_half_of_them_one_scan_twice():
    found = shown(2, "ABCD")
    assert {(a, b) for a, b, *_ in found} == {(a, b) for a in range(4) for b in range(4)}
    assert all(bool(known) == (a == b) for a, b, known, _ in found)
    assert 75 < sum(a == b for a, b, *_ in found) < 125


def test_within_pairs_scans_of_one_person():
    found = shown(2, "ABABC", rule="within")
    assert {(a, b) for a, b, *_ in found} == {(0, 0), (1, 1), (2, 2), (3, 3), (4, 4), (0, 2), (2, 0), (1, 3), (3, 1)}
    assert all(bool(known) == (a == b) for a, b, known, _ in found)
    with pytest.raises(FormatError, match=r"pairs: within one person, but no person has two scans; name them in a table \(scan,person\)"):
        shown(2, "ABCD", rule="within")


def test_the_atlas_is_always_fixed():
    """One scan may be shown twice, whichever it is: that teaches what a pose is."""
    found = shown(2, "ABCD", rule="atlas")
    assert {(a, b) for a, b, *_ in found if a != b} == {(0, 1), (0, 2), (0, 3)}
    assert {a for a, b, *_ in found if a == b} == {0, 1, 2, 3}
    assert all(bool(known) == (a == b) for a, b, known, _ in found)
    assert 70 < sum(a != b for a, b, *_ in found) < 130


@pytest.mark.parametrize("rule", ["all", "within", "atlas"])
def test_the_reference_is_the_first_scan_twice(rule):
    found = shown(2, "AABB", rule=rule, reference=torch.zeros(2, 2))
    assert all((a, b, known) == (0, 0, 0.0) for a, b, known, points in found if points)
    assert 35 < sum(points for *_, points in found) < 85
    assert any(a == b == 0 and not points for a, b, _, points in found)  # also where it is drawn like any other


@both
def test_turns_grow_to_all_that_is_asked_for(ndim):
    made = pairs([placed(ndim, blobs(k), voxels=8) for k in range(2)], ndim, edge=8, steps=1000, poses=Poses(1.0, 0.1, 0.0, 0.0))

    def most(step):
        """Radians of the largest of many turns between both canvases, which are turned each."""
        maps = made(step, range(60))["known"][:, :ndim, :ndim]
        trace = nearest_rotation(maps).diagonal(dim1=1, dim2=2).sum(1)
        return math.acos(float(((trace - 1) / 2 if ndim == 3 else trace / 2).min()))

    assert 0.15 < most(0) <= 0.3 + 1e-6 and 0.6 < most(200) <= 1.3 + 1e-6
    assert 1.3 < most(400) <= 2 + 1e-6 and 1.3 < most(999) <= 2 + 1e-6


def test_poses_reach_as_far_as_is_asked_for():
    assert poses(180.0).turn == pytest.approx(math.pi) and poses(0.0).turn == 0.0
    assert torch.equal(replace(poses(0.0), shift=0.0, scale=0.0, stretch=0.0).draw(2, 3, torch.Generator().manual_seed(0)),
                       torch.eye(4, dtype=torch.float64).expand(2, 4, 4))


# ------------------------------------------------------------------------------------------------------------ the reference

@both
def test_points_are_spread_over_the_body(ndim):
    scan, drawer = placed(ndim, ball(0.8)), Drawer(16, MM)
    found = spread(scan, drawer, 20)
    assert found.shape == (20, ndim) and torch.equal(spread(scan, drawer, 20), found)
    assert float(found.norm(dim=1).max()) <= 0.6 and float(found[0].norm()) < 0.1  # 30 mm; the first in the middle
    apart = torch.cdist(found, found) + 10 * torch.eye(20)
    random = torch.rand(200, 20, ndim, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 1.2 - 0.6
    usual = (torch.cdist(random, random) + 10 * torch.eye(20)).flatten(1).amin(1)
    assert float(apart.min()) > float(usual.max())
    fewer = spread(scan, drawer, 7)
    assert torch.equal(fewer, found[:7])  # each as far from those before it as can be


@both
def test_points_stay_on_the_canvas_and_in_the_foreground(ndim):
    scan = placed(ndim, lambda points: (points[:, 0] > 10).double() * 0.9 + 0.05)
    found = spread(scan, Drawer(16, 60.0), 30)
    assert float(found.abs().max()) < 0.95 and float(found[:, 0].min()) > 10 / 30 - 0.1


def test_a_body_of_few_voxels_has_as_many_points():
    scan = placed(2, lambda points: (points.abs().amax(1) < 4).double(), voxels=30)
    count = int((scan.values > 0).sum())
    assert 1 < count < 40 and spread(scan, Drawer(16, MM), 40).shape == (count, 2)
