"""All whole-voxel shifts of one canvas over another at once, by FFT: normalised correlation of what both see.

Partial fields of view share neither centre nor mass; where they overlap can only be looked for.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from regkit.registration.pyramid import Canvas, features_of
from regkit.similarity import SIMILARITIES
from regkit.space import Frame, Grid

# lengths that are fast to transform, few of them so that sizes recur
_FAST = (8, 12, 16, 20, 24, 27, 30, 36, 40, 45, 48, 54, 60, 64, 72, 80, 90, 100, 120, 128, 144, 160, 192, 240, 256, 320, 384, 480, 512,
         640, 768, 960, 1024)
_SWOLLEN = 24  # times the moving canvas' voxels: a pose that needs more has blown up the scan, and is none
_KEPT = 1 << 27  # bytes of transforms
_LEAST = 0.2  # share of the smaller scan's energy that must be seen together


def correlations(fixed: Tensor, fixed_weight: Tensor, moving: Tensor, moving_weight: Tensor,
                 known: dict[tuple[int, ...], Tensor] | None = None) -> Tensor:
    """Normalised correlation under both weights, times the root of the seen share, for every shift s: fixed (1, C, *S) at x
    against moving (N, C, *M) at x + s - (S - 1), in voxels; -1 where too little is seen. → (N, *(S + M - 1)). Padfield 2012.

    One channel loses its mean; the channels of a descriptor, which together have none at any voxel, are taken as they are.
    known: transforms of the fixed scan by size, kept here for the next call with the same one, as far as they take little memory."""
    d = fixed.ndim - 2
    axes = list(range(2, d + 2))
    sizes = [a + b - 1 for a, b in zip(fixed.shape[2:], moving.shape[2:], strict=True)]
    fast = tuple(next(n for n in _FAST if n >= size) if size <= _FAST[-1] else size for size in sizes)

    def forward(data: Tensor) -> Tensor:
        return torch.fft.rfftn(data, fast, axes)

    wf, wm = fixed_weight, moving_weight
    single = fixed.shape[1] == 1
    f, m = fixed, moving
    if single:
        f, m = f - (f * wf).sum() / wf.sum(), m - (m * wm).sum(axes, True) / wm.sum(axes, True).clamp_min(1e-6)
    square_f, square_m = (f * f).sum(1, keepdim=True), (m * m).sum(1, keepdim=True)
    first = None if known is None else known.get(fast)
    if first is None:  # correlation: the fixed scan runs backwards
        first = forward(torch.cat([wf, square_f * wf, f * wf], 1).flip(axes))
        if known is not None and sum(one.nbytes for one in list(known.values())) < _KEPT:
            known[fast] = first
    second = forward(torch.cat([wm, square_m * wm, m * wm], 1))
    product = [first[:, 1] * second[:, 0], first[:, 0] * second[:, 1], (first[:, 2:] * second[:, 2:]).sum(1)]
    if single:
        product += [first[:, 0] * second[:, 0], first[:, 2] * second[:, 0], first[:, 0] * second[:, 2]]
    window = (..., *[slice(0, n) for n in sizes])
    ff, mm, fm, *means = torch.fft.irfftn(torch.stack(product, 1), fast, axes)[window].unbind(1)
    shares = [(seen / (square * w).sum(list(range(1, d + 2)), True)[:, 0].clamp_min(1e-12)).clamp(0, 1)
              for seen, square, w in ((ff, square_f, wf), (mm, square_m, wm))]
    if single:
        n, sf, sm = means
        n = n.clamp_min(1e-3)
        ff, mm, fm = ff - sf * sf / n, mm - sm * sm / n, fm - sf * sm / n
    score = fm / (ff.clamp_min(0) * mm.clamp_min(0)).sqrt().clamp_min(1e-6 * float((square_f * wf).sum()))
    return torch.where(torch.maximum(*shares) > _LEAST, score * ((shares[0] + shares[1]) / 2).sqrt(), -1.0)


def shifts(fixed: Canvas, moving: Canvas, f: Tensor, m: Tensor, frame: Frame, count: int,
           known: dict[tuple[int, ...], Tensor] | None = None) -> list[tuple[Tensor, float]]:
    """The best `count` translations (D+1, D+1) in the frame by features of both scans (1, C, *S), at least a quarter of the
    scan apart, with their scores."""
    d = fixed.grid.ndim
    score, found = correlations(f, fixed.weight, m, moving.weight, known)[0], []
    first = fixed.grid.to_world(torch.zeros(1, 1, d, dtype=torch.float64))[0, 0]
    for k in range(count):
        flat, place = int(score.argmax()), []
        reached = float(score.flatten()[flat])
        for n in reversed(score.shape):
            flat, at = divmod(flat, n)
            place.insert(0, at)
        step = [p - (n - 1) for p, n in zip(place, f.shape[2:], strict=True)]  # moving index on which fixed index 0 lies
        one = torch.eye(d + 1, dtype=torch.float64, device=f.device)
        one[:d, d] = (moving.grid.to_world(torch.tensor([[step]], dtype=torch.float64))[0, 0] - first) / frame.scale
        found.append((one, reached))
        if k + 1 < count:
            around = [slice(max(0, p - n // 4), p + n // 4 + 1) for p, n in zip(place, f.shape[2:], strict=True)]
            score = score.clone()
            score[tuple(around)] = -1
    return found


def shifted(fixed: Canvas, moving: Canvas, f: Tensor, pose: Tensor, frame: Frame, count: int,
            known: dict[tuple[int, ...], Tensor] | None = None) -> list[tuple[Tensor, float]]:
    """The best `count` maps (D+1, D+1) in the frame that differ from `pose` (1, D+1, D+1) by a shift, with their scores, by
    MIND: structure finds its place where fields of view share a part only, and neither centres, masses nor outlines do.

    f: MIND of the fixed scan."""
    d = fixed.grid.ndim
    back = frame.world(torch.linalg.inv(pose))
    seen = moving.grid.to_world((moving.weight[0, 0] > 0.5).nonzero().double()[None])[0] @ back[0, :d, :d].mT + back[0, :d, d]
    if len(seen) == 0:
        return []
    low, size = seen.amin(0), seen.amax(0) - seen.amin(0)  # the moving scan's view, where the pose puts it
    affine = torch.diag(torch.full((d + 1,), fixed.mm, dtype=torch.float64, device=pose.device))
    affine[d, d] = 1
    affine[:d, d] = low
    shape = tuple(math.floor(n) + 1 for n in (size / fixed.mm).tolist())
    if math.prod(shape) > _SWOLLEN * moving.data.numel():
        return []
    grid = Grid(shape, affine)
    data, weight = moving.source.read(grid, frame.world(pose))
    laid = Canvas(data, weight, grid, moving.source)
    found = shifts(fixed, laid, f, features_of(laid, SIMILARITIES["mind"]), frame, count, known)
    return [(pose[0] @ shift, score) for shift, score in found]
