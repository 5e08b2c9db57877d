#!/usr/bin/env python3
"""Write submission.json from the logs of runs, one log a seed; with --records, the whole folder that is submitted.

    make_submission.py logs/record_seed42.txt logs/record_seed1337.txt logs/record_seed7.txt
    make_submission.py --records records --name "Ternary U-Net" --record THEIR/submission.json logs/record_seed*.txt
    make_submission.py --records records --name "Ternary U-Net" --hub OWNER/NAME logs/record_seed*.txt
    make_submission.py --check 3 --records records --name "Ternary U-Net"     before three long runs: what their end will need

Every number comes from the last `result {json}` line of a log, the threads of a CPU from the line with the versions. The score
is the mean over the seeds of the sliding evaluation, or of the round trip where the runs had none; the size is the largest of
the seeds. What did not run on 8xH100 and FineWeb with three seeds says that it is no leaderboard entry. Logs that do not belong
together, or break the rules, are refused with one line and exit code 2, and nothing is written.

A folder, records/<track>/<date>_<name>/, is written whole or not at all, and only if compliance.py, whose table is printed,
finds no breach (else exit code 1). Its train_gpt.py is the file that ran: the logs begin with it. If that is a packed one, its
readable program, which is checked to be the same, lies beside it. --pull-request FILE writes the text of its pull request: a
title, an empty line, the rest. --hub sends the folder, a model card and the artifacts to a model repository of the Hugging Face
hub, which is made, private, if it is not there. Without --hub nothing is sent anywhere.
"""

import argparse
import ast
import contextlib
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

import command_line
import compliance
import hub_push
import pack_code
from command_line import start
from hub_fetch import EXPORTS
from run_logs import BUDGET_BYTES, FREE_SETTINGS, SLIDING, OneLineParser, check_same, read_run, scored_by
from shard_io import UserError, sha256_file, write_text

SEED_FIELDS = (
    *SLIDING, "val_loss", "val_bpb", "roundtrip_val_loss", "roundtrip_val_bpb", "val_tokens", "val_bytes",
    "steps", "ms_per_step", "train_time_s", "eval_time_s", "artifact_bytes", "code_bytes", "total_bytes",
    "device", "world_size", "gpu_name", "torch_version", "git_commit", "code_sha256", "artifact_sha256",
)  # fmt: skip
RECORD_TRACK, OTHER_TRACK = "track_10min_16mb", "track_non_record_16mb"
# What --check wants to be free: for each run an artifact that fills the budget, its copy while it is written, and the log
FREE_BYTES_A_RUN = 2 * BUDGET_BYTES + 1_000_000


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
        if run.is_evaluation:
            raise UserError(f"{run.log}: a run with EVAL_ONLY=1, expected one that trained; compliance.py compares the two")
        if run.result["total_bytes"] > BUDGET_BYTES:
            raise UserError(f"{run.log}: total_bytes {run.result['total_bytes']:,} is over the budget of {BUDGET_BYTES:,}")
    check_same(runs)
    return sorted(runs, key=lambda run: run.seed)


def build_submission(runs, identity, non_record=False):
    """The submission: `identity` (author, github_id, name, blurb, date; the last three may be None), then the logs' figures."""
    score = scored_by(runs)
    config = runs[0].config
    losses, bpbs = ([run.result[f"{score}_{name}"] for run in runs] for name in ("val_loss", "val_bpb"))
    shortfall = what_is_no_record(runs)
    notice = {"notice": f"Not a leaderboard entry: {'; '.join(shortfall)}."} if shortfall else {}
    tokenizers = {run.result.get("tokenizer_sha256") for run in runs}
    return {
        "author": identity["author"],
        "github_id": identity["github_id"],
        "name": identity["name"] or default_name(config),
        **notice,
        "blurb": identity["blurb"] or default_blurb(runs),
        "track": OTHER_TRACK if shortfall or non_record else RECORD_TRACK,
        "date": identity["date"] or date_of(runs),
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
        **({"tokenizer_sha256": tokenizers.pop()} if len(tokenizers) == 1 and None not in tokenizers else {}),
        "seed_results": {str(run.seed): seed_result(run) for run in runs},
    }


