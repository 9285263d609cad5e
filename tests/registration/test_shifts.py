"""Shifts by FFT: normalised correlation over what both see, checked against brute force, and partial fields of view found."""

import pytest
import torch

import regkit
from regkit import Grid, Image, Matrix
from regkit.filters import smooth
from regkit.registration.pair import make_pair
from regkit.registration.pyramid import build, features_of
from regkit.registration.shifts import correlations, shifted
from regkit.registration.start import search_structure
from regkit.similarity import SIMILARITIES
from regkit.space import Frame

pytestmark = pytest.mark.usefixtures("unjudged")


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
    fixed, moving, truth = _crops(ndim, whole=90, end=50, begin=32)
    result = regkit.align(fixed, moving, model="rigid")
    assert tre(fixed, result.transform, truth) < 0.3


def test_channels_are_summed_as_they_are(ndim):
    """At the middle shift, where all of both is seen: plain correlation of all channels together, whatever their means."""
    draw = torch.Generator().manual_seed(3)
    f, m = torch.rand(2, 1, 3, *[6, 5, 4][:ndim], generator=draw)
    one = torch.ones(1, 1, *f.shape[2:])
    known: dict[tuple[int, ...], torch.Tensor] = {}
    for _ in range(2):  # anew, and with the fixed scan's transform from before
        found = correlations(f, one, m, one, known)[0]
        middle = float(found[tuple(n - 1 for n in f.shape[2:])])
        assert middle == pytest.approx(float((f * m).sum() / (f.square().sum() * m.square().sum()).sqrt()), abs=1e-5)
        assert len(known) == 1


def _crops(ndim: int, turn: Matrix | None = None, whole: int = 72, end: int = 54, begin: int = 18) -> tuple[Image, Image, Matrix]:
    """Two crops of one texture, up to `end` and from `begin` of `whole` voxels, the second one turned; and the true map."""
    draw = torch.Generator().manual_seed(2)
    shape = (whole, 48, 40)[:ndim]
    texture = smooth(torch.randn(1, 1, *shape, generator=draw), [2.5] * ndim)
    affine = torch.eye(ndim + 1, dtype=torch.float64)[None]
    fixed = Image(texture[:, :, :end].contiguous(), Grid((end, *shape[1:]), affine))
    moving = Image(texture[:, :, begin:].contiguous(), Grid((whole - begin, *shape[1:]), affine))
    truth = Matrix.shift(torch.tensor([[-float(begin), *[0.0] * (ndim - 1)]], dtype=torch.float64))
    if turn is not None:  # a turn of the header: voxels stay as they are
        moving, truth = Image(moving.data, Grid(moving.grid.shape, turn.matrix @ affine)), turn @ truth
    return fixed, moving, truth


def _turn(ndim: int) -> Matrix:
    theta = torch.zeros(1, regkit.space.model("rigid").count(ndim), dtype=torch.float64)
    theta[0, ndim:] = torch.tensor([1.1, -0.7, 0.9], dtype=torch.float64)[: ndim * (ndim - 1) // 2]
    return Matrix(regkit.space.model("rigid").exp(theta, ndim))


def test_a_shift_is_found_along_a_turned_pose(ndim):
    turn = _turn(ndim)
    fixed, moving, truth = _crops(ndim, turn)
    frame = Frame.of(fixed.grid)
    canvases = build(make_pair(fixed, moving), (2.0,))[0]
    pose = frame.matrix @ turn.matrix @ frame.inverse
    (found, score), *_ = shifted(*canvases, features_of(canvases[0], SIMILARITIES["mind"]), pose, frame, 2)
    there = Matrix(frame.world(found[None]))(fixed.grid.centre[:, None])
    assert (there - truth(fixed.grid.centre[:, None])).norm() < 3 and score > 0.3


@pytest.mark.parametrize(("end", "begin"), [(54, 18), (24, 0)], ids=["parts", "part of a larger one"])
def test_structure_alone_finds_a_turned_crop(end, begin, ndim):
    fixed, moving, truth = _crops(ndim, _turn(ndim), end=end, begin=begin)
    frame = Frame.of(fixed.grid)
    found = search_structure(*build(make_pair(fixed, moving), (2.5,))[0], frame, 4)
    corners = fixed.grid.corners()
    away = [float((Matrix(frame.world(c.map[None]))(corners) - truth(corners)).norm(dim=-1).mean()) for c in found]
    assert min(away) < 15  # of a scan of 54: within the reach of what refines it
