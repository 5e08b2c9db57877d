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

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

import check_setup  # noqa: E402
import demo_table  # noqa: E402
import make_submission  # noqa: E402
import pack_code  # noqa: E402

SCRIPTS = sorted([*ROOT.glob("*.sh"), *ROOT.glob("tools/*.sh"), ROOT / ".ci" / "run"])
PRESETS = sorted(ROOT.glob("configs/*.env"))
# what the scripts themselves read; the trainer sees these names too
SCRIPT_VARIABLES = ("TRAIN_PYTHON", "ALLOW_CPU", "NPROC", "SUBMISSION_PATH", "TORCH_INDEX")

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


def test_table_says_over_budget(tmp_path, capsys):
    assert show_table(tmp_path, RESULT | {"total_bytes": 16_000_001}) == 0
    assert "over budget" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["", "step:1/2 loss:3.0\n", 'result {"cut'])
def test_table_without_a_result_is_an_error_in_one_line(tmp_path, capsys, text):
    assert show_table(tmp_path, text) == 2
    assert capsys.readouterr().err.count("\n") == 1


# -------------------------------------------------------------------------------------------------- presets


def bash(command, cwd=None, **env):
    """Run a bash command with nothing but these variables; returns the finished process with its text."""
    return subprocess.run(
        ["bash", "-c", command], cwd=cwd, env=CLEAN_ENV | env, capture_output=True, text=True, timeout=60, check=False
    )


def load_preset(path, keys, **env):
    """The values that the keys have in a child process after load_preset."""
    show = "; ".join(f'printf "%s\\n" "${{{key}-unset}}"' for key in keys)
    done = bash(f"set -eu; source '{ROOT}/tools/common.sh'; load_preset '{path}'; bash -c '{show}'", **env)
    return done, dict(zip(keys, done.stdout.splitlines(), strict=False))


def test_environment_wins_over_preset(tmp_path):
    (tmp_path / "a.env").write_text("# why\n\n  # indented\nFIRST=1\nSECOND=./a=b/c*\nTHIRD=3\nEMPTY=\nLAST=9")
    _, values = load_preset(tmp_path / "a.env", ("FIRST", "SECOND", "THIRD", "EMPTY", "LAST"), FIRST="mine", THIRD="")
    assert values == {"FIRST": "mine", "SECOND": "./a=b/c*", "THIRD": "", "EMPTY": "", "LAST": "9"}


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
    """A copy of what the scripts use, with an empty data set; logs and artifacts of the stub go there."""
    tree = tmp_path / "tree"
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
    path.write_text(f'#!/usr/bin/env bash\nif [[ {trains} ]]; then\n{trainer}\nelse exec "{sys.executable}" "$@"; fi\n')
    path.chmod(0o755)
    return str(path)


def run_demo(tree, trainer, **env):
    """run_demo.sh, started from another folder."""
    return bash(f"'{tree}/run_demo.sh'", cwd=tree.parent, TRAIN_PYTHON=stub_python(tree, trainer), **env)


OWN_DATA = {"DATA_PATH": "own", "TOKENIZER_PATH": "own/tokenizer.model"}
RESULT_LINE = f"result {json.dumps(RESULT)}"


def test_demo_ends_with_the_table_and_the_result_line(tree):
    (tree / "own" / "manifest.json").write_text('{"gzip_bpb": 2.2, "xz_bpb": 1.9}')
    done = run_demo(tree, f"echo step:1/2; echo 'result {{of a source line}}'; echo end; echo '{RESULT_LINE}'", **OWN_DATA)
    lines = done.stdout.splitlines()
    assert done.returncode == 0
    assert lines[:3] == ["step:1/2", "result {of a source line}", "end"]
    assert lines[-1] == RESULT_LINE and lines.count(RESULT_LINE) == 1
    assert [line.split("  ")[0] for line in lines[3:-1] if line][-4:] == [
        "bits per byte, gzip -9, same text", "bits per byte, xz -9, same text", "artifact", "training",
    ]  # fmt: skip


def test_demo_passes_preset_and_settings_to_the_trainer(tree):
    show = "; ".join(f'echo "{key} ${key}"' for key in ("VOCAB_SIZE", "NUM_LAYERS", "RUN_ID", "DATA_PATH", "ARTIFACT_PATH"))
    done = run_demo(tree, f"{show}; echo '{RESULT_LINE}'", VOCAB_SIZE="999", **OWN_DATA)
    preset = dict(line.split("=") for line in (tree / "configs/demo.env").read_text().splitlines() if line[:1] not in "#")
    assert dict(line.split() for line in done.stdout.splitlines()[:5]) == {
        "VOCAB_SIZE": "999",
        "NUM_LAYERS": preset["NUM_LAYERS"],
        "RUN_ID": "demo",
        "DATA_PATH": "own",
        "ARTIFACT_PATH": "data/demo_sp999/demo.ternary.ptz",
    }


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


@pytest.mark.parametrize("arguments, message", [
    ("--frob", "--frob: not an option"),
    ("--data", "--data: a value is missing"),
    ("--data x", "--data x: expected demo, fineweb or none"),
    ("--shards 2", "--shards 2: needs --data fineweb"),
    ("--no-data --python ./no-python", "no usable Python 3.10 to 3.13 (./no-python does not run)"),
    ("--no-data --python ./old-python", "(./old-python is 3.9)"),
])  # fmt: skip
def test_setup_refuses_in_one_line(tree, arguments, message):
    (tree / "old-python").write_text("#!/usr/bin/env bash\necho 3.9\nexit 1\n")
    (tree / "old-python").chmod(0o755)
    done = bash(f"'{tree}/setup.sh' {arguments}", cwd="/")
    assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1
    assert not (tree / ".venv").exists()


# -------------------------------------------------------------------------------------------------- check_setup


def test_pins_take_any_build_of_their_version(tmp_path, monkeypatch):
    (tmp_path / "requirements.txt").write_text("# why\ntorch==2.13.0\nnumpy==2.2.6  # why\n\n")
    assert check_setup.read_pins([tmp_path / "requirements.txt"]) == {"torch": "2.13.0", "numpy": "2.2.6"}
    installed = {"torch": "2.13.0+cpu", "numpy": "2.2.60"}
    monkeypatch.setattr(check_setup, "installed_version", installed.get)
    assert check_setup.missing_pins([tmp_path / "requirements.txt"]) == ["numpy==2.2.6"]


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
