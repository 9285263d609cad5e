"""How often mirrored scans are told from those that are not: `regkit.doctor(moving, fixed=fixed)` for the pairs of a table.

    python pipelines/doctor_flip/run.py PAIRS.json -o OUT [--each 1] [--only GROUP_OR_ID,...] [--copies]

PAIRS.json as for regkit evaluate; --each takes so many pairs of a group. Every moving scan is compared as it is, which must give no
finding, and with --copies also as a copy whose voxels lie the other way round under the same header, which should give one; the copies
lie in OUT only while they are looked at. Without --copies the two numbers of a pair are exchanged instead: that costs half the time and
differs by less than 0.01. Writes OUT/pairs.json and OUT/table.md, and prints the table.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import regkit


def chosen(table: Path, each: int, only: set[str]) -> Iterator[dict[str, Any]]:
    """The pairs to look at, the first of every group first."""
    groups: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for pair in json.loads(table.read_text(encoding="utf-8")):
        if not only or {pair["id"], pair.get("group", "")} & only:
            groups[pair.get("group", "")].append(pair)
    for place in range(each):
        yield from (pairs[place] for pairs in groups.values() if place < len(pairs))


def turned_round(scan: Path, folder: Path) -> Path:
    """A copy whose voxels lie the other way round along the axis that runs left to right; of a picture, from side to side."""
    image = regkit.read_image(scan, volume=0)
    axis = next((a for a, letter in enumerate(image.grid.orientation) if letter in "LR"), 0)
    suffix = ".png" if image.pixels else ".nii.gz"
    return regkit.write_image(image.with_data(image.data.flip(2 + axis)), folder / f"copy{suffix}", overwrite=True)


def look(scan: Path, fixed: Path) -> dict[str, Any]:
    """The comparison of one scan and its mirror image."""
    began = time.perf_counter()
    found = regkit.doctor(scan, fixed=fixed, volume=0).mirror
    if found is None:
        raise SystemExit(f"{scan} cannot be read: regkit doctor {scan}")
    return {**found.as_dict(), "seconds": round(time.perf_counter() - began, 1)}


def exchanged(found: dict[str, Any]) -> dict[str, Any]:
    """What a copy that is mirrored would give."""
    other = {"mirrored": "not mirrored", "not mirrored": "mirrored"}
    return {**found, "as_it_is": found["mirrored"], "mirrored": found["as_it_is"],
            "verdict": other.get(found["verdict"], found["verdict"])}


def table(rows: list[dict[str, Any]]) -> str:
    """The pairs, and how many of them gave what."""
    lines = ["| pair | as it is | mirrored | of the scan | of its mirrored copy | seconds |", "|---|---|---|---|---|---|"]
    for row in rows:
        one, copy = row["scan"], row["copy"]
        lines.append(f"| {row['id']} | {one['as_it_is']:.3f} | {one['mirrored']:.3f} | {one['verdict']} | {copy['verdict']} | "
                     f"{one['seconds']:.0f} |")
    wrong, told = (sum(row[what]["verdict"] == "mirrored" for row in rows) for what in ("scan", "copy"))
    return "\n".join([*lines, "", f"Of {len(rows)} scans {wrong} gave a finding; of their mirrored copies {told}."])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pairs", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--each", type=int, default=1)
    parser.add_argument("--only", default="")
    parser.add_argument("--copies", action="store_true")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    for pair in chosen(options.pairs, options.each, set(filter(None, options.only.split(",")))):
        fixed, moving = (options.pairs.parent / pair[side] for side in ("fixed", "moving"))
        scan = look(moving, fixed)
        if options.copies:
            with tempfile.TemporaryDirectory(dir=options.output) as folder:
                copy = look(turned_round(moving, Path(folder)), fixed)
        else:
            copy = exchanged(scan)
        rows.append({"id": pair["id"], "group": pair.get("group", ""), "scan": scan, "copy": copy})
        (options.output / "pairs.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
        (options.output / "table.md").write_text(table(rows) + "\n", encoding="utf-8")
    print(table(rows))


if __name__ == "__main__":
    main()
