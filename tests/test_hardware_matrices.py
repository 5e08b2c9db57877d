"""Products of matrices: 8-bit operands, the fused MLP, folded norms and split sums, against plain PyTorch in float64."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import gemm
import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, gpu_ops, launch, tiny_model

import train_gpt
from train_gpt import (
    Config,
    Fp8FusedMLP,
    Fp8Linear,
    FusedMLP,
    NormedMatmul,
    Ops,
    TernaryLinear,
    Tiles,
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

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.float32 if DEVICE == "cpu" else torch.bfloat16  # a GPU multiplies float32 in fewer bits
on_the_cpu = pytest.mark.skipif(DEVICE != "cpu", reason="compares whole models in float32")


def batch(model, sequences=4, seed=5):
    torch.manual_seed(seed)
    x = torch.randint(model.cfg.vocab_size, (sequences, model.cfg.train_seq_len))
    return x, x.roll(-1, 1)


def test_ternary_weights_are_exact_in_eight_bits_while_their_scales_lie_within_2_to_the_13():
    """Every e4m3 mantissa and every exponent: exact within 2^13 of the largest scale, far below it off by 2^-17 of the largest."""
    for top in (2.0**-8, 1.875 * 2.0**-6, 1.75, 200.0):
        scales = round_scale(top * 2.0 ** -torch.arange(0, 20, 1 / 16), "e4m3").unique()
        stored = scales[:, None] * torch.tensor([1.0, 0.0, -1.0])
        codes, codes_t, scale, _ = fp8_weight(stored)
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
    config = Config(bitnet_group_size=16)
    for width in (16, 64, 512, 768, 784, 3072, 4096):
        scale = Fp8Linear(width, 16, config).scales[0]
        one_hot = torch.nn.functional.one_hot(torch.tensor(3), width)[None]
        for dtype in (torch.float32, torch.bfloat16):
            largest = (rms_norm(one_hot.to(dtype) * 1e3).float() * scale).max().item()
            assert 224 / math.sqrt(1.01) <= largest <= 448 * (1.005 if width == 784 else 1), width  # 28 * 16 = 448 itself
            assert to_fp8(rms_norm(one_hot.to(dtype) * 1e3), scale).float().isfinite().all()
    assert [Fp8Linear(width, 16, config).scales[0] for width in (768, 3072)] == [16, 8]
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
        step.take(x, y)
        for layer in (m for m in model.modules() if isinstance(m, TernaryLinear)):
            codes, codes_t, scale, _ = layer.eight_bit(torch.float32)
            assert torch.equal(codes.float() * scale, layer.rounded()) and torch.equal(codes_t.float().T, codes.float())
        assert not torch.equal(before, model.blocks[1].mlp.up.rounded())


def test_fp8_gradients_point_where_the_plain_ones_do():
    """Every matrix, table and control."""
    grads = {}
    for act_quant in ("none", "fp8"):
        model = tiny_model(act_quant=act_quant, softcap_type="tanh")  # the path a GPU takes
        (training_loss(model, *batch(model, 8), 1e-4)[0] / 256).backward()
        grads[act_quant] = [(name, p.grad) for name, p in model.named_parameters()]
    for (name, plain), (_, ours) in zip(*grads.values(), strict=True):
        assert torch.nn.functional.cosine_similarity(ours.flatten(), plain.flatten(), 0) > 0.98, name
        assert not torch.equal(ours, plain), name


@pytest.mark.parametrize(("setting", "value"), [("SCALE_STORAGE", "fp16"), ("MODEL_DIM", "72"), ("ACT_QUANT", "int4"), ("MLP_GROUPS", "2"), ("PRECISION", "fp16")])
def test_what_eight_bits_cannot_hold_is_refused(setting, value):
    extra = {"NUM_HEADS": "4", "BITNET_GROUP_SIZE": "8"} if setting == "MODEL_DIM" else {}
    with pytest.raises(UserError, match=f"{setting}='?{value}"):
        Config.from_env(TINY | {"ACT_QUANT": "fp8", setting: value} | extra)


def test_a_gpu_without_eight_bits_multiplies_the_same_operands(monkeypatch):
    """Forward and gradients of a layer against torch._scaled_mm; in bfloat16 both are rounded once, so they are the same numbers."""
    for precision in ("bf16", "fp32"):
        found = []
        for scaled in (True, False):
            monkeypatch.setattr(train_gpt, "multiplies_eight_bits", lambda _, scaled=scaled: scaled)
            layer = tiny_model(act_quant="fp8", precision=precision).blocks[0].mlp.up
            dtype = train_gpt.compute_dtype(precision, torch.device("cpu"))
            torch.manual_seed(0)
            x, g = rms_norm(torch.randn(40, 64)).to(dtype).requires_grad_(), torch.randn(40, 128).to(dtype) / layer.scales[1]
            y = layer(x)
            found.append([y, *torch.autograd.grad(y, (x, layer.weight), g)])
        for a, b in zip(*found, strict=True):
            assert a.dtype == b.dtype and a.any()
            torch.testing.assert_close(a, b, rtol=2**-7 if precision == "bf16" else 1e-5, atol=1e-6 * a.abs().max().item())


# ---- the fused MLP


@pytest.fixture
def kernels(monkeypatch):
    """Kernels compute for every tensor; on the CPU in Triton's interpreter, in 32 bits too, in a tile smaller than the tests' sizes. A
    GPU takes its own: one of 32 rows would not be multiplied by the instructions that the real ones are."""
    pytest.importorskip("triton")
    monkeypatch.setattr(train_gpt, "kernels_run", lambda *_: True)
    monkeypatch.setattr(train_gpt, "TUNED", {})
    if DEVICE != "cpu":
        return
    monkeypatch.setattr(train_gpt, "TILES", [Tiles(32, 64, 128, 4, 2, True)])
    from triton.runtime import interpreter

    original = interpreter._convert_float
    monkeypatch.setattr(interpreter, "_convert_float", lambda *a: convert_float(*a) if a[1].name == "fp32" else original(*a))


def convert_float(x, _, dtype, *__):
    """float32 -> 16 or 8 bits as a GPU rounds. The interpreter of triton 3.6.0 does not: it makes 1.99 a 1.0 in e4m3 and truncates to bf16."""
    kind = {"bf16": torch.bfloat16, "fp8e4nv": torch.float8_e4m3fn, "fp8e5": torch.float8_e5m2}[dtype.name]
    rounded = torch.from_numpy(np.ascontiguousarray(x).view(np.float32)).to(kind)
    return rounded.view(torch.int16).numpy().view(np.uint16) if kind == torch.bfloat16 else rounded.view(torch.uint8).numpy()


def plain_mlp(x, up, down):
    return rms_norm((x @ up.T).relu().square()) @ down.T


def compare(function, reference, inputs):
    """function(*inputs) and its gradients against the reference in float64, in units of each result's largest element."""
    inputs, rtol = [t.to(DTYPE) for t in inputs], 1e-4 if DEVICE == "cpu" else 2e-2
    ours = [t.clone().to(DEVICE).requires_grad_() for t in inputs]
    exact = [t.double().requires_grad_() for t in inputs]
    y, expected = function(*ours), reference(*exact)
    g = torch.randn_like(expected)
    results = zip([y, *torch.autograd.grad(y, ours, g.to(y))], [expected, *torch.autograd.grad(expected, exact, g)], strict=True)
    for i, (a, b) in enumerate(results):
        error = (a.detach().cpu().double() - b).abs().max() / b.abs().max()
        assert a.isfinite().all() and error < rtol, (i, error.item())


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize(("rows", "width", "hidden"), [(40, 48, 72), (33, 40, 64), (64, 64, 32), (7, 80, 144)])
def test_fused_mlp_is_the_plain_one_with_every_gradient(rows, width, hidden):
    """Sizes that are no multiples of the tiles, weights of any size, and rows whose hidden layer is 0: the norm's eps decides."""
    torch.manual_seed(rows)
    x, up, down = torch.randn(rows, width), torch.randn(hidden, width) * 0.3, torch.randn(width, hidden)
    up, x[:, 0] = up - 2 * (torch.arange(width) == 0), x[:, 0].abs()
    x[3], x[5] = 0.0, -50 * up.sum(0).sign() * (torch.arange(width) != 0)
    x[5, 0] = 1e4  # every unit is off
    assert (x @ up.T).relu()[[3, 5]].abs().max() == 0
    x[6] *= 1e-2  # h^2 about eps
    compare(lambda x, up, down: FusedMLP.apply(x, up, down, up.detach(), down.detach()), plain_mlp, (x, up, down))


