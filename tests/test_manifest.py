"""The example manifest follows the schema that data/README.md states."""

import csv
import re
from pathlib import Path, PurePosixPath

DATA = Path(__file__).resolve().parents[1] / "data"
COLUMNS = ["id", "group", "fixed", "moving", "fixed_labels", "moving_labels", "fixed_points", "moving_points", "fixed_mask",
           "moving_mask", "points_space", "ndim"]


def _rows() -> list[dict[str, str]]:
    with (DATA / "example-pairs.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file, strict=True))


def test_columns_are_those_of_the_schema():
    assert list(_rows()[0]) == COLUMNS
    table = (DATA / "README.md").read_text(encoding="utf-8").split("## Manifest")[1]
    stated = [name for row in re.findall(r"^\| (`.+?) \|", table, flags=re.M) for name in re.findall(r"`(\w+)`", row)]
    assert stated == COLUMNS


def test_rows_follow_the_schema():
    rows = _rows()
    assert len({row["id"] for row in rows}) == len(rows)
    for row in rows:
        assert row["id"] and row["fixed"] and row["moving"]
        assert row["ndim"] in ("", "2", "3")
        assert row["points_space"] in ("", "ras", "lps", "index")
        for column in COLUMNS[2:-2]:
            path = PurePosixPath(row[column])
            assert not path.is_absolute() and ".." not in path.parts and "\\" not in row[column]
        for kind in ("labels", "points"):  # a truth on one side only can measure nothing
            assert bool(row[f"fixed_{kind}"]) == bool(row[f"moving_{kind}"])


def test_no_scans_lie_here():
    assert sorted(file.name for file in DATA.iterdir()) == ["README.md", "example-pairs.csv"]
