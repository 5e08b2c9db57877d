"""An artifact and its tokenizer, as the tools for people read them: found, checked, refused in one line.

For sample.py, inspect_artifact.py, export_hf.py and report.py; this file is no command. An artifact holds no tokenizer. It is the one
that is given, else tokenizer.model beside the artifact, else the one that a log names whose result is this very file. Where a
log or the manifest.json beside the artifact notes the tokenizer's SHA-256, another one is refused.
"""

import hashlib
import os
import sys
from pathlib import Path
from typing import Any, NamedTuple

from command_line import not_a_command
from run_logs import places_of, read_run
from shard_io import UserError, read_manifest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


class Loaded(NamedTuple):
    """A model as its artifact holds it."""

    path: Path
    blob: bytes
    model: Any  # train_gpt.GPT
    cfg: Any  # train_gpt.Config


class Tokenizer(NamedTuple):
    """A SentencePiece model, and where it lies."""

    path: Path
    pieces: Any  # a SentencePieceProcessor
    table: Any  # train_gpt.ByteTable

    def document(self, text):
        """Token ids of a document with this text, as the shards hold it: the piece that begins a document comes first."""
        return [*self.start(), *self.pieces.encode(text)]

    def start(self):
        """The ids before a document's text: none where the tokenizer has no such piece."""
        return [self.pieces.bos_id()] if self.pieces.bos_id() >= 0 else []


def read_artifact(path):
    """The bytes of the file; UserError unless it can be read."""
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; expected an artifact, which train_gpt.py writes to ARTIFACT_PATH") from None


def load_model(path):
    """The model of an artifact, in float32 on the CPU; UserError if the file is not a whole, valid one."""
    import train_gpt  # slow to import

    blob = read_artifact(path)
    try:
        return Loaded(Path(path), blob, *train_gpt.load_artifact(blob, "fp32"))
    except train_gpt.UserError as error:
        raise UserError(f"{path}: {error}") from None


def load_tokenizer(loaded, given=None):
    """The Tokenizer of a model: `given`, or the one that is found; UserError if there is none, or if it is not the model's."""
    run = run_of(loaded)
    digest, source = known_digest(loaded, run)
    problems = [UserError(f"{loaded.path}: no tokenizer.model beside it, and no log that names one; expected --tokenizer MODEL")]
    for path in [given] if given else places(loaded, run):
        try:
            return read_tokenizer(Path(path), loaded, digest, source, "--tokenizer " * bool(given))
        except UserError as error:
            problems.append(error)
    raise problems[-1]


def run_of(loaded):
    """The run that wrote the artifact, by its SHA-256 in the log's result line; None if no log is found."""
    digest = hashlib.sha256(loaded.blob).hexdigest()
    folders = dict.fromkeys((Path(os.environ.get("LOG_DIR", "logs")), loaded.path.parent, ROOT / "logs"))
    for path in (path for folder in folders for path in sorted(folder.glob("*.txt"))):
        try:
            if digest.encode() in path.read_bytes() and (run := read_run(path)).result.get("artifact_sha256") == digest:
                return run
        except (UserError, OSError):
            continue
    return None


def known_digest(loaded, run):
    """SHA-256 of the tokenizer that the model was trained with, and what says so; ("", "") where nothing does."""
    if run and run.result.get("tokenizer_sha256"):
        return run.result["tokenizer_sha256"], run.log
    manifest = read_manifest(loaded.path.parent)
    files = manifest.get("files")
    noted = manifest.get("tokenizer_sha256") or (files.get("tokenizer.model") if isinstance(files, dict) else None)
    return (noted, loaded.path.parent / "manifest.json") if isinstance(noted, str) else ("", "")


def places(loaded, run):
    """Where a tokenizer lies that may be the model's."""
    named = places_of(run, "tokenizer_path") if run else []
    candidates = [loaded.path.parent / "tokenizer.model", *named, *(ROOT / path for path in named)]
    return [path for path in dict.fromkeys(candidates) if path.is_file()]


def read_tokenizer(path, loaded, digest="", source="", option=""):
    """The Tokenizer at `path`; UserError unless it is a SentencePiece model, and the artifact's as far as that is known."""
    import train_gpt

    try:
        pieces = train_gpt.load_tokenizer(str(path))
    except train_gpt.UserError as error:
        raise UserError(f"{option}{path}: {str(error).partition(': ')[2]}") from None
    if pieces.vocab_size() != loaded.cfg.vocab_size:
        raise UserError(f"{option}{path}: {pieces.vocab_size()} pieces, but {loaded.path} has VOCAB_SIZE={loaded.cfg.vocab_size}")
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest and found != digest:
        raise UserError(f"{option}{path}: SHA-256 {found[:12]}..., but {loaded.path} was trained with {digest[:12]}... ({source})")
    return Tokenizer(path, pieces, train_gpt.ByteTable.load(str(path), loaded.cfg.vocab_size))


def read_text(path):
    """A text file as it stands, line ends included; UserError unless it is UTF-8 and not empty."""
    try:
        text = Path(path).read_bytes().decode()
    except OSError as error:
        raise UserError(f"--text {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"--text {path}: not UTF-8 (byte {error.start})") from None
    if not text:
        raise UserError(f"--text {path}: empty; expected text to score")
    return text


def shown(text):
    """The text as a terminal may have it: a model can write any byte, and some of them would steer the terminal."""
    if not sys.stdout.isatty():
        return text
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)


if __name__ == "__main__":
    not_a_command("tools/sample.py, inspect_artifact.py, export_hf.py and report.py")
