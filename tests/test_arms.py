"""bench/arms.py: what its arms set, which runs it repeats, what its table computes, and how it refuses."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import arms
import pytest
from conftest import ROOT, TINY

from train_gpt import Config


def settings_of(command: str, **more: object) -> dict[str, dict[str, str]]:
    """Arm -> settings of a run, as the command line makes them."""
    args = arms.parse_arguments(command.split())
    chosen = arms.arms_of(args)
    return {name: arms.arm_settings(arm, arms.plan_of(args)._replace(**more), Config) for name, arm in chosen.items()}


# -------------------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize("command", [
    "systems --seconds 150", "systems --seconds 120 --full", "systems --tokens 900000", "switches --steps 400",
    "band --steps 400", "recipe --proxy P1", "recipe --proxy P2 --sliding", "recipe --proxy P2 --seconds 60",
])  # fmt: skip
def test_every_arm_is_accepted_and_differs_from_the_others(command):
    found = settings_of(command)
    assert len({json.dumps(s, sort_keys=True) for s in found.values()}) == len(found)
    assert not {key for s in found.values() for key in s if key.endswith("_PATH")}  # records hold no machine's paths


def test_proxies_have_their_size_length_and_scores():
    own = {"S1": ("1024", "24", "2", "64", 92, "40"), "S2": ("1024", "36", "3", "96", 308, "60"),
           "P1": ("1024", "48", "4", "128", 732, "80"), "P2": ("8192", "96", "6", "192", 488, "160")}
    shape = ("VOCAB_SIZE", "EMBED_DIM", "NUM_LAYERS", "MODEL_DIM")
    for proxy, (vocab, embed, layers, width, steps, wide) in own.items():
        found = settings_of(f"recipe --proxy {proxy}")
        control = found["control"]
        assert [control[k] for k in shape] == [vocab, embed, layers, width]
        assert (control["ITERATIONS"], control["MAX_WALLCLOCK_SECONDS"]) == (str(steps), "0")
        assert control["SCALE_STORAGE"] == "fp16"  # configs/pr640.env is below it
        assert control["MUON_MOMENTUM_WARMUP_STEPS"] == str(round(500 * steps / 6530))
        assert (control["VAL_MAX_TOKENS"], control["SLIDING_EVAL"], control["TEMP_SCALING"]) == ("500000", "0", "0")
        name = f"EMBED_DIM={wide} FP_STORAGE=INT5"
        assert found[name] == control | {"EMBED_DIM": wide, "FP_STORAGE": "INT5"}
        assert len(found) == 19 and any(arm.startswith(f"{name} WARMDOWN_FRACTION=.6 ") for arm in found)
        sliding = settings_of(f"recipe --proxy {proxy} --sliding")["control"]
        assert sliding == control | {"SLIDING_EVAL": "1", "SLIDING_EVAL_STRIDE": "256"}
        assert settings_of(f"recipe --proxy {proxy} --whole")["control"] == control | {"VAL_MAX_TOKENS": "0"}


def test_an_arm_with_longer_windows_slides_by_half_of_its_own():
    args = arms.parse_arguments(["recipe", "--proxy", "P1", "--arm", "TRAIN_SEQ_LEN=1024"])
    arm = arms.arms_of(args)["TRAIN_SEQ_LEN=1024"]
    assert arms.arm_settings(arm, arms.plan_of(args), Config)["SLIDING_EVAL_STRIDE"] == "512"


def test_equal_tokens_are_each_arms_own_steps():
    found = settings_of("recipe --proxy P1 --tokens 100000")
    assert found["control"]["ITERATIONS"] == str(100_000 // 8192)
    full = settings_of("systems --tokens 1000000 --full")
    assert {s["ITERATIONS"] for s in full.values()} == {str(1_000_000 // 65_536)}
    with pytest.raises(arms.BadArguments, match="--tokens 100: expected at least those of a step, 8192"):
        settings_of("recipe --proxy P1 --tokens 100")


def test_settings_in_steps_shrink_with_the_run():
    found = arms.in_proportion({"WARMDOWN_ITERS": "1200", "LR_WARMUP_STEPS": "50"}, 4713, 400, Config)
    assert found == {"WARMDOWN_ITERS": "102", "LR_WARMUP_STEPS": "4", "MUON_MOMENTUM_WARMUP_STEPS": "42",
                     "SEQ_WARMUP_STEPS": "170"}  # fmt: skip


def test_free_runs_a_preset_as_its_user_would():
    args = arms.parse_arguments(["free", "--preset", f"{ROOT}/configs/demo.env", "--arm", "", "--arm", "MODEL_DIM=384"])
    found = {name: arms.arm_settings(arm, arms.plan_of(args), Config, args.preset)
             for name, arm in arms.arms_of(args).items()}  # fmt: skip
    preset = arms.read_preset(args.preset)
    assert found == {"(preset)": preset, "MODEL_DIM=384": preset | {"MODEL_DIM": "384"}}


def test_a_setting_that_the_trainer_does_not_have_is_refused():
    plan = arms.Plan(arms.pairs(arms.SMALL), seconds=150)
    with pytest.raises(ValueError, match="NUM_LAYER5"):
        arms.arm_settings(arms.Arm("NUM_LAYER5=3"), plan, Config)


def test_names_of_files_are_short_and_differ():
    long = " ".join(f"SETTING_{i}=1" for i in range(9))
    names = [arms.file_name(arm) for arm in (long, f"{long} X=1", "A=1 B=.6", "(preset)")]
    assert len(set(names)) == 4 and all(Config(run_id=f"{name}_seed123456_web") for name in names)


# -------------------------------------------------------------------------------------------------- resumption


def record(arm: str, seed: int, bpb: float, web: float | None = None, **result: object) -> dict:
    about = {"seed": seed, "val_bpb": bpb, "roundtrip_val_bpb": bpb, "sliding_val_bpb": None, "steps": 400,
             "ms_per_step": 300.4, "params": 1000, "artifact_bytes": 2000, "zero_frac": 0.3,
             "code_sha256": "c"}  # fmt: skip
    held_out = {"web": {"roundtrip_val_bpb": web, "sliding_val_bpb": None}} if web else {}
    return {"arm": arm, "seed": seed, "settings": {"A": "1"}, "result": about | result} | held_out


def batch(out: Path, **settings: object) -> arms.Batch:
    return arms.Batch(out, "unused", ROOT / "train_gpt.py", Config)._replace(**settings)


def test_finished_runs_are_skipped_and_failed_ones_repeated(tmp_path, monkeypatch):
    ran, broken = [], {("a", 42)}

    def run(_: arms.Runner, arm: str, seed: int, settings: dict[str, str]) -> dict:
        ran.append((arm, seed))
        if (arm, seed) in broken:
            return {"arm": arm, "seed": seed, "settings": settings, "error": "no memory"}
        return record(arm, seed, 2.0) | {"settings": settings}

    monkeypatch.setattr(arms.Runner, "run", run)
    chosen = {"b": {"A": "1"}, "a": {"A": "2"}}
    first = arms.Runner(batch(tmp_path, jobs=2)).run_all(chosen, [7, 42])
    assert sorted(ran) == [("a", 7), ("a", 42), ("b", 7), ("b", 42)]
    assert [(r["arm"], r["seed"]) for r in first] == [("b", 7), ("b", 42), ("a", 7), ("a", 42)]
    broken.clear()
    again = arms.Runner(batch(tmp_path)).run_all(chosen, [7, 42])
    assert ran[4:] == [("a", 42)] and not any(map(arms.failure, again)) and len(again) == 4
    arms.Runner(batch(tmp_path)).run_all(chosen | {"a": {"A": "3"}}, [7])
    assert ran[5:] == [("a", 7)]  # other settings are another run


def test_half_a_last_line_is_survived_and_left_behind(tmp_path, capsys):
    path = tmp_path / "results.jsonl"
    arms.append_result(path, record("a", 7, 2.0))
    with path.open("a") as f:
        f.write('{"arm": "b", "se')
    assert arms.read_results(path) == [record("a", 7, 2.0)] and "line 2: half a record" in capsys.readouterr().err
    arms.append_result(path, record("c", 7, 2.0))
    assert [r["arm"] for r in arms.read_results(path)] == ["a", "c"]


def test_a_batch_keeps_its_code(tmp_path):
    code, out = tmp_path / "trainer.py", tmp_path / "out"
    code.write_text("old")
    assert arms.snapshot(out, code).read_text() == "old"
    code.write_text("new")
    assert arms.snapshot(out, None).read_text() == "old"
    with pytest.raises(arms.BadArguments, match="another version"):
        arms.snapshot(out, code)


FAKE_TRAINER = """
import hashlib, json, os, pathlib, sys
e = os.environ
web, artifact = e["DATA_PATH"].endswith("_web"), pathlib.Path(e["ARTIFACT_PATH"])
assert "MATRIX_LR" not in e and e["OMP_NUM_THREADS"] == "1"
if e["SEED"] == "13" and web:
    sys.exit("train_gpt.py: unlucky")
