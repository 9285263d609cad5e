"""How time and memory of the whole regkit command grow with the size of the scans.

    python pipelines/benchmark/scaling.py -o RESULTS [--sizes 64,128,256,384,512] [--shape 512,512,400 --spacing 0.8,0.8,1]

The scans are made for it: sums of round Gaussian blobs, large ones for the body and small ones for its texture, and noise. A turned
sum of round blobs is the same sum with turned centres, so the second scan is exact and is written slice by slice, without resampling.
"""

from __future__ import annotations

import argparse
import csv
import json
import multiprocessing
import sys
import tempfile
from pathlib import Path

import measure
import numpy as np

COLUMNS = ["size", "voxels", "spacing", "repeat", "status", "seconds", "align_seconds", "peak_mb", "error_mm", "stages"]
EXTENT, ANGLE = 240.0, 20.0  # mm; degrees
BODY, TEXTURE = 40, 500


def blobs(extent: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Centres (K, 3) in mm from the middle, widths and heights of blobs within an ellipsoid of 0.6 of the extent: none is cut off."""
    rng = np.random.default_rng(7)
    count = BODY + TEXTURE
    ways = rng.normal(size=(count, 3))
    ways *= rng.uniform(size=(count, 1)) ** (1 / 3) / np.linalg.norm(ways, axis=1, keepdims=True)
    body = np.arange(count) < BODY
    widths = np.where(body, rng.uniform(0.05, 0.08, count), rng.uniform(0.012, 0.035, count)) * extent.min()
    heights = np.where(body, rng.uniform(100, 300, count), rng.uniform(-150, 250, count))
    return ways * extent * 0.3, widths, heights


def turn() -> np.ndarray:
    """fixed → moving: 20° about an oblique axis through the middle."""
    x, y, z = np.array([1.0, 2.0, 3.0]) / np.sqrt(14)
    k, a = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]]), np.deg2rad(ANGLE)
    return np.eye(3) + np.sin(a) * k + (1 - np.cos(a)) * k @ k


def write_scan(path: str, shape: tuple[int, ...], spacing: tuple[float, ...], turned: bool) -> None:
    """One int16 scan; runs in a process of its own, whose memory goes when it ends."""
    import nibabel

    centres, widths, heights = blobs(np.array(shape) * spacing)
    if turned:
        centres = centres @ turn().T
    rng = np.random.default_rng(int(turned))
    along = [np.exp(-(((np.arange(n) - (n - 1) / 2)[:, None] * s - c) ** 2) / (2 * widths**2)).astype(np.float32)
             for n, s, c in zip(shape, spacing, centres.T, strict=True)]
    scan = np.empty(shape, np.int16, order="F")
    for k in range(shape[2]):  # a Gaussian is a product along the axes: one matrix product makes a slice
        plane = (along[0] * (heights * along[2][k]).astype(np.float32)) @ along[1].T
        scan[:, :, k] = np.clip(plane, 0, 30000) + rng.normal(0, 8, plane.shape).astype(np.float32)
    affine = np.diag([*spacing, 1.0])
    affine[:3, 3] = -(np.array(shape) - 1) / 2 * spacing
    nibabel.save(nibabel.Nifti1Image(scan, affine), path)


def once(shape: tuple[int, ...], spacing: tuple[float, ...], threads: int, repeats: int, limit: float) -> list[dict[str, object]]:
    """Make one pair, register it by the command line, and say what it took."""
    label = str(shape[0]) if len(set(shape)) == 1 else "x".join(map(str, shape))
    rows = []
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        for name in ("fixed", "moving"):
            child = multiprocessing.get_context("spawn").Process(
                target=write_scan, args=(str(folder / f"{name}.nii.gz"), shape, spacing, name == "moving"))
            child.start()
            child.join()
        for repeat in range(repeats):
            out = folder / f"out{repeat}"
            command = [sys.executable, "-m", "regkit", "register", str(folder / "fixed.nii.gz"), str(folder / "moving.nii.gz"),
                       "-o", str(out), "--threads", str(threads), "--device", "cpu", "--quiet"]
            cost = measure.run([command], folder / "log.txt", threads, limit)
            row: dict[str, object] = {"size": label, "voxels": int(np.prod(shape)), "spacing": "x".join(f"{s:g}" for s in spacing),
                                      "repeat": repeat, "status": "ok" if cost.code == 0 else f"exit {cost.code}",
                                      "seconds": round(cost.seconds, 3), "peak_mb": round(cost.peak_mb, 1)}
            if (out / "registration.json").exists():
                record = json.loads((out / "registration.json").read_text(encoding="utf-8"))
                corners = np.array(np.meshgrid(*[(-1, 1)] * 3)).reshape(3, -1) * (np.array(shape) * spacing * 0.3)[:, None]
                m = np.array(record["matrix"])
                error = np.linalg.norm(m[:3, :3] @ corners + m[:3, 3:] - turn() @ corners, axis=0).mean()
                row.update(align_seconds=record["seconds"]["total"], stages=json.dumps(record["seconds"]), error_mm=round(float(error), 3))
            else:
                print((folder / "log.txt").read_text(encoding="utf-8")[-500:])
            rows.append(row)
            print(" ".join(f"{k} {v}" for k, v in row.items() if k != "stages"), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--sizes", default="64,128,256,384,512", help="voxels along each edge of cubes of 240 mm; empty for none")
    parser.add_argument("--shape", help="one more scan, such as 512,512,400")
    parser.add_argument("--spacing", default="1,1,1", help="its voxel in mm")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--limit", type=float, default=3600, help="seconds after which a run is ended")
    given = parser.parse_args()
    given.output.mkdir(parents=True, exist_ok=True)
    measure.bind(given.threads)
    cases = [((n,) * 3, (EXTENT / n,) * 3) for n in (int(s) for s in given.sizes.split(",") if s)]
    if given.shape:
        cases.append((tuple(int(n) for n in given.shape.split(",")), tuple(float(s) for s in given.spacing.split(","))))
    with (given.output / "scaling.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        for shape, spacing in cases:
            writer.writerows(once(shape, spacing, given.threads, given.repeat, given.limit))
            file.flush()


if __name__ == "__main__":
    main()
