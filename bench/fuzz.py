"""Random inputs for tools/prepare_data.py and random environments for train_gpt.py: only clean errors may come of them.

    python bench/fuzz.py data --seconds 1800               folders of odd files, names, encodings, compressions, damages
    python bench/fuzz.py settings --seconds 1800           environments: settings, near misses, values of all kinds
    python bench/fuzz.py artifact --cases 100000           damaged files to a loader: artifact, checkpoint, resume, shard, ...
    python bench/fuzz.py artifact --guided --cases 100000  the same, guided by the lines that are reached (needs atheris)
    python bench/fuzz.py data --seed 0 --case 123          one case again; its files are kept

`data` writes documents that it knows, calls `text` (in this process, now and then in one of its own) and decodes every
shard: each document must be there, once, or be counted as empty, duplicate or refused, as often as this file counted when
it wrote them. `settings` reads the environment as train_gpt.py does, builds what is accepted and small, and now and then
runs the script for two steps on a tiny data set. A traceback, a hang, an error of more than a line, a wrong exit code or a
document too few or too many is a failure; a case depends on seed and number alone. Exit code 1 if any failed.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import gzip
import importlib.util
import io
import itertools
import json
import lzma
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args, get_origin

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools"), str(ROOT / "bench")]

import encode_text  # noqa: E402
import fuzz_loaders  # noqa: E402
import prepare_data  # noqa: E402
import sentencepiece  # noqa: E402
import shard_io  # noqa: E402
from command_line import OneLineParser  # noqa: E402
from fuzz_loaders import Failure  # noqa: E402

HANG_S = 120  # for one call
WORDS = "the of and to in a is that for it as was with be by on not he his but at are this have from or had an they which".split()


@contextlib.contextmanager
def hang_is_a_failure() -> Iterator[None]:
    """Failure if the block takes too long."""

    def stop(*_: object) -> None:
        raise Failure(f"hangs: more than {HANG_S} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(HANG_S)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


# -------------------------------------------------------------------------------------------------- data: what is written

ODD_TEXTS = (
    "", " ", "\n\n", "\t \n", "\u2581", "a\u2581b", "\ufeff", "\x00", "a\x00b", "\u200b", "\ufffd", "x" * 3000, " " * 3000, "\u4e2d\u6587" * 500,
    "e\u0301" * 50, "a" + "\u0301" * 500, "\uff9e" * 100, "\U0001f600", "\r\n", "a\r\nb\rc", "\u2028\u2029\x85", "<s></s><unk>", "{}", '{"text": "x"}',
    "<0x41>", "\u2047", "\U0010ffff", "\ufdfa", "a b" * 900, "line\n" * 400, "para\n\n" * 300,
)  # fmt: skip
BAD_LINES = (
    b"{", b"text", b'{"text": 5}', b'{"text": ' + b"9" * 5000 + b"}", b'{"text": []}', b'{"text": {"text": "a"}}', b'{"text": true}', b'{"body": "a"}',
    b"[1]", b'"a"', b"null", b'{"text": "\xff"}', b"[" * 3000, b'{"text": "a"} {}', b"\x00", b'{"text": "a', b"NaN", b'{"text": NaN}',
)  # fmt: skip
NAMES = (
    b"a", b"with space", b"-dash", b"\xc3\xbc\xe4\xb8\xad", b"not-utf8-\xff", b"new\nline", b"quote\"'", b"$HOME `id`", b"a.b.c", b"x" * 200,
    b"*", b"\xe2\x80\xae", b"#", b"~", b"%00", b"\x1b[31m", b"it's", b"\t",
)  # fmt: skip
SUFFIXES = (".txt", ".jsonl", ".json", ".parquet")
BOM, SEPARATORS = b"\xef\xbb\xbf", ("<|endoftext|>", "\n\n\n\n", "=-=", "\u2014\u2014", "\n---\n")
PACKED = {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress, ".zst": lambda data: zstandard().compress(data)}


def zstandard():  # noqa: ANN201
    """A compressor, with a window as large as `zstd --ultra --long=28` takes."""
    import zstandard

    return zstandard.ZstdCompressor(compression_params=zstandard.ZstdCompressionParameters.from_level(1, window_log=28, write_content_size=0))


@dataclasses.dataclass
class Expected:
    """What this file knows of the files that it wrote."""

    files: int = 0  # that are to be read
    texts: list[str] = dataclasses.field(default_factory=list)  # of documents, the empty ones among them
    refused: int = 0
    damaged: bool = False  # a file that cannot be read to its end
    whole: bool = False  # a .txt without a separator: if it is alone, it is cut into documents that are not known here

    def add(self, other: Expected) -> None:
        self.files += other.files
        self.texts += other.texts
        self.refused += other.refused
        self.damaged |= other.damaged
        self.whole |= other.whole

    @property
    def is_cut(self) -> bool:
        return self.whole and self.files == 1


def a_text(rng: np.random.Generator, n: Iterator[int]) -> str:
    """A document: words that no other has, or something odd, or both."""
    own = f"{next(n)} " + " ".join(rng.choice(WORDS, rng.integers(1, 40)))
    kind, odd = rng.random(), ODD_TEXTS[rng.integers(len(ODD_TEXTS))]
    return own if kind < 0.6 else odd if kind < 0.75 else odd + own if kind < 0.9 else own + odd


def some_lines(rng: np.random.Generator, n: Iterator[int]) -> tuple[bytes, Expected]:
    """Lines of JSON, and what is none."""
    lines, expected = [], Expected(files=1)
    for _ in range(rng.integers(0, 12)):
        kind = rng.random()
        if kind < 0.06:
            lines.append(BAD_LINES[rng.integers(len(BAD_LINES))])
            expected.refused += 1
        elif kind < 0.1:
            lines.append(b'{"text": null}')
            expected.texts.append("")
        elif kind < 0.15:
            lines.append([b"", b"  ", b"\t\r"][rng.integers(3)])  # no document
        else:
            text = a_text(rng, n)
            line = json.dumps({"id": 1, "text": text}, ensure_ascii=bool(rng.random() < 0.5)).encode()
            lines.append(BOM * (kind < 0.2) + line + b"\r" * (kind > 0.9))
            expected.texts.append(text)
    return b"\n".join(lines) + b"\n" * int(rng.integers(0, 3)), expected


def a_json(rng: np.random.Generator, n: Iterator[int]) -> tuple[bytes, Expected]:
    """An array, or lines of JSON (whose first may look like one)."""
    if rng.random() < 0.4:
        data, expected = some_lines(rng, n)
        if data.removeprefix(BOM).lstrip()[:1] == b"[":
            with contextlib.suppress(ValueError, RecursionError):
                return data, Expected(files=1, refused=len(json.loads(data)))
            return data, Expected(files=1, damaged=True)
        return data, expected
    expected = Expected(files=1, texts=[a_text(rng, n) for _ in range(rng.integers(0, 8))])
    items: list[Any] = [{"text": text} for text in expected.texts]
    if rng.random() < 0.15:
        items.append([None, 5, {"text": 1}, {}, "a"][rng.integers(5)])
        expected.refused += 1
    return BOM * (rng.random() < 0.2) + json.dumps(items, indent=int(rng.integers(0, 3)) or None).encode(), expected


def a_txt(rng: np.random.Generator, n: Iterator[int], separator: bytes) -> tuple[bytes, Expected]:
    """Documents between separators, with byte order marks and line breaks around them."""
    data = b""
    for _ in range(rng.integers(0, 9)):
        raw = a_text(rng, n).encode() + b"\xff" * (rng.random() < 0.03)
        breaks = b"\n" * int(rng.integers(0, 3))
        data += breaks + BOM * (rng.random() < 0.2) + raw + breaks + separator * (rng.random() < 0.8)
    parts = data.split(separator)
    if not parts[-1].strip(b"\r\n"):
        parts.pop()  # what follows the last separator
    expected = Expected(files=1, whole=separator not in data)
    for part in parts:
        try:
            expected.texts.append(part.decode().strip("\r\n").removeprefix("\ufeff").lstrip("\r\n"))
        except UnicodeDecodeError:
            expected.refused += 1
    return data, expected


def a_parquet(rng: np.random.Generator, n: Iterator[int]) -> tuple[bytes, Expected]:
    """A table with a column of text, a few rows of it null."""
    import pyarrow
    from pyarrow import parquet

    texts = [a_text(rng, n) if rng.random() < 0.95 else None for _ in range(rng.integers(0, 12))]
    column, handle, kind = pyarrow.array(texts, pyarrow.string()), io.BytesIO(), rng.random()
    column = column.dictionary_encode() if kind < 0.2 else column.cast(pyarrow.large_string()) if kind < 0.4 else column
    table = pyarrow.table({"n": list(range(len(texts))), "text": column})
    parquet.write_table(table, handle, row_group_size=int(rng.integers(1, 9)))
    return handle.getvalue(), Expected(files=1, texts=[text or "" for text in texts])


def damage(rng: np.random.Generator, packed: str, data: bytes) -> bytes:
    """The packed file cut short, or (not of parquet, whose end says where to read) with another beginning."""
    if packed == "" or rng.random() < 0.5:
        return data[: int(rng.integers(1, len(data)))]
    return (b"(\xb5/\xfd" if packed == ".zst" else b"") + b"\xff" * 9 + data[13:]


def a_file(rng: np.random.Generator, n: Iterator[int], folder: bytes, separator: bytes) -> Expected:
    """Write one file at a random place in the folder; returns what of it is to be read."""
    suffix, packed = SUFFIXES[rng.integers(4)], list(PACKED)[rng.integers(4)]
    makers = {".jsonl": some_lines, ".json": a_json, ".parquet": a_parquet, ".txt": lambda r, m: a_txt(r, m, separator)}
    data, expected = makers[suffix](rng, n)
    packed = "" if suffix == ".parquet" else packed
    data = PACKED[packed](data)
    if rng.random() < 0.03 and len(data) > 40 and (packed or suffix == ".parquet"):
        data, expected = damage(rng, packed, data), Expected(files=1, damaged=True)
    ending, kind = (suffix + packed).encode(), rng.random()
    name = NAMES[rng.integers(len(NAMES))] + str(next(n)).encode()
    place = folder + [b"", b"/sub", b"/sub/\xc3\xa4 \xff", b"/.ipynb_checkpoints"][rng.choice(4, p=[0.6, 0.2, 0.1, 0.1])]
    hidden = place.endswith(b"checkpoints")
    if kind < 0.1:
        ending = ending.upper()
    elif kind < 0.2:
        hidden = True
        name, ending = [(b"." + name, ending), (b"._" + name, ending), (name, ending + b".bak"), (name, b"")][rng.integers(4)]
    os.makedirs(place, exist_ok=True)
    path = place + b"/" + name + ending
    with open(path, "wb") as file:
        file.write(data)
    if not hidden and rng.random() < 0.05:  # a second name of the same file
        os.symlink(path, place + b"/z" + str(next(n)).encode() + ending)
    return Expected() if hidden else expected


# -------------------------------------------------------------------------------------------------- data: what comes of it


class Outcome(NamedTuple):
    """A call of prepare_data.py and what it gave."""

    arguments: list[str]
    status: int
    err: str


def call(arguments: list[str]) -> Outcome:
    """main() in this process."""
    out, err = io.StringIO(), io.StringIO()
    with hang_is_a_failure(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = prepare_data.main(arguments)
    return Outcome(arguments, status, err.getvalue())


def call_apart(arguments: list[str]) -> Outcome:
    """The script in a process of its own, on a console that is ASCII."""
    command = [sys.executable, str(ROOT / "tools" / "prepare_data.py"), *arguments]
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    try:
        done = subprocess.run(command, capture_output=True, env=environment, timeout=HANG_S)
    except subprocess.TimeoutExpired:
        raise Failure(f"hangs: more than {HANG_S} s") from None
    return Outcome(arguments, done.returncode, done.stderr.decode("ascii"))


class DataFuzzer:
    """Random folders through `prepare_data.py text`."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.model = folder, folder / "lossless.model"
        sample = [" ".join(WORDS[i:]) for i in range(len(WORDS))] + ["    \n\n  x\n"] * 5
        self.model.write_bytes(encode_text.train_tokenizer(sample, 360))

    def case(self, rng: np.random.Generator, number: int) -> Iterator[str]:
        """One call of `text` on a new folder, and the proof of what it wrote; yields what to count."""
        place = self.folder / f"case {number}"
        separator = SEPARATORS[rng.integers(len(SEPARATORS))]
        sides: dict[str, Expected] = {}
        n = itertools.count(1)
        for side in ("in", "val")[: 1 + int(rng.random() < 0.4)]:
            sides[side] = Expected()
            os.makedirs(place / side)
            for _ in range(rng.integers(1, 6)):
                sides[side].add(a_file(rng, n, os.fsencode(place / side), separator.encode()))
        arguments = ["text", str(place / "in"), "--out", str(place / "out"), *self.options(rng, place, separator, "val" in sides)]
        apart = number % 25 == 24
        outcome = (call_apart if apart else call)(arguments)
        yield "in a process of its own" if apart else "in this process"
        if outcome.status == 0:
            prove_documents(place / "out", sides)
            yield "data sets made, every document accounted for"
            if number % 5 == 0 and shard_io.shard_paths(place / "out", "val"):
                prove_check(place / "out")
                yield "data sets that check passes"
        else:
            yield f"refused: {prove_refusal(place, sides, outcome)}"
        shutil.rmtree(place)

    def options(self, rng: np.random.Generator, place: Path, separator: str, has_val: bool) -> list[str]:
        options = ["--workers", "1", "--separator", separator.replace("\n", "\\n"), "--shard-tokens", str(rng.integers(4, 9) ** 4)]
        if rng.random() < 0.04:
            options += ["--vocab-size", str(rng.integers(324, 420))]
            options += ["--character-coverage", str(rng.choice([0.3, 0.9, 1.0]))] * int(rng.random() < 0.5)
        else:
            options += ["--tokenizer", str(self.model)]
        if has_val:
            options += ["--val", str(place / "val")]
        elif rng.random() < 0.7:
            options += ["--val-fraction", str(rng.choice([0, 0.01, 0.3, 0.5]))]
        return options + ["--bad-documents", "skip"] * int(rng.random() < 0.7)


