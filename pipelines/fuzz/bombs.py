"""Fixed cases: files that are or claim to be huge, headers that point at other files, names that are none, pickles."""

from __future__ import annotations

import io
import json
import pickle
import struct
import zlib
from collections.abc import Callable
from functools import cache
from typing import Any

import seeds
from changes import png
from seeds import Seed

MANY = 3_400_000_000  # bytes of what is too large
SECRET = "secret.raw"  # lies above the folder of the cases and must never be read
_BLOCK = 1 << 24


@cache
def _zeros(count: int, head: bytes, wrap: int) -> bytes:
    """`head` and so many zeros, deflated; wrap: 31 for gzip, 15 for zlib. Blocks that end in a full flush can be repeated."""
    def raw(blob: bytes, end: int) -> bytes:
        packer = zlib.compressobj(9, zlib.DEFLATED, -15)
        return packer.compress(blob) + packer.flush(end)

    block = bytes(_BLOCK)
    times, rest = divmod(count, _BLOCK)
    body = raw(head, zlib.Z_FULL_FLUSH) + raw(block, zlib.Z_FULL_FLUSH) * times + raw(bytes(rest), zlib.Z_FINISH)
    if wrap == 31:
        check = zlib.crc32(head)
        for _ in range(times):
            check = zlib.crc32(block, check)
        check = zlib.crc32(bytes(rest), check)
        return b"\x1f\x8b\x08\0\0\0\0\0\0\xff" + body + struct.pack("<II", check, (len(head) + count) & 0xFFFFFFFF)
    # Adler's sums of zeros: the first stays, the second grows by the first for every byte
    a = zlib.adler32(head) & 0xFFFF
    b = ((zlib.adler32(head) >> 16) + a * count) % 65521
    return b"\x78\xda" + body + struct.pack(">I", b << 16 | a)


def _nifti(shape: tuple[int, ...], code: int = 2, bits: int = 8) -> bytes:
    blob = bytearray(seeds.seed("nifti int16").inner[:352])
    struct.pack_into("<8h", blob, 40, len(shape), *shape, *[1] * (7 - len(shape)))
    struct.pack_into("<2h", blob, 70, code, bits)
    return bytes(blob)


def _nrrd(sizes: str, encoding: str = "raw", kind: str = "uint8", more: str = "") -> bytes:
    return (f"NRRD0004\ntype: {kind}\ndimension: {len(sizes.split())}\nsizes: {sizes}\nencoding: {encoding}\nendian: little\n{more}"
            f"{'' if 'data file' in more else chr(10)}").encode()


def _mha(sizes: str, more: str = "", kind: str = "MET_UCHAR", where: str = "LOCAL") -> bytes:
    return (f"ObjectType = Image\nNDims = {len(sizes.split())}\nBinaryData = True\nBinaryDataByteOrderMSB = False\n{more}"
            f"DimSize = {sizes}\nElementType = {kind}\nElementDataFile = {where}\n").encode()


def _image(suffix: str, blob: bytes, **more: Any) -> Seed:
    return Seed("image", suffix, blob, **more)


def _png(width: int, height: int, data: bytes, before: tuple[tuple[bytes, bytes], ...] = ()) -> bytes:
    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return png([(b"IHDR", head), *before, (b"IDAT", data), (b"IEND", b"")])


def _text(kind: bytes) -> tuple[tuple[bytes, bytes], ...]:
    """A part of a picture that unpacks to more than there is memory."""
    return ((kind, b"a\0\0" + _zeros(MANY, b"", 15)),)


def _pillow(suffix: str, size: tuple[int, int]) -> bytes:
    """A small picture whose header says another size."""
    name = {".jpg": "jpg", ".bmp": "bmp", ".tif": "tif packed"}[suffix]
    blob = bytearray(seeds.seed(name).inner)
    if suffix == ".jpg":
        at = blob.index(b"\xff\xc0") + 5
        struct.pack_into(">HH", blob, at, size[1], size[0])
    elif suffix == ".bmp":
        struct.pack_into("<ii", blob, 18, *size)
    else:
        at = struct.unpack_from("<I", blob, 4)[0]
        for k in range(struct.unpack_from("<H", blob, at)[0]):
            spot = at + 2 + 12 * k
            tag = struct.unpack_from("<H", blob, spot)[0]
            if tag in (256, 257, 278):
                struct.pack_into("<HII", blob, spot + 2, 4, 1, size[0] if tag == 256 else size[1])
    return bytes(blob)


