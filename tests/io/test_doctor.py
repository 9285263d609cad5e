"""The header doctor: every finding from a file made for it, silence about its good neighbour, and copies that are mended."""

import gzip
import os
import struct
import time

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from regkit.errors import FormatError, GeometryError, OptionError, OutputError, RegkitError
from regkit.io import read_image
from regkit.io.doctor import examine
from regkit.io.findings import FIXES, of_mask
from regkit.io.repair import repaired, straight
from regkit.space import Grid

SHAPE = {2: (12, 14), 3: (12, 14, 16)}
RAS = np.array([[2.0, 0, 0, -11], [0, 2.5, 0, -20], [0, 0, 3, 5], [0, 0, 0, 1]])
SHEARED = RAS @ np.array([[1, 0.2, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])


def voxels(ndim=3):
    return np.random.default_rng(0).integers(-50, 100, SHAPE[ndim]).astype(np.int16)


def turned(degrees=20.0):
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    return np.array([[c, -s, 0, 0], [s, c, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]) @ RAS


def shifted(mm):
    moved = RAS.copy()
    moved[0, 3] += mm
    return moved


def scaled(factor):
    return np.diag([factor, factor, factor, 1.0]) @ RAS


def put(offset, layout, *values):
    return lambda blob: struct.pack_into(f"<{layout}", blob, offset, *values)


def nifti(path, affine=RAS, *, sform=1, qform=1, q=None, unit="mm", data=None, edit=()):
    """A NIfTI-1 file with these codes and places; edit: functions that change its bytes."""
    image = nib.Nifti1Image(voxels() if data is None else data, affine)
    image.set_sform(affine, sform)
    image.set_qform(affine if q is None else q, qform)
    image.header.set_xyzt_units(unit)
    blob = bytearray(image.to_bytes())
    for change in edit:
        change(blob)
    path.write_bytes(gzip.compress(bytes(blob)) if path.name.endswith(".gz") else bytes(blob))
    return path


def codes(found):
    return [one.code for one in found]


NAN4, ZERO4 = put(280, "4f", *[np.nan] * 4), put(280, "4f", *[0.0] * 4)
# what is wrong → (how to make the file, the finding and its severity; how to make the neighbour in which it is right)
CASES = {
    "codes 0": (dict(sform=0, qform=0), "no-orientation", "doubtful", dict(sform=0)),
    "sform elsewhere": (dict(q=shifted(9)), "sform-qform", "doubtful", dict(q=shifted(0.01))),
    "sform turned": (dict(q=turned()), "sform-qform", "doubtful", dict(affine=turned())),
    "sform for a template": (dict(q=shifted(9), sform=4), "sform-qform", "doubtful", dict(sform=4)),
    "qfac": (dict(q=np.diag([-1, 1, 1, 1.0]) @ RAS), "handedness", "wrong", dict(affine=np.diag([-1, 1, 1, 1.0]) @ RAS)),
    "NaN in the sform": (dict(edit=[NAN4]), "sform-unusable", "wrong", dict(edit=[NAN4], sform=0)),
    "singular sform": (dict(edit=[ZERO4], qform=0), "sform-unusable", "wrong", dict(edit=[ZERO4], sform=0)),
    "no rotation beside": (dict(edit=[put(256, "3f", 9, 9, 9)]), "qform-unusable", "doubtful",
                           dict(edit=[put(256, "3f", 9, 9, 9)], qform=0)),
    "no rotation alone": (dict(edit=[put(256, "3f", 9, 9, 9)], sform=0), "qform-unusable", "wrong", dict(sform=0)),
    "negative pixdim": (dict(edit=[put(80, "f", -2.0)]), "voxel-size", "doubtful", dict()),
    "negative pixdim alone": (dict(edit=[put(84, "f", -2.5)], sform=0), "voxel-size", "doubtful", dict(sform=0)),
    "zero pixdim beside": (dict(edit=[put(88, "f", 0.0)], qform=0), "voxel-size", "doubtful", dict(qform=0)),
    "NaN pixdim beside": (dict(edit=[put(88, "f", np.nan)], qform=0), "voxel-size", "doubtful", dict(qform=0)),
    "pixdim of another": (dict(edit=[put(80, "3f", 1, 1, 1)], qform=0), "voxel-size", "doubtful",
                          dict(edit=[put(80, "3f", 2.001, 2.5, 3)], qform=0)),
    "zero pixdim alone": (dict(edit=[put(80, "f", 0.0)], sform=0), "voxel-size-missing", "wrong", dict(sform=0)),
    "infinite pixdim alone": (dict(edit=[put(80, "f", np.inf)], sform=0, qform=0), "voxel-size-missing", "wrong", dict(sform=0)),
    "no unit": (dict(unit="unknown"), "unit-missing", "note", dict()),
    "a unit that is none": (dict(edit=[put(123, "B", 6)]), "unit-missing", "note", dict(edit=[put(123, "B", 2 | 8)])),
    "micrometres": (dict(affine=scaled(1000), unit="micron"), "unit-other", "wrong", dict()),
    "micrometres by mistake": (dict(unit="micron"), "unit-other", "wrong", dict()),
    "metres": (dict(affine=scaled(0.001), unit="meter"), "unit-other", "wrong", dict()),
    "metres as mm": (dict(affine=scaled(0.001)), "small-scan", "doubtful", dict(affine=scaled(0.1))),
    "micrometres as mm": (dict(affine=scaled(500)), "large-scan", "doubtful", dict(affine=scaled(3))),
    "long voxels": (dict(affine=np.diag([0.2, 0.2, 5, 1])), "uneven-voxels", "note", dict(affine=np.diag([0.5, 0.5, 5, 1]))),
    "one axis in another unit": (dict(affine=np.diag([0.2, 0.2, 50, 1])), "uneven-voxels", "doubtful", dict()),
    "sheared": (dict(affine=SHEARED, qform=0), "shear", "doubtful", dict(affine=turned(33))),
    "a little sheared": (dict(affine=RAS + np.eye(4, k=1) * [[0.01], [0], [0], [0]], qform=0), "shear", "note", dict(affine=turned(77))),
    "LAS": (dict(affine=np.diag([-1, 1, 1, 1.0]) @ RAS), "mirrored", "note", dict(affine=np.diag([-1, -1, 1, 1.0]) @ RAS)),
    "far": (dict(affine=shifted(5000)), "far-origin", "doubtful", dict(affine=shifted(500))),
    "a fourth axis of one": (dict(data=voxels()[..., None]), "last-axis", "note", dict(data=np.stack([voxels()] * 2, -1))),
    "five axes": (dict(data=voxels()[..., None, None]), "last-axis", "note", dict()),
    "(X, Y, 1)": (dict(data=voxels()[..., :1]), "slice", "note", dict(data=voxels(2))),
}


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
@pytest.mark.parametrize("case", CASES)
def test_each_finding_and_its_neighbour(tmp_path, case, suffix):
    bad, code, severity, good = CASES[case]
    found = {one.code: one for one in examine(nifti(tmp_path / f"bad{suffix}", **bad))}
    assert found[code].severity == severity
    assert all(text.strip() and "\n" not in text for text in found[code].as_dict().values())
    assert code not in codes(examine(nifti(tmp_path / f"good{suffix}", **good)))


def test_only_what_is_there_is_found(tmp_path):
    """One fault, one finding; a good file none."""
    also = {"codes 0": {"mirrored"}, "infinite pixdim alone": {"no-orientation"}}
    for case, (bad, code, _, _) in CASES.items():
        found = set(codes(examine(nifti(tmp_path / "a.nii", **bad))))
        assert found - also.get(case, set()) == {code}, case
    assert examine(nifti(tmp_path / "a.nii")) == []
    assert examine(nifti(tmp_path / "b.nii.gz", data=voxels(2))) == []
    nib.Nifti2Image(voxels(), RAS).to_filename(tmp_path / "c.nii")
    assert codes(examine(tmp_path / "c.nii")) == ["unit-missing"]


@pytest.mark.parametrize("case", CASES)
def test_a_copy_is_clean_where_it_can_be_and_keeps_every_voxel(tmp_path, case):
    bad, code, _, _ = CASES[case]
    path = nifti(tmp_path / "bad.nii", **bad)
    before = path.read_bytes()
    if code == "voxel-size-missing":
        with pytest.raises(GeometryError, match="nothing in its header says how large its voxels are"):
            repaired(path, tmp_path / "copy.nii")
        assert sorted(p.name for p in tmp_path.iterdir()) == ["bad.nii"]
        return
    units = {"small-scan": "m", "large-scan": "um"}.get(code)
    corrected = repaired(path, tmp_path / "copy.nii.gz", units=units, straighten=code == "shear")
    assert path.read_bytes() == before
    assert corrected == ((code,) if code in FIXES else ())
    assert not set(codes(examine(tmp_path / "copy.nii.gz"))) & set(FIXES)
    blob = gzip.decompress((tmp_path / "copy.nii.gz").read_bytes())
    assert blob[348:] == before[348:]
    image = read_image(tmp_path / "copy.nii.gz", volume=0)
    assert np.array_equal(image.data[0, 0].numpy().ravel(), np.asarray(nib.Nifti1Image.from_bytes(blob).dataobj).ravel())
    if code not in ("unit-other", "small-scan", "large-scan", "shear", "sform-unusable", "qform-unusable"):
        assert torch.allclose(image.grid.affine, read_image(path, volume=0).grid.affine, atol=1e-4)
    repaired(tmp_path / "copy.nii.gz", tmp_path / "again.nii.gz")
    assert (tmp_path / "again.nii.gz").read_bytes() == (tmp_path / "copy.nii.gz").read_bytes()


@pytest.mark.parametrize("case", ["codes 0", "sform elsewhere", "qfac", "singular sform", "NaN in the sform", "micrometres", "metres",
                                  "micrometres by mistake", "a fourth axis of one", "pixdim of another"])
def test_nibabel_and_itk_read_a_copy_alike(tmp_path, case):
    repaired(nifti(tmp_path / "bad.nii", **CASES[case][0]), tmp_path / "copy.nii")
    seen, itk, ours = nib.load(tmp_path / "copy.nii"), sitk.ReadImage(str(tmp_path / "copy.nii")), read_image(tmp_path / "copy.nii")
    assert np.allclose(seen.affine, ours.grid.affine[0]) and np.allclose(seen.get_sform(), seen.get_qform(), atol=1e-4)
    for index in ((0, 0, 0), (11, 13, 15)):
        lps = itk.TransformIndexToPhysicalPoint(index)
        assert np.allclose(np.array(lps) * [-1, -1, 1], (seen.affine @ [*index, 1])[:3], atol=1e-3)


def test_what_a_copy_says_of_units_and_places(tmp_path):
    def copy(name, **made):
        repaired(nifti(tmp_path / f"{name}.nii", **made), tmp_path / f"{name}_copy.nii")
        return nib.load(tmp_path / f"{name}_copy.nii")

    assert np.allclose(copy("um", affine=scaled(1000), unit="micron").affine, RAS, atol=1e-4)
    assert np.allclose(copy("m", affine=scaled(0.001), unit="meter").affine, RAS, atol=1e-4)
    assert np.allclose(copy("mistaken", unit="micron").affine, RAS)  # as micrometres the scan would measure 0.05 mm
    seen = copy("time", unit=None, edit=[put(123, "B", 3 | 8)])
    assert seen.header.get_xyzt_units() == ("mm", "sec")
    assert np.allclose(copy("qform", edit=[NAN4]).affine, RAS, atol=1e-4)
    seen = copy("template", q=shifted(9), sform=4)
    assert (int(seen.header["sform_code"]), int(seen.header["qform_code"])) == (4, 4)
    seen = copy("sheared", affine=SHEARED, q=shifted(9))
    assert np.allclose(seen.affine, SHEARED) and int(seen.header["qform_code"]) == 0


def test_straight_axes_keep_the_middle_and_are_the_nearest():
    turned_back = straight(SHEARED, SHAPE[3])
    middle = np.array([(n - 1) / 2 for n in SHAPE[3]] + [1.0])
    assert np.allclose(turned_back @ middle, SHEARED @ middle)
    lengths = np.linalg.norm(SHEARED[:3, :3], axis=0)
    axes = turned_back[:3, :3] / lengths
    assert np.allclose(axes.T @ axes, np.eye(3))
    near = np.linalg.norm(axes - SHEARED[:3, :3] / lengths)
    for seed in range(50):  # no rotation nearby is nearer
        twist, _ = np.linalg.qr(np.eye(3) + 0.05 * np.random.default_rng(seed).normal(size=(3, 3)))
        twist *= np.sign(np.diag(twist))
        assert np.linalg.norm(twist @ axes - SHEARED[:3, :3] / lengths) >= near - 1e-12


@pytest.mark.parametrize("order", "<>")
def test_extensions_byte_order_and_nifti_2_survive(tmp_path, order):
    for kind in (nib.Nifti1Image, nib.Nifti2Image):
        header = kind.header_class(endianness=order)
        image = kind(voxels().astype(f"{order}i2"), RAS, header)
        image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"kept as it is"))
        image.set_sform(RAS, 1)
        image.set_qform(shifted(9), 1)
        image.to_filename(tmp_path / "a.nii")
        assert repaired(tmp_path / "a.nii", tmp_path / "b.nii", overwrite=True) == ("sform-qform", "unit-missing")
        seen = nib.load(tmp_path / "b.nii")
        assert type(seen) is kind and seen.header.endianness == order and np.array_equal(np.asarray(seen.dataobj), voxels())
        assert seen.header.extensions[0].get_content() == b"kept as it is"
        assert (tmp_path / "b.nii").read_bytes()[540:] == (tmp_path / "a.nii").read_bytes()[540:]


