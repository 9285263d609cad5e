"""The least-squares equations: a similarity is one, however little both scans see."""

import pytest
import torch

from regkit import Grid
from regkit.registration.equations import equations, make_side, volume_of
from regkit.space import Frame


def _side(ndim, home, away, weight):
    grid = Grid(tuple(home.shape[2:]), torch.eye(ndim + 1, dtype=torch.float64)[None])
    frame = Frame.of(grid)
    chosen = torch.arange(home[0, 0].numel())
    to_index = grid.inverse[0] @ frame.inverse[0]
    return make_side(home, torch.ones_like(weight), grid, chosen, volume_of(away, weight, "correlation"), to_index, frame, True,
                     "correlation", True)


def _shifts(ndim, most, count):
    maps = torch.eye(ndim + 1, dtype=torch.float64).repeat(count, 1, 1)
    maps[:, 0, -1] = torch.linspace(0, most, count, dtype=torch.float64)
    return maps


@pytest.mark.parametrize("channels", [1, 4])
def test_a_correlation_is_one_however_little_is_seen(channels, ndim):
    """Of a single voxel, which interpolation gives any weight, rounding errors alone would make correlations of thousands."""
    draw = torch.Generator().manual_seed(0)
    shape = (12,) * ndim
    home, away = (torch.rand(1, channels, *shape, generator=draw) for _ in range(2))
    weight = torch.zeros(1, 1, *shape)
    weight[(0, 0, *[5] * ndim)] = 1
    found = equations(_side(ndim, home, away, weight), _shifts(ndim, 12, 1000), "correlation")
    assert float(found.similarity.abs().max()) <= 1
    assert bool(found.slope.isfinite().all()) and bool(found.normal.isfinite().all())
    nothing = found.share == 0
    assert 0 < int(nothing.sum()) < 1000 and float(found.similarity[nothing].abs().max()) == 0 == float(found.slope[nothing].abs().max())


def test_a_flat_patch_is_like_nothing(ndim):
    shape = (8,) * ndim
    home = torch.rand(1, 1, *shape, generator=torch.Generator().manual_seed(0))
    whole = torch.ones(1, 1, *shape)
    found = equations(_side(ndim, home, 1000.1 * whole, whole), _shifts(ndim, 0.3, 5), "correlation")
    assert float(found.similarity.abs().max()) == 0 == float(found.slope.abs().max())
    same = equations(_side(ndim, home, home, whole), _shifts(ndim, 0, 1), "correlation")
    assert float(same.similarity) == pytest.approx(1, abs=1e-5)
