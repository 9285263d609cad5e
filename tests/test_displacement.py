"""Displacement fields: ITK's meaning, read from ITK's files, and their inverse."""

import numpy as np
import pytest
import SimpleITK as sitk
import torch

import regkit
from regkit import FormatError, GeometryError, Grid, Image
from regkit.displacement import Displacement
from regkit.io import read_field


def _itk_field(ndim, seed=0):
    """A smooth random field in LPS on an oblique grid."""
    random = np.random.default_rng(seed)
    shape = (9, 8, 7)[:ndim]
    field = sitk.GetImageFromArray(random.normal(0, 2, (*shape[::-1], ndim)), isVector=True)
    field.SetSpacing((3.0, 2.5, 4.0)[:ndim])
    field.SetOrigin((-10.0, 7.0, 20.0)[:ndim])
    if ndim == 3:
        c, s = np.cos(0.3), np.sin(0.3)
        field.SetDirection([c, -s, 0, s, c, 0, 0, 0, 1])
    return field


@pytest.mark.parametrize("ndim", [2, 3])
def test_points_go_where_itk_takes_them(tmp_path, ndim):
    field = _itk_field(ndim)
    path = tmp_path / "displacement.nii.gz"
    sitk.WriteImage(field, str(path))
    ours = Displacement(read_field(path, ndim))
    theirs = sitk.DisplacementFieldTransform(sitk.Cast(field, sitk.sitkVectorFloat64))
    random = np.random.default_rng(1)
    size = np.array(field.GetSize())
    inside = [field.TransformContinuousIndexToPhysicalPoint((random.random(ndim) * (size - 1)).tolist()) for _ in range(100)]
    far = [[500.0] * ndim]
    flip = np.array([-1, -1, 1][:ndim])
    lps = np.array(inside + far)
    known = np.array([theirs.TransformPoint(p.tolist()) for p in lps]) * flip
    assert ours(torch.tensor(lps * flip)[None])[0].numpy() == pytest.approx(known, abs=1e-4)


def test_a_gentle_field_has_an_inverse():
    grid = Grid((20, 20, 20), torch.eye(4, dtype=torch.float64)[None])
    points = grid.points()
    field = Displacement(Image((0.9 * torch.sin(points / 4)).transpose(1, 2).reshape(1, 3, 20, 20, 20).float(), grid))
    some = points[:, ::37].clamp(3, 16)
    assert float((field(field.inverse()(some)) - some).abs().max()) < 5e-3
    assert field.inverse().inverse() is field


def test_wrong_channels_are_refused(tmp_path):
    grid = Grid((4, 4, 4), torch.eye(4, dtype=torch.float64)[None])
    with pytest.raises(GeometryError, match="expected one field of 3 channels"):
        Displacement(Image(torch.zeros(1, 2, 4, 4, 4), grid))
    regkit.write_image(Image(torch.zeros(1, 1, 4, 4, 4), grid), tmp_path / "d.nii.gz")
    with pytest.raises(FormatError, match="is 3D with 1 channel; expected 3D with 3 channels"):
        read_field(tmp_path / "d.nii.gz", 3)
