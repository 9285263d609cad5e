"""Textures, grids in any pose, and maps between them."""

from __future__ import annotations

import math

import pytest
import torch

from regkit.filters import smooth
from regkit.image import Image
from regkit.space import Grid, Matrix, model

both = pytest.mark.parametrize("ndim", [2, 3], ids=["2D", "3D"])
SHAPES = {2: (14, 23), 3: (14, 23, 9)}


def noise(shape, seed=0, n=1, c=1, dtype=torch.float64):
    return torch.randn(n, c, *shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def texture(shape, seed=0, n=1, c=1, dtype=torch.float32, sigma=1.5):
    data = smooth(noise(shape, seed, n, c, dtype), [sigma] * len(shape))
    return data / data.std()


def rotation(ndim, angles):
    m = model("rigid")
    theta = torch.zeros(1, m.count(ndim), dtype=torch.float64)
    theta[0, ndim:] = torch.tensor(angles[: m.count(ndim) - ndim])
    return m.exp(theta, ndim)[0, :ndim, :ndim]


def grid(shape, spacing=(1.0, 1.0, 1.0), angles=(0.0, 0.0, 0.0), flips=(1, 1, 1), centre=(0.0, 0.0, 0.0)):
    d = len(shape)
    a = torch.eye(d + 1, dtype=torch.float64)
    a[:d, :d] = rotation(d, angles) * torch.tensor([s * f for s, f in zip(spacing, flips, strict=True)][:d])
    middle = torch.tensor([(n - 1) / 2 for n in shape], dtype=torch.float64)
    a[:d, d] = torch.tensor(centre[:d], dtype=torch.float64) - a[:d, :d] @ middle
    return Grid(shape, a)


def profile(values, axis, shape):
    """(1, 1, *shape): values along one axis, constant along the others."""
    return values.reshape([-1 if a == axis else 1 for a in range(len(shape))]).expand(shape)[None, None].contiguous()


def points_in(shape, count, seed=1, n=1, reach=-0.5):
    """Random index points within `reach` voxels beyond the outer centres."""
    draw = torch.rand(n, count, len(shape), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    size = torch.tensor(shape, dtype=torch.float64)
    return draw * (size - 1 + 2 * reach) - reach


def between(source, target, steps, angles=(0.0, 0.0, 0.0), shift=0.0):
    """(1, D+1, D+1): the index map that lays a target of `steps` source voxels a voxel, turned, on the middle of the source."""
    d = len(source)
    m = torch.eye(d + 1, dtype=torch.float64)
    m[:d, :d] = rotation(d, angles) * torch.tensor(steps[:d], dtype=torch.float64)
    home, goal = (torch.tensor([(n - 1) / 2 for n in shape], dtype=torch.float64) for shape in (source, target))
    m[:d, d] = home + shift - m[:d, :d] @ goal
    return m[None]


def scans(ndim, dtype=torch.float32):
    """A texture on an oblique, anisotropic, mirrored grid; another such grid; an affine map between their worlds."""
    moving = grid((15, 24, 11)[:ndim], (1.5, 0.8, 2.4), (0.3, -0.2, 0.1), (1, -1, 1), (12.0, -7.0, 3.0))
    fixed = grid((21, 12, 14)[:ndim], (0.9, 1.7, 1.2), (-0.2, 0.5, 0.3), (-1, 1, 1), (-4.0, 9.0, 1.0))
    image = Image((100 * smooth(noise(moving.shape, seed=4), [0.7] * ndim)).to(dtype), moving)
    m = torch.eye(ndim + 1, dtype=torch.float64)
    m[:ndim, :ndim] = rotation(ndim, (0.4, -0.3, 0.2)) * torch.tensor([1.1, 0.9, 1.05])[:ndim]
    m[:ndim, ndim] = moving.centre[0] - m[:ndim, :ndim] @ fixed.centre[0] + torch.tensor([1.3, -0.6, 0.4])[:ndim]
    return image, Matrix(m), fixed


def wave(shape, axis, period):
    x = torch.arange(shape[axis], dtype=torch.float32) + 0.5
    return profile(torch.cos(2 * math.pi * x / period), axis, shape)


def correlation(a, b):
    a, b = a.double().flatten() - a.double().mean(), b.double().flatten() - b.double().mean()
    return float(a @ b / (a.norm() * b.norm()))
