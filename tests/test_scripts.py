"""The launch scripts and the tools around them: presets, the demo's table, submission.json. Nothing is trained here.

The scripts run in a copy of the tree, with TRAIN_PYTHON set to a stub that stands in for the trainer.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import check_setup
import demo_table
import make_submission
import own_text
import pack_code
import pytest
import run_logs
from conftest import ROOT, launch, python

SCRIPTS = sorted([*ROOT.glob("*.sh"), *ROOT.glob("tools/*.sh"), ROOT / ".ci" / "run"])
PRESETS = sorted(ROOT.glob("configs/*.env"))
# what the scripts themselves read; the trainer sees these names too
SCRIPT_VARIABLES = ("TRAIN_PYTHON", "ALLOW_CPU", "NPROC", "SUBMISSION_PATH", "TORCH_INDEX", "WORK_DIR", "PRESET_SETTINGS",
                    "FUNCTIONS_LEFT_OUT", "TEST_PROCESSES")  # fmt: skip

# The settings this suite may have been started with must not reach the scripts it starts.
CLEAN_ENV = {name: os.environ[name] for name in ("PATH", "HOME", "TMPDIR", "LANG") if name in os.environ}

RESULT = {
    "run_id": "record_seed42", "seed": 42, "steps": 6530, "tokens": 3423600640, "train_time_s": 599.25, "ms_per_step": 91.8,
    "device": "cuda", "world_size": 8, "gpu_name": "NVIDIA H100 80GB HBM3", "torch_version": "2.13.0+cu130",
    "params": 73_700_000, "ternary_params": 64_880_640, "zero_frac": 0.37, "temperature": 0.9,
    "val_loss": 3.05, "val_bpb": 1.18, "roundtrip_val_loss": 3.05, "roundtrip_val_bpb": 1.18,
    "sliding_val_loss": 2.98, "sliding_val_bpb": 1.15, "stride": 16, "val_tokens": 62_000_000, "val_bytes": 230_000_000,
    "artifact_bytes": 15_900_000, "code_bytes": 70_000, "total_bytes": 15_970_000, "eval_time_s": 429.5, "export_time_s": 9.5,
    "code_sha256": "c" * 64, "artifact_sha256": "a" * 64, "git_commit": "0" * 40, "first_losses": [9.01, 8.5],
}  # fmt: skip
CONFIG = {
    "run_id": "record_seed42", "seed": 42, "artifact_path": "logs/record_seed42.ternary.ptz", "data_path": "./data/fineweb",
    "tokenizer_path": "./data/sp8192.model", "num_layers": 10, "model_dim": 768, "vocab_size": 8192,
    "bitnet_group_size": 128, "matrix_optimizer": "neomuon", "train_batch_tokens": 524_288,
}  # fmt: skip


def log_text(seed=42, config=None, **result):
    """A made-up log: source, config, training, result."""
    own = {"seed": seed, "run_id": f"record_seed{seed}", "artifact_path": f"logs/{seed}.ptz"}
    source = 'log("config " + json.dumps(config))\nlog("result " + json.dumps(result))'
    config_line = f"config {json.dumps(CONFIG | own | (config or {}))}"
    return f"{source}\n{config_line}\nstep:1/9 loss:9.0\nresult {json.dumps(RESULT | {'seed': seed} | result)}\n"


# -------------------------------------------------------------------------------------------------- make_submission


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder to work in, outside any repository and with an empty git configuration."""
    monkeypatch.chdir(tmp_path)
    for name in ("GIT_CONFIG_GLOBAL", "GIT_CONFIG_SYSTEM"):
        monkeypatch.setenv(name, os.devnull)
    return tmp_path


def submit(folder, *texts, options=("--author", "A. Uthor", "--github-id", "author")):
    """Write the texts as logs and make submission.json of them; returns the exit code."""
    paths = [folder / f"log{i}.txt" for i in range(len(texts))]
    for path, text in zip(paths, texts, strict=True):
        path.write_text(text)
    return make_submission.main([*options, *map(str, paths)])


def test_submission_holds_means_extremes_and_every_seed(folder):
    logs = {
        42: {"sliding_val_loss": 2.99, "sliding_val_bpb": 1.1565, "total_bytes": 15_990_000, "artifact_sha256": "1" * 64},
        1337: {"sliding_val_loss": 2.985, "sliding_val_bpb": 1.1571, "total_bytes": 15_970_000},
        7: {"sliding_val_loss": 2.9833, "sliding_val_bpb": 1.1574, "total_bytes": 15_980_001},
    }
    assert submit(folder, *(log_text(seed, **figures) for seed, figures in logs.items())) == 0
    made = json.loads((folder / "submission.json").read_text())

    for name in ("val_loss", "val_bpb"):
        exact = sum(Fraction(figures[f"sliding_{name}"]) for figures in logs.values()) / 3
        assert made[name] == pytest.approx(float(exact), rel=1e-15)
    assert made["bytes_total"] == 15_990_000 and made["bytes_code"] == 70_000
    assert made["hardware"] == "8 x NVIDIA H100 80GB HBM3" and made["data_path"] == "./data/fineweb"
    assert made["author"] == "A. Uthor" and made["github_id"] == "author" and re.fullmatch(r"\d{4}-\d\d-\d\d", made["date"])
    assert {"name", "blurb"} <= made.keys()
    assert made["seed_results"].keys() == {"42", "1337", "7"}
    first = made["seed_results"]["42"]
    assert first["log"] == "log0.txt"
    assert {name: first[name] for name in make_submission.SEED_FIELDS} == {
        name: (RESULT | logs[42])[name] for name in make_submission.SEED_FIELDS
    }


def test_submission_without_sliding_reports_the_round_trip(folder):
    assert submit(folder, log_text(sliding_val_loss=None, sliding_val_bpb=None, roundtrip_val_bpb=1.19)) == 0
    made = json.loads((folder / "submission.json").read_text())
    assert (made["val_bpb"], made["score"], made["seed_results"]["42"]["sliding_val_bpb"]) == (1.19, "roundtrip", None)


def test_hardware_of_a_run_without_gpu_is_named_as_it_is(folder):
    assert submit(folder, log_text(device="cpu", gpu_name="none", world_size=2)) == 0
    assert json.loads((folder / "submission.json").read_text())["hardware"] == "2 x CPU process"


