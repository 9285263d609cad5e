"""Planes of a scan as a person looks at them: which way up, through which voxel, with which window.

Superior or anterior is up, the patient's left is on the right side of the picture; in the sagittal plane anterior is on the
left. 2D scans likewise, so that a picture (PNG, JPEG) is shown as it is stored. Planes follow the scan's own axes.
"""

from __future__ import annotations

import numpy as np

from regkit.image import Image
from regkit.space import Grid

WORDS = {0: "sagittal", 1: "coronal", 2: "axial"}
SIDES = {0: ("A", "P"), 1: ("R", "L"), 2: ("R", "L")}

_CT = -500.0  # only CT has values below: air
_SOFT = (-250.0, 500.0)  # HU: what is darker or brighter is air and fat's edge, or bone
_LUNG = 0.2  # share of the body between air and fat from which on lungs are what one looks at


def display(grid: Grid) -> tuple[list[tuple[int, bool]], list[float]]:
    """For each world axis: (array axis, whether it must be flipped to run R, A, S); and the spacing in that order."""
    letters = grid.orientation
    order = []
    for pair in ("LR", "PA", "IS")[: grid.ndim]:
        axis = next(i for i, letter in enumerate(letters) if letter in pair)
        order.append((axis, letters[axis] == pair[0]))
    return order, [float(grid.spacing[0, axis]) for axis, _ in order]


def as_shown(image: Image, order: list[tuple[int, bool]]) -> np.ndarray:
    """Voxels (X, Y(, Z)) whose axes run to the right, anterior and superior: a view, of one channel nothing is copied."""
    voxels = (image if image.channels == 1 else image.luminance()).data[0, 0].detach().cpu().numpy().transpose([axis for axis, _ in order])
    return voxels[tuple(slice(None, None, -1 if flip else 1) for _, flip in order)]


def thin(voxels: np.ndarray) -> tuple[np.ndarray, tuple[int, ...]]:
    """At most 64 voxels an axis, float32, NaN as 0, and the steps between them: enough for a window and a centre."""
    steps = tuple(max(1, -(-n // 64)) for n in voxels.shape)
    return np.nan_to_num(voxels[tuple(slice(None, None, k) for k in steps)].astype(np.float32), nan=0.0, posinf=0.0, neginf=0.0), steps


def window(voxels: np.ndarray) -> tuple[float, float]:
    """Robust darkest and brightest value. CT, which air would leave without contrast, gets the window of its body."""
    some, _ = thin(voxels)
    low = float(np.percentile(some, 1))
    body = some[some > low]
    high = float(np.percentile(body, 99)) if body.size else low
    if low < _CT and (some > _CT).any():
        tissue = some[some > _CT]
        lungs = ((some > -950) & (some < _CT)).sum() > _LUNG * (some > -950).sum()
        low = -1000.0 if lungs else max(_SOFT[0], float(np.percentile(tissue, 2)))
        high = min(_SOFT[1], float(np.percentile(tissue, 99)))
    return low, high if high > low else low + 1.0


def centre(voxels: np.ndarray, shown: tuple[float, float]) -> tuple[int, ...]:
    """Index of the centre of mass of the foreground (voxels above a quarter of the window)."""
    some, steps = thin(voxels)
    inside = some > shown[0] + 0.25 * (shown[1] - shown[0])
    if not inside.any():
        return tuple(n // 2 for n in voxels.shape)
    middle = [float(np.mean(where)) for where in np.nonzero(inside)]
    return tuple(min(n - 1, round(m * k)) for m, k, n in zip(middle, steps, voxels.shape, strict=True))


def scaled(plane: np.ndarray, shown: tuple[float, float]) -> np.ndarray:
    """Values of the window as 0 … 255."""
    return (np.clip((plane - shown[0]) / (shown[1] - shown[0]), 0, 1) * 255).round().astype(np.uint8)


def cut(grid: Grid, axis: tuple[int, bool], place: int) -> Grid:
    """One plane of a grid: across (array axis, whether it is shown backwards), at a place as shown."""
    across, flipped = axis
    at = grid.shape[across] - 1 - place if flipped else place
    affine = grid.affine.clone()
    affine[:, :, -1] += at * affine[:, :, across]
    return Grid(tuple(1 if a == across else n for a, n in enumerate(grid.shape)), affine)


def picture_grid(grid: Grid, axis: int, place: tuple[float, ...], mm: float) -> Grid:
    """The plane across world axis `axis` as the grid of a picture: shape (1, rows, columns), in 2D (rows, columns), whose
    first index runs over rows downwards; pixels of about `mm` that fill the scan's outer edges exactly.

    place: index as shown through which the plane goes. The first axis of a 3D plane is one voxel thick, across the plane.
    """
    order, spacing = display(grid)
    shown = [grid.shape[array] for array, _ in order]
    u, v = [a for a in range(grid.ndim) if grid.ndim == 2 or a != axis]  # along columns, along rows
    columns, rows = (max(1, round(shown[a] * spacing[a] / mm)) for a in (u, v))
    to_shown = np.zeros((grid.ndim + 1, grid.ndim + 1))  # picture index → index as shown
    to_shown[-1, -1] = 1
    for a, n, at in ((v, rows, grid.ndim - 2), (u, columns, grid.ndim - 1)):
        step = shown[a] / n
        to_shown[a, at], to_shown[a, -1] = -step, shown[a] - 0.5 - 0.5 * step
    if grid.ndim == 3:
        to_shown[axis, 0], to_shown[axis, -1] = 1, place[axis]
    to_array = np.zeros_like(to_shown)
    to_array[-1, -1] = 1
    for a, (array, flipped) in enumerate(order):
        to_array[array, a] = -1 if flipped else 1
        to_array[array, -1] = shown[a] - 1 if flipped else 0
    shape = (rows, columns) if grid.ndim == 2 else (1, rows, columns)
    return Grid(shape, grid.affine[:1] @ grid.affine.new_tensor(to_array @ to_shown))
