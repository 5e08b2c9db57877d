"""The denominator of bits per byte: the bytes of the text that went in, for every kind of SentencePiece model.

The oracle is the input itself: `len(document.encode())`, which no tokenizer, table or decoder takes part in.
"""

from __future__ import annotations

import functools
import hashlib
import io
import json
from pathlib import Path
from typing import NamedTuple

import encode_text
import hub_fetch
import numpy as np
import prepare_data
import pytest
import sentencepiece
import shard_io

WORDS = "the of and to in a is that for it as was with be by on not he his but at are this have from or had an they which".split()
IDS = {"pad_id": 0, "bos_id": 1, "eos_id": 2, "unk_id": 3}
LOSSLESS = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False, "add_dummy_prefix": False}
PLAIN = ["a quiet end", " leads", "trails  ", "in  ner", "lines\nand\ttabs\n", "\u4e2d\u6587 \u5b57", "\U0001f600 <sep>x <sep>", "e\u0301 \ufb01 \u00bd \uff21"]
META = [*PLAIN, "a\u2581b \u2581", "\u2581x"]  # SentencePiece's own space in the text


def english(count: int, seed: int = 0) -> list[str]:
    rng = np.random.default_rng(seed)
    return [f"{seed}-{i}: " + " ".join(rng.choice(WORDS, 12)) + "." for i in range(count)]


def chinese(count: int) -> list[str]:
    """Text without a single ASCII space, of 40 characters."""
    rng = np.random.default_rng(0)
    return ["".join(chr(0x4E00 + c) for c in rng.integers(40, size=300)) for _ in range(count)]


class Kind(NamedTuple):
    """A SentencePiece model, documents that went in, and what `check` has to say about them."""

    options: dict
    verdict: str = "exact"  # or "differs", or "refused"
    reason: str = ""  # a part of what `check` prints
    documents: list = PLAIN
    trained_on: str = "english"

    @property
    def true_bytes(self) -> list[int]:
        return [len(document.encode()) for document in self.documents]

    @property
    def model(self) -> bytes:
        return train(self.trained_on, **self.options)


@functools.cache
def train(trained_on: str, **options: object) -> bytes:
    """The bytes of a tiny model."""
    texts = {"english": [*english(60), "four    spaces", "\n\nlines\n    of code\n", "<sep> caf\u00e9 \ufb01"], "chinese": chinese(100)}[trained_on]
    model = io.BytesIO()
    arguments = {"model_type": "bpe", "vocab_size": 400, "byte_fallback": True, "hard_vocab_limit": False, "character_coverage": 0.98}
    arguments |= {"minloglevel": 3, "num_threads": 1} | IDS | options
    symbols = arguments.pop("symbols", None)
    if symbols:
        arguments["user_defined_symbols"] = symbols.split()
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(texts), model_writer=model, **arguments)
    return model.getvalue()


