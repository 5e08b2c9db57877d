"""Other systems' optimizers and schedules and what may happen around a step, each against something written out independently; and
options trained by two processes.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import fresh_model, on_processes, tiny_config, tiny_model, tokens, write_shard
from test_optimizer import newton_schulz, rms

import train_gpt
from train_gpt import (
    MATRIX_OPTIMIZERS,
    Averaging,
    BigramStart,
    Churn,
    Clipping,
    Commitment,
    Log,
    LossScaling,
    Machine,
    Ops,
    Schedules,
    Softening,
    Stage,
    TernaryLinear,
    TokenStream,
    TrainingStep,
    Untying,
    UserError,
    ValidationSet,
    World,
    apply_stage,
    artifact_config,
    batch_layout,
    count_parameters,
    evaluate,
    load_artifact,
    replicas_agree,
    rounded_once,
    save_artifact,
    schedule,
    step_shape,
    ternarize,
    train,
    train_and_export,
    training_loss,
    warm_up,
)

PER_TENSOR = {"scale_group": "tensor", "scale_storage": "fp16"}

# ---- Optimizers: float64 loops over matrices and rows, written from the publications' definitions


def by_hand(name, gradients, momentum, cfg):
    """The updates of one matrix for its gradients of successive steps."""
    buffer, square = np.zeros(gradients[0].shape), np.zeros(len(gradients[0]))
    mean_rho, mean_rho2, updates = [0.0] * 3, [0.0] * 3, []
    for t, g in enumerate(gradients, 1):
        if name in ("muon_plain", "normuon126"):
            buffer = momentum * buffer + g
            u = newton_schulz(g + momentum * buffer)
            u = np.stack([row / rms(row) for row in u]) if name == "normuon126" else u
        elif name == "normuon":
            buffer = momentum * buffer + (1 - momentum) * g
            u = newton_schulz((1 - momentum) * g + momentum * buffer)
            norm, square = np.linalg.norm(u), 0.95 * square + 0.05 * np.array([rms(row) ** 2 for row in u])
            u = u / np.sqrt(square)[:, None]
            u = u * norm / np.linalg.norm(u)
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


OF_OTHERS = ["muon_plain", "normuon", "normuon126", "fro", "fro_stable"]  # neomuon: test_optimizer.py


def optimizer_of(p: torch.nn.Parameter, name: str, **settings: object) -> train_gpt.Optimizer:
    return MATRIX_OPTIMIZERS[name]([p], tiny_config(matrix_optimizer=name, **settings), World())


@pytest.mark.parametrize("name", OF_OTHERS)
@pytest.mark.parametrize("shape", [(12, 8), (8, 20)])
def test_an_optimizer_is_its_definition(name, shape):
    """Three steps of three matrices in one batch: their gradients, momenta and statistics must not mix."""
    cfg = tiny_config(matrix_optimizer=name, muon_wd=0.1, fro_warmup_steps=2, fro_alpha=0.12, fro_gamma=0.66)
    generator = torch.Generator().manual_seed(1)
    p = torch.nn.Parameter(torch.randn(3, *shape, generator=generator))
    scale = torch.tensor([1.0, 1e-3, 30.0]).view(3, 1, 1)
    gradients = [torch.randn(p.shape, generator=generator) * scale for _ in range(3)]
    start, optimizer, momentum, lr = p.detach().clone(), MATRIX_OPTIMIZERS[name]([p], cfg, World()), 0.9, 0.01
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


@pytest.mark.parametrize("name", ["neomuon", *OF_OTHERS])
def test_a_matrix_without_gradient_stays_where_it_is(name):
    """Banks are filled up with empty matrices; a row may see no token."""
    p = torch.nn.Parameter(torch.ones(2, 6, 4))
    optimizer = optimizer_of(p, name, muon_wd=0.0)
    for _ in range(2):
        p.grad = torch.zeros(2, 6, 4)
        p.grad[0, 1:] = torch.randn(5, 4)
        optimizer.step()
    assert torch.equal(p[1], torch.ones(6, 4)) and not (p[0, 1:] == 1).any() and p.isfinite().all()
    assert torch.equal(p[0, 0], torch.ones(4)) or name == "muon_plain" and (p[0, 0] - 1).abs().max() < 1e-6


def test_the_names_choose_different_updates_and_muon_is_neomuon():
    def moved(name):
        p = torch.nn.Parameter(torch.zeros(1, 16, 16))
        optimizer = optimizer_of(p, name)
        for seed in range(2):
            p.grad = torch.randn(1, 16, 16, generator=torch.Generator().manual_seed(seed)) * torch.arange(1, 17)[:, None]
            optimizer.step()
        return p.detach()

    updates = {name: moved(name) for name in ("neomuon", *OF_OTHERS)}
    for a, b in itertools.combinations(updates, 2):
        assert (updates[a] - updates[b]).norm() > 0.05 * min(updates[a].norm(), updates[b].norm()), (a, b)
    assert torch.equal(moved("muon"), updates["neomuon"])


def test_normuon126_moves_an_element_sqrt_width_times_as_far_as_muon():
    """Its learning rate must be read with that: 25 times at 640, the width of #126."""
    g = torch.randn(1, 64, 64)
    sizes = {}
    for name in ("muon_plain", "normuon126"):
        optimizer = optimizer_of(torch.nn.Parameter(torch.zeros(1, 64, 64)), name, muon_backend_steps=5)
        sizes[name] = optimizer.update(g, {}, 0.9).square().mean().sqrt().item()
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


