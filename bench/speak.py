#!/usr/bin/env python3
"""How fast tools/sample.py writes: tokens a second of a model whose weights are drawn at random, by the clock and by processor time.

    OMP_NUM_THREADS=2 taskset -c 0,1 python bench/speak.py     the default model at its full size, on two cores: a minute
    python bench/speak.py --preset configs/demo.env --at 1,200 --tokens 50

The model is saved and loaded as an artifact, and then computed as sample.py computes it: a token at a time, with what earlier
tokens left. Its text means nothing; what a token costs does not depend on the weights. A row says where in the window it was
measured: so many tokens stood before. Rates are medians over --rounds texts, drawing included, decoding of pieces and the
terminal left out.
"""

from __future__ import annotations

import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

from command_line import OneLineParser, read_preset, run_command  # noqa: E402


def build(preset: dict[str, str]):
    """The model of these settings as its artifact holds it."""
    import train_gpt

    cfg = train_gpt.Config.from_env(preset | {"ARTIFACT_CODEC": "base3"})  # the quickest to write; the weights are the same
    return train_gpt.load_artifact(train_gpt.save_artifact(train_gpt.GPT(cfg), cfg), "fp32")[0]


def rates(context, before: int, tokens: int) -> tuple[float, float]:
    """Tokens a second by the clock, and by processor time of all threads, after so many tokens."""
    import sample
    import torch

    options = sample.parse_arguments(["-"])
    context.restart()
    draws = sample.generate(
        context, [1 + i % (context.model.cfg.vocab_size - 1) for i in range(before)], options, torch.Generator().manual_seed(1)
    )
    next(draws)  # the first one pays for those before it
    clock, processor = time.perf_counter(), time.process_time()
    for _ in range(tokens):
        next(draws)
    return tokens / (time.perf_counter() - clock), tokens / (time.process_time() - processor)


def main() -> int:
    parser = OneLineParser(__doc__)
    parser.add_argument("--preset", type=Path, metavar="FILE", help="settings of the model (default: none but the defaults)")
    parser.add_argument("--at", default="1,900", metavar="N,N", help="tokens before those that are timed (default 1,900)")
    parser.add_argument("--tokens", type=int, default=40, metavar="N", help="timed in each round (default 40)")
    parser.add_argument("--rounds", type=int, default=5, metavar="N")
    arguments = parser.parse_args()
    try:
        places = [int(at) for at in arguments.at.split(",")]
    except ValueError:
        parser.error(f"--at {arguments.at}: expected whole numbers and commas")
    if min(arguments.tokens, arguments.rounds, *places) < 1:
        parser.error("--at, --tokens, --rounds: expected at least 1")
    preset = read_preset(arguments.preset) if arguments.preset else {}
    import sample
    import torch

    model = build(preset)
    context = sample.Context(model)
    if max(places) + arguments.tokens >= context.window:
        parser.error(
            f"--at {arguments.at}, --tokens {arguments.tokens}: expected less than the window, {context.window}, together"
        )
    weights = sum(p.numel() for p in model.parameters())
    print(
        f"{weights:,} weights, {torch.get_num_threads()} threads, {'cached' if context.cached else 'computed anew for every token'}"
    )
    print("| tokens before | tokens/s | of one core's processor time |\n|---|---|---|")
    for before in places:
        found = [rates(context, before, arguments.tokens) for _ in range(arguments.rounds)]
        print(
            f"| {before} | {statistics.median(r[0] for r in found):.1f} | {statistics.median(r[1] for r in found):.1f} |",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    run_command(main)
