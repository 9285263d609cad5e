"""What tests of pipelines share."""

import importlib
import sys
from pathlib import Path
from types import ModuleType

PIPELINES = Path(__file__).parents[2] / "pipelines"


def scripts(folder: Path, names: tuple[str, ...]) -> list[ModuleType]:
    """A pipeline's modules, which are scripts beside each other; other pipelines have modules of the same names."""
    others = {name: sys.modules.pop(name) for name in names if name in sys.modules}
    sys.path.insert(0, str(folder))
    try:
        return [importlib.import_module(name) for name in names]
    finally:
        sys.path.remove(str(folder))
        for name in names:
            sys.modules.pop(name, None)
        sys.modules.update(others)