def test_pairs_of_files_and_analyze(tmp_path):
    nib.Nifti1Pair(voxels(), RAS).to_filename(tmp_path / "pair.hdr")
    nib.Spm99AnalyzeImage(voxels(), np.diag([-2, 2, 3, 1.0])).to_filename(tmp_path / "old.hdr")
    for half in (".hdr", ".img"):
        assert codes(examine(tmp_path / f"pair{half}")) == ["unit-missing"]
        assert set(codes(examine(tmp_path / f"old{half}"))) == {"no-orientation", "unit-missing", "mirrored"}
        for name in ("pair", "old"):
            repaired(tmp_path / f"{name}{half}", tmp_path / f"{name}.nii.gz", overwrite=True)
            assert set(codes(examine(tmp_path / f"{name}.nii.gz"))) <= {"mirrored"}
            one, other = read_image(tmp_path / f"{name}{half}"), read_image(tmp_path / f"{name}.nii.gz")
            assert torch.equal(one.data, other.data) and torch.allclose(one.grid.affine, other.grid.affine, atol=1e-4)
    (tmp_path / "pair.hdr").unlink()
    with pytest.raises(FormatError, match=r"pair\.hdr is not there; bring it back"):
        examine(tmp_path / "pair.img")


@pytest.mark.parametrize("dims", [(-1, -1, -1, -1), (3, 4, 0, 6)], ids=["no axes", "an empty axis"])
def test_a_shape_without_voxels_is_no_header(tmp_path, dims):
    nib.Nifti1Pair(voxels(), RAS).to_filename(tmp_path / "a.hdr")
    blob = bytearray((tmp_path / "a.hdr").read_bytes())
    struct.pack_into("<4h", blob, 40, *dims)
    (tmp_path / "a.hdr").write_bytes(blob)
    for door in (examine, read_image):
        with pytest.raises(FormatError, match=r"a\.hdr.* shape \("):
            door(tmp_path / "a.hdr")


