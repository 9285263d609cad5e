"""The sampler: values of an image at points, and an image carried onto another grid.

The only place that knows torch's normalised coordinates, its reversed axis order and `align_corners`. Everything else
speaks of index points: voxel centres at integers, axes in the order of the array.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from regkit.errors import GeometryError, OptionError, choose
from regkit.filters import along, smooth, spline_coefficients
from regkit.image import Image
from regkit.space import Grid, Matrix, Transform

KERNELS = ("linear", "nearest", "cubic", "vote")
_MARGIN = 2  # mirrored spline coefficients kept beyond each end: no tap of a point in the field of view falls off
_FEW = 6  # channels up to which torch's own sampler is the faster one
_EDGE = 1e-5  # voxels by which a point may lie off an outer edge: rounding
_CHUNK = 1_000_000  # points resampled at a time: bounds memory; fewer would make threads wait for each other more often


def inside(index: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Whether index points (N, P, D) lie in the field of view, its outer edges (half a voxel beyond the centres) included.
    → (N, P)"""
    upper = torch.tensor(shape, dtype=index.dtype, device=index.device) - 0.5
    return ((index >= -0.5) & (index <= upper)).all(-1)


def sample(data: Tensor, index: Tensor, kernel: str = "linear") -> Tensor:
    """Values of data (N|1, C, *S) at index points (N|1, P, D) → (N, C, P).

    Beyond the field of view the outermost value holds; who needs to know uses `inside`. `linear` and `cubic` are
    differentiable in data and index, and read what `prepare` makes. `nearest` keeps any dtype.
    """
    choose("kernel", kernel, ("linear", "nearest", "cubic"))
    n = max(len(data), len(index))
    if kernel == "nearest":
        return _nearest(data.expand(n, *data.shape[1:]), index.expand(n, *index.shape[1:]))
    if kernel == "cubic":
        pairs = zip(data.expand(n, *data.shape[1:]), index.expand(n, *index.shape[1:]), strict=True)
        return torch.stack([_cubic(coefficients, points) for coefficients, points in pairs])
    if len(data) == 1 and data.shape[1] > _FEW and data.movedim(1, -1).is_contiguous():
        return _rows(data, index)
    size = torch.tensor(data.shape[2:], dtype=index.dtype, device=index.device)
    return _read(data, torch.addcmul(1 / size - 1, index, 2 / size).flip(-1).to(data.dtype).expand(n, -1, -1))