def seed_result(run):
    return {name: run.result.get(name) for name in SEED_FIELDS} | {"log": run.log.name}


def what_is_no_record(runs):
    """What keeps the runs from being a record's, in the logs' words; [] if nothing does."""
    found = []
    if not all(compliance.check_hardware(run).ok for run in runs):
        found.append(f"it ran on {'; '.join(sorted({run.hardware for run in runs}))}, not on 8 x {compliance.H100_SXM}")
    if not all(compliance.is_fineweb(run) for run in runs):
        sizes = {run.result.get("val_bytes") for run in runs}
        known = f"{sizes.pop():,} bytes of text" if len(sizes) == 1 and None not in sizes else "text"
        found.append(f"it is scored on {known} in {runs[0].config['data_path']}, not on FineWeb's validation split")
    if len(runs) < compliance.LEAST_SEEDS:
        found.append(f"it has {plural(len(runs), 'seed')}, not {compliance.LEAST_SEEDS}")
    return found


def plural(number, noun):
    return f"{number} {noun}{'s' * (number != 1)}"


def date_of(runs):
    """The day of the last run where the logs say it, else today's; both UTC."""
    days = [(run.result["date"][:10], run) for run in runs if run.result.get("date")]
    for day, run in days:
        if not re.fullmatch(r"\d{4}-\d\d-\d\d", day):
            raise UserError(f"{run.log}: the result line has date {run.result['date']!r}, expected one such as 2026-03-31")
    return max(day for day, _ in days) if days else datetime.datetime.now(datetime.timezone.utc).date().isoformat()


def default_name(config):
    return f"Ternary U-Net GPT, {config['num_layers']} layers, width {config['model_dim']}, vocabulary {config['vocab_size']}"


def default_blurb(runs):
    """What ran, in the logs' words and figures."""
    config = runs[0].config
    seconds = mean([run.result["train_time_s"] for run in runs])
    seeds = plural(len(runs), "seed")
    return (
        f"BitNet b1.58 weights in groups of {config['bitnet_group_size']}, {config['matrix_optimizer']} for the matrices, "
        f"{config['train_batch_tokens']:,} tokens a step, {seconds:.0f} s of training; mean of {seeds}"
    )


# -------------------------------------------------------------------------------------------------- the folder


def record_folder(args, date):
    """records/<track>/<date>_<name>; UserError if its name is missing or it is there already."""
    if not args.name:
        raise UserError("--records needs --name NAME")
    slug = re.sub(r"[^A-Za-z0-9.-]+", "_", args.name).strip("_.")
    if not slug:
        raise UserError(f"--name {args.name!r}: expected letters or digits")
    folder = args.records / (OTHER_TRACK if args.non_record else RECORD_TRACK) / f"{date}_{slug}"
    if folder.exists() and not args.force:
        raise UserError(f"{folder}: is there already; --force replaces it")
    return folder


def record_files(args, runs, submission):
    """{name: bytes} of everything in the folder."""
    tokenizer = args.tokenizer or Path(runs[0].config["tokenizer_path"])
    sources = {"LICENSE": ROOT / "LICENSE", tokenizer.name: tokenizer}
    files = {"train_gpt.py": runs[0].code, "requirements.txt": requirements_of(runs[0].code)}
    try:
        files |= {name: path.read_bytes() for name, path in sources.items()}
    except OSError as error:
        raise UserError(f"{error.filename}: {error.strerror}; --tokenizer names the tokenizer's model") from None
    if (digest := submission.get("tokenizer_sha256")) and sha256_file(tokenizer) != digest:
        raise UserError(f"--tokenizer {tokenizer}: not the tokenizer of the logs, whose SHA-256 is {digest}")
    if is_packed(runs[0].code):
        files[READABLE] = readable_source(args.source, runs[0].code)
    files |= {run.log.name: run.content for run in runs}
    files["submission.json"] = json_text(submission).encode()
    files["README.md"] = record_readme(runs, submission, tokenizer.name, non_record=args.non_record).encode()
    if len(files) != len(runs) + len(sources) + 4 + (READABLE in files):
        raise UserError(f"two files of one name: {', '.join(sorted(files))} and {len(runs)} logs")
    return files


