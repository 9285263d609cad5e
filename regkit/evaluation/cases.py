"""The table of cases: a CSV, the JSON of pairs, or a Learn2Reg data set."""

from __future__ import annotations

import csv
import difflib
import io
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any

from regkit.errors import FormatError, OptionError, choose
from regkit.io.paths import folder_there, home, short, there

FILES = ("fixed", "moving", "fixed_labels", "moving_labels", "fixed_points", "moving_points", "fixed_mask", "moving_mask")
_BESIDE = (("labels", ("labels",), None), ("points", ("landmarks", "keypoints"), ".csv"), ("mask", ("masks",), None))
_TURNED = re.compile(r"(.+)_(?:pose|turn)(\d+)_s(?:eed)?\d+")  # how the makers of turned copies name them
_COLUMNS = 200  # of a table, at most
_OWN = {".": "_", "/": "_", "\\": "_", ":": "_"}


@dataclass(frozen=True)
class Case:
    """One pair: paths of the scans and of what their alignment is measured by; see data/README.md.

    points_space: what the numbers in CSV points are, ras or lps (mm) or index (voxels).
    of, angle, truth: of a turned copy the id of the pair it was made from, by how many degrees, and the turn itself (the map
    old moving world → new moving world, mm); without them an id such as ID_pose90_s0 says the first two.
    """

    id: str
    fixed: str
    moving: str
    group: str = "all"
    fixed_labels: str = ""
    moving_labels: str = ""
    fixed_points: str = ""
    moving_points: str = ""
    fixed_mask: str = ""
    moving_mask: str = ""
    points_space: str = "ras"
    ndim: int = 3
    of: str = ""
    angle: float | None = None
    truth: tuple[tuple[float, ...], ...] = field(default=(), repr=False)

    @property
    def key(self) -> str:
        """The id as a file name."""
        name = "".join(_OWN.get(c, c) if c.isprintable() else "_" for c in self.id)
        return name[:200] or "_"


def read_cases(source: str | Path | Iterable[Mapping[str, Any] | Case | str | Path]) -> list[Case]:
    """Cases from a CSV or JSON file (a list of pairs, or a Learn2Reg `*_dataset.json` or the folder that holds one), from several
    of them, or from rows already in memory. Paths are relative to the file's folder.

    Raises FormatError (unreadable, a row lacks a scan, none of the scans exists, ids repeat)."""
    if not isinstance(source, (str, Path)):
        source = list(source)
        if source and all(isinstance(item, (str, Path)) for item in source):
            return _checked([case for table in source for case in read_cases(table)], "cases")  # type: ignore[arg-type]
        return _checked([row if isinstance(row, Case) else _case(row, Path(), f"case {n}")  # type: ignore[arg-type]
                         for n, row in enumerate(source, 1)], "cases")
    path = home(source)
    if folder_there(path):
        found = sorted(path.glob("*_dataset.json"))
        if len(found) != 1:
            raise FormatError(f"cases: {path} holds {len(found)} files *_dataset.json; give a table of cases, or a folder with one of them")
        path = found[0]
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise FormatError(f"cases: {path} does not exist; check the path") from None
    except (OSError, ValueError) as error:
        raise FormatError(f"cases: {path} cannot be read as text: {error}; expected a table of pairs, .csv or .json") from error
    rows = _json(text, path) if path.suffix.lower() == ".json" else _csv(text, path)
    cases = [_case(row, path.parent, f"cases: {path}, pair {n}") for n, row in enumerate(rows, 1)]
    return _checked(cases, f"cases: {path}")


def _csv(text: str, path: Path) -> list[dict[str, Any]]:
    first = next(iter(io.StringIO(text)), "")
    try:
        reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=max(",;\t", key=first.count), strict=True, skipinitialspace=True)
        head = list(reader.fieldnames or ())
        if not {"fixed", "moving"} <= set(head):
            raise FormatError(f"cases: {path} has the columns {short(','.join(head))}; expected a header with fixed and moving, and a row "
                              "a pair")
        if len(head) > _COLUMNS:
            raise FormatError(f"cases: {path} has {len(head)} columns; expected at most {_COLUMNS}")
        if twice := sorted({name for name in head if name and head.count(name) > 1}):
            raise FormatError(f"cases: {path} has the column {short(twice[0])} twice; give each its own name")
        rows = list(reader)
    except csv.Error as error:
        raise FormatError(f"cases: {path} is not a readable CSV table: {error}") from error
    if not rows:
        raise FormatError(f"cases: {path} holds a header and no pairs; expected a row a pair")
    if any(None in row or None in row.values() for row in rows):
        n = next(n for n, row in enumerate(rows, 2) if None in row or None in row.values())
        raise FormatError(f"cases: {path}, row {n}: not as many cells as the header has")
    return rows


def _json(text: str, path: Path) -> list[dict[str, Any]]:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"cases: {path} is not JSON: {error}") from error
    if isinstance(content, dict) and any(key.endswith("_paired_images") or key.startswith("registration_") for key in content):
        return _learn2reg(content, path)
    if isinstance(content, dict):
        content = content.get("pairs")
    if not isinstance(content, list) or not all(isinstance(row, dict) for row in content):
        raise FormatError(f"cases: {path} is no list of pairs; expected [{{\"id\": …, \"fixed\": …, \"moving\": …}}, …] or a Learn2Reg "
                          "data set")
    return content


