"""Other systems' optimizers, schedules and training options, each against something written out independently."""

from __future__ import annotations

import itertools
import math
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, launch, tiny_config, tiny_model

import train_gpt
from train_gpt import (
    Extras,
    Log,
    LossScaler,
    NeoMuon,
    Stage,
    TernaryLinear,
    TokenStream,
    TrainingStep,
    UserError,
    ValidationSet,
    World,
    apply_stage,
    batch_layout,
    compute_dtype,
    evaluate,
    load_artifact,
    save_artifact,
    schedule,
    step_shape,
    step_shapes,
    ternarize,
    train_and_export,
)

# ---- Optimizers: float64 loops over matrices and rows, written from the publications' definitions


def newton_schulz(u, steps=3):
    x = u.T if u.shape[0] > u.shape[1] else u
    x = x / np.linalg.norm(x)
    for _ in range(steps):
        s = x @ x.T
        x = 3.4445 * x + (-4.775 * s + 2.0315 * s @ s) @ x
    return x.T if u.shape[0] > u.shape[1] else x


def aspect(u):
    return math.sqrt(max(1, u.shape[0] / u.shape[1]))


def rms(v):
    return math.sqrt(sum(float(e) ** 2 for e in v) / len(v))


def by_hand(name, gradients, momentum, cfg):
    """The updates of one matrix for its gradients of successive steps."""
    rows, columns = gradients[0].shape
    buffer, square = np.zeros((rows, columns)), np.zeros(rows)
    mean_rho, mean_rho2, updates = [0.0] * 3, [0.0] * 3, []
    for t, g in enumerate(gradients, 1):
        if name in ("neomuon", "muon_plain", "normuon126"):
            buffer = momentum * buffer + g
            u = g + momentum * buffer
            if name == "neomuon":
                u = np.stack([row / rms(row) for row in u])
            u = newton_schulz(u)
            u = np.stack([row / rms(row) for row in u]) if name == "normuon126" else u * aspect(u)
        elif name == "normuon":
            buffer = momentum * buffer + (1 - momentum) * g
            u = newton_schulz((1 - momentum) * g + momentum * buffer)
            norm = np.linalg.norm(u)
            square = 0.95 * square + 0.05 * np.array([rms(row) ** 2 for row in u])
            u = u / np.sqrt(square)[:, None]
            u = u * norm / np.linalg.norm(u) * aspect(u)
        else:
            stable = name == "fro_stable"
            buffer = 0.9 * buffer + 0.1 * g
            rho = (g * buffer).sum() / (np.linalg.norm(g) * np.linalg.norm(buffer))
            product = 1.0
            for k, rate in enumerate((0.1, 0.01, 0.001)):
                mean_rho[k] += rate * (rho - mean_rho[k])
                mean_rho2[k] += rate * (rho**2 - mean_rho2[k])
                r = mean_rho[k] ** 2 / (mean_rho2[k] + 1e-8)
                product *= max(0.05, min(1.0, r)) if stable else r
            r = product ** (1 / 3)
            square = 0.999 * square + 0.001 * np.array([rms(row) ** 2 for row in g])
            u = buffer / (np.sqrt(square) + 1e-8)[:, None]
            if stable:
                warm = min(1, t / cfg.fro_warmup_steps)
                r = 1 - warm + warm * max(0.05, min(1.0, r))
                u = np.stack([0.5 * row + 0.5 * row / rms(row) for row in u])
                u = np.stack([0.5 * column + 0.5 * column / rms(column) for column in u.T]).T
            u = u * (cfg.fro_alpha + (1 - cfg.fro_alpha) * cfg.fro_gamma * r) / (1 - 0.9**t)
        updates.append(u)
    return updates


MATRIX_OPTIMIZERS = ["neomuon", "muon_plain", "normuon", "normuon126", "fro", "fro_stable"]


