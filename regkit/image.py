"""An image: voxels and the grid they lie on."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from regkit.errors import GeometryError
from regkit.space import Grid

_LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601


@dataclass(frozen=True, eq=False)
class Image:
    """Voxels `data` (N, C, *S) in their own dtype, on `grid` (shape S, world RAS+ mm).

    slice_affine: (4, 4) float64 or None; where a 2D slice of a 3D world lies (index (i, j, 0, 1) → RAS mm); kept for writing.
    pixels: a 2D picture (PNG, JPEG, TIFF), whose landmarks are counted in pixels (column, row).
    source: the file it was read from, if any.

    Raises GeometryError if voxels and grid do not fit.
    """

    data: Tensor
    grid: Grid
    slice_affine: Tensor | None = None
    pixels: bool = False
    source: str | None = None

    def __post_init__(self) -> None:
        if self.data.ndim != self.grid.ndim + 2 or tuple(self.data.shape[2:]) != self.grid.shape:
            raise GeometryError(f"image: voxels {tuple(self.data.shape)} do not fit a grid of {self.grid.shape}; "
                                "expected (N, C, *grid.shape)")

    @property
    def ndim(self) -> int:
        return self.grid.ndim

    @property
    def channels(self) -> int:
        return self.data.shape[1]

    def with_data(self, data: Tensor) -> Image:
        return replace(self, data=data)

    def to(self, device: torch.device | str) -> Image:
        return replace(self, data=self.data.to(device), grid=self.grid.to(device))

    def luminance(self) -> Image:
        """One channel, float32: colour as ITU-R BT.601 luma, other multi-channel voxels as their mean."""
        if self.channels == 1:
            return replace(self, data=self.data.to(torch.float32))
        data = self.data.to(torch.float32)
        if self.channels in (3, 4):
            weight = torch.tensor(_LUMA, device=data.device).reshape(1, 3, *([1] * self.ndim))
            return replace(self, data=(data[:, :3] * weight).sum(1, keepdim=True))
        return replace(self, data=data.mean(1, keepdim=True))

    def __repr__(self) -> str:
        dtype = str(self.data.dtype).removeprefix("torch.")
        return f"Image({self.data.shape[0]}×{self.channels} {dtype} on {self.grid!r})"
