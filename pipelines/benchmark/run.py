"""Register pairs with regkit and with other tools, one after the other, and score and time them alike.

    python pipelines/benchmark/run.py PAIRS.json -o RESULTS [--tools regkit,greedy] [--only brain-t1] [--python greedy=PATH]

RESULTS/results.csv has one row per pair, tool and repeat; RESULTS/ID/TOOL/ holds matrix.txt (fixed → moving, RAS mm) and log.txt.
A second call goes on where the first stopped; delete rows to have them run again.
"""

from __future__ import annotations

import argparse
import csv
import json
import multiprocessing
import shlex
import shutil
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import measure
import numpy as np
import scoring
import tools

COLUMNS = ["id", "group", "tool", "version", "status", "dice_before", "dice", "tre_before", "tre", "seconds", "peak_mb", "repeat",
           "threads", "ndim", "voxels", "spacing", "stages"]
FAILED = 3  # regkit's exit code of a result that is written, but whose verdict is FAIL


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pairs", type=Path, help="JSON list of pairs, paths relative to its folder")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--tools", default="regkit,greedy,elastix,ants,sitk", help=f"of {','.join(tools.TOOLS)}")
    parser.add_argument("--only", help="ids or groups, with commas between them")
    parser.add_argument("--threads", type=int, default=2, help="for every tool alike")
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--limit", type=float, default=3600, help="seconds after which a run counts as failed")
    parser.add_argument("--python", action="append", default=[], metavar="NAME=PATH", help="the interpreter that has a tool's package")
    given = parser.parse_args()
    unknown = set(given.tools.split(",")) - set(tools.TOOLS)
    if unknown:
        parser.error(f"--tools: {', '.join(sorted(unknown))} not known; use some of {', '.join(tools.TOOLS)}")
    return given


def finished(table: Path) -> set[tuple[str, str, int]]:
    """What an earlier call has done."""
    if not table.exists():
        with table.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerow(COLUMNS)
    with table.open(newline="", encoding="utf-8") as file:
        return {(row["id"], row["tool"], int(row["repeat"])) for row in csv.DictReader(file)}


def write(table: Path, row: dict[str, Any]) -> None:
    """One row, at once, so that nothing is lost if the run is cut off."""
    tidy = {k: round(v, 4) if isinstance(v, float) else "" if v is None else v for k, v in row.items()}
    with table.open("a", newline="", encoding="utf-8") as file:
        csv.DictWriter(file, COLUMNS).writerow(tidy)


def readable(pair: scoring.Pair) -> bool:
    """Whether every peer can read the pair: all volumes are NIfTI; 2D scans are written so for them."""
    return pair["ndim"] == 2 or all(pair[k].endswith((".nii", ".nii.gz")) for k in ("fixed", "moving"))


def inputs(pair: scoring.Pair, peer: bool, folder: Path, scorer: ProcessPoolExecutor) -> tuple[Path, Path]:
    """The two files a tool gets: the pair's own; 2D ones for peers as plain NIfTI, made once and outside the measured time."""
    if not peer or pair["ndim"] == 3:
        return Path(pair["fixed"]), Path(pair["moving"])
    for name in ("fixed", "moving"):
        if not (folder / f"{name}.nii").exists():
            folder.mkdir(parents=True, exist_ok=True)
            scorer.submit(scoring.flat_nifti, pair[name], str(folder / f"{name}.nii")).result()
    return folder / "fixed.nii", folder / "moving.nii"


def register(pair: scoring.Pair, name: str, found: tools.Found, folder: Path, files: tuple[Path, Path],
             given: argparse.Namespace) -> tuple[dict[str, Any], np.ndarray | None]:
    """One measured run: the columns it fills, and its matrix if it came to one."""
    tool, target = tools.TOOLS[name], folder / name
    target.mkdir(parents=True, exist_ok=True)
    (target / "log.txt").unlink(missing_ok=True)
    row: dict[str, Any] = {"status": "ok"}
    matrix = None
    with tempfile.TemporaryDirectory() as place:
        out = Path(place)
        commands = tool.command(found, *files, out, given.threads, pair["ndim"])
        cost = measure.run(commands, target / "log.txt", given.threads, given.limit)
        row.update(seconds=cost.seconds, peak_mb=cost.peak_mb)
        try:
            matrix = tool.read(out, pair["ndim"])
            np.savetxt(target / "matrix.txt", matrix)
        except (OSError, ValueError, KeyError):
            row["status"] = "late" if cost.code == 124 else "failed"
        if matrix is not None and cost.code:
            row["status"] = "verdict FAIL" if name == "regkit" and cost.code == FAILED else "failed"
        record = out / "result" / "registration.json"
        if record.exists():
            shutil.copy(record, target)
            row["stages"] = json.dumps(json.loads(record.read_text(encoding="utf-8"))["seconds"])
    return row, matrix if row["status"] in ("ok", "verdict FAIL") else None


def describe(output: Path, there: dict[str, tools.Found], missing: list[str], threads: int) -> None:
    """commands.txt: what is called, with which version, in 2D and 3D."""
    lines = []
    for name, found in there.items():
        lines.append(f"{name} {found.version}")
        for ndim in (3, 2):
            commands = tools.TOOLS[name].command(found, Path("FIXED"), Path("MOVING"), Path("OUT"), threads, ndim)
            lines += [f"  {ndim}D: {shlex.join(c)}" for c in commands]
    lines += [f"{name}: not installed" for name in missing]
    (output / "commands.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> None:
    given = options()
    given.output.mkdir(parents=True, exist_ok=True)
    table = given.output / "results.csv"
    pythons = dict(word.split("=", 1) for word in given.python)
    there, missing = tools.find(given.tools.split(","), pythons)
    describe(given.output, there, missing, given.threads)
    for name in missing:
        print(f"{name}: {tools.TOOLS[name].package} is not installed; install it, or give --python {name}=PATH", flush=True)
    pairs = scoring.read_pairs(given.pairs, set(given.only.split(",")) if given.only else None)
    if not pairs:
        raise SystemExit("no pairs are left; look at --only")
    done = finished(table)
    measure.bind(given.threads)
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as scorer:
        for repeat in range(given.repeat):
            for k, pair in enumerate(pairs):
                order = list(there)[:: 1 if (k + repeat) % 2 == 0 else -1]  # no tool always finds the files in the cache
                order = [name for name in order if (pair["id"], name, repeat) not in done]
                facts = scorer.submit(scoring.facts, pair).result() if order else {}
                for name in order:
                    folder = given.output / pair["id"]
                    peer = tools.TOOLS[name].peer
                    if peer and not readable(pair):
                        measured, matrix = {"status": "skipped"}, None
                    else:
                        files = inputs(pair, peer, folder / "inputs", scorer)
                        measured, matrix = register(pair, name, there[name], folder, files, given)
                    scores = scorer.submit(scoring.score, pair, matrix).result() if matrix is not None else {}
                    row = {"id": pair["id"], "group": pair["group"], "tool": name, "version": there[name].version, "repeat": repeat,
                           "threads": given.threads, "ndim": pair["ndim"], **facts, **measured, **scores}
                    write(table, row)
                    said = " ".join(f"{c} {row[c]:.4g}" for c in ("dice", "tre", "seconds", "peak_mb") if row.get(c) is not None)
                    print(f"{pair['id']} {name} {row['status']} {said}", flush=True)
                shutil.rmtree(given.output / pair["id"] / "inputs", ignore_errors=True)


if __name__ == "__main__":
    main()
