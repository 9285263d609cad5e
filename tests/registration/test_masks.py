"""Masks are metric masks: what they leave out has no say, at any level."""

import pytest
import torch

import regkit
from regkit import FormatError, GeometryError, Grid, Image, Matrix, OverlapError
from tests.registration.conftest import carried, known_map

pytestmark = pytest.mark.usefixtures("unjudged")


def ball(image: Image, offset: float, radius: float) -> torch.Tensor:
    """(1, 1, *S) bool: voxels within `radius` mm of a point `offset` mm from the bright voxels' centre, along every axis."""
    points = image.grid.points()[0]
    bright = points[image.data.flatten() > image.data.mean()].mean(0)
    return ((points - bright - offset).norm(dim=1) < radius).reshape(image.data.shape)


@pytest.mark.parametrize("painted", ["fixed", "moving"])
@pytest.mark.parametrize("similarity", ["auto", "mse", "ncc", "cr"])
def test_a_bright_blob_masked_out_has_no_say(painted, similarity, ndim, heads, tre):
    fixed = heads[ndim]
    moving = carried(fixed, known_map(fixed.grid, "affine"))
    scans = {"fixed": fixed, "moving": moving}
    blob = ball(scans[painted], 20.0, 15.0)
    mask = scans[painted].with_data((~blob).to(torch.uint8))
    dirty = scans[painted].with_data(torch.where(blob, 4 * scans[painted].data.max(), scans[painted].data))
    options = {"similarity": similarity, "start": "mass"}
    clean = regkit.align(fixed, moving, **{f"{painted}_mask": mask}, **options)
    masked = regkit.align(**{**scans, painted: dirty}, **{f"{painted}_mask": mask}, **options)
    assert tre(fixed, clean.transform, masked.transform) * float(fixed.grid.spacing.min()) < 0.2
    assert tre(fixed, regkit.align(**{**scans, painted: dirty}, **options).transform, masked.transform) > 0


def test_nan_voxels_carry_no_weight(ndim, heads, tre):
    fixed = heads[ndim]
    truth = known_map(fixed.grid, "affine")
    moving = carried(fixed, truth)
    holes = moving.with_data(torch.where(ball(moving, 20.0, 15.0), torch.nan, moving.data))
    result = regkit.align(fixed, holes, start="mass")
    assert tre(fixed, result.transform, truth) < 0.2
    assert any("NaN" in note for note in result.trace["notes"])
    assert torch.isfinite(result.moved.data).all()


def test_a_mask_on_another_grid_is_carried_over_by_world(ndim, heads):
    fixed = heads[ndim]
    moving = carried(fixed, known_map(fixed.grid, "affine"))
    coarse = moving.grid.canonical(2 * float(moving.grid.spacing.min()))
    mask = Image(torch.ones(1, 1, *coarse.shape), coarse)
    result = regkit.align(fixed, moving, moving_mask=mask, start="mass")
    assert any("another grid" in note for note in result.trace["notes"])


def test_masks_that_cannot_be_meant_are_refused(ndim, heads):
    fixed = heads[ndim]
    far = Matrix.shift(torch.full((1, ndim), 1e4, dtype=torch.float64))
    beside = Image(torch.ones_like(fixed.data), Grid(fixed.grid.shape, far.matrix @ fixed.grid.affine))
    with pytest.raises(OverlapError, match="fixed_mask: marks no voxel"):
        regkit.align(fixed, fixed, fixed_mask=beside)
    with pytest.raises(OverlapError, match="moving_mask: marks no voxel"):
        regkit.align(fixed, fixed, moving_mask=fixed.with_data(torch.zeros_like(fixed.data)))
    with pytest.raises(GeometryError, match=r"fixed_mask: is \dD"):
        regkit.align(fixed, fixed, fixed_mask=heads[5 - ndim])
    with pytest.raises(FormatError, match="inside its mask"):
        regkit.align(fixed, fixed, fixed_mask=fixed.with_data((fixed.data == 0).float()))
