"""NIfTI and MGH by nibabel's headers, with voxels taken straight from the file's bytes and gzip by isal."""

from __future__ import annotations

import contextlib
import io
import logging
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from regkit.errors import FormatError, GeometryError, OptionError, RegkitError
from regkit.image import Image
from regkit.io.memory import check_room
from regkit.io.packing import GZIP, pack, unpack
from regkit.io.slices import as_image, embed, reason, tensor

_HEAD = 1 << 16  # bytes that hold any header
_DEFLATE = 1032  # times that packing can make bytes fewer, at most
_SPARE = 1 << 26  # bytes that may follow the voxels and are still checked
_VECTOR_INTENT = 1007
_COLOUR = {3: np.dtype([(c, "u1") for c in "RGB"]), 4: np.dtype([(c, "u1") for c in "RGBA"])}
_MGH_TYPES = {"uint8": "uint8", "int8": "int16", "int16": "int16", "uint16": "int32", "int32": "int32", "float32": "float32"}


def read(path: Path, volume: int | None, name: str) -> Image:
    """The NIfTI or MGH file at `path`, RAS mm; `volume` picks one of a 4D file, files of one volume ignore it.

    Raises FormatError for what is not such a file or is truncated, GeometryError for an affine no scan can have,
    OptionError for 4D data without a `volume` that exists.
    """
    import nibabel as nib

    where = f"{name}: {path}"
    try:
        with quiet():
            if path.name.lower().endswith((".hdr", ".img")):
                return from_nibabel(nib.load(str(path)), volume, where)
            blob = unpacked(path, where)
            image = _header(path, blob)
            raw = _voxels(image, blob, where)
            return _image(raw, image.dataobj.slope, image.dataobj.inter, image.affine, volume, where)
    except RegkitError:
        raise
    except Exception as error:  # nibabel, isal and numpy raise a dozen types on damaged bytes; all mean the same here
        raise FormatError(f"{where} is not a readable {'MGH' if _mgh(path) else 'NIfTI'} file: {reason(error)}; "
                          "it may be damaged or truncated") from error


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """nibabel without its comments on headers on stderr; without any handler Python would print them itself."""
    from nibabel.imageglobals import LoggingOutputSuppressor, logger

    silent = logging.NullHandler()
    with LoggingOutputSuppressor():
        logger.addHandler(silent)
        try:
            yield
        finally:
            logger.removeHandler(silent)


def from_nibabel(image: Any, volume: int | None, where: str) -> Image:
    """A nibabel image as ours, RAS mm. Raises as `read` does."""
    from nibabel.arrayproxy import ArrayProxy
    from nibabel.spatialimages import SpatialImage

    if not isinstance(image, SpatialImage) or image.affine is None:
        raise FormatError(f"{where}: a nibabel {type(image).__name__} has no voxels on a grid; expected an image")
    _check_shape(image.shape, where)
    proxy: Any = image.dataobj
    try:
        if type(proxy) is ArrayProxy:
            # A damaged header can promise more voxels than there is memory: compare with the file first.
            file = proxy.file_like
            need = math.prod(image.shape) * proxy.dtype.itemsize
            if isinstance(file, str) and not file.lower().endswith((".gz", ".mgz", ".bz2", ".zst")):
                check_size(need, Path(file).stat().st_size - proxy.offset, where)
            else:
                check_room(need, where)
            raw, slope, inter = proxy.get_unscaled(), proxy.slope, proxy.inter
        else:
            raw, slope, inter = np.asanyarray(proxy), 1.0, 0.0
    except RegkitError:
        raise
    except Exception as error:
        raise FormatError(f"{where}: its voxels cannot be read: {reason(error)}; it may be damaged or truncated") from error
    return _image(raw, slope, inter, image.affine, volume, where)


def _mgh(path: Path) -> bool:
    return path.name.lower().endswith((".mgh", ".mgz", ".mgh.gz"))


def unpacked(path: Path, where: str, need: int | None = None) -> bytes:
    """The file's bytes, uncompressed. What is compressed is known by its first bytes: names are often wrong.

    need: bytes that are worth unpacking, by default what the file's header speaks of; some more are unpacked, but not all that a small
    file may hold. Raises FormatError where there is less in the file, or in memory."""
    check_room(path.stat().st_size, where)
    blob = path.read_bytes()
    if not blob:
        raise EOFError("the file is empty")
    if not blob.startswith(GZIP):
        return blob
    most = _promised(path, blob, where) if need is None else need
    check_room(most, where)
    return unpack(blob, most + _HEAD, _SPARE)


