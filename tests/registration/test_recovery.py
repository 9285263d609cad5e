"""Recovery: a known map comes back, whatever the model, the similarity, the dimension and the start."""

import math

import pytest
import torch

import regkit
from regkit import Image, Matrix
from regkit.registration.attempt import CURVED
from regkit.registration.settings import MODEL_NAMES, SIMILARITY_NAMES
from regkit.space import MODELS, Frame
from tests.registration.conftest import carried, known_map

pytestmark = pytest.mark.usefixtures("unjudged")


AFFINE = [name for name in MODEL_NAMES if name not in CURVED]


@pytest.mark.parametrize(("model", "similarity", "ndim"), [
    *((model, similarity, 2) for model in AFFINE for similarity in SIMILARITY_NAMES),
    *((model, "lncc", 3) for model in AFFINE),  # 2D and 3D share all that a model and a measure are made of
    *(("affine", similarity, 3) for similarity in SIMILARITY_NAMES if similarity != "lncc")])
def test_every_model_and_similarity_recovers_a_known_map(model, similarity, ndim, heads, tre):
    fixed = heads[ndim]
    truth = known_map(fixed.grid, model)
    result = regkit.align(fixed, carried(fixed, truth), model=model, similarity=similarity, start="mass")
    assert tre(fixed, Matrix.identity(ndim), truth) > 2
    assert tre(fixed, result.transform, truth) < (0.2 if similarity == "mi" else 0.1)
    assert MODELS[model].project(result.transform.matrix, fixed.grid.centre) == pytest.approx(result.transform.matrix, abs=1e-6)


@pytest.mark.parametrize("similarity", ["auto", *SIMILARITY_NAMES])
def test_every_similarity_refines_from_a_start_already_turned(similarity, ndim, heads, tre, tmp_path):
    fixed = heads[ndim]
    truth = known_map(fixed.grid, "rigid", seed=1, degrees=120.0)
    step = MODELS["rigid"].exp(torch.full((1, MODELS["rigid"].count(ndim)), 0.04, dtype=torch.float64), ndim)
    begin = truth @ Matrix(Frame.of(fixed.grid).world(step))
    regkit.write_transform(begin, tmp_path / "begin.tfm")
    result = regkit.align(fixed, carried(fixed, truth), model="rigid", similarity=similarity, start=str(tmp_path / "begin.tfm"))
    assert tre(fixed, begin, truth) > 1
    assert tre(fixed, result.transform, truth) < 0.2


@pytest.mark.parametrize("start", ["auto", "search"])
@pytest.mark.parametrize("degrees", [60.0, 150.0])
def test_far_turns_are_found(start, degrees, ndim, heads, tre):
    fixed = heads[ndim]
    truth = known_map(fixed.grid, "rigid", seed=2, degrees=degrees)
    result = regkit.align(fixed, carried(fixed, truth), model="affine", start=start)
    assert tre(fixed, result.transform, truth) < 0.3


@pytest.mark.parametrize("start", ["header", "centre", "mass", "moments"])
def test_every_start_begins_where_it_says(start, ndim, heads, tre):
    fixed = heads[ndim]
    truth = known_map(fixed.grid, "rigid", degrees=8.0)
    result = regkit.align(fixed, carried(fixed, truth), model="rigid", start=start)
    assert {c["origin"] for c in result.trace["candidates"]} == {start}
    assert tre(fixed, result.transform, truth) < 0.2


def test_contrast_may_differ(ndim, heads, tre):
    """The moving scan inverted and bent, as T2 against T1: auto must see through it."""
    fixed = heads[ndim]
    truth = known_map(fixed.grid, "affine")
    moving = carried(fixed, truth)
    value = moving.data / moving.data.max()
    other = moving.with_data(torch.where(value > 0.05, 1.2 - value.clamp(0, 1) ** 0.7, value))
    result = regkit.align(fixed, other)
    assert tre(fixed, result.transform, truth) < 0.5


def test_a_given_start_without_refinement_is_kept(ndim, heads, tmp_path):
    fixed = heads[ndim]
    truth = known_map(fixed.grid, "affine")
    regkit.write_transform(truth, tmp_path / "start.tfm")
    result = regkit.align(fixed, carried(fixed, truth), start=str(tmp_path / "start.tfm"), levels=0)
    assert result.transform.matrix == pytest.approx(truth.matrix, abs=1e-9)
    rigid = regkit.align(fixed, carried(fixed, truth), start=str(tmp_path / "start.tfm"), levels=0, model="rigid")
    assert torch.linalg.det(rigid.transform.matrix[0]) == pytest.approx(1, abs=1e-9)
    assert any("no rigid map" in note for note in rigid.trace["notes"])


@pytest.mark.parametrize("gain", [1e-6, 1.0, 1e6])
def test_the_scale_of_intensities_does_not_matter(gain, ndim, heads, tre):
    fixed = heads[ndim]
    truth = known_map(fixed.grid, "affine")
    moving = carried(fixed, truth)
    result = regkit.align(fixed, moving.with_data(moving.data * gain + 3 * gain), start="mass", fill="auto")
    assert tre(fixed, result.transform, truth) < 0.2


def test_the_same_seed_gives_the_same_bytes(ndim, heads, tmp_path):
    fixed = heads[ndim]
    moving = carried(fixed, known_map(fixed.grid, "affine"))
    for name in ("a", "b"):
        regkit.align(fixed, moving, seed=3, start="mass").save(tmp_path / name)
    for file in ("moved.nii.gz", "transform.tfm"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_both_directions_agree(ndim, heads, tre):
    """align(a, b) and the inverse of align(b, a): within half a voxel, on two scans that truly differ."""
    fixed = heads[ndim]
    draw = torch.Generator().manual_seed(5)
    moving = carried(fixed, known_map(fixed.grid, "affine"))
    noise = torch.randn(moving.data.shape, generator=draw) * 0.05 * moving.data.max()
    moving = Image((moving.data.clamp_min(0) ** 1.3 + noise), moving.grid)
    there, back = regkit.align(fixed, moving, start="mass"), regkit.align(moving, fixed, start="mass")
    assert tre(fixed, there.transform, back.transform.inverse()) < 0.5
    assert math.isfinite(there.trace["similarity"]["after"])
