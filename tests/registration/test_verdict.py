"""The verdict: right maps pass, wrong ones do not, whoever found them; and what it is made of."""

import json
import math

import pytest
import torch

import regkit
from regkit import Image, Matrix
from regkit.registration import ladder, verdict
from regkit.registration.settings import Settings
from regkit.registration.verdict import CLUES, FAIL, PASS, WARN, Verdict, clues, judge, plain
from tests.registration.conftest import carried, known_map


@pytest.fixture(scope="module")
def evidence(heads) -> dict[int, dict[str, float]]:
    return {d: regkit.align(heads[d], carried(heads[d], known_map(heads[d].grid, "rigid")), levels=None).trace["evidence"] for d in (2, 3)}


def away(heads, ndim, tmp_path, degrees: float, shift: float) -> regkit.Registration:
    """A map that is given and not refined."""
    fixed = heads[ndim]
    d, angle = ndim, math.radians(degrees)
    linear = torch.eye(d, dtype=torch.float64)
    linear[:2, :2] = torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    matrix = torch.eye(d + 1, dtype=torch.float64)
    matrix[:d, :d], matrix[:d, d] = linear, fixed.grid.centre[0] - linear @ fixed.grid.centre[0] + shift
    path = regkit.write_transform(Matrix(matrix), tmp_path / f"{degrees}.tfm", overwrite=True)
    return regkit.align(fixed, fixed, start=str(path), levels=0)


def test_a_right_map_passes_and_wrong_ones_fail_however_they_were_found(ndim, heads, tmp_path):
    right = away(heads, ndim, tmp_path, 0, 0).verdict
    assert right.status == PASS and right.probability > 0.9
    for degrees, shift in ((25, 0), (180, 0), (0, 35)):  # nothing is refined, so nothing but the verdict can tell
        wrong = away(heads, ndim, tmp_path, degrees, shift).verdict
        assert wrong.status != PASS and wrong.probability < right.probability - 0.2 and wrong.reasons


def test_the_further_off_the_less_probable(ndim, heads, tmp_path):
    said = [away(heads, ndim, tmp_path, degrees, 0).verdict.probability for degrees in (0, 6, 12, 25)]
    assert said == sorted(said, reverse=True)


def test_what_is_inferred_does_not_depend_on_threads_or_time(ndim, heads):
    moving = carried(heads[ndim], known_map(heads[ndim].grid, "rigid"))
    one, other = (regkit.align(heads[ndim], moving, threads=n) for n in (1, 2))
    assert one.trace["evidence"] == other.trace["evidence"] and one.verdict == other.verdict


