"""One job: all nets on one distortion from one seed, trained on the very same batches.

The learning rate is constant after its warm-up, and what is evaluated is a power-law average of the weights (Karras et al., CVPR 2024),
which is good at any time: a run may be broken off, or go on for more steps than it was once meant for, and gives the same numbers
as one that was never interrupted. Everything lies in one folder:

checkpoint.safetensors: nets, averages, state of the optimisers and what was seen of the evolution; what is no tensor in its header.
log.csv: step, net, training loss. evolution.npz: eight test digits, where a net looks at them and what it sees. errors.json: the result.
"""

from __future__ import annotations

import copy
import csv
import json
import time
from dataclasses import dataclass, field
from pathlib import Path

import distort
import nets
import numpy as np
import torch
from nets import BUDGET, NAMES
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from data import Digits
from regkit.io.output import output_file
from regkit.stn import unit_grid

# Tried on RTS with 1/6 of the training digits held back, 96,000 digits seen, seed 0; errors in % of CNN, ST-FCN and ST-CNN affine:
# Adam, batch 128, 1e-3 and 3e-4: 8.7 8.8 4.3; batch 64: 6.2 6.1 2.9; also 2e-3 and 6e-4: 4.9 4.7 2.6; 3e-3 and 1e-3: 4.8 4.5 2.7.
# SGD with momentum 0.9, batch 64, 0.05, a tenth of it for the localisation (the published gradient scale): 6.0 5.9 4.1.
BATCH = 64
RATE, LOCAL_RATE = 2e-3, 6e-4  # Adam, which divides a gradient scale out again: classifier and localisation have rates of their own
WARM_UP = 100  # steps
AVERAGE = 6.94  # exponent of the average: its width is a tenth of the run
LOG_EVERY = 50  # steps; checkpoints fall on these too
SAVE_EVERY = 60.0  # seconds
WATCHED, WATCHED_DIGITS = "ST-CNN affine", 8
WATCHED_STEPS = sorted({0, *(round(10 ** (k / 13)) for k in range(66))})  # to 100,000
TESTED_STEPS = [1000 * 2**k for k in range(10)]


@dataclass(frozen=True)
class Job:
    """What a folder holds the result of; all but `steps` is fixed once the job has begun."""

    distortion: str
    seed: int
    steps: int
    nets: tuple[str, ...] = NAMES
    digits: str = "mnist"
    held_back: bool = False
    batch: int = BATCH
    budget: int = BUDGET

    @property
    def name(self) -> str:
        return f"{self.distortion}-{self.seed}"

    @property
    def settings(self) -> dict:
        return {key: list(value) if isinstance(value, tuple) else value for key, value in vars(self).items() if key != "steps"}


