#!/usr/bin/env python3
"""Write submission.json from the logs of runs, one log a seed; with --records, the whole folder that is submitted.

    make_submission.py logs/record_seed42.txt logs/record_seed1337.txt logs/record_seed7.txt
    make_submission.py --records records --name "Ternary U-Net" --record THEIR/submission.json logs/record_seed*.txt

Every number comes from the last `result {json}` line of a log. The score is the mean over the seeds of the sliding
evaluation, or of the round trip where the runs had none; the size is the largest of the seeds. Logs that do not belong
together, or break the rules, are refused with one line and exit code 2, and nothing is written.

A folder, records/<track>/<date>_<name>/, is written whole or not at all, and only if compliance.py, whose table is printed,
finds no breach (else exit code 1). Its train_gpt.py is the file that ran: the logs begin with it.
"""

import argparse
import ast
import datetime
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import compliance
import pack_code
from run_logs import BUDGET_BYTES, FREE_SETTINGS, SLIDING, check_same, read_run, scored_by
from shard_io import UserError

SEED_FIELDS = (
    *SLIDING, "val_loss", "val_bpb", "roundtrip_val_loss", "roundtrip_val_bpb",
    "steps", "ms_per_step", "train_time_s", "eval_time_s", "artifact_bytes", "code_bytes", "total_bytes",
    "device", "world_size", "gpu_name", "torch_version", "code_sha256", "artifact_sha256",
)  # fmt: skip


# -------------------------------------------------------------------------------------------------- submission


ROOT = Path(__file__).resolve().parent.parent


def mean(values):
    return math.fsum(values) / len(values)


def deviation(values):
    """Standard deviation of a sample; None of one value."""
    center = mean(values)
    return math.sqrt(math.fsum((v - center) ** 2 for v in values) / (len(values) - 1)) if len(values) > 1 else None


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
    losses, bpbs = ([run.result[f"{score}_{name}"] for run in runs] for name in ("val_loss", "val_bpb"))
    return {
        "author": identity["author"],
        "github_id": identity["github_id"],
        "name": identity["name"] or default_name(config),
        "blurb": identity["blurb"] or default_blurb(runs),
        "date": identity["date"],
        "val_loss": mean(losses),
        "val_bpb": mean(bpbs),
        "val_loss_std": deviation(losses),
        "val_bpb_std": deviation(bpbs),
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
    seeds = f"{len(runs)} seed{'s' * (len(runs) > 1)}"
    return (
        f"BitNet b1.58 weights in groups of {config['bitnet_group_size']}, {config['matrix_optimizer']} for the matrices, "
        f"{config['train_batch_tokens']:,} tokens a step, {seconds:.0f} s of training; mean of {seeds}"
    )


# -------------------------------------------------------------------------------------------------- the folder


def record_folder(args):
    """records/<track>/<date>_<name>; UserError if its name is missing or it is there already."""
    if not args.name:
        raise UserError("--records needs --name NAME")
    slug = re.sub(r"[^A-Za-z0-9.-]+", "_", args.name).strip("_.")
    if not slug:
        raise UserError(f"--name {args.name!r}: expected letters or digits")
    track = "track_non_record_16mb" if args.non_record else "track_10min_16mb"
    folder = args.records / track / f"{args.date}_{slug}"
    if folder.exists() and not args.force:
        raise UserError(f"{folder}: is there already; --force replaces it")
    return folder


def record_files(args, runs, submission):
    """{name: bytes} of everything in the folder."""
    tokenizer = args.tokenizer or Path(runs[0].config["tokenizer_path"])
    sources = {"requirements.txt": ROOT / "requirements.txt", tokenizer.name: tokenizer}
    files = {"train_gpt.py": runs[0].code}
    try:
        files |= {name: path.read_bytes() for name, path in sources.items()}
    except OSError as error:
        raise UserError(f"{error.filename}: {error.strerror}; --tokenizer names the tokenizer's model") from None
    files |= {run.log.name: run.content for run in runs}
    files["submission.json"] = json_text(submission).encode()
    files["README.md"] = record_readme(runs, submission, tokenizer.name, non_record=args.non_record).encode()
    if len(files) != len(runs) + 5:
        raise UserError(f"two files of one name: {', '.join(sorted(files))} and {len(runs)} logs")
    return files


def write_folder(folder, files):
    """The folder whole or not at all; one that is there is replaced. UserError if it cannot be written."""
    stage = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        stage = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".partial_"))
        stage.chmod(0o755)
        new = stage / "new"
        new.mkdir()
        for name, data in files.items():
            (new / name).write_bytes(data)
        if folder.exists():
            os.replace(folder, stage / "old")
        os.replace(new, folder)
    except OSError as error:
        if stage and (stage / "old").exists() and not folder.exists():
            os.replace(stage / "old", folder)
        raise UserError(f"{folder}: cannot be written: {error.strerror}") from None
    finally:
        if stage:
            shutil.rmtree(stage, ignore_errors=True)


