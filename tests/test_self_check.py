"""Before the clock starts, what is fast is compared with what is plain: every fault is found, and only what has it is switched off."""

from __future__ import annotations

import json
import time
from types import SimpleNamespace

import pytest
import torch
from conftest import TINY, fresh_model, gpu_ops, on_processes, tiny_config, tokens

import train_gpt
from train_gpt import KERNELS, Config, Machine, Ops, SelfCheck, Sources, UserError, World, fast_ops, rounded_once, training_loss

CPU = torch.device("cpu")
FAST = [field for field in Ops._fields if getattr(fast_ops(tiny_config(), CPU), field) is not getattr(Ops(), field)]


def lines_of(log: list) -> train_gpt.Log:
    say = lambda line, console=True: log.append(line)  # noqa: ARG005
    say.view = train_gpt.View()
    return say


silent = lines_of([])


class Scaled(torch.autograd.Function):
    """x, and its gradient times a factor."""

    @staticmethod
    def forward(ctx, x, factor):
        ctx.factor = factor
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return g * ctx.factor, None


def first(results, change):
    """The first of an operation's results changed."""
    return (change(results[0]), *results[1:]) if isinstance(results, tuple) else change(results)


def broken(function, kind):
    """A fast operation with a fault."""

    def sabotaged(*arguments):
        if kind == "raises":
            raise RuntimeError("no kernel image is available for this device")
        if kind == "hangs":
            time.sleep(60)
        results = function(*arguments)
        changes = {"nan": lambda x: x * torch.nan, "factor": lambda x: x * 1.03, "gradient's factor": lambda x: Scaled.apply(x, 1.03),
                   "no gradient": lambda x: Scaled.apply(x, 0.0)}  # fmt: skip
        return first(results, changes[kind])

    return sabotaged


def test_a_cpu_has_a_fast_form_of_every_operation():
    assert FAST == [*Ops._fields] and sorted(field for fields in KERNELS.values() for field in fields) == sorted(FAST)


OPTIONS = [{}, {"precision": "bf16"}, {"act_quant": "fp8"}, {"weight_quant": "none"}, {"diff_attn": 1}, {"tie_embeddings": 2}, {"attention_window": 16},
           {"logit_head_type": "tversky"}, {"mtp_heads": 2}, {"qkv_split": 1, "bigram_hash": 1}, {"input_norm": "all"}, {"training_depth_recurrence": 2}]  # fmt: skip


@pytest.mark.parametrize("options", OPTIONS)
def test_what_is_right_passes(options):
    cfg, log = tiny_config(**options), []
    ops = fast_ops(cfg, CPU)
    checked = SelfCheck(cfg, World(), lines_of(log)).run(ops)
    assert checked.ops == ops and checked.cfg is cfg and not checked.report["kernels_off"] and not log
    fast = {name for name, fields in KERNELS.items() for field in fields if getattr(ops, field) is not getattr(Ops(), field)}
    assert checked.report["kernels"].keys() <= fast | {"compile", "compiled_score"}
    assert {"matmul", "compile", "compiled_score"} <= checked.report["kernels"].keys()


@pytest.mark.parametrize("kind", ["raises", "nan", "factor", "gradient's factor", "no gradient"])
@pytest.mark.parametrize("field", FAST)
def test_a_fault_is_found_and_switches_off_its_operation_alone(field, kind):
    if field == "nats" and "gradient" in kind:
        pytest.skip("a score has no gradient")
    cfg, log = tiny_config(), []
    ops = fast_ops(cfg, CPU)
    name = next(name for name, fields in KERNELS.items() if field in fields)
    checked = SelfCheck(cfg, World(), lines_of(log)).run(ops._replace(**{field: broken(getattr(ops, field), kind)}))
    assert checked.ops == train_gpt.without(ops, [name])
    assert [*checked.report["kernels_off"]] == [name] and len(log) == 1 and log[0].startswith(f"warning: self-check: {name} is computed plainly: ")
    assert kind not in ("factor", "gradient's factor") or "1.03" in log[0] or "times" in log[0]
    assert set(checked.cfg.kernels.split(",")) == KERNELS.keys() - {name}
    assert fast_ops(checked.cfg, CPU) == checked.ops  # as a reloaded model of this config computes


def test_three_percent_are_found_in_sixteen_bits_and_in_eight():
    for options in ({"precision": "bf16"}, {"act_quant": "fp8", "precision": "bf16"}):
        cfg, log = tiny_config(**options), []
        ops = gpu_ops(cfg)
        SelfCheck(cfg, World(), lines_of(log)).run(ops._replace(matmul=broken(ops.matmul, "factor")))
        assert len(log) == 1 and "1.0" in log[0], options


