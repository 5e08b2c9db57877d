"""Loaders of what comes from strangers, as targets of bench/fuzz.py: whatever the bytes are, a documented error or a value.

A target has seeds (whole files), a `seal` that makes lengths and SHA-256 match again, so that what lies behind them is reached, and
a `load`. An input may raise nothing but the target's own errors, take no more than HANG_S of processor time and MEMORY, and run
nothing (Python's audit events); one that took longer is tried once more. Half of the inputs are changed where the format has a structure:
keys and values of JSON, lines, numbers; the others as bytes. These draws know nothing of the code: `guided` is what follows the
lines that are reached (atheris: libFuzzer with Python's bytecode instrumented), with the same changes as its mutations.
"""

from __future__ import annotations

import codecs
import contextlib
import copy
import ctypes
import dataclasses
import functools
import hashlib
import io
import json
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

HANG_S = 1.0  # of processor time: a machine that is busy with something else is no hang
FORBIDDEN = ("exec", "import", "os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen", "pickle.find_class", "socket.connect")
EVENTS: set[str] = set()  # audit events of the input under way


class Failure(Exception):
    """What an input did that it may not."""


class Slow(Failure):
    """More than HANG_S."""


class Memory(NamedTuple):
    """The most that a loader takes: a constant, and a multiple of the file's bytes."""

    constant: int
    factor: float

    def bound(self, size: int) -> float:
        return self.constant + self.factor * size


@dataclasses.dataclass
class Target:
    """A loader and what it is fed with."""

    name: str
    seeds: list[bytes]
    load: Callable[[bytes], object]
    errors: tuple[type[BaseException], ...]
    memory: Memory
    seal: Callable[[bytes], bytes] = bytes
    rewrite: Callable[[bytes, np.random.Generator], bytes] | None = None  # a change of what the format consists of


# -------------------------------------------------------------------------------------------------- one input


@contextlib.contextmanager
def no_hang() -> Iterator[None]:
    def stop(*_: object) -> None:
        raise Slow(f"hangs: more than {HANG_S:g} s of processor time")

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, HANG_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def resident(field: str) -> int:
    """Bytes of VmRSS or VmHWM."""
    text = Path("/proc/self/status").read_text()
    return 1024 * int(text.split(field + ":")[1].split()[0])


def most_memory(function: Callable[[], Any], slack: int = 0) -> tuple[Any, int]:
    """(what it returns, by how much the process was above the memory that it held before: too much by `slack` at most).

    With a slack the peak of earlier calls is kept as long as it is no higher than that: setting it back takes a millisecond.
    """
    if resident("VmHWM") - resident("VmRSS") > slack or not slack:
        ctypes.CDLL(None).malloc_trim(0)  # what earlier calls freed would hide what this one takes
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM = VmRSS
    before = resident("VmRSS")
    return function(), resident("VmHWM") - before


def audit(event: str, arguments: tuple) -> None:
    if event in FORBIDDEN:
        EVENTS.add(f"{event} {arguments[0]!r:.80}")


