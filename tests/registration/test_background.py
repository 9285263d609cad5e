"""Constant backgrounds: known for what they are, and without weight where they lie on the other scan's tissue."""

import pytest
import torch
import torch.nn.functional as F

import regkit
from regkit import Grid, Image
from regkit.filters import smooth
from regkit.registration.background import background
from regkit.sampling import warp
from tests.registration.conftest import carried, known_map

pytestmark = pytest.mark.usefixtures("unjudged")


def _whole(brain: Image) -> Image:
    """The stripped template in a skull: a bright textured shell 8 to 20 mm off, in dim noise as in air."""
    mask = (brain.data > 0).float()
    grown = [F.max_pool3d(mask, 2 * k + 1, 1, k) for k in (2, 5)]
    draw = torch.Generator().manual_seed(0)
    texture = smooth(torch.randn(brain.data.shape, generator=draw), [1.5] * 3)
    shell = (grown[1] - grown[0]) * brain.data.max() * (0.8 + texture)
    return brain.with_data(brain.data + shell + 0.01 * brain.data.max() * torch.rand(brain.data.shape, generator=draw))


@pytest.mark.parametrize("value", [0.0, -1024.0])
def test_a_constant_border_is_found(value, ndim):
    image = torch.full((1, 1, *[20] * ndim), value)
    image[(..., *[slice(6, 15)] * ndim)] = torch.rand(1, 1, *[9] * ndim) + 5
    assert background(image) == value
    image[(..., *[slice(0, 1)] * ndim)] = 3.0  # one corner is something else
    assert background(image) == value


def test_a_scan_that_fills_its_grid_has_none(ndim):
    draw = torch.Generator().manual_seed(0)
    image = torch.rand(1, 1, *[20] * ndim, generator=draw)
    assert background(image) is None
    image[(..., *[slice(None, None, 19)] * ndim)] = 0  # equal corners alone are no background
    assert background(image) is None


def test_a_border_that_carries_no_weight_is_none(ndim):
    """The scan lies as a box in it; the box itself holds no constant."""
    image, weight = torch.zeros(1, 1, *[20] * ndim), torch.zeros(1, 1, *[20] * ndim)
    box = (..., *[slice(6, 15)] * ndim)
    image[box], weight[box] = torch.rand(1, 1, *[9] * ndim) + 5, 1.0
    assert background(image) == 0.0
    assert background(image, weight) is None


@pytest.mark.parametrize("turned", [False, True], ids=["upright", "turned"])
def test_a_stripped_brain_is_not_stretched_over_the_skull(heads, tre, turned):
    """A whole head, and the same head's brain moved by a known map."""
    stripped = heads[3]
    head = _whole(stripped)
    truth = known_map(head.grid, "affine", seed=3, degrees=100.0 if turned else 15.0)
    result = regkit.align(head, carried(stripped, truth))
    assert tre(stripped, result.transform, truth) < 0.3  # voxels of 4 mm
    assert any("background" in note for note in result.trace["notes"])
    back = regkit.align(carried(stripped, truth), head)
    assert tre(stripped, back.transform.inverse(), truth) < 0.3


def test_two_stripped_brains_keep_their_outlines(heads):
    brain = heads[3]
    result = regkit.align(brain, carried(brain, known_map(brain.grid, "affine", seed=4)))
    assert not any("background" in note for note in result.trace["notes"])


def test_a_background_of_another_value_than_zero(heads, tre):
    """As in CT: what is cut out lies in -1000."""
    brain = heads[3]
    head = _whole(brain)
    truth = known_map(head.grid, "rigid", seed=5)
    cut = brain.with_data(torch.where(brain.data > 0, 4 * brain.data, -1000.0))
    moving = warp(cut, truth.inverse(), Grid(head.grid.shape, head.grid.affine), kernel="nearest", fill=-1000.0)
    result = regkit.align(head, moving, model="rigid")
    assert tre(brain, result.transform, truth) < 0.4
