"""Whole evaluations of a small cohort: right numbers, other tools' files, failures, resuming."""

import csv
import json
import shutil

import numpy as np
import pandas
import pytest
import SimpleITK as sitk
import torch

import regkit
from regkit import Matrix
from regkit.errors import OptionError, OutputError
from regkit.evaluation import Evaluation, evaluate, load
from regkit.evaluation.statistics import MEASURES


def _folder(root, truth, write):
    for name, transform in truth.items():
        (root / name).mkdir(parents=True)
        write(root / name, transform)
    return root


def _tfm(folder, transform):
    regkit.write_transform(transform, folder / "transform.tfm")


def _field(folder, transform):
    """The same shift as ITK's displacement field, LPS."""
    d = transform.ndim
    shift = transform.matrix[0, :d, d].numpy() * np.array([-1, -1, 1])[:d]
    field = sitk.GetImageFromArray(np.tile(shift, (*[30] * d, 1)), isVector=True)
    field.SetSpacing([5.0] * d)
    field.SetOrigin([-140.0] * 2 + [-20.0] * (d - 2))
    sitk.WriteImage(field, str(folder / "displacement.nii.gz"))


def _row(found: Evaluation, case: str, method: str):
    return found.cases[(found.cases["id"] == case) & (found.cases["method"] == method)].iloc[0]


def test_a_known_map_by_every_road(cohort, tmp_path):
    """transform.tfm, an ITK field, labels with points, and a function that gives the matrix: all score the same."""
    path, truth = cohort
    home = path.parent

    def parts(folder, transform):
        name = folder.name
        moving = regkit.read_image(home / f"{name}-moving-labels.nii.gz")
        moved = regkit.apply(moving, transform, like=regkit.read_image(home / f"{name}-fixed-labels.nii.gz"), interpolation="nearest")
        regkit.write_image(moved, folder / "labels.nii.gz")
        points = regkit.read_points(home / f"{name}-fixed.csv", ndim=transform.ndim)
        regkit.write_points(points.with_world(transform(points.world[None])[0]), folder / "points.csv")
        (folder / "run.json").write_text('{"seconds": 12.5, "peak_mb": 300, "verdict": {"status": "WARN", "probability": 0.5}}')

    methods = {"tfm": _folder(tmp_path / "a", truth, _tfm), "field": _folder(tmp_path / "b", truth, _field),
               "parts": _folder(tmp_path / "c", truth, parts), "function": lambda case: truth[case.id].matrix[0].numpy()}
    found = evaluate(path, methods, pictures=False)
    assert list(found.cases["status"]) == ["ok"] * 8
    for name in truth:
        first = _row(found, name, "tfm")
        assert first["dice"] > 0.97 > first["dice_before"] and first["hd95_mm"] <= 2.0 < first["hd95_before_mm"]
        assert first["tre_mm"] == pytest.approx(0, abs=1e-6)
        assert first["tre_before_mm"] == pytest.approx(float(np.linalg.norm((6.0, -4.0, 3.0)[:found.cases.loc[first.name, "ndim"]])))
        for other in ("field", "parts", "function"):
            row = _row(found, name, other)
            for measure in ("dice", "jaccard", "hd95_mm", "asd_mm", "surface_dice", "tre_before_mm"):
                assert row[measure] == pytest.approx(first[measure], abs=1e-5), (other, measure)
            assert row["tre_mm"] == pytest.approx(0, abs=1e-4)
        assert _row(found, name, "parts")[["seconds", "verdict", "probability"]].tolist() == [12.5, "WARN", 0.5]
        assert pandas.isna(first["verdict"])  # another tool's files say nothing of the kind
        assert _row(found, name, "field")["folds_percent"] == 0
    assert len(found.points) == 2 * 4 * 4 and len(found.labels) == 2 * 3 * 4
    assert set(found.summary["group"]) == {"all", "2D", "3D"}


def test_align_resume_and_files(cohort, tmp_path):
    path, truth = cohort
    out, told = tmp_path / "out", []
    found = evaluate(path, output=out, jobs=2, progress=lambda *state: told.append(state))
    assert told[0] == (0, 2, "") and told[-1][:2] == (2, 2)
    for name, transform in truth.items():
        record = json.loads((out / "regkit" / name / "registration.json").read_text())["verdict"]
        assert _row(found, name, "regkit")[["verdict", "probability"]].tolist() == [record["status"], record["probability"]]
        assert _row(found, name, "regkit")["tre_mm"] < 0.6
        stored = regkit.read_transform(out / "regkit" / name / "transform.tfm")
        points = torch.tensor([[[30.0] * transform.ndim]], dtype=torch.float64)
        assert float((stored(points) - transform(points)).norm()) < 1.0
    rows = list(csv.DictReader((out / "cases.csv").read_text().splitlines()))
    assert list(rows[0])[:10] == ["id", "group", "method", "status", "dice_before", "dice", "hd95_before_mm", "hd95_mm",
                                  "tre_before_mm", "tre_mm"]
    summary = json.loads((out / "summary.json").read_text())
    assert summary["methods"] == ["regkit"] and {row["measure"] for row in summary["table"]} >= {"dice", "hd95_mm", "tre_mm", "seconds"}
    assert "| regkit | Dice | 2 |" in (out / "summary.md").read_text()

    stamps = {p: p.stat().st_mtime_ns for p in (out / "regkit").rglob("*") if p.is_file()}
    (out / "cases" / "blobs-2d.json").unlink()  # as an interrupt leaves it
    again: list = []
    second = evaluate(path, output=out, jobs=1, progress=lambda *state: again.append(state))
    assert again == [(1, 2, ""), (2, 2, "blobs-2d")]
    assert {p: p.stat().st_mtime_ns for p in stamps} == stamps  # aligned once
    assert second.cases.drop(columns=["seconds", "peak_mb"]).equals(found.cases.drop(columns=["seconds", "peak_mb"]))
    assert load(out).cases.equals(second.cases)
    page = second.report(out / "report.html").read_text()
    assert "blobs-2d" in page and "blobs-3d" in page
    assert "2 cases" in second._repr_html_()


