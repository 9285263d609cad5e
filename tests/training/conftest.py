"""Small made-up scans of several people: one scene of blobs, changed a little from person to person."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np

SHAPES = {2: (32, 30), 3: (20, 19, 18)}  # voxels of 3 and 5 mm: about 10 cm
_MM = {2: 3.0, 3: 5.0}


def affine(ndim: int) -> np.ndarray:
    """The 4×4 of the scans: RAS, the world's origin in the middle."""
    matrix = np.eye(4)
    matrix[:ndim, :ndim] *= _MM[ndim]
    matrix[:ndim, 3] = [-_MM[ndim] * (n - 1) / 2 for n in SHAPES[ndim]]
    return matrix


def voxels(ndim: int, person: int = 0) -> np.ndarray:
    """Brightness from 0 to about 200; of person 0 the scene as it is, of others under a small affine change."""
    draw = np.random.default_rng(7)
    centres, widths, heights = draw.uniform(-20, 20, (9, ndim)), draw.uniform(5, 9, 9), draw.uniform(40, 120, 9)
    change = np.random.default_rng(100 + person)
    linear, shift = np.eye(ndim) + change.normal(0, 0.05, (ndim, ndim)) * bool(person), change.normal(0, 2, ndim) * bool(person)
    index = np.stack(np.meshgrid(*[np.arange(n) for n in SHAPES[ndim]], indexing="ij"), -1)
    points = (index @ affine(ndim)[:ndim, :ndim].T + affine(ndim)[:ndim, 3]) @ linear.T + shift
    return sum(height * np.exp(-((points - centre) ** 2).sum(-1) / (2 * width**2))
               for centre, width, height in zip(centres, widths, heights, strict=True))


def write_scan(path: Path, ndim: int, person: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.Nifti1Image(voxels(ndim, person).astype(np.float32), affine(ndim)).to_filename(path)
    return path


def write_labels(path: Path, ndim: int, person: int = 0) -> Path:
    """1 where it is rather bright, 2 where it is bright."""
    data = voxels(ndim, person)
    nib.Nifti1Image((data > 40).astype(np.uint8) + (data > 90), affine(ndim)).to_filename(path)
    return path


def write_people(folder: Path, ndim: int, count: int = 4, labels: bool = False) -> Path:
    """A folder of scans p0, p1, … of as many people, with label maps beside them or without."""
    for person in range(count):
        write_scan(folder / f"p{person}.nii.gz", ndim, person)
        if labels:
            write_labels(folder / f"p{person}_seg.nii.gz", ndim, person)
    return folder
