"""The scans of a training: found, read once, and kept small beside the run, where they are read from memory maps."""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from regkit.errors import FormatError, GeometryError, OptionError, RegkitError
from regkit.image import Image
from regkit.io import read_image
from regkit.io.images import image_suffix
from regkit.io.output import output_file
from regkit.io.paths import folder_there, home, short
from regkit.registration.pair import ready
from regkit.registration.pyramid import Smoothed, bounds
from regkit.sampling import shrinkage, warp
from regkit.space import Grid, Matrix

_LABELS = ("_seg", "_labels", "_label", "_mask", "_dseg", "_points")  # ends of names of files that are no scans
_FINER = 0.7  # voxels of what is kept, in voxels of the canvas
_MOST_LABELS = 40
_WIDER = 1.3  # the canvas' edge in medians of the scans' extents


@dataclass(frozen=True)
class Listed:
    """A scan by its files. person: whose it is; held_out: kept for validation, None where that is still to be drawn."""

    path: Path
    labels: Path | None = None
    person: str = ""
    held_out: bool | None = None


@dataclass(frozen=True, eq=False)
class Scan:
    """A scan ready to be drawn on canvases, on a grid of isotropic voxels.

    values: (1, *S) in [0, 1], 0 where nothing was seen. middle: (D,) mm, the centre of mass. labels: (*S) whole numbers or None."""

    listed: Listed
    values: np.ndarray
    labels: np.ndarray | None
    grid: Grid
    middle: Tensor


def listed(source: Path) -> list[Listed]:
    """The scans of a folder and all below it, or of a table `scan[,labels][,person][,split]` whose paths are relative to it.

    A label map lies beside its scan as NAME_seg or NAME_labels. In a table split is train or validation.

    Raises FormatError where there is none or the table is no table, OptionError for a word of `split` that is not known."""
    source = home(source)
    if folder_there(source):
        files = sorted(p for p in source.rglob("*") if image_suffix(p) and p.is_file()
                       and not any(part.startswith(".") for part in p.relative_to(source).parts))
        scans = [p for p in files if not _stem(p).endswith(_LABELS)]
        found = [Listed(p, beside(p, files), _person(p.relative_to(source))) for p in scans]
    else:
        try:
            rows = list(csv.DictReader(io.StringIO(source.read_text(encoding="utf-8-sig"), newline="")))
        except (OSError, ValueError, csv.Error) as error:
            raise FormatError(f"scans: {source} cannot be read: {error}; expected a folder, or a table with a column scan") from error
        if not rows or "scan" not in rows[0]:
            raise FormatError(f"scans: {source} has no column scan; expected scan[,labels][,person][,split]")
        found = []
        for number, row in enumerate(rows, 2):
            split = (row.get("split") or "").strip()
            if split not in ("", "train", "validation"):
                raise OptionError(f"scans: {source}, line {number}: split is {short(split)}; expected train, validation or nothing")
            name, labels = (row["scan"] or "").strip(), (row.get("labels") or "").strip()
            if not name:
                raise FormatError(f"scans: {source}, line {number}: names no scan; expected a path in the column scan")
            found.append(Listed(source.parent / name, source.parent / labels if labels else None,
                                (row.get("person") or "").strip() or _person(Path(name)), None if not split else split == "validation"))
    if len(found) < 2:
        raise FormatError(f"scans: {source} holds {len(found)} scan{'s' * (len(found) != 1)}; a training needs two or more")
    return found


def _stem(path: Path) -> str:
    return path.name[: -len(image_suffix(path) or "")] or path.name


def _person(path: Path) -> str:
    """A scan's person where nobody says more: one of its own. Files of one name in several folders are several people's."""
    return (path.parent / _stem(path)).as_posix()


def beside(path: Path, files: list[Path]) -> Path | None:
    """The label map of a scan: its name, less an ending after `_`, and an ending that says so."""
    stems = {_stem(p): p for p in files if p.parent == path.parent}
    name = _stem(path)
    for begin in (name, name.rpartition("_")[0]):
        for end in ("_seg", "_labels", "_dseg", "_label"):
            if begin and begin + end in stems:
                return stems[begin + end]
    return None


def split(found: list[Listed], share: float, seed: int) -> list[Listed]:
    """Who is kept for validation, drawn by person where a table does not say: at least one person, where there are three or more. What
    a table says of one scan holds for its person's others."""
    said = {one.person: one.held_out for one in found if one.held_out is not None}
    people = sorted({one.person for one in found} - said.keys())
    order = torch.randperm(len(people), generator=torch.Generator().manual_seed(seed)).tolist()
    count = max(round(share * len(people)), 1 if share and len(people) > 2 else 0)
    kept = {people[i] for i in order[:count]}
    return [replace(one, held_out=said.get(one.person, one.person in kept)) if one.held_out is None else one for one in found]


