"""What a CPU computes with (section 11): rows and blocks of queries a few at a time, micro-batches side by side. Against the plain
operations and autograd in float64."""

from __future__ import annotations

import functools
import threading

import pytest
import torch
from conftest import ROOT, fresh_model, launch, tiny_config, tiny_model, tokens

import train_gpt
from train_gpt import Adam, Gradients, Ops, World, threads_for


def both_ways(ours, plain, *shapes, tolerance=1e-10):
    """Outputs and gradients of two functions of float64 leaves, compared."""
    torch.manual_seed(0)
    leaves, results = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes], []
    for function in (ours, plain):
        outputs = function(*leaves)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        torch.manual_seed(1)
        grads = torch.autograd.grad(outputs, leaves, [torch.randn(o.shape, dtype=o.dtype) for o in outputs])
        results.append((*outputs, *grads))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def test_the_norm_is_rms_norm():
    both_ways(train_gpt.RowNorm.apply, train_gpt.rms_norm, (3, 5, 48))


@pytest.mark.parametrize(("heads", "kv_heads", "length", "channels"), [(4, 2, 33, 8), (3, 1, 16, 16), (2, 2, 1, 4)])
def test_heads_are_normalized_and_rotated_as_plainly(heads, kv_heads, length, channels):
    angle = torch.randn(40, 1, channels // 2, dtype=torch.float64)  # more positions than the sequence has
    ours, plain = (
        lambda qkv, gain, f=f: f(qkv, gain, angle.cos(), angle.sin()) for f in (train_gpt.RowQKNormRope.apply, train_gpt.qk_norm_rope)
    )
    both_ways(ours, plain, (2, length, heads + 2 * kv_heads, channels), (heads,))


@pytest.mark.parametrize("scores", [1, 2**15, 2**19], ids=["a head at a time", "some", "all"])
@pytest.mark.parametrize(("heads", "kv_heads", "length", "channels"), [(4, 2, 150, 8), (3, 1, 64, 16), (2, 2, 65, 4), (6, 2, 7, 8)])
def test_attention_is_pytorchs(monkeypatch, scores, heads, kv_heads, length, channels):
    """Blocks of 64 queries: one, whole ones, and a rest; chunks of the batch that leave a rest too."""
    monkeypatch.setattr(train_gpt, "SCORES", scores)
    calls = []
    monkeypatch.setattr(train_gpt.BlockAttention, "apply", lambda *a, f=train_gpt.BlockAttention.apply: calls.append(1) or f(*a))
    both_ways(train_gpt.block_attend, train_gpt.attend, (5, length, heads, channels), *[(5, length, kv_heads, channels)] * 2)
    assert calls


def test_attention_falls_back_where_an_exponential_could_overflow_or_memory_would_not_do(monkeypatch):
    calls = []
    monkeypatch.setattr(train_gpt.BlockAttention, "apply", lambda *_: calls.append(1))
    q, k, v = (torch.ones(1, 8, 2, 4) for _ in range(3))  # scores: |q| |k| / sqrt(C) = gain * 2
    for gain, taken in ((29.0, 1), (31.0, 0), (float("nan"), 0), (float("inf"), 0)):
        calls.clear()
        ours = train_gpt.block_attend(q * gain, k, v)
        assert len(calls) == taken and (taken or torch.equal(ours.isnan(), train_gpt.attend(q * gain, k, v).isnan()))
    calls.clear()
    wide = torch.ones(1, 8, 2, 6)
    mask = torch.ones(8, 8, dtype=torch.bool).tril()
    train_gpt.block_attend(q, k, wide), train_gpt.block_attend(q, k, v, mask), train_gpt.block_attend(q[:, -3:], k, v)
    with torch.no_grad():
        train_gpt.block_attend(q, k, v)
    monkeypatch.setattr(train_gpt, "KEPT_SCORES", 127)  # of 2 x 8 x 8
    train_gpt.block_attend(q, k, v)
    assert not calls
    monkeypatch.setattr(train_gpt, "KEPT_SCORES", 128)
    train_gpt.block_attend(q, k, v)
    assert calls


@pytest.mark.parametrize("rows", [1, 7, 256])
def test_the_mlp_is_relu2_and_its_norm(monkeypatch, rows):
    """Rows in equal parts, with a rest, and at once."""
    monkeypatch.setattr(train_gpt, "ROWS", rows)

    def plain(x, up, down):
        return train_gpt.rms_norm(torch.relu(x @ up.T).square()) @ down.T

    both_ways(lambda x, up, down: train_gpt.RowMLP.apply(x, up, down, up.detach(), down.detach()), plain, (20, 12), (30, 12), (12, 30))


@pytest.mark.parametrize("spread", [0.3, 40.0], ids=["inside the softcap", "clipped"])
def test_nats_at_several_temperatures(monkeypatch, spread):
    monkeypatch.setattr(train_gpt, "LOGITS", 320 * 16)  # 16 rows at a time of 2 x 25
    model, temperatures = tiny_model(), torch.tensor([1.0, 0.85, 1.3])
    h, y = torch.randn(2, 25, 64) * spread, torch.randint(320, (2, 25))
    with torch.no_grad():
        assert (model.logits(h).abs() == model.cfg.logit_softcap).any() == (spread > 1)
        ours, plain = (nats(model, h, y, temperatures) for nats in (train_gpt.chunked_nats, train_gpt.target_nats))
    torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------------------------------------ threads


@pytest.fixture
def two_threads():
    torch.set_num_threads(2)
    train_gpt.thread_pool.cache_clear()
    yield
    torch.set_num_threads(1)
    train_gpt.thread_pool.cache_clear()


@pytest.mark.usefixtures("two_threads")
def test_pieces_are_computed_side_by_side_and_come_back_in_order():
    meet, seen = threading.Barrier(2, timeout=20), set()

    def piece(i):
        if i < 2:
            meet.wait()  # only if both run at once
        seen.add((threading.get_ident(), torch.get_num_threads()))
        return i * i

    pool = threads_for(torch.device("cpu"), 7)
    assert list(pool.map(piece, range(7))) == [i * i for i in range(7)]
    assert len(seen) == 2 and {threads for _, threads in seen} == {1} and torch.get_num_threads() == 2
    assert threads_for(torch.device("cpu"), 2) is pool  # made once
    assert threads_for(torch.device("cpu"), 1) is threads_for(torch.device("cuda"), 7) is None
    torch.set_num_threads(5)
    assert set(threads_for(torch.device("cpu"), 2).map(lambda _: torch.get_num_threads(), range(2))) == {2}


@pytest.mark.usefixtures("two_threads")
def test_a_steps_gradients_do_not_depend_on_the_threads():
    """To the last bit: each micro-batch is computed by one thread, and sums are taken in order."""
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        model = tiny_model()
        grads, x = Gradients(model, World()), tokens(model, batch=4)
        with train_gpt.rounded_once(model):
            grads.compute(functools.partial(train_gpt.training_loss, model, z_loss=1e-4), x, x.roll(-1, 1), 4)
        results.append([grads.loss.clone(), *(p.grad.clone() for p in model.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.usefixtures("two_threads")
def test_a_score_does_not_depend_on_the_threads():
    model, scores = tiny_model(), []
    val = train_gpt.ValidationSet(torch.randint(320, (600,)), num_bytes=999)
    for threads in (1, 2):
        torch.set_num_threads(threads)
        scores.append([train_gpt.evaluate(model, val, tiny_config(micro_batch_tokens=64), World(), stride) for stride in (8, 32)])
    assert scores[0] == scores[1]


# ------------------------------------------------------------------------------------------------ start-up


def test_adam_is_pytorchs_adamw():
    cfg, torch_state = tiny_config(beta1=0.8, beta2=0.9, adam_eps=1e-6), torch.manual_seed(0)
    ours = [torch.nn.Parameter(torch.randn(n)) for n in (5, 7)]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    optimizer = Adam(ours, cfg, 0.02, weight_decay=0.1)
    reference = torch.optim.AdamW(theirs, lr=0.02, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.1)
    for _ in range(4):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.randn(p.shape, generator=torch_state)
            q.grad = p.grad.clone()
        optimizer.step(), reference.step()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q)


def test_a_step_on_a_cpu_loads_no_compiler():
    """torch.compile takes two seconds to import; PyTorch loads it behind the back of whoever makes a torch.optim.Optimizer."""
    code = (
        "import sys, torch, train_gpt as t; from conftest import *; cfg = tiny_config(); model = fresh_model(cfg)\n"
        "with t.rounded_once(model):\n"
        "    step = t.TrainingStep(model, cfg, t.World()); x = tokens(model, 8); step.take(x, x)\n"
        "sys.exit('torch._dynamo' in sys.modules)"
    )
    assert launch({"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}, ROOT, argv=["-c", code]).returncode == 0


def test_a_fresh_model_takes_what_the_cpu_has():
    assert fresh_model(tiny_config()).ops != Ops()