@pytest.mark.parametrize("name", MATRIX_OPTIMIZERS)
@pytest.mark.parametrize("shape", [(12, 8), (8, 20)])
def test_an_optimizer_is_its_definition(name, shape):
    """Three steps of three matrices in one batch: their gradients, momenta and statistics must not mix."""
    cfg = tiny_config(matrix_optimizer=name, muon_wd=0.1, fro_warmup_steps=2, fro_alpha=0.12, fro_gamma=0.66)
    generator = torch.Generator().manual_seed(1)
    p = torch.nn.Parameter(torch.randn(3, *shape, generator=generator))
    scale = torch.tensor([1.0, 1e-3, 30.0]).view(3, 1, 1)
    gradients = [torch.randn(p.shape, generator=generator) * scale for _ in range(3)]
    start, optimizer, momentum, lr = p.detach().clone(), NeoMuon([p], cfg, World()), 0.9, 0.01
    for g in gradients:
        p.grad = g.clone()
        apply_stage([optimizer], Stage(lr / cfg.matrix_lr, momentum, 32, 256))
        optimizer.step()
    for i in range(3):
        w = start[i].double().numpy()
        for u in by_hand(name, [g[i].double().numpy() for g in gradients], momentum, cfg):
            w = w * (1 - lr * 0.1) - lr * u
        moved, expected = p[i].detach().double().numpy() - start[i].double().numpy(), w - start[i].double().numpy()
        assert np.abs(moved - expected).max() < 2e-4 * np.abs(expected).max(), i


@pytest.mark.parametrize("name", MATRIX_OPTIMIZERS)
def test_a_matrix_without_gradient_stays_where_it_is(name):
    """Banks are filled up with empty matrices; a row may see no token."""
    p = torch.nn.Parameter(torch.ones(2, 6, 4))
    optimizer = NeoMuon([p], tiny_config(matrix_optimizer=name), World())
    for _ in range(2):
        p.grad = torch.zeros(2, 6, 4)
        p.grad[0, 1:] = torch.randn(5, 4)
        optimizer.step()
    assert torch.equal(p[1], torch.ones(6, 4)) and not (p[0, 1:] == 1).any() and p.isfinite().all()
    assert torch.equal(p[0, 0], torch.ones(4)) or name == "muon_plain" and (p[0, 0] - 1).abs().max() < 1e-6


def test_the_names_choose_different_updates_and_muon_is_neomuon():
    def moved(name):
        p = torch.nn.Parameter(torch.zeros(1, 16, 16))
        optimizer = NeoMuon([p], tiny_config(matrix_optimizer=name), World())
        for seed in range(2):
            p.grad = torch.randn(1, 16, 16, generator=torch.Generator().manual_seed(seed)) * torch.arange(1, 17)[:, None]
            optimizer.step()
        return p.detach()

    updates = {name: moved(name) for name in MATRIX_OPTIMIZERS}
    for a, b in itertools.combinations(updates, 2):
        assert (updates[a] - updates[b]).norm() > 0.05 * min(updates[a].norm(), updates[b].norm()), (a, b)
    assert torch.equal(moved("muon"), updates["neomuon"])


def test_normuon126_moves_an_element_sqrt_width_times_as_far_as_muon():
    """Its learning rate must be read with that: 25 times at 640, the width of #126."""
    g = torch.randn(1, 64, 64)
    sizes = {}
    for name in ("muon_plain", "normuon126"):
        optimizer = NeoMuon([torch.nn.Parameter(torch.zeros(1, 64, 64))], tiny_config(matrix_optimizer=name, muon_backend_steps=5), World())
        sizes[name] = optimizer._update(g, {}, 0.9).square().mean().sqrt().item()
    assert sizes["normuon126"] == pytest.approx(1, rel=1e-4)
    assert sizes["normuon126"] / sizes["muon_plain"] == pytest.approx(math.sqrt(64), rel=0.2)


