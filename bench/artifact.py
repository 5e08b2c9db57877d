"""Bytes of the artifact, stream by stream, method by method: what the published scripts write, ours, and the entropy bound.

    python bench/artifact.py                          the default model, weights drawn at the zero fractions .310 .369 .442
    python bench/artifact.py --zero 0.369             one of them
    python bench/artifact.py --weights FILE           latent weights of a trained model (torch.save of its state dict); with
                                                      --zero also at those zero fractions, magnitudes raised to a power
    EMBED_DIM=254 python bench/artifact.py            settings as for train_gpt.py
    python bench/artifact.py --weights FILE --structure   bits a trit given its column, row, scale or neighbours
    python bench/artifact.py --worst                  codes with 1.585 bits each, the most that trits can have

.310 is a Gaussian's zero fraction, .369 and .442 are those of the published #640 and #920 (from their bitmask's bytes). Each method
stores the same codes; the published ones keep float16 scales and unscaled FP8 tables. Times are for two cores.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import lzma
import math
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

from command_line import start  # noqa: E402
from run_logs import OneLineParser  # noqa: E402

POWERS = (0.1, 4.0)  # of a Gaussian's magnitude: between them lie all shares of zeros that are asked for


def zero_share(power: float) -> float:
    """P(|w| < 0.5 E|w|) for |w| = |Gaussian|^power."""
    mean = 2 ** (power / 2) * math.gamma((power + 1) / 2) / math.sqrt(math.pi)
    return math.erf((0.5 * mean) ** (1 / power) / math.sqrt(2))


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = OneLineParser(description=__doc__.split("\n")[0])
    parser.add_argument("--zero", type=float, nargs="+", help="zero fractions (default: 0.31 0.369 0.442; the weights' own)")
    parser.add_argument("--weights", type=Path, help="a state dict of latent weights (torch.save of a dict of tensors)")
    parser.add_argument("--worst", action="store_true", help="codes with the most bits")
    parser.add_argument("--structure", action="store_true", help="what a trit's surroundings tell about it, instead")
    parser.add_argument("--only-ours", action="store_true", help="leave the published methods out")
    args = parser.parse_args(argv)
    least, most = map(zero_share, POWERS)
    for share in args.zero or ():
        if not least <= share <= most:  # true of NaN, too
            parser.error(f"--zero {share:g}: expected {least:.4f} to {most:.4f}")
    if args.worst and (args.zero or args.weights):
        parser.error("--worst draws its own weights: expected no --zero and no --weights")
    if args.structure and not args.weights:
        parser.error("--structure: expected --weights FILE; drawn weights have none")
    if args.weights and not args.weights.is_file():
        parser.error(f"--weights {args.weights}: no such file")
    return args


if __name__ == "__main__":
    ARGUMENTS = parse_arguments()  # before PyTorch, which takes seconds to import: help and mistakes are answered at once

import numpy as np  # noqa: E402
import torch  # noqa: E402

import train_gpt as t  # noqa: E402

OTHERS = ("scales", "tables", "controls")


def power_for(zero_fraction: float) -> float:
    """The power of a Gaussian's magnitude at which BitNet's rule leaves this share of zeros (bisection)."""
    low, high = POWERS
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if zero_share(middle) < zero_fraction else (low, middle)
    return low


def drawn_model(cfg: t.Config, zero_fraction: float) -> t.GPT:
    """Independent weights, ternary matrices at a zero fraction: no structure that a codec could use, unlike trained ones."""
    torch.manual_seed(cfg.seed)
    model, power = t.GPT(cfg), power_for(zero_fraction)
    with torch.no_grad():
        for _, _, p, role in t.parameter_owners(model):
            p.normal_(std=1.0 if role.storage == "control" else 0.02)
            if role.storage == "ternary":
                p.copy_(p.sign() * (p.abs() * 50).pow(power) * 0.02)
    return model


def worst_model(cfg: t.Config) -> t.GPT:
    """Codes -1, 0, 1 equally often and independent: log2(3) = 1.585 bits each; tables and controls uniform in their bits."""
    model = drawn_model(cfg, 0.31)
    with torch.no_grad():
        for _, _, p, role in t.parameter_owners(model):
            if role.storage == "ternary":
                p.copy_(torch.randint(-1, 2, p.shape) * (1 + torch.rand(p.size(0), 1)))
    return model


def shifted(model: t.GPT, zero_fraction: float) -> t.GPT:
    """The model with each ternary matrix's magnitudes raised to the power at which this share of its codes is 0 (bisection)."""
    other = t.GPT(model.cfg)
    other.load_state_dict(model.state_dict())
    for _, module, p, role in t.parameter_owners(other):
        if role.storage == "ternary":
            w, low, high = p.detach().clone(), 0.25, 4.0
            for _ in range(10):
                power = (low * high) ** 0.5
                p.data = w.sign() * (w.abs() / w.abs().mean()).pow(power) * 0.02
                zeros = (module.ternarized()[0] == 0).float().mean().item()
                low, high = (power, high) if zeros < zero_fraction else (low, power)
    return other


