"""One case measured: labels and landmarks before and after, by one map or by what another tool left."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from regkit.errors import FormatError
from regkit.evaluation import landmarks, overlap, surface
from regkit.evaluation.cases import Case
from regkit.evaluation.regularity import inconsistency, regularity
from regkit.image import Image
from regkit.io import Points, read_image, read_points
from regkit.registration.apply import carry_image
from regkit.report.cohort import before_name
from regkit.space import Matrix, Transform

Row = dict[str, Any]


@dataclass(frozen=True, eq=False)
class Truth:
    """What a case is measured by, read once."""

    fixed: Image
    moving: Image
    fixed_labels: Image | None
    moving_labels: Image | None
    fixed_points: Points | None
    moving_points: Points | None

    @property
    def ndim(self) -> int:
        return self.fixed.ndim

    @property
    def unit(self) -> str:
        """Of errors, which are measured in the moving scan: mm, of a picture pixels."""
        return "px" if self.moving.pixels else "mm"

    @property
    def moving_size(self) -> list[float]:
        """Edges of the moving scan in that unit."""
        grid = self.moving.grid
        voxel = [1.0] * grid.ndim if self.moving.pixels else grid.spacing[0].tolist()
        return [n * v for n, v in zip(grid.shape, voxel, strict=True)]


@dataclass(frozen=True, eq=False)
class Outcome:
    """What a method made of a case: a map; or labels on the fixed grid and landmarks in the moving scan; what it cost; and its own verdict
    (PASS, WARN or FAIL) with the probability of being right, if it gives one."""

    transform: Transform | None = None
    back: Transform | None = None
    labels: Image | None = None
    points: Points | None = None
    seconds: float | None = None
    peak_mb: float | None = None
    verdict: str | None = None
    probability: float | None = None


def read_truth(case: Case) -> Truth:
    """Scans, labels and landmarks of a case. Raises FormatError or GeometryError where they are unreadable or do not fit."""
    fixed, moving = read_image(case.fixed, name="fixed"), read_image(case.moving, name="moving")
    parts: dict[str, Any] = {}
    for side, scan in (("fixed", fixed), ("moving", moving)):
        labels, points = getattr(case, f"{side}_labels"), getattr(case, f"{side}_points")
        parts[f"{side}_labels"] = label_map(read_image(labels, name=f"{side}_labels"), f"{side}_labels") if labels else None
        parts[f"{side}_points"] = read_points(points, space=case.points_space, image=scan, name=f"{side}_points") if points else None
    a, b = parts["fixed_points"], parts["moving_points"]
    if a is not None and len(a) != len(b):
        raise FormatError(f"moving_points: {len(b)} landmarks, fixed_points: {len(a)}; expected as many, in the same order")
    if a is not None:
        _same_order(a, b)
    return Truth(fixed, moving, **parts)


def _same_order(fixed: Points, moving: Points) -> None:
    """Raises FormatError where landmarks bear the same names in another order: they are matched by row."""
    names = [landmark_names(points) for points in (fixed, moving)]
    if names[0] and names[1] and names[0] != names[1] and set(names[0]) == set(names[1]):
        row = next(n for n, (a, b) in enumerate(zip(*names, strict=True)) if a != b)
        raise FormatError(f"moving_points: landmark {row + 1} is called {names[1][row]!r}, in fixed_points {names[0][row]!r}; "
                          "landmarks are matched by row: bring both into one order")


def landmark_names(points: Points) -> list[str]:
    """The landmarks' names, if a column holds them and no two are alike."""
    for column in ("name", "label", "id"):
        if column in [c.lower() for c in points.columns]:
            place = [c.lower() for c in points.columns].index(column)
            names = [row[place].strip() for row in points.rows]
            return names if all(names) and len(set(names)) == len(names) else []
    return []


def label_map(image: Image, name: str) -> Image:
    """A label map as whole numbers; some are stored as floats. Raises GeometryError for other values."""
    import torch

    return image.with_data(torch.from_numpy(overlap.as_labels(image.data, name).astype(np.int32)))