@pytest.mark.parametrize("suffix", [".mgh", ".mgz"])
def test_freesurfers_flag(tmp_path, suffix):
    blob = bytearray(nib.MGHImage(voxels().astype(np.int32), RAS).to_bytes())
    write = gzip.compress if suffix == ".mgz" else bytes
    (tmp_path / f"good{suffix}").write_bytes(write(bytes(blob)))
    assert examine(tmp_path / f"good{suffix}") == []
    struct.pack_into(">h", blob, 28, 0)
    (tmp_path / f"bad{suffix}").write_bytes(write(bytes(blob)))
    assert set(codes(examine(tmp_path / f"bad{suffix}"))) == {"no-orientation", "mirrored"}
    assert repaired(tmp_path / f"bad{suffix}", tmp_path / "copy.mgz") == ("no-orientation",)
    assert codes(examine(tmp_path / "copy.mgz")) == ["mirrored"]
    one, other = read_image(tmp_path / f"bad{suffix}"), read_image(tmp_path / "copy.mgz")
    assert torch.equal(one.data, other.data) and torch.equal(one.grid.affine, other.grid.affine)
    struct.pack_into(">h", blob, 28, 1)
    struct.pack_into(">f", blob, 30, 0.0)
    (tmp_path / f"zero{suffix}").write_bytes(write(bytes(blob)))
    assert codes(examine(tmp_path / f"zero{suffix}")) == ["voxel-size-missing"]


