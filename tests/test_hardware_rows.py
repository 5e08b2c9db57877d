"""Triton's kernels against plain PyTorch in float64, forward and every gradient: in Triton's interpreter, or on a GPU if there is one."""

from __future__ import annotations

import json
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from conftest import ROOT, gpu_ops, launch, tiny_config, tiny_model

import train_gpt
from train_gpt import SOFTCAPS, FusedLoss, Ops, QKNormRope, fast_ops, rms_norm, token_nats, training_loss

pytest.importorskip("triton")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:overflow")  # of the interpreter's numpy
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def relative_errors(ours, theirs):
    """The largest difference of each pair, as a share of the largest value that is expected."""
    return [((a.double() - b).abs().max() / b.abs().max()).item() for a, b in zip(ours, theirs, strict=True)]


# ------------------------------------------------------------------------------------------------ what a machine computes with


@pytest.fixture
def gpu(monkeypatch):
    """`gpu(major)`: from now on PyTorch says that there is a GPU of this compute capability."""

    def become(major):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (major, 0))
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *_: SimpleNamespace(major=major, multi_processor_count=4))
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_: major >= 8)
        train_gpt.kernels_run.cache_clear()
        return torch.device("cuda")

    yield become
    train_gpt.kernels_run.cache_clear()


@pytest.mark.parametrize(("kind", "dtype", "major", "runs"), [
    ("cuda", torch.bfloat16, 9, True), ("cuda", torch.float16, 10, True), ("cuda", torch.bfloat16, 8, False),
    ("cuda", torch.float32, 9, False), ("cpu", torch.bfloat16, 9, False),
])  # fmt: skip
def test_where_kernels_run(gpu, monkeypatch, kind, dtype, major, runs):
    """16 bits on Hopper or newer; nowhere without Triton."""
    gpu(major)
    assert train_gpt.kernels_run(torch.device(kind), dtype) is runs
    train_gpt.kernels_run.cache_clear()
    monkeypatch.setattr(train_gpt, "triton", None)
    assert not train_gpt.kernels_run(torch.device(kind), dtype)


def exchanged(cfg, device):
    """{operation: the name of what fast_ops takes for it} of all operations that are not the plain ones."""
    found = {name: (f, plain) for (name, f), plain in zip(fast_ops(cfg, device)._asdict().items(), Ops(), strict=True)}
    # `apply` of an autograd function knows its class alone
    return {name: getattr(f, "__self__", f).__name__ for name, (f, plain) in found.items() if f is not plain}


STORED = {"matmul": "StoredMatmul", "normed_matmul": "normed_stored_matmul", "lookup": "StoredLookup"}
FOLDED = STORED | {"normed_matmul": "NormedMatmul"}
KERNELS = {"qk_norm_rope": "QKNormRope", "mlp": "fused_mlp"}
FUSED = KERNELS | {"loss": "fused_loss"}
ROWS = {"rms_norm": "RowNorm", "normed_matmul": "row_normed_matmul", "qk_norm_rope": "RowQKNormRope", "attend": "block_attend", "mlp": "row_mlp"}
CHUNKS = {"loss": "chunked_loss", "nats": "chunked_nats"}


@pytest.mark.parametrize(("settings", "expected"), [
    ({}, ROWS | CHUNKS),
    ({"softcap_type": "tanh"}, ROWS),
    ({"precision": "bf16"}, {}),
    ({"logit_softcap": 60}, ROWS | CHUNKS),
    ({"logit_softcap": 61}, ROWS),  # logits whose exponential might overflow
    ({"logit_head_type": "tversky"}, ROWS),  # no table to multiply with
    ({"attention_window": 8}, {name: f for name, f in (ROWS | CHUNKS).items() if name != "attend"}),
])  # fmt: skip
def test_what_a_cpu_computes_with(settings, expected):
    assert exchanged(tiny_config(**settings), torch.device("cpu")) == STORED | expected


