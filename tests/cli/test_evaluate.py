"""`regkit evaluate` as a user meets it."""

import json

import numpy as np
import pytest
import torch

import regkit
from regkit import Grid, Image
from regkit.cli import run


@pytest.fixture
def table(tmp_path):
    """A CSV of one 2D pair of disks with labels; the moving one lies 6 mm off."""
    grid = Grid((40, 36), torch.diag(torch.tensor([2.0, 2.0, 1.0], dtype=torch.float64))[None])
    x = grid.points()[0].numpy().reshape(40, 36, 2)
    for name, shift in (("fixed", (0, 0)), ("moving", (6, -4))):
        distance = np.linalg.norm((x - np.array([36, 34]) - shift) / (1.0, 1.3), axis=-1)
        texture = np.sin((x - shift)[..., 0] / 3) * np.cos((x - shift)[..., 1] / 4)
        scan = torch.tensor((distance < 20) * (2 + texture), dtype=torch.float32)[None, None]
        regkit.write_image(Image(scan, grid), tmp_path / f"{name}.nii.gz")
        labels = torch.tensor(((distance < 20) * 1 + (distance < 8) * 1).astype(np.uint8))[None, None]
        regkit.write_image(Image(labels, grid), tmp_path / f"{name}-labels.nii.gz")
    path = tmp_path / "pairs.csv"
    path.write_text("id,fixed,moving,fixed_labels,moving_labels,ndim\n"
                    "disks,fixed.nii.gz,moving.nii.gz,fixed-labels.nii.gz,moving-labels.nii.gz,\n")
    return path


def test_align_writes_tables_and_page_and_goes_on(table, tmp_path, capsys):
    out = tmp_path / "out"
    assert run(["evaluate", str(table), "--align", "-o", str(out)]) == 0
    said = capsys.readouterr()
    assert "regkit       dice" in said.out and "report       " in said.out and "1/1  disks" in said.err
    assert sorted(p.name for p in out.iterdir()) == ["cases", "cases.csv", "evaluation.json", "labels.csv", "points.csv", "regkit",
                                                     "report.html", "summary.json", "summary.md", "views"]
    row = json.loads((out / "cases" / "disks.json").read_text())["rows"][0]
    assert row["dice"] > 0.9 > row["dice_before"]
    began = (out / "cases" / "disks.json").stat().st_mtime_ns
    assert run(["evaluate", str(table), "--align", "-o", str(out), "--quiet"]) == 0
    assert (out / "cases" / "disks.json").stat().st_mtime_ns == began
    assert run(["evaluate", str(table), "--align", "-o", str(out), "--quiet", "--overwrite"]) == 0
    assert (out / "cases" / "disks.json").stat().st_mtime_ns > began
    assert run(["report", str(out), "-o", str(tmp_path / "again.html")]) == 0
    assert "disks" in (tmp_path / "again.html").read_text()


def test_another_tool_beside_and_the_exit_code_of_a_failure(table, tmp_path, capsys):
    (tmp_path / "ants").mkdir()
    assert run(["evaluate", str(table), "--align", "--method", f"ants={tmp_path / 'ants'}", "--baseline", "regkit",
                "-o", str(tmp_path / "out"), "--no-html", "--no-distances"]) == 3
    said = capsys.readouterr()
    assert "disks (ants) failed: no result" in said.err and not (tmp_path / "out" / "report.html").exists()
    assert "| ants | Dice | 1 |" in (tmp_path / "out" / "summary.md").read_text()


def test_an_interrupt_leaves_what_is_done(table, tmp_path, capsys, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("regkit.evaluation.work.measure", stop)
    assert run(["evaluate", str(table), "--align", "-o", str(tmp_path / "out")]) == 130
    assert "the same command goes on from there" in capsys.readouterr().err
    monkeypatch.undo()
    assert run(["evaluate", str(table), "--align", "-o", str(tmp_path / "out")]) == 0


def test_scans_as_they_lie(table, tmp_path, capsys):
    assert run(["evaluate", str(table), "-o", str(tmp_path / "out"), "--no-html"]) == 0
    assert "header       dice" in capsys.readouterr().out
    row = json.loads((tmp_path / "out" / "cases" / "disks.json").read_text())["rows"][0]
    assert row["dice"] == row["dice_before"]


@pytest.mark.parametrize(("options", "message"), [
    (["--method", "ants"], "method: 'ants'; expected NAME=DIR"),
    (["--method", "a=.", "--method", "a=."], "a is given twice"),
    (["--method", "a=no/such"], "is no folder"),
    (["--align", "--baseline", "ants"], "baseline: 'ants' is none of the methods regkit"),
    (["--align", "--jobs", "0"], "jobs: 0; expected 1 or more"),
    (["--align", "--model", "afine"], "nearest: affine"),
])
def test_wrong_options_are_refused_and_nothing_is_written(table, tmp_path, capsys, options, message):
    assert run(["evaluate", str(table), "-o", str(tmp_path / "out"), *options]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
