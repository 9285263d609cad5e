"""Hostile files: mutated scans, transforms, tables and weights, each of which must end in a clear error or in the right answer.

    python pipelines/fuzz/run.py -o OUT [--cases 3000] [--seed 0] [--replay N]

Every case is a valid small file that is changed, and a door of regkit (a function, or a command) through which it goes. Right is an error
of regkit's own in one line that names the file, or a success that another reader of the same file confirms, within 10 s and 2 GB. All
else is a finding: OUT/failed/N holds the file and what was done to it. OUT/cases.jsonl has a line a case, OUT/table.md the counts.

Case N of a seed is the same whatever --cases says, as long as hypothesis is of the same version. --replay N tries case N of OUT again and
says all there is to say. Processes and memory are watched as Linux does it.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # this checkout, not another that is installed

import bombs
from judge import BAD, GOOD, Judge
from recipes import numbered, told
from worker import build


def table(rows: list[dict[str, Any]]) -> str:
    """Counts by format and outcome; the slowest and the largest."""
    counts: dict[str, Counter[str]] = {}
    for row in rows:
        words = row["recipe"]["seed"].split()
        name = " ".join(words[:2]) if words[0] in ("bomb", "outside", "pickle") else words[0]
        counts.setdefault(name, Counter())[row["outcome"]] += 1
    shown = [*GOOD, *(name for name in BAD if any(row["outcome"] == name for row in rows))]
    lines = ["| format | cases | " + " | ".join(shown) + " |", "|---|" + "---|" * (1 + len(shown))]
    for name, found in [*sorted(counts.items()), ("all", sum(counts.values(), Counter()))]:
        lines.append(f"| {name} | {found.total()} | " + " | ".join(str(found[outcome]) for outcome in shown) + " |")
    timed = [row for row in rows if "seconds" in row and "peak" in row]
    lines.append("")
    for what, key, unit, factor in (("slowest", "seconds", "s", 1.0), ("largest", "peak", "MB", 1e6)):
        for row in sorted(timed, key=lambda row: row[key])[: -4:-1]:
            lines.append(f"- {what}: {row[key] / factor:.1f} {unit}, case {row['n']}, {told(row['recipe'])}")
    return "\n".join(lines)


def keep(row: dict[str, Any], folder: Path) -> None:
    """The file of a failing case, and all that is known of it."""
    place = folder / "failed" / str(row["n"])
    shutil.rmtree(place, ignore_errors=True)
    (place / "here").mkdir(parents=True)
    if bombs.made(row["recipe"]["seed"]).length == 0:
        build(row["recipe"], place / "here")
    (place / "case.json").write_text(json.dumps(row, indent=1) + "\n", encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--cases", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--replay", type=int)
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    with Judge() as judge:
        if options.replay is not None:
            lines = (options.output / "cases.jsonl").read_text(encoding="utf-8").splitlines()
            row = json.loads(lines[options.replay])
            row.update(judge(row["recipe"]))
            keep(row, options.output)
            print(told(row["recipe"]), json.dumps(row, indent=1), sep="\n")
            return int(row["outcome"] in BAD)
        rows, began = [], time.monotonic()
        with (options.output / "cases.jsonl").open("w", encoding="utf-8") as file:
            for n, recipe in enumerate(numbered(options.seed, options.cases)):
                row = {"n": n, "recipe": recipe, **judge(recipe)}
                rows.append(row)
                print(json.dumps(row), file=file, flush=True)
                if row["outcome"] in BAD:
                    keep(row, options.output)
                    print(f"{n} {row['outcome']}: {told(recipe)}\n    {row['why'].strip().splitlines()[-1] if row['why'].strip() else ''}",
                          file=sys.stderr)
                if n % 250 == 249:
                    print(f"{time.monotonic() - began:6.0f} s  {n + 1}/{options.cases}", file=sys.stderr, flush=True)
    (options.output / "table.md").write_text(table(rows) + "\n", encoding="utf-8")
    print(table(rows))
    return int(any(row["outcome"] in BAD for row in rows))


if __name__ == "__main__":
    sys.exit(main())
