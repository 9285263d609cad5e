"""A registration done again: how far the second result is from the first, which is known from its record and its files."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from regkit.errors import FormatError, GeometryError, OptionError, RegkitError
from regkit.io import read_image, read_transform, sha256
from regkit.registration.machine import differences
from regkit.registration.result import CURVED, FILES, Registration
from regkit.registration.settings import Settings
from regkit.space import Grid, Matrix, Transform

TOLERANCE_VOXELS = 0.1  # of the fixed scan's smallest voxel edge, by which the maps of two machines may differ
TOLERANCE_VALUES = 0.01  # of the moved scan's range of values, root mean square
_LATTICE = 24  # points an axis at which maps are compared that are not affine


@dataclass(frozen=True)
class Comparison:
    """Two results of one registration.

    files: name → whether the bytes are the same; None where nothing is known of the earlier ones. matrix: whether all its entries are
    equal. millimetres: the largest distance over the fixed field of view between where both maps take a point; None where the earlier
    map is not there. voxels, rms: the largest and the root mean square difference of the moved scans' values, and span: the range of
    these values; None where the earlier moved scan is not there. limit: mm, what other versions and machines may do.
    device: what computed the second. differs: versions, parts of the machine and device that are not the same, name → (then, now).
    notes: what could not be compared.
    """

    files: dict[str, bool | None]
    matrix: bool
    millimetres: float | None
    voxels: float | None
    rms: float | None
    span: float | None
    limit: float
    device: str
    differs: dict[str, tuple[str, str]]
    notes: tuple[str, ...] = ()

    @property
    def same(self) -> bool:
        """Whether matrix, transform, moved scan and all that was carried along are the same, bit for bit."""
        known = any(self.files.values()) or self.millimetres == 0
        return self.matrix and known and all(same is not False for same in self.files.values())

    @property
    def close(self) -> bool:
        """Whether the results differ by no more than TOLERANCE_VOXELS and TOLERANCE_VALUES, and have an excuse: versions or machine that
        differ, or a GPU, which adds up in any order."""
        if not (self.differs or self.device != "cpu") or self.millimetres is None or self.millimetres > self.limit:
            return False
        return self.rms is None or self.span is None or self.rms <= TOLERANCE_VALUES * self.span

    @property
    def verdict(self) -> str:
        """same, close or different."""
        return "same" if self.same else "close" if self.close else "different"

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers and words, for JSON."""
        return {"verdict": self.verdict, "files": self.files, "matrix": self.matrix, "largest_displacement_mm": self.millimetres,
                "tolerance_mm": self.limit, "largest_voxel_difference": self.voxels, "rms_voxel_difference": self.rms,
                "voxel_range": self.span, "differs": {name: list(pair) for name, pair in self.differs.items()}, "notes": list(self.notes)}


def settings_of(record: Mapping[str, Any]) -> Settings:
    """The settings of a record; what an earlier regkit did not know has its default.

    Raises OptionError for a setting that this regkit does not know, FormatError where there are none."""
    said = record.get("settings")
    if not isinstance(said, dict):
        raise FormatError("record: holds no settings; name the registration.json that regkit register wrote")
    unknown = sorted(set(said) - {field.name for field in fields(Settings)})
    if unknown:
        made = (record.get("versions") or {}).get("regkit", "another version")
        raise OptionError(f"record: has the setting{'s' * (len(unknown) > 1)} {', '.join(unknown)}, which this regkit does not know; "
                          f"replay it with regkit {made}, which wrote it")
    try:
        return Settings(**said)
    except TypeError as error:
        raise FormatError(f"record: a setting has the wrong type: {error}; name a record as regkit register wrote it") from error


def as_it_ran(settings: Settings, record: Mapping[str, Any]) -> Settings:
    """Settings that compute on the device of the record, if this machine has it, and as finely: how much memory there is now is no matter
    of the result."""
    device = str(record.get("device") or settings.device).partition(":")[0]
    memory = record.get("memory") or {}
    return replace(settings, device="auto" if device == "cuda" and not torch.cuda.is_available() else device,
                   max_memory=str(memory["limit"]) if memory.get("lowered") else "0")


