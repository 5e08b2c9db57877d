"""bench/gpu_queue.sh first with a stub in the interpreter's place, the tables it ends with, and the rehearsal without a GPU."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import gpu_table
import pytest
import rehearse_gpu
from conftest import ROOT

import train_gpt

# Answers as the trainer and bench/step.py do; `calls` keeps what was asked
STUB = r"""#!/bin/bash
echo "$* | ${KERNELS-} ${COMPILE_MODE-} ${EMBED_DIM-} ${ITERATIONS-} ${MAX_WALLCLOCK_SECONDS-} $VAL_MAX_TOKENS" >>calls
case "$*" in
  bench/gpu_table.py*) exec REAL "$@" ;;
  bench/step.py*--eval*) echo '{"arms": {}}' >"${@: -1}" ;;
  bench/step.py*) echo "$*" | grep -q pr640 && [[ ${KERNELS-} == off ]] && exit 3
    echo '{"arms": {"this checkout": {"unit_ms": '$([[ ${KERNELS-} == off ]] && echo 110.5 || echo 91.25)', "first_loss": 9, "last_loss": 8.5}}}' >"${@: -1}" ;;
  train_gpt.py) mkdir -p logs
    [[ $RUN_ID != HANGS ]] || { setsid sleep 20 & exec sleep 20; }
    off='{}'; [[ $RUN_ID != queue_check ]] || off='{"mlp": "Differs: off by 3 %", "compile": "TimeoutError"}'
    { printf 'import this\npython:3.12 torch\nstep:1\nresult {"kernels": {"loss": 0.012}, "kernels_off": %s, ' "$off"
      printf '"steps": 7, "val_bpb": 1.25, "peak_memory_bytes": 2147483648, "gpu_name": "NVIDIA H100"}\n'; } >"logs/$RUN_ID.txt" ;;
esac
"""


def queue(folder: Path, *arguments: str, hangs: str = "no", **settings: str) -> subprocess.CompletedProcess:
    """gpu_queue.sh in a copy of the project whose interpreter is the stub; the run `hangs` never ends, nor does what it has started."""
    for name in ("bench", "tools", "configs"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "python").write_text(STUB.replace("REAL", shlex.quote(sys.executable)).replace("HANGS", hangs))
    (folder / "python").chmod(0o755)
    (folder / "shards").mkdir()
    for name in ("fineweb_train_000000.bin", "tokenizer.model"):
        (folder / "shards" / name).touch()
    env = {"PATH": os.environ["PATH"], "PYTHON": "./python", "DATA_PATH": "shards", "OUT": "out"} | settings
    command = ["bash", "bench/gpu_queue.sh", *arguments]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False, timeout=60)


def rows(text: str, heading: str) -> dict[str, list[str]]:
    """A table's rows by their first cell."""
    lines = text.partition(f"{heading}\n")[2].strip().split("\n\n")[0].splitlines()[2:]
    return {cells[0]: cells[1:] for cells in ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)}


def test_first_runs_its_parts_in_order_and_goes_on_without_what_failed_the_check(tmp_path):
    done = queue(tmp_path, "first")
    assert done.returncode == 1 and done.stderr == "", done.stderr  # one part fails
    calls = [line.split(" | ")[1].split() for line in (tmp_path / "calls").read_text().splitlines()]
    asked = [line.split(" | ")[0].split(" --json")[0] for line in (tmp_path / "calls").read_text().splitlines()]
    step = "bench/step.py --rounds 3 --warmup 3 --profile-steps"
    assert asked == [
        "train_gpt.py", "bench/gpu_table.py --usable out/first.jsonl", f"{step} 1", f"{step} 1 --preset configs/pr640.env", "train_gpt.py",
        "train_gpt.py", f"{step} 0", f"{step} 0 --preset configs/pr640.env",
        "bench/step.py --eval --rounds 1 --stride 16 --eval-windows 1024 --plain-windows 128", "bench/gpu_table.py out/first.jsonl",
    ]  # fmt: skip
    left, targets = ["matmul,norm,qk,attention,loss,score", "none"], "1048576"
    assert calls[0] == ["3", "0", targets] and calls[2] == calls[3] == [*left, targets] == calls[8][:2] + [targets]
    assert calls[4] == ["60", targets] and calls[5] == ["254", "10000", "60", targets]  # the preset's settings, for this run alone
    assert calls[6] == calls[7] == ["off", "none", "60", targets]
    files = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert files == ["first.jsonl", "first.txt", "logs.txt"] and "import this" not in (tmp_path / "out" / "logs.txt").read_text()
    text = (tmp_path / "out" / "first.txt").read_text()
    assert text == done.stdout
    parts = rows(text, "Parts\n")
    assert parts["off pr640"] == ["FAILED: code 3 after 0 s"] and [*parts] == [
        "check", "step default", "step pr640", "train default", "train pr640", "off default", "off pr640", "eval"]  # fmt: skip
    check = text.partition("Self-check")[2]
    assert "| check | loss | 1.2e-02 | fast |" in check and "| check | mlp | - | OFF: Differs: off by 3 % |" in check
    measured = rows(text, "Measured\n")
    assert measured["kernels save, ms / 65,536 tokens"] == ["19.25", "-", "-"] and measured["bits per byte"] == ["1.2500", "1.2500", "+0.0000"]
    assert measured["peak memory of the run, GiB"] == ["2.00", "2.00", "+0.00"]
    assert rows(text, "what is open)\n")["all kernels together (KERNELS=off against the default)"] == ["+19.25"]