# ---- Schedules


def stage(cfg, step, progress):
    """What the loop asks for: the default's schedule, then that of the options."""
    return Schedules(SimpleNamespace(cfg=cfg)).stage(schedule(cfg, step, progress), step, progress)


def rates(steps_and_progress, **settings):
    cfg = tiny_config(**{"iterations": 1000, "max_wallclock_seconds": 0} | settings)
    return [stage(cfg, step, progress).lr_scale for step, progress in steps_and_progress]


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
        assert stage(cfg, step, elapsed / 600).lr_scale == pytest.approx(expected, abs=1e-9), step
    assert stage(cfg, 3415, 0.130 * 3415 / 600).lr_scale == 1 > stage(cfg, 3416, 0.130 * 3416 / 600).lr_scale
    # the machine slows down: the same step is nearer to the end
    assert stage(cfg, 3000, 0.9).lr_scale == pytest.approx((3000 / 0.9 - 3000) / 1200)


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
    listed = cfg.step_shapes()
    assert occurring <= set(listed) and len(listed) == len(set(listed)) and listed[0] == (32, 256)
    for seq_len, batch_tokens in listed:
        micro_batches, sequences = batch_layout(cfg, 1, (seq_len, batch_tokens))
        assert micro_batches * sequences * seq_len == batch_tokens


def test_a_schedule_of_shapes_reads_the_stream_once_and_compiles_before_the_clock(data_dir, tmp_path, monkeypatch):
    """Every micro-batch shape of the timed loop was seen in warm-up; positions are those of one uninterrupted stream; the tokens are counted."""
    settings = {"seq_warmup_start": 8, "seq_warmup_steps": 8, "batch_ramp_start": 64, "batch_ramp_frac": 0.5, "iterations": 12, "warmup_steps": 1}
    cfg = tiny_config(**settings, data_path=data_dir, tokenizer_path=data_dir / "tokenizer.model", temp_scaling=0)
    warm, timed, read, seen = set(), set(), [], [set()]
    torch.manual_seed(0)
    model = fresh_model(cfg)
    seen[0], loss, following, clock = warm, model.parts.loss, train_gpt.Batches.next, train_gpt.Clock

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

    model.parts = model.parts._replace(loss=recorded_loss)
    monkeypatch.setattr(train_gpt, "Clock", started)
    monkeypatch.setattr(train_gpt.Batches, "next", recorded_next)
    log = Log(dataclasses.replace(cfg, log_dir=str(tmp_path)), World())
    figures = train(model, cfg, World(), log, None)
    assert timed and timed <= warm and len({t for _, t in timed}) == 3 and len(timed) > 3
    tokens = torch.cat(read)
    assert torch.equal(tokens, torch.from_numpy(TokenStream(cfg, "train").read(0, len(tokens)).astype(np.int64)))
    assert figures["tokens"] == len(tokens) < 12 * 256 and figures["steps"] == 12
    warmups = re.findall(r"^warmup:(\d+)/(\d+)$", next(tmp_path.glob("*.txt")).read_text(), re.M)
    assert warmups == [(str(i), str(len(cfg.step_shapes()))) for i in range(1, len(cfg.step_shapes()) + 1)]


def test_processes_must_divide_every_batch_of_the_schedule():
    """`main` asks for each before it starts: test_main.py."""
    layouts = lambda cfg: [batch_layout(cfg, 4, shape) for shape in cfg.step_shapes()]
    assert layouts(tiny_config(batch_ramp_start=128)) == [(1, 2), (1, 1)]
    with pytest.raises(UserError, match=r"WORLD_SIZE=4 must divide the 2 sequences of a step \(TRAIN_BATCH_TOKENS=64 / TRAIN_SEQ_LEN=32\)"):
        layouts(tiny_config(batch_ramp_start=64))


