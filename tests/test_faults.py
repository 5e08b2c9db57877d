"""Several processes of which one dies, stands still, hangs, fails, or has other settings, code, data or weights: it is named."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import signal

import pytest
import torch
from conftest import ROOT, TINY, Running, fresh_model, of_ranks, on_processes, tiny_config

import train_gpt
from train_gpt import UserError, World

LOOKS = LOOK_S, SILENT, FAILED, TRAINING = 0.25, 8, 4, 8  # instead of Watch's own
WATCH = train_gpt.Watch
# The script with seconds for what waits a minute, and a fault on one process
FAULTY = """
import os, signal, sys, time
sys.path[:0] = [{root!r}]
import torch, train_gpt
train_gpt.Watch.LOOK_S, train_gpt.Watch.SILENT, train_gpt.Watch.FAILED, train_gpt.Watch.TRAINING = {looks}
rank, calls = int(os.environ["RANK"]), 0
def fault():
    {fault}
take = train_gpt.TrainingStep.take
def faulty(step, *batch):
    global calls
    calls += 1
    if rank == {rank} and calls == 6:
        fault()
    take(step, *batch)
train_gpt.TrainingStep.take = faulty
{before}
sys.exit(train_gpt.run_until_stopped([]))
"""


def run_by_hand(env, cwd, count=2, rank=1, fault="pass", before="", envs=None):
    """Each process's (stderr, exit code), without anything that would end the others; one that is stopped is killed then."""
    script = cwd / "faulty.py"
    script.write_text(FAULTY.format(root=str(ROOT), fault=fault, rank=rank, before=before, looks=LOOKS))
    with contextlib.ExitStack() as stack:
        runs = [stack.enter_context(Running(env | own | (envs or {}).get(r, {}), cwd, [str(script)])) for r, own in enumerate(of_ranks(count))]
        return {r: run.end()[::-1] for r, run in enumerate(runs) if not ("SIGSTOP" in fault and r == rank)}


def environment(data_dir, **settings):
    paths = {"DATA_PATH": str(data_dir), "TOKENIZER_PATH": str(data_dir / "tokenizer.model"), "SLIDING_EVAL": "0", "TEMP_SCALING": "0"}
    return TINY | paths | {"ITERATIONS": "1000000"} | {key.upper(): str(value) for key, value in settings.items()}


@pytest.mark.parametrize(("fault", "said"), [
    ("os.kill(os.getpid(), signal.SIGKILL)", f"has ended or stands still: no sign of life for {FAILED * LOOK_S:.0f} s"),
    ("os.kill(os.getpid(), signal.SIGSTOP)", f"has ended or stands still: no sign of life for {SILENT * LOOK_S:.0f} s"),
    ("time.sleep(1000)", f"hangs: the others have waited for it for {TRAINING * LOOK_S:.0f} s"),
    ("raise train_gpt.UserError('DISK=b: gone')", "failed: DISK=b: gone"),
    ("raise ValueError('a defect')", "failed: a defect"),
])  # fmt: skip
def test_a_process_that_is_missing_is_named(fault, said, data_dir, tmp_path):
    ends = run_by_hand(environment(data_dir), tmp_path, fault=fault)
    err, code = ends[0]
    assert code == 1 and err.startswith("train_gpt.py: rank 1 of 2 on ") and err.count("\n") == 1 and said in err, err


def test_a_process_that_fails_before_the_others_have_met_says_so_itself(tmp_path, monkeypatch, capsys):
    """Unless rank 0 has said the same in the meantime, whereupon torchrun ends it."""
    slept = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train_gpt.time, "sleep", slept.append)
    for name, text in {"RANK": "1", "WORLD_SIZE": "2", "TOKENIZER_PATH": "nowhere.model"}.items():
        monkeypatch.setenv(name, text)
    assert train_gpt.run([]) == 2 and slept == [3]
    assert capsys.readouterr().err == "train_gpt.py: rank 1 of 2: TOKENIZER_PATH='nowhere.model': no such file; expected a SentencePiece model\n"


def other_data(folder, change):
    """A copy of the data with a change, as a Config's paths."""
    data_dir, other = folder
    shutil.copytree(data_dir, other)
    change(other)
    return {"data_path": str(other), "tokenizer_path": str(other / "tokenizer.model")}


