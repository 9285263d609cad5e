"""Whether the outline of a cut-out scan means anything to the other scan.

Where one scan has a constant background and the other has tissue, the first was cut out (skull-stripped, say) and the second
was not. Its background then says nothing and must carry no weight, from the search for the pose on.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from regkit.filters import gradient
from regkit.registration.pyramid import SAME, Canvas
from regkit.registration.steps import Outcome, Scene, compare, score

DOUBTED = 0.45  # MIND of what lies inside both outlines, second level; right poses of cut-out scans have more, stretched ones less
BETTER = 0.05  # by so much more of it, a pose found without backgrounds convinces
TISSUE = 0.45  # share of the other scan's edges on a background: 0.6 and more for a brain in a head or template, else 0.37 at most


def backgrounds(scene: Scene, pose: Tensor, find: Callable[[Scene], Tensor], outcome: Outcome) -> tuple[Scene, Tensor]:
    """The scene without the backgrounds that say nothing, and the pose (1, D+1, D+1) in it.

    find: finds a pose in a scene. It is called again, for each scan without its background, only if the insides of the two
    scans do not agree at the pose."""
    second = min(1, len(scene.canvases) - 1)
    there = [canvas.background is not None for canvas in scene.canvases[second]]
    if not any(there):
        return scene, pose
    inside = scene.hiding(*there)
    agreed, _ = compare(inside, second, ("mind",), pose)
    if agreed < DOUBTED:
        least = score(inside, second, ("mind",), pose) + BETTER
        for which in [w for w in ((True, False), (False, True)) if there[w.index(True)]]:
            other = find(scene.hiding(*which))
            reached = score(inside, second, ("mind",), other)
            if reached > least:
                pose, least = other, reached
    hidden = [bool(a and b > TISSUE) for a, b in zip(there, _on_background(*scene.canvases[second], scene, pose), strict=True)]
    for name, one in zip(("fixed", "moving"), hidden, strict=True):
        if one:
            outcome.notes.append(f"{name}: its background lies on tissue of the other scan, as that of a cut-out (skull-stripped) scan "
                                 "does, and carries no weight")
    return scene.hiding(*hidden) if any(hidden) else scene, pose


def _on_background(fixed: Canvas, moving: Canvas, scene: Scene, pose: Tensor) -> tuple[float, float]:
    """Share of the moving scan's edges, by steepness, that lies on the fixed one's background, and the other way round."""
    shares = []
    for home, away, way in ((fixed, moving, pose), (moving, fixed, torch.linalg.inv(pose))):
        values, seen = away.source.read(home.grid, scene.frame.world(way))
        tissue = gradient(values)[:, 0].square().sum(1, keepdim=True).sqrt() * seen * home.weight
        bare = home.weight.new_zeros(()) if home.background is None else ((home.data - home.background).abs() <= SAME).float()
        shares.append(float((tissue * bare).sum() / tissue.sum().clamp_min(1e-12)))
    return shares[0], shares[1]
