"""Codes, scales and their bytes, against definitions written out plainly."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import tiny_model
from hypothesis import given
from hypothesis import strategies as st

import train_gpt
from train_gpt import (
    CODECS,
    StraightThrough,
    TernaryLinear,
    pack_base3,
    pack_bitmask,
    round_fp8,
    round_half,
    ternarize,
    unpack_base3,
    unpack_bitmask,
)


def test_ternarize_is_its_definition():
    """Group by group in Python floats: scale = float16(mean |w|), code = the nearest of -1, 0, 1 to w / scale (half to even)."""
    torch.manual_seed(0)
    w = torch.randn(6, 64) * 0.02
    codes, scale = ternarize(w, 32)
    for i, group in enumerate(w.reshape(-1, 32).double().numpy()):
        s = float(np.float16(np.abs(group).mean()))
        assert scale[i].item() == s
        assert codes[i].tolist() == [float(np.clip(np.round(x / s), -1, 1)) for x in group]


@pytest.mark.parametrize("spread", [1e-3, 0.02, 1.0, 30.0])
def test_codes_of_codes_times_scale_are_the_same_codes(spread):
    torch.manual_seed(1)
    codes, scale = ternarize(torch.randn(40, 128) * spread, 128)
    again, _ = ternarize(codes * scale, 128)
    assert torch.equal(codes, again)
    assert torch.equal(scale, scale.half().float())


def test_zero_weights_have_zero_codes_and_a_finite_scale():
    codes, scale = ternarize(torch.zeros(2, 128), 128)
    assert not codes.any() and (scale > 0).all()


@pytest.mark.parametrize("count", [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 63, 64, 65, 1001, 1002, 1003, 1004, 1005])
@pytest.mark.parametrize("codec", CODECS)
def test_packing_inverts_at_every_length(codec, count):
    pack, unpack = CODECS[codec]
    for zero in (0.0, 0.37, 1.0):
        codes = np.random.default_rng(count).choice([-1, 0, 1], size=count, p=[(1 - zero) / 2, zero, (1 - zero) / 2]).astype(np.int8)
        assert (unpack(pack(codes), count) == codes).all()


@given(st.lists(st.sampled_from([-1, 0, 1]), max_size=200))
def test_packing_inverts_any_codes(codes):
    codes = np.array(codes, dtype=np.int8)
    for pack, unpack in CODECS.values():
        assert (unpack(pack(codes), len(codes)) == codes).all()


def test_base3_is_five_digits_a_byte():
    for value in range(243):
        codes = np.array([value // 3**j % 3 - 1 for j in range(5)], dtype=np.int8)
        assert pack_base3(codes) == bytes([value])


def test_bitmask_size_follows_the_zero_fraction():
    codes = np.array([1, 0, -1, 0, 0, 0, 0, 0, 1], dtype=np.int8)
    assert pack_bitmask(codes) == bytes([0b10100000, 0b10000000, 0b10100000])


@pytest.mark.parametrize(
    ("unpack", "data", "count"),
    [(unpack_base3, bytes([243]), 5), (unpack_base3, bytes([1, 1]), 5), (unpack_base3, b"", 1), (unpack_base3, bytes([200]), 1),
     (unpack_bitmask, bytes([0b10000000]), 3), (unpack_bitmask, bytes([0b00010000, 0]), 3), (unpack_bitmask, bytes([0b10000000, 0b01000000]), 3),
     (unpack_bitmask, bytes([0, 0]), 3), (unpack_bitmask, b"", 3)],
)  # fmt: skip
def test_bytes_that_are_no_packing_are_refused(unpack, data, count):
    with pytest.raises(ValueError):
        unpack(data, count)


def test_straight_through_is_exact_forward_and_identity_backward():
    latent = torch.randn(5, 7, requires_grad=True)
    stored = torch.randn(5, 7)
    out = StraightThrough.apply(latent, stored)
    assert torch.equal(out, stored)
    g = torch.randn(5, 7)
    out.backward(g)
    assert torch.equal(latent.grad, g)


def test_ternary_layer_multiplies_by_codes_times_scale_and_its_gradient_is_the_dense_one():
    torch.manual_seed(2)
    layer = TernaryLinear(64, 48, 32)
    x = torch.randn(3, 5, 64, requires_grad=True)
    g = torch.randn(3, 5, 48)
    layer(x).backward(g)
    codes, scale = ternarize(layer.weight.detach(), 32)
    dense = (codes * scale).view(48, 64).requires_grad_()
    x2 = x.detach().clone().requires_grad_()
    (x2 @ dense.T).backward(g)
    torch.testing.assert_close(x.grad, x2.grad)
    torch.testing.assert_close(layer.weight.grad, dense.grad)


def test_a_frozen_layer_uses_its_weight_unchanged():
    layer = TernaryLinear(64, 8, 32)
    layer.frozen = True
    assert layer.stored_weight() is layer.weight
    x = torch.randn(2, 64)
    assert torch.equal(layer(x), torch.nn.functional.linear(x, layer.weight))


@pytest.mark.parametrize("spread", [1e-6, 0.005, 1.0, 1e4])
def test_fp8_rounding_against_the_nearest_value_of_the_format(spread):
    """Every e4m3 value, written out from its bits, times the scale: no other one is nearer."""
    torch.manual_seed(3)
    w = torch.randn(16, 24) * spread
    codes, scale = round_fp8(w)
    assert torch.log2(scale).item() == round(torch.log2(scale).item())
    assert 224 <= w.abs().max() / scale <= 448
    values = [(-1) ** (b >> 7) * (2.0 ** ((b >> 3 & 15) - 7) * (1 + (b & 7) / 8) if b >> 3 & 15 else 2.0**-6 * (b & 7) / 8)
              for b in range(256) if b & 127 != 127]  # fmt: skip
    grid = torch.tensor(values, dtype=torch.float64)
    target = w.double() / scale.double()
    nearest = (target[..., None] - grid).abs().min(-1).values
    torch.testing.assert_close((codes.double() - target).abs(), nearest, rtol=1e-6, atol=1e-12)


def test_round_half_is_float16_for_every_exponent():
    """torch.compile drops .half().float(); the rounding in bits must give what the conversion gives, sign of zero included."""
    bits = torch.arange(0, 2**31 - 1, 99991, dtype=torch.int64).to(torch.int32)
    ties = torch.arange(-(2**12), 2**12).float() * 2.0**-25  # half-way between subnormals
    x = torch.cat((bits.view(torch.float32), -bits.view(torch.float32), ties, 1 + ties * 2.0**13))
    x = x[x.abs() < 65504]
    assert torch.equal(round_half(x).view(torch.int32), x.half().float().view(torch.int32))


def test_fp8_rounding_is_idempotent_and_survives_zeros():
    w = torch.randn(16, 24) * 0.005
    codes, scale = round_fp8(w)
    once = codes.float() * scale
    codes, scale = round_fp8(once)
    assert torch.equal(once, codes.float() * scale)
    codes, scale = round_fp8(torch.zeros(4, 4))
    assert not (codes.float() * scale).any() and torch.isfinite(scale)


def test_zero_fraction_counts_the_codes():
    model = tiny_model()
    codes = [ternarize(m.weight.detach(), m.group_size)[0] for m in model.modules() if isinstance(m, TernaryLinear)]
    expected = sum(int((c == 0).sum()) for c in codes) / sum(c.numel() for c in codes)
    assert train_gpt.zero_fraction(model) == expected
    assert 0.2 < expected < 0.5