def attempt(target: Target, data: bytes) -> str:
    """What came of one input: "loaded" or the error's class; Failure for anything else."""

    def call() -> str:
        try:
            with no_hang(), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                target.load(data)
        except target.errors as error:
            if "\n" in str(error) or not str(error).strip():
                raise Failure(f"an error that is not one line: {str(error)!r:.200}") from None
            return type(error).__name__
        return "loaded"

    EVENTS.clear()
    began = time.process_time()
    outcome, taken = most_memory(call, target.memory.constant // 2)
    if (spent := time.process_time() - began) > HANG_S:
        raise Slow(f"hangs: {spent:.1f} s of processor time")
    if EVENTS:
        raise Failure(f"runs something: {sorted(EVENTS)}")
    if taken > target.memory.bound(len(data)):
        raise Failure(f"takes {taken:,} bytes for a file of {len(data):,}, more than {target.memory.bound(len(data)):,.0f}")
    return outcome


# -------------------------------------------------------------------------------------------------- changes

NUMBERS = (0, 1, -1, 2, 127, 128, 255, 256, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1)
WORDS = (
    b"null", b"true", b"[]", b"{}", b'""', b"NaN", b"Infinity", b"-1", b"0", b"1e999", b"9" * 25, b"9" * 5000, b"[" * 3000, b'{"a":' * 3000, b"\x00",
    b"\xff", b"\xed\xa0\x80", b"\\ud800", b"\xef\xbb\xbf", b"\r\n", b"\x85", b"../..", b"/dev/zero", b"%s", b"__import__('os')", b"step:1/1 loss:nan t:0ms",
)  # fmt: skip
DEEP, LONG = "@deep@", "@long@"  # become nested lists and a number of many digits in the JSON text
VALUES = (
    None, True, False, 0, 1, -1, 2**31, 2**63, 2**70, -(2**63), 0.5, 1e308, -1e-308, float("nan"), float("inf"), "", "x", "0", "nan", "\x00", "\ud800", "a\nb",
    "x" * 5000, "../../x", "/", [], {}, [[]], {"": None}, [None], [0, 1, 2], {"a": {"b": 1}}, DEEP, LONG,
)  # fmt: skip


def change_bytes(data: bytes, rng: np.random.Generator, other: bytes) -> bytes:
    """Bits, numbers, ranges, words; cut, extended, or spliced with another file."""
    out = bytearray(data)
    at = int(rng.integers(len(out) + 1)) if rng.random() < 0.5 else min(len(out), int(rng.exponential(40)))  # headers come first
    size = int(rng.integers(1, 65))
    kind = int(rng.integers(9))
    if kind == 0:
        for bit in rng.integers(8 * max(1, len(out)), size=rng.integers(1, 9)).tolist():
            out[bit // 8 : bit // 8 + 1] = bytes([out[bit // 8] ^ 1 << bit % 8]) if bit // 8 < len(out) else b""
    elif kind == 1:
        out[at : at + size] = rng.bytes(size)
    elif kind == 2:
        width = int(rng.choice([1, 2, 4, 8]))
        out[at : at + width] = (NUMBERS[rng.integers(len(NUMBERS))] % 256**width).to_bytes(width, "little")
    elif kind == 3:
        out[at : at + int(rng.choice([0, size]))] = WORDS[rng.integers(len(WORDS))]
    elif kind == 4:
        del out[at : at + size]
    elif kind == 5:
        out[at:at] = out[at : at + size * 8]
    elif kind == 6:
        del out[at:]
    elif kind == 7:
        out += rng.bytes(size * 16)
    else:
        out[at:] = other[int(rng.integers(len(other) + 1)) :]
    return bytes(out)


def levels(root: Any) -> list[list[tuple[Any, Any]]]:
    """(parent, key) of everything inside a JSON value, by depth."""
    found, parents = [], [root]
    while True:
        level = [(p, key) for p in parents for key in (p if isinstance(p, dict) else range(len(p)) if isinstance(p, list) else ())]
        if not level:
            return found
        found.append(level)
        parents = [p[key] for p, key in level]


def change_json(text: bytes, rng: np.random.Generator) -> bytes:
    """One or two values replaced, dropped, exchanged or put under another key."""
    try:
        root = json.loads(text)
        json.dumps(root)
    except (ValueError, RecursionError):
        return text
    for _ in range(rng.integers(1, 3)):
        value, kind, found = copy.deepcopy(VALUES[rng.integers(len(VALUES))]), rng.random(), levels(root)
        if not found or kind < 0.03:
            root = value
            continue
        level = found[rng.integers(len(found))]  # near the root as often as in a long list
        parent, key = level[rng.integers(len(level))]
        if kind < 0.15:
            del parent[key]
        elif kind < 0.25 and isinstance(parent, dict):
            parent[key + "x"] = parent.pop(key)
        elif kind < 0.35 and isinstance(parent, list):
            parent.insert(key, value)
        else:
            parent[key] = value
    out = json.dumps(root).replace(json.dumps(DEEP), "[" * 2000 + "]" * 2000).replace(json.dumps(LONG), "9" * 6000)
    return out.encode()


def change(target: Target, rng: np.random.Generator) -> bytes:
    """A seed, changed once to three times, and mostly sealed again."""
    data = target.seeds[rng.integers(len(target.seeds))]
    for _ in range(rng.integers(1, 4)):
        if target.rewrite and rng.random() < 0.5:
            data = target.rewrite(data, rng)
        else:
            data = change_bytes(data, rng, target.seeds[rng.integers(len(target.seeds))])
    return target.seal(data) if rng.random() < 0.9 else data


# -------------------------------------------------------------------------------------------------- targets

TINY = {
    "VOCAB_SIZE": "324", "NUM_LAYERS": "1", "MODEL_DIM": "32", "NUM_HEADS": "4", "NUM_KV_HEADS": "2", "MLP_MULT": "2", "EMBED_DIM": "8",
    "BITNET_GROUP_SIZE": "32", "TRAIN_SEQ_LEN": "32", "YARN_MAX_LEN": "64", "TRAIN_BATCH_TOKENS": "256", "ITERATIONS": "2", "WARMUP_STEPS": "0",
    "MAX_WALLCLOCK_SECONDS": "0", "SLIDING_EVAL_STRIDE": "16", "VAL_BATCH_SIZE": "1024", "TEMP_SCALING": "0",
}  # fmt: skip
CODECS = ("ans", "base3", "bitmask", "2bit", "int8_zstd")  # every packing and every compressor
MB = 1 << 20


class Place:
    """A folder with a tiny data set (shards, tokenizer, manifest), and what writes an input there to be loaded."""

    def __init__(self, folder: Path) -> None:
        import torch

        import train_gpt

        torch.set_num_threads(1)
        self.t, self.folder, self.data = train_gpt, folder, folder / "data"
        self.env = TINY | {"DATA_PATH": str(self.data), "TOKENIZER_PATH": str(self.data / "tokenizer.model"), "LOG_DIR": str(folder / "logs"),
                           "ARTIFACT_PATH": str(folder / "model.ptz"), "CHECKPOINT_DIR": str(folder / "checkpoints")}  # fmt: skip
        words = "the of and to in a is that for it as was with be by on not he".split()
        documents = [" ".join(words[i % 7 :] + words[: i % 11]) + f" {i}." for i in range(80)]
        (folder / "a.jsonl").write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
        import prepare_data

        arguments = ["text", str(folder / "a.jsonl"), "--vocab-size", "324", "--out", str(self.data), "--val-fraction", ".1", "--workers", "1"]
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            if prepare_data.main(arguments):
                raise Failure("no data to work with")

    def config(self, **settings: object) -> Any:
        return self.t.Config.from_env(self.env | {key.upper(): str(value) for key, value in settings.items()})

    def file(self, name: str, data: bytes) -> Path:
        path = self.folder / name
        path.write_bytes(data)
        return path


def artifact(place: Place) -> Target:
    import torch

    t = place.t

    def seal(data: bytes) -> bytes:
        if len(data) < t.ARTIFACT_PREFIX.size:
            return data
        _, version, length, _ = t.ARTIFACT_PREFIX.unpack_from(data)
        body = data[t.ARTIFACT_PREFIX.size :]
        return t.ARTIFACT_PREFIX.pack(data[:4], version, length, hashlib.sha256(body).digest()) + body

    def rewrite(data: bytes, rng: np.random.Generator) -> bytes:
        """A line of the header with another value, or the lengths of the streams."""
        magic, version, length, digest = t.ARTIFACT_PREFIX.unpack_from(data.ljust(t.ARTIFACT_PREFIX.size, b"\0"))
        body = data[t.ARTIFACT_PREFIX.size :]
        lines = body[:length].split(b"\n")
        i = int(rng.integers(len(lines)))
        value = (*WORDS[:14], b"2", b"3", b"64", b"65536", b"99999999", b"1e-300", b"0.5", b"int8_lzma", b"FP16", b"row", b"none")[rng.integers(25)]
        lines[i] = lines[i].partition(b"=")[0] + b"=" + value
        header = b"\n".join(lines)
        return t.ARTIFACT_PREFIX.pack(magic, version, min(len(header), 65535), digest) + header + body[length:]

    seeds = []
    for codec in CODECS:
        torch.manual_seed(0)
        model = t.GPT(place.config(artifact_codec=codec))
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p) * 0.05)
        seeds.append(t.save_artifact(model, model.cfg))
    return Target("artifact", seeds, t.load_artifact, (t.ArtifactError,), Memory(8 * MB, 2 * t.LARGEST_EXPANSION), seal, rewrite)


