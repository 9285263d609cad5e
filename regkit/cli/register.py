"""`regkit register`: two scans in; the moved scan, the transform, a record and a picture out."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from regkit.cli.console import Console, importing
from regkit.cli.report import PAGE, Shown, page
from regkit.errors import GeometryError, choose
from regkit.registration.settings import Settings
from regkit.registration.verdict import FAIL, plain

if TYPE_CHECKING:
    from regkit.image import Image
    from regkit.io import Points
    from regkit.registration.result import Registration

EXIT_FAIL = 3
CARRIED = ("labels", "fixed_points", "moving_points")
POINT_SPACES = ("ras", "lps", "index")
OWNED = ("moved.nii.gz", "transform.tfm", "transform.json", "displacement.nii.gz", "expected_error.nii.gz", "registration.json",
         "overlay.png", PAGE, "*_moved.nii.gz", "*_in_fixed.csv", "*_in_moving.csv")
"""The names of the files that regkit writes, with wildcards: an output folder that holds others is never replaced."""


def register(
    fixed: Annotated[Path, Parameter(help="The scan that stays: an image file, or a folder with a DICOM series.")],
    moving: Annotated[Path, Parameter(help="The scan that moves onto it.")],
    /,
    *,
    output: Annotated[Path, Parameter(name=["--output", "-o"], help="Folder for the results; absent or empty.")],
    settings: Annotated[Settings, Parameter(name="*")] = Settings(),
    fixed_mask: Annotated[Path | None, Parameter(help="Where the fixed scan counts (non-zero), in its world.")] = None,
    moving_mask: Annotated[Path | None, Parameter(help="Where the moving scan counts (non-zero), in its world.")] = None,
    labels: Annotated[list[Path] | None, Parameter(
        help="Label map of the moving scan, carried along as NAME_moved.nii.gz; may be repeated.")] = None,
    fixed_points: Annotated[list[Path] | None, Parameter(
        help="Points on the fixed scan (.csv, .fcsv, .mrk.json), written as NAME_in_moving.csv; may be repeated.")] = None,
    moving_points: Annotated[list[Path] | None, Parameter(
        help="Points on the moving scan, written as NAME_in_fixed.csv; may be repeated.")] = None,
    points_space: Annotated[str, Parameter(
        help="What the numbers in .csv points are: ras or lps (mm), or index (voxels).")] = "ras",
    overwrite: Annotated[bool, Parameter(help="Replace an earlier result in the folder.")] = False,
    quiet: Annotated[bool, Parameter(help="Say nothing but errors.")] = False,
    json: Annotated[bool, Parameter(help="Print the record to stdout, and only that.")] = False,
) -> int:
    """Align MOVING to FIXED and write the moved scan, the transform, a record, a picture and a report into a folder.

    Exit codes: 0 the verdict is PASS or WARN, 2 a wrong option or input, 3 written, but the verdict is FAIL.
    """
    console = Console(quiet=quiet, json=json)
    choose("points-space", points_space, POINT_SPACES)
    job = Job(fixed, moving, output, settings, fixed_mask, moving_mask, tuple(labels or ()),
              tuple(fixed_points or ()), tuple(moving_points or ()), points_space, overwrite)
    result = job.run(console)
    for line in remarks(result):
        console.remark(line)
    console.record(dump(result.record()))
    for line in summary(result, output):
        console.say(line)
    if result.verdict.status == FAIL:
        for line in failed(result):
            console.warn(line)
        return EXIT_FAIL
    return 0


@dataclass(frozen=True)
class Job:
    """One registration with everything that is carried along."""

    fixed: Path
    moving: Path
    output: Path
    settings: Settings = field(default_factory=Settings)
    fixed_mask: Path | None = None
    moving_mask: Path | None = None
    labels: tuple[Path, ...] = ()
    fixed_points: tuple[Path, ...] = ()
    moving_points: tuple[Path, ...] = ()
    points_space: str = "ras"
    overwrite: bool = False

    def run(self, console: Console) -> Registration:
        """Align, and write the folder in one step. What is carried along is read before the work starts.

        Raises RegkitError, with nothing written, where an input or the folder will not do."""
        with importing():
            from regkit.io import output_folder
            from regkit.registration.align import align

        with output_folder(self.output, overwrite=self.overwrite, owned=is_ours) as folder:
            luggage = self._read()
            with console.progress() as progress:
                result = align(self.fixed, self.moving, fixed_mask=self.fixed_mask, moving_mask=self.moving_mask,
                               progress=progress, settings=self.settings)
                if progress is not None:
                    progress("write", 1.0)
                if carried := self._carried():
                    result.trace["carried"] = carried
                luggage.write(folder, result, self.points_space)
                result.write(folder)
                draw(result, folder / "overlay.png")
                shown = page(result.record(), result.fixed, result.moving, result.transform, luggage.shown())
                (folder / PAGE).write_text(shown, encoding="utf-8", errors="replace")  # a file's name need not be UTF-8
        return result

    def _carried(self) -> dict[str, Any]:
        """The files that are carried along, for the record: `regkit report` reads them again."""
        from regkit.io import sha256

        files = {name: [str(path) for path in getattr(self, name)] for name in CARRIED}
        hashes = {path: sha256(path) for paths in files.values() for path in paths}
        return {**files, "points_space": self.points_space, "sha256": hashes} if hashes else {}

    def _check_memory(self) -> None:
        """Raise OptionError by the headers alone, where memory will not do: `align` says so too, but comes after what is read here."""
        from regkit.registration.memory import budgeted

        budgeted({name: getattr(self, name) for name in ("fixed", "moving", "fixed_mask", "moving_mask")}, self.settings)

    def _read(self) -> Luggage:
        from regkit.io import read_image, read_points

        if not (self.labels or self.fixed_points or self.moving_points):
            return Luggage({}, {}, {})
        self._check_memory()
        volume = self.settings.volume
        fixed = read_image(self.fixed, volume=volume, name="fixed")
        moving = read_image(self.moving, volume=volume, name="moving")

        def points(name: str, paths: Sequence[Path], scan: Image) -> list[Points]:
            return [read_points(p, space=self.points_space, image=scan, ndim=scan.ndim, name=name) for p in paths]

        label_maps = [read_image(p, name="labels") for p in self.labels]
        for path, label_map in zip(self.labels, label_maps, strict=True):
            if label_map.ndim != moving.ndim:
                raise GeometryError(f"labels: {path} is {label_map.ndim}D, the moving scan is {moving.ndim}D; "
                                    "give a label map of the moving scan")
        return Luggage(
            dict(zip(output_names(self.labels, "_moved.nii.gz"), label_maps, strict=True)),
            dict(zip(output_names(self.fixed_points, "_in_moving.csv"),
                     points("fixed-points", self.fixed_points, fixed), strict=True)),
            dict(zip(output_names(self.moving_points, "_in_fixed.csv"),
                     points("moving-points", self.moving_points, moving), strict=True)),
        )


@dataclass(frozen=True)
class Luggage:
    """What is carried along: output file name → what goes into it once the transform is known."""

    labels: dict[str, Image]
    fixed_points: dict[str, Points]
    moving_points: dict[str, Points]

    def shown(self) -> Shown:
        """What of it the page shows."""
        return Shown.of(list(self.labels.values()), list(self.fixed_points.values()), list(self.moving_points.values()))

    def write(self, folder: Path, result: Registration, space: str) -> None:
        """Carry everything to the other scan and write it."""
        from regkit.io import write_image, write_points

        for name, label_map in self.labels.items():
            write_image(result.apply(label_map, interpolation="nearest"), folder / name)
        for name, points in self.fixed_points.items():
            write_points(result.apply(points, inverse=True), folder / name, space=space, image=result.moving)
        for name, points in self.moving_points.items():
            write_points(result.apply(points), folder / name, space=space, image=result.fixed)


def draw(result: Registration, path: Path) -> None:
    """The picture before and after: before is the moving scan where its header puts it."""
    from regkit.report.overlay import overlay
    from regkit.sampling import warp
    from regkit.space import Matrix

    header, moving = Matrix.identity(result.fixed.ndim), result.moving.with_data(result.moving.luminance().data)
    fill = result.settings.fill_value(float(moving.data.min()))
    overlay(result.fixed, lambda plane: warp(moving, header, plane, fill=fill, antialias="none"), result.moved, path)


def dump(record: dict[str, Any]) -> str:
    """The record as JSON text."""
    return json.dumps(record, indent=2)


def is_ours(name: str) -> bool:
    """Whether a file of that name may be one of an earlier result."""
    return any(fnmatchcase(name, pattern) for pattern in OWNED)


def stem(path: Path) -> str:
    """The file's name without its suffix, double ones such as .nii.gz included."""
    from regkit.io.images import image_suffix

    suffix = ".mrk.json" if path.name.lower().endswith(".mrk.json") else image_suffix(path) or path.suffix
    return path.name.removesuffix(path.name[len(path.name) - len(suffix):])


