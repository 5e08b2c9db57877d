"""Optional systems: off they leave nothing behind; on, each is what its definition says, is trained, causal, and comes back exactly."""

from __future__ import annotations

import json
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, TINY, tiny_config, tiny_model

from train_gpt import (
    GPT,
    Config,
    TrainingStep,
    UserError,
    World,
    as_stored,
    block_order,
    load_artifact,
    parameter_owners,
    rms_norm,
    rounded_once,
    save_artifact,
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
]
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
            take_step(x, x.roll(-1, 1))
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
    assert all(getattr(cfg, name) == getattr(model.cfg, name) for name in settings)
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
        ({"mlp_groups": "4"}, "MLP_GROUPS=4"),  # 64 / 4 channels are no multiple of 32 weights a scale
        ({"refiner": "1", "refiner_kernel": "1"}, "REFINER_KERNEL=1"),
        ({"training_depth_recurrence": "-1"}, "TRAINING_DEPTH_RECURRENCE=-1"),
        ({"activation": "tanh"}, "ACTIVATION='tanh'"),
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
    blob = save_artifact(tiny_model(unet=0), tiny_config(unet=0))
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
