"""The nets that are compared: fully connected and convolutional, each alone and behind a spatial transformer, of one size.

After Jaderberg et al. 2015, appendix A.4: all nets of an experiment have about 400,000 parameters, so one with a transformer has a
smaller classifier; the classifier convolves 9×9, then 7×7; the localisation of an FCN is three layers of 32 units, that of a CNN
two layers of 20 filters 5×5, then 20 units; its last layer begins at zero, where the transformer is the identity.

Differences, all for the sake of training on a CPU: 32 filters a layer (the paper: 32 to 64) with a hidden layer behind them that takes
what is left of the parameters; one pooling, down to a map of like size whatever the image, instead of two; transformers give 28×28,
the digit's own size, where the paper pools their output by two; localisations of images larger than that look at it halved. The 60×60
of the clutter are read anti-aliased, which does there what the paper's pooling does.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from first import FirstConv
from torch import Tensor, nn

from regkit.space import model
from regkit.stn import SpatialTransformer

BUDGET = 400_000
CROP = 28
CLASSES = 10
TRANSFORMS = ("affine", "projective", "tps")
NAMES = ("FCN", "CNN", *(f"ST-{kind} {name}" for kind in ("FCN", "CNN") for name in TRANSFORMS))
# for the clutter, where the question is whether the transformer finds the digit
FEW = ("FCN", "CNN", "ST-FCN affine", "ST-CNN affine", "ST-CNN projective", "ST-CNN tps")


def half() -> bool:
    """Whether this CPU multiplies bfloat16 by itself: convolutions then take half the time."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()) and torch.cpu._is_avx512_bf16_supported()


class Quick(nn.Sequential):
    """Convolutions in bfloat16 where the CPU has it; float32 goes in and comes out, and the weights are float32."""

    def forward(self, input: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=half()):
            found = super().forward(input.contiguous(memory_format=torch.channels_last))
        return found.float()


class Standing(nn.Module):
    """A transformer, then the net that looks at what it gives; kept by name, for its transform is looked at too."""

    def __init__(self, transformer: SpatialTransformer, classifier: nn.Module) -> None:
        super().__init__()
        self.transformer = transformer
        self.classifier = classifier

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.transformer(images))


def fully(side: int, width: int) -> nn.Module:
    """Two hidden layers of `width` units."""
    return nn.Sequential(nn.Flatten(), nn.Linear(side * side, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(),
                         nn.Linear(width, CLASSES))


def convolutional(side: int, width: int, filters: int = 32) -> nn.Module:
    """Filters of 9×9, pooling, filters of 7×7, a hidden layer of `width` units."""
    pool = side // 14
    left = (side - 8) // pool - 6
    # pooled first, then cut off: the same values, a quarter of the work
    return nn.Sequential(
        Quick(FirstConv(1, filters, 9), nn.MaxPool2d(pool), nn.ReLU(), nn.Conv2d(filters, filters, 7), nn.ReLU(), nn.Flatten(),
              nn.Linear(filters * left * left, width), nn.ReLU()),
        nn.Linear(width, CLASSES))


def _at_zero(layer: nn.Linear) -> nn.Linear:
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def fully_localised(side: int, count: int) -> nn.Module:
    """Images (N, 1, side, side) → θ (N, count)."""
    return nn.Sequential(nn.Flatten(), nn.Linear(side * side, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(),
                         _at_zero(nn.Linear(32, count)))


def convolutionally_localised(side: int, count: int) -> nn.Module:
    """Images (N, 1, side, side) → θ (N, count)."""
    first = side // 2 if side > CROP else side
    left = (first - 4) // 2 - 4
    return nn.Sequential(
        Quick(nn.AvgPool2d(2) if side > CROP else nn.Identity(), nn.Conv2d(1, 20, 5), nn.MaxPool2d(2), nn.ReLU(),
              nn.Conv2d(20, 20, 5), nn.ReLU(), nn.Flatten(), nn.Linear(20 * left * left, 20), nn.ReLU()),
        _at_zero(nn.Linear(20, count)))


def transformer(localisation: nn.Module, name: str, side: int = CROP) -> SpatialTransformer:
    return SpatialTransformer(localisation, name, size=(CROP, CROP), padding="zeros", antialias="auto" if side >= 2 * CROP else "none")


def parameters(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


def _widest(make: Callable[[int], nn.Module], budget: int) -> nn.Module:
    """The net of the greatest width that keeps within the budget."""
    low, high = 1, 1 << 13
    with torch.device("meta"):
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if parameters(make(middle)) <= budget else (low, middle)
    return make(low)


def build(name: str, side: int, seed: int, budget: int = BUDGET) -> nn.Module:
    """The net of that name for images (N, 1, side, side) → logits (N, 10). Its start depends on name and seed alone."""
    kind, _, transform = name.removeprefix("ST-").partition(" ")
    classifier = fully if kind == "FCN" else convolutional
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1000 * seed + NAMES.index(name))
        if not transform:
            return _widest(partial(classifier, side), budget).to(memory_format=torch.channels_last)
        localise = fully_localised if kind == "FCN" else convolutionally_localised
        module = transformer(localise(side, model(transform).count(2)), transform, side)
        net = Standing(module, _widest(partial(classifier, CROP), budget - parameters(module)))
    return net.to(memory_format=torch.channels_last)


def groups(net: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The parameters of the classifier and of the localisation, which learns at a pace of its own."""
    if not isinstance(net, Standing):
        return list(net.parameters()), []
    return list(net.classifier.parameters()), list(net.transformer.parameters())


def loss(net: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(net(images), labels)