def measure(truth: Truth, outcome: Outcome, *, tolerance: float, distances: bool = True) -> dict[str, Any]:
    """Labels and landmarks under one outcome → {"labels": {label: row}, "points": errors (P,) or None, and the map's regularity}."""
    out: dict[str, Any] = {"labels": {}, "points": None}
    if truth.fixed_labels is not None and truth.moving_labels is not None:
        moved = outcome.labels
        if outcome.transform is not None:
            moved = carry_image(truth.moving_labels, outcome.transform, truth.fixed_labels, interpolation="nearest", fill=0)
        if moved is not None:
            out["labels"] = _labels(truth.fixed_labels, moved, tolerance, distances)
    if truth.fixed_points is not None and truth.moving_points is not None:
        mapped = outcome.transform(truth.fixed_points.world[None])[0] if outcome.transform is not None else (
            outcome.points.world if outcome.points is not None else None)
        if mapped is not None:
            there = truth.moving_points.world
            if truth.moving.pixels:
                mapped, there = (truth.moving.grid.to_index(p[None])[0] for p in (mapped, there))
            out["points"] = landmarks.tre(there, mapped)
    if outcome.transform is not None:
        found = regularity(outcome.transform, truth.fixed.grid)
        if not (isinstance(outcome.transform, Matrix) and outcome.transform.affine and found.folds == 0):  # 0 for every affine map
            out |= {"folds_percent": found.folds, "sdlogj": found.sdlogj}
        if outcome.back is not None:
            out["inverse_mm"] = inconsistency(outcome.transform, outcome.back, truth.fixed.grid)
    return out


def _labels(fixed: Image, moved: Image, tolerance: float, distances: bool) -> dict[int, Row]:
    f, m = fixed.data[0, 0].numpy(), moved.data[0, 0].numpy()
    spacing = [1.0] * fixed.ndim if fixed.pixels else fixed.grid.spacing[0].tolist()
    apart = surface.surfaces(f, m, spacing, tolerance=tolerance) if distances else {}
    rows = {}
    for label, (here, there, both) in overlap.counts(f, m).items():
        rows[label] = {"dice": 2 * both / (here + there), "jaccard": both / (here + there - both)}
        if distances:
            s = apart[label]
            rows[label] |= {"hd95_mm": s.hd95, "asd_mm": s.asd, "surface_dice": s.dice, "undefined": s.undefined}
    return rows


LABEL_MEASURES = ("dice", "jaccard", "hd95_mm", "asd_mm", "surface_dice")


def row_of(case: Case, method: str, truth: Truth, before: Mapping[str, Any], after: Mapping[str, Any] | None, outcome: Outcome,
           reason: str = "") -> Row:
    """The line of `cases.csv`; `after` None: a failed case, whose values are the worst: overlap 0, distances the fixed field of
    view's diagonal, TRE the larger of before and half that diagonal."""
    diagonal = diagonal_of(truth.fixed)
    row: Row = {"id": case.id, "group": case.group, "method": method, "status": "failed" if after is None else "ok", "reason": reason,
                "unit": truth.unit, "ndim": truth.ndim, "labels": len(before["labels"]), "undefined": 0}
    if before["labels"]:
        for name in LABEL_MEASURES:
            if name in next(iter(before["labels"].values())):
                row[before_name(name)] = _mean(before["labels"], name)
                worst = diagonal if name.endswith("_mm") else 0.0
                row[name] = worst if after is None else _mean(after["labels"], name)
        row["undefined"] = len(before["labels"]) if after is None else sum(bool(r.get("undefined")) for r in after["labels"].values())
    if before["points"] is not None:
        errors = after["points"] if after is not None else np.maximum(before["points"], diagonal / 2)
        found, start = landmarks.summary(errors, before["points"]), landmarks.summary(before["points"])
        row |= {"points": len(errors), "tre_before_mm": start["mean"], "tre_mm": found["mean"], "tre_median_mm": found["median"],
                "tre_p90_mm": found["p90"], "tre_max_mm": found["max"], "improved": found["improved"],
                "rtre": float(landmarks.relative(errors, truth.moving_size).mean())}
    for name in ("folds_percent", "sdlogj", "inverse_mm"):
        row[name] = None if after is None else after.get(name)
    row |= {name: getattr(outcome, name) for name in ("seconds", "peak_mb", "verdict", "probability")}
    badness, why = judge(row, truth, after)
    return {**row, "badness": badness, "why": why}


def diagonal_of(fixed: Image) -> float:
    """Of a field of view, mm, of a picture pixels: the worst that a distance counts as."""
    voxel = [1.0] * fixed.ndim if fixed.pixels else fixed.grid.spacing[0].tolist()
    return float(np.linalg.norm([n * v for n, v in zip(fixed.grid.shape, voxel, strict=True)]))


