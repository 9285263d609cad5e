"""One case of a cohort from its files to its scores, in a process of its own: what the pool runs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from regkit.errors import OptionError
from regkit.evaluation import methods as tools
from regkit.evaluation.cases import FILES, Case
from regkit.evaluation.score import Outcome, Row, Truth, identity, landmark_names, lost_row, measure, read_truth, row_of
from regkit.registration.result import Registration
from regkit.registration.settings import Settings
from regkit.space import Matrix, Transform

Method = Path | Settings | Callable[[Case], Any]
"""A folder of another tool's results, settings to align with, or a function of a case that gives a Registration, a
transform, or a matrix (D+1, D+1)."""


@dataclass(frozen=True)
class Job:
    """A case, the methods by name, how they are measured, and the cohort's folder."""

    case: Case
    methods: Mapping[str, Method]
    folder: Path
    tolerance: float = 1.0
    distances: bool = True
    pictures: bool = True
    threads: int | None = None

    @property
    def scores(self) -> Path:
        return self.folder / "cases" / f"{self.case.key}.json"

    @property
    def views(self) -> Path:
        return self.folder / "views" / f"{self.case.key}.json"

    @property
    def key(self) -> str:
        """A digest of everything the scores depend on, but for functions."""
        said: dict[str, Any] = {"version": version("regkit"), "case": asdict(self.case), "tolerance": self.tolerance,
                                "distances": self.distances}
        files = [getattr(self.case, name) for name in FILES if getattr(self.case, name)]
        for name, method in self.methods.items():
            said[f"method {name}"] = replace(method, threads=None).as_dict() if isinstance(method, Settings) else str(method)
            if isinstance(method, Path):
                files += sorted(str(p) for p in tools.case_folder(method, self.case).glob("*"))
        said["files"] = [_stamp(file) for file in files]
        return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()

    def done(self) -> bool:
        """Whether the scores are there, whole, of the same inputs, and no method failed."""
        try:
            known = json.loads(self.scores.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return False
        return (known.get("key") == self.key and all(row["status"] == "ok" for row in known["rows"])
                and (not self.pictures or self.views.exists()) and not any(callable(m) for m in self.methods.values()))


def _stamp(file: str) -> list[Any]:
    path = Path(file)
    try:
        stat = path.stat()
    except OSError:
        return [file, None]
    return [file, stat.st_size, stat.st_mtime_ns]


def work(job: Job) -> None:
    """Align where asked, measure every method, write scores and pictures."""
    if job.threads is not None:
        torch.set_num_threads(job.threads)
    with torch.no_grad():
        try:
            truth = read_truth(job.case)
            before = measure(truth, identity(truth.ndim), tolerance=job.tolerance, distances=job.distances)
        except Exception as error:
            write_lost(job, tools.reason_of(error))
            return
        rows, labels, points, views = [], [], [], {}
        for name, method in job.methods.items():
            outcome, after, reason = Outcome(), None, ""
            try:
                outcome = _outcome(name, method, job, truth)
                after = measure(truth, outcome, tolerance=job.tolerance, distances=job.distances)
            except Exception as error:
                outcome, reason = Outcome(), tools.reason_of(error)
            rows.append(row_of(job.case, name, truth, before, after, outcome, reason))
            labels += _label_rows(job.case, name, before["labels"], after["labels"] if after else {})
            points += _point_rows(job.case, name, truth, before["points"], after["points"] if after else None)
            if job.pictures:
                views[name] = _view(truth, outcome)
    if job.pictures:
        tools.write_json(job.views, views)
    tools.write_json(job.scores, {"key": job.key, "rows": rows, "labels": labels, "points": points})


def write_lost(job: Job, reason: str) -> None:
    """The scores of a case of which nothing can be measured."""
    rows = [lost_row(job.case, name, reason) for name in job.methods]
    tools.write_json(job.scores, {"key": job.key, "rows": rows, "labels": [], "points": []})


def _outcome(name: str, method: Method, job: Job, truth: Truth) -> Outcome:
    if isinstance(method, Settings):
        tools.align_case(job.case, replace(method, threads=method.threads or job.threads), job.folder / name)
        return tools.read_outcome(job.folder / name, job.case, truth)
    if isinstance(method, Path):
        return tools.read_outcome(method, job.case, truth)
    made = method(job.case)
    said = made.verdict if isinstance(made, Registration) else None
    made = getattr(made, "transform", made)
    if not isinstance(made, Transform):
        try:
            made = Matrix(torch.as_tensor(np.asarray(made, dtype=float)))
        except (TypeError, ValueError) as error:
            raise OptionError(f"methods: {name} gave a {type(made).__name__}; expected a Registration, a transform or a matrix") from error
    if made.ndim != truth.ndim:
        raise OptionError(f"methods: {name} gave a {made.ndim}D map, the scans are {truth.ndim}D; expected a matrix "
                          f"({truth.ndim + 1}, {truth.ndim + 1})")
    return Outcome(made) if said is None else Outcome(made, verdict=said.status, probability=said.probability)


def _label_rows(case: Case, method: str, before: Mapping[int, Row], after: Mapping[int, Row]) -> list[Row]:
    rows = []
    for label, start in before.items():
        end = after.get(label, {})
        rows.append({"id": case.id, "method": method, "label": label, "dice_before": start["dice"], "dice": end.get("dice", 0.0),
                     "jaccard": end.get("jaccard", 0.0), "hd95_before_mm": start.get("hd95_mm"), "hd95_mm": end.get("hd95_mm"),
                     "asd_mm": end.get("asd_mm"), "surface_dice": end.get("surface_dice"), "undefined": end.get("undefined", not end)})
    return rows


def _point_rows(case: Case, method: str, truth: Truth, before: np.ndarray | None, after: np.ndarray | None) -> list[Row]:
    if before is None or truth.fixed_points is None:
        return []
    names = landmark_names(truth.fixed_points) or [str(n) for n in range(1, len(before) + 1)]
    ends = [None] * len(before) if after is None else after.tolist()
    return [{"id": case.id, "method": method, "point": name, "unit": truth.unit, "tre_before_mm": float(start), "tre_mm": end}
            for name, start, end in zip(names, before, ends, strict=True)]


def _view(truth: Truth, outcome: Outcome) -> dict[str, Any]:
    from regkit.report.views import view

    points = [None if p is None else p.world for p in (truth.fixed_points, truth.moving_points)]
    return view(truth.fixed, truth.moving, outcome.transform, fixed_labels=truth.fixed_labels, moving_labels=truth.moving_labels,
                fixed_points=points[0], moving_points=points[1], moved_labels=outcome.labels)


@dataclass(frozen=True)
class Turned:
    """A turned copy of a case, and the folder and id in which a method's unturned map lies."""

    case: Case
    unturned: Case
    folder: Path


def reference(job: Turned) -> float | None:
    """Dice of the unturned map when it is carried through the same turned labels: truth ∘ map. None without such a map."""
    with torch.no_grad():
        truth = read_truth(job.case)
        outcome = tools.read_outcome(job.folder, job.unturned, truth)
        if not isinstance(outcome.transform, Matrix) or truth.fixed_labels is None:
            return None
        turn = Matrix(torch.tensor(_plane(job.case.truth, truth.ndim), dtype=torch.float64))
        found = measure(truth, Outcome(turn @ outcome.transform), tolerance=1.0, distances=False)
    return float(np.mean([row["dice"] for row in found["labels"].values()])) if found["labels"] else None


def _plane(matrix: tuple[tuple[float, ...], ...], ndim: int) -> np.ndarray:
    """A map of 3D points that keeps the plane z = 0, as one of 2D points."""
    m = np.array(matrix)
    return np.delete(np.delete(m, 2, 0), 2, 1) if ndim == 2 and len(m) == 4 else m

