"""Localisation nets in and out of files, and those that are shipped with the package."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from regkit.errors import CheckpointError
from regkit.io.paths import folder_there, short, there
from regkit.io.weights import read_tensors, write_tensors
from regkit.localisation import NETS
from regkit.space import Grid

SHIPPED = Path(__file__).parent.parent / "weights"
NET_FILE = "net.safetensors"  # in a training's folder
_FORMAT = "regkit net 1"
_DEEPEST, _MOST = 8, 4096  # depth, and any other number that a net is built of
_FINEST, _COARSEST = 1e-6, 1e6  # mm of a canvas' voxels


@dataclass(frozen=True, eq=False)
class Trained:
    """A net and the canvas it looks at: `edge` voxels along each axis, of `mm`, or of whatever size makes the canvas as wide as the scan
    where `mm` is None. name: where it came from. info: what is known of it. file: its weights, if they were read from one."""

    net: nn.Module
    edge: int
    mm: float | None
    name: str
    info: dict[str, Any]
    file: Path | None = None

    @property
    def ndim(self) -> int:
        return int(self.net.settings["ndim"])  # type: ignore[index]

    def millimetres(self, grid: Grid) -> float:
        """The size of the canvas' voxels for a scan on a grid."""
        if self.mm is not None:
            return self.mm
        corners = grid.corners()[0]
        return float((corners.amax(0) - corners.amin(0)).max()) / self.edge


def save(net: nn.Module, path: str | Path, *, edge: int, mm: float | None, info: dict[str, Any] | None = None, overwrite: bool = False,
         half: bool = False) -> None:
    """Write a net, and how it is built again. info: what JSON can hold. half: weights as float16, half the size."""
    said = {"kind": net.kind, "settings": net.settings, "edge": edge, "mm": mm}
    tensors = {key: value.half() if half else value for key, value in net.state_dict().items()}
    write_tensors(path, tensors, {"format": _FORMAT, "net": json.dumps(said), "info": json.dumps(info or {})}, overwrite=overwrite)


def load(name: str | Path) -> Trained:
    """A net from a file, from a training's folder, or one that is shipped, by its name (see `shipped`); ready to predict.

    Raises CheckpointError where there is none or it does not fit."""
    path = Path(name)
    if not there(path) and not path.suffix:
        path = SHIPPED / f"{name}.safetensors"
    path = path / NET_FILE if folder_there(path) else path
    cure = f"give a net that regkit wrote, a training's folder, or a shipped net's name ({', '.join(shipped()) or 'there is none'})"
    if not there(path):
        raise CheckpointError(f"net: {short(str(name))} is not there; {cure}")
    try:
        tensors, header = read_tensors(path)
    except CheckpointError as error:
        raise CheckpointError(f"net: {error}; {cure}") from error
    if header.get("format") != _FORMAT:
        raise CheckpointError(f"net: {path} holds no net of regkit's; {cure}")
    try:
        said = _checked(json.loads(header["net"]))
        with torch.device("meta"):
            net = NETS[said["kind"]].of(said["settings"])
        for key, value in tensors.items():
            if not value.is_floating_point() or not bool(torch.isfinite(value).all()):
                raise ValueError(f"{key} holds NaN, infinity or no real numbers")
        net.load_state_dict({key: value.float() for key, value in tensors.items()}, assign=True)
        return Trained(net.eval().requires_grad_(False), said["edge"], said["mm"], str(name), json.loads(header["info"]), path)
    except (ArithmeticError, AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
        why = " ".join(str(error).split())[:300]  # torch lists keys on lines of their own
        raise CheckpointError(f"net: {path} does not fit this version of regkit ({why}); {cure}") from error


def _checked(said: dict[str, Any]) -> dict[str, Any]:
    """How a net is built, if one of such numbers can be. Raises ValueError, KeyError or TypeError."""
    settings, edge, mm = said["settings"], said["edge"], said["mm"]
    for key, value in [*settings.items(), ("edge", edge)]:
        most = _DEEPEST if key == "depth" else _MOST
        if not isinstance(value, (bool, str)) and (not isinstance(value, int) or not 0 <= value <= most):
            raise ValueError(f"{short(key)} is {short(value)}, expected a whole number up to {most}")
    if edge < 1 or edge % 2 ** (1 + settings["depth"]) or settings.get("edge", edge) != edge:
        raise ValueError(f"a canvas of {edge} voxels along an edge does not go with depth {settings['depth']}")
    if mm is not None and (isinstance(mm, (bool, str)) or not _FINEST < float(mm) < _COARSEST):
        raise ValueError(f"voxels of {short(mm)} mm")
    return said


def shipped(ndim: int | None = None) -> list[str]:
    """The names of the nets in the package: all, or those of a dimension, which their name ends with, as in head-3d."""
    return sorted(p.stem for p in SHIPPED.glob("*.safetensors") if ndim is None or p.stem.endswith(f"-{ndim}d"))