REFUSALS = {
    "no result": ([log_text().rsplit("result {", 1)[0]], "no result line"),
    "result cut off": ([log_text()[:-40]], "not whole JSON"),
    "no config": ([log_text().replace("\nconfig {", "\n{")], "no config line"),
    "a later run unfinished": ([log_text() + f"config {json.dumps(CONFIG)}\n"], "not the log of one whole run"),
    "same seed": ([log_text(7), log_text(7)], "both have seed 7"),
    "other code": ([log_text(7), log_text(42, code_sha256="d" * 64)], "code_sha256"),
    "other settings": ([log_text(7), log_text(42, config={"matrix_lr": 0.1})], "matrix_lr is 0.1 and 'nothing'"),
    "NaN": ([log_text(val_bpb=float("nan"))], "non-finite number NaN"),
    "infinity": ([log_text(sliding_val_bpb=float("inf"))], "non-finite number Infinity"),
    "overflow": ([log_text().replace("1.15,", "1e999,")], "non-finite number 1e999"),
    "over budget": ([log_text(total_bytes=16_000_001)], "16,000,001 is over the budget"),
    "figure missing": ([log_text(steps=None)], "steps None, expected a whole number"),
    "figure is text": ([log_text(val_bpb="1.1")], "val_bpb '1.1', expected a number"),
    "setting missing": ([log_text().replace('"model_dim"', '"d"')], "lacks model_dim"),
    "setting without a value": ([log_text(config={"iterations": None})], "iterations None, expected a whole number"),
    "no logs": ([], "no logs"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_submission_refuses_in_one_line_and_writes_nothing(folder, capsys, case):
    texts, message = REFUSALS[case]
    (folder / "submission.json").write_text("the one before")
    assert submit(folder, *texts) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert (folder / "submission.json").read_text() == "the one before"


def test_submission_at_the_budget_is_accepted(folder):
    assert submit(folder, log_text(total_bytes=16_000_000)) == 0


@pytest.mark.parametrize("options, missing", [((), "--author"), (("--author", "A"), "--github-id")])
def test_submission_needs_an_author(folder, capsys, options, missing):
    assert submit(folder, log_text(), options=options) == 2
    assert missing in capsys.readouterr().err and not (folder / "submission.json").exists()


def test_author_comes_from_git(folder, monkeypatch):
    (folder / "gitconfig").write_text('[user]\n name = G. Author\n[remote "origin"]\n url = git@github.com:gauthor/repo.git\n')
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(folder / "gitconfig"))
    assert submit(folder, log_text(), options=()) == 0
    made = json.loads((folder / "submission.json").read_text())
    assert (made["author"], made["github_id"]) == ("G. Author", "gauthor")


def test_a_failed_write_leaves_the_submission_before(folder, capsys, monkeypatch):
    def no_space(*_):
        raise OSError(28, "No space left on device")

    (folder / "submission.json").write_text("the one before")
    monkeypatch.setattr(os, "replace", no_space)
    assert submit(folder, log_text()) == 2
    assert "No space left" in capsys.readouterr().err
    assert sorted(path.name for path in folder.iterdir()) == ["log0.txt", "submission.json"]
    assert (folder / "submission.json").read_text() == "the one before"


# -------------------------------------------------------------------------------------------------- demo_table


def show_table(folder, result, manifest=None):
    """Exit code of demo_table on a result line (or any text) and a manifest."""
    text = result if isinstance(result, str) else f"result {json.dumps(result)}\n"
    (folder / "result").write_text(text)
    if manifest:
        (folder / "manifest.json").write_text(json.dumps(manifest))
    return demo_table.main([str(folder / "result"), "--manifest", str(folder / "manifest.json")])


def test_table_shows_scores_sizes_and_compressors(tmp_path, capsys):
    assert show_table(tmp_path, RESULT, {"gzip_bpb": 1.98768, "xz_bpb": 1.7}) == 0
    rows = dict(re.split(r"  +", line, maxsplit=1) for line in capsys.readouterr().out.strip().splitlines())
    assert rows == {
        "bits per byte, before export": "1.1800",
        "bits per byte, after the round trip": "1.1800",
        "bits per byte, sliding, stride 16": "1.1500",
        "bits per byte, gzip -9, same text": "1.9877",
        "bits per byte, xz -9, same text": "1.7000",
        "artifact": "15,900,000 bytes; with code 15,970,000 of 16,000,000 (99.8 %, fits)",
        "training": "599.2 s, 6,530 steps, 3,423,600,640 tokens",
    }


def test_table_leaves_out_what_there_is_not(tmp_path, capsys):
    """Own data has no manifest; EVAL_ONLY=1 SLIDING_EVAL=0 has neither training nor a sliding score."""
    evaluation = {"roundtrip_val_bpb": 1.25, "sliding_val_bpb": None, "stride": 16}
    assert show_table(tmp_path, evaluation) == 0
    assert capsys.readouterr().out.strip() == "bits per byte, after the round trip  1.2500"


@pytest.mark.parametrize("bytes_, text", [(RESULT["val_bytes"], "same text"), (5, "whole validation text")])
def test_table_says_which_text_was_compressed(tmp_path, capsys, bytes_, text):
    assert show_table(tmp_path, RESULT, {"xz_bpb": 1.7, "val": {"bytes": bytes_}}) == 0
    assert f"xz -9, {text}" in capsys.readouterr().out


NO_FIGURES = {
    "result {}": "the result line has no figure",
    'result {"val_bpb": "x"}': "val_bpb is 'x', expected a number",
    'result {"val_bpb": NaN}': "val_bpb is nan, expected a number",
    'result {"steps": 1.5}': "steps is 1.5, expected a number",
    'result {"val_bpb": ' + "9" * 30 + "}": "expected a number",
    "result {" + '"a":{' * 3000: "not JSON",
    "result {": "not JSON",
}


@pytest.mark.parametrize("line", NO_FIGURES, ids=lambda line: line[:20])
def test_a_result_without_figures_is_one_line(tmp_path, capsys, line):
    assert show_table(tmp_path, line) == 2
    err = capsys.readouterr().err
    assert err.startswith("demo_table.py: error: ") and err.count("\n") == 1 and NO_FIGURES[line] in err


@pytest.mark.parametrize("manifest", ["[1]", "x", "[" * 3000, '{"gzip_bpb": "1"}', '{"xz_bpb": [1]}'], ids=lambda text: text[:20])
def test_a_manifest_that_is_none_is_one_line(tmp_path, capsys, manifest):
    (tmp_path / "manifest.json").write_text(manifest)
    assert show_table(tmp_path, RESULT) == 2
    err = capsys.readouterr().err
    assert err.startswith("demo_table.py: error: ") and err.count("\n") == 1 and "manifest.json" in err


def test_figures_that_go_together_are_left_out_together(tmp_path, capsys):
    assert show_table(tmp_path, {"val_bpb": 1.5, "steps": 5, "artifact_bytes": 7}, {"val": 5}) == 0
    assert capsys.readouterr().out.strip() == "bits per byte, before export  1.5000"


def test_table_says_over_budget(tmp_path, capsys):
    assert show_table(tmp_path, RESULT | {"total_bytes": 16_000_001}) == 0
    assert "over budget" in capsys.readouterr().out


def test_table_says_the_noise_of_a_demo_on_a_cpu_and_where_the_artifact_lies(tmp_path, capsys):
    logs = [run_logs.read_run(ROOT / f"logs/R032_demo512_seed{seed}.txt") for seed in (42, 7, 1337)]
    spread = [run.result["val_bpb"] for run in logs]
    assert f"{max(spread) - min(spread):.3f}" == f"{demo_table.SEEDS_APART:.3f}"
    (tmp_path / "result").write_text(f"result {json.dumps(RESULT | {'device': 'cpu', 'val_bytes': 400_000})}\n")
    assert demo_table.main([str(tmp_path / "result"), "--artifact", "data/x/m.ptz"]) == 0
    shown = capsys.readouterr()
    assert re.search(r"^noise of these +three seeds lay 0\.015 apart \(RESULTS\.md R032\) on 615,808 bytes .*400,000$", shown.out, re.M)
    assert re.search(r"^artifact's file +data/x/m\.ptz$", shown.out, re.M) and shown.err == ""


@pytest.mark.parametrize("bytes_, warned", [(31_070, True), (99_999, True), (100_000, False), (615_808, False)])
def test_table_warns_of_little_held_out_text(tmp_path, capsys, bytes_, warned):
    assert show_table(tmp_path, RESULT | {"val_bytes": bytes_}) == 0
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == warned and all(f"{bytes_:,} bytes of held-out text" in line for line in lines)


@pytest.mark.parametrize("text", ["", "step:1/2 loss:3.0\n", 'result {"cut'])
def test_table_without_a_result_is_an_error_in_one_line(tmp_path, capsys, text):
    assert show_table(tmp_path, text) == 2
    assert capsys.readouterr().err.count("\n") == 1


# -------------------------------------------------------------------------------------------------- presets


def bash(command, cwd=None, **env):
    """Run a bash command with nothing but these variables; returns the finished process with its text."""
    return subprocess.run(
        ["bash", "-c", command], cwd=cwd, env=CLEAN_ENV | env, capture_output=True, text=True, timeout=60, check=False
    )  # fmt: skip


def after_common(command, **env):
    """A bash command that runs as a script would that has sourced tools/common.sh, in an environment such as a user may have."""
    return bash(f"bash -pc 'set -euo pipefail; source \"{ROOT}/tools/common.sh\"; {command}'", **env)


def load_preset(path, keys, **env):
    """The values that the keys have in a child process after load_preset."""
    show = "; ".join(f'printf "%s\\n" "${{{key}-unset}}"' for key in keys)
    done = bash(f"set -eu; source '{ROOT}/tools/common.sh'; load_preset '{path}'; bash -c '{show}'", **env)
    return done, dict(zip(keys, done.stdout.splitlines(), strict=False))


def test_environment_wins_over_preset(tmp_path):
    (tmp_path / "a.env").write_text("# why\n\n  # indented\nFIRST=1\nSECOND=./a=b/c*\nTHIRD=3\nEMPTY=\nLAST=9")
    _, values = load_preset(tmp_path / "a.env", ("FIRST", "SECOND", "THIRD", "EMPTY", "LAST"), FIRST="mine", THIRD="")
    assert values == {"FIRST": "mine", "SECOND": "./a=b/c*", "THIRD": "", "EMPTY": "", "LAST": "9"}


def test_a_preset_may_have_the_line_ends_of_windows(tmp_path):
    (tmp_path / "a.env").write_bytes(b"# why\r\n\r\nFIRST=1\r\nLAST=2")
    _, values = load_preset(tmp_path / "a.env", ("FIRST", "LAST"))
    assert values == {"FIRST": "1", "LAST": "2"}


def test_a_preset_says_which_settings_are_its_own(tmp_path):
    """What the environment held is the user's, an empty value too; what an earlier script left in the variable does not count."""
    (tmp_path / "a.env").write_text("FIRST=1\nSECOND=2\nTHIRD=3\nFOURTH=4\n")
    _, values = load_preset(tmp_path / "a.env", ("PRESET_SETTINGS",), SECOND="2", THIRD="", PRESET_SETTINGS="SECOND")
    assert values == {"PRESET_SETTINGS": "FIRST FOURTH"}


@pytest.mark.parametrize("line", ["export A=1", "A = 1", "A", "lower=1", "A=1 # why", "A=$(touch made)"])
def test_preset_with_anything_else_is_refused(tmp_path, line):
    (tmp_path / "a.env").write_text(f"B=1\n{line}\n")
    done, _ = load_preset(tmp_path / "a.env", ("B",))
    assert done.returncode == 2 and line in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.name)