# ---- What happens around a step


HOOKS = [({"seq_ramp_start": 8}, Schedules), ({"batch_tokens_start": 64}, Schedules), ({"min_lr_ratio": 0.1}, Schedules), ({"lr_warmup_steps": 3}, Schedules),
         ({"warmdown_iters": 9}, Schedules), ({"warmdown_shape": "cosine"}, Schedules), ({"untie_at_fraction": 0.5, "warmup_steps": 2}, Untying),
         ({"ternary_commit_lambda": 0.1}, Commitment), ({"precision": "fp16"}, LossScaling), ({"grad_clip_norm": 1}, Clipping), ({"ema": 1}, Averaging),
         ({"churn_log_every": 5}, Churn), ({"embed_init": "bigram"}, BigramStart), ({"ternary_phase": ".2,.4"}, Softening)]  # fmt: skip


def test_each_setting_brings_its_hook_and_all_come_in_one_order():
    """What changes gradients comes after what they are made of, and a step that is left out by the scale is left out by all."""
    together = {}
    for settings, kind in HOOKS:
        model = tiny_model(num_layers=1, **settings)
        assert [type(hook) for hook in TrainingStep(model, model.cfg, World()).hooks] == [kind], settings
        together |= settings
    model = tiny_model(num_layers=1, **together)
    order = [Softening, Schedules, Untying, Commitment, LossScaling, Clipping, Averaging, Churn, BigramStart]
    assert [type(hook) for hook in TrainingStep(model, model.cfg, World()).hooks] == order


def test_other_precisions_scale_nothing():
    for precision in ("fp32", "bf16", "auto"):
        model = tiny_model(precision=precision)
        step = TrainingStep(model, model.cfg, World())
        assert step.hooks == [] and step.grads.scale == 1


def commitment_written_out(model):
    """lambda * sum over matrices of mean((w / alpha - code)^2), alpha the mean magnitude of each group; float64, autograd."""
    total = 0
    for module in model.modules():
        if isinstance(module, TernaryLinear):
            groups = module.weight.double().view(-1, module.group_size)
            u = groups / groups.abs().mean(1, keepdim=True)
            total = total + (u - module.ternarized()[0]).square().mean()
    return model.cfg.ternary_commit_lambda * total


@pytest.mark.parametrize("weight_quant", ["ternary", "binary"])
@pytest.mark.parametrize("stat", ["absmean", "rms"])
def test_commitment_does_not_pull_groups_of_zeros(weight_quant, stat):
    """As output projections are at the start: 1 / alpha would make a gradient of 15,625 out of a binary code's distance."""
    cfg = tiny_config(weight_quant=weight_quant, scale_stat=stat, ternary_commit_lambda=0.01)
    form = next(m.form for m in fresh_model(cfg).modules() if isinstance(m, train_gpt.TernaryLinear))
    w = torch.cat((torch.zeros(1, 2, 32), torch.randn(1, 2, 32))).requires_grad_()
    train_gpt.commitment(w, 32, form).backward()
    assert not w.grad[0].any() and w.grad[1].all() and w.grad.abs().max() < 10


def test_commitment_adds_its_gradient_once_a_step():
    for settings, loss_scale in (({}, 1), (PER_TENSOR, 1), ({"scale_group": "row"}, 4)):
        on, off = (tiny_model(ternary_commit_lambda=value, **settings) for value in (0.3, 0))
        x = tokens(on, 8)
        sums = []
        for model in (on, off):
            step = TrainingStep(model, model.cfg, World())
            step.grads.scale = loss_scale
            loss = lambda x, y, model=model: training_loss(model, x, y, 0.0)
            step.grads.compute(loss, x, x.roll(-1, 1), 2)
            assert len(step.hooks) == (model is on) and all(hook.after_gradients() for hook in step.hooks)
            sums.append((step.grads.loss.item(), [p.grad.clone() for p in model.parameters()]))
        assert sums[0][0] == sums[1][0]  # what is reported is the cross entropy
        extra = torch.autograd.grad(commitment_written_out(on), list(on.parameters()), allow_unused=True)
        for with_it, without, more in zip(sums[0][1], sums[1][1], extra, strict=True):
            torch.testing.assert_close(with_it, without + (loss_scale * more if more is not None else 0), rtol=1e-3, atol=4e-6)
    assert sum(more is not None for more in extra) == 12