def test_an_operation_that_hangs_is_left_at_the_deadline(monkeypatch):
    monkeypatch.setattr(train_gpt, "DEADLINE_S", 0.5)
    cfg, log = tiny_config(), []
    ops = fast_ops(cfg, CPU)
    checked = SelfCheck(cfg, World(), lines_of(log)).run(ops._replace(mlp=broken(ops.mlp, "hangs")))
    assert [*checked.report["kernels_off"]] == ["mlp"] and "TimeoutError: not done after 0.5 s" in log[0]


@pytest.mark.parametrize("kind", ["raises", "nan", "gradient's factor", "no gradient"])
def test_a_graph_at_fault_is_left_out_and_the_operations_stay(kind, monkeypatch):
    """What stands in for torch.compile here breaks what it is given."""
    monkeypatch.setattr(train_gpt, "compiled", lambda function, cfg, _: broken(function, kind) if function is training_loss and cfg.compile_mode != "none" else function)
    cfg, log = tiny_config(), []
    ops = fast_ops(cfg, CPU)
    checked = SelfCheck(cfg, World(), lines_of(log)).run(ops)
    assert checked.ops == ops and checked.cfg.compile_mode == "none" and checked.cfg.kernels == "auto"
    assert [*checked.report["kernels_off"]] == ["compile"] and "compile runs uncompiled" in log[0]


def test_a_compiled_score_at_fault_is_found(monkeypatch):
    monkeypatch.setattr(train_gpt, "compiled_graph", lambda function, *_: broken(function, "factor") if function is train_gpt.score_windows else function)
    log = []
    checked = SelfCheck(tiny_config(), World(), lines_of(log)).run(fast_ops(tiny_config(), CPU))
    assert checked.cfg.compile_mode == "training" and "compiled_score runs uncompiled" in log[0] and "nats of a score" in log[0]
    assert [*checked.report["kernels_off"]] == ["compiled_score"] and checked.cfg.kernels == "auto"


def test_every_length_of_a_tail_is_scored(monkeypatch):
    """The chunked score's tail is the whole window, the sliding one's a stride."""
    cfg, tails = tiny_config(), []
    score = train_gpt.score_windows
    monkeypatch.setattr(train_gpt, "score_windows", lambda *args: tails.append(args[3]) or score(*args))
    SelfCheck(cfg, World(), silent).run(fast_ops(cfg, CPU))
    assert set(tails) == {cfg.train_seq_len, cfg.score_stride}


def test_compile_mode_training_leaves_the_score_alone_uncompiled(monkeypatch):
    monkeypatch.setattr(train_gpt, "compiles", lambda _: True)
    monkeypatch.setattr(train_gpt, "keep_compiled", lambda: None)
    monkeypatch.setattr(torch, "compile", lambda function, mode, **_: (function, mode))
    for mode, found in {"training": "default", "max-autotune": "max-autotune", "default": "default"}.items():
        cfg = tiny_config(compile_mode=mode)
        assert train_gpt.compiled(training_loss, cfg, World()) == (training_loss, found)
        assert (train_gpt.compiled(train_gpt.score_windows, cfg, World()) is train_gpt.score_windows) is (mode == "training")
        strict = train_gpt.compiled(train_gpt.score_windows, tiny_config(compile_mode=mode, kernels_strict=1), World())
        assert mode == "training" or strict == (train_gpt.score_windows, found)  # whose errors are errors
        assert mode == "training" or train_gpt.compiled_graph(train_gpt.score_windows, cfg, World()) == (train_gpt.score_windows, found)


def test_a_batch_that_cannot_be_compiled_is_scored_all_the_same(capsys):
    """The self-check sees one batch; a compiler may fail at another."""
    calls, memory = [], []

    def graph(x):
        calls.append(x)
        if memory:
            raise torch.OutOfMemoryError("out of memory")
        if len(x) == 3:
            raise TypeError("list indices must be integers\nand more")
        return x + 1

    score = train_gpt.surviving(graph, lambda x: x - 1)
    x = torch.zeros(4)
    assert score(x).tolist() == [1] * 4 and score(x[:3]).tolist() == [-1] * 3 and score(x).tolist() == [-1] * 4
    assert len(calls) == 2 and capsys.readouterr().err == "warning: the score runs uncompiled: TypeError: list indices must be integers\n"
    memory.append(True)
    with pytest.raises(torch.OutOfMemoryError):
        train_gpt.surviving(graph, lambda x: x - 1)(x)


