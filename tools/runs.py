#!/usr/bin/env python3
"""The runs in logs/ at a glance.

    runs.py                       list them: date, steps, bits per byte (chunked and sliding), bytes, machine, what differed from the defaults
    runs.py show RUN              a run's log without the source that it begins with
    runs.py compare RUN RUN ...   what differed between runs, and their scores' difference against its noise

RUN is a log, or its name in the folder that --logs names (default: logs). `compare` takes the sliding score where every run has it,
else that of the round trip. A date that the log does not hold is the file's.

`compare` takes runs of the same settings, code and machine as seeds of one arm; the first RUN's arm is the reference. The noise
is the standard deviation between seeds, pooled over the arms; runs in the folder that are further seeds of an arm count for it
too. A difference is beyond the noise where it exceeds Student's 95 % interval.
"""

import functools
import math
import statistics
import sys
import time
from pathlib import Path
from typing import NamedTuple

from command_line import BadArguments, read_preset, run_command, start
from model_files import ROOT
from run_logs import FREE_SETTINGS, OneLineParser, last_line, parse_object, read_run, scored_by
from shard_io import UserError

PLACES = {"data_path", "tokenizer_path", "checkpoint_dir"}  # whose values say where, not what; `compare` names them
# Student's t, two-sided 95 %, by degrees of freedom; the next smaller entry is taken
STUDENT_95 = {1: 12.71, 2: 4.30, 3: 3.18, 4: 2.78, 5: 2.57, 6: 2.45, 7: 2.36, 8: 2.31, 10: 2.23, 15: 2.13, 20: 2.09, 30: 2.04, 60: 2.00}


class Unfinished(NamedTuple):
    """A log with a config line and no result."""

    log: Path
    config: dict
    steps: str  # "313/20000", where it ended


def logs_in(folder):
    """The log files of a folder; UserError unless it is one."""
    if not folder.is_dir():
        raise UserError(f"--logs {folder}: no such folder")
    return sorted(folder.glob("*.txt"))


def read_lines(path):
    try:
        return path.read_bytes().decode(errors="replace").splitlines()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None


def read_any(path):
    """The Run of a log, or Unfinished; None if the file is not the log of one run of train_gpt.py."""
    lines = read_lines(path)
    if sum(line.startswith("config {") for line in lines) != 1:
        return None
    try:
        if last_line(lines, "result {") is not None:
            return read_run(path)
        config = parse_object(path, lines[last_line(lines, "config {")])
    except UserError as error:
        print(f"runs.py: left out: {error}", file=sys.stderr)
        return None
    step = next((line.split()[0].removeprefix("step:") for line in reversed(lines) if line.startswith("step:")), "0")
    return Unfinished(path, config, step)


def named_log(name, folder):
    """The log that RUN means."""
    choices = [Path(name), folder / name, folder / f"{name}.txt"]
    found = next((path for path in choices if path.is_file()), None)
    if found is None:
        raise UserError(f"{name}: no such log, here or in {folder}")
    return found


def differing(config):
    """What of a config line differs from the defaults, of all but seed, names and places: the preset after which least is left to
    say, and the rest as SETTING=value."""
    import train_gpt

    default = {k: v for k, v in vars(train_gpt.Config(run_id="x")).items() if k not in FREE_SETTINGS | PLACES}
    config = {k.lower(): v == "True" for k, v in train_gpt.UNSAID.items()} | config  # it was written before these

    def left(preset):
        """A setting that there was none of yet is at its default."""
        expected = default | preset
        values = {k: config.get(k, default[k]) for k in expected.keys() & (config.keys() | preset.keys())}
        return {k: values[k] for k in expected if k in values and values[k] != expected[k]}

    rest = {"": left({})} | {name: left(preset) for name, preset in presets().items()}
    name = min(rest, key=lambda name: bool(name) + len(rest[name]))
    return [f"preset {name}"] * bool(name) + [f"{k.upper()}={int(v) if isinstance(v, bool) else v}" for k, v in rest[name].items()]