@pytest.mark.parametrize(("major", "settings", "expected"), [
    (9, {}, FOLDED | FUSED),
    (10, {}, FOLDED | FUSED),
    (8, {}, FOLDED),
    (9, {"precision": "fp32"}, FOLDED | {"attend": "unshared_attend"}),
    (9, {"precision": "fp16"}, STORED | FUSED),  # whose 65504 might not hold a product before its norm
    (9, {"vocab_size": 16_384}, FOLDED | FUSED),
    (9, {"vocab_size": 16_385}, FOLDED | KERNELS),  # a row of logits in a program's registers
    (9, {"softcap_type": "tanh"}, FOLDED | FUSED),
    (9, {"logit_softcap": 61}, FOLDED | KERNELS),
    (9, {"logit_head_type": "tversky"}, FOLDED | KERNELS),
])  # fmt: skip
def test_what_a_gpu_computes_with(gpu, monkeypatch, major, settings, expected):
    monkeypatch.setitem(sys.modules, "flash_attn_interface", None)  # not installed
    cfg, device = tiny_config(**settings), gpu(major)
    assert exchanged(cfg, device) == expected
    train_gpt.kernels_run.cache_clear()
    monkeypatch.setattr(train_gpt, "triton", None)
    assert exchanged(cfg, device) == {name: f for name, f in expected.items() if name in (*STORED, "attend")}


def test_flash_attention_runs_where_it_is_installed_and_can(gpu, monkeypatch):
    """Hopper, 16 bits, head sizes of a multiple of 8 up to 256; a window has the query's own position in it."""
    calls = []

    def flash_attn_func(q, k, v, **settings):  # noqa: ARG001
        calls.append(settings)
        return (q + 1, "log-sum-exp") if len(calls) == 1 else q + 1

    monkeypatch.setitem(sys.modules, "flash_attn_interface", SimpleNamespace(flash_attn_func=flash_attn_func))
    q = torch.zeros(1, 2, 4, 16)
    for settings in ({}, {"attention_window": 8}):
        ops = fast_ops(tiny_config(**settings), gpu(9))
        assert exchanged(tiny_config(**settings), torch.device("cuda")) == FOLDED | FUSED | {"attend": "flash"}
        assert torch.equal(ops.attend(q, q, q), q + 1)
    assert calls == [{"causal": True, "window_size": (-1, -1)}, {"causal": True, "window_size": (7, 0)}]
    sizes = {"num_heads": 16}, {"model_dim": 1056}, {"diff_attn": 1, "num_heads": 8}  # heads of 4, 264, and 8 in two halves
    for major, settings in ((10, {}), (8, {}), (9, {"precision": "fp32"}), *((9, size) for size in sizes)):
        assert fast_ops(tiny_config(**settings), gpu(major)).attend in (train_gpt.attend, train_gpt.unshared_attend), settings


@pytest.mark.parametrize("error", [ImportError("undefined symbol"), OSError("libcudart.so.12: cannot open"), RuntimeError("built for another torch"),
                                   AttributeError("'_OpNamespace' has no 'fwd'")], ids=lambda e: type(e).__name__)  # fmt: skip
def test_a_flash_attention_that_cannot_be_imported_is_none(gpu, monkeypatch, error):
    """Whatever its extension raises, PyTorch's attention runs."""

    class Broken(ModuleType):
        def __getattr__(self, name):
            raise error

    monkeypatch.setitem(sys.modules, "flash_attn_interface", Broken("flash_attn_interface"))
    assert fast_ops(tiny_config(), gpu(9)).attend is train_gpt.attend


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


# ------------------------------------------------------------------------------------------------ queries and keys