def output_names(paths: Sequence[Path], ending: str) -> list[str]:
    """One output name a path, NAME + ending. Equal NAMEs get their folder's name in front, then a counter at the end.

    Names that differ in case only count as equal: some file systems hold them so."""
    names = [stem(p) for p in paths]
    often = Counter(n.lower() for n in names)
    names = [f"{p.resolve().parent.name}_{n}" if often[n.lower()] > 1 else n for p, n in zip(paths, names, strict=True)]
    taken: set[str] = set()
    unique = []
    for name in names:
        candidate, count = name, 1
        while candidate.lower() in taken:
            count += 1
            candidate = f"{name}_{count}"
        taken.add(candidate.lower())
        unique.append(candidate + ending)
    return unique


def summary(result: Registration, folder: Path) -> list[str]:
    """The result in a few lines for people."""
    record = result.record()
    chosen = record.get("chosen", {})
    lines = [f"model       {result.settings.model}",
             f"similarity  {chosen.get('similarity', result.settings.similarity)}"
             + (f" ({chosen['why'].partition(':')[0]})" if chosen.get("why") else "")]
    change = record["similarity"]
    if "bent" in (found := {k.removeprefix("similarity_"): v for k, v in result.trace["guard"].items()}):
        lines.append(f"bent        {found['affine']:.3f} under the affine map, {found['bent']:.3f} bent, at the finest level")
    now = "now" if result.affine else "under the affine map"
    lines.append(f"agreement   {change['before']:.3f} where the headers put them, {change['after']:.3f} {now} (1 is equal, 0 unrelated)")
    seconds = record.get("seconds", {})
    if seconds:
        lines.append(f"seconds     {sum(seconds.get(part, 0.0) for part in ('total', 'resample', 'write')):.1f}")
    lines += [f"note        {note}" for note in record.get("notes", [])]
    said = result.verdict
    lines.append(f"verdict     {said.status}: right with a probability of {said.probability:.2f}")
    if said.expected_tre_mm is not None and said.likely_tre_mm is not None:
        low, high = said.likely_tre_mm
        middle, low, high = map(plain, (said.expected_tre_mm, low, high))
        lines.append(f"error       {middle} mm expected, {low} to {high} in about nine of ten cases, differences "
                     "between people included")
    if result.settings.expected_error:
        empty = " (empty: of a failed map no error is expected)" if said.status == FAIL else ""
        lines.append(f"error map   {folder / 'expected_error.nii.gz'}{empty}")
    lines += [f"because     {reason}" for reason in said.reasons]
    return [*lines, f"written to  {folder}", f"picture     {folder / 'overlay.png'}", f"report      {folder / PAGE}"]


def remarks(result: Registration) -> list[str]:
    """What the header doctor finds doubtful or wrong about the files, a line each."""
    return [f"{name}: {one['severity']}: {one['what']}; regkit {one['does']} (see regkit doctor {item['path']})"
            for name, item in result.trace["inputs"].items() for one in item.get("findings", []) if one["severity"] != "note"]


def failed(result: Registration) -> list[str]:
    """That the result is not to be trusted, the first reason, and what can be done, in plain words."""
    reason = next(iter(result.verdict.reasons), "little speaks for this map")
    said = f"right with a probability of {result.verdict.probability:.2f}"
    return [f"FAIL: this registration is not to be used ({said}): {reason}; the files "
            f"were written all the same (exit code {EXIT_FAIL})",
            "are both scans of the same part of the body? If so: regkit doctor looks at their headers, masks show what counts, and --start "
            "takes a transform from elsewhere"]
