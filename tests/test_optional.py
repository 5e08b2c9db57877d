"""Optional systems: off they leave nothing behind; on, each is what its definition says, is trained, causal, and comes back exactly."""

from __future__ import annotations

import json
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, TINY, launch, tiny_config, tiny_model

from train_gpt import (
    GPT,
    Config,
    Log,
    TrainingStep,
    UserError,
    ValidationSet,
    World,
    artifact_config,
    as_stored,
    block_order,
    check_replicas,
    count_parameters,
    evaluate,
    load_artifact,
    mtp_training_loss,
    parameter_owners,
    rms_norm,
    rounded_once,
    save_artifact,
    train,
    training_loss,
    untie_when_due,
    warm_up,
)

GOLDEN = json.loads((ROOT / "tests/data/golden_losses.json").read_text())

OPTIONS = [
    {"training_depth_recurrence": 2},
    {"unet": 0, "resid_mix": 0},
    {"activation": "swiglu"},
    {"activation": "gelu", "smear": 1},
    {"bigram_hash": 1},
    {"bigram_hash": 1, "embed_dim": 0, "smear": 1},
    {"refiner": 1, "refiner_kernel": 2},
    {"diff_attn": 1},
    {"mlp_groups": 2, "activation": "swiglu"},
    {"tie_embeddings": 0},
    {"tie_embeddings": 0, "embed_dim": 0, "softcap_type": "tanh"},
    {"tie_embeddings": 2},
    {"tie_embeddings": 2, "softcap_type": "tanh"},
    {"mtp_heads": 2},
    {"attn_proj_type": "tversky"},
    {"attn_proj_type": "tversky", "tversky_num_features": 16, "tversky_feature_pools": 2, "tversky_membership": "poly"},
    {"logit_head_type": "tversky", "tversky_num_features": 16, "tversky_membership": "tanh"},
    {"logit_head_type": "tversky", "attn_proj_type": "tversky", "tversky_num_features": 8, "bigram_hash": 1, "refiner": 1},
    {"parallel_blocks": 1, "attention_free_layers": 1},
    {"attention_window": 8},
    # model and storage of the other systems: test_systems_model.py has their definitions
    {"mlp_hidden": 96, "xsa_last_n": 2, "qkv_split": 1, "input_norm": "all", "bitnet_group_size": 32, "scale_storage": "fp16"},
    {"qkv_split": 1, "act_quant": "int8", "input_norm": "none", "scale_group": "tensor", "scale_storage": "fp16"},
    {"act_quant": "int8", "input_norm": "all", "scale_stat": "rms", "scale_storage": "bf16", "gradient_checkpointing": 1, "parallel_blocks": 1},
    {"weight_quant": "binary", "xsa_last_n": 3},
    {"weight_quant": "binary", "scale_group": "tensor", "refiner": 1},
    {"weight_quant": "none", "qkv_split": 1},
    {"num_unique_layers": 2, "recurrence_factor": 3, "num_layers": 6, "gradient_checkpointing": 1, "ternary_commit_lambda": 0.01},
    {"ntk_rope": 1, "rope_type": "rope", "fp_storage": "FP4"},
    {"position": "radial", "ternary_threshold": 0, "scale_group": "tensor", "scale_storage": "fp16"},
    {"position": "none", "fp_storage": "FP4", "embed_dim": 0},
]
TRAINING_ONLY = {"mtp_heads", "gradient_checkpointing", "ternary_commit_lambda", "ntk_rope"}  # not in the artifact
named = {"ids": lambda settings: " ".join(f"{k}={v}" for k, v in settings.items())}


def tokens(model, batch=2, seed=0):
    torch.manual_seed(seed)
    return torch.randint(model.cfg.vocab_size, (batch, model.cfg.train_seq_len))


def train_steps(steps, **settings):
    """A fresh model after a few optimizer steps on random tokens, and the losses."""
    cfg, losses = tiny_config(**settings), []
    torch.manual_seed(0)
    model = GPT(cfg)
    with rounded_once(model):
        take_step = TrainingStep(model, cfg, World())
        for i in range(steps):
            x = tokens(model, 8, seed=i)
            take_step.take(x, x.roll(-1, 1))
            losses.append(take_step.grads.loss.item())
    return model, losses


