"""The picture before and after: its size, its colours, and which side of the patient is where."""

import numpy as np
import pytest
import torch
from PIL import Image as Picture

from regkit.errors import GeometryError
from regkit.image import Image
from regkit.report.overlay import MAX_WIDTH, overlay
from regkit.space import Grid


def _affine(*spacing: float) -> torch.Tensor:
    return torch.diag(torch.tensor([*spacing, 1.0], dtype=torch.float64))


def _scan(shape: tuple[int, ...], spacing: tuple[float, ...]) -> Image:
    """A random scan with a dark border."""
    data = torch.rand(1, 1, *shape, generator=torch.Generator().manual_seed(0)) + 0.5
    inside = torch.zeros(shape, dtype=torch.bool)
    inside[tuple(slice(n // 5, n - n // 5) for n in shape)] = True
    return Image(data * inside, Grid(shape, _affine(*spacing)))


def _draw(tmp_path, fixed, before, after):
    overlay(fixed, before, after, tmp_path / "overlay.png")
    return np.asarray(Picture.open(tmp_path / "overlay.png").convert("RGB")).astype(int)


SCANS = [((20, 24), (1.0, 1.0)), ((20, 24, 18), (1.0, 1.0, 3.0)), ((1, 9, 9), (1.0, 1.0, 1.0)), ((300, 20), (0.1, 0.1))]


@pytest.mark.parametrize(("shape", "spacing"), SCANS)
def test_perfect_alignment_is_grey_and_an_empty_before_magenta(tmp_path, shape, spacing):
    fixed = _scan(shape, spacing)
    picture = _draw(tmp_path, fixed, fixed.with_data(fixed.data * 0), fixed)
    assert 0 < picture.shape[1] <= MAX_WIDTH
    two_d = len(shape) == 2
    half = picture.shape[1 if two_d else 0] // 2
    first, last = (picture[26:, :half], picture[26:, half + 4:]) if two_d else (picture[:half], picture[half:])
    coloured = first[..., 0] > 60
    if fixed.data.any():
        letters = (first == (255, 255, 0)).all(-1) | (np.ptp(first, -1) == 0)
        assert (first[coloured & ~letters][:, 0] - first[coloured & ~letters][:, 1] > 0).mean() > 0.95
    yellow = last[..., 0] - last[..., 2] > 0  # the side letters
    assert np.abs(np.ptp(last, -1))[~yellow].max() <= 1


def test_stored_order_does_not_matter(tmp_path):
    """A permuted, flipped copy with the matching affine gives the same picture."""
    fixed = _scan((12, 14, 10), (1.0, 1.5, 2.0))
    after = fixed.with_data(fixed.data.roll(2, 2))
    stored = torch.zeros(4, 4, dtype=torch.float64)  # new (9 - k, i, j) → old (i, j, k)
    stored[0, 1] = stored[1, 2] = stored[3, 3] = 1
    stored[2, 0], stored[2, 3] = -1, 9
    grid = Grid((10, 12, 14), fixed.grid.affine[0] @ stored)
    again = [Image(i.data.permute(0, 1, 4, 2, 3).flip(2), grid) for i in (fixed, after)]
    one = _draw(tmp_path, fixed, after, fixed)
    two = _draw(tmp_path, again[0], again[1], again[0])
    assert one.shape == two.shape
    assert np.abs(one - two).max() <= 2


def test_sides(tmp_path):
    """The patient's left is on the right of the axial plane, anterior is up."""
    data = torch.zeros(1, 1, 21, 21, 21)
    data[..., 2:19, 2:19, 2:19] = 1.0
    fixed = Image(data, Grid((21, 21, 21), _affine(1, 1, 1)))
    spot = torch.zeros_like(data)
    spot[..., 14:19, 14:19, 8:13] = 1.0  # right, anterior
    picture = _draw(tmp_path, fixed, fixed.with_data(spot), fixed)
    axial = picture[26: picture.shape[0] // 2, 2 * picture.shape[1] // 3:]
    rows, columns = np.nonzero((axial[..., 1] > 200) & (axial[..., 0] > 200) & (axial[..., 2] > 200))
    assert rows.mean() < axial.shape[0] / 2
    assert columns.mean() < axial.shape[1] / 2


def test_colour_nan_and_batch_are_drawn(tmp_path):
    grid = Grid((16, 16), _affine(1, 1))
    colour = torch.randint(0, 255, (1, 3, 16, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    holes = torch.rand(1, 1, 16, 16)
    holes[..., :4] = torch.nan
    assert _draw(tmp_path, Image(colour, grid), Image(holes, grid), Image(holes, grid)).any()


def test_constant_scans_are_drawn(tmp_path):
    flat = Image(torch.ones(1, 1, 5, 5, 5), Grid((5, 5, 5), _affine(1, 1, 1)))
    _draw(tmp_path, flat, flat, flat)


def test_another_grid_is_refused(tmp_path):
    with pytest.raises(GeometryError, match=r"before has shape \(5, 4\), fixed \(4, 5\)"):
        overlay(_scan((4, 5), (1, 1)), _scan((5, 4), (1, 1)), _scan((4, 5), (1, 1)), tmp_path / "x.png")
    assert not list(tmp_path.iterdir())
