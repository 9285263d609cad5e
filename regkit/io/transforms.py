"""Transforms as files: linear ones in ITK's, as ITK, ANTs and 3D Slicer read them (LPS there, RAS here; both fixed → moving), others
in JSON, and displacement fields."""

from __future__ import annotations

import math
import re
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from regkit.errors import FormatError, GeometryError, OptionError
from regkit.image import Image
from regkit.io import native
from regkit.io.images import read_image, write_image
from regkit.io.itk import matrix_to_lps, matrix_to_ras, points_to_ras
from regkit.io.output import output_file
from regkit.io.paths import home, in_utf8, short
from regkit.io.slices import named, reason
from regkit.space import Grid, Matrix, Transform

_TEXT = (".tfm", ".txt")
_NUMBERS = ("Parameters", "FixedParameters")
_HDF5 = (".h5", ".hdf5")
_BINARY = (*_HDF5, ".mat")
SUFFIXES = (*_TEXT, *_BINARY, native.SUFFIX)
_MAGIC = b"#Insight Transform File"
_HDF = b"\x89HDF\r\n\x1a\n"
_CENTRED = {"AffineTransform": "affine", "MatrixOffsetTransformBase": "affine", "ScaleTransform": "each", "Euler2DTransform": 3,
            "Rigid2DTransform": 3, "Similarity2DTransform": 4, "Euler3DTransform": 6, "VersorTransform": 3, "VersorRigid3DTransform": 6,
            "Similarity3DTransform": 7, "ScaleVersor3DTransform": 9, "ScaleSkewVersor3DTransform": 15,
            "ComposeScaleSkewVersor3DTransform": 12}
_COUNTS = {**_CENTRED, "TranslationTransform": "each", "IdentityTransform": 0}  # how many parameters ITK's transforms have
_PATIENCE = 20.0  # seconds that another process may take to read a transform
_REACH = 1000.0  # mm; where the map is probed


def read_transform(path: str | Path, ndim: int | None = None) -> Transform:
    """The linear transform in an ITK file (.tfm, .txt, .h5, .mat), one of ITK's linear kinds or a composite of them; or whatever
    `write_transform` put into a .json file.

    ndim: 2 or 3 if only that will do.

    Raises FormatError (missing, damaged, not ITK's, not linear), GeometryError (not of `ndim` dimensions, not invertible).
    """
    path = home(path)
    where = f"transform: {path}"
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise FormatError(f"{where} has none of the known suffixes {', '.join(SUFFIXES)}; expected an ITK transform, or regkit's .json "
                          "(beside a displacement.nii.gz of regkit lies its transform.json)")
    try:
        with path.open("rb") as file:
            head = file.read(4096)
    except (OSError, ValueError) as error:
        missing = isinstance(error, FileNotFoundError)
        raise FormatError(f"{where} {'does not exist; check the path' if missing else f'cannot be read: {error}'}") from error
    if suffix == native.SUFFIX:
        found = native.decode(path, where)
        _check_dims(found.ndim, ndim, where)
        return found
    _check_head(head, path.stat().st_size, suffix, where)
    if suffix in _TEXT:
        _check_text(path, where)
    elif suffix in _HDF5:
        _check_survived(path, where)
    transform = _read_itk(path, where)
    dims = int(transform.GetDimension())
    _check_dims(dims, ndim, where)
    if dims not in (2, 3):
        raise GeometryError(f"{where} is a {dims}D transform; expected 2D or 3D")
    with named(where):
        return Matrix(matrix_to_ras(torch.from_numpy(_probe(transform, dims, where))))


def _check_dims(dims: int, ndim: int | None, where: str) -> None:
    if ndim is not None and dims != ndim:
        raise GeometryError(f"{where} is a {dims}D transform; expected {ndim}D, as the scans are")


