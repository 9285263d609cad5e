"""Landmark tables: frames, other columns, and what is refused."""

from __future__ import annotations

import json

import nibabel as nib
import numpy as np
import pytest
import torch

from regkit.errors import FormatError, GeometryError, OptionError, OutputError
from regkit.image import Image
from regkit.io import Points, read_image, read_points, write_points
from regkit.space import Grid

AFFINE = np.array([[-2.0, 0.1, 0, 10], [0, 1.5, 0.2, -20], [0.3, 0, 3, 5], [0, 0, 0, 1]])


def image_of(ndim: int, pixels: bool = False) -> Image:
    affine = torch.from_numpy(AFFINE) if ndim == 3 else torch.tensor([[-1.0, 0, 0], [0, -1, 0], [0, 0, 1]])
    shape = (6, 5, 4)[:ndim]
    return Image(torch.zeros(1, 1, *shape), Grid(shape, affine), pixels=pixels)


def saved(tmp_path, text, name="p.csv"):
    (tmp_path / name).write_text(text, encoding="utf-8")
    return tmp_path / name


def test_csv_columns_in_any_order_and_others_kept(tmp_path):
    path = saved(tmp_path, '\ufeffname, Z ,x,Y,group\nnose,3,1,2,a\n"ear, left",6,4,5.5,b\n')
    points = read_points(path)
    assert points.world.dtype == torch.float64 and points.world.tolist() == [[1, 2, 3], [4, 5.5, 6]]
    assert points.columns == ("name", "group") and points.rows == (("nose", "a"), ("ear, left", "b"))
    moved = points.with_world(points.world + 1)
    text = write_points(moved, tmp_path / "q.csv").read_text()
    assert text == 'x,y,z,name,group\n2.0,3.0,4.0,nose,a\n5.0,6.5,7.0,"ear, left",b\n'
    assert read_points(tmp_path / "q.csv").rows == points.rows


@pytest.mark.parametrize(
    "text", ["1,2,3\n4,5,6\n", "1;2;3\n4;5;6\n", "1\t2\t3\n4\t5\t6\n", "1 2  3\n\n4 5 6", "# made by\n1,2,3\r\n4,5,6\r\n"]
)
def test_bare_numbers(tmp_path, text):
    assert read_points(saved(tmp_path, text)).world.tolist() == [[1, 2, 3], [4, 5, 6]]


@pytest.mark.parametrize("space", ["ras", "lps", "index"])
@pytest.mark.parametrize("ndim", [2, 3])
def test_round_trip_in_every_space(tmp_path, ndim, space):
    image = image_of(ndim)
    world = torch.from_numpy(np.random.default_rng(0).normal(size=(20, ndim)) * 80)
    path = write_points(Points(world), tmp_path / "p.csv", space=space, image=image)
    table = np.loadtxt(path, delimiter=",", skiprows=1)
    expected = {
        "ras": world,
        "lps": world * torch.tensor([-1.0, -1, 1])[:ndim],
        "index": torch.from_numpy(nib.affines.apply_affine(np.linalg.inv(image.grid.affine[0]), world)),
    }[space]
    assert np.allclose(table[:, :ndim], expected, atol=2e-9) and (ndim == 3 or not table[:, 2].any())
    assert torch.allclose(read_points(path, space=space, image=image).world, world, atol=1e-6)


def test_pictures_are_always_pixels(tmp_path):
    image = image_of(2, pixels=True)
    path = saved(tmp_path, "x,y\n3,4\n0,1\n")
    for space in ("ras", "lps", "index"):
        points = read_points(path, space=space, image=image)
        assert points.world.tolist() == [[-3, -4], [0, -1]]
        out = write_points(points, tmp_path / "q.csv", space=space, image=image, overwrite=True)
        assert out.read_text() == "x,y,z\n3.0,4.0,0.0\n0.0,1.0,0.0\n"


def test_two_dimensions_and_z(tmp_path):
    flat, zero, deep = (
        saved(tmp_path, t, n)
        for n, t in [("a.csv", "x,y\n1,2\n"), ("b.csv", "x,y,z\n1,2,0\n"), ("c.csv", "x,y,z\n1,2,0\n1,2,9\n")]
    )
    image = image_of(2)
    assert read_points(flat).ndim == 2 and read_points(zero).ndim == 3
    for path in (flat, zero):
        assert read_points(path, image=image).world.tolist() == [[1, 2]] == read_points(path, ndim=2).world.tolist()
    for arguments in ({"image": image}, {"ndim": 2}, {"image": image, "space": "index"}):
        with pytest.raises(GeometryError, match=r"moving_points: .*c.csv: point 2 has z = 9, but the image is 2D"):
            read_points(deep, name="moving_points", **arguments)
    with pytest.raises(FormatError, match=r"no column z"):
        read_points(flat, image=image_of(3))
    axial = read_image((np.ones((6, 5)), np.array([[2.0, 0, 0, 1], [0, 2, 0, 1], [0, 0, 5, 37], [0, 0, 0, 1]])))
    assert read_points(saved(tmp_path, "1,2,37.5\n3,4,0\n"), image=axial).world.tolist() == [[1, 2], [3, 4]]
    with pytest.raises(GeometryError, match=r"z = 40"):
        read_points(saved(tmp_path, "1,2,40\n"), image=axial)


