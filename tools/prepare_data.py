#!/usr/bin/env python3
"""Make the datasets that train_gpt.py reads, and prove them: token shards, a SentencePiece model, a manifest.

    python tools/prepare_data.py demo                    a small English corpus out of installed packages, no download
    python tools/prepare_data.py fetch sp8192            the published FineWeb export from the Hugging Face hub
    python tools/prepare_data.py text FILE... --vocab-size 1024 --out data/mine      shards of any text
    python tools/prepare_data.py corpus FOLDER           shards of a corpus folder for each tokenizer in it
    python tools/prepare_data.py check DIR               headers, ids, the exact byte count, no overlap of the splits
"""

import argparse
import contextlib
import gzip
import hashlib
import lzma
import math
import os
import re
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import demo_corpus
import sentencepiece
from check_data import check_dataset, checked_manifest, refuse_other_tokenizer, report
from command_line import describe
from encode_text import (
    ALL_VAL,
    Split,
    encode_blocks,
    encode_documents,
    load_tokenizer,
    read_documents,
    tokenizer_sample,
    train_tokenizer,
    usable_cores,
    without_empty_val,
)
from hub_fetch import EXPORTS, FULL_RUN_SHARDS, fetch_export
from shard_io import (
    MANIFEST,
    MAX_VOCAB_SIZE,
    SPLITS,
    TOKENIZER,
    ShardWriter,
    UserError,
    locked_folder,
    read_manifest,
    sha256_file,
    shard_paths,
    staged_files,
    write_bytes,
    write_json,
)
from text_files import Layout, cut_size, file_format, file_identity, find_files, read_blocks

ROOT = Path(__file__).resolve().parent.parent
SHARD_TOKENS = 100_000_000
PROGRESS_S = 20
MIN_VOCAB_SIZE = 4 + 256 + 64  # special ids, byte pieces, and some to learn
VAL_FRACTION = 0.01
SMALL_VAL_BYTES = 200_000
# Standard error of bits per byte times the root of the validation text's bytes, between texts: a bigram model on the
# demo's 813 validation documents gave .0168 at 615,808 bytes.
VAL_NOISE = 13

# SHA-256 of the demo corpus (its training documents, then its validation documents) with the pinned packages.
DEMO_SHA256 = "dd0263c6081c0a7738aca8a4b82d463a331aa58a32fb2e23bf7d44ca38593d0d"
DEMO_FORMAT = 3  # raise it when the demo's files change for the same settings


# -------------------------------------------------------------------------------------------------- demo


def demo(args):
    """Write the demo corpus as a dataset into args.out, unless it is already there."""
    packages = {**demo_corpus.package_versions(), "sentencepiece": sentencepiece.__version__}
    settings = {"corpus": "demo", "format": DEMO_FORMAT, "vocab_size": args.vocab_size, "packages": packages}
    with locked_folder(args.out, "--out") as out:
        if is_complete(out, settings):
            say(f"{out}: the demo corpus is there (vocabulary {args.vocab_size})")
            return
        refuse_foreign_shards(out, overwrite=read_manifest(out).get("corpus") == "demo")
        started = time.perf_counter()
        train, val = demo_corpus.load_demo_corpus()
        settings["corpus_sha256"] = hashlib.sha256("".join(train + val).encode()).hexdigest()
        if settings["corpus_sha256"] != DEMO_SHA256:
            versions = ", ".join(f"{name} {version}" for name, version in packages.items())
            warn(f"demo corpus: sha256 {settings['corpus_sha256']}, expected {DEMO_SHA256} (installed: {versions})")
        with staged_files(out) as stage:
            manifest = settings | write_demo(stage, train, val, args.vocab_size)
            finish(stage, manifest)
        say(demo_summary(out, manifest, time.perf_counter() - started))


def write_demo(stage, train, val, vocab_size):
    """Write tokenizer, shards and val.txt; returns their part of the manifest."""
    model = train_tokenizer(train, vocab_size)
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    val_text = "".join(val).encode()
    write_bytes(stage / TOKENIZER, model)
    write_bytes(stage / "val.txt", val_text)
    sizes = {}
    for split, documents in (("train", train), ("val", val)):
        with contextlib.closing(ShardWriter(stage, split, SHARD_TOKENS)) as writer:
            writer.write(encode_documents(processor, documents))
        text = "".join(documents).encode()
        sizes[split] = {"documents": len(documents), "bytes": len(text), "tokens": writer.tokens}
        sizes[split]["sha256"] = hashlib.sha256(text).hexdigest()
    sizes["val"]["document_bytes"] = [len(document.encode()) for document in val]
    return {
        "tokenizer_sha256": hashlib.sha256(model).hexdigest(),
        **sizes,
        "gzip_bpb": bits_per_byte(gzip.compress(val_text, 9, mtime=0), val_text),
        "xz_bpb": bits_per_byte(lzma.compress(val_text, preset=9 | lzma.PRESET_EXTREME), val_text),
    }


