"""What shares independent jobs out: `map`, or the `map` of a pool of threads."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

Run = Callable[[Callable[[Any], Any], Iterable[Any]], Iterable[Any]]
