"""tools/prepare_data.py: the demo corpus, shards of any text, and the proof of the byte count."""

from __future__ import annotations

import errno
import gzip
import io
import json
import lzma
import os
import re
import shutil
import subprocess
import sys
import time
import tracemalloc
import unicodedata
from collections.abc import Iterator
from pathlib import Path

import check_data
import demo_corpus
import encode_text
import numpy as np
import prepare_data
import pytest
import sentencepiece
import shard_io
import text_files
from hypothesis import given, settings
from hypothesis import strategies as st

from train_gpt import ByteTable

ROOT = Path(__file__).resolve().parent.parent
HARD_CASES = ROOT / "tests" / "data" / "hard_cases.jsonl"
BOS = 1
NORMALIZING = {"normalization_rule_name": "nmt_nfkc", "add_dummy_prefix": False}  # the official tokenizers' settings
DUMMY_PREFIX = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False, "add_dummy_prefix": True}
NO_FALLBACK = {**NORMALIZING, "byte_fallback": False, "vocab_size": 60}
WORDS = "the of and to in a is that for it as was with be by on not he his but at are this have from or had an they which".split()


def english(count: int, seed: int = 0) -> list[str]:
    """Different documents of a few lines."""
    rng = np.random.default_rng(seed)
    return [f"Document {seed}-{i}\n" + "\n".join(" ".join(rng.choice(WORDS, 12)) for _ in range(4)) + "." for i in range(count)]


def hard_texts() -> list[str]:
    """The hard cases as a tokenizer can take them."""
    texts = [json.loads(line)["text"] for line in HARD_CASES.read_text().splitlines()]
    texts = [re.sub("[\ud800-\udfff]", "\ufffd", text) for text in texts]
    return [text for text in texts if text.strip()]


def train_model(path: Path, **options: object) -> Path:
    arguments = {"vocab_size": 400, "byte_fallback": True, "model_type": "bpe", "minloglevel": 2, "character_coverage": 0.98}
    arguments |= {"pad_id": 0, "bos_id": BOS, "eos_id": 2, "unk_id": 3, "hard_vocab_limit": False} | options
    model = io.BytesIO()
    sentences = english(60) + ["four    spaces", "\n\nlines\n    of code\n", "caf\u00e9 na\u00efve \u2014 " * 30] * 9
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(sentences), model_writer=model, **arguments)
    path.write_bytes(model.getvalue())
    return path


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    lossless = folder / "lossless.model"
    lossless.write_bytes(encode_text.train_tokenizer(english(60) + ["four    spaces\n\n"] * 9, 400))
    variants = {"normalizing": NORMALIZING, "dummy": DUMMY_PREFIX, "no_fallback": NO_FALLBACK}
    return {"lossless": lossless} | {name: train_model(folder / name, **options) for name, options in variants.items()}


def processor(path: Path) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_file=str(path))


def write_jsonl(path: Path, texts: list[str]) -> Path:
    data = "".join(json.dumps({"source": "test", "text": text}) + "\n" for text in texts).encode()
    packers = {".gz": gzip.compress, ".xz": lzma.compress, ".zst": lambda data: pytest.importorskip("zstandard").compress(data)}
    pack = packers.get(path.suffix, bytes)
    path.write_bytes(pack(data[:500]) + pack(data[500:]))  # compressed files may be joined
    return path


def run_text(out: Path, *arguments: object) -> int:
    return prepare_data.main(["text", *map(str, arguments), "--out", str(out), "--workers", "1"])


def tokens_of(folder: Path, split: str) -> list[int]:
    return [token for path in shard_io.shard_paths(folder, split) for token in shard_io.read_shard(path).tolist()]


def encoded(model: Path, texts: list[str]) -> list[int]:
    sp = processor(model)
    return [token for text in texts for token in [BOS, *sp.encode(text)]]


def files_in(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()} if folder.exists() else {}


def check(folder: Path, table: object = None) -> dict[str, check_data.SplitSize]:
    sp = processor(folder / "tokenizer.model")
    return check_data.check_dataset(folder, sp, table or ByteTable.load(str(folder / "tokenizer.model"), sp.vocab_size()))


# -------------------------------------------------------------------------------------------------- demo


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    out = tmp_path_factory.mktemp("demo") / "sp512"
    command = [sys.executable, str(ROOT / "tools" / "prepare_data.py"), "demo", "--out", str(out), "--vocab-size", "512"]
    first = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert first.returncode == 0, first.stderr
    assert first.stderr == ""  # the corpus has the recorded hash
    return out, subprocess.run(command, capture_output=True, text=True, timeout=20).stdout


def test_demo_makes_a_dataset_whose_text_is_val_txt(demo: tuple[Path, str]) -> None:
    out, second_run = demo
    assert "is there" in second_run  # made once
    sp = processor(out / "tokenizer.model")
    manifest = json.loads((out / "manifest.json").read_text())
    texts = [sp.decode(document.tolist()) for document in check_data.read_token_documents([out / "fineweb_val_000000.bin"], sp)]
    val_text = (out / "val.txt").read_bytes()
    assert "".join(texts).encode() == val_text
    assert 500_000 <= len(val_text) <= 700_000
    assert manifest["val"]["bytes"] == len(val_text) == check(out)["val"].text_bytes
    assert manifest["gzip_bpb"] == 8 * len(gzip.compress(val_text, 9)) / len(val_text)
    assert manifest["val"]["tokens"] == len(tokens_of(out, "val"))
    assert [sp.id_to_piece(i) for i in (0, 1, 2, 3, 4, 259)] == ["<pad>", "<s>", "</s>", "<unk>", "<0x00>", "<0xFF>"]


def test_demo_splits_share_no_folder_and_no_long_line(demo: tuple[Path, str]) -> None:
    out, _ = demo
    sp = processor(out / "tokenizer.model")
    train = sp.decode(tokens_of(out, "train")).split("\n")
    val = (out / "val.txt").read_text(encoding="utf-8").split("\n")
    shared = {line.strip() for line in val} & {line.strip() for line in train}
    assert max(map(len, shared)) < 100
    modules = {"a/x/m.py": ["t" * 60], "a/y/n.py": ["u" * 940], "a/x/o.py": ["v" * 10]}
    assert demo_corpus.held_out_folders(modules) == {"a/x"}


def test_demo_drops_training_docstrings_that_resemble_validation_text() -> None:
    words = [f"word{i}" for i in range(60)]
    val = {"v.py": [" ".join(words[:30])]}
    train = {"copy.py": [" ".join(words[:12] + words[40:50])], "new.py": [" ".join(words[25:])], "line.py": ["-" * 120 + "\nother text"]}
    val["w.py"] = ["  " + "-" * 120]
    assert set(demo_corpus.drop_near_duplicates(train, val)) == {"new.py"}


def test_docstrings_are_found_wherever_python_keeps_them() -> None:
    pad = "." * 80
    source = f'''
"""module {pad}"""
if True:
    class A:
        "class {pad}"
        def f(self):
            """method {pad}

                indented
            """
            def g():
                r"""nested \\d {pad}"""
add_newdoc("numpy", "x", ("attribute", """newdoc {pad}"""))
text = "not a docstring {pad}"
def h():
    """short"""
'''
    found = demo_corpus.docstrings(source.encode())
    assert [text.split()[0] for text in found] == ["module", "class", "method", "nested", "newdoc"]
    assert found[2].endswith(f"{pad}\n\nindented")


