"""What a registration will take of memory, by the headers: right, never less for more, and what becomes of a limit."""

import json
import os
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
import torch
from scipy.ndimage import gaussian_filter, zoom

import regkit
from regkit import Grid, OptionError, Settings
from regkit.cli import run
from regkit.io.footprint import Footprint, footprint
from regkit.registration import memory
from regkit.registration.memory import available, plan, predicted

ROOT = Path(__file__).resolve().parents[2]


def header(shape, mm=1.0, itemsize=2, reading=0) -> Footprint:
    affine = torch.diag(torch.tensor([*[mm] * len(shape), 1.0], dtype=torch.float64))
    return Footprint(Grid(shape, affine), 1, itemsize, reading)


def blobs(shape, dtype=np.int16, seed=0):
    """The same smooth blobs in any shape, made coarse and enlarged."""
    draw = np.random.default_rng(seed).normal(size=[24] * len(shape))
    coarse = gaussian_filter(draw, 1.0)
    full = zoom(coarse, [n / m for n, m in zip(shape, coarse.shape, strict=True)], order=1)[tuple(slice(n) for n in shape)]
    return (1000 * full / np.abs(full).max()).astype(dtype)


def save(path, shape, mm, dtype=np.int16, shift=0.0):
    affine = np.diag([*[mm] * len(shape), *[1.0] * (4 - len(shape))])
    affine[0, 3] = shift
    nib.Nifti1Image(blobs(shape, dtype), affine).to_filename(path)


# ------------------------------------------------------------------------------------------------------------------ the model

@pytest.mark.parametrize("ndim", [2, 3])
def test_more_voxels_never_take_less(ndim):
    edges = [(64, 128, 256, 512), (400, 1600, 6400)][ndim == 2]
    small, *_ = scans = [header((n,) * ndim, mm=200 / n) for n in edges]
    for model in ("affine", "tps"):
        found = [predicted(scan, scan, Settings(model=model)) for scan in scans]
        assert found == sorted(found) and found[-1] > 1.05 * found[0]
        one = [predicted(small, scan, Settings(model=model)) for scan in scans]
        assert one == sorted(one)
    big = scans[-1]
    assert predicted(big, big, Settings(), (big, None)) > predicted(big, big, Settings())
    assert predicted(big, big, Settings(interpolation="cubic")) >= predicted(big, big, Settings())
    dearer = [predicted(small, small, Settings(similarity=name)) for name in ("ncc", "ngf", "mind", "auto")]
    assert dearer == sorted(set(dearer))
    finer = [predicted(small, small, Settings(levels=levels)) for levels in ("12", "6", "3", "2")]
    assert finer == sorted(finer) and finer[-1] > finer[0]


def test_a_pair_of_large_ct_scans_takes_less_than_4_gigabytes():
    scan = header((512, 512, 800), 0.8, reading=470_000_000)
    assert predicted(scan, scan, Settings()) < 4e9


