"""What is done to a file: small changes, each a list of a name and plain numbers or texts, so that a case can be written down."""

from __future__ import annotations

import json
import re
import struct
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import seeds

_TOKEN = re.compile(rb"[^\s,;:=\[\]{}()\"]+")
_TEXT = 4096  # bytes in which words and lines are looked for
_FLOATS = {"nan": float("nan"), "inf": float("inf"), "-inf": float("-inf")}


def change(blob: bytes, what: list[Any]) -> bytes:
    """`blob` after one change; one that does not apply to such a file changes nothing."""
    try:
        return CHANGES[what[0]](blob, *what[1:])
    except (ArithmeticError, LookupError, ValueError, TypeError, AttributeError, struct.error, zlib.error, RecursionError):
        return blob


def _place(blob: bytes, at: int, head: int) -> int:
    return at % max(1, min(len(blob), head or len(blob)))


def _cut(blob: bytes, share: int) -> bytes:
    return blob[: len(blob) * share // 65536]


def _flip(blob: bytes, bits: list[int], head: int) -> bytes:
    made = bytearray(blob)
    for bit in bits if blob else ():
        made[_place(blob, bit // 8, head)] ^= 1 << bit % 8
    return bytes(made)


def _fill(blob: bytes, at: int, count: int, value: int, head: int) -> bytes:
    """value: the byte, or beyond 255 the seed of random ones."""
    at = _place(blob, at, head)
    count = min(count, len(blob) - at)
    new = bytes([value]) * count if value < 256 else np.random.default_rng(value).bytes(count)
    return blob[:at] + new + blob[at + count :]


def _insert(blob: bytes, at: int, text: str, times: int, head: int) -> bytes:
    at = _place(blob, at, head)
    return blob[:at] + text.encode("utf-8", "surrogatepass") * times + blob[at:]


def _drop(blob: bytes, at: int, count: int, head: int) -> bytes:
    at = _place(blob, at, head)
    return blob[:at] + blob[at + count :]


def _splice(blob: bytes, other: str, share: int) -> bytes:
    """This one's head with the tail of another."""
    tail = seeds.seed(other).inner
    return blob[: len(blob) * share // 65536] + tail[len(tail) * share // 65536 :]


def _swap(blob: bytes, width: int, head: int) -> bytes:
    """The bytes of each word of a header turned round."""
    many = min(len(blob), head) // width * width
    words = np.frombuffer(blob[:many], np.uint8).reshape(-1, width)[:, ::-1]
    return words.tobytes() + blob[many:]


# ---- NIfTI ----------------------------------------------------------------------------------------------------------------------


def _nifti_dtype(blob: bytes) -> np.dtype:
    from nibabel.nifti1 import header_dtype
    from nibabel.nifti2 import header_dtype as second

    for order in "<>":
        for kind in (header_dtype, second):
            if len(blob) >= kind.itemsize and np.frombuffer(blob[:4], f"{order}i4")[0] == kind.itemsize:
                return kind.newbyteorder(order)
    raise ValueError("no NIfTI header")


def _field(blob: bytes, name: str, index: int, value: Any) -> bytes:
    """One number of a NIfTI header; what does not go into its type goes in modulo."""
    dtype = _nifti_dtype(blob)
    header = np.frombuffer(blob[: dtype.itemsize], dtype).copy()
    spot = header[name][0] if header[name].ndim > 1 else header[name]
    number: Any = _FLOATS.get(value, value) if isinstance(value, str) else value
    if spot.dtype.kind == "S":
        header[name] = str(value).encode()[: spot.dtype.itemsize]
        return header.tobytes() + blob[dtype.itemsize :]
    if spot.dtype.kind in "iu":
        bits = 8 * spot.dtype.itemsize
        number = (int(number) if np.isfinite(number) else 0) % 2**bits
        number -= 2**bits if spot.dtype.kind == "i" and number >= 2 ** (bits - 1) else 0
    with np.errstate(all="ignore"):
        spot.reshape(-1)[index % spot.size] = number
    return header.tobytes() + blob[dtype.itemsize :]


def _affine(blob: bytes, which: str, how: str) -> bytes:
    """A place that no scan has, in the sform or the qform."""
    value = {"nan": "nan", "inf": "inf", "huge": 1e38, "tiny": 1e-38, "zero": 0.0}.get(how)
    if which == "qform":
        names = ("quatern_b", "quatern_c", "quatern_d", "qoffset_x") if how != "flip" else ()
        for name in names:
            blob = _field(blob, name, 0, value if value is not None else 3.0)
        blob = _field(blob, "pixdim", 0, -1.0 if how == "flip" else 1.0)
        return _field(_field(blob, "qform_code", 0, 1), "sform_code", 0, 0)
    for index in range(4):
        row = {"singular": 1.0, "flip": -1.0 if index == 0 else 0.0}.get(how, value)
        blob = _field(blob, "srow_x", index, row)
        if how == "singular":
            blob = _field(blob, "srow_y", index, row)
    return _field(blob, "sform_code", 0, 1)


# ---- texts ----------------------------------------------------------------------------------------------------------------------


def _word(blob: bytes, at: int, text: str, times: int) -> bytes:
    """One word (a number, a name, a cell) exchanged."""
    words = list(_TOKEN.finditer(blob[:_TEXT]))
    word = words[at % len(words)]
    return blob[: word.start()] + text.encode("utf-8", "surrogatepass") * times + blob[word.end() :]


def _lines(blob: bytes) -> tuple[list[bytes], bytes]:
    """The lines of a text, or of the text that other bytes follow."""
    head = blob[:_TEXT]
    stop = next((k for k, byte in enumerate(head) if byte > 127 or (byte < 9)), len(head))
    return blob[:stop].split(b"\n"), blob[stop:]


def _line(blob: bytes, how: str, at: int, text: str) -> bytes:
    lines, rest = _lines(blob)
    at %= len(lines)
    if how == "drop":
        del lines[at]
    elif how == "double":
        lines.insert(at, lines[at])
    elif how == "put":
        lines.insert(at, text.encode())
    elif how == "value":  # all that follows the name of a field
        mark = re.search(rb"\s*[:=]\s*", lines[at])
        lines[at] = (lines[at][: mark.end()] if mark else b"") + text.encode()
    elif how == "swap":
        other = (at + 1) % len(lines)
        lines[at], lines[other] = lines[other], lines[at]
    return b"\n".join(lines) + rest


def _ends(blob: bytes, end: str) -> bytes:
    return blob.replace(b"\r\n", b"\n").replace(b"\n", end.encode())


def _encode(blob: bytes, name: str) -> bytes:
    return blob.decode("utf-8").encode(name, "replace")


# ---- JSON, also the header of safetensors ------------------------------------------------------------------------------------------


class _Raw(str):
    """A text that stands in JSON as it is."""


def _dumps(value: Any) -> str:
    """JSON in which `_Raw` stands bare."""
    if isinstance(value, _Raw):
        return str(value)
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(key)}: {_dumps(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_dumps, value)) + "]"
    return json.dumps(value)


def _nodes(value: Any, found: list[tuple[Any, Any]]) -> list[tuple[Any, Any]]:
    """(container, key) of everything below a value; a text that holds JSON is looked into."""
    for key, item in list(value.items()) if isinstance(value, dict) else list(enumerate(value)) if isinstance(value, list) else ():
        found.append((value, key))
        _nodes(item, found)
    return found


def _node(blob: bytes, at: int, how: str, raw: str, times: int) -> bytes:
    """One value in JSON exchanged for `raw` JSON, dropped, or put into so many lists."""
    head, start, end = blob, 0, len(blob)
    weights = blob[:1] != b"{" and blob[:1] != b"["
    if weights:
        start, end = 8, 8 + struct.unpack("<Q", blob[:8])[0]
        head = blob[start:end]
    root = json.loads(head)
    inside = root.get("__metadata__", {}) if weights else {}
    opened = {key: json.loads(text) for key, text in inside.items() if text[:1] in "{["}
    nodes = _nodes(root, []) + [pair for item in opened.values() for pair in _nodes(item, [])]
    box, key = nodes[at % len(nodes)]
    if how == "drop":
        del box[key]
    elif how == "nest":
        box[key] = _Raw("[" * times + _dumps(box[key]) + "]" * times)
    else:
        box[key] = _Raw(raw if times == 1 else '"' + raw.strip('"') * times + '"')
    for name, item in opened.items():
        if name in inside and not isinstance(inside[name], _Raw):
            inside[name] = _dumps(item)
    text = _dumps(root).encode("utf-8", "surrogatepass")
    return (struct.pack("<Q", len(text)) + text if weights else text) + blob[end:]


def _length(blob: bytes, value: int) -> bytes:
    """What safetensors says its header's length is."""
    return struct.pack("<Q", value % 2**64) + blob[8:]


# ---- PNG ------------------------------------------------------------------------------------------------------------------------


def chunks(blob: bytes) -> list[tuple[bytes, bytes]]:
    """The (type, content) of a PNG's parts."""
    found, at = [], 8
    while at + 12 <= len(blob):
        many = int.from_bytes(blob[at : at + 4], "big")
        found.append((blob[at + 4 : at + 8], blob[at + 8 : at + 8 + many]))
        at += 12 + many
    return found


def png(parts: list[tuple[bytes, bytes]]) -> bytes:
    """A PNG of such parts."""
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content)) for kind, content in parts)


