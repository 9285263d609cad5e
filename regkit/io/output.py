"""Results appear whole or not at all: a folder or file is written under a name beside its own, synced, renamed once."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import secrets
import shutil
import socket
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

from regkit.errors import FormatError, OutputError
from regkit.io.exchange import exchange
from regkit.io.paths import home

_FULL = {errno.ENOSPC: "the disk is full", errno.EDQUOT: "the quota is used up", errno.EROFS: "the file system is read-only"}
_HELD: set[str] = set()  # locks of this process: a lock with our process number that is not here is a dead run's


def sha256(path: str | Path) -> str:
    """Hex SHA-256 of a file, or of a folder: of its files' relative names and contents, in sorted order.

    Raises FormatError if it cannot be read.
    """
    path = home(path)
    try:
        if not path.is_dir():
            with path.open("rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
        digest = hashlib.sha256()
        for file in sorted(p for p in path.rglob("*") if p.is_file()):
            digest.update(f"{file.relative_to(path).as_posix()}\0{sha256(file)}\n".encode())
        return digest.hexdigest()
    except OSError as error:
        raise FormatError(f"{path} cannot be read: {error.strerror or error}") from error


@contextlib.contextmanager
def _refusals(path: Path, within: Path | None = None) -> Iterator[None]:
    """Turn the system's refusals to write `path` into OutputError; with `within`, only a full disk's and those below it:
    the work done there may fail to read a file for reasons of its own."""
    try:
        yield
    except OutputError:
        raise
    except OSError as error:
        if within is None or error.errno in _FULL or str(error.filename or "").startswith(str(within)):
            why = _FULL.get(error.errno or 0, error.strerror or str(error))
            raise OutputError(f"output: {path} cannot be written: {why}; choose another place or make room") from error
        raise


def _make_parents(folder: Path) -> list[Path]:
    """Create `folder` and what lies above it; returns what was made, innermost first."""
    missing = []
    while not folder.exists():
        missing.append(folder)
        folder = folder.parent
    if not folder.is_dir():
        raise OutputError(f"output: {folder} is a file, not a folder; choose another place")
    for one in reversed(missing):
        one.mkdir(exist_ok=True)
    return missing


def _remove_empty(folders: list[Path]) -> None:
    for folder in folders:
        with contextlib.suppress(OSError):
            folder.rmdir()


def _sync(path: Path) -> None:
    """Flush a file or folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def output_file(path: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield a temporary path beside `path`, with its suffix, and move what was written there onto `path` at the end.

    An exception within leaves nothing behind. Raises OutputError for a place that is taken, read-only or full.
    """
    path = Path(path)
    temporary = path.parent / f".regkit-{secrets.token_hex(4)}-{path.name}"
    made: list[Path] = []
    done = False
    try:
        with _refusals(path):
            _check_file(path, overwrite)
            made = _make_parents(path.parent)
        with _refusals(path, temporary):
            yield temporary
        with _refusals(path):
            _sync(temporary)
            _check_file(path, overwrite)
            os.replace(temporary, path)
            done = True
            _sync(path.parent)
    finally:
        if not done:
            with contextlib.suppress(OSError):
                temporary.unlink()
            _remove_empty(made)


def _check_file(path: Path, overwrite: bool) -> None:
    if path.is_dir():
        raise OutputError(f"output: {path} is a folder; give a file name")
    if not overwrite and os.path.lexists(path):
        raise OutputError(f"output: {path} exists; choose another name or give --overwrite")


@contextlib.contextmanager
def output_folder(path: str | Path, *, overwrite: bool = False,
                  owned: Callable[[str], bool] | Collection[str] = ()) -> Iterator[Path]:
    """Yield an empty folder beside `path`; at the end it becomes `path`, in one renaming. Check here, before the long work.

    overwrite: an earlier result may be replaced, if it holds only files whose names are `owned` (a predicate or a set).

    An exception within removes what was written and changes nothing else. One run at a time writes to `path`.

    Raises OutputError for a place that is taken, in use, read-only or full.
    """
    path = Path(os.path.realpath(home(path)))
    mine = owned if callable(owned) else frozenset(owned).__contains__
    stage = path.parent / f".{path.name}.regkit-{secrets.token_hex(4)}"
    with contextlib.ExitStack() as stack:
        with _refusals(path):
            _check_folder(path, overwrite, mine)
            made = _make_parents(path.parent)
            stack.callback(_remove_empty, made)  # folders above a result are not empty, and stay
            stack.enter_context(_lock(path))
            _recover(path)
            _check_folder(path, overwrite, mine)
            stage.mkdir()
            stack.callback(shutil.rmtree, stage, ignore_errors=True)  # renamed by then, unless something failed
        with _refusals(path, stage):
            yield stage
        with _refusals(path):
            for folder, _, files in os.walk(stage, topdown=False):
                for file in files:
                    _sync(Path(folder, file))
                _sync(Path(folder))
            _check_folder(path, overwrite, mine)
            _swap(stage, path)
            _sync(path.parent)


def _check_folder(path: Path, overwrite: bool, owned: Callable[[str], bool]) -> None:
    """Raise OutputError unless `path` is absent, empty, or ours to replace."""
    if not path.name:
        raise OutputError(f"output: {path} is the root of the file system; name a folder in it")
    if not os.path.lexists(path):
        return
    if not path.is_dir():
        raise OutputError(f"output: {path} is a file; choose another folder")
    if os.path.ismount(path):
        raise OutputError(f"output: {path} is a mount point and cannot be replaced at once; name a folder in it")
    foreign, ours = [], False
    for folder, folders, files in os.walk(path):
        links = [name for name in folders if Path(folder, name).is_symlink()]
        ours = ours or bool(files) or bool(folders)
        foreign += [name for name in files + links if name in links or not owned(name)]
        if not files and not folders and Path(folder) != path:
            foreign.append(Path(folder).name)  # an empty folder in it is nobody's result
    if ours and not overwrite:
        raise OutputError(f"output: {path} exists and holds files; choose another folder or give --overwrite")
    if foreign:
        listed = ", ".join(sorted(foreign)[:3]) + (", …" if len(foreign) > 3 else "")
        raise OutputError(f"output: {path} holds files that are not regkit's ({listed}), so it is not overwritten; "
                          "choose another folder")


def _swap(stage: Path, path: Path) -> None:
    """Rename `stage` onto `path`. What is there changes places with it; where the system cannot do that it goes aside first, and comes
    back if the renaming fails."""
    if not path.exists() or not any(path.iterdir()):
        os.rename(stage, path)
        return
    if exchange(stage, path):
        shutil.rmtree(stage, ignore_errors=True)
        return
    aside = path.parent / f".{path.name}.regkit-old-{secrets.token_hex(4)}"
    os.rename(path, aside)
    try:
        os.rename(stage, path)
    except BaseException:
        os.rename(aside, path)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _recover(path: Path) -> None:
    """Tidy up after a run that was killed here; we hold the lock, so no such folder is in use."""
    prefix = f".{path.name}.regkit-"
    for left in sorted(p for p in path.parent.iterdir() if p.name.startswith(prefix) and p.is_dir() and not p.is_symlink()):
        if left.name.startswith(f"{prefix}old-") and not path.exists():
            os.rename(left, path)  # killed between its two renamings: the earlier result is still good
        else:
            shutil.rmtree(left, ignore_errors=True)


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Hold `.NAME.regkit-lock` beside `path`. Raises OutputError while a living run holds it."""
    lock = path.parent / f".{path.name}.regkit-lock"
    content = f"{os.getpid()} {socket.gethostname()}\n"
    for _ in range(10):
        try:
            descriptor = os.open(lock, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError:
            if _take_over(lock, content):
                break
        else:
            with os.fdopen(descriptor, "w") as file:
                file.write(content)
            break
    else:
        raise OutputError(f"output: {path} is being written by another run; wait for it or choose another folder")
    _HELD.add(str(lock))
    try:
        yield
    finally:
        _HELD.discard(str(lock))
        with contextlib.suppress(OSError):
            lock.unlink()


def _take_over(lock: Path, content: str) -> bool:
    """Make a dead run's lock ours; False if it has gone meanwhile. Raises OutputError if its run lives."""
    import fcntl

    try:
        file = lock.open("r+")
    except FileNotFoundError:
        return False
    with file:
        # Rewritten in place under the system's own lock: of two runs that find a dead lock only one can take it.
        fcntl.flock(file, fcntl.LOCK_EX)
        state = os.fstat(file.fileno())
        if state.st_nlink == 0:
            return False
        holder = file.read().split()
        if _alive(lock, holder, time.time() - state.st_mtime):
            where = f" (process {holder[0]} on {holder[1]})" if len(holder) == 2 else ""
            raise OutputError(f"output: {lock.name} is held by another run{where}; wait for it or choose another folder; "
                              "if there is none, delete this lock")
        file.seek(0)
        file.write(content)
        file.truncate()
    return True


def _alive(lock: Path, holder: list[str], age: float) -> bool:
    if len(holder) != 2 or not holder[0].isdigit():
        return age < 10  # a run that has just made the lock has not yet written its number
    if holder[1] != socket.gethostname() or str(lock) in _HELD:
        return True
    if int(holder[0]) == os.getpid():
        return False  # our number, but not our lock: the number was used again, as in restarted containers
    try:
        os.kill(int(holder[0]), 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True