# -------------------------------------------------------------------------------------------------- text


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.xz", "a.jsonl.zst", "a.txt", "a.txt.xz", "a.parquet"])
def test_every_format_gives_the_same_shards(tmp_path: Path, models: dict[str, Path], monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(text_files, "BLOCK_BYTES", 700)
    texts, path = english(20), tmp_path / name
    if name.endswith(".parquet"):
        pytest.importorskip("pyarrow.parquet").write_table(pytest.importorskip("pyarrow").table({"text": texts}), path)
    elif ".txt" in name:
        data = "\n<|endoftext|>\n".join(texts).encode() + b"\n"
        path.write_bytes(lzma.compress(data) if name.endswith(".xz") else data)
    else:
        write_jsonl(path, texts)
    assert run_text(tmp_path / "out", path, "--tokenizer", models["lossless"], "--val-fraction", 0) == 0
    assert tokens_of(tmp_path / "out", "train") == encoded(models["lossless"], texts)
    assert not shard_io.shard_paths(tmp_path / "out", "val")


def test_the_result_depends_on_the_input_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", english(400))
    arguments = ["text", str(source), "--vocab-size", "350", "--val-fraction", "0.2", "--out"]
    monkeypatch.setattr(text_files, "BLOCK_BYTES", 8000)
    assert prepare_data.main([*arguments, str(tmp_path / "three"), "--workers", "3"]) == 0
    monkeypatch.setattr(text_files, "BLOCK_BYTES", 3000)
    assert prepare_data.main([*arguments, str(tmp_path / "one"), "--workers", "1"]) == 0
    assert files_in(tmp_path / "one") == files_in(tmp_path / "three")
    sizes = check(tmp_path / "one")
    assert 40 < sizes["val"].documents < 120
    assert sizes["train"].documents + sizes["val"].documents == 400


def test_shards_have_the_asked_size_and_lose_nothing(tmp_path: Path, models: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_files, "BLOCK_BYTES", 300)
    source = write_jsonl(tmp_path / "a.jsonl", english(9))
    assert run_text(tmp_path / "out", source, "--tokenizer", models["lossless"], "--val", write_jsonl(tmp_path / "v.jsonl", english(5, 1)),
                    "--shard-tokens", 100) == 0  # fmt: skip
    expected = encoded(models["lossless"], english(9))
    assert tokens_of(tmp_path / "out", "train") == expected
    sizes = [len(shard_io.read_shard(path)) for path in shard_io.shard_paths(tmp_path / "out", "train")]
    assert sizes == [100] * (len(expected) // 100) + [len(expected) % 100]
    assert check(tmp_path / "out")["val"].text_bytes == sum(len(text.encode()) for text in english(5, 1))  # across shard borders


def test_shard_bytes_are_the_published_format(tmp_path: Path) -> None:
    writer = shard_io.ShardWriter(tmp_path, "train", 10)
    writer.write([1, 65535, 258])
    writer.close()
    data = (tmp_path / "fineweb_train_000000.bin").read_bytes()
    assert data[:12] == (20240520).to_bytes(4, "little") + (1).to_bytes(4, "little") + (3).to_bytes(4, "little")
    assert data[12:1024] == bytes(1012)
    assert data[1024:] == bytes([1, 0, 255, 255, 2, 1])


def test_validation_documents_never_reach_the_training_shards(tmp_path: Path, models: dict[str, Path]) -> None:
    texts = english(500)
    variants = [texts[3].replace(" ", "  "), texts[4] + "\n", texts[5].replace(" ", "\u00a0")]  # the same to the tokenizer
    folder = tmp_path / "in"
    folder.mkdir()
    source, val = write_jsonl(folder / "a.jsonl", texts + variants), write_jsonl(folder / "v.jsonl", texts[3:6])
    assert run_text(tmp_path / "out", folder, "--val", val, "--tokenizer", models["normalizing"]) == 0
    assert tokens_of(tmp_path / "out", "train") == encoded(models["normalizing"], texts[:3] + texts[6:])
    assert tokens_of(tmp_path / "out", "val") == encoded(models["normalizing"], texts[3:6])
    assert run_text(tmp_path / "split", source, "--val-fraction", 0.5, "--tokenizer", models["normalizing"]) == 0
    assert check(tmp_path / "split")["val"].documents > 5


def test_a_trained_tokenizer_loses_nothing_and_keeps_the_official_ids(tmp_path: Path) -> None:
    assert run_text(tmp_path, HARD_CASES, "--vocab-size", 700, "--val-fraction", 0.2) == 0
    sp = processor(tmp_path / "tokenizer.model")
    for text in hard_texts():
        assert sp.decode(sp.encode(text)) == text.replace("\u2581", " ")  # SentencePiece's own space cannot survive
    assert [sp.pad_id(), sp.bos_id(), sp.eos_id(), sp.unk_id()] == [0, 1, 2, 3]
    assert [sp.is_byte(i) for i in (3, 4, 259, 260)] == [False, True, True, False]
    assert not sp.encode("x", out_type=str)[0].startswith("\u2581")


def test_tokenizer_sample_is_bounded_and_independent_of_order() -> None:
    documents = [(encode_text.document_key(text), text) for text in english(200)]
    split = encode_text.Split(0.1)
    sample = encode_text.tokenizer_sample(iter(documents), split, max_bytes=9000)
    assert 3000 < sum(map(len, sample)) <= 9000
    assert sorted(sample) == sorted(encode_text.tokenizer_sample(reversed(documents), split, max_bytes=9000))
    everything = encode_text.tokenizer_sample(iter(documents), split, max_bytes=10**9)
    assert everything == [text for key, text in documents if split.of(key) == "train"]


@settings(max_examples=60, deadline=None, database=None)
@given(st.lists(st.text("ab\n", max_size=12), max_size=12), st.integers(1, 9), st.sampled_from(["\n", "<|e|>", "aa"]))
def test_blocks_end_at_borders_and_lose_no_byte(tmp_path_factory: pytest.TempPathFactory, parts: list[str], block: int, border: str) -> None:
    path = tmp_path_factory.mktemp("blocks") / "a.txt"
    data = border.join(parts).encode()
    path.write_bytes(data)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_files, "BLOCK_BYTES", block)
        blocks = list(text_files._cut_at_borders(path, border.encode()))
    assert b"".join(piece.payload for piece in blocks) == data
    assert all(piece.payload.endswith(border.encode()) for piece in blocks[:-1])
    longest = max(map(len, data.split(border.encode()))) + 2 * len(border)
    assert all(len(payload) <= block + longest for _, _, payload in blocks)
    assert [piece.first for piece in blocks] == [1 + b"".join(b.payload for b in blocks[:i]).count(b"\n") for i in range(len(blocks))]


def test_memory_does_not_grow_with_the_input(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.xz"
    with lzma.open(path, "wb", preset=0) as file:
        for _ in range(40):
            file.write(b'{"text": "' + b"word " * 200_000 + b'"}\n')  # 40 MB
    tracemalloc.start()
    documents = sum(len(text_files.parse_block(block, text_files.Layout())) for block in text_files.read_blocks(path, text_files.Layout()))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert documents == 40
    assert peak < 12_000_000


def test_workers_are_never_far_ahead_of_the_writer() -> None:
    class Pool:
        running = most = 0

        def submit(self, _: object, item: int) -> Pool:
            self.running += 1
            self.most = max(self.most, self.running)
            self.item = item
            return self

        def result(self) -> int:
            self.running -= 1
            return self.item

    pool = Pool()
    assert len(list(encode_text._map_in_order(pool, None, range(100), 6))) == 100
    assert pool.most == 6


def bad_inputs(folder: Path, models: dict[str, Path]) -> dict[str, tuple[list, str]]:
    """Mistakes of a user: the arguments, and what the error line has to say."""
    good = write_jsonl(folder / "good.jsonl", english(40))
    whole = write_jsonl(folder / "whole.jsonl.xz", english(400)).read_bytes()

    def file(name: str, data: bytes) -> Path:
        (folder / name).write_bytes(data)
        return folder / name

    tokenizer, occupied = ["--tokenizer", models["lossless"]], folder / "occupied"
    assert run_text(occupied, good, *tokenizer, "--val-fraction", 0.2) == 0
    return {
        "json": ([file("j.jsonl", b'{"text": "a"}\n\n{"text": \n'), *tokenizer], "j.jsonl: line 3: not JSON"),
        "field": ([file("f.jsonl", b'{"body": "a"}\n'), *tokenizer], "f.jsonl: line 1: expected a JSON object with the field 'text'"),
        "type": ([file("t.jsonl", b'{"text": 5}\n'), *tokenizer], "t.jsonl: line 1: the text is a number, expected a string (--bad-documents"),
        "utf8": ([file("u.txt", b"fine\nbroken \xff\xfe\n"), *tokenizer], "u.txt: line 2: not UTF-8"),
        "xz": ([file("x.jsonl.xz", whole[:-900]), *tokenizer], "x.jsonl.xz: damaged or cut short"),
        "gz": ([file("g.jsonl.gz", gzip.compress(english(9)[0].encode())[:-9]), *tokenizer], "g.jsonl.gz: damaged or cut short"),
        "long": ([file("l.jsonl", b"a" * 5000), *tokenizer], "l.jsonl: line 1 begins a document of more than 0 MiB"),
        "missing": ([folder / "none.jsonl", *tokenizer], "INPUT {}/none.jsonl: no such file"),
        "suffix": ([file("a.csv", b"a"), *tokenizer], "INPUT {}/a.csv: no text there; expected"),
        "nothing": (tokenizer, "INPUT: no text file given"),
        "val": ([good, "--val", folder / "none.txt", *tokenizer], "--val {}/none.txt: no such file"),
        "empty val": ([good, "--val", file("e.txt", b" \n"), *tokenizer], "--val {}/e.txt: no document there"),
        "no val": ([good, "--val-fraction", 1e-9, *tokenizer], "--val-fraction 1e-09: none of 40 documents"),
        "all val": ([good, "--val-fraction", 1, *tokenizer], "good.jsonl: no training document"),
        "no model": ([good, "--tokenizer", folder / "none.model"], "--tokenizer {}/none.model: No such file"),
        "model": ([good, "--tokenizer", good], "--tokenizer {}/good.jsonl: not a SentencePiece model"),
        "vocab": ([good, "--vocab-size", 60000], "--vocab-size 60000: cannot be trained on this text"),
        "occupied": ([good, *tokenizer, "--out", occupied], "--out {}/occupied: 2 shards are there"),
    }


def test_mistakes_end_in_one_line_and_change_nothing(
    tmp_path: Path, models: dict[str, Path], capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    cases = bad_inputs(tmp_path, models)
    monkeypatch.setattr(text_files, "MAX_DOCUMENT_BYTES", 1 << 16)
    monkeypatch.setattr(text_files, "BLOCK_BYTES", 1 << 12)
    out = tmp_path / "occupied"
    before = files_in(out)
    for name, (arguments, expected) in cases.items():
        if name == "long":
            monkeypatch.setattr(text_files, "MAX_DOCUMENT_BYTES", 1 << 11)
        capsys.readouterr()
        overwrite = [] if name == "occupied" else ["--overwrite"]
        assert prepare_data.main(["text", *map(str, arguments), *overwrite, "--workers", "1", *([] if "--out" in arguments else ["--out", str(out)])]) == 2
        line = capsys.readouterr().err
        assert line.startswith("prepare_data.py: error: ") and line.count("\n") == 1, (name, line)
        assert expected.replace("{}", str(tmp_path)) in line, (name, line)
        assert files_in(out) == before, name
        monkeypatch.setattr(text_files, "MAX_DOCUMENT_BYTES", 1 << 16)


@pytest.mark.parametrize("damage", ["cut", "bits"])
def test_damaged_zstd_is_noticed(tmp_path: Path, models: dict[str, Path], capsys: pytest.CaptureFixture, damage: str) -> None:
    path = write_jsonl(tmp_path / "a.jsonl.zst", english(300))
    data = bytearray(path.read_bytes())
    path.write_bytes(data[: len(data) // 2] if damage == "cut" else data[:4] + bytes(40) + data[44:])
    assert run_text(tmp_path / "out", path, "--tokenizer", models["lossless"]) == 2
    assert "a.jsonl.zst: damaged or cut short" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["text", "a.txt", "--out", "o", "--vocab-size", "12"], "--vocab-size: 12: expected a whole number from 324"),
        (["text", "a.txt", "--out", "o"], "one of the arguments --tokenizer --vocab-size is required"),
        (["text", "a.txt", "--out", "o", "--vocab-size", "400", "--val-fraction", "2"], "--val-fraction: 2: expected a number from 0 to 1"),
        (["demo", "--vocab-size", "x"], "--vocab-size: x: expected a whole number"),
        (["nonsense"], "invalid choice: 'nonsense'"),
    ],
)
def test_bad_options_end_in_one_line(capsys: pytest.CaptureFixture, arguments: list[str], expected: str) -> None:
    with pytest.raises(SystemExit) as stop:
        prepare_data.main(arguments)
    line = capsys.readouterr().err
    assert stop.value.code == 2
    assert line.startswith("prepare_data.py: error: ") and line.count("\n") == 1
    assert expected in line


def test_a_new_dataset_replaces_the_old_one_completely(tmp_path: Path, models: dict[str, Path]) -> None:
    source, tokenizer = write_jsonl(tmp_path / "a.jsonl", english(30)), ["--tokenizer", models["lossless"], "--val-fraction", "0.3"]
    out = tmp_path / "out"
    assert run_text(out, source, *tokenizer, "--shard-tokens", 90) == 0
    (out / "notes.txt").write_text("the user's own")
    (out / ".partial").mkdir()  # of a run that was killed
    assert run_text(out, source, *tokenizer, "--overwrite") == 0
    assert sorted(files_in(out)) == ["fineweb_train_000000.bin", "fineweb_val_000000.bin", "manifest.json", "notes.txt", "tokenizer.model"]


# -------------------------------------------------------------------------------------------------- data as it lies on disks


def decoded(folder: Path, split: str = "train") -> list[str]:
    """The documents of a split, as the tokenizer decodes them."""
    sp = processor(folder / "tokenizer.model")
    return [sp.decode(document[1:].tolist()) for document in check_data.read_token_documents(shard_io.shard_paths(folder, split), sp)]


def manifest_of(folder: Path) -> dict:
    return json.loads((folder / "manifest.json").read_text())


def everything(folder: Path) -> int:
    """The documents that the manifest accounts for."""
    manifest = manifest_of(folder)
    return manifest["train"]["documents"] + manifest["val"]["documents"] + sum(manifest["left_out"].values())


@pytest.mark.parametrize(
    "run",
    [
        pytest.param("ACGT" * 17_500, id="DNA"),
        pytest.param(" " * 70_000, id="spaces"),
        pytest.param("\u2581" * 70_000, id="U+2581"),
        pytest.param("\u4e2d\u6587\u5b57" * 23_000, id="Chinese"),
        pytest.param("x\n" * 35_000, id="line breaks"),
    ],
)
def test_a_run_that_the_trainer_cannot_hold_is_split_for_training_only(tmp_path: Path, run: str) -> None:
    texts = [*english(60), f"before{run}after"]
    assert run_text(tmp_path / "out", write_jsonl(tmp_path / "a.jsonl", texts), "--vocab-size", 400, "--val-fraction", 0) == 0
    assert decoded(tmp_path / "out") == [text.replace("\u2581", " ") for text in texts]
    assert "".join(encode_text.split_long_runs(texts[-1])) == texts[-1]
    assert list(encode_text.split_long_runs(texts[0])) == [texts[0]]  # the demo's model stays as it was


@pytest.mark.parametrize(("last_act", "code"), [("os.kill(os.getpid(), 9)", -9), ("os.write(2, b'C++ text') and os._exit(255)", 255)])
def test_a_trainer_that_dies_does_not_take_us_along(capfd: pytest.CaptureFixture, last_act: str, code: int) -> None:
    with pytest.raises(ChildProcessError, match=f"ended with exit code {code}$"):
        encode_text.run_apart(eval, last_act.replace("os.", "__import__('os')."))
    assert capfd.readouterr().err == ""
    with pytest.raises(RuntimeError, match="the library's own"):
        encode_text.run_apart(exec, "raise RuntimeError('the library\\'s own')")
    assert encode_text.run_apart(len, "abc") == 3


def test_a_dead_trainer_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def dead(*_: object) -> None:
        raise ChildProcessError("ended with exit code -9")

    monkeypatch.setattr(encode_text, "run_apart", dead)
    with pytest.raises(shard_io.UserError, match="--vocab-size 400: SentencePiece's trainer ended with exit code -9; is there enough memory"):
        encode_text.train_tokenizer(english(20), 400)


LINES = {
    "null": (b'{"text": null}', "empty"),
    "blank": (b'{"text": " \\n"}', "empty"),
    "5,000 digits": (b'{"text": "a", "n": ' + b"9" * 5000 + b"}", "train"),
    "5,000 digits as the text": (b'{"text": ' + b"9" * 5000 + b"}", "refused: the text is a number"),
    "number": (b'{"text": 5.0}', "refused: the text is a number"),
    "boolean": (b'{"text": true}', "refused: the text is a boolean"),
    "list": (b'{"text": ["a"]}', "refused: the text is an array"),
    "object": (b'{"text": {}}', "refused: the text is an object"),
    "no field": (b'{"body": "a"}', "refused: expected a JSON object with the field 'text'"),
    "no object": (b'"a"', "refused: expected a JSON object with the field 'text'"),
    "no JSON": (b"text", "refused: not JSON in UTF-8"),
    "deep": (b"[" * 100_000, "refused: not JSON in UTF-8"),
    "not UTF-8": (b'{"text": "\xff"}', "refused: not JSON in UTF-8"),
    "BOM": (b'\xef\xbb\xbf{"text": "a"}', "train"),
    "BOM alone": (b"\xef\xbb\xbf", "none"),
    "not a number": (b'{"text": "a", "n": NaN, "i": -Infinity}', "train"),
    "lone surrogate": (b'{"text": "\\ud800a"}', "train"),
}


@pytest.mark.parametrize("name", LINES)
def test_every_odd_line_is_read_or_counted_or_named(tmp_path: Path, models: dict[str, Path], capsys: pytest.CaptureFixture, name: str) -> None:
    line, expected = LINES[name]
    kind, _, message = expected.partition(": ")
    texts = [json.dumps({"text": text}).encode() for text in english(3)]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join([texts[0], line, *texts[1:]]) + b"\n")
    arguments = [tmp_path / "a.jsonl", "--tokenizer", models["lossless"], "--val-fraction", 0]
    assert run_text(tmp_path / "out", *arguments) == (2 if message else 0)
    if message:
        error = capsys.readouterr().err
        assert f"a.jsonl: line 2: {message}" in error and "--bad-documents skip" in error and error.count("\n") == 1
    assert run_text(tmp_path / "skip", *arguments, "--bad-documents", "skip") == 0
    manifest = manifest_of(tmp_path / "skip")
    assert manifest["left_out"] == {"empty": kind == "empty", "duplicate": 0, "refused": kind == "refused"}
    assert manifest["train"]["documents"] == 3 + (kind == "train")
    assert f"left out: {int(kind == 'empty')} empty, 0 duplicate, {int(kind == 'refused')} refused" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["strings", "null", "numbers", "not UTF-8", "dictionary", "binary", "lists"])
