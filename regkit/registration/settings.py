"""The settings of one registration, defined once: the command line, `align()` and config files all read this.

Imports no torch, so that `regkit --help` answers at once.
"""

from __future__ import annotations

import math
import re
from dataclasses import asdict, dataclass, fields

from regkit.errors import OptionError, choose

MODEL_NAMES = ("translation", "attention", "rigid", "similarity", "affine", "projective", "tps")
SIMILARITY_NAMES = ("mse", "ncc", "lncc", "cr", "mi", "edge", "mind", "ngf")
START_NAMES = ("auto", "header", "centre", "mass", "moments", "search", "net")
NET = "net:"  # and a file, a training's folder, or the name of a shipped net
MOST_CONTROL = 8  # in 3D 1,536 parameters
INTERPOLATION_NAMES = ("linear", "cubic", "nearest")


@dataclass(frozen=True)
class Settings:
    """How a pair is aligned.

    Raises OptionError, naming the nearest right value, where one is not understood.
    """

    model: str = "affine"
    """What may move: translation, attention, rigid, similarity, affine, projective or tps."""
    similarity: str = "auto"
    """What "aligned" means: auto, mse, ncc, lncc, cr, mi, edge, mind or ngf; auto looks at the pair and says what it chose."""
    start: str = "auto"
    """Where to begin: auto, header, centre, mass, moments, search, net, net:WEIGHTS, or a transform file."""
    interpolation: str = "linear"
    """How the moved scan is interpolated: linear, cubic or nearest."""
    fill: str = "auto"
    """Value outside the moving scan; auto is 0, or the minimum where that is negative (CT)."""
    levels: str = "auto"
    """Working resolutions in mm, coarse to fine, such as 10,5,2.5; 0 means no refinement; auto follows the scans."""
    volume: int | None = None
    """Which volume of a 4D scan to take, from 0."""
    control: int = 5
    """Control points along each axis of a thin-plate spline."""
    stiffness: float = 0.0
    """How much more than usual a thin-plate spline resists bending; 0.1 is stiff."""
    no_retry: bool = False
    """Keep the first result; else other starts, another measure and a wider search are tried where the verdict is FAIL."""
    expected_error: bool = False
    """Also write expected_error.nii.gz: by how many mm the map is probably off at each voxel."""
    seed: int = 0
    """Seed of the sample points."""
    threads: int | None = None
    """CPU threads; by default what torch takes."""
    device: str = "auto"
    """auto, cpu or cuda."""
    max_memory: str = "auto"
    """Most memory to take, such as 4G or 800M: coarser where that suffices, else refused; auto is what there is, 0 no limit."""

    def __post_init__(self) -> None:
        choose("model", self.model, MODEL_NAMES)
        choose("similarity", self.similarity, ("auto", *SIMILARITY_NAMES))
        choose("interpolation", self.interpolation, INTERPOLATION_NAMES)
        choose("device", self.device, ("auto", "cpu", "cuda"))
        if self.start.startswith(NET):
            if self.start == NET:
                raise OptionError(f"start: {NET} names no net; give {NET}FILE.safetensors, a training's folder or a shipped net's name")
        elif not self.start.lower().endswith((".tfm", ".txt", ".h5", ".hdf5", ".mat", ".json")):
            choose("start", self.start, START_NAMES)
        self.fill_value(0.0)
        self.level_list()
        self.memory_limit()
        if not 2 <= self.control <= MOST_CONTROL:
            raise OptionError(f"control: {self.control}; expected 2 to {MOST_CONTROL} control points along each axis")
        if not 0 <= self.stiffness < math.inf:
            raise OptionError(f"stiffness: {self.stiffness}; expected a number from 0 on")
        if self.threads is not None and self.threads < 1:
            raise OptionError(f"threads: {self.threads}; expected 1 or more")
        if self.volume is not None and self.volume < 0:
            raise OptionError(f"volume: {self.volume}; expected 0 or more")

    @classmethod
    def of(cls, **options: object) -> Settings:
        """Settings from keyword arguments; levels and fill may be numbers, a path may be a Path."""
        for name in options:
            choose("option", name, [f.name for f in fields(cls)])
        levels, fill = options.get("levels", "auto"), options.get("fill", "auto")
        if isinstance(levels, (list, tuple)):
            options["levels"] = ",".join(f"{v:g}" for v in levels)
        elif levels is None or isinstance(levels, (int, float)):
            options["levels"] = "auto" if levels is None else f"{levels:g}"
        options["fill"] = fill if isinstance(fill, str) else repr(float(fill))  # type: ignore[arg-type]
        options["start"] = str(options.get("start", "auto"))
        options["max_memory"] = str(options.get("max_memory", "auto"))
        return cls(**options)  # type: ignore[arg-type]

    def fill_value(self, minimum: float) -> float:
        """The fill for a scan whose smallest value is `minimum`."""
        if self.fill == "auto":
            return min(0.0, minimum)
        try:
            return float(self.fill)
        except ValueError:
            raise OptionError(f"fill: {self.fill!r} is neither a number nor auto") from None

    def level_list(self) -> tuple[float, ...] | None:
        """Working resolutions in mm; None: chosen from the scans; (): no refinement."""
        if self.levels == "auto":
            return None
        try:
            levels = tuple(float(v) for v in self.levels.split(","))
        except ValueError:
            raise OptionError(f"levels: {self.levels!r}; expected millimetres with commas, such as 10,5,2.5, or 0, or auto") from None
        if levels == (0.0,):
            return ()
        if not all(0 < v < math.inf for v in levels):
            raise OptionError(f"levels: {self.levels!r}; every level must be a positive number of mm (a single 0 means no refinement)")
        return tuple(sorted(levels, reverse=True))

    def memory_limit(self) -> int | None:
        """Bytes; None: what there is; 0: no limit."""
        if self.max_memory == "auto":
            return None
        found = re.fullmatch(r"(\d+(?:\.\d*)?)\s*([kKmMgGtT]?)(i?)[bB]?", self.max_memory.strip())
        if found is None:
            raise OptionError(f"max-memory: {self.max_memory!r}; expected bytes, such as 4G, 800M or 3.5GiB, or 0 for no limit, or auto")
        number, unit, binary = found.groups()
        return int(float(number) * (1024 if binary else 1000) ** ("kmgt".index(unit.lower()) + 1 if unit else 0))

    def as_dict(self) -> dict[str, object]:
        return asdict(self)
