"""`regkit report`: the page of a registration made again, and one clear line where an input has gone."""

import json
import shutil
import sys
import types
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

import regkit
from regkit.cli import run


@pytest.fixture(scope="module")
def registered(tmp_path_factory) -> Path:
    """A folder with two scans, what was carried along, and the result in `out`; paths in the record are relative."""
    folder = tmp_path_factory.mktemp("registered")
    scan = gaussian_filter(np.random.default_rng(0).random((24, 26, 22)), 2).astype(np.float32) * 1000
    for name, shift in (("fixed", 0), ("moving", 4.0)):
        affine = np.diag([2.0, 2, 2, 1])
        affine[0, 3] = shift
        nib.Nifti1Image(scan, affine).to_filename(folder / f"{name}.nii.gz")
        nib.Nifti1Image((scan > 500).astype(np.uint8), affine).to_filename(folder / f"{name}_seg.nii.gz")
        (folder / f"{name}.csv").write_text("x,y,z\n" + "".join(f"{20 + k + shift},{24 - k},{20 + k}\n" for k in range(4)))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert run(["register", "fixed.nii.gz", "moving.nii.gz", "-o", "out", "--model", "translation", "--start", "header",
                    "--levels", "4", "--labels", "moving_seg.nii.gz", "--fixed-points", "fixed.csv", "--moving-points", "moving.csv"]) == 0
    return folder


@pytest.fixture
def place(registered, tmp_path, monkeypatch) -> Path:
    """A copy of it, which is where the command runs."""
    shutil.copytree(registered, tmp_path / "there")
    monkeypatch.chdir(tmp_path / "there")
    return tmp_path / "there"


def test_register_writes_the_page_and_says_where(registered, tmp_path, monkeypatch, capsys):
    text = (registered / "out" / "report.html").read_text()
    assert "Landmark error, mean of 4" in text and "outline in moving" in text and "http" not in text.replace("http-equiv", "")
    monkeypatch.chdir(registered)
    assert run(["register", "fixed.nii.gz", "moving.nii.gz", "-o", str(tmp_path / "o"), "--start", "header", "--levels", "0"]) in (0, 3)
    assert f"report      {tmp_path / 'o' / 'report.html'}" in capsys.readouterr().out.splitlines()
    assert "Landmark error" not in (tmp_path / "o" / "report.html").read_text()
    assert "carried" not in json.loads((tmp_path / "o" / "registration.json").read_text())


def test_points_of_other_names_are_no_pairs(tmp_path):
    from regkit.cli.report import Shown

    for name, words in (("a", "pq"), ("b", "pq"), ("c", "qp")):
        (tmp_path / f"{name}.csv").write_text("x,y,z,name\n" + "".join(f"{k},0,0,{word}\n" for k, word in enumerate(words)))
    a, b, c = (regkit.read_points(tmp_path / f"{name}.csv") for name in "abc")
    both = Shown.of([], [a], [b])
    assert both.fixed_points is not None and len(both.fixed_points) == 2
    assert Shown.of([], [a], [c]).fixed_points is None
    assert Shown.of([], [a], []).fixed_points is None


@pytest.mark.parametrize("name", ["out", "out/registration.json"])
def test_the_page_is_made_again_as_it_was(place, name, capsys):
    earlier = (place / "out" / "report.html").read_text()
    assert run(["report", name, "-o", "again.html"]) == 0
    assert capsys.readouterr().out == "written to  again.html\n"
    again = (place / "again.html").read_text()
    assert again.split("<style>")[2].split("</main>")[0] == earlier.split("<style>")[2].split("</main>")[0]


def test_the_page_in_the_folder_is_replaced_only_when_told(place, capsys):
    assert run(["report", "out"]) == 2
    assert "--overwrite" in capsys.readouterr().err
    (place / "out" / "report.html").write_text("old")
    assert run(["report", "out", "--overwrite", "--quiet"]) == 0
    assert capsys.readouterr().out == ""
    assert (place / "out" / "report.html").read_text().startswith("<!DOCTYPE html>")


def test_inputs_are_found_beside_the_record_too(place, tmp_path, monkeypatch):
    for name in ("fixed.nii.gz", "moving.nii.gz", "moving_seg.nii.gz", "fixed.csv", "moving.csv"):
        shutil.move(place / name, place / "out" / name)
    monkeypatch.chdir(tmp_path)
    assert run(["report", "there/out", "-o", "x.html", "--quiet"]) == 0