def test_preset_is_valid(path):
    """Only KEY=VALUE and comment lines, each key once and a setting of the trainer, and the whole is accepted by it."""
    import train_gpt

    lines = [line for line in path.read_text().splitlines() if line.strip() and not line.startswith("#")]
    pairs = [line.split("=", 1) for line in lines]
    assert all(re.fullmatch(r"[A-Z][A-Z0-9_]*=[A-Za-z0-9_.,:/+-]*", line) for line in lines)  # the same when sourced
    assert len(dict(pairs)) == len(pairs) > 0
    assert {key.lower() for key, _ in pairs} <= train_gpt.Config.__dataclass_fields__.keys()
    train_gpt.Config.from_env(dict(pairs))


def test_the_demo_has_a_preset_for_each_kind_of_machine():
    assert {"demo.env", "demo_gpu.env"} <= {path.name for path in PRESETS}


def test_the_trainer_accepts_the_scripts_own_variables():
    """None of them is near enough to a setting to be taken for a misspelt one."""
    import train_gpt

    train_gpt.Config.from_env(dict.fromkeys(SCRIPT_VARIABLES, "1"))


# -------------------------------------------------------------------------------------------------- scripts


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_script_parses(path):
    done = subprocess.run(["bash", "-n", path], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_scripts_that_are_run_are_executable():
    assert all(os.access(path, os.X_OK) for path in SCRIPTS if path.parent.name != "tools")


@pytest.fixture
def tree(tmp_path):
    """A copy of what the scripts use, with an empty data set; logs and artifacts of the stub go there. People have such paths."""
    tree = tmp_path / "our \u00fcbung"
    ignore = shutil.ignore_patterns("__pycache__")
    for name in ("tools", "configs"):
        shutil.copytree(ROOT / name, tree / name, ignore=ignore)
    for path in [*ROOT.glob("*.sh"), *ROOT.glob("requirements*.txt"), ROOT / "train_gpt.py"]:
        shutil.copy2(path, tree)
    (tree / "own").mkdir()
    for name in ("fineweb_train_000000.bin", "fineweb_val_000000.bin", "tokenizer.model"):
        (tree / "own" / name).touch()
    return tree


def stub_python(tree, trainer):
    """An interpreter that runs `trainer` (bash) in place of train_gpt.py, alone or under torchrun; else the real one."""
    path = tree / "python"
    trains = '"${*: -1}" == train_gpt.py || "$1 $2" == "-m torch.distributed.run"'
    path.write_text(f'#!/usr/bin/env bash\nif [[ {trains} ]]; then\n{trainer}\nelse exec "{python()}" "$@"; fi\n')
    path.chmod(0o755)
    return str(path)


def run_demo(tree, trainer, **env):
    """run_demo.sh, started from another folder."""
    return bash(f"bash '{tree.name}/run_demo.sh'", cwd=tree.parent, TRAIN_PYTHON=stub_python(tree, trainer), **env)


OWN_DATA = {"DATA_PATH": "own", "TOKENIZER_PATH": "own/tokenizer.model"}
RESULT_LINE = f"result {json.dumps(RESULT)}"


def test_demo_ends_with_the_table_and_the_result_line(tree):
    (tree / "own" / "manifest.json").write_text('{"gzip_bpb": 2.2, "xz_bpb": 1.9}')
    done = run_demo(tree, f"echo step:1/2; echo 'result {{of a source line}}'; echo end; echo '{RESULT_LINE}'", **OWN_DATA)
    lines = done.stdout.splitlines()
    assert done.returncode == 0
    assert lines[:3] == ["step:1/2", "result {of a source line}", "end"]
    assert lines[-1] == RESULT_LINE and lines.count(RESULT_LINE) == 1
    assert [line.split("  ")[0] for line in lines[3:-1] if line][-5:] == [
        "bits per byte, gzip -9, same text", "bits per byte, xz -9, same text", "artifact", "artifact's file", "training",
    ]  # fmt: skip
    assert re.search(r"^artifact's file +own/own\.ternary\.ptz$", done.stdout, re.M)


DRAWN_LOG = "step:1/2 loss:8.0 t:5ms\nstep:2/2 val_loss:4.0 val_bpb:2.5 train_time:9ms zero_frac:0.3\n"


@pytest.mark.parametrize(("env", "log", "drawn"), [({}, DRAWN_LOG, True), ({"EVAL_ONLY": "1"}, DRAWN_LOG, False), ({}, "no log\n", False)])
def test_the_demo_draws_its_run_beside_its_log(tree, env, log, drawn):
    """Where it has trained; a picture that fails is no failure of the demo."""
    pytest.importorskip("matplotlib")
    (tree / "the log").mkdir()
    (tree / "the log/r.1.txt").write_text(log)
    line = f"result {json.dumps(RESULT | {'log_path': 'the log/r.1.txt'})}"
    done = run_demo(tree, f"echo '{line}'", **OWN_DATA, **env)
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == line
    assert ("picture the log/r.1.png" in done.stderr) == drawn == (tree / "the log/r.1.png").exists()


def test_demo_passes_preset_and_settings_to_the_trainer(tree):
    show = "; ".join(f'echo "{key} ${key}"' for key in ("VOCAB_SIZE", "NUM_LAYERS", "RUN_ID", "DATA_PATH", "ARTIFACT_PATH"))
    done = run_demo(tree, f"{show}; echo '{RESULT_LINE}'", VOCAB_SIZE="999", **OWN_DATA)
    preset = dict(line.split("=") for line in (tree / "configs/demo.env").read_text().splitlines() if line[:1] not in "#")
    assert dict(line.split() for line in done.stdout.splitlines()[:5]) == {
        "VOCAB_SIZE": "999",
        "NUM_LAYERS": preset["NUM_LAYERS"],
        "RUN_ID": "own",
        "DATA_PATH": "own",
        "ARTIFACT_PATH": "own/own.ternary.ptz",
    }


@pytest.mark.parametrize("env, run_id, artifact", [
    ({"RUN_ID": "second"}, "second", "own/second.ternary.ptz"),
    ({"DATA_PATH": "own/"}, "own", "own//own.ternary.ptz"),
    ({"DATA_PATH": "öl", "TOKENIZER_PATH": "own/tokenizer.model"}, "own", "öl/own.ternary.ptz"),  # no name for a run
    ({"DATA_PATH": "nowhere", "TOKENIZER_PATH": "own/tokenizer.model"}, "nowhere", "logs/nowhere.ternary.ptz"),
    ({"ARTIFACT_PATH": "mine.ptz"}, "own", "mine.ptz"),
])  # fmt: skip
def test_runs_on_other_data_have_names_of_their_own(tree, env, run_id, artifact):
    (tree / "öl").mkdir()
    done = run_demo(tree, f"echo $RUN_ID; echo $ARTIFACT_PATH; echo '{RESULT_LINE}'", **(OWN_DATA | env))
    assert done.stdout.splitlines()[:2] == [run_id, artifact]


def test_demo_says_what_the_preset_set_and_not_the_user(tree):
    done = run_demo(tree, f"echo $PRESET_SETTINGS; echo '{RESULT_LINE}'", VOCAB_SIZE="999", **OWN_DATA)
    names = done.stdout.splitlines()[0].split()
    assert "NUM_LAYERS" in names and not {"VOCAB_SIZE", "DATA_PATH", "RUN_ID", "ARTIFACT_PATH"} & set(names)


def test_demo_finds_the_tokenizer_beside_own_data(tree):
    done = run_demo(tree, f"echo $TOKENIZER_PATH; echo '{RESULT_LINE}'", DATA_PATH="own")
    assert done.stdout.splitlines()[0] == "own/tokenizer.model"


@pytest.mark.parametrize("env", [{"TOKENIZER_PATH": "own/tokenizer.model"}, {"DATA_PATH": "configs"}])
def test_demo_refuses_half_of_own_data(tree, env):
    done = run_demo(tree, "echo trained", **env)
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1


@pytest.mark.parametrize("trainer, code", [("echo step:1/2; exit 7", 7), (f"echo '{RESULT_LINE}'; exit 3", 3), ("kill -9 $$", 137)])
def test_demo_ends_with_the_code_of_a_failing_trainer_and_no_table(tree, trainer, code):
    done = run_demo(tree, trainer, **OWN_DATA)
    assert done.returncode == code
    assert "bits per byte" not in done.stdout and "result" not in done.stdout


def test_demo_without_a_result_line_fails(tree):
    done = run_demo(tree, "echo step:1/2", **OWN_DATA)
    assert done.returncode != 0 and "without a result line" in done.stderr and "bits per byte" not in done.stdout


# Stands in for torchrun: writes the made-up log of its RUN_ID and SEED; one seed fails where FAIL_SEED says so.
WRITE_LOG = """mkdir -p logs; echo "$*" >> torchrun; [[ $SEED != "${FAIL_SEED:-}" ]] || exit 5
{ echo 'config {"run_id": "'$RUN_ID'", "seed": '$SEED', "artifact_path": "'$ARTIFACT_PATH'", CONFIG_REST'
  echo 'result {"seed": '$SEED', RESULT_REST'; } > logs/$RUN_ID.txt"""


def rehearse(tree, *arguments, **env):
    """run_8xh100.sh on 2 made-up CPU processes."""
    rest = {key: value for key, value in CONFIG.items() if key not in ("run_id", "seed", "artifact_path")}
    result = {key: value for key, value in RESULT.items() if key != "seed"}
    trainer = WRITE_LOG.replace("CONFIG_REST", json.dumps(rest)[1:]).replace("RESULT_REST", json.dumps(result)[1:])
    command = f"'{tree}/run_8xh100.sh' --author A --github-id a {' '.join(arguments)}"
    return bash(command, cwd=tree.parent, TRAIN_PYTHON=stub_python(tree, trainer), NPROC="2", ALLOW_CPU="1", **(OWN_DATA | env))


def test_record_run_does_three_seeds_and_writes_the_submission(tree):
    done = rehearse(tree, RUN_ID="try")
    assert done.returncode == 0, done.stderr
    made = json.loads((tree / "logs" / "try.submission.json").read_text())
    assert [entry["log"] for entry in made["seed_results"].values()] == [f"try_seed{seed}.txt" for seed in (7, 42, 1337)]
    configs = [json.loads(path.read_text().splitlines()[0][7:]) for path in (tree / "logs").glob("try_seed*.txt")]
    assert len({config["artifact_path"] for config in configs}) == 3
    launches = (tree / "torchrun").read_text().splitlines()
    assert launches == ["-m torch.distributed.run --standalone --nproc_per_node=2 logs/try_train_gpt.py"] * 3
    assert (tree / "logs/try_train_gpt.py").read_bytes() == pack_code.pack((ROOT / "train_gpt.py").read_text())
    assert re.search(r"^FAIL +log lines", done.stdout, re.M) and "not a record yet" in done.stderr
    assert not (tree / "submission.json").exists()  # a rehearsal leaves the real one alone


def test_record_run_stops_at_the_first_failing_seed(tree):
    done = rehearse(tree, FAIL_SEED="1337")
    assert done.returncode == 5 and "seed 1337 failed" in done.stderr
    assert len((tree / "torchrun").read_text().splitlines()) == 2
    assert not list((tree / "logs").glob("*.json"))


@pytest.mark.parametrize("env, message", [
    ({"NPROC": "4096", "ALLOW_CPU": "0"}, "NPROC=4096, but torch sees"),
    ({"DATA_PATH": "configs", "SEED": "42"}, "DATA_PATH=configs: no fineweb_train_*.bin"),
])  # fmt: skip
def test_record_run_names_what_is_missing(tree, env, message):
    done = bash(f"'{tree}/run_8xh100.sh'", TRAIN_PYTHON=stub_python(tree, "echo ran"), **({"ALLOW_CPU": "1"} | OWN_DATA | env))
    assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1 and done.stdout == ""


# -------------------------------------------------------------------------------------------------- own text


TEXTS = ["The cat sat on the mat and the dog lay by the log, as every dog does. " * 3 + f"Number {i} of them.\n" for i in range(300)]
SHOW_DATA = f"for name in DATA_PATH TOKENIZER_PATH VOCAB_SIZE RUN_ID ARTIFACT_PATH; do echo ${{!name}}; done; echo '{RESULT_LINE}'"


@pytest.fixture
def folder_with_text(tmp_path):
    folder = tmp_path / "my text"
    folder.mkdir()
    (folder / "böök.txt").write_text("<|endoftext|>".join(TEXTS), encoding="utf-8")
    return folder


def demo_on_text(tree, folder, arguments="böök.txt", **env):
    """run_demo.sh --text, started in the folder with the text."""
    return bash(f"'{tree}/run_demo.sh' --text {arguments}", cwd=folder, TRAIN_PYTHON=stub_python(tree, SHOW_DATA), **env)


def test_one_command_goes_from_a_text_to_a_score(tree, folder_with_text):
    done = demo_on_text(tree, folder_with_text, VOCAB_SIZE="400")
    assert done.returncode == 0, done.stderr
    data, tokenizer, pieces, run_id, artifact = done.stdout.splitlines()[:5]
    assert re.fullmatch(r"data/text_[0-9a-f]{12}_sp400", data) and pieces == "400"
    assert (tokenizer, artifact) == (f"{data}/tokenizer.model", f"{data}/{run_id}.ternary.ptz")
    manifest = json.loads((tree / data / "manifest.json").read_text())
    assert manifest["train"]["bytes"] + manifest["val"]["bytes"] == sum(len(text.strip("\n")) for text in TEXTS)
    assert 15 <= manifest["val"]["documents"] <= 45  # a tenth of so little text
    assert done.stdout.splitlines()[-1] == RESULT_LINE

    made = (tree / data / "manifest.json").stat().st_mtime_ns
    shutil.copy(folder_with_text / "böök.txt", folder_with_text / "copy.txt")
    again = demo_on_text(tree, folder_with_text, "copy.txt", VOCAB_SIZE="400")
    assert again.stdout == done.stdout and (tree / data / "manifest.json").stat().st_mtime_ns == made
    assert "making" in done.stderr and "making" not in again.stderr

    (folder_with_text / "copy.txt").write_text("<|endoftext|>".join(TEXTS[1:]))
    assert demo_on_text(tree, folder_with_text, "copy.txt", VOCAB_SIZE="400").stdout.splitlines()[0] not in (data, "")


def test_text_that_is_too_little_leaves_nothing_behind(tree, tmp_path):
    (tmp_path / "a.txt").write_text("one document\n")
    done = demo_on_text(tree, tmp_path, "a.txt")
    assert done.returncode == 2 and "--text: no shards of it" in done.stderr.splitlines()[-1] and done.stdout == ""
    assert not (tree / "data").exists()


@pytest.mark.parametrize("arguments, env, message", [
    ("", {}, "--text: a file or folder is missing"),
    ("nope.txt", {}, "--text nope.txt: no such file or folder"),
    ("böök.txt", {"DATA_PATH": "own"}, "expected no DATA_PATH and TOKENIZER_PATH beside it"),
    ("böök.txt", {"TOKENIZER_PATH": "own/tokenizer.model"}, "expected no DATA_PATH and TOKENIZER_PATH beside it"),
    ("../nothing", {}, "no text there"),
])  # fmt: skip
def test_demo_refuses_text_in_one_line(tree, folder_with_text, arguments, env, message):
    (folder_with_text.parent / "nothing").mkdir()
    done = demo_on_text(tree, folder_with_text, arguments, **env)
    assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1 and done.stdout == ""
    assert not (tree / "data").exists()


@pytest.mark.parametrize("size, alphabet, pieces", [
    (0, 0, 512), (31_070, 40, 512), (1_000_000, 90, 512), (1_100_000, 90, 1024), (7_676_424, 100, 4096), (10**9, 100, 4096),
    (31_070, 200, 1024), (10**6, 3000, 8192), (10**6, 10**6, 1 << 16),
])  # fmt: skip
def test_the_vocabulary_grows_with_the_text_and_holds_its_alphabet(size, alphabet, pieces):
    assert own_text.choose_pieces(size, alphabet, own_text.MOST_PIECES) == pieces


def test_what_is_held_out_of_a_text_lies_between_a_hundredth_and_a_tenth():
    assert [own_text.choose_val_fraction(size) for size in (0, 10**6, 10**7, 10**8)] == [0.1, 0.1, 0.05, 0.01]


def test_the_alphabet_leaves_out_what_is_rare(tmp_path):
    (tmp_path / "a.txt").write_text("ab" * 5000 + "xyz", encoding="utf-8")  # x, y, z: 3 of 10,003, less than one in 2,000
    (tmp_path / "b.jsonl").write_text('{"text": "日本"}\n' * 5000, encoding="utf-8")
    assert own_text.alphabet_size([tmp_path / "a.txt"]) == 2
    assert own_text.alphabet_size([tmp_path / "a.txt", tmp_path / "b.jsonl"]) == 4


def test_a_text_is_known_by_what_its_files_hold(tmp_path):
    for name, text in (("a.txt", "one"), ("b.txt", "two"), ("c.txt", "one"), ("d.jsonl", "one")):
        (tmp_path / name).write_text(text)
    a, b, c, d = (tmp_path / name for name in ("a.txt", "b.txt", "c.txt", "d.jsonl"))
    assert own_text.content_name([a, b]) == own_text.content_name([b, c])
    assert len({own_text.content_name(files) for files in ([a], [b], [d], [a, b], [a, c])}) == 5


# -------------------------------------------------------------------------------------------------- other people's machines


@pytest.mark.parametrize("arguments, message", [
    ("--frob", "--frob: not an option"),
    ("--data", "--data: a value is missing"),
    ("--data x", "--data x: expected demo, fineweb or none"),
    ("--shards 2", "--shards 2: needs --data fineweb"),
    ("--data fineweb --shards", "--shards: a value is missing"),
    ("--no-data --python ./no-python", "no usable Python 3.10 to 3.13 (./no-python does not run)"),
    ("--no-data --python ./old-python", "(./old-python is 3.9)"),
])  # fmt: skip
def test_setup_refuses_in_one_line(tree, arguments, message):
    (tree / "old-python").write_text("#!/usr/bin/env bash\necho 3.9\nexit 1\n")
    (tree / "old-python").chmod(0o755)
    done = bash(f"'{tree}/setup.sh' {arguments}", cwd="/")
    assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1
    assert not (tree / ".venv").exists()


# What a user's shell exports; each broke run_demo.sh, or would change what it runs.
FUNCTION = "() {  echo mine; return 3\n}"
HOSTILE = {
    "noclobber": {"SHELLOPTS": "noclobber"},
    "nounset, posix": {"SHELLOPTS": "nounset:posix"},
    "noglob, xtrace": {"SHELLOPTS": "noglob:xtrace"},
    "failglob, nocasematch": {"BASHOPTS": "failglob:nocasematch"},
    "POSIXLY_CORRECT": {"POSIXLY_CORRECT": "1"},
    "BASH_ENV": {"BASH_ENV": "nasty.sh"},
    "CDPATH": {"CDPATH": "/:/tmp:PARENT"},
    "GLOBIGNORE": {"GLOBIGNORE": "*"},
    "IFS": {"IFS": "/a.="},
    "a value like a function": {"LETTER": "dear\nBASH_FUNC_cd%%=() { :; }"},
    "FUNCNEST": {"FUNCNEST": "1"},
    "TMPDIR": {"TMPDIR": "/nowhere/tmp"},
    "TMPDIR with a quote": {"TMPDIR": "it's"},
    "LC_ALL": {"LC_ALL": "C"},
    "an unknown LC_ALL": {"LC_ALL": "xx_XX.UTF-8"},
    "PYTHONSAFEPATH": {"PYTHONSAFEPATH": "1"},
    "PYTHONWARNINGS": {"PYTHONWARNINGS": "error"},
    "PYTHONOPTIMIZE": {"PYTHONOPTIMIZE": "2"},
    "PYTHONINSPECT": {"PYTHONINSPECT": "1"},
    "PYTHONIOENCODING": {"PYTHONIOENCODING": "utf-16"},
    "GIT_DIR": {"GIT_DIR": "/nowhere", "GIT_WORK_TREE": "/nowhere"},
} | {f"function {name}": {f"BASH_FUNC_{name}%%": FUNCTION} for name in (
    "cd", "dirname", "readlink", "source", "set", "exec", "python", "grep", "cat", "mktemp", "printf", "trap",
)}  # fmt: skip


@pytest.mark.parametrize("env", HOSTILE.values(), ids=HOSTILE.keys())
def test_demo_does_the_same_whatever_the_users_shell_exports(tree, env):
    (tree.parent / "it's").mkdir()
    (tree.parent / "nasty.sh").write_text("set -f; alias source=false; shopt -s expand_aliases; cd() { :; }\n")
    env = {name: value.replace("PARENT", str(tree.parent)) for name, value in env.items()}
    done = run_demo(tree, f"echo $NUM_LAYERS $DATA_PATH $RUN_ID; echo '{RESULT_LINE}'", RUN_ID="a", **OWN_DATA, **env)
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and lines[-1] == RESULT_LINE, done.stderr
    assert lines[0] == "2 own a" and sum(line.startswith("training  ") for line in lines) == 1
    assert [line for line in done.stderr.splitlines() if not re.search(r"^\+|TMPDIR=|setlocale", line)] == [
        "run_demo.sh: preset configs/demo.env, data own, log logs/a.txt"
    ]


def test_a_silent_trainer_is_waited_for_whatever_TMOUT_says(tree):
    done = run_demo(tree, f"sleep 1.3; echo '{RESULT_LINE}'", TMOUT="1", **OWN_DATA)
    assert done.returncode == 0 and done.stdout.endswith(f"{RESULT_LINE}\n"), done.stderr


@pytest.mark.parametrize("kept, gone", [
    ("PIP_INDEX_URL PIP_EXTRA_INDEX_URL PIP_FIND_LINKS PIP_PROXY PIP_CERT PIP_CONFIG_FILE PIP_CACHE_DIR",
     "PIP_USER PIP_TARGET PIP_PREFIX PIP_ROOT PIP_CONSTRAINT PIP_REQUIRE_VIRTUALENV PIP_NO_DEPS PIP_REQUIRE_HASHES PIP_DRY_RUN"),
    ("PYTHONDONTWRITEBYTECODE PYTHONUNBUFFERED PYTHONHASHSEED PYTHON",
     "PYTHONPATH PYTHONHOME PYTHONSAFEPATH PYTHONSTARTUP PYTHONOPTIMIZE PYTHONWARNINGS PYTHONINSPECT PYTHONUTF8"),
    ("HTTPS_PROXY ALL_PROXY NO_PROXY HF_ENDPOINT SSL_CERT_FILE CUDA_VISIBLE_DEVICES OMP_NUM_THREADS LD_LIBRARY_PATH VIRTUAL_ENV",
     "PYTEST_ADDOPTS PYTEST_PLUGINS PYTEST_DISABLE_PLUGIN_AUTOLOAD RUFF_OUTPUT_FILE RUFF_CONFIG"),
    ("GIT_SSL_CAINFO GIT_CONFIG_COUNT NUM_LAYERS", "GIT_DIR GIT_WORK_TREE GIT_INDEX_FILE BASH_ENV ENV CDPATH GREP_OPTIONS TMOUT"),
])  # fmt: skip
def test_what_says_where_and_how_much_is_kept_and_what_says_otherwise_is_not(kept, gone):
    done = after_common("env", **dict.fromkeys((kept + " " + gone).split(), "0"))
    names = {line.split("=")[0] for line in done.stdout.splitlines()}
    assert set(kept.split()) <= names and not set(gone.split()) & names


def test_an_interpreter_of_the_users_own_keeps_its_modules():
    own = {"PYTHONPATH": "a", "PYTHONUSERBASE": "b", "PYTHONNOUSERSITE": "1"}
    done = after_common("env", TRAIN_PYTHON="python3", PYTHONSAFEPATH="1", **own)
    assert {f"{name}={value}" for name, value in own.items()} <= set(done.stdout.splitlines()) and "SAFEPATH" not in done.stdout


def test_a_temporary_folder_that_is_gone_is_said_and_another_used(tmp_path):
    done = after_common('echo "${TMPDIR-unset}"', TMPDIR=str(tmp_path / "gone"))
    assert done.stdout == "unset\n" and f"TMPDIR={tmp_path}/gone: not a folder" in done.stderr
    done = after_common('echo "${TMPDIR-unset}"', TMPDIR=str(tmp_path))
    assert (done.stdout, done.stderr) == (f"{tmp_path}\n", "")


@pytest.mark.parametrize("shell", ["bash", "sh", "bash --posix"])
def test_demo_starts_through_a_link_from_anywhere(tree, tmp_path, shell):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "demo").symlink_to(tree / "run_demo.sh")
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    env = {"TRAIN_PYTHON": stub_python(tree, f"pwd; echo '{RESULT_LINE}'")} | OWN_DATA
    done = bash(f"{shell} ../link/demo", cwd=tmp_path / "elsewhere", **env)
    assert done.returncode == 0 and done.stdout.splitlines()[0] == str(tree), done.stderr


