"""How far landmarks are carried from where they belong."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from regkit.errors import GeometryError


def tre(moving: Any, mapped: Any) -> np.ndarray:
    """Target registration error of each landmark: |T(x) - y|, (P,), in the unit of the points (Fitzpatrick 1998).

    moving: (P, D), landmarks y of the moving scan. mapped: (P, D), where the map takes the fixed scan's, T(x).
    Raises GeometryError if shapes differ."""
    a, b = (np.asarray(p.detach().cpu() if hasattr(p, "detach") else p, dtype=float) for p in (moving, mapped))
    if a.ndim != 2 or a.shape != b.shape:
        raise GeometryError(f"points: shapes {a.shape} and {b.shape}; expected two of (P, D), one landmark a row in the same order")
    return np.linalg.norm(a - b, axis=1)


def summary(errors: np.ndarray, before: np.ndarray | None = None) -> dict[str, float]:
    """Mean, median, 90th percentile and maximum of errors (P,), and the share of landmarks that lie nearer than `before`."""
    out = {"mean": errors.mean(), "median": np.median(errors), "p90": np.percentile(errors, 90), "max": errors.max()}
    if before is not None:
        out["improved"] = np.mean(errors < before)
    return {name: float(value) for name, value in out.items()}


def relative(errors: np.ndarray, size: Sequence[float]) -> np.ndarray:
    """Relative TRE: the errors by the diagonal of the scan they are measured in (Borovec 2020). size: its edges in the same unit."""
    return errors / float(np.linalg.norm(np.asarray(size, dtype=float)))
