"""The tools of the comparison: how each is found, called, and where it leaves its map.

Every map is a (D+1, D+1) matrix from fixed to moving points in RAS mm. Peers that are Python packages run `peers.py` in an
interpreter of their own, so that they need not share an environment with regkit.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

PEERS = Path(__file__).with_name("peers.py")
_ASK = "import importlib.metadata as m, sys; print(m.version(sys.argv[1]))"


@dataclass(frozen=True)
class Found:
    """A tool that is there: its version, and the program (a binary, or the interpreter that has the package)."""

    version: str
    program: str
    binary: bool = False


@dataclass(frozen=True)
class Tool:
    """One line of the table.

    package: what pip calls it. binary: a program that does as well, preferred where it is on the path.
    command: (found, fixed, moving, out, threads, ndim) → the command lines, run one after the other.
    read: (out, ndim) → the matrix, once they are done.
    """

    package: str
    command: Callable[[Found, Path, Path, Path, int, int], list[list[str]]]
    read: Callable[[Path, int], np.ndarray]
    binary: str = ""
    peer: bool = True

    def find(self, python: str | None = None) -> Found | None:
        """Where the tool is; None if it is not installed."""
        if self.binary and python is None and (path := shutil.which(self.binary)):
            said = subprocess.run([path, "-version"], capture_output=True, text=True).stdout.strip()
            return Found(said.splitlines()[0] if said else "unknown", path, True)
        program = python or sys.executable
        said = subprocess.run([program, "-c", _ASK, self.package], capture_output=True, text=True)
        return Found(said.stdout.strip(), program) if said.returncode == 0 else None


def _regkit(found: Found, fixed: Path, moving: Path, out: Path, threads: int, ndim: int) -> list[list[str]]:
    return [[found.program, "-m", "regkit", "register", str(fixed), str(moving), "-o", str(out / "result"),
             "--threads", str(threads), "--device", "cpu", "--quiet"]]


def _read_regkit(out: Path, ndim: int) -> np.ndarray:
    return np.array(json.loads((out / "result" / "registration.json").read_text(encoding="utf-8"))["matrix"], float)


def _greedy(metric: str) -> Callable[[Found, Path, Path, Path, int, int], list[list[str]]]:
    """The recipe of greedy's documentation; its NCC has a radius of 2 voxels."""

    def command(found: Found, fixed: Path, moving: Path, out: Path, threads: int, ndim: int) -> list[list[str]]:
        measure = [metric, "x".join("2" * ndim)] if metric == "NCC" else [metric]
        options = ["-a", "-dof", "12", "-ia-image-centers", "-m", *measure, "-n", "100x50x10", "-seed", "1",
                   "-threads", str(threads), "-i", str(fixed), str(moving), "-o", str(out / "affine.mat")]
        if found.binary:
            return [[found.program, "-d", str(ndim), *options]]
        return [[found.program, str(PEERS), "greedy", str(ndim), *options]]

    return command


def _read_greedy(out: Path, ndim: int) -> np.ndarray:
    m = np.loadtxt(out / "affine.mat")  # RAS, fixed → moving, as here; in 2D some versions write 4 × 4 all the same
    matrix = np.eye(ndim + 1)
    matrix[:ndim, :ndim], matrix[:ndim, ndim] = m[:ndim, :ndim], m[:ndim, -1]
    return matrix


def _script(name: str) -> Callable[[Found, Path, Path, Path, int, int], list[list[str]]]:
    def command(found: Found, fixed: Path, moving: Path, out: Path, threads: int, ndim: int) -> list[list[str]]:
        return [[found.program, str(PEERS), name, str(ndim), str(fixed), str(moving), str(out), str(threads)]]

    return command


def _read_script(out: Path, ndim: int) -> np.ndarray:
    return np.loadtxt(out / "matrix.txt")


TOOLS = {
    "regkit": Tool("regkit", _regkit, _read_regkit, peer=False),
    "greedy": Tool("picsl-greedy", _greedy("NCC"), _read_greedy, binary="greedy"),
    "greedy-nmi": Tool("picsl-greedy", _greedy("NMI"), _read_greedy, binary="greedy"),
    "elastix": Tool("itk-elastix", _script("elastix"), _read_script),
    "ants": Tool("antspyx", _script("ants"), _read_script),
    "sitk": Tool("SimpleITK", _script("sitk"), _read_script),
}


def find(names: list[str], pythons: dict[str, str]) -> tuple[dict[str, Found], list[str]]:
    """The tools that are there, and the names of those that are not. greedy-nmi also takes the interpreter given for greedy."""
    there: dict[str, Found] = {}
    missing = []
    for name in names:
        found = TOOLS[name].find(pythons.get(name) or pythons.get(name.partition("-")[0]))
        if found is None:
            missing.append(name)
        else:
            there[name] = found
    return there, missing
