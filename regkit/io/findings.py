"""What can be wrong with a scan's header, in words: the findings, and those that a matrix and a shape alone give away."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Literal

import numpy as np
import torch

from regkit.space import Grid
from regkit.space.grid import orientation

Severity = Literal["note", "doubtful", "wrong"]

SMALL_SCAN, LARGE_SCAN = 1.0, 3000.0  # mm: no field of view that one registers is smaller or larger along its longest edge
LARGE_VOXEL = 10.0  # mm: the shortest edge of a voxel
UNEVEN = 15.0  # longest over shortest edge of a voxel; slices of 5 mm at 0.4 mm have 12
SHEAR, LITTLE_SHEAR = 0.5, 0.05  # degrees off the right angle: rounding stays below the smaller
FAR = 2000.0  # mm from the world's origin to the middle of the scan; a scanner's table is shorter
APART = 0.1  # voxels between two statements of one place: rounding stays far below

UNITS = {"mm": 1.0, "um": 1e-3, "m": 1e3}
"""Units of length by name → mm."""

FIXES = {
    "no-orientation": "writes down the place that regkit assumes; it does not make left and right true",
    "sform-qform": "sets both to the place that regkit uses, the sform's, with its code (a sheared one leaves no qform)",
    "handedness": "sets both to the place that regkit uses, the sform's, with its code (a sheared one leaves no qform)",
    "sform-unusable": "takes the qform's place for both, or where there is none, what the voxel sizes alone say",
    "qform-unusable": "sets the qform to the sform's place, or where there is none, to what the voxel sizes alone say",
    "voxel-size": "sets the voxel sizes to those of the place that regkit uses",
    "unit-missing": "states mm",
    "unit-other": "states mm; voxel sizes and place are scaled as the unit says, unless only the numbers as they are make a possible size",
    "last-axis": "leaves the axis out of the shape",
    "small-scan": "changes nothing unless the unit of the numbers is named: --units m or um",
    "large-scan": "changes nothing unless the unit of the numbers is named: --units um or m",
    "shear": "changes nothing unless --straighten is given, which moves voxels: the nearest right-angled axes about the same middle",
}
"""What a corrected copy does about a finding; of those that are not here nothing."""
ON_REQUEST = {"small-scan": "units", "large-scan": "units", "shear": "straighten"}


@dataclass(frozen=True)
class Finding:
    """One thing about a header.

    code: its name. severity: note (legal, worth knowing), doubtful (may mislead), wrong (misleads or is refused).
    what: what the file says. why: why it matters. does: what regkit does about it. repair: how to mend it.
    """

    code: str
    severity: Severity
    what: str
    why: str
    does: str
    repair: str

    def as_dict(self) -> dict[str, str]:
        return asdict(self)


def finding(code: str, severity: Severity, what: str, why: str, does: str, by_hand: str) -> Finding:
    """A finding whose repair says first what a corrected copy does, then what a person can do."""
    fix = f"--fix {FIXES[code]}; " if code in FIXES else "--fix does nothing about it; "
    return Finding(code, severity, what, why, does, fix + by_hand)


def axes_of(shape: tuple[int, ...]) -> list[int]:
    """The spatial axes that have more than one voxel."""
    return [axis for axis, n in enumerate(shape[:3]) if n > 1]


def usable(affine: np.ndarray | None, shape: tuple[int, ...]) -> bool:
    """Whether the axes that have voxels are finite and span as many dimensions (as `Grid` and slices demand)."""
    if affine is None or not np.isfinite(affine).all():
        return False
    used = affine[:3, axes_of(shape)]
    lengths = np.linalg.norm(used, axis=0)
    if not (lengths > 0).all():
        return False
    used = used / lengths
    return bool(np.sqrt(max(np.linalg.det(used.T @ used), 0.0)) > 1e-6) if used.shape[1] else True


def corners(affine: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """(C, 3) mm: the centres of the corner voxels."""
    ends = [(0, n - 1) for n in (*shape[:3], 1, 1)[:3]]
    return np.array([affine[:3, :3] @ at + affine[:3, 3] for at in itertools.product(*ends)])


def apart(one: np.ndarray, other: np.ndarray, shape: tuple[int, ...]) -> tuple[float, float]:
    """How far two affines put a corner voxel apart at most: in mm, and in shortest voxel edges."""
    mm = float(np.linalg.norm(corners(one, shape) - corners(other, shape), axis=1).max())
    return mm, mm / max(float(spacing_of(one, shape).min(initial=np.inf)), 1e-30)


def spacing_of(affine: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Edges of a voxel in mm, of the axes that have more than one."""
    return np.linalg.norm(affine[:3, axes_of(shape)], axis=0)


def size_of(affine: np.ndarray, shape: tuple[int, ...]) -> float:
    """The longest edge of the field of view in mm."""
    return float((spacing_of(affine, shape) * [shape[a] for a in axes_of(shape)]).max(initial=0.0))