def test_a_broken_case_is_the_worst_and_the_rest_goes_on(cohort, tmp_path):
    path, truth = cohort
    pairs = json.loads(path.read_text())
    pairs.append({**pairs[0], "id": "gone", "moving": "nowhere.nii.gz"})
    pairs.append({**pairs[1], "id": "crumbs", "fixed_labels": "crumbs.nii.gz"})
    (path.parent / "crumbs.nii.gz").write_bytes(b"not a scan")
    path.write_text(json.dumps(pairs))
    folder = _folder(tmp_path / "a", truth, _tfm)
    shutil.rmtree(folder / "blobs-3d")  # this tool failed on one
    found = evaluate(path, {"tool": folder}, output=tmp_path / "out", pictures=False)
    assert list(found.failed["id"]) == ["blobs-3d", "gone", "crumbs"]
    lost = _row(found, "blobs-3d", "tool")
    image = regkit.read_image(path.parent / "blobs-3d-fixed.nii.gz")
    diagonal = float(np.linalg.norm(np.array(image.grid.shape) * image.grid.spacing[0].numpy()))
    assert (lost["dice"], lost["surface_dice"]) == (0, 0) and lost["hd95_mm"] == pytest.approx(diagonal) == pytest.approx(lost["asd_mm"])
    assert lost["tre_mm"] == pytest.approx(diagonal / 2) and lost["undefined"] == 3
    assert "no result" in lost["reason"] and lost["badness"] == 1
    gone = _row(found, "gone", "tool")
    assert "nowhere.nii.gz does not exist" in gone["reason"] and gone["dice"] == 0
    flat = float(np.hypot(72, 64))  # its own fixed scan is there, and 2D
    assert gone["hd95_mm"] == pytest.approx(flat) and gone["tre_mm"] == pytest.approx(flat / 2) and np.isnan(gone["dice_before"])
    dice = found.summary[(found.summary["group"] == "all") & (found.summary["measure"] == "dice")].iloc[0]
    assert dice["n"] == 4 and dice["undefined"] == 3
    assert dice["mean"] == pytest.approx(found.cases["dice"].mean())


def test_a_label_that_moved_lacks_counts_as_the_worst(cohort, tmp_path):
    path, _truth = cohort
    far = {name: Matrix.shift(torch.full((1, int(name[-2])), 500.0, dtype=torch.float64)) for name in ("blobs-2d", "blobs-3d")}
    found = evaluate(path, {"far": lambda case: far[case.id]}, pictures=False)
    row = _row(found, "blobs-2d", "far")
    assert row["undefined"] == 3 and row["hd95_mm"] == pytest.approx(float(np.hypot(72, 64))) and row["status"] == "ok"
    assert row["badness"] > 0.9 and "off on average" in row["why"]


def test_methods_that_give_nonsense(cohort, tmp_path):
    path, truth = cohort
    both = _folder(tmp_path / "a", truth, _tfm)
    for name in truth:
        shutil.copy(both / name / "transform.tfm", both / name / "transform.txt")
    found = evaluate(path, {"both": both, "word": lambda case: "a word", "flat": lambda case: np.eye(3),
                            "right": lambda case: truth[case.id]})
    assert "holds transform.tfm and transform.txt; expected one map" in _row(found, "blobs-2d", "both")["reason"]
    assert list(found.cases[found.cases["method"] == "right"]["status"]) == ["ok", "ok"]  # one's fault is not another's
    assert "flat gave a 2D map, the scans are 3D; expected a matrix (4, 4)" in _row(found, "blobs-3d", "flat")["reason"]
    assert "gave a str; expected a Registration, a transform or a matrix" in _row(found, "blobs-2d", "word")["reason"]


@pytest.mark.parametrize(("methods", "message"), [
    ({}, "none given"), ("runs/ants", "a str; expected names and what they stand for"),
    ({"a b": len}, "'a b' is no name"), ({"cases": len}, "is no name"), ({"x": "no/such"}, "is no folder"),
    ({"x": 3}, "a int; expected a folder, Settings or a function")])
