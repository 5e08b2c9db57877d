"""Roles, NeoMuon and the schedule; matrices that several processes share out."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from conftest import fresh_model, on_processes, tiny_config, tiny_model

from train_gpt import (
    Clipping,
    Gradients,
    NeoMuon,
    Table,
    TableProjection,
    TernaryLinear,
    TrainingStep,
    World,
    apply_stage,
    build_optimizers,
    orthogonalize,
    parameter_owners,
    schedule,
)


def test_roles_follow_the_class_that_owns_the_parameter():
    model = tiny_model()
    roles = {name: role for name, _, _, role in parameter_owners(model)}
    assert roles.keys() == dict(model.named_parameters()).keys()
    for name, module in model.named_modules():
        if isinstance(module, TernaryLinear):
            assert roles[f"{name}.weight"] == ("matrix_lr", "ternary")
        elif isinstance(module, Table):
            assert roles[f"{name}.weight"] == ("tied_embed_lr", "table")
        elif isinstance(module, TableProjection):
            assert roles[f"{name}.weight"] == ("matrix_lr", "table")
    controls = {name.split(".")[-1] for name, role in roles.items() if role == ("scalar_lr", "control")}
    assert controls == {"q_gain", "stream_mix", "attn_scale", "mlp_scale", "skip_weights", "vocab_bias", "gate", "amount"}
    assert {role.storage for role in roles.values()} == {"ternary", "table", "control"}


@pytest.mark.parametrize("settings", [{}, {"embed_dim": 0}, {"matrix_optimizer": "adamw", "adam_lr": 0.001}, {"matrix_optimizer": "muon_plain"},
                                      {"activation": "relu"}, {"num_layers": 1}])  # fmt: skip
def test_every_parameter_is_in_one_optimizer_and_learns_after_one_step(settings):
    """Output projections start at 0, so at the first step what feeds them has no gradient; after it, everything has one."""
    cfg = tiny_config(**settings)
    torch.manual_seed(0)
    model, world = fresh_model(cfg), World()
    take_step = TrainingStep(model, cfg, world)
    memory = [range(p.data_ptr(), p.data_ptr() + 4 * p.numel()) for opt in take_step.optimizers for p in opt.params]
    for name, p in model.named_parameters():
        assert p.numel() == 0 or sum(p.data_ptr() in span for span in memory) == 1, name
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    x = torch.arange(8 * cfg.train_seq_len).view(8, -1) % cfg.vocab_size  # every token occurs
    for _ in range(3):
        take_step.take(x, x.roll(-1, 1))
    for name, p in model.named_parameters():
        assert p.numel() == 0 or p.grad.abs().sum() > 0, name  # one layer has no skips
        assert p.numel() == 0 or not torch.equal(p, before[name]), name


@pytest.mark.parametrize("shape", [(3, 56, 40), (2, 64, 16), (2, 16, 64)])
def test_orthogonalize_brings_singular_values_near_one_and_keeps_directions(shape):
    torch.manual_seed(0)
    g = torch.randn(shape)
    u = orthogonalize(g, 5)
    values = torch.linalg.svdvals(u)
    assert values.min() > 0.3 and values.max() < 1.3  # Muon's quintic oscillates around 1
    left, _, right = torch.linalg.svd(g, full_matrices=False)
    core = left.mT @ u @ right.mT  # diagonal in g's own singular vectors
    torch.testing.assert_close(core, torch.diag_embed(core.diagonal(dim1=-2, dim2=-1)), rtol=0, atol=2e-3)


def newton_schulz(u: np.ndarray, steps: int = 3) -> np.ndarray:
    """Of one matrix in float64, transposed where it is high, times sqrt(rows / columns) there."""
    rows, columns = u.shape
    x = u.T if rows > columns else u
    x = x / np.linalg.norm(x)
    for _ in range(steps):
        s = x @ x.T
        x = 3.4445 * x + (-4.775 * s + 2.0315 * s @ s) @ x
    return x.T * math.sqrt(rows / columns) if rows > columns else x


def rms(v: np.ndarray) -> float:
    return math.sqrt(sum(float(e) ** 2 for e in v) / len(v))


@pytest.mark.parametrize("shape", [(12, 8), (8, 20)])
def test_neomuon_step_is_its_definition(shape):
    """Three steps of three matrices, which must not mix, written out: momentum in sum form, which warms up, Nesterov, rows to unit
    RMS, Newton-Schulz, weight decay."""
    cfg = tiny_config(muon_wd=0.1, warmdown_fraction=0.5)
    generator = torch.Generator().manual_seed(1)
    p = torch.nn.Parameter(torch.randn(3, *shape, generator=generator))
    scale = torch.tensor([1.0, 1e-3, 30.0]).view(3, 1, 1)
    expected, buffer = p.detach().double().numpy(), np.zeros((3, *shape))
    optimizer = NeoMuon([p], cfg, World())
    for step in range(3):
        p.grad = torch.randn(p.shape, generator=generator) * scale
        apply_stage([optimizer], schedule(cfg, step * 250, 0.5))
        optimizer.step()
        momentum, g = (0.85, 0.9, 0.95)[step], p.grad.double().numpy()
        buffer = momentum * buffer + g
        for i, u in enumerate(g + momentum * buffer):
            expected[i] = expected[i] * (1 - 0.04 * 0.1) - 0.04 * newton_schulz(np.stack([row / rms(row) for row in u]))
    np.testing.assert_allclose(p.detach().double().numpy(), expected, rtol=1e-4, atol=1e-5)


def sharded_matrices(world: World) -> list[str]:
    """Three steps of this process's share beside those of one that does everything; the kinds of collectives of a step."""
    settings = {"num_layers": 3, "mlp_mult": 1, "grad_clip_norm": 50}  # nine matrices of one shape: no multiple of the processes
    model, alone = tiny_model(**settings), tiny_model(**settings)
    step, step_alone = TrainingStep(model, model.cfg, world), TrainingStep(alone, alone.cfg, World())
    for i in range(3):
        for p, q in zip(model.parameters(), alone.parameters(), strict=True):
            parts = [torch.randn(p.shape, generator=torch.Generator().manual_seed(100 * i + rank)) for rank in range(world.size)]
            p.grad.copy_(parts[world.rank])
            q.grad.copy_(sum(parts))
        for bank in step.grads.banks:
            world.sum_shares_(bank.grads)
        world.sum_(step.grads.flat)
        for s in (step, step_alone):
            assert isinstance(s.hooks[0], Clipping) and s.hooks[0].after_gradients()
            for opt in s.optimizers:
                opt.step()
            s.publish()
    for a, b in zip(model.modules(), alone.modules(), strict=True):
        if isinstance(a, TernaryLinear):
            assert (a.operand == b.operand).float().mean() > 0.999
    step.share_latent()
    for (name, p), q in zip(model.named_parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5, msg=name)
    assert len(step.grads.banks) == 4
    return [kind for kind, _ in step.communication(world.size)]


