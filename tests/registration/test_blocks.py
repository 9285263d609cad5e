"""Block matching: known shifts found below a voxel, wild matches left out, the refined map kept where little is known."""

import pytest
import torch

from regkit import Grid, Image, Matrix
from regkit.registration import blocks
from regkit.registration.blocks import Matches, agree, cut, fit, match, search
from regkit.registration.pair import make_pair
from regkit.registration.pyramid import build
from regkit.registration.steps import Scene
from regkit.sampling import warp
from regkit.space import MODELS, Frame

from .conftest import carried, known_map


def _scene(fixed: Image, moving: Image, mm: float, model: str = "affine") -> Scene:
    return Scene(build(make_pair(fixed, moving), (mm,)), Frame.of(fixed.grid), MODELS[model], 0)


def _shift(*mm: float) -> Matrix:
    matrix = torch.eye(len(mm) + 1, dtype=torch.float64)[None]
    matrix[0, :-1, -1] = torch.tensor(mm, dtype=torch.float64)
    return Matrix(matrix)


def _size(ndim: int) -> float:
    return {2: 2.0, 3: 4.0}[ndim]


def test_a_known_shift_is_found_below_a_voxel(heads, ndim):
    head, mm = heads[ndim], _size(ndim)
    truth = _shift(*[1.4 * mm, -0.7 * mm, 0.2 * mm][:ndim])
    scene = _scene(head, warp(head, truth.inverse(), head.grid, kernel="cubic", antialias="none"), mm)
    found = match(scene, 0, [cut(canvas, 0) for canvas in scene.canvases[0]], torch.eye(ndim + 1, dtype=torch.float64)[None])
    away = (truth(found.fixed[None])[0] - found.moving).norm(dim=1) / mm
    assert len(away) > 200
    assert float(away.median()) < 0.6  # a block on a straight edge may slide along it
    nothing = Matches(found.fixed[:0], found.moving[:0], found.alike[:0])
    assert torch.allclose(fit(found, nothing, MODELS["translation"])[0, :-1, -1] / mm, truth.matrix[0, :-1, -1] / mm, atol=0.12)


def test_correlation_is_that_of_brute_force(ndim):
    """Every place a block can go, by hand, where all of it was seen; noise, so that no two places are alike."""
    draw = torch.Generator().manual_seed(4)
    half, reach = blocks.BLOCK[ndim], blocks.REACH
    n = 2 * (half + reach) + 5
    grid = Grid((n,) * ndim, torch.eye(ndim + 1, dtype=torch.float64)[None])
    home, away = (Image(torch.rand(1, 1, *grid.shape, generator=draw), grid) for _ in range(2))
    scene = _scene(home, away, 1.0)
    one, other = scene.canvases[0]
    cuts = cut(one, 0)
    centre, there, alike = search(cuts, other, one.grid, torch.eye(ndim + 1, dtype=torch.float64)[None])
    assert len(centre) > 0
    read = other.source.read(one.grid, torch.eye(ndim + 1, dtype=torch.float64)[None])[0][0, 0]
    moves = torch.cartesian_prod(*[torch.arange(-reach, reach + 1)] * ndim).reshape(-1, ndim)
    for at, found, value in list(zip(centre.long().tolist(), there.tolist(), alike.tolist(), strict=True))[:5]:
        def part(volume, where):
            block = volume[tuple(slice(c - half, c + half + 1) for c in where)]
            return block - block.mean()

        mine = part(one.data[0, 0], at)
        others = [part(read, [c + s for c, s in zip(at, move, strict=True)]) for move in moves.tolist()]
        rhos = torch.stack([(mine * other).sum() / mine.norm() / other.norm() for other in others]).abs()
        assert value == pytest.approx(float(rhos.max()), abs=1e-4)
        best = moves[int(rhos.argmax())]
        assert max(abs(f - c - s) for f, c, s in zip(found, at, best.tolist(), strict=True)) <= 0.5 + 1e-9


