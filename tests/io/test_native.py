"""regkit's own transform files: exact, and clear about what is wrong with a file."""

import json

import pytest
import torch

import regkit
from regkit import FormatError, GeometryError, Matrix
from regkit.displacement import Displacement
from regkit.image import Image
from regkit.space import Composite, Frame, Grid, SplineModel


def _sequence(ndim, seed=0):
    draw = torch.Generator().manual_seed(seed)
    affine = torch.eye(ndim + 1, dtype=torch.float64) + 0.1 * torch.randn(ndim + 1, ndim + 1, generator=draw, dtype=torch.float64)
    affine[ndim] = torch.eye(ndim + 1)[ndim]
    frame = Frame.of(Grid((12, 9, 7)[:ndim], affine))
    model = SplineModel(3, 0.05)
    spline = model.transform(0.05 * torch.randn(1, model.count(ndim), generator=draw, dtype=torch.float64), frame)
    tilted = affine.clone()
    tilted[ndim, 0] = 0.01
    return Composite((Matrix(affine), spline, Matrix(tilted)))


@pytest.mark.parametrize("ndim", [2, 3])
def test_what_is_written_comes_back_exactly(ndim, tmp_path):
    whole = _sequence(ndim)
    points = torch.randn(1, 50, ndim, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 5
    for name, transform in (("whole", whole), ("back", whole.inverse()), ("spline", whole.parts[1]), ("projective", whole.parts[2])):
        path = regkit.write_transform(transform, tmp_path / f"{name}.json")
        again = regkit.read_transform(path, ndim=ndim)
        torch.testing.assert_close(again(points), transform(points), atol=1e-9, rtol=0)
        assert regkit.write_transform(again, tmp_path / f"{name}_again.json").read_bytes() == path.read_bytes()
    with pytest.raises(GeometryError, match=f"is a {ndim}D transform; expected {5 - ndim}D"):
        regkit.read_transform(path, ndim=5 - ndim)


def test_what_has_no_form_is_refused(tmp_path):
    grid = Grid((4, 4, 4), torch.eye(4))
    with pytest.raises(FormatError, match=r"a Displacement does not go into a \.json file"):
        regkit.write_transform(Displacement(Image(torch.zeros(1, 3, 4, 4, 4), grid)), tmp_path / "t.json")
    with pytest.raises(GeometryError, match="a batch of 2"):
        regkit.write_transform(Matrix(torch.eye(4).repeat(2, 1, 1)), tmp_path / "t.json")
    with pytest.raises(FormatError, match=r"give a name that ends in \.json"):
        regkit.write_transform(_sequence(3), tmp_path / "t.tfm")
    with pytest.raises(GeometryError, match=r"projective; .* give a name that ends in \.json"):
        regkit.write_transform(_sequence(3).parts[2], tmp_path / "t.tfm")
    assert not list(tmp_path.iterdir())


def _spoilt(change):
    content = json.loads(json.dumps({
        "regkit_transform": 1, "ndim": 2, "parts": [
            {"kind": "tps", "inverse": False, "control": 2, "stiffness": 0.0, "centre": [0, 0], "scale": 5.0, "edges": [1, 0.5],
             "theta": [0.0] * 8}]}))
    change(content)
    return json.dumps(content)


@pytest.mark.parametrize(("text", "message"), [
    ("{", "not readable JSON"), ("", "not readable JSON"), ("[" * 100_000, "not readable JSON"), ("[1, 2]", "no 'regkit_transform'"),
    ('{"matrix": [[1]]}', "registration.json is a record"),
    (_spoilt(lambda c: c.update(regkit_transform=2)), "of version 2"),
    (_spoilt(lambda c: c.update(parts=[])), "incomplete"), (_spoilt(lambda c: c.update(ndim=4)), "incomplete"),
    (_spoilt(lambda c: c["parts"].append({"kind": "rotation"})), "of kind 'rotation'"),
    (_spoilt(lambda c: c["parts"].append(7)), "of kind None"),
    (_spoilt(lambda c: c["parts"].append({"kind": "matrix", "matrix": [[1, 2], [3, 4]]})), r"matrix has shape \(2, 2\)"),
    (_spoilt(lambda c: c["parts"].append({"kind": "matrix", "matrix": [[0] * 3] * 3})), "singular"),
    (_spoilt(lambda c: c["parts"][0].update(theta=[0.0] * 7)), r"theta has shape \(7,\)"),
    (_spoilt(lambda c: c["parts"][0].update(theta="many")), "theta is no array of numbers"),
    (_spoilt(lambda c: c["parts"][0].update(control=10**9)), "control 1000000000"),
    (_spoilt(lambda c: c["parts"][0].update(scale=0)), "scale 0.0"), (_spoilt(lambda c: c["parts"][0].pop("centre")), "centre"),
    (_spoilt(lambda c: c["parts"][0].update(stiffness=-1)), "stiffness: -1"),
    (_spoilt(lambda c: None).replace("5.0", "NaN"), "scale has shape"),
])
def test_damaged_files_are_named(text, message, tmp_path):
    path = tmp_path / "t.json"
    path.write_text(text)
    with pytest.raises(FormatError if "singular" not in message and "stiffness: -1" not in message else regkit.RegkitError, match=message):
        regkit.read_transform(path)


@pytest.mark.parametrize("key,value", [("control", 100), ("control", True), ("stiffness", 10**400), ("scale", 10**400)],
                         ids=["large", "no number", "stiff", "scale"])
def test_numbers_that_no_spline_has(tmp_path, key, value):
    text = {"regkit_transform": 1, "ndim": 3, "parts": [{"kind": "tps", "control": 2, "stiffness": 0.0, "centre": [0, 0, 0], "scale": 1.0,
                                                          "edges": [1, 1, 1], "theta": [0.0] * 24}]}
    (tmp_path / "a.json").write_text(json.dumps(text))
    assert regkit.read_transform(tmp_path / "a.json").ndim == 3
    text["parts"][0][key] = value
    (tmp_path / "a.json").write_text(json.dumps(text))
    with pytest.raises(FormatError, match=r"expected|no array of numbers"):
        regkit.read_transform(tmp_path / "a.json")
