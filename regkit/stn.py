"""The spatial transformer (Jaderberg et al., NeurIPS 2015): localisation → grid generator → sampler, in 2D and 3D."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from regkit.errors import GeometryError, OptionError, choose
from regkit.sampling import ANTIALIAS, PADDINGS, How, IndexMap, resample
from regkit.space import Frame, Grid, Matrix, Model, SplineModel, Transform, model
from regkit.space.transform import compose

KERNELS = ("linear", "nearest", "integer", "cubic")  # integer: the paper's word for nearest

_KEPT, _LARGE = 4, 1 << 26  # splines' bases that are kept, and numbers beyond which one is not
_MOST = 1e12  # of a map's numbers, in voxels


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

    localisation: any module that gives θ (N, P) from what `forward` is given: `localisation(moving, *others)`;
      `regkit.localisation.localiser` builds one that fits. P is `model(name).count(ndim)` of
      `regkit.space`: for affine 6 in 2D and 12 in 3D. θ = 0 is the identity, so a last layer of zero weights and bias starts
      there. It speaks in a centred, isotropically scaled frame: radians, logarithms of scale, shifts in half the longest edge.
    model: translation, attention (shift and one scale), rigid, similarity, affine, projective or tps (thin-plate spline); or a
      model, such as `regkit.space.model("tps", control=5, stiffness=0.01)`.
    size: voxels of the output, (H, W) or (H, W, D); by default those of the moving image. It covers the same field of view.
    kernel: linear, cubic (B-spline), or nearest, which is the paper's integer kernel and answers to that name too.
    padding: what lies outside the moving image: zeros, border (the outermost voxels go on) or reflection.
    antialias: auto smooths as much as the map shrinks, where it does; none reads the nearest voxels whatever the step. How much is
      smoothed counts as constant in the gradient of θ; with none the gradient is exact.
    gradient_scale: what the gradient into the localisation is multiplied by; the paper's networks for house numbers took 0.1.
      It means something to plain gradient descent; optimisers that divide by the gradient's size (Adam) undo it: give the
      localisation a learning rate of its own there.

    Under `torch.use_deterministic_algorithms(True)` forward and backward have a fixed order of additions. Under
    `torch.compile` and `torch.export` nothing can be looked at first: long oblique footprints are then smoothed along the
    image's axes instead of by sub-points, and maps that are not affine read a scale-space of 3 octaves always.

    Source: M. Jaderberg, K. Simonyan, A. Zisserman, K. Kavukcuoglu, Spatial Transformer Networks, NeurIPS 2015.
    Raises OptionError for a word it does not know.
    """

    def __init__(self, localisation: nn.Module, model: str | Model | SplineModel = "affine", *, size: Sequence[int] | None = None,
                 kernel: str = "linear", padding: str = "zeros", antialias: str = "auto", gradient_scale: float = 1.0) -> None:
        super().__init__()
        if not isinstance(localisation, nn.Module):
            raise OptionError(f"localisation: a {type(localisation).__name__}; expected a torch module that gives θ (N, P)")
        self.localisation = localisation
        self.model = _model(model)
        self.size = None if size is None else _whole(size)
        kernel = choose("kernel", kernel, KERNELS)
        self.how = How("nearest" if kernel == "integer" else kernel, choose("padding", padding, PADDINGS),
                       choose("antialias", antialias, ANTIALIAS) == "auto")
        if not isinstance(gradient_scale, (int, float)) or not 0 <= gradient_scale < math.inf:
            raise OptionError(f"gradient_scale: {gradient_scale}; expected a number from 0 on")
        self.gradient_scale = float(gradient_scale)
        self._kept: dict[object, Tensor] = {}  # the spline's basis on the points it was last asked for

    def __getstate__(self) -> dict[str, object]:
        return {**super().__getstate__(), "_kept": {}}

    def forward(self, moving: Tensor, *others: Tensor, moving_grid: Grid | None = None,
                fixed_grid: Grid | None = None) -> Tensor:
        """moving: (N, C, *S). others: whatever else the localisation looks at, for example the fixed image.

        moving_grid, fixed_grid: where they lie in the world (RAS+ mm); without them voxels are 1 mm and both share a centre.
        → moved (N, C, *size), on fixed_grid if given. Raises GeometryError if θ or a grid does not fit."""
        shape = self._shape(moving, moving_grid, fixed_grid)
        theta = self._theta(moving, *others)
        if moving.shape[0] == 0:
            return moving.new_zeros(0, moving.shape[1], *shape)
        if moving_grid is None and fixed_grid is None:
            half, inward, outward = _unit_frames(moving.shape[2:], shape, moving.device)
            frame = Frame(torch.zeros(1, len(shape), dtype=torch.float64, device=moving.device), 1.0, half)
        else:
            home, goal = self._grids(moving, moving_grid, fixed_grid)
            frame = Frame.of(goal)
            inward = frame.matrix @ goal.affine
            outward = home.inverse @ Matrix.shift(home.centre - goal.centre).matrix @ frame.inverse
        if isinstance(self.model, Model):
            # float64 until the index map: composed there, cast once
            way = IndexMap(_bounded(outward @ self.model.exp(theta.double(), len(shape)) @ inward), affine=self.model.affine)
        else:
            way = IndexMap(bend=_Bend(self, _bounded(theta), frame, inward, outward))
        return resample(moving, way, shape, self.how)

    def transform(self, moving: Tensor, *others: Tensor, moving_grid: Grid | None = None, fixed_grid: Grid | None = None) -> Transform:
        """The map of fixed-world to moving-world points (mm) the localisation says, for N images.

        θ = 0 lays centre on centre."""
        self._shape(moving, moving_grid, fixed_grid)
        home, goal = self._grids(moving, moving_grid, fixed_grid)
        frame, theta = Frame.of(goal), self._theta(moving, *others)
        start = Matrix.shift(home.centre - goal.centre)
        if isinstance(self.model, Model):
            return Matrix(start.matrix @ frame.world(self.model.exp(theta.double(), goal.ndim)))
        return compose(start, self.model.transform(theta.double(), frame))

    def resample(self, moving: Tensor, transform: Transform, moving_grid: Grid | None = None, fixed_grid: Grid | None = None) -> Tensor:
        """moving (N, C, *S) pulled through a transform onto fixed_grid → (N, C, *fixed_grid.shape). With `transform.inverse()` and the
        grids exchanged it carries back what a network made of the output."""
        home, goal = self._grids(moving, moving_grid, fixed_grid)
        if isinstance(transform, Matrix):
            way = IndexMap(home.inverse @ transform.matrix.to(moving.device) @ goal.affine, affine=transform.affine)
        else:
            way = IndexMap(bend=lambda index: home.to_index(transform(goal.to_world(index))))
        return resample(moving, way, goal.shape, self.how)

    def carry_back(self, values: Tensor, transform: Transform, images: Tensor) -> Tensor:
        """What a network found in the output, values (N, C, *size), carried back onto the images (N, ·, *S) that were given, by the
        inverse of the map `transform` said for them. Outside of what the output saw it is what `padding` has. → (N, C, *S)"""
        home = unit_grid(images.shape[2:])
        goal = home if self.size is None else unit_grid(self.size, home)
        return self.resample(values, transform.inverse(), goal, home)

    def _theta(self, *images: Tensor) -> Tensor:
        """What the localisation says, (N, P), checked."""
        moving, theta = images[0], self.localisation(*images)
        d = moving.ndim - 2
        count = self.model.count(d)
        if not isinstance(theta, Tensor) or theta.ndim != 2 or theta.shape[1] != count:
            what = f"shape {tuple(theta.shape)}" if isinstance(theta, Tensor) else f"type {type(theta).__name__}"
            matrix = "; θ is no matrix, and 0 is the identity" if isinstance(theta, Tensor) and theta.ndim == 3 else ""
            raise GeometryError(f"localisation: gave θ of {what}; the {self.model.name} model in {d}D needs (N, {count}){matrix}")
        if torch.compiler.is_compiling():
            pass  # a batch of any size
        elif theta.shape[0] != moving.shape[0] and 1 not in (theta.shape[0], moving.shape[0]):
            raise GeometryError(f"localisation: gave {theta.shape[0]} θ for {moving.shape[0]} moving images; "
                                "give one each, or one for all")
        if not torch.compiler.is_compiling() and not bool(torch.isfinite(theta).all()):
            raise GeometryError("localisation: gave θ with NaN or infinity; lower the learning rate or clip the gradient")
        theta = theta if theta.dtype in (torch.float32, torch.float64) else theta.float()
        if self.gradient_scale != 1:
            theta = theta * self.gradient_scale + (theta * (1 - self.gradient_scale)).detach()
        return theta

    def _shape(self, moving: Tensor, moving_grid: Grid | None, fixed_grid: Grid | None) -> tuple[int, ...]:
        """The shape of the output; raises GeometryError where what was given does not go together."""
        if not isinstance(moving, Tensor) or moving.ndim not in (4, 5) or min(moving.shape[1:]) < 1 or moving.is_complex():
            what = f"shape {tuple(moving.shape)}, {moving.dtype}" if isinstance(moving, Tensor) else f"a {type(moving).__name__}"
            raise GeometryError(f"moving: {what}; expected a tensor (N, C, H, W) or (N, C, H, W, D) of real numbers")
        d = moving.ndim - 2
        if moving_grid is not None and tuple(moving.shape[2:]) != moving_grid.shape:
            raise GeometryError(f"moving: voxels {tuple(moving.shape)} do not fit moving_grid {moving_grid.shape}")
        if fixed_grid is not None:
            if fixed_grid.ndim != d:
                raise GeometryError(f"fixed_grid: is {fixed_grid.ndim}D, moving is {d}D; give grids of one dimension")
            return fixed_grid.shape
        if self.size is not None and len(self.size) != d:
            raise GeometryError(f"size: {self.size} has {len(self.size)} axes, moving has {d}; give one number an axis")
        return tuple(moving.shape[2:]) if self.size is None else self.size

    def _grids(self, moving: Tensor, moving_grid: Grid | None, fixed_grid: Grid | None) -> tuple[Grid, Grid]:
        home = unit_grid(moving.shape[2:]) if moving_grid is None else moving_grid
        goal = fixed_grid or (home if self.size is None else unit_grid(self.size, home))
        return home.to(moving.device), goal.to(moving.device)