def possible(affine: np.ndarray, shape: tuple[int, ...]) -> bool:
    """Whether the scan has a size that scans have."""
    return SMALL_SCAN <= size_of(affine, shape) <= LARGE_SCAN and float(spacing_of(affine, shape).min(initial=1.0)) <= LARGE_VOXEL


def shear_of(affine: np.ndarray, shape: tuple[int, ...]) -> float:
    """Degrees by which two axes miss the right angle at most."""
    axes = affine[:3, axes_of(shape)] / spacing_of(affine, shape)
    gram = axes.T @ axes
    np.fill_diagonal(gram, 0.0)
    return float(np.degrees(np.arcsin(np.clip(np.abs(gram).max(initial=0.0), 0, 1))))


def of_place(affine: np.ndarray, shape: tuple[int, ...], *, sizes: bool = True) -> Iterator[Finding]:
    """What a usable affine (4, 4), index → RAS mm, and a shape alone give away. sizes: whether the numbers are meant as mm."""
    lengths = spacing_of(affine, shape)
    listed = "×".join(f"{v:.3g}" for v in lengths)
    size = size_of(affine, shape)
    if sizes and not possible(affine, shape):
        small = size < SMALL_SCAN
        yield finding(
            "small-scan" if small else "large-scan", "doubtful",
            f"voxels of {listed} mm, and so a field of view of {size:.3g} mm: the numbers may be "
            + ("metres" if small else "micrometres") + " that were taken for mm",
            "scans that differ in size by a factor of a thousand are not found together, as no start tries another scale",
            "takes the numbers as mm", "scan again with the unit if you know it; a microscope's picture may be so small"
            if small else "name the unit if you know it")
    if len(lengths) > 1 and lengths.max() / lengths.min() > UNEVEN:
        ratio = lengths.max() / lengths.min()
        yield finding("uneven-voxels", "doubtful" if ratio > 100 else "note", f"voxels of {listed} mm: {ratio:.3g} times as long as wide",
                      "one axis may be stated in another unit, or the slices are so thick that six parameters are hard to tell",
                      "takes the numbers as they are", "if the voxel size is right, prefer --model rigid")
    angle = shear_of(affine, shape)
    if angle > LITTLE_SHEAR:
        yield finding("shear", "doubtful" if angle > SHEAR else "note", f"two axes meet at {90 - angle:.4g}° or {90 + angle:.4g}°",
                      "most viewers, and the qform, know right angles only and show the scan elsewhere; a tilted gantry or an affine "
                      "map written into the header makes such axes rightly",
                      "computes with the axes as they are", "resample it by regkit apply onto a grid with right angles")
    if len(axes_of(shape)) == 3 and np.linalg.det(affine[:3, :3]) < 0:
        yield finding("mirrored", "note", f"the axes are stored as {_orientation(affine)}, which is left-handed",
                      "that is legal and usual; a program that ignores the header shows the scan mirrored",
                      "computes in mm: the order of storage makes no difference", "nothing has to be done")
    middle = corners(affine, shape).mean(0)
    if np.linalg.norm(middle) > FAR and sizes and possible(affine, shape):
        yield finding("far-origin", "doubtful", f"the middle of the scan lies {np.linalg.norm(middle):.4g} mm from the world's origin",
                      "it shares no space with scans that lie where scanners put them, and single precision rounds its positions",
                      "starts from centres too, but --start header is refused where the scans do not overlap",
                      "check the origin; a translation of the whole header does no harm if nothing else refers to it")


def _orientation(affine: np.ndarray) -> str:
    return orientation(torch.from_numpy(affine))


def of_mask(mask: Grid, image: Grid) -> list[Finding]:
    """A mask's grid against that of the scan it belongs to; the findings are about the mask."""
    if mask.ndim != image.ndim:
        return [finding("mask-dimension", "wrong", f"the mask is {mask.ndim}D {mask.shape}, the scan is {image.ndim}D {image.shape}",
                        "a slice says nothing about a volume", "refuses the two", "give a mask that was drawn on the scan")]
    if mask.same_as(image):
        return []
    there, here = mask.corners()[0], image.corners()[0]
    if bool(((there.amin(0) >= here.amax(0)) | (here.amin(0) >= there.amax(0))).any()):
        return [finding("mask-apart", "wrong", "the mask and the scan share no space by their headers",
                        "no voxel of the scan counts", "refuses the two",
                        "if the mask was drawn on the scan's voxels, its header was lost: give it the scan's")]
    away = float((there - here).norm(dim=-1).max())
    if mask.shape == image.shape:
        return [finding("mask-place", "doubtful", f"the mask has as many voxels as the scan {mask.shape}, but its header puts a corner "
                        f"{away:.3g} mm away", "drawn on the scan's voxels it would lie where the scan lies: its header, or the scan's, "
                        "has changed since", "carries the mask over by world position, so it may count at the wrong place",
                        "look at both in a viewer; save the mask again with the scan's header")]
    return [finding("mask-grid", "note", f"the mask's grid {mask.shape} is not the scan's {image.shape}",
                    "that is legal; its edge becomes coarser or shifts by up to half a voxel", "carries the mask over by world position",
                    "nothing has to be done")]
