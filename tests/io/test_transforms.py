"""Transform files: SimpleITK is the oracle for what a file means."""

from __future__ import annotations

import numpy as np
import pytest
import SimpleITK as sitk
import torch

from regkit.errors import FormatError, GeometryError, OutputError
from regkit.io import read_transform, write_transform
from regkit.io.itk import matrix_to_lps, matrix_to_ras
from regkit.space import Matrix


def some_matrix(ndim: int, seed: int = 0) -> Matrix:
    rng = np.random.default_rng(seed)
    m = np.eye(ndim + 1)
    m[:ndim, :ndim] += rng.normal(size=(ndim, ndim)) * 0.3
    m[:ndim, ndim] = rng.normal(size=ndim) * 150
    return Matrix(torch.from_numpy(m))


def itk_of_ras(transform: sitk.Transform, points: np.ndarray) -> np.ndarray:
    """RAS points through ITK's own mapping, whatever our code thinks of it."""
    flip = np.r_[-1, -1, 1][: points.shape[1]]
    return np.array([transform.TransformPoint(p.tolist()) for p in points * flip]) * flip


def points_of(ndim: int, count: int = 1000) -> np.ndarray:
    return np.random.default_rng(1).uniform(-300, 300, (count, ndim))


@pytest.mark.parametrize("suffix", [".tfm", ".txt", ".h5", ".mat"])
@pytest.mark.parametrize("ndim", [2, 3])
def test_written_files_map_in_itk_as_here(tmp_path, ndim, suffix):
    matrix = some_matrix(ndim)
    path = write_transform(matrix, tmp_path / f"t{suffix}")
    points = points_of(ndim)
    ours = matrix(torch.from_numpy(points)[None])[0].numpy()
    assert np.abs(itk_of_ras(sitk.ReadTransform(str(path)), points) - ours).max() < 1e-9
    back = read_transform(path, ndim)
    assert torch.allclose(back.matrix, matrix.matrix, rtol=0, atol=1e-10)
    assert [p.name for p in tmp_path.iterdir()] == [f"t{suffix}"]


def kinds(ndim: int) -> dict[str, sitk.Transform]:
    centre, shift = (11.0, -22.0, 33.0)[:ndim], (5.0, 6.0, -7.0)[:ndim]
    affine = sitk.AffineTransform(
        (np.eye(ndim) + 0.1 * np.arange(ndim * ndim).reshape(ndim, ndim)).ravel().tolist(), shift, centre
    )
    both = {
        "affine": affine,
        "translation": sitk.TranslationTransform(ndim, shift),
        "scale": sitk.ScaleTransform(ndim, (1.1, 0.9, 1.2)[:ndim]),
        "identity": sitk.Transform(ndim, sitk.sitkIdentity),
    }
    if ndim == 2:
        own = {
            "euler": sitk.Euler2DTransform(centre, 0.4, shift),
            "similarity": sitk.Similarity2DTransform(1.2, 0.4, shift, centre),
        }
    else:
        versor = sitk.VersorTransform((0, 0.6, 0.8), 0.5)
        own = {
            "euler": sitk.Euler3DTransform(centre, 0.4, 0.1, -0.3, shift),
            "versor": versor,
            "versorrigid": sitk.VersorRigid3DTransform((1, 0, 0), 0.3, shift, centre),
            "similarity": sitk.Similarity3DTransform(1.2, (0, 1, 0), 0.3, shift, centre),
            "scaleskew": sitk.ScaleSkewVersor3DTransform((1, 1.1, 0.9), (0.1, 0, 0, 0.2, 0, 0), (0, 1, 0), 0.2, shift, centre),
        }
    every = both | own
    composite = sitk.CompositeTransform([every["euler"], every["scale"], every["affine"]])  # the last added acts first
    return every | {"composite": composite, "nested": sitk.CompositeTransform([composite, every["translation"]])}


@pytest.mark.parametrize("suffix", [".tfm", ".h5"])
@pytest.mark.parametrize("ndim,name", [(d, name) for d in (2, 3) for name in kinds(d)])
def test_every_linear_kind_of_itk(tmp_path, ndim, name, suffix):
    transform = kinds(ndim)[name]
    path = tmp_path / f"t{suffix}"
    if name == "nested":
        transform.FlattenTransform()  # ITK writes no nested ones
    sitk.WriteTransform(transform, str(path))
    points = points_of(ndim, 50)
    ours = read_transform(path, ndim)(torch.from_numpy(points)[None])[0].numpy()
    assert np.abs(itk_of_ras(transform, points) - ours).max() < 1e-6


