"""The heads and brains the shipped nets learn from: templates whose terms allow redistribution, and nothing else.

ICBM 152 2009a (T1 of a stripped brain, shares of grey and white matter) comes with nilearn; Colin 27 (a whole head) with Debian's package
mricron-data, fetched once and checked. Both are under the MNI's notice: free to use, copy, modify and distribute.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import urllib.request
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from regkit.filters import smooth
from regkit.image import Image
from regkit.io import read_image
from regkit.io.output import output_file
from regkit.registration.align import align
from regkit.sampling import sample, warp
from regkit.space import Frame, Grid, Matrix
from regkit.training.synthesis import Anatomy

CACHE = Path("~/.cache/regkit/train_shipped")
DEB = "mricron-data_1.2.20211006+dfsg-4_all.deb"
URL = f"https://deb.debian.org/debian/pool/main/m/mricron/{DEB}"
SHA256 = "d40aa0ed66cf89bf6cafa049ad3884703c9d975c2ee2737525b7196528df9d6f"
MM = 4.0  # of the volumes that pictures are drawn from
BLUR = 6.0  # mm: the voxels pictures have
SCALE = 120.0  # mm: half the edge of the canvas, 240 mm
SHELLS = 4  # classes outside of the brain
VARIED = 4  # other heads a brain is put into


def frame() -> Frame:
    """The canvas around the middle of the ICBM brain."""
    return Frame(torch.tensor([[0.0, -18.0, 8.0]], dtype=torch.float64), SCALE)


def grid() -> Grid:
    """What pictures are drawn from: 300 mm around the frame's centre."""
    n = round(300 / MM)
    affine = torch.eye(4, dtype=torch.float64)
    affine[:3, :3] *= MM
    affine[:3, 3] = frame().centre[0] - (n - 1) / 2 * MM
    return Grid((n,) * 3, affine)


def fetch(folder: Path) -> Path:
    """Colin 27 (ch2.nii.gz) out of Debian's package, fetched once."""
    wanted = folder / "ch2.nii.gz"
    if not wanted.exists():
        folder.mkdir(parents=True, exist_ok=True)
        package = folder / DEB
        if not package.exists():
            aside = folder / f".{DEB}.{os.getpid()}"
            with urllib.request.urlopen(URL, timeout=120) as answer, aside.open("wb") as file:
                shutil.copyfileobj(answer, file)
            os.replace(aside, package)
        found = hashlib.sha256(package.read_bytes()).hexdigest()
        if found != SHA256:
            raise SystemExit(f"{package}: SHA-256 {found}, expected {SHA256}; remove it and run again")
        subprocess.run(["dpkg-deb", "-x", package, folder / "package"], check=True)
        shutil.copy(folder / "package/usr/share/mricron/templates/ch2.nii.gz", wanted)
    return wanted


