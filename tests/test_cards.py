"""What is used on which device: the table of docs/cards.md, row by row, on devices that are made up."""

from __future__ import annotations

import contextlib
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, tiny_config, tiny_model, tokens
from torch.nn.attention import SDPBackend

import train_gpt
from train_gpt import KERNELS, Config, Ops, UserError, World, fast_ops

PAGE = (ROOT / "docs" / "cards.md").read_text(encoding="utf-8")
ROWS = [[cell.strip() for cell in line.strip("|").split("|")] for line in PAGE.splitlines() if line.startswith("|")][2:]
NAMES = [row[0] for row in ROWS]


@pytest.fixture
def card(monkeypatch):
    """`card(name)`: from now on PyTorch says of its GPU what the row says; under ROCm AMD's numbers, here those of an MI300."""

    def become(name):
        row = ROWS[NAMES.index(name)]
        if row[1] == "none":
            return torch.device("cpu")
        numbers = (9, 4) if row[1] == "any" else tuple(map(int, row[1].split(".")))
        monkeypatch.setattr(torch.version, "hip", "6.4" if row[1] == "any" else None)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: numbers)
        properties = SimpleNamespace(major=numbers[0], minor=numbers[1], multi_processor_count=4)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *_: properties)
        monkeypatch.setitem(sys.modules, "flash_attn_interface", SimpleNamespace(flash_attn_func=lambda q, *_, **__: q))
        train_gpt.kernels_run.cache_clear()
        train_gpt.fp8_rounding.cache_clear()
        return torch.device("cuda")

    yield become
    train_gpt.kernels_run.cache_clear()
    train_gpt.fp8_rounding.cache_clear()


def attention(device, monkeypatch):
    """The words of the table for what computes attention."""
    ops = fast_ops(tiny_config(), device)
    monkeypatch.setitem(sys.modules, "flash_attn_interface", None)
    without = fast_ops(tiny_config(), device)
    with contextlib.ExitStack() as stack:
        order = []
        monkeypatch.setattr("torch.nn.attention.sdpa_kernel", lambda backends, **_: order.extend(backends) or contextlib.nullcontext())
        stack.enter_context(train_gpt.attention_backends(device))
    words = {"attend": "PyTorch's", "unshared_attend": "PyTorch's, keys repeated", "block_attend": "in blocks"}[without.attend.__name__]
    words = "cuDNN's first" if order[:1] == [SDPBackend.CUDNN_ATTENTION] else words
    return f"FlashAttention-3, else {words}" if ops.attend.__name__ == "flash" else words


def eight_bits(device, dtype):
    if dtype == torch.float16:
        with pytest.raises(UserError, match="PRECISION='auto': float16 on this GPU; expected fp32 with ACT_QUANT='fp8'"):
            train_gpt.fp8_rounding(tiny_config(act_quant="fp8"), device)
        train_gpt.fp8_rounding(tiny_config(act_quant="fp8", precision="fp32"), device)
        return "with PRECISION=fp32, in fp32"
    train_gpt.fp8_rounding(tiny_config(act_quant="fp8"), device)
    return "yes" if train_gpt.multiplies_eight_bits(device) else "in bf16"


