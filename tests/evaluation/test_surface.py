"""Surface distances against brute force, MONAI and SimpleITK."""

import warnings

import numpy as np
import pytest
import SimpleITK as sitk
from hypothesis import given, settings
from hypothesis import strategies as st

from regkit.errors import OptionError
from regkit.evaluation import hd95, surfaces


@st.composite
def cases(draw):
    d = draw(st.integers(2, 3))
    shape = tuple(draw(st.lists(st.integers(1, 8), min_size=d, max_size=d)))
    spacing = draw(st.lists(st.floats(0.2, 5), min_size=d, max_size=d))
    random = np.random.default_rng(draw(st.integers(0, 2**31)))
    top, empty = draw(st.integers(1, 3)), draw(st.floats(0, 1))
    maps = [np.where(random.random(shape) < empty, 0, random.integers(1, top + 1, shape)) for _ in range(2)]
    return *maps, spacing, draw(st.floats(0, 3))


def _brute(fixed, moved, mm, tolerance):
    """By the definition: a voxel with a face neighbour of another label, or at the array's end, is surface."""

    def edge(mask):
        found = []
        for p in np.argwhere(mask):
            near = [p + way * step for step in np.eye(mask.ndim, dtype=int) for way in (1, -1)]
            if any((q < 0).any() or (q >= mask.shape).any() or not mask[tuple(q)] for q in near):
                found.append(p * mm)
        return np.array(found)

    out = {}
    for label in np.unique(fixed[fixed > 0]):
        a, b = edge(fixed == label), edge(moved == label)
        if len(b) == 0:
            out[int(label)] = (np.linalg.norm(np.array(fixed.shape) * mm), None, 0.0)
            continue
        apart = np.linalg.norm(a[:, None] - b, axis=2)
        there, back = apart.min(1), apart.min(0)
        every = np.concatenate([there, back])
        out[int(label)] = (max(np.percentile(there, 95), np.percentile(back, 95)), every.mean(), np.mean(every <= tolerance + 1e-6))
    return out


@settings(max_examples=200, deadline=None)
@given(cases())
def test_all_equal_brute_force(case):
    fixed, moved, spacing, tolerance = case
    found, known = surfaces(fixed, moved, spacing, tolerance=tolerance), _brute(fixed, moved, np.array(spacing), tolerance)
    assert found.keys() == known.keys()
    for label, (far, mean, near) in known.items():
        assert found[label].hd95 == pytest.approx(far)
        assert found[label].undefined == (mean is None)
        assert found[label].asd == pytest.approx(far if mean is None else mean)
        assert found[label].dice == pytest.approx(near)


def _blobs():
    """Two ellipsoids of two labels, the second map moved and larger."""
    x = np.stack(np.meshgrid(*[np.arange(n) for n in (30, 26, 22)], indexing="ij"), -1)

    def ball(centre, radii):
        return (((x - centre) / radii) ** 2).sum(-1) <= 1

    fixed, moved = np.zeros(x.shape[:3], int), np.zeros(x.shape[:3], int)
    fixed[ball((10, 12, 9), (6, 5, 4))], fixed[ball((21, 15, 14), (4, 7, 5))] = 1, 2
    moved[ball((12, 11, 10), (6, 6, 4))], moved[ball((20, 14, 13), (5, 7, 5))] = 1, 2
    return fixed, moved, (1.5, 0.8, 2.5)


def test_hd95_and_average_are_monais():
    import torch
    from monai.metrics import compute_average_surface_distance, compute_hausdorff_distance

    fixed, moved, spacing = _blobs()
    hot = [torch.nn.functional.one_hot(torch.tensor(m), 3).permute(3, 0, 1, 2)[None].float() for m in (fixed, moved)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        far = compute_hausdorff_distance(hot[1], hot[0], percentile=95, spacing=spacing)[0]
        mean = compute_average_surface_distance(hot[1], hot[0], symmetric=True, spacing=spacing)[0]
    found = surfaces(fixed, moved, spacing)
    assert [found[k].hd95 for k in (1, 2)] == pytest.approx(far.tolist(), abs=1e-4)
    assert [found[k].asd for k in (1, 2)] == pytest.approx(mean.tolist(), abs=1e-4)


def test_distances_are_simpleitks():
    """The directed mean distances from SimpleITK's distance map of the other surface."""
    fixed, moved, spacing = _blobs()
    for label in (1, 2):
        images = []
        for m in (fixed, moved):
            image = sitk.GetImageFromArray((m == label).astype(np.uint8).transpose(2, 1, 0))
            image.SetSpacing(spacing)
            images.append(sitk.LabelContour(image, fullyConnected=False))
        maps = [sitk.SignedMaurerDistanceMap(i, squaredDistance=False, useImageSpacing=True) for i in images]
        distance = [np.abs(sitk.GetArrayFromImage(m)) for m in maps]
        contour = [sitk.GetArrayFromImage(i) > 0 for i in images]
        there, back = distance[1][contour[0]], distance[0][contour[1]]
        found = surfaces(fixed, moved, spacing)[label]
        assert found.hd95 == pytest.approx(max(np.percentile(there, 95), np.percentile(back, 95)), abs=1e-4)
        assert found.asd == pytest.approx(np.concatenate([there, back]).mean(), abs=1e-4)


def test_ids_of_millions_are_only_names():
    fixed, moved, spacing = _blobs()
    names = np.array([0, 2_000_000_000, 5])
    assert {k: v for k, v in surfaces(names[fixed], names[moved], spacing).items()} == {
        int(names[k]): v for k, v in surfaces(fixed, moved, spacing).items()}


def test_bad_numbers_are_refused():
    fixed, moved, _ = _blobs()
    with pytest.raises(OptionError, match="expected 3 positive numbers of mm"):
        hd95(fixed, moved, (1.0, 1.0))
    with pytest.raises(OptionError, match="tolerance: -1; expected 0 or more"):
        surfaces(fixed, moved, (1, 1, 1), tolerance=-1)
