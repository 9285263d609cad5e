"""Fit the verdict's models to the cases of run.py, and say how well they would do on groups they have not seen.

    python pipelines/calibrate_verdict/fit.py PAIRS.json [MORE.json ...] --cases OUT [OUT ...] [--peers PEERS.csv] [-o FOLDER] [--ship]

A map is bad if its landmarks lie further apart than three times what the best affine map leaves (a voxel at least), or its mean Dice is
below 0.8 of the best that any case of the pair, or any tool in PEERS.csv, reached; every map between scans of different anatomies, and of
spoilt scans, is bad. Moved maps, of which any number can be had, weigh together no more than the other related cases. All figures are
leave-one-group-out: each case is judged by models that saw no scan of its group. Writes
FOLDER/table.md, FOLDER/reliability.png and FOLDER/verdict.json; --ship puts the last where regkit reads it.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
from collections import Counter, defaultdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import cases
import numpy as np
import run
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.stats import beta

from regkit.registration.verdict import CLUES, FAIL, MODEL, PASS, WARN, clues

TIMES, SHARE = 3.0, 0.8  # of the best error, of the best Dice: from there on a map is bad
RIDGE = 0.005  # of the cases: how much the weights are held back; of 0.001 to 0.02 the likeliest for groups that were left out
PASS_AT, FAIL_AT = 0.9, 0.3
KINDS = ("plain", "turned", "related", "moved", "wrong", "hopeless")
FEW = 5  # labels: from so many on their centres tell an error in mm
EDGES = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)  # of the reliability diagram
Array = NDArray[np.float64]


def judged(rows: list[dict[str, Any]], pairs: dict[str, cases.Pair], peers: dict[str, float]) -> list[dict[str, Any]]:
    """The rows that ended in a map, with `bad` and with `groups`, whose models may not judge them."""
    rows = [row for row in rows if "evidence" in row]
    best: dict[str, float] = defaultdict(float, peers)
    least = {name: cases.least(pair) for name, pair in pairs.items() if pair.get("fixed_points")}
    for row in rows:
        best[row["id"]] = max(best[row["id"]], row.get("dice") or 0.0)
    for row in rows:
        row["groups"] = {name.split("-")[0] if name.startswith("head") else name for name in row["group"].split(" | ")}
        half = row["edge"] / 2
        row["evidence"] = {"half_edge_mm": half, "mm": (row["mm"] + [half / 20])[min(1, len(row["mm"]))], **row["evidence"],
                           "scale": row["guard"]["scale"], "shear": row["guard"]["shear"]}
        if row["kind"] in ("wrong", "hopeless"):
            row["bad"] = True
        elif row.get("tre") is not None:
            row["bad"] = row["tre"] > TIMES * least[row["id"]]
        else:
            row["bad"] = row["dice"] < SHARE * best[row["id"]]
    return rows


def scaled(values: Array) -> dict[str, Array]:
    """Middle, spread and limits of each clue (cases, clues)."""
    low, high = np.percentile(values, [0.5, 99.5], axis=0)
    held = values.clip(low, high)
    return {"centre": held.mean(0), "spread": held.std(0) + 1e-6, "low": low, "high": high}


def held(values: Array, by: dict[str, Array]) -> Array:
    return (values.clip(by["low"], by["high"]) - by["centre"]) / by["spread"]


def logistic(x: Array, good: Array, signs: Array, mass: Array) -> tuple[Array, float]:
    """Weights and bias of the most likely model whose weights have these signs. mass: of each case."""
    mass = mass / mass.sum()

    def loss(theta: Array) -> tuple[float, Array]:
        z = x @ theta[:-1] + theta[-1]
        rest = mass * (1 / (1 + np.exp(-z)) - good)
        slope = np.append(x.T @ rest, rest.sum())
        slope[:-1] += RIDGE * theta[:-1]
        return float((mass * (np.logaddexp(0, z) - good * z)).sum() + RIDGE / 2 * (theta[:-1] ** 2).sum()), slope

    bounds = [(0, None) if s > 0 else (None, 0) for s in signs] + [(None, None)]
    found = minimize(loss, np.zeros(x.shape[1] + 1), jac=True, bounds=bounds, method="L-BFGS-B").x
    return found[:-1], float(found[-1])


def linear(x: Array, y: Array, signs: Array, mass: Array) -> tuple[Array, float]:
    """Weights and constant of the ridge regression whose weights have these signs turned round: what speaks for a map lessens its error."""
    mass = mass / mass.sum()

    def loss(theta: Array) -> tuple[float, Array]:
        rest = x @ theta[:-1] + theta[-1] - y
        slope = np.append(x.T @ (mass * rest), (mass * rest).sum())
        slope[:-1] += RIDGE * theta[:-1]
        return float((mass * rest ** 2).sum() / 2 + RIDGE / 2 * (theta[:-1] ** 2).sum()), slope

    bounds = [(None, 0) if s > 0 else (0, None) for s in signs] + [(None, None)]
    found = minimize(loss, np.append(np.zeros(x.shape[1]), y.mean()), jac=True, bounds=bounds, method="L-BFGS-B").x
    return found[:-1], float(found[-1])


def off(row: dict[str, Any], pairs: dict[str, cases.Pair], counts: dict[str, int]) -> float | None:
    """The error in mm that a row's truth tells, where it is of a right map."""
    if row["bad"]:
        return None
    if row.get("tre") is not None:
        return row["tre"]
    return row.get("centres") if counts.get(row["id"], 0) >= FEW else None


