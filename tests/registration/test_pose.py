"""Poses: what is tried around the best one, within the model."""

import pytest
import torch

from regkit import Grid, Image, Matrix, align
from regkit.registration.pair import make_pair
from regkit.registration.pose import Poses, nearby
from regkit.registration.pyramid import build
from regkit.registration.steps import Outcome, Scene, score
from regkit.sampling import warp
from regkit.space import MODELS, Frame

from .conftest import carried, known_map

pytestmark = pytest.mark.usefixtures("unjudged")


def _scene(fixed, moving, model: str, mm: float) -> Scene:
    return Scene(build(make_pair(fixed, moving), (4 * mm, 2 * mm)), Frame.of(fixed.grid), MODELS[model], 0)


def _around(scene: Scene, one: torch.Tensor) -> Poses:
    start = Poses(one, torch.tensor([True]), torch.tensor([score(scene, 1, ("mind",), one)]))
    return nearby(scene, scene, start, Outcome(torch.zeros(0), "auto"))


def test_a_better_pose_is_found_around_a_poor_one(heads, ndim):
    head = heads[ndim]
    truth = known_map(head.grid, "similarity")
    scene = _scene(head, carried(head, truth), "affine", {2: 2.0, 3: 4.0}[ndim])
    step = MODELS["rigid"].exp(torch.tensor([[0.1] * ndim + [0.2] * (ndim * (ndim - 1) // 2)], dtype=torch.float64), ndim)
    poor = scene.frame.matrix @ truth.matrix @ scene.frame.inverse @ step
    found = _around(scene, poor)
    assert float(found.judged.max()) > float(found.judged[0]) + 0.2
    best = Matrix(scene.frame.world(found.maps[found.judged.argmax()][None]))
    points = head.grid.points()
    assert float((best(points) - truth(points)).norm(dim=-1).mean()) < 0.03 * scene.frame.scale


@pytest.mark.parametrize("model", ["translation", "rigid"])
def test_nothing_leaves_the_model(heads, ndim, model):
    head = heads[ndim]
    scene = _scene(head, carried(head, known_map(head.grid, model)), model, {2: 2.0, 3: 4.0}[ndim])
    maps = _around(scene, torch.eye(ndim + 1, dtype=torch.float64)[None]).maps[:, :ndim, :ndim]
    eye = torch.eye(ndim, dtype=torch.float64).expand_as(maps)
    assert torch.allclose(maps if model == "translation" else maps @ maps.mT, eye, atol=1e-6)


def _crop(moving_contrast):
    """A crop of noise, seen twice: two levels, no background."""
    draw = torch.Generator().manual_seed(3)
    grid = Grid((26, 24, 22), torch.eye(4, dtype=torch.float64)[None])
    field = Image(torch.rand(1, 1, 13, 12, 11, generator=draw), Grid((13, 12, 11), torch.diag(torch.tensor([2.0, 2, 2, 1]))[None].double()))
    scan = warp(field, Matrix.identity(3), grid, kernel="cubic", antialias="none")
    return scan, scan.with_data(moving_contrast(scan.data))


@pytest.mark.parametrize(("contrast", "expected"), [(lambda x: x**1.5 + 0.1, "+ncc"), (lambda x: (x - 0.5).abs(), "")],
                         ids=["same", "other"])
def test_small_crops_without_a_background_are_compared_as_a_whole_if_intensities_go_together(contrast, expected):
    found = align(*_crop(contrast), model="rigid", start="header").trace["chosen"]["similarity"]
    assert found.endswith("+ncc") if expected else "ncc" not in found.replace("lncc", "")