def key(text: str) -> str:
    """Texts that a tokenizer may make equal have one key."""
    return "".join(c for c in unicodedata.normalize("NFKC", text) if ord(c) > 32 and c not in "\x7f\u2581")


def prove_documents(out: Path, sides: dict[str, Expected]) -> None:
    """Failure unless each document that was written down is in a shard or counted; the shards are decoded here."""
    manifest = json.loads((out / "manifest.json").read_text())
    found = {split: decoded_documents(out, split, manifest) for split in ("train", "val")}
    val_keys = {key(text) for text in found["val"]} if "val" in sides else set()
    given, empty, duplicate, refused = collections.Counter(), 0, 0, 0
    for side, expected in sides.items():
        for text in expected.texts:
            if not text.strip():
                empty += 1
            elif side == "in" and key(text) in val_keys:
                duplicate += 1
            else:
                given[text.replace("\u2581", " ")] += 1
        refused += expected.refused
    if any(expected.damaged for expected in sides.values()):
        raise Failure("a damaged file was read as a whole one")
    if any(expected.is_cut for expected in sides.values()):
        prove_text(found, sides, manifest)
        return
    counted = {"empty": empty, "duplicate": duplicate, "refused": refused}
    if manifest["left_out"] != counted:
        raise Failure(f"left_out is {manifest['left_out']}, expected {counted}")
    got = collections.Counter(found["train"] + found["val"])
    if got != given:
        raise Failure(f"documents lost: {given - got}, added: {got - given}")


