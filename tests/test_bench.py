"""bench/step.py on a CPU and a tiny model: what it counts, how it sorts time, and that its arms take turns."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import artifact
import pytest
import torch
from conftest import ROOT, TINY, launch, tiny_config, tiny_model
from kernel_groups import FORWARD, GROUPS, REGION, Shapes, read_trace
from parity import cases, compute
from parity import row as parity_row
from step import Arm, ArmFailed, sent_bytes, startup
from step_worker import flops_a_token, matmul_shapes
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import train_gpt
from train_gpt import Ops, zero_fraction

BEFORE_TRAINING_STEP = "bc9fca9"  # the last commit whose train() puts the step together itself


@pytest.mark.parametrize("settings", [{}, {"embed_dim": 0, "num_layers": 2, "mlp_mult": 3}])
def test_model_flops_are_pytorchs_count(settings):
    """All products of a training step; PyTorch's plain attention computes the masked half too, ours does not count it."""
    model = tiny_model(**settings).use(Ops())
    cfg, flops = model.cfg, flops_a_token(model, torch.device("cpu"))
    x = torch.randint(cfg.vocab_size, (2, cfg.train_seq_len))
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(x, x).sum().backward()
    assert flops["attention"] > 0
    assert counter.get_total_flops() == x.numel() * (sum(flops.values()) + flops["attention"])


def test_parity_compares_every_way_with_the_plain_one():
    """On a CPU in float32 all agree; a row names the parameters that differ most, also where one has no gradient."""
    cfg = tiny_config(precision="fp32")
    batch = torch.randint(320, (2, 2, 32), generator=torch.Generator().manual_seed(1)).unbind()
    plain, fast = (compute(cfg, "cpu", *batch, way) for way in ("plain", "fast"))
    assert plain.nats.mean().item() == pytest.approx(fast.mean.item(), rel=1e-6) and plain.nats.shape == (2, 32)
    torch.testing.assert_close(fast.nats, plain.nats, rtol=1e-5, atol=1e-5)
    assert plain.gradients.keys() == fast.gradients.keys()
    for name, g in plain.gradients.items():
        torch.testing.assert_close(fast.gradients[name], g, rtol=1e-4, atol=1e-7)
    plain.gradients["vocab_bias"].mul_(-2)
    line = parity_row(cfg, ("cpu", "fp32", "fast"), batch, plain._replace(nats=fast.nats, mean=fast.mean))
    assert line == "| cpu | fp32 | fast | 0.00e+00 | +0.00e+00 | -1.000000 vocab_bias | 0.5000 vocab_bias |"
    extra = fast._replace(gradients=fast.gradients | {"gone": torch.ones(1)})
    assert parity_row(cfg, ("cpu", "fp32", "fast"), batch, extra).endswith("| 0.000000 gone | 0.0000 gone |")


def test_parity_compares_the_compiled_graphs_too(monkeypatch):
    """The graph of the training loss and that of the score, as a run compiles them; faults of either show, and a compiler that
    gives up is a row."""
    cfg, asked = tiny_config(precision="fp32"), []
    batch = torch.randint(320, (2, 2, 32), generator=torch.Generator().manual_seed(1)).unbind()
    plain = compute(cfg, "cpu", *batch, "plain")
    changes = {"right": lambda results: results, "no gradient": lambda results: tuple(r.detach().requires_grad_() for r in results)}

    def compiled(function, *_):
        asked.append(function.__name__)
        change = changes[kind] if function is train_gpt.training_loss else lambda nats: nats + (kind == "score")
        return lambda *arguments: change(function(*arguments))

    changes["score"] = changes["right"]
    monkeypatch.setattr(train_gpt, "compiled", compiled)
    kind = "right"
    found = compute(cfg, "cpu", *batch, "compiled")
    assert asked == ["training_loss", "score_windows"]
    torch.testing.assert_close(found.nats, plain.nats, rtol=1e-5, atol=1e-5)
    kind = "score"
    assert (compute(cfg, "cpu", *batch, "compiled").nats - plain.nats).min() > 0.9
    kind = "no gradient"
    assert " 0.000000 " in parity_row(cfg, ("cpu", "fp32", "compiled"), batch, plain)
    monkeypatch.setattr(train_gpt, "compiled", lambda *_: 1 / 0)
    assert parity_row(cfg, ("cpu", "fp32", "compiled"), batch, plain) == "| cpu | fp32 | compiled | FAILED ZeroDivisionError: division by zero | | | |"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert ("cuda", "bf16", "compiled") in cases() and ("cuda", "fp32", "compiled") in cases()


