"""The rules of the challenge, each broken once; the folder that is submitted; both on made-up logs and on a real run's."""

from __future__ import annotations

import ast
import hashlib
import io
import json
import math
import os
import re
import shutil
import statistics
import subprocess
import sys
from fractions import Fraction
from types import SimpleNamespace

import command_line
import compliance
import make_submission
import numpy as np
import pack_code
import pytest
import run_logs
from conftest import ROOT, TINY, launch, python, write_shard

SEEDS = (42, 1337, 7)
TARGETS = 999  # of the made-up validation split
CONFIG = {
    "data_path": "data", "tokenizer_path": "tokenizer.model", "eval_only": False, "iterations": 20_000, "warmup_steps": 5,
    "num_layers": 11, "model_dim": 768, "vocab_size": 8192, "bitnet_group_size": 128, "matrix_optimizer": "neomuon",
    "train_batch_tokens": 524_288, "sliding_eval": True, "val_max_tokens": 0, "max_wallclock_seconds": 599.0,
    "temp_scaling": False,
}  # fmt: skip
RESULT = {
    "steps": 6530, "train_time_s": 599.2514, "ms_per_step": 91.8, "device": "cuda", "world_size": 8,
    "gpu_name": "NVIDIA H100 80GB HBM3", "torch_version": "2.13.0", "params": 73_700_000, "ternary_params": 64_880_640,
    "val_loss": 3.05, "val_bpb": 1.18, "roundtrip_val_loss": 3.05, "roundtrip_val_bpb": 1.18, "sliding_val_bpb": 1.15,
    "stride": 16, "val_tokens": TARGETS, "val_bytes": 151_080_891, "eval_time_s": 429.5, "git_commit": "0" * 40,
    "tokenizer_sha256": hashlib.sha256(b"a tokenizer").hexdigest(),
}  # fmt: skip
LINES = """python:3.11 torch:2.13.0 numpy:2 device:cuda gpu:NVIDIA H100 80GB HBM3 threads:1
config {config}
params:73700000 L:11 d:768 h:8 kv:4 ws:{world_size} ga:1 s:{seed}
warmup:5/5
step:1/20000 loss:9.0120 t:92ms avg:91.8ms
stopping_early: wallclock_cap train_time:{train_ms:.0f}ms step:6530/20000
step:6530/20000 val_loss:{val_loss:.4f} val_bpb:{val_bpb:.4f} train_time:{train_ms:.0f}ms zero_frac:0.370
artifact:0.00MB ternary:1(1B) fp:1(1B) code:{code_bytes} codec:ans
budget:{total_bytes}/16000000 (0.03/16.00MB) FITS
final_ternary_roundtrip val_loss:{roundtrip_val_loss:.4f} val_bpb:{roundtrip_val_bpb:.4f} eval_time:9500ms
final_sliding val_loss:{sliding_val_loss:.4f} val_bpb:{sliding_val_bpb:.4f} (stride=16, T=1.00) eval_time:420000ms
result {result}
"""
RECORD = [3.1, 3.101, 3.0985]


@pytest.fixture(scope="module")
def code():
    """The packed train_gpt.py."""
    return pack_code.pack((ROOT / "train_gpt.py").read_text())


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder to work in, with a validation split and a tokenizer."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    write_shard(tmp_path / "data/fineweb_val_000000.bin", np.zeros(600))
    write_shard(tmp_path / "data/fineweb_val_000001.bin", np.zeros(TARGETS + 1 - 600))
    (tmp_path / "tokenizer.model").write_bytes(b"a tokenizer")
    return tmp_path


def write_run(folder, code, seed, config=None, edit=None, artifact=None, **result):
    """The log and the artifact of a made-up seed; `edit` changes the log's text last. Returns the log's path."""
    artifact = artifact or b"artifact of seed %d" % seed
    (folder / f"{seed}.ptz").write_bytes(artifact)
    config = CONFIG | {"run_id": f"r{seed}", "seed": seed, "artifact_path": f"{seed}.ptz"} | (config or {})
    sizes = {"code_bytes": len(code), "artifact_bytes": len(artifact), "total_bytes": len(code) + len(artifact)}
    hashes = {"code_sha256": hashlib.sha256(code).hexdigest(), "artifact_sha256": hashlib.sha256(artifact).hexdigest()}
    figures = RESULT | {"seed": seed, "sliding_val_loss": 2.98 + seed % 4 / 1000} | sizes | hashes | result
    text = LINES.format(**figures, config=json.dumps(config), result=json.dumps(figures), train_ms=1000 * figures["train_time_s"])
    path = folder / f"record_seed{seed}.txt"
    path.write_bytes(code + b"\n" + (edit(text) if edit else text).encode())
    return path


def write_runs(folder, code, **third):
    """Three seeds, of which the last one is changed."""
    return [write_run(folder, code, seed) for seed in SEEDS[:2]] + [write_run(folder, code, SEEDS[2], **third)]


def breaches(paths, files=None, record=RECORD, **options):
    return {f.rule for f in compliance.check_logs(paths, files or compliance.Files(), record, **options) if f.breach}


def test_a_good_record_keeps_every_rule_and_shows_its_lines(folder, code):
    paths = write_runs(folder, code)
    (folder / "code.py").write_bytes(code)
    files = compliance.Files(folder / "code.py", tuple(folder.glob("*.ptz")), folder / "data")
    findings = compliance.check_logs(paths, files, RECORD)
    assert not [f for f in findings if not f.ok]
    shown = {f.rule: f.evidence for f in findings}  # of the last seed
    assert "stopping_early: wallclock_cap train_time:599251ms" in shown["training time"]
    assert "eval_time:420000ms" in shown["evaluation time"]
    assert f"budget:{len(code) + 18}/16000000" in shown["bytes"]
    assert f"code (file) {len(code):,} + artifact (file) 18" in shown["bytes"]
    assert f"hold {TARGETS} targets" in shown["full validation"] and "8 x NVIDIA H100" in shown["8xH100"]
    assert len(findings) == 11 * 3 + 3 and len(shown) == 14  # eleven rules a seed, three of all seeds


def test_a_resumed_run_is_shown_with_every_lifes_time(folder, code):
    edit = replaced("step:1/", "resumed step:9 elapsed:9000ms restarts:1 lost_steps:3\nstep:1/")
    paths = write_runs(folder, code, restarts=1, lost_steps=3, edit=edit)
    findings = compliance.check_logs(paths, compliance.Files(), RECORD)
    (shown,) = [f for f in findings if f.rule == "training time" and "restarts" in f.evidence]
    assert shown.ok and shown.evidence.endswith("599,251.4 ms; restarts 1, lost_steps 3: the time of every life)")


def without(start):
    return lambda text: "".join(line for line in text.splitlines(keepends=True) if not line.startswith(start))


def replaced(old, new):
    return lambda text: text.replace(old, new)