def scaled_step():
    model = tiny_model(precision="fp16")
    step = TrainingStep(model, model.cfg, World())
    return step, step.hooks[0]


def test_the_loss_scale_halves_at_an_overflow_and_doubles_after_2000_good_steps():
    step, scaler = scaled_step()
    assert isinstance(scaler, LossScaling) and step.grads.scale == 65536
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
    assert step.grads.scale == 65536 and step.hooks[0] is not scaler and not any(opt.state for opt in step.optimizers)


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
        scaler.after_gradients()


def test_clipping_bounds_the_norm_of_all_gradients():
    def gradients(limit):
        model = tiny_model(grad_clip_norm=limit)
        step, x = TrainingStep(model, model.cfg, World()), tokens(model, 8)
        step.take(x, x.roll(-1, 1))
        return torch.cat([p.grad.flatten() for p in model.parameters()]), step.grads.loss.item()

    (free, loss), (clipped, same_loss), (bounded, _) = gradients(0), gradients(0.01), gradients(1e9)
    assert free.norm() > 0.05 and clipped.norm().item() == pytest.approx(0.01, rel=1e-3) and loss == same_loss
    torch.testing.assert_close(clipped / clipped.norm(), free / free.norm())
    torch.testing.assert_close(bounded, free)


def test_the_average_is_the_hand_computed_one_and_what_is_exported():
    settings = {"ema": 1, "ema_decay": 0.8, "ema_start_fraction": 0.5}
    model = tiny_model(**settings)
    world, cfg = World(), model.cfg
    step = TrainingStep(model, cfg, world)
    (averaging,) = step.hooks
    expected, x = None, torch.randint(320, (8, 32))
    for i in range(6):
        step.take(x, x.roll(-1, 1))
        averaging.after_step(i, i / 6)
        now = [p.detach().double() for p in model.parameters()]
        if i == 3:  # the first step at or beyond half the budget
            expected = now
        elif i > 3:
            expected = [0.8 * e + 0.2 * p for e, p in zip(expected, now, strict=True)]
    last = [p.detach().clone() for p in model.parameters()]
    averaging.finish()
    for p, e, w in zip(model.parameters(), expected, last, strict=True):
        torch.testing.assert_close(p.detach().double(), e, rtol=1e-5, atol=1e-6)
        assert not torch.equal(p.detach(), w)
    for m in model.modules():
        if isinstance(m, TernaryLinear):  # codes and scales of the average itself
            codes, scale = ternarize(m.weight.detach(), m.group_size, m.form)
            assert torch.equal(m.operand, (codes * scale).view_as(m.weight))
    loaded, _ = load_artifact(save_artifact(model, cfg), "fp32")
    assert torch.equal(model(x, x), loaded(x, x))


def test_churn_counts_the_codes_that_changed():
    model, lines = tiny_model(churn_log_every=2), []
    step = TrainingStep(model, model.cfg, World())
    (churn,) = step.hooks

    def codes():
        layers = [m for m in model.modules() if isinstance(m, TernaryLinear)]
        return torch.cat([ternarize(m.weight.detach(), m.group_size, m.form)[0].flatten() for m in layers])

    before, x, start = codes(), torch.randint(320, (8, 32)), [p.detach().clone() for p in model.parameters()]
    expected = []
    for i in range(5):
        step.take(x, x.roll(-1, 1))
        lines.append(churn.after_step(i, 0))
        if i % 2:
            now = codes()
            expected.append(f"churn:{(now != before).double().mean():.4f} zero_frac:{(now == 0).double().mean():.4f} step:{i + 1}/24")
            before = now
    assert lines[::2] == [""] * 3 and lines[1::2] == expected and not lines[1].startswith("churn:0.0000")
    for p, w in zip(model.parameters(), start, strict=True):
        p.data.copy_(w)
    step.restart()  # as after the warm-up: what is counted is what changes from here on
    assert step.hooks[0].after_step(1, 0).startswith("churn:0.0000")


