"""`evaluate()`: a table of cases in, their scores under one or several methods out."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from regkit.cohort.pool import Done, run
from regkit.errors import OptionError, OutputError
from regkit.evaluation.cases import Case, read_cases
from regkit.evaluation.methods import reason_of, write_json
from regkit.evaluation.result import Evaluation, gather
from regkit.evaluation.statistics import ENOUGH_DICE, ENOUGH_TRE, ENOUGH_UNIT
from regkit.evaluation.work import Job, Method, Turned, reference, work, write_lost
from regkit.io.paths import folder_there, home
from regkit.registration.settings import Settings

MARK = "evaluation.json"
Told = Callable[[int, int, str], None]


def evaluate(cases: str | Path | Iterable[Mapping[str, Any] | Case | str | Path], methods: Mapping[str, Method | str] | None = None, *,
             output: str | Path | None = None, baseline: str | None = None, tolerance: float = 1.0, distances: bool = True,
             pictures: bool = True, jobs: int | None = None, overwrite: bool = False, title: str = "Evaluation",
             progress: Told | None = None) -> Evaluation:
    """Measure how well pairs are aligned, by regkit or by any tool.

    cases: a CSV or JSON file (data/README.md), a Learn2Reg data set, several of these, or rows with the same names.
    methods: name → a folder of another tool's results (`<id>/transform.tfm`, `displacement.nii.gz`, `labels.nii.gz`,
        `points.csv`; see `regkit.evaluation.methods.read_outcome`), `regkit.Settings` to align with, or a function of a case that gives
        a Registration, a transform or a matrix. By default {"regkit": Settings()}.
    output: the folder for scores, alignments and pictures; what is there already is not done again. By default a temporary one.
    baseline: the method that others are tested against; by default all pairs are. tolerance: of surface Dice, mm.
    distances: whether to measure surface distances (HD95, ASD, surface Dice). pictures: whether to prepare the report's.
    jobs: processes; by default as many as there are CPUs, and one for each 3 GB of memory at most.
    progress: called with (done, of how many, id).

    A case that fails is reported with its reason, counts as the worst, and the rest goes on.

    Raises OptionError (names, numbers), FormatError (the table), OutputError (a folder that holds something else)."""
    listed = read_cases(cases.to_dict("records") if hasattr(cases, "to_dict") else cases)  # type: ignore[union-attr]
    tools = _methods({"regkit": Settings()} if methods is None else methods)
    if baseline is not None and baseline not in tools:
        raise OptionError(f"baseline: {baseline!r} is none of the methods {', '.join(tools)}")
    if not tolerance >= 0:
        raise OptionError(f"tolerance: {tolerance}; expected 0 or more mm")
    about = {"title": title, "regkit": version("regkit"), "created": datetime.now(UTC).isoformat(timespec="seconds"),
             "methods": list(tools), "baseline": baseline, "tolerance_mm": tolerance, "keys": [case.key for case in listed]}
    count = _processes() if jobs is None else jobs
    if count < 1:
        raise OptionError(f"jobs: {jobs}; expected 1 or more")
    folder = home(tempfile.mkdtemp(prefix="regkit-") if output is None else output)
    try:
        _claim(folder, overwrite)
        write_json(folder / MARK, about)
        everything = [Job(case, tools, folder, tolerance, distances, pictures, max(1, (os.cpu_count() or 1) // count)) for case in listed]
        _score(everything, count, progress)
        _capture(listed, tools, folder, count)
        found = gather(folder, about["keys"], about)
        found.write(folder)
    except BaseException:
        if output is None:
            shutil.rmtree(folder, ignore_errors=True)
        raise
    if output is None:
        weakref.finalize(found, shutil.rmtree, folder, ignore_errors=True)
    return found


def load(folder: str | Path) -> Evaluation:
    """The evaluation that lies in a folder. Raises FormatError (via `gather`) or OptionError where there is none."""
    path = home(folder) / MARK
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
        keys = list(about["keys"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise OptionError(f"folder: {folder} holds no evaluation ({error}); give the folder that `regkit evaluate -o` wrote") from error
    done = [key for key in keys if (path.parent / "cases" / f"{key}.json").exists()]
    if not done:
        raise OptionError(f"folder: {folder} holds an evaluation with no case finished; run regkit evaluate again, it goes on")
    return gather(path.parent, done, about)


def _processes() -> int:
    """One for each CPU, as long as each has 3 GB, twice what a 1 mm head needs: whole cases side by side take less time than the
    threads of one."""
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):  # Windows
        memory = 8e9
    return max(1, min(os.cpu_count() or 1, int(memory / 3e9)))


def _methods(given: Mapping[str, Method | str]) -> dict[str, Method]:
    if not isinstance(given, Mapping):
        raise OptionError(f"methods: a {type(given).__name__}; expected names and what they stand for, such as {{\"ants\": \"runs/ants\"}}")
    tools: dict[str, Method] = {}
    for name, method in given.items():
        if not name or not name.replace("-", "").replace("_", "").replace(".", "").isalnum() or name in ("cases", "views", "before"):
            raise OptionError(f"methods: {name!r} is no name for one; use letters, digits, - and _ (not cases, views or before)")
        if isinstance(method, (str, Path)):
            path = home(method)
            if not folder_there(path):
                raise OptionError(f"methods: {name}: {path} is no folder; expected the folder of its results, one folder a case in it")
            method = path.absolute()
        elif not isinstance(method, Settings) and not callable(method):
            raise OptionError(f"methods: {name}: a {type(method).__name__}; expected a folder, Settings or a function")
        tools[name] = method
    if not tools:
        raise OptionError("methods: none given; expected at least one")
    return tools


def _claim(folder: Path, overwrite: bool) -> None:
    """Refuse a folder that is not an evaluation's; one that is goes on, or with `overwrite` is scored anew."""
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"output: {folder} is a file; choose a folder")
    try:
        there = {path.name for path in folder.iterdir()} if folder.exists() else set()
        if there and MARK not in there:
            raise OutputError(f"output: {folder} holds {sorted(there)[0]} and is no evaluation's; choose another folder")
        (folder / "cases").mkdir(parents=True, exist_ok=True)
        for path in (folder / "cases").glob("*.json") if overwrite else ():
            path.unlink()
    except OutputError:
        raise
    except OSError as error:
        raise OutputError(f"output: {folder} cannot be written: {error.strerror or error}; choose another place") from error


