"""Does one checkout's train_gpt.py compute what another's computes, to the last bit? Exit code 1 if it does not.

    python bench/same.py OLD NEW                    # folders with train_gpt.py and configs/
    python bench/same.py OLD NEW --only preset codec  # the cases with one of these words in their names
    python bench/same.py OLD --fill                 # OLD's results into the cache
    python bench/same.py --list                     # the names of all cases

Every case is a whole run of train_gpt.py on a CPU with one thread, tiny, on synthetic data: presets (OLD's, as settings
in the environment, so that a default changed in NEW shows), options, and two processes. A row of the table says what is
the same:

    losses     the loss of every step
    scores     bits per byte, chunked, reloaded and sliding, the temperature, counts: all of the result but times
    log        numbers of the log's lines: losses, validations on the way, churn, loss scales, epochs
    artifact   its bytes; "header": only the header's text differs (that too is a difference, --header-may-differ aside)
    loaded     NEW reads OLD's artifact: SHA-256 of all parameters in order, and the model's settings
    evaluated  EVAL_ONLY=1 of NEW on OLD's artifact gives OLD's scores
    settings   the config that the environment gives (a preset's: from its own file, on its side), every field

Rows of codecs: weights from an integer generator, saved and loaded by both. A blank is what the case does not have;
"(bytes)": other bytes of a codec that is a library's, which is no difference if the weights come back.

Importing PyTorch takes longer than such a run, so a server process imports it once and forks; the forked child executes
train_gpt.py as __main__. The cases "python" and "torchrun" launch it as a user does. OLD's results are kept in --cache,
by the SHA-256 of OLD's train_gpt.py and of the case, so that the next comparison runs NEW alone.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import queue
import re
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))

from command_line import OneLineParser, read_preset  # noqa: E402

VERSION = "1"  # of what is kept in the cache
TIMEOUT_S = 300  # of a single run: it takes a second or two

# As tests/conftest.py, in two micro-batches a step, and with an evaluation that is over at once
TINY = """VOCAB_SIZE=320 NUM_LAYERS=3 MODEL_DIM=64 NUM_HEADS=4 NUM_KV_HEADS=2 MLP_MULT=2 EMBED_DIM=24
    BITNET_GROUP_SIZE=32 TRAIN_SEQ_LEN=32 YARN_MAX_LEN=64 TRAIN_BATCH_TOKENS=256 MICRO_BATCH_TOKENS=128
    ITERATIONS=4 WARMUP_STEPS=1 MAX_WALLCLOCK_SECONDS=0 SLIDING_EVAL_STRIDE=8 SLIDING_BATCH_SIZE=64 TRAIN_LOG_EVERY=1
    VAL_BATCH_SIZE=512 VAL_MAX_TOKENS=500 TEMP_SCALING=0 SEED=7"""

# What presets have in common here; the shapes are those of bench/arms.py made smaller
SMALL = """VOCAB_SIZE=320 TRAIN_SEQ_LEN=64 YARN_MAX_LEN=128 TRAIN_BATCH_TOKENS=1024 MICRO_BATCH_TOKENS=512 ITERATIONS=10
    WARMUP_STEPS=2 MAX_WALLCLOCK_SECONDS=0 MUON_MOMENTUM_WARMUP_STEPS=5 TEMP_SCALING=1 SLIDING_EVAL=1
    SLIDING_EVAL_STRIDE=16 SLIDING_BATCH_SIZE=32 TRAIN_LOG_EVERY=1 VAL_BATCH_SIZE=1024 VAL_MAX_TOKENS=1000"""
SHAPE = "NUM_LAYERS=4 MODEL_DIM=64 NUM_HEADS=4 NUM_KV_HEADS=2 BITNET_GROUP_SIZE=32"
IN_STEPS = "LR_WARMUP_STEPS=3 WARMDOWN_ITERS=4"
OF_126 = f"MODEL_DIM=48 NUM_HEADS=4 NUM_KV_HEADS=2 SEQ_WARMUP_START=16 SEQ_WARMUP_STEPS=5 {IN_STEPS}"
PRESET_SHAPES = {
    "": f"{SHAPE} EMBED_DIM=24",
    "demo": f"{SHAPE} NUM_LAYERS=2 MODEL_DIM=96 NUM_HEADS=3 NUM_KV_HEADS=1 EMBED_DIM=32",
    "demo_gpu": f"{SHAPE} MODEL_DIM=96 EMBED_DIM=24",
    "ternary_phase": f"{SHAPE} EMBED_DIM=40",
    "fast": f"{SHAPE} MODEL_DIM=96 NUM_HEADS=6 NUM_KV_HEADS=3 EMBED_DIM=24",
    "pr640": f"{SHAPE} EMBED_DIM=24",
    "pr920": f"{SHAPE} EMBED_DIM=28",
    "pr641": f"{SHAPE} NUM_LAYERS=6 EMBED_DIM=24",
    "pr139": f"{SHAPE} NUM_LAYERS=5 {IN_STEPS}",
    "pr367": f"{SHAPE} NUM_LAYERS=5 MLP_HIDDEN=224 {IN_STEPS}",
    "pr126": f"{OF_126} NUM_LAYERS=6 NUM_UNIQUE_LAYERS=2",
    "pr126_60m": f"{OF_126} NUM_LAYERS=9 NUM_UNIQUE_LAYERS=3",
    "pr435": "NUM_LAYERS=5 MODEL_DIM=48 NUM_HEADS=6 NUM_KV_HEADS=2 RADIAL_BITS=4 PRECISION=auto",
}

# Settings on top of TINY, a line a case
OPTIONS = """
TRAINING_DEPTH_RECURRENCE=2
TRAINING_DEPTH_RECURRENCE=2 EVAL_DEPTH_RECURRENCE=1
EVAL_DEPTH_RECURRENCE=2
UNET=0
RESID_MIX=0
UNET=0 RESID_MIX=0
ACTIVATION=relu
ACTIVATION=leaky_relu
ACTIVATION=swiglu
ACTIVATION=gelu SMEAR=1
SMEAR=1
MLP_MULT=3
NUM_LAYERS=1
NUM_LAYERS=4
NUM_HEADS=2 NUM_KV_HEADS=2
NUM_KV_HEADS=1
EMBED_DIM=0
BIGRAM_HASH=1
BIGRAM_HASH=1 EMBED_DIM=0 SMEAR=1
SMEAR_GATE=0
SMEAR_GATE=0 BIGRAM_HASH=1
KEY_OFFSET=0
REFINER=1
REFINER=1 REFINER_KERNEL=2
DIFF_ATTN=1
MLP_GROUPS=2
MLP_GROUPS=2 ACTIVATION=swiglu
TIE_EMBEDDINGS=0
TIE_EMBEDDINGS=0 EMBED_DIM=0 SOFTCAP_TYPE=tanh
TIE_EMBEDDINGS=0 EMBED_LR=0.1 HEAD_LR=0.01
TIE_EMBEDDINGS=2
TIE_EMBEDDINGS=2 SOFTCAP_TYPE=tanh CORR_WEIGHT_LR=0.01
MTP_HEADS=1
MTP_HEADS=2
ATTN_PROJ_TYPE=tversky
ATTN_PROJ_TYPE=tversky TVERSKY_NUM_FEATURES=16 TVERSKY_FEATURE_POOLS=2 TVERSKY_MEMBERSHIP=poly
LOGIT_HEAD_TYPE=tversky
LOGIT_HEAD_TYPE=tversky TVERSKY_NUM_FEATURES=16 TVERSKY_MEMBERSHIP=tanh
LOGIT_HEAD_TYPE=tversky ATTN_PROJ_TYPE=tversky TVERSKY_NUM_FEATURES=8 BIGRAM_HASH=1 REFINER=1
PARALLEL_BLOCKS=1
ATTENTION_FREE_LAYERS=1
PARALLEL_BLOCKS=1 ATTENTION_FREE_LAYERS=1
ATTENTION_WINDOW=8
ATTENTION_WINDOW=8 ROPE_TYPE=rope
MLP_HIDDEN=96 XSA_LAST_N=2 QKV_SPLIT=1 INPUT_NORM=all SCALE_STORAGE=fp16
QKV_SPLIT=1
QKV_SPLIT=1 ACT_QUANT=int8 INPUT_NORM=none SCALE_GROUP=tensor SCALE_STORAGE=fp16
ACT_QUANT=int8 INPUT_NORM=all SCALE_STAT=rms SCALE_STORAGE=bf16 GRADIENT_CHECKPOINTING=1 PARALLEL_BLOCKS=1
ACT_QUANT=int8
ACT_QUANT=fp8
ACT_QUANT=fp8 PARALLEL_BLOCKS=1 ACTIVATION=swiglu
GRADIENT_CHECKPOINTING=1
WEIGHT_QUANT=binary
WEIGHT_QUANT=binary XSA_LAST_N=3
WEIGHT_QUANT=binary SCALE_GROUP=tensor REFINER=1
WEIGHT_QUANT=none
WEIGHT_QUANT=none QKV_SPLIT=1
NUM_UNIQUE_LAYERS=2 RECURRENCE_FACTOR=2 NUM_LAYERS=4
NUM_UNIQUE_LAYERS=2 RECURRENCE_FACTOR=3 NUM_LAYERS=6 GRADIENT_CHECKPOINTING=1 TERNARY_COMMIT_LAMBDA=0.01
TERNARY_COMMIT_LAMBDA=0.005
TERNARY_COMMIT_LAMBDA=0.01 SCALE_STAT=rms
XSA_LAST_N=2
INPUT_NORM=all
INPUT_NORM=none
POSITION=radial TERNARY_THRESHOLD=0 SCALE_GROUP=tensor SCALE_STORAGE=fp16
POSITION=radial RADIAL_BITS=4 RADIAL_ALPHA=0.5
POSITION=none
POSITION=none FP_STORAGE=FP4 EMBED_DIM=0
ROPE_TYPE=rope
ROPE_TYPE=rope ROPE_BASE=10000 NTK_ROPE=1 FP_STORAGE=FP4
ROPE_TYPE=rope NTK_ROPE=1 SEQ_WARMUP_START=8 SEQ_WARMUP_STEPS=4 ITERATIONS=6
YARN_MAX_LEN=256
SOFTCAP_TYPE=tanh
LOGIT_SOFTCAP=30 Z_LOSS=0
FP_STORAGE=FP16
FP_STORAGE=FP4
FP_STORAGE=INT6
FP_STORAGE=INT5
FP_STORAGE=INT4
SCALE_STAT=rms
SCALE_STAT=lstsq
SCALE_STORAGE=bf16
SCALE_STORAGE=fp16
SCALE_GROUP=row
SCALE_GROUP=tensor
TERNARY_THRESHOLD=0.7
TRAIN_SEQ_LEN=48 TRAIN_BATCH_TOKENS=192
MICRO_BATCH_TOKENS=32
QK_GAIN_INIT=1.5 TIED_EMBED_INIT_STD=0.02
ARTIFACT_CODEC=ans
ARTIFACT_CODEC=base3
ARTIFACT_CODEC=bitmask
ARTIFACT_CODEC=2bit
ARTIFACT_CODEC=int8
ARTIFACT_CODEC=base3_zstd
ARTIFACT_CODEC=bitmask_zstd
ARTIFACT_CODEC=2bit_zstd
ARTIFACT_CODEC=int8_zstd
TEMP_SCALING=1 LOGIT_SOFTCAP=30 WARMUP_STEPS=2
SLIDING_EVAL=0 WARMUP_STEPS=0
VAL_MAX_TOKENS=0 SLIDING_BATCH_SIZE=5 SLIDING_EVAL_STRIDE=32
SEED=8
PRECISION=fp16
PRECISION=bf16
MATRIX_OPTIMIZER=muon
MATRIX_OPTIMIZER=muon_plain
MATRIX_OPTIMIZER=normuon
MATRIX_OPTIMIZER=normuon NORMUON_BETA2=0.9 MUON_WD=0.04
MATRIX_OPTIMIZER=normuon126
MATRIX_OPTIMIZER=adamw ADAM_LR=0.003
MATRIX_OPTIMIZER=adamw ADAM_LR=0.003 ADAM_WD=0.5 BETA1=0.8 BETA2=0.99 ADAM_EPS=1e-6
MATRIX_OPTIMIZER=fro MATRIX_LR=0.001
MATRIX_OPTIMIZER=fro_stable MATRIX_LR=0.0009 FRO_ALPHA=0.12 FRO_GAMMA=0.66 FRO_WARMUP_STEPS=3 FRO_BETA2=0.99
MUON_BACKEND_STEPS=5
MUON_WD=0.04
MUON_MOMENTUM=0.9 MUON_MOMENTUM_WARMUP_START=0.5 MUON_MOMENTUM_WARMUP_STEPS=2
MATRIX_LR=0.02 SCALAR_LR=0.04 TIED_EMBED_LR=0.03
GRAD_CLIP_NORM=0.1
GRAD_CLIP_NORM=1
EMA=1 EMA_START_FRACTION=0.25 EMA_DECAY=0.5
CHURN_LOG_EVERY=1
VAL_LOSS_EVERY=1
UNTIE_AT_FRACTION=0.5 WARMUP_STEPS=2
UNTIE_AT_FRACTION=0.25 WARMUP_STEPS=2 EMBED_DIM=0 EMBED_LR=0.1 HEAD_LR=0.01
SEQ_LEN_START=8 SEQ_SCHEDULE_FRACTION=0.5
SEQ_RAMP_START=8 SEQ_RAMP_FRAC=0.6 ITERATIONS=6
SEQ_WARMUP_START=8 SEQ_WARMUP_STEPS=4 ITERATIONS=6
BATCH_TOKENS_START=64 BATCH_SCHEDULE_FRACTION=0.5
BATCH_RAMP_START=64 BATCH_RAMP_FRAC=0.6 ITERATIONS=6
SEQ_RAMP_START=8 SEQ_RAMP_FRAC=0.6 BATCH_RAMP_START=64 BATCH_RAMP_FRAC=0.8 MTP_HEADS=1 ITERATIONS=6
LR_WARMUP_STEPS=3
WARMDOWN_ITERS=3
WARMDOWN_ITERS=3 WARMDOWN_SHAPE=cosine MIN_LR_RATIO=0.1 LR_WARMUP_STEPS=2 ITERATIONS=6
WARMDOWN_FRACTION=0.8 WARMDOWN_SHAPE=cosine
WARMDOWN_FRACTION=0 ITERATIONS=24 TRAIN_BATCH_TOKENS=1024
ATTN_PROJ_TYPE=tversky TVERSKY_NUM_FEATURES=8 TVERSKY_FEATURE_POOLS=2 REFINER=1
POSITION=radial ATTN_PROJ_TYPE=tversky TVERSKY_NUM_FEATURES=8 TVERSKY_FEATURE_POOLS=2 MTP_HEADS=1 BIGRAM_HASH=1
LOGIT_HEAD_TYPE=tversky ATTN_PROJ_TYPE=tversky TVERSKY_NUM_FEATURES=8 TVERSKY_FEATURE_POOLS=2 POSITION=radial
POSITION=radial RADIAL_BITS=4 BIGRAM_HASH=1 REFINER=1 MTP_HEADS=2 TIE_EMBEDDINGS=2
UNTIE_AT_FRACTION=0.5 WARMUP_STEPS=2 MTP_HEADS=1 BIGRAM_HASH=1 POSITION=radial REFINER=1
DIFF_ATTN=1 MLP_GROUPS=2 QKV_SPLIT=1 TRAINING_DEPTH_RECURRENCE=2 SMEAR=1 REFINER=1
PARALLEL_BLOCKS=1 ATTENTION_FREE_LAYERS=1 SMEAR=1 REFINER=1 NUM_LAYERS=4 GRADIENT_CHECKPOINTING=1
PARALLEL_BLOCKS=1 XSA_LAST_N=2 MLP_GROUPS=2 ACTIVATION=gelu ACT_QUANT=int8
NUM_UNIQUE_LAYERS=2 RECURRENCE_FACTOR=2 NUM_LAYERS=4 SMEAR=1 DIFF_ATTN=1 ATTN_PROJ_TYPE=tversky TVERSKY_NUM_FEATURES=8
ATTENTION_WINDOW=8 SMEAR=1 REFINER=1 DIFF_ATTN=1
WEIGHT_QUANT=binary ACT_QUANT=int8 INPUT_NORM=all QKV_SPLIT=1 SCALE_GROUP=row PARALLEL_BLOCKS=1 UNET=0
EMA=1 GRAD_CLIP_NORM=0.5 CHURN_LOG_EVERY=2 VAL_LOSS_EVERY=2 UNTIE_AT_FRACTION=0.4 WARMUP_STEPS=2 MTP_HEADS=2
""".strip().splitlines()

# Settings on top of TINY, of two processes: what each keeps of its own (shards, averages, norms), and their messages
TWO_PROCESSES = """
GRAD_CLIP_NORM=0.1 TERNARY_COMMIT_LAMBDA=0.01 CHURN_LOG_EVERY=1 QKV_SPLIT=1
EMA=1 EMA_START_FRACTION=0.25 EMA_DECAY=0.5 UNTIE_AT_FRACTION=0.25 WARMUP_STEPS=2 VAL_LOSS_EVERY=1
MATRIX_OPTIMIZER=normuon MTP_HEADS=1 TIE_EMBEDDINGS=2
MATRIX_OPTIMIZER=adamw ADAM_LR=0.003 TIE_EMBEDDINGS=0 BATCH_RAMP_START=64 BATCH_RAMP_FRAC=0.6
MATRIX_OPTIMIZER=fro MATRIX_LR=0.001 WEIGHT_QUANT=binary SCALE_GROUP=tensor
ATTN_PROJ_TYPE=tversky TVERSKY_NUM_FEATURES=8 TVERSKY_FEATURE_POOLS=3 REFINER=1 SMEAR=1
PRECISION=fp16
""".strip().splitlines()

# Of models whose weights come from an integer generator; with each codec
COUNTED = ["", "FP_STORAGE=INT5 SCALE_STORAGE=fp16", "FP_STORAGE=FP4 WEIGHT_QUANT=binary",
           "FP_STORAGE=FP16 SCALE_STAT=rms SCALE_STORAGE=bf16", "FP_STORAGE=INT4 SCALE_STAT=lstsq SCALE_GROUP=row",
           "UNET=0 RESID_MIX=0 QKV_SPLIT=1 INPUT_NORM=all TIE_EMBEDDINGS=2",
           "WEIGHT_QUANT=none EMBED_DIM=0"]  # fmt: skip
CODECS = "ans base3 bitmask 2bit int8 base3_zstd bitmask_zstd 2bit_zstd int8_zstd".split()

# Figures of a result that are times or name the code and the run
NOT_COMPARED = """
    run_id train_time_s ms_per_step export_time_s eval_time_s code_bytes total_bytes code_sha256 git_commit
    log_path artifact_path peak_memory_bytes kernels kernels_off attention
    first_losses artifact_sha256 artifact_bytes stream_bytes codec""".split()
EVALUATED = """val_tokens val_bytes stride roundtrip_val_loss roundtrip_val_bpb sliding_val_loss sliding_val_bpb
    temperature""".split()
LOGGED = re.compile(r"(?<![\w:])(?:step|loss|val_loss|val_bpb|zero_frac|churn|loss_scale|epoch|params|ws|ga):[-+.\w/]+")
COLUMNS = "losses scores log artifact loaded evaluated settings".split()
TOLERANCE = 1e-5  # of the losses of two processes against one: a sum in another order


def pairs(text: str) -> dict[str, str]:
    return dict(pair.split("=", 1) for pair in text.split())


class Case(NamedTuple):
    """A run that both sides make."""

    name: str
    settings: dict[str, str]
    processes: int = 1
    launched: bool = False  # as a user launches it, not by a fork
    preset: str | None = None  # the file whose settings both sides read as well

    @property
    def key(self) -> str:
        """Of the run in the cache: what it is made of, not what it is called."""
        made_of = json.dumps([sorted(self.settings.items()), self.processes, self.launched])
        return hashlib.sha256(made_of.encode()).hexdigest()[:16]


def training_cases(old: Path) -> list[Case]:
    """Every case but those of codecs, presets first."""
    cases = []
    for name in ["", *sorted(path.stem for path in (old / "configs").glob("*.env"))]:
        preset = read_preset(old / f"configs/{name}.env") if name else {}
        settings = preset | pairs(SMALL) | pairs(PRESET_SHAPES.get(name, SHAPE))
        cases.append(Case(f"preset {name or '(defaults)'}", settings, preset=name))
    tiny = pairs(TINY)
    whole = tiny | pairs("TEMP_SCALING=1 ITERATIONS=10")
    cases.append(Case("tiny", whole))
    cases.append(Case("python: tiny", whole, launched=True))
    cases.append(Case("torchrun, 2 processes: tiny", whole, processes=2, launched=True))
    cases += [Case(f"2 processes: {line}", tiny | pairs(line), processes=2) for line in TWO_PROCESSES]
    assert len(set(OPTIONS)) == len(OPTIONS), "an option set stands there twice"
    return cases + [Case(line, tiny | pairs(line)) for line in OPTIONS]


# ---- Data ------------------------------------------------------------------------------------------------------------

TEXT = "The quick brown fox jumps over the lazy dog. Pack my box with five dozen liquor jugs! éà中文 😀 "


def make_data(folder: Path) -> None:
    """As tests/conftest.py: two train shards, a validation shard and a tokenizer of some synthetic English."""
    import sentencepiece

    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("etaoinshrdlu"), rng.integers(2, 8))) for _ in range(300)]
    weights = 1 / np.arange(1, 301)
    documents = [" ".join(rng.choice(words, 60, p=weights / weights.sum())) + ". " + TEXT for _ in range(60)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(documents), model_prefix=str(folder / "tokenizer"), vocab_size=320, model_type="bpe",
        byte_fallback=True, pad_id=0, bos_id=1, eos_id=2, unk_id=3, add_dummy_prefix=False, character_coverage=0.98,
        minloglevel=2, num_threads=1,
    )  # fmt: skip
    sp = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    encoded = [[sp.bos_id(), *sp.encode(d)] for d in documents]
    for name, part in (("train_000000", encoded[:20]), ("train_000001", encoded[20:50]), ("val_000000", encoded[50:])):
        tokens = np.concatenate(part)
        head = np.zeros(256, dtype="<i4")
        head[:3] = 20240520, 1, len(tokens)
        (folder / f"fineweb_{name}.bin").write_bytes(head.tobytes() + tokens.astype("<u2").tobytes())


def data_digest(folder: Path) -> str:
    files = sorted(path for path in folder.iterdir() if path.suffix in (".bin", ".model"))
    return hashlib.sha256(b"".join(hashlib.sha256(path.read_bytes()).digest() for path in files)).hexdigest()


# ---- The server: PyTorch imported once, a fork for each run ----------------------------------------------------------


def serve() -> None:
    """Read jobs from stdin, a JSON line each; run each in forked processes; answer with a line {"code": exit code}."""
    import lzma  # noqa: F401
    import zlib  # noqa: F401

    import sentencepiece  # noqa: F401
    import torch
    import torch._dynamo
    import torch.distributed  # noqa: F401

    # a run that nobody preloads for has no Triton when it begins: train_gpt.py asks, and would build kernels for it
    for name in [name for name in sys.modules if name == "triton" or name.startswith("triton.")]:
        del sys.modules[name]
    torch.set_num_threads(1)
    source = functools.cache(lambda path, _: compile(Path(path).read_text(encoding="utf-8"), path, "exec"))
    for line in sys.stdin:
        job = json.loads(line)
        code = source(job["script"], job["sha256"])
        print(json.dumps({"code": run_forked(job, code)}), flush=True)


def run_forked(job: dict[str, Any], code: types.CodeType) -> int:
    """The exit code of the job's processes: the first that is not 0; when one fails, the others have 2 s left."""
    children = [fork(job, code, rank) for rank in range(job["processes"])]
    deadline, failed = time.monotonic() + TIMEOUT_S, 0
    while children:
        for pid in list(children):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                children.remove(pid)
                if status and not failed:
                    failed, deadline = os.waitstatus_to_exitcode(status), min(deadline, time.monotonic() + 2)
        if children and time.monotonic() > deadline:
            for pid in children:
                os.kill(pid, signal.SIGKILL)
            failed, deadline = failed or 124, time.monotonic() + 10
        time.sleep(0.005)
    return failed


