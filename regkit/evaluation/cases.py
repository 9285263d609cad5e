"""The table of cases: a CSV, the JSON of pairs, or a Learn2Reg data set."""

from __future__ import annotations

import csv
import difflib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from regkit.errors import FormatError, OptionError, choose

FILES = ("fixed", "moving", "fixed_labels", "moving_labels", "fixed_points", "moving_points", "fixed_mask", "moving_mask")
_BESIDE = (("labels", ("labels",), None), ("points", ("landmarks", "keypoints"), ".csv"), ("mask", ("masks",), None))
_TURNED = re.compile(r"(.+)_(?:pose|turn)(\d+)_s(?:eed)?\d+")  # how the makers of turned copies name them
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
    path = Path(source).expanduser()
    if path.is_dir():
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
    try:
        dialect = csv.Sniffer().sniff(text.splitlines()[0], ",;\t") if text.strip() else csv.excel
        rows = list(csv.DictReader(text.splitlines(), dialect=dialect, strict=True))
    except csv.Error as error:
        raise FormatError(f"cases: {path} is not a readable CSV table: {error}") from error
    head = ",".join(k or "" for k in rows[0]) if rows else text.splitlines()[0] if text.strip() else ""
    if not rows and "fixed" in head and "moving" in head:
        raise FormatError(f"cases: {path} holds a header and no pairs; expected a row a pair")
    if not rows or not {"fixed", "moving"} <= set(rows[0]):
        raise FormatError(f"cases: {path} has the columns {head!r}; expected a header with fixed and moving, and a row a pair")
    if any(None in row or None in row.values() for row in rows):
        n = next(n for n, row in enumerate(rows, 2) if None in row or None in row.values())
        raise FormatError(f"cases: {path}, row {n}: not as many cells as the header has")
    return rows


def _json(text: str, path: Path) -> list[dict[str, Any]]:
    try:
        content = json.loads(text)
    except ValueError as error:
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
    for pair in pairs:
        if not isinstance(pair, dict) or not {"fixed", "moving"} <= pair.keys():
            raise FormatError(f"cases: {path}: {pair!r} names no fixed and moving image; expected Learn2Reg's pairs")
        row = {k: str(pair[k]) for k in ("fixed", "moving")}
        for side in ("fixed", "moving"):
            for kind, folders, suffix in _BESIDE:
                for folder in folders:
                    name = row[side].replace("images", folder)
                    name = name if suffix is None else name.removesuffix(".nii.gz") + suffix
                    if folder in name and (path.parent / name).exists() and f"{side}_{kind}" not in row:
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
        near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.85)
        if name not in known and near:  # other columns may be there for other programs
            raise FormatError(f"{where}: the column {name!r} is not known; is {near[0]} meant?")
    values = {str(k): v for k, v in row.items() if k in known and v not in (None, "")}
    for name in ("fixed", "moving"):
        if name not in values:
            raise FormatError(f"{where}: no {name}; expected the path of the {name} scan")
    for name in FILES:
        if name in values:
            values[name] = str(base / Path(str(values[name])).expanduser())
    for kind in ("labels", "points"):
        if (f"fixed_{kind}" in values) != (f"moving_{kind}" in values):
            has, lacks = ("fixed", "moving") if f"fixed_{kind}" in values else ("moving", "fixed")
            raise FormatError(f"{where}: {has}_{kind} without {lacks}_{kind}; expected both or neither")
    values["id"] = str(values.get("id", "--".join(Path(values[k]).name.split(".")[0] for k in ("fixed", "moving"))))
    values["group"] = str(values.get("group", "all"))
    try:
        values["ndim"] = int(values.get("ndim", 3))
        values["angle"] = float(values["angle"]) if "angle" in values else None
        values["truth"] = tuple(tuple(float(v) for v in line) for line in values.get("truth", ())) if not isinstance(
            values.get("truth"), str) else ()
    except (TypeError, ValueError) as error:
        raise FormatError(f"{where}: {error}; expected numbers in ndim, angle and truth") from error
    choose("points_space", values.setdefault("points_space", "ras"), ("ras", "lps", "index"))
    turned = _TURNED.fullmatch(values["id"]) if values["truth"] else None
    if turned:
        values.setdefault("of", turned[1])
        values["angle"] = float(turned[2]) if values["angle"] is None else values["angle"]
    if values["ndim"] not in (2, 3):
        raise FormatError(f"{where}: ndim is {values['ndim']}; expected 2 or 3")
    return Case(**values)


def _checked(cases: Sequence[Case], where: str) -> list[Case]:
    if not cases:
        raise OptionError(f"{where}: no pairs; expected at least one")
    if not any(Path(case.fixed).exists() for case in cases):  # one that is missing fails alone; all of them are a wrong folder
        raise FormatError(f"{where}: none of the fixed scans exists (the first: {Path(cases[0].fixed).absolute()}); check the paths")
    seen: dict[str, str] = {}
    for case in cases:
        if case.key.lower() in seen:
            twin = seen[case.key.lower()]
            same = (f"the id {case.id!r} is there twice" if twin == case.id else
                    f"the ids {twin!r} and {case.id!r} are the same as a file name")
            raise FormatError(f"{where}: {same}; give every pair its own")
        seen[case.key.lower()] = case.id
    return list(cases)