def is_packed(code):
    return pack_code.has_our_stub(code.decode())


def readable_source(path, code):
    """The readable file of a packed program; UserError unless packing strips it to what unpacks from the code that ran."""
    try:
        source = path.read_bytes()
        same = pack_code.strip_source(pack_code.source_text(source)) == pack_code.unpack(code.decode())
    except OSError as error:
        raise UserError(f"--source {path}: {error.strerror}; expected the readable file of the program that ran") from None
    except (ValueError, SyntaxError):
        same = False
    if not same:
        raise UserError(f"--source {path}: not the program that ran, packed; name the readable file as it was then")
    return source


def requirements_of(code):
    """requirements.txt without what only the demo and the tools need: the pins of packages that the program imports."""
    imported = compliance.imported_modules([*ast.walk(compliance.parse_program(code))])
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if (name := re.match(r"[A-Za-z0-9_-]+", line)) and name[0].replace("-", "_") in imported]
    return "".join(f"{line}\n" for line in pins).encode()


def write_folder(folder, files):
    """The folder whole or not at all; one that is there is replaced. UserError if it cannot be written."""
    stage, new_parents = None, [path for path in (folder.parent, folder.parent.parent) if not path.exists()]
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
        for path in new_parents:
            with contextlib.suppress(OSError):  # it is full if all went well
                path.rmdir()


READABLE = "train_gpt_readable.py"
HUB = "https://huggingface.co/datasets"
PACKED_NOTE = f"""It is the file that ran: `train_gpt.py`, packed, whose bytes count. `{READABLE}` is the same program with its
comments and docstrings: that packing leaves of it what unpacks from `train_gpt.py` was checked when this folder was made.
When it starts, the packed file writes its program to `train_gpt-<user id>/<SHA-256>.py` under the temporary directory."""
READABLE_NOTE = "`train_gpt.py` is the file that ran, as it was written."
PULLS = "https://github.com/openai/parameter-golf/pull"
BUILDS_ON = f"""The design is that of [#640]({PULLS}/640) by CiprianFlorin-Ifrim: a U-Net transformer of ternary matrices (BitNet b1.58,
[arXiv 2402.17764](https://arxiv.org/abs/2402.17764)), a factored FP8 embedding, NeoMuon, and the names of its settings. The same
program also holds, off unless the configuration says otherwise, parts of

* [#920]({PULLS}/920) and [#641]({PULLS}/641), by the same author: root-mean-square scales, a wider embedding; binary weights;
* [#139]({PULLS}/139) and [#367]({PULLS}/367), by ksang123: learning-rate schedules, ramps of sequence and batch;
* [#126]({PULLS}/126), by Athenox14: recurrence over the depth, 8-bit activations, NorMuon, a commitment loss;
* [#435]({PULLS}/435), by rthgit: radial positions, the FRO optimizer.

The code is written anew. It differs from #640 in that

* the artifact that is scored is the trained model bit for bit: scales and tables are rounded in training as they are stored;
* the artifact is stored by the smallest of several codecs, among them an entropy coder, and loading it cannot run code;
* every validation token is scored exactly once, and no reported loss contains the z-loss;
* all processes follow one clock."""


def record_readme(runs, submission, tokenizer, non_record):
    """README.md of the folder: what it is, the seeds, how to run it."""
    score, total = submission["score"], max(run.result["total_bytes"] for run in runs)
    how = {"sliding": f"sliding windows, stride {runs[0].result.get('stride')}", "roundtrip": "chunks"}[score]
    spread = "" if submission["val_bpb_std"] is None else f" (standard deviation {submission['val_bpb_std']:.5f})"
    notice = f"\n**{submission['notice']}**\n" if "notice" in submission else ""
    track = "Non-record submission." if non_record else "Record submission, 8xH100, 10 minutes."
    return f"""# {submission['name']}

{track} **{submission['val_bpb']:.4f} bits per byte**{spread}, mean of {len(runs)} seeds, by {how}, over the whole
validation split, from the saved artifact. At most {total:,} of {BUDGET_BYTES:,} bytes. Ran on {submission['hardware']}.

{submission['blurb']}.
{notice}
{seed_table(runs, submission)}

Every figure is in the last line of the seed's log (`result {{...}}`). The logs begin with the program that ran.

## What it is

{what_it_is(runs[0])}

{PACKED_NOTE if is_packed(runs[0].code) else READABLE_NOTE}
It trains, writes the artifact, builds the model anew from the artifact's bytes and scores that. {origin(runs[0])}

## What it builds on, and how it differs

{BUILDS_ON}

## Data

{data_note(runs, tokenizer)}

## How to run

```bash
pip install -r requirements.txt
{run_command(runs[0], tokenizer)}
```

`DATA_PATH` is a folder of `fineweb_train_*.bin` and `fineweb_val_*.bin`. The artifact is `final_model.ternary.ptz`; with
`EVAL_ONLY=1` before the same settings it is scored alone. The licence is MIT (LICENSE).
"""


