"""Whether a file that ITK reads holds what its header promises, and takes nothing from elsewhere: ITK itself asks for the memory first,
fills up what is missing in some formats without a word, and reads whatever file a header names."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

from regkit.errors import FormatError
from regkit.io.paths import short

_DEFLATE = 1032  # times that packing can make bytes fewer, at most
_TIFF = {1: 1, 2: 2**20, 3: 2**20, 4: 2**20, 5: 1400, 6: 2048, 7: 2048, 8: _DEFLATE, 32773: 64, 32946: _DEFLATE}
_FIRST, _HEADER = 1 << 14, 1 << 20  # bytes that hold most text headers, and any
_BLANK = rb"(?:\r\n|\r(?!\n)|\n)(?:\r\n|\r|\n)"  # what ends a NRRD's header
_DATA = rb"(?:^|[\r\n])\s*ElementDataFile\s*[=:]([^\r\n]*)"  # the last field of a MetaImage's
_LINE = 500  # characters of a line in a NRRD's header: where ITK's reader complains of a longer one, the process dies
_WORD = 200  # characters of a number in text: the same with a longer word that is none
_TEXT = ("txt", "text", "ascii")  # what NRRD calls it
_FREE = r"content:|labels:|[a-z]+ ?units:|[^:]+:="  # lines of which it never complains
_PIECE = 1 << 20  # bytes unpacked at a time
_SPARE = 1 << 24  # bytes more than were promised that may be unpacked
_GZIP, _SKIP = ("gz", "gzip"), {"line skip", "lineskip", "byte skip", "byteskip"}  # words in a NRRD's header
_PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff")
_PNG = b"\x89PNG\r\n\x1a\n"
_CURE = "fetch or export the file again"
_PNG_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}


def check_whole(path: Path, reader: Any, where: str) -> None:
    """Raise FormatError where the file cannot hold the voxels that its header promises, or names a file for them that is not its own.

    reader: SimpleITK's, with the header read."""
    suffix = path.suffix.lower()
    if suffix in _PICTURES:
        with path.open("rb") as file:
            head = file.read(8)
        if head.startswith(_PNG):
            _png(path, where)
        elif head.startswith(b"\xff\xd8"):
            _jpeg(path, where, _promised(reader))
        elif head.startswith(b"BM"):
            _bmp(path, where)
        else:
            _tiff(path, where, _promised(reader))
    elif suffix in (".nrrd", ".nhdr"):
        _nrrd(path, suffix, where, reader)
    elif suffix in (".mha", ".mhd"):
        _meta(path, suffix, where, reader)


