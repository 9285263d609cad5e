"""What a cohort's numbers say: means with intervals, the worse cases, success rates, tests between methods, ranks, capture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from regkit.report.cohort import before_name

DataFrame = Any  # pandas's own types leave most of it open

MEASURES: dict[str, dict[str, str]] = {
    "dice": {"name": "Dice", "unit": "", "better": "high"},
    "jaccard": {"name": "Jaccard", "unit": "", "better": "high"},
    "hd95_mm": {"name": "HD95", "unit": "mm", "better": "low"},
    "asd_mm": {"name": "ASD", "unit": "mm", "better": "low"},
    "surface_dice": {"name": "Surface Dice", "unit": "", "better": "high"},
    "tre_mm": {"name": "TRE", "unit": "mm", "better": "low"},
    "hd95_px": {"name": "HD95", "unit": "px", "better": "low"},
    "asd_px": {"name": "ASD", "unit": "px", "better": "low"},
    "tre_px": {"name": "TRE", "unit": "px", "better": "low"},
    "rtre": {"name": "Relative TRE", "unit": "", "better": "low"},
    "improved": {"name": "Landmarks improved", "unit": "", "better": "high"},
    "folds_percent": {"name": "Folds", "unit": "%", "better": "low"},
    "sdlogj": {"name": "SDlogJ", "unit": "", "better": "low"},
    "inverse_mm": {"name": "Inverse consistency", "unit": "mm", "better": "low"},
    "seconds": {"name": "Time", "unit": "s", "better": "low"},
    "peak_mb": {"name": "Memory", "unit": "MB", "better": "low"},
}
COMPARED = ("dice", "hd95_mm", "hd95_px", "surface_dice", "tre_mm", "tre_px")  # what methods are tested and ranked by
SUCCESS = {"dice": (0.5, 0.7, 0.8, 0.9), "tre_mm": (1.0, 2.0, 5.0, 10.0)}
DISTANCES = ("hd95_mm", "hd95_px", "asd_mm", "asd_px", "surface_dice")  # undefined where the moved map lacks a label
RESAMPLED, ENOUGH_CASES = 2_000, 3  # bootstrap samples, and how many cases an interval needs
ENOUGH_DICE, ENOUGH_TRE, ENOUGH_UNIT = 0.95, 1.5, 1.0  # of the unturned result: what counts as captured


def by_unit(cases: DataFrame) -> DataFrame:
    """The cases with the errors of pictures, which are pixels, in columns of their own: mm and pixels have no mean."""
    pixels = cases["unit"] == "px" if "unit" in cases else None
    if pixels is None or not pixels.any():
        return cases
    names = [name for name in cases if name.startswith(("tre_", "hd95_", "asd_")) and name.endswith("_mm")]
    apart = {name.removesuffix("mm") + "px": cases[name].where(pixels) for name in names}
    return cases.assign(**{name: cases[name].mask(pixels) for name in names}, **apart)


def interval(values: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """95 % interval of the mean: percentiles of bootstrap samples (Efron 1979). One value has none: it stands for both ends."""
    if len(values) < 2 or np.ptp(values) == 0:
        return float(values.mean()), float(values.mean())
    draw = np.random.default_rng(seed).integers(0, len(values), (RESAMPLED, len(values)))
    low, high = np.percentile(values[draw].mean(1), [2.5, 97.5])
    return float(low), float(high)


def worst30(values: np.ndarray, better: str) -> float:
    """The value that 30 % of the cases do not better: the 30th percentile, where low is better the 70th (Learn2Reg's "30")."""
    return float(np.percentile(values, 30 if better == "high" else 70))


def table(cases: DataFrame, methods: Sequence[str]) -> list[dict[str, Any]]:
    """One row for all cases, and where there are several groups for each of them, per method and measure."""
    groups = list(dict.fromkeys(cases["group"]))
    rows = []
    for group in ["all", *(g for g in groups if g != "all" and len(groups) > 1)]:
        part = cases if group == "all" else cases[cases["group"] == group]
        for method in methods:
            own = part[part["method"] == method]
            for measure, about in MEASURES.items():
                if measure not in own or not own[measure].notna().any():
                    continue
                known = own[own[measure].notna()]
                values = known[measure].to_numpy(float)
                low, high = interval(values) if len(values) >= ENOUGH_CASES else (None, None)
                start = before_name(measure)
                rows.append({"group": group, "method": method, "measure": measure, "n": len(values), "mean": float(values.mean()),
                             "sd": float(values.std(ddof=1)) if len(values) > 1 else None, "median": float(np.median(values)),
                             "worst30": worst30(values, about["better"]), "low": low, "high": high,
                             "before": float(known[start].mean()) if start in known and known[start].notna().any() else None,
                             "undefined": int((known["status"] != "ok").sum()) + (
                                 int(known["undefined"][known["status"] == "ok"].sum()) if measure in DISTANCES else 0)})
    return rows


def success(cases: DataFrame, methods: Sequence[str], thresholds: Mapping[str, Sequence[float]] = SUCCESS) -> list[dict[str, Any]]:
    """Share of cases at least (TRE: at most) as good as each threshold."""
    rows = []
    for measure, limits in thresholds.items():
        for method in methods:
            if measure not in cases:
                continue
            values = cases[(cases["method"] == method) & cases[measure].notna()][measure].to_numpy(float)
            for limit in limits if len(values) else ():
                good = values >= limit if MEASURES[measure]["better"] == "high" else values <= limit
                rows.append({"measure": measure, "threshold": limit, "method": method, "share": float(good.mean()), "n": len(values)})
    return rows


def compare(cases: DataFrame, methods: Sequence[str], baseline: str | None = None) -> list[dict[str, Any]]:
    """Paired Wilcoxon signed-rank tests (1945) over the cases that both methods have, of each method with the baseline, or of all
    pairs; Holm's correction (1979) within a measure. difference: median of method less against."""
    from scipy.stats import wilcoxon

    pairs = [(m, baseline) for m in methods if m != baseline] if baseline else [
        (a, b) for i, a in enumerate(methods) for b in methods[i + 1:]]
    rows = []
    for measure in COMPARED:
        if measure not in cases:
            continue
        wide = cases.pivot(index="id", columns="method", values=measure)
        found = []
        for method, against in pairs:
            both = wide[[method, against]].dropna() if {method, against} <= set(wide) else wide.iloc[:0]
            if len(both) < 2:
                continue
            change = (both[method] - both[against]).to_numpy(float)
            result: Any = wilcoxon(change) if np.any(change != 0) else None
            found.append({"measure": measure, "method": method, "against": against, "n": len(both),
                          "difference": float(np.median(change)), "p": 1.0 if result is None else float(result.pvalue)})
        rows += [{**row, "p_holm": p} for row, p in zip(found, holm([row["p"] for row in found]), strict=True)]
    return rows


def holm(p: Sequence[float]) -> list[float]:
    """Holm's step-down adjusted p values, in the order given."""
    order = np.argsort(p)
    adjusted, running = [0.0] * len(p), 0.0
    for place, k in enumerate(order):
        running = max(running, min(1.0, (len(p) - place) * p[k]))
        adjusted[k] = running
    return adjusted


def ranks(cases: DataFrame, methods: Sequence[str]) -> list[dict[str, Any]]:
    """Mean rank of each method: within every case and measure the best has rank 1, equal ones share; best first."""
    if len(methods) < 2:
        return []
    collected: dict[str, list[float]] = {method: [] for method in methods}
    for measure in COMPARED:
        if measure not in cases:
            continue
        wide = cases.pivot(index="id", columns="method", values=measure).dropna()
        if set(methods) <= set(wide) and len(wide):
            ranked = wide[list(methods)].rank(axis=1, ascending=MEASURES[measure]["better"] == "low")
            for method in methods:
                collected[method] += ranked[method].tolist()
    rows = [{"method": method, "rank": float(np.mean(values))} for method, values in collected.items() if values]
    return sorted(rows, key=lambda row: row["rank"])


def capture(cases: DataFrame, methods: Sequence[str]) -> list[dict[str, Any]]:
    """Of turned copies, by angle and method, how many were captured; `reference_dice` and `reference_tre_mm` are what the unturned map
    gives on the same turned labels and landmarks."""
    if "angle" not in cases or not cases["angle"].notna().any():
        return []
    rows = []
    turned = cases[cases["angle"].notna() & cases["captured"].notna()]
    for method in methods:
        own = turned[turned["method"] == method]
        for angle, part in own.groupby("angle"):
            rows.append({"method": method, "angle": float(angle), "captured": int(part["captured"].sum()), "cases": len(part)})
    return rows