@pytest.mark.parametrize("kind", ["raises", "nan", "factor", "no gradient"])
def test_where_flash_attention_3_fails_the_next_attention_is_checked_and_runs(kind):
    cfg, log = tiny_config(), []
    flash = broken(train_gpt.attend, kind)
    flash.__name__ = "flash"
    checked = SelfCheck(cfg, World(), lines_of(log)).run(fast_ops(cfg, CPU)._replace(attend=flash))
    assert checked.ops.attend is train_gpt.attend and [*checked.report["kernels_off"]] == ["FlashAttention-3"]
    assert len(log) == 1 and "FlashAttention-3 gives way to PyTorch's" in log[0] and checked.cfg.kernels == "auto"


def test_operations_that_are_wrong_together_only_are_all_left_out(monkeypatch):
    """Each alone is right; in the whole loss the gradient is not."""
    cfg, log = tiny_config(), []
    monkeypatch.setattr(SelfCheck, "operation", lambda *_: 0.0)
    ops = fast_ops(cfg, CPU)
    checked = SelfCheck(cfg, World(), lines_of(log)).run(ops._replace(mlp=broken(ops.mlp, "gradient's factor")))
    assert checked.ops == Ops() and checked.cfg.kernels == "off" and [*checked.report["kernels_off"]] == ["compile", "all"]


def test_the_losses_of_a_run_with_a_broken_kernel_are_those_of_the_plain_one(monkeypatch):
    cfg = tiny_config(kernels_strict=0)
    monkeypatch.setattr(train_gpt, "row_mlp", broken(train_gpt.row_mlp, "gradient's factor"))
    checked = SelfCheck(cfg, World(), silent).run(fast_ops(cfg, CPU))
    x, losses = tokens(fresh_model(cfg)), []
    for ops in (checked.ops, fast_ops(tiny_config(kernels="matmul,norm,qk,attention,loss,score"), CPU)):
        torch.manual_seed(0)
        model = train_gpt.GPT(cfg).use(ops)
        with rounded_once(model):
            losses.append(training_loss(model, x, x.roll(-1, 1), 1e-4)[0])
    assert torch.equal(*losses)


def test_the_check_leaves_no_trace_in_weights_or_gradients():
    """It draws a model of its own; the run's starts from its seed."""
    cfg = tiny_config()
    SelfCheck(cfg, World(), silent).run(fast_ops(cfg, CPU))
    torch.manual_seed(cfg.seed)
    a = fresh_model(cfg)
    torch.manual_seed(cfg.seed)
    b = fresh_model(cfg)
    assert all(torch.equal(p, q) and p.grad is None for p, q in zip(a.parameters(), b.parameters(), strict=True))


# ------------------------------------------------------------------------------------------------ the settings


@pytest.mark.parametrize("kernels", ["mlp, loss", "qkv", "auto,off", "", "loss,"])
def test_a_name_that_is_none_is_refused(kernels):
    with pytest.raises(UserError, match=f"KERNELS='{kernels}': expected auto, off or some of matmul,norm,qk,attention,mlp,loss,score"):
        Config.from_env(TINY | {"KERNELS": kernels})


def test_kernels_names_what_is_fast():
    assert fast_ops(tiny_config(kernels="off"), CPU) == Ops()
    ops = fast_ops(tiny_config(kernels="loss,mlp"), CPU)
    assert ops == Ops(loss=train_gpt.chunked_loss, mlp=train_gpt.row_mlp)


def check(cfg, log):
    """What a run computes with."""
    machine = Machine()
    machine.check(cfg, World(), log)
    return machine


def test_strict_is_an_error_of_one_line(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train_gpt, "row_mlp", broken(train_gpt.row_mlp, "factor"))
    with pytest.raises(UserError, match="KERNELS_STRICT=1: mlp: Differs: mlp, result 0 is 1.0300 times the plain one"):
        check(tiny_config(kernels_strict=1), silent)


