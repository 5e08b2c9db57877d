"""One arm of bench/step.py: a process that holds one checkout's model and measures what it is told to.

    python bench/step_worker.py FOLDER      FOLDER holds the train_gpt.py to measure; settings come from the environment

A line of JSON in ({"do": name, ...arguments}), a line of JSON out, {"error": text} where it fails. The end of the input
ends it. What libraries print goes to stderr. `do` is a method of Worker; each says what it answers.

Works with checkouts from bc9fca9 on: one without `TrainingStep` gets its step put together here as its train() did.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import inspect
import json
import math
import os
import sys
import tempfile
import time
import traceback
import types
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))

from command_line import OneLineParser  # noqa: E402


def parse_folder() -> Path:
    """The checkout to measure; -h and mistakes are answered before PyTorch is imported, which takes seconds."""
    parser = OneLineParser(__doc__)
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    folder = parser.parse_args().folder
    if not (folder / "train_gpt.py").is_file():
        parser.error(f"{folder}: expected a folder with train_gpt.py in it")
    return folder


sys.path.insert(0, str(parse_folder() if __name__ == "__main__" else ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from kernel_groups import FORWARD, REGION, Shapes, read_trace  # noqa: E402
from torch.profiler import ProfilerActivity, profile, record_function  # noqa: E402

import train_gpt as t  # noqa: E402

SYNTHETIC_TOKENS = 1 << 22
TEMPERATURE = 0.95  # of the evaluated model, as calibration would set it: not 1, so that the sliding score's division takes part


def synthetic_data(cfg: t.Config, folder: Path) -> t.Config:
    """Shards of Zipf-distributed tokens; workers that write at the same time write the same bytes."""
    rng = np.random.default_rng(0)
    weights = 1 / (np.arange(cfg.vocab_size) + 2.7)
    for split in ("train", "val"):
        tokens = rng.permutation(cfg.vocab_size)[rng.choice(cfg.vocab_size, SYNTHETIC_TOKENS, p=weights / weights.sum())]
        header = np.zeros(256, dtype="<i4")
        header[:3] = t.SHARD_MAGIC, t.SHARD_VERSION, len(tokens)
        t.write_whole(folder / f"fineweb_{split}_000000.bin", header.tobytes() + tokens.astype("<u2").tobytes())
    return dataclasses.replace(cfg, data_path=str(folder))


class OldStep:
    """What a checkout before `TrainingStep` ran as a step: its train()'s take_step."""

    def __init__(self, model: t.GPT, cfg: t.Config, world: t.World) -> None:
        self.cfg, self.model, self.micro_batches = cfg, model, t.batch_layout(cfg, world.size)[0]
        self.optimizers, self.grads = t.build_optimizers(model, cfg, world), t.Gradients(model, world)
        self.loss_function = t.compiled(t.training_loss, cfg, world)

    def take(self, x: torch.Tensor, y: torch.Tensor) -> None:
        self.grads.compute(lambda *micro: self.loss_function(self.model, *micro, self.cfg.z_loss), x, y, self.micro_batches)
        if self.cfg.grad_clip_norm:
            self.grads.clip(self.cfg.grad_clip_norm)
        for opt in self.optimizers:
            opt.step()


def fast(model: t.GPT, cfg: t.Config, device: torch.device) -> t.GPT:
    """The model on the device, computing as main() lets it; older checkouts decide at each call."""
    return model.to(device).use(t.fast_ops(cfg, device)) if hasattr(t, "fast_ops") else model.to(device)


def annotated(function: Callable) -> Callable:
    """The function within the annotation by which the profile knows the forward pass."""

    @functools.wraps(function)
    def call(*args, **kwargs):
        with record_function(FORWARD):
            return function(*args, **kwargs)

    return call


class Marks:
    """Milliseconds between moments of the device's timeline (events on a GPU: no waiting in between)."""

    def __init__(self, device: torch.device) -> None:
        self._gpu, self._marks = device.type == "cuda", []

    def set(self) -> None:
        self._marks.append(torch.cuda.Event(enable_timing=True) if self._gpu else time.perf_counter())
        if self._gpu:
            self._marks[-1].record()

    def between(self) -> list[float]:
        if self._gpu:
            torch.cuda.synchronize()
            return [a.elapsed_time(b) for a, b in zip(self._marks, self._marks[1:], strict=False)]
        return [1000 * (b - a) for a, b in zip(self._marks, self._marks[1:], strict=False)]


