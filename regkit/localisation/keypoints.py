"""A localisation net that finds the same points in both scans, and the map that fits them in closed form.

After Evan Yu et al., KeyMorph (MIDL 2022, Medical Image Analysis 2025): a detector shared by both scans gives K heat maps, their
centres of mass are points, and the model's least-squares `fit` of one set to the other is the map. Here each point also says how far
off it may be, which weighs it in the fit: points outside of a scan's field of view hardly count.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regkit.errors import GeometryError, OptionError, choose
from regkit.space import MODELS, Model

_DEVIATION = (-5.0, 1.0)  # logarithms of a point's standard deviation in half edges of the canvas: least, most


def _norm(width: int) -> nn.Module:
    return nn.GroupNorm(math.gcd(max(1, width // 8), width), width)  # of each image by itself: no statistics of batches


class _Block(nn.Module):
    """Convolution, normalisation, ReLU; twice, around a shortcut."""

    def __init__(self, conv: type[nn.Module], width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(conv(width, width, 3, padding=1, bias=False), _norm(width), nn.ReLU(),
                                    conv(width, width, 3, padding=1, bias=False), _norm(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.layers(x))


class Detector(nn.Module):
    """Finds K points in canvases (N, 1, *S) whose edges are equal and a multiple of 2^(1 + depth): a U-net with heat maps at half
    the canvas' resolution.

    points: K. ndim: 2 or 3. width: channels at the finest level; they double at each of `depth` halvings, to at most `most`.
    The canvas is looked at as blocks of 2^D voxels laid beside each other as channels, so that nothing is computed at full
    resolution. Raises OptionError for numbers below 1.
    """

    def __init__(self, points: int, ndim: int = 3, *, width: int = 32, depth: int = 2, most: int = 128) -> None:
        super().__init__()
        for name, value in (("points", points), ("width", width), ("depth", depth)):
            if value < 1:
                raise OptionError(f"{name}: {value}; expected 1 or more")
        if ndim not in (2, 3):
            raise OptionError(f"ndim: {ndim}; expected 2 or 3")
        conv = (nn.Conv2d, nn.Conv3d)[ndim - 2]
        self.ndim, self.points, self.depth = ndim, points, depth
        self.settings: dict[str, Any] = {"points": points, "ndim": ndim, "width": width, "depth": depth, "most": most}
        widths = [min(most, width * 2**level) for level in range(depth + 1)]
        self.stem = nn.Sequential(conv(2**ndim, width, 3, padding=1, bias=False), _norm(width), nn.ReLU())
        self.down = nn.ModuleList(_Block(conv, w) for w in widths)
        self.narrow = nn.ModuleList(conv(a, b, 2, stride=2) for a, b in pairwise(widths))
        self.widen = nn.ModuleList(conv(b, a, 1) for a, b in pairwise(widths))
        self.up = nn.ModuleList(_Block(conv, w) for w in widths[:-1])
        self.maps = conv(width, points, 1)
        self.deviation = nn.Linear(widths[-1] + width, points)

    def forward(self, canvas: Tensor) -> tuple[Tensor, Tensor]:
        """canvas: (N, 1, *S), zero where nothing was seen. → points (N, K, D) in half edges from the canvas' centre, axes as in the
        array, and the logarithms of their standard deviations (N, K). Raises GeometryError for other shapes."""
        points, deviation, _ = self.maps_too(canvas)
        return points, deviation

    def maps_too(self, canvas: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`forward`, and the logarithms of the heat maps (N, K, P), P voxels of half the canvas' resolution, last axis fastest."""
        step, edge = 2 ** (1 + self.depth), canvas.shape[-1]
        if canvas.ndim != self.ndim + 2 or canvas.shape[1] != 1 or set(canvas.shape[2:]) != {edge} or edge % step:
            raise GeometryError(f"canvas: {tuple(canvas.shape)}; the detector looks at (N, 1{', S' * self.ndim}), S a multiple of {step}")
        x = self.stem(_blocks(standardised(canvas)))
        kept = []
        for block, narrow in zip(self.down, self.narrow, strict=False):
            x = block(x)
            kept.append(x)
            x = narrow(x)
        x = self.down[-1](x)
        deep = x.flatten(2).mean(2)
        for block, widen, skip in zip(reversed(self.up), reversed(self.widen), reversed(kept), strict=True):
            x = block(skip + F.interpolate(widen(x), scale_factor=2.0))
        heat = self.maps(x).float().flatten(2).log_softmax(2)
        points = heat.exp() @ centres(edge // 2, self.ndim, heat)
        said = self.deviation(torch.cat([deep, x.flatten(2).mean(2)], 1)).float()
        return points, said.clamp(*_DEVIATION), heat


class KeypointNet(nn.Module):
    """(fixed, moving) → map, by the points a shared detector finds in both canvases.

    home: (K, D) where the points lie in a scan of the usual pose, in half edges, for a detector that was taught fixed places of
    an anatomy; with it a scan alone tells its `pose`. model_name: the model whose least-squares member maps the points."""

    kind = "keypoints"
    home: Tensor

    def __init__(self, detector: Detector, home: Tensor | None = None, model_name: str = "affine") -> None:
        super().__init__()
        self.detector = detector
        self.model = fitting(model_name)
        self.register_buffer("home", torch.zeros(0, detector.ndim) if home is None else home.detach().clone())

    @property
    def settings(self) -> dict[str, Any]:
        """What it can be built from again by `of`."""
        return {**self.detector.settings, "model": self.model.name, "home": bool(len(self.home))}

    @classmethod
    def of(cls, settings: dict[str, Any]) -> KeypointNet:
        """A net with these `settings`, untrained."""
        given = dict(settings)
        name, homed = given.pop("model"), given.pop("home")
        detector = Detector(**given)
        return cls(detector, torch.zeros(detector.points, detector.ndim) if homed else None, name)

    def forward(self, fixed: Tensor, moving: Tensor) -> Tensor:
        """Canvases (N, 1, *S), both of as many mm. → (N, D+1, D+1) maps of fixed to moving points, in half edges from the
        canvases' centres; differentiable."""
        points, deviation = self.detector(torch.cat([fixed, moving]))
        (p, q), (a, b) = points.chunk(2), deviation.chunk(2)
        return fit(self.model, p, q, 1 / ((2 * a).exp() + (2 * b).exp()))

    def pose(self, canvas: Tensor) -> tuple[Tensor, Tensor]:
        """The similarity (N, D+1, D+1) that carries the usual pose onto a scan on its canvas (N, 1, *S); at most twice or half as large:
        where the points are not there, a fit may be anything. And how unsure that is: the means (N,) of the points' log deviations."""
        points, deviation = self.detector(canvas)
        found = fit(MODELS["similarity"], self.home.expand_as(points), points, (-2 * deviation).exp())
        d = points.shape[-1]
        size = torch.linalg.det(found[:, :d, :d]) ** (1 / d)
        about = self.home.mean(0).to(found)
        there = found[:, :d, :d] @ about + found[:, :d, d]
        linear = found[:, :d, :d] * (size.clamp(0.5, 2.0) / size)[:, None, None]
        return torch.cat([torch.cat([linear, (there - linear @ about)[..., None]], 2), found[:, d:]], 1), deviation.mean(1)


def fitting(name: str) -> Model:
    """The model of that name; raises OptionError where points cannot be fitted by one in closed form."""
    return MODELS[choose("model", name, ("translation", "rigid", "similarity", "affine"))]


def fit(model: Model, p: Tensor, q: Tensor, weight: Tensor, rounds: int = 4) -> Tensor:
    """The members (N, D+1, D+1) of a model that carry points p (N, K, D) to q with weights (N, K), in float64, those that do not
    agree with the rest counting less (iteratively reweighted, Cauchy's weights, without gradient)."""
    p, q, weight = p.double(), q.double(), weight.double()
    d, robust = p.shape[-1], torch.ones_like(weight)
    for _ in range(rounds):
        with torch.no_grad():
            found = model.fit(p, q, weight * robust)
            away = (p @ found[:, :d, :d].mT + found[:, None, :d, d] - q).norm(dim=-1)
            usual = (1.5 * away.median(1, keepdim=True).values).clamp_min(0.01)
            robust = 1 / (1 + (away / usual).square())
    return model.fit(p, q, weight * robust)


def standardised(canvas: Tensor) -> Tensor:
    """Each canvas with mean 0 and variance 1."""
    axes = tuple(range(1, canvas.ndim))
    spread, mean = torch.var_mean(canvas, axes, keepdim=True, correction=0)
    return (canvas - mean) * (spread + 1e-6).rsqrt()


def _blocks(canvas: Tensor) -> Tensor:
    """(N, 1, *S) → (N, 2^D, *S / 2): the voxels of each block of 2^D as channels."""
    n, d = len(canvas), canvas.ndim - 2
    for axis in range(d):
        canvas = canvas.unflatten(2 + 2 * axis, (-1, 2))
    order = [0, 1, *range(3, 3 + 2 * d, 2), *range(2, 2 + 2 * d, 2)]
    return canvas.permute(order).reshape(n, 2**d, *[s for s in canvas.shape[2::2]])


def centres(edge: int, ndim: int, like: Tensor) -> Tensor:
    """(edge^D, D): centres of a cube's voxels in half edges from its centre, last axis fastest."""
    ramp = (torch.arange(edge, dtype=like.dtype, device=like.device) + 0.5) * (2 / edge) - 1
    return torch.stack(torch.meshgrid(*[ramp] * ndim, indexing="ij"), -1).reshape(-1, ndim)