def test_what_has_passed_is_not_checked_again(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    cfg, log = tiny_config(kernels_strict=1), []
    first, again = (check(cfg, lines_of(log)).report for _ in range(2))
    assert first == again and {"mlp", "compile"} <= first["kernels"].keys()
    assert log[0].startswith("self_check:") and "largest differences" in log[0] and log[3].startswith("self_check: passed before")
    assert log[1] == log[4] == "kernels:matmul,norm,qk,attention,mlp,loss,score attention:blocks"
    check(tiny_config(kernels_strict=1, num_layers=2), lines_of(log))
    assert "largest differences" in log[6]  # another model
    monkeypatch.setattr(train_gpt, "row_mlp", broken(train_gpt.row_mlp, "factor"))
    with pytest.raises(UserError):
        check(tiny_config(kernels_strict=1, num_layers=4), silent)
    assert len([*tmp_path.rglob("passed_*.json")]) == 2  # none of what failed


def test_a_cpu_checks_nothing_unless_asked():
    log = []
    machine = check(tiny_config(), lines_of(log))
    assert machine.ops == fast_ops(tiny_config(), CPU) and [line.partition(":")[0] for line in log] == ["kernels", "setup imports"]
    assert machine.report == {"kernels": {}, "kernels_off": {}, "attention": "blocks"}


def fails_on_one(world):
    cfg = tiny_config()
    ops = fast_ops(cfg, CPU)
    if world.rank == 1:
        ops = ops._replace(qk_norm_rope=broken(ops.qk_norm_rope, "factor"))
    return SelfCheck(cfg, world, silent).run(ops).report["kernels_off"]


def test_processes_switch_off_together_what_fails_on_one(tmp_path):
    assert on_processes(2, tmp_path, "test_self_check.fails_on_one") == [{"qk": "it failed on another process"}]


def test_the_report_is_in_the_result_line(data_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for key, text in (TINY | {"DATA_PATH": str(data_dir), "TOKENIZER_PATH": str(data_dir / "tokenizer.model"), "ITERATIONS": "2", "KERNELS": "loss,qk",
                              "SLIDING_EVAL": "0", "KERNELS_STRICT": "1"}).items():  # fmt: skip
        monkeypatch.setenv(key, text)
    assert train_gpt.run([]) == 0
    result = json.loads(capsys.readouterr().out.rpartition("result ")[2])
    assert result["kernels"].keys() == {"loss", "qk", "compile", "compiled_score"} and result["kernels_off"] == {} and result["attention"] == "PyTorch SDPA"


# ------------------------------------------------------------------------------------------------ memory


def saved_bytes_per_token(cfg):
    """What autograd keeps of a forward pass, parameters and their rounded copies left out."""
    model, kept = train_gpt.GPT(cfg).use(gpu_ops(cfg)), {}

    def pack(t):
        kept[t.untyped_storage().data_ptr()] = t  # which keeps the address its own
        return t

    x = tokens(model, 2)
    with rounded_once(model):
        own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            training_loss(model, x, x, 1e-4)
    return sum(t.untyped_storage().nbytes() for at, t in kept.items() if at not in own) / x.numel()


@pytest.mark.parametrize("sizes", [{}, {"num_layers": 6}, {"vocab_size": 2048}, {"mlp_mult": 4}, {"model_dim": 128}])
def test_the_estimate_of_memory_is_what_an_uncompiled_step_keeps(sizes):
    cfg = tiny_config(precision="bf16", train_seq_len=64, **sizes)
    assert 0.9 < train_gpt.bytes_per_token(cfg, CPU) / saved_bytes_per_token(cfg) < 1.5


@pytest.mark.parametrize(("gigabytes", "capability", "tokens"), [
    (79, (9, 0), 65_536), (31, (12, 0), 65_536), (23, (8, 9), 65_536), (23, (8, 6), 16_384), (14.6, (7, 5), 8_192), (11, (8, 9), 16_384), (2.5, (7, 5), 1024),
])  # fmt: skip
def test_the_micro_batch_is_what_a_gpus_memory_should_hold(gigabytes, capability, tokens, monkeypatch):
    """The default model on cards of today; one before 8.9 compiles nothing, and keeps what every operation reads."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (int(gigabytes * 1e9), int(80e9)))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *_: SimpleNamespace(major=capability[0]))
    world = World(device=torch.device("cuda"))
    monkeypatch.setattr(torch, "tensor", lambda values, **_: torch.Tensor(values))  # on no GPU
    assert Machine.fit(Config(), world, Sources.from_env({})).micro_batch_tokens == tokens
    said = {"MICRO_BATCH_TOKENS": "65536"}
    for env in (said, said | {"PRESET_SETTINGS": "MICRO_BATCH_TOKENS"}):  # the user's, or a preset's
        assert Machine.fit(Config(), world, Sources.from_env(env)).micro_batch_tokens == 65_536


def test_a_cpus_micro_batch_stays():
    cfg = tiny_config()
    assert Machine.fit(cfg, World(), Sources.from_env({})) is cfg