PACKED_NOTE = """, packed. When it starts it writes its program to
`train_gpt-<user id>/<SHA-256>.py` under the temporary directory, where it can be read"""


def record_readme(runs, submission, tokenizer, non_record):
    """README.md of the folder: what it is, the seeds, how to run it."""
    score, total = submission["score"], max(run.result["total_bytes"] for run in runs)
    how = {"sliding": f"sliding windows, stride {runs[0].result.get('stride')}", "roundtrip": "chunks"}[score]
    spread = "" if submission["val_bpb_std"] is None else f" (standard deviation {submission['val_bpb_std']:.5f})"
    track = "Non-record submission." if non_record else "Record submission, 8xH100, 10 minutes."
    return f"""# {submission['name']}

{track} **{submission['val_bpb']:.4f} bits per byte**{spread}, mean of {len(runs)} seeds, by {how}, over the whole
validation split, from the saved artifact. At most {total:,} of {BUDGET_BYTES:,} bytes. Ran on {submission['hardware']}.

{submission['blurb']}.

{seed_table(runs, submission)}

Every figure is in the last line of the seed's log (`result {{...}}`). The logs begin with the program that ran.

## What it is

{what_it_is(runs[0])}

`train_gpt.py` is one file{PACKED_NOTE if pack_code.has_our_stub(runs[0].code.decode()) else ""}.
It trains, writes the artifact, builds the model anew from the artifact's bytes and scores that.

## How to run

```bash
pip install -r requirements.txt
{run_command(runs[0], tokenizer)}
```

`DATA_PATH` is a folder of `fineweb_train_*.bin` and `fineweb_val_*.bin`. The artifact is `final_model.ternary.ptz`; with
`EVAL_ONLY=1` before the same settings it is scored alone.
"""


def seed_table(runs, submission):
    """Markdown: a row a seed, then mean and standard deviation."""
    score = submission["score"]
    head = """seed, val_bpb, val_loss (nats a token), steps, ms/step, training s, evaluation s, artifact bytes, code bytes,
        total bytes""".replace("\n       ", "").split(", ")
    rows = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for run in runs:
        r = run.result
        rows.append(f"| {run.seed} | {r[f'{score}_val_bpb']:.5f} | {r[f'{score}_val_loss']:.5f} | {r['steps']:,} | "
                    f"{r['ms_per_step']:.1f} | {r['train_time_s']:.2f} | {r['eval_time_s']:.1f} | {r['artifact_bytes']:,} | "
                    f"{r['code_bytes']:,} | {r['total_bytes']:,} |")  # fmt: skip
    rows.append(f"| mean | {submission['val_bpb']:.5f} | {submission['val_loss']:.5f} |  |  |  |  |  |  |  |")
    if submission["val_bpb_std"] is not None:
        rows.append(f"| std | {submission['val_bpb_std']:.5f} | {submission['val_loss_std']:.5f} |  |  |  |  |  |  |  |")
    return "\n".join(rows)


def what_it_is(run):
    """The model in a sentence, in the config's figures."""
    c, r = run.config, run.result
    known = {"params", "ternary_params"} <= r.keys()
    counts = f"{r['params']:,} trained weights, {r['ternary_params']:,} of them ternary; " if known else ""
    return f"""A transformer of {c['num_layers']} layers and width {c['model_dim']}, vocabulary {c['vocab_size']:,}:
{counts}groups of {c['bitnet_group_size']} weights share a scale. Matrices are trained by {c['matrix_optimizer']}, with
{c['train_batch_tokens']:,} tokens a step. The whole configuration is the `config {{...}}` line of each log."""


