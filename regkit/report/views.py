"""What a page shows of one registration: three planes of both scans, outlines of labels, landmarks as arrows; ready for JSON.

Only the planes are resampled, never the volumes, so that a view of a brain costs a tenth of a second and 100 to 200 kB.
Pictures are `data:` addresses: nothing a page shows lies in another file.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image as Picture
from PIL import PngImagePlugin, WebPImagePlugin
from torch import Tensor

from regkit.errors import GeometryError
from regkit.image import Image
from regkit.report.planes import SIDES, WORDS, as_shown, centre, display, picture_grid, scaled, thin, window
from regkit.sampling import warp
from regkit.space import Grid, Matrix, Transform

CODECS = (PngImagePlugin, WebPImagePlugin)  # imported here, or Pillow tries all of its formats at the first picture
QUALITY = 78
NEAR = 0.1  # share of the field of view's extent across a plane within which landmarks are drawn on it
MOST_ARROWS = 60
FIXED_COLOUR, MOVED_COLOUR = (61, 214, 255), (255, 176, 32)  # of outlines and arrows; page.css has the same two
_FINEST = {2: 8, 3: 4}  # samples along a pixel: more would cost more than it shows


@dataclass(frozen=True)
class _Scan:
    """A scan, ready to be cut: one float channel, its window, and the map that carries it onto fixed."""

    image: Image
    shown: tuple[float, float]

    @staticmethod
    def of(image: Image) -> _Scan:
        data = image.luminance().data[:1].detach().cpu()
        grey = Image(data, Grid(image.grid.shape, image.grid.affine[:1].cpu()))
        return _Scan(grey, window(as_shown(grey, display(grey.grid)[0])))

    def plane(self, transform: Transform, grid: Grid, fine: int) -> np.ndarray:
        """Rows and columns, 0 … 255: sampled `fine` times as densely as the picture and averaged, against aliasing."""
        d = grid.ndim
        refined = grid.affine.clone()
        for axis in (d - 2, d - 1):
            refined[:, :, axis] /= fine
            refined[:, :, -1] -= (fine - 1) / 2 * refined[:, :, axis]
        shape = (*grid.shape[:-2], grid.shape[-2] * fine, grid.shape[-1] * fine)
        values = warp(self.image, transform, Grid(shape, refined), fill=self.shown[0], antialias="none").data
        rows, columns = grid.shape[-2:]
        values = values.reshape(rows, fine, columns, fine).nan_to_num(self.shown[0]).mean((1, 3))
        return scaled(values.numpy(), self.shown)


def view(fixed: Image, moving: Image, transform: Transform | None, *, before: Transform | None = None,
         fixed_labels: Image | None = None, moving_labels: Image | None = None, fixed_points: Tensor | None = None,
         moving_points: Tensor | None = None, moved_labels: Image | None = None, size: int = 320) -> dict[str, Any]:
    """Axial, coronal and sagittal plane (a 2D scan: its one) of a pair → plain data for `page.py`, ready for JSON.

    transform: fixed → moving world; None where there is none: then nothing is shown "after". before: the start, by default
    where the headers put the scans. Labels lie anywhere in their scan's world; `moved_labels`, on the fixed scan's world,
    take the place of `moving_labels` carried through `transform`. fixed_points, moving_points (P, D): row i marks the same
    place in both. size: pixels of the longest edge; 2D scans, of one plane only, get half as many again.

    The planes go through the middle of the fixed labels, else of the points, else of the fixed scan's foreground.
    Raises GeometryError if dimensions or the numbers of points differ.
    """
    with _one_thread():
        return _view(fixed, moving, transform, before, fixed_labels, moving_labels, fixed_points, moving_points, moved_labels, size)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Planes are small: threads that wait for each other after every operation take ten times as long on a busy machine."""
    count = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.no_grad():
            yield
    finally:
        torch.set_num_threads(count)