def _promised(path: Path, blob: bytes, where: str) -> int:
    """Bytes of which the header of a packed file speaks. Raises FormatError where they are more than can be in it."""
    header = _first(path, unpack(blob, _HEAD))
    shape = tuple(map(int, header.get_data_shape()))
    _check_shape(shape, where)
    need = max(0, int(header.get_data_offset())) + math.prod(shape) * header.get_data_dtype().itemsize
    check_size(need, _DEFLATE * len(blob), where)
    return need


def _header(path: Path, blob: bytes) -> Any:
    import nibabel as nib
    from nibabel.freesurfer.mghformat import MGHImage

    return (MGHImage if _mgh(path) else nib.Nifti2Image if second(blob) else nib.Nifti1Image).from_bytes(blob)


def _first(path: Path, head: bytes) -> Any:
    """The header alone, without its extensions."""
    import nibabel as nib
    from nibabel.freesurfer.mghformat import MGHHeader

    if _mgh(path):
        return MGHHeader.from_fileobj(io.BytesIO(head))
    kind = nib.Nifti2Header if second(head) else nib.Nifti1Header
    return kind(head[: kind.template_dtype.itemsize], check=False)


def second(blob: bytes) -> bool:
    """Whether the first bytes are NIfTI-2's."""
    return 540 in (int.from_bytes(blob[:4], "little"), int.from_bytes(blob[:4], "big"))


def _check_shape(shape: tuple[int, ...], where: str) -> None:
    if not shape or min(shape) < 1:
        raise FormatError(f"{where}: shape {tuple(map(int, shape))} has an empty axis; expected at least one voxel")


def check_size(need: int, have: int, where: str) -> None:
    if have < need:
        raise FormatError(f"{where} is truncated: its header promises {need} bytes of voxels and {max(have, 0)} at most are there; "
                          "fetch or export the file again")


def _voxels(image: Any, blob: bytes, where: str) -> np.ndarray:
    """The stored values as a view of the file's bytes: nibabel's own reading copies them once more."""
    proxy = image.dataobj
    shape, dtype, offset = tuple(map(int, proxy.shape)), proxy.dtype, int(proxy.offset)
    _check_shape(shape, where)
    if offset < 0:
        raise ValueError(f"voxels start at byte {offset}")
    check_size(math.prod(shape) * dtype.itemsize, len(blob) - offset, where)
    return np.frombuffer(blob, dtype, math.prod(shape), offset).reshape(shape, order="F")


def select_volume(times: int, volume: int | None, where: str) -> int:
    """Which of `times` volumes to take; a single one needs no choice. Raises OptionError."""
    if times == 1:
        return 0
    if volume is None:
        raise OptionError(f"{where} holds {times} volumes; choose one of 0 to {times - 1} by --volume")
    if not 0 <= volume < times:
        raise OptionError(f"volume: {volume}, but {where} holds {times} volumes; choose one of 0 to {times - 1}")
    return volume


def _image(raw: np.ndarray, slope: Any, inter: Any, affine: np.ndarray, volume: int | None, where: str) -> Image:
    """Stored values (i, j[, k[, t[, c]]]) to an image: pick the volume, split channels, scale."""
    _check_shape(raw.shape, where)
    if raw.ndim < 2:
        raise FormatError(f"{where}: one axis {raw.shape}; expected a 2D or 3D scan")
    extra = raw.shape[3:]
    if math.prod(extra[1:]) > 1:
        channels = max(extra[1:])
        if channels != math.prod(extra[1:]):
            raise FormatError(f"{where}: {raw.ndim} axes {raw.shape}; expected at most space, time and channels")
    else:
        channels = 1
    if extra:
        raw = raw.reshape(*raw.shape[:3], extra[0], channels, order="F")[:, :, :, select_volume(extra[0], volume, where)]
    else:
        raw = raw[..., None]
    if raw.dtype.names:
        raw = np.stack([raw[field] for field in raw.dtype.names], -1)[..., 0, :]
    data = tensor(np.moveaxis(raw, -1, 0), where)
    if slope not in (None, 1.0) or inter not in (None, 0.0):
        wide = torch.float64 if data.dtype in (torch.int32, torch.int64) else torch.float32
        slope, inter = 1.0 if slope is None else float(slope), 0.0 if inter is None else float(inter)
        data = data.to(wide).mul_(slope).add_(inter).to(torch.float32)
    return as_image(data, affine, where)