def test_with_all_options_off_the_losses_are_the_committed_ones():
    """From the commit before the first option; rounding may differ by machine."""
    _, losses = train_steps(len(GOLDEN["losses"]))
    assert losses == pytest.approx(GOLDEN["losses"], rel=1e-6)


@pytest.mark.parametrize("settings", OPTIONS, **named)
def test_an_option_is_trained_causal_and_comes_back_exactly(settings):
    model, _ = train_steps(3, **settings)
    for name, _, p, _ in parameter_owners(model):  # build_optimizers has asserted that each has an optimizer
        assert p.numel() == 0 or p.grad.abs().sum() > 0, name
    x = tokens(model)
    y = x.roll(-1, 1)
    before = model(x, y)
    loaded, cfg = load_artifact(save_artifact(model, tiny_config(**settings, artifact_codec="base3")))
    assert all(getattr(cfg, name) == getattr(model.cfg, name) for name in settings.keys() - TRAINING_ONLY)
    assert torch.equal(loaded(x, y), before)
    changed = x.clone()
    changed[:, 7] = (changed[:, 7] + 1) % 320
    after = model(changed, y)
    assert torch.equal(before[:, :7], after[:, :7])
    assert not torch.equal(before[:, 7:], after[:, 7:])


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"mlp_groups": "3"}, "MLP_GROUPS=3"),
        ({"attention_window": "32"}, "ATTENTION_WINDOW=32"),
        ({"attention_window": "12"}, "ATTENTION_WINDOW=12"),
        ({"attention_free_layers": "3"}, "ATTENTION_FREE_LAYERS=3"),
        ({"mlp_groups": "4"}, "MLP_GROUPS=4"),  # 64 / 4 channels are no multiple of 32 weights a scale
        ({"refiner": "1", "refiner_kernel": "1"}, "REFINER_KERNEL=1"),
        ({"training_depth_recurrence": "-1"}, "TRAINING_DEPTH_RECURRENCE=-1"),
        ({"activation": "tanh"}, "ACTIVATION='tanh'"),
        ({"tie_embeddings": "0", "untie_at_fraction": "0.5"}, "UNTIE_AT_FRACTION=0.5"),
        ({"untie_at_fraction": "1"}, "UNTIE_AT_FRACTION=1.0"),
        ({"untie_at_fraction": "0.5", "warmup_steps": "1"}, "WARMUP_STEPS=1"),
        ({"untie_at_fraction": "0.5", "warmup_steps": "2", "ema": "1", "ema_start_fraction": "0.4"}, "EMA_START_FRACTION=0.4"),
        ({"tie_embeddings": "2", "logit_head_type": "tversky"}, "TIE_EMBEDDINGS=2"),
        ({"mtp_heads": "8", "seq_len_start": "8", "seq_schedule_fraction": "0.5"}, "MTP_HEADS=8"),
        ({"tversky_feature_pools": "2"}, "TVERSKY_FEATURE_POOLS=2"),
        ({"tversky_feature_pools": "4", "tversky_num_features": "8"}, "TVERSKY_FEATURE_POOLS=4"),
        ({"head_lr": "-1"}, "HEAD_LR=-1"),
    ],
)
def test_a_combination_without_sense_is_a_clear_error(settings, named):
    with pytest.raises(UserError) as error:
        Config.from_env(TINY | {name.upper(): text for name, text in settings.items()})
    assert named in str(error.value) and "expected" in str(error.value)


