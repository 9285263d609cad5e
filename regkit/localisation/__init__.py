"""Who says where to go: free parameters and nets that give θ (N, P), 0 being the identity, and nets that give whole maps."""

from regkit.localisation.convnet import localiser
from regkit.localisation.free import FreeParameters
from regkit.localisation.keypoints import Detector, KeypointNet
from regkit.localisation.regression import RegressionNet

NETS = {net.kind: net for net in (KeypointNet, RegressionNet)}
"""Nets (fixed, moving) → map, by name."""

__all__ = ["NETS", "Detector", "FreeParameters", "KeypointNet", "RegressionNet", "localiser"]
