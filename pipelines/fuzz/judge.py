"""Cases tried in a process of their own, which may hang, grow or die: then that is the case's outcome, and another takes its place."""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

SECONDS = 10.0  # of computing that a case may take
PATIENCE = 40.0  # by the clock, on a machine that does other things too
GOOD = ("read", "refused", "large")
BAD = ("wrong", "fault", "memory", "slow", "hang", "crash")


class Judge:
    """One worker at a time. A context manager: the worker ends with it."""

    def __init__(self) -> None:
        self._worker: subprocess.Popen[bytes] | None = None
        self._heard = b""

    def __enter__(self) -> Judge:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        if self._worker is not None and self._worker.stdin is not None:
            self._worker.stdin.close()
            try:
                self._worker.wait(10)
            except subprocess.TimeoutExpired:
                self._worker.kill()
            self._ended()

    def __call__(self, recipe: dict[str, Any]) -> dict[str, Any]:
        """Try a case → outcome (one of GOOD or BAD), why, seconds, cpu, peak."""
        worker = self._worker or self._start()
        assert worker.stdin is not None
        try:
            worker.stdin.write(json.dumps(recipe).encode() + b"\n")
            worker.stdin.flush()
            found = self._answer(60.0)
            if found is not None and "began" in found:
                found = self._answer(PATIENCE)
        except TimeoutError:
            worker.kill()
            self._ended()
            return {"outcome": "hang", "why": f"no answer in {PATIENCE:.0f} s"}
        except OSError:
            found = None
        if found is None:
            return {"outcome": "crash", "why": f"the process died with {self._ended()}"}
        if found["outcome"] in GOOD and found["cpu"] > SECONDS:
            found.update(outcome="slow", why=f"{found['cpu']:.1f} s")
        if found["outcome"] in GOOD and found["peak"] > 2_000_000_000:
            found.update(outcome="memory", why=f"{found['peak'] / 1e6:.0f} MB")
        return found

    def _start(self) -> subprocess.Popen[bytes]:
        root = str(Path(__file__).resolve().parents[2])
        path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))  # this checkout, not another that is installed
        environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2", "PYTHONUTF8": "1"}
        self._worker = subprocess.Popen([sys.executable, str(Path(__file__).with_name("worker.py"))], stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE, env=environment)
        self._heard = b""
        if self._answer(120.0) is None:
            raise RuntimeError("the worker does not start")
        return self._worker

    def _answer(self, seconds: float) -> dict[str, Any] | None:
        """The worker's next line; None if it has died. Raises TimeoutError."""
        assert self._worker is not None and self._worker.stdout is not None
        until = time.monotonic() + seconds
        while b"\n" not in self._heard:
            ready, _, _ = select.select([self._worker.stdout], [], [], max(0.0, until - time.monotonic()))
            if not ready:
                raise TimeoutError
            more = os.read(self._worker.stdout.fileno(), 1 << 16)
            if not more:
                return None
            self._heard += more
        line, _, self._heard = self._heard.partition(b"\n")
        return json.loads(line)

    def _ended(self) -> int | None:
        """The exit code of the worker, which has ended or is about to."""
        worker, self._worker = self._worker, None
        if worker is None:
            return None
        code = worker.wait()
        for pipe in (worker.stdin, worker.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()
        return code