if e.get("EVAL_ONLY"):
    assert artifact.read_text() == "weights"
    bpb = 4 if "VAL_MAX_TOKENS" in e else 3 if web else 2
    result = {"roundtrip_val_loss": 1, "roundtrip_val_bpb": bpb + web / 2, "sliding_val_bpb": bpb - 1, "val_tokens": 9, "device": "another"}
else:
    assert not web
    artifact.write_text("weights")
    digest = hashlib.sha256(b"weights").hexdigest()
    result = {"val_bpb": 2, "roundtrip_val_bpb": 2, "steps": 4, "artifact_sha256": digest, "device": "one", "val_tokens": 5}
print("step:1")
print("result " + json.dumps(result | {"run_id": e["RUN_ID"]}))
"""


@pytest.fixture
def recipe(tmp_path):
    """What a recipe's batch with FAKE_TRAINER runs in."""
    for name in ("sp9", "sp9_web"):
        (tmp_path / name).mkdir()
        for split in ("train", "val"):
            (tmp_path / name / f"fineweb_{split}_0.bin").touch()
    (tmp_path / "trainer.py").write_text(FAKE_TRAINER)
    return batch(tmp_path / "out", data=str(tmp_path / "sp"), code=tmp_path / "trainer.py", web=True, jobs=1)


