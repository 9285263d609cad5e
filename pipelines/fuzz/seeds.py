"""The files that are spoilt: small and valid, one of each kind and layout that regkit reads, made in code."""

from __future__ import annotations

import gzip
import io
import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

SHAPE = (6, 5, 4)
AFFINE = np.array([[-1.5, 0.1, 0, 4], [0.1, 2, 0, -7], [0, 0, 2.5, 11], [0, 0, 0, 1.0]])
STRAIGHT = np.array([[-1.5, 0, 0, 4], [0, 2, 0, -7], [0, 0, 2.5, 11], [0, 0, 0, 1.0]])


@dataclass(frozen=True)
class Seed:
    """A file. suffix: of its name. inner: its bytes, before they are packed as one gzip member where `packed`. beside: other files that
    it needs, by suffix. kind: what opens it, see doors.py. honest: it is as large as it says, and that is too large, so that a refusal for
    want of memory is right. length: zeros follow until the file has so many bytes."""

    kind: str
    suffix: str
    inner: bytes
    packed: bool = False
    beside: dict[str, bytes] = field(default_factory=dict)
    honest: bool = False
    length: int = 0

    def outer(self, inner: bytes) -> bytes:
        return gzip.compress(inner, 1, mtime=0) if self.packed else inner


def _voxels(dtype: Any, shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 200, shape).astype(dtype)


def nifti(voxels: np.ndarray, *, packed: bool = False, two: bool = False, big: bool = False, scaled: bool = False, codes=(1, 1),
          extended: bool = False, intent: bool = False) -> Seed:
    header = (nib.Nifti2Header if two else nib.Nifti1Header)(endianness=">" if big else "<")
    header.set_data_dtype(voxels.dtype)
    image = (nib.Nifti2Image if two else nib.Nifti1Image)(voxels, AFFINE if codes[1] == 0 else STRAIGHT, header)
    image.set_sform(image.affine, codes[0])
    image.set_qform(image.affine if codes[1] else None, codes[1])
    image.header.set_xyzt_units("mm", "sec")
    if intent:
        image.header.set_intent("vector")
    if extended:
        image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"a note of the scanner's"))
    if scaled:
        image.header.set_slope_inter(0.25, -20)
    buffer = io.BytesIO()
    image.to_file_map({"header": nib.FileHolder(fileobj=buffer), "image": nib.FileHolder(fileobj=buffer)})
    blob = bytearray(buffer.getvalue())
    if scaled:  # nibabel writes voxels that fit without a scale
        at, width = (176, 8) if two else (112, 4)
        blob[at : at + 2 * width] = np.array([0.25, -20], f"{'>' if big else '<'}f{width}").tobytes()
    return Seed("image", ".nii.gz" if packed else ".nii", bytes(blob), packed)


def _pair() -> Seed:
    made = nib.Nifti1Pair(_voxels(np.int16), STRAIGHT)
    parts = {"header": io.BytesIO(), "image": io.BytesIO()}
    made.to_file_map({key: nib.FileHolder(fileobj=value) for key, value in parts.items()})
    return Seed("image", ".hdr", parts["header"].getvalue(), beside={".img": parts["image"].getvalue()})


def _mgh(packed: bool) -> Seed:
    blob = nib.MGHImage(_voxels(np.int16), STRAIGHT).to_bytes()
    return Seed("image", ".mgz" if packed else ".mgh", blob, packed)


def by_itk(suffix: str, array: np.ndarray, *, vector: bool = False, compress: bool = False, kind: str = "image", beside: str = "") -> Seed:
    """What SimpleITK writes."""
    import SimpleITK as sitk

    image = sitk.GetImageFromArray(array, isVector=vector)
    d = image.GetDimension()
    image.SetSpacing([1.5, 2, 2.5][:d])
    image.SetOrigin([4, -7, 11][:d])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"scan{suffix}"
        sitk.WriteImage(image, str(path), useCompression=compress)
        others = {other.suffix: other.read_bytes() for other in Path(folder).iterdir() if other != path}
        return Seed(kind, suffix, path.read_bytes(), beside=others)


def _by_pillow(suffix: str, array: np.ndarray, **options: Any) -> Seed:
    from PIL import Image

    picture, buffer = Image.fromarray(array), io.BytesIO()
    if options.pop("palette", False):
        picture = picture.convert("P", palette=Image.Palette.ADAPTIVE)
    picture.save(buffer, {".png": "PNG", ".tif": "TIFF", ".jpg": "JPEG", ".bmp": "BMP"}[suffix], **options)
    return Seed("image", suffix, buffer.getvalue())


