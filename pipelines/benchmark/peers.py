"""One peer registers one pair; runs in the peer's own interpreter, which needs no regkit.

    python peers.py elastix|ants|sitk NDIM FIXED MOVING OUT THREADS     writes OUT/matrix.txt
    python peers.py greedy NDIM OPTIONS...                              the options of greedy's own program

ITK's tools think in LPS and each has its own parameters, so their maps are asked at a few points and fitted.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np


def fit(image: Any, size: Sequence[int], index_to_point: Callable, through: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """The RAS matrix of an affine map `through` (LPS points (P, D) → (P, D)), from a grid of points over the fixed image."""
    ndim = len(size)
    index = itertools.product(*[(0, (n - 1) // 2, n - 1) for n in size])
    there = np.array([index_to_point(image, [int(i) for i in at]) for at in index], float)
    here = through(there)
    given = np.c_[there, np.ones(len(there))]
    solution = np.linalg.lstsq(given, here, rcond=None)[0]
    if np.abs(given @ solution - here).max() > 0.05:  # some tools round the points they write
        raise SystemExit("the map is not affine")
    matrix = np.eye(ndim + 1)
    matrix[:ndim] = solution.T
    flip = np.diag([*[-1.0, -1.0, 1.0][:ndim], 1.0])
    return flip @ matrix @ flip


def elastix(ndim: int, fixed: str, moving: str, out: str, threads: int) -> np.ndarray:
    """elastix' own default parameter maps: translation, rigid, affine."""
    import itk

    itk.set_nthreads(threads)  # its argument number_of_threads crashes with several maps
    f, m = itk.imread(fixed, itk.F), itk.imread(moving, itk.F)
    parameters = itk.ParameterObject.New()
    for name in ("translation", "rigid", "affine"):
        parameters.AddParameterMap({**parameters.GetDefaultParameterMap(name), "RandomSeed": ["1"]})
    _, found = itk.elastix_registration_method(f, m, parameter_object=parameters, log_to_console=False)

    def through(points: np.ndarray) -> np.ndarray:
        path = Path(out, "points.txt")
        path.write_text(f"point\n{len(points)}\n" + "\n".join(" ".join(f"{v:.9g}" for v in p) for p in points) + "\n")
        itk.transformix_pointset(m, found, fixed_point_set_file_name=str(path), output_directory=out)
        lines = Path(out, "outputpoints.txt").read_text().splitlines()
        return np.array([[float(v) for v in line.split("OutputPoint = [")[1].split("]")[0].split()] for line in lines])

    size = [int(n) for n in itk.size(f)]
    return fit(f, size, lambda image, at: list(image.TransformIndexToPhysicalPoint(at)), through)


def ants(ndim: int, fixed: str, moving: str, out: str, threads: int) -> np.ndarray:
    """ANTs' type of transform "Affine", all else as it comes."""
    import ants
    import pandas

    f, m = ants.image_read(fixed), ants.image_read(moving)
    result = ants.registration(f, m, type_of_transform="Affine", outprefix=str(Path(out, "ants_")), random_seed=1)
    names = list("xyz"[:ndim])

    def through(points: np.ndarray) -> np.ndarray:
        table = pandas.DataFrame(points, columns=names)
        return ants.apply_transforms_to_points(ndim, table, result["fwdtransforms"])[names].to_numpy()

    return fit(f, f.shape, lambda image, at: ants.transform_index_to_physical_point(image, at), through)


def sitk(ndim: int, fixed: str, moving: str, out: str, threads: int) -> np.ndarray:
    """As in SimpleITK's examples: centres together, Mattes' mutual information, three levels, rigid and then affine."""
    import SimpleITK as sitk

    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(threads)
    f, m = (sitk.ReadImage(path, sitk.sitkFloat32) for path in (fixed, moving))

    def refine(start: Any) -> Any:
        method = sitk.ImageRegistrationMethod()
        method.SetMetricAsMattesMutualInformation(50)
        method.SetMetricSamplingStrategy(method.RANDOM)
        method.SetMetricSamplingPercentage(0.1 if ndim == 3 else 1.0, 1)  # a tenth of a picture is too few points when coarse
        method.SetInterpolator(sitk.sitkLinear)
        method.SetShrinkFactorsPerLevel([4, 2, 1])
        method.SetSmoothingSigmasPerLevel([2, 1, 0])
        method.SmoothingSigmasAreSpecifiedInPhysicalUnitsOn()
        method.SetOptimizerAsRegularStepGradientDescent(2.0, 1e-4, 200)
        method.SetOptimizerScalesFromPhysicalShift()
        method.SetInitialTransform(start, inPlace=True)
        method.Execute(f, m)
        return start

    kind = sitk.Euler3DTransform if ndim == 3 else sitk.Euler2DTransform
    rigid = refine(kind(sitk.CenteredTransformInitializer(f, m, kind(), sitk.CenteredTransformInitializerFilter.GEOMETRY)))
    affine = sitk.AffineTransform(ndim)
    affine.SetCenter(rigid.GetCenter())
    affine.SetMatrix(rigid.GetMatrix())
    affine.SetTranslation(rigid.GetTranslation())
    refine(affine)
    return fit(f, f.GetSize(), lambda image, at: image.TransformIndexToPhysicalPoint(at),
               lambda points: np.array([affine.TransformPoint(p.tolist()) for p in points]))


def greedy(ndim: int, options: list[str]) -> None:
    import picsl_greedy

    if any(" " in option for option in options):
        raise SystemExit("the package splits its options at blanks; use folders without any")

    kind = picsl_greedy.Greedy3D if ndim == 3 else picsl_greedy.Greedy2D
    kind().execute(" ".join(options))


def main() -> None:
    name, ndim, *rest = sys.argv[1:]
    if name == "greedy":
        greedy(int(ndim), rest)
        return
    fixed, moving, out, threads = rest
    matrix = {"elastix": elastix, "ants": ants, "sitk": sitk}[name](int(ndim), fixed, moving, out, int(threads))
    np.savetxt(Path(out, "matrix.txt"), matrix)


if __name__ == "__main__":
    main()