def event(cat: str, name: str, ts: float, dur: float, tid: int = 1, **args: object) -> dict:
    return {"ph": "X", "pid": 0, "cat": cat, "name": name, "ts": ts, "dur": dur, "tid": tid, "args": args}


def kernel(name: str, ts: float, dur: float, correlation: int = 0, **args: object) -> dict:
    return event("kernel", name, ts, dur, tid=7, correlation=correlation, **args)


def test_kernels_of_a_gpu_trace_find_their_group(tmp_path):
    """A trace as a GPU's profile has it, written by hand: launches on two threads, kernels later on a stream, one overlap."""
    engine = "autograd::engine::evaluate_function: "
    up, down, tokens = [64, 256], [256, 64], 4096
    host = [
        event("user_annotation", REGION, 0, 1000), event("user_annotation", FORWARD, 10, 200),
        event("cpu_op", "aten::mm", 20, 10, **{"Input Dims": [[tokens, 64], up]}),
        event("cpu_op", "triton_poi_fused__scaled_dot_product_mm_mul_3", 40, 10, **{"Input Dims": [[tokens, 64], []]}),
        event("cpu_op", "aten::_scaled_dot_product_cudnn_attention", 60, 10),
        event("cpu_op", "triton_red_fused_add_7", 80, 10, **{"Input Dims": [[tokens, 1000], [tokens]]}),
        event("cpu_op", "aten::mm", 100, 10, **{"Input Dims": [[tokens, 64], [64, 32]]}),
        event("cpu_op", "train_gpt::relu2_product", 130, 10, **{"Input Dims": [[tokens, 64], [256, 64], []]}),
        event("cpu_op", "train_gpt::normed_rotated", 150, 10, **{"Input Dims": [[4, 1024, 6, 32], [1024, 16], [1024, 16], [4]]}),
        event("cpu_op", engine + "CompiledFunctionBackward", 220, 300, tid=2),
        event("cpu_op", "aten::mm", 230, 10, tid=2, **{"Input Dims": [[tokens, 64], up]}),
        event("cpu_op", "aten::mm", 250, 10, tid=2, **{"Input Dims": [[64, tokens], [tokens, 256]]}),
        event("cpu_op", "aten::_scaled_dot_product_cudnn_attention_backward", 270, 10, tid=2),
        event("cpu_op", "train_gpt::relu2_gradient", 310, 10, tid=2, **{"Input Dims": [[tokens, 64], up, [tokens, 256], []]}),
        event("cpu_op", engine + "torch::autograd::AccumulateGrad", 540, 30, tid=2),
        event("cpu_op", "aten::bmm", 600, 10, **{"Input Dims": [[3, 64, 256], [3, *down]]}),
        event("cpu_op", "c10d::_allgather_base_", 620, 10, **{"External id": 77}),
    ]  # fmt: skip
    kernels = [  # name, launched at, on thread, microseconds, group
        ("nvjet_tst_128x256", 25, 1, 1, "ternary GEMMs, forward"),
        ("triton_poi_fused__scaled_dot_product_mm_mul_3", 45, 1, 2, "elementwise, forward"),
        ("cudnn_generated_sdpa_fprop", 65, 1, 4, "attention, forward"),
        ("triton_red_fused_add_7", 85, 1, 8, "head, embedding and loss"),
        ("nvjet_tst_64x8", 105, 1, 16, "head, embedding and loss"),
        ("_up_mlp_kernel", 120, 1, 32, "ternary GEMMs, forward"),
        ("nvjet_tst_128x256", 235, 2, 64, "ternary GEMMs, input gradient"),
        ("nvjet_tst_splitK", 255, 2, 128, "ternary GEMMs, weight gradient"),
        ("cudnn_generated_sdpa_bprop", 275, 2, 256, "attention, backward"),
        ("triton_poi_fused_mul_9", 300, 2, 512, "elementwise, backward"),
        ("relu2_kernel", 135, 1, 0.5, "ternary GEMMs, forward"),
        ("qk_kernel", 155, 1, 0.25, "elementwise, forward"),
        ("relu2_gradient_kernel", 315, 2, 0.125, "ternary GEMMs, input gradient"),
        ("vectorized_elementwise_kernel", 550, 2, 1024, "gradient accumulation"),
        ("nvjet_batched", 605, 1, 2048, "optimizer"),
    ]
    expected, at = dict.fromkeys(GROUPS, 0.0), 2000.0
    for i, (name, launched, tid, duration, group) in enumerate(kernels, 1):
        host.append(event("cuda_driver", "cuLaunchKernelEx", launched, 2, tid=tid, correlation=i))
        host.append(kernel(name, at, duration, i))
        expected[group] += duration / 1000
        at += duration + 5
    # no launch in the trace: the operation's number decides; 100 of its 4096 microseconds are hidden behind the kernel before
    host.append(kernel("ncclDevKernel", at - 105, 4096, **{"External id": 77}))
    expected["communication"] += 3.996
    (tmp_path / "trace.json").write_text(json.dumps({"traceEvents": [{"ph": "M", "name": "process_name"}, *host]}))
    groups, wall = read_trace(tmp_path / "trace.json", Shapes(((256, 64), (64, 64)), ((32, 64),), 1000), gpu=True)
    assert groups == pytest.approx(expected) and wall == 1.0


