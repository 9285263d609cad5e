"""The table and the moving picture of what run.py left: OUT/table.md and OUT/evolution.gif.

    python pipelines/stn_digits/report.py OUT [--evolution RTS-0]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from scipy.stats import t as student

# Jaderberg et al. 2015, Table 1 (left): test error in % on R, RTS, P, E, each the mean of three runs of 150,000 steps of 256 digits
PAPER = {
    "FCN": (2.1, 5.2, 3.1, 3.2), "CNN": (1.2, 0.8, 1.5, 1.4),
    "ST-FCN affine": (1.2, 0.8, 1.5, 2.7), "ST-FCN projective": (1.3, 0.9, 1.4, 2.6), "ST-FCN tps": (1.1, 0.8, 1.4, 2.4),
    "ST-CNN affine": (0.7, 0.5, 0.8, 1.2), "ST-CNN projective": (0.8, 0.6, 0.8, 1.3), "ST-CNN tps": (0.7, 0.5, 0.8, 1.1),
}
PUBLISHED = ("R", "RTS", "P", "E")
ORDER = (*PUBLISHED, "clutter")
PAIRS = (
    *((f"ST-{kind} {name}", kind) for kind in ("CNN", "FCN") for name in ("affine", "projective", "tps")),
    *((f"ST-{kind} {a}", f"ST-{kind} {b}") for kind in ("CNN", "FCN")
      for a, b in (("projective", "affine"), ("tps", "affine"), ("tps", "projective"))),
)
TILE, GAP, LINE = 108, 6, 18  # pixels of the moving picture
MARGIN = 14  # around the image, for quadrilaterals that reach out of it
COLOURS = 32
INK = (255, 176, 0)


def read(folder: Path) -> list[dict]:
    """What the finished jobs' errors.json hold."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*/errors.json"))]
    return sorted(found, key=lambda job: (ORDER.index(job["distortion"]), job["seed"]))


def interval(differences: list[float]) -> tuple[float, float] | None:
    """Mean and half width of the 95 % t interval; None of fewer than two."""
    n = len(differences)
    if n < 2:
        return None
    return float(np.mean(differences)), float(student.ppf(0.975, n - 1) * np.std(differences, ddof=1) / n**0.5)


def says(differences: list[float]) -> str:
    """A cell of paired differences."""
    found = interval(differences)
    if found is None:
        return f"{differences[0]:+.2f} (one seed)" if differences else "–"
    mean, half = found  # adding 0 takes the sign from a rounded -0
    return f"{round(mean, 2) + 0.0:+.2f} ± {half:.2f}" + (" not resolved" if abs(mean) <= half else "")


def table(jobs: list[dict]) -> str:
    names = [name for name in ORDER if any(job["distortion"] == name for job in jobs)]
    errors = {(job["distortion"], name): [other["nets"][name]["error"] for other in jobs
                                          if other["distortion"] == job["distortion"] and name in other["nets"]]
              for job in jobs for name in PAPER}
    heads = [f"{name}, {whose}" for name in names for whose in (("here", "paper") if name in PUBLISHED else ("here",))]
    lines = ["# Distorted digits", "", _method(jobs), "", "## Test error in %", "",
             "Mean over the seeds; beside it what Jaderberg et al. 2015 published.", "",
             f"| net | parameters | {' | '.join(heads)} |", "|---|---:|" + "---:|" * len(heads)]
    for net, paper in PAPER.items():
        size = [job["nets"][net]["parameters"] for job in jobs if net in job["nets"]]
        cells = [f"{min(size):,}" + (f" … {max(size):,}" if max(size) > min(size) else "") if size else "–"]
        for name in names:
            found = errors[name, net]
            cells.append(f"{np.mean(found):.2f}" if found else "–")
            if name in PUBLISHED:
                cells.append(f"{paper[PUBLISHED.index(name)]:.1f}")
        lines.append(f"| {net} | " + " | ".join(cells) + " |")
    lines += ["", "## Paired differences in percentage points", "",
              "First net minus second, seed by seed on the same batches and the same test digits: mean ± half width of the 95 % t interval "
              "over the seeds. Negative: the first errs less. Not resolved: the interval holds 0.", "",
              "| | " + " | ".join(names) + " |", "|---|" + "---:|" * len(names)]
    for first, second in PAIRS:
        cells = [says([job["nets"][first]["error"] - job["nets"][second]["error"] for job in jobs
                       if job["distortion"] == name and {first, second} <= set(job["nets"])]) for name in names]
        lines.append(f"| {first} − {second} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", *_curves(jobs, names)])


