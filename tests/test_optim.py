"""Roles, NeoMuon and the schedule."""

from __future__ import annotations

import pytest
import torch
from conftest import ROOT, launch, tiny_config, tiny_model

from train_gpt import (
    GPT,
    Gradients,
    NeoMuon,
    Table,
    TableProjection,
    TernaryLinear,
    TrainingStep,
    UserError,
    World,
    apply_stage,
    batch_layout,
    build_optimizers,
    clip_gradients,
    orthogonalize,
    parameter_owners,
    schedule,
    training_loss,
)


def test_roles_follow_the_class_that_owns_the_parameter():
    model = tiny_model()
    roles = {name: role for name, _, _, role in parameter_owners(model)}
    assert roles.keys() == dict(model.named_parameters()).keys()
    for name, module in model.named_modules():
        if isinstance(module, TernaryLinear):
            assert roles[f"{name}.weight"] == ("matrix", "ternary")
        elif isinstance(module, Table):
            assert roles[f"{name}.weight"] == ("table", "table")
        elif isinstance(module, TableProjection):
            assert roles[f"{name}.weight"] == ("matrix", "table")
    controls = {name.split(".")[-1] for name, role in roles.items() if role.optimizer == "control"}
    assert controls == {"q_gain", "resid_mix", "attn_scale", "mlp_scale", "skip_weights", "vocab_bias"}


@pytest.mark.parametrize("settings", [{}, {"embed_dim": 0}, {"matrix_optimizer": "adamw", "adam_lr": 0.001}, {"matrix_optimizer": "muon_plain"},
                                      {"activation": "relu"}, {"num_layers": 1}])  # fmt: skip
def test_every_parameter_is_in_one_optimizer_and_learns_after_one_step(settings):
    """Output projections start at 0, so at the first step what feeds them has no gradient; after it, everything has one."""
    cfg = tiny_config(**settings)
    torch.manual_seed(0)
    model, world = GPT(cfg), World()
    take_step = TrainingStep(model, cfg, world)
    memory = [range(p.data_ptr(), p.data_ptr() + 4 * p.numel()) for opt in take_step.optimizers for group in opt.param_groups for p in group["params"]]
    for name, p in model.named_parameters():
        assert p.numel() == 0 or sum(p.data_ptr() in span for span in memory) == 1, name
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    x = torch.arange(8 * cfg.train_seq_len).view(8, -1) % cfg.vocab_size  # every token occurs
    for _ in range(3):
        take_step.take(x, x.roll(-1, 1))
    for name, p in model.named_parameters():
        assert p.numel() == 0 or p.grad.abs().sum() > 0, name  # one layer has no skips
        assert p.numel() == 0 or not torch.equal(p, before[name]), name


def test_gradients_do_not_depend_on_the_number_of_micro_batches():
    model, world = tiny_model(), World()
    grads = Gradients(model, world)
    x = torch.randint(320, (8, 32))
    results = []
    for micro_batches in (1, 2, 8):
        grads.compute(lambda a, b: training_loss(model, a, b, 1e-4), x, x.roll(-1, 1), micro_batches)
        results.append([p.grad.clone() for p in model.parameters()])
        assert grads.loss.item() == pytest.approx(model(x, x.roll(-1, 1)).mean().item(), rel=1e-5)
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)


def test_clipping_bounds_the_norm_of_all_gradients():
    model, world = tiny_model(), World()
    grads = Gradients(model, world)
    x = torch.randint(320, (8, 32))
    grads.compute(lambda a, b: training_loss(model, a, b, 1e-4), x, x, 1)
    before = torch.cat([p.grad.flatten() for p in model.parameters()])
    loss = grads.loss.item()
    clip_gradients(grads, world, 0.01)
    after = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert before.norm() > 0.02 and after.norm().item() == pytest.approx(0.01, rel=1e-3)
    torch.testing.assert_close(after / after.norm(), before / before.norm())
    assert grads.loss.item() == loss
    clip_gradients(grads, world, 1e9)
    torch.testing.assert_close(torch.cat([p.grad.flatten() for p in model.parameters()]), after)


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