def check_sound(path: Path, reader: Any, where: str) -> None:
    """Raise FormatError where packed voxels of a NRRD or MetaImage are damaged. This unpacks them once, a piece at a time."""
    suffix = path.suffix.lower()
    need = _promised(reader)
    if suffix in (".nrrd", ".nhdr"):
        fields, files, start = _nrrd_files(path, suffix, where)
        if files and fields.get("encoding", "").lower() in _GZIP and not _SKIP & fields.keys():
            for file in files:
                _sound(file, start, file.stat().st_size, need // len(files), where, 31)
    elif suffix in (".mha", ".mhd"):
        fields, files, start = _meta_files(path, suffix, where)
        if files and _true(fields, "compresseddata", "false"):
            _sound(files[0], start, int(fields["compresseddatasize"]), need, where, 15)


def check_own(path: Path, where: str) -> None:
    """Raise FormatError where a file is of another kind than its name says, or the header of a NRRD or MetaImage names a file for its
    voxels that is not its own; before ITK looks at it."""
    suffix = path.suffix.lower()
    if suffix in _PICTURES:  # each may have another one's name
        with path.open("rb") as file:
            head = file.read(8)
        if not head.startswith((_PNG, b"\xff\xd8", b"BM", b"II", b"MM")):
            raise FormatError(f"{where} is not a readable {suffix} image: it begins as no PNG, JPEG, BMP or TIFF does; it may be damaged")
    if suffix in (".nrrd", ".nhdr"):
        _nrrd_files(path, suffix, where)
    elif suffix in (".mha", ".mhd"):
        _meta_files(path, suffix, where)


def _promised(reader: Any) -> int:
    """Bytes of the voxels by the header."""
    import SimpleITK as sitk

    one = sitk.Image([1, 1], reader.GetPixelID(), 0 if reader.GetNumberOfComponents() == 1 else reader.GetNumberOfComponents())
    return math.prod(reader.GetSize()) * reader.GetNumberOfComponents() * one.GetSizeOfPixelComponent()


def _enough(need: float, have: float, where: str) -> None:
    if have < need:
        raise FormatError(f"{where} is truncated: its header promises {int(need)} bytes of voxels and {int(have)} at most are there; "
                          f"{_CURE}")


def _cut(where: str) -> FormatError:
    return FormatError(f"{where} is truncated: the end of the picture is missing; {_CURE}")


# ---- pictures -------------------------------------------------------------------------------------------------------------------


def _png(path: Path, where: str) -> None:
    with path.open("rb") as file:
        head = file.read(33)
    if not head.startswith(_PNG) or head[12:16] != b"IHDR":
        return  # ITK says that it is none
    width, height, depth, colour = int.from_bytes(head[16:20], "big"), int.from_bytes(head[20:24], "big"), head[24], head[25]
    row = 1 + width * depth * _PNG_CHANNELS.get(colour, 1) / 8
    _enough(row * height, _DEFLATE * path.stat().st_size, where)


def _jpeg(path: Path, where: str, need: int) -> None:
    blob = path.read_bytes()
    # Within JPEG's data FF is always followed by 00 or a restart, so an end marker is the end.
    if blob.startswith(b"\xff\xd8") and blob.rfind(b"\xff\xd9") < blob.rfind(b"\xff\xda"):
        raise _cut(where)
    _enough(need, 2048 * len(blob), where)  # a block of 64 takes a bit at least


def _bmp(path: Path, where: str) -> None:
    blob = path.read_bytes()
    if not blob.startswith(b"BM"):
        return
    start, width, height = (int.from_bytes(blob[at : at + 4], "little", signed=at > 10) for at in (10, 18, 22))
    depth, packed = int.from_bytes(blob[28:30], "little"), int.from_bytes(blob[30:34], "little")
    if packed > 3 and int.from_bytes(blob[14:18], "little") >= 40:
        raise FormatError(f"{where} is not a readable picture: it is packed in way {packed}, and there are 0 to 3; it may be damaged")
    rows = abs(height) * ((abs(width) * depth + 31) // 32 * 4) // (1 if packed in (0, 3) else 128)  # run lengths: 255 pixels in two bytes
    if len(blob) < max(start + rows, int.from_bytes(blob[2:6], "little")) or start < 26:
        raise _cut(where)


def _tiff(path: Path, where: str, need: int) -> None:
    size, packing, seen = path.stat().st_size, 0, set()
    with path.open("rb") as file:
        head = file.read(8)
        order: Any = {b"II*\0": "little", b"MM\0*": "big"}.get(head[:4])
        at = int.from_bytes(head[4:8], order) if order else 0
        while order and at and at not in seen:  # the chain of pages must end within the file
            seen.add(at)
            file.seek(at)
            many = int.from_bytes(file.read(2), order)
            if at + 6 + 12 * many > size:
                raise _cut(where)
            page = file.read(12 * many + 4)
            for spot in range(0, 12 * many, 12):
                if not packing and int.from_bytes(page[spot : spot + 2], order) == 259:
                    packing = int.from_bytes(page[spot + 8 : spot + 10], order)
            at = int.from_bytes(page[-4:], order)
    _enough(need, (_TIFF.get(packing or 1, 2**20) if order else 2**20) * size, where)


# ---- text headers ---------------------------------------------------------------------------------------------------------------


def _start(path: Path, end: bytes) -> bytes:
    """The first bytes of a file, with what ends its header where that is among them."""
    with path.open("rb") as file:
        head = file.read(_FIRST)
        found = re.search(end, head)
        return head if len(head) < _FIRST or (found and found.end() < len(head)) else head + file.read(_HEADER - _FIRST)


def _nrrd_files(path: Path, suffix: str, where: str) -> tuple[dict[str, str], list[Path] | None, int]:
    """The fields of the header, the files that hold voxels (None: their names are made by a pattern), and the byte at which they begin."""
    head = _start(path, _BLANK)
    end = re.search(_BLANK, head)
    if not head.startswith(b"NRRD"):
        raise FormatError(f"{where} is not a readable {suffix} image: it begins as no NRRD does; it may be damaged or of another kind")
    if end is None and len(head) == _HEADER:
        raise FormatError(f"{where} is not a readable {suffix} image: its header has no end within {_HEADER} bytes; it may be damaged")
    lines = re.split(rb"\r\n|\r|\n", head[: end.start()] if end else head)
    text = [line.decode("latin-1") for line in lines if not line.startswith(b"#")]
    if long := next((line for line in text if len(line) > _LINE and not re.match(_FREE, line, re.I)), None):
        raise FormatError(f"{where} is not a readable {suffix} image: its header has a line of {len(long)} characters; it may be damaged")
    fields = {key.strip().lower(): value.strip() for key, mark, value in (line.partition(":") for line in text) if mark}
    named = next((n for n, line in enumerate(text) if re.match(r"\s*data ?file\s*:", line, re.I)), None)
    if named is None:
        return fields, [path], end.end() if end else len(head)
    stated = text[named].partition(":")[2].strip()
    listed = [line for line in text[named + 1 :] if line] if stated.upper().startswith("LIST") else [stated]
    pattern = len(stated.split()) > 3 and "%" in stated
    return fields, _own(path, [stated.split()[0]] if pattern else listed, suffix == ".nrrd", ".nhdr", where, pattern), 0


def _meta_files(path: Path, suffix: str, where: str) -> tuple[dict[str, str], list[Path] | None, int]:
    """The fields of the header, the files that hold voxels (None: by a pattern), and the byte at which they begin."""
    head = _start(path, _DATA)
    found = re.search(_DATA, head)
    if found is None or b"\0" in head[: found.start()]:
        raise FormatError(f"{where} is not a readable {suffix} image: it is no text with an ElementDataFile; it may be damaged")
    pairs = (re.split(r"[=:]", line, maxsplit=1) for line in head[: found.start()].decode("latin-1").splitlines())
    fields = {pair[0].strip().lower(): pair[1].strip() for pair in pairs if len(pair) == 2}
    stated = found[1].decode("latin-1").strip()
    if stated.lower() == "local":
        return fields, [path], head.find(b"\n", found.end()) + 1
    head = _start(path, b"$^")  # all of it: the names of files may follow
    listed = head[found.end() :].decode("latin-1").split("\n")[1:] if stated.upper().startswith("LIST") else [stated]
    pattern = "%" in stated
    if pattern and not re.fullmatch(r"[^%\s]*%0?\d?d[^%\s]*(\s+\d+){1,3}", stated):  # ITK prints by it, whatever it says
        raise FormatError(f"{where} takes its voxels from {short(stated)}; expected a file, or a pattern such as slice%03d.raw 1 9 1")
    names = [line.strip() for line in listed if line.strip()]
    return fields, _own(path, [stated.split()[0]] if pattern else names, suffix == ".mha", ".mhd", where, pattern), 0


def _own(path: Path, names: list[str], whole: bool, other: str, where: str, pattern: bool) -> list[Path] | None:
    """The files that a header names for its voxels. Raises FormatError for one that lies outside the header's folder."""
    if whole:
        first = short(names[0] if names else "")
        raise FormatError(f"{where} takes its voxels from another file, {first}; expected them in the file itself: name it "
                          f"{other} if that is meant")
    for name in names:
        if not name or Path(name).is_absolute() or ".." in re.split(r"[/\\]", name) or re.match(r"[A-Za-z]:|[/\\]", name):
            raise FormatError(f"{where} takes its voxels from {short(name)}, which lies outside its folder; expected a file beside it: "
                              "move both into one folder, and name it without a path in the header")
    files = [path.parent / name for name in names]
    if not pattern and (gone := next((file for file in files if not file.is_file()), None)):
        raise FormatError(f"{where}: {short(gone.name)}, in which its voxels lie, is not there; bring it back")
    return None if pattern else files


def _room(files: list[Path] | None, start: int) -> int | None:
    """Bytes of the files from their start on."""
    return None if files is None else sum(max(0, file.stat().st_size - start) for file in files)


def _nrrd(path: Path, suffix: str, where: str, reader: Any) -> None:
    fields, files, start = _nrrd_files(path, suffix, where)
    room, need = _room(files, start), _promised(reader)
    if room is not None:
        encoding = fields.get("encoding", "raw").lower()
        values = math.prod(reader.GetSize()) * reader.GetNumberOfComponents()
        need = {"hex": 2 * need, **dict.fromkeys(_TEXT, 2 * values - 1)}.get(encoding, need)
        _enough(need, room * (_DEFLATE if encoding in _GZIP else 1), where)
        for file in files if files and encoding in _TEXT else []:
            _numbers(file, start, where)


def _numbers(file: Path, start: int, where: str) -> None:
    """Raise FormatError where text that should be numbers has a word too long for one."""
    with file.open("rb") as text:
        text.seek(start)
        last = b""
        while piece := text.read(_PIECE):
            if found := re.search(rb"[^\s,]{%d}" % _WORD, last + piece):
                raise FormatError(f"{where}: its voxels, which should be numbers in text, hold the word "
                                  f"{short(found[0].decode('latin-1'))}; it may be damaged")
            last = piece[-_WORD:]


def _meta(path: Path, suffix: str, where: str, reader: Any) -> None:
    fields, files, start = _meta_files(path, suffix, where)
    room, need = _room(files, start), _promised(reader)
    if _true(fields, "compresseddata", "false"):
        stated = fields.get("compresseddatasize", "")
        if files is None or len(files) != 1 or not stated.isdecimal():
            raise FormatError(f"{where} is packed and lacks CompressedDataSize, or lies in several files; ITK reads such a one wrongly: "
                              "write it again uncompressed")
        _enough(need, _DEFLATE * files[0].stat().st_size, where)
    elif room is not None:
        if not _true(fields, "binarydata", "true"):
            need = 2 * math.prod(reader.GetSize()) * reader.GetNumberOfComponents() - 1
        _enough(need, room, where)


def _true(fields: dict[str, str], name: str, usual: str) -> bool:
    """Whether a MetaImage's header says yes to a name, as ITK reads it."""
    return fields.get(name, usual)[:1].lower() in ("t", "1")


def _sound(file: Path, start: int, size: int, need: int, where: str, wrap: int) -> None:
    """Raise FormatError where so many packed bytes do not unpack, without fault, to what is needed: ITK checks no sum, and of a MetaImage
    gives what lay in memory before. wrap: 15 for zlib's packing, 31 for gzip's, of which several may follow each other."""
    from isal import isal_zlib as zlib

    unpacker, got, enough = zlib.decompressobj(wrap), 0, need + _SPARE
    try:
        with file.open("rb") as packed:
            packed.seek(start)
            while size > 0 and got <= enough and (piece := packed.read(min(size, _PIECE))):
                size -= len(piece)
                while piece and got <= enough:
                    if unpacker.eof and not (wrap == 31 and piece.startswith(b"\x1f\x8b")):
                        size = 0
                        break
                    unpacker = zlib.decompressobj(wrap) if unpacker.eof else unpacker
                    got += len(unpacker.decompress(piece, _PIECE))
                    piece = unpacker.unused_data if unpacker.eof else unpacker.unconsumed_tail
    except Exception as error:  # isal's own types
        raise FormatError(f"{where}: its packed voxels are damaged ({str(error)[:100]}); {_CURE}") from error
    if not unpacker.eof or got < need:
        raise FormatError(f"{where}: its packed voxels are not those that its header promises ({got} bytes, {need} promised); {_CURE}")
