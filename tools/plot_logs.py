#!/usr/bin/env python3
"""Training curves of several runs in one picture.

    python tools/plot_logs.py logs/*.txt --out curves.png
    python tools/plot_logs.py logs/*.txt --out curves.png --against steps --value val_bpb

A log is one of train_gpt.py's (or of a script with the same lines): `step:N/M loss:L t:Tms` and `step:N/M val_loss:L val_bpb:B
train_time:Tms`. Runs whose names differ only in `_seedN` are one curve each in one colour. Training losses are smoothed by a
running mean; a dot marks the validation loss at the end, which stands in the legend in bits per byte. Needs matplotlib
(requirements-test.txt).
"""

import argparse
import math
import re
import statistics
import sys
from pathlib import Path
from typing import NamedTuple

from shard_io import UserError

TRAINING = re.compile(r"step:(\d+)/\d+ loss:([\d.]+) t:(\d+)ms")
VALIDATION = re.compile(r"step:(\d+)/\d+ val_loss:([\d.]+) val_bpb:([\d.]+) train_time:(\d+)ms")
AXES = {"time": "training time (s)", "steps": "optimizer steps"}
VALUES = {"loss": "loss (nats per token)", "val_bpb": "validation (bits per byte)"}
COLOURS, STYLES = 10, ("-", "--", ":", "-.")  # a style for every five curves: told apart without colour too


class Curve(NamedTuple):
    """The points of one log."""

    name: str  # the file's name, without _seedN
    training: list  # of (step, seconds, nats per token)
    validation: list  # of (step, seconds, nats per token, bits per byte)


def read_curve(path):
    """The Curve of a log; UserError if it has no training line. Lines of the source at its beginning do not match."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not a readable log: {error}") from None
    training = [(int(m[1]), int(m[3]) / 1000, float(m[2])) for m in map(TRAINING.match, lines) if m]
    validation = [(int(m[1]), int(m[4]) / 1000, float(m[2]), float(m[3])) for m in map(VALIDATION.match, lines) if m]
    if not training:
        raise UserError(f"{path}: no line `step:N/M loss:L t:Tms`: not the log of a run")
    return Curve(re.sub(r"_seed\d+$", "", Path(path).stem), training, validation)


def running_mean(values, window):
    """Each value's mean with those before it: `window` at most, and never more than a quarter of the way, or the descent at the
    beginning would be drawn too late."""
    return [statistics.fmean(values[i + 1 - min(window, 1 + i // 4) : i + 1]) for i in range(len(values))]


def points(curve, against, value, window):
    """x and y of a curve; empty where the log has no such value."""
    column = 0 if against == "steps" else 1
    rows = curve.training if value == "loss" else curve.validation
    y = [row[2 if value == "loss" else 3] for row in rows]
    return [row[column] for row in rows], running_mean(y, window if value == "loss" else 1)


def final_bpb(curve):
    """Bits per byte at the end, or infinity: the order of the legend."""
    return curve.validation[-1][3] if curve.validation else math.inf


def label(curves):
    """The legend's text for the seeds of one run: name and mean of the final bits per byte."""
    scores = [final_bpb(curve) for curve in curves if curve.validation]
    return f"{curves[0].name}  {statistics.fmean(scores):.3f}" if scores else curves[0].name


def top_of(starts):
    """Upper end of the axis: a run that starts far above the others comes in through it."""
    return min(max(starts), 1.03 * statistics.median(starts))


def draw(axes, curves, options):
    """All curves, the best first in the legend."""
    names = sorted({c.name for c in curves}, key=lambda name: min(final_bpb(c) for c in curves if c.name == name))
    drawn = []
    for i, name in enumerate(names):
        same = [c for c in curves if c.name == name]
        look = {"color": f"C{i % COLOURS}", "linestyle": STYLES[i // 5 % len(STYLES)], "linewidth": 1.1 if len(same) > 1 else 1.5}
        for number, curve in enumerate(same):
            x, y = points(curve, options.against, options.value, options.smooth)
            axes.plot(x, y, label=None if number else label(same), **look)
            if options.value == "loss" and curve.validation:
                step, seconds, nats, _ = curve.validation[-1]
                axes.plot(step if options.against == "steps" else seconds, nats, "o", color=look["color"], markersize=4)
                y = [*y, nats]
            drawn += [y] if y else []
    if not drawn:
        raise UserError(f"--value {options.value}: no log has one; train with VAL_LOSS_EVERY")
    bottom = min(min(y) for y in drawn)
    top = top_of([y[0] for y in drawn])
    margin = 0.04 * (top - bottom) or 0.1
    axes.set_ylim(bottom - margin, top + margin)


def plot(curves, options):
    """Write the picture."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 5.6), layout="constrained")
    draw(axes, curves, options)
    axes.set_xlabel(AXES[options.against])
    axes.set_ylabel(VALUES[options.value])
    axes.set_title(options.title)
    axes.set_xlim(left=0)
    axes.grid(alpha=0.3)
    axes.legend(title="validation, bits per byte", loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, alignment="left")
    figure.savefig(options.out, dpi=110, metadata={"Software": None})


def parse_arguments(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("logs", nargs="+", metavar="LOG")
    parser.add_argument("--out", type=Path, required=True, metavar="PNG")
    parser.add_argument("--against", choices=AXES, default="time")
    parser.add_argument("--value", choices=VALUES, default="loss")
    parser.add_argument("--smooth", type=int, default=20, metavar="N", help="training losses in a running mean (default 20)")
    parser.add_argument("--title", default="")
    options = parser.parse_args(argv)
    if options.smooth < 1:
        parser.error(f"--smooth {options.smooth}: expected at least 1")
    return options


def main(argv=None):
    options = parse_arguments(argv)
    try:
        plot([read_curve(path) for path in options.logs], options)
    except (UserError, ImportError, OSError) as error:
        print(f"plot_logs.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
