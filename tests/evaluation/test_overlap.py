"""Dice and Jaccard against counting by hand."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from regkit.errors import GeometryError
from regkit.evaluation import dice, jaccard


@st.composite
def maps(draw):
    shape = tuple(draw(st.lists(st.integers(1, 9), min_size=2, max_size=3)))
    seed, top = draw(st.integers(0, 2**31)), draw(st.integers(0, 4))
    random = np.random.default_rng(seed)
    return random.integers(0, top + 1, shape), random.integers(0, top + 1, shape)


@settings(max_examples=200, deadline=None)
@given(maps())
def test_both_equal_sets_of_voxels(pair):
    fixed, moved = pair
    sets = {int(v): tuple({tuple(p) for p in np.argwhere(m == v)} for m in pair) for v in np.unique(fixed) if v}
    assert dice(fixed, moved) == pytest.approx({v: 2 * len(a & b) / (len(a) + len(b)) for v, (a, b) in sets.items()})
    assert jaccard(torch.tensor(fixed), torch.tensor(moved)) == pytest.approx({v: len(a & b) / len(a | b) for v, (a, b) in sets.items()})


def test_what_moved_lacks_scores_nothing_and_what_only_it_has_is_not_asked():
    fixed, moved = np.array([[0, 1], [2, 2]]), np.array([[3, 1], [1, 0]])
    assert dice(fixed, moved) == pytest.approx({1: 2 / 3, 2: 0.0})


def test_labels_stored_as_floats_are_whole_numbers():
    assert dice(np.array([[1.0, 0.0], [0.0, 2.0]]), np.array([[1.0, 0.0], [0.0, 2.0]])) == {1: 1.0, 2: 1.0}
    with pytest.raises(GeometryError, match="not whole numbers; expected a label map"):
        dice(np.array([[0.5, 1.0]]), np.array([[1.0, 1.0]]))


def test_shapes_must_agree():
    with pytest.raises(GeometryError, match=r"shapes \(2, 2\) and \(2, 3\)"):
        dice(np.zeros((2, 2), int), np.zeros((2, 3), int))
