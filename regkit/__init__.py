"""regkit: medical image registration by spatial transformers.

    import regkit
    result = regkit.align("fixed.nii.gz", "moving.nii.gz")
    result.save("out")

The public names are those of `__all__`. They are imported when first used (PEP 562), so `import regkit` loads no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from regkit.errors import FormatError, GeometryError, OptionError, OutputError, OverlapError, RegkitError
    from regkit.evaluation import Evaluation, evaluate
    from regkit.image import Image
    from regkit.io import Points, read_image, read_points, read_transform, write_image, write_points, write_transform
    from regkit.registration.align import align
    from regkit.registration.apply import apply
    from regkit.registration.doctor import Diagnosis, doctor
    from regkit.registration.result import Registration
    from regkit.registration.settings import Settings
    from regkit.space import Grid, Matrix
    from regkit.stn import SpatialTransformer
    from regkit.training.settings import TrainSettings
    from regkit.training.train import train

__version__ = "0.1.0"

__all__ = [
    "Diagnosis",
    "Evaluation",
    "FormatError",
    "GeometryError",
    "Grid",
    "Image",
    "Matrix",
    "OptionError",
    "OutputError",
    "OverlapError",
    "Points",
    "Registration",
    "RegkitError",
    "Settings",
    "SpatialTransformer",
    "TrainSettings",
    "align",
    "apply",
    "doctor",
    "evaluate",
    "read_image",
    "read_points",
    "read_transform",
    "train",
    "write_image",
    "write_points",
    "write_transform",
]

_HOME = {
    "align": "regkit.registration.align",
    "apply": "regkit.registration.apply",
    **dict.fromkeys(("Evaluation", "evaluate"), "regkit.evaluation"),
    **dict.fromkeys(("Diagnosis", "doctor"), "regkit.registration.doctor"),
    "Registration": "regkit.registration.result",
    "Settings": "regkit.registration.settings",
    "SpatialTransformer": "regkit.stn",
    "TrainSettings": "regkit.training.settings",
    "train": "regkit.training.train",
    "Image": "regkit.image",
    **dict.fromkeys(("Grid", "Matrix"), "regkit.space"),
    **dict.fromkeys(
        ("Points", "read_image", "read_points", "read_transform", "write_image", "write_points", "write_transform"), "regkit.io"
    ),
    **dict.fromkeys(
        ("FormatError", "GeometryError", "OptionError", "OutputError", "OverlapError", "RegkitError"), "regkit.errors"
    ),
}


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'regkit' has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value  # the next look-up does not come here
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
