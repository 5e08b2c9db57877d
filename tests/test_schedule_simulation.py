"""A thousand runs of ten minutes, with the real loop and clock and a machine whose steps take drawn times: none is over."""

from __future__ import annotations

import math
import statistics
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_submission import RECORD, breaches, code, folder, write_runs  # noqa: F401

import train_gpt
from train_gpt import Checkpoints, Config, Hook, World

BUDGET_S, RUNS = 600.0, 1000


class Machine:
    """Seconds that pass where the program waits. The device works on its queue while the host goes on."""

    def __init__(self, rng, step_s, stalls, at_most_s):
        self.now, self.free, self.rng, self.step_s, self.stalls, self.at_most_s = 0.0, 0.0, rng, step_s, stalls, at_most_s

    def run_step(self):
        """A step's time varies by a tenth; a few stand still, for as long as the second beyond the cap allows."""
        self.now += 0.001 * self.step_s
        took = self.step_s * self.rng.uniform(0.95, 1.05)
        if self.rng.random() < self.stalls:
            took += self.rng.uniform(0, self.at_most_s)
        self.free = max(self.now, self.free) + took

    def wait(self, until=math.inf):
        self.now = max(self.now, min(self.free, until))


class Killed(Exception): ...


class Restart(Hook):
    """What Checkpoints does to the clock: goes on from the last checkpoint and the last heartbeat, once a second."""

    def __init__(self, machine, kill_s, checkpoint_s, earlier):
        self.machine, self.kill_s, self.checkpoint_s, self.earlier = machine, kill_s, checkpoint_s, earlier
        self.begun_s, self.saved = machine.now, (0.0, 0)

    def begin(self, loop):
        self.loop = loop
        loop.clock.advance(Checkpoints.charged_s(Checkpoints, *self.earlier))
        loop.step = loop.report.step = self.earlier[0]["step"]
        self.saved = (loop.clock.elapsed(), loop.step)

    def after_step(self, step, progress):  # noqa: ARG002
        elapsed = self.loop.clock.elapsed()
        if elapsed - self.saved[0] >= self.checkpoint_s:
            self.saved = (elapsed, step + 1)
        if (lived := self.machine.now - self.begun_s) >= self.kill_s:  # the heartbeat is of the last whole second
            beat = {"elapsed_s": elapsed - lived % 1, "step": step + 1}
            raise Killed(lived, ({"elapsed_s": self.saved[0], "step": self.saved[1]}, beat))
        return ""


@pytest.fixture
def simulate(monkeypatch):
    def nothing(*_, **__):
        return None

    stream = SimpleNamespace(epoch=1, next=lambda *_: (None, None), state=lambda: {"position": 0})
    for name, stub in {"TokenStream": nothing, "Batches": lambda *_: stream, "graphs_compiled": lambda: 0, "apply_stage": nothing,
                       "replicas_agree": lambda *_: True, "since_launch_s": lambda: 0.0}.items():  # fmt: skip
        monkeypatch.setattr(train_gpt, name, stub)

    def life(machine, cfg, device, reserve_s, hooks, lines):
        class Reading:
            def __init__(self, _):
                self.done = machine.free

            def get(self):
                machine.wait(self.done)
                return 1.0

        def temperature(*_):
            machine.free = max(machine.now, machine.free) + reserve_s
            machine.wait()
            return 1.0

        take = SimpleNamespace(hooks=hooks, optimizers=[], take=lambda *_: (machine.run_step(), device == "cpu" and machine.wait()),
                               share_latent=nothing, grads=SimpleNamespace(loss=None, losses=torch.ones(1)))  # fmt: skip
        log = lambda line, **_: lines.append(line)
        log.view = train_gpt.View()
        with monkeypatch.context() as m:
            m.setattr(train_gpt.time, "perf_counter", lambda: machine.now)
            m.setattr(torch.cuda, "synchronize", machine.wait)
            m.setattr(train_gpt, "Reading", Reading)
            m.setattr(train_gpt, "warm_up", lambda *_: reserve_s)
            m.setattr(train_gpt, "calibrate_temperature", temperature)
            model = SimpleNamespace(cfg=cfg, temperature=torch.ones(1))
            return train_gpt.training_loop(model, take, World(device=torch.device(device)), log, None)

    return life


def drawn(simulate, rng, device, stall_s=None):
    """(true seconds of training in all lives, those that the run says, its log) of a run that is killed up to twice.

    A first life has left a checkpoint after 480 to 520 s, which saves most of the simulation's time.
    """
    step_s, lost_s, cfg, lines = float(rng.uniform(0.2, 0.4)), float(rng.uniform(480, 520)), Config(iterations=10**9), []
    earlier = {"elapsed_s": lost_s, "step": 1500}, {}
    # when the clock is asked for the last time a GPU has a step under way, and gets one more
    steps = {"cpu": 1, "cuda": 2}[device]
    machine = Machine(rng, step_s, 0.01, (1 - 1.06 * steps * step_s) / steps)
    kills = [*rng.uniform(1, 40, rng.integers(0, 3)), math.inf]
    for kill_s in kills:
        machine.free, lines[:] = machine.now, []
        if stall_s:
            machine.stalls, machine.at_most_s = 1, stall_s
        hook = Restart(machine, kill_s, rng.uniform(5, 60), earlier)
        try:
            figures = simulate(machine, cfg, device, float(rng.uniform(0, 0.3)), [hook], lines)
        except Killed as killed:
            lost_s, earlier = lost_s + killed.args[0], killed.args[1]
    return lost_s + machine.now - hook.begun_s, figures["train_time_s"], lines


def test_no_run_is_over_and_little_is_left_unused(simulate):
    """Stalls as long as the second beyond the cap allows."""
    rng = np.random.default_rng(0)
    true, said, logs = zip(*(drawn(simulate, rng, ("cpu", "cuda")[i % 2]) for i in range(RUNS)), strict=True)
    unused = [BUDGET_S - s for s in true]
    print(f"{RUNS} runs: at most {max(said):.3f} s, unused {statistics.mean(unused):.3f} s in the mean, {max(unused):.3f} s at most")
    assert max(said) <= BUDGET_S and max(true) <= BUDGET_S
    assert all(t <= s + 1e-6 for t, s in zip(true, said, strict=True))  # no life's seconds are lost
    assert statistics.mean(unused) < 2 and not [line for log in logs for line in log if line.startswith("over:")]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_longer_stall_is_reported_as_over_by_the_run_and_by_compliance(device, simulate, folder, code):  # noqa: F811
    rng = np.random.default_rng(1)
    over = [run for run in (drawn(simulate, rng, device, stall_s=20) for _ in range(20)) if run[0] > BUDGET_S]
    assert len(over) > 5
    for _, said, lines in over:
        assert said > BUDGET_S and [line for line in lines if line.startswith(f"over: train_time:{1000 * said:.0f}ms is more than")]
    assert breaches(write_runs(folder, code, train_time_s=over[0][1]), record=RECORD) == {"training time"}
