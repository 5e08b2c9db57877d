#!/usr/bin/env python3
"""What following a run costs the host: milliseconds a step of the bar and of TRACK's programs, in processor time of the training thread.

    python bench/follow.py                       off, the bar, and each of TRACK's programs that is installed
    python bench/follow.py --layers 10 --seconds 12 --step-ms 60

A training loop's hooks and log lines run as in train_gpt.py on a model with as many matrices as the default's and 32 channels, whose
step is a pause of --step-ms. Timed is what is called between two pauses for the followers' sake: the hook (norms, zeros, churn, their
sending), the lines, and, of the bar's thread, the processor time that it takes from the others. What the programs start beside
themselves is not in it. The mean is without the first five steps, each of which logs; later one in five seconds does. "at most": the
longest step, those included. The target is .6 ms a step on average.
"""

from __future__ import annotations

import contextlib
import io
import os
import pty
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

from command_line import OneLineParser, run_command  # noqa: E402

MOST_MS = 0.6


def measure(track: str, shows: bool, layers: int, seconds: float, step_s: float) -> tuple[float, float, int]:
    """(mean, most) milliseconds a step, and the steps."""
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
            spent, end = [], time.perf_counter() + seconds
            while time.perf_counter() < end:
                time.sleep(step_s)
                loop.step, loop.progress = loop.step + 1, loop.step / 1000
                began = time.thread_time()
                loop.report(2.0, loop.clock.elapsed())
                for hook in step.hooks:
                    hook.after_step(loop.step - 1, loop.progress)
                spent.append(1000 * (time.thread_time() - began))
    settled = spent[5:]
    return sum(settled) / len(settled) + 1000 * cpu[0] / len(spent), max(spent), len(spent)


def drain(handle: int) -> None:
    with contextlib.suppress(OSError):
        while os.read(handle, 65536):
            pass


def main() -> int:
    parser = OneLineParser(__doc__)
    parser.add_argument("--layers", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=12.0, help="of each case")
    parser.add_argument("--step-ms", type=float, default=60.0)
    arguments = parser.parse_args()
    import importlib.util

    import train_gpt

    installed = [name for name in train_gpt.TRACKERS if importlib.util.find_spec(name)]
    cases = [("off", "", False), ("bar", "", True), *((name, name, False) for name in installed), ("all of it", ",".join(installed), True)]
    print(f"| {'following':12} | ms a step | at most | steps |\n|---|---|---|---|")
    for name, track, shows in cases:
        mean, most, steps = measure(track, shows, arguments.layers, arguments.seconds, arguments.step_ms / 1000)
        print(f"| {name:12} | {mean:.3f} | {most:.1f} | {steps} |", flush=True)
    print(f"all of it: {'within' if mean < MOST_MS else 'above'} {MOST_MS} ms a step")
    return int(mean >= MOST_MS)


if __name__ == "__main__":
    run_command(main)
