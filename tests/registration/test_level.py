"""One level: features are computed only where both scans lie, and are the same there."""

import pytest
import torch

from regkit import Grid
from regkit.registration.level import MARGIN, _seen, _within
from regkit.registration.pyramid import Smoothed, made_of
from regkit.similarity import SIMILARITIES
from regkit.space import MODELS


@pytest.mark.parametrize("name", ["lncc", "ngf", "mind"])
def test_features_of_what_is_seen_are_those_of_the_whole(name, ndim):
    draw = torch.Generator().manual_seed(0)
    shape = (50, 44, 40)[:ndim]
    affine = torch.eye(ndim + 1, dtype=torch.float64)[None] * 2
    affine[:, -1, -1] = 1
    data, weight = torch.rand(1, 1, *shape, generator=draw), torch.zeros(1, 1, *shape)
    weight[(..., *[slice(15, 27)] * ndim)] = 1
    weight[(..., *[slice(18, 20)] * ndim)] = 0  # and a hole
    some, counts, grid = _seen(data, weight, Grid(shape, affine))
    assert grid.shape == (12 + 2 * MARGIN,) * ndim
    corner = torch.full((1, 1, ndim), 15.0 - MARGIN, dtype=torch.float64)
    assert torch.allclose(grid.to_world(torch.zeros_like(corner)), Grid(shape, affine).to_world(corner))
    box = (..., *[slice(15 - MARGIN, 27 + MARGIN)] * ndim)
    whole, part = made_of(data, weight, SIMILARITIES[name])[box], made_of(some, counts, SIMILARITIES[name])
    assert float(whole.abs().max()) > 0.1
    assert torch.allclose((whole * counts), (part * counts), atol=1e-5)


def test_where_nothing_is_seen_all_is_kept(ndim):
    grid = Grid((6,) * ndim, torch.eye(ndim + 1, dtype=torch.float64)[None])
    data = torch.rand(1, 1, *grid.shape)
    assert _seen(data, torch.zeros_like(data), grid)[0] is data


def test_what_is_read_of_the_other_scan_is_what_lies_there(ndim):
    """A small scan in a large grid: only its box is read, and nothing of it is lost."""
    draw = torch.Generator().manual_seed(1)
    eye = torch.eye(ndim + 1, dtype=torch.float64)[None]
    home = Grid((60,) * ndim, eye * torch.tensor([2.0] * ndim + [1]).double())
    affine = eye.clone()
    affine[0, :ndim, ndim] = 50.3
    away = Grid((21, 18, 16)[:ndim], affine)
    source = Smoothed.of(torch.rand(1, 1, *away.shape, generator=draw), None, away, [1.0] * ndim)
    turn = MODELS["rigid"].exp(0.3 * torch.randn(1, MODELS["rigid"].count(ndim), generator=draw, dtype=torch.float64), ndim)
    world = affine @ turn @ torch.linalg.inv(affine)
    box = _within(home, away, world)
    assert max(box.shape) < 40
    whole, part = _seen(*source.read(home, world), home), _seen(*source.read(box, world), box)
    assert float(part[1].sum()) > 100 * 2**(ndim - 3)
    assert part[2].shape == whole[2].shape and torch.allclose(part[2].affine, whole[2].affine)
    assert torch.allclose(part[0], whole[0], atol=1e-4) and torch.equal(part[1], whole[1])
    apart = world.clone()
    apart[0, 0, -1] += 1000
    assert _within(home, away, apart) is home