def test_normed_matmul_is_norm_then_product_with_every_gradient():
    torch.manual_seed(0)
    x, w = torch.randn(5, 6, 32) * torch.tensor([0.0, 1e-3, 0.1, 1, 10, 1e3])[:, None], torch.randn(48, 32)
    function = lambda x, w: NormedMatmul.apply(x, w, w.detach())
    for form in (function, torch.compile(function, backend="aot_eager", fullgraph=True, dynamic=False)):
        compare(form, lambda x, w: rms_norm(x) @ w.T, (x, w))


@on_the_cpu
@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("act_quant", ["none", "fp8"])
def test_a_model_computes_the_same_through_the_fused_mlp(act_quant, monkeypatch):
    """Loss and all gradients of a whole model, plain and fused, eager and as one graph; a block calls the kernel once."""
    results, calls, launched = {}, [], train_gpt.relu2_product
    monkeypatch.setattr(train_gpt, "relu2_product", lambda *a: calls.append(1) or launched(*a))
    graph = torch.compile(training_loss, backend="aot_eager", fullgraph=True, dynamic=False)
    for form, function in (("plain", training_loss), ("fused", training_loss), ("graph", graph)):
        model = tiny_model(softcap_type="tanh", num_layers=1, act_quant=act_quant)
        model.use(Ops() if form == "plain" else Ops(mlp=train_gpt.fused_mlp))
        loss, _ = function(model, *batch(model), 1e-4)
        (loss / 256).backward()
        results[form] = {"loss": loss.detach(), **{name: p.grad for name, p in model.named_parameters() if p.numel()}}
        assert form == "graph" or len(calls) == (form == "fused")
    for name, plain in results["plain"].items():
        fused = results["fused"][name]
        torch.testing.assert_close(results["graph"][name], fused, rtol=1e-3, atol=1e-4 * plain.abs().max().item())
        if act_quant == "none":
            torch.testing.assert_close(fused, plain, rtol=1e-3, atol=1e-4 * plain.abs().max().item())
        else:  # h is rounded before its norm, not after
            assert torch.nn.functional.cosine_similarity(fused.flatten(), plain.flatten(), 0) > 0.99, name


