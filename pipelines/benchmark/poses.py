"""How far a scan may be turned before a tool loses it: make turned copies, and count which of them were captured.

    python pipelines/benchmark/poses.py PAIRS.json -o POSES --ids ID,... [--angles 20,45,90,135,180] [--seeds 0,1]
    python pipelines/benchmark/run.py POSES/pairs.json -o POSE_RESULTS
    python pipelines/benchmark/poses.py --score POSES POSE_RESULTS RESULTS

A turned copy is resampled, not given another header: a tool that trusts headers gains nothing. The axis is random, the scale lies
within 0.85 and 1.15 and the shift is up to 15 % of the extent; the new grid, along RAS, holds the whole scan.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
from functools import lru_cache
from pathlib import Path

import numpy as np
import scoring

SCALE, SHIFT = (0.85, 1.15), 0.15
DICE, TRE, LEAST_MM = 0.95, 1.5, 1.0  # what counts as captured, against the map of the unturned pair


def turn(rng: np.random.Generator, degrees: float, centre: np.ndarray, extent: float) -> np.ndarray:
    """A turn about `centre`, scaled and shifted: old world → new world, RAS mm."""
    ndim, a = len(centre), np.deg2rad(degrees)
    if ndim == 2:
        rotation = np.array([[np.cos(a), -np.sin(a)], [np.sin(a), np.cos(a)]])
    else:
        x, y, z = (axis := rng.normal(size=3)) / np.linalg.norm(axis)
        k = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
        rotation = np.eye(3) + np.sin(a) * k + (1 - np.cos(a)) * k @ k
    matrix = np.eye(ndim + 1)
    matrix[:ndim, :ndim] = rotation * rng.uniform(*SCALE)
    matrix[:ndim, ndim] = centre - matrix[:ndim, :ndim] @ centre + rng.uniform(-SHIFT, SHIFT, ndim) * extent
    return matrix


def turned(pair: scoring.Pair, angle: float, seed: int, folder: Path) -> scoring.Pair:
    """Write the turned scan with its labels and points; the pair that names them, with the turn as `truth`."""
    import regkit

    image = regkit.read_image(pair["moving"])
    ndim, grid = image.ndim, image.grid
    spacing = grid.spacing[0].numpy()
    rng = np.random.default_rng([seed, int(angle), *pair["id"].encode()])
    truth = turn(rng, angle, grid.centre[0].numpy(), float((spacing * grid.shape).max()))
    ends = np.stack(np.meshgrid(*[(-0.5, n - 0.5) for n in grid.shape], indexing="ij"), -1).reshape(-1, ndim)
    box = np.c_[ends, np.ones(len(ends))] @ (truth @ grid.affine[0].numpy()).T[:, :ndim]
    step = float(spacing.min())
    affine = np.diag([step] * ndim + [1.0])
    affine[:ndim, ndim] = box.min(0) + step / 2
    shape = np.ceil((box.max(0) - box.min(0)) / step).astype(int).tolist()
    like = regkit.Image(image.data.new_zeros((1, 1, *shape)), regkit.Grid(tuple(shape), affine))
    back = regkit.Matrix(truth).inverse()  # new → old: the turned grid is the fixed one here
    name = f"{pair['id']}_turn{angle:g}_seed{seed}"
    new = {**pair, "id": name, "group": f"turn-{angle:g}", "truth": truth.tolist(), "of": pair["id"], "angle": angle}
    for key, way in (("moving", "linear"), ("moving_labels", "nearest")):
        if pair.get(key):
            item = regkit.read_image(pair[key]) if key != "moving" else image.luminance() if image.pixels else image
            new[key] = f"{name}_{key}.nii.gz"
            regkit.write_image(regkit.apply(item, [back], like=like, interpolation=way), folder / new[key], overwrite=True)
    if pair.get("moving_points"):
        points = regkit.read_points(pair["moving_points"], image=image)
        new["moving_points"] = f"{name}_moving_points.csv"
        moved = points.with_world(regkit.Matrix(truth)(points.world[None])[0])
        regkit.write_points(moved, folder / new["moving_points"], overwrite=True)
    for key in ("fixed", "fixed_labels", "fixed_points"):
        if pair.get(key):
            new[key] = os.path.relpath(pair[key], folder.resolve())
    return new


def make(given: argparse.Namespace) -> None:
    given.output.mkdir(parents=True, exist_ok=True)
    pairs = scoring.read_pairs(given.pairs[0], set(given.ids.split(",")) if given.ids else None)
    angles, seeds = ([float(a) for a in given.angles.split(",")], [int(s) for s in given.seeds.split(",")])
    cases = [turned(pair, angle, seed, given.output) for pair in pairs for angle in angles for seed in seeds]
    (given.output / "pairs.json").write_text(json.dumps(cases, indent=1), encoding="utf-8")
    print(f"{len(cases)} turned pairs in {given.output}")


def good(value: dict[str, float | None], reference: dict[str, float | None]) -> bool:
    """Whether a result is as good as the reference, but for a little."""
    if value["tre"] is not None and reference["tre"] is not None:
        return value["tre"] <= max(TRE * reference["tre"], LEAST_MM)
    return value["dice"] is not None and reference["dice"] is not None and value["dice"] >= DICE * reference["dice"]


def better(a: dict[str, float | None], b: dict[str, float | None]) -> bool:
    if a["tre"] is not None and b["tre"] is not None:
        return a["tre"] < b["tre"]
    return (a["dice"] or 0) > (b["dice"] or 0)


def capture(poses: Path, results: Path, unturned: Path, reference: str) -> list[dict[str, object]]:
    """Share of turned pairs that each tool captured, by angle.

    The measure of a turned pair is what the unturned map scores on it, carried through the turn: turn ∘ unturned map, of
    the tool that did best (`best`), so that all tools are held to one mark, or of the tool's own (`own`).
    """
    pairs = {pair["id"]: pair for pair in scoring.read_pairs(poses / "pairs.json")}
    with (results / "results.csv").open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["id"] in pairs]

    @lru_cache
    def carried(name: str, tool: str) -> dict[str, float | None]:
        pair, path = pairs[name], unturned / pairs[name]["of"] / tool / "matrix.txt"
        if not path.exists():
            return {"dice": None, "tre": None}
        return scoring.score(pair, np.array(pair["truth"]) @ np.loadtxt(path))

    @lru_cache
    def mark(name: str) -> dict[str, float | None]:
        known = [carried(name, path.parent.name) for path in sorted((unturned / pairs[name]["of"]).glob("*/matrix.txt"))]
        known = [k for k in known if k["dice"] is not None or k["tre"] is not None]
        best = known[0] if known else {"dice": None, "tre": None}
        for other in known[1:]:
            best = other if better(other, best) else best
        return best

    counts: dict[tuple[str, float], list[bool]] = {}
    for row in rows:
        wanted = mark(row["id"]) if reference == "best" else carried(row["id"], row["tool"])
        if wanted["dice"] is None and wanted["tre"] is None:
            print(f"{row['id']}: no unturned map of {pairs[row['id']]['of']} in {unturned}; left out")
            continue
        value = {k: float(row[k]) if row[k] else None for k in ("dice", "tre")}
        counts.setdefault((row["tool"], pairs[row["id"]]["angle"]), []).append(good(value, wanted))
    return [{"tool": tool, "angle": f"{angle:g}", "captured": sum(hits), "cases": len(hits), "share": round(sum(hits) / len(hits), 4)}
            for (tool, angle), hits in sorted(counts.items())]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pairs", type=Path, nargs="+", help="PAIRS.json; with --score: POSES, its results, the unturned results")
    parser.add_argument("-o", "--output", type=Path, help="folder of the turned pairs")
    parser.add_argument("--ids", help="ids or groups, with commas between them; all by default")
    parser.add_argument("--angles", default="20,45,90,135,180")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--score", action="store_true", help="count the captured ones and write capture.csv beside their results")
    parser.add_argument("--reference", choices=["best", "own"], default="best", help="whose unturned map is the measure")
    given = parser.parse_args()
    if len(given.pairs) != (3 if given.score else 1) or (not given.score and given.output is None):
        parser.error("give PAIRS.json -o POSES, or --score POSES POSE_RESULTS RESULTS")
    if not given.score:
        make(given)
        return
    rows = capture(*given.pairs, given.reference)
    if not rows:
        raise SystemExit("nothing to count: no turned pair has both a result and an unturned map")
    with (given.pairs[1] / "capture.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    for row in rows:
        print(f"{row['tool']:12} {row['angle']:>4}° {row['captured']}/{row['cases']} {row['share']:.0%}")


if __name__ == "__main__":
    main()
