"""`train()`: a folder of scans in, a localisation net with its record out. The command line calls this and nothing else."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from regkit.errors import FormatError, OptionError, OutputError
from regkit.io.images import image_suffix
from regkit.io.output import output_file
from regkit.io.paths import home
from regkit.localisation import Detector, KeypointNet, RegressionNet
from regkit.registration.nets import NET_FILE, Trained, load, save
from regkit.training import report
from regkit.training.checkpoint import read
from regkit.training.fit import CHECKPOINT, Plan, Row, fit
from regkit.training.losses import Localising, Loss, moved_by
from regkit.training.pairs import Drawer, Pairs, poses, spread
from regkit.training.scans import Listed, Scan, beside, canvas_for, common_labels, extents, listed, prepare, save_array, split
from regkit.training.settings import ATLAS, TrainSettings
from regkit.training.validate import CASES, Case, cases, measure, of_net, of_start

POINTS = {2: 24, 3: 32}
FRAMES = 24  # of the film
FILMED = 5  # which of the pairs that are looked at on the way: of two scans, turned by two fifths of what is allowed
KEPT = "frames.npy"  # those that there are
_NARROW = 4  # canvases may be so many times narrower or wider than the scans
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
    folder = home(output)
    with _claimed(folder, resume, overwrite):
        found = _listed(Path(scans), folder, settings)
        read_in, extent = extents(found, settings.skip_bad, note)
        if settings.pairs.startswith(ATLAS) and read_in[0][0] is not found[0]:
            raise FormatError(f"pairs: {found[0].path} cannot be read; give {ATLAS} and another scan that is always fixed")
        if (left := sum(not one.held_out for one, _ in read_in)) < 2:
            raise OptionError(f"held-out: leaves {left} scans to learn from; two or more are needed, so give a smaller share")
        width = _width(settings.canvas, extent)
        precision = _precision(settings, read_in[0][1].ndim)
        given = _given(settings, read_in[0][1].ndim)
    drawer = Drawer(settings.edge, width)
    every = [prepare(one, image, width / settings.edge, folder / "scans") for one, image in read_in]
    del read_in
    learning = [scan for scan in every if not scan.listed.held_out]
    kept = [scan for scan in every if scan.listed.held_out]
    labels = common_labels(every)
    if settings.labels and not labels:
        raise OptionError("labels: has a weight, but not all scans have label maps with a label in common; give NAME_seg or NAME_labels "
                          "beside every scan, or a table with a column labels")
    net = given or _net(settings, every[0].grid.ndim, learning[0], drawer)
    draw = poses(settings.turn)
    reference = net.home if isinstance(net, KeypointNet) else torch.zeros(0, every[0].grid.ndim)
    rule = "atlas" if settings.pairs.startswith(ATLAS) else settings.pairs
    pairs = Pairs(learning, drawer, draw, rule, settings.steps, settings.seed, settings.augment, reference,
                  labels if settings.labels else [])
    looked = cases(kept or learning, drawer, draw, labels, CASES, settings.seed + 1)
    frames: list[np.ndarray] = []

    def look(average: nn.Module, step: int) -> Row:
        frames.append(_seen(average, looked[min(FILMED, len(looked) - 1)]))
        save_array(folder / KEPT, np.stack(frames))
        return measure(of_net(average), looked, drawer, settings.similarity)

    if not resume:
        _cleared(folder)
    elif (folder / KEPT).exists() and (folder / CHECKPOINT).exists():  # a frame may have been kept, and the step's checkpoint not
        frames.extend(np.load(folder / KEPT)[: sum("tre_mm" in row for row in read(folder / CHECKPOINT)[1]["log"])])
    plan = Plan(settings.steps, settings.batch, settings.rate, seed=settings.seed, precision=precision, device=settings.device,
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
    info = _info(settings, average.net, learning, kept, drawer, folder)
    if int(os.environ.get("RANK", "0")):  # of several processes, one compares and writes
        return Trained(average.net.cpu(), settings.edge, width / settings.edge, str(folder), info)
    record = read(folder / CHECKPOINT)[1]
    rows, info["hours"] = record["log"], record["seconds"] / 3600
    save(average.net, folder / NET_FILE, edge=settings.edge, mm=width / settings.edge, info=info, overwrite=True)  # whatever comes now
    table = _compared(average, cases(kept or learning, drawer, draw, labels, _CASES, settings.seed + 2), drawer, settings.similarity)
    save(average.net, folder / NET_FILE, edge=settings.edge, mm=width / settings.edge, info={**info, "validation": table}, overwrite=True)
    _written(folder, rows, frames, info, table, note)
    return load(folder)


@contextmanager
def _claimed(folder: Path, resume: bool, overwrite: bool) -> Iterator[None]:
    """Makes the folder, if a training may lie there; takes it away again where it is seen within that there will be none."""
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"output: {folder} is a file, not a folder; choose another place")
    if resume and overwrite:
        raise OptionError("resume, overwrite: go on with a training, or begin it anew; give one of them")
    there = (folder / CHECKPOINT).exists()
    taken = not resume if there else (folder / NET_FILE).exists()  # a net without its checkpoint cannot be gone on with
    if taken and not overwrite:
        raise OutputError(f"output: {folder} holds a training; {'--resume goes on with it, ' if there else ''}--overwrite begins anew")
    made = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"output: {folder} cannot be made: {error.strerror or error}; choose another place") from error
    try:
        yield
    except BaseException:
        if made:
            with suppress(OSError):
                folder.rmdir()
        raise


def _cleared(folder: Path) -> None:
    """Removes an earlier training, at the last moment: until then an error leaves it as it is."""
    for name in (CHECKPOINT, NET_FILE, KEPT, "log.csv", "curves.png", "evolution.gif", "model-card.md", "training.json"):
        (folder / name).unlink(missing_ok=True)
    shutil.rmtree(folder / "tensorboard", ignore_errors=True)


def _listed(source: Path, output: Path, settings: TrainSettings) -> list[Listed]:
    """The scans, and who is kept for validation; the atlas comes first and is not. A training's own pictures are no scans."""
    found = [one for one in listed(source) if output.resolve() not in one.path.resolve().parents]
    if settings.pairs.startswith(ATLAS):
        atlas = home(settings.pairs.removeprefix(ATLAS)).resolve()
        if not atlas.exists():
            raise OptionError(f"pairs: {atlas} does not exist; give {ATLAS} and the scan that is always fixed")
        files = sorted(path for path in atlas.parent.iterdir() if image_suffix(path))
        first = next((one for one in found if one.path.resolve() == atlas), Listed(atlas, beside(atlas, files), str(atlas)))
        found = [replace(first, held_out=False), *(one for one in found if one.path.resolve() != atlas)]
    return split(found, settings.held_out, settings.seed)


