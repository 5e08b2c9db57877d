"""A run that is killed and resumed ends with the bytes of one that never was; whatever is wrong with a checkpoint is said."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import re
import signal
import threading

import arms
import pytest
import torch
from conftest import TINY, Running, fresh_model, launch, on_processes, tiny_config
from test_presets import tiny_arm

import train_gpt
from train_gpt import ArtifactError, Log, Stopped, TrainingStep, UserError, World, read_checkpoint, save_artifact, train

STATES = [{}, {"precision": "fp16"}, {"ema": 1, "ema_decay": 0.9, "ema_start_fraction": 0.2}, {"untie_at_fraction": 0.4, "warmup_steps": 2},
          {"churn_log_every": 3}, {"grad_clip_norm": 0.5, "ternary_commit_lambda": 0.01}, {"seq_len_start": 16, "seq_schedule_fraction": 0.5},
          {"weight_quant": "none"}, {"act_quant": "fp8"}, {"mtp_heads": 1, "bigram_hash": 1}, {"tie_embeddings": 0, "lr_warmup_steps": 3},
          *({"matrix_optimizer": name} for name in ("muon_plain", "normuon", "normuon126", "adamw", "fro", "fro_stable"))]  # fmt: skip


class Killed(Exception): ...


def config(data_dir, folder, **settings):
    paths = {"data_path": data_dir, "tokenizer_path": data_dir / "tokenizer.model", "checkpoint_dir": folder / "checkpoints", "log_dir": folder / "logs"}
    return tiny_config(**{"iterations": 10, "run_id": "x", "temp_scaling": 0, "checkpoint_every": 3, "num_layers": 2} | paths | settings)


def trained(cfg, killed_at=0, world=None):
    """(artifact, figures) of a run; `killed_at`: the step that is not taken any more."""
    torch.manual_seed(cfg.seed)
    model, take, world = fresh_model(cfg), TrainingStep.take, world or World()

    def killed(step, *batch):
        if step.hooks and getattr(step.hooks[-1], "loop", None) and step.hooks[-1].loop.step == killed_at:
            step.hooks[-1].finish()  # the file that is being written; what a real kill leaves of it is another test
            raise Killed
        take(step, *batch)

    if killed_at:
        TrainingStep.take = killed
    try:
        figures = train(model, cfg, world, Log(cfg, world), None)
    finally:
        TrainingStep.take = take
    return save_artifact(model, cfg), figures


@pytest.mark.parametrize("state", STATES, ids=str)
def test_a_resumed_run_ends_with_the_same_bytes(state, data_dir, tmp_path):
    cfg = config(data_dir, tmp_path, iterations=7, checkpoint_every=2, **state)
    expected, _ = trained(dataclasses.replace(cfg, checkpoint_every="0"))
    with pytest.raises(Killed):
        trained(cfg, killed_at=5)
    assert sorted(p.name for p in (tmp_path / "checkpoints").glob("*.ckpt")) == ["x_00000002.ckpt", "x_00000004.ckpt"]
    blob, figures = trained(dataclasses.replace(cfg, resume="1"))
    assert blob == expected and (figures["steps"], figures["restarts"]) == (7, 1) and len(figures["first_losses"]) == 7


@pytest.mark.parametrize("preset", sorted(arms.SYSTEMS))
def test_every_preset_goes_on_alike(preset, data_dir, tmp_path):
    settings = tiny_arm(preset, data_dir, run_id="x", iterations=6, checkpoint_every=2, temp_scaling=0, max_wallclock_seconds=0, artifact_codec="2bit")
    cfg = train_gpt.Config.from_env(settings | {"CHECKPOINT_DIR": str(tmp_path / "c"), "LOG_DIR": str(tmp_path / "logs")})
    expected, _ = trained(dataclasses.replace(cfg, checkpoint_every="0"))
    with pytest.raises(Killed):
        trained(cfg, killed_at=5)
    blob, figures = trained(dataclasses.replace(cfg, resume="1"))
    assert blob == expected and figures["restarts"] == 1


def test_checkpoints_change_nothing_and_the_oldest_go(data_dir, tmp_path):
    cfg = config(data_dir, tmp_path, checkpoint_every=2, checkpoint_keep=3)
    assert trained(cfg)[0] == trained(dataclasses.replace(cfg, checkpoint_every="0"))[0]
    assert sorted(p.name for p in (tmp_path / "checkpoints").glob("*.ckpt")) == [f"x_{n:08d}.ckpt" for n in (6, 8, 10)]


def test_those_of_other_runs_in_the_folder_stay(data_dir, tmp_path):
    cfg = config(data_dir, tmp_path, checkpoint_every=3)
    for run_id in ("x", "x_1", "y"):
        trained(dataclasses.replace(cfg, run_id=run_id, checkpoint_keep=1))
    assert sorted(p.name for p in (tmp_path / "checkpoints").glob("*.ckpt")) == [f"{name}_00000009.ckpt" for name in ("x", "x_1", "y")]


def test_a_longer_run_goes_on_from_a_shorter_ones_end(data_dir, tmp_path):
    cfg = config(data_dir, tmp_path, warmdown_fraction=0)
    expected, _ = trained(dataclasses.replace(cfg, iterations=14, checkpoint_every="0"))
    trained(dataclasses.replace(cfg, checkpoint_every="10"))
    assert trained(dataclasses.replace(cfg, iterations=14, resume="1"))[0] == expected


def saved_by_two(world):
    cfg = train_gpt.Config(**json.loads(os.environ["CFG"]))
    if os.environ.get("KILL"):
        try:
            trained(cfg, killed_at=8, world=world)
        except Killed:
            return "killed"
    return hashlib.sha256(trained(dataclasses.replace(cfg, resume="1"), world=world)[0]).hexdigest()


@pytest.mark.parametrize("first", [1, 2])
def test_another_number_of_processes_goes_on_alike(first, data_dir, tmp_path, monkeypatch):
    """Written by one, gone on with by two, and the other way round."""
    cfg = config(data_dir, tmp_path, matrix_optimizer="normuon", ema=1)
    expected = hashlib.sha256(trained(dataclasses.replace(cfg, checkpoint_every="0", log_dir=str(tmp_path / "o")))[0]).hexdigest()
    import conftest

    plain = conftest.launch
    for turn, count in enumerate((first, 3 - first)):
        more = {"CFG": json.dumps(dataclasses.asdict(cfg), default=str)} | ({} if turn else {"KILL": "1"})
        monkeypatch.setattr(conftest, "launch", lambda env, *rest, more=more, **named: plain(env | more, *rest, **named))
        found = on_processes(count, tmp_path, "test_checkpoints.saved_by_two")
    assert found == [expected]


def test_what_must_stay_the_same_is_named(data_dir, tmp_path):
    cfg = config(data_dir, tmp_path)
    with pytest.raises(Killed):
        trained(cfg, killed_at=5)
    with pytest.raises(UserError, match="RESUME='1': LOGIT_SOFTCAP=12.0, but the checkpoint has 10.0"):
        trained(dataclasses.replace(cfg, resume="1", logit_softcap=12.0))
    shard = tmp_path / "data"
    shard.mkdir()
    for path in data_dir.iterdir():
        (shard / path.name).write_bytes(path.read_bytes())
    (shard / "fineweb_train_000001.bin").unlink()
    with pytest.raises(UserError, match="RESUME='1': data=.*, but the checkpoint has "):
        trained(dataclasses.replace(cfg, resume="1", data_path=str(shard)))
    with pytest.raises(UserError, match="RESUME='nowhere': expected 1 or the path of a checkpoint"):
        trained(dataclasses.replace(cfg, resume="nowhere"))
    for off in ("0", ""):
        assert trained(dataclasses.replace(cfg, resume=off))[1]["restarts"] == 0


def test_without_a_checkpoint_it_starts_and_says_so(data_dir, tmp_path, capsys):
    cfg = config(data_dir, tmp_path, resume="1", iterations=3)
    _, figures = trained(cfg)
    assert figures["steps"] == 3 and figures["restarts"] == 0 and "no checkpoint in" in capsys.readouterr().out


def test_a_damaged_newest_one_is_passed_over(data_dir, tmp_path, capsys):
    cfg = config(data_dir, tmp_path)
    expected, _ = trained(dataclasses.replace(cfg, checkpoint_every="0"))
    with pytest.raises(Killed):
        trained(cfg, killed_at=8)
    newest = tmp_path / "checkpoints" / "x_00000006.ckpt"
    data = bytearray(newest.read_bytes())
    data[len(data) // 2] ^= 1
    newest.write_bytes(data)
    blob, _ = trained(dataclasses.replace(cfg, resume="1"))
    out = capsys.readouterr().out
    assert blob == expected and "x_00000006.ckpt: the checkpoint is damaged" in out and "resumed step:3" in out


def test_every_damage_is_one_error(data_dir, tmp_path):
    """Cut, extended, bytes exchanged, and headers that lie with a matching SHA-256."""
    with pytest.raises(Killed):
        trained(config(data_dir, tmp_path), killed_at=4)
    (path,) = (tmp_path / "checkpoints").glob("*.ckpt")
    good = path.read_bytes()
    header, tensors = read_checkpoint(path)
    assert header["step"] == 3 and all(t.dtype in train_gpt.TENSOR_TYPES.values() for t in tensors.values())
    forged = []
    for change in ({"step": -1}, {"step": "x"}, {"step": None}, {"step": 10**300}, {"elapsed_s": float("nan")}, {"position": []}):
        forged.append(b"".join(train_gpt.checkpoint_chunks(header | change, tensors)))
    for described in ([["a", "float32", [1 << 60]]], [["a", "float32", [0, 1 << 70]], ["b", "uint8", [64]]], [["a", "float32", [1e999]]], [["a", "float32", [-1, 0]], ["b", "uint8", [64]]], [["a", "float16", [1]]], [["a", "float32", [-1]]], [["a"]], "x", [["a", "float32", "x"]]):
        text = json.dumps(header | {"tensors": described}).encode()
        body = train_gpt.CHECKPOINT_PREFIX.pack(b"TGCK", 1, len(text)) + text + bytes(64)
        forged.append(body + hashlib.sha256(body).digest())
    forged.append(b"".join(train_gpt.checkpoint_chunks(header, tensors | {"a\nb": torch.tensor([math.nan])})))  # bench/fuzz.py found it
    cases = [b"", good[:10], good[:-1], good + b"x", b"X" + good[1:], good[:4] + b"\x09" + good[5:], *forged]
    for case in cases:
        path.write_bytes(case)
        with pytest.raises(ArtifactError) as error:
            read_checkpoint(path)
        assert str(error.value).isprintable()


def test_a_forged_checkpoint_is_one_error(data_dir, tmp_path):
    """A matching SHA-256 before contents that are no run's."""
    cfg = config(data_dir, tmp_path, ema=1, ema_start_fraction=0.1)
    with pytest.raises(Killed):
        trained(cfg, killed_at=4)
    (path,) = (tmp_path / "checkpoints").glob("*.ckpt")
    header, tensors = read_checkpoint(path)
    without = {name: t for name, t in tensors.items() if not name.startswith("hook.Averaging.3")}
    assert len(without) < len(tensors)
    for change in ({"same": []}, {"numbers": 0}, {"restarts": "x"}, {"lost_steps": float("inf")}, {"first_losses": 1}, {}):
        path.write_bytes(b"".join(train_gpt.checkpoint_chunks(header | change, tensors if change else without)))
        with pytest.raises(ArtifactError, match="RESUME='1': what the checkpoint holds is not valid"):
            trained(dataclasses.replace(cfg, resume="1"))
    path.write_bytes(b"".join(train_gpt.checkpoint_chunks(header | {"same": header["same"] | {"UNET": "a\n" * 999}}, tensors)))
    with pytest.raises(UserError, match="^RESUME='1': UNET=True, but the checkpoint has [a ]{80}; a run goes on with the same$"):
        trained(dataclasses.replace(cfg, resume="1"))