def bits_per_byte(compressed, raw):
    return 8 * len(compressed) / len(raw)


def is_complete(out, settings):
    """True if out/manifest.json has these settings and every file it lists is there, unchanged."""
    manifest = read_manifest(out)
    if any(manifest.get(key) != value for key, value in settings.items()):
        return False
    with contextlib.suppress(OSError, AttributeError):
        return all(sha256_file(out / name) == digest for name, digest in manifest.get("files").items())
    return False


def demo_summary(out, manifest, seconds):
    compressors = f"val.txt takes gzip -9 {manifest['gzip_bpb']:.4f}, xz -9e {manifest['xz_bpb']:.4f} bits a byte"
    return f"{size_summary(out, manifest)}; {compressors}; {seconds:.1f} s"


# -------------------------------------------------------------------------------------------------- text


class TextJob(NamedTuple):
    """A dataset to make of text files: the command's options, and what differs between the datasets of one command."""

    options: argparse.Namespace
    out: Path
    inputs: list
    val_inputs: list  # the validation split; if there are none, val_fraction of the inputs
    val_fraction: float = 0.0
    tokenizer: Path | None = None  # None: train one with vocab_size pieces
    vocab_size: int | None = None
    also_held_out: tuple = ()  # other validation files: their documents are left out of training too
    holds_out_one: bool = True  # at least, though no document's hash lies in val_fraction

    @property
    def layout(self):
        """How documents lie in the files: a .txt file that is alone is cut, also where it is read as another's part."""
        options, alone = self.options, [files[0] for files in (self.inputs, self.val_inputs) if len(files) == 1]
        skip_bad = options.bad_documents == "skip"
        return Layout(options.field, options.separator, skip_bad, frozenset(map(file_identity, alone)))


def text(args):
    """Make a dataset of any text files."""
    if args.character_coverage is not None and args.tokenizer:
        raise UserError(f"--character-coverage {args.character_coverage}: expected with --vocab-size, not with --tokenizer")
    inputs, val_inputs = find_files(args.input, "INPUT", say), find_files(args.val, "--val", say)
    if not inputs and not val_inputs:
        raise UserError("INPUT: no text file given, nor one by --val")
    job = TextJob(args, args.out, inputs, val_inputs, VAL_FRACTION, args.tokenizer, args.vocab_size)
    if args.val_fraction is not None:
        job = job._replace(val_fraction=args.val_fraction, holds_out_one=False)
    make_text_dataset(job)


def corpus(args):
    """Make a dataset of FOLDER's corpus_train_*.jsonl.xz and corpus_val.jsonl.xz for each of its tokenizers."""
    train, tokenizers = sorted(args.folder.glob("corpus_train_*.jsonl.xz")), sorted(args.folder.glob("tokenizers/*.model"))
    val, val_web = args.folder / "corpus_val.jsonl.xz", args.folder / "corpus_val_web.jsonl.xz"
    if not train or not tokenizers or not val.is_file():
        raise UserError(
            f"FOLDER {args.folder}: expected corpus_train_*.jsonl.xz, corpus_val.jsonl.xz and tokenizers/*.model there"
        )
    second_vals = [val_web] if val_web.is_file() else []
    for tokenizer in tokenizers:
        out = args.out / f"sp{load_tokenizer(tokenizer)[1].vocab_size()}"
        make_text_dataset(TextJob(args, out, train, [val], tokenizer=tokenizer, also_held_out=tuple(second_vals)))
        for path in second_vals:  # for evaluation alone: a folder without training shards
            make_text_dataset(TextJob(args, out.with_name(f"{out.name}_web"), [], [path], tokenizer=tokenizer))


