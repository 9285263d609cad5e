"""`train()`: what is learnt from what, what a broken run leaves, and that nothing is lost by a wrong word."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from regkit.errors import CheckpointError, FormatError, OptionError, OutputError
from regkit.io.weights import read_tensors, write_tensors
from regkit.localisation import Detector, KeypointNet, RegressionNet
from regkit.registration.nets import load, save
from regkit.training import train as module
from regkit.training.checkpoint import read
from regkit.training.fit import CHECKPOINT, TrainingError
from regkit.training.losses import Loss
from regkit.training.settings import TrainSettings
from regkit.training.train import train
from tests.training.conftest import affine, write_labels, write_people, write_scan

pytestmark = pytest.mark.usefixtures("unjudged")

pytest.importorskip("lightning_fabric")

FILES = ["checkpoint.safetensors", "curves.png", "evolution.gif", "frames.npy", "log.csv", "model-card.md", "net.safetensors", "scans",
         "tensorboard", "training.json"]


@pytest.fixture(scope="module", autouse=True)
def quick():
    """Two pairs at the end, looked at by the header's start alone, which is not refined; four on the way."""
    real = module.of_start
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_CASES", 2)
        patch.setattr(module, "_STARTS", ("header",))
        patch.setattr(module, "CASES", 4)
        patch.setattr(module, "of_start", lambda name, refined=False: real("header"))
        yield


@pytest.fixture(scope="module")
def people(tmp_path_factory):
    """Five people's slices."""
    return write_people(tmp_path_factory.mktemp("people"), 2, 5)


@pytest.fixture(scope="module")
def finished(people, tmp_path_factory):
    """A training of five steps that was not broken off: its folder, what came out, its rows and notes."""
    out, rows, notes = tmp_path_factory.mktemp("finished") / "run", [], []
    found = train(people, out, settings(steps=5), tell=rows.append, note=notes.append)
    return out, found, rows, notes


def settings(**given):
    return TrainSettings(**{"steps": 2, "batch": 2, "edge": 16, "device": "cpu", "precision": "32", **given})


def tree(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def weights(folder):
    return read_tensors(folder / "net.safetensors")[0]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(value, b[key]) for key, value in a.items())


def stopping(step):
    """A listener that breaks the run off at a step: after the look at it, before its checkpoint."""
    def tell(row):
        if row["step"] == step:
            raise KeyboardInterrupt

    return tell


class Stop(Exception):
    """Enough was seen."""


@pytest.fixture
def begun(monkeypatch):
    """(scans, output, settings) → what a training would begin with: (net, pairs, plan, scans of the validation), and no step of it."""
    def run(scans, output, given, **more):
        seen, cases = {}, module.cases

        def fit(net, pairs, loss, plan, folder, **rest):
            seen.update(net=net.net, pairs=pairs, plan=plan)
            raise Stop

        with monkeypatch.context() as patch, pytest.raises(Stop):
            patch.setattr(module, "fit", fit)
            patch.setattr(module, "cases", lambda looked, *rest: seen.update(looked=looked) or cases(looked, *rest))
            train(scans, output, given, **more)
        return seen["net"], seen["pairs"], seen["plan"], seen["looked"]

    return run


def names(scans):
    return [scan.listed.path.name for scan in scans]


# ---------------------------------------------------------------------------------------------------------- what comes of it

def test_a_training_leaves_a_net_and_its_record(finished, people):
    out, found, rows, notes = finished
    assert sorted(path.name for path in out.iterdir()) == FILES and notes == []
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5] and all(row.keys() >= {"loss", "known", "points", "tre_mm"} for row in rows)
    assert same(found.net.state_dict(), weights(out)) and isinstance(found.net, KeypointNet)
    assert (found.edge, found.name, found.ndim) == (16, str(out), 2) and found.mm == pytest.approx(1.3 * 96 / 16)
    assert set(found.info["validation"]) == {"net", "header", "auto, refined"}
    record = json.loads((out / "training.json").read_text())
    assert record == found.info == load(out).info
    assert (record["training"], record["held_out"], record["people"], record["steps"]) == (4, 1, 4, 5)
    assert record["scans"] == [f"p{k}.nii.gz" for k in range(5) if f"p{k}.nii.gz" in record["scans"]] and len(record["scans"]) == 4
    with (out / "log.csv").open(newline="") as file:
        assert [float(row["loss"]) for row in csv.DictReader(file)] == [row["loss"] for row in rows]
    assert len(np.load(out / "frames.npy")) == 5


