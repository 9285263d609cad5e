"""What a registration left in a case's folder: a map, or moved labels and carried landmarks; and regkit's own alignment."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from regkit.displacement import Displacement
from regkit.errors import FormatError, RegkitError
from regkit.evaluation.cases import Case
from regkit.evaluation.score import Outcome, Truth, case_folder, label_map
from regkit.io import output_file, output_folder, read_field, read_image, read_points, read_transform, sha256, write_transform
from regkit.registration.settings import Settings
from regkit.space import Transform

MAPS = ("transform.tfm", "transform.mat", "transform.h5", "transform.txt", "transform.json", "displacement.nii.gz", "displacement.nii")
OWNED = ("transform.tfm", "transform.json", "registration.json", "run.json")


def read_outcome(folder: str | Path, case: Case, truth: Truth) -> Outcome:
    """A method's files of a case: `transform.tfm|.mat|.h5|.txt` (ITK's), `transform.json` (regkit's) or `displacement.nii.gz` (ITK's,
    LPS), which score labels and landmarks alike; without a map `labels.nii.gz` (the moving labels on the fixed grid) and `points.csv`
    (the fixed landmarks in the moving scan). Optional: `inverse.tfm|…` or `inverse_displacement.nii.gz`, and `run.json` with seconds,
    peak_mb and a verdict {status, probability}.

    Raises FormatError where there is nothing, or files of two maps."""
    place = case_folder(folder, case)
    if not place.is_dir():
        raise FormatError(f"no result: {place} does not exist")
    found = [place / name for name in MAPS if (place / name).exists()]
    if any(path.suffix == ".json" for path in found):  # regkit writes the same map as a field beside it
        found = [path for path in found if "displacement" not in path.name]
    if len(found) > 1:
        raise FormatError(f"{place} holds {found[0].name} and {found[1].name}; expected one map")
    cost = _cost(place / "run.json")
    outcome = Outcome(**cost)
    if found:
        names = [name.replace("transform.", "inverse.").replace("displacement.", "inverse_displacement.") for name in MAPS]
        back = [place / name for name in names if (place / name).exists()]
        return replace(outcome, transform=_map(found[0], truth.ndim), back=_map(back[0], truth.ndim) if back else None)
    labels, points = place / "labels.nii.gz", place / "points.csv"
    if not labels.exists() and not points.exists():
        raise FormatError(f"no result: {place} holds none of {', '.join((*MAPS, labels.name, points.name))}")
    moved = carried = None
    if labels.exists() and truth.fixed_labels is not None:
        moved = label_map(read_image(labels, name="labels"), "labels")
        if not moved.grid.same_as(truth.fixed_labels.grid):
            raise FormatError(f"labels: {labels} lies on {moved.grid!r}, the fixed labels on {truth.fixed_labels.grid!r}; "
                              "resample onto the fixed grid, or give the transform")
    if points.exists() and truth.fixed_points is not None:
        carried = read_points(points, space=case.points_space, image=truth.moving)
        if len(carried) != len(truth.fixed_points):
            raise FormatError(f"points: {points} holds {len(carried)} landmarks, the fixed scan {len(truth.fixed_points)}; "
                              "expected as many")
    return replace(outcome, labels=moved, points=carried)


def _map(path: Path, ndim: int) -> Transform:
    return Displacement(read_field(path, ndim)) if "displacement" in path.name else read_transform(path, ndim)


def _cost(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
        cost: dict[str, Any] = {k: float(said[k]) for k in ("seconds", "peak_mb") if said.get(k) is not None}
        verdict = said.get("verdict") or {}
        return cost | ({"verdict": str(verdict["status"]), "probability": float(verdict["probability"])} if verdict else {})
    except (ValueError, TypeError, KeyError, AttributeError, OSError, OverflowError, RecursionError) as error:
        raise FormatError(f"{path} is not readable: {error}; expected {{\"seconds\": …, \"peak_mb\": …}}") from error


def align_case(case: Case, settings: Settings, folder: Path) -> None:
    """Register a case and write transform.tfm, registration.json and run.json into its folder, unless they are there, made
    with the same settings from the same files."""
    from regkit.registration.align import align

    place = folder / case.key
    scans = {name: getattr(case, name) for name in ("fixed", "moving", "fixed_mask", "moving_mask") if getattr(case, name)}
    asked = {"settings": replace(settings, threads=None).as_dict(), "inputs": {name: sha256(path) for name, path in scans.items()}}
    done = _read(place / "run.json")
    if {k: done.get(k) for k in asked} != asked:
        _reset_peak()
        result = align(**scans, settings=settings)
        said = {**asked, "seconds": result.trace["seconds"]["total"], "peak_mb": _peak_mb(), "verdict": result.verdict.as_dict()}
        with output_folder(place, overwrite=True, owned=OWNED) as stage:
            write_transform(result.transform, stage / OWNED[0 if result.affine else 1])
            (stage / OWNED[2]).write_text(json.dumps(result.record(), indent=1) + "\n", encoding="utf-8")
            (stage / OWNED[3]).write_text(json.dumps(said, indent=1) + "\n", encoding="utf-8")


def _read(path: Path) -> dict[str, Any]:
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
        return said if isinstance(said, dict) else {}
    except (OSError, ValueError, RecursionError):
        return {}


def _reset_peak() -> None:
    """Linux forgets the process's peak memory when asked; elsewhere it stays that of all cases so far."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def _peak_mb() -> float | None:
    """Peak resident memory of this process in MB (10^6 bytes)."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024 / 1e6
    except (OSError, StopIteration, ValueError):
        pass
    try:
        import resource
    except ImportError:  # Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e6


def write_json(path: Path, content: Any) -> None:
    """JSON, aside and renamed; numbers that are none become null."""
    with output_file(path, overwrite=True) as temporary:
        temporary.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def reason_of(error: BaseException) -> str:
    """Why a case failed, in a line."""
    text = " ".join(str(error).split())
    return text if isinstance(error, RegkitError) else f"{type(error).__name__}: {text}"
