"""Carrying images, label maps and points through transforms: compose first, resample once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, overload

import numpy as np
import torch
from torch import Tensor

from regkit.errors import GeometryError, OptionError, choose
from regkit.image import Image
from regkit.io import Points
from regkit.sampling import KERNELS, warp
from regkit.space import Transform
from regkit.space.transform import compose


def looks_like_labels(image: Image) -> bool:
    """Whether an image is a label map: one channel of whole numbers, most of which equal their neighbour even outside the
    commonest value (the background, of whatever number)."""
    data = image.data
    if image.channels != 1 or (data.dtype.is_floating_point and not bool((data == data.round()).all())):
        return False
    background = data.flatten()[:: max(1, data.numel() // 100_000)].mode().values
    data = data[0, 0]
    same = pairs = 0
    for axis, n in enumerate(data.shape):
        a, b = data.narrow(axis, 0, n - 1), data.narrow(axis, 1, n - 1)
        either = (a != background) | (b != background)
        pairs += int(either.sum())
        same += int(((a == b) & either).sum())
    return pairs == 0 or same > 0.5 * pairs


def carry_image(image: Image, transform: Transform, like: Image, *, interpolation: str = "auto", fill: float | str = "auto") -> Image:
    """The image (N, C, *S) pulled through `transform` (like's world → image's world, mm) onto the grid of `like`.

    interpolation: linear, cubic, nearest, vote (labels: the commonest within the voxel); auto is nearest for label maps,
    else linear. fill: value outside; auto is 0, or the minimum where that is negative (CT). NaN voxels carry no weight:
    what has nothing else to go by becomes the fill. Raises GeometryError if dimensions differ."""
    choose("interpolation", interpolation, ("auto", *KERNELS))
    kernel = ("nearest" if looks_like_labels(image) else "linear") if interpolation == "auto" else interpolation
    if image.ndim != like.ndim:
        raise GeometryError(f"like: is {like.ndim}D, the image is {image.ndim}D; give scans of one dimension")
    finite = torch.isfinite(image.data) if image.data.dtype.is_floating_point else None
    holes = finite is not None and not bool(finite.all())
    outside = _fill(image.data[finite] if holes and finite is not None else image.data, fill)
    if not holes or finite is None or kernel in ("nearest", "vote"):
        moved = warp(image, transform, like.grid, kernel=kernel, fill=outside)
    else:
        known = warp(image.with_data(finite.to(image.data.dtype)), transform, like.grid, fill=0.0).data
        values = warp(image.with_data(torch.where(finite, image.data, 0)), transform, like.grid, kernel=kernel, fill=0.0)
        moved = values.with_data(torch.where(known > 0.5, values.data / known.clamp_min(0.5), outside))
    return replace(moved, slice_affine=like.slice_affine, pixels=like.pixels, source=None)


def _fill(values: Tensor, fill: float | str) -> float:
    if fill != "auto":
        try:
            return float(fill)
        except ValueError:
            raise OptionError(f"fill: {fill!r} is neither a number nor auto") from None
    if values.numel() == 0 or values.dtype in (torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.bool):
        return 0.0
    return min(0.0, float(values.amin()))


def carry_points(points: Points, transform: Transform) -> Points:
    """Points in `transform`'s domain → where it maps them (P, D), RAS mm."""
    if points.world.shape[1] != transform.ndim:
        raise GeometryError(f"points: are {points.world.shape[1]}D, the transform is {transform.ndim}D; give points of its dimension")
    return points.with_world(transform(points.world[None].double())[0])


@overload
def apply(item: Image, transforms: Sequence[Transform] | Transform, like: Image | None = None, *, inverse: bool = False,
          interpolation: str = "auto", fill: float | str = "auto") -> Image: ...
@overload
def apply(item: Points, transforms: Sequence[Transform] | Transform, like: Image | None = None, *, inverse: bool = False,
          interpolation: str = "auto", fill: float | str = "auto") -> Points: ...
@overload
def apply(item: Tensor, transforms: Sequence[Transform] | Transform, like: Image | None = None, *, inverse: bool = False,
          interpolation: str = "auto", fill: float | str = "auto") -> Tensor: ...
@overload
def apply(item: np.ndarray, transforms: Sequence[Transform] | Transform, like: Image | None = None, *, inverse: bool = False,
          interpolation: str = "auto", fill: float | str = "auto") -> np.ndarray: ...


def apply(item: Any, transforms: Sequence[Transform] | Transform, like: Image | None = None, *, inverse: bool = False,
          interpolation: str = "auto", fill: float | str = "auto") -> Any:
    """Carry an image, a label map or points from moving to fixed (`inverse=True`: from fixed to moving).

    item: Image; Points; or an array or tensor of points (P, D), RAS mm.
    transforms: one, or several; each maps fixed to moving points; [A, B] is A first on the image's way, T = A ∘ B.
    like: whose grid an image lands on (the fixed scan; with `inverse` the moving one).
    Raises OptionError without transforms or a needed `like`, GeometryError if dimensions differ.
    """
    transforms = list(transforms) if isinstance(transforms, Sequence) else [transforms]
    if not transforms:
        raise OptionError("transforms: none given; give one or more")
    if len({t.ndim for t in transforms}) > 1:
        raise GeometryError(f"transforms: of dimensions {[t.ndim for t in transforms]}; they must agree to be composed")
    total = compose(*transforms)
    total = total.inverse() if inverse else total
    if isinstance(item, Image):
        if like is None:
            raise OptionError("like: none given; an image needs the scan whose grid it shall lie on")
        if total.ndim != item.ndim:
            raise GeometryError(f"transform: is {total.ndim}D, the image is {item.ndim}D; give a transform of its dimension")
        return carry_image(item, total, like, interpolation=interpolation, fill=fill)
    way = total.inverse()
    if isinstance(item, Points):
        return carry_points(item, way)
    points = torch.as_tensor(np.asarray(item), dtype=torch.float64) if not isinstance(item, Tensor) else item.double()
    if points.ndim != 2 or points.shape[1] != way.ndim:
        raise GeometryError(f"points: shape {tuple(points.shape)}; expected (P, {way.ndim})")
    moved = way(points[None])[0]
    return moved.to(item.dtype if item.dtype.is_floating_point else torch.float64) if isinstance(item, Tensor) else moved.numpy()
