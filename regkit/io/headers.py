"""Headers as they are stored, before any library mends or hides what is wrong with them."""

from __future__ import annotations

import contextlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from regkit.errors import FormatError, GeometryError, RegkitError
from regkit.io.images import FORMATS, present
from regkit.io.nifti import quiet, second
from regkit.io.packing import begin
from regkit.io.slices import as_image, reason
from regkit.space import Grid

_UNITS = {1: "m", 2: "mm", 3: "um"}
_WORDS = {"mm": "mm", "millimeter": "mm", "um": "um", "µm": "um", "μm": "um", "micron": "um", "m": "m", "meter": "m"}
_TEXT = (".nrrd", ".nhdr", ".mha", ".mhd")


@dataclass(frozen=True, eq=False)
class Header:
    """What a file says of its grid, and of its voxels.

    kind: nifti, analyze, mgh, itk, or picture, of which nothing is expected. shape: every stored axis.
    affine: (4, 4) index → RAS mm that regkit uses, or None where none can be made; source: where it comes from.
    spacing: the voxel sizes as stated, of the spatial axes. unit: mm, um, m or unknown.
    sform, qform: what NIfTI states beside each other, None where its code is 0 or, for the qform, where it says nothing usable.
    stored: the type of a voxel's values as the file holds them, colours as a type with fields, None where it is not told; channels:
    values a voxel has besides these fields and the axes of `shape`. scaled: whether slope and intercept make other values of them.
    """

    kind: Literal["nifti", "analyze", "mgh", "itk", "picture"]
    shape: tuple[int, ...]
    affine: np.ndarray | None
    source: Literal["sform", "qform", "voxel sizes", "header"]
    spacing: tuple[float, ...]
    unit: str = "mm"
    sform: np.ndarray | None = None
    qform: np.ndarray | None = None
    codes: tuple[int, int] = (0, 0)  # of sform and qform
    stored: np.dtype | None = None
    channels: int = 1
    scaled: bool = False


def read_header(path: Path, name: str, grid: Grid | None = None) -> Header:
    """The header at `path`; the voxels stay unread. grid: of a folder with a DICOM series if it is known, as it is in no one header.

    Raises FormatError for what is missing, of no known kind, or no such header.
    """
    where = f"{name}: {path}"
    try:
        suffix = present(path, name)
        if suffix is None:
            return _of_series(path, name, grid)
        if FORMATS[suffix][0] == "itk":
            return _by_itk(path, suffix, where)
        block = begin(header_file(path), 540)
        if suffix in (".mgh", ".mgz", ".mgh.gz"):
            return _mgh(block)
        pair = suffix in (".hdr", ".img")
        analyze = pair and block[344:347] not in (b"ni1", b"n+1") and not second(block)
        header = _analyze(path) if analyze else of_nifti(*raw_nifti(block))
        if min(header.shape, default=0) < 1:
            raise FormatError(f"{where}: shape {header.shape} has an empty axis; expected at least one voxel")
        return header
    except RegkitError:
        raise
    except Exception as error:  # nibabel, isal, SimpleITK and numpy raise a dozen types on damaged bytes; all mean the same here
        raise FormatError(f"{where} has no readable header: {reason(error)}; it may be damaged, truncated or of another kind") from error


def grid_of(header: Header, where: str) -> Grid:
    """The grid on which regkit reads the scan. Raises GeometryError, naming `where`, for a place that no scan can have."""
    if header.affine is None:
        raise GeometryError(f"{where}: its header says no place that can be used; regkit doctor --fix may mend it")
    return as_image(torch.zeros(1).expand(1, *header.shape[:3]), header.affine, where).grid


def header_file(path: Path) -> Path:
    """Where the header of an image in two files lies; else `path`."""
    if not path.name.lower().endswith(".img"):
        return path
    for suffix in (".hdr", ".HDR"):
        if (other := path.with_suffix(suffix)).exists():
            return other
    raise FormatError(f"{path} is the half of an image that holds voxels, and {path.with_suffix('.hdr')} is not there; bring it back")


def raw_nifti(block: bytes) -> tuple[Any, Any]:
    """The header in a file's first bytes as nibabel has it, unchecked, and as it corrects it when it reads a scan.

    Raises what nibabel raises, where regkit refuses the file too."""
    from nibabel.nifti1 import Nifti1Header, Nifti1PairHeader
    from nibabel.nifti2 import Nifti2Header, Nifti2PairHeader

    if len(block) < 348:
        raise EOFError(f"{len(block)} bytes, a header has 348")
    kind: Any
    if second(block):
        kind, size = (Nifti2PairHeader if block[4:7] == b"ni2" else Nifti2Header), 540
    else:
        kind, size = (Nifti1PairHeader if block[344:347] == b"ni1" else Nifti1Header), 348
    with quiet():
        return kind(block[:size], check=False), kind(block[:size])


