"""bench/fuzz.py: a few cases of each kind pass, and what may not happen is a failure."""

from __future__ import annotations

import dataclasses
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import encode_text
import fuzz
import fuzz_loaders
import prepare_data
import pytest
import shard_io
import text_files
from conftest import ROOT

import train_gpt


def test_random_folders_lose_no_document(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert fuzz.main(["data", "--cases", "26", "--seed", "1", "--folder", str(tmp_path)]) == 0  # the 25th in a process of its own
    lines = capsys.readouterr().out
    assert "      26  cases" in lines and "       1  in a process of its own" in lines
    assert "every document accounted for" in lines and "refused: " in lines


def test_random_environments_end_in_a_result_or_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert fuzz.main(["settings", "--cases", "40", "--seed", "1", "--process-every", "40", "--folder", str(tmp_path)]) == 0
    lines = capsys.readouterr().out
    assert "      40  cases" in lines and "  accepted" in lines and "  refused" in lines and "  built" in lines and "       1  script: " in lines


def drop_a_document(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = encode_text.Encoder.__call__

    def without_the_last(self: encode_text.Encoder, block: text_files.Block) -> encode_text.Encoded:
        encoded = whole(self, block)
        if (ids := encoded.ids.get("train")) is not None and encoded.counts["train", "documents"] > 1:
            encoded.ids["train"] = ids[: max(i for i, token in enumerate(ids) if token == 1)]
            encoded.counts["train", "documents"] -= 1
        return encoded

    monkeypatch.setattr(encode_text.Encoder, "__call__", without_the_last)


def count_wrong_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(stage: object, manifest: dict) -> None:
        manifest["val"]["document_bytes"] = [size + 1 for size in manifest["val"]["document_bytes"]]
        shard_io.write_json(stage / "manifest.json", manifest)

    monkeypatch.setattr(prepare_data, "finish", nothing)


def call_empty_ones_duplicates(monkeypatch: pytest.MonkeyPatch) -> None:
    splits = prepare_data.write_splits

    def swapped(*args: object) -> tuple[dict, int]:
        sizes, unknown = splits(*args)
        left_out = sizes["left_out"]
        left_out["empty"], left_out["duplicate"] = left_out["duplicate"], left_out["empty"]
        return sizes, unknown

    monkeypatch.setattr(prepare_data, "write_splits", swapped)


def raise_something(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise KeyError("a defect")

    monkeypatch.setattr(text_files, "_object_text", broken)


def write_two_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare_data, "printable", lambda text, _: text.replace("error: ", "error:\n", 1))


def leave_a_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_io, "_remove_empty", lambda _: None)


def hang(monkeypatch: pytest.MonkeyPatch) -> None:
    def forever(*_: object) -> None:
        while True:
            pass

    monkeypatch.setattr(fuzz, "HANG_S", 1)
    monkeypatch.setattr(prepare_data, "make_text_dataset", forever)


@pytest.mark.parametrize(
    ("defect", "words"),
    [
        (drop_a_document, "documents lost"),
        (count_wrong_bytes, "document_bytes is"),
        (call_empty_ones_duplicates, "left_out is"),
        (raise_something, "KeyError: 'a defect'"),
        (write_two_lines, "exit code 2 and"),
        (leave_a_folder, "a folder is left behind"),
        (hang, "hangs: more than 1 s"),
    ],
)
def test_a_defect_of_the_data_tool_is_a_failure(tmp_path: Path, capsys: pytest.CaptureFixture, defect: object, words: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        defect(patch)
        assert fuzz.main(["data", "--cases", "2" if defect is hang else "8", "--seed", "3", "--folder", str(tmp_path)]) == 1
    out = capsys.readouterr().out
    assert words in out
    assert "one again: fuzz.py data --seed 3 --case N" in out


@pytest.mark.parametrize(("error", "words"), [(ValueError("a defect"), "ValueError: a defect"), (train_gpt.UserError("two\nlines"), "not one line")])
def test_a_defect_of_the_settings_is_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, error: Exception, words: str
) -> None:
    parse = train_gpt.parse_setting

    def broken(key: str, text: str, kind: object) -> object:
        if text == "0":
            raise error
        return parse(key, text, kind)

    monkeypatch.setattr(train_gpt, "parse_setting", broken)
    monkeypatch.setattr(fuzz.SettingsFuzzer, "run", lambda *_: "not run")
    assert fuzz.main(["settings", "--cases", "30", "--seed", "3", "--folder", str(tmp_path)]) == 1
    assert words in capsys.readouterr().out


def test_a_case_depends_on_seed_and_number_alone(tmp_path_factory: pytest.TempPathFactory) -> None:
    def files(seed: int) -> dict:
        folder = tmp_path_factory.mktemp("case")
        rng, n = fuzz.np.random.default_rng([seed, 7]), iter(range(99))
        expected = fuzz.a_file(rng, n, str(folder).encode(), b"=-=")
        return dataclasses.asdict(expected) | {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    assert files(0) == files(0) != files(1)


@pytest.mark.parametrize("name", fuzz_loaders.TARGETS)
def test_damaged_files_are_refused_or_read(tmp_path: Path, capsys: pytest.CaptureFixture, name: str) -> None:
    assert fuzz.main([name, "--cases", "200", "--seed", "1", "--folder", str(tmp_path)]) == 0
    lines = capsys.readouterr().out
    assert "     200  cases" in lines and "Error\n" in lines and "  loaded" in lines


def test_guided_fuzzing_sees_the_lines_that_it_reaches(tmp_path: Path) -> None:
    if importlib.util.find_spec("atheris") is None:
        pytest.skip("atheris is not installed (requirements-extra.txt)")
    command = [sys.executable, str(ROOT / "bench/fuzz.py"), "checkpoint", "--guided", "--cases", "300", "--folder", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    reached = [int(n) for n in re.findall(r"cov: (\d+)", done.stderr)]
    assert reached[-1] >= reached[0] > 5 and "Done 300 runs" in done.stderr


def test_guided_fuzzing_of_what_is_no_loader_is_refused(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        fuzz.main(["data", "--guided"])
    assert "--guided: expected one of artifact, " in capsys.readouterr().err


def what_a_target_may_not(data: bytes) -> None:
    """The first byte says what."""
    if data[0] == 0:
        raise KeyError("a defect")
    if data[0] == 1:
        raise ValueError("two\nlines")
    if data[0] == 2:
        exec("pass")
    if data[0] == 3:
        bytearray(64 << 20)[:: 1 << 12] = b"x" * (1 << 14)
    while data[0] == 4:
        pass


@pytest.mark.parametrize(("first", "words"), enumerate(("a defect", "not one line", "runs something", "more than", "hangs")))
def test_what_a_loader_may_not_do_is_seen(first: int, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuzz_loaders, "HANG_S", 0.2)
    sys.addaudithook(fuzz_loaders.audit)
    target = fuzz_loaders.Target("x", [b""], what_a_target_may_not, (ValueError,), fuzz_loaders.Memory(16 << 20, 1))
    assert fuzz_loaders.attempt(target, b"\x09") == "loaded"
    with pytest.raises((fuzz_loaders.Failure, KeyError), match=words):
        fuzz_loaders.attempt(target, bytes([first]))