def test_odd_parquet_columns(tmp_path: Path, models: dict[str, Path], capsys: pytest.CaptureFixture, name: str) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    raw = arrow.array([b"a text", b"\xff\xfe", b"more"], arrow.binary())
    column, refused = {
        "strings": (arrow.array(["a text", "x", "more"], arrow.large_string()), 0),
        "null": (arrow.array(["a text", None, "more"]), 0),
        "numbers": (arrow.array([1, 2, 3]), 3),
        "not UTF-8": (arrow.Array.from_buffers(arrow.string(), 3, raw.buffers()), 1),
        "dictionary": (arrow.array(["a text", "x", "more"]).dictionary_encode(), 0),
        "binary": (raw, 1),
        "lists": (arrow.array([["a"], ["b"], ["c"]]), 3),
    }[name]
    (tmp_path / "in").mkdir()
    parquet.write_table(arrow.table({"text": column}), tmp_path / "in" / "a.parquet")
    write_jsonl(tmp_path / "in" / "b.jsonl", english(2))
    arguments = [tmp_path / "in", "--tokenizer", models["lossless"], "--val-fraction", 0]
    assert run_text(tmp_path / "out", *arguments, "--bad-documents", "skip") == 0
    assert manifest_of(tmp_path / "out")["left_out"] == {"empty": name == "null", "duplicate": 0, "refused": refused}
    assert everything(tmp_path / "out") == 5
    capsys.readouterr()
    assert run_text(tmp_path / "stop", *arguments) == (2 if refused else 0)
    assert not refused or f"a.parquet: row {2 if refused == 1 else 1}: " in capsys.readouterr().err


