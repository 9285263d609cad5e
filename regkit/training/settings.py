"""The settings of a training, defined once: the command line and `train()` both read this. Imports no torch."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

from regkit.errors import OptionError, choose
from regkit.registration.settings import SIMILARITY_NAMES

NET_NAMES = ("keypoints", "regression")
MODELS = ("rigid", "similarity", "affine")
ATLAS = "atlas="


@dataclass(frozen=True)
class TrainSettings:
    """How a localisation net is trained on scans.

    Raises OptionError, naming the nearest right value, where one is not understood."""

    net: str = "keypoints"
    """keypoints or regression."""
    model: str = "affine"
    """What the net's map may be: rigid, similarity or affine."""
    similarity: str = "lncc"
    """What is made small between moved and fixed scans: mse, ncc, lncc, cr, mi, edge, mind or ngf."""
    pairs: str = "all"
    """Who is paired: all, within (scans of one person), or atlas=FILE, which then is always fixed."""
    steps: int = 4000
    """Steps of the training."""
    batch: int = 4
    """Pairs a step, over all processes."""
    rate: float = 1e-3
    """Learning rate."""
    canvas: float | None = None
    """mm: edge of the canvas the net looks at; by default 1.3 times the scans' median extent."""
    edge: int = 40
    """Voxels of the canvas along each axis."""
    turn: float = 180.0
    """Degrees by which scans are turned at most."""
    weights: str | None = None
    """A net to begin from: a file, a training's folder, or the name of a shipped net."""
    known: float = 1.0
    """Weight of the poses that are known, because one scan was turned twice."""
    similar: float = 1.0
    """Weight of the similarity."""
    regular: float = 0.05
    """Weight of the logarithms of the map's stretches."""
    labels: float = 0.0
    """Weight of the Dice of label maps, where all scans have one; without it they only serve validation."""
    augment: float = 1.0
    """How much contrasts are changed at random; 0 not at all."""
    held_out: float = 0.2
    """Share of the people who are kept for validation."""
    skip_bad: bool = False
    """Leave out scans that cannot be read, and list them."""
    precision: str = "auto"
    """32, bf16 or auto: what convolutions are computed in; auto is bf16 where the device has it."""
    device: str = "auto"
    """auto, cpu or cuda."""
    workers: int = 0
    """Processes that make batches ahead."""
    seed: int = 0
    """Seed of all that is drawn."""

    def __post_init__(self) -> None:
        choose("net", self.net, NET_NAMES)
        choose("model", self.model, MODELS)
        choose("similarity", self.similarity, SIMILARITY_NAMES)
        choose("precision", self.precision, ("auto", "32", "bf16"))
        choose("device", self.device, ("auto", "cpu", "cuda"))
        if not self.pairs.startswith(ATLAS):
            choose("pairs", self.pairs, ("all", "within", "atlas=FILE"))
        elif self.pairs == ATLAS or self.pairs == "atlas=FILE":
            raise OptionError(f"pairs: {self.pairs} names no file; give {ATLAS} and the scan that is always fixed")
        for name in ("steps", "batch"):
            if getattr(self, name) < 1:
                raise OptionError(f"{name}: {getattr(self, name)}; expected 1 or more")
        if self.workers < 0:
            raise OptionError(f"workers: {self.workers}; expected 0 or more")
        if self.edge < 16 or self.edge % 8:
            raise OptionError(f"edge: {self.edge}; expected a multiple of 8, 16 or more")
        if not 0 < self.rate < math.inf:
            raise OptionError(f"rate: {self.rate}; expected a number above 0")
        if self.canvas is not None and not 0 < self.canvas < math.inf:
            raise OptionError(f"canvas: {self.canvas}; expected mm above 0")
        if not 0 <= self.turn <= 180:
            raise OptionError(f"turn: {self.turn}; expected 0 to 180 degrees")
        if not 0 <= self.held_out < 1:
            raise OptionError(f"held-out: {self.held_out}; expected a share from 0 to below 1")
        for name in ("known", "similar", "regular", "labels", "augment"):
            if not 0 <= getattr(self, name) < math.inf:
                raise OptionError(f"{name}: {getattr(self, name)}; expected a number from 0 on")
        if self.known == self.similar == 0:
            raise OptionError("known, similar: both 0, so there is nothing to learn; give one of them a weight")

    def as_dict(self) -> dict[str, object]:
        return asdict(self)
