"""Triton's kernels against plain PyTorch in float64, forward and every gradient: in Triton's interpreter, or on a GPU if there is one."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, launch, tiny_model

import train_gpt
from train_gpt import SOFTCAPS, ChunkedPolyLoss, FusedLoss, QKNormRope, fused_loss, rms_norm, token_nats, training_loss

pytest.importorskip("triton")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:overflow")  # of the interpreter's numpy
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def relative_errors(ours, theirs):
    """The largest difference of each pair, as a share of the largest value that is expected."""
    return [((a.double() - b).abs().max() / b.abs().max()).item() for a, b in zip(ours, theirs, strict=True)]


@pytest.mark.parametrize(("is_cuda", "size", "major", "runs"), [(1, 2, 9, True), (1, 2, 10, True), (1, 2, 8, False), (1, 4, 9, False), (0, 2, 9, False)])
def test_where_kernels_run(monkeypatch, is_cuda, size, major, runs):
    """16 bits on Hopper or newer; nowhere without Triton."""
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(major=major))
    x = SimpleNamespace(is_cuda=bool(is_cuda), element_size=lambda: size, device="cuda:0")
    assert train_gpt.kernels_run(x) is runs
    monkeypatch.setattr(train_gpt, "triton", None)
    assert not train_gpt.kernels_run(x)


# ------------------------------------------------------------------------------------------------ loss


def loss_inputs(rows, size, spread, dtype=torch.float32, seed=0):
    """e (N, E), table (V, E), bias (V,), targets (N,)."""
    torch.manual_seed(seed)
    e, table, bias = (torch.randn(s, device=DEVICE) * spread for s in ((rows, 24), (size, 24), (size,)))
    return e.to(dtype), table.to(dtype), bias, torch.randint(size, (rows,), device=DEVICE)


def fused(e, table, bias, y, cap, z_loss, kind):
    """(loss, nats, de, dtable, dbias); the loss is multiplied by .7, as an incoming gradient does."""
    leaves = [e.clone().requires_grad_(), table.float().requires_grad_(), bias.clone().requires_grad_()]
    loss, nats = FusedLoss.apply(leaves[0], leaves[1], table, leaves[2], y, cap, z_loss, kind == "poly")
    return loss, nats, *torch.autograd.grad(loss * 0.7, leaves)


def expected(logits, y, cap, z_loss, kind):
    nats, lse = token_nats(SOFTCAPS[kind](logits, cap), y)
    return nats.sum() + z_loss * lse.square().sum(), nats.sum()


def plain(e, table, bias, y, cap, z_loss, kind):
    """The same five in float64, by autograd. In 16 bits the logits are rounded to them, as the kernel gets them."""
    leaves = [t.double().requires_grad_() for t in (e, table, bias)]
    exact = leaves[0] @ leaves[1].T
    rounding = (e @ table.T).double() - exact if e.dtype != torch.float32 else torch.zeros_like(exact)
    loss, nats = expected(exact + rounding.detach() + leaves[2], y, cap, z_loss, kind)
    return loss, nats, *torch.autograd.grad(loss * 0.7, leaves)


@pytest.mark.parametrize("kind", ["poly", "tanh"])
def test_fused_loss_and_its_gradients(kind):
    """Vocabularies that fill their block and that do not, rows that the programs share unevenly, fewer rows than programs."""
    for rows, size, spread, cap, z_loss in ((37, 300, 0.3, 5.0, 1e-2), (3, 256, 1.0, 5.0, 0.5), (22, 65, 3.0, 10.0, 0.0)):
        inputs = loss_inputs(rows, size, spread)
        errors = relative_errors(fused(*inputs, cap, z_loss, kind), plain(*inputs, cap, z_loss, kind))
        assert max(errors) < 3e-6, (rows, errors)


def test_fused_loss_in_sixteen_bits():
    """The loss and the bias's gradient come from float32; the two matrix products take logit gradients of 8 bits."""
    inputs = loss_inputs(37, 300, 0.6, torch.bfloat16)
    ours, theirs = (f(*inputs, 5.0, 1e-2, "poly") for f in (fused, plain))
    assert [t.dtype for t in ours[2:]] == [torch.bfloat16, torch.float32, torch.float32]
    errors = relative_errors(ours, theirs)
    assert max(errors[0], errors[1], errors[4]) < 3e-6 and max(errors[2:4]) < 1e-2, errors


