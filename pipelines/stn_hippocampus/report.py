"""What the jobs come to: tables, the curve, a picture of some cases."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import scans as sc
import torch
from nets import Net
from train import full, shown_in

from regkit.evaluation.overlap import dice

RESAMPLED = 4000
LOOKS = {"plain": ("without a spatial transformer", "#0072B2", "o", "-"), "keypoints": ("with a spatial transformer", "#D55E00", "s", "-")}
Record = dict[str, Any]
Scores = dict[int, dict[int, float]]  # person → seed → Dice


def _scan(dice: list[list[float | None]]) -> float:
    return float(np.mean([part for pose in dice for part in pose if part is not None]))


def mean_dice(record: Record) -> float:
    return float(np.mean([_scan(scan["dice"]) for scan in record["scans"].values()]))


def select(records: list[Record], study: str, way: str, degrees: int) -> list[Record]:
    return [r for r in records if (r["job"]["study"], r["way"], r["job"]["degrees"]) == (study, way, degrees)]


def by_person(records: list[Record]) -> Scores:
    """Dice of each person and seed, the mean of both parts, of all poses and scans."""
    found: dict[int, dict[int, list[float]]] = {}
    for record in records:
        for scan in record["scans"].values():
            found.setdefault(scan["person"], {}).setdefault(record["job"]["seed"], []).append(_scan(scan["dice"]))
    return {person: {seed: float(np.mean(values)) for seed, values in seeds.items()} for person, seeds in found.items()}


def minus(scores: Scores, base: Scores) -> Scores:
    """Differences of those persons and seeds that both have."""
    return {p: {s: v - base[p][s] for s, v in seeds.items() if s in base[p]} for p, seeds in scores.items() if p in base}


def mean(scores: Scores) -> float:
    return float(np.mean([np.mean(list(seeds.values())) for seeds in scores.values()]))


def interval(scores: Scores, dealt: list[list[int]]) -> tuple[float, float]:
    """95 % bootstrap interval of the mean over people and seeds. People of one fold share their nets, so they share the seeds drawn."""
    draw, people = np.random.default_rng(0), sorted(scores)
    home = np.array([next(k for k, fold in enumerate(dealt) if p in fold) for p in people])
    seeds = sorted(next(iter(scores.values())))
    values = np.array([[scores[p][s] for s in seeds] for p in people])
    means = []
    for _ in range(RESAMPLED):
        drawn = draw.integers(0, len(seeds), (len(dealt), len(seeds)))
        who = draw.integers(0, len(people), len(people))
        means.append(values[who[:, None], drawn[home[who]]].mean())
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def _signed(value: float) -> str:
    return f"{value:+.3f}".replace("-", "−")


def _range(degrees: int) -> str:
    return f"±{degrees}°" if degrees else "0°"


def _row(name: str, own: list[Record], base: list[Record], dealt: list[list[int]]) -> str:
    """A line: Dice, and what it is above the base, person by person."""
    scores = by_person(own)
    left = np.concatenate([r["degrees_left"] for r in own])
    cells = [name, f"{mean(scores):.3f}"]
    if own is base:
        cells += ["", ""]
    else:
        gain = minus(scores, by_person(base))
        low, high = interval(gain, dealt)
        better = sum(np.mean(list(seeds.values())) > 0 for seeds in gain.values())
        cells += [f"{_signed(mean(gain))} [{_signed(low)}, {_signed(high)}]", f"{better} of {len(gain)}"]
    cells += [f"{np.median(left):.0f}°", f"{np.mean([r['seconds'] for r in own]):.0f}", f"{own[0]['parameters']:,}".replace(",", " ")]
    return "| " + " | ".join(cells) + " |"


def _table(title: str, blocks: list[tuple[str, list[tuple[str, list[Record]]]]], base: str, dealt: list[list[int]]) -> list[str]:
    """blocks: (what stands before the names, [(way, its records)])."""
    lines = [f"## {title}", f"| | Dice | above *{base}* | people better | turn left | seconds | parameters |", "|---" * 7 + "|"]
    for prefix, ways in blocks:
        first = dict(ways).get(base, [])
        lines += [_row(f"{prefix}{way}", own, first, dealt) for way, own in ways if own and first]
    return [*lines, ""]


def tables(records: list[Record], dealt: list[list[int]]) -> str:
    """Markdown: the main study, the other ways, the checks; as far as there are records."""
    degrees = sorted({r["job"]["degrees"] for r in records})
    has = {r["job"]["study"] for r in records}
    tested = {scan["person"] for r in records for scan in r["scans"].values()}
    lines = ["# The hippocampus' parts in turned scans", "",
             f"Mean Dice of both parts on {len(tested)} people who were not trained on; 95 % intervals over people and seeds. *Turn left*: "
             "median angle between the poses in which the segmenter sees the tests and their mean. Seconds are processor time a training.",
             ""]
    if "main" in has:
        blocks = [(f"{_range(d)} ", [(way, select(records, "main", way, d)) for way in ("plain", "keypoints")]) for d in degrees]
        lines += _table("Pose range", blocks, "plain", dealt)
    if {"main", "ways"} <= has:
        ways = list(dict.fromkeys(r["way"] for r in records if r["job"]["study"] == "ways"))
        blocks = []
        for d in degrees:
            first = [r for way in ("plain", "keypoints") for r in select(records, "main", way, d) if r["job"]["seed"] == 0]
            both = [(way, [r for r in first if r["way"] == way]) for way in ("plain", "keypoints")]
            if any(select(records, "ways", way, d) for way in ways):
                blocks.append((f"{_range(d)} ", [*both, *((way, select(records, "ways", way, d)) for way in ways)]))
        lines += _table("Other ways, seed 0", blocks, "plain", dealt)
    titles = {"longer": "twice the steps, ", "ball": "seen through a ball, "}
    blocks = [(f"{_range(d)}, {titles[study]}", [(way, select(records, study, way, d)) for way in ("plain", "keypoints")])
              for study in titles for d in degrees if select(records, study, "plain", d)]
    return "\n".join([*lines, *(_table("Checks, seed 0", blocks, "plain", dealt) if blocks else [])])


def _plain(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#dddddd", linewidth=0.8)
    axes.set_axisbelow(True)


def curve(records: list[Record], dealt: list[list[int]], file: Path) -> None:
    """Dice against the pose range, and the paired difference."""
    degrees = sorted({r["job"]["degrees"] for r in records if r["job"]["study"] == "main"})
    if not degrees:
        return
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
    scores = {way: [by_person(select(records, "main", way, d)) for d in degrees] for way in LOOKS}
    for (way, (label, colour, marker, line)), aside in zip(LOOKS.items(), (-1.2, 1.2), strict=True):
        middle = np.array([mean(s) for s in scores[way]])
        ends = np.abs(np.array([interval(s, dealt) for s in scores[way]]).T - middle)
        left.errorbar(np.array(degrees) + aside, middle, ends, color=colour, marker=marker, linestyle=line, capsize=3, label=label)
    left.set_ylabel("Dice of held-out people")
    left.legend(frameon=False, loc="lower left")
    gains = [minus(own, base) for own, base in zip(scores["keypoints"], scores["plain"], strict=True)]
    middle = np.array([mean(gain) for gain in gains])
    for degree, gain in zip(degrees, gains, strict=True):
        each = [np.mean(list(seeds.values())) for seeds in gain.values()]
        name = "one person" if degree == degrees[0] else None
        right.plot([degree] * len(each), each, "o", color="#999999", markersize=4, alpha=0.7, label=name)
    ends = np.abs(np.array([interval(gain, dealt) for gain in gains]).T - middle)
    right.errorbar(np.array(degrees) + 2.5, middle, ends, color="black", marker="D", capsize=3, linestyle="none", label="mean, 95 %")
    right.axhline(0, color="black", linewidth=0.8)
    right.set_ylabel("Dice with minus without")
    right.legend(frameon=False, loc="upper left")
    for axes in (left, right):
        axes.set_xticks(degrees, [_range(d) for d in degrees])
        axes.set_xlabel("Pose range")
        _plain(axes)
    figure.savefig(file, dpi=150)
    plt.close(figure)


def montage(scans: sc.Scans, people: list[int], nets: dict[str, Net], degrees: int, voxels: int, file: Path) -> None:
    """The first scan of each person of a fold in its first test pose, not chosen: as it came, turned, as the segmenter sees it, and
    what both nets say, as outlines."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    grid, which = sc.cube(voxels), [scans.of([one])[0] for one in people]
    titles = ("Crop as it came", "Turned, with its labels", "As the transformer shows\nit to the segmenter", "Found without", "Found with")
    size = (2.3 * len(titles), 2.35 * len(which) + 0.3)
    figure, rows = plt.subplots(len(which), len(titles), figsize=size, layout="constrained", squeeze=False)
    for axes, title in zip(rows[0], titles, strict=True):
        axes.set_title(title, fontsize=9)
    for row, index in zip(rows, which, strict=True):
        upright, _ = sc.turned(scans, torch.tensor([index]), sc.regkit.Matrix.identity(3), grid)
        scan, labels = sc.turned(scans, torch.tensor([index]), sc.regkit.Matrix(shown_in(index, degrees, 1).matrix), grid)
        with torch.no_grad():
            said = {name: net.eval()(scan, grid) for name, net in nets.items()}
            layer, transform = nets["keypoints"].layer, said["keypoints"][1]
            assert layer is not None and transform is not None
            shown = layer.resample(scan, transform, grid, grid)
        found = {name: full(logits).argmax(1) for name, (logits, _) in said.items()}
        cut = int((labels[0] > 0).sum((0, 1)).argmax())  # the plane with most of the hippocampus
        middle = voxels // 2
        panels = [(upright[0, 0, middle], None), (scan[0, 0, :, :, cut], labels[0, :, :, cut]), (shown[0, 0, :, :, middle], None),
                  *((scan[0, 0, :, :, cut], found[name][0, :, :, cut]) for name in ("plain", "keypoints"))]
        for axes, (image, outline) in zip(row, panels, strict=True):
            axes.imshow(image.T.numpy(), origin="lower", cmap="gray", vmin=-2.5, vmax=2.5)
            for part, colour in ((1, "#E69F00"), (2, "#56B4E9")):
                if outline is not None and bool((outline == part).any()):
                    axes.contour((outline == part).T.float().numpy(), [0.5], colors=colour, linewidths=1.6)
            axes.set_xticks([])
            axes.set_yticks([])
        for axes, name in zip(row[3:], ("plain", "keypoints"), strict=True):
            axes.set_xlabel(f"Dice {np.mean(list(dice(labels[0], found[name][0]).values())):.2f}", fontsize=9)
    lines = [plt.Line2D([], [], color=colour) for colour in ("#E69F00", "#56B4E9")]
    figure.legend(lines, sc.PARTS, loc="outside lower center", ncols=2, frameon=False)
    figure.savefig(file, dpi=130)
    plt.close(figure)
