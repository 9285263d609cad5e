"""Real pairs with labels, where the development scans are at hand."""

import json

import numpy as np
import pytest
import torch

import regkit

pytestmark = pytest.mark.data


def _dice(fixed: torch.Tensor, moved: torch.Tensor) -> float:
    """Mean over the labels present in fixed."""
    labels = [v for v in fixed.unique().tolist() if v]
    return float(np.mean([2 * float(((fixed == v) & (moved == v)).sum()) / float((fixed == v).sum() + (moved == v).sum()) for v in labels]))


def _pairs(data, group: str):
    return [p for p in json.loads((data / "pairs.json").read_text()) if p["group"] == group]


def test_slices_of_different_people(data):
    """Best of the peers on these four: 0.370 (NiftyReg, affine)."""
    scores = []
    for pair in _pairs(data, "brain-2d"):
        result = regkit.align(data / pair["fixed"], data / pair["moving"])
        moved = result.apply(regkit.read_image(data / pair["moving_labels"]), interpolation="nearest")
        scores.append(_dice(regkit.read_image(data / pair["fixed_labels"]).data, moved.data))
    assert np.mean(scores) > 0.367


def test_the_same_brain_twice_both_ways(data):
    """Rigid, 1 mm: the manual labels agree to 0.77, and the two directions within half a voxel."""
    pair = _pairs(data, "brain-rescan")[1]
    there = regkit.align(data / pair["fixed"], data / pair["moving"], model="rigid")
    back = regkit.align(data / pair["moving"], data / pair["fixed"], model="rigid")
    moved = there.apply(regkit.read_image(data / pair["moving_labels"]), interpolation="nearest")
    assert _dice(regkit.read_image(data / pair["fixed_labels"]).data, moved.data) > 0.765
    points = there.fixed.grid.points()[:, (there.fixed.data.flatten() > 0).nonzero()[::500, 0]]
    assert float((there.transform(points) - back.transform.inverse()(points)).norm(dim=-1).max()) < 0.5


def test_a_stripped_brain_in_a_whole_head(data):
    """Different people. Stretched over the skull it scores 0.11; whole heads with each other score 0.33."""
    head, brain = data / "brain-oasis-wholehead", data / "brain-oasis-neuromorph"
    result = regkit.align(head / "1000_t1.nii.gz", brain / "1002_t1.nii.gz")
    moved = result.apply(regkit.read_image(brain / "1002_seg.nii.gz"), interpolation="nearest")
    assert _dice(regkit.read_image(head / "1000_seg.nii.gz").data, moved.data) > 0.38


def test_abdomens_that_share_a_third(data):
    """Liver of two people, CT, fields of view apart; the best of the peers, NiftyReg, comes to 0.244, the others to 0."""
    (pair,) = _pairs(data, "abdomen")
    result = regkit.align(data / pair["fixed"], data / pair["moving"])
    moved = result.apply(regkit.read_image(data / pair["moving_labels"]), interpolation="nearest")
    assert _dice(regkit.read_image(data / pair["fixed_labels"]).data, moved.data) > 0.4