def test_recipe_trains_both_with_one_seed_and_ends_with_the_difference(tmp_path):
    done = queue(tmp_path, "recipe", SEED="7", TRAIN_SECONDS="30")
    assert done.returncode == 1 and "sliding_val_bpb" in done.stdout  # the stub's result has no such score
    calls = [line.split(" | ")[1].split() for line in (tmp_path / "calls").read_text().splitlines()]
    assert calls[0] == ["254", "10000", "30", "1048576"] and calls[1] == ["30", "1048576"]
    lines = []
    for name, score, size in (("pr640", 1.35, 15_990_000), ("default", 1.3375, 15_900_000)):
        result = {"kernels_off": {}, "gpu_name": "NVIDIA H100", "seed": 7, "train_time_s": 29.97, "steps": 40 + len(name), "stride": 256,
                  "sliding_val_bpb": score, "roundtrip_val_bpb": score + 0.02, "artifact_bytes": size}  # fmt: skip
        lines.append(json.dumps({"stage": "recipe", "name": f"train {name}", "outcome": "ok, 40 s", "result": result}))
    (tmp_path / "figures.jsonl").write_text("\n".join(lines) + "\n")
    command = [sys.executable, str(ROOT / "bench/gpu_table.py"), "--recipe", "figures.jsonl"]
    said = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True, timeout=60).stdout
    assert said == (
        "recipe: NVIDIA H100, seed 7, 30.0 and 30.0 s, 45 and 47 steps, pr640 1.3500, default 1.3375 bits per byte in windows 256 apart: "
        "-0.0125 (chunked -0.0125); 15,990,000 and 15,900,000 bytes\n"
    )


def test_a_part_that_hangs_is_ended_with_its_time_whoever_else_holds_its_output(tmp_path):
    """A process in a session of its own, as Inductor's workers are, lives on; the next part begins all the same."""
    begin = time.monotonic()
    done = queue(tmp_path, "first", hangs="queue_check", LIMIT_S="27")  # a twentieth of 120 s for the check
    assert time.monotonic() - begin < 15
    parts = rows((tmp_path / "out" / "first.txt").read_text(), "Parts\n")
    assert done.returncode == 1 and parts["check"] == ["FAILED: ended after 6 s"] and parts["train default"][0].startswith("ok, ")


def test_the_seconds_of_first_add_up_to_nine_minutes():
    """The table in the script's head is what the script does."""
    script = (ROOT / "bench" / "gpu_queue.sh").read_text()
    head = {name.strip(): (int(a), int(b)) for name, a, b in re.findall(r"^#   (\w+(?: \w+)?) +(\d+) +(\d+)(?:  |$)", script, re.M)}
    total = head.pop("sum")
    assert total == tuple(map(sum, zip(*head.values(), strict=True))) and total[1] == 540
    body = script.partition("stage_first() {")[2].partition("\n}\n")[0]
    most = {name: int(seconds) for name, seconds in re.findall(r'(?:train|bench) "?([\w ]+?)"? "\$\(most (\d+)\)"', body)}
    assert most == {name: seconds for name, (_, seconds) in head.items() if name != "table"}
    assert "stage_end - 10" in body and head["table"][1] == 10


@pytest.mark.parametrize("arguments, settings, said", [
    (["first", "step"], {}, "first: expected first or recipe alone, parity step"),
    (["firsts"], {}, "firsts: expected first or recipe alone, parity step"),
    (["first"], {"DATA_PATH": "nowhere"}, "DATA_PATH=nowhere: expected a folder with fineweb_train_*.bin in it"),
    (["first"], {"TOKENIZER_PATH": "nowhere"}, "TOKENIZER_PATH=nowhere: no such file"),
    (["first"], {"DATA_PATH": ""}, "CORPUS=: expected the folder with"),
    (["first"], {"LIMIT_S": "9m"}, "LIMIT_S=9m: expected seconds"),
])  # fmt: skip
def test_mistakes_are_one_line_and_nothing_is_run(arguments, settings, said, tmp_path):
    done = queue(tmp_path, *arguments, **settings)
    assert done.returncode == 2 and done.stderr.startswith(f"gpu_queue.sh: error: {said}") and done.stderr.count("\n") == 1
    assert not (tmp_path / "calls").exists() and not (tmp_path / "out").exists()


