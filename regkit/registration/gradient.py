"""Refinement by gradient for what least squares cannot have: mutual information of point samples, by BFGS."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from regkit.localisation import FreeParameters
from regkit.registration.equations import Side, place
from regkit.sampling import inside, sample
from regkit.similarity.mi import joint
from regkit.space import Model


def information(sides: Sequence[Side], maps: Tensor) -> Tensor:
    """Mean over the sides of the normalised mutual information (as a share of the joint entropy) at maps (N, D+1, D+1) in
    the frame, times the root of the share of home points that are seen: (N,) in [0, 1], differentiable."""
    total = maps.new_zeros(len(maps), dtype=torch.float32)
    for side in sides:
        _, index, _ = place(side, maps)
        read = sample(side.volume, index)
        seen = inside(index.detach(), tuple(side.volume.shape[2:]))
        weight = side.weight * read[:, 1].detach() * seen
        share = (weight.sum(1) / side.weight.sum().clamp_min(1e-6)).clamp(0, 1)
        total = total + joint(read[:, 0], side.features.expand(len(maps), -1), weight, normalised=True) * share.sqrt()
    return total / len(sides)


def climb(sides: Sequence[Side], start: Tensor, model: Model, *, iterations: int) -> tuple[Tensor, Tensor]:
    """Raise the mutual information from one map (1, D+1, D+1) in the frame, within the model → map and score (1,).

    Never ends worse than it began. BFGS (Nocedal & Wright 2006); θ is well scaled in the frame."""
    from scipy.optimize import minimize  # a fifth of a second to import, for one measure only

    d = start.shape[-1] - 1
    localisation = FreeParameters(model.count(d), dtype=torch.float64).to(start.device)

    def negative(theta: np.ndarray) -> tuple[float, np.ndarray]:
        with torch.no_grad():
            localisation.theta.copy_(torch.from_numpy(theta)[None])
        localisation.zero_grad()
        with torch.enable_grad():
            value = -information(sides, start @ model.exp(localisation(), d)).sum()
            value.backward()
        assert localisation.theta.grad is not None
        return float(value), localisation.theta.grad[0].cpu().numpy().copy()

    before = float(information(sides, start))
    found = minimize(negative, np.zeros(model.count(d)), jac=True, method="BFGS",
                     options={"maxiter": iterations, "gtol": 1e-7})
    best = start @ model.exp(torch.from_numpy(found.x)[None].to(start.device), d)
    after = float(information(sides, best))
    return (best, torch.tensor([after])) if after > before else (start, torch.tensor([before]))
