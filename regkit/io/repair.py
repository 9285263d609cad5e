"""Corrected copies of scans: the header is set right, every voxel stays as it is, and the original is never touched."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch

from regkit.errors import FormatError, GeometryError, OptionError, OutputError, RegkitError, choose
from regkit.io import itk, nifti
from regkit.io.doctor import findings, sized
from regkit.io.findings import FIXES, ON_REQUEST, UNITS, axes_of, possible, usable
from regkit.io.headers import Header, header_file, raw_nifti, read_header
from regkit.io.images import image_suffix
from regkit.io.output import output_file
from regkit.io.packing import pack
from regkit.io.paths import home, in_utf8
from regkit.io.slices import reason

KINDS = {".nii": (".nii", ".nii.gz"), ".mgh": (".mgh", ".mgz"), ".nrrd": (".nrrd", ".mha")}
"""What a copy may be called, by what is written."""
_PLACE = {"no-orientation", "sform-qform", "handedness", "sform-unusable", "qform-unusable", "voxel-size", "shear"}
_HEADER = 1 << 24  # bytes of a header of its own, with extensions, at most
_ALIGNED = 2  # NIfTI's code for a place that no scanner vouches for


def repaired(path: str | Path, output: str | Path, *, units: str | None = None, straighten: bool = False, overwrite: bool = False,
             name: str = "scan") -> tuple[str, ...]:
    """Write a copy of `path` whose header is corrected as `FIXES` says → the codes of the findings that were corrected.

    units: mm, um or m, the unit that the numbers are in, if you know it: they become mm. straighten: sheared axes become the nearest
    right-angled ones about the same middle, which moves voxels. The copy's voxels are the original's, bit for bit; NIfTI's extensions
    stay. Equal files and options give equal copies, and a copy of a copy changes nothing.

    Raises FormatError for what cannot be read, is truncated or has no such copy, GeometryError where nothing in the file says how
    large its voxels are or where they lie, OptionError, OutputError for a place that is taken or is the original itself.
    """
    path, output = home(path), home(output)
    where = f"{name}: {path}"
    if units is not None:
        choose("units", units, UNITS)
    header = read_header(path, name)
    check_output(path, output, header, where)
    if min(header.shape, default=0) < 1:
        raise FormatError(f"{where}: shape {header.shape} has an empty axis; expected at least one voxel")
    asked = {"units": units is not None, "straighten": straighten}
    codes = {one.code for one in findings(header) if one.code in FIXES and asked.get(ON_REQUEST.get(one.code, ""), True)}
    try:
        with output_file(output, overwrite=overwrite) as unfinished:
            if header.kind == "itk":
                _itk(path, unfinished, header, codes, units, where)
            else:
                blob = _mgh(path, header, codes, units, where) if header.kind == "mgh" else _nifti(path, header, codes, units, where)
                with unfinished.open("wb") as file:
                    if output.name.lower().endswith(("gz", ".mgz")):
                        pack(b"", blob, file)
                    else:
                        file.write(blob)
    except RegkitError:
        raise
    except Exception as error:  # nibabel, isal, SimpleITK and numpy raise a dozen types on damaged bytes; all mean the same here
        raise FormatError(f"{where} cannot be copied: {reason(error)}; it may be damaged or truncated") from error
    return tuple(code for code in FIXES if code in codes)


def suffix_of(path: Path) -> str:
    """The suffix of a copy of `path`: its own, or that of the one file in which an image in two files is copied."""
    suffix = image_suffix(path) or ""
    return {".hdr": ".nii.gz", ".img": ".nii.gz", ".nhdr": ".nrrd", ".mhd": ".mha", ".mgh.gz": ".mgz"}.get(suffix, suffix)


def check_output(path: Path, output: Path, header: Header, where: str) -> None:
    """Raise what is wrong about writing a copy of `path` to `output`."""
    kind = {"nifti": ".nii", "analyze": ".nii", "mgh": ".mgh", "itk": ".nrrd"}.get(header.kind)
    if kind is None or path.is_dir() or path.suffix.lower() == ".dcm":
        raise FormatError(f"{where} is a picture or DICOM, of which no corrected copy is made; convert it to NIfTI first")
    if image_suffix(output) not in KINDS[kind]:
        raise OptionError(f"fix: {output.name} does not fit {path.name}; a copy keeps its kind: give a name that ends in "
                          f"{' or '.join(KINDS[kind])}")
    if output.exists() and output.samefile(path):
        raise OutputError(f"output: {output} is the scan itself, which is never touched; choose another name")


def _place(header: Header, codes: set[str], units: str | None, fallback: np.ndarray | None, where: str) -> tuple[np.ndarray, bool]:
    """The place (4, 4) that a copy has, and whether it differs from what the header states."""
    shape = header.shape
    places = (header.affine if header.source == "sform" or sized(header) else None, *((header.qform, fallback) if sized(header) else ()))
    found = next((one for one in places if usable(one, shape)), None)
    if found is None:
        raise GeometryError(f"{where}: nothing in its header says how large its voxels are and where they lie; convert it again from "
                            "what it was made of")
    factor = 1.0
    if units is not None:
        factor = UNITS[units]
    elif "unit-other" in codes:
        factor = UNITS[header.unit]
        factor = 1.0 if possible(found, shape) and not possible(found * factor, shape) else factor
    place = complete(found, shape)
    if "shear" in codes:
        place = straight(place, shape)
    place[:3] *= factor
    return place, factor != 1.0 or bool(codes & _PLACE)


def complete(affine: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """`affine` (4, 4) float64 in which axes of one voxel leave the others' plane; files of one slice often have none."""
    affine, kept = affine.astype(np.float64), axes_of(shape)
    if usable(affine, (2, 2, 2)) or len(kept) != 2:
        return affine
    normal = np.cross(affine[:3, kept[0]], affine[:3, kept[1]])
    affine[:3, ({0, 1, 2} - set(kept)).pop()] = normal / np.linalg.norm(normal)
    return affine