def compiled_graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"] if "torch._dynamo" in sys.modules else 0


@torch.no_grad()
def module_calls(model: t.GPT, device: torch.device) -> collections.Counter:
    """How often a training step's forward pass, plain, calls each module: blocks more than once where depth is recurrent."""
    calls: collections.Counter = collections.Counter()
    hooks = [module.register_forward_hook(lambda module, *_: calls.update([module])) for module in model.modules()]
    training = {"training": True} if "training" in inspect.signature(model.hidden).parameters else {}
    model.logits(model.hidden(torch.zeros(1, model.cfg.train_seq_len, dtype=torch.int64, device=device), **training))
    for hook in hooks:
        hook.remove()
    return calls


def flops_a_token(model: t.GPT, device: torch.device) -> dict[str, float]:
    """Model FLOPs of forward and backward for a token, by structure: what the mathematics needs, whatever a kernel does.

    6 a weight of every matrix that multiplies the token (2 forward, 2 for each of its gradients; a table counts as the head,
    not for its lookup, which multiplies nothing). Causal attention: 12 * C * H a key seen (two products forward, four back),
    T / 2 keys on average, or W - W^2 / 2T where they end W positions back. Not counted: what options add to the loss alone,
    and what they multiply without a `QuantizedLinear`.
    """
    cfg, calls = model.cfg, module_calls(model, device)
    window = getattr(cfg, "attention_window", 0) or cfg.train_seq_len
    keys, found = window - window**2 / 2 / cfg.train_seq_len, dict.fromkeys(("blocks", "head and projections", "attention"), 0.0)
    inner = {module: calls[block] for block in model.blocks for module in block.modules()}
    for module in model.modules():
        if isinstance(module, t.QuantizedLinear):  # a fused block does not call its matrices
            part, uses = ("blocks", inner[module]) if module in inner else ("head and projections", calls[module])
            found[part] += 6.0 * module.weight.numel() * uses
        elif isinstance(module, t.Attention):
            found["attention"] += 12.0 * cfg.head_dim * cfg.num_heads * keys * inner[module]
    return found


def matmul_shapes(model: t.GPT) -> Shapes:
    owners = [
        (m.role.storage == "ternary", tuple(p.shape))
        for _, m, p, _ in t.parameter_owners(model)
        if isinstance(m, t.QuantizedLinear)
    ]
    small = {shape for ternary, shape in owners if not ternary and model.cfg.vocab_size not in shape}
    return Shapes(tuple({shape for ternary, shape in owners if ternary}), tuple(small), model.cfg.vocab_size)


