"""The settings of a training: what is not understood is refused by its name, before torch is loaded."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from regkit.errors import OptionError
from regkit.localisation import NETS
from regkit.space import MODELS as ALL_MODELS
from regkit.training.settings import MODELS, NET_NAMES, TrainSettings

ROOT = Path(__file__).resolve().parents[2]

WRONG = [
    ({"net": "keypoint"}, r"net: 'keypoint' is not known; use one of keypoints, regression \(nearest: keypoints\)"),
    ({"net": None}, "net: None is not known"),
    ({"model": "afine"}, r"model: 'afine' is not known; use one of rigid, similarity, affine \(nearest: affine\)"),
    ({"model": "translation"}, "model: 'translation' is not known"),  # a net that cannot turn is not worth its training
    ({"model": "tps"}, "model: 'tps' is not known"),
    ({"similarity": "auto"}, r"similarity: 'auto' is not known; use one of mse, ncc, lncc, cr, mi, edge, mind, ngf"),
    ({"precision": "16"}, r"precision: '16' is not known; use one of auto, 32, bf16"),
    ({"device": "gpu"}, r"device: 'gpu' is not known; use one of auto, cpu, cuda"),
    ({"pairs": "al"}, r"pairs: 'al' is not known; use one of all, within, atlas=FILE \(nearest: all\)"),
    ({"pairs": "atlas"}, r"pairs: 'atlas' is not known; .*nearest: atlas=FILE"),
    ({"pairs": "atlas="}, "pairs: atlas= names no file; give atlas= and the scan that is always fixed"),
    ({"pairs": "atlas=FILE"}, "pairs: atlas=FILE names no file"),  # the word of the help
    ({"steps": 0}, "steps: 0; expected 1 or more"),
    ({"batch": -1}, "batch: -1; expected 1 or more"),
    ({"workers": -1}, "workers: -1; expected 0 or more"),
    ({"edge": 8}, "edge: 8; expected a multiple of 8, 16 or more"),
    ({"edge": 20}, "edge: 20; expected a multiple of 8"),
    *(({"rate": value}, f"rate: {value}; expected a number above 0") for value in (0.0, -1e-3, math.inf, math.nan)),
    *(({"canvas": value}, f"canvas: {value}; expected mm above 0") for value in (0.0, -10.0, math.inf, math.nan)),
    *(({"turn": value}, f"turn: {value}; expected 0 to 180 degrees") for value in (-1.0, 181.0, math.nan)),
    *(({"held_out": value}, f"held-out: {value}; expected a share from 0 to below 1") for value in (-0.1, 1.0, math.nan)),
    *(({name: value}, f"{name}: {value}; expected a number from 0 on") for name in ("known", "similar", "regular", "labels", "augment")
      for value in (-0.5, math.inf, math.nan)),
    ({"known": 0.0, "similar": 0.0}, "known, similar: both 0, so there is nothing to learn; give one of them a weight"),
]


@pytest.mark.parametrize(("given", "message"), WRONG, ids=[" ".join(f"{k}={v}" for k, v in given.items()) for given, _ in WRONG])
def test_what_is_not_understood_is_refused_by_its_name(given, message):
    with pytest.raises(OptionError, match="^" + message) as caught:
        TrainSettings(**given)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("given", [
    {"steps": 1, "batch": 1, "workers": 0, "edge": 16}, {"turn": 0.0}, {"turn": 180.0}, {"held_out": 0.0}, {"held_out": 0.99},
    {"known": 0.0}, {"similar": 0.0, "regular": 0.0, "augment": 0.0}, {"canvas": 0.5}, {"rate": 1e-12}, {"pairs": "within"},
    {"pairs": "atlas=a.nii.gz"}, {"precision": "bf16", "device": "cuda"}], ids=str)
def test_what_is_at_the_border_is_allowed(given):
    settings = TrainSettings(**given)
    assert {name: getattr(settings, name) for name in given} == given


def test_the_defaults_are_valid_and_all_of_them_are_said():
    settings = TrainSettings()
    assert settings.as_dict() == {field.name: field.default for field in fields(TrainSettings)}
    assert TrainSettings(**settings.as_dict()) == settings
    with pytest.raises(AttributeError):
        settings.steps = 3  # frozen


def test_the_names_are_those_that_there_are():
    assert set(NET_NAMES) == set(NETS) and set(MODELS) < set(ALL_MODELS)
    for net in NET_NAMES:
        assert {TrainSettings(net=net, model=model).model for model in MODELS} == set(MODELS)


def test_it_loads_no_torch():
    code = ("import sys; from regkit.training.settings import TrainSettings; TrainSettings(); import regkit; regkit.TrainSettings;"
            "print([m for m in ('torch', 'numpy', 'monai', 'lightning_fabric', 'matplotlib') if m in sys.modules])")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["[]"]