def prove_text(found: dict[str, list[str]], sides: dict[str, Expected], manifest: dict) -> None:
    """Failure unless the characters of all documents are those that went in: for a text that the reader cuts itself."""
    if any(manifest["left_out"].values()):
        return  # empty pieces, or pieces that are no UTF-8: which ones is not known here
    without = {ord(c): None for c in "\r\n\ufeff"}
    got, given = (
        collections.Counter("".join(texts).replace("\u2581", " ").translate(without))
        for texts in (found["train"] + found["val"], [text for expected in sides.values() for text in expected.texts])
    )
    if got != given:
        raise Failure(f"characters lost: {given - got}, added: {got - given}")


def decoded_documents(out: Path, split: str, manifest: dict) -> list[str]:
    """The documents in a split's shards; Failure unless the manifest says as many, and of val their bytes."""
    sp = sentencepiece.SentencePieceProcessor(model_proto=(out / "tokenizer.model").read_bytes())
    tokens = np.concatenate([np.zeros(0, "<u2"), *(np.fromfile(path, "<u2", offset=1024) for path in sorted(out.glob(f"fineweb_{split}_*.bin")))])
    starts = [*np.flatnonzero(tokens == 1).tolist(), len(tokens)]
    texts = [sp.decode(tokens[a + 1 : b].tolist()) for a, b in itertools.pairwise(starts)]
    if len(texts) != manifest[split]["documents"]:
        raise Failure(f"{split} holds {len(texts)} documents, the manifest says {manifest[split]['documents']}")
    if split == "val":
        sizes, least = manifest["val"]["document_bytes"], [len(text.encode()) for text in texts]
        # U+2581 comes back as a space, two bytes shorter
        if len(sizes) != len(least) or any(a < b or (a - b) % 2 or a - b > 2 * text.count(" ") for a, b, text in zip(sizes, least, texts, strict=True)):
            raise Failure(f"document_bytes is {sizes}, the decoded documents have {least}")
    return texts


