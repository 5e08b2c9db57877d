"""The tables that `bench/gpu_queue.sh first`, the line that `recipe` ends with, from the figures; ready for RESULTS.md.

    python bench/gpu_table.py OUT/first.jsonl OUT/figures.jsonl      tables of all that is there
    python bench/gpu_table.py --recipe OUT/recipe.jsonl              one line: the default against configs/pr640.env
    python bench/gpu_table.py --usable OUT/first.jsonl               KERNELS=... COMPILE_MODE=... without what failed the self-check

A line of a file is a part: its stage, name and outcome, with the `result` of a run of train_gpt.py or the `figures` of
bench/step.py. Of parts with the same name the last counts. What failed or did not run shows as such: nothing is left out.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))

from command_line import OneLineParser, start  # noqa: E402

MODELS = "default", "pr640"
BASE = "this checkout"  # the arm of bench/step.py that the others are compared with
OPERATIONS = "matmul", "norm", "qk", "attention", "mlp", "loss", "score"  # KERNELS of train_gpt.py
UNIT = "ms / 65,536 tokens"

# R009's rows: a lever, and the arm of `levers` that switches it on, or off
LEVERS = [
    ("loss with its gradient written over the logits", "without loss"),
    ("relu^2 MLP", "without mlp"),
    ("QK-norm, rotation and gain one kernel each way", "without qk"),
    ("ACT_QUANT=fp8", "ACT_QUANT=fp8"),
    ("NUM_HEADS=6 NUM_KV_HEADS=3", "NUM_HEADS=6 NUM_KV_HEADS=3"),
    ("PARALLEL_BLOCKS=1", "PARALLEL_BLOCKS=1"),
    ("ATTENTION_FREE_LAYERS=1", "ATTENTION_FREE_LAYERS=1"),
]


class BadFigures(ValueError):
    """A file that is none of gpu_queue.sh's; the text says why, in one line."""


class Parts(NamedTuple):
    """What the parts have left, by name."""

    outcomes: dict[str, str]
    results: dict[str, dict]  # of train_gpt.py
    arms: dict[str, dict[str, dict]]  # of bench/step.py

    @classmethod
    def read(cls, paths: list[Path]) -> Parts:
        records = {}
        for path in paths:
            for i, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
                try:
                    record = json.loads(line)
                    records[record["name"]] = record | {"outcome": record["outcome"]}
                except (ValueError, KeyError, TypeError):
                    raise BadFigures(f"{path}, line {i}: expected a part of bench/gpu_queue.sh as JSON") from None
        results = {name: record["result"] for name, record in records.items() if record.get("result")}
        arms = {name: record["figures"].get("arms", {}) for name, record in records.items() if record.get("figures")}
        return cls({name: record["outcome"] for name, record in records.items()}, results, arms)

    def arm(self, part: str, name: str = BASE) -> dict:
        return self.arms.get(part, {}).get(name, {})


def table(columns: list[str], rows: list[list[str]]) -> None:
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for row in rows:
        print(f"| {' | '.join(row)} |")
    print()


def shown(value: float | None, form: str = ",.2f") -> str:
    return "-" if value is None else format(value, form)


def difference(values: list[float | None]) -> float | None:
    return None if None in values else values[1] - values[0]


def usable(parts: Parts) -> str:
    """Settings without what failed the self-check of any run; nothing where all of it passed."""
    off = {name for result in parts.results.values() for name in result["kernels_off"]}
    if "FlashAttention-3" in off:  # a run by itself would take it again
        off.add("attention")
    words = []
    if "all" in off:
        words.append("KERNELS=off")
    elif off & set(OPERATIONS):
        words.append("KERNELS=" + ",".join(name for name in OPERATIONS if name not in off))
    if "compile" in off:
        words.append("COMPILE_MODE=none")
    elif "compiled_score" in off:
        words.append("COMPILE_MODE=training")
    return " ".join(words)


def print_parts(parts: Parts) -> None:
    print("Parts\n")
    table(["part", "outcome"], [[name, outcome] for name, outcome in parts.outcomes.items()])


def print_check(parts: Parts) -> None:
    """Of each run that checked itself: an operation's largest relative error, or why it is off."""
    rows = []
    for part, result in parts.results.items():
        rows += [[part, name, f"{error:.1e}", "fast"] for name, error in result["kernels"].items()]
        rows += [[part, name, "-", f"OFF: {reason}"] for name, reason in result["kernels_off"].items()]
    print("Self-check: largest relative error of values and gradients against plain PyTorch\n")
    table(["part", "operation", "error", "used"], rows or [["check", "-", "-", parts.outcomes.get("check", "not run")]])


def kernels_gain(parts: Parts, model: str) -> float | None:
    """Milliseconds that all kernels together take off a step of 65,536 tokens."""
    return difference([parts.arm(f"{part} {model}").get("unit_ms") for part in ("step", "off")])


