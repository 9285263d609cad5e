"""How far two label maps agree: Dice and Jaccard per label."""

from __future__ import annotations

from typing import Any

import numpy as np

from regkit.errors import GeometryError


def as_labels(item: Any, name: str) -> np.ndarray:
    """A label map (*S), tensor or array, as whole numbers; 0 and what is below is background.

    Raises GeometryError where values are not whole."""
    array = np.asarray(item.detach().cpu() if hasattr(item, "detach") else item)
    if array.dtype.kind == "f":
        whole = np.rint(np.nan_to_num(array, nan=0.0, posinf=0.0, neginf=0.0))
        if np.abs(array - whole)[np.isfinite(array)].max(initial=0.0) > 0.01:
            raise GeometryError(f"{name}: holds values that are not whole numbers; expected a label map")
        array = whole
    return array.astype(np.int64, copy=False)


def same_shape(fixed: np.ndarray, moved: np.ndarray) -> None:
    """Raises GeometryError if two label maps do not lie on one grid."""
    if fixed.shape != moved.shape:
        raise GeometryError(f"labels: shapes {fixed.shape} and {moved.shape}; expected both on the fixed scan's grid")


def counts(fixed: Any, moved: Any) -> dict[int, tuple[int, int, int]]:
    """{label: voxels in fixed, in moved, in both} for the labels that fixed holds, background (0) left out."""
    f, m = as_labels(fixed, "fixed labels"), as_labels(moved, "moved labels")
    same_shape(f, m)
    labels, place = np.unique(f, return_inverse=True)
    here = np.bincount(place.ravel(), minlength=len(labels))
    both = np.bincount(place.ravel()[(f == m).ravel()], minlength=len(labels))
    there = dict(zip(*(part.tolist() for part in np.unique(m, return_counts=True)), strict=True))
    return {int(label): (int(n), there.get(int(label), 0), int(b)) for label, n, b in zip(labels, here, both, strict=True) if label > 0}


def dice(fixed: Any, moved: Any) -> dict[int, float]:
    """Dice of every label that `fixed` holds: 2 |F ∩ M| / (|F| + |M|), in [0, 1] (Dice 1945).

    fixed, moved: label maps of one shape, arrays or tensors (*S). A label that moved lacks scores 0.
    Raises GeometryError if shapes differ."""
    return {label: 2 * both / (here + there) for label, (here, there, both) in counts(fixed, moved).items()}


def jaccard(fixed: Any, moved: Any) -> dict[int, float]:
    """Jaccard index of every label that `fixed` holds: |F ∩ M| / |F ∪ M|, in [0, 1] (Jaccard 1912). As `dice` otherwise."""
    return {label: both / (here + there - both) for label, (here, there, both) in counts(fixed, moved).items()}
