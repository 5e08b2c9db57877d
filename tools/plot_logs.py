#!/usr/bin/env python3
"""Pictures of runs, from their logs, and of a bench's effects, from its results.

    python tools/plot_logs.py logs/*.txt --out curves.png                       the loss of several runs over the time
    python tools/plot_logs.py logs/*.txt --out curves.svg --against tokens --value val_bpb
    python tools/plot_logs.py logs/demo.txt --value overview --out demo.png     loss, learning rate, zeros and bytes of a run
    python tools/plot_logs.py logs/demo.txt --value zero_fraction --artifact FILE --out zeros.png    and by layer
    python tools/plot_logs.py data/bench/free/results.jsonl --value effects --out effects.png

A log is one of train_gpt.py's (or of a script with the same lines): `step:N/M loss:L t:Tms` and `step:N/M val_loss:L val_bpb:B
train_time:Tms`. Files that are none, or hold several runs, are named and left out. Runs whose names differ only in `_seedN` are one
curve each with one look. A run has a colour, a line and a marker of its own, so that it is found without colours too.

--value
    loss           training losses, smoothed by a running mean, and every validation as a marker with a dark edge; the legend has
                   the validation at the end, in bits per byte
    val_bpb        validations in bits per byte (train with VAL_LOSS_EVERY)
    learning_rate  of the matrices: MATRIX_LR times the schedule, computed from the log's settings and clock
    zero_fraction  share of zeros among the ternary weights, where the log has it: at the end, and every CHURN_LOG_EVERY steps
    bytes          of the artifact, by stream
    overview       loss, learning rate, zero fraction and bytes, side by side
    effects        of the arms in a results.jsonl of bench/arms.py: differences against the first arm, with standard errors

A log has the zeros of all matrices together. --artifact FILE, one run's, adds a panel of each matrix's by layer to zero_fraction and
to overview; an artifact that is no log's is refused, by its SHA-256.

Needs matplotlib (bash setup.sh --tests). The learning rate, tokens of a batch that grows and an artifact need what train_gpt.py needs.
"""

import argparse
import bisect
import dataclasses
import hashlib
import importlib.util
import itertools
import math
import os
import re
import statistics
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

from arm_results import effects, in_order, read_results, scores_of, spread_of_one
from command_line import run_command, start
from run_logs import OneLineParser, last_line, parse_object
from shard_io import UserError, replacing

NUMBER = r"(\d{1,15}(?:\.\d{1,20})?)"  # of a loss or a score; no log of ours has longer ones
TRAINING = re.compile(rf"step:(\d{{1,15}})/\d{{1,15}} loss:{NUMBER} t:(\d{{1,15}})ms")
VALIDATION = re.compile(rf"step:(\d{{1,15}})/\d{{1,15}} val_loss:{NUMBER} val_bpb:{NUMBER} train_time:(\d{{1,15}})ms")
CHURN = re.compile(r"churn:\d\.\d{1,20} zero_frac:(\d\.\d{1,20}) step:(\d{1,15})/")
LAST_ZEROS = re.compile(r".* zero_frac:(\d\.\d{1,20})$")
FORMATS = (".png", ".pdf", ".svg", ".jpg")
MOST_SMOOTHING = 10_000  # lines of the log
RATE_POINTS = 200
LONG_NAME = 30  # characters; a legend of longer ones beside a picture would take its room
MOST_STEPS = 2_000_000  # of a run whose batch grows: they are counted one by one
AXES = {"time": "training time (s)", "steps": "optimizer steps", "tokens": "training tokens (millions)"}
# value -> label of its axis
CURVES = {"loss": "loss (nats per token)", "val_bpb": "validation (bits per byte)",
          "learning_rate": "learning rate of the matrices", "zero_fraction": "zeros among the ternary weights (%)"}  # fmt: skip
VALUES = (*CURVES, "bytes", "overview", "effects")
BY_LAYER = ("zero_fraction", "overview")  # values that --artifact adds a panel to
STREAMS = ("trits", "scales", "tables", "controls")  # in the order of the artifact; older logs have a list of them

