"""environment.yml, constraints.txt and pyproject.toml name the same things."""

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CONDA_NAMES = {"torch": "pytorch", "isal": "python-isal"}  # all others: the PyPI name in lower case


def _project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def _split(requirement: str) -> tuple[str, str]:
    """`name>=1.2` → (name in lower case, 1.2)."""
    match = re.fullmatch(r"([A-Za-z0-9._-]+?)\s*(?:>=|==|=)\s*([\w.]+)", requirement.strip())
    assert match, f"{requirement!r}: expected name>=version"
    return match[1].lower(), match[2]


def _environment() -> list[str]:
    """The items of the conda list, then those of its pip section with `pip:` in front."""
    items, inside_pip = [], False
    for line in (ROOT / "environment.yml").read_text(encoding="utf-8").splitlines():
        match = re.fullmatch(r"(\s*)- (.+)", line)
        if not match or match[2] == "conda-forge":
            continue
        if match[2] == "pip:":
            inside_pip = True
        else:
            items.append(("pip:" if inside_pip and len(match[1]) > 2 else "") + match[2])
    return items


def test_conda_has_the_same_core_dependencies():
    conda = dict(_split(item) for item in _environment() if not item.startswith("pip") and item != "pip")
    assert conda.pop("python") == _project()["requires-python"].removeprefix(">=")
    core = dict(_split(item) for item in _project()["dependencies"])
    assert conda == {CONDA_NAMES.get(name, name): bound for name, bound in core.items()}


def test_conda_installs_regkit_itself():
    assert "pip" in _environment()
    assert [item for item in _environment() if item.startswith("pip:")] == ["pip:-e ."]


@pytest.mark.parametrize("extra", ["core", "report", "train", "demo", "test", "dev"])
def test_constraints_pin_what_is_tested(extra):
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(_split(line) for line in lines if line and not line.startswith("#"))
    project = _project()
    wanted = project["dependencies"] if extra == "core" else project["optional-dependencies"][extra]
    for name, bound in (_split(item) for item in wanted if not item.startswith("regkit[")):
        assert name in pins, f"constraints.txt has no pin for {name}"
        assert _version(pins[name]) >= _version(bound)


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(n) for n in re.findall(r"\d+", text))
