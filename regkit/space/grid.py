"""Grids (where voxels lie in the world) and frames (the scaled world in which parameters live)."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from regkit.errors import GeometryError

_AXES = (("L", "R"), ("P", "A"), ("I", "S"))


def apply_matrix(matrix: Tensor, points: Tensor) -> Tensor:
    """Map points (N|1, P, D) by homogeneous matrices (N|1, D+1, D+1); result in the dtype of `points`.

    The matrix may be projective (last row not 0…0 1)."""
    ndim = points.shape[-1]
    m = matrix.to(points)
    with torch.autocast(points.device.type, enabled=False):  # points keep their precision
        mapped = torch.baddbmm(m[:, None, :ndim, ndim], points, m[:, :ndim, :ndim].mT) if len(m) == len(points) \
            else points @ m[:, :ndim, :ndim].mT + m[:, None, :ndim, ndim]
        if not is_affine(matrix):
            mapped = mapped / (points @ m[:, ndim, :ndim, None] + m[:, ndim, ndim, None, None])
    return mapped


def is_affine(matrix: Tensor) -> bool:
    """Whether the last row of every matrix (N, D+1, D+1) is 0 … 0 1: not projective."""
    row = matrix.detach()[:, -1]
    return bool((row[:, :-1] == 0).all() and (row[:, -1] == 1).all())


def invert(matrix: Tensor) -> Tensor:
    """Inverse of matrices (N, D+1, D+1); that of affine ones is affine to the last bit."""
    back = torch.linalg.inv(matrix)
    return torch.cat([back[:, :-1], matrix[:, -1:]], 1) if is_affine(matrix) else back


@dataclass(frozen=True, eq=False)
class Grid:
    """A lattice of voxels in the world: voxel centres at integer indices.

    shape: voxels along each axis, `(i, j)` or `(i, j, k)`, in nibabel's order.
    affine: (N|1, D+1, D+1) float64, index → world, RAS+ mm. Sheared and mirrored axes are allowed.

    Raises GeometryError if the affine is singular, not finite or of another dimension.
    """

    shape: tuple[int, ...]
    affine: Tensor

    def __post_init__(self) -> None:
        shape = tuple(int(n) for n in self.shape)
        affine = torch.as_tensor(self.affine, dtype=torch.float64)
        affine = affine[None] if affine.ndim == 2 else affine
        d = len(shape)
        if d not in (2, 3):
            raise GeometryError(f"grid: {d} axes {shape}; a scan has 2 or 3 spatial axes")
        if affine.ndim != 3 or affine.shape[1:] != (d + 1, d + 1):
            raise GeometryError(f"affine: shape {tuple(affine.shape)}; a {d}D grid needs ({d + 1}, {d + 1})")
        if min(shape) < 1:
            raise GeometryError(f"grid: shape {shape} has an empty axis")
        if not bool(torch.isfinite(affine).all()):
            raise GeometryError("affine: holds NaN or infinity; repair the header of this file, see regkit doctor")
        spacing = affine[:, :d, :d].norm(dim=1)
        volume = torch.linalg.det(affine[:, :d, :d]).abs()
        if not bool(((volume > 1e-6 * spacing.prod(-1)) & (volume > 0)).all()):
            raise GeometryError(f"affine: singular, two voxel axes coincide or one has no length {affine[0].tolist()}; "
                                "repair the header of this file, see regkit doctor")
        object.__setattr__(self, "shape", shape)
        object.__setattr__(self, "affine", affine)

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def device(self) -> torch.device:
        return self.affine.device

    @cached_property
    def spacing(self) -> Tensor:
        """(N|1, D) mm: length of one voxel step along each axis."""
        return self.affine[:, : self.ndim, : self.ndim].norm(dim=1)

    @cached_property
    def inverse(self) -> Tensor:
        """(N|1, D+1, D+1) world → index."""
        with torch.inference_mode(False):  # kept, and may be needed with gradients later
            return invert(self.affine)

    @cached_property
    def centre(self) -> Tensor:
        """(N|1, D) world point in the middle of the grid."""
        middle = torch.tensor([(n - 1) / 2 for n in self.shape], dtype=torch.float64, device=self.device)
        return self.to_world(middle[None, None])[:, 0]

    @property
    def orientation(self) -> str:
        """The nearest world direction of each axis of the first item, such as `RAS` or `LP`."""
        return orientation(self.affine[0])

    def to(self, device: torch.device | str) -> Grid:
        return Grid(self.shape, self.affine.to(device))

    def to_world(self, index: Tensor) -> Tensor:
        """Index points (N|1, P, D) → world points in mm."""
        return apply_matrix(self.affine, index)

    def to_index(self, world: Tensor) -> Tensor:
        """World points (N|1, P, D) in mm → index points."""
        return apply_matrix(self.inverse, world)

    def index_points(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """(1, P, D) indices of all voxels, last axis fastest."""
        axes = [torch.arange(n, dtype=dtype, device=self.device) for n in self.shape]
        return torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).reshape(1, -1, self.ndim)

    def points(self) -> Tensor:
        """(N|1, P, D) float64 world points of all voxel centres, last axis fastest."""
        return self.to_world(self.index_points(torch.float64))

    def corners(self) -> Tensor:
        """(N|1, 2^D, D) world points of the outer corners (half a voxel beyond the outer centres)."""
        ends = itertools.product(*[(-0.5, n - 0.5) for n in self.shape])
        return self.to_world(torch.tensor(list(ends), dtype=torch.float64, device=self.device)[None])

    def shrink(self, factors: tuple[int, ...]) -> Grid:
        """Grid of blocks of `factors` voxels. The field of view's lower outer edges stay; upper voxels that do not fill
        a block fall away. An axis shorter than its factor becomes one block."""
        factors = tuple(min(k, n) for k, n in zip(factors, self.shape, strict=True))
        scale = torch.eye(self.ndim + 1, dtype=torch.float64, device=self.device)
        for axis, k in enumerate(factors):
            scale[axis, axis] = k
            scale[axis, -1] = (k - 1) / 2
        return Grid(tuple(n // k for n, k in zip(self.shape, factors, strict=True)), self.affine @ scale)

    def canonical(self, mm: float) -> Grid:
        """The axis-aligned isotropic RAS canvas of `mm` voxels that covers this grid's outer edges, centred on it.

        Differently stored copies of one scan (LAS, permuted, oblique) get the same canvas, up to its margin."""
        corners = self.corners()
        low, high = corners.amin(1), corners.amax(1)
        shape = tuple(max(1, math.ceil(e / mm - 1e-3)) for e in (high - low).amax(0).tolist())
        affine = torch.eye(self.ndim + 1, dtype=torch.float64, device=self.device).repeat(len(low), 1, 1)
        affine[:, : self.ndim, : self.ndim] *= mm
        half = torch.tensor([(n - 1) / 2 * mm for n in shape], dtype=torch.float64, device=self.device)
        affine[:, : self.ndim, self.ndim] = (low + high) / 2 - half
        return Grid(shape, affine)

    def same_as(self, other: Grid, tolerance: float = 1e-3) -> bool:
        """Whether both grids have their voxels at the same places, within `tolerance` voxels."""
        if self.shape != other.shape or self.device != other.device:
            return False
        return bool(((self.corners() - other.corners()).norm(dim=-1) <= tolerance * self.spacing.amin()).all())

    def __repr__(self) -> str:
        spacing = "×".join(f"{s:.4g}" for s in self.spacing[0].tolist())
        batch = f", batch {len(self.affine)}" if len(self.affine) > 1 else ""
        return f"Grid({'×'.join(map(str, self.shape))}, {spacing} mm, {self.orientation}{batch}, {self.device})"


def orientation(affine: Tensor) -> str:
    """Nearest distinct world direction of each column of a (D+1, D+1) affine."""
    ndim = len(affine) - 1
    directions = affine[:ndim, :ndim] / affine[:ndim, :ndim].norm(dim=0)
    best = max(itertools.permutations(range(ndim)), key=lambda p: sum(abs(float(directions[p[a], a])) for a in range(ndim)))
    return "".join(_AXES[best[a]][int(directions[best[a], a] > 0)] for a in range(ndim))


@dataclass(frozen=True, eq=False)
class Frame:
    """The centred, isotropically scaled world in which parameters live: `F(x) = (x - centre) / scale`.

    Isotropic, so that rigid stays rigid in mm; scaled by half the longest edge, so that rotations (radians) and shifts
    are of like size and nothing depends on the working resolution.

    centre: (N|1, D) mm; scale: mm. edges: by axis, the half edge of what the frame surrounds, as shares of the scale; () is
    all 1.
    """

    centre: Tensor
    scale: float
    edges: tuple[float, ...] = ()

    @staticmethod
    def of(grid: Grid) -> Frame:
        """Centre of the grid and half its longest edge."""
        corners = grid.corners()
        low, high = corners.amin(1), corners.amax(1)
        edges = (high - low).amax(0).tolist()
        return Frame((low + high) / 2, max(edges) / 2, tuple(e / max(edges) for e in edges))

    @property
    def half(self) -> tuple[float, ...]:
        """The half edge along each axis, in the frame: 1 for the longest."""
        return self.edges or (1.0,) * self.centre.shape[-1]

    def to(self, device: torch.device | str) -> Frame:
        return Frame(self.centre.to(device), self.scale, self.edges)

    @cached_property
    def matrix(self) -> Tensor:
        """(N|1, D+1, D+1) world → frame."""
        n, d = self.centre.shape
        m = torch.eye(d + 1, dtype=torch.float64, device=self.centre.device).repeat(n, 1, 1)
        m[:, :d, :d] /= self.scale
        m[:, :d, d] = -self.centre / self.scale
        return m

    @cached_property
    def inverse(self) -> Tensor:
        """(N|1, D+1, D+1) frame → world."""
        return invert(self.matrix)

    def world(self, matrix: Tensor) -> Tensor:
        """A map given in the frame, (N, D+1, D+1), as a map of world points: `F⁻¹ M F`."""
        return self.inverse.to(matrix) @ matrix @ self.matrix.to(matrix)