def test_blocks_are_not_matched_where_nothing_was_seen(heads, ndim):
    """The other scan shows one half only: no match lies nearer its edge than half a block."""
    head, mm = heads[ndim], _size(ndim)
    n = head.grid.shape[0] // 2
    half = Image(head.data[:, :, :n].contiguous(), Grid((n, *head.grid.shape[1:]), head.grid.affine))
    scene = _scene(head, half, mm)
    one, other = scene.canvases[0]
    _, there, _ = search(cut(one, 0), other, one.grid, torch.eye(ndim + 1, dtype=torch.float64)[None])
    assert len(there) > 50
    index = half.grid.to_index(one.grid.to_world(there[None]))[0]
    assert float(index[:, 0].max()) <= n - 1 - blocks.BLOCK[ndim] + 1


@pytest.mark.parametrize("model", ["rigid", "affine"])
def test_wild_matches_are_left_out(model, ndim):
    draw = torch.Generator().manual_seed(2)
    truth = known_map(Grid((40,) * ndim, torch.eye(ndim + 1, dtype=torch.float64)[None]), model)
    p = torch.rand(400, ndim, generator=draw, dtype=torch.float64) * 40
    q = truth(p[None])[0] + 0.1 * torch.randn(400, ndim, generator=draw, dtype=torch.float64)
    q[:160] += 6 * torch.randn(160, ndim, generator=draw, dtype=torch.float64) + 3  # two in five are elsewhere, and to one side
    nothing = Matches(p[:0], q[:0], p.new_zeros(0))
    found = Matrix(fit(Matches(p, q, p.new_ones(400)), nothing, MODELS[model]))
    plain = Matrix(MODELS[model].fit(p[None], q[None]))
    off, before = (float((one(p[None]) - truth(p[None])).norm(dim=-1).mean()) for one in (found, plain))
    assert off < 0.12
    assert before > 0.8


def test_the_refined_map_has_its_say(ndim):
    """With few matches it holds, with many it yields."""
    draw = torch.Generator().manual_seed(5)
    p = torch.rand(2000, ndim, generator=draw, dtype=torch.float64) * 40
    held = Matches(p[:100], p[:100], p.new_full((100,), blocks.PRIOR / 100))
    moved = []
    for count in (2, 2000):
        found = Matrix(fit(Matches(p[:count], p[:count] + 1, p.new_ones(count)), held, MODELS["translation"]))
        moved.append(float((found(p[None]) - p[None]).mean()))
    assert moved[0] < 0.1 < 0.8 < moved[1]


@pytest.mark.parametrize("model", ["rigid", "affine"])
def test_agree_comes_nearer_and_stays_in_the_model(heads, ndim, tre, model):
    head, mm = heads[ndim], _size(ndim)
    truth = known_map(head.grid, model)
    scene = _scene(head, carried(head, truth), mm, model)
    frame = scene.frame
    shift = _shift(*[0.8 * mm] * ndim)
    begun = truth.matrix @ shift.matrix
    ended = agree(scene, 0, frame.matrix @ begun @ frame.inverse)
    world = Matrix(frame.world(ended))
    assert tre(head, world, truth) < 0.15 < 0.7 < tre(head, Matrix(begun), truth)
    if model == "rigid":
        linear = world.matrix[0, :ndim, :ndim]
        assert torch.allclose(linear @ linear.mT, torch.eye(ndim, dtype=torch.float64), atol=1e-6)


def test_both_ways_round(heads, ndim, tre):
    """Agreement from a to b is the inverse of that from b to a."""
    head, mm = heads[ndim], _size(ndim)
    truth = known_map(head.grid, "affine", degrees=5)
    other = carried(head, truth)
    begun = truth.matrix @ _shift(*[0.5 * mm] * ndim).matrix
    there, back = _scene(head, other, mm), _scene(other, head, mm)
    a = Matrix(there.frame.world(agree(there, 0, there.frame.matrix @ begun @ there.frame.inverse)))
    b = Matrix(back.frame.world(agree(back, 0, back.frame.matrix @ torch.linalg.inv(begun) @ back.frame.inverse)))
    assert tre(head, a, b.inverse()) < 0.1


def test_scans_too_small_for_blocks_keep_their_map(ndim):
    draw = torch.Generator().manual_seed(6)
    grid = Grid((9,) * ndim, torch.eye(ndim + 1, dtype=torch.float64)[None])
    scene = _scene(*(Image(torch.rand(1, 1, *grid.shape, generator=draw), grid) for _ in range(2)), 1.0)
    one = torch.eye(ndim + 1, dtype=torch.float64)[None]
    assert torch.equal(agree(scene, 0, one), one)
