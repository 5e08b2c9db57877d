"""The model against what its definition says: causality, pairing of skips, rotary angles, softcap, the loss by parts; and the
plain operations against this machine's fast ones."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import fresh_model, gpu_ops, tiny_config, tiny_model, tokens

import train_gpt
from train_gpt import (
    ChunkedPolyLoss,
    Ops,
    Part,
    Parts,
    Rotary,
    as_stored,
    attend,
    choose_parts,
    fast_ops,
    poly_softcap,
    rms_norm,
    rotate,
    token_nats,
    training_loss,
)


def test_first_loss_is_that_of_a_uniform_guess():
    torch.manual_seed(0)
    model = fresh_model(tiny_config())
    x = tokens(model)
    assert abs(model(x, x.roll(-1, 1)).mean().item() - math.log(320)) < 0.1


def test_no_target_depends_on_a_later_token():
    model = tiny_model()
    x = tokens(model)
    y = x.roll(-1, 1)
    before = model(x, y)
    for t in (1, 7, 31):
        changed = x.clone()
        changed[:, t] = (changed[:, t] + 1) % 320
        after = model(changed, y)
        assert torch.equal(before[:, :t], after[:, :t])
        assert not torch.equal(before[:, t:], after[:, t:])


def test_hidden_states_are_the_u_net_written_out():
    """Encoder pushes, decoder pops in reverse, each with its own weight; an odd number of layers makes the decoder longer."""
    for layers in (2, 3, 4, 5):
        model = tiny_model(num_layers=layers)
        x = tokens(model)
        x0 = h = rms_norm(model.embed_in(model.table.rows(x, torch.float32)))
        outputs, half = [], layers // 2
        for i in range(layers):
            partner = 2 * half - 1 - i  # the encoder block whose output decoder block i takes
            if half <= i < 2 * half:
                h = h + as_stored(model.skip_weights)[i - half] * outputs[partner]
            h = model.blocks[i](h, x0)
            outputs.append(h)
        torch.testing.assert_close(model.hidden(x), rms_norm(h), rtol=0, atol=0)


def test_grouped_attention_equals_softmax_written_out():
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 9, 4, 6).double(), torch.randn(2, 9, 2, 6).double(), torch.randn(2, 9, 2, 6).double()
    out = attend(q, k, v)
    for head in range(4):
        scores = torch.einsum("btc,bsc->bts", q[:, :, head], k[:, :, head // 2]) / math.sqrt(6)
        scores = scores.masked_fill(torch.ones(9, 9).triu(1).bool(), -math.inf)
        torch.testing.assert_close(out[:, :, head], scores.softmax(-1) @ v[:, :, head // 2])


def test_rotary_keeps_norms_and_depends_on_distance_alone():
    angles = Rotary(tiny_config())(32)
    a, b = torch.randn(1, 1, 1, 16), torch.randn(1, 1, 1, 16)
    row = lambda x: rotate(x.expand(1, 32, 1, 16), *angles)[0, :, 0]
    torch.testing.assert_close(row(a).norm(dim=-1), a.norm().expand(32))
    products = row(a) @ row(b).T
    for distance in (1, 5):
        diagonal = products.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=1e-4, atol=1e-4)


def test_yarn_divides_low_frequencies_by_the_length_ratio():
    cfg = tiny_config(yarn_max_len=128)  # ratio 4, head_dim 16
    plain = [cfg.rope_base ** (-i / 16) for i in range(0, 16, 2)]
    ramp = [min(1, max(0, (i / 16 - 0.25) / 0.75)) for i in range(0, 16, 2)]
    expected = torch.tensor([f / (1 + r * 3) for f, r in zip(plain, ramp, strict=True)])
    torch.testing.assert_close(Rotary(cfg).sin[1, 0], expected.sin())
    torch.testing.assert_close(Rotary(tiny_config(rope_type="rope")).sin[1, 0], torch.tensor(plain).sin())


def test_poly_softcap_values():
    """#640's polynomial: f(1) = 0.7333 (tanh would give 0.7616), flat beyond 1.69, odd, bounded."""
    x = torch.tensor([0.0, 10.0, 17.0, 25.0, -10.0])
    torch.testing.assert_close(poly_softcap(x, 10.0), torch.tensor([0.0, 10 * (1 - 1 / 3 + 1 / 15), 10.0, 10.0, -10 * (1 - 1 / 3 + 1 / 15)]))


