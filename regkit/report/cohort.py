"""An evaluation put in the order in which a page tells it: the worst first, numbers under their names.

An evaluation is plain data, any value of which may be None and any list empty or absent:

- title, regkit (version), created, command; methods, baseline, groups: names in the order of the page
- measures: {column: {name, unit, better: high or low}}, the columns of cases, such as `dice` or `tre_mm`
- table: {group (or `all`), method, measure, n, mean, sd, median, worst30, low, high, before, undefined}
- tests: {measure, method, against, n, difference, p, p_holm}; ranks: {method, rank};
  success: {measure, threshold, method, share, n}; capture: {method, angle, captured, cases}
- cases: {id, group, method, status (ok or failed), reason, badness (0 best … 1 worst), why, seconds, verdict, probability}, each
  measure's column and its column before (`before_name`)
- labels: {id, method, label, name, dice_before, dice, hd95_mm}; points: {id, method, point, tre_before_mm, tre_mm}
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from markupsafe import Markup

from regkit.report.figures import boxes, curves, finite, steps

_ORDER = "PASS WARN FAIL"
WORST = 10  # cases that are shown open
MOST_ROWS = 30  # labels in one chart
MOST_POINTS = 15  # landmarks in one chart


def before_name(measure: str) -> str:
    """The column that holds a measure before registration: dice → dice_before, hd95_mm → hd95_before_mm, tre_px → tre_before_px."""
    return f"{measure[:-3]}_before{measure[-3:]}" if measure.endswith(("_mm", "_px")) else f"{measure}_before"


def ordered(evaluation: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The cases, worst first, each with its numbers (name, unit, before, after, whether it got worse), labels and points."""
    measures = evaluation.get("measures") or {}
    labels, points = (_by_case(evaluation.get(kind)) for kind in ("labels", "points"))
    cases = sorted(evaluation.get("cases") or [], key=lambda case: -_badness(case))
    told = []
    for rank, case in enumerate(cases, 1):
        key = (str(case.get("id")), str(case.get("method")))
        numbers = [_number(case, name, measure) for name, measure in measures.items() if name in case or before_name(name) in case]
        numbers = [n for n in numbers if n["after"] is not None or n["before"] is not None]
        told.append({**case, "rank": rank, "open": rank <= WORST, "failed": case.get("status") != "ok", "numbers": numbers,
                     "key": "/".join((key[1], key[0])), "labels": sorted(labels.get(key, []), key=lambda r: _or(r.get("dice"), -1.0)),
                     "points": sorted(points.get(key, []), key=lambda r: -_or(r.get("tre_mm"), math.inf))})
    return told


def _badness(case: Mapping[str, Any]) -> float:
    return _or(case.get("badness"), 1.0 if case.get("status") != "ok" else 0.0)


def _or(value: Any, otherwise: float) -> float:
    numbers = finite([value])
    return numbers[0] if numbers else otherwise


def _by_case(rows: Sequence[Mapping[str, Any]] | None) -> dict[tuple[str, str], list[Mapping[str, Any]]]:
    found: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in rows or []:
        found.setdefault((str(row.get("id")), str(row.get("method"))), []).append(row)
    return found


def _number(case: Mapping[str, Any], name: str, measure: Mapping[str, Any]) -> dict[str, Any]:
    before, after = case.get(before_name(name)), case.get(name)
    both = finite([before, after])
    worse = len(both) == 2 and (both[1] < both[0] if measure.get("better") == "high" else both[1] > both[0])
    return {"name": measure.get("name", name), "unit": measure.get("unit") or "", "before": before, "after": after, "worse": worse}


def headline(evaluation: Mapping[str, Any], cases: Sequence[Mapping[str, Any]]) -> str:
    """How many cases, how many failed, and what their verdicts are, in one or two sentences."""
    pairs = len({str(case.get("id")) for case in cases})
    if not pairs:
        return "No case was evaluated."
    methods = evaluation.get("methods") or []
    failed = sum(case["failed"] for case in cases)
    way = f", {len(methods)} methods" if len(methods) > 1 else f" by {methods[0]}" if methods else ""
    outcome = "none failed" if not failed else f"{failed} of {len(cases)} registrations failed"
    said = Counter(name for case in cases if isinstance(name := case.get("verdict"), str))
    verdicts = f" Verdicts: {', '.join(f'{said[name]} {name}' for name in sorted(said, key=_ORDER.find))}." if said else ""
    return f"{pairs} {'pair' if pairs == 1 else 'pairs'}{way}: {outcome}.{verdicts}"


