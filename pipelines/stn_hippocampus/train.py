"""One job: a net trained on some people, measured on the others."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import scans as sc
import torch
import torch.nn.functional as F
from nets import NETS, PACE, Net
from torch import Tensor

import regkit
from regkit.evaluation.overlap import dice
from regkit.space.models import nearest_rotation

RATE, BATCH = 1e-2, 4
GROWING = 0.6  # share of the steps over which the range of poses grows from 0
BALL = 17.0  # mm


@dataclass(frozen=True)
class Job:
    """What is trained: `study` is the question it belongs to, `net` one of NETS, `fold` whom it is tested on.

    growing: whether the range of poses grows from 0 during training. known: whether the pose, which training knows, is taught as well.
    ball: whether what lies beyond a ball is hidden."""

    study: str
    net: str
    degrees: int
    fold: int
    seed: int
    steps: int
    growing: bool = True
    known: bool = False
    ball: bool = False

    @property
    def way(self) -> str:
        """The net and how it was trained, in words."""
        return self.net + ("" if self.growing else ", all poses at once") + (", pose taught" if self.known else "")

    @property
    def name(self) -> str:
        return f"{self.study}/{self.way.replace(', ', '-').replace(' ', '_')}-{self.degrees}-fold{self.fold}-seed{self.seed}"


def full(logits: Tensor) -> Tensor:
    """Logits of background and both parts (N, 3, *S)."""
    return torch.cat([torch.zeros_like(logits[:, :1]), logits], 1)


def loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy and soft Dice of the parts."""
    logits = full(logits)
    share, truth = logits.softmax(1), F.one_hot(labels, 3).movedim(-1, 1)
    both, either = ((x[:, 1:]).sum((2, 3, 4)) for x in (share * truth, share + truth))
    return F.cross_entropy(logits, labels) + 1 - ((2 * both + 1) / (either + 1)).mean()


def taught(pose: regkit.Matrix, transform: regkit.Matrix) -> Tensor:
    """How far the pose that was found is from that of the crop: mean distance of six points, in 20 mm."""
    points = torch.cat([torch.eye(3), -torch.eye(3)]).double()[None] * 20
    return ((pose @ transform)(points) - points).square().sum(-1).add(1).sqrt().mean() / 20


def start(job: Job, voxels: int) -> Net:
    torch.manual_seed(job.seed)
    return NETS[job.net](voxels).to(memory_format=torch.channels_last_3d)


def train(job: Job, scans: sc.Scans, people: list[int], voxels: int) -> tuple[Net, float]:
    """→ the net, and the seconds of processor time its training took."""
    net, grid, which = start(job, voxels), sc.cube(voxels), torch.tensor(scans.of(people))
    draw = torch.Generator().manual_seed(100 + job.seed)  # the same batches for all nets
    said = [] if net.layer is None else list(net.layer.parameters())
    groups = [{"params": list(net.segmenter.parameters())}, *([{"params": said}] if said else [])]
    optimiser = torch.optim.AdamW(groups, lr=RATE, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, [RATE, RATE * PACE[job.net]][:len(groups)], job.steps, pct_start=0.15)
    begun = time.process_time()
    for step in range(job.steps):
        reach = min(1.0, step / (GROWING * job.steps)) if job.growing else 1.0
        chosen = which[torch.randint(len(which), (BATCH,), generator=draw)]
        pose = sc.poses(BATCH, job.degrees * reach, draw)
        scan, labels = sc.turned(scans, chosen, pose, grid)
        logits, transform = net(scan, grid)
        wrong = loss(logits, labels)
        if job.known and transform is not None:
            wrong = wrong + taught(pose, transform)
        optimiser.zero_grad()
        wrong.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimiser.step()
        schedule.step()
    return net.eval(), time.process_time() - begun


def shown_in(index: int, degrees: float, count: int) -> regkit.Matrix:
    """The poses in which a scan is tested: the same for all nets."""
    return sc.poses(count, degrees, torch.Generator().manual_seed(1000 + index))


def measure(job: Job, net: Net, scans: sc.Scans, people: list[int], voxels: int, count: int) -> dict[str, Any]:
    """Dice of both parts of each scan in each of `count` poses, and degrees by which the poses brought to the segmenter differ from
    their mean."""
    grid, scores, maps = sc.cube(voxels), {}, []
    for index in scans.of(people):
        pose = shown_in(index, job.degrees, count)
        scan, labels = sc.turned(scans, torch.full((count,), index), pose, grid)
        with torch.no_grad():
            logits, transform = net(scan, grid)
        found = full(logits).argmax(1)
        each = [dice(fixed, moved) for fixed, moved in zip(labels, found, strict=True)]
        scores[scans.names[index]] = {"person": scans.people[index], "dice": [[one.get(k) for k in (1, 2)] for one in each]}
        maps.append((pose if transform is None else pose @ transform).matrix[:, :3, :3])
    turns = nearest_rotation(torch.cat(maps))
    mean = nearest_rotation(turns.mean(0, keepdim=True))
    cosine = ((turns @ mean.mT).diagonal(dim1=1, dim2=2).sum(1) - 1) / 2
    return {"scans": scores, "degrees_left": torch.rad2deg(cosine.clamp(-1, 1).acos()).tolist()}


def run(job: Job, scans: sc.Scans, voxels: int, count: int) -> tuple[Net, dict[str, Any]]:
    """Train on all folds but the job's, test on that."""
    scans = sc.within(scans, BALL) if job.ball else scans
    dealt = sc.folds(scans.people)
    net, seconds = train(job, scans, [one for fold, people in enumerate(dealt) if fold != job.fold for one in people], voxels)
    found = measure(job, net, scans, dealt[job.fold], voxels, count)
    return net, {**found, "seconds": seconds, "parameters": sum(p.numel() for p in net.parameters())}
