"""The picture of one registration: fixed and moved scan on top of each other, before and after.

Fixed is magenta, moved is green: where both agree the picture is grey. Planes are shown as radiologists hang them: superior
or anterior up, the patient's left on the right side of the picture; in the sagittal plane anterior is on the left. 2D scans
likewise, so that a picture (PNG, JPEG) is shown as it is stored.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image as Picture
from PIL import ImageDraw, ImageFont

from regkit.errors import GeometryError
from regkit.image import Image
from regkit.space import Grid

MAX_WIDTH = 1300  # pixels
MAX_ROW = 1000  # pixels: height of one panel
MAX_ZOOM = 10.0  # pixels a voxel: a tiny crop is not blown up further
_GAP = 6
_BAND = 26
_WORDS = {0: "sagittal", 1: "coronal", 2: "axial"}
_SIDES = {0: ("A", "P"), 1: ("R", "L"), 2: ("R", "L")}


def overlay(fixed: Image, before: Image | Callable[[Grid], Image], after: Image, path: Path) -> None:
    """Write a PNG: two rows (before, after) of three orthogonal planes through the middle of fixed's foreground; 2D scans
    give one plane in two columns.

    fixed, before, after: images on the same grid; before may be empty, or a function that gives it on the grid of a plane.
    Only the first item of a batch is drawn.
    Raises GeometryError if the grids differ.
    """
    for name, image in (("before", before), ("after", after)):
        if isinstance(image, Image) and image.grid.shape != fixed.grid.shape:
            raise GeometryError(f"overlay: {name} has shape {image.grid.shape}, fixed {fixed.grid.shape}; resample it first")
    order, spacing = _display(fixed.grid)
    f, a = (_as_shown(image, order) for image in (fixed, after))
    fixed_window = _window(f)
    centre = _centre(f, fixed_window)
    axes = (2,) if f.ndim == 2 else (0, 1, 2)

    def earlier(axis: int) -> np.ndarray:
        if isinstance(before, Image):
            return _plane(_as_shown(before, order), axis, centre)
        cut = fixed.grid if f.ndim == 2 else _cut(fixed.grid, order[axis], centre[axis])
        return _plane(_as_shown(before(cut), order), axis, (0,) * f.ndim)

    planes = [[earlier(axis) for axis in axes], [_plane(a, axis, centre) for axis in axes]]
    moved_window = _window(a if _thin(a)[0].any() else max(planes[0], key=np.ptp))
    rows = [[_compose(_scaled(_plane(f, axis, centre), fixed_window), _scaled(plane, moved_window))
             for axis, plane in zip(axes, row, strict=True)] for row in planes]
    sizes = [_plane_mm(f.shape, spacing, axis) for axis in axes]
    sheet = _sheet(rows, sizes, axes, letters=f.ndim == 3, finest=min(spacing))
    sheet.save(path, format="PNG", compress_level=1)  # much faster, a little larger


def _display(grid: Grid) -> tuple[list[tuple[int, bool]], list[float]]:
    """For each world axis: (array axis, whether it must be flipped to run R, A, S); and the spacing in that order."""
    letters = grid.orientation
    order = []
    for pair in ("LR", "PA", "IS")[: grid.ndim]:
        axis = next(i for i, letter in enumerate(letters) if letter in pair)
        order.append((axis, letters[axis] == pair[0]))
    return order, [float(grid.spacing[0, axis]) for axis, _ in order]


def _cut(grid: Grid, axis: tuple[int, bool], place: int) -> Grid:
    """One plane of a grid: across (array axis, whether it is shown backwards), at a place as shown."""
    across, flipped = axis
    at = grid.shape[across] - 1 - place if flipped else place
    affine = grid.affine.clone()
    affine[:, :, -1] += at * affine[:, :, across]
    return Grid(tuple(1 if a == across else n for a, n in enumerate(grid.shape)), affine)


def _as_shown(image: Image, order: list[tuple[int, bool]]) -> np.ndarray:
    """Voxels (X, Y(, Z)) float32 whose axes run to the right, anterior and superior: a view, nothing is copied."""
    voxels = image.luminance().data[0, 0].detach().cpu().numpy().transpose([axis for axis, _ in order])
    return voxels[tuple(slice(None, None, -1 if flip else 1) for _, flip in order)]


def _thin(voxels: np.ndarray) -> tuple[np.ndarray, tuple[int, ...]]:
    """At most 64 voxels an axis, NaN as 0, and the steps between them: enough for a window and a centre."""
    steps = tuple(max(1, -(-n // 64)) for n in voxels.shape)
    return np.nan_to_num(voxels[tuple(slice(None, None, k) for k in steps)], nan=0.0, posinf=0.0, neginf=0.0), steps


def _window(voxels: np.ndarray) -> tuple[float, float]:
    """Robust darkest and brightest value."""
    some, _ = _thin(voxels)
    low = float(np.percentile(some, 1))
    body = some[some > low]
    high = float(np.percentile(body, 99)) if body.size else low
    return low, high if high > low else low + 1.0


def _centre(voxels: np.ndarray, window: tuple[float, float]) -> tuple[int, ...]:
    """Index of the centre of mass of the foreground (voxels above a quarter of the window)."""
    some, steps = _thin(voxels)
    inside = some > window[0] + 0.25 * (window[1] - window[0])
    if not inside.any():
        return tuple(n // 2 for n in voxels.shape)
    middle = [float(np.mean(where)) for where in np.nonzero(inside)]
    return tuple(min(n - 1, round(m * k)) for m, k, n in zip(middle, steps, voxels.shape, strict=True))


def _plane(voxels: np.ndarray, axis: int, centre: tuple[int, ...]) -> np.ndarray:
    """The plane across `axis` as rows and columns of a picture: up is superior or anterior, and see the module's head."""
    plane = voxels if voxels.ndim == 2 else voxels[(slice(None),) * axis + (centre[axis],)]
    return np.nan_to_num(plane[::-1, ::-1].T, nan=0.0, posinf=0.0, neginf=0.0)


