"""regkit's training against MONAI's `GlobalNet` + `Warp` + LNCC: the same scans, the same pairs in the same poses, equal time.

    python pipelines/benchmark/training.py SCANS -o OUT [--minutes 10] [--turn 180] [--threads 1]

SCANS is what `regkit train` takes. Each contestant is trained for so many minutes of processor time, one after the other, with its
steps' learning rate falling to nothing at the end (both: Adam, a cosine by time). GlobalNet is as MONAI has it, 16 channels, depth 3,
trained with LocalNormalizedCrossCorrelationLoss on the pairs' canvases; `known` gives it the known poses of pairs of one scan as well, by
the same term that regkit has. Beside them stands SimpleITK's affine registration of the validation pairs, trained on nothing. Writes
OUT/training.json and OUT/training.md: errors on people kept for validation and pairs a second.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import peers
import torch
from torch import Tensor, nn

import regkit
from regkit.localisation import Detector, KeypointNet, RegressionNet
from regkit.space import Frame, Grid
from regkit.training.losses import Localising, Loss, displacement
from regkit.training.pairs import Drawer, Pairs, poses, spread
from regkit.training.scans import canvas_for, extents, listed, prepare, split
from regkit.training.validate import cases, measure, of_net, of_start

EDGE, BATCH, CASES = 40, 4, 48
RATES = {"regkit keypoints": 2e-3, "regkit regression": 1e-3, "MONAI GlobalNet": 1e-3, "MONAI GlobalNet + known": 1e-3}


class Global(nn.Module):
    """MONAI's affine net as (fixed, moving) → maps (N, D+1, D+1) in half edges."""

    def __init__(self, ndim: int) -> None:
        super().__init__()
        from monai.networks.nets import GlobalNet

        self.net = GlobalNet([EDGE] * ndim, spatial_dims=ndim, in_channels=2, num_channel_initial=16, depth=3)
        units = torch.eye(ndim + 1, dtype=torch.float64)
        units[:ndim, :ndim] *= 2 / EDGE
        units[:ndim, ndim] = 1 / EDGE - 1
        corners = torch.cartesian_prod(*[torch.tensor([0, EDGE - 1])] * ndim)
        self.register_buffer("units", units)
        self.register_buffer("corners", corners)

    def field(self, fixed: Tensor, moving: Tensor) -> Tensor:
        return self.net(torch.cat([moving, fixed], 1))

    def forward(self, fixed: Tensor, moving: Tensor) -> Tensor:
        return self.maps(self.field(fixed, moving))

    def maps(self, field: Tensor) -> Tensor:
        """The affine maps that displacement fields (N, D, *S) in voxels are: by least squares at the corners, which is exact."""
        d = field.shape[1]
        at = self.corners.double()
        there = at + torch.stack([field[(slice(None), slice(None), *c)] for c in self.corners.tolist()], 1).double()
        padded = torch.cat([at, torch.ones_like(at[:, :1])], 1)
        solved = torch.linalg.lstsq(padded.expand(len(field), -1, -1), there).solution.mT
        last = torch.zeros(len(field), 1, d + 1, dtype=torch.float64)
        last[:, 0, d] = 1
        return self.units @ torch.cat([solved, last], 1) @ torch.linalg.inv(self.units)