def _score(jobs: Sequence[Job], count: int, progress: Told | None) -> None:
    """Every job that is not done; a process that dies is the case's failure."""
    tell = progress or (lambda done, total, name: None)
    waiting = [job for job in jobs if not job.done()]
    finished = len(jobs) - len(waiting)
    tell(finished, len(jobs), "")
    here = any(callable(method) for job in jobs for method in job.methods.values()) or len(waiting) == 1
    for done in _in_turn(waiting) if here else run(work, waiting, min(count, len(waiting))) if waiting else ():
        job = waiting[done.index]
        if done.error is not None:
            write_lost(job, done.error)
        finished += 1
        tell(finished, len(jobs), job.case.id)


def _in_turn(jobs: Sequence[Job]) -> Iterable[Done]:
    """In this process: a function may not pickle, and one case is not worth another process."""
    for index, job in enumerate(jobs):
        try:
            work(replace(job, threads=None))
            yield Done(index)
        except Exception as error:
            yield Done(index, error=reason_of(error))


def _capture(cases: Sequence[Case], tools: Mapping[str, Method], folder: Path, count: int) -> None:
    """Whether turned copies of listed pairs were captured: Dice at least 0.95 of what the unturned map gives on the same turned
    labels, or TRE at most 1.5 times the unturned one's (or 1 mm); written into the cases' scores."""
    by_id = {case.id: case for case in cases}
    turned = [case for case in cases if case.of in by_id and case.truth]
    wanted = [(name, case) for case in turned for name, method in tools.items() if not callable(method)]
    jobs = [Turned(case, by_id[case.of], tools[name] if isinstance(tools[name], Path) else folder / name) for name, case in wanted]  # type: ignore[arg-type]
    if not jobs:
        return
    scores = {case.key: json.loads((folder / "cases" / f"{case.key}.json").read_text(encoding="utf-8")) for case in
              {c.key: c for case in turned for c in (case, by_id[case.of])}.values()}
    for done in run(reference, jobs, min(count, len(jobs))):
        name, case = wanted[done.index]
        row = next(r for r in scores[case.key]["rows"] if r["method"] == name)
        home = next(r for r in scores[by_id[case.of].key]["rows"] if r["method"] == name)
        row["angle"], row["reference_dice"], row["reference_tre_mm"] = case.angle, done.value, home.get("tre_mm")
        row["captured"] = None
        if row["status"] != "ok":
            row["captured"] = False
        elif row.get("tre_mm") is not None and home.get("tre_mm") is not None:
            row["captured"] = row["tre_mm"] <= max(ENOUGH_TRE * home["tre_mm"], ENOUGH_UNIT)
        elif row.get("dice") is not None and done.value is not None:
            row["captured"] = row["dice"] >= ENOUGH_DICE * done.value
    for case in turned:
        write_json(folder / "cases" / f"{case.key}.json", scores[case.key])