def _bounded(numbers: Tensor) -> Tensor:
    """A map's numbers, refused where they are beyond all reason: images read at such places crash torch's sampler."""
    if not torch.compiler.is_compiling() and not bool((numbers.detach().abs() < _MOST).all()):
        raise GeometryError(f"localisation: gave θ that stands for a map by {float(numbers.detach().abs().max()):.3g} times; lower the "
                            "learning rate or clip the gradient")
    return numbers


class Parallel(nn.Module):
    """Several modules on the same input, their outputs side by side as channels: transformers that look at different parts."""

    def __init__(self, *modules: nn.Module) -> None:
        super().__init__()
        if not modules or not all(isinstance(module, nn.Module) for module in modules):
            raise OptionError("modules: expected one or more torch modules, as Parallel(a, b)")
        self.branches = nn.ModuleList(modules)

    def forward(self, *images: Tensor) -> Tensor:
        """images: what each module is given. → (N, C₁ + C₂ + …, *size)"""
        return torch.cat([branch(*images) for branch in self.branches], 1)


def _whole(size: Sequence[int]) -> tuple[int, ...]:
    try:
        found = tuple(operator.index(n) for n in size)
    except TypeError:
        found = ()
    if len(found) not in (2, 3) or min(found) < 1:
        raise OptionError(f"size: {size!r}; expected whole numbers from 1 on, (H, W) or (H, W, D)")
    return found