def test_a_checkpoint_from_before_a_setting_means_that_it_is_off(data_dir, tmp_path):
    cfg = config(data_dir, tmp_path, smear_gate=0, key_offset=0)
    expected, _ = trained(dataclasses.replace(cfg, checkpoint_every="0"))
    with pytest.raises(Killed):
        trained(cfg, killed_at=4)
    (path,) = (tmp_path / "checkpoints").glob("*.ckpt")
    header, tensors = read_checkpoint(path)
    same = {name: value for name, value in header["same"].items() if name not in ("SMEAR_GATE", "KEY_OFFSET")}
    path.write_bytes(b"".join(train_gpt.checkpoint_chunks(header | {"same": same}, tensors)))
    with pytest.raises(UserError, match="RESUME='1': SMEAR_GATE=True, but the checkpoint has False"):
        trained(dataclasses.replace(cfg, resume="1", smear_gate=True))
    with pytest.raises(UserError, match="RESUME='1': KEY_OFFSET=True, but the checkpoint has False"):
        trained(dataclasses.replace(cfg, resume="1", key_offset=True))
    assert trained(dataclasses.replace(cfg, resume="1"))[0] == expected


def test_a_heartbeat_that_is_none_is_as_good_as_without(data_dir, tmp_path):
    cfg = config(data_dir, tmp_path)
    with pytest.raises(Killed):
        trained(cfg, killed_at=4)
    for beat in ("[", "[" * 3000, '{"lineage": "x"}', '{"lineage": "x", "step": null, "elapsed_s": 1}'):
        (tmp_path / "checkpoints" / "heartbeat.json").write_text(beat)
        assert trained(dataclasses.replace(cfg, resume="1", checkpoint_every="0"))[1]["lost_steps"] == 0


