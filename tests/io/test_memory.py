"""Scans for which memory has no room are refused by their headers, in a sentence."""

import gzip
import itertools
import sys
import tracemalloc

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
import torch

from regkit.errors import FormatError
from regkit.io import memory, read_image
from regkit.io.doctor import examine
from regkit.io.memory import check_room, free
from regkit.io.packing import begin
from regkit.io.repair import repaired

SHAPE = (300, 200, 100)  # 12 MB of int16
NO_ROOM = r"{name}: .*: its voxels take 12 MB, and 10 MB of memory are there; read it on a machine with more, or crop or resample it"


@pytest.fixture
def little(monkeypatch):
    monkeypatch.setattr(memory, "free", lambda *, swap=False: 10_000_000)
    monkeypatch.setattr(memory, "SMALL", 1_000_000)


@pytest.fixture
def scans(tmp_path):
    voxels = np.zeros(SHAPE, np.int16)
    image = nib.Nifti1Image(voxels, np.diag([2.0, 2, 2, 1]))
    for name in ("a.nii", "a.nii.gz", "a.mgz"):
        nib.save(image if "nii" in name else nib.MGHImage(voxels, image.affine), tmp_path / name)
    nib.Nifti1Pair(voxels, image.affine).to_filename(tmp_path / "b.img")
    for name in ("a.mha", "a.nrrd", "a.tif"):
        array = voxels.T if name != "a.tif" else np.zeros((3000, 2000), np.int16)
        sitk.WriteImage(sitk.GetImageFromArray(array), str(tmp_path / name), useCompression=name != "a.tif")
    return tmp_path


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz", "a.mgz", "b.img", "a.mha", "a.nrrd", "a.tif"])
def test_what_has_no_room_is_refused(name, scans, little):
    tracemalloc.start()
    with pytest.raises(FormatError, match=NO_ROOM.format(name="moving")) as caught:
        read_image(scans / name, name="moving")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2_000_000 and name in str(caught.value) and "\n" not in str(caught.value)


def test_a_series_has_room_or_not_as_a_whole(tmp_path, little, monkeypatch):
    from regkit.io import itk

    monkeypatch.setattr(itk, "series", lambda folder: {"1": ("a.nrrd",) * 4})
    monkeypatch.chdir(tmp_path)
    sitk.WriteImage(sitk.GetImageFromArray(np.zeros((1, 1500, 1000), np.int16)), "a.nrrd", useCompression=True)
    with pytest.raises(FormatError, match=NO_ROOM.format(name="fixed")):
        read_image(tmp_path, name="fixed")


def test_images_of_nibabel_and_copies_in_another_type(scans, little):
    with pytest.raises(FormatError, match="image: its voxels take 12 MB, and 10 MB of"):
        read_image(nib.load(scans / "a.nii.gz"))
    with pytest.raises(FormatError, match="image: its voxels take 12 MB"):
        read_image((np.zeros((100, 150, 200), np.float64), np.eye(4)))  # which become float32
    image = read_image((np.zeros(SHAPE, np.int16), np.eye(4)))  # taken as it is
    assert image.data.dtype == torch.int16


@pytest.mark.parametrize("name", ["a.nii.gz", "a.mgz", "a.mha"])
def test_corrected_copies_need_room_too(name, scans, little):
    with pytest.raises(FormatError, match=NO_ROOM.format(name="scan")):
        repaired(scans / name, scans / f"out{name.removeprefix('a')}")
    assert not list(scans.glob("out*"))


@pytest.mark.parametrize("name", ["bomb.nii.gz", "bomb.mgz", "bomb.hdr"])
def test_a_copy_unpacks_what_the_header_speaks_of(name, tmp_path):
    """A small file that holds far more than its header says: what lies behind the voxels is not the scan's."""
    voxels = np.arange(24, dtype=np.int16).reshape(2, 3, 4)
    if name == "bomb.hdr":
        nib.Nifti1Pair(voxels, np.eye(4)).to_filename(tmp_path / name)
        path = tmp_path / "bomb.img"
        path.write_bytes(gzip.compress(path.read_bytes() + bytes(300_000_000), 9))
    else:
        image = (nib.MGHImage if "mgz" in name else nib.Nifti1Image)(voxels, np.eye(4))
        (tmp_path / name).write_bytes(gzip.compress(image.to_bytes() + bytes(300_000_000), 9))
    output = tmp_path / ("out.mgz" if "mgz" in name else "out.nii")
    tracemalloc.start()
    repaired(tmp_path / name, output)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert np.array_equal(read_image(output).data[0, 0], voxels) and peak < 20_000_000


def test_a_header_may_be_a_member_of_its_own(tmp_path):
    image = nib.Nifti1Image(np.arange(60, dtype=np.int16).reshape(3, 4, 5), np.diag([2.0, 3, 4, 1]))
    blob = image.to_bytes()
    for name, parts, rest in (("a", (352,), b""), ("b", (200, 352), b""), ("c", (300,), b"no gzip"), ("d", (len(blob),), bytes(9))):
        packed = b"".join(gzip.compress(blob[i:j]) for i, j in itertools.pairwise([0, *parts, len(blob)]))
        (tmp_path / f"{name}.nii.gz").write_bytes(packed + rest)
        assert begin(tmp_path / f"{name}.nii.gz", 420) == blob[:420]
        assert [one.code for one in examine(tmp_path / f"{name}.nii.gz")] == ["unit-missing"]
    (tmp_path / "short").write_bytes(gzip.compress(blob[:100]) + b"no gzip" * 10**6)
    assert begin(tmp_path / "short", 420) == blob[:100]


def test_there_is_room_where_nobody_can_tell(monkeypatch):
    check_room(10**6, "scan")
    for left in (None, 10**18):
        monkeypatch.setattr(memory, "free", lambda *, swap=False, left=left: left)
        check_room(10**17, "scan")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="read from /proc")
def test_what_there_is_counts_control_groups(tmp_path, monkeypatch):
    folder = tmp_path / "a" / "b"
    folder.mkdir(parents=True)
    for place, most, used in ((tmp_path / "a", "2000000000", "500000000"), (folder, "max", "100")):
        (place / "memory.max").write_text(most + "\n")
        (place / "memory.current").write_text(used + "\n")
        (place / "memory.stat").write_text("anon 1\ninactive_file 7\n")
    (tmp_path / "own").write_text("0::/a/b\n")
    assert memory._cgroups(tmp_path, tmp_path / "own") == [1_500_000_007]
    left, more = free(), free(swap=True)
    assert left is not None and more is not None and 0 < left < 10**15 and more >= 0.9 * left
    monkeypatch.setattr(memory, "_cgroups", lambda: [123])
    assert free() == 123 == free(swap=True)