def extents(found: list[Listed], skip_bad: bool, tell: Callable[[str], None]) -> tuple[list[tuple[Listed, Image]], float]:
    """The scans read, and the median of their longest extents in mm. With skip_bad what cannot be read is told and left out.

    Raises FormatError and GeometryError for scans that cannot be read, or are of 2D and 3D both."""
    images = []
    for one in found:
        try:
            image, _, _, _ = ready(str(one.path), read_image(one.path, name="scans"), None)
        except RegkitError as error:
            if not skip_bad:
                raise type(error)(f"{error}; or leave such scans out: --skip-bad") from error
            tell(f"left out: {error}")
            continue
        images.append((one, image))
    if len(images) < 2:
        raise FormatError(f"scans: {len(images)} of {len(found)} can be read; a training needs two or more")
    axes = {image.ndim for _, image in images}
    if len(axes) > 1:
        raise FormatError("scans: some are 2D and some 3D; give a table with those of one kind")
    sizes = sorted(float((i.grid.corners()[0].amax(0) - i.grid.corners()[0].amin(0)).max()) for _, i in images)
    return images, sizes[len(sizes) // 2]


def canvas_for(extent: float) -> float:
    """The canvas' edge in mm for scans of that extent."""
    return _WIDER * extent


def prepare(one: Listed, image: Image | None, mm: float, folder: Path) -> Scan:
    """A scan as it is drawn from: read where it was not yet, smoothed for voxels of `mm`, kept in `folder` for the next time."""
    files = [one.path, one.labels] if one.labels is not None and one.labels.exists() else [one.path]
    said = "|".join(f"{path.resolve()}|{path.stat().st_mtime_ns}" for path in files)
    key = hashlib.sha256(f"{said}|{one.labels is None}|{mm:.6g}".encode()).hexdigest()[:16]
    place = folder / f"{key}.npz.json"
    if not place.exists():
        if image is None:
            image, _, _, _ = ready(str(one.path), read_image(one.path, name="scans"), None)
        _keep(one, image, mm, folder, key)
    said = json.loads(place.read_text(encoding="utf-8"))
    values = np.load(folder / f"{key}.npy", mmap_mode="r")
    labels = np.load(folder / f"{key}.labels.npy", mmap_mode="r") if said["labels"] else None
    return Scan(one, values, labels, Grid(values.shape[1:], torch.tensor(said["affine"], dtype=torch.float64)),
                torch.tensor(said["middle"], dtype=torch.float64))


def _keep(one: Listed, image: Image, mm: float, folder: Path, key: str) -> None:
    low, high = bounds(image.data, None)
    data = ((image.data.float() - low) / (high - low)).clamp_(0, 1)
    canvas, grid = image.grid.canonical(mm), image.grid.canonical(mm * _FINER)
    values, seen = Smoothed.of(data, None, image.grid, shrinkage(image.grid.inverse @ canvas.affine)).read(grid)
    values = values * (seen > 0.5)
    weight = values.flatten().double() / values.double().sum().clamp_min(1e-12)
    middle = (weight[None] @ grid.points()[0])[0]
    said = {"affine": grid.affine[0].tolist(), "middle": middle.tolist(), "labels": one.labels is not None}
    folder.mkdir(parents=True, exist_ok=True)
    if one.labels is not None:
        marked = read_image(one.labels, name="labels")
        if marked.ndim != image.ndim:
            raise GeometryError(f"labels: {one.labels} is {marked.ndim}D, its scan is {image.ndim}D; give a label map of that scan")
        marked = warp(marked, Matrix.identity(image.ndim), grid, kernel="nearest", antialias="none")
        save_array(folder / f"{key}.labels.npy", marked.data[0, 0].round().numpy().astype(np.int32))
    save_array(folder / f"{key}.npy", values[0].half().numpy())
    with output_file(folder / f"{key}.npz.json", overwrite=True) as aside:
        aside.write_text(json.dumps(said), encoding="utf-8")


def save_array(path: Path, array: np.ndarray) -> None:
    """An array as a .npy file, which is there whole or not at all."""
    with output_file(path, overwrite=True) as aside, aside.open("wb") as file:
        np.save(file, array)


def common_labels(scans: list[Scan]) -> list[int]:
    """The labels that all label maps have, the largest first, at most 40; none where a scan has no map."""
    if any(scan.labels is None for scan in scans):
        return []
    counts: dict[int, int] = {}
    shared: set[int] | None = None
    for scan in scans:
        found, many = np.unique(np.asarray(scan.labels), return_counts=True)
        shared = set(found.tolist()) - {0} if shared is None else shared & set(found.tolist())
        for label, count in zip(found.tolist(), many.tolist(), strict=True):
            counts[label] = counts.get(label, 0) + count
    return sorted(shared or (), key=lambda label: -counts[label])[:_MOST_LABELS]
