"""Every measure against a slow, direct computation of its formula, and against MONAI's."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from scipy.interpolate import BSpline
from scipy.stats import rankdata

from regkit.similarity import cr, lncc, mi, mind, mse, ncc, ngf, windows

SMALL = {2: (9, 8), 3: (5, 6, 4)}
SPLINE = BSpline.basis_element([-2.0, -1.0, 0.0, 1.0, 2.0], extrapolate=False)


@pytest.fixture
def small(ndim):
    """moved, fixed, weight as float64 tensors (1, 1, *S); related, some weights zero."""
    draw = np.random.default_rng(5)
    f = draw.normal(size=SMALL[ndim])
    m = np.sin(f) + 0.4 * draw.normal(size=f.shape) + 3
    w = draw.random(f.shape) * (draw.random(f.shape) > 0.2)
    return tuple(torch.from_numpy(x)[None, None] for x in (m, f, w))


def flat(*tensors):
    return [t.numpy().ravel() for t in tensors]


def test_mse(small):
    m, f, w = flat(*small)
    assert mse.loss(*small).item() == pytest.approx(np.average((m - f) ** 2, weights=w), rel=1e-9)


def test_ncc(small):
    m, f, w = flat(*small)
    c = np.cov(m, f, aweights=w)
    assert ncc.loss(*small).item() == pytest.approx(1 - c[0, 1] / np.sqrt(c[0, 0] * c[1, 1]), rel=1e-9)


def test_ncc_pools_channels_after_taking_each_ones_mean(small):
    m, f, _ = small
    two_m, two_f = torch.cat([m, f + 50], 1), torch.cat([f, 2 * m - 9], 1)
    z = [(t - t.mean(tuple(range(2, t.ndim)), keepdim=True)).numpy().ravel() for t in (two_m, two_f)]
    assert ncc.loss(two_m, two_f).item() == pytest.approx(1 - np.corrcoef(z)[0, 1], rel=1e-9)


def gaussian(shape, centre, sigma):
    """Separable, cut at 4 σ an axis."""
    axes = [np.arange(n) - c for n, c in zip(shape, centre, strict=True)]
    window = np.ones(shape)
    for axis, x in enumerate(axes):
        g = np.exp(-0.5 * (x / sigma) ** 2) * (np.abs(x) <= 4 * sigma)
        window *= g.reshape([-1 if a == axis else 1 for a in range(len(shape))])
    return window


def test_lncc(small):
    m, f, w = (x.numpy()[0, 0] for x in small)
    m, f = ((x - np.average(x, weights=w)) / np.sqrt(np.cov(x.ravel(), aweights=w.ravel(), ddof=0)) for x in (m, f))
    sigma, floor, above, below = 1.3, 0.02, 0.0, 0.0
    feature = np.zeros_like(f)
    for centre in np.ndindex(f.shape):
        window = gaussian(f.shape, centre, sigma) * w
        c = np.cov(m.ravel(), f.ravel(), aweights=window.ravel(), ddof=0)
        above += w[centre] * c[0, 1] / np.sqrt((c[0, 0] + floor) * (c[1, 1] + floor))
        below += w[centre] * (c[0, 0] / (c[0, 0] + floor) + c[1, 1] / (c[1, 1] + floor)) / 2
        if w[centre]:
            feature[centre] = (f[centre] - np.average(f, weights=window)) / np.sqrt(c[1, 1] + floor)
    assert lncc.loss(*small, sigma=sigma, floor=floor).item() == pytest.approx(1 - above / below, rel=1e-5)
    mine = lncc.features(small[1], small[2], sigma=sigma, floor=floor)[0, 0].numpy()
    np.testing.assert_allclose(mine, feature, rtol=1e-4, atol=1e-5)


def test_lncc_features_stand_for_the_loss(ndim, texture):
    """Where the texture is finer than the window, whose mean is then that of its neighbours too."""
    a = texture(ndim, 1, sigma=0.6)
    for b in (0.2 * texture(ndim, 2, sigma=0.6) + a, texture(ndim, 1, 1, sigma=0.6), texture(ndim, 2, sigma=0.6), -a):
        f, g = lncc.features(a, sigma=4.0), lncc.features(b, sigma=4.0)
        difference = ((f - g) ** 2).sum() / ((f**2 + g**2) / 2).sum()
        assert difference.item() == pytest.approx(2 * lncc.loss(a, b, sigma=4.0).item(), rel=0.1)


def splines(x, w, bins):
    kept = x[w > 0]
    u = (x - kept.min()) / (kept.max() - kept.min()) * (bins - 3)
    return np.nan_to_num(SPLINE(u[:, None] - np.arange(-1, bins - 1)[None])) * (w > 0)[:, None]


@pytest.mark.parametrize("bins", [8, 32])
def test_mi(small, bins):
    m, f, w = flat(*small)
    p = (splines(m, w, bins) * (w / w.sum())[:, None]).T @ splines(f, w, bins)
    assert p.sum() == pytest.approx(1)
    product = np.outer(p.sum(1), p.sum(0))
    value = (p[p > 0] * np.log(p[p > 0] / product[p > 0])).sum()
    entropy = -(p[p > 0] * np.log(p[p > 0])).sum()
    assert mi.loss(*small, bins=bins).item() == pytest.approx(-value, rel=1e-6)
    assert mi.loss(*small, bins=bins, normalised=True).item() == pytest.approx(-value / entropy, rel=1e-6)
    points = [t.reshape(1, -1) for t in small]
    assert mi.joint(*points, bins=bins).item() == pytest.approx(value, rel=1e-6)


def test_mi_of_independent_points_is_nearly_nothing_and_of_a_permutation_the_entropy():
    x = torch.arange(4000.0)[None] % 10
    w = torch.ones_like(x)
    swapped = torch.tensor([3.0, 9, 0, 7, 1, 5, 8, 2, 6, 4])[x.long()]
    # Ten levels on the knots of 12 bins: the windows blur, nothing more.
    assert mi.joint(x, swapped, w, bins=64).item() == pytest.approx(np.log(10), rel=0.02)
    assert mi.joint(x, torch.div(torch.arange(4000.0)[None], 10, rounding_mode="floor") % 10, w).item() < 1e-3


def test_cr(small):
    m, f, w = flat(*small)
    bins = 24
    m = m - np.average(m, weights=w)
    share = np.sqrt(w / w.sum())
    rows = np.vstack([splines(f, w, bins) * share[:, None], np.sqrt(cr.RIDGE) * np.eye(bins)])
    right = np.concatenate([m * share, np.zeros(bins)])
    c, *_ = np.linalg.lstsq(rows, right, rcond=None)
    left = ((rows @ c - right) ** 2).sum() / (right**2).sum()
    assert 0.01 < left < 0.99
    assert cr.loss(*small).item() == pytest.approx(left, rel=1e-6)


@pytest.mark.parametrize("loss", [mi.loss, cr.loss])
def test_a_large_scan_goes_in_chunks(loss, small, monkeypatch):
    def both():
        m = small[0].clone().requires_grad_()
        value = loss(m, small[1], small[2])
        return value.detach(), torch.autograd.grad(value.sum(), m)[0]

    whole = both()
    calls, once = [], windows.windows
    for module in (mi, cr):
        monkeypatch.setattr(module, "windows", lambda place, bins: calls.append(place.shape[1]) or once(place, bins))
    monkeypatch.setattr(windows, "CHUNK", 32)
    pieces = both()
    assert max(calls) == 32 < small[0].numel()
    torch.testing.assert_close(whole, pieces)


def test_mind(small, ndim):
    # Contrast fading by four powers of ten reaches the lower bound of the variance.
    given = small[1] * torch.logspace(0, -4, small[1].shape[-1], dtype=torch.float64)
    image, sigma = given.numpy()[0, 0], 0.5
    shape = np.array(image.shape)
    near = [s * np.eye(ndim, dtype=int)[a] for a in range(ndim) for s in (1, -1)]
    # An edge is read from the end whose first differing coordinate is less; inside the scan the end makes no difference.
    pairs = [(p, q) for p, q in itertools.permutations(near, 2) if ((p - q) ** 2).sum() == 2 and tuple(p) < tuple(q)]
    assert len(pairs) == {2: 4, 3: 12}[ndim]

    def at(x):
        return image[tuple(np.clip(x, 0, shape - 1))]

    distance = np.zeros((len(pairs), *shape))
    for e, (p, q) in enumerate(pairs):
        for x in np.ndindex(*shape):
            # The patch at the edge's first end, cut off one voxel outside the scan.
            window = gaussian(shape + 2, np.array(x) + p + 1, sigma)
            squares = np.zeros_like(window)
            for y in zip(*np.nonzero(window), strict=True):
                squares[y] = (at(np.array(y) - 1) - at(np.array(y) - 1 + q - p)) ** 2
            distance[(e, *x)] = (window * squares).sum() / window.sum()
    distance = distance - distance.min(0)
    variance = distance.mean(0)
    assert (variance < 0.001 * variance.mean()).any()
    variance = np.clip(variance, 0.001 * variance.mean(), 1000 * variance.mean())
    mine = mind.features(given, sigma=sigma)[0].numpy()
    descriptor = np.exp(-distance / variance)
    np.testing.assert_allclose(np.sort(mine, 0), np.sort(descriptor - descriptor.mean(0), 0), atol=1e-5)


def test_mind_features_are_zero_where_the_scan_is_flat(ndim):
    image = torch.zeros(1, 1, *[12] * (ndim - 1), 20)
    image[..., :4] = torch.rand(image[..., :4].shape, generator=torch.Generator().manual_seed(0))
    features = mind.features(image, None)
    assert features[..., 12:].abs().max() == 0 < features[..., :4].abs().max()


def test_ngf(small, ndim):
    fields = []
    for image in small[:2]:
        x = image.numpy()[0, 0]
        g = np.stack(np.gradient(x / x.std()))
        fields.append(g / np.sqrt((g**2).sum(0) + np.sqrt((g**2).sum(0)).mean() ** 2))
    m, f = fields
    dot, mm, ff = (m * f).sum(0), (m * m).sum(0), (f * f).sum(0)
    assert ngf.loss(*small[:2]).item() == pytest.approx(1 - (dot**2).sum() / ((mm**2 + ff**2) / 2).sum(), rel=1e-5)
    difference = ((ngf.features(small[0]) - ngf.features(small[1])) ** 2).sum(1)[0].numpy()
    np.testing.assert_allclose(difference, mm**2 + ff**2 - 2 * dot**2, rtol=1e-4, atol=1e-9)


def test_monai_ranks_the_same_poses_alike(ndim, texture):
    losses = pytest.importorskip("monai.losses")
    fixed = texture(ndim)
    poses = [texture(ndim, shift=s) + 0.1 * k * texture(ndim, 7) for s in (0, 1, 2, 4) for k in (0, 2, 4)]
    local = losses.LocalNormalizedCrossCorrelationLoss(spatial_dims=ndim, kernel_size=7, kernel_type="gaussian")
    shared = losses.GlobalMutualInformationLoss(num_bins=32)
    for mine, theirs in ((lncc.loss, local), (mi.loss, shared)):
        ranks = [rankdata([loss(p, fixed).item() for p in poses]) for loss in (mine, theirs)]
        assert np.corrcoef(ranks)[0, 1] > 0.9
