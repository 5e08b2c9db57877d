"""The logs of train_gpt.py: what one whole run says of itself, and whether several are seeds of one experiment.

For compliance.py and make_submission.py; this file is no command. A log begins with the bytes of the file that ran; a
`config {json}` line and, at its end, a `result {json}` line hold the settings and the figures.
"""

import functools
import json
import math
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import command_line
from shard_io import UserError

BUDGET_BYTES = 16_000_000  # decimal; code and artifact together
MOST_DIGITS = 20  # of a whole number: 64 bits

# What must be the same in every log, and what may differ.
FREE_SETTINGS = {"seed", "run_id", "artifact_path", "log_dir"}
COUNTS = ("seed", "steps", "world_size", "artifact_bytes", "code_bytes", "total_bytes")
MEASURES = ("val_loss", "val_bpb", "roundtrip_val_loss", "roundtrip_val_bpb", "train_time_s", "ms_per_step", "eval_time_s")
SLIDING = ("sliding_val_loss", "sliding_val_bpb")  # absent or null in a run with SLIDING_EVAL=0
TEXTS = ("device", "gpu_name", "torch_version", "code_sha256", "artifact_sha256")
# What older programs did not write, or a run may leave out: null, or of its kind
MAYBE_COUNTS = ("params", "ternary_params", "val_tokens", "val_bytes", "tokens", "stride", "restarts", "lost_steps")
MAYBE_TEXTS = ("git_commit", "tokenizer_sha256", "artifact_path", "date")
# The settings that submission.json names
PATHS_AND_NAMES = ("data_path", "tokenizer_path", "matrix_optimizer")
SIZES = ("num_layers", "model_dim", "vocab_size", "bitnet_group_size", "train_batch_tokens")
# An EVAL_ONLY run has the scores of an artifact, and nothing of a training
SCORES = tuple(name for name in MEASURES if name.startswith("roundtrip_"))


@dataclass(frozen=True)
class Run:
    """One seed: its log, the resolved config and the result, as the log has them."""

    log: Path
    config: dict
    result: dict
    content: bytes = b""  # of the log
    lines: tuple = ()  # from the one with the versions to the end

    @property
    def seed(self):
        return self.result["seed"]

    @property
    def code(self):
        """The file that ran, as the log's beginning has it; check it against code_sha256 before use."""
        return self.content[: self.result.get("code_bytes", 0)]  # an evaluation has none

    @property
    def is_evaluation(self):
        """Whether it is a run with EVAL_ONLY=1, which trains nothing."""
        return self.config.get("eval_only") is True

    @property
    def hardware(self):
        """"8 x NVIDIA H100 80GB HBM3", or the processes of a run without a GPU and their threads."""
        if self.result["device"] == "cuda":
            return f"{self.result['world_size']} x {self.result['gpu_name']}"
        threads = re.search(r" threads:(\d+)", self.lines[0] if self.lines else "")
        return f"{self.result['world_size']} x CPU process" + (f" of {threads[1]} thread{'s' * (threads[1] != '1')}" if threads else "")


def read_run(path):
    """The Run of a log; UserError unless it holds a whole one."""
    try:
        content = Path(path).read_bytes()
        lines = content.decode().splitlines()
    except OSError as error:
        raise UserError(f"{path}: not a readable log: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not a readable log: {error}") from None
    config_at, result_at = last_line(lines, "config {"), last_line(lines, "result {")
    if result_at is None:
        raise UserError(f"{path}: no result line: the run did not finish")
    if config_at is None or config_at > result_at:
        raise UserError(f"{path}: no config line before the result line: not the log of one whole run")
    config, result = parse_object(path, lines[config_at]), parse_object(path, lines[result_at])
    run = Run(Path(path), config, result, content, tuple(lines[max(0, config_at - 1) :]))
    check_config(run)
    check_result(run)
    return run


def last_line(lines, start):
    """Index of the last line with this start, or None. The log's beginning holds source code, so the last one counts."""
    return next((i for i in reversed(range(len(lines))) if lines[i].startswith(start)), None)


