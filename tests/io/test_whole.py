"""Files that ITK would read wrongly, from elsewhere, or not survive: refused before it sees them."""

from __future__ import annotations

import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
import SimpleITK as sitk
from PIL import Image as Picture

from regkit.errors import FormatError
from regkit.io import read_image
from regkit.io.doctor import examine
from regkit.io.repair import repaired

VOXELS = np.arange(60, dtype=np.uint8)
RAW = VOXELS.tobytes()


def nrrd(path, *, sizes="5 4 3", encoding="raw", more="", data=RAW, end="\n"):
    head = ["NRRD0004", "type: uint8", "dimension: 3", f"sizes: {sizes}", f"encoding: {encoding}", *more.splitlines()]
    path.write_bytes((end.join(head) + end + ("" if "data" in more else end)).encode() + data)
    return path


def meta(path, *, sizes="5 4 3", more="", where="LOCAL", data=RAW, kind="MET_UCHAR"):
    path.write_bytes(f"ObjectType = Image\nNDims = 3\nBinaryData = True\n{more}DimSize = {sizes}\nElementType = {kind}\n"
                     f"ElementDataFile = {where}\n".encode() + data)
    return path


@pytest.fixture
def place(tmp_path):
    """A folder with a file that belongs to a scan, and one above it that must not be read."""
    (tmp_path / "secret.raw").write_bytes(b"7" * 60)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "scan.raw").write_bytes(RAW)
    return tmp_path / "in"


OUTSIDE = ["../secret.raw", "{above}/secret.raw", "sub/../../secret.raw", "LIST\n../secret.raw"]


@pytest.mark.parametrize("named", OUTSIDE)
@pytest.mark.parametrize("suffix", [".nrrd", ".nhdr", ".mha", ".mhd"])
def test_voxels_come_from_the_file_or_beside_it(place, suffix, named):
    named = named.format(above=place.parent)
    path = place / f"scan{suffix}"
    if suffix in (".mha", ".mhd"):
        meta(path, where=named, data=b"")
    else:
        nrrd(path, more=f"data file: {named}\n", data=b"")
    for door in (lambda: read_image(path), lambda: examine(path), lambda: repaired(path, place / f"copy{suffix}")):
        with pytest.raises(FormatError, match=r"takes its voxels from (another file|.*lies outside its folder)"):
            door()


@pytest.mark.parametrize("suffix", [".nhdr", ".mhd"])
def test_a_header_names_a_file_beside_it(place, suffix):
    path = place / f"scan{suffix}"
    if suffix == ".mhd":
        meta(path, where="scan.raw", data=b"")
    else:
        nrrd(path, more="data file: scan.raw\n", data=b"")
    assert np.array_equal(read_image(path).data.numpy().ravel(order="F"), VOXELS)
    (place / "scan.raw").unlink()
    with pytest.raises(FormatError, match=r"'scan.raw', in which its voxels lie, is not there; bring it back"):
        read_image(path)
    with pytest.raises(FormatError, match="takes its voxels from another file"):
        read_image(path.rename(path.with_suffix({".mhd": ".mha", ".nhdr": ".nrrd"}[suffix])))


def test_other_spellings_of_the_field(place):
    for more in ("datafile: ../secret.raw\n", "DATA FILE: ../secret.raw\n"):
        with pytest.raises(FormatError, match="takes its voxels from another file"):
            read_image(nrrd(place / "scan.nrrd", more=more, data=b""))
    for end in ("\r\n", "\r"):
        with pytest.raises(FormatError, match="takes its voxels from another file"):
            read_image(nrrd(place / "scan.nrrd", more="data file: ../secret.raw\n", data=b"", end=end))
        assert np.array_equal(read_image(nrrd(place / "scan.nrrd", end=end)).data.numpy().ravel(order="F"), VOXELS)
    path = meta(place / "scan.mha")
    path.write_bytes(path.read_bytes().replace(b"ElementDataFile", b"  ElementDataFile : ../secret.raw\nElementDataFile"))
    with pytest.raises(FormatError, match="takes its voxels from another file"):
        read_image(path)
    with pytest.raises(FormatError, match="it is no text with an ElementDataFile"):
        read_image(meta(place / "scan.mha", where="LOCAL").with_suffix(".mhd").write_bytes(b"NDims = 3\n") and place / "scan.mhd")