def _method(jobs: list[dict]) -> str:
    """What the numbers are of, in one sentence."""
    def all_of(key: str) -> str:
        return ", ".join(sorted({str(job[key]) for job in jobs}))
    tested = "digits held back from training" if any(job["held_back"] for job in jobs) else "test digits"
    return (f"Digits: {all_of('digits')}; {all_of('images')} {tested}, distorted once and alike for all nets and seeds. Training: "
            f"{all_of('steps')} steps of {all_of('batch')} digits (the paper: 150,000 of 256), seeds {all_of('seed')}.")


def _curves(jobs: list[dict], names: list[str]) -> list[str]:
    """How the errors fell: whether more steps would help."""
    lines = ["## Test error in % on the way", "", "Mean over the seeds, after so many steps.", ""]
    for name in names:
        mine = [job for job in jobs if job["distortion"] == name]
        steps = sorted(set.intersection(*({step for step, _ in job["curve"]} for job in mine)))
        if not steps:
            continue
        lines += [f"| {name} | " + " | ".join(f"{step}" for step in steps) + " |", "|---|" + "---:|" * len(steps)]
        for net in [net for net in PAPER if all(net in job["nets"] for job in mine)]:
            at = [np.mean([dict(map(tuple, job["curve"]))[step][net] for job in mine]) for step in steps]
            lines.append(f"| {net} | " + " | ".join(f"{value:.2f}" for value in at) + " |")
        lines.append("")
    return lines if len(lines) > 4 else []


def _enlarged(pixels: np.ndarray, side: int) -> Image.Image:
    return Image.fromarray(pixels).resize((side, side), Image.Resampling.BILINEAR).convert("RGB")


def _looked_at(image: np.ndarray, quad: np.ndarray) -> Image.Image:
    """An image with the quadrilateral a net looks at; a dot marks the corner that becomes the upper left one."""
    tile, size = Image.new("RGB", (TILE, TILE), (48, 48, 48)), TILE - 2 * MARGIN
    tile.paste(_enlarged(image, size), (MARGIN, MARGIN))
    # index → pixel of the tile: the centre of pixel i lies at (i + ½) of its width; x is the column
    xy = [(MARGIN + (column + 0.5) * size / image.shape[1], MARGIN + (row + 0.5) * size / image.shape[0]) for row, column in quad]
    draw = ImageDraw.Draw(tile)
    draw.line([*xy, xy[0]], fill=INK, width=2)
    draw.ellipse([xy[0][0] - 4, xy[0][1] - 4, xy[0][0] + 4, xy[0][1] + 4], fill=INK)
    return tile


def frames(path: Path) -> list[Image.Image]:
    """The digits above, below what is seen of them; one picture a step."""
    with np.load(path) as found:
        steps, corners, crops, images = (found[key] for key in ("steps", "corners", "crops", "images"))
    shown = []
    for step, quads, seen in zip(steps, corners, crops, strict=True):
        page = Image.new("RGB", (GAP + len(images) * (TILE + GAP), 2 * TILE + 3 * GAP + LINE), (24, 24, 24))
        for number, (image, quad, crop) in enumerate(zip(images, quads, seen, strict=True)):
            left = GAP + number * (TILE + GAP)
            page.paste(_looked_at(image, quad), (left, LINE + GAP))
            page.paste(_enlarged(crop, TILE), (left, LINE + 2 * GAP + TILE))
        ImageDraw.Draw(page).text((GAP, GAP), f"step {step}", fill=(255, 255, 255))
        shown.append(page.quantize(COLOURS, dither=Image.Dither.NONE))
    return shown


def gif(path: Path, output: Path) -> None:
    shown = frames(path)
    shown[0].save(output, save_all=True, append_images=shown[1:], duration=[250] * (len(shown) - 1) + [2500], loop=0, optimize=True)


def write(folder: Path, evolution: str | None = None) -> Path | None:
    """table.md and, where a job has watched its digits, evolution.gif. → the table; None as long as no job is finished"""
    jobs = read(folder)
    if not jobs:
        return None
    (folder / "table.md").write_text(table(jobs), encoding="utf-8")
    order = [evolution] if evolution else ["clutter-0", "RTS-0", *(f"{job['distortion']}-{job['seed']}" for job in jobs)]
    path = next((path for name in order if (path := folder / name / "evolution.npz").exists()), None)
    if path is not None:
        gif(path, folder / "evolution.gif")
    return folder / "table.md"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--evolution", help="the job whose digits are shown, e.g. RTS-0")
    given = parser.parse_args()
    print(write(given.output, given.evolution) or f"{given.output}: no finished job")
