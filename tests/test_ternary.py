"""Codes, scales and their bytes, against definitions written out plainly."""

from __future__ import annotations

import math
import struct

import constriction
import numpy as np
import pytest
import torch
from conftest import tiny_config, tiny_model
from hypothesis import given
from hypothesis import strategies as st

import train_gpt
from train_gpt import (
    BASE3,
    PACKINGS,
    TABLE_FORMS,
    AnsStream,
    ArtifactError,
    ScaleFormat,
    StraightThrough,
    TernaryLinear,
    ans_encode,
    pack_bitmask,
    pack_digits,
    round_fp8,
    round_half,
    round_scale,
    ternarize,
    unpack_bitmask,
)


def nearest_scale(x: float, storage: str) -> float:
    """The stored value nearest to x, ties to the even mantissa, by exact arithmetic in Python floats."""
    bits = {"e4m3": 3, "bf16": 7, "fp16": 10}[storage]
    step = 2.0 ** (math.floor(math.log2(x)) - bits)
    return round(x / step) * step  # Python rounds halves to even


STORAGES = ("e4m3", "bf16", "fp16")


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("stat", ["absmean", "rms", "lstsq"])
@pytest.mark.parametrize("threshold", [0.5, 0.7])
def test_ternarize_is_its_definition(stat, storage, threshold):
    """Group by group in Python floats."""
    torch.manual_seed(0)
    w = torch.randn(6, 64) * 0.02
    codes, scale = ternarize(w, 32, ScaleFormat(stat, storage, threshold))
    for i, group in enumerate(w.reshape(-1, 32).double().tolist()):
        mean, rms = math.fsum(map(abs, group)) / 32, math.sqrt(math.fsum(x * x for x in group) / 32)
        limit = threshold * nearest_scale(rms if stat == "rms" else mean, "fp16" if stat == "lstsq" else storage)
        expected = [(x > limit) - (x < -limit) for x in group]
        kept = [abs(x) for x, code in zip(group, expected, strict=True) if code]
        assert codes[i].tolist() == expected
        assert scale[i].item() == nearest_scale({"absmean": mean, "rms": rms, "lstsq": sum(kept) / len(kept)}[stat], storage)


def test_the_default_is_round_and_clip():
    """BitNet's formula, away from its ties."""
    w = torch.randn(50, 128)
    codes, scale = ternarize(w, 128)
    assert torch.equal(codes, (w / scale).round().clamp(-1, 1))


def test_the_least_squares_scale_has_the_least_error():
    w = torch.randn(20, 128)
    codes, scale = ternarize(w, 128, ScaleFormat("lstsq", "fp16"))
    for factor in (0.98, 1.02):
        assert ((w - codes * scale) ** 2).sum() < ((w - codes * scale * factor) ** 2).sum()


@pytest.mark.parametrize("storage", STORAGES)
def test_scales_round_to_the_nearest_stored_value_and_stay_in_range(storage):
    x = torch.exp(torch.linspace(-9, 4, 997))
    assert round_scale(x, storage).tolist() == [nearest_scale(v, storage) for v in x.double().tolist()]
    ends = round_scale(torch.tensor([0.0, 1e-38, 3e38]), storage)
    assert (ends > 0).all() and torch.isfinite(ends).all() and torch.equal(round_scale(ends, storage), ends)


@pytest.mark.parametrize("bits", [4, 5, 6])
def test_integer_tables_round_to_the_nearest_step(bits):
    torch.manual_seed(0)
    w = torch.randn(50, 96) * torch.rand(50, 1)
    codes, step = TABLE_FORMS[f"INT{bits}"].divide(w)
    rms = w.double().square().mean(1, keepdim=True).sqrt()
    assert step.flatten().tolist() == [nearest_scale(v, "e4m3") for v in (rms.flatten() * 2.0 ** (2 - bits)).tolist()]
    assert (codes == codes.round()).all() and codes.abs().max() < 127
    assert ((codes * step).double() - w).abs().le(step * 0.5000001).all()
    huge = torch.zeros(1, 10_000)
    huge[0, 0] = 1.0
    assert TABLE_FORMS[f"INT{bits}"].divide(huge)[0].abs().max() == 127  # clipped
    assert not TABLE_FORMS[f"INT{bits}"].divide(torch.zeros(3, 5))[0].any()