def lncc_loss(known: bool) -> Callable[[nn.Module, dict[str, Tensor]], Tensor]:
    """MONAI's way, and with the known poses as regkit's loss has them."""
    from monai.losses import LocalNormalizedCrossCorrelationLoss
    from monai.networks.blocks import Warp

    warp = Warp("bilinear", "zeros")

    def loss(net: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        lncc = LocalNormalizedCrossCorrelationLoss(spatial_dims=batch["fixed"].ndim - 2, kernel_size=7)
        field = net.field(batch["fixed_seen"], batch["moving_seen"])
        total = lncc(warp(batch["moving"], field), batch["fixed"])
        if known:
            away = displacement(net.maps(field), batch["known"]).square() * batch["is_known"]
            total = total + 10 * (away.sum() / batch["is_known"].sum().clamp_min(1)).float()
        return total

    return loss


def trained(net: nn.Module, loss: Callable[[nn.Module, dict[str, Tensor]], Tensor], pairs: Pairs, rate: float, seconds: float,
            grow: Callable[[float], int]) -> int:
    """Trains for so many seconds of processor time → steps. grow: share of the time → the step whose poses are drawn."""
    optimiser = torch.optim.Adam(net.parameters(), rate)
    half = bool(torch.cpu._is_avx512_bf16_supported())
    steps, began = 0, time.process_time()
    while (share := (time.process_time() - began) / seconds) < 1:
        for group in optimiser.param_groups:
            group["lr"] = rate * min(1.0, (steps + 1) / 100) * 0.5 * (1 + math.cos(math.pi * share))
        items = range(steps * BATCH, (steps + 1) * BATCH)
        batch = pairs(grow(share), items)
        optimiser.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            value = loss(net, batch)
        value.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimiser.step()
        steps += 1
    return steps


def of_sitk(mm: float, threads: int) -> Callable[[Tensor, Tensor], Tensor]:
    """What `measure` asks of SimpleITK's affine registration of two canvases `mm` wide, by the recipe of `peers.py`."""
    def say(fixed: Tensor, moving: Tensor) -> Tensor:
        d, edge = fixed.ndim - 2, fixed.shape[-1]
        affine = torch.eye(d + 1, dtype=torch.float64)
        affine[:d, :d] *= mm / edge
        affine[:d, d] = (mm / edge - mm) / 2
        with tempfile.TemporaryDirectory() as folder:
            paths = [str(regkit.write_image(regkit.Image(data, Grid((edge,) * d, affine)), Path(folder, f"{name}.nii.gz")))
                     for name, data in (("fixed", fixed), ("moving", moving))]
            found = torch.from_numpy(peers.sitk(d, *paths, folder, threads))[None]
        frame = Frame(torch.zeros(1, d, dtype=torch.float64), mm / 2)
        return frame.matrix @ found @ frame.inverse

    return say


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scans", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--turn", type=float, default=180.0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", help=f"of {', '.join(RATES)}")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    given.output.mkdir(parents=True, exist_ok=True)
    read, extent = extents(split(listed(given.scans), 0.2, 0), False, print)
    drawer = Drawer(EDGE, canvas_for(extent))
    every = [prepare(one, image, drawer.mm / EDGE, given.output / "scans") for one, image in read]
    learning, kept = [s for s in every if not s.listed.held_out], [s for s in every if s.listed.held_out]
    d, draw = learning[0].grid.ndim, poses(given.turn)
    home = spread(learning[0], drawer, 32 if d == 3 else 24)
    looked = cases(kept, drawer, draw, [], CASES, 1)
    ours, whole = Loss("lncc", 1.0, 1.0, 0.05, 0.0), 1_000_000

    def grow(share: float) -> int:
        return round(share * whole)

    table = {}
    for name in given.only.split(",") if given.only else RATES:
        torch.manual_seed(0)
        reference = home if name == "regkit keypoints" else torch.zeros(0, d)
        pairs = Pairs(learning, drawer, draw, "all", whole, 0, 1.0, reference, [])
        if name.startswith("regkit"):
            net: nn.Module = Localising(KeypointNet(Detector(len(home), d), home.float()) if len(reference) else RegressionNet(EDGE, d))
            loss = lambda net, batch: ours(net, batch)["loss"]  # noqa: E731
        else:
            net, loss = Global(d), lncc_loss(name.endswith("known"))
        steps = trained(net, loss, pairs, RATES[name], 60 * given.minutes, grow)
        net.eval()
        table[name] = {**measure(of_net(net), looked, drawer, "lncc"), "pairs_a_second": steps * BATCH / (60 * given.minutes)}
        print(name, {key: round(value, 3) for key, value in table[name].items()}, flush=True)
    ways = {"header": of_start("header"), "mass": of_start("mass"), "SimpleITK affine": of_sitk(drawer.mm, given.threads)}
    for name, say in ways.items():
        began = time.process_time()
        table[name] = measure(say, looked, drawer, "lncc")
        table[name]["seconds"] = (time.process_time() - began) / len(looked)
        print(name, {key: round(value, 3) for key, value in table[name].items()}, flush=True)
    (given.output / "training.json").write_text(json.dumps(table, indent=1), encoding="utf-8")
    columns = list(dict.fromkeys(key for row in table.values() for key in row))
    lines = ["| | " + " | ".join(columns) + " |", "|---|" + "---|" * len(columns)]
    lines += [f"| {name} | " + " | ".join(f"{row[c]:.3g}" if c in row else "" for c in columns) + " |" for name, row in table.items()]
    (given.output / "training.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
