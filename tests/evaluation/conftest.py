"""A small cohort with known truth: blobs in 2D and 3D, moved by a known shift, with labels and landmarks."""

import json

import numpy as np
import pytest
import torch

import regkit
from regkit import Grid, Image, Matrix
from regkit.io import Points

SHIFT = (6.0, -4.0, 3.0)


def scan(ndim: int, shift=(0.0, 0.0, 0.0)):
    """Image and labels of three blobs, the world moved by `shift` mm; voxels of 2 mm (2 × 2 × 3)."""
    shape, spacing = (36, 32, 14)[:ndim], np.array([2.0, 2.0, 3.0])[:ndim]
    grid = Grid(shape, torch.diag(torch.tensor([*spacing, 1.0], dtype=torch.float64))[None])
    x = grid.points()[0].numpy().reshape(*shape, ndim) - np.array(shift[:ndim])
    voxels, labels = np.zeros(shape), np.zeros(shape, np.int16)
    for label, (centre, radii, value) in enumerate([((20, 30, 20), (9, 12, 8), 1.0), ((44, 22, 18), (12, 8, 9), 0.6),
                                                    ((40, 46, 22), (7, 7, 6), 1.4)], 1):
        distance = (((x - np.array(centre[:ndim])) / np.array(radii[:ndim])) ** 2).sum(-1)
        voxels += value / (1 + np.exp(4 * (distance - 1)))
        labels[distance <= 1] = label
    return Image(torch.tensor(voxels, dtype=torch.float32)[None, None], grid), Image(torch.tensor(labels)[None, None], grid)


@pytest.fixture
def cohort(tmp_path):
    """pairs.json of a 2D and a 3D pair with labels and landmarks → (path, {id: T})."""
    pairs, truth = [], {}
    for ndim in (2, 3):
        home = np.array([[20, 30, 20], [44, 22, 18], [40, 46, 22], [30, 34, 15]], float)[:, :ndim]
        name = f"blobs-{ndim}d"
        for side, shift in (("fixed", np.zeros(3)), ("moving", np.array(SHIFT))):
            image, labels = scan(ndim, shift)
            regkit.write_image(image, tmp_path / f"{name}-{side}.nii.gz")
            regkit.write_image(labels, tmp_path / f"{name}-{side}-labels.nii.gz")
            points = Points(torch.tensor(home + shift[:ndim]), ("name",), tuple((f"p{k}",) for k in range(4)))
            regkit.write_points(points, tmp_path / f"{name}-{side}.csv")
        pairs.append({"id": name, "group": f"{ndim}D", "ndim": ndim, "fixed": f"{name}-fixed.nii.gz", "moving": f"{name}-moving.nii.gz",
                      "fixed_labels": f"{name}-fixed-labels.nii.gz", "moving_labels": f"{name}-moving-labels.nii.gz",
                      "fixed_points": f"{name}-fixed.csv", "moving_points": f"{name}-moving.csv"})
        truth[name] = Matrix.shift(torch.tensor([SHIFT[:ndim]], dtype=torch.float64))
    path = tmp_path / "pairs.json"
    path.write_text(json.dumps(pairs))
    return path, truth
