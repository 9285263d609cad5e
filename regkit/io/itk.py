"""Everything SimpleITK reads and writes: NRRD, MetaImage, PNG, JPEG, TIFF, BMP, DICOM. The only place that knows LPS."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from regkit.errors import FormatError, GeometryError, OutputError, RegkitError
from regkit.image import Image
from regkit.io.memory import check_room
from regkit.io.nifti import select_volume, stored
from regkit.io.paths import in_utf8
from regkit.io.slices import as_image, embed, reason, tensor
from regkit.io.whole import check_own, check_sound, check_whole

PICTURES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp")
_FLOAT_PICTURES = (".tif", ".tiff")
_POSITION = "0020|0032"


def matrix_to_lps(matrix: Tensor) -> Tensor:
    """A map of RAS points, (…, D+1, D+1), as the same map of LPS points: x and y change sign before and after."""
    flip = _flip(matrix.shape[-1] - 1).to(matrix)
    return flip[:, None] * matrix * flip


def matrix_to_ras(matrix: Tensor) -> Tensor:
    """A map of LPS points, (…, D+1, D+1), as the same map of RAS points; the flip is its own inverse."""
    return matrix_to_lps(matrix)


def points_to_ras(points: Tensor) -> Tensor:
    """LPS points (…, D) in RAS, and the other way."""
    return points * _flip(points.shape[-1])[:-1].to(points)


def _flip(ndim: int) -> Tensor:
    return torch.tensor([-1.0, -1.0, *[1.0] * (ndim - 1)], dtype=torch.float64)


@contextlib.contextmanager
def quiet() -> Iterator[Any]:
    """SimpleITK, without ITK's comments on stderr."""
    import SimpleITK as sitk

    shown = sitk.ProcessObject.GetGlobalWarningDisplay()
    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    try:
        yield sitk
    finally:
        sitk.ProcessObject.SetGlobalWarningDisplay(shown)


def read(path: Path, volume: int | None, name: str) -> Image:
    """The file at `path`, RAS mm. PNG, JPEG, TIFF and BMP are pictures: array [i, j] is pixel (column i, row j).

    Raises FormatError for what is not such a file or is truncated, GeometryError and OptionError as NIfTI does.
    """
    where = f"{name}: {path}"
    suffix = path.suffix.lower()
    with quiet():
        try:
            image = load(path, where)
        except RegkitError:
            raise
        except Exception as error:
            hint = "it may be damaged, truncated or of another kind"
            if "PixelType" in str(error):
                hint = "save it as plain grey or colour, without transparency"
            raise FormatError(f"{where} is not a readable {suffix} image: {reason(error)}; {hint}") from error
    return from_sitk(image, volume, where, pixels=suffix in PICTURES)


def load(path: Path, where: str) -> Any:
    """SimpleITK's image of a file that holds what its header promises. Raises FormatError, also where memory has no room for it, and what
    SimpleITK raises."""
    reader = information(path, where)
    check_whole(path, reader, where)
    _check_room(reader, 1, where)
    check_sound(path, reader, where)
    return reader.Execute()


def _check_room(reader: Any, count: int, where: str) -> None:
    """Whether so many files such as that of which a reader has read the header have room."""
    stored = stored_as(reader)
    check_room(count * math.prod(reader.GetSize()) * reader.GetNumberOfComponents() * (1 if stored is None else stored.itemsize), where)


def information(path: Path, where: str = "") -> Any:
    """SimpleITK's reader with the header of the file at `path`; the voxels stay unread. Raises what SimpleITK raises, and FormatError for
    a header that it must not see."""
    check_own(path, where or str(path))
    with quiet() as sitk:
        reader = sitk.ImageFileReader()
        reader.SetFileName(in_utf8(path))
        reader.ReadImageInformation()
        return reader


def stored_as(reader: Any) -> np.dtype | None:
    """The type of a voxel's values, by a reader that has read a header; None for one that it does not know."""
    import SimpleITK as sitk

    found = re.search(r"(\d+)-bit (signed|unsigned|float)", sitk.GetPixelIDValueAsString(reader.GetPixelID()))
    return None if found is None else np.dtype(f"{'iuf'[('signed', 'unsigned', 'float').index(found[2])]}{int(found[1]) // 8}")