def line_classes(codes: np.ndarray, axis: int) -> tuple[np.ndarray, float]:
    """Class of each line along `axis` by its share of zeros (.2 apart in log odds), and the bytes of saying which they are."""
    zeros, size = (codes == 1).sum(axis), codes.shape[axis]
    classes = np.clip(np.round(np.log((zeros + 0.5) / (size - zeros + 0.5)) / 0.2) + 64, 0, 127).astype(np.uint8)
    return classes, entropy_bytes(classes, np.zeros(classes.size, np.uint8))


def structure(model: t.GPT) -> None:
    """Print what a trit's surroundings tell about it: empirical entropy given them, static tables, classes of lines paid for."""
    totals: dict[str, float] = {}
    pooled: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {"column's share of zeros": [], "row's share of zeros": []}
    count = 0
    for _, module, p, role in t.parameter_owners(model):
        if role.storage != "ternary":
            continue
        codes, scale = module.ternarized()
        c, count = (codes.view(p.shape) + 1).to(torch.uint8).numpy(), count + p.numel()
        groups = np.repeat(scale.view(-1).numpy(), module.group_size).reshape(c.shape)
        shifted_by = lambda axis, c=c: np.roll(c, 1, axis)  # noqa: E731
        contexts = {
            "nothing (a table for each matrix)": np.zeros_like(c), "the trit to the left": shifted_by(1), "the trit above": shifted_by(0),
            "its scale, 16 quantiles": np.searchsorted(np.quantile(groups, np.linspace(0, 1, 17)[1:-1]), groups).astype(np.uint8),
        }  # fmt: skip
        for name, context in contexts.items():
            totals[name] = totals.get(name, 0) + entropy_bytes(c.reshape(-1), context.reshape(-1))
        for name, axis in (("column's share of zeros", 0), ("row's share of zeros", 1)):
            classes, side = line_classes(c, axis)
            totals[name] = totals.get(name, 0) + side
            pooled[name].append((c.reshape(-1), np.broadcast_to(np.expand_dims(classes, axis), c.shape).reshape(-1)))
    for name, parts in pooled.items():
        totals[name] += entropy_bytes(*(np.concatenate(part) for part in zip(*parts, strict=True)))
    base = totals["nothing (a table for each matrix)"]
    print("\n| given | bits a trit | against nothing |\n|---|---|---|")
    for name, size in totals.items():
        print(f"| {name} | {8 * size / count:.5f} | {100 * (size / base - 1):+.3f} % |")


def converted(model: t.GPT, **settings: object) -> t.GPT:
    """The same latent weights under another storage."""
    other = t.GPT(dataclasses.replace(model.cfg, **settings))
    other.load_state_dict(model.state_dict())
    return other