def test_a_recipes_run_is_scored_on_both_sets_and_its_artifact_goes(recipe, monkeypatch):
    monkeypatch.setenv("MATRIX_LR", "9")  # of the shell: no arm's
    good, bad = arms.Runner(recipe).run_all({"A=1": {"VOCAB_SIZE": "9"}}, [7, 13])
    assert good["result"]["run_id"] == "A_1_seed7" and good["web"]["run_id"] == "A_1_seed7_web"
    assert good["web"]["roundtrip_val_bpb"] == 3.5 and not arms.failure(good)
    assert bad["error"] == "train_gpt.py: unlucky" and "web" not in bad
    assert not list(recipe.out.glob("*.ptz"))
    assert [arms.failure(r) for r in arms.read_results(recipe.out / "results.jsonl")] == ["", bad["error"]]


def test_a_kept_artifact_is_scored_again_and_nothing_is_trained(recipe):
    settings, more = {"VOCAB_SIZE": "9"}, {"VOCAB_SIZE": "9", "VAL_MAX_TOKENS": "0", "SLIDING_EVAL": "1"}
    (first,) = arms.Runner(recipe._replace(keep=True)).run_all({"a": settings}, [7])
    (again,) = arms.Runner(recipe).run_all({"a": more}, [7])
    assert again["settings"] == more and first["result"]["val_tokens"] == 5
    assert again["result"] == first["result"] | {"val_loss": 1, "val_bpb": 4, "roundtrip_val_loss": 1, "roundtrip_val_bpb": 4,
                                                 "sliding_val_bpb": 3, "val_tokens": 9}  # fmt: skip
    assert again["web"]["roundtrip_val_bpb"] == 4.5 and again["web"]["run_id"] == "a_seed7_web"
    assert (recipe.out / "a_seed7.ptz").exists()  # it was not this batch's to remove


@pytest.mark.parametrize("case", ["other training", "other seed", "other artifact", "inexact"])
def test_another_training_is_trained(recipe, case):
    settings, file = {"VOCAB_SIZE": "9"}, recipe.out / "results.jsonl"
    arms.Runner(recipe._replace(keep=True)).run_all({"a": settings}, [7])
    if case == "other artifact":
        (recipe.out / "a_seed7.ptz").write_text("others")
    if case == "inexact":
        file.write_text(file.read_text().replace('"val_bpb": 2, ', '"val_bpb": 2.1, '))
    settings = settings | {"VAL_MAX_TOKENS": "0"} | ({"MLP_MULT": "3"} if case == "other training" else {})
    seed = 8 if case == "other seed" else 7
    (again,) = arms.Runner(recipe).run_all({"a": settings}, [seed])
    assert again["result"]["run_id"] == f"a_seed{seed}" and again["result"]["val_tokens"] == 5


def test_every_job_has_a_gpu_of_its_own(tmp_path, monkeypatch):
    """Two jobs at once meet at a barrier, so that each has its own thread; a shell's choice of GPUs does not reach them."""
    for split in ("train", "val"):
        (tmp_path / f"fineweb_{split}_0.bin").touch()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5")
    monkeypatch.setattr(arms.os, "sched_getaffinity", lambda _: set(range(12)))
    both, seen = threading.Barrier(2, timeout=30), []

    def execute(_: arms.Runner, env: dict[str, str]) -> dict:
        both.wait()
        seen.append((env["CUDA_VISIBLE_DEVICES"], env["OMP_NUM_THREADS"]))
        return record("a", int(env["SEED"]), 2.0)["result"]

    monkeypatch.setattr(arms.Runner, "execute", execute)
    ours = batch(tmp_path / "out", data=str(tmp_path), gpus=("0", "3"))
    assert len(arms.Runner(ours).run_all({"a": {}}, [1, 2, 3, 4])) == 4
    assert sorted(seen) == [("0", "6"), ("0", "6"), ("3", "6"), ("3", "6")]


# -------------------------------------------------------------------------------------------------- sweeps


@pytest.mark.parametrize(("word", "values"), [
    ("MATRIX_LR=.01,.02,.01", [".01", ".02"]),
    ("ACTIVATION=relu,gelu", ["relu", "gelu"]),
    ("MATRIX_LR=.01:.04:4", ["0.01", "0.02", "0.03", "0.04"]),
    ("MATRIX_LR=.01:.08:4log", ["0.01", "0.02", "0.04", "0.08"]),
    ("NUM_LAYERS=2:8:4", ["2", "4", "6", "8"]),
    ("NUM_LAYERS=1:3:5", ["1", "2", "3"]),  # whole ones, each once
    ("MLP_MULT=1:4:3LOG", ["1", "2", "4"]),
    ("MUON_WD=0:1e-2:3", ["0", "0.005", "0.01"]),
    ("MATRIX_LR=.5:2", arms.Range(0.5, 2.0, False, False)),
    ("NUM_LAYERS=2:9:log", arms.Range(2.0, 9.0, True, True)),
])  # fmt: skip
def test_lists_and_ranges(word, values):
    assert arms.axis_of(word, Config) == (word.split("=")[0], values)


