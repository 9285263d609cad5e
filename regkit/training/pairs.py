"""Batches of pairs: two scans drawn on canvases in random poses, and what is known of them."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from regkit.errors import FormatError
from regkit.sampling import inside, sample
from regkit.space.grid import apply_matrix
from regkit.training.augment import augmented
from regkit.training.fit import Batch, item_generator
from regkit.training.poses import Bends, Poses
from regkit.training.scans import Scan
from regkit.training.synthesis import canvas_points

_GROWN = 0.4  # share of the steps over which the turns grow
_SMALL = 0.15  # share of the turns at the first step
SAME, SAME_FIRST = 0.5, 0.9  # share of the pairs that are one scan twice, from the middle of the run on and at the first step
REFERENCE, REFERENCE_FIRST = 0.6, 0.9  # share of those that are the reference, whose points are known
BENT = 0.03  # half edges: how differently shaped the reference is shown


@dataclass(frozen=True, eq=False)
class Drawer:
    """How scans come onto canvases of `edge` voxels and `mm` along each edge."""

    edge: int
    mm: float

    @property
    def half(self) -> float:
        return self.mm / 2

    def home(self, scan: Scan) -> Tensor:
        """(1, D+1, D+1): half edges of a canvas around the scan's middle, upright, into its voxels."""
        d = scan.grid.ndim
        pose = torch.eye(d + 1, dtype=torch.float64)[None].clone()
        pose[:, :d, :d] *= self.half
        pose[:, :d, d] = scan.middle
        return scan.grid.inverse @ pose

    def shown(self, scan: Scan, pose: Tensor, bends: Bends | None = None) -> Tensor:
        """The scan on a canvas (1, 1, *S) whose half edges a pose (1, D+1, D+1), and then bends, carry onto those of `home`."""
        index = self._index(scan, pose, bends)
        values = sample(torch.from_numpy(scan.values.astype("float32"))[None], index) * inside(index, scan.grid.shape)[:, None]
        return values.reshape(1, 1, *(self.edge,) * scan.grid.ndim)

    def _index(self, scan: Scan, pose: Tensor, bends: Bends | None) -> Tensor:
        """(1, P, D): the scan's index points that the canvas' voxels show."""
        there = apply_matrix(pose, canvas_points((self.edge,) * scan.grid.ndim))
        return apply_matrix(self.home(scan), there if bends is None else bends(there))

    def marked(self, scan: Scan, pose: Tensor, labels: list[int], bends: Bends | None = None) -> Tensor:
        """Label maps (1, L, *S) on the same canvas, one channel a label."""
        shape, index = (self.edge,) * scan.grid.ndim, self._index(scan, pose, bends)
        found = sample(torch.from_numpy(scan.labels.astype("float32"))[None, None], index, "nearest")  # type: ignore[union-attr]
        found = found * inside(index, scan.grid.shape)[:, None]
        return (found == torch.tensor(labels, dtype=found.dtype)[:, None]).float().reshape(1, len(labels), *shape)