@pytest.mark.parametrize("spread", [1e-3, 0.02, 1.0, 30.0])
def test_codes_of_codes_times_scale_are_the_same_codes(spread):
    torch.manual_seed(1)
    codes, scale = ternarize(torch.randn(40, 128) * spread, 128)
    again, _ = ternarize(codes * scale, 128)
    assert torch.equal(codes, again)
    assert torch.equal(scale, round_scale(scale, "e4m3"))


def test_zero_weights_have_zero_codes_and_a_finite_scale():
    codes, scale = ternarize(torch.zeros(2, 128), 128)
    assert not codes.any() and (scale > 0).all()


@pytest.mark.parametrize("count", [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 63, 64, 65, 1001, 1002, 1003, 1004, 1005])
@pytest.mark.parametrize("codec", PACKINGS)
def test_packing_inverts_at_every_length(codec, count):
    pack, unpack = PACKINGS[codec]
    for zero in (0.0, 0.37, 1.0):
        codes = np.random.default_rng(count).choice([-1, 0, 1], size=count, p=[(1 - zero) / 2, zero, (1 - zero) / 2]).astype(np.int8)
        assert (unpack(pack(codes), count) == codes).all()


@given(st.lists(st.sampled_from([-1, 0, 1]), max_size=200))
def test_packing_inverts_any_codes(codes):
    codes = np.array(codes, dtype=np.int8)
    for pack, unpack in PACKINGS.values():
        assert (unpack(pack(codes), len(codes)) == codes).all()