@pytest.mark.parametrize("name", NAMES)
def test_a_row_is_what_the_device_gets(name, card, monkeypatch):
    pytest.importorskip("triton")
    device, short = card(name), {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
    dtype, ops = train_gpt.compute_dtype("auto", device), fast_ops(Config(), device)
    step = SimpleNamespace(cfg=tiny_config(), world=train_gpt.World(device=device), grads=SimpleNamespace(scale=1.0), model=None, optimizers=[])
    hooks = {type(hook) for hook in train_gpt.choose_hooks(step)}
    graph = train_gpt.compiled(len, Config(), World(device=device)) is not len
    own = {train_gpt.QKNormRope.apply: "qk", train_gpt.fused_mlp: "mlp", train_gpt.fused_loss: "loss"}
    kernels = [own[function] for function in ops if function in own]
    yes = {True: "yes", False: "no"}
    assert ROWS[NAMES.index(name)][2:] == [
        short[dtype], yes[train_gpt.LossScaling in hooks], yes[graph], ", ".join(kernels) or "none", attention(device, monkeypatch),
        eight_bits(device, dtype),
    ]  # fmt: skip


def test_the_page_has_a_row_for_every_card_of_the_issue():
    assert [row[1] for row in ROWS] == ["7.5", "8.0", "8.6", "8.9", "9.0", "10.0", "12.0", "any", "none"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kernels", ["off", ",".join(KERNELS)])
def test_every_setting_of_the_kernels_is_taken_on_every_card(name, kernels, card):
    """KERNELS=off is the plain table anywhere; a name of what the card has not is no mistake."""
    ops = fast_ops(tiny_config(kernels=kernels), card(name))
    assert (ops == Ops()) is (kernels == "off")


@pytest.mark.parametrize("name", ["H100, H200", "RTX 40, L4, L40S", "AMD, under ROCm"])
def test_float32_repeats_keys_on_every_card(name, card):
    assert fast_ops(tiny_config(precision="fp32"), card(name)).attend is train_gpt.unshared_attend


@pytest.mark.parametrize("queries, heads, masked", [(9, 4, False), (3, 4, False), (9, 2, False), (9, 4, True)])
def test_repeated_keys_are_the_shared_ones(queries, heads, masked):
    """Against attention written out in float64, one query head at a time; the last queries alone, and a mask, too."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, length, n, 8, dtype=torch.float64) for length, n in ((queries, heads), (9, 2), (9, 2)))
    mask = torch.ones(9, 9, dtype=torch.bool).tril() if not masked else torch.eye(9, dtype=torch.bool)
    found = train_gpt.unshared_attend(q, k, v, mask if masked else None)
    for head in range(heads):
        shared = head * 2 // heads
        scores = (q[:, :, head] @ k[:, :, shared].mT / 8**0.5).masked_fill(~mask[9 - queries :], -torch.inf)
        torch.testing.assert_close(found[:, :, head], scores.softmax(-1) @ v[:, :, shared])


def test_a_model_computes_the_same_with_repeated_keys():
    model = tiny_model()
    x = tokens(model)
    plain, repeated = (model.use(Ops(attend=attend))(x, x.roll(-1, 1)) for attend in (train_gpt.attend, train_gpt.unshared_attend))
    torch.testing.assert_close(plain, repeated)


def test_the_eight_bit_model_of_a_card_without_them_is_the_same(card, monkeypatch):
    """A whole model in bfloat16 on a made-up A100, whose tensors are the CPU's: its nats are torch._scaled_mm's."""
    model = tiny_model(act_quant="fp8", precision="bf16")
    x = tokens(model)
    with torch.no_grad():
        expected = model(x, x.roll(-1, 1))
        gpu = card("A100")
        asked, original = [], train_gpt.multiplies_eight_bits
        monkeypatch.setattr(train_gpt, "multiplies_eight_bits", lambda _: asked.append(original(gpu)) or asked[-1])
        found = model(x, x.roll(-1, 1))
    assert asked and not any(asked)
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)
    assert (found - expected).abs().mean() < 1e-3


def test_another_cudnn_than_pytorch_was_built_with_is_no_end(monkeypatch):
    """PyTorch raises when it is asked for the version; what has passed the self-check with it is kept apart."""
    world, cfg = World(), tiny_config()
    own = train_gpt.passed_before(cfg, world)

    def version():
        raise RuntimeError("cuDNN version incompatibility: PyTorch was compiled against (9, 19, 0) but found runtime version (9, 1, 0)")

    monkeypatch.setattr(torch.backends.cudnn, "version", version)
    assert train_gpt.passed_before(cfg, world) != own