def _plane_mm(shape: tuple[int, ...], spacing: list[float], axis: int) -> tuple[float, float]:
    """Width and height in mm of the plane across `axis`."""
    across = [n * s for i, (n, s) in enumerate(zip(shape, spacing, strict=True)) if len(shape) == 2 or i != axis]
    return across[0], across[1]


def _scaled(plane: np.ndarray, window: tuple[float, float]) -> np.ndarray:
    """Values of the window as 0 … 255."""
    return (np.clip((plane - window[0]) / (window[1] - window[0]), 0, 1) * 255).round().astype(np.uint8)


def _compose(fixed: np.ndarray, moved: np.ndarray) -> Picture.Image:
    """Red and blue from fixed, green from moved."""
    return Picture.fromarray(np.stack([fixed, moved, fixed], -1))


def _sheet(
    rows: list[list[Picture.Image]], sizes: list[tuple[float, float]], axes: tuple[int, ...], letters: bool, finest: float
) -> Picture.Image:
    """All panels, of `sizes` mm, on one black sheet, in one scale, with their names."""
    flat = len(axes) == 1  # 2D: before and after side by side
    columns = 2 if flat else len(axes)
    total = sum(width for width, _ in sizes) * (2 if flat else 1)
    scale = min((MAX_WIDTH - _GAP * (columns + 1)) / total, MAX_ROW / max(h for _, h in sizes), MAX_ZOOM / finest)
    pixels = [(max(1, round(w * scale)), max(1, round(h * scale))) for w, h in sizes]
    height = max(h for _, h in pixels)
    widths = [pixels[0][0]] * 2 if flat else [w for w, _ in pixels]
    lines = 1 if flat else 2
    sheet = Picture.new("RGB", (sum(widths) + _GAP * (columns + 1), lines * (height + _BAND) + _GAP))
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=15)
    for line, (word, row) in enumerate(zip(("before", "after"), rows, strict=True)):
        left, top = (_GAP + line * (widths[0] + _GAP), 0) if flat else (_GAP, line * (height + _BAND))
        for i, (panel, size, axis) in enumerate(zip(row, pixels, axes, strict=True)):
            x, y = left + sum(widths[:i]) + _GAP * i, top + _BAND
            sheet.paste(panel.resize(size, Picture.Resampling.BILINEAR, reducing_gap=3.0), (x, y + (height - size[1]) // 2))
            # on a narrow panel the name would run into the next one: there the row's word is enough
            name = f"{word}, {_WORDS[axis]}" if letters and size[0] > 150 else word if i == 0 else ""
            pen.text((x + 2, top + 4), name, fill=(255, 255, 255), font=font)
            if letters:
                middle = y + height // 2
                pen.text((x + 3, middle), _SIDES[axis][0], fill=(255, 255, 0), font=font, anchor="lm")
                pen.text((x + size[0] - 4, middle), _SIDES[axis][1], fill=(255, 255, 0), font=font, anchor="rm")
    return sheet
