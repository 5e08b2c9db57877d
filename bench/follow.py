#!/usr/bin/env python3
"""What following a run costs the host, the bar and TRACK's programs: milliseconds a step in processor time of the training thread and
by the clock, and how much longer a step is.

    python bench/follow.py                       off, the bar, and each of TRACK's programs that is installed; some 4 minutes
    python bench/follow.py --layers 10 --rounds 3 --seconds 12 --step-ms 60

A training loop's hooks and log lines run as in train_gpt.py on a model with as many matrices as the default's and 32 channels, whose
step is a pause of --step-ms. Timed is what is called between two pauses for the followers' sake: the hook (norms, zeros, churn, their
sending) and the lines.

    processor   of the training thread, and the processor time that the bar's thread takes from the others
    clock       the same calls by the clock, what the thread waits for in them included (the interpreter, disks, other programs' load);
                the bar's thread counts where it holds one of them up
    step        the whole step, pause included, over that of "off" in the same round

The cases take turns, a round after the other; figures are medians over the rounds, of each round's mean. That is without the first five
steps, each of which logs; later one in five seconds does. "at most": the longest step's calls by the clock, those included. What the
programs start beside themselves is not in it, but where it takes a core that the trainer needs: run it on two free cores. The target is
.6 ms a step on average, 1 % of a step of 60 ms; the exit code is that of the processor time.
"""

from __future__ import annotations

import contextlib
import io
import math
import os
import pty
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

from command_line import OneLineParser, run_command  # noqa: E402

MOST_MS = 0.6
SETTLED = 5  # steps, each of which logs


class Cost(NamedTuple):
    """Milliseconds a step, means."""

    processor: float
    clock: float
    step: float  # all of it
    most: float  # by the clock
    steps: int


def measure(track: str, shows: bool, layers: int, seconds: float, step_s: float) -> Cost:
    """A case's cost in one round."""
    import torch

    import train_gpt as t

    handle, terminal = pty.openpty()
    threading.Thread(target=drain, args=(handle,), daemon=True).start()
    cpu = [0.0]

    class Timed(t.Follower):
        def write(self, text: str) -> None:
            super().write(text)
            if threading.current_thread() is not threading.main_thread():
                cpu[0] = time.thread_time()

    with tempfile.TemporaryDirectory() as folder, open(terminal, "w", encoding="utf-8") as err, contextlib.redirect_stderr(err):
        cfg = t.Config.from_env({"MODEL_DIM": "32", "NUM_LAYERS": str(layers), "NUM_HEADS": "2", "NUM_KV_HEADS": "1", "VOCAB_SIZE": "64",
                                 "EMBED_DIM": "16", "BITNET_GROUP_SIZE": "32", "TRAIN_SEQ_LEN": "16", "YARN_MAX_LEN": "16",
                                 "SLIDING_EVAL_STRIDE": "16", "TRAIN_BATCH_TOKENS": "32", "LOG_DIR": folder, "TRACK": track})  # fmt: skip
        world = t.World()
        view = Timed.from_env(cfg, world, os.environ | {"TERM": "xterm" if shows else "dumb", "CI": ""})
        log, model = t.Log(cfg, world, view), t.GPT(cfg).use(t.fast_ops(cfg, world.device))
        with view, t.rounded_once(model), contextlib.redirect_stdout(io.StringIO()):
            step = t.TrainingStep(model, cfg, world)
            x = torch.randint(64, (2, 16))
            step.take(x, x)
            loop = object.__new__(t.Loop)
            loop.batches = type("Batches", (), {"state": lambda _: {"position": 32 * loop.step}})()
            loop.report, loop.clock, loop.log, loop.step, loop.progress = t.StepReport(cfg, log), t.Clock(world), log, 0, 0.0
            for hook in step.hooks:
                hook.begin(loop)
            view.phase("training", loop, step)
            spent, clock, whole, end = [], [], [], math.inf
            while (first := time.perf_counter()) < end:
                end = first + seconds if len(spent) == SETTLED else end
                time.sleep(step_s)
                loop.step, loop.progress = loop.step + 1, loop.step / 1000
                before, began = time.perf_counter(), time.thread_time()
                loop.report(2.0, loop.clock.elapsed())
                for hook in step.hooks:
                    hook.after_step(loop.step - 1, loop.progress)
                spent.append(1000 * (time.thread_time() - began))
                clock.append(1000 * (time.perf_counter() - before))
                whole.append(1000 * (time.perf_counter() - first))
    mean = lambda each: statistics.fmean(each[SETTLED:])
    return Cost(mean(spent) + 1000 * cpu[0] / len(spent), mean(clock), mean(whole), max(clock), len(spent))


def medians(costs: list[Cost], off: list[Cost]) -> tuple[float, float, float]:
    """(processor, clock, step over that of "off" in the same round), medians over the rounds."""
    ratios = [mine.step / theirs.step for mine, theirs in zip(costs, off, strict=True)]
    return statistics.median(c.processor for c in costs), statistics.median(c.clock for c in costs), statistics.median(ratios)


def drain(handle: int) -> None:
    with contextlib.suppress(OSError):
        while os.read(handle, 65536):
            pass


def main() -> int:
    parser = OneLineParser(__doc__)
    parser.add_argument("--layers", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=12.0, help="of each case in each round, once it has settled")
    parser.add_argument("--step-ms", type=float, default=60.0)
    arguments = parser.parse_args()
    for name in ("layers", "rounds", "seconds", "step_ms"):
        if getattr(arguments, name) <= 0:
            parser.error(f"--{name.replace('_', '-')} {getattr(arguments, name)}: expected more than 0")
    import importlib.util

    import train_gpt

    installed = [name for name in train_gpt.TRACKERS if importlib.util.find_spec(name)]
    cases = [
        ("off", "", False),
        ("bar", "", True),
        *((name, name, False) for name in installed),
        ("all of it", ",".join(installed), True),
    ]
    costs: dict[str, list[Cost]] = {name: [] for name, *_ in cases}
    for _ in range(arguments.rounds):
        for name, track, shows in cases:
            costs[name].append(measure(track, shows, arguments.layers, arguments.seconds, arguments.step_ms / 1000))
    print(
        f"| {'following':12} | processor, ms a step | clock, ms a step | step | at most, ms | steps |\n|---|---|---|---|---|---|"
    )
    for name, each in costs.items():
        processor, clock, step = medians(each, costs["off"])
        most, steps = max(c.most for c in each), sum(c.steps for c in each)
        print(f"| {name:12} | {processor:.3f} | {clock:.3f} | {step:.4f} | {most:.1f} | {steps} |")
    for kind, ms in (("processor time", processor), ("clock", clock)):
        print(
            f"all of it ({', '.join(['bar', *installed])}), by {kind}: {'within' if ms < MOST_MS else 'above'} {MOST_MS} ms a step"
        )
    return int(processor >= MOST_MS)


if __name__ == "__main__":
    run_command(main)
