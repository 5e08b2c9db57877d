"""The processes, the clock and the log; the dtype that a device computes in; files that are written whole."""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, launch, tiny_config

import train_gpt
from train_gpt import Clock, Config, Log, Sources, UserError, World, check_writable, compute_dtype


def test_one_process_is_the_same_code_with_size_1():
    world, x = World.from_env({}), torch.arange(4.0)
    assert (world.rank, world.size, world.is_main) == (0, 1, True)
    assert world.sum_(x) is x and world.gather(x) is x and torch.equal(world.sum_shares_(x), x)
    assert world.agree(0.25) == 0.25 and world.share_bytes(b"abc") == b"abc"
    world.close()


@pytest.mark.parametrize("env", [{"RANK": "x"}, {"WORLD_SIZE": "0"}, {"RANK": "2", "WORLD_SIZE": "2"}, {"RANK": "-1"}, {"LOCAL_RANK": ""}])
def test_what_torchrun_never_sets_is_an_error(env):
    with pytest.raises(UserError, match="RANK='.*' WORLD_SIZE='.*': expected what torchrun sets, or nothing"):
        World.from_env(env)


def test_one_process_of_several_speaks_before_they_have_joined():
    speaks = {rank: World.speaks({"RANK": rank, "WORLD_SIZE": "2"}) for rank in ("0", "1", "x")}
    assert speaks == {"0": True, "1": False, "x": True} and World.speaks({}) and World.speaks({"RANK": "1", "WORLD_SIZE": "1"})


def test_the_first_process_of_every_machine_speaks_and_says_where():
    """What is wrong on the second machine alone, no other knows."""
    second = {"WORLD_SIZE": "4", "GROUP_RANK": "1"}
    assert World.speaks(second | {"RANK": "2", "LOCAL_RANK": "0"}) and not World.speaks(second | {"RANK": "3", "LOCAL_RANK": "1"})
    assert World.machine(second | {"RANK": "2"}) == f" (rank 2 of 4, on {os.uname().nodename})"
    assert World.machine({}) == World.machine({"GROUP_RANK": "0", "RANK": "1", "WORLD_SIZE": "4"}) == ""


def test_the_clock_leaves_out_what_runs_paused():
    clock = Clock(World())
    with clock.paused():
        time.sleep(0.4)
    assert clock.elapsed() < 0.2
    time.sleep(0.1)
    assert 0.1 < clock.elapsed() <= clock.finish() < 0.4


def test_an_earlier_log_is_kept(tmp_path, capsys):
    for i in range(3):
        log = Log(Config(run_id="x", log_dir=str(tmp_path)), World())
        log(f"line {i}")
        log("source", console=False)
        del log  # the run ends
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {name: f"line {i}\nsource\n" for i, name in enumerate(("x.1.txt", "x.2.txt", "x.txt"))}
    assert capsys.readouterr().out == "line 0\nline 1\nline 2\n"
    Log(Config(run_id="y", log_dir=str(tmp_path)), World(rank=1, size=2))("nothing")
    assert len([*tmp_path.iterdir()]) == 3 and not capsys.readouterr().out


def test_runs_at_once_have_a_log_each_and_keep_its_name(tmp_path):
    (tmp_path / "x.txt").write_text("earlier")
    with ThreadPoolExecutor(8) as pool:  # each opens the file for itself, as processes do
        logs = [*pool.map(lambda _: Log(Config(run_id="x", log_dir=str(tmp_path)), World()), range(8))]
    for i, log in enumerate(logs):
        log(f"run {i}")
    assert sorted(log.path.read_text() for log in logs) == sorted(f"run {i}\n" for i in range(8))
    assert len({log.path for log in logs}) == 8 and tmp_path / "x.txt" in {log.path for log in logs}
    assert sorted(p.read_text() for p in tmp_path.iterdir()) == sorted(["earlier", *(f"run {i}\n" for i in range(8))])


def test_a_log_begins_with_the_bytes_of_the_file_whatever_its_line_ends(tmp_path, monkeypatch):
    source = tmp_path / "windows.py"
    source.write_bytes(b"# first\r\n# second\r\n")
    monkeypatch.setattr(train_gpt, "__file__", str(source))
    cfg = Config(run_id="x", log_dir=str(tmp_path))
    log = Log(cfg, World())
    train_gpt.log_start(cfg, World(), log, Sources(*[frozenset()] * 3), ())
    assert log.path.read_bytes().startswith(source.read_bytes() + b"\n")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_log_that_cannot_grow_ends_with_a_warning_and_the_run_goes_on(tmp_path, capsys):
    log = Log(Config(run_id="x", log_dir=str(tmp_path)), World())
    log("first")
    log._file = open("/dev/full", "wb", buffering=0)
    log("second")
    log("third")
    out, err = capsys.readouterr()
    assert out == "first\nsecond\nthird\n"
    assert err.count("\n") == 1 and f"{log.path} ends here (No space left on device)" in err