def test_untying_keeps_the_function_and_goes_on_with_the_head_alone(data_dir, tmp_path):
    """Before: the tied output. At the switch: a head with the product's weights. After: what TIE_EMBEDDINGS=0 is, and stored so."""
    cfg = tiny_config(tie_embeddings=2, untie_at_fraction=0.5, data_path=data_dir, fp_storage="FP16", warmup_steps=2, iterations=8, artifact_codec="base3")
    model = tiny_model(**{k: getattr(cfg, k) for k in ("tie_embeddings", "untie_at_fraction", "fp_storage", "warmup_steps")})
    h, untying = torch.randn(2, 3, 64), Untying(SimpleNamespace(model=model, cfg=model.cfg))
    with rounded_once(model):
        tied = model.output(model.embed_out(h))
        untying.before_step(0.49)
        assert torch.equal(model.output(model.embed_out(h)), tied)
        untying.before_step(0.5)
        torch.testing.assert_close(model.output(model.embed_out(h)), tied, rtol=1e-2, atol=1e-3)  # float16 weights
        before = model.output.head.weight.clone()
        untying.before_step(0.6)  # a second time changes nothing
        assert torch.equal(model.output.head.weight, before)

    torch.manual_seed(0)
    model = fresh_model(cfg)
    train(model, cfg, World(), Log(dataclasses.replace(cfg, log_dir=str(tmp_path)), World()), None)
    product = (model.table.weight + model.output.tied.correction.weight) @ model.embed_out.weight
    assert model.output.untied and model.output.tied.correction.weight.any()
    assert model.embed_out.weight.grad.abs().sum() == 0 and model.output.head.weight.grad.abs().sum() > 0
    assert not torch.allclose(model.output.head.weight, product, atol=1e-2)
    blob = save_artifact(model, cfg)
    loaded, stored = load_artifact(blob)
    assert stored.tie_embeddings == 0 and stored.untie_at_fraction == 0
    x = tokens(model)
    assert torch.equal(loaded(x, x.roll(-1, 1)), model(x, x.roll(-1, 1)))
    assert count_parameters(model) == count_parameters(loaded) == count_parameters(fresh_model(tiny_config(tie_embeddings=0)))
    assert artifact_config(cfg, stored).tie_embeddings == 0  # EVAL_ONLY with the settings of the training run
    with pytest.raises(UserError, match="TIE_EMBEDDINGS=2"):
        artifact_config(tiny_config(tie_embeddings=2), stored, {"TIE_EMBEDDINGS"})


def test_a_run_too_coarse_for_the_switch_is_stored_untied_all_the_same(data_dir, tmp_path):
    cfg = tiny_config(untie_at_fraction=0.9, data_path=data_dir, warmup_steps=0, iterations=2, artifact_codec="base3")
    model = fresh_model(cfg)
    train(model, cfg, World(), Log(dataclasses.replace(cfg, log_dir=str(tmp_path)), World()), None)
    x = tokens(model)
    assert torch.equal(load_artifact(save_artifact(model, cfg))[0](x, x), model(x, x))
    assert model.output.untied and model.output.head.weight.any()


def test_the_warm_up_takes_steps_with_both_outputs_and_restores_the_weights(tmp_path):
    """On a GPU it compiles what it runs: neither graph may be left to the clock, whatever the shapes of the schedule."""
    cfg = tiny_config(untie_at_fraction=0.9, warmup_steps=3, seq_len_start=16, seq_schedule_fraction=0.5, temp_scaling=0)
    model, seen = fresh_model(cfg), set()
    before = [p.detach().clone() for p in model.parameters()]
    with rounded_once(model):
        take_step = TrainingStep(model, cfg, World())
        loss_function = take_step.loss_function
        take_step.loss_function = lambda m, x, *rest: (seen.add((x.size(1), m.output.untied)), loss_function(m, x, *rest))[1]
        warm_up(model, World(), Log(dataclasses.replace(cfg, log_dir=str(tmp_path)), World()), take_step)
    assert seen == {(32, False), (32, True), (16, False), (16, True)}
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


# ---- Starts


def loop_at(step=0, lines=None):
    return SimpleNamespace(step=step, clock=train_gpt.Clock(World()), log=(lines if lines is not None else []).append)


def started(cfg, world=World(), lines=None):  # noqa: B008
    """A model as it is when its first step begins."""
    torch.manual_seed(0)
    model = fresh_model(cfg)
    with rounded_once(model):
        step = TrainingStep(model, cfg, world)
        for hook in step.hooks:
            hook.begin(loop_at(lines=lines))
    return model


def counted_logits(stream, pieces, rank):
    """Float64, pair by pair: (factors of log p(b|a) / p(b) multiplied out, with the long ones cut; the bias)."""
    pairs = np.zeros((pieces, pieces))
    for a, b in itertools.pairwise(stream.tolist()):
        pairs[a, b] += 1
    p = (pairs.sum(0) + 0.1) / (pairs.sum() + 0.1 * pieces)
    first = pairs.sum(1) / pairs.sum()
    lift = np.log((pairs + 100 * p) / (pairs.sum(1, keepdims=True) + 100) / p)
    rows, columns = np.sqrt(first + 1e-6)[:, None], np.sqrt(p + 1e-6)
    u, s, vt = np.linalg.svd(rows * lift * columns)
    left = u[:, :rank] * np.sqrt(s[:rank]) / rows
    right = (vt[:rank] * np.sqrt(s[:rank])[:, None] / columns).T
    length = np.linalg.norm(left, axis=1, keepdims=True)
    return left / np.maximum(1, length / np.quantile(length, 0.98)) @ right.T, np.maximum(np.log(p / p.max()) + 3, -9)