def compare(record: Mapping[str, Any], folder: Path, result: Registration, again: Path) -> Comparison:
    """The result of a registration done again and written to the folder `again`, beside its first `record` in `folder`."""
    hashes, now, notes = record.get("outputs") or {}, result.trace["outputs"], []
    files = {name: _same(name, hashes, folder, now) for name in {**now, **hashes}}
    affine = "matrix_is" not in record
    matrix = record["matrix"] == result.record()["matrix"]
    first: Transform | None = None
    try:
        first = Matrix(record["matrix"]) if affine else read_transform(_kept(CURVED[0], hashes, folder), ndim=result.fixed.ndim)
    except (RegkitError, TypeError, ValueError) as error:
        notes.append(f"the maps cannot be compared in mm: {error}")
    if first is not None and first.ndim != result.fixed.ndim:
        raise GeometryError(f"record: holds a {first.ndim}D map, the scans are {result.fixed.ndim}D; name the record of these scans")
    apart: tuple[float | None, float | None, float | None] = (0.0, 0.0, None)
    if not files.get(FILES[0]):
        try:
            apart = values_apart(read_image(_kept(FILES[0], hashes, folder), name="moved").data, result.moved.data)
        except RegkitError as error:
            apart = (None, None, None)
            notes.append(f"the moved scans cannot be compared: {error}")
    grid, device = result.fixed.grid, str(result.trace["device"])
    return Comparison(files, matrix, None if first is None else displacement(first, result.transform, grid), *apart,
                      TOLERANCE_VOXELS * float(grid.spacing.min()), device, differences(record, result.record()), tuple(notes))


def displacement(one: Transform, other: Transform, grid: Grid) -> float:
    """mm: the largest distance between where two maps take a point of the grid. That of affine maps is at a corner."""
    points = torch.cat([grid.corners(), grid.shrink(tuple(max(1, n // _LATTICE) for n in grid.shape)).points()], 1)
    return float((one(points) - other(points)).norm(dim=-1).max())


def values_apart(one: Tensor, other: Tensor) -> tuple[float, float, float]:
    """The largest and the root mean square difference of two scans' values (1, C, *S), and the range of the first; places that are NaN
    in both are equal, and in one alone infinitely different. Raises GeometryError where shapes differ."""
    if one.shape != other.shape:
        raise GeometryError(f"moved: had {tuple(one.shape[1:])} channels and voxels, has {tuple(other.shape[1:])} now")
    largest, total, low, high = 0.0, 0.0, math.inf, -math.inf
    for a, b in zip(one.unbind(2), other.unbind(2), strict=True):  # plane by plane: scans are large
        a, b = a.double(), b.double()
        difference = torch.where((a == b) | (a.isnan() & b.isnan()), 0.0, (a - b).abs()).nan_to_num(math.inf, math.inf)
        largest, total = max(largest, float(difference.max())), total + float(difference.square().sum())
        known = a[a.isfinite()]
        if known.numel():
            low, high = min(low, float(known.min())), max(high, float(known.max()))
    return largest, math.sqrt(total / one.numel()), max(high - low, 0.0)


def _same(name: str, hashes: Mapping[str, str], folder: Path, now: Mapping[str, str]) -> bool | None:
    """Whether a file has the bytes it had: by the record, else by the file itself, which records of before are without."""
    if name not in now:
        return False
    if name in hashes:
        return hashes[name] == now[name]
    return sha256(folder / name) == now[name] if (folder / name).is_file() else None


def _kept(name: str, hashes: Mapping[str, str], folder: Path) -> Path:
    """A file of the first result, if it still is what was written. Raises FormatError."""
    path = folder / name
    if not path.is_file():
        raise FormatError(f"{path} is not there; put the record back beside the files of its result")
    if name in hashes and sha256(path) != hashes[name]:
        raise FormatError(f"{path} has changed since it was written")
    return path
