"""Tables and figures of what run.py, poses.py --score and scaling.py wrote.

    python pipelines/benchmark/report.py RESULTS... -o FOLDER [--pairs PAIRS.json]

Writes FOLDER/tables.md, and with matplotlib (regkit's extra "report") capture.png and scaling.png. With --pairs all tools' maps in
RESULTS are measured by `regkit.evaluate`, too: FOLDER/evaluation/ holds its tables, and report.html with the worst cases first.
"""

from __future__ import annotations

import argparse
import csv
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import mean, median

Row = dict[str, str]
DICE_LOST, TRE_LOST = 0.8, 1.5  # a failure: that much worse than the best tool on the pair


def read(folders: list[Path], name: str) -> list[Row]:
    rows = []
    for folder in folders:
        if (folder / name).exists():
            with (folder / name).open(newline="", encoding="utf-8") as file:
                rows += list(csv.DictReader(file))
    return rows


def table(head: list[str], lines: Iterable[list[str]]) -> str:
    cells = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in cells) + "\n"


def number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def summary(values: Iterable[str | None], way: Callable[[list[float]], float]) -> float | None:
    known = [float(v) for v in values if v not in (None, "")]
    return way(known) if known else None


class Results:
    """Rows by pair and tool; repeats of one run are joined by their medians."""

    def __init__(self, rows: list[Row]) -> None:
        self.tools = sorted({row["tool"] for row in rows}, key=lambda t: (t != "regkit", t))
        self.groups = list(dict.fromkeys(row["group"] for row in rows))
        self.of: dict[tuple[str, str], Row] = {}
        for key in dict.fromkeys((row["id"], row["tool"]) for row in rows):
            same = [row for row in rows if (row["id"], row["tool"]) == key]
            joined = dict(same[0])
            for column in ("dice", "tre", "seconds", "peak_mb"):
                middle = summary((row[column] for row in same), median)
                joined[column] = "" if middle is None else str(middle)
            joined["status"] = "failed" if all(row["status"] in ("failed", "late") for row in same) else "ok"
            self.of[key] = joined

    def rows(self, tool: str, group: str | None = None) -> list[Row]:
        return [row for row in self.of.values() if row["tool"] == tool and group in (None, row["group"])]

    def lost(self, row: Row) -> bool:
        """Whether this run failed: without a result, or far behind the best tool on the pair."""
        others = [r for r in self.of.values() if r["id"] == row["id"]]
        best_dice, best_tre = summary((r["dice"] for r in others), max), summary((r["tre"] for r in others), min)
        if row["status"] != "ok":
            return True
        return bool((best_dice is not None and row["dice"] and float(row["dice"]) < DICE_LOST * best_dice)
                    or (best_tre is not None and row["tre"] and float(row["tre"]) > TRE_LOST * best_tre))


def accuracy(results: Results) -> str:
    """Mean Dice and TRE by group and tool over the pairs that all tools finished, so that the means are of the same pairs."""
    lines = []
    for group in results.groups:
        rows = {tool: results.rows(tool, group) for tool in results.tools}
        ids = [{row["id"] for row in own if row["status"] == "ok"} for own in rows.values()]
        shared = set.intersection(*([one for one in ids if one] or [set()]))  # a tool that finished none does not empty the table
        for k, (tool, own) in enumerate((t, r) for t, r in rows.items() if r):
            used = [row for row in own if row["id"] in shared]
            if k == 0:
                before = summary((r["dice_before"] for r in used), mean), summary((r["tre_before"] for r in used), mean)
                lines.append([group, "*before*", str(len(shared)), number(before[0], 3), number(before[1], 2), "", ""])
            lines.append([group, tool, str(len(used)), number(summary((r["dice"] for r in used), mean), 3),
                          number(summary((r["tre"] for r in used), mean), 2),
                          f"{sum(results.lost(row) for row in own)} of {len(own)}",
                          number(summary((r["seconds"] for r in own), median), 1)])
    return table(["group", "tool", "pairs", "mean Dice", "mean TRE", "failures", "median s"], lines)


def one_millimetre_brain(row: Row) -> bool:
    return row["group"].startswith("brain") and row["ndim"] == "3" and 0.9 <= float(row["spacing"]) <= 1.1


def cost(results: Results) -> str:
    """Time and memory, and how many times longer each peer takes on the pairs that both have."""
    over_brains = any(one_millimetre_brain(row) for row in results.of.values())
    lines = []
    for tool in results.tools:
        rows = {r["id"]: r for r in results.rows(tool) if r["status"] == "ok" and (not over_brains or one_millimetre_brain(r))}
        ours = {r["id"]: r for r in results.rows("regkit") if r["status"] == "ok" and r["id"] in rows}
        here, there = summary((r["seconds"] for r in ours.values()), median), summary((rows[i]["seconds"] for i in ours), median)
        share = "" if tool == "regkit" or not here or not there else f"{here / there:.3f}"
        lines.append([tool, str(len(rows)), number(summary((r["seconds"] for r in rows.values()), median), 2),
                      number(summary((r["peak_mb"] for r in rows.values()), median), 0), share, str(len(ours)) if share else ""])
    title = "3D brains of 1 mm" if over_brains else "all pairs"
    return f"Over {title}.\n\n" + table(
        ["tool", "pairs", "median s", "median peak MB", "regkit's median s / this tool's", "pairs of both"], lines)


