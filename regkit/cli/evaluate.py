"""`regkit evaluate`: a table of pairs in; Dice, TRE and more of one or several methods out, as tables and one page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from regkit.cli.console import Console
from regkit.errors import OptionError
from regkit.registration.settings import Settings

EXIT_SOME_FAILED, EXIT_INTERRUPTED = 3, 130


def evaluate(
    pairs: Annotated[list[Path], Parameter(
        help="The pairs: .csv or .json (see data/README.md), or a Learn2Reg *_dataset.json or its folder; one or several.")],
    /,
    *,
    output: Annotated[Path, Parameter(name=["--output", "-o"],
                                      help="Folder for tables, page, scores and alignments; goes on where it stopped.")],
    align: Annotated[bool, Parameter(help="Register every pair first; the method is called regkit.")] = False,
    method: Annotated[list[str] | None, Parameter(
        help="NAME=DIR: another tool's results, DIR/<id>/transform.tfm, or displacement.nii.gz, or labels.nii.gz and points.csv; "
             "may be repeated.")] = None,
    baseline: Annotated[str | None, Parameter(help="The method that the others are tested against.")] = None,
    settings: Annotated[Settings, Parameter(name="*")] = Settings(),
    tolerance: Annotated[float, Parameter(help="Of surface Dice, mm.")] = 1.0,
    distances: Annotated[bool, Parameter(negative="--no-distances", help="Measure surface distances, too.")] = True,
    jobs: Annotated[int | None, Parameter(
        name=["--jobs", "-j"], help="Processes; by default one a CPU, if each has 3 GB of memory.")] = None,
    html: Annotated[bool, Parameter(negative="--no-html", help="Write report.html.")] = True,
    overwrite: Annotated[bool, Parameter(help="Measure everything anew; alignments of the same scans and settings are kept.")] = False,
    quiet: Annotated[bool, Parameter(help="Say nothing but errors.")] = False,
) -> int:
    """Measure how well pairs of scans are aligned, and write tables and a page with pictures.

    Without --align and --method the pairs are measured as their headers put them.
    Exit codes: 0 done, 2 a wrong option or input, 3 done, but some cases failed, 130 interrupted (the same command goes on).
    """
    from regkit.evaluation.evaluate import evaluate as run
    from regkit.evaluation.result import number

    console = Console(quiet=quiet)
    methods: dict[str, object] = {"regkit": settings} if align else {}
    for given in method or ():
        name, sign, folder = given.partition("=")
        if not sign or not folder:
            raise OptionError(f"method: {given!r}; expected NAME=DIR, such as ants=runs/ants")
        if name in methods:
            raise OptionError(f"method: {name} is given twice; give every method its own name")
        methods[name] = Path(folder)
    if others := sorted(set(_earlier(output)) - set(methods)) if not methods else []:
        console.warn(f"{output} holds results of {', '.join(others)}; without --align and --method the tables will show the headers' "
                     "alignment only")
    try:
        with console.count() as progress:
            found = run(pairs, methods or {"header": _as_it_lies}, output=output, baseline=baseline,  # type: ignore[arg-type]
                        tolerance=tolerance, distances=distances, pictures=html, jobs=jobs, overwrite=overwrite,
                        title=f"Evaluation of {', '.join(path.name for path in pairs)}", progress=progress)
    except KeyboardInterrupt:
        console.warn(f"interrupted; what is done lies in {output}, and the same command goes on from there")
        return EXIT_INTERRUPTED
    if html:
        found.report(output / "report.html", overwrite=True)
    for row in found.record()["table"]:
        if row["group"] == "all" and row["measure"] in ("dice", "hd95_mm", "tre_mm", "tre_px"):
            before = "" if row["before"] is None else f", before {number(row['before'])}"
            spread = f"({number(row['low'])} to {number(row['high'])})"
            console.say(f"{row['method']:12} {row['measure']:8} {number(row['mean'])} {spread}{before}; {row['n']} cases")
    for row in found.failed.to_dict("records"):
        console.warn(f"{row['id']} ({row['method']}) failed: {row['reason']}")
    console.say(f"written to   {output}")
    if html:
        console.say(f"report       {output / 'report.html'}")
    return EXIT_SOME_FAILED if len(found.failed) else 0


def _earlier(folder: Path) -> list[str]:
    """The methods of an evaluation that lies in the folder."""
    try:
        return list(json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))["methods"])
    except (OSError, ValueError, KeyError, TypeError):
        return []


def _as_it_lies(case):
    """The identity: where the headers put the scans."""
    from regkit.io import read_image
    from regkit.space import Matrix

    return Matrix.identity(read_image(case.fixed, name="fixed").ndim)
