"""The 3D net for heads and brains: learns where points of the brain lie, in pictures of any contrast and pose."""

from __future__ import annotations

import argparse
import math
import sys
import time
from functools import cache
from pathlib import Path

import sources
import torch
from torch import Tensor, nn

from regkit.localisation.keypoints import Detector, centres
from regkit.training.fit import Batch, Plan, Row, fit, item_generator
from regkit.training.poses import Bends, Poses
from regkit.training.synthesis import Looks, draw

EDGE = 40  # voxels of the canvas: 6 mm
POINTS = 32
WIDTH = 0.08  # half edges: how wide the heat maps shall be
LIKELY = 0.3  # weight of the points' likelihood
GROWING = 4000  # steps until all pictures are hard
UPRIGHT = 0.3  # share of pictures turned by no more than 20°: what a second look at a scan sees
FAR = Poses(turn=math.pi, shift=0.17, scale=0.12, stretch=0.04)
NEAR = Poses(turn=math.radians(20), shift=0.06, scale=0.08, stretch=0.03)
EASY = Looks(scanned=0.8, cut_out=1.0, bright_air=0.0, inverted=0.0, bias=0.2, noise=0.03, blurred=0.0, cropped=0.0, lesions=0.0)
HARD = Looks()


@cache
def known(folder: Path) -> tuple:
    anatomies = sources.kept(folder)
    return anatomies, sources.points(anatomies[0], POINTS)


def picture(folder: Path, generator: torch.Generator, looks: Looks, size: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """One canvas (1, 1, S, S, S), where the points lie on it (1, K, 3), and the map (1, 4, 4) from its frame to the anatomy's.
    size: of the differences of shape."""
    anatomies, points = known(folder)
    anatomy = anatomies[int(torch.randint(len(anatomies), (), generator=generator))]
    poses = NEAR if float(torch.rand((), generator=generator)) < UPRIGHT else FAR
    maps = poses.draw(1, 3, generator)
    bends = Bends.draw(1, 3, 0.035 * size, 4, generator) + Bends.draw(1, 3, 0.012 * size, 8, generator)
    image = draw(anatomy, sources.frame(), (EDGE,) * 3, maps, bends, looks, generator)
    there = bends.back(points[None].double())
    back = torch.linalg.inv(maps)
    return image, (there @ back[:, :3, :3].mT + back[:, None, :3, 3]).float(), maps


class Pictures:
    """Step → its batch. Plain pictures of stripped brains at first; ever more are of any contrast, of heads, or of a part of one."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.seed = folder, seed

    def __call__(self, step: int, items: range) -> Batch:
        found = []
        for item in items:
            generator = item_generator(self.seed, step, item)
            hard = float(torch.rand((), generator=generator)) < step / GROWING
            found.append(picture(self.folder, generator, HARD if hard else EASY, size=1.0 if hard else 0.7))
        return {"canvas": torch.cat([image for image, _, _ in found]), "points": torch.cat([points for _, points, _ in found])}


def loss(net: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """Cross entropy of the heat maps, which finds the places soonest, and the likelihood of the points, which makes them exact and says
    how exact: the distance in deviations, and the deviation's logarithm for each axis."""
    truth = batch["points"]
    points, deviation, heat = net(batch["canvas"])
    place = centres(EDGE // 2, 3, heat)
    wanted = (-(place[None, None] - truth[:, :, None]).square().sum(-1) / (2 * WIDTH**2)).softmax(2)
    on_canvas = (truth.abs() < 1).all(-1)
    entropy = (-(wanted * heat).sum(2) * on_canvas).mean()
    away = (points - truth).square().sum(-1).clamp_min(1e-8).sqrt()
    likely = (away * (-deviation).exp() * 2 + 3 * deviation).mean()
    return {"loss": entropy + LIKELY * likely, "entropy": entropy.detach(), "likely": likely.detach(),
            "away_mm": away.detach().mean() * sources.SCALE}


class WithMaps(nn.Module):
    """A detector whose forward pass gives the heat maps, too."""

    def __init__(self, detector: Detector) -> None:
        super().__init__()
        self.detector = detector

    def forward(self, canvas: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.detector.maps_too(canvas)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--data", type=Path, default=sources.CACHE)
    given = parser.parse_args()
    given.output.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    net = WithMaps(Detector(POINTS, 3, width=given.width))
    plan = Plan(steps=given.steps, batch=given.batch, rate=given.rate, decay="constant", precision="bf16", workers=given.workers,
                log_every=100)
    began = time.monotonic()

    def tell(row: Row) -> None:
        print(*(f"{key} {value:.4g}" for key, value in row.items()), f"{time.monotonic() - began:.0f} s", flush=True)

    fit(net, Pictures(given.data.expanduser(), 0), loss, plan, given.output, settings={"net": net.detector.settings, "batch": given.batch},
        resume=True, tell=tell)


if __name__ == "__main__":
    sys.exit(main())