def _ihdr(blob: bytes, at: int, value: int) -> bytes:
    """One of width, height, depth, colour, compression, filter, interlace; the checksum is right."""
    parts = chunks(blob)
    fields = list(struct.unpack(">IIBBBBB", parts[0][1]))
    at %= 7
    fields[at] = value % (2**32 if at < 2 else 256)
    return png([(parts[0][0], struct.pack(">IIBBBBB", *fields)), *parts[1:]])


def _chunk(blob: bytes, how: str, at: int, kind: str, times: int) -> bytes:
    parts = chunks(blob)
    at %= len(parts)
    if how == "drop":
        del parts[at]
    elif how == "double":
        parts.insert(at, parts[at])
    elif how == "put":
        parts.insert(at, (kind.encode(), b"\0" * times))
    elif how == "repack":  # fewer or more rows than there are, packed without fault
        raw = zlib.decompress(b"".join(content for name, content in parts if name == b"IDAT"))
        parts = [part for part in parts if part[0] != b"IDAT"]
        parts.insert(-1, (b"IDAT", zlib.compress((raw * 3)[: len(raw) * (times % 30) // 10])))
    return png(parts)


CHANGES: dict[str, Callable[..., bytes]] = {
    "cut": _cut, "flip": _flip, "fill": _fill, "insert": _insert, "drop": _drop, "splice": _splice, "swap": _swap, "field": _field,
    "affine": _affine, "word": _word, "line": _line, "ends": _ends, "encode": _encode, "node": _node, "length": _length, "ihdr": _ihdr,
    "chunk": _chunk,
}
