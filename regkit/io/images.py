"""`read_image` and `write_image`: one door for every image format, chosen by the file's suffix."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from regkit.errors import FormatError, GeometryError, RegkitError
from regkit.image import Image
from regkit.io.output import output_file
from regkit.io.paths import home
from regkit.io.slices import as_image, tensor

# suffix → (codec, whether it can be written). A header with its voxels in a second file cannot be replaced at once, so
# those are read only.
FORMATS: dict[str, tuple[str, bool]] = {
    ".nii.gz": ("nifti", True), ".nii": ("nifti", True), ".hdr": ("nifti", False), ".img": ("nifti", False),
    ".mgz": ("nifti", True), ".mgh": ("nifti", True), ".mgh.gz": ("nifti", False),
    ".nrrd": ("itk", True), ".nhdr": ("itk", False), ".mha": ("itk", True), ".mhd": ("itk", False),
    ".png": ("itk", True), ".jpg": ("itk", True), ".jpeg": ("itk", True), ".tif": ("itk", True), ".tiff": ("itk", True),
    ".bmp": ("itk", True), ".dcm": ("itk", False),
}


def image_suffix(path: str | Path) -> str | None:
    """The known image suffix that `path` ends with, the longest, or None."""
    name = Path(path).name.lower()
    return max((s for s in FORMATS if name.endswith(s) and name != s), key=len, default=None)


def present(path: Path, name: str) -> str | None:
    """The known suffix of a file that is there and not empty; None for a folder. Raises FormatError."""
    if not path.exists():
        raise FormatError(f"{name}: {path} does not exist; check the path")
    if path.is_dir():
        return None
    suffix = image_suffix(path)
    if suffix is None:
        raise FormatError(f"{name}: {path} has none of the known suffixes {', '.join(FORMATS)}; "
                          "rename or convert it, or give a folder with one DICOM series")
    if path.stat().st_size == 0:
        raise FormatError(f"{name}: {path} is empty (0 bytes); fetch or export it again")
    return suffix


def read_image(source: Any, *, volume: int | None = None, name: str = "image") -> Image:
    """An image from whatever holds one, RAS+ mm, voxels (1, C, *S).

    source: a path (NIfTI, MGH, NRRD, MetaImage, PNG, JPEG, TIFF, BMP, or a folder with one DICOM series), a nibabel or
        SimpleITK image, a tuple (array of D axes, affine (D+1, D+1) index → RAS mm), or an `Image`, given back as it is.
        Integers stay integers (uint16 and wider unsigned ones become the next wider signed type, which torch can compute
        with); scaled values and floats become float32. A single slice is 2D and keeps its 4×4 in `slice_affine`.
    volume: which volume of 4D data, from 0; data of one volume ignore it.
    name: the argument's name in messages.

    Raises FormatError (missing, unknown, damaged or truncated file), GeometryError (an affine no scan can have),
    OptionError (4D without a `volume` that exists).
    """
    if isinstance(source, Image):
        return source
    if isinstance(source, (str, Path)):
        return _read_path(home(source), volume, name)
    if isinstance(source, tuple) and len(source) == 2:
        return _from_array(*source, name)
    modules = {kind.__module__.partition(".")[0] for kind in type(source).__mro__}
    if "SimpleITK" in modules:
        from regkit.io import itk

        return itk.from_sitk(source, volume, name)
    if "nibabel" in modules:
        from regkit.io import nifti

        return nifti.from_nibabel(source, volume, name)
    raise FormatError(f"{name}: a {type(source).__name__} is not an image; expected a path, a nibabel or SimpleITK image, "
                      "a tuple (array, affine) or a regkit.Image")


def _read_path(path: Path, volume: int | None, name: str) -> Image:
    from regkit.io import itk, nifti

    try:
        suffix = present(path, name)
        if suffix is None:
            return replace(itk.read_dicom(path, name), source=str(path))
        return replace({"nifti": nifti, "itk": itk}[FORMATS[suffix][0]].read(path, volume, name), source=str(path))
    except RegkitError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a null byte in the path
        raise FormatError(f"{name}: {path} cannot be read: {error.__class__.__name__}, {error}") from error


def _from_array(array: Any, affine: Any, name: str) -> Image:
    """Voxels of D axes and their affine; a tensor keeps its device."""
    try:
        array = array if isinstance(array, torch.Tensor) else np.asarray(array)
        matrix = torch.as_tensor(np.asarray(affine.cpu() if isinstance(affine, torch.Tensor) else affine, dtype=np.float64))
    except (TypeError, ValueError, RuntimeError) as error:
        raise FormatError(f"{name}: not an array and an affine: {error}; expected (array of 2 or 3 axes, affine)") from error
    if array.ndim not in (2, 3):
        raise GeometryError(f"{name}: an array of {array.ndim} axes {tuple(array.shape)}; expected 2 or 3 spatial axes "
                            "(for channels or batches make a regkit.Image)")
    return as_image(tensor(array, name)[None], matrix, name)


def write_image(image: Image, path: str | Path, *, overwrite: bool = False) -> Path:
    """Write one image, by the suffix of `path`; returns the path. Atomic: the file is there whole or not at all.

    Integers stay integers, bool becomes uint8, floats become float32 (in PNG, JPEG and BMP they are rounded). A slice goes
    back to its place in 3D; a 2D image without one lies in the world's plane z = 0. Pictures hold no orientation.

    Raises FormatError for a suffix or voxels that cannot be written, GeometryError for a batch, OutputError for a place that
    is taken, read-only or full.
    """
    path = home(path)
    suffix = image_suffix(path)
    if suffix is None or not FORMATS[suffix][1]:
        known = ", ".join(s for s, (_, writable) in FORMATS.items() if writable)
        raise FormatError(f"output: {path.name} has no suffix that can be written; use one of {known}")
    if len(image.data) != 1 or len(image.grid.affine) != 1:
        raise GeometryError(f"image: a batch of {max(len(image.data), len(image.grid.affine))}; expected one image a file")
    from regkit.io import itk, nifti

    with output_file(path, overwrite=overwrite) as temporary:
        {"nifti": nifti, "itk": itk}[FORMATS[suffix][0]].write(image, temporary, suffix=suffix)
    return path
