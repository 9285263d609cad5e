"""Names of files that are none, or that no program expects."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

import regkit
from regkit.errors import FormatError
from regkit.evaluation.cases import read_cases
from regkit.io.paths import folder_there, home, in_utf8, short, there
from regkit.registration.nets import load
from regkit.training.scans import listed

NAMES = ["~nobody-here/a{}", "a" * 300 + "{}", "nul\0in it{}", "line\nbreak{}"]


def test_home():
    assert home("~/a.nii") == Path.home() / "a.nii" and home("a/~b") == Path("a/~b")
    assert home("~nobody-here/a.nii") == Path("~nobody-here/a.nii")  # as in a shell
    assert home("~no\0body/a.nii") == Path("~no\0body/a.nii")


def test_what_no_system_has_is_not_there(tmp_path):
    assert there(tmp_path) and folder_there(tmp_path)
    for name in NAMES:
        assert not there(name) and not folder_there(name)


def test_short():
    assert short("a\n") == "'a\\n'" and short(3) == "3" and len(short("a" * 10_000)) < 210 and len(short([1] * 10_000)) < 210


@pytest.mark.parametrize("name", NAMES)
def test_every_door_says_what_is_not_there(name):
    for door, suffix in ((regkit.read_image, ".nii"), (regkit.read_image, ".nrrd"), (regkit.doctor, ".nii"),
                         (regkit.read_transform, ".tfm"), (regkit.read_points, ".csv"), (read_cases, ".csv"),
                         (lambda path: listed(Path(path)), ".csv"), (load, ".safetensors")):
        with pytest.raises(regkit.RegkitError):
            door(name.format(suffix))


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")
def test_a_name_that_is_not_utf8(tmp_path, monkeypatch):
    """ITK ends the process that asks it for such a name; nibabel reads it, and a terminal cannot show it."""
    monkeypatch.chdir(tmp_path)
    name = os.fsdecode(b"sc\xffan.nii")
    nib.Nifti1Image(np.zeros((3, 4, 5), np.int16), np.eye(4)).to_filename("a.nii")
    os.rename("a.nii", name)
    assert regkit.read_image(name).grid.shape == (3, 4, 5)
    with pytest.raises(FormatError, match="the name is not UTF-8, and ITK opens no such file; rename it"):
        in_utf8(name)
    for suffix, door in ((".nrrd", regkit.read_image), (".tfm", regkit.read_transform)):
        Path(name + suffix).write_text("#Insight Transform File V1.0\n" if suffix == ".tfm" else "NRRD0004\n")
        with pytest.raises(FormatError, match="not UTF-8"):
            door(name + suffix)
    done = subprocess.run([sys.executable, "-m", "regkit", "doctor", name], capture_output=True,
                          env={**os.environ, "PYTHONIOENCODING": "utf-8:strict"})
    assert done.returncode == 0 and b"sc\\udcffan.nii: " in done.stdout and b"Traceback" not in done.stderr
