"""A net while it learns, and all of it in one file: weights, their average, the optimiser's state."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from regkit.errors import CheckpointError
from regkit.io.weights import read_tensors, write_tensors

_AVERAGE = 6.94  # exponent of the average: its width is a tenth of the run


@dataclass
class Learner:
    """A net, the average of its weights over its steps, and its optimiser.

    The average weighs step t by t^γ (Karras et al., CVPR 2024): it is good at any time, so that a run may be broken off, or go on
    for longer than it was meant to."""

    net: nn.Module
    average: nn.Module
    optimiser: torch.optim.Optimizer
    step: int = 0

    @staticmethod
    def of(net: nn.Module, rate: float) -> Learner:
        return Learner(net, copy.deepcopy(net).requires_grad_(False).eval(), torch.optim.Adam(net.parameters(), rate))

    def averaged(self) -> None:
        """Counts a step, and lets the average follow."""
        share = 1 - (1 - 1 / (self.step + 1)) ** (_AVERAGE + 1)
        with torch.no_grad():
            for mean, now in zip(self.average.parameters(), self.net.parameters(), strict=True):
                mean.lerp_(now, share)
        self.step += 1

    def save(self, path: Path, state: dict[str, Any]) -> None:
        """Written aside and renamed: there is always one whole checkpoint. state: what JSON can hold, kept in the header."""
        tensors = {f"{kind}/{key}": value for kind, net in (("net", self.net), ("average", self.average))
                   for key, value in net.state_dict().items()}
        for index, kept in self.optimiser.state_dict()["state"].items():
            tensors |= {f"optimiser/{index}/{key}": value for key, value in kept.items()}
        write_tensors(path, tensors, {"state": json.dumps({**state, "step": self.step})}, overwrite=True)

    def load(self, path: Path) -> dict[str, Any]:
        """→ the state that was saved with it. Raises CheckpointError where the file is no checkpoint of such a net."""
        tensors, state = read(path)
        try:
            for kind, net in (("net", self.net), ("average", self.average)):
                net.load_state_dict({key: tensors[f"{kind}/{key}"] for key in net.state_dict()})
            whole = self.optimiser.state_dict()
            for index in range(len(list(self.net.parameters()))):
                found = {key.rsplit("/", 1)[1]: value for key, value in tensors.items() if key.startswith(f"optimiser/{index}/")}
                if found:
                    whole["state"][index] = found
            self.optimiser.load_state_dict(whole)
        except (KeyError, RuntimeError) as error:
            why = " ".join(str(error).split())  # torch lists keys on lines of their own
            raise CheckpointError(f"{path}: is no checkpoint of this net ({why}); take its own run, or another output") from error
        self.step = int(state["step"])
        return state


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and state of a checkpoint. Raises CheckpointError where it cannot be read."""
    tensors, header = read_tensors(path)
    try:
        return tensors, json.loads(header["state"])
    except (KeyError, ValueError) as error:
        raise CheckpointError(f"{path}: is no checkpoint of a training; remove it, or give another output") from error