def bound(bad: int, all: int) -> float:
    """95 % upper bound of a share (Clopper & Pearson 1934)."""
    return float(beta.ppf(0.95, bad + 1, all - bad)) if bad < all else 1.0


def kind_of(row: dict[str, Any]) -> str:
    return "moved" if row["kind"] == "related" and row.get("start") == "given" else row["kind"]


def masses(rows: list[dict[str, Any]]) -> Array:
    """What each case weighs: of moved ones all together at most what the other related ones do."""
    kinds = Counter(map(kind_of, rows))
    share = min(1.0, kinds["related"] / kinds["moved"]) if kinds["moved"] and kinds["related"] else 1.0
    return np.array([share if kind_of(row) == "moved" else 1.0 for row in rows])


def model(x: Array, good: Array, error: Array, signs: Array, mass: Array) -> dict[str, Any]:
    """Both models, as they are shipped. error: log of the error over the fixed scan's edge, NaN where it is not known."""
    by, known = scaled(x), np.isfinite(error)
    z = held(x, by)
    weight, bias = logistic(z, good, signs, mass)
    slope, constant = linear(z[known], error[known], signs, mass[known])
    rest = np.abs(z[known] @ slope + constant - error[known])

    def part(weights: Array) -> dict[str, dict[str, float]]:
        return {name: {"weight": float(w), **{k: float(v[i]) for k, v in by.items()}}
                for i, (name, w) in enumerate(zip(CLUES, weights, strict=True)) if w}

    terms = part(weight)
    typical = {name: float(np.median((z * weight)[good > 0][:, list(CLUES).index(name)])) for name in terms}
    return {"success": {"terms": terms, "bias": bias, "typical": typical},
            "error": {"terms": part(slope), "bias": constant, "spread": float(np.quantile(rest, 0.9))},
            "pass": PASS_AT, "fail": FAIL_AT}


def said(model: dict[str, Any], part: str, x: Array) -> Array:
    """What a model says of clues (cases, clues): log odds, or the log of the error over the edge."""
    names, total = list(CLUES), np.full(len(x), model[part]["bias"])
    for name, t in model[part]["terms"].items():
        total += t["weight"] * ((x[:, names.index(name)].clip(t["low"], t["high"]) - t["centre"]) / t["spread"])
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tables", type=Path, nargs="+")
    parser.add_argument("--cases", type=Path, nargs="+", required=True)
    parser.add_argument("--peers", type=Path)
    parser.add_argument("-o", "--output", type=Path, default=Path("verdict"))
    parser.add_argument("--ship", action="store_true")
    given = parser.parse_args()
    given.output.mkdir(parents=True, exist_ok=True)
    pairs = {pair["id"]: pair for pair in run.read(given.tables)}
    rows = judged([row for folder in given.cases for row in run.done(folder / "cases.jsonl")], pairs, best_of(given.peers))
    counts = {name: cases.labelled(pair) for name, pair in pairs.items() if pair.get("fixed_labels")}
    x = np.array([list(clues(row["evidence"]).values()) for row in rows])
    good = np.array([0.0 if row["bad"] else 1.0 for row in rows])
    errors = [off(row, pairs, counts) for row in rows]
    error = np.array([math.nan if e is None else math.log(max(e / row["edge"], 1e-3)) for e, row in zip(errors, rows, strict=True)])
    signs = np.array([clue.sign for clue in CLUES.values()])
    mass = masses(rows)
    chance, guess, inside = left_out(rows, x, good, error, signs, mass)
    status = np.where(chance < FAIL_AT, FAIL, np.where(chance < PASS_AT, WARN, PASS))
    for row, p, s in zip(rows, chance, status, strict=True):
        row |= {"probability": float(p), "status": str(s)}
    text = report(rows, chance, status, good, error, guess, inside, mass)
    (given.output / "table.md").write_text(text, encoding="utf-8")
    (given.output / "judged.jsonl").write_text("".join(json.dumps({**row, "groups": sorted(row["groups"])}) + "\n" for row in rows),
                                               encoding="utf-8")
    diagram(chance, good, mass, given.output / "reliability.png")
    final = {"cases": len(rows), **model(x, good, error, signs, mass)}
    for path in [given.output / "verdict.json", *([MODEL] if given.ship else [])]:
        path.write_text(json.dumps(final, indent=1) + "\n", encoding="utf-8")
    print(text)


