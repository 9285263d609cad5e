"""Cases that are always tried, before any are drawn: valid files through every door, bombs, and names under which nothing lies."""

from __future__ import annotations

from typing import Any

import bombs
import seeds

DOORS = {
    "image": {"read": 14, "doctor": 3, "fix": 2, "cli register": 1, "cli apply": 1, "cli like": 1, "cli doctor": 1},
    "transform": {"read": 10, "cli apply": 2, "cli register": 1},
    "points": {"read": 10, "cli apply": 2, "cli register": 1},
    "cases": {"read": 10, "cli evaluate": 1}, "scans": {"read": 1},
    "tensors": {"read": 1}, "net": {"read": 10, "cli register": 1}, "checkpoint": {"read": 1},
    "record": {"cli report": 3, "cli replay": 1},
}
"""What opens a kind of file, and how often."""
_TAKEN = {"nifti int16": DOORS["image"], "nifti float32 gz": DOORS["image"], "nrrd int16": DOORS["image"], "tfm affine": DOORS["transform"],
          "csv points": DOORS["points"], "csv pairs": DOORS["cases"], "net keypoints": DOORS["net"], "record": ["cli report"]}
"""Valid files that every door takes; others are of another dimension than what stands beside them."""
_IMAGES, _WORDS = ("nifti", "mgz", "nrrd", "mha", "png", "jpg", "bmp", "tif"), {
    "csv": "points", "fcsv": "points", "markups": "points", "pairs": "cases", "tfm": "transform", "json": "transform", "record": "record"}
_BOMB_DOORS = {"image": ["read", "cli doctor"], "record": ["cli report", "cli replay"], "cases": ["read"], "points": ["read", "cli apply"],
               "transform": ["read", "cli apply"], "net": ["read", "cli register"]}
PATHS = ["~nobody-here/scan{}", "a" * 300 + "{}", "nul\0in it{}", "sub/../../{}", "{}", "", ".", "line\nbreak{}", "no file{}",
         "%n%s{}", "/dev/null", "\ud800{}"]
"""Names under which nothing lies, or nothing good; the braces are the suffix."""
_NAMED = {"nifti int16": ["read", "doctor", "cli register"], "nrrd int16": ["read", "cli doctor"], "tfm affine": ["read", "cli apply"],
          "csv points": ["read", "cli apply"],
          "csv pairs": ["read", "cli evaluate"], "csv scans": ["read"], "net keypoints": ["read", "cli register"],
          "record": ["cli report", "cli replay"]}
ODD = ["sc\udcffan", "scän", "s can", "s'c\"a$(n)", "line\nbreak", "%n%s", "-o", "a" * 200, "scan.nii"]
"""Stems of names that a file may well have."""


def _of_valid() -> list[dict[str, Any]]:
    found = []
    for name in seeds.MAKERS:
        for door in DOORS[seeds.seed(name).kind]:
            sure = door in _TAKEN.get(name, ()) or (door in ("read", "doctor", "cli doctor") and name != "nifti 4d gz")
            found.append({"seed": name, "door": door, "inner": [], "outer": [], "expected": "read" if sure else "any"})
    return found


def _of_bombs() -> list[dict[str, Any]]:
    found = []
    for name, (expected, _) in bombs.MAKERS.items():
        first, second = name.split()[:2]
        kind = "image" if first not in ("bomb", "pickle") or second in _IMAGES else "net" if second == "net" else _WORDS.get(second, "")
        for door in _BOMB_DOORS.get(kind, ["read"]):
            sure = door == "read" or (expected == "refused" and kind != "image")
            found.append({"seed": name, "door": door, "inner": [], "outer": [], "expected": expected if sure else "any"})
    return found


def _of_names() -> list[dict[str, Any]]:
    found = []
    for name, doors in _NAMED.items():
        suffix = seeds.seed(name).suffix
        for door in doors:
            found += [{"seed": name, "door": door, "inner": [], "outer": [], "path": path.format(suffix),
                       "expected": "any" if name == "csv scans" and path in ("", ".") else "refused"} for path in PATHS]
            found += [{"seed": name, "door": door, "inner": [], "outer": [], "stem": stem,
                       "expected": "any" if "\udcff" in stem or door == "cli replay" else "read"} for stem in ODD
                      if stem != "-o" or door == "read"]
    return found


RECIPES = [*_of_valid(), *_of_bombs(), *_of_names()]