def _view(fixed: Image, moving: Image, transform: Transform | None, before: Transform | None, fixed_labels: Image | None,
          moving_labels: Image | None, fixed_points: Tensor | None, moving_points: Tensor | None, moved_labels: Image | None,
          size: int) -> dict[str, Any]:
    d = fixed.ndim
    _check(d, moving=moving, fixed_labels=fixed_labels, moving_labels=moving_labels, moved_labels=moved_labels)
    here, there = _points(fixed_points, moving_points, d)
    start = Matrix.identity(d) if before is None else before
    f, m = _Scan.of(fixed), _Scan.of(moving)
    place = _place(f, fixed_labels, here)
    spacing = display(f.image.grid)[1]
    extent = [n * s for n, s in zip(_shown_shape(f.image.grid), spacing, strict=True)]
    mm = max(extent) / (size if d == 3 else 1.5 * size)
    finest = min(float(f.image.grid.spacing.min()), float(m.image.grid.spacing.min()))
    fine = min(_FINEST[d], max(1, math.ceil(mm / finest - 0.01)))
    landed = {name: _landed(t, here, there) for name, t in (("before", start), ("after", transform)) if t is not None}
    eye = Matrix.identity(d)
    known = None if fixed_labels is None else np.unique(thin(fixed_labels.data[0, 0].cpu().numpy())[0])
    planes, outside = [], ["before", "after"]
    for axis in (2, 1, 0) if d == 3 else (2,):
        grid = picture_grid(f.image.grid, axis, place, mm)
        maps = {"fixed": (fixed_labels, eye), "before": (moving_labels, start),
                "after": (moving_labels, transform) if moved_labels is None else (moved_labels, eye)}
        cut = {name: None if labels is None or t is None else _label_plane(labels, t, grid) for name, (labels, t) in maps.items()}
        outlines = {name: None if plane is None else _outline(plane if name == "fixed" else _known(plane, cut["fixed"], known),
                                                              FIXED_COLOUR if name == "fixed" else MOVED_COLOUR)
                    for name, plane in cut.items()}
        scans = {"fixed": f.plane(eye, grid, fine), "before": m.plane(start, grid, fine),
                 "after": None if transform is None else m.plane(transform, grid, fine)}
        pictures = {name: None if plane is None else _webp(plane) for name, plane in scans.items()}
        for name in list(outside):
            if scans[name] is None or scans[name].any():
                outside.remove(name)
        arrows, left_out = _arrows(here, landed, grid, extent[axis] if d == 3 else math.inf)
        planes.append({"name": WORDS[axis] if d == 3 else "scan", "width": grid.shape[-1], "height": grid.shape[-2],
                       "mm_per_pixel": mm, "sides": list(SIDES[axis]) if d == 3 else [], **pictures,
                       "contours": outlines, "arrows": arrows, "arrows_left_out": left_out})
    return {"ndim": d, "unit": "px" if fixed.pixels else "mm", "planes": planes, "outside": outside, "points": _errors(here, landed)}


def _check(ndim: int, **images: Image | None) -> None:
    for name, image in images.items():
        if image is not None and image.ndim != ndim:
            raise GeometryError(f"view: {name} is {image.ndim}D, fixed is {ndim}D; give scans of one dimension")


def _points(fixed: Tensor | None, moving: Tensor | None, ndim: int) -> tuple[Tensor, Tensor]:
    """Both sets (P, D) float64, without pairs that are not finite; empty where one is not given."""
    if fixed is None or moving is None:
        return torch.zeros(0, ndim, dtype=torch.float64), torch.zeros(0, ndim, dtype=torch.float64)
    here, there = (torch.as_tensor(points).detach().cpu().double() for points in (fixed, moving))
    if here.shape != there.shape or here.ndim != 2 or here.shape[1] != ndim:
        raise GeometryError(f"view: points {tuple(here.shape)} on fixed, {tuple(there.shape)} on moving; expected (P, {ndim}) twice")
    known = (torch.isfinite(here) & torch.isfinite(there)).all(-1)
    return here[known], there[known]


def _landed(transform: Transform, here: Tensor, there: Tensor) -> Tensor:
    """Where the moving landmarks (P, D) land in the fixed world."""
    if not len(there):
        return there
    try:
        return transform.inverse()(there[None])[0].double()
    except Exception:  # whatever a map of another kind raises where it has no inverse: the error left, as seen from fixed
        return here + there - transform(here[None])[0]


def _shown_shape(grid: Grid) -> list[int]:
    return [grid.shape[axis] for axis, _ in display(grid)[0]]


def _place(scan: _Scan, labels: Image | None, points: Tensor) -> tuple[float, ...]:
    """Index as shown, inside the scan, through which the planes go."""
    grid = scan.image.grid
    order, _ = display(grid)
    shape = _shown_shape(grid)
    world = _middle_of(labels) if labels is not None else None
    if world is None and len(points):
        world = points.mean(0)
    if world is None:
        return centre(as_shown(scan.image, order), scan.shown)
    index = grid.to_index(world[None, None])[0, 0].tolist()
    shown = [n - 1 - index[axis] if flipped else index[axis] for (axis, flipped), n in zip(order, shape, strict=True)]
    return tuple(float(min(max(round(value), 0), n - 1)) for value, n in zip(shown, shape, strict=True))