def prove_check(out: Path) -> None:
    outcome = call(["check", str(out), "--workers", "1"])
    if outcome.status:
        raise Failure(f"check refuses what text wrote: {outcome.err}")


def prove_refusal(place: Path, sides: dict[str, Expected], outcome: Outcome) -> str:
    """The kind of a call's error; Failure unless it is one line, has a reason and leaves nothing behind."""
    lines = [line for line in outcome.err.splitlines() if not line.startswith("prepare_data.py: warning: ")]
    if outcome.status != 2 or len(lines) != 1 or not lines[0].startswith("prepare_data.py: error: "):
        raise Failure(f"exit code {outcome.status} and {outcome.err!r}")
    if (place / "out").exists():
        raise Failure(f"a folder is left behind after {lines[0]}")
    stops = "skip" not in outcome.arguments
    documents = sum(bool(text.strip()) for text in sides["in"].texts)
    reasons = {
        "no file to read": ("no text there", any(not expected.files for expected in sides.values())),
        "damaged": ("damaged or", any(expected.damaged for expected in sides.values())),
        "not JSON": ("not JSON", any(expected.damaged or stops and expected.refused for expected in sides.values())),
        "no document": ("(--bad-documents skip", stops and any(expected.refused for expected in sides.values())),
        # by chance, of a few documents: all or none of them
        "all held out": ("no training document", "val" in sides or documents < 20),
        "none held out": ("is held out", "--val-fraction" in outcome.arguments or documents < 2),
        "empty val": (f"--val {place}", "val" in sides),
        "too small for the vocabulary": ("cannot be trained", "--vocab-size" in outcome.arguments),
    }
    for name, (words, possible) in reasons.items():
        if words in lines[0] and possible:
            return name
    raise Failure(f"no reason for {lines[0]}")


