"""Cohort statistics against arithmetic, scipy's own and known intervals."""

import numpy as np
import pandas
import pytest
from scipy.stats import wilcoxon

from regkit.evaluation.statistics import by_unit, capture, compare, holm, interval, ranks, success, table, worst30


def _cases(**columns):
    rows = []
    for method, values in columns.items():
        rows += [{"id": f"c{k}", "group": "a" if k < 3 else "b", "method": method, "status": "ok", "undefined": 0, "dice": v,
                  "dice_before": 0.1} for k, v in enumerate(values)]
    return pandas.DataFrame(rows)


def test_the_interval_is_that_of_the_mean():
    draw = np.random.default_rng(0)
    hits = [low <= 0 <= high for low, high in (interval(draw.normal(0, 1, 40), seed=k) for k in range(200))]
    assert 0.88 < np.mean(hits) < 0.99
    assert interval(np.array([0.5])) == (0.5, 0.5)
    assert interval(np.array([1.0, 2.0, 4.0])) == interval(np.array([1.0, 2.0, 4.0]))


def test_the_worst_30_per_cent_are_at_the_bad_end():
    values = np.arange(11.0)
    assert worst30(values, "high") == pytest.approx(3.0)
    assert worst30(values, "low") == pytest.approx(7.0)


def test_one_row_a_group_method_and_measure():
    values = [0.2, 0.4, 0.9, 0.5, 0.7]
    rows = {row["group"]: row for row in table(_cases(x=values), ["x"]) if row["measure"] == "dice"}
    assert rows.keys() == {"all", "a", "b"}
    assert rows["all"]["n"] == 5 and rows["all"]["mean"] == pytest.approx(np.mean(values))
    assert rows["all"]["sd"] == pytest.approx(np.std(values, ddof=1)) and rows["a"]["median"] == 0.4
    assert rows["all"]["low"] <= rows["all"]["mean"] <= rows["all"]["high"] and rows["b"]["before"] == pytest.approx(0.1)


def test_success_is_counted_at_the_threshold():
    rows = success(_cases(x=[0.5, 0.69, 0.7, 0.95]), ["x"], {"dice": (0.5, 0.7)})
    assert [(r["threshold"], r["share"], r["n"]) for r in rows] == [(0.5, 1.0, 4), (0.7, 0.5, 4)]


def test_methods_are_compared_in_pairs_and_corrected():
    draw = np.random.default_rng(1)
    x = draw.random(20)
    values = {"x": x, "y": x + draw.normal(0.05, 0.03, 20), "z": x + draw.normal(0, 0.01, 20)}
    cases, names = _cases(**values), list(values)
    rows = [r for r in compare(cases, names) if r["measure"] == "dice"]
    assert [(r["method"], r["against"]) for r in rows] == [("x", "y"), ("x", "z"), ("y", "z")]
    assert [r["p"] for r in rows] == pytest.approx([wilcoxon(values[r["method"]] - values[r["against"]]).pvalue for r in rows])
    assert all(r["p_holm"] >= r["p"] for r in rows) and rows[0]["p_holm"] < 0.01 < rows[1]["p_holm"]
    against = [r for r in compare(cases, names, "x") if r["measure"] == "dice"]
    assert [(r["method"], r["against"]) for r in against] == [("y", "x"), ("z", "x")] and against[0]["difference"] > 0
    same = compare(_cases(x=x, y=x), ["x", "y"])
    assert same[0]["p"] == 1.0


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == pytest.approx([1.0, 1.0])
    assert holm([]) == []


def test_ranks_share_ties_and_put_the_best_first():
    rows = ranks(_cases(x=[0.5, 0.5, 0.9], y=[0.6, 0.5, 0.8]), ["x", "y"])
    assert rows == [{"method": "x", "rank": 1.5}, {"method": "y", "rank": 1.5}]
    assert ranks(_cases(x=[0.5, 0.7], y=[0.6, 0.8]), ["x", "y"])[0] == {"method": "y", "rank": 1.0}
    assert ranks(_cases(x=[0.5]), ["x"]) == []


def test_capture_by_angle():
    cases = _cases(x=[0.5, 0.6, 0.7, 0.8]).assign(angle=[20.0, 20.0, 90.0, None], captured=[True, False, True, None])
    assert capture(cases, ["x"]) == [{"method": "x", "angle": angle, "captured": 1, "cases": n} for angle, n in ((20.0, 2), (90.0, 1))]
    assert capture(_cases(x=[0.5]), ["x"]) == []


def test_millimetres_and_pixels_have_no_mean():
    cases = pandas.DataFrame([{"id": str(k), "group": "g", "method": "x", "status": "ok", "undefined": 0, "unit": unit, "tre_mm": error,
                               "tre_before_mm": 9.0} for k, (unit, error) in enumerate([("mm", 1.0), ("mm", 3.0), ("px", 50.0)])])
    rows = {row["measure"]: row for row in table(by_unit(cases), ["x"])}
    assert (rows["tre_mm"]["mean"], rows["tre_mm"]["n"], rows["tre_mm"]["before"]) == (2.0, 2, 9.0)
    assert (rows["tre_px"]["mean"], rows["tre_px"]["n"], rows["tre_px"]["before"]) == (50.0, 1, 9.0)
    assert by_unit(cases[cases["unit"] == "mm"]).equals(cases[cases["unit"] == "mm"])
