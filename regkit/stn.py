"""The spatial transformer (Jaderberg et al., NeurIPS 2015): localisation → grid generator → sampler, in 2D and 3D."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from regkit.errors import GeometryError, choose
from regkit.sampling import antialias, in_blocks, index_map, inside, items, prepare, sample, shrinkage
from regkit.space import MODELS, Frame, Grid, Matrix


def unit_grid(shape: Sequence[int], like: Grid | None = None) -> Grid:
    """A grid of `shape` voxels, 1 mm each; with `like`, one that covers the field of view of that grid."""
    d = len(shape)
    if like is None:
        return Grid(tuple(shape), torch.eye(d + 1, dtype=torch.float64))
    scale = torch.eye(d + 1, dtype=torch.float64, device=like.device)
    for axis, (n, m) in enumerate(zip(like.shape, shape, strict=True)):
        scale[axis, axis] = n / m
        scale[axis, -1] = (n / m - 1) / 2
    return Grid(tuple(shape), like.affine @ scale)


class SpatialTransformer(nn.Module):
    """Moves images, or feature maps, as a localisation says; differentiable in the image and in the localisation.

    localisation: any module that gives θ (N, P) from what `forward` is given: `localisation(moving, *others)`. P is
      `regkit.space.model(name).count(ndim)`: for affine 6 in 2D and 12 in 3D. θ = 0 is the identity, so a last layer of zero
      weights and bias starts there. It speaks in a centred, isotropically scaled frame: radians, logarithms of scale, shifts
      in half the longest edge.
    model: translation, rigid, similarity or affine.
    size: voxels of the output, (H, W) or (H, W, D); by default those of the moving image. A smaller output covers the
      same field of view and is anti-aliased.
    kernel: linear, nearest or cubic. padding: zeros or border, what lies outside the moving image.

    Source: M. Jaderberg, K. Simonyan, A. Zisserman, K. Kavukcuoglu, Spatial Transformer Networks, NeurIPS 2015.
    """

    def __init__(self, localisation: nn.Module, model: str = "affine", *, size: Sequence[int] | None = None,
                 kernel: str = "linear", padding: str = "zeros", smoothing: bool = True) -> None:
        super().__init__()
        self.localisation = localisation
        self.model = MODELS[choose("model", model, MODELS)]
        self.size = None if size is None else tuple(int(n) for n in size)
        self.kernel = choose("kernel", kernel, ("linear", "nearest", "cubic"))
        self.padding = choose("padding", padding, ("zeros", "border"))
        self.smoothing = smoothing

    def forward(self, moving: Tensor, *others: Tensor, moving_grid: Grid | None = None,
                fixed_grid: Grid | None = None) -> Tensor:
        """moving: (N, C, *S). others: whatever else the localisation looks at, for example the fixed image.

        moving_grid, fixed_grid: where they lie in the world (RAS+ mm); without them voxels are 1 mm and both share a centre.
        → moved (N, C, *size), on fixed_grid if given. Raises GeometryError if θ or a grid does not fit."""
        moving_grid = unit_grid(moving.shape[2:]) if moving_grid is None else moving_grid
        if tuple(moving.shape[2:]) != moving_grid.shape:
            raise GeometryError(f"moving: voxels {tuple(moving.shape)} do not fit moving_grid {moving_grid.shape}")
        if fixed_grid is None:
            if self.size is not None and len(self.size) != moving_grid.ndim:
                raise GeometryError(f"size: {self.size} has {len(self.size)} axes, moving has {moving_grid.ndim}; "
                                    "give one number an axis")
            fixed_grid = moving_grid if self.size is None else unit_grid(self.size, moving_grid)
        if fixed_grid.ndim != moving_grid.ndim:
            raise GeometryError(f"fixed_grid: is {fixed_grid.ndim}D, moving is {moving_grid.ndim}D; "
                                "give grids of one dimension")
        fixed_grid, moving_grid = fixed_grid.to(moving.device), moving_grid.to(moving.device)
        return self.resample(moving, self.transform(moving, *others, moving_grid=moving_grid, fixed_grid=fixed_grid),
                             moving_grid, fixed_grid)

    def transform(self, moving: Tensor, *others: Tensor, moving_grid: Grid, fixed_grid: Grid) -> Matrix:
        """The map of fixed-world to moving-world points (mm) the localisation says, (N, D+1, D+1).

        θ = 0 lays centre on centre."""
        theta = self.localisation(moving, *others)
        d = moving_grid.ndim
        count = self.model.count(d)
        if theta.ndim != 2 or theta.shape[1] != count:
            raise GeometryError(f"localisation: gave θ of shape {tuple(theta.shape)}; "
                                f"the {self.model.name} model in {d}D needs (N, {count})")
        if len(theta) != len(moving) and 1 not in (len(theta), len(moving)):
            raise GeometryError(f"localisation: gave {len(theta)} θ for {len(moving)} moving images; "
                                "give one each, or one for all")
        frame = Frame.of(fixed_grid)
        start = Matrix.shift(moving_grid.centre - fixed_grid.centre)
        # float64 from here to the index map: composed there, cast once
        return Matrix(start.matrix @ frame.world(self.model.exp(theta.double(), d)))

    def resample(self, moving: Tensor, transform: Matrix, moving_grid: Grid, fixed_grid: Grid) -> Tensor:
        """moving (N, C, *S) pulled through the transform onto fixed_grid → (N, C, *fixed_grid.shape)."""
        dtype = moving.dtype
        data = moving if dtype in (torch.float32, torch.float64) else moving.float()
        mapping, blocks, d = index_map(moving_grid, transform, fixed_grid), (1,) * moving_grid.ndim, moving_grid.ndim
        factors = shrinkage(mapping.detach())
        if self.smoothing and self.kernel != "nearest" and max(factors) > 1.01:
            each = items(moving, transform.matrix, moving_grid.affine, fixed_grid.affine)
            if len(each) > 1:  # one by one: how much an item is smoothed is no matter of the others
                return torch.cat([self.resample(one, Matrix(m), Grid(moving_grid.shape, a), Grid(fixed_grid.shape, b))
                                  for one, m, a, b in each])
            data, blocks = antialias(data, factors)
        index = fixed_grid.index_points(torch.float64)
        where = (index @ mapping[:, :d, :d].mT + mapping[:, None, :d, d]).to(data.dtype)
        values = sample(prepare(data, self.kernel), in_blocks(where, blocks), self.kernel)
        if self.padding == "zeros":
            values = values * inside(where.detach(), moving_grid.shape)[:, None]
        return values.reshape(values.shape[0], -1, *fixed_grid.shape).to(dtype)

