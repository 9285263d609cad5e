"""Nets in and out of files: what is loaded says what was saved, and what is no net is named together with what to give instead."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from regkit.errors import CheckpointError, OutputError
from regkit.io.weights import read_tensors, write_tensors
from regkit.localisation import Detector, KeypointNet, RegressionNet
from regkit.registration import nets
from regkit.registration.nets import load, save, shipped
from regkit.space import Grid

KINDS = ("keypoints", "keypoints with home", "regression")
every = pytest.mark.parametrize("kind", KINDS)
CURE = r"; give a net that regkit wrote, a training's folder, or a shipped net's name \((there is none|.*-[23]d)\)$"


def made(kind, ndim, seed=0):
    torch.manual_seed(seed)
    if kind == "regression":
        net = RegressionNet(8, ndim, "similarity", width=8, depth=1, hidden=8)
        torch.nn.init.normal_(net.head[-1].weight, std=0.2)
        return net
    return KeypointNet(Detector(6, ndim, width=8, depth=1), torch.rand(6, ndim) if "home" in kind else None, "rigid")


@pytest.fixture
def package(tmp_path, monkeypatch):
    """The package's folder of nets, empty."""
    folder = tmp_path / "package"
    folder.mkdir()
    monkeypatch.setattr(nets, "SHIPPED", folder)
    monkeypatch.chdir(tmp_path)
    return folder


@every
@pytest.mark.parametrize("half", [False, True], ids=["full", "half"])
def test_what_is_saved_is_loaded(kind, half, ndim, tmp_path):
    net, path = made(kind, ndim), tmp_path / "one.safetensors"
    save(net, path, edge=8, mm=6.5, info={"data": ["a", 1], "ß": None}, half=half)
    again = load(path)
    assert (again.edge, again.mm, again.ndim, again.name) == (8, 6.5, ndim, str(path))
    assert again.info == {"data": ["a", 1], "ß": None}
    assert type(again.net) is type(net) and again.net.settings == net.settings
    assert not again.net.training and not any(p.requires_grad for p in again.net.parameters())
    before, after = net.state_dict(), again.net.state_dict()
    assert list(before) == list(after)
    for key, value in before.items():
        assert after[key].dtype == torch.float32 and after[key].device.type == "cpu"
        assert torch.equal(after[key], value.half().float() if half else value)
    net.load_state_dict(after)
    fixed, moving = torch.rand(2, 2, 1, *[8] * ndim, generator=torch.Generator().manual_seed(1))
    assert torch.equal(again.net(fixed, moving), net.eval()(fixed, moving))


def test_half_is_half_as_large_and_leaves_the_net_as_it_is(tmp_path):
    net = made("regression", 3)
    for half in (False, True):
        save(net, tmp_path / f"{half}.safetensors", edge=8, mm=1.0, half=half)
    full, halved = ({v.dtype for v in read_tensors(tmp_path / f"{half}.safetensors")[0].values()} for half in (False, True))
    assert (full, halved) == ({torch.float32}, {torch.float16})
    assert (tmp_path / "True.safetensors").stat().st_size < 0.6 * (tmp_path / "False.safetensors").stat().st_size
    assert all(p.dtype == torch.float32 and p.requires_grad for p in net.parameters())


def test_a_canvas_may_be_as_wide_as_the_scan(ndim, tmp_path):
    save(made("regression", ndim), tmp_path / "one.safetensors", edge=8, mm=None)
    again = load(tmp_path / "one.safetensors")
    affine = torch.diag(torch.tensor([*[-2.0, 0.5, 3.0][:ndim], 1.0], dtype=torch.float64))
    assert again.mm is None and again.info == {}
    assert again.millimetres(Grid((40, 20, 10)[:ndim], affine)) == pytest.approx(80 / 8)
    save(made("regression", ndim), tmp_path / "two.safetensors", edge=8, mm=6.0)
    assert load(tmp_path / "two.safetensors").millimetres(Grid((40, 20, 10)[:ndim], affine)) == 6.0


def test_an_existing_net_is_kept_unless_it_may_be_overwritten(tmp_path):
    path = tmp_path / "one.safetensors"
    save(made("keypoints", 2), path, edge=8, mm=1.0)
    with pytest.raises(OutputError, match=r"exists; choose another name or give --overwrite"):
        save(made("regression", 2), path, edge=8, mm=1.0)
    assert isinstance(load(path).net, KeypointNet)
    save(made("regression", 2), path, edge=8, mm=1.0, overwrite=True)
    assert isinstance(load(path).net, RegressionNet)


def test_a_trainings_folder_holds_a_net(tmp_path, package, monkeypatch):
    save(made("keypoints", 2), tmp_path / "training" / "net.safetensors", edge=8, mm=1.0)
    (tmp_path / "training" / "log.csv").write_text("step\n")
    for name in (tmp_path / "training", "training"):
        assert isinstance(load(name).net, KeypointNet) and load(name).name == str(name)
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="net: 'empty' is not there" + CURE):
        load("empty")


def test_shipped_nets_are_listed_by_dimension_and_loaded_by_name(package):
    assert shipped() == shipped(2) == []
    for name, ndim in (("head-3d", 3), ("abdomen-3d", 3), ("slice-2d", 2)):
        save(made("keypoints", ndim), package / f"{name}.safetensors", edge=8, mm=1.0)
    (package / "head-3d.md").write_text("# A model card")
    assert shipped() == ["abdomen-3d", "head-3d", "slice-2d"]
    assert shipped(3) == ["abdomen-3d", "head-3d"] and shipped(2) == ["slice-2d"]
    assert load("slice-2d").ndim == 2 and load("head-3d").name == "head-3d"
    with pytest.raises(CheckpointError, match=r"net: 'haed-3d' is not there; .*\(abdomen-3d, head-3d, slice-2d\)$"):
        load("haed-3d")


