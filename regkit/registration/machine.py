"""What a result depends on besides inputs and settings: the versions and the machine that computed it."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

_PACKAGES = ("regkit", "torch", "numpy", "nibabel", "SimpleITK", "isal")


def versions() -> dict[str, str]:
    """Of regkit, of what computes and writes for it, and of Python."""
    return {**{name: version(name) for name in _PACKAGES}, "python": platform.python_version()}


def machine(device: torch.device) -> dict[str, str]:
    """What sums depend on in the last bit: the processor and the instructions that torch takes on it, and the GPU if one computes."""
    gpu = {"gpu": torch.cuda.get_device_name(device)} if device.type == "cuda" else {}
    return {"system": f"{platform.system()} {platform.machine()}", "cpu": _cpu(),
            "instructions": torch.backends.cpu.get_cpu_capability(), **gpu}


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, ValueError, StopIteration):
        return platform.processor() or "unknown"


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """Of two records: in which versions, parts of the machine and device they differ, as name → (then, now)."""
    found = {}
    for part in ("versions", "machine"):
        a, b = then.get(part) or {}, now.get(part) or {}
        found |= {name: (str(a.get(name, "not said")), str(b.get(name, "not there"))) for name in {**a, **b} if a.get(name) != b.get(name)}
    if then.get("device") != now.get("device"):
        found["device"] = (str(then.get("device", "not said")), str(now.get("device")))
    return found
