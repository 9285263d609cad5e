"""Seconds of `SpatialTransformer` against torch's own pair `affine_grid` + `grid_sample`, forward and backward, in the same run.

    python pipelines/benchmark/transformer.py -o OUT [--threads 1] [--repeats 15]

Both are given random affine maps near the identity for a whole batch; gradients go to the parameters and to the images. They take
turns, so that both meet the same machine; the ratio is that of the medians. Writes OUT/transformer.csv and prints a table.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import regkit
from regkit.localisation import FreeParameters

SIZES = (((256, 256), 32, 1), ((256, 256), 32, 3), ((128, 128, 128), 1, 1), ((128, 128, 128), 2, 1))


def contestants(shape: tuple[int, ...], batch: int, channels: int) -> dict[str, Callable[[], None]]:
    """What is timed: name → one forward and backward pass."""
    d = len(shape)
    images = torch.randn(batch, channels, *shape, requires_grad=True)
    free = FreeParameters(d * d + d, batch)
    nn.init.normal_(free.theta, std=0.1)
    matrices = nn.Parameter(torch.eye(d, d + 1) + 0.1 * torch.randn(batch, d, d + 1))

    def torch_pair() -> None:
        grid = F.affine_grid(matrices, list(images.shape), align_corners=False)
        F.grid_sample(images, grid, align_corners=False).sum().backward()

    def ours(**options: str) -> Callable[[], None]:
        layer = regkit.SpatialTransformer(free, **options)
        return lambda: layer(images).sum().backward()

    return {"torch": torch_pair, "regkit": ours(antialias="none"), "regkit, border": ours(antialias="none", padding="border"),
            "regkit, anti-aliased": ours()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=15)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    rows = []
    for shape, batch, channels in SIZES:
        runs = contestants(shape, batch, channels)
        times: dict[str, list[float]] = {name: [] for name in runs}
        for turn in range(given.repeats + 1):  # the first warms up
            for name, run in runs.items():
                began = time.perf_counter()
                run()
                if turn:
                    times[name].append(time.perf_counter() - began)
        middle = {name: statistics.median(found) for name, found in times.items()}
        for name, seconds in middle.items():
            rows.append({"shape": "×".join(map(str, shape)), "batch": batch, "channels": channels, "what": name,
                         "ms": round(1000 * seconds, 1), "ratio": round(seconds / middle["torch"], 2)})
            print(" ".join(str(value) for value in rows[-1].values()), flush=True)
    given.output.mkdir(parents=True, exist_ok=True)
    with (given.output / "transformer.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