def logit_gradient(logits, y, cap, z_loss, kind):
    """Through the kernel: with one row's e = (1, 0, ...) and the logits as the table's first column, dtable is d(logits)."""
    table = logits.new_zeros(len(logits), 16)
    table[:, 0] = logits
    e = table.new_zeros(1, 16)
    e[0, 0] = 1
    loss, _, _, dtable, dbias = fused(e, table, torch.zeros_like(logits), y, cap, z_loss, kind)
    torch.testing.assert_close(dtable[:, 0], dbias)
    return loss, dbias / 0.7


def test_gradient_is_zero_where_the_softcap_clips():
    """The polynomial reaches 1 at 1.6898606 caps; it is clipped beyond, and its argument beyond 2 caps."""
    edge = 1.6898606
    u = torch.tensor([0, 1, edge - 1e-5, edge + 1e-5, 1.9, 1.999, 2.001, 7, 1e4, 1e30, 1e-5 - edge, -1e-5 - edge, -3, -1e30], device=DEVICE)
    for target in (0, 2, 3, 6, 9, 13):
        y, logits = torch.tensor([target], device=DEVICE), (u.double() * 5).requires_grad_()
        loss, g = logit_gradient(logits.detach().float(), y, 5.0, 1e-2, "poly")
        wanted, _ = expected(logits[None], y, 5.0, 1e-2, "poly")
        torch.testing.assert_close(loss.double(), wanted, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(g.double(), torch.autograd.grad(wanted, logits)[0], rtol=1e-5, atol=1e-7)
        assert torch.equal(g == 0, u.abs() > edge)


@pytest.mark.parametrize("kind", ["poly", "tanh"])
def test_extreme_and_broken_logits(kind):
    """Caps to 60, logits that saturate; a NaN must reach the loss: training stops at it."""
    inputs = loss_inputs(5, 40, 4.0)
    for cap in (60.0, 1.0):
        errors = relative_errors(fused(*inputs, cap, 1e-4, kind)[:2], plain(*inputs, cap, 1e-4, kind)[:2])
        assert max(errors) < 3e-6, errors
    inputs[0][3, 0] = torch.nan
    assert fused(*inputs, 5.0, 1e-4, kind)[0].isnan()


def chosen_loss(model):
    h = torch.randn(1, 4, model.cfg.model_dim)
    found = fused_loss(model, h, torch.zeros(1, 4, dtype=torch.long), 0.0)
    return found and found[0].grad_fn.name()


def test_which_loss_computes(monkeypatch):
    """The kernel where it runs, chunks for a CPU's poly softcap, else neither; none for logits whose exponential overflows."""
    monkeypatch.setattr(train_gpt, "loss_and_gradients", lambda e, table, bias, *_: (bias.sum(), bias.max(), e, table, bias))
    cases = [({}, ChunkedPolyLoss, FusedLoss), ({"softcap_type": "tanh"}, None, FusedLoss), ({"logit_softcap": 61}, None, None),
             ({"softcap_type": "tanh", "vocab_size": 16385}, None, None)]  # fmt: skip
    for settings, without, with_kernels in cases:
        model = tiny_model(**settings)
        for runs, function in ((False, without), (True, with_kernels)):
            monkeypatch.setattr(train_gpt, "kernels_run", lambda _, runs=runs: runs)
            assert chosen_loss(model) == (function and f"{function.__name__}Backward"), (settings, runs)


# ------------------------------------------------------------------------------------------------ queries and keys


def plain_qkv(qkv, cos, sin, gain):
    """q, k and v by definition: each head over its RMS, its halves rotated as the parts of a complex number, queries times gain."""
    heads = len(gain)
    kv_heads = (qkv.size(2) - heads) // 2
    q, k, v = rms_norm(qkv[:, :, :heads]), rms_norm(qkv[:, :, heads:-kv_heads]), qkv[:, :, -kv_heads:]
    turn = torch.complex(cos, -sin)[: qkv.size(1), None]  # (T, 1, C/2)
    rotate = lambda x: torch.cat(torch.view_as_real(torch.complex(*x.chunk(2, -1)) * turn).unbind(-1), -1)
    return rotate(q) * gain[:, None], rotate(k), v


def qkv_inputs(batch, length, heads, kv_heads, width, dtype=torch.float32):
    """qkv, cos and sin of more positions than there are, gain; and gradients of q, k and v, each laid out in another way."""
    torch.manual_seed(0)
    qkv = torch.randn(batch, length, heads + 2 * kv_heads, width, device=DEVICE).to(dtype) * 3
    angle = torch.rand(length + 3, width // 2, device=DEVICE) * 6
    layouts = (batch, heads, length, width), (batch, length, kv_heads, width), (kv_heads, length, batch, width)
    dq, dk, dv = (torch.randn(shape, device=DEVICE).to(dtype) for shape in layouts)
    incoming = [dq.transpose(1, 2), dk, dv.transpose(0, 2)]
    return (qkv, angle.cos(), angle.sin(), torch.rand(heads, device=DEVICE) * 3), incoming


def with_gradients(function, inputs, incoming):
    """q, k, v and the gradients of qkv and gain."""
    qkv, gain = (inputs[i].clone().requires_grad_() for i in (0, 3))
    outputs = function(qkv, *inputs[1:3], gain)
    return *outputs, *torch.autograd.grad(outputs, (qkv, gain), incoming)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2**-7)])  # the interpreter cuts off
