"""The loop: batches in, a trained net out. Nothing of it knows what is learnt.

A batch is made from its number alone, the optimiser's state is kept, and nothing else is random: a run that was broken off goes on with
the very numbers of one that was not. Several processes (`torchrun`) each take their share of every batch.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from regkit.errors import CheckpointError, OptionError, RegkitError, choose
from regkit.io.weights import write_tensors
from regkit.training.checkpoint import Learner

CHECKPOINT = "checkpoint.safetensors"
Batch = dict[str, Tensor]
Row = dict[str, float]


class TrainingError(RegkitError):
    """A training cannot go on."""


@dataclass(frozen=True)
class Plan:
    """How long and how a net is trained.

    Raises OptionError for numbers that make no sense and names that are not known."""

    steps: int = 3000
    batch: int = 4
    """Items of a step, over all processes."""
    rate: float = 1e-3
    """Learning rate of Adam after the warm-up."""
    warm_up: int = 100
    """Steps in which the rate rises."""
    decay: str = "cosine"
    """How the rate goes on: cosine, to nothing at the last step, or constant, for runs that may be made longer."""
    clip: float = 1.0
    """Longest gradient; longer ones are shortened to it."""
    seed: int = 0
    precision: str = "32"
    """32, bf16 or auto: what convolutions are computed in; auto is bf16 where the device multiplies it by itself."""
    device: str = "auto"
    workers: int = 0
    """Processes that make batches ahead."""
    log_every: int = 20
    save_every: float = 60.0
    """Seconds."""
    look_every: int = 500
    """Steps from one validation to the next."""

    def __post_init__(self) -> None:
        choose("decay", self.decay, ("cosine", "constant"))
        choose("precision", self.precision, ("32", "bf16", "auto"))
        choose("device", self.device, ("auto", "cpu", "cuda"))
        for name in ("steps", "batch", "log_every", "look_every"):
            if getattr(self, name) < 1:
                raise OptionError(f"{name}: {getattr(self, name)}; expected 1 or more")
        if not 0 < self.rate < math.inf:
            raise OptionError(f"rate: {self.rate}; expected a number above 0")

    def rate_at(self, step: int) -> float:
        warm = min(1.0, (step + 1) / max(1, self.warm_up))
        if self.decay == "constant":
            return self.rate * warm
        return self.rate * warm * 0.5 * (1 + math.cos(math.pi * min(1.0, step / self.steps)))


class _Batches(Dataset):
    """Step → this process' share of its batch."""

    def __init__(self, make: Callable[[int, range], Batch], share: range) -> None:
        self.make, self.share = make, share

    def __getitem__(self, step: int) -> Batch:
        torch.set_num_threads(1) if torch.utils.data.get_worker_info() else None
        return self.make(step, self.share)

    def __getitems__(self, steps: list[int]) -> list[Batch]:
        return [self[step] for step in steps]


def item_generator(seed: int, step: int, item: int) -> torch.Generator:
    """What one item of one batch is drawn from, whichever process makes it."""
    return torch.Generator().manual_seed((seed * 1_000_003 + step) * 4_099 + item)


