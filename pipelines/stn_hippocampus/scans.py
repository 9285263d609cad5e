"""The crops: read, standardised, laid on one canvas, told apart by person, and turned at random."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import regkit

ROOM = 72.0  # mm: edge of the cube in which a crop of 42 × 53 × 43 mm lies, whole
SIDE = 56.0  # mm: edge of the cube that is looked at; a hippocampus turned about its middle stays inside
SHIFT, SCALE = 4.0, 0.1  # mm an axis, and logarithm of the scale: what a pose does besides its turn, at every range
PARTS = ("anterior", "posterior")  # labels 1 and 2


def cube(voxels: int, side: float = SIDE) -> regkit.Grid:
    """A cube of `side` mm about the world's origin."""
    affine = torch.diag(torch.tensor([side / voxels] * 3 + [1.0], dtype=torch.float64))
    affine[:3, 3] = -(side - side / voxels) / 2
    return regkit.Grid((voxels,) * 3, affine)


@dataclass(frozen=True)
class Scans:
    """names, people: S each. data (S, 3, *grid.shape): the scan, and how much of a voxel is anterior and posterior hippocampus."""

    names: list[str]
    people: list[int]
    data: Tensor
    grid: regkit.Grid

    def of(self, people: list[int]) -> list[int]:
        """The indices of these people's scans."""
        return [k for k, one in enumerate(self.people) if one in people]


def person(name: str) -> int:
    """Whose scan a crop is from. In the Decathlon's Task04 the numbers 2k - 1 and 2k are the two hippocampi of one scan (both crops have
    the same rescaling of their intensities, to six digits); who takes them for two people tests on people he trained with."""
    found = re.match(r"(?:hippocampus_)?(\d+)", name)
    if found is None:
        raise SystemExit(f"{name}: does not begin with a number; the number says whose scan it is")
    return (int(found[1]) + 1) // 2


def read(folder: Path, voxels: int) -> Scans:
    """All pairs NUMBER_t1.nii.gz, NUMBER_seg.nii.gz of a folder, centre of the crop on the origin. voxels: along the cube that will be
    looked at."""
    files = sorted(folder.glob("*_t1.nii.gz"))
    if not files:
        raise SystemExit(f"{folder}: holds no NUMBER_t1.nii.gz; name the folder of the crops")
    # a quarter finer than what is looked at: turning it costs little sharpness, and no turn needs anti-aliasing
    grid = cube(round(ROOM / SIDE * voxels / 0.75), ROOM)
    like = regkit.Image(torch.zeros(1, 1, *grid.shape), grid)
    data = []
    for file in files:
        scan, labels = regkit.read_image(file), regkit.read_image(file.with_name(file.name.replace("_t1", "_seg")))
        values = scan.data.float()
        values = values.clamp(*values.flatten().quantile(torch.tensor([0.01, 0.99])).tolist())
        values = (values - values.mean()) / values.std()  # 0, which is what lies beyond the crop, is its mean
        both = torch.cat([values, *[(labels.data == part).float() for part in (1, 2)]], 1)
        start = regkit.Matrix.shift(scan.grid.centre)
        data.append(regkit.apply(regkit.Image(both, scan.grid), start, like=like, interpolation="linear", fill=0.0).data)
    return Scans([file.name.removesuffix("_t1.nii.gz") for file in files], [person(file.name) for file in files], torch.cat(data), grid)


def within(scans: Scans, radius: float) -> Scans:
    """The scans with nothing but their mean, and no labels, beyond `radius` mm: a ball does not show how its crop is turned."""
    distance = scans.grid.points().norm(dim=-1).reshape(scans.grid.shape)
    return Scans(scans.names, scans.people, scans.data * (distance <= radius), scans.grid)


def folds(people: list[int], count: int = 4) -> list[list[int]]:
    """People dealt out to folds. The first fold is for development: it is never tested on in what is reported."""
    known = sorted(set(people))
    order = torch.randperm(len(known), generator=torch.Generator().manual_seed(0)).tolist()
    return [[known[k] for k in order[fold::count]] for fold in range(count)]


def poses(count: int, degrees: float, draw: torch.Generator) -> regkit.Matrix:
    """Random maps (count, 4, 4) of the turned scan's world to the crop's: about an even axis by up to ± `degrees`, evenly; shift and
    scale. The same draws at another range are the same axes, shifts and scales."""
    axis = torch.randn(count, 3, generator=draw, dtype=torch.float64)
    even = 2 * torch.rand(count, 5, generator=draw, dtype=torch.float64) - 1
    x, y, z = (axis / axis.norm(dim=1, keepdim=True) * math.radians(degrees) * even[:, :1]).unbind(1)
    zero = torch.zeros_like(x)
    turn = torch.linalg.matrix_exp(torch.stack([zero, -z, y, z, zero, -x, -y, x, zero], 1).reshape(-1, 3, 3))
    maps = torch.eye(4, dtype=torch.float64).repeat(count, 1, 1)
    maps[:, :3, :3] = turn * torch.exp(SCALE * even[:, 1:2, None])
    maps[:, :3, 3] = SHIFT * even[:, 2:]
    return regkit.Matrix(maps)


_MOVER = regkit.SpatialTransformer(torch.nn.Identity(), "rigid", antialias="none")


def turned(scans: Scans, which: Tensor, pose: regkit.Matrix, grid: regkit.Grid) -> tuple[Tensor, Tensor]:
    """Scans `which` (N) in their poses on `grid` → scan (N, 1, *S), labels (N, *S)."""
    moved = _MOVER.resample(scans.data[which], pose, scans.grid, grid)
    rest = 1 - moved[:, 1:].sum(1, keepdim=True)
    return moved[:, :1].contiguous(memory_format=torch.channels_last_3d), torch.cat([rest, moved[:, 1:]], 1).argmax(1)
