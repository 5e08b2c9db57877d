"""How fast training and evaluation are on this device, and where the time goes; two checkouts or settings side by side.

    python bench/step.py                                  a training step of the default model; settings as for train_gpt.py
    python bench/step.py --preset configs/pr640.env       a preset; what stands in the environment wins
    python bench/step.py --against ../old --with KEY=VALUE KEY=VALUE --with KEY=VALUE
                                                          other arms: a checkout's folder; this checkout with other settings
    python bench/step.py --eval                           chunked and sliding evaluation, against the plain one
    python bench/step.py --startup                        seconds from launch to the first timed step, cold and warm cache
    python bench/step.py --world 8                        communication of a step at 8 processes; nothing is timed

Arms are processes (bench/step_worker.py) that live side by side on one device and take turns, a few steps each, so that clocks,
temperature and other load fall on all alike. Weights are drawn as they look after training (no matrix at its initial zeros),
tokens come from DATA_PATH, or are Zipf-distributed where there are none, and the output says which.

Step. Milliseconds are medians over the rounds; a round is the median of its steps; ratios are taken within a round. A step is the
real one: next batch, micro-batches forward and backward, optimizers, rounding. "ms / 65,536 tokens" is that step divided by its
tokens: the optimizer's share is that of TRAIN_BATCH_TOKENS on one process. Model FLOPs: `flops_a_token` in bench/step_worker.py.
"of peak": of the matrix product measured in the same run (8192^3 in bfloat16 on a GPU). Kernel groups: bench/kernel_groups.py.
On a GPU idle is the unprofiled step minus its kernels, since profiling slows the host; on a CPU all but PyTorch's operations.

Evaluation. The model comes from its own artifact. The fast path is train_gpt.evaluate; plain is uncompiled, computes all logits
of every window, one window at a time ("plain") and as many as fit ("plain, batched", what #640 does); both are given the same
targets, whose bits per byte are compared. The full split is FineWeb's validation split; processes share the windows evenly.

Communication. A ring sends, from each of n processes, for S bytes: all-reduce 2 (n-1)/n S; reduce-scatter (n-1)/n S of the whole;
all-gather (n-1)/n S of the result. The time is what is sent over the bus bandwidth: nccl-tests' busbw is defined so. 330 and
400 GB/s: what H100s on NVLink are reported to reach, not measured here.

Start-up. train_gpt.py is launched twice with caches in one fresh folder and ended at its first step.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import numpy as np
from kernel_groups import GROUPS

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))

from command_line import BadArguments, OneLineParser, read_preset, start  # noqa: E402

WORKER = Path(__file__).resolve().with_name("step_worker.py")
UNIT_TOKENS = 65_536  # one process's share of the default step on 8 GPUs
FINEWEB_VAL_TOKENS = 40_540_000
BUS_BANDWIDTHS_GB_S = (330, 400)
GPUS = 8


class ArmFailed(Exception):
    """An arm that cannot be measured; the text says why, in one line."""


@dataclass
class Arm:
    """A worker process for one checkout and one environment."""

    name: str
    folder: Path
    settings: dict[str, str]
    info: dict = field(default_factory=dict)  # what the worker said of itself
    process: subprocess.Popen | None = None
    errors: IO[str] | None = None  # what the worker writes to stderr

    def open(self) -> None:
        if not (self.folder / "train_gpt.py").is_file():
            raise ArmFailed(f"{self.folder}: no train_gpt.py there")
        self.info = {}
        self.errors = tempfile.TemporaryFile("w+", encoding="utf-8")
        command, env = [sys.executable, str(WORKER), str(self.folder)], os.environ | self.settings
        self.process = subprocess.Popen(command, env=env, text=True, bufsize=1, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        stderr=self.errors)  # fmt: skip

    def send(self, do: str, **arguments: object) -> None:
        with contextlib.suppress(BrokenPipeError):  # the reader sees the end of the output, and says why
            print(json.dumps({"do": do} | arguments), file=self.process.stdin)

    def receive(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            self.process.wait()
            self.errors.seek(0)
            raise ArmFailed((self.errors.read().strip().splitlines() or [f"ended with {self.process.returncode}"])[-1])
        answer = json.loads(line)
        if "error" in answer:
            raise ArmFailed(answer["error"])
        return answer

    def ask(self, do: str, **arguments: object) -> dict:
        self.send(do, **arguments)
        return self.receive()

    def close(self) -> None:
        if self.process:
            with contextlib.suppress(BrokenPipeError):
                self.process.stdin.close()
            self.process.stdout.close()
            self.process.wait()
            self.errors.close()
            self.process = None


def quartiles(values: Iterable[float]) -> tuple[float, float, float]:
    return tuple(np.percentile(list(values), (25, 50, 75)).tolist())


def table(columns: list[str], rows: Iterable[list[str]]) -> None:
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for row in rows:
        print(f"| {' | '.join(row)} |")
    print(flush=True)


class Bench:
    """The arms of a run, and what was measured: `results` is what --json writes."""

    def __init__(self, args: argparse.Namespace, scratch: Path) -> None:
        self.args, self.scratch = args, scratch
        preset = read_preset(args.preset) if args.preset else {}
        common = {key: value for key, value in preset.items() if key not in os.environ}
        self.base = Arm("this checkout", ROOT, common)
        self.others = [Arm(str(folder), folder.resolve(), common) for folder in args.against]
        self.others += [Arm(" ".join(pairs), ROOT, common | dict(pair.split("=", 1) for pair in pairs)) for pairs in args.with_]
        self.results: dict = {"argv": sys.argv[1:], "arms": {}, "failed": {}}

    def together(self, arms: list[Arm], do: str, **arguments: object) -> dict[str, dict]:
        """All arms at once; for what is not timed. An arm that fails drops out of `arms`, unless it is the base."""
        for arm in arms:
            arm.send(do, **arguments)
        answers = {}
        for arm in list(arms):
            with self.surviving(arms, arm):
                answers[arm.name] = arm.receive()
        return answers

    @contextlib.contextmanager
    def surviving(self, arms: list[Arm], arm: Arm) -> Iterator[None]:
        """An arm that fails within it is closed and drops out of `arms`; without the base there is nothing to go on with."""
        try:
            yield
        except ArmFailed as error:
            arms.remove(arm)
            arm.close()
            if arm is self.base:
                raise
            self.results["failed"][arm.name] = str(error)
            print(f"FAILED {arm.name}: {error}\n", flush=True)

    def open(self, arms: list[Arm]) -> None:
        for arm in list(arms):
            if arm.process is None:
                with self.surviving(arms, arm):
                    arm.open()
        for name, info in self.together(
            [arm for arm in arms if not arm.info], "start", synthetic=str(self.scratch / "tokens")
        ).items():
            next(arm for arm in arms if arm.name == name).info = info
        arms[:] = [arm for arm in arms if arm.process]

    def groups(self) -> Iterator[list[Arm]]:
        """The base with up to --at-once others, all open; where there are more of them, these are closed afterwards."""
        for i in range(0, max(1, len(self.others)), self.args.at_once):
            arms = [self.base, *self.others[i : i + self.args.at_once]]
            self.open(arms)
            if "machine" not in self.results:
                self.print_machine()
            yield arms
            self.write()
            if len(self.others) > self.args.at_once:
                for arm in arms[1:]:
                    arm.close()
        self.others = [arm for arm in self.others if arm.name not in self.results["failed"]]

    def print_machine(self) -> None:
        info = self.base.info
        self.results["machine"] = info
        where = info["gpu"] if info["device"] == "cuda" else f"CPU, {info['threads']} threads"
        data = "synthetic Zipf tokens: DATA_PATH holds no shards" if info["synthetic"] else "shards of DATA_PATH"
        print(f"torch {info['torch']}, {where}, {info['dtype']}, {info['attention']}; {data}\n", flush=True)

    def write(self) -> None:
        if self.args.json:
            self.args.json.write_text(json.dumps(self.results))

    # ---- training step

    def measure_steps(self) -> None:
        profiles: dict[str, dict] = {}
        for arms in self.groups():
            described = self.together(arms, "describe")
            for name, answer in self.together(arms, "steps", count=self.args.warmup).items():
                described[name]["first_loss"] = answer["losses"][0]
            peaks = [self.measure_peak()]
            rounds = self.alternate(arms)
            peaks.append(self.measure_peak())
            self.print_steps([self.step_figures(arm, described[arm.name], rounds, max(peaks)) for arm in arms])
            if self.args.profile_steps:
                for arm in arms:
                    if arm.name not in profiles and (found := self.profile(arm)):
                        profiles[arm.name] = found
                self.print_profiles({arm.name: profiles[arm.name] for arm in arms if arm.name in profiles})

    def measure_peak(self) -> float:
        size, count = (8192, 30) if self.base.info["device"] == "cuda" else (self.args.cpu_peak_size, 5)
        self.results["peak_size"] = size
        return self.base.ask("peak", size=size, count=count)["flops_s"]

    def alternate(self, arms: list[Arm]) -> dict[str, list[dict]]:
        """The rounds of each arm; each round begins with another arm, and with a step that is not counted."""
        rounds: dict[str, list[dict]] = {arm.name: [] for arm in arms}
        for i in range(self.args.rounds):
            turn = i % len(arms)
            for arm in arms[turn:] + arms[:turn]:
                with self.surviving(arms, arm):
                    answer = arm.ask("steps", count=self.args.steps + 1)
                    rounds[arm.name].append(answer | {"ms": answer["ms"][1:], "order": sum(map(len, rounds.values()))})
        return rounds

    def step_figures(self, arm: Arm, described: dict, rounds: dict[str, list[dict]], peak: float) -> dict:
        """What the table shows of an arm; the ratio is to the base of the same group."""
        own, base = ([float(np.median(r["ms"])) for r in rounds[name]] for name in (arm.name, self.base.name))
        tokens, flops = arm.info["step_tokens"], sum(described["flops"].values())
        low, ms, high = quartiles(own)
        rate = tokens / ms * 1000
        figures = {"arm": arm.name, "ms": ms, "quartiles": [low, high], "rounds": own,
                   "order": [r["order"] for r in rounds[arm.name]], "step_tokens": tokens,
                   "unit_ms": ms * UNIT_TOKENS / tokens, "tokens_s": rate,
                   "flops_s": rate * flops, "peak_flops_s": peak,
                   "share_of_peak": rate * flops / peak, "ratio": quartiles(a / b for a, b in zip(own, base, strict=True)),
                   "memory_gib": rounds[arm.name][-1]["memory_gib"], "last_loss": rounds[arm.name][-1]["losses"][-1],
                   "recompiled": sum(r["recompiled"] for r in rounds[arm.name])} | described  # fmt: skip
        self.results["arms"].setdefault(arm.name, {}).update(figures)
        return figures

    def profile(self, arm: Arm) -> dict | None:
        """Milliseconds of a step by group with idle, and the wall time they add up to; None, and why is printed, if it fails."""
        try:
            answer = arm.ask("profile", count=self.args.profile_steps)
        except ArmFailed as error:
            self.results["failed"][f"profile of {arm.name}"] = str(error)
            print(f"FAILED profile of {arm.name}: {error}\n", flush=True)
            return None
        groups, busy = answer["groups"], sum(answer["groups"].values())
        wall = max(busy, self.results["arms"][arm.name]["ms"] if arm.info["device"] == "cuda" else answer["wall_ms"])
        groups["idle"] = wall - busy
        found = {"groups": groups, "wall_ms": wall, "profiled_wall_ms": answer["wall_ms"], "step_tokens": arm.info["step_tokens"]}
        self.results["arms"][arm.name]["profile"] = found
        return found

    def print_steps(self, figures: list[dict]) -> None:
        base = figures[0]
        parts = " + ".join(f"{value / 1e6:.2f} {name}" for name, value in base["flops"].items())
        print(f"model FLOPs a token: {sum(base['flops'].values()) / 1e6:.2f} M = {parts}; {base['params']:,} parameters, "
              f"zero fraction {base['zero_frac']:.3f}\na step: {base['step_tokens']:,} tokens in {base['micro_batches']} "
              f"micro-batches; peak {base['peak_flops_s'] / 1e12:.4g} TFLOP/s ({self.results['peak_size']}^3)\n")  # fmt: skip
        table(["arm", "ms a step (quartiles)", "ms / 65,536 tokens", "tokens/s", "TFLOP/s", "of peak",
               "time against this checkout (quartiles)", "GiB", "first and last loss"], map(self.step_row, figures))  # fmt: skip
        for f in figures:
            if f["recompiled"]:
                print(f"RECOMPILED {f['recompiled']} graphs during the timed steps: {f['arm']}\n")

    def step_row(self, f: dict) -> list[str]:
        low, ratio, high = f["ratio"]
        against = "" if f["arm"] == self.base.name else f"{ratio:.4f} ({low:.4f} to {high:.4f})"
        memory = "" if f["memory_gib"] is None else f"{f['memory_gib']:.1f}"
        ms, losses = "{:.2f} ({:.2f} to {:.2f})".format(f["ms"], *f["quartiles"]), f"{f['first_loss']:.4f} {f['last_loss']:.4f}"
        return [f["arm"], ms, f"{f['unit_ms']:.2f}", f"{f['tokens_s']:,.0f}", f"{f['flops_s'] / 1e12:.4g}",
                f"{f['share_of_peak']:.1%}", against, memory, losses]  # fmt: skip

    def print_profiles(self, profiles: dict[str, dict]) -> None:
        print(
            f"ms / 65,536 tokens by kernel group, and share of the wall time; {self.args.profile_steps} profiled step(s) an arm\n"
        )
        rows = [[name, *(self.profile_cell(p, p["groups"][name]) for p in profiles.values())] for name in GROUPS]
        rows.append(["wall", *(self.profile_cell(p, p["wall_ms"]) for p in profiles.values())])
        table(["group", *profiles], rows)

    @staticmethod
    def profile_cell(p: dict, ms: float) -> str:
        return f"{ms * UNIT_TOKENS / p['step_tokens']:.2f} ({ms / p['wall_ms']:.1%})"

    # ---- evaluation

    def measure_evaluation(self) -> None:
        for arms in self.groups():
            info = self.base.info
            gpu, windows = info["device"] == "cuda", self.args.eval_windows or (4096 if info["device"] == "cuda" else 32)
            sliding = [(info["window"], stride) for stride in self.args.stride or [info["stride"]]]
            for length, stride in [(info["seq_len"],) * 2, *sliding]:
                tokens = length + stride * (windows - 1)
                self.together(arms, "evaluate", stride=stride, tokens=tokens)  # compiles
                fast = self.alternate_scores(arms, stride, tokens)
                plain = {}
                for arm in list(arms):
                    with self.surviving(arms, arm):
                        plain[arm.name] = self.plain(arm, stride, gpu)
                self.print_evaluation(arms, (length, stride), fast, plain)

    def print_evaluation(
        self, arms: list[Arm], window: tuple[int, int], fast: dict[str, dict], plain: dict[str, list[dict]]
    ) -> None:
        print(f"evaluation, windows of {window[0]} every {window[1]} targets\n")
        table(["arm", "path", "ms a batch", "windows a batch", "windows/s", "tokens/s", "full split, 1 process",
               f"{GPUS} processes", "time against plain, batched", "fast path's time against this checkout (quartiles)"],
              [row for arm in arms for row in self.evaluation_rows(arm, window, fast, plain[arm.name])])  # fmt: skip
        unit = "token" if self.base.info["synthetic"] else "byte"
        table(["arm", "windows", "targets", f"plain, bits per {unit}", "fast - plain", "fast - plain, batched"],
              ([arm.name, f"{one['windows']:,}", f"{one['targets']:,}", f"{one['bpb']:.6f}", f"{one['difference']:+.1e}",
                f"{many['difference']:+.1e}"] for arm in arms for one, many in [plain[arm.name]]))  # fmt: skip

    def alternate_scores(self, arms: list[Arm], stride: int, tokens: int) -> dict[str, dict]:
        """The fast path of each arm: seconds of every round beside the figures of the last one."""
        found: dict[str, dict] = {arm.name: {"rounds": []} for arm in arms}
        for i in range(self.args.rounds):
            turn = i % len(arms)
            for arm in arms[turn:] + arms[:turn]:
                with self.surviving(arms, arm):
                    answer = arm.ask("evaluate", stride=stride, tokens=tokens)
                    found[arm.name] |= answer | {"rounds": [*found[arm.name]["rounds"], answer["s"]]}
        return found

    def plain(self, arm: Arm, stride: int, gpu: bool) -> list[dict]:
        """The plain path, a window at a time and batched."""
        windows = self.args.plain_windows or (256 if gpu else 8)
        return [arm.ask("plain", stride=stride, windows=windows, rows=rows) for rows in (1, windows)]

    def evaluation_rows(self, arm: Arm, window: tuple[int, int], fast: dict[str, dict], plain: list[dict]) -> list[list[str]]:
        own, base = fast[arm.name], fast[self.base.name]
        own["s"] = float(np.median(own["rounds"]))
        low, ratio, high = quartiles(a / b for a, b in zip(own["rounds"], base["rounds"], strict=True))
        paths = [("fast", own, own["batches"], own["batch"]), ("plain", plain[0], plain[0]["windows"], 1),
                 ("plain, batched", plain[1], math.ceil(plain[1]["windows"] / plain[1]["rows"]), plain[1]["rows"])]  # fmt: skip
        rows, batched = [], plain[1]["s"] / plain[1]["windows"]
        for path, p, batches, size in paths:
            rate = p["windows"] / p["s"]
            full_s = full_windows(*window) / rate
            against = f"{ratio:.4f} ({low:.4f} to {high:.4f})" if path == "fast" and arm is not self.base else ""
            rows.append([arm.name, path, f"{1000 * p['s'] / batches:.2f}" if batches else "-", f"{size or '-'}", f"{rate:,.1f}",
                         f"{rate * window[0]:,.0f}", f"{full_s:,.1f} s", f"{full_s / GPUS:,.1f} s", f"{1 / rate / batched:.3f}",
                         against])  # fmt: skip
        record = {"fast": own, "plain": plain[0], "plain_batched": plain[1], "ratio": [low, ratio, high]}
        self.results["arms"].setdefault(arm.name, {}).setdefault("evaluation", {})[str(window[1])] = record
        return rows

    # ---- checkpoints

    def measure_checkpoint(self) -> None:
        """A checkpoint's cost as a share of the time at one a minute: the copy, and what the write takes from the steps."""
        rows = []
        for arms in self.groups():
            self.together(arms, "steps", count=self.args.warmup)
            answers = self.together(arms, "checkpoint", count=self.args.steps, rounds=self.args.rounds)
            for name, answer in answers.items():
                self.results["arms"].setdefault(name, {})["checkpoint"] = answer
                held, extra, written = (quartiles(answer[key]) for key in ("held_ms", "extra_ms", "written_ms"))
                rows.append([name, f"{answer['bytes'] / 1e6:.1f}", *("{1:.1f} ({0:.1f} to {2:.1f})".format(*q) for q in (held, extra, written)),
                             f"{held[1] / 60_000:.3%}", f"{extra[1] / 60_000:.3%}"])  # fmt: skip
        table(["arm", "MB", "ms held up by the copy (quartiles)", "ms in all (quartiles)", "ms until written", "copy, at one a minute", "in all"], rows)

    # ---- communication and start-up

    def print_communication(self) -> None:
        for arms in self.groups():
            for name, answer in self.together(arms, "communication", world_size=self.args.world).items():
                same = [
                    (what, [size for other, size in answer["rows"] if other == what])
                    for what in dict.fromkeys(w for w, _ in answer["rows"])
                ]
                rows = [[f"{what}, {len(sizes)} calls" if len(sizes) > 1 else what, sum(sizes),
                         sent_bytes(what, sum(sizes), self.args.world)] for what, sizes in same]  # fmt: skip
                rows.append(["sum", *(sum(row[i] for row in rows) for i in (1, 2))])
                self.results["arms"].setdefault(name, {})["communication"] = rows
                print(f"{name}: a step at {self.args.world} processes, sent by each; computed, not measured\n")
                table(["what", "MB in all", "MB sent", *(f"ms at {speed} GB/s" for speed in BUS_BANDWIDTHS_GB_S)],
                      ([what, f"{size / 1e6:.2f}", f"{sent / 1e6:.2f}",
                        *(f"{sent / speed / 1e6:.3f}" for speed in BUS_BANDWIDTHS_GB_S)]
                       for what, size, sent in rows))  # fmt: skip

    def measure_startup(self) -> None:
        rows = []
        for arm in (self.base, *self.others):
            try:
                cold, warm = startup(arm, self.scratch)
            except ArmFailed as error:
                self.results["failed"][arm.name] = str(error)
                rows.append([arm.name, f"FAILED {error}", "", ""])
                continue
            self.results["arms"].setdefault(arm.name, {})["startup"] = {"cold": cold, "warm": warm}
            rows.append([arm.name, f"{cold['s']:.2f}", f"{warm['s']:.2f}", warm["said"]])
        table(["arm", "seconds from launch to the first timed step, cold cache", "warm cache", "its own account, warm"], rows)


