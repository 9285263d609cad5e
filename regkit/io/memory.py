"""How much memory there is, and whether what is to be read has room in it: a message, instead of a process that the system ends."""

from __future__ import annotations

from pathlib import Path

from regkit.errors import FormatError

SMALL = 1 << 26  # bytes for which there is always room


def check_room(need: int, where: str) -> None:
    """Raise FormatError, naming `where`, if so many bytes are more than memory and swap have left. Where nobody can tell, all is well."""
    left = free(swap=True) if need > SMALL else None
    if left is not None and need > left:
        raise FormatError(f"{where}: its voxels take {size(need)}, and {size(left)} of memory are there; read it on a machine with more, "
                          "or crop or resample it before; if it cannot be so large, its header is damaged")


def size(count: float) -> str:
    """Bytes in words: 10⁹ are 1 GB."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"


def free(*, swap: bool = False) -> int | None:
    """Bytes that this process may still take, by the system and by its control groups; None where nobody can tell. swap: also of that."""
    kinds = ("MemAvailable:", "SwapFree:") if swap else ("MemAvailable:",)
    try:
        lines = [line.split() for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines()]
        found = [int(words[1]) * 1024 for words in lines if words[0] in kinds]
        return min([sum(found), *_cgroups()]) if len(found) == len(kinds) else None
    except (OSError, ValueError):
        return None


def _cgroups(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> list[int]:
    """What the process's control groups leave, of version 2 and 1: every one above it counts too."""
    left = []
    for line in own.read_text(encoding="ascii").splitlines():
        _, kinds, name = line.split(":", 2)
        if kinds and "memory" not in kinds.split(","):
            continue
        folder = (root / "memory" if kinds else root) / name.lstrip("/")
        limit, used = ("memory.limit_in_bytes", "memory.usage_in_bytes") if kinds else ("memory.max", "memory.current")
        for place in (folder, *folder.parents):
            if not place.is_relative_to(root):
                break
            try:
                most, taken = (place / limit).read_text(encoding="ascii").strip(), int((place / used).read_text(encoding="ascii"))
                cache = dict(pair.split() for pair in (place / "memory.stat").read_text(encoding="ascii").splitlines())
            except (OSError, ValueError):
                continue
            if most.isdigit():  # else "max"
                left.append(max(0, int(most) - taken + int(cache.get("inactive_file", 0))))
    return left
