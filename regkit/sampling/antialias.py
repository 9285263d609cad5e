"""Anti-aliasing: what must be smoothed before a map may shrink an image.

A kernel reads the nearest voxels whatever the step between its points, so at steps of k voxels all detail finer than 2 k voxels
turns up as something else. It is taken out first, as much as the map asks for where it asks:

- where the map's footprint lies along the image's axes, or is round: by a filter along each axis of the image (`widths`);
- where it is long and oblique, as a thick slice through a thin-sliced scan: by sub-points, averaged in the output (`supersampling`);
- where it changes from place to place (projective, splines, fields): by a scale-space (Williams 1983, mip-map; here in 2D and
  3D, two levels an octave), of which each point reads the two levels nearest to its own step (`Scales`).

How much is smoothed is no matter of differentiation: gradients flow through the voxels and the places, not through the widths.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from regkit.filters import SHARP, along, sharp, sharp_one
from regkit.sampling.kernels import prepare, sample

_ROUND = 1.25  # times as much as is due: what may be smoothed at most for the sake of filters along the image's axes
_OCTAVE = 2  # levels of a scale-space each time the step doubles
_FIRST = _OCTAVE * math.log2(SHARP)  # the level below which the image itself will do
_MOST = 12  # octaves
_LATTICE = 9  # points an axis at which the step of a map is looked at that changes from place to place
_EXPORTED = 3  # octaves of a scale-space in a compiled graph, which cannot look first


def widths(mapping: Tensor) -> Tensor:
    """(N, D): how many source voxels of each source axis one step of the target spans, from index maps (N, D+1, D+1)."""
    d = mapping.shape[-1] - 1
    return mapping[:, :d, :d].norm(dim=2)


def blocks_of(steps: Sequence[float], shape: Sequence[int]) -> tuple[int, ...]:
    """Of how many voxels along each axis one value is kept when the image is smoothed for steps of so many voxels: half of them."""
    return tuple(max(1, min(int(k / 2), n // 2)) for k, n in zip(steps, shape, strict=True))


def prefilter(data: Tensor, wide: Tensor, blocks: Sequence[int] | None = None) -> Tensor:
    """data (N, C, *S) smoothed for steps of `wide` (N|1, D) voxels along its axes; kept for blocks of voxels, see `in_blocks`."""
    size = data.shape[2:]
    blocks = (1,) * len(size) if blocks is None else blocks
    if wide.shape[0] == 1 and not torch.compiler.is_compiling():
        steps = [round(max(k, 1.0), 4) for k in wide[0].tolist()]
        return along(data, [sharp_one(n, k, b) if n > 1 and (k > SHARP or b > 1) else None
                            for n, k, b in zip(size, steps, blocks, strict=True)])
    with torch.no_grad():
        wide = wide.round(decimals=4).to(data.dtype)  # as for one item alone
        kernels = [sharp(n, wide[:, a], b) if n > 1 else None for a, (n, b) in enumerate(zip(size, blocks, strict=True))]
    return along(data.expand(max(data.shape[0], wide.shape[0]), *data.shape[1:]), kernels)


def in_blocks(index: Tensor, blocks: Sequence[int]) -> Tensor:
    """Index points (N, P, D) of an image as index points of its blocks, see `prefilter`."""
    if max(blocks) == 1:
        return index
    size = torch.tensor(blocks, dtype=index.dtype, device=index.device)
    return (index - (size - 1) / 2) / size


def supersampling(mapping: Tensor) -> list[tuple[int, ...]]:
    """Into how many sub-points each step of the target is to be parted, by axis, for each of index maps (N, D+1, D+1); all 1 where
    filters along the source's axes smooth little more than is due."""
    d = mapping.shape[-1] - 1
    linear = mapping[:, :d, :d].detach().double()
    rows, columns, singular = linear.norm(dim=2), linear.norm(dim=1), torch.linalg.svdvals(linear)
    fits = rows.clamp_min(1).prod(1) <= _ROUND * singular.clamp_min(1).prod(1)
    counts = (columns / singular[:, -1:].clamp_min(1) - 0.25).ceil().clamp_min(1)
    return [tuple(row) for row in torch.where(fits[:, None], 1.0, counts).int().tolist()]


def finer(shape: Sequence[int], counts: Sequence[int], like: Tensor) -> tuple[tuple[int, ...], Tensor]:
    """The grid of sub-points: its shape, and the map (D+1, D+1) of its indices to those of the grid it parts."""
    scale = torch.eye(len(counts) + 1, dtype=like.dtype, device=like.device)
    for axis, k in enumerate(counts):
        scale[axis, axis], scale[axis, -1] = 1 / k, -(k - 1) / (2 * k)
    return tuple(n * k for n, k in zip(shape, counts, strict=True)), scale


