"""Shared by the tests: a tiny model and its settings, synthetic shards, and ways to launch the script."""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import functools
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import forks
import numpy as np
import pytest
from left_out import pytest_deselected, pytest_terminal_summary, pytest_testnodedown  # noqa: F401

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools"), str(ROOT / "bench")]

import torch  # noqa: E402

if not torch.cuda.is_available():  # Triton reads it when it is imported; test_hardware_rows.py needs it, and skips without it
    os.environ.setdefault("TRITON_INTERPRET", "1")
with contextlib.suppress(ImportError):
    import triton  # noqa: E402, F401

import train_gpt  # noqa: E402

torch.set_num_threads(1)  # tests run beside each other on 2 cores, and small tensors gain nothing from threads

TINY = {
    "VOCAB_SIZE": "320", "NUM_LAYERS": "3", "MODEL_DIM": "64", "NUM_HEADS": "4", "NUM_KV_HEADS": "2", "MLP_MULT": "2", "EMBED_DIM": "24",
    "BITNET_GROUP_SIZE": "32", "TRAIN_SEQ_LEN": "32", "YARN_MAX_LEN": "64", "TRAIN_BATCH_TOKENS": "256", "ITERATIONS": "24",
    "WARMUP_STEPS": "1", "MAX_WALLCLOCK_SECONDS": "0", "SLIDING_EVAL_STRIDE": "8", "SLIDING_BATCH_SIZE": "64", "TRAIN_LOG_EVERY": "10",
    "VAL_BATCH_SIZE": "1024", "SEED": "7", "ARTIFACT_CODEC": "2bit",  # which takes a hundredth of what `auto` does
}  # fmt: skip


def write_shard(path: Path, tokens: np.ndarray, header: tuple[int, ...] | None = None) -> Path:
    """A shard in the published format; `header` replaces (magic, version, count)."""
    head = np.zeros(256, dtype="<i4")
    head[:3] = header or (20240520, 1, len(tokens))
    path.write_bytes(head.tobytes() + np.asarray(tokens).astype("<u2").tobytes())
    return path


def environment(data_dir: Path, **settings: object) -> dict[str, str]:
    """A run of the tiny model on the synthetic data, by the trainer's environment variables."""
    paths = {"DATA_PATH": str(data_dir), "TOKENIZER_PATH": str(data_dir / "tokenizer.model")}
    return TINY | paths | {key.upper(): str(value) for key, value in settings.items()}


FROM_OUTSIDE = {"PATH", "HOME", "LANG", "LD_LIBRARY_PATH", "VIRTUAL_ENV", "TMPDIR"}  # of the environment: all that a run is told


@pytest.fixture
def run_here(tmp_path, monkeypatch, capsys):
    """The script's `run` in this process and an empty folder, where a new process each would cost seconds: (exit code, out, err)."""

    def run(env: dict[str, str]) -> tuple[int, str, str]:
        capsys.readouterr()
        with monkeypatch.context() as m:
            m.chdir(tmp_path)
            for name in os.environ.keys() - FROM_OUTSIDE:
                m.delenv(name)
            for name, text in env.items():
                m.setenv(name, text)
            code = train_gpt.run([])
        return code, *capsys.readouterr()

    return run


def tiny_config(**settings: object) -> train_gpt.Config:
    return train_gpt.Config.from_env(TINY | {k.upper(): str(v) for k, v in settings.items()})


def fresh_model(cfg: train_gpt.Config) -> train_gpt.GPT:
    """A model as `main` makes it: it computes through what this machine does best. The plain operations: test_model.py."""
    return train_gpt.GPT(cfg).use(train_gpt.fast_ops(cfg, torch.device("cpu")))


def tiny_model(seed: int = 0, scale: float = 1.0, **settings: object) -> train_gpt.GPT:
    """A tiny model with every parameter away from its initial value, as after training."""
    torch.manual_seed(seed)
    model = fresh_model(tiny_config(**settings))
    with torch.no_grad():
        for _, _, p, role in train_gpt.parameter_owners(model):
            p.add_(torch.randn_like(p) * (0.1 if role.storage == "control" else 0.03) * scale)
    return model


