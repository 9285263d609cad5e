"""Names of files as people and tables write them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from regkit.errors import FormatError

_SHOWN = 200  # characters of what a file says that an error repeats


def home(path: str | Path) -> Path:
    """`path` with ~ as the home folder. Where there is no such person the ~ stays, as in a shell, and the path is then not found."""
    try:
        return Path(os.path.expanduser(path))
    except ValueError:  # a null byte
        return Path(path)


def there(path: str | Path) -> bool:
    """Whether a file or folder is there; False for names that no system has: too long, with a null byte. `Path.exists` raises for some."""
    return os.path.exists(path)


def folder_there(path: str | Path) -> bool:
    """Whether a folder is there; as `there`."""
    return os.path.isdir(path)


def in_utf8(path: str | Path) -> str:
    """A path for ITK, which ends the process where a name is not UTF-8. Raises FormatError for such a one."""
    try:
        str(path).encode("utf-8")
    except UnicodeEncodeError as error:
        raise FormatError(f"{path}: the name is not UTF-8, and ITK opens no such file; rename it") from error
    return str(path)


def short(text: Any) -> str:
    """What a file says, as an error repeats it: quoted and not too long."""
    if isinstance(text, str):
        return repr(text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…")
    said = repr(text)
    return said if len(said) <= _SHOWN else f"{said[:_SHOWN]}…"