# Okabe and Ito's colours, yellow left out, which colour-blind people tell apart (jfly.uni-koeln.de/color). Their numbers and those
# of lines and markers have no common divisor, so that runs beside each other differ in all three.
COLOURS = ("#0072B2", "#D55E00", "#000000", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
LINES = ("-", (0, (6, 2)), (0, (1.2, 1.5)), (0, (7, 2, 1.2, 2)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<")
# colour, hatching and ink of the streams, from dark to light
FILLS = (
    ("#0072B2", "", "white"),
    ("#000000", "", "white"),
    ("#E69F00", "//", "black"),
    ("#CC79A7", "..", "black"),
    ("#DDDDDD", "", "black"),
)


class Curve(NamedTuple):
    """What one log says."""

    name: str  # the file's name, without _seedN and a "_" in front
    training: list  # of (step, seconds, nats per token)
    validation: list  # of (step, seconds, nats per token, bits per byte)
    zeros: list = ()  # of (step, share)
    config: dict = {}  # noqa: RUF012  empty in a log without the line
    result: dict = {}  # noqa: RUF012


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
    return Curve(
        name or "log", training, validation, read_zeros(lines), *(object_of(path, lines, kind) for kind in ("config", "result"))
    )


def read_zeros(lines):
    """(step, share) of every line that has the share of zeros."""
    churn = [(int(m[2]), float(m[1])) for m in map(CHURN.match, lines) if m]
    ends = [(int(m[1]), LAST_ZEROS.match(line)) for line in lines if (m := VALIDATION.match(line))]
    return sorted({*churn, *((step, float(zeros[1])) for step, zeros in ends if zeros)})


def object_of(path, lines, kind):
    """The JSON object of the log's `config` or `result` line; empty where there is none."""
    at = last_line(lines, f"{kind} {{")
    try:
        return {} if at is None else parse_object(path, lines[at])
    except UserError as error:
        raise NoTrainingLog(error) from None


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


# -------------------------------------------------------------------------------------------------- what a log implies


def number(curve, line, name):
    """A figure of the log's config or result line; NoTrainingLog where it has none."""
    value = getattr(curve, line).get(name)
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise NoTrainingLog(f"{curve.name}: its log has no number {name} on its {line} line")
    return value


def progress_of(curve):
    """(step, seconds) -> share of the training that is over. The clock's budget is what the steps took, where they filled it:
    MAX_WALLCLOCK_SECONDS less what was kept for the temperature."""
    cap, steps = number(curve, "config", "max_wallclock_seconds"), number(curve, "config", "iterations")
    taken = curve.result.get("ms_per_step", 0) * curve.result.get("steps", 0) / 1000
    budget = min(cap, taken) if taken and curve.result["steps"] < steps else cap
    return lambda step, seconds: max(seconds / budget if budget else 0, step / steps if steps else 0)


def trainer_settings(curve):
    """The log's settings as train_gpt.py's schedule reads them, its own defaults in the place of what older logs lack; and
    train_gpt itself."""
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    import train_gpt  # slow to import

    return SimpleNamespace(**(dataclasses.asdict(train_gpt.Config.from_env({})) | curve.config)), train_gpt


def rate_at(curve):
    """(step, seconds) -> learning rate of the matrices of the step that ends there."""
    rate, progress = number(curve, "config", "matrix_lr"), progress_of(curve)
    cfg, train_gpt = trainer_settings(curve)

    def at(step, seconds):
        done = max(0, step - 1)
        share = progress(done, seconds * done / step if step else 0)
        return rate * train_gpt.shaped_rate(cfg, done, share, train_gpt.schedule(cfg, done, share).lr_scale)

    return at


def tokens_at(curve):
    """(step, seconds) -> tokens that the run has trained on."""
    batch = number(curve, "config", "train_batch_tokens")
    if not curve.config.get("batch_tokens_start") and not curve.config.get("batch_ramp_start"):
        return lambda step, _: step * batch
    last, progress, seconds = curve.training[-1][0], progress_of(curve), seconds_at(curve)
    if last > MOST_STEPS:
        raise NoTrainingLog(f"{curve.name}: {last:,} steps of a batch that grows, expected at most {MOST_STEPS:,}")
    cfg, train_gpt = trainer_settings(curve)
    sizes = [train_gpt.step_shape(cfg, step, progress(step, seconds(step)))[1] for step in range(last)]
    seen = [0, *itertools.accumulate(sizes)]
    return lambda step, _: seen[step] if step < len(seen) else seen[-1] + (step - len(seen) + 1) * sizes[-1]


def seconds_at(curve):
    """step -> seconds; those of a step between two lines lie between theirs."""
    at = [(0, 0.0), *sorted({(step, seconds) for step, seconds, *_ in (*curve.training, *curve.validation)})]

    def seconds(step):
        i = min(max(1, bisect.bisect_left(at, (step,))), len(at) - 1)
        (m, a), (n, b) = at[i - 1 : i + 1]
        return a + (b - a) * (step - m) / max(1, n - m)

    return seconds


def zeros_of(curve):
    """(step, seconds, per cent)"""
    seconds = seconds_at(curve)
    return [(step, seconds(step), 100 * share) for step, share in curve.zeros]


def rates_of(curve):
    """(step, seconds, learning rate) of RATE_POINTS steps: the schedule has corners between the log's lines."""
    rate, seconds, last = rate_at(curve), seconds_at(curve), curve.training[-1][0]
    steps = sorted({1 + i * (last - 1) // RATE_POINTS for i in range(RATE_POINTS + 1)})
    return [(step, seconds(step), rate(step, seconds(step))) for step in steps]


def stream_bytes(curve):
    """{stream: bytes} of the artifact, and its header; NoTrainingLog where the log has none."""
    found = curve.result.get("stream_bytes")
    found = dict(zip(STREAMS, found, strict=False)) if isinstance(found, list) else found
    if not isinstance(found, dict) or not all(isinstance(n, int) and n >= 0 for n in found.values()):
        raise NoTrainingLog(f"{curve.name}: its log has no stream_bytes on its result line")
    return found | {"header": max(0, number(curve, "result", "artifact_bytes") - sum(found.values()))}


def zeros_by_layer(path, curves):
    """{kind of matrix, as attention.qkv: [(layer, per cent of zeros)]} of an artifact, in its order; UserError unless it is that of
    one of the logs and holds ternary matrices."""
    from model_files import load_model  # imports torch
    from report_model import layers_of

    loaded, found = load_model(path), {}
    digest = hashlib.sha256(loaded.blob).hexdigest()
    if all(curve.result.get("artifact_sha256") != digest for curve in curves):
        raise UserError(f"--artifact {path}: its SHA-256 is {digest[:12]}..., which no log has as its artifact's")
    for matrix in layers_of(loaded.model).matrices:
        if matrix.storage == "ternary":
            place = re.fullmatch(r"blocks\.(\d+)\.(.+)\.weight", matrix.name)
            assert place, matrix.name
            found.setdefault(place[2], []).append((int(place[1]), 100 * matrix.zeros))
    if not found:
        raise UserError(f"--artifact {path}: it holds no ternary matrix")
    return found


# -------------------------------------------------------------------------------------------------- curves


def running_mean(values, window):
    """Each value's mean with those before it: `window` at most, and never more than a quarter of the way, or the descent at the
    beginning would be drawn too late."""
    return [statistics.fmean(values[i + 1 - min(window, 1 + i // 4) : i + 1]) for i in range(len(values))]


def place(curve, against):
    """(step, seconds) -> x."""
    if against == "tokens":
        tokens = tokens_at(curve)
        return lambda step, seconds: tokens(step, seconds) / 1e6
    return lambda step, seconds: step if against == "steps" else seconds


def points(curve, against, value, window):
    """x and y of a curve; empty where the log has no such value."""
    x = place(curve, against)
    if value == "loss":
        rows = zip(*zip(*[row[:2] for row in curve.training], strict=True), running_mean([row[2] for row in curve.training], window),
                   strict=True)  # fmt: skip
    elif value == "val_bpb":
        rows = [(step, seconds, bpb) for step, seconds, _, bpb in curve.validation]
    else:
        rows = (zeros_of if value == "zero_fraction" else rates_of)(curve)
    rows = list(rows)
    return [x(step, seconds) for step, seconds, _ in rows], [y for _, _, y in rows]


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


def look(i, count):
    """Colour, line and marker of the i-th run; markers stand at other places than its neighbours'."""
    return {"color": COLOURS[i % len(COLOURS)], "linestyle": LINES[i % len(LINES)], "marker": MARKERS[i % len(MARKERS)], "markersize": 4.5,
            "markevery": (0.02 + 0.11 * (i % 9) / 9, 0.11) if count > 1 else (0, 0.11)}  # fmt: skip


def in_legend_order(curves):
    """[curves of one name], the best first."""
    names = sorted({c.name for c in curves}, key=lambda name: min(final_bpb(c) for c in curves if c.name == name))
    return [[c for c in curves if c.name == name] for name in names]


def drawable(curves, options, value):
    """[[(curve, x, y)] of one name] of the logs that have the value; what lacks its settings is named. UserError if none has it."""
    groups = []
    for same in in_legend_order(curves):
        group = []
        for curve in same:
            try:
                group.append((curve, *points(curve, options.against, value, options.smooth)))
            except NoTrainingLog as error:
                print(f"plot_logs.py: left out: {error}", file=sys.stderr)
            except (TypeError, ValueError, ArithmeticError, AttributeError) as error:  # settings that no trainer would take
                print(f"plot_logs.py: left out: {curve.name}: the settings of its log: {error}", file=sys.stderr)
        groups.append([drawn for drawn in group if drawn[1]])
    groups = [group for group in groups if group]
    if not groups:
        more = {"val_bpb": "; train with VAL_LOSS_EVERY", "zero_fraction": "; train with CHURN_LOG_EVERY"}
        raise UserError(f"--value {value}: no log has one{more.get(value, '')}")
    return groups


def draw(axes, curves, options, value=None):
    """All curves, the best first in the legend."""
    value = value or options.value
    groups, heights, ends = drawable(curves, options, value), [], []
    for i, group in enumerate(groups):
        style = look(i, len(groups)) | {"linewidth": 1.1 if len(group) > 1 else 1.5}
        for n, (curve, x, y) in enumerate(group):
            every = style | ({"markevery": None} if value in ("val_bpb", "zero_fraction") else {})
            axes.plot(x, y, label=None if n else label([c for c, *_ in group]), **every)
            if value == "loss" and curve.validation:
                at, nats = place(curve, options.against), [row[2] for row in curve.validation]
                times = [at(*row[:2]) for row in curve.validation]
                axes.plot(times, nats, style["marker"], color=style["color"], markersize=7, markeredgecolor="black", zorder=3)
                x, y = [*x, *times], [*y, *nats]
            ends.append(max(x))
            heights.append(y)
    bottom = min(map(min, heights))
    top = top_of([y[0] for y in heights]) if value == "loss" else max(map(max, heights))
    margin = {"zero_fraction": 2.0}.get(value, 0) + 0.04 * (top - bottom) or 0.1
    axes.set_ylim(0 if value == "learning_rate" else bottom - margin, top + margin)
    axes.set_xlabel(AXES[options.against])
    axes.set_ylabel(CURVES[value])
    axes.set_xlim(0, 1.04 * max(ends))
    axes.grid(alpha=0.3)
    return len(groups)


def draw_layers(axes, kinds, name):
    """A line a kind of matrix over the layers, of what `zeros_by_layer` found."""
    for i, (kind, rows) in enumerate(kinds.items()):
        axes.plot(*zip(*rows, strict=True), label=kind, linewidth=1.5, **look(i, 1) | {"markevery": None, "markersize": 6})
    low, high = (end(share for rows in kinds.values() for _, share in rows) for end in (min, max))
    axes.set_ylim(low - 0.5 - 0.04 * (high - low), high + 0.5 + 0.04 * (high - low))
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel(f"layer of {shortened(name)} (0: the first)", parse_math=False)
    axes.set_ylabel("zeros of each matrix (%)")
    axes.grid(alpha=0.3)
    columns = len(kinds) if len(kinds) < 5 else 3
    axes.legend(frameon=False, fontsize="small", handlelength=2.8, columnspacing=0.9, loc="lower center", bbox_to_anchor=(0.45, 1),
                ncols=columns)  # fmt: skip


def mean_bytes(curves):
    """{name: {stream: bytes, mean over its seeds}} of the logs that have them; UserError if none has."""
    found = {}
    for curve in curves:
        try:
            sizes = stream_bytes(curve)
            found.setdefault(curve.name, []).append(sizes)
        except NoTrainingLog as error:
            print(f"plot_logs.py: left out: {error}", file=sys.stderr)
    if not found:
        raise UserError("--value bytes: no log has the bytes of its artifact's streams; a run that has ended does")
    return {
        name: {stream: statistics.fmean(sizes.get(stream, 0) for sizes in seeds) for stream in seeds[0]}
        for name, seeds in found.items()
    }


def draw_bytes(axes, curves):
    """A bar a name, the mean over its seeds, from the first given at the top; each part says what it is as far as it has room."""
    runs = mean_bytes(curves)
    most = max(sum(sizes.values()) for sizes in runs.values()) / 1000
    for row, sizes in enumerate(runs.values()):
        left = 0
        for (name, size), (colour, hatch, ink) in zip(sizes.items(), itertools.cycle(FILLS)):
            kilobytes = size / 1000
            axes.barh(row, kilobytes, height=0.7, left=left, color=colour, hatch=hatch, edgecolor="white" if ink == "white" else "black", linewidth=0.5,
                      label=None if row else f"{name} {kilobytes:,.1f}" if len(runs) == 1 else name)  # fmt: skip
            if kilobytes > most / 9:
                axes.text(left + kilobytes / 2, row, f"{name}\n{kilobytes:,.0f}", ha="center", va="center", color=ink, fontsize="small",
                          bbox=None if ink == "white" else {"facecolor": colour, "edgecolor": "none", "pad": 1.5}, parse_math=False)  # fmt: skip
            left += kilobytes
        axes.text(left, row, f" {left:,.0f}", ha="left", va="center", fontsize="small")
    axes.set_yticks(range(len(runs)), [shortened(name, 24) for name in runs], parse_math=False)
    axes.set_ylim(len(runs) - 0.4, -0.6) if len(runs) > 1 else axes.set_ylim(1, -1)
    axes.set_xlim(0, 1.12 * most)
    legend = axes.legend(
        loc="lower center", bbox_to_anchor=(0.5, 1), ncols=5, frameon=False, fontsize="small", columnspacing=1, handlelength=1.5
    )
    without_formulas(legend)
    axes.set_xlabel("bytes of the artifact (thousands), by stream")


def draw_effects(axes, done):
    """A point an arm with its standard error, in the results' order. An arm of one seed has no error of its own: it is hollow, with
    the error that it had if its seeds lay as far apart as the first arm's."""
    found, single = effects(done), spread_of_one(done[0])
    if not found:
        raise UserError("--value effects: expected results of at least two arms")
    for row, difference in enumerate(found.values()):
        alone = difference.error is None
        error = single if alone else difference.error
        _, _, bars = axes.errorbar(difference.mean, row, xerr=error, fmt="o", color=COLOURS[0], ecolor="black", capsize=4, markersize=5,
                                   markerfacecolor="white" if alone else COLOURS[0])  # fmt: skip
        for bar in bars:
            bar.set_linestyle((0, (1, 1)) if alone else "-")
        axes.annotate(str(difference), (difference.mean + (error or 0.0), row), (8, 0), textcoords="offset points", va="center", fontsize="small",
                      bbox={"facecolor": "white", "edgecolor": "none", "pad": 1})  # fmt: skip
    axes.axvline(0, color="black", linewidth=1, linestyle=(0, (4, 3)), zorder=0)
    axes.set_yticks(range(len(found)), [shortened(arm) for arm in what_differs([done[0].arm, *found])[1:]], parse_math=False)
    axes.set_ylim(len(found) - 0.4, -0.6)
    axes.margins(x=0.25)
    first = shortened(done[0].arm, 24)
    said = ["bars: one standard error to each side"] if single or any(d.error is not None for d in found.values()) else []
    if any(d.error is None for d in found.values()):
        said.append(
            f"hollow, dotted: one seed, with the spread of {first}" if single else "hollow: of one seed no error is known"
        )
    axes.set_xlabel("\n".join([f"bits per byte against {first} (left is better)", *said]), parse_math=False)
    axes.grid(alpha=0.3, axis="x")


def what_differs(arms):
    """The arms' names without the settings that all of them have; a name that has no others stays."""
    shared = set.intersection(*(set(arm.split()) for arm in arms))
    return [" ".join(word for word in arm.split() if word not in shared) or arm for arm in arms]


def shortened(name, most=48):
    """A name as a label of an axis."""
    name = name if len(name) <= most else f"{name[: most - 3]}..."
    return "".join(c if c.isprintable() else "?" for c in name.encode(errors="replace").decode())


# -------------------------------------------------------------------------------------------------- pictures


def add_legend(owner, axes, **where):
    handles, labels = axes.get_legend_handles_labels()
    legend = owner.legend(
        handles, labels, title="validation, bits per byte", frameon=False, alignment="left", handlelength=3.4, **where
    )
    without_formulas(legend)


def without_formulas(legend):
    """A name with two dollars is none."""
    for text in legend.get_texts():
        text.set_parse_math(False)


def new_figure(width, height):
    os.environ["MPLBACKEND"] = "Agg"  # a notebook's own may not be installed here
    from matplotlib import pyplot

    pyplot.rcParams |= {
        "svg.fonttype": "none",
        "svg.hashsalt": "plot_logs",
    }  # text stays text; the same picture is the same bytes
    return pyplot.figure(figsize=(width, height), layout="constrained")


def plot_curves(curves, options):
    """One panel, and one of the layers where there is an artifact."""
    figure = new_figure(12 if options.artifact else 9, 5.6)
    axes, *more = figure.subplots(1, 2 if options.artifact else 1, squeeze=False)[0]
    drawn = draw(axes, curves, options)
    if more:
        draw_layers(more[0], zeros_by_layer(options.artifact, curves), options.artifact.name)
        figure.suptitle(options.title, parse_math=False)
        add_legend(figure, axes, loc="outside lower center", ncols=min(3, drawn))
    else:
        axes.set_title(options.title, parse_math=False)
        if max(len(curve.name) for curve in curves) > LONG_NAME:
            add_legend(figure, axes, loc="outside lower center", ncols=1)
        else:
            add_legend(axes, axes, loc="center left", bbox_to_anchor=(1.01, 0.5))
    return figure


def plot_bytes(curves, options):
    figure = new_figure(9, 1.8 + 0.4 * max(2, len({curve.name for curve in curves})))
    draw_bytes(figure.subplots(), curves)
    figure.suptitle(options.title, parse_math=False)
    return figure


def plot_overview(curves, options):
    """Four panels, five with an artifact; what no log has is left out, the loss at least is there."""
    kinds = zeros_by_layer(options.artifact, curves) if options.artifact else {}
    figure = new_figure(11, 10 if kinds else 7.2)
    layout = [["loss", "rate"], ["zeros", "layers"], ["bytes", "bytes"]] if kinds else [["loss", "rate"], ["zeros", "bytes"]]
    panels = figure.subplot_mosaic(layout, height_ratios=[1, 1, 0.6][: len(layout)])
    drawn = draw(panels["loss"], curves, options, "loss")
    rest = {"rate": lambda axes: draw(axes, curves, options, "learning_rate"), "zeros": lambda axes: draw(axes, curves, options, "zero_fraction"),
            "bytes": lambda axes: draw_bytes(axes, curves)}  # fmt: skip
    for name, draw_panel in rest.items():
        try:
            draw_panel(panels[name])
        except UserError as error:
            panels[name].set_axis_off()
            print(f"plot_logs.py: left out: {error}", file=sys.stderr)
    if kinds:
        draw_layers(panels["layers"], kinds, options.artifact.name)
    figure.suptitle(options.title, parse_math=False)
    add_legend(figure, panels["loss"], loc="outside lower center", ncols=min(3, drawn))
    return figure


def plot_effects(paths, options):
    records = []
    for path in map(Path, paths):
        if not path.is_file():
            raise UserError(f"{path}: no such file; expected the results.jsonl of bench/arms.py")
        records += read_results(path)
    done = scores_of(in_order(records, []))
    if not done:
        raise UserError(f"{', '.join(map(str, paths))}: no results of bench/arms.py")
    return effects_figure(done, options.title)


def effects_figure(done, title=""):
    figure = new_figure(9, 1.4 + 0.32 * len(done))
    axes = figure.subplots()
    draw_effects(axes, done)
    axes.set_title(title, parse_math=False)
    return figure


def save(figure, path):
    """Write a picture, whole or not at all."""
    from matplotlib import pyplot

    undated = {".png": {"Software": None}, ".svg": {"Date": None}}
    try:
        with replacing(path) as partial:
            figure.savefig(partial, dpi=110, format=path.suffix[1:], metadata=undated.get(path.suffix))
    finally:
        pyplot.close(figure)


def plot(options):
    if options.value == "effects":
        return plot_effects(options.logs, options)
    curves = read_curves(options.logs)
    return {"bytes": plot_bytes, "overview": plot_overview}.get(options.value, plot_curves)(curves, options)


def has_matplotlib():
    return importlib.util.find_spec("matplotlib") is not None


def parse_arguments(argv):
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("logs", nargs="+", metavar="LOG")
    parser.add_argument("--out", type=Path, required=True, metavar="PNG", help=f"the picture: {', '.join(FORMATS)}")
    parser.add_argument("--against", choices=AXES, default="time")
    parser.add_argument("--value", choices=VALUES, default="loss")
    parser.add_argument("--artifact", type=Path, metavar="FILE", help="of one of the logs: the zeros of its matrices, by layer")
    parser.add_argument("--smooth", type=int, default=20, metavar="N", help="training losses in a running mean (default 20)")
    parser.add_argument("--title", default="")
    options = parser.parse_args(argv)
    if not 1 <= options.smooth <= MOST_SMOOTHING:
        parser.error(f"--smooth {options.smooth}: expected 1 to {MOST_SMOOTHING}")
    if options.out.suffix not in FORMATS:
        parser.error(f"--out {options.out}: expected a name that ends in {', '.join(FORMATS)}")
    if not options.out.parent.is_dir():
        parser.error(f"--out {options.out}: there is no folder {options.out.parent}")
    if options.artifact and options.value not in BY_LAYER:
        parser.error(f"--artifact {options.artifact}: belongs to --value {' and --value '.join(BY_LAYER)}")
    if not options.title.isprintable():
        parser.error(f"--title {options.title!r}: expected one line of text")
    return options


def main(argv=None):
    options = parse_arguments(argv)
    return run_command(lambda: save_plot(options), UserError, name="plot_logs.py")


def save_plot(options):
    if not has_matplotlib():
        raise UserError("needs matplotlib, which is not installed: bash setup.sh --tests, or pip install matplotlib")
    try:
        save(plot(options), options.out)
    except ImportError as error:  # it is there, and something that it needs is not
        raise UserError(f"matplotlib does not work here: {error}; bash setup.sh --tests, or pip install matplotlib") from None


if __name__ == "__main__":
    start(main)
