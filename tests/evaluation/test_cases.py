"""Tables of cases: every form read, every fault named."""

import csv
import json

import pytest

from regkit.errors import FormatError, OptionError
from regkit.evaluation.cases import read_cases


def _touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"")


def test_csv_and_json_say_the_same(tmp_path):
    _touch(tmp_path, "a.nii.gz", "b.nii.gz")
    row = {"id": "one", "group": "g", "fixed": "a.nii.gz", "moving": "b.nii.gz", "fixed_labels": "la.nii.gz",
           "moving_labels": "lb.nii.gz", "ndim": 2}
    with (tmp_path / "c.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, row)
        writer.writeheader()
        writer.writerow(row)
    (tmp_path / "c.json").write_text(json.dumps({"pairs": [row]}))
    (tmp_path / "list.json").write_text(json.dumps([row]))
    tables = [read_cases(tmp_path / name) for name in ("c.csv", "c.json", "list.json")]
    assert tables[0] == tables[1] == tables[2]
    one = tables[0][0]
    assert (one.id, one.group, one.ndim, one.fixed) == ("one", "g", 2, str(tmp_path / "a.nii.gz"))


def test_a_semicolon_and_an_id_that_is_not_there(tmp_path):
    _touch(tmp_path, "a.nii.gz", "b.nii.gz")
    (tmp_path / "c.csv").write_text("fixed;moving\na.nii.gz;b.nii.gz\n")
    assert [c.id for c in read_cases(tmp_path / "c.csv")] == ["a--b"]


def test_a_learn2reg_data_set(tmp_path):
    _touch(tmp_path, *(f"{kind}Tr/L_{n:04d}_0000.nii.gz" for kind in ("images", "labels") for n in (1, 2, 3)),
           *(f"keypointsTr/L_{n:04d}_0000.csv" for n in (1, 2)))
    pairs = [{"fixed": f"./imagesTr/L_{a:04d}_0000.nii.gz", "moving": f"./imagesTr/L_{b:04d}_0000.nii.gz"} for a, b in ((1, 2), (3, 1))]
    (tmp_path / "L_dataset.json").write_text(json.dumps({"name": "L", "registration_val": pairs, "training": []}))
    first, second = read_cases(tmp_path)
    assert first.id == "L_0001_0000--L_0002_0000" and first.group == "L" and first.points_space == "index"
    assert first.fixed_labels.endswith("labelsTr/L_0001_0000.nii.gz") and first.moving_points.endswith("keypointsTr/L_0002_0000.csv")
    assert second.fixed_labels and not second.fixed_points  # the third scan has no keypoints


@pytest.mark.parametrize(("text", "message"), [
    ("", "expected a header with fixed and moving"),
    ("id,fixed\nx,a.nii.gz\n", "the columns 'id,fixed'"),
    ("id,fixed,moving\nx,a.nii.gz,\n", "pair 1: no moving"),
    ("id,fixed,moving\nx,a.nii.gz\n", "row 2: not as many cells"),
    ("id,fixed,moving\nx,c.nii.gz,d.nii.gz\n", "none of the fixed scans exists"),
    ("id,fixed,moving\nx,a.nii.gz,b.nii.gz\nx,b.nii.gz,a.nii.gz\n", "the id 'x' is there twice"),
    ("id,fixed,moving,fixed_labels\nx,a.nii.gz,b.nii.gz,l.nii.gz\n", "fixed_labels without moving_labels"),
    ("id,fixed,moving\n", "holds a header and no pairs"),
    ("id,fixed,moving,fixed_label\nx,a.nii.gz,b.nii.gz,l.nii.gz\n", "'fixed_label' is not known; is fixed_labels meant"),
    ("id,fixed,moving,ndim\nx,a.nii.gz,b.nii.gz,4\n", "ndim is 4; expected 2 or 3"),
    ("id,fixed,moving,ndim\nx,a.nii.gz,b.nii.gz,two\n", "expected numbers in ndim"),
])
def test_a_faulty_table_is_named(tmp_path, text, message):
    _touch(tmp_path, "a.nii.gz", "b.nii.gz")
    (tmp_path / "c.csv").write_text(text)
    with pytest.raises(FormatError, match=message):
        read_cases(tmp_path / "c.csv")


def test_other_faults(tmp_path):
    with pytest.raises(FormatError, match="does not exist"):
        read_cases(tmp_path / "no.csv")
    with pytest.raises(FormatError, match="holds 0 files"):
        read_cases(tmp_path)
    (tmp_path / "c.json").write_text("{")
    with pytest.raises(FormatError, match="is not JSON"):
        read_cases(tmp_path / "c.json")
    (tmp_path / "c.json").write_text('{"a": 1}')
    with pytest.raises(FormatError, match="is no list of pairs"):
        read_cases(tmp_path / "c.json")
    with pytest.raises(OptionError, match="no pairs"):
        read_cases([])
    _touch(tmp_path, "a.nii.gz")
    row = {"fixed": str(tmp_path / "a.nii.gz"), "moving": "b.nii.gz"}
    with pytest.raises(OptionError, match="points_space: 'voxel' is not known"):
        read_cases([{**row, "points_space": "voxel"}])


def test_turned_copies_by_their_ids_and_several_tables(tmp_path):
    _touch(tmp_path, "a.nii.gz", "b.nii.gz")
    row = {"fixed": "a.nii.gz", "moving": "b.nii.gz"}
    (tmp_path / "c.json").write_text(json.dumps([{**row, "id": "x"}]))
    turn = [[0, -1, 0], [1, 0, 0], [0, 0, 1]]
    (tmp_path / "d.json").write_text(json.dumps([{**row, "id": "x_pose90_s0", "truth": turn}, {**row, "id": "x_turn45_seed3"}]))
    found = read_cases([tmp_path / "c.json", tmp_path / "d.json"])
    assert [(c.id, c.of, c.angle) for c in found] == [("x", "", None), ("x_pose90_s0", "x", 90.0), ("x_turn45_seed3", "", None)]
    with pytest.raises(FormatError, match="the id 'x' is there twice"):
        read_cases([tmp_path / "c.json", tmp_path / "c.json"])


def test_ids_become_file_names(tmp_path):
    _touch(tmp_path, "a.nii.gz")
    row = {"fixed": str(tmp_path / "a.nii.gz"), "moving": "b.nii.gz"}
    assert [c.key for c in read_cases([{**row, "id": "../x:y\n"}, {**row, "id": "z.1"}])] == ["___x_y_", "z_1"]
    with pytest.raises(FormatError, match="the same as a file name"):
        read_cases([{**row, "id": "a/b"}, {**row, "id": "A_b"}])


HOSTILE = [
    ("a.json", '{"pairs": ' + "[" * 100_000 + "]" * 100_000 + "}", "is not JSON"),
    ("a.json", '{"registration_val": 7}', "is no list of pairs"),
    ("a.json", '[{"fixed": "a.nii", "moving": "b.nii", "angle": 1e999}]', "NaN or infinity"),
    ("a.json", '[{"fixed": "a.nii", "moving": "b.nii", "ndim": 2.7}]', "expected numbers in ndim"),
    ("a.json", '[{"fixed": "a.nii", "moving": "b.nii", "angle": %s}]' % ("9" * 400), "expected numbers in ndim, angle and truth"),
    ("a.json", '[{"fixed": "a.nii", "moving": "b.nii", "truth": [[1, 0], [1]]}]', "truth is no matrix"),
    ("a.csv", '"a" ,' * 60_000 + "\nfixed,moving\n", "is not a readable CSV table"),
    ("a.csv", "fixed,moving" + ",'a" * 30_000 + "\n1,2\n", "has 30002 columns; expected at most"),
    ("a.csv", "fixed,moving,fixed\na.nii,b.nii,c.nii\n", "has the column 'fixed' twice"),
    ("a.csv", "fixed,moving\n" + "a" * 200_000 + ",b.nii\n", "is not a readable CSV table"),
    ("a.csv", "fixed,moving\n" + "a" * 5000 + ",b.nii\n", "none of the fixed scans exists"),
    ("a.csv", "fixed,moving\n~nobody-here/a.nii,b.nii\n", "none of the fixed scans exists"),
]


@pytest.mark.parametrize(("name", "text", "reason"), HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_tables_are_refused_in_a_line(tmp_path, name, text, reason):
    (tmp_path / name).write_text(text)
    with pytest.raises(FormatError, match=reason) as caught:
        read_cases(tmp_path / name)
    assert len(str(caught.value)) < 1500


def test_a_data_frames_missing_numbers_are_nothing(tmp_path):
    pandas = pytest.importorskip("pandas")
    _touch(tmp_path, "a.nii.gz", "b.nii.gz")
    row = {"fixed": str(tmp_path / "a.nii.gz"), "moving": str(tmp_path / "b.nii.gz")}
    frame = pandas.DataFrame([{**row, "id": "a", "ndim": 2, "angle": 20.0}, {**row, "id": "b"}])
    assert [(case.ndim, case.angle) for case in read_cases(frame.to_dict("records"))] == [(2, 20.0), (3, None)]


def test_a_cell_may_hold_a_mark(tmp_path):
    _touch(tmp_path, "a.nii.gz", "b.nii.gz")
    (tmp_path / "c.csv").write_text('id;fixed;moving\n"x, y";a.nii.gz;b.nii.gz\n"two\nlines";a.nii.gz;b.nii.gz\n')
    assert [case.id for case in read_cases(tmp_path / "c.csv")] == ["x, y", "two\nlines"]
