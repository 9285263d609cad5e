"""What a verb says, and where: results on stdout, progress and complaints on stderr.

With --json stdout holds the record and nothing else; with --quiet nothing is said but errors.
"""

from __future__ import annotations

import gc
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

Progress = Callable[[str, float], None]


@dataclass(frozen=True)
class Console:
    """How talkative one verb is."""

    quiet: bool = False
    json: bool = False

    def say(self, text: str) -> None:
        """A line of the result for people."""
        if not self.quiet and not self.json:
            print(text, flush=True)

    def record(self, text: str) -> None:
        """The record for programs: the one thing on stdout with --json."""
        if self.json:
            print(text, flush=True)

    def warn(self, text: str) -> None:
        """A complaint that goes with an exit code other than 0, said even with --quiet."""
        print(f"regkit: {_one_line(text)}", file=sys.stderr, flush=True)

    def remark(self, text: str) -> None:
        """Something worth knowing that changes no exit code, beside the progress."""
        if not self.quiet:
            print(f"regkit: {_one_line(text)}", file=sys.stderr, flush=True)

    @contextmanager
    def progress(self) -> Iterator[Progress | None]:
        """A callback `(stage, share)`, share in [0, 1]: a bar on a terminal, else one line a stage; None with --quiet."""
        if self.quiet:
            yield None
        elif sys.stderr.isatty():
            with _bar() as callback:
                yield callback
        else:
            yield _lines()


    @contextmanager
    def count(self) -> Iterator[Callable[[int, int, str], None] | None]:
        """A callback `(done, of how many, id)`: a bar with the time left on a terminal, else one line a case; None with --quiet."""
        if self.quiet:
            yield None
        elif sys.stderr.isatty():
            with _count_bar() as callback:
                yield callback
        else:
            yield _count_lines()


@contextmanager
def _count_bar() -> Iterator[Callable[[int, int, str], None]]:
    from rich.console import Console as Terminal
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (MofNCompleteColumn(), BarColumn(), TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
               TextColumn("{task.description}"))
    with Progress(*columns, console=Terminal(stderr=True), transient=True) as bar:
        task = bar.add_task("")
        yield lambda done, total, name: bar.update(task, total=total, completed=done, description=name)


def _count_lines() -> Callable[[int, int, str], None]:
    begun = time.monotonic()

    def tell(done: int, total: int, name: str) -> None:
        print(f"{time.monotonic() - begun:6.1f} s  {done}/{total}  {name}".rstrip(), file=sys.stderr, flush=True)

    return tell


@contextmanager
def _bar() -> Iterator[Progress]:
    from rich.console import Console as Terminal
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Terminal(stderr=True), transient=True) as bar:
        task = bar.add_task("read", total=1.0)
        yield lambda stage, share: bar.update(task, description=stage, completed=share)


def _lines() -> Progress:
    begun = time.monotonic()
    last = ""

    def tell(stage: str, share: float) -> None:
        nonlocal last
        if stage != last:
            print(f"{time.monotonic() - begun:6.1f} s  {stage}", file=sys.stderr, flush=True)
            last = stage

    return tell


@contextmanager
def importing() -> Iterator[None]:
    """Imports without the garbage collector, which goes through the many new objects again and again: torch takes an eighth less."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def _one_line(text: str) -> str:
    return " ".join(text.split())


def refuse(message: str) -> None:
    """The one line of a user's error."""
    print(f"regkit: error: {_one_line(message)}", file=sys.stderr, flush=True)


def interrupted() -> None:
    """The one line after Ctrl-C."""
    print("regkit: interrupted; nothing was written", file=sys.stderr, flush=True)


def report_fault(error: Exception) -> None:
    """One line, then the traceback, so that it can be reported."""
    kind = type(error).__name__
    print(f"regkit: error: unexpected {kind}: {_one_line(str(error))}; this is a fault of regkit, please report what follows",
          file=sys.stderr)
    traceback.print_exception(error, file=sys.stderr)
