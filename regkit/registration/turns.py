"""Rotations spread evenly, for searches."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def rotations(ndim: int, count: int = 1500) -> Tensor:
    """(R, D, D) rotations spread evenly over SO(2) (72) or SO(3) (`count`; super-Fibonacci spirals, Alexa 2022)."""
    if ndim == 2:
        angle = torch.arange(72, dtype=torch.float64) * (2 * math.pi / 72)
        c, s = angle.cos(), angle.sin()
        return torch.stack([torch.stack([c, -s], -1), torch.stack([s, c], -1)], 1)
    n, phi, psi = count, math.sqrt(2.0), 1.533751168755204288118041
    s = torch.arange(n, dtype=torch.float64) + 0.5
    t, d = s / n, 2 * math.pi * s
    r, q = t.sqrt(), (1 - t).sqrt()
    a, b = d / phi, d / psi
    return _quaternions(torch.stack([r * a.sin(), r * a.cos(), q * b.sin(), q * b.cos()], -1))


def _quaternions(q: Tensor) -> Tensor:
    x, y, z, w = q.unbind(-1)
    return torch.stack([
        torch.stack([1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)], -1),
        torch.stack([2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)], -1),
        torch.stack([2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)], -1)], 1)
