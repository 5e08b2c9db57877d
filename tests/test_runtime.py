"""The processes, the clock and the log; the dtype that a device computes in; files that are written whole."""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest
import torch

import train_gpt
from train_gpt import Clock, Config, Log, UserError, World, check_writable, compute_dtype


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


def test_the_clock_leaves_out_what_runs_paused():
    clock = Clock(World())
    with clock.paused():
        time.sleep(0.4)
    assert clock.elapsed() < 0.2
    time.sleep(0.1)
    assert 0.1 < clock.elapsed() <= clock.finish() < 0.4


def test_an_earlier_log_is_kept(tmp_path, capsys):
    for i in range(3):
        log = Log(Config(run_id="x"), World(), folder=str(tmp_path))
        log(f"line {i}")
        log("source", console=False)
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {name: f"line {i}\nsource\n" for i, name in enumerate(("x.1.txt", "x.2.txt", "x.txt"))}
    assert capsys.readouterr().out == "line 0\nline 1\nline 2\n"
    Log(Config(run_id="y"), World(rank=1, size=2), folder=str(tmp_path))("nothing")
    assert len([*tmp_path.iterdir()]) == 3 and not capsys.readouterr().out


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
