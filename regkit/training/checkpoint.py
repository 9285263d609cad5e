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
            for index, parameter in enumerate(self.net.parameters()):
                found = {key.rsplit("/", 1)[1]: value for key, value in tensors.items() if key.startswith(f"optimiser/{index}/")}
                if found:
                    shapes = {key: () if key == "step" else tuple(parameter.shape) for key in ("step", "exp_avg", "exp_avg_sq")}
                    if {key: tuple(value.shape) for key, value in found.items()} != shapes:
                        raise ValueError(f"the optimiser's numbers of parameter {index} have other shapes")
                    whole["state"][index] = found
            self.optimiser.load_state_dict(whole)
            self.step = int(state["step"])
            if self.step < 0:
                raise ValueError(f"step {self.step}")
        except (ArithmeticError, KeyError, RuntimeError, TypeError, ValueError) as error:
            why = " ".join(str(error).split())[:300]  # torch lists keys on lines of their own
            raise CheckpointError(f"{path}: is no checkpoint of this net ({why}); take its own run, or another output") from error
        return state


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and state of a checkpoint. Raises CheckpointError where it cannot be read."""
    tensors, header = read_tensors(path)
    try:
        state = json.loads(header["state"])
        if not isinstance(state, dict):
            raise TypeError("no names and values")
        return tensors, state
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: is no checkpoint of a training; remove it, or give another output") from error
