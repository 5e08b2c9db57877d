"""Where the time of a profiled region went, by kernel group: reads the Chrome trace that torch.profiler writes.

Every GPU kernel is traced back to the host call that launched it (the launch has the kernel's correlation number, and stands
inside PyTorch operations on its thread's timeline; the operation's number, "External id", where it does not). That stack
of operations decides the group; nothing has to be annotated inside a compiled graph, and no NVTX is needed:

* the pass: autograd runs every backward node inside `autograd::engine::evaluate_function`; the forward pass runs inside the
  annotation FORWARD that the bench puts around the loss function; the rest of a step is optimizer and bookkeeping;
* matrix products: operand shapes (recorded by the profiler, for the kernels of torch.compile too). Which of the three passes:
  the one that contracts over the tokens is the weight gradient; of the two others the one in the backward pass is the input
  gradient. Shapes alone could not tell these two apart: up's forward is down's input gradient. A shape that contains the
  vocabulary is the head; the model's own list of matrices tells ternary ones from the embedding's projections. So for
  train_gpt.py's operators. A kernel launched outside one must say in its name that it is a product (MATMUL; WEIGHT_GRADIENT);
* attention, loss, communication: by the names of the operations; everything else in forward or backward is elementwise.

Kernels that overlap are counted once (the time goes to the one that started first), so groups and idle add up to the wall time.
On a CPU an operation's own time (without the operations it calls) takes the place of a kernel's; Python code is idle.
"""

from __future__ import annotations

import bisect
import itertools
import json
import math
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

REGION, FORWARD = "bench:region", "bench:forward"  # annotations: what is measured; the forward pass within it
PASSES = ("forward", "input gradient", "weight gradient")
GROUPS = (*(f"ternary GEMMs, {name}" for name in PASSES), "attention, forward", "attention, backward", "elementwise, forward",
          "elementwise, backward", "head, embedding and loss", "gradient accumulation", "other GEMMs", "optimizer",
          "communication", "idle")  # fmt: skip
COMMUNICATION = re.compile(r"nccl|c10d::|gloo|all_?gather|reduce_?scatter|all_?reduce", re.I)
ATTENTION = re.compile(r"scaled_dot_product|attention|flash|fmha|sdpa", re.I)
HEAD = re.compile(r"embedding|lookup|logsumexp|log_softmax|cross_entropy|nll|softcap|loss", re.I)
MATMUL = re.compile(
    r"\b(add|b|badd)?mm\b|_scaled_mm|matmul|gemm|nvjet|cutlass|splitk|triton_(tem_|mm)|linear|mlp|_mm_|_mm$", re.I
)
FUSED = re.compile(r"triton_(poi|red|per|for)_")  # torch.compile's own kernels are named after every operation fused into them
OWN_OPERATOR = re.compile(r"(?!aten::|c10d::|autograd::|prim::)\w+::")
WEIGHT_GRADIENT = re.compile(r"wgrad|weight_grad|_dw", re.I)


class Shapes(NamedTuple):
    """What the model's matrix products look like."""

    ternary: tuple[tuple[int, int], ...]  # (out, in)
    projections: tuple[tuple[int, int], ...]  # between embedding and model width
    vocab: int


@dataclass
class Operation:
    """A host-side event, with the one that encloses it on its thread."""

    name: str
    start: float  # microseconds, as in the trace
    end: float
    dims: list
    parent: Operation | None = None
    own: float = field(default=0.0)  # its time without that of the operations it calls


class Call(NamedTuple):
    """What decides a kernel's group: its name and the operations around its launch, the innermost first."""

    name: str
    stack: tuple[Operation, ...]

    def names(self) -> Iterator[str]:
        yield self.name
        yield from (op.name for op in self.stack)


class Timeline:
    """The operations of one thread: which of them enclose a moment?"""

    def __init__(self, operations: list[Operation]) -> None:
        self.operations = sorted(operations, key=lambda op: (op.start, -op.end))
        self._starts = [op.start for op in self.operations]
        open_: list[Operation] = []
        for op in self.operations:
            while open_ and open_[-1].end <= op.start:
                open_.pop()
            op.own = op.end - op.start
            if open_:
                op.parent = open_[-1]
                open_[-1].own -= op.own
            open_.append(op)

    def stack(self, moment: float) -> tuple[Operation, ...]:
        """The operations around a moment, innermost first."""
        i = bisect.bisect_right(self._starts, moment) - 1
        op = self.operations[i] if i >= 0 else None
        while op and op.end < moment:
            op = op.parent
        return lineage(op)


def lineage(op: Operation | None) -> tuple[Operation, ...]:
    found = []
    while op:
        found.append(op)
        op = op.parent
    return tuple(found)


def product_group(dims: list, backward: bool, shapes: Shapes) -> str | None:
    """The group of a matrix product by its operands' shapes; None if it is none of the model's."""
    matrices = [(math.prod(d[:-1]), d[-1]) for d in dims if isinstance(d, list) and len(d) >= 2 and isinstance(d[0], int)]
    if any(shapes.vocab in d for d in matrices):
        return "head, embedding and loss"
    for (m, k), (inner, n) in itertools.pairwise(matrices):
        if k not in (inner, n):  # n: a linear layer's operands are (rows, in) and (out, in)
            continue
        for known, group in ((shapes.ternary, "ternary GEMMs, "), (shapes.projections, "")):
            if {(inner, n), (n, inner)} & set(known):
                which = PASSES[backward]
            elif k == inner and {(m, n), (n, m)} & set(known):
                which = PASSES[2]
            else:
                continue
            return group + which if group else "head, embedding and loss"
    return None