def test_the_models_matrices_are_told_apart():
    model = tiny_model()
    assert matmul_shapes(model)._replace(projections=()) == Shapes(matmul_shapes(model).ternary, (), 320)
    assert set(matmul_shapes(model).ternary) == {(128, 64), (64, 64), (64, 128)}
    assert set(matmul_shapes(model).projections) == {(64, 24), (24, 64)}


def test_attention_flops_of_a_window_are_those_of_the_keys_it_holds():
    model = tiny_model(attention_window=8)
    pairs = sum(min(i + 0.5, 8) for i in range(32)) / 32  # half of a position's own key, as T / 2 has it
    assert flops_a_token(model, torch.device("cpu"))["attention"] == pytest.approx(12 * 64 * 3 * pairs)


def test_what_a_ring_sends():
    """Passed on by hand: 4 processes, 8 bytes. Reduce-scatter: 3 rounds of 2 bytes; all-gather: again; all-reduce: both."""
    assert [sent_bytes(what, 8, 4) for what in ("reduce-scatter of x", "all-gather", "all-reduce")] == [6, 6, 12]


@pytest.fixture(scope="module")
def old_checkout(tmp_path_factory: pytest.TempPathFactory) -> Path | None:
    """A folder with the train_gpt.py of BEFORE_TRAINING_STEP; None where the history does not reach that far back."""
    show = ["git", "-C", str(ROOT), "show", f"{BEFORE_TRAINING_STEP}:train_gpt.py"]
    found = subprocess.run(show, capture_output=True, check=False)
    if found.returncode:
        return None
    folder = tmp_path_factory.mktemp("old")
    (folder / "train_gpt.py").write_bytes(found.stdout)
    return folder


@pytest.fixture(scope="module")
def measured(data_dir, old_checkout, tmp_path_factory) -> tuple[str, dict]:
    """One run of everything: (what it prints, its JSON)."""
    folder = tmp_path_factory.mktemp("bench")
    own = {"ARTIFACT_CODEC": "auto", "FP_STORAGE": "FP8", "SMEAR_GATE": "0", "KEY_OFFSET": "0"}  # what the older checkout knows and has as its default
    env = TINY | own | {"NUM_LAYERS": "2", "DATA_PATH": str(data_dir), "TOKENIZER_PATH": str(data_dir / "tokenizer.model")}
    argv = [str(ROOT / "bench" / "step.py"), "--with", "MLP_MULT=3", "SEED=8", "--with", "MODEL_DIM=63", "--json", "bench.json"]
    argv += ["--against", str(old_checkout)] if old_checkout else []
    argv += "--step --eval --world 8 --rounds 2 --steps 2 --warmup 1 --at-once 3".split()
    argv += "--eval-windows 9 --plain-windows 9 --cpu-peak-size 128".split()
    done = launch(env, folder, argv=argv)
    assert done.returncode == 3, done.stderr  # one arm failed
    return done.stdout, json.loads((folder / "bench.json").read_text())