def best_of(path: Path | None) -> dict[str, float]:
    """Of each pair the best mean Dice of an affine map in a table of peers."""
    best: dict[str, float] = defaultdict(float)
    if path is not None:
        with path.open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                if row["stage"] == "affine" and row["dice_mean"]:
                    best[row["pair"]] = max(best[row["pair"]], float(row["dice_mean"]))
    return best


def left_out(rows: list[dict[str, Any]], x: Array, good: Array, error: Array, signs: Array, mass: Array) -> tuple[Array, Array, Array]:
    """Of every case the probability, the log error and its half width, by models that saw none of its groups (the mean of two, where it
    is of two)."""
    odds, guess, width, count = (np.zeros(len(rows)) for _ in range(4))
    for group in sorted(set.union(*(row["groups"] for row in rows))):
        out = np.array([group in row["groups"] for row in rows])
        one = model(x[~out], good[~out], error[~out], signs, mass[~out])
        odds[out] += said(one, "success", x[out])
        guess[out] += said(one, "error", x[out])
        width[out] += one["error"]["spread"]
        count[out] += 1
    return 1 / (1 + np.exp(-odds / count)), guess / count, width / count


def report(rows: list[dict[str, Any]], chance: Array, status: NDArray[np.str_], good: Array, error: Array, guess: Array,
           width: Array, mass: Array) -> str:
    kinds = [kind_of(row) for row in rows]
    lines = [f"{len(rows)} cases ({', '.join(f'{n} {k}' for k, n in Counter(kinds).most_common())}), {int((1 - good).sum())} of them bad, "
             "all judged by models that saw nothing of their groups.", "",
             "| cases | good | PASS | WARN | FAIL | bad | PASS | WARN | FAIL | bad among PASS, 95 % bound | good that FAIL |",
             "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|"]
    groups = sorted({name for row in rows for name in row["groups"] if row["kind"] not in ("wrong", "hopeless")})
    parts = [("all", np.ones(len(rows), bool)),
             *((k, np.array([kind == k for kind in kinds])) for k in KINDS if k in kinds),
             *((g, np.array([g in row["groups"] and row["kind"] not in ("wrong", "hopeless") for row in rows])) for g in groups)]
    for name, which in parts:
        numbers = [[int((which & (good == side) & (status == s)).sum()) for s in (PASS, WARN, FAIL)] for side in (1, 0)]
        (gp, gw, gf), (bp, bw, bf) = numbers
        right, wrong, passed = gp + gw + gf, bp + bw + bf, gp + bp
        share = f"{bp}/{passed} ({100 * bound(bp, passed):.1f} %)" if passed else "–"
        failing = f"{100 * gf / right:.1f} % ({100 * bound(gf, right):.1f} %)" if right else "–"
        lines.append(f"| {name} | {right} | {gp} | {gw} | {gf} | {wrong} | {bp} | {bw} | {bf} | {share} | {failing} |")
    lines += ["", "| probability said | cases | weight | mean said | right | off |", "|---|---:|---:|---:|---:|---:|"]
    for low, high in pairwise(EDGES):
        some = (chance >= low) & (chance < high if high < 1 else chance <= 1)
        if some.any():
            weight = mass[some].sum()
            said, right = (float((values * mass)[some].sum() / weight) for values in (chance, good))
            lines.append(f"| {low:g}–{high:g} | {int(some.sum())} | {weight:.0f} | {said:.3f} | {right:.3f} | {right - said:+.3f} |")
    known = np.isfinite(error)
    rest = error[known] - guess[known]
    factor, share = math.exp(float(np.median(np.abs(rest)))), float((np.abs(rest) <= width[known]).mean())
    lines += ["", f"Expected error, of {int(known.sum())} right maps with landmarks or at least {FEW} labels: it is off by a factor of "
              f"{factor:.2f} in the median, and {100 * share:.0f} % lie within what is given for nine of ten."]
    return "\n".join(lines) + "\n"


def diagram(chance: Array, good: Array, mass: Array, path: Path) -> None:
    """Share of right maps against the probability said, by weight, with 95 % intervals of as many cases as weigh the same."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(4.2, 4.2), layout="constrained")
    axes.plot([0, 1], [0, 1], color="0.6", lw=1)
    axes.fill_between([0, 1], [-0.1, 0.9], [0.1, 1.1], color="0.93")
    for low, high in pairwise(EDGES):
        some = (chance >= low) & (chance < high if high < 1 else chance <= 1)
        if some.any():
            n = mass[some].sum() ** 2 / (mass[some] ** 2).sum()
            k = n * float(np.average(good[some], weights=mass[some]))
            ends = [beta.ppf(0.025, k, n - k + 1) if k else 0.0, beta.ppf(0.975, k + 1, n - k) if k < n else 1.0]
            middle = float(np.average(chance[some], weights=mass[some]))
            axes.plot([middle, middle], [float(end) for end in ends], color="tab:blue", lw=1)
            axes.plot(middle, k / n, "o", color="tab:blue")
            axes.annotate(str(int(some.sum())), (middle, k / n), textcoords="offset points", xytext=(6, -4), fontsize=8)
    axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="probability said", ylabel="share of right maps", aspect="equal")
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    main()
