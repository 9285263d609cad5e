"""Where things are: grids, frames, transform models and transforms. World is RAS+ millimetres; a transform maps
fixed-world points to moving-world points."""

from regkit.space.grid import Frame, Grid
from regkit.space.models import MODEL_NAMES, MODELS, Model, model
from regkit.space.spline import Spline, SplineModel
from regkit.space.transform import Composite, Matrix, Transform

__all__ = ["MODELS", "MODEL_NAMES", "Composite", "Frame", "Grid", "Matrix", "Model", "Spline", "SplineModel", "Transform", "model"]