# ---------------------------------------------------------------------------------------------------------------- faults

def refused(path, match):
    with pytest.raises(CheckpointError, match=match) as caught:
        load(path)
    assert "\n" not in str(caught.value)


def test_what_is_not_there_is_named(tmp_path, package):
    for name in ("nothing", "nothing.safetensors", tmp_path / "deep" / "er.safetensors", ""):
        refused(name, rf"^net: '{name}' is not there" + CURE)


def test_what_is_no_net_is_named(tmp_path, package):
    (tmp_path / "notes.txt").write_text("these are no weights, but a text of some length\n" * 10)
    refused(tmp_path / "notes.txt", rf"^net: {tmp_path}/notes.txt cannot be read as weights .*" + CURE)
    save(made("keypoints", 2), tmp_path / "one.safetensors", edge=8, mm=1.0)
    whole = (tmp_path / "one.safetensors").read_bytes()
    for length in (0, 5, 200, len(whole) - 1):
        (tmp_path / "cut.safetensors").write_bytes(whole[:length])
        refused(tmp_path / "cut.safetensors", r"^net: .*cut.safetensors cannot be read as weights" + ".*" + CURE)
    tensors, header = read_tensors(tmp_path / "one.safetensors")
    for name, other in (("none", {}), ("later", {**header, "format": "regkit net 2"}), ("checkpoint", {"state": "{}"})):
        write_tensors(tmp_path / f"{name}.safetensors", tensors, other)
        refused(tmp_path / f"{name}.safetensors", rf"^net: .*{name}.safetensors holds no net of regkit's" + CURE)


def _header(change):
    def spoil(tensors, header):
        said = json.loads(header["net"])
        change(said)
        return tensors, {**header, "net": json.dumps(said)}
    return spoil


@pytest.mark.parametrize("spoil", [
    lambda tensors, header: ({key: value for key, value in tensors.items() if not key.startswith("detector.up")}, header),
    lambda tensors, header: ({**tensors, "more": torch.zeros(1)}, header),
    lambda tensors, header: ({**tensors, "detector.maps.weight": torch.zeros(7, 8, 1, 1)}, header),
    lambda tensors, header: ({}, header),
    lambda tensors, header: (tensors, {key: value for key, value in header.items() if key != "net"}),
    lambda tensors, header: (tensors, {key: value for key, value in header.items() if key != "info"}),
    lambda tensors, header: (tensors, {**header, "net": "{"}),
    lambda tensors, header: (tensors, {**header, "net": "[1]"}),
    _header(lambda said: said.update(kind="transformer")), _header(lambda said: said.pop("kind")), _header(lambda said: said.pop("edge")),
    _header(lambda said: said.update(kind="regression")), _header(lambda said: said["settings"].update(width=0)),
    _header(lambda said: said["settings"].update(heads=8)), _header(lambda said: said["settings"].pop("points")),
    _header(lambda said: said["settings"].update(model="tps")), _header(lambda said: said["settings"].update(points=9)),
    _header(lambda said: said.update(settings=None)), _header(lambda said: said.update(edge="many")),
    _header(lambda said: said["settings"].update(depth=10**6)), _header(lambda said: said["settings"].update(width=10**9)),
    _header(lambda said: said["settings"].update(points=10**400)), _header(lambda said: said["settings"].update(points=2.5)),
    _header(lambda said: said.update(edge=10**6)), _header(lambda said: said.update(edge=-8)), _header(lambda said: said.update(edge=9)),
    _header(lambda said: said.update(mm=-1.0)), _header(lambda said: said.update(mm=float("nan"))),
    _header(lambda said: said.update(mm="1")),
    lambda tensors, header: (tensors, {**header, "net": "[" * 100_000}),
    lambda tensors, header: ({key: value * torch.nan for key, value in tensors.items()}, header),
    lambda tensors, header: ({key: value.long() for key, value in tensors.items()}, header),
], ids=["missing", "more", "shape", "empty", "no net", "no info", "no JSON", "a list", "unknown kind", "no kind", "no edge", "other kind",
        "no width", "unknown setting", "missing setting", "unknown model", "other points", "no settings", "no number", "deep",
        "wide", "many", "half a point", "large", "negative", "odd", "negative mm", "mm that are none", "mm in words", "nested",
        "NaN", "whole numbers"])
def test_weights_that_do_not_fit_are_named(spoil, tmp_path, package):
    save(made("keypoints", 2), tmp_path / "one.safetensors", edge=8, mm=1.0)
    tensors, header = spoil(*read_tensors(tmp_path / "one.safetensors"))
    write_tensors(tmp_path / "spoilt.safetensors", tensors, header)
    refused(tmp_path / "spoilt.safetensors", r"^net: .*spoilt.safetensors does not fit this version of regkit \(.+\)" + CURE)


def test_a_copy_elsewhere_is_the_same_net(tmp_path):
    """Everything is in the one file."""
    net = made("keypoints with home", 3)
    save(net, tmp_path / "one.safetensors", edge=8, mm=1.0)
    shutil.move(tmp_path / "one.safetensors", tmp_path / "renamed")
    assert torch.equal(load(tmp_path / "renamed").net.home, net.home)