def test_adamw_on_matrices_honours_its_own_rate_and_decay():
    """#640 overwrote ADAM_LR with MATRIX_LR. Three steps in float64, with the schedule's factor."""
    cfg = tiny_config(matrix_optimizer="adamw", adam_lr=0.003, adam_wd=0.2, matrix_lr=0.9, beta1=0.8, beta2=0.9)
    model = tiny_model(matrix_optimizer="adamw", adam_lr=0.003, adam_wd=0.2, matrix_lr=0.9, beta1=0.8, beta2=0.9)
    step = TrainingStep(model, cfg, World())
    w = {name: p.detach().double() for name, p in model.named_parameters() if p.ndim == 2 and "blocks" in name and min(p.shape) > 2}
    m, v = ({name: torch.zeros_like(x) for name, x in w.items()} for _ in range(2))
    x = torch.randint(320, (8, 32))
    for t in range(1, 4):
        apply_stage(step.optimizers, Stage(0.5, 0.9, 32, 256))
        step.take(x, x.roll(-1, 1))
        for name, p in model.named_parameters():
            if name in w:
                g, lr = p.grad.double(), 0.003 * 0.5
                m[name] = 0.8 * m[name] + 0.2 * g
                v[name] = 0.9 * v[name] + 0.1 * g * g
                step_size = lr * m[name] / (1 - 0.8**t) / ((v[name] / (1 - 0.9**t)).sqrt() + 1e-8)
                w[name] = w[name] * (1 - lr * 0.2) - step_size
                torch.testing.assert_close(p.detach().double(), w[name], rtol=1e-4, atol=1e-5, msg=name)
    assert len(w) == 12


SCRIPT = """
import sys, torch
sys.path[:0] = [{tests!r}]
from conftest import tiny_model
from train_gpt import Extras, TrainingStep, World
torch.set_num_threads(1)
world = World.from_env()
x = torch.randint(320, (8, 32), generator=torch.Generator().manual_seed(0))
y = x.roll(-1, 1)
share = slice(4 * world.rank, 4 * world.rank + 4)
names = ["neomuon", "muon_plain", "normuon", "normuon126", "fro", "fro_stable", "adamw"]
for settings in [*(dict(matrix_optimizer=name, matrix_lr=1e-3, adam_lr=1e-3) for name in names), dict(ema=1, ema_decay=0.5, ema_start_fraction=0.0),
                 dict(precision="fp16"), dict(grad_clip_norm=0.05)]:
    settings |= dict(num_layers=2)
    together, alone = tiny_model(**settings), tiny_model(**settings)
    steps = [(TrainingStep(together, together.cfg, world), x[share], y[share])]
    if world.is_main:
        steps.append((TrainingStep(alone, alone.cfg, World()), x, y))
    for step, a, b in steps:
        extras = Extras(step.model, step, print)
        for i in range(3):
            step.take(a, b)
            extras.after_step(i, 0.5)
        extras.finish()
        for bank in step.grads.banks:
            bank.share_latent()
    if world.is_main:
        start = dict(tiny_model(num_layers=2).named_parameters())
        # float16 rounds each micro-batch's weight gradient; the others add the same two numbers in another order
        tolerance = 5e-3 if settings.get("precision") else 2e-5
        for (name, p), q in zip(together.named_parameters(), alone.parameters()):
            torch.testing.assert_close(p, q, rtol=tolerance, atol=tolerance, msg=lambda m: f"{{settings}} {{name}} {{m}}")
            assert not torch.equal(q, start[name])
    checksum = sum(p.detach().double().sum() for p in together.parameters()).view(1)
    first, second = world.gather(checksum).tolist()
    assert first == second, settings

# an overflow that one process alone can see, in the matrices whose gradients it sums: both skip the step and halve the scale
model = tiny_model(precision="fp16")
step = TrainingStep(model, model.cfg, world)
before, compute = [p.detach().clone() for p in model.parameters()], step.grads.compute

def overflowing(*args):
    compute(*args)
    if world.rank == 1:
        step.grads.banks[0].shard.grad.view(-1)[0] = float("inf")

step.grads.compute = overflowing
step.take(x[share], y[share])
assert step.grads.scale == 2.0**15
assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before))
step.grads.compute = compute
step.take(x[share], y[share])
assert step.grads.scale == 2.0**15 and not all(torch.equal(p, q) for p, q in zip(model.parameters(), before))
if world.is_main:
    print("agreed")
world.close()
"""


def test_two_processes_are_one_under_every_optimizer_and_option(tmp_path):
    script = tmp_path / "both.py"
    script.write_text(SCRIPT.format(tests=str(ROOT / "tests")))
    done = launch({}, tmp_path, 2, argv=[str(script)])
    assert done.returncode == 0 and done.stdout.count("agreed") == 1, done.stderr[-3000:]