def test_base3_is_five_digits_a_byte():
    for value in range(243):
        codes = np.array([value // 3**j % 3 - 1 for j in range(5)], dtype=np.int8)
        assert pack_digits(codes, **BASE3) == bytes([value])


def test_bitmask_size_follows_the_zero_fraction():
    codes = np.array([1, 0, -1, 0, 0, 0, 0, 0, 1], dtype=np.int8)
    assert pack_bitmask(codes) == bytes([0b10100000, 0b10000000, 0b10100000])


@pytest.mark.parametrize(
    ("unpack", "data", "count"),
    [(PACKINGS["base3"][1], bytes([243]), 5), (PACKINGS["base3"][1], bytes([1, 1]), 5), (PACKINGS["base3"][1], b"", 1), (PACKINGS["base3"][1], bytes([200]), 1),
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
    layer = TernaryLinear(64, 48, tiny_config())
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
    layer = TernaryLinear(64, 8, tiny_config())
    layer.frozen = True
    assert torch.equal(layer.stored(torch.float32), layer.weight)
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


# ---- entropy coder


def drawn(count, probabilities, seed=0):
    rng = np.random.default_rng(seed)
    contexts = rng.integers(0, len(probabilities), count).astype(np.uint8)
    symbols = np.empty(count, np.uint8)
    for i, p in enumerate(probabilities):
        symbols[contexts == i] = rng.choice(len(p), int((contexts == i).sum()), p=p)
    return symbols, contexts


TRITS = ([0.3155, 0.369, 0.3155], [0.2, 0.6, 0.2], [0.45, 0.1, 0.45])


@pytest.mark.parametrize("count", [0, 1, 2, 100, 8191, 8192, 20_000, 300_001, 1_100_000])
def test_ans_gives_every_symbol_back(count):
    symbols, contexts = drawn(count, TRITS)
    assert np.array_equal(AnsStream.parse(ans_encode(symbols, contexts), count).decode(contexts), symbols)


@given(st.lists(st.tuples(st.integers(0, 255), st.integers(0, 4)), max_size=300))
def test_ans_gives_any_symbols_back(pairs):
    symbols, contexts = (np.array([p[i] for p in pairs], np.uint8) for i in (0, 1))
    assert np.array_equal(AnsStream.parse(ans_encode(symbols, contexts), len(pairs)).decode(contexts), symbols)


@pytest.mark.parametrize("symbol", [0, 7, 255])
def test_ans_spends_nothing_on_what_never_changes(symbol):
    symbols, contexts = np.full(2_000_000, symbol, np.uint8), np.zeros(2_000_000, np.uint8)
    data = ans_encode(symbols, contexts)
    assert len(data) < 600 and np.array_equal(AnsStream.parse(data, 2_000_000).decode(contexts), symbols)


def plain_rans(data: bytes, count: int, contexts: list[int]) -> list[int]:
    """The stream's format, read one symbol at a time with Python's integers: what another implementation would do."""
    _, tables = struct.unpack_from("<IH", data)
    at, frequencies = 6, []
    for _ in range(tables):
        first, last, at = data[at], data[at + 1], at + 2
        row = [0] * 256
        for symbol in range(first, last + 1):
            row[symbol], at = data[at], at + 1
            if row[symbol] >= 128:
                row[symbol], at = row[symbol] - 128 + 128 * data[at], at + 1
        frequencies.append(row)
    lanes = 1
    while lanes < 2048 and count >= lanes * 16384:
        lanes *= 2
    states, at, out = list(struct.unpack_from(f"<{lanes}I", data, at)), at + 4 * lanes, []
    for i in range(count):
        row, x = frequencies[contexts[i]], states[i % lanes]
        slot, below, symbol = x % 16384, 0, 0
        while slot >= below + row[symbol]:
            below, symbol = below + row[symbol], symbol + 1
        x = row[symbol] * (x // 16384) + slot - below
        if x < 65536:
            x, at = x * 65536 + int.from_bytes(data[at : at + 2], "little"), at + 2
        states[i % lanes] = x
        out.append(symbol)
    assert at == len(data) and set(states) == {65536}
    return out


@pytest.mark.parametrize("count", [1, 700, 40_000])
def test_ans_against_a_plain_decoder(count):
    symbols, contexts = drawn(count, TRITS + ([1 / 256] * 256,))
    assert plain_rans(ans_encode(symbols, contexts), count, contexts.tolist()) == symbols.tolist()


@pytest.mark.parametrize("p", [*TRITS, [0.9, 0.05, 0.05], list(np.diff(np.r_[0, 1 / (1 + np.exp(-np.linspace(-6, 6, 60))), 1]))])
def test_ans_is_as_short_as_constriction(p):
    """constriction's range-variant coder with exact probabilities; ours may cost its tables and the lanes' states more."""
    symbols, contexts = drawn(1_000_000, [p])
    counts = np.bincount(symbols, minlength=len(p)).astype(np.float64)
    coder = constriction.stream.stack.AnsCoder()
    coder.encode_reverse(symbols.astype(np.int32), constriction.stream.model.Categorical(counts / counts.sum(), perfect=False))
    oracle = coder.get_compressed().nbytes
    entropy = -(counts * np.log2(counts / counts.sum(), where=counts > 0, out=np.zeros_like(counts))).sum() / 8
    size = len(ans_encode(symbols, contexts))
    assert entropy <= oracle <= 1.0005 * entropy + 8
    assert size <= 1.0015 * oracle + 400


def test_ans_streams_that_lie_are_refused_before_they_allocate():
    symbols, contexts = drawn(50_000, TRITS)
    data = ans_encode(symbols, contexts)
    tables = data[6:]
    bad = [b"", data[:5], data[:9], data[:30], struct.pack("<IH", 2**32 - 1, 3) + tables, struct.pack("<IH", 50_000, 0) + tables,
           struct.pack("<IH", 50_000, 65_535) + tables, struct.pack("<IH", 49_999, 3) + tables, data[:6] + bytes([0, 2, 1, 1, 1]) + data[11:]]  # fmt: skip
    for lie in bad:
        with pytest.raises(ArtifactError):
            AnsStream.parse(lie, 50_000)
    with pytest.raises(ArtifactError, match="too short"):
        AnsStream.parse(struct.pack("<IH", 2**31, 3) + tables, 2**31)


def test_ans_streams_that_are_damaged_are_refused():
    symbols, contexts = drawn(50_000, TRITS)
    data, rng = ans_encode(symbols, contexts), np.random.default_rng(1)
    flipped = [data[:i] + bytes([data[i] ^ 1 << int(rng.integers(8))]) + data[i + 1 :] for i in rng.integers(len(data) - 2000, len(data), 30)]
    for bad in (data[:-2], data[:-1], data + b"ab", data + b"a", *flipped):
        with pytest.raises(ArtifactError):
            AnsStream.parse(bad, 50_000).decode(contexts)
    with pytest.raises(ArtifactError, match="lacks a table"):
        AnsStream.parse(data, 50_000).decode(contexts + 1)
