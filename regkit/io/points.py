"""Landmarks: CSV tables and 3D Slicer's .fcsv and .mrk.json, in RAS mm inside; other columns travel along."""

from __future__ import annotations

import csv
import io
import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from regkit.errors import FormatError, GeometryError, OptionError, choose
from regkit.image import Image
from regkit.io.itk import points_to_ras
from regkit.io.output import output_file
from regkit.io.paths import home, short
from regkit.io.slices import axial, basis

SPACES = ("ras", "lps", "index")
_SLICER_FRAMES = {"ras": "ras", "lps": "lps", "0": "ras", "1": "lps"}


@dataclass(frozen=True, eq=False)
class Points:
    """Landmarks `world` (P, D) float64, RAS mm, with a table's other columns: their names and, per point, their values.

    Raises GeometryError if shapes do not fit.
    """

    world: Tensor
    columns: tuple[str, ...] = ()
    rows: tuple[tuple[str, ...], ...] = ()

    def __post_init__(self) -> None:
        world = torch.as_tensor(self.world, dtype=torch.float64)
        if world.ndim != 2 or world.shape[1] not in (2, 3):
            raise GeometryError(f"points: shape {tuple(world.shape)}; expected (P, 2) or (P, 3)")
        rows = self.rows or ((),) * len(world) if not self.columns else self.rows
        if len(rows) != len(world) or any(len(row) != len(self.columns) for row in rows):
            raise GeometryError(f"points: {len(world)} points with {len(rows)} rows of {len(self.columns)} other columns")
        object.__setattr__(self, "world", world)
        object.__setattr__(self, "rows", rows)

    @property
    def ndim(self) -> int:
        return self.world.shape[1]

    def __len__(self) -> int:
        return len(self.world)

    def with_world(self, world: Tensor) -> Points:
        """The same table with other coordinates (P, D)."""
        return replace(self, world=world)

    def __repr__(self) -> str:
        return f"Points({len(self)} in {self.ndim}D, RAS mm{''.join(f', {c}' for c in self.columns)})"


@dataclass(frozen=True)
class _Table:
    """What a file says: coordinates of 2 or 3 columns in their own frame (None: not stated) and the rest."""

    coordinates: list[list[float]]
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    frame: str | None = None


def read_points(path: str | Path, *, space: str = "ras", image: Image | None = None, ndim: int | None = None,
                name: str = "points") -> Points:
    """Landmarks from a CSV (header with x, y and for 3D z, in any order; or 2 or 3 bare columns), .fcsv or .mrk.json.

    space: what a CSV's numbers are: `ras` or `lps` mm, or `index`, voxels of `image`. Slicer's files say theirs
        themselves. A CSV that goes with a picture (`image.pixels`) is always pixels (column, row).
    image: the scan the points belong to. A slice that is not axial takes 3D points to its own in-plane mm axes.
    ndim: 2 or 3, where there is no image; by default as many as the file has coordinates.
    name: the argument's name in messages.

    Raises FormatError (missing, empty, not numbers), GeometryError (z beside the plane of a 2D image), OptionError.
    """
    choose("space", space, SPACES)
    path = home(path)
    where = f"{name}: {path}"
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise FormatError(f"{where} does not exist; check the path") from error
    except (OSError, ValueError) as error:
        raise FormatError(f"{where} cannot be read as text: {error}; expected CSV, .fcsv or .mrk.json") from error
    table = _parse(path.name.lower(), text, where)
    if not table.coordinates:
        raise FormatError(f"{where} holds no points; expected at least one row x, y, z")
    frame = table.frame or ("index" if image is not None and image.pixels else space)
    wanted = image.ndim if image is not None else ndim or len(table.coordinates[0])
    given = torch.tensor(table.coordinates, dtype=torch.float64)
    return Points(_to_world(given, frame, image, wanted, where), table.columns, table.rows)


def _parse(file_name: str, text: str, where: str) -> _Table:
    if file_name.endswith(".json"):
        return _parse_json(text, where)
    if file_name.endswith(".fcsv"):
        return _parse_fcsv(text, where)
    return _parse_csv(text, where)


def _number(text: Any, where: str) -> float:
    if not _is_number(text):
        raise FormatError(f"{where}: {short(text)} is not a number")
    try:
        value = float(text)
    except OverflowError:  # a whole number of hundreds of digits
        value = math.inf
    if not math.isfinite(value):
        raise FormatError(f"{where}: {str(text)[:100]} is not a finite number; remove the point or repair it")
    return value