def plain_qkv(qkv, gain, cos, sin):
    """q, k and v by definition: each head over its RMS, its halves rotated as the parts of a complex number, queries times gain."""
    heads = len(gain)
    kv_heads = (qkv.size(2) - heads) // 2
    q, k, v = rms_norm(qkv[:, :, :heads]), rms_norm(qkv[:, :, heads:-kv_heads]), qkv[:, :, -kv_heads:]
    turn = torch.complex(cos, -sin)[: qkv.size(1)]  # (T, 1, C/2)
    rotate = lambda x: torch.cat(torch.view_as_real(torch.complex(*x.chunk(2, -1)) * turn).unbind(-1), -1)
    return rotate(q) * gain[:, None], rotate(k), v


def qkv_inputs(batch, length, heads, kv_heads, width, dtype=torch.float32):
    """qkv, gain, cos and sin of more positions than there are; and gradients of q, k and v, each laid out in another way."""
    torch.manual_seed(0)
    qkv = torch.randn(batch, length, heads + 2 * kv_heads, width, device=DEVICE).to(dtype) * 3
    angle = torch.rand(length + 3, 1, width // 2, device=DEVICE) * 6
    layouts = (batch, heads, length, width), (batch, length, kv_heads, width), (kv_heads, length, batch, width)
    dq, dk, dv = (torch.randn(shape, device=DEVICE).to(dtype) for shape in layouts)
    incoming = [dq.transpose(1, 2), dk, dv.transpose(0, 2)]
    return (qkv, torch.rand(heads, device=DEVICE) * 3, angle.cos(), angle.sin()), incoming


def with_gradients(function, inputs, incoming):
    """q, k, v and the gradients of qkv and gain."""
    qkv, gain = (t.clone().requires_grad_() for t in inputs[:2])
    outputs = function(qkv, gain, *inputs[2:])
    return *outputs, *torch.autograd.grad(outputs, (qkv, gain), incoming)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2**-7)])  # the interpreter cuts off
def test_queries_and_keys_and_their_gradients(dtype, tolerance):
    """Head sizes that fill their block and that do not; several programs, the last one not full; one kv head, and as many as q."""
    for shape in ((3, 13, 4, 2, 96), (1, 70, 3, 1, 64), (2, 5, 2, 2, 10), (1, 3, 2, 1, 256)):
        inputs, incoming = qkv_inputs(*shape, dtype)
        ours = with_gradients(QKNormRope.apply, inputs, incoming)
        assert {t.dtype for t in ours[:4]} == {dtype} and ours[4].dtype == torch.float32
        assert ours[2].data_ptr() != ours[1].data_ptr() and not ours[2].is_contiguous()  # v is a view of qkv
        exact = [t.double() for t in inputs], [t.double() for t in incoming]
        theirs = with_gradients(plain_qkv, *exact)
        assert max(relative_errors(with_gradients(train_gpt.qk_norm_rope, *exact), theirs)) < 1e-12
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
        qkv, gain = layout.detach().requires_grad_(), inputs[1].clone().requires_grad_()
        outputs = QKNormRope.apply(qkv, gain, *inputs[2:])
        for a, b in zip((*outputs, *torch.autograd.grad(outputs, (qkv, gain), expanded)), expected, strict=True):
            torch.testing.assert_close(a, b)


# ------------------------------------------------------------------------------------------------ the compiler

