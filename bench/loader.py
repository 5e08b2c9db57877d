"""What feeding the loop costs: the wait for a batch while a step of 60 ms runs on the device.

    python bench/loader.py                the default step of 524,288 tokens, synthetic shards in a temporary folder
    DATA_PATH=... python bench/loader.py  other shards

The step is a sleep, as a GPU's work is to the host. Reported: the median and 99th percentile of the wait for `Batches.next`, with the
next batch prepared meanwhile, and of reading a batch without preparation, beside it.
"""

from __future__ import annotations

import dataclasses
import os
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

from command_line import OneLineParser, start  # noqa: E402

if __name__ == "__main__":
    OneLineParser(__doc__).parse_args()  # -h and mistakes are answered before PyTorch is imported, which takes seconds

import train_gpt as t  # noqa: E402

STEP_S, STEPS, SHARDS, SHARD_TOKENS = 0.060, 200, 3, 40_000_000


def write_shards(folder: str, vocab_size: int) -> None:
    header = np.zeros(256, dtype="<i4")
    header[:3] = t.SHARD_MAGIC, t.SHARD_VERSION, SHARD_TOKENS
    rng = np.random.default_rng(0)
    for i in range(SHARDS):
        tokens = rng.integers(vocab_size, size=SHARD_TOKENS, dtype=np.uint16)
        Path(folder, f"fineweb_train_{i:06d}.bin").write_bytes(header.tobytes() + tokens.tobytes())


def waits_s(cfg: t.Config, step_s: float) -> np.ndarray:
    """Seconds that each `next` takes when a step of `step_s` follows it; without a step nothing is ready in time."""
    batches = t.Batches(t.TokenStream(cfg, "train"), t.World())
    waits = []
    for _ in range(STEPS):
        start = time.perf_counter()
        batches.next(cfg.train_batch_tokens // cfg.train_seq_len, cfg.train_seq_len)
        waits.append(time.perf_counter() - start)
        time.sleep(step_s)
    return np.array(waits[1:])


def main() -> None:
    cfg = t.Config.from_env()
    with tempfile.TemporaryDirectory() as folder:
        if "DATA_PATH" not in os.environ:
            write_shards(folder, cfg.vocab_size)
            cfg = dataclasses.replace(cfg, data_path=folder)
        print("| batches | median wait | 99 % | share of a 60 ms step |\n|---|---|---|---|")
        for name, step_s in (("prepared during the step", STEP_S), ("without a step between", 0.0)):
            waits = waits_s(cfg, step_s)
            median, worst = np.median(waits), np.quantile(waits, 0.99)
            print(f"| {name} | {1e3 * median:.3f} ms | {1e3 * worst:.3f} ms | {100 * median / STEP_S:.2f} % |", flush=True)


if __name__ == "__main__":
    start(main, t.UserError)