@pytest.mark.parametrize("make", [
    lambda p: nrrd(p / "a.nrrd", sizes="900 900 900"), lambda p: nrrd(p / "a.nrrd", sizes="900 900 900", encoding="gzip"),
    lambda p: nrrd(p / "a.nrrd", sizes="900 900 900", encoding="ascii"), lambda p: meta(p / "a.mha", sizes="900 900 900"),
    lambda p: meta(p / "a.mha", sizes="900 900 900", more="CompressedData = True\nCompressedDataSize = 60\n"),
    lambda p: meta(p / "a.mha", sizes="900 900 900", more="BinaryData = False\n"),
], ids=["raw", "gzip", "text", "mha", "packed", "words"])
def test_headers_that_promise_more_than_there_is(tmp_path, make):
    with pytest.raises(FormatError, match=r"a\.\w+ is truncated: its header promises \d+ bytes of voxels and \d+ at most are there"):
        read_image(make(tmp_path))


def test_pictures_that_promise_more_than_there_is(tmp_path):
    for suffix in (".png", ".bmp", ".tif", ".jpg"):
        Picture.fromarray((np.arange(320) % 256).astype(np.uint8).reshape(16, 20)).save(tmp_path / f"a{suffix}")
    spots = {".png": (16, ">II"), ".bmp": (18, "<ii"), ".jpg": ((tmp_path / "a.jpg").read_bytes().index(b"\xff\xc0") + 5, ">HH")}
    for suffix, (at, form) in spots.items():
        blob = bytearray((tmp_path / f"a{suffix}").read_bytes())
        struct.pack_into(form, blob, at, 40_000, 40_000)
        if suffix == ".png":
            struct.pack_into(">I", blob, 29, zlib.crc32(blob[12:29]))
        (tmp_path / f"a{suffix}").write_bytes(blob)
        with pytest.raises(FormatError, match=f"a{suffix} is truncated"):
            read_image(tmp_path / f"a{suffix}")
    blob = bytearray((tmp_path / "a.tif").read_bytes())
    first = struct.unpack_from("<I", blob, 4)[0]
    for spot in range(first + 2, first + 2 + 12 * struct.unpack_from("<H", blob, first)[0], 12):
        if struct.unpack_from("<H", blob, spot)[0] in (256, 257, 278):
            struct.pack_into("<HII", blob, spot + 2, 4, 1, 40_000)
    (tmp_path / "a.tif").write_bytes(blob)
    with pytest.raises(FormatError, match=r"a\.tif is truncated"):
        read_image(tmp_path / "a.tif")


def _packed(path, spoil=lambda blob: blob, more="CompressedDataSize = {n}\n"):
    blob = spoil(zlib.compress(VOXELS.astype("<f4").tobytes()))
    return meta(path, more="CompressedData = True\n" + more.format(n=len(blob)), data=blob, kind="MET_FLOAT")


def test_packed_metaimages_are_whole_or_refused(tmp_path):
    """ITK gives what lay in memory before, and says nothing."""
    assert np.array_equal(read_image(_packed(tmp_path / "a.mha")).data.numpy().ravel(order="F"), VOXELS)
    for spoil in (lambda b: b[:40] + b"xxxx" + b[44:], lambda b: b[:-1] + b"?", lambda b: b[:-8], lambda b: zlib.compress(b"1234" * 3)):
        with pytest.raises(FormatError, match=r"a\.mha: its packed voxels are (damaged|not those that its header promises)"):
            read_image(_packed(tmp_path / "a.mha", spoil))
    for more in ("", "CompressedDataSize = 0x\n"):
        with pytest.raises(FormatError, match="lacks CompressedDataSize"):
            read_image(_packed(tmp_path / "a.mha", more=more))