# ---- Schedules


def rates(steps_and_progress, **settings):
    cfg = tiny_config(**{"iterations": 1000, "max_wallclock_seconds": 0} | settings)
    return [schedule(cfg, step, progress).lr_scale for step, progress in steps_and_progress]


def test_learning_rate_shapes():
    points = [(0, 0.0), (500, 0.5), (750, 0.75), (875, 0.875), (1000, 1.0)]
    assert rates(points, warmdown_fraction=0.5) == pytest.approx([1, 1, 0.5, 0.25, 0])
    assert rates(points, warmdown_fraction=0.5, min_lr_ratio=0.1) == pytest.approx([1, 1, 0.55, 0.325, 0.1])
    cosine = [1, 1, 0.5, 0.5 - 0.5 * math.cos(math.pi / 4), 0]
    assert rates(points, warmdown_fraction=0.5, warmdown_shape="cosine") == pytest.approx(cosine)
    assert rates(points, warmdown_iters=250) == pytest.approx([1, 1, 1, 0.5, 0])
    assert rates(points, warmdown_iters=4000) == pytest.approx([0.25, 0.125, 0.0625, 0.03125, 0])
    # #126: cosine to a tenth over the last 2,000 of 10,000 steps, warm-up over 100
    published = {"iterations": 10_000, "warmdown_iters": 2000, "warmdown_shape": "cosine", "min_lr_ratio": 0.1, "lr_warmup_steps": 100}
    points = [(0, 0.0), (49, 0.0049), (99, 0.0099), (8000, 0.8), (9000, 0.9), (10_000, 1.0)]
    assert rates(points, **published) == pytest.approx([0.01, 0.5, 1, 1, 0.55, 0.1])


def test_a_warmdown_in_steps_follows_the_clock():
    """#139: with 130 ms a step, 600 s hold 4,615 steps; the warmdown of 1,200 begins when as many are left, whatever ITERATIONS says."""
    cfg = tiny_config(iterations=20_000, warmdown_iters=1200)
    for step in (1, 100, 3000, 3415, 3500, 4000, 4600):
        elapsed = 0.130 * step
        remaining_s, warmdown_s = 600 - elapsed, 1200 * 0.130
        expected = min(1, remaining_s / warmdown_s)
        assert schedule(cfg, step, elapsed / 600).lr_scale == pytest.approx(expected, abs=1e-9), step
    assert schedule(cfg, 3415, 0.130 * 3415 / 600).lr_scale == 1 > schedule(cfg, 3416, 0.130 * 3416 / 600).lr_scale
    # the machine slows down: the same step is nearer to the end
    assert schedule(cfg, 3000, 0.9).lr_scale == pytest.approx((3000 / 0.9 - 3000) / 1200)


def test_learning_rates_have_no_jumps():
    for settings in ({"warmdown_iters": 300}, {"warmdown_shape": "cosine"}, {"lr_warmup_steps": 50, "min_lr_ratio": 0.2, "warmdown_iters": 980}):
        series = rates([(step, step / 1000) for step in range(1001)], **settings)
        assert np.abs(np.diff(series)).max() < 0.021 and max(series) <= 1 and series[-1] == pytest.approx(settings.get("min_lr_ratio", 0))


def shapes(cfg, points):
    return [step_shape(cfg, step, progress) for step, progress in points]


WIDE = {"train_seq_len": 1024, "train_batch_tokens": 524288, "yarn_max_len": 2048}


def test_the_sequence_warm_up_of_126_switches_where_its_log_says():
    cfg = tiny_config(**WIDE, seq_warmup_start=128, seq_warmup_steps=2000)
    steps = [0, 333, 334, 1000, 1001, 1666, 1667, 2000, 50_000]
    assert [seq for seq, _ in shapes(cfg, [(step, 0.9) for step in steps])] == [128, 128, 256, 256, 512, 512, 1024, 1024, 1024]


