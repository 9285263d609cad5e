"""Changes of contrast: the same numbers give the same picture, of the same shape and range, and what was nothing mostly stays so."""

from __future__ import annotations

import pytest
import torch

from regkit.training.augment import augmented

both = pytest.mark.parametrize("ndim", [2, 3], ids=["2D", "3D"])


def ball(ndim, edge=16):
    """A canvas of a ball with a texture, 0 outside of it."""
    ramp = (torch.arange(edge) + 0.5) * 2 / edge - 1
    points = torch.stack(torch.meshgrid(*[ramp] * ndim, indexing="ij"), -1)
    texture = 0.6 + 0.4 * torch.sin(points.sum(-1) * 5)
    return (texture * (points.norm(dim=-1) < 0.7))[None, None]


def drawn(canvas, size, seeds):
    return torch.cat([augmented(canvas, size, torch.Generator().manual_seed(seed)) for seed in seeds])


@both
@pytest.mark.parametrize("size", [0, 0.0, -1.0])
def test_nothing_is_changed_where_nothing_is_asked_for(ndim, size):
    canvas, generator = ball(ndim), torch.Generator().manual_seed(0)
    before = generator.get_state()
    assert augmented(canvas, size, generator) is canvas and torch.equal(generator.get_state(), before)


@both
@pytest.mark.parametrize("size", [0.3, 1.0, 2.0, 5.0])
def test_shape_and_range_are_kept(ndim, size):
    """Also where more is asked for than chances and zooms can be."""
    found = drawn(ball(ndim), size, range(25))
    assert found.shape == (25, 1, *[16] * ndim) and found.dtype == torch.float32 and type(found) is torch.Tensor
    assert bool(found.isfinite().all()) and float(found.min()) >= 0
    torch.testing.assert_close(found.flatten(1).amax(1), torch.ones(25))


@both
def test_each_of_the_changes_is_made(ndim):
    """Curves, factors and MONAI's: of many pictures none is as it was, and no two are alike."""
    canvas = ball(ndim)
    found = drawn(canvas, 1.0, range(30))
    inside = canvas[0, 0] > 0
    apart = torch.cdist(found[:, 0, inside], torch.cat([found, canvas])[:, 0, inside]) + torch.eye(30, 31)
    assert float(apart.min()) > 0.01
    turned = [float(torch.corrcoef(torch.stack([one[0, inside], canvas[0, 0, inside]]))[0, 1]) for one in found]
    assert min(turned) < 0.2 < 0.8 < max(turned)  # dark may become bright
    noisy = [float(one[0].diff(dim=0)[1:-1].abs().mean()) for one in found]
    assert max(noisy) > 1.5 * min(noisy)


@both
def test_the_same_numbers_make_the_same_picture(ndim):
    """Whatever was drawn before, and MONAI's own random state is not touched by it."""
    canvas = ball(ndim)
    first = drawn(canvas, 1.0, range(8))
    torch.manual_seed(1234)
    assert torch.equal(drawn(canvas, 1.0, reversed(range(8))).flip(0), first)
    alone = torch.random.get_rng_state()
    drawn(canvas, 1.0, range(8))
    assert torch.equal(torch.random.get_rng_state(), alone)  # nothing is drawn from torch's own generator


@both
def test_what_was_nothing_mostly_stays_so(ndim):
    """But for noise and ringing: a net must find the body's edge."""
    canvas = ball(ndim)
    found = drawn(canvas, 1.0, range(30))
    outside = canvas[0, 0] == 0
    away = found[:, 0, outside].median(1).values
    assert float(away.median()) < 0.02 and float(away.max()) < 0.25
    inside = found[:, 0, ~outside].mean(1)
    assert int((inside > found[:, 0, outside].mean(1)).sum()) >= 28


def test_an_empty_canvas_stays_finite():
    """A scan may lie outside of what is drawn."""
    for seed in range(10):
        assert bool(augmented(torch.zeros(1, 1, 16, 16), 1.0, torch.Generator().manual_seed(seed)).isfinite().all())
