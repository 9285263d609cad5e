"""What a training leaves to look at: curves, a film of the moved scan settling onto the fixed one, and a card."""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image as Picture
from torch import Tensor

from regkit.io.output import output_file
from regkit.training.fit import Row
from regkit.training.validate import ANGLES

_FRAME = 240  # pixels a frame's panel is high
_MILLISECONDS = 250


def write_log(path: Path, rows: Sequence[Row]) -> None:
    """All rows as a table; what a row lacks stays empty."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with output_file(path, overwrite=True) as aside, aside.open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, columns)
        table.writeheader()
        table.writerows(rows)


def board(folder: Path) -> Callable[[Row], None]:
    """What writes rows for TensorBoard into a folder; does nothing where it is missing."""
    try:
        from torch.utils.tensorboard.writer import SummaryWriter
    except ImportError:
        return lambda row: None
    writer = SummaryWriter(str(folder), flush_secs=20)

    def write(row: Row) -> None:
        for key, value in row.items():
            if key != "step":
                writer.add_scalar(key, value, int(row["step"]))
        writer.flush()  # the command line ends at once, and leaves no time to

    return write


def curves(path: Path, rows: Sequence[Row]) -> bool:
    """The loss and what validation found, against the steps; False where matplotlib is missing."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        return False
    shown = [("loss", "training loss"), ("tre_mm", "known poses: TRE, mm"), ("turn", "known poses: rotation, degrees"),
             ("alike", "different scans: similarity loss"), ("dice", "different scans: Dice")]
    shown = [(key, title) for key, title in shown if any(key in row for row in rows)]
    figure, panels = pyplot.subplots(1, len(shown), figsize=(3.2 * len(shown), 2.8), constrained_layout=True, squeeze=False)
    for axes, (key, title) in zip(panels[0], shown, strict=True):
        points = [(row["step"], row[key]) for row in rows if key in row]
        axes.plot(*zip(*points, strict=True), linewidth=1.2)
        axes.set_title(title, fontsize=9)
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    with output_file(path, overwrite=True) as aside, aside.open("wb") as file:
        figure.savefig(file, format="png", dpi=110)
    pyplot.close(figure)
    return True


def frame(fixed: Tensor, moved: Tensor) -> np.ndarray:
    """The middle slices of two canvases (1, 1, *S), the fixed one in green and the moved one in magenta: where they agree, grey.
    → (H, W, 3) uint8"""
    def planes(canvas: Tensor) -> np.ndarray:
        data = canvas[0, 0].float().clamp(0, 1).cpu().numpy()
        n = data.shape[0] // 2
        cut = [data] if data.ndim == 2 else [data[n], data[:, n], data[:, :, n]]
        return np.concatenate([np.rot90(one) for one in cut], 1)

    a, b = planes(fixed), planes(moved)
    return (np.stack([b, a, b], -1) * 255).astype(np.uint8)


def film(path: Path, frames: Sequence[np.ndarray]) -> None:
    """An animated GIF of frames (H, W, 3) of one size."""
    scale = max(1, _FRAME // frames[0].shape[0])
    pictures = [Picture.fromarray(np.kron(one, np.ones((scale, scale, 1), np.uint8))) for one in frames]
    with output_file(path, overwrite=True) as aside, aside.open("wb") as file:
        pictures[0].save(file, format="GIF", save_all=True, append_images=pictures[1:], loop=0,
                         duration=[_MILLISECONDS] * (len(pictures) - 1) + [8 * _MILLISECONDS])


def card(info: dict[str, Any], table: dict[str, dict[str, float]]) -> str:
    """The model card: only what was measured."""
    columns = list(dict.fromkeys(key for row in table.values() for key in row))
    names = {"tre_mm": "TRE, mm", "turn": "rotation, degrees", "captured": "below 20°", "alike": "similarity loss", "dice": "Dice",
             "seconds": "seconds a pair", **{f"captured_{a}": f"turned up to {a}°" for a in ANGLES}}
    lines = [f"# {info['name']}", "",
             f"A `{info['net']}` net of {info['parameters']:,} parameters for {info['ndim']}D scans, {info['model']} maps; canvas of "
             f"{info['edge']} voxels of {info['mm']:.3g} mm along each axis.", "",
             "## Training", "",
             f"{info['training']} scans of {info['people']} people, {info['held_out']} scans kept for validation by person; "
             f"{info['steps']} steps of {info['batch']} pairs, {info['hours']:.2g} hours in all on {info['device']}. Similarity "
             f"`{info['similarity']}`, turns up to {info['turn']:g}°, seed {info['seed']}.", "",
             "Scans: " + ", ".join(info["scans"][:40]) + (" …" if len(info["scans"]) > 40 else ""), "",
             "## Measured on the scans kept for validation" if info["held_out"] else
             "## Measured on the scans it learnt from, for none were kept for validation", "",
             f"{info['cases']} pairs on the net's own canvases, turned by 0° to {info['turn']:g}°; "
             f"{'all of them that scan twice' if info['held_out'] == 1 else 'half of them one scan twice'}, whose map is known: of these "
             "TRE and rotation (medians), and the share whose rotation is wrong by less than 20°, of all and by how far they were turned. "
             "Similarity and Dice of different scans are means.", "",
             "| | " + " | ".join(names.get(key, key) for key in columns) + " |", "|---|" + "---|" * len(columns)]
    for name, row in table.items():
        lines.append(f"| {name} | " + " | ".join(f"{row[key]:.3g}" if key in row else "" for key in columns) + " |")
    lines += ["", "## Limits", "",
              "Nothing is known of other anatomies, contrasts or fields of view than those of the scans above. A net's answer is a "
              "start: `regkit register --start net:FOLDER` refines it and looks at what comes of it.", ""]
    return "\n".join(lines)