def sealed_checkpoint(data: bytes) -> bytes:
    """With the SHA-256 of what comes before it."""
    return data[:-32] + hashlib.sha256(data[:-32]).digest() if len(data) > 32 else data


class Quiet:
    """A Log that writes nothing."""

    path = Path("quiet.txt")

    def __call__(self, *_: object) -> None: ...

    warn = __call__

    def __init__(self, view: object) -> None:
        self.view = view


def checkpoints(place: Place) -> list[bytes]:
    """Of a plain run, and of one whose optimizer, averages and loss scale have a state too."""
    import torch

    t, found = place.t, []
    for i, more in enumerate(({}, STATEFUL)):
        cfg = place.config(**more, checkpoint_every=1, run_id=f"c{i}", checkpoint_dir=place.folder / f"c{i}")
        torch.manual_seed(0)
        t.train(t.GPT(cfg).use(t.fast_ops(cfg, torch.device("cpu"))), cfg, t.World(), Quiet(t.View()), None)
        found.append((Path(cfg.checkpoint_dir) / f"c{i}_00000001.ckpt").read_bytes())
    return found


STATEFUL = {"matrix_optimizer": "normuon", "ema": 1, "ema_start_fraction": 0, "precision": "fp16", "churn_log_every": 1}


def change_checkpoint(place: Place) -> Callable[[bytes, np.random.Generator], bytes]:
    prefix = place.t.CHECKPOINT_PREFIX

    def rewrite(data: bytes, rng: np.random.Generator) -> bytes:
        """The header's JSON with other values; its length is right."""
        magic, version, length = prefix.unpack_from(data.ljust(prefix.size, b"\0"))
        text = change_json(data[prefix.size :][:length], rng)
        return prefix.pack(magic, version, len(text)) + text + data[prefix.size + length :]

    return rewrite


