"""What a file's header says of the memory its voxels will take, before any voxel is read."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from regkit.errors import RegkitError
from regkit.image import Image
from regkit.io.images import FORMATS, image_suffix
from regkit.io.itk import affine_of
from regkit.io.slices import as_image
from regkit.space import Grid


@dataclass(frozen=True, eq=False)
class Header:
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


def read_header(source: Any) -> Header | None:
    """The header of what `read_image` reads, or None where it cannot be told (what is wrong is said when the voxels are read)."""
    try:
        if isinstance(source, Image):
            return Header(source.grid, source.channels, source.data.element_size(), given=True)
        if isinstance(source, (str, Path)):
            path = Path(source).expanduser()
            if path.is_dir():
                return _dicom(path)
            suffix = image_suffix(path)
            return None if suffix is None else (_nifti if FORMATS[suffix][0] == "nifti" else _itk)(path)
        if isinstance(source, tuple) and len(source) == 2:
            shape = tuple(source[0].shape)
            return Header(_grid(shape, np.asarray(source[1], dtype=np.float64)), 1, 4, given=True)
    except (RegkitError, OSError, ValueError, TypeError, AttributeError, RuntimeError, KeyError, EOFError):
        return None
    except Exception as error:  # nibabel's own kinds, which have no common root
        if type(error).__module__.startswith("nibabel"):
            return None
        raise
    return None


def _grid(shape: tuple[int, ...], affine: np.ndarray) -> Grid:
    """The grid that an image of so many voxels will have; a slice loses its axis of one voxel. No voxel takes room here."""
    import torch

    return as_image(torch.zeros(()).expand(1, *shape), torch.from_numpy(affine), "header").grid


def _held(dtype: np.dtype) -> int:
    """Bytes of a value as `slices.tensor` keeps it: floats as float32, unsigned ones as the next wider type that torch has."""
    if dtype.kind == "f":
        return 4
    return {"u2": 4, "u4": 8}.get(f"{dtype.kind}{dtype.itemsize}", dtype.itemsize)


def _nifti(path: Path) -> Header:
    import nibabel as nib
    from nibabel.imageglobals import LoggingOutputSuppressor

    with LoggingOutputSuppressor():
        image: Any = nib.load(str(path))
    shape, dtype = tuple(map(int, image.shape)), image.dataobj.dtype
    with path.open("rb") as file:
        packed = path.stat().st_size if file.read(2) == b"\x1f\x8b" else 0
    stored, times = math.prod(shape) * dtype.itemsize, shape[3] if len(shape) > 3 else 1
    channels = len(dtype.names) if dtype.names else math.prod(shape[4:])
    grid = _grid(shape[:3], image.affine)
    kind = dtype[0] if dtype.names else dtype
    scaled = image.dataobj.slope not in (None, 1.0) or image.dataobj.inter not in (None, 0.0)
    unscaled = math.prod(shape) // times * (dtype.itemsize if dtype.names else _held(kind))
    found = Header(grid, channels, 4 if scaled else _held(kind))
    most = max(packed + stored, stored + unscaled + (found.held if scaled else 0))
    return Header(grid, channels, found.itemsize, max(0, most - found.held))


def _itk(path: Path) -> Header:
    import SimpleITK as sitk

    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    reader.ReadImageInformation()
    return _of_itk(reader, tuple(reader.GetSize())[:3], reader.GetPixelID(), reader.GetNumberOfComponents())


def _dicom(folder: Path) -> Header | None:
    import SimpleITK as sitk

    names = sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(folder))
    if not names:
        return None
    reader = sitk.ImageFileReader()
    reader.SetFileName(names[0])
    reader.ReadImageInformation()
    size = tuple(reader.GetSize())
    return _of_itk(reader, (*size[:2], max(len(names), *size[2:])), reader.GetPixelID(), reader.GetNumberOfComponents())


def _of_itk(reader: Any, shape: tuple[int, ...], pixel: int, channels: int) -> Header:
    import SimpleITK as sitk

    affine = affine_of(reader.GetDirection(), reader.GetSpacing(), reader.GetOrigin(), len(shape)).numpy()
    words = sitk.GetPixelIDValueAsString(pixel)
    kind = next((np.dtype(code) for word, code in (("8-bit", "u1"), ("16-bit signed", "i2"), ("16-bit unsigned", "u2"), ("64-bit", "f8"))
                 if word in words), np.dtype("f4"))
    found = Header(_grid(shape, affine), channels, _held(kind))
    return Header(found.grid, channels, found.itemsize, found.voxels * channels * kind.itemsize)
