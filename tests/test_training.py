"""A step's layout, gradients and hooks, and the loop around it: one and the same for every number of micro-batches."""

from __future__ import annotations

import functools
import json
import re
import time
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, fresh_model, gpu_ops, tiny_config, tiny_model, tokens, train_steps

import train_gpt
from train_gpt import Hook, Log, StepReport, TrainingStep, UserError, ValidationSet, World, batch_layout, train, training_loss

GOLDEN = json.loads((ROOT / "tests/data/golden_losses.json").read_text())


@pytest.mark.parametrize(("batch", "micro", "world", "expected"), [(256, 65536, 1, (2, 4)), (256, 65536, 2, (1, 4)), (256, 64, 1, (4, 2)), (256, 32, 8, (1, 1)),
                                                                 (32, 65536, 1, (1, 1)), (256, 96, 1, (4, 2)), (192, 65536, 3, (1, 2))])  # fmt: skip
def test_batch_layout(batch, micro, world, expected):
    assert batch_layout(tiny_config(train_batch_tokens=batch, micro_batch_tokens=micro), world) == expected


def test_a_world_size_that_does_not_divide_names_the_nearest_that_do():
    with pytest.raises(UserError, match=r"WORLD_SIZE=3 must divide the 8 sequences.*nearest valid: 2 and 4"):
        batch_layout(tiny_config(), 3)


def test_default_layouts_on_eight_gpus_and_fewer():
    cfg = tiny_config(train_batch_tokens=524288, train_seq_len=1024, yarn_max_len=2048)
    assert [batch_layout(cfg, n) for n in (8, 4, 2, 1)] == [(1, 64), (2, 64), (4, 64), (8, 64)]


def test_gradients_and_loss_do_not_depend_on_the_number_of_micro_batches():
    results = []
    for micro_batch_tokens, micro_batches in ((32, 16), (64, 8), (65536, 2), (65536, 1)):
        model = tiny_model(train_batch_tokens=512, micro_batch_tokens=micro_batch_tokens)
        x = tokens(model, 16)
        y, mean = x.roll(-1, 1), model(x, x.roll(-1, 1)).mean().item()
        step = TrainingStep(model, model.cfg, World())
        if micro_batches == 1:  # which no step has
            step.grads.compute(lambda a, b, model=model: training_loss(model, a, b, 1e-4), x, y, 1)
        else:
            assert batch_layout(model.cfg, 1)[0] == micro_batches
            step.take(x, y)
        assert step.grads.loss.item() == pytest.approx(mean, rel=1e-5)
        results.append(torch.cat([p.grad.flatten() for p in model.parameters()]).double())
    for other in results[1:]:
        assert (other - results[0]).norm() < 2e-6 * results[0].norm()


def test_with_all_options_off_the_losses_are_the_committed_ones():
    """From the commit before the first option, when the recipe was #640's; rounding may differ by machine."""
    _, losses = train_steps(len(GOLDEN["losses"]), fp_storage="FP8", warmdown_fraction=0.2, muon_wd=0.0, smear_gate=0, key_offset=0)
    assert losses == pytest.approx(GOLDEN["losses"], rel=1e-6)


def silent_log() -> Log:
    """Its lines are in `lines`."""
    lines = []
    log = lambda line, console=True: lines.append(line)  # noqa: ARG005
    log.view, log.lines = train_gpt.View(), lines
    return log


class Recording(Hook):
    """Tells when it is called; leaves the second step's update out and cuts the third step's sequences."""

    def __init__(self, step):
        super().__init__(step)
        self.moments, self.weights = [], []

    def stage(self, stage, step, progress):
        self.moments.append(("stage", step, progress))
        assert stage == train_gpt.schedule(self.step.cfg, step, progress)
        return stage._replace(seq_len=16, lr_scale=0.25) if step == 2 else stage

    def before_step(self, progress):
        self.moments.append(("before_step", progress))
        self.weights.append(self.step.model.table.weight.detach().clone())

    def after_gradients(self):
        self.moments.append(("after_gradients", self.step.optimizers[1].group["lr"]))
        return len(self.weights) != 2

    def after_step(self, step, progress):
        self.moments.append(("after_step", step, progress))
        return f"step {step} is over" * (step == 1)

    def finish(self):
        self.moments.append(("finish",))


def test_hooks_are_called_at_their_moments(data_dir, monkeypatch):
    hooks, shapes = [], []
    monkeypatch.setattr(train_gpt, "choose_hooks", lambda step: [hooks.append(Recording(step)) or hooks[-1]])
    cfg, log = tiny_config(data_path=data_dir, iterations=4, warmup_steps=2, warmdown_fraction=0, temp_scaling=0), silent_log()
    model = fresh_model(cfg)
    loss = model.parts.loss
    model.parts = model.parts._replace(loss=lambda model, x, *rest: (shapes.append(tuple(x.shape)), loss(model, x, *rest))[1])
    train(model, cfg, World(), log, None)
    warm, hook = hooks  # restart() after the warm-up makes them anew
    assert warm.moments == [("before_step", 0.0), ("after_gradients", 0.02), ("before_step", 1.0), ("after_gradients", 0.02)]
    expected = []
    for step in range(4):
        expected += [("before_step", step / 4), ("stage", step, step / 4), ("after_gradients", 0.005 if step == 2 else 0.02), ("after_step", step, step / 4)]
    assert hook.moments == [*expected, ("before_step", 1.0), ("finish",)]
    unchanged = [torch.equal(a, b) for a, b in zip(hook.weights, hook.weights[1:], strict=False)]
    assert unchanged == [False, True, False, False]
    assert shapes[-8:] == [(4, 32)] * 4 + [(8, 16)] * 2 + [(4, 32)] * 2
    assert log.lines.count("step 1 is over") == 1 and not any(line.startswith("step 0 is over") for line in log.lines)


