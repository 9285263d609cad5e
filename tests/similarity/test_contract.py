"""What every similarity of the table must do, in 2D and 3D."""

from __future__ import annotations

import pytest
import torch

from regkit.errors import OptionError
from regkit.similarity import SIMILARITIES, similarity

NAMES = list(SIMILARITIES)
WITH_FEATURES = [name for name, s in SIMILARITIES.items() if s.features]
POINTWISE = ["mse", "ncc", "cr", "mi"]
UNRELATED = {"mse": 1.0, "ncc": 1.0, "lncc": 1.0, "cr": 1.0, "mi": 0.0, "edge": 1.0, "mind": 0.25, "ngf": 1.0}
REMAPS = {
    "inverted": (lambda x: 3 - 2 * x, ["cr", "mi", "mind", "ngf"]),
    "exponential": (lambda x: torch.exp(-x), ["cr", "mi", "mind", "ngf"]),
    "folded": (lambda x: torch.cos(2 * x), ["cr", "mi"]),
    "gain": (lambda x: 40 + 7 * x, ["ncc", "lncc", "cr", "mi", "mind", "ngf"]),
}
DTYPES = [torch.float16, torch.bfloat16]


def weights(shape, seed=9):
    w = torch.rand(1, 1, *shape[2:], generator=torch.Generator().manual_seed(seed))
    return torch.where(w < 0.3, 0, w)


def test_table_and_lookup():
    assert all(name == s.name for name, s in SIMILARITIES.items())
    assert all((s.features is None) == (s.residual == "none") for s in SIMILARITIES.values())
    assert similarity("lncc") is SIMILARITIES["lncc"]
    with pytest.raises(OptionError, match="nearest: lncc"):
        similarity("lnc")


@pytest.mark.parametrize("name", NAMES)
def test_one_loss_an_item_and_items_are_independent(name, ndim, texture):
    loss = SIMILARITIES[name].loss
    a = torch.cat([torch.cat([texture(ndim, s), texture(ndim, s + 10)], 1) for s in (0, 1, 2)]).requires_grad_()
    b = torch.cat([torch.cat([texture(ndim, s), texture(ndim, s + 20)], 1) for s in (3, 4, 5)])
    w = torch.cat([weights(a.shape, s) for s in (6, 7, 8)])
    value = loss(a, b, w)
    assert value.shape == (3,)
    single = torch.cat([loss(a[i: i + 1], b[i: i + 1], w[i: i + 1]) for i in range(3)])
    torch.testing.assert_close(value, single, rtol=1e-4, atol=1e-6)
    (slope,) = torch.autograd.grad(value[1], a)
    assert slope[1].abs().sum() > 0
    assert slope[0].abs().sum() == slope[2].abs().sum() == 0


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_loss_grows_with_the_shift(name, weighted, ndim, texture):
    fixed = texture(ndim)
    w = weights(fixed.shape) if weighted else None
    for sign in (1, -1):
        steps = range(3 if name == "edge" else 4)  # of edges of this texture nothing meets any more at three voxels
        values = [SIMILARITIES[name].loss(texture(ndim, shift=sign * s), fixed, w).item() for s in steps]
        assert values == sorted(set(values))


@pytest.mark.parametrize(("remap", "name"), [(r, n) for r, (_, names) in REMAPS.items() for n in names])
def test_loss_grows_with_the_shift_whatever_the_contrast(remap, name, ndim, texture):
    values = [SIMILARITIES[name].loss(REMAPS[remap][0](texture(ndim, shift=s)), texture(ndim)).item() for s in range(4)]
    assert values == sorted(set(values))