@pytest.mark.parametrize("window_log", [27, 28])
def test_zstd_with_a_long_window_is_read(tmp_path: Path, models: dict[str, Path], window_log: int) -> None:
    zstandard = pytest.importorskip("zstandard")
    parameters = zstandard.ZstdCompressionParameters.from_level(1, window_log=window_log)
    stream = zstandard.ZstdCompressor(compression_params=parameters).compressobj()  # without a size: the window is what the frame says
    data = b"".join(json.dumps({"text": text}).encode() + b"\n" for text in english(5))
    (tmp_path / "a.jsonl.zst").write_bytes(stream.compress(data) + stream.flush())
    assert run_text(tmp_path / "out", tmp_path / "a.jsonl.zst", "--tokenizer", models["lossless"], "--val-fraction", 0) == 0
    assert decoded(tmp_path / "out") == english(5)


def test_a_long_document_is_encoded_in_windows_that_change_no_token(models: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encode_text, "WINDOW_CHARS", 300)
    monkeypatch.setattr(encode_text, "CONTEXT_CHARS", 100)
    rng = np.random.default_rng(0)
    texts = {
        "words": " ".join(english(40)),
        "no space": "".join(rng.choice(list("ACGT"), 3000)),
        "rare": "".join(map(chr, rng.integers(0x4E00, 0x9000, 1000))),
        "spaces": "x" + " " * 999 + "y" + " " * 301,
        "marks": "e\u0301 \ufb01 \u00bd\n\n" * 200,
        "edge": "w " * 150,
    }
    for name, model in models.items():
        sp = processor(model)
        for kind, text in texts.items():
            ids, whole = encode_text.encode_documents(sp, [text, "short"]).tolist(), [BOS, *sp.encode(text), BOS, *sp.encode("short")]
            if kind == "spaces":  # nothing tells one of them from the next
                assert name in ("normalizing", "no_fallback") or sp.decode(ids) == sp.decode(whole) and len(ids) <= len(whole) + 9
            else:
                assert ids == whole, (name, kind)


