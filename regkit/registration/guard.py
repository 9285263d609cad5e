"""The guard's look at a finished map: overlap, scale, shear and similarity, in plain sentences."""

from __future__ import annotations

import math
from typing import Any

import torch

from regkit.registration.pair import Pair
from regkit.sampling import inside
from regkit.space import Matrix, Transform
from regkit.space.transform import curved, linearised

LEAST_OVERLAP, FEW_OVERLAP = 0.02, 0.25  # of the smaller field of view
FAR_SCALE, ODD_SCALE = 4.0, 1.8  # times, or one over
ODD_SHEAR = 2.0  # longest over shortest stretch
ODD_VOXELS, LIKE_MANY = 2.5, 1.5  # times: voxels so different in size, and about as many along an edge in both scans
LITTLE_INSIDE = 0.35  # MIND of what lies inside both scans, where one has a constant background
UNRELATED, DOUBTFUL = 0.03, 0.1  # similarity at the end


def overlap(pair: Pair, transform: Transform) -> float:
    """Share of the smaller scan's counting voxels that the other scan sees, in [0, 1]."""
    shares = []
    for home, weight, away, way in ((pair.fixed, pair.fixed_weight, pair.moving, transform),
                                    (pair.moving, pair.moving_weight, pair.fixed, transform.inverse())):
        steps = tuple(max(1, n // 32) for n in home.grid.shape)
        grid = home.grid.shrink(steps)
        index = away.grid.to_index(way(grid.points()))
        seen = inside(index, away.grid.shape)[0]
        if weight is not None:
            counts = weight[(..., *[slice(None, None, s) for s in steps])][(..., *[slice(0, n) for n in grid.shape])].flatten() > 0
            seen = seen[counts]
        shares.append(float(seen.float().mean()) if len(seen) else 0.0)
    return max(shares)


def _sizes(pair: Pair) -> list[str]:
    """A word where the scans look alike in voxels and not in mm, as under a wrong header or a printer's resolution tag."""
    sizes = [float(image.grid.spacing.log().mean().exp()) for image in (pair.fixed, pair.moving)]
    counts = [math.prod(image.grid.shape) ** (1 / pair.ndim) for image in (pair.fixed, pair.moving)]
    if max(sizes) / min(sizes) < ODD_VOXELS or max(counts) / min(counts) > LIKE_MANY:
        return []
    return [f"both scans have about as many voxels, but those of fixed measure {sizes[0]:.3g} mm and those of moving {sizes[1]:.3g} mm: "
            "check that both headers (a picture's resolution tag) state the right size"]


def _linear(pair: Pair, transform: Transform) -> torch.Tensor:
    """(D, D): the map's linear part, at the middle of the fixed scan."""
    if isinstance(transform, Matrix) and transform.affine:
        return transform.matrix[0, :-1, :-1]
    return linearised(transform, pair.fixed.grid.centre, float(pair.fixed.grid.spacing.min()))[0]


def _folded(pair: Pair, transform: Transform) -> float:
    """The share of the fixed scan where the map turns space inside out, at some thousands of points."""
    if not curved(transform):
        return 0.0
    grid = pair.fixed.grid.shrink(tuple(max(1, n // 24) for n in pair.fixed.grid.shape))
    upright = torch.linalg.det(_linear(pair, transform)).sign()
    volumes = torch.linalg.det(linearised(transform, grid.points()[0], float(pair.fixed.grid.spacing.min())))
    return float((volumes * upright <= 0).double().mean())


def look(pair: Pair, transform: Transform, scores: dict[str, float]) -> dict[str, Any]:
    """Findings in sentences, the numbers behind them, and whether the result is hopeless."""
    d = pair.ndim
    linear = _linear(pair, transform).cpu()
    stretches = torch.linalg.svdvals(linear)
    scale = float(torch.linalg.det(linear).abs() ** (1 / d))
    shear = float(stretches.max() / stretches.min())
    share = overlap(pair, transform)
    findings, hopeless = [], False
    if share < LEAST_OVERLAP:
        findings.append(f"the scans overlap by {100 * share:.1f} % of the smaller: nothing was aligned")
        hopeless = True
    elif share < FEW_OVERLAP:
        findings.append(f"the scans overlap by only {100 * share:.0f} % of the smaller")
    if not 1 / FAR_SCALE < scale < FAR_SCALE:
        findings.append(f"the map scales by {scale:.3g}: check that both headers state millimetres")
        hopeless = True
    elif not 1 / ODD_SCALE < scale < ODD_SCALE:
        findings.append(f"the map scales by {scale:.3g}, which is much for scans of one kind")
    if shear > ODD_SHEAR:
        findings.append(f"the map stretches one direction {shear:.2f} times as much as another")
    findings += _sizes(pair)
    folded = _folded(pair, transform)
    if folded > 0:
        findings.append(f"the map folds at {100 * folded:.2g} % of the fixed scan: there it has no inverse; take fewer control "
                        "points, or more stiffness")
    if scores["end"] < UNRELATED:
        findings.append(f"the scans do not resemble each other at the result (similarity {scores['end']:.3f}, unrelated is 0)")
        hopeless = True
    elif scores["end"] < DOUBTFUL:
        findings.append(f"the scans resemble each other little at the result (similarity {scores['end']:.3f})")
    if scores.get("inside", 1.0) < LITTLE_INSIDE:
        findings.append(f"what lies inside the two scans agrees little at the pose that was found (MIND {scores['inside']:.2f}, of right "
                        "poses mostly 0.4 and more): look at the picture")
    return {"hopeless": hopeless, "findings": findings, "overlap": round(share, 4), "scale": round(scale, 5),
            "shear": round(shear, 5), **{f"similarity_{k}": round(v, 5) for k, v in scores.items()}}