@pytest.mark.skipif(not shutil.which("git"), reason="needs git")
def test_a_checkout_with_autocrlf_has_no_carriage_returns(tmp_path):
    for path in [*SCRIPTS, *PRESETS, *ROOT.glob("*.*"), *ROOT.glob("tools/*.py"), ROOT / ".gitattributes"]:
        if path.is_file():
            target = tmp_path / "one" / path.relative_to(ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)
    git = "git -c user.name=A -c user.email=a@b.c"
    done = bash(f"cd one && git init -q && git add -A && {git} commit -qm 1 && git clone -q -c core.autocrlf=true . ../two", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    cloned = [path for path in (tmp_path / "two").rglob("*") if path.is_file() and ".git" not in path.relative_to(tmp_path / "two").parts]
    assert len(cloned) > 40 and not [path for path in cloned if path.suffix != ".png" and b"\r" in path.read_bytes()]


def test_demo_and_its_data_go_where_WORK_DIR_says(tree, folder_with_text, tmp_path):
    before = sorted(tree.rglob("*"))
    work = tmp_path / "somewhere else"
    show = "echo $LOG_DIR; echo $TRITON_CACHE_DIR; " + SHOW_DATA
    done = bash(f"'{tree}/run_demo.sh' --text böök.txt", cwd=folder_with_text, TRAIN_PYTHON=stub_python(tree, show),
                WORK_DIR=str(work), PYTHONDONTWRITEBYTECODE="1")  # fmt: skip
    assert done.returncode == 0, done.stderr
    logs, compiled, data, *_, artifact = done.stdout.splitlines()[:7]
    assert logs == f"{work}/logs" and compiled == f"{work}/data/compile_cache/triton"
    assert data.startswith(f"{work}/data/text_") and artifact.startswith(f"{data}/") and Path(data, "manifest.json").is_file()
    assert sorted(set(tree.rglob("*")) - {tree / "python"}) == before


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0 and not shutil.which("setpriv"), reason="root without setpriv")
def test_a_checkout_that_cannot_be_written_is_said_with_what_helps(tree):
    """root writes anywhere: it becomes another user for this."""
    (tree / "any-python").write_text("#!/usr/bin/env bash\n")  # this one may lie where another user cannot go
    (tree / "any-python").chmod(0o755)
    for folder in (tree, tree / "own"):
        folder.chmod(0o555)
    for parent in tree.parents:
        if parent.stat().st_mode & 0o1000 or parent.stat().st_uid != os.geteuid():
            break  # the folder for temporary files
        parent.chmod(parent.stat().st_mode | 0o055)
    user = "setpriv --reuid=65534 --regid=65534 --clear-groups" if os.geteuid() == 0 else ""
    done = bash(f"{user} bash '{tree}/run_demo.sh'", TRAIN_PYTHON="./any-python", **OWN_DATA)
    tree.chmod(0o755)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "logs: cannot be written; WORK_DIR=FOLDER" in done.stderr