def _model(given: str | Model | SplineModel) -> Model | SplineModel:
    return given if isinstance(given, (Model, SplineModel)) else model(given)


def _unit_frames(moving: Sequence[int], fixed: Sequence[int], device: torch.device) -> tuple[tuple[float, ...], Tensor, Tensor]:
    """For images on grids of a common field of view, whose frame is centred and scaled by half the longest edge: the half edges, and
    the maps (1, D+1, D+1) of target index to frame and of frame to source index. From plain numbers, so that a graph can be traced."""
    d, longest = len(moving), max(moving)
    half = tuple(n / longest for n in moving)
    inward = [[(2 * h / m if i == j else 0.0) for j in range(d)] + [h / m - h] for i, (h, m) in enumerate(zip(half, fixed, strict=True))]
    outward = [[(longest / 2 if i == j else 0.0) for j in range(d)] + [(n - 1) / 2] for i, n in enumerate(moving)]
    both = torch.tensor([[[*m, [0.0] * d + [1.0]]] for m in (inward, outward)], dtype=torch.float64, device=device)
    return half, both[0], both[1]


class _Bend:
    """Target index → source index through a spline; its basis on the target's own points is kept from one call to the next."""

    def __init__(self, owner: SpatialTransformer, theta: Tensor, frame: Frame, inward: Tensor, outward: Tensor) -> None:
        self.owner, self.frame, self.inward, self.outward = owner, frame, IndexMap(inward), IndexMap(outward)
        self.moves = theta.reshape(theta.shape[0], -1, inward.shape[-1] - 1)

    def __call__(self, index: Tensor) -> Tensor:
        u, ends = self.inward(index), index[0, [0, -1]]
        if len(u) > 1:
            n = len(u)
            basis = torch.stack([self._basis(one, ends, i) for i, one in enumerate(u)])
            return self.outward(u + (basis @ self.moves.expand(n, -1, -1).to(basis)).to(u))
        basis = self._basis(u[0], ends, 0)
        return self.outward(u + (basis @ self.moves.to(basis)).to(u))

    def _basis(self, u: Tensor, ends: Tensor, item: int) -> Tensor:
        """(P, K) at points u (P, D) of the frame, which are those of the target's index from one end to the other."""
        spline = self.owner.model
        assert isinstance(spline, SplineModel)
        if torch.compiler.is_compiling():
            return spline.basis(u, self.frame).to(self.moves.dtype)
        assert self.inward.matrix is not None
        place = [*ends.flatten().tolist(), *self.inward.matrix[item].flatten().tolist()]
        key = (spline, len(u), self.frame.half, *place, u.device, self.moves.dtype)
        kept = self.owner._kept
        if key not in kept:
            while len(kept) >= _KEPT:
                kept.pop(next(iter(kept)))
            with torch.inference_mode(False), torch.no_grad():  # kept, and may be needed with gradients later
                basis = spline.basis(u.clone(), self.frame).to(self.moves.dtype)
            if basis.numel() > _LARGE:
                return basis
            kept[key] = basis
        return kept[key]
