"""`align()`: two scans in, a Registration out. The command line calls this and nothing else."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from regkit.errors import OptionError, OverlapError, RegkitError
from regkit.image import Image
from regkit.io import read_image, read_transform, sha256
from regkit.io.doctor import examine, rank
from regkit.io.findings import Finding, of_mask
from regkit.registration.bend import bend
from regkit.registration.guard import look, overlap
from regkit.registration.machine import machine, versions
from regkit.registration.memory import budgeted
from regkit.registration.nets import SHIPPED, Trained
from regkit.registration.pair import Pair, make_pair
from regkit.registration.predict import chosen, said
from regkit.registration.pyramid import build, choose_levels
from regkit.registration.result import Registration
from regkit.registration.settings import NET, START_NAMES, Settings
from regkit.registration.start import Candidate
from regkit.registration.steps import Outcome, Scene, score
from regkit.registration.walk import walk
from regkit.similarity import SIMILARITIES
from regkit.space import MODELS, Frame, Matrix, Transform, model
from regkit.space.transform import compose, linearised

CURVED = ("projective", "tps")  # models that begin where the affine map ends


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
        given, notes = _given(pair, settings)
        nets = chosen(settings.start, settings.model, pair.ndim)
        asked = settings.level_list()
        levels = choose_levels(pair) if asked is None else asked
        canvases = build(pair, levels or _bare(pair, nets), literal=settings.similarity == "mse",
                         run=run, most=None if budget is None else budget.most)
        frame = Frame.of(pair.fixed.grid)
        scene = Scene(canvases, frame, MODELS["affine" if settings.model in CURVED else settings.model], settings.seed, run)
        built = time.perf_counter()
        start = settings.start if settings.start in START_NAMES else "given"
        known = [Candidate(_in_frame(given, frame)[0], "given", True)] if given is not None else said(nets, scene)
        asked_nets = time.perf_counter()
        outcome = walk(scene, settings.similarity, start, known, bool(levels), tell)
        transform = _finish(outcome, scene)
        eye = _in_frame(Matrix.identity(pair.ndim).to(device), frame)
        outcome.scores["header"] = score(scene, min(1, len(canvases) - 1), tuple(outcome.similarity.split("+")), eye)
        bent = _bend(scene, outcome, settings, bool(levels), tell) if settings.model in CURVED else None
        transform = transform if bent is None else compose(transform, bent)
        findings = look(pair, transform, outcome.scores)
    tell("done", 1.0)
    seconds = {"read": read - began, "pyramid": built - read, **({"net": asked_nets - built} if nets else {}), **outcome.seconds,
               "total": time.perf_counter() - began}
    trace = {
        "versions": versions(), "machine": machine(device),
        "inputs": {name: _describe(name, source, scans) for name, source in given_scans.items()} | _begins(settings, nets),
        "nets": {net.name: sha256(net.file) for net in nets if net.file and net.file.parent == SHIPPED},
        "seed": settings.seed, "model": settings.model, "device": str(device), "threads": settings.threads or torch.get_num_threads(),
        "levels_mm": [round(c[0].mm, 5) for c in canvases] if levels else [],
        "chosen": {"similarity": outcome.similarity, "why": outcome.why},
        "similarity": {"before": findings["similarity_header"], "after": findings["similarity_end"]},
        "guard": findings, "candidates": outcome.candidates,
        "notes": [*(budget.notes if budget else ()), *pair.notes, *notes, *outcome.notes],
        "memory": None if budget is None else budget.as_dict(),
        "seconds": {name: round(value, 4) for name, value in seconds.items()},
    }
    return Registration(scans["fixed"], scans["moving"], transform.to("cpu"), settings, trace)


# the fields of Settings as keywords, so that help() and editors show them; defined there only
align.__signature__ = inspect.signature(align).replace(parameters=[  # type: ignore[attr-defined]
    *(p for p in inspect.signature(align).parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD),
    *(inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, default=f.default, annotation=f.type) for f in fields(Settings))])


def _given(pair: Pair, settings: Settings) -> tuple[Matrix | None, list[str]]:
    """The start read from a file, as a member of the model."""
    if settings.start in START_NAMES or settings.start.startswith(NET):
        if settings.start == "header" and overlap(pair, Matrix.identity(pair.ndim)) == 0:
            raise OverlapError("start: the scans do not overlap where their headers put them; use --start auto or centre")
        return None, []
    given = read_transform(settings.start, ndim=pair.ndim)
    if overlap(pair, given) == 0:
        raise OverlapError(f"start: {settings.start} carries the scans apart, they do not overlap; check that it belongs to this pair")
    kind = "affine" if settings.model in CURVED else settings.model
    centre, corners = pair.fixed.grid.centre.cpu(), pair.fixed.grid.corners().cpu()
    member = MODELS[kind].project(given.matrix if isinstance(given, Matrix) else _touching(given, centre), centre)
    away = float((Matrix(member)(corners) - given(corners)).norm(dim=-1).max())
    if away < 1e-4:
        return Matrix(member).to(pair.fixed.grid.device), []
    return Matrix(member).to(pair.fixed.grid.device), [f"start: {settings.start} is no {kind} map; the nearest one was taken "
                                                       f"(corners of the scan shift by up to {away:.3g} mm)"]


def _bare(pair: Pair, nets: list[Trained]) -> tuple[float, ...]:
    """The level on which starts are compared where nothing is refined: the coarsest, or what a net is to see."""
    return (min(choose_levels(pair)[0], *(net.millimetres(pair.fixed.grid) for net in nets)),) if nets else choose_levels(pair)[:1]


def _touching(transform: Transform, centre: torch.Tensor) -> torch.Tensor:
    """The affine map (1, D+1, D+1) that touches a curved one at a point (1, D)."""
    linear = linearised(transform, centre, 1.0)
    matrix = torch.eye(centre.shape[-1] + 1, dtype=linear.dtype)[None].clone()
    matrix[:, :-1, :-1], matrix[0, :-1, -1] = linear, transform(centre[None])[0, 0] - linear[0] @ centre[0]
    return matrix


def _bend(scene: Scene, outcome: Outcome, settings: Settings, refined: bool, tell: Callable[[str, float], None]) -> Transform | None:
    """What bends the affine map, acting before it; None where nothing is to be refined."""
    if not refined:
        outcome.notes.append(f"nothing was refined, so the map is affine and not {settings.model}")
        return None
    began = time.perf_counter()
    tell("bend", 0.95)
    names = tuple(name for name in outcome.similarity.split("+") if SIMILARITIES[name].residual in ("correlation", "difference"))
    if not names:
        outcome.notes.append(f"the map was bent under mind, which least squares can follow; {outcome.similarity} led to the affine map")
    kind = model("tps", control=settings.control, stiffness=settings.stiffness) if settings.model == "tps" else MODELS[settings.model]
    found, values = bend(scene, names or ("mind",), outcome.map, kind)
    outcome.scores |= {"affine": values[-2], "bent": values[-1]}
    outcome.seconds["bend"] = time.perf_counter() - began
    return found


def _in_frame(transform: Matrix, frame: Frame) -> torch.Tensor:
    return frame.matrix @ transform.matrix @ frame.inverse


def _finish(outcome: Outcome, scene: Scene) -> Matrix:
    """The map in the world; rounding collected over many composed steps is taken out of rigid and similar ones."""
    world = scene.frame.world(outcome.map)
    if scene.model.name != "affine":
        world = scene.model.project(world, scene.frame.centre)
    d = scene.frame.centre.shape[-1]
    return Matrix(torch.cat([world[:, :d], torch.eye(d + 1, dtype=world.dtype, device=world.device)[None, d:]], 1))


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


def _begins(settings: Settings, nets: list[Trained]) -> dict[str, Any]:
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