def _is_number(text: Any) -> bool:
    """Whether a cell, or a value in JSON, is a number. Python takes 1_000 and other scripts' digits for numbers, other programs do not."""
    if not isinstance(text, str):
        return isinstance(text, (int, float)) and not isinstance(text, bool)
    try:
        float(text)
    except ValueError:
        return False
    return text.isascii() and "_" not in text


def _split(text: str) -> list[str]:
    """The lines of a text; a form feed within a name parts none."""
    return text.replace("\r\n", "\n").replace("\r", "\n").split("\n")


def _lines(text: str, where: str) -> list[tuple[int, list[str]]]:
    """(line number, cells) of each row that is neither empty nor a comment, split by comma, semicolon, tab or blanks."""
    kept = ["" if line.lstrip().startswith("#") else line for line in _split(text)]
    first = next((line for line in kept if line.strip()), "")
    mark = next((c for c in ",;\t" if c in first), None)
    try:
        if mark is None:
            return [(n, line.split()) for n, line in enumerate(kept, 1) if line.strip()]
        reader = csv.reader(io.StringIO("\n".join(kept)), delimiter=mark)
        found = [(reader.line_num, [cell.strip() for cell in row]) for row in reader]
    except csv.Error as error:
        raise FormatError(f"{where} is not a readable CSV table: {error}") from error
    return [(n, row) for n, row in found if any(row)]


def _parse_csv(text: str, where: str) -> _Table:
    lines = _lines(text, where)
    if not lines:
        return _Table([], (), ())
    head = lines[0][1]
    if all(_is_number(cell) for cell in head):
        if len(head) not in (2, 3):
            raise FormatError(f"{where}: {len(head)} columns and no header; expected x, y(, z), or a header naming them")
        head = ["x", "y", "z"][: len(head)]
    else:
        lines = lines[1:]
    lower = [cell.lower() for cell in head]
    axes = [lower.index(a) for a in "xyz" if a in lower]
    if "x" not in lower or "y" not in lower:
        raise FormatError(f"{where}: header {short(','.join(head))} has no columns x and y; expected x,y,z and any others")
    if any(lower.count(a) > 1 for a in "xyz"):
        raise FormatError(f"{where}: header {short(','.join(head))} has a column twice; expected one x, one y and one z")
    others = [k for k in range(len(head)) if k not in axes]
    coordinates, rows = [], []
    for n, row in lines:
        if len(row) != len(head):
            raise FormatError(f"{where}, row {n}: {len(row)} cells; expected {len(head)} {short(','.join(head))}")
        coordinates.append([_number(row[k], f"{where}, row {n}") for k in axes])
        rows.append(tuple(row[k] for k in others))
    return _Table(coordinates, tuple(head[k] for k in others), tuple(rows))


def _slicer_frame(value: Any, where: str) -> str:
    frame = _SLICER_FRAMES.get(str(value).strip().lower())
    if frame is None:
        raise FormatError(f"{where}: coordinate system {short(value)}; expected RAS or LPS")
    return frame


def _parse_fcsv(text: str, where: str) -> _Table:
    """3D Slicer's table: old versions say 0 or nothing for RAS, 1 for LPS."""
    frame, head = "ras", ["id", "x", "y", "z"]
    for line in _split(text):
        key, _, value = line.lstrip("# ").partition("=")
        if line.startswith("#") and key.strip().lower() == "coordinatesystem":
            frame = _slicer_frame(value, where)
        elif line.startswith("#") and key.strip().lower() == "columns":
            head = [cell.strip().lower() for cell in value.split(",")]
    if any(head.count(a) != 1 for a in "xyz"):
        raise FormatError(f"{where}: columns {short(','.join(head))}; expected x, y and z among them, each once")
    coordinates, labels = [], []
    for n, row in _lines(text, where):
        cells = dict(zip(head, row, strict=False))
        if not {"x", "y", "z"} <= cells.keys():
            raise FormatError(f"{where}, row {n}: {len(row)} cells; expected {short(','.join(head))}")
        coordinates.append([_number(cells[a], f"{where}, row {n}") for a in "xyz"])
        labels.append((cells.get("label", ""),))
    return _Table(coordinates, ("label",), tuple(labels), frame)