@pytest.mark.parametrize("width", [24, 64, 65])
def test_a_model_that_starts_from_bigrams_predicts_what_was_counted(width, data_dir):
    cfg, lines = tiny_config(embed_init="bigram", embed_dim=width, fp_storage="FP16", logit_softcap=1000, data_path=data_dir), []
    model = started(cfg, lines=lines)
    with torch.no_grad():
        h = model.hidden(torch.arange(320)[:, None])
        logits, bias = model.logits(h)[:, 0].double().numpy(), model.vocab_bias.double().numpy()
    stream = TokenStream(cfg, "train").read(0, TokenStream(cfg, "train").num_tokens)
    expected, expected_bias = counted_logits(stream, 320, (width - 1) // 2)
    assert np.allclose(bias, expected_bias, atol=1e-4)
    frequent = np.bincount(stream, minlength=320) > 20  # the float32 SVD has little to say of the others
    found, expected = (logits - bias)[frequent][:, frequent], expected[frequent][:, frequent]
    assert np.abs(expected).max() > 1 and np.abs(found - expected).max() < 0.02 * np.abs(expected).max()
    assert len(lines) == 1 and re.fullmatch(r"embed_init:bigram t:\d+ms", lines[0])


def test_a_start_from_bigrams_knows_more_than_the_frequencies_and_survives_its_storage(data_dir):
    """In FP8 too, with the default's cap."""
    cfg = tiny_config(embed_init="bigram", embed_dim=64, data_path=data_dir)
    model = started(cfg)
    stream = TokenStream(cfg, "train").read(0, 4097).astype(np.int64)
    x, y = (torch.from_numpy(part).view(-1, 32) for part in (stream[:-1], stream[1:]))
    share = np.bincount(y.flatten(), minlength=320) / y.numel()
    entropy = -(share[share > 0] * np.log(share[share > 0])).sum()
    with torch.no_grad():
        assert model(x, y).mean() < entropy - 0.5
        loaded, _ = load_artifact(save_artifact(model, cfg))
        assert torch.equal(loaded(x, y), model(x, y))


def test_a_run_that_goes_on_does_not_start_from_bigrams_again(data_dir):
    model, lines = fresh_model(tiny_config(embed_init="bigram", data_path=data_dir)), []
    before = [p.detach().clone() for p in model.parameters()]
    with rounded_once(model):
        [hook] = TrainingStep(model, model.cfg, World()).hooks
        hook.begin(loop_at(step=3, lines=lines))
    assert not lines and all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def test_the_random_start_is_not_touched(data_dir):
    ours, plain = (started(tiny_config(embed_init="random", data_path=folder)) for folder in (data_dir, "nowhere"))
    torch.manual_seed(0)
    fresh = fresh_model(tiny_config())
    assert all(torch.equal(p, q) and torch.equal(p, r) for p, q, r in zip(ours.parameters(), plain.parameters(), fresh.parameters(), strict=True))


SOFT = {"ternary_phase": ".2,.6"}


@pytest.mark.parametrize("progress, share", [(0.0, 0.0), (0.2, 0.0), (0.3, 0.25), (0.6, 1.0), (0.9, 1.0)])
def test_a_soft_step_has_the_gradients_of_the_blend_and_leaves_ternary_weights(progress, share):
    model = tiny_model(**SOFT)
    layers = [m for m in model.modules() if isinstance(m, TernaryLinear)]
    x = tokens(model, 8)

    def blend(layer):
        codes, scale = ternarize(layer.weight.detach(), layer.group_size, layer.form)
        return (1 - share) * layer.weight.detach() + share * (codes * scale).view_as(layer.weight)

    by_hand = tiny_model(**SOFT).use(Ops())
    for layer in by_hand.modules():
        if isinstance(layer, TernaryLinear):
            layer.rounded = lambda layer=layer: blend(layer)
    loss, nats = training_loss(by_hand, x, x.roll(-1, 1), 1e-4)
    expected = torch.autograd.grad(loss / x.numel(), list(by_hand.parameters()), allow_unused=True)
    with rounded_once(model):
        step = TrainingStep(model, model.cfg, World())
        assert [type(hook) for hook in step.hooks] == [Softening]
        step.hooks[0].stage(schedule(model.cfg, 0, progress), 0, progress)
        step.grads.compute(lambda *micro: step.loss_function(model, *micro, 1e-4), x, x.roll(-1, 1), 2)
        assert step.grads.loss.item() == pytest.approx(nats.item() / x.numel(), rel=1e-5)
        for (name, p), g in zip(model.named_parameters(), expected, strict=True):
            assert g is None or torch.allclose(p.grad, g, rtol=1e-3, atol=1e-6), name
        apply_stage(step.optimizers, schedule(model.cfg, 0, progress))
        for opt in step.optimizers:
            opt.step()
        step.publish()
        assert all(torch.equal(layer.operand, layer.rounded()) for layer in layers)


@pytest.mark.parametrize("text", ["1", ".2", ".4,.2", ".2,.2", "a,b", ".2,1.5", "-.1,.3", ".1,.2,.3"])
def test_a_phase_that_is_none_is_refused(text):
    with pytest.raises(UserError, match=re.escape(f"TERNARY_PHASE='{text}': expected 0, or start,end as .2,.3")):
        tiny_config(ternary_phase=text)


def test_starts_that_a_model_has_no_place_for_are_refused():
    for settings in ({"embed_dim": 0}, {"tie_embeddings": 0}, {"bigram_hash": 1}, {"logit_head_type": "tversky"}, {"embed_dim": 130}):
        with pytest.raises(UserError, match="EMBED_INIT='bigram': expected random without a factored, tied table"):
            tiny_config(embed_init="bigram", **settings)
    for settings in ({"weight_quant": "none"}, {"act_quant": "fp8"}):
        with pytest.raises(UserError, match="TERNARY_PHASE='0,.5': expected 0 with WEIGHT_QUANT=none or ACT_QUANT=fp8"):
            tiny_config(ternary_phase="0,.5", **settings)


def starts_agree(world: World) -> list[float]:
    """A start from bigrams of the first process's data, three soft steps and one more: the losses."""
    cfg, losses = tiny_config(embed_init="bigram", ternary_phase="0,.75", data_path=f"rank{world.rank}"), []
    folder = Path(cfg.data_path)
    folder.mkdir(exist_ok=True)
    write_shard(folder / "fineweb_train_000000.bin", np.random.default_rng(world.rank).zipf(1.3, 5000) % 320)
    torch.manual_seed(0)
    model = fresh_model(cfg)
    with rounded_once(model):
        step = TrainingStep(model, cfg, world)
        for hook in step.hooks:
            hook.begin(loop_at())
        for i in range(4):
            stage = schedule(cfg, i, i / 4)
            for hook in step.hooks:
                stage = hook.stage(stage, i, i / 4)
            apply_stage(step.optimizers, stage)
            step.take(*(t.chunk(world.size)[world.rank] for t in (tokens(model, 8, seed=i), tokens(model, 8, seed=i + 1))))
            losses.append(step.grads.loss.item())
        step.share_latent()
        assert replicas_agree(model, world)
    return losses


# ---- Whole runs, and two processes


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
    machine = Machine()
    blob, run = train_and_export(machine.check(cfg, world, log), world, machine, log, val)
    model, _ = load_artifact(blob, cfg.precision)
    assert evaluate(model, val, cfg, world)[0] == run["val_loss"] < math.log(320) - 0.4
    text = next((tmp_path / "logs").glob("*.txt")).read_text()
    assert len(re.findall(r"^churn:0\.\d{4} zero_frac:0\.\d{4} step:(?:8|16|24)/24$", text, re.M)) == (3 if "churn_log_every" in settings else 0)


NAMES = ["neomuon", *OF_OTHERS, "adamw"]
AROUND = [*({"matrix_optimizer": name, "matrix_lr": 1e-3, "adam_lr": 1e-3} for name in NAMES), {"ema": 1, "ema_decay": 0.5, "ema_start_fraction": 0},
          {"precision": "fp16"}, {"grad_clip_norm": 0.05}]  # fmt: skip


def steps_agree(world: World) -> list[str]:
    """Every optimizer and hook on two processes beside one; then an overflow that one alone can see."""
    torch.manual_seed(0)
    x = torch.randint(320, (8, 32))
    y, share = x.roll(-1, 1), slice(4 * world.rank, 4 * world.rank + 4)
    for settings in (own | {"num_layers": 2} for own in AROUND):
        together, alone = tiny_model(**settings), tiny_model(**settings)
        steps = [(TrainingStep(together, together.cfg, world), x[share], y[share])]
        if world.is_main:
            steps.append((TrainingStep(alone, alone.cfg, World()), x, y))
        for step, a, b in steps:
            for i in range(3):
                step.take(a, b)
                for hook in step.hooks:
                    hook.after_step(i, 0.5)
            for hook in step.hooks:
                hook.finish()
            step.share_latent()
        if world.is_main:
            start = dict(tiny_model(num_layers=2).named_parameters())
            # float16 rounds each micro-batch's weight gradient; the others add the same two numbers in another order
            tolerance = 5e-3 if "precision" in settings else 2e-5
            for (name, p), q in zip(together.named_parameters(), alone.parameters(), strict=True):
                difference = (p - q).abs().max().item()
                assert torch.allclose(p, q, rtol=tolerance, atol=tolerance), (settings, name, difference)
                assert not torch.equal(q, start[name])
        assert replicas_agree(together, world)

    model = tiny_model(precision="fp16")  # the overflow: in the matrices whose gradients one process sums
    step = TrainingStep(model, model.cfg, world)
    before, compute = [p.detach().clone() for p in model.parameters()], step.grads.compute

    def overflowing(*args):
        compute(*args)
        if world.rank == 1:
            step.grads.banks[0].shard.grad.view(-1)[0] = math.inf

    step.grads.compute = overflowing
    step.take(x[share], y[share])  # both skip the step and halve the scale
    assert step.grads.scale == 2.0**15 and all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    step.grads.compute = compute
    step.take(x[share], y[share])
    assert step.grads.scale == 2.0**15 and not all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    return [str(settings) for settings in AROUND]


TOGETHER = [
    {"tie_embeddings": 2, "untie_at_fraction": 0.5, "warmup_steps": 2, "mtp_heads": 1, "smear": 1},
    {"attn_proj_type": "tversky", "tversky_num_features": 16, "tversky_feature_pools": 2, "bigram_hash": 1, "refiner": 1, "mlp_groups": 2},
    {"logit_head_type": "tversky", "diff_attn": 1, "activation": "swiglu", "eval_depth_recurrence": 3, "training_depth_recurrence": 2},
    {"num_unique_layers": 2, "recurrence_factor": 2, "num_layers": 4, "scale_group": "tensor", "scale_storage": "fp16", "act_quant": "int8", "input_norm": "none",
     "qkv_split": 1, "ternary_commit_lambda": 0.05, "gradient_checkpointing": 1, "fp_storage": "FP4"},
    {"weight_quant": "binary", "position": "radial", "xsa_last_n": 1, "mlp_hidden": 96, "ternary_commit_lambda": 0.05},
    {"weight_quant": "none", "ntk_rope": 1, "rope_type": "rope"},
]  # fmt: skip


def losses_together(world: World) -> list[list[float]]:
    """For each of TOGETHER the losses of 4 steps, then of an evaluation by all processes."""
    found = []
    for cfg in (tiny_config(**settings) for settings in TOGETHER):
        torch.manual_seed(0)
        model, losses = fresh_model(cfg), []
        with rounded_once(model):
            take_step = TrainingStep(model, cfg, world)
            for i in range(4):
                for hook in take_step.hooks:
                    hook.before_step(i / 4)
                x, y = (t.chunk(world.size)[world.rank] for t in (tokens(model, 8, seed=i), tokens(model, 8, seed=i + 1)))
                take_step.take(x, y)
                losses.append(take_step.grads.loss.item())
            take_step.share_latent()
            assert replicas_agree(model, world)
            val = ValidationSet(torch.arange(401) * 7 % 320, 1000)
            found.append([*losses, evaluate(model, val, cfg, world)[0]])
    return found


def test_two_processes_train_options_as_one_does(tmp_path, monkeypatch):
    """Every optimizer, every hook, the options of the model, and (of test_optimizer.py) matrices that are shared out."""
    functions = ("test_optimizer.sharded_matrices", "test_options_training.steps_agree", "test_options_training.losses_together",
                 "test_options_training.starts_agree")  # fmt: skip
    collectives, around, losses, starts = on_processes(2, tmp_path, *functions)
    monkeypatch.chdir(tmp_path)
    assert starts == pytest.approx(starts_agree(World()), rel=1e-6)
    assert collectives == ["all-reduce", *["reduce-scatter", "all-gather"] * 4] and len(around) == len(AROUND)
    for settings, ours, alone in zip(TOGETHER, losses, losses_together(World()), strict=True):
        assert ours == pytest.approx(alone, rel=1e-6), settings