OLD_PYTHON = "#!/usr/bin/env bash\nexit 1\n"
BARE_PYTHON = f"#!/usr/bin/env bash\nexec '{sys.executable}' -S \"$@\"\n"  # -S: no site-packages


@pytest.mark.parametrize("python, message", [
    (None, "TRAIN_PYTHON=./own-python: no such program"),
    (OLD_PYTHON, "TRAIN_PYTHON=./own-python: does not run as Python 3.10 or later"),
    (BARE_PYTHON, "TRAIN_PYTHON=./own-python has no torch, numpy, sentencepiece"),
])  # fmt: skip
def test_demo_names_an_interpreter_that_cannot_train(tree, python, message):
    if python:
        (tree / "own-python").write_text(python)
        (tree / "own-python").chmod(0o755)
    done = bash(f"'{tree}/run_demo.sh'", TRAIN_PYTHON="./own-python", **OWN_DATA)
    assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1 and done.stdout == ""


# An environment that is there: this one, but for pip, which writes down what it is asked and does nothing.
VENV_STUB = f"""#!/usr/bin/env bash
if [[ "$1 $2" == "-m pip" ]]; then echo "$* user=${{PIP_USER-}}" >>pip.log; else exec '{sys.executable}' "$@"; fi
"""


@pytest.fixture
def tree_with_venv(tree):
    (tree / ".venv" / "bin").mkdir(parents=True)
    (tree / ".venv" / "bin" / "python").write_text(VENV_STUB)
    (tree / ".venv" / "bin" / "python").chmod(0o755)
    return tree


