"""A dense displacement field as a transform: what other tools' deformable results are scored and applied by."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from regkit.errors import GeometryError
from regkit.image import Image
from regkit.sampling import inside, sample

_ROUNDS, _ENOUGH = 50, 1e-3  # fixed-point steps of the inverse, and mm at which it has settled


@dataclass(frozen=True, eq=False)
class Displacement:
    """`T(x) = x + u(x)`, with u given at the voxels of a grid and read linearly between them; outside the grid u is 0, as in ITK.

    field: Image (1, D, *S), u in RAS mm. Raises GeometryError if it has not as many channels as dimensions.
    """

    field: Image

    def __post_init__(self) -> None:
        if self.field.channels != self.field.ndim or len(self.field.data) != 1:
            raise GeometryError(f"displacement: {tuple(self.field.data.shape)}; expected one field of {self.field.ndim} channels (mm)")

    @property
    def ndim(self) -> int:
        return self.field.ndim

    def _u(self, points: Tensor) -> Tensor:
        index = self.field.grid.to_index(points.double())
        values = sample(self.field.data.float(), index.float()).transpose(1, 2).to(points.dtype)
        return torch.where(inside(index, self.field.grid.shape)[..., None], values, 0.0)

    def __call__(self, points: Tensor) -> Tensor:
        if points.ndim != 3 or points.shape[-1] != self.ndim:
            raise GeometryError(f"points: shape {tuple(points.shape)}; expected (N, P, {self.ndim})")
        return points + self._u(points)

    def inverse(self) -> InverseDisplacement:
        return InverseDisplacement(self)

    def to(self, device: torch.device | str) -> Displacement:
        return Displacement(self.field.to(device))

    def __repr__(self) -> str:
        return f"Displacement({self.ndim}D, on {self.field.grid!r}, fixed → moving)"


@dataclass(frozen=True, eq=False)
class InverseDisplacement:
    """The inverse of a field by fixed-point steps x ← y - u(x) (Chen 2008), which settle where it stretches by less than two."""

    forward: Displacement

    @property
    def ndim(self) -> int:
        return self.forward.ndim

    def __call__(self, points: Tensor) -> Tensor:
        x = points
        for _ in range(_ROUNDS):
            new = points - self.forward._u(x)
            settled = points.numel() == 0 or float((new - x).abs().max()) < _ENOUGH
            x = new
            if settled:
                break
        return x

    def inverse(self) -> Displacement:
        return self.forward

    def to(self, device: torch.device | str) -> InverseDisplacement:
        return InverseDisplacement(self.forward.to(device))