def old_communication(step: OldStep, world_size: int) -> list[tuple[str, int]]:
    """(what, bytes of the whole) as `TrainingStep.communication` has it, of a step before it: an all-reduce, a gather a shape."""
    flat = step.grads._flat
    rows = [(f"all-reduce of gradients ({flat.numel():,} x {str(flat.dtype)[6:]})", flat.numel() * flat.element_size())]
    for opt in step.optimizers:
        for group in opt.param_groups if isinstance(opt, t.NeoMuon) else ():
            params = group["params"]
            share, p = -(-len(params) // world_size), params[0]
            what = f"all-gather of updates, {len(params)} of {' x '.join(map(str, p.shape))} ({str(p.dtype)[6:]})"
            rows.append((what, world_size * share * p.numel() * p.element_size()))
    return rows


@contextlib.contextmanager
def counted_batches() -> Iterator[list[int]]:
    """The number of windows of every batch that `evaluate` scores."""
    sizes, original = [], t.compiled

    def compiled(function: Callable, *args: object) -> Callable:
        ready = original(function, *args)

        def call(model: t.GPT, x: torch.Tensor, *rest: object) -> torch.Tensor:
            sizes.append(len(x))
            return ready(model, x, *rest)

        return call

    t.compiled = compiled
    try:
        yield sizes
    finally:
        t.compiled = original


@torch.no_grad()
def plain_nats(model: t.GPT, val: t.ValidationSet, window: tuple[int, int], rows: int) -> float:
    """Nats of every target of the split: uncompiled, `rows` windows (length, stride) at a time, all logits of each."""
    seq_len, stride = window
    temperature = torch.ones_like(model.temperature) if stride == model.cfg.train_seq_len else model.temperature
    total = torch.zeros((), dtype=torch.float64, device=val.tokens.device)
    plan = list(zip(*(a.tolist() for a in t.window_plan(val.num_targets, seq_len, stride)), strict=True))
    for i in range(0, len(plan), rows):
        windows = torch.stack([val.tokens[start : start + seq_len + 1] for start, _ in plan[i : i + rows]])
        nats = t.token_nats(model.logits(model.hidden(windows[:, :-1])) / temperature, windows[:, 1:])[0].double()
        for row, (_, first) in zip(nats, plan[i : i + rows], strict=True):
            total += row[first:].sum()
    return total.item()


class Worker:
    """Answers the requests; built lazily, so that a request pays only for what it needs."""

    def __init__(self) -> None:
        t.keep_freed_memory()
        self.cfg, self.world = t.Config.from_env(), t.World.from_env()
        self.device, self.synthetic, self._stack = self.world.device, False, contextlib.ExitStack()
        wanted = [t.kernels_wanted(self.cfg)] if hasattr(t, "kernels_wanted") else []  # an older version has no KERNELS
        self._stack.enter_context(t.attention_backends(self.device, *wanted))
        self._taken = 0

    def start(self, synthetic: str) -> dict:
        """What is measured. `synthetic`: a folder for made-up tokens, used where DATA_PATH holds no shards."""
        if not list(Path(self.cfg.data_path).glob("fineweb_train_*.bin")):
            self.synthetic = True
            self.cfg = synthetic_data(self.cfg, Path(synthetic) / f"sp{self.cfg.vocab_size}")
        dtype = t.compute_dtype(self.cfg.precision, self.device)
        return {"torch": torch.__version__, "device": self.device.type, "gpu": t.gpu_name(self.world), "dtype": str(dtype)[6:],
                "threads": torch.get_num_threads(), "step_tokens": self.cfg.train_batch_tokens, "seq_len": self.cfg.train_seq_len,
                "stride": getattr(self.cfg, "score_stride", self.cfg.sliding_eval_stride),
                "window": self.window(0), "synthetic": self.synthetic,
                "attention": "FlashAttention-3" if t.flash_attention_3(self.cfg) else "PyTorch SDPA"}  # fmt: skip

    def window(self, stride: int) -> int:
        """Targets of an evaluation window."""
        return (
            self.cfg.train_seq_len
            if stride == self.cfg.train_seq_len
            else getattr(self.cfg, "score_window", self.cfg.train_seq_len)
        )

    @functools.cached_property
    def model(self) -> t.GPT:
        from parity import trained_looking_model  # now that train_gpt is loaded: alone it would take the one beside it

        return fast(trained_looking_model(self.cfg), self.cfg, self.device)

    @functools.cached_property
    def step(self) -> OldStep:
        if not hasattr(t, "TrainingStep"):
            return OldStep(self.model, self.cfg, self.world)
        self._stack.enter_context(t.rounded_once(self.model))
        return t.TrainingStep(self.model, self.cfg, self.world)

    @functools.cached_property
    def batches(self) -> t.Batches:
        return t.Batches(t.TokenStream(self.cfg, "train"), self.world)

    def describe(self) -> dict:
        """Counts by structure: parameters, FLOPs a token by part, micro-batches of a step."""
        flops = flops_a_token(self.model, self.device)
        return {"params": t.count_parameters(self.model)[0], "flops": flops, "zero_frac": t.zero_fraction(self.model),
                "micro_batches": t.batch_layout(self.cfg, 1)[0]}  # fmt: skip

    def peak(self, size: int, count: int) -> dict:
        """FLOP/s of a square matrix product of random numbers: the best of `count`, after as many to warm up."""
        dtype = t.compute_dtype(self.cfg.precision, self.device)
        a, b = (torch.randn(size, size, device=self.device).to(dtype) for _ in range(2))
        for _ in range(count):
            a @ b
        marks = Marks(self.device)
        for _ in range(count + 1):
            marks.set()
            a @ b
        return {"flops_s": 2 * size**3 / (min(marks.between()) / 1000)}

    def stage(self) -> t.Stage:
        """The schedule at the start of the budget; what options make of it is a hook's, in older checkouts the schedule's own."""
        stage = t.schedule(self.cfg, self._taken, 0.0)
        for hook in getattr(self.step, "hooks", ()):
            stage = hook.stage(stage, self._taken, 0.0)
        return stage

    def steps(self, count: int) -> dict:
        """Milliseconds of each of `count` training steps, as in the loop: next batch, step, loss of the step before."""
        sequences, graphs = self.cfg.train_batch_tokens // self.cfg.train_seq_len, compiled_graphs()
        marks, losses, pending = Marks(self.device), [], None
        marks.set()
        for _ in range(count):
            t.apply_stage(self.step.optimizers, self.stage())
            self.step.take(*self.batches.next(sequences, self.cfg.train_seq_len))
            self._taken += 1
            pending, finished = t.Reading(self.step.grads.loss), pending
            if finished:
                losses.append(finished.get())
            marks.set()
        losses.append(pending.get())
        times = marks.between()
        if not all(map(math.isfinite, losses)):
            raise t.UserError(f"training diverged: losses {losses} at step {self._taken}")
        gib = torch.cuda.max_memory_allocated() / 2**30 if self.device.type == "cuda" else None
        return {"ms": times, "losses": losses, "memory_gib": gib, "recompiled": compiled_graphs() - graphs}

    def profile(self, count: int) -> dict:
        """Milliseconds of a step by kernel group, and of its wall."""
        plain, activities, gpu = self.step.loss_function, [ProfilerActivity.CPU], self.device.type == "cuda"
        self.steps(1)
        self.step.loss_function = annotated(plain)
        if gpu:
            activities.append(ProfilerActivity.CUDA)
        try:
            with profile(activities=activities, record_shapes=True) as prof, record_function(REGION):
                self.steps(count)
        finally:
            self.step.loss_function = plain
        with tempfile.TemporaryDirectory() as folder:
            prof.export_chrome_trace(str(Path(folder) / "trace.json"))
            groups, wall = read_trace(Path(folder) / "trace.json", matmul_shapes(self.model), gpu)
        return {"groups": {name: ms / count for name, ms in groups.items()}, "wall_ms": wall / count}

    def checkpoint(self, count: int, rounds: int) -> dict:
        """Of each of `rounds` checkpoints: ms that the copy holds the step up, ms that `count` steps from it on, in which it is
        written, take beyond as many before it, the write's own ms, and the file's bytes."""
        with tempfile.TemporaryDirectory() as folder:
            self.step.cfg = dataclasses.replace(self.cfg, checkpoint_every="60s", checkpoint_dir=folder, tokenizer_path=t.__file__)
            hook = t.Checkpoints(self.step)
            loop = types.SimpleNamespace(clock=t.Clock(self.world), batches=self.batches, step=self._taken, log=lambda _: None,
                                         report=types.SimpleNamespace(first_losses=[]), read_losses=lambda _: None)  # fmt: skip
            hook.begin(loop)
            found = {"held_ms": [], "extra_ms": [], "written_ms": [], "bytes": 0}
            for loop.step in range(1, rounds + 1):
                before, start = sum(self.steps(count)["ms"]), time.perf_counter()
                hook.save()
                held = 1000 * (time.perf_counter() - start)
                hook.writing.add_done_callback(lambda _, start=start: found["written_ms"].append(1000 * (time.perf_counter() - start)))
                after = sum(self.steps(count)["ms"])
                hook.finish_writing()
                found["held_ms"].append(held)
                found["extra_ms"].append(held + after - before)
            hook.finish()
            found["bytes"] = max(path.stat().st_size for path in Path(folder).glob("*.ckpt"))
            self.step.cfg = self.cfg
        return found

    def communication(self, world_size: int) -> dict:
        """[what, bytes of the whole] of every collective of a step at `world_size` processes, from the step's own buffers."""
        ask = getattr(self.step, "communication", None)
        rows = ask(world_size) if ask else old_communication(self.step, world_size)
        return {"rows": [[what, size] for what, size in rows]}

    @functools.cached_property
    def loaded(self) -> t.GPT:
        """The model as evaluation gets it: from its bytes."""
        self.model.temperature.fill_(TEMPERATURE)
        model = t.load_artifact(t.save_artifact(self.model, self.cfg), self.cfg.precision)[0]
        fast(model, self.cfg, self.device)
        if hasattr(t, "rounded_once"):
            self._stack.enter_context(t.rounded_once(model))
        return model

    @functools.cache  # noqa: B019 (the worker lives as long as the process)
    def validation(self, tokens: int) -> t.ValidationSet:
        """The first tokens of the split; each made-up token counts as one byte."""
        cfg = dataclasses.replace(self.cfg, val_max_tokens=tokens)
        if not self.synthetic:
            return t.ValidationSet.load(cfg, self.world)
        ids = torch.from_numpy(t.TokenStream(cfg, "val").read(0, tokens + 1).astype(np.int64))
        return t.ValidationSet(ids.to(self.device), tokens)

    def _timed(self, score: Callable[[], float]) -> tuple[float, float]:
        clock = t.Clock(self.world)
        nats = score()
        return nats, clock.finish()

    def evaluate(self, stride: int, tokens: int) -> dict:
        """The fast path on the first `tokens` of the validation split: seconds, windows, windows a batch, nats, bits per byte.

        `batch` and `batches` are those of the compiled function: some versions score the first window alone, without it.
        """
        model, val = self.loaded, self.validation(tokens)
        with counted_batches() as sizes:
            (nats, bpb), seconds = self._timed(lambda: t.evaluate(model, val, self.cfg, self.world, self.asked(stride)))
        windows = len(t.window_plan(val.num_targets, self.window(stride), stride)[0])
        return {"s": seconds, "windows": windows, "targets": val.num_targets, "batch": max(sizes, default=0),
                "batches": len(sizes), "nats": nats, "bpb": bpb}  # fmt: skip

    def asked(self, stride: int) -> int:
        """What `evaluate` calls this stride: whole windows are its chunked score, which has had a name of its own since R018."""
        named = inspect.signature(t.evaluate).parameters["stride"].default == 0
        return 0 if named and stride == self.cfg.train_seq_len else stride

    def plain(self, stride: int, windows: int, rows: int) -> dict:
        """The plain path on the first `windows` windows, `rows` at a time, and the fast path's score of the same targets."""
        model, length = self.loaded, self.window(stride)
        val = self.validation(length + stride * (windows - 1))
        rows = max(1, min(rows, self.cfg.micro_batch_tokens // length))
        plain_nats(model, val._replace(tokens=val.tokens[: length + 1]), (length, stride), 1)  # loads kernels
        nats, seconds = self._timed(lambda: plain_nats(model, val, (length, stride), rows))
        bpb = nats / math.log(2) / val.num_bytes
        return {"s": seconds, "rows": rows, "windows": len(t.window_plan(val.num_targets, length, stride)[0]), "bpb": bpb,
                "difference": self.evaluate(stride, val.num_targets)["bpb"] - bpb, "targets": val.num_targets}  # fmt: skip


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what is printed here and by libraries must not get between the answers
    assert Path(t.__file__).resolve().parent == Path(sys.argv[1]).resolve()
    worker = None
    for line in sys.stdin:
        request = json.loads(line)
        try:
            worker = worker or Worker()
            answer = getattr(worker, request.pop("do"))(**request)
        except (t.UserError, OSError) as error:
            answer = {"error": str(error)}
        except Exception as error:  # the next request may still be answered
            traceback.print_exc()
            where = traceback.extract_tb(error.__traceback__)[-1]
            text = (str(error).splitlines() or [""])[0]
            answer = {"error": f"{type(error).__name__}: {text} ({Path(where.filename).name}:{where.lineno})"}
        print(json.dumps(answer), file=answers)


if __name__ == "__main__":
    main()
    os._exit(0)  # the loader's thread may still be reading ahead; nothing is left to write