def test_ramps_and_jumps_by_progress():
    cfg = tiny_config(**WIDE, seq_ramp_start=256, seq_ramp_frac=0.25, batch_ramp_start=131072, batch_ramp_frac=0.2)
    points = [(9, p) for p in (0, 0.05, 0.0501, 0.0624, 0.0626, 0.1499, 0.1501, 0.1874, 0.1876, 1)]
    expected = [(256, 131072), (256, 131072), (256, 262144), (256, 262144), (512, 262144), (512, 262144), (512, 524288), (512, 524288),
                (1024, 524288), (1024, 524288)]  # fmt: skip
    assert shapes(cfg, points) == expected
    for _, p in points:  # the definition, for powers of two: 2^round of the interpolated logarithm
        log = 8 + 2 * min(1, p / 0.25)
        assert step_shape(cfg, 0, p)[0] == 2 ** round(log)
    jump = tiny_config(**WIDE, seq_len_start=512, seq_schedule_fraction=0.33, batch_tokens_start=262144, batch_schedule_fraction=0.5)
    assert shapes(jump, [(0, 0), (0, 0.3299), (0, 0.33), (0, 0.4999), (0, 0.5), (0, 1)]) == [
        (512, 262144), (512, 262144), (1024, 262144), (1024, 262144), (1024, 524288), (1024, 524288)]  # fmt: skip
    assert shapes(tiny_config(**WIDE), [(0, 0), (0, 1)]) == [(1024, 524288)] * 2


SHAPED = [{}, {"seq_warmup_start": 4, "seq_warmup_steps": 20}, {"seq_ramp_start": 8, "batch_ramp_start": 64}, {"seq_len_start": 16, "seq_schedule_fraction": 0.4},
          {"batch_tokens_start": 96, "seq_ramp_start": 32}, {"batch_ramp_start": 128, "batch_ramp_frac": 1.0}]  # fmt: skip


@pytest.mark.parametrize("settings", SHAPED)
def test_step_shapes_name_all_that_occurs_and_every_layout_fits(settings):
    cfg = tiny_config(**settings)
    occurring = {step_shape(cfg, step, progress / 200) for step in range(25) for progress in range(201)}
    listed = step_shapes(cfg)
    assert occurring <= set(listed) and len(listed) == len(set(listed)) and listed[0] == (32, 256)
    for seq_len, tokens in listed:
        micro_batches, sequences = batch_layout(cfg, 1, (seq_len, tokens))
        assert micro_batches * sequences * seq_len == tokens


def test_a_schedule_of_shapes_reads_the_stream_once_and_compiles_before_the_clock(data_dir, tmp_path, monkeypatch):
    """Every micro-batch shape of the timed loop was seen in warm-up; positions are those of one uninterrupted stream; the tokens are counted."""
    settings = {"seq_warmup_start": 8, "seq_warmup_steps": 8, "batch_ramp_start": 64, "batch_ramp_frac": 0.5, "iterations": 12, "warmup_steps": 1}
    cfg = tiny_config(**settings, data_path=data_dir, tokenizer_path=data_dir / "tokenizer.model", temp_scaling=0)
    warm, timed, read, seen = set(), set(), [], [set()]
    seen[0], loss, following, clock = warm, train_gpt.training_loss, train_gpt.Batches.next, train_gpt.Clock

    def recorded_loss(model, x, y, z_loss):
        seen[0].add(tuple(x.shape))
        return loss(model, x, y, z_loss)

    def recorded_next(self, *shape):
        x, y = following(self, *shape)
        read.append(x.flatten())
        return x, y

    def started(world):
        seen[0] = timed
        return clock(world)

    for name, replacement in (("training_loss", recorded_loss), ("Clock", started)):
        monkeypatch.setattr(train_gpt, name, replacement)
    monkeypatch.setattr(train_gpt.Batches, "next", recorded_next)
    torch.manual_seed(0)
    log = Log(cfg, World(), folder=str(tmp_path))
    figures = train_gpt.train(train_gpt.GPT(cfg), cfg, World(), log, None)
    assert timed and timed <= warm and len({t for _, t in timed}) == 3 and len(timed) > 3
    tokens = torch.cat(read)
    assert torch.equal(tokens, torch.from_numpy(TokenStream(cfg, "train").read(0, len(tokens)).astype(np.int64)))
    assert figures["tokens"] == len(tokens) < 12 * 256 and figures["steps"] == 12
    warmups = re.findall(r"^warmup:(\d+)/(\d+)$", next(tmp_path.glob("*.txt")).read_text(), re.M)
    assert warmups == [(str(i), str(len(step_shapes(cfg)))) for i in range(1, len(step_shapes(cfg)) + 1)]


