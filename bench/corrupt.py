"""Damage artifacts in every way we can think of and load each: only clean errors may come of it.

    python bench/corrupt.py                   100,000 damaged artifacts and 10,000 forged ones, on all cores
    python bench/corrupt.py --count 2000 --forged 200

*Damaged* artifacts are truncated, extended, changed in bits or ranges, or foreign bytes; or they carry a matching SHA-256 and have
swapped streams, streams of another model, wrong lengths or a header that lies about the model. Each must raise ArtifactError.
*Forged* ones have bits changed inside one stream and a new, matching SHA-256. Few of those decode to another valid model, as a
forger's own model would; the rest must raise ArtifactError. Nothing else may be raised, no code may run (Python's audit events
exec, compile, import and process creation), and the process may never hold more than `most_bytes` more than before: twice the
float32 model and 8 MiB (Linux's VmHWM, reset before each load).
"""

from __future__ import annotations

import argparse
import collections
import functools
import hashlib
import multiprocessing
import os
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

from command_line import OneLineParser  # noqa: E402


def parse_arguments() -> argparse.Namespace:
    parser = OneLineParser(__doc__)
    parser.add_argument("--count", type=int, default=100_000, help="damaged artifacts (default: %(default)s)")
    parser.add_argument("--forged", type=int, default=10_000, help="forged artifacts (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    for name, least in (("count", 0), ("forged", 0), ("workers", 1), ("seed", 0)):
        if getattr(args, name) < least:
            parser.error(f"--{name} {getattr(args, name)}: expected at least {least}")
    return args


if __name__ == "__main__":
    parse_arguments()  # -h and mistakes are answered before PyTorch is imported, which takes seconds

import numpy as np  # noqa: E402
import torch  # noqa: E402
from fuzz_loaders import most_memory  # noqa: E402

import train_gpt as t  # noqa: E402

SETTINGS = {
    "VOCAB_SIZE": "1024", "NUM_LAYERS": "2", "MODEL_DIM": "384", "NUM_HEADS": "4", "NUM_KV_HEADS": "2", "EMBED_DIM": "64", "YARN_MAX_LEN": "64",
    "TRAIN_SEQ_LEN": "32", "TRAIN_BATCH_TOKENS": "32", "SLIDING_EVAL_STRIDE": "8", "BITNET_GROUP_SIZE": "32",
}  # fmt: skip
FORBIDDEN = ("exec", "compile", "import", "os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "pickle.find_class")
# what lies about the model; each value differs from the true one and from what the streams hold
LIES = [
    "NUM_LAYERS=3", "NUM_LAYERS=5", "NUM_LAYERS=256", "NUM_LAYERS=1000", "NUM_LAYERS=99999999999", "MODEL_DIM=768", "MODEL_DIM=65536", "NUM_KV_HEADS=4", "NUM_HEADS=3",
    "MLP_MULT=64", "EMBED_DIM=0", "EMBED_DIM=65536", "VOCAB_SIZE=2048", "VOCAB_SIZE=65536", "VOCAB_SIZE=-1", "BITNET_GROUP_SIZE=64",
    "BITNET_GROUP_SIZE=0", "SCALE_GROUP=row", "SCALE_STORAGE=fp16", "FP_STORAGE=FP16", "FP_STORAGE=INT5", "TRAIN_SEQ_LEN=1000000000", "codec=zip",
    "temperature=nan", "temperature=1e30", "ACTIVATION=__import__('os').system('id')", "ROPE_BASE=inf", "LOGIT_SOFTCAP=-1",
]  # fmt: skip


def build(seed: int, codec: str, **settings: str) -> bytes:
    """The artifact of a model with weights as after training."""
    torch.manual_seed(seed)
    model = t.GPT(t.Config.from_env(SETTINGS | settings | {"ARTIFACT_CODEC": codec}))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.05)
    return t.save_artifact(model, model.cfg)


@functools.cache
def parts(blob: bytes) -> tuple[bytes, list[bytes]]:
    """Header text and streams."""
    length = t.ARTIFACT_PREFIX.unpack_from(blob)[2]
    return blob[t.ARTIFACT_PREFIX.size :][:length], t.read_container(blob).streams


def sealed(header: bytes, streams: list[bytes], lengths: list[int] | None = None) -> bytes:
    """An artifact with a matching SHA-256."""
    body = header + t.STREAM_LENGTHS.pack(*(lengths or map(len, streams))) + b"".join(streams)
    return t.ARTIFACT_PREFIX.pack(t.ARTIFACT_MAGIC, t.ARTIFACT_VERSION, len(header), hashlib.sha256(body).digest()) + body


def flip(data: bytes, rng: np.random.Generator, most: int = 8) -> bytes:
    """One to `most` bits changed."""
    changed = bytearray(data)
    for bit in set(rng.integers(8 * len(data), size=rng.integers(1, most + 1)).tolist()):
        changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def overwrite(data: bytes, rng: np.random.Generator) -> bytes:
    start, size = int(rng.integers(len(data))), int(rng.integers(1, 65))
    return data[:start] + (new if (new := rng.bytes(len(data[start : start + size]))) != data[start : start + size] else b"?") + data[start + size :]


def lie(header: bytes, rng: np.random.Generator) -> bytes:
    """The header with one untrue line."""
    text = str(rng.choice(LIES))
    name = text.split("=")[0].encode()
    return b"\n".join(text.encode() if line.split(b"=")[0] == name else line for line in header.split(b"\n"))


def swap(streams: list[bytes], rng: np.random.Generator) -> list[bytes]:
    order = rng.permutation(4)
    return swap(streams, rng) if (order == np.arange(4)).all() else [streams[i] for i in order]


def transplant(streams: list[bytes], others: list[bytes], rng: np.random.Generator) -> list[bytes]:
    i = int(rng.integers(4))
    return [*streams[:i], others[i], *streams[i + 1 :]]


def wrong_lengths(streams: list[bytes], rng: np.random.Generator) -> list[int]:
    lengths = [len(s) for s in streams]
    i, j = rng.permutation(4)[:2]
    by = int(rng.integers(1, 200))
    return [n + by * (k == i) - min(by, lengths[j]) * (k == j) for k, n in enumerate(lengths)]


def damaged(blob: bytes, other: bytes, rng: np.random.Generator) -> tuple[str, bytes]:
    """(kind, artifact): one damage drawn at random."""
    (header, streams), foreign = parts(blob), parts(other)[1]
    makers = {
        "truncated": lambda: blob[: int(rng.integers(len(blob)))],
        "extended": lambda: blob + rng.bytes(int(rng.integers(1, 1000))),
        "bits flipped": lambda: flip(blob, rng),
        "range overwritten": lambda: overwrite(blob, rng),
        "foreign bytes": lambda: t.ARTIFACT_MAGIC * int(rng.integers(2)) + rng.bytes(int(rng.integers(2000))),
        "streams swapped, sealed": lambda: sealed(header, swap(streams, rng)),
        "stream of another model, sealed": lambda: sealed(header, transplant(streams, foreign, rng)),
        "stream cut, sealed": lambda: sealed(header, [s[: int(rng.integers(len(s)))] if k == cut else s for k, s in enumerate(streams)]),
        "lengths wrong, sealed": lambda: sealed(header, streams, wrong_lengths(streams, rng)),
        "lying header, sealed": lambda: sealed(lie(header, rng), streams),
    }
    cut, kind = int(rng.integers(4)), str(rng.choice(list(makers)))
    return kind, makers[kind]()


def forged(blob: bytes, rng: np.random.Generator) -> tuple[str, bytes]:
    """(kind, artifact): bits of one stream changed under a new SHA-256."""
    (header, streams), i = parts(blob), int(rng.integers(4))
    changed = [flip(s, rng) if k == i else s for k, s in enumerate(streams)]
    return f"bits flipped in {t.STREAMS[i]}, sealed", sealed(header, changed)


def most_bytes(model_bytes: int) -> int:
    """What loading may take of memory, for a model of so many bytes in float32: the model, its symbols, what decodes them (a byte or
    two a weight each), and what does not grow with it: the coder's tables and lanes, pages of the allocator."""
    return 2 * model_bytes + (8 << 20)


def attempt(blob: bytes) -> tuple[str, int]:
    """What loading gives ("error", "valid model", or the name of what should not happen) and the bytes it took at most."""

    def load() -> str:
        try:
            t.load_artifact(blob)
        except t.ArtifactError:
            return "error"
        except BaseException as error:
            return f"{type(error).__name__}: {error}"
        return "valid model"

    EVENTS.clear()
    outcome, taken = most_memory(load)
    return f"events {sorted(EVENTS)}" if EVENTS else outcome, taken


EVENTS: set[str] = set()
CODECS = ("ans", "base3", "bitmask", "2bit", "int8_zstd")  # every packing and every compressor


def worker(job: tuple[int, int, int]) -> tuple[collections.Counter, dict[str, int]]:
    """(seed, damaged, forged artifacts) -> ((group, kind, outcome) -> number, kind -> most bytes)."""
    seed, *counts = job
    torch.set_num_threads(1)
    rng = np.random.default_rng(seed)
    blobs = [build(seed, codec) for codec in CODECS]
    other = [build(seed, codec, NUM_LAYERS="1", VOCAB_SIZE="1000") for codec in CODECS]  # no stream as long as the true one
    for blob in blobs + other:
        t.load_artifact(blob)  # imports and first allocations
    sys.addaudithook(lambda event, _: EVENTS.add(event) if event in FORBIDDEN else None)
    outcomes, most = collections.Counter(), collections.Counter()
    for group, count in zip(("damaged", "forged"), counts, strict=True):
        for _ in range(count):
            k = int(rng.integers(len(blobs)))
            kind, blob = damaged(blobs[k], other[k], rng) if group == "damaged" else forged(blobs[k], rng)
            outcome, taken = attempt(blob)
            outcomes[group, kind, outcome] += 1
            most[kind] = max(most[kind], taken)
    return outcomes, most


def main() -> int:
    args = parse_arguments()
    model_bytes = 4 * t.Layout(t.GPT(t.Config.from_env(SETTINGS))).params
    shares = [(args.seed + i, *(len(range(i, n, args.workers)) for n in (args.count, args.forged))) for i in range(args.workers)]
    outcomes, most, start = collections.Counter(), collections.Counter(), time.perf_counter()
    with multiprocessing.get_context("spawn").Pool(args.workers) as pool:
        for found, peak in pool.imap_unordered(worker, shares):
            outcomes += found
            for kind in peak:
                most[kind] = max(most[kind], peak[kind])
    print(f"model: {model_bytes:,} bytes in float32; {time.perf_counter() - start:.0f} s\n\n| group | kind | outcome | artifacts | most memory / model |\n|---|---|---|---|---|")
    for (group, kind, outcome), number in sorted(outcomes.items()):
        print(f"| {group} | {kind} | {outcome} | {number} | {most[kind] / model_bytes:.2f} |")
    bad = sum(n for (group, _, outcome), n in outcomes.items() if outcome != "error" and (group, outcome) != ("forged", "valid model"))
    greedy = [kind for kind in most if most[kind] > most_bytes(model_bytes)]
    bound = f"{most_bytes(model_bytes):,} bytes (twice the model and 8 MiB)"
    print(f"\n{bad} unexpected outcomes; kinds that took more than {bound}: {greedy or 'none'}")
    return int(bool(bad or greedy))


if __name__ == "__main__":
    sys.exit(main())
