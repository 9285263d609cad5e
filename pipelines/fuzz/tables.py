"""Transforms, points, tables and weights as SimpleITK, Python's csv and json, and safetensors read them."""

from __future__ import annotations

import contextlib
import csv
import io
import itertools
import json
import math
import re
import struct
from pathlib import Path
from typing import Any

import numpy as np
from oracles import Wrong, close, same


def transform(path: Path, found: Any) -> None:
    import torch

    d = found.ndim
    points = torch.tensor(list(itertools.product([-50.0, 0.0, 80.0], repeat=d)), dtype=torch.float64)
    mine = found(points[None])[0].numpy()
    back = found.inverse()(found(points[None]))[0].numpy() if hasattr(found, "matrix") else points.numpy()
    if not np.isfinite(mine).all() or not np.isfinite(back).all():
        raise Wrong("maps points to NaN or infinity")
    flip = np.array([-1.0, -1.0, 1.0][:d])
    if path.suffix == ".json":
        said = json.loads(path.read_text(encoding="utf-8"))
        if all(part["kind"] == "matrix" for part in said["parts"]):
            matrix = np.eye(d + 1)
            for part in said["parts"]:
                matrix = matrix @ np.array(part["matrix"], dtype=np.float64)
            theirs = np.c_[points.numpy(), np.ones(len(points))] @ matrix.T
            theirs = theirs[:, :d] / theirs[:, d:]
            close(mine, theirs)
        return
    import SimpleITK as sitk

    itk = sitk.ReadTransform(str(path))
    theirs = np.array([itk.TransformPoint((p * flip).tolist()) for p in points.numpy()]) * flip
    if not np.allclose(mine, theirs, rtol=1e-6, atol=1e-6 * max(1.0, float(np.abs(theirs).max()))):
        raise Wrong("maps points elsewhere than SimpleITK")
    if path.suffix in (".tfm", ".txt"):
        text = path.read_text(encoding="latin-1")
        kinds, numbers = text.count("\nTransform:"), [line.split(":", 1)[1].split() for line in text.splitlines() if "Parameters:" in line]
        composite = text.count("CompositeTransform")
        if len(numbers) < 2 * (kinds - composite):
            raise Wrong("a part has no Parameters or FixedParameters")
        for word in itertools.chain(*numbers):
            float(word)


def number(text: str) -> float:
    if not re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", text, re.ASCII):
        raise Wrong(f"{text!r} was taken for a number")
    return float(text)


def rows(path: Path) -> list[list[str]]:
    """The cells of a table whose first row tells what parts them."""
    text = path.read_text(encoding="utf-8-sig")
    lines = [line for line in io.StringIO(text, newline=None) if line.strip() and not line.lstrip().startswith("#")]
    mark = next((c for c in ",;\t" if c in lines[0]), None)
    cells = [line.split() for line in lines] if mark is None else list(csv.reader(lines, delimiter=mark))
    return [[cell.strip() for cell in row] for row in cells if any(cell.strip() for cell in row)]


def points(path: Path, found: Any) -> None:
    mine = found.world.numpy()
    if not np.isfinite(mine).all():
        raise Wrong("a point is not finite")
    if path.name.endswith(".mrk.json"):
        theirs = [[-v if str(markup.get("coordinateSystem", "LPS")).strip().lower() in ("lps", "1") and axis < 2 else v
                   for axis, v in enumerate(p["position"])]
                  for markup in json.loads(path.read_text(encoding="utf-8-sig"))["markups"] for p in markup.get("controlPoints", [])
                  if p.get("positionStatus", "defined") == "defined"]
        if any(isinstance(v, (str, bool)) for p in theirs for v in p):
            raise Wrong("a text was taken for a number")
    elif path.suffix == ".fcsv":
        text = path.read_text(encoding="utf-8-sig")
        stated = re.findall(r"^#\s*CoordinateSystem\s*=\s*(\S+)", text, flags=re.M)
        sign = -1.0 if stated and stated[-1].upper() in ("LPS", "1") else 1.0
        named = re.findall(r"^#\s*columns\s*=(.*)$", text, flags=re.M)
        head = [c.strip().lower() for c in named[-1].split(",")] if named else ["id", "x", "y", "z"]
        theirs = [[number(row[head.index(a)]) * (sign if a != "z" else 1.0) for a in "xyz"] for row in rows(path)]
    else:
        table = rows(path)
        bare = all(re.fullmatch(r"[+-]?[\d.]+(e[+-]?\d+)?", cell, re.I) for cell in table[0])
        head = ["x", "y", "z"][: len(table[0])] if bare else [cell.lower() for cell in table.pop(0)]
        axes = [head.index(a) for a in "xyz" if a in head]
        if any(head.count(a) > 1 for a in "xyz") or any(len(row) != len(head) for row in table):
            raise Wrong("a column is there twice, or rows differ in length")
        theirs = [[number(row[k]) for k in axes] for row in table]
        others = tuple(tuple(cell for k, cell in enumerate(row) if k not in axes) for row in table)
        if found.rows != others:
            raise Wrong("other columns differ")
    same(mine, np.array(theirs, dtype=np.float64), "points")