def test_arms_take_turns_and_a_bad_one_is_named(measured):
    out, found = measured
    arms = [found["arms"][name] for name in found["arms"]]
    orders = [arm["order"] for arm in arms]
    rounds = [sorted(turn) for turn in zip(*orders, strict=True)]
    assert rounds == [list(range(i * len(arms), (i + 1) * len(arms))) for i in range(2)]  # all of a round before any of the next
    assert orders[0][0] == 0 and orders[0][1] != len(arms)  # and another one first
    assert list(found["failed"]) == ["MODEL_DIM=63"] and "FAILED MODEL_DIM=63: MODEL_DIM=63: expected a multiple" in out
    assert "shards of DATA_PATH" in out


def test_figures_of_a_step_follow_from_its_time(measured):
    out, found = measured
    for name in ("this checkout", "MLP_MULT=3 SEED=8"):
        arm = found["arms"][name]
        assert (
            arm["ms"] > 0
            and arm["tokens_s"] == pytest.approx(256_000 / arm["ms"])
            and arm["unit_ms"] == pytest.approx(256 * arm["ms"])
        )
        assert arm["flops_s"] == pytest.approx(arm["tokens_s"] * sum(arm["flops"].values()))
        assert arm["share_of_peak"] == pytest.approx(arm["flops_s"] / arm["peak_flops_s"])
        assert f"| {name} | {arm['ms']:.2f} (" in out
    # 64 x 64 more weights in each of two matrices of two layers
    base, wider = (sum(found["arms"][name]["flops"].values()) for name in ("this checkout", "MLP_MULT=3 SEED=8"))
    assert wider - base == 6 * 64 * 64 * 2 * 2


def test_kernel_groups_add_up_to_the_wall_time(measured):
    out, found = measured
    for arm in found["arms"].values():
        groups, wall = arm["profile"]["groups"], arm["profile"]["wall_ms"]
        assert tuple(groups) == GROUPS and sum(groups.values()) == pytest.approx(wall, rel=1e-6)
        for name in GROUPS:
            assert groups[name] > 0 or name in ("communication", "other GEMMs"), name
        assert groups["communication"] == 0
    assert all(f"\n| {name} | " in out for name in (*GROUPS, "wall"))


def test_fast_evaluation_agrees_with_the_plain_one(measured):
    _, found = measured
    for arm in found["arms"].values():
        for stride, windows in (("32", 9), ("8", 9)):
            score = arm["evaluation"][stride]
            assert score["plain"]["windows"] == score["fast"]["windows"] == windows
            assert (
                score["plain"]["targets"] == 32 + 8 * int(stride)
                and score["plain"]["rows"] == 1
                and score["plain_batched"]["rows"] == 9
            )
            assert abs(score["plain"]["difference"]) < 1e-5 and abs(score["plain_batched"]["difference"]) < 1e-5
            assert (
                score["plain"]["bpb"] == pytest.approx(score["fast"]["bpb"], abs=1e-5)
                and score["fast"]["batches"] >= 1
                and score["fast"]["batch"] >= 8
            )


def test_an_older_checkout_is_measured_beside_this_one(measured, old_checkout):
    """Same seed, same drawn weights, same tokens: the first loss is the same mathematics in both."""
    if old_checkout is None:
        pytest.skip(f"commit {BEFORE_TRAINING_STEP} is not in this clone's history")
    _, found = measured
    old, new = found["arms"][str(old_checkout)], found["arms"]["this checkout"]
    assert old["first_loss"] == pytest.approx(new["first_loss"], abs=1e-4) and old["flops"] == new["flops"]
    assert old["ratio"][1] > 0 and "TrainingStep" not in (old_checkout / "train_gpt.py").read_text()