def from_sitk(image: Any, volume: int | None, where: str, *, pixels: bool = False) -> Image:
    """A SimpleITK image (2D, 3D, or 4D of which `volume` is taken) as ours, RAS mm."""
    import SimpleITK as sitk

    try:
        array = sitk.GetArrayViewFromImage(image)
    except Exception as error:
        raise FormatError(f"{where}: its {image.GetPixelIDTypeAsString()} voxels cannot be read: {reason(error)}") from error
    dims, channels = image.GetDimension(), image.GetNumberOfComponentsPerPixel()
    if dims not in (2, 3, 4):
        raise GeometryError(f"{where}: {dims} axes; expected a 2D or 3D scan, or 4D with --volume")
    array = array if channels > 1 else array[..., None]
    if dims == 4:
        array = array[select_volume(array.shape[0], volume, where)]
    ndim = min(dims, 3)
    # SimpleITK's arrays have their axes reversed; channels come last.
    data = tensor(np.transpose(array, (ndim, *range(ndim - 1, -1, -1))), where)
    affine = affine_of(image.GetDirection(), image.GetSpacing(), image.GetOrigin(), ndim)
    return as_image(data, affine, where, pixels=pixels and ndim == 2)


def affine_of(direction: Any, spacing: Any, origin: Any, ndim: int) -> Tensor:
    """(D+1, D+1) float64 index → RAS mm of ITK's geometry, of which the first `ndim` axes count."""
    dims = len(spacing)
    affine = np.eye(ndim + 1)
    affine[:ndim, :ndim] = np.reshape(direction, (dims, dims))[:ndim, :ndim] * np.asarray(spacing)[:ndim]
    affine[:ndim, ndim] = np.asarray(origin)[:ndim]
    return _flip(ndim)[:, None] * torch.from_numpy(affine)


def series(folder: Path) -> dict[str, tuple[str, ...]]:
    """The DICOM series in `folder`, each with its files in order of position. Raises what SimpleITK raises."""
    with quiet() as sitk:
        names = sitk.ImageSeriesReader.GetGDCMSeriesIDs(in_utf8(folder))
        return {one: sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(folder), one) for one in names}


def read_dicom(folder: Path, name: str) -> Image:
    """The one DICOM series in `folder`, slices sorted by position, RAS mm; a tilted gantry gives a sheared grid.

    Raises FormatError where there is none or several, GeometryError where slices are missing or unevenly spaced.
    """
    where = f"{name}: {folder}"
    with quiet() as sitk:
        try:
            files = series(folder)
        except RegkitError:
            raise
        except Exception as error:
            raise FormatError(f"{where}: the folder cannot be read as DICOM: {reason(error)}") from error
        if not files:
            raise FormatError(f"{where} is a folder without DICOM files; give an image file or the folder of one series")
        if len(files) > 1:
            listed = ", ".join(f"{one} ({len(names)} files)" for one, names in sorted(files.items()))
            raise FormatError(f"{where} holds {len(files)} DICOM series: {listed}; give a folder with one series")
        names = next(iter(files.values()))
        with contextlib.suppress(RuntimeError):  # what is wrong with a header is said when it is read
            _check_room(information(Path(names[0])), len(names), where)
        reader = sitk.ImageSeriesReader()
        reader.SetFileNames(names)
        reader.MetaDataDictionaryArrayUpdateOn()
        try:
            image = reader.Execute()
            keyed = all(reader.HasMetaDataKey(k, _POSITION) for k in range(len(names)))
            positions = [reader.GetMetaData(k, _POSITION) for k in range(len(names))] if keyed else []
        except Exception as error:
            raise FormatError(f"{where}: the DICOM series cannot be read: {reason(error)}; "
                              "it may be incomplete or compressed in an unknown way") from error
    if image.GetDimension() == 3 and len(positions) > 1:
        _place_slices(image, positions, where)
    return from_sitk(image, None, where)


