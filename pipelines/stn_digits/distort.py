"""Distorted digits as in Jaderberg et al. 2015, section 4.1 and appendix A.4, made on the fly by regkit's sampler.

A distortion is a map from the points of the image shown to those of the 28×28 digit, drawn anew each time. The batch of a step
is a function of (seed, distortion, step) alone, so that a run that was broken off goes on as if it had not been.

Where the paper leaves a choice: R, P and E are shown in 28×28 (it names a larger image for RTS alone); "each corner" is a corner
of the scaled 28×28 frame, and a frame that is no longer convex is drawn again (it would fold the digit over itself); the 16
control points lie on the image's edge and between, 4×4. Its clutter is six 6×6 patches on a digit that is only shifted; here
the digit is that of RTS among six to eight patches of 8×8, the size of Mnih et al. 2014.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from regkit.sampling import inside, sample
from regkit.space import model

DIGIT = 28
SIDES = {"R": 28, "RTS": 42, "P": 28, "E": 28, "clutter": 60}
PATCH, PATCHES = 8, (6, 8)
CONTROL = 4  # control points an axis, for E
_MIDDLE = (DIGIT - 1) / 2
_CHUNK = 1000
_TRIES = 8  # draws among which a convex frame is looked for


def generator(*key: int) -> torch.Generator:
    """A generator that depends on all numbers of its key, and on nothing else."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1))


def points(side: int) -> Tensor:
    """Centres of the pixels of a side×side image relative to its centre, (side², 2), in array order."""
    x = torch.arange(side, dtype=torch.float32) - (side - 1) / 2
    return torch.cartesian_prod(x, x)


def _uniform(draw: torch.Generator, low: float, high: float, *shape: int) -> Tensor:
    return low + (high - low) * torch.rand(*shape, generator=draw)


def similar(at: Tensor, angle: Tensor, scale: Tensor, place: Tensor) -> Tensor:
    """Where points (P, 2) of the image show the digit's centred points (N, P, 2), the digit turned by `angle` (N,) radians, enlarged by
    `scale` (N,) and carried to `place` (N, 2)."""
    theta = torch.stack([torch.zeros_like(angle), torch.zeros_like(angle), -angle, -scale.log()], -1)
    return (at - place[:, None]) @ model("similarity").exp(theta, 2)[:, :2, :2].mT


def _rotated(draw: torch.Generator, n: int, at: Tensor) -> Tensor:
    return similar(at, torch.deg2rad(_uniform(draw, -90, 90, n)), torch.ones(n), torch.zeros(n, 2))


def _placed(draw: torch.Generator, n: int, at: Tensor) -> Tensor:
    """RTS: the scaled frame lies anywhere in the image, but wholly in it (before it is turned)."""
    angle, scale = torch.deg2rad(_uniform(draw, -45, 45, n)), _uniform(draw, 0.7, 1.2, n)
    room = (len(at) ** 0.5 - DIGIT * scale) / 2
    return similar(at, angle, scale, room[:, None] * _uniform(draw, -1, 1, n, 2))


def homography(source: Tensor, target: Tensor) -> Tensor:
    """The projective maps (N, 3, 3) that carry four points (N, 4, 2) each onto four others."""
    n = len(source)
    x = torch.cat([source, torch.ones(n, 4, 1)], -1)
    zero = torch.zeros_like(x)
    left = torch.cat([torch.cat([x, zero], -1), torch.cat([zero, x], -1)], 1)
    right = torch.cat([target[..., 0], target[..., 1]], 1)
    rest = -right[..., None] * source.repeat(1, 2, 1)
    entries = torch.linalg.solve(torch.cat([left, rest], -1).double(), right.double())
    return torch.cat([entries, torch.ones(n, 1, dtype=torch.float64)], 1).reshape(n, 3, 3).float()


def convex(corners: Tensor) -> Tensor:
    """Whether quadrilaterals (..., 4, 2) are convex and go round as they did: every corner turns the same way."""
    edge = corners.roll(-1, -2) - corners
    after = edge.roll(-1, -2)
    return (edge[..., 0] * after[..., 1] - edge[..., 1] * after[..., 0] > 0).all(-1)


def _projected(draw: torch.Generator, n: int, at: Tensor) -> Tensor:
    frame = DIGIT / 2 * torch.tensor([[-1.0, -1.0], [1.0, -1.0], [1.0, 1.0], [-1.0, 1.0]])
    scaled = _uniform(draw, 0.75, 1.0, n)[:, None, None] * frame
    tried = scaled + 5 * torch.randn(_TRIES, n, 4, 2, generator=draw)
    first = convex(tried).float().argmax(0)  # the first convex one; one frame in 10⁸ has none and stays folded
    moved = tried[first, torch.arange(n)]
    matrix = homography(moved, frame.expand(n, -1, -1))
    found = at @ matrix[:, :2, :2].mT + matrix[:, None, :2, 2]
    depth = at @ matrix[:, 2, :2, None] + matrix[:, 2, 2, None, None]
    # points at and beyond the horizon lie outside the frame in any case
    return found / torch.where(depth.abs() < 1e-6, torch.full_like(depth, 1e-6), depth)


