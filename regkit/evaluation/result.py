"""A finished evaluation: its tables, files and page."""

from __future__ import annotations

import html
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from regkit.errors import FormatError
from regkit.evaluation.statistics import MEASURES, DataFrame, by_unit, capture, compare, ranks, success, table
from regkit.io import output_file
from regkit.report.cohort import before_name

FIRST = ("id", "group", "method", "status", "dice_before", "dice", "hd95_before_mm", "hd95_mm", "tre_before_mm", "tre_mm")


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Tables (pandas): `cases`, one row a case and method; `labels` and `points`, one row each of them; `summary`, one row a group,
    method and measure. about: the methods, the baseline, how it was measured. folder: where scores and pictures lie."""

    cases: DataFrame
    labels: DataFrame
    points: DataFrame
    about: dict[str, Any]
    folder: Path = field(repr=False)

    @property
    def methods(self) -> list[str]:
        return list(self.about["methods"])

    @property
    def summary(self) -> DataFrame:
        import pandas

        return pandas.DataFrame(table(by_unit(self.cases), self.methods))

    @property
    def failed(self) -> DataFrame:
        """The cases that gave no result, and why."""
        return self.cases[self.cases["status"] != "ok"][["id", "group", "method", "reason"]]

    def record(self) -> dict[str, Any]:
        """The content of `summary.json`: the tables of statistics."""
        cases = by_unit(self.cases)
        return {**self.about, "cases": int(cases["id"].nunique()), "failed": _rows(self.failed), "measures": MEASURES,
                "table": table(cases, self.methods), "success": success(cases, self.methods),
                "tests": compare(cases, self.methods, self.about["baseline"]), "ranks": ranks(cases, self.methods),
                "capture": capture(cases, self.methods)}

    def write(self, folder: Path) -> None:
        """cases.csv, labels.csv, points.csv, summary.json and summary.md, each whole or not at all."""
        for name, frame in (("cases", self.cases), ("labels", self.labels), ("points", self.points)):
            with output_file(folder / f"{name}.csv", overwrite=True) as temporary:
                frame.to_csv(temporary, index=False, float_format="%.6g", errors="replace")
        record = plain(self.record())
        with output_file(folder / "summary.json", overwrite=True) as temporary:
            temporary.write_text(json.dumps(record, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        with output_file(folder / "summary.md", overwrite=True) as temporary:
            temporary.write_text(self.markdown(), encoding="utf-8", errors="replace")

    def report(self, path: str | Path, *, overwrite: bool = False) -> Path:
        """Write the page with tables, plots and pictures of all cases, one HTML file without a need of the network."""
        from regkit.report.page import cohort_page

        record = {**self.record(), "cases": _rows(by_unit(self.cases)), "labels": _rows(self.labels), "points": _rows(self.points),
                  "groups": list(dict.fromkeys(self.cases["group"]))}
        views = {}
        for file in sorted((self.folder / "views").glob("*.json")):
            rows = json.loads((self.folder / "cases" / file.name).read_text(encoding="utf-8"))["rows"]
            views |= {f"{method}/{rows[0]['id']}": view for method, view in json.loads(file.read_text(encoding="utf-8")).items()}
        with output_file(path, overwrite=overwrite) as temporary:
            temporary.write_text(cohort_page(plain(record), views), encoding="utf-8", errors="replace")
        return Path(path)

    def markdown(self) -> str:
        """The summary as Markdown tables."""
        cases = by_unit(self.cases)
        rows = table(cases, self.methods)
        parts = [f"# {self.about['title']}\n",
                 f"{self._said()}. regkit {self.about['regkit']}.\n"]
        for group in dict.fromkeys(row["group"] for row in rows):
            parts.append(f"## {group}\n")
            parts.append("| method | measure | n | before | mean ± SD | 95 % of mean | median | worst 30 % | undefined |\n"
                         + "|---" * 9 + "|")
            for row in (r for r in rows if r["group"] == group):
                about = MEASURES[row["measure"]]
                name = about["name"] + (f" ({about['unit']})" if about["unit"] else "")
                spread = f" ± {number(row['sd'])}" if row["sd"] is not None else ""
                parts.append(f"| {row['method']} | {name} | {row['n']} | {number(row['before'])} | {number(row['mean'])}{spread} | "
                             f"{number(row['low'])} to {number(row['high'])} | {number(row['median'])} | {number(row['worst30'])} | "
                             f"{row['undefined'] or ''} |")
            parts.append("")
        compared = compare(cases, self.methods, self.about["baseline"])
        if compared:
            parts.append("## Methods compared\n\nPaired Wilcoxon tests, Holm's correction within a measure; the difference is the median "
                         "of method less against.\n\n| measure | method | against | n | difference | p | p (Holm) |\n" + "|---" * 7 + "|")
            parts += [f"| {MEASURES[r['measure']]['name']} | {r['method']} | {r['against']} | {r['n']} | {number(r['difference'])} | "
                      f"{r['p']:.2g} | {r['p_holm']:.2g} |" for r in compared]
            parts.append("\nMean ranks: " + ", ".join(f"{r['method']} {r['rank']:.2f}" for r in ranks(cases, self.methods)) + "\n")
        if len(self.failed):
            parts.append("## Failed\n")
            parts += [f"- {row.id} ({row.method}): {row.reason}" for row in self.failed.itertuples()]
        return "\n".join(parts) + "\n"

    def _repr_html_(self) -> str:
        head = f"<p><b>{html.escape(self.about['title'])}</b>: {self._said()}</p>"
        wide = self.summary[["group", "method", "measure", "n", "before", "mean", "sd", "median", "worst30"]]
        return head + wide.to_html(index=False, float_format=number, na_rep="")

    def __repr__(self) -> str:
        return f"Evaluation({self._said()}; {', '.join(self.methods)})"

    def _said(self) -> str:
        count, failed = self.cases["id"].nunique(), len(self.failed)
        return f"{count} case{'s' * (count != 1)}, {failed} of {len(self.cases)} registrations failed" if failed else (
            f"{count} case{'s' * (count != 1)}, none failed")


def number(value: Any) -> str:
    """Three or four digits that matter."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "–"
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"