def itk_file(path, **fields):
    """A NRRD or MetaImage whose header has these lines in place of its own; None leaves one out."""
    image = sitk.GetImageFromArray(voxels().T.copy())
    image.SetSpacing((2.0, 2.5, 3.0))
    sitk.WriteImage(image, str(path))
    head, mark, rest = path.read_bytes().partition(b"ElementDataFile" if path.suffix == ".mha" else b"\n\n")
    sign = " = " if path.suffix == ".mha" else ": "
    rows = [row for row in head.decode().split("\n") if row.split(sign)[0] not in fields]
    rows = [row for row in rows if row] + [f"{name}{sign}{value}" for name, value in fields.items() if value is not None]
    path.write_bytes(("\n".join(rows) + ("\n" if path.suffix == ".mha" else "")).encode() + mark + rest)
    return path


ITK = [
    ("a.nrrd", {}, None),
    ("a.nrrd", {"space": None, "space origin": None, "space directions": None, "spacings": "2 2.5 3"}, "no-orientation"),
    ("a.nrrd", {"space units": '"um" "um" "um"'}, "unit-other"),
    ("a.nrrd", {"space units": '"mm" "mm" "mm"'}, None),
    ("a.nrrd", {"space directions": "(0,0,0) (0,2,0) (0,0,3)"}, "voxel-size-missing"),
    ("a.nrrd", {"space directions": "(2,0,0) (0.5,2,0) (0,0,3)"}, "shear"),
    ("a.nrrd", {"space directions": "(2,0,0) (2,0,0) (0,0,3)"}, "place-unusable"),
    ("a.mha", {}, None),
    ("a.mha", {"ElementSpacing": None}, "no-orientation"),
    ("a.mha", {"ElementSpacing": "0 2 3"}, "voxel-size-missing"),
    ("a.mha", {"ElementSpacing": "-2 2 3"}, "voxel-size"),
    ("a.mha", {"TransformMatrix": "0 0 0 0 1 0 0 0 1"}, "place-unusable"),
    ("a.mha", {"ElementSpacing": "0.002 0.0025 0.003"}, "small-scan"),
]