def straight(affine: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The right-angled axes nearest to those of `affine` (4, 4), of the same lengths, about the same middle."""
    lengths = np.linalg.norm(affine[:3, :3], axis=0)
    middle = np.array([(n - 1) / 2 for n in (*shape[:3], 1, 1)[:3]])
    u, _, vh = np.linalg.svd(affine[:3, :3] / lengths)
    turned = affine.copy()
    turned[:3, :3] = u @ vh * lengths
    turned[:3, 3] += (affine - turned)[:3, :3] @ middle
    return turned


def _shape(header: Header, codes: set[str]) -> tuple[int, ...]:
    shape = header.shape
    while "last-axis" in codes and len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    return shape


def _nifti(path: Path, header: Header, codes: set[str], units: str | None, where: str) -> bytes:
    """The file whole, uncompressed: the header corrected, the rest as it is. Two files become one."""
    if header.kind == "analyze":
        raw, after = _from_analyze(path)
        fallback = None
    else:
        half = path.name.lower().endswith((".hdr", ".img"))
        blob = nifti.unpacked(header_file(path), where, _HEADER if half else None)
        raw, mended = raw_nifti(blob)
        fallback = mended.get_base_affine() if all(math.isfinite(v) for v in header.spacing) else None
        size, start = len(raw.binaryblock), int(mended.get_data_offset())
        after = blob[size:]
        voxels = math.prod(header.shape) * raw.get_data_dtype().itemsize
        if half:
            extensions = after or bytes(4)
            after = extensions + nifti.unpacked(_voxel_file(path), where, start + voxels)[start:]
            start = size + len(extensions)
            raw["magic"], raw["vox_offset"] = raw["magic"].item().replace(b"ni", b"n+"), start
        nifti.check_size(voxels, len(after) + size - start, where)
    place, changed = _place(header, codes, units, fallback, where)
    if changed:
        sform, qform = header.codes
        nifti.set_affine(raw, place, next((code for code in (sform, qform) if 0 < code < 6), _ALIGNED))
    if "last-axis" in codes:
        raw.set_data_shape(_shape(header, codes))
    if units is not None or codes & {"unit-missing", "unit-other"}:
        raw["xyzt_units"] = int(raw["xyzt_units"]) & ~7 | 2
    return raw.binaryblock + after


def _voxel_file(path: Path) -> Path:
    for suffix in (".img", ".IMG"):
        if (other := path.with_suffix(suffix)).exists():
            return other
    raise FormatError(f"{path} is the half of an image that holds the header, and {path.with_suffix('.img')} is not there; bring it back")


def _from_analyze(path: Path) -> tuple[Any, bytes]:
    """A NIfTI header for an Analyze image, and the bytes that follow it."""
    import nibabel as nib

    image: Any = nib.load(str(path))
    proxy = image.dataobj
    voxels = np.asanyarray(proxy.get_unscaled())
    header: Any = nib.Nifti1Header(endianness="<")
    header.set_data_dtype(voxels.dtype.newbyteorder("<"))
    header.set_data_shape(image.shape)
    header.set_slope_inter(proxy.slope, proxy.inter)
    header["vox_offset"] = 352
    return header, bytes(4) + voxels.astype(voxels.dtype.newbyteorder("<")).tobytes("F")


def _mgh(path: Path, header: Header, codes: set[str], units: str | None, where: str) -> bytes:
    from nibabel.freesurfer.mghformat import MGHHeader

    blob = nifti.unpacked(path, where)
    raw: Any = MGHHeader(blob)  # which makes up a place where none is stated
    size = raw.get_data_offset()
    nifti.check_size(math.prod(header.shape) * raw.get_data_dtype().itemsize, len(blob) - size, where)
    place, changed = _place(header, codes, units, None, where)
    if changed:
        lengths = np.linalg.norm(place[:3, :3], axis=0)
        raw["goodRASFlag"], raw["delta"], raw["Mdc"] = 1, lengths, (place[:3, :3] / lengths).T
        raw["Pxyz_c"] = place[:3, :3] @ (np.array(raw["dims"][:3]) / 2) + place[:3, 3]
    fixed = raw.binaryblock[:size]
    return fixed + blob[len(fixed):]


def _itk(path: Path, output: Path, header: Header, codes: set[str], units: str | None, where: str) -> None:
    place, changed = _place(header, codes, units, None, where)
    with itk.quiet() as sitk:
        image = itk.load(path, where)
        if "last-axis" in codes:
            image = image[..., 0]
        d = image.GetDimension()
        if changed and d > 3:
            raise FormatError(f"{where} has {d} axes; the place of such an image is not corrected: save one volume of it")
        if changed:
            keep = [*range(d), 3]
            itk.set_place(image, torch.from_numpy(place[np.ix_(keep, keep)]))
        sitk.WriteImage(image, in_utf8(output), useCompression=False)