# -------------------------------------------------------------------------------------------------- settings

ODD_VALUES = (
    "", " ", "nan", "inf", "-inf", "1e400", "-0", "0", "1", "-1", "2", "0x10", "1_000", "1,5", "1.5", "1e3", "9" * 30, "9" * 5000, "\u0663", "true", "TRUE",
    "yes", "None", "none", "auto", " 3", "3 ", "+3", "3\n", "\udcff", "..", "/", "/dev/null", "a" * 300, "%s{}", "';--", "1e-300", "4294967296", "2.0",
)  # fmt: skip
SMALL = {
    "NUM_LAYERS": "2", "MODEL_DIM": "64", "NUM_HEADS": "4", "NUM_KV_HEADS": "2", "MLP_MULT": "2", "EMBED_DIM": "24", "BITNET_GROUP_SIZE": "32",
    "TRAIN_SEQ_LEN": "32", "YARN_MAX_LEN": "64", "TRAIN_BATCH_TOKENS": "256", "ITERATIONS": "2", "WARMUP_STEPS": "0", "MAX_WALLCLOCK_SECONDS": "0",
    "SLIDING_EVAL_STRIDE": "16", "VAL_BATCH_SIZE": "1024", "TRAIN_LOG_EVERY": "1",
}  # fmt: skip
LARGE = 1024  # a number of the model's, above which it is not built
PROCESS_EVERY = 40
KEPT = ("PATH", "HOME", "LANG", "LD_LIBRARY_PATH", "VIRTUAL_ENV", "TMPDIR")


