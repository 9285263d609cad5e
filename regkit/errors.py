"""Every error a user can cause, one family.

RegkitError                 the root: catch this one
├── OptionError             an option or argument has a value that is not understood
├── FormatError             a file is missing, unreadable, truncated or of an unknown kind
├── GeometryError           shapes, affines or dimensions do not make sense (or not together)
├── OverlapError            the two scans, or a scan and its mask, have nothing in common
├── OutputError             the output place is taken, read-only or full
└── CheckpointError         weights do not fit the net they are loaded into

A message names the argument, what came, what was expected, and the cure, in one line.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class RegkitError(Exception):
    """Root of everything regkit raises on purpose."""


class OptionError(RegkitError, ValueError):
    """An option's value is not one of those understood."""


class FormatError(RegkitError, ValueError):
    """A file is missing, unreadable, truncated or of an unknown kind."""


class GeometryError(RegkitError, ValueError):
    """Shapes, affines or dimensions do not make sense, or not together."""


class OverlapError(RegkitError, ValueError):
    """Two things that must share some space share none."""


class OutputError(RegkitError, OSError):
    """The output cannot be written where it was asked for."""


class CheckpointError(RegkitError, ValueError):
    """Weights do not fit the net."""


def choose(option: str, value: object, choices: Iterable[str]) -> str:
    """Return `value` if it is one of `choices`, else raise `OptionError` naming the nearest right one."""
    names = list(choices)
    if isinstance(value, str) and value in names:
        return value
    near = difflib.get_close_matches(str(value).lower(), names, n=1, cutoff=0.0)
    raise OptionError(f"{option}: {value!r} is not known; use one of {', '.join(names)} (nearest: {near[0]})")
