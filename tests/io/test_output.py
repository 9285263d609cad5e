"""Whole or not at all: what a failed, killed or second writer leaves."""

from __future__ import annotations

import errno
import os
import signal
import socket
import stat
import subprocess
import sys
import time

import pytest

from regkit.errors import FormatError, OutputError
from regkit.io import output as module
from regkit.io import output_file, output_folder, sha256

OWNED = {"a.txt", "b.txt"}


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def fill(path, text="new", overwrite=False, owned=OWNED):
    with output_folder(path, overwrite=overwrite, owned=owned) as stage:
        (stage / "a.txt").write_text(text)


def test_a_folder_appears_whole(tmp_path):
    target = tmp_path / "deep" / "er" / "out"
    with output_folder(target, owned=OWNED) as stage:
        (stage / "a.txt").write_text("1")
        (stage / "sub").mkdir()
        (stage / "sub" / "b.txt").write_text("2")
        assert stage.parent == target.parent and not target.exists()
    assert names(target) == ["a.txt", "sub"] and names(target.parent) == ["out"]
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE(target.stat().st_mode) == 0o777 & ~mask
    with output_folder(target, overwrite=True, owned=lambda name: name.endswith(".txt")) as stage:
        (stage / "b.txt").write_text("3")
    assert names(target) == ["b.txt"] and names(target.parent) == ["out"]


def test_an_empty_folder_is_free(tmp_path):
    (tmp_path / "out").mkdir()
    fill(tmp_path / "out")
    assert names(tmp_path / "out") == ["a.txt"]


def test_what_is_taken_is_refused_before_the_work(tmp_path):
    fill(tmp_path / "out", "old")
    with pytest.raises(OutputError, match=r"out exists and holds files; choose another folder or give --overwrite"):
        fill(tmp_path / "out")
    (tmp_path / "out" / "thesis.doc").write_text("mine")
    with pytest.raises(OutputError, match=r"not regkit's \(thesis.doc\)"):
        fill(tmp_path / "out", overwrite=True)
    for n in range(4):
        (tmp_path / "out" / f"f{n}").write_text("mine")
    with pytest.raises(OutputError, match=r"\(f0, f1, f2, …\)"):
        fill(tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / "a.txt").read_text() == "old" and (tmp_path / "out" / "thesis.doc").read_text() == "mine"
    (tmp_path / "nested" / "b").mkdir(parents=True)
    (tmp_path / "nested" / "b" / "mine").write_text("")
    with pytest.raises(OutputError, match=r"\(mine\)"):
        fill(tmp_path / "nested", overwrite=True)
    (tmp_path / "file").write_text("")
    for path, match in [
        (tmp_path / "file", "is a file"),
        (tmp_path / "file" / "out", "file, not a folder|cannot be written"),
        ("/", "root"),
    ]:
        with pytest.raises(OutputError, match=match):
            fill(path)
    assert names(tmp_path) == ["file", "nested", "out"]


@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt()])
def test_a_failed_run_changes_nothing(tmp_path, error):
    fill(tmp_path / "out", "old")
    for target, overwrite in [(tmp_path / "out", True), (tmp_path / "new" / "deep" / "out", False)]:
        with pytest.raises(type(error)), output_folder(target, overwrite=overwrite, owned=OWNED) as stage:
            (stage / "a.txt").write_text("half")
            raise error
    assert names(tmp_path) == ["out"] and (tmp_path / "out" / "a.txt").read_text() == "old"


def test_the_old_result_comes_back_if_the_new_cannot_be_put_in_place(tmp_path, monkeypatch):
    fill(tmp_path / "out", "old")
    rename, calls = os.rename, []

    def second_fails(a, b):
        calls.append((a, b))
        if len(calls) == 2:
            raise OSError(errno.EIO, "I/O error", str(a))
        rename(a, b)

    monkeypatch.setattr(module, "exchange", lambda one, two: False)
    monkeypatch.setattr(module.os, "rename", second_fails)
    with pytest.raises(OutputError, match=r"cannot be written: I/O error"):
        fill(tmp_path / "out", overwrite=True)
    assert len(calls) == 3 and names(tmp_path) == ["out"] and (tmp_path / "out" / "a.txt").read_text() == "old"