def entropy_bytes(symbols: np.ndarray, contexts: np.ndarray) -> float:
    """Bytes of the symbols at their empirical frequencies in each context, without the cost of saying which those are."""
    if not symbols.size:
        return 0.0
    counts = np.bincount(contexts.astype(np.int64) * 256 + symbols, minlength=256 * (int(contexts.max()) + 1)).reshape(-1, 256)
    totals = counts.sum(1, keepdims=True)
    return float((counts * np.log2(np.where(counts > 0, totals / np.maximum(counts, 1), 1))).sum() / 8)


def bound(symbols: list[np.ndarray], layout: t.Layout) -> tuple[dict[str, float], float]:
    """Entropy of every stream (trits by matrix, the others by their shape's table), and of the trits given the column classes."""
    sizes = {name: entropy_bytes(s, layout.contexts(name)) for name, s in zip(OTHERS, symbols[1:], strict=True)}
    ends = np.cumsum([0] + [r * c for r, c in layout.matrices])
    trits = sum(entropy_bytes(symbols[0][a:b], np.zeros(b - a, np.uint8)) for a, b in zip(ends, ends[1:], strict=False))
    classes = t.column_classes(symbols[0], layout.matrices)
    return {"trits": trits} | sizes, entropy_bytes(symbols[0], t.trit_contexts(classes, layout.matrices))


def pickled(codes: np.ndarray, scales: bytes, others: dict[str, bytes]) -> bytes:
    """As #640 saves: each stream a bytes object inside torch.save, whose pickle writes bytes as UTF-8 text, then LZMA."""
    best = None
    for pack in (t.PACKINGS["base3"][0], t.pack_bitmask):
        buffer = io.BytesIO()
        torch.save({"packed": pack(codes), "scales": torch.frombuffer(bytearray(scales), dtype=torch.float16), **others}, buffer)
        data = lzma.compress(buffer.getvalue(), preset=9)
        best = data if best is None or len(data) < len(best) else best
    return best


def published_whole(model: t.GPT) -> tuple[str, list[object], float]:
    """(method, bytes, seconds) of #640's way; the model has float16 scales and FP8 tables."""
    symbols, start = t.model_symbols(model, model.cfg), time.perf_counter()
    rest = [s.tobytes() for s in symbols[1:]]
    whole = len(pickled(symbols[0].view(np.int8) - 1, rest[0], {"tables": rest[1], "controls": rest[2]}))
    return "pickle + LZMA (#640)", ["", "", "", "", whole], time.perf_counter() - start


def ours(model: t.GPT, codec: str, name: str) -> tuple[str, list[object], float, float]:
    """(name, bytes by stream and in all, seconds to save, seconds to load) of an artifact, which is loaded and compared."""
    cfg = dataclasses.replace(model.cfg, artifact_codec=codec)
    start = time.perf_counter()
    blob = t.save_artifact(model, cfg)
    saved = time.perf_counter()
    loaded, _ = t.load_artifact(blob)
    seconds = time.perf_counter() - saved
    for (_, ours, _, _), (_, theirs, _, _) in zip(t.parameter_owners(model), t.parameter_owners(loaded), strict=True):
        if isinstance(ours, t.QuantizedLinear):
            assert torch.equal(ours.stored(torch.float32), theirs.weight)
    sizes = [len(data) for data in t.read_container(blob).streams]
    return name, [*sizes, len(blob)], saved - start, seconds


def code_sizes() -> dict[str, int]:
    sizes = {"readable": Path(t.__file__).stat().st_size}
    try:
        from pack_code import pack
    except ImportError:
        return sizes
    return sizes | {"packed": len(pack(Path(t.__file__).read_text(encoding="utf-8")))}


