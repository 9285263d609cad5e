"""What a training leaves to look at: tables that can be read again, pictures that open, a card that says what was measured."""

from __future__ import annotations

import csv
import math
import sys

import numpy as np
import pytest
import torch
from PIL import Image as Picture
from PIL import ImageSequence

from regkit.training import report

ROWS = [{"step": 1, "loss": 2.5, "known": 0.5}, {"step": 2, "loss": 1.5, "known": 0.25, "tre_mm": 7.0, "turn": 12.5, "alike": 0.5},
        {"step": 3, "loss": 1.25, "known": 0.125}]


def test_a_log_holds_every_row_and_what_each_has(tmp_path):
    report.write_log(tmp_path / "log.csv", ROWS)
    with (tmp_path / "log.csv").open(newline="") as file:
        found = list(csv.DictReader(file))
    assert [{key: float(value) for key, value in row.items() if value} for row in found] == ROWS
    assert list(found[0]) == ["step", "loss", "known", "tre_mm", "turn", "alike"]
    report.write_log(tmp_path / "log.csv", ROWS[:1])  # again, as a resumed run does
    assert (tmp_path / "log.csv").read_text().splitlines() == ["step,loss,known", "1,2.5,0.5"]


def test_tensorboard_shows_the_rows_as_they_come(tmp_path):
    """Without waiting: the command line's process ends without asking anybody."""
    loader = pytest.importorskip("tensorboard.backend.event_processing.event_file_loader")
    write = report.board(tmp_path / "board")
    for row in ROWS:
        write(row)
    file, = (tmp_path / "board").iterdir()
    found = [(value.tag, event.step, value.tensor.float_val[0] if value.tensor.float_val else value.simple_value)
             for event in loader.EventFileLoader(str(file)).Load() for value in event.summary.value]
    assert sorted(found) == sorted((key, row["step"], value) for row in ROWS for key, value in row.items() if key != "step")


