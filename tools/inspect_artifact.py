#!/usr/bin/env python3
"""What is in an artifact: its header, its streams, its parameters matrix by matrix; and how well it predicts a text.

    inspect_artifact.py FILE                                    the whole of it
    inspect_artifact.py FILE --text TEXT.txt [--tokenizer M]    the bits that each token of the text costs
    inspect_artifact.py --diff A B                              what differs between two artifacts

Bits a weight are the stream's bytes over its weights; `entropy` is that of a matrix's own codes, which no coder that knows
the matrix's shares alone goes below. The bits of a text are those of sliding windows, each token with at least three quarters
of a window before it where the text has them, at the temperature that the artifact holds. On a terminal the text is shown in
colours (NO_COLOR=1: not), elsewhere as a line a token: bits, a tab, the token.
"""

import hashlib
import itertools
import math
import os
import statistics
import sys

from command_line import run_command, start
from model_files import load_model, load_tokenizer, read_text, shown
from run_logs import OneLineParser
from shard_io import UserError

BINS_AN_OCTAVE = 2  # of the histogram of scales
BAR = 50  # characters
# bits from which a token is shown so: 256-colour background and foreground, from dark to light (seen in greyscale too)
COLOURS = [(0, 16, 252), (1, 17, 252), (2, 24, 255), (4, 30, 255), (6, 71, 16), (9, 178, 16), (13, 226, 16)]


def say(text=""):
    print(shown(text))


def table(rows):
    """Lines of aligned columns: the first to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        first, *others = (cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True)))
        say("  ".join([first, *others]).rstrip())


def entropy(counts):
    """Bits a symbol of these counts."""
    total = sum(counts)
    return sum(n / total * math.log2(total / n) for n in counts if n)


# -------------------------------------------------------------------------------------------------- one artifact


def parameters(loaded):
    """(name, weight, kind, the module) of every stored parameter, in the artifact's order."""
    import train_gpt

    return [(name, p.data, role.storage, module) for name, module, p, role in train_gpt.saved_parameters(loaded.model)]


def group_scales(weight, module):
    """The scales of a ternary matrix's groups, those of zeros alone left out."""
    scales = weight.view(-1, module.group_size).abs().amax(1)
    return scales[scales > 0]


def show_header(loaded, container):
    import train_gpt

    version = int.from_bytes(loaded.blob[4:6], "little")
    say(f"{loaded.path}: {len(loaded.blob):,} bytes, version {version}, codec {container.codec}, temperature {container.temperature:.4f}")
    say(f"SHA-256 {hashlib.sha256(loaded.blob).hexdigest()}")
    default = train_gpt.Config(run_id="x").model_settings()
    differ = [f"{k}={v}" for k, v in loaded.cfg.model_settings().items() if default[k] != v]
    say(f"settings that differ from the defaults: {' '.join(differ) or 'none'}")


def stream_rows(loaded, container):
    """The table of the streams: bytes, what they hold, bits for each of it."""
    import train_gpt

    layout = train_gpt.Layout(loaded.model)
    held = {"trits": "ternary weights", "scales": "bytes of scales", "tables": "bytes of tables", "controls": "bytes of controls"}
    coded = sum(map(len, container.streams))
    rows = [("stream", "bytes", "share", "symbols", "bits each", "")]
    for name, data in zip(train_gpt.STREAMS, container.streams, strict=True):
        count = layout.count[name]
        each = f"{8 * len(data) / count:.3f}" if count else "-"
        rows.append((name, f"{len(data):,}", f"{100 * len(data) / len(loaded.blob):.1f} %", f"{count:,}", each, held[name]))
    head = len(loaded.blob) - coded
    rows.append(("header", f"{head:,}", f"{100 * head / len(loaded.blob):.1f} %", "", "", ""))
    whole = f"{8 * len(loaded.blob) / layout.params:.3f}"
    return [*rows, ("all", f"{len(loaded.blob):,}", "100.0 %", f"{layout.params:,}", whole, "parameters")]


