"""Changes of contrast for canvases (1, 1, *S) in [0, 1]: a random curve, a smooth factor, and MONAI's noise and blurs."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from regkit.training.synthesis import curve, smooth_factor


@cache
def _monai(size: float, ndim: int) -> Any:
    """Noise, blur, Gibbs' ringing and lower resolution, each now and then; `size` scales how much."""
    from monai.transforms.compose import Compose
    from monai.transforms.intensity.array import RandGaussianNoise, RandGaussianSmooth, RandGibbsNoise
    from monai.transforms.spatial.array import RandSimulateLowResolution

    chance, blur, upsample = min(1.0, 0.3 * size), (0.25, 0.25 + 0.75 * size), ("bilinear", "trilinear")[ndim - 2]
    return Compose([
        RandSimulateLowResolution(prob=chance, zoom_range=(max(0.3, 1 - 0.5 * size), 1.0), upsample_mode=upsample),
        RandGaussianSmooth(prob=chance, sigma_x=blur, sigma_y=blur, sigma_z=blur),
        RandGibbsNoise(prob=chance, alpha=(0.0, min(1.0, 0.5 * size))),
        RandGaussianNoise(prob=min(1.0, 0.5 * size), std=0.08 * size),
    ])


def augmented(canvas: Tensor, size: float, generator: torch.Generator) -> Tensor:
    """A canvas as another scanner might have shown it, as far as `size` says; 0 gives it back.

    canvas: (1, 1, *S) in [0, 1], 0 outside. → the same shape and range."""
    if size <= 0:
        return canvas
    shape = tuple(canvas.shape[2:])
    if float(torch.rand((), generator=generator)) < 0.5 * size:
        canvas = torch.where(canvas > 0, curve(canvas.flatten(2), generator).reshape(canvas.shape), canvas)
    canvas = canvas * smooth_factor(shape, 0.2 * size, generator)
    changes = _monai(round(size, 3), len(shape))
    changes.set_random_state(state=np.random.RandomState(int(torch.randint(2**31, (), generator=generator))))
    found = torch.as_tensor(changes(canvas[0])).as_subclass(Tensor)[None].float()  # type: ignore[arg-type]
    return (found / found.amax().clamp_min(1e-4)).clamp(0, 1)
