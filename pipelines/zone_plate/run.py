"""How well shrinking is anti-aliased, on zone plates: what an output cannot show should be gone, what it can should be there.

    python pipelines/zone_plate/run.py -o OUT [--size 512] [--shrink 4]

A zone plate cos(π r² / n) holds every frequency, each at a place of its own: at r it is r / n cycles a pixel. So after shrinking, all
that is left where the frequency exceeds the output's Nyquist limit (half a cycle a pixel along an axis of the output) is alias, and what
is left below half of that limit tells the loss of detail. Measured: the alias' energy in dB against plain bilinear sampling of the same
map; the amplitude, in dB, just below half the limit; the time against averaging 8 × 8 bilinear samples a pixel. Writes OUT/table.md and
OUT/plates.png, prints the table.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image as Picture
from torch import Tensor, nn

import regkit
from regkit.space import model

SUPER = 8
MARGIN = 8  # pixels at the plate's edge that are not judged: there every filter is cut off


class Told(nn.Module):
    """A localisation that says what it is told."""

    def __init__(self, theta: Tensor) -> None:
        super().__init__()
        self.theta = theta

    def forward(self, images: Tensor) -> Tensor:
        return self.theta


def plate(n: int) -> Tensor:
    """(1, 1, n, n): the whole band, up to half a cycle a pixel at the middle of the edges."""
    x = torch.arange(n, dtype=torch.float64) - (n - 1) / 2
    return torch.cos(math.pi * (x[:, None] ** 2 + x**2) / n).float()[None, None]


def cases(n: int) -> dict[str, tuple[str, Tensor]]:
    """What is tried: name → model and θ; the output's size does the shrinking."""
    def affine(**values: float) -> Tensor:
        theta = torch.zeros(1, model("affine").count(2))
        for name, value in values.items():
            theta[0, ("i", "j", "turn", "scale", "stretch").index(name)] = value
        return theta

    shift = 0.74 / n  # a third of a pixel: no sample hits a voxel's centre
    tilt = torch.zeros(1, model("projective").count(2))
    tilt[0, :2], tilt[0, 6] = shift, 0.2
    return {
        "straight": ("affine", affine(i=shift, j=shift)),
        "turned by 29°": ("affine", affine(i=shift, j=shift, turn=0.5)),
        "projective": ("projective", tilt),
        "projective, no tilt (a scale-space only)": ("projective", torch.where(tilt == 0.2, 0.0, tilt)),
    }


def median_time(run: Callable[[], Tensor], repeats: int = 7) -> float:
    run()
    found = []
    for _ in range(repeats):
        began = time.perf_counter()
        run()
        found.append(time.perf_counter() - began)
    return statistics.median(found)


def measure(n: int, shrink: int, kind: str, theta: Tensor) -> tuple[dict[str, float], list[Tensor]]:
    image, size = plate(n), (n // shrink,) * 2
    layers = {name: regkit.SpatialTransformer(Told(theta), kind, size=size, antialias=name) for name in ("auto", "none")}
    fine = regkit.SpatialTransformer(Told(theta), kind, size=(size[0] * SUPER, size[1] * SUPER), antialias="none")
    with torch.no_grad():
        smooth, raw = (layers[name](image)[0, 0].double() for name in ("auto", "none"))
        reference = F.avg_pool2d(fine(image), SUPER)[0, 0].double()
        seconds = [median_time(lambda: layers["auto"](image)), median_time(lambda: F.avg_pool2d(fine(image), SUPER))]
        transform = layers["auto"].transform(image)
    # where the output's pixels lie in the plate, and the frequency there along the output's axes
    step = n / size[0]
    index = torch.stack(torch.meshgrid(*[torch.arange(m, dtype=torch.float64) for m in size], indexing="ij"), -1).reshape(-1, 2)
    at = lambda i: transform(((i + 0.5) * step - 0.5)[None])[0] - (n - 1) / 2  # noqa: E731
    place = at(index)
    slopes = torch.stack([at(index + h) - at(index - h) for h in 0.5 * torch.eye(2, dtype=torch.float64)], -1)
    frequency = (slopes.mT @ (place / n)[..., None])[..., 0].abs()
    truth = torch.cos(math.pi * place.square().sum(-1) / n)
    judged = (place.abs() < n / 2 - MARGIN).all(-1) & ((place / n).norm(dim=-1) < 0.5)
    beyond = judged & (frequency.amax(-1) > 0.5)
    edge = judged & (frequency.norm(dim=-1) > 0.22) & (frequency.norm(dim=-1) <= 0.25)

    def alias(values: Tensor) -> float:
        return 10 * math.log10(float(values.flatten()[beyond].square().mean() / raw.flatten()[beyond].square().mean()))

    def kept(values: Tensor) -> float:
        return 20 * math.log10(float((values.flatten()[edge] * truth[edge]).sum() / truth[edge].square().sum()))

    return {"alias": alias(smooth), "kept": kept(smooth), "alias_of_reference": alias(reference), "kept_of_reference": kept(reference),
            "ms": 1000 * seconds[0], "of_reference": seconds[0] / seconds[1]}, [raw, smooth, reference]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--shrink", type=int, default=4)
    given = parser.parse_args()
    torch.set_num_threads(1)
    lines = ["| map | alias, dB (8 × 8 average) | kept just below half the limit, dB (8 × 8 average) | ms | of the 8 × 8 average's time |",
             "|---|---|---|---|---|"]
    pictures = []
    for name, (kind, theta) in cases(given.size).items():
        found, shown = measure(given.size, given.shrink, kind, theta)
        lines.append(f"| {name} | {found['alias']:.1f} ({found['alias_of_reference']:.1f}) | {found['kept']:.2f} "
                     f"({found['kept_of_reference']:.2f}) | {found['ms']:.1f} | {found['of_reference']:.2f} |")
        pictures.append(torch.cat(shown, 1))
    given.output.mkdir(parents=True, exist_ok=True)
    (given.output / "table.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    sheet = torch.cat(pictures[:3:2]).add(1).mul(127.5).clamp(0, 255).byte()
    Picture.fromarray(sheet.numpy()).save(given.output / "plates.png")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