def _check_head(head: bytes, size: int, suffix: str, where: str) -> None:
    """Refuse other programs' files before ITK tries each of its readers on them and prints what they think."""
    if not head:
        raise FormatError(f"{where} is empty (0 bytes); write or fetch it again")
    if _is_plain_matrix(head):
        raise FormatError(
            f"{where} holds rows of bare numbers: FLIRT's (scaled voxels) and greedy's (RAS mm) cannot be told apart; convert "
            "with `c3d_affine_tool -ref FIXED -src MOVING X.mat -fsl2ras -oitk X.tfm` (FLIRT) or "
            "`c3d_affine_tool X.mat -oitk X.tfm` (greedy)")
    if suffix in _TEXT and not head.lstrip(b"\xef\xbb\xbf \r\n").startswith(_MAGIC):
        raise FormatError(f"{where} does not begin with '{_MAGIC.decode()}'; expected an ITK transform")
    if suffix == ".mat":
        _check_mat(head, size, where)
    if suffix in _HDF5 and not head.startswith(_HDF):
        raise FormatError(f"{where} is not an HDF5 file; it may be damaged, expected an ITK transform")


def _check_mat(head: bytes, size: int, where: str) -> None:
    """Refuse matrices that promise more numbers than the file has bytes: ITK asks for their memory first."""
    at = 0
    while at + 20 <= len(head):
        order = "<" if int.from_bytes(head[at : at + 4], "little") < 10_000 else ">"
        kind, rows, columns, _, name = struct.unpack_from(f"{order}5i", head, at)
        if not (0 <= kind < 10_000 and rows >= 0 and columns >= 0 and name >= 0 and name + rows * columns <= size):
            raise FormatError(f"{where} is not a readable ITK transform: it promises {rows}×{columns} numbers in {size} bytes; it may be "
                              "damaged")
        at += 20 + name + rows * columns * (4 if kind // 10 % 10 == 1 else 8)


def _is_plain_matrix(head: bytes) -> bool:
    try:
        lines = head.decode("ascii").replace(",", " ").splitlines()
        rows = [[float(v) for v in line.split()] for line in lines if line.strip()]
    except (UnicodeDecodeError, ValueError):
        return False
    return len(rows) in (3, 4) and len({len(row) for row in rows}) == 1 and len(rows[0]) in (3, 4)


def _read_itk(path: Path, where: str) -> Any:
    import SimpleITK as sitk

    name = in_utf8(path)
    try:
        transform = sitk.ReadTransform(name)
        linear = transform.IsLinear()
    except Exception as error:
        raise FormatError(f"{where} is not a readable ITK transform: {reason(error)}; it may be damaged") from error
    if not linear:
        raise FormatError(f"{where} is a {transform.GetName()}; only linear transforms are supported (Translation, Euler, "
                          "Versor, Similarity, Affine, … and composites of them), not displacement fields or B-splines")
    return transform


def _check_text(path: Path, where: str) -> None:
    """Raise FormatError where a text file lacks numbers, before ITK looks at it: what it cannot read it takes for the identity, and what is
    not there it takes from beyond the end of what is, without a word or dying of it."""
    kind = ""
    needed: dict[str, int | None] = {name: 0 for name in _NUMBERS}  # how many numbers are still to come, at least
    for line in [*path.read_text(encoding="latin-1").splitlines(), "Transform:"]:
        name, _, stated = line.partition(":")
        name = name.strip()
        if name == "Transform":
            if kind and needed:
                raise FormatError(f"{where} lacks {' and '.join(needed)} of a {kind}; it may be truncated")
            kind, _, dims = stated.strip().partition("_")
            if kind and not re.fullmatch(r"\w{1,60}", kind, re.ASCII):
                raise FormatError(f"{where}: its kind is {short(kind)}; expected a name such as AffineTransform; it may be damaged")
            d = int(dims[-1]) if dims[-1:].isdecimal() else 0
            count = {"affine": d * d + d, "each": d}.get(str(_COUNTS.get(kind)), _COUNTS.get(kind))
            needed = {} if kind == "CompositeTransform" else {"Parameters": count, "FixedParameters": d if kind in _CENTRED else None}
        elif name in _NUMBERS and name not in needed and kind != "CompositeTransform":
            raise FormatError(f"{where}: {name} is there twice; it may be damaged")
        elif name in needed:
            try:
                known = [float(word) for word in stated.split()]
            except ValueError as error:
                raise FormatError(f"{where}: {name} holds a word that is no number; it may be damaged") from error
            if not all(map(math.isfinite, known)):
                raise FormatError(f"{where}: {name} holds NaN or infinity; it may be damaged")
            least = needed.pop(name)
            if least is not None and (len(known) < least or (name == "Parameters" and len(known) > least)):
                raise FormatError(f"{where}: {name} holds {len(known)} numbers; a {kind} has {least}, so it may be truncated")


def _check_survived(path: Path, where: str) -> None:
    """Raise FormatError where ITK dies of a file, or comes to no end: a process of its own reads it first. HDF5 is a file system
    of its own, and its library trusts what it reads."""
    code, nowhere = "import sys, SimpleITK; SimpleITK.ReadTransform(sys.argv[1])", subprocess.DEVNULL
    if not sys.executable:
        return
    try:
        done = subprocess.run([sys.executable, "-I", "-c", code, in_utf8(path.absolute())], stdin=nowhere, stdout=nowhere, stderr=nowhere,
                              timeout=_PATIENCE, check=False)
    except subprocess.TimeoutExpired:
        raise FormatError(f"{where} is not a readable ITK transform: reading it comes to no end; it may be damaged") from None
    except OSError:
        return  # no other process may be had
    if done.returncode not in (0, 1):  # 1 is an exception, which says more when it is raised here
        raise FormatError(f"{where} is not a readable ITK transform: ITK dies of it; it may be damaged")


def _probe(transform: Any, dims: int, where: str) -> np.ndarray:
    """(D+1, D+1) LPS matrix of what `transform` does to points: the same lines for every kind, centre and composite order."""
    matrix = np.eye(dims + 1)
    try:
        origin = np.array(transform.TransformPoint([0.0] * dims))
        for axis in range(dims):
            tip = np.array(transform.TransformPoint([_REACH if k == axis else 0.0 for k in range(dims)]))
            matrix[:dims, axis] = (tip - origin) / _REACH
        matrix[:dims, dims] = origin
        probes = np.array([[17.0, -251.0, 93.0], [-340.0, 66.0, -205.0], [_REACH, _REACH, -_REACH]])[:, :dims]
        mapped = np.array([transform.TransformPoint(p.tolist()) for p in probes])
    except Exception as error:
        raise FormatError(f"{where} does not map points: {reason(error)}") from error
    stray = np.abs(mapped - probes @ matrix[:dims, :dims].T - matrix[:dims, dims]).max()
    if not np.isfinite(matrix).all():
        raise FormatError(f"{where} maps points to NaN or infinity; it may be damaged")
    if not stray <= 1e-6 * max(1.0, float(np.abs(mapped).max())):
        raise FormatError(f"{where} is not linear (it strays by {stray:.3g} mm); only linear transforms are supported")
    return matrix


def write_transform(transform: Transform, path: str | Path, *, overwrite: bool = False) -> Path:
    """Write one affine matrix as an ITK AffineTransform: text (.tfm, .txt; the same bytes for the same matrix), .h5 or .mat; or any
    matrix, spline or sequence of them as .json, which only regkit reads.

    Raises FormatError for another suffix or kind, GeometryError for a batch, OutputError for a place that is taken or read-only.
    """
    path = home(path)
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise FormatError(f"output: {path.name}: a transform is written as one of {', '.join(SUFFIXES)}")
    if suffix == native.SUFFIX:
        text = native.encode(transform)
        with output_file(path, overwrite=overwrite) as temporary:
            temporary.write_text(text, encoding="ascii")
        return path
    if not isinstance(transform, Matrix):
        raise FormatError(f"transform: a {type(transform).__name__} does not go into an ITK affine file; give a name that ends in .json")
    if len(transform.matrix) != 1:
        raise GeometryError(f"transform: a batch of {len(transform.matrix)}; expected one transform a file")
    dims = transform.ndim
    matrix = matrix_to_lps(transform.matrix[0].detach().cpu())
    if not torch.allclose(matrix[dims], torch.eye(dims + 1, dtype=matrix.dtype)[dims], rtol=0, atol=1e-9):  # rounding is not
        raise GeometryError(f"transform: last row {matrix[dims].tolist()} is projective; an ITK affine file cannot hold it, "
                            "give a name that ends in .json")
    parameters = [v + 0.0 for v in (*matrix[:dims, :dims].flatten().tolist(), *matrix[:dims, dims].tolist())]
    with output_file(path, overwrite=overwrite) as temporary:
        if suffix in _TEXT:
            # Written here, not by SimpleITK, whose import takes longer than many a registration's last step.
            temporary.write_text("\n".join([
                f"{_MAGIC.decode()} V1.0", "#Transform 0", f"Transform: AffineTransform_double_{dims}_{dims}",
                f"Parameters: {' '.join(f'{v:.17g}' for v in parameters)}", f"FixedParameters: {' '.join('0' * dims)}", ""]),
                encoding="ascii")
        else:
            _write_itk(parameters, dims, temporary)
    return path


def _write_itk(parameters: list[float], dims: int, path: Path) -> None:
    import SimpleITK as sitk

    made = sitk.AffineTransform(dims)
    made.SetParameters(parameters)
    name = in_utf8(path)
    try:
        sitk.WriteTransform(made, name)
    except Exception as error:
        raise FormatError(f"output: {path.name} cannot be written by ITK: {reason(error)}") from error


def read_field(path: str | Path, ndim: int) -> Image:
    """A displacement field as ITK and ANTs write it (NIfTI of five axes, or NRRD and MetaImage with `ndim` channels), in LPS mm.

    → Image (1, D, *S) of what is added to fixed points, RAS mm. Raises FormatError if it has other channels or is unreadable."""
    try:
        field = read_image(path, name="displacement")
    except OptionError as error:  # several volumes: channels along the fourth axis
        raise FormatError(f"displacement: {path} has no fifth axis; expected X, Y, Z, 1, {ndim}, as ITK writes it") from error
    if field.channels != field.ndim or field.ndim != ndim:
        raise FormatError(f"displacement: {path} is {field.ndim}D with {field.channels} channel{'s' * (field.channels != 1)}; expected "
                          f"{ndim}D with {ndim} channels, as ITK writes it (NIfTI: X, Y, Z, 1, {ndim})")
    return field.with_data(points_to_ras(field.data.float().movedim(1, -1)).movedim(-1, 1).float())


def write_field(transform: Transform, grid: Grid, path: str | Path, *, overwrite: bool = False) -> Path:
    """Write what a transform adds to the points of a grid as a displacement field, as ITK, ANTs and 3D Slicer read it: mm, LPS.

    Between its points other tools interpolate linearly; a field on the fixed scan's grid is as exact as that scan's voxels."""
    field = torch.empty(1, grid.ndim, math.prod(grid.shape))
    for low in range(0, field.shape[-1], 500_000):
        index = np.stack(np.unravel_index(np.arange(low, min(low + 500_000, field.shape[-1])), grid.shape), -1)
        points = grid.to_world(torch.from_numpy(index).double()[None])
        field[:, :, low: low + 500_000] = points_to_ras(transform(points) - points).mT  # the flip is its own inverse
    return write_image(Image(field.reshape(1, grid.ndim, *grid.shape), grid), path, overwrite=overwrite)
