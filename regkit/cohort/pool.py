"""A pool of processes in which one job's death is that job's alone.

`concurrent.futures` gives up all jobs when a process is killed (as for want of memory); here the job that it had is
reported and another process takes its place.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import signal
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Done:
    """A job's place in the list, and what it gave, or why it gave nothing."""

    index: int
    value: Any = None
    error: str | None = None


@dataclass
class _Worker:
    process: Any
    pipe: Any
    job: int | None = None


def run(work: Callable[[Any], Any], jobs: Sequence[Any], processes: int) -> Iterator[Done]:
    """`work` of every job, in `processes` new processes, each yielded as it is done. work and jobs must pickle.

    An exception, or the death of a process, is that job's `error`. Closing the iterator, as Ctrl-C does, ends all processes."""
    context = multiprocessing.get_context("spawn")
    waiting = list(range(len(jobs)))[::-1]
    workers: list[_Worker] = []

    def begin(worker: _Worker | None) -> None:
        if worker is None:
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(work, theirs), daemon=True)
            process.start()
            theirs.close()
            worker = _Worker(process, ours)
            workers.append(worker)
        worker.job = waiting.pop()
        try:
            worker.pipe.send(jobs[worker.job])
        except OSError:
            return  # it has died; its pipe says so when next looked at

    try:
        while waiting and len(workers) < max(1, processes):
            begin(None)
        while any(worker.job is not None for worker in workers):
            ready = multiprocessing.connection.wait([worker.pipe for worker in workers if worker.job is not None])
            for worker in [w for w in workers if w.pipe in ready]:
                assert worker.job is not None
                index, worker.job = worker.job, None
                try:
                    value, error = worker.pipe.recv()
                except (EOFError, OSError):
                    worker.process.join(5)
                    code = worker.process.exitcode
                    workers.remove(worker)
                    if waiting:
                        begin(None)
                    yield Done(index, error=f"its process died ({_death(code)})")
                    continue
                if waiting:
                    begin(worker)
                yield Done(index, value, error)
    finally:
        for worker in workers:
            worker.pipe.close()
            worker.process.terminate()
        for worker in workers:
            worker.process.join(5)


def _death(code: int | None) -> str:
    if code is not None and code < 0:
        name = signal.Signals(-code).name
        return f"{name}, perhaps for want of memory" if name == "SIGKILL" else name
    return f"exit code {code}"


def _serve(work: Callable[[Any], Any], pipe: Any) -> None:
    """A process's life: jobs in, results out, until the pipe is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    while True:
        try:
            job = pipe.recv()
        except (EOFError, OSError):
            return
        try:
            result = (work(job), None)
        except Exception as error:
            result = (None, "".join(traceback.format_exception_only(error)).strip())
        try:
            pipe.send(result)
        except OSError:
            return
