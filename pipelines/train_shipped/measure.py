"""How far off a net's answers are, without refinement, on pairs of scans it never saw, turned anyhow and in changed contrasts.

    python pipelines/train_shipped/measure.py NET PAIRS.json -o OUT [--turns 4] [--groups brain]
        [--without brain-afids] [--refined] [--starts net,search]

PAIRS.json lists pairs with points or label maps: the truth is the affine map that fits the points, or the label maps' centres of mass,
best. Each pair is measured as it is, with the moving scan inverted and with noise; each scan is turned by a rotation of its own, drawn
evenly from all. What is measured is `regkit.align(start="net:NET", levels=0)`; with --refined also what refinement makes of it. Writes
OUT/cases.csv and OUT/table.md: medians and 90th percentiles of the rotation's and the centre's error, and the share within 20° and 20 mm.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import time
from dataclasses import replace
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

import regkit
from regkit.space import MODELS, Grid
from regkit.training.poses import turned
from regkit.training.validate import angle

VARIANTS = ("as it is", "inverted", "noisy")
NOISE = 0.15  # of the range


@cache
def scan(path: Path) -> regkit.Image:
    """One channel, from 0 to 1."""
    image = regkit.read_image(path).luminance()
    data = torch.nan_to_num(image.data.float())
    low, high = data.min(), torch.quantile(data.flatten()[:: max(1, data.numel() // 10**6)], 0.999)
    return image.with_data(((data - low) / (high - low)).clamp(0, 1))


def changed(image: regkit.Image, variant: str) -> regkit.Image:
    data = image.data
    if variant == "inverted":
        data = torch.where(data > 0.02, 1.02 - data, torch.zeros_like(data))
    elif variant == "noisy":
        data = (data + NOISE * torch.randn(data.shape, generator=torch.Generator().manual_seed(1))).clamp(0, 1)
    return image.with_data(data)


def laid(image: regkit.Image, turn: Tensor) -> regkit.Image:
    """The scan with its header turned about its middle; turn: (1, D+1, D+1) in mm."""
    return replace(image, grid=Grid(image.grid.shape, turn @ image.grid.affine))


def about(rotation: Tensor, centre: Tensor) -> Tensor:
    """(1, D+1, D+1): a rotation (1, D, D) about a centre (1, D)."""
    d = centre.shape[1]
    found = torch.eye(d + 1, dtype=torch.float64)[None].clone()
    found[:, :d, :d] = rotation
    found[:, :d, d] = centre - (rotation @ centre[..., None])[..., 0]
    return found


@cache
def _centres(path: Path) -> dict[int, tuple[Tensor, float]]:
    image = regkit.read_image(path)
    data = image.data[0, 0].long()
    where, label = data.nonzero().double(), data[data > 0]
    count = torch.zeros(int(label.max()) + 1, dtype=torch.float64).index_add_(0, label, torch.ones(len(label), dtype=torch.float64))
    total = torch.zeros(len(count), image.ndim, dtype=torch.float64).index_add_(0, label, where)
    world = image.grid.to_world((total / count[:, None].clamp_min(1))[None])[0]
    return {i: (world[i], float(count[i])) for i in range(1, len(count)) if count[i] > 30}


def truth(pair: dict, folder: Path) -> tuple[Tensor, Tensor]:
    """The affine map (1, D+1, D+1) of fixed to moving, and the middle (1, D) of what tells it."""
    if "fixed_points" in pair:
        p, q = (regkit.read_points(folder / pair[f"{name}_points"]).world[None] for name in ("fixed", "moving"))
        return MODELS["affine"].fit(p, q), p.mean(1)
    fixed, moving = (_centres(folder / pair[f"{name}_labels"]) for name in ("fixed", "moving"))
    both = sorted(set(fixed) & set(moving))
    p, q = (torch.stack([side[k][0] for k in both])[None] for side in (fixed, moving))
    weight = torch.tensor([[fixed[k][1] for k in both]], dtype=torch.float64)
    return MODELS["affine"].fit(p, q, weight), (p * weight[..., None]).sum(1) / weight.sum()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("net")
    parser.add_argument("pairs", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument("--groups", default="brain", help="what the pairs' group begins with")
    parser.add_argument("--without", default="", help="groups that are left out, those the net has seen for example")
    parser.add_argument("--ndim", type=int, default=3)
    parser.add_argument("--variants", default=",".join(VARIANTS))
    parser.add_argument("--starts", default="net", help="net, or other starts to measure beside it")
    parser.add_argument("--refined", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    given.output.mkdir(parents=True, exist_ok=True)
    generator, rows = torch.Generator().manual_seed(given.seed), []
    for pair in json.loads(given.pairs.read_text(encoding="utf-8")):
        if not pair["group"].startswith(given.groups) or pair["group"] in given.without.split(",") or pair.get("ndim", 3) != given.ndim:
            continue
        exact, middle = truth(pair, given.pairs.parent)
        fixed = scan(given.pairs.parent / pair["fixed"])
        for variant in given.variants.split(","):
            moving = changed(scan(given.pairs.parent / pair["moving"]), variant)
            for turn in range(given.turns):
                rotations = turned(2, given.ndim, math.pi, generator)
                a, b = (about(r[None], image.grid.centre) for r, image in zip(rotations, (fixed, moving), strict=True))
                for start in given.starts.split(","):
                    for levels in ("0", "auto") if given.refined else ("0",):
                        began = time.perf_counter()
                        found = regkit.align(laid(fixed, a), laid(moving, b), start=f"net:{given.net}" if start == "net" else start,
                                             levels=levels, threads=given.threads, no_retry=True)
                        seconds = time.perf_counter() - began
                        map = torch.linalg.inv(b) @ found.transform.matrix @ a
                        off = (map - exact)[:, :-1] @ torch.cat([middle, torch.ones(1, 1, dtype=torch.float64)], 1)[..., None]
                        rows.append({"id": pair["id"], "group": pair["group"], "variant": variant, "turn": turn,
                                     "start": start + (", refined" if levels == "auto" else ""), "rotation": angle(map, exact),
                                     "centre": float(off.norm()), "seconds": seconds})
        print(pair["id"], " ".join(f"{row['rotation']:.1f}" for row in rows if row["id"] == pair["id"]), flush=True)
    with (given.output / "cases.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, list(rows[0]))
        table.writeheader()
        table.writerows(rows)
    text = report(rows)
    (given.output / "table.md").write_text(text, encoding="utf-8")
    print(text)


def report(rows: list[dict]) -> str:
    lines = ["| start | group | variant | cases | rotation, median | 90 % | centre mm, median | 90 % | within 20° and 20 mm | seconds |",
             "|---|---|---|---:|---:|---:|---:|---:|---:|---:|"]
    keys = sorted({(row["start"], row["group"], row["variant"]) for row in rows})
    keys += sorted({(row["start"], "all", row["variant"]) for row in rows}) + sorted({(row["start"], "all", "all") for row in rows})
    for start, group, variant in keys:
        some = [row for row in rows if row["start"] == start and group in ("all", row["group"]) and variant in ("all", row["variant"])]
        rotation, centre, seconds = (torch.tensor([row[key] for row in some], dtype=torch.float64)
                                     for key in ("rotation", "centre", "seconds"))
        good = ((rotation < 20) & (centre < 20)).double().mean()
        lines.append(f"| {start} | {group} | {variant} | {len(some)} | {rotation.quantile(0.5):.2f} | {rotation.quantile(0.9):.2f} | "
                     f"{centre.quantile(0.5):.2f} | {centre.quantile(0.9):.2f} | {good:.3f} | {seconds.median():.2f} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
