"""A localisation net that fits the images it looks at: a few convolutions, then θ."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from regkit.errors import GeometryError, OptionError
from regkit.space import Model, SplineModel, model

_SMALLEST = 4  # voxels an axis keeps when it is pooled


class Localiser(nn.Sequential):
    """A net that looks at `images` images (N, *shape) at once, laid beside each other as channels."""

    def __init__(self, layers: Sequence[nn.Module], shape: tuple[int, ...], images: int) -> None:
        super().__init__(*layers)
        self.shape, self.images = shape, images

    def forward(self, *images: Tensor) -> Tensor:
        """images: as many as it was built for, each (N, *shape). → θ (N, P). Raises GeometryError for others."""
        if len(images) != self.images or any(tuple(image.shape[1:]) != self.shape for image in images):
            raise GeometryError(f"localiser: was built for {self.images} of (N, {', '.join(map(str, self.shape))}), got "
                                f"{', '.join(str(tuple(image.shape)) for image in images) or 'none'}")
        return super().forward(torch.cat(images, 1))


def localiser(shape: Sequence[int], model_name: str | Model | SplineModel = "affine", *, width: int = 16, hidden: int = 32,
              images: int = 1) -> Localiser:
    """A small convolutional net that says θ (N, P) for images (N, C, *S) of a known shape.

    shape: (C, *S), of one image. model_name: as `SpatialTransformer` takes it. width: channels of the first convolution; they
    double, up to four times as many, each time the image is halved. hidden: units before θ; both more for
    images with much in them. images: how many images it is
    given at once, for example 2 for moving and fixed.

    Convolution, normalisation of each image by itself, ReLU and halving by average, until an axis has less than 8 voxels; then
    two linear layers, the last of zero weights and bias: θ = 0, the identity, at the start. No statistics of batches.

    Raises GeometryError for another number of axes, OptionError for numbers below 1.
    """
    whole = all(int(n) == n for n in shape)
    channels, *size = (int(n) for n in shape)
    d = len(size)
    if d not in (2, 3) or min(channels, *size) < 1 or not whole:
        raise GeometryError(f"shape: {tuple(shape)}; expected (C, H, W) or (C, H, W, D)")
    for name, value in (("width", width), ("hidden", hidden), ("images", images)):
        if value < 1:
            raise OptionError(f"{name}: {value}; expected 1 or more")
    conv, pool = (nn.Conv2d, nn.Conv3d)[d - 2], (nn.AvgPool2d, nn.AvgPool3d)[d - 2]
    layers: list[nn.Module] = []
    count, most = channels * images, 4 * width
    while True:
        alone = width * torch.Size(size).numel() == 1  # one number has no spread to be divided by
        layers += [conv(count, width, 3, padding=1), nn.Identity() if alone else nn.GroupNorm(1, width), nn.ReLU()]
        count, width = width, min(2 * width, most)
        halves = tuple(2 if n >= 2 * _SMALLEST else 1 for n in size)
        if max(halves) == 1:
            break
        layers.append(pool(halves))  # type: ignore[arg-type]
        size = [n // k for n, k in zip(size, halves, strict=True)]
    found = model(model_name) if isinstance(model_name, str) else model_name
    last = nn.Linear(hidden, found.count(d))
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    layers += [nn.Flatten(), nn.Linear(count * torch.Size(size).numel(), hidden), nn.ReLU(), last]
    return Localiser(layers, tuple(int(n) for n in shape), images)