@dataclass
class Learner:
    """A net while it learns: its average, its optimiser, and the processor seconds it took."""

    net: nn.Module
    average: nn.Module
    optimiser: torch.optim.Optimizer
    seconds: float = 0.0
    total: float = 0.0  # loss since the log's last line

    @staticmethod
    def of(name: str, job: Job) -> Learner:
        net = nets.build(name, distort.SIDES[job.distortion], job.seed, job.budget)
        classifier, localisation = nets.groups(net)
        rates = [{"params": classifier, "lr": RATE, "rate": RATE}, {"params": localisation, "lr": LOCAL_RATE, "rate": LOCAL_RATE}]
        average = copy.deepcopy(net).requires_grad_(False)
        return Learner(net, average, torch.optim.Adam([group for group in rates if group["params"]], fused=True))

    def step(self, number: int, images: Tensor, labels: Tensor) -> None:
        """The step after `number` others."""
        start = time.process_time()
        for group in self.optimiser.param_groups:
            group["lr"] = group["rate"] * min(1.0, (number + 1) / WARM_UP)
        self.optimiser.zero_grad(set_to_none=True)
        loss = nets.loss(self.net, images, labels)
        loss.backward()
        self.optimiser.step()
        # t^γ-weighted mean of all weights so far
        share = 1 - (1 - 1 / (number + 1)) ** (AVERAGE + 1)
        torch._foreach_lerp_(list(self.average.parameters()), [p.detach() for p in self.net.parameters()], share)
        self.total += float(loss.detach())
        self.seconds += time.process_time() - start

    def tensors(self) -> dict[str, Tensor]:
        found = {f"{kind}/{key}": value for kind, net in (("net", self.net), ("average", self.average))
                 for key, value in net.state_dict().items()}
        for index, state in self.optimiser.state_dict()["state"].items():
            found.update({f"optimiser/{index}/{key}": value for key, value in state.items()})
        return found

    def restore(self, tensors: dict[str, Tensor]) -> None:
        for kind, net in (("net", self.net), ("average", self.average)):
            net.load_state_dict({key: tensors[f"{kind}/{key}"] for key in net.state_dict()})
        whole = self.optimiser.state_dict()
        owners = [p for group in self.optimiser.param_groups for p in group["params"]]
        for index, owner in enumerate(owners):
            found = {key.split("/")[2]: value for key, value in tensors.items() if key.startswith(f"optimiser/{index}/")}
            # laid out in memory as the weights are: the fused step walks through both alike
            whole["state"][index] = {key: torch.empty_like(owner).copy_(value) if value.shape == owner.shape else value.clone()
                                     for key, value in found.items()}
        self.optimiser.load_state_dict(whole)


