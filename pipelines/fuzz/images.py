"""Images as nibabel and SimpleITK read them, and NRRD, MetaImage and PNG by their bytes: whether all is there and undamaged."""

from __future__ import annotations

import gzip
import math
import re
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from changes import chunks
from oracles import Wrong, close, same

_NRRD = {word: kind for kind, words in {
    "i1": "signed char,int8,int8_t", "u1": "uchar,unsigned char,uint8,uint8_t", "f4": "float", "f8": "double",
    "i2": "short,short int,signed short,signed short int,int16,int16_t", "u2": "ushort,unsigned short,unsigned short int,uint16,uint16_t",
    "i4": "int,signed int,int32,int32_t", "u4": "uint,unsigned int,uint32,uint32_t",
    "i8": "longlong,long long,long long int,signed long long,signed long long int,int64,int64_t",
    "u8": "ulonglong,unsigned long long,unsigned long long int,uint64,uint64_t"}.items() for word in words.split(",")}
_META = {"MET_CHAR": "i1", "MET_UCHAR": "u1", "MET_SHORT": "i2", "MET_USHORT": "u2", "MET_INT": "i4", "MET_UINT": "u4", "MET_LONG": "i8",
         "MET_ULONG": "u8", "MET_LONG_LONG": "i8", "MET_ULONG_LONG": "u8", "MET_FLOAT": "f4", "MET_DOUBLE": "f8"}


def image(path: Path, found: Any) -> None:
    """An `Image` against its file."""
    grid = found.grid
    if not np.isfinite(grid.affine.numpy()).all() or not (grid.spacing > 0).all() or min(found.data.shape) < 1:
        raise Wrong(f"an impossible grid: {grid!r}")
    suffix = path.suffix.lower()
    if suffix in (".nii", ".hdr", ".img", ".mgh", ".mgz", ".gz"):
        raw, slope, inter, affine = _by_nibabel(path, suffix)
        with np.errstate(all="ignore"):
            scaled = slope is not None and (slope, inter) != (1.0, 0.0)
            values = raw.astype(np.float64) * slope + inter if scaled else raw
            size = float(max(np.nanmax(np.abs(raw.astype(np.float64) * slope), initial=0.0), abs(inter))) if scaled else 0.0
    else:
        values, affine = _by_itk(path, suffix)
        size = 0.0
    mine = found.data[0].movedim(0, -1).numpy()
    same(mine.squeeze(), values.squeeze(), "voxels", size)
    _place(found, affine, values.shape)


def _place(image: Any, affine: np.ndarray, shape: tuple[int, ...]) -> None:
    """The axes that have voxels lie where the oracle says."""
    if len(affine) == 3 or image.ndim == 3:
        close(image.grid.affine[0].numpy(), affine)
    else:
        kept = [axis for axis in range(min(3, len(shape))) if shape[axis] > 1] if len(shape) > 2 else [0, 1]
        kept = kept if len(kept) == 2 else [0, 1]
        close(image.slice_affine.numpy()[:, [0, 1, 3]], affine[:, [*kept, 3]])


def _by_nibabel(path: Path, suffix: str) -> tuple[np.ndarray, Any, Any, np.ndarray]:
    """Stored values as (*S, channels), slope, intercept, affine; the packed file must be whole."""
    import nibabel as nib
    from nibabel.imageglobals import LoggingOutputSuppressor

    with LoggingOutputSuppressor():
        if suffix in (".hdr", ".img"):
            image: Any = nib.load(path)
        else:
            blob = path.read_bytes()
            blob = gzip.decompress(blob) if blob.startswith(b"\x1f\x8b") else blob
            second = 540 in (int.from_bytes(blob[:4], "little"), int.from_bytes(blob[:4], "big"))
            image = (nib.MGHImage if ".mg" in path.name.lower() else nib.Nifti2Image if second else nib.Nifti1Image).from_bytes(blob)
        proxy = image.dataobj
        raw = np.asanyarray(proxy.get_unscaled())
    if raw.dtype.names:
        raw = np.stack([raw[name] for name in raw.dtype.names], -1)
    return raw, proxy.slope, proxy.inter, image.affine


def _by_itk(path: Path, suffix: str) -> tuple[np.ndarray, np.ndarray]:
    import SimpleITK as sitk

    whole = {".nrrd": _whole_nrrd, ".nhdr": _whole_nrrd, ".mha": _whole_meta, ".mhd": _whole_meta, ".png": _whole_png}.get(suffix)
    stored = whole(path) if whole else None
    if suffix in (".tif", ".bmp"):
        from PIL import Image

        try:
            with Image.open(path) as picture:
                picture.load()
        except Exception as error:
            raise Wrong(f"Pillow refuses the picture: {error}") from error
    image = sitk.ReadImage(str(path))
    array = sitk.GetArrayFromImage(image)
    if stored is not None and not np.array_equal(np.sort(array.ravel()), np.sort(stored.ravel()), equal_nan=array.dtype.kind == "f"):
        raise Wrong("voxels are not those of the file's bytes")
    d, several = image.GetDimension(), image.GetNumberOfComponentsPerPixel() > 1
    axes = (*range(d - 1, -1, -1), d) if several else tuple(range(d - 1, -1, -1))
    n = min(d, 3)
    affine = np.eye(n + 1)
    affine[:n, :n] = (np.reshape(image.GetDirection(), (d, d)) * image.GetSpacing())[:n, :n]
    affine[:n, n] = image.GetOrigin()[:n]
    affine[:2] *= -1
    values = array.transpose(axes)
    if d == 4 and values.shape[3] != 1:
        raise Wrong("several volumes were read as one")
    return values, affine


