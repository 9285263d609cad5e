"""What a user can get wrong with files: one clear line, exit code 2, nothing written and nothing destroyed."""

import gzip
import struct
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from regkit.cli import run


def _scan(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(100, 20, shape).astype(np.float32)


def _save(path: Path, voxels: np.ndarray, offset: float = 0.0) -> Path:
    affine = np.diag([2.0, 2.0, 2.0, 1.0])
    affine[:3, 3] = offset
    nib.Nifti1Image(voxels, affine).to_filename(path)
    return path


def _singular(path: Path) -> Path:
    _save(path, _scan((8, 9, 10)))
    raw = bytearray(path.read_bytes())
    struct.pack_into("<h", raw, 252, 0)  # qform_code
    struct.pack_into("<h", raw, 254, 1)  # sform_code
    struct.pack_into("<12f", raw, 280, *([1, 0, 0, 0] * 2 + [0, 0, 1, 0]))  # two rows alike
    path.write_bytes(raw)
    return path


@pytest.fixture
def place(tmp_path):
    """Good scans and one file for each way to be bad."""
    folder = tmp_path / "in"
    folder.mkdir()
    _save(folder / "fixed.nii", _scan((8, 9, 10)))
    _save(folder / "moving.nii", _scan((8, 9, 10), 1))
    _save(folder / "flat.nii", np.zeros((8, 9), np.float32) + _scan((8, 9)))
    _save(folder / "constant.nii", np.full((8, 9, 10), 7, np.float32))
    _save(folder / "nan.nii", np.full((8, 9, 10), np.nan, np.float32))
    _save(folder / "series.nii", _scan((8, 9, 10, 3)))
    _save(folder / "faraway_mask.nii", np.ones((8, 9, 10), np.uint8), offset=5000.0)
    _save(folder / "empty_mask.nii", np.zeros((8, 9, 10), np.uint8))
    _singular(folder / "singular.nii")
    (folder / "text.nii").write_text("this is no image")
    (folder / "notes.txt").write_text("this is no image either")
    (folder / "void.nii").write_bytes(b"")
    whole = gzip.compress((folder / "fixed.nii").read_bytes())
    (folder / "truncated.nii.gz").write_bytes(whole[: len(whole) // 2])
    (folder / "words.csv").write_text("x,y,z\n1,2,three\n")
    (folder / "bad.tfm").write_text("#Insight Transform File V1.0\nnonsense\n")
    return folder


BAD = [
    (["fixed.nii", "absent.nii"], "moving:", "does not exist"),
    (["text.nii", "moving.nii"], "fixed:", ""),
    (["fixed.nii", "notes.txt"], "moving:", ""),
    (["void.nii", "moving.nii"], "fixed:", ""),
    (["fixed.nii", "truncated.nii.gz"], "moving:", "truncated"),
    (["fixed.nii", "flat.nii"], "moving:", "2D"),
    (["constant.nii", "moving.nii"], "fixed:", "every voxel"),
    (["fixed.nii", "nan.nii"], "moving:", "nan"),
    (["singular.nii", "moving.nii"], "fixed:", "singular"),
    (["fixed.nii", "series.nii"], "moving:", "volume"),
    (["fixed.nii", "series.nii", "--volume", "3"], "volume:", "moving"),
    (["fixed.nii", "moving.nii", "--fixed-mask", "faraway_mask.nii"], "fixed_mask:", "overlap"),
    (["fixed.nii", "moving.nii", "--moving-mask", "empty_mask.nii"], "moving_mask:", "no voxel"),
    (["fixed.nii", "moving.nii", "--fixed-mask", "absent.nii"], "fixed", "does not exist"),
    (["fixed.nii", "moving.nii", "--labels", "absent.nii"], "labels:", "does not exist"),
    (["fixed.nii", "moving.nii", "--labels", "flat.nii"], "labels:", "2D"),
    (["fixed.nii", "moving.nii", "--fixed-points", "words.csv"], "fixed-points:", "not a number"),
    (["fixed.nii", "moving.nii", "--moving-points", "absent.csv"], "moving-points:", "does not exist"),
    (["fixed.nii", "moving.nii", "--start", "absent.tfm"], "", "does not exist"),
    (["fixed.nii", "moving.nii", "--start", "bad.tfm"], "", "bad.tfm"),
]


def _refused(argv: list[str], capsys) -> str:
    assert run(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    lines = [line for line in err.splitlines() if line.startswith("regkit")]
    assert len(lines) == 1 and "Traceback" not in err
    return lines[0].removeprefix("regkit: error: ")


@pytest.mark.parametrize(("words", "argument", "reason"), BAD, ids=[" ".join(words) for words, *_ in BAD])
def test_register_refuses(place, words, argument, reason, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(place)
    line = _refused(["register", *words, "-o", str(tmp_path / "out"), "--quiet"], capsys)
    assert line.startswith(argument)
    assert reason.lower() in line.lower()
    assert [p.name for p in tmp_path.iterdir()] == ["in"]


def test_no_overlap_is_refused(place, tmp_path, capsys, monkeypatch):
    """Scans that share no space where a start keeps them so."""
    monkeypatch.chdir(place)
    _save(place / "faraway.nii", _scan((8, 9, 10), 2), offset=5000.0)
    words = ["fixed.nii", "faraway.nii", "--start", "header"]
    line = _refused(["register", *words, "-o", str(tmp_path / "out"), "--quiet"], capsys)
    assert "overlap" in line.lower()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("taken", ["file", "foreign folder"])
def test_output_in_use(place, taken, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(place)
    out = tmp_path / "out"
    if taken == "file":
        out.write_text("mine")
    else:
        out.mkdir()
        (out / "mine.txt").write_text("mine")
    for extra in ([], ["--overwrite"]):
        line = _refused(["register", "fixed.nii", "moving.nii", "-o", str(out), "--quiet", *extra], capsys)
        assert line.startswith("output:")
    assert (out if taken == "file" else out / "mine.txt").read_text() == "mine"


APPLY = [
    (["absent.nii", "--like", "fixed.nii", "-o", "o.nii"], "input:", "does not exist"),
    (["moving.nii", "--like", "absent.nii", "-o", "o.nii"], "like:", "does not exist"),
    (["moving.nii", "--like", "flat.nii", "-o", "o.nii"], "", "2D"),
    (["moving.nii", "--like", "fixed.nii", "-o", "o.xyz"], "output:", "suffix"),
    (["words.csv", "-o", "o.csv"], "input:", "not a number"),
]


@pytest.mark.parametrize(("words", "argument", "reason"), APPLY, ids=[" ".join(words) for words, *_ in APPLY])
def test_apply_refuses(place, words, argument, reason, capsys, monkeypatch):
    import regkit

    monkeypatch.chdir(place)
    regkit.write_transform(regkit.Matrix.identity(3), place / "t.tfm")
    before = sorted(p.name for p in place.iterdir())
    line = _refused(["apply", *words, "-t", "t.tfm"], capsys)
    assert line.startswith(argument)
    assert reason.lower() in line.lower()
    assert sorted(p.name for p in place.iterdir()) == before