@functools.cache
def presets():
    """name -> {setting: value} of configs/*.env, places left out."""
    import train_gpt

    kinds, found = train_gpt.setting_kinds(train_gpt.Config), {}
    for path in sorted(ROOT.glob("configs/*.env")):
        own = {k.lower(): v for k, v in read_preset(path).items() if k.lower() not in PLACES}
        found[path.stem] = {name: train_gpt.parse_setting(name.upper(), v, kinds[name]) for name, v in own.items()}
    return found


def date(run):
    noted = getattr(run, "result", {}).get("date")
    return noted[:16] if noted else time.strftime("%Y-%m-%d %H:%M", time.localtime(run.log.stat().st_mtime))


def score(run, prefix):
    return run.result[f"{prefix}_val_bpb"]


# -------------------------------------------------------------------------------------------------- the commands


def list_runs(folder):
    paths = logs_in(folder)
    runs = [run for path in paths if (run := read_any(path))]
    if not runs:
        raise UserError(f"--logs {folder}: no log of a run in it")
    rows = [("run", "date", "seed", "steps", "chunked", "sliding", "bytes", "machine")]
    notes = [""]
    for run in sorted(runs, key=date):
        rows.append((run.log.stem, date(run), str(run.config.get("seed", "-")), *figures(run)))
        notes.append(" ".join(differing(run.config)) or "the defaults")
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row, note in zip(rows, notes, strict=True):
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
        print(f"    {note}\n" * bool(note), end="")
    if left := len(paths) - len(runs):
        print(f"runs.py: {left} other file{'s' * (left > 1)} in {folder}: not the log of one run", file=sys.stderr)


def figures(run):
    """steps, both scores in bits per byte, bytes, machine: as texts."""
    if isinstance(run, Unfinished):
        return run.steps, "unfinished", "-", "-", "-"
    total = run.result.get("total_bytes")
    steps = "evaluation" if run.is_evaluation else f"{run.result['steps']:,}"
    machine = run.hardware if not run.is_evaluation else run.result.get("gpu_name", "-")
    scores = ("-" if run.result.get(f"{kind}_val_bpb") is None else f"{score(run, kind):.4f}" for kind in ("roundtrip", "sliding"))
    return steps, *scores, f"{total:,}" if total else "-", machine


def show_run(path):
    lines = read_lines(path)
    at = last_line(lines, "config {")
    if at is None:
        raise UserError(f"{path}: no config line: not the log of a run")
    print("\n".join(lines[max(0, at - 1) :]))


def arm_of(run):
    """What runs have in common that are seeds of one experiment."""
    kept = {name: value for name, value in run.config.items() if name not in FREE_SETTINGS}
    return repr(sorted(kept.items())), run.result["code_sha256"], run.hardware


def trained_run(path):
    run = read_run(path)
    if run.is_evaluation:
        raise UserError(f"{path}: a run with EVAL_ONLY=1, which trains nothing; expected a training run")
    return run


def by_arm(runs):
    """Runs with the same settings, code and machine together, in the order of the first of each."""
    arms = {}
    for run in runs:
        arms.setdefault(arm_of(run), []).append(run)
    return arms


def further_seeds(arms, folder):
    """The arms with runs of the folder that are seeds of them and were not named; a seed counts once."""
    known = {run.log.resolve() for runs in arms.values() for run in runs}
    found = [read_any(path) for path in (logs_in(folder) if folder.is_dir() else []) if path.resolve() not in known]
    others = by_arm(run for run in found if run and not isinstance(run, Unfinished) and not run.is_evaluation)
    return {arm: list({run.seed: run for run in (*others.get(arm, []), *runs)}.values()) for arm, runs in arms.items()}


