"""Who says θ: modules that give a transform model's parameters (N, P); 0 is the start, the identity."""

from regkit.localisation.convnet import localiser
from regkit.localisation.free import FreeParameters

__all__ = ["FreeParameters", "localiser"]