@pytest.mark.parametrize(("name", "fields", "code"), ITK, ids=lambda v: str(v))
def test_nrrd_and_metaimage(tmp_path, name, fields, code):
    path = itk_file(tmp_path / name, **fields)
    found = [one for one in codes(examine(path)) if one != "mirrored"]
    assert found == ([] if code is None else [code])
    copy = tmp_path / f"copy{path.suffix}"
    if code in ("voxel-size-missing", "place-unusable"):
        with pytest.raises(RegkitError):
            read_image(path)
        with pytest.raises(GeometryError, match="nothing in its header"):
            repaired(path, copy)
        assert not copy.exists()
        return
    corrected = repaired(path, copy, straighten=True, units="m" if code == "small-scan" else None)
    assert corrected == (() if code is None else (code,)) and not set(codes(examine(copy))) & set(FIXES)
    one, other = read_image(path), read_image(copy)
    assert torch.equal(one.data, other.data) and one.data.dtype == other.data.dtype
    if code not in ("small-scan", "shear"):
        assert torch.allclose(one.grid.affine, other.grid.affine)


def test_pictures_and_dicom_have_no_findings_and_no_copies(tmp_path):
    sitk.WriteImage(sitk.GetImageFromArray(voxels(2).clip(0).astype(np.uint8)), str(tmp_path / "a.png"))
    assert examine(tmp_path / "a.png") == []
    with pytest.raises(FormatError, match="picture or DICOM, of which no corrected copy"):
        repaired(tmp_path / "a.png", tmp_path / "b.png")
    (tmp_path / "series").mkdir()
    for k in range(3):
        image = sitk.GetImageFromArray(np.full((1, 8, 9), k, np.uint16))
        image.SetSpacing((2.0, 2.0, 3.0))
        for key, value in (("0008|0060", "CT"), ("0020|000e", "1.2.3"), ("0020|000d", "1.2.4"), ("0020|0013", str(k)),
                           ("0020|0032", f"0\\0\\{3 * k}"), ("0020|0037", "1\\0\\0\\0\\1\\0"), ("0018|0050", "3")):
            image.SetMetaData(key, value)
        writer = sitk.ImageFileWriter()
        writer.KeepOriginalImageUIDOn()
        writer.SetFileName(str(tmp_path / "series" / f"{k}.dcm"))
        writer.Execute(image)
    scan = read_image(tmp_path / "series")
    assert scan.grid.shape == (9, 8, 3)
    assert examine(tmp_path / "series") == examine(tmp_path / "series", grid=scan.grid) == []
    far = Grid(scan.grid.shape, torch.diag(torch.tensor([1e3, 1e3, 1e3, 1.0])))
    assert codes(examine(tmp_path / "series", grid=far)) == ["large-scan"]


