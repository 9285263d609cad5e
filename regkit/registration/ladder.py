"""What is tried where a registration failed: other starts, another measure, a wider search. The best is kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from regkit.registration.attempt import Attempt, Ground, attempt
from regkit.registration.settings import Settings
from regkit.registration.verdict import FAIL

SHY = "all shifts of many rotations were looked at"  # the note of a walk that has searched widely by itself


def climb(ground: Ground, settings: Settings, tell: Callable[[str, float], None]) -> tuple[Attempt, list[dict[str, Any]]]:
    """The first attempt; after one that fails, without `settings.no_retry`, others until one does not, and of all of them the one that is
    most probably right. → it, and what was tried, for the record: empty if the first one did."""
    first = best = attempt(ground, settings, tell)
    if first.verdict.status != FAIL or settings.no_retry:
        return first, []
    tried = [_told(first, "as asked")]
    for what, other, wide in rungs(first):
        tell(f"again: {what}", 0.2)
        one = attempt(ground, other, tell, wide)
        tried.append(_told(one, what))
        if one.verdict.probability > best.verdict.probability:
            best = one
        if best.verdict.status != FAIL:
            break
    if len(tried) == 1:
        if first.levels:
            first.outcome.notes.append("the result failed; what is tried after a failure had been tried before it: every start, and all "
                                       "shifts of many rotations")
        return first, tried if first.levels else []
    kept = "kept what came first" if best is first else f"kept what came of {tried[-1]['what']}" if best is one else "kept the best of them"
    best.outcome.notes.append(f"the first result failed (probability {first.verdict.probability:.2f}); tried again with "
                              f"{', '.join(one['what'] for one in tried[1:])}; {kept} (probability {best.verdict.probability:.2f})")
    return best, tried


def rungs(first: Attempt) -> Iterator[tuple[str, Settings, bool]]:
    """What to try after an attempt that failed, the likeliest first: in words, the settings, and whether to search widely.

    The model and the levels stay as they were asked for, and so the kind of the result."""
    settings = first.settings
    anywhere = replace(settings, start="auto")
    if not first.levels:
        return  # what a start comes to by itself was asked for
    if settings.start != "auto":
        yield "start auto", anywhere, False
    if settings.similarity != "auto":
        yield "similarity auto", replace(anywhere, similarity="auto"), False
    if settings.start == "auto" and settings.similarity == "auto" and any(SHY in note for note in first.outcome.notes):
        return  # it has looked everywhere by itself
    yield "a wider search", replace(anywhere, similarity="mind", seed=settings.seed + 1), True


def _told(one: Attempt, what: str) -> dict[str, Any]:
    return {"what": what, "start": one.settings.start, "similarity": one.outcome.similarity, "status": one.verdict.status,
            "probability": one.verdict.probability, "seconds": round(sum(one.outcome.seconds.values()), 3)}
