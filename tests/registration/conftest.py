"""A real head (the MNI152 template, from nilearn's wheel) as a small volume and a slice, and copies of it with known maps."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import regkit
from regkit import Grid, Image, Matrix
from regkit.sampling import warp
from regkit.space import MODELS, Frame

TEMPLATE = "datasets/data/mni_icbm152_t1_tal_nlin_sym_09a_converted.nii.gz"


@pytest.fixture(params=[2, 3], ids=["2D", "3D"])
def ndim(request) -> int:
    return request.param


@pytest.fixture(scope="session")
def heads() -> dict[int, Image]:
    """{2: a slice of 2 mm, 3: a volume of 4 mm}, float32."""
    spec = importlib.util.find_spec("nilearn")
    assert spec and spec.origin
    whole = regkit.read_image(Path(spec.origin).parent / TEMPLATE)
    whole = whole.with_data(whole.data.float())
    volume = warp(whole, Matrix.identity(3), whole.grid.canonical(4.0))
    fine = warp(whole, Matrix.identity(3), whole.grid.canonical(2.0))
    k = fine.grid.shape[2] // 2
    affine = fine.grid.affine[:, [0, 1, 3]][:, :, [0, 1, 3]]
    return {2: Image(fine.data[..., k].contiguous(), Grid(fine.grid.shape[:2], affine)), 3: volume}


def known_map(grid: Grid, name: str, seed: int = 0, degrees: float = 18.0) -> Matrix:
    """A map of the model about the grid's centre: shifted by up to 15 % of half its edge, turned, scaled by up to 15 %."""
    d, model = grid.ndim, MODELS[name]
    draw = torch.Generator().manual_seed(seed)
    theta = torch.zeros(1, model.count(d), dtype=torch.float64)
    random = lambda n: torch.rand(n, generator=draw, dtype=torch.float64) * 2 - 1  # noqa: E731
    turns = d * (d - 1) // 2
    theta[0, :d] = 0.15 * random(d)
    if name == "attention":
        theta[0, d] = 0.12
    elif name != "translation":
        axis = random(turns)
        theta[0, d: d + turns] = axis / axis.norm() * math.radians(degrees)
    if name in ("similarity", "affine"):
        theta[0, d + turns] = 0.12 if name == "similarity" else -0.07
    if name == "affine":
        theta[0, d + turns + 1:] = 0.06 * random(model.count(d) - d - turns - 1)
    return Matrix(Frame.of(grid).world(model.exp(theta, d)))


def carried(image: Image, truth: Matrix) -> Image:
    """The scan as it would look after moving through `truth`, on a larger grid: noise-free cubic resampling."""
    d = image.ndim
    shift = torch.eye(d + 1, dtype=torch.float64)
    pad = [n // 5 for n in image.grid.shape]
    shift[:d, d] = -torch.tensor(pad, dtype=torch.float64)
    grid = Grid(tuple(n + 2 * p for n, p in zip(image.grid.shape, pad, strict=True)), image.grid.affine @ shift)
    return warp(image, truth.inverse(), grid, kernel="cubic", antialias="none")


@pytest.fixture(scope="session")
def tre() -> Callable[[Image, Matrix, Matrix], float]:
    """Mean distance, in the image's voxels, between where two maps take its bright voxels."""

    def distance(image: Image, a: Matrix, b: Matrix) -> float:
        points = image.grid.points()[:, (image.data.flatten() > image.data.mean()).nonzero()[:, 0]]
        return float((a(points) - b(points)).norm(dim=-1).mean()) / float(image.grid.spacing.min())

    return distance
