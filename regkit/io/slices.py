"""Arrays with a 4×4 become images; a single slice of a 3D world becomes a 2D image in the slice's own in-plane mm axes."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from regkit.errors import FormatError, GeometryError
from regkit.image import Image
from regkit.io.memory import check_room
from regkit.space import Grid

# torch holds these but can neither compare them nor find their minimum (2.13), so they are widened at the door.
_WIDER = {torch.uint16: torch.int32, torch.uint32: torch.int64, torch.float64: torch.float32, torch.float16: torch.float32,
          torch.bfloat16: torch.float32}


def reason(error: BaseException) -> str:
    """What went wrong as one short line; a codec's message is long and its last line tells most."""
    lines = [re.sub(r"^\S+ ERROR: (\w+\(0x\w+\): )?", "", line.strip()) for line in str(error).splitlines()]
    lines = [line for line in lines if line and not line.startswith("Reason:")]  # errno's word, often of another call
    return (lines[-1] if lines else type(error).__name__)[:200]


@contextlib.contextmanager
def named(where: str) -> Iterator[None]:
    """Put the file's or argument's name before a geometry error raised within."""
    try:
        yield
    except GeometryError as error:
        raise GeometryError(f"{where}: {error}") from error


def tensor(array: np.ndarray | Tensor, where: str) -> Tensor:
    """`array` as a contiguous tensor: integers stay integers (unsigned ones widened to what torch computes with), floats
    become float32.

    Raises FormatError for complex numbers, objects and anything else that is not a grey value.
    """
    if isinstance(array, np.ndarray):
        if array.dtype.kind not in "buif":
            raise FormatError(f"{where}: voxels of type {array.dtype}; expected integers or real numbers (of complex data "
                              "save the magnitude)")
        native = array.dtype.newbyteorder("=")
        if array.dtype.kind == "f":
            native = np.dtype(np.float32)
        elif native == np.uint64:
            native = np.dtype(np.int64)
            if array.size and int(array.max()) > np.iinfo(np.int64).max:
                raise FormatError(f"{where}: uint64 voxels up to {int(array.max())}; expected at most 2^63 - 1")
        # A view of a file's bytes is read-only, which torch cannot hold: such an array is copied even if it fits.
        fits = array.dtype == native and array.flags.c_contiguous and array.flags.writeable
        if not fits:
            check_room(array.size * native.itemsize, where)
            array = np.array(array, dtype=native, order="C")
        array = torch.from_numpy(array)
    if array.is_complex() or array.is_quantized:
        raise FormatError(f"{where}: voxels of type {array.dtype}; expected integers or real numbers")
    if array.dtype == torch.uint64:
        array = array.to(torch.int64)
    return array.to(_WIDER.get(array.dtype, array.dtype)).contiguous()


def basis(affine: Tensor) -> Tensor:
    """(3, 2) float64 orthonormal in-plane axes of the slice `affine` (4, 4), index (i, j, 0) → RAS mm.

    The world axis nearest to the slice's normal is dropped; the basis is the one in the slice's plane nearest to the two
    that remain, so an axial slice lives in world x, y, a sagittal one in y, z, and slices of one plane in one frame.

    Raises GeometryError if the slice's axes are parallel, zero or not finite.
    """
    axes = affine[:3, :2]
    if not bool(torch.isfinite(affine[:3, (0, 1, 3)]).all()):
        raise GeometryError("affine: holds NaN or infinity; repair the header of this file, see regkit doctor")
    normal = torch.linalg.cross(axes[:, 0], axes[:, 1])
    if not float(normal.norm()) > 1e-6 * float(axes.norm(dim=0).prod()):
        raise GeometryError(f"affine: singular, the slice's axes coincide or have no length {axes.T.tolist()}; "
                            "repair the header of this file, see regkit doctor")
    normal = normal / normal.norm()
    # Near a tie of two axes rounding must not decide: z is dropped rather than y, y rather than x.
    tilt = normal.abs() + torch.tensor([0.0, 1e-4, 2e-4], dtype=normal.dtype)
    keep = [axis for axis in range(3) if axis != int(tilt.argmax())]
    world = torch.eye(3, dtype=affine.dtype)[:, keep]
    u, _, vh = torch.linalg.svd(world - normal[:, None] * (normal @ world), full_matrices=False)
    return u @ vh


