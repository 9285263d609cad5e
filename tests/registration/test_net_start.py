"""A registration that begins with a net: its answer is the map where nothing is refined, a member of the model, and one of many starts
with `auto`; what cannot be asked is named."""

from __future__ import annotations

import math

import pytest
import torch

import regkit
from regkit import Grid, Image, Matrix, Settings
from regkit.cli import run
from regkit.errors import CheckpointError, OptionError
from regkit.localisation import Detector, KeypointNet, RegressionNet
from regkit.registration import nets, predict
from regkit.registration.nets import save
from regkit.sampling import warp
from regkit.space import MODELS

EDGE, MM = 16, 6.0  # of the canvas the nets look at
TURN = {2: math.radians(50), 3: math.radians(40)}


def centre(scan):
    weight = scan.data.flatten().double()
    return weight @ scan.grid.points()[0] / weight.sum()


def about(linear, at, to):
    """The map (1, D+1, D+1) with a linear part (D, D) that takes one point to another."""
    d = len(at)
    matrix = torch.eye(d + 1, dtype=torch.float64)[None].clone()
    matrix[0, :d, :d], matrix[0, :d, d] = linear, to - linear @ at
    return matrix


def turn(ndim, radians):
    theta = torch.zeros(1, MODELS["rigid"].count(ndim), dtype=torch.float64)
    theta[0, ndim:] = radians * torch.nn.functional.normalize(torch.tensor([1.0, -0.5, 2.0][: ndim * (ndim - 1) // 2]).double(), dim=0)
    return MODELS["rigid"].exp(theta, ndim)[0, :ndim, :ndim]


def pair(ndim):
    """A scan of blobs around a place of its own, the same turned about its centre of mass and shifted, and the map between them."""
    shape, mm = ((40, 40), (26, 26, 26))[ndim - 2], (2.4, 3.6)[ndim - 2]
    affine = torch.diag(torch.tensor([*[mm] * ndim, 1.0], dtype=torch.float64))
    affine[:ndim, ndim] = -40.0
    grid = Grid(shape, affine)
    draw = torch.Generator().manual_seed(5)
    places = grid.centre + 16 * (2 * torch.rand(9, ndim, generator=draw, dtype=torch.float64) - 1)
    heights = torch.rand(9, generator=draw, dtype=torch.float64) + 0.4
    data = (heights * torch.exp(-torch.cdist(grid.points()[0], places).square() / (2 * 6.0**2))).sum(1)
    fixed = Image(data.float().reshape(1, 1, *shape), grid)
    f = centre(fixed)
    truth = Matrix(about(turn(ndim, TURN[ndim]), f, f + torch.tensor([9.0, -6.0, 4.0][:ndim]).double()))
    return fixed, warp(fixed, truth.inverse(), grid, kernel="cubic", antialias="none"), truth


def saying(path, ndim, linear, size=0.0):
    """A net that says one map about the canvas' centre whatever it is shown: a rotation (D, D), and the logarithm of a size."""
    net = RegressionNet(EDGE, ndim, "affine", width=8, hidden=8)
    with torch.no_grad():
        numbers = (linear - torch.eye(ndim)).float().mT.flatten()[: (2, 6)[ndim - 2]]  # added to the identity's first columns
        net.head[-1].bias[ndim: ndim + net.turns] = numbers
        net.head[-1].bias[ndim + net.turns] = size
    save(net, path, edge=EDGE, mm=MM)
    return f"net:{path}"


def away(scan, a, b):
    """mm: how far apart two maps take the scan's bright voxels, on average."""
    points = scan.grid.points()[:, (scan.data.flatten() > 0.3 * scan.data.max()).nonzero()[:, 0]]
    return float((a(points) - b(points)).norm(dim=-1).mean())


@pytest.fixture
def empty(tmp_path, monkeypatch):
    """A package with no nets, and a working folder."""
    for module in (nets, predict):
        monkeypatch.setattr(module, "SHIPPED", tmp_path / "package")
    (tmp_path / "package").mkdir()
    monkeypatch.chdir(tmp_path)
    predict._kept.cache_clear()
    yield tmp_path
    predict._kept.cache_clear()


# ------------------------------------------------------------------------------------------------------------- the settings

def test_a_start_may_be_a_net():
    for start in ("net", "net:run", "net:head-3d", "net:some/where/net.safetensors", "net:transform.tfm"):
        assert Settings(start=start).start == start
    with pytest.raises(OptionError, match=r"start: net: names no net; give net:FILE.safetensors, a training's folder or a shipped net"):
        Settings(start="net:")
    with pytest.raises(OptionError, match=r"start: 'nets' is not known; .*nearest: net"):
        Settings(start="nets")


# --------------------------------------------------------------------------------------------------------------- its answer

def test_a_net_that_says_nothing_lays_centre_of_mass_on_centre_of_mass(ndim, tmp_path):
    fixed, moving, _ = pair(ndim)
    start = saying(tmp_path / "net.safetensors", ndim, torch.eye(ndim).double())
    found = regkit.align(fixed, moving, start=start, levels=0)
    shift = Matrix.shift((centre(moving) - centre(fixed))[None])
    assert away(fixed, found.transform, shift) < 0.15 < 3 < away(fixed, found.transform, Matrix.identity(ndim))
    assert found.trace["levels_mm"] == [] and found.trace["candidates"][0]["origin"] == f"net {tmp_path / 'net.safetensors'}"


@pytest.mark.parametrize("model", ["rigid", "similarity", "affine"])
def test_what_a_net_says_is_the_map_where_nothing_is_refined(model, ndim, tmp_path):
    """It looks twice, the second time at what the first answer shows: two half turns are the whole."""
    fixed, moving, truth = pair(ndim)
    start = saying(tmp_path / "net.safetensors", ndim, turn(ndim, TURN[ndim] / 2))
    found = regkit.align(fixed, moving, start=start, levels=0, model=model)
    assert away(fixed, found.transform, truth) < 0.3 < 5 < away(fixed, found.transform, Matrix.identity(ndim))
    assert found.verdict.status != "FAIL"


@pytest.mark.parametrize("model", ["translation", "rigid", "similarity", "affine"])
def test_its_map_is_a_member_of_the_model(model, ndim, tmp_path):
    """The nearest one to what the net said."""
    fixed, moving, _ = pair(ndim)
    start = saying(tmp_path / "net.safetensors", ndim, turn(ndim, TURN[ndim] / 2), size=0.1)
    linear = regkit.align(fixed, moving, start=start, levels=0, model=model).transform.matrix[0, :ndim, :ndim]
    rotation, size = turn(ndim, TURN[ndim]), math.exp(0.2)
    oracle = {"translation": torch.eye(ndim).double(), "rigid": rotation}.get(model, size * rotation)
    torch.testing.assert_close(linear, oracle, atol=2e-3, rtol=0)
    if model == "rigid":
        torch.testing.assert_close(linear.mT @ linear, torch.eye(ndim).double(), atol=1e-9, rtol=0)


def test_refinement_begins_with_it(ndim, tmp_path):
    """Nothing else is looked at, and a turn that is nearly right becomes right."""
    fixed, moving, truth = pair(ndim)
    start = saying(tmp_path / "net.safetensors", ndim, turn(ndim, TURN[ndim] / 2 - math.radians(4)))
    bare = regkit.align(fixed, moving, start=start, levels=0, model="rigid")
    found = regkit.align(fixed, moving, start=start, model="rigid")
    assert {one["origin"] for one in found.trace["candidates"]} == {f"net {tmp_path / 'net.safetensors'}"}
    assert away(fixed, found.transform, truth) < 0.5 < 1.2 < away(fixed, bare.transform, truth)
    assert found.verdict.status != "FAIL"


def test_masked_and_stored_otherwise_it_says_the_same(ndim, tmp_path):
    """Of scans whose axes run the other way, and under masks that hold all of them."""
    fixed, moving, truth = pair(ndim)
    start = saying(tmp_path / "net.safetensors", ndim, turn(ndim, TURN[ndim] / 2))
    flip = torch.eye(ndim + 1, dtype=torch.float64)
    flip[0, 0], flip[0, ndim] = -1, moving.grid.shape[0] - 1
    other = Image(moving.data.flip(2), Grid(moving.grid.shape, moving.grid.affine[0] @ flip))
    mask = fixed.with_data(torch.ones_like(fixed.data))
    found = regkit.align(fixed, other, start=start, levels=0, model="rigid", fixed_mask=mask)
    assert away(fixed, found.transform, truth) < 0.3


# --------------------------------------------------------------------------------------------------------------- with others

def test_a_shipped_net_is_one_of_the_starts_of_auto(ndim, empty):
    saying(empty / "package" / f"good-{ndim}d.safetensors", ndim, turn(ndim, TURN[ndim] / 2))
    saying(empty / "package" / f"other-{5 - ndim}d.safetensors", 5 - ndim, torch.eye(5 - ndim).double())
    fixed, moving, truth = pair(ndim)
    found = regkit.align(fixed, moving, model="rigid")
    origins = {one["origin"] for one in found.trace["candidates"]}
    assert f"net good-{ndim}d" in origins and "header" in origins and not any("other" in one for one in origins)
    assert away(fixed, found.transform, truth) < 0.5
    alone = regkit.align(fixed, moving, model="rigid", start="net", levels=0)
    assert {one["origin"] for one in alone.trace["candidates"]} == {f"net good-{ndim}d"}
    assert away(fixed, alone.transform, truth) < 0.3


def test_a_shipped_net_that_is_wrong_does_no_harm(ndim, empty):
    """Of an anatomy that it never saw."""
    saying(empty / "package" / f"wrong-{ndim}d.safetensors", ndim, turn(ndim, math.radians(60)), size=0.3)
    fixed, moving, truth = pair(ndim)
    found = regkit.align(fixed, moving, model="rigid")
    assert away(fixed, found.transform, truth) < 0.5 and found.verdict.status != "FAIL"


def test_models_that_cannot_turn_ask_no_net_unless_told_to(empty):
    saying(empty / "package" / "good-2d.safetensors", 2, turn(2, TURN[2] / 2))
    fixed, moving, _ = pair(2)
    for model in ("translation", "attention"):
        found = regkit.align(fixed, moving, model=model, levels=0)
        assert not any(one["origin"].startswith("net") for one in found.trace["candidates"])


# ------------------------------------------------------------------------------------------------------------------- faults

@pytest.fixture
def scans(empty):
    for ndim in (2, 3):
        fixed, moving, _ = pair(ndim)
        regkit.write_image(fixed, empty / f"f{ndim}.nii.gz")
        regkit.write_image(moving, empty / f"m{ndim}.nii.gz")
    saying(empty / "two.safetensors", 2, torch.eye(2).double())
    save(KeypointNet(Detector(4, 3, width=8)), empty / "run" / "net.safetensors", edge=EDGE, mm=MM)
    (empty / "notes.txt").write_text("no net")
    return empty


@pytest.mark.parametrize(("ndim", "start", "error", "message"), [
    (3, "net", OptionError, "start: no net for 3D scans is shipped; train one (regkit train) and give net:FOLDER, or --start search"),
    (2, "net", OptionError, "start: no net for 2D scans is shipped; train one (regkit train) and give net:FOLDER, or --start search"),
    (3, "net:two.safetensors", OptionError, "start: two.safetensors is a net for 2D scans, these are 3D; give another one, or --start"),
    (2, "net:run", OptionError, "start: run is a net for 3D scans, these are 2D; give another one, or --start auto"),
    (3, "net:nothing", CheckpointError, "net: 'nothing' is not there; give a net that regkit wrote, a training's folder, or a shipped"),
    (3, "net:nothing.safetensors", CheckpointError, "net: 'nothing.safetensors' is not there; give"),
    (3, "net:package", CheckpointError, "net: 'package' is not there; give"),
    (3, "net:notes.txt", CheckpointError, "net: notes.txt cannot be read as weights"),
], ids=lambda value: value if isinstance(value, str) and value.startswith("net") and " " not in value else "")
def test_what_cannot_be_asked_is_named(ndim, start, error, message, scans, capsys):
    argv = ["register", f"f{ndim}.nii.gz", f"m{ndim}.nii.gz", "-o", "out", "--start", start, "--quiet"]
    assert run(argv) == 2
    out, err = capsys.readouterr()
    assert out == "" and len(err.splitlines()) == 1 and err.startswith(f"regkit: error: {message}")
    assert not (scans / "out").exists()
    with pytest.raises(error):
        regkit.align(f"f{ndim}.nii.gz", f"m{ndim}.nii.gz", start=start)


def test_the_record_says_which_net(scans, capsys):
    saying(scans / "good.safetensors", 2, turn(2, TURN[2] / 2))
    argv = ["register", "f2.nii.gz", "m2.nii.gz", "-o", "out", "--start", "net:good.safetensors", "--levels", "0", "--model", "rigid"]
    assert run([*argv, "--json"]) == 0
    assert '"net:good.safetensors"' in capsys.readouterr().out
    fixed, _, truth = pair(2)
    assert away(fixed, regkit.read_transform("out/transform.tfm", ndim=2), truth) < 0.3
