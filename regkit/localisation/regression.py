"""A localisation net that looks at both scans and says the map outright: convolutions, then a fully connected head.

The paper's net (Jaderberg et al., NeurIPS 2015) says θ, and one θ cannot turn far: rotation vectors jump at 180°. So a rotation is said by
six numbers (D in 2D: two), of which Gram and Schmidt make two axes (Zhou et al., CVPR 2019), then symmetric stretches, then a shift.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regkit.errors import GeometryError, OptionError, choose
from regkit.localisation.keypoints import _Block, _blocks, _norm, standardised
from regkit.space import MODELS


class RegressionNet(nn.Module):
    """(fixed, moving) → map, said by one net that looks at both canvases (N, 1, *S), laid beside each other as channels.

    edge: voxels of the canvas along each axis, a multiple of 2^(1 + depth). model_name: rigid, similarity or affine. At the start
    the map is the identity: canvas centre to canvas centre."""

    kind = "regression"

    def __init__(self, edge: int = 40, ndim: int = 3, model_name: str = "affine", *, width: int = 24, depth: int = 2, most: int = 128,
                 hidden: int = 128) -> None:
        super().__init__()
        for name, value in (("width", width), ("depth", depth), ("hidden", hidden)):
            if value < 1:
                raise OptionError(f"{name}: {value}; expected 1 or more")
        step = 2 ** (1 + depth)
        if ndim not in (2, 3) or edge < 1 or edge % step:
            raise OptionError(f"edge: {edge} voxels in {ndim}D; expected a multiple of {step}, in 2D or 3D")
        self.model = MODELS[choose("model", model_name, ("translation", "rigid", "similarity", "affine"))]
        self.settings: dict[str, Any] = {"edge": edge, "ndim": ndim, "model": model_name, "width": width, "depth": depth, "most": most,
                                         "hidden": hidden}
        conv = (nn.Conv2d, nn.Conv3d)[ndim - 2]
        widths = [min(most, width * 2**level) for level in range(depth + 1)]
        layers: list[nn.Module] = [conv(2 * 2**ndim, width, 3, padding=1, bias=False), _norm(width), nn.ReLU()]
        for a, b in pairwise(widths):
            layers += [_Block(conv, a), conv(a, b, 2, stride=2)]
        self.body = nn.Sequential(*layers, _Block(conv, widths[-1]))
        self.turns = (2, 6)[ndim - 2] if model_name != "translation" else 0
        rest = MODELS["affine"].count(ndim) - ndim - ndim * (ndim - 1) // 2  # size and stretches
        self.stretches = {"translation": 0, "rigid": 0, "similarity": 1, "affine": rest}[model_name]
        last = nn.Linear(hidden, ndim + self.turns + self.stretches)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(widths[-1] * (edge // step) ** ndim, hidden), nn.ReLU(), last)

    @classmethod
    def of(cls, settings: dict[str, Any]) -> RegressionNet:
        """A net with these `settings`, untrained."""
        given = dict(settings)
        return cls(model_name=given.pop("model"), **given)

    def forward(self, fixed: Tensor, moving: Tensor) -> Tensor:
        """→ (N, D+1, D+1) maps of fixed to moving points, float64, in half edges from the canvases' centres. Raises GeometryError for
        canvases of another size than the net was built for."""
        edge, d = self.settings["edge"], self.settings["ndim"]
        for canvas in (fixed, moving):
            if canvas.ndim != d + 2 or tuple(canvas.shape[1:]) != (1, *[edge] * d):
                raise GeometryError(f"canvas: {tuple(canvas.shape)}; the net was built for (N, 1, {', '.join([str(edge)] * d)})")
        both = torch.cat([_blocks(standardised(fixed)), _blocks(standardised(moving))], 1)
        said = self.head(self.body(both)).double()
        shift, turn, stretch = said.split([d, self.turns, self.stretches], 1)
        theta = torch.zeros(len(said), MODELS["affine"].count(d), dtype=said.dtype, device=said.device)
        at = d + d * (d - 1) // 2
        theta = torch.cat([theta[:, :at], stretch, theta[:, at + self.stretches:]], 1)
        maps = MODELS["affine"].exp(theta, d)
        linear = rotation(turn, d) @ maps[:, :d, :d] if self.turns else maps[:, :d, :d]
        return torch.cat([torch.cat([linear, shift[..., None]], 2), maps[:, d:]], 1)


def rotation(numbers: Tensor, ndim: int) -> Tensor:
    """Rotations (N, D, D) from numbers (N, 2 or 6): two in 2D, six in 3D, added to the first columns of the identity. 0 is the
    identity, and no two rotations are far apart that differ little."""
    eye = torch.eye(ndim, dtype=numbers.dtype, device=numbers.device)
    if ndim == 2:
        x = F.normalize(numbers + eye[0], dim=1)
        return torch.stack([x, torch.stack([-x[:, 1], x[:, 0]], 1)], 2)
    a, b = numbers[:, :3] + eye[0], numbers[:, 3:] + eye[1]
    x = F.normalize(a, dim=1)
    y = F.normalize(b - (x * b).sum(1, keepdim=True) * x, dim=1)
    return torch.stack([x, y, torch.linalg.cross(x, y)], 2)
