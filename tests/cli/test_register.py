"""The doors end to end: every option of `register` and `apply` once, and the command line equals the Python call."""

import csv
import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
import torch

import regkit
from regkit.cli import run

# One pair per dimension: smooth random blobs, turned by 6° and shifted; regkit's map is known.
SHAPES = {2: (48, 44), 3: (30, 32, 28)}
QUICK = ["--levels", "6,3"]


def _affine(ndim: int) -> np.ndarray:
    affine = np.eye(4)
    affine[:ndim, :ndim] *= 2.0
    affine[:ndim, 3] = -30.0
    return affine


def _truth(ndim: int) -> np.ndarray:
    """(D+1, D+1): fixed world → moving world, rigid."""
    angle = np.deg2rad(6)
    truth = np.eye(ndim + 1)
    truth[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    truth[:ndim, ndim] = [3.0, -2.0, 1.5][:ndim]
    return truth


def _blobs(points: np.ndarray, ndim: int) -> np.ndarray:
    """A smooth scene at world points (…, D): a body and a dozen blobs in it."""
    rng = np.random.default_rng(3)
    middle = np.array([-30.0 + n - 1 for n in SHAPES[ndim]])
    value = 60 * np.exp(-(((points - middle) / 18) ** 4).sum(-1))
    centres, widths, heights = rng.uniform(-15, 15, (12, ndim)), rng.uniform(3, 6, 12), rng.uniform(-40, 80, 12)
    for centre, width, height in zip(centres, widths, heights, strict=True):
        value = value + height * np.exp(-((points - middle - centre) ** 2).sum(-1) / (2 * width**2))
    return value


def _save(folder: Path, name: str, voxels: np.ndarray, ndim: int) -> Path:
    nib.Nifti1Image(voxels, _affine(ndim)).to_filename(folder / name)
    return folder / name


@pytest.fixture(scope="module", params=[2, 3], ids=["2D", "3D"])
def pair(request, tmp_path_factory):
    """A folder with fixed, moving, labels, masks and matching points; `ndim` beside it."""
    ndim = request.param
    folder = tmp_path_factory.mktemp(f"pair{ndim}")
    index = np.stack(np.meshgrid(*[np.arange(n) for n in SHAPES[ndim]], indexing="ij"), -1)
    world = index * 2.0 - 30.0
    truth = _truth(ndim)
    back = np.linalg.inv(truth)
    there = world @ back[:ndim, :ndim].T + back[:ndim, ndim]  # a moving point's place in the fixed scan
    fixed, moving = _blobs(world, ndim), _blobs(there, ndim)
    _save(folder, "fixed.nii.gz", fixed.astype(np.float32), ndim)
    _save(folder, "moving.nii.gz", moving.astype(np.float32), ndim)
    _save(folder, "seg.nii.gz", (moving > 40).astype(np.uint8) + (moving > 80), ndim)
    _save(folder, "fixed_seg.nii.gz", (fixed > 40).astype(np.uint8) + (fixed > 80), ndim)
    _save(folder, "mask.nii.gz", np.ones(SHAPES[ndim], np.uint8), ndim)
    points = np.random.default_rng(4).uniform(-10, 15, (7, ndim))
    carried = points @ truth[:ndim, :ndim].T + truth[:ndim, ndim]
    for name, rows in (("fixed.csv", points), ("moving.csv", carried)):
        with (folder / name).open("w", newline="") as file:
            table = csv.writer(file)
            table.writerow(["x", "y", "z", "name"])
            table.writerows([*row, *[0.0] * (3 - ndim), f"p{i}"] for i, row in enumerate(rows))
    return folder


def _ndim(folder: Path) -> int:
    return 2 if folder.name.startswith("pair2") else 3


def _scans(folder: Path) -> list[str]:
    return [str(folder / "fixed.nii.gz"), str(folder / "moving.nii.gz")]


def _table(path: Path) -> tuple[list[str], np.ndarray, list[str]]:
    with path.open(newline="") as file:
        head, *rows = csv.reader(file)
    return head, np.array([[float(v) for v in row[:3]] for row in rows]), [row[3] for row in rows]


def _tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def result(pair, tmp_path_factory):
    """One run with everything that can be carried along."""
    out = tmp_path_factory.mktemp("result") / "out"
    code = run(["register", *_scans(pair), "-o", str(out), "--model", "rigid", "--labels", str(pair / "seg.nii.gz"),
                "--labels", str(pair / "mask.nii.gz"), "--fixed-points", str(pair / "fixed.csv"),
                "--moving-points", str(pair / "moving.csv"), *QUICK, "--quiet"])
    assert code == 0
    return out


def test_folder_holds_all_results_and_nothing_else(result):
    assert sorted(p.name for p in result.iterdir()) == [
        "fixed_in_moving.csv", "mask_moved.nii.gz", "moved.nii.gz", "moving_in_fixed.csv", "overlay.png", "registration.json",
        "report.html", "seg_moved.nii.gz", "transform.tfm"]
    assert [p.name for p in result.parent.iterdir()] == ["out"]


def test_transform_is_found_and_opens_in_simpleitk(pair, result):
    ndim = _ndim(pair)
    transform = sitk.ReadTransform(str(result / "transform.tfm"))
    _, fixed, _ = _table(pair / "fixed.csv")
    _, moving, _ = _table(pair / "moving.csv")
    flip = np.array([-1, -1, 1])[:ndim]  # RAS ↔ LPS
    mapped = np.array([transform.TransformPoint((p[:ndim] * flip).tolist()) for p in fixed]) * flip
    assert np.linalg.norm(mapped - moving[:, :ndim], axis=1).mean() < 0.4
    matrix = np.array(json.loads((result / "registration.json").read_text())["matrix"]).reshape(ndim + 1, ndim + 1)
    assert np.abs(fixed[:, :ndim] @ matrix[:ndim, :ndim].T + matrix[:ndim, ndim] - mapped).max() < 1e-4


def test_points_are_carried_both_ways_and_keep_their_columns(pair, result):
    for start, goal in (("moving", "fixed"), ("fixed", "moving")):
        head, points, names = _table(result / f"{start}_in_{goal}.csv")
        assert head == ["x", "y", "z", "name"]
        assert names == _table(pair / f"{start}.csv")[2]
        assert np.linalg.norm(points - _table(pair / f"{goal}.csv")[1], axis=1).mean() < 0.4


def test_moved_has_fixed_geometry_and_labels_fit(pair, result):
    fixed = nib.load(pair / "fixed.nii.gz")
    for name in ("moved.nii.gz", "seg_moved.nii.gz"):
        moved = nib.load(result / name)
        assert moved.shape == fixed.shape
        assert np.allclose(moved.affine, fixed.affine, atol=1e-4)
    seg, goal = (np.asarray(nib.load(p).dataobj) for p in (result / "seg_moved.nii.gz", pair / "fixed_seg.nii.gz"))
    assert seg.dtype.kind in "ui" and set(np.unique(seg)) <= {0, 1, 2}
    assert 2 * ((seg > 0) & (goal > 0)).sum() / ((seg > 0).sum() + (goal > 0).sum()) > 0.9


def test_command_line_equals_python_to_the_last_bit(pair, result, tmp_path):
    found = regkit.align(*_scans(pair), model="rigid", levels=[6, 3])
    found.save(tmp_path / "python")
    for name in ("moved.nii.gz", "transform.tfm"):
        assert (tmp_path / "python" / name).read_bytes() == (result / name).read_bytes()
    record = json.loads((result / "registration.json").read_text())
    assert np.array_equal(np.ravel(record["matrix"]), np.ravel(found.matrix))


OPTIONS = [
    ["--model", "translation"], ["--model", "similarity"], ["--model", "affine"],
    *[["--similarity", s] for s in ("mse", "ncc", "lncc", "cr", "mi", "mind", "ngf")],
    *[["--start", s] for s in ("header", "centre", "mass", "moments", "search")],
    ["--interpolation", "cubic"], ["--interpolation", "nearest"], ["--fill", "-1000"], ["--levels", "0"], ["--volume", "0"],
    ["--seed", "7"], ["--threads", "1"], ["--device", "cpu"],
]


@pytest.mark.parametrize("options", OPTIONS, ids=" ".join)
def test_every_option_runs_and_is_recorded(pair, options, tmp_path, capsys):
    levels = [] if "--levels" in options else QUICK
    assert run(["register", *_scans(pair), "-o", str(tmp_path / "out"), *levels, *options, "--json"]) in (0, 3)
    printed = capsys.readouterr().out
    record = json.loads(printed)
    assert json.loads((tmp_path / "out" / "registration.json").read_text()) == record
    name, value = options[0].removeprefix("--"), options[1]
    assert str(record["settings"][name]) == value
    for scan in ("fixed", "moving"):
        assert len(record["inputs"][scan]["sha256"]) == 64
    if name == "fill":
        assert float(np.asarray(nib.load(tmp_path / "out" / "moved.nii.gz").dataobj).min()) == -1000


def test_masks_and_a_start_from_a_file(pair, result, tmp_path):
    mask = str(pair / "mask.nii.gz")
    code = run(["register", *_scans(pair), "-o", str(tmp_path / "out"), "--start", str(result / "transform.tfm"),
                "--fixed-mask", mask, "--moving-mask", mask, "--model", "rigid", "--levels", "0", "--quiet"])
    assert code == 0
    start, end = (regkit.read_transform(p / "transform.tfm").matrix for p in (result, tmp_path / "out"))
    assert torch.allclose(start, end, atol=1e-4)


@pytest.mark.parametrize("space", ["lps", "index"])
def test_points_space_holds_for_reading_and_writing(pair, space, tmp_path):
    ndim = _ndim(pair)
    fixed = regkit.read_image(pair / "fixed.nii.gz")
    points = regkit.read_points(pair / "fixed.csv", ndim=ndim)
    regkit.write_points(points, tmp_path / "there.csv", space=space, image=fixed)
    common = ["register", *_scans(pair), "--levels", "0", "--quiet"]
    for folder, points, frame in (("ras", pair / "fixed.csv", "ras"), ("other", tmp_path / "there.csv", space)):
        words = ["-o", str(tmp_path / folder), "--fixed-points", str(points), "--points-space", frame]
        assert run([*common, *words]) in (0, 3)
    moving = regkit.read_image(pair / "moving.nii.gz")
    ras = regkit.read_points(tmp_path / "ras" / "fixed_in_moving.csv", ndim=ndim)
    other = regkit.read_points(tmp_path / "other" / "there_in_moving.csv", space=space, image=moving, ndim=ndim)
    assert torch.allclose(ras.world, other.world, atol=1e-6)


def test_what_is_said(pair, tmp_path, capsys):
    base = ["register", *_scans(pair), "--levels", "6"]
    assert run([*base, "-o", str(tmp_path / "a")]) == 0
    out, err = capsys.readouterr()
    assert "similarity" in out and str(tmp_path / "a" / "overlay.png") in out
    assert err and "\x1b" not in err  # plain lines where there is no terminal
    assert run([*base, "-o", str(tmp_path / "b"), "--quiet"]) == 0
    assert capsys.readouterr() == ("", "")
    assert run([*base, "-o", str(tmp_path / "c"), "--quiet", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["matrix"]


def test_equal_names_do_not_overwrite_each_other(pair, tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "seg.nii.gz").write_bytes((pair / "seg.nii.gz").read_bytes())
    labels = [arg for name in ("a", "b") for arg in ("--labels", str(tmp_path / name / "seg.nii.gz"))]
    assert run(["register", *_scans(pair), "-o", str(tmp_path / "out"), *labels, "--levels", "0", "--quiet"]) in (0, 3)
    assert {"a_seg_moved.nii.gz", "b_seg_moved.nii.gz"} <= {p.name for p in (tmp_path / "out").iterdir()}


def test_overwrite(pair, tmp_path, capsys):
    out = tmp_path / "out"
    base = ["register", *_scans(pair), "-o", str(out), "--levels", "0", "--quiet"]
    out.mkdir()  # an empty folder will do
    assert run(base) in (0, 3)
    before = _tree(out)
    assert run(base) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert _tree(out) == before
    assert run([*base, "--overwrite"]) in (0, 3)
    (out / "thesis.docx").write_text("years of work")
    before = _tree(out)
    assert run([*base, "--overwrite"]) == 2
    assert "thesis.docx" in capsys.readouterr().err
    assert _tree(out) == before
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


# ---- apply ----------------------------------------------------------------------------------------------------------------


def _apply(*words: object) -> int:
    return run(["apply", *[str(w) for w in words], "--quiet"])


def test_apply_equals_register(pair, result, tmp_path):
    with_transform = ["-t", result / "transform.tfm", "--like", pair / "fixed.nii.gz"]
    assert _apply(pair / "moving.nii.gz", *with_transform, "-o", tmp_path / "moved.nii.gz") == 0
    moved, goal = (np.asarray(nib.load(p).dataobj) for p in (tmp_path / "moved.nii.gz", result / "moved.nii.gz"))
    assert np.abs(moved - goal).max() < 1e-3 * np.ptp(goal)
    assert _apply(pair / "seg.nii.gz", *with_transform, "-o", tmp_path / "seg.nii.gz", "--interpolation", "nearest") == 0
    moved, goal = (np.asarray(nib.load(p).dataobj) for p in (tmp_path / "seg.nii.gz", result / "seg_moved.nii.gz"))
    assert (moved != goal).mean() < 1e-3
    assert _apply(pair / "moving.csv", *with_transform, "-o", tmp_path / "points.csv") == 0
    assert np.abs(_table(tmp_path / "points.csv")[1] - _table(result / "moving_in_fixed.csv")[1]).max() < 1e-4


@pytest.mark.parametrize("interpolation", ["auto", "linear", "cubic", "nearest", "vote"])
def test_apply_interpolations(pair, result, interpolation, tmp_path):
    source = "seg.nii.gz" if interpolation == "vote" else "moving.nii.gz"
    assert _apply(pair / source, "-t", result / "transform.tfm", "--like", pair / "fixed.nii.gz", "-o", tmp_path / "m.nii.gz",
                  "--interpolation", interpolation, "--fill", "-5", "--volume", "0") == 0
    assert nib.load(tmp_path / "m.nii.gz").shape == SHAPES[_ndim(pair)]


def test_apply_two_transforms_and_inverse_on_points(pair, result, tmp_path):
    """-t A -t B carries from moving to fixed through A first; --inverse goes back along the same way."""
    ndim = _ndim(pair)
    shift = torch.eye(ndim + 1, dtype=torch.float64)
    shift[0, ndim] = 5.0
    regkit.write_transform(regkit.Matrix(shift), tmp_path / "shift.tfm")
    both = ["-t", result / "transform.tfm", "-t", tmp_path / "shift.tfm"]
    if ndim == 2:  # pixels or mm? only a scan can tell
        assert _apply(pair / "moving.csv", *both, "-o", tmp_path / "no.csv") == 2
        both += ["--like", pair / "fixed.nii.gz"]
    assert _apply(pair / "moving.csv", *both, "-o", tmp_path / "there.csv") == 0
    expected = _table(result / "moving_in_fixed.csv")[1] - np.array([5.0, 0, 0])
    assert np.abs(_table(tmp_path / "there.csv")[1] - expected).max() < 1e-4
    assert _apply(tmp_path / "there.csv", *both, "--inverse", "-o", tmp_path / "back.csv") == 0
    assert np.abs(_table(tmp_path / "back.csv")[1] - _table(pair / "moving.csv")[1]).max() < 1e-4


def test_apply_index_points(pair, result, tmp_path):
    ndim = _ndim(pair)
    moving, fixed = (regkit.read_image(pair / n) for n in ("moving.nii.gz", "fixed.nii.gz"))
    regkit.write_points(regkit.read_points(pair / "moving.csv", ndim=ndim), tmp_path / "i.csv", space="index", image=moving)
    assert _apply(tmp_path / "i.csv", "-t", result / "transform.tfm", "-o", tmp_path / "o.csv", "--points-space", "index",
                  "--points-on", pair / "moving.nii.gz", "--like", pair / "fixed.nii.gz") == 0
    found = regkit.read_points(tmp_path / "o.csv", space="index", image=fixed).world.numpy()
    assert np.abs(found - _table(result / "moving_in_fixed.csv")[1][:, :ndim]).max() < 1e-4


def test_apply_overwrites_only_when_told(pair, result, tmp_path, capsys):
    (tmp_path / "m.nii.gz").write_bytes(b"precious")
    words = [pair / "moving.nii.gz", "-t", result / "transform.tfm", "--like", pair / "fixed.nii.gz",
             "-o", tmp_path / "m.nii.gz"]
    assert _apply(*words) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert (tmp_path / "m.nii.gz").read_bytes() == b"precious"
    assert _apply(*words, "--overwrite") == 0
    assert nib.load(tmp_path / "m.nii.gz").shape == SHAPES[_ndim(pair)]
    assert [p.name for p in tmp_path.iterdir()] == ["m.nii.gz"]
