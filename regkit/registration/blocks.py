"""Block matching: where small blocks of one scan fit the other best, and the map on which most of them agree.

Scans of different people agree in part only. Refinement weighs what does not agree by how much it looks alike; a search of
blocks sees how far off it lies, and a robust fit leaves it out. Block matching with a robust fit for registration: Ourselin
et al. 2001, "Reconstructing a 3D structure from serial histological sections", Image and Vision Computing 19. The fit:
iteratively reweighted least squares with the weights of Geman & McClure 1985.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from regkit.filters import along, smooth
from regkit.registration.level import choose_points
from regkit.registration.pyramid import Canvas
from regkit.registration.steps import Scene
from regkit.space import Grid, Matrix, Model

BLOCK, REACH = {2: 4, 3: 2}, 3  # voxels to either side: of a block, and of the search
COUNT = 2_500  # blocks of each scan
TEXTURED = 0.5  # share of the blocks, the flattest, left out
ALIKE = 0.2  # least correlation of a match, of either sign
FEWEST = 20  # blocks, and matches
ROUNDS, FITS = 2, 12  # searches, and reweightings after each
SCALE = 0.35  # of the median distance: from there on a match loses its say
PRIOR, HELD = 4.5, 500  # the say of the map that was refined, in full matches, and at how many points it is held


@dataclass(frozen=True, eq=False)
class Blocks:
    """Blocks of one scan: centres (N, D) in voxels, values less their mean (*[B] * D, N), their energy (N,)."""

    centre: Tensor
    values: Tensor
    energy: Tensor


@dataclass(frozen=True, eq=False)
class Matches:
    """Points that fit: of the fixed and of the moving scan (N, D) in mm, and how well (N,), at most 1."""

    fixed: Tensor
    moving: Tensor
    alike: Tensor

    def __add__(self, other: Matches) -> Matches:
        return Matches(*(torch.cat(both) for both in zip(vars(self).values(), vars(other).values(), strict=True)))


def agree(scene: Scene, level: int, one: Tensor) -> Tensor:
    """A refined map (1, D+1, D+1) in the frame moved to where most blocks of both scans agree; as it is where too few match."""
    pair, frame = scene.canvases[level], scene.frame
    blocks = list(scene.run(lambda canvas: cut(canvas, scene.seed), pair))
    if min(len(cuts.centre) for cuts in blocks) < FEWEST:
        return one
    held = _held(pair[0], frame.world(one), scene.seed)
    for _ in range(ROUNDS):
        found = match(scene, level, blocks, one)
        if len(found.alike) < FEWEST:
            break
        one = frame.matrix @ fit(found, held, scene.model) @ frame.inverse
    return one


def cut(canvas: Canvas, seed: int) -> Blocks:
    """Blocks of a scan that are not among its flattest, and lie inside it as far as the search reaches."""
    d, shape, half = canvas.grid.ndim, canvas.grid.shape, BLOCK[canvas.grid.ndim]
    sigma, edge = [0.6 * half] * d, half + REACH
    variance = smooth(canvas.data.square(), sigma) - smooth(canvas.data, sigma).square()
    some = variance[canvas.weight > 0.5]
    least = some[:: max(1, len(some) // 100_000)].quantile(TEXTURED) if len(some) else variance.new_zeros(())
    chosen = choose_points(canvas.weight * (variance >= least), COUNT, seed)
    centre = _places(chosen, shape)
    centre = centre[((centre >= edge) & (centre < torch.tensor(shape, device=centre.device) - edge)).all(1)]
    centre = centre[_windows(canvas.weight, centre, half).flatten(0, -2).amin(0) > 0.5]
    values = _windows(canvas.data, centre, half)
    values = values - values.flatten(0, -2).mean(0)
    return Blocks(centre, values, values.square().flatten(0, -2).sum(0))


def match(scene: Scene, level: int, blocks: list[Blocks], one: Tensor) -> Matches:
    """The blocks of each scan found in the other, carried there by a map (1, D+1, D+1) in the frame."""
    def side(forward: bool) -> Matches:
        home, away = scene.canvases[level] if forward else scene.canvases[level][::-1]
        way = scene.frame.world(one if forward else torch.linalg.inv(one))
        here, there, alike = search(blocks[not forward], away, home.grid, way)
        start, end = home.grid.to_world(here[None])[0], Matrix(way)(home.grid.to_world(there[None]))[0]
        return Matches(start, end, alike) if forward else Matches(end, start, alike)

    forward, back = scene.run(side, (True, False))
    return forward + back


def search(blocks: Blocks, away: Canvas, grid: Grid, way: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The blocks cut on `grid` in a scan read there through `way` (1, D+1, D+1) in mm: centres (N, D), where they fit best by
    correlation of either sign (N, D), both in voxels, and its size (N,), of those that fit somewhere within reach."""
    d, half, centre, across = grid.ndim, BLOCK[grid.ndim], blocks.centre, 2 * REACH + 1
    data, weight = away.source.read(grid, way)
    field = _windows(torch.where(weight > 0.5, data, torch.nan), centre, half + REACH)
    product = field.new_zeros(*[across] * d, len(centre))
    for offset in itertools.product(range(2 * half + 1), repeat=d):  # a convolution of as many groups would take long to set up
        product.addcmul_(field[tuple(slice(o, o + across) for o in offset)], blocks.values[offset])
    product = product.flatten(0, -2).mT
    sums = torch.ones(across, across + 2 * half, device=data.device).tril(2 * half).triu()  # of every run as long as a block
    total, squares = (along(values[None, None], [*[sums] * d, None])[0, 0].flatten(0, -2).mT for values in (field, field.square()))
    energy = (squares - total.square() / (2 * half + 1) ** d).clamp_min(1e-6)
    alike = product * (energy * blocks.energy[:, None].clamp_min(1e-6)).rsqrt()
    alike = alike.abs().nan_to_num(-1.0)  # contrast may be reversed; NaN: not all of it was seen
    best, place = alike.max(1)
    at = _places(place, (across,) * d)
    good = ((at > 0) & (at < 2 * REACH)).all(1) & (best > ALIKE)
    centre, at, best, alike, place = centre[good].double(), at[good], best[good], alike[good], place[good]
    shift = (at - REACH).double()
    for axis in range(d):  # a parabola through the best and its neighbours along each axis
        step = across ** (d - 1 - axis)
        before, after = (alike.gather(1, (place + s)[:, None])[:, 0] for s in (-step, step))
        bend = 2 * best - before - after
        fine = torch.where((bend > 1e-6) & (before > -1) & (after > -1), (after - before) / (2 * bend.clamp_min(1e-6)), 0.0)
        shift[:, axis] += fine.clamp(-0.5, 0.5)
    return centre, centre + shift, best.double()


