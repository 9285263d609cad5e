"""Free parameters: the localisation that is one pair's θ itself."""

from __future__ import annotations

import pytest
import torch

from regkit.localisation import FreeParameters
from regkit.space import MODELS


@pytest.mark.parametrize("ndim", [2, 3], ids=["2D", "3D"])
@pytest.mark.parametrize("name", list(MODELS))
def test_starts_at_the_identity_and_looks_at_nothing(name, ndim):
    count = MODELS[name].count(ndim)
    free = FreeParameters(count, batch=3)
    theta = free(torch.full((3, 1, *[4] * ndim), float("nan")), torch.zeros(0))
    assert theta.shape == (3, count) and theta.dtype == torch.float32
    assert not theta.any()
    assert torch.equal(MODELS[name].exp(theta, ndim), torch.eye(ndim + 1).expand(3, -1, -1))


def test_theta_is_learnt_item_by_item_and_saved():
    free = FreeParameters(6, batch=2, dtype=torch.float64)
    assert [n for n, _ in free.named_parameters()] == ["theta"]
    (free() * torch.tensor([[1.0], [0.0]], dtype=torch.float64)).sum().backward()
    assert torch.equal(free.theta.grad, torch.tensor([[1.0] * 6, [0.0] * 6], dtype=torch.float64))
    with torch.no_grad():
        free.theta += 0.25
    copy = FreeParameters(6, batch=2, dtype=torch.float64)
    copy.load_state_dict(free.state_dict())
    assert torch.equal(copy(), free())