def _transform(suffix: str, make: Callable[[Any], Any]) -> Seed:
    import SimpleITK as sitk

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"t{suffix}"
        sitk.WriteTransform(make(sitk), str(path))
        return Seed("transform", suffix, path.read_bytes())


def _affine(sitk: Any, d: int = 3) -> Any:
    made = sitk.AffineTransform(d)
    rows = np.eye(d) + 0.1 * np.random.default_rng(1).normal(size=(d, d))
    made.SetParameters([*rows.ravel().tolist(), *[1.25, -0.5, 0.125][:d]])
    made.SetFixedParameters([2.5, -7.25, 1.0][:d])
    return made


def _euler(sitk: Any) -> Any:
    return sitk.Euler3DTransform((1.0, 2.0, 3.0), 0.1, -0.1, 0.1, (1.0, -1.0, 2.0))


def _composite(sitk: Any) -> Any:
    return sitk.CompositeTransform([_affine(sitk), _euler(sitk), sitk.TranslationTransform(3, (1.0, -2.0, 0.5))])


def _native(spline: bool) -> Seed:
    import torch

    from regkit.io.native import encode
    from regkit.space import Frame, Grid, Matrix, model

    matrix = Matrix(torch.from_numpy(STRAIGHT))
    if not spline:
        return Seed("transform", ".json", encode(matrix).encode())
    tps: Any = model("tps", control=3)
    theta = 0.01 * torch.randn(1, tps.count(3), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return Seed("transform", ".json", encode(tps.transform(theta, Frame.of(Grid(SHAPE, torch.from_numpy(STRAIGHT))))).encode())


def _weights(kind: str) -> Seed:
    """Nets of regkit's own format, tensors of many types, and a training's checkpoint."""
    import torch

    from regkit.io.weights import write_tensors
    from regkit.localisation import Detector, KeypointNet, RegressionNet
    from regkit.registration.nets import save
    from regkit.training.checkpoint import Learner

    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "w.safetensors"
        if kind == "keypoints":
            save(KeypointNet(Detector(4, 2, width=4, depth=1), torch.rand(4, 2), "affine"), path, edge=16, mm=4.0, info={"by": "us"})
        elif kind == "regression":
            save(RegressionNet(8, 2, "rigid", width=4, depth=1, hidden=4), path, edge=8, mm=None, half=True)
        elif kind == "checkpoint":
            learner = Learner.of(Detector(2, 2, width=2, depth=1), 1e-3)
            learner.net(torch.rand(1, 1, 8, 8))[0].sum().backward()
            learner.optimiser.step()
            learner.averaged()
            learner.save(path, {"seen": 3})
        else:
            write_tensors(path, {"a": torch.arange(24.0).reshape(2, 3, 4), "b.half": torch.ones(3).half(), "c": torch.tensor([True, False]),
                                 "d": torch.tensor(7), "e": torch.zeros(0, 3)}, {"format": "some", "ß": "θ → T"})
        return Seed("checkpoint" if kind == "checkpoint" else "net" if kind in ("keypoints", "regression") else "tensors",
                    ".safetensors", path.read_bytes())


def _csv(kind: str, suffix: str, text: str) -> Seed:
    return Seed(kind, suffix, text.encode())


_MARKUPS = {"markups": [{"type": "Fiducial", "coordinateSystem": "LPS", "controlPoints": [
    {"id": "1", "label": "a", "position": [1.5, -2.0, 3.0], "positionStatus": "defined"},
    {"id": "2", "label": "b", "position": [-4.0, 5.0, 6.25], "positionStatus": "defined"}]}]}
_PAIRS = [{"id": "anna", "group": "head", "fixed": "fixed.nii.gz", "moving": "moving.nii.gz", "ndim": 3, "angle": 20.5,
           "truth": STRAIGHT.tolist()},
          {"id": "ben", "fixed": "fixed.png", "moving": "moving.png", "ndim": 2, "fixed_points": "points.csv",
           "moving_points": "points.csv"}]
_LEARN2REG = {"name": "Set", "registration_val": [{"fixed": "./fixed.nii.gz", "moving": "./moving.nii.gz"}]}
_RECORD = {"regkit": "0.1.0", "matrix": np.eye(4).tolist(), "settings": {"volume": None, "model": "rigid"}, "model": "rigid",
           "inputs": {"fixed": {"path": "fixed.nii.gz", "shape": list(SHAPE)}, "moving": {"path": "moving.nii.gz", "shape": list(SHAPE)}},
           "carried": {"points_space": "ras", "fixed_points": ["points.csv"], "moving_points": ["points.csv"], "labels": []}}

MAKERS: dict[str, Callable[[], Seed]] = {
    "nifti int16": lambda: nifti(_voxels(np.int16)),
    "nifti int16 gz": lambda: nifti(_voxels(np.int16), packed=True),
    "nifti float32 gz": lambda: nifti(_voxels(np.float32), packed=True, codes=(2, 0)),
    "nifti float64": lambda: nifti(_voxels(np.float64), codes=(0, 1)),
    "nifti uint64": lambda: nifti(_voxels(np.uint64), codes=(0, 0)),
    "nifti uint8 2d gz": lambda: nifti(_voxels(np.uint8, (6, 5)), packed=True),
    "nifti slice": lambda: nifti(_voxels(np.int32, (6, 1, 4))),
    "nifti big": lambda: nifti(_voxels(np.int16), big=True),
    "nifti scaled gz": lambda: nifti(_voxels(np.int16), packed=True, scaled=True),
    "nifti scaled big": lambda: nifti(_voxels(np.int32), big=True, scaled=True),
    "nifti two": lambda: nifti(_voxels(np.float32), two=True),
    "nifti two big gz": lambda: nifti(_voxels(np.int16), two=True, big=True, packed=True, scaled=True),
    "nifti colour": lambda: nifti(_voxels(np.uint8, (*SHAPE, 3)).view([(c, "u1") for c in "RGB"]).reshape(SHAPE)),
    "nifti 4d gz": lambda: nifti(_voxels(np.int16, (*SHAPE, 3)), packed=True),
    "nifti vector": lambda: nifti(_voxels(np.float32, (*SHAPE, 1, 3)), intent=True),
    "nifti extended gz": lambda: nifti(_voxels(np.uint8), packed=True, extended=True),
    "nifti pair": _pair,
    "mgh": lambda: _mgh(False),
    "mgz": lambda: _mgh(True),
    "nrrd int16": lambda: by_itk(".nrrd", _voxels(np.int16, SHAPE[::-1])),
    "nrrd float32 gzip": lambda: by_itk(".nrrd", _voxels(np.float32, SHAPE[::-1]), compress=True),
    "nrrd uint8 2d": lambda: by_itk(".nrrd", _voxels(np.uint8, (5, 6))),
    "nrrd vector": lambda: by_itk(".nrrd", _voxels(np.float32, (*SHAPE[::-1], 3)), vector=True),
    "nrrd text": lambda: Seed("image", ".nrrd", b"NRRD0004\n# by hand\ntype: short\ndimension: 3\nspace: left-posterior-superior\n"
                              b"sizes: 3 2 2\nspace directions: (1.5,0,0) (0,2,0) (0,0,2.5)\nkinds: domain domain domain\n"
                              b"encoding: ascii\nspace origin: (4,-7,11)\n\n1 2 3 4 5 6\n7 8 9 10 11 12\n"),
    "nrrd detached": lambda: by_itk(".nhdr", _voxels(np.int16, SHAPE[::-1])),
    "mha int16": lambda: by_itk(".mha", _voxels(np.int16, SHAPE[::-1])),
    "mha float32 packed": lambda: by_itk(".mha", _voxels(np.float32, SHAPE[::-1]), compress=True),
    "mha uint8 2d": lambda: by_itk(".mha", _voxels(np.uint8, (5, 6))),
    "mhd": lambda: by_itk(".mhd", _voxels(np.int16, SHAPE[::-1])),
    "png grey": lambda: by_itk(".png", _voxels(np.uint8, (9, 7))),
    "png 16 bits": lambda: by_itk(".png", _voxels(np.uint16, (9, 7)) * 99),
    "png colour": lambda: by_itk(".png", _voxels(np.uint8, (9, 7, 3)), vector=True),
    "png alpha": lambda: by_itk(".png", _voxels(np.uint8, (9, 7, 4)), vector=True),
    "png palette": lambda: _by_pillow(".png", _voxels(np.uint8, (9, 7, 3)), palette=True),
    "png large": lambda: _by_pillow(".png", _voxels(np.uint8, (90, 70))),
    "jpg": lambda: _by_pillow(".jpg", _voxels(np.uint8, (16, 24))),
    "tif float32": lambda: by_itk(".tif", _voxels(np.float32, (9, 7))),
    "tif packed": lambda: _by_pillow(".tif", _voxels(np.uint8, (16, 24)), compression="tiff_lzw"),
    "bmp": lambda: _by_pillow(".bmp", _voxels(np.uint8, (9, 7, 3))),
    "tfm affine": lambda: _transform(".tfm", _affine),
    "tfm affine 2d": lambda: _transform(".tfm", lambda sitk: _affine(sitk, 2)),
    "tfm euler": lambda: _transform(".txt", _euler),
    "tfm composite": lambda: _transform(".tfm", _composite),
    "tfm regkit": lambda: Seed("transform", ".tfm", b"#Insight Transform File V1.0\n#Transform 0\nTransform: AffineTransform_double_3_3\n"
                               b"Parameters: 1 0.1 0 -0.1 1 0 0 0 1.5 3.25 -4.5 10.125\nFixedParameters: 0 0 0\n"),
    "h5": lambda: _transform(".h5", _affine),
    "mat": lambda: _transform(".mat", _affine),
    "json matrix": lambda: _native(False),
    "json spline": lambda: _native(True),
    "csv points": lambda: _csv("points", ".csv", "x,y,z\n1.5,-2,3\n-4,5,6.25\n"),
    "csv named": lambda: _csv("points", ".csv", "# by hand\nname,x,y,z,note\na,1.5,-2,3,\"left, upper\"\nbé,-4,5,6.25,\n"),
    "csv semicolons": lambda: _csv("points", ".csv", "x;y;z\r\n1.5;-2;3\r\n-4;5;6.25\r\n"),
    "csv bare": lambda: _csv("points", ".csv", "1.5 -2 3\n-4 5 6.25\n"),
    "csv 2d": lambda: _csv("points", ".csv", "x\ty\n1.5\t2\n4\t5\n"),
    "fcsv": lambda: _csv("points", ".fcsv", "# Markups fiducial file version = 4.11\n# CoordinateSystem = LPS\n# columns = id,x,y,z,label\n"
                         "1,5,-10,0,a\n2,-8,4,6,b\n"),
    "markups": lambda: _csv("points", ".mrk.json", json.dumps(_MARKUPS, indent=1)),
    "csv pairs": lambda: _csv("cases", ".csv", "id,group,fixed,moving,fixed_points,moving_points\n"
                              "anna,head,fixed.nii.gz,moving.nii.gz,points.csv,points.csv\n"),
    "csv many pairs": lambda: _csv("cases", ".csv", "id;fixed;moving;ndim;angle\nanna;fixed.nii.gz;moving.nii.gz;3;10\n"
                                   "ben;fixed.png;moving.png;2;\n"),
    "json pairs": lambda: _csv("cases", ".json", json.dumps(_PAIRS)),
    "json learn2reg": lambda: _csv("cases", ".json", json.dumps(_LEARN2REG)),
    "csv scans": lambda: _csv("scans", ".csv", "scan,labels,person,split\nfixed.nii.gz,,anna,train\nmoving.nii.gz,,ben,validation\n"),
    "net keypoints": lambda: _weights("keypoints"),
    "net regression": lambda: _weights("regression"),
    "tensors": lambda: _weights("tensors"),
    "checkpoint": lambda: _weights("checkpoint"),
    "record": lambda: _csv("record", ".json", json.dumps(_RECORD)),
}


@cache
def seed(name: str) -> Seed:
    """The valid file of that name."""
    return MAKERS[name]()


def good() -> dict[str, bytes]:
    """Files that are never spoilt, which stand beside a spoilt one."""
    volume = nifti(_voxels(np.float32), packed=True)
    picture = by_itk(".png", _voxels(np.uint8, (9, 7)))
    return {"fixed.nii.gz": volume.outer(volume.inner), "moving.nii.gz": volume.outer(volume.inner), "fixed.png": picture.inner,
            "moving.png": picture.inner, "good.tfm": seed("tfm euler").inner, "good2d.tfm": seed("tfm affine 2d").inner,
            "points.csv": b"x,y,z\n1,2,3\n4,5,6\n"}