def table(model: t.GPT, methods: set[str]) -> None:
    """Print the rows of one model."""
    layout, symbols = t.Layout(model), t.model_symbols(model, model.cfg)
    params, ternary = t.count_parameters(model)
    print(f"\n{params} parameters, {ternary} ternary, zero fraction {t.zero_fraction(model):.4f}\n")
    print("| method | trits | scales | tables | controls | artifact | bits a trit | save s | load s |\n|---|---|---|---|---|---|---|---|---|")

    def row(name: str, sizes: list[object], save: object = "", load: object = "") -> None:
        bits = f"{8 * sizes[0] / ternary:.4f}" if sizes[0] else ""
        cells = [f"{size:,.0f}" if size else "" for size in sizes] + [""] * (5 - len(sizes))
        times = [f"{x:.1f}" if x else "" for x in (save, load)]
        print(f"| {name} | {' | '.join(cells)} | {bits} | {' | '.join(times)} |", flush=True)

    own = model.cfg.scale_storage, model.cfg.fp_storage
    if "published" in methods:
        old = converted(model, scale_storage="fp16", fp_storage="FP8")
        for codec, name in (("int8", "int8 + zlib"), ("2bit", "2-bit + zlib (#126)")):
            row(*ours(old, codec, f"{name}, fp16 scales"))
        row(*published_whole(old))
        for codec in ("base3", "bitmask"):
            row(*ours(old, codec, f"{codec} + LZMA, fp16 scales"))
        row(*ours(old, "ans", "ans, fp16 scales"))
    row(*ours(model, "ans", f"ans, {own[0]} scales, {own[1]} tables"))
    sizes, given_classes = bound(symbols, layout)
    row("entropy of the same", [*sizes.values(), sum(sizes.values())])
    row("entropy given the columns' classes, these not counted", [given_classes])
    if "narrow" in methods:
        for storage in ("INT6", "INT5", "INT4"):
            row(*ours(converted(model, fp_storage=storage), "ans", f"ans, {own[0]} scales, {storage} tables"))
        row(*ours(model, "auto", "auto"))


def read_weights(path: Path, cfg: t.Config) -> t.GPT:
    """The model with a file's latent weights; UserError unless they are finite and this model's."""
    model = t.GPT(cfg)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        model.load_state_dict({"temperature": torch.ones(())} | state)
    except Exception as error:  # whatever PyTorch raises for a file of another kind
        said = " ".join(str(error).split(". ")[0].split())[:200]
        raise t.UserError(f"--weights {path}: not a state dict of the model that the settings describe: {said}") from None
    if not all(value.isfinite().all() for value in model.state_dict().values()):
        raise t.UserError(f"--weights {path}: not all weights are finite")
    return model


def at_zeros(model: t.GPT, zero_fraction: float) -> t.GPT:
    """`shifted`; UserError where no power in its range leaves that share of zeros."""
    chosen = shifted(model, zero_fraction)
    if abs(found := t.zero_fraction(chosen) - zero_fraction) > 0.02:
        raise t.UserError(f"--zero {zero_fraction:g}: these weights come no nearer than {zero_fraction + found:.3f}")
    return chosen


def measure(args: argparse.Namespace) -> None:
    """Print what the command line asks for."""
    cfg = t.Config.from_env()
    if not t.count_parameters(t.GPT(cfg))[1]:
        raise t.UserError(f"WEIGHT_QUANT={cfg.weight_quant}: expected a model with ternary weights")
    methods = {"narrow"} if args.only_ours else {"narrow", "published"}
    model = read_weights(args.weights, cfg) if args.weights else None
    print(f"code: {code_sizes()}; budget {t.BUDGET_BYTES}")
    if model:
        for zero_fraction in args.zero or [None]:
            chosen = model if zero_fraction is None else at_zeros(model, zero_fraction)
            structure(chosen) if args.structure else table(chosen, methods)
    elif args.worst:
        table(worst_model(cfg), {"narrow"})
    else:
        for zero_fraction in args.zero or (0.31, 0.369, 0.442):
            table(drawn_model(cfg, zero_fraction), methods)


def main(args: argparse.Namespace) -> int:
    try:
        measure(args)
    except BrokenPipeError:
        raise
    except (t.UserError, OSError) as error:
        print(f"artifact.py: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    start(lambda: main(ARGUMENTS))