def origin(run):
    """Where the file that ran comes from: the logs hold it whole, a commit only helps to find it."""
    commit = run.result.get("git_commit") or "unknown"
    if commit == "unknown":
        return "No commit is known of it: git did not track the file."
    return f"Its commit is {commit}." if not commit.endswith("+") else f"It was changed since its commit, {commit[:-1]}."


def data_note(runs, tokenizer):
    """Which text the runs saw, as far as logs tell."""
    r, config = runs[0].result, runs[0].config
    counts = [f"{r[name]:,} {noun}" for name, noun in (("val_tokens", "tokens"), ("val_bytes", "bytes")) if r.get(name) is not None]
    scored = f"The validation split has {' and '.join(counts)}. " if counts else ""
    digest = f", SHA-256 {r['tokenizer_sha256']}" if r.get("tokenizer_sha256") else ""
    pieces = f"`{tokenizer}` is the SentencePiece model of {config['vocab_size']:,} pieces that made the shards{digest}."
    if not compliance.is_fineweb(runs[0]):
        return f"""The runs read `{config['data_path']}`. {scored}That is **not** FineWeb's validation split:
the scores compare with no other submission's. {pieces}"""
    export = EXPORTS.get(f"sp{config['vocab_size']}")
    shards = f"\nShards of so many pieces are published at [{export.repository}]({HUB}/{export.repository})." if export else ""
    return f"""Training and validation text are the challenge's, [FineWeb]({HUB}/HuggingFaceFW/fineweb), whose first
{compliance.FINEWEB_VAL_DOCUMENTS:,} documents are the validation split; the runs read `{config['data_path']}`. {scored}{pieces}{shards}"""