def _read(data: Tensor, coordinates: Tensor) -> Tensor:
    """torch's linear sampler: data (N|1, C, *S) at its coordinates (N, P, D), axes reversed, outer edges at ±1 → (N, C, P)."""
    n, points, ndim = coordinates.shape
    # torch threads its CPU kernel over the batch only: share the points out over an expanded batch
    parts = torch.get_num_threads() if n == 1 and points > 4096 and data.device.type == "cpu" else 1
    share = -(-points // parts)
    if share * parts > points:
        coordinates = F.pad(coordinates, (0, 0, 0, share * parts - points))
    coordinates = coordinates.reshape(n * parts, *[1] * (ndim - 1), share, ndim)
    batch = data.expand(n * parts, *data.shape[1:])
    values = F.grid_sample(batch, coordinates, mode="bilinear", padding_mode="border", align_corners=False)
    return values.reshape(n, parts, -1, share).transpose(1, 2).reshape(n, -1, share * parts)[..., :points]


def _rows(data: Tensor, index: Tensor) -> Tensor:
    """Linear sampling of data (1, C, *S) that lie channels last: a voxel's channels are one row of a table, and a value is
    the weighted sum of 2^D rows. Up to nine times as fast as `grid_sample`, which fetches every channel from elsewhere."""
    n, points, ndim = index.shape
    shape, stride = data.shape[2:], 1
    place = torch.zeros(1, n * points, dtype=torch.long, device=index.device)
    weight = torch.ones(1, n * points, dtype=data.dtype, device=index.device)
    for axis in reversed(range(ndim)):
        x = index[..., axis].reshape(-1).to(data.dtype).clamp(0, shape[axis] - 1)
        low = x.floor().clamp_(max=max(shape[axis] - 2, 0))
        share, low = x - low, low.long() * stride
        place = torch.cat([place + low, place + (low + (stride if shape[axis] > 1 else 0))])
        weight = torch.cat([weight * (1 - share), weight * share])
        stride *= shape[axis]
    table = data.movedim(1, -1).reshape(-1, data.shape[1])
    values = F.embedding_bag(place.mT.contiguous(), table, per_sample_weights=weight.mT.contiguous(), mode="sum")
    return values.reshape(n, points, -1).mT.contiguous()


def _nearest(data: Tensor, index: Tensor) -> Tensor:
    flat = _flat(torch.floor(index + 0.5).long(), data.shape[2:])
    return data.reshape(*data.shape[:2], -1).gather(2, flat[:, None].expand(-1, data.shape[1], -1))


def _flat(index: Tensor, shape: torch.Size | tuple[int, ...]) -> Tensor:
    """Integer index points (N, P, D), clamped into the array → flat positions (N, P)."""
    flat = torch.zeros_like(index[..., 0])
    for axis, n in enumerate(shape):
        flat = flat * n + index[..., axis].clamp(0, n - 1)
    return flat


def _cubic(coefficients: Tensor, index: Tensor) -> Tensor:
    """Cubic B-spline (Unser 1999) of coefficients (C, *S + margins) at index points (P, D) → (C, P)."""
    place = torch.zeros(len(index), dtype=torch.long, device=index.device)
    weights = []
    for axis, padded in enumerate(coefficients.shape[1:]):
        x = index[:, axis].clamp(-0.5, padded - 2 * _MARGIN - 0.5)
        base = torch.floor(x.detach())
        t = (x - base).to(coefficients.dtype)
        s, tt = 1 - t, t * t
        last, first = tt * t / 6, s * s * s / 6
        second = 3 * last - tt + 4 / 6
        weights.append((first, second, 1 - first - second - last, last))
        place = place * padded + base.long() + (_MARGIN - 1)
    return _taps(coefficients.flatten(1), place.expand(len(coefficients), -1), weights, coefficients.stride()[1:])


def _taps(flat: Tensor, place: Tensor, weights: Sequence[Sequence[Tensor]], strides: Sequence[int]) -> Tensor:
    """Weighted sum over the first axis' taps of the weighted sums over the other axes'. flat (C, M), place (C, P) → (C, P)."""
    if not weights:
        return flat.gather(1, place)
    total = _taps(flat, place, weights[1:], strides[1:]) * weights[0][0]
    for tap, weight in enumerate(weights[0][1:], 1):
        # a shifted view of the array costs nothing, a shifted copy of the places would
        total = torch.addcmul(total, _taps(flat[:, tap * strides[0]:], place, weights[1:], strides[1:]), weight)
    return total


def prepare(data: Tensor, kernel: str) -> Tensor:
    """What `sample` reads for a kernel: floating voxels; for `cubic` their spline coefficients, with a mirrored margin."""
    if kernel in ("nearest", "vote"):
        return data
    data = data if data.dtype in (torch.float32, torch.float64) else data.float()
    return along(data, [spline_coefficients(n, _MARGIN) for n in data.shape[2:]]).contiguous() if kernel == "cubic" else data


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
    """How many source voxels of each source axis one step of the target spans, from an index map (N, D+1, D+1)."""
    d = mapping.shape[-1] - 1
    return mapping[:, :d, :d].norm(dim=2).amax(0).tolist()


def antialias(data: Tensor, factors: list[float]) -> tuple[Tensor, tuple[int, ...]]:
    """Smooth data (N, C, *S) for sampling at steps of `factors` voxels an axis. → smoothed data and the blocks of voxels it
    is kept for, see `in_blocks`.

    The Gaussian leaves two voxels of width k the blur one voxel has: σ² = (k² - 1) / (8 ln 2) (Cardoso 2015). It is computed
    at no more places than the step needs: one in each block of half a step.
    """
    blocks = tuple(max(1, min(int(k / 2), n // 2)) for k, n in zip(factors, data.shape[2:], strict=True))
    return smooth(data, [math.sqrt((k * k - 1) / (8 * math.log(2))) if k > 1.01 else 0.0 for k in factors], blocks), blocks


def items(*tensors: Tensor) -> list[tuple[Tensor, ...]]:
    """Tensors of N or 1 items, item by item."""
    n = max(map(len, tensors))
    return list(zip(*[t.expand(n, *t.shape[1:]).split(1) for t in tensors], strict=True))


def in_blocks(index: Tensor, blocks: Sequence[int]) -> Tensor:
    """Index points (N, P, D) of an image as index points of its blocks, see `antialias`."""
    if max(blocks) == 1:
        return index
    size = torch.tensor(blocks, dtype=index.dtype, device=index.device)
    return (index - (size - 1) / 2) / size


def _is_identity(mapping: Tensor, source: Grid, target: Grid) -> bool:
    eye = torch.eye(mapping.shape[-1], dtype=mapping.dtype, device=mapping.device)
    reach = max(source.shape)
    return source.shape == target.shape and bool(((mapping - eye).abs() * reach < 1e-5).all())


def warp(image: Image, transform: Transform, grid: Grid, *, kernel: str = "linear", fill: float = 0.0,
         smoothing: bool = True) -> Image:
    """The image carried onto `grid`: `out(x) = image(T(x))`, T maps the grid's world to the image's world.

    image: (N, C, *S); one transform or N of them. kernel: linear, nearest, cubic (B-spline), vote (labels: the commonest
    label within the output voxel). smoothing: anti-alias where the map shrinks the image (linear and cubic only).
    Outside the field of view the result is `fill`. Integer voxels stay integer (rounded, kept in their range).
    An exact identity returns the voxels as they are. Raises GeometryError if dimensions differ, OptionError for an unknown
    kernel or a fill that integers cannot hold.
    """
    choose("interpolation", kernel, KERNELS)
    if image.ndim != grid.ndim or transform.ndim != grid.ndim:
        raise GeometryError(f"warp: a {image.ndim}D image, a {transform.ndim}D transform and a {grid.ndim}D grid "
                            "do not go together")
    if not image.data.dtype.is_floating_point and not math.isfinite(fill):
        raise OptionError(f"fill: {fill} does not fit voxels of {image.data.dtype}; give a finite number")
    if not image.data.dtype.is_floating_point and image.data.dtype != torch.bool:
        info = torch.iinfo(image.data.dtype)
        fill = min(max(fill, info.min), info.max)
    mapping = index_map(image.grid, transform, grid)
    linear_map = isinstance(transform, Matrix) and transform.affine
    n = max(len(image.data), len(mapping))
    if linear_map and _is_identity(mapping, image.grid, grid):
        return Image(image.data.expand(n, *image.data.shape[1:]), grid, image.slice_affine, image.pixels)
    if n > 1 and isinstance(transform, Matrix):  # one by one: how much an item is smoothed is no matter of the others
        single = [warp(Image(data, Grid(image.grid.shape, a)), Matrix(m), Grid(grid.shape, b), kernel=kernel, fill=fill,
                       smoothing=smoothing).data
                  for data, a, m, b in items(image.data, image.grid.affine, transform.matrix, grid.affine)]
        return Image(torch.cat(single), grid)
    data, blocks, factors = image.data, (1,) * grid.ndim, shrinkage(mapping)
    if kernel in ("linear", "cubic") and smoothing and max(factors) > 1.01:
        data, blocks = antialias(prepare(data, "linear"), factors)
    data = prepare(data, kernel)

    out = []
    step = max(1, _CHUNK // (n * grid.shape[-1] * (16 if kernel == "vote" else 1)))  # a vote looks at many places for each
    lines = math.prod(grid.shape[:-1])
    for low in range(0, lines, step):
        high = min(low + step, lines)
        if linear_map and kernel == "linear" and len(mapping) == 1 and data.shape[1] <= _FEW:
            values, seen = _read_lines(data, mapping, grid, low, high, image.grid.shape, blocks)
        else:
            where = (_lines(grid, mapping, low, high) if linear_map else
                     image.grid.to_index(transform(_lines(grid, grid.affine, low, high)))).float()
            seen = inside(where, image.grid.shape)
            values = _vote(data, where, mapping) if kernel == "vote" else sample(data, in_blocks(where, blocks), kernel)
        if not bool(seen.all()):
            values = torch.where(seen[:, None], values, _constant(fill, values))
        out.append(_restore(values, image.data.dtype, bounded=kernel != "cubic"))
    return Image(torch.cat(out, -1).reshape(n, -1, *grid.shape), grid)


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


def _starts(grid: Grid, mapping: Tensor, low: int, high: int) -> Tensor:
    """Points (N, lines, D), float64, where a linear map of the grid's indices takes the first points of its lines."""
    d = grid.ndim
    number = torch.arange(low, high, device=grid.device)
    start = mapping[:, :d, d, None]  # (N, D, lines)
    for axis in reversed(range(d - 1)):
        n = grid.shape[axis]
        start = start + mapping[:, :d, axis, None] * number.remainder(n)
        number = number.div(n, rounding_mode="floor")
    return start.expand(-1, -1, high - low).mT


def _lines(grid: Grid, mapping: Tensor, low: int, high: int) -> Tensor:
    """Points (N, P, D), float64, where a linear map of the grid's indices takes its lines low … high along the last axis."""
    d = grid.ndim
    steps = torch.arange(grid.shape[-1], dtype=torch.float64, device=grid.device)
    start = _starts(grid, mapping, low, high).mT
    return (start[..., None] + mapping[:, :d, d - 1, None, None] * steps).flatten(2).mT


def _read_lines(data: Tensor, mapping: Tensor, grid: Grid, low: int, high: int, shape: tuple[int, ...],
                blocks: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Linear values (N, C, P) along lines low … high of the grid under one linear map (1, D+1, D+1), and whether each point
    lies in the field of view (1, P). Three times as fast as by single points, since on a line all of it is a ramp."""
    d, n = grid.ndim, grid.shape[-1]
    first = _starts(grid, mapping, low, high)[0]  # (lines, D)
    step = mapping[0, :d, d - 1]
    begin = torch.zeros(len(first), dtype=torch.float64, device=grid.device)
    end = torch.full_like(begin, n - 1)
    for axis, size in enumerate(shape):  # from where to where a line is inside along each axis; edges count as inside
        lower, upper = -0.5 - _EDGE - first[:, axis], size - 0.5 + _EDGE - first[:, axis]
        if abs(float(step[axis])) < 1e-12:
            end = torch.where((lower <= 0) & (upper >= 0), end, -1)
            continue
        ends = torch.stack([lower, upper]) / step[axis]
        begin, end = torch.maximum(begin, ends.amin(0)), torch.minimum(end, ends.amax(0))
    count = torch.arange(n, device=grid.device)
    seen = (count >= begin.ceil().int()[:, None]) & (count <= end.floor().int()[:, None])
    size = torch.tensor(data.shape[2:], dtype=torch.float64, device=grid.device)
    scale = 2 / size / torch.tensor(blocks, dtype=torch.float64, device=grid.device)  # index → torch's coordinates
    start = ((first + 0.5) * scale - 1).flip(-1).to(data.dtype)
    coordinates = torch.addcmul(start[:, None], count.to(data.dtype)[:, None], (step * scale).flip(-1).to(data.dtype))
    return _read(data, coordinates.reshape(1, -1, d).expand(len(data), -1, -1)), seen.reshape(1, -1)


def _vote(data: Tensor, where: Tensor, mapping: Tensor) -> Tensor:
    """The commonest nearest label among sub-points spread over each output voxel."""
    d = where.shape[-1]
    count = min(4, max(2, math.ceil(max(shrinkage(mapping)))))
    offsets = (torch.arange(count, device=where.device) + 0.5) / count - 0.5
    steps = torch.cartesian_prod(*[offsets] * d).to(mapping)
    labels = torch.stack([sample(data, where + (step @ mapping[:, :d, :d].mT)[:, None].to(where), "nearest") for step in steps])
    votes = torch.stack([(labels == label).sum(0, dtype=torch.uint8) for label in labels])
    return labels.gather(0, votes.max(0, keepdim=True).indices)[0]
