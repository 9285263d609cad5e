"""Named tensors in and out of files: safetensors only, never pickle."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from regkit.errors import CheckpointError
from regkit.io.output import output_file


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor], header: Mapping[str, str], *, overwrite: bool = False) -> None:
    """Write tensors by name and a header of texts; the file appears whole or not at all. Raises OutputError."""
    with output_file(path, overwrite=overwrite) as aside:
        # as bytes: save_file would make a file that only its owner may read
        aside.write_bytes(save({key: value.detach().cpu().contiguous() for key, value in tensors.items()}, dict(header)))


def read_tensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """→ tensors by name, and the header. Raises CheckpointError where the file is missing or no safetensors file."""
    try:
        with safe_open(path, "pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118 no mapping
    except (OSError, SafetensorError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as weights ({str(error)[:300]}); expected a safetensors file") from error
