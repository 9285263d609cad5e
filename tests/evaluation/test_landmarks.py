"""Landmark errors against arithmetic."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from regkit.errors import GeometryError
from regkit.evaluation import relative, summary, tre


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 30), st.integers(2, 3), st.integers(0, 2**31))
def test_errors_and_their_summary(count, ndim, seed):
    random = np.random.default_rng(seed)
    a, b = random.normal(0, 50, (2, count, ndim))
    errors = tre(torch.tensor(a), b)
    known = [sum((x - y) ** 2 for x, y in zip(p, q, strict=True)) ** 0.5 for p, q in zip(a, b, strict=True)]
    assert errors == pytest.approx(known)
    start = random.random(count) * 100
    found, order = summary(errors, start), sorted(known)
    assert found["mean"] == pytest.approx(sum(known) / count)
    assert found["max"] == pytest.approx(order[-1])
    assert found["median"] == pytest.approx((order[(count - 1) // 2] + order[count // 2]) / 2)
    place = 0.9 * (count - 1)
    low, high = order[int(place)], order[min(int(place) + 1, count - 1)]
    assert found["p90"] == pytest.approx(low + (high - low) * (place - int(place)))
    assert found["improved"] == pytest.approx(sum(e < s for e, s in zip(known, start, strict=True)) / count)


def test_relative_is_by_the_diagonal():
    assert relative(np.array([5.0, 10.0]), (30, 40)) == pytest.approx([0.1, 0.2])


def test_shapes_must_agree():
    with pytest.raises(GeometryError, match="one landmark a row"):
        tre(np.zeros((3, 3)), np.zeros((2, 3)))