def test_packed_nrrds_are_whole_or_refused(tmp_path):
    """As after a transfer in text mode, which ITK does not notice."""
    packer = zlib.compressobj(9, zlib.DEFLATED, 31)
    blob = packer.compress(RAW) + packer.flush()
    assert np.array_equal(read_image(nrrd(tmp_path / "a.nrrd", encoding="gzip", data=blob)).data.numpy().ravel(order="F"), VOXELS)
    half = [zlib.compressobj(9, zlib.DEFLATED, 31) for _ in range(2)]
    two = b"".join(p.compress(part) + p.flush() for p, part in zip(half, (VOXELS[:30].tobytes(), VOXELS[30:].tobytes()), strict=True))
    read_image(nrrd(tmp_path / "a.nrrd", encoding="gzip", data=two))
    for spoilt in (blob[:-8] + b"????" + blob[-4:], blob[:-12]):
        with pytest.raises(FormatError, match=r"a\.nrrd: its packed voxels are|a\.nrrd is truncated"):
            read_image(nrrd(tmp_path / "a.nrrd", encoding="gzip", data=spoilt))


def test_a_long_line_ends_no_process(tmp_path):
    """ITK's reader of NRRD writes its complaint beyond the end of a buffer: in a process of its own, lest this one dies."""
    path = nrrd(tmp_path / "a.nrrd", more="space directions: (1,0,0) (" + "n" * 5000 + ",0,0) (0,0,1)\n")
    code = ("import sys; from regkit import FormatError, read_image, doctor\nfor door in (read_image, doctor):\n try: door(sys.argv[1])\n "
            "except FormatError as error: print(error)")
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.count("its header has a line of 5040 characters") == 2
    for more in ("# " + "n" * 2_000_000 + "\nkinds: " + "n" * 5000 + "\n", "# a\n" * 500_000):
        with pytest.raises(FormatError, match="its header has no end within 1048576 bytes"):
            read_image(nrrd(path, more=more))
    kept = nrrd(path, more="# " + "n" * 5000 + "\ncontent: " + "n" * 5000 + "\nkey:=" + "n" * 5000 + "\n")
    assert read_image(kept).grid.shape == (5, 4, 3)


@pytest.mark.parametrize("word", ["1" * 5000, "%s%n" * 1000], ids=["digits", "pattern"])
def test_a_long_word_among_voxels_in_text_ends_no_process(tmp_path, word):
    """The same of what should be a number."""
    path = nrrd(tmp_path / "a.nrrd", encoding="ascii", data=(" ".join(["7"] * 59) + f" {word}").encode())
    code = "import sys; from regkit import FormatError, read_image\ntry: read_image(sys.argv[1])\nexcept FormatError as error: print(error)"
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True)
    assert done.returncode == 0 and "should be numbers in text, hold the word" in done.stdout and len(done.stdout) < 500
    whole = nrrd(path, encoding="ascii", data=b"  ".join([b"7.000000000000000000000"] * 60) + b" " * 3000)
    assert float(read_image(whole).data.min()) == 7


def test_bitmaps_without_their_last_rows(tmp_path):
    """ITK fills up with what lay in memory."""
    sitk.WriteImage(sitk.GetImageFromArray(np.arange(320, dtype=np.uint8).reshape(16, 20)), str(tmp_path / "a.bmp"))
    blob = (tmp_path / "a.bmp").read_bytes()[:-40]
    (tmp_path / "a.bmp").write_bytes(blob[:2] + struct.pack("<I", len(blob)) + blob[6:])
    with pytest.raises(FormatError, match="the end of the picture is missing"):
        read_image(tmp_path / "a.bmp")


