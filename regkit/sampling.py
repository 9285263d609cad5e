"""The sampler: values of an image at points, and an image carried onto another grid.

The only place that knows torch's normalised coordinates, its reversed axis order and `align_corners`. Everything else
speaks of index points: voxel centres at integers, axes in the order of the array.
"""

from __future__ import annotations

import itertools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from regkit.errors import GeometryError, choose
from regkit.filters import along, block_mean, smooth, spline_coefficients
from regkit.image import Image
from regkit.space import Grid, Matrix, Transform

KERNELS = ("linear", "nearest", "cubic", "vote")
_CHUNK = 1_000_000  # points resampled at a time: bounds memory, and is large enough to keep the cores busy


def inside(index: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Whether index points (N, P, D) lie in the field of view, outer edges (half a voxel beyond the centres) included. → (N, P)"""
    upper = torch.tensor(shape, dtype=index.dtype, device=index.device) - 0.5
    return ((index >= -0.5) & (index <= upper)).all(-1)


def sample(data: Tensor, index: Tensor, kernel: str = "linear") -> Tensor:
    """Values of data (N|1, C, *S) at index points (N|1, P, D) → (N, C, P).

    Beyond the outer voxel centres the border value holds; who needs to know uses `inside`. `linear` and `cubic` are
    differentiable in data and index. `cubic` expects spline coefficients, see `prepare`. `nearest` keeps any dtype.
    """
    n = max(len(data), len(index))
    if kernel == "nearest":
        return _nearest(data.expand(n, *data.shape[1:]), index.expand(n, *index.shape[1:]))
    if kernel == "cubic":
        return _cubic(data.expand(n, *data.shape[1:]), index.expand(n, *index.shape[1:]))
    choose("kernel", kernel, ("linear", "nearest", "cubic"))
    ndim, points = data.ndim - 2, index.shape[1]
    size = torch.tensor(data.shape[2:], dtype=index.dtype, device=index.device)
    coordinates = ((2 * index + 1) / size - 1).flip(-1).to(torch.float32 if data.dtype.is_floating_point else data.dtype)
    coordinates = coordinates.to(data.dtype).expand(n, -1, -1)
    # torch threads its CPU kernel over the batch only: share the points out over an expanded batch
    parts = torch.get_num_threads() if n == 1 and points > 4096 and data.device.type == "cpu" else 1
    parts = math.gcd(parts, points) if points % parts else parts
    shaped = coordinates.reshape(n * parts, *([1] * (ndim - 1)), points // parts, ndim)
    batch = data.expand(n * parts, *data.shape[1:])
    values = F.grid_sample(batch, shaped, mode="bilinear", padding_mode="border", align_corners=False)
    if parts > 1:
        return values.reshape(parts, data.shape[1], -1).transpose(0, 1).reshape(1, data.shape[1], points)
    return values.reshape(n, data.shape[1], points)


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
    """Cubic B-spline sum over 4^D coefficients (Unser 1999), whole-sample mirrored at the ends."""
    ndim = index.shape[-1]
    flat = coefficients.reshape(*coefficients.shape[:2], -1)
    base = torch.floor(index)
    t = index - base
    weights = torch.stack([(1 - t) ** 3 / 6, (4 - 6 * t**2 + 3 * t**3) / 6,
                           (1 + 3 * t + 3 * t**2 - 3 * t**3) / 6, t**3 / 6], -1)  # (N, P, D, 4)
    places = base.long()[..., None] + torch.arange(-1, 3, device=index.device)
    for axis, n in enumerate(coefficients.shape[2:]):
        period = max(2 * n - 2, 1)
        place = places[..., axis, :].remainder(period)
        places[..., axis, :] = torch.where(place >= n, period - place, place)
    strides = [math.prod(coefficients.shape[3 + a:]) for a in range(ndim)]
    total = torch.zeros(*coefficients.shape[:2], index.shape[1], dtype=coefficients.dtype, device=coefficients.device)
    for taps in itertools.product(range(4), repeat=ndim):
        where = sum(places[..., a, k] * strides[a] for a, k in enumerate(taps))
        weight = math.prod(weights[..., a, k] for a, k in enumerate(taps))
        total = total + flat.gather(2, where[:, None].expand(-1, flat.shape[1], -1)) * weight[:, None]
    return total


def prepare(data: Tensor, kernel: str) -> Tensor:
    """What `sample` reads for a kernel: floating voxels; for `cubic` their spline coefficients."""
    if kernel in ("nearest", "vote"):
        return data
    data = data if data.dtype in (torch.float32, torch.float64) else data.float()
    return along(data, [spline_coefficients(n) if n > 1 else None for n in data.shape[2:]]) if kernel == "cubic" else data


def index_map(source: Grid, transform: Transform, target: Grid) -> Tensor:
    """Index of `target` → index of `source` through the transform (target world → source world), as (N, D+1, D+1).

    Exact for a Matrix; for other transforms its linearisation at the target's centre."""
    if isinstance(transform, Matrix):
        return source.inverse @ transform.matrix.to(source.device) @ target.affine
    d = target.ndim
    middle = torch.tensor([(n - 1) / 2 for n in target.shape], dtype=torch.float64)
    steps = torch.cat([torch.zeros(1, d), torch.eye(d), -torch.eye(d)]).double() + middle
    image = source.to_index(transform(target.to_world(steps[None])))
    linear = (image[:, 1: d + 1] - image[:, d + 1:]).mT / 2
    m = torch.eye(d + 1, dtype=torch.float64).repeat(len(image), 1, 1)
    m[:, :d, :d] = linear
    m[:, :d, d] = image[:, 0] - linear @ middle
    return m


def shrinkage(mapping: Tensor) -> list[float]:
    """How many source voxels of each source axis one step of the target spans, from an index map (N, D+1, D+1)."""
    d = mapping.shape[-1] - 1
    return mapping[:, :d, :d].norm(dim=2).amax(0).tolist()


def antialias(data: Tensor, factors: list[float]) -> tuple[Tensor, tuple[int, ...]]:
    """Smooth data (N, C, *S) for sampling at steps of `factors` voxels an axis. → smoothed data and blocks averaged.

    The Gaussian leaves two voxels of width k the blur one voxel has: σ² = (k² - 1) / (8 ln 2) (Cardoso 2015). Where the
    step is long, blocks of half a step are averaged first and the Gaussian gives the rest: the same blur, less work.
    """
    blocks = tuple(max(1, min(int(k / 2), n // 2)) for k, n in zip(factors, data.shape[2:], strict=True))
    if max(blocks) > 1:
        data = along(data, [block_mean(n, b) if b > 1 else None for n, b in zip(data.shape[2:], blocks, strict=True)])
    sigma = [math.sqrt(max(0.0, (k * k - 1) / (8 * math.log(2)) - (b * b - 1) / 12)) / b if k > 1.01 else 0.0
             for k, b in zip(factors, blocks, strict=True)]
    return smooth(data, sigma), blocks


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
    An exact identity returns the voxels as they are. Raises GeometryError if dimensions differ.
    """
    choose("interpolation", kernel, KERNELS)
    if image.ndim != grid.ndim or transform.ndim != grid.ndim:
        raise GeometryError(f"warp: a {image.ndim}D image, a {transform.ndim}D transform and a {grid.ndim}D grid do not go together")
    mapping = index_map(image.grid, transform, grid)
    linear_map = isinstance(transform, Matrix)
    if linear_map and _is_identity(mapping, image.grid, grid):
        return Image(image.data, grid, image.slice_affine, image.pixels)
    data, source, factors = image.data, image.grid, shrinkage(mapping)
    if kernel in ("linear", "cubic") and smoothing and max(factors) > 1.01:
        data, blocks = antialias(prepare(data, "linear"), factors)
        source = source.shrink(blocks)
        mapping = index_map(source, transform, grid)
    data = prepare(data, kernel)
    n = max(len(data), len(mapping))
    out = torch.empty((n, image.channels, math.prod(grid.shape)), dtype=data.dtype, device=data.device)
    per_slab = math.prod(grid.shape[1:])
    slabs = max(1, _CHUNK // per_slab)
    for start in range(0, grid.shape[0], slabs):
        stop = min(start + slabs, grid.shape[0])
        where = _slab(grid, start, stop, mapping) if linear_map else \
            source.to_index(transform(grid.to_world(_slab_index(grid, start, stop)))).to(torch.float32)
        seen = inside(_slab(grid, start, stop, index_map(image.grid, transform, grid)), image.grid.shape) if linear_map \
            else inside(where, source.shape)
        values = _vote(data, where, mapping) if kernel == "vote" else sample(data, where, kernel)
        out[..., start * per_slab: stop * per_slab] = torch.where(seen[:, None], values, _constant(fill, values))
    return Image(_restore(out.reshape(n, -1, *grid.shape), image.data.dtype), grid)


def _constant(fill: float, like: Tensor) -> Tensor:
    value = fill if like.dtype.is_floating_point else round(fill)
    return torch.tensor(value, dtype=torch.float64).to(like)


def _restore(values: Tensor, dtype: torch.dtype) -> Tensor:
    if values.dtype == dtype or dtype.is_floating_point:
        return values.to(dtype)
    if dtype == torch.bool:
        return values >= 0.5
    info = torch.iinfo(dtype)
    return values.double().round().clamp(info.min, info.max).to(dtype) if dtype.itemsize > 2 else \
        values.round().clamp(info.min, info.max).to(dtype)


def _slab_index(grid: Grid, start: int, stop: int) -> Tensor:
    axes = [torch.arange(start, stop), *[torch.arange(m) for m in grid.shape[1:]]]
    return torch.stack(torch.meshgrid(*[a.to(grid.device, torch.float64) for a in axes], indexing="ij"), -1).reshape(1, -1, grid.ndim)


def _slab(grid: Grid, start: int, stop: int, mapping: Tensor) -> Tensor:
    """Index points (N, P, D), float32, of the grid's slices start…stop under a linear index map."""
    d = grid.ndim
    total = mapping[:, *([None] * d), :d, d]
    ranges = [(start, stop), *[(0, m) for m in grid.shape[1:]]]
    for axis, (low, high) in enumerate(ranges):
        steps = torch.arange(low, high, dtype=torch.float64, device=mapping.device)
        part = steps[:, None] * mapping[:, None, :d, axis]  # (N, n, D), float64: only the sum is rounded
        total = total + part.reshape(len(mapping), *[-1 if a == axis else 1 for a in range(d)], d)
    return total.reshape(len(mapping), -1, d).float()


def _vote(data: Tensor, where: Tensor, mapping: Tensor) -> Tensor:
    """The commonest nearest label among sub-points spread over each output voxel."""
    d = where.shape[-1]
    count = min(4, max(2, math.ceil(max(shrinkage(mapping)))))
    offsets = (torch.arange(count, device=where.device) + 0.5) / count - 0.5
    steps = torch.cartesian_prod(*[offsets] * d).to(mapping)
    labels = [sample(data, where + (step @ mapping[:, :d, :d].mT)[:, None].to(where), "nearest") for step in steps]
    votes = torch.stack([sum((a == b).to(torch.uint8) for b in labels) for a in labels])
    return torch.stack(labels).gather(0, votes.max(0, keepdim=True).indices)[0]