DIFFERENCES = {
    "rate": ({"matrix_lr": 0.05}, "MATRIX_LR=0.05 on rank 1, but 0.04 on rank 0"),
    "option": ({"resume": "1"}, "RESUME=1 on rank 1, but  on rank 0"),
    "torch": ({}, "torch=9.9 on rank 1, but 2.* on rank 0"),
    "code": ({}, "code=[0-9a-f]{64} on rank 1, but [0-9a-f]{64} on rank 0"),
    "train": (lambda d: (d / "fineweb_train_000001.bin").unlink(), "data=1 shards, .* on rank 1, but 2 shards, .* on rank 0"),
    "val": (lambda d: (d / "fineweb_val_000000.bin").unlink(), "validation=0 shards, .* on rank 1, but 1 shards, .* on rank 0"),
    "manifest": (lambda d: (d / "manifest.json").write_text("{}"), "data=2 shards, .* on rank 1, but 2 shards, .* on rank 0"),
    "tokenizer": (lambda d: (d / "tokenizer.model").write_bytes(b"x"), "tokenizer=.* on rank 1, but .* on rank 0"),
}  # fmt: skip


@pytest.mark.parametrize("kind", DIFFERENCES)
def test_processes_that_differ_are_named(kind, data_dir, tmp_path, monkeypatch):
    change, said = DIFFERENCES[kind]
    paths = {"data_path": str(data_dir), "tokenizer_path": str(data_dir / "tokenizer.model")}
    more = other_data((data_dir, tmp_path / "other"), change) if callable(change) else change
    watch = train_gpt.Watch.__new__(train_gpt.Watch)
    watch.world, watch.stores = World(0, 2), [None, torch.distributed.HashStore()]
    with monkeypatch.context() as m:
        if kind == "torch":
            m.setattr(torch, "__version__", "9.9")
        if kind == "code":
            (tmp_path / "copy.py").write_text("other")
            m.setattr(train_gpt, "__file__", str(tmp_path / "copy.py"))
        theirs = train_gpt.run_identity(tiny_config(run_id="theirs", artifact_path="theirs", **paths | more), b"")
    watch.stores[1].set("facts1", json.dumps(theirs))
    with pytest.raises(UserError, match=f"^{said}; expected the same on all 2 processes$"):
        watch.compare(tiny_config(run_id="ours", **paths), b"")
    same = train_gpt.run_identity(tiny_config(run_id="theirs", log_dir="theirs", **paths), b"")
    watch.stores[1].set("facts1", json.dumps(same))
    watch.compare(tiny_config(run_id="ours", **paths), b"")


def test_artifacts_that_differ_are_named(data_dir):
    cfg = tiny_config(eval_only=True, data_path=str(data_dir))
    ours, theirs = (train_gpt.run_identity(cfg, artifact) for artifact in (b"ours", b"theirs"))
    assert [name for name in ours if ours[name] != theirs[name]] == ["artifact"]


def test_processes_that_differ_end_before_the_first_step(data_dir, tmp_path):
    ends = run_by_hand(environment(data_dir), tmp_path, envs={1: {"SEED": "8"}})
    assert ends[0] == ("train_gpt.py: SEED=8 on rank 1, but 7 on rank 0; expected the same on all 2 processes\n", 2)
    assert not (tmp_path / "logs").exists()


def watched(looks, calls=(5, 5), words=("", ""), count=2, rank=0, beating=(True, True), patience=WATCH.TRAINING):
    """What a Watch of rank 0 finds after so many looks at the same two processes."""
    watch = train_gpt.Watch.__new__(train_gpt.Watch)
    watch.world, watch.silent, watch.patience = World(rank, count), watch.SILENT, patience
    watch.looks = [[-1, -1, "", 0, 0, 0] for _ in range(count)]
    for i in range(looks + 1):
        found = watch.missing([(i * beating[r], calls[r], words[r], f"host{r}") for r in range(count)])
    return found


@pytest.mark.parametrize(("case", "found"), [
    ({"looks": 1000}, {}),  # nobody waits for anybody: all compute
    ({"looks": WATCH.SILENT - 1, "beating": (True, False)}, {}),
    ({"looks": WATCH.SILENT, "beating": (True, False)}, {1: f"rank 1 of 2 on host1 has ended or stands still: no sign of life for {WATCH.SILENT} s"}),
    ({"looks": WATCH.TRAINING - 1, "calls": (6, 5)}, {}),
    ({"looks": WATCH.TRAINING, "calls": (6, 5)}, {1: f"rank 1 of 2 on host1 hangs: the others have waited for it for {WATCH.TRAINING} s"}),
    ({"looks": WATCH.TRAINING, "calls": (5, 6)}, {0: f"rank 0 of 2 on host0 hangs: the others have waited for it for {WATCH.TRAINING} s"}),
    ({"looks": WATCH.WAITING - 1, "calls": (6, 5), "patience": WATCH.WAITING}, {}),  # it compiles, or exports
    ({"looks": 1000, "beating": (True, False), "words": ("", "done")}, {}),
    ({"looks": WATCH.FAILED - 1, "words": ("", "disk full")}, {}),  # rank 0 may be about to say the same
    ({"looks": WATCH.FAILED, "words": ("", "disk full")}, {1: "rank 1 of 2 on host1 failed: disk full"}),
    ({"looks": 1000, "words": ("disk full", "")}, {}),  # its own
], ids=str)  # fmt: skip
def test_what_a_process_makes_of_the_others(case, found):
    assert watched(**case) == found


