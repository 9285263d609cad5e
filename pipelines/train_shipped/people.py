"""Makes scans to try a training with: people who do not exist, bent out of the template that nilearn ships.

    python pipelines/train_shipped/people.py brains|slices SCANS [--count 16] [--seed 0]
    regkit train SCANS -o RUN

Each is the stripped ICBM 152 brain at 3 mm, stretched and bent, in a pose and a gamma of its own, or an axial slice of it.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import nilearn.datasets
import torch

import regkit
from regkit.sampling import sample
from regkit.space import Frame
from regkit.space.grid import apply_matrix
from regkit.training.poses import Bends, Poses

MM = 3.0
POSES = Poses(turn=0.2, shift=0.04, scale=0.07, stretch=0.03)  # radians, half edges of the frame, logarithms: as people lie and differ
COARSE, FINE = (0.03, 4), (0.01, 8)  # bends: size in half edges, and how many lie beside each other


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("brains", "slices"))
    parser.add_argument("scans", type=Path)
    parser.add_argument("--count", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    template = regkit.read_image(Path(nilearn.datasets.__file__).parent / "data/mni_icbm152_t1_tal_nlin_sym_09a_converted.nii.gz")
    data, grid = template.data.float() / float(template.data.max()), template.grid.canonical(MM)
    frame, generator = Frame.of(grid), torch.Generator().manual_seed(given.seed)
    points, index = apply_matrix(frame.matrix, grid.points()), template.grid.inverse @ frame.inverse
    given.scans.mkdir(parents=True, exist_ok=True)
    for person in range(given.count):
        pose = POSES.draw(1, 3, generator)
        bends = Bends.draw(1, 3, *COARSE, generator) + Bends.draw(1, 3, *FINE, generator)
        there = bends(apply_matrix(pose, points).float())
        values = sample(data, apply_matrix(index, there.double()).float()).reshape(1, 1, *grid.shape)
        values = values.clamp(0, 1) ** float((0.3 * torch.randn((), generator=generator)).exp())
        if given.what == "slices":
            values, plane = values[..., grid.shape[2] // 2].contiguous(), grid.affine[:, [0, 1, 3]][:, :, [0, 1, 3]]
            made = regkit.Image(values, regkit.Grid(grid.shape[:2], plane))
        else:
            made = regkit.Image(values, grid)
        print(regkit.write_image(made, given.scans / f"person{person:02d}.nii.gz", overwrite=True))


if __name__ == "__main__":
    main()
