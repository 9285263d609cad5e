"""Batches of images resampled under index maps, differentiable in the voxels and in the maps: the sampler of the spatial transformer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from regkit.filters import SHARP
from regkit.sampling import antialias as aa
from regkit.sampling.affine import read_affine, seen
from regkit.sampling.kernels import inside, prepare, reflect, sample

_HORIZON = 1e-6  # the least divisor of a projective map


@dataclass(frozen=True, eq=False)
class IndexMap:
    """Target index points → source index points.

    matrix: (N|1, D+1, D+1) float64, affine or, not `affine`, projective. bend: in place of a matrix, index points
    (1, P, D) → (N, P, D)."""

    matrix: Tensor | None = None
    affine: bool = True
    bend: Callable[[Tensor], Tensor] | None = None

    def __call__(self, index: Tensor) -> Tensor:
        if self.bend is not None:
            return self.bend(index)
        assert self.matrix is not None
        d = index.shape[-1]
        m = self.matrix.to(index.dtype)
        moved = index @ m[:, :d, :d].mT + m[:, None, :d, d]
        if self.affine:
            return moved
        divisor = index @ m[:, d, :d, None] + m[:, d, d, None, None]
        # what lies on and beyond the horizon is nowhere, and not on the image mirrored
        sign = torch.where(divisor.detach().mean(1, keepdim=True) < 0, -1.0, 1.0)
        return sign * moved / (sign * divisor).clamp_min(_HORIZON)


@dataclass(frozen=True)
class How:
    """How images are read: kernel (linear, nearest, cubic), padding (zeros, border, reflection), whether to anti-alias."""

    kernel: str = "linear"
    padding: str = "zeros"
    antialias: bool = True


def resample(data: Tensor, way: IndexMap, shape: Sequence[int], how: How) -> Tensor:
    """data (N|1, C, *S) at the places where `way` takes the index points of a target → (N, C, *shape), in the dtype of data.

    Half precision is computed in float32, integers are rounded. Items do not depend on each other, nor does what is smoothed of one."""
    if not data.is_floating_point() and how.kernel != "nearest":
        limits = torch.iinfo(data.dtype)
        values = resample(data.double() if data.dtype.itemsize > 2 else data.float(), way, shape, how)
        return values.round().clamp(limits.min, limits.max).to(data.dtype)  # a cubic overshoot must not wrap around
    dtype = data.dtype
    data = data if dtype in (torch.float32, torch.float64) or how.kernel == "nearest" else data.float()
    matrix = way.matrix if way.affine else None
    read = _read_affine if matrix is not None else _read_curved
    if matrix is not None and how.antialias and how.kernel != "nearest":
        wide = aa.widths(matrix.detach())
        if torch.compiler.is_compiling():  # no looking first: filters along the axes, of width 1 where nothing is due
            return _read_affine(aa.prefilter(data, wide), matrix, shape, how, data.shape[2:], (1,) * len(shape)).to(dtype)
        if float(wide.max()) > SHARP:
            return _shrunk(data, matrix, shape, how, wide).to(dtype)
    return read(data, matrix if matrix is not None else way, shape, how, data.shape[2:], (1,) * len(shape)).to(dtype)  # type: ignore[arg-type]


def _shrunk(data: Tensor, matrix: Tensor, shape: Sequence[int], how: How, wide: Tensor) -> Tensor:
    """Items of which some are shrunk: those that are treated alike go together."""
    n, size = max(data.shape[0], matrix.shape[0]), data.shape[2:]
    groups: dict[tuple[tuple[int, ...], tuple[int, ...]], list[int]] = {}
    for i, (steps, counts) in enumerate(zip(wide.tolist(), aa.supersampling(matrix), strict=True)):
        groups.setdefault((counts, aa.blocks_of(steps, size) if max(counts) == 1 else ()), []).append(i)
    if matrix.shape[0] == 1:
        groups = {key: list(range(n)) for key in groups}
    parts = []
    for (counts, blocks), members in groups.items():
        pick = slice(None) if len(members) == n else torch.tensor(members, device=data.device)
        some, m = data if data.shape[0] == 1 else data[pick], matrix if matrix.shape[0] == 1 else matrix[pick]
        if max(counts) > 1:
            parts.append(_supersampled(some, m, shape, how, counts))
        else:
            smooth = aa.prefilter(some, aa.widths(m.detach()), blocks)
            parts.append(_read_affine(smooth, m, shape, how, size, blocks))
    if len(parts) == 1:
        return parts[0]
    order = torch.tensor([i for members in groups.values() for i in members], device=data.device)
    return torch.cat(parts)[order.argsort()]


def _supersampled(data: Tensor, matrix: Tensor, shape: Sequence[int], how: How, counts: tuple[int, ...]) -> Tensor:
    """By sub-points of each target voxel; what lies outside takes no part in the average."""
    fine, scale = aa.finer(shape, counts, matrix)
    border = How(how.kernel, "border" if how.padding == "zeros" else how.padding)
    values = resample(data, IndexMap(matrix @ scale), fine, border)
    if how.padding != "zeros":
        return aa.reduce(values, counts)
    covered = _seen(matrix @ scale, fine, data.shape[2:]).to(values.dtype)[:, None]
    share = aa.reduce(covered, counts)
    return aa.reduce(values * covered, counts) / share.clamp_min(0.25) * _seen(matrix, shape, data.shape[2:])[:, None]


def _read_affine(data: Tensor, matrix: Tensor, shape: Sequence[int], how: How, size: Sequence[int], blocks: Sequence[int]) -> Tensor:
    """data (N|1, C, *S / blocks) of an image of `size` voxels, under affine index maps."""
    if how.kernel == "linear" and not torch.are_deterministic_algorithms_enabled():
        if how.padding == "reflection" and any(n != m * k for n, m, k in zip(size, data.shape[2:], blocks, strict=True)):
            return _read_curved(data, IndexMap(matrix), shape, how, size, blocks)  # blocks that do not fill the image
        values = read_affine(data, matrix, shape, blocks, "reflection" if how.padding == "reflection" else "border")
    else:
        values = _read_curved(data, IndexMap(matrix), shape, How(how.kernel, "reflection" if how.padding == "reflection" else "border"),
                              size, blocks)
    return torch.where(_seen(matrix, shape, size)[:, None], values, 0) if how.padding == "zeros" else values


def _seen(matrix: Tensor, shape: Sequence[int], size: Sequence[int]) -> Tensor:
    """(N, *shape) bool: what lies in the field of view of `size` voxels."""
    d, m = len(shape), matrix.detach()
    start = m[:, :d, d]
    for axis, n in enumerate(shape[:-1]):
        ramp = torch.arange(n, dtype=m.dtype, device=m.device)[:, None] * m[:, :d, axis].reshape(-1, *[1] * (axis + 1), d)
        start = start[..., None, :] + ramp
    return seen(start.flatten(1, -2), m[:, :d, d - 1], shape[-1], size).reshape(-1, *shape)


def _read_curved(data: Tensor, way: IndexMap | Tensor, shape: Sequence[int], how: How, size: Sequence[int],
                 blocks: Sequence[int]) -> Tensor:
    """Point by point; of a map that is not affine, from a scale-space where it shrinks."""
    way = IndexMap(way) if isinstance(way, Tensor) else way
    axes = [torch.arange(n, dtype=torch.float64, device=data.device) for n in shape]
    index = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).reshape(1, -1, len(shape))
    exact = way(index)
    where = reflect(exact, size) if how.padding == "reflection" else exact
    where = where.to(torch.float64 if data.dtype == torch.float64 else torch.float32)
    scales = None
    if how.antialias and how.kernel != "nearest" and (way.bend is not None or not way.affine):
        scales = aa.Scales.of(data, aa.local_steps(way, shape, data.device), shape, how.kernel)
    values = (sample(prepare(data, how.kernel), aa.in_blocks(where, blocks), how.kernel) if scales is None else
              scales.read(where, index))
    if how.padding == "zeros":
        values = values * inside(exact.detach(), tuple(size))[:, None]
    return values.reshape(values.shape[0], -1, *shape)