def _place_slices(image: Any, positions: list[str], where: str) -> None:
    """Set the third axis from the slices' own positions: ITK trusts the first two slices and ignores a gantry's tilt."""
    try:
        at = np.array([[float(v) for v in position.split("\\")] for position in positions])
    except ValueError as error:
        raise FormatError(f"{where}: a slice's position is not three numbers") from error
    step = (at[-1] - at[0]) / (len(at) - 1)
    length = float(np.linalg.norm(step))
    stray = np.linalg.norm(at - at[0] - np.arange(len(at))[:, None] * step, axis=1)
    if not length > 0 or stray.max() > 0.1 * length:
        raise GeometryError(f"{where}: slices are missing or unevenly spaced (slice {int(stray.argmax())} of {len(at)} lies "
                            f"{stray.max():.3g} mm from its place); give the complete series")
    direction = np.reshape(image.GetDirection(), (3, 3)).copy()
    direction[:, 2] = step / length
    image.SetSpacing((*image.GetSpacing()[:2], length))
    image.SetDirection(direction.ravel().tolist())


def to_sitk(image: Image, *, slices: bool = True) -> Any:
    """One image as SimpleITK's. A slice that knows its place in 3D becomes a volume of one slice, unless not `slices`.

    Raises GeometryError for axes so oblique that ITK cannot hold them.
    """
    import SimpleITK as sitk

    data = stored(image.data[0].detach().cpu())
    affine = image.grid.affine[0].cpu()
    if image.ndim == 2 and image.slice_affine is not None and slices:
        data, affine = data[..., None], embed(image.grid, image.slice_affine)
    ndim = data.ndim - 1
    array = np.ascontiguousarray(data.numpy().transpose(*range(ndim, 0, -1), 0))
    several = len(data) > 1
    made = sitk.GetImageFromArray(array if several else array[..., 0], isVector=several)
    set_place(made, affine)
    return made


def set_place(image: Any, affine: Tensor) -> None:
    """Put a SimpleITK image where `affine` (D+1, D+1), index → RAS mm, says. Raises GeometryError for axes so oblique that ITK
    cannot hold them."""
    ndim = len(affine) - 1
    geometry = _flip(ndim)[:, None] * affine
    spacing = geometry[:ndim, :ndim].norm(dim=0)
    try:
        image.SetSpacing(spacing.tolist())
        image.SetDirection((geometry[:ndim, :ndim] / spacing).flatten().tolist())
        image.SetOrigin(geometry[:ndim, ndim].tolist())
    except Exception as error:
        raise GeometryError(f"image: ITK cannot hold this affine: {reason(error)}; write .nii.gz") from error


def _picture(image: Image, suffix: str) -> Image:
    """Grey values a picture file can hold: rounded, and 8 or 16 bits without sign. Raises FormatError if none fits."""
    if image.ndim != 2:
        raise FormatError(f"output: a 3D image does not go into a {suffix} picture; write .nii.gz")
    data = stored(image.data)
    if data.is_floating_point():
        if suffix in _FLOAT_PICTURES:
            return image
        data = data.nan_to_num().round().clamp_min(0)  # cubic interpolation undershoots a black ground
    low, high = int(data.cpu().numpy().min()), int(data.cpu().numpy().max())  # torch finds no uint16's minimum
    if suffix in _FLOAT_PICTURES and data.dtype in (torch.uint8, torch.int16):
        return image.with_data(data)
    limit = 65535 if suffix in (".png", *_FLOAT_PICTURES) else 255
    if low < 0 or high > limit:
        raise FormatError(f"output: values {low} to {high} do not go into a {suffix} picture, which holds 0 to {limit}; "
                          "write .tif as float32, or .nii.gz")
    wide = high > 255 or (data.dtype in (torch.uint16, torch.int32, torch.int64) and limit == 65535)
    return image.with_data(data.to(torch.uint16 if wide else torch.uint8))


def write(image: Image, path: Path, *, suffix: str) -> None:
    """Write one image by SimpleITK, uncompressed where the format leaves the choice.

    Raises FormatError for voxels the format cannot hold, GeometryError for an affine, OutputError for a full disk.
    """
    picture = suffix in PICTURES
    if picture:
        image = _picture(image, suffix)
    with quiet() as sitk:
        made = to_sitk(image, slices=not picture)
        try:
            sitk.WriteImage(made, in_utf8(path), useCompression=False)
        except RegkitError:
            raise
        except Exception as error:
            if isinstance(error, RuntimeError) and any(t in str(error) for t in ("No space", "could not be opened")):
                raise OutputError(f"output: {path} cannot be written: {reason(error)}") from error
            raise FormatError(f"output: {made.GetPixelIDTypeAsString()} voxels of {made.GetNumberOfComponentsPerPixel()} "
                              f"channels do not go into {suffix}: {reason(error)}") from error