def test_a_folder_that_cannot_hold_the_log_is_named(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UserError, match=r"LOG_DIR='.*file': expected a folder where x.txt can be written"):
        Log(Config(run_id="x", log_dir=str(tmp_path / "file")), World())


def test_precision_auto_takes_what_the_gpu_has(monkeypatch):
    gpu = torch.device("cuda")
    for major, expected in ((7, torch.float16), (8, torch.bfloat16), (9, torch.bfloat16)):
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _, major=major: SimpleNamespace(major=major))
        assert compute_dtype("auto", gpu) == expected
        assert compute_dtype("bf16", gpu) == torch.bfloat16 and compute_dtype("fp16", gpu) == torch.float16
    assert compute_dtype("auto", torch.device("cpu")) == torch.float32


def test_compiled_code_can_ask_for_the_dtype(monkeypatch):
    """In one graph, without a question to the driver: what is compiled runs on GPUs with bfloat16."""
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: pytest.fail("asked"))
    function = torch.compile(lambda x, device: x.to(compute_dtype("auto", device)), backend="eager", fullgraph=True)
    for device, expected in (("cpu", torch.float32), ("cuda", torch.bfloat16)):
        assert function(torch.ones(2), torch.device(device)).dtype == expected


def test_write_whole_keeps_the_earlier_file(tmp_path, monkeypatch):
    path = tmp_path / "folder" / "model.ptz"
    train_gpt.write_whole(path, b"first")

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(train_gpt.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        train_gpt.write_whole(path, b"second")
    assert path.read_bytes() == b"first"
    assert [p.name for p in path.parent.iterdir()] == ["model.ptz"]


def test_a_path_that_cannot_be_written_is_known_before_training(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    check_writable(str(tmp_path / "new" / "model.ptz"))
    assert {p.name for p in tmp_path.rglob("*")} == {"file", "new"}
    for path, expected in ((tmp_path, "the name of a file"), (tmp_path / "file" / "x.ptz", "a file that can be written")):
        with pytest.raises(UserError, match=f"ARTIFACT_PATH='.*': expected {expected}"):
            check_writable(str(path))


def test_a_name_as_long_as_names_can_be_is_written_and_kept(tmp_path):
    path = tmp_path / ("n" * 251 + ".ptz")
    check_writable(str(path))
    for data in (b"first", b"second", b"second"):
        train_gpt.write_whole(path, data, keep=True)
    assert sorted(p.read_bytes() for p in tmp_path.iterdir()) == [b"first", b"second"] and path.read_bytes() == b"second"
    with pytest.raises(UserError, match="File name too long"):
        check_writable(str(tmp_path / ("n" * 256)))


def test_another_users_file_in_a_sticky_folder_is_known_before_training(tmp_path, monkeypatch):
    path = tmp_path / "model.ptz"
    path.write_bytes(b"theirs")
    monkeypatch.setattr(train_gpt.os, "geteuid", lambda: path.stat().st_uid + 1)
    check_writable(str(path))
    tmp_path.chmod(0o1777)
    with pytest.raises(UserError, match="a file of another user"):
        check_writable(str(path))
    check_writable(str(tmp_path / "other.ptz"))


def test_a_full_disk_is_known_before_training(tmp_path, monkeypatch):
    monkeypatch.setattr(train_gpt.shutil, "disk_usage", lambda _: SimpleNamespace(free=999))
    artifact = lambda size: ("ARTIFACT_PATH", str(tmp_path / "model.ptz"), "the artifact", size)
    train_gpt.check_room([artifact(999)])
    with pytest.raises(UserError, match=r"ARTIFACT_PATH='.*model\.ptz': 999 bytes are free there; expected 1,000 for the artifact"):
        train_gpt.check_room([artifact(1000)])
    more = ("CHECKPOINT_DIR", str(tmp_path / "not" / "there" / "x"), "CHECKPOINT_KEEP=2", 600)  # on the same disk
    with pytest.raises(UserError, match="CHECKPOINT_DIR='.*': 999 bytes are free there; expected 1,100 for the artifact, CHECKPOINT_KEEP=2"):
        train_gpt.check_room([artifact(500), more])


@pytest.mark.parametrize(("settings", "machine", "said"), [
    ({}, (2**40, 2**40), ""),
    ({"micro_batch_tokens": 2**17, "train_batch_tokens": 2**18}, (2**29, 2**29), r"MICRO_BATCH_TOKENS=131072: some \d+\.\d GiB of memory a process, of 0.5 GiB"),
    ({"micro_batch_tokens": 2**17, "train_batch_tokens": 2**18}, (2**40, 2**29), r"warning: MICRO_BATCH_TOKENS=131072: .*, of which 0.5 GiB are free"),
    ({"model_dim": 1024, "num_layers": 8}, (2**20, 2**20), r"NUM_LAYERS=8: some \d+\.\d GiB of memory a process, of 0.0 GiB"),
])  # fmt: skip
def test_too_little_memory_is_known_before_training(settings, machine, said, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train_gpt, "memory_bytes", lambda: machine)
    cfg = tiny_config(log_dir=tmp_path, artifact_path=tmp_path / "model.ptz", **settings)
    with torch.device("meta"):
        model = train_gpt.GPT(cfg)
    try:
        train_gpt.check_resources(model, World(), Log(cfg, World()), 1000)
        found = capsys.readouterr().out
    except UserError as error:
        found = f"{error}\n"
    assert re.match(said, found) and bool(said) == bool(found), found


def test_the_memory_of_a_step_is_about_what_is_expected(tmp_path):
    """The peak of a process of its own against the estimate; the kept tensors alone, so that torch's own memory does not count."""
    cfg = tiny_config(model_dim=256, num_layers=4, embed_dim=64, train_seq_len=256, yarn_max_len=256, train_batch_tokens=8192, micro_batch_tokens=4096)
    with torch.device("meta"):
        params, _ = train_gpt.count_parameters(train_gpt.GPT(cfg))
    script = f"""import sys; sys.path[:0] = [{str(ROOT)!r}]
import torch, train_gpt as t
torch.set_num_threads(1)
cfg = t.Config(**{dataclasses.asdict(cfg)!r})
cpu = torch.device("cpu")
before, model = t.peak_memory_bytes(cpu), t.GPT(cfg).use(t.fast_ops(cfg, cpu))
with t.rounded_once(model):
    step = t.TrainingStep(model, cfg, t.World())
    x = torch.randint(cfg.vocab_size, (32, 256))
    step.take(x, x)
    step.take(x, x)
print(t.peak_memory_bytes(cpu) - before)"""
    measured = int(launch({}, tmp_path, argv=["-c", script]).stdout)
    expected = 24 * params + 4096 * (train_gpt.bytes_per_token(cfg, torch.device("cpu")) - 24 * cfg.vocab_size)
    assert 0.5 < measured / expected < 1.3


SCORED = ({"model_dim": 256, "num_layers": 4}, {"model_dim": 512, "num_layers": 2, "micro_batch_tokens": 8192})


def test_the_memory_of_a_score_is_about_what_is_expected(tmp_path):
    """The peak of a process of its own against the estimate, two shapes, chunked and sliding."""
    more = {"embed_dim": 64, "train_seq_len": 256, "yarn_max_len": 256, "train_batch_tokens": 8192, "val_batch_size": 2**16}
    shapes = [dataclasses.asdict(tiny_config(**{"micro_batch_tokens": 4096} | more | shape)) for shape in SCORED]
    script = f"""import sys; sys.path[:0] = [{str(ROOT)!r}]
import ctypes, torch, train_gpt as t
torch.set_num_threads(1)
cpu = torch.device("cpu")
for shape in {shapes!r}:
    cfg = t.Config(**shape)
    model = t.GPT(cfg).use(t.fast_ops(cfg, cpu))
    for stride, count in ((0, 2 * cfg.micro_batch_tokens), (64, 256 + 64 * (cfg.micro_batch_tokens // 256))):
        val = t.ValidationSet(torch.randint(cfg.vocab_size, (count + 1,)), 4 * count)
        with t.rounded_once(model):
            ctypes.CDLL(None).malloc_trim(0)
            open("/proc/self/clear_refs", "w").write("5")  # VmHWM = VmRSS
            before = t.peak_memory_bytes(cpu)
            t.score_targets(model, val, cfg, t.World(), stride)
        print((t.peak_memory_bytes(cpu) - before) / t.scoring_bytes(cfg, t.World(), count))"""
    measured = [float(line) for line in launch({}, tmp_path, argv=["-c", script]).stdout.split()]
    assert len(measured) == 4 and all(0.5 < ratio < 1.3 for ratio in measured), measured


def test_what_is_scored_at_once_bounds_the_memory_of_a_score():
    """One window at least, however small a micro-batch is; no more windows than there are."""
    size = lambda targets, n=64, **more: train_gpt.scoring_bytes(tiny_config(train_seq_len=n, yarn_max_len=n, train_batch_tokens=8192, **more), World(), targets)
    assert size(10) == size(64, sliding_eval=0) > 0
    assert size(256, sliding_eval=0) * 2 == size(512, sliding_eval=0)


def test_a_machine_has_the_memory_that_its_system_says():
    """A third party's word: what the C library says of the pages."""
    most, free = train_gpt.memory_bytes()
    assert 0 < free <= most and most <= 1.01 * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def test_what_a_killed_run_left_half_written_goes_and_what_is_being_written_stays(tmp_path):
    for name in (".123.456.partial", ".7.8.partial"):
        (tmp_path / name).write_bytes(b"half")
    for name in ("partial", ".mine.partial", ".1.2.partial.txt"):
        (tmp_path / name).write_bytes(b"a user's")
    held = []

    def parts():
        yield b"first "
        check_writable(str(tmp_path / "other.ptz"))
        held.extend(tmp_path.glob(".*.*.partial"))
        yield b"second"

    train_gpt.write_whole(tmp_path / "model.ptz", parts())
    assert (tmp_path / "model.ptz").read_bytes() == b"first second" and len(held) == 1 and str(os.getpid()) in held[0].name
    assert {p.name for p in tmp_path.iterdir()} == {"model.ptz", "partial", ".mine.partial", ".1.2.partial.txt"}


def test_an_artifact_that_cannot_be_written_any_more_is_saved_elsewhere(tmp_path, monkeypatch, capsys):
    """ARTIFACT_PATH, then beside the log, then the folder for temporary files: wherever the bytes are, the line says it."""
    blocked = tmp_path / "file"
    blocked.write_bytes(b"not a folder")
    log = Log(Config(run_id="x", log_dir=str(tmp_path / "logs")), World())
    cfg = Config(artifact_path=str(blocked / "model.ptz"))
    assert train_gpt.save_bytes(b"model", cfg, log) == str(tmp_path / "logs" / "x.ternary.ptz")
    assert (tmp_path / "logs" / "x.ternary.ptz").read_bytes() == b"model"
    assert str(blocked) in capsys.readouterr().err
    log.path = blocked / "x.txt"
    monkeypatch.setattr(train_gpt.tempfile, "gettempdir", lambda: str(tmp_path / "temporary"))
    assert train_gpt.save_bytes(b"model", cfg, log) == str(tmp_path / "temporary" / "x.ternary.ptz")
    monkeypatch.setattr(train_gpt.tempfile, "gettempdir", lambda: str(blocked))
    with pytest.raises(UserError, match="ARTIFACT_PATH=.*file elsewhere"):
        train_gpt.save_bytes(b"model", cfg, log)


def test_srun_without_torchrun_is_refused_and_says_how():
    with pytest.raises(UserError, match="SLURM_PROCID='1' SLURM_NTASKS='4' without RANK.*torchrun"):
        World.from_env({"SLURM_PROCID": "1", "SLURM_NTASKS": "4"})
    assert World.from_env({"SLURM_PROCID": "0", "SLURM_NTASKS": "1"}).size == 1


def test_the_interface_is_named_where_processes_cannot_join(monkeypatch):
    def nothing(*_, **__):
        raise RuntimeError("Unable to find address for: nosuch0")

    monkeypatch.setattr(train_gpt.dist, "init_process_group", nothing)
    env = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}
    with pytest.raises(UserError, match="GLOO_SOCKET_IFNAME='nosuch0' a network interface here"):
        World.from_env(env | {"GLOO_SOCKET_IFNAME": "nosuch0"})
    with pytest.raises(UserError, match="start with torchrun"):
        World.from_env(env)


def test_the_commit_of_a_file_that_git_does_not_track_is_unknown(tmp_path, monkeypatch):
    def git(*arguments):
        subprocess.run(["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b", *arguments], check=True, capture_output=True)

    for name in ("tracked.py", "copy.py"):
        (tmp_path / name).write_text("code")
    git("init")
    git("add", "tracked.py")
    git("commit", "-m", "first")
    monkeypatch.setattr(train_gpt, "__file__", str(tmp_path / "tracked.py"))
    commit = train_gpt.git_commit()
    assert len(commit) == 40
    (tmp_path / "tracked.py").write_text("changed")
    assert train_gpt.git_commit() == commit + "+"
    monkeypatch.setattr(train_gpt, "__file__", str(tmp_path / "copy.py"))
    assert train_gpt.git_commit() == "unknown"
