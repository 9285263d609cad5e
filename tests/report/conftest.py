"""A small evaluation with all that a page can tell, and the pictures of its cases."""

import copy

import pytest
import torch

from regkit.image import Image
from regkit.report.views import view
from regkit.space import Grid, Matrix

MEASURES = {
    "dice": {"name": "Dice", "unit": "", "better": "high"}, "hd95_mm": {"name": "HD95", "unit": "mm", "better": "low"},
    "asd_mm": {"name": "ASD", "unit": "mm", "better": "low"}, "tre_mm": {"name": "TRE", "unit": "mm", "better": "low"},
}


def _pair() -> tuple[Image, Image, Image]:
    """A scan of blobs, its copy 6 mm to the left, and labels of both alike."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(1, 1, 6, 7, 6, generator=generator)
    fixed = Image(torch.nn.functional.interpolate(coarse, (48, 56, 48), mode="trilinear"), Grid((48, 56, 48), torch.eye(4).double()))
    moving = Image(fixed.data, Grid((48, 56, 48), Matrix.shift(torch.tensor([[6.0, 0, 0]])).matrix[0]))
    return fixed, moving, fixed.with_data((fixed.data > 0.6).to(torch.uint8))


@pytest.fixture(scope="session")
def pictures() -> dict:
    """What `view` gives: with labels and landmarks, and of a case that failed."""
    fixed, moving, labels = _pair()
    moving_labels = Image(labels.data, moving.grid)
    here = torch.tensor([[20.0, 30, 24], [30, 20, 20], [12, 40, 30]])
    shift = torch.tensor([[6.0, 0, 0]])
    luggage = {"fixed_labels": labels, "moving_labels": moving_labels, "fixed_points": here, "moving_points": here + shift}
    return {"good": view(fixed, moving, Matrix.shift(shift), **luggage), "failed": view(fixed, moving, None, **luggage),
            "outlines": view(fixed, moving, None, moved_labels=labels, **luggage)}


@pytest.fixture
def views(pictures) -> dict:
    """Pictures of every case of `evaluation`: of c0 by `other` only outlines, of c1 by `other` none, c2 failed."""
    shown = {f"{method}/c{k}": pictures["good"] for method in ("regkit", "other") for k in range(14)}
    del shown["other/c1"]
    return {**shown, "regkit/c2": pictures["failed"], "other/c0": pictures["outlines"]}


_CASES = [{"id": f"c{k}", "group": ("heads", "hands")[k % 2], "method": method, "status": "ok", "reason": None, "dice_before": 0.2,
           "dice": 0.9 - k / 20 - turn / 10, "hd95_before_mm": 20.0, "hd95_mm": 3.0 + k, "asd_mm": None, "tre_before_mm": 9.0,
           "tre_mm": 1.0 + k, "tre_p90_mm": 2.0 + k, "seconds": 3.0, "badness": 0.1 + k / 20 + turn / 100, "why": f"Reason {k}."}
          for turn, method in enumerate(("regkit", "other")) for k in range(14)]
_CASES[2] |= {"status": "failed", "reason": "the scans do not overlap", "dice": None, "hd95_mm": None, "tre_mm": None,
              "tre_p90_mm": None, "badness": 1.0, "why": "It failed."}
_CASES[0] |= {"verdict": "PASS", "probability": 0.98}
_CASES[1] |= {"verdict": "FAIL", "probability": 0.031}

_EVALUATION = {
    "title": "Two methods", "regkit": "0.1.0", "created": "2026-01-02T03:04:05Z", "command": "regkit evaluate pairs.csv -o out",
    "methods": ["regkit", "other"], "baseline": "other", "groups": ["heads", "hands"], "measures": MEASURES,
    "table": [{"group": group, "method": method, "measure": measure, "n": 14, "mean": 0.5 + turn, "sd": 0.1, "median": 0.5, "worst30": 0.4,
               "low": 0.3, "high": 0.6, "before": None, "undefined": turn} for group in ("all", "heads", "hands")
              for turn, method in enumerate(("regkit", "other")) for measure in ("dice", "tre_mm")],
    "tests": [{"measure": "dice", "method": "regkit", "against": "other", "n": 14, "difference": 0.1, "p": 0.0001, "p_holm": None}],
    "ranks": [{"method": "regkit", "rank": 1.25}, {"method": "other", "rank": 1.75}],
    "success": [{"measure": "tre_mm", "threshold": 5, "method": "regkit", "share": 0.5, "n": 14}],
    "capture": [{"method": method, "angle": angle, "captured": 9 - angle // 20 - turn, "cases": 10}
                for turn, method in enumerate(("regkit", "other")) for angle in (0, 30, 60, 90)],
    "cases": _CASES,
    "labels": [{"id": f"c{k}", "method": "regkit", "label": n, "name": ("cord", "lobe")[n], "dice_before": 0.1, "dice": 0.5 + n / 10,
                "hd95_mm": None} for k in range(3) for n in range(2)],
    "points": [{"id": f"c{k}", "method": "regkit", "point": f"p{n}", "tre_before_mm": 9.0 + n, "tre_mm": 2.0 + n}
               for k in range(3) for n in range(4)],
}


@pytest.fixture
def evaluation() -> dict:
    return copy.deepcopy(_EVALUATION)


@pytest.fixture
def record() -> dict:
    """The content of a registration.json."""
    return {
        "matrix": [[1.0, 0, 0, 6], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]], "versions": {"regkit": "0.1.0", "torch": "2"},
        "inputs": {name: {"path": f"/scans/{name}.nii.gz", "sha256": "0" * 64, "shape": [48, 56, 48], "spacing_mm": [1.0, 1.0, 1.0],
                          "orientation": "RAS"} for name in ("fixed", "moving")},
        "seed": 0, "model": "rigid", "device": "cpu", "threads": 1, "levels_mm": [8.0, 4.0],
        "chosen": {"similarity": "lncc", "why": ""}, "similarity": {"before": 0.2, "after": 0.9},
        "verdict": {"status": "PASS", "probability": 0.97, "expected_tre_mm": 3.2, "likely_tre_mm": [1.1, 9.0], "reasons": ["all agrees"]},
        "evidence": {"mind": 0.6},
        "guard": {"findings": [], "hopeless": False, "overlap": 0.9, "similarity_header": 0.2, "similarity_end": 0.9},
        "candidates": [], "notes": ["a note"], "seconds": {"read": 0.1, "total": 2.0}, "settings": {"model": "rigid", "volume": None},
    }
