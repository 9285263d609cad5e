"""Random poses and random differences of shape, drawn from a generator: the same numbers give the same poses."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from regkit.filters import smooth
from regkit.sampling import sample
from regkit.space import MODELS

_REACH = 1.5  # half edges of the frame that a bend's lattice covers
_FINE = 4  # points of the lattice that is read for one of those that are drawn


@dataclass(frozen=True)
class Poses:
    """How far a pose may be drawn from the identity.

    turn: radians, π for any rotation. shift: standard deviation in half edges of the frame, cut off at three. scale, stretch:
    standard deviations of logarithms, of the size and of the stretches along and between the axes."""

    turn: float = math.pi
    shift: float = 0.15
    scale: float = 0.1
    stretch: float = 0.03

    def draw(self, count: int, ndim: int, generator: torch.Generator) -> Tensor:
        """→ (count, D+1, D+1) float64 maps in the frame: stretched and scaled, then turned, then shifted."""
        def normal(*shape: int) -> Tensor:
            return torch.randn(count, *shape, generator=generator, dtype=torch.float64).clamp(-3, 3)

        affine, turns, d = MODELS["affine"], ndim * (ndim - 1) // 2, ndim
        theta = torch.zeros(count, affine.count(d), dtype=torch.float64)
        theta[:, d + turns] = self.scale * normal()
        theta[:, d + turns + 1:] = self.stretch * normal(affine.count(d) - d - turns - 1)
        maps = affine.exp(theta, d)
        maps = torch.cat([turned(count, d, self.turn, generator) @ maps[:, :d], maps[:, d:]], 1)
        maps[:, :d, d] = self.shift * normal(d)
        return maps


def turned(count: int, ndim: int, turn: float, generator: torch.Generator) -> Tensor:
    """Rotations (count, D, D) by at most `turn` radians: spread evenly where that is π, by even angles about any axis where less."""
    def uniform(*shape: int) -> Tensor:
        return torch.rand(count, *shape, generator=generator, dtype=torch.float64)

    rigid = MODELS["rigid"]
    theta = torch.zeros(count, rigid.count(ndim), dtype=torch.float64)
    if ndim == 2:
        theta[:, 2] = (2 * uniform() - 1) * turn
    elif turn >= math.pi:
        q = F.normalize(torch.randn(count, 4, generator=generator, dtype=torch.float64), dim=1)
        half = q[:, 0].abs().clamp(max=1).acos()
        axis = F.normalize(q[:, 1:] * q[:, :1].sign(), dim=1)
        theta[:, 3:] = 2 * half[:, None] * axis
    else:
        axis = F.normalize(torch.randn(count, 3, generator=generator, dtype=torch.float64), dim=1)
        theta[:, 3:] = turn * uniform(1) * axis
    return rigid.exp(theta, ndim)[:, :ndim, :ndim]


@dataclass(frozen=True, eq=False)
class Bends:
    """Smooth random displacements of the frame: how one person's anatomy differs from another's. field: (N, D, *L)."""

    field: Tensor

    @staticmethod
    def draw(count: int, ndim: int, size: float, cells: int, generator: torch.Generator) -> Bends:
        """size: standard deviation in half edges. cells: independent numbers across the frame."""
        n = max(2, round(cells * _REACH))
        drawn = size * torch.randn(count, ndim, *[n] * ndim, generator=generator)
        linear = F.interpolate(drawn, scale_factor=_FINE, mode=("bilinear", "trilinear")[ndim - 2], align_corners=False)
        return Bends(smooth(linear, [_FINE / 3] * ndim))  # takes the corners off

    def __add__(self, other: Bends) -> Bends:
        size, mode = self.field.shape[2:], ("bilinear", "trilinear")[self.field.shape[1] - 2]
        return Bends(self.field + F.interpolate(other.field, size=size, mode=mode, align_corners=False))

    def __call__(self, points: Tensor) -> Tensor:
        """Where points (N, P, D) of the frame come to lie."""
        size = self.field.shape[-1]
        return points + sample(self.field, ((points / _REACH + 1) * (size / 2) - 0.5).to(self.field)).mT.to(points)

    def back(self, points: Tensor, rounds: int = 12) -> Tensor:
        """The points (N, P, D) that come to lie at these, by fixed-point iteration: exact where the displacement's slope stays below 1."""
        found = points
        for _ in range(rounds):
            found = found + points - self(found)
        return found