def _middle_of(labels: Image) -> Tensor | None:
    """World point (D,) in the middle of what is labelled. Where the middle is empty (two lungs), each plane goes through
    the nearest place that is not; None if nothing is labelled."""
    some, steps = thin(labels.data[0, 0].detach().cpu().numpy())
    where = np.nonzero(some)
    if not where[0].size:
        return None
    index = []
    for along, step, n in zip(where, steps, labels.grid.shape, strict=True):
        middle, taken = float(along.mean()), np.unique(along)
        nearest = int(taken[np.abs(taken - middle).argmin()])
        index.append(min(n - 1.0, (middle if abs(nearest - middle) <= 1 else nearest) * step))
    return labels.grid.to_world(torch.tensor([[index]], dtype=torch.float64))[0, 0].cpu()


def _label_plane(labels: Image, transform: Transform, grid: Grid) -> np.ndarray:
    """Rows and columns of the nearest labels, 0 outside."""
    known = Image(labels.data[:1, :1].detach().cpu(), Grid(labels.grid.shape, labels.grid.affine[:1].cpu()))
    plane = warp(known, transform, grid, kernel="nearest").data.reshape(grid.shape[-2:])
    return (plane.nan_to_num(0.0) if plane.dtype.is_floating_point else plane).numpy()


def _known(plane: np.ndarray, fixed: np.ndarray | None, labels: np.ndarray | None) -> np.ndarray:
    """The plane without labels that the fixed scan's map does not have: there is nothing they could be compared with."""
    if labels is None or fixed is None:
        return plane
    return np.where(np.isin(plane, np.union1d(labels, fixed)), plane, 0)


def _outline(plane: np.ndarray, colour: tuple[int, int, int]) -> str:
    """A transparent picture whose pixels along the border of each label have the colour."""
    border = np.zeros(plane.shape, bool)
    down, right = plane[1:] != plane[:-1], plane[:, 1:] != plane[:, :-1]
    # the line lies inside the label: of two neighbours the one that is labelled, of two labels the first
    border[:-1] |= down & (plane[:-1] != 0)
    border[1:] |= down & (plane[:-1] == 0)
    border[:, :-1] |= right & (plane[:, :-1] != 0)
    border[:, 1:] |= right & (plane[:, :-1] == 0)
    picture = Picture.fromarray(border.astype(np.uint8))
    picture.putpalette([0, 0, 0, *colour])
    file = io.BytesIO()
    picture.save(file, "PNG", bits=1, transparency=0)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def _webp(plane: np.ndarray) -> str:
    file = io.BytesIO()
    Picture.fromarray(plane).save(file, "WEBP", quality=QUALITY, method=2)
    return "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode()


def _arrows(here: Tensor, landed: Mapping[str, Tensor], grid: Grid, across: float) -> tuple[dict[str, list[list[float]]], int]:
    """From each fixed landmark near the plane to where the moving one lands, in picture pixels x, y (a pixel's middle lies
    at .5), and how many near ones were left out."""
    at = grid.to_index(here[None])[0]
    distance = at[:, 0].abs() * float(grid.spacing[0, 0]) if grid.ndim == 3 else torch.zeros(len(at))
    near = torch.nonzero(distance <= NEAR * across)[:, 0]
    chosen = near[distance[near].argsort()[:MOST_ARROWS]]

    def pixels(index: Tensor) -> Tensor:
        return index[:, -2:].flip(-1) + 0.5

    arrows = {}
    for name, points in landed.items():
        ends = torch.cat([pixels(at[chosen]), pixels(grid.to_index(points[None])[0][chosen])], 1)
        arrows[name] = [[round(value, 1) for value in row] for row in ends.tolist() if all(map(math.isfinite, row))]
    return arrows, len(near) - len(chosen)


def _errors(here: Tensor, landed: Mapping[str, Tensor]) -> dict[str, Any] | None:
    """How many landmarks there are, and the mean and largest distance between both, before and after."""
    if not len(here):
        return None
    found: dict[str, Any] = {"n": len(here)}
    for name, points in landed.items():
        distance = (points - here).norm(dim=-1)
        found[name] = {"mean": float(distance.mean()), "largest": float(distance.max())}
    return found