def measured(parts: Parts) -> list[list[str]]:
    """A row a quantity: both models, and the second less the first."""
    step, off = ([parts.arm(f"{part} {model}") for model in MODELS] for part in ("step", "off"))
    runs = [parts.results.get(f"train {model}", {}) for model in MODELS]
    gib = [run.get("peak_memory_bytes") and run["peak_memory_bytes"] / 2**30 for run in runs]
    lines = [
        ("ms a step", [f.get("ms") for f in step], ",.2f"),
        (UNIT, [f.get("unit_ms") for f in step], ",.2f"),
        ("tokens/s", [f.get("tokens_s") for f in step], ",.0f"),
        ("of the peak", [f.get("share_of_peak") for f in step], ".1%"),
        (f"{UNIT}, KERNELS=off", [f.get("unit_ms") for f in off], ",.2f"),
        (f"kernels save, {UNIT}", [kernels_gain(parts, model) for model in MODELS], ",.2f"),
        ("first loss, KERNELS=off less kernels", [difference([a.get("first_loss"), b.get("first_loss")]) for a, b in zip(step, off, strict=True)], "+.1e"),
        ("last loss, KERNELS=off less kernels", [difference([a.get("last_loss"), b.get("last_loss")]) for a, b in zip(step, off, strict=True)], "+.1e"),
        *((name, [run.get(key) for run in runs], form) for name, key, form in (
            ("trained: steps", "steps", ",.0f"), ("trained: ms a step", "ms_per_step", ",.2f"), ("bits per byte", "val_bpb", ".4f"),
            ("round trip", "roundtrip_val_bpb", ".4f"), ("sliding, stride 64", "sliding_val_bpb", ".4f"),
            ("artifact bytes", "artifact_bytes", ",.0f"), ("graphs compiled late", "late_graphs", ",.0f"))),
        ("peak memory of the run, GiB", gib, ".2f"),
        ("peak memory of a step, GiB", [f.get("memory_gib") for f in step], ".2f"),
        ("peak memory of a step, KERNELS=off, GiB", [f.get("memory_gib") for f in off], ".2f"),
    ]  # fmt: skip
    return [[name, *(shown(value, form) for value in values), shown(difference(values), "+" + form.lstrip("+"))] for name, values, form in lines]


def print_evaluation(parts: Parts) -> None:
    rows = []
    for stride, found in parts.arm("eval").get("evaluation", {}).items():
        rates = [found[path]["windows"] / found[path]["s"] for path in ("fast", "plain", "plain_batched")]
        rows.append([stride, *(f"{rate:,.1f}" for rate in rates), f"{found['plain_batched']['difference']:+.1e}"])
    print("Evaluation, windows a second\n")
    columns = ["stride", "fast", "plain", "plain, batched", "bits per byte, fast less plain"]
    table(columns, rows or [["16", *["-"] * 3, parts.outcomes.get("eval", "not run")]])


def levers(parts: Parts) -> list[list[str]]:
    """What R009's column holds: milliseconds that a lever takes off a step of 65,536 tokens."""
    own, rows = parts.arm("levers").get("unit_ms"), []
    for lever, arm in LEVERS:
        other = parts.arm("levers", without(arm)).get("unit_ms")
        gain = difference([own, other])
        rows.append([lever, shown(gain if gain is None or arm.startswith("without") else -gain, "+.2f")])
    together = ["all kernels together (KERNELS=off against the default)", *(shown(kernels_gain(parts, model), "+.2f") for model in MODELS[:1])]
    return [*rows, together]


def without(arm: str) -> str:
    """The settings of an arm that leaves out an operation."""
    name = arm.removeprefix("without ")
    return arm if name == arm else "KERNELS=" + ",".join(other for other in OPERATIONS if other != name)


def print_tables(parts: Parts) -> None:
    where = next(iter(parts.results.values()), {})
    print(f"{where.get('gpu_name', 'no run has come to its end')}, torch {where.get('torch_version', '-')}, commit "
          f"{where.get('git_commit', '-')}; attention: {where.get('attention', '-')}\n")  # fmt: skip
    print_parts(parts)
    print_check(parts)
    print("Measured\n")
    table(["", *MODELS, "difference"], measured(parts))
    print_evaluation(parts)
    print(f"R009's column, {UNIT} (stage levers for what is open)\n")
    table(["lever", "measured"], levers(parts))


def recipe_line(parts: Parts) -> str:
    """The default less pr640.env in bits per byte, equal seconds, one seed; BadFigures where a run has no result."""
    said = []
    for model in ("pr640", "default"):
        if (run := parts.results.get(f"train {model}")) is None:
            raise BadFigures(f"train {model}: no result ({parts.outcomes.get(f'train {model}', 'not run')})")
        said.append(run)
    try:
        (control, ours), scores = said, [(run["sliding_val_bpb"], run["roundtrip_val_bpb"]) for run in said]
        sliding, chunked = (b - a for a, b in zip(*scores, strict=True))
        return (
            f"recipe: {ours['gpu_name']}, seed {ours['seed']}, {control['train_time_s']:.1f} and {ours['train_time_s']:.1f} s, "
            f"{control['steps']} and {ours['steps']} steps, pr640 {scores[0][0]:.4f}, default {scores[1][0]:.4f} bits per byte in windows "
            f"{ours['stride']} apart: {sliding:+.4f} (chunked {chunked:+.4f}); "
            f"{control['artifact_bytes']:,} and {ours['artifact_bytes']:,} bytes"
        )
    except (KeyError, TypeError) as error:
        raise BadFigures(f"a result lacks a score: {error}") from None


def main() -> int:
    parser = OneLineParser(__doc__)
    parser.add_argument("--usable", action="store_true", help="print the settings that can run here")
    parser.add_argument("--recipe", action="store_true", help="print the line of the stage recipe")
    parser.add_argument("figures", nargs="+", type=Path, metavar="FILE")
    args = parser.parse_args()
    parts: Any = Parts.read(args.figures)
    if args.usable:
        print(usable(parts))
    else:
        print(recipe_line(parts)) if args.recipe else print_tables(parts)
    return 0


if __name__ == "__main__":
    start(main, BadFigures)