CHILD = """
import json, sys
from pathlib import Path
from regkit.cli import run
code = run(["register", "f.nii.gz", "m.nii.gz", "-o", "out", "--start", "header", "--quiet", *sys.argv[1:]])
peak = next(int(l.split()[1]) * 1024 for l in Path("/proc/self/status").read_text().splitlines() if l.startswith("VmHWM"))
print(json.dumps([code, peak]))
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the peak is read from /proc")
@pytest.mark.parametrize(("fixed", "moving", "dtype", "mm"), [((64, 64, 64), (64, 70, 60), np.int16, 3.0),
                                                              ((320, 320, 200), (300, 310, 220), np.float32, 0.7)], ids=["small", "middle"])
def test_the_peak_is_what_was_predicted(fixed, moving, dtype, mm, tmp_path):
    """Of a whole process, within a quarter; of the middle pair, so that libraries do not hide it, also without their share."""
    save(tmp_path / "f.nii.gz", fixed, mm, dtype)
    save(tmp_path / "m.nii.gz", moving, mm, dtype, shift=4.0)
    # of small scans what auto may choose, which large ones hide, and one thread: how two overlap is chance
    options = ["--similarity", "mind", "--threads", "1"] if max(fixed) < 100 else ["--threads", "2"]
    done = subprocess.run([sys.executable, "-c", CHILD, *options], cwd=tmp_path, capture_output=True, text=True, check=True,
                          env={**os.environ, "PYTHONPATH": str(ROOT)})
    code, peak = json.loads(done.stdout)
    assert code in (0, 3)
    said = json.loads((tmp_path / "out" / "registration.json").read_text())["memory"]["predicted"]
    assert abs(said - peak) < 0.25 * peak, (said, peak)
    if max(fixed) > 100:
        assert abs(said - peak) < 0.35 * (peak - memory.BASE), (said, peak)


# ------------------------------------------------------------------------------------------------------------------ the headers

@pytest.mark.parametrize("shape", [(20, 30), (20, 30, 25)], ids=["2D", "3D"])
@pytest.mark.parametrize(("dtype", "held"), [(np.uint8, 1), (np.int16, 2), (np.uint16, 4), (np.float32, 4), (np.float64, 4)])
def test_headers_say_what_reading_gives(shape, dtype, held, tmp_path):
    save(tmp_path / "a.nii.gz", shape, 2.0, dtype)
    sitk.WriteImage(sitk.GetImageFromArray(np.abs(blobs(shape[::-1])).astype(dtype)), str(tmp_path / "a.nrrd"))
    for name in ("a.nii.gz", "a.nrrd"):
        said, image = footprint(tmp_path / name), regkit.read_image(tmp_path / name)
        assert said is not None and not said.given
        assert (said.grid.shape, said.channels, said.itemsize) == (image.grid.shape, image.channels, image.data.element_size())
        assert said.itemsize == held and said.held == image.data.numel() * held
        assert torch.allclose(said.grid.affine, image.grid.affine) and said.reading > 0
        mine = footprint(image)
        assert mine is not None and mine.given and mine.held == 0


def test_of_a_series_one_volume_is_held_and_all_is_unpacked(tmp_path):
    nib.Nifti1Image(np.zeros((10, 12, 14, 6), np.int16), np.eye(4)).to_filename(tmp_path / "bold.nii.gz")
    said = footprint(tmp_path / "bold.nii.gz")
    assert said is not None and said.grid.shape == (10, 12, 14) and said.held == 10 * 12 * 14 * 2
    assert said.reading >= 5 * said.held


def test_what_is_no_scan_has_no_header(tmp_path):
    (tmp_path / "a.nii.gz").write_bytes(b"no scan")
    (tmp_path / "a.nrrd").write_bytes(b"no scan")
    for source in (tmp_path / "a.nii.gz", tmp_path / "a.nrrd", tmp_path / "b.nii.gz", tmp_path, tmp_path / "a.txt", 7, None):
        assert footprint(source) is None


# -------------------------------------------------------------------------------------------------------------------- the limit

@pytest.mark.parametrize(("text", "count"), [("4G", 4 * 10**9), ("800M", 8 * 10**8), ("3.5GiB", 3.5 * 2**30), ("123456", 123456), ("0", 0),
                                             ("auto", None), ("2 gb", 2 * 10**9)])
def test_limits_are_read(text, count):
    assert Settings(max_memory=text).memory_limit() == count


@pytest.mark.parametrize("text", ["4X", "much", "-1G", ""])
def test_what_is_no_limit_is_refused(text):
    with pytest.raises(OptionError, match=r"max-memory: .*; expected bytes, such as 4G"):
        Settings(max_memory=text)


def test_coarser_where_that_suffices_else_refused(monkeypatch):
    scan, settings = header((256, 256, 256)), Settings(levels="1")
    full = predicted(scan, scan, settings)
    least = predicted(scan, scan, Settings(levels="1", similarity="ngf"))
    assert plan(scan, scan, Settings(levels="1", max_memory=str(full))) == memory.Plan(least, full, full, 2_500_000) and least < 0.8 * full
    mind = plan(scan, scan, Settings(levels="1", similarity="mind", max_memory="0"))
    assert least < mind.predicted == mind.least == mind.worst < full  # auto may take lncc beside it
    assert not plan(scan, scan, Settings(levels="1", max_memory="0")).notes
    lowered = plan(scan, scan, Settings(levels="1", max_memory=str(int(0.8 * full))))
    assert lowered.lowered and lowered.least < lowered.predicted < lowered.worst <= 0.8 * full
    assert lowered.most < 2_500_000 and "at full resolution" in lowered.notes[0]
    with pytest.raises(OptionError, match=r"max-memory: this pair takes about .* at the coarsest resolution .* 100 MB are allowed; give "
                                          r"--max-memory \d+\.\dG"):
        plan(scan, scan, Settings(levels="1", max_memory="100M"))
    least = predicted(scan, scan, settings, most=memory.LEAST[3])
    monkeypatch.setattr(memory, "available", lambda: int(least / 1.2))  # perhaps too little
    unsure = plan(scan, scan, settings)
    assert unsure.most == 2_500_000 and not unsure.lowered and "it may take about" in unsure.notes[0]
    monkeypatch.setattr(memory, "available", lambda: int(least / 1.3))  # surely too little
    with pytest.raises(OptionError, match="are there"):
        plan(scan, scan, settings)
    monkeypatch.setattr(memory, "available", lambda: 0)  # nobody can tell
    assert plan(scan, scan, settings).worst == full


@pytest.fixture(params=[2, 3], ids=["2D", "3D"])
def place(request, tmp_path, monkeypatch):
    shape = ((300, 280), (60, 56, 50))[request.param - 2]
    save(tmp_path / "fixed.nii.gz", shape, 2.0)
    save(tmp_path / "moving.nii.gz", shape, 2.0, shift=3.0)
    monkeypatch.chdir(tmp_path)
    return request.param


WORDS = ["register", "fixed.nii.gz", "moving.nii.gz", "--model", "rigid", "--start", "header", "--levels", "8,2"]


def test_a_refusal_reads_no_voxels_and_writes_nothing(place, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("regkit.registration.align.read_image", lambda *given, **named: pytest.fail("voxels were read"))
    assert run([*WORDS, "-o", "out", "--max-memory", "50M", "--quiet"]) == 2
    line = capsys.readouterr().err
    assert len(line.splitlines()) == 1 and "max-memory: this pair takes about" in line and "50 MB are allowed" in line
    assert not (tmp_path / "out").exists()
    with pytest.raises(OptionError, match="50 MB are allowed"):
        regkit.align("fixed.nii.gz", "moving.nii.gz", max_memory=50_000_000)
    monkeypatch.setattr("regkit.io.read_image", lambda *given, **named: pytest.fail("voxels were read"))
    Path("marks.csv").write_text("x,y,z\n1,2,3\n")
    for words in (["--labels", "moving.nii.gz"], ["--fixed-points", "marks.csv"], ["--moving-points", "marks.csv"]):
        assert run([*WORDS, *words, "-o", "out", "--max-memory", "50M", "--quiet"]) == 2
        assert "50 MB are allowed" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_the_lowered_resolution_gives_a_result(place, tmp_path, capsys):
    scans = [footprint(name) for name in WORDS[1:3]]
    settings = Settings(model="rigid", start="header", levels="8,2")
    full, least = predicted(*scans, settings), predicted(*scans, settings, most=memory.LEAST[place])
    limit = int((full + least) / 2)
    assert run([*WORDS, "-o", "out", "--max-memory", str(limit)]) == 0
    assert "note        memory: at full resolution it would take about" in capsys.readouterr().out
    record = json.loads((tmp_path / "out" / "registration.json").read_text())
    assert record["memory"]["lowered"] and record["memory"]["worst"] <= limit == record["memory"]["limit"]
    assert record["levels_mm"][0] == 8.0 and 2.0 < record["levels_mm"][-1] <= 8.0
    assert np.linalg.norm(np.array(record["matrix"])[:-1, -1] - [3.0, *[0.0] * (place - 1)]) < 0.5
    found = regkit.align("fixed.nii.gz", "moving.nii.gz", settings=Settings(**record["settings"]))
    assert found.matrix.tolist() == record["matrix"]
    assert run(["replay", "out", "--quiet"]) == 0


def test_a_replay_is_as_fine_as_the_first_time_whatever_there_is_now(place, tmp_path, monkeypatch):
    scans = [footprint(name) for name in WORDS[1:3]]
    full = predicted(*scans, Settings(model="rigid", start="header", levels="8,2"))
    assert run([*WORDS, "-o", "out", "--quiet"]) == 0
    monkeypatch.setattr(memory, "available", lambda: full - 1)
    assert run([*WORDS, "-o", "coarser", "--quiet"]) == 0
    first, second = (json.loads((tmp_path / name / "registration.json").read_text()) for name in ("out", "coarser"))
    assert second["memory"]["lowered"] and first["levels_mm"] != second["levels_mm"]
    assert run(["replay", "out", "--quiet"]) == 0
    monkeypatch.setattr(memory, "available", lambda: 10**12)
    assert run(["replay", "coarser", "--quiet"]) == 0


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="read from /proc")
def test_what_there_is_counts_what_the_interpreter_has(monkeypatch):
    assert 0 < available() < 10**15
    monkeypatch.setattr(memory, "free", lambda: 123)
    assert 123 < available() <= 123 + memory.BASE
    monkeypatch.setattr(memory, "free", lambda: None)
    assert available() == 0
