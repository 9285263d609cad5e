"""Where in the fixed scan a map is probably off, and by how many mm."""

from __future__ import annotations

import torch

from regkit.image import Image
from regkit.registration.blocks import Matches, cut, match
from regkit.registration.pair import Pair, make_pair
from regkit.registration.pyramid import build, choose_levels
from regkit.registration.steps import Scene
from regkit.sampling import warp
from regkit.space import MODELS, Frame, Grid, Matrix, Transform
from regkit.space.transform import Composite

ACROSS = 24  # voxels of the map along the fixed scan's longest edge: there is no more to know
BLOCKS = 1_500  # that are looked at
WIDTH = 0.12  # of that edge: as far apart, blocks have a say on each other (sigma)
PRIOR = 1.0  # blocks' worth of the mean error, where few blocks tell


def expected_error(fixed: Image, moving: Image, transform: Transform, mean: float | None) -> Image:
    """The expected error in mm at each voxel of the fixed scan, float32 on its grid; NaN where the moving scan was not seen, and
    everywhere if no mean error is known.

    Small blocks of both scans are looked for in the other, at the finest level; how far beside the map they lie is averaged by a Gaussian
    around each place, and scaled so that its mean over the blocks is `mean`. Of a curved map blocks are looked for along its affine part.
    """
    if mean is None:
        return fixed.with_data(torch.full((1, 1, *fixed.grid.shape), torch.nan))
    pair = make_pair(fixed, moving)
    grid = _coarse(fixed.grid)
    points = grid.points()[0]
    with torch.no_grad():
        found = _matches(pair, transform)
    few = slice(None, None, max(1, len(found.alike) // BLOCKS))
    found = Matches(found.fixed[few], found.moving[few], found.alike[few])
    off = (transform(found.fixed[None])[0] - found.moving).norm(dim=1).float()
    if len(off):
        wide = WIDTH * ACROSS * float(grid.spacing[0, 0])
        say = torch.exp(-(torch.cdist(points.float(), found.fixed.float()) / wide).square() / 2) * found.alike.float()
        usual = (off @ found.alike.float()) / found.alike.float().sum()
        values = mean * ((say @ off + PRIOR * usual) / (say.sum(1) + PRIOR) / usual.clamp_min(1e-9))
    else:
        values = torch.full((len(points),), mean)
    coarse = Image(values.float().reshape(1, 1, *grid.shape), grid)
    data = warp(coarse, Matrix.identity(fixed.ndim), fixed.grid, antialias="none").data
    seen = warp(Image(torch.ones(1, 1, *moving.grid.shape), moving.grid), transform, fixed.grid, fill=0.0, antialias="none").data > 0.5
    return fixed.with_data(torch.where(seen, data, torch.nan))


def _matches(pair: Pair, transform: Transform) -> Matches:
    frame, levels = Frame.of(pair.fixed.grid), choose_levels(pair)
    affine = transform.parts[0] if isinstance(transform, Composite) else transform
    assert isinstance(affine, Matrix)
    scene = Scene(build(pair, levels[-1:]), frame, MODELS["affine"], 0)
    blocks = [cut(canvas, scene.seed) for canvas in scene.canvases[0]]
    if min(len(one.centre) for one in blocks) == 0:
        none = torch.zeros(0, pair.ndim, dtype=torch.float64)
        return Matches(none, none, none[:, 0])
    return match(scene, 0, blocks, frame.matrix @ affine.matrix @ frame.inverse)


def _coarse(grid: Grid) -> Grid:
    """The canvas on which errors are told apart; it reaches as far as the scan."""
    corners = grid.corners()[0]
    return grid.canonical(float((corners.amax(0) - corners.amin(0)).max()) / ACROSS)
