"""Products of matrices: 8-bit operands, the fused MLP, folded norms and split sums, against plain PyTorch in float64."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import TINY, tiny_config, tiny_model

import train_gpt
from train_gpt import (
    Config,
    Fp8Product,
    TernaryLinear,
    UserError,
    World,
    fp8_weight,
    load_artifact,
    rms_norm,
    round_scale,
    rounded_once,
    save_artifact,
    to_fp8,
    training_loss,
)


def batch(model, sequences=4, seed=5):
    torch.manual_seed(seed)
    x = torch.randint(model.cfg.vocab_size, (sequences, model.cfg.train_seq_len))
    return x, x.roll(-1, 1)


def test_ternary_weights_are_exact_in_eight_bits_while_their_scales_lie_within_2_to_the_13():
    """Every e4m3 mantissa and every exponent: exact within 2^13 of the largest scale, far below it off by 2^-17 of the largest."""
    for top in (2.0**-8, 1.875 * 2.0**-6, 1.75, 200.0):
        scales = round_scale(top * 2.0 ** -torch.arange(0, 20, 1 / 16), "e4m3").unique()
        stored = scales[:, None] * torch.tensor([1.0, 0.0, -1.0])
        codes, codes_t, scale = fp8_weight(stored)
        assert torch.equal(codes.t().float(), codes_t.float()) and codes_t.is_contiguous()
        error = (codes.float() * scale - stored).abs().amax(1)
        near = scales >= scales.max() * 2.0**-13
        assert error[near].max() == 0 and 0 < error.max() <= scales.max() * 2.0**-17, top


def test_layers_compute_with_exact_weights_and_rounded_inputs():
    """Forward, both gradients and the unrounded weight gradient against float64 with operands rounded one by one."""
    model = tiny_model(act_quant="fp8")
    layer = model.blocks[0].mlp.up
    x = rms_norm(torch.randn(3, 7, 64)).requires_grad_()
    g = torch.randn(3, 7, 128) / model.cfg.train_batch_tokens
    layer(x).backward(g)
    w, g_scale = layer.rounded().double(), 2.0**8 * model.cfg.train_batch_tokens
    x8, g8 = (x.detach() * 32).to(torch.float8_e4m3fn).double() / 32, (g * g_scale).to(torch.float8_e5m2).double() / g_scale
    torch.testing.assert_close(layer(x).double(), x8 @ w.T, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(x.grad.double(), g8 @ w, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(layer.weight.grad.double(), torch.einsum("bto,bti->oi", g.double(), x.detach().double()), rtol=1e-5, atol=1e-7)
    assert (x8 - x).abs().max() > 1e-3 and (g8 - g).abs().max() / g.abs().max() > 1e-2  # they are rounded


def test_no_input_can_overflow_and_gradients_saturate():
    """The largest element of a normalized row is that of a one-hot row: sqrt(width), in either precision."""
    for width in (16, 64, 512, 768, 784, 3072, 4096):
        scale = Fp8Product(width, Config()).scales[0]
        one_hot = torch.nn.functional.one_hot(torch.tensor(3), width)[None]
        for dtype in (torch.float32, torch.bfloat16):
            largest = (rms_norm(one_hot.to(dtype) * 1e3).float() * scale).max().item()
            assert 224 / math.sqrt(1.01) <= largest <= 448 * (1.005 if width == 784 else 1), width  # 28 * 16 = 448 itself
            assert to_fp8(rms_norm(one_hot.to(dtype) * 1e3), scale).float().isfinite().all()
    assert (Fp8Product(768, Config()).scales[0], Fp8Product(3072, Config()).scales[0]) == (16, 8)
    assert to_fp8(torch.tensor([1e9, -1e9]), 1.0, torch.float8_e5m2).tolist() == [57344, -57344]
    assert to_fp8(torch.tensor([math.nan]), 1.0).isnan().all()  # what diverged is seen


def test_a_trained_fp8_model_evaluates_to_the_same_numbers_when_reloaded():
    model = tiny_model(act_quant="fp8")
    x, y = batch(model)
    with torch.no_grad():
        fresh = model(x, y)
        with rounded_once(model):
            kept = model(x, y)
        loaded, cfg = load_artifact(save_artifact(model, model.cfg))
        assert cfg.act_quant == "fp8" and all(m.frozen for m in loaded.modules() if isinstance(m, TernaryLinear))
        reloaded = loaded(x, y)
        with rounded_once(loaded):
            assert torch.equal(loaded(x, y), fresh)
        assert torch.equal(fresh, kept) and torch.equal(fresh, reloaded)
        plain = tiny_model()(x, y)
    assert not torch.equal(fresh, plain)
    assert (fresh - plain).abs().mean() < 0.05 * plain.std()


def test_a_training_step_renews_the_kept_operands():
    model = tiny_model(act_quant="fp8", num_layers=2)
    x, y = batch(model, 8)
    with rounded_once(model):
        step = train_gpt.TrainingStep(model, model.cfg, World())
        before = model.blocks[1].mlp.up.rounded()
        step(x, y)
        for layer in (m for m in model.modules() if isinstance(m, TernaryLinear)):
            codes, codes_t, scale = layer.product.weight(layer, torch.float32)
            assert torch.equal(codes.float() * scale, layer.rounded()) and torch.equal(codes_t.float().T, codes.float())
        assert not torch.equal(before, model.blocks[1].mlp.up.rounded())


def test_fp8_gradients_point_where_the_plain_ones_do_in_one_graph():
    """Every matrix and table; the compiled graph (fullgraph) gives the same numbers."""
    grads = {}
    for act_quant in ("none", "fp8"):
        model = tiny_model(act_quant=act_quant, softcap_type="tanh", num_layers=2)  # the path a GPU takes
        x, y = batch(model, 8)
        for name, function in (("eager", training_loss), ("compiled", torch.compile(training_loss, backend="aot_eager", fullgraph=True, dynamic=False))):
            if (act_quant, name) == ("none", "compiled"):
                continue
            model.zero_grad()
            (function(model, x, y, 1e-4)[0] / 256).backward()
            grads[act_quant, name] = {n: p.grad.clone() for n, p in model.named_parameters()}
    for name, plain in grads["none", "eager"].items():
        ours = grads["fp8", "eager"][name]
        torch.testing.assert_close(grads["fp8", "compiled"][name], ours)
        assert torch.nn.functional.cosine_similarity(ours.flatten(), plain.flatten(), 0) > 0.98, name


@pytest.mark.parametrize(("setting", "value"), [("SCALE_STORAGE", "fp16"), ("MODEL_DIM", "72"), ("ACT_QUANT", "int4"), ("MLP_GROUPS", "2"), ("PRECISION", "fp16")])
def test_what_eight_bits_cannot_hold_is_refused(setting, value):
    extra = {"NUM_HEADS": "4", "BITNET_GROUP_SIZE": "8"} if setting == "MODEL_DIM" else {}
    with pytest.raises(UserError, match=f"{setting}='?{value}"):
        Config.from_env(TINY | {"ACT_QUANT": "fp8", setting: value} | extra)


def test_an_old_gpu_is_refused(monkeypatch):
    class Cuda(torch.Tensor):
        is_cuda = True

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    with pytest.raises(UserError, match="ACT_QUANT='fp8'.*8.9"):
        Fp8Product(64, tiny_config()).refresh(torch.ones(16, 64).as_subclass(Cuda))
