"""The command line: one file a verb, no logic of its own.

Importing this package, and asking for any help text, loads no torch: the verbs import what needs it inside their bodies.

Exit codes: 0 done; 1 a fault of regkit's own; 2 a wrong option or input (one line on stderr, nothing written);
3 written, but the verdict on the registration is FAIL (doctor: something doubtful or wrong was found); 130 interrupted.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from regkit import __version__
from regkit.cli.console import interrupted, refuse, report_fault
from regkit.errors import RegkitError

if TYPE_CHECKING:
    from cyclopts import App

EXIT_DONE, EXIT_FAULT, EXIT_REFUSED, EXIT_INTERRUPTED = 0, 1, 2, 130


def _convert(type_: Any, tokens: Sequence[Any]) -> Any:
    """cyclopts's own conversion, except that `--seed 1.5` is refused instead of rounded."""
    from cyclopts import convert

    if type_ in (int, int | None):
        value = tokens[-1].value
        try:
            return int(value)
        except ValueError:
            raise ValueError(f"{value!r} is not a whole number") from None
    return convert(type_, tokens)


def build() -> App:
    """The application with its verbs."""
    from cyclopts import App, Parameter

    from regkit.cli.apply import apply
    from regkit.cli.demo import demo
    from regkit.cli.doctor import doctor
    from regkit.cli.evaluate import evaluate
    from regkit.cli.register import register
    from regkit.cli.replay import replay
    from regkit.cli.report import report
    from regkit.cli.train import train

    app = App(
        name="regkit",
        help="Medical image registration in 2D and 3D: align scans, apply the result to images, label maps and points.",
        version=__version__,
        help_format="plaintext",
        result_action="return_value",
        suppress_keyboard_interrupt=False,
        default_parameter=Parameter(negative=(), converter=_convert),
    )
    for verb in (register, apply, evaluate, report, replay, doctor, train, demo):
        app.command(verb)
    return app


def run(argv: Sequence[str] | None = None) -> int:
    """Run one command line (default: the process's own) and return its exit code. Never raises for a user's error."""
    try:
        from cyclopts import CycloptsError

        try:
            code = build()(sys.argv[1:] if argv is None else list(argv), exit_on_error=False, print_error=False)
        except CycloptsError as error:
            error.verbose = False
            refuse(_parse_message(error))
            return EXIT_REFUSED
        return EXIT_DONE if code is None else int(code)
    except RegkitError as error:
        refuse(str(error))
        return EXIT_REFUSED
    except KeyboardInterrupt:
        interrupted()
        return EXIT_INTERRUPTED
    except Exception as error:  # a fault of ours: say so in a line, and keep what a report needs
        report_fault(error)
        return EXIT_FAULT


def _parse_message(error: Exception) -> str:
    """What was wrong with the command line, with the cure."""
    from cyclopts import MissingArgumentError, UnusedCliTokensError

    chain = getattr(error, "command_chain", None)
    verb = " ".join(["regkit", *(chain or ())])
    if isinstance(error, UnusedCliTokensError):
        extra = " ".join(error.unused_tokens or ())
        return f"unexpected argument: {extra}; an option that takes several values is given again for each; see {verb} --help"
    if isinstance(error, MissingArgumentError) and error.argument is not None and not error.argument.tokens and error.keyword is None:
        return f"{error.argument.name} is missing; see {verb} --help"
    return f"{str(error).rstrip('.')}; see {verb} --help"


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """The console script: run one command line and exit with its code."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a file's name need not be text that a terminal can show
    code = run(argv)
    if argv is not None or "torch" not in sys.modules:
        sys.exit(code)
    # all files are closed and synced by now; taking torch down orderly costs a tenth of a short run
    logging.shutdown()
    with contextlib.suppress(OSError, ValueError):  # nobody reads any more
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)