BAD = [
    ({"seq_len_start": 16, "seq_schedule_fraction": 0.3, "seq_ramp_start": 8}, "SEQ_RAMP_START=8: expected 0 beside SEQ_LEN_START"),
    ({"seq_ramp_start": 8, "seq_warmup_start": 8}, "SEQ_WARMUP_START=8: expected 0 beside SEQ_RAMP_START"),
    ({"batch_tokens_start": 64, "batch_ramp_start": 64}, "BATCH_RAMP_START=64: expected 0 beside BATCH_TOKENS_START"),
    ({"seq_len_start": 16}, "SEQ_SCHEDULE_FRACTION=0.0: expected above 0 with SEQ_LEN_START=16"),
    ({"seq_len_start": 20, "seq_schedule_fraction": 0.3}, "SEQ_LEN_START=20: expected a divisor of TRAIN_SEQ_LEN=32"),
    ({"seq_len_start": 64, "seq_schedule_fraction": 0.3}, "SEQ_LEN_START=64: expected at most TRAIN_SEQ_LEN=32"),
    ({"seq_warmup_start": 12}, "SEQ_WARMUP_START=12: expected TRAIN_SEQ_LEN=32 divided by a power of two"),
    ({"seq_ramp_start": -8}, "SEQ_RAMP_START=-8: expected TRAIN_SEQ_LEN=32 divided by a power of two"),
    ({"batch_ramp_start": 96}, "BATCH_RAMP_START=96: expected TRAIN_BATCH_TOKENS=256 divided by a power of two"),
    ({"batch_ramp_start": 16}, "BATCH_RAMP_START=16: expected a multiple of TRAIN_SEQ_LEN=32"),
    ({"batch_tokens_start": 100}, "BATCH_TOKENS_START=100: expected a multiple of TRAIN_SEQ_LEN=32"),
    ({"batch_tokens_start": 512}, "BATCH_TOKENS_START=512: expected at most TRAIN_BATCH_TOKENS=256"),
    ({"seq_ramp_frac": 0}, "SEQ_RAMP_FRAC=0.0: expected a number in (0, 1]"),
    ({"seq_warmup_steps": 0}, "SEQ_WARMUP_STEPS=0: expected at least 1"),
    ({"min_lr_ratio": 1.5}, "MIN_LR_RATIO=1.5: expected a number in [0, 1]"),
    ({"warmdown_iters": -1}, "WARMDOWN_ITERS=-1: expected 0 or more"),
    ({"warmdown_shape": "square"}, "WARMDOWN_SHAPE='square': expected one of linear, cosine"),
    ({"ema_decay": 1}, "EMA_DECAY=1.0: expected a number in [0, 1)"),
    ({"ema_start_fraction": 1}, "EMA_START_FRACTION=1.0: expected a number in [0, 1)"),
    ({"matrix_optimizer": "sgd"}, "MATRIX_OPTIMIZER='sgd': expected one of neomuon, muon, muon_plain, normuon, normuon126, adamw, fro, fro_stable"),
    ({"precision": "fp8"}, "PRECISION='fp8': expected one of auto, fp32, bf16, fp16"),
]


@pytest.mark.parametrize(("settings", "expected"), BAD)
def test_a_schedule_that_makes_no_sense_is_an_error(settings, expected):
    with pytest.raises(UserError) as error:
        tiny_config(**settings)
    assert expected in str(error.value) and "\n" not in str(error.value)


def test_processes_must_divide_every_batch_of_the_schedule():
    train_gpt.check_layouts(tiny_config(batch_ramp_start=128), 4)
    with pytest.raises(UserError, match=r"WORLD_SIZE=4 must divide the 2 sequences of a step \(TRAIN_BATCH_TOKENS=64 / TRAIN_SEQ_LEN=32\)"):
        train_gpt.check_layouts(tiny_config(batch_ramp_start=64), 4)