def checkpoint(place: Place) -> Target:
    t = place.t
    # the file is mapped, and its tensors are copied
    memory = Memory(8 * MB, 4)
    load = lambda data: t.read_checkpoint(place.file("x.ckpt", data))
    return Target("checkpoint", checkpoints(place), load, (t.ArtifactError,), memory, sealed_checkpoint, change_checkpoint(place))


def resume(place: Place) -> Target:
    """RESUME=PATH, up to where the first step would be taken."""
    import torch

    t, path = place.t, place.folder / "x.ckpt"
    world = t.World()
    steps = []
    for more in ({}, STATEFUL):
        cfg = place.config(**more, resume=path)
        steps.append(t.TrainingStep(t.GPT(cfg).use(t.fast_ops(cfg, torch.device("cpu"))), cfg, world))

    def load(data: bytes) -> None:
        path.write_bytes(data)
        step = steps[b"hook.Averaging" in data]
        with t.rounded_once(step.model):
            loop = t.Loop(step.cfg, world, Quiet(t.View()))
            for hook in step.hooks:
                hook.begin(loop)

    return Target("resume", checkpoints(place), load, (t.UserError,), Memory(64 * MB, 8), sealed_checkpoint, change_checkpoint(place))


def shard(place: Place) -> Target:
    """A training shard, and reading past its end; tools read it too."""
    import shard_io

    t = place.t
    folder = place.folder / "shards"
    folder.mkdir()
    cfg = place.config(data_path=folder)

    def load(data: bytes) -> None:
        path = folder / "fineweb_train_000000.bin"
        path.write_bytes(data)
        with contextlib.suppress(shard_io.UserError):
            shard_io.read_shard(path)
        stream = t.TokenStream(cfg, "train")
        stream.read(stream.num_tokens - 1, 65)

    def seal(data: bytes) -> bytes:
        """With the length that the header states."""
        count = max(0, len(data) - 1024) // 2
        return data[:8] + count.to_bytes(4, "little") + data[12 : 1024 + 2 * count] if len(data) >= 1024 else data

    whole = next(place.data.glob("fineweb_train_*.bin")).read_bytes()
    return Target("shard", [whole[:1024] + whole[1024:5000], whole], load, (t.UserError,), Memory(4 * MB, 4), seal)