def test_the_page_of_faults_has_the_seconds_of_the_code():
    """Of each fault's row."""
    page = (ROOT / "docs/faults.md").read_text()
    row = lambda start: next(line for line in page.splitlines() if line.startswith(f"| {start}"))
    seconds = lambda looks: f" {looks * WATCH.LOOK_S:.0f} s"
    for start, expected in {"killed": [WATCH.FAILED], "stopped": [WATCH.SILENT], "cut network": [WATCH.SILENT], "fails alone": [WATCH.FAILED],
                            "hangs": [WATCH.TRAINING, WATCH.WAITING]}.items():  # fmt: skip
        assert all(seconds(looks) in row(start) for looks in expected), start
    assert f"within {train_gpt.StopRequest.AGAIN_S:.0f} s" in page


STALLED = """
watch_store = train_gpt.Watch.say
def stall():
    train_gpt.Watch.say = lambda *_: time.sleep(1000)
"""


def test_a_store_that_does_not_answer_ends_the_process(data_dir, tmp_path):
    """As behind a cut cable: the call of the store does not come back. Rank 0 has one that does, and names the other."""
    ends = run_by_hand(environment(data_dir), tmp_path, fault="stall()", before=STALLED)
    assert [code for _, code in ends.values()] == [1, 1]
    assert re.match(rf"train_gpt.py: \S+ cannot be reached: no answer for {SILENT * LOOK_S:.0f} s\n", ends[1][0]), ends[1][0]
    assert ends[0][0].startswith("train_gpt.py: rank 1 of 2 on ")


@pytest.mark.parametrize(("signals", "after_s", "number", "at_once"), [
    (["SIGTERM", "SIGTERM"], 0, "SIGTERM", False),  # a queue's, and the same passed on by torchrun
    (["SIGTERM", "SIGTERM"], 6, "SIGTERM", True),
    (["SIGUSR1", "SIGUSR1"], 6, "SIGUSR1", False),
    (["SIGUSR1", "SIGTERM"], 6, "SIGTERM", False),  # the limit after its warning
    (["SIGTERM", "SIGUSR1"], 6, "SIGTERM", False),
])  # fmt: skip
def test_a_second_signal(signals, after_s, number, at_once, monkeypatch):
    now, caught = [0.0], []
    monkeypatch.setattr(train_gpt.time, "monotonic", lambda: now[0])
    kept = {each: signal.signal(each, lambda n, _: caught.append(n)) for each in train_gpt.StopRequest.SIGNALS}
    try:
        with train_gpt.StopRequest() as request:
            for name in signals:
                signal.raise_signal(signal.Signals[name])
                now[0] += after_s
        assert signal.Signals(request.number).name == number and bool(caught) == at_once
    finally:
        for each, handler in kept.items():
            signal.signal(each, handler)


def differing(world):
    """What is said of a bit that differs in one parameter of rank 1, and that nothing is said before."""
    cfg = tiny_config(check_replicas_every=3)
    torch.manual_seed(cfg.seed)
    model, said = fresh_model(cfg), []
    with train_gpt.rounded_once(model):
        step = train_gpt.TrainingStep(model, cfg, world)
        (hook,) = [hook for hook in step.hooks if isinstance(hook, train_gpt.Replicas)]
        for where in ("nowhere", "blocks.1.mlp.up.weight", "vocab_bias", "embed_in.weight"):
            before = [p.detach().clone() for p in model.parameters()]
            name, module, p, _ = next((o for o in train_gpt.parameter_owners(model) if o[0] == where), (None,) * 4)
            if name and world.rank == 1:
                getattr(module, "operand", p).detach().view(-1)[7] *= 1.0000002 if name == "vocab_bias" else -1
                getattr(module, "operand", p).detach().view(-1)[8] += 1
            try:
                said.append([hook.after_step(k, 0.0) for k in range(3)])
            except UserError as error:
                said.append(str(error))
            for p, w in zip(model.parameters(), before, strict=True):
                p.data.copy_(w)
            step.publish()
    return said


def test_weights_that_differ_are_named_with_their_step(tmp_path):
    said = on_processes(2, tmp_path, "test_faults.differing")[0]
    start = "CHECK_REPLICAS_EVERY=3: {} of rank 1 differs from rank 0's at step 3; see docs/faults.md"
    assert said == [["", "", ""], *(start.format(name) for name in ("blocks.1.mlp.up.weight", "vocab_bias", "embed_in.weight"))]