ONE_SEED_BREACHES = {
    "training over 600,000 ms": ({"train_time_s": 600.001}, {"training time"}),
    "training over 600,000 ms after a restart": (
        {"train_time_s": 600.001, "restarts": 1, "edit": replaced("step:1/", "resumed step:9 elapsed:9000ms restarts:1 lost_steps:3\nstep:1/")}, {"training time"}),
    "a restart that no line shows": ({"restarts": 1, "lost_steps": 3}, {"training time"}),
    "a restart that the result leaves out": (
        {"edit": replaced("step:1/", "resumed step:9 elapsed:9000ms restarts:1 lost_steps:3\nstep:1/")}, {"training time"}),
    "another life's time over 600,000 ms": (
        {"restarts": 1, "edit": replaced("step:1/", "resumed step:9 elapsed:600100ms restarts:1 lost_steps:3\nstep:1/")}, {"training time"}),
    "training over 600,000 ms in a line": ({"edit": replaced("599251ms step", "601153ms step")}, {"training time"}),
    "evaluation over 600 s": ({"eval_time_s": 600.5}, {"evaluation time"}),
    "evaluation over 600 s in a line": ({"edit": replaced("420000ms", "599000ms")}, {"evaluation time"}),
    "too many bytes": ({"artifact": bytes(15_990_000)}, {"bytes"}),
    "bytes that do not add up": ({"artifact_bytes": 17}, {"bytes"}),
    "other settings": ({"config": {"matrix_lr": 0.1}}, {"three seeds"}),
    "the same artifact twice": ({"artifact": b"artifact of seed 42"}, {"three seeds"}),
    "validation limit": ({"config": {"val_max_tokens": TARGETS}}, {"full validation", "three seeds"}),
    "validation cut": ({"val_tokens": TARGETS - 1}, {"full validation"}),
    "other validation text": ({"val_bytes": 616_000}, {"FineWeb"}),
    "no validation size": ({"val_tokens": None, "val_bytes": None}, {"full validation", "FineWeb"}),
    "PCIe cards": ({"gpu_name": "NVIDIA H100 PCIe"}, {"8xH100"}),
    "4 cards": ({"world_size": 4}, {"8xH100"}),
    "source not in the log": ({"code_bytes": 9}, {"code", "no network", "no test-time training", "bytes"}),
    "no params line": ({"edit": without("params:")}, {"log lines", "figures"}),
    "no budget line": ({"edit": without("budget:")}, {"log lines", "figures", "bytes"}),
    "no sliding score": ({"edit": without("final_sliding")}, {"log lines", "figures"}),
    "lines after the result": ({"edit": lambda text: text + "more\n"}, {"log lines"}),
    "training after the artifact": (
        {"edit": replaced("final_sliding", "step:7/9 loss:1.0000 t:1ms avg:1.0ms\nfinal_sliding")},
        {"log lines", "no test-time training"},
    ),
    "result of another run": ({"edit": replaced("val_loss:2.9830", "val_loss:2.9820")}, {"figures"}),
    "another tokenizer": ({"tokenizer_sha256": "0" * 64}, {"one tokenizer"}),
    "a tokenizer that is not known": ({"tokenizer_sha256": None}, {"one tokenizer"}),
    "no step": ({"steps": 0}, {"log lines", "three seeds"}),
    "a negative time": ({"train_time_s": -1.0}, {"log lines", "three seeds"}),
    "a tokenizer's digest as a number": ({"tokenizer_sha256": 5}, {"log lines", "three seeds"}),
    "a count of 5,000 digits": ({"edit": replaced('"steps": 6530', '"steps": ' + "9" * 5000)}, {"log lines", "three seeds"}),
    "brackets without end": ({"edit": replaced('"steps": 6530', '"steps": ' + "[" * 100_000)}, {"log lines", "three seeds"}),
    "a setting in words": ({"config": {"vocab_size": "many"}}, {"log lines", "three seeds"}),
    "steps in words": ({"config": {"iterations": "many"}}, {"log lines", "three seeds"}),
    "unfinished": ({"edit": lambda text: text.split("result {")[0]}, {"log lines", "three seeds"}),
}


@pytest.mark.parametrize("case", ONE_SEED_BREACHES)
def test_a_broken_rule_is_found_and_no_other(folder, code, case):
    change, rules = ONE_SEED_BREACHES[case]
    assert breaches(write_runs(folder, code, **change)) == rules


def test_a_program_with_windows_line_ends_or_a_byte_order_mark_keeps_every_rule(folder):
    for code in (GOOD.replace("\n", "\r\n").encode(), b"\xef\xbb\xbf" + GOOD.encode()):
        paths = [write_run(folder, code, seed) for seed in SEEDS]
        (folder / "code.py").write_bytes(code)
        assert breaches(paths, compliance.Files(folder / "code.py")) == set()


def test_a_log_with_other_line_ends_than_its_program_says_so(folder):
    """As the program before today's wrote logs of a file with CRLF: with LF, and the digest of the CRLF."""
    windows = GOOD.replace("\n", "\r\n").encode()
    sizes = {"code_bytes": len(windows), "code_sha256": hashlib.sha256(windows).hexdigest()}
    run = compliance.read_run(write_run(folder, GOOD.encode(), 42, **sizes))
    finding = compliance.check_code(run, compliance.Files())
    assert not finding.ok and finding.evidence.endswith(", but for its line ends: the file has CRLF, the log LF")
    other = compliance.read_run(write_run(folder, GOOD.encode() + b"x = 1\n", 7, code_sha256="0" * 64))
    assert "line ends" not in compliance.check_code(other, compliance.Files()).evidence


@pytest.mark.parametrize("commit, shown", [
    ("unknown", "git did not track the file"), (None, "git did not track the file"), ("a" * 40, f"git_commit {'a' * 40}"),
    ("a" * 40 + "+", f"git_commit {'a' * 40}, changed since"),
])  # fmt: skip
def test_the_commit_is_shown_and_no_rule(folder, code, commit, shown):
    paths = write_runs(folder, code, git_commit=commit)
    assert breaches(paths) == set()
    finding = compliance.check_code(compliance.read_run(paths[2]), compliance.Files())
    assert finding.evidence.endswith(f"; {shown}")
    assert make_submission.main(["--author", "A", "--github-id", "a", *map(str, paths)]) == 0
    assert json.loads((folder / "submission.json").read_text())["seed_results"]["7"]["git_commit"] == commit


def test_the_tokenizer_is_shown_and_unknown_figures_are_passed_over(folder, code):
    paths = [write_run(folder, code, seed, decoded_bytes=5, log_path="x", new={"a": [1]}) for seed in SEEDS]
    findings = {f.rule: f for f in compliance.check_logs(paths, compliance.Files(), RECORD)}
    assert "val_bytes 151080891 decoded_bytes 5;" in findings["full validation"].evidence
    assert not any(f.breach for f in findings.values())
    assert findings["one tokenizer"].evidence == f"tokenizer_sha256 {RESULT['tokenizer_sha256']}"
    paths = [write_run(folder, code, seed, tokenizer_sha256=None) for seed in SEEDS]
    findings = {f.rule: f for f in compliance.check_logs(paths, compliance.Files(), RECORD)}
    assert not findings["one tokenizer"].ok and not findings["one tokenizer"].breach  # logs of an older program


def test_the_artifact_lies_where_the_result_says(folder, code):
    """A kept artifact has a number; the setting still has the name that was asked for."""
    paths = write_runs(folder, code)
    (folder / "7.ptz").rename(folder / "7.1.ptz")
    (folder / "7.ptz").write_bytes(b"an artifact of another run")
    paths[2] = write_run(folder, code, 7, config={"artifact_path": "other.ptz"}, artifact_path="7.1.ptz")
    (folder / "7.1.ptz").write_bytes(b"artifact of seed 7")
    finding = compliance.check_bytes(compliance.read_run(paths[2]), compliance.Files())
    assert finding.ok and "artifact (file) 18" in finding.evidence


def write_evaluation(folder, code, artifact, name="evaluation", **result):
    """The log of a made-up EVAL_ONLY run: no figure of a training in its result."""
    trained = json.loads(write_run(folder, code, 42).read_text().rsplit("result ", 1)[1])
    kept = ("seed", "roundtrip_val_loss", "roundtrip_val_bpb", "device", "world_size", "gpu_name", "git_commit")
    result = {key: trained[key] for key in kept} | {"artifact_sha256": hashlib.sha256(artifact).hexdigest()} | result
    path = folder / f"{name}.txt"
    config = json.dumps(CONFIG | {"eval_only": True})
    path.write_bytes(code + b"\npython:3\nconfig " + config.encode() + b"\nresult " + json.dumps(result).encode() + b"\n")
    return path


def test_an_evaluation_belongs_to_the_seed_whose_artifact_it_scored(folder, code, capsys):
    evaluation = write_evaluation(folder, code, b"artifact of seed 1337")
    paths = [*write_runs(folder, code), evaluation]
    (finding,) = (f for f in compliance.check_logs(paths, compliance.Files(), RECORD) if f.rule == "evaluation")
    assert finding.ok and finding.evidence.endswith("; that of seed 1337, then 3.0500") and breaches(paths) == set()
    assert breaches([*paths[:3], write_evaluation(folder, code, b"another artifact")]) == {"evaluation"}
    assert breaches([*paths[:3], write_evaluation(folder, code, b"", artifact_sha256=None)]) == {"evaluation"}
    assert breaches([evaluation]) == {"evaluation"}
    assert make_submission.main(["--author", "A", "--github-id", "a", str(evaluation)]) == 2
    error = capsys.readouterr().err
    assert "evaluation.txt: a run with EVAL_ONLY=1, expected one that trained" in error and error.count("\n") == 1


def test_too_few_seeds_and_other_code(folder, code):
    paths = write_runs(folder, code)
    assert breaches(paths[:2]) == {"three seeds"}
    paths[2] = write_run(folder, pack_code.pack(GOOD), 7)
    assert breaches(paths) == {"three seeds"}
    (folder / "other.py").write_bytes(code[:-1] + b" ")
    assert breaches(write_runs(folder, code), compliance.Files(folder / "other.py")) == {"code"}
    (folder / "other.ptz").write_bytes(b"of another run")
    assert breaches(write_runs(folder, code), compliance.Files(artifacts=(folder / "other.ptz",))) == {"bytes"}


def test_validation_without_its_shards_is_known_by_fineweb_size(folder, code):
    assert breaches(write_runs(folder, code), compliance.Files(data=folder / "nowhere")) == set()
    paths = write_runs(folder, code, val_bytes=151_080_891 - 100_000)
    assert breaches(paths, compliance.Files(data=folder / "nowhere")) == {"full validation", "FineWeb"}


