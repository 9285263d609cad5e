"""The picture of one registration: fixed and moved scan on top of each other, before and after.

Fixed is magenta, moved is green: where both agree the picture is grey. Planes are shown as radiologists hang them: see
`planes.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image as Picture
from PIL import ImageDraw, ImageFont

from regkit.errors import GeometryError
from regkit.image import Image
from regkit.report.planes import SIDES, WORDS, as_shown, centre, cut, display, scaled, thin, window
from regkit.space import Grid

MAX_WIDTH = 1300  # pixels
MAX_ROW = 1000  # pixels: height of one panel
MAX_ZOOM = 10.0  # pixels a voxel: a tiny crop is not blown up further
_GAP = 6
_BAND = 26


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
    order, spacing = display(fixed.grid)
    f, a = (as_shown(image, order) for image in (fixed, after))
    fixed_window = window(f)
    middle = centre(f, fixed_window)
    axes = (2,) if f.ndim == 2 else (0, 1, 2)

    def earlier(axis: int) -> np.ndarray:
        if isinstance(before, Image):
            return _plane(as_shown(before, order), axis, middle)
        plane = fixed.grid if f.ndim == 2 else cut(fixed.grid, order[axis], middle[axis])
        return _plane(as_shown(before(plane), order), axis, (0,) * f.ndim)

    planes = [[earlier(axis) for axis in axes], [_plane(a, axis, middle) for axis in axes]]
    moved_window = window(a if thin(a)[0].any() else max(planes[0], key=np.ptp))
    rows = [[_compose(scaled(_plane(f, axis, middle), fixed_window), scaled(plane, moved_window))
             for axis, plane in zip(axes, row, strict=True)] for row in planes]
    sizes = [_plane_mm(f.shape, spacing, axis) for axis in axes]
    sheet = _sheet(rows, sizes, axes, letters=f.ndim == 3, finest=min(spacing))
    sheet.save(path, format="PNG", compress_level=1)  # much faster, a little larger


def _plane(voxels: np.ndarray, axis: int, middle: tuple[int, ...]) -> np.ndarray:
    """The plane across `axis` as rows and columns of a picture: up is superior or anterior, and see planes.py."""
    plane = voxels if voxels.ndim == 2 else voxels[(slice(None),) * axis + (middle[axis],)]
    return np.nan_to_num(plane[::-1, ::-1].T.astype(np.float32), nan=0.0, posinf=0.0, neginf=0.0)


def _plane_mm(shape: tuple[int, ...], spacing: list[float], axis: int) -> tuple[float, float]:
    """Width and height in mm of the plane across `axis`."""
    across = [n * s for i, (n, s) in enumerate(zip(shape, spacing, strict=True)) if len(shape) == 2 or i != axis]
    return across[0], across[1]


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
            name = f"{word}, {WORDS[axis]}" if letters and size[0] > 150 else word if i == 0 else ""
            pen.text((x + 2, top + 4), name, fill=(255, 255, 255), font=font)
            if letters:
                middle = y + height // 2
                pen.text((x + 3, middle), SIDES[axis][0], fill=(255, 255, 0), font=font, anchor="lm")
                pen.text((x + size[0] - 4, middle), SIDES[axis][1], fill=(255, 255, 0), font=font, anchor="rm")
    return sheet