def test_setup_leaves_packages_of_others_alone(tree_with_venv, tmp_path):
    """PYTHONPATH shows a package with lost files, which is not this environment's to remove; PIP_USER would install elsewhere."""
    info = tmp_path / "others" / "foreign-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: foreign\nVersion: 1.0\n")
    (info / "RECORD").write_text("lost.py,,\n")
    done = bash(f"'{tree_with_venv}/setup.sh' --no-data --quiet", PYTHONPATH=str(info.parent), PIP_USER="1")
    asked = (tree_with_venv / "pip.log").read_text()
    assert done.returncode == 0 and "foreign" not in done.stderr + asked and "user=1" not in asked, done.stderr
    assert "install --quiet --no-user --requirement=requirements.txt" in asked  # whatever a pip.conf says


@pytest.mark.parametrize("brings", [True, False])
def test_setup_asks_for_no_second_triton(tree_with_venv, brings):
    """A CUDA build of torch, on a machine without a GPU, pins another Triton than the tests' and pip refuses both."""
    stub = tree_with_venv / ".venv/bin/python"
    stub.write_text(VENV_STUB.replace("\n", f"""\nif [[ "$*" == *'requires("torch")'* ]]; then exit {int(not brings)}; fi\n""", 1))
    (tree_with_venv / "nvidia-smi").write_text("#!/bin/sh\n")
    (tree_with_venv / "nvidia-smi").chmod(0o755)  # no GPU
    done = bash(f"'{tree_with_venv}/setup.sh' --no-data --quiet --tests", PATH=f"{tree_with_venv}:{os.environ['PATH']}")
    asked = (tree_with_venv / "pip.log").read_text()
    assert done.returncode == 0, done.stderr
    assert "--requirement=requirements-test.txt" in asked and ("--requirement=requirements-test-cpu.txt" in asked) is not brings


