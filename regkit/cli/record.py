"""The record of a finished registration, and the files it names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from regkit.errors import FormatError

RECORD = "registration.json"


def read_record(path: Path) -> dict[str, Any]:
    """The record, with what nobody can do without. Raises FormatError if it is none."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        _ = record["matrix"], record["inputs"]["fixed"], record["inputs"]["moving"]
    except FileNotFoundError:
        raise FormatError(f"record: {path} does not exist; name the folder that regkit register wrote, or its {RECORD}") from None
    except (OSError, ValueError) as error:
        raise FormatError(f"record: {path} cannot be read as JSON: {error}; run regkit register again") from error
    except (KeyError, TypeError):
        raise FormatError(f"record: {path} is not the record of a registration; name the {RECORD} that regkit register wrote") from None
    return record


def find(stated: Any, name: str, record: Path) -> Path:
    """An input where the record says it is; a relative path is looked for here, then beside the record. Raises FormatError."""
    if not stated:
        raise FormatError(f"{name}: {record} names no file, as the scan was given in memory; go on in Python, where the scans are: "
                          "regkit.align, regkit.report.page.pair_page")
    places = [Path(stated).expanduser()]
    if not places[0].is_absolute():
        places.append(record.resolve().parent / places[0])
    for place in places:
        if place.exists():
            return place
    looked = " and ".join(str(place.absolute()) for place in places)
    raise FormatError(f"{name}: {stated}, as {record} names it, is not there (looked for {looked}); bring it back, run the command "
                      "from the folder of the registration, or register again")
