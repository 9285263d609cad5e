"""Images in and out: nibabel and SimpleITK are the oracles for voxels and for where they lie."""

from __future__ import annotations

import gzip
import io
import math
import subprocess
import sys
import tracemalloc
import zlib

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
import torch

from regkit.errors import FormatError, GeometryError, OptionError, OutputError, RegkitError
from regkit.image import Image
from regkit.io import packing, read_image, write_image
from regkit.io.slices import basis
from regkit.space import Grid

SHAPE = {2: (7, 5), 3: (6, 5, 4)}
DTYPES = {
    "bool": torch.bool,
    "uint8": torch.uint8,
    "int16": torch.int16,
    "int32": torch.int32,
    "int64": torch.int64,
    "float32": torch.float32,
    "float64": torch.float64,
}


def rotation(ndim: int, seed: int = 0) -> np.ndarray:
    q, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(ndim, ndim)))
    return q if np.linalg.det(q) > 0 else q * np.r_[-1, np.ones(ndim - 1)]


def affine_of(kind: str, ndim: int) -> np.ndarray:
    linear = np.diag([1.5, 0.8, 2.5][:ndim])
    linear = {
        "straight": linear,
        "flipped": linear * np.r_[-1, 1, 1][:ndim],
        "oblique": rotation(ndim) @ linear,
        "sheared": (np.eye(ndim) + np.eye(ndim, k=1) * 0.3) @ linear,
        "permuted": np.roll(linear, 1, axis=0),
    }[kind]
    affine = np.eye(ndim + 1)
    affine[:ndim, :ndim], affine[:ndim, ndim] = linear, [-10.5, 20.25, 33.0][:ndim]
    return affine


KINDS = ("straight", "flipped", "oblique", "sheared", "permuted")


def make(ndim: int, dtype: torch.dtype = torch.float32, kind: str = "oblique", channels: int = 1) -> Image:
    g = torch.Generator().manual_seed(1)
    data = torch.randint(0, 2 if dtype == torch.bool else 120, (1, channels, *SHAPE[ndim]), generator=g).to(dtype)
    return Image(data, Grid(SHAPE[ndim], torch.from_numpy(affine_of(kind, ndim))))


def lps_point(image: sitk.Image, index) -> np.ndarray:
    point = np.array(image.TransformIndexToPhysicalPoint([int(i) for i in index]))
    return point * np.r_[-1, -1, 1][: len(point)]


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz", ".nrrd", ".mha"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ndim", [2, 3])
def test_round_trip_keeps_voxels_type_and_place(tmp_path, ndim, dtype, suffix):
    image = make(ndim, DTYPES[dtype])
    back = read_image(write_image(image, tmp_path / f"a{suffix}"))
    expected = {"bool": torch.uint8, "float64": torch.float32}.get(dtype, DTYPES[dtype])
    assert back.data.dtype == expected and back.data.is_contiguous()
    assert torch.equal(back.data, image.data.to(expected))
    assert torch.allclose(back.grid.affine, image.grid.affine, atol=1e-5)
    assert [p.name for p in tmp_path.iterdir()] == [f"a{suffix}"]


