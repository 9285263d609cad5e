"""Pages and snippets of HTML that hold all they need: one registration, a cohort's evaluation, a notebook's cell.

Everything that comes from users (names, reasons, paths) is escaped by the templates. Pictures are named once, in a style
sheet of their own, so that a scan that several methods were given is stored once, and a closed case costs no memory.
"""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image as Picture

from regkit.report.figures import figure, finite

if TYPE_CHECKING:
    from jinja2 import Environment

HERE = Path(__file__).parent
_PICTURE = re.compile(r"data:image/(?:webp|png);base64,[A-Za-z0-9+/=]+")


def pair_page(record: dict[str, Any], view: dict[str, Any], scores: dict[str, Any] | None = None) -> str:
    """The page of one registration. record: the content of a `registration.json`. view: what `views.view` gives. scores:
    numbers as a case of an evaluation has them (`dice`, `dice_before`, `tre_mm` …) and `labels`, a list of rows, if any."""
    pictures = _Pictures()
    return _render("pair.html.j2", pictures, view=pictures.named(view), fixed=_file(record, "fixed"), moving=_file(record, "moving"),
                   verdict=_verdict(record), findings=_reasons(record), numbers=_numbers(record, view, scores or {}),
                   labels=(scores or {}).get("labels"), words=_map_words(record), matrix=record.get("matrix") or [],
                   notes=record.get("notes") or [], details=_details(record), unlike=_unlike(record),
                   version=(record.get("versions") or {}).get("regkit", ""))


def cohort_page(evaluation: dict[str, Any], views: dict[str, dict[str, Any]]) -> str:
    """The page of an evaluation, the worst cases first and open. views: "method/id" → what `views.view` gives; a case
    without one is told without pictures. Any value of `evaluation` may be None, any list empty or absent."""
    from regkit.report import cohort

    pictures = _Pictures()
    cases = cohort.ordered(evaluation)
    for case in cases:
        case["view"] = pictures.named(views[case["key"]]) if views.get(case["key"]) else None
    measures = evaluation.get("measures") or {}
    return _render("cohort.html.j2", pictures, evaluation=evaluation, cases=cases, headline=cohort.headline(evaluation, cases),
                   summary=cohort.summary(evaluation), tests=evaluation.get("tests"), ranks=evaluation.get("ranks"),
                   success=evaluation.get("success"), methods=evaluation.get("methods") or [], charts=cohort.charts(evaluation, cases),
                   label_chart=cohort.label_chart(evaluation), point_chart=cohort.point_chart(evaluation),
                   capture=cohort.capture_chart(evaluation), name=lambda m: (measures.get(m) or {}).get("name", m),
                   unit=lambda m: (measures.get(m) or {}).get("unit") or "", better=lambda m: (measures.get(m) or {}).get("better"))


def fragment(record: dict[str, Any], view: dict[str, Any]) -> str:
    """A snippet for notebooks: the main numbers, and both scans on top of each other before and after. It needs no script
    and no style sheet, which notebooks' viewers take away."""
    rows = [(word, [_composed(plane["fixed"], plane[word]) for plane in view["planes"]]) for word in ("before", "after")
            if all(plane.get(word) for plane in view["planes"])]
    return _environment().get_template("fragment.html.j2").render(
        fixed=_file(record, "fixed"), moving=_file(record, "moving"), verdict=_verdict(record), rows=rows,
        findings=_reasons(record), numbers=_numbers(record, view, {}))


class _Pictures:
    """The pictures of a page, each once: data address → the class of the elements that show it."""

    def __init__(self) -> None:
        self.names: dict[str, str] = {}

    def named(self, view: Mapping[str, Any]) -> dict[str, Any]:
        """The view with class names in place of pictures."""
        return {**view, "planes": [{**plane, **{k: self._name(plane.get(k)) for k in ("fixed", "before", "after")},
                                    "contours": {k: self._name((plane.get("contours") or {}).get(k)) for k in ("fixed", "before", "after")}}
                                   for plane in view["planes"]]}

    def _name(self, address: Any) -> str | None:
        # an address goes into a style sheet as it is: nothing but a picture may
        if not isinstance(address, str) or not _PICTURE.fullmatch(address):
            return None
        return self.names.setdefault(address, f"i{len(self.names)}")

    def css(self) -> str:
        return "\n".join(f'.{name}{{--p:url("{address}")}}' for address, name in self.names.items())