def reduce(values: Tensor, counts: Sequence[int]) -> Tensor:
    """Values (N, C, *finer) at sub-points → (N, C, *shape), smoothed for the grid they part."""
    return along(values, [sharp_one(n, float(k), k) if k > 1 else None for n, k in zip(values.shape[2:], counts, strict=True)])


def local_steps(to_source: Callable[[Tensor], Tensor], shape: Sequence[int], device: torch.device) -> Tensor:
    """(N, 1, *coarse) log2 of the longest way in source voxels that one step of the target makes, on a lattice of at most 9
    points an axis over the target: the largest singular value of the map's derivative.

    to_source: target index points (1, P, D) → source index points (N, P, D)."""
    d = len(shape)
    with torch.no_grad():
        coarse = [min(n, _LATTICE) for n in shape]
        ends = [torch.linspace(0, n - 1, m, dtype=torch.float64, device=device) for n, m in zip(shape, coarse, strict=True)]
        points = torch.stack(torch.meshgrid(*ends, indexing="ij"), -1).reshape(1, -1, d)
        half = 0.5 * torch.eye(d, dtype=torch.float64, device=device)
        around = to_source(torch.cat([points + s * h for h, s in itertools.product(half, (1, -1))], 1))
        around = around.reshape(around.shape[0], d, 2, -1, d)
        squared = torch.einsum("naPi,naPj->nPij", *[around[:, :, 0] - around[:, :, 1]] * 2)  # J Jᵀ
        vector = squared.gather(3, squared.diagonal(dim1=2, dim2=3).argmax(-1)[..., None, None].expand(-1, -1, d, 1))
        for _ in range(5):  # power iteration
            vector = squared @ (vector / vector.norm(dim=2, keepdim=True).clamp_min(1e-30))
        return 0.5 * vector.norm(dim=2).clamp_min(1e-12).log2().reshape(around.shape[0], 1, *coarse)


@dataclass(frozen=True, eq=False)
class Scales:
    """An image smoothed for steps of 2^(l/2) voxels, l = 0, 1 …, ready for a kernel: by level, with the blocks it is kept for.

    levels: those that are read. most: the last. steps, shape: see `local_steps`."""

    levels: dict[int, tuple[Tensor, tuple[int, ...]]]
    most: int
    steps: Tensor
    shape: tuple[int, ...]
    kernel: str

    @staticmethod
    def of(data: Tensor, steps: Tensor, shape: Sequence[int], kernel: str) -> Scales | None:
        """data: (N, C, *S). None if nothing is shrunk."""
        least, most = 0, _EXPORTED * _OCTAVE
        if not torch.compiler.is_compiling():
            shortest, longest = (_OCTAVE * float(steps.min()), _OCTAVE * float(steps.max()))
            if longest <= _OCTAVE * math.log2(SHARP):
                return None
            most = math.ceil(min(longest, _OCTAVE * _MOST) - 1e-3)
            least = min(max(0, math.floor(shortest + 1e-3)), most)
        levels = {}
        for level in range(least, most + 1):
            step = 2 ** (level / _OCTAVE)
            blocks = blocks_of([step + 1e-9] * len(shape), data.shape[2:])
            wide = torch.full((1, len(shape)), step, dtype=torch.float64, device=data.device)
            levels[level] = prepare(prefilter(data, wide, blocks) if level else data, kernel), blocks
        return Scales(levels, most, steps, tuple(shape), kernel)

    def read(self, where: Tensor, index: Tensor) -> Tensor:
        """Values (N, C, P) at source index points `where` (N, P, D), of the target's index points (1, P, D)."""
        with torch.no_grad():
            coarse = torch.tensor([(m - 1) / max(n - 1, 1) for n, m in zip(self.shape, self.steps.shape[2:], strict=True)],
                                  dtype=index.dtype, device=index.device)
            level = sample(self.steps.to(where.dtype), (index * coarse).to(where.dtype))  # (N, 1, P)
            level = level * _OCTAVE
            level = torch.where(level < 1, (level - _FIRST) / (1 - _FIRST), level).clamp(min(self.levels), self.most)
        values: Tensor | float = 0.0
        for number, (data, blocks) in self.levels.items():
            share = (1 - (level - number).abs()).clamp_min(0)
            if torch.compiler.is_compiling() or bool((share > 0).any()):
                values = values + sample(data, in_blocks(where, blocks), self.kernel) * share
        return values  # type: ignore[return-value]