@pytest.mark.parametrize("dtype,stored", [("uint8", "uint8"), ("int16", "int16"), ("int64", "int32"), ("float32", "float32")])
@pytest.mark.parametrize("suffix", [".mgh", ".mgz"])
@pytest.mark.parametrize("ndim", [2, 3])
def test_round_trip_mgh(tmp_path, ndim, suffix, dtype, stored):
    image = make(ndim, DTYPES[dtype])
    path = write_image(image, tmp_path / f"a{suffix}")
    blob = path.read_bytes()
    oracle = nib.MGHImage.from_bytes(gzip.decompress(blob) if suffix == ".mgz" else blob)
    assert oracle.get_data_dtype() == np.dtype(stored).newbyteorder(">")
    assert np.array_equal(np.asanyarray(oracle.dataobj).squeeze(), image.data[0, 0].numpy())
    back = read_image(path)
    assert torch.equal(back.data, image.data.to(back.data.dtype))
    assert torch.allclose(back.grid.affine, image.grid.affine, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ndim", [2, 3])
def test_nifti_written_lies_where_nibabel_and_itk_see_it(tmp_path, ndim, kind):
    image = make(ndim, kind=kind)
    path = write_image(image, tmp_path / "a.nii.gz")
    seen = nib.load(path)
    assert seen.shape == SHAPE[ndim] and seen.header.get_xyzt_units()[0] == "mm"
    assert np.array_equal(np.asanyarray(seen.dataobj), image.data[0, 0].numpy())
    keep = [*range(ndim), 3]
    assert np.allclose(seen.affine[np.ix_(keep, keep)], image.grid.affine[0], atol=1e-5)
    assert int(seen.header["sform_code"]) == 1 and int(seen.header["qform_code"]) == (0 if kind == "sheared" else 1)
    assert np.allclose(seen.header.get_zooms(), image.grid.spacing[0], atol=1e-5)
    if kind != "sheared":
        assert np.allclose(seen.get_qform(), seen.get_sform(), atol=1e-5)
        itk = sitk.ReadImage(str(path))
        for index in [(0,) * ndim, tuple(n - 1 for n in SHAPE[ndim])]:
            if ndim == 3:  # ITK forgets most of a 2D NIfTI's orientation
                assert np.allclose(
                    lps_point(itk, index), image.grid.to_world(torch.tensor([[index]]).double())[0, 0], atol=1e-4
                )
            assert itk[index] == image.data[(0, 0, *index)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("suffix", [".nrrd", ".mha"])
@pytest.mark.parametrize("ndim", [2, 3])
def test_itk_files_lie_where_itk_says(tmp_path, ndim, suffix, kind):
    image = make(ndim, kind=kind)
    path = write_image(image, tmp_path / f"a{suffix}")
    itk, back = sitk.ReadImage(str(path)), read_image(path)
    for index in [(0,) * ndim, (1, 2, 3)[:ndim], tuple(n - 1 for n in SHAPE[ndim])]:
        world = back.grid.to_world(torch.tensor([[index]]).double())[0, 0]
        assert np.allclose(lps_point(itk, index), world, atol=1e-6)
        assert np.allclose(image.grid.to_world(torch.tensor([[index]]).double())[0, 0], world, atol=1e-5)
        assert itk[index] == back.data[(0, 0, *index)] == image.data[(0, 0, *index)]


@pytest.mark.parametrize("kind", KINDS)
def test_nifti_voxels_and_affine_are_nibabels(tmp_path, kind):
    array = np.random.default_rng(0).normal(size=(5, 6, 7))
    nib.Nifti1Image(array, affine_of(kind, 3)).to_filename(tmp_path / "a.nii.gz")
    image, oracle = read_image(tmp_path / "a.nii.gz"), nib.load(tmp_path / "a.nii.gz")
    assert np.array_equal(image.grid.affine[0].numpy(), oracle.affine)
    assert torch.equal(image.data[0, 0], torch.from_numpy(oracle.get_fdata(dtype=np.float32)))
    other = read_image(oracle)
    assert torch.equal(other.data, image.data) and torch.equal(other.grid.affine, image.grid.affine)


def test_nifti_scaling_byte_order_nifti2_and_pairs(tmp_path):
    stored = np.random.default_rng(0).integers(-500, 500, (4, 5, 6)).astype(np.int16)
    header = nib.Nifti1Header(endianness=">")
    header.set_data_dtype(np.int16)
    big = nib.Nifti1Image(stored.astype(">i2"), np.eye(4), header)
    big.to_filename(tmp_path / "big.nii")
    assert (tmp_path / "big.nii").read_bytes()[:4] == (348).to_bytes(4, "big")
    plain = read_image(tmp_path / "big.nii")
    assert plain.data.dtype == torch.int16 and np.array_equal(plain.data[0, 0], stored)

    scaled = nib.Nifti1Image(np.linspace(-3.0, 4.0, 120).reshape(4, 5, 6), np.eye(4))
    scaled.header.set_data_dtype(np.int16)
    scaled.to_filename(tmp_path / "scaled.nii.gz")
    image = read_image(tmp_path / "scaled.nii.gz")
    assert image.data.dtype == torch.float32
    assert np.allclose(image.data[0, 0], nib.load(tmp_path / "scaled.nii.gz").get_fdata(), atol=1e-6)

    nib.Nifti2Image(stored, affine_of("oblique", 3)).to_filename(tmp_path / "two.nii")
    assert np.array_equal(read_image(tmp_path / "two.nii").data[0, 0], stored)
    nib.Nifti1Pair(stored, affine_of("oblique", 3)).to_filename(tmp_path / "pair.hdr")
    for name in ("pair.hdr", "pair.img"):
        pair = read_image(tmp_path / name)
        assert np.array_equal(pair.data[0, 0], stored) and np.allclose(pair.grid.affine[0], affine_of("oblique", 3), atol=1e-5)


@pytest.mark.parametrize("dtype,held", [(np.uint16, torch.int32), (np.uint32, torch.int64), (np.uint64, torch.int64)])
def test_wide_unsigned_integers_become_what_torch_computes_with(tmp_path, dtype, held):
    array = np.arange(24, dtype=dtype).reshape(2, 3, 4) + np.iinfo(np.uint16).max - 30
    nib.Nifti1Image(array, np.eye(4), dtype=dtype).to_filename(tmp_path / "a.nii")
    data = read_image(tmp_path / "a.nii").data
    assert data.dtype == held and int(data.min()) == int(array.min()) and np.array_equal(data[0, 0].numpy(), array)


def test_header_without_orientation_takes_nibabels_fallback(tmp_path):
    image = nib.Nifti1Image(np.ones((4, 5, 6), np.uint8), None)
    image.header.set_zooms((2, 3, 4))
    image.to_filename(tmp_path / "a.nii")
    assert np.array_equal(read_image(tmp_path / "a.nii").grid.affine[0], nib.load(tmp_path / "a.nii").affine)


def test_four_axes_choose_a_volume(tmp_path):
    array = np.arange(2 * 3 * 4 * 5, dtype=np.int16).reshape(2, 3, 4, 5)
    path = tmp_path / "f.nii.gz"
    nib.Nifti1Image(array, np.eye(4)).to_filename(path)
    assert np.array_equal(read_image(path, volume=3).data[0, 0], array[..., 3])
    with pytest.raises(OptionError, match=r"fixed: .*f.nii.gz holds 5 volumes; choose one of 0 to 4 by --volume"):
        read_image(path, name="fixed")
    for bad in (5, -1):
        with pytest.raises(OptionError, match=f"volume: {bad}, but .* holds 5 volumes"):
            read_image(path, volume=bad)
    nib.Nifti1Image(array[..., :1], np.eye(4)).to_filename(tmp_path / "one.nii.gz")
    assert np.array_equal(read_image(tmp_path / "one.nii.gz").data[0, 0], array[..., 0])
    assert read_image(tmp_path / "one.nii.gz", volume=3).grid.shape == (2, 3, 4)
    frames = sitk.JoinSeries([sitk.GetImageFromArray(array[..., t].T.copy()) for t in range(5)])
    sitk.WriteImage(frames, str(tmp_path / "f.nrrd"))
    assert np.array_equal(read_image(tmp_path / "f.nrrd", volume=2).data[0, 0], array[..., 2])
    with pytest.raises(OptionError, match=r"holds 5 volumes"):
        read_image(tmp_path / "f.nrrd")


@pytest.mark.parametrize("suffix", [".nii.gz", ".nrrd", ".mha"])
@pytest.mark.parametrize("dtype,channels", [(torch.uint8, 3), (torch.uint8, 4), (torch.float32, 3), (torch.float32, 2)])
@pytest.mark.parametrize("ndim", [2, 3])
def test_channels(tmp_path, ndim, dtype, channels, suffix):
    image = make(ndim, dtype, "straight", channels)
    path = write_image(image, tmp_path / f"a{suffix}")
    back = read_image(path)
    assert torch.equal(back.data, image.data) and torch.allclose(back.grid.affine, image.grid.affine, atol=1e-6)
    itk = sitk.ReadImage(str(path))
    assert itk.GetNumberOfComponentsPerPixel() == channels
    assert np.array_equal(
        np.moveaxis(sitk.GetArrayFromImage(itk), -1, 0).squeeze(), image.data[0].numpy().transpose(0, *range(ndim, 0, -1))
    )


@pytest.mark.parametrize(
    "suffix,dtype,channels",
    [
        (".png", torch.uint8, 1),
        (".png", torch.uint8, 3),
        (".png", torch.uint8, 4),
        (".tif", torch.uint8, 1),
        (".tiff", torch.uint8, 3),
        (".tif", torch.float32, 1),
        (".bmp", torch.uint8, 3),
    ],
)
def test_pictures(tmp_path, suffix, dtype, channels):
    image = make(2, dtype, "straight", channels)
    back = read_image(write_image(image, tmp_path / f"a{suffix}"))
    assert back.pixels and back.slice_affine is None
    assert torch.equal(back.data, image.data)
    itk = sitk.ReadImage(str(tmp_path / f"a{suffix}"))
    value = np.atleast_1d(itk[4, 3])  # column 4, row 3
    assert np.array_equal(back.data[0, :, 4, 3].numpy(), value)
    assert np.allclose(back.grid.to_world(torch.tensor([[[4.0, 3.0]]]).double())[0, 0], lps_point(itk, (4, 3)))


def test_pictures_of_other_grey_values(tmp_path):
    image = make(2)
    soft = image.with_data(image.data * 2.0 - 0.4)  # undershoots 0
    back = read_image(write_image(soft, tmp_path / "a.png"))
    assert back.data.dtype == torch.uint8 and torch.equal(back.data.float(), soft.data.round().clamp_min(0))
    wide = image.with_data((image.data * 500).int())
    assert torch.equal(read_image(write_image(wide, tmp_path / "w.png")).data, wide.data)
    smooth = Image(torch.arange(64.0)[None, None, :, None].expand(1, 1, 64, 64) * 3, Grid((64, 64), torch.eye(3)))
    lossy = read_image(write_image(smooth, tmp_path / "a.jpg"))
    assert (lossy.data.float() - smooth.data).abs().mean() < 3
    with pytest.raises(FormatError, match=r"do not go into a .png picture, which holds 0 to 65535"):
        write_image(image.with_data(image.data.int() - 500), tmp_path / "n.png")
    with pytest.raises(FormatError, match=r"3D image does not go into a .png"):
        write_image(make(3), tmp_path / "n.png")
    assert not (tmp_path / "n.png").exists()


PLANES = {  # slice's axes and normal as columns, and the world axes its 2D frame is near to
    "axial": (np.eye(3), (0, 1)),
    "coronal": (np.eye(3)[:, [0, 2, 1]], (0, 2)),
    "sagittal": (np.eye(3)[:, [1, 2, 0]], (1, 2)),
    "flipped": (np.diag([-1.0, 1, 1]), (0, 1)),
}


@pytest.mark.parametrize("tilted", [False, True])
@pytest.mark.parametrize("name", PLANES)
def test_slices_live_in_their_own_plane(tmp_path, name, tilted):
    axes, near = PLANES[name]
    turn = rotation(3, 3) if tilted else np.eye(3)
    small = np.linalg.matrix_power(np.eye(3) + 0.05 * (turn - turn.T), 1)
    q, _ = np.linalg.qr(small) if tilted else (np.eye(3), None)
    q = q * np.sign(np.diag(q))
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = q @ axes @ np.diag([1.5, 0.7, 3.0]), [5, -7, 37]
    array = np.random.default_rng(0).integers(0, 99, (8, 6)).astype(np.int16)
    nib.Nifti1Image(array, affine).to_filename(tmp_path / "a.nii.gz")
    image = read_image(tmp_path / "a.nii.gz")
    assert image.ndim == 2 and np.array_equal(image.data[0, 0], array) and not image.pixels
    index = torch.tensor([[[0, 0], [7, 0], [0, 5], [7, 5], [3, 2]]]).double()
    flat = image.grid.to_world(index)[0].numpy()
    world = nib.affines.apply_affine(affine, np.c_[index[0].numpy(), np.zeros(5)])
    distances = np.linalg.norm(flat[:, None] - flat[None], axis=-1)
    assert np.allclose(distances, np.linalg.norm(world[:, None] - world[None], axis=-1), atol=1e-4)
    if not tilted:
        assert np.allclose(flat, world[:, near], atol=1e-5)
    else:  # near to the world's axes: the frame turns no more than the slice does
        assert np.abs((flat - flat[0]) - (world - world[0])[:, near]).max() < 0.15 * distances.max()
    # The same slice stored flipped and swapped lies in the same 2D frame.
    other = nib.Nifti1Image(array[::-1].T.copy(), affine @ np.array([[0, -1, 0, 7], [1, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]))
    again = read_image(other)
    swapped = torch.stack([index[..., 1], 7 - index[..., 0]], -1)
    assert np.allclose(again.grid.to_world(swapped)[0], flat, atol=1e-4)
    # and goes back to its place.
    assert np.allclose(nib.load(write_image(image, tmp_path / "b.nii.gz")).affine, affine, atol=1e-5)
    back = read_image(write_image(image, tmp_path / "b.nrrd"))
    assert torch.allclose(back.grid.affine, image.grid.affine, atol=1e-4) and torch.equal(back.data, image.data)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_volumes_of_one_slice_are_slices(tmp_path, axis):
    shape = [6, 5, 4]
    shape[axis] = 1
    affine = affine_of("oblique", 3)
    array = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    nib.Nifti1Image(array, affine).to_filename(tmp_path / "a.nii")
    image = read_image(tmp_path / "a.nii")
    assert image.ndim == 2 and np.array_equal(image.data[0, 0], array.squeeze())
    for index in [(0, 0), (2, 3)]:
        place = image.slice_affine @ torch.tensor([*index, 0.0, 1.0]).double()
        assert np.allclose(place[:3], nib.affines.apply_affine(affine, np.insert(index, axis, 0)), atol=1e-5)
    written = nib.load(write_image(image, tmp_path / "b.nii"))
    assert np.allclose(
        nib.affines.apply_affine(written.affine, [2, 3, 0]),
        nib.affines.apply_affine(affine, np.insert((2, 3), axis, 0)),
        atol=1e-5,
    )
    itk = sitk.GetImageFromArray(array.transpose(2, 1, 0).copy())
    assert read_image(itk).ndim == 2 and np.array_equal(read_image(itk).data[0, 0], array.squeeze())


def test_two_thin_axes_stay_a_volume_and_resampled_slices_keep_their_plane(tmp_path):
    assert read_image((np.ones((5, 1, 1)), np.eye(4))).grid.shape == (5, 1, 1)
    image = read_image((np.ones((8, 6)), affine_of("oblique", 3)))
    small = Image(image.data[..., ::2, ::2], image.grid.shrink((2, 2)), image.slice_affine)
    back = read_image(write_image(small, tmp_path / "a.nii"))
    assert torch.allclose(back.grid.affine, small.grid.affine, atol=1e-4)
    normal = torch.linalg.cross(*basis(image.slice_affine).T)
    assert abs(float(normal @ (back.slice_affine - image.slice_affine)[:3, 3])) < 1e-4


def test_objects_in_memory(tmp_path):
    image = make(3)
    assert read_image(image) is image
    array = np.arange(120.0).reshape(6, 5, 4)
    for source in [
        (array, np.eye(4)),
        (torch.from_numpy(array), torch.eye(4)),
        (array[..., ::-1][..., ::-1], np.eye(4).tolist()),
    ]:
        assert torch.equal(read_image(source).data[0, 0], torch.from_numpy(array).float())
    assert read_image((array[..., 0], np.eye(3))).slice_affine is None
    assert read_image((array[..., 0], np.eye(4))).slice_affine is not None
    view = (np.arange(8, dtype=np.uint8).reshape(2, 4), np.eye(3))
    assert read_image(view).data.dtype == torch.uint8
    itk = sitk.GetImageFromArray(array)
    itk.SetOrigin((1, 2, 3))
    itk.SetDirection(rotation(3).ravel())
    got = read_image(itk)
    assert np.allclose(got.grid.to_world(torch.tensor([[[3.0, 2, 1]]]).double())[0, 0], lps_point(itk, (3, 2, 1)))
    for bad, error in [
        ((array, np.eye(3)), GeometryError),
        ((array[None], np.eye(4)), GeometryError),
        (3, FormatError),
        ((array, "x"), FormatError),
        ((array + 1j, np.eye(4)), FormatError),
        (None, FormatError),
        ((array, np.full((4, 4), np.nan)), GeometryError),
        ((array[:0], np.eye(4)), FormatError),
        ((array[..., 0], np.full((4, 4), np.nan)), GeometryError),
        ((array[..., 0], np.zeros((4, 4))), GeometryError),
        ((np.array([["a", "b"]]), np.eye(3)), FormatError),
        ((array,), FormatError),
    ]:
        with pytest.raises(error, match=r"^moving: "):
            read_image(bad, name="moving")


def dicom(folder, heights, series="1.2.3", tilt=0.0):
    folder.mkdir(exist_ok=True)
    writer = sitk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    rng = np.random.default_rng(0)
    for n, z in enumerate(heights):
        image = sitk.GetImageFromArray(rng.integers(0, 900, (6, 8)).astype(np.int16) + 10 * n)
        image = sitk.JoinSeries(image)
        image.SetSpacing((0.5, 0.75, 1.0))
        tags = {
            "0008|0060": "CT",
            "0020|000e": series,
            "0020|000d": "1.2.9",
            "0020|0013": str(n + 1),
            "0008|0018": f"{series}.{n}",
            "0020|0032": f"-10\\{20 + tilt * z}\\{z}",
            "0020|0037": "1\\0\\0\\0\\1\\0",
        }
        for tag, value in tags.items():
            image.SetMetaData(tag, value)
        writer.SetFileName(str(folder / f"{series}-{len(heights) - n}.dcm"))
        writer.Execute(image)


def test_dicom_series(tmp_path):
    dicom(tmp_path / "d", [5.0, 7.5, 10.0, 12.5])
    image = read_image(tmp_path / "d")
    assert image.grid.shape == (8, 6, 4) and image.data.dtype == torch.int16
    expected = torch.tensor([[-0.5, 0, 0, 10], [0, -0.75, 0, -20], [0, 0, 2.5, 5], [0, 0, 0, 1]]).double()
    assert torch.allclose(image.grid.affine[0], expected, atol=1e-6)
    rng = np.random.default_rng(0)
    for n in range(4):
        assert np.array_equal(image.data[0, 0, :, :, n].numpy(), rng.integers(0, 900, (6, 8)).T + 10 * n)
    dicom(tmp_path / "t", [0.0, 2.0, 4.0], tilt=0.25)
    assert torch.allclose(read_image(tmp_path / "t").grid.affine[0, :3, 2], torch.tensor([0, -0.5, 2.0]).double(), atol=1e-6)
    dicom(tmp_path / "gap", [0.0, 2.0, 6.0, 8.0])
    with pytest.raises(GeometryError, match=r"fixed: .*slices are missing or unevenly spaced"):
        read_image(tmp_path / "gap", name="fixed")
    dicom(tmp_path / "d", [0.0, 1.0], series="1.2.4")
    with pytest.raises(FormatError, match=r"holds 2 DICOM series: .*1.2.3.* \(4 files\), .*1.2.4.* \(2 files\)"):
        read_image(tmp_path / "d")
    (tmp_path / "none").mkdir()
    with pytest.raises(FormatError, match=r"is a folder without DICOM files"):
        read_image(tmp_path / "none")


def test_errors_name_the_file_and_the_cure(tmp_path):
    def refuses(name, content, match, error=FormatError):
        path = tmp_path / name
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(error, match=match) as caught:
            read_image(path, name="moving")
        assert str(path) in str(caught.value) and str(caught.value).startswith("moving: ") and "\n" not in str(caught.value)

    nib.Nifti1Image(np.random.default_rng(0).normal(size=(20, 20, 20)), np.eye(4)).to_filename(tmp_path / "ok.nii")
    plain = (tmp_path / "ok.nii").read_bytes()
    packed = gzip.compress(plain)
    refuses("gone.nii", None, "does not exist")
    refuses("a.xyz", b"1", r"none of the known suffixes \.nii\.gz, ")
    refuses("empty.nii.gz", b"", "is empty")
    refuses("cut.nii.gz", packed[: len(packed) // 2], "damaged or truncated")
    refuses("cut.nii", plain[:5000], "truncated: its header promises 64000 bytes of voxels and 4648 at most are there")
    refuses("cut2.nii.gz", gzip.compress(plain[:5000]), "truncated")
    refuses("text.nii", b"hello " * 100, "not a readable NIfTI")
    refuses("text.mgz", b"hello " * 100, "not a readable MGH")
    refuses("text.png", b"hello " * 100, "not a readable .png image")
    refuses("text.nrrd", b"hello " * 100, "not a readable .nrrd image")
    image = nib.Nifti1Image(np.ones((4, 4, 4), np.complex64), np.eye(4))
    refuses("complex.nii", image.to_bytes(), "complex64")
    image = nib.Nifti1Image(np.ones((4, 4, 4), np.uint8), np.eye(4))
    for value, match in ((np.nan, "NaN or infinity"), (0, "singular")):
        image.header["srow_x"] = value
        blob = bytearray(nib.Nifti1Image(np.ones((4, 4, 4), np.uint8), np.eye(4)).to_bytes())
        blob[280:296] = np.full(4, value, "<f4").tobytes()
        refuses("affine.nii", bytes(blob), match, GeometryError)


def test_small_files_that_unpack_to_much(tmp_path):
    """Only what the header speaks of is unpacked, and a header that speaks of more than can be in the file is found out at once."""
    image = nib.Nifti1Image(np.arange(24, dtype=np.int16).reshape(2, 3, 4), np.eye(4))
    (tmp_path / "bomb.nii.gz").write_bytes(gzip.compress(image.to_bytes() + bytes(300_000_000), 9))
    tracemalloc.start()
    found = read_image(tmp_path / "bomb.nii.gz")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert np.array_equal(found.data[0, 0], image.dataobj) and peak < 20_000_000
    header = image.header.copy()
    header.set_data_shape((30000, 30000, 30000))
    (tmp_path / "promise.nii.gz").write_bytes(gzip.compress(header.binaryblock + bytes(1000)))
    with pytest.raises(FormatError, match="truncated: its header promises 54000000000000 bytes"):
        read_image(tmp_path / "promise.nii.gz")


def test_members_and_extensions_of_packed_files(tmp_path):
    """As bgzip and DICOM converters write them: several members; a header that goes on for longer than any other."""
    image = nib.Nifti1Image(np.arange(60, dtype=np.int16).reshape(3, 4, 5), np.diag([2.0, 3, 4, 1]))
    image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"x" * 200_000))
    blob = image.to_bytes()
    (tmp_path / "a.nii.gz").write_bytes(b"".join(gzip.compress(blob[i: i + 70_000]) for i in range(0, len(blob), 70_000)))
    found = read_image(tmp_path / "a.nii.gz")
    assert np.array_equal(found.data[0, 0], image.dataobj) and np.allclose(found.grid.affine[0], image.affine)
    packed = bytearray(gzip.compress(blob))
    packed[-6] ^= 1  # the sum that is checked
    (tmp_path / "b.nii.gz").write_bytes(packed)
    with pytest.raises(FormatError, match="damaged or truncated"):
        read_image(tmp_path / "b.nii.gz")


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".tif", ".bmp", ".nrrd", ".mha", ".nii", ".nii.gz", ".mgh", ".mgz"])
def test_truncated_files_are_refused(tmp_path, suffix):
    image = Image(torch.randint(0, 255, (1, 1, 40, 40), dtype=torch.uint8), Grid((40, 40), torch.eye(3)))
    whole = write_image(image, tmp_path / f"a{suffix}").read_bytes()
    assert read_image(tmp_path / f"a{suffix}").grid.shape == (40, 40)
    for share in (0.1, 0.5, 0.9):
        (tmp_path / f"cut{suffix}").write_bytes(whole[: int(len(whole) * share)])
        with pytest.raises(FormatError):
            read_image(tmp_path / f"cut{suffix}")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("suffix", [".nii", ".nii.gz", ".mgh", ".hdr", ".nrrd", ".mha", ".png", ".tif"])
def test_mutated_bytes_raise_only_our_errors(tmp_path, suffix):
    image = make(2, torch.uint8) if suffix in (".png", ".tif") else make(3, torch.int16)
    source = tmp_path / f"a{suffix}"
    if suffix == ".hdr":
        nib.Nifti1Pair(image.data[0, 0].numpy(), np.eye(4)).to_filename(source)
    else:
        write_image(image, source)
    whole, rng, refused = source.read_bytes(), np.random.default_rng(5), 0
    for _ in range(60):
        blob = bytearray(whole)
        for at in rng.integers(0, min(len(blob), 360), rng.integers(1, 6)):
            blob[at] = rng.integers(256)
        source.write_bytes(bytes(blob))
        try:
            assert math.prod(read_image(source, volume=0).grid.shape) < 1e7
        except RegkitError as error:
            assert "\n" not in str(error)
            refused += 1
    assert refused > 0


def test_writing_is_deterministic_and_refuses_politely(tmp_path):
    image = make(3)
    first = write_image(image, tmp_path / "a.nii.gz").read_bytes()
    assert write_image(image, tmp_path / "b.nii.gz").read_bytes() == first
    assert first[3:8] == bytes(5)  # gzip: no flags (so no name), no time
    with pytest.raises(OutputError, match=r"a.nii.gz exists; .*--overwrite"):
        write_image(image, tmp_path / "a.nii.gz")
    write_image(image.with_data(image.data + 1), tmp_path / "a.nii.gz", overwrite=True)
    assert torch.equal(read_image(tmp_path / "a.nii.gz").data, image.data + 1)
    with pytest.raises(FormatError, match=r"no suffix that can be written; use one of .nii.gz, "):
        write_image(image, tmp_path / "a.mhd")
    with pytest.raises(GeometryError, match=r"batch of 2"):
        write_image(image.with_data(image.data.repeat(2, 1, 1, 1, 1)), tmp_path / "c.nii")
    with pytest.raises(FormatError, match=r"float32 voxels|channels"):
        write_image(make(3, channels=2), tmp_path / "c.mgz")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.nii.gz", "b.nii.gz"]


def test_nifti_path_imports_no_simpleitk(tmp_path):
    path = write_image(make(3), tmp_path / "a.nii.gz")
    code = (
        "import sys, regkit.io as r; assert not {'SimpleITK', 'nibabel', 'isal'} & set(sys.modules); "
        f"from regkit.space import Matrix; i = r.read_image({str(path)!r}); "
        f"r.write_image(i, {str(tmp_path / 'b.nii')!r}); r.write_transform(Matrix.identity(3), {str(tmp_path / 't.tfm')!r}); "
        "assert 'SimpleITK' not in sys.modules"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("size", [0, 1, 999, 1000, 1001, 3500])
def test_gzip_in_pieces_is_one_member_for_everybody(size, monkeypatch):
    monkeypatch.setattr(packing, "_PIECE", 1000)
    blob = bytes(k * k % 251 for k in range(size))

    def pack(blob, head):
        file = io.BytesIO()
        packing.pack(blob[:head], memoryview(blob[head:]), file)
        return file.getvalue()

    packed = pack(blob, 352)
    reader = zlib.decompressobj(31)  # one member only, as simple readers have it
    assert reader.decompress(packed) == blob and reader.eof and not reader.unused_data
    assert gzip.decompress(packed) == blob and pack(blob, 352) == pack(blob, size) == packed


def test_other_readers_read_a_scan_packed_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(packing, "_PIECE", 1000)
    data = torch.arange(2400, dtype=torch.int16).reshape(1, 1, 10, 12, 20)
    write_image(Image(data, Grid((10, 12, 20), torch.eye(4, dtype=torch.float64)[None])), tmp_path / "a.nii.gz")
    assert (data[0, 0].numpy() == sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "a.nii.gz"))).T).all()
    assert (np.asarray(nib.load(tmp_path / "a.nii.gz").dataobj) == data[0, 0].numpy()).all()


def test_packed_bytes_after_the_voxels_are_checked_too(tmp_path):
    """The sum of a packed file stands at its end: without it nobody knows whether the voxels are right."""
    nib.Nifti1Image(np.random.default_rng(0).integers(0, 9, (20, 20, 20)).astype(np.uint8), np.eye(4)).to_filename(tmp_path / "a.nii")
    blob = gzip.compress((tmp_path / "a.nii").read_bytes() + bytes(300_000))
    (tmp_path / "a.nii.gz").write_bytes(blob)
    assert read_image(tmp_path / "a.nii.gz").grid.shape == (20, 20, 20)
    for spoilt in (blob[:-8] + b"????" + blob[-4:], blob[:-10]):
        (tmp_path / "a.nii.gz").write_bytes(spoilt)
        with pytest.raises(FormatError, match="may be damaged or truncated"):
            read_image(tmp_path / "a.nii.gz")