# ---------------------------------------------------------------------------------------------------- bench/gpu_table.py


def write(path: Path, *records: dict) -> Path:
    path.write_text("".join(json.dumps({"stage": "first", "outcome": "ok, 1 s"} | record) + "\n" for record in records))
    return path


def test_what_the_table_knows_of_the_trainer_is_so():
    """Operations, the arms of stage levers, and the names of the result line."""
    assert gpu_table.OPERATIONS == tuple(train_gpt.KERNELS)
    script = (ROOT / "bench" / "gpu_queue.sh").read_text()
    arms = script.partition('LEVERS=${LEVERS:-"')[2].partition('"}')[0].splitlines()
    assert [gpu_table.without(arm) for _, arm in gpu_table.LEVERS] == arms[:-1] and "MICRO_BATCH_TOKENS" in arms[-1]
    for name in ("peak_memory_bytes", "kernels_off", "kernels", "attention", "late_graphs", "roundtrip_val_bpb", "sliding_val_bpb", "gpu_name"):
        assert f'"{name}"' in (ROOT / "train_gpt.py").read_text(), name
    results = (ROOT / "RESULTS.md").read_text().partition("## R009")[2].partition("## R010")[0]
    assert all(lever.split(" (")[0] in results for lever, _ in gpu_table.LEVERS)


def test_levers_fill_the_column(tmp_path, capsys):
    """A kernel saves what a step takes longer without it; a setting what it takes less with it."""
    arms = {gpu_table.BASE: {"unit_ms": 90.0}, gpu_table.without("without mlp"): {"unit_ms": 95.5}, "ACT_QUANT=fp8": {"unit_ms": 84.0}}
    figures = write(tmp_path / "f.jsonl", {"name": "levers", "figures": {"arms": arms}})
    gpu_table.print_tables(gpu_table.Parts.read([figures]))
    column = rows(capsys.readouterr().out, "what is open)\n")
    assert column["relu^2 MLP"] == ["+5.50"] and column["ACT_QUANT=fp8"] == ["+6.00"] and column["PARALLEL_BLOCKS=1"] == ["-"]


@pytest.mark.parametrize("off, words", [
    ({}, ""), ({"compile": ""}, "COMPILE_MODE=none"), ({"all": "", "compile": ""}, "KERNELS=off COMPILE_MODE=none"),
    ({"qk": "", "loss": ""}, "KERNELS=matmul,norm,attention,mlp,score"), ({"FlashAttention-3": ""}, "KERNELS=matmul,norm,qk,mlp,loss,score"),
    ({"compiled_score": ""}, "COMPILE_MODE=training"), ({"compiled_score": "", "compile": ""}, "COMPILE_MODE=none"),
])  # fmt: skip
def test_what_can_run_here(off, words, tmp_path):
    figures = write(tmp_path / "f.jsonl", {"name": "check", "result": {"kernels": {}, "kernels_off": off}})
    found = gpu_table.usable(gpu_table.Parts.read([figures]))
    assert found == words
    for word in found.split():
        name, value = word.split("=")
        assert train_gpt.Config.from_env({name: value})


def test_of_parts_with_one_name_the_last_counts_and_without_any_it_is_said(tmp_path, capsys):
    late = {"name": "check", "outcome": "FAILED: ended after 120 s"}
    parts = gpu_table.Parts.read([write(tmp_path / "f.jsonl", {"name": "check", "result": {"kernels": {}, "kernels_off": {"qk": ""}}}, late)])
    assert parts.results == {} and gpu_table.usable(parts) == ""
    gpu_table.print_tables(parts)
    said = capsys.readouterr().out
    assert "| check | - | - | FAILED: ended after 120 s |" in said and said.startswith("no run has come to its end")


@pytest.mark.parametrize("text", ["{", "[]", '{"name": "x"}', "1"])
def test_what_is_no_figure_is_one_line(text, tmp_path):
    path = tmp_path / "f.jsonl"
    path.write_text(text + "\n")
    with pytest.raises(gpu_table.BadFigures, match=f"^{re.escape(str(path))}, line 1: expected a part"):
        gpu_table.Parts.read([path])


# --------------------------------------------------------------------------------------------------- tools/rehearse_gpu.sh


