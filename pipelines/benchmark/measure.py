"""One command line, measured: wall seconds and peak memory of the whole process, start and imports and files included."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS", "ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS")


@dataclass(frozen=True)
class Cost:
    """What a command took. code: its exit status; 124 where it ran out of time."""

    code: int
    seconds: float
    peak_mb: float


def bind(threads: int) -> None:
    """Keep this process and all it starts to `threads` cores: tools that do not ask how many they may use get no more."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])


def run(commands: list[list[str]], log: Path, threads: int, limit: float) -> Cost:
    """Run the commands one after the other: seconds add up, the peak is the highest.

    The process that calls this must stay small itself: on Linux a child's peak is never told as lower than its parent's
    size when it was started. That is why the scoring has a process of its own.
    """
    environment = {**os.environ, **dict.fromkeys(_VARIABLES, str(threads)), "CUDA_VISIBLE_DEVICES": ""}
    seconds = peak = 0.0
    with log.open("ab") as out:
        for command in commands:
            began = time.perf_counter()
            process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=environment, start_new_session=True)
            done = 0
            while not done:
                done, status, usage = os.wait4(process.pid, os.WNOHANG)
                late = time.perf_counter() - began > limit
                if not done and late:
                    os.killpg(process.pid, signal.SIGKILL)  # the group that start_new_session made: this command and its children
                    done, status, usage = os.wait4(process.pid, 0)
                elif not done:
                    late = False
                    time.sleep(0.01)
            seconds += time.perf_counter() - began
            peak = max(peak, usage.ru_maxrss / 1024)  # KiB on Linux
            process.returncode = 124 if late else os.waitstatus_to_exitcode(status)  # or Popen would wait for it again
            if process.returncode:
                return Cost(process.returncode, seconds, peak)
    return Cost(0, seconds, peak)
