#!/usr/bin/env python3
"""Write submission.json from the logs of runs, one log a seed.

    make_submission.py logs/record_seed42.txt logs/record_seed1337.txt logs/record_seed7.txt

Every number comes from the last `result {json}` line of a log. The score is the mean over the seeds of the sliding
evaluation, or of the round trip where the runs had none; the size is the largest of the seeds. Logs that do not belong
together, or break the rules, are refused with one line and exit code 2, and nothing is written.
"""

import argparse
import datetime
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

from run_logs import BUDGET_BYTES, SLIDING, check_same, read_run, scored_by
from shard_io import UserError

SEED_FIELDS = (
    *SLIDING, "val_loss", "val_bpb", "roundtrip_val_loss", "roundtrip_val_bpb",
    "steps", "ms_per_step", "train_time_s", "eval_time_s", "artifact_bytes", "code_bytes", "total_bytes",
    "device", "world_size", "gpu_name", "torch_version", "code_sha256", "artifact_sha256",
)  # fmt: skip


# -------------------------------------------------------------------------------------------------- submission


def mean(values):
    return math.fsum(values) / len(values)


def read_runs(paths):
    """The runs of one experiment, by seed; UserError unless they are whole, within the budget and belong together."""
    runs = [read_run(path) for path in paths]
    for run in runs:
        if run.result["total_bytes"] > BUDGET_BYTES:
            raise UserError(f"{run.log}: total_bytes {run.result['total_bytes']:,} is over the budget of {BUDGET_BYTES:,}")
    check_same(runs)
    return sorted(runs, key=lambda run: run.seed)


def build_submission(runs, identity):
    """The submission: `identity` (author, github_id, name, blurb, date; name and blurb may be None), then the logs' figures."""
    score = scored_by(runs)
    config = runs[0].config
    return {
        "author": identity["author"],
        "github_id": identity["github_id"],
        "name": identity["name"] or default_name(config),
        "blurb": identity["blurb"] or default_blurb(runs),
        "date": identity["date"],
        "val_loss": mean([run.result[f"{score}_val_loss"] for run in runs]),
        "val_bpb": mean([run.result[f"{score}_val_bpb"] for run in runs]),
        "bytes_total": max(run.result["total_bytes"] for run in runs),
        "bytes_code": max(run.result["code_bytes"] for run in runs),
        "score": score,
        "hardware": "; ".join(sorted({run.hardware for run in runs})),
        "data_path": config["data_path"],
        "tokenizer_path": config["tokenizer_path"],
        "seed_results": {str(run.seed): seed_result(run) for run in runs},
    }


def seed_result(run):
    return {name: run.result.get(name) for name in SEED_FIELDS} | {"log": run.log.name}


def default_name(config):
    return f"Ternary U-Net GPT, {config['num_layers']} layers, width {config['model_dim']}, vocabulary {config['vocab_size']}"


def default_blurb(runs):
    """What ran, in the logs' words and figures."""
    config = runs[0].config
    seconds = mean([run.result["train_time_s"] for run in runs])
    return (
        f"BitNet b1.58 weights in groups of {config['bitnet_group_size']}, {config['matrix_optimizer']} for the matrices, "
        f"{config['train_batch_tokens']:,} tokens a step, {seconds:.0f} s of training; mean of {len(runs)} seed{'s' * (len(runs) > 1)}"
    )


# -------------------------------------------------------------------------------------------------- author


def git_setting(name):
    """A value of git's configuration, or None."""
    try:
        done = subprocess.run(["git", "config", "--get", name], capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() or None


def git_github_id():
    """The GitHub account that git knows: github.user, else the owner in origin's address on GitHub."""
    owner = re.search(r"github\.com[:/]([A-Za-z0-9-]+)/", git_setting("remote.origin.url") or "")
    return git_setting("github.user") or (owner and owner[1])


def read_identity(args):
    """Who submits what, from the options and git's configuration; UserError where neither has it."""
    author, github_id = args.author or git_setting("user.name"), args.github_id or git_github_id()
    if not author:
        raise UserError("no author: give --author NAME, or set git config user.name")
    if not github_id:
        raise UserError("no GitHub account: give --github-id ID, or set git config github.user")
    return {"author": author, "github_id": github_id, "name": args.name, "blurb": args.blurb, "date": args.date}


# -------------------------------------------------------------------------------------------------- command line


class OneLineParser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def error(self, message):
        self.exit(2, f"make_submission.py: error: {message}\n")


def iso_date(text):
    """argparse type of --date."""
    try:
        return datetime.date.fromisoformat(text).isoformat()
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text}: expected a date such as 2026-03-31") from None


def build_parser():
    today = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    parser = OneLineParser(prog="make_submission.py", description=__doc__.split("\n")[0])
    parser.add_argument("logs", nargs="*", type=Path, metavar="LOG", help="the log of one seed")
    parser.add_argument("--out", type=Path, default=Path("submission.json"), help="default: %(default)s")
    parser.add_argument("--author", help="default: git config user.name")
    parser.add_argument("--github-id", help="default: git config github.user, or the owner of a GitHub origin")
    parser.add_argument("--name", help="default: the model's dimensions")
    parser.add_argument("--blurb", help="default: what the logs say ran")
    parser.add_argument("--date", type=iso_date, default=today, help="default: today (UTC)")
    parser.add_argument("--check-author", action="store_true", help="only check that the author is known, before a long run")
    return parser


def write_whole(path, text):
    """Write a file whole or not at all: an earlier one survives a full disk or a crash. UserError if it cannot be written."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise UserError(f"{path}: cannot be written: {error.strerror}") from None


def write_submission(args):
    identity = read_identity(args)
    if args.check_author:
        return
    if not args.logs:
        raise UserError("no logs: name one log file a seed")
    submission = build_submission(read_runs(args.logs), identity)
    write_whole(args.out, json.dumps(submission, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    print(f"{args.out}: {submission['val_bpb']:.4f} bits per byte ({submission['score']}, {len(args.logs)} seeds), "
          f"{submission['bytes_total']:,} of {BUDGET_BYTES:,} bytes")  # fmt: skip


def main(argv=None):
    try:
        write_submission(build_parser().parse_args(argv))
    except UserError as error:
        print(f"make_submission.py: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
