"""Losses and gradients that are not finite, and losses that are spikes: the same on every process, at the step where they are."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from conftest import fresh_model, on_processes
from test_checkpoints import Killed, config, trained

import train_gpt
from train_gpt import ArtifactError, Gradients, Log, TrainingStep, UserError, World, read_checkpoint

KINDS = {"loss": lambda loss, nats, _: (loss * math.nan, nats * math.nan), "infinite loss": lambda loss, nats, _: (loss * math.inf, nats * math.inf),
         "gradient": lambda loss, nats, model: (loss + (0 * model.vocab_bias.sum()).sqrt(), nats),
         "gradient of the table": lambda loss, nats, model: (loss + (0 * model.table.weight.sum()).sqrt(), nats)}  # fmt: skip


def spoil(step, where, kind):
    """Before its step `where` the process's loss becomes one of KINDS."""
    plain, taken = step.loss_function, []
    take = step.take

    def counted(*batch):
        taken.append(1)
        take(*batch)

    step.take = counted
    step.loss_function = lambda model, *rest: KINDS[kind](*plain(model, *rest), model) if len(taken) == where else plain(model, *rest)


def diverging(world):
    """What each kind is on every process, if it is rank 1's at the third step."""
    import os
    from pathlib import Path

    said = []
    for kind in KINDS:
        cfg = config(Path(os.environ["DATA"]), Path(os.environ["FOLDER"]), warmup_steps=0, checkpoint_every=0)
        torch.manual_seed(cfg.seed)
        model = fresh_model(cfg)
        with train_gpt.rounded_once(model):
            step = TrainingStep(model, cfg, world)
            if world.rank == world.size - 1:
                spoil(step, 3, kind)
            try:
                train_gpt.training_loop(model, step, world, Log(cfg, world), None)
            except UserError as error:
                said.append(str(error))
    texts = torch.frombuffer(bytearray("\n".join(said).encode().ljust(2000)), dtype=torch.uint8)
    assert len(set(map(bytes, world.gather(texts[None]).numpy()))) == 1  # every process says the same
    return said


def test_what_is_not_finite_stops_all_processes_at_its_step(data_dir, tmp_path, monkeypatch):
    import conftest

    plain, more = conftest.launch, {"DATA": str(data_dir), "FOLDER": str(tmp_path)}
    monkeypatch.setattr(conftest, "launch", lambda env, *rest, **named: plain(env | more, *rest, **named))
    rates = "try a lower MATRIX_LR=0.04, SCALAR_LR=0.02 or TIED_EMBED_LR=0.02"
    values = ["nan"] * len(KINDS)
    assert on_processes(2, tmp_path, "test_bad_numbers.diverging") == [
        [f"training diverged: loss or gradient {value} at step 3 on rank 1; {rates}" for value in values]]  # fmt: skip
    monkeypatch.setenv("DATA", str(data_dir))
    monkeypatch.setenv("FOLDER", str(tmp_path))
    assert diverging(World()) == [f"training diverged: loss or gradient {value} at step 3; {rates}" for value in values]


def test_a_run_that_diverges_names_its_last_checkpoint(data_dir, tmp_path, monkeypatch):
    cfg = config(data_dir, tmp_path, warmup_steps=0)
    made = TrainingStep.__init__
    monkeypatch.setattr(TrainingStep, "__init__", lambda step, *rest: (made(step, *rest), spoil(step, 8, "loss"))[0])
    finish = train_gpt.Checkpoints.after_step

    def written(hook, *rest):
        line = finish(hook, *rest)
        hook.finish_writing()
        return line

    monkeypatch.setattr(train_gpt.Checkpoints, "after_step", written)
    with pytest.raises(UserError, match=r"at step 8; .*; the last good checkpoint is .*x_00000006\.ckpt$"):
        trained(cfg)


def test_a_checkpoint_with_a_number_that_is_not_finite_is_none(data_dir, tmp_path, capsys):
    cfg = config(data_dir, tmp_path)
    expected, _ = trained(dataclasses.replace(cfg, checkpoint_every="0"))
    with pytest.raises(Killed):
        trained(cfg, killed_at=8)
    newest = tmp_path / "checkpoints" / "x_00000006.ckpt"
    header, tensors = read_checkpoint(newest)
    tensors["weight.vocab_bias"][3] = math.inf
    train_gpt.write_whole(newest, train_gpt.checkpoint_chunks({k: v for k, v in header.items() if k != "tensors"}, tensors))
    with pytest.raises(ArtifactError, match=r"x_00000006\.ckpt: 'weight\.vocab_bias' is not finite"):
        read_checkpoint(newest)
    assert trained(dataclasses.replace(cfg, resume="1"))[0] == expected and "resumed step:3" in capsys.readouterr().out


SETTLED = 4