def make_text_dataset(job):
    """Encode the job's files into its folder and print a summary."""
    layout = job.layout
    say_what_is_cut(job, layout)
    val_keys = frozenset(key for key, _ in read_documents([*job.val_inputs, *job.also_held_out], layout))
    split = Split(0.0, val_keys) if job.val_inputs else Split(job.val_fraction)
    if job.holds_out_one and not job.val_inputs:
        split = without_empty_val(split, (key for key, _ in read_documents(job.inputs, layout)))
    with locked_folder(job.out, "--out"):
        refuse_foreign_shards(job.out, job.options.overwrite)
        model = choose_tokenizer(job, layout, split)
        started = time.perf_counter()
        with staged_files(job.out) as stage:
            write_bytes(stage / TOKENIZER, model)
            names = [printable(path.name, "utf-8") for path in job.val_inputs + job.inputs]
            manifest = {"corpus": "text", "inputs": names, "tokenizer_sha256": hashlib.sha256(model).hexdigest()}
            parts = [(job.val_inputs, ALL_VAL), (job.inputs, split)]
            sizes, unknown = write_splits(stage, parts, model, layout, job.options)
            manifest |= sizes
            refuse_empty_split(job, manifest)
            finish(stage, manifest)
    seconds = time.perf_counter() - started
    megabytes = sum(manifest[split]["bytes"] for split in SPLITS) / 1e6
    left_out = ", ".join(f"{count:,} {kind}" for kind, count in manifest["left_out"].items())
    say(f"{size_summary(job.out, manifest)}; left out: {left_out}; {seconds:.1f} s, {megabytes / seconds:.1f} MB/s")
    warn_of_unknown_pieces(job, unknown)
    warn_of_small_val(job, manifest["val"]["bytes"])


def say_what_is_cut(job, layout):
    """A line for each .txt file that is cut into documents though it names no border."""
    for path in job.val_inputs + job.inputs:
        if file_format(path) == ".txt" and (size := cut_size(path, layout)):
            borders = f"its documents are pieces of {size:,} bytes up to the next blank line"
            say(f"{path}: no {layout.separator!r} there, so {borders}")


def warn_of_unknown_pieces(job, count):
    if count:
        warn(
            f"--tokenizer {job.tokenizer}: {count:,} unknown pieces: the tokenizer cannot represent the text, and what "
            "they stand for is lost (expected byte fallback); no score on these shards is right, and check refuses them"
        )


def warn_of_small_val(job, size):
    """A warning if the validation text is too small for scores to compare."""
    if 0 < size < SMALL_VAL_BYTES:
        noise = VAL_NOISE / math.sqrt(size)
        warn(
            f"{job.out}: {size:,} bytes of validation text: another text as large would score about {noise:.2f} bits per "
            f"byte higher or lower, by chance; expected {SMALL_VAL_BYTES:,} bytes: more text, --val-fraction or --val"
        )


def refuse_empty_split(job, manifest):
    """UserError if a split that was asked for has no document."""
    train, val = (manifest[split]["documents"] for split in SPLITS)
    if job.inputs and train == 0:
        raise UserError(f"INPUT {job.inputs[0]}: no training document there, {val} are held out")
    if job.val_inputs and val == 0:
        raise UserError(f"--val {job.val_inputs[0]}: no document there")
    if job.val_fraction and val == 0:
        raise UserError(
            f"--val-fraction {job.val_fraction}: none of {train} documents is held out; "
            "expected more documents, a larger share, or --val FILE (0: no validation split)"
        )


def choose_tokenizer(job, layout, split):
    """The serialized model: the given one, or one trained on a sample of the training documents."""
    if job.tokenizer is not None:
        return load_tokenizer(job.tokenizer)[0]
    sample = tokenizer_sample(read_documents(job.inputs, layout), split)
    return train_tokenizer(sample, job.vocab_size, job.options.character_coverage)


def write_splits(stage, parts, model, layout, options):
    """Encode the parts, (files, split rule) each, into the shards of both splits.

    Returns their part of the manifest, and the number of unknown pieces.
    """
    counts, val_bytes, last_line = Counter(), [], time.monotonic()
    with contextlib.ExitStack() as stack:
        writers = {
            split: stack.enter_context(contextlib.closing(ShardWriter(stage, split, options.shard_tokens)))
            for split in SPLITS
        }
        for files, rule in parts:
            blocks = (block for path in files for block in read_blocks(path, layout))
            for encoded in encode_blocks(blocks, model, layout, rule, options.workers):
                counts += encoded.counts
                val_bytes += encoded.val_bytes
                for split, ids in encoded.ids.items():
                    writers[split].write(ids)
                if time.monotonic() - last_line > PROGRESS_S:
                    last_line = time.monotonic()
                    note(f"{sum(counts[split, 'bytes'] for split in SPLITS) / 1e6:,.0f} MB of text encoded")
    sizes = {
        split: {"documents": counts[split, "documents"], "bytes": counts[split, "bytes"], "tokens": writer.tokens}
        for split, writer in writers.items()
    }
    sizes["val"]["document_bytes"] = val_bytes
    vocab_size = sentencepiece.SentencePieceProcessor(model_proto=model).vocab_size()
    left_out = {kind: counts[kind] for kind in ("empty", "duplicate", "refused")}
    return {"vocab_size": vocab_size, **sizes, "left_out": left_out}, counts["unknown"]