class SettingsFuzzer:
    """Random environments through Config.from_env, the model, and now and then the script."""

    def __init__(self, folder: Path, process_every: int = PROCESS_EVERY) -> None:
        import torch

        import train_gpt

        torch.set_num_threads(1)
        self.t, self.folder, self.process_every = train_gpt, folder, process_every
        self.data = folder / "data"
        text = folder / "a.jsonl"
        documents = [" ".join(WORDS[i % 7 :] + WORDS[: i % 11]) + f" {i}." for i in range(80)]
        text.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
        arguments = ["text", str(text), "--vocab-size", "324", "--out", str(self.data), "--val-fraction", ".1", "--workers", "1"]
        if call(arguments).status:
            raise Failure("no data to train on")
        self.base = SMALL | {"VOCAB_SIZE": "324", "DATA_PATH": str(self.data), "TOKENIZER_PATH": str(self.data / "tokenizer.model")}

    def case(self, rng: np.random.Generator, number: int) -> Iterator[str]:
        """One environment; yields what to count."""
        env = self.base | dict(self.setting(rng) for _ in range(rng.integers(1, 6)))
        cfg = self.read(env)
        yield "refused" if cfg is None else "accepted"
        small = cfg is not None and self.is_small(cfg)
        if small:
            with hang_is_a_failure():
                yield self.build(cfg)
        if number % self.process_every == 0 and (small or cfg is None):
            yield self.run(env)

    def setting(self, rng: np.random.Generator) -> tuple[str, str]:
        """A name (now and then nearly one) and a value (now and then one of its kind)."""
        fields = dataclasses.fields(self.t.Config)
        field = fields[rng.integers(len(fields))]
        name = field.name.upper()
        if rng.random() < 0.03:
            at = int(rng.integers(len(name)))
            name = name[:at] + name[at + 1 :] if rng.random() < 0.5 else name[:at] + "X" + name[at:]
        if rng.random() < 0.25:
            return name, ODD_VALUES[rng.integers(len(ODD_VALUES))]
        return name, self.value(rng, field)

    def value(self, rng: np.random.Generator, field: dataclasses.Field) -> str:
        """A value of the setting's kind, within its limits or on them or just outside."""
        kind, limits = self.t.setting_kinds(self.t.Config)[field.name], field.metadata["limits"]
        if get_origin(kind) is Literal:
            return str(get_args(kind)[rng.integers(len(get_args(kind)))])
        if kind is bool:
            return str(rng.integers(2))
        if kind is str:
            return str(rng.choice(["a", "x.y", "\u4e2d", "-", str(self.folder / "new")]))
        numbers = [*limits.values(), *(bound + d for bound in limits.values() for d in (-1, 1)), 0, 1, 2, 3, 8, 32, 64, 96]
        number = numbers[rng.integers(len(numbers))] if rng.random() < 0.7 else getattr(self.t.Config.from_env({}), field.name)
        return str(int(number)) if kind is int else str(float(number) * float(rng.choice([0.5, 1, 1])))

    def read(self, env: dict[str, str]) -> Any:
        """The Config, None if it is refused; Failure for anything but a UserError of one line."""
        try:
            with hang_is_a_failure():
                return self.t.Config.from_env(env)
        except self.t.UserError as error:
            if "\n" in str(error) or not str(error).strip():
                raise Failure(f"an error that is not one line: {str(error)!r}") from None
            return None

    def is_small(self, cfg: Any) -> bool:
        """Whether it is built, and trained, in seconds."""
        numbers = [getattr(cfg, f.name) for f in dataclasses.fields(cfg) if f.metadata["model"]]
        steps = cfg.train_batch_tokens, cfg.train_seq_len, cfg.val_batch_size
        return all(n <= LARGE for n in numbers if type(n) is int) and max(steps) <= 8 * LARGE and cfg.num_layers <= 16 and cfg.iterations <= 3

    def build(self, cfg: Any) -> str:
        try:
            self.t.GPT(cfg)
        except self.t.UserError:
            return "accepted, but refused as a model"
        return "built"

    def run(self, env: dict[str, str]) -> str:
        """The script in an empty folder: a result, or one line and exit code 2."""
        place = Path(tempfile.mkdtemp(dir=self.folder))
        clean = {name: value for name, value in os.environ.items() if name in KEPT}
        command = [sys.executable, str(ROOT / "train_gpt.py")]
        try:
            done = subprocess.run(command, cwd=place, env=clean | {"OMP_NUM_THREADS": "1"} | env, capture_output=True, timeout=HANG_S)
        except subprocess.TimeoutExpired:
            raise Failure(f"hangs: more than {HANG_S} s") from None
        finally:
            shutil.rmtree(place)
        out, err = (text.decode(errors="replace") for text in (done.stdout, done.stderr))
        if "Traceback" in err or done.returncode not in (0, 2):
            raise Failure(f"exit code {done.returncode}: {err[-1500:]}")
        if done.returncode == 2 and not err.splitlines()[-1].startswith("train_gpt.py: "):
            raise Failure(f"the last line of the error is {err.splitlines()[-1]!r}")
        if done.returncode == 0 and "result {" not in out:
            raise Failure("no result line")
        return "script: a result" if done.returncode == 0 else "script: one line and exit code 2"