def run_command(run, tokenizer):
    """The command of one seed: every setting that is not provably the program's default stands in it."""
    defaults = program_defaults(run)
    own = FREE_SETTINGS | {"data_path", "tokenizer_path", "eval_only"}
    settings = {"DATA_PATH": "FOLDER", "TOKENIZER_PATH": f"./{tokenizer}", "SEED": run.seed}
    settings |= {name.upper(): int(value) if isinstance(value, bool) else value for name, value in run.config.items()
                 if name not in own and not (name in defaults and defaults[name] == value)}  # fmt: skip
    words = " ".join(f"{name}={value}" for name, value in settings.items())
    if run.result["world_size"] == 1:
        return f"{words} python train_gpt.py"
    return f"{words} \\\n    torchrun --standalone --nproc_per_node={run.result['world_size']} train_gpt.py"


def program_defaults(run):
    """{setting: default} of the program in the log, where its classes of settings give a literal one."""
    defaults = {}
    for node in ast.walk(compliance.parse_program(run.code)):
        if isinstance(node, ast.ClassDef) and node.name in ("Settings", "OptionSettings"):
            for field in (n for n in node.body if isinstance(n, ast.AnnAssign) and n.value is not None):
                value = field.value
                if isinstance(value, ast.Call) and isinstance(value.func, ast.Name) and value.func.id == "setting":
                    value = value.args[0]
                try:
                    defaults[field.target.id] = ast.literal_eval(value)
                except ValueError:
                    defaults.pop(field.target.id, None)
    return defaults


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
    parser.add_argument("--out", type=Path, help="default: submission.json, or with --records none")
    parser.add_argument("--author", help="default: git config user.name")
    parser.add_argument("--github-id", help="default: git config github.user, or the owner of a GitHub origin")
    parser.add_argument("--name", help="default: the model's dimensions")
    parser.add_argument("--blurb", help="default: what the logs say ran")
    parser.add_argument("--date", type=iso_date, default=today, help="default: today (UTC)")
    parser.add_argument("--check-author", action="store_true", help="only check that the author is known, before a long run")
    parser.add_argument("--records", type=Path, metavar="DIR", help="assemble the folder DIR/<track>/<date>_<name>")
    parser.add_argument("--tokenizer", type=Path, help="with --records: the tokenizer's model; default: the logs' tokenizer_path")
    parser.add_argument("--force", action="store_true", help="with --records: replace a folder that is there")
    compliance.add_options(parser)
    return parser


def json_text(value):
    return json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


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


def complies(args):
    """Print compliance.py's table of the logs; whether there is no breach."""
    files, record = compliance.read_options(args)
    findings = compliance.check_logs(args.logs, files, record, args.non_record)
    print(compliance.table(findings))
    return not any(finding.breach for finding in findings)


def write_submission(args):
    """Everything that the command line asks for; returns the exit code."""
    identity = read_identity(args)
    folder = record_folder(args) if args.records else None
    if args.check_author:
        return 0
    if not args.logs:
        raise UserError("no logs: name one log file a seed")
    if folder and not complies(args):
        print(f"make_submission.py: error: {folder}: not written, since rules are broken (above)", file=sys.stderr)
        return 1
    runs = read_runs(args.logs)
    submission = build_submission(runs, identity)
    if folder:
        write_folder(folder, record_files(args, runs, submission))
    out = args.out or (None if folder else Path("submission.json"))
    if out:
        write_whole(out, json_text(submission))
    for path in filter(None, (folder, out)):
        print(f"{path}: {submission['val_bpb']:.4f} bits per byte ({submission['score']}, {len(args.logs)} seeds), "
              f"{submission['bytes_total']:,} of {BUDGET_BYTES:,} bytes")  # fmt: skip
    return 0


def main(argv=None):
    try:
        return write_submission(build_parser().parse_args(argv))
    except UserError as error:
        print(f"make_submission.py: error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