@dataclass
class Run:
    """A job under way."""

    job: Job
    folder: Path
    learners: dict[str, Learner]
    step: int = 0
    log: list[tuple[int, str, float]] = field(default_factory=list)
    curve: list[tuple[int, dict[str, float]]] = field(default_factory=list)  # test errors on the way
    looked: list[int] = field(default_factory=list)  # steps of the evolution
    corners: list[Tensor] = field(default_factory=list)
    crops: list[Tensor] = field(default_factory=list)

    @staticmethod
    def begin(job: Job, folder: Path) -> Run:
        """From the checkpoint where there is one."""
        run = Run(job, folder, {name: Learner.of(name, job) for name in job.nets})
        if (folder / "checkpoint.safetensors").exists():
            run._load()
        return run

    def _load(self) -> None:
        path = self.folder / "checkpoint.safetensors"
        with safe_open(path, "pt") as file:
            state = json.loads(file.metadata()["state"])
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 no mapping
        if state["settings"] != self.job.settings:
            raise SystemExit(f"{path} was begun with {state['settings']}, not {self.job.settings}; name another folder by -o")
        for name, learner in self.learners.items():
            learner.restore({key.partition("/")[2]: value for key, value in tensors.items() if key.startswith(f"{name}/")})
            learner.seconds = state["seconds"][name]
        self.step, self.looked = state["step"], state["looked"]
        self.log = [tuple(row) for row in state["log"]]
        self.curve = [tuple(row) for row in state["curve"]]
        if self.looked:
            self.corners, self.crops = list(tensors["corners"]), list(tensors["crops"])

    def save(self) -> None:
        """Written aside and renamed: there is always one whole checkpoint."""
        tensors = {f"{name}/{key}": value.contiguous() for name, learner in self.learners.items()
                   for key, value in learner.tensors().items()}
        if self.looked:
            tensors |= {"corners": torch.stack(self.corners), "crops": torch.stack(self.crops)}
        state = {"settings": self.job.settings, "step": self.step, "log": self.log, "curve": self.curve, "looked": self.looked,
                 "seconds": {name: learner.seconds for name, learner in self.learners.items()}}
        with output_file(self.folder / "checkpoint.safetensors", overwrite=True) as aside:
            save_file(tensors, aside, {"state": json.dumps(state)})
        with output_file(self.folder / "log.csv", overwrite=True) as aside, open(aside, "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([("step", "net", "loss"), *((s, n, f"{loss:.5f}") for s, n, loss in self.log)])

    def watch(self, images: Tensor) -> None:
        """Where a net looks at some digits, and what it sees there."""
        standing = self.learners[WATCHED].average
        with torch.no_grad():
            seen = standing.transformer(images)
            self.corners.append(attended(standing.transformer, images))
        self.crops.append((seen[:, 0].clamp(0, 1) * 255).round().byte())
        self.looked.append(self.step)


def attended(transformer: nn.Module, images: Tensor) -> Tensor:
    """Corners of the transformer's output in pixels of its images (N, 1, H, W), going round: (N, 4, 2), rows first."""
    moving = unit_grid(images.shape[2:])
    fixed = unit_grid((nets.CROP, nets.CROP), moving)
    low, high = -0.5, nets.CROP - 0.5  # outer edges
    corners = fixed.to_world(torch.tensor([[[low, low], [low, high], [high, high], [high, low]]], dtype=torch.float64))
    return moving.to_index(transformer.transform(images, moving_grid=moving, fixed_grid=fixed)(corners)).float()


def wrong(net: nn.Module, images: Tensor, labels: Tensor) -> list[int]:
    """The numbers of the images the net does not recognise."""
    with torch.no_grad():
        said = torch.cat([net(part).argmax(1) for part in images.split(500)])
    return (said != labels).nonzero()[:, 0].tolist()


def train(job: Job, digits: Digits, folder: Path, say=print) -> dict:
    """Runs the job, or what is left of it, and writes its folder. → what errors.json holds"""
    folder.mkdir(parents=True, exist_ok=True)
    digits = digits.held_back() if job.held_back else digits
    tests, labels = distort.fixed(job.distortion, digits.test_images), digits.test_labels
    run = Run.begin(job, folder)
    saved = logged = time.monotonic()
    begun = run.step

    def errors() -> dict[str, list[int]]:
        return {name: wrong(learner.average, tests, labels) for name, learner in run.learners.items()}

    while True:
        if WATCHED in job.nets and run.step in WATCHED_STEPS and run.step not in run.looked:
            run.watch(tests[:WATCHED_DIGITS])
        if run.step in TESTED_STEPS and run.step not in [step for step, _ in run.curve]:
            run.curve.append((run.step, {name: 100 * len(found) / len(labels) for name, found in errors().items()}))
        if run.step >= job.steps:
            break
        images, truth = distort.batch(job.distortion, digits.images, digits.labels, job.seed, run.step, job.batch)
        for learner in run.learners.values():
            learner.step(run.step, images, truth)
        run.step += 1
        if run.step % LOG_EVERY == 0:
            for name, learner in run.learners.items():
                run.log.append((run.step, name, learner.total / LOG_EVERY))
                learner.total = 0.0
            if time.monotonic() - saved > SAVE_EVERY:
                run.save()
                saved = time.monotonic()
                pace = (saved - logged) / (run.step - begun)
                say(f"{job.name}: step {run.step} of {job.steps}, {(job.steps - run.step) * pace / 60:.0f} min to go", flush=True)
    run.save()
    found = errors()
    result = {**job.settings, "steps": run.step, "images": len(labels), "curve": run.curve, "nets": {
        name: {"error": 100 * len(found[name]) / len(labels), "steps": run.step, "seconds": round(learner.seconds, 1),
               "parameters": nets.parameters(learner.net), "wrong": found[name]} for name, learner in run.learners.items()}}
    if run.looked:
        with output_file(folder / "evolution.npz", overwrite=True) as aside, open(aside, "wb") as file:
            np.savez_compressed(file, steps=run.looked, corners=torch.stack(run.corners), crops=torch.stack(run.crops),
                                images=(tests[:WATCHED_DIGITS, 0] * 255).round().byte(), labels=labels[:WATCHED_DIGITS])
    with output_file(folder / "errors.json", overwrite=True) as aside:
        aside.write_text(json.dumps(result), encoding="utf-8")
    return result