def test_communication_of_both_schemes_by_hand(measured, old_checkout):
    """8 processes, 2 layers. Then: gradients reduced whole, float32 updates of each shape gathered, padded to a multiple of 8.
    Now: all that is no matrix reduced whole; matrices scattered; of ternary ones 2 bits a code and 4 bytes a scale gathered."""
    _, found = measured
    shapes = {(64, 24): 1, (24, 64): 1, (128, 64): 4, (64, 64): 2, (64, 128): 2}  # qkv and up have one shape
    padded = {shape: 8 * -(-count // 8) * shape[0] * shape[1] for shape, count in shapes.items()}
    params, matrices = found["arms"]["this checkout"]["params"], sum(a * b * count for (a, b), count in shapes.items())
    ternary = sum(padded[shape] for shape in shapes if 24 not in shape)
    projections = sum(padded.values()) - ternary
    *rows, (_, total, sent) = found["arms"]["this checkout"]["communication"]
    assert total == 4 * (params - matrices + 1) + 4 * sum(padded.values()) + ternary // 4 + 4 * ternary // 32 + 4 * projections
    assert sent == pytest.approx(7 / 8 * (total + 4 * (params - matrices + 1))) and sum(row[2] for row in rows) == pytest.approx(
        sent
    )
    if old_checkout is not None:
        *_, (_, total, sent) = found["arms"][str(old_checkout)]["communication"]
        assert total == 4 * (params + 1) + 4 * sum(padded.values()) and sent == pytest.approx(7 / 8 * (total + 4 * (params + 1)))


FAKE_TRAINER = """
import os, pathlib, sys, time
cache = pathlib.Path(os.environ["TORCHINDUCTOR_CACHE_DIR"], "compiled")
if os.environ["DATA_PATH"].endswith("missing"):
    sys.exit("train_gpt.py: DATA_PATH: no shards")
if not cache.exists():
    time.sleep(0.5)
    cache.parent.mkdir(parents=True, exist_ok=True)
    cache.touch()
print("startup: compiled")
time.sleep(0.25)
print("step:1/3 loss:9.0000 t:250ms avg:250.0ms", flush=True)
time.sleep(60)
"""


def test_startup_is_measured_cold_then_warm(tmp_path):
    """A stand-in for the trainer: the first launch compiles for half a second; the step's own quarter is not start-up."""
    (tmp_path / "train_gpt.py").write_text(FAKE_TRAINER)
    cold, warm = startup(Arm("fake", tmp_path, {"DATA_PATH": "here"}), tmp_path)
    assert cold["s"] - warm["s"] == pytest.approx(0.5, abs=0.4) and warm["said"] == "startup: compiled" and warm["s"] >= 0
    with pytest.raises(ArmFailed, match="no shards"):
        startup(Arm("fake", tmp_path, {"DATA_PATH": "missing"}), tmp_path)


def test_bad_arguments_are_one_line(tmp_path):
    for argv, message in (
        (["--with", "MLP_MULT"], "--with MLP_MULT: expected KEY=VALUE"),
        (["--rounds", "0"], "--rounds 0: expected at least 1"),
    ):
        done = subprocess.run(
            [sys.executable, str(ROOT / "bench" / "step.py"), *argv],
            capture_output=True,
            text=True,
            check=False,
            cwd=tmp_path,
            env=os.environ,
        )
        assert done.returncode == 2 and message in done.stderr.splitlines()[-1]


STUB_PYTHON = """#!/usr/bin/env bash
echo "$*|$DATA_PATH|$VOCAB_SIZE|$MAX_WALLCLOCK_SECONDS" >>calls
case "$*" in
  -c*) exec REAL "$@" ;;
  *fast.env*) echo '{"half": 1}' >"${@: -1}"; exit 3 ;;
  bench/step.py*) echo '{"ms": 1}' >"${@: -1}" ;;
  bench/gemm.py) exit 9 ;;
  *--only*small) exit 4 ;;
  bench/arms.py*--only*) mkdir -p "$6/logs"
    printf 'import this\\npython:3.12 torch\\nstep:1\\n' >"$6/logs/pr640_seed42.txt" ;;
  bench/arms.py*--table) echo "| pr640 | 1.2346 |" ;;
  train_gpt.py) mkdir -p logs
    printf 'import this\\npython:3.12 torch\\nstep:1\\n' >"logs/$RUN_ID.txt"
    touch "$ARTIFACT_PATH"; echo 'result {"run_id": "'"$RUN_ID"'", "steps": 7, "val_bpb": 1.23456}' ;;
esac
"""


def test_gpu_queue_goes_on_after_a_failure_and_says_so(tmp_path):
    """Every stage with a stub in the interpreter's place: what it calls, what it leaves behind, how it ends."""
    for name in ("bench", "tools", "configs"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "python").write_text(STUB_PYTHON.replace("REAL", sys.executable))
    (tmp_path / "python").chmod(0o755)
    (tmp_path / "carried" / "tokenizers").mkdir(parents=True)
    (tmp_path / "carried" / "tokenizers" / "fineweb_8192_bpe.model").touch()
    env = {"PATH": os.environ["PATH"], "PYTHON": "./python", "CORPUS": "carried", "OUT": "out", "BASELINE": "old",
           "SYSTEMS": "pr640 small", "SYSTEM_SECONDS": "30", "LEVERS": "A=1 B=2\nC=3"}  # fmt: skip
    done = subprocess.run(
        ["bash", "bench/gpu_queue.sh", "all"], cwd=tmp_path, env=env, capture_output=True, text=True, check=False, timeout=60
    )
    report = done.stdout.rsplit("==== stage | part | outcome\n", 1)[1].splitlines()
    outcome = {tuple(line.split(" | ")[:2]): line.split(" | ")[2] for line in report}
    bad = {key: text for key, text in outcome.items() if not text.startswith("ok, ")}
    assert done.returncode == 1 and len(outcome) == 16, done.stderr
    assert [text.split(" after")[0] for text in bad.values()] == [
        "FAILED: code 3",
        "FAILED: code 9",
        "not run: no tokenizer of 1024 pieces, which most systems need",
        "FAILED: code 4",
    ]
    calls = (tmp_path / "calls").read_text().splitlines()
    assert calls[0].startswith("tools/prepare_data.py text carried/corpus_train_") and "--out data/queue_sp8192" in calls[0]
    assert any("--against old --with A=1 B=2 --with C=3 --json" in call for call in calls)
    assert "train_gpt.py|data/queue_sp8192||120" in calls
    full = [call for call in calls if call.startswith("bench/arms.py systems --data data/queue_sp ") and "--full" in call]
    assert ["--seconds 30 --only pr640|" in call for call in full] == [True, False]
    files = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert files == ["eval.txt", "figures.jsonl", "kernels.txt", "logs.txt", "parity.txt", "step.txt", "systems.txt", "train.txt"]
    records = [json.loads(line) for line in (tmp_path / "out" / "figures.jsonl").read_text().splitlines()]
    assert [(r["stage"], r["name"], r["outcome"]) for r in records] == [tuple(line.split(" | ")) for line in report]
    figures = [r for r in records if "figures" in r]
    assert [f["name"] for f in figures] == ["default", "pr640", "fast", "startup", "communication", "levers", "evaluation"]
    assert "import this" not in (tmp_path / "out" / "logs.txt").read_text()
    assert "pr640_seed42.txt\npython:3.12" in (tmp_path / "out" / "logs.txt").read_text()
    assert "| pr640 | 1.2346 |" in (tmp_path / "out" / "systems.txt").read_text()
    wrong = subprocess.run(
        ["bash", "bench/gpu_queue.sh", "steps"], cwd=tmp_path, env=env, capture_output=True, text=True, check=False
    )
    assert wrong.returncode == 2 and "steps: expected first or recipe alone, parity step" in wrong.stderr


# -------------------------------------------------------------------------------------------------- bench/artifact.py


@pytest.mark.parametrize("arguments, said", [
    (["--zero", "2"], "--zero 2: expected 0.0004 to 0.7316"),
    (["--zero", "0"], "--zero 0: expected 0.0004 to"),
    (["--zero", "0.3", "-1"], "--zero -1: expected"),
    (["--zero", "nan"], "--zero nan: expected"),
    (["--zero", "inf"], "--zero inf: expected"),
    (["--zero", "0.74"], "--zero 0.74: expected"),
    (["--zero", "x"], "--zero: invalid float value: 'x'"),
    (["--worst", "--zero", "0.3"], "--worst draws its own weights: expected no --zero"),
    (["--structure"], "--structure: expected --weights FILE"),
    (["--weights", "nope.pt"], "--weights nope.pt: no such file"),
    (["--only"], "unrecognized arguments: --only"),
])  # fmt: skip
def test_mistakes_of_the_artifact_table_are_one_line(arguments, said, capsys):
    with pytest.raises(SystemExit) as end:
        artifact.parse_arguments(arguments)
    error = capsys.readouterr().err
    assert end.value.code == 2 and said in error and error.count("\n") == 1


def artifact_table(monkeypatch, *arguments, **settings):
    for name, value in (TINY | settings).items():
        monkeypatch.setenv(name, value)
    return artifact.main(artifact.parse_arguments([*map(str, arguments), "--only-ours"]))


@pytest.mark.parametrize("share", [0.05, 0.369, 0.7])
def test_drawn_weights_have_the_share_of_zeros_that_is_asked_for(share):
    assert zero_fraction(artifact.drawn_model(tiny_config(), share)) == pytest.approx(share, abs=0.02)


def test_weights_of_a_file_are_this_models_and_finite(tmp_path, monkeypatch, capsys):
    good, state = tmp_path / "good.pt", tiny_model().state_dict()
    name = next(name for name, value in state.items() if value.dim() == 2)
    torch.save(state, good)
    bad = {"text": b"no tensors", "another.pt": tiny_model(num_layers=2).state_dict(), "list.pt": [1, 2],
           "nan.pt": state | {name: state[name] * float("nan")}}  # fmt: skip
    for name, content in bad.items():
        path = tmp_path / name
        path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
        assert artifact_table(monkeypatch, "--weights", path) == 2
        shown = capsys.readouterr()
        assert shown.out == "" and shown.err.startswith(f"artifact.py: error: --weights {path}: not ") and shown.err.count("\n") == 1
        assert "weights_only" not in shown.err  # PyTorch's advice is to load it unsafely
    assert artifact_table(monkeypatch, "--weights", good, "--zero", "0.0005") == 2  # no power within the range leaves so few
    assert "these weights come no nearer than 0." in capsys.readouterr().err
    assert artifact_table(monkeypatch, "--weights", good, "--structure") == 0 and "| nothing (a table" in capsys.readouterr().out


@pytest.mark.parametrize("settings, said", [
    ({"WEIGHT_QUANT": "none"}, "WEIGHT_QUANT=none: expected a model with ternary weights"),
    ({"MODEL_DIM": "63"}, "MODEL_DIM=63: expected a multiple"),
])  # fmt: skip
def test_settings_without_ternary_weights_are_one_line(settings, said, monkeypatch, capsys):
    assert artifact_table(monkeypatch, **settings) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_the_entropy_of_nothing_is_no_byte():
    nothing = torch.zeros(0, dtype=torch.uint8).numpy()
    assert artifact.entropy_bytes(nothing, nothing) == 0


def test_a_checkpoints_copy_and_write_are_timed(data_dir, monkeypatch):
    """A copy and a write that sleep show where they belong; the step's own config is back afterwards."""
    import step_worker

    for name, text in (TINY | {"DATA_PATH": str(data_dir), "WARMUP_STEPS": "0"}).items():
        monkeypatch.setenv(name, text)
    state, chunks = train_gpt.training_state, train_gpt.checkpoint_chunks
    monkeypatch.setattr(train_gpt, "training_state", lambda step: (time.sleep(0.2), state(step))[1])
    monkeypatch.setattr(train_gpt, "checkpoint_chunks", lambda *rest: (time.sleep(0.6), chunks(*rest))[1])
    worker = step_worker.Worker()
    found = worker.checkpoint(count=1, rounds=2)
    assert all(held >= 200 for held in found["held_ms"]) and all(ms >= 800 for ms in found["written_ms"])
    assert all(held <= ms - 500 for held, ms in zip(found["held_ms"], found["written_ms"], strict=True))  # the write holds nobody up
    assert len(found["extra_ms"]) == len(found["written_ms"]) == 2 and found["bytes"] > 10**5 and worker.step.cfg is worker.cfg