def fork(job: dict[str, Any], code: types.CodeType, rank: int) -> int:
    """Start one process of a job; returns its id."""
    pid = os.fork()
    if pid:
        return pid
    status = 70
    try:
        os.chdir(job["cwd"])
        suffix = f"{rank}" if rank else ""
        for stream, name in ((0, os.devnull), (1, f"stdout{suffix}"), (2, f"stderr{suffix}")):
            os.dup2(os.open(name, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644), stream)
        sys.stdin = open(os.devnull)
        sys.stdout, sys.stderr = (os.fdopen(stream, "w", buffering=1, encoding="utf-8") for stream in (1, 2))
        os.environ.clear()
        os.environ.update(job["env"])
        if job["processes"] > 1:
            os.environ.update({"RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_PORT": str(job["port"])})
        main = types.ModuleType("__main__" if job["execute"] else "train_gpt")
        main.__file__, sys.modules[main.__name__] = job["script"], main
        sys.path[0], sys.argv = str(Path(job["script"]).parent), [job["script"]]
        status = execute(main, code)
        if rank == 0 and job["probe"]:
            Path("answers.json").write_text(json.dumps(answers_to(job["probe"], main)))
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def execute(main: types.ModuleType, code: types.CodeType) -> int:
    """Run a script in a module, as `python script` does if that is __main__; returns its exit code."""
    try:
        exec(code, main.__dict__)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    return 0