@pytest.mark.usefixtures("kernels")
def test_fused_mlp_in_eight_bits_against_operands_rounded_one_by_one():
    """Forward and every gradient, each operand rounded by PyTorch; and h cannot overflow, whatever the input's direction."""
    mlp = tiny_model(act_quant="fp8", num_layers=1, mlp_mult=3).blocks[0].mlp
    g_scale = mlp.up.scales[1]
    up, down = (layer.rounded().double() for layer in (mlp.up, mlp.down))
    towards = torch.randn(40, 64)
    towards[:20] = mlp.up.rounded()[:20]  # inputs along a row of `up` make its output as large as it can be
    x = rms_norm(towards).to(DTYPE)
    g = (torch.randn(40, 64) / g_scale).to(DTYPE)
    mlp, inputs = mlp.to(DEVICE), x.to(DEVICE).requires_grad_()
    y = train_gpt.fused_mlp(inputs[None], mlp.up, mlp.down)[0]
    y.backward(g.to(DEVICE))
    up_grad, down_grad = mlp.up.weight.grad, mlp.down.weight.grad
    e4m3 = lambda t, scale: (t * scale).float().to(torch.float8_e4m3fn).double() / scale
    e5m2 = lambda t: (t * g_scale).float().to(torch.float8_e5m2).double() / g_scale
    h = (e4m3(x, 32.0) @ up.T).relu().square()
    h_scale = fp8_weight(up.float()).relu2_scale.double()
    assert 448 / 8 < (h * h_scale).max() < 448
    rho, product = (h.square().mean(1, keepdim=True) + 1e-6).rsqrt(), e4m3(h, h_scale) @ down.T
    rough = 1 if DEVICE == "cpu" else 10
    close = lambda a, b, rtol=2e-3: torch.testing.assert_close(a.double().cpu(), b, rtol=0, atol=rough * rtol * b.abs().max().item())
    close(y, rho * product)
    slope = rho**3 * (g.double() * product).sum(1, keepdim=True) / 192
    d_hidden = 2 * h.sqrt() * (rho * (e5m2(g) @ down) - slope * h)
    close(inputs.grad, e5m2(d_hidden) @ up, 2e-2)  # one rounding of 2^-3 may fall on the other side
    close(up_grad, d_hidden.T @ x.double())
    close(down_grad, (rho * g).T @ h)


