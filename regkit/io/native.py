"""Transforms that ITK's files cannot hold, projective matrices and thin-plate splines, exactly, as JSON one can read."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from regkit.errors import FormatError, GeometryError, RegkitError
from regkit.io.paths import short
from regkit.io.slices import named
from regkit.space import Composite, Frame, Matrix, Spline, SplineModel, Transform
from regkit.space.spline import InverseSpline
from regkit.space.transform import compose

SUFFIX = ".json"
_MOST = 50_000_000  # bytes; a lattice of 40 control points along each axis has fewer
_LATTICE = 16  # control points along each axis, at most; a spline solves for all of them at once
_MAPS = "fixed world to moving world, RAS+ mm; of several parts the last acts on a point first"


def encode(transform: Transform) -> str:
    """A transform as JSON text. Raises FormatError for a kind that has no such form, GeometryError for a batch."""
    parts = [_encode(part) for part in (transform.parts if isinstance(transform, Composite) else (transform,))]
    return json.dumps({"regkit_transform": 1, "maps": _MAPS, "ndim": transform.ndim, "parts": parts}, indent=1, allow_nan=False) + "\n"


def _encode(part: Transform) -> dict[str, Any]:
    if isinstance(part, Matrix):
        _single(part.matrix)
        return {"kind": "matrix", "matrix": part.matrix[0].tolist()}
    spline = part.forward if isinstance(part, InverseSpline) else part
    if not isinstance(spline, Spline):
        raise FormatError(f"transform: a {type(part).__name__} does not go into a {SUFFIX} file; expected a Matrix, a Spline or a "
                          "sequence of them")
    _single(spline.theta)
    _single(spline.frame.centre)
    return {"kind": "tps", "inverse": isinstance(part, InverseSpline), "control": spline.model.control, "stiffness": spline.model.stiffness,
            "centre": spline.frame.centre[0].tolist(), "scale": spline.frame.scale, "edges": list(spline.frame.half),
            "theta": spline.theta[0].detach().double().tolist()}


def _single(tensor: Tensor) -> None:
    if len(tensor) != 1:
        raise GeometryError(f"transform: a batch of {len(tensor)}; expected one transform a file")


def decode(path: Path, where: str) -> Transform:
    """The transform in a JSON file; `where` names it in errors. Raises FormatError if the file is not one of ours or damaged."""
    try:
        if path.stat().st_size > _MOST:
            raise FormatError(f"{where} is larger than {_MOST / 1e6:.0f} MB; expected a transform as regkit writes it")
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, RegkitError):
            raise
        raise FormatError(f"{where} is not readable JSON: {' '.join(str(error).split())}; it may be damaged") from error
    if not isinstance(content, dict) or "regkit_transform" not in content:
        raise FormatError(f"{where} has no 'regkit_transform'; expected a transform as regkit writes it (registration.json is a record: "
                          "give the transform file beside it)")
    if content["regkit_transform"] != 1:
        raise FormatError(f"{where} is of version {short(content['regkit_transform'])}; this regkit reads version 1")
    parts, ndim = content.get("parts"), content.get("ndim")
    if ndim not in (2, 3) or not isinstance(parts, list) or not parts:
        raise FormatError(f"{where} is incomplete: expected ndim 2 or 3 and a list of parts; it may be damaged")
    with named(where):
        return compose(*(_decode(part, ndim, where) for part in parts))


def _decode(part: Any, ndim: int, where: str) -> Transform:
    kind = part.get("kind") if isinstance(part, dict) else None
    if kind == "matrix":
        return Matrix(_numbers(part, "matrix", (ndim + 1, ndim + 1), where))
    if kind != "tps":
        raise FormatError(f"{where} has a part of kind {short(kind)}; expected matrix or tps")
    control, stiffness = part.get("control"), part.get("stiffness")
    if not isinstance(control, int) or not isinstance(stiffness, (int, float)) or isinstance(control, bool) or \
            not 2 <= control <= _LATTICE or not abs(stiffness) < 1e300:
        raise FormatError(f"{where}: control {short(control)}, stiffness {short(stiffness)}; expected a whole number from 2 to {_LATTICE} "
                          "and a number")
    model = SplineModel(control, float(stiffness))
    scale = float(_numbers(part, "scale", (), where))
    edges = tuple(_numbers(part, "edges", (ndim,), where).tolist())
    if not (scale > 0 and all(0 < e <= 1 for e in edges)):
        raise FormatError(f"{where}: scale {scale}, edges {edges}; expected positive numbers")
    frame = Frame(_numbers(part, "centre", (ndim,), where)[None], scale, edges)
    spline = Spline(_numbers(part, "theta", (model.count(ndim),), where)[None], frame, model)
    return spline.inverse() if part.get("inverse") is True else spline


def _numbers(part: dict[str, Any], name: str, shape: tuple[int, ...], where: str) -> Tensor:
    try:
        found = torch.tensor(part.get(name), dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise FormatError(f"{where}: {name} is no array of numbers; it may be damaged") from error
    if tuple(found.shape) != shape or not all(math.isfinite(v) for v in found.flatten().tolist()):
        raise FormatError(f"{where}: {name} has shape {tuple(found.shape)} or is not finite; expected {shape}")
    return found