def environment(data_dir, **settings):
    paths = {"DATA_PATH": str(data_dir), "TOKENIZER_PATH": str(data_dir / "tokenizer.model"), "SLIDING_EVAL": "0", "TEMP_SCALING": "0"}
    return TINY | paths | {key.upper(): str(value) for key, value in settings.items()}


def signalled(env, folder, line, number):
    """(exit code, stderr) of a run that gets a signal once it has printed a line that starts so."""
    with Running(env, folder) as run:
        run.until(line)
        run.child.send_signal(number)
        return run.end()


def test_a_killed_process_is_gone_on_with(data_dir, tmp_path):
    env = environment(data_dir, iterations=40, checkpoint_every=7, train_log_every=1)
    whole = launch(env | {"CHECKPOINT_EVERY": "0", "ARTIFACT_PATH": "whole.ptz"}, tmp_path)
    assert whole.returncode == 0, whole.stderr
    assert signalled(env, tmp_path, "checkpoint:", signal.SIGKILL)[0] == -signal.SIGKILL
    done = launch(env | {"RESUME": "1"}, tmp_path)
    assert done.returncode == 0 and "resumed step:" in done.stdout, done.stderr
    assert (tmp_path / "final_model.ternary.ptz").read_bytes() == (tmp_path / "whole.ptz").read_bytes()
    assert json.loads(done.stdout.rpartition("result ")[2])["restarts"] == 1


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGUSR1", 0)])
def test_a_signal_ends_the_step_and_leaves_a_checkpoint(name, code, data_dir, tmp_path):
    env = environment(data_dir, iterations=10**6, checkpoint_every=10**5, train_log_every=1)
    assert signalled(env, tmp_path, "step:4/", getattr(signal, name)) == (code, f"\ntrain_gpt.py: stopped by {name}\n")
    (path,) = (tmp_path / "checkpoints").glob("*.ckpt")
    assert read_checkpoint(path)[0]["step"] >= 4
    assert not (tmp_path / "final_model.ternary.ptz").exists()