def matmul_group(call: Call, backward: bool, shapes: Shapes) -> str | None:
    """The group of a matrix product; None if the call is none. train_gpt.py's operators are if their operands are a product's."""
    inner = call.stack[0].name if call.stack else ""
    named = any(MATMUL.search(name) for name in (call.name, inner))
    if FUSED.match(call.name) or not (named or OWN_OPERATOR.match(inner)):
        return None
    for op in call.stack:
        if group := product_group(op.dims, backward, shapes):
            return group
    if named and re.match(r"_?[a-z0-9_]+$", call.name) and not call.name.startswith(("nvjet", "cutlass", "triton_")):
        # a kernel of train_gpt.py: it has no shapes where it is launched outside an operator and a compiled graph
        return f"ternary GEMMs, {PASSES[0] if not backward else PASSES[2] if WEIGHT_GRADIENT.search(call.name) else PASSES[1]}"
    return "other GEMMs" if named else None


def group_of(call: Call, shapes: Shapes) -> str:
    names = list(call.names())
    if any(COMMUNICATION.search(name) for name in names):
        return "communication"
    if any("AccumulateGrad" in name or "_foreach_add_" in name for name in names):  # the latter since `Gradients.compute` adds
        return "gradient accumulation"
    backward = any(name.startswith("autograd::engine::evaluate_function") for name in names)
    if not backward and FORWARD not in names:
        return "optimizer"
    if any(ATTENTION.search(name) for name in names if not FUSED.match(name)):
        return f"attention, {'backward' if backward else 'forward'}"
    if any(HEAD.search(name) for name in names if name != FORWARD):
        return "head, embedding and loss"
    if group := matmul_group(call, backward, shapes):
        return group
    if any(isinstance(d, list) and shapes.vocab in d for op in call.stack[:1] for d in op.dims):
        return "head, embedding and loss"
    return f"elementwise, {'backward' if backward else 'forward'}"


def host_timelines(events: list[dict]) -> tuple[dict, dict]:
    """(thread -> Timeline, external id -> Operation)."""
    threads: dict = {}
    by_id = {}
    for e in events:
        if e.get("cat") in ("cpu_op", "user_annotation"):
            args = e.get("args", {})
            op = Operation(e["name"], e["ts"], e["ts"] + e["dur"], args.get("Input Dims", []))
            threads.setdefault((e["pid"], e["tid"]), []).append(op)
            if "External id" in args:
                by_id[args["External id"]] = op
    return {thread: Timeline(ops) for thread, ops in threads.items()}, by_id


def kernel_calls(events: list[dict]) -> Iterator[tuple[float, float, Call]]:
    """(start, end, call) of everything that ran on the GPU."""
    threads, by_id = host_timelines(events)
    launches = {
        e["args"]["correlation"]: e
        for e in events
        if e.get("cat") in ("cuda_runtime", "cuda_driver") and "correlation" in e.get("args", {})
    }
    for e in events:
        if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset"):
            launch = launches.get(e["args"].get("correlation"))
            line = threads.get((launch["pid"], launch["tid"])) if launch else None
            stack = line.stack(launch["ts"]) if line else ()
            if all(op.name.startswith("bench:") for op in stack):
                stack = lineage(by_id.get(e["args"].get("External id", -1))) or stack
            yield e["ts"], e["ts"] + e["dur"], Call(e["name"], stack)


def gpu_groups(events: list[dict], shapes: Shapes) -> dict[str, float]:
    """Microseconds by group, overlaps once."""
    groups, covered = dict.fromkeys(GROUPS, 0.0), 0.0
    for start, end, call in sorted(kernel_calls(events), key=lambda item: item[:2]):
        groups[group_of(call, shapes)] += max(0.0, end - max(start, covered))
        covered = max(covered, end)
    return groups


def cpu_groups(events: list[dict], shapes: Shapes) -> dict[str, float]:
    """Microseconds by group: the own time of PyTorch's operations on the thread that holds REGION."""
    groups = dict.fromkeys(GROUPS, 0.0)
    for line in host_timelines(events)[0].values():
        if not any(op.name == REGION for op in line.operations):
            continue
        for op in line.operations:
            stack = lineage(op)
            if "::" in op.name and not op.name.startswith("autograd::") and any(above.name == REGION for above in stack):
                groups[group_of(Call(op.name, stack), shapes)] += op.own
    return groups


def read_trace(path: Path, shapes: Shapes, gpu: bool) -> tuple[dict[str, float], float]:
    """(milliseconds by group, idle still 0; wall milliseconds of REGION). ValueError for a GPU's trace without kernels."""
    events = [e for e in json.loads(path.read_text())["traceEvents"] if e.get("ph") == "X"]
    if gpu and not any(e.get("cat") == "kernel" for e in events):
        raise ValueError("the profiler saw no kernel of the GPU")
    groups = (gpu_groups if gpu else cpu_groups)(events, shapes)
    wall = sum(e["dur"] for e in events if e["name"] == REGION and e["cat"] == "user_annotation")
    return {name: value / 1000 for name, value in groups.items()}, wall / 1000


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))
    from command_line import not_a_command

    not_a_command("bench/step.py")
