"""Values of an image at points: the kernels and what holds beyond the image.

The only place, with `affine.py` beside it, that knows torch's normalised coordinates, its reversed axis order and
`align_corners`. Everything else speaks of index points: voxel centres at integers, axes in the order of the array.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from regkit.errors import choose
from regkit.filters import along, spline_coefficients

KERNELS = ("linear", "nearest", "cubic", "vote")
PADDINGS = ("zeros", "border", "reflection")
MARGIN = 2  # mirrored spline coefficients kept beyond each end: no tap of a point in the field of view falls off
FEW = 6  # channels up to which torch's own sampler is the faster one


def inside(index: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Whether index points (N, P, D) lie in the field of view, its outer edges (half a voxel beyond the centres) included.
    → (N, P)"""
    upper = torch.tensor(shape, dtype=index.dtype, device=index.device) - 0.5
    return ((index >= -0.5) & (index <= upper)).all(-1)


def reflect(index: Tensor, shape: Sequence[int]) -> Tensor:
    """Index points (N, P, D) mirrored at the outer edges of the field of view until they lie in it; differentiable."""
    size = torch.tensor(shape, dtype=index.dtype, device=index.device)
    return size - ((index + 0.5).remainder(2 * size) - size).abs() - 0.5


def sample(data: Tensor, index: Tensor, kernel: str = "linear") -> Tensor:
    """Values of data (N|1, C, *S) at index points (N|1, P, D) → (N, C, P).

    Beyond the field of view the outermost value holds; who needs to know uses `inside`, or `reflect` before. `linear` and
    `cubic` are differentiable in data and index, and read what `prepare` makes. `nearest`, the integer kernel of the
    spatial transformer's paper, keeps any dtype and is differentiable in data. While
    `torch.use_deterministic_algorithms` is on, the backward pass of all is free of atomic additions.
    """
    choose("kernel", kernel, ("linear", "nearest", "cubic"))
    n = max(data.shape[0], index.shape[0])
    if kernel == "nearest":
        return _nearest(data.expand(n, *data.shape[1:]), index.expand(n, *index.shape[1:]))
    if kernel == "cubic":
        pairs = zip(data.expand(n, *data.shape[1:]), index.expand(n, *index.shape[1:]), strict=True)
        return torch.stack([_cubic(coefficients, points) for coefficients, points in pairs])
    if torch.are_deterministic_algorithms_enabled():
        return _gathered(data.expand(n, *data.shape[1:]), index.expand(n, *index.shape[1:]))
    if data.shape[0] == 1 and data.shape[1] > FEW and data.movedim(1, -1).is_contiguous():
        return _rows(data, index)
    size = torch.tensor(data.shape[2:], dtype=index.dtype, device=index.device)
    return read(data, torch.addcmul(1 / size - 1, index, 2 / size).flip(-1).to(data.dtype).expand(n, -1, -1))


def read(data: Tensor, coordinates: Tensor) -> Tensor:
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


def _gathered(data: Tensor, index: Tensor) -> Tensor:
    """Linear sampling of data (N, C, *S) at index points (N, P, D) by gathering the 2^D neighbours: slower than `grid_sample`,
    and its backward pass adds up in a fixed order (torch offers none for `grid_sample` on CUDA)."""
    total: Tensor | float = 0.0
    shape, ndim = data.shape[2:], index.shape[-1]
    x = torch.stack([index[..., axis].clamp(0, shape[axis] - 1) for axis in range(ndim)], -1)
    low = torch.stack([x[..., axis].detach().floor().clamp(max=max(shape[axis] - 2, 0)) for axis in range(ndim)], -1)
    share = (x - low).to(data.dtype)
    flat = data.flatten(2)
    for corner in range(2**ndim):
        steps = [corner >> axis & 1 for axis in range(ndim)]
        weight = torch.stack([share[..., a] if step else 1 - share[..., a] for a, step in enumerate(steps)]).prod(0)
        place = _flat(low.long() + torch.tensor(steps, device=index.device), shape)
        total = total + flat.gather(2, place[:, None].expand(-1, data.shape[1], -1)) * weight[:, None]
    return total  # type: ignore[return-value]


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
    place = torch.zeros(index.shape[0], dtype=torch.long, device=index.device)
    weights = []
    for axis, padded in enumerate(coefficients.shape[1:]):
        x = index[:, axis].clamp(-0.5, padded - 2 * MARGIN - 0.5)
        base = torch.floor(x.detach())
        t = (x - base).to(coefficients.dtype)
        s, tt = 1 - t, t * t
        last, first = tt * t / 6, s * s * s / 6
        second = 3 * last - tt + 4 / 6
        weights.append((first, second, 1 - first - second - last, last))
        place = place * padded + base.long() + (MARGIN - 1)
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
    # a graph is traced with tensors that hold no numbers: none may be kept
    coefficients = spline_coefficients.__wrapped__ if torch.compiler.is_compiling() else spline_coefficients
    return along(data, [coefficients(n, MARGIN) for n in data.shape[2:]]).contiguous() if kernel == "cubic" else data