def _width(asked: float | None, extent: float) -> float:
    """mm: the canvas' edge."""
    if asked is not None and not extent / _NARROW <= asked <= extent * _NARROW:
        raise OptionError(f"canvas: {asked:g} mm; the scans are {extent:.4g} mm wide, so give {extent / _NARROW:.3g} to "
                          f"{extent * _NARROW:.3g}, or nothing")
    return asked or canvas_for(extent)


def _precision(settings: TrainSettings, ndim: int) -> str:
    """In what convolutions are computed: on a CPU torch leaves weights' gradients unset where 3D ones of bf16 have 2 voxels an axis (2.13),
    and in the middle of the nets a canvas of 16 has 2."""
    if ndim == 2 or settings.edge > 16 or (settings.device != "cpu" and torch.cuda.is_available()):
        return settings.precision
    if settings.precision == "bf16":
        raise OptionError("precision: bf16 is not right on a CPU for 3D canvases of 16 voxels; give --edge 24, or --precision 32")
    return "32"


def _given(settings: TrainSettings, ndim: int) -> nn.Module | None:
    """The net that is named to begin from."""
    if not settings.weights:
        return None
    given = load(settings.weights)
    net = given.net
    if net.kind != settings.net or given.ndim != ndim:
        raise OptionError(f"weights: {settings.weights} is a {net.kind} net for {given.ndim}D scans; asked for is a {settings.net} net, "
                          f"and the scans are {ndim}D")
    if isinstance(net, KeypointNet):  # points are points, whatever is fitted to them
        net = KeypointNet(net.detector, net.home, settings.model)
    elif given.edge != settings.edge or net.settings["model"] != settings.model:  # type: ignore[index]
        raise OptionError(f"weights: {settings.weights} says {net.settings['model']} maps of canvases of {given.edge} voxels; "  # type: ignore[index]
                          f"give --model {net.settings['model']} --edge {given.edge}")  # type: ignore[index]
    return net.train().requires_grad_(True)


def _net(settings: TrainSettings, ndim: int, first: Scan, drawer: Drawer) -> nn.Module:
    """A new net, whose start depends on the seed alone."""
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


def _info(settings: TrainSettings, net: nn.Module, learning: list[Scan], kept: list[Scan], drawer: Drawer, folder: Path) -> dict[str, Any]:
    return {"name": folder.resolve().name, "net": settings.net, "model": settings.model, "ndim": learning[0].grid.ndim,
            "parameters": sum(p.numel() for p in net.parameters()), "edge": drawer.edge, "mm": drawer.mm / drawer.edge,
            "training": len(learning), "held_out": len(kept), "people": len({scan.listed.person for scan in learning}),
            "steps": settings.steps, "batch": settings.batch, "similarity": settings.similarity,
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
