"""Padding: a turned box in a constant border is told from round things and from scans that fill their grid."""

import pytest
import torch

from regkit import Grid, Image, Matrix
from regkit.registration.padding import scanned
from regkit.sampling import warp
from regkit.space import MODELS, Frame

pytestmark = pytest.mark.usefixtures("unjudged")

SIZES = {2: (50, 40), 3: (36, 30, 26)}


def _noise(ndim: int, spacing: list[float]) -> Image:
    affine = torch.diag(torch.tensor([*spacing, 1.0], dtype=torch.float64))[None]
    draw = torch.Generator().manual_seed(0)
    return Image(torch.rand(1, 1, *SIZES[ndim], generator=draw) + 1, Grid(SIZES[ndim], affine))


def _turned(image: Image, degrees: float, fill: float) -> tuple[Image, Matrix]:
    """The image turned about its centre, in a grid that holds it."""
    ndim = image.ndim
    theta = torch.zeros(1, MODELS["rigid"].count(ndim), dtype=torch.float64)
    theta[0, ndim:] = degrees * torch.pi / 180
    turn = Matrix(Frame.of(image.grid).world(MODELS["rigid"].exp(theta, ndim)))
    corners = turn.inverse()(image.grid.corners())[0]
    low, high = corners.amin(0) - 3, corners.amax(0) + 3
    affine = torch.eye(ndim + 1, dtype=torch.float64)[None].clone()
    affine[0, :ndim, ndim] = low
    shape = tuple(int(n) for n in (high - low).ceil())
    return warp(image, turn, Grid(shape, affine), fill=fill), turn


@pytest.mark.parametrize("fill", [0.0, -1024.0])
@pytest.mark.parametrize("degrees", [0.0, 20.0, 45.0])
def test_a_turned_box_is_found_whatever_its_voxels(degrees, fill, ndim):
    image = _noise(ndim, [1.0, 1.5, 2.0][:ndim])
    padded, turn = _turned(image, degrees, fill)
    found = scanned(padded)
    assert found is not None
    index = image.grid.to_index(turn(padded.grid.points()))[0]
    size = torch.tensor(image.grid.shape)
    deep = ((index > 2.5) & (index < size - 3.5)).all(1)
    outside = ((index < -0.5) | (index > size - 0.5)).any(1)
    assert found.flatten()[deep].float().mean() > 0.99
    assert found.flatten()[outside].float().mean() < 0.01


def test_round_things_and_full_grids_are_left_alone(ndim):
    image = _noise(ndim, [1.0] * ndim)
    assert scanned(image) is None
    index = image.grid.index_points()[0]
    middle = (torch.tensor(image.grid.shape) - 1) / 2
    ball = ((index - middle) / middle.min()).norm(dim=1).reshape(image.data.shape) < 0.9
    assert scanned(image.with_data(image.data * ball)) is None
    tube = ((index - middle)[:, :2] / middle.min()).norm(dim=1).reshape(image.data.shape) < 0.9
    assert scanned(image.with_data(image.data * tube)) is None
