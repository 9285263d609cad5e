"""`regkit demo`: two registrations of scans that installed packages ship; nothing is downloaded."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from regkit.cli.console import Console
from regkit.cli.register import Job, summary
from regkit.errors import OutputError, RegkitError

if TYPE_CHECKING:
    from torch import Tensor

    from regkit.space import Matrix

TEMPLATE = "datasets/data/mni_icbm152_{}_tal_nlin_sym_09a_converted.nii.gz"
POINTS = 300
OWNED = ("different-heads", "known-truth", "known-truth-moving.nii.gz")


def demo(
    *,
    output: Annotated[Path, Parameter(name=["--output", "-o"], help="Folder for the results.")] = Path("regkit-demo"),
    overwrite: Annotated[bool, Parameter(help="Replace an earlier demo in the folder.")] = False,
    quiet: Annotated[bool, Parameter(help="Say nothing but errors.")] = False,
) -> int:
    """Register two pairs that installed packages ship (nilearn and nibabel), with no download.

    The first pair is two different heads: a 2 mm block out of one person's brain and the MNI152 template. The second is
    the template and a copy of it turned, scaled and shifted by a known amount, so that the error left (TRE) can be told.
    """
    console = Console(quiet=quiet)
    _free(output, overwrite)
    template = _shipped("nilearn", TEMPLATE.format("t1"))
    head = _shipped("nibabel", "tests/data/anatomical.nii")
    _different_heads(template, head, output / "different-heads", console)
    _known_truth(template, output, console)
    return 0


def _free(folder: Path, overwrite: bool) -> None:
    """Refuse a folder that holds anything but an earlier demo, and that without `overwrite`."""
    try:
        there = sorted(path.name for path in folder.iterdir())
    except FileNotFoundError:
        return
    except NotADirectoryError:
        raise OutputError(f"output: {folder} is a file; choose a folder") from None
    foreign = [name for name in there if name not in OWNED]
    if foreign:
        raise OutputError(f"output: {folder} holds what is not the demo's ({foreign[0]}); choose another folder")
    if there and not overwrite:
        raise OutputError(f"output: {folder} holds an earlier demo; choose another folder or give --overwrite")


def _shipped(package: str, path: str) -> Path:
    """A file that an installed package ships, found without importing the package."""
    found = importlib.util.find_spec(package)
    file = Path(found.origin).parent / path if found is not None and found.origin else None
    if file is None or not file.is_file():
        raise RegkitError(f'demo: {package} with its file {path} is not installed; run: pip install "regkit[demo]", in a clone: '
                          'pip install -c constraints.txt -e ".[demo]"')
    return file


def _different_heads(template: Path, head: Path, folder: Path, console: Console) -> None:
    console.say("Two different heads: a 2 mm block of one person's brain (nibabel's anatomical.nii) onto the MNI152 template")
    result = Job(template, head, folder, overwrite=True).run(console)
    for line in summary(result, folder):
        console.say(f"  {line}")


def _known_truth(template: Path, output: Path, console: Console) -> None:
    import torch

    from regkit.image import Image
    from regkit.io import read_image, write_image
    from regkit.registration.apply import apply
    from regkit.space import Grid

    console.say("Known truth: the template against a copy of it turned by 15°, 10 % larger, shifted by 12 mm")
    scan = read_image(template)
    truth = known_map(scan.grid.centre)
    # stored on another grid than the template's: other spacing, other axis directions, another field of view
    affine = torch.tensor([[-2.0, 0, 0, 118.0], [0, 0, 2.0, -158.0], [0, 2.5, 0, -92.0], [0, 0, 0, 1]], dtype=torch.float64)
    canvas = Image(torch.zeros(1, 1, 118, 90, 135), Grid((118, 90, 135), affine))
    moving = output / "known-truth-moving.nii.gz"
    # moving(y) = template(truth⁻¹(y)), so the map that registration must find is truth: template point → moving point
    copy = apply(scan, [truth.inverse()], canvas, interpolation="cubic")
    write_image(copy, moving, overwrite=True)

    folder = output / "known-truth"
    result = Job(template, moving, folder, overwrite=True).run(console)
    for line in summary(result, folder):
        console.say(f"  {line}")
    points = brain_points()
    before = (points - truth(points)).norm(dim=-1)
    after = (result.transform(points) - truth(points)).norm(dim=-1)
    for word, error in (("before", before), ("after ", after)):
        mean, largest = float(error.mean()), float(error.max())
        console.say(f"  TRE {word}  mean {mean:.3f} mm, largest {largest:.3f} mm  ({POINTS} brain points)")


def known_map(centre: Tensor) -> Matrix:
    """15° about an oblique axis through `centre` (1, 3), 10 % larger, shifted by 12 mm."""
    import torch

    from regkit.space import Matrix

    axis = torch.nn.functional.normalize(torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64), dim=0)
    x, y, z = (axis * torch.pi * 15 / 180).tolist()
    skew = torch.tensor([[0, -z, y], [z, 0, -x], [-y, x, 0]], dtype=torch.float64)
    turn = torch.eye(4, dtype=torch.float64)
    turn[:3, :3] = 1.1 * torch.linalg.matrix_exp(skew)
    shift = torch.tensor([[8.0, -8.0, 4.0]], dtype=torch.float64)  # 12 mm
    return Matrix.shift(centre + shift) @ Matrix(turn) @ Matrix.shift(-centre)


def brain_points() -> Tensor:
    """(1, P, 3) world points of the template, drawn from its grey and white matter with a fixed seed."""
    import torch

    from regkit.io import read_image

    maps = [read_image(_shipped("nilearn", TEMPLATE.format(tissue))) for tissue in ("gm", "wm")]
    tissue = sum(m.data[0, 0].double() / m.data.max() for m in maps)
    index = torch.nonzero(torch.as_tensor(tissue) > 0.5)
    drawn = torch.randperm(len(index), generator=torch.Generator().manual_seed(0))[:POINTS]
    return maps[0].grid.to_world(index[drawn].double()[None])