def test_composite_order_is_itks(tmp_path):
    shift, scale = sitk.TranslationTransform(3, (10, 0, 0)), sitk.ScaleTransform(3, (2, 2, 2))
    sitk.WriteTransform(sitk.CompositeTransform([shift, scale]), str(tmp_path / "t.tfm"))
    ours = read_transform(tmp_path / "t.tfm").matrix[0]
    assert torch.allclose(ours[:3, 3], torch.tensor([-10.0, 0, 0]).double())  # scaled first, then shifted by +10 mm in LPS


def test_text_is_the_same_bytes_and_full_precision(tmp_path):
    matrix = some_matrix(3)
    text = write_transform(matrix, tmp_path / "a.tfm").read_bytes()
    assert write_transform(matrix, tmp_path / "b.txt").read_bytes() == text
    lines = text.decode().splitlines()
    assert lines[:3] == ["#Insight Transform File V1.0", "#Transform 0", "Transform: AffineTransform_double_3_3"]
    assert lines[4] == "FixedParameters: 0 0 0"
    values = np.array(lines[3].split()[1:], dtype=float)
    lps = matrix_to_lps(matrix.matrix[0]).numpy()
    assert np.array_equal(values, [*lps[:3, :3].ravel(), *lps[:3, 3]])
    identity = write_transform(Matrix.identity(2), tmp_path / "i.tfm").read_text()
    assert "Parameters: 1 0 0 1 0 0\n" in identity and "-0" not in identity


@pytest.mark.parametrize("ndim", [2, 3])
def test_lps_flip(ndim):
    m = some_matrix(ndim).matrix
    f = torch.diag(torch.tensor([*[-1.0, -1, 1, 1][:ndim], 1.0]).double())
    assert torch.equal(matrix_to_lps(m), f @ m @ f) and torch.equal(matrix_to_ras(matrix_to_lps(m)), m)


def test_files_that_are_not_linear_itk_transforms(tmp_path):
    def refuses(path, match, error=FormatError, ndim=None):
        with pytest.raises(error, match=match) as caught:
            read_transform(path, ndim)
        assert path.name in str(caught.value) and "\n" not in str(caught.value)

    field = sitk.DisplacementFieldTransform(sitk.Image((4, 4, 4), sitk.sitkVectorFloat64))
    sitk.WriteTransform(field, str(tmp_path / "f.h5"))
    refuses(tmp_path / "f.h5", "DisplacementField.*only linear")
    sitk.WriteTransform(sitk.BSplineTransform(2), str(tmp_path / "b.tfm"))
    refuses(tmp_path / "b.tfm", "BSpline.*only linear")
    mixed = sitk.CompositeTransform([sitk.TranslationTransform(2), sitk.BSplineTransform(2)])
    sitk.WriteTransform(mixed, str(tmp_path / "m.h5"))
    refuses(tmp_path / "m.h5", "only linear")
    for name in ("flirt.mat", "greedy.txt", "x.tfm"):
        np.savetxt(tmp_path / name, np.eye(4))
        refuses(tmp_path / name, "FLIRT.*greedy.*cannot be told apart.*c3d_affine_tool")
    write_transform(some_matrix(2), tmp_path / "two.tfm")
    refuses(tmp_path / "two.tfm", "2D transform; expected 3D", GeometryError, 3)
    refuses(tmp_path / "gone.tfm", "does not exist")
    refuses(tmp_path / "a.lta", "known suffixes .tfm, .txt")
    for name, content in {
        "e.tfm": b"",
        "t.tfm": b"hello",
        "t.h5": b"hello",
        "t.mat": b"\0\1\2\3" * 30,
        "z.tfm": b"\xff\xfe\0" * 9,
    }.items():
        (tmp_path / name).write_bytes(content)
        refuses(tmp_path / name, "ITK transform|is empty")
    whole = write_transform(some_matrix(3), tmp_path / "w.tfm").read_text()
    for n, text in enumerate(
        [whole[:90], whole.replace("Parameters: ", "Parameters: nan ", 1), whole.replace("Affine", "Affinity")]
    ):
        (tmp_path / f"cut{n}.tfm").write_text(text)
        refuses(tmp_path / f"cut{n}.tfm", "transform: ")
    (tmp_path / "flat.tfm").write_text(whole.replace(whole.splitlines()[3], "Parameters: 1 0 0 0 1 0 0 0 0 0 0 0"))
    refuses(tmp_path / "flat.tfm", "singular", GeometryError)


