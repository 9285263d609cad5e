"""The segmenter behind a spatial transformer: the way back undoes the way there, both nets learn, people stay apart, a run goes on."""

from __future__ import annotations

import json
import math
import sys

import pytest
import torch
from torch import nn

import regkit
from tests.pipelines.conftest import PIPELINES, scripts

FOLDER = PIPELINES / "stn_hippocampus"
NAMES = ("scans", "nets", "train", "report", "run")

scans, nets, train, report, run = scripts(FOLDER, NAMES)
VOXELS = 16


def blobs(seed, shape=(20, 26, 18), mm=2.0):
    """A made crop: two ellipsoids of unlike brightness, one the anterior and one the posterior part, in a dim box. → scan, labels"""
    grid = regkit.Grid(shape, torch.diag(torch.tensor([mm, mm, mm, 1.0], dtype=torch.float64)))
    points = grid.points()[0] - grid.centre[0]
    draw = torch.Generator().manual_seed(seed)
    labels = torch.zeros(len(points), dtype=torch.uint8)
    for part, y in ((1, 9.0), (2, -9.0)):
        middle = torch.tensor([0.0, y, y / 3]).double() + torch.randn(3, generator=draw, dtype=torch.float64)
        labels[((points - middle) / torch.tensor([6.0, 9.0, 5.0])).norm(dim=1) < 1] = part
    values = 100 + 60 * (labels == 1) - 60 * (labels == 2) + 5 * torch.randn(len(points), generator=draw)
    return regkit.Image(values.reshape(1, 1, *shape), grid), regkit.Image(labels.reshape(1, 1, *shape), grid)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Crops of eight made people, of two of them two."""
    place = tmp_path_factory.mktemp("crops")
    for number in (1, 3, 4, 6, 8, 9, 10, 12, 14, 16):
        scan, labels = blobs(number)
        regkit.write_image(scan, place / f"{number:03}_t1.nii.gz")
        regkit.write_image(labels, place / f"{number:03}_seg.nii.gz")
    return place


@pytest.fixture(scope="module")
def crops(folder):
    return scans.read(folder, VOXELS)


def test_both_sides_of_a_person_lie_in_one_fold(crops):
    assert crops.people == [1, 2, 2, 3, 4, 5, 5, 6, 7, 8]
    dealt = scans.folds(crops.people)
    assert sorted(person for fold in dealt for person in fold) == list(range(1, 9))
    assert sorted(crops.of([2, 5])) == [1, 2, 5, 6]
    assert scans.person("hippocampus_004.nii.gz") == scans.person("003_t1.nii.gz") == 2
    with pytest.raises(SystemExit, match="number"):
        scans.person("left.nii.gz")


def test_a_crop_lies_centred_and_standardised(crops):
    known = crops.data[:, 1:].sum(1) > 0.5
    assert crops.data.shape == (10, 3, *crops.grid.shape)
    middle = (known[0, None].flatten().double() @ crops.grid.points()[0]) / known[0].sum()
    assert middle.norm() < 4
    assert crops.data[:, 0, 0].abs().max() == 0  # beyond the crop
    assert abs(float(crops.data[0, 1].sum() * crops.grid.spacing.prod()) - 4 / 3 * math.pi * 6 * 9 * 5) < 150  # mm³ of the anterior part


def test_poses_turn_as_far_as_asked_and_keep_their_draws():
    near, far = (scans.poses(200, degrees, torch.Generator().manual_seed(0)).matrix for degrees in (30.0, 90.0))
    scale = torch.linalg.det(far[:, :3, :3]) ** (1 / 3)
    assert scale.min() > math.exp(-scans.SCALE) - 1e-9 and scale.max() < math.exp(scans.SCALE) + 1e-9
    angle = [torch.rad2deg((((m[:, :3, :3] / scale[:, None, None]).diagonal(dim1=1, dim2=2).sum(1) - 1) / 2).clamp(-1, 1).acos())
             for m in (near, far)]
    assert 85 < angle[1].max() <= 90 + 1e-6
    assert torch.allclose(3 * angle[0], angle[1], atol=1e-4)
    assert torch.equal(near[:, :3, 3], far[:, :3, 3])


def test_a_turned_scan_and_its_labels_agree(crops):
    """The scan is made of the labels' brightness, so what is turned with it must lie where the brightness does."""
    pose = scans.poses(4, 180.0, torch.Generator().manual_seed(1))
    scan, labels = scans.turned(crops, torch.arange(4), pose, scans.cube(24))
    for part, sign in ((1, 1), (2, -1)):
        inside = scan[:, 0][labels == part]
        assert float((inside * sign).mean()) > 1


