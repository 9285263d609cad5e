"""`regkit train` as a user meets it: from a folder of scans to a registration that begins with one's own net."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image as Picture

import regkit
from regkit.cli import run
from regkit.cli.train import configured
from regkit.errors import FormatError, OptionError
from regkit.registration.nets import load
from regkit.training import train as module
from regkit.training.settings import TrainSettings
from tests.training.conftest import write_people, write_scan

pytestmark = pytest.mark.usefixtures("unjudged")

pytest.importorskip("lightning_fabric")

ROOT = Path(__file__).resolve().parents[2]
QUICK = ["--steps", "2", "--batch", "2", "--edge", "16", "--device", "cpu", "--precision", "32", "--turn", "30", "--rate", "1e-5"]


@pytest.fixture(scope="module", autouse=True)
def quick():
    """Two pairs at the end and four on the way."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_CASES", 2)
        patch.setattr(module, "_STARTS", ("header",))
        patch.setattr(module, "CASES", 4)
        yield


@pytest.fixture(scope="module", params=["2D keypoints", "2D regression", "3D keypoints", "3D regression"])
def trained(request, tmp_path_factory):
    """A folder with scans and run, the net's kind, the number of axes, and what was said."""
    ndim, kind = int(request.param[0]), request.param[3:]
    place = tmp_path_factory.mktemp("trained")
    write_people(place / "scans", ndim, 4)
    done = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("builtins.print", lambda *words, **how: done.append((how.get("file"), " ".join(map(str, words)))))
        code = run(["train", str(place / "scans"), "-o", str(place / "run"), "--net", kind, *QUICK])
    assert code == 0, done
    out, err = ([text for file, text in done if (file is sys.stderr) == wanted] for wanted in (False, True))
    return place, kind, ndim, out, err


@pytest.fixture(scope="module")
def slices(tmp_path_factory):
    return write_people(tmp_path_factory.mktemp("slices"), 2, 4)