def test_a_full_disk_and_foreign_errors(tmp_path):
    with pytest.raises(OutputError, match=r"out cannot be written: the disk is full"), output_folder(tmp_path / "out"):
        raise OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(FileNotFoundError), output_folder(tmp_path / "out"):
        (tmp_path / "input").read_text()  # not the output's fault
    with pytest.raises(OutputError, match=r"x.txt cannot be written: the disk is full"), output_file(tmp_path / "x.txt"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert names(tmp_path) == []


def test_a_read_only_place(tmp_path, monkeypatch):
    def refuse(path, *_, **__):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(module.Path, "mkdir", refuse)
    for target in (tmp_path / "out", tmp_path / "new" / "out"):
        with pytest.raises(OutputError, match=r"cannot be written: Permission denied"):
            fill(target)
    with pytest.raises(OutputError, match=r"Permission denied"), output_file(tmp_path / "new" / "x.txt"):
        pass
    assert names(tmp_path) == []


def test_one_run_at_a_time(tmp_path):
    with output_folder(tmp_path / "out", owned=OWNED):
        with pytest.raises(OutputError, match=f"held by another run .process {os.getpid()}"):
            fill(tmp_path / "out")
        fill(tmp_path / "other")
    assert names(tmp_path) == ["other", "out"]


@pytest.mark.parametrize(
    "content,lives", [("own", False), ("parent", True), ("dead", False), ("1 elsewhere", True), ("", True), ("old", False)]
)
def test_locks_of_the_living_and_the_dead(tmp_path, content, lives):
    lock = tmp_path / ".out.regkit-lock"
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    here = socket.gethostname()
    lock.write_text(
        {"own": f"{os.getpid()} {here}", "parent": f"{os.getppid()} {here}", "dead": f"{dead.pid} {here}", "old": ""}.get(
            content, content
        )
    )
    if content == "old":
        os.utime(lock, (time.time() - 60,) * 2)
    before = lock.read_text()
    if lives:
        with pytest.raises(OutputError, match=r"held by another run"):
            fill(tmp_path / "out")
        assert lock.read_text() == before and names(tmp_path) == [lock.name]
    else:
        fill(tmp_path / "out")
        assert names(tmp_path) == ["out"]


def test_a_killed_run_leaves_the_old_result_and_the_next_tidies_up(tmp_path):
    fill(tmp_path / "out", "old")
    code = (
        f"import time\nfrom regkit.io.output import output_folder\n"
        f"with output_folder({str(tmp_path / 'out')!r}, overwrite=True, owned={OWNED!r}) as stage:\n"
        "    (stage / 'a.txt').write_text('half')\n    print('ready', flush=True)\n    time.sleep(60)\n"
    )
    run = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert run.stdout.readline() == b"ready\n"
    with pytest.raises(OutputError, match=f"process {run.pid}"):
        fill(tmp_path / "out", overwrite=True)
    run.send_signal(signal.SIGKILL)
    run.wait()
    run.stdout.close()
    assert (tmp_path / "out" / "a.txt").read_text() == "old" and len(names(tmp_path)) == 3
    fill(tmp_path / "out", "new", overwrite=True)
    assert names(tmp_path) == ["out"] and (tmp_path / "out" / "a.txt").read_text() == "new"
    # killed between the two renamings: the old result comes back
    os.rename(tmp_path / "out", tmp_path / ".out.regkit-old-1234abcd")
    with pytest.raises(OutputError, match=r"holds files"):
        fill(tmp_path / "out")
    assert names(tmp_path) == ["out"] and (tmp_path / "out" / "a.txt").read_text() == "new"


def test_files(tmp_path):
    target = tmp_path / "new" / "x.nii.gz"
    with output_file(target) as temporary:
        temporary.write_text("1")
        assert temporary.name.endswith("x.nii.gz") and temporary.parent == target.parent and not target.exists()
    assert names(target.parent) == ["x.nii.gz"] and target.read_text() == "1"
    with pytest.raises(OutputError, match=r"exists; choose another name or give --overwrite"), output_file(target):
        pytest.fail("the work began")
    with pytest.raises(ZeroDivisionError), output_file(target, overwrite=True) as temporary:
        temporary.write_text("half")
        raise ZeroDivisionError
    assert target.read_text() == "1"
    with output_file(target, overwrite=True) as temporary:
        temporary.write_text("2")
    assert target.read_text() == "2" and names(target.parent) == ["x.nii.gz"]
    with pytest.raises(OutputError, match=r"is a folder"), output_file(tmp_path):
        pass
    with pytest.raises(ZeroDivisionError), output_file(tmp_path / "deep" / "er" / "y.txt"):
        raise ZeroDivisionError
    assert names(tmp_path) == ["new"]


def test_sha256(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    assert sha256(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    first = sha256(tmp_path)
    assert sha256(tmp_path) == first
    os.rename(tmp_path / "a", tmp_path / "b")
    assert sha256(tmp_path) != first
    with pytest.raises(FormatError, match=r"cannot be read"):
        sha256(tmp_path / "gone")