def _fields(blob: bytes) -> tuple[dict[str, str], bytes]:
    end = re.search(rb"\r\n\r\n|\n\n|\r\r", blob)
    head, rest = (blob[: end.start()], blob[end.end() :]) if end else (blob, b"")
    lines = (line.split(":", 1) for line in re.split("[\r\n]+", head.decode("latin-1"))[1:] if ":" in line and not line.startswith("#"))
    return {key.strip().lower(): value.strip() for key, value in lines}, rest


def _whole_nrrd(path: Path) -> np.ndarray | None:
    """The stored values where this simple reader knows the layout. Raises Wrong where too few are there."""
    fields, rest = _fields(path.read_bytes())
    given = next((fields[key] for key in ("data file", "datafile") if key in fields), None)
    if given is not None:
        other = path.parent / given
        if path.suffix.lower() == ".nrrd" or Path(given).name != given or not other.is_file():
            raise Wrong(f"voxels were taken from {given}")
        rest = other.read_bytes()
    try:
        count = math.prod(int(word) for word in fields["sizes"].split())
        kind = np.dtype(_NRRD[fields["type"].lower()]).newbyteorder({"big": ">"}.get(fields.get("endian", "").lower(), "<"))
        encoding = fields["encoding"].lower()
    except (KeyError, ValueError):
        return None
    if {"line skip", "lineskip", "byte skip", "byteskip"} & set(fields):
        return None
    if encoding in ("gzip", "gz"):
        try:
            rest = _inflate(rest, count * kind.itemsize, 31)
        except (zlib.error, ValueError) as error:
            raise Wrong(f"its packed voxels are damaged: {error}") from error
    elif encoding != "raw":
        return None
    if len(rest) < count * kind.itemsize:
        raise Wrong(f"{len(rest)} bytes of voxels, and {count * kind.itemsize} are promised")
    return np.frombuffer(rest, kind, count)


def _whole_meta(path: Path) -> np.ndarray | None:
    head, rest = re.split(rb"ElementDataFile\s*[=:]\s*", path.read_bytes(), maxsplit=1)
    where, _, rest = rest.partition(b"\n")
    fields = {key.strip(): value.strip() for key, value in
              (re.split(r"[=:]", line, maxsplit=1) for line in head.decode("latin-1").splitlines() if re.search("[=:]", line))}
    name = where.strip().decode("latin-1")
    if name.lower() not in ("local", "(embedded)"):
        if path.suffix.lower() == ".mha" or Path(name).name != name:
            raise Wrong(f"voxels were taken from {name}")
        if not (path.parent / name).is_file():
            return None
        rest = (path.parent / name).read_bytes()
    try:
        count = math.prod(int(word) for word in fields["DimSize"].split()) * int(fields.get("ElementNumberOfChannels", 1))
        big = fields.get("BinaryDataByteOrderMSB", fields.get("ElementByteOrderMSB", "False"))[:1] in "Tt1"
        kind = np.dtype(_META[fields["ElementType"]]).newbyteorder(">" if big else "<")
    except (KeyError, ValueError):
        return None
    if fields.get("BinaryData", "True")[:1] not in "Tt1" or fields.get("HeaderSize", "0") != "0":
        return None
    if fields.get("CompressedData", "False")[:1] in "Tt1":
        try:
            rest = _inflate(rest, count * kind.itemsize, 47)
        except (zlib.error, ValueError) as error:
            raise Wrong(f"its packed voxels are damaged: {error}") from error
    if len(rest) < count * kind.itemsize:
        raise Wrong(f"{len(rest)} bytes of voxels, and {count * kind.itemsize} are promised")
    return np.frombuffer(rest, kind, count)


def _inflate(blob: bytes, most: int, wrap: int) -> bytes:
    """The first bytes of what is packed, and whether its end is sound."""
    unpacker = zlib.decompressobj(wrap)
    found = unpacker.decompress(blob, most)
    while not unpacker.eof:
        more = unpacker.decompress(unpacker.unconsumed_tail, 1 << 20)
        if not more and not unpacker.unconsumed_tail and not unpacker.eof:
            raise ValueError("its end is missing")
    return found


def _whole_png(path: Path) -> None:
    """Every needed part's checksum is right, and the picture unpacks to the last row."""
    blob = path.read_bytes()
    if not blob.startswith(b"\x89PNG\r\n\x1a\n"):
        if not blob.startswith(b"BM") and blob[:2] not in (b"\xff\xd8", b"II", b"MM"):  # another picture under this name
            raise Wrong("what is no picture was read as one")
        return
    at, parts = 8, chunks(blob)
    for kind, content in parts:
        stated = blob[at + 8 + len(content) : at + 12 + len(content)]
        if kind in (b"IHDR", b"PLTE", b"IDAT") and stated != struct.pack(">I", zlib.crc32(kind + content)):
            raise Wrong(f"the checksum of {kind!r} is wrong")
        if kind == b"IEND":
            break
        at += 12 + len(content)
    width, height, depth, colour, _, _, interlaced = struct.unpack(">IIBBBBB", parts[0][1][:13])
    if interlaced:
        return
    row = 1 + (width * depth * {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour] + 7) // 8
    packed = b"".join(content for kind, content in parts if kind == b"IDAT")
    try:
        have = len(zlib.decompressobj().decompress(packed, row * height))
    except zlib.error as error:
        raise Wrong(f"its pixels are damaged: {error}") from error
    if have < row * height:
        raise Wrong(f"{have} bytes of pixels, and {row * height} are promised")