def manifest(place: Place) -> Target:
    """manifest.json as the trainer, the demo's table and the checks of data read it."""
    import check_data
    import demo_table
    import shard_io

    t = place.t
    # the tokenizer beside it is no input: reading it took two thirds of the time
    load_tokenizer, load_table = functools.cache(t.load_tokenizer), functools.cache(t.ByteTable.load)
    t.load_tokenizer, t.ByteTable.load = load_tokenizer, load_table
    folder = place.folder / "noted"
    folder.mkdir()
    for path in place.data.iterdir():
        (folder / path.name).symlink_to(path)
    whole = (place.data / "manifest.json").read_bytes()
    (folder / "manifest.json").unlink()
    (folder / "result").write_text('result {"val_bpb": 1.5, "val_bytes": 100}\n')
    cfg = place.config(data_path=folder, tokenizer_path=folder / "tokenizer.model")

    def load(data: bytes) -> None:
        path = folder / "manifest.json"
        path.write_bytes(data)
        with contextlib.suppress(shard_io.UserError, OSError):
            check_data.recorded_bytes(folder, check_data.check_manifest(folder))
        if demo_table.main([str(folder / "result"), "--manifest", str(path)]) not in (0, 2):
            raise Failure("demo_table.py: an exit code that is neither 0 nor 2")
        t.ValidationSet.load(cfg, t.World())

    return Target("manifest", [whole, b"{}"], load, (t.UserError,), Memory(8 * MB, 40), bytes, change_json)


def a_log(place: Place) -> bytes:
    """A log of the demo with a short program, and a few of its steps."""
    whole = sorted((ROOT / "logs").glob("R018_demo_seed*.txt"))[0].read_bytes()
    result = json.loads(whole.rpartition(b"\nresult ")[2])
    lines = [line for i, line in enumerate(whole[result["code_bytes"] :].split(b"\n")) if i < 20 or i % 50 == 0 or not line.startswith(b"step:")]
    code = b"import torch\n\ndef evaluate(model, x):\n    with torch.no_grad():\n        return model(x)\n"
    config = json.dumps(json.loads(next(line for line in lines if line.startswith(b"config "))[7:]) | {"data_path": str(place.data)}).encode()
    return code + b"\n".join(b"config " + config if line.startswith(b"config ") else line for line in lines)


def sealed_log(data: bytes) -> bytes:
    """The result line with the size and the SHA-256 of the code, which goes up to the line with the versions."""
    code = data[: data.find(b"\npython:") + 1] if b"\npython:" in data else data[: data.find(b"\nconfig ") + 1]
    before, found, after = data.rpartition(b"\nresult ")
    line, newline, rest = after.partition(b"\n")
    try:
        result = json.loads(line) | {"code_bytes": len(code), "code_sha256": hashlib.sha256(code).hexdigest()}
    except (ValueError, TypeError, RecursionError):
        return data
    return before + found + json.dumps(result).encode() + newline + rest


def change_log(data: bytes, rng: np.random.Generator) -> bytes:
    """The config or the result with other values; a line left out, repeated or moved; a number within one."""
    lines = data.split(b"\n")
    kind = rng.random()
    for name in (b"config ", b"result "):
        if kind < 0.35:
            at = [i for i, line in enumerate(lines) if line.startswith(name)]
            if at and rng.random() < 0.6:
                lines[at[-1]] = name + change_json(lines[at[-1]][len(name) :], rng)
    i, k = (int(rng.integers(len(lines))) for _ in "ik")
    if 0.35 <= kind < 0.75:
        numbers = [*re.finditer(rb"-?[0-9]+(\.[0-9]+)?", lines[i])]
        if numbers:
            m = numbers[rng.integers(len(numbers))]
            lines[i] = lines[i][: m.start()] + WORDS[rng.integers(len(WORDS))] + lines[i][m.end() :]
    elif kind < 0.85:
        del lines[i]
    elif kind >= 0.85:
        lines.insert(k, lines[i])
    return b"\n".join(lines)


