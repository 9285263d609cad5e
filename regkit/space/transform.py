"""Transforms: callables that map fixed-world points to moving-world points."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from regkit.errors import GeometryError
from regkit.space.grid import apply_matrix, invert, is_affine


@runtime_checkable
class Transform(Protocol):
    """`T(x_fixed) = x_moving`, RAS+ mm; `moved = moving ∘ T`; `(a @ b)(x) = a(b(x))`.

    `__call__` is the raw map of points (N|1, P, D). Whatever *applies* a result carries from moving to fixed: images
    are pulled through T, points go through `T.inverse()`.
    """

    @property
    def ndim(self) -> int: ...

    def __call__(self, points: Tensor) -> Tensor: ...

    def inverse(self) -> Transform: ...

    def to(self, device: torch.device | str) -> Transform: ...


@dataclass(frozen=True, eq=False)
class Matrix:
    """A linear transform: homogeneous matrices (N|1, D+1, D+1) float64, fixed world → moving world, RAS+ mm.

    Raises GeometryError if a matrix is singular or not finite.
    """

    matrix: Tensor

    def __post_init__(self) -> None:
        m = torch.as_tensor(self.matrix, dtype=torch.float64)
        m = m[None] if m.ndim == 2 else m
        if m.ndim != 3 or m.shape[1] != m.shape[2] or m.shape[1] not in (3, 4):
            raise GeometryError(f"matrix: shape {tuple(m.shape)}; expected (3, 3), (4, 4) or a batch of them")
        if not bool(torch.isfinite(m).all()) or not bool((torch.linalg.det(m.detach()).abs() > 1e-12).all()):
            raise GeometryError(f"matrix: singular or not finite {m.tolist()}; a transform must be invertible")
        object.__setattr__(self, "matrix", m)

    @staticmethod
    def identity(ndim: int) -> Matrix:
        return Matrix(torch.eye(ndim + 1, dtype=torch.float64))

    @staticmethod
    def shift(offset: Tensor) -> Matrix:
        """Translation by (N, D) mm."""
        n, d = offset.shape
        m = torch.eye(d + 1, dtype=torch.float64, device=offset.device).repeat(n, 1, 1)
        m[:, :d, d] = offset
        return Matrix(m)

    @property
    def ndim(self) -> int:
        return self.matrix.shape[-1] - 1

    @property
    def affine(self) -> bool:
        """Whether lines stay parallel, as under all but projective matrices."""
        return is_affine(self.matrix)

    def __call__(self, points: Tensor) -> Tensor:
        if not isinstance(points, Tensor) or points.ndim != 3 or points.shape[-1] != self.ndim:
            what = f"shape {tuple(points.shape)}" if hasattr(points, "shape") else f"a {type(points).__name__}"
            raise GeometryError(f"points: {what}; expected a tensor (N, P, {self.ndim}); regkit.apply takes arrays (P, {self.ndim})")
        return apply_matrix(self.matrix, points)

    def __matmul__(self, other: Matrix) -> Matrix:
        if other.ndim != self.ndim:
            raise GeometryError(f"transforms: of dimensions {self.ndim} and {other.ndim}; they must agree to be composed")
        return Matrix(self.matrix @ other.matrix)

    def inverse(self) -> Matrix:
        return Matrix(invert(self.matrix))

    def to(self, device: torch.device | str) -> Matrix:
        return Matrix(self.matrix.to(device))

    def __repr__(self) -> str:
        rows = "; ".join(" ".join(f"{v:.4f}" for v in row) for row in self.matrix[0, : self.ndim].tolist())
        batch = f", batch {len(self.matrix)}" if len(self.matrix) > 1 else ""
        return f"Matrix({self.ndim}D, [{rows}] RAS mm, fixed → moving{batch})"


@dataclass(frozen=True, eq=False)
class Composite:
    """Transforms in sequence: the last part acts on the point first, `parts = (a, b)` is `a(b(x))`."""

    parts: tuple[Transform, ...]

    @property
    def ndim(self) -> int:
        return self.parts[0].ndim

    def __call__(self, points: Tensor) -> Tensor:
        for part in reversed(self.parts):
            points = part(points)
        return points

    def inverse(self) -> Composite:
        return Composite(tuple(part.inverse() for part in reversed(self.parts)))

    def to(self, device: torch.device | str) -> Composite:
        return Composite(tuple(part.to(device) for part in self.parts))

    def __repr__(self) -> str:
        return " ∘ ".join(map(repr, self.parts))


def compose(*parts: Transform) -> Transform:
    """`compose(a, b)(x) = a(b(x))`; matrices are multiplied, other kinds kept in sequence."""
    merged: list[Transform] = []
    for part in [one for given in parts for one in (given.parts if isinstance(given, Composite) else (given,))]:
        if merged and isinstance(part, Matrix) and isinstance(merged[-1], Matrix):
            merged[-1] = merged[-1] @ part
        else:
            merged.append(part)
    return merged[0] if len(merged) == 1 else Composite(tuple(merged))


def linearised(transform: Transform, points: Tensor, step: float) -> Tensor:
    """The derivative (P, D, D) of a map of mm by mm at points (P, D), by central differences over `step` mm."""
    d = points.shape[-1]
    half = step / 2 * torch.eye(d, dtype=points.dtype, device=points.device)
    ends = transform(torch.cat([points + h for h in half] + [points - h for h in half])[None])[0].reshape(2, d, -1, d)
    return ((ends[0] - ends[1]) / step).permute(1, 2, 0)


def curved(transform: Transform) -> bool:
    """Whether a transform bends lines or spaces points on them unevenly, as all but affine matrices do."""
    return not (isinstance(transform, Matrix) and transform.affine)
