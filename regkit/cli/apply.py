"""`regkit apply`: carry an image, a label map or points through transforms that were found earlier."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from regkit.cli.console import Console
from regkit.cli.register import POINT_SPACES
from regkit.errors import OptionError, choose

POINT_SUFFIXES = (".csv", ".fcsv", ".mrk.json")


def apply(
    item: Annotated[Path, Parameter(name="INPUT", help="Image, label map, or points (.csv, .fcsv, .mrk.json).")],
    /,
    *,
    transform: Annotated[list[Path], Parameter(
        name=["--transform", "-t"], help="Transform file (.tfm, .h5, .mat, .json); may be repeated: the first acts first.")],
    output: Annotated[Path, Parameter(name=["--output", "-o"], help="File to write.")],
    inverse: Annotated[bool, Parameter(help="Go the other way, from fixed to moving.")] = False,
    like: Annotated[Path | None, Parameter(help="The scan on whose grid the result lies; needed for images.")] = None,
    points_on: Annotated[Path | None, Parameter(
        help="The scan on which the points of INPUT were marked; needed with --points-space index.")] = None,
    interpolation: Annotated[str, Parameter(
        help="auto (linear for images, nearest for label maps), linear, cubic, nearest or vote.")] = "auto",
    fill: Annotated[str, Parameter(
        help="Value outside the image; auto is 0, or the minimum where that is negative (CT).")] = "auto",
    points_space: Annotated[str, Parameter(
        help="What the numbers in .csv points are: ras or lps (mm), or index (voxels).")] = "ras",
    volume: Annotated[int | None, Parameter(help="Which volume of a 4D image to take, from 0.")] = None,
    overwrite: Annotated[bool, Parameter(help="Replace the file if it is there.")] = False,
    quiet: Annotated[bool, Parameter(help="Say nothing but errors.")] = False,
) -> int:
    """Carry INPUT from the moving to the fixed scan: images are resampled on the grid of --like, points are mapped."""
    choose("points-space", points_space, POINT_SPACES)
    choose("interpolation", interpolation, ("auto", "linear", "cubic", "nearest", "vote"))
    if _is_points(item) and output.suffix.lower() != ".csv":
        raise OptionError(f"output: {output} does not fit {item}, which is points; give a file name that ends in .csv")
    if not _is_points(item) and _is_points(output):
        raise OptionError(f"output: {output} does not fit {item}, which is an image; give a name such as moved.nii.gz")
    if _is_points(item):
        _move_points(item, transform, output, inverse, like, points_on, points_space, overwrite)
    else:
        _move_image(item, transform, output, inverse, like, interpolation, fill, volume, overwrite)
    Console(quiet=quiet).say(f"written to  {output}")
    return 0


def _is_points(path: Path) -> bool:
    return path.name.lower().endswith(POINT_SUFFIXES)


def _move_image(
    item: Path, transform: list[Path], output: Path, inverse: bool, like: Path | None,
    interpolation: str, fill: str, volume: int | None, overwrite: bool,
) -> None:
    if like is None:
        raise OptionError("like: missing; an image needs --like FIXED, the scan on whose grid the result is to lie")
    from regkit.io import output_file, read_image, read_transform, write_image
    from regkit.io.images import image_suffix
    from regkit.registration.apply import apply as carry

    if image_suffix(output) is None:
        raise OptionError(f"output: {output} has no suffix of an image format; give a name such as moved.nii.gz")
    with output_file(output, overwrite=overwrite) as unfinished:
        image = read_image(item, volume=volume, name="input")
        grid = read_image(like, volume=0, name="like")  # any volume has its geometry
        parts = [read_transform(path, ndim=image.ndim) for path in transform]
        write_image(carry(image, parts, grid, inverse=inverse, interpolation=interpolation, fill=fill), unfinished)


def _move_points(
    item: Path, transform: list[Path], output: Path, inverse: bool, like: Path | None, points_on: Path | None,
    points_space: str, overwrite: bool,
) -> None:
    if points_space == "index" and (like is None or points_on is None):
        raise OptionError("points-space: index points are counted on a scan's grid; give --points-on SCAN, "
                          "where they were marked, and --like SCAN, where they go")
    from regkit.io import output_file, read_image, read_points, read_transform, write_points
    from regkit.registration.apply import apply as carry

    with output_file(output, overwrite=overwrite) as unfinished:
        parts = [read_transform(path) for path in transform]
        if parts[0].ndim == 2 and like is None and item.suffix.lower() == ".csv":
            raise OptionError("like: none given; the numbers of 2D points are pixels of a picture or mm of a slice, and only the "
                              "scan tells: give --like SCAN, where they go")
        there = None if like is None else read_image(like, volume=0, name="like")
        # pictures of one kind share their geometry, so that pixel points need no scan of their own
        here = there if points_on is None else read_image(points_on, volume=0, name="points-on")
        points = read_points(item, space=points_space, image=here, ndim=parts[0].ndim, name="input")
        write_points(carry(points, parts, there, inverse=inverse), unfinished, space=points_space, image=there)