def answers_to(questions: list[list], module: Any) -> list[dict]:
    """Answers of what train_gpt.py defines, an error in place of its answer.

    Only what a rewrite may be expected to keep is called: Config.from_env, GPT, save_artifact, load_artifact.
    """
    ask: dict[str, Callable] = {"settings": resolved, "load": loaded, "save": saved}
    answers = []
    for kind, *arguments in questions:
        try:
            answers.append(ask[kind](module, *arguments))
        except Exception as error:
            answers.append({"error": f"{type(error).__name__}: {error}"})
    return answers


def resolved(module: Any, settings: dict[str, str]) -> dict[str, str]:
    """Every field of the config, in no order."""
    cfg = module.Config.from_env(settings)
    values = {f.name: repr(getattr(cfg, f.name)) for f in dataclasses.fields(cfg)}
    values.pop("run_id")  # the time, unless it is set
    return values


def loaded(module: Any, path: str) -> dict[str, Any]:
    """SHA-256 of an artifact's weights in order, and the settings of its model."""
    model, cfg = module.load_artifact(Path(path).read_bytes())
    return {"weights": weights_digest(model), "settings": dict(sorted(cfg.model_settings().items()))}


def weights_digest(model: Any) -> str:
    digest = hashlib.sha256()
    for p in model.parameters():
        digest.update(str(tuple(p.shape)).encode() + p.detach().contiguous().numpy().tobytes())
    return digest.hexdigest()