def _net(**settings: Any) -> bytes:
    """A net whose header asks for another one."""
    blob = seeds.seed("net keypoints").inner
    many = struct.unpack("<Q", blob[:8])[0]
    head = json.loads(blob[8 : 8 + many])
    said = json.loads(head["__metadata__"]["net"])
    said["settings"].update({key: value for key, value in settings.items() if key in said["settings"]})
    said.update({key: value for key, value in settings.items() if key in said})
    head["__metadata__"]["net"] = json.dumps(said)
    text = json.dumps(head).encode()
    return struct.pack("<Q", len(text)) + text + blob[8 + many :]


class _Evil:
    """What a pickle may do as it is read."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (open, ("unpickled", "w"))


def _torch(content: Any) -> bytes:
    import torch

    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def _spline() -> bytes:
    said = json.loads(seeds.seed("json spline").inner)
    said["parts"][0].update(control=100, theta=[0] * (3 * 100**3))
    return json.dumps(said).encode()


def _composite(count: int) -> bytes:
    part = seeds.seed("tfm regkit").inner.split(b"\n", 2)[2]
    return b"#Insight Transform File V1.0\n#Transform 0\nTransform: CompositeTransform_double_3_3\n" + b"".join(
        b"#Transform %d\n" % (k + 1) + part for k in range(count))


MAKERS: dict[str, tuple[str, Callable[[], Seed]]] = {
    "bomb nifti gz behind a small scan": ("read", lambda: _image(".nii.gz", _zeros(MANY, _nifti((6, 5, 4)), 31))),
    "bomb nifti gz": ("large", lambda: _image(".nii.gz", _zeros(MANY, _nifti((1500, 1500, 1500)), 31), honest=True)),
    "bomb nifti gz of doubles": ("large", lambda: _image(".nii.gz", _zeros(MANY, _nifti((740, 740, 740), 64, 64), 31), honest=True)),
    "bomb nifti": ("large", lambda: _image(".nii", _nifti((1500, 1500, 1500)), length=MANY, honest=True)),
    "bomb mgz": ("large", lambda: _image(".mgz", _zeros(MANY, struct.pack(">7i", 1, 1500, 1500, 1500, 1, 0, 0) + bytes(256), 31),
                                         honest=True)),
    "bomb mgz that promises": ("refused", lambda: _image(".mgz", _zeros(5000, struct.pack(">7i", 1, 9999, 9999, 9999, 1, 3, 0), 31))),
    "bomb nifti that promises": ("refused", lambda: _image(".nii", _nifti((30000, 30000, 30000), 16, 32) + bytes(1000))),
    "bomb nifti gz that promises": ("refused", lambda: _image(".nii.gz", _zeros(100_000, _nifti((2000, 2000, 2000), 16, 32), 31))),
    "bomb nrrd": ("large", lambda: _image(".nrrd", _nrrd("1500 1500 1500"), length=MANY, honest=True)),
    "bomb nrrd that promises": ("refused", lambda: _image(".nrrd", _nrrd("1500 1500 1500") + bytes(1000))),
    "bomb nrrd that promises more": ("refused", lambda: _image(".nrrd", _nrrd("30000 30000 30000") + bytes(1000))),
    "bomb nrrd gzip": ("large", lambda: _image(".nrrd", _nrrd("1500 1500 1500", "gzip") + _zeros(MANY, b"", 31), honest=True)),
    "bomb nrrd gzip behind a small scan": ("any", lambda: _image(".nrrd", _nrrd("6 5 4", "gzip") + _zeros(MANY, b"", 31), honest=True)),
    "bomb nrrd gzip that promises": ("refused", lambda: _image(".nrrd", _nrrd("1500 1500 1500", "gzip") + _zeros(1000, b"", 31))),
    "bomb nrrd text that promises": ("refused", lambda: _image(".nrrd", _nrrd("1500 1500 1500", "ascii") + b"1 2 3\n")),
    "bomb mha": ("large", lambda: _image(".mha", _mha("1500 1500 1500"), length=MANY, honest=True)),
    "bomb mha that promises": ("refused", lambda: _image(".mha", _mha("1500 1500 1500") + bytes(1000))),
    "bomb mha packed": ("large", lambda: _image(".mha", _mha("1500 1500 1500", "CompressedData = True\n") + _zeros(1500**3, b"", 15),
                                                honest=True)),
    "bomb mha packed behind a small scan": ("any", lambda: _image(".mha", _mha("6 5 4", "CompressedData = True\n") + _zeros(MANY, b"", 15),
                                                                  honest=True)),
    "bomb mha packed that promises": ("refused", lambda: _image(".mha", _mha("1500 1500 1500", "CompressedData = True\n")
                                                                + _zeros(1000, b"", 15))),
    "bomb png": ("large", lambda: _image(".png", _png(60000, 60000, _zeros(60001 * 60000, b"", 15)), honest=True)),
    "bomb png that promises": ("refused", lambda: _image(".png", _png(60000, 60000, _zeros(1000, b"", 15)))),
    "bomb png behind a small picture": ("any", lambda: _image(".png", _png(7, 9, _zeros(MANY, b"", 15)))),
    "bomb png in a comment": ("any", lambda: _image(".png", _png(7, 9, _zeros(72, b"", 15), _text(b"zTXt")))),
    "bomb png in a profile": ("any", lambda: _image(".png", _png(7, 9, _zeros(72, b"", 15), _text(b"iCCP")))),
    "bomb jpg that promises": ("refused", lambda: _image(".jpg", _pillow(".jpg", (65000, 65000)))),
    "bomb bmp that promises": ("refused", lambda: _image(".bmp", _pillow(".bmp", (40000, 40000)))),
    "bomb tif that promises": ("refused", lambda: _image(".tif", _pillow(".tif", (60000, 60000)))),
    "bomb csv of one cell": ("refused", lambda: Seed("points", ".csv", b"x,y,z\n" + b"1" * 20_000_000 + b",2,3\n")),
    "bomb csv of one word": ("refused", lambda: Seed("points", ".csv", b"x,y,z\n1,2," + b"a" * 20_000_000 + b"\n")),
    "bomb csv of one head": ("refused", lambda: Seed("points", ".csv", b"a," * 5_000_000 + b"\n")),
    "bomb csv of rows": ("read", lambda: Seed("points", ".csv", b"x,y,z\n" + b"1.5,2.25,-3\n" * 100_000)),
    "bomb csv of quotes": ("any", lambda: Seed("points", ".csv", b'"' * 5_000_000)),
    "bomb fcsv": ("refused", lambda: Seed("points", ".fcsv", b"# columns = " + b"a," * 3_000_000 + b"\n1,2,3\n")),
    "bomb markups": ("refused", lambda: Seed("points", ".mrk.json", b'{"markups": ' + b"[" * 3_000_000)),
    "bomb pairs of quotes": ("refused", lambda: Seed("cases", ".csv", b"fixed,moving" + b",'a" * 30_000 + b"\n1,2\n")),
    "bomb pairs of marks": ("refused", lambda: Seed("cases", ".csv", b'"a" ,' * 60_000 + b"\nfixed,moving\n")),
    "bomb pairs of rows": ("any", lambda: Seed("cases", ".csv", b"id,fixed,moving\n" + b"".join(
        b"c%d,fixed.nii.gz,moving.nii.gz\n" % k for k in range(20_000)))),
    "bomb pairs of one cell": ("refused", lambda: Seed("cases", ".csv", b"id,fixed,moving\na,fixed.nii.gz," + b"m" * 5_000_000 + b"\n")),
    "bomb pairs nested": ("refused", lambda: Seed("cases", ".json", b'{"pairs": ' + b"[" * 1_000_000 + b"]" * 1_000_000 + b"}")),
    "bomb tfm line": ("refused", lambda: Seed("transform", ".tfm", b"#Insight Transform File V1.0\nTransform: AffineTransform_double_3_3\n"
                                              b"Parameters:" + b" 1" * 5_000_000 + b"\nFixedParameters: 0 0 0\n")),
    "bomb tfm lines": ("refused", lambda: Seed("transform", ".tfm", b"#Insight Transform File V1.0\n" + b"#\n" * 5_000_000)),
    "bomb tfm parts": ("any", lambda: Seed("transform", ".tfm", _composite(5000))),
    "bomb json nested": ("refused", lambda: Seed("transform", ".json", b'{"regkit_transform": ' + b"[" * 5_000_000)),
    "bomb json": ("refused", lambda: Seed("transform", ".json", b'{"regkit_transform": 1, "a": "' + b"a" * 60_000_000 + b'"}')),
    "bomb json spline": ("any", lambda: Seed("transform", ".json", _spline())),
    "bomb record nested": ("refused", lambda: Seed("record", ".json", b'{"matrix": ' + b"[" * 1_000_000 + b"]" * 1_000_000 + b"}")),
    "bomb weights that promise": ("refused", lambda: Seed("tensors", ".safetensors", struct.pack("<Q", 2**63 - 1) + bytes(100))),
    "bomb weights of blanks": ("any", lambda: Seed("tensors", ".safetensors", struct.pack("<Q", 90_000_000) + b"{}" + b" " * 89_999_998)),
    "bomb net deep": ("refused", lambda: Seed("net", ".safetensors", _net(depth=1_000_000))),
    "bomb net wide": ("refused", lambda: Seed("net", ".safetensors", _net(width=10**9, most=10**9))),
    "bomb net of points": ("refused", lambda: Seed("net", ".safetensors", _net(points=10**12))),
    "bomb net edge": ("refused", lambda: Seed("net", ".safetensors", _net(edge=10**6))),
    "bomb net negative": ("refused", lambda: Seed("net", ".safetensors", _net(edge=-16))),
    "bomb net mm": ("refused", lambda: Seed("net", ".safetensors", _net(mm=-4.0))),
    "bomb net of words": ("refused", lambda: Seed("net", ".safetensors", _net(mm="four"))),
    "pickle net": ("refused", lambda: Seed("net", ".safetensors", pickle.dumps(_Evil()))),
    "pickle tensors": ("refused", lambda: Seed("tensors", ".safetensors", pickle.dumps({"a": _Evil()}))),
    "pickle checkpoint": ("refused", lambda: Seed("checkpoint", ".safetensors", _torch({"a": 1}))),
    "pickle net pt": ("refused", lambda: Seed("net", ".pt", _torch({"a": _Evil()}))),
    "pickle net pth": ("refused", lambda: Seed("net", ".pth", pickle.dumps(_Evil()))),
    "outside nrrd": ("refused", lambda: _image(".nrrd", _nrrd("5 4 3", more="data file: ../secret.raw\n"))),
    "outside nrrd absolute": ("refused", lambda: _image(".nrrd", _nrrd("5 4 3", more="data file: {above}/secret.raw\n"))),
    "outside nrrd beside": ("refused", lambda: _image(".nrrd", _nrrd("5 4 3", more="data file: scan.raw\n"), beside={".raw": bytes(60)})),
    "outside nrrd list": ("refused", lambda: _image(".nrrd", _nrrd("5 4 3", more="data file: LIST\n../secret.raw\n"))),
    "outside nhdr": ("refused", lambda: _image(".nhdr", _nrrd("5 4 3", more="data file: ../secret.raw\n"))),
    "outside nhdr absolute": ("refused", lambda: _image(".nhdr", _nrrd("5 4 3", more="datafile: {above}/secret.raw\n"))),
    "outside nhdr list": ("refused", lambda: _image(".nhdr", _nrrd("5 4 3", more="data file: LIST 2\n../secret.raw\n"))),
    "outside nhdr beside": ("read", lambda: _image(".nhdr", _nrrd("5 4 3", more="data file: scan.raw\n"), beside={".raw": bytes(60)})),
    "outside mha": ("refused", lambda: _image(".mha", _mha("5 4 3", where="../secret.raw"))),
    "outside mha absolute": ("refused", lambda: _image(".mha", _mha("5 4 3", where="{above}/secret.raw"))),
    "outside mha list": ("refused", lambda: _image(".mha", _mha("5 4 3", where="LIST\n../secret.raw\n../secret.raw\n../secret.raw"))),
    "outside mhd": ("refused", lambda: _image(".mhd", _mha("5 4 3", where="../secret.raw"))),
    "outside mhd list": ("refused", lambda: _image(".mhd", _mha("5 4 3", where="LIST\n../secret.raw\n../secret.raw\n../secret.raw"))),
    "outside mhd pattern": ("refused", lambda: _image(".mhd", _mha("5 4 3", where="../secret%d.raw 1 3 1"))),
    "outside mhd beside": ("read", lambda: _image(".mhd", _mha("5 4 3", where="scan.raw"), beside={".raw": bytes(60)})),
    "png with another's text": ("refused", lambda: _image(".png", _nrrd("5 4 3", more="data file: ../secret.raw\n"))),
    "nrrd with another's text": ("any", lambda: _image(".nrrd", _mha("5 4 3", where="../secret.raw"))),
    "png with a nifti's bytes": ("refused", lambda: _image(".png", seeds.seed("nifti int16").inner)),
}
"""Files by name, with what must come of them: read (rightly), refused, large (refused for want of memory), any."""


def made(name: str) -> Seed:
    """The file of that name: one of these, or a valid one."""
    return MAKERS[name][1]() if name in MAKERS else seeds.seed(name)