def test_the_non_record_track_shows_hardware_and_gain_without_failing(folder, code):
    paths = write_runs(folder, code, device="cpu", gpu_name="none", world_size=2, val_bytes=5)
    assert breaches(paths, record=[2.9, 2.9001]) == {"8xH100", "FineWeb", "gain"}
    assert breaches(paths, record=[2.9, 2.9001], non_record=True) == set()


# -------------------------------------------------------------------------------------------------- static inspection

GOOD = '''
import subprocess
import torch
def score_artifact(model):
    return evaluate(model)
@torch.no_grad()
def evaluate(model):
    return model.hidden(1)
class GPT(torch.nn.Module):
    def hidden(self, x):
        return self.layer(x)
class Layer(torch.nn.Module):
    def forward(self, x):
        return x
def train(model):
    model.hidden(1).backward()
    git = ["git", "-C", "."]
    subprocess.run([*git, "rev-parse", "HEAD"], check=False)
'''
NETWORK = {
    "a socket": "import socket",
    "urllib": "from urllib import request",
    "an unknown package": "import requests",
    "the hub": "from torch import hub as h\nh.load('x', 'y')",
    "a late import": "def f():\n    import http.client",
    "a program": "subprocess.run(['curl', 'x'])",
    "a program in a function": "def f():\n    subprocess.run(['curl', 'x'])",
    "git fetch": "def f():\n    subprocess.run(['git', 'fetch'])",
    "a shell": "def f():\n    subprocess.run(['git', 'x'], shell=True)",
    "Popen": "def f():\n    subprocess.Popen(['git', 'x'])",
    "os.system": "import os as o\no.system('curl x')",
    "os.execvp, renamed": "from os import execvp as e\ne('curl', [])",
    "text as code": "exec('import socket')",
    "importlib": "import importlib",
    "__import__": "__import__('socket')",
    "a tracker for every run": "import wandb",
    "a library": "import ctypes\nctypes.CDLL('libcurl.so')",
}
TEST_TIME_TRAINING = {
    "in evaluate": ("return model.hidden(1)", "model.hidden(1).backward()"),
    "in a layer": ("        return x", "        torch.autograd.grad(x, x)"),
    "with gradients": ("return model.hidden(1)", "torch.set_grad_enabled(True)"),
    "through the training loop": ("return model.hidden(1)", "return train(model)"),
    "an optimizer": ("return model.hidden(1)", "return torch.optim.SGD([])"),
    "without no_grad": ("@torch.no_grad()\n", ""),
    "no such function": ("def evaluate", "def valuate"),
}

# A model whose operations, parts, tables and hooks are data. `spoiled` follows gradients, as training may.
TABLES = '''
import functools
import sys
from typing import Callable, NamedTuple
import torch
def spoiled(*values):
    values[0].backward()
def plain(*values):
    return values[0]
class Ops(NamedTuple):
    matmul: Callable = plain
    mlp: Callable = plain
    loss: Callable = plain
class Codec(NamedTuple):
    pack: Callable
    unpack: Callable = plain
SOFTCAPS = {"poly": plain}
SOFTCAPS |= {"tanh": plain}
CODECS = {}
CODECS["int8"] = Codec(functools.partial(plain, 1), functools.partial(plain, 2))
HOOKS, OPTIMIZERS = [], {"muon": plain}
def registered(function):
    HOOKS.append(function)
    return function
@registered
def at_a_step(model):
    plain(model)
def choose_ops(ops):
    fits = ops._replace(loss=plain if ops else plain)
    return fits._replace(**{"mlp": plain})
def capped(cap):
    def function(x):
        return plain(cap, x)
    return function
class Hook:
    def before_step(self, model):
        plain(model)
class Layer(torch.nn.Module):
    ops = Ops()
    def __init__(self, function=plain):
        super().__init__()
        self.stored, self.others = function, []
        self.others.append(plain)
        self.cap = capped(plain)
        self.register_forward_hook(plain)
        setattr(self, "made", plain)
    def forward(self, x):
        return self.ops.matmul(self.ops.mlp(x)) + self.stored(x) + self.cap(x) + self.made(x) + self.others[0](x)
def make(kind):
    return kind(plain)
def score_artifact(model, log):
    log("scored")
    for hook in HOOKS:
        hook(model)
    model.hook.before_step(model)
    return evaluate(model)
@torch.no_grad()
def evaluate(model):
    CODECS["int8"].unpack(model)
    return SOFTCAPS["poly"](model.ops.loss(model(1))) + getattr(model, "late")(1) + CODECS.get("int8").pack(model)
def train(model, step=spoiled):
    OPTIMIZERS["muon"](model)
    spoiled(model)
def main():
    model = make(Layer)
    model.ops, model.hook, model.late = choose_ops(Ops()), Hook(), plain
    train(model)
    score_artifact(model, plain)
'''
PLANTED = {
    "an operation": ("matmul: Callable = plain", "matmul: Callable = spoiled"),
    "a machine's operation": ("loss=plain if ops else plain", "loss=plain if ops else spoiled"),
    "an operation by name": ('{"mlp": plain}', '{"mlp": spoiled}'),
    "a table's entry": ('SOFTCAPS = {"poly": plain}', 'SOFTCAPS = {"poly": spoiled}'),
    "an option's entry": ('{"tanh": plain}', '{"tanh": spoiled}'),
    "a codec": ("functools.partial(plain, 2)", "functools.partial(spoiled, 2)"),
    "a codec that get finds": ("functools.partial(plain, 1)", "functools.partial(spoiled, 1)"),
    "a registered hook": ("step(model):\n    plain(model)", "step(model):\n    spoiled(model)"),
    "a hook's method": ("step(self, model):\n        plain(model)", "step(self, model):\n        train(model)"),
    "a module's hook": ("self.register_forward_hook(plain)", "self.register_forward_hook(spoiled)"),
    "a part": ("return kind(plain)", "return kind(spoiled)"),
    "a part's default": ("function=plain", "function=spoiled"),
    "a list of a part": ("self.others.append(plain)", "self.others.append(spoiled)"),
    "a closure": ("self.cap = capped(plain)", "self.cap = capped(spoiled)"),
    "an attribute by name": ('"made", plain', '"made", spoiled'),
    "an attribute asked by name": ("Hook(), plain", "Hook(), spoiled"),
    "an argument": ("score_artifact(model, plain)", "score_artifact(model, spoiled)"),
    "the module's own": ('log("scored")', 'sys.modules["__main__"].train(model)'),
    "another function in a function's place": ("HOOKS, OPTIMIZERS = [],", "plain = spoiled\nHOOKS, OPTIMIZERS = [],"),
    "in a lambda": ("functools.partial(plain, 2)", "lambda x: x.backward()"),
    "PyTorch's own": ("functools.partial(plain, 2)", "torch.autograd.grad"),
}


def inspected(tmp_path, program, packed):
    source = program.encode() if not packed else pack_code.pack(program)
    return breaches([write_run(tmp_path, source, seed) for seed in SEEDS], compliance.Files(data=tmp_path / "nowhere"))


@pytest.mark.parametrize("packed", [False, True])
def test_a_program_without_network_or_test_time_training(tmp_path, packed):
    assert inspected(tmp_path, GOOD, packed) == set()
    assert inspected(tmp_path, GOOD + NETWORK["urllib"] + "\n", packed) == {"no network"}


@pytest.mark.parametrize("case", NETWORK)
def test_network_use_is_found(tmp_path, case):
    assert inspected(tmp_path, GOOD + NETWORK[case] + "\n", packed=False) == {"no network"}


@pytest.mark.parametrize("case", TEST_TIME_TRAINING)
def test_test_time_training_is_found(tmp_path, case):
    old, new = TEST_TIME_TRAINING[case]
    assert old in GOOD and inspected(tmp_path, GOOD.replace(old, new), packed=False) == {"no test-time training"}


def test_a_tables_functions_are_reached_where_the_table_is_asked():
    """Whatever way a function comes to be called: it is found, and what training alone asks is not."""
    wrong = lambda program, old="", new="": compliance.inspect_evaluation(program.replace(old, new).encode())[0]
    assert wrong(TABLES) == wrong(TABLES, '{"muon": plain}', '{"muon": spoiled}') == []
    for case, (old, new) in PLANTED.items():
        assert TABLES.count(old) == 1 and wrong(TABLES, old, new), case
    assert [bool(wrong(GOOD, "        return x", f"        return x.requires_grad_({on})")) for on in (False, True)] == [False, True]


TRAINERS_TABLES = {
    "matmul: Callable = matmul": "matmul: Callable = SPOILED",
    "order: Callable = u_net": "order: Callable = SPOILED",
    "embed_norm: Callable = lambda cfg: rms_norm": "embed_norm: Callable = lambda cfg: SPOILED",
    "order=recurrent_order": "order=SPOILED",
    "attend=flash_attention_3(cfg) or (attend if shares else unshared_attend)": "attend=SPOILED",
    "qk_norm_rope=QKNormRope.apply": "qk_norm_rope=SPOILED",
    '{"poly": poly_softcap}': '{"poly": SPOILED}',
    '"FP8": Float8()': '"FP8": SPOILED',
    "IntegerRows(bits) for": "SPOILED for",
    "activated(F.relu)": "activated(SPOILED)",
    "lambda t: torch.sigmoid(5 * t)": "SPOILED",
    "clock = Clock(world)\n    loss, bpb": "SPOILED(choose_hooks(model))\n    loss, bpb",
}


