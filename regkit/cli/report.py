"""`regkit report`: the page of a finished registration or evaluation, made again from what lies in its folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from regkit.cli.console import Console
from regkit.cli.record import RECORD, find, read_record
from regkit.errors import FormatError, GeometryError, RegkitError

if TYPE_CHECKING:
    from torch import Tensor

    from regkit.image import Image
    from regkit.io import Points
    from regkit.space import Transform

EVALUATION, PAGE = "evaluation.json", "report.html"


def report(
    result: Annotated[Path, Parameter(name="DIR", help="Folder of a registration or an evaluation, or a registration.json.")],
    /,
    *,
    output: Annotated[Path | None, Parameter(
        name=["--output", "-o"], help="File to write; by default report.html in the folder.")] = None,
    overwrite: Annotated[bool, Parameter(help="Replace the file if it is there.")] = False,
    quiet: Annotated[bool, Parameter(help="Say nothing but errors.")] = False,
) -> int:
    """Write one HTML page with pictures and numbers: of one registration, or of a whole evaluation. It needs no other file."""
    from regkit.io import output_file
    from regkit.io.paths import folder_there, there

    console = Console(quiet=quiet)
    folder = result if folder_there(result) else result.parent
    path = output or folder / PAGE
    with output_file(path, overwrite=overwrite) as unfinished:
        if there(result / EVALUATION):
            # by name: evaluation lies in a room of its own, and only who evaluates loads it
            import_module("regkit.evaluation").load(result).report(unfinished)
        else:
            record_path = result / RECORD if folder_there(result) else result
            unfinished.write_text(_pair(record_path, console), encoding="utf-8", errors="replace")
    console.say(f"written to  {path}")
    return 0


@dataclass(frozen=True)
class Shown:
    """What a page shows of what was carried along: a label map of the moving scan, and landmarks known on both sides (P, D)."""

    labels: Image | None = None
    fixed_points: Tensor | None = None
    moving_points: Tensor | None = None

    @staticmethod
    def of(labels: Sequence[Image], fixed: Sequence[Points], moving: Sequence[Points]) -> Shown:
        """The first label map; of the files with points those whose rows go with the rows of the other side's."""
        import torch

        both = [(f.world, m.world) for f, m in zip(fixed, moving, strict=False) if f.world.shape == m.world.shape and _names(f, m)]
        here, there = (torch.cat([pair[side] for pair in both]) if both else None for side in (0, 1))
        return Shown(labels[0] if labels else None, here, there)


def _names(*points: Points) -> bool:
    """Whether row i of all tables has one name, as far as they have names."""
    named = [[row[p.columns.index("name")] for row in p.rows] for p in points if "name" in p.columns]
    return all(names == named[0] for names in named)


def page(record: dict[str, Any], fixed: Image, moving: Image, transform: Transform, shown: Shown) -> str:
    """The page of one registration."""
    from regkit.report.page import pair_page
    from regkit.report.views import view

    return pair_page(record, view(fixed, moving, transform, moving_labels=shown.labels, fixed_points=shown.fixed_points,
                                  moving_points=shown.moving_points))


def _pair(path: Path, console: Console) -> str:
    from regkit.io import read_image, read_points, sha256
    from regkit.space import Matrix

    record = read_record(path)
    volume = (record.get("settings") or {}).get("volume")
    if volume is not None and type(volume) is not int:
        raise FormatError(f"record: {path} says volume {str(volume)[:100]!r}; run regkit register again")
    scans = {}
    for name in ("fixed", "moving"):
        item = record["inputs"][name]
        file = find(item.get("path"), name, path)
        scans[name] = read_image(file, volume=volume, name=name)
        if item.get("sha256") and sha256(file) != item["sha256"]:
            console.warn(f"{name}: {file} has changed since the registration; the pictures show what it holds now")
    try:
        transform = Matrix(record["matrix"])
    except (GeometryError, TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise FormatError(f"record: {path} holds a matrix that is none: {' '.join(str(error).split())[:300]}; run regkit register again") \
            from error
    carried = record.get("carried") or {}

    def points(side: str) -> list[Points]:
        return [read_points(find(file, f"{side}-points", path), space=carried.get("points_space", "ras"), image=scans[side],
                            ndim=scans[side].ndim, name=f"{side}-points") for file in carried.get(f"{side}_points") or []]

    labels = [read_image(find(file, "labels", path), name="labels") for file in (carried.get("labels") or [])[:1]]
    shown = Shown.of(labels, points("fixed"), points("moving"))
    try:
        return page(record, scans["fixed"], scans["moving"], transform, shown)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:  # who writes in a record can write anything
        if isinstance(error, RegkitError):
            raise
        raise FormatError(f"record: {path} says what no page shows ({type(error).__name__} {str(error)[:200]}); register again") \
            from error
