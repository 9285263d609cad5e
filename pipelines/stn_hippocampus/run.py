"""A small segmenter of the hippocampus' parts in turned scans, with and without a spatial transformer in front of it.

    python pipelines/stn_hippocampus/run.py FOLDER -o OUT [--study main,ways,checks] [--seeds 2] [--quick]

FOLDER holds the Decathlon's crops as NUMBER_t1.nii.gz and NUMBER_seg.nii.gz (1 anterior, 2 posterior). OUT gets results.json, table.md,
dice_against_pose.png and montage.png, and a folder for each study with a record and the weights of each net. What is there is not
trained again.
"""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import asdict
from pathlib import Path

import report
import scans as sc
import torch
from nets import NETS
from safetensors.torch import load_file, save_file
from train import Job, run, start

RANGES = (0, 30, 60, 90, 180)
FAR = (90, 180)  # where the other ways are compared


def jobs(studies: list[str], folds: list[int], seeds: int, steps: int, ranges: tuple[int, ...]) -> list[Job]:
    """main: both nets at every range. ways: other localisations and trainings, far ranges only. checks: at the widest range, twice the
    steps, and scans whose crop does not show how it is turned."""
    far, widest = [d for d in ranges if d in FAR], max(ranges)
    found = []
    for fold in folds:
        for seed in range(seeds):
            found += [Job("main", net, d, fold, seed, steps) for d in ranges for net in ("plain", "keypoints")]
        for d in far:
            found += [Job("ways", net, d, fold, 0, steps, growing=False) for net in NETS]
            found += [Job("ways", "regression", d, fold, 0, steps), Job("ways", "keypoints", d, fold, 0, steps, known=True)]
        for net in ("plain", "keypoints"):
            found += [Job("longer", net, widest, fold, 0, 2 * steps), Job("ball", net, widest, fold, 0, steps, ball=True)]
    wanted = {"main": {"main"}, "ways": {"ways"}, "checks": {"longer", "ball"}}
    return [job for job in found if any(job.study in wanted[study] for study in studies)]


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--study", default="main,ways,checks")
    parser.add_argument("--seeds", type=int, default=2, help="of the main study; the others have one")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--development", action="store_true", help="test on the people kept for choosing settings, and on no others")
    parser.add_argument("--quick", action="store_true", help="a few steps on small cubes: whether it runs")
    given = parser.parse_args()
    given.study = given.study.split(",")
    unknown = set(given.study) - {"main", "ways", "checks"}
    if unknown:
        parser.error(f"--study: {', '.join(sorted(unknown))} not known; use some of main,ways,checks")
    return given


def write(file: Path, text: str) -> None:
    """Whole or not at all: a record that is there counts as done."""
    part = file.with_name(file.name + ".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, file)


def main() -> None:
    given = options()
    torch.set_num_threads(given.threads)
    voxels, count, steps, ranges = (16, 2, 4, (0, 180)) if given.quick else (32, 6, given.steps, RANGES)
    folds, seeds = ([0] if given.development else [1] if given.quick else [1, 2, 3]), 1 if given.quick else given.seeds
    scans = sc.read(given.folder, voxels)
    todo = jobs(given.study, folds, seeds, steps, ranges)
    records = []
    for k, job in enumerate(todo):
        file = given.output / f"{job.name}.json"
        record = json.loads(file.read_text(encoding="utf-8")) if file.exists() else None
        if record is None or record["job"] != asdict(job) or record["voxels"] != voxels:  # trained with other settings
            file.parent.mkdir(parents=True, exist_ok=True)
            net, found = run(job, scans, voxels, count)
            save_file({name: value.contiguous() for name, value in net.state_dict().items()}, file.with_suffix(".safetensors"))
            record = {"job": asdict(job), "way": job.way, "voxels": voxels, **found}
            write(file, json.dumps(record))
            print(f"{k + 1}/{len(todo)} {job.name} Dice {report.mean_dice(record):.3f} {record['seconds']:.0f} s", flush=True)
        records.append(record)
    dealt = sc.folds(scans.people)
    write(given.output / "results.json", json.dumps({"folds": dealt, "records": records}))
    write(given.output / "table.md", report.tables(records, dealt))
    report.curve(records, dealt, given.output / "dice_against_pose.png")
    if "main" in given.study:
        nets = {}
        for name in ("plain", "keypoints"):
            job = Job("main", name, max(ranges), folds[0], 0, steps)
            nets[name] = start(job, voxels)
            nets[name].load_state_dict(load_file(given.output / f"{job.name}.safetensors"))
        report.montage(scans, dealt[folds[0]], nets, max(ranges), voxels, given.output / "montage.png")
    print((given.output / "table.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