def differences(a, b):
    """Lines that say what differs between two runs' settings, code, machine and text."""
    ours, theirs = ({k.upper(): v for k, v in run.config.items() if k not in FREE_SETTINGS}
                    | {"code": run.result["code_sha256"][:12], "machine": run.hardware, "scored bytes": run.result.get("val_bytes")}
                    for run in (a, b))  # fmt: skip
    yield from (f"{name}: {ours[name]} -> {theirs[name]}" for name in ours if name in theirs and ours[name] != theirs[name])
    if alone := sorted(ours.keys() ^ theirs.keys()):
        yield f"in one of the logs only: {' '.join(alone)}"


def pooled_noise(arms, prefix):
    """(standard deviation between seeds, degrees of freedom) over all arms; (nan, 0) where each has one seed."""
    squares = [(len(runs) - 1, statistics.variance([score(run, prefix) for run in runs])) for runs in arms.values() if len(runs) > 1]
    freedom = sum(n for n, _ in squares)
    return (math.sqrt(sum(n * s for n, s in squares) / freedom), freedom) if freedom else (math.nan, 0)


def verdict(difference, error, freedom):
    if not freedom:
        return "noise unknown: no second seed"
    limit = STUDENT_95[max(n for n in STUDENT_95 if n <= freedom)] * error
    return f"+- {limit:.4f}: {'beyond' if abs(difference) > limit else 'within'} the noise"


def compare_runs(paths, folder):
    runs = list({path.resolve(): trained_run(path) for path in paths}.values())
    if len(runs) < 2:
        raise UserError(f"{paths[0]}: one run; expected at least two to compare")
    arms = by_arm(runs)
    seeds = further_seeds(arms, folder)
    prefix = scored_by([run for same in seeds.values() for run in same])
    deviation, freedom = pooled_noise(seeds, prefix)
    first = next(iter(arms.values()))
    reference = statistics.fmean(score(run, prefix) for run in first)
    print(f"{prefix} score, bits per byte; noise: " + (f"{deviation:.4f} between seeds, {freedom} degrees of freedom" if freedom else "unknown"))
    for letter, same in zip(letters(), arms.values(), strict=False):
        mean = statistics.fmean(score(run, prefix) for run in same)
        steps = statistics.fmean(run.result["steps"] for run in same)
        print(f"\n{letter}  {', '.join(run.log.stem for run in same)}")
        print(f"   {mean:.4f} ({len(same)} seed{'s' * (len(same) > 1)}), {steps:,.0f} steps, {same[0].result['total_bytes']:,} bytes")
        if same is not first:
            error = deviation * math.sqrt(1 / len(same) + 1 / len(first))
            print(f"   {letter} - A: {mean - reference:+.4f} {verdict(mean - reference, error, freedom)}")
            print("".join(f"   {line}\n" for line in differences(first[0], same[0])), end="")


def letters():
    return (chr(ord("A") + i) if i < 26 else f"arm {i + 1}" for i in range(10**6))


def parse_arguments(argv):
    parser = OneLineParser(__doc__)
    parser.add_argument("command", nargs="?", choices=("list", "show", "compare"), default="list")
    parser.add_argument("runs", nargs="*", metavar="RUN")
    parser.add_argument("--logs", type=Path, default=ROOT / "logs", metavar="FOLDER", help="default: logs")
    options = parser.parse_args(argv)
    expected = {"list": len(options.runs) == 0, "show": len(options.runs) == 1, "compare": len(options.runs) > 1}
    if not expected[options.command]:
        wanted = {"list": "no RUN", "show": "one RUN", "compare": "two or more RUNs"}
        parser.error(f"{options.command}: {len(options.runs)} runs given, expected {wanted[options.command]}")
    return options


def main(argv=None):
    options = parse_arguments(argv)
    return run_command(lambda: do(options), UserError, BadArguments)


def do(options):
    if options.command == "list":
        return list_runs(options.logs)
    paths = [named_log(name, options.logs) for name in options.runs]
    return show_run(paths[0]) if options.command == "show" else compare_runs(paths, options.logs)


if __name__ == "__main__":
    start(main)
