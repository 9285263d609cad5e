"""`regkit replay`: a registration done again from its record, and compared with what it was."""

from __future__ import annotations

import json as text
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from regkit.cli.console import Console, importing
from regkit.cli.record import RECORD, find, read_record
from regkit.cli.register import CARRIED, Job
from regkit.errors import FormatError, OutputError
from regkit.registration.settings import NET, START_NAMES

if TYPE_CHECKING:
    from regkit.registration.replay import Comparison
    from regkit.registration.settings import Settings

EXIT_DIFFERENT = 3
_SCANS = ("fixed", "moving", "fixed_mask", "moving_mask")


def replay(
    result: Annotated[Path, Parameter(name="DIR", help="Folder of a registration, or its registration.json.")],
    /,
    *,
    output: Annotated[Path | None, Parameter(
        name=["--output", "-o"], help="Folder for the result of the second time, absent or empty; by default it is not kept.")] = None,
    changed: Annotated[bool, Parameter(help="Go on where an input is not the file that it was.")] = False,
    overwrite: Annotated[bool, Parameter(help="Replace an earlier result in the folder.")] = False,
    quiet: Annotated[bool, Parameter(help="Say nothing but errors.")] = False,
    json: Annotated[bool, Parameter(help="Print the comparison to stdout as JSON, and only that.")] = False,
) -> int:
    """Do a registration again from its record, and compare matrix, transform and moved scan with those of the first time.

    Exit codes: 0 the same, or close enough on another machine or other versions; 2 a wrong option or input; 3 different.
    """
    console = Console(quiet=quiet, json=json)
    from regkit.io.paths import folder_there, home

    path = result / RECORD if folder_there(result) else result
    record = read_record(path)
    if output is not None and home(output).resolve() == path.resolve().parent:
        raise OutputError(f"output: {output} holds the record itself, with which the second result is compared; choose another folder")
    with importing():
        from regkit.registration.replay import compare, settings_of

    job, other = _job(record, path, settings_of(record))
    for sentence in other:
        if not changed:
            raise FormatError(f"{sentence}; bring the file of then back, or give --changed to go on with what is there")
        console.warn(f"{sentence}; going on with what is there")
    with TemporaryDirectory(prefix="regkit-") as place:
        folder = output or Path(place) / "again"
        found = compare(record, path.parent, replace(job, output=folder, overwrite=overwrite).run(console), folder)
    console.record(text.dumps({**found.as_dict(), "changed": other}, indent=2))
    for line in _said(found):
        console.say(line)
    if output is not None:
        console.say(f"written to  {output}")
    if found.verdict == "different":
        console.warn(f"the second result is different: {_why(found)} (exit code {EXIT_DIFFERENT})")
        return EXIT_DIFFERENT
    return 0


def _job(record: dict[str, Any], path: Path, settings: Settings) -> tuple[Job, list[str]]:
    """The registration of a record, its files where they are now; and of each that is not what it was, a sentence.

    Raises FormatError where a file is missing."""
    from regkit.io import sha256
    from regkit.registration.replay import as_it_ran

    inputs, carried, other = record["inputs"], record.get("carried") or {}, []

    def known(name: str, stated: Any, hashed: str | None, weights: bool = False) -> Path:
        place = find(stated, name, path)
        if hashed is not None and sha256(_weights(place) if weights else place) != hashed:
            other.append(f"{name}: {place} has changed since the registration")
        return place

    scans: dict[str, Any] = {name: known(name, inputs[name].get("path"), inputs[name].get("sha256")) for name in _SCANS if name in inputs}
    hashes = carried.get("sha256") or {}
    luggage: dict[str, Any] = {name: tuple(known(name.replace("_", "-"), file, hashes.get(file)) for file in carried.get(name) or [])
                               for name in CARRIED}
    net = settings.start.startswith(NET)
    if "start" in inputs:
        place = known("start", inputs["start"].get("path"), inputs["start"].get("sha256"), weights=net)
        settings = replace(settings, start=f"{NET if net else ''}{place}")
    elif not net and settings.start not in START_NAMES:  # a record that does not know the file's hash
        settings = replace(settings, start=str(known("start", settings.start, None)))
    other += list(_nets(record.get("nets") or {}))
    settings = as_it_ran(settings, record)
    return Job(**scans, output=Path(), settings=settings, **luggage, points_space=carried.get("points_space", "ras")), other


def _weights(place: Path) -> Path:
    from regkit.io.paths import folder_there
    from regkit.registration.nets import NET_FILE

    return place / NET_FILE if folder_there(place) else place


def _nets(then: dict[str, str]) -> Iterator[str]:
    """Of each shipped net that is not what it was, a sentence."""
    from regkit.io import sha256
    from regkit.registration.nets import SHIPPED

    for name, hashed in then.items():
        file = SHIPPED / f"{name}.safetensors"
        if not file.is_file():
            yield f"net: {name} came with the regkit that wrote the record, and does not come with this one"
        elif sha256(file) != hashed:
            yield f"net: {name} is another one in this version of regkit"


def _said(found: Comparison) -> list[str]:
    """The comparison in a few lines for people."""
    words = {True: "the same bytes", False: "other bytes", None: "nothing to compare with"}
    lines = [f"{'matrix':28}{'the same' if found.matrix else 'other numbers'}"]
    lines += [f"{name:28}{words[same]}" for name, same in found.files.items()]
    if found.millimetres:
        lines.append(f"{'largest displacement':28}{found.millimetres:.3g} mm over the fixed field of view")
    if found.voxels:
        lines.append(f"{'largest voxel difference':28}{found.voxels:.3g}, root mean square {found.rms:.3g}, of a range of {found.span:.3g}")
    lines += [f"{'differs':28}{name}: {then} then, {now} now" for name, (then, now) in found.differs.items()]
    lines += [f"{'note':28}{note}" for note in found.notes]
    verdict = {"same": "the same, bit for bit", "different": "different",
               "close": f"close: within {found.limit:.3g} mm, which is what another machine or other versions may do"}
    return [*lines, f"{'verdict':28}{verdict[found.verdict]}"]


def _why(found: Comparison) -> str:
    if found.millimetres is None:
        return "; ".join(found.notes)
    changed = [name for name, same in found.files.items() if same is False]
    return (f"the maps lie up to {found.millimetres:.3g} mm apart" + (f", other bytes in {', '.join(changed)}" if changed else "")
            + ("" if found.differs else "; versions and machine are those of then"))
