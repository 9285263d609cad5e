"""An image carried onto another grid through a transform."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from regkit.errors import GeometryError, OptionError, choose
from regkit.filters import SHARP
from regkit.image import Image
from regkit.sampling import antialias as aa
from regkit.sampling.affine import lines, read_lines
from regkit.sampling.kernels import FEW, KERNELS, inside, prepare, sample
from regkit.sampling.resample import IndexMap
from regkit.space import Grid, Matrix, Transform
from regkit.space.transform import curved

ANTIALIAS = ("auto", "none")
_FAR = 1e9  # voxels
_CHUNK = 1_000_000  # points resampled at a time: bounds memory; fewer would make threads wait for each other more often


def index_map(source: Grid, transform: Transform, target: Grid) -> Tensor:
    """Index of `target` → index of `source` through the transform (target world → source world), as (N, D+1, D+1).

    Exact for an affine Matrix; for other transforms the linearisation at the target's centre."""
    if isinstance(transform, Matrix) and transform.affine:
        return source.inverse @ transform.matrix.to(source.device) @ target.affine
    d = target.ndim
    eye = torch.eye(d + 1, dtype=torch.float64, device=target.device)
    middle = torch.tensor([(n - 1) / 2 for n in target.shape], dtype=torch.float64, device=target.device)
    steps = torch.cat([torch.zeros_like(middle)[None], eye[:d, :d], -eye[:d, :d]]) / 2 + middle
    image = source.to_index(transform(target.to_world(steps[None])))
    linear = (image[:, 1: d + 1] - image[:, d + 1:]).mT
    shift = image[:, 0] - linear @ middle
    return torch.cat([torch.cat([linear, shift[..., None]], -1), eye[d:].expand(len(image), 1, -1)], 1)


def shrinkage(mapping: Tensor) -> list[float]:
    """How many source voxels of each source axis one step of the target spans at most, from index maps (N, D+1, D+1)."""
    return aa.widths(mapping).amax(0).tolist()


def items(*tensors: Tensor) -> list[tuple[Tensor, ...]]:
    """Tensors of N or 1 items, item by item."""
    n = max(map(len, tensors))
    return list(zip(*[t.expand(n, *t.shape[1:]).split(1) for t in tensors], strict=True))


@contextmanager
def _one_thread() -> Iterator[None]:
    """Products of matrices on one thread: shared among several, their sums differ in the last bit with the number of threads, and one
    and the same registration would give another file on another day. Points are read one by one, and may be shared out."""
    count = torch.get_num_threads()
    if count > 1:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        if count > 1:
            torch.set_num_threads(count)


def _is_identity(mapping: Tensor, source: Grid, target: Grid) -> bool:
    eye = torch.eye(mapping.shape[-1], dtype=mapping.dtype, device=mapping.device)
    reach = max(source.shape)
    return source.shape == target.shape and bool(((mapping - eye).abs() * reach < 1e-5).all())


