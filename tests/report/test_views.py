"""Planes for a page: a landmark's pixel is the voxel it marks, however the scan is stored, and outlines lie where labels end."""

import base64
import io
import json

import numpy as np
import pytest
import torch
from PIL import Image as Picture

from regkit.errors import GeometryError
from regkit.image import Image
from regkit.report.planes import window
from regkit.report.views import MOST_ARROWS, view
from regkit.space import Grid, Matrix


def decoded(address: str) -> np.ndarray:
    """Rows and columns (and channels) of a picture's data address."""
    return np.asarray(Picture.open(io.BytesIO(base64.b64decode(address.partition(",")[2]))))


def grey(address: str) -> np.ndarray:
    return decoded(address)[..., 0].astype(int)


def drawn(address: str) -> np.ndarray:
    """Which pixels of an outline are not transparent."""
    picture = Picture.open(io.BytesIO(base64.b64decode(address.partition(",")[2])))
    return np.asarray(picture.convert("RGBA"))[..., 3] > 0


def _turned(degrees: float, ndim: int) -> torch.Tensor:
    angle = np.deg2rad(degrees)
    turn = torch.eye(ndim + 1, dtype=torch.float64)
    turn[:2, :2] = torch.tensor([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    return turn


# (shape, affine): as stored RAS, mirrored, permuted, oblique, anisotropic, and two slices
GRIDS = {
    "RAS": ((30, 36, 32), torch.diag(torch.tensor([1.0, 1, 1, 1], dtype=torch.float64))),
    "LPI": ((30, 36, 32), torch.diag(torch.tensor([-1.0, -1, -1, 1], dtype=torch.float64))),
    "permuted": ((30, 36, 32), torch.tensor([[0, 0, -2.0, 9], [1.5, 0, 0, -4], [0, 1, 0, 7], [0, 0, 0, 1]], dtype=torch.float64)),
    "oblique": ((30, 36, 32), _turned(25, 3) @ torch.diag(torch.tensor([1.0, -1.2, 1.1, 1], dtype=torch.float64))),
    "thick": ((40, 40, 14), torch.diag(torch.tensor([-1.0, 1, 5, 1], dtype=torch.float64))),
    "2D": ((40, 52), torch.diag(torch.tensor([1.0, 1, 1], dtype=torch.float64))),
    "2D oblique": ((40, 52), _turned(-20, 2) @ torch.diag(torch.tensor([-1.0, 0.7, 1], dtype=torch.float64))),
}


def scan(name: str, at: tuple[int, ...] | None = None) -> Image:
    """A dark box with a bright block in a corner; with `at` one more voxel is bright."""
    shape, affine = GRIDS[name]
    data = torch.zeros(1, 1, *shape)
    data[(0, 0, *(slice(2, n - 2) for n in shape))] = 0.2
    data[(0, 0, *(slice(2, 10) for _ in shape))] = 1.0
    if at is not None:
        data[(0, 0, *at)] = 1.0
    return Image(data, Grid(shape, affine))


@pytest.mark.parametrize("name", GRIDS)
def test_a_landmark_lies_on_the_pixel_of_its_voxel(name):
    shape = GRIDS[name][0]
    at = tuple(2 * n // 3 + k for k, n in enumerate(shape))
    fixed = scan(name, at)
    place = fixed.grid.to_world(torch.tensor([[at]], dtype=torch.float64))[0]
    shown = view(fixed, fixed, Matrix.identity(fixed.ndim), fixed_points=place, moving_points=place)
    assert [p["name"] for p in shown["planes"]] == (["axial", "coronal", "sagittal"] if fixed.ndim == 3 else ["scan"])
    for plane in shown["planes"]:
        picture = grey(plane["fixed"])
        assert picture.shape == (plane["height"], plane["width"])
        x1, y1, x2, y2 = plane["arrows"]["after"][0]
        assert (x1, y1) == (x2, y2)
        voxel = max(fixed.grid.spacing[0].tolist()) / plane["mm_per_pixel"]
        rows, columns = np.indices(picture.shape)
        near = np.hypot(columns + 0.5 - x1, rows + 0.5 - y1) < 2.5 * voxel
        rows, columns = np.nonzero(near & (picture > 0.75 * picture.max()))
        assert rows.size
        assert abs(columns.mean() + 0.5 - x1) < 0.15 * voxel + 0.5
        assert abs(rows.mean() + 0.5 - y1) < 0.15 * voxel + 0.5


def test_stored_order_does_not_matter():
    generator = torch.Generator().manual_seed(0)
    data = torch.rand(1, 1, 24, 28, 20, generator=generator)
    fixed = Image(data, Grid((24, 28, 20), torch.diag(torch.tensor([1.0, 1.5, 2, 1], dtype=torch.float64))))
    stored = torch.zeros(4, 4, dtype=torch.float64)  # new (19 - k, i, j) → old (i, j, k)
    stored[0, 1] = stored[1, 2] = stored[3, 3] = 1
    stored[2, 0], stored[2, 3] = -1, 19
    again = Image(data.permute(0, 1, 4, 2, 3).flip(2), Grid((20, 24, 28), fixed.grid.affine[0] @ stored))
    one, two = (view(image, image, Matrix.identity(3))["planes"] for image in (fixed, again))
    for a, b in zip(one, two, strict=True):
        assert (a["name"], a["width"], a["height"], a["sides"]) == (b["name"], b["width"], b["height"], b["sides"])
        assert np.abs(grey(a["fixed"]) - grey(b["fixed"])).mean() < 12  # the middle voxel may be its neighbour, seen from behind


def test_sides():
    """The patient's right is on the left of the axial plane, anterior is up."""
    fixed = scan("RAS")
    data = torch.zeros_like(fixed.data)
    data[..., 20:27, 25:33, 2:30] = 1.0  # right, anterior
    shown = view(fixed, fixed.with_data(data), Matrix.identity(3))["planes"][0]
    rows, columns = np.nonzero(grey(shown["after"]) > 200)
    assert rows.mean() < shown["height"] / 2 and columns.mean() < shown["width"] / 2
    assert shown["sides"] == ["R", "L"]


@pytest.mark.parametrize("name", GRIDS)
def test_the_same_scan_under_the_identity_gives_the_same_picture(name):
    fixed = scan(name, tuple(n // 2 for n in GRIDS[name][0]))
    shown = view(fixed, fixed, Matrix.identity(fixed.ndim))
    assert all(p["fixed"] == p["before"] == p["after"] for p in shown["planes"])
    assert shown["outside"] == [] and shown["points"] is None
    assert json.loads(json.dumps(shown)) == shown


def test_before_and_after_are_carried_by_their_maps():
    fixed = scan("RAS", (15, 18, 16))
    moving = Image(fixed.data, Grid(fixed.grid.shape, Matrix.shift(torch.tensor([[6.0, 0, 0]], dtype=torch.float64)).matrix[0]))
    truth = Matrix.shift(torch.tensor([[6.0, 0, 0]], dtype=torch.float64))
    shown = view(fixed, moving, truth)
    for plane in shown["planes"]:
        assert np.abs(grey(plane["fixed"]) - grey(plane["after"])).mean() < 1
        assert np.abs(grey(plane["fixed"]) - grey(plane["before"])).mean() > 1
    started = view(fixed, moving, truth, before=truth)
    assert all(plane["before"] == plane["after"] for plane in started["planes"])


def test_arrows_have_their_true_length_and_stay_near_the_plane():
    fixed = scan("oblique")
    world = fixed.grid.points()[0][::7]
    offset = torch.tensor([3.0, -4.0, 0.0], dtype=torch.float64)
    shown = view(fixed, fixed, Matrix.identity(3), fixed_points=world, moving_points=world + offset)
    assert shown["points"]["after"]["mean"] == pytest.approx(5.0)
    axial = shown["planes"][0]
    assert len(axial["arrows"]["after"]) == MOST_ARROWS and axial["arrows_left_out"] > 0
    ends = np.array(axial["arrows"]["after"])
    lengths = np.hypot(ends[:, 2] - ends[:, 0], ends[:, 3] - ends[:, 1]) * axial["mm_per_pixel"]
    assert np.abs(lengths - 5).max() < 0.05
    few = view(fixed, fixed, Matrix.identity(3), fixed_points=world[:1].repeat(2, 1) + torch.tensor([[0, 0, 0], [0, 0, 20.0]]),
               moving_points=world[:2])
    assert all(len(plane["arrows"]["after"]) <= 2 for plane in few["planes"])


class Bent:
    """A map without an inverse."""

    ndim = 3

    def __call__(self, points):
        return points + 2.0

    def inverse(self):
        raise NotImplementedError


def test_a_map_without_inverse_is_shown_by_the_error_it_leaves():
    fixed = scan("RAS", (15, 18, 16))
    place = fixed.grid.to_world(torch.tensor([[[15.0, 18, 16]]], dtype=torch.float64))[0]
    shown = view(fixed, fixed, Bent(), fixed_points=place, moving_points=place + 2)
    assert shown["points"]["after"]["largest"] == pytest.approx(0, abs=1e-9)
    assert shown["points"]["before"]["mean"] == pytest.approx(12**0.5)


def test_points_that_are_not_finite_are_left_out():
    fixed = scan("2D")
    here = torch.tensor([[10.0, 10], [torch.nan, 3]])
    assert view(fixed, fixed, Matrix.identity(2), fixed_points=here, moving_points=here)["points"]["n"] == 1


def _labels(fixed: Image, low: int, high: int, label: int = 3) -> Image:
    data = torch.zeros(fixed.data.shape, dtype=torch.int16)
    data[(0, 0, *(slice(low, high),) * fixed.ndim)] = label
    return Image(data, fixed.grid)


@pytest.mark.parametrize("name", ["RAS", "LPI", "2D"])
def test_outlines_lie_where_labels_end(name):
    fixed = scan(name)
    labels = _labels(fixed, 10, 22)
    shown = view(fixed, fixed, Matrix.identity(fixed.ndim), fixed_labels=labels, moving_labels=labels)
    for plane in shown["planes"]:
        assert decoded(plane["contours"]["fixed"]).shape == (plane["height"], plane["width"])
        border = drawn(plane["contours"]["fixed"])
        assert np.array_equal(border, drawn(plane["contours"]["after"]))
        rows, columns = np.nonzero(border)
        inner = border[rows.min() + 2: rows.max() - 1, columns.min() + 2: columns.max() - 1]
        assert border.any() and not inner.any()  # a frame, with nothing in it
        side = 12 / plane["mm_per_pixel"]
        assert abs(rows.max() - rows.min() + 1 - side) < 2 and abs(columns.max() - columns.min() + 1 - side) < 2
    assert shown["planes"][0]["contours"]["fixed"] != shown["planes"][0]["contours"]["after"]  # of another colour


def test_labels_of_another_tool_take_the_place_of_carried_ones():
    fixed = scan("RAS")
    labels, other = _labels(fixed, 10, 22), _labels(fixed, 12, 20)
    shown = view(fixed, fixed, None, fixed_labels=labels, moving_labels=labels, moved_labels=other)["planes"][0]
    assert shown["after"] is None and "after" not in shown["arrows"]
    assert drawn(shown["contours"]["after"]).sum() < drawn(shown["contours"]["before"]).sum()


def test_labels_that_fixed_lacks_are_not_drawn():
    fixed = scan("RAS")
    shown = view(fixed, fixed, Matrix.identity(3), fixed_labels=_labels(fixed, 3, 22), moving_labels=_labels(fixed, 3, 22, label=9))
    assert not drawn(shown["planes"][0]["contours"]["after"]).any()
    alone = view(fixed, fixed, Matrix.identity(3), moving_labels=_labels(fixed, 3, 22, label=9))["planes"][0]
    assert drawn(alone["contours"]["after"]).any() and alone["contours"]["fixed"] is None


def test_planes_go_through_the_labels_even_where_their_middle_is_empty():
    fixed = scan("RAS")
    labels = _labels(fixed, 3, 6)
    labels.data[..., 24:27, 24:27, 24:27] = 3
    for plane in view(fixed, fixed, Matrix.identity(3), fixed_labels=labels)["planes"]:
        assert drawn(plane["contours"]["fixed"]).any()


def test_a_scan_that_lies_elsewhere_is_said_to():
    fixed = scan("RAS")
    away = Matrix.shift(torch.tensor([[500.0, 0, 0]], dtype=torch.float64))
    assert view(fixed, fixed, away)["outside"] == ["after"]
    assert view(fixed, fixed, None, before=away)["outside"] == ["before"]


def test_ct_is_shown_in_the_window_of_its_body():
    values = np.full((20, 20, 20), -1000.0)
    values[4:16, 4:16, 4:16] = 40
    values[8:10, 8:10, 8:10] = 1500
    low, high = window(values)
    assert -300 < low <= 40 and high <= 500
    values[5:15, 5:15, 5:12] = -800  # lungs
    assert window(values)[0] == -1000


def test_colour_nan_constant_and_batches_are_shown():
    grid = GRIDS["2D"]
    colour = torch.randint(0, 255, (2, 3, *grid[0]), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    holes = torch.rand(1, 1, *grid[0], generator=torch.Generator().manual_seed(1))
    holes[..., :9] = torch.nan
    flat = Image(torch.ones(1, 1, *grid[0]), Grid(*grid))
    for image in (Image(colour, Grid(*grid)), Image(holes, Grid(*grid)), flat):
        assert grey(view(image, flat, Matrix.identity(2))["planes"][0]["fixed"]).shape[0] > 100


def test_a_view_is_small():
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(1, 1, 24, 28, 24, generator=generator)
    fine = torch.nn.functional.interpolate(coarse, (150, 180, 150), mode="trilinear")
    fixed = Image(fine + 0.05 * torch.rand(fine.shape, generator=generator), Grid(tuple(fine.shape[2:]), torch.eye(4, dtype=torch.float64)))
    labels = fixed.with_data((fine * 8).to(torch.int16))
    shown = view(fixed, fixed, Matrix.shift(torch.ones(1, 3, dtype=torch.float64)), fixed_labels=labels, moving_labels=labels)
    assert len(json.dumps(shown)) < 300_000


def test_what_does_not_go_together_is_refused():
    flat, solid = scan("2D"), scan("RAS")
    with pytest.raises(GeometryError, match="moving is 2D, fixed is 3D"):
        view(solid, flat, Matrix.identity(3))
    with pytest.raises(GeometryError, match="expected"):
        view(flat, flat, Matrix.identity(2), fixed_points=torch.zeros(3, 2), moving_points=torch.zeros(2, 2))
