"""Whether a scan is probably stored mirrored: its mirror image is aligned to another scan as well, and one measure compares both."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from regkit.errors import GeometryError
from regkit.image import Image
from regkit.io.findings import Finding, finding
from regkit.io.slices import basis
from regkit.registration.align import align
from regkit.sampling import warp
from regkit.similarity import SIMILARITIES
from regkit.space import Grid, Matrix, Transform

MEASURE = "ngf"  # edges at the same places, of either sign: it holds for one contrast and for two
ACROSS = 64  # voxels along the longest edge, where they are compared
MARGIN = 0.03  # of the measure, by which one must be better; of right scans mirror images gain up to 0.015 (docs/doctor.md)


@dataclass(frozen=True)
class Mirrored:
    """How well a scan lies on another as it is and mirrored, each where it lies best: in [0, 1], 1 is equal."""

    as_it_is: float
    mirrored: float

    @property
    def verdict(self) -> str:
        """mirrored, not mirrored, or too symmetric to tell."""
        gain = self.mirrored - self.as_it_is
        return "mirrored" if gain > MARGIN else "not mirrored" if gain < -MARGIN else "too symmetric to tell"

    def as_dict(self) -> dict[str, Any]:
        return {"measure": MEASURE, "as_it_is": round(self.as_it_is, 4), "mirrored": round(self.mirrored, 4), "margin": MARGIN,
                "verdict": self.verdict}


def mirror(image: Image) -> Image:
    """The scan mirrored left to right in the world, about its own middle; a picture from side to side. The voxels are shared.

    Raises GeometryError for a sagittal slice, in whose plane there is no left and right."""
    if image.slice_affine is not None and abs(float(basis(image.slice_affine)[0, 0])) < 0.5:
        raise GeometryError("scan: is a sagittal slice, which has no left and right; give a volume, or an axial or coronal slice")
    flip = torch.eye(image.ndim + 1, dtype=torch.float64)
    flip[0, 0], flip[0, -1] = -1.0, 2 * float(image.grid.centre[0, 0])
    return replace(image, grid=Grid(image.grid.shape, flip @ image.grid.affine[0].cpu()), slice_affine=None, source=None)


def compare(fixed: Image, moving: Image, progress: Callable[[str, float], None] | None = None, **options: Any) -> Mirrored:
    """Align `moving` and its mirror image to `fixed` and compare how well they lie. options: as for `align`.

    Raises as `align` and `mirror` do."""
    tell = progress or (lambda stage, share: None)
    values = []
    for name, scan in (("as it is", moving), ("mirrored", mirror(moving))):
        tell(name, len(values) / 2)
        values.append(agreement(fixed, scan, align(fixed, scan, **{"no_retry": True, **options}).transform))
    return Mirrored(*values)


def agreement(fixed: Image, moving: Image, transform: Transform) -> float:
    """How well the moved scan agrees with the fixed one where both were scanned, in [0, 1]."""
    corners = fixed.grid.corners()[0]
    canvas = fixed.grid.canonical(float((corners.amax(0) - corners.amin(0)).max()) / ACROSS)
    here = Matrix.identity(fixed.ndim)
    scans, seen = [], torch.ones(1, 1, *canvas.shape)
    for image, way in ((fixed, here), (moving, transform)):
        gray = image.luminance()
        finite = torch.isfinite(gray.data)
        scans.append(warp(gray.with_data(torch.where(finite, gray.data, 0.0)), way, canvas, fill=0.0).data)
        seen = seen * (warp(gray.with_data(finite.float()), way, canvas, fill=0.0, antialias="none").data > 0.5)
    return 1 - float(SIMILARITIES[MEASURE].loss(scans[1], scans[0], seen))


def of_mirror(found: Mirrored, fixed: str) -> list[Finding]:
    """The finding that a comparison with the scan at `fixed` gives: one where the mirror image fits clearly better, else none."""
    if found.verdict != "mirrored":
        return []
    return [finding("flip", "doubtful", f"mirrored left to right the scan fits {fixed} better: {found.mirrored:.3f} instead of "
                    f"{found.as_it_is:.3f} ({MEASURE}, 1 is equal)", "one of the two is probably stored mirrored, and no rotation "
                    "mends that: every side would be named wrongly", "registers it as it is: none of its maps mirrors a scan",
                    "find out by a marker, the liver or the heart which of the two is wrong; convert that one again")]