def test_the_trainers_own_tables_are_looked_into():
    """A function that follows gradients in each of the trainer's tables: all are found, and none in the trainer as it is."""
    source = (ROOT / "train_gpt.py").read_text()
    wrong, shown = compliance.inspect_evaluation(source.encode())
    assert not wrong and int(re.search("of ([0-9]+) names", shown)[1]) > 150
    for i, (old, new) in enumerate(TRAINERS_TABLES.items()):
        assert source.count(old) == 1, old
        source = source.replace(old, new.replace("SPOILED", f"spoiled_{i}")) + f"def spoiled_{i}(x):\n    x.backward()\n"
    found = re.findall("spoiled_([0-9]+) uses", " ".join(compliance.inspect_evaluation(source.encode())[0]))
    assert set(map(int, found)) == set(range(len(TRAINERS_TABLES)))


def test_code_around_a_packed_program_is_seen(tmp_path):
    packed = pack_code.pack(GOOD).decode()
    for text in ("import socket\n" + packed, packed + "import socket\n", packed.replace("import base64", "import socket")):
        source = text.encode()
        assert "no network" in breaches([write_run(tmp_path, source, seed) for seed in SEEDS])


# -------------------------------------------------------------------------------------------------- the gain


def welch(a, b):
    """p of mean(a) < mean(b) by the formulas, the t distribution integrated numerically."""
    va, vb = np.var(a, ddof=1) / len(a), np.var(b, ddof=1) / len(b)
    t = (np.mean(a) - np.mean(b)) / math.sqrt(va + vb)
    df = (va + vb) ** 2 / (va**2 / (len(a) - 1) + vb**2 / (len(b) - 1))
    angle = np.linspace(-math.pi / 2, math.atan(t / math.sqrt(df)), 200_001)[1:]  # x = sqrt(df) tan(angle)
    density = math.gamma((df + 1) / 2) / math.gamma(df / 2) / math.sqrt(math.pi) * np.cos(angle) ** (df - 1)
    return float(density.sum() * (angle[1] - angle[0]))


@pytest.mark.parametrize("ours, theirs", [([1.0, 1.1, 1.3], [1.6, 1.5, 1.9, 1.55]), ([2.1, 2.2], [2.0, 2.3, 2.1])])
def test_the_test_of_the_gain_is_welchs(ours, theirs):
    assert compliance.welch_p(ours, theirs) == pytest.approx(welch(ours, theirs), rel=1e-3)


def test_the_test_of_the_gain_is_scipys():
    """The same verdict as the library's: in the far tail, at its middle, for any degrees of freedom that seeds have."""
    stats = pytest.importorskip("scipy.stats")
    for freedom in (1, 1.3, 2, 3.7, 10, 57.3, 200):
        for t in (-300, -40, -9, -3, -1, -0.3, -1e-6, 0, 0.2, 1, 4, 30):
            assert compliance.t_below(t, freedom) == pytest.approx(stats.t.cdf(t, freedom), rel=1e-8), (t, freedom)
    draws = np.random.default_rng(0)
    for _ in range(100):
        ours, theirs = draws.normal(3.0, 0.001, draws.integers(2, 6)), draws.normal(3.001, 0.003, draws.integers(2, 6))
        expected = stats.ttest_ind(ours, theirs, equal_var=False, alternative="less").pvalue
        assert compliance.welch_p(list(ours), list(theirs)) == pytest.approx(expected, rel=1e-8)


def test_no_spread_shows_no_gain_and_little_is_enough():
    assert compliance.welch_p([2.9, 2.9, 2.9], [3.1, 3.1, 3.1]) == 1  # two seeds that are copies of one run
    assert compliance.welch_p([2.9], [3.1, 3.2]) == compliance.welch_p([2.9, 2.8], [3.1]) == 1
    assert compliance.welch_p([1e-170, 2e-170], [3e-170, 5e-170]) == 1  # a variance that is 0 in floating point
    assert 0 < compliance.welch_p([2.9, 2.9], [3.1, 3.1 + 1e-12]) < 1e-9


@pytest.mark.parametrize("record, ok", [
    ([2.9920, 2.9921, 2.9922], True),  # 0.0107 better with little spread
    ([2.9850, 2.9851, 2.9852], False),  # 0.0038 better
    ([2.9873, 2.9874, 2.9875], False),  # 0.0054 better, but not beyond doubt
    ([2.97, 3.02, 3.0], False),  # 0.015 better, with too much spread
    ([2.995], False),  # one run shows nothing
])  # fmt: skip
def test_the_gain_must_be_more_than_the_margin_beyond_doubt(folder, code, record, ok):
    assert ("gain" not in breaches(write_runs(folder, code), record=record)) == ok


def test_records_are_read_from_submissions(folder, code):
    theirs = {"val_bpb": 1.2, "seed_results": {"1": {"val_loss": 3.1}, "2": {"val_loss": 3.2}}}
    (folder / "theirs.json").write_text(json.dumps(theirs))
    assert compliance.read_record(folder / "theirs.json") == [3.1, 3.2]
    assert make_submission.main(["--author", "A", "--github-id", "a", *map(str, write_runs(folder, code))]) == 0
    assert compliance.read_record(folder / "submission.json") == pytest.approx([2.983, 2.982, 2.981])


NO_RECORDS = {
    "no seeds": ("{}", "has no seed_results, a row a seed; --record-losses takes the losses of its seeds by hand"),
    "a list": ("[]", "has no seed_results"),
    "empty seeds": ('{"seed_results": {}}', "has no seed_results"),
    "seeds that are no rows": ('{"seed_results": {"1": 3.1, "2": 3.2}}', "val_loss of its seed_results: None, expected nats"),
    "bits only": ('{"seed_results": {"1": {"val_bpb": 1.1}, "2": {"val_bpb": 1.2}}}', "val_loss of its seed_results: None"),
    "one seed": ('{"seed_results": {"1": {"val_loss": 3.1}}}', "expected those of at least 2 seeds"),
    "NaN": ('{"seed_results": {"1": {"val_loss": NaN}, "2": {"val_loss": 3}}}', "nan, expected nats a token"),
    "not JSON": ("{", "not JSON"),
    "another score": ('{"score": "best", "seed_results": {"1": {"val_loss": 3.1}}}', "best_val_loss of its seed_results: None"),
    "not UTF-8": ("\xff", "not JSON"),
    "a score of two lines": ('{"score": "a\\nb", "seed_results": {"1": {}}}', "'a\\nb_val_loss' of its seed_results"),
}


@pytest.mark.parametrize("name", run_logs.SLIDING)
def test_one_sliding_figure_alone_is_one_line(folder, code, name):
    """Whichever is missing; found by bench/fuzz.py."""
    path = write_runs(folder, code)[0]
    before, _, result = path.read_text().rpartition("result ")
    path.write_text(before + "result " + json.dumps(json.loads(result) | {name: None}) + "\n")
    with pytest.raises(run_logs.UserError, match="the result line has sliding_val_.* alone, expected sliding_val_loss and sliding_val_bpb, or neither"):
        run_logs.read_run(path)


def test_a_time_of_many_digits_is_no_time(folder, code):
    """Python converts no text of more than 4,300 digits; found by bench/fuzz.py."""
    path = write_runs(folder, code)[0]
    lines = path.read_text().splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("step:"))
    lines.insert(at, f"step:1/9 loss:3.0 t:{'9' * 5000}ms avg:1ms")
    path.write_text("\n".join(lines) + "\n")
    assert all(finding.ok for finding in map(compliance.check_training_time, [run_logs.read_run(path)]))


@pytest.mark.parametrize("case", NO_RECORDS)
def test_a_record_without_usable_losses_is_one_line_that_names_the_way_out(folder, code, capsys, case):
    content, said = NO_RECORDS[case]
    (folder / "theirs.json").write_text(content, encoding="latin-1")
    for argv in (["--check", "3"], list(map(str, write_runs(folder, code)))):
        options = ["--author", "A", "--github-id", "a", "--record", "theirs.json", "--records", "records", "--name", "x"]
        assert make_submission.main([*options, *argv]) == 2
        error = capsys.readouterr().err
        assert said in error and "--record theirs.json: " in error and error.count("\n") == 1
    assert not (folder / "records").exists()


