"""Smooth random textures; a shifted copy is another crop of the same texture, so no interpolation disturbs it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from regkit.filters import smooth

SHAPES = {2: (44, 40), 3: (22, 24, 20)}
MARGIN = 4


@pytest.fixture(params=[2, 3], ids=["2D", "3D"])
def ndim(request: pytest.FixtureRequest) -> int:
    return request.param


@pytest.fixture
def texture() -> Callable[..., Tensor]:
    """texture(ndim, seed, shift): (1, 1, *S) of about unit deviation."""

    def make(ndim: int, seed: int = 0, shift: int = 0, sigma: float = 2.0) -> Tensor:
        draw = torch.Generator().manual_seed(seed)
        big = smooth(torch.randn(1, 1, *(n + 2 * MARGIN for n in SHAPES[ndim]), generator=draw), [sigma] * ndim)
        big = (big - big.mean()) / big.std()
        for axis, n in enumerate(SHAPES[ndim]):
            big = big.narrow(axis + 2, MARGIN + shift * (axis < 2), n)
        return big

    return make
