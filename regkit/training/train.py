"""`train()`: a folder of scans in, a localisation net with its record out. The command line calls this and nothing else."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from regkit.errors import OptionError, OutputError
from regkit.io.output import output_file
from regkit.localisation import Detector, KeypointNet, RegressionNet
from regkit.registration.nets import NET, Trained, load, save
from regkit.training import report
from regkit.training.checkpoint import read
from regkit.training.fit import CHECKPOINT, Plan, Row, fit
from regkit.training.losses import Localising, Loss, moved_by
from regkit.training.pairs import Drawer, Pairs, poses, spread
from regkit.training.scans import Scan, canvas_for, common_labels, extents, listed, prepare, split
from regkit.training.settings import ATLAS, TrainSettings
from regkit.training.validate import CASES, Case, cases, measure, of_net, of_start

POINTS = {2: 24, 3: 32}
FRAMES = 24  # of the film
_CASES = 24  # pairs of the last validation
_STARTS = ("header", "mass", "search")


def train(scans: str | Path, output: str | Path, settings: TrainSettings | None = None, *, resume: bool = False, overwrite: bool = False,
          tell: Callable[[Row], None] = lambda row: None, note: Callable[[str], None] = lambda text: None) -> Trained:
    """Train a localisation net on scans, without labels or truth.

    scans: a folder, or a table scan[,labels][,person][,split]. output: a folder, which gets net.safetensors (for
    `--start net:FOLDER`), checkpoint.safetensors, log.csv, curves.png, evolution.gif, model-card.md and training.json.
    resume: go on from the folder's checkpoint. tell: is given each row of the log; note: sentences on what was done.

    → the net. Raises RegkitError: scans that cannot be read, an option that does not fit, an output that is taken, a loss that is no
    number."""
    settings = settings or TrainSettings()
    folder, began = Path(output).expanduser(), time.monotonic()
    _claim(folder, resume, overwrite)
    found = _listed(Path(scans), settings)
    read_in, extent = extents(found, settings.skip_bad, note)
    width = settings.canvas or canvas_for(extent)
    drawer = Drawer(settings.edge, width)
    every = [prepare(one, image, width / settings.edge, folder / "scans") for one, image in read_in]
    del read_in
    learning = [scan for scan in every if not scan.listed.held_out]
    kept = [scan for scan in every if scan.listed.held_out]
    labels = common_labels(every)
    if settings.labels and not labels:
        raise OptionError("labels: has a weight, but not all scans have label maps with a label in common; give NAME_seg or NAME_labels "
                          "beside every scan, or a table with a column labels")
    if len(learning) < 2:
        raise OptionError(f"held-out: leaves {len(learning)} scans to learn from; two or more are needed, so give a smaller share")
    net = _net(settings, every[0].grid.ndim, learning[0], drawer)
    draw = poses(settings.turn)
    reference = net.home if isinstance(net, KeypointNet) else torch.zeros(0, every[0].grid.ndim)
    rule = "atlas" if settings.pairs.startswith(ATLAS) else settings.pairs
    pairs = Pairs(learning, drawer, draw, rule, settings.steps, settings.seed, settings.augment, reference,
                  labels if settings.labels else [])
    looked = cases(kept or learning, drawer, draw, labels, CASES, settings.seed + 1)
    frames: list[np.ndarray] = []

    def look(average: nn.Module, step: int) -> Row:
        frames.append(_seen(average, looked[min(1, len(looked) - 1)]))
        np.save(folder / "frames.npy", np.stack(frames))
        return measure(of_net(average), looked, drawer, settings.similarity)

    if resume and (folder / "frames.npy").exists():
        frames.extend(np.load(folder / "frames.npy"))
    plan = Plan(settings.steps, settings.batch, settings.rate, seed=settings.seed, precision=settings.precision, device=settings.device,
                workers=settings.workers, look_every=max(1, settings.steps // FRAMES))
    said = {key: value for key, value in settings.as_dict().items() if key not in ("device", "workers", "skip_bad")}
    loss = Loss(settings.similarity, settings.known, settings.similar, settings.regular, settings.labels)
    write = report.board(folder / "tensorboard")

    def row(found: Row) -> None:
        write(found)
        tell(found)

    average = fit(Localising(net), pairs, loss, plan, folder, settings={**said, "scans": len(every), "canvas": width}, resume=resume,
                  look=look, tell=row)
    assert isinstance(average, Localising)
    rows = read(folder / CHECKPOINT)[1]["log"]
    info = _info(settings, average.net, learning, kept, drawer, time.monotonic() - began, folder)
    table = _compared(average, cases(kept or learning, drawer, draw, labels, _CASES, settings.seed + 2), drawer, settings.similarity)
    save(average.net.cpu(), folder / NET, edge=settings.edge, mm=width / settings.edge, info={**info, "validation": table}, overwrite=True)
    _written(folder, rows, frames, info, table, note)
    return load(folder)


def _claim(folder: Path, resume: bool, overwrite: bool) -> None:
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"output: {folder} is a file, not a folder; choose another place")
    if resume and overwrite:
        raise OptionError("resume, overwrite: go on with a training, or begin it anew; give one of them")
    there = folder / CHECKPOINT
    if there.exists() and not resume:
        if not overwrite:
            raise OutputError(f"output: {folder} holds a training; --resume goes on with it, --overwrite begins anew")
        for name in (CHECKPOINT, NET, "frames.npy"):
            (folder / name).unlink(missing_ok=True)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"output: {folder} cannot be made: {error.strerror or error}; choose another place") from error


def _listed(source: Path, settings: TrainSettings) -> list:
    found = split(listed(source), settings.held_out, settings.seed)
    if settings.pairs.startswith(ATLAS):
        atlas = Path(settings.pairs.removeprefix(ATLAS)).expanduser().resolve()
        first = [one for one in found if one.path.resolve() == atlas]
        if not first:
            first = [type(found[0])(atlas, None, "atlas", False)]
        found = [type(first[0])(first[0].path, first[0].labels, first[0].person, False),
                 *(one for one in found if one.path.resolve() != atlas)]
    return found


def _net(settings: TrainSettings, ndim: int, first: Scan, drawer: Drawer) -> nn.Module:
    """A new net, whose start depends on the seed alone, or the one that is named."""
    if settings.weights:
        given = load(settings.weights)
        if given.net.kind != settings.net or given.ndim != ndim:
            raise OptionError(f"weights: {settings.weights} is a {given.net.kind} net for {given.ndim}D scans; asked for is a "
                              f"{settings.net} net, and the scans are {ndim}D")
        return given.net.train().requires_grad_(True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        if settings.net == RegressionNet.kind:
            return RegressionNet(settings.edge, ndim, settings.model)
        home = spread(first, drawer, POINTS[ndim])
        return KeypointNet(Detector(len(home), ndim), home.float(), settings.model)


def _seen(average: nn.Module, case: Case) -> np.ndarray:
    """A frame of the film."""
    map = of_net(average)(case.fixed, case.moving).cpu()
    return report.frame(case.fixed, moved_by(map, case.moving, case.fixed.shape[2:]))


def _compared(average: nn.Module, looked: list[Case], drawer: Drawer, similarity: str) -> dict[str, dict[str, float]]:
    """The net beside the starts that `regkit register` knows, unrefined, and beside what it makes of the pairs in the end."""
    ways = {"net": of_net(average), **{name: of_start(name) for name in _STARTS}, "auto, refined": of_start("auto", refined=True)}
    table = {}
    for name, say in ways.items():
        began = time.perf_counter()
        table[name] = measure(say, looked, drawer, similarity)
        table[name]["seconds"] = (time.perf_counter() - began) / len(looked)
    return table


def _info(settings: TrainSettings, net: nn.Module, learning: list[Scan], kept: list[Scan], drawer: Drawer, seconds: float,
          folder: Path) -> dict[str, Any]:
    return {"name": folder.name, "net": settings.net, "model": settings.model, "ndim": learning[0].grid.ndim,
            "parameters": sum(p.numel() for p in net.parameters()), "edge": drawer.edge, "mm": drawer.mm / drawer.edge,
            "training": len(learning), "held_out": len(kept), "people": len({scan.listed.person for scan in learning}),
            "steps": settings.steps, "batch": settings.batch, "hours": seconds / 3600, "similarity": settings.similarity,
            "turn": settings.turn, "seed": settings.seed, "cases": _CASES, "scans": sorted(scan.listed.path.name for scan in learning),
            "device": "a GPU" if torch.cuda.is_available() and settings.device != "cpu" else f"{torch.get_num_threads()} CPU threads"}


def _written(folder: Path, rows: list[Row], frames: list[np.ndarray], info: dict[str, Any], table: dict[str, dict[str, float]],
             note: Callable[[str], None]) -> None:
    report.write_log(folder / "log.csv", rows)
    if not report.curves(folder / "curves.png", rows):
        note("no curves.png: matplotlib is missing; pip install 'regkit[report]'")
    if frames:
        report.film(folder / "evolution.gif", frames)
    with output_file(folder / "model-card.md", overwrite=True) as aside:
        aside.write_text(report.card(info, table), encoding="utf-8")
    with output_file(folder / "training.json", overwrite=True) as aside:
        aside.write_text(json.dumps({**info, "validation": table}, indent=1), encoding="utf-8")