def parse_object(path, line):
    """The JSON object of a `config` or `result` line; UserError for anything else, non-finite numbers included."""
    kind, _, text = line.partition(" ")

    def refuse(number):
        raise UserError(f"{path}: the {kind} line holds the non-finite number {number}")

    def finite(number):
        return float(number) if math.isfinite(float(number)) else refuse(number)

    def whole(digits):
        if len(digits) > MOST_DIGITS:
            raise UserError(f"{path}: the {kind} line holds a number of {len(digits)} digits")
        return int(digits)

    try:
        return json.loads(text, parse_constant=refuse, parse_float=finite, parse_int=whole)
    except (json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"{path}: the {kind} line is not whole JSON: {error}") from None


def check_config(run):
    """Every setting that submission.json names is there and of its kind."""
    if absent := [name for name in (*PATHS_AND_NAMES, *SIZES) if name not in run.config]:
        raise UserError(f"{run.log}: the config line lacks {', '.join(absent)}")
    for name in PATHS_AND_NAMES:
        need(run, "config", name, str, "a text")
    for name in SIZES:
        need(run, "config", name, int, "a whole number of at least 1", least=1)
    for name in ("iterations", "val_max_tokens"):
        if name in run.config:
            need(run, "config", name, int, "a whole number")


def check_result(run):
    """Every figure that submission.json needs is there, of its kind, and possible: a run of 0 steps has no score."""
    counts, measures, texts = (COUNTS, MEASURES, TEXTS) if not run.is_evaluation else ((), SCORES, ())
    for name in counts:
        need(run, "result", name, int, "a whole number of at least 1" if name != "seed" else "a whole number", int(name != "seed"))
    for name in measures:
        need(run, "result", name, (int, float), "a number of at least 0", 0)
    for name in texts:
        need(run, "result", name, str, "a text")
    for names, kinds, expected in ((SLIDING, (int, float), "a number of at least 0"), (MAYBE_COUNTS, int, "a whole number"),
                                   (MAYBE_TEXTS, str, "a text")):  # fmt: skip
        for name in (name for name in names if run.result.get(name) is not None):
            need(run, "result", name, kinds, expected)
    if len(present := [name for name in SLIDING if run.result.get(name) is not None]) == 1:
        raise UserError(f"{run.log}: the result line has {present[0]} alone, expected {' and '.join(SLIDING)}, or neither")


def need(run, line, name, kinds, expected, least=0):
    """UserError unless a figure of the config or the result line is of these kinds and, if it is a number, not below `least`."""
    value = getattr(run, line).get(name)
    if not isinstance(value, kinds) or isinstance(value, bool) or kinds is not str and value < least:
        raise UserError(f"{run.log}: the {line} line has {name} {value!r}, expected {expected}")


def check_same(runs):
    """The runs are one experiment: other seeds, the same code and the same settings."""
    first, seeds = runs[0], {}
    for run in runs:
        if run.seed in seeds:
            raise UserError(f"{run.log} and {seeds[run.seed]}: both have seed {run.seed}")
        seeds[run.seed] = run.log
        if run.result["code_sha256"] != first.result["code_sha256"]:
            raise UserError(f"{run.log} and {first.log}: different code (code_sha256)")
        for name in sorted((run.config.keys() | first.config.keys()) - FREE_SETTINGS):
            ours, theirs = (r.config.get(name, "nothing") for r in (run, first))
            if ours != theirs:
                raise UserError(f"{run.log} and {first.log}: different settings: {name} is {ours!r} and {theirs!r}")


def scored_by(runs):
    """The prefix of the reported figures: the sliding score where every run has it, else the round trip's."""
    has_sliding = all(run.result.get(name) is not None for run in runs for name in SLIDING)
    return "sliding" if has_sliding else "roundtrip"


# -------------------------------------------------------------------------------------------------- the tools' own


# whose options have one spelling
OneLineParser = functools.partial(command_line.OneLineParser, allow_abbrev=False)


def start(main):
    """Run a tool's main and end with its code. A console that lacks a character gets its escape; a reader that has gone away
    (`| head`) and Ctrl-C end it without a traceback, as they end other programs."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")
    try:
        code = main()
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python would try to write the rest at its end
        code = 141
    except KeyboardInterrupt:
        code = 130
    sys.exit(code)


if __name__ == "__main__":
    command_line.not_a_command("tools/compliance.py")
