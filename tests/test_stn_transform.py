"""The transform a spatial transformer stands for: one rule for images and points; torch, scipy and kornia as oracles."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.ndimage as ndi
import torch
import torch.nn.functional as F
from scipy.interpolate import RBFInterpolator

from regkit.space import Composite, Grid, Matrix, Spline, SplineModel, model
from regkit.stn import SpatialTransformer, unit_grid

from .test_stn import SHAPES, Says, both, every, oblique, some_theta, texture

SIZES = {2: (9, 16), 3: (9, 16, 7)}


@both
@every
@pytest.mark.parametrize("antialias", ["auto", "none"])
@pytest.mark.parametrize("where", ["here", "in the world"])
def test_the_transform_and_the_image_follow_one_rule(ndim, name, antialias, where):
    grids = {} if where == "here" else {
        "moving_grid": oblique(SHAPES[ndim]), "fixed_grid": oblique((9, 12, 11)[:ndim], (2.0, 1.1, 1.4), (-50.0, 3.0, 9.0), -0.7)}
    moving = texture(SHAPES[ndim], n=2)
    layer = SpatialTransformer(Says(some_theta(name, ndim, 2, seed=6, size=0.05)), name, antialias=antialias)
    transform = layer.transform(moving, **grids)
    assert isinstance(transform, (Spline, Composite) if name == "tps" else Matrix)
    assert transform.ndim == ndim and (name == "tps" or transform.affine == (name != "projective"))
    moved = layer(moving, **grids)
    torch.testing.assert_close(layer.resample(moving, transform, **grids), moved, atol=1e-4, rtol=0)


@both
@every
def test_a_blob_lands_where_the_inverse_takes_its_centre(ndim, name):
    moving_grid, fixed_grid = oblique(SHAPES[ndim], (1.5, 0.9, 2.0)), oblique((24, 19, 21)[:ndim], (0.9, 1.2, 1.0), (-50.0, 3.0, 9.0), -0.7)
    layer = SpatialTransformer(Says(some_theta(name, ndim, seed=8, size=0.04)), name, antialias="none", kernel="cubic")
    transform = layer.transform(torch.zeros(1, 1, *SHAPES[ndim]), moving_grid=moving_grid, fixed_grid=fixed_grid)
    centre = moving_grid.centre[:, None] + torch.tensor([1.7, -2.2, 0.9])[:ndim]
    away = (moving_grid.points() - centre).norm(dim=-1)
    blob = torch.exp(-0.5 * (away / 1.8) ** 2).reshape(1, 1, *SHAPES[ndim]).float()
    moved = layer(blob, moving_grid=moving_grid, fixed_grid=fixed_grid).double().flatten().clamp_min(0)
    found = (moved[:, None] * fixed_grid.points()[0]).sum(0) / moved.sum()
    expected = transform.inverse()(centre)[0, 0]
    assert float((expected - fixed_grid.centre[0]).norm()) > 1.0
    assert float((found - expected).norm()) < 0.25  # mm


@both
@every
def test_the_inverse_carries_back(ndim, name):
    shape = (30, 36, 26)[:ndim]
    moving = texture(shape, sigma=3.0)
    layer = SpatialTransformer(Says(some_theta(name, ndim, seed=9, size=0.04)), name, kernel="cubic", antialias="none")
    back = layer.resample(layer(moving), layer.transform(moving).inverse())
    inner = (..., *[slice(6, -6)] * ndim)
    assert float((back - moving)[inner].abs().mean()) < 0.02 < 0.05 < float((layer(moving) - moving)[inner].abs().mean())


@both
def test_a_spline_answers_for_the_very_points_it_is_asked(ndim):
    """Its basis is kept: not for a grid of other voxels between the same first and last."""
    shape = (6, 4, 5)[:ndim]
    layer = SpatialTransformer(Says(some_theta("tps", ndim, size=0.1)), "tps", antialias="none")
    moving_grid, swapped = unit_grid(SHAPES[ndim]), torch.eye(ndim + 1, dtype=torch.float64)
    swapped[[0, 1]] = swapped[[1, 0]]
    one = unit_grid(shape, moving_grid)
    other = Grid((shape[1], shape[0], *shape[2:]), one.affine @ swapped)  # the same voxels, stored in another order
    moving = texture(SHAPES[ndim])
    first = layer(moving, moving_grid=moving_grid, fixed_grid=one)
    second = layer(moving, moving_grid=moving_grid, fixed_grid=other)
    torch.testing.assert_close(second, first.transpose(2, 3), atol=1e-5, rtol=0)


# --------------------------------------------------------------------------------------------------------------- oracles

def in_torchs_coordinates(matrix, shape):
    """A map (N, D+1, D+1) of the frame, half the longest edge, as torch has it (N, D+1, D+1): ±1 at each axis' edges, axes reversed."""
    d = len(shape)
    edges = torch.diag(torch.tensor([*(n / max(shape) for n in shape), 1.0], dtype=torch.float64))
    back = torch.tensor([*reversed(range(d)), d])
    return (torch.linalg.inv(edges) @ matrix @ edges)[:, back][:, :, back]