def test_a_mirrored_scan_is_told(heads):
    fixed = heads[3]
    # a head is nearly symmetric: make it less so, as a heart or a liver is
    data = fixed.data.clone()
    data[:, :, : data.shape[2] // 3] *= torch.linspace(0.2, 1.0, data.shape[3])[:, None]
    fixed = fixed.with_data(data)
    said = regkit.align(fixed, fixed.with_data(data.flip(2))).verdict
    assert said.status != PASS


@pytest.mark.parametrize("name", CLUES)
def test_every_clue_speaks_the_way_its_sign_says(name, evidence):
    """A model may not contradict what the evidence means, and each clue can say so in words."""
    model = json.loads(verdict.MODEL.read_text(encoding="utf-8"))
    for part, turn in (("success", 1), ("error", -1)):
        weight = model[part]["terms"].get(name, {"weight": 0.0})["weight"]
        assert weight * CLUES[name].sign * turn >= 0
    assert math.isfinite(clues(evidence[3])[name]) and CLUES[name].says(evidence[3])


def test_the_status_follows_probability_findings_and_hopelessness(evidence):
    good = evidence[3]
    assert judge(good, [], False).status == PASS
    assert judge(good, ["the map folds"], False).status == WARN and judge(good, ["the map folds"], False).reasons[0] == "the map folds"
    hopeless = judge(good, ["nothing was aligned"], True)
    assert hopeless.status == FAIL and hopeless.probability < 0.3
    mirrored = judge({**good, "mirror": 0.3}, [], False)
    assert mirrored.status == WARN and "mirrored left to right" in mirrored.reasons[0]


def test_evidence_beyond_what_was_ever_seen_is_held(evidence):
    wild = {name: 1e9 if "mm" not in name else value for name, value in evidence[3].items()}
    for sign in (1, -1):
        turned = {name: value if "mm" in name or name in ("scale", "shear") else sign * value for name, value in wild.items()}
        said = judge(turned, [], False)
        assert 0 <= said.probability <= 1 and (said.status == FAIL or math.isfinite(said.expected_tre_mm))


def test_the_expected_error_is_in_millimetres(evidence):
    one, ten = (judge({**evidence[3], "half_edge_mm": mm}, [], False) for mm in (10.0, 100.0))
    assert ten.expected_tre_mm == pytest.approx(10 * one.expected_tre_mm, rel=0.01)
    assert one.likely_tre_mm and one.likely_tre_mm[0] < one.expected_tre_mm < one.likely_tre_mm[1]
    failed = judge(evidence[3], [], True)
    assert failed.expected_tre_mm is None and failed.likely_tre_mm is None  # an error is of a right map
    assert Verdict.of(failed.as_dict()) == failed and "error" not in str(failed)


def test_a_verdict_comes_back_from_its_record(ndim, heads):
    result = regkit.align(heads[ndim], heads[ndim])
    assert Verdict.of(json.loads(json.dumps(result.record()))["verdict"]) == result.verdict
    assert result.inverse().verdict == result.verdict and result.verdict.status in str(result.verdict)


@pytest.fixture
def noise(ndim, heads) -> Image:
    data = torch.randn(heads[ndim].data.shape, generator=torch.Generator().manual_seed(1))
    return heads[ndim].with_data(data)


def test_a_bad_start_is_made_good_and_said(ndim, heads, monkeypatch):
    """Upside down, and begun where the header puts it: the refinement cannot, another start can."""
    fixed = heads[ndim]
    moving = carried(fixed, known_map(fixed.grid, "rigid", degrees=150))
    stuck = regkit.align(fixed, moving, start="header", no_retry=True)
    assert stuck.verdict.status != PASS and not stuck.trace["attempts"]
    real = ladder.attempt

    def attempt(ground, settings, tell, wide=False):
        one = real(ground, settings, tell, wide)
        if settings.start == "header":  # whether it is a WARN or a FAIL is a matter of taste, and of the calibration
            one = ladder.replace(one, verdict=ladder.replace(one.verdict, status=FAIL, probability=0.1))
        return one

    monkeypatch.setattr(ladder, "attempt", attempt)
    freed = regkit.align(fixed, moving, start="header")
    assert freed.verdict.status == PASS
    assert [one["what"] for one in freed.trace["attempts"]] == ["as asked", "start auto"]
    assert "the first result failed" in " ".join(freed.trace["notes"])
    assert freed.settings.start == "header"  # what was asked


def test_of_attempts_that_all_fail_the_best_is_kept(monkeypatch, heads):
    """Every attempt fails; the second is the least improbable."""
    made = iter([0.1, 0.2, 0.05, 0.01])
    real = ladder.attempt

    def attempt(ground, settings, tell, wide=False):
        one = real(ground, Settings.of(**{**settings.as_dict(), "start": "centre"}), tell)
        said = Verdict(FAIL, next(made), 1.0, (0.5, 2.0), ())
        return ladder.Attempt(settings, one.outcome, one.transform, one.levels, one.nets, one.guard, one.evidence, said)

    monkeypatch.setattr(ladder, "attempt", attempt)
    result = regkit.align(heads[2], heads[2], start="mass", similarity="ncc")
    assert result.verdict.probability == 0.2 and len(result.trace["attempts"]) == 4
    assert result.trace["attempts"][-1]["what"] == "a wider search"


def test_what_was_not_to_be_refined_is_not_tried_again(ndim, heads, noise):
    result = regkit.align(heads[ndim], noise, start="mass", levels=0)
    assert result.verdict.status == FAIL and not result.trace["attempts"]
    assert not torch.isfinite(result.expected_error().data).any()


def test_the_expected_error_as_a_map(ndim, heads):
    fixed = heads[ndim]
    moving = carried(fixed, known_map(fixed.grid, "affine"))
    result = regkit.align(fixed, moving)
    error = result.expected_error()
    assert error.grid.same_as(fixed.grid) and error.data.dtype == torch.float32
    seen = error.data[torch.isfinite(error.data)]
    assert seen.numel() > 0.7 * error.data.numel() and float(seen.min()) > 0
    assert float(seen.mean()) == pytest.approx(result.verdict.expected_tre_mm, rel=0.5)


def test_the_error_is_expected_where_the_scans_differ(ndim, heads):
    """One half of the moving scan is bent to and fro, which no rigid map follows: there it expects to be further off."""
    fixed = heads[ndim]
    index = torch.stack(torch.meshgrid(*[torch.arange(n, dtype=torch.float32) for n in fixed.grid.shape], indexing="ij"), -1)
    half = fixed.grid.shape[0] // 2
    index[half + 4:, ..., 1] += 1.5 * (index[half + 4:, ..., 0] * 0.6).sin()
    ends = torch.tensor(fixed.grid.shape, dtype=torch.float32) - 1
    bent = torch.nn.functional.grid_sample(fixed.data, (index.flip(-1) / ends.flip(-1) * 2 - 1)[None], align_corners=True)
    error = regkit.align(fixed, fixed.with_data(bent), model="rigid").expected_error().data[0, 0]
    still, moved = (part[torch.isfinite(part)].mean() for part in (error[:half], error[half + 4:]))
    assert float(moved) > 1.2 * float(still)


def test_millimetres_are_written_without_an_exponent():
    assert [plain(value) for value in (0.0234, 3.14, 14.0, 138.2, 2345.0)] == ["0.023", "3.1", "14", "140", "2300"]
    assert "expected error 140 mm" in str(Verdict("PASS", 0.95, 138.2, (40.0, 400.0), ()))