def warp(image: Image, transform: Transform, grid: Grid, *, kernel: str = "linear", fill: float = 0.0,
         antialias: str = "auto") -> Image:
    """The image carried onto `grid`: `out(x) = image(T(x))`, T maps the grid's world to the image's world.

    image: (N, C, *S); one transform or N of them. kernel: linear, nearest, cubic (B-spline), vote (labels: the commonest
    label within the output voxel). antialias: `auto` smooths where the map shrinks the image, as much as it does there (linear
    and cubic only), or `none`.
    Outside the field of view the result is `fill`. Integer voxels stay integer (rounded, kept in their range).
    An exact identity returns the voxels as they are. Raises GeometryError if dimensions differ, OptionError for an unknown
    kernel or a fill that integers cannot hold.
    """
    choose("interpolation", kernel, KERNELS)
    choose("antialias", antialias, ANTIALIAS)
    if image.ndim != grid.ndim or transform.ndim != grid.ndim:
        raise GeometryError(f"warp: a {image.ndim}D image, a {transform.ndim}D transform and a {grid.ndim}D grid "
                            "do not go together")
    if not image.data.dtype.is_floating_point and not math.isfinite(fill):
        raise OptionError(f"fill: {fill} does not fit voxels of {image.data.dtype}; give a finite number")
    if not image.data.dtype.is_floating_point and image.data.dtype != torch.bool:
        info = torch.iinfo(image.data.dtype)
        fill = min(max(fill, info.min), info.max)
    mapping = index_map(image.grid, transform, grid)
    linear_map, smoothing = not curved(transform), antialias == "auto" and kernel in ("linear", "cubic")
    n = max(len(image.data), len(mapping))
    if linear_map and _is_identity(mapping, image.grid, grid):
        return Image(image.data.expand(n, *image.data.shape[1:]), grid, image.slice_affine, image.pixels)
    if n > 1 and isinstance(transform, Matrix):  # one by one: how much an item is smoothed is no matter of the others
        single = [warp(Image(data, Grid(image.grid.shape, a)), Matrix(m), Grid(grid.shape, b), kernel=kernel, fill=fill,
                       antialias=antialias).data
                  for data, a, m, b in items(image.data, image.grid.affine, transform.matrix, grid.affine)]
        return Image(torch.cat(single), grid)
    way = _way(image.grid, transform, grid)
    data, blocks, scales = image.data, (1,) * grid.ndim, None
    if smoothing and linear_map:
        counts, wide = aa.supersampling(mapping)[0], aa.widths(mapping)
        if max(counts) > 1:
            return _supersampled(image, transform, grid, counts, kernel, fill)
        if float(wide.max()) > SHARP:
            blocks = aa.blocks_of(wide[0].tolist(), image.grid.shape)
            with _one_thread():
                data = aa.prefilter(prepare(data, "linear"), wide, blocks)
    elif smoothing:
        steps = aa.local_steps(way, grid.shape, grid.device)
        with _one_thread():
            scales = aa.Scales.of(prepare(data, "linear"), steps, grid.shape, kernel)
    limits = _limits(image) if kernel == "linear" and (data is not image.data or scales is not None) else None
    with _one_thread():
        data = prepare(data, kernel)

    out: Tensor | None = None
    step = max(1, _CHUNK // (n * grid.shape[-1] * (16 if kernel == "vote" else 1)))  # a vote looks at many places for each
    count, eye = math.prod(grid.shape[:-1]), torch.eye(grid.ndim + 1, dtype=torch.float64, device=grid.device)[None]
    for low in range(0, count, step):
        high = min(low + step, count)
        if linear_map and kernel == "linear" and len(mapping) == 1 and data.shape[1] <= FEW:
            values, seen = read_lines(data, mapping, grid, low, high, image.grid.shape, blocks)
        else:
            where = (lines(grid, mapping, low, high) if linear_map else way(lines(grid, eye, low, high))).float()
            seen = inside(where, image.grid.shape)
            values = (_vote(data, where, mapping) if kernel == "vote" else
                      scales.read(where, lines(grid, eye, low, high)) if scales is not None else
                      sample(data, aa.in_blocks(where, blocks), kernel))
        if limits is not None:
            values = values.clamp(*limits)
        if not bool(seen.all()):
            values = torch.where(seen[:, None], values, _constant(fill, values))
        values = _restore(values, image.data.dtype, bounded=kernel != "cubic")
        if out is None:  # all there will be, so that chunks need not be held and then joined
            out = values if high == count else values.new_empty(*values.shape[:2], count * grid.shape[-1])
        if out is not values:
            out[..., low * grid.shape[-1]: high * grid.shape[-1]] = values
    assert out is not None
    return Image(out.reshape(n, -1, *grid.shape), grid)


def _way(source: Grid, transform: Transform, target: Grid) -> IndexMap:
    """Index of `target` → index of `source`, of a map that is not affine; what goes nowhere goes far outside."""
    if isinstance(transform, Matrix):
        return IndexMap(source.inverse @ transform.matrix.to(source.device) @ target.affine, affine=False)
    return IndexMap(bend=lambda index: source.to_index(transform(target.to_world(index))).nan_to_num(-_FAR, _FAR, -_FAR))


def _supersampled(image: Image, transform: Transform, grid: Grid, counts: tuple[int, ...], kernel: str, fill: float) -> Image:
    """By sub-points of each voxel of the grid, see `antialias`; what lies outside takes no part in the average."""
    shape, scale = aa.finer(grid.shape, counts, grid.affine)
    fine = Grid(shape, grid.affine @ scale)
    ones = Image(torch.ones(len(image.data), 1, *image.grid.shape, device=image.data.device), image.grid)
    covered = warp(ones, transform, fine, kernel="nearest").data
    values = warp(image.with_data(prepare(image.data, "linear")), transform, fine, kernel=kernel).data
    with _one_thread():
        share = aa.reduce(covered, counts)
        values = aa.reduce(values * covered, counts) / share.clamp_min(0.25)
    values = values.clamp(*_limits(image)) if kernel == "linear" else values
    seen = warp(ones, transform, grid, kernel="nearest").data > 0.5
    values = torch.where(seen, values, _constant(fill, values))
    return Image(_restore(values, image.data.dtype, bounded=kernel != "cubic"), grid)


def _limits(image: Image) -> tuple[float, float]:
    """The range of an image: what smoothing overshoots at hard edges is cut there, so that no new values appear."""
    data = image.data.detach()
    return float(data.amin()), float(data.amax())


def _constant(fill: float, like: Tensor) -> Tensor:
    return torch.tensor(fill if like.dtype.is_floating_point or like.dtype == torch.bool else round(fill), dtype=torch.float64).to(like)


def _restore(values: Tensor, dtype: torch.dtype, bounded: bool) -> Tensor:
    """Values in the image's own dtype; `bounded` ones lie between those of the image."""
    if values.dtype == dtype or dtype.is_floating_point:
        return values.to(dtype)
    if dtype == torch.bool:
        return values >= 0.5
    info = torch.iinfo(dtype)
    values = values.double() if dtype.itemsize > 2 else values
    return (values.round() if bounded else values.round().clamp(info.min, info.max)).to(dtype)


def _vote(data: Tensor, where: Tensor, mapping: Tensor) -> Tensor:
    """The commonest nearest label among sub-points spread over each output voxel."""
    d = where.shape[-1]
    count = min(4, max(2, math.ceil(max(shrinkage(mapping)))))
    offsets = (torch.arange(count, device=where.device) + 0.5) / count - 0.5
    steps = torch.cartesian_prod(*[offsets] * d).to(mapping)
    labels = torch.stack([sample(data, where + (step @ mapping[:, :d, :d].mT)[:, None].to(where), "nearest") for step in steps])
    votes = torch.stack([(labels == label).sum(0, dtype=torch.uint8) for label in labels])
    return labels.gather(0, votes.max(0, keepdim=True).indices)[0]
