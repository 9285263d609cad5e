"""The fuzzer in reduced form: `python pipelines/fuzz/run.py` tries thousands, with huge files among them."""

from __future__ import annotations

import sys

import pytest
from hypothesis import HealthCheck, Phase, given, settings

from tests.pipelines.conftest import PIPELINES, scripts

FOLDER = PIPELINES / "fuzz"
NAMES = ("seeds", "changes", "bombs", "fixed", "recipes", "oracles", "images", "tables", "worker", "judge", "run")

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes and memory are watched as Linux does it")

seeds, changes, bombs, fixed, recipes, oracles, images, tables, worker, judge, run = scripts(FOLDER, NAMES)
SLOW = ("bomb nifti", "bomb mgz", "bomb nrrd gzip", "bomb mha packed", "bomb png", "bomb csv", "bomb fcsv", "bomb pairs of rows",
        "bomb pairs of one", "bomb tfm", "bomb json", "bomb weights of")
QUICK = [one for one in fixed.RECIPES if one["door"] in ("read", "doctor")
         and (not one["seed"].startswith(SLOW) or "promise" in one["seed"])]
TAKEN = [{"seed": name, "door": door, "inner": [], "outer": [], "expected": "read"} for name, door in (
    ("nifti int16", "cli apply"), ("nrrd int16", "fix"), ("tfm affine", "cli apply"), ("csv points", "cli apply"), ("record", "cli report"),
    ("nifti float32 gz", "cli register"), ("net keypoints", "cli register"))]


@pytest.fixture(scope="module")
def tried():
    with judge.Judge() as one:
        yield one


def test_bombs_pickles_and_names_that_are_none(tried):
    assert len(QUICK) > 250
    found = [(recipes.told(one), answer) for one in QUICK if (answer := tried(one))["outcome"] not in judge.GOOD]
    assert not found


def test_what_is_whole_is_taken(tried):
    for one in TAKEN:
        assert tried(one)["outcome"] == "read", recipes.told(one)


@settings(max_examples=200, derandomize=True, database=None, deadline=None, phases=[Phase.generate],  # made smaller, each takes seconds
          report_multiple_bugs=False, suppress_health_check=list(HealthCheck))
@given(recipes.recipes())
def test_spoilt_files_end_in_an_error_or_in_the_right_answer(tried, recipe):
    answer = tried(recipe)
    assert answer["outcome"] in judge.GOOD, answer["why"]


def test_cases_are_the_same_by_number_and_can_be_written_down():
    few, many = recipes.numbered(7, len(fixed.RECIPES) + 20), recipes.numbered(7, len(fixed.RECIPES) + 60)
    assert many[: len(few)] == few and len(many) == len(fixed.RECIPES) + 60
    assert recipes.numbered(8, len(few)) != few


def test_a_fault_a_hang_and_a_death_are_seen(tried, monkeypatch, tmp_path):
    """The fuzzer itself: what it must notice."""
    good = {"seed": "nifti int16", "door": "read", "inner": [], "outer": []}
    assert tried({**good, "expected": "refused"})["outcome"] == "wrong"
    assert tried({**good, "inner": [["cut", 100]], "expected": "read"})["outcome"] == "fault"
    assert tried({"seed": "no such"})["outcome"] == "fault"
    tried(good)
    tried._worker.kill()
    tried._worker.wait()
    assert tried(good)["outcome"] == "crash"
    assert tried(good)["outcome"] == "read"
    monkeypatch.setattr(judge, "PATIENCE", 0.0)
    assert tried(good)["outcome"] == "hang"
    rows = [{"n": 0, "recipe": good, "outcome": "hang", "why": ""},
            {"n": 1, "recipe": good, "outcome": "read", "seconds": 2.0, "peak": 3e6}]
    text = run.table(rows)
    assert "| nifti | 2 | 1 | 0 | 0 | 1 |" in text and "slowest: 2.0 s, case 1" in text
    run.keep(rows[0], tmp_path)
    assert sorted(path.name for path in (tmp_path / "failed" / "0").rglob("*") if path.is_file()) == ["case.json", "scan.nii"]