def saved(module: Any, settings: dict[str, str], path: str) -> dict[str, Any]:
    """Write the artifact of a model whose weights come from an integer generator: no random numbers in them."""
    import torch

    cfg = module.Config.from_env(settings)
    model = module.GPT(cfg)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(((torch.arange(p.numel()) * 7919 % 1009 - 504).float() / 4096).view(p.shape))
    blob = module.save_artifact(model, cfg)
    Path(path).write_bytes(blob)
    return {"sha256": hashlib.sha256(blob).hexdigest(), "bytes": len(blob)}


class Server:
    """A process that serves, from this side."""

    def __init__(self) -> None:
        env = plain_environment() | {"OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen([sys.executable, __file__, "--serve"], stdin=subprocess.PIPE, env=env,
                                         stdout=subprocess.PIPE, text=True)  # fmt: skip

    def run(self, side: Side, cwd: Path, env: dict[str, str], processes: int = 1, execute: bool = True,
            probe: list | None = None) -> int:  # fmt: skip
        """Exit code of train_gpt.py, as __main__ or (not `execute`) imported; `probe`: questions after it.

        The output goes to stdout, stderr (and stdout1, stderr1 of the second process) and answers.json in cwd.
        """
        several = {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1"}
        env = plain_environment() | {"OMP_NUM_THREADS": "1"} | (several if processes > 1 else {}) | env
        job = {"script": str(side.script), "sha256": side.sha256, "cwd": str(cwd), "env": env, "execute": execute,
               "probe": probe, "processes": processes, "port": free_port() if processes > 1 else 0}  # fmt: skip
        print(json.dumps(job), file=self._process.stdin, flush=True)
        return json.loads(self._process.stdout.readline())["code"]

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()


def plain_environment() -> dict[str, str]:
    kept = ("PATH", "HOME", "LANG", "LD_LIBRARY_PATH", "VIRTUAL_ENV", "TMPDIR", "USER")
    return {k: v for k, v in os.environ.items() if k in kept}


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


# ---- Two sides -------------------------------------------------------------------------------------------------------


class Side:
    """A checkout, its train_gpt.py as it is now: somebody may go on writing it while it is compared."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._copy = folder.resolve(), tempfile.TemporaryDirectory(prefix="same_code_")
        self.script = Path(self._copy.name) / "train_gpt.py"
        self.script.write_bytes((self.folder / "train_gpt.py").read_bytes())
        self.sha256 = hashlib.sha256(self.script.read_bytes()).hexdigest()

    def preset(self, name: str | None) -> dict[str, str] | None:
        """Settings of a preset's file here; {} for the defaults, None if there is no such file."""
        path = self.folder / f"configs/{name}.env"
        return {} if not name else read_preset(path) if path.exists() else None


class Bench:
    """Runs cases on both sides and compares them."""

    def __init__(self, old: Side, new: Side, cache: Path, jobs: int, header_may_differ: bool = False) -> None:
        self.old, self.new, self.jobs, self.header_may_differ = old, new, jobs, header_may_differ
        self.data = cache.resolve() / "data"
        if not self.data.is_dir():
            partial = self.data.with_name(f"data.{os.getpid()}")
            partial.mkdir(parents=True)
            make_data(partial)
            with contextlib.suppress(OSError):  # another comparison was quicker
                partial.rename(self.data)
        self.cache = cache.resolve() / self._cache_name()
        self.cache.mkdir(parents=True, exist_ok=True)

    def _cache_name(self) -> str:
        """OLD's code and what its numbers depend on besides: data, library, processor."""
        import importlib.metadata

        cpuinfo = Path("/proc/cpuinfo")
        lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
        cpu = next((line for line in lines if line.startswith(("model name", "flags"))), "")
        around = [VERSION, data_digest(self.data), importlib.metadata.version("torch"), sys.version, cpu]
        return f"{self.old.sha256[:12]}_{hashlib.sha256(json.dumps(around).encode()).hexdigest()[:8]}"

    @contextlib.contextmanager
    def servers(self) -> Iterator[queue.Queue[Server]]:
        free: queue.Queue[Server] = queue.Queue()
        servers = [Server() for _ in range(self.jobs)]
        for server in servers:
            free.put(server)
        try:
            yield free
        finally:
            for server in servers:
                server.close()

    def compare(self, cases: list[Case], codecs: list[str], fill: bool = False) -> list[Row]:
        """Rows in order; says on stderr how far it is. `fill`: only what OLD does, for the cache."""
        of_case, of_codec = (self._fill_case, self._fill_codec) if fill else (self._compare_case, self._compare_codec)
        todo = [(case.name, functools.partial(of_case, case)) for case in cases]
        todo += [(f"codec {codec}", functools.partial(of_codec, codec)) for codec in codecs]
        done, started = 0, time.monotonic()
        with self.servers() as free, ThreadPoolExecutor(self.jobs) as pool:

            def one(name: str, row_of: Callable[[Server], Row]) -> Row:
                nonlocal done
                server, begun = free.get(), time.monotonic()
                try:
                    row = row_of(server)
                except Failed as failure:
                    row = Row(name, {"losses": str(failure)})
                finally:
                    free.put(server)
                done += 1
                seconds, elapsed = time.monotonic() - begun, time.monotonic() - started
                said = "DIFFERS" if not row.same else "filled" if fill else "same"
                print(f"{done}/{len(todo)} {elapsed:.0f}s {name}: {said} ({seconds:.1f}s)", file=sys.stderr, flush=True)
                return row

            return list(pool.map(lambda job: one(*job), todo))

    def _environment(self, case: Case, artifact: str) -> dict[str, str]:
        return case.settings | {"DATA_PATH": str(self.data), "TOKENIZER_PATH": str(self.data / "tokenizer.model"),
                                "ARTIFACT_PATH": artifact, "RUN_ID": "same"}  # fmt: skip

    def run(self, server: Server, side: Side, case: Case, cwd: Path, probe: list | None = None,
            **more: str) -> dict[str, Any]:  # fmt: skip
        """{"result", "log"} of a whole run, or {"error"}; and "answers" to the questions."""
        cwd.mkdir(parents=True, exist_ok=True)
        env = self._environment(case, "model.ptz") | more
        if case.launched:
            code = launch(side.script, cwd, env, case.processes)
        else:
            code = server.run(side, cwd, env, case.processes, probe=probe)
        out, errors = ((cwd / name).read_text(errors="replace") for name in ("stdout", "stderr"))
        if code or "\nresult " not in out:
            run: dict[str, Any] = {"error": (errors.strip().splitlines() or [f"exit code {code}"])[-1]}
        else:
            lines, _, result = out.rpartition("\nresult ")
            run = {"result": json.loads(result), "log": LOGGED.findall(lines)}
        if probe:
            answered = (cwd / "answers.json").exists()  # not by a run that failed or was launched
            run["answers"] = read_answers(cwd) if answered else self.probe(server, side, cwd, probe)
        return run

    def probe(self, server: Server, side: Side, cwd: Path, questions: list) -> list[dict]:
        cwd.mkdir(parents=True, exist_ok=True)
        code = server.run(side, cwd, {}, execute=False, probe=questions)
        if code:
            errors = (cwd / "stderr").read_text(errors="replace").strip().splitlines()
            raise Failed(f"{side.folder}: {(errors or [f'exit code {code}'])[-1]}")
        return read_answers(cwd)

    def old_run(self, server: Server, case: Case) -> tuple[dict[str, Any], Path]:
        """OLD's run of a case and its artifact, from the cache if it is there; Failed if the case does not run."""
        folder = self.cache / case.key
        if not (folder / "run.json").exists():
            with tempfile.TemporaryDirectory(prefix="same_") as work:
                questions = [("load", "model.ptz"), ("settings", case.settings)]
                run = self.run(server, self.old, case, Path(work), questions)
                if "error" in run:
                    raise Failed(f"OLD fails: {run['error']}")
                artifact = (Path(work) / "model.ptz").read_bytes()
                keep(folder, {"run.json": json.dumps(run).encode(), "model.ptz": artifact})
        return json.loads((folder / "run.json").read_text()), folder / "model.ptz"

    def old_evaluation(self, server: Server, case: Case, run: dict[str, Any], artifact: Path) -> dict[str, Any]:
        """OLD's scores of its artifact on one process. Two add their sums in another order: theirs are scored again."""
        path = artifact.with_name("alone.json")
        if case.processes == 1:
            return run
        if not path.exists():
            with tempfile.TemporaryDirectory(prefix="same_") as work:
                alone = case._replace(processes=1, launched=False)
                run = self.run(server, self.old, alone, Path(work), EVAL_ONLY="1", ARTIFACT_PATH=str(artifact))
                if "error" in run:
                    raise Failed(f"OLD fails: {run['error']}")
                keep(path.parent, {path.name: json.dumps(run).encode()})
        return json.loads(path.read_text())

    def _fill_case(self, case: Case, server: Server) -> Row:
        self.old_evaluation(server, case, *self.old_run(server, case))
        return Row(case.name, {})

    def _compare_case(self, case: Case, server: Server) -> Row:
        row = Row(case.name, {})
        old, artifact = self.old_run(server, case)
        with tempfile.TemporaryDirectory(prefix="same_") as work:
            folder = Path(work)
            questions = [("load", str(artifact)), ("settings", case.settings)]
            new = self.run(server, self.new, case, folder, questions)
            if "error" in new:
                row.columns["losses"] = f"NEW fails: {new['error']}"
            else:
                ours, theirs = old["result"], new["result"]
                row.columns["losses"] = difference(ours["first_losses"], theirs["first_losses"])
                figures = [{k: v for k, v in r.items() if k not in NOT_COMPARED} for r in (ours, theirs)]
                row.columns["scores"] = difference(*figures)
                row.columns["log"] = difference(old["log"], new["log"])
                row.columns["artifact"] = self._artifacts(artifact.read_bytes(), (folder / "model.ptz").read_bytes())
                if case.launched and not row.columns["losses"]:
                    row.columns["losses"] = self._like_forked(server, case, theirs["first_losses"])
            row.columns["loaded"], row.columns["settings"] = map(difference, old["answers"], new["answers"])
            row.columns["settings"] = row.columns["settings"] or self._presets(server, case, folder)
            alone = case._replace(processes=1, launched=False)
            scored = self.run(server, self.new, alone, folder / "eval", EVAL_ONLY="1", ARTIFACT_PATH=str(artifact))
            if "error" in scored:
                row.columns["evaluated"] = f"NEW fails: {scored['error']}"
            else:
                runs = self.old_evaluation(server, case, old, artifact), scored
                row.columns["evaluated"] = difference(*({k: run["result"][k] for k in EVALUATED} for run in runs))
        return row

    def _like_forked(self, server: Server, case: Case, losses: list[float]) -> str:
        """A launched run against OLD's forked run on one process: equal, or on two processes equal but for rounding."""
        one, _ = self.old_run(server, case._replace(processes=1, launched=False))
        if case.processes == 1:
            return difference(one["result"]["first_losses"], losses)
        gap = max(abs(a - b) for a, b in zip(one["result"]["first_losses"], losses, strict=True))
        return f"{gap:.1e} from one process" if gap > TOLERANCE else ""

    def _artifacts(self, ours: bytes, theirs: bytes) -> str:
        if ours == theirs:
            return ""
        if streams(ours) == streams(theirs):
            return "" if self.header_may_differ else "header: " + difference(header(ours), header(theirs))
        return f"streams differ: {len(ours)} and {len(theirs)} bytes"

    def _presets(self, server: Server, case: Case, folder: Path) -> str:
        """A preset at its full size: OLD's file read by OLD, NEW's by NEW."""
        if case.preset is None:
            return ""
        files = [side.preset(case.preset) for side in (self.old, self.new)]
        if None in files:
            return f"configs/{case.preset}.env is not there"
        full = [self.probe(server, side, folder / f"settings{number}", [("settings", settings)])[0]
                for number, (side, settings) in enumerate(zip((self.old, self.new), files, strict=True))]  # fmt: skip
        return difference(*full)

    def _old_codec(self, server: Server, codec: str) -> tuple[list[dict], list[Path]]:
        """OLD's models of known weights: what loading gives, and the artifacts; from the cache if they are there."""
        made_of = hashlib.sha256(json.dumps([codec, sorted(pairs(TINY).items()), COUNTED]).encode()).hexdigest()[:16]
        folder = self.cache / f"codec_{made_of}"
        files = [folder / f"{number}.ptz" for number in range(len(COUNTED))]
        if not (folder / "loads.json").exists():
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix="same_") as work:
                questions = saves(codec, files) + [("load", str(path)) for path in files]
                answers = self.probe(server, self.old, Path(work), questions)
            if errors := [answer["error"] for answer in answers if "error" in answer]:
                raise Failed(f"OLD fails: {errors[0]}")
            keep(folder, {"loads.json": json.dumps(answers[len(files) :]).encode()})
        return json.loads((folder / "loads.json").read_text()), files

    def _fill_codec(self, codec: str, server: Server) -> Row:
        self._old_codec(server, codec)
        return Row(f"codec {codec}", {})

    def _compare_codec(self, codec: str, server: Server) -> Row:
        """Models of known weights: the same bytes (of the libraries' codecs: told, but no matter) and weights."""
        row, (old_loads, old_files) = Row(f"codec {codec}", {}, codec != "ans"), self._old_codec(server, codec)
        count = len(COUNTED)
        with tempfile.TemporaryDirectory(prefix="same_") as work:
            files = [Path(work) / f"{number}.ptz" for number in range(count)]
            loads = [("load", str(path)) for path in (*old_files, *files)]
            answers = self.probe(server, self.new, Path(work), saves(codec, files) + loads)
            if errors := [answer["error"] for answer in answers if "error" in answer]:
                row.columns["loaded"] = f"NEW fails: {errors[0]}"
                return row
            said = [(text, self._artifacts(ours.read_bytes(), theirs.read_bytes()))
                    for text, ours, theirs in zip(COUNTED, old_files, files, strict=True)]  # fmt: skip
            row.columns["artifact"] = ", ".join(f"{text or 'defaults'}: {what}" for text, what in said if what)
            weights = [[answer["weights"] for answer in loads] for loads in (old_loads, answers[2 * count :])]
            row.columns["loaded"] = difference(old_loads, answers[count : 2 * count]) or difference(*weights)
        return row