@pytest.mark.parametrize("losses, said", [
    (["nan", "3"], "--record-losses: nan, expected nats a token"), (["3"], "at least 2 seeds"), (["inf", "3"], "inf, expected"),
    (["-1", "3"], "-1.0, expected nats a token"), (["0", "3"], "0.0, expected"), (["1e12", "3"], "1000000000000.0, expected"),
])  # fmt: skip
def test_losses_by_hand_are_checked(folder, code, capsys, losses, said):
    assert compliance.main([*map(str, write_runs(folder, code)), "--record-losses", *losses]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_command_line_of_compliance(folder, code, capsys):
    paths = list(map(str, write_runs(folder, code)))
    assert compliance.main([*paths, "--record-losses", *map(str, RECORD)]) == 0
    assert "BREACHES" not in capsys.readouterr().out
    assert compliance.main(paths) == 0 and "no record was given" in capsys.readouterr().out
    assert compliance.main(paths[:2]) == 1
    out = capsys.readouterr().out
    assert re.search(r"^FAIL +three seeds", out, re.M) and "BREACHES: three seeds" in out
    for option in ("--code", "--artifact", "--data"):
        assert compliance.main([*paths, option, "missing.py"]) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"compliance.py: error: {option} missing.py: no ") and error.count("\n") == 1


# -------------------------------------------------------------------------------------------------- the folder


def assemble(folder, paths, *options):
    who = ["--author", "A. Uthor", "--github-id", "author", "--date", "2026-03-31", "--name", "Ternary U-Net"]
    return make_submission.main([*who, "--records", str(folder / "records"), *options, *map(str, paths)])


def test_the_folder_holds_what_is_submitted(folder, code, capsys):
    paths = write_runs(folder, code, sliding_val_loss=2.985)
    assert assemble(folder, paths) == 0 and "compliance:" in capsys.readouterr().out
    made = folder / "records/track_10min_16mb/2026-03-31_Ternary_U-Net"
    logs = {path.name: path.read_bytes() for path in paths}
    assert {p.name: p.read_bytes() for p in made.glob("*.txt") if p.name in logs} == logs
    others = {"README.md", "LICENSE", "submission.json", "train_gpt.py", "train_gpt_readable.py", "requirements.txt", "tokenizer.model"}
    assert {p.name for p in made.iterdir()} == set(logs) | others and [p.name for p in made.parent.iterdir()] == [made.name]
    assert (made / "train_gpt.py").read_bytes() == code and (made / "tokenizer.model").read_bytes() == b"a tokenizer"
    submission = json.loads((made / "submission.json").read_text())
    assert submission["val_loss"] == pytest.approx((2.982 + 2.981 + 2.985) / 3)
    assert submission["val_loss_std"] == pytest.approx(np.std([2.982, 2.981, 2.985], ddof=1))
    assert set(submission["seed_results"]) == {str(seed) for seed in SEEDS} and submission["github_id"] == "author"
    readme = (made / "README.md").read_text()
    assert all(f"| {seed} | 1.15000 | " in readme for seed in SEEDS) and "# Ternary U-Net" in readme and "/tmp" not in readme
    assert not (folder / "submission.json").exists()
    assert submission["track"] == "track_10min_16mb" and "notice" not in submission and "leaderboard" not in readme
    # which one ran, and that the other is the same program
    assert "It is the file that ran: `train_gpt.py`, packed" in " ".join(readme.split())
    assert (made / "train_gpt_readable.py").read_bytes() == (ROOT / "train_gpt.py").read_bytes()
    assert ast.unparse(ast.parse(pack_code.unpack(code.decode()))) == ast.unparse(
        ast.parse(pack_code.strip_source((made / "train_gpt_readable.py").read_text()))
    )
    # what it builds on, and where the text comes from
    assert {f"/pull/{number})" for number in (640, 920, 641, 139, 367, 126, 435)} <= set(re.findall(r"/pull/[0-9]+\)", readme))
    assert "huggingface.co/datasets/HuggingFaceFW/fineweb" in readme and "`data`" in readme and "**not** FineWeb" not in readme
    assert f"SHA-256 {RESULT['tokenizer_sha256']}" in readme and f"commit is {'0' * 40}." in readme
    assert (made / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()


def test_the_folders_requirements_are_those_of_the_program_alone(folder, code):
    """Each is one that the program imports, at the version that the repository pins; the demo's corpus is none."""
    assert assemble(folder, write_runs(folder, code)) == 0
    lines = next(folder.glob("records/*/*/requirements.txt")).read_text().splitlines()
    pinned = (ROOT / "requirements.txt").read_text().splitlines()
    assert set(lines) <= set(pinned) and {re.match("[a-z]+", line)[0] for line in lines} == {"torch", "numpy", "sentencepiece", "tqdm"}


def test_readable_code_that_ran_stands_alone(folder):
    code = GOOD.encode()
    assert assemble(folder, [write_run(folder, code, seed, git_commit="a" * 40 + "+") for seed in SEEDS]) == 0
    (made,) = folder.glob("records/*/*")
    assert (made / "train_gpt.py").read_bytes() == code and not (made / "train_gpt_readable.py").exists()
    readme = (made / "README.md").read_text()
    assert "is the file that ran, as it was written" in readme and "packed" not in readme
    assert f"It was changed since its commit, {'a' * 40}." in readme and (made / "requirements.txt").read_text().startswith("torch==")


def test_a_readable_file_of_another_program_is_refused(folder, capsys):
    paths = write_runs(folder, pack_code.pack(GOOD))
    (folder / "other.py").write_text(GOOD + "SPARE = 1\n")
    (folder / "broken.py").write_text("def f(:\n")
    for name in ("other.py", "broken.py", "missing.py"):
        assert assemble(folder, paths, "--source", name) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"make_submission.py: error: --source {name}: ") and error.count("\n") == 1
        assert not list(folder.glob("records/*/*"))
    (folder / "windows.py").write_bytes(b"\xef\xbb\xbf" + GOOD.replace("\n", "\r\n").encode())
    assert assemble(folder, paths, "--source", "windows.py") == 0  # the same program, other line ends


def test_a_tokenizer_that_is_not_the_logs_is_refused(folder, code, capsys):
    (folder / "tokenizer.model").write_bytes(b"another")
    assert assemble(folder, write_runs(folder, code)) == 2
    error = capsys.readouterr().err
    assert "tokenizer.model: not the tokenizer of the logs" in error and error.count("\n") == 1


def test_what_is_no_record_says_so_in_the_file_and_in_the_folder(folder, code):
    paths = write_runs(folder, code, device="cpu", gpu_name="none", world_size=1, val_bytes=5, artifact_bytes=3)[2:]
    own = {"device": "cpu", "gpu_name": "none", "world_size": 1, "val_bytes": 615_808, "git_commit": "unknown"}
    paths = [write_run(folder, code, seed, edit=replaced("threads:1", "threads:2"), **own) for seed in SEEDS]
    assert make_submission.main(["--author", "A", "--github-id", "a", *map(str, paths)]) == 0  # --non-record is not said
    made = json.loads((folder / "submission.json").read_text())
    assert made["notice"] == (
        "Not a leaderboard entry: it ran on 1 x CPU process of 2 threads, not on 8 x NVIDIA H100 80GB HBM3; "
        "it is scored on 615,808 bytes of text in data, not on FineWeb's validation split."
    )
    assert made["track"] == "track_non_record_16mb" and made["hardware"] == "1 x CPU process of 2 threads"
    assert assemble(folder, paths, "--non-record") == 0
    readme = next(folder.glob("records/track_non_record_16mb/*/README.md")).read_text()
    assert f"**{made['notice']}**" in readme and "That is **not** FineWeb's validation split" in readme
    assert "No commit is known of it" in readme and "huggingface" not in readme
    assert make_submission.main(["--author", "A", "--github-id", "a", str(paths[0])]) == 0
    assert "it has 1 seed, not 3" in json.loads((folder / "submission.json").read_text())["notice"]


def test_the_date_is_the_logs_where_they_have_one(folder, code, capsys):
    days = ["2026-03-01", "2026-03-02T23:59:00Z", "2026-02-28"]
    paths = [write_run(folder, code, seed, date=day) for seed, day in zip(SEEDS, days, strict=True)]
    assert make_submission.main(["--author", "A", "--github-id", "a", *map(str, paths)]) == 0
    assert json.loads((folder / "submission.json").read_text())["date"] == "2026-03-02"
    paths[0] = write_run(folder, code, 42, date="yesterday")
    assert make_submission.main(["--author", "A", "--github-id", "a", *map(str, paths)]) == 2
    assert "date 'yesterday', expected one such as 2026-03-31" in capsys.readouterr().err


def test_what_a_check_accepts_can_be_written_at_the_end(folder, code):
    out = ["--author", "A", "--github-id", "a", "--out", "new/folder/s.json"]
    assert make_submission.main([*out, "--check", "3"]) == 0 and not (folder / "new").exists()
    assert make_submission.main([*out, *map(str, write_runs(folder, code))]) == 0 and (folder / "new/folder/s.json").exists()