def gpu_ops(cfg: train_gpt.Config) -> train_gpt.Ops:
    """A GPU's operations that do not need Triton, on any device: what a CPU has in 16 bits."""
    return train_gpt.fast_ops(dataclasses.replace(cfg, precision="bf16"), torch.device("cpu"))


def tokens(model: train_gpt.GPT, batch: int = 2, length: int = 0, seed: int = 0) -> torch.Tensor:
    """Random tokens (batch, length or that of a training sequence)."""
    torch.manual_seed(seed)
    return torch.randint(model.cfg.vocab_size, (batch, length or model.cfg.train_seq_len))


def train_steps(steps: int, **settings: object) -> tuple[train_gpt.GPT, list[float]]:
    """A fresh model after a few steps on random tokens, and the losses."""
    cfg, losses = tiny_config(**settings), []
    torch.manual_seed(0)
    model = fresh_model(cfg)
    with train_gpt.rounded_once(model):
        take_step = train_gpt.TrainingStep(model, cfg, train_gpt.World())
        for i in range(steps):
            x = tokens(model, 8, seed=i)
            take_step.take(x, x.roll(-1, 1))
            losses.append(take_step.grads.loss.item())
    return model, losses


TEXT = "The quick brown fox jumps over the lazy dog. Pack my box with five dozen liquor jugs! \u00e9\u00e0\u4e2d\u6587 \U0001f600 "


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"))


def make_data(folder: Path) -> Path:
    """Two train shards, a validation shard and a 320-piece SentencePiece model of some synthetic English."""
    import sentencepiece

    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("etaoinshrdlu"), rng.integers(2, 8))) for _ in range(300)]
    weights = 1 / np.arange(1, 301)
    documents = [" ".join(rng.choice(words, 60, p=weights / weights.sum())) + ". " + TEXT for _ in range(60)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(documents), model_prefix=str(folder / "tokenizer"), vocab_size=320, model_type="bpe", byte_fallback=True,
        pad_id=0, bos_id=1, eos_id=2, unk_id=3, add_dummy_prefix=False, character_coverage=0.98, minloglevel=2, num_threads=1,
    )  # fmt: skip
    sp = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    encoded = [[sp.bos_id(), *sp.encode(d)] for d in documents]
    for name, part in (("train_000000", encoded[:20]), ("train_000001", encoded[20:50]), ("val_000000", encoded[50:])):
        write_shard(folder / f"fineweb_{name}.bin", np.concatenate(part))
    return folder


def family(pid: int) -> list[int]:
    """A process and all that descend from it (on Linux): torchrun's workers lead sessions of their own."""
    children = Path(f"/proc/{pid}/task/{pid}/children")
    return [pid, *(p for child in (children.read_text().split() if children.exists() else []) for p in family(int(child)))]


def clean_env() -> dict[str, str]:
    return {k: v for k, v in os.environ.items() if k in FROM_OUTSIDE} | {"OMP_NUM_THREADS": "1"}


@functools.cache
def python() -> str:
    """What a script of the shell, or a program that starts others, calls as Python: see tests/forks.py."""
    folder = tempfile.mkdtemp(prefix="python ")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return forks.interpreter(Path(folder), clean_env())


def start(env: dict[str, str], cwd: Path, argv: list[str], out: int, err: int, *, fresh: bool = False) -> forks.Fork | subprocess.Popen:
    """`python *argv` as a process and a session of its own, its output to open files; with nothing of this process's environment but
    what says where things are. `fresh`: as a new interpreter, where a fork of one that has torch will not do."""
    if argv[0] != "-m" and not fresh and forks.can_fork(env):
        return forks.fork(argv, cwd, clean_env(), env, out, err, python())
    return subprocess.Popen([sys.executable, *argv], cwd=cwd, env=clean_env() | env, stdin=subprocess.DEVNULL, stdout=out, stderr=err, start_new_session=True)