def test_without_tensorboard_there_is_none(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard.writer", None)
    report.board(tmp_path / "board")(ROWS[0])
    assert not list(tmp_path.iterdir())


def test_curves_have_a_panel_for_each_thing_that_was_measured(tmp_path):
    pytest.importorskip("matplotlib")
    widths = []
    for name, rows in (("loss", ROWS[:1]), ("some", ROWS), ("all", [*ROWS, {"step": 4, "loss": 1.0, "dice": 0.5}])):
        assert report.curves(tmp_path / f"{name}.png", rows)
        with Picture.open(tmp_path / f"{name}.png") as picture:
            assert picture.format == "PNG" and picture.convert("L").getextrema()[0] < 100  # something is drawn
            widths.append(picture.width)
    assert widths[1] == pytest.approx(4 * widths[0], abs=4) and widths[2] == pytest.approx(5 * widths[0], abs=4)


def test_without_matplotlib_there_are_none(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert not report.curves(tmp_path / "curves.png", ROWS) and not list(tmp_path.iterdir())


def test_a_frame_shows_both_scans_in_their_colours():
    fixed, moved = torch.zeros(2, 1, 1, 6, 8)
    fixed[..., 5, 7], moved[..., 5, 7] = 0.5, 0.5  # both
    fixed[..., 5, 0], moved[..., 0, 7] = 2.0, 1.0  # one each; what is too bright is as bright as can be
    found = report.frame(fixed, moved)
    assert found.shape == (8, 6, 3) and found.dtype == np.uint8
    # the first axis goes to the right, the second one up
    assert found[0, 5].tolist() == [127, 127, 127] and found[7, 5].tolist() == [0, 255, 0] and found[0, 0].tolist() == [255, 0, 255]
    assert int(found.astype(int).sum()) == 3 * 127 + 255 + 2 * 255


def test_a_frame_of_volumes_shows_their_middle_planes():
    fixed = torch.zeros(1, 1, 4, 4, 4)
    fixed[0, 0, 2, 1, 3], fixed[0, 0, 1, 2, 0], fixed[0, 0, 0, 3, 2] = 1.0, 0.6, 0.2  # each in one of the planes
    found = report.frame(fixed, fixed)
    assert found.shape == (4, 12, 3)
    planes = [found[:, 4 * k: 4 * k + 4, 0] for k in range(3)]
    assert [int((plane > 0).sum()) for plane in planes] == [1, 1, 1]
    assert planes[0][0, 1] == 255 and planes[1][3, 1] == 153 and planes[2][0, 0] == 51


def test_a_film_shows_all_frames_large_enough_and_rests_on_the_last(tmp_path):
    frames = [np.full((16, 48, 3), 40 * k, np.uint8) for k in range(5)]
    report.film(tmp_path / "film.gif", frames)
    with Picture.open(tmp_path / "film.gif") as picture:
        assert picture.size == (48 * 15, 240) and picture.n_frames == 5 and picture.info["loop"] == 0
        shown = [(np.asarray(one.convert("RGB"))[0, 0].tolist(), one.info["duration"]) for one in ImageSequence.Iterator(picture)]
    assert [level for level, _ in shown] == [[40 * k] * 3 for k in range(5)]
    assert [duration for _, duration in shown] == [250] * 4 + [2000]


def test_a_film_may_be_of_one_large_frame(tmp_path):
    report.film(tmp_path / "film.gif", [np.zeros((300, 300, 3), np.uint8)])
    with Picture.open(tmp_path / "film.gif") as picture:
        assert picture.size == (300, 300)


INFO = {"name": "run", "net": "keypoints", "model": "affine", "parameters": 1234567, "ndim": 3, "edge": 40, "mm": 6.25, "training": 8,
        "people": 7, "held_out": 2, "steps": 500, "batch": 4, "hours": 1.5, "device": "2 CPU threads", "similarity": "lncc", "turn": 60.0,
        "seed": 3, "cases": 24, "scans": ["a.nii.gz", "b.nii.gz"]}
TABLE = {"net": {"tre_mm": 1.2345, "turn": 2.0, "captured": 1.0, "captured_90": 0.5, "dice": 0.75, "seconds": 0.01},
         "header": {"tre_mm": math.nan, "turn": 30.0, "captured": 0.25, "seconds": 0.1}}


def test_a_card_says_what_was_measured():
    found = report.card(INFO, TABLE)
    for words in ("# run\n", "`keypoints` net of 1,234,567 parameters for 3D scans, affine maps", "40 voxels of 6.25 mm",
                  "8 scans of 7 people", "2 scans kept for validation by person", "500 steps of 4 pairs, 1.5 hours",
                  "`lncc`, turns up to 60°, seed 3",
                  "Scans: a.nii.gz, b.nii.gz\n", "24 pairs", "## Measured on the scans kept for validation\n"):
        assert words in found
    table = [line for line in found.splitlines() if line.startswith("|")]
    assert table == ["| | TRE, mm | rotation, degrees | below 20° | turned up to 90° | Dice | seconds a pair |",
                     "|---|---|---|---|---|---|---|", "| net | 1.23 | 2 | 1 | 0.5 | 0.75 | 0.01 |",
                     "| header | nan | 30 | 0.25 |  |  | 0.1 |"]


def test_a_card_names_40_scans_and_says_that_there_are_more():
    names = [f"scan{k:02}.nii" for k in range(60)]
    found = report.card({**INFO, "scans": names}, TABLE)
    assert "scan39.nii …" in found and "scan40.nii" not in found


def test_a_card_does_not_call_scans_unseen_that_were_learnt_from():
    found = report.card({**INFO, "held_out": 0}, TABLE)
    assert "## Measured on the scans it learnt from, for none were kept for validation\n" in found
    assert "Measured on the scans kept" not in found


def test_a_card_does_not_call_one_scan_different_scans():
    assert "half of them one scan twice" in report.card(INFO, TABLE)
    assert "all of them that scan twice" in report.card({**INFO, "held_out": 1}, TABLE)