def write(image: Image, path: Path, *, suffix: str) -> None:
    """Write one image as NIfTI-1 or MGH by `suffix`; files are byte for byte the same for the same image.

    Raises GeometryError for a batch and for shapes the format cannot hold, FormatError for voxels it cannot hold.
    """
    data = image.data[0].detach().cpu()
    affine = embed(image.grid, image.slice_affine).numpy()
    head, voxels = (_mgh_bytes(data, affine), memoryview(b"")) if suffix.startswith(".mg") else _nifti_bytes(data, affine)
    with path.open("wb") as file:
        if suffix.endswith(("gz", "mgz")):
            pack(head, voxels, file)
        else:
            file.write(head)
            file.write(voxels)


def stored(data: Tensor) -> Tensor:
    """`data` as it is written: bool as uint8, every float as float32, integers as they are."""
    if data.dtype == torch.bool:
        return data.to(torch.uint8)
    return data.to(torch.float32) if data.is_floating_point() else data


def _nifti_bytes(data: Tensor, affine: np.ndarray) -> tuple[bytes, memoryview]:
    """Header, no extensions; voxels (C, *S) with the first axis fastest."""
    import nibabel as nib

    data = stored(data)
    channels, shape = data.shape[0], tuple(data.shape[1:])
    header = nib.Nifti1Header()
    array = data.numpy()
    if channels in _COLOUR and data.dtype == torch.uint8:
        # ITK and Slicer read 8-bit colour as RGB24; other channels as a vector on the fifth axis.
        header.set_data_dtype(_COLOUR[channels])
        voxels = np.ascontiguousarray(array.transpose(*range(data.ndim - 1, 0, -1), 0))
    else:
        header.set_data_dtype(array.dtype)
        voxels = np.ascontiguousarray(array.transpose(0, *range(data.ndim - 1, 0, -1)))
        if channels > 1:
            shape = (*shape, *[1] * (4 - len(shape)), channels)
            header.set_intent(_VECTOR_INTENT, ())
    try:
        header.set_data_shape(shape)
        set_affine(header, affine)
    except Exception as error:
        raise GeometryError(f"image: shape {shape} does not go into NIfTI-1: {reason(error)}; write .nrrd") from error
    header.set_xyzt_units("mm")
    header.set_slope_inter(1, 0)
    header["vox_offset"] = 352
    return header.binaryblock + bytes(4), voxels.reshape(-1).view(np.uint8).data


def set_affine(header: Any, affine: np.ndarray, code: int = 1) -> None:
    """sform always; qform too where it can say the same: quaternions know no shear."""
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    axes = affine[:3, :3] / spacing
    header.set_sform(affine, code=code)
    if np.abs(axes.T @ axes - np.eye(3)).max() < 1e-4:
        header.set_qform(affine, code=code)
    else:
        header["pixdim"][1:4] = spacing
        header.set_qform(None, code=0)


def _mgh_bytes(data: Tensor, affine: np.ndarray) -> bytes:
    from nibabel.freesurfer.mghformat import MGHImage

    data = stored(data)
    name = str(data.dtype).removeprefix("torch.")
    if name == "int64" and int(data.min()) >= -(2**31) and int(data.max()) < 2**31:
        name = "int32"
    if name not in _MGH_TYPES:
        raise FormatError(f"image: {name} voxels do not go into MGH; write .nii.gz")
    if len(data) > 1:
        raise FormatError(f"image: {len(data)} channels do not go into MGH; write .nii.gz")
    array: Any = data[0].numpy().astype(_MGH_TYPES[name])
    try:
        return MGHImage(array.reshape(*array.shape, *[1] * (3 - array.ndim)), affine).to_bytes()
    except Exception as error:
        raise GeometryError(f"image: shape {array.shape} does not go into MGH: {reason(error)}; write .nii.gz") from error
