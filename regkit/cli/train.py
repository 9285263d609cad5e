"""`regkit train`: a folder of scans in; a localisation net, its curves and its card out."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from regkit.cli.console import Console, importing
from regkit.errors import FormatError, OptionError, choose
from regkit.training.settings import ATLAS, TrainSettings

EXIT_INTERRUPTED = 130
_SHOWN = 12  # rows of the live table


class Said(TrainSettings):
    """Settings, and the names of those that were given: what a command line says counts, also where it is the default."""

    said: tuple[str, ...]

    def __new__(cls, **given: Any) -> Said:
        made = super().__new__(cls)
        object.__setattr__(made, "said", tuple(given))
        return made


_NOTHING = Said()


def train(
    scans: Annotated[Path | None, Parameter(help="Folder of scans, or a table scan[,labels][,person][,split].")] = None,
    /,
    *,
    output: Annotated[Path | None, Parameter(name=["--output", "-o"], help="Folder for the net and its record.")] = None,
    settings: Annotated[Said, Parameter(name="*")] = _NOTHING,
    config: Annotated[Path | None, Parameter(
        help="A YAML or JSON file with scans, output and any of these options; what the command line says otherwise counts.")] = None,
    resume: Annotated[bool, Parameter(help="Go on with the training in the folder.")] = False,
    overwrite: Annotated[bool, Parameter(help="Begin anew where a training lies.")] = False,
    quiet: Annotated[bool, Parameter(help="Say nothing but errors.")] = False,
) -> int:
    """Train a net that says where a registration begins, from your own scans, without labels.

    Use it with regkit register --start net:FOLDER.
    Exit codes: 0 done, 2 a wrong option or input, 130 interrupted (--resume goes on).
    """
    console = Console(quiet=quiet)
    asked = TrainSettings(**settings.as_dict())  # type: ignore[arg-type]
    if config is not None:
        scans, output, asked = configured(config, scans, output, {name: getattr(settings, name) for name in settings.said})
    if scans is None:
        raise OptionError("scans: missing; give a folder of scans or a table, or --config FILE")
    if output is None:
        raise OptionError("output: missing; give -o FOLDER")
    with importing():
        from regkit.training.train import train as run

    try:
        with _told(quiet) as tell:
            trained = run(scans, output, asked, resume=resume, overwrite=overwrite, tell=tell, note=console.say)
    except KeyboardInterrupt:
        console.warn(f"interrupted; --resume goes on from the last checkpoint in {output}")
        return EXIT_INTERRUPTED
    table = trained.info.get("validation")
    if table is None:  # of several processes, another one tells
        return 0
    console.say(f"{'on validation pairs':20} {'TRE, mm':>8} {'rotation':>9} {'below 20°':>10}")
    for name, row in table.items():
        console.say(f"{name:20} {row['tre_mm']:8.2f} {row['turn']:8.1f}° {100 * row['captured']:8.0f} %")
    console.say(f"card         {output / 'model-card.md'}")
    console.say(f"use it       regkit register FIXED MOVING -o OUT --start net:{output}")
    return 0


def configured(config: Path, scans: Path | None, output: Path | None,
               spoken: dict[str, Any]) -> tuple[Path | None, Path | None, TrainSettings]:
    """What the command line and a file say together; paths in the file are relative to it. spoken: the settings that the command line
    named. Raises FormatError, OptionError."""
    kinds = {"scans": "str", "output": "str", **{field.name: str(field.type) for field in fields(TrainSettings)}}
    given: dict[str, Any] = {}
    for key, value in _read(config).items():
        name = choose("config", str(key).replace("-", "_"), kinds)
        given[name] = _typed(name, value, kinds[name])

    from regkit.io.paths import home

    def place(path: str) -> Path:
        return config.parent / home(path)

    if given.get("weights") and place(given["weights"]).exists():  # else the name of a shipped net
        given["weights"] = str(place(given["weights"]))
    if (atlas := given.get("pairs", "")).startswith(ATLAS) and atlas != ATLAS:
        given["pairs"] = f"{ATLAS}{place(atlas.removeprefix(ATLAS))}"
    files = [place(given.pop(name)) if name in given else None for name in ("scans", "output")]
    return scans or files[0], output or files[1], TrainSettings(**{**given, **spoken})


def _typed(name: str, value: Any, kind: str) -> Any:
    """What a file says, as a setting holds it: YAML takes 1e-3 for a word, and 32 for a number where a word is meant."""
    kind, _, optional = kind.partition(" | ")
    if value is None and optional:
        return None
    if kind == "float" and isinstance(value, (int, str)) and not isinstance(value, bool):
        with suppress(ValueError):
            return float(value)
    if kind == "str" and type(value) is int:
        return str(value)
    if type(value).__name__ != kind:
        words = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "a word"}[kind]
        raise OptionError(f"config: {name.replace('_', '-')} is {value!r}; expected {words}")
    return value


def _read(config: Path) -> dict[str, Any]:
    try:
        text = config.read_text(encoding="utf-8")
        if config.suffix.lower() == ".json":
            said = json.loads(text)
        else:
            said = _yaml(text, config)
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, (FormatError, OptionError)):
            raise
        raise FormatError(f"config: {config} cannot be read: {error}; expected YAML or JSON") from error
    if not isinstance(said, dict):
        raise FormatError(f"config: {config} holds no options; expected lines such as steps: 4000")
    return said


def _yaml(text: str, config: Path) -> Any:
    try:
        import yaml
    except ImportError:
        raise OptionError("config: reading YAML needs PyYAML; pip install 'regkit[train]', or write JSON") from None
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise FormatError(f"config: {config} is no YAML: {error}") from error


@contextmanager
def _told(quiet: bool) -> Iterator[Callable[[dict[str, float]], None]]:
    """What is given every row of the log: a live table on a terminal, else a line a row."""
    begun = time.monotonic()
    logging.getLogger("lightning_fabric.utilities.rank_zero").setLevel(logging.WARNING)  # it tells of devices and precision, unasked
    if quiet:
        yield lambda row: None
    elif sys.stderr.isatty():
        from rich.console import Console as Terminal
        from rich.live import Live

        rows: list[dict[str, float]] = []
        with Live(console=Terminal(stderr=True), transient=False) as live:
            def show(row: dict[str, float]) -> None:
                rows.append(row)
                live.update(_table(rows))

            yield show
    else:
        def say(row: dict[str, float]) -> None:
            words = " ".join(f"{key} {value:.4g}" for key, value in row.items())
            print(f"{time.monotonic() - begun:6.0f} s  {words}", file=sys.stderr, flush=True)

        yield say


def _table(rows: list[dict[str, float]]) -> Any:
    from rich.table import Table

    shown = rows[-_SHOWN:]
    last = next((row for row in reversed(rows) if "tre_mm" in row), None)
    columns = list(dict.fromkeys(key for row in shown for key in row))
    table = Table(*columns, caption="" if last is None else f"validation at step {last['step']:.0f}: TRE {last['tre_mm']:.3g} mm, "
                  f"rotation {last['turn']:.3g}°, {100 * last['captured']:.0f} % below 20°")
    for row in shown:
        table.add_row(*(f"{row[key]:.4g}" if key in row else "" for key in columns))
    return table