# -------------------------------------------------------------------------------------------------- fetch


def fetch(args):
    """Download a published FineWeb export and print what is there."""
    export = EXPORTS[args.export]
    manifest = fetch_export(export, args.out, args.shards, note)
    dataset = args.out / "datasets" / export.dataset
    splits = ", ".join(f"{split} {manifest[split]['shards']} shards {manifest[split]['tokens']:,} tokens" for split in SPLITS)
    say(f"{dataset}: {splits}, vocabulary {manifest['vocab_size']}, commit {manifest['commit']} of {export.repository}")


# -------------------------------------------------------------------------------------------------- check


def check(args):
    """Prove the dataset in args.folder and print its sizes."""
    if not args.folder.is_dir():
        raise UserError(f"DIR {args.folder}: no such folder")
    tokenizer = args.tokenizer or args.folder / str(checked_manifest(args.folder).get("tokenizer", TOKENIZER))
    model, processor = load_tokenizer(tokenizer)
    refuse_other_tokenizer(args.folder, tokenizer, model, processor)
    table = load_byte_table(model, processor.vocab_size())
    sizes = check_dataset(args.folder, processor, table, args.workers)
    for line in report(args.folder, sizes):
        say(line)


def load_byte_table(model, vocab_size):
    """train_gpt.py's table of the bytes of each token."""
    sys.path.insert(0, str(ROOT))
    import train_gpt  # slow to import

    # by a name that can be opened: SentencePiece takes no path that is not UTF-8
    with tempfile.NamedTemporaryFile(suffix=".model") as file:
        file.write(model)
        file.flush()
        return train_gpt.ByteTable.load(file.name, vocab_size)


# -------------------------------------------------------------------------------------------------- files


def refuse_foreign_shards(out, overwrite):
    """UserError if `out` holds shards that the user did not ask to replace."""
    count = sum(len(shard_paths(out, split)) for split in SPLITS)
    if count and not overwrite:
        raise UserError(f"--out {out}: {count} shards are there; expected a folder without (--overwrite replaces them)")


def finish(stage, manifest):
    """Complete the manifest with the hashes of all files and write it."""
    manifest["files"] = {path.name: sha256_file(path) for path in sorted(stage.iterdir())}
    write_json(stage / MANIFEST, manifest)


def size_summary(out, manifest):
    """One line on what a dataset holds."""
    splits = ", ".join(
        f"{split} {manifest[split]['documents']:,} documents {manifest[split]['bytes']:,} bytes "
        f"{manifest[split]['tokens']:,} tokens ({manifest[split]['bytes'] / max(manifest[split]['tokens'], 1):.3f})"
        for split in SPLITS
    )
    return f"{out}: {splits}, vocabulary {manifest['vocab_size']}"


# -------------------------------------------------------------------------------------------------- command line


def printable(text, encoding):
    """The text as one line: control characters and what the encoding does not have are spelled (file names hold them)."""
    text = re.sub(r"[\x00-\x1f\x7f-\x9f]", lambda control: control[0].encode("unicode_escape").decode(), text)
    return text.encode(encoding, "backslashreplace").decode(encoding)


def write_line(stream, line):
    """A line of output; nobody may be there to read it (`| head -1`), and that ends no work."""
    if stream is None:
        return
    try:
        print(printable(line, stream.encoding or "utf-8"), file=stream, flush=True)
    except OSError:
        # what the stream still holds would fail again when Python ends
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def say(line):
    write_line(sys.stdout, line)


def note(message):
    write_line(sys.stderr, f"prepare_data.py: {message}")


def warn(message):
    note(f"warning: {message}")


def whole_number(low, high):
    """argparse type: an integer within bounds."""

    def parse(text):
        if not text.isdecimal() or not low <= int(text) <= high:
            raise argparse.ArgumentTypeError(f"{text}: expected a whole number from {low} to {high}")
        return int(text)

    return parse


def fraction(text):
    """argparse type: a number from 0 to 1."""
    with contextlib.suppress(ValueError):
        if 0 <= float(text) <= 1:
            return float(text)
    raise argparse.ArgumentTypeError(f"{text}: expected a number from 0 to 1")


def separator(text):
    """argparse type: a string that is not empty, with \\n for a line break."""
    if not text:
        raise argparse.ArgumentTypeError("expected at least one character")
    if not text.isascii():
        with contextlib.suppress(UnicodeEncodeError):
            text.encode()
            return text.replace("\\n", "\n")
        raise argparse.ArgumentTypeError(f"{text!r}: expected UTF-8")
    return text.replace("\\n", "\n")


