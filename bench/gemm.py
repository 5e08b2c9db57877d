"""How fast the model's matrix products are on this device, against what it reaches at best: each product, each way to compute it.

    python bench/gemm.py                             the default model; settings as for train_gpt.py
    python bench/gemm.py --preset configs/pr640.env  a preset; what stands in the environment wins
    python bench/gemm.py --tiny                      small sizes, on a CPU too (kernels in Triton's interpreter): for the tests

Operands are what training multiplies, since a GPU's clock depends on them (random bits draw the most power): stored ternary weights,
normalized activations, relu^2 of products for `down`, gradients that are 0 where relu^2 is off for `up`. 65,536 rows: one micro-batch.
Times are medians; between two calls the L2 cache is overwritten. "of peak": of the largest rate of an 8192^3 product of normal
numbers in the same number of bits, measured here. A kernel's rate counts the product alone; what its epilogue does is listed.

The last lines are the table SPLIT_SUMS of train_gpt.py as this device would have it: shapes whose weight gradient is faster in parts.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools"), str(ROOT / "bench")]

from command_line import BadArguments, OneLineParser, read_preset, start  # noqa: E402


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = OneLineParser(__doc__)
    parser.add_argument("--preset", type=Path, help="KEY=VALUE lines")
    parser.add_argument("--tiny", action="store_true", help="small sizes")
    parser.add_argument("--seconds", type=float, default=0.1, help="measuring time of a row on a GPU (default 0.1)")
    parser.add_argument("--json", type=Path, help="also write the rows there")
    return parser.parse_args(argv)


if __name__ == "__main__":
    parse_arguments()  # -h and mistakes are answered before PyTorch is imported, which takes seconds

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when Triton is imported
with contextlib.suppress(ImportError):
    import triton  # train_gpt looks whether it is there

import train_gpt as t  # noqa: E402

TINY = {"VOCAB_SIZE": "96", "NUM_LAYERS": "1", "MODEL_DIM": "64", "NUM_HEADS": "4", "NUM_KV_HEADS": "2", "MLP_MULT": "2", "EMBED_DIM": "24",
        "BITNET_GROUP_SIZE": "32", "TRAIN_SEQ_LEN": "32", "YARN_MAX_LEN": "64", "TRAIN_BATCH_TOKENS": "64"}  # fmt: skip
HEADS = ((8, 4, 96), (6, 3, 128), (12, 4, 64))  # query heads, key heads, their size: layouts of width 768
Way = tuple[str, int, Callable[[], object]]  # what it is, bits of its operands, how it is called


@dataclass
class Bench:
    """Where it runs, at what size, and every row of the tables."""

    device: torch.device
    dtype: torch.dtype
    rows: int
    seconds: float  # measuring time of a row, on a GPU
    splits: tuple[int, ...]
    peaks: dict[int, float] = field(default_factory=dict)  # bits -> FLOP/s
    results: list[dict] = field(default_factory=list)

    def ms(self, call: Callable[[], object]) -> float:
        """Median milliseconds."""
        if self.device.type == "cuda":
            return triton.testing.do_bench(call, warmup=200 * self.seconds, rep=1000 * self.seconds, return_mode="median")
        times = []
        for _ in range(3):
            begin = time.perf_counter()
            call()
            times.append(1000 * (time.perf_counter() - begin))
        return statistics.median(times)

    def measure(self, name: str, flops: float, way: Way) -> float | None:
        """One row; a way that this device refuses is a row with the reason."""
        what, bits, call = way
        row = {"product": name, "way": what, "bits": bits}
        try:
            ms = self.ms(call)
        except Exception as error:  # whatever the reason, the other rows are wanted
            self.results.append(row | {"failed": f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"})
            print(f"| {name} | {what} | FAILED {self.results[-1]['failed']} | | |", flush=True)
            return None
        rate = flops / ms * 1000
        self.results.append(row | {"ms": ms, "flops_s": rate, "of_peak": rate / self.peaks[bits]})
        print(f"| {name} | {what} | {ms:.4f} | {rate / 1e12:.4g} | {rate / self.peaks[bits]:.1%} |", flush=True)
        return ms

    def find_peaks(self, size: int) -> None:
        """FLOP/s of a square product of normal numbers, in the model's bits and in 8."""
        a, b = (torch.randn(size, size, device=self.device) for _ in range(2))
        wide, narrow, one = (a.to(self.dtype), b.to(self.dtype)), (t.to_fp8(a, 1.0), t.to_fp8(b, 1.0)), torch.ones((), device=self.device)
        self.peaks[self.dtype.itemsize * 8] = 2 * size**3 / self.ms(lambda: wide[0] @ wide[1].T) * 1000
        with contextlib.suppress(RuntimeError):  # an older GPU
            self.peaks[8] = 2 * size**3 / self.ms(lambda: t.fp8_product(*narrow, one, self.dtype)) * 1000
        for bits, rate in self.peaks.items():
            print(f"peak, {bits} bits: {rate / 1e12:.4g} TFLOP/s ({size}^3)")
        print()


