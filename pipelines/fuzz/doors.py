"""The doors of regkit that a file goes through, from Python and from the command line, and what is asked of what comes out."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import oracles
import SimpleITK as sitk
import torch
from oracles import Wrong

import regkit
from regkit.cli import run
from regkit.evaluation.cases import read_cases
from regkit.io.weights import read_tensors
from regkit.localisation import Detector
from regkit.registration.nets import load
from regkit.training.checkpoint import Learner
from regkit.training.scans import listed

QUICK = ("--start", "header", "--model", "translation", "--quiet")


class Refused(Exception):
    """What regkit said instead of an answer."""


def through(door: str, kind: str, path: Path) -> Any:
    """Take the file at `path` through a door → what it gave. Raises Refused, or what regkit raised though it should not."""
    try:
        if door == "read":
            return _read(kind, path)
        if door == "doctor":
            return regkit.doctor(path)
        if door == "fix":
            return regkit.doctor(path, fix=Path("fixed_copy" + _copied(path)))
    except regkit.RegkitError as error:
        raise Refused(f"{type(error).__name__}: {error}") from error
    return _command([word.format(file=path) for word in WORDS[door, kind]])


def _copied(path: Path) -> str:
    name = path.name.lower()
    known = {".mgz": ".mgz", ".mgh": ".mgh", ".nrrd": ".nrrd", ".nhdr": ".nrrd", ".mha": ".mha", ".mhd": ".mha", ".nii": ".nii"}
    return next((copy for suffix, copy in known.items() if name.endswith(suffix)), ".nii.gz")


def _read(kind: str, path: Path) -> Any:
    if kind == "image":
        try:
            return regkit.read_image(path)
        except regkit.OptionError as error:
            if "volumes" not in str(error):
                raise
            regkit.read_image(path, volume=0)
            raise
    if kind == "checkpoint":
        learner = Learner.of(Detector(2, 2, width=2, depth=1), 1e-3)
        return learner, learner.load(path)
    return {"transform": regkit.read_transform, "points": regkit.read_points, "cases": read_cases, "scans": listed, "tensors": read_tensors,
            "net": load}[kind](path)


WORDS: dict[tuple[str, str], list[str]] = {
    ("cli register", "image"): ["register", "fixed.nii.gz", "{file}", "-o", "out", *QUICK],
    ("cli apply", "image"): ["apply", "{file}", "-t", "good.tfm", "--like", "fixed.nii.gz", "-o", "out.nii.gz"],
    ("cli like", "image"): ["apply", "moving.nii.gz", "-t", "good.tfm", "--like", "{file}", "-o", "out.nii.gz"],
    ("cli doctor", "image"): ["doctor", "{file}", "--json"],
    ("cli apply", "transform"): ["apply", "points.csv", "-t", "{file}", "-o", "out.csv", "--like", "fixed.nii.gz"],
    ("cli register", "transform"): ["register", "fixed.nii.gz", "moving.nii.gz", "-o", "out", *QUICK[2:], "--start", "{file}"],
    ("cli apply", "points"): ["apply", "{file}", "-t", "good.tfm", "-o", "out.csv"],
    ("cli register", "points"): ["register", "fixed.nii.gz", "moving.nii.gz", "-o", "out", "--moving-points", "{file}", *QUICK],
    ("cli evaluate", "cases"): ["evaluate", "{file}", "-o", "out", "--no-html", "-j", "1", "--quiet"],
    ("cli replay", "record"): ["replay", "{file}", "--changed", "--quiet"],
    ("cli report", "record"): ["report", "{file}", "-o", "out.html"],
    ("cli register", "net"): ["register", "fixed.png", "moving.png", "-o", "out", "--model", "rigid", "--quiet", "--start",
                              "net:{file}"],
}


def _command(words: Sequence[str]) -> int:
    code = run(list(words))
    if code == 2:
        raise Refused("")
    if code not in (0, 3):
        raise RuntimeError(f"exit code {code}")
    return code


def check(door: str, kind: str, path: Path, value: Any, said: str) -> None:
    """Raise Wrong where a success is none. said: what a command printed."""
    if door == "read":
        oracles.check(kind, path, value)
    elif door == "doctor":
        _strict(json.dumps(value.record()))
    elif door == "fix":
        _same_scan(path, Path(value.copy), any(one.severity == "wrong" for one in value.findings))
    else:
        if kind in ("image", "transform", "points", "net") and door != "cli doctor":
            try:
                first = regkit.read_image(path, volume=0) if door == "cli like" else _read(kind, path)
            except regkit.RegkitError as error:
                raise Wrong(f"a command took what reading refuses: {error}") from error
            if door != "cli like":
                oracles.check(kind, path, first)
        _written(door, kind, path, said)


def _strict(text: str) -> Any:
    def no(word: str) -> None:
        raise Wrong(f"{word} in JSON")

    return json.loads(text, parse_constant=no)


def _same_scan(path: Path, copy: Path, wrong: bool) -> None:
    """A corrected copy reads, and holds the scan's voxels. wrong: the scan itself may be refused for what was corrected."""
    try:
        one = regkit.read_image(path, volume=0)
    except regkit.RegkitError as error:
        one = None
        if not wrong and not isinstance(error, regkit.GeometryError):
            raise Wrong(f"a copy was made of what reading refuses: {error}") from error
    try:
        other = regkit.read_image(copy, volume=0)
    except regkit.RegkitError as error:
        raise Wrong(f"the copy cannot be read: {error}") from error
    if one is not None and not torch.equal(one.data.nan_to_num(), other.data.nan_to_num()):
        raise Wrong("the copy has other voxels")