DEFAULTS = "the tokenizer normalizes (nmt_nfkc, extra spaces removed)"
LOST = "unknown pieces, whose text is lost"
SPELLED = "the vocabulary has no piece for U+2581, so spaces are spelled in its three bytes"
SUFFIX = "the space added at a document's end (add_dummy_prefix) stays in the text"
KINDS = {
    **{f"{name} lossless": Kind(LOSSLESS | {"model_type": name}) for name in ("bpe", "unigram", "char")},
    **{f"{name} default": Kind({"model_type": name}, "differs", DEFAULTS) for name in ("bpe", "unigram", "char")},
    **{
        f"{name} without byte fallback": Kind({"model_type": name, "byte_fallback": False, "vocab_size": 40}, "refused", LOST)
        for name in ("bpe", "unigram", "char", "word")
    },
    **{
        f"normalization {rule}": Kind(LOSSLESS | {"normalization_rule_name": rule}, "differs", f"the tokenizer normalizes ({rule})")
        for rule in ("nfkc", "nmt_nfkc", "nfkc_cf", "nmt_nfkc_cf")
    },
    # the vocabulary is whole words, each with its U+2581, and has none for a space alone
    "word": Kind({"model_type": "word"}, "differs", SPELLED),
    "dummy prefix": Kind(LOSSLESS | {"add_dummy_prefix": True}),
    "extra spaces removed": Kind(LOSSLESS | {"remove_extra_whitespaces": True}, "differs", "the tokenizer normalizes (extra spaces removed)"),
    "symbols": Kind(LOSSLESS | {"symbols": "<sep> \u2581\u2581 of\u2581the"}),
    "control symbols": Kind(LOSSLESS | {"control_symbols": "<sep>"}),
    "suffix": Kind(LOSSLESS | {"treat_whitespace_as_suffix": True}),
    "suffix, dummy": Kind(LOSSLESS | {"treat_whitespace_as_suffix": True, "add_dummy_prefix": True}, "differs", SUFFIX),
    "suffix, default": Kind({"treat_whitespace_as_suffix": True}, "differs", SUFFIX),
    "suffix, unigram": Kind({"treat_whitespace_as_suffix": True, "model_type": "unigram"}, "differs", SUFFIX),
    "no space": Kind(LOSSLESS, "differs", SPELLED, english(20, 7), "chinese"),
    "no space, dummy": Kind(LOSSLESS | {"add_dummy_prefix": True}, "differs", "at a document's start", english(20, 7), "chinese"),
    "no space, default": Kind({}, "differs", SPELLED, trained_on="chinese"),
    "no space in the text either": Kind(LOSSLESS, documents=chinese(3), trained_on="chinese"),
    "U+2581 in the text": Kind(LOSSLESS, "differs", "the input has U+2581, which SentencePiece takes for a space", META),
    "U+2581, normalized": Kind({}, "differs", DEFAULTS, META),
    "unknown pieces that decode to nothing": Kind(LOSSLESS | {"byte_fallback": False, "unk_surface": ""}, "refused", LOST),
    "unknown pieces of the right length": Kind(LOSSLESS | {"byte_fallback": False, "unk_surface": "???"}, "refused", LOST, ["the of \u4e2d"]),
}


def write_jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def make(folder: Path, model: bytes, documents: list[str]) -> Path:
    """Shards of a few training documents, and of the documents for validation."""
    folder.mkdir(exist_ok=True)
    (folder / "given.model").write_bytes(model)
    source, val = write_jsonl(folder / "train.jsonl", english(5)), write_jsonl(folder / "val.jsonl", documents)
    arguments = ["text", source, "--val", val, "--tokenizer", folder / "given.model", "--out", folder / "out", "--workers", 1]
    assert prepare_data.main(list(map(str, arguments))) == 0
    return folder / "out"


def manifest_of(folder: Path) -> dict:
    return json.loads((folder / "manifest.json").read_text())


def check(folder: Path, *options: object) -> int:
    return prepare_data.main(["check", str(folder), "--workers", "1", *map(str, options)])


@pytest.mark.parametrize("name", KINDS)
def test_the_input_s_bytes_are_recorded_and_check_names_what_differs(tmp_path: Path, capsys: pytest.CaptureFixture, name: str) -> None:
    kind = KINDS[name]
    folder = make(tmp_path, kind.model, kind.documents)
    manifest = manifest_of(folder)
    assert manifest["val"]["document_bytes"] == kind.true_bytes
    assert manifest["val"]["bytes"] == sum(kind.true_bytes)
    assert manifest["tokenizer_sha256"] == hashlib.sha256(kind.model).hexdigest()
    warned = "unknown pieces: the tokenizer cannot represent the text" in capsys.readouterr().err
    assert warned == (kind.reason == LOST)

    sp = sentencepiece.SentencePieceProcessor(model_proto=kind.model)
    decoded = [len(sp.decode(sp.encode(document)).encode()) for document in kind.documents]
    status = check(folder)
    out, err = capsys.readouterr()
    if kind.verdict == "refused":
        assert status == 2 and kind.reason in err and err.count("\n") == 1
    elif kind.verdict == "differs":
        first, count = next(i for i, n in enumerate(decoded) if n != kind.true_bytes[i]), sum(map(int.__ne__, decoded, kind.true_bytes))
        assert status == 0, err
        assert f"went in has {sum(kind.true_bytes):,} bytes, which the score counts; it differs in {count} of {len(decoded)} documents" in out
        assert f"the first: document {first}, {kind.true_bytes[first]} bytes of input, {decoded[first]} decoded" in out
        assert kind.reason in out
    else:
        assert status == 0, err
        assert [sp.decode(sp.encode(document)) for document in kind.documents] == kind.documents
        assert "the decoded text has the bytes of the text that went in, in each document" in out


