#!/usr/bin/env python3
"""The table at the end of run_demo.sh: the scores of a run, its size, and what general compressors make of the same text.

    demo_table.py RESULT [--manifest MANIFEST] [--artifact ARTIFACT]

RESULT is a file whose last line is the trainer's `result {json}`; MANIFEST is the manifest.json of the data, if there is
one; ARTIFACT is the path of the file that was written or read. A held-out text too small to say much is warned of.
"""

import json
import sys
from pathlib import Path

from command_line import OneLineParser, run_command, start
from run_logs import BUDGET_BYTES

# how far apart three seeds of the demo ended, 120 s on a CPU each, and on how many bytes they were scored (RESULTS.md R032)
SEEDS_APART, SEEDS_BYTES = 0.015, 615_808
FEW_BYTES = 100_000  # a sixth of the demo's: a few documents decide what comes out
FIGURES = ("val_bpb", "roundtrip_val_bpb", "sliding_val_bpb", "train_time_s")
COUNTS = ("artifact_bytes", "total_bytes", "val_bytes", "steps", "tokens")
COMPRESSORS = ("gzip_bpb", "xz_bpb")
MOST = 1e18  # of any figure


def read_result(path):
    """The figures of the file's last line; ValueError unless that line is `result {json}`."""
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    if not lines or not lines[-1].startswith("result {"):
        raise ValueError(f"{path}: the trainer ended without a result line")
    result = parse_object(path, lines[-1].removeprefix("result "))
    return checked_figures(path, result, FIGURES) | checked_figures(path, result, COUNTS, int)


def read_manifest(path):
    """The figures of the data's manifest; empty for data without one."""
    if not path or not Path(path).is_file():
        return {}
    manifest = parse_object(path, Path(path).read_text(encoding="utf-8"))
    val = manifest.get("val", {})
    return checked_figures(path, manifest, COMPRESSORS) | {"val": val if isinstance(val, dict) else {}}


def parse_object(path, text):
    """A JSON object; ValueError for anything else."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def checked_figures(path, source, names, kinds=(int, float)):
    """The object; ValueError if one of these figures is there and is no number, or is too large to be one."""
    for name in names:
        value = source.get(name)
        if value is not None and (not isinstance(value, kinds) or isinstance(value, bool) or not abs(value) < MOST):
            raise ValueError(f"{path}: {name} is {value!r:.60}, expected a number")
    return source


def bits(value):
    return f"{value:.4f}"


def artifact_text(result):
    artifact, total = result["artifact_bytes"], result["total_bytes"]
    verdict = "fits" if total <= BUDGET_BYTES else "over budget"
    return f"{artifact:,} bytes; with code {total:,} of {BUDGET_BYTES:,} ({100 * total / BUDGET_BYTES:.1f} %, {verdict})"


def noise_text(result):
    """What a difference between two such runs means. Measured for the demo on a CPU only; on other text it can be more."""
    here = result["val_bytes"]
    where = "this text" if here == SEEDS_BYTES else f"{SEEDS_BYTES:,} bytes of the demo's; scored here: {here:,}"
    return f"three seeds lay {SEEDS_APART:.3f} apart (RESULTS.md R032) on {where}"


def warn_of_little_text(result):
    if (result.get("val_bytes") or FEW_BYTES) < FEW_BYTES:
        print(
            f"demo_table.py: warning: {result['val_bytes']:,} bytes of held-out text are few, and other documents would give "
            f"another score; expected {FEW_BYTES:,} or more: more text, or prepare_data.py text --val-fraction",
            file=sys.stderr,
        )


def has(result, *names):
    return all(result.get(name) is not None for name in names)


def table_rows(result, manifest, artifact=None):
    """(label, text) of every figure that the run and the data have: an evaluation alone has no training, own data no manifest."""
    whole = manifest.get("val", {}).get("bytes") in (None, result.get("val_bytes"))
    text = "same text" if whole else "whole validation text"  # VAL_MAX_TOKENS scores a part of it
    scores = {
        "before export": result.get("val_bpb"),
        "after the round trip": result.get("roundtrip_val_bpb"),
        f"sliding, stride {result.get('stride')}": result.get("sliding_val_bpb"),
        f"gzip -9, {text}": manifest.get("gzip_bpb"),
        f"xz -9, {text}": manifest.get("xz_bpb"),
    }
    rows = [(f"bits per byte, {label}", bits(value)) for label, value in scores.items() if value is not None]
    if rows and result.get("device") == "cpu" and result.get("val_bytes"):
        rows.append(("noise of these", noise_text(result)))
    if has(result, "artifact_bytes", "total_bytes"):
        rows.append(("artifact", artifact_text(result)))
    if artifact is not None:
        rows.append(("artifact's file", str(artifact)))
    if has(result, "train_time_s", "steps", "tokens"):
        rows.append(("training", f"{result['train_time_s']:.1f} s, {result['steps']:,} steps, {result['tokens']:,} tokens"))
    return rows


def format_table(rows):
    width = max(len(label) for label, _ in rows)
    return "\n".join(f"{label:<{width}}  {text}" for label, text in rows)


def main(argv=None):
    parser = OneLineParser(__doc__)
    parser.add_argument("result", type=Path)
    parser.add_argument("--manifest", type=Path)
    parser.add_argument("--artifact", type=Path)
    args = parser.parse_args(argv)
    return run_command(lambda: show_table(args), ValueError, name="demo_table.py")


def show_table(args):
    result = read_result(args.result)
    rows = table_rows(result, read_manifest(args.manifest), args.artifact)
    if not rows:
        raise ValueError(f"{args.result}: the result line has no figure")
    print(f"\n{format_table(rows)}\n")
    warn_of_little_text(result)


if __name__ == "__main__":
    start(main)