def plain_loss(e, table, bias, y, cap, z_loss):
    nats, lse = token_nats(poly_softcap(e @ table.T + bias, cap), y)
    return nats.sum() + z_loss * lse.square().sum(), nats.sum()


@pytest.mark.parametrize(("spread", "n"), [(0.3, 37), (3.0, 37), (0.3, 2500)])
def test_chunked_loss_is_the_plain_one_with_every_gradient(spread, n):
    """Against autograd through the plain formula in float64, logits in the flat part of the softcap included."""
    torch.manual_seed(0)
    leaves = [(torch.randn(s) * spread).double().requires_grad_() for s in ((n, 24), (320, 24), (320,))]
    y = torch.randint(320, (n,))
    outputs = []
    for function in (ChunkedPolyLoss.apply, plain_loss):
        loss, nats = function(*leaves, y, 5.0, 1e-2)
        outputs.append((loss, nats, *torch.autograd.grad(loss * 0.7, leaves)))
    for ours, theirs in zip(*outputs, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_training_loss_is_forward_plus_z_loss():
    model = tiny_model()
    x = tokens(model)
    y = x.roll(-1, 1)
    loss, nats = training_loss(model, x, y, 0.0)
    torch.testing.assert_close(nats, model(x, y).sum())
    torch.testing.assert_close(loss, nats)
    lse = model.logits(model.hidden(x)).logsumexp(-1)
    torch.testing.assert_close(training_loss(model, x, y, 0.5)[0], nats + 0.5 * lse.square().sum())


@pytest.mark.parametrize("settings", [{}, {"softcap_type": "tanh"}, {"embed_dim": 0}, {"activation": "leaky_relu"}, {"fp_storage": "FP16"}])
def test_gradients_are_those_of_the_rounded_model(settings, monkeypatch):
    """Directional derivative of the plain loss, all weights replaced by their stored values, by finite differences in float64."""
    model = tiny_model(**settings)
    x = tokens(model)
    y = x.roll(-1, 1)
    training_loss(model, x, y, 1e-4)[0].backward()
    frozen = tiny_model(**settings).double().use(Ops())
    for p in frozen.parameters():
        p.data = p.half().double()  # controls; the others follow
    for ours, theirs in zip(model.modules(), frozen.modules(), strict=True):
        if hasattr(ours, "rounded"):
            theirs.weight.data, theirs.frozen = ours.rounded().double(), True
    direction = [torch.randn_like(p, dtype=torch.float64) for p in frozen.parameters()]
    monkeypatch.setattr(train_gpt, "compute_dtype", lambda *_: torch.float64)
    monkeypatch.setattr(train_gpt, "as_stored", lambda p: p)  # finite differences want a smooth function

    @torch.no_grad()
    def loss_at(step):
        for p, d in zip(frozen.parameters(), direction, strict=True):
            p.add_(step * d)
        logits = frozen.table(frozen.embed_out(frozen.hidden(x))) + frozen.vocab_bias
        nats, lse = token_nats(frozen.softcap(logits, frozen.cfg.logit_softcap), y)
        for p, d in zip(frozen.parameters(), direction, strict=True):
            p.sub_(step * d)
        return (nats.sum() + 1e-4 * lse.square().sum()).item()

    step = 1e-6
    expected = (loss_at(step) - loss_at(-step)) / (2 * step)
    actual = sum((p.grad.double() * d).sum() for p, d in zip(model.parameters(), direction, strict=True)).item()
    assert actual == pytest.approx(expected, rel=5e-3)


# ---- The tables: what a model is made of, and how it is computed


COMPUTED = [{}, {"softcap_type": "tanh", "embed_dim": 0}, {"precision": "bf16"}, {"tie_embeddings": 2, "bigram_hash": 1, "mtp_heads": 1},
            {"tie_embeddings": 0, "activation": "swiglu", "weight_quant": "none"}, {"act_quant": "int8", "input_norm": "all", "qkv_split": 1},
            {"act_quant": "fp8", "fp_storage": "FP8"}, {"weight_quant": "binary", "input_norm": "none", "gradient_checkpointing": 1},
            {"attn_proj_type": "tversky", "logit_head_type": "tversky", "refiner": 1}]  # fmt: skip


@pytest.mark.parametrize("settings", COMPUTED, ids=lambda settings: " ".join(settings) or "default")
def test_the_fast_operations_give_the_plain_loss_and_every_plain_gradient(settings):
    """On a CPU, up to the order of float32 sums; in bfloat16 weight gradients are rounded once more or less."""
    model = tiny_model(**settings)
    x = tokens(model)
    results, fast = [], model.ops
    assert fast == fast_ops(model.cfg, torch.device("cpu")) != Ops()
    for ops in (fast, Ops()):
        assert model.use(ops) is model and all(module.ops is ops for module in model.modules() if isinstance(module, Part))
        model.zero_grad()
        loss, nats = model.parts.loss(model, x, x.roll(-1, 1), 1e-2)
        loss.backward()
        with torch.no_grad():
            results.append((loss, nats, model(x, x.roll(-1, 1)), *(p.grad for p in model.parameters() if p.numel())))
    tolerance = 5e-3 if model.cfg.precision == "bf16" else 1e-5
    for i, (ours, plain) in enumerate(zip(*results, strict=True)):
        assert (ours - plain).norm() <= tolerance * plain.norm(), (i, ((ours - plain).norm() / plain.norm()).item())


def test_a_model_computes_plainly_until_it_is_told_otherwise():
    assert {module.ops for module in train_gpt.GPT(tiny_config()).modules() if isinstance(module, Part)} == {Ops()}


def test_the_default_is_made_of_the_defaults_own_parts():
    default = choose_parts(train_gpt.Config())
    assert default == Parts()
    changed = choose_parts(tiny_config(tie_embeddings=0, input_norm="all", activation="gelu", unet=0))
    assert {name for name in Parts._fields if getattr(changed, name) != getattr(default, name)} == {
        "linear", "qkv", "output", "attention_output", "mlp", "order", "table", "embed_out", "output_table"}  # fmt: skip


def test_joined_classes_are_made_once():
    """Otherwise every model would be compiled anew, and what looks at a class's methods would not know it again."""
    block, smeared, checkpointed = train_gpt.Block, train_gpt.Smeared, train_gpt.Checkpointed
    assert train_gpt.joined(block) is block
    both = train_gpt.joined(block, checkpointed, smeared)
    assert both is train_gpt.joined(block, checkpointed, smeared) is not train_gpt.joined(block, smeared, checkpointed)
    assert both.__mro__[1:3] == (checkpointed, smeared) and issubclass(both, block)
    first, second = (tiny_model(num_layers=1, smear=1, weight_quant="binary", xsa_last_n=1) for _ in range(2))
    assert [type(m) for m in first.modules()] == [type(m) for m in second.modules()]


def test_controls_enter_at_sixteen_bits():
    p = torch.nn.Parameter(torch.tensor([1.0001, 0.33333]))
    assert torch.equal(as_stored(p), p.detach().half().float())
    as_stored(p).sum().backward()
    assert torch.equal(p.grad, torch.ones(2))


def test_the_training_graph_compiles_to_one_graph_with_the_same_gradients():
    """fullgraph, static shapes: what a GPU run does; here with the aot_eager backend, which needs no C++ compiler."""
    model = tiny_model(num_layers=2)
    model.use(gpu_ops(model.cfg))
    x = tokens(model)
    y = x.roll(-1, 1)
    grads = []
    for function in (training_loss, torch.compile(training_loss, backend="aot_eager", fullgraph=True, dynamic=False)):
        model.zero_grad()
        function(model, x, y, 1e-4)[0].backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs)