def launch(env: dict[str, str], cwd: Path, processes: int = 1, timeout: float = 90, argv: list[str] | None = None, *, torchrun: bool = False,
           fresh: bool = False) -> subprocess.CompletedProcess:  # fmt: skip
    """Run train_gpt.py as a process of its own, or as several with what torchrun says to each, or under torchrun itself; at the timeout
    all end with their children."""
    script = argv or [str(ROOT / "train_gpt.py")]
    if torchrun:
        script, processes = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", *script], 1
        env = env | {"PYTHON_EXEC": python()}  # what it starts its processes with
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        ranks = of_ranks(processes) if processes > 1 else [{}]
        code = end_of([start(env | own, cwd, script, out.fileno(), err.fileno(), fresh=fresh) for own in ranks], timeout)
        out.seek(0)
        err.seek(0)
        done = subprocess.CompletedProcess(script, code, out.read().decode(), err.read().decode())
    assert code is not None, f"timed out after {timeout} s\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    return done


class Running:
    """A script that was started: its process, what it has printed, and how it ends. After `limit_s` seconds it is killed."""

    def __init__(self, env: dict[str, str], cwd: Path, argv: list[str] | None = None, limit_s: float = 90) -> None:
        reader, writer = os.pipe()
        self.stdout, self._err = open(reader), tempfile.TemporaryFile()
        self.child = start(env, cwd, argv or [str(ROOT / "train_gpt.py")], writer, self._err.fileno())
        os.close(writer)
        self._limit = threading.Timer(limit_s, kill_family, [self.child.pid])
        self._limit.start()

    def __enter__(self) -> Running:
        return self

    def __exit__(self, *_: object) -> None:
        self._limit.cancel()
        self.stdout.close()
        self._err.close()
        if self.child.poll() is None:
            kill_family(self.child.pid)

    def until(self, start: str) -> None:
        """Read up to the first line that starts so."""
        for line in self.stdout:
            if line.startswith(start):
                return
        raise AssertionError(f"it ended without a line {start}\n{self.end()}")

    def end(self) -> tuple[int, str]:
        """(exit code, what it wrote to standard error), once it has ended."""
        if not self.stdout.closed:
            self.stdout.read()
        code = self.child.wait()
        self._err.seek(0)
        return code, self._err.read().decode()


def kill_family(pid: int) -> None:
    for each in family(pid):
        with contextlib.suppress(ProcessLookupError):
            os.kill(each, signal.SIGKILL)


def of_ranks(count: int) -> list[dict[str, str]]:
    """What torchrun says to each of `count` processes."""
    while True:
        port = random.SystemRandom().randrange(10_000, 32_000)  # below those that the system gives to whoever asks for any
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            break
    same = {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [{k: str(v) for k, v in (same | {"RANK": rank, "LOCAL_RANK": rank}).items()} for rank in range(count)]


def end_of(children: list[forks.Fork | subprocess.Popen], timeout: float) -> int | None:
    """The exit code of the first that fails, after which the others are ended, as torchrun does; else 0. None: at the timeout they and
    their children were killed."""
    until = time.monotonic() + timeout
    try:
        while len(children) > 1 and time.monotonic() < until:
            codes = [child.poll() for child in children]
            if any(codes):
                for child in children:
                    child.send_signal(signal.SIGTERM)
                break
            if None not in codes:
                break
            time.sleep(0.02)
        ended = [child.wait(max(0.1, until - time.monotonic())) for child in children]
    except subprocess.TimeoutExpired:
        for child in children:
            kill_family(child.pid)
        return None
    return next(filter(None, codes if len(children) > 1 else ended), 0)


WORKER = """
import importlib, json, os, sys
sys.path[:0] = [{root!r}, {tests!r}, {root!r} + "/bench", {root!r} + "/tools"]
from train_gpt import World

world = World.from_env()
results = []
for name in {functions}:
    module, function = name.split(".")
    results.append(getattr(importlib.import_module(module), function)(world))
if world.is_main:
    print("results " + json.dumps(results), flush=True)
world.close()
if world.size > 1:
    os._exit(0)  # as train_gpt.py ends
"""


def on_processes(count: int, cwd: Path, *functions: str) -> list:
    """What functions of the test files ("file.function", each takes its World) return on rank 0 of several processes; no assertion
    may fail on any of them."""
    script = cwd / "worker.py"
    script.write_text(WORKER.format(root=str(ROOT), tests=str(ROOT / "tests"), functions=functions))
    done = launch({}, cwd, count, argv=[str(script)], timeout=180)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.rpartition("results ")[2])
