"""Run variants of a preset one after the other and print a Markdown row for each.

    python bench/sweep.py configs/demo.env "" "MODEL_DIM=384" "MODEL_DIM=384 MATRIX_LR=0.02"

Each variant is a string of KEY=VALUE settings on top of the preset ("" is the preset itself); the environment is passed
through below both. A row: the variant, steps, ms a step, bits per byte before export, after the round trip and sliding,
parameters, artifact bytes. A variant that fails gets its error line as its row.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COLUMNS = "| variant | steps | ms/step | train s | val bpb | round trip | sliding | params | artifact bytes |"


def read_preset(path: Path) -> dict[str, str]:
    """KEY -> value of a preset file (KEY=VALUE lines and comments)."""
    lines = (line.strip() for line in path.read_text().splitlines())
    return dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))


def run_variant(settings: dict[str, str]) -> dict | str:
    """The result object of one run, or its last line of stderr."""
    done = subprocess.run([sys.executable, str(ROOT / "train_gpt.py")], env=os.environ | settings, cwd=ROOT, text=True, capture_output=True)
    if done.returncode:
        return done.stderr.strip().splitlines()[-1]
    return json.loads(done.stdout.rsplit("result ", 1)[1])


def row(variant: str, result: dict | str) -> str:
    if isinstance(result, str):
        return f"| {variant} | {result} |"
    bpb = [result[k] for k in ("val_bpb", "roundtrip_val_bpb", "sliding_val_bpb")]
    shown = " | ".join("" if b is None else f"{b:.4f}" for b in bpb)
    return (f"| {variant or '(preset)'} | {result['steps']} | {result['ms_per_step']:.0f} | {result['train_time_s']:.0f} | {shown} | "
            f"{result['params']} | {result['artifact_bytes']} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("preset", type=Path)
    parser.add_argument("variants", nargs="+", metavar="VARIANT")
    args = parser.parse_args()
    print(COLUMNS + "\n|" + "---|" * (COLUMNS.count("|") - 1))
    for i, variant in enumerate(args.variants):
        settings = read_preset(args.preset) | {"RUN_ID": f"sweep{os.getpid()}_{i}", "ARTIFACT_PATH": f"data/sweep{os.getpid()}.ptz"}
        settings |= dict(pair.split("=", 1) for pair in variant.split())
        print(row(variant, run_variant(settings)), flush=True)
    Path(ROOT / f"data/sweep{os.getpid()}.ptz").unlink(missing_ok=True)


if __name__ == "__main__":
    main()