@pytest.mark.slow
def test_sharded_matrices_equal_those_of_one_process(tmp_path):
    """Gradients, clipping, updates, codes and latent weights of matrices that four processes share out; two: test_options_training.py."""
    assert on_processes(4, tmp_path, "test_optimizer.sharded_matrices") == [["all-reduce", *["reduce-scatter", "all-gather"] * 4]]


def test_schedule_is_constant_then_linear_and_momentum_warms_up():
    cfg = tiny_config(warmdown_fraction=0.2, muon_momentum_warmup_steps=500)
    table = [(0, 0.0, 1.0, 0.85), (250, 0.5, 1.0, 0.9), (500, 0.8, 1.0, 0.95), (600, 0.9, 0.5, 0.95), (700, 0.99, 0.05, 0.95), (700, 1.0, 0.0, 0.95)]
    for step, progress, lr_scale, momentum in table:
        stage = schedule(cfg, step, progress)
        assert stage.lr_scale == pytest.approx(lr_scale) and stage.momentum == pytest.approx(momentum)
        assert stage[2:] == (32, 256)
    assert schedule(tiny_config(warmdown_fraction=0), 0, 0.99).lr_scale == 1


def test_stage_scales_every_group_from_its_base():
    cfg = tiny_config(warmdown_fraction=0.2)
    model = tiny_model()
    optimizers = build_optimizers(model, cfg, World(), Gradients(model, World()).banks)
    apply_stage(optimizers, schedule(cfg, 0, 0.9))
    assert sorted({round(o.group["lr"], 6) for o in optimizers}) == [0.01, 0.02]