@pytest.mark.parametrize("space", ["ras", "lps"])
@pytest.mark.parametrize("order", [(1, 2, 0), (0, 2, 1), (2, 0, 1)])
def test_slices_of_other_planes_take_3d_points(tmp_path, order, space):
    affine = np.eye(4)
    affine[:3, :3] = (np.eye(3)[:, list(order)] + 0.05 * np.triu(np.ones((3, 3)), 1)) @ np.diag([1.5, 0.7, 3])
    affine[:3, 3] = 5, -7, 37
    image = read_image((np.ones((20, 30)), affine))
    index = np.array([[2.0, 3], [19, 0], [7.5, 20]])
    world = nib.affines.apply_affine(affine, np.c_[index, np.zeros(3)])
    given = world * ([-1, -1, 1] if space == "lps" else 1)
    path = saved(tmp_path, "x,y,z\n" + "\n".join(",".join(map(repr, map(float, row))) for row in given))
    points = read_points(path, image=image, space=space)
    assert points.ndim == 2 and np.allclose(image.grid.to_index(points.world[None])[0], index, atol=1e-9)
    out = np.loadtxt(write_points(points, tmp_path / "q.csv", image=image, space=space), delimiter=",", skiprows=1)
    assert np.allclose(out, given, atol=1e-8)


@pytest.mark.parametrize(
    "header,sign",
    [
        ("# CoordinateSystem = LPS\n", -1),
        ("# CoordinateSystem = RAS\n", 1),
        ("# CoordinateSystem = 0\n", 1),
        ("# CoordinateSystem = 1\n", -1),
        ("", 1),
    ],
)
def test_slicers_fcsv(tmp_path, header, sign):
    text = (
        "# Markups fiducial file version = 4.11\n"
        + header
        + "# columns = id,x,y,z,ow,ox,oy,oz,vis,sel,lock,label,desc,associatedNodeID\n"
        'vtkMRML_0,10.5,-20,30,0,0,0,1,1,1,0,AC,,\nvtkMRML_1,1,2,3,0,0,0,1,1,1,0,"P,C",,\n'
    )
    points = read_points(saved(tmp_path, text, "f.fcsv"), space="lps")  # its own word wins
    assert points.world.tolist() == [[sign * 10.5, sign * -20, 30], [sign * 1, sign * 2, 3]]
    assert points.columns == ("label",) and points.rows == (("AC",), ("P,C",))


@pytest.mark.parametrize("frame,sign", [("LPS", -1), ("RAS", 1)])
def test_slicers_json(tmp_path, frame, sign):
    placed = [
        {"id": "1", "label": "AC", "position": [10.5, -20, 30], "positionStatus": "defined"},
        {"id": "2", "label": "PC", "position": [1, 2, 3]},
        {"id": "3", "label": "?", "position": [0, 0, 0], "positionStatus": "undefined"},
    ]
    text = json.dumps({"markups": [{"type": "Fiducial", "coordinateSystem": frame, "controlPoints": placed}]})
    points = read_points(saved(tmp_path, text, "f.mrk.json"), space="ras")
    assert points.world.tolist() == [[sign * 10.5, sign * -20, 30], [sign * 1, sign * 2, 3]] and points.rows == (
        ("AC",),
        ("PC",),
    )