def plane(affine: Tensor) -> Tensor:
    """(3, 3) float64 index → in-plane mm of the slice `affine` (4, 4). Raises GeometryError as `basis` does."""
    flat = torch.eye(3, dtype=affine.dtype)
    if axial(affine) and bool(torch.isfinite(affine).all()):
        flat[:2] = affine[:2][:, (0, 1, 3)]  # exactly, without the rounding of the basis
        return flat
    b = basis(affine)
    flat[:2, :2] = b.T @ affine[:3, :2]
    flat[:2, 2] = b.T @ affine[:3, 3]
    return flat


def axial(affine: Tensor) -> bool:
    """Whether the slice's plane is parallel to the world's x and y axes."""
    return bool((affine[2, :2].abs() <= 1e-5 * affine[:3, :2].norm(dim=0)).all())  # quaternions leave rounding errors


def with_normal(affine: Tensor) -> Tensor:
    """`affine` (4, 4) with a third column that leaves the slice's plane: files of one slice often have none."""
    volume, lengths = torch.linalg.det(affine[:3, :3]).abs(), affine[:3, :3].norm(dim=0)
    if bool(torch.isfinite(affine).all()) and bool(lengths[2] > 0) and bool(volume > 1e-6 * lengths.prod()):
        return affine
    affine = affine.clone()
    normal = torch.linalg.cross(affine[:3, 0], affine[:3, 1])
    affine[:3, 2] = normal / normal.norm()
    return affine


def embed(grid: Grid, slice_affine: Tensor | None) -> Tensor:
    """(4, 4) float64 on the CPU: where an image lies in the 3D world; a 2D one without `slice_affine` in the plane z = 0.

    A 2D grid that is not the one `slice_affine` was read with (shrunk, resampled) stays in that slice's plane."""
    flat = grid.affine[0].cpu()
    if grid.ndim == 3:
        return flat
    affine = torch.eye(4, dtype=torch.float64)
    if slice_affine is None:
        affine[:2, :2], affine[:2, 3] = flat[:2, :2], flat[:2, 2]
        return affine
    affine = slice_affine.to("cpu", torch.float64, copy=True)
    if torch.allclose(plane(affine), flat, rtol=1e-9, atol=1e-9):
        return affine
    b = torch.eye(3, dtype=torch.float64)[:, :2] if axial(affine) else basis(affine)
    affine[:3, :2] = b @ flat[:2, :2]
    affine[:3, 3] += b @ (flat[:2, 2] - b.T @ affine[:3, 3])
    return affine


def as_image(data: Tensor, affine: np.ndarray | Tensor, where: str, *, pixels: bool = False) -> Image:
    """Voxels (C, *S) with their affine, RAS mm, as an image of 2 or 3 dimensions.

    A 4×4 with two axes, or with three of which exactly one has length one, is a slice: 2D, with its 4×4 kept.

    Raises FormatError for an empty axis, GeometryError for an affine that does not fit or is singular; both name `where`.
    """
    affine = torch.as_tensor(affine, dtype=torch.float64).cpu()
    shape = tuple(data.shape[1:])
    if min(data.shape) < 1:
        raise FormatError(f"{where}: shape {shape} has an empty axis; expected at least one voxel")
    if len(shape) not in (2, 3):
        raise GeometryError(f"{where}: {len(shape)} spatial axes {shape}; expected 2 or 3")
    if affine.ndim != 2 or tuple(affine.shape) not in {(len(shape) + 1, len(shape) + 1), (4, 4)}:
        raise GeometryError(f"{where}: affine of shape {tuple(affine.shape)} with voxels {shape}; "
                            f"expected ({len(shape) + 1}, {len(shape) + 1})")
    with named(where):
        if len(shape) == 3 and shape.count(1) == 1:
            flat = shape.index(1)
            data = data.squeeze(flat + 1)
            affine = affine[:, [axis for axis in range(3) if axis != flat] + [flat, 3]]
        if data.ndim == 3 and affine.shape == (4, 4):
            grid = Grid(tuple(data.shape[1:]), plane(affine))
            return Image(data[None], grid.to(data.device), with_normal(affine), pixels)
        return Image(data[None], Grid(tuple(data.shape[1:]), affine).to(data.device), None, pixels)
