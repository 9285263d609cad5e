"""The command line before any work starts: help, version, and one clear line for each mistake."""

import subprocess
import sys
from pathlib import Path

import pytest

import regkit
from regkit.cli import main, run
from regkit.errors import RegkitError

ROOT = Path(__file__).resolve().parents[2]
FLAGS = ["--output", "-o", "--model", "--similarity", "--start", "--fixed-mask", "--moving-mask", "--labels", "--fixed-points",
         "--moving-points", "--points-space", "--interpolation", "--fill", "--levels", "--volume", "--seed", "--threads",
         "--device", "--max-memory", "--no-retry", "--expected-error", "--overwrite", "--quiet", "--json"]
APPLY_FLAGS = ["--transform", "-t", "--inverse", "--like", "--output", "-o", "--interpolation", "--fill", "--points-space",
               "--volume", "--overwrite", "--quiet"]
REPLAY_FLAGS = ["--output", "-o", "--changed", "--overwrite", "--quiet", "--json"]
DOCTOR_FLAGS = ["--mask", "--fixed", "--fix", "--units", "--straighten", "--volume", "--overwrite", "--quiet", "--json"]
REPORT_FLAGS = ["--output", "-o", "--overwrite", "--quiet"]


@pytest.fixture(autouse=True)
def wide(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")  # help text without line breaks inside words


@pytest.mark.parametrize("argv", [["--help"], ["--version"], ["register", "--help"], ["apply", "--help"], ["report", "--help"],
                                  ["demo", "--help"], ["doctor", "--help"], ["replay", "--help"],
                                  ["register", "a.nii", "b.nii", "-o", "out", "--modle", "rigid"]])
def test_help_and_mistakes_load_no_torch(argv):
    heavy = ("torch", "numpy", "scipy", "nibabel", "SimpleITK", "PIL", "monai", "matplotlib")
    code = f"import sys; from regkit.cli import run; run({argv!r}); print([m for m in {heavy!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_version(capsys):
    assert run(["--version"]) == 0
    assert capsys.readouterr().out.strip() == regkit.__version__


def test_module_and_script_are_the_same_door():
    done = subprocess.run([sys.executable, "-m", "regkit", "--version"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == regkit.__version__


def test_help_names_the_verbs(capsys):
    assert run(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(verb in text for verb in ("register", "apply", "report", "replay", "doctor", "demo"))
    assert run([]) == 0
    assert capsys.readouterr().out == text


@pytest.mark.parametrize(("verb", "flags"), [("register", FLAGS), ("apply", APPLY_FLAGS), ("report", REPORT_FLAGS),
                                             ("replay", REPLAY_FLAGS), ("doctor", DOCTOR_FLAGS), ("demo", ["--output", "-o"])])
def test_help_has_every_flag(verb, flags, capsys):
    assert run([verb, "--help"]) == 0
    words = capsys.readouterr().out.replace("│", " ").split()
    assert not [flag for flag in flags if flag not in words]
    assert not [word for word in words if word.startswith("--no-") and word not in flags]  # no switch has a second, negated name


def test_every_setting_is_explained(capsys):
    """The help of a setting is its docstring in Settings, its default the dataclass's."""
    run(["register", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "What may move: translation, attention, rigid, similarity, affine, projective or tps." in text
    assert "[default: affine]" in text


PAIR = ["register", "a.nii", "b.nii", "-o", "out"]
MISTAKES = [
    (["regsiter", "a", "b"], "did you mean \"register\""),
    (["register"], "FIXED is missing"),
    (["register", "a.nii", "-o", "out"], "MOVING is missing"),
    (["register", "a.nii", "b.nii"], "--output is missing"),
    ([*PAIR[:3], "c.nii", "-o", "out"], "unexpected argument: c.nii"),
    ([*PAIR, "--modle", "rigid"], "did you mean --model?"),
    ([*PAIR, "--no-quiet"], "unknown option: --no-quiet"),
    ([*PAIR, "--model"], "--model requires an argument"),
    ([*PAIR, "--model", "afine"], "use one of translation, attention, rigid, similarity, affine, projective, tps (nearest: affine)"),
    ([*PAIR, "--similarity", "nc"], "nearest: ncc"),
    ([*PAIR, "--start", "header.txtt"], "nearest: header"),
    ([*PAIR, "--interpolation", "cubik"], "nearest: cubic"),
    ([*PAIR, "--device", "gpu"], "use one of auto, cpu, cuda"),
    ([*PAIR, "--points-space", "las"], "points-space: 'las' is not known"),
    ([*PAIR, "--levels", "10,x"], "levels: '10,x'; expected millimetres"),
    ([*PAIR, "--levels", "10,0"], "every level must be a positive number"),
    ([*PAIR, "--fill", "black"], "fill: 'black' is neither a number nor auto"),
    ([*PAIR, "--volume", "first"], "'first' is not a whole number"),
    ([*PAIR, "--volume", "-1"], "volume: -1; expected 0 or more"),
    ([*PAIR, "--seed", "1.5"], "'1.5' is not a whole number"),
    ([*PAIR, "--threads", "0"], "threads: 0; expected 1 or more"),
    (["apply", "a.nii", "-o", "b.nii"], "--transform is missing"),
    (["apply", "a.nii", "-t", "t.tfm"], "--output is missing"),
    (["apply", "a.nii", "-t", "t.tfm", "-o", "b.nii"], "like: missing"),
    (["apply", "a.nii", "-t", "t.tfm", "-o", "b.csv", "--like", "f.nii"], "does not fit a.nii, which is an image"),
    (["report"], "DIR is missing"),
    (["replay"], "DIR is missing"),
    (["replay", "a", "-o", "b"], "registration.json"),
    (["report", "a", "-o", "b.html"], "registration.json"),
    (["apply", "a.csv", "-t", "t.tfm", "-o", "b.nii"], "does not fit a.csv, which is points"),
    (["apply", "a.csv", "-t", "t.tfm", "-o", "b.csv", "--points-space", "index"], "--points-on"),
    (["apply", "a.nii", "-t", "t.tfm", "-o", "b.nii", "--like", "f.nii", "--interpolation", "votes"], "nearest: vote"),
]


@pytest.mark.parametrize(("argv", "words"), MISTAKES, ids=lambda v: " ".join(v) if isinstance(v, list) else "")
def test_a_mistake_gives_one_line_and_exit_code_2(argv, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("regkit: error: ")
    assert len(err.splitlines()) == 1
    assert words.lower() in err.lower()
    assert not list(tmp_path.iterdir())


def test_negative_fill_is_a_value_not_a_flag(monkeypatch, capsys):
    def look(job, console):
        raise RegkitError(job.settings.fill)

    monkeypatch.setattr("regkit.cli.register.Job.run", look)
    assert run([*PAIR, "--fill", "-1000"]) == 2
    assert capsys.readouterr().err == "regkit: error: -1000\n"


def test_a_fault_of_ours_keeps_its_traceback(monkeypatch, capsys):
    def broken(job, console):
        raise ZeroDivisionError("by nothing")

    monkeypatch.setattr("regkit.cli.register.Job.run", broken)
    assert run(PAIR) == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("regkit: error: unexpected ZeroDivisionError: by nothing")
    assert lines[1].startswith("Traceback")


def test_interrupt(monkeypatch, capsys):
    def stopped(job, console):
        raise KeyboardInterrupt

    monkeypatch.setattr("regkit.cli.register.Job.run", stopped)
    assert run(PAIR) == 130
    assert capsys.readouterr().err.splitlines() == ["regkit: interrupted; nothing was written"]


def test_main_exits(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0


def test_demo_keeps_what_lies_in_its_folder(tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    assert run(["demo", "-o", str(tmp_path), "--overwrite"]) == 2
    assert "not the demo's (mine)" in capsys.readouterr().err
    (tmp_path / "mine").rename(tmp_path / "known-truth")
    assert run(["demo", "-o", str(tmp_path)]) == 2
    assert "--overwrite" in capsys.readouterr().err
    (tmp_path / "file").touch()
    assert run(["demo", "-o", str(tmp_path / "file")]) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "known-truth"]


def test_demo_without_its_extra_names_the_pip_line(monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert run(["demo"]) == 2
    assert 'pip install "regkit[demo]"' in capsys.readouterr().err


def test_output_names():
    from regkit.cli.register import output_names, stem

    assert [stem(Path(n)) for n in ("a.nii.gz", "a.b.nii", "p.mrk.json", "series")] == ["a", "a.b", "p", "series"]
    paths = [Path("/x/one/seg.nii.gz"), Path("/x/two/SEG.nii"), Path("/x/one/other.nii"), Path("/x/one/seg.nii.gz")]
    names = output_names(paths, "_moved.nii.gz")
    assert names == ["one_seg_moved.nii.gz", "two_SEG_moved.nii.gz", "other_moved.nii.gz", "one_seg_2_moved.nii.gz"]
    assert output_names([Path("seg.nii")], "_moved.nii.gz") == ["seg_moved.nii.gz"]