def test_queries_and_keys_and_their_gradients(dtype, tolerance):
    """Head sizes that fill their block and that do not; several programs, the last one not full; one kv head, and as many as q."""
    for shape in ((3, 13, 4, 2, 96), (1, 70, 3, 1, 64), (2, 5, 2, 2, 10), (1, 3, 2, 1, 256)):
        inputs, incoming = qkv_inputs(*shape, dtype)
        ours = with_gradients(QKNormRope.apply, inputs, incoming)
        assert {t.dtype for t in ours[:4]} == {dtype} and ours[4].dtype == torch.float32
        assert ours[2].data_ptr() != ours[1].data_ptr() and not ours[2].is_contiguous()  # v is a view of qkv
        theirs = with_gradients(plain_qkv, [t.double() for t in inputs], [t.double() for t in incoming])
        errors = relative_errors(ours, theirs)
        assert errors[2] == 0 and max(errors) < tolerance, (shape, errors)


def test_layouts_of_queries_and_keys_do_not_matter():
    """A gradient that is one number expanded, and a qkv that is not packed."""
    inputs, incoming = qkv_inputs(2, 5, 4, 2, 16)
    expected = with_gradients(QKNormRope.apply, inputs, [torch.full_like(g, 0.3) for g in incoming])
    wide = torch.randn(2, 5, 8, 32, device=DEVICE)
    wide[..., ::2] = inputs[0]
    expanded = [torch.tensor(0.3, device=DEVICE).expand_as(g) for g in incoming]
    for layout in (inputs[0], wide[..., ::2], inputs[0].transpose(0, 1).contiguous().transpose(0, 1)):
        qkv, gain = layout.detach().requires_grad_(), inputs[3].clone().requires_grad_()
        outputs = QKNormRope.apply(qkv, *inputs[1:3], gain)
        for a, b in zip((*outputs, *torch.autograd.grad(outputs, (qkv, gain), expanded)), expected, strict=True):
            torch.testing.assert_close(a, b)