def parameter_rows(loaded):
    """The table of the parameters: shape, kind, zeros, entropy of the codes, median of the scales."""
    rows = [("parameter", "shape", "stored as", "parameters", "zeros", "entropy", "scale")]
    for name, w, kind, module in parameters(loaded):
        codes, median = "", ""
        if kind == "ternary":
            codes = f"{entropy([int((w.sign() == code).sum()) for code in (-1, 0, 1)]):.3f}"
            median = f"{statistics.median(group_scales(w, module).tolist() or [0]):.2e}"
        shape = " x ".join(map(str, w.shape)) or "1"
        zeros = f"{100 * float((w == 0).float().mean()):.1f} %" if w.numel() else "-"
        rows.append((name, shape, kind, f"{w.numel():,}", zeros, codes, median))
    return rows


def scale_histogram(loaded):
    """(lower end of the bin, scales in it) over all ternary matrices, bins of equal ratio."""
    scales = [s for _, w, kind, module in parameters(loaded) if kind == "ternary" for s in group_scales(w, module).tolist()]
    bins = [math.floor(BINS_AN_OCTAVE * math.log2(s)) for s in scales]
    return [(2 ** (b / BINS_AN_OCTAVE), bins.count(b)) for b in range(min(bins), max(bins) + 1)] if bins else []


def show_artifact(loaded):
    import train_gpt

    container = train_gpt.read_container(loaded.blob)
    show_header(loaded, container)
    say()
    table(stream_rows(loaded, container))
    say()
    table(parameter_rows(loaded))
    histogram = scale_histogram(loaded)
    if histogram:
        say("\nscales of the ternary matrices, from this value on:")
        most = max(count for _, count in histogram)
        table([(f"{low:.2e}", f"{count:,}", ("#" * math.ceil(BAR * count / most)).ljust(BAR)) for low, count in histogram])


# -------------------------------------------------------------------------------------------------- a text