def test_a_stop_may_export_what_has_been_trained(data_dir, tmp_path):
    env = environment(data_dir, iterations=10**6, export_on_stop=1, train_log_every=1)
    code, _ = signalled(env, tmp_path, "step:4/", signal.SIGINT)
    result = json.loads(next((tmp_path / "logs").iterdir()).read_text().rpartition("result ")[2])
    assert code == 130 and result["stopped_by"] == "SIGINT" and result["steps"] >= 4
    assert result["roundtrip_val_bpb"] == result["val_bpb"] and (tmp_path / "final_model.ternary.ptz").exists()
    assert not (tmp_path / "checkpoints").exists()


def test_the_budget_counts_what_was_lost(data_dir, tmp_path):
    """A heartbeat that lies behind the checkpoint: its seconds and steps are not given back."""
    cfg = config(data_dir, tmp_path)
    with pytest.raises(Killed):
        trained(cfg, killed_at=5)
    (tmp_path / "checkpoints" / "heartbeat.json").write_text(json.dumps({"elapsed_s": 1000.0, "step": 5, "lineage": "x"}))
    _, figures = trained(dataclasses.replace(cfg, resume="1"))
    assert figures["train_time_s"] > 1000 and figures["lost_steps"] == 2
    _, figures = trained(dataclasses.replace(cfg, resume="1", max_wallclock_seconds=900, iterations=10**6))
    assert figures["steps"] == 9  # the newest checkpoint: nothing is left of the time


