"""The simplest localisation: free parameters, optimised for one pair by gradient descent."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class FreeParameters(nn.Module):
    """θ (N, P) as a parameter of its own, zero at the start; what it is called with is not looked at."""

    def __init__(self, count: int, batch: int = 1, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.zeros(batch, count, dtype=dtype))

    def forward(self, *images: Tensor) -> Tensor:
        return self.theta