def read_answers(cwd: Path) -> list[dict]:
    return json.loads((cwd / "answers.json").read_text())


def saves(codec: str, files: list[Path]) -> list[tuple]:
    """Questions that write the models of known weights to files."""
    return [("save", pairs(TINY) | pairs(text) | {"ARTIFACT_CODEC": codec}, str(path))
            for text, path in zip(COUNTED, files, strict=True)]  # fmt: skip


def keep(folder: Path, files: dict[str, bytes]) -> None:
    """Write files whole, as interrupted comparisons leave no half of one; a .json is there when the others are."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in sorted(files, key=lambda name: name.endswith(".json")):
        partial = folder / f".{name}.{os.getpid()}"
        partial.write_bytes(files[name])
        partial.replace(folder / name)


def launch(script: Path, cwd: Path, env: dict[str, str], processes: int) -> int:
    """Run a script as a user does; its output goes to files in cwd."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    env = plain_environment() | {"OMP_NUM_THREADS": "1"} | env
    with open(cwd / "stdout", "w") as out, open(cwd / "stderr", "w") as errors:
        command = [sys.executable, *torchrun, str(script)]
        return subprocess.run(command, cwd=cwd, env=env, stdout=out, stderr=errors, timeout=TIMEOUT_S).returncode


# ---- What is the same ------------------------------------------------------------------------------------------------