@pytest.mark.parametrize("name", ["moving.nii.gz", "fixed.csv", "moving_seg.nii.gz"])
def test_an_input_that_has_gone_is_named_with_the_cure(place, name, capsys):
    (place / name).unlink()
    assert run(["report", "out", "-o", "x.html"]) == 2
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1 and name in said and str(place / "out" / name) in said and "register again" in said
    assert not (place / "x.html").exists()


def test_an_input_that_has_changed_is_told(place, capsys):
    shutil.copy(place / "fixed.nii.gz", place / "moving.nii.gz")
    assert run(["report", "out", "-o", "x.html", "--quiet"]) == 0
    assert "moving.nii.gz has changed since the registration" in capsys.readouterr().err


@pytest.mark.parametrize(("text", "words"), [(None, "does not exist"), ("{", "cannot be read as JSON"), ("[]", "is not the record"),
                                             ('{"matrix": [[1]], "inputs": {"fixed": {}, "moving": {}}}', "names no file")])
def test_a_record_that_is_none_is_refused(text, words, tmp_path, capsys):
    if text is not None:
        (tmp_path / "registration.json").write_text(text)
    assert run(["report", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert words in said and len(said.splitlines()) == 1


def test_a_matrix_that_is_none_is_refused(place, capsys):
    record = json.loads((place / "out" / "registration.json").read_text())
    (place / "out" / "registration.json").write_text(json.dumps({**record, "matrix": [[0, 0], [0, 0]]}))
    assert run(["report", "out", "-o", "x.html"]) == 2
    assert "matrix" in capsys.readouterr().err


def test_an_evaluation_makes_its_own_page(tmp_path, monkeypatch):
    """A folder with evaluation.json goes to regkit.evaluation, which is loaded only then."""
    seen = []
    evaluation = types.SimpleNamespace(report=lambda path: seen.append(path) or Path(path).write_text("page"))
    monkeypatch.setitem(sys.modules, "regkit.evaluation", types.SimpleNamespace(load=lambda folder: seen.append(folder) or evaluation))
    (tmp_path / "evaluation.json").write_text("{}")
    assert run(["report", str(tmp_path), "--quiet"]) == 0
    assert seen[0] == tmp_path and (tmp_path / "report.html").read_text() == "page"


def test_a_notebook_shows_the_result(registered):
    result = regkit.align(registered / "fixed.nii.gz", registered / "moving.nii.gz", start="header", levels="0")
    text = result._repr_html_()
    assert "moving.nii.gz" in text and text.count("<img") == 6 and "<script" not in text


HOSTILE = [
    ("settings", ["volume"], "is not the record"), ("settings", {"volume": "first"}, "says volume 'first'"),
    ("carried", [1], "is not the record"),
    ("carried", {"fixed_points": "points.csv"}, "is not the record"), ("inputs", {"fixed": [], "moving": {}}, "is not the record"),
    ("inputs", {"fixed": {"path": 7}, "moving": {"path": 7}}, "names 7; expected a path"), ("matrix", [[10**400]], "a matrix that is none"),
    ("inputs", {"fixed": {"path": "~nobody-here/a.nii"}, "moving": {"path": "b" * 5000}}, "is not there"),
    ("inputs", {"fixed": {"path": "fixed.nii.gz", "findings": 7}, "moving": {"path": "moving.nii.gz"}}, "says what no page shows"),
    ("seconds", 7, "is not the record"),
]


@pytest.mark.parametrize(("section", "value", "words"), HOSTILE, ids=range(len(HOSTILE)))
def test_a_record_that_somebody_wrote_in_is_refused(place, section, value, words, capsys):
    record = json.loads((place / "out" / "registration.json").read_text())
    (place / "out" / "registration.json").write_text(json.dumps({**record, section: value}))
    assert run(["report", "out", "-o", "x.html"]) == 2
    said = capsys.readouterr().err
    assert words in said and len(said.splitlines()) == 1 and len(said) < 2500
    assert not (place / "x.html").exists()


def test_a_record_that_is_nested_without_end_is_refused(tmp_path, capsys):
    (tmp_path / "registration.json").write_text('{"matrix": ' + "[" * 100_000)
    assert run(["report", str(tmp_path)]) == 2
    assert "cannot be read as JSON" in capsys.readouterr().err