def test_the_same_seed_gives_the_same_net(finished, people, tmp_path):
    train(people, tmp_path / "again", settings(steps=5))
    assert same(weights(tmp_path / "again"), weights(finished[0]))
    train(people, tmp_path / "other", settings(steps=5, seed=1))
    assert not same(weights(tmp_path / "other"), weights(finished[0]))


def test_the_canvas_may_be_said(people, tmp_path, begun):
    _, pairs, *_ = begun(people, tmp_path / "run", settings(canvas=160.0, edge=24))
    assert (pairs.drawer.mm, pairs.drawer.edge) == (160.0, 24)


@pytest.mark.parametrize(("given", "kind"), [({}, KeypointNet), ({"net": "regression"}, RegressionNet)], ids=["keypoints", "regression"])
def test_a_new_net_depends_on_the_seed_alone(given, kind, people, tmp_path, begun):
    torch.manual_seed(1)
    first, pairs, *_ = begun(people, tmp_path / "run", settings(**given))
    torch.manual_seed(2)
    state = torch.random.get_rng_state()
    again, *_ = begun(people, tmp_path / "run", settings(**given))
    assert isinstance(first, kind) and same(first.state_dict(), again.state_dict())
    assert torch.equal(torch.random.get_rng_state(), state)  # who calls has random numbers of its own
    other, *_ = begun(people, tmp_path / "run", settings(**given, seed=1))
    assert not same(first.state_dict(), other.state_dict())
    assert len(pairs.reference) == (24 if kind is KeypointNet else 0)


# -------------------------------------------------------------------------------------------------------- broken and resumed

def test_a_broken_run_goes_on_as_if_it_had_not_been(finished, people, tmp_path):
    """Bit for bit, the log and the film included: a frame of a step whose checkpoint was not written is not shown twice."""
    whole, out, told = finished[0], tmp_path / "run", []
    with pytest.raises(KeyboardInterrupt):
        train(people, out, settings(steps=5), tell=stopping(3))
    assert sorted(path.name for path in out.iterdir()) == ["checkpoint.safetensors", "frames.npy", "scans", "tensorboard"]
    train(people, out, settings(steps=5), resume=True, tell=told.append)
    assert [row["step"] for row in told] == [3, 4, 5]
    assert same(weights(out), weights(whole))
    for name in ("log.csv", "evolution.gif", "frames.npy"):
        assert (out / name).read_bytes() == (whole / name).read_bytes(), name
    (tensors, state), (others, other) = read(out / CHECKPOINT), read(whole / CHECKPOINT)
    assert same(tensors, others) and {**state, "seconds": 0} == {**other, "seconds": 0}


