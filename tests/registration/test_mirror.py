"""Mirror images: a scan stored mirrored is told from one that is not where its anatomy tells, and nothing is said where it does not."""

import math
from dataclasses import replace

import pytest
import torch

from regkit.errors import GeometryError
from regkit.image import Image
from regkit.registration.mirror import MARGIN, Mirrored, agreement, compare, mirror, of_mirror
from regkit.space import Grid, Matrix

SIZE, MM = 40, 3.0
QUICK = {"model": "rigid", "start": "header", "levels": [12, 6], "threads": 1}


def scan(ndim, angle=0.0, *, symmetric=False):
    """A body with blobs in it, turned by an angle in its first two axes, on one grid."""
    affine = torch.diag(torch.tensor([MM] * ndim + [1.0], dtype=torch.float64))
    affine[:ndim, ndim] = -MM * (SIZE - 1) / 2
    grid = Grid((SIZE,) * ndim, affine)
    c, s = math.cos(angle), math.sin(angle)
    turn = torch.eye(ndim, dtype=torch.float64)
    turn[:2, :2] = torch.tensor([[c, s], [-s, c]])
    points = grid.points()[0] @ turn.mT
    draw = torch.Generator().manual_seed(5)
    value = 60 * torch.exp(-((points / 42) ** 6).sum(-1))
    for _ in range(14):
        middle, width = torch.rand(ndim, generator=draw) * 66 - 33, 5 + 8 * torch.rand(1, generator=draw)
        height = 140 * torch.rand(1, generator=draw) - 50
        for side in (1, -1) if symmetric else (1,):
            at = middle * torch.tensor([side] + [1] * (ndim - 1))
            value = value + height * torch.exp(-((points - at) ** 2).sum(-1) / (2 * width**2))
    return Image(value.float().reshape(1, 1, *grid.shape), grid)


def stored_mirrored(image):
    """The same header, the voxels the other way round: what a lost or wrong left and right looks like."""
    return image.with_data(image.data.flip(2))


@pytest.mark.parametrize("ndim", [2, 3])
def test_a_scan_that_is_stored_mirrored_is_told(ndim):
    fixed, moving = scan(ndim), scan(ndim, 0.15)
    right, wrong = compare(fixed, moving, **QUICK), compare(fixed, stored_mirrored(moving), **QUICK)
    assert (right.verdict, wrong.verdict) == ("not mirrored", "mirrored")
    assert right.as_it_is == pytest.approx(wrong.mirrored, abs=0.02) and right.as_it_is > 0.9
    assert of_mirror(right, "fixed.nii") == []
    (found,) = of_mirror(wrong, "fixed.nii")
    assert (found.code, found.severity) == ("flip", "doubtful")
    assert f"{wrong.mirrored:.3f} instead of {wrong.as_it_is:.3f}" in found.what and "fixed.nii" in found.what


@pytest.mark.parametrize("ndim", [2, 3])
def test_symmetric_anatomy_tells_nothing(ndim):
    fixed, moving = scan(ndim, symmetric=True), scan(ndim, 0.1, symmetric=True)
    found = compare(fixed, stored_mirrored(moving), **QUICK)
    assert found.verdict == "too symmetric to tell" and of_mirror(found, "fixed.nii") == []


def test_the_margin_decides():
    for gain, verdict in ((2 * MARGIN, "mirrored"), (0.9 * MARGIN, "too symmetric to tell"), (-0.9 * MARGIN, "too symmetric to tell"),
                          (-2 * MARGIN, "not mirrored")):
        found = Mirrored(0.5, 0.5 + gain)
        assert found.verdict == verdict == found.as_dict()["verdict"]


@pytest.mark.parametrize("ndim", [2, 3])
def test_mirroring_twice_is_nothing_and_keeps_the_middle(ndim):
    one = scan(ndim)
    affine = one.grid.affine[0].clone()
    affine[0, 1], affine[0, -1] = 0.7, 40.0
    one = replace(one, grid=Grid(one.grid.shape, affine))
    once = mirror(one)
    assert once.data is one.data and torch.allclose(once.grid.centre, one.grid.centre)
    assert torch.allclose(torch.det(once.grid.affine[0]), -torch.det(one.grid.affine[0]))
    assert torch.allclose(mirror(once).grid.affine, one.grid.affine)
    there, here = once.grid.points() - one.grid.centre, one.grid.points() - one.grid.centre
    assert torch.allclose(there * torch.tensor([-1.0] + [1.0] * (ndim - 1)), here)


def test_slices_have_a_left_if_they_are_not_sagittal():
    flat = scan(2)
    axial, sagittal, coronal = torch.eye(4), torch.eye(4)[[2, 0, 1, 3]], torch.eye(4)[[0, 2, 1, 3]]
    for place in (axial, coronal):
        assert mirror(replace(flat, slice_affine=place.double())).grid.affine[0, 0, 0] == -MM
    with pytest.raises(GeometryError, match="sagittal slice, which has no left and right"):
        mirror(replace(flat, slice_affine=sagittal.double()))


@pytest.mark.parametrize("ndim", [2, 3])
def test_agreement_is_one_for_equal_scans_and_sees_only_what_both_have(ndim):
    one = scan(ndim)
    assert agreement(one, one, Matrix.identity(ndim)) == pytest.approx(1, abs=1e-5)
    holes = one.data.clone()
    holes[..., :5] = torch.nan
    assert agreement(one, one.with_data(holes), Matrix.identity(ndim)) == pytest.approx(1, abs=0.05)
    off = Matrix.shift(torch.tensor([[20.0] * ndim], dtype=torch.float64))
    assert agreement(one, one, off) < 0.6
    assert agreement(one, one.with_data(-3 * one.data + 7), Matrix.identity(ndim)) == pytest.approx(1, abs=1e-4)