def pull_request(runs, submission, findings, folder):
    """The text of the pull request that hands the folder in: a title, an empty line, the rest."""
    score, track = submission["score"], "Non-record" if submission["track"] == OTHER_TRACK else "Record"
    spread = "" if submission["val_bpb_std"] is None else f", standard deviation {submission['val_bpb_std']:.5f}"
    notice = f"\n**{submission['notice']}**\n" if "notice" in submission else ""
    words = {True: "yes", False: "no"}
    shown = {f.rule: f for f in sorted(findings, key=lambda f: not f.ok)}  # the last of a rule counts
    rules = "\n".join(f"| {f.rule} | {words[f.ok]} | {f.evidence.replace('|', '/')} |" for f in shown.values())
    return f"""{track}: {submission['name']}, {submission['val_bpb']:.4f} bits per byte

Adds `records/{submission['track']}/{folder.name}`.

* **{submission['val_bpb']:.5f} bits per byte** ({score}; mean of {plural(len(runs), "seed")}{spread})
* at most {submission['bytes_total']:,} of {BUDGET_BYTES:,} bytes, code and artifact
* {submission['hardware']}
* {submission['blurb']}
{notice}
{seed_table(runs, submission)}

## The rules, as far as logs show them

As `tools/compliance.py` finds them. A rule's row is of the last seed, or of one that does not keep it.

| rule | kept | shown by |
|---|---|---|
{rules}

## What it builds on, and how it differs

{BUILDS_ON}
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
        done = subprocess.run(["git", "config", "--get", name], capture_output=True, check=False)
    except OSError:
        return None
    return done.stdout.decode(errors="surrogateescape").strip() or None


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
    for option, value in (("--author", author), ("--name", args.name), ("--blurb", args.blurb)):
        if value is not None and not (value.isprintable() and value.strip()):
            raise UserError(f"{option} {value!r}: expected one line of text")
    if not re.fullmatch("[A-Za-z0-9][A-Za-z0-9_-]{0,38}", github_id):
        raise UserError(f"--github-id {github_id!r}: expected a GitHub account's name")
    return {"author": author, "github_id": github_id, "name": args.name, "blurb": args.blurb, "date": args.date}


# -------------------------------------------------------------------------------------------------- before long runs


def check_end(args):
    """UserError for what would fail or be missing at the end of `args.check` long runs, as far as it can be known before them."""
    read_identity(args)
    compliance.read_options(args)
    if args.logs:
        raise UserError(f"{args.logs[0]}: not an option; the runs will write the logs")
    check_options(args)
    if not args.out:
        check_can_be_made(Path("submission.json"), 0)
    check_can_be_made(Path(os.environ.get("LOG_DIR") or "logs") / "log", FREE_BYTES_A_RUN * args.check)
    if not args.records:
        return
    check_can_be_made(record_folder(args, args.date or date_of([])) / "README.md", FREE_BYTES_A_RUN)
    if args.check < compliance.LEAST_SEEDS:
        raise UserError(f"--records: expected at least {compliance.LEAST_SEEDS} seeds, not {args.check}")
    for option, path in (("--records needs", ROOT / "LICENSE"), ("--records needs", ROOT / "requirements.txt"),
                         ("--source", args.source), ("--tokenizer", args.tokenizer)):  # fmt: skip
        if path is not None and not os.access(path, os.R_OK):
            raise UserError(f"{option} {path}: no such file, or not readable")
    if args.code:
        check_code_before(args)
    if args.hub:
        hub_push.open_hub(args.hub)


def check_code_before(args):
    """UserError if a rule is broken by the program itself, or its readable file is another's."""
    code = args.code.read_bytes()
    for rule, inspect in (("no network", compliance.inspect_network), ("no test-time training", compliance.inspect_evaluation)):
        try:
            wrong, _ = inspect(code)
        except (ValueError, SyntaxError) as error:
            raise UserError(f"--code {args.code}: no program: {error}") from None
        if wrong:
            raise UserError(f"--code {args.code}: breaks the rule {rule!r}: {wrong[0]}")
    if is_packed(code):
        readable_source(args.source, code)


def check_can_be_made(path, free_bytes):
    """UserError unless a file of this path can be made where its first folder that is there lies; leaves nothing behind."""
    try:
        if path.is_dir():
            raise UserError(f"{path}: is a folder, expected the name of a file")
        there = next(folder for folder in path.absolute().parents if folder.exists())
        with tempfile.TemporaryDirectory(dir=there, prefix=".check_") as trial:
            made = Path(trial) / path.absolute().relative_to(there)
            made.parent.mkdir(parents=True, exist_ok=True)
            made.touch()
        free = shutil.disk_usage(there).free
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}") from None
    if free < free_bytes:
        raise UserError(f"{there}: {free:,} bytes are free, the runs may need {free_bytes:,}")


# -------------------------------------------------------------------------------------------------- command line


def iso_date(text):
    """argparse type of --date."""
    try:
        return datetime.date.fromisoformat(text).isoformat()
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text}: expected a date such as 2026-03-31") from None


def number_of_runs(text):
    """argparse type of --check."""
    if not re.fullmatch("[1-9][0-9]{0,2}", text):
        raise argparse.ArgumentTypeError(f"{text}: expected the number of runs, 1 to 999")
    return int(text)