def fit(found: Matches, held: Matches, model: Model) -> Tensor:
    """The map (1, D+1, D+1) in mm of the model on which the matches agree, and of which `held` has its say in full."""
    weight, one = found.alike, held.alike.new_zeros(0)
    everything = found + held
    for _ in range(FITS):
        one = model.fit(everything.fixed[None], everything.moving[None], torch.cat([weight, held.alike])[None])
        away = (Matrix(one)(found.fixed[None])[0] - found.moving).norm(dim=1)
        weight = found.alike / (1 + (away / (SCALE * away.median()).clamp_min(1e-9)).square()).square()
    return one


def _held(canvas: Canvas, world: Tensor, seed: int) -> Matches:
    """Points all over the fixed scan where a map (1, D+1, D+1) in mm has them, which together weigh `PRIOR`."""
    place = choose_points(canvas.weight, HELD, seed)
    points = canvas.grid.to_world(_places(place, canvas.grid.shape).double()[None])
    return Matches(points[0], Matrix(world)(points)[0], points.new_full((len(place),), PRIOR / len(place)))


def _places(flat: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Flat positions (N,) in an array as index points (N, D). (`torch.unravel_index` imports sympy, which takes 0.3 s.)"""
    return torch.stack([flat // math.prod(shape[axis + 1:]) % n for axis, n in enumerate(shape)], 1)


def _windows(volume: Tensor, centre: Tensor, half: int) -> Tensor:
    """Windows (*[2 half + 1] * D, N) of a volume (1, 1, *S) about voxels (N, D) that lie as far inside."""
    (n, d), shape, across = centre.shape, volume.shape[2:], 2 * half + 1
    place = centre.new_zeros(())
    for axis in range(d):
        index = centre[:, axis] + torch.arange(-half, half + 1, device=centre.device)[:, None]
        place = place * shape[axis] + index.reshape(*[across if a == axis else 1 for a in range(d)], n)
    return volume.flatten()[place]