class Failed(Exception):
    """A case could not be compared; the text says why."""


@dataclasses.dataclass
class Row:
    """A line of the table: column -> "" (the same) or what differs."""

    name: str
    columns: dict[str, str]
    harmless: bool = False  # what differs in the artifact's bytes is a library's, and no matter

    @property
    def differing(self) -> dict[str, str]:
        return {k: v for k, v in self.columns.items() if v and not (self.harmless and k == "artifact")}

    @property
    def same(self) -> bool:
        return not self.differing

    def markdown(self) -> str:
        marks = {column: "" if column not in self.columns else "same" for column in COLUMNS}
        marks |= {column: "(bytes)" for column, text in self.columns.items() if text}
        marks |= dict.fromkeys(self.differing, "**differs**")
        return f"| {self.name.replace('|', '/')} | " + " | ".join(marks.values()) + " |"


def difference(ours: Any, theirs: Any) -> str:
    """Where two JSON values differ first, and as what: "" if nowhere. Numbers must be equal to the last bit."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        keys = [*ours, *(k for k in theirs if k not in ours)]
        found = [f"{k}: {said}" for k in keys if (said := difference(ours.get(k, "nothing"), theirs.get(k, "nothing")))]
        return ", ".join(found[:3]) + (f" and {len(found) - 3} more" if len(found) > 3 else "")
    if isinstance(ours, list) and isinstance(theirs, list):
        for number, (a, b) in enumerate(zip(ours, theirs, strict=False)):
            if said := difference(a, b):
                return f"[{number}] {said}"
        return f"{len(ours)} and {len(theirs)} entries" if len(ours) != len(theirs) else ""
    return "" if ours == theirs and type(ours) is type(theirs) else f"{ours} / {theirs}"


PREFIX = struct.Struct("<4sHH32s")  # magic, version, length of the header's text, SHA-256


def header(blob: bytes) -> list[str]:
    _, version, length, _ = PREFIX.unpack_from(blob)
    return [f"version {version}", *blob[PREFIX.size : PREFIX.size + length].decode(errors="replace").split("\n")]


def streams(blob: bytes) -> bytes:
    return blob[PREFIX.size + PREFIX.unpack_from(blob)[2] :]


def print_table(rows: list[Row]) -> None:
    print(f"| case | {' | '.join(COLUMNS)} |\n|{'---|' * (len(COLUMNS) + 1)}")
    for row in rows:
        print(row.markdown())
    different = [row for row in rows if not row.same]
    if different:
        print("\nWhat differs first (OLD / NEW):\n")
    for row in different:
        for column, text in row.differing.items():
            print(f"- {row.name}, {column}: {text}")
    print(f"\n{len(rows) - len(different)} of {len(rows)} cases are the same.")


def main() -> int:
    parser = OneLineParser(__doc__)
    parser.add_argument("old", type=Path, nargs="?", default=ROOT, metavar="OLD")
    parser.add_argument("new", type=Path, nargs="?", metavar="NEW")
    parser.add_argument("--only", nargs="+", metavar="PATTERN", help="cases whose names hold one of these regexes")
    parser.add_argument("--jobs", type=int, default=1, help="cases at once, each on one thread")
    parser.add_argument("--cache", type=Path, default=ROOT / "data/bench/same", help="of OLD's results and the data")
    parser.add_argument("--header-may-differ", action="store_true", help="of artifacts: their streams are compared")
    parser.add_argument("--fill", action="store_true", help="run OLD alone, so that its results are in the cache")
    parser.add_argument("--list", action="store_true", help="print the names of the cases")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve()
        return 0
    for folder in filter(None, (args.old, args.new)):
        if not (folder / "train_gpt.py").is_file():
            parser.error(f"{folder}: expected a folder with train_gpt.py in it")
    wanted = lambda name: not args.only or any(re.search(pattern, name) for pattern in args.only)
    cases = [case for case in training_cases(args.old) if wanted(case.name)]
    codecs = [codec for codec in CODECS if wanted(f"codec {codec}")]
    if args.list:
        print(*(case.name for case in cases), *(f"codec {codec}" for codec in codecs), sep="\n")
        return 0
    if args.new is None and not args.fill or not (cases or codecs):
        parser.error("expected two folders, and --only with a word of some case's name (--list shows them)")
    bench = Bench(Side(args.old), Side(args.new or args.old), args.cache, args.jobs, args.header_may_differ)
    rows = bench.compare(cases, codecs, args.fill)
    if not args.fill or not all(row.same for row in rows):
        print_table(rows)
    return 0 if all(row.same for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
