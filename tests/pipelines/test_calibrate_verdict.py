"""The verdict's calibration: cases can be made again, truths are what they say, models keep their signs, bounds are bounds."""

import json

import numpy as np
import pytest
import torch

import regkit
from regkit.registration.verdict import CLUES
from tests.pipelines.conftest import PIPELINES, scripts
from tests.registration.conftest import heads  # noqa: F401

FOLDER = PIPELINES / "calibrate_verdict"
NAMES = ("cases", "run", "fit")

cases, calibrate, fit = scripts(FOLDER, NAMES)


@pytest.fixture(scope="module")
def pairs(heads, tmp_path_factory) -> list[dict]:  # noqa: F811
    """A slice onto itself, with its halves as labels, under two anatomies' names; and with points."""
    folder = tmp_path_factory.mktemp("pairs")
    head = heads[2]
    regkit.write_image(head, folder / "head.nii.gz")
    label = (head.data > head.data.mean()).to(torch.int16)
    label[:, :, head.data.shape[2] // 2:] *= 2
    regkit.write_image(head.with_data(label), folder / "label.nii.gz")
    (folder / "points.csv").write_text("x,y,z\n" + "".join(f"{x},{y},0\n" for x in (-30, 0, 25) for y in (-40, 10)), encoding="utf-8")
    one = {"fixed": "head.nii.gz", "moving": "head.nii.gz", "ndim": 2}
    named = {f"{side}_{what}": file for side in ("fixed", "moving") for what, file in (("labels", "label.nii.gz"),)}
    table = [{"id": "brain", "group": "brain-2d", **one, **named}, {"id": "hand", "group": "hand-2d", **one, **named},
             {"id": "points", "group": "hand-2d", **one, "fixed_points": "points.csv", "moving_points": "points.csv"}]
    (folder / "pairs.json").write_text(json.dumps(table), encoding="utf-8")
    return calibrate.read([folder / "pairs.json"])


def test_a_case_can_be_made_again(pairs):
    for number in range(3, 40):
        a, b = (cases.case(number, pairs, 5, {}) for _ in range(2))
        assert (a.kind, a.id, a.start, a.model, a.variant) == (b.kind, b.id, b.start, b.model, b.variant)
        assert torch.equal(a.moving.data, b.moving.data) and torch.equal(a.moving.grid.affine, b.moving.grid.affine)
    assert {cases.case(number, pairs, 5, {}).kind for number in range(60)} == {"plain", "related", "wrong", "hopeless"}


def test_scans_of_one_body_are_never_called_strange(pairs):
    kin = [{"id": str(k), "group": name} for k, name in enumerate(("brain-t1", "head-x", "hippocampus", "spinal-x", "lung", "mouse"))]
    found = {(a["group"], b["group"]) for a, b in cases.strange(kin)}
    assert ("brain-t1", "mouse") in found and ("brain-t1", "lung") in found
    assert not found & {("brain-t1", "head-x"), ("hippocampus", "brain-t1"), ("spinal-x", "lung"), ("lung", "spinal-x")}


def test_truths_are_perfect_at_the_truth_and_bad_beside_it(pairs):
    eye = torch.eye(3, dtype=torch.float64)[None]
    off = eye.clone()
    off[0, 0, 2] = 40.0
    assert cases.overlap(pairs[0], eye) == 1 and cases.overlap(pairs[0], off) < 0.6
    assert cases.error(pairs[2], eye) == 0 and cases.error(pairs[2], off) == pytest.approx(40)
    assert cases.centres(pairs[0], off) == pytest.approx(40) and cases.labelled(pairs[0]) == 2
    assert cases.least(pairs[2]) == pytest.approx(2.0)  # no less than a voxel


def test_how_scans_were_laid_is_undone(pairs, monkeypatch):
    """A case begun from the truth and not refined has the truth's scores, however both scans were turned and scaled."""
    eye = torch.eye(3, dtype=torch.float64)[None]
    monkeypatch.setattr(cases, "STARTS", ("given",))
    monkeypatch.setattr(cases, "VARIANTS", ("as it is",))
    monkeypatch.setattr(cases, "MODELS", ("affine",))
    monkeypatch.setattr(cases, "pose", lambda image, most, reach, scale, rng: cases.about(
        torch.tensor([[0.0, -1.1], [1.1, 0.0]], dtype=torch.float64), image, torch.ones(2)) if reach == 0.1 and scale == 0.1 else eye)
    calibrate._STATE.update(pairs=pairs, seed=1, device="cpu", way="", best={pair["id"]: eye for pair in pairs})
    rows = [calibrate.guarded(number) for number in range(3, 12)]
    assert not any("failed" in row for row in rows)
    related = [row for row in rows if row["kind"] == "related"]
    assert related and all((row["dice"] or 1) > 0.95 and (row["tre"] or 0) < 1e-3 for row in related)


def test_moved_maps_are_of_the_anatomy_and_given(pairs):
    eye = torch.eye(3, dtype=torch.float64)[None]
    made = [cases.case(number, pairs, 5, {pair["id"]: eye for pair in pairs}, moved=True) for number in range(len(pairs), 30)]
    assert {(case.kind, case.start) for case in made} == {("related", "given")} and all(case.given is not None for case in made)


def test_what_the_verdict_is_held_to(pairs):
    count = len(pairs)
    kinds = [cases.accepted(number, pairs, 0) for number in (0, count, 4 * count, 4 * count + 8)]
    assert [case.start for case in kinds] == ["auto"] * 4 and kinds[0].kind == "plain"
    assert kinds[1].kind == "turned" and kinds[1].turn == pytest.approx(np.pi / 4)
    assert {case.kind for case in kinds[2:]} <= {"wrong", "hopeless"}


def rows(count: int, seed: int = 0) -> list[dict]:
    """Cases of three groups whose evidence tells them apart but for some noise."""
    rng = np.random.default_rng(seed)
    made = []
    for k in range(count):
        good = rng.random() < 0.6
        evidence = {name: float(rng.normal(0.6 if good else 0.1, 0.15)) for name in
                    ("mind", "ngf", "cr", "lncc", "null_mind", "null_cr", "blocks_matched", "blocks_near", "blocks_alike", "mirror")}
        evidence |= {name: float(np.exp(rng.normal(-4 if good else -2, 0.5))) for name in ("return", "ways", "stay_mind", "stay_ngf")}
        evidence |= {"null_mind_z": 10.0 if good else 2.0, "mind_share": 0.9, "ngf_share": 0.9, "blocks_median": 1.0 if good else 2.5}
        made.append({"case": k, "kind": "related", "group": f"g{k % 3}", "id": f"p{k % 6}", "edge": 200.0, "mm": [10.0, 5.0], "dice":
                     float(good), "tre": None, "centres": 3.0, "evidence": evidence, "guard": {"scale": 1.0, "shear": 1.05}})
    return made


def test_models_judge_what_they_have_not_seen():
    made = fit.judged(rows(240), {}, {})
    x = np.array([list(fit.clues(row["evidence"]).values()) for row in made])
    good = np.array([0.0 if row["bad"] else 1.0 for row in made])
    signs = np.array([clue.sign for clue in CLUES.values()])
    error = np.where(good > 0, np.log(3 / 200), np.nan)
    chance, guess, width = fit.left_out(made, x, good, error, signs, fit.masses(made))
    assert chance[good > 0].min() > 0.5 > chance[good == 0].max()
    assert np.allclose(np.exp(guess[good > 0]) * 200, 3, rtol=0.05) and (width >= 0).all()
    model = fit.model(x, good, error, signs, np.ones(len(x)))
    assert all(term["weight"] * CLUES[name].sign >= 0 for name, term in model["success"]["terms"].items())
    odds = fit.said(model, "success", x)
    assert np.corrcoef(odds, good)[0, 1] > 0.9


def test_moved_maps_do_not_outweigh_the_others():
    made = [{"kind": kind, "start": start} for kind, start, n in (("related", "begun", 5), ("related", "given", 40), ("wrong", "bare", 3))
            for _ in range(n)]
    mass = fit.masses(made)
    assert mass[:5].sum() == pytest.approx(mass[5:45].sum()) == 5 and mass[45:].tolist() == [1, 1, 1]
    assert fit.masses(made[:8]).tolist() == [1] * 8  # fewer than the others
    x, good = np.array([[1.0], [1.0], [-1.0]]), np.array([1.0, 0.0, 0.0])
    heavy, light = (fit.logistic(x, good, np.array([1]), np.array([1.0, w, 1.0])) for w in (10.0, 0.1))
    assert heavy[0][0] + heavy[1] < 0 < light[0][0] + light[1]


def test_upper_bounds_of_shares():
    assert fit.bound(0, 59) == pytest.approx(0.0495, abs=1e-3)  # the rule of three
    assert fit.bound(5, 5) == 1 and fit.bound(1, 100) > 0.01


def test_the_table_counts_every_case(tmp_path):
    made = fit.judged(rows(60), {}, {})
    good = np.array([0.0 if row["bad"] else 1.0 for row in made])
    chance = np.where(good > 0, 0.95, 0.1)
    status = np.where(good > 0, "PASS", "FAIL")
    log = np.full(60, np.log(0.01))
    text = fit.report(made, chance, status, good, log, log, np.ones(60), np.ones(60))
    right = int(good.sum())
    assert f"| all | {right} | {right} | 0 | 0 | {60 - right} | 0 | 0 | {60 - right} |" in text
    fit.diagram(chance, good, np.ones(60), tmp_path / "d.png")
    assert (tmp_path / "d.png").stat().st_size > 1000
