"""A pair of scans, checked once; nothing below it checks again."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from regkit.errors import FormatError, GeometryError, OverlapError
from regkit.image import Image
from regkit.registration.background import background
from regkit.registration.padding import scanned
from regkit.registration.run import Run
from regkit.sampling import warp
from regkit.space import Matrix


@dataclass(frozen=True, eq=False)
class Pair:
    """Two scans of one dimension, ready to be aligned.

    fixed, moving: one channel, (1, 1, *S), NaN replaced by 0; float32, or integers of at most 16 bits, which take half the room.
    fixed_weight, moving_weight: (1, 1, *S), bool, or None (all voxels count); False where the mask is empty or the scan is NaN.
    fixed_background, moving_background: the value of a constant background, as skull stripping leaves it, or None.
    notes: what was done to make them fit, in sentences.
    """

    fixed: Image
    moving: Image
    fixed_weight: Tensor | None
    moving_weight: Tensor | None
    fixed_background: float | None = None
    moving_background: float | None = None
    notes: tuple[str, ...] = ()

    @property
    def ndim(self) -> int:
        return self.fixed.ndim


def make_pair(fixed: Image, moving: Image, fixed_mask: Image | None = None, moving_mask: Image | None = None,
              run: Run = map) -> Pair:
    """Check two scans and their masks; the scans are independent jobs for `run`.

    Raises GeometryError (2D against 3D), FormatError (empty, constant, all NaN), OverlapError (a mask that misses its scan).
    """
    if fixed.ndim != moving.ndim:
        raise GeometryError(f"moving: is {moving.ndim}D {moving.grid.shape}, fixed is {fixed.ndim}D {fixed.grid.shape}; "
                            "give two scans of one dimension (a slice out of the volume, or the volume)")
    jobs = (("fixed", fixed, fixed_mask), ("moving", moving, moving_mask))
    (f, wf, bf, said), (m, wm, bm, more) = run(lambda job: ready(*job), jobs)
    return Pair(f, m, wf, wm, bf, bm, (*said, *more))


def ready(name: str, image: Image, mask: Image | None) -> tuple[Image, Tensor | None, float | None, list[str]]:
    """One scan of one channel without NaN, its weight, its background, and what was done to it."""
    gray, weight, notes = image if _narrow(image) else image.luminance(), None, []
    finite = torch.isfinite(gray.data) if gray.data.is_floating_point() else None
    if finite is not None and not bool(finite.all()):
        share = float(finite.float().mean())
        if share == 0:
            raise FormatError(f"{name}: every voxel is NaN or infinite; nothing to align")
        notes.append(f"{name}: {100 * (1 - share):.2g} % of the voxels are NaN or infinite and carry no weight")
        gray, weight = gray.with_data(torch.where(finite, gray.data, 0.0)), finite
    if mask is not None:
        inside, said = _on_grid(name, mask, image)
        notes.extend(said)
        weight = inside if weight is None else weight & inside
        if not bool(weight.any()):
            raise OverlapError(f"{name}_mask: marks no voxel of the scan; give a mask that overlaps it")
    measured = scanned(gray)
    if measured is not None and (weight is None or bool((weight & measured).any())):
        share = float(measured.sum()) / measured.numel()
        notes.append(f"{name}: lies as a box in a constant border ({100 * (1 - share):.0f} % of the voxels), which carries no weight")
        weight = measured if weight is None else weight & measured
    values = gray.data if weight is None else gray.data[weight]
    if float(values.max()) == float(values.min()):
        where = " inside its mask" if mask is not None else ""
        raise FormatError(f"{name}: every voxel{where} has the value {float(values.max()):g}; a scan with some contrast is needed")
    return gray, weight, background(gray.data, weight), notes


def _narrow(image: Image) -> bool:
    """Whether a scan has one channel of integers so narrow that float32 would take more room."""
    return image.channels == 1 and image.data.dtype in (torch.uint8, torch.int8, torch.int16)


def _on_grid(name: str, mask: Image, image: Image) -> tuple[Tensor, list[str]]:
    """Where the mask counts (non-zero) on the scan's grid, by world position."""
    if mask.ndim != image.ndim:
        raise GeometryError(f"{name}_mask: is {mask.ndim}D, the scan is {image.ndim}D; give a mask drawn on the scan")
    marked = mask.data != 0 if _narrow(mask) else torch.nan_to_num(mask.luminance().data) != 0
    if mask.grid.same_as(image.grid):
        return marked, []
    moved = warp(mask.with_data(marked.float()), Matrix.identity(image.ndim), image.grid, antialias="none")
    return moved.data >= 0.5, [f"{name}_mask: lies on another grid than the scan and was carried over by world position"]