def _grid(affine, shape=SHAPE[3]):
    return Grid(shape, torch.from_numpy(affine))


def test_a_mask_against_its_scan():
    scan = _grid(RAS)
    assert of_mask(_grid(RAS), scan) == [] and of_mask(_grid(shifted(1e-4)), scan) == []
    for grid, code, severity in ((_grid(shifted(3)), "mask-place", "doubtful"), (_grid(shifted(900)), "mask-apart", "wrong"),
                                 (_grid(RAS @ np.diag([2, 2, 2, 1]), (6, 7, 8)), "mask-grid", "note"),
                                 (Grid((12, 14), torch.eye(3)), "mask-dimension", "wrong")):
        assert [(one.code, one.severity) for one in of_mask(grid, scan)] == [(code, severity)]
    flat = Grid((12, 14), torch.eye(3))
    assert of_mask(flat, flat) == []
    assert codes(of_mask(Grid((12, 14), torch.tensor([[1.0, 0, 2], [0, 1, 0], [0, 0, 1]])), flat)) == ["mask-place"]


def test_what_is_no_header_is_refused(tmp_path):
    good = nifti(tmp_path / "good.nii")
    blob = good.read_bytes()
    for name, content in (("short.nii", blob[:200]), ("short.nii.gz", gzip.compress(blob)[:40]), ("text.nii", b"hello " * 100),
                          ("text.mgz", b"hello " * 3), ("text.nrrd", b"hello " * 100), ("text.png", b"hello"), ("void.nii", b""),
                          ("what.xyz", b"1"), ("old.hdr", b"hello " * 100)):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(FormatError, match="scan: ") as caught:
            examine(tmp_path / name)
        assert "\n" not in str(caught.value) and name in str(caught.value)
    with pytest.raises(FormatError, match="does not exist"):
        examine(tmp_path / "gone.nii")


