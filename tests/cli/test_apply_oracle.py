"""`regkit apply` with two transforms, and with --inverse, equals SimpleITK's own resampling of image and labels."""

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
import torch

import regkit
from regkit.cli import run
from regkit.space import MODELS, Frame

SHAPES = {2: (40, 34), 3: (30, 26, 22)}


def _scan(path, shape, affine, seed, labels=False):
    values = np.random.default_rng(seed).normal(size=shape)
    smooth = sum(np.roll(values, s, a) for a in range(len(shape)) for s in (-2, -1, 0, 1, 2)).astype(np.float32)
    nib.Nifti1Image((smooth > 1).astype(np.int16) + (smooth > 3) if labels else smooth, affine).to_filename(path)


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("ndim", [2, 3])
def test_image_and_labels_equal_simpleitk(ndim, inverse, tmp_path):
    affine = np.eye(4)
    affine[:ndim, :ndim] = np.diag([-1.5, 2.0, 2.5][:ndim])
    affine[:ndim, 3] = [20.0, -30.0, -25.0][:ndim]
    other = affine.copy()
    other[:ndim, 3] += 4.0
    _scan(tmp_path / "image.nii", SHAPES[ndim], affine, 0)
    _scan(tmp_path / "labels.nii", SHAPES[ndim], affine, 1, labels=True)
    _scan(tmp_path / "like.nii", tuple(n - 3 for n in SHAPES[ndim]), other, 2)
    draw = torch.Generator().manual_seed(3)
    frame = Frame.of(regkit.read_image(tmp_path / "image.nii").grid)
    model = MODELS["affine"]
    for name in "ab":
        theta = torch.randn(1, model.count(ndim), generator=draw, dtype=torch.float64) * 0.04
        regkit.write_transform(regkit.Matrix(frame.world(model.exp(theta, ndim))), tmp_path / f"{name}.tfm")
    a, b = (sitk.ReadTransform(str(tmp_path / f"{name}.tfm")) for name in "ab")
    both = sitk.CompositeTransform([a, b])  # the last acts on the point first: a(b(x))
    both = both.GetInverse() if inverse else both
    for file, kind, name in (("image", sitk.sitkLinear, "linear"), ("labels", sitk.sitkNearestNeighbor, "nearest")):
        command = ["apply", tmp_path / f"{file}.nii", "-t", tmp_path / "a.tfm", "-t", tmp_path / "b.tfm", "--like",
                   tmp_path / "like.nii", "-o", tmp_path / f"{file}_moved.nii.gz", "--interpolation", name, "--fill", "0", "--quiet"]
        assert run([str(c) for c in [*command, *(["--inverse"] if inverse else [])]]) == 0
        image, like = sitk.ReadImage(str(tmp_path / f"{file}.nii")), sitk.ReadImage(str(tmp_path / "like.nii"))
        expected = sitk.GetArrayFromImage(sitk.Resample(image, like, both, kind, 0.0)).T
        found = np.asanyarray(nib.load(tmp_path / f"{file}_moved.nii.gz").dataobj).reshape(expected.shape)
        differs = np.abs(found - expected) > 1e-3 * np.ptp(expected)
        assert np.abs(expected).max() > 0 and differs.mean() < 0.002  # at an edge or a tie, rounding decides


def test_one_transform_needs_no_list():
    one = regkit.Matrix.shift(torch.tensor([[1.0, 2.0, 3.0]], dtype=torch.float64))
    points = np.array([[4.0, 5.0, 6.0]])
    assert np.array_equal(regkit.apply(points, one), regkit.apply(points, [one]))
    assert np.array_equal(regkit.apply(points, one), [[3.0, 3.0, 3.0]])
