"""Trains the nets that are shipped: each learns where points of the brain lie, in pictures of any contrast and pose.

    python pipelines/train_shipped/run.py NAME -o OUT [--steps 100000] [--batch 4] [--rate 2e-3] [--workers 0] [--precision auto]
    python pipelines/train_shipped/run.py NAME -o OUT --export ../../regkit/weights/NAME.safetensors

NAME is head-3d or slice-2d. The rate is constant and the weights are averaged over the last part of the run, so that a run may be broken
off at any time and goes on from OUT. With --export the average is written as a net, without training on.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import sources
import torch
from pictures import KINDS, Pictures, known
from torch import Tensor, nn

from regkit.localisation import Detector, KeypointNet
from regkit.registration.nets import save
from regkit.training.checkpoint import read
from regkit.training.fit import CHECKPOINT, Batch, Plan, Row, fit
from regkit.training.losses import point_loss


class WithMaps(nn.Module):
    """A detector whose forward pass gives the heat maps, too."""

    def __init__(self, detector: Detector) -> None:
        super().__init__()
        self.detector = detector

    def forward(self, canvas: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.detector.maps_too(canvas)


def loss(net: nn.Module, batch: Batch) -> dict[str, Tensor]:
    points, deviation, heat = net(batch["canvas"])
    away = (points.detach() - batch["points"]).norm(dim=-1).mean()
    every = torch.ones(len(points), device=points.device)
    return {"loss": point_loss(heat, points, deviation, batch["points"], every), "away_mm": away * sources.SCALE}


def export(name: str, folder: Path, path: Path, data: Path) -> None:
    """The averaged weights as a net with the points' usual places."""
    tensors, state = read(folder / CHECKPOINT)
    detector = Detector(**state["settings"]["net"])
    begin = "average/detector."
    detector.load_state_dict({key.removeprefix(begin): value for key, value in tensors.items() if key.startswith(begin)})
    kind, (_, points, _) = KINDS[name], known(name, data)
    save(KeypointNet(detector, points), path, edge=kind.edge, mm=kind.mm, half=True, overwrite=True,
         info={"name": name, "steps": state["step"], "batch": state["settings"]["batch"]})
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB, {state['step']} steps")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=list(KINDS))
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--data", type=Path, default=sources.CACHE, help="where what is fetched and made once is kept")
    parser.add_argument("--export", type=Path)
    given = parser.parse_args()
    data = given.data.expanduser()
    if given.export:
        export(given.name, given.output, given.export, data)
        return
    given.output.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    kind = KINDS[given.name]
    net = WithMaps(Detector(kind.points, kind.ndim, width=kind.width))
    plan = Plan(given.steps, given.batch, given.rate, decay="constant", precision=given.precision, workers=given.workers, log_every=100)
    began = time.monotonic()

    def tell(row: Row) -> None:
        print(*(f"{key} {value:.4g}" for key, value in row.items()), f"{time.monotonic() - began:.0f} s", flush=True)

    fit(net, Pictures(given.name, data, 0), loss, plan, given.output,
        settings={"net": net.detector.settings, "batch": given.batch}, resume=True, tell=tell)


if __name__ == "__main__":
    main()