def _parse_json(text: str, where: str) -> _Table:
    """3D Slicer's markups; points it marks as not placed are left out."""
    try:
        markups = json.loads(text)["markups"]
        points = [(_slicer_frame(markup.get("coordinateSystem", "LPS"), where), point)
                  for markup in markups for point in markup.get("controlPoints", [])
                  if point.get("positionStatus", "defined") == "defined"]
        coordinates, labels = [], []
        for n, (frame, point) in enumerate(points, 1):
            if word := next((v for v in point["position"] if isinstance(v, str)), None):
                raise FormatError(f"{where}, point {n}: {short(word)} is not a number")
            position = [_number(v, f"{where}, point {n}") for v in point["position"]]
            if len(position) != 3:
                raise FormatError(f"{where}, point {n}: {len(position)} coordinates; expected 3")
            coordinates.append([-position[0], -position[1], position[2]] if frame == "lps" else position)
            labels.append((str(point.get("label", "")),))
    except FormatError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise FormatError(f"{where} is not 3D Slicer's markups: {type(error).__name__} {str(error)[:200]}; expected .mrk.json") from error
    return _Table(coordinates, ("label",), tuple(labels), "ras")


def _to_world(given: Tensor, frame: str, image: Image | None, ndim: int, where: str) -> Tensor:
    """Coordinates (P, 2|3) of `frame` as RAS mm (P, ndim) of the image's world."""
    if given.shape[1] < ndim:
        raise FormatError(f"{where} has no column z; expected x,y,z, as the scan is 3D")
    if frame == "index":
        if image is None:
            raise OptionError(f"space: 'index' counts voxels, but no image goes with {where}; give the image, or ras or lps")
        return image.grid.to_world(_drop_z(given, ndim, where)[None].to(image.grid.device))[0].cpu()
    if frame == "lps":
        given = points_to_ras(given)
    if given.shape[1] == ndim:
        return given
    if image is None or image.slice_affine is None:
        return _drop_z(given, ndim, where)
    affine = image.slice_affine.cpu()
    if axial(affine):
        height = float(affine[2, 3])
        beside = (given[:, 2] - height).abs() <= float(image.grid.spacing.min()) / 2  # points in the slice itself
        return _drop_z(torch.cat([given[:, :2], given[:, 2:].masked_fill(beside[:, None], 0.0)], 1), ndim, where)
    return given @ basis(affine)


def _drop_z(given: Tensor, ndim: int, where: str) -> Tensor:
    """The first `ndim` coordinates; raises GeometryError if a z that falls away is not 0."""
    stray = given[:, ndim:].abs().amax(1) if given.shape[1] > ndim else torch.zeros(len(given))
    if bool((stray > 1e-6).any()):
        row = int(stray.argmax())
        raise GeometryError(f"{where}: point {row + 1} has z = {float(given[row, 2]):g}, but the image is 2D; "
                            "expected z = 0 or no z")
    return given[:, :ndim]


def write_points(points: Points, path: str | Path, *, space: str = "ras", image: Image | None = None,
                 overwrite: bool = False) -> Path:
    """Write a CSV `x,y,z,<other columns>`, to 1e-9 mm, in the space `read_points` would read with the same arguments.

    2D points have z = 0, unless `image` is a slice that is not axial: they then lie in its plane in 3D.

    Raises FormatError for another suffix than .csv, OptionError, OutputError for a place that is taken or read-only.
    """
    choose("space", space, SPACES)
    path = home(path)
    if path.suffix.lower() != ".csv":
        raise FormatError(f"output: {path.name}: points are written as .csv")
    if image is not None and image.ndim != points.ndim:
        raise GeometryError(f"points: {points.ndim}D, but the image is {image.ndim}D; give the scan they belong to")
    given = _from_world(points.world.detach().cpu(), "index" if image is not None and image.pixels else space, image)
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["x", "y", "z", *points.columns])
    for row, others in zip(given.tolist(), points.rows, strict=True):
        writer.writerow([*[repr(round(v, 9) + 0.0) for v in row], *others])
    with output_file(path, overwrite=overwrite) as temporary:
        temporary.write_bytes(buffer.getvalue().encode("utf-8", "replace"))  # a name in JSON may hold half a character
    return path


def _from_world(world: Tensor, frame: str, image: Image | None) -> Tensor:
    """RAS mm (P, D) as coordinates (P, 3) of `frame`; z = 0 is added to 2D ones."""
    if frame == "index":
        if image is None:
            raise OptionError("space: 'index' counts voxels, but no image goes with the points; give the image, or ras or lps")
        world = image.grid.to_index(world[None].to(image.grid.device))[0].cpu()
    elif world.shape[1] == 2 and image is not None and image.slice_affine is not None and not axial(image.slice_affine):
        affine = image.slice_affine.cpu()
        b = basis(affine)
        world = world @ b.T + affine[:3, 3] - b @ (b.T @ affine[:3, 3])
    if frame == "lps":
        world = points_to_ras(world)
    return torch.nn.functional.pad(world, (0, 3 - world.shape[1]))