@cache
def _environment() -> Environment:
    from jinja2 import Environment, FileSystemLoader
    from markupsafe import Markup

    made = Environment(loader=FileSystemLoader(HERE), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    made.filters |= {"figure": figure, "bare": lambda value, unit="": figure(value, unit).removesuffix(f" {unit}"), "percent": _percent,
                     "words": _words, "p": _probability}
    made.globals |= {"css": Markup((HERE / "page.css").read_text(encoding="utf-8")),
                     "js": Markup((HERE / "page.js").read_text(encoding="utf-8")), "arrows": _arrows}
    return made


def _render(template: str, pictures: _Pictures, **words: Any) -> str:
    from markupsafe import Markup

    return _environment().get_template(template).render(pictures=Markup(pictures.css()), **words)


def _words(value: Any, unit: str = "") -> str:
    """A number as `figure` writes it, or a word as it is."""
    return value if isinstance(value, str) else figure(value, unit)


def _percent(value: Any) -> str:
    numbers = finite([value])
    return f"{100 * numbers[0]:.0f} %" if numbers else "–"


def _probability(value: Any) -> str:
    numbers = finite([value])
    return "–" if not numbers else "< 0.001" if numbers[0] < 0.001 else f"{numbers[0]:.3f}"


def _arrows(arrows: list[list[float]], unit: float) -> Any:
    """Landmarks' arrows in picture pixels: dots at their starts, lines of true length, heads that never outgrow them.
    unit: pixels of the picture that are about one of the screen. All in three paths, as there may be hundreds on a page."""
    from markupsafe import Markup

    dots, lines = [], []
    for x1, y1, x2, y2 in arrows:
        dots.append(f"M{x1:g} {y1:g}h0")  # no length and round ends: a dot
        length = float(np.hypot(x2 - x1, y2 - y1))
        if length >= 0.5:
            head = min(6 * unit, 0.6 * length) / length
            ux, uy = (x2 - x1) * head, (y2 - y1) * head
            lines.append(f"M{x1:g} {y1:g}L{x2:g} {y2:g}m{-ux - uy / 2:.1f} {ux / 2 - uy:.1f}L{x2:g} {y2:g}"
                         f"l{uy / 2 - ux:.1f} {-uy - ux / 2:.1f}")
    return Markup(f'<path class="halo" d="{"".join(lines)}"/><path d="{"".join(lines)}"/><path class="dots" d="{"".join(dots)}"/>')


def _file(record: Mapping[str, Any], name: str) -> str:
    path = ((record.get("inputs") or {}).get(name) or {}).get("path")
    return re.split(r"[\\/]", str(path))[-1] if path else name


_WORDS = {"PASS": ("good", "No verdict sees everything: look at the pictures."),
          "WARN": ("doubt", "Look at the pictures before you use it."), "FAIL": ("bad", "It is not to be trusted.")}


def _verdict(record: Mapping[str, Any]) -> dict[str, str]:
    said = record.get("verdict") or {}
    if said.get("status") not in _WORDS:
        return {"kind": "doubt", "word": "No verdict.", "text": "None was recorded: look at the pictures."}
    kind, advice = _WORDS[said["status"]]
    text = f"The map is right with a probability of {_percent(said.get('probability'))}."
    between = finite(said.get("likely_tre_mm") or [])
    if kind != "bad" and len(between) == 2:
        low, high = (figure(value, "mm") for value in between)
        middle = figure(said.get("expected_tre_mm"), "mm")
        text += f" Corresponding points are probably {middle} apart ({low} to {high} in nine of ten cases)."
    return {"kind": kind, "word": f"{said['status']}.", "text": f"{text} {advice}"}


def _reasons(record: Mapping[str, Any]) -> list[str]:
    """Why the verdict is what it is, and what the header doctor finds doubtful or wrong about the files."""
    headers = [f"{name}: {one.get('what')}" for name, item in (record.get("inputs") or {}).items() for one in item.get("findings") or []
               if one.get("severity") != "note"]
    return [*((record.get("verdict") or {}).get("reasons") or []), *headers]


_SCORES = (("dice", "Dice", "", True), ("hd95_mm", "HD95", "mm", False), ("asd_mm", "Surface distance", "mm", False),
           ("tre_mm", "Landmark error", "mm", False))


def _numbers(record: Mapping[str, Any], view: Mapping[str, Any], scores: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The main numbers, before and after."""
    told = []
    for column, name, unit, high in _SCORES:
        if finite([scores.get(column)]):
            before = f"{column[:-3]}_before_mm" if column.endswith("_mm") else f"{column}_before"
            told.append(_change(name, scores.get(before), scores[column], unit, high))
    points = view.get("points")
    if points and not finite([scores.get("tre_mm")]) and points.get("after"):
        told.append(_change(f"Landmark error, mean of {points['n']}", points["before"]["mean"], points["after"]["mean"], view["unit"],
                            False))
    change = record.get("similarity") or {}
    told.append(_change("Agreement", change.get("before"), change.get("after"), "", True))
    chosen = record.get("chosen") or {}
    told += [{"name": name, "unit": "", "before": None, "after": value, "worse": False} for name, value in
             (("Model", record.get("model")), ("Similarity", chosen.get("similarity"))) if value]
    total = finite([(record.get("seconds") or {}).get("total")])
    return [*told, *({"name": "Time", "unit": "s", "before": None, "after": value, "worse": False} for value in total)]


def _change(name: str, before: Any, after: Any, unit: str, high: bool) -> dict[str, Any]:
    both = finite([before, after])
    worse = len(both) == 2 and (both[1] < both[0] if high else both[1] > both[0])
    return {"name": name, "unit": unit, "before": before, "after": after, "worse": worse}


def _unlike(record: Mapping[str, Any]) -> bool:
    """Whether a similarity was chosen that expects other intensities in the second scan."""
    return not {"mse", "ncc", "lncc"} & set(str((record.get("chosen") or {}).get("similarity")).split("+"))


def _map_words(record: Mapping[str, Any]) -> str:
    """The map in words: how far it turns and how it scales."""
    matrix = np.asarray(record.get("matrix") or np.eye(4), dtype=float)
    d = len(matrix) - 1
    left, scale, right = np.linalg.svd(matrix[:d, :d])
    turn = left @ right
    mirrored = np.linalg.det(turn) < 0
    cosine = (np.trace(turn) - 1) / 2 if d == 3 else turn[0, 0]
    angle = float(np.degrees(np.arccos(np.clip(cosine, -1, 1))))
    if np.abs(scale - 1).max() < 5e-4:
        sizes = "keeps sizes"
    elif np.ptp(scale) < 5e-4:
        sizes = f"scales by {scale.mean():.3f}"
    else:
        sizes = f"scales by {', '.join(f'{s:.3f}' for s in scale)} along its main axes"
    return f"From fixed to moving the map {'mirrors, ' if mirrored else ''}turns by {angle:.1f}° and {sizes}."


def _details(record: Mapping[str, Any]) -> list[tuple[str, list[tuple[str, str]]]]:
    """What it takes to do it again, as tables."""
    inputs = []
    for name, item in (record.get("inputs") or {}).items():
        size = "×".join(map(str, item.get("shape") or []))
        spacing = "×".join(f"{s:g}" for s in item.get("spacing_mm") or [])
        scan = [("", f"{size} voxels of {spacing} mm, {item.get('orientation')}")] if size else []  # else where to begin
        inputs += [(name, str(item.get("path"))), *scan, ("", f"SHA-256 {item.get('sha256')}")]
    guard = [(k, figure(v)) for k, v in (record.get("guard") or {}).items() if isinstance(v, (int, float)) and not isinstance(v, bool)]
    evidence = [(k, figure(v)) for k, v in (record.get("evidence") or {}).items()]
    return [("Inputs", inputs), ("What the guard measured", guard), ("Evidence", evidence),
            ("Settings", [(k, str(v)) for k, v in (record.get("settings") or {}).items()]),
            ("Seconds by stage", [(k, figure(v, "s")) for k, v in (record.get("seconds") or {}).items()]),
            ("Versions", [(k, str(v)) for k, v in (record.get("versions") or {}).items()]),
            ("Machine", [(k, str(v)) for k, v in (record.get("machine") or {}).items()])]


def _composed(fixed: str, moving: str) -> str:
    """Both scans in one picture: fixed in red and blue, moving in green."""
    a, b = (Picture.open(io.BytesIO(base64.b64decode(item.partition(",")[2]))).convert("L") for item in (fixed, moving))
    file = io.BytesIO()
    Picture.merge("RGB", (a, b, a)).save(file, "WEBP", quality=80, method=2)
    return "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode()
