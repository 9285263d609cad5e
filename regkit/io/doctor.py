"""The header doctor: what is wrong, doubtful or worth knowing about a scan's header, without reading its voxels."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from regkit.io.findings import APART, Finding, apart, axes_of, finding, of_place, spacing_of, usable
from regkit.io.headers import Header, read_header
from regkit.io.paths import home
from regkit.space import Grid


def examine(path: str | Path, *, name: str = "scan", grid: Grid | None = None) -> list[Finding]:
    """Findings about the file (or folder with a DICOM series) at `path`, the worst first; of a good one none.

    grid: the grid as it was read, which spares reading a DICOM series for it. Voxels are not looked at, so a truncated file may
    have none. Raises FormatError where there is no readable header.
    """
    return findings(read_header(home(path), name, grid))


def findings(header: Header) -> list[Finding]:
    """Findings about a header, the worst first."""
    if header.kind == "picture":
        return []  # a picture has no place, and the unit of its pixels is anybody's guess
    found = [*_codes(header), *_sizes(header), *_unit(header), *_shape(header)]
    if header.affine is not None and usable(header.affine, header.shape):
        found += of_place(header.affine, header.shape, sizes=header.unit in ("mm", "unknown"))
    return sorted(found, key=rank)


def rank(one: Finding) -> int:
    """The order of findings: the worst first."""
    return ("wrong", "doubtful", "note").index(one.severity)


def _codes(header: Header) -> Iterator[Finding]:
    """Whether the header says where the scan lies, and whether it says so once only."""
    shape, sform, qform = header.shape, header.sform, header.qform
    fine = usable(header.affine, shape)
    if header.source == "voxel sizes":
        what = {"nifti": "qform_code and sform_code are 0", "analyze": "this is Analyze, which knows no directions",
                "mgh": "goodRASFlag is 0"}.get(header.kind, "the header states no space")
        yield finding("no-orientation", "doubtful", f"{what}: nothing says where the scan lies, nor which side is left",
                      "every program assumes something else, and left and right may be exchanged",
                      f"assumes {_assumed(header)}", "convert the scan again from DICOM, or compare it with a scan of the same "
                      "person: regkit doctor SCAN --fixed OTHER")
    elif header.source == "sform" and not fine:
        other = "the qform says something usable" if usable(qform, shape) else "no qform stands in for it"
        yield finding("sform-unusable", "wrong", f"the sform {_broken(sform)}; {other}", "nothing can be placed by it",
                      "refuses the scan", "convert the scan again, or set the sform in a viewer")
    elif not fine and sized(header):
        yield finding("qform-unusable" if header.source == "qform" else "place-unusable", "wrong",
                      f"the {'qform' if header.source == 'qform' else 'direction matrix'} {_broken(header.affine)}",
                      "nothing can be placed by it", "refuses the scan", "convert the scan again")
    if header.source == "sform" and header.codes[1] and sform is not None and fine:
        if qform is None or not usable(qform, shape):
            yield finding("qform-unusable", "doubtful", "qform_code is set, but the qform is no rotation or has no voxel sizes",
                          "programs that prefer the qform, as ITK may, refuse the scan or misplace it", "uses the sform",
                          "convert the scan again")
        else:
            yield from _both(sform, qform, header)


def _both(sform: np.ndarray, qform: np.ndarray, header: Header) -> Iterator[Finding]:
    mm, voxels = apart(sform, qform, header.shape)
    if voxels <= APART:
        return
    mirrored = len(axes_of(header.shape)) == 3 and np.linalg.det(sform[:3, :3]) * np.linalg.det(qform[:3, :3]) < 0
    codes = f"sform_code {header.codes[0]}, qform_code {header.codes[1]}"
    if mirrored:
        yield finding("handedness", "wrong", f"one of sform and qform is left-handed, the other right-handed ({codes}), up to {mm:.3g} mm "
                      "apart", "left and right are exchanged between programs that believe the one and the other", "uses the sform",
                      "find out which is true, in a viewer or against another scan, before you believe either")
    else:
        yield finding("sform-qform", "doubtful", f"sform and qform put a corner of the scan up to {mm:.3g} mm apart ({codes})",
                      "another program may use the other one (ITK may take the qform), and its results lie elsewhere; codes that differ "
                      "may mean it: the scanner's place and a template's", "uses the sform",
                      "if the qform is the right one, set the sform to it in a viewer")


def _sizes(header: Header) -> Iterator[Finding]:
    """Voxel sizes as stated, and against the matrix that is used."""
    stated, fine = _spatial(header), usable(header.affine, header.shape)
    listed = "×".join(f"{v:.4g}" for v in stated)
    if not sized(header) and not (header.source == "sform" and fine):
        yield finding("voxel-size-missing", "wrong", f"the header states voxels of {listed}, and nothing else tells their size",
                      "whatever is taken for it, distances are wrong", "takes 1 mm for a zero" if fine else "refuses the scan",
                      "the size must come from the scanner's protocol")
    elif not all(v > 0 and math.isfinite(v) for v in stated):
        yield finding("voxel-size", "doubtful", f"the header states voxels of {listed}", "a voxel has a positive size; programs that go by "
                      "it refuse or misplace the scan", "uses the sform, which has its own" if header.source == "sform"
                      else "turns the axis round, as ITK does" if header.kind == "itk" else "takes them without their sign",
                      "convert the scan again")
    elif header.source == "sform" and fine and header.affine is not None and not header.codes[1]:
        used = spacing_of(header.affine, header.shape)
        if np.abs(used / stated - 1).max(initial=0) > 0.01:
            yield finding("voxel-size", "doubtful", f"the header states voxels of {listed} mm, the sform has "
                          f"{'×'.join(f'{v:.4g}' for v in used)} mm", "programs that measure by the stated size give other volumes and "
                          "distances", "uses the sform, and the sizes that it has", "find out which is true")


def sized(header: Header) -> bool:
    """Whether the header states how large voxels are, even if with a wrong sign."""
    return all(v != 0 and math.isfinite(v) for v in _spatial(header))


def _spatial(header: Header) -> list[float]:
    return [header.spacing[axis] for axis in axes_of(header.shape) if axis < len(header.spacing)]


def _unit(header: Header) -> Iterator[Finding]:
    if header.kind == "mgh" or header.unit == "mm":
        return
    if header.unit == "unknown":
        yield finding("unit-missing", "note", "the header states no unit of length", "the numbers are mm nearly always, and not always",
                      "takes the numbers as mm", "nothing has to be done if they are")
        return
    word = {"um": "micrometres", "m": "metres"}[header.unit]
    yield finding("unit-other", "wrong", f"the header states {word}", f"ITK converts {word}, nibabel and most others do not: the scan has "
                  "another size in each program", "takes the numbers as mm", f"name the unit of the numbers: --units {header.unit} or mm")


def _shape(header: Header) -> Iterator[Finding]:
    if len(header.shape) > 3 and header.shape[-1] == 1 and header.kind != "mgh":
        yield finding("last-axis", "note", f"the shape {header.shape} ends in an axis of length one",
                      "programs that expect three axes refuse it", "takes the one volume", "nothing has to be done for regkit")
    if len(header.shape) > 2 and header.shape[:3].count(1) == 1:
        yield finding("slice", "note", f"one axis of {header.shape[:3]} has length one", "that is a slice and no volume",
                      "aligns it in 2D, in its own plane, with other slices of its kind", "nothing has to be done")


def _broken(affine: np.ndarray | None) -> str:
    if affine is None:
        return "cannot be read as a matrix"
    return "holds NaN or infinity" if not np.isfinite(affine).all() else "is singular: two axes coincide or one has no length"


def _assumed(header: Header) -> str:
    if header.kind == "itk":
        return "ITK's reading: the first axis to the patient's left, the second to the back, the third to the head, from the origin stated"
    if header.kind == "mgh":
        return "FreeSurfer's reading: a coronal scan of 1 mm voxels, whatever size is stated, its middle at 0"
    return "nibabel's reading: the first axis to the patient's left, the second to the front, the third to the head, the middle at 0"