def test_setup_says_so_when_pip_installs_elsewhere(tree_with_venv):
    """As with `target = ...` in a pip.conf."""
    (tree_with_venv / "requirements.txt").write_text("nosuch==1.0\n")
    done = bash(f"'{tree_with_venv}/setup.sh' --no-data --quiet")
    assert done.returncode == 2 and "pip put nosuch==1.0 elsewhere than in" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("code, said", [(71, "has no locks"), (1, "waiting for another setup.sh"), (0, "")])
def test_setup_waits_only_for_a_lock_that_can_be_had(tree_with_venv, tmp_path, code, said):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "flock").write_text(f'#!/usr/bin/env bash\n[[ $1 != --nonblock && {code} == 1 ]] || exit {code}\n')
    (tmp_path / "bin" / "flock").chmod(0o755)
    done = bash(f"'{tree_with_venv}/setup.sh' --no-data --quiet", PATH=f"{tmp_path}/bin:{os.environ['PATH']}")
    assert done.returncode == 0 and said in done.stderr and done.stderr.count("\n") == bool(said), done.stderr


def test_tests_take_no_orders_of_another_projects_tests(tree_with_venv):
    """run_tests.sh up to pytest, with ruff, which is not asked here."""
    stub = tree_with_venv / ".venv" / "bin" / "python"
    stub.write_text(VENV_STUB.replace("if [[", 'if [[ $2 == ruff ]]; then exit; elif [[ $2 == pytest ]]; then echo "$*"; env; elif [[', 1))
    done = bash(f"'{tree_with_venv}/run_tests.sh' -k some", PYTEST_ADDOPTS="-x", PYTEST_DISABLE_PLUGIN_AUTOLOAD="1", GIT_DIR="/nowhere")
    assert done.returncode == 0 and "-m pytest --numprocesses 2 --dist worksteal -m not campaign -k some" in done.stdout.splitlines(), done.stderr
    assert "PYTEST_" not in done.stdout and "GIT_DIR" not in done.stdout