HOPPER = """
import json, sys, torch, hopper, train_gpt
hopper.start(int(sys.argv[1]))
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


@pytest.mark.parametrize(("capability", "most"), [(90, 16), *(pytest.param(*other, marks=pytest.mark.campaign) for other in ((100, 16), (120, 64)))])
def test_kernels_compile_for_a_gpu(capability, most, tmp_path):
    """The interpreter takes what the compiler does not. The default model's shapes, without a GPU: a thread's values
    stay in registers, but for a few bytes; reads are 16 bytes wide; the loss kernel fetches rows ahead."""
    done = launch({"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "TRITON_CACHE_DIR": str(tmp_path)}, tmp_path, argv=["-c", HOPPER, str(capability)], timeout=240)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found.keys() == {"loss_kernel", "qk_kernel", "qk_backward_kernel"}
    assert all(kernel["spilled_bytes"] <= most and kernel["wide"] for kernel in found.values()), found
    assert found["loss_kernel"]["asynchronous"], found


# ------------------------------------------------------------------------------------------------ a whole model


def with_kernels(model):
    """The model as it computes on a GPU that runs them."""
    return model.use(train_gpt.kernel_ops(model.cfg, gpu_ops(model.cfg)))


def gradients(function, model, x, y):
    loss, nats = function(model, x, y, 1e-2)
    return loss, nats, *torch.autograd.grad(loss, list(model.parameters()))


@pytest.mark.parametrize("kind", ["poly", "tanh"])
def test_a_model_trains_through_kernels_as_without(kind, monkeypatch):
    """Loss and every parameter's gradient, against the plain operations; a GPU's kernels multiply float32 in fewer bits."""
    tolerance = 1e-4 if DEVICE == "cpu" else 2e-2
    model = tiny_model(softcap_type=kind, logit_softcap=2, precision="fp32").to(DEVICE)
    torch.manual_seed(0)
    x = torch.randint(320, (2, 32), device=DEVICE)
    y = x.roll(-1, 1)
    calls = counted(monkeypatch, "loss_and_gradients", "normed_rotated", "normed_rotated_backward")
    theirs = [t.double() for t in gradients(training_loss, model.use(Ops()), x, y)]
    assert not any(calls.values())
    assert max(errors := relative_errors(gradients(training_loss, with_kernels(model), x, y), theirs)) < tolerance, errors
    assert calls == {"loss_and_gradients": 1, "normed_rotated": 3, "normed_rotated_backward": 3}


# what gives the kernels other angles, heads, layouts of gradients or tables than the default
OTHERS = [
    {"position": "none"}, {"position": "radial"}, {"rope_type": "rope", "ntk_rope": 1}, {"diff_attn": 1}, {"xsa_last_n": 1}, {"attention_window": 8},
    {"tie_embeddings": 0}, {"tie_embeddings": 2, "qkv_split": 1}, {"untie_at_fraction": 0.5, "warmup_steps": 0},
]  # fmt: skip


def test_options_train_through_kernels_as_without():
    """Loss and gradients at half the length of a training sequence, where NTK_ROPE has angles of its own."""
    x = torch.randint(320, (1, 16), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    for settings in OTHERS:
        model, found = tiny_model(num_layers=1, precision="fp32", **settings).to(DEVICE), []
        for use in (lambda model: model.use(Ops()), with_kernels):
            loss, _ = training_loss(use(model), x, x, 1e-2)
            grads = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True, materialize_grads=True)
            found.append([loss, *(g for g in grads if g.any())])  # before a head is untied, it has no gradient
        errors = relative_errors(found[1], [t.double() for t in found[0]])
        assert max(errors) < (1e-4 if DEVICE == "cpu" else 2e-2), (settings, errors)


def test_kernels_enter_a_compiled_graph_whole():
    """Static shapes, one graph, as on a GPU; the same gradients as without a graph, and as plain operations have them. On a GPU the
    graph is Inductor's."""
    model = tiny_model(num_layers=2, precision="fp32").to(DEVICE)
    x = torch.randint(320, (2, 32), device=DEVICE)
    plain = [t.double() for t in gradients(training_loss, model.use(Ops()), x, x)]
    compiled = torch.compile(training_loss, backend="aot_eager" if DEVICE == "cpu" else "inductor", fullgraph=True, dynamic=False)
    found = [gradients(function, with_kernels(model), x, x) for function in (compiled, training_loss)]
    for ours in found:
        assert max(errors := relative_errors(ours, plain)) < (1e-4 if DEVICE == "cpu" else 2e-2), errors
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1.3e-6 if DEVICE == "cpu" else 2e-2, atol=1e-5)


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
