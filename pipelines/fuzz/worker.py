"""The process in which cases are tried, one after another: JSON lines in and out. It may die of one; judge.py starts another."""

from __future__ import annotations

import json
import os
import resource
import shutil
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

import bombs
import seeds
from changes import change

MEMORY = 2_000_000_000  # bytes that a case may take, all of the process together
MESSAGE = 4000  # characters of an error
_WANT = ("MemoryError", "allocat", "bad_alloc", "of memory are there")


def _size(name: str) -> int:
    """VmRSS, VmHWM (the peak) or VmSize of this process in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) * 1024


def _limit() -> None:
    """No more memory than a case may take, beyond what is there."""
    most = _size("VmSize") + MEMORY - _size("VmRSS")
    resource.setrlimit(resource.RLIMIT_AS, (most, resource.getrlimit(resource.RLIMIT_AS)[1]))


def _free() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (resource.getrlimit(resource.RLIMIT_AS)[1],) * 2)


def build(recipe: dict[str, Any], folder: Path) -> tuple[Path, bool]:
    """Write a case's files into a folder → the path to open, and whether the file is honestly too large."""
    seed = bombs.made(recipe["seed"])
    if "path" in recipe:
        return Path(recipe["path"]), False
    inner = seed.inner.replace(b"{above}", str(folder.parent.resolve()).encode()) if b"{above}" in seed.inner[:4096] else seed.inner
    for one in recipe["inner"]:
        inner = change(inner, one)
    blob = seed.outer(inner)
    for one in recipe["outer"]:
        blob = change(blob, one)
    path = folder / f"{recipe.get('stem', 'scan')}{seed.suffix}"
    path.write_bytes(blob)
    for suffix, content in seed.beside.items():
        path.with_suffix(suffix).write_bytes(content)
    if seed.length:
        os.truncate(path, seed.length + len(inner))
    return Path(path.name), seed.honest


def judge(recipe: dict[str, Any], path: Path, honest: bool, said: Path) -> dict[str, Any]:
    """Take a case through its door → outcome (read, refused, large; or fault, wrong, slow, memory), why, seconds, peak bytes."""
    import oracles
    from doors import Refused, check, through

    kind, door, expected = bombs.made(recipe["seed"]).kind, recipe["door"], recipe.get("expected", "any")
    began, used = time.perf_counter(), time.process_time()
    outcome, why, value = "read", "", None
    from_here = said.stat().st_size
    try:
        value = through(door, kind, path)
    except Refused as error:
        outcome, why = "refused", str(error)
    except Exception as error:
        outcome, why = "fault", "".join(traceback.format_exception(error))[-3000:]
    found = {"outcome": outcome, "why": why, "seconds": time.perf_counter() - began, "cpu": time.process_time() - used,
             "peak": _size("VmHWM")}
    sys.stdout.flush()
    sys.stderr.flush()
    with said.open("rb") as file:
        file.seek(from_here)
        printed = file.read(10_000_000).decode("utf-8", "replace")
    if "Traceback" in printed:
        return {**found, "outcome": "fault", "why": printed[-3000:]}
    if outcome == "refused":
        if not why:
            lines = [line for line in printed.splitlines() if line.startswith("regkit: error")]
            why = found["why"] = lines[0] if lines else ""
            if len(lines) != 1:
                return {**found, "outcome": "fault", "why": f"{len(lines)} lines that say what is wrong: {printed[-500:]}"}
        if len(why) > MESSAGE or ("\n" in why.strip() and "path" not in recipe):
            return {**found, "outcome": "fault", "why": f"an error of {len(why)} characters or several lines: {why[:300]!r}"}
        if "path" not in recipe and path.name not in why and "cli" not in door:
            return {**found, "outcome": "fault", "why": f"the error does not name the file: {why}"}
        if any(word in why for word in _WANT):
            found["outcome"] = "large" if honest else "memory"
        if expected == "read":
            found["outcome"] = "fault"
    elif outcome == "read":
        _free()
        try:
            if path.stat().st_size <= oracles.MOST and not honest and not (expected == "read" and "bomb nifti" in recipe["seed"]):
                check(door, kind, path, value, printed)
        except oracles.Wrong as error:
            found.update(outcome="wrong", why=str(error))
        except Exception as error:
            found.update(outcome="wrong", why="the oracle refuses: " + "".join(traceback.format_exception(error))[-3000:])
        if expected == "refused":
            found.update(outcome="wrong", why="it should have been refused")
    return found


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    root = Path(tempfile.mkdtemp(prefix="fuzz-"))
    said = root / "said"
    noise = os.open(said, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(noise, stream)
    import torch

    torch.set_num_threads(1)
    import doors  # noqa: F401 loads what is slow to load, before memory is counted

    good = seeds.good()
    (root / bombs.SECRET).write_bytes(b"7" * 60)
    for k in range(1, 4):
        (root / f"secret{k}.raw").write_bytes(b"7" * 20)
    folder = root / "here"
    try:
        print(json.dumps({"ready": True}), file=answers, flush=True)
        for line in sys.stdin:
            recipe = json.loads(line)
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            os.chdir(folder)
            for name, blob in good.items():
                (folder / name).write_bytes(blob)
            try:
                _free()
                path, honest = build(recipe, folder)
                Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
                _limit()
                print(json.dumps({"began": True}), file=answers, flush=True)
                found = judge(recipe, path, honest, said)
            except Exception as error:
                found = {"outcome": "fault", "why": "the fuzzer: " + "".join(traceback.format_exception(error))[-3000:]}
            os.truncate(said, 0)
            print(json.dumps(found), file=answers, flush=True)
    finally:
        os.chdir("/")
        shutil.rmtree(root, ignore_errors=True)


if __name__ == "__main__":
    main()