def test_methods_are_checked_first(cohort, methods, message):
    with pytest.raises(OptionError, match=message):
        evaluate(cohort[0], methods)


def test_options_and_folders_are_checked_first(cohort, tmp_path):
    path, _ = cohort
    with pytest.raises(OptionError, match="baseline: 'ants' is none of the methods regkit"):
        evaluate(path, baseline="ants")
    with pytest.raises(OptionError, match="jobs: 0"):
        evaluate(path, jobs=0, output=tmp_path / "o")
    with pytest.raises(OptionError, match="tolerance: -1"):
        evaluate(path, tolerance=-1)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years")
    with pytest.raises(OutputError, match=r"holds thesis.txt and is no evaluation's"):
        evaluate(path, output=tmp_path / "mine")
    with pytest.raises(OptionError, match="holds no evaluation"):
        load(tmp_path / "mine")


def test_landmarks_named_in_another_order_are_refused(cohort, tmp_path):
    path, truth = cohort
    points = path.parent / "blobs-2d-moving.csv"
    head, *rows = points.read_text().splitlines()
    points.write_text("\n".join([head, *rows[::-1]]) + "\n")
    found = evaluate(path, {"right": lambda case: truth[case.id]}, pictures=False)
    assert "landmark 1 is called 'p3', in fixed_points 'p0'" in _row(found, "blobs-2d", "right")["reason"]
    assert set(found.points["point"]) == {"p0", "p1", "p2", "p3"}


def test_pictures_are_measured_in_pixels_whatever_their_resolution_tag(tmp_path):
    """Two disks 10 pixels apart, 300 dpi: errors and surface distances are pixels, and the means say so."""
    from PIL import Image as Picture

    x = np.stack(np.meshgrid(np.arange(80), np.arange(60), indexing="ij"), -1)
    for name, centre in (("fixed", (30, 30)), ("moving", (40, 30))):
        disk = (((x - centre) ** 2).sum(-1) < 144).T
        Picture.fromarray((200 * disk).astype(np.uint8)).save(tmp_path / f"{name}.png", dpi=(300, 300))
        Picture.fromarray(disk.astype(np.uint8)).save(tmp_path / f"{name}_labels.png", dpi=(300, 300))
        (tmp_path / f"{name}.csv").write_text(f"x,y\n{centre[0]},{centre[1]}\n")
    row = {"id": "disks", **{f"{side}": f"{side}.png" for side in ("fixed", "moving")},
           **{f"{side}_labels": f"{side}_labels.png" for side in ("fixed", "moving")},
           **{f"{side}_points": f"{side}.csv" for side in ("fixed", "moving")}}
    (tmp_path / "pairs.json").write_text(json.dumps([row]))
    found = evaluate(tmp_path / "pairs.json", {"identity": lambda case: np.eye(3)}, pictures=False)
    first = found.cases.iloc[0]
    assert first["unit"] == "px" and first["tre_mm"] == pytest.approx(10, abs=1e-3) and 7 < first["hd95_mm"] <= 10
    measures = {r["measure"] for r in found.record()["table"]}
    assert {"tre_px", "hd95_px", "asd_px"} <= measures and not {"tre_mm", "hd95_mm", "asd_mm"} & measures


def test_turned_copies_are_told_as_captured(cohort, tmp_path):
    """A turned copy that the tool solves and one that it leaves as it lies."""
    path, truth = cohort
    pairs = json.loads(path.read_text())
    turn = torch.eye(3, dtype=torch.float64)
    turn[:2, :2] = torch.tensor([[0.0, -1.0], [1.0, 0.0]])
    home = pairs[0]
    for name in ("solved", "left"):
        for kind in ("", "-labels"):
            image = regkit.read_image(path.parent / f"blobs-2d-moving{kind}.nii.gz")
            grid = regkit.Grid(image.grid.shape, turn[None] @ image.grid.affine)
            regkit.write_image(regkit.Image(image.data, grid), path.parent / f"{name}{kind}.nii.gz")
        pairs.append({**home, "id": name, "moving": f"{name}.nii.gz", "moving_labels": f"{name}-labels.nii.gz", "fixed_points": None,
                      "moving_points": None, "of": "blobs-2d", "angle": 90, "truth": turn.tolist()})
    path.write_text(json.dumps(pairs))
    maps = {**truth, "solved": Matrix(turn) @ truth["blobs-2d"], "left": truth["blobs-2d"]}
    found = evaluate(path, {"tool": _folder(tmp_path / "a", maps, _tfm)}, pictures=False, output=tmp_path / "out")
    assert found.record()["capture"] == [{"method": "tool", "angle": 90.0, "captured": 1, "cases": 2}]
    assert bool(_row(found, "solved", "tool")["captured"]) and not bool(_row(found, "left", "tool")["captured"])
    assert _row(found, "solved", "tool")["reference_dice"] == pytest.approx(_row(found, "solved", "tool")["dice"])


def test_every_measure_has_a_name():
    assert all({"name", "unit", "better"} <= about.keys() and about["better"] in ("high", "low") for about in MEASURES.values())
