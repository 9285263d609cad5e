"""Projective and thin-plate-spline registration: what affine maps leave is found, saved, read again and undone."""

import json

import numpy as np
import pytest
import torch

import regkit
from regkit import Matrix, OptionError
from regkit.cli import run
from regkit.displacement import Displacement
from regkit.io import read_field
from regkit.registration.attempt import CURVED
from regkit.registration.guard import look
from regkit.registration.pair import make_pair
from regkit.space import MODELS, Composite, Frame, SplineModel
from tests.registration.conftest import carried, known_map

pytestmark = pytest.mark.usefixtures("unjudged")

SCORES = {"end": 0.5, "best_start": 0.4, "header": 0.3}


def bent_map(grid, name, seed=0):
    """A known affine map that is bent: by up to a voxel or four."""
    d, frame, draw = grid.ndim, Frame.of(grid), torch.Generator().manual_seed(seed)
    affine = known_map(grid, "affine", seed=seed)
    if name == "tps":
        model = SplineModel(3)
        return Composite((affine, model.transform(0.06 * torch.randn(1, model.count(d), generator=draw, dtype=torch.float64), frame)))
    theta = torch.zeros(1, MODELS["projective"].count(d), dtype=torch.float64)
    theta[0, -d:] = torch.tensor([0.08, -0.06, 0.05], dtype=torch.float64)[:d]
    return Matrix(affine.matrix @ frame.world(MODELS["projective"].exp(theta, d)))


@pytest.mark.parametrize("model", CURVED)
def test_a_known_bent_map_is_found(model, ndim, heads, tre):
    fixed = heads[ndim]
    truth = bent_map(fixed.grid, model)
    moving = carried(fixed, truth)
    affine = regkit.align(fixed, moving)
    bent = regkit.align(fixed, moving, model=model)
    assert tre(fixed, bent.transform, truth) < 0.5 * tre(fixed, affine.transform, truth)
    scores = bent.trace["guard"]
    assert scores["similarity_bent"] > scores["similarity_affine"]
    assert not bent.findings
    assert bent.trace["model"] == model and bent.trace["seconds"]["bend"] > 0


@pytest.mark.parametrize("similarity", ["mse", "cr", "mi"])
def test_measures_that_least_squares_cannot_follow_are_stood_in_for(similarity, heads, tre):
    fixed = heads[2]
    truth = bent_map(fixed.grid, "tps")
    moving = carried(fixed, truth)
    affine, bent = (regkit.align(fixed, moving, similarity=similarity, start="mass", model=m) for m in ("affine", "tps"))
    assert tre(fixed, bent.transform, truth) < 0.7 * tre(fixed, affine.transform, truth)
    assert any("bent under mind" in note for note in bent.trace["notes"]) == (similarity != "mse")


def test_more_stiffness_bends_less(heads):
    fixed = heads[2]
    moving = carried(fixed, bent_map(fixed.grid, "tps"))
    soft, stiff = (regkit.align(fixed, moving, model="tps", control=4, stiffness=s) for s in (0.0, 1.0))
    energies = []
    for result in (soft, stiff):
        spline = result.transform.parts[1]
        theta = spline.theta.reshape(-1, 2)
        energies.append(float((theta * (spline.model.energy(spline.frame) @ theta)).sum()))
    assert energies[1] < 0.5 * energies[0]


@pytest.mark.parametrize("model", CURVED)
def test_it_is_saved_read_again_and_undone(model, ndim, heads, tmp_path):
    fixed = heads[ndim]
    result = regkit.align(fixed, carried(fixed, bent_map(fixed.grid, model)), model=model)
    folder = result.save(tmp_path / "out")
    assert {path.name for path in folder.iterdir()} == {"moved.nii.gz", "transform.json", "displacement.nii.gz", "registration.json"}
    again = regkit.read_transform(folder / "transform.json", ndim=ndim)
    points = fixed.grid.points()[:, :: 101 if ndim == 2 else 1009]
    assert torch.equal(again(points), result.transform(points))
    field = Displacement(read_field(folder / "displacement.nii.gz", ndim))
    assert float((field(points) - result.transform(points)).abs().max()) < 1e-3
    back = result.apply(result.apply(points[0].numpy(), inverse=True))
    assert back == pytest.approx(points[0].numpy(), abs=1e-4)
    assert result.inverse().transform.inverse()(points) == pytest.approx(result.transform(points), abs=1e-6)
    record = json.loads((folder / "registration.json").read_text())
    assert np.array(record["matrix"]) == pytest.approx(result.matrix)
    (tmp_path / "way").mkdir()
    result.inverse().save(tmp_path / "way" / "back")


@pytest.mark.parametrize("model", CURVED)
def test_the_command_line_does_the_same(model, heads, tmp_path):
    fixed = heads[2]
    moving = carried(fixed, bent_map(fixed.grid, model))
    regkit.write_image(fixed, tmp_path / "fixed.nii.gz")
    regkit.write_image(moving, tmp_path / "moving.nii.gz")
    files = [str(tmp_path / name) for name in ("fixed.nii.gz", "moving.nii.gz")]
    assert run(["register", *files, "-o", str(tmp_path / "out"), "--model", model, "--control", "4", "--quiet"]) == 0
    assert (tmp_path / "out" / "report.html").exists() and not (tmp_path / "out" / "transform.tfm").exists()
    assert run(["apply", files[1], "-t", str(tmp_path / "out" / "transform.json"), "--like", files[0], "-o", str(tmp_path / "a.nii.gz"),
                "--quiet"]) == 0
    assert (tmp_path / "a.nii.gz").read_bytes() == (tmp_path / "out" / "moved.nii.gz").read_bytes()
    assert run(["apply", str(tmp_path / "a.nii.gz"), "-t", str(tmp_path / "out" / "transform.json"), "--inverse", "--like", files[1], "-o",
                str(tmp_path / "b.nii.gz"), "--quiet"]) == 0
    there, back = regkit.read_image(files[1]).data, regkit.read_image(tmp_path / "b.nii.gz").data
    assert float(torch.corrcoef(torch.stack([there.flatten(), back.flatten()]))[0, 1]) > 0.9
    assert run(["register", *files, "-o", str(tmp_path / "again"), "--start", str(tmp_path / "out" / "transform.json"), "--quiet"]) == 0


def test_nothing_refined_is_nothing_bent(heads):
    fixed = heads[2]
    result = regkit.align(fixed, carried(fixed, known_map(fixed.grid, "rigid")), model="tps", levels=0)
    assert result.affine and any("nothing was refined" in note for note in result.trace["notes"])


def test_a_fold_is_a_finding(heads):
    fixed, ndim = heads[2], 2
    pair = make_pair(fixed, fixed)
    model = SplineModel(3)
    theta = torch.zeros(1, model.count(ndim), dtype=torch.float64)
    gentle = model.transform(theta + 0.01, Frame.of(fixed.grid))
    assert not look(pair, gentle, SCORES)["findings"]
    theta[0, ndim * (3**ndim // 2)] = 1.5  # the middle one goes beyond its neighbour
    findings = look(pair, model.transform(theta, Frame.of(fixed.grid)), SCORES)["findings"]
    assert any("folds at" in finding for finding in findings)


@pytest.mark.parametrize(("options", "text"), [({"control": 1}, "control: 1; expected 2 to 8"), ({"control": 9}, "control: 9"),
                                               ({"stiffness": -1.0}, "stiffness: -1.0")])
def test_bad_numbers_are_refused(options, text):
    with pytest.raises(OptionError, match=text):
        regkit.Settings(model="tps", **options)
