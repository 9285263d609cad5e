"""What each shipped net is shown: pictures of any contrast in any pose, and where the points of the anatomy lie in them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import sources
import torch
from torch import Tensor

from regkit.space import Frame
from regkit.training.fit import Batch, item_generator
from regkit.training.poses import Bends, Poses
from regkit.training.synthesis import Anatomy, Looks, draw

GROWING = 4000  # steps until all pictures are hard
UPRIGHT = 0.3  # share of pictures turned by no more than 20°: what a second look at a scan sees
EASY = Looks(scanned=0.8, cut_out=1.0, bright_air=0.0, inverted=0.0, bias=0.2, noise=0.03, blurred=0.0, framed=0.0,
             cropped=0.0, lesions=0.0)
HARD = Looks(cut_out=0.35)  # heads are harder than stripped brains


@dataclass(frozen=True)
class Kind:
    """One net. edge: voxels of its canvas. mm: of a voxel, or None where the canvas is as wide as the scan. half: mm, half the canvas'
    edge in the pictures. far, near: poses of most pictures, and of those that are nearly upright."""

    ndim: int
    edge: int
    mm: float | None
    half: float
    points: int
    width: int
    far: Poses
    near: Poses


KINDS = {
    "head-3d": Kind(3, 40, 6.0, sources.SCALE, 32, 32, Poses(math.pi, 0.12, 0.12, 0.04), Poses(math.radians(20), 0.06, 0.08, 0.03)),
    "slice-2d": Kind(2, 64, None, sources.SCALE, 24, 32, Poses(math.pi, 0.12, 0.22, 0.06), Poses(math.radians(20), 0.08, 0.15, 0.04)),
}


@cache
def known(name: str, folder: Path) -> tuple[list[Anatomy], Tensor, Frame]:
    """Anatomies, their common points (K, D) in the frame, and the frame."""
    heads = sources.kept(folder)
    if KINDS[name].ndim == 3:
        return heads, sources.points(heads[0], KINDS[name].points), sources.frame()
    slices = sources.slices(heads)
    return slices, sources.points(slices[len(slices) // 4], KINDS[name].points), Frame(sources.frame().centre[:, :2], sources.SCALE)


def picture(name: str, folder: Path, generator: torch.Generator, hard: bool) -> tuple[Tensor, Tensor]:
    """One canvas (1, 1, *S) and where the points lie on it (1, K, D), in half edges."""
    kind = KINDS[name]
    anatomies, points, frame = known(name, folder)
    anatomy = anatomies[int(torch.randint(len(anatomies), (), generator=generator))]
    poses = kind.near if float(torch.rand((), generator=generator)) < UPRIGHT else kind.far
    maps, size, d = poses.draw(1, kind.ndim, generator), 1.0 if hard else 0.7, kind.ndim
    bends = Bends.draw(1, d, 0.04 * size, 4, generator) + Bends.draw(1, d, 0.012 * size, 8, generator)
    image = draw(anatomy, frame, (kind.edge,) * d, maps, bends, HARD if hard else EASY, generator)
    there, back = bends.back(points[None].double()), torch.linalg.inv(maps)
    return image, (there @ back[:, :d, :d].mT + back[:, None, :d, d]).float()


@dataclass(frozen=True)
class Pictures:
    """(step, items) → a batch. Plain pictures of stripped brains at first; ever more are of any contrast, of heads, or of a part of one."""

    name: str
    folder: Path
    seed: int

    def __call__(self, step: int, items: range) -> Batch:
        found = []
        for item in items:
            generator = item_generator(self.seed, step, item)
            hard = float(torch.rand((), generator=generator)) < step / GROWING
            found.append(picture(self.name, self.folder, generator, hard))
        return {"canvas": torch.cat([image for image, _ in found]), "points": torch.cat([points for _, points in found])}

