"""The rules of the challenge, each broken once; the folder that is submitted; both on made-up logs and on a real run's."""

from __future__ import annotations

import hashlib
import json
import math
import re

import compliance
import make_submission
import numpy as np
import pack_code
import pytest
from conftest import ROOT, TINY, launch, write_shard

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
    "stride": 16, "val_tokens": TARGETS, "val_bytes": 151_080_891, "eval_time_s": 429.5,
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
    path.write_text(code.decode() + "\n" + (edit(text) if edit else text))
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
    assert len(findings) == 11 * 3 + 2 and len(shown) == 13  # eleven rules a seed, two of all seeds


def without(start):
    return lambda text: "".join(line for line in text.splitlines(keepends=True) if not line.startswith(start))


def replaced(old, new):
    return lambda text: text.replace(old, new)


ONE_SEED_BREACHES = {
    "training over 600,000 ms": ({"train_time_s": 600.001}, {"training time"}),
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
    "unfinished": ({"edit": lambda text: text.split("result {")[0]}, {"log lines", "three seeds"}),
}


@pytest.mark.parametrize("case", ONE_SEED_BREACHES)
def test_a_broken_rule_is_found_and_no_other(folder, code, case):
    change, rules = ONE_SEED_BREACHES[case]
    assert breaches(write_runs(folder, code, **change)) == rules


def test_too_few_seeds_and_other_code(folder, code):
    paths = write_runs(folder, code)
    assert breaches(paths[:2]) == {"three seeds"}
    paths[2] = write_run(folder, pack_code.pack((ROOT / "train_gpt.py").read_text() + "SPARE = 1\n"), 7)
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
    "attend=flash_attention_3(cfg) or attend": "attend=SPOILED",
    "qk_norm_rope=QKNormRope.apply": "qk_norm_rope=SPOILED",
    '{"poly": poly_softcap}': '{"poly": SPOILED}',
    '"FP8": Float8()': '"FP8": SPOILED',
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
    (folder / "none.json").write_text("{}")
    with pytest.raises(compliance.UserError):
        compliance.read_record(folder / "none.json")


def test_command_line_of_compliance(folder, code, capsys):
    paths = list(map(str, write_runs(folder, code)))
    assert compliance.main([*paths, "--record-losses", *map(str, RECORD)]) == 0
    assert "BREACHES" not in capsys.readouterr().out
    assert compliance.main(paths) == 0 and "no record was given" in capsys.readouterr().out
    assert compliance.main(paths[:2]) == 1
    out = capsys.readouterr().out
    assert re.search(r"^FAIL +three seeds", out, re.M) and "BREACHES: three seeds" in out
    assert compliance.main([*paths, "--code", "missing.py"]) == 2 and capsys.readouterr().err.count("\n") == 1


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
    others = {"README.md", "submission.json", "train_gpt.py", "requirements.txt", "tokenizer.model"}
    assert {p.name for p in made.iterdir()} == set(logs) | others and [p.name for p in made.parent.iterdir()] == [made.name]
    assert (made / "train_gpt.py").read_bytes() == code and (made / "tokenizer.model").read_bytes() == b"a tokenizer"
    submission = json.loads((made / "submission.json").read_text())
    assert submission["val_loss"] == pytest.approx((2.982 + 2.981 + 2.985) / 3)
    assert submission["val_loss_std"] == pytest.approx(np.std([2.982, 2.981, 2.985], ddof=1))
    assert set(submission["seed_results"]) == {str(seed) for seed in SEEDS} and submission["github_id"] == "author"
    readme = (made / "README.md").read_text()
    assert all(f"| {seed} | 1.15000 | " in readme for seed in SEEDS) and "# Ternary U-Net" in readme and "/tmp" not in readme
    assert "one file, packed" in readme and not (folder / "submission.json").exists()


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
    assert not [p for p in folder.glob("records/**/*") if p.is_file() or p.name != "track_10min_16mb"]


def test_a_folder_that_is_there_is_replaced_only_by_force(folder, code, capsys):
    paths = write_runs(folder, code)
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
    (("--records", "records", "--name", "x", "--record", "missing.json"), "missing.json"),
])  # fmt: skip
def test_folder_options_are_refused_in_one_line(folder, code, capsys, options, message):
    assert make_submission.main(["--author", "A", "--github-id", "a", *options, *map(str, write_runs(folder, code))]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not list(folder.glob("records/*/*"))


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
