"""How well pairs are aligned: overlap, surface distances, landmarks, regularity; cohorts and their statistics.

The measures take arrays or tensors and know nothing of files: `dice`, `jaccard`, `surfaces`, `hd95`, `tre`, `regularity`.
"""

from __future__ import annotations

from regkit.evaluation.cases import Case, read_cases
from regkit.evaluation.evaluate import evaluate, load
from regkit.evaluation.landmarks import relative, summary, tre
from regkit.evaluation.overlap import dice, jaccard
from regkit.evaluation.regularity import inconsistency, regularity
from regkit.evaluation.result import Evaluation
from regkit.evaluation.surface import Surface, hd95, surfaces

__all__ = [
    "Case", "Evaluation", "Surface", "dice", "evaluate", "hd95", "inconsistency", "jaccard", "load", "read_cases", "regularity",
    "relative", "summary", "surfaces", "tre",
]