# ---- Averaged weights


def test_the_average_is_the_hand_computed_one_and_what_is_exported():
    settings = {"ema": 1, "ema_decay": 0.8, "ema_start_fraction": 0.5}
    model = tiny_model(**settings)
    world, cfg = World(), model.cfg
    step = TrainingStep(model, cfg, world)
    extras = Extras(model, step, print)
    expected, x = None, torch.randint(320, (8, 32))
    for i in range(6):
        step.take(x, x.roll(-1, 1))
        extras.after_step(i, i / 6)
        now = [p.detach().double() for p in model.parameters()]
        if i == 3:  # the first step at or beyond half the budget
            expected = now
        elif i > 3:
            expected = [0.8 * e + 0.2 * p for e, p in zip(expected, now, strict=True)]
    last = [p.detach().clone() for p in model.parameters()]
    extras.finish()
    for p, e, w in zip(model.parameters(), expected, last, strict=True):
        torch.testing.assert_close(p.detach().double(), e, rtol=1e-5, atol=1e-6)
        assert not torch.equal(p.detach(), w)
    for m in model.modules():
        if isinstance(m, TernaryLinear):  # codes and scales of the average itself
            codes, scale = ternarize(m.weight.detach(), m.group_size, m.form)
            assert torch.equal(m.operand, (codes * scale).view_as(m.weight))
    loaded, _ = load_artifact(save_artifact(model, cfg), "fp32")
    assert torch.equal(model(x, x), loaded(x, x))


# ---- Loss scale and precision


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


def scaled_step():
    model = tiny_model(precision="fp16")
    step = TrainingStep(model, model.cfg, World())
    return step, step.scaler


def test_the_loss_scale_halves_at_an_overflow_and_doubles_after_2000_good_steps():
    step, scaler = scaled_step()
    assert isinstance(scaler, LossScaler) and step.grads.scale == 65536
    before = [p.detach().clone() for p in step.model.parameters()]
    x = torch.randint(320, (8, 32))
    scaler.good_steps = 7
    clean = step.loss_function
    step.loss_function = lambda *a: (clean(*a)[0] * float("inf"), clean(*a)[1])
    step.take(x, x)
    assert step.grads.scale == 32768 and scaler.good_steps == 0
    assert all(torch.equal(p, w) for p, w in zip(step.model.parameters(), before, strict=True))
    assert not any(opt.state for opt in step.optimizers) and step.grads.loss.isfinite()
    step.loss_function = clean
    step.take(x, x)
    assert step.grads.scale == 32768 and scaler.good_steps == 1
    assert not all(torch.equal(p, w) for p, w in zip(step.model.parameters(), before, strict=True))
    scaler.good_steps = 1998
    step.take(x, x)
    assert step.grads.scale == 32768
    step.take(x, x)
    assert step.grads.scale == 65536 and scaler.good_steps == 0
    step.restart()  # after warm-up, as if nothing had happened
    assert step.grads.scale == 65536 and step.scaler is not scaler and not any(opt.state for opt in step.optimizers)


def test_gradients_are_unscaled_whatever_the_scale():
    """Against float32; with scale 1 most gradients of activations lie among float16's subnormals."""
    exact = tiny_model()
    x = torch.randint(320, (8, 32))
    TrainingStep(exact, exact.cfg, World()).take(x, x.roll(-1, 1))
    reference = torch.cat([p.grad.flatten() for p in exact.parameters()])
    errors = {}
    for scale in (1.0, 2.0**14):
        step, _ = scaled_step()
        step.grads.scale = scale
        step.take(x, x.roll(-1, 1))
        grads = torch.cat([p.grad.flatten() for p in step.model.parameters()])
        errors[scale] = ((grads - reference).norm() / reference.norm()).item()
    assert errors[2.0**14] < 0.01 and errors[2.0**14] < errors[1.0]


def test_a_scale_without_end_is_an_error():
    step, scaler = scaled_step()
    step.grads.scale = 1.0
    step.grads.flat[0] = float("nan")
    with pytest.raises(UserError, match="PRECISION=fp16: gradients overflow"):
        scaler.unscale()