def token_bits(model, ids):
    """Bits of ids[1], ids[2], ...: of each token, given those before it in its window."""
    import torch

    import train_gpt

    cfg = model.cfg
    window, stride = (cfg.score_window, cfg.score_stride) if cfg.attention_window else (cfg.train_seq_len, max(1, cfg.train_seq_len // 4))
    ids, bits = torch.tensor(ids), []
    for begin, first in zip(*map(list, train_gpt.window_plan(len(ids) - 1, window, stride)), strict=True):
        part = ids[begin : begin + window + 1][None]
        with torch.no_grad():
            nats = train_gpt.score_windows(model, part[:, :-1], part[:, 1:], part.size(1) - 1 - int(first), model.temperature)
        bits += (nats[0].double() / math.log(2)).tolist()
    return bits


def coloured(text, bits):
    """The text on a background that says how many bits it cost."""
    background, foreground = next((b, f) for least, b, f in reversed(COLOURS) if bits >= least)
    return "\n".join(f"\x1b[48;5;{background}m\x1b[38;5;{foreground}m{shown(line)}\x1b[0m" if line else "" for line in text.split("\n"))


def units(tokenizer, ids, bits):
    """(text, bits) of what can be shown: a token, or the byte tokens of a character together."""
    pairs = zip(ids, bits, strict=True)
    for is_bytes, run in itertools.groupby(pairs, key=lambda pair: tokenizer.pieces.is_byte(pair[0])):
        run = list(run)
        if is_bytes:
            data = bytes(int(tokenizer.pieces.id_to_piece(i)[3:5], 16) for i, _ in run)
            yield data.decode(errors="replace"), max(b for _, b in run)
        else:
            yield from ((tokenizer.pieces.id_to_piece(i).replace("\u2581", " "), b) for i, b in run)


def show_text(loaded, tokenizer, text):
    ids = tokenizer.document(text)
    if len(ids) < 2:
        raise UserError(f"{len(ids)} token; expected text of at least 2")
    bits = token_bits(loaded.model, ids)
    if sys.stdout.isatty() and not os.environ.get("NO_COLOR"):
        print("".join(coloured(part, cost) for part, cost in units(tokenizer, ids[1:], bits)))
        print("bits: " + " ".join(coloured(f" {least}.. ", least) for least, _, _ in COLOURS))
    else:
        for token, cost in zip(ids[1:], bits, strict=True):
            print(f"{cost:.3f}\t{tokenizer.pieces.id_to_piece(token)}")
    size = len(text.encode())
    total = sum(bits)
    each = f"{total / len(bits):.3f} a token, {total / size:.4f} a byte"
    print(f"inspect_artifact.py: {len(bits):,} tokens of {size:,} bytes: {total:,.1f} bits, {each}", file=sys.stderr)


# -------------------------------------------------------------------------------------------------- two artifacts


def show_difference(a, b):
    """Settings, bytes by stream, and for each parameter the codes that differ and how far the weights are apart."""
    import train_gpt

    if a.blob == b.blob:
        say(f"{a.path} and {b.path}: the same {len(a.blob):,} bytes")
        return
    containers = [train_gpt.read_container(loaded.blob) for loaded in (a, b)]
    own = [loaded.cfg.model_settings() | {"codec": c.codec, "temperature": f"{c.temperature:.6g}"} for loaded, c in zip((a, b), containers, strict=True)]
    table([("setting", "A", "B"), *((k, own[0][k], own[1][k]) for k in own[0] if own[0][k] != own[1][k])])
    say()
    sizes = zip(train_gpt.STREAMS, *(map(len, c.streams) for c in containers), strict=True)
    rows = [*sizes, ("all", len(a.blob), len(b.blob))]
    table([("bytes", "A", "B", "B - A"), *((name, f"{x:,}", f"{y:,}", f"{y - x:+,}") for name, x, y in rows)])
    say()
    ours, theirs = ({name: (w, kind) for name, w, kind, _ in parameters(loaded)} for loaded in (a, b))
    table([("parameter", "codes or values that differ", "distance"),
           *((name, *distance(ours.get(name), theirs.get(name))) for name in dict.fromkeys((*ours, *theirs)))])  # fmt: skip


def distance(a, b):
    """(share of the codes, or of the values where there are no codes, that differ; norm of the difference over A's norm)."""
    if a is None or b is None:
        return f"only in {'B' if a is None else 'A'}", "-"
    (x, kind), (y, _) = a, b
    if x.shape != y.shape:
        return f"{' x '.join(map(str, x.shape))} and {' x '.join(map(str, y.shape))}", "-"
    codes = (x.sign() != y.sign()) if kind == "ternary" else (x != y)
    share = f"{100 * float(codes.float().mean()):.1f} %" if x.numel() else "none"
    return share, f"{float((x - y).norm() / x.norm().clamp_min(1e-30)):.3f}" if x.numel() else "-"


def parse_arguments(argv):
    parser = OneLineParser(__doc__)
    parser.add_argument("artifact", metavar="FILE", nargs="?")
    parser.add_argument("--text", metavar="FILE", help="show what each token of this text costs")
    parser.add_argument("--tokenizer", metavar="MODEL", help="the SentencePiece model (found by itself where the run has it)")
    parser.add_argument("--diff", nargs=2, metavar=("A", "B"), help="what differs between two artifacts")
    options = parser.parse_args(argv)
    if (options.artifact is None) == (options.diff is None):
        parser.error("expected FILE, or --diff A B")
    if options.text is None and options.tokenizer is not None or options.diff and options.text is not None:
        parser.error("--tokenizer belongs to --text, and --text to FILE")
    return options


def main(argv=None):
    options = parse_arguments(argv)
    return run_command(lambda: inspect(options), UserError)


def inspect(options):
    if options.diff:
        show_difference(*map(load_model, options.diff))
    elif options.text is not None:
        text, loaded = read_text(options.text), load_model(options.artifact)
        show_text(loaded, load_tokenizer(loaded, options.tokenizer), text)
    else:
        show_artifact(load_model(options.artifact))


if __name__ == "__main__":
    start(main)
