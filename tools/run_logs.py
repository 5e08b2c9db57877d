"""The logs of train_gpt.py: what one whole run says of itself, and whether several are seeds of one experiment.

For compliance.py and make_submission.py. A log begins with the source of the file that ran; a `config {json}` line and, at
its end, a `result {json}` line hold the settings and the figures.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path

from shard_io import UserError

BUDGET_BYTES = 16_000_000  # decimal; code and artifact together

# What must be the same in every log, and what may differ.
FREE_SETTINGS = {"seed", "run_id", "artifact_path"}
COUNTS = ("seed", "steps", "world_size", "artifact_bytes", "code_bytes", "total_bytes")
MEASURES = ("val_loss", "val_bpb", "roundtrip_val_loss", "roundtrip_val_bpb", "train_time_s", "ms_per_step", "eval_time_s")
SLIDING = ("sliding_val_loss", "sliding_val_bpb")  # absent or null in a run with SLIDING_EVAL=0
TEXTS = ("device", "gpu_name", "torch_version", "code_sha256", "artifact_sha256")
SETTINGS = """data_path tokenizer_path num_layers model_dim vocab_size bitnet_group_size matrix_optimizer
    train_batch_tokens""".split()  # that submission.json names


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
        return self.content[: self.result["code_bytes"]]

    @property
    def hardware(self):
        """"8 x NVIDIA H100 80GB HBM3", or the processes of a run without a GPU."""
        name = self.result["gpu_name"] if self.result["device"] == "cuda" else "CPU process"
        return f"{self.result['world_size']} x {name}"


def read_run(path):
    """The Run of a log; UserError unless it holds a whole one."""
    try:
        content = Path(path).read_bytes()
        lines = content.decode().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not a readable log: {error}") from None
    config_at, result_at = last_line(lines, "config {"), last_line(lines, "result {")
    if result_at is None:
        raise UserError(f"{path}: no result line: the run did not finish")
    if config_at is None or config_at > result_at:
        raise UserError(f"{path}: no config line before the result line: not the log of one whole run")
    config, result = parse_object(path, lines[config_at]), parse_object(path, lines[result_at])
    run = Run(Path(path), config, result, content, tuple(lines[max(0, config_at - 1) :]))
    if absent := [name for name in SETTINGS if name not in run.config]:
        raise UserError(f"{path}: the config line lacks {', '.join(absent)}")
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

    try:
        return json.loads(text, parse_constant=refuse, parse_float=finite)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: the {kind} line is not whole JSON: {error}") from None


def check_result(run):
    """Every figure that submission.json needs is there and of its kind."""
    for names, kinds, expected in ((COUNTS, int, "a whole number"), (MEASURES, (int, float), "a number"), (TEXTS, str, "a text")):
        for name in names:
            need(run, name, kinds, expected)
    for name in SLIDING:
        if run.result.get(name) is not None:
            need(run, name, (int, float), "a number")


def need(run, name, kinds, expected):
    value = run.result.get(name)
    if not isinstance(value, kinds) or isinstance(value, bool):
        raise UserError(f"{run.log}: the result line has {name} {value!r}, expected {expected}")


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