def spline_basis(at: Tensor, control: Tensor) -> Tensor:
    """Displacements of control points (K, 2) → those of points (P, 2), by a thin-plate spline through them: a matrix (P, K).

    Source: F. L. Bookstein, Principal Warps, PAMI 1989."""
    def bend(a: Tensor, b: Tensor) -> Tensor:
        r2 = (a[:, None] - b).square().sum(-1)
        return r2 * r2.clamp_min(1e-30).log()

    at, control = at.double(), control.double()
    k = len(control)
    plane = torch.cat([torch.ones(k, 1, dtype=torch.float64), control], 1)
    system = torch.cat([torch.cat([bend(control, control), plane], 1), torch.cat([plane.mT, torch.zeros(3, 3, dtype=torch.float64)], 1)])
    weights = torch.linalg.solve(system, torch.eye(k + 3, k, dtype=torch.float64))
    return (torch.cat([bend(at, control), torch.ones(len(at), 1, dtype=torch.float64), at], 1) @ weights).float()


def _elastic(draw: torch.Generator, n: int, at: Tensor) -> Tensor:
    line = torch.linspace(-1, 1, CONTROL) * at.max()
    basis = spline_basis(at, torch.cartesian_prod(line, line))
    scale = _uniform(draw, 0.75, 1.0, n)
    return (at + basis @ (1.5 * torch.randn(n, CONTROL**2, 2, generator=draw))) / scale[:, None, None]


MAPS: dict[str, Callable[[torch.Generator, int, Tensor], Tensor]] = {
    "R": _rotated, "RTS": _placed, "P": _projected, "E": _elastic, "clutter": _placed,
}


def shown(digits: Tensor, where: Tensor) -> Tensor:
    """Digits (N, 28, 28) uint8 at their centred points (N, P, 2) → images (N, 1, √P, √P) in 0 … 1; 0 beyond the digit's frame."""
    index = where + _MIDDLE
    values = sample(digits[:, None].float() / 255, index) * inside(index, (DIGIT, DIGIT))[:, None]
    side = round(where.shape[1] ** 0.5)
    return values.reshape(-1, 1, side, side)


def _scatter_patches(draw: torch.Generator, images: Tensor, others: Tensor) -> Tensor:
    """Pieces of other digits (M, 28, 28), cut from where their ink is, laid over images (N, 1, S, S) wherever they are lighter."""
    n, side, most = len(images), images.shape[-1], PATCHES[1]

    def starts(low: int, high: int) -> Tensor:  # corners of patches as rows and columns of their pixels, (N, most, PATCH, 1 and PATCH)
        return torch.randint(low, high + 1, (n, most, 2, 1), generator=draw) + torch.arange(PATCH)

    chosen = torch.randint(len(others), (n, most), generator=draw)
    cut, put = starts(4, DIGIT - 4 - PATCH), starts(0, side - PATCH)
    values = others[chosen[..., None, None], cut[:, :, 0, :, None], cut[:, :, 1, None, :]].float() / 255
    count = torch.randint(PATCHES[0], PATCHES[1] + 1, (n, 1), generator=draw)
    values = values * (torch.arange(most) < count)[..., None, None]
    place = put[:, :, 0, :, None] * side + put[:, :, 1, None, :]
    return images.flatten(1).scatter_reduce(1, place.flatten(1), values.flatten(1), "amax").reshape(images.shape)


def distorted(name: str, digits: Tensor, others: Tensor, draw: torch.Generator) -> Tensor:
    """Digits (N, 28, 28) uint8, each distorted anew → (N, 1, S, S) in 0 … 1. others: the digits clutter is cut from."""
    images = shown(digits, MAPS[name](draw, len(digits), points(SIDES[name])))
    return _scatter_patches(draw, images, others) if name == "clutter" else images


def batch(name: str, images: Tensor, labels: Tensor, seed: int, step: int, size: int) -> tuple[Tensor, Tensor]:
    """The batch of a step of training: `size` digits drawn from images (N, 28, 28), distorted, with their labels."""
    draw = generator(1, list(SIDES).index(name), seed, step)
    chosen = torch.randint(len(images), (size,), generator=draw)
    return distorted(name, images[chosen], images, draw), labels[chosen]


def fixed(name: str, images: Tensor) -> Tensor:
    """Every image distorted once, always alike: the test set, the same for all nets and seeds. → (N, 1, S, S)"""
    return torch.cat([distorted(name, part, images, generator(0, list(SIDES).index(name), number))
                      for number, part in enumerate(images.split(_CHUNK))])