def test_a_long_document_takes_little_more_memory_than_itself(models: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encode_text, "WINDOW_CHARS", 1 << 14)
    text = "".join(map(chr, np.random.default_rng(0).integers(0x4E00, 0x9000, 150_000)))  # a token a byte
    sp = processor(models["lossless"])
    tracemalloc.start()
    tokens = len(encode_text.encode_documents(sp, [text]))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert tokens > 440_000
    assert peak < 8 * tokens  # two bytes each, and the window's lists: all ids as a list would be 8 bytes or more


def test_a_whole_encyclopaedia_as_one_document(tmp_path: Path, models: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    text = " ".join(english(2000) * 23)
    assert len(text) > 8 << 20  # which was the limit
    source = write_jsonl(tmp_path / "a.jsonl", ["another", text])
    assert [text for _, text in encode_text.read_documents([source], text_files.Layout())] == ["another", text]
    monkeypatch.setattr(encode_text, "WINDOW_CHARS", 1 << 14)
    source = write_jsonl(tmp_path / "b.jsonl", ["another", text[: 1 << 17]])
    assert run_text(tmp_path / "out", source, "--tokenizer", models["lossless"], "--val-fraction", 0) == 0
    assert tokens_of(tmp_path / "out", "train") == encoded(models["lossless"], ["another", text[: 1 << 17]])


def test_a_tokenizer_is_trained_on_parts_of_a_document_that_is_larger_than_the_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encode_text, "SAMPLE_PART_CHARS", 1000)
    text = " ".join(english(600))
    sample = encode_text.tokenizer_sample([(encode_text.document_key(text), text)], encode_text.Split(0.0), max_bytes=20_000)
    assert 5_000 < sum(map(len, sample)) <= 20_000
    assert all(part in text for part in sample)


@pytest.mark.parametrize("separator", ["<|endoftext|>", "\n\n", "aa"])
@pytest.mark.parametrize("block", [7, 1 << 20])
def test_every_document_of_a_text_file_loses_its_bom(
    tmp_path: Path, models: dict[str, Path], monkeypatch: pytest.MonkeyPatch, separator: str, block: int
) -> None:
    monkeypatch.setattr(text_files, "BLOCK_BYTES", block)
    documents = ["\ufeffone", "\r\n\ufefftwo\n", "\ufeff\nthree", "", "\ufeff", "f\ufeffour", "five\n"]
    (tmp_path / "a.txt").write_text(separator.join(documents), encoding="utf-8", newline="")
    assert run_text(tmp_path / "out", tmp_path / "a.txt", "--tokenizer", models["lossless"], "--val-fraction", 0, "--separator", separator) == 0
    parts = [part.strip("\r\n").removeprefix("\ufeff").lstrip("\r\n") for part in separator.join(documents).split(separator)]
    assert decoded(tmp_path / "out") == [part for part in parts if part]
    assert {"one", "two", "three"} <= set(parts)
    assert manifest_of(tmp_path / "out")["left_out"]["empty"] == parts.count("")


def test_utf_16_is_named(tmp_path: Path, models: dict[str, Path], capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "a.txt").write_text("a text", encoding="utf-16")
    assert run_text(tmp_path / "out", tmp_path / "a.txt", "--tokenizer", models["lossless"]) == 2
    assert "a.txt: line 1: UTF-16 by its first bytes, expected UTF-8" in capsys.readouterr().err


def test_a_folder_says_what_is_read_and_what_is_not(tmp_path: Path, models: dict[str, Path], capsys: pytest.CaptureFixture) -> None:
    folder = tmp_path / "in"
    for name in (".ipynb_checkpoints", ".git/objects", "sub", "elsewhere"):
        (folder / name).mkdir(parents=True)
    texts = iter(english(9))
    for name in ("a.jsonl", "sub/b.json.gz", "c.JSONL", "D.Jsonl.GZ"):
        write_jsonl(folder / "x.gz" if name.lower().endswith("gz") else folder / name, [next(texts)])
        if name.lower().endswith("gz"):
            (folder / "x.gz").rename(folder / name)
    (folder / "E.TXT").write_text(next(texts))
    (folder / "f.json").write_text("\ufeff \n" + json.dumps([{"text": next(texts)}, {"text": next(texts)}], indent=1))
    write_jsonl(folder / ".ipynb_checkpoints" / "a-checkpoint.jsonl", english(2))
    write_jsonl(folder / ".git" / "objects" / "b.jsonl", english(2))
    for name in ("._a.jsonl", ".DS_Store", "g.csv", "h.CSV", "README", "i.jsonl.bz2"):
        (folder / name).write_bytes(b"\x00\x05\x16\x07")
    (folder / "elsewhere" / "link.jsonl").symlink_to(folder / "a.jsonl")
    (folder / "broken.jsonl").symlink_to("nowhere.jsonl")
    os.mkfifo(folder / "pipe.jsonl")
    assert run_text(tmp_path / "out", folder, folder / "a.jsonl", "--tokenizer", models["lossless"], "--val-fraction", 0) == 0
    assert sorted(decoded(tmp_path / "out")) == sorted(english(9)[:7])
    out = capsys.readouterr().out
    assert (
        f"INPUT {folder}: 1 .json, 1 .json.gz, 3 .jsonl, 1 .jsonl.gz, 1 .txt to read; left out: 1 .bz2, 2 .csv, 4 hidden, "
        "2 no regular files, 1 without suffix\n"
    ) in out
    assert "INPUT: 2 files are there twice, by another name or a link; each is read once\n" in out


@pytest.mark.parametrize("name", ["pipe.jsonl", "folder.jsonl", ".hidden"])
def test_what_is_no_file_of_text_is_refused_at_once(tmp_path: Path, models: dict[str, Path], capsys: pytest.CaptureFixture, name: str) -> None:
    path = tmp_path / name
    os.mkfifo(path) if name.startswith("pipe") else path.mkdir()
    (tmp_path / ".hidden.jsonl").write_text("")
    assert run_text(tmp_path / "out", path, "--tokenizer", models["lossless"]) == 2
    assert f"INPUT {path}: no text there" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b'[{"text": "a"}, {"text": 1}]', "a.json: document 2: the text is a number"),
        (b'[{"text": "a"}] {}', "a.json: not JSON in UTF-8"),
        (b'{"text":\n"a"}', "a.json: line 1: not JSON in UTF-8"),
        (b"[", "a.json: not JSON in UTF-8"),
    ],
)
def test_what_a_json_file_may_be(tmp_path: Path, models: dict[str, Path], capsys: pytest.CaptureFixture, data: bytes, expected: str) -> None:
    (tmp_path / "a.json").write_bytes(data)
    assert run_text(tmp_path / "out", tmp_path / "a.json", "--tokenizer", models["lossless"]) == 2
    assert expected in capsys.readouterr().err


