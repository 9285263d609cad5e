"""gzip: the first bytes of a file, as many as are worth it, and pieces that are packed side by side."""

from __future__ import annotations

import struct
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

GZIP = b"\x1f\x8b"
_PIECE = 1 << 24  # bytes packed at a time


def is_packed(path: Path) -> bool:
    """What is compressed is known by its first bytes: names are often wrong."""
    with path.open("rb") as file:
        return file.read(2) == GZIP


def begin(path: Path, count: int) -> bytes:
    """The file's first bytes, uncompressed."""
    from isal import isal_zlib as zlib

    with path.open("rb") as file:
        blob, got = file.read(count), b""
        if not blob.startswith(GZIP):
            return blob
        unpacker = zlib.decompressobj(31)
        while blob and len(got) < count:
            got += unpacker.decompress(blob, count - len(got))
            blob = file.read(4096)
            if unpacker.eof:  # the header may be a member of its own
                blob = unpacker.unused_data + blob
                if not blob.startswith(GZIP):
                    break
                unpacker = zlib.decompressobj(31)
        return got


def unpack(blob: bytes, most: int, spare: int = 0) -> bytes:
    """The first bytes of what is packed, its members one after another; checked, where its end is reached: spare bytes later at most."""
    from isal import isal_zlib as zlib

    pieces, left = [], most
    while left > 0 and blob.startswith(GZIP):
        unpacker = zlib.decompressobj(31)
        pieces.append(unpacker.decompress(blob, left))
        left -= len(pieces[-1])
        if not unpacker.eof:
            while left <= 0 < spare and not unpacker.eof and unpacker.unconsumed_tail:
                spare -= len(unpacker.decompress(unpacker.unconsumed_tail, _PIECE))
            if left > 0 or not (unpacker.eof or unpacker.unconsumed_tail):
                raise EOFError("compressed data ended before the end-of-stream marker was reached")
            break
        blob = unpacker.unused_data
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def pack(head: bytes, voxels: bytes | memoryview, file: BinaryIO) -> None:
    """One gzip member, its pieces packed side by side: each ends in a full flush, on a byte, and knows nothing of the one before.

    Level 1 packs scans nearly as well as higher ones. No time and no name, and pieces of one size: equal images are equal files."""
    import torch
    from isal import isal_zlib as zlib

    voxels = memoryview(voxels)
    size = len(head) + len(voxels)

    def piece(start: int) -> bytes | memoryview:
        end = min(start + _PIECE, size) - len(head)
        if start >= len(head):  # where the voxels lie: joined, they would be there twice
            return voxels[start - len(head): end]
        return b"".join([head[start: start + _PIECE], voxels[:max(end, 0)]])

    def packed(start: int) -> bytes:
        packer = zlib.compressobj(1, zlib.DEFLATED, -15)  # without header and trailer
        return packer.compress(piece(start)) + packer.flush(zlib.Z_FINISH if start + _PIECE >= size else zlib.Z_FULL_FLUSH)

    file.write(b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x04\xff")
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        for one in pool.map(packed, range(0, max(1, size), _PIECE)):
            file.write(one)
    file.write(struct.pack("<II", zlib.crc32(voxels, zlib.crc32(head)), size & 0xFFFFFFFF))