def test_bitmaps_packed_in_no_way_there_is(tmp_path):
    """ITK takes them for unpacked."""
    sitk.WriteImage(sitk.GetImageFromArray(np.arange(320, dtype=np.uint8).reshape(16, 20)), str(tmp_path / "a.bmp"))
    blob = bytearray((tmp_path / "a.bmp").read_bytes())
    assert float(read_image(tmp_path / "a.bmp").data.max()) == 255
    struct.pack_into("<I", blob, 30, 524288)
    (tmp_path / "a.bmp").write_bytes(blob)
    with pytest.raises(FormatError, match="it is packed in way 524288, and there are 0 to 3"):
        read_image(tmp_path / "a.bmp")


def test_shapes_without_voxels_are_not_copied(tmp_path):
    import nibabel as nib

    nib.Nifti1Image(VOXELS.reshape(5, 4, 3), np.eye(4)).to_filename(tmp_path / "a.nii")
    blob = bytearray((tmp_path / "a.nii").read_bytes())
    struct.pack_into("<h", blob, 44, 0)
    (tmp_path / "a.nii").write_bytes(blob)
    with pytest.raises(FormatError, match=r"a\.nii: shape \(5, 0, 3\) has an empty axis"):
        repaired(tmp_path / "a.nii", tmp_path / "b.nii")


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_headers_longer_than_most(tmp_path, end):
    """A header is read in two goes, wherever between them its end lies."""
    short = len(nrrd(tmp_path / "a.nrrd", more="# ", end=end).read_bytes()) - len(RAW)
    for length in range(2**14 - 4, 2**14 + 5):
        path = nrrd(tmp_path / "a.nrrd", more="# " + "n" * (length - short), end=end)
        assert np.array_equal(read_image(path).data.numpy().ravel(order="F"), VOXELS)
    for length in range(2**14 - 180, 2**14 - 100, 7):
        with pytest.raises(FormatError, match=r"takes its voxels from another file, '../secret.raw'"):
            read_image(meta(tmp_path / "a.mha", more=f"Comment = {'n' * length}\n", where="../secret.raw"))


@pytest.mark.parametrize("named", ["%s%n", "scan%s.raw 1 3 1", "%d%d.raw 1 3 1", "%999999999d.raw 1 3 1", "%03d"])
def test_names_that_itk_would_print_by(place, named):
    """MetaImage's pattern for names is a format of C's, and ITK takes any."""
    with pytest.raises(FormatError, match=r"expected a file, or a pattern such as slice%03d.raw 1 9 1"):
        read_image(meta(place / "scan.mhd", where=named, data=b""))


def test_slices_by_a_pattern(place):
    for k in range(3):
        (place / f"s{k + 1:02d}.raw").write_bytes(RAW[20 * k : 20 * k + 20])
    image = read_image(meta(place / "scan.mhd", where="s%02d.raw 1 3 1", data=b""))
    assert np.array_equal(image.data.numpy().ravel(order="F"), VOXELS)


def test_a_picture_under_anothers_name(tmp_path):
    """Is taken for what it is; what is no picture at all is refused before ITK asks all of its readers."""
    Picture.fromarray(np.arange(200, dtype=np.uint8).reshape(10, 20)).save(tmp_path / "a.bmp")
    blob = (tmp_path / "a.bmp").read_bytes()
    (tmp_path / "a.png").write_bytes(blob)
    assert read_image(tmp_path / "a.png").grid.shape == (20, 10)
    (tmp_path / "a.png").write_bytes(blob[:-40])
    with pytest.raises(FormatError, match="the end of the picture is missing"):
        read_image(tmp_path / "a.png")
    for suffix, words in ((".png", "begins as no PNG, JPEG, BMP or TIFF"), (".nrrd", "begins as no NRRD")):
        (tmp_path / f"b{suffix}").write_bytes(b"GIF89a" + blob)
        with pytest.raises(FormatError, match=words):
            read_image(tmp_path / f"b{suffix}")
