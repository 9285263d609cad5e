"""A cohort from a table to a page: align all pairs rigidly and affinely, compare the two, and write tables and report.

    python pipelines/evaluate_cohort/run.py -o OUT [PAIRS] [--only GROUP_OR_ID,...] [--jobs N]

Without PAIRS a small cohort is made from the MNI152 template that nilearn ships: turned, scaled and sheared copies with brighter
and noisier intensities, its tissue maps as labels, and points whose true places are known.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
from pathlib import Path

import torch

import regkit

TEMPLATE = "datasets/data/mni_icbm152_{}_tal_nlin_sym_09a_converted.nii.gz"
COPIES = 4


def shipped(kind: str) -> Path:
    found = importlib.util.find_spec("nilearn")
    if found is None or found.origin is None:
        raise SystemExit("give a table of pairs, or install nilearn, whose template stands in: pip install -e '.[demo]'")
    return Path(found.origin).parent / TEMPLATE.format(kind)


def small(image: regkit.Image, mm: float = 3.0) -> regkit.Image:
    """The scan on a coarser grid: a cohort that is done in a minute."""
    grid = image.grid.canonical(mm)
    return regkit.apply(image, regkit.Matrix.identity(3), like=regkit.Image(torch.zeros(1, 1, *grid.shape), grid), interpolation="linear")


def known_map(seed: int, centre: torch.Tensor) -> regkit.Matrix:
    """A random affine map about a point: up to 40° and 25 mm, scaled and sheared by up to a tenth."""
    draw = torch.Generator().manual_seed(seed)
    random = 2 * torch.rand(4, 3, generator=draw, dtype=torch.float64) - 1
    x, y, z = (0.7 * random[0]).tolist()
    turn = torch.linalg.matrix_exp(torch.tensor([[0, -z, y], [z, 0, -x], [-y, x, 0]], dtype=torch.float64))
    stretch = torch.eye(3, dtype=torch.float64) + 0.1 * torch.diag(random[1]) + 0.05 * torch.triu(random[2].repeat(3, 1), 1)
    linear = torch.eye(4, dtype=torch.float64)
    linear[:3, :3] = turn @ stretch
    return regkit.Matrix.shift(centre + 25 * random[3:4]) @ regkit.Matrix(linear) @ regkit.Matrix.shift(-centre)


def make(folder: Path) -> Path:
    """A cohort of copies with known truth → its pairs.json."""
    folder.mkdir(parents=True, exist_ok=True)
    scan = small(regkit.read_image(shipped("t1")))
    grey, white = (small(regkit.read_image(shipped(kind))).data.float() for kind in ("gm", "wm"))
    labels = scan.with_data(((grey > grey.max() / 2) + 2 * ((white > white.max() / 2) & (grey <= grey.max() / 2))).to(torch.uint8))
    inside = labels.data[0, 0].nonzero()
    chosen = inside[torch.randperm(len(inside), generator=torch.Generator().manual_seed(0))[:40]].double()
    points = regkit.Points(scan.grid.to_world(chosen[None])[0])
    regkit.write_image(scan, folder / "fixed.nii.gz", overwrite=True)
    regkit.write_image(labels, folder / "fixed_labels.nii.gz", overwrite=True)
    regkit.write_points(points, folder / "fixed_points.csv", overwrite=True)
    pairs = []
    for seed in range(COPIES):
        truth, draw = known_map(seed, scan.grid.centre), torch.Generator().manual_seed(seed)
        moving = regkit.apply(scan, truth.inverse(), like=scan, interpolation="cubic")
        voxels = moving.data.float().clamp_min(0) / moving.data.max()
        voxels = voxels ** (0.7 + 0.2 * seed) + 0.03 * torch.randn(voxels.shape, generator=draw)
        regkit.write_image(moving.with_data(1000 * voxels), folder / f"moving{seed}.nii.gz", overwrite=True)
        carried = regkit.apply(labels, truth.inverse(), like=scan, interpolation="nearest")
        regkit.write_image(carried, folder / f"moving{seed}_labels.nii.gz", overwrite=True)
        regkit.write_points(points.with_world(truth(points.world[None])[0]), folder / f"moving{seed}_points.csv", overwrite=True)
        pairs.append({"id": f"copy-{seed}", "group": "copies", "fixed": "fixed.nii.gz", "moving": f"moving{seed}.nii.gz",
                      **{f"{side}_{kind}": f"{name}_{kind}.{suffix}" for side, name in (("fixed", "fixed"), ("moving", f"moving{seed}"))
                         for kind, suffix in (("labels", "nii.gz"), ("points", "csv"))}})
    (folder / "pairs.json").write_text(json.dumps(pairs, indent=1), encoding="utf-8")
    return folder / "pairs.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pairs", type=Path, nargs="?", help="a table of pairs, see data/README.md")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--only", help="ids or groups, with commas between them")
    parser.add_argument("--jobs", type=int)
    given = parser.parse_args()
    from regkit.evaluation import read_cases

    cases = read_cases(given.pairs or make(given.output / "scans"))
    wanted = set(given.only.split(",")) if given.only else None
    cases = [case for case in cases if wanted is None or {case.id, case.group} & wanted]
    found = regkit.evaluate(cases, {"rigid": regkit.Settings(model="rigid"), "affine": regkit.Settings()}, baseline="rigid",
                            output=given.output / "evaluation", jobs=given.jobs, title="Rigid and affine",
                            progress=lambda done, total, name: print(f"{done}/{total} {name}", flush=True))
    page = found.report(given.output / "evaluation" / "report.html", overwrite=True)
    print(found.markdown())
    print(page)


if __name__ == "__main__":
    main()