# -------------------------------------------------------------------------------------------------- command lines


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of the code alone, to see that nothing is made in it."""
    folder = tmp_path_factory.mktemp("checkout") / "code"
    for path in COMMANDS:
        target = folder / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, target)
    return folder


COMMANDS = [path for part in ("*.sh", "*.py", "tools/*.sh", "tools/*.py", "bench/*.sh", "bench/*.py", ".ci/run") for path in sorted(ROOT.glob(part))]
MODULES = {"common.sh", "kernel_groups.py"} | {f"{name}.py" for name in (
    "command_line hub_fetch hub_push check_data demo_corpus encode_text model_files shard_io text_files run_logs arm_results report_model report_page").split()}  # fmt: skip
PASS_ON = {"run_tests.sh", "run"}  # their arguments are pytest's


def commands(left_out=frozenset()):
    return [pytest.param(path.relative_to(ROOT), id=path.name) for path in COMMANDS if path.name not in left_out]


def start(checkout, command, argument):
    """Start a file of the checkout with one argument; nothing may be made, nor installed."""
    env = {"PYTHONDONTWRITEBYTECODE": "1", "PIP_NO_INDEX": "1"}
    before = sorted(checkout.rglob("*"))
    done = launch(env, checkout, argv=[str(command), argument]) if command.suffix == ".py" else bash(f"bash {command} {argument}", checkout, **env)
    assert sorted(checkout.rglob("*")) == before
    return done


@pytest.mark.parametrize("command", commands())
def test_every_file_answers_h(checkout, command):
    """Commands with their usage; modules by saying what they are modules of."""
    done = start(checkout, command, "-h")
    if command.name == "common.sh":
        assert done.returncode == 2 and "not a command" in done.stderr
    else:
        assert done.returncode == 0 and done.stderr == ""
        assert re.search(r"is a module of" if command.name in MODULES else rf"{command.name}|run_tests.sh|NAME=value", done.stdout)


@pytest.mark.parametrize("command", commands(PASS_ON))
def test_every_file_refuses_what_it_does_not_know_in_one_line(checkout, command):
    done = start(checkout, command, "--no-such-thing")
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1, done.stderr
    assert "not a command" in done.stderr if command.name in MODULES else command.name in done.stderr


@pytest.mark.parametrize("command, arguments, message", [
    ("bench/step.py", "--preset nope.env", "nope.env: No such file"),
    ("bench/step.py", "--against nope", "--against nope: expected a folder with train_gpt.py"),
    ("bench/gemm.py", "--preset nope.env", "nope.env: No such file"),
    ("bench/same.py", "nope tools", "nope: expected a folder with train_gpt.py"),
    ("bench/step_worker.py", "tools", "tools: expected a folder with train_gpt.py"),
    ("bench/corrupt.py", "--workers 0", "--workers 0: expected at least 1"),
    ("bench/parity.py", "", "DATA_PATH='nope': no fineweb_train_*.bin"),
    ("bench/loader.py", "", "DATA_PATH='nope': no fineweb_train_*.bin"),
    ("tools/check_setup.py", "missing nope.txt", "nope.txt: No such file"),
    ("tools/own_text.py", "nope.txt", "--text nope.txt: no such file"),
])  # fmt: skip
def test_a_mistake_is_one_line(checkout, command, arguments, message):
    done = launch({"PYTHONDONTWRITEBYTECODE": "1", "DATA_PATH": "nope"}, checkout, argv=[command, *arguments.split()])
    assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1


# -------------------------------------------------------------------------------------------------- check_setup


def test_pins_take_any_build_of_their_version(tmp_path, monkeypatch):
    (tmp_path / "requirements.txt").write_text("# why\ntorch==2.13.0\nnumpy==2.2.6  # why\n\n")
    assert check_setup.read_pins([tmp_path / "requirements.txt"]) == {"torch": "2.13.0", "numpy": "2.2.6"}
    installed = {"torch": "2.13.0+cpu", "numpy": "2.2.60"}
    monkeypatch.setattr(check_setup, "installed_version", installed.get)
    assert check_setup.missing_pins([tmp_path / "requirements.txt"]) == ["numpy==2.2.6"]


def test_every_package_is_found_by_the_name_it_is_imported_by():
    rows = check_setup.environment_rows([ROOT / f"requirements{name}.txt" for name in ("", "-test", "-data")])
    assert len(rows) > 15 and not [row for row in rows if row.state == check_setup.MISSING]


def test_lost_files_are_found(tmp_path):
    from importlib.metadata import PathDistribution

    info = tmp_path / "thing-1.0.dist-info"
    info.mkdir()
    (info / "RECORD").write_text("thing.py,sha256=x,1\nthing.txt,,\nthing-1.0.dist-info/RECORD,,\n")
    assert check_setup.lost_files(PathDistribution(info))
    (tmp_path / "thing.py").touch()
    assert not check_setup.lost_files(PathDistribution(info))


def test_table_of_files_says_what_is_missing(tmp_path, capsys, monkeypatch):
    (tmp_path / "manifest.json").write_text('{"files": {"val.txt": "x"}}')
    monkeypatch.setattr(check_setup, "environment_rows", lambda _: [])
    assert check_setup.main(["table", "requirements.txt", "--data", str(tmp_path)]) == 1
    assert re.search(r"val\.txt +no such file +MISSING", capsys.readouterr().out)
    (tmp_path / "val.txt").write_text("1234")
    assert check_setup.main(["table", "requirements.txt", "--data", str(tmp_path)]) == 0
    assert re.search(r"val\.txt +4 bytes +OK", capsys.readouterr().out)
