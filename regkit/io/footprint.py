"""The memory that a scan's voxels will take, by its header, before any voxel is read."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from regkit.errors import RegkitError
from regkit.image import Image
from regkit.io.headers import Header, grid_of, read_header
from regkit.io.packing import is_packed
from regkit.io.slices import as_image
from regkit.space import Grid


@dataclass(frozen=True, eq=False)
class Footprint:
    """A scan's grid, its channels, the bytes of a voxel's channel as it is held, and the most bytes that reading it takes besides those
    that stay; `given`: it lies in memory already."""

    grid: Grid
    channels: int
    itemsize: int
    reading: int = 0
    given: bool = False

    @property
    def voxels(self) -> int:
        return math.prod(self.grid.shape)

    @property
    def held(self) -> int:
        """Bytes of the voxels as they stay in memory."""
        return 0 if self.given else self.voxels * self.channels * self.itemsize

    @property
    def narrow(self) -> bool:
        """Whether it is computed with as it is: one channel of at most 16 bits."""
        return self.channels == 1 and self.itemsize <= 2


def footprint(source: Any) -> Footprint | None:
    """What `read_image` will take, or None where it cannot be told (what is wrong is said when the voxels are read)."""
    try:
        if isinstance(source, Image):
            return Footprint(source.grid, source.channels, source.data.element_size(), given=True)
        if isinstance(source, (str, Path)):
            path = Path(source).expanduser()
            return _of_folder(path) if path.is_dir() else _of(read_header(path, "scan"), path)
        if isinstance(source, tuple) and len(source) == 2:
            return Footprint(_grid(tuple(source[0].shape), np.asarray(source[1], dtype=np.float64)), 1, 4, given=True)
    except (RegkitError, OSError, ValueError, TypeError, AttributeError, RuntimeError, KeyError, EOFError):
        return None
    return None


def _grid(shape: tuple[int, ...], affine: np.ndarray) -> Grid:
    """The grid that an image of so many voxels will have; a slice loses its axis of one voxel. No voxel takes room here."""
    import torch

    return as_image(torch.zeros(()).expand(1, *shape), affine, "header").grid


def _itemsize(stored: np.dtype) -> int:
    """Bytes of a value as `slices.tensor` keeps it: floats as float32, unsigned ones as the next wider type that torch has."""
    if stored.kind == "f":
        return 4
    return {"u2": 4, "u4": 8}.get(f"{stored.kind}{stored.itemsize}", stored.itemsize)


def _of(header: Header, path: Path) -> Footprint | None:
    stored = header.stored
    if stored is None:
        return None
    count = math.prod(header.shape) * header.channels * stored.itemsize
    colours = len(stored.names or ())
    item = _itemsize(stored[0] if colours else stored)
    channels = colours or header.channels * math.prod(header.shape[4:])
    found = Footprint(grid_of(header, "scan"), channels, 4 if header.scaled else item)
    if header.kind in ("itk", "picture"):
        return Footprint(found.grid, channels, found.itemsize, count)
    unscaled = found.voxels * channels * item
    packed = path.stat().st_size if is_packed(path) else 0
    most = max(packed + count, count + unscaled + (found.held if header.scaled else 0))
    return Footprint(found.grid, channels, found.itemsize, max(0, most - found.held))


def _of_folder(folder: Path) -> Footprint | None:
    """A DICOM series by the header of its first file and the number of files: so large it is, wherever it lies."""
    from regkit.io import itk

    names = itk.series(folder)
    if len(names) != 1:
        return None
    files = next(iter(names.values()))
    reader = itk.information(Path(files[0]))
    size, stored = reader.GetSize(), itk.stored_as(reader)
    if stored is None:
        return None
    affine = itk.affine_of(reader.GetDirection(), reader.GetSpacing(), reader.GetOrigin(), 3).numpy()
    grid, channels = _grid((*size[:2], max(len(files), *size[2:])), affine), reader.GetNumberOfComponents()
    return Footprint(grid, channels, _itemsize(stored), math.prod(grid.shape) * channels * stored.itemsize)