# settings -> the function that computes the MLP; None: the two matrices, one after the other
COVERED = [
    ({}, FusedMLP), ({"act_quant": "fp8"}, Fp8FusedMLP), ({"mlp_groups": 2}, FusedMLP), ({"scale_group": "row"}, FusedMLP),
    ({"precision": "fp16"}, None), ({"activation": "relu"}, None), ({"activation": "swiglu"}, None),
    ({"input_norm": "all"}, None), ({"input_norm": "none"}, None), ({"act_quant": "int8"}, None), ({"weight_quant": "none"}, None),
    ({"weight_quant": "binary"}, FusedMLP), ({"model_dim": 48, "mlp_hidden": 52, "bitnet_group_size": 4}, None),
]  # fmt: skip


@on_the_cpu
@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize(("settings", "expected"), COVERED)
def test_where_the_mlp_is_fused(settings, expected, monkeypatch):
    """Where nothing else happens to the two matrices' inputs; what is not fused computes as plainly."""
    calls, model = [], tiny_model(num_layers=1, **settings)
    for kind in (FusedMLP, Fp8FusedMLP):
        monkeypatch.setattr(kind, "apply", lambda *a, kind=kind, apply=kind.apply: calls.append(kind) or apply(*a))
    x = torch.randn(2, 3, model.cfg.model_dim).to(train_gpt.compute_dtype(model.cfg.precision, torch.device("cpu")))
    mlp = model.use(Ops()).blocks[0].mlp
    plain = mlp(x)
    assert not calls
    model.use(train_gpt.kernel_ops(model.cfg, Ops()))
    fused = mlp(x)
    assert set(calls) == ({expected} if expected else set())
    if expected is None:
        assert torch.equal(fused, plain)
    else:
        assert torch.nn.functional.cosine_similarity(fused.flatten().float(), plain.flatten().float(), 0) > 0.99


@pytest.fixture
def timed(monkeypatch):
    """Tiles of a made-up GPU: 16 rows take 3 ms, 64 take 2; 32 cannot be launched, and 128, the fastest, compute something else."""
    triton = pytest.importorskip("triton")
    tiles, ms, asked = [Tiles(m, 64, 128, 4, 2, True) for m in (16, 32, 64, 128)], {16: 3.0, 64: 2.0, 128: 1.0}, []
    monkeypatch.setattr(train_gpt, "TILES", tiles)
    monkeypatch.setattr(train_gpt, "TUNED", {})

    def do_bench(call, **_):
        asked.append(call.args[0].m)
        return ms[call.args[0].m]

    monkeypatch.setattr(triton.testing, "do_bench", do_bench)
    return tiles, ms, asked


