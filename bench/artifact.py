"""Bytes of the artifact, stream by stream, for weights drawn at random: what a model of this shape takes in the worst case.

    python bench/artifact.py                  the default model
    EMBED_DIM=254 python bench/artifact.py    settings as for train_gpt.py

Gaussian matrices have a zero fraction of .31, near the 1/3 at which trits compress least; trained ones have more zeros.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train_gpt as t

STREAMS = ("trits", "scales", "tables", "controls")


def random_model(cfg: t.Config) -> t.GPT:
    torch.manual_seed(cfg.seed)
    model = t.GPT(cfg)
    with torch.no_grad():
        for _, _, p, role in t.parameter_owners(model):
            p.normal_(std=1.0 if role.storage == "control" else 0.02)
    return model


def main() -> None:
    cfg = t.Config.from_env()
    model = random_model(cfg)
    start = time.perf_counter()
    blob = t.save_artifact(model, cfg)
    saved = time.perf_counter()
    t.load_artifact(blob)
    loaded = time.perf_counter()
    _, codec, streams = t.read_container(blob)
    params, ternary = t.count_parameters(model)
    print(f"{params} parameters, {ternary} ternary, zero fraction {t.zero_fraction(model):.3f}, codec {codec}")
    print("| stream | raw bytes | bytes |\n|---|---|---|")
    for name, (raw, data) in zip(STREAMS, streams, strict=True):
        print(f"| {name} | {raw} | {len(data)} |")
    code = Path(t.__file__).stat().st_size
    total = len(blob) + code
    print(f"artifact {len(blob)}, code {code}, total {total} of {t.BUDGET_BYTES}: {t.BUDGET_BYTES - total} to spare")
    print(f"saved in {saved - start:.1f} s, loaded in {loaded - saved:.1f} s")


if __name__ == "__main__":
    main()
