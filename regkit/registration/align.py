"""`align()`: two scans in, a Registration out. The command line calls this and nothing else."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from regkit.errors import OptionError, RegkitError
from regkit.image import Image
from regkit.io import read_image, sha256
from regkit.io.doctor import examine, rank
from regkit.io.findings import Finding, of_mask
from regkit.registration.attempt import Ground
from regkit.registration.ladder import climb
from regkit.registration.machine import machine, versions
from regkit.registration.memory import budgeted
from regkit.registration.nets import SHIPPED, Trained
from regkit.registration.pair import make_pair
from regkit.registration.result import Registration
from regkit.registration.settings import NET, START_NAMES, Settings


def align(fixed: Any, moving: Any, *, fixed_mask: Any = None, moving_mask: Any = None, settings: Settings | None = None,
          progress: Callable[[str, float], None] | None = None, **options: Any) -> Registration:
    """Align `moving` to `fixed`.

    fixed, moving and their masks: a path, a nibabel or SimpleITK image, a `regkit.Image`, or (array, affine) with the array
    in nibabel's axis order and the affine index → RAS+ mm. A mask counts where it is not zero, by world position.
    options: the fields of `regkit.Settings`: model, similarity, start, levels, interpolation, fill, volume, seed, threads,
    device, max_memory; or one ready `settings`. progress: called with (stage, share done).

    → Registration: `.transform` maps fixed to moving points (RAS+ mm), `.moved` is the moving scan on the fixed grid.

    Raises OptionError (an option is not understood, or memory will not do), FormatError (a scan is unreadable, empty or constant),
    GeometryError (2D against 3D, a broken affine), OverlapError (nothing in common where asked to begin).
    """
    if settings is not None and options:
        raise OptionError(f"settings: given together with {', '.join(options)}; give one or the other")
    settings = Settings.of(**options) if settings is None else settings
    tell = progress or (lambda stage, share: None)
    began = time.perf_counter()
    tell("reading", 0.0)
    given_scans = {name: source for name, source in
                   {"fixed": fixed, "moving": moving, "fixed_mask": fixed_mask, "moving_mask": moving_mask}.items() if source is not None}
    budget = budgeted(given_scans, settings)
    with ThreadPoolExecutor(2) as pool:  # most of it is decompression, which lets other threads work
        images = pool.map(lambda item: read_image(item[1], volume=settings.volume, name=item[0]), given_scans.items())
        scans = dict(zip(given_scans, images, strict=True))
    read = time.perf_counter()
    device = _device(settings.device)
    with _threads(settings.threads, device) as run, torch.inference_mode(False), torch.no_grad():
        pair = make_pair(*(scans[name].to(device) for name in ("fixed", "moving")),
                         *(scans[name].to(device) if name in scans else None for name in ("fixed_mask", "moving_mask")),
                         run=run)
        tell("pyramid", 0.05)
        ready = time.perf_counter()
        found, tried = climb(Ground(pair, settings, run, None if budget is None else budget.most), settings, tell)
    tell("done", 1.0)
    outcome = found.outcome
    seconds = {"read": read - began, "check": ready - read, **outcome.seconds, "total": time.perf_counter() - began}
    trace = {
        "versions": versions(), "machine": machine(device),
        "inputs": {name: _describe(name, source, scans) for name, source in given_scans.items()} | _begins(settings, found.nets),
        "nets": {net.name: sha256(net.file) for net in found.nets if net.file and net.file.parent == SHIPPED},
        "seed": settings.seed, "model": settings.model, "device": str(device), "threads": settings.threads or torch.get_num_threads(),
        "levels_mm": list(found.levels), "chosen": {"similarity": outcome.similarity, "why": outcome.why},
        "similarity": {"before": found.guard["similarity_header"], "after": found.guard["similarity_end"]},
        "verdict": found.verdict.as_dict(), "evidence": found.evidence, "guard": found.guard, "attempts": tried,
        "candidates": outcome.candidates, "notes": [*(budget.notes if budget else ()), *pair.notes, *outcome.notes],
        "memory": None if budget is None else budget.as_dict(),
        "seconds": {name: round(value, 4) for name, value in seconds.items()},
    }
    return Registration(scans["fixed"], scans["moving"], found.transform.to("cpu"), settings, trace)


# the fields of Settings as keywords, so that help() and editors show them; defined there only
align.__signature__ = inspect.signature(align).replace(parameters=[  # type: ignore[attr-defined]
    *(p for p in inspect.signature(align).parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD),
    *(inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, default=f.default, annotation=f.type) for f in fields(Settings))])


def _describe(name: str, source: Any, scans: dict[str, Image]) -> dict[str, Any]:
    image = scans[name]
    where = image.source if not isinstance(source, (str, Path)) else str(source)
    found = _examine(name, where, scans) if isinstance(source, (str, Path)) else []
    return {"path": where, "sha256": sha256(where) if where else None, "shape": list(image.grid.shape),
            "spacing_mm": [round(v, 6) for v in image.grid.spacing[0].tolist()], "orientation": image.grid.orientation,
            "findings": [one.as_dict() for one in found]}


def _examine(name: str, path: str | None, scans: dict[str, Image]) -> list[Finding]:
    """What the header doctor says of a file that was read, and of a mask's grid."""
    if path is None:
        return []
    image, found = scans[name], []
    with suppress(RegkitError):  # it was read, so that a header the doctor cannot make out is no reason to stop
        found = examine(path, name=name, grid=image.grid)
    scan = scans[name.removesuffix("_mask")]
    return sorted(found + (of_mask(image.grid, scan.grid) if scan is not image else []), key=rank)


def _begins(settings: Settings, nets: Sequence[Trained]) -> dict[str, Any]:
    """The file that says where to begin, if there is one: a transform, or a net that is not shipped."""
    name = settings.start.removeprefix(NET)
    if settings.start.startswith(NET):
        file = nets[0].file
        return {"start": {"path": name, "sha256": sha256(file)}} if file and file.parent != SHIPPED else {}
    return {} if name in START_NAMES else {"start": {"path": name, "sha256": sha256(name)}}


def _device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise OptionError("device: cuda is asked for and torch finds none; use --device cpu, or install a torch built for CUDA")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


@contextmanager
def _threads(count: int | None, device: torch.device) -> Iterator[Callable]:
    """A `map` for independent jobs, on `count` threads.

    The walk is thousands of small tensor operations. Shared out one by one, as torch does, every one ends in a wait for all
    threads, and on a machine that is busy with other work each wait costs a time slice (measured: 4 s become 85 s). So each
    operation runs on one thread, and whole jobs are shared out."""
    before = torch.get_num_threads()
    count = count or before
    torch.set_num_threads(1)
    try:
        if count == 1 or device.type != "cpu":
            yield map
        else:
            with ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(1,)) as pool:
                yield pool.map
    finally:
        torch.set_num_threads(before)