def build_parser():
    parser = OneLineParser(prog="make_submission.py", description=__doc__.split("\n")[0])
    parser.add_argument("logs", nargs="*", type=Path, metavar="LOG", help="the log of one seed")
    parser.add_argument("--out", type=Path, help="default: submission.json, or with --records none")
    parser.add_argument("--author", help="default: git config user.name")
    parser.add_argument("--github-id", help="default: git config github.user, or the owner of a GitHub origin")
    parser.add_argument("--name", help="default: the model's dimensions")
    parser.add_argument("--blurb", help="default: what the logs say ran")
    parser.add_argument("--date", type=iso_date, help="default: the last run's where the logs have one, or today (UTC)")
    parser.add_argument("--check", type=number_of_runs, metavar="RUNS",
                        help="write nothing; before so many long runs, check all that their end will need")  # fmt: skip
    parser.add_argument("--records", type=Path, metavar="DIR", help="assemble the folder DIR/<track>/<date>_<name>")
    parser.add_argument("--tokenizer", type=Path, help="with --records: the tokenizer's model; default: the logs' tokenizer_path")
    parser.add_argument("--source", type=Path, default=ROOT / "train_gpt.py", metavar="FILE",
                        help="with --records: the readable file of packed code; default: this checkout's train_gpt.py")  # fmt: skip
    parser.add_argument("--force", action="store_true", help="with --records: replace a folder that is there")
    parser.add_argument("--pull-request", type=Path, metavar="FILE", help="with --records: also write the text of the pull request")
    parser.add_argument("--hub", metavar="OWNER/NAME",
                        help="with --records: also send folder and artifacts to this model repository of the Hugging Face hub")  # fmt: skip
    compliance.add_options(parser)
    return parser


def json_text(value):
    return json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def check_rules(args):
    """compliance.py's findings on the logs; their table is printed."""
    files, record = compliance.read_options(args)
    findings = compliance.check_logs(args.logs, files, record, args.non_record)
    print(compliance.table(findings))
    return findings


def check_options(args):
    """UserError for options that do not go together, or that cannot be met as far as it is known before anything is written."""
    for option, value in (("--pull-request", args.pull_request), ("--hub", args.hub)):
        if value and not args.records:
            raise UserError(f"{option} needs --records DIR")
    if args.hub:
        hub_push.repository_name(args.hub)
    for path in filter(None, (args.out, args.pull_request)):
        check_can_be_made(path, 0)


def write_submission(args):
    """Everything that the command line asks for; returns the exit code."""
    identity = read_identity(args)
    if not args.logs:
        raise UserError("no logs: name one log file a seed")
    compliance.read_options(args)
    check_options(args)  # before the folder, which would be there without what they ask for
    folder = record_folder(args, args.date or date_of(read_runs(args.logs))) if args.records else None
    findings = check_rules(args) if folder else []
    if any(finding.breach for finding in findings):
        print(f"make_submission.py: error: {folder}: not written, since rules are broken (above)", file=sys.stderr)
        return 1
    runs = read_runs(args.logs)
    submission = build_submission(runs, identity, args.non_record)
    artifacts = hub_push.find_artifacts(runs, args.artifact) if args.hub else {}
    client = hub_push.open_hub(args.hub) if args.hub else None
    files = record_files(args, runs, submission) if folder else {}
    if folder:
        write_folder(folder, files)
    out = args.out or (None if folder else Path("submission.json"))
    if out:
        write_text(out, json_text(submission))
    for path in filter(None, (folder, out)):
        print(f"{path}: {submission['val_bpb']:.4f} bits per byte ({submission['score']}, {plural(len(runs), 'seed')}), "
              f"{submission['bytes_total']:,} of {BUDGET_BYTES:,} bytes")  # fmt: skip
    if args.pull_request:
        write_text(args.pull_request, pull_request(runs, submission, findings, folder))
        print(f"{args.pull_request}: the text of the pull request")
    if "notice" in submission:
        print(submission["notice"])
    if args.hub:
        send(args, client, files, artifacts, folder)
    return 0


def send(args, client, files, artifacts, folder):
    """Send the folder that has just been written; UserError says how to try that again."""
    try:
        print(f"sent to {hub_push.push(client, args.hub, files, artifacts, f'{args.name}: folder and artifacts')}")
    except UserError as error:
        raise UserError(f"{error}; {folder} is written, the same command with --force sends it again") from None


def main(argv=None):
    args = build_parser().parse_args(argv)
    return command_line.run_command(lambda: check_end(args) if args.check else write_submission(args), UserError, name="make_submission.py")


if __name__ == "__main__":
    start(main)