def sent_bytes(what: str, size: float, world_size: int) -> float:
    """What a process sends in a ring for a collective of `size` bytes in all."""
    ways = {"all-reduce": 2, "reduce-scatter": 1, "all-gather": 1}
    return ways[what.split(" ")[0]] * (world_size - 1) / world_size * size


def full_windows(seq_len: int, stride: int) -> int:
    """Windows of the full FineWeb validation split."""
    return 1 + math.ceil((FINEWEB_VAL_TOKENS - seq_len) / stride)


def startup(arm: Arm, scratch: Path) -> list[dict]:
    """Two launches of the arm's train_gpt.py that share compile caches, empty before the first."""
    folder = Path(tempfile.mkdtemp(dir=scratch))
    caches = {name: str(folder / name) for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")}
    paths = {
        name: str(Path(value).resolve())
        for name in ("DATA_PATH", "TOKENIZER_PATH")
        if (value := (os.environ | arm.settings).get(name))
    }
    run = {
        "ITERATIONS": "3",
        "MAX_WALLCLOCK_SECONDS": "0",
        "SLIDING_EVAL": "0",
        "ARTIFACT_PATH": str(folder / "model.ptz"),
        "RUN_ID": "startup",
    }
    found = [first_step(arm.folder, os.environ | arm.settings | caches | paths | run, folder) for _ in range(2)]
    shutil.rmtree(folder)
    return found


def first_step(script_folder: Path, env: dict[str, str], cwd: Path) -> dict:
    """Seconds from launch until the clock of training starts, by the first `step:` line less the time it gives itself."""
    begin, said, lines = time.perf_counter(), "", []
    child = subprocess.Popen([sys.executable, "-u", str(script_folder / "train_gpt.py")], cwd=cwd, env=env, text=True,
                             stdout=subprocess.PIPE, stderr=subprocess.STDOUT)  # fmt: skip
    try:
        for line in child.stdout:
            lines.append(line.strip())
            said = line.strip() if line.startswith("startup:") else said
            if step := re.match(r"step:1/\S+ loss:\S+ t:(\d+)ms", line):
                return {"s": time.perf_counter() - begin - int(step[1]) / 1000, "said": said}
        raise ArmFailed(next((line for line in reversed(lines) if line), "no output"))
    finally:
        child.kill()
        child.wait()
        child.stdout.close()


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = OneLineParser(__doc__)
    parser.add_argument("--preset", type=Path, help="KEY=VALUE lines")
    parser.add_argument("--against", type=Path, action="append", default=[], metavar="FOLDER", help="an arm: another checkout")
    parser.add_argument(
        "--with", dest="with_", nargs="+", action="append", default=[], metavar="KEY=VALUE", help="an arm: other settings"
    )
    parser.add_argument("--at-once", type=int, default=2, help="arms that live beside this checkout at a time (default 2)")
    parser.add_argument("--rounds", type=int, default=7, help="turns of each arm (default 7)")
    parser.add_argument("--steps", type=int, default=3, help="counted steps of a turn (default 3)")
    parser.add_argument("--warmup", type=int, default=5, help="steps before the first turn (default 5)")
    parser.add_argument("--profile-steps", type=int, default=1, help="steps in the table of kernel groups; 0: no table")
    parser.add_argument("--cpu-peak-size", type=int, default=1024, help="matrix product that is the peak of a CPU")
    parser.add_argument(
        "--step", action="store_true", help="measure the training step (default unless another part is asked for)"
    )
    parser.add_argument("--eval", action="store_true", help="measure evaluation")
    parser.add_argument("--stride", type=int, nargs="+", default=[], help="of the sliding score (default SLIDING_EVAL_STRIDE)")
    parser.add_argument(
        "--eval-windows", type=int, default=0, help="scored by the fast path (default 4096 on a GPU, 32 on a CPU)"
    )
    parser.add_argument(
        "--plain-windows", type=int, default=0, help="scored by the plain path (default 256 on a GPU, 8 on a CPU)"
    )
    parser.add_argument("--world", type=int, default=0, metavar="N", help="communication of a step at N processes")
    parser.add_argument("--startup", action="store_true", help="seconds to the first timed step")
    parser.add_argument("--checkpoint", action="store_true", help="what a checkpoint a minute costs")
    parser.add_argument("--json", type=Path, help="write every figure there")
    args = parser.parse_args(argv)
    for pair in (pair for pairs in args.with_ for pair in pairs):
        if "=" not in pair:
            parser.error(f"--with {pair}: expected KEY=VALUE")
    for name in ("at_once", "rounds", "steps", "warmup", "cpu_peak_size"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} {getattr(args, name)}: expected at least 1")
    for folder in args.against:
        if not (folder / "train_gpt.py").is_file():
            parser.error(f"--against {folder}: expected a folder with train_gpt.py in it")
    args.step |= not (args.eval or args.world or args.startup or args.checkpoint)
    return args


def main() -> int:
    args = parse_arguments()
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(args, Path(folder))
        parts = [(args.world, bench.print_communication), (args.startup, bench.measure_startup), (args.step, bench.measure_steps),
                 (args.eval, bench.measure_evaluation), (args.checkpoint, bench.measure_checkpoint)]  # fmt: skip
        try:
            for asked, measure in parts:
                if asked:
                    measure()
        except ArmFailed as error:
            print(f"bench/step.py: {error}", file=sys.stderr)
            return 2
        finally:
            for arm in (bench.base, *bench.others):
                arm.close()
            bench.write()
    return 3 if bench.results["failed"] else 0


if __name__ == "__main__":
    start(main, BadArguments)