def test_truncated_voxels_are_not_copied(tmp_path):
    good = nifti(tmp_path / "good.nii")
    blob = good.read_bytes()
    (tmp_path / "cut.nii").write_bytes(blob[:3000])
    (tmp_path / "cut.nii.gz").write_bytes(gzip.compress(blob)[:3000])
    sitk.WriteImage(sitk.ReadImage(str(good)), str(tmp_path / "cut.mha"))
    (tmp_path / "cut.mha").write_bytes((tmp_path / "cut.mha").read_bytes()[:3000])
    before = sorted(p.name for p in tmp_path.iterdir())
    for name, out in (("cut.nii", "out.nii"), ("cut.nii.gz", "out.nii"), ("cut.mha", "out.mha")):
        assert "unit-missing" not in codes(examine(tmp_path / name))
        with pytest.raises(FormatError):
            repaired(tmp_path / name, tmp_path / out)
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_a_copy_has_a_place_of_its_own(tmp_path):
    path = nifti(tmp_path / "a.nii", q=shifted(9))
    before = path.read_bytes()
    (tmp_path / "link.nii").symlink_to(path)
    os.link(path, tmp_path / "hard.nii")
    for out in ("a.nii", "link.nii", "hard.nii"):
        with pytest.raises(OutputError, match="is the scan itself, which is never touched"):
            repaired(path, tmp_path / out, overwrite=True)
    (tmp_path / "mine.nii").write_bytes(b"mine")
    with pytest.raises(OutputError, match="exists"):
        repaired(path, tmp_path / "mine.nii")
    assert (tmp_path / "mine.nii").read_bytes() == b"mine" and path.read_bytes() == before
    repaired(path, tmp_path / "mine.nii", overwrite=True)
    assert examine(tmp_path / "mine.nii") == []
    for out in ("b.nrrd", "b.mgz", "b.png", "b"):
        with pytest.raises(OptionError, match=r"fix: b.*give a name that ends in \.nii or \.nii\.gz"):
            repaired(path, tmp_path / out)
    with pytest.raises(OptionError, match=r"units: 'cm' is not known; use one of mm, um, m"):
        repaired(path, tmp_path / "b.nii", units="cm")
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError):
        repaired(path, tmp_path / "file" / "b.nii")


FIELDS = {"dim": (40, "8h", st.integers(-2, 40)), "xyzt": (123, "B", st.integers(0, 255)), "codes": (252, "2h", st.integers(-1, 6)),
          "pixdim": (76, "8f", st.floats(width=32)), "quaternion": (256, "6f", st.floats(width=32)),
          "sform": (280, "12f", st.floats(width=32)), "scale": (112, "2f", st.floats(width=32))}
CHANGES = st.lists(st.sampled_from(sorted(FIELDS)).flatmap(
    lambda name: st.tuples(st.just(name), st.integers(0, 11), FIELDS[name][2])), max_size=6)


@given(CHANGES)
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_mutated_headers_are_examined_or_refused_and_copies_are_clean(tmp_path, changes):
    """Whatever a header says: findings or one of our errors; where a scan is read and nothing is wrong its grid is usable; a copy has
    nothing left that a copy mends, the same voxels, and is read."""
    path, copy = nifti(tmp_path / "a.nii", q=RAS, data=voxels()), tmp_path / "copy.nii"
    blob = bytearray(path.read_bytes())
    for name, at, value in changes:
        offset, layout, _ = FIELDS[name]
        kind, count = layout[-1], int(layout[:-1] or 1)
        struct.pack_into(f"<{kind}", blob, offset + struct.calcsize(kind) * (at % count), value)
    path.write_bytes(bytes(blob))
    try:
        found = examine(path)
    except FormatError:
        with pytest.raises(RegkitError):
            read_image(path, volume=0)
        return
    try:
        read_image(path, volume=0)
        readable = True
    except RegkitError:
        readable = False
    refused = [one.code for one in found if one.does == "refuses the scan"]
    assert not (readable and refused), refused
    try:
        repaired(path, copy, overwrite=True)
    except RegkitError:
        return
    left = {one.code for one in examine(copy)}
    if not left & {"small-scan", "large-scan", "far-origin", "uneven-voxels"}:  # single precision does not hold two places of such
        assert not left & set(FIXES) - {"shear"}
    assert copy.read_bytes()[348:] == bytes(blob)[348:]
    if readable:
        assert read_image(copy, volume=0).data.shape == read_image(path, volume=0).data.shape


def test_examining_is_quick(tmp_path):
    """The header only: a scan of 16 MB takes no longer than a small one."""
    path = nifti(tmp_path / "a.nii.gz", data=np.zeros((256, 256, 128), np.int16))
    examine(path)
    took = []
    for _ in range(20):
        began = time.perf_counter()
        examine(path)
        took.append(time.perf_counter() - began)
    assert min(took) < 0.005