def test_neomuon_step_is_its_definition():
    """Two steps of two matrices, written out: momentum in sum form, Nesterov, rows to unit RMS, Newton-Schulz, sqrt(rows/columns)."""
    cfg = tiny_config(muon_wd=0.1)
    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.randn(2, 12, 8))
    expected, buffer = p.detach().clone().double(), torch.zeros(2, 12, 8).double()
    optimizer = NeoMuon([p], cfg, World())
    for step in range(2):
        g = torch.randn(2, 12, 8)
        p.grad = g
        apply_stage([optimizer], schedule(cfg, step * 250, 0.5))
        momentum, lr = 0.85 + 0.05 * step, 0.04
        optimizer.step()
        buffer = momentum * buffer + g.double()
        for i, u in enumerate(g.double() + momentum * buffer):
            u = u / u.square().mean(1, keepdim=True).sqrt()
            x = u.T / u.norm()
            for _ in range(3):
                s = x @ x.T
                x = 3.4445 * x + (-4.775 * s + 2.0315 * s @ s) @ x
            expected[i] = expected[i] * (1 - lr * 0.1) - lr * (12 / 8) ** 0.5 * x.T
    torch.testing.assert_close(p.detach().double(), expected, rtol=1e-4, atol=1e-5)


SHARDED = """
import sys, torch
sys.path[:0] = [{tests!r}]
from conftest import tiny_model
from train_gpt import TernaryLinear, TrainingStep, World, clip_gradients
world = World.from_env()
settings = dict(num_layers=3, mlp_mult=1)  # nine matrices of one shape: no multiple of the processes
model, alone = tiny_model(**settings), tiny_model(**settings)
step, step_alone = TrainingStep(model, model.cfg, world), TrainingStep(alone, alone.cfg, World())
for i in range(3):
    for (name, p), q in zip(model.named_parameters(), alone.parameters()):
        parts = [torch.randn(p.shape, generator=torch.Generator().manual_seed(100 * i + rank)) for rank in range(world.size)]
        p.grad.copy_(parts[world.rank])
        q.grad.copy_(sum(parts))
    for bank in step.grads.banks:
        world.sum_shares_(bank.grads)
    world.sum_(step.grads.flat)
    for s in (step, step_alone):
        clip_gradients(s.grads, s.world, 50.0)
        for opt in s.optimizers:
            opt.step()
        s.publish()
for a, b in zip(model.modules(), alone.modules()):
    if isinstance(a, TernaryLinear):
        assert (a.operand == b.operand).float().mean() > 0.999
for bank in step.grads.banks:
    bank.share_latent()
for (name, p), q in zip(model.named_parameters(), alone.parameters()):
    torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5, msg=name)
assert len(step.grads.banks) == 4 and sum(kind == "all-gather" for kind, _ in step.communication(world.size)) == 4
sys.stdout.write("ranks %d agree\\n" % world.size)  # in one piece: the ranks share the terminal
world.close()
"""


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
def test_sharded_matrices_equal_those_of_one_process(processes, tmp_path):
    """Gradients, clipping, updates, codes and latent weights of matrices that several processes share out."""
    script = tmp_path / "sharded.py"
    script.write_text(SHARDED.format(tests=str(ROOT / "tests")))
    done = launch({}, tmp_path, processes, argv=[str(script)])
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count(f"ranks {processes} agree") == processes


def test_schedule_is_constant_then_linear_and_momentum_warms_up():
    cfg = tiny_config(warmdown_fraction=0.2, muon_momentum_warmup_steps=500)
    table = [(0, 0.0, 1.0, 0.85), (250, 0.5, 1.0, 0.9), (500, 0.8, 1.0, 0.95), (600, 0.9, 0.5, 0.95), (700, 0.99, 0.05, 0.95), (700, 1.0, 0.0, 0.95)]
    for step, progress, lr_scale, momentum in table:
        stage = schedule(cfg, step, progress)
        assert stage.lr_scale == pytest.approx(lr_scale) and stage.momentum == pytest.approx(momentum)
    assert schedule(tiny_config(warmdown_fraction=0), 0, 0.99).lr_scale == 1


def test_stage_scales_every_group_from_its_base():
    cfg = tiny_config()
    model = tiny_model()
    optimizers = build_optimizers(model, cfg, World(), Gradients(model, World()).banks)
    apply_stage(optimizers, schedule(cfg, 0, 0.9))
    assert sorted({round(g["lr"], 6) for o in optimizers for g in o.param_groups}) == [0.01, 0.02]


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