class OneLineParser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def error(self, message):
        note(f"error: {message}")
        self.exit(2)


def build_parser():
    parser = OneLineParser(prog="prepare_data.py", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    add_demo(commands.add_parser("demo", help="a small English corpus out of installed packages, no download"))
    add_fetch(commands.add_parser("fetch", help="the published FineWeb export from the Hugging Face hub"))
    add_text(commands.add_parser("text", help="shards of any .txt, .jsonl, .json (.gz, .xz, .zst) or .parquet"))
    add_corpus(commands.add_parser("corpus", help="shards of a corpus folder for each tokenizer in it"))
    add_check(commands.add_parser("check", help="prove a dataset"))
    return parser


def add_demo(command):
    command.add_argument("--out", type=Path, default=ROOT / "data" / "demo", metavar="DIR")
    command.add_argument("--vocab-size", type=whole_number(MIN_VOCAB_SIZE, MAX_VOCAB_SIZE), default=1024, metavar="N")
    command.set_defaults(run=demo)


def add_fetch(command):
    command.add_argument("export", choices=EXPORTS, help="by tokenizer")
    command.add_argument("--out", type=Path, default=ROOT / "data", metavar="DIR", help="gets datasets/ and tokenizers/")
    command.add_argument(
        "--shards",
        type=whole_number(1, 999_999),
        metavar="N",
        help=f"training shards of 100 million tokens; default: {FULL_RUN_SHARDS}, what a full run reads once, or all there are",
    )
    command.set_defaults(run=fetch)


def add_text(command):
    command.add_argument("input", type=Path, nargs="*", metavar="INPUT", help="text files, or folders of them")
    command.add_argument("--out", type=Path, required=True, metavar="DIR")
    tokenizer = command.add_mutually_exclusive_group(required=True)
    tokenizer.add_argument("--tokenizer", type=Path, metavar="MODEL", help="an existing SentencePiece model")
    tokenizer.add_argument(
        "--vocab-size",
        type=whole_number(MIN_VOCAB_SIZE, MAX_VOCAB_SIZE),
        metavar="N",
        help="train a lossless BPE model with this many pieces on the training documents",
    )
    command.add_argument(
        "--character-coverage",
        type=fraction,
        metavar="F",
        help="with --vocab-size: share of the text whose characters become pieces, the rest is spelled in bytes (.9995)",
    )
    held_out = command.add_mutually_exclusive_group()
    held_out.add_argument("--val", type=Path, nargs="+", default=[], metavar="FILE", help="the validation documents")
    held_out.add_argument(
        "--val-fraction", type=fraction, metavar="F", help="else: hold out this share, by hash (.01, at least one document)"
    )
    add_encoding(command)
    command.set_defaults(run=text)


def add_corpus(command):
    command.add_argument("folder", type=Path, metavar="FOLDER")
    command.add_argument("--out", type=Path, default=ROOT / "data" / "corpus", metavar="DIR")
    add_encoding(command)
    command.set_defaults(run=corpus)


def add_encoding(command):
    """The options of every command that encodes text."""
    layout = Layout()
    command.add_argument("--field", default=layout.field, help="the text in a JSON line or parquet row")
    command.add_argument("--separator", type=separator, default=layout.separator, help="between documents of a .txt")
    command.add_argument(
        "--bad-documents",
        choices=("stop", "skip"),
        default="stop",
        help="at a document that is none (no JSON, no string, no UTF-8): stop (default), or leave it out and count it",
    )
    command.add_argument("--shard-tokens", type=whole_number(1, 2**31 - 1), default=SHARD_TOKENS, metavar="N")
    command.add_argument("--overwrite", action="store_true", help="replace the shards in --out")
    add_workers(command)


def add_workers(command):
    command.add_argument("--workers", type=whole_number(1, 1024), default=usable_cores(), metavar="N")


def add_check(command):
    command.add_argument("folder", type=Path, metavar="DIR")
    command.add_argument("--tokenizer", type=Path, metavar="MODEL", help=f"default: DIR/{TOKENIZER}")
    add_workers(command)
    command.set_defaults(run=check)


def main(argv=None):
    args = build_parser().parse_args(argv)
    try:
        args.run(args)
    except (UserError, OSError) as error:
        note(f"error: {describe(error)}")
        return 2
    except KeyboardInterrupt:
        note("interrupted")
        return 130
    return 0


def end(status):
    """End the process at once: at an ordinary end pyarrow's threads abort one in a hundred that did their work."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, AttributeError):  # None if it is closed
            stream.flush()
    os._exit(status)


if __name__ == "__main__":
    end(main())