def refused(argv, words, capsys):
    """One line, exit code 2."""
    assert run(["train", *map(str, argv)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("regkit: error: ") and len(err.splitlines()) == 1, err
    assert words in err, err


# ------------------------------------------------------------------------------------------------------------- end to end

def test_a_folder_of_scans_becomes_a_net_with_its_record(trained):
    place, kind, ndim, _, _ = trained
    out = place / "run"
    assert sorted(path.name for path in out.iterdir()) == [
        "checkpoint.safetensors", "curves.png", "evolution.gif", "frames.npy", "log.csv", "model-card.md", "net.safetensors", "scans",
        "tensorboard", "training.json"]
    net = load(out)
    assert (net.net.kind, net.ndim, net.edge) == (kind, ndim, 16)
    with (out / "log.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["1", "2"] and {"loss", "known", "similar", "tre_mm", "turn", "captured"} <= set(rows[0])
    assert all(np.isfinite(float(value)) for row in rows for value in row.values())
    record = json.loads((out / "training.json").read_text())
    assert (record["net"], record["ndim"], record["steps"], record["training"], record["held_out"]) == (kind, ndim, 2, 3, 1)
    assert set(record["validation"]) == {"net", "header", "auto, refined"}
    for name, row in record["validation"].items():
        assert f"| {name} | {row['tre_mm']:.3g} |" in (out / "model-card.md").read_text()
    with Picture.open(out / "curves.png") as picture:
        assert picture.format == "PNG"
    with Picture.open(out / "evolution.gif") as film:
        assert film.size[0] == (1 if ndim == 2 else 3) * film.size[1] and 1 <= film.n_frames <= 2  # two that are equal become one


def test_what_is_done_is_told(trained):
    place, _, _, out, err = trained
    assert [line.split("step ")[1][0] for line in err] == ["1", "2"] and all("loss" in line and "tre_mm" in line for line in err)
    assert out[0].split() == ["on", "validation", "pairs", "TRE,", "mm", "rotation", "below", "20°"]
    assert [line[:20].strip() for line in out[1:4]] == ["net", "header", "auto, refined"]
    assert out[-1] == f"use it       regkit register FIXED MOVING -o OUT --start net:{place / 'run'}"


@pytest.mark.parametrize("levels", ["0", "auto"])
def test_a_registration_begins_with_the_net(levels, trained):
    """Bare, and refined. The net has hardly learnt: a regression then says little, and refinement does the rest; points that are found
    anywhere may say anything, which is written all the same."""
    place, kind, ndim, _, _ = trained
    fixed, moving = (str(place / "scans" / f"p{k}.nii.gz") for k in (0, 1))
    out = place / f"out{levels}"
    code = run(["register", fixed, moving, "-o", str(out), "--start", f"net:{place / 'run'}", "--levels", levels, "--quiet", "--no-retry"])
    record = json.loads((out / "registration.json").read_text())
    assert code == 0 or (kind == "keypoints" and code == 3), record["findings"]
    assert record["settings"]["start"] == f"net:{place / 'run'}"
    assert bool(record["levels_mm"]) == (levels == "auto")
    origins = {one["origin"] for one in record["candidates"]}
    assert f"net {place / 'run'}" in origins or levels == "0"
    matrix = regkit.read_transform(out / "transform.tfm", ndim=ndim).matrix
    assert bool(matrix.isfinite().all())
    if kind == "regression":
        assert abs(np.linalg.det(matrix[0, :ndim, :ndim]) - 1) < 0.5
    if kind == "regression" and levels == "auto":
        assert record["similarity"]["after"] > record["similarity"]["before"]


# ------------------------------------------------------------------------------------------------------------------ doors

def test_help_loads_no_torch():
    heavy = ("torch", "numpy", "nibabel", "monai", "matplotlib", "lightning_fabric", "tensorboard", "yaml")
    for argv in (["train", "--help"], ["train"], ["train", "a", "-o", "b", "--net", "keypoint"]):
        code = f"import sys; from regkit.cli import run; run({argv!r}); print([m for m in {heavy!r} if m in sys.modules])"
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
        assert done.stdout.splitlines()[-1] == "[]"


def test_help_explains_every_setting(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert run(["train", "--help"]) == 0
    words = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for field in fields(TrainSettings):
        assert f"--{field.name.replace('_', '-')} " in words
    for flag in ("--output -o", "--config", "--resume", "--overwrite", "--quiet"):
        assert flag in words
    assert "What the net's map may be: rigid, similarity or affine. [default: affine]" in words and "--no-" not in words
    assert "[default: 4000]" in words and "--said" not in words


def test_nothing_is_said_if_nothing_shall_be(slices, tmp_path, capfd):
    assert run(["train", str(slices), "-o", str(tmp_path / "run"), *QUICK, "--quiet"]) == 0
    assert capfd.readouterr() == ("", "")


MISTAKES = [
    (["-o", "run"], "scans: missing; give a folder of scans or a table, or --config FILE"),
    (["scans"], "output: missing; give -o FOLDER"),
    (["nothing", "-o", "run"], "scans: nothing cannot be read"),
    (["empty", "-o", "run"], "scans: empty holds 0 scans; a training needs two or more"),
    (["mixed", "-o", "run"], "scans: some are 2D and some 3D"),
    (["bad", "-o", "run"], "or leave such scans out: --skip-bad"),
    (["bad", "-o", "run", "--skip-bad"], "scans: 1 of 2 can be read"),
    (["scans", "-o", "run", "--net", "keypoint"], "nearest: keypoints"),
    (["scans", "-o", "run", "--steps", "1.5"], "'1.5' is not a whole number"),
    (["scans", "-o", "run", "--edge", "20"], "edge: 20; expected a multiple of 8"),
    (["scans", "-o", "run", "--held-out", "0.9"], "held-out: leaves 0 scans"),
    (["scans", "-o", "run", "--labels", "1"], "labels: has a weight, but not all scans have label maps"),
    (["scans", "-o", "run", "--pairs", "within"], "pairs: within one person, but no person has two scans"),
    (["scans", "-o", "run", "--pairs", "atlas=nothing.nii"], "nothing.nii does not exist"),
    (["scans", "-o", "run", "--weights", "nothing"], "net: 'nothing' is not there"),
    (["scans", "-o", "run", "--resume", "--overwrite"], "resume, overwrite: go on with a training, or begin it anew"),
    (["scans", "-o", "file"], "output: file is a file, not a folder"),
    (["scans", "-o", "run", "--config", "nothing.yaml"], "config: nothing.yaml cannot be read"),
    (["scans", "more", "-o", "run"], "unexpected argument: more"),
    (["scans", "-o", "run", "--step", "3"], "--step"),
]


@pytest.mark.parametrize(("argv", "words"), MISTAKES, ids=[" ".join(argv) for argv, _ in MISTAKES])
def test_a_mistake_gives_one_line_and_exit_code_2(argv, words, slices, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "scans").symlink_to(slices)
    for name in ("empty", "bad"):
        (tmp_path / name).mkdir()
    write_scan(tmp_path / "mixed" / "a.nii.gz", 2)
    write_scan(tmp_path / "mixed" / "b.nii.gz", 3)
    write_scan(tmp_path / "bad" / "a.nii.gz", 2)
    (tmp_path / "bad" / "b.nii.gz").write_text("no image")
    (tmp_path / "file").write_text("mine")
    assert run(["train", *argv]) == 2
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert lines[-1].startswith("regkit: error: ") and len(lines) == 1 and "Traceback" not in err
    assert words.lower() in lines[-1].lower() and (out == "" or "--skip-bad" in argv)
    assert not (tmp_path / "run" / "net.safetensors").exists() and (tmp_path / "file").read_text() == "mine"


def test_an_existing_run_is_kept(slices, tmp_path, capsys):
    out = tmp_path / "run"
    argv = [str(slices), "-o", str(out), *QUICK, "--quiet"]
    assert run(["train", *argv]) == 0
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    refused(argv, "holds a training; --resume goes on with it, --overwrite begins anew", capsys)
    refused([*argv, "--resume", "--seed", "3"], "was begun with other settings (seed)", capsys)
    refused(["nothing", *argv[1:], "--overwrite"], "scans: nothing cannot be read", capsys)
    refused([*argv, "--net", "regression", "--weights", str(out), "--overwrite"], "asked for is a regression net", capsys)
    assert all(path.read_bytes() == content for path, content in before.items())
    assert run(["train", *argv, "--weights", str(out), "--overwrite"]) == 0
    assert (out / "net.safetensors").read_bytes() != before[out / "net.safetensors"]


def test_an_interrupt_says_how_to_go_on(slices, tmp_path, capsys, monkeypatch):
    argv = ["train", str(slices), "-o", str(tmp_path / "run"), *QUICK]

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, "_compared", stop)
        assert run(argv) == 130
    said = capsys.readouterr().err.splitlines()
    assert said[-1] == f"regkit: interrupted; --resume goes on from the last checkpoint in {tmp_path / 'run'}"
    assert run([*argv, "--resume"]) == 0
    assert capsys.readouterr().err == "" and (tmp_path / "run" / "model-card.md").exists()  # no step was left to tell of


# --------------------------------------------------------------------------------------------------------- what a file says

def spoken(monkeypatch, argv):
    """What `train()` would be called with."""
    seen = []

    def take(scans, output, settings, **more):
        seen.append((scans, output, settings, more))
        raise OptionError("enough")

    monkeypatch.setattr(module, "train", take)
    assert run(["train", *map(str, argv)]) == 2 and len(seen) == 1
    return seen[0]


@pytest.fixture(params=["yaml", "json"])
def config(request, tmp_path):
    """Writes a file in its own folder."""
    def write(**said):
        (tmp_path / "there").mkdir(exist_ok=True)
        path = tmp_path / "there" / f"train.{request.param}"
        path.write_text(json.dumps(said) if request.param == "json" else yaml.safe_dump(said))
        return path

    return write


def test_without_a_file_the_command_line_is_all(monkeypatch):
    scans, output, settings, more = spoken(monkeypatch, ["scans", "-o", "run", "--turn", "60", "--skip-bad", "--resume"])
    assert (scans, output) == (Path("scans"), Path("run")) and settings == TrainSettings(turn=60.0, skip_bad=True)
    assert type(settings) is TrainSettings and more["resume"] and not more["overwrite"]
    assert spoken(monkeypatch, ["scans", "-o", "run"])[2] == TrainSettings()


def test_a_file_may_say_all_of_it(monkeypatch, config):
    path = config(**{"scans": "scans", "output": "run", "net": "regression", "held-out": 0.5, "skip_bad": True, "rate": 0.01, "canvas": 90,
                     "turn": 45, "steps": 7})
    scans, output, settings, _ = spoken(monkeypatch, ["--config", path])
    assert (scans, output) == (path.parent / "scans", path.parent / "run")  # relative to the file
    assert settings == TrainSettings(net="regression", held_out=0.5, skip_bad=True, rate=0.01, canvas=90.0, turn=45.0, steps=7)
    assert isinstance(settings.turn, float) and isinstance(settings.canvas, float)


def test_the_command_line_counts_also_where_it_says_the_default(monkeypatch, config):
    path = config(scans="scans", output="run", steps=7, batch=2, net="regression", seed=5)
    scans, output, settings, _ = spoken(monkeypatch, ["other", "--config", path, "--steps", "4000", "--net", "keypoints", "--seed", "9"])
    assert (scans, output) == (Path("other"), path.parent / "run")
    assert settings == TrainSettings(batch=2, seed=9) and settings.steps == 4000
    assert spoken(monkeypatch, ["--config", path, "-o", "there"])[1] == Path("there")


def test_paths_are_relative_to_the_file(monkeypatch, config, tmp_path):
    path = config(scans=str(tmp_path / "far"), output="~/run", pairs="atlas=scans/a.nii.gz", weights="old")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    scans, output, settings, _ = spoken(monkeypatch, ["--config", path])
    assert (scans, output) == (tmp_path / "far", tmp_path / "home" / "run")
    assert settings.pairs == f"atlas={path.parent / 'scans' / 'a.nii.gz'}"
    assert settings.weights == "old"  # the name of a shipped net
    (path.parent / "old").mkdir()
    assert spoken(monkeypatch, ["--config", path])[2].weights == str(path.parent / "old")
    given = spoken(monkeypatch, ["--config", path, "--weights", "new", "--pairs", "atlas=b.nii"])[2]
    assert (given.weights, given.pairs) == ("new", "atlas=b.nii")


def test_yaml_has_words_for_numbers_and_numbers_for_words(monkeypatch, tmp_path):
    (tmp_path / "train.yaml").write_text("scans: a\noutput: b\nrate: 1e-3  # to YAML a word\nprecision: 32\nweights: ~\ncanvas: null\n"
                                         "skip_bad: no\nregular: 0\n")
    assert spoken(monkeypatch, ["--config", tmp_path / "train.yaml"])[2] == TrainSettings(rate=1e-3, precision="32", regular=0.0)


@pytest.mark.parametrize(("said", "error", "message"), [
    ({"stepz": 3}, OptionError, r"config: 'stepz' is not known; use one of .*\(nearest: steps\)"),
    ({"resume": True}, OptionError, "config: 'resume' is not known"), ({3: 4}, OptionError, "config: '3' is not known"),
    ({"steps": 2.5}, OptionError, "config: steps is 2.5; expected a whole number"),
    ({"steps": "many"}, OptionError, "config: steps is 'many'; expected a whole number"),
    ({"steps": True}, OptionError, "config: steps is True; expected a whole number"),
    ({"held-out": "some"}, OptionError, "config: held-out is 'some'; expected a number"),
    ({"rate": True}, OptionError, "config: rate is True; expected a number"),
    ({"rate": None}, OptionError, "config: rate is None; expected a number"),
    ({"skip-bad": "no"}, OptionError, "config: skip-bad is 'no'; expected true or false"),
    ({"net": ["keypoints"]}, OptionError, r"config: net is \['keypoints'\]; expected a word"),
    ({"scans": ["a", "b"]}, OptionError, r"config: scans is \['a', 'b'\]; expected a word"),
    ({"net": "keypoint"}, OptionError, "net: 'keypoint' is not known"), ({"steps": 0}, OptionError, "steps: 0; expected 1 or more"),
    ({"pairs": "atlas="}, OptionError, "pairs: atlas= names no file"),
], ids=str)
def test_what_a_file_says_wrongly_is_named(said, error, message, config):
    with pytest.raises(error, match=message) as caught:
        configured(config(**said) if all(isinstance(key, str) for key in said) else _written(config, said), None, None, {})
    assert "\n" not in str(caught.value)


def _written(config, said):
    path = config()
    path.write_text(yaml.safe_dump(said) if path.suffix == ".yaml" else json.dumps(said))
    return path


@pytest.mark.parametrize(("name", "text", "message"), [
    ("a.yaml", "steps: [1\n", "config: .*a.yaml is no YAML"), ("a.json", "{steps: 1}", "config: .*a.json cannot be read"),
    ("a.yaml", "- steps\n", "config: .*a.yaml holds no options; expected lines such as steps: 4000"), ("a.yaml", "", "holds no options"),
    ("a.json", "[1]", "holds no options"), ("b", "steps", "holds no options")])
def test_files_that_hold_no_options_are_named(name, text, message, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(FormatError, match=message):
        configured(tmp_path / name, None, None, {})
    (tmp_path / name).write_bytes(b"\xff\xfe\x00steps")
    with pytest.raises(FormatError, match=r"config: .* (cannot be read|is no YAML)"):
        configured(tmp_path / name, None, None, {})


def test_yaml_that_cannot_be_read_for_want_of_its_package(tmp_path, monkeypatch):
    (tmp_path / "a.yaml").write_text("steps: 3\n")
    monkeypatch.setitem(sys.modules, "yaml", None)
    with pytest.raises(OptionError, match=r"config: reading YAML needs PyYAML; pip install 'regkit\[train\]', or write JSON"):
        configured(tmp_path / "a.yaml", None, None, {})


def test_a_training_from_a_file(slices, tmp_path):
    """All the way, and the same as by options."""
    (tmp_path / "scans").symlink_to(slices)
    options = {"steps": 2, "batch": 2, "edge": 16, "device": "cpu", "precision": "32", "turn": 30, "rate": 1e-5, "net": "regression"}
    (tmp_path / "train.yaml").write_text(yaml.safe_dump({"scans": "scans", "output": "by_file", **options}))
    assert run(["train", "--config", str(tmp_path / "train.yaml"), "--quiet"]) == 0
    assert run(["train", str(slices), "-o", str(tmp_path / "by_options"), *QUICK, "--net", "regression", "--quiet"]) == 0
    logs = [(tmp_path / name / "log.csv").read_text() for name in ("by_file", "by_options")]
    assert logs[0] == logs[1]
