"""tools/runs.py: the committed logs as a list, one without its source, several compared with their noise."""

from __future__ import annotations

import json
import math
import os
import re
import statistics
import subprocess
import sys

import pytest
import run_logs
import runs
from conftest import ROOT
from scipy import stats
from test_scripts import CONFIG, RESULT, log_text


def tool(*arguments):
    """Exit code of runs.py."""
    try:
        return runs.main([str(a) for a in arguments])
    except SystemExit as end:
        return end.code


def write(folder, name, seed, bpb, config=None, **result):
    """A made-up log whose sliding score is `bpb`; 1 x CPU process."""
    own = {"device": "cpu", "world_size": 1, "sliding_val_bpb": bpb, "date": f"2026-01-0{1 + seed % 9}T10:00:00"}
    (folder / f"{name}.txt").write_text(log_text(seed, config, **own | result))


def test_the_committed_runs_are_listed(capsys):
    assert tool() == 0
    out, err = capsys.readouterr()
    rows = {line.split()[0]: line for line in out.splitlines() if line[0] != " "}
    for path in ROOT.glob("logs/R018_demo_seed*.txt"):
        result = run_logs.read_run(path).result
        for text in (str(result["seed"]), f"{result['steps']:,}", f"{result['sliding_val_bpb']:.4f}", f"{result['total_bytes']:,}"):
            assert f" {text} " in rows[path.stem]
        assert rows[path.stem].endswith("1 x CPU process of 2 threads")
    assert {"R001_demo", "R014_demo"} <= rows.keys() and "R011_systems" not in rows
    smeared, windows = "\n    preset demo KEY_OFFSET=0", "TRAIN_SEQ_LEN=256 SLIDING_EVAL_STRIDE=64"  # a preset that has changed since
    before = smeared.replace("KEY", "SMEAR_GATE=0 KEY")
    assert out.count("\n    preset demo\n") >= 3 and out.count(f"{smeared} {windows}\n") >= 3
    assert out.count(f"{before} {windows}\n") >= 3 and out.count(f"{before} {windows} EMBED_INIT=random\n") >= 3
    assert out.count(f"{before} {windows.replace(' ', ' TRAIN_LOG_EVERY=50 ')} EMBED_INIT=random\n") >= 2
    assert re.fullmatch(r"runs.py: \d+ other files in .*logs: not the log of one run\n", err)


def test_unfinished_runs_evaluations_and_dates_are_listed_in_order(tmp_path, capsys):
    write(tmp_path, "later", 5, 1.1)
    write(tmp_path, "early", 2, 1.2)
    whole = log_text(3).splitlines()
    (tmp_path / "half.txt").write_text("\n".join(whole[:-1]) + "\nstep:3/9 loss:8.0\n")
    evaluation = {"roundtrip_val_loss": 3.0, "roundtrip_val_bpb": 1.5, "gpu_name": "none"}
    (tmp_path / "scored.txt").write_text(f"config {json.dumps(CONFIG | {'eval_only': True})}\nresult {json.dumps(evaluation)}\n")
    (tmp_path / "broken.txt").write_text("config {}\nresult {}\n")
    assert tool("--logs", tmp_path) == 0
    out, err = capsys.readouterr()
    rows = [line.split() for line in out.splitlines() if line[0] != " "][1:]
    assert [row[0] for row in rows][:2] == ["early", "later"] and rows[0][1] == "2026-01-03T10:00"
    table = {row[0]: row for row in rows}
    assert table["half"][4:6] == ["3/9", "unfinished"] and "evaluation" in table["scored"] and "1.5000" in table["scored"]
    assert f"{RESULT['total_bytes']:,}" in table["early"]
    assert err.splitlines()[0].startswith(f"runs.py: left out: {tmp_path / 'broken.txt'}: the config line lacks ")


def test_a_run_is_shown_without_its_source(capsys):
    assert tool("show", "R014_demo") == 0
    out = capsys.readouterr().out
    whole = (ROOT / "logs/R014_demo.txt").read_text()
    assert whole.endswith(out) and out.startswith("python:3.11.7") and out.count("\n") == 23 and 'result {"' in out
    assert tool("show", ROOT / "logs/R014_demo.txt") == 0 and capsys.readouterr().out == out


def test_a_reader_that_goes_away_is_no_error():
    reader, writer = os.pipe()
    os.close(reader)  # before the first line is written
    done = subprocess.run([sys.executable, f"{ROOT}/tools/runs.py", "show", "R018_demo_seed7"], stdout=writer, stderr=subprocess.PIPE,
                          text=True, timeout=60, check=False)  # fmt: skip
    os.close(writer)
    assert (done.stderr, done.returncode) == ("", 141)


