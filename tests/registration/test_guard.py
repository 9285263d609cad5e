"""The guard: never worse than the start, and what is hopeless is said."""

import pytest
import torch

import regkit
from regkit import Grid, Image, Matrix, OptionError, OverlapError
from regkit.registration.guard import look, overlap
from regkit.registration.pair import make_pair
from regkit.registration.walk import COST
from tests.registration.conftest import carried, known_map

FINE = {"end": 0.8}


def test_a_pair_already_aligned_stays(ndim, heads, tre):
    fixed = heads[ndim]
    result = regkit.align(fixed, fixed)
    assert tre(fixed, result.transform, Matrix.identity(ndim)) < 0.02
    assert result.verdict.status == "PASS" and not result.findings


def test_the_end_is_never_worse_than_the_best_start(ndim, heads):
    draw = torch.Generator().manual_seed(0)
    fixed = heads[ndim]
    noise = fixed.with_data(torch.randn(fixed.data.shape, generator=draw))
    for moving in (noise, carried(fixed, known_map(fixed.grid, "affine"))):
        guard = regkit.align(fixed, moving, start="mass", no_retry=True).trace["guard"]
        assert guard["similarity_end"] >= guard["similarity_best_start"] - COST  # which agreeing blocks may cost


def test_noise_is_called_hopeless(ndim, heads):
    draw = torch.Generator().manual_seed(0)
    noise = heads[ndim].with_data(torch.randn(heads[ndim].data.shape, generator=draw))
    result = regkit.align(heads[ndim], noise, start="mass", no_retry=True)
    assert result.findings and "resemble each other" in " ".join(result.findings)
    assert result.verdict.status == "FAIL" and set(result.findings) <= set(result.verdict.reasons)


def test_findings_name_what_is_odd(ndim, heads):
    pair = make_pair(heads[ndim], heads[ndim])

    def found(linear: torch.Tensor, shift: float = 0.0, scores: dict | None = None):
        matrix = torch.eye(ndim + 1, dtype=torch.float64)
        centre = pair.fixed.grid.centre[0]
        matrix[:ndim, :ndim] = linear
        matrix[:ndim, ndim] = centre - linear @ centre + shift
        return look(pair, Matrix(matrix), scores or FINE)

    eye = torch.eye(ndim, dtype=torch.float64)
    assert found(eye)["findings"] == [] and not found(eye)["hopeless"]
    assert "scales by 5" in found(5 * eye)["findings"][0] and found(5 * eye)["hopeless"]
    assert "much for scans of one kind" in found(2 * eye)["findings"][0] and not found(2 * eye)["hopeless"]
    stretch = eye.clone()
    stretch[0, 0] = 2.3
    assert "stretches" in " ".join(found(stretch)["findings"])
    assert "nothing was aligned" in found(eye, shift=1e4)["findings"][0] and found(eye, shift=1e4)["hopeless"]
    assert "do not resemble" in found(eye, scores={"end": 0.0})["findings"][0] and found(eye, scores={"end": 0.0})["hopeless"]
    assert "little" in found(eye, scores={"end": 0.06})["findings"][0]


def test_overlap_is_the_share_of_the_smaller_scan(ndim, heads):
    fixed = heads[ndim]
    crop = Image(fixed.data[(..., *[slice(16, 32)] * ndim)].contiguous(), Grid((16,) * ndim, fixed.grid.affine @ _corner(ndim, 16)))
    assert overlap(make_pair(fixed, crop), Matrix.identity(ndim)) == pytest.approx(1.0)
    shift = Matrix.shift(torch.tensor([[0.5 * fixed.grid.shape[0] * float(fixed.grid.spacing[0, 0])] + [0.0] * (ndim - 1)]).double())
    assert overlap(make_pair(fixed, fixed), shift) == pytest.approx(0.5, abs=0.05)


def _corner(ndim: int, at: int) -> torch.Tensor:
    m = torch.eye(ndim + 1, dtype=torch.float64)
    m[:ndim, ndim] = at
    return m


def test_scans_apart_are_refused_from_the_header_and_found_by_auto(ndim, heads, tre):
    fixed = heads[ndim]
    far = Matrix.shift(torch.full((1, ndim), 5e3, dtype=torch.float64))
    moving = Image(fixed.data, Grid(fixed.grid.shape, far.matrix @ fixed.grid.affine))
    with pytest.raises(OverlapError, match="do not overlap"):
        regkit.align(fixed, moving, start="header")
    assert tre(fixed, regkit.align(fixed, moving).transform, far) < 0.05


def test_options_are_settings_and_nothing_else(ndim, heads):
    with pytest.raises(OptionError, match="nearest: similarity"):
        regkit.align(heads[ndim], heads[ndim], similarty="ncc")
    with pytest.raises(OptionError, match="one or the other"):
        regkit.align(heads[ndim], heads[ndim], settings=regkit.Settings(), model="rigid")


def test_inverse_and_apply_carry_both_ways(ndim, heads):
    fixed = heads[ndim]
    result = regkit.align(fixed, carried(fixed, known_map(fixed.grid, "affine")), start="mass")
    points = fixed.grid.points()[0, ::97]
    there = result.apply(points, inverse=True)
    torch.testing.assert_close(there, result.transform(points[None])[0])
    torch.testing.assert_close(result.apply(there), points)
    torch.testing.assert_close(result.inverse().apply(points), there)
    assert result.apply(fixed, inverse=True).grid.shape == result.moving.grid.shape
    assert result.apply(result.moving).data.allclose(result.moved.data)
    labels = result.moving.with_data((result.moving.data > result.moving.data.mean()).to(torch.int16))
    assert set(result.apply(labels).data.unique().tolist()) <= {0, 1}


def test_voxel_sizes_that_cannot_both_be_right(ndim, heads):
    """The same scan under a header four times too small, as a printer's resolution tag makes it."""
    head = heads[ndim]
    affine = head.grid.affine.clone()
    affine[:, :ndim] /= 4
    small = Image(head.data, Grid(head.grid.shape, affine))
    found = look(make_pair(head, small), Matrix(torch.linalg.inv(head.grid.affine @ torch.linalg.inv(affine))), FINE)
    assert any("right size" in finding for finding in found["findings"])
    middle, n = head.grid.shape[0] // 2, head.grid.shape[0] // 8
    crop = Image(small.data[:, :, middle: middle + n].contiguous(), Grid((n, *head.grid.shape[1:]), affine))
    for other in (head, crop):  # nothing odd in one size, nor in a fine scan of a small part
        assert not any("right size" in f for f in look(make_pair(head, other), Matrix.identity(ndim), FINE)["findings"])