class OnGpu(SimpleNamespace):
    is_cuda, dtype, device = True, torch.bfloat16, torch.device("cuda")

    def __len__(self):
        return self.rows


def test_the_fastest_tiles_that_run_and_are_right_are_kept(timed):
    """Timed once for a key and a number of rows; what cannot be launched, or computes something else, does not stop the run."""
    tiles, ms, asked = timed
    right, wrong = torch.randn(300, 5), torch.randn(300, 5)
    launch, plain = lambda t: [ms[t.m] and (wrong if t.m == 128 else right)], lambda: [train_gpt.end_rows(right)]  # 32: KeyError
    assert [train_gpt.tuned(("name", 1), OnGpu(rows=9), launch, plain) for _ in range(2)] == [tiles[2]] * 2 and asked == [16, 64]
    ms[16] = 1.0
    assert train_gpt.tuned(("name", 1), OnGpu(rows=10), launch, plain) is tiles[0] and len(asked) == 4
    assert train_gpt.tuned(("name", 1), torch.ones(1), launch, plain) is tiles[0] and len(asked) == 4  # a CPU times nothing


@pytest.mark.usefixtures("timed")
@pytest.mark.parametrize("value", [0.0, float("nan"), 1.06])
def test_an_operation_without_a_tile_that_is_right_is_refused_and_says_why(value):
    right = torch.randn(300, 5)
    with pytest.raises(RuntimeError, match="name: none of 4 tiles runs here \\(Differs: off by"):
        train_gpt.tuned(("name", 1), OnGpu(rows=9), lambda _: [right * value], lambda: [train_gpt.end_rows(right)])


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("eight", [False, True])
@pytest.mark.parametrize("tiles", train_gpt.TILES, ids=str)
def test_every_real_tile_computes_what_is_expected(tiles, eight, monkeypatch):
    """At sizes that are no multiples of it, against products in float64 of the same operands, each output whole: in the interpreter, on
    a GPU those that it can launch. Then as `fastest_tiles` sees it, which compares some rows."""
    triton = pytest.importorskip("triton")
    torch.manual_seed(0)
    rows, width, hidden = 150, 144, 272
    monkeypatch.setattr(train_gpt, "TILES", [tiles])
    monkeypatch.setattr(triton.testing, "do_bench", lambda *_, **__: 1.0)
    # the interpreter has no bfloat16 products
    x, w, dy = (torch.randn(size).to(DEVICE, DTYPE) for size in ((rows, width), (hidden, width), (rows, width)))
    rho, c = (torch.rand(rows, 1) + 0.5).to(DEVICE), torch.randn(rows, 1).to(DEVICE)
    scales, product_scale, h8_scale = None, 1.0, 1.0
    if eight:
        scales, product_scale, h8_scale = torch.tensor([0.5, 2.0**-5], device=DEVICE), 0.5, 2.0**-5
        x, w, dy = x.to(torch.float8_e4m3fn), w.to(torch.float8_e4m3fn), dy.to(torch.float8_e5m2)
    try:
        h, h8, squares = train_gpt.relu2_product(x, w, scales, DTYPE)
        g, g8 = train_gpt.relu2_gradient(dy, w if eight else w.t().contiguous(), h, rho, c, scales)
    except RuntimeError as error:
        if DEVICE == "cpu" or "OutOfResources" not in str(error):
            raise
        pytest.skip(str(error))  # of shared memory: `tuned` leaves this tile out
    exact_h = ((x.double() @ w.double().T) * product_scale).relu().square()
    exact_g = 2 * h.double().sqrt() * (rho * product_scale * (dy.double() @ w.double().T) - c * h.double())
    rough = 1e-5 if DTYPE == torch.float32 else 2**-7
    for found, exact, most in ((h, exact_h, rough), (squares, h.double().square().sum(1, keepdim=True), 1e-5), (g, exact_g, rough)):
        assert ((found.double() - exact).norm() / exact.norm()).item() < most
    if eight:  # rounded to 3 and 2 bits of mantissa
        for found, exact, most in ((h8, exact_h * h8_scale, 0.04), (g8, exact_g * h8_scale, 0.08)):
            assert ((found.double() - exact).norm() / exact.norm()).item() < most
    else:
        sums = train_gpt.split_weight_gradient(dy, x, 3)
        torch.testing.assert_close(sums.double(), dy.double().T @ x.double(), rtol=1e-4, atol=1e-3)
    if DEVICE == "cpu":  # where nothing is timed
        monkeypatch.setattr(train_gpt, "tuned", lambda key, _x, launch, plain: train_gpt.fastest_tiles(key[0], launch, plain()))
        assert torch.equal(train_gpt.relu2_product(x, w, scales, DTYPE)[0], h)
        assert torch.equal(train_gpt.relu2_gradient(dy, w if eight else w.t().contiguous(), h, rho, c, scales)[0], g)


