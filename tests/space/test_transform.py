"""Transforms: composition, inversion, batches, projective maps."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from regkit.errors import GeometryError
from regkit.space import Composite, Matrix, Transform, model
from regkit.space.transform import compose

both = pytest.mark.parametrize("ndim", [2, 3], ids=["2D", "3D"])


class Wave:
    """A transform that is no matrix, with an exact inverse: shears one axis by a sine of the other."""

    def __init__(self, ndim, sign=1.0):
        self.ndim, self.sign = ndim, sign

    def __call__(self, points):
        out = points.clone()
        out[..., 0] += self.sign * 2 * torch.sin(points[..., 1] / 5)
        return out

    def inverse(self):
        return Wave(self.ndim, -self.sign)


def affine(ndim, seed=0, n=1):
    m = model("affine")
    theta = 0.4 * torch.randn(n, m.count(ndim), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    theta[:, :ndim] *= 30
    return Matrix(m.exp(theta, ndim))


def projective(ndim, seed=0):
    m = affine(ndim, seed).matrix.clone()
    m[:, ndim, :ndim] = torch.tensor([1e-3, -2e-3, 1e-3])[:ndim]
    m[:, ndim, ndim] = 1.25
    return Matrix(m)


def points(ndim, n=1, seed=5):
    return 20 * torch.randn(n, 11, ndim, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@both
@settings(deadline=None, max_examples=15)
@given(a=st.integers(0, 99), b=st.integers(0, 99))
def test_laws(ndim, a, b):
    ta, tb, x = affine(ndim, a), affine(ndim, b), points(ndim)
    torch.testing.assert_close((ta @ tb)(x), ta(tb(x)))
    torch.testing.assert_close(ta.inverse()(ta(x)), x)
    torch.testing.assert_close(ta(ta.inverse()(x)), x)
    torch.testing.assert_close((ta @ tb).inverse().matrix, (tb.inverse() @ ta.inverse()).matrix)
    assert torch.equal(Matrix.identity(ndim)(x), x)


@both
def test_a_shift_shifts(ndim):
    offset = torch.tensor([[1.0, -2.0, 3.0], [4.0, 5.0, -6.0]], dtype=torch.float64)[:, :ndim]
    torch.testing.assert_close(Matrix.shift(offset)(points(ndim)), points(ndim) + offset[:, None])


@both
def test_composite_runs_the_last_part_first(ndim):
    a, wave, x = affine(ndim), Wave(ndim), points(ndim)
    both_ways = Composite((a, wave))
    assert isinstance(both_ways, Transform) and both_ways.ndim == ndim
    torch.testing.assert_close(both_ways(x), a(wave(x)))
    assert (both_ways(x) - wave(a(x))).abs().max() > 0.1
    torch.testing.assert_close(both_ways.inverse()(both_ways(x)), x)


@both
def test_compose_multiplies_neighbouring_matrices_and_keeps_others(ndim):
    a, b, c, wave, x = affine(ndim, 1), affine(ndim, 2), affine(ndim, 3), Wave(ndim), points(ndim)
    product = compose(a, b, c)
    assert isinstance(product, Matrix)
    torch.testing.assert_close(product(x), a(b(c(x))))
    mixed = compose(a, b, wave, c)
    assert isinstance(mixed, Composite) and len(mixed.parts) == 3
    torch.testing.assert_close(mixed(x), a(b(wave(c(x)))))
    assert compose(a) is a


@both
def test_one_map_for_many_and_many_maps_for_one(ndim):
    many, one, x = affine(ndim, 4, n=3), affine(ndim, 5), points(ndim, 3)
    for i in range(3):
        alone = Matrix(many.matrix[i])
        torch.testing.assert_close(many(x)[i], alone(x[i: i + 1])[0])
        torch.testing.assert_close(many(x[:1])[i], alone(x[:1])[0])
        torch.testing.assert_close(one(x)[i], one(x[i: i + 1])[0])
        torch.testing.assert_close((many @ one).matrix[i], (alone @ one).matrix[0])
        torch.testing.assert_close(many.inverse().matrix[i], alone.inverse().matrix[0])


@both
def test_points_keep_their_dtype(ndim):
    a, x = affine(ndim), points(ndim)
    assert a(x.float()).dtype == torch.float32
    torch.testing.assert_close(a(x.float()).double(), a(x), atol=1e-3, rtol=0)


@both
def test_a_projective_last_row_divides(ndim):
    a, x = projective(ndim), points(ndim)
    assert not a.affine and affine(ndim).affine
    homogeneous = torch.cat([x, torch.ones_like(x[..., :1])], -1) @ a.matrix.mT
    torch.testing.assert_close(a(x), homogeneous[..., :ndim] / homogeneous[..., ndim:])
    torch.testing.assert_close(a.inverse()(a(x)), x)
    torch.testing.assert_close((a @ a)(x), a(a(x)))
    scaled = Matrix(3 * affine(ndim).matrix)  # the same map, written with another last row
    torch.testing.assert_close(scaled(x), affine(ndim)(x))


@both
@pytest.mark.parametrize("kind", ["singular", "nan", "inf"])
def test_what_cannot_be_inverted_is_refused(ndim, kind):
    m = torch.eye(ndim + 1, dtype=torch.float64)
    m[0, 0] = {"singular": 0.0, "nan": float("nan"), "inf": float("inf")}[kind]
    with pytest.raises(GeometryError, match=r"singular or not finite.*must be invertible"):
        Matrix(m)
    with pytest.raises(GeometryError, match="singular or not finite"):
        Matrix(torch.stack([torch.eye(ndim + 1, dtype=torch.float64), m]))


@both
def test_what_is_no_square_matrix_is_refused(ndim):
    for wrong in (torch.eye(ndim + 1)[:ndim], torch.eye(ndim + 3), torch.zeros(1, 1, ndim + 1, ndim + 1)):
        with pytest.raises(GeometryError, match=r"matrix: shape .* expected \(3, 3\), \(4, 4\)"):
            Matrix(wrong)


@both
def test_repr_tells_what_one_debugs(ndim):
    text = repr(Matrix.shift(torch.tensor([[1.5, -2.0, 3.0]], dtype=torch.float64)[:, :ndim]))
    assert text == {2: "Matrix(2D, [1.0000 0.0000 1.5000; 0.0000 1.0000 -2.0000] RAS mm, fixed → moving)",
                    3: "Matrix(3D, [1.0000 0.0000 0.0000 1.5000; 0.0000 1.0000 0.0000 -2.0000; 0.0000 0.0000 1.0000 3.0000] "
                       "RAS mm, fixed → moving)"}[ndim]
    assert "batch 2" in repr(affine(ndim, n=2))


@both
def test_gradients_reach_matrix_and_points(ndim):
    x = points(ndim)[:, :3].requires_grad_()
    top = affine(ndim).matrix[:, :ndim].clone().requires_grad_()  # the last row of an affine map is no variable
    row = torch.eye(ndim + 1, dtype=torch.float64)[None, ndim:]
    assert torch.autograd.gradcheck(lambda a, b: Matrix(torch.cat([a, row], 1))(b), (top, x))
    assert torch.autograd.gradcheck(lambda a, b: Matrix(a)(b), (projective(ndim).matrix.clone().requires_grad_(), x))


def test_wrong_points_and_mixed_dimensions_are_refused():
    flat, solid = Matrix.identity(2), Matrix.identity(3)
    for points in (torch.zeros(4, 3), torch.zeros(1, 4, 2), torch.zeros(4, 3).numpy(), [[0.0, 0.0, 0.0]]):
        with pytest.raises(GeometryError, match=r"points: .*expected a tensor \(N, P, 3\)"):
            solid(points)
    with pytest.raises(GeometryError, match="of dimensions 3 and 2"):
        solid @ flat
