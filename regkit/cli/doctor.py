"""`regkit doctor`: what is wrong, doubtful or worth knowing about scans' headers; corrected copies."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from regkit.cli.console import Console, refuse
from regkit.errors import OptionError, RegkitError

if TYPE_CHECKING:
    from regkit.registration.doctor import Diagnosis

EXIT_FINDINGS, EXIT_REFUSED = 3, 2
_WIDTH, _INDENT = 120, 12


def doctor(
    files: Annotated[list[Path], Parameter(name="FILE", help="Scans: image files, or folders with a DICOM series each.")],
    /,
    *,
    mask: Annotated[Path | None, Parameter(help="A mask of the one FILE, whose grid is compared with the scan's.")] = None,
    fixed: Annotated[Path | None, Parameter(
        help="Another scan of the same anatomy, which tells whether FILE is probably mirrored: two registrations a FILE.")] = None,
    fix: Annotated[Path | None, Parameter(
        help="Write a corrected copy: a file name for one FILE, a folder for several. FILE itself is never touched.")] = None,
    units: Annotated[str | None, Parameter(
        help="With --fix: the unit that the header's numbers are in, mm, um or m; they become mm.")] = None,
    straighten: Annotated[bool, Parameter(help="With --fix: make sheared axes right-angled, which moves voxels.")] = False,
    volume: Annotated[int | None, Parameter(help="Which volume of 4D scans to compare with --fixed, from 0.")] = None,
    overwrite: Annotated[bool, Parameter(help="Replace copies that are there.")] = False,
    quiet: Annotated[bool, Parameter(help="Say nothing but errors.")] = False,
    json: Annotated[bool, Parameter(help="Print all findings to stdout as JSON, and only that.")] = False,
) -> int:
    """Examine the headers of scans. Voxels are read with --fixed and --fix only.

    Exit codes: 0 nothing but notes was found, 2 a wrong option, or a file that cannot be read or corrected, 3 something doubtful or wrong.
    """
    console = Console(quiet=quiet, json=json)
    if mask is not None and len(files) > 1:
        raise OptionError(f"mask: given with {len(files)} files; a mask belongs to one scan, examine it alone")
    if fix is None and (units is not None or straighten):
        raise OptionError(f"{'units' if units is not None else 'straighten'}: given without --fix, which it is for")
    from regkit.registration.doctor import correct
    from regkit.registration.doctor import doctor as examine

    copies = _copies(files, fix)
    diagnoses: list[Diagnosis] = []
    refused: list[tuple[Path, RegkitError]] = []
    with console.progress() as progress:
        for file, copy in zip(files, copies, strict=True):
            try:
                diagnoses.append(examine(file, mask=mask, fixed=fixed, volume=volume, progress=progress if fixed is not None else None))
                if copy is not None:
                    diagnoses[-1] = correct(diagnoses[-1], copy, units=units, straighten=straighten, overwrite=overwrite)
            except RegkitError as error:  # one file's trouble is no reason to keep silent about the others
                refused.append((file, error))
    console.record(dump(diagnoses, refused))
    for diagnosis in diagnoses:
        for line in lines(diagnosis):
            console.say(line)
    for _, error in refused:
        refuse(str(error))
    return EXIT_REFUSED if refused else EXIT_FINDINGS if any(one.doubtful for one in diagnoses) else 0


def _copies(files: Sequence[Path], fix: Path | None) -> Sequence[Path | None]:
    """Where each file's copy goes. Raises OptionError if two would have one name."""
    if fix is None:
        return [None] * len(files)
    if len(files) == 1:
        return [fix]
    from regkit.cli.register import stem
    from regkit.io.repair import suffix_of

    names = [stem(file) + suffix_of(file) for file in files]
    twice = sorted({name for name in names if [n.lower() for n in names].count(name.lower()) > 1})
    if twice:
        raise OptionError(f"fix: several files would be copied to {fix / twice[0]}; correct those of one name in commands of their own")
    return [fix / name for name in names]


def dump(diagnoses: Sequence[Diagnosis], refused: Sequence[tuple[Path, RegkitError]] = ()) -> str:
    """All findings as JSON text."""
    return json.dumps({"files": [one.record() for one in diagnoses],
                       "refused": [{"path": str(path), "error": str(error)} for path, error in refused]}, indent=2)


def lines(diagnosis: Diagnosis) -> list[str]:
    """One scan's findings for people."""
    several = diagnosis.findings
    text = [f"{diagnosis.path}: {'nothing found' if not several else _count(len(several))}"]
    for one in several:
        text += ["", f"  {one.severity:9} {one.code}", *_part("what", one.what), *_part("why", one.why), *_part("regkit", one.does),
                 *_part("repair", one.repair)]
    if diagnosis.mirror is not None:
        found = diagnosis.mirror.as_dict()
        text += ["", *_part("mirror", f"{found['as_it_is']:.3f} as it is, {found['mirrored']:.3f} mirrored left to right "
                                      f"({found['measure']}, 1 is equal): {found['verdict']}")]
    if diagnosis.copy is not None:
        text += ["", *_part("corrected", ", ".join(diagnosis.corrected) or "nothing; the copy has the header of the original"),
                 *_part("left", ", ".join(one.code for one in diagnosis.left) or "nothing"), *_part("written", diagnosis.copy)]
    return text


def _count(n: int) -> str:
    return "1 finding" if n == 1 else f"{n} findings"


def _part(name: str, text: str) -> list[str]:
    return textwrap.wrap(text, _WIDTH, initial_indent=f"  {name:{_INDENT - 2}}", subsequent_indent=" " * _INDENT, break_long_words=False,
                         break_on_hyphens=False)
