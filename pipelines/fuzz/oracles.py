"""What a file holds by somebody else's reading: nibabel, SimpleITK, safetensors' and Python's own, and by its bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

MOST = 200_000_000  # bytes; what is larger is not read a second time


class Wrong(Exception):
    """A success that is none."""


def check(kind: str, path: Path, value: Any) -> None:
    """Raise Wrong where `value`, as regkit read it, is not what the file holds."""
    import images
    import tables

    {"image": images.image, "transform": tables.transform, "points": tables.points, "cases": tables.cases, "scans": tables.scans,
     "tensors": tables.tensors, "net": tables.net, "checkpoint": tables.checkpoint}[kind](path, value)


def same(mine: np.ndarray, theirs: np.ndarray, what: str, scale: float = 0.0) -> None:
    """Raise Wrong where arrays differ by more than single precision. scale: of what was added up to make them."""
    if mine.shape != theirs.shape:
        raise Wrong(f"{what}: shape {mine.shape}, the oracle's {theirs.shape}")
    if mine.dtype.kind in "iu" and theirs.dtype.kind in "iub":
        if not np.array_equal(mine, theirs.astype(mine.dtype)):
            raise Wrong(f"{what}: other numbers than the oracle's")
        return
    with np.errstate(all="ignore"):
        theirs = theirs.astype(np.float64)
        near = np.abs(mine - theirs) <= 1e-6 * np.maximum(np.abs(theirs), max(scale, 1e-38))
        most = float(np.finfo(np.float32).max)
        beyond = (np.abs(theirs) >= most * (1 - 1e-6)) & ~(np.abs(mine) < most / 2)
        fine = near | (mine == theirs) | (np.isnan(mine) & np.isnan(theirs)) | beyond
        if scale > most / 4:  # single precision overflows on the way
            fine |= ~np.isfinite(mine)
    if not fine.all():
        k = np.unravel_index(int(np.argmin(fine)), fine.shape)
        raise Wrong(f"{what}: {mine[k]} at {tuple(map(int, k))}, the oracle's {theirs[k]}")


def close(mine: np.ndarray, theirs: np.ndarray, what: str = "affine") -> None:
    """Raise Wrong where matrices or points are not equal but for rounding."""
    if not np.allclose(mine, theirs, rtol=1e-6, atol=1e-6 * float(np.abs(theirs).max())):
        raise Wrong(f"{what} {mine.tolist()}, the oracle's {theirs.tolist()}")
