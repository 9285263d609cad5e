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


# of a brain on another, rounded
RIGHT = {"mm": 4.0, "half_edge_mm": 100.0, "mind": 0.6, "mind_share": 0.95, "ngf": 0.45, "ngf_share": 0.95, "cr": 0.95, "lncc": 0.75,
         "null_back": 0.1, "null_away": 0.8, "null_cr": 0.1, "null_mind": 0.45, "null_mind_z": 20.0, "return": 0.01, "returned": 1.0,
         "stay_cr": 0.01, "stay_mind": 0.01, "stay_ngf": 0.01, "ways": 0.002, "blocks": 3000.0, "blocks_matched": 0.8, "blocks_near": 0.5,
         "blocks_alike": 0.9, "blocks_off": 0.04, "blocks_median": 1.0, "mirror": -0.1}


@pytest.fixture
def unjudged(monkeypatch):
    """Evidence that is given instead of gathered, which spares a third of the time. For tests of where a map ends: the verdict has tests of
    its own, and looks at nothing but the map."""
    monkeypatch.setattr("regkit.registration.attempt.gather", lambda scene, one: dict(RIGHT))
