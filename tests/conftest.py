"""What all tests share."""

import os
from pathlib import Path

import pytest
import torch

# one thread: small tensors gain nothing from more, and threads that wait for each other are slow on a busy machine
torch.set_num_threads(1)

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def data():
    """The folder of real development scans (see data/README.md); tests that need it carry the marker `data`."""
    folder = Path(os.environ.get("REGKIT_DATA", ROOT.parent / "shared" / "data"))
    if not (folder / "pairs.json").exists():
        pytest.skip(f"no scans at {folder}; set REGKIT_DATA")
    return folder