class Says(nn.Module):
    def __init__(self, theta):
        super().__init__()
        self.theta = theta

    def forward(self, scan):
        return self.theta.expand(len(scan), -1)


def test_labels_carried_there_and_back_agree(crops):
    """What is said in the learnt pose comes back to where the scan lies, and is background where nothing was said."""
    grid = scans.cube(32)
    layer = regkit.SpatialTransformer(Says(torch.tensor([[0.1, -0.05, 0.02, 0.9, -0.5, 1.1]])), "rigid", antialias="none")
    _, labels = scans.turned(crops, torch.arange(2), scans.poses(2, 90.0, torch.Generator().manual_seed(2)), grid)
    logits = 12 * torch.nn.functional.one_hot(labels, 3).movedim(-1, 1)[:, 1:].float() - 6
    transform = layer.transform(logits, moving_grid=grid, fixed_grid=grid)
    there = nets.back(layer, logits, transform.inverse(), grid)  # from the scan to the learnt pose
    home = nets.back(layer, there, transform, grid)
    found = train.full(home).argmax(1)
    agree = [2 * ((found == k) & (labels == k)).sum() / ((found == k).sum() + (labels == k).sum()) for k in (1, 2)]
    assert min(agree) > 0.85, agree
    lost = train.full(there).argmax(1)
    assert 2 * ((lost == 1) & (labels == 1)).sum() / ((lost == 1).sum() + (labels == 1).sum()) < 0.6  # it had gone somewhere
    far = nets.back(layer, torch.full_like(logits, 3.0), transform, grid)
    corner = far[:, :, 0, 0, 0]
    assert torch.allclose(corner, torch.full_like(corner, nets.AWAY), atol=1e-4) or float(corner.max()) <= 3


def test_fitted_points_turn_however_far():
    """The map of `Fitted` is the one that carries the learnt places to the points found, for any turn."""
    layer = nets.Fitted(nn.Identity(), "rigid", 8)
    truth = scans.poses(5, 180.0, torch.Generator().manual_seed(3)).matrix
    truth = regkit.Matrix(regkit.space.model("rigid").project(truth, torch.zeros(1, 3, dtype=torch.float64)))
    found = layer.transform(truth(layer.places.detach().double().expand(5, -1, -1)))
    assert torch.allclose(found.matrix, truth.matrix, atol=1e-5)


def test_keypoints_move_with_the_anatomy(crops):
    torch.manual_seed(0)
    net = nets.Keypoints(4).eval()
    nn.init.normal_(net.heat.weight, std=10.0)
    here, _ = scans.turned(scans.within(crops, 10.0), torch.tensor([0]), regkit.Matrix.identity(3), scans.cube(64))
    with torch.no_grad():
        points, moved = net(here), net(torch.roll(here, 8, dims=2))  # a whole step of the coarsest maps
    assert float((moved - points - torch.tensor([8 * scans.SIDE / 64, 0.0, 0.0])).abs().max()) < 1.5


@pytest.mark.parametrize("name", list(nets.NETS))
def test_every_net_learns(crops, name):
    """A few steps on made crops lower the loss, and every parameter is reached."""
    job = train.Job("main", name, 30, 1, 0, steps=25)
    grid, which = scans.cube(VOXELS), torch.arange(4)
    scan, labels = scans.turned(crops, which, scans.poses(4, 30.0, torch.Generator().manual_seed(4)), grid)
    before = train.loss(train.start(job, VOXELS).train()(scan, grid)[0], labels)
    net, seconds = train.train(job, crops, scans.folds(crops.people)[2], VOXELS)
    logits, transform = net.train()(scan, grid)
    after = train.loss(logits, labels)
    after.backward()
    assert float(after.detach()) < 0.8 * float(before.detach()) and seconds > 0
    assert all(p.grad is not None and bool(torch.isfinite(p.grad).all()) for p in net.parameters())
    assert (transform is None) == (name == "plain")