def test_the_issue_s_case_has_the_input_s_bytes(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """A tokenizer of text without spaces, on English: three bytes were counted for a space."""
    kind = KINDS["no space"]
    folder = make(tmp_path, kind.model, kind.documents)
    spaces = sum(document.count(" ") for document in kind.documents)
    assert check(folder) == 0
    assert f"{sum(kind.true_bytes) + 2 * spaces:,} bytes" in capsys.readouterr().out  # what the table and the decoder say
    assert sum(manifest_of(folder)["val"]["document_bytes"]) == sum(kind.true_bytes)


@pytest.mark.parametrize("extra", [[], ["one space"]])
def test_our_own_tokenizer_of_text_without_spaces_has_a_space(extra: list[str]) -> None:
    sp = sentencepiece.SentencePieceProcessor(model_proto=encode_text.train_tokenizer(chinese(20) + extra, 400))
    assert sp.encode(" a b", out_type=str)[0] == "\u2581"
    assert sp.decode(sp.encode(" a b")) == " a b"


def test_the_manifest_keeps_the_bytes_on_one_line_and_changes_no_shard(tmp_path: Path) -> None:
    folder = make(tmp_path, KINDS["bpe lossless"].model, PLAIN)
    lines = (folder / "manifest.json").read_text().splitlines()
    assert sum('"document_bytes": [' in line and line.endswith("]") for line in lines) == 1
    sp = sentencepiece.SentencePieceProcessor(model_proto=KINDS["bpe lossless"].model)
    assert shard_io.read_shard(folder / "fineweb_val_000000.bin").tolist() == [i for text in PLAIN for i in [1, *sp.encode(text)]]


def test_json_lists_of_numbers_are_compact_and_text_that_looks_like_one_is_kept(tmp_path: Path) -> None:
    value = {"a": list(range(5)), "b": "[\n1,  2]", "c": [], "d": [["[1,   2]"], [1]], "e": ["x"]}
    shard_io.write_json(tmp_path / "a.json", value)
    assert json.loads((tmp_path / "a.json").read_text()) == value
    assert '"a": [0, 1, 2, 3, 4],' in (tmp_path / "a.json").read_text()


def edit_manifest(folder: Path, **changes: object) -> None:
    """Change val's entries of the manifest, or take one away (None)."""
    manifest = manifest_of(folder)
    for name, value in changes.items():
        part = manifest["val"] if name in ("document_bytes", "bytes") else manifest
        part.pop(name, None)
        if value is not None:
            part[name] = value
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"document_bytes": [5, 7, 3]}, "manifest.json: document_bytes of val add up to 15, but bytes is "),
        ({"document_bytes": [5, "x"]}, "manifest.json: document_bytes of val is [5, 'x'], expected a list of whole numbers"),
        ({"document_bytes": [True]}, "expected a list of whole numbers"),
        ({"document_bytes": [-1]}, "expected a list of whole numbers"),
        ({"document_bytes": [sum(KINDS["dummy prefix"].true_bytes)], "bytes": None}, "bytes of input recorded, 11 decoded; nothing in the tokenizer's model explains"),
        ({"document_bytes": KINDS["dummy prefix"].true_bytes[:-1], "bytes": None}, "8 validation documents, but manifest.json records the bytes of 7"),
        ({"document_bytes": [12, *KINDS["dummy prefix"].true_bytes[1:]], "bytes": None}, "12 bytes of input recorded, 11 decoded"),
        ({"files": []}, "manifest.json: files is [], expected an object"),
        ({"vocab_size": "400"}, "manifest.json: vocab_size is '400', expected a whole number"),
    ],
)  # fmt: skip
def test_recorded_bytes_that_are_not_the_shards_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture, changes: dict, expected: str) -> None:
    folder = make(tmp_path, KINDS["dummy prefix"].model, PLAIN)
    edit_manifest(folder, **changes)
    capsys.readouterr()
    assert check(folder) == 2
    line = capsys.readouterr().err
    assert expected in line and line.count("\n") == 1


