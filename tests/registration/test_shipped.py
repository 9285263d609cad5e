"""The nets that come with regkit: they are small, described, found by name, and say how a head or a slice of it lies."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

import regkit
from regkit.registration.nets import SHIPPED, load, shipped
from regkit.space import Grid
from regkit.training.poses import turned
from regkit.training.validate import angle

pytestmark = pytest.mark.usefixtures("unjudged")

FILES = sorted(SHIPPED.glob("*.safetensors"))
DEGREES = 12.0  # by which an answer may be wrong here; the basin of refinement is 20


def test_all_of_them_are_small_and_described():
    assert [file.stem for file in FILES] == shipped() == ["head-3d", "slice-2d"]
    assert sum(file.stat().st_size for file in FILES) < 20e6
    for file in FILES:
        card = file.with_suffix(".md").read_text(encoding="utf-8")
        net = load(file.stem)
        assert f"{sum(p.numel() for p in net.net.parameters()):,}" in card and f"{net.info['steps']:,} steps" in card
        for part in ("## Data", "## Training", "## Measured", "## Limits"):
            assert part in card


def header_turned(image: regkit.Image, seed: int) -> tuple[regkit.Image, torch.Tensor]:
    """The scan in any pose, and the map of its points into it."""
    d = image.ndim
    turn = torch.eye(d + 1, dtype=torch.float64)[None].clone()
    turn[:, :d, :d] = turned(1, d, math.pi, torch.Generator().manual_seed(seed))
    turn[:, :d, d] = torch.tensor([300.0, -80.0, 40.0][:d])
    return replace(image, grid=Grid(image.grid.shape, turn @ image.grid.affine)), turn


@pytest.mark.parametrize("contrast", ["as it is", "inverted", "bright air", "noisy", "curved"])
@pytest.mark.parametrize("seed", [0, 1])
def test_a_head_is_found_in_any_pose_and_contrast(seed, contrast, heads, ndim):
    fixed = heads[ndim]
    data = fixed.data / fixed.data.max()
    brain = (data > 0.02).float()
    other = {"as it is": data, "inverted": brain * (1 - data), "bright air": 1 - data, "curved": (3 * data).sin().abs() * brain,
             "noisy": data + 0.1 * torch.randn(data.shape, generator=torch.Generator().manual_seed(seed))}[contrast]
    moving, turn = header_turned(fixed.with_data(other), seed)
    found = regkit.align(fixed, moving, start="net", levels="0")
    middle = fixed.grid.centre[:, None]
    there = (turn[:, :ndim, :ndim] @ middle.mT).mT + turn[:, None, :ndim, ndim]
    assert angle(found.transform.matrix, turn) < DEGREES and float((found.transform(middle) - there).norm()) < 10


def test_auto_begins_with_it_and_needs_no_search(heads, ndim):
    moving, turn = header_turned(heads[ndim], 3)
    found = regkit.align(heads[ndim], moving)
    assert angle(found.transform.matrix, turn) < 1
    origins = {candidate["origin"] for candidate in found.trace["candidates"]}
    assert any("net " in origin for origin in origins) and not any("search" in origin for origin in origins)