def test_nets_are_of_like_size_and_start_alike_for_a_seed():
    counts = [sum(p.numel() for p in build(32).parameters()) for build in nets.NETS.values()]
    assert max(counts) < 1.1 * min(counts)
    first, again, other = (train.start(train.Job("main", "keypoints", 90, 1, seed, 5), VOXELS).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(first[k], again[k]) for k in first)
    assert not torch.equal(first["segmenter.last.weight"], other["segmenter.last.weight"])


def test_the_pose_taught_is_nought_at_the_crops_own():
    pose = scans.poses(3, 120.0, torch.Generator().manual_seed(5))
    assert float(train.taught(pose, pose.inverse())) == pytest.approx(1 / 20, abs=1e-6)  # what smooths the distance at 0
    assert float(train.taught(pose, regkit.Matrix.identity(3))) > 0.3


def test_a_ball_hides_how_the_crop_is_turned(crops):
    seen = scans.within(crops, 12.0)
    distance = crops.grid.points().norm(dim=-1).reshape(crops.grid.shape)
    assert seen.data[:, :, distance > 12].abs().max() == 0
    assert torch.equal(seen.data[:, :, distance <= 12], crops.data[:, :, distance <= 12])


def record(way, seed, scores, degrees=90):
    return {"job": {"study": "main", "degrees": degrees, "seed": seed}, "way": way, "seconds": 1.0, "parameters": 5, "degrees_left": [1.0],
            "scans": {f"{k:03}": {"person": (k + 1) // 2, "dice": [[v, v]]} for k, v in scores.items()}}


def test_intervals_are_paired_by_person_and_count_two_scans_once():
    plain = [record("plain", seed, {1: 0.5, 2: 0.7, 3: 0.8}) for seed in (0, 1)]
    other = [record("keypoints", seed, {1: 0.6, 2: 0.8, 3: 0.9}) for seed in (0, 1)]
    scores = report.by_person(plain)
    assert scores == {1: {0: pytest.approx(0.6), 1: pytest.approx(0.6)}, 2: {0: 0.8, 1: 0.8}}
    assert report.mean(scores) == pytest.approx(0.7)
    gain = report.minus(report.by_person(other), scores)
    assert report.mean(gain) == pytest.approx(0.1)
    assert report.interval(gain, [[1], [2]]) == pytest.approx((0.1, 0.1))
    low, high = report.interval(scores, [[1], [2]])
    assert low == pytest.approx(0.6) and high == pytest.approx(0.8)
    text = report.tables([*plain, *other], [[1], [2]])
    assert "| ±90° keypoints | 0.800 | +0.100 [+0.100, +0.100] | 2 of 2 |" in text


def test_a_run_goes_on_where_it_stopped(folder, tmp_path, monkeypatch, capsys):
    def again(*extra):
        monkeypatch.setattr(sys, "argv", ["run.py", str(folder), "-o", str(tmp_path), "--quick", "--study", "main", *extra])
        run.main()
        return capsys.readouterr().out

    first = again()
    assert "1/4 main/plain-0-fold1-seed0" in first and "4/4 main/keypoints-180-fold1-seed0" in first
    files = sorted((tmp_path / "main").glob("*.json"))
    assert len(files) == 4 and len(list((tmp_path / "main").glob("*.safetensors"))) == 4
    for name in ("table.md", "dice_against_pose.png", "montage.png"):
        assert (tmp_path / name).stat().st_size > 200
    told = json.loads(files[0].read_text())
    assert {scan["person"] for scan in told["scans"].values()} <= set(scans.folds(scans.read(folder, VOXELS).people)[1])
    lost = json.loads(files[1].read_text())
    files[1].unlink()
    last = again()
    assert last.count(" Dice 0.") == 1 and f"main/{files[1].stem} Dice" in last
    assert json.loads(files[1].read_text())["scans"] == lost["scans"]  # the same training again
    assert len(json.loads((tmp_path / "results.json").read_text())["records"]) == 4
