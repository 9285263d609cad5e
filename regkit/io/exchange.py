"""Two folders change names at once, where the system can do that: between two renamings a killed run would leave neither."""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

_AT_CWD = -100  # Linux: paths are relative to the working folder
_EXCHANGE = 2  # RENAME_EXCHANGE of Linux and RENAME_SWAP of macOS


def exchange(one: Path, two: Path) -> bool:
    """Give each of two existing paths on one file system the other's name, at once. False where the system or the file system cannot."""
    here, there = os.fsencode(one), os.fsencode(two)
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        if sys.platform.startswith("linux"):
            return libc.renameat2(_AT_CWD, here, _AT_CWD, there, ctypes.c_uint(_EXCHANGE)) == 0
        if sys.platform == "darwin":
            return libc.renamex_np(here, there, ctypes.c_uint(_EXCHANGE)) == 0
    except (AttributeError, OSError, TypeError):  # an older libc, or Windows
        pass
    return False
