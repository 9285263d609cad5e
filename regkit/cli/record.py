"""The record of a finished registration, and the files it names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from regkit.errors import FormatError

RECORD = "registration.json"
_SECTIONS: dict[str, type] = {"settings": dict, "inputs": dict, "carried": dict, "guard": dict, "similarity": dict, "chosen": dict,
                              "seconds": dict, "versions": dict, "outputs": dict, "notes": list, "matrix": list}


def read_record(path: Path) -> dict[str, Any]:
    """The record, with what nobody can do without. Raises FormatError if it is none."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        _ = record["matrix"], record["inputs"]["fixed"], record["inputs"]["moving"]
        for name, kind in _SECTIONS.items():
            if not isinstance(record.get(name) or kind(), kind):
                raise TypeError(name)
        if not all(isinstance(item, dict) for item in record["inputs"].values()):
            raise TypeError("inputs")
        carried = record.get("carried") or {}
        if not all(isinstance(carried.get(name) or [], list) for name in ("labels", "fixed_points", "moving_points")):
            raise TypeError("carried")
    except FileNotFoundError:
        raise FormatError(f"record: {path} does not exist; name the folder that regkit register wrote, or its {RECORD}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise FormatError(f"record: {path} cannot be read as JSON: {error}; run regkit register again") from error
    except (AttributeError, KeyError, TypeError):
        raise FormatError(f"record: {path} is not the record of a registration; name the {RECORD} that regkit register wrote") from None
    return record


def find(stated: Any, name: str, record: Path) -> Path:
    """An input where the record says it is; a relative path is looked for here, then beside the record. Raises FormatError."""
    if not stated:
        raise FormatError(f"{name}: {record} names no file, as the scan was given in memory; go on in Python, where the scans are: "
                          "regkit.align, regkit.report.page.pair_page")
    from regkit.io.paths import home, short, there

    if not isinstance(stated, str):
        raise FormatError(f"{name}: {record} names {short(stated)}; expected a path; run regkit register again")
    places = [home(stated)]
    if not places[0].is_absolute():
        places.append(record.resolve().parent / places[0])
    for place in places:
        if there(place):
            return place
    looked = " and ".join(str(place.absolute())[:300] for place in places)
    raise FormatError(f"{name}: {stated[:300]}, as {record} names it, is not there (looked for {looked}); bring it back, run the command "
                      "from the folder of the registration, or register again")
