"""The house as docs/architecture.md draws it: which room may import which, what is public, how large a file may grow."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "regkit"
FILES = sorted(PACKAGE.rglob("*.py"))

# A room may import rooms of a lower storey (and its own files).
STOREYS = {
    "errors": 0, "space": 1, "image": 2, "filters": 3, "sampling": 4, "similarity": 5, "localisation": 5, "displacement": 5, "stn": 6,
    "report": 6, "registration": 7, "training": 8, "cohort": 9, "evaluation": 10, "cli": 11,
}
# `io` is the door beside the stairs: it knows what it reads and writes, and whoever runs registrations may open it.
IO_MAY_IMPORT = {"errors", "space", "image"}
MAY_IMPORT_IO = {name for name, storey in STOREYS.items() if storey >= STOREYS["registration"]}
# The one file that lies above everything: the lazy public names. __main__ is a door too.
TOP = {"__init__.py", "__main__.py"}

READERS = {"nibabel", "SimpleITK", "nitransforms"}  # only under io/
HEAVY = {"monai", "matplotlib"}  # nowhere on the way of `regkit register`
ON_THE_WAY = {*(name for name, storey in STOREYS.items() if storey <= STOREYS["registration"]), "io", "cli"}

PUBLIC = [
    "Diagnosis", "Evaluation", "FormatError", "GeometryError", "Grid", "Image", "Matrix", "OptionError", "OutputError", "OverlapError",
    "Points", "Registration", "RegkitError", "Settings", "SpatialTransformer", "TrainSettings", "align", "apply", "doctor", "evaluate",
    "read_image", "read_points", "read_transform", "train", "write_image", "write_points", "write_transform",
]


def _room(file: Path) -> str:
    part = file.relative_to(PACKAGE).parts[0]
    return part.removesuffix(".py")


def _imports(file: Path) -> list[str]:
    """Full names of all modules a file imports, inside functions too; type-checking imports count."""
    names = []
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            # `from .x import y` in regkit/room/file.py is regkit.room.x
            package = file.relative_to(ROOT).parts[: -node.level] if node.level else ()
            module = ".".join([*package, *([node.module] if node.module else [])])
            names += [f"{module}.{alias.name}" if module == "regkit" else module for alias in node.names]
    return names


def _ids(file: Path) -> str:
    return str(file.relative_to(PACKAGE))


@pytest.mark.parametrize("file", [f for f in FILES if f.relative_to(PACKAGE).as_posix() not in TOP], ids=_ids)
def test_imports_go_down(file):
    room = _room(file)
    assert room == "io" or room in STOREYS, f"{room} has no storey: add it to docs/architecture.md and to this test"
    for name in _imports(file):
        if not name.startswith("regkit"):
            continue
        other = name.split(".")[1] if "." in name else ""
        if other == room or (room == "cli" and other == "__version__"):
            continue
        if room == "io":
            allowed = other in IO_MAY_IMPORT
        elif other == "io":
            allowed = room in MAY_IMPORT_IO
        else:
            allowed = other in STOREYS and STOREYS[other] < STOREYS[room]
        assert allowed, f"{file.relative_to(ROOT)}: {room} may not import {name}"


@pytest.mark.parametrize("file", FILES, ids=_ids)
def test_readers_stay_under_io_and_heavy_packages_off_the_way(file):
    packages = {name.split(".")[0] for name in _imports(file)}
    if _room(file) != "io":
        assert not packages & READERS
    if _room(file) in ON_THE_WAY:
        assert not packages & HEAVY


@pytest.mark.parametrize("file", FILES, ids=_ids)
def test_files_stay_small_and_explained(file):
    text = file.read_text(encoding="utf-8")
    assert len(text.splitlines()) < 320, f"{file.relative_to(ROOT)} has grown too long: split it"
    assert ast.get_docstring(ast.parse(text)), f"{file.relative_to(ROOT)} has no docstring"


def _python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout


def test_public_names():
    import regkit

    assert list(regkit.__all__) == PUBLIC
    for name in PUBLIC:
        assert getattr(regkit, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'algin'"):
        regkit.algin  # noqa: B018 (looking it up is the test)


def test_nothing_else_leaks_and_no_torch_is_loaded():
    code = "import sys, regkit; print(sorted(dir(regkit)) == sorted([*regkit.__all__, '__version__'])); " \
           "print(*(n for n in vars(regkit) if not n.startswith('_'))); " \
           "print(*(m for m in ('torch', 'numpy', 'nibabel', 'SimpleITK', 'cyclopts', 'rich') if m in sys.modules))"
    listed, leaked, loaded = _python(code).split("\n")[:3]
    assert listed == "True"
    assert set(leaked.split()) <= {"annotations", "import_module", "TYPE_CHECKING"}
    assert loaded == ""


def test_aligning_loads_nothing_that_is_slow_to_import():
    """Some torch functions import sympy (0.3 s to half a second) when they are first called."""
    code = ("import sys, numpy as np, regkit; draw = np.random.default_rng(0); scan = np.kron(draw.random((5, 5, 5)), np.ones((5, 5, 5)));"
            "regkit.align((scan, np.eye(4)), (scan[:, ::-1, ::-1].copy(), np.eye(4)));"
            "print(*[m for m in ('sympy', 'scipy.optimize', 'monai', 'matplotlib') if m in sys.modules])")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []


def _calls(file: Path) -> list[str]:
    """Full names of what a file calls."""
    return [ast.unparse(node.func) for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]


@pytest.mark.parametrize("file", FILES, ids=_ids)
def test_nothing_that_a_file_says_is_run(file):
    """Weights come by safetensors alone: no pickle, no eval, no shell."""
    packages = {name.split(".")[0] for name in _imports(file)}
    assert not packages & {"pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "pty", "code"}
    if "subprocess" in packages:  # Python itself, with code that stands there, which reads what may end the process
        assert file.relative_to(PACKAGE).as_posix() == "io/transforms.py"
    for call in _calls(file):
        assert call not in {"eval", "exec", "compile", "__import__", "os.system", "os.popen", "torch.load", "yaml.load", "yaml.unsafe_load",
                            "yaml.full_load"} and not call.startswith(("os.exec", "os.spawn")), f"{file.relative_to(ROOT)} calls {call}"
    nodes = ast.walk(ast.parse(file.read_text(encoding="utf-8")))
    assert not {word.arg for node in nodes if isinstance(node, ast.Call) for word in node.keywords} & {"allow_pickle", "shell"}