# ---- sums in parts


@pytest.mark.usefixtures("kernels")
def test_split_weight_gradient_is_the_product_and_repeatable():
    """Rows, sizes and numbers of parts that do not divide; parts that get no row; the same bits twice."""
    torch.manual_seed(0)
    for rows, out, width, splits in ((200, 48, 72, 3), (65, 40, 144, 5), (256, 32, 64, 2), (40, 64, 24, 4)):
        g, x = torch.randn(rows, out).to(DEVICE, DTYPE), torch.randn(rows, width).to(DEVICE, DTYPE)
        ours = train_gpt.split_weight_gradient(g, x, splits)
        assert ours.dtype == torch.float32 and torch.equal(ours, train_gpt.split_weight_gradient(g, x, splits))
        torch.testing.assert_close(ours.double(), g.double().T @ x.double(), rtol=1e-4, atol=1e-4)


@on_the_cpu
@pytest.mark.usefixtures("kernels")
def test_the_table_of_shapes_decides_who_computes_weight_gradients(monkeypatch):
    calls, launched = [], train_gpt.split_weight_gradient
    monkeypatch.setattr(train_gpt, "split_weight_gradient", lambda *a: calls.append(a[2]) or launched(*a))
    monkeypatch.setattr(train_gpt, "SPLIT_SUMS", {(64, 128): 2})
    model = tiny_model(num_layers=1)
    model.use(gpu_ops(model.cfg))  # the plain operations leave gradients to PyTorch
    x, y = batch(model, 2)
    training_loss(model, x, y, 0.0)[0].backward()
    assert calls == [2]  # that of `down`
    split = [p.grad.clone() for p in model.parameters() if p.numel()]
    monkeypatch.setattr(train_gpt, "SPLIT_SUMS", {})
    model.zero_grad()
    training_loss(model, x, y, 0.0)[0].backward()
    for a, b in zip(split, (p.grad for p in model.parameters() if p.numel()), strict=True):
        torch.testing.assert_close(a, b)
    assert calls == [2]