def test_the_coverage_that_the_advice_names_is_there(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    rng = np.random.default_rng(0)
    texts = ["".join(map(chr, rng.integers(0x4E00, 0x4E00 + 3000, 200))) + " " + "\u4e00\u4e01" * 40 for _ in range(150)]
    source, size = write_jsonl(tmp_path / "a.jsonl", texts), ["--vocab-size", 1024]
    assert run_text(tmp_path / "out", source, *size) == 2
    line = capsys.readouterr().err
    assert "1024 vs 32" in line and "decrease character_coverage with --character-coverage option" in line
    assert "trainer_interface.cc" not in line
    assert run_text(tmp_path / "out", source, *size, "--character-coverage", 0.45, "--val-fraction", 0) == 0
    assert decoded(tmp_path / "out") == texts
    assert run_text(tmp_path / "no", source, "--tokenizer", tmp_path / "out" / "tokenizer.model", "--character-coverage", 0.9) == 2
    assert "--character-coverage 0.9: expected with --vocab-size" in capsys.readouterr().err


def test_the_characters_that_coverage_keeps_are_the_frequent_ones() -> None:
    documents = ["aaaa bbbz", "aaaa]b^cx"]  # 8 a, 4 b, 6 others once each
    assert encode_text.without_rare_characters(documents, 1.0) == documents
    assert encode_text.without_rare_characters(documents, 12 / 18) == ["aaaa", "bbb", "aaaa", "b"]
    assert encode_text.without_rare_characters(documents, 0.4) == ["aaaa", "aaaa"]


@pytest.mark.parametrize("mark", ["\u0301\u0323", "\uff9e", "\u0f73"])
def test_the_key_of_a_text_with_many_marks_takes_linear_time(mark: str) -> None:
    text, times = "a" + mark * 75_000, []
    with pytest.MonkeyPatch.context() as patch:
        lengths = []
        normalize = unicodedata.normalize

        class Counting:
            combining = staticmethod(unicodedata.combining)

            @staticmethod
            def normalize(form: str, part: str) -> str:
                runs = re.findall("[^\u034f]+", part)
                lengths.append(max(map(len, runs)))
                return normalize(form, part)

        patch.setattr(encode_text, "unicodedata", Counting)
        started = time.process_time()
        encode_text.document_key(text)
        times.append(time.process_time() - started)
    assert max(lengths) <= 32  # what is sorted at once
    assert times[0] < 5


def test_the_key_ignores_what_tokenizers_ignore_still() -> None:
    key = encode_text.document_key
    assert key("\u00e9 \ufb01") == key("e\u0301  fi") != key("e fi")
    assert key("\u2026" * 40) == key("." * 120)  # no marks: nothing is put between them
    assert key("\u2014" * 40) == key(" ".join("\u2014" * 40))
    assert key("a" + "\u0301" * 40) != key("a" + "\u0301" * 41)
    becomes = [chr(c) for c in range(0x110000) if not 0xD800 <= c < 0xE000 and unicodedata.combining(unicodedata.normalize("NFKD", chr(c))[0])]
    assert len(becomes) > 800 and all(encode_text.MARKS.fullmatch(character * 31) for character in becomes)


@pytest.mark.parametrize("variables", [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}])
@pytest.mark.parametrize("name", ["h\u00fclle \u4e2d".encode(), b"not-utf8-\xff"], ids=["umlaut", "bytes"])
def test_any_path_on_any_console(tmp_path: Path, models: dict[str, Path], variables: dict[str, str], name: bytes) -> None:
    if "LC_ALL" in variables and not str(ROOT).isascii():
        pytest.skip("SentencePiece cannot be imported from such a path in the C locale")
    folder = os.fsencode(tmp_path) + b"/" + name
    try:
        os.mkdir(folder)
    except OSError:
        pytest.skip("the file system takes UTF-8 alone")
    source = write_jsonl(tmp_path / "a.jsonl", english(4))
    shutil.copy(source, folder + b"/" + name + b".jsonl")
    shutil.copy(models["lossless"], folder + b"/t.model")
    pytest.importorskip("pyarrow.parquet").write_table(pytest.importorskip("pyarrow").table({"text": english(2, 3)}), tmp_path / "p.parquet")
    shutil.copy(tmp_path / "p.parquet", folder + b"/" + name + b".parquet")
    script = [sys.executable, str(ROOT / "tools" / "prepare_data.py")]
    arguments = ["text", folder, "--tokenizer", folder + b"/t.model", "--out", folder + b"/out", "--workers", "1", "--val-fraction", ".5"]
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("LC_", "LANG", "PYTHON"))} | variables
    for command in (arguments, ["text", folder + b"/none.txt", *arguments[2:]]):
        done = subprocess.run([*script, *command], capture_output=True, env=environment, timeout=60)
        assert b"Traceback" not in done.stderr and done.returncode == (2 if b"none.txt" in command[1] else 0), done.stderr
        assert done.stdout or b"none.txt: no such file" in done.stderr
    assert everything(Path(os.fsdecode(folder + b"/out"))) == 6
    assert prepare_data.main(["check", os.fsdecode(folder + b"/out")]) == 0


def test_nobody_reads_what_we_say(tmp_path: Path, models: dict[str, Path]) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", english(4))
    command = [sys.executable, str(ROOT / "tools" / "prepare_data.py"), "text", str(source), "--tokenizer", str(models["lossless"])]
    for name, redirection in (("closed", ">&-"), ("pipe", "| true"), ("full", ">/dev/full")):
        line = f'set -o pipefail; "$@" --out {tmp_path / name} --workers 1 --val-fraction 0 {redirection}'
        done = subprocess.run(["bash", "-c", line, "_", *command], capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stderr) == (0, ""), name
        assert (tmp_path / name / "manifest.json").exists()


def test_what_a_library_does_at_the_end_spoils_no_work(tmp_path: Path, models: dict[str, Path]) -> None:
    """pyarrow's threads aborted one process in a hundred when it ended."""
    (tmp_path / "sitecustomize.py").write_text("import atexit, os\natexit.register(os.abort)\n")
    source = write_jsonl(tmp_path / "a.jsonl", english(9))
    command = [sys.executable, ROOT / "tools" / "prepare_data.py", "text", source, "--tokenizer", models["lossless"], "--out", tmp_path / "out"]
    done = subprocess.run([*map(str, command), "--workers", "2"], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(tmp_path)}, timeout=60)
    assert done.returncode == 0 and f"{tmp_path / 'out'}: train 8 documents" in done.stdout