def test_the_readmes_command_sets_what_differs_from_the_programs_defaults(folder, code):
    assert assemble(folder, write_runs(folder, code)) == 0
    command = re.search(r"^DATA_PATH=.*\n.*train_gpt.py$", next(folder.glob("records/*/*/README.md")).read_text(), re.M)[0]
    assert "NUM_LAYERS=11" in command and "TEMP_SCALING=0" in command and "SEED=42" not in command.replace("SEED=7", "")
    assert "MODEL_DIM" not in command and "ITERATIONS" not in command and "--nproc_per_node=8" in command


def test_a_breach_or_a_failed_write_leaves_no_folder(folder, code, capsys, monkeypatch):
    assert assemble(folder, write_runs(folder, code)[:2], "--out", "out.json") == 1
    shown = capsys.readouterr()
    assert "BREACHES: three seeds" in shown.out and shown.err.count("\n") == 1
    assert not (folder / "records").exists() and not (folder / "out.json").exists()
    monkeypatch.setattr(make_submission.os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    assert assemble(folder, write_runs(folder, code)) == 2 and "No space left" in capsys.readouterr().err
    assert not (folder / "records").exists()


def test_a_folder_that_is_there_is_replaced_only_by_force(folder, capsys):
    paths = write_runs(folder, GOOD.encode())
    assert assemble(folder, paths) == 0
    made = folder / "records/track_10min_16mb/2026-03-31_Ternary_U-Net"
    (made / "mine.txt").write_text("kept")
    assert assemble(folder, paths) == 2 and "--force" in capsys.readouterr().err and (made / "mine.txt").exists()
    assert assemble(folder, paths, "--force", "--out", "out.json") == 0
    assert not (made / "mine.txt").exists() and (folder / "out.json").exists() and len(list(made.parent.iterdir())) == 1


def test_the_non_record_track_has_its_own_folder(folder, code):
    paths = write_runs(folder, code, device="cpu", gpu_name="none", world_size=2)
    assert assemble(folder, paths) == 1
    assert assemble(folder, paths, "--non-record") == 0
    assert (folder / "records/track_non_record_16mb/2026-03-31_Ternary_U-Net/submission.json").exists()


@pytest.mark.parametrize("options, message", [
    (("--records", "records"), "--name"),
    (("--records", "records", "--name", "..."), "letters or digits"),
    (("--records", "records", "--name", "x", "--tokenizer", "missing.model"), "missing.model"),
    (("--records", "records", "--name", "x", "--code", "missing.py"), "missing.py"),
    (("--records", "records", "--name", "x" * 300), "File name too long"),
    (("--name", "two\nlines"), "--name 'two\\nlines': expected one line of text"),
    (("--blurb", " "), "--blurb ' ': expected one line of text"),
    (("--author", "caf\udce9"), "--author 'caf\\udce9': expected one line of text"),
    (("--github-id", "a b"), "--github-id 'a b': expected a GitHub account's name"),
    (("--out", "data"), "data: is a folder, expected the name of a file"),
    (("--out", "tokenizer.model/s.json", "--records", "records", "--name", "x"), "tokenizer.model/s.json: cannot be written"),
    (("--records", "records", "--name", "x", "--record", "missing.json"), "missing.json"),
])  # fmt: skip
def test_folder_options_are_refused_in_one_line(folder, code, capsys, options, message):
    assert make_submission.main(["--author", "A", "--github-id", "a", *options, *map(str, write_runs(folder, code))]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not list(folder.glob("records/*/*"))


# -------------------------------------------------------------------------------------------------- before long runs

WHO = ("--author", "A", "--github-id", "a")
FOLDER = ("--records", "records", "--name", "x")
TOO_LATE = {
    "an unknown option": ((*WHO, "--frob"), "unrecognized arguments: --frob"),
    "half an option's name": ((*WHO, "--auth", "B"), "unrecognized arguments: --auth"),
    "no author": (("--github-id", "a"), "no author: give --author NAME"),
    "no account": (("--author", "A"), "no GitHub account: give --github-id ID"),
    "a record that is not there": ((*WHO, "--record", "nope.json"), "--record nope.json: cannot be read: No such file"),
    "a record's single loss": ((*WHO, "--record-losses", "3"), "at least 2 seeds"),
    "a log": ((*WHO, "log.txt"), "log.txt: not an option"),
    "no name": ((*WHO, "--records", "records"), "--records needs --name NAME"),
    "a name that is too long": ((*WHO, "--records", "records", "--name", "x" * 300), "File name too long"),
    "a file in the folder's way": ((*WHO, "--records", "tokenizer.model", "--name", "x"), "cannot be written: Not a directory"),
    "a folder in the file's way": ((*WHO, "--out", "data"), "data: is a folder"),
    "no tokenizer": ((*WHO, *FOLDER, "--tokenizer", "nope.model"), "--tokenizer nope.model: no such file"),
    "no readable file": ((*WHO, *FOLDER, "--source", "nope.py"), "--source nope.py: no such file"),
    "no data": ((*WHO, "--data", "nope"), "--data nope: no fineweb_val_*.bin there"),
    "code that fetches": ((*WHO, *FOLDER, "--code", "fetches.py"), "breaks the rule 'no network': imports socket"),
    "code that is none": ((*WHO, *FOLDER, "--code", "tokenizer.model"), "--code tokenizer.model: no program"),
    "another readable file": ((*WHO, *FOLDER, "--code", "packed.py", "--source", "fetches.py"), "not the program that ran"),
}


@pytest.fixture
def no_git(folder, monkeypatch):
    for name in ("GIT_CONFIG_GLOBAL", "GIT_CONFIG_SYSTEM"):
        monkeypatch.setenv(name, os.devnull)
    (folder / "fetches.py").write_text(GOOD + "import socket\n")
    (folder / "packed.py").write_bytes(pack_code.pack(GOOD))
    return folder


def check(*options, runs="3"):
    try:
        return make_submission.main(["--check", runs, *options])
    except SystemExit as end:
        return end.code


@pytest.mark.parametrize("case", TOO_LATE)
def test_what_the_end_will_need_is_checked_before_the_runs(no_git, capsys, case):
    options, said = TOO_LATE[case]
    before = sorted(no_git.rglob("*"))
    assert check(*options) == 2
    error = capsys.readouterr().err
    assert said in error and error.startswith("make_submission.py: error: ") and error.count("\n") == 1
    assert sorted(no_git.rglob("*")) == before


def test_a_good_check_says_and_leaves_nothing(no_git, capsys):
    before = sorted(no_git.rglob("*"))
    (no_git / "good.py").write_text(GOOD)
    (no_git / "theirs.json").write_text('{"seed_results": {"1": {"val_loss": 3.1}, "2": {"val_loss": 3.2}}}')
    assert check(*WHO) == check(*WHO, "--out", "new/folder/s.json", runs="1") == 0
    assert check(*WHO, *FOLDER, "--record", "theirs.json", "--code", "packed.py", "--source", "good.py", "--tokenizer",
                 "tokenizer.model", "--data", "data") == 0  # fmt: skip
    assert capsys.readouterr() == ("", "") and sorted(no_git.rglob("*")) == sorted([*before, no_git / "good.py", no_git / "theirs.json"])


def test_the_rest_of_what_the_end_needs(no_git, capsys, monkeypatch):
    """Seeds, a folder that is there, the disk, the licence, a git that has no UTF-8."""
    assert check(*WHO, *FOLDER, runs="2") == 2 and "--records: expected at least 3 seeds, not 2" in capsys.readouterr().err
    for runs in ("0", "-1", "1.5", "nan", "1000"):
        assert check(*WHO, runs=runs) == 2 and f"{runs}: expected the number of runs" in capsys.readouterr().err
    (no_git / "records/track_10min_16mb/2026-03-31_x").mkdir(parents=True)
    assert check(*WHO, *FOLDER, "--date", "2026-03-31") == 2 and "--force replaces it" in capsys.readouterr().err
    (no_git / "gitconfig").write_bytes(b"[user]\n name = caf\xe9\n")
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(no_git / "gitconfig"))
    assert check("--github-id", "a") == 2 and "--author 'caf\\udce9': expected one line" in capsys.readouterr().err
    monkeypatch.setattr(make_submission, "ROOT", no_git)
    assert check(*WHO, *FOLDER) == 2 and "LICENSE: no such file" in capsys.readouterr().err
    monkeypatch.setattr(make_submission.shutil, "disk_usage", lambda _: SimpleNamespace(free=90_000_000))
    assert check(*WHO, runs="2") == 0 and check(*WHO) == 2
    assert "90,000,000 bytes are free, the runs may need 99,000,000" in capsys.readouterr().err


# -------------------------------------------------------------------------------------------------- the record script

# QUICK: neither the machine is checked nor train_gpt.py packed, which takes seconds and is not what the test is about
STUB = """#!/usr/bin/env bash
case ${{QUICK:-}}$1 in
  1-) cat >/dev/null; exit ;;
  1tools/pack_code.py) mkdir -p logs; touch "${{@: -1}}"; exit ;;
esac
if [[ "$1 $2" != "-m torch.distributed.run" ]]; then exec "{python}" "$@"; fi
echo "$*" >>launches
{trainer}
"""


@pytest.fixture
def tree(folder):
    """A copy of what run_8xh100.sh uses, with a stub in the interpreter's place that runs `trainer` for torchrun."""
    tree = folder / "a tree"
    for name in ("tools", "configs"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("run_8xh100.sh", "train_gpt.py", "LICENSE", "requirements.txt"):
        shutil.copy2(ROOT / name, tree)
    return tree


def record_run(tree, trainer, command="bash run_8xh100.sh", **env):
    (tree / "python").write_text(STUB.format(python=python(), trainer=trainer))
    (tree / "python").chmod(0o755)
    clean = {name: os.environ[name] for name in ("PATH", "HOME", "TMPDIR") if name in os.environ}
    clean |= {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_SYSTEM": os.devnull, "TRAIN_PYTHON": str(tree / "python")}
    return subprocess.run(["bash", "-c", command], cwd=tree, env=clean | env, capture_output=True, text=True, timeout=120, check=False)


def demo_folder(tree):
    """The folder that setup.sh and run_demo.sh make the demo's data in, by their own words; here with made-up shards."""
    show = "source tools/common.sh; has_nvidia_gpu() { false; }; load_demo_preset false; echo $demo_folder"
    made = tree / subprocess.run(["bash", "-c", show], cwd=tree, capture_output=True, text=True, check=True).stdout.strip()
    made.mkdir(parents=True)
    for split in ("train", "val"):
        write_shard(made / f"fineweb_{split}_000000.bin", np.zeros(TARGETS + 1))
    (made / "tokenizer.model").write_bytes(b"a tokenizer")
    return made


def rehearsals():
    """The rehearsal's command as run_8xh100.sh's head and the page on the record run have it, comment signs taken off."""
    texts = {"head": re.sub("^# ?", "", (ROOT / "run_8xh100.sh").read_text(), flags=re.M),
             "page": (ROOT / "docs/record-run.md").read_text()}  # fmt: skip
    return {name: re.search(r"^ *(\(set -a;.*?run_8xh100\.sh[^)]*\))$", text, re.M | re.S)[1] for name, text in texts.items()}


COPY_LOG = 'mkdir -p "${LOG_DIR:-logs}"; cp "made/record_seed$SEED.txt" "${LOG_DIR:-logs}/$RUN_ID.txt"'


@pytest.mark.campaign
def test_the_rehearsal_works_as_it_is_written(tree, code):
    head, page = rehearsals().values()
    begin = head.removesuffix(")").split()
    assert page.removesuffix(")").split()[: len(begin)] == begin  # the page goes on to the folder
    demo_folder(tree)
    (tree / "made").mkdir()
    for seed in SEEDS:
        write_run(tree / "made", code, seed, device="cpu", gpu_name="none", world_size=2, val_bytes=5)
    done = record_run(tree, COPY_LOG, head)
    assert done.returncode == 0, done.stderr
    made = json.loads((tree / "logs/rehearsal.submission.json").read_text())
    assert (made["author"], made["github_id"], list(made["seed_results"])) == ("NAME", "ID", ["7", "42", "1337"])
    launch = "-m torch.distributed.run --standalone --nproc_per_node=2 logs/rehearsal_train_gpt.py"
    assert (tree / "launches").read_text().splitlines() == [launch] * 3
    assert re.search("^PASS  code ", done.stdout, re.M) and "BREACHES: 8xH100, FineWeb" in done.stdout
    assert not (tree / "submission.json").exists() and not list(tree.rglob("*.partial*"))


def test_the_record_script_assembles_the_folder(tree, code):
    demo_folder(tree)
    (tree / "made").mkdir()
    for seed in SEEDS:
        write_run(tree / "made", code, seed, config={"tokenizer_path": "data/demo_sp4096/tokenizer.model"})
    options = "--author A --github-id a --records=records --name N --record-losses 3.1 3.101 3.0985 --data data/demo_sp4096"
    change = "echo '# edited meanwhile' >>train_gpt.py; { echo '# longer'; cat run_8xh100.sh; } >new; cat new >run_8xh100.sh"
    done = record_run(tree, f"{COPY_LOG}; {change}", f"bash run_8xh100.sh {options}", NPROC="2", ALLOW_CPU="1", VOCAB_SIZE="4096",
                      DATA_PATH="data/demo_sp4096", TOKENIZER_PATH="data/demo_sp4096/tokenizer.model", LOG_DIR="else where",
                      SHELLOPTS="noclobber")  # fmt: skip
    assert done.returncode == 0, done.stderr + done.stdout
    (made,) = tree.glob("records/*/*")
    assert (made / "train_gpt.py").read_bytes() == code
    assert (made / "train_gpt_readable.py").read_bytes() == (ROOT / "train_gpt.py").read_bytes()  # as it was at the start
    assert done.stdout.count("compliance: ") == 1
    assert (tree / "else where/rehearsal_seed42.txt").exists() and not (tree / "logs").exists()


TORCHRUN = """for ((i = 0; i < 15; i++)); do echo "W torchrun's own" >&2; done
echo "{said}" >&2
echo "train_gpt.py: warning: the log ends here" >&2
for ((i = 0; i < 15; i++)); do echo "logs/record_train_gpt.py FAILED" >&2; done
exit {code}"""


@pytest.mark.parametrize("said, code, last", [
    ("train_gpt.py: MATRIX_LR=9: too much", 1, "run_8xh100.sh: error: seed 42: MATRIX_LR=9: too much"),
    ("train_gpt.py: stopped by SIGTERM", 143, "run_8xh100.sh: error: seed 42: stopped by SIGTERM"),
    ("Traceback", 5, "run_8xh100.sh: error: seed 42 failed with exit code 5; log: logs/rehearsal_seed42.txt"),
])  # fmt: skip
def test_the_record_script_ends_with_the_trainers_line(tree, said, code, last):
    done = record_run(tree, TORCHRUN.format(said=said, code=code), rehearsals()["head"], QUICK="1")
    lines = done.stderr.splitlines()
    assert lines[-1] == last and lines.count(said) == 1 and lines.count("logs/record_train_gpt.py FAILED") == 15
    assert done.returncode == (2 if code == 1 else code) and len((tree / "launches").read_text().splitlines()) == 1


MISTAKES = {
    "SEED": ({"SEED": "42 x"}, "", "SEED='42 x': expected whole numbers, found 'x'"),
    "a negative seed": ({"SEED": "-1"}, "", "SEED='-1': expected whole numbers, found '-1'"),
    "no seed": ({"SEED": " "}, "", "SEED=' ': expected whole numbers"),
    "one seed twice": ({"SEED": "7\n42\n7"}, "", "expected each seed once"),
    "NPROC": ({"NPROC": "0"}, "", "NPROC=0: expected a whole number, 1 to 9999"),
    "a huge NPROC": ({"NPROC": "99999"}, "", "NPROC=99999: expected a whole number, 1 to 9999"),
    "ALLOW_CPU": ({"ALLOW_CPU": "yes"}, "", "ALLOW_CPU=yes: expected 0 or 1"),
    "--check": ({}, "--check 3", "--check: this script does it by itself"),
    "a wrong interpreter": ({"TRAIN_PYTHON": "no/python"}, "", "no/python: not there"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_of_the_record_script_are_one_line(tree, case):
    env, arguments, said = MISTAKES[case]
    before = sorted(tree.rglob("*"))
    done = record_run(tree, "", f"bash run_8xh100.sh {arguments}", **env)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1 + said.count("\n") + env.get("SEED", "").count("\n"))
    assert said in done.stderr and done.stderr.startswith("run_8xh100.sh: error: ")
    assert sorted(tree.rglob("*")) == sorted([*before, tree / "python"])


@pytest.mark.parametrize("env, arguments, said", [
    ({"QUICK": "1"}, "--author A --github-id a --record nope.json", "make_submission.py: error: --record nope.json: cannot be read"),
    ({"EVAL_ONLY": "1"}, "", "run_8xh100.sh: error: EVAL_ONLY=1: expected 0, these runs train"),
    ({"RUN_ID": "x" * 72}, "", f"run_8xh100.sh: error: RUN_ID='{'x' * 72}_seed1337': expected"),  # seed 42's is short enough
    ({"QUICK": "1"}, "--author A --github-id a --frob", "make_submission.py: error: unrecognized arguments: --frob"),
])  # fmt: skip
def test_nothing_is_packed_or_started_before_all_is_checked(tree, env, arguments, said):
    demo_folder(tree)
    own = {"DATA_PATH": "data/demo_sp4096", "TOKENIZER_PATH": "data/demo_sp4096/tokenizer.model", "ALLOW_CPU": "1"}
    done = record_run(tree, "", f"bash run_8xh100.sh {arguments}", **own, **env, PYTHONDONTWRITEBYTECODE="1")
    assert done.returncode == 2 and done.stderr.splitlines()[-1].startswith(said) and done.stdout == ""
    assert not (tree / "logs").exists() and not (tree / "launches").exists()


def test_the_record_scripts_help_needs_no_python_and_no_folder(tree):
    (tree.parent / "link.sh").symlink_to(tree / "run_8xh100.sh")
    done = record_run(tree, "", f"cd / && '{tree.parent}/link.sh' --help", TRAIN_PYTHON="no/python")
    assert (done.returncode, done.stderr) == (0, "") and "ALLOW_CPU=1: a rehearsal" in done.stdout and "set -e" not in done.stdout


# -------------------------------------------------------------------------------------------------- every tool's manners

TOOLS = [ROOT / path for path in ("tools/make_submission.py", "tools/compliance.py", "tools/plot_logs.py", "tools/pack_code.py",
                                  "tools/run_logs.py", "bench/arms.py", "bench/artifact.py")]  # fmt: skip


@pytest.mark.parametrize("path", TOOLS, ids=lambda path: path.name)
def test_a_tool_answers_help_and_refuses_what_it_does_not_know(path, tmp_path):
    """As its own process, in an empty folder; a module that is no command says so instead."""
    start = lambda *arguments: launch({}, tmp_path, argv=[str(path), *arguments])
    helped, refused = start("-h"), start("--no-such-option", "x")
    if path.name == "run_logs.py":
        assert helped.returncode == 0 and "run_logs.py is a module of tools/compliance.py" in helped.stdout and not helped.stderr
        assert "tools/compliance.py, not a command" in refused.stderr
    else:
        assert helped.returncode == 0 and helped.stdout.startswith(f"usage: {path.name} ") and not helped.stderr
    assert refused.returncode == 2 and refused.stdout == "" and refused.stderr.count("\n") == 1
    assert f"{path.name}: error: " in refused.stderr and not list(tmp_path.iterdir())


def test_a_tool_that_is_interrupted_or_loses_its_reader_ends_without_a_traceback(monkeypatch):
    """Ctrl-C, and `| head`: the codes of a shell; one process, since both are exceptions of its main."""
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(open(os.devnull, "wb"), encoding="ascii"))
    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))

    def interrupted():
        raise KeyboardInterrupt

    def broken():
        raise BrokenPipeError(32, "Broken pipe")

    for main, code in ((interrupted, 130), (broken, 141), (lambda: print("\xb1", file=sys.stderr) or 3, 3)):
        with pytest.raises(SystemExit) as end:
            command_line.start(main)
        assert end.value.code == code
    sys.stderr.flush()
    assert sys.stderr.buffer.getvalue() == b"\\xb1\n"


def test_a_narrow_console_and_a_reader_that_goes_away(folder, code):
    """An ASCII console shows escapes, after the work is done; `| head -1` ends a table without a traceback."""
    paths = [str(path) for path in write_runs(folder, code)]
    tool = [sys.executable, str(ROOT / "tools/make_submission.py"), *WHO, "--out", "f\xfcr.json", *paths]
    done = subprocess.run(tool, env=os.environ | {"PYTHONIOENCODING": "ascii"}, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "") and "f\\xfcr.json: 1.1500 bits" in done.stdout and (folder / "f\xfcr.json").exists()
    reader = f'"{python()}" "{ROOT}/tools/compliance.py" {" ".join(paths)} | true; echo ${{PIPESTATUS[0]}}'
    done = subprocess.run(["bash", "-c", reader], capture_output=True, text=True, check=False)
    assert done.stdout.strip() in ("141", "0") and done.stderr == ""


# -------------------------------------------------------------------------------------------------- a real run


@pytest.mark.slow
def test_a_real_runs_log_shows_every_rule_it_can(tmp_path, data_dir, code):
    (tmp_path / "packed.py").write_bytes(code)
    data = {"DATA_PATH": str(data_dir), "TOKENIZER_PATH": str(data_dir / "tokenizer.model"), "TMPDIR": str(tmp_path)}
    done = launch(TINY | data | {"RUN_ID": "r", "ITERATIONS": "6"}, tmp_path, argv=["packed.py"])
    assert done.returncode == 0, done.stderr
    files = compliance.Files(tmp_path / "packed.py", (tmp_path / "final_model.ternary.ptz",))
    findings = compliance.check_logs([tmp_path / "logs/r.txt"], files)
    assert {f.rule for f in findings if not f.ok} == {"three seeds", "FineWeb", "8xH100", "gain"}, compliance.table(findings)
    assert "artifact (file)" in next(f.evidence for f in findings if f.rule == "bytes")


# -------------------------------------------------------------------------------------------------- the repository's own

MASTER = ROOT / "submission.json"


@pytest.mark.skipif(not MASTER.exists(), reason="there is no submission.json yet: it is made from the logs of a real run")
def test_every_figure_of_the_submission_is_in_the_log_it_names():
    """Read from the logs anew, by their last line alone; what is computed, by exact fractions."""
    made = json.loads(MASTER.read_text(encoding="utf-8"))
    results, configs, versions = {}, {}, {}
    for seed, row in made["seed_results"].items():
        content = (ROOT / "logs" / row["log"]).read_bytes()
        lines = content.decode().splitlines()
        results[seed] = result = json.loads(lines[-1].removeprefix("result "))
        (config,) = (i for i, line in enumerate(lines) if line.startswith("config {"))
        configs[seed] = json.loads(lines[config].removeprefix("config "))
        versions[seed] = next(line for line in lines[config::-1] if line.startswith("python:"))
        assert {name: result.get(name) for name in row if name != "log"} == {name: row[name] for name in row if name != "log"}
        assert str(result["seed"]) == str(configs[seed]["seed"]) == seed
        assert hashlib.sha256(content[: result["code_bytes"]]).hexdigest() == result["code_sha256"]
        assert result["total_bytes"] == result["code_bytes"] + result["artifact_bytes"] <= 16_000_000
    first, config, score = next(iter(results.values())), next(iter(configs.values())), made["score"]
    for name in ("val_loss", "val_bpb"):
        values = [result[f"{score}_{name}"] for result in results.values()]
        assert made[name] == pytest.approx(float(sum(map(Fraction, values)) / len(values)), rel=1e-15)
        assert made[f"{name}_std"] == (pytest.approx(statistics.stdev(values), rel=1e-9) if len(values) > 1 else None)
    for name in ("total", "code"):
        assert made[f"bytes_{name}"] == max(result[f"{name}_bytes"] for result in results.values())
    assert made["data_path"] == config["data_path"] and made["tokenizer_path"] == config["tokenizer_path"]
    if first.get("date"):
        assert made["date"] == max(result["date"] for result in results.values())[:10]
    if first.get("tokenizer_sha256"):
        assert {result["tokenizer_sha256"] for result in results.values()} == {made["tokenizer_sha256"]}
    seconds = statistics.fmean(result["train_time_s"] for result in results.values())
    for text in (f"groups of {config['bitnet_group_size']}", f"{config['train_batch_tokens']:,} tokens", f"{seconds:.0f} s",
                 f"mean of {len(results)} seeds"):  # fmt: skip
        assert text in made["blurb"]
    # a run on a CPU and on the demo's text never looks like an entry of the leaderboard
    if first["device"] != "cuda":
        threads = re.search(r"threads:(\d+)", versions[str(first["seed"])])[1]
        hardware = f"{first['world_size']} x CPU process of {threads} thread{'s' * (threads != '1')}"
        assert made["hardware"] == hardware and made["track"] == "track_non_record_16mb"
        assert made["notice"].startswith(f"Not a leaderboard entry: it ran on {hardware}, not on 8 x NVIDIA H100")
        assert f"{first['val_bytes']:,} bytes of text in {config['data_path']}, not on FineWeb's" in made["notice"]
    assert len(results) == 3 and made["author"] and made["github_id"]


@pytest.mark.skipif(not MASTER.exists(), reason="there is no submission.json yet: it is made from the logs of a real run")
def test_the_submission_is_what_the_tool_makes_of_its_logs(tmp_path):
    made = json.loads(MASTER.read_text(encoding="utf-8"))
    logs = [str(ROOT / "logs" / row["log"]) for row in made["seed_results"].values()]
    options = ["--author", made["author"], "--github-id", made["github_id"], "--name", made["name"], "--date", made["date"]]
    assert make_submission.main([*options, "--out", str(tmp_path / "again.json"), *logs]) == 0
    assert (tmp_path / "again.json").read_bytes() == MASTER.read_bytes()