def test_the_bench_measures_every_product_each_way(tmp_path, capsys):
    """bench/gemm.py at small sizes: nothing fails, rates follow from times and sizes, the table is what train_gpt.py takes."""
    pytest.importorskip("triton")
    assert gemm.main(["--tiny", "--json", str(tmp_path / "rows.json")]) == 0
    text, found = capsys.readouterr().out, json.loads((tmp_path / "rows.json").read_text())
    assert not [row for row in found["rows"] if "failed" in row]
    ways, plain = {(row["product"].split(":")[0], row["way"]): row for row in found["rows"]}, f"{DTYPE}"[6:]
    for name in ("qkv", "attention out", "up", "down"):
        assert {way for product, way in ways if product == f"{name}, forward"} >= {plain, "e4m3 x e4m3"}
        assert {way for product, way in ways if product == f"{name}, input gradient"} >= {plain, "e5m2 x e4m3"}
        assert {way for product, way in ways if product == f"{name}, weight gradient"} == {"torch.mm", "3 sums"}
    assert len([way for _, way in ways if way.startswith("kernel")]) == 4
    row = ways["down, forward", plain]
    assert row["product"] == "down, forward: 128 x 128 x 64"
    assert row["flops_s"] * row["ms"] / 1000 == pytest.approx(2 * 128 * 128 * 64)
    assert row["of_peak"] == pytest.approx(row["flops_s"] / found["peaks"][str(DTYPE.itemsize * 8)])
    assert "SPLIT_SUMS: dict[tuple[int, int], int] = {" in text


def test_the_bench_splits_only_where_it_is_faster(monkeypatch):
    times = {"torch.mm": 1.0, "2 sums": 0.99, "3 sums": 1.2}
    bench, product = gemm.Bench(torch.device("cpu"), torch.float32, 8, 0.1, (2, 3)), gemm.Product("w", *torch.ones(3, 8, 8), False)
    monkeypatch.setattr(bench, "measure", lambda name, flops, way: times[way[0]])  # noqa: ARG005
    assert gemm.best_splits(bench, product, 1.0) is None
    times["3 sums"] = 0.9
    assert gemm.best_splits(bench, product, 1.0) == 3


HOPPER = """
import json, re, torch, hopper, train_gpt
hopper.start()
train_gpt.TILES = [t for t in train_gpt.TILES if t.n == 128][:1]  # the others take longer to compile
zeros = lambda *shape, dtype=torch.bfloat16: torch.zeros(shape, dtype=dtype)
x, up, h, rows, scales = zeros(256, 768), zeros(3072, 768), zeros(256, 3072), zeros(256, 1, dtype=torch.float32), torch.ones(2)
train_gpt.relu2_product(x, up, None, x.dtype)
train_gpt.relu2_gradient(x, up.T.contiguous(), h, rows, rows, None)
train_gpt.split_weight_gradient(h, x, 5)
x8, up8 = x.to(torch.float8_e4m3fn), up.to(torch.float8_e4m3fn)
train_gpt.TUNED.clear()
train_gpt.relu2_product(x8, up8, scales, x.dtype)
train_gpt.relu2_gradient(x.to(torch.float8_e5m2), up8, h, rows, rows, scales)
wgmma = "wgmma.mma_async.sync.aligned.m64n128k([0-9]+).f32.([.a-z0-9]+)"
print(json.dumps([[kernel.name, sorted(set(re.findall(wgmma, kernel.ptx))), "cp.async.bulk.tensor" in kernel.ptx, kernel.shared_bytes, kernel.spilled_bytes]
                  for kernel in hopper.compiled]))
"""


def test_matrix_kernels_compile_for_a_hopper_gpu(tmp_path):
    """Asynchronous tensor core products of the right operands, tiles by the memory accelerator, within an H100's 227 KB of shared
    memory, and nothing spilled: for bfloat16 and 8 bits."""
    pytest.importorskip("triton")
    done = launch({"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "TRITON_CACHE_DIR": str(tmp_path)}, tmp_path, argv=["-c", HOPPER], timeout=240)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert [name for name, *_ in found] == ["relu2_kernel", "relu2_gradient_kernel", "split_gradient_kernel", "relu2_kernel", "relu2_gradient_kernel"]
    expected = *[["16", "bf16.bf16"]] * 3, ["32", "e4m3.e4m3"], ["32", "e5m2.e4m3"]
    for kernel, product in zip(found, expected, strict=True):
        _, products, tiles, shared_bytes, spilled_bytes = kernel
        assert products == [product] and tiles and shared_bytes <= 227 * 1024 and spilled_bytes == 0, kernel