# ------------------------------------------------------------------------------------------------ the compiler

HOPPER = """
import json, torch, hopper, train_gpt
hopper.start()
halves = lambda *shape: torch.zeros(shape, dtype=torch.bfloat16)
targets, angles, gain = torch.zeros(16, dtype=torch.long), torch.zeros(1024, 1, 48), torch.zeros(8)
train_gpt.loss_and_gradients(halves(16, 256), halves(8192, 256), torch.zeros(8192), targets, 10.0, 1e-4, True)
qkv = halves(2, 1024, 16, 96)
q, k = train_gpt.normed_rotated(qkv, angles, angles, gain)
train_gpt.normed_rotated_backward(q, k, k, qkv, angles, angles, gain)
names = {"asynchronous": "cp.async.cg", "wide": ".v4."}
counts = lambda kernel: {k: kernel.ptx.count(v) for k, v in names.items()}
print(json.dumps({kernel.name: counts(kernel) | {"spilled_bytes": kernel.spilled_bytes} for kernel in hopper.compiled}))
"""


def test_kernels_compile_for_a_hopper_gpu(tmp_path):
    """The interpreter takes what the compiler does not. The default model's shapes, without a GPU: a thread's values
    stay in registers, but for a few bytes; reads are 16 bytes wide; the loss kernel fetches rows ahead."""
    done = launch({"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "TRITON_CACHE_DIR": str(tmp_path)}, tmp_path, argv=["-c", HOPPER], timeout=240)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found.keys() == {"loss_kernel", "qk_kernel", "qk_backward_kernel"}
    assert all(kernel["spilled_bytes"] <= 16 and kernel["wide"] for kernel in found.values()), found
    assert found["loss_kernel"]["asynchronous"], found


# ------------------------------------------------------------------------------------------------ a whole model


def gradients(function, model, x, y):
    loss, nats = function(model, x, y, 1e-2)
    return loss, nats, *torch.autograd.grad(loss, list(model.parameters()))


@pytest.mark.parametrize("kind", ["poly", "tanh"])
def test_a_model_trains_through_kernels_as_without(kind, monkeypatch):
    """Loss and every parameter's gradient."""
    model = tiny_model(softcap_type=kind, logit_softcap=2).to(DEVICE)
    torch.manual_seed(0)
    x = torch.randint(320, (2, 32), device=DEVICE)
    y = x.roll(-1, 1)
    theirs = [t.double() for t in gradients(training_loss, model, x, y)]
    calls = counted(monkeypatch, "loss_and_gradients", "normed_rotated", "normed_rotated_backward")
    monkeypatch.setattr(train_gpt, "kernels_run", lambda _: True)
    assert max(errors := relative_errors(gradients(training_loss, model, x, y), theirs)) < 1e-4, errors
    assert calls == {"loss_and_gradients": 1, "normed_rotated": 3, "normed_rotated_backward": 3}


def test_kernels_enter_a_compiled_graph_whole(monkeypatch):
    """Static shapes, one graph, as on a GPU; the same gradients as without a graph."""
    monkeypatch.setattr(train_gpt, "kernels_run", lambda _: True)
    model = tiny_model(num_layers=2).to(DEVICE)
    x = torch.randint(320, (2, 32), device=DEVICE)
    compiled = torch.compile(training_loss, backend="aot_eager", fullgraph=True, dynamic=False)
    for ours, theirs in zip(*(gradients(function, model, x, x) for function in (compiled, training_loss)), strict=True):
        torch.testing.assert_close(ours, theirs)


def counted(monkeypatch, *names):
    """How often each of these functions of train_gpt is called, from now on."""
    calls = dict.fromkeys(names, 0)

    def counting(name, function):
        def call(*args):
            calls[name] += 1
            return function(*args)

        return call

    for name in names:
        monkeypatch.setattr(train_gpt, name, counting(name, getattr(train_gpt, name)))
    return calls