def summary(evaluation: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The table by group, `all` first: {group, measures: [{name, unit, rows}]}, the best mean of several methods marked."""
    measures = evaluation.get("measures") or {}
    rows = evaluation.get("table") or []
    groups = sorted(dict.fromkeys(str(row.get("group")) for row in rows), key=lambda g: g != "all")
    told = []
    for group in groups:
        parts = []
        for name, measure in measures.items():
            here = [dict(row) for row in rows if str(row.get("group")) == group and row.get("measure") == name]
            means = finite([row.get("mean") for row in here])
            best = (max if measure.get("better") == "high" else min)(means) if len(means) > 1 else None
            for row in here:
                row["best"] = best is not None and row.get("mean") == best
            if here:
                parts.append({"name": measure.get("name", name), "unit": measure.get("unit") or "", "better": measure.get("better"),
                              "rows": here})
        if parts:
            told.append({"group": group, "measures": parts})
    return told


def charts(evaluation: Mapping[str, Any], cases: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Box plots of every measure, by group and method: {title, svg}."""
    methods = _methods(evaluation, cases)
    groups = [g for g in (evaluation.get("groups") or []) if any(case.get("group") == g for case in cases)]
    told = []
    for name, measure in (evaluation.get("measures") or {}).items():
        rows = []
        for group in [None, *groups] if len(groups) != 1 else [None]:
            here = [case for case in cases if group is None or case.get("group") == group]
            rows += _rows("all cases" if group is None else str(group), here, methods, name)
        title = f"{measure.get('name', name)} by {'group and method' if len(groups) > 1 else 'method'}"
        chart = boxes(rows, title=title, unit=measure.get("unit") or "", better=measure.get("better", "low"), bounds=_bounds(measure))
        if chart:
            told.append({"title": title, "svg": chart})
    return told


def _bounds(measure: Mapping[str, Any]) -> tuple[float, float] | None:
    """Overlaps run from 0 to 1."""
    return (0.0, 1.0) if not measure.get("unit") and measure.get("better") == "high" else None


def _methods(evaluation: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys([*(evaluation.get("methods") or []), *(str(row.get("method")) for row in rows)]))


def _rows(title: str, here: Sequence[Mapping[str, Any]], methods: Sequence[str], column: str) -> list[dict[str, Any]]:
    """One row a method that has values; the first carries the title."""
    rows: list[dict[str, Any]] = []
    for tone, method in enumerate(methods):
        mine = [row for row in here if str(row.get("method")) == method]
        values = finite([row.get(column) for row in mine])
        if values:
            before = finite([row.get(before_name(column)) for row in mine])
            rows.append({"name": "" if rows else title, "full": f"{title}, {method}", "tone": tone, "values": values,
                         "before": float(np.median(before)) if before else None})
    return rows


def label_chart(evaluation: Mapping[str, Any]) -> dict[str, Any] | None:
    """Dice by label over all cases, the worst labels first."""
    rows = evaluation.get("labels") or []
    methods = _methods(evaluation, rows)
    names: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        names.setdefault(str(row.get("name") or f"label {row.get('label')}"), []).append(row)
    some = {name: values for name, here in names.items() if (values := finite([row.get("dice") for row in here]))}
    worst = sorted(some, key=lambda name: float(np.median(some[name])))[:MOST_ROWS]
    drawn = [row for name in worst for row in _rows(name, names[name], methods, "dice")]
    chart = boxes(drawn, title="Dice by label", unit="", better="high", bounds=(0.0, 1.0))
    return {"svg": chart, "left_out": len(some) - len(worst)} if chart else None


def point_chart(evaluation: Mapping[str, Any]) -> dict[str, Any] | None:
    """Median error before → after by landmark, the farthest first; of scans if there are any, else of pictures, in pixels."""
    units = {str(case.get("id")): str(case.get("unit") or "mm") for case in evaluation.get("cases") or []}
    rows = evaluation.get("points") or []
    unit = "px" if rows and all(units.get(str(row.get("id"))) == "px" for row in rows) else "mm"
    rows = [row for row in rows if units.get(str(row.get("id")), "mm") == unit]  # mm and pixels share no axis
    methods = _methods(evaluation, rows)
    names: dict[str, list[Mapping[str, Any]]] = {}
    group = {str(case.get("id")): str(case.get("group")) for case in evaluation.get("cases") or []}
    several = len({group.get(str(row.get("id"))) for row in rows}) > 1  # the third point of a hand is not that of a head
    for row in rows:
        own = group.get(str(row.get("id")))
        names.setdefault(f"{own} {row.get('point')}" if several and own else str(row.get("point")), []).append(row)
    far = {name: float(np.median(v)) for name, here in names.items() if (v := finite([row.get("tre_mm") for row in here]))}
    worst = sorted(far, key=lambda name: -far[name])[:MOST_POINTS]
    drawn: list[dict[str, Any]] = []
    for name in worst:
        first = True
        for tone, method in enumerate(methods):
            mine = [row for row in names[name] if str(row.get("method")) == method]
            before, after = (finite([row.get(k) for row in mine]) for k in ("tre_before_mm", "tre_mm"))
            if after:
                drawn.append({"name": name if first else "", "full": f"{name}, {method}", "tone": tone, "after": float(np.median(after)),
                              "before": float(np.median(before)) if before else None})
                first = False
    chart = steps(drawn, title="Landmark error before and after", unit=unit)
    return {"svg": chart, "left_out": len(far) - len(worst)} if chart else None


def capture_chart(evaluation: Mapping[str, Any]) -> Markup:
    """Share of the cases that are found again, by how far they were turned."""
    rows = evaluation.get("capture") or []
    lines = []
    for tone, method in enumerate(_methods(evaluation, rows)):
        points = [(float(row["angle"]), _share(row)) for row in rows if str(row.get("method")) == method and finite([row.get("angle")])]
        lines.append({"name": method, "tone": tone, "points": [(x, share) for x, share in points if share is not None]})
    return curves(lines, title="Share of cases captured by angle", across="start turned by … degrees")


def _share(row: Mapping[str, Any]) -> float | None:
    """`captured` is a count of `cases`, or a share."""
    captured, cases = finite([row.get("captured")]), finite([row.get("cases")])
    if not captured or (cases and cases[0] <= 0):
        return None
    return captured[0] if not cases or (captured[0] < 1 and captured[0] != int(captured[0])) else min(1.0, captured[0] / cases[0])