def _learn2reg(content: dict[str, Any], path: Path) -> list[dict[str, Any]]:
    """The pairs with a known truth: validation pairs, else test, else training pairs; labels and keypoints lie in folders
    named like the images' (imagesTr, labelsTr, keypointsTr or landmarksTr) under the same file names."""
    kinds = ("registration_val", "registration_test", "registration_train", "training_paired_images")
    pairs = next((content[kind] for kind in kinds if content.get(kind)), [])
    rows = []
    if not isinstance(pairs, list):
        raise FormatError(f"cases: {path}: {short(pairs)} is no list of pairs; expected Learn2Reg's")
    for pair in pairs:
        if not isinstance(pair, dict) or not {"fixed", "moving"} <= pair.keys():
            raise FormatError(f"cases: {path}: {short(pair)} names no fixed and moving image; expected Learn2Reg's pairs")
        row = {k: str(pair[k]) for k in ("fixed", "moving")}
        for side in ("fixed", "moving"):
            for kind, folders, suffix in _BESIDE:
                for folder in folders:
                    name = row[side].replace("images", folder)
                    name = name if suffix is None else name.removesuffix(".nii.gz") + suffix
                    if folder in name and there(path.parent / name) and f"{side}_{kind}" not in row:
                        row[f"{side}_{kind}"] = name
        for kind, *_ in _BESIDE[:2]:  # what only one scan has measures nothing
            if (f"fixed_{kind}" in row) != (f"moving_{kind}" in row):
                row = {k: v for k, v in row.items() if not k.endswith(f"_{kind}")}
        stems = [Path(row[k]).name.removesuffix(".nii.gz") for k in ("fixed", "moving")]
        rows.append({"id": "--".join(stems), "group": str(content.get("name", "all")), "points_space": "index", **row})
    return rows


def _case(row: Mapping[str, Any], base: Path, where: str) -> Case:
    known = {f.name for f in fields(Case)}
    for name in row:
        if name not in known and (near := _near(str(name)[:_COLUMNS])):  # other columns may be there for other programs
            raise FormatError(f"{where}: the column {short(name)} is not known; is {near} meant?")
    values = {str(k): v for k, v in row.items() if k in known and v not in (None, "") and v == v}  # a data frame's NaN is nothing
    for name in ("fixed", "moving"):
        if name not in values:
            raise FormatError(f"{where}: no {name}; expected the path of the {name} scan")
    for name in FILES:
        if name in values:
            values[name] = str(base / home(str(values[name])))
    for kind in ("labels", "points"):
        if (f"fixed_{kind}" in values) != (f"moving_{kind}" in values):
            has, lacks = ("fixed", "moving") if f"fixed_{kind}" in values else ("moving", "fixed")
            raise FormatError(f"{where}: {has}_{kind} without {lacks}_{kind}; expected both or neither")
    values["id"] = str(values.get("id", "--".join(Path(values[k]).name.split(".")[0] for k in ("fixed", "moving"))))
    values["group"] = str(values.get("group", "all"))
    try:
        ndim = values.get("ndim", 3)
        values["ndim"] = int(ndim)
        if not isinstance(ndim, str) and values["ndim"] != ndim:
            raise ValueError(f"ndim is {short(ndim)}")
        values["angle"] = float(values["angle"]) if "angle" in values else None
        values["truth"] = tuple(tuple(float(v) for v in line) for line in values.get("truth", ())) if not isinstance(
            values.get("truth"), str) else ()
        if not all(math.isfinite(v) for v in (values["angle"] or 0.0, *(v for line in values["truth"] for v in line))):
            raise ValueError("NaN or infinity")
        if values["truth"] and {len(values["truth"]), *map(len, values["truth"])} not in ({3}, {4}):
            raise ValueError("truth is no matrix of 3 or 4 rows and columns")
    except (TypeError, ValueError, OverflowError) as error:
        raise FormatError(f"{where}: {str(error)[:_COLUMNS]}; expected numbers in ndim, angle and truth") from error
    choose("points_space", values.setdefault("points_space", "ras"), ("ras", "lps", "index"))
    turned = _TURNED.fullmatch(values["id"]) if values["truth"] else None
    if turned:
        values.setdefault("of", turned[1])
        values["angle"] = float(turned[2]) if values["angle"] is None else values["angle"]
    if values["ndim"] not in (2, 3):
        raise FormatError(f"{where}: ndim is {values['ndim']}; expected 2 or 3")
    return Case(**values)


@cache
def _near(name: str) -> str:
    """The field that a column may stand for, or nothing."""
    return next(iter(difflib.get_close_matches(name, [f.name for f in fields(Case)], n=1, cutoff=0.85)), "")


def _checked(cases: Sequence[Case], where: str) -> list[Case]:
    if not cases:
        raise OptionError(f"{where}: no pairs; expected at least one")
    if not any(there(case.fixed) for case in cases):  # one that is missing fails alone; all of them are a wrong folder
        raise FormatError(f"{where}: none of the fixed scans exists (the first: {short(str(Path(cases[0].fixed).absolute()))}); check the "
                          "paths")
    seen: dict[str, str] = {}
    for case in cases:
        if case.key.lower() in seen:
            twin = seen[case.key.lower()]
            same = (f"the id {short(case.id)} is there twice" if twin == case.id else
                    f"the ids {short(twin)} and {short(case.id)} are the same as a file name")
            raise FormatError(f"{where}: {same}; give every pair its own")
        seen[case.key.lower()] = case.id
    return list(cases)