def test_a_separator_that_is_not_utf_8_is_refused(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        prepare_data.main(["text", "a.txt", "--out", "o", "--vocab-size", "400", "--separator", "\udcff"])
    assert "--separator" in (line := capsys.readouterr().err) and "expected UTF-8" in line


# -------------------------------------------------------------------------------------------------- a newcomer's text


def book(paragraphs: int, seed: int = 0) -> str:
    return "\n\n".join(english(paragraphs, seed)) + "\n"


def test_one_text_file_is_enough(tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    path, text = tmp_path / "book.txt", book(400)
    path.write_text(text)
    for block in (977, 1 << 20):
        monkeypatch.setattr(text_files, "BLOCK_BYTES", block)
        assert run_text(tmp_path / str(block), path, "--vocab-size", 400) == 0
    assert files_in(tmp_path / "977") == files_in(tmp_path / str(1 << 20))
    out, err = capsys.readouterr()
    assert f"{path}: no '<|endoftext|>' there, so its documents are pieces of 4,096 bytes up to the next blank line" in out
    val = decoded(tmp_path / "977", "val")
    documents = decoded(tmp_path / "977", "train") + val
    assert 1 <= len(val) < len(documents) / 4
    assert sorted(line for document in documents for line in document.splitlines() if line) == sorted(line for line in text.splitlines() if line)
    assert all(4096 <= len(document.encode()) + 2 <= 4 * 4096 for document in documents if document != text.strip()[-len(document):])
    assert f"{tmp_path / '977'}: {sum(map(len, val)):,} bytes of validation text: another text as large would score about" in err


@pytest.mark.parametrize("text", ["a line of words\n" * 200, "word " * 700, "\u4e2d" * 1200, "x" * 3001, book(3)], ids=["lines", "spaces", "Chinese", "one word", "short"])
def test_a_text_without_blank_lines_is_cut_where_it_hurts_least(tmp_path: Path, models: dict[str, Path], text: str) -> None:
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    assert run_text(tmp_path / "out", tmp_path / "a.txt", "--tokenizer", models["lossless"]) == 0
    assert len(decoded(tmp_path / "out", "val")) >= 1
    blocks = text_files.read_blocks(tmp_path / "a.txt", text_files.Layout(alone=frozenset([text_files.file_identity(tmp_path / "a.txt")])))
    assert b"".join(document for block in blocks for document, _ in block.payload).decode() == text


def test_a_short_file_beside_others_is_one_document_and_a_long_one_is_cut(tmp_path: Path, models: dict[str, Path], capsys: pytest.CaptureFixture) -> None:
    texts = {"a.txt": book(30), "b.txt": book(30, 1), "long.txt": book(250, 2) * 25}
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    assert len(texts["long.txt"]) > 1 << 20
    assert run_text(tmp_path / "out", tmp_path, "--tokenizer", models["lossless"], "--val-fraction", 0) == 0
    documents = decoded(tmp_path / "out")
    assert documents[:2] == [texts["a.txt"].strip(), texts["b.txt"].strip()]
    assert len(documents) > 200
    assert capsys.readouterr().out.count("no '<|endoftext|>' there") == 1


def test_a_document_is_held_out_of_a_few(tmp_path: Path, models: dict[str, Path], capsys: pytest.CaptureFixture) -> None:
    for count in (2, 9):
        source = write_jsonl(tmp_path / f"{count}.jsonl", english(count, 5))
        assert run_text(tmp_path / f"out{count}", source, "--tokenizer", models["lossless"]) == 0
        assert manifest_of(tmp_path / f"out{count}")["val"]["documents"] == 1
    for texts in (["one"], ["same", "same "]):
        assert run_text(tmp_path / "no", write_jsonl(tmp_path / "a.jsonl", texts), "--tokenizer", models["lossless"]) == 2
        assert "is held out" in capsys.readouterr().err


def test_a_failed_call_leaves_no_folder(tmp_path: Path, models: dict[str, Path], capsys: pytest.CaptureFixture) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", ["a"])
    (tmp_path / "there").mkdir()
    for out in ("deep/er/out", "there/new", "x" * 300, f"deep/{'x' * 300}/y"):
        assert run_text(tmp_path / out, source, "--tokenizer", models["lossless"]) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "there"]
    assert not list((tmp_path / "there").iterdir())
    assert f"--out {tmp_path / ('x' * 300)}: cannot make the folder: File name too long" in capsys.readouterr().err


def test_a_full_disk_is_named_with_its_folder(tmp_path: Path, models: dict[str, Path], capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(shard_io, "sync", full)
    assert run_text(tmp_path / "out", write_jsonl(tmp_path / "a.jsonl", english(9)), "--tokenizer", models["lossless"]) == 2
    assert f"error: {tmp_path / 'out'}: cannot be written: No space left on device\n" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_disk_that_cannot_be_read_is_named_with_its_file(tmp_path: Path, models: dict[str, Path], capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: Path) -> Iterator[bytes]:
        raise OSError(errno.EIO, os.strerror(errno.EIO))
        yield b""

    source = write_jsonl(tmp_path / "a.jsonl", english(9))
    monkeypatch.setattr(text_files, "_chunks", broken)
    assert run_text(tmp_path / "out", source, "--tokenizer", models["lossless"]) == 2
    assert f"error: {source}: cannot be read: Input/output error\n" in capsys.readouterr().err


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_will_do(tmp_path: Path, models: dict[str, Path], monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def refuse(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(shard_io.fcntl, "flock", refuse)
    assert run_text(tmp_path / "out", write_jsonl(tmp_path / "a.jsonl", english(9)), "--tokenizer", models["lossless"]) == 0


def test_a_folder_that_vanished_while_we_waited_for_it_is_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def lock(*_: object) -> None:
        calls.append(1)
        if len(calls) == 1:  # the process that held it fails and removes it
            (tmp_path / "out").rmdir()

    monkeypatch.setattr(shard_io.fcntl, "flock", lock)
    with shard_io.locked_folder(tmp_path / "out", "--out") as folder:
        assert folder.is_dir() and len(calls) == 2


def test_an_older_demo_is_made_anew(tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_corpus, "load_demo_corpus", lambda: (english(80), english(4, 1)))
    arguments = ["demo", "--out", str(tmp_path), "--vocab-size", "400"]
    assert prepare_data.main(arguments) == 0
    new, shards = manifest_of(tmp_path), files_in(tmp_path)
    assert new["val"]["document_bytes"] == [len(text.encode()) for text in english(4, 1)]
    assert new["tokenizer_sha256"] == shard_io.sha256_file(tmp_path / "tokenizer.model")
    assert new["format"] > 2  # the format without them
    del new["tokenizer_sha256"], new["val"]["document_bytes"]
    (tmp_path / "manifest.json").write_text(json.dumps(new | {"format": 2}))
    assert prepare_data.main(arguments) == 0
    assert files_in(tmp_path) == shards
    capsys.readouterr()
    assert prepare_data.main(arguments) == 0
    assert "is there" in capsys.readouterr().out


def test_duplicates_are_counted_and_the_sum_is_what_went_in(tmp_path: Path, models: dict[str, Path], capsys: pytest.CaptureFixture) -> None:
    texts = [*english(20), "", "  \n", english(20)[3] + " "]
    source, val = write_jsonl(tmp_path / "a.jsonl", texts), write_jsonl(tmp_path / "v.jsonl", [english(20)[3], "new", ""])
    assert run_text(tmp_path / "out", source, "--val", val, "--tokenizer", models["lossless"]) == 0
    assert manifest_of(tmp_path / "out")["left_out"] == {"empty": 3, "duplicate": 2, "refused": 0}
    assert everything(tmp_path / "out") == len(texts) + 3
    assert "left out: 3 empty, 2 duplicate, 0 refused" in capsys.readouterr().out


# -------------------------------------------------------------------------------------------------- check


class Table:
    """A byte table written for these tests, with one of the known mistakes in it."""

    def __init__(self, sp: sentencepiece.SentencePieceProcessor, mistake: str = "") -> None:
        self._mistake = mistake
        self._drops_first_space = sp.decode(sp.encode("a")) == sp.decode([sp.piece_to_id("\u2581"), *sp.encode("a")]) or sp.encode("a", out_type=str)[0][0] == "\u2581"
        self._sizes = [self._size(sp, i) for i in range(sp.vocab_size())]
        self._spaced = [sp.id_to_piece(i).startswith("\u2581") for i in range(sp.vocab_size())]
        self._control = [sp.is_control(i) for i in range(sp.vocab_size())]

    def _size(self, sp: sentencepiece.SentencePieceProcessor, i: int) -> int:
        piece = sp.id_to_piece(i)
        if sp.is_control(i) or sp.is_unknown(i):
            return len(piece) if self._mistake == "control pieces count as text" else 0
        if sp.is_byte(i):
            wrong = {"byte pieces as U+FFFD": len(sp.decode([i]).encode()), "byte pieces as spelled": len(piece)}
            return wrong.get(self._mistake, 1)
        if self._mistake == "three bytes for the meta space":
            return len(piece.encode())
        if self._mistake == "the meta space is no byte":
            return len(piece.replace("\u2581", "").encode())
        if self._mistake == "characters for bytes":
            return len(piece)
        return len(piece.replace("\u2581", " ").encode()) + (self._mistake == "the leading space twice" and piece[0] == "\u2581")

    def count(self, previous, ids):
        dropped = self._drops_first_space and self._mistake != "the first space is kept"
        sizes = [self._sizes[i] - (dropped and self._spaced[i] and self._control[p]) for p, i in zip(previous.tolist(), ids.tolist(), strict=True)]
        return ids.new_tensor(sizes)


@pytest.fixture(scope="module")
def hard_sets(tmp_path_factory: pytest.TempPathFactory, models: dict[str, Path]) -> dict[str, Path]:
    """The hard cases as the validation split, with each kind of tokenizer."""
    folder = tmp_path_factory.mktemp("hard")
    source = write_jsonl(folder / "a.jsonl", english(5))
    for name, model in models.items():
        assert run_text(folder / name, source, "--val", HARD_CASES, "--tokenizer", model) == 0
    return {name: folder / name for name in models}


@pytest.mark.parametrize("name", ["lossless", "normalizing", "dummy"])
def test_the_byte_table_equals_the_decoded_text_on_the_hard_cases(hard_sets: dict[str, Path], name: str) -> None:
    sp = processor(hard_sets[name] / "tokenizer.model")
    texts = [sp.decode(sp.encode(text)) for text in hard_texts()]
    for table in (ByteTable.load(str(hard_sets[name] / "tokenizer.model"), sp.vocab_size()), Table(sp)):
        size = check(hard_sets[name], table)["val"]
        assert (size.documents, size.text_bytes) == (len(texts), sum(len(text.encode()) for text in texts))


@pytest.mark.parametrize(
    "mistake",
    [
        "the leading space twice",
        "the meta space is no byte",
        "three bytes for the meta space",
        "byte pieces as U+FFFD",
        "byte pieces as spelled",
        "characters for bytes",
        "control pieces count as text",
        "the first space is kept",
    ],
)
def test_every_known_mistake_in_the_byte_count_is_found(hard_sets: dict[str, Path], mistake: str) -> None:
    folder = hard_sets["dummy" if mistake == "the first space is kept" else "normalizing"]
    with pytest.raises(shard_io.UserError, match=r"validation documents fail; the first: document \d+: the byte table gives \d+ bytes, its decoded"):
        check(folder, Table(processor(folder / "tokenizer.model"), mistake))


def test_a_tokenizer_without_byte_fallback_cannot_be_proved(hard_sets: dict[str, Path]) -> None:
    with pytest.raises(shard_io.UserError, match="unknown pieces, whose text is lost"):
        check(hard_sets["no_fallback"])


def test_overlapping_splits_are_found(tmp_path: Path, models: dict[str, Path]) -> None:
    tokens = encoded(models["lossless"], english(6))
    write_dataset(tmp_path, models["lossless"], tokens, encoded(models["lossless"], ["new", english(6)[4], english(6)[2]]))
    with pytest.raises(shard_io.UserError, match=r"2 of 6 training documents are validation documents too \(the first: training document 2\)"):
        check(tmp_path)


def write_dataset(folder: Path, model: Path, train: list[int], val: list[int]) -> None:
    (folder / "tokenizer.model").write_bytes(model.read_bytes())
    for split, tokens in (("train", train), ("val", val)):
        writer = shard_io.ShardWriter(folder, split, 50)
        writer.write(tokens)
        writer.close()


def replace(path: Path, start: int, data: bytes) -> None:
    content = bytearray(path.read_bytes())
    content[start : start + len(data)] = data
    path.write_bytes(content)


DAMAGES = {
    "cut": (lambda folder: (folder / "fineweb_train_000001.bin").write_bytes(b"x" * 1100), "000001.bin: header begins with"),
    "short": (lambda folder: (folder / "fineweb_train_000001.bin").write_bytes(b"x" * 90), "000001.bin: 90 bytes, expected a shard"),
    "length": (lambda folder: replace(folder / "fineweb_val_000000.bin", 8, b"\x31"), "val_000000.bin: 1124 bytes, expected 1122 for the 49 tokens"),
    "version": (lambda folder: replace(folder / "fineweb_val_000000.bin", 4, b"\x02"), "header begins with 20240520, 2"),
    "gap": (lambda folder: (folder / "fineweb_train_000001.bin").unlink(), "the shards between them are missing"),
    "name": (lambda folder: (folder / "fineweb_val_1.bin").write_bytes(b""), "fineweb_val_1.bin: expected a name such as"),
    "no val": (lambda folder: [path.unlink() for path in folder.glob("*val*")], "no fineweb_val_"),
    "vocabulary": (lambda folder: replace(folder / "fineweb_train_000000.bin", 1030, b"\xff\x7f"), "token 32767 at position 3, expected ids below"),
    "no BOS": (lambda folder: replace(folder / "fineweb_val_000000.bin", 1024, b"\x02"), "document 0 does not begin with the BOS id 1"),
    "bytes": (lambda folder: replace(folder / "fineweb_val_000000.bin", 1026, b"\xe4\x00\xe4\x00"), "its byte pieces are not valid UTF-8"),
    "manifest": (lambda folder: (folder / "manifest.json").write_text('{"files": {"tokenizer.model": "0"}}'), "not the file that was written"),
    "listed": (lambda folder: (folder / "manifest.json").write_text('{"files": {"val.txt": "0"}}'), "val.txt: missing, but manifest.json lists it"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_every_damage_to_a_dataset_is_named(tmp_path: Path, models: dict[str, Path], damage: str) -> None:
    write_dataset(tmp_path, models["lossless"], encoded(models["lossless"], english(6)), encoded(models["lossless"], english(3, 1)))
    assert check(tmp_path)["train"].documents == 6
    break_it, expected = DAMAGES[damage]
    break_it(tmp_path)
    with pytest.raises(shard_io.UserError, match=re.escape(expected)):
        check(tmp_path)


def test_check_reports_what_it_proved(tmp_path: Path, hard_sets: dict[str, Path], capsys: pytest.CaptureFixture) -> None:
    assert prepare_data.main(["check", str(hard_sets["normalizing"])]) == 0
    lines = capsys.readouterr().out
    assert f"in each of {len(hard_texts())} validation documents" in lines
    true = sum(len(text.encode()) for text in hard_texts())
    assert f"the text that went in has {true:,} bytes, which the score counts; it differs in " in lines
    assert "the tokenizer normalizes (nmt_nfkc, extra spaces removed)" in lines
    assert "FineWeb's 50,000 validation documents have 151,080,891 bytes; this is another text" in lines
    assert "151,080,891 bytes, and so has this split" in check_data.fineweb_line(check_data.SplitSize(1, 2, 50_000, 151_080_891))
    assert prepare_data.main(["check", str(tmp_path)]) == 2
    assert "tokenizer.model: No such file" in capsys.readouterr().err


def test_corpus_makes_a_dataset_for_each_tokenizer(tmp_path: Path, models: dict[str, Path], capsys: pytest.CaptureFixture) -> None:
    source = tmp_path / "in"
    (source / "tokenizers").mkdir(parents=True)
    (source / "tokenizers" / "x.model").write_bytes(models["lossless"].read_bytes())
    for i in range(2):
        write_jsonl(source / f"corpus_train_{i:02}.jsonl.xz", [*english(5, i), english(2, 8)[i]])  # one is in the second held-out set
    assert prepare_data.main(["corpus", str(source), "--out", str(tmp_path / "out"), "--workers", "1"]) == 2
    assert "corpus_val.jsonl.xz and tokenizers" in capsys.readouterr().err
    write_jsonl(source / "corpus_val.jsonl.xz", english(3, 7))
    write_jsonl(source / "corpus_val_web.jsonl.xz", english(2, 8))
    assert prepare_data.main(["corpus", str(source), "--out", str(tmp_path / "out"), "--workers", "1"]) == 0
    name = f"sp{processor(models['lossless']).vocab_size()}"
    assert tokens_of(tmp_path / "out" / name, "train") == encoded(models["lossless"], english(5, 0) + english(5, 1))
    assert tokens_of(tmp_path / "out" / f"{name}_web", "val") == encoded(models["lossless"], english(2, 8))