def test_the_rehearsed_program_is_this_one_but_for_the_verdicts_on_values(tmp_path):
    """Every edit fits, and what comes of them is a program whose self-check still sees shapes and what is missing."""
    folder = rehearse_gpu.copy_project(tmp_path / "project", "FAULT = 1\n")
    source = (folder / "train_gpt.py").read_text()
    assert len(rehearse_gpu.EDITS) == 4 and source != (ROOT / "train_gpt.py").read_text()
    names = {"__name__": "rehearsed", "__file__": str(folder / "train_gpt.py")}
    module = type(sys)("rehearsed")
    module.__dict__.update(names)
    sys.modules["rehearsed"] = module  # its dataclasses look there
    try:
        exec(compile(source, names["__file__"], "exec"), module.__dict__)
    finally:
        del sys.modules["rehearsed"]
    check, torch = module.SelfCheck.__new__(module.SelfCheck), module.torch
    assert module.FAULT == 1 and check.difference("x", torch.ones(3), torch.zeros(3)) == 0
    for found, said in ((torch.zeros(2), "shape"), (None, "missing")):
        with pytest.raises(module.Differs, match=said):
            check.difference("x", found, torch.zeros(3))


def test_an_edit_that_no_longer_fits_is_said(monkeypatch):
    monkeypatch.setattr(rehearse_gpu, "EDITS", [("no such line", "")])
    with pytest.raises(rehearse_gpu.Failed, match="train_gpt.py holds 'no such line' 0 times, not once"):
        rehearse_gpu.edited("x = 1\n")


@pytest.mark.parametrize("changed", [rehearse_gpu.UNCOMPILED, rehearse_gpu.FEWER])
def test_every_preset_is_rehearsed_with_settings_that_are_taken(changed, tmp_path, monkeypatch):
    """As it is, and with two layers."""
    asked, rehearsal = {}, rehearse_gpu.Rehearsal(tmp_path, set())
    answer = {"kernels": [], "kernels_off": {}, "late_graphs": 0, "attention": ""}
    monkeypatch.setattr(rehearse_gpu, "copy_project", lambda to: to)
    monkeypatch.setattr(rehearsal, "train", lambda _, name, settings: asked.update({name: settings}) or answer)
    rehearsal.runs(**changed)
    assert rehearsal.failures == 0 and asked.keys() == {"default", *(f"{name}={value}" for name, value in rehearse_gpu.PRECISIONS), *(path.stem for path in (ROOT / "configs").glob("*.env"))}
    for settings in asked.values():
        cfg = train_gpt.Config.from_env(settings)
        assert (cfg.compile_mode == "none") is ("COMPILE_MODE" in changed) and (cfg.num_layers == 2 or "NUM_LAYERS" not in changed)
        train_gpt.batch_layout(cfg, 1)


def test_what_is_off_or_compiled_late_fails_a_run():
    for wrong in ({"kernels_off": {"mlp": "why"}}, {"late_graphs": 2}):
        with pytest.raises(rehearse_gpu.Failed):
            rehearse_gpu.clean({"kernels": [], "kernels_off": {}, "late_graphs": 0, "attention": ""} | wrong)


def test_each_fault_names_what_there_is():
    """Operations of the table, or the graph; the functions that are replaced exist."""
    for name, fault in rehearse_gpu.FAULTS.items():
        assert fault.off <= {*train_gpt.KERNELS, "compile", "compiled_score", "FlashAttention-3"}, name
        for replaced in re.findall(r"^(?:def )?(\w+)(?:\(| =)", fault.code, re.M):
            assert hasattr(train_gpt, replaced), name


@pytest.mark.parametrize("part, well", [
    ({"outcome": "ok, 3 s", "result": {"steps": 1}}, True), ({"outcome": "ok, 3 s"}, False),
    ({"outcome": "FAILED: code 3 after 3 s", "figures": {"failed": {"profile of this checkout": "no kernel"}}}, True),
    ({"outcome": "FAILED: code 3 after 3 s", "figures": {"failed": {}}}, False),
    ({"outcome": "FAILED: ended after 3 s", "result": {"steps": 1}}, False), ({"outcome": "not run: LIMIT_S=540 is used up"}, False),
])  # fmt: skip
def test_a_part_of_the_rehearsed_queue_has_to_leave_its_figures(part, well):
    assert rehearse_gpu.well({"name": "step default"} | part) is well


@pytest.mark.parametrize("arguments, said", [
    ([], "0 arguments: expected RIG [MODE]"), (["."], "RIG=.: expected a folder with site/, stub/ and python"),
    (["rig", "fast"], "MODE=fast: expected runs, graphs, faults, first or all"),
])  # fmt: skip
def test_mistakes_of_the_rehearsal_are_one_line(arguments, said, tmp_path):
    for name in ("site", "stub"):
        (tmp_path / "rig" / name).mkdir(parents=True)
    (tmp_path / "rig" / "python").write_text("python3\n")
    script = ["bash", str(ROOT / "tools" / "rehearse_gpu.sh"), *arguments]
    done = subprocess.run(script, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stderr == f"rehearse_gpu.sh: error: {said}\n"