@dataclass
class Product:
    """One matrix of the model with what meets it in training; x (N, in), g (N, out), w (out, in)."""

    name: str
    w: torch.Tensor
    x: torch.Tensor
    g: torch.Tensor
    eight: bool  # ternary matrices alone have 8-bit forms

    def shape(self, which: str) -> str:
        return f"{self.name}, {which}: {len(self.x)} x {self.w.size(1)} x {self.w.size(0)}"

    def forward(self) -> Iterator[Way]:
        yield f"{self.w.dtype}"[6:], self.w.dtype.itemsize * 8, lambda: F.linear(self.x, self.w)
        if self.eight:
            codes, _, scale, _ = t.fp8_weight(self.w)
            x8 = t.to_fp8(self.x, 8.0)
            yield "e4m3 x e4m3", 8, lambda: t.fp8_product(x8, codes, scale, self.w.dtype)

    def input_gradient(self) -> Iterator[Way]:
        yield f"{self.w.dtype}"[6:], self.w.dtype.itemsize * 8, lambda: self.g @ self.w
        if self.eight:
            _, codes_t, scale, _ = t.fp8_weight(self.w)
            g8 = t.to_fp8(self.g, 2.0**12, torch.float8_e5m2)
            yield "e5m2 x e4m3", 8, lambda: t.fp8_product(g8, codes_t, scale, self.w.dtype)

    def weight_gradient(self, splits: tuple[int, ...]) -> Iterator[Way]:
        bits = self.w.dtype.itemsize * 8
        yield "torch.mm", bits, lambda: t.weight_gradient(self.g, self.x)
        if t.triton and all(size * self.w.dtype.itemsize % 16 == 0 for size in self.w.shape):
            for n in splits:
                yield f"{n} sums", bits, lambda n=n: t.split_weight_gradient(self.g, self.x, n)


def products(model: t.GPT, bench: Bench) -> list[Product]:
    """Every shape of the model once, under the name of its first matrix."""
    block = model.blocks[0]
    layers = {"qkv": block.attention.qkv, "attention out": block.attention.out, "up": block.mlp.up, "down": block.mlp.down,
              "embed in": model.embed_in, "embed out": model.embed_out, "head": model.table}  # fmt: skip
    draw = lambda width: t.rms_norm(torch.randn(bench.rows, width, device=bench.device)).to(bench.dtype)
    found = []
    for name, layer in layers.items():
        if not isinstance(layer, t.QuantizedLinear):
            continue
        with torch.no_grad():
            w = layer.to(bench.device).stored(bench.dtype)
            x, g = draw(w.size(1)), draw(w.size(0)) * 2.0**-8
            if name == "down":
                x = t.rms_norm(F.linear(draw(block.mlp.up.weight.size(1)), block.mlp.up.stored(bench.dtype)).relu().square())
            if name == "up":
                g = g * (F.linear(x, w) > 0)
        found.append(Product(name, w, x, g, isinstance(layer, t.TernaryLinear)))
    return found


def fused(up: Product, down: Product) -> Iterator[tuple[str, float, Way]]:
    """The MLP's kernels: (product, FLOPs, way)."""
    bits, hidden = up.w.dtype.itemsize * 8, F.linear(up.x, up.w).relu().square()
    rows, flops = hidden.new_ones(len(hidden), 1, dtype=torch.float32), 2 * hidden.numel() * up.w.size(1)
    dy, scales = down.g, torch.ones(2, device=hidden.device)
    yield up.shape("forward"), flops, ("kernel: relu^2, squares", bits, lambda: t.relu2_product(up.x, up.w, None, up.w.dtype))
    yield down.shape("input gradient"), flops, ("kernel: norm, relu^2", bits, lambda: t.relu2_gradient(dy, down.w, hidden, rows, rows, None))
    x8, g8 = t.to_fp8(up.x, 16.0), t.to_fp8(dy, 2.0**12, torch.float8_e5m2)
    codes, codes_t = t.fp8_weight(up.w).codes, t.fp8_weight(down.w).codes_t
    eight = lambda: t.relu2_product(x8, codes, scales * 2.0**-13, up.w.dtype)  # the scale keeps h within range, as in training
    yield up.shape("forward"), flops, ("kernel in 8 bits: relu^2, squares, e4m3 beside", 8, eight)
    eight = lambda: t.relu2_gradient(g8, codes_t, hidden, rows, rows, scales * 2.0**-13)
    yield down.shape("input gradient"), flops, ("kernel in 8 bits: norm, relu^2, e5m2 beside", 8, eight)