def _written(door: str, kind: str, path: Path, said: str) -> None:
    if door == "cli doctor":
        _strict(said[said.index("{"): said.rindex("}") + 1])
    elif door == "cli evaluate":
        if not Path("out/cases.csv").is_file():
            raise Wrong("no table of cases was written")
    elif door == "cli replay":
        return  # it has compared what it did with what there was
    elif door == "cli report":
        if "</html>" not in Path("out.html").read_text(encoding="utf-8"):
            raise Wrong("no page was written")
    elif door == "cli register":
        fixed = "fixed.png" if kind == "net" else "fixed.nii.gz"
        moved = regkit.read_image("out/moved.nii.gz")
        if moved.grid.shape != regkit.read_image(fixed).grid.shape:
            raise Wrong("the moved scan is not on the fixed grid")
        if not np.isfinite(nib.load("out/moved.nii.gz").affine).all():  # type: ignore[attr-defined]
            raise Wrong("the moved scan's affine is not finite")
        _strict(Path("out/registration.json").read_text(encoding="utf-8"))
        oracles.check("transform", Path("out/transform.tfm"), regkit.read_transform("out/transform.tfm"))
    elif Path("out.csv").exists():
        _moved_points(kind, path)
    else:
        regkit.read_image("out.nii.gz")


def _moved_points(kind: str, path: Path) -> None:
    """SimpleITK's inverse of the transform on the same points."""
    transform, points = ("good.tfm", path) if kind == "points" else (path, Path("points.csv"))
    if transform == path and path.suffix == ".json":
        return
    flip = np.array([-1.0, -1.0, 1.0])
    back = sitk.ReadTransform(str(transform)).GetInverse()
    given = regkit.read_points(points, ndim=3).world.numpy()[:1000]
    theirs = np.array([back.TransformPoint((p * flip).tolist()) for p in given]) * flip
    mine = regkit.read_points("out.csv").world.numpy()[:1000]
    if not np.allclose(mine, theirs, rtol=1e-6, atol=1e-6 * max(1.0, float(np.abs(theirs).max()))) and math.isfinite(float(theirs.sum())):
        raise Wrong("points were carried elsewhere than by SimpleITK")