def test_the_default_has_no_hook_and_those_there_are_do_nothing_of_themselves():
    cpu, gpu = tiny_config(), train_gpt.Config(precision="bf16")
    for cfg, device in ((cpu, "cpu"), (gpu, "cuda")):
        assert train_gpt.choose_hooks(SimpleNamespace(cfg=cfg, world=World(device=torch.device(device)))) == []
    model = tiny_model()
    step = TrainingStep(model, model.cfg, World())
    assert step.hooks == []
    hook, stage = Hook(step), train_gpt.schedule(model.cfg, 0, 0.0)
    assert (hook.stage(stage, 0, 0.0), hook.before_step(0.0), hook.after_gradients(), hook.after_step(0, 0.0), hook.finish()) == (stage, None, True, "", None)


def test_validation_on_the_way_is_outside_the_clock(data_dir, monkeypatch):
    monkeypatch.setattr(train_gpt, "evaluate", lambda *_, **__: (time.sleep(1), (2.5, 1.25))[1])
    cfg, log = tiny_config(data_path=data_dir, iterations=3, warmup_steps=2, val_loss_every=1, temp_scaling=0), silent_log()
    run = train(fresh_model(cfg), cfg, World(), log, None)
    assert run["train_time_s"] < 1  # of more than two seconds
    lines = [line.partition(" train_time:") for line in log.lines if "val_loss" in line]
    assert [scored for scored, *_ in lines] == [f"step:{step}/3 val_loss:2.5000 val_bpb:1.2500" for step in (1, 2)]
    assert all(float(time_ms.removesuffix("ms")) < 1000 for *_, time_ms in lines)


@pytest.mark.parametrize("options", [
    pytest.param({}, marks=pytest.mark.campaign), {"untie_at_fraction": 0.5, "warmup_steps": 2},
    pytest.param({"seq_len_start": 16, "seq_schedule_fraction": 0.5}, marks=pytest.mark.campaign)])  # fmt: skip
def test_nothing_compiles_once_the_clock_runs(options, data_dir, monkeypatch):
    """Every compiled function of a run, with validation on the way, as on a GPU but for the backend."""
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph

    def compiled(function, *_):
        return torch.compile(function, backend=backend, fullgraph=True, dynamic=False)

    monkeypatch.setattr(train_gpt, "compiled", functools.cache(compiled))
    torch._dynamo.reset()
    monkeypatch.setattr(torch._dynamo.config, "recompile_limit", 32)
    cfg = tiny_config(data_path=data_dir, tokenizer_path=data_dir / "tokenizer.model", iterations=4, val_loss_every=2, num_layers=1,
                      **options)  # fmt: skip
    world, log = World(), silent_log()
    run = train(fresh_model(cfg).use(gpu_ops(cfg)), cfg, world, log, ValidationSet.load(cfg, world))
    assert run["late_graphs"] == 0 and len(graphs) > 8
    assert sum(re.fullmatch(r"startup:[1-9]\d*ms", line) is not None for line in log.lines) == 1
    torch._dynamo.reset()


@pytest.mark.parametrize(("every", "steps"), [(0, [1, 2, 3, 4, 5, 10, 15, 20]), (8, [1, 2, 3, 4, 5, 8, 16])])
def test_a_loss_is_logged_every_five_seconds_unless_steps_are_asked_for(every, steps):
    log = silent_log()
    report = StepReport(tiny_config(train_log_every=every), log)
    for step in range(1, 22):
        report(2.0, float(step))  # a second each
    assert log.lines == [f"step:{step}/24 loss:2.0000 t:{step}000ms avg:1000.0ms" for step in steps]


def test_the_time_of_a_step_is_in_its_own_line_and_the_temperature_in_no_step(data_dir, monkeypatch):
    """On a CPU: a step that takes long shows in the line of that step, and what follows the last step in none."""
    cfg, log, take = tiny_config(data_path=data_dir, iterations=3, warmup_steps=0), silent_log(), TrainingStep.take

    def slow_third_step(step, x, y):
        take(step, x, y)
        time.sleep(0.4 * (len([line for line in log.lines if line.startswith("step:")]) == 2))

    def slow_temperature(*_):
        time.sleep(0.7)
        return 1.0

    monkeypatch.setattr(TrainingStep, "take", slow_third_step)
    monkeypatch.setattr(train_gpt, "calibrate_temperature", slow_temperature)
    run = train(fresh_model(cfg), cfg, World(), log, None)
    times = [int(re.search(r" t:(\d+)ms", line)[1]) for line in log.lines if line.startswith("step:")]
    assert len(times) == 3 and times[1] < 400 <= times[2] - times[1]
    assert run["train_time_s"] - 3 * run["ms_per_step"] / 1000 >= 0.69
