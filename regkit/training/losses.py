"""What a localisation net is trained by: no truth is needed, and what is known of it is used."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from regkit.localisation import KeypointNet
from regkit.localisation.keypoints import Detector, centres
from regkit.localisation.keypoints import fit as fitted
from regkit.sampling.resample import How, IndexMap, resample
from regkit.similarity import similarity
from regkit.training.fit import Batch

_WIDTH = 0.8  # of a heat map's voxel: how wide heat maps shall be
_LIKELY = 0.3  # weight of the points' likelihood
_OVERLAP = 0.5  # weight of what the moved scan does not cover


def point_loss(heat: Tensor, points: Tensor, deviation: Tensor, truth: Tensor, weight: Tensor) -> Tensor:
    """Cross entropy of heat maps (N, K, P), which finds the places soonest, and the likelihood of points (N, K, D), which makes them
    exact and says how exact: the distance to the truth in deviations, and the deviation's logarithm (N, K) for each axis. → (), the
    mean over items of weight (N,)."""
    d = truth.shape[-1]
    edge = round(heat.shape[-1] ** (1 / d))
    width = _WIDTH * 2 / edge
    place = centres(edge, d, heat)
    wanted = (-(place[None, None] - truth[:, :, None]).square().sum(-1) / (2 * width**2)).softmax(2)
    entropy = (-(wanted * heat).sum(2) * (truth.abs() < 1).all(-1)).mean(1)
    away = (points - truth).square().sum(-1).clamp_min(1e-8).sqrt()
    likely = (away * (-deviation).exp() * (d - 1) + d * deviation).mean(1)
    return ((entropy + _LIKELY * likely) * weight).sum() / weight.sum().clamp_min(1.0)


class Localising(nn.Module):
    """A net as it is trained: maps, and with keypoints also the points and heat maps of both canvases."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, fixed: Tensor, moving: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor] | None]:
        if not isinstance(self.net, KeypointNet):
            return self.net(fixed, moving), None
        detector: Detector = self.net.detector
        points, deviation, heat = detector.maps_too(torch.cat([fixed, moving]))
        (p, q), (a, b) = points.chunk(2), deviation.chunk(2)
        return fitted(self.net.model, p, q, 1 / ((2 * a).exp() + (2 * b).exp())), (points, deviation, heat)


@dataclass(frozen=True)
class Loss:
    """(net, batch) → terms by name, of which `loss` is made small. The weights are those of `TrainSettings`."""

    similarity: str
    known: float
    similar: float
    regular: float
    labels: float

    def __call__(self, net: nn.Module, batch: Batch) -> dict[str, Tensor]:
        maps, found = net(batch["fixed_seen"], batch["moving_seen"])
        terms: dict[str, Tensor] = {}
        total = maps.new_zeros(())
        if found is not None and "has_points" in batch and self.known:
            points, deviation, heat = found
            truth, has = torch.cat([batch["fixed_points"], batch["moving_points"]]), batch["has_points"].repeat(2)
            terms["points"] = point_loss(heat, points, deviation, truth, has)
            total = total + self.known * terms["points"]
        if self.known:
            terms["known"] = _weighted(displacement(maps, batch["known"]).square(), batch["is_known"])
            total = total + 10 * self.known * terms["known"]
        if self.similar:
            terms["similar"] = self._dissimilar(maps, batch)
            total = total + self.similar * terms["similar"]
        if self.labels and "fixed_labels" in batch:
            terms["labels"] = self._undice(maps, batch)
            total = total + self.labels * terms["labels"]
        if self.regular:
            terms["regular"] = stretches(maps).square().sum(1).mean()
            total = total + self.regular * terms["regular"]
        return {"loss": total.float(), **{key: value.detach().float() for key, value in terms.items()}}

    def _dissimilar(self, maps: Tensor, batch: Batch) -> Tensor:
        """The similarity where both scans are seen, and what the moved one leaves uncovered of the fixed one."""
        fixed = batch["fixed"]
        both = torch.cat([batch["moving"], torch.ones_like(batch["moving"])], 1)
        moved, seen = moved_by(maps, both, fixed.shape[2:]).split(1, 1)
        shown = (fixed > 0.02).float()
        uncovered = (shown * (1 - seen)).flatten(1).sum(1) / shown.flatten(1).sum(1).clamp_min(1.0)
        apart = similarity(self.similarity).loss(moved, fixed, (seen.detach() > 0.5).float())
        return (apart + _OVERLAP * uncovered).mean()

    def _undice(self, maps: Tensor, batch: Batch) -> Tensor:
        moved, fixed = moved_by(maps, batch["moving_labels"], batch["fixed"].shape[2:]).flatten(2), batch["fixed_labels"].flatten(2)
        both = 2 * (moved * fixed).sum(2) / (moved.sum(2) + fixed.sum(2)).clamp_min(1e-3)
        drawn = fixed.sum(2) > 0
        return 1 - (both * drawn).sum() / drawn.sum().clamp_min(1)


def _weighted(values: Tensor, weight: Tensor) -> Tensor:
    return (values * weight).sum() / weight.sum().clamp_min(1.0)


def moved_by(maps: Tensor, canvas: Tensor, shape: torch.Size) -> Tensor:
    """Canvases (N, C, *S) pulled through maps (N, D+1, D+1) in half edges."""
    d, edge = len(shape), shape[0]
    units = torch.eye(d + 1, dtype=maps.dtype, device=maps.device)
    units[:d, :d] *= 2 / edge
    units[:d, d] = 1 / edge - 1
    return resample(canvas, IndexMap(torch.linalg.inv(units) @ maps @ units), shape, How("linear", "zeros", False))


def displacement(maps: Tensor, truth: Tensor) -> Tensor:
    """(N,): the root mean square distance in half edges between what two maps (N, D+1, D+1) make of a ball half as wide as the canvas:
    in closed form, for a map's error is linear in the points."""
    d = maps.shape[-1] - 1
    error = (maps - truth)[:, :d]
    inner = 0.5**2 / (d + 2)  # mean square of a coordinate in a ball of radius 1/2
    return (error[:, :, :d].square().sum((1, 2)) * inner + error[:, :, d].square().sum(1)).clamp_min(1e-12).sqrt()


def stretches(maps: Tensor) -> Tensor:
    """(N, D²): a matrix whose squares add up to those of tanh(log s) for the singular values s of the maps' linear part: near the
    identity of their logarithms, and growing for all others. From a matrix, for equal singular values have no gradient."""
    d = maps.shape[-1] - 1
    gram = maps[:, :d, :d].mT @ maps[:, :d, :d]
    eye = torch.eye(d, dtype=maps.dtype, device=maps.device)
    return torch.linalg.solve(gram + eye, gram - eye).flatten(1)

