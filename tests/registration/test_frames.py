"""One anatomy, stored in different ways, gives one answer in mm."""

import math

import pytest
import torch

import regkit
from regkit import Grid, Image, Matrix
from regkit.sampling import warp
from tests.registration.conftest import carried, known_map

pytestmark = pytest.mark.usefixtures("unjudged")


def stored(image: Image, order: tuple[int, ...], flipped: tuple[int, ...]) -> Image:
    """The same voxels at the same places, with the array's axes permuted and flipped."""
    d = image.ndim
    index = torch.zeros(d + 1, d + 1, dtype=torch.float64)  # new index → old index
    index[d, d] = 1
    data = image.data.permute(0, 1, *[a + 2 for a in order])
    for new, old in enumerate(order):
        index[old, new] = 1
        if new in flipped:
            index[old, new] = -1
            index[old, d] = image.grid.shape[old] - 1
    data = data.flip([a + 2 for a in flipped]) if flipped else data
    return Image(data.contiguous(), Grid(tuple(data.shape[2:]), image.grid.affine @ index))


STORAGES = {2: [((0, 1), (0,)), ((1, 0), ()), ((1, 0), (0, 1))], 3: [((0, 1, 2), (0,)), ((2, 0, 1), (1,)), ((1, 2, 0), (0, 1, 2))]}


@pytest.mark.parametrize("which", [0, 1, 2])
def test_lossless_reorderings_of_the_moving_scan_change_nothing(which, ndim, heads, tre):
    fixed = heads[ndim]
    moving = carried(fixed, known_map(fixed.grid, "affine"))
    again = stored(moving, *STORAGES[ndim][which])
    assert again.grid.orientation != moving.grid.orientation
    a, b = (regkit.align(fixed, m, start="mass").transform for m in (moving, again))
    assert tre(fixed, a, b) * float(fixed.grid.spacing.min()) < 0.05


def test_an_oblique_header_turns_the_map_and_nothing_else(ndim, heads, tre):
    """The moving scan's header turned in the world: the map found must be the turned one."""
    fixed = heads[ndim]
    moving = carried(fixed, known_map(fixed.grid, "affine"))
    turn = known_map(moving.grid, "rigid", seed=4, degrees=25.0)
    oblique = Image(moving.data, Grid(moving.grid.shape, turn.matrix @ moving.grid.affine))
    plain, turned = (regkit.align(fixed, m, start="mass").transform for m in (moving, oblique))
    assert tre(fixed, turn @ plain, turned) < 0.1


def test_anisotropic_copies_agree_within_a_fifth_of_the_coarser_voxel(ndim, heads, tre):
    fixed = heads[ndim]
    truth = known_map(fixed.grid, "affine")
    moving = carried(fixed, truth)
    steps = torch.tensor([1.0, 1.5, 2.2][:ndim], dtype=torch.float64)
    scale = torch.diag(torch.cat([steps, torch.ones(1, dtype=torch.float64)]))
    shape = tuple(math.ceil(n / float(s)) for n, s in zip(moving.grid.shape, steps, strict=True))
    coarse = warp(moving, Matrix.identity(ndim), Grid(shape, moving.grid.affine @ scale))
    a, b = (regkit.align(fixed, m, start="mass").transform for m in (moving, coarse))
    assert tre(fixed, a, b) < 0.2 * float(steps.max())


def test_a_sheared_header_is_taken_as_it_is(ndim, heads, tre):
    fixed = heads[ndim]
    truth = known_map(fixed.grid, "affine")
    moving = carried(fixed, truth)
    shear = torch.eye(ndim + 1, dtype=torch.float64)
    shear[0, 1] = 0.15
    sheared = warp(moving, Matrix.identity(ndim), Grid(moving.grid.shape, moving.grid.affine @ shear), kernel="cubic")
    found = regkit.align(fixed, sheared, start="mass").transform
    assert tre(fixed, found, truth) < 0.3