def test_arms_are_compared_with_the_noise_between_their_seeds(tmp_path, capsys):
    """Against Student's t-test of scipy, by whether the difference is beyond the noise."""
    a, b = [1.200, 1.206, 1.201], [1.211, 1.214]
    for seed, bpb in enumerate(a):
        write(tmp_path, f"a_{seed}", seed, bpb)
    for seed, bpb in enumerate(b):
        write(tmp_path, f"b_{seed}", seed, bpb, {"model_dim": 512}, steps=7000)
    assert tool("compare", "a_0", "a_1", "b_0", "--logs", tmp_path) == 0
    out = capsys.readouterr().out
    pooled = math.sqrt((2 * statistics.variance(a) + statistics.variance(b)) / 3)
    assert out.startswith(f"sliding score, bits per byte; noise: {pooled:.4f} between seeds, 3 degrees of freedom\n")
    limit = stats.t.ppf(0.975, 3) * pooled * math.sqrt(1 / 2 + 1)
    shown = re.search(r"B - A: \+0\.0080 \+- (\d\.\d{4}): within the noise", out)
    assert float(shown[1]) == pytest.approx(limit, abs=2e-4) and limit > 0.008
    assert "A  a_0, a_1\n   1.2030 (2 seeds), 6,530 steps" in out and "B  b_0\n   1.2110 (1 seed), 7,000 steps" in out
    assert "   MODEL_DIM: 768 -> 512\n" in out and out.count(" -> ") == 1
    assert tool("compare", *(f"{tmp_path}/a_{i}.txt" for i in range(3)), *(f"{tmp_path}/b_{i}.txt" for i in range(2)), "--logs", tmp_path) == 0
    assert (stats.ttest_ind(a, b).pvalue < 0.05) == ("beyond the noise" in capsys.readouterr().out)


def test_code_machine_and_text_are_differences_and_one_seed_has_no_noise(tmp_path, capsys):
    write(tmp_path, "a", 1, 1.2)
    write(tmp_path, "b", 1, 1.3, {"only_here": 1}, code_sha256="d" * 64, world_size=2, val_bytes=7)
    assert tool("compare", "a", "b", "--logs", tmp_path) == 0
    out = capsys.readouterr().out
    assert "noise: unknown\n" in out and "B - A: +0.1000 noise unknown: no second seed\n" in out
    assert f"code: {'c' * 12} -> {'d' * 12}\n" in out and "machine: 1 x CPU process -> 2 x CPU process\n" in out
    assert "scored bytes: 230000000 -> 7\n" in out and "in one of the logs only: ONLY_HERE\n" in out


def test_the_table_of_student_is_scipys():
    assert all(stats.t.ppf(0.975, n) == pytest.approx(t, abs=0.006) for n, t in runs.STUDENT_95.items())


@pytest.mark.parametrize("arguments, said", [
    (["show", "nope"], "nope: no such log, here or in "),
    (["show", "other"], "other.txt: no config line: not the log of a run"),
    (["show"], "show: 0 runs given, expected one RUN"),
    (["list", "a"], "list: 1 runs given, expected no RUN"),
    (["compare", "a"], "compare: 1 runs given, expected two or more RUNs"),
    (["compare", "a", "a"], "a.txt: one run; expected at least two to compare"),
    (["compare", "a", "half"], "half.txt: no result line: the run did not finish"),
    (["compare", "a", "scored"], "scored.txt: a run with EVAL_ONLY=1, which trains nothing"),
    (["--logs", "nope"], "--logs nope: no such folder"),
    (["--logs", "empty"], "--logs empty: no log of a run in it"),
    (["describe"], "argument command: invalid choice: 'describe'"),
])  # fmt: skip
def test_mistakes_are_one_line(arguments, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    write(tmp_path, "a", 1, 1.2)
    (tmp_path / "other.txt").write_text("nothing\n")
    (tmp_path / "half.txt").write_text(f"config {json.dumps(CONFIG)}\n")
    evaluation = {"roundtrip_val_loss": 3.0, "roundtrip_val_bpb": 1.5}
    (tmp_path / "scored.txt").write_text(f"config {json.dumps(CONFIG | {'eval_only': True})}\nresult {json.dumps(evaluation)}\n")
    assert tool(*arguments, *([] if "--logs" in arguments else ["--logs", tmp_path])) == 2
    out, err = capsys.readouterr()
    assert said in err and ": error: " in err and err.count("\n") == 1 and out == ""


@pytest.mark.parametrize(("name", "value"), [("total_bytes", "x"), ("artifact_bytes", "x"), ("steps", 1.5), ("eval_time_s", "x"), ("device", 1)])
def test_an_evaluation_with_a_figure_of_another_kind_is_left_out_in_one_line(tmp_path, capsys, name, value):
    write(tmp_path, "whole", 5, 1.1)
    evaluation = {"roundtrip_val_loss": 3.0, "roundtrip_val_bpb": 1.5, name: value}
    (tmp_path / "scored.txt").write_text(f"config {json.dumps(CONFIG | {'eval_only': True})}\nresult {json.dumps(evaluation)}\n")
    assert tool("--logs", tmp_path) == 0
    out, err = capsys.readouterr()
    assert "scored" not in out and f"scored.txt: the result line has {name} {value!r}, expected" in err
