"""The pool: all jobs come back, whatever becomes of their processes."""

import os
import signal
import time

import pytest

from regkit.cohort.pool import run


def double(n):
    return 2 * n


def trip(n):
    if n == 1:
        raise ValueError("no ones here")
    return n


def die(n):
    if n % 3 == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return n


def test_every_job_is_done_once():
    found = list(run(double, [1, 2, 3, 4, 5], 2))
    assert sorted((d.index, d.value) for d in found) == [(k, 2 * k + 2) for k in range(5)]
    assert not any(d.error for d in found)


def test_an_error_is_the_jobs_alone():
    found = {d.index: d for d in run(trip, [0, 1, 2], 2)}
    assert found[1].error == "ValueError: no ones here" and found[1].value is None
    assert (found[0].value, found[2].value) == (0, 2)


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL here")
def test_a_death_is_the_jobs_alone():
    """Jobs 1 and 4 of six kill their process, in a pool of two: the other four come back."""
    found = {d.index: d for d in run(die, list(range(6)), 2)}
    assert sorted(found) == list(range(6))
    assert {k for k, d in found.items() if d.error} == {1, 4}
    assert found[1].error == "its process died (SIGKILL, perhaps for want of memory)"


def wait(job):
    if job:
        time.sleep(60)
    return os.getpid()


def test_closing_ends_the_processes():
    stream = run(wait, [False, True], 2)
    pid = next(stream).value
    began = time.monotonic()
    stream.close()  # as an interrupt does
    assert time.monotonic() - began < 10
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_no_jobs():
    assert list(run(double, [], 3)) == []