def of_nifti(raw: Any, mended: Any) -> Header:
    """What a NIfTI header states: as stored, and as nibabel makes use of it."""
    shape = tuple(int(n) for n in mended.get_data_shape())
    spacing = tuple(float(v) for v in raw["pixdim"][1:4][: min(len(shape), 3)])
    sform, qform = int(mended["sform_code"]), int(mended["qform_code"])  # which are 0 where they make no sense
    source = "sform" if sform else "qform" if qform else "voxel sizes"
    affine = turned = None
    with contextlib.suppress(Exception):
        affine = mended.get_best_affine()
    with contextlib.suppress(Exception):
        turned = mended.get_qform() if qform else None
    scaled = True
    with contextlib.suppress(Exception):
        scaled = _scaled(*mended.get_slope_inter())
    return Header("nifti", shape, affine, source, spacing, _UNITS.get(int(raw["xyzt_units"]) & 7, "unknown"),
                  raw.get_sform() if sform else None, turned, (sform, qform), mended.get_data_dtype(), scaled=scaled)


def _scaled(slope: float | None, inter: float | None) -> bool:
    return slope not in (None, 1.0) or inter not in (None, 0.0)


def _analyze(path: Path) -> Header:
    import nibabel as nib

    image: Any = nib.load(str(path))  # only the header; SPM's has an origin, and a file .mat beside it that counts
    return Header("analyze", tuple(map(int, image.shape)), image.affine, "voxel sizes",
                  tuple(float(v) for v in image.header.get_zooms()[:3]), "unknown", stored=image.dataobj.dtype,
                  scaled=_scaled(image.dataobj.slope, image.dataobj.inter))


def _mgh(block: bytes) -> Header:
    from nibabel.freesurfer.mghformat import MGHHeader

    if len(block) < 90:
        raise EOFError(f"{len(block)} bytes, a header has 284")
    block = block[:284].ljust(284, b"\0")
    header: Any = MGHHeader(block)
    given = int(np.frombuffer(block, MGHHeader.template_dtype, 1)["goodRASFlag"][0]) if len(block) >= 284 else 0
    shape = tuple(int(n) for n in header.get_data_shape())
    return Header("mgh", shape, header.get_best_affine(), "header" if given else "voxel sizes",
                  tuple(float(v) for v in header["delta"]), stored=header.get_data_dtype())


def _by_itk(path: Path, suffix: str, where: str) -> Header:
    from regkit.io import itk

    reader = itk.information(path, where)
    dims = reader.GetDimension()
    shape, spacing = tuple(int(n) for n in reader.GetSize()), tuple(float(v) for v in reader.GetSpacing())
    ndim = min(dims, 3)
    stored, channels = itk.stored_as(reader), reader.GetNumberOfComponents()
    flat, affine = itk.affine_of(reader.GetDirection(), spacing, reader.GetOrigin(), ndim).numpy(), np.eye(4)
    affine[:ndim, :ndim], affine[:ndim, 3] = flat[:ndim, :ndim], flat[:ndim, ndim]
    if suffix in itk.PICTURES:
        return Header("picture", shape, affine, "header", spacing, stored=stored, channels=channels)
    text = _lines(path) if suffix in _TEXT else {}
    nrrd = suffix in (".nrrd", ".nhdr")
    placed = "space" in text or "space dimension" in text if nrrd else not text or bool({"elementspacing", "elementsize"} & set(text))
    units = {_WORDS.get(word, "unknown") for word in re.findall(r'"([^"]*)"', text.get("space units", ""))} if nrrd else set()
    return Header("itk", shape, affine, "header" if placed else "voxel sizes", spacing[:ndim], units.pop() if len(units) == 1 else "mm",
                  stored=stored, channels=channels)


def _lines(path: Path) -> dict[str, str]:
    """The fields of a NRRD's or MetaImage's text header, in small letters."""
    head = re.split(rb"\r?\n\r?\n|ElementDataFile", begin(path, 8192), maxsplit=1)[0].decode("latin-1").lower()
    pairs = (re.split(r"\s*:=?\s*|\s*=\s*", line, maxsplit=1) for line in head.splitlines() if not line.startswith("#"))
    return {pair[0].strip(): pair[1] for pair in pairs if len(pair) == 2}


def _of_series(folder: Path, name: str, grid: Grid | None) -> Header:
    """A DICOM series lies in many headers: the grid they make together."""
    from regkit.io import itk

    affine = np.eye(4)
    if grid is None:
        image = itk.read_dicom(folder, name)
        grid = image.grid
        if image.slice_affine is not None:
            affine = image.slice_affine.numpy()
    d = grid.ndim
    if d == 3:
        affine = grid.affine[0].cpu().numpy()
    elif np.array_equal(affine, np.eye(4)):
        affine[:2, :2], affine[:2, 3] = grid.affine[0, :2, :2].cpu(), grid.affine[0, :2, 2].cpu()
    return Header("itk", grid.shape, affine, "header", tuple(grid.spacing[0].tolist()))
