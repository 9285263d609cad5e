"""Images: voxels and grid that fit."""

from __future__ import annotations

import pytest
import torch

from regkit.errors import GeometryError
from regkit.image import Image
from regkit.space import Grid

both = pytest.mark.parametrize("ndim", [2, 3], ids=["2D", "3D"])
SHAPES = {2: (4, 6), 3: (4, 6, 5)}


def image(ndim, channels=1, dtype=torch.float32, n=1):
    draw = torch.Generator().manual_seed(channels)
    voxels = 200 * torch.rand(n, channels, *SHAPES[ndim], generator=draw)
    return Image(voxels.to(dtype), Grid(SHAPES[ndim], torch.eye(ndim + 1)))


@both
@pytest.mark.parametrize("channels", [3, 4])
def test_luminance_of_colour_is_bt601_and_leaves_alpha_out(ndim, channels):
    picture = image(ndim, channels, torch.uint8)
    gray = picture.luminance()
    r, g, b = picture.data[:, :3].float().unbind(1)
    assert gray.data.dtype == torch.float32
    torch.testing.assert_close(gray.data, (0.299 * r + 0.587 * g + 0.114 * b)[:, None])
    white = picture.with_data(torch.full_like(picture.data, 255))
    torch.testing.assert_close(white.luminance().data, torch.full((1, 1, *SHAPES[ndim]), 255.0))


@both
def test_luminance_of_one_channel_and_of_other_channels(ndim):
    one = image(ndim, 1, torch.int16)
    assert torch.equal(one.luminance().data, one.data.float())
    five = image(ndim, 5)
    torch.testing.assert_close(five.luminance().data, five.data.mean(1, keepdim=True))


@both
def test_with_data_keeps_all_else(ndim):
    first = Image(image(ndim).data, image(ndim).grid, slice_affine=torch.eye(4), pixels=True, source="a.png")
    for other in (first.with_data(first.data + 1), first.luminance(), first.to("cpu")):
        assert (other.grid.same_as(first.grid), other.pixels, other.source) == (True, True, "a.png")
        assert torch.equal(other.slice_affine, first.slice_affine)
    assert torch.equal(first.with_data(first.data + 1).data, first.data + 1)
    assert (first.ndim, first.channels) == (ndim, 1)


@both
def test_voxels_that_do_not_fit_are_refused(ndim):
    good = image(ndim)
    for data in (good.data[0], good.data[..., :-1], good.data.movedim(2, 3), good.data[..., None]):
        with pytest.raises(GeometryError, match=r"image: voxels .* do not fit a grid of .*expected \(N, C, \*grid.shape\)"):
            Image(data, good.grid)
    with pytest.raises(GeometryError, match="do not fit"):
        good.with_data(good.data[..., 1:])


@both
def test_repr_tells_what_one_debugs(ndim):
    assert repr(image(ndim, 3, torch.uint8, n=2)) == f"Image(2×3 uint8 on {Grid(SHAPES[ndim], torch.eye(ndim + 1))!r})"