def cases(path: Path, found: Any) -> None:
    if len({case.key for case in found}) != len(found):
        raise Wrong("two cases have one name")
    if path.suffix == ".json":
        said = json.loads(path.read_text(encoding="utf-8-sig"))
        said = said if isinstance(said, list) else said.get("pairs") or next(v for k, v in said.items() if k.startswith("registration"))
        theirs = [{"fixed": row["fixed"], "moving": row["moving"]} for row in said]
    else:
        text = path.read_text(encoding="utf-8-sig")
        first = next(io.StringIO(text, newline=None))
        mark = max(",;\t", key=first.count)
        theirs = list(csv.DictReader(io.StringIO(text, newline=""), delimiter=mark))
        names = [name for name in next(csv.reader([first], delimiter=mark)) if name]
        if any(None in row for row in theirs) or len(set(names)) != len(names):
            raise Wrong("a row is longer than the header, or a column is there twice")
    if len(theirs) != len(found):
        raise Wrong(f"{len(found)} cases, the oracle has {len(theirs)}")
    for case, row in zip(found, theirs, strict=True):
        for name in ("fixed", "moving"):
            if Path(getattr(case, name)) != path.parent / Path(str(row[name])).expanduser():
                raise Wrong(f"{name} is {getattr(case, name)!r}, in the table {row[name]!r}")
        if (case.angle is not None and not math.isfinite(case.angle)) or not np.isfinite(np.array(case.truth or ((0.0,),))).all():
            raise Wrong(f"angle {case.angle}, truth {case.truth}")


def scans(path: Path, found: Any) -> None:
    if path.is_dir():
        return
    theirs = list(csv.DictReader(io.StringIO(path.read_text(encoding="utf-8-sig"), newline="")))
    if [one.path for one in found] != [path.parent / (row["scan"] or "").strip() for row in theirs]:
        raise Wrong("other scans than the table's")
    if any(one.path == path.parent for one in found):
        raise Wrong("a row without a scan was taken")


# ---- weights ----------------------------------------------------------------------------------------------------------------------


def _header(path: Path) -> tuple[dict[str, Any], bytes]:
    blob = path.read_bytes()
    many = struct.unpack("<Q", blob[:8])[0]
    return json.loads(blob[8 : 8 + many]), blob[8 + many :]


def tensors(path: Path, found: Any) -> None:
    tensors, said = found
    header, rest = _header(path)
    if {str(k): v for k, v in (header.pop("__metadata__", None) or {}).items()} != said:
        raise Wrong("another header than the file's")
    if set(header) != set(tensors):
        raise Wrong("other names than the file's")
    for name, about in header.items():
        low, high = about["data_offsets"]
        value = tensors[name].contiguous()
        if list(value.shape) != about["shape"]:
            raise Wrong(f"{name}: shape {tuple(value.shape)}, in the file {about['shape']}")
        import torch

        if value.flatten().view(torch.uint8).numpy().tobytes() != rest[low:high]:
            raise Wrong(f"{name}: other bytes than the file's")


def net(path: Path, trained: Any) -> None:
    import torch
    from safetensors.torch import load

    stored = load(path.read_bytes())
    state = trained.net.state_dict()
    if set(stored) != set(state) or any(not torch.equal(value.float(), state[key]) for key, value in stored.items()):
        raise Wrong("other weights than the file's")
    if not all(bool(torch.isfinite(value).all()) for value in state.values()):
        raise Wrong("weights that are not finite")
    if not 1 <= trained.edge <= 1024 or (trained.mm is not None and not (isinstance(trained.mm, (int, float)) and 0 < trained.mm < 1e6)):
        raise Wrong(f"a canvas of {trained.edge} voxels of {trained.mm} mm")
    canvas = torch.rand(1, 1, *[trained.edge] * trained.ndim)
    with torch.no_grad(), contextlib.suppress(torch.linalg.LinAlgError):
        trained.net(canvas, canvas)


def checkpoint(path: Path, found: Any) -> None:
    import torch

    learner, state = found
    if not isinstance(state, dict) or learner.step < 0:
        raise Wrong(f"state {state!r}")
    learner.net(torch.rand(1, 1, 8, 8))[0].sum().backward()
    learner.optimiser.step()
    learner.averaged()
