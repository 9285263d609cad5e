"""Jacobians of maps that are known, folds that are there, and inverses."""

import math

import pytest
import torch

from regkit import Grid, Image, Matrix
from regkit.displacement import Displacement
from regkit.evaluation import inconsistency, regularity


def _grid(shape, spacing=1.5):
    d = len(shape)
    affine = torch.diag(torch.tensor([-spacing, *[spacing] * (d - 1), 1.0], dtype=torch.float64))[None]
    return Grid(tuple(shape), affine)


@pytest.fixture(params=[(24, 20), (14, 12, 10)], ids=["2D", "3D"])
def grid(request):
    return _grid(request.param)


def _field(grid, function):
    points = grid.points()
    u = function(points)
    return Displacement(Image(u.transpose(1, 2).reshape(1, grid.ndim, *grid.shape).float(), grid))


def test_an_affine_map_has_one_determinant(grid):
    d = grid.ndim
    matrix = torch.eye(d + 1, dtype=torch.float64)
    matrix[:d, :d] = torch.diag(torch.tensor([1.2, 0.9, 1.1][:d], dtype=torch.float64))
    found = regularity(Matrix(matrix), grid)
    assert (found.folds, found.sdlogj) == (0.0, 0.0)
    assert found.least == pytest.approx(math.prod([1.2, 0.9, 1.1][:d]))
    same = regularity(_field(grid, lambda x: Matrix(matrix)(x) - x), grid)  # the same map as a field
    assert same.least == pytest.approx(found.least, rel=1e-3) and same.sdlogj == pytest.approx(0, abs=1e-3)


def test_a_reflection_folds_everywhere(grid):
    matrix = torch.eye(grid.ndim + 1, dtype=torch.float64)
    matrix[0, 0] = -1
    assert regularity(Matrix(matrix), grid).folds == 100


def test_a_stretch_that_varies_has_the_spread_of_its_logarithm(grid):
    """x → x + a x² along the first axis: the determinant is 1 + 2 a x, and central differences of a parabola are exact."""
    a = 0.004
    found = regularity(_field(grid, lambda x: torch.cat([a * x[..., :1] ** 2, torch.zeros_like(x[..., 1:])], -1)), grid)
    x = grid.points()[0].reshape(*grid.shape, grid.ndim)[..., 0]
    inner = (1 + 2 * a * x)[1:-1].log()
    assert found.sdlogj == pytest.approx(float(inner.std(unbiased=False)), rel=0.15)  # the ends are one-sided
    assert found.folds == 0


def test_a_fold_is_counted():
    grid = _grid((41, 9), 1.0)
    found = regularity(_field(grid, lambda x: torch.cat([3 * torch.sin(x[..., :1] / 2), torch.zeros_like(x[..., 1:])], -1)), grid)
    assert found.least < 0 and 20 < found.folds < 50


def test_going_there_and_back(grid):
    wave = _field(grid, lambda x: 0.8 * torch.sin(x / 6))
    assert inconsistency(wave, wave.inverse(), grid) < 0.01
    shift = Matrix.shift(torch.full((1, grid.ndim), 2.0, dtype=torch.float64))
    assert inconsistency(shift, Matrix.identity(grid.ndim), grid) == pytest.approx(2 * math.sqrt(grid.ndim))
