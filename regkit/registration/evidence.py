"""What speaks for and against a finished map, in numbers that do not depend on how it was found.

Nothing of the walk's own judgement is used: a map that a file, a net or a lucky start gave is looked at like any other. All is
measured at the second level, where a scan is some 40 voxels across and wrong poses still differ from right ones by many of them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from regkit.registration.blocks import REACH, cut, match
from regkit.registration.outline import inside
from regkit.registration.refine import evaluate, levenberg_marquardt
from regkit.registration.start import about
from regkit.registration.steps import Scene, compare, look, refine, residual
from regkit.registration.turns import rotations
from regkit.space import MODELS

FAR, FAR_TURN = 8, 0.7  # poses of the null, and how far (radians) they are turned at least
NEAR, NEAR_TURN, NEAR_SHIFT = 6, 0.17, 0.1  # starts of the return: turned by so much, and shifted by so much of the frame
BACK = 0.05  # of the frame: a start that ends nearer than this to the map has returned
POINTS = 4_000


def gather(scene: Scene, one: Tensor) -> dict[str, float]:
    """Evidence about a map (1, D+1, D+1) in the frame."""
    judge, level = inside(scene), min(1, len(scene.canvases) - 1)
    found = {"mm": scene.canvases[level][0].mm, "half_edge_mm": scene.frame.scale}
    for name in ("mind", "ngf"):
        similarity, share = compare(judge, level, (name,), one)
        found[name], found[f"{name}_share"] = similarity, share
    for name in ("cr", "lncc"):
        found[name], _ = compare(scene, level, (name,), one)
    found |= _null(scene, judge, level, one, found)
    found |= _return(scene, judge, level, one)
    found |= _ways(judge, level, one)
    found |= _blocks(scene, level, one)
    found |= _mirror(judge, level, one, found)
    return found


def apart(scene: Scene, one: Tensor, other: Tensor) -> Tensor:
    """How far two maps (1, D+1, D+1) and (N, D+1, D+1) in the frame carry the fixed scan's points to other places (N,): root mean
    square over what counts, as a share of the frame."""
    points = _points(scene)
    d = points.shape[1]
    difference = other - one
    return (points @ difference[:, :d, :d].mT + difference[:, None, :d, d]).square().sum(-1).mean(-1).sqrt()


def _points(scene: Scene) -> Tensor:
    """(P, D) in the frame: the fixed scan's voxels that count, at the coarsest level, its background's left out."""
    canvas = inside(scene).canvases[0][0]
    points = canvas.grid.points()[0][canvas.weight.flatten() > 0.5]
    return (points - scene.frame.centre[0]) / scene.frame.scale


def _null(scene: Scene, judge: Scene, level: int, one: Tensor, found: dict[str, float]) -> dict[str, float]:
    """How far the map stands out among poses that are turned about the same middle, each refined a little by itself."""
    d = one.shape[-1] - 1
    middle = _points(scene).mean(0)
    turns = rotations(d, 60).to(one.device)
    angle = ((turns.diagonal(dim1=1, dim2=2).sum(1) - 1) / 2 if d == 3 else turns[:, 0, 0]).clamp(-1, 1).acos()
    turns = turns[angle > FAR_TURN]
    turns = turns[:: max(1, len(turns) // FAR)][:FAR]
    maps = one @ about(turns, middle, middle)
    rigid = [MODELS["rigid"]]
    maps, scores = refine(scene, 0, ("cr",), maps, rigid, points=1_000, iterations=5)
    mine = evaluate(look(scene, 0, ("cr",), None, 1_000, slopes=False), one, "ratio", slopes=False, run=scene.run).score
    distance = apart(scene, one, maps)
    away = distance > 4 * BACK
    result = {"null_back": float((distance < 2 * BACK).double().mean()), "null_away": float(away.double().mean())}
    result |= {"null_cr": 0.0, "null_mind": 0.0, "null_mind_z": 0.0}
    if bool(away.any()):
        result["null_cr"] = float(mine - scores[away].max())
        values = [compare(judge, level, ("mind",), m) for m in maps[away].split(1)]
        values = torch.tensor([s * w**0.5 for s, w in values])
        here = found["mind"] * found["mind_share"] ** 0.5
        result["null_mind"] = here - float(values.max())
        result["null_mind_z"] = (here - float(values.mean())) / max(float(values.std()) if len(values) > 1 else 0.0, 0.01)
    return result


def _return(scene: Scene, judge: Scene, level: int, one: Tensor) -> dict[str, float]:
    """Where refinement ends that starts a little beside the map: the spread is what the scans leave undecided."""
    d = one.shape[-1] - 1
    model = MODELS["rigid"]
    middle = torch.eye(d + 1, dtype=one.dtype, device=one.device)[None].clone()
    middle[:, :d, d] = _points(scene).mean(0)
    generators = model.generators(d)
    random = torch.randn(NEAR, len(generators), generator=torch.Generator().manual_seed(scene.seed), dtype=torch.float64)
    turning = generators[:, :d, :d].abs().sum((1, 2)) > 0
    for part, size in ((turning, NEAR_TURN), (~turning, NEAR_SHIFT)):
        random[:, part] *= size / random[:, part].norm(dim=1, keepdim=True).clamp_min(1e-6)
    steps = model.exp(random.to(one.device), d)
    maps = one @ middle @ steps @ torch.linalg.inv(middle)
    ends, _ = refine(scene, level, ("cr",), torch.cat([maps, one]), [model], points=POINTS, iterations=8)
    away = apart(scene, one, ends)
    result = {"return": float(away[:-1].median()), "returned": float((away[:-1] < BACK).double().mean()), "stay_cr": float(away[-1])}
    for name in ("mind", "ngf"):  # with all freedom: what a rigid map cannot follow shows here
        still, _ = refine(judge, level, (name,), one, [MODELS["affine"]], points=POINTS, iterations=6)
        result[f"stay_{name}"] = float(apart(scene, one, still))
    return result


def _ways(scene: Scene, level: int, one: Tensor) -> dict[str, float]:
    """Forward against backward: refined by the fixed scan's points alone and by the moving scan's alone."""
    fixed, moving = scene.canvases[level]
    step = max(fixed.mm, moving.mm) / scene.frame.scale
    sides = look(scene, level, ("mind",), one, POINTS)
    ends = [levenberg_marquardt([side], one, MODELS["rigid"], residual(("mind",)), iterations=5, tolerance=0.02 * step, reach=4 * step,
                                run=scene.run)[0] for side in sides]
    return {"ways": float(apart(scene, *ends))}


def _blocks(scene: Scene, level: int, one: Tensor) -> dict[str, float]:
    """Where blocks of one scan fit the other best: at the right pose most fit near where they are."""
    pair = scene.canvases[level]
    blocks = list(scene.run(lambda canvas: cut(canvas, scene.seed), pair))
    count = sum(len(b.centre) for b in blocks)
    result = {"blocks": 0.0, "blocks_matched": 0.0, "blocks_near": 0.0, "blocks_alike": 0.0, "blocks_off": 0.0,
              "blocks_median": float(REACH)}
    if min(len(b.centre) for b in blocks) < 1:
        return result
    found = match(scene, level, blocks, one)
    result["blocks"] = float(count)
    if len(found.alike) == 0:
        return result
    d = one.shape[-1] - 1
    mm = pair[0].mm
    away = found.moving - (found.fixed @ scene.frame.world(one)[0, :d, :d].mT + scene.frame.world(one)[0, :d, d])
    size = away.norm(dim=1) / mm
    result["blocks_matched"] = len(found.alike) / count
    result["blocks_near"] = float((size < 1).double().mean())
    result["blocks_alike"] = float(found.alike.median())
    result["blocks_median"] = float(size.median())
    result["blocks_off"] = float(away.median(0).values.norm()) / mm
    return result


def _mirror(scene: Scene, level: int, one: Tensor, found: dict[str, float]) -> dict[str, float]:
    """What the fixed scan mirrored left to right would gain."""
    d = one.shape[-1] - 1
    middle = _points(scene).mean(0)
    flip = torch.eye(d, dtype=one.dtype, device=one.device)[None].clone()
    flip[0, 0, 0] = -1
    mirrored = one @ about(flip, middle, middle)
    ends, _ = refine(scene, level, ("mind",), mirrored, [MODELS["similarity"]], points=POINTS, iterations=8)
    similarity, share = compare(scene, level, ("mind",), ends)
    return {"mirror": similarity * share**0.5 - found["mind"] * found["mind_share"] ** 0.5}