def lost_row(case: Case, method: str, reason: str) -> Row:
    """The line of a case of which something cannot be read: overlap 0, distances the fixed scan's diagonal, TRE half of it; where
    not even that scan is readable they are left to the table. What was before is not known."""
    try:
        fixed: Image | None = read_image(case.fixed)
    except Exception:
        fixed = None
    diagonal = None if fixed is None else diagonal_of(fixed)
    row: Row = {"id": case.id, "group": case.group, "method": method, "status": "failed", "reason": reason,
                "unit": "px" if fixed is not None and fixed.pixels else "mm", "ndim": case.ndim if fixed is None else fixed.ndim,
                "labels": 0, "undefined": 0, "seconds": None, "peak_mb": None, "verdict": None, "probability": None, "badness": 1.0,
                "why": f"It failed: {reason}"}
    if case.fixed_labels:
        row |= {"dice": 0.0, "jaccard": 0.0, "surface_dice": 0.0, "hd95_mm": diagonal, "asd_mm": diagonal}
    if case.fixed_points:
        row |= {"tre_mm": None if diagonal is None else diagonal / 2, "improved": 0.0, "rtre": 0.5}
    return row


def _mean(labels: Mapping[int, Row], name: str) -> float:
    return float(np.mean([row[name] for row in labels.values()]))


TOO_FAR = 0.05  # of the moving scan's diagonal: landmarks so far off count as wholly lost


def judge(row: Row, truth: Truth, after: Mapping[str, Any] | None) -> tuple[float, str]:
    """How bad a case is, 0 to 1, to order cases by; and why, in a sentence."""
    if row["status"] == "failed":
        return 1.0, f"It failed: {row['reason']}"
    parts: list[tuple[float, str]] = []
    if row.get("dice") is not None:
        parts.append((1 - row["dice"], f"Labels overlap by {row['dice']:.2f} (Dice), {row['dice_before']:.2f} before."))
        if row["dice"] < row["dice_before"] - 0.005:
            parts.append((_loss(row["dice_before"] - row["dice"], 0.1),
                          f"Labels overlap less than where the headers put them: {row['dice']:.2f}, before {row['dice_before']:.2f}."))
    if row.get("tre_mm") is not None:
        share = row["rtre"]
        parts.append((min(1.0, share / TOO_FAR),
                      f"Landmarks lie {row['tre_mm']:.3g} {row['unit']} off on average, {100 * share:.1f} % of the scan's diagonal; "
                      f"{row['tre_before_mm']:.3g} before."))
        if row["tre_mm"] > 1.02 * row["tre_before_mm"]:
            parts.append((_loss(row["tre_mm"] / max(row["tre_before_mm"], 1e-6) - 1, 0.5),
                          f"Landmarks lie farther off than where the headers put them: {row['tre_mm']:.3g} {row['unit']}, "
                               f"before {row['tre_before_mm']:.3g}."))
    if (row.get("folds_percent") or 0) > 0:
        parts.append((min(1.0, 0.5 + row["folds_percent"] / 10), f"The map folds at {row['folds_percent']:.2g} % of the voxels."))
    if not parts:
        return 0.0, "Nothing is measured: the table names neither labels nor landmarks on both sides."
    badness, why = max(parts)
    badness = min(badness, 0.99)  # only what failed is worse
    if after is not None and len(after["labels"]) > 1 and why.startswith("Labels"):
        worst = min(after["labels"].items(), key=lambda item: item[1]["dice"])
        why += f" Worst is label {worst[0]} ({worst[1]['dice']:.2f})."
    return badness, why


def _loss(change: float, whole: float) -> float:
    """How bad it is to end worse than one began: 0.5 to 0.9."""
    return 0.5 + 0.4 * min(1.0, change / whole)


def identity(ndim: int) -> Outcome:
    """The scans where their headers put them."""
    return Outcome(Matrix.identity(ndim))


def case_folder(folder: str | Path, case: Case) -> Path:
    """Where a method's files of a case lie: a folder named like the id (or what of it a file name can hold)."""
    plain = case.id not in (".", "..") and Path(case.id).name == case.id
    return Path(folder) / case.id if plain and (Path(folder) / case.id).is_dir() else Path(folder) / case.key
