"""What "aligned" means: one measure a file, all in one table. Tensors only; geometry stays outside."""

from __future__ import annotations

from regkit.errors import choose
from regkit.similarity import cr, edge, lncc, mi, mind, mse, ncc, ngf
from regkit.similarity.measure import Similarity

SIMILARITIES: dict[str, Similarity] = {
    "mse": Similarity("mse", mse.loss, mse.features, "difference", oriented=False),
    "ncc": Similarity("ncc", ncc.loss, ncc.features, "correlation", oriented=False),
    "lncc": Similarity("lncc", lncc.loss, lncc.features, "correlation", oriented=False),
    "cr": Similarity("cr", cr.loss, cr.features, "ratio", oriented=False),
    "mi": Similarity("mi", mi.loss, None, "none", oriented=False),
    "edge": Similarity("edge", edge.loss, edge.features, "correlation", oriented=False),
    "mind": Similarity("mind", mind.loss, mind.features, "correlation", oriented=True),
    "ngf": Similarity("ngf", ngf.loss, ngf.features, "correlation", oriented=True),
}


def similarity(name: str) -> Similarity:
    """The measure of this name; OptionError names the nearest one if there is none."""
    return SIMILARITIES[choose("similarity", name, SIMILARITIES)]