def test_a_grid_is_every_combination_behind_the_preset():
    found = list(arms.sweep_arms(["MATRIX_LR=.01,.02", "NUM_LAYERS=2:3:2"], 0, 0, Config))
    assert found == ["(preset)", "MATRIX_LR=.01 NUM_LAYERS=2", "MATRIX_LR=.01 NUM_LAYERS=3", "MATRIX_LR=.02 NUM_LAYERS=2",
                     "MATRIX_LR=.02 NUM_LAYERS=3"]  # fmt: skip


def test_draws_are_different_within_their_range_and_more_begin_with_those_before():
    words = ["MATRIX_LR=.001:1:log", "NUM_LAYERS=2:5", "ACTIVATION=relu,gelu"]
    few, many = (list(arms.sweep_arms(words, count, 3, Config))[1:] for count in (5, 60))
    assert many[:5] == few and len(set(many)) == 60 and few != list(arms.sweep_arms(words, 5, 4, Config))[1:]
    drawn = [arms.pairs(arm) for arm in many]
    rates = [float(settings["MATRIX_LR"]) for settings in drawn]
    assert 0.001 <= min(rates) and max(rates) <= 1 and 15 < sum(rate < 0.0316 for rate in rates) < 45  # half below the geometric mean
    assert {settings["NUM_LAYERS"] for settings in drawn} == {"2", "3", "4", "5"}
    assert {settings["ACTIVATION"] for settings in drawn} == {"relu", "gelu"}


STOP_AT = {"seed": ""}  # of the run that is interrupted


