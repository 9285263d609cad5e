"""`regkit replay`: the same inputs and record give the same bytes, in any process, on any number of threads; and where they do not,
it says by how much."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from scipy.ndimage import affine_transform, gaussian_filter

import regkit
from regkit.cli import run
from regkit.io import sha256
from regkit.localisation import RegressionNet
from regkit.registration.nets import save

ROOT = Path(__file__).resolve().parents[2]
SHAPES = {2: (44, 40), 3: (26, 24, 22)}


def scene(ndim: int, folder: Path) -> None:
    """Blobs seen twice, 10° and some mm apart, with what is carried along; the moving scan has finer voxels."""
    shape = SHAPES[ndim]
    draw = np.random.default_rng(ndim)
    at = np.stack(np.meshgrid(*[np.arange(n) - (n - 1) / 2 for n in shape], indexing="ij"), -1)
    body = (((at / (0.42 * np.array(shape))) ** 2).sum(-1) < 1) * 60.0
    fixed = gaussian_filter(body + 400 * gaussian_filter(draw.normal(size=shape), 2.0), 1.0).astype(np.float32)
    c, s = np.cos(np.deg2rad(10)), np.sin(np.deg2rad(10))
    turn = np.eye(ndim)
    turn[:2, :2] = [[c, -s], [s, c]]
    middle = (np.array(shape) - 1) / 2
    moving = affine_transform(fixed, turn.T, middle - turn.T @ middle, order=3, mode="nearest").astype(np.float32)
    affine = np.diag([*[2.0] * ndim, *[1.0] * (4 - ndim)])
    there = affine.copy()
    there[0, 3] = 5.0
    for name, voxels, where in (("fixed", fixed, affine), ("moving", moving, there)):
        nib.Nifti1Image(voxels, where).to_filename(folder / f"{name}.nii.gz")
        nib.Nifti1Image(np.ones(shape, np.uint8), where).to_filename(folder / f"{name}_mask.nii.gz")
    nib.Nifti1Image((moving > 30).astype(np.uint8), there).to_filename(folder / "seg.nii.gz")
    rows = [",".join(f"{v:g}" for v in (20 + k, 22 - k, 20 + k)[:ndim]) + (",0" if ndim == 2 else "") for k in range(3)]
    (folder / "points.csv").write_text("\n".join(["x,y,z", *rows]) + "\n")


@pytest.fixture(scope="module", params=[2, 3], ids=["2D", "3D"])
def registered(request, tmp_path_factory) -> Path:
    """A folder with scans, and in `out` their registration with everything carried along, from a start in a file."""
    folder = tmp_path_factory.mktemp(f"replay{request.param}")
    scene(request.param, folder)
    shift = torch.eye(request.param + 1, dtype=torch.float64)
    shift[0, -1] = 4.0
    regkit.write_transform(regkit.Matrix(shift), folder / "start.tfm")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert run(["register", "fixed.nii.gz", "moving.nii.gz", "-o", "out", "--model", "rigid", "--start", "start.tfm", "--levels", "6,3",
                    "--fixed-mask", "fixed_mask.nii.gz", "--moving-mask", "moving_mask.nii.gz", "--labels", "seg.nii.gz",
                    "--fixed-points", "points.csv", "--moving-points", "points.csv", "--quiet"]) in (0, 3)
    return folder


@pytest.fixture
def place(registered, tmp_path, monkeypatch) -> Path:
    """A copy of it, which is where the command runs."""
    shutil.copytree(registered, tmp_path / "there")
    monkeypatch.chdir(tmp_path / "there")
    return tmp_path / "there"


def record(folder: Path) -> dict:
    return json.loads((folder / "registration.json").read_text())


def said(capsys) -> dict:
    return json.loads(capsys.readouterr().out)


def edit(place: Path, **changes) -> None:
    (place / "out" / "registration.json").write_text(json.dumps({**record(place / "out"), **changes}))


# --------------------------------------------------------------------------------------------------------------- the same bytes

def _hash(result: regkit.Registration, folder: Path) -> dict[str, str]:
    result.save(folder)
    return {p.name: sha256(p) for p in folder.iterdir() if p.name != "registration.json"} | {"matrix": repr(result.matrix.tolist())}


@pytest.mark.parametrize("options", [{}, {"similarity": "mi", "start": "header"}, {"model": "tps", "control": 3, "start": "header"},
                                     {"interpolation": "cubic", "start": "search", "model": "similarity"}], ids=str)
def test_one_process_gives_the_same_bytes_again_and_on_more_threads(registered, options, tmp_path):
    scans = [registered / name for name in ("fixed.nii.gz", "moving.nii.gz")]
    before = torch.get_num_threads()
    found = []
    try:
        for number, threads in enumerate((1, 1, 2, 3)):
            torch.set_num_threads(threads)  # what resampling and packing take
            found.append(_hash(regkit.align(*scans, levels=[6, 3], threads=threads, **options), tmp_path / str(number)))
    finally:
        torch.set_num_threads(before)
    assert found[1:] == found[:1] * 3


def test_a_scan_that_shrinks_obliquely_is_smoothed_alike_on_any_number_of_threads():
    """Products of matrices shared among two and four threads had other last bits than on one."""
    data = torch.rand(1, 1, 150, 40, 32, generator=torch.Generator().manual_seed(0))
    grid = regkit.Grid((150, 40, 32), torch.diag(torch.tensor([1.0, 1, 3, 1])))
    image = regkit.Image(data, grid)
    like = regkit.Grid((20, 20, 30), torch.diag(torch.tensor([6.0, 4, 4, 1])))
    turn = torch.tensor([[-0.1676, 0.0302, -0.9854, 140], [-0.9848, 0.0411, 0.1688, 30], [0.0456, 0.9987, 0.0228, 5], [0, 0, 0, 1]])
    from regkit.sampling import warp

    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3, 4):
            torch.set_num_threads(threads)
            found.append([warp(image, regkit.Matrix(turn.double()), like, kernel=kernel).data for kernel in ("linear", "cubic")])
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


def test_another_process_gives_the_same_files_at_another_place_and_time(registered, tmp_path):
    """All of them but the record, which says when and where, and the page, which says the record."""
    for file in registered.glob("*.*"):
        shutil.copy(file, tmp_path / f"other-{file.name}")
    words = ["register", "other-fixed.nii.gz", "other-moving.nii.gz", "-o", "elsewhere", "--model", "rigid", "--start", "other-start.tfm",
             "--levels", "6,3", "--fixed-mask", "other-fixed_mask.nii.gz", "--moving-mask", "other-moving_mask.nii.gz", "--quiet"]
    found = []
    for threads in ("1", "2"):
        environment = {**os.environ, "OMP_NUM_THREADS": threads, "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": threads}
        done = subprocess.run([sys.executable, "-m", "regkit", *words, "--overwrite"], cwd=tmp_path, env=environment)
        assert done.returncode in (0, 3)
        found.append({p.name: p.read_bytes() for p in (tmp_path / "elsewhere").iterdir() if p.suffix in (".gz", ".tfm", ".png")})
    assert found[0] == found[1] and sorted(found[0]) == ["moved.nii.gz", "overlay.png", "transform.tfm"]
    assert all((registered / "out" / name).read_bytes() == content for name, content in found[0].items())


# ------------------------------------------------------------------------------------------------------------------ the record

def test_the_record_holds_what_it_takes(registered):
    said = record(registered / "out")
    assert set(said["inputs"]) == {"fixed", "moving", "fixed_mask", "moving_mask", "start"}
    assert all(item["sha256"] == sha256(registered / item["path"]) for item in said["inputs"].values())
    assert said["carried"]["sha256"] == {name: sha256(registered / name) for name in ("seg.nii.gz", "points.csv")}
    assert set(said["versions"]) == {"regkit", "torch", "numpy", "nibabel", "SimpleITK", "isal", "python"}
    assert set(said["machine"]) == {"system", "cpu", "instructions"} and all(said["machine"].values())
    assert said["nets"] == {}
    names = {"moved.nii.gz", "transform.tfm", "seg_moved.nii.gz", "points_in_fixed.csv", "points_in_moving.csv"}
    assert said["outputs"] == {name: sha256(registered / "out" / name) for name in names}


@pytest.mark.parametrize("name", ["out", "out/registration.json"])
def test_it_is_done_again_and_found_the_same(place, name, capsys):
    before = sorted(place.rglob("*"))
    assert run(["replay", name, "--json", "--quiet"]) == 0
    found = said(capsys)
    assert found["verdict"] == "same" and found["matrix"] and set(found["files"].values()) == {True} and len(found["files"]) == 5
    assert found["largest_displacement_mm"] == 0 and found["largest_voxel_difference"] == 0
    assert found["differs"] == {} and found["changed"] == [] and found["notes"] == []
    assert sorted(place.rglob("*")) == before


def test_another_process_finds_it_the_same_and_says_so(place):
    environment = {**os.environ, "OMP_NUM_THREADS": "2", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-m", "regkit", "replay", "out"], cwd=place, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].split() == ["matrix", "the", "same"] and lines[-1].endswith("the same, bit for bit")


def test_the_second_result_is_kept_where_told(place, capsys):
    assert run(["replay", "out", "-o", "again", "--quiet"]) == 0
    assert capsys.readouterr() == ("", "")
    first, second = place / "out", place / "again"
    assert sorted(p.name for p in first.iterdir()) == sorted(p.name for p in second.iterdir())
    for name in (*record(first)["outputs"], "overlay.png"):
        assert (first / name).read_bytes() == (second / name).read_bytes()
    assert record(second)["settings"] == record(first)["settings"] | {"device": "cpu", "max_memory": "0"}
    assert run(["replay", "out", "-o", "again"]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert run(["replay", "again", "-o", "again", "--overwrite"]) == 2
    assert "holds the record itself" in capsys.readouterr().err


def test_curved_maps_are_done_again(registered, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(registered)
    assert run(["register", "fixed.nii.gz", "moving.nii.gz", "-o", str(tmp_path / "tps"), "--model", "tps", "--control", "3", "--start",
                "header", "--levels", "6,3", "--quiet"]) in (0, 3)
    assert run(["replay", str(tmp_path / "tps"), "--json", "--quiet"]) == 0
    found = said(capsys)
    assert found["verdict"] == "same" and found["largest_displacement_mm"] == 0
    assert set(found["files"]) == {"moved.nii.gz", "transform.json", "displacement.nii.gz"}
    (tmp_path / "tps" / "transform.json").unlink()  # the record knows its hash
    assert run(["replay", str(tmp_path / "tps"), "--json", "--quiet"]) == 0
    assert said(capsys)["largest_displacement_mm"] is None


def test_a_net_is_part_of_the_record(registered, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    ndim = 2 if "replay2" in registered.name else 3
    for file in registered.glob("*.nii.gz"):
        shutil.copy(file, tmp_path)
    torch.manual_seed(0)
    for _ in range(2):  # the second time other weights
        save(RegressionNet(16, ndim, "affine", width=8, hidden=8), tmp_path / "run" / "net.safetensors", edge=16, mm=6.0, overwrite=True)
        if not (tmp_path / "out").exists():
            assert run(["register", "fixed.nii.gz", "moving.nii.gz", "-o", "out", "--start", "net:run", "--model", "rigid", "--levels", "6",
                        "--quiet"]) in (0, 3)
            begun = record(tmp_path / "out")["inputs"]["start"]
            assert begun == {"path": "run", "sha256": sha256(tmp_path / "run" / "net.safetensors")}
            assert run(["replay", "out", "--quiet"]) == 0
    assert run(["replay", "out"]) == 2
    assert "start: run has changed since the registration" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------------ what is different

INPUTS = ["fixed.nii.gz", "moving_mask.nii.gz", "seg.nii.gz", "points.csv", "start.tfm"]


@pytest.mark.parametrize("name", INPUTS)
def test_an_input_that_has_gone_is_named(place, name, capsys):
    (place / name).unlink()
    assert run(["replay", "out", "-o", "again"]) == 2
    line = capsys.readouterr().err
    assert len(line.splitlines()) == 1 and name in line and "is not there" in line and "register again" in line
    assert not (place / "again").exists()


@pytest.mark.parametrize("name", INPUTS)
def test_an_input_that_has_changed_is_refused_unless_told(place, name, capsys):
    blob = (place / name).read_bytes()
    (place / name).write_bytes(blob + (b"" if name.endswith("gz") else b"\n"))
    if name.endswith("gz"):  # the same voxels, packed otherwise
        nib.Nifti1Image(np.asarray(nib.load(place / name).dataobj), nib.load(place / name).affine).to_filename(place / "x.nii")
        import gzip

        (place / name).write_bytes(gzip.compress((place / "x.nii").read_bytes(), 9))
    assert run(["replay", "out"]) == 2
    line = capsys.readouterr().err
    assert len(line.splitlines()) == 1 and f"{name} has changed since the registration" in line and "--changed" in line
    assert run(["replay", "out", "--changed", "--json", "--quiet"]) == 0
    out, err = capsys.readouterr()
    assert f"{name} has changed" in err and json.loads(out)["verdict"] == "same"
    assert len(json.loads(out)["changed"]) == 1 + (name == "points.csv")


def test_a_changed_scan_gives_another_result_and_exit_code_3(place, capsys):
    image = nib.load(place / "moving.nii.gz")
    affine = image.affine.copy()
    affine[0, 3] += 3.0
    nib.Nifti1Image(np.asarray(image.dataobj), affine).to_filename(place / "moving.nii.gz")
    assert run(["replay", "out", "--changed", "--quiet", "--json"]) == 3
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert found["verdict"] == "different" and not found["matrix"] and not found["files"]["transform.tfm"]
    assert found["largest_displacement_mm"] == pytest.approx(3.0, abs=0.3)  # all of the map is shifted
    assert found["largest_voxel_difference"] > 0 and found["voxel_range"] > 10
    assert "versions and machine are those of then" in err and "exit code 3" in err


def _shifted(place: Path, mm: float) -> list[list[float]]:
    matrix = record(place / "out")["matrix"]
    return [[*matrix[0][:-1], matrix[0][-1] + mm], *matrix[1:]]


@pytest.mark.parametrize(("mm", "other", "code", "verdict"), [(0.1, True, 0, "close"), (0.1, False, 3, "different"),
                                                              (0.5, True, 3, "different")])
def test_other_machines_may_differ_by_a_tenth_of_a_voxel(place, mm, other, code, verdict, capsys):
    """And one machine by nothing. Voxels are 2 mm wide."""
    said_then = record(place / "out")
    machine = {**said_then["machine"], **({"cpu": "Pentium"} if other else {})}
    versions = {**said_then["versions"], **({"torch": "2.0.0"} if other else {})}
    edit(place, matrix=_shifted(place, mm), machine=machine, versions=versions)
    assert run(["replay", "out", "--json", "--quiet"]) == code
    found = said(capsys)
    assert found["verdict"] == verdict and found["largest_displacement_mm"] == pytest.approx(mm)
    assert found["tolerance_mm"] == pytest.approx(0.2)
    assert set(found["differs"]) == ({"cpu", "torch"} if other else set())
    assert run(["replay", "out"]) == code
    out = capsys.readouterr().out
    assert f"{mm:.3g} mm over the fixed field of view" in out
    assert ("torch: 2.0.0 then" in out) is other


def test_voxels_are_compared_too(place, capsys):
    """Files of other bytes: the voxels tell by how much, if the first ones are still there."""
    path = place / "out" / "moved.nii.gz"
    voxels = np.asarray(nib.load(path).dataobj).copy()
    voxels.flat[voxels.size // 2] += 7.0
    nib.Nifti1Image(voxels, nib.load(path).affine).to_filename(path)
    hashes = record(place / "out")["outputs"]
    assert run(["replay", "out", "--quiet"]) == 0  # the record knows what was written
    edit(place, outputs={**hashes, "moved.nii.gz": sha256(path)})
    assert run(["replay", "out", "--json", "--quiet"]) == 3
    found = said(capsys)
    assert found["largest_voxel_difference"] == pytest.approx(7.0, rel=1e-4) and found["largest_displacement_mm"] == 0
    edit(place, outputs={**hashes, "moved.nii.gz": "0" * 64})
    assert run(["replay", "out", "--json", "--quiet"]) == 3
    found = said(capsys)
    assert found["largest_voxel_difference"] is None and "has changed since it was written" in found["notes"][0]


def test_a_record_from_before_is_compared_with_the_files_beside_it(place, capsys):
    old = record(place / "out")
    for key in ("outputs", "machine", "nets"):
        old.pop(key)
    old["inputs"].pop("start")
    old["carried"].pop("sha256")
    (place / "out" / "registration.json").write_text(json.dumps(old))
    assert run(["replay", "out", "--json", "--quiet"]) == 0
    found = said(capsys)
    assert found["verdict"] == "same" and set(found["files"].values()) == {True}
    shutil.move(place / "out" / "registration.json", place / "alone.json")
    assert run(["replay", "alone.json", "--json", "--quiet"]) == 0
    found = said(capsys)
    assert found["verdict"] == "same" and set(found["files"].values()) == {None} and found["notes"]


@pytest.mark.parametrize(("changes", "words"), [
    ({"settings": None}, "holds no settings"),
    ({"settings": {"model": "rigid", "wings": 2}, "versions": {"regkit": "9.9"}}, "the setting wings, which this regkit does not know; "
     "replay it with regkit 9.9"),
    ({"settings": {"model": "rigidd"}}, "nearest: rigid"),
    ({"inputs": {"fixed": {}, "moving": {}}}, "fixed: out/registration.json names no file"),
], ids=lambda v: "" if isinstance(v, dict) else v[:20])
def test_a_record_that_cannot_be_done_again_is_refused(place, changes, words, capsys):
    edit(place, **changes)
    assert run(["replay", "out"]) == 2
    line = capsys.readouterr().err
    assert words in line and len(line.splitlines()) == 1


def test_no_record_no_replay(tmp_path, capsys):
    assert run(["replay", str(tmp_path)]) == 2
    assert "does not exist" in capsys.readouterr().err