def best_splits(bench: Bench, product: Product, flops: float) -> int | None:
    """Parts of the fastest weight gradient, if it beats torch.mm by more than 2 %."""
    times = {}
    for way in product.weight_gradient(bench.splits):
        if (ms := bench.measure(product.shape("weight gradient"), flops, way)) is not None:
            times[way[0]] = ms
    best = min(times, key=times.get, default="torch.mm")
    faster = best != "torch.mm" and times[best] < 0.98 * times.get("torch.mm", float("inf"))
    return int(best.split()[0]) if faster else None


def measure_products(bench: Bench, model: t.GPT) -> dict[tuple[int, int], int]:
    print("| product | way | ms | TFLOP/s | of peak |\n|---|---|---|---|---|")
    splits, found = {}, products(model, bench)
    for p in found:
        flops = 2 * len(p.x) * p.w.numel()
        for which, ways in (("forward", p.forward), ("input gradient", p.input_gradient)):
            for way in ways():
                if way[1] in bench.peaks:
                    bench.measure(p.shape(which), flops, way)
        if (n := best_splits(bench, p, flops)) is not None:
            splits[tuple(p.w.shape)] = n
    named = {p.name: p for p in found}
    if t.triton:
        for name, flops, way in fused(named["up"], named["down"]):
            if way[1] in bench.peaks:
                bench.measure(name, flops, way)
    return splits


def measure_attention(bench: Bench, seq_len: int) -> None:
    """PyTorch's causal attention, forward and with its gradients, by head layout: FLOPs of the visible half."""
    for heads, kv_heads, size in HEADS:
        q, k, v = (torch.randn(bench.rows // seq_len, seq_len, n, size, device=bench.device, dtype=bench.dtype, requires_grad=True)
                   for n in (heads, kv_heads, kv_heads))  # fmt: skip
        flops, name, bits = 2 * bench.rows * seq_len * heads * size, f"attention {heads} x {size}, {kv_heads} keys", bench.dtype.itemsize * 8
        both = lambda q=q, k=k, v=v: torch.autograd.grad(t.attend(q, k, v).sum(), (q, k, v))
        with t.attention_backends(bench.device):
            bench.measure(name, flops, ("forward", bits, lambda q=q, k=k, v=v: t.attend(q, k, v)))
            bench.measure(name, 3.5 * flops, ("forward and backward", bits, both))


def measure_copy(bench: Bench, size: int) -> None:
    a = torch.empty(size, device=bench.device, dtype=bench.dtype)
    b = torch.empty_like(a)
    ms = bench.ms(lambda: b.copy_(a))
    print(f"\ncopy of {a.nbytes / 1e6:.0f} MB: {2 * a.nbytes / ms / 1e6:.0f} GB/s read and written")


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    preset = read_preset(args.preset) if args.preset else {}
    cfg = t.Config.from_env((TINY if args.tiny else {}) | preset | os.environ)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    bench = Bench(device, t.compute_dtype(cfg.precision, device), 128 if args.tiny else cfg.micro_batch_tokens, args.seconds,
                  (3,) if args.tiny else (2, 3, 4, 5, 6, 7, 8, 9, 11, 14))  # fmt: skip
    torch.manual_seed(0)
    model = t.GPT(cfg)
    for layer in model.modules():
        if isinstance(layer, t.TernaryLinear) and not layer.weight.any():
            torch.nn.init.normal_(layer.weight, std=0.02)  # after training no matrix is zero
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    print(f"torch {torch.__version__}, {where}, {bench.dtype}, {bench.rows} rows\n")
    bench.find_peaks(64 if args.tiny else 8192)
    with mock.patch.object(t, "SPLIT_SUMS", {}):  # torch.mm is measured for every shape
        splits = measure_products(bench, model)
    measure_attention(bench, cfg.train_seq_len)
    measure_copy(bench, 2**12 if args.tiny else 2**29)
    print(f"\nSPLIT_SUMS: dict[tuple[int, int], int] = {splits}")
    if args.json:
        args.json.write_text(json.dumps({"rows": bench.results, "peaks": bench.peaks, "splits": [[*k, n] for k, n in splits.items()]}))
    return 0


if __name__ == "__main__":
    start(main, t.UserError, BadArguments)