def log(place: Place) -> Target:
    """A log as compliance.py, make_submission.py, plot_logs.py and demo_table.py read it."""
    import compliance
    import demo_table
    import make_submission
    import plot_logs
    import shard_io
    from run_logs import read_run

    identity = dict.fromkeys(("name", "blurb", "date"), None) | {"author": "a", "github_id": "b"}

    def load(data: bytes) -> None:
        path = place.file("x.txt", data)
        if (code := compliance.main([str(path), "--non-record"])) not in (0, 1, 2):
            raise Failure(f"compliance.py: exit code {code}")
        demo_table.main([str(path)])
        with contextlib.suppress(shard_io.UserError):
            curve = plot_logs.read_curve(path)
            plot_logs.points(curve, "time", "loss", 20), plot_logs.label([curve]), plot_logs.final_bpb(curve)
        runs = [read_run(path)]
        if not runs[0].is_evaluation:
            make_submission.json_text(make_submission.build_submission(runs, identity))

    return Target("log", [a_log(place)], load, (shard_io.UserError,), Memory(16 * MB, 100), sealed_log, change_log)


def submission(place: Place) -> Target:
    """The submission.json of a record to beat."""
    import compliance
    import shard_io

    load = lambda data: compliance.read_record(place.file("x.json", data))
    seeds = [(ROOT / "submission.json").read_bytes(), b'{"seed_results": {"1": {"val_loss": 3.1}, "2": {"val_loss": 3.2}}}']
    return Target("submission", seeds, load, (shard_io.UserError,), Memory(8 * MB, 40), bytes, change_json)


TARGETS = {make.__name__: make for make in (artifact, checkpoint, resume, shard, manifest, log, submission)}


class LoaderFuzzer:
    """Changed files through one loader."""

    def __init__(self, name: str, folder: Path) -> None:
        self.place = Place(folder)
        self.target = TARGETS[name](self.place)
        for encoding in ("utf-16-be", "utf-16-le", "utf-32-be", "utf-32-le", "utf-8-sig"):
            codecs.lookup(encoding)  # which json imports where a text looks like it
        for seed in self.target.seeds:  # imports and first allocations
            if (outcome := attempt_quietly(self.target, seed)) != "loaded":
                raise Failure(f"a seed of {name} is refused: {outcome}")
        sys.addaudithook(audit)

    def case(self, rng: np.random.Generator, number: int) -> Iterator[str]:
        """One input; yields what to count. That of a failure is kept."""
        data = change(self.target, rng)
        try:
            try:
                outcome = attempt(self.target, data)
            except Slow:  # a machine with ten busy processes spent 1.1 s on an input of 20 ms, once in 100,000
                outcome = attempt(self.target, data)
            yield outcome
        except BaseException:
            self.place.file(f"case {number}", data)
            raise


def guided(name: str, folder: Path, runs: int, seed: int) -> None:
    """atheris: inputs that reach new lines of the loaders are changed further. It ends the process; a failure is a file in `folder`."""
    import atheris

    with atheris.instrument_imports(include=[*INSTRUMENTED]):
        fuzzer = LoaderFuzzer(name, folder)
    target, corpus = fuzzer.target, folder / "corpus"
    corpus.mkdir()
    for i, data in enumerate(target.seeds):
        (corpus / str(i)).write_bytes(data)

    def change_further(data: bytes, most: int, number: int) -> bytes:
        rng = np.random.default_rng(number)
        if rng.random() < 0.5:
            return atheris.Mutate(data, most)
        return change(dataclasses.replace(target, seeds=[data, *target.seeds]), rng)[:most]

    most = 2 * max(map(len, target.seeds))
    words = [name, f"-runs={runs}", f"-seed={seed + 1}", f"-max_len={most}", "-len_control=0", "-rss_limit_mb=0", f"-artifact_prefix={folder}/", str(corpus)]
    atheris.Setup(words, lambda data: attempt(target, target.seal(data)) and None, custom_mutator=change_further)
    atheris.Fuzz()


INSTRUMENTED = ("train_gpt", "run_logs", "compliance", "make_submission", "plot_logs", "demo_table", "check_data")


def attempt_quietly(target: Target, data: bytes) -> str:
    """What loading gives, without limits."""
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            target.load(data)
    except target.errors as error:
        return str(error)
    return "loaded"


if __name__ == "__main__":
    from command_line import not_a_command

    not_a_command("bench/fuzz.py")
