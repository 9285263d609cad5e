"""One level: features are computed only where both scans lie, and are the same there."""

import pytest
import torch

from regkit import Grid
from regkit.registration.level import MARGIN, _seen
from regkit.registration.pyramid import made_of
from regkit.similarity import SIMILARITIES


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
