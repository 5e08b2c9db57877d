#!/usr/bin/env python3
"""Does an effect grow or vanish with the size of the model? A recipe's difference to the control at several proxies, a line through
them over the logarithm of the ternary weights, and what it says of a larger model.

    python bench/arms.py recipe --proxy S1 --seeds 42,1337,7 ... and S2, P1: control and recipe
    python bench/scaling.py data/bench/recipe_{S1,S2,P1}/results.jsonl --arm "EMBED_DIM=* FP_STORAGE=INT5 WARMDOWN_FRACTION=.6 MUON_WD=.0025"

Of each file the runs of `control` and of the one arm that --arm names; `*` stands for any text, since a proxy has a width of its own.
Differences are of the means over the seeds, in bits per byte, with Welch's standard error; each weighs in the fit as its error says.
Prints a table and, for --weights ternary weights (the default model's), the line's value with its standard error. That is an
extrapolation: the error is the fit's alone, as if the line were true and went on. chi2 over its degrees of freedom says how well the
points lie on it.
"""

from __future__ import annotations

import fnmatch
import math
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))

from arm_results import Estimate, Scores, estimate, in_order, read_results, scores_of, welch  # noqa: E402
from command_line import BadArguments, OneLineParser, start  # noqa: E402

DEFAULT_WEIGHTS = 64_880_640  # 10 layers of 768: 11 D^2 each


class Point(NamedTuple):
    """A size and what the recipe does there."""

    weights: int  # ternary ones, of the control
    tokens: int  # of training
    control: Estimate
    difference: Estimate


class Line(NamedTuple):
    """difference = at_million + slope * log10(weights / 1e6)."""

    slope: float
    at_million: float
    covariance: np.ndarray  # (2, 2), of slope and at_million
    chi2: float

    def at(self, weights: float) -> tuple[float, float]:
        """(value, standard error)."""
        row = np.array([math.log10(weights / 1e6), 1.0])
        return float(row @ (self.slope, self.at_million)), math.sqrt(row @ self.covariance @ row)


def arm_of(done: list[Scores], pattern: str, path: Path) -> Scores:
    """The one arm with scores whose name fits; BadArguments for none or several."""
    found = [scores for scores in done if fnmatch.fnmatchcase(scores.arm, pattern)]
    if len(found) != 1:
        raise BadArguments(f"{path}: {len(found)} arms fit {pattern!r}, expected one of {', '.join(repr(s.arm) for s in done) or 'none'}")
    if len(found[0].runs) < 2:
        raise BadArguments(f"{path}: {found[0].arm!r} has {len(found[0].runs)} seed, expected two or more: an error needs them")
    return found[0]


def point_of(path: Path, pattern: str) -> Point:
    if not path.is_file():
        raise BadArguments(f"{path}: no such file; expected a results.jsonl of bench/arms.py")
    done = scores_of(in_order(read_results(path), []))
    control, arm = arm_of(done, "control", path), arm_of(done, pattern, path)
    result = next(iter(control.runs.values()))["result"]
    base = control.chunked.values()
    return Point(result["ternary_params"], result["tokens"], estimate(base), welch(arm.chunked.values(), base))


def fit(points: list[Point]) -> Line:
    """Least squares, each point weighed by its error."""
    x = np.log10([p.weights / 1e6 for p in points])
    y, sigma = (np.array([getattr(p.difference, name) for p in points]) for name in ("mean", "error"))
    (slope, at_million), covariance = np.polyfit(x, y, 1, w=1 / sigma, cov="unscaled")
    chi2 = float((((y - slope * x - at_million) / sigma) ** 2).sum())
    return Line(float(slope), float(at_million), covariance, chi2)


def table(points: list[Point], line: Line, weights: float) -> str:
    rows = ["| ternary weights | tokens | control | difference | line |", "|---|---|---|---|---|"]
    for p in points:
        control = f"{p.control.mean:.4f} ± {p.control.error:.4f} ({p.control.count})"
        rows.append(f"| {p.weights:,} | {p.tokens:,} | {control} | {p.difference} ({p.difference.count}) | {line.at(p.weights)[0]:+.4f} |")
    value, error = line.at(weights)
    slope = f"slope {line.slope:+.4f} ± {math.sqrt(line.covariance[0, 0]):.4f} a factor of 10"
    rows += ["", f"{slope}; chi2 {line.chi2:.2f} with {len(points) - 2} degrees of freedom",
             f"extrapolated to {weights:,.0f} ternary weights: {value:+.4f} ± {error:.4f} (a prediction, not a measurement)"]  # fmt: skip
    return "\n".join(rows)


def main() -> None:
    parser = OneLineParser(__doc__)
    parser.add_argument("results", nargs="+", type=Path, metavar="RESULTS")
    parser.add_argument("--arm", required=True, metavar="PATTERN", help="of the recipe; * for any text")
    parser.add_argument("--weights", type=float, default=DEFAULT_WEIGHTS, metavar="N", help="ternary weights to extrapolate to; default: the default model's")
    args = parser.parse_args()
    if not (math.isfinite(args.weights) and args.weights >= 1):
        raise BadArguments(f"--weights {args.weights:g}: expected 1 or more")
    points = sorted(point_of(path, args.arm) for path in args.results)
    if len({p.weights for p in points}) < 3:
        raise BadArguments(f"{len({p.weights for p in points})} sizes: expected three or more, or no line can be wrong")
    print(table(points, fit(points), args.weights))


if __name__ == "__main__":
    start(main, BadArguments)
