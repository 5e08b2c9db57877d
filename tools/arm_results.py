"""The records of bench/arms.py, a line a run in results.jsonl, and what is computed with them.

For bench/arms.py and tools/plot_logs.py; this file is no command.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import command_line

# -------------------------------------------------------------------------------------------------- records

# What a table computes with, and what it shows where it is there
NEEDED = {"result": ("val_bpb", "roundtrip_val_bpb", "steps"), "web": ("roundtrip_val_bpb",)}
SHOWN = ("sliding_val_bpb", "ms_per_step", "params", "artifact_bytes", "zero_frac")


def identity(arm: str, seed: int, settings: dict[str, str]) -> tuple[str, int, str]:
    return arm, seed, json.dumps(settings, sort_keys=True)


def identity_of(record: dict[str, Any]) -> tuple[str, int, str]:
    return identity(record["arm"], record["seed"], record["settings"])


def failure(record: dict[str, Any]) -> str:
    """Why a run has no scores; "" for one that has."""
    parts = (record, record.get("result", {}), record.get("web", {}))
    return next((part["error"] for part in parts if "error" in part), "")


def said_of(record: dict[str, Any]) -> str:
    if failure(record):
        return failure(record)
    web = f", {record['web']['roundtrip_val_bpb']:.4f} on the web text" if "web" in record else ""
    return "{val_bpb:.4f} bits per byte, {steps} steps".format(**record["result"]) + web


def read_results(path: Path) -> list[dict[str, Any]]:
    """The records of a file; lines that an interruption left half-written, or that are no record, are named and left out."""
    records = []
    for number, line in enumerate(path.read_bytes().split(b"\n") if path.exists() else [], 1):
        try:
            record = json.loads(line) if line.strip() else None
            problem = "" if record is None else problem_of_record(record)
        except (ValueError, RecursionError):
            record, problem = None, "half a record"
        if problem:
            print(f"{path}, line {number}: {problem}, left out", file=sys.stderr)
        elif record is not None:
            records.append(record)
    return records


def problem_of_record(record: Any) -> str:
    """Why a line of results.jsonl is no record that a table can show; "" if it is one."""
    parts = [record, *(record.get(name, {}) for name in ("settings", "result", "web"))] if isinstance(record, dict) else [None]
    if not all(isinstance(part, dict) for part in parts):
        return "not a record"
    if not isinstance(record.get("arm"), str) or not is_number(record.get("seed")) or "settings" not in record:
        return "a record without arm, seed or settings"
    if failure(record):
        return ""
    for part in ("result", "web")[: 1 + ("web" in record)]:
        missing = [name for name in NEEDED[part] if not is_number(record.get(part, {}).get(name))]
        odd = [name for name in SHOWN if record.get(part, {}).get(name) is not None and not is_number(record[part][name])]
        if missing or odd:
            return f"a record whose {part} has no number as {', '.join(missing or odd)}"
    return ""


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e15


def append_result(path: Path, record: dict[str, Any]) -> None:
    """A line of its own, also behind a line that was not finished."""
    with path.open("ab+") as f:
        f.seek(max(0, f.seek(0, os.SEEK_END) - 1))
        f.write((b"" if f.read() in (b"", b"\n") else b"\n") + json.dumps(record).encode() + b"\n")


def in_order(records: list[dict[str, Any]], arms: list[str]) -> list[dict[str, Any]]:
    """The newest record of each arm and seed: arms in the order of the list, others behind them as they came."""
    newest = {(r["arm"], r["seed"]): r for r in records}
    order = list(dict.fromkeys([*arms, *(arm for arm, _ in newest)]))
    return sorted(newest.values(), key=lambda r: (order.index(r["arm"]), r["seed"]))


# -------------------------------------------------------------------------------------------------- estimates


class Estimate(NamedTuple):
    """A mean over seeds and its standard error, None where one seed cannot tell."""

    mean: float
    error: float | None
    count: int

    def __str__(self) -> str:
        return f"{self.mean:+.4f}" + ("" if self.error is None else f" ± {self.error:.4f}")


def estimate(values: Iterable[float]) -> Estimate:
    values = list(values)
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return Estimate(statistics.fmean(values), error, len(values))


def welch(new: Iterable[float], base: Iterable[float]) -> Estimate:
    """Difference of two means; each arm's own spread makes its error."""
    a, b = estimate(new), estimate(base)
    error = None if a.error is None or b.error is None else math.hypot(a.error, b.error)
    return Estimate(a.mean - b.mean, error, min(a.count, b.count))


def paired(new: dict[int, float], base: dict[int, float]) -> Estimate | None:
    """Mean difference over the seeds that both have."""
    differences = [new[seed] - base[seed] for seed in sorted(new.keys() & base.keys())]
    return estimate(differences) if differences else None


class Scores(NamedTuple):
    """An arm's finished runs, by seed."""

    arm: str
    runs: dict[int, dict[str, Any]]  # seed -> record

    def of(self, part: str, key: str) -> dict[int, float]:
        """Seed -> a score of "result" or "web"; empty unless every run has it."""
        found = {seed: run.get(part, {}).get(key) for seed, run in self.runs.items()}
        return {} if None in found.values() else found

    def both(self, key: str, web_key: str) -> dict[int, float]:
        """Seed -> the mean of both sets, or the score of the one there is."""
        own, web = self.of("result", key), self.of("web", web_key)
        return {seed: (own[seed] + web[seed]) / 2 for seed in own} if web else own

    @property
    def chunked(self) -> dict[int, float]:
        return self.both("val_bpb", "roundtrip_val_bpb")

    @property
    def sliding(self) -> dict[int, float]:
        return self.both("sliding_val_bpb", "sliding_val_bpb")


def scores_of(records: list[dict[str, Any]]) -> list[Scores]:
    """The arms that have scores, in the records' order."""
    good = [r for r in records if not failure(r)]
    return [Scores(arm, {r["seed"]: r for r in good if r["arm"] == arm}) for arm in dict.fromkeys(r["arm"] for r in good)]


def spread_of_one(first: Scores) -> float | None:
    """Standard error of the difference of a single seed, if other arms' seeds lie as far apart as this one's; None with one seed."""
    values = list(first.chunked.values())
    return statistics.stdev(values) * math.sqrt(1 + 1 / len(values)) if len(values) > 1 else None


def effects(done: list[Scores]) -> dict[str, Estimate]:
    """Arm -> its difference against the first, in bits per byte; the first itself is left out."""
    return {scores.arm: welch(scores.chunked.values(), done[0].chunked.values()) for scores in done[1:]}


if __name__ == "__main__":
    command_line.not_a_command("bench/arms.py")