def sweep(folder: Path, *more: str) -> int:
    return arms.main(["sweep", "--preset", str(folder / "tiny.env"), "--data", str(folder), "--out", str(folder / "out"), *more])


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A preset, shards that nothing reads, and runs that take no time: bits per byte fall with MLP_MULT, and with the seed."""
    (tmp_path / "tiny.env").write_text("".join(f"{k}={v}\n" for k, v in TINY.items() if k != "SEED"))
    for split in ("train", "val"):
        (tmp_path / f"fineweb_{split}_0.bin").touch()

    def execute(_: arms.Runner, env: dict[str, str]) -> dict:
        if env["SEED"] == STOP_AT["seed"] and env["MLP_MULT"] == "4":
            raise KeyboardInterrupt
        return record("", 0, 3 - float(env["MLP_MULT"]) / 10 + int(env["SEED"]) / 100)["result"]

    monkeypatch.setattr(arms.Runner, "execute", execute)
    return tmp_path


def test_a_sweep_ends_with_its_table_and_its_picture(folder, capsys):
    assert sweep(folder, "--set", "MLP_MULT=3:4:2", "--seeds", "1,2,3") == 0
    shown, said = capsys.readouterr()
    assert re.fullmatch(r"arms\.py: \S+/table\.md and \S+/effects\.png", said.splitlines()[-1])
    _, rows = table_of(shown)
    assert list(rows) == ["(preset)", "MLP_MULT=3", "MLP_MULT=4"]
    assert rows["MLP_MULT=4"]["s.e."] == "0.0058" and rows["MLP_MULT=4"]["against the first"] == "-0.2000 \u00b1 0.0082"
    assert rows["MLP_MULT=4"]["paired by seed"] == "-0.2000 \u00b1 0.0000 (3)"
    assert (folder / "out/table.md").read_text() == shown
    assert (folder / "out/effects.png").read_bytes().startswith(b"\x89PNG")
    assert sweep(folder, "--set", "MLP_MULT=3:4:2", "--table") == 0 and capsys.readouterr().out == shown


def test_a_sweep_that_was_stopped_goes_on_and_a_larger_one_with_it(folder, capsys, monkeypatch):
    monkeypatch.setitem(STOP_AT, "seed", "2")
    with pytest.raises(KeyboardInterrupt):
        sweep(folder, "--set", "MLP_MULT=3,4", "--seeds", "1,2")
    done = arms.read_results(folder / "out/results.jsonl")
    assert [(r["arm"], r["seed"]) for r in done] == [(arm, 1) for arm in ("(preset)", "MLP_MULT=3", "MLP_MULT=4")] + [
        ("(preset)", 2), ("MLP_MULT=3", 2)]  # fmt: skip
    assert not (folder / "out/table.md").exists()
    monkeypatch.setitem(STOP_AT, "seed", "")
    assert sweep(folder, "--set", "MLP_MULT=3,4,5", "--seeds", "1,2") == 0
    again = arms.read_results(folder / "out/results.jsonl")
    assert again[:5] == done and sorted((r["arm"], r["seed"]) for r in again[5:]) == [("MLP_MULT=4", 2), ("MLP_MULT=5", 1), ("MLP_MULT=5", 2)]
    assert len(table_of(capsys.readouterr().out)[1]) == 4


def test_a_picture_that_fails_does_not_fail_the_batch(folder, capsys, monkeypatch):
    def broken(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(arms.plot_logs, "save", broken)
    assert sweep(folder, "--set", "MLP_MULT=3") == 0
    assert "arms.py: no picture: [Errno 28] No space left" in capsys.readouterr().err and (folder / "out/table.md").exists()


@pytest.mark.parametrize(("command", "said"), [
    ("sweep", 'sweep: expected at least one --set "KEY=A,B,C"'),
    ("sweep --set MATRIX_LR", "--set 'MATRIX_LR': expected a setting of train_gpt.py and its values"),
    ("sweep --set MATRIX_RATE=1", "--set 'MATRIX_RATE=1': expected a setting of train_gpt.py"),
    ("sweep --set SEED=1,2", "--set 'SEED=1,2': expected a setting of train_gpt.py"),
    ("sweep --set MATRIX_LR=1,,2", "--set 'MATRIX_LR=1,,2': a value is empty"),
    ("sweep --set MATRIX_LR=1:2:x", "expected MATRIX_LR=LOW:HIGH, LOW:HIGH:log, LOW:HIGH:COUNT or LOW:HIGH:COUNTlog"),
    ("sweep --set MATRIX_LR=1:2:", "expected MATRIX_LR=LOW:HIGH, LOW:HIGH:log"),
    ("sweep --set MATRIX_LR=nan:2:3", "expected MATRIX_LR=LOW:HIGH, LOW:HIGH:log"),
    ("sweep --set MATRIX_LR=2:1:3", "--set 'MATRIX_LR=2:1:3': expected LOW below HIGH"),
    ("sweep --set MATRIX_LR=0:1:3log", "expected LOW below HIGH, and both above 0"),
    ("sweep --set MATRIX_LR=0:1:1", "--set 'MATRIX_LR=0:1:1': 1 values, expected 2 to 100"),
    ("sweep --set MATRIX_LR=0:1:101", "101 values, expected 2 to 100"),
    ("sweep --set ACTIVATION=1:2:3", "ACTIVATION is no number; expected ACTIVATION=A,B,C"),
    ("sweep --set UNET=0:1:2", "UNET is no number; expected UNET=A,B,C"),
    ("sweep --set MATRIX_LR=.1:.2", "--set MATRIX_LR: LOW:HIGH is drawn from, so it needs --draws"),
    ("sweep --set MATRIX_LR=.1 --set MATRIX_LR=.2", "--set 'MATRIX_LR=.2': MATRIX_LR is there already"),
    ("sweep --set MATRIX_LR=1:2:100 --set BETA2=.1:.2:100", "--set: 10,000 combinations, expected at most 1,000; --draws N"),
    ("sweep --set MATRIX_LR=.1,.2 --draws 3", "--draws 3: only 2 different combinations were found"),
    ("sweep --set MATRIX_LR=.1,.2 --draws 0", "--draws 0: expected more than 0, at most 1,000"),
    ("sweep --set NUM_HEADS=8,7", "arm 'NUM_HEADS=7': "),
    ("sweep --set MATRIX_LR=.1 --arm X=1", "sweep has no --arm"),
    ("free --arm= --set MATRIX_LR=1", "free has no --set"),
    ("free --arm= --draw-seed 1", "free has no --draw-seed"),
    ("free --arm= --gpus 0,0", "--gpus: 0,0: expected different GPUs and commas"),
    ("free --arm= --gpus all", "--gpus: all: expected different GPUs and commas"),
    ("free --arm= --gpus 0 --jobs 2", "--jobs and --gpus: expected one of them"),
    ("sweep --set MATRIX_LR=.1 --code missing.py", "--code missing.py: no such file"),
])  # fmt: skip
def test_a_bad_sweep_is_one_line_and_starts_nothing(command, said, tmp_path, monkeypatch, capsys):
    test_bad_arguments_are_one_line_and_start_nothing(command, said, tmp_path, monkeypatch, capsys)


# -------------------------------------------------------------------------------------------------- the table


def test_statistics_by_hand():
    """1, 2, 6 has variance 7; 3, 5 has variance 2; the differences by seed are 2 and 3."""
    new, base = {1: 3.0, 2: 5.0}, {1: 1.0, 2: 2.0, 3: 6.0}
    assert arms.estimate(base.values()) == (3, pytest.approx(math.sqrt(7 / 3)), 3)
    assert arms.welch(new.values(), base.values())[:2] == (1, pytest.approx(math.sqrt(7 / 3 + 2 / 2)))
    assert arms.paired(new, base) == (2.5, pytest.approx(0.5), 2)
    assert arms.welch([1.0], base.values()).error is None and arms.paired({9: 1.0}, base) is None


def test_statistics_are_scipys():
    stats = pytest.importorskip("scipy.stats")
    new, base = [2.13, 2.11, 2.18, 2.15], [2.20, 2.17, 2.19, 2.24]
    ours = arms.welch(new, base)
    assert ours.mean / ours.error == pytest.approx(stats.ttest_ind(new, base, equal_var=False).statistic)
    ours = arms.paired(dict(enumerate(new)), dict(enumerate(base)))
    assert ours.mean / ours.error == pytest.approx(stats.ttest_rel(new, base).statistic)
    assert arms.estimate(new).error == pytest.approx(stats.sem(new))


def table_of(text: str) -> tuple[str, dict[str, dict[str, str]]]:
    """(all above the table, arm -> column -> cell)."""
    above, _, rest = text.partition("\n\n")
    head, _, *rows = [line[2:-2].split(" | ") for line in rest.strip().split("\n\n")[0].splitlines()]
    return above, {cells[0]: dict(zip(head, cells, strict=True)) for cells in rows}


def test_the_table_of_two_sets(capsys):
    control = [record("control", 1, 2.0, 3.0), record("control", 2, 2.1, 3.1), record("control", 3, 2.2, 3.2)]
    new = [record("new", 2, 2.0, 3.0), record("new", 3, 2.0, 3.0)]
    assert arms.print_table([*control, *new], {"new": "because"})
    above, rows = table_of(capsys.readouterr().out)
    assert above.startswith("control: 3 seeds from 2.5000 to 2.7000, standard deviation 0.1000;")
    assert above.endswith("standard error of 0.1155")  # .1 sqrt(1 + 1/3)
    assert rows["control"]["mean"] == "2.6000" and rows["control"]["s.e."] == "0.0577"
    assert rows["control"]["against the first"] == ""
    about = {"arm": "new", "n": "2", "val bpb": "2.0000", "web bpb": "3.0000", "mean": "2.5000", "s.e.": "0.0000",
             "against the first": "-0.1000 ± 0.0577", "paired by seed": "-0.1500 ± 0.0500 (2)", "steps": "400",
             "ms/step": "300", "params": "1000", "artifact bytes": "2000", "zeros": "0.300",
             "why, or what others found": "because"}  # fmt: skip
    assert rows["new"] == about


def test_sliding_scores_have_their_own_difference(capsys):
    records = [record("a", s, 2.0, sliding_val_bpb=1.9) for s in (1, 2)]
    records += [record("b", s, 2.0, sliding_val_bpb=1.8 + s / 100) for s in (1, 2)]
    assert arms.print_table(records)
    _, rows = table_of(capsys.readouterr().out)
    assert rows["b"]["sliding"] == "1.8150" and rows["b"]["sliding against the first"] == "-0.0850 ± 0.0050"
    assert "mean" not in rows["b"] and "web bpb" not in rows["b"]


def test_what_spoils_a_table_is_said(capsys):
    records = [record("a", 7, 2.0)]
    assert not arms.print_table([*records, record("lossy", 7, 2.0, roundtrip_val_bpb=2.0000001)])
    assert "NOT EXACT: lossy, seed 7: the model scored 2.0, its artifact 2.0000001" in capsys.readouterr().out
    assert not arms.print_table([*records, {"arm": "bad", "seed": 7, "settings": {}, "error": "no memory"}])
    assert "FAILED: bad, seed 7: no memory" in capsys.readouterr().out
    assert arms.print_table([*records, record("b", 7, 2.0, code_sha256="d")])
    assert "Warning: 2 versions of train_gpt.py (c, d)" in capsys.readouterr().out
    assert arms.print_table([*records, record("a", 8, 2.0) | {"settings": {"A": "2"}}])
    assert "Warning: a: its seeds ran with different settings" in capsys.readouterr().out


def test_the_newest_record_counts_and_unknown_arms_stand_last(tmp_path, capsys):
    """A file as another runner left it: the error is in the result."""
    lines = [record("mine", 42, 2.0, 2.2), record("control", 42, 2.5, 2.5) | {"result": {"error": "killed"}},
             record("control", 42, 2.1, 2.3)]  # fmt: skip
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert arms.main(["recipe", "--table", "--out", str(tmp_path)]) == 0
    above, rows = table_of(capsys.readouterr().out)
    assert list(rows) == ["control", "mine"] and above == "control: one seed, so nothing is known of the spread"
    assert rows["mine"]["against the first"] == "-0.1000" and rows["mine"]["paired by seed"] == "-0.1000 (1)"
    assert arms.main(["recipe", "--table", "--out", str(tmp_path), "--only", "mine"]) == 0
    assert list(table_of(capsys.readouterr().out)[1]) == ["mine"]


# -------------------------------------------------------------------------------------------------- command line


@pytest.mark.parametrize(("command", "said"), [
    ("nothing", "invalid choice: 'nothing'"),
    ("recipe --steps 9", "recipe: expected --proxy S1 or S2 or P1 or P2"),
    ("recipe --proxy P1 --steps 9 --seconds 9", "--steps and --seconds: expected one of them"),
    ("systems", "systems: expected --steps, --tokens or --seconds"),
    ("switches --steps 9 --full", "switches has no --full"),
    ("switches --steps -9", "--steps -9: expected more than 0"),
    ("switches --steps 0", "--steps 0: expected more than 0"),
    ("switches --tokens 99999999999999999", "--tokens 1e+17: expected more than 0, at most 10,000,000,000,000"),
    ("switches --seconds nan", "--seconds nan: expected more than 0"),
    ("switches --seconds inf", "--seconds inf: expected more than 0"),
    ("switches --steps 9 --jobs 0", "--jobs 0: expected more than 0"),
    ("switches --steps 9 --jobs 5000", "--jobs 5000: expected more than 0, at most 1,024"),
    ("switches --steps 9 --seeds 1,x", "--seeds: 1,x: expected whole numbers and commas"),
    ("switches --steps 9 --seeds=-1", "--seeds: -1: expected whole numbers and commas"),
    ("switches --steps 9 --table --foo", "unrecognized arguments: --foo"),
    ("band --steps 9 --only this", "--only 'this': expected some of 'sliding, windows of 128'"),
    ("band --table --out missing", "no results"),
    ("free", "free: expected at least one --arm"),
    ("free --arm NUM_LAYERS", "found 'NUM_LAYERS'"),
    ("free --arm NUM_LAYER=9", "arm 'NUM_LAYER=9': not a setting of train_gpt.py: NUM_LAYER"),
    ("free --arm MODEL_DIM=63", "arm 'MODEL_DIM=63': MODEL_DIM=63: expected a multiple of NUM_HEADS=8"),
    ("free --arm= --preset missing.env", "--preset missing.env: no such file"),
    ("free --arm TRAIN_BATCH_TOKENS=0 --tokens 100", "arm 'TRAIN_BATCH_TOKENS=0': TRAIN_BATCH_TOKENS=0: expected"),
    ("free --arm TRAIN_BATCH_TOKENS=many --tokens 100", "TRAIN_BATCH_TOKENS='many': expected a whole number"),
    ("free --arm= --code missing.py", "--code missing.py: no such file"),
    ("free --arm= --data missing/sp", "--data missing/sp: expected fineweb_train_*.bin and fineweb_val_*.bin"),
])  # fmt: skip
def test_bad_arguments_are_one_line_and_start_nothing(command, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    argv = command.split() + (["--out", "out"] if "--out" not in command else [])
    try:
        code = arms.main(argv)
    except SystemExit as end:
        code = end.code
    complaint = capsys.readouterr().err
    assert code == 2 and complaint.count("\n") == 1 and said in complaint and complaint.startswith("arms.py: ")
    assert not list(tmp_path.iterdir())


BAD_PRESETS = {
    "no setting": (b"NUM_LAYERS=2\nNUM_HEADS\n", "preset bad.env, line 2: 'NUM_HEADS' is neither KEY=VALUE nor a comment"),
    "lower case": (b"num_layers=2\n", "preset bad.env, line 1: 'num_layers=2' is neither"),
    "a comment behind a value": (b"# two\n\nNUM_LAYERS=2 # why\n", "preset bad.env, line 3: 'NUM_LAYERS=2 # why' is neither"),
    "not UTF-8": (b"NUM_LAYERS=\xff\n", "preset bad.env: not a text file"),
    "not a setting": (b"NUM_LAYER=2\n", "not a setting of train_gpt.py: NUM_LAYER"),
}


@pytest.mark.parametrize("case", BAD_PRESETS)
def test_a_malformed_preset_is_one_line_that_names_its_place(case, tmp_path, monkeypatch, capsys):
    content, said = BAD_PRESETS[case]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.env").write_bytes(content)
    assert arms.main(["free", "--arm", "", "--preset", "bad.env", "--out", "out"]) == 2
    complaint = capsys.readouterr().err
    assert complaint.count("\n") == 1 and said in complaint and not (tmp_path / "out").exists()


def test_a_preset_of_a_group_that_is_not_there_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(arms, "ROOT", tmp_path)  # no configs/ in it
    assert arms.main(["systems", "--steps", "9", "--only", "pr640", "--code", str(ROOT / "train_gpt.py"), "--out", "out"]) == 2
    complaint = capsys.readouterr().err
    assert complaint.count("\n") == 1 and "configs/pr640.env: No such file" in complaint


@pytest.mark.parametrize("program", ["def f(:\n", "import nothing_of_this_name\n", "x = 1\n", "raise SystemExit('no')\n"])
def test_code_that_is_no_trainer_is_one_line(program, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other.py").write_text(program)
    assert arms.main(["free", "--arm", "", "--code", "other.py", "--out", "out"]) == 2
    complaint = capsys.readouterr().err
    assert complaint.count("\n") == 1 and "--code other.py: not a train_gpt.py: " in complaint and not (tmp_path / "out").exists()
    assert arms.load_config(ROOT / "train_gpt.py") is Config  # what was loaded before is still there


def test_an_out_folder_that_cannot_be_made_is_one_line(data_dir, tmp_path, capsys):
    (tmp_path / "out").write_text("a file in the way")
    command = ["free", "--arm", "VOCAB_SIZE=320", "--data", str(data_dir), "--out", str(tmp_path / "out")]
    assert arms.main(command) == 2 and capsys.readouterr().err.count("\n") == 1


BAD_LINES = {
    "a number": ("3", "not a record"),
    "a list": ("[]", "not a record"),
    "null": ("null", ""),
    "no arm": (json.dumps({k: v for k, v in record("a", 7, 2.0).items() if k != "arm"}), "without arm, seed or settings"),
    "a seed in words": (json.dumps(record("a", 7, 2.0) | {"seed": "seven"}), "without arm, seed or settings"),
    "no result": (json.dumps({"arm": "a", "seed": 7, "settings": {}}), "result has no number as val_bpb, roundtrip_val_bpb, steps"),
    "a result in words": (json.dumps(record("a", 7, 2.0) | {"result": "good"}), "not a record"),
    "NaN": (json.dumps(record("a", 7, math.nan)), "result has no number as val_bpb, roundtrip_val_bpb"),
    "infinity": (json.dumps(record("a", 7, 2.0, steps=math.inf)), "result has no number as steps"),
    "5,000 digits": ('{"arm": "a", "seed": ' + "9" * 5000 + "}", "half a record"),
    "figures in words": (json.dumps(record("a", 7, 2.0, params="many")), "result has no number as params"),
    "no web score": (json.dumps(record("a", 7, 2.0) | {"web": {}}), "web has no number as roundtrip_val_bpb"),
}


@pytest.mark.parametrize("case", BAD_LINES)
def test_a_line_that_is_no_record_is_named_and_left_out(case, tmp_path, capsys):
    line, said = BAD_LINES[case]
    (tmp_path / "results.jsonl").write_bytes(f"{json.dumps(record('b', 7, 2.0))}\n{line}\n\xff\n".encode("latin-1"))
    assert arms.main(["free", "--arm", "", "--table", "--out", str(tmp_path)]) == 0
    shown = capsys.readouterr()
    assert list(table_of(shown.out)[1]) == ["b"]
    expected = [f"line 2: {'a record whose ' * said.startswith(('result has', 'web has'))}"] * bool(said) + ["line 3: half a record"]
    assert shown.err.count("\n") == len(expected) and all(text in shown.err for text in (*expected, said))


def test_a_console_without_the_tables_signs_shows_escapes(tmp_path):
    lines = [record(arm, seed, 2.0 + seed) for arm in ("a", "b") for seed in (1, 2)]
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    command = [sys.executable, str(ROOT / "bench/arms.py"), "free", "--arm", "", "--table", "--out", str(tmp_path)]
    done = subprocess.run(command, env=os.environ | {"PYTHONIOENCODING": "ascii"}, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "| +0.0000 \\xb1 0.7071 |" in done.stdout and done.stderr == ""


def test_results_without_the_codes_digest_and_a_run_without_result(tmp_path, capsys):
    without = record("a", 7, 2.0)
    del without["result"]["code_sha256"]
    assert arms.print_table([without]) and "| a |" in capsys.readouterr().out
    (tmp_path / "trainer.py").write_text("print('step:1')\n")
    runner = arms.Runner(batch(tmp_path, code=tmp_path / "trainer.py"))
    assert runner.execute({}) == {"error": "ended well, but without a result line"}


def test_a_recipe_needs_the_web_text(data_dir):
    with pytest.raises(arms.BadArguments, match="_web: expected shards"):
        arms.web_folder(data_dir)


def test_free_runs_for_real_and_goes_on(data_dir, tmp_path, monkeypatch, capsys):
    """Two arms at the tiny size in processes of their own; the second start runs nothing."""
    preset = TINY | {"ITERATIONS": "4", "SLIDING_EVAL": "0", "TEMP_SCALING": "0", "VAL_MAX_TOKENS": "700"}
    (tmp_path / "tiny.env").write_text("".join(f"{k}={v}\n" for k, v in preset.items() if k != "SEED"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLP_MULT", "4")  # of the shell: no arm's
    command = ["free", "--preset", "tiny.env", "--arm", "", "--arm", "MLP_MULT=3", "--data", str(data_dir),
               "--seeds", "7", "--jobs", "2", "--out", "out"]  # fmt: skip
    assert arms.main(command) == 0
    shown = capsys.readouterr().out
    _, rows = table_of(shown)
    assert list(rows) == ["(preset)", "MLP_MULT=3"] and rows["(preset)"]["steps"] == "4"
    assert int(rows["MLP_MULT=3"]["params"]) > int(rows["(preset)"]["params"])
    assert (tmp_path / "out/train_gpt.py").read_bytes() == (ROOT / "train_gpt.py").read_bytes()
    assert sorted(p.name for p in (tmp_path / "out/logs").iterdir()) == ["MLP_MULT_3_seed7.txt", "_preset__seed7.txt"]
    before = (tmp_path / "out/results.jsonl").read_text()
    assert json.loads(before.splitlines()[0])["result"]["git_commit"] == "unknown"  # not that of a folder above
    assert arms.main(command) == 0 and capsys.readouterr().out == shown
    assert (tmp_path / "out/results.jsonl").read_text() == before


def test_data_of_another_vocabulary_says_which_it_has(tmp_path):
    """As run_demo.sh --text names its folder, whose vocabulary follows from the text."""
    for name in ("mine_sp2048", "mine_sp512", "mine_sp512_web", "mine_sp77"):
        (tmp_path / name).mkdir()
        (tmp_path / name / ("other.bin" if name == "mine_sp77" else "fineweb_val_000000.bin")).touch()
    with pytest.raises(arms.BadArguments) as said:
        arms.data_folder(f"{tmp_path}/mine_sp", {"VOCAB_SIZE": "4096"}, Config)
    assert str(said.value).endswith(f"in {tmp_path}/mine_sp4096; for what is there, every --arm needs VOCAB_SIZE=512 or 2048")