@both
@pytest.mark.parametrize("name", ["translation", "attention", "rigid", "similarity", "affine"])
@pytest.mark.parametrize("padding", ["zeros", "border", "reflection"])
def test_affine_maps_are_torchs_affine_grid_and_grid_sample(ndim, name, padding):
    moving, theta = texture(SHAPES[ndim], n=3, c=2), some_theta(name, ndim, 3)
    for size in (SHAPES[ndim], SIZES[ndim]):
        found = SpatialTransformer(Says(theta), name, size=size, padding=padding, antialias="none")(moving)
        matrix = in_torchs_coordinates(model(name).exp(theta.double(), ndim), SHAPES[ndim])
        where = F.affine_grid(matrix[:, :ndim].float(), [3, 1, *size], align_corners=False)
        expected = F.grid_sample(moving, where, padding_mode=padding, align_corners=False)
        if padding == "zeros":  # torch fades out over half a voxel on either side of the edge
            deep = (where.abs() < 1 - 1 / torch.tensor(SHAPES[ndim][::-1])).all(-1)[:, None]
            outside = (where.abs() > 1).any(-1)[:, None].expand_as(found)
            assert 0.1 < float(deep.float().mean()) < 0.95 and not found[outside].any()
            found, expected = found * deep, expected * deep
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)


def homographies(ndim, n=3, seed=5):
    theta = some_theta("projective", ndim, n, seed=seed, size=0.15)
    return theta, model("projective").exp(theta.double(), ndim)


@both
@pytest.mark.parametrize(("kernel", "order"), [("linear", 1), ("nearest", 0)])
@pytest.mark.parametrize(("padding", "mode"), [("zeros", "constant"), ("border", "nearest"), ("reflection", "reflect")])
def test_projective_maps_are_scipys_sampler_at_divided_points(ndim, kernel, order, padding, mode):
    theta, matrices = homographies(ndim)
    moving = texture(SHAPES[ndim], n=3)
    for size in (SHAPES[ndim], SIZES[ndim]):
        found = SpatialTransformer(Says(theta), "projective", size=size, kernel=kernel, padding=padding, antialias="none")(moving)
        longest, shape = max(SHAPES[ndim]), np.array(SHAPES[ndim])
        index = np.stack(np.meshgrid(*[np.arange(n) for n in size], indexing="ij"), -1).reshape(-1, ndim)
        u = ((index + 0.5) / np.array(size) * 2 - 1) * shape / longest
        for n, matrix in enumerate(matrices.numpy()):
            v = np.c_[u, np.ones(len(u))] @ matrix.T
            where = v[:, :-1] / v[:, -1:] * longest / 2 + (shape - 1) / 2
            expected = ndi.map_coordinates(moving[n, 0].numpy(), where.T, order=order, mode="nearest" if mode == "constant" else mode)
            if mode == "constant":
                expected *= ((where >= -0.5) & (where <= shape - 0.5)).all(1)
            close = np.abs(found[n, 0].flatten().numpy() - expected) < 1e-4
            assert close.mean() > (0.99 if kernel == "nearest" else 1 - 1e-9)  # rounding may turn a tie
    assert float((matrices[:, ndim, :ndim]).abs().max()) > 0.1


def test_projective_maps_are_kornias():
    kornia = pytest.importorskip("kornia")
    theta, matrices = homographies(2)
    moving = texture(SHAPES[2], n=3, c=2)
    h, w = SHAPES[2]
    half = max(h, w) / 2
    index = torch.tensor([[half, 0, (h - 1) / 2], [0, half, (w - 1) / 2], [0, 0, 1]], dtype=torch.float64)  # of the frame's points
    pixels = (index @ matrices @ torch.linalg.inv(index))[:, [1, 0, 2]][:, :, [1, 0, 2]]  # (x, y), output → input
    deep = torch.zeros_like(moving)
    deep[..., 1:-1, 1:-1] = 1  # kornia's edges are the centres of the outermost pixels
    inner = SpatialTransformer(Says(theta), "projective", antialias="none")(deep) > 0.999
    assert float(inner.float().mean()) > 0.2
    for padding in ("zeros", "border", "reflection"):
        found = SpatialTransformer(Says(theta), "projective", padding=padding, antialias="none")(moving)
        expected = kornia.geometry.transform.warp_perspective(
            moving, torch.linalg.inv(pixels).float(), (h, w), padding_mode=padding, align_corners=True)
        torch.testing.assert_close(found[inner], expected[inner], atol=1e-3, rtol=0)


@both
@pytest.mark.parametrize("stiffness", [0.0, 0.05])
@pytest.mark.parametrize("control", [2, 4])
def test_splines_are_scipys(ndim, control, stiffness):
    which = SplineModel(control, stiffness)
    theta = 0.05 * torch.randn(2, which.count(ndim), generator=torch.Generator().manual_seed(7))
    moving, shape, longest = texture(SHAPES[ndim], n=2), np.array(SHAPES[ndim]), max(SHAPES[ndim])
    for size in (SHAPES[ndim], SIZES[ndim]):
        found = SpatialTransformer(Says(theta), which, size=size, padding="border", antialias="none")(moving)
        index = np.stack(np.meshgrid(*[np.arange(n) for n in size], indexing="ij"), -1).reshape(-1, ndim)
        u = ((index + 0.5) / np.array(size) * 2 - 1) * shape / longest
        lattice = np.stack(np.meshgrid(*[np.linspace(-n, n, control) / longest for n in shape], indexing="ij"), -1).reshape(-1, ndim)
        for n in range(2):
            moves = theta[n].double().numpy().reshape(-1, ndim)
            fitted = RBFInterpolator(lattice, moves, kernel="thin_plate_spline" if ndim == 2 else "linear", degree=1, smoothing=stiffness)
            where = (u + fitted(u)) * longest / 2 + (shape - 1) / 2
            expected = ndi.map_coordinates(moving[n, 0].numpy(), where.T, order=1, mode="nearest")
            np.testing.assert_allclose(found[n, 0].flatten().numpy(), expected, atol=1e-4)
