"""Shifts by FFT: normalised correlation over what both see, checked against brute force, and partial fields of view found."""

import pytest
import torch

import regkit
from regkit import Grid, Image, Matrix
from regkit.filters import smooth
from regkit.registration.shifts import correlations


def test_correlations_are_those_of_brute_force(ndim):
    draw = torch.Generator().manual_seed(1)
    f, wf = torch.rand(2, 1, 1, *[6, 5, 4][:ndim], generator=draw)
    m, wm = torch.rand(2, 1, 1, *[5, 7, 6][:ndim], generator=draw)
    wf, wm = (wf > 0.2).float(), (wm > 0.2).float()
    found = correlations(f, wf, m, wm)[0]
    assert found.shape == tuple(a + b - 1 for a, b in zip(f.shape[2:], m.shape[2:], strict=True))
    places = Grid(tuple(found.shape), torch.eye(ndim + 1, dtype=torch.float64)).index_points()[0].long()
    fixed = Grid(tuple(f.shape[2:]), torch.eye(ndim + 1, dtype=torch.float64)).index_points()[0].long()
    size = torch.tensor(m.shape[2:])
    looked = 0
    for place in places[:: 7]:
        there = fixed + place - torch.tensor(f.shape[2:]) + 1
        seen = ((there >= 0) & (there < size)).all(1)
        a, b = f[0, 0][tuple(fixed[seen].T)], m[0, 0][tuple(there[seen].T)]
        w = wf[0, 0][tuple(fixed[seen].T)] * wm[0, 0][tuple(there[seen].T)]
        value = float(found[tuple(place)])
        if value == -1 or w.sum() < 4:
            continue
        shares = []
        for data, weight, values in ((f, wf, a), (m, wm, b)):  # of the energy about the whole scan's mean, what is seen
            mean = (data * weight).sum() / weight.sum()
            shares.append((w * (values - mean) ** 2).sum() / (weight * (data - mean) ** 2).sum())
        a, b = a - (a * w).sum() / w.sum(), b - (b * w).sum() / w.sum()
        rho = (a * b * w).sum() / ((a * a * w).sum() * (b * b * w).sum()).sqrt()
        assert value == pytest.approx(float(rho * (sum(s.clamp(0, 1) for s in shares) / 2) ** 0.5), abs=2e-3)
        looked += 1
    assert looked > 3


def test_fields_of_view_that_share_a_third_are_found(ndim, tre):
    """Two crops of one texture, each cut where the other is not, with headers that say nothing of it."""
    draw = torch.Generator().manual_seed(2)
    shape = (90, 48, 40)[:ndim]
    whole = smooth(torch.randn(1, 1, *shape, generator=draw), [2.5] * ndim)
    affine = torch.eye(ndim + 1, dtype=torch.float64)[None]
    fixed = Image(whole[:, :, :50].contiguous(), Grid((50, *shape[1:]), affine))
    moving = Image(whole[:, :, 32:].contiguous(), Grid((58, *shape[1:]), affine))
    truth = Matrix.shift(torch.tensor([[-32.0, *[0.0] * (ndim - 1)]], dtype=torch.float64))
    result = regkit.align(fixed, moving, model="rigid")
    assert tre(fixed, result.transform, truth) < 0.3