def test_depth_recurrence_repeats_each_block_in_a_row():
    """Written out: skips are pushed once after the repeats of a block and popped once before them."""
    for layers, repeats in ((3, 2), (4, 3)):
        model = tiny_model(num_layers=layers, training_depth_recurrence=repeats, eval_depth_recurrence=1)
        x = tokens(model)
        x0 = h = rms_norm(model.embed_in(model.table.stored(torch.float32)[x]))
        outputs, half = [], layers // 2
        for i in range(layers):
            if half <= i < 2 * half:
                h = h + as_stored(model.skip_weights)[i - half] * outputs[2 * half - 1 - i]
            for _ in range(repeats):
                h = model.blocks[i](h, x0)
            outputs.append(h)
        torch.testing.assert_close(model.hidden(x, training=True), rms_norm(h), rtol=0, atol=0)
        once = tiny_model(num_layers=layers)
        torch.testing.assert_close(model.hidden(x), once.hidden(x), rtol=0, atol=0)


@pytest.mark.parametrize(("training", "evaluation", "passes"), [(0, 0, (1, 1)), (1, 1, (1, 1)), (3, 0, (3, 3)), (3, 1, (3, 1)), (0, 2, (1, 2))])
def test_evaluation_takes_its_own_depth_or_that_of_training(training, evaluation, passes):
    cfg = tiny_config(training_depth_recurrence=training, eval_depth_recurrence=evaluation)
    assert tuple(len(block_order(cfg, mode)) // cfg.num_layers for mode in (True, False)) == passes


def test_without_unet_and_mix_their_parameters_are_gone():
    model = tiny_model(unet=0, resid_mix=0)
    x = tokens(model)
    assert model.skip_weights.numel() == 0 and all(block.resid_mix.numel() == 0 for block in model.blocks)
    h = rms_norm(model.embed_in(model.table.stored(torch.float32)[x]))
    for block in model.blocks:
        h = h + as_stored(block.attn_scale) * block.attention(rms_norm(h))
        h = h + as_stored(block.mlp_scale) * block.mlp(rms_norm(h))
    torch.testing.assert_close(model.hidden(x), rms_norm(h), rtol=0, atol=0)


def test_the_header_of_an_artifact_names_an_option_only_where_it_is_on():
    blob = save_artifact(tiny_model(unet=0), tiny_config(unet=0, artifact_codec="base3"))
    assert b"UNET=False" in blob and b"RESID_MIX" not in blob and load_artifact(blob)[1].unet is False
    assert GPT(Config(num_layers=2, model_dim=128, vocab_size=64)).skip_weights.numel() == 128


def test_activations_written_out():
    x = torch.randn(3, 8)
    model = tiny_model(activation="gelu")
    expected = torch.tensor([[v * 0.5 * (1 + math.erf(v / math.sqrt(2))) for v in row] for row in x.tolist()])
    torch.testing.assert_close(model.blocks[0].mlp.activation(x), expected)
    model = tiny_model(activation="swiglu")
    expected = torch.tensor([[g / (1 + math.exp(-g)) * u for g, u in zip(row[:4], row[4:], strict=True)] for row in x.tolist()])
    torch.testing.assert_close(model.blocks[0].mlp.activation(x), expected)
    assert model.blocks[0].mlp.up.weight.shape == (2 * 128, 64) and model.blocks[0].mlp.down.weight.shape == (64, 128)


def test_bigram_adds_the_row_of_the_token_before():
    model = tiny_model(bigram_hash=1)
    x = tokens(model)
    own, previous = (t.stored(torch.float32) for t in (model.table, model.table.previous))
    for b, t in ((0, 0), (0, 1), (1, 17)):
        expected = own[x[b, t]] + previous[x[b, t - 1] if t else 0]
        assert torch.equal(model.table.rows(x, torch.float32)[b, t], expected)
    assert not GPT(model.cfg).table.previous.weight.any()


def test_smear_is_the_mean_of_the_prefix():
    smear = tiny_model(smear=1).blocks[0].smear
    x, gate = torch.randn(2, 9, 64), as_stored(smear.gate).double()
    expected = torch.stack([x[:, t].double() + gate.tanh() * (x[:, : t + 1].double().mean(1) - x[:, t]) for t in range(9)], 1)
    torch.testing.assert_close(smear(x).double(), expected, rtol=1e-5, atol=1e-6)
    # bfloat16 counts end at 256, and its sums lose what is added: the mean of ones must stay 1
    assert torch.equal(smear(torch.ones(1, 2000, 64, dtype=torch.bfloat16)), torch.ones(1, 2000, 64, dtype=torch.bfloat16))


def test_refiner_is_a_causal_convolution():
    refiner = tiny_model(refiner=1, refiner_kernel=3).refiner
    x = torch.randn(2, 9, 64)
    kernel = refiner.conv.rounded().double().view(64, 3, 64).permute(0, 2, 1)  # (out, in, position)
    y = F.conv1d(F.pad(x.double().mT, (2, 0)), kernel).mT
    expected = x + as_stored(refiner.gate).double().tanh() * y / (y.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(refiner(x).double(), expected, rtol=1e-5, atol=1e-5)


def test_differential_attention_written_out():
    attention = tiny_model(diff_attn=1).blocks[0].attention
    q, k, v = torch.randn(2, 9, 4, 16).double(), torch.randn(2, 9, 2, 16).double(), torch.randn(2, 9, 2, 16).double()
    out = attention.mix(q, k, v)
    for head in range(4):
        parts = []
        for half in (slice(0, 8), slice(8, 16)):
            scores = torch.einsum("btc,bsc->bts", q[:, :, head, half], k[:, :, head // 2, half]) / math.sqrt(8)
            scores = scores.masked_fill(torch.ones(9, 9).triu(1).bool(), -math.inf)
            parts.append(scores.softmax(-1) @ v[:, :, head // 2, half])
        torch.testing.assert_close(out[:, :, head], torch.cat((parts[0] - 0.5 * parts[1], parts[0] + 0.5 * parts[1]), -1))


def test_a_grouped_mlp_is_a_block_diagonal_one():
    mlp = tiny_model(mlp_groups=2).blocks[0].mlp
    x = torch.randn(3, 64)
    hidden = F.relu(x @ torch.block_diag(*(m.up.rounded() for m in mlp.groups)).T).square().unflatten(-1, (2, -1))
    hidden = (hidden / (hidden.square().mean(-1, keepdim=True) + 1e-6).sqrt()).flatten(-2)  # each group has its own norm
    torch.testing.assert_close(mlp(x), hidden @ torch.block_diag(*(m.down.rounded() for m in mlp.groups)).T, rtol=1e-4, atol=1e-5)
    assert not any(m.down.weight.any() for m in GPT(tiny_config(mlp_groups=2)).blocks[0].mlp.groups)


def test_the_output_of_each_kind_of_tie_written_out():
    h = torch.randn(2, 3, 64)
    half = lambda module: module.stored(torch.float64)
    for settings in ({}, {"embed_dim": 0}):
        model = tiny_model(tie_embeddings=0, **settings)
        assert model.output is not model.table and isinstance(model.embed_out, torch.nn.Identity)
        torch.testing.assert_close(model.output(model.embed_out(h)).double(), h.double() @ half(model.output).T, rtol=1e-4, atol=1e-5)
        model = tiny_model(tie_embeddings=2, **settings)
        e = h.double() @ half(model.embed_out).T if model.cfg.embed_dim else h.double()
        expected = e @ (half(model.table) + half(model.output.correction)).T
        torch.testing.assert_close(model.output(model.embed_out(h)).double(), expected, rtol=1e-4, atol=1e-5)
    fresh = GPT(tiny_config(tie_embeddings=2))
    assert not fresh.output.correction.weight.any() and not GPT(tiny_config(tie_embeddings=0)).output.weight.any()
    default = GPT(tiny_config())
    assert default.output is default.table


def test_the_learning_rate_of_each_output():
    rates = {"embed_lr": 0.5, "head_lr": 0.3, "corr_weight_lr": 0.7, "tied_embed_lr": 0.11, "mtp_heads": 1}
    for tie, expected in ((0, {0.5, 0.3}), (1, {0.11, 0.3}), (2, {0.11, 0.3, 0.7})):
        cfg = tiny_config(tie_embeddings=tie, **rates)
        optimizers = TrainingStep(GPT(cfg), cfg, World()).optimizers
        assert {group["base_lr"] for opt in optimizers for group in opt.param_groups} == expected | {cfg.matrix_lr, cfg.scalar_lr}


def test_untying_keeps_the_function_and_goes_on_with_the_head_alone(data_dir, tmp_path):
    """Before: the tied output. At the switch: a head with the product's weights. After: what TIE_EMBEDDINGS=0 is, and stored so."""
    cfg = tiny_config(tie_embeddings=2, untie_at_fraction=0.5, data_path=data_dir, fp_storage="FP16", warmup_steps=2, iterations=8, artifact_codec="base3")
    model = tiny_model(**{k: getattr(cfg, k) for k in ("tie_embeddings", "untie_at_fraction", "fp_storage", "warmup_steps")})
    h = torch.randn(2, 3, 64)
    with rounded_once(model):
        tied = model.output(model.embed_out(h))
        untie_when_due(model, 0.49)
        assert torch.equal(model.output(model.embed_out(h)), tied)
        untie_when_due(model, 0.5)
        torch.testing.assert_close(model.output(model.embed_out(h)), tied, rtol=1e-2, atol=1e-3)  # float16 weights
        before = model.output.head.weight.clone()
        untie_when_due(model, 0.6)  # a second time changes nothing
        assert torch.equal(model.output.head.weight, before)

    torch.manual_seed(0)
    model = GPT(cfg)
    train(model, cfg, World(), Log(cfg, World(), str(tmp_path)), None)
    product = (model.table.weight + model.output.tied.correction.weight) @ model.embed_out.weight
    assert model.output.untied and model.output.tied.correction.weight.any()
    assert model.embed_out.weight.grad.abs().sum() == 0 and model.output.head.weight.grad.abs().sum() > 0
    assert not torch.allclose(model.output.head.weight, product, atol=1e-2)
    blob = save_artifact(model, cfg)
    loaded, stored = load_artifact(blob)
    assert stored.tie_embeddings == 0 and stored.untie_at_fraction == 0
    x = tokens(model)
    assert torch.equal(loaded(x, x.roll(-1, 1)), model(x, x.roll(-1, 1)))
    assert count_parameters(model) == count_parameters(loaded) == count_parameters(GPT(tiny_config(tie_embeddings=0)))
    assert artifact_config(cfg, stored).tie_embeddings == 0  # EVAL_ONLY with the settings of the training run
    with pytest.raises(UserError, match="TIE_EMBEDDINGS=2"):
        artifact_config(tiny_config(tie_embeddings=2), stored)


def test_a_run_too_coarse_for_the_switch_is_stored_untied_all_the_same(data_dir, tmp_path):
    cfg = tiny_config(untie_at_fraction=0.9, data_path=data_dir, warmup_steps=0, iterations=2, artifact_codec="base3")
    model = GPT(cfg)
    train(model, cfg, World(), Log(cfg, World(), str(tmp_path)), None)
    x = tokens(model)
    assert torch.equal(load_artifact(save_artifact(model, cfg))[0](x, x), model(x, x))
    assert model.output.untied and model.output.head.weight.any()


def test_the_warm_up_takes_steps_with_both_outputs_and_restores_the_weights():
    """On a GPU it compiles what it runs: neither graph may be left to the clock, whatever the shapes of the schedule."""
    cfg = tiny_config(untie_at_fraction=0.9, warmup_steps=3, seq_len_start=16, seq_schedule_fraction=0.5, temp_scaling=0)
    model, seen = GPT(cfg), set()
    before = [p.detach().clone() for p in model.parameters()]
    with rounded_once(model):
        take_step = TrainingStep(model, cfg, World())
        loss_function = take_step.loss_function
        take_step.loss_function = lambda m, x, *rest: (seen.add((x.size(1), m.output.untied)), loss_function(m, x, *rest))[1]
        warm_up(model, World(), lambda _: None, take_step)
    assert seen == {(32, False), (32, True), (16, False), (16, True)}
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_options_are_one_graph():
    """fullgraph, as on a GPU, with many options in one model, before and after untying; nothing may fall out of the graph."""
    model = tiny_model(num_layers=1, bigram_hash=1, smear=1, refiner=1, diff_attn=1, activation="swiglu", mlp_groups=2, mtp_heads=1, tie_embeddings=2,
                       untie_at_fraction=0.5, warmup_steps=2, attn_proj_type="tversky", softcap_type="tanh")  # fmt: skip
    x = tokens(model)
    graph = torch.compile(mtp_training_loss, backend="eager", fullgraph=True, dynamic=False)
    for progress in (0.0, 0.5):
        untie_when_due(model, progress)
        loss, nats = graph(model, x, x.roll(-1, 1), 1e-4)
        torch.testing.assert_close((loss, nats), mtp_training_loss(model, x, x.roll(-1, 1), 1e-4))
        model.zero_grad()
        loss.backward()
        unused = {name for name, p in model.named_parameters() if p.grad is None and p.numel()}
        assert unused == ({"embed_out.weight", "output.tied.correction.weight"} if progress else {"output.head.weight"})


def test_heads_for_later_tokens_written_out():
    """Head k sees the state at t and predicts the token k after the main target y[t]; evaluation and artifact know no heads."""
    model = tiny_model(mtp_heads=2)
    x, y = tokens(model), tokens(model, seed=1)
    loss, nats = mtp_training_loss(model, x, y, 1e-4)
    plain, plain_nats = training_loss(model, x, y, 1e-4)
    h, later = model.hidden(x).double(), []
    for k, head in enumerate(model.mtp_heads, 1):
        logits = h @ head.weight.double().T
        later.append(torch.stack([-logits[b, t].log_softmax(-1)[y[b, t + k]] for b in range(2) for t in range(32 - k)]).mean())
    torch.testing.assert_close(loss.double() - plain, 0.1 * 64 * torch.stack(later).mean(), rtol=1e-3, atol=1e-3)
    assert torch.equal(nats, plain_nats)
    without = tiny_model()
    assert count_parameters(model) == count_parameters(without)
    assert not any(head.weight.any() for head in GPT(tiny_config(mtp_heads=2)).mtp_heads)
    assert not list(load_artifact(save_artifact(model, tiny_config(mtp_heads=2, artifact_codec="base3")))[0].mtp_heads)


@pytest.mark.parametrize("membership", ["sigmoid", "poly", "tanh"])
@pytest.mark.parametrize("features", [0, 5])
def test_tversky_similarity_written_out(membership, features):
    layer = tiny_model(attn_proj_type="tversky", tversky_num_features=features, tversky_membership=membership).blocks[0].attention.out
    p = layer.prototypes.rounded().double()
    bank = layer.features.rounded().double() if features else p
    theta, alpha, beta = as_stored(layer.weights).double().abs().tolist()
    member = {"sigmoid": lambda t: 1 / (1 + (-5 * t).exp()), "poly": lambda t: (1.25 * t + 0.5).clamp(0, 1), "tanh": lambda t: ((5 * t).tanh() + 1) / 2}[membership]
    x = torch.randn(3, 64)
    out = layer(x)
    assert len(p) == 64 and out.shape == (3, 64)
    for i, j in ((0, 0), (1, 7), (2, 63)):
        f_x, f_p = x[i].double() @ bank.T, p[j] @ bank.T
        total = 0.0
        for a, b in zip(f_x, f_p, strict=True):
            m_a, m_b = member(a), member(b)
            total += theta * a * m_a * b * m_b - alpha * a * m_a * (1 - m_b) - beta * (1 - m_a) * b * m_b
        torch.testing.assert_close(out[i, j].double(), total / math.sqrt(len(bank)), rtol=1e-3, atol=1e-4)


def test_tversky_pools_are_shared_in_turn_and_stored_once():
    model = tiny_model(attn_proj_type="tversky", tversky_num_features=8, tversky_feature_pools=2)
    pools = [block.attention.out.features for block in model.blocks]
    assert pools[0] is pools[2] and pools[0] is not pools[1]
    free = tiny_model(attn_proj_type="tversky", tversky_num_features=8, tversky_feature_pools=2, attention_free_layers=1).blocks
    assert free[0].attention.out.features is not free[2].attention.out.features
    own = tiny_model(attn_proj_type="tversky", tversky_num_features=8)
    assert count_parameters(own)[0] - count_parameters(model)[0] == 8 * 64


WORKERS = """
import sys
sys.path[:0] = [{root!r}, {tests!r}]
import torch
import test_optional
from train_gpt import World

world = World.from_env()
losses = [test_optional.run_together(world, settings) for settings in test_optional.TOGETHER]
if world.is_main:  # the weights of both are equal: check_replicas
    print("losses", losses)
world.close()
"""

TOGETHER = [
    {"tie_embeddings": 2, "untie_at_fraction": 0.5, "warmup_steps": 2, "mtp_heads": 1, "smear": 1},
    {"attn_proj_type": "tversky", "tversky_num_features": 16, "tversky_feature_pools": 2, "bigram_hash": 1, "refiner": 1, "mlp_groups": 2},
    {"logit_head_type": "tversky", "diff_attn": 1, "activation": "swiglu", "eval_depth_recurrence": 3, "training_depth_recurrence": 2},
    {"num_unique_layers": 2, "recurrence_factor": 2, "num_layers": 4, "scale_group": "tensor", "scale_storage": "fp16", "act_quant": "int8", "input_norm": "none",
     "qkv_split": 1, "ternary_commit_lambda": 0.05, "gradient_checkpointing": 1, "fp_storage": "FP4"},
    {"weight_quant": "binary", "position": "radial", "xsa_last_n": 1, "mlp_hidden": 96, "ternary_commit_lambda": 0.05},
    {"weight_quant": "none", "ntk_rope": 1, "rope_type": "rope"},
]  # fmt: skip


def run_together(world, settings):
    """Losses of 6 steps, then of an evaluation by all processes."""
    cfg = tiny_config(**settings)
    torch.manual_seed(0)
    model, losses = GPT(cfg), []
    with rounded_once(model):
        take_step = TrainingStep(model, cfg, world)
        for i in range(6):
            untie_when_due(model, i / 6)
            x, y = (t.chunk(world.size)[world.rank] for t in (tokens(model, 8, seed=i), tokens(model, 8, seed=i + 1)))
            take_step.take(x, y)
            losses.append(take_step.grads.loss.item())
        for bank in take_step.grads.banks:
            bank.share_latent()
        check_replicas(model, world)
        val = ValidationSet(torch.arange(401) * 7 % 320, 1000)
        return [*losses, evaluate(model, val, cfg, world, cfg.train_seq_len)[0]]


def test_two_processes_train_and_evaluate_options_as_one_does(tmp_path):
    script = tmp_path / "workers.py"
    script.write_text(WORKERS.format(root=str(ROOT), tests=str(ROOT / "tests")))
    done = launch({}, tmp_path, 2, argv=[str(script)])
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.split("losses ")[1])
    for settings, losses in zip(TOGETHER, found, strict=True):
        assert losses == pytest.approx(run_together(World(), settings), rel=1e-6), settings
def test_parallel_and_attention_free_blocks_written_out():
    model = tiny_model(parallel_blocks=1, attention_free_layers=1, unet=0)
    x = tokens(model)
    x0 = h = rms_norm(model.embed_in(model.table.stored(torch.float32)[x]))
    for i, block in enumerate(model.blocks):
        mix = as_stored(block.resid_mix)
        h = mix[0] * h + mix[1] * x0
        n = rms_norm(h)
        if i != 1:
            h = h + as_stored(block.attn_scale) * block.attention(n)
        h = h + as_stored(block.mlp_scale) * block.mlp(n)
    torch.testing.assert_close(model.hidden(x), rms_norm(h), rtol=0, atol=1e-6)
    torch.testing.assert_close(model.hidden(x, tail=3), rms_norm(h)[:, -3:], rtol=1e-5, atol=1e-5)