def stages(rows: list[Row]) -> str:
    """Median seconds of each part of regkit's work."""
    lines = []
    for group in dict.fromkeys(row["group"] for row in rows):
        given = [json.loads(row["stages"]) for row in rows if row["group"] == group and row.get("stages")]
        names = dict.fromkeys(name for one in given for name in one)
        lines += [[group, ", ".join(f"{name} {median(one.get(name, 0.0) for one in given):.2f}" for name in names)]] if given else []
    return table(["group", "median seconds by stage"], lines)


def figures(captured: list[Row], scaled: list[Row], folder: Path) -> list[str]:
    """The pictures there is data for; a word where matplotlib is missing."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        print("matplotlib is missing, so no figures: pip install 'regkit[report]'")
        return []
    made = []
    if captured:
        figure, axes = pyplot.subplots(figsize=(6, 3.5), layout="constrained")
        for tool in dict.fromkeys(row["tool"] for row in captured):
            own = sorted((float(r["angle"]), 100 * float(r["share"])) for r in captured if r["tool"] == tool)
            axes.plot(*zip(*own, strict=True), marker="o", label=tool, linewidth=2.5 if tool == "regkit" else 1.2)
        axes.set(xlabel="turn (°)", ylabel="captured (%)", ylim=(-3, 103))
        axes.legend()
        figure.savefig(folder / "capture.png", dpi=150)
        made.append("capture.png")
    done = [row for row in scaled if row["status"] == "ok"]
    if done:
        figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
        done.sort(key=lambda row: int(row["voxels"]))
        voxels = [int(row["voxels"]) for row in done]
        left.loglog(voxels, [float(r["seconds"]) for r in done], "o-", label="whole command")
        left.loglog(voxels, [float(r["align_seconds"]) for r in done], "s--", label="align")
        left.set(xlabel="voxels", ylabel="seconds")
        left.legend()
        right.loglog(voxels, [float(r["peak_mb"]) for r in done], "o-")
        right.set(xlabel="voxels", ylabel="peak MB")
        figure.savefig(folder / "scaling.png", dpi=150)
        made.append("scaling.png")
    return made


def evaluation(pairs: Path, results: list[Path], tools: list[str], folder: Path) -> Path:
    """The page of all tools, by their maps; what a tool did not finish counts as failed."""
    import numpy as np

    import regkit
    import regkit.evaluation

    def reader(tool: str) -> Callable[[regkit.evaluation.Case], np.ndarray]:
        def matrix(case: regkit.evaluation.Case) -> np.ndarray:
            for path in (folder / case.id / tool / "matrix.txt" for folder in results):
                if path.exists():
                    return np.loadtxt(path)
            raise FileNotFoundError(f"{tool} left no matrix.txt")

        return matrix

    run = {place.name for folder in results for place in folder.iterdir() if place.is_dir()}
    cases = [case for case in regkit.evaluation.read_cases(pairs) if case.id in run]
    found = regkit.evaluate(cases, {tool: reader(tool) for tool in tools}, output=folder, baseline="regkit" if "regkit" in tools else None,
                            title="Benchmark", progress=lambda done, total, name: print(f"{done}/{total} {name}"))
    return found.report(folder / "report.html", overwrite=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+", help="folders with results.csv, capture.csv or scaling.csv")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--pairs", type=Path, help="the pairs that were run: write a page with their pictures, too")
    given = parser.parse_args()
    rows, captured, scaled = (read(given.results, name) for name in ("results.csv", "capture.csv", "scaling.csv"))
    if not rows and not captured and not scaled:
        raise SystemExit("no results.csv, capture.csv or scaling.csv in these folders")
    given.output.mkdir(parents=True, exist_ok=True)
    parts = ["# Benchmark\n"]
    rows = [row for row in rows if row["status"] != "skipped"]
    if rows:
        results = Results(rows)
        versions = sorted({f"{row['tool']} {row['version']}" for row in rows})
        threads = sorted({row["threads"] for row in rows})
        parts += [f"{', '.join(versions)}; {' and '.join(threads)} threads for every tool.\n", "## Accuracy\n",
                  "Means are over the pairs that every tool finished. TRE in mm, on pictures in pixels. A failure is a run without a "
                  f"result, a Dice below {DICE_LOST} × or a TRE above {TRE_LOST} × the best tool's on the pair.\n", accuracy(results),
                  "## Time and memory\n", cost(results), "## Stages of regkit\n", stages(rows)]
    if captured:
        angles = sorted({row["angle"] for row in captured}, key=float)
        lines = []
        for tool in dict.fromkeys(row["tool"] for row in captured):
            own = {row["angle"]: f"{row['captured']}/{row['cases']}" for row in captured if row["tool"] == tool}
            lines.append([tool, *[own.get(angle, "–") for angle in angles]])
        parts += ["## Capture of turned scans\n", table(["tool", *[f"{angle}°" for angle in angles]], lines)]
    if scaled:
        columns = ["size", "spacing", "seconds", "align_seconds", "peak_mb", "error_mm"]
        parts += ["## Size\n", table(columns, ([row[c] or "–" for c in columns] for row in scaled))]
    parts += [f"![{name}]({name})\n" for name in figures(captured, scaled, given.output)]
    (given.output / "tables.md").write_text("\n".join(parts), encoding="utf-8")
    print(given.output / "tables.md")
    if given.pairs and rows:
        print(evaluation(given.pairs, given.results, Results(rows).tools, given.output / "evaluation"))


if __name__ == "__main__":
    main()