@pytest.mark.parametrize(
    "name,text,match",
    [
        ("a.csv", "", "holds no points"),
        ("a.csv", "x,y,z\n", "holds no points"),
        ("a.csv", "x,y,z\n1,2,3\n1,b,3\n", "row 3: 'b' is not a number"),
        ("a.csv", "x,y,z\n1,nan,3\n", "row 2: nan is not a finite number"),
        ("a.csv", "x,y,z\n1,,3\n", "row 2: '' is not a number"),
        ("a.csv", "1,2,3\n1,2\n", "row 2: 2 cells; expected 3"),
        ("a.csv", "1,2,3,4\n", "4 columns and no header"),
        ("a.csv", "i,j,k\n1,2,3\n", "no columns x and y"),
        ("a.csv", "1,2,1e999\n", "no|finite"),
        ("a.csv", "\0\1", "a.csv"),
        ("a.fcsv", "# CoordinateSystem = XYZ\n", "expected RAS or LPS"),
        ("a.fcsv", "id,1,2\n", "row 1: 3 cells"),
        ("a.fcsv", "# CoordinateSystem = LPS\n", "holds no points"),
        ("a.mrk.json", "{", "not 3D Slicer's markups"),
        ("a.mrk.json", "[]", "not 3D Slicer's markups"),
        ("a.mrk.json", '{"markups": [{"controlPoints": [{"position": [1, 2]}]}]}', "point 1: 2 coordinates"),
        ("a.mrk.json", '{"markups": [{"controlPoints": [{"position": ["x", 2, 3]}]}]}', "'x' is not a number"),
        ("a.mrk.json", '{"markups": []}', "holds no points"),
    ],
)
def test_refusals(tmp_path, name, text, match):
    path = saved(tmp_path, text, name)
    with pytest.raises(FormatError, match=match) as caught:
        read_points(path, name="fixed_points")
    assert str(caught.value).startswith("fixed_points: ") and name in str(caught.value) and "\n" not in str(caught.value)


def test_other_refusals(tmp_path):
    path = saved(tmp_path, "1,2,3\n")
    with pytest.raises(OptionError, match=r"space: 'mni' is not known"):
        read_points(path, space="mni")
    with pytest.raises(OptionError, match=r"index.*give the image"):
        read_points(path, space="index")
    with pytest.raises(FormatError, match=r"gone.csv does not exist"):
        read_points(tmp_path / "gone.csv")
    (tmp_path / "b.csv").write_bytes(b"\xff\xfe\x80" * 9)
    with pytest.raises(FormatError, match=r"cannot be read as text"):
        read_points(tmp_path / "b.csv")
    points = Points(torch.zeros(2, 3))
    with pytest.raises(OutputError, match=r"p.csv exists"):
        write_points(points, path)
    with pytest.raises(FormatError, match=r"written as .csv"):
        write_points(points, tmp_path / "a.fcsv")
    with pytest.raises(GeometryError, match=r"3D, but the image is 2D"):
        write_points(points, tmp_path / "q.csv", image=image_of(2))
    for world, columns, rows in [(torch.zeros(2, 4), (), ()), (torch.zeros(2, 3), ("a",), (("1",),)), (torch.zeros(3), (), ())]:
        with pytest.raises(GeometryError, match=r"points: "):
            Points(world, columns, rows)


@pytest.mark.parametrize("text,reason", [
    ("x,y,z\n1_000,2,3\n", "'1_000' is not a number"), ("x,y,z\n١,2,3\n", "is not a number"), ("x,y,x\n1,2,3\n", "has a column twice"),
    ("a," * 100_000 + "\n", "has no columns x and y"), ("x,y,z\n1,2," + "a" * 100_000 + "\n", "is not a number"),
    ("x,y,z\n" + "1," * 100_000 + "\n", "cells; expected 3"), ("x,y,z\n1,2," + "9" * 400 + "\n", "is not a finite number"),
])
def test_tables_that_are_hostile(tmp_path, text, reason):
    with pytest.raises(FormatError, match=reason) as caught:
        read_points(saved(tmp_path, text))
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize("position", ["[1, 2, " + "9" * 400 + "]", "[1, 2, true]", '["1", "2", "3"]', "[1, 2, NaN]", "[1, 2, null]",
                                      '"123"'], ids=["long", "true", "words", "NaN", "null", "a word"])
def test_markups_whose_positions_are_no_numbers(tmp_path, position):
    text = '{"markups": [{"coordinateSystem": "RAS", "controlPoints": [{"label": "a", "position": HERE}]}]}'.replace("HERE", position)
    with pytest.raises(FormatError, match=r"is not a (finite )?number"):
        read_points(saved(tmp_path, text, "p.mrk.json"))


def test_a_mark_within_a_name_ends_no_line(tmp_path):
    points = read_points(saved(tmp_path, "name,x,y,z\nleft\u2028ear\x0b1,1,2,3\nb,4,5,6\n"))
    assert points.rows == (("left\u2028ear\x0b1",), ("b",)) and len(points) == 2


def test_half_a_character_in_a_name_is_written_as_a_question_mark(tmp_path):
    text = '{"markups": [{"coordinateSystem": "RAS", "controlPoints": [{"label": "a\\ud800", "position": [1, 2, 3]}]}]}'
    path = write_points(read_points(saved(tmp_path, text, "p.mrk.json")), tmp_path / "q.csv")
    assert path.read_text(encoding="utf-8") == "x,y,z,label\n1.0,2.0,3.0,a?\n"