def test_the_time_of_a_broken_run_is_that_of_all_its_parts(people, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        train(people, tmp_path, settings(steps=5), tell=stopping(3))
    tensors, state = read(tmp_path / CHECKPOINT)
    assert 0 < state["seconds"] < 600
    write_tensors(tmp_path / CHECKPOINT, tensors, {"state": json.dumps({**state, "seconds": 7200.0})}, overwrite=True)
    assert 2 < train(people, tmp_path, settings(steps=5), resume=True).info["hours"] < 2.2


def test_its_own_pictures_are_no_scans(people, tmp_path):
    """A run inside the folder of the scans: its curves and its film are not read when it goes on."""
    folder = Path(shutil.copytree(people, tmp_path / "people"))
    with pytest.raises(KeyboardInterrupt):
        train(folder, folder / "run", settings(steps=5), tell=stopping(3))
    (folder / "run" / "curves.png").write_bytes(b"no scan")
    assert train(folder, folder / "run", settings(steps=5), resume=True).info["training"] == train(
        people, tmp_path / "other", settings(steps=1)).info["training"]


def test_a_canvas_must_be_about_as_wide_as_the_scans(people, tmp_path):
    with pytest.raises(OptionError, match=r"canvas: 2 mm; the scans are .* mm wide, so give .* to .*, or nothing"):
        train(people, tmp_path / "run", settings(canvas=2.0))
    assert not (tmp_path / "run").exists()


def test_a_run_that_was_broken_off_before_its_first_checkpoint_begins_anew(finished, people, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        train(people, tmp_path / "run", settings(steps=5), tell=stopping(1))
    assert (tmp_path / "run" / "frames.npy").exists() and not (tmp_path / "run" / CHECKPOINT).exists()
    train(people, tmp_path / "run", settings(steps=5), resume=True)
    assert same(weights(tmp_path / "run"), weights(finished[0])) and len(np.load(tmp_path / "run" / "frames.npy")) == 5


def test_a_loss_that_is_no_number_leaves_the_last_checkpoint_to_go_on_from(finished, people, tmp_path, monkeypatch):
    class Spoilt(Loss):
        def __call__(self, net, batch):
            found = super().__call__(net, batch)
            asked.append(1)
            return {**found, "loss": found["loss"] * (torch.nan if len(asked) == 4 else 1)}

    asked = []
    with monkeypatch.context() as patch, pytest.raises(TrainingError, match="the loss of step 3 is not a number"):
        patch.setattr(module, "Loss", Spoilt)
        train(people, tmp_path / "run", settings(steps=5))
    assert not (tmp_path / "run" / "net.safetensors").exists()
    train(people, tmp_path / "run", settings(steps=5), resume=True)
    assert same(weights(tmp_path / "run"), weights(finished[0]))


def test_a_finished_run_is_written_again(finished, people, tmp_path, monkeypatch):
    """What came after the last step may have failed: the net is there already, and the record comes when it is asked for again."""
    def fail(*_):
        raise FormatError("a pair that cannot be aligned")

    out = tmp_path / "run"
    with monkeypatch.context() as patch, pytest.raises(FormatError):
        patch.setattr(module, "_compared", fail)
        train(people, out, settings(steps=5))
    assert same(load(out).net.state_dict(), weights(finished[0])) and not (out / "model-card.md").exists()
    train(people, out, settings(steps=5), resume=True)
    assert sorted(path.name for path in out.iterdir()) == FILES
    assert (out / "evolution.gif").read_bytes() == (finished[0] / "evolution.gif").read_bytes()


def test_another_training_is_not_gone_on_with(finished, people):
    out = finished[0]
    before = tree(out)
    for given, changed in (({"rate": 0.1}, "rate"), ({"steps": 6, "seed": 1}, "seed, steps"), ({"canvas": 90.0}, "canvas")):
        with pytest.raises(OptionError, match=rf"resume: .* was begun with other settings \({changed}\)"):
            train(people, out, settings(**{"steps": 5, **given}), resume=True)
    with pytest.raises(OptionError, match="resume, overwrite: go on with a training, or begin it anew; give one of them"):
        train(people, out, settings(steps=5), resume=True, overwrite=True)
    after = tree(out)
    assert {name: after[name] for name in before} == before
    train(people, out, settings(steps=5, workers=0, skip_bad=True), resume=True)  # what changes no number may change


# ------------------------------------------------------------------------------------------------------------- nothing is lost

def test_a_training_is_not_overwritten_unless_it_may_be(finished, people, tmp_path):
    out, before = finished[0], tree(finished[0])
    with pytest.raises(OutputError, match=rf"output: {out} holds a training; --resume goes on with it, --overwrite begins anew"):
        train(people, out, settings())
    assert tree(out) == before
    (tmp_path / "net").mkdir()  # a net without what it could be gone on with from, which is large
    (tmp_path / "net" / "net.safetensors").write_bytes((out / "net.safetensors").read_bytes())
    for resume in (False, True):
        with pytest.raises(OutputError, match=r"net holds a training; --overwrite begins anew"):
            train(people, tmp_path / "net", settings(), resume=resume)
    assert tree(tmp_path / "net") == {"net.safetensors": before["net.safetensors"]}


@pytest.mark.parametrize(("given", "where"), [
    ({}, "nothing"), ({"weights": "nothing"}, None), ({"labels": 1.0}, None), ({"pairs": "within"}, None), ({"held_out": 0.9}, None),
    ({"pairs": "atlas=nothing.nii"}, None)], ids=["scans", "weights", "labels", "within", "held-out", "atlas"])
def test_overwriting_with_a_mistake_loses_nothing(given, where, people, tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    for name in FILES[:7]:
        (out / name).write_text(f"the old {name}")
    with pytest.raises((FormatError, OptionError, CheckpointError)):
        train(people if where is None else tmp_path / where, out, settings(**given), overwrite=True)
    assert all((out / name).read_text() == f"the old {name}" for name in FILES[:7])


def test_overwriting_leaves_nothing_of_the_old_run(people, tmp_path):
    """Also where the new one is broken off: an old card would tell of another net."""
    out = tmp_path / "run"
    (out / "tensorboard").mkdir(parents=True)
    for name in (*FILES[:7], "training.json", "tensorboard/events"):
        (out / name).write_text("old")
    (out / "notes.txt").write_text("mine")
    with pytest.raises(KeyboardInterrupt):
        train(people, out, settings(), overwrite=True, tell=stopping(1))
    assert sorted(path.name for path in out.iterdir()) == ["frames.npy", "notes.txt", "scans", "tensorboard"]
    assert not (out / "tensorboard" / "events").exists() and b"old" not in (out / "frames.npy").read_bytes()[:3]


def test_a_net_may_be_trained_further_in_its_place(finished, people, tmp_path):
    out = tmp_path / "run"
    train(people, out, settings(steps=1))
    first = weights(out)
    train(people, out, settings(steps=1, weights=str(out), rate=1e-12), overwrite=True)
    for key, value in weights(out).items():
        torch.testing.assert_close(value, first[key], atol=1e-8, rtol=0)


@pytest.mark.parametrize("there", [False, True], ids=["new", "there before"])
def test_a_mistake_leaves_no_folder_behind(there, people, tmp_path):
    out = tmp_path / "run"
    if there:
        out.mkdir()
    for scans, given in ((tmp_path / "nothing", {}), (people, {"weights": "nothing"}), (people, {"held_out": 0.9})):
        with pytest.raises((FormatError, OptionError, CheckpointError)):
            train(scans, out, settings(**given))
        assert list(tmp_path.iterdir()) == ([out] if there else []) and not (there and list(out.iterdir()))


def test_an_output_that_is_no_folder(people, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OutputError, match=r"output: .*file is a file, not a folder; choose another place"):
        train(people, tmp_path / "file", settings())
    with pytest.raises(OutputError, match=r"output: .*file/run cannot be made: .*; choose another place"):
        train(people, tmp_path / "file" / "run", settings())
    assert tree(tmp_path) == {"file": b"mine"}


# ---------------------------------------------------------------------------------------------------------------- who learns

def test_some_are_kept_for_validation(people, tmp_path, begun):
    _, pairs, _, looked = begun(people, tmp_path / "run", settings(held_out=0.4))
    assert len(looked) == 2 and sorted(names(pairs.scans) + names(looked)) == [f"p{k}.nii.gz" for k in range(5)]


def test_a_table_says_who_and_whose(people, tmp_path, begun):
    (tmp_path / "scans.csv").write_text("scan,person,split\n" + "".join(
        f"{people / name}.nii.gz,{person},{side}\n" for name, person, side in
        (("p0", "A", ""), ("p1", "A", ""), ("p2", "B", "validation"), ("p3", "C", "train"), ("p4", "C", ""))))
    _, pairs, _, looked = begun(tmp_path / "scans.csv", tmp_path / "run", settings(held_out=0.0, pairs="within"))
    assert names(looked) == ["p2.nii.gz"] and names(pairs.scans) == [f"p{k}.nii.gz" for k in (0, 1, 3, 4)] and pairs.rule == "within"


def test_nobody_need_be_kept_and_the_card_says_so(people, tmp_path):
    train(people, tmp_path / "run", settings(steps=1, held_out=0.0))
    card = (tmp_path / "run" / "model-card.md").read_text()
    assert "Measured on the scans it learnt from" in card and "5 scans of 5 people, 0 scans kept" in card


def test_two_are_needed_to_learn_from(tmp_path, begun):
    two = write_people(tmp_path / "two", 2, 2)
    _, pairs, _, looked = begun(two, tmp_path / "run", settings())
    assert len(pairs.scans) == 2 and names(looked) == names(pairs.scans)  # too few to keep one
    with pytest.raises(OptionError, match="held-out: leaves 1 scans to learn from; two or more are needed, so give a smaller share"):
        train(two, tmp_path / "other", settings(held_out=0.5))


def test_bad_scans_stop_it_or_are_left_out_and_told(tmp_path, begun):
    scans, notes = write_people(tmp_path / "scans", 2, 4), []
    (scans / "p1.nii.gz").write_text("no image")
    with pytest.raises(FormatError, match=r"p1.nii.gz.*--skip-bad"):
        train(scans, tmp_path / "run", settings())
    _, pairs, _, looked = begun(scans, tmp_path / "run", settings(skip_bad=True), note=notes.append)
    assert sorted(names(pairs.scans) + names(looked)) == ["p0.nii.gz", "p2.nii.gz", "p3.nii.gz"]
    assert len(notes) == 1 and "p1.nii.gz" in notes[0]


# --------------------------------------------------------------------------------------------------------------- the atlas

@pytest.mark.parametrize("seed", range(4))
def test_the_atlas_comes_first_and_is_never_kept(seed, people, tmp_path, begun):
    """Nor is it counted among those of whom some are kept."""
    given = settings(pairs=f"atlas={people / 'p3.nii.gz'}", held_out=0.5, seed=seed)
    net, pairs, _, looked = begun(people, tmp_path / "run", given)
    assert names(pairs.scans)[0] == "p3.nii.gz" and pairs.rule == "atlas" and "p3.nii.gz" not in names(looked)
    assert len(looked) == 2 and len(pairs.scans) == 3
    assert torch.equal(net.home, pairs.reference)


def test_other_scans_of_the_atlas_person_are_not_kept_either(people, tmp_path, begun):
    (tmp_path / "scans.csv").write_text("scan,person\n" + "".join(f"{people / f'p{k}.nii.gz'},{'AABCD'[k]}\n" for k in range(5)))
    for seed in range(4):
        given = settings(pairs=f"atlas={people / 'p0.nii.gz'}", held_out=0.4, seed=seed)
        _, pairs, _, looked = begun(tmp_path / "scans.csv", tmp_path / "run", given)
        assert {"p0.nii.gz", "p1.nii.gz"} <= set(names(pairs.scans)) and len(looked) == 1


def test_the_atlas_may_lie_elsewhere_with_its_label_map(people, tmp_path, begun):
    write_scan(tmp_path / "elsewhere" / "atlas.nii.gz", 2)
    _, pairs, _, looked = begun(people, tmp_path / "run", settings(pairs=f"atlas={tmp_path / 'elsewhere' / 'atlas.nii.gz'}"))
    assert names(pairs.scans)[0] == "atlas.nii.gz" and len(pairs.scans) + len(looked) == 6
    scans = write_people(tmp_path / "scans", 2, 3, labels=True)
    write_labels(tmp_path / "elsewhere" / "atlas_seg.nii.gz", 2)
    _, pairs, *_ = begun(scans, tmp_path / "labelled", settings(pairs=f"atlas={tmp_path / 'elsewhere' / 'atlas.nii.gz'}", labels=1.0))
    assert names(pairs.scans)[0] == "atlas.nii.gz" and sorted(pairs.labels) == [1, 2]


def test_an_atlas_that_cannot_be_read_is_not_replaced_by_another_scan(tmp_path):
    scans = write_people(tmp_path / "scans", 2, 4)
    (scans / "p1.nii.gz").write_text("no image")
    with pytest.raises(FormatError, match=r"pairs: .*p1.nii.gz cannot be read; give atlas= and another scan that is always fixed"):
        train(scans, tmp_path / "run", settings(pairs=f"atlas={scans / 'p1.nii.gz'}", skip_bad=True))
    with pytest.raises(OptionError, match=r"pairs: .*p9.nii.gz does not exist; give atlas= and the scan that is always fixed"):
        train(scans, tmp_path / "run", settings(pairs=f"atlas={scans / 'p9.nii.gz'}", skip_bad=True))
    assert not (tmp_path / "run").exists()


# --------------------------------------------------------------------------------------------------------------- the labels

def test_labels_are_learnt_from_where_all_scans_have_them(tmp_path):
    scans, rows = write_people(tmp_path / "scans", 2, 4, labels=True), []
    train(scans, tmp_path / "run", settings(labels=0.5, held_out=0.5), tell=rows.append)
    for row in rows:  # what is made small, and what is measured of other scans: not one for the other
        assert 0 < row["labels"] <= 1 and 0 <= row["dice"] <= 1 and row["labels"] != pytest.approx(1 - row["dice"])
    assert "Dice" in (tmp_path / "run" / "model-card.md").read_text()


def test_labels_without_weight_are_measured_alone(tmp_path, begun):
    _, pairs, *_ = begun(write_people(tmp_path / "scans", 2, 4, labels=True), tmp_path / "run", settings())
    assert pairs.labels == []


@pytest.mark.parametrize("spoil", [
    lambda folder: [path.unlink() for path in folder.glob("*_seg.nii.gz")], lambda folder: (folder / "p2_seg.nii.gz").unlink(),
    lambda folder: nib.Nifti1Image(np.full((32, 30), 9, np.uint8), affine(2)).to_filename(folder / "p2_seg.nii.gz"),
], ids=["none", "one without", "none in common"])
def test_labels_that_are_not_there_cannot_have_a_weight(spoil, tmp_path):
    scans = write_people(tmp_path / "scans", 2, 4, labels=True)
    spoil(scans)
    with pytest.raises(OptionError, match="labels: has a weight, but not all scans have label maps with a label in common; give"):
        train(scans, tmp_path / "run", settings(labels=1.0))
    assert not (tmp_path / "run" / CHECKPOINT).exists()


# --------------------------------------------------------------------------------------------------------- beginning from a net

@pytest.mark.parametrize("what", ["folder", "file"])
def test_a_training_may_begin_from_a_net(what, finished, people, tmp_path, begun):
    given = finished[0] if what == "folder" else finished[0] / "net.safetensors"
    net, pairs, *_ = begun(people, tmp_path / "run", settings(weights=str(given), seed=5))
    assert same(net.state_dict(), weights(finished[0])) and net.training and all(p.requires_grad for p in net.parameters())
    assert torch.equal(pairs.reference, net.home)  # it is taught the places it knows


def test_points_serve_whatever_is_fitted_to_them(finished, people, tmp_path, begun):
    net, *_ = begun(people, tmp_path / "run", settings(weights=str(finished[0]), model="rigid"))
    assert net.settings["model"] == "rigid" and same(net.state_dict(), weights(finished[0]))


def test_nets_that_do_not_fit_are_refused(finished, people, tmp_path):
    def refused(message, error=OptionError, **given):
        with pytest.raises(error, match=message):
            train(people, tmp_path / "run", settings(**given))
        assert not (tmp_path / "run").exists()

    refused(r"weights: .* is a keypoints net for 2D scans; asked for is a regression net, and the scans are 2D", net="regression",
            weights=str(finished[0]))
    save(KeypointNet(Detector(3, 3, width=8)), tmp_path / "three.safetensors", edge=16, mm=1.0)
    refused("is a keypoints net for 3D scans; asked for is a keypoints net, and the scans are 2D",
            weights=str(tmp_path / "three.safetensors"))
    save(RegressionNet(24, 2, "rigid", width=8, hidden=8), tmp_path / "rigid.safetensors", edge=24, mm=1.0)
    for given in ({"edge": 16, "model": "rigid"}, {"edge": 24, "model": "affine"}):
        refused("weights: .* says rigid maps of canvases of 24 voxels; give --model rigid --edge 24", net="regression",
                weights=str(tmp_path / "rigid.safetensors"), **given)
    refused("net: 'nothing' is not there; give a net that regkit wrote", CheckpointError, weights="nothing")
    refused("cannot be read as weights", CheckpointError, weights=str(people / "p0.nii.gz"))


# ---------------------------------------------------------------------------------------------------- precision and processes

def test_half_precision_is_not_taken_where_its_gradients_are_wrong(people, tmp_path, begun, monkeypatch):
    """torch 2.13, on a CPU: 3D convolutions of bf16 with two voxels an axis, as in the middle of canvases of 16."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    volumes = write_people(tmp_path / "volumes", 3, 3)

    def planned(scans, **given):
        return begun(scans, tmp_path / "run", settings(**given))[2].precision

    assert planned(volumes, precision="auto") == "32" == planned(volumes, precision="auto", device="auto")
    with pytest.raises(OptionError, match=r"precision: bf16 is not right on a CPU for 3D canvases of 16 voxels; give --edge 24, or"):
        train(volumes, tmp_path / "run", settings(precision="bf16"))
    assert planned(volumes, precision="bf16", edge=24) == "bf16" and planned(volumes, precision="auto", edge=24) == "auto"
    assert planned(people, precision="bf16") == "bf16"  # 2D
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert planned(volumes, precision="auto", device="auto") == "auto" and planned(volumes, precision="auto", device="cpu") == "32"


def test_of_several_processes_one_compares_and_writes(finished, people, tmp_path, monkeypatch):
    """The others have the same net, and no log to write: the first one is still at its last look."""
    monkeypatch.setenv("RANK", "1")
    found = train(people, tmp_path / "run", settings(steps=5))
    assert same(found.net.state_dict(), weights(finished[0])) and "validation" not in found.info
    assert not {"net.safetensors", "log.csv", "model-card.md"} & {path.name for path in (tmp_path / "run").iterdir()}