def test_writing_refuses_politely(tmp_path):
    matrix = some_matrix(3)
    with pytest.raises(FormatError, match=r"written as one of .tfm"):
        write_transform(matrix, tmp_path / "t.lta")
    with pytest.raises(GeometryError, match=r"batch of 2"):
        write_transform(Matrix(matrix.matrix.repeat(2, 1, 1)), tmp_path / "t.tfm")
    projective = matrix.matrix.clone()
    projective[0, 3, 0] = 1e-3
    with pytest.raises(GeometryError, match=r"projective"):
        write_transform(Matrix(projective), tmp_path / "t.tfm")
    (tmp_path / "t.tfm").write_text("mine")
    with pytest.raises(OutputError, match=r"t.tfm exists"):
        write_transform(matrix, tmp_path / "t.tfm")
    assert (tmp_path / "t.tfm").read_text() == "mine" and len(list(tmp_path.iterdir())) == 1


WHOLE = """#Insight Transform File V1.0
#Transform 0
Transform: Euler3DTransform_double_3_3
Parameters: 0.1 -0.2 0.3 4 5 6
FixedParameters: 1 2 3
"""


@pytest.mark.parametrize("text,reason", [
    (WHOLE.replace("0.3", "O.3"), "Parameters holds a word that is no number"),
    (WHOLE.replace(": 0.1 -0.2 0.3", ":`0.1 -0.2 0,3"), "Parameters holds a word that is no number"),  # of which ITK dies
    (WHOLE.replace(" 5 6", ""), "Parameters holds 4 numbers; a Euler3DTransform has 6"),
    (WHOLE.replace("FixedParameters: 1 2 3", ""), "lacks FixedParameters of a Euler3DTransform"),
    (WHOLE.replace("0.3", "nan"), "holds NaN"), (WHOLE + "FixedParameters: 1 x 3\n", "is there twice"),
    (WHOLE.replace("3DTrans", "x" * 10**6), r"its kind is 'Eulerx{,300}…'; expected a name"),
    (WHOLE[: WHOLE.index("Fixed")], "lacks FixedParameters"), (WHOLE[:-3], "it may be (damaged|truncated)"),
], ids=["word", "deadly", "few", "no fixed", "nan", "twice", "long", "truncated", "cut"])
def test_a_text_that_lacks_numbers_is_no_identity(tmp_path, text, reason):
    """ITK takes what it cannot read for the identity, or for a centre at 0, without a word."""
    (tmp_path / "a.tfm").write_text(WHOLE)
    assert not torch.allclose(read_transform(tmp_path / "a.tfm").matrix, torch.eye(4, dtype=torch.float64))
    (tmp_path / "a.tfm").write_text(text)
    with pytest.raises(FormatError, match=reason):
        read_transform(tmp_path / "a.tfm")


def test_hdf5_of_which_itk_dies(tmp_path):
    write_transform(Matrix.identity(3), tmp_path / "a.h5")
    whole = (tmp_path / "a.h5").read_bytes()
    (tmp_path / "a.h5").write_bytes(whole[:2167] + b"{}" * 300 + whole[2167:])
    with pytest.raises(FormatError, match="is not a readable ITK transform"):
        read_transform(tmp_path / "a.h5")


def test_a_binary_file_that_promises_more_than_it_holds(tmp_path):
    write_transform(Matrix.identity(3), tmp_path / "a.mat")
    blob = bytearray((tmp_path / "a.mat").read_bytes())
    blob[7] = 0x70  # two thousand million rows
    (tmp_path / "a.mat").write_bytes(blob)
    with pytest.raises(FormatError, match=r"it promises \d+×1 numbers in \d+ bytes"):
        read_transform(tmp_path / "a.mat")