def fit(net: nn.Module, make: Callable[[int, range], Batch], loss: Callable[[nn.Module, Batch], Mapping[str, Tensor]], plan: Plan,
        folder: Path, *, settings: dict[str, Any], resume: bool = False, look: Callable[[nn.Module, int], Row] | None = None,
        tell: Callable[[Row], None] = lambda row: None) -> nn.Module:
    """Trains `net`, or goes on with it.

    make: (step, items) → those items of the step's batch. loss: (net, batch) → terms by name, means over the items, of which `loss` is
    what is made small. folder: holds the checkpoint. settings: what JSON can hold and must not change from one run to the next.
    look: validates the averaged net at a step. tell: is given every row of the log. → the averaged net.

    Raises TrainingError where the loss or its gradient is not a number (the batch is saved beside the checkpoint), CheckpointError and
    OptionError where `folder` holds another run."""
    fabric = _fabric(plan)
    if plan.batch % fabric.world_size:
        raise OptionError(f"batch: {plan.batch} cannot be shared out to {fabric.world_size} processes; give a multiple")
    learner, log, spent = Learner.of(net.to(fabric.device), plan.rate), [], 0.0
    path = folder / CHECKPOINT
    if resume and path.exists():
        state = learner.load(path)
        if not isinstance(state.get("settings"), dict) or not isinstance(state.get("log"), list):
            raise CheckpointError(f"{path}: is no checkpoint of a training; remove it, or give another output")
        if state["settings"] != settings:
            changed = sorted(key for key in {*state["settings"], *settings} if state["settings"].get(key) != settings.get(key))
            raise OptionError(f"resume: {path} was begun with other settings ({', '.join(changed)}); take those, or another output")
        log, spent = state["log"], state.get("seconds", 0.0)
    share = plan.batch // fabric.world_size
    items = range(fabric.global_rank * share, (fabric.global_rank + 1) * share)
    wrapped, optimiser = fabric.setup(learner.net, learner.optimiser)
    terms, saved = {}, time.monotonic()
    began = saved - spent
    for batch in _stream(make, items, learner.step, plan):
        batch = fabric.to_device(batch)
        for group in optimiser.param_groups:
            group["lr"] = plan.rate_at(learner.step)
        optimiser.zero_grad(set_to_none=True)
        found = loss(wrapped, batch)
        total = fabric.all_reduce({key: value.detach() for key, value in found.items()}, reduce_op="mean")
        if not math.isfinite(float(total["loss"])):
            _give_up("loss", batch, folder, learner.step, fabric.global_rank)
        fabric.backward(found["loss"])
        length = fabric.clip_gradients(wrapped, optimiser, max_norm=plan.clip, error_if_nonfinite=False)
        if not math.isfinite(float(length)):  # else weights and average, and with them the next checkpoint, would be lost
            _give_up("gradient", batch, folder, learner.step, fabric.global_rank)
        optimiser.step()
        learner.averaged()
        for key, value in total.items():
            terms.setdefault(key, []).append(float(value))
        last = learner.step == plan.steps
        looked = look(learner.average, learner.step) if look and fabric.is_global_zero and (
            last or learner.step % plan.look_every == 0) else {}
        if looked or last or learner.step % plan.log_every == 0:
            row = {"step": learner.step, **{key: sum(values) / len(values) for key, values in terms.items()}, **looked}
            terms = {}
            log.append(row)
            if fabric.is_global_zero:
                tell(row)
        if fabric.is_global_zero and (last or looked or time.monotonic() - saved > plan.save_every) and not terms:
            saved = time.monotonic()
            learner.save(path, {"settings": settings, "log": log, "seconds": saved - began})
    return learner.average


def _stream(make: Callable[[int, range], Batch], items: range, start: int, plan: Plan) -> Iterator[Batch]:
    yield from DataLoader(_Batches(make, items), batch_size=None, sampler=range(start, plan.steps), num_workers=plan.workers,
                          multiprocessing_context="spawn" if plan.workers else None, persistent_workers=plan.workers > 0)


def _fabric(plan: Plan) -> Any:
    """Devices, precision and processes; the environment `torchrun` makes says how many."""
    try:
        from lightning_fabric import Fabric
    except ImportError as error:
        raise OptionError("train: needs lightning-fabric; pip install 'regkit[train]'") from error
    if plan.device == "cuda" and not torch.cuda.is_available():
        raise OptionError("device: cuda is asked for and torch finds none; use --device cpu, or install a torch built for CUDA")
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    nodes = int(os.environ.get("WORLD_SIZE", "1")) // processes
    kind = "cuda" if plan.device != "cpu" and torch.cuda.is_available() else "cpu"
    precision = plan.precision
    if precision == "auto":
        has = torch.cuda.is_bf16_supported() if kind == "cuda" else bool(torch.cpu._is_avx512_bf16_supported())
        precision = "bf16" if has else "32"
    fabric = Fabric(accelerator=kind, devices=processes, num_nodes=nodes, strategy="ddp" if processes * nodes > 1 else "auto",
                    precision={"32": "32-true", "bf16": "bf16-mixed"}[precision])  # type: ignore[arg-type]
    fabric.launch()
    return fabric


def _give_up(what: str, batch: Batch, folder: Path, step: int, rank: int) -> None:
    place = folder / f"bad-batch-{step}-{rank}.safetensors"
    write_tensors(place, batch, {}, overwrite=True)
    raise TrainingError(f"train: the {what} of step {step} is not a number; its batch lies in {place}. Look for odd values in it; "
                        "--resume goes on from the last checkpoint, --overwrite --rate begins anew with a lower rate")