@pytest.fixture
def spikes(monkeypatch):
    """The guard judges after four steps; `at(steps)` multiplies the loss that it sees in these steps."""
    monkeypatch.setattr(train_gpt.SpikeGuard, "SETTLED", SETTLED)
    compute, guarded = Gradients.compute, train_gpt.SpikeGuard.after_gradients

    def at(*steps):
        taken = []
        monkeypatch.setattr(Gradients, "compute", lambda grads, *rest: (taken.append(1), compute(grads, *rest))[1])

        def spiking(hook):
            loss = hook.step.grads.loss
            hook.step.grads.loss = loss * (50 if len(taken) in steps else 1)
            update = guarded(hook)
            hook.step.grads.loss = loss
            return update

        monkeypatch.setattr(train_gpt.SpikeGuard, "after_gradients", spiking)

    return at


def state_of(step):
    tensors, _ = train_gpt.training_state(step)
    return {name: t.clone() for name, t in tensors.items() if not name.startswith("hook.")}


def test_a_guard_that_finds_nothing_changes_nothing(data_dir, tmp_path):
    cfg = config(data_dir, tmp_path, checkpoint_every=0, iterations=30)
    guarded, figures = trained(dataclasses.replace(cfg, spike_guard=1e6))
    assert guarded == trained(cfg)[0] and figures["updates_left_out"] == 0


@pytest.mark.parametrize("optimizer", ["neomuon", "normuon", "adamw", "fro_stable"])
def test_the_update_of_a_spike_is_left_out_whole(optimizer, data_dir, tmp_path, spikes, monkeypatch, capsys):
    """Weights and optimizers after the step are those before it; the steps around it change them."""
    cfg, states = config(data_dir, tmp_path, warmup_steps=0, checkpoint_every=0, spike_guard=6, matrix_optimizer=optimizer), []
    spikes(7)
    take = TrainingStep.take
    monkeypatch.setattr(TrainingStep, "take", lambda step, *batch: (states.append(state_of(step)), take(step, *batch)))
    _, figures = trained(cfg)
    moved = [any(not torch.equal(a[name], b[name]) for name in b) for a, b in zip(states[1:], states[2:], strict=False)]
    assert [i + 2 for i, m in enumerate(moved) if not m] == [7] and figures["updates_left_out"] == 1
    assert "spike: the update of step:7/10 is left out" in capsys.readouterr().out


def test_ten_spikes_in_a_row_end_the_run_and_nine_do_not(data_dir, tmp_path, spikes):
    cfg = config(data_dir, tmp_path, warmup_steps=0, checkpoint_every=0, spike_guard=6, iterations=20)
    spikes(*range(6, 15))
    assert trained(cfg)[1]["updates_left_out"] == 9


def test_ten_in_a_row(data_dir, tmp_path, spikes):
    cfg = config(data_dir, tmp_path, warmup_steps=0, checkpoint_every=0, spike_guard=6, iterations=20)
    spikes(*range(6, 16))
    with pytest.raises(UserError, match=r"SPIKE_GUARD=6\.0: 10 updates in a row, up to step 15, left out"):
        trained(cfg)


def test_a_resumed_guard_knows_what_it_knew(data_dir, tmp_path, spikes):
    """Killed after its statistics have settled, and again within a row of spikes."""
    cfg = config(data_dir, tmp_path, warmup_steps=0, checkpoint_every=6, spike_guard=6, iterations=12)
    spikes(6, 7)
    expected, figures = trained(dataclasses.replace(cfg, checkpoint_every="0"))
    assert figures["updates_left_out"] == 2
    spikes(6, 7)
    with pytest.raises(Killed):
        trained(cfg, killed_at=6)
    spikes(1)  # the seventh step is the first of the resumed run
    blob, figures = trained(dataclasses.replace(cfg, resume="1"))
    assert blob == expected and figures["updates_left_out"] == 2


def test_mean_and_deviation_are_those_of_the_losses(data_dir, tmp_path, monkeypatch):
    """While the weights are 1 / n they are the plain mean and variance, computed here with float64."""
    import numpy as np

    cfg, seen = config(data_dir, tmp_path, warmup_steps=0, checkpoint_every=0, spike_guard=1e6, iterations=15), []
    after = train_gpt.SpikeGuard.after_step
    monkeypatch.setattr(train_gpt.SpikeGuard, "after_step", lambda hook, *rest: (seen.append(hook), after(hook, *rest))[1])
    _, figures = trained(cfg)
    losses = np.array(figures["first_losses"], np.float64)
    mean, variance, steps, left_out, row = seen[-1].figures_now.tolist()
    assert (mean, variance) == pytest.approx((losses.mean(), losses.var()), rel=1e-4) and (steps, left_out, row) == (15, 0, 0)