def test_other_precisions_scale_nothing():
    for precision in ("fp32", "bf16", "auto"):
        model = tiny_model(precision=precision)
        step = TrainingStep(model, model.cfg, World())
        assert step.scaler is None and step.grads.scale == 1


# ---- What a step does with its gradients


def test_many_micro_batches_are_one():
    x = torch.randint(320, (16, 32), generator=torch.Generator().manual_seed(0))
    grads = []
    for micro_batch_tokens in (32, 64, 65536):
        model = tiny_model(train_batch_tokens=512, micro_batch_tokens=micro_batch_tokens)
        step = TrainingStep(model, model.cfg, World())
        assert batch_layout(model.cfg, 1)[0] == {32: 16, 64: 8, 65536: 2}[micro_batch_tokens]
        step.take(x, x.roll(-1, 1))
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters()]).double())
    for other in grads[:2]:
        assert (other - grads[2]).norm() < 2e-6 * grads[2].norm()


@pytest.mark.parametrize("limit", [0, 0.01, 1e9])
def test_grad_clip_norm_is_honoured_in_the_step(limit):
    torch.manual_seed(0)
    model = tiny_model(grad_clip_norm=limit)
    x = torch.randint(320, (8, 32))
    TrainingStep(model, model.cfg, World()).take(x, x.roll(-1, 1))
    norm = torch.cat([p.grad.flatten() for p in model.parameters()]).norm().item()
    assert norm == pytest.approx(0.01, rel=1e-3) if limit == 0.01 else norm > 0.05


def test_churn_counts_the_codes_that_changed():
    model, lines = tiny_model(churn_log_every=2), []
    step = TrainingStep(model, model.cfg, World())
    extras = Extras(model, step, lines.append)

    def codes():
        layers = [m for m in model.modules() if isinstance(m, TernaryLinear)]
        return torch.cat([ternarize(m.weight.detach(), m.group_size, m.form)[0].flatten() for m in layers])

    before, x = codes(), torch.randint(320, (8, 32))
    expected = []
    for i in range(5):
        step.take(x, x.roll(-1, 1))
        extras.after_step(i, 0)
        if i % 2:
            now = codes()
            expected.append(f"churn:{(now != before).double().mean():.4f} zero_frac:{(now == 0).double().mean():.4f} step:{i + 1}/24")
            before = now
    assert lines == expected and len(lines) == 2 and not lines[0].startswith("churn:0.0000")


# ---- Whole runs


RUNS = [
    {"precision": "fp16", "matrix_optimizer": "fro_stable", "matrix_lr": 0.002, "muon_wd": 0.01, "seq_len_start": 16, "seq_schedule_fraction": 0.5,
     "batch_tokens_start": 64},
    {"ema": 1, "ema_decay": 0.6, "churn_log_every": 8, "seq_warmup_start": 16, "seq_warmup_steps": 10, "batch_ramp_start": 128, "batch_ramp_frac": 0.3,
     "warmdown_iters": 8, "warmdown_shape": "cosine", "min_lr_ratio": 0.1, "lr_warmup_steps": 3, "grad_clip_norm": 1.0, "micro_batch_tokens": 64},
]  # fmt: skip


@pytest.mark.parametrize("settings", RUNS)
def test_a_run_learns_and_its_artifact_scores_the_same(settings, data_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cfg = tiny_config(**settings, data_path=data_dir, tokenizer_path=data_dir / "tokenizer.model", temp_scaling=0)
    world, log = World(), Log(cfg, World())
    val = ValidationSet.load(cfg, world)
    blob, run = train_and_export(cfg, world, log, val)
    model, _ = load_artifact(blob, cfg.precision)
    assert evaluate(model, val, cfg, world, cfg.train_seq_len)[0] == run["val_loss"] < math.log(320) - 0.4
    text = next((tmp_path / "logs").glob("*.txt")).read_text()
    assert len(re.findall(r"^churn:0\.\d{4} zero_frac:0\.\d{4} step:(?:8|16|24)/24$", text, re.M)) == (3 if "churn_log_every" in settings else 0)