def test_a_manifest_that_cannot_be_read_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = make(tmp_path, KINDS["dummy prefix"].model, PLAIN)
    (folder / "manifest.json").write_text('{"val": {"documents"')
    assert check(folder) == 2
    assert "manifest.json: cannot be read, expected a JSON object" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "status", "expected"),
    [
        ("bpe default", 0, "only the decoded text was compared"),
        ("no space", 2, "no piece for U+2581"),
        ("suffix, dummy", 2, "which manifest.json does not record"),
    ],
)
def test_without_recorded_bytes_check_says_what_it_compared(tmp_path: Path, capsys: pytest.CaptureFixture, name: str, status: int, expected: str) -> None:
    folder = make(tmp_path, KINDS[name].model, KINDS[name].documents)
    edit_manifest(folder, document_bytes=None, bytes=None, tokenizer_sha256=None)
    capsys.readouterr()
    assert check(folder) == status
    assert expected in "".join(capsys.readouterr())


# -------------------------------------------------------------------------------------------------- the tokenizer's identity


def test_fetch_records_the_tokenizer_too(tmp_path: Path) -> None:
    (tmp_path / "tokenizers").mkdir()
    tokenizer = hub_fetch.RemoteFile("t", 0, None, tmp_path / "tokenizers" / "t.model")
    tokenizer.target.write_bytes(KINDS["bpe lossless"].model)
    shard = hub_fetch.RemoteFile("s", 0, None, make(tmp_path, KINDS["bpe lossless"].model, PLAIN) / "fineweb_val_000000.bin")
    files = {"tokenizer": [tokenizer], "train": [shard], "val": [shard], "published": 1}
    manifest = hub_fetch.describe(hub_fetch.EXPORTS["sp1024"], "c0ffee", files, tmp_path / "out")
    assert manifest["tokenizer_sha256"] == hashlib.sha256(KINDS["bpe lossless"].model).hexdigest()
    assert "document_bytes" not in manifest["val"]  # what went in is not known


@pytest.mark.parametrize("knows", ["manifest", "older manifest", "no manifest"])
def test_check_refuses_another_tokenizer(tmp_path: Path, capsys: pytest.CaptureFixture, knows: str) -> None:
    folder = make(tmp_path, KINDS["bpe lossless"].model, PLAIN)
    if knows == "older manifest":
        edit_manifest(folder, tokenizer_sha256=None, document_bytes=None)
    elif knows == "no manifest":
        (folder / "manifest.json").unlink()
    pieces = manifest_of(folder)["vocab_size"] if knows != "no manifest" else 0
    other, larger = tmp_path / "other.model", tmp_path / "larger.model"
    other.write_bytes(train("english", **LOSSLESS, self_test_sample_size=1))  # the same pieces, another file
    larger.write_bytes(encode_text.train_tokenizer(english(60), 420))
    for path in (other, larger):
        capsys.readouterr()
        assert check(folder, "--tokenizer", path) == 2
        line = capsys.readouterr().err
        assert f"--tokenizer {path}: " in line and line.count("\n") == 1
        if path == larger and pieces:
            assert f"420 pieces, expected {pieces} as {folder / 'manifest.json'} says" in line
        else:
            assert f"SHA-256 {hashlib.sha256(path.read_bytes()).hexdigest()[:16]}" in line and "not the shards' tokenizer" in line
    assert check(folder, "--tokenizer", tmp_path / "given.model") == 0


def test_a_bos_piece_that_text_can_become_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """With "<s>" among the user's symbols, the text "<s>" would begin a document."""
    (tmp_path / "a.model").write_bytes(train("english", **LOSSLESS, symbols="<s>"))
    source = write_jsonl(tmp_path / "a.jsonl", english(5))
    assert prepare_data.main(["text", str(source), "--tokenizer", str(tmp_path / "a.model"), "--out", str(tmp_path / "out")]) == 2
    assert "a control piece that no text becomes" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_model_s_own_rules_are_read_in_the_model(tmp_path: Path) -> None:
    (tmp_path / "rules.tsv").write_text("41\t42 43\n")  # A becomes BC
    model = train("english", **LOSSLESS, normalization_rule_tsv=str(tmp_path / "rules.tsv"))
    kind = encode_text.TokenizerKind.read(sentencepiece.SentencePieceProcessor(model_proto=model))
    assert kind.normalization and not kind.dummy_prefix and not kind.space_is_suffix
