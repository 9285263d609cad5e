"""The verdict on a finished map: whether it is right, how surely, and by how many mm it is probably off.

Two small linear models over the evidence, fitted to some thousand registrations whose truth is known, with signs that may not
contradict what the evidence means. Both, and where they come from, lie in `regkit/weights/verdict.json` with a card beside it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

PASS, WARN, FAIL = "PASS", "WARN", "FAIL"
MODEL = Path(__file__).parent.parent / "weights" / "verdict.json"
MIRRORED = 0.05  # of the MIND score: by so much must the mirror image fit better
REASONS, SPEAKS = 3, 0.5  # reasons given at most, and how much (log odds) one must speak to be given


@dataclass(frozen=True)
class Verdict:
    """What is to be thought of a registration.

    status: PASS, WARN (look at the picture) or FAIL (not to be used). probability: of the map being right, in [0, 1]. expected_tre_mm:
    the mean distance in mm at which corresponding points of both scans probably lie, differences between people included; likely_tre_mm:
    between what it lies in nine of ten cases; None where the status is FAIL, as they are of right maps. reasons: sentences.
    """

    status: str
    probability: float
    expected_tre_mm: float | None
    likely_tre_mm: tuple[float, float] | None
    reasons: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "likely_tre_mm": None if self.likely_tre_mm is None else list(self.likely_tre_mm),
                "reasons": list(self.reasons)}

    @staticmethod
    def of(record: Mapping[str, Any]) -> Verdict:
        """From `as_dict`."""
        likely = record["likely_tre_mm"] and tuple(record["likely_tre_mm"])
        return Verdict(record["status"], record["probability"], record["expected_tre_mm"], likely, tuple(record["reasons"]))

    def __str__(self) -> str:
        error = "" if self.expected_tre_mm is None else f"; expected error {plain(self.expected_tre_mm)} mm"
        return f"{self.status} (right with a probability of {self.probability:.2f}{error})"


@dataclass(frozen=True)
class Clue:
    """One number that the models look at: how it is made of the evidence, the sign with which it speaks for a map, and what is said
    where it speaks against one."""

    of: Callable[[Mapping[str, float]], float]
    sign: int
    says: Callable[[Mapping[str, float]], str]


def _log(name: str, least: float) -> Callable[[Mapping[str, float]], float]:
    return lambda e: math.log(max(e[name], least))


def plain(value: float) -> str:
    """Two figures, and no exponent: 140, not 1.4e+02."""
    return f"{float(f'{value:.2g}'):g}"


def _mm(e: Mapping[str, float], name: str) -> str:
    return f"{plain(e[name] * e['half_edge_mm'])} mm"


_TURNED = "turned far away, the scans agree in structure {} (MIND {:.2f}, here {:.2f})"


def _null(e: Mapping[str, float]) -> str:
    here = _here(e)
    return _TURNED.format("better" if e["null_mind"] < 0 else "hardly less", here - e["null_mind"], here)


CLUES = {
    "null_mind": Clue(lambda e: e["null_mind"], 1, _null),
    "null_mind_z": Clue(lambda e: math.log1p(max(e["null_mind_z"], 0.0)), 1,
                        lambda e: f"the pose stands out little among others ({e['null_mind_z']:.1f} standard deviations)"),
    "null_cr": Clue(lambda e: e["null_cr"], 1, lambda e: "intensities explain each other as well at other poses"),
    "mind": Clue(lambda e: e["mind"], 1, lambda e: f"the structure of the scans agrees little (MIND {e['mind']:.2f})"),
    "ngf": Clue(lambda e: e["ngf"], 1, lambda e: f"the edges of the scans agree little (NGF {e['ngf']:.2f})"),
    "share": Clue(lambda e: min(e["mind_share"], e["ngf_share"]), 1,
                  lambda e: f"only {100 * min(e['mind_share'], e['ngf_share']):.0f} % of the structure lies in both scans"),
    "blocks_matched": Clue(lambda e: e["blocks_matched"], 1,
                           lambda e: f"only {100 * e['blocks_matched']:.0f} % of small blocks are found in the other scan"),
    "blocks_near": Clue(lambda e: e["blocks_near"], 1,
                        lambda e: f"of the blocks that are found, only {100 * e['blocks_near']:.0f} % lie where the map puts them"),
    "blocks_median": Clue(lambda e: e["blocks_median"], -1,
                          lambda e: f"small blocks fit best {plain(e['blocks_median'] * e['mm'])} mm beside where the map puts them"),
    "blocks_alike": Clue(lambda e: e["blocks_alike"], 1,
                         lambda e: f"small blocks look little alike where they fit best (correlation {e['blocks_alike']:.2f})"),
    "return": Clue(_log("return", 0.003), -1,
                   lambda e: f"refined anew from close by, it ends {_mm(e, 'return')} from this map, and not at it"),
    "ways": Clue(_log("ways", 0.001), -1, lambda e: f"from fixed to moving and back, refinement disagrees by {_mm(e, 'ways')}"),
    "stay": Clue(lambda e: math.log(max(e["stay_mind"], e["stay_ngf"], 0.002)), -1,
                 lambda e: f"other measures would move the map by {plain(max(e['stay_mind'], e['stay_ngf']) * e['half_edge_mm'])} mm"),
    "scale": Clue(lambda e: abs(math.log(e["scale"])), -1, lambda e: f"the map scales by {e['scale']:.2f}"),
    "shear": Clue(lambda e: math.log(e["shear"]), -1,
                  lambda e: f"the map stretches one direction {e['shear']:.2f} times as much as another"),
}


@cache
def _model() -> dict[str, Any]:
    return json.loads(MODEL.read_text(encoding="utf-8"))


def clues(evidence: Mapping[str, float]) -> dict[str, float]:
    """The numbers that the models look at."""
    return {name: clue.of(evidence) for name, clue in CLUES.items()}


def _terms(part: Mapping[str, Any], values: Mapping[str, float]) -> dict[str, float]:
    """What each clue adds: its weight times its distance from the middle of those seen, held within them."""
    return {name: t["weight"] * ((min(max(values[name], t["low"]), t["high"]) - t["centre"]) / t["spread"])
            for name, t in part["terms"].items()}


def judge(evidence: Mapping[str, float], findings: list[str], hopeless: bool) -> Verdict:
    """The verdict from the evidence, and from what the guard found by its fixed rules."""
    model, values = _model(), clues(evidence)
    terms = _terms(model["success"], values)
    probability = 1 / (1 + math.exp(-sum(terms.values()) - model["success"]["bias"]))
    error, spread = model["error"], model["error"]["spread"]
    log = sum(_terms(error, values).values()) + error["bias"] + math.log(2 * evidence["half_edge_mm"])
    typical = model["success"]["typical"]
    against = sorted((terms[name] - typical[name], name) for name in terms)
    reasons = [CLUES[name].says(evidence) for gap, name in against[:REASONS] if gap < -SPEAKS]
    mirrored = evidence["mirror"] > MIRRORED
    if mirrored:
        reasons.insert(0, f"mirrored left to right the scans would agree better (MIND by {evidence['mirror']:.2f}): is one of them stored "
                       "mirrored? regkit doctor MOVING --fixed FIXED tells more")
    if hopeless:
        probability = min(probability, model["fail"] / 2)
    status = FAIL if probability < model["fail"] else WARN if probability < model["pass"] or findings or mirrored else PASS
    if status == PASS:
        reasons = [f"small blocks of both scans, structure and edges agree on this pose, and no other of those tried comes near "
                   f"(MIND score {_here(evidence):.2f}, elsewhere {_here(evidence) - evidence['null_mind']:.2f} at most)"]
    low, middle, high = (float(f"{math.exp(log + sign * spread):.3g}") for sign in (-1, 0, 1))
    told = (None, None) if status == FAIL else (middle, (low, high))
    return Verdict(status, round(probability, 4), *told, tuple([*findings, *reasons]))


def _here(e: Mapping[str, float]) -> float:
    return e["mind"] * e["mind_share"] ** 0.5