def plain(item: Any) -> Any:
    """Numpy's numbers as Python's, and NaN as None, for JSON."""
    if isinstance(item, dict):
        return {str(k): plain(v) for k, v in item.items()}
    if isinstance(item, (list, tuple)):
        return [plain(v) for v in item]
    if hasattr(item, "item") and getattr(item, "ndim", 1) == 0:
        item = item.item()
    return None if isinstance(item, float) and not math.isfinite(item) else item


def _rows(frame: DataFrame) -> list[dict[str, Any]]:
    return [plain(row) for row in frame.to_dict("records")]


def gather(folder: Path, keys: list[str], about: dict[str, Any]) -> Evaluation:
    """The evaluation whose cases' scores lie in a folder, in the order of their file names `keys`."""
    import pandas

    parts: dict[str, list[dict[str, Any]]] = {"rows": [], "labels": [], "points": []}
    for key in keys:
        path = folder / "cases" / f"{key}.json"
        try:
            known = json.loads(path.read_text(encoding="utf-8"))
            for name, rows in parts.items():
                rows += known[name]
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise FormatError(f"{path} is not readable: {error}; evaluate once more, which makes it anew") from error
    cases: DataFrame = pandas.DataFrame(parts["rows"])
    for measure, asked in (("hd95_mm", "dice"), ("asd_mm", "dice"), ("tre_mm", "improved")):
        if measure in cases and asked in cases:  # what no field of view bounds: as bad as the worst of that unit is before
            unknown = (cases["status"] != "ok") & cases[measure].isna() & cases[asked].notna()
            for unit in set(cases["unit"][unknown]):
                before = cases[before_name(measure)][cases["unit"] == unit] if before_name(measure) in cases else cases[measure][:0]
                cases.loc[unknown & (cases["unit"] == unit), measure] = before.max()
    order = [name for name in FIRST if name in cases]
    cases = cases[order + [name for name in cases if name not in order]]
    labels = pandas.DataFrame(parts["labels"], columns=None if parts["labels"] else ["id", "method", "label", "dice_before", "dice"])
    points = pandas.DataFrame(parts["points"], columns=None if parts["points"] else ["id", "method", "point", "tre_before_mm", "tre_mm"])
    return Evaluation(cases, labels, points, about, folder)

