"""How much memory a registration will take, from the headers alone; and what becomes of one that would take too much.

What is large is counted: the voxels as they are held, and what reading, smoothing, resampling, writing and drawing add to them, each of
which may be the peak. What is not counted, the interpreter with its libraries and what comparing canvases takes, was measured.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from regkit.errors import OptionError
from regkit.io.footprint import Footprint, footprint
from regkit.io.memory import free, size
from regkit.registration.pyramid import MOST, fitting, levels_of
from regkit.registration.settings import Settings

BASE = 250_000_000  # bytes: interpreter, torch and the other libraries
WALK = 60_000_000  # comparing, whatever the scans; and again drawing
CANVAS = {"auto": (730.0, 1000.0), "mind": (470.0, 730.0), "ngf": (205.0, 370.0), "": (100.0, 150.0)}  # for each voxel of the finest
# canvas, by measure, on one thread and on several; auto may choose lncc+mind, the dearest. In 2D a third: MIND has 4 channels and not 12
CHEAPEST = "ngf"  # that auto may choose, alone or beside lncc
BETWEEN = 0.35  # of the way from the cheapest measure to the dearest lies what is foretold of auto: within a quarter of both, and nearer to
# edges, which it mostly takes
WIDER = 0.1  # of a voxel, that one counts which only the larger scan's canvas has: scans are compared where both are
BENT = 150.0  # more, where the affine map is bent
LEFT = 0.25  # of what comparing took, which the system has not got back when the result is drawn
SLAB = 90  # planes that are smoothed at a time
FILTER = 40  # bytes for each pair of voxels along an edge: the matrix that smooths along it, while it is made
MARGIN = 1.25  # by which a prediction may be wrong
LEAST = {2: 10_000, 3: 40_000}  # voxels of a canvas below which it is not made coarser


@dataclass(frozen=True)
class Plan:
    """What a registration will take in bytes, and what it may. least and worst: where `auto` chooses its cheapest measure, and its
    dearest, by which the limit is kept; predicted: between them. most: voxels of a canvas; notes: what was done about it."""

    least: int
    worst: int
    limit: int | None
    most: int
    notes: tuple[str, ...] = ()
    lowered: bool = False

    @property
    def predicted(self) -> int:
        return int(self.least + BETWEEN * (self.worst - self.least))

    def as_dict(self) -> dict[str, int | bool | None]:
        """The numbers, for the record."""
        return {**{name: getattr(self, name) for name in ("predicted", "least", "worst", "limit")}, "canvas_voxels": self.most,
                "lowered": self.lowered}


def predicted(fixed: Footprint, moving: Footprint, settings: Settings, masks: tuple[Footprint | None, ...] = (),
              most: int | None = None) -> int:
    """Peak of `regkit register` in bytes; of `auto` where it chooses its dearest measure. most: voxels of a canvas, see `pyramid.MOST`."""
    scans, d = (fixed, moving), fixed.grid.ndim
    given = [mask for mask in masks if mask is not None]
    held = sum(scan.held + (0 if scan.narrow else scan.voxels * 4 * (scan.channels > 1 or scan.itemsize > 4)) for scan in scans)
    held += sum(2 * mask.voxels if mask.narrow else mask.held + mask.voxels for mask in given)
    levels = settings.level_list()
    levels = levels or levels_of(fixed.grid, moving.grid)[: None if levels is None else 1]  # () is looked at on the coarsest
    bound = MOST[d] if most is None else most
    mm = max(fitting(fixed.grid, min(levels), bound), fitting(moving.grid, min(levels), bound))
    canvas, wider = sorted(math.prod(scan.grid.canonical(mm).shape) for scan in scans)
    canvas += WIDER * (wider - canvas)
    out = fixed.voxels * moving.channels * moving.itemsize
    float_moving = 0 if moving.itemsize == 4 else 4 * moving.voxels * moving.channels
    shown = sum(0 if scan.channels == 1 and scan.itemsize == 4 else 4 * scan.voxels for scan in scans)
    field = 0 if settings.model not in ("projective", "tps") else 8 * d * fixed.voxels
    kind = settings.similarity if settings.similarity in CANVAS else ""
    share = 1.0 if d == 3 else 1 / 3
    several = (settings.threads or torch.get_num_threads()) > 1
    walk = WALK + int((share * CANVAS[kind][several] + BENT * (settings.model == "tps")) * canvas)
    filters = sum(FILTER * max(scan.grid.shape) ** 2 // max(_blocks(scan, mm)) for scan in scans)
    stages = {
        "read": sum(scan.reading for scan in (*scans, *given)),
        "pyramid": filters + sum(_smoothing(scan, mm, bool(given)) for scan in scans),
        "walk": walk,
        "resample": out + float_moving + (3 * 4 * moving.voxels if settings.interpolation == "cubic" else 0),
        "write": out + max(2 * out, field),
        "draw": out + shown + filters + WALK + int(LEFT * walk),
    }
    return BASE + held + max(stages.values())


def _blocks(scan: Footprint, mm: float) -> list[int]:
    """Of how many voxels along each axis one is kept, see `pyramid.Smoothed`."""
    return [max(1, min(int(mm / step / 2), n // 2)) for n, step in zip(scan.grid.shape, scan.grid.spacing[0].tolist(), strict=True)]


def _smoothing(scan: Footprint, mm: float, masked: bool) -> int:
    """Bytes that a scan's smoothing takes: a slab of it as float32 and twice what the first axis leaves, in parts and joined; or that
    and what the second leaves, with copies."""
    shape, blocks = scan.grid.shape, _blocks(scan, mm)
    count = 4 * scan.voxels * (2 if masked else 1)
    first = count / blocks[0]
    planes = SLAB if shape[0] >= 128 else shape[0]  # shorter ones go in one piece
    return int(max(count * min(planes, shape[0]) / shape[0] + 2 * first, first + 3.6 * first / blocks[1]))


def budgeted(sources: Mapping[str, Any], settings: Settings) -> Plan | None:
    """The plan for what is called fixed, moving, fixed_mask and moving_mask, by the headers; None where they do not tell.

    Raises as `plan` does."""
    found = {name: footprint(source) for name, source in sources.items() if source is not None}
    fixed, moving = found["fixed"], found["moving"]
    if fixed is None or moving is None or fixed.grid.ndim != moving.grid.ndim:
        return None
    return plan(fixed, moving, settings, (found.get("fixed_mask"), found.get("moving_mask")))


def plan(fixed: Footprint, moving: Footprint, settings: Settings, masks: tuple[Footprint | None, ...] = ()) -> Plan:
    """What to do so that a registration fits: nothing, coarser canvases, or, where these do not suffice, refuse.

    Raises OptionError with the number of bytes it needs: where a limit was given, above it; else where it is surely more than there is."""
    asked, most = settings.memory_limit(), MOST[fixed.grid.ndim]
    limit = available() if asked is None else asked
    full = predicted(fixed, moving, settings, masks)
    cheapest = replace(settings, similarity=CHEAPEST) if settings.similarity == "auto" else settings
    least = predicted(fixed, moving, cheapest, masks)
    if not limit or full <= limit:
        return Plan(least, full, limit or None, most)
    for bound in _coarser(most, LEAST[fixed.grid.ndim]):
        need = predicted(fixed, moving, settings, masks, bound)
        if need <= limit:
            note = (f"memory: at full resolution it would take about {size(full)}, and {size(limit)} are there; canvases have at most "
                    f"{bound:,} voxels, with which it takes about {size(need)}")
            return Plan(predicted(fixed, moving, cheapest, masks, bound), need, limit, bound, (note,), True)
    if asked is None and need <= MARGIN * limit:
        return Plan(least, full, limit, most, (f"memory: it may take about {size(full)}, and {size(limit)} are there",))
    raise OptionError(f"max-memory: this pair takes about {size(full)}, at the coarsest resolution {size(need)}, and {size(limit)} are "
                      f"{'there' if asked is None else 'allowed'}; give --max-memory {math.ceil(need / 1e8) / 10:.1f}G where there is as "
                      "much, or scans of fewer voxels (cropped, or resampled)")


def _coarser(most: int, least: int) -> list[int]:
    """Ever fewer voxels, a quarter less each time."""
    found = [most]
    while found[-1] * 0.75 > least:
        found.append(int(found[-1] * 0.75))
    return [*found[1:], least]


def available() -> int:
    """Bytes that this process may still take, with what an interpreter has already taken of them; 0 where nobody can tell."""
    left = free()
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except (OSError, ValueError):
        return 0
    return 0 if left is None else left + min(BASE, pages * os.sysconf("SC_PAGE_SIZE"))
