"""`doctor()`: what is wrong with a scan, its mask, or its left and right; and a corrected copy. The command line calls this."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from regkit.errors import GeometryError
from regkit.io import read_image
from regkit.io.doctor import examine, findings, rank
from regkit.io.findings import Finding, of_mask, usable
from regkit.io.headers import grid_of, read_header
from regkit.io.paths import home
from regkit.io.repair import repaired
from regkit.registration.mirror import Mirrored, compare, of_mirror


@dataclass(frozen=True)
class Diagnosis:
    """What was found about the scan at `path`, the worst first.

    mirror: how well the scan and its mirror image lie on another scan, if one was given.
    copy: the corrected copy, if one was written; corrected: the codes of the findings it mends; left: what is still found in it.
    """

    path: str
    findings: tuple[Finding, ...]
    mirror: Mirrored | None = None
    copy: str | None = None
    corrected: tuple[str, ...] = ()
    left: tuple[Finding, ...] = ()

    @property
    def doubtful(self) -> bool:
        """Whether anything found is more than a note."""
        return any(one.severity != "note" for one in self.findings)

    def record(self) -> dict[str, Any]:
        """All of it as plain numbers and strings."""
        mirror = None if self.mirror is None else self.mirror.as_dict()
        return {"path": self.path, "findings": [one.as_dict() for one in self.findings], "mirror": mirror, "copy": self.copy,
                "corrected": list(self.corrected), "left": [one.as_dict() for one in self.left]}


def doctor(path: str | Path, *, mask: str | Path | None = None, fixed: str | Path | None = None, fix: str | Path | None = None,
           units: str | None = None, straighten: bool = False, volume: int | None = None, overwrite: bool = False,
           progress: Callable[[str, float], None] | None = None) -> Diagnosis:
    """Examine the header of the scan at `path`, and write a corrected copy where `fix` says.

    mask: a mask of the scan, whose grid is compared with the scan's. fixed: another scan of the same anatomy, to which the scan and
    its mirror image are aligned, to tell whether left and right are exchanged. units, straighten, overwrite: see
    `regkit.io.repair.repaired`. volume: which volume of 4D scans to compare.

    Raises FormatError (a file without a readable header), GeometryError, OptionError, OutputError.
    """
    header, mirrored = read_header(home(path), "scan"), None
    found = findings(header)
    readable = usable(header.affine, header.shape)  # else the findings say so, and nothing can be compared
    if mask is not None:
        drawn = read_header(home(mask), "mask")
        if readable:
            found += of_mask(grid_of(drawn, f"mask: {mask}"), grid_of(header, f"scan: {path}"))
    if fixed is not None:
        other = read_image(fixed, volume=volume, name="fixed")
        if readable:
            scan = read_image(path, volume=volume, name="scan")
            if scan.ndim != other.ndim:
                raise GeometryError(f"fixed: is {other.ndim}D, the scan is {scan.ndim}D; give two scans of one dimension")
            mirrored = compare(other, scan, progress)
            found += of_mirror(mirrored, str(fixed))
    diagnosis = Diagnosis(str(path), tuple(sorted(found, key=rank)), mirrored)
    return diagnosis if fix is None else correct(diagnosis, fix, units=units, straighten=straighten, overwrite=overwrite)


def correct(diagnosis: Diagnosis, copy: str | Path, *, units: str | None = None, straighten: bool = False,
            overwrite: bool = False) -> Diagnosis:
    """Write the corrected copy of a scan that was examined, and examine the copy. Arguments and errors as for `repaired`."""
    corrected = repaired(diagnosis.path, copy, units=units, straighten=straighten, overwrite=overwrite)
    return replace(diagnosis, copy=str(copy), corrected=corrected, left=tuple(examine(copy)))
