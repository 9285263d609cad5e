"""How well any affine map could do on each pair: least squares on the landmarks, or the map that lays the label maps on each other.

    python pipelines/benchmark/ceiling.py PAIRS.json -o ceiling.csv [--from RESULTS] [--only GROUP]

For labels the mean Dice itself is climbed (Powell's search, from the labels' centres and from regkit's map in RESULTS): what it
finds is a lower bound of the best. Minutes for a map of a hundred labels.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

import numpy as np
import scoring
from scipy import ndimage, optimize

POINTS, UNIT, ROUNDS = 150_000, 0.05, 2  # voxels looked at; step of the search, of the labels' extent; restarts


def of_points(pair: scoring.Pair) -> np.ndarray:
    """The affine map with the least squared distance between the landmarks."""
    import regkit

    here, there = (regkit.read_points(pair[f"{name}_points"], image=regkit.read_image(pair[name])).world.numpy()
                   for name in ("fixed", "moving"))
    matrix = np.eye(here.shape[1] + 1)
    matrix[:-1] = np.linalg.lstsq(np.c_[here, np.ones(len(here))], there, rcond=None)[0].T
    return matrix


def of_labels(pair: scoring.Pair, starts: list[np.ndarray]) -> np.ndarray:
    """The affine map with the highest mean Dice that the search finds."""
    import regkit

    images = [regkit.read_image(pair[f"{name}_labels"]) for name in ("fixed", "moving")]
    (fixed, moving), (home, away) = ((i.data[0, 0].numpy().round().astype(int) for i in images), (i.grid.affine[0].numpy() for i in images))
    d, back = fixed.ndim, np.linalg.inv(away)
    names = np.unique(fixed[fixed > 0])
    number = np.zeros(max(fixed.max(), moving.max()) + 1, int)
    number[names] = np.arange(1, len(names) + 1)
    fixed, moving = number[fixed.clip(0)], number[moving.clip(0)]
    voxels = np.argwhere(ndimage.binary_dilation(fixed > 0, iterations=6))
    voxels = np.random.default_rng(0).permutation(voxels)[:POINTS]
    label, world = fixed[tuple(voxels.T)], voxels @ home[:d, :d].T + home[:d, d]
    here = np.bincount(label, minlength=len(names) + 1)
    centre = world[label > 0].mean(0)
    frame = np.eye(d + 1)
    frame[:d, :d] /= np.abs(world - centre).max()
    frame[:d, d] = -frame[:d, :d] @ centre

    def dice(matrix: np.ndarray) -> float:
        index = np.floor((world @ matrix[:d, :d].T + matrix[:d, d]) @ back[:d, :d].T + back[:d, d] + 0.5).astype(int)
        inside = ((index >= 0) & (index < moving.shape)).all(1)
        seen = np.where(inside, moving[tuple(np.where(inside[:, None], index, 0).T)], 0)
        both, there = (np.bincount(v, minlength=len(names) + 1) for v in (label[seen == label], seen))
        return float(np.mean(2 * both[1:] / np.maximum(here + there, 1)[1:]))

    shared = [k for k in range(1, len(names) + 1) if here[k] and (moving == k).any()]
    if len(shared) > 2 * d:  # enough centres to begin from
        p = np.array([[*world[label == k].mean(0), 1] for k in shared])
        q = np.array([np.argwhere(moving == k).mean(0) @ away[:d, :d].T + away[:d, d] for k in shared])
        weight = np.sqrt(here[shared])[:, None]
        starts = [*starts, np.r_[np.linalg.lstsq(p * weight, q * weight, rcond=None)[0].T, np.eye(d + 1)[d:]]]
    best: tuple[float, np.ndarray] = (-1.0, np.eye(d + 1))
    for start in starts or [best[1]]:
        def moved(theta: np.ndarray, start: np.ndarray = start) -> np.ndarray:
            step = np.eye(d + 1)
            step[:d] += UNIT * theta.reshape(d, d + 1)
            return start @ np.linalg.inv(frame) @ step @ frame

        theta = np.zeros(d * (d + 1))
        for _ in range(ROUNDS):
            theta = optimize.minimize(lambda t, m=moved: -dice(m(t)), theta, method="Powell",
                                      options={"maxiter": 6, "xtol": 0.02, "ftol": 1e-4}).x
        best = max(best, (dice(moved(theta)), moved(theta)), key=lambda one: one[0])
    return best[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pairs", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True, help="a CSV file")
    parser.add_argument("--from", dest="results", type=Path, help="results of run.py, for regkit's maps to begin from")
    parser.add_argument("--only", help="ids or groups, with commas between them")
    given = parser.parse_args()
    with given.output.open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, ["id", "group", "dice", "tre"])
        table.writeheader()
        for pair in scoring.read_pairs(given.pairs, set(given.only.split(",")) if given.only else None):
            known = given.results / pair["id"] / "regkit" / "matrix.txt" if given.results else None
            starts = [np.loadtxt(known)] if known and known.exists() else []
            matrix = of_points(pair) if pair.get("fixed_points") else of_labels(pair, starts)
            row = {"id": pair["id"], "group": pair["group"], **scoring.score(pair, matrix)}
            table.writerow(row)
            file.flush()
            print(*(f"{v:.4g}" if isinstance(v, float) else v for v in row.values() if v is not None), flush=True)


if __name__ == "__main__":
    main()