def test_a_disk_that_is_full_costs_the_checkpoint_alone(data_dir, tmp_path, monkeypatch, capsys):
    cfg, write = config(data_dir, tmp_path), train_gpt.write_whole

    def full(path, *rest, **more):
        if str(path).endswith("_00000006.ckpt"):
            raise OSError(28, "No space left on device")
        write(path, *rest, **more)

    monkeypatch.setattr(train_gpt, "write_whole", full)
    trained(cfg)
    assert "x_00000006.ckpt cannot be written (No space left on device); the run goes on" in capsys.readouterr().out
    assert sorted(p.name for p in (tmp_path / "checkpoints").glob("*.ckpt")) == ["x_00000003.ckpt", "x_00000009.ckpt"]


def test_weights_that_are_not_finite_make_no_checkpoint(data_dir, tmp_path, monkeypatch, capsys):
    state = train_gpt.training_state

    def spoiled(step):
        tensors, numbers = state(step)
        return {name: t * torch.nan if name == "weight.vocab_bias" else t for name, t in tensors.items()}, numbers

    monkeypatch.setattr(train_gpt, "training_state", spoiled)
    trained(config(data_dir, tmp_path))
    assert "no checkpoint at step:3: weight.vocab_bias is not finite" in capsys.readouterr().out
    assert not [*(tmp_path / "checkpoints").glob("*.ckpt")]


def test_seconds_decide_too(data_dir, tmp_path):
    cfg = config(data_dir, tmp_path, checkpoint_every="0.001s", checkpoint_keep=99)
    trained(cfg)
    assert len([*(tmp_path / "checkpoints").glob("*.ckpt")]) == 10


@pytest.mark.parametrize("every", ["-1", "10m", "s", "x", "1.5"])
def test_what_is_no_interval_is_refused(every):
    with pytest.raises(UserError, match=f"CHECKPOINT_EVERY='{every}': expected steps, or seconds as 600s"):
        tiny_config(checkpoint_every=every)


def test_a_stop_without_a_step_is_a_stop(data_dir, tmp_path):
    cfg = config(data_dir, tmp_path, export_on_stop=1)
    entered = train_gpt.StopRequest.__enter__

    def asked(request):
        request.number = signal.SIGTERM
        return entered(request)

    train_gpt.StopRequest.__enter__ = asked
    try:
        with pytest.raises(Stopped):
            trained(cfg)
    finally:
        train_gpt.StopRequest.__enter__ = entered
    assert not [*(tmp_path / "checkpoints").glob("*.ckpt")]


def test_the_seconds_since_the_last_heartbeat_are_charged(data_dir, tmp_path):
    """Whatever the heartbeat missed before the kill, at most one beat, is not given back."""
    cfg = config(data_dir, tmp_path)
    with pytest.raises(Killed):
        trained(cfg, killed_at=5)
    (tmp_path / "checkpoints" / "heartbeat.json").write_text(json.dumps({"elapsed_s": 1000.0, "step": 5, "lineage": "x"}))
    _, figures = trained(dataclasses.replace(cfg, resume="1", max_wallclock_seconds=1000.5, iterations=10**6))
    assert figures["steps"] == 3 and figures["train_time_s"] >= 1001


def test_a_slow_disk_costs_checkpoints_and_holds_nobody_up(data_dir, tmp_path, monkeypatch, capsys):
    cfg, write, disk = config(data_dir, tmp_path), train_gpt.Checkpoints.write, threading.Event()
    monkeypatch.setattr(train_gpt.Checkpoints, "PATIENCE_S", 0.05)
    monkeypatch.setattr(train_gpt.Checkpoints, "write", lambda *rest: (disk.wait(), write(*rest)))
    monkeypatch.setattr(train_gpt.Checkpoints, "finish", lambda hook: (disk.set(), hook.finish_writing()))
    blob, _ = trained(cfg)
    out = capsys.readouterr().out
    assert [int(n) for n in re.findall("no checkpoint at step:(\\d+): the one before is still being written", out)] == [6, 9]
    assert blob == trained(dataclasses.replace(cfg, checkpoint_every="0"))[0] and "checkpoint:" in out


def test_what_a_killed_run_left_goes_at_the_next_start(data_dir, tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / ".99.98.partial").write_bytes(b"half")
    trained(config(data_dir, tmp_path))
    assert not [*(tmp_path / "checkpoints").glob(".*")]
