"""Pairs, and how well a matrix aligns one: mean Dice of labels, mean target registration error of points.

One scorer judges every tool by regkit's public API, so that differences between tools are differences between their maps.
"""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

FILES = ("fixed", "moving", "fixed_labels", "moving_labels", "fixed_points", "moving_points")
Pair = dict[str, Any]


def read_pairs(path: str | Path, only: set[str] | None = None) -> list[Pair]:
    """The pairs of a JSON list, paths made absolute; `only` keeps those whose id or group it names."""
    path = Path(path)
    pairs = json.loads(path.read_text(encoding="utf-8"))
    for pair in pairs:
        pair.update({k: str(path.resolve().parent / pair[k]) for k in FILES if pair.get(k)})
        pair.setdefault("group", "all")
        pair.setdefault("ndim", 3)
    return [p for p in pairs if not only or p["id"] in only or p["group"] in only]


@lru_cache(maxsize=4)
def _image(path: str) -> Any:
    import regkit

    return regkit.read_image(path)


def _labels(path: str) -> Any:
    """A label map as int32; some come as floats."""
    image = _image(path)
    return image.with_data(image.data.round().int())


def dice(pair: Pair, matrix: np.ndarray) -> float | None:
    """Mean Dice over the labels that the fixed map holds; the moving map is carried by nearest neighbour."""
    import regkit
    import regkit.evaluation

    if not (pair.get("fixed_labels") and pair.get("moving_labels")):
        return None
    like = _labels(pair["fixed_labels"])
    moved = regkit.apply(_labels(pair["moving_labels"]), [regkit.Matrix(matrix)], like=like, interpolation="nearest")
    found = regkit.evaluation.dice(like.data[0, 0], moved.data[0, 0])
    return float(np.mean(list(found.values()))) if found else None


def tre(pair: Pair, matrix: np.ndarray) -> float | None:
    """Mean distance between the moving points and where the map takes the fixed ones: mm, on a moving picture pixels."""
    import regkit
    import regkit.evaluation

    if not (pair.get("fixed_points") and pair.get("moving_points")):
        return None
    fixed, moving = (_image(pair[k]) for k in ("fixed", "moving"))
    here = regkit.read_points(pair["fixed_points"], image=fixed).world
    there = regkit.read_points(pair["moving_points"], image=moving).world
    mapped = regkit.Matrix(matrix)(here[None])[0]
    if moving.pixels:
        mapped, there = (moving.grid.to_index(p[None])[0] for p in (mapped, there))
    return float(regkit.evaluation.tre(there, mapped).mean())


def score(pair: Pair, matrix: list[list[float]] | np.ndarray | None = None) -> dict[str, float | None]:
    """Dice and error of one map; of the identity, that is of the headers alone, without one."""
    if matrix is None:
        matrix = np.eye(pair["ndim"] + 1)
    matrix = np.asarray(matrix, float)
    return {"dice": dice(pair, matrix), "tre": tre(pair, matrix)}


def facts(pair: Pair) -> dict[str, Any]:
    """Size and voxel of the fixed scan, which time depends on, and the scores before."""
    grid = _image(pair["fixed"]).grid
    before = score(pair)
    return {"voxels": int(np.prod(grid.shape)), "spacing": round(float(grid.spacing.double().prod()) ** (1 / grid.ndim), 4),
            "dice_before": before["dice"], "tre_before": before["tre"]}


def flat_nifti(path: str, target: str) -> None:
    """A picture or a slice as a plain 2D NIfTI in regkit's own plane, which every peer can read; colour becomes luminance."""
    import nibabel

    image = _image(path)
    affine = np.eye(4)
    m = image.grid.affine.double().numpy().reshape(3, 3)
    affine[:2, :2], affine[:2, 3] = m[:2, :2], m[:2, 2]
    scan = nibabel.Nifti1Image(image.luminance().data[0, 0].numpy(), affine)
    scan.set_qform(affine, 1)
    scan.set_sform(affine, 1)
    nibabel.save(scan, target)
