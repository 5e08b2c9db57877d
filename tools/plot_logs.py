#!/usr/bin/env python3
"""Training curves of several runs in one picture.

    python tools/plot_logs.py logs/*.txt --out curves.png
    python tools/plot_logs.py logs/*.txt --out curves.png --against steps --value val_bpb

A log is one of train_gpt.py's (or of a script with the same lines): `step:N/M loss:L t:Tms` and `step:N/M val_loss:L val_bpb:B
train_time:Tms`. Files that are none, or hold several runs, are named and left out. Runs whose names differ only in `_seedN` are one curve each in one colour. Training losses are smoothed by a
running mean; a dot marks the validation loss at the end, which stands in the legend in bits per byte. Needs matplotlib
(bash setup.sh --tests).
"""

import argparse
import importlib.util
import math
import os
import re
import statistics
import sys
from pathlib import Path
from typing import NamedTuple

from run_logs import OneLineParser, start
from shard_io import UserError

TRAINING = re.compile(r"step:(\d{1,15})/\d+ loss:(\d+(?:\.\d+)?) t:(\d{1,15})ms")
VALIDATION = re.compile(r"step:(\d{1,15})/\d+ val_loss:(\d+(?:\.\d+)?) val_bpb:(\d+(?:\.\d+)?) train_time:(\d{1,15})ms")
FORMATS = (".png", ".pdf", ".svg", ".jpg")
MOST_SMOOTHING = 10_000  # lines of the log
AXES = {"time": "training time (s)", "steps": "optimizer steps"}
VALUES = {"loss": "loss (nats per token)", "val_bpb": "validation (bits per byte)"}
COLOURS, STYLES = 10, ("-", "--", ":", "-.")  # a style for every five curves: told apart without colour too


class Curve(NamedTuple):
    """The points of one log."""

    name: str  # the file's name, without _seedN and a "_" in front
    training: list  # of (step, seconds, nats per token)
    validation: list  # of (step, seconds, nats per token, bits per byte)


class NoTrainingLog(UserError):
    """A file that is there, and is not the log of one training run."""


def read_curve(path):
    """The Curve of a log; NoTrainingLog if it is not that of one run. Lines of the source at its beginning do not match."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:
        raise NoTrainingLog(f"{path}: not a text file") from None
    except IsADirectoryError:
        raise NoTrainingLog(f"{path}: is a folder") from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    training = [(int(m[1]), int(m[3]) / 1000, float(m[2])) for m in map(TRAINING.match, lines) if m]
    validation = [(int(m[1]), int(m[4]) / 1000, float(m[2]), float(m[3])) for m in map(VALIDATION.match, lines) if m]
    if not training:
        raise NoTrainingLog(f"{path}: no line `step:N/M loss:L t:Tms`: not the log of a run")
    if (runs := sum(line.startswith("config {") for line in lines)) > 1:
        raise NoTrainingLog(f"{path}: the logs of {runs} runs in one file: give each its own")
    # a legend leaves out what begins with "_", as bench/arms.py's log of "(preset)" does; a font has no half characters
    name = re.sub(r"^_+|_seed\d+$", "", Path(path).stem).encode(errors="replace").decode()
    return Curve(name or "log", training, validation)


def read_curves(paths):
    """The Curves of all training logs; the other files are named on stderr. UserError if none is left."""
    curves = []
    for path in paths:
        try:
            curves.append(read_curve(path))
        except NoTrainingLog as error:
            print(f"plot_logs.py: left out: {error}", file=sys.stderr)
    if not curves:
        raise UserError(f"{', '.join(map(str, paths[:3]))}{', ...' * (len(paths) > 3)}: no log of a training run")
    return curves


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
    """Write the picture, whole or not at all."""
    os.environ["MPLBACKEND"] = "Agg"  # a notebook's own may not be installed here
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 5.6), layout="constrained")
    draw(axes, curves, options)
    axes.set_xlabel(AXES[options.against])
    axes.set_ylabel(VALUES[options.value])
    axes.set_title(options.title, parse_math=False)
    axes.set_xlim(left=0)
    axes.grid(alpha=0.3)
    legend = axes.legend(title="validation, bits per byte", loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False,
                         alignment="left")  # fmt: skip
    for text in legend.get_texts():
        text.set_parse_math(False)  # a name with two dollars is no formula
    partial = options.out.with_name(f".partial.{os.getpid()}")
    try:
        figure.savefig(partial, dpi=110, format=options.out.suffix[1:], metadata={"Software": None} if is_png(options.out) else None)
        os.replace(partial, options.out)
    finally:
        partial.unlink(missing_ok=True)


def is_png(path):
    return path.suffix == ".png"


def parse_arguments(argv):
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("logs", nargs="+", metavar="LOG")
    parser.add_argument("--out", type=Path, required=True, metavar="PNG", help=f"the picture: {', '.join(FORMATS)}")
    parser.add_argument("--against", choices=AXES, default="time")
    parser.add_argument("--value", choices=VALUES, default="loss")
    parser.add_argument("--smooth", type=int, default=20, metavar="N", help="training losses in a running mean (default 20)")
    parser.add_argument("--title", default="")
    options = parser.parse_args(argv)
    if not 1 <= options.smooth <= MOST_SMOOTHING:
        parser.error(f"--smooth {options.smooth}: expected 1 to {MOST_SMOOTHING}")
    if options.out.suffix not in FORMATS:
        parser.error(f"--out {options.out}: expected a name that ends in {', '.join(FORMATS)}")
    if not options.out.parent.is_dir():
        parser.error(f"--out {options.out}: there is no folder {options.out.parent}")
    if not options.title.isprintable():
        parser.error(f"--title {options.title!r}: expected one line of text")
    return options


def main(argv=None):
    options = parse_arguments(argv)
    try:
        if importlib.util.find_spec("matplotlib") is None:
            raise UserError("needs matplotlib, which is not installed: bash setup.sh --tests, or pip install matplotlib")
        plot(read_curves(options.logs), options)
    except (UserError, ImportError, OSError) as error:
        print(f"plot_logs.py: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    start(main)