# -------------------------------------------------------------------------------------------------- command line


def run_cases(fuzzer: Any, seed: int, numbers: Iterator[int], seconds: float) -> tuple[collections.Counter, list[str]]:
    """(what was counted, a line for each failure) of the cases that begin within the time."""
    counts, failures, started = collections.Counter(), [], time.monotonic()
    for number in numbers:
        if time.monotonic() - started > seconds:
            break
        counts["cases"] += 1
        try:
            for kind in fuzzer.case(np.random.default_rng([seed, number]), number):
                counts[kind] += 1
        except Failure as failure:
            failures.append(f"case {number}: {failure}")
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            failures.append(f"case {number}: {''.join(traceback.format_exception(error)[-3:])}")
        if len(failures) > counts["failures"]:
            counts["failures"] += 1
            print(f"FAILED {failures[-1]}", flush=True)
    return counts, failures


def main(argv: list[str] | None = None) -> int:
    parser = OneLineParser(__doc__.split("\n")[0])
    parser.add_argument("what", choices=("data", "settings", *fuzz_loaders.TARGETS))
    parser.add_argument("--seconds", type=float, default=60, help="cases begin within this time (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cases", type=int, help="at most so many")
    parser.add_argument("--case", type=int, help="this one alone")
    parser.add_argument("--guided", action="store_true", help="a loader: with atheris (requirements-extra.txt)")
    parser.add_argument("--process-every", type=int, default=PROCESS_EVERY, help="settings: cases to one run of the script (default: %(default)s)")
    # every file is brought to the disk, which takes its time
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    parser.add_argument("--folder", default=memory, help="where the files go; those of a failed case stay (default: %(default)s)")
    args = parser.parse_args(argv)
    numbers = [args.case] if args.case is not None else range(args.cases) if args.cases else itertools.count()
    folder = Path(tempfile.mkdtemp(prefix=f"fuzz {args.what} ", dir=args.folder))
    if args.guided:
        if args.what not in fuzz_loaders.TARGETS or importlib.util.find_spec("atheris") is None:
            parser.error(f"--guided: expected one of {', '.join(fuzz_loaders.TARGETS)}, and the package atheris (requirements-extra.txt)")
        fuzz_loaders.guided(args.what, folder, args.cases or -1, args.seed)
    makers = {"data": DataFuzzer, "settings": lambda folder: SettingsFuzzer(folder, args.process_every)}
    fuzzer = makers.get(args.what, lambda folder: fuzz_loaders.LoaderFuzzer(args.what, folder))(folder)
    counts, failures = run_cases(fuzzer, args.seed, iter(numbers), args.seconds)
    print(f"seed {args.seed}")
    for kind, count in sorted(counts.items()):
        print(f"{count:8,}  {kind}")
    if failures:
        print(f"the folders of failed cases: {folder}; one again: fuzz.py {args.what} --seed {args.seed} --case N")
    else:
        shutil.rmtree(folder)
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
