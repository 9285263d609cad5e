"""Register thousands of cases with known truth, and write down the evidence about each map and how good it is.

    python pipelines/calibrate_verdict/run.py PAIRS.json [MORE.json ...] -o OUT [--cases 3000] [--seed 0] [--jobs 2] [--minutes 100]
        [--device cpu] [--accept | --moved EARLIER]
    python pipelines/calibrate_verdict/fit.py PAIRS.json [MORE.json ...] --cases OUT [MORE ...] -o VERDICT

PAIRS.json as for regkit evaluate, with groups. The first cases are the pairs as they are; then pairs turned, under other contrasts, cut,
begun well and badly; pairs of scans of different anatomies; scans spoilt. Writes OUT/cases.jsonl, a line a case, and goes on where it
stopped.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import cases
import torch

import regkit

_STATE: dict[str, Any] = {}


def read(tables: list[Path]) -> list[cases.Pair]:
    """The pairs of all tables, paths made absolute."""
    found = []
    for table in tables:
        for pair in json.loads(table.read_text(encoding="utf-8")):
            names = {k: str(table.resolve().parent / v) for k, v in pair.items() if k.split("_")[0] in ("fixed", "moving")}
            found.append({"group": "all", **pair, **names})
    return found


def prepare(tables: list[Path], seed: int, device: str, way: str, best: dict[str, list]) -> None:
    torch.set_num_threads(1)
    maps = {k: torch.tensor(v, dtype=torch.float64)[None] for k, v in best.items()}
    _STATE.update(pairs=read(tables), seed=seed, device=device, way=way, best=maps)


def measured(number: int) -> dict[str, Any]:
    """One case done: what it was, the evidence, the truth."""
    pairs = _STATE["pairs"]
    accept = _STATE["way"] == "accept"
    case = (cases.accepted(number, pairs, _STATE["seed"]) if accept else
            cases.case(number, pairs, _STATE["seed"], _STATE["best"], _STATE["way"] == "moved"))
    row: dict[str, Any] = {"case": number, "kind": case.kind, "group": case.group, "id": case.id, "start": case.start, "model": case.model,
                           "variant": case.variant, "turn": round(case.turn, 3), "seed": case.seed}
    options: dict[str, Any] = {"start": case.start, "model": case.model, "threads": 1, "device": _STATE["device"], "no_retry": not accept}
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        if case.given is not None:
            path = Path(folder) / "given.json"
            regkit.write_transform(regkit.Matrix(case.given), path)
            options |= {"start": str(path), "levels": "auto" if case.start == "begun" else "0"}
        elif case.start == "bare":
            options |= {"start": "auto", "levels": "0"}
        try:
            found = regkit.align(case.fixed, case.moving, **options)
        except regkit.RegkitError as refused:
            return {**row, "refused": str(refused)}
    row["seconds"] = round(time.perf_counter() - began, 3)
    map = torch.linalg.inv(case.moving_laid) @ torch.tensor(found.matrix)[None] @ case.fixed_laid
    row |= {"matrix": map[0].tolist(), **{key: found.trace[key] for key in ("evidence", "guard", "attempts")},
            "edge": round(cases.edge(case.fixed), 4), "mm": [round(v, 5) for v in found.trace["levels_mm"]]}
    if case.kind in ("plain", "related", "turned"):
        pair = next(pair for pair in pairs if pair["id"] == case.id)
        row |= {"dice": cases.overlap(pair, map), "tre": cases.error(pair, map), "centres": cases.centres(pair, map)}
    return row


def guarded(number: int) -> dict[str, Any]:
    try:
        return measured(number)
    except Exception as failure:  # a case that breaks must be seen, not end the others
        return {"case": number, "failed": f"{type(failure).__name__}: {failure}"}


def done(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def pending(path: Path, numbers: range) -> list[int]:
    known = {row["case"] for row in done(path)}
    return [number for number in numbers if number not in known]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tables", type=Path, nargs="+")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--cases", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--minutes", type=float, default=1e6)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--accept", action="store_true", help="the pairs as they are, turned, and 200 that cannot be aligned; no others")
    parser.add_argument("--moved", type=Path, metavar="EARLIER", help="only the maps that an earlier run found for the pairs as they are, "
                        "moved a little or far and judged as they are: seconds a case")
    given = parser.parse_args()
    given.output.mkdir(parents=True, exist_ok=True)
    path, count, until = given.output / "cases.jsonl", len(read(given.tables)), time.monotonic() + 60 * given.minutes
    last = count * (1 + len(cases.POSES)) + cases.STRANGE if given.accept else given.cases
    way = "accept" if given.accept else "moved" if given.moved else ""
    for numbers in (range(0 if given.moved else count), range(count, last)):  # the pairs as they are tell where the given starts are
        found = done(given.moved / "cases.jsonl" if given.moved else path)
        best = {row["id"]: row["matrix"] for row in found if row.get("kind") == "plain" and "matrix" in row}
        with multiprocessing.get_context("spawn").Pool(given.jobs, prepare, (given.tables, given.seed, given.device, way, best),
                                                       maxtasksperchild=200) as pool, path.open("a", encoding="utf-8") as file:
            for row in pool.imap_unordered(guarded, pending(path, numbers), chunksize=1):
                file.write(json.dumps(row) + "\n")
                file.flush()
                if time.monotonic() > until:
                    pool.terminate()
                    break
    rows = done(path)
    print(f"{len(rows)} cases in {path}, {sum('failed' in row for row in rows)} failed")


if __name__ == "__main__":
    main()