@pytest.mark.parametrize("name", ["ncc", "lncc", "cr", "mi", "edge", "mind", "ngf"])
def test_gain_and_offset_change_nothing(name, ndim, texture):
    a, b = texture(ndim, 1), texture(ndim, 2)
    loss = SIMILARITIES[name].loss
    torch.testing.assert_close(loss(500 + 80 * a, 0.01 * b), loss(a, b), rtol=2e-3, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_best_possible_and_unrelated_values(name, ndim, texture):
    a = texture(ndim, 1)
    same, other = SIMILARITIES[name].loss(a, a).item(), SIMILARITIES[name].loss(a, texture(ndim, 2)).item()
    assert same == pytest.approx(0, abs=2e-3) if name != "mi" else same < -0.5
    if name not in ("mse", "mind", "ngf"):
        assert other == pytest.approx(UNRELATED[name], abs=0.35)
    assert same < other - 0.1


@pytest.mark.parametrize("name", NAMES)
def test_degenerate_images_have_finite_values_and_gradients(name, ndim, texture):
    image = texture(ndim)
    cases = [(torch.full_like(image, p), torch.full_like(image, q)) for p in (0.0, 1000.1) for q in (0.0, -7.3)]
    cases += [(torch.zeros_like(image), image), (image, torch.full_like(image, 1000.1)), (image, image)]
    for moved, fixed in cases:
        for w in (None, weights(image.shape), torch.zeros_like(image)):
            m, f = moved.clone().requires_grad_(), fixed.clone().requires_grad_()
            value = SIMILARITIES[name].loss(m, f, w)
            value.sum().backward()
            assert torch.isfinite(value).all()
            assert m.grad is not None and f.grad is not None
            assert torch.isfinite(m.grad).all() and torch.isfinite(f.grad).all()
            assert m.grad.abs().max() < 100 and f.grad.abs().max() < 100
            if w is not None and not w.any():
                assert value.item() == pytest.approx(UNRELATED[name])
            elif name not in ("mse", "mind") and moved is not fixed:
                assert value.item() == pytest.approx(UNRELATED[name], abs=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_voxels_of_zero_weight_do_not_exist(name, ndim, texture):
    w = weights(texture(ndim).shape)
    results = []
    for rubbish in (0.0, 1e6, float("nan"), float("inf")):
        m, f = (torch.where(w > 0, texture(ndim, s), rubbish).requires_grad_() for s in (1, 2))
        value = SIMILARITIES[name].loss(m, f, w)
        value.sum().backward()
        assert m.grad is not None and f.grad is not None
        assert m.grad[w == 0].abs().sum() == 0
        results.append((value.detach(), m.grad, f.grad))
    for other in results[1:]:
        for mine, theirs in zip(results[0], other, strict=True):
            assert torch.equal(mine, theirs)
    assert results[0][1].abs().sum() > 0


@pytest.mark.parametrize("name", NAMES)
def test_only_the_ratio_of_weights_counts(name, ndim, texture):
    a, b, w = texture(ndim, 1), texture(ndim, 2), weights(texture(ndim).shape)
    loss = SIMILARITIES[name].loss
    torch.testing.assert_close(loss(a, b, w), loss(a, b, 1e-4 * w), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(loss(a, b), loss(a, b, torch.full_like(w, 3)), rtol=1e-3, atol=1e-5)
    assert (loss(a, b, w) - loss(a, b)).abs() > 1e-5


@pytest.mark.parametrize("name", POINTWISE)
def test_a_weight_is_a_number_of_copies_and_points_are_enough(name):
    draw = torch.Generator().manual_seed(0)
    a, b = torch.rand(2, 1, 300, generator=draw), torch.rand(2, 1, 300, generator=draw)
    b = a + 0.3 * b
    w = torch.ones(2, 1, 300)
    w[..., :50], w[..., 50:80] = 2, 0
    kept = [torch.cat([x[..., :50], x[..., :50], x[..., 80:]], 2) for x in (a, b)]
    torch.testing.assert_close(SIMILARITIES[name].loss(a, b, w), SIMILARITIES[name].loss(*kept), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [n for n in NAMES if n != "cr"])
def test_symmetric(name, ndim, texture):
    a, b, w = texture(ndim, 1), texture(ndim, 1, shift=2), weights(texture(ndim).shape)
    loss = SIMILARITIES[name].loss
    torch.testing.assert_close(loss(a, b, w), loss(b, a, w))


@pytest.mark.parametrize("name", NAMES)
def test_gradcheck(name, ndim):
    shape = (2, 1, 6, 5) if ndim == 2 else (1, 2, 4, 3, 4)
    draw = torch.Generator().manual_seed(3)
    m, f, w = (torch.rand(shape, generator=draw, dtype=torch.float64) for _ in range(3))
    w = torch.where(w < 0.2, 0, w)[:, :1]
    m, f, loss = m.requires_grad_(), f.requires_grad_(), SIMILARITIES[name].loss
    assert torch.autograd.gradcheck(lambda a, b: loss(a, b, w), (m, f), fast_mode=True)
    assert torch.autograd.gradcheck(loss, (m, f), fast_mode=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_half_precision_is_computed_in_float32(name, dtype, ndim, texture):
    a, b, w = (100 * texture(ndim, 1)).to(dtype), (100 * texture(ndim, 2)).to(dtype), weights(texture(ndim).shape)
    loss = SIMILARITIES[name].loss
    value, exact = loss(a, b, w.to(dtype)), loss(a.float(), b.float(), w.to(dtype).float())
    assert value.dtype == torch.float32
    assert torch.equal(value, exact)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(loss(a, b, w.to(dtype)), exact)


@pytest.mark.parametrize("name", WITH_FEATURES)
def test_features_shape_weights_and_masks(name, ndim, texture):
    features = SIMILARITIES[name].features
    assert features is not None
    image, w = torch.cat([texture(ndim, 1), 50 * texture(ndim, 2)]), weights(texture(ndim).shape).repeat(2, *[1] * (ndim + 1))
    count = {"mind": {2: 4, 3: 12}, "ngf": {2: 3, 3: 6}}.get(name, {}).get(ndim, 1)
    value = features(image, w)
    assert value.shape == (2, count, *image.shape[2:])
    assert (value * (w == 0)).abs().sum() == 0 < (value * (w > 0)).abs().sum()
    assert torch.equal(value, features(torch.where(w > 0, image, torch.nan), w))
    torch.testing.assert_close(value[1:], features(image[1:], w[1:]), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(features(image), features(image, torch.ones_like(w)), rtol=1e-3, atol=1e-4)
    assert torch.isfinite(features(torch.full_like(image, 1000.1), w)).all()
    assert features(image, torch.zeros_like(w)).abs().sum() == 0


@pytest.mark.parametrize(("name", "flat"), [("lncc", 0.0), ("mind", 0.0), ("ngf", 0.0)])
def test_a_mask_makes_no_edges(name, flat, ndim, texture):
    features = SIMILARITIES[name].features
    assert features is not None
    image = texture(ndim)
    plateau = torch.zeros_like(image)
    plateau[:, :, 7:] = 5.0  # far from the scan's mean
    w = torch.ones_like(image)
    w[:, :, 17:, 5:10] = 0
    value = features(torch.where(torch.arange(image.shape[2]).reshape(-1, *[1] * (ndim - 1)) < 6, image, plateau), w)
    around = (w > 0).expand_as(value)[:, :, 17:]
    torch.testing.assert_close(value[:, :, 17:][around], torch.full_like(value[:, :, 17:][around], flat), rtol=0, atol=1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_turning_both_scans_changes_nothing_and_oriented_says_whether_features_turn(name, ndim, texture):
    s = SIMILARITIES[name]
    a, b = texture(ndim, 1), texture(ndim, 1, shift=1)
    turn = lambda x: torch.rot90(x, 1, (2, 3))  # noqa: E731
    torch.testing.assert_close(s.loss(turn(a), turn(b)), s.loss(a, b), rtol=1e-2, atol=1e-4)
    if s.features is not None:
        same = torch.allclose(s.features(turn(a)), turn(s.features(a)), atol=1e-3)
        assert same != s.oriented