@dataclass(frozen=True, eq=False)
class Pairs:
    """(step, items) → a batch. scans: those to learn from. rule: all, within or atlas (the first scan). reference: (K, D) points of the
    first scan in half edges of its home, or none. labels: those drawn as well. steps: over which turns grow."""

    scans: list[Scan]
    drawer: Drawer
    poses: Poses
    rule: str
    steps: int
    seed: int
    augment: float
    reference: Tensor
    labels: list[int]

    def __post_init__(self) -> None:
        if self.rule == "within" and not any(self._others(i) for i in range(len(self.scans))):
            raise FormatError("pairs: within one person, but no person has two scans; name them in a table (scan,person), or --pairs all")

    def _others(self, place: int) -> list[int]:
        mine = self.scans[place].listed.person
        return [i for i, scan in enumerate(self.scans) if i != place and (self.rule != "within" or scan.listed.person == mine)]

    def __call__(self, step: int, items: range) -> Batch:
        """fixed, moving: canvases (N, 1, *S); *_seen: as the net sees them. known: (N, D+1, D+1) maps of fixed to moving points in half
        edges, which hold where `is_known`. fixed_points, moving_points: (N, K, D), which hold where `has_points`. *_labels: (N, L, *S)."""
        found = [self._item(step, item_generator(self.seed, step, item)) for item in items]
        return {key: torch.cat([one[key] for one in found]) for key in found[0]}

    def _item(self, step: int, generator: torch.Generator) -> Batch:
        def chance(share: float) -> bool:
            return float(torch.rand((), generator=generator)) < share

        def pick(places: list[int]) -> int:
            return places[int(torch.randint(len(places), (), generator=generator))]

        every = list(range(len(self.scans)))
        early = max(0.0, 1 - 2 * step / self.steps)  # what is known teaches soonest
        same = chance(SAME + (SAME_FIRST - SAME) * early)
        refers = same and len(self.reference) > 0 and chance(REFERENCE + (REFERENCE_FIRST - REFERENCE) * early)
        a = 0 if refers or (self.rule == "atlas" and not same) else pick(every)
        others = self._others(a)
        b = pick(others) if not same and others else a
        same = a == b
        grown = min(1.0, _SMALL + step / max(1.0, _GROWN * self.steps))
        poses = replace(self.poses, turn=self.poses.turn * grown)
        d = self.scans[a].grid.ndim
        one, two = (poses.draw(1, d, generator) for _ in range(2))
        known = torch.linalg.inv(two) @ one
        # the reference as other people might look: the points are known there, though the map between the two is none of the model's
        bent = [Bends.draw(1, d, BENT, 4, generator) if refers else None for _ in range(2)]
        fixed, moving = self.drawer.shown(self.scans[a], one, bent[0]), self.drawer.shown(self.scans[b], two, bent[1])
        item = {"fixed": fixed, "moving": moving, "fixed_seen": augmented(fixed, self.augment, generator),
                "moving_seen": augmented(moving, self.augment, generator), "known": known,
                "is_known": torch.tensor([float(same and not refers)])}
        if len(self.reference):
            for name, pose, bend in (("fixed_points", one, bent[0]), ("moving_points", two, bent[1])):
                there = self.reference[None].double() if bend is None else bend.back(self.reference[None].double())
                item[name] = apply_matrix(torch.linalg.inv(pose), there).float()
            item["has_points"] = torch.tensor([float(refers)])
        if self.labels:
            item["fixed_labels"] = self.drawer.marked(self.scans[a], one, self.labels, bent[0])
            item["moving_labels"] = self.drawer.marked(self.scans[b], two, self.labels, bent[1])
        return item


def poses(turn: float) -> Poses:
    """Of scans that lie anyhow within `turn` degrees."""
    return Poses(turn=math.radians(turn), shift=0.06, scale=0.07, stretch=0.02)


def spread(scan: Scan, drawer: Drawer, count: int) -> Tensor:
    """(count, D) points of a scan's foreground in half edges of its home, each as far from the others as can be."""
    d = scan.grid.ndim
    values = torch.from_numpy(scan.values[0].astype("float32"))
    there = values > 0.1 * float(values.quantile(0.98) if values.numel() < 10**7 else values.max())
    every = apply_matrix(torch.linalg.inv(drawer.home(scan)), there.nonzero()[None].double())[0]
    every = every[(every.abs() < 0.95).all(1)]
    every = every[torch.randperm(len(every), generator=torch.Generator().manual_seed(0))[:20_000]]
    chosen = [int((every - every.mean(0)).square().sum(1).argmin())]
    nearest = torch.full((len(every),), torch.inf, dtype=every.dtype)
    while len(chosen) < min(count, len(every)):
        nearest = torch.minimum(nearest, (every - every[chosen[-1]]).square().sum(1))
        chosen.append(int(nearest.argmax()))
    return every[chosen].reshape(-1, d)