def kept(folder: Path = CACHE) -> list[Anatomy]:
    """`anatomies`, made once."""
    path = folder.expanduser() / "anatomies.safetensors"
    if not path.exists():
        made = anatomies(folder)
        with output_file(path) as aside:
            save_file({f"{i}/{name}": getattr(one, name).contiguous() for i, one in enumerate(made) for name in ("parts", "values")}, aside)
    found, inner = load_file(path), (True,) * 3 + (False,) * SHELLS
    short = [Anatomy(found[f"{i}/parts"], found[f"{i}/values"], grid(), inner) for i in range(len(found) // 2)]
    heads, generator = short + [_with_neck(one) for one in short], torch.Generator().manual_seed(0)
    return heads + [_varied(head, generator) for _ in range(VARIED) for head in heads]


def _varied(head: Anatomy, generator: torch.Generator) -> Anatomy:
    """The same brain in another head: skull and skin thicker or thinner, face and neck elsewhere. One head is not all heads."""
    from scipy import ndimage

    brain = (head.parts[:3].sum(0) > 0.5).numpy()
    away = torch.from_numpy(ndimage.distance_transform_edt(~brain).astype(np.float32))  # voxels from the brain
    outwards = F.normalize(torch.stack(torch.gradient(smooth(away[None, None], [1.5] * 3)[0, 0])), dim=0)

    def field(channels: int, size: float, cells: int) -> Tensor:
        drawn = size * torch.randn(1, channels, *[cells] * 3, generator=generator)
        return smooth(F.interpolate(drawn, size=away.shape, mode="trilinear", align_corners=True), [3.0] * 3)[0]

    thicker = (0.2 * torch.randn((), generator=generator) + field(1, 0.2, 4)).clamp(-0.7, 0.7).exp()
    shift = field(3, 10.0 / MM, 5) * (away / 12).clamp(0, 1)
    index = torch.stack(torch.meshgrid(*[torch.arange(n, dtype=torch.float32) for n in away.shape], indexing="ij"))
    index = index + shift - outwards * away * (1 - 1 / thicker)
    both = torch.cat([head.parts, head.values])
    moved = sample(both[None], index.flatten(1).mT[None])[0].reshape(both.shape)
    moved[:3] = head.parts[:3]
    moved[3:-1] *= 1 - head.parts[:3].sum(0).clamp(0, 1)
    return Anatomy(moved[:-1], moved[-1:], head.grid, head.inner)


def _with_neck(head: Anatomy) -> Anatomy:
    """The head with its lowest slice, at Colin's chin, carried on downwards, narrower and further back: others go on."""
    shell = head.parts[3:].sum((0, 1, 2))
    bottom = int((shell > 0.2 * shell.amax()).nonzero()[0]) + 1
    both = torch.cat([head.parts, head.values])
    n, middle = grid().shape[0], (grid().shape[0] - 1) / 2
    x, y = torch.meshgrid(torch.arange(n) - middle, torch.arange(n) - middle, indexing="ij")
    for k in range(bottom):
        depth = (bottom - k) * MM
        wide = 1 + min(depth, 60.0) / 150
        index = torch.stack([x * wide + middle, (y + 0.15 * min(depth, 60.0) / MM) * wide + middle], -1).reshape(1, -1, 2)
        both[..., k] = sample(both[None, :, :, :, bottom], index)[0].reshape(-1, n, n)
    both[:3, ..., :bottom] = 0
    return Anatomy(both[:-1], both[-1:], head.grid, head.inner)


def anatomies(folder: Path = CACHE) -> list[Anatomy]:
    """The ICBM brain in Colin's head, and Colin's brain in his own: parts grey, white, liquid, then what is outside of the brain."""
    import nilearn.datasets

    here = Path(nilearn.datasets.__file__).parent / "data"
    t1, grey, white = (read_image(here / f"mni_icbm152_{name}_tal_nlin_sym_09a_converted.nii.gz") for name in ("t1", "gm", "wm"))
    colin = read_image(fetch(folder.expanduser()))
    shares = [t1.with_data(image.data.float() / 255) for image in (grey, white)]
    brain = t1.with_data(smooth((t1.data > 0).float(), [1.0] * 3))
    found = align(t1, colin, similarity="auto").transform
    shell, head = _shell(colin, found)
    inside, gm, wm, values = (_down(part) for part in (brain, *shares, t1.with_data(t1.data.float() / float(t1.data.max()))))
    icbm = _anatomy(inside, gm, wm, shell, torch.where(inside > 0.5, values, head))
    k = _kmeans(head[inside > 0.5], 3)
    order = [(head - centre).abs() for centre in k]
    nearest = torch.stack(order).argmin(0)
    gm, wm = ((nearest == i).float() * inside for i in (1, 2))  # darkest is liquid
    own = _anatomy(inside, *(smooth(part[None, None], [0.6] * 3)[0, 0] for part in (gm, wm)), shell, head)
    return [icbm, own]


def _anatomy(inside: Tensor, gm: Tensor, wm: Tensor, shell: Tensor, values: Tensor) -> Anatomy:
    liquid = (inside - gm - wm).clamp(0, 1)
    parts = torch.cat([torch.stack([gm, wm, liquid]), shell * (1 - inside)]).clamp(0, 1)
    return Anatomy(parts, values[None], grid(), (True,) * 3 + (False,) * len(shell))


def _down(image: Image) -> Tensor:
    """On the drawing grid, smoothed to the pictures' voxels."""
    sigma = [BLUR / 2.355 / float(s) for s in image.grid.spacing[0]]
    return warp(image.with_data(smooth(image.data.float(), sigma)), Matrix.identity(3), grid(), antialias="none").data[0, 0]


def _shell(colin: Image, to_colin: Matrix) -> tuple[Tensor, Tensor]:
    """Classes (SHELLS, *S) of Colin's head by brightness and the head itself (*S), both in the ICBM brain's pose."""
    ceiling = float(torch.quantile(colin.data.flatten()[::37].float(), 0.995))
    values = colin.with_data((colin.data.float() / ceiling).clamp(0, 1))
    body = _filled(values.data[0, 0].numpy() > 0.08)
    centres = _kmeans(values.data[0, 0][torch.from_numpy(body)], SHELLS)
    nearest = torch.stack([(values.data[0, 0] - c).abs() for c in centres]).argmin(0)
    masks = [values.with_data(((nearest == i) & torch.from_numpy(body)).float()[None, None]) for i in range(SHELLS)]
    target = Grid(*_wide())
    onto = [_down(warp(mask, to_colin, target)) for mask in (*masks, values)]
    return torch.stack(onto[:-1]), onto[-1]


def _wide() -> tuple[tuple[int, ...], Tensor]:
    """300 mm at 1.5 mm around the frame's centre."""
    n = 200
    affine = torch.eye(4, dtype=torch.float64)
    affine[:3, :3] *= 1.5
    affine[:3, 3] = frame().centre[0] - (n - 1) / 2 * 1.5
    return (n,) * 3, affine


def _filled(body: np.ndarray) -> np.ndarray:
    """The head without holes: its largest part, closed."""
    from scipy import ndimage

    labels, _ = ndimage.label(body)
    largest = labels == np.bincount(labels.ravel())[1:].argmax() + 1
    closed = ndimage.binary_closing(largest, iterations=4)
    return np.stack([ndimage.binary_fill_holes(s) for s in closed.transpose(2, 0, 1)]).transpose(1, 2, 0)


def _kmeans(values: Tensor, count: int) -> list[float]:
    """Centres of `count` clusters of brightness, darkest first."""
    from scipy.cluster.vq import kmeans

    few = values.flatten()[::11].double().numpy()
    centres, _ = kmeans(few[:, None], np.quantile(few, (np.arange(count) + 0.5) / count)[:, None])
    return sorted(float(c) for c in centres[:, 0])


def slices(heads: list[Anatomy], lowest: float = -25.0, highest: float = 55.0) -> list[Anatomy]:
    """Axial slices of heads, 4 mm apart, from below the basal ganglia to above the ventricles, each an anatomy of its own in the plane."""
    whole = grid()
    levels = whole.to_world(torch.tensor([[[0.0, 0.0, k] for k in range(whole.shape[2])]], dtype=torch.float64))[0, :, 2]
    plane = Grid(whole.shape[:2], whole.affine[:, [0, 1, 3]][:, :, [0, 1, 3]])
    return [Anatomy(head.parts[..., k].contiguous(), head.values[..., k].contiguous(), plane, head.inner)
            for head in heads for k, level in enumerate(levels.tolist()) if lowest <= level <= highest]


def points(anatomy: Anatomy, count: int) -> Tensor:
    """(count, D) in the frame: points of the brain, each as far from the others as can be."""
    inside = anatomy.parts[:3].sum(0) > 0.7
    every = anatomy.grid.to_world(inside.nonzero()[None].double())[0]
    every = (every - frame().centre[:, :every.shape[1]]) / frame().scale
    chosen = [int((every - every.mean(0)).square().sum(1).argmax())]
    nearest = torch.full((len(every),), torch.inf, dtype=every.dtype)
    while len(chosen) < count:
        nearest = torch.minimum(nearest, (every - every[chosen[-1]]).square().sum(1))
        chosen.append(int(nearest.argmax()))
    return every[chosen].float()
