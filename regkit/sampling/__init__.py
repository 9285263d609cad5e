"""The sampler: values of an image at points, an image carried onto another grid, batches of images under index maps."""

from regkit.sampling.kernels import KERNELS, PADDINGS, inside, prepare, reflect, sample
from regkit.sampling.resample import How, IndexMap, resample
from regkit.sampling.warp import ANTIALIAS, index_map, shrinkage, warp

__all__ = ["ANTIALIAS", "KERNELS", "PADDINGS", "How", "IndexMap", "index_map", "inside", "prepare", "reflect", "resample", "sample",
           "shrinkage", "warp"]
