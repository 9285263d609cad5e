"""Two folders change names at once: nobody who looks finds neither."""

from __future__ import annotations

import sys
import threading

import pytest

from regkit.io.exchange import exchange
from regkit.io.output import output_folder


@pytest.mark.skipif(not sys.platform.startswith(("linux", "darwin")), reason="only these systems have it")
def test_names_are_exchanged(tmp_path):
    for name in ("ä one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    assert exchange(tmp_path / "ä one", tmp_path / "two")
    assert (tmp_path / "two" / "file").read_text() == "ä one" and (tmp_path / "ä one" / "file").read_text() == "two"


def test_what_is_not_there_is_not_exchanged(tmp_path):
    (tmp_path / "one").mkdir()
    assert not exchange(tmp_path / "one", tmp_path / "two") and not exchange(tmp_path / "two", tmp_path / "one")
    assert [path.name for path in tmp_path.iterdir()] == ["one"]


@pytest.mark.skipif(not sys.platform.startswith(("linux", "darwin")), reason="only these systems have it")
def test_a_result_that_is_replaced_is_there_all_the_time(tmp_path):
    path, missed, done = tmp_path / "out", [], threading.Event()

    def watch():
        while not done.is_set():
            try:
                (path / "a").read_text()
            except OSError as error:  # a file of a folder that was opened before may go, the folder's name may not
                if not path.exists():
                    missed.append(error)

    def fill(text):
        with output_folder(path, overwrite=True, owned={"a"}) as stage:
            (stage / "a").write_text(text)

    fill("0")
    watcher = threading.Thread(target=watch)
    watcher.start()
    for number in range(1, 60):
        fill(str(number))
    done.set()
    watcher.join()
    assert not missed and (path / "a").read_text() == "59" and [p.name for p in tmp_path.iterdir()] == ["out"]
