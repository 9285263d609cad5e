"""What `align()` returns."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, overload

import numpy as np
from torch import Tensor

from regkit.errors import GeometryError
from regkit.image import Image
from regkit.io import Points, output_folder, sha256, write_field, write_image, write_transform
from regkit.registration.apply import apply, carry_image
from regkit.registration.settings import Settings
from regkit.registration.verdict import Verdict
from regkit.space import Composite, Matrix, Transform

EXPECTED = "expected_error.nii.gz"
FILES = ("moved.nii.gz", "transform.tfm", "registration.json")
CURVED = ("transform.json", "displacement.nii.gz")  # in place of the .tfm, where the map is not affine


@dataclass(frozen=True, eq=False)
class Registration:
    """A finished alignment of `moving` to `fixed`.

    transform: fixed world → moving world, RAS+ mm. settings: what was asked. trace: what was done, ready for JSON:
    inputs, versions, similarity before and after, verdict and evidence, candidates, the guard's findings, seconds by stage.
    """

    fixed: Image
    moving: Image
    transform: Transform
    settings: Settings
    trace: dict[str, Any] = field(repr=False)

    @property
    def matrix(self) -> np.ndarray:
        """(D+1, D+1) float64: fixed world → moving world, RAS+ mm; where a spline bends the map, the affine map it bends.

        Raises GeometryError for the inverse of such a map, which bends none."""
        first = self.transform.parts[0] if isinstance(self.transform, Composite) else self.transform
        if not isinstance(first, Matrix):
            raise GeometryError("matrix: the inverse of a thin-plate spline has none; take that of the registration itself")
        return first.matrix[0].cpu().numpy().copy()

    @property
    def affine(self) -> bool:
        """Whether the map is affine, and goes into ITK's files as it is."""
        return isinstance(self.transform, Matrix) and self.transform.affine

    @cached_property
    def moved(self) -> Image:
        """The moving scan on the fixed scan's grid, resampled once from its own voxels."""
        began = time.perf_counter()
        moved = carry_image(self.moving, self.transform, self.fixed, interpolation=self.settings.interpolation,
                            fill=self.settings.fill)
        self.trace["seconds"]["resample"] = round(time.perf_counter() - began, 4)
        return moved

    @property
    def findings(self) -> tuple[str, ...]:
        """What the guard found doubtful, in sentences."""
        return tuple(self.trace["guard"]["findings"])

    @property
    def verdict(self) -> Verdict:
        """Whether the map is right, how surely, by how many mm it is probably off, and why."""
        return Verdict.of(self.trace["verdict"])

    def expected_error(self) -> Image:
        """By how many mm the map is probably off at each voxel of the fixed scan, float32 on its grid: the verdict's expected error, spread
        as small blocks of both scans disagree. NaN where nothing is seen of the moving scan, and everywhere if the verdict is FAIL."""
        from regkit.registration.expected import expected_error

        return expected_error(self.fixed, self.moving, self.transform, self.verdict.expected_tre_mm)

    def inverse(self) -> Registration:
        """The same alignment the other way: fixed carried onto moving."""
        inputs = {**self.trace["inputs"], "fixed": self.trace["inputs"]["moving"], "moving": self.trace["inputs"]["fixed"]}
        notes = [*self.trace["notes"], "the inverse of a registration: what was measured was measured the other way round"]
        return Registration(self.moving, self.fixed, self.transform.inverse(), self.settings,
                            {**self.trace, "inputs": inputs, "notes": notes, "seconds": dict(self.trace["seconds"])})

    @overload
    def apply(self, item: Image, inverse: bool = False, *, interpolation: str | None = None) -> Image: ...
    @overload
    def apply(self, item: Points, inverse: bool = False, *, interpolation: str | None = None) -> Points: ...
    @overload
    def apply(self, item: Tensor, inverse: bool = False, *, interpolation: str | None = None) -> Tensor: ...
    @overload
    def apply(self, item: np.ndarray, inverse: bool = False, *, interpolation: str | None = None) -> np.ndarray: ...

    def apply(self, item, inverse=False, *, interpolation=None):
        """Carry an Image (or label map), Points, or points (P, D) in RAS mm from moving to fixed; `inverse`: the other way.

        interpolation: linear, cubic, nearest or vote; by default nearest for label maps, else as the settings say.
        Raises GeometryError if the dimension is another."""
        like = self.moving if inverse else self.fixed
        return apply(item, [self.transform], like, inverse=inverse, interpolation=interpolation or "auto", fill=self.settings.fill)

    def record(self) -> dict[str, Any]:
        """All of it as plain numbers and strings, the content of `registration.json`."""
        part = {"matrix_is": "the affine map that the spline bends"} if isinstance(self.transform, Composite) else {}
        return {"matrix": self._matrix(), **part, **self.trace, "settings": self.settings.as_dict()}

    def _matrix(self) -> list[list[float]] | None:
        try:
            return self.matrix.tolist()
        except GeometryError:
            return None

    def write(self, folder: Path) -> None:
        """Write moved.nii.gz, transform.tfm and registration.json into an existing folder; a map that is not affine as
        transform.json, exactly, and as displacement.nii.gz, which ITK, ANTs and 3D Slicer read; expected_error.nii.gz where the settings
        ask for it. The record holds the SHA-256 of all
        files there are in the folder by then."""
        moved = self.moved
        began = time.perf_counter()
        write_image(moved, folder / FILES[0])
        write_transform(self.transform, folder / (FILES[1] if self.affine else CURVED[0]))
        if not self.affine:
            write_field(self.transform, self.fixed.grid, folder / CURVED[1])
        if self.settings.expected_error:
            write_image(self.expected_error(), folder / EXPECTED)
        self.trace["seconds"]["write"] = round(time.perf_counter() - began, 4)
        self.trace["outputs"] = {file.name: sha256(file) for file in sorted(folder.iterdir()) if file.is_file()}
        (folder / FILES[2]).write_text(json.dumps(self.record(), indent=1) + "\n")

    def save(self, folder: str | Path, overwrite: bool = False) -> Path:
        """Write the same files into a new or empty folder, all or nothing → the folder.

        Raises OutputError if the folder holds files; with `overwrite` an earlier result is replaced."""
        with output_folder(folder, overwrite=overwrite, owned=(*FILES, *CURVED, EXPECTED)) as stage:
            self.write(stage)
        return Path(folder)

    def _repr_html_(self) -> str:
        """What a notebook shows: the main numbers and both scans on top of each other, before and after."""
        from regkit.report.page import fragment
        from regkit.report.views import view

        return fragment(self.record(), view(self.fixed, self.moving, self.transform))

    def __repr__(self) -> str:
        return f"Registration({self.trace['model']}, {self.trace['chosen']['similarity']}, {self.transform!r}, on {self.fixed.grid!r})"
