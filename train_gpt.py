"""Train a ternary GPT for OpenAI's Parameter Golf: 600 s on 8xH100, 16,000,000 bytes of code and weights, bits per byte.

The default is the system of pull request #640 (BitNet b1.58 weights in {-1, 0, 1}, U-Net transformer, NeoMuon) without the
defects of its script. Not yet run on 8xH100: RESULTS.md says what was measured where.

    torchrun --standalone --nproc_per_node=8 train_gpt.py          the submission: the defaults are the record run
    NUM_LAYERS=4 MAX_WALLCLOCK_SECONDS=60 python train_gpt.py      one process (GPU or CPU); every setting is a variable
    EVAL_ONLY=1 ARTIFACT_PATH=model.ptz python train_gpt.py        score an artifact from its bytes alone

The file reads in the order the data flows:
    0 Settings of other systems    1 Config    2 Runtime    3 Data    4 Ternary format    5 Model    6 Optimizer
    7 Training    8 Kernels and hardware    9 Artifact
    10 Published codecs and narrow tables    11 Evaluation    12 Report    13 Optional systems    14 Main

Shapes: B sequences, T tokens, D model_dim, E embed_dim, H query heads, K key/value heads, C head_dim, V vocabulary, G weights
that share a scale. Units are suffixes (_s, _bytes, _tokens, _frac); losses are nats per token; bits per byte (bpb) are
nats / ln 2 / UTF-8 bytes of the decoded text.

References: BitNet b1.58 arXiv:2402.17764; Muon https://kellerjordan.github.io/posts/muon; YaRN arXiv:2309.00071; GQA
arXiv:2305.13245; relu^2 arXiv:2109.08668; QK-norm arXiv:2010.04245; parameter-golf pull requests by number (#640).
"""

from __future__ import annotations

import contextlib
import copy
import ctypes
import dataclasses
import datetime
import difflib
import functools
import hashlib
import itertools
import json
import lzma
import math
import os
import platform
import re
import struct
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

try:  # FlashAttention-3 (Hopper only); without it PyTorch's own attention runs
    from flash_attn_interface import flash_attn_func
except ImportError:
    flash_attn_func = None

BUDGET_BYTES = 16_000_000  # decimal; code and artifact together


class UserError(ValueError):
    """Something a user can set or supply wrongly; the text names the setting, its value and what was expected."""


# ---- 0 Settings of other systems (option) ----------------------------------------------------------------------------


def model_setting(default: Any) -> Any:
    """A field that defines the model: it is stored in the artifact, and evaluation takes it from there."""
    return field(default=default, metadata={"model": True})


# packing, then compressor (its own one, or zstd): see section 10
Codec = Literal["auto", "ans", "base3", "bitmask", "2bit", "int8", "base3_zstd", "bitmask_zstd", "2bit_zstd", "int8_zstd"]


@dataclass(frozen=True, kw_only=True)
class OptionalSettings:
    """Settings that stand at "off" in the default, and what switches off parts of the published design."""

    # model and storage of #139, #367, #126, #435, #641
    mlp_hidden: int = model_setting(0)  # 0: MLP_MULT * MODEL_DIM
    xsa_last_n: int = model_setting(0)  # the last n blocks' attention leaves out what it says of its own value (#367)
    qkv_split: bool = model_setting(False)  # three matrices: Muon and a scale of the whole tensor then see each alone (#139)
    input_norm: Literal["outputs", "all", "none"] = model_setting("outputs")  # inputs of matrices that are normalized
    weight_quant: Literal["ternary", "binary", "none"] = model_setting("ternary")  # none: float16, 10 times the bytes
    num_unique_layers: int = model_setting(0)  # 0: off; else NUM_LAYERS = this * RECURRENCE_FACTOR passes, ABC ABC (#126)
    recurrence_factor: int = model_setting(1)
    position: Literal["rope", "radial", "none"] = model_setting("rope")
    radial_bits: int = model_setting(8)
    radial_alpha: float = model_setting(0.25)
    ntk_rope: bool = False  # a smaller RoPE base for training sequences below TRAIN_SEQ_LEN (#126)
    ternary_commit_lambda: float = 0.0  # pull of latent weights towards their codes (#126)
    gradient_checkpointing: bool = False  # blocks are computed again in the backward pass: memory for time
    # switches of #640's command
    tie_embeddings: Literal[0, 1, 2] = model_setting(1)  # 0: an output head of its own; 2: the table plus a correction
    attn_proj_type: Literal["standard", "tversky"] = model_setting("standard")
    logit_head_type: Literal["standard", "tversky"] = model_setting("standard")
    bigram_hash: bool = model_setting(False)  # a second table, for the token before
    mtp_heads: int = 0  # heads for the tokens after the next one: in training only, so no part of the stored model
    diff_attn: bool = model_setting(False)
    mlp_groups: int = model_setting(0)  # MLPs side by side, each on its share of the channels; 0: one
    refiner: bool = model_setting(False)
    smear: bool = model_setting(False)
    training_depth_recurrence: int = model_setting(0)  # each block so often in a row; 0: once
    eval_depth_recurrence: int = model_setting(0)  # the same in evaluation; 0: as in training
    untie_at_fraction: float = 0.0  # of the budget: from there on as TIE_EMBEDDINGS=0, and stored as such; 0: never
    churn_log_every: int = 0  # steps between two lines with the share of ternary codes that changed
    # arithmetic of the ternary products: fp8 takes 8-bit operands forward and for the gradient of the input
    act_quant: Literal["none", "int8", "fp8"] = model_setting("none")
    # tokens that a token attends to, itself among them (0: all before it); the sliding score is then a single pass over long rows
    attention_window: int = model_setting(0)
    parallel_blocks: bool = model_setting(False)  # attention and MLP side by side
    attention_free_layers: int = model_setting(0)  # layers in the middle that are an MLP alone
    # companions of those switches: read with #640's command, without effect while the switch is off
    tversky_num_features: int = model_setting(0)  # 0: the prototypes themselves
    tversky_feature_pools: int = model_setting(0)  # sets of features that the blocks share in turn; 0: each has its own
    tversky_membership: Literal["sigmoid", "poly", "tanh"] = model_setting("sigmoid")
    refiner_kernel: int = model_setting(3)
    embed_lr: float = 0.6  # the table's with TIE_EMBEDDINGS=0
    head_lr: float = 0.02
    corr_weight_lr: float = 0.02
    # parts of the published design that can be switched off
    unet: bool = model_setting(True)
    resid_mix: bool = model_setting(True)

    # schedules: shorter sequences and smaller batches at first (0: off), learning rates
    seq_len_start: int = 0  # #640: until SEQ_SCHEDULE_FRACTION of the budget
    seq_schedule_fraction: float = 0.0
    batch_tokens_start: int = 0  # #640: until BATCH_SCHEDULE_FRACTION of the budget
    batch_schedule_fraction: float = 0.33
    seq_ramp_start: int = 0  # #367: doubles, evenly over SEQ_RAMP_FRAC of the budget
    seq_ramp_frac: float = 0.25
    batch_ramp_start: int = 0  # #367: the same for the tokens of a step
    batch_ramp_frac: float = 0.2
    seq_warmup_start: int = 0  # #126 (there SEQ_LEN_START): doubles, evenly over SEQ_WARMUP_STEPS
    seq_warmup_steps: int = 2000
    lr_warmup_steps: int = 0
    warmdown_iters: int = 0  # #139: the warmdown in steps of the pace so far, in place of WARMDOWN_FRACTION
    warmdown_shape: Literal["linear", "cosine"] = "linear"
    min_lr_ratio: float = 0.0  # of every learning rate, at the end of the warmdown

    # optimizers
    muon_wd: float = 0.0  # of every MATRIX_OPTIMIZER but adamw
    adam_lr: float = 0.05  # with adam_wd: only for MATRIX_OPTIMIZER=adamw
    adam_wd: float = 0.05
    grad_clip_norm: float = 0.0  # 0: off
    normuon_beta2: float = 0.95
    fro_alpha: float = 0.1  # with fro_gamma as in #435's first version; its stable form has .12 and .66
    fro_gamma: float = 0.8
    fro_beta2: float = 0.999
    fro_warmup_steps: int = 10  # fro_stable only

    # weight averaging (#641): the average is what is exported
    ema: bool = False
    ema_decay: float = 0.995
    ema_start_fraction: float = 0.5


# ---- 1 Config --------------------------------------------------------------------------------------------------------
# Environment in, one frozen object out. A setting is the field's name in upper case, no exceptions.


@dataclass(frozen=True, kw_only=True)
class Config(OptionalSettings):
    """Every setting. The defaults are the submission; NUM_LAYERS=12 in the environment sets num_layers.

    Names are #640's.
    """

    # run
    run_id: str = field(default_factory=lambda: time.strftime("run_%Y%m%d_%H%M%S"))
    seed: int = 42
    data_path: str = "./data/datasets/fineweb10B_sp8192"
    tokenizer_path: str = "./data/tokenizers/fineweb_8192_bpe.model"
    artifact_path: str = "final_model.ternary.ptz"
    eval_only: bool = False
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"  # auto: bf16 on a GPU that has it, else fp16; fp32 on a CPU
    compile_mode: Literal["default", "none", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"] = "default"

    # budget: whichever of the two ends first drives the schedule
    max_wallclock_seconds: float = 599.0  # 0: no cap. 599 leaves 1 s for the step that is under way at the end
    iterations: int = 20_000
    warmup_steps: int = 5  # untimed steps that compile every shape; weights and optimizers are restored

    # model
    vocab_size: int = model_setting(8192)
    num_layers: int = model_setting(10)
    model_dim: int = model_setting(768)
    num_heads: int = model_setting(8)
    num_kv_heads: int = model_setting(4)
    mlp_mult: int = model_setting(4)
    embed_dim: int = model_setting(256)  # 0: model_dim, no projections. #640's 254 + 2: rows of 16-byte multiples for the GEMMs
    # relu -> relu2: -.024 bpb (#640, 12 layers)
    activation: Literal["relu2", "relu", "leaky_relu", "gelu", "swiglu"] = model_setting("relu2")
    qk_gain_init: float = 2.25
    tied_embed_init_std: float = 0.005
    logit_softcap: float = model_setting(10.0)
    softcap_type: Literal["poly", "tanh"] = model_setting("poly")
    rope_type: Literal["yarn", "rope"] = model_setting("yarn")
    rope_base: float = model_setting(5000.0)
    yarn_max_len: int = model_setting(2048)
    bitnet_group_size: int = model_setting(128)
    scale_group: Literal["group", "row", "tensor"] = model_setting("group")  # weights that share a scale
    scale_stat: Literal["absmean", "rms", "lstsq"] = model_setting("absmean")
    scale_storage: Literal["e4m3", "fp16", "bf16"] = model_setting("e4m3")
    ternary_threshold: float = model_setting(0.5)  # codes are 0 below this share of the scale (lstsq: of the mean magnitude)
    # the embedding table and its two projections; INTb: about b bits a weight after coding
    fp_storage: Literal["FP8", "FP16", "FP4", "INT6", "INT5", "INT4"] = model_setting("FP8")

    # data
    train_batch_tokens: int = 524_288
    train_seq_len: int = model_setting(1024)
    micro_batch_tokens: int = 65_536  # largest forward pass of one process, in training and in evaluation

    # optimizer
    # muon is #640's name for neomuon
    matrix_optimizer: Literal["neomuon", "muon", "muon_plain", "normuon", "normuon126", "adamw", "fro", "fro_stable"] = "neomuon"
    matrix_lr: float = 0.04
    scalar_lr: float = 0.02
    tied_embed_lr: float = 0.02
    muon_momentum: float = 0.95
    muon_momentum_warmup_start: float = 0.85
    muon_momentum_warmup_steps: int = 500
    muon_backend_steps: int = 3  # Newton-Schulz; 3 = 5 in loss at 600 s, 5.7 ms a step faster (#640)
    beta1: float = 0.9
    beta2: float = 0.95
    adam_eps: float = 1e-8
    warmdown_fraction: float = 0.2  # the last part of the budget, in which every learning rate falls linearly to 0
    z_loss: float = 1e-4  # training only; a reported loss never holds it

    # logs, validation, evaluation
    train_log_every: int = 200
    val_loss_every: int = 0  # 0: only after training
    val_batch_size: int = 524_288  # tokens a step of chunked evaluation, over all processes
    val_max_tokens: int = 0  # 0: the whole validation split
    sliding_eval: bool = True
    sliding_eval_stride: int = 16
    sliding_batch_size: int = 256  # windows a step and process; at most MICRO_BATCH_TOKENS, on a GPU four times that
    temp_scaling: bool = True
    artifact_codec: Codec = "auto"  # auto: the smallest of ans, base3, bitmask

    @property
    def head_dim(self) -> int:
        return self.model_dim // self.num_heads

    @property
    def score_window(self) -> int:
        """Tokens of a window of the sliding score: long rows for a model whose attention is banded anyway."""
        return BANDED_ROW * self.attention_window or self.train_seq_len

    @property
    def score_stride(self) -> int:
        return (BANDED_ROW - 1) * self.attention_window or self.sliding_eval_stride

    @property
    def mlp_dim(self) -> int:
        return self.mlp_hidden or self.mlp_mult * self.model_dim

    @classmethod
    def from_env(cls, env: Mapping[str, str] = os.environ) -> Config:
        """Read overrides from the environment. A near-miss of a name or a value that does not parse raises UserError."""
        names = {f.name.upper(): f.name for f in dataclasses.fields(cls)}
        for key in sorted(env.keys() - names.keys()):
            # cutoff .85 catches 97-99 % of one-slip typos without alarming on the names usual environments hold
            if close := difflib.get_close_matches(key, names, n=1, cutoff=0.85):
                raise UserError(f"{key}={env[key]!r} is not a setting; did you mean {close[0]}?")
        kinds = setting_kinds(cls)
        return cls(**{name: parse_setting(key, env[key], kinds[name]) for key, name in names.items() if key in env})

    def __post_init__(self) -> None:
        check_config(self)

    def model_settings(self) -> dict[str, str]:
        """NAME -> text of every setting that defines the model: what the artifact holds."""
        return {f.name.upper(): str(getattr(self, f.name)) for f in dataclasses.fields(self) if "model" in f.metadata}


setting_kinds = functools.cache(get_type_hints)  # it evaluates the annotations; reading an artifact must evaluate nothing


def parse_setting(key: str, text: str, kind: Any) -> Any:
    """The value of one environment variable; UserError names the variable, the value and the choices."""
    if get_origin(kind) is Literal:
        choices = {str(c): c for c in get_args(kind)}
        if text in choices:
            return choices[text]
        raise UserError(f"{key}={text!r}: expected {'one of ' if len(choices) > 1 else 'only '}{', '.join(choices)}")
    if kind is bool:
        if text.lower() in ("0", "1", "false", "true"):
            return text.lower() in ("1", "true")
        raise UserError(f"{key}={text!r}: expected 0 or 1")
    try:
        value = kind(text)
    except ValueError:
        raise UserError(f"{key}={text!r}: expected {'a whole number' if kind is int else 'a number'}") from None
    if kind is float and not math.isfinite(value):
        raise UserError(f"{key}={text!r}: expected a finite number")
    return value


AT_LEAST_ONE = """vocab_size num_layers model_dim num_heads num_kv_heads mlp_mult bitnet_group_size train_batch_tokens
    train_seq_len micro_batch_tokens iterations muon_backend_steps train_log_every val_batch_size sliding_eval_stride
    sliding_batch_size yarn_max_len""".split()
POSITIVE = "logit_softcap rope_base adam_eps".split()
NOT_NEGATIVE = """embed_dim warmup_steps max_wallclock_seconds val_loss_every val_max_tokens grad_clip_norm z_loss matrix_lr
    scalar_lr tied_embed_lr adam_lr adam_wd muon_wd muon_momentum_warmup_steps qk_gain_init tied_embed_init_std seed""".split()
# shards hold 16-bit tokens; the others are far beyond use, and keep an artifact's header from claiming the machine's memory
AT_MOST = {"vocab_size": 2**16, "num_layers": 256, "model_dim": 2**16, "embed_dim": 2**16, "mlp_mult": 64,
           "train_seq_len": 2**20, "seed": 2**63 - 1}
BELOW_ONE = "muon_momentum muon_momentum_warmup_start beta1 beta2".split()


def check_config(cfg: Config) -> None:
    """Ranges and combinations; raises UserError with the names and values as the user knows them."""

    def need(ok: bool, name: str, expected: str) -> None:
        if not ok:
            raise UserError(f"{name.upper()}={getattr(cfg, name)!r}: expected {expected}")

    for name in AT_LEAST_ONE:
        need(getattr(cfg, name) >= 1, name, "at least 1")
    for name in POSITIVE:
        need(getattr(cfg, name) > 0, name, "a number above 0")
    for name in NOT_NEGATIVE:
        need(getattr(cfg, name) >= 0, name, "0 or more")
    for name in BELOW_ONE:
        need(0 <= getattr(cfg, name) < 1, name, "a number in [0, 1)")
    need(0 <= cfg.warmdown_fraction <= 1, "warmdown_fraction", "a number in [0, 1]")
    need(re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,79}", cfg.run_id) is not None, "run_id", "1 to 80 letters, digits or . _ -")
    for name, most in AT_MOST.items():
        need(getattr(cfg, name) <= most, name, f"at most {most}")
    need(cfg.model_dim % cfg.num_heads == 0, "model_dim", f"a multiple of NUM_HEADS={cfg.num_heads}")
    need(cfg.head_dim % 2 == 0, "model_dim", f"an even MODEL_DIM/NUM_HEADS for rotary embeddings (NUM_HEADS={cfg.num_heads})")
    need(cfg.num_heads % cfg.num_kv_heads == 0, "num_kv_heads", f"a divisor of NUM_HEADS={cfg.num_heads}")
    divides = cfg.scale_group != "group" or math.gcd(cfg.model_dim, cfg.mlp_dim) % cfg.bitnet_group_size == 0
    need(divides, "bitnet_group_size", f"a divisor of MODEL_DIM={cfg.model_dim} and of the MLP's width {cfg.mlp_dim}")
    need(0 <= cfg.ternary_threshold <= 2, "ternary_threshold", "a number in [0, 2]")
    window = f"TRAIN_SEQ_LEN={cfg.train_seq_len}"
    need(cfg.eval_only or cfg.train_batch_tokens % cfg.train_seq_len == 0, "train_batch_tokens", f"a multiple of {window}")
    need(cfg.sliding_eval_stride <= cfg.train_seq_len, "sliding_eval_stride", f"at most {window}")
    need(cfg.rope_type == "rope" or cfg.yarn_max_len >= cfg.train_seq_len, "yarn_max_len", f"at least {window}")
    check_training_options(cfg, need)
    check_optional(cfg, need)


# ---- 2 Runtime -------------------------------------------------------------------------------------------------------
# The processes, the one clock that decides for all of them, and the log.


class World:
    """The processes of the run: one per GPU (nccl) or per CPU process (gloo). One process is the same code with size 1."""

    def __init__(self, rank: int = 0, size: int = 1, device: torch.device | None = None) -> None:
        self.rank, self.size, self.device = rank, size, device or torch.device("cpu")
        self.is_main = rank == 0

    @classmethod
    def from_env(cls, env: Mapping[str, str] = os.environ) -> World:
        """Join the processes that torchrun started (RANK, WORLD_SIZE, LOCAL_RANK); alone without them."""
        alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
        given = {name: env.get(name, default) for name, default in alone.items()}
        if not all(text.isdecimal() for text in given.values()) or not int(given["RANK"]) < int(given["WORLD_SIZE"]):
            raise UserError(f"RANK={given['RANK']!r} WORLD_SIZE={given['WORLD_SIZE']!r}: expected what torchrun sets, or nothing")
        rank, size, local_rank, local_size = map(int, given.values())
        device = torch.device("cpu")
        keep_freed_memory()
        if torch.cuda.is_available():
            if max(local_rank + 1, local_size) > torch.cuda.device_count():  # every process sees it, so rank 0 can say it
                raise UserError(f"LOCAL_WORLD_SIZE={local_size}: expected at most {torch.cuda.device_count()}, one process a GPU")
            device = torch.device("cuda", local_rank)  # LOCAL_RANK, never RANK: there may be several machines
            torch.cuda.set_device(device)
        if size > 1:
            backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
            try:
                dist.init_process_group(backend, timeout=datetime.timedelta(minutes=10))
            except (ValueError, RuntimeError) as error:
                reason = str(error).splitlines()[0]
                raise UserError(f"WORLD_SIZE={size}: the processes cannot join ({reason}); start them with torchrun") from None
        return cls(rank, size, device)

    @staticmethod
    def speaks(env: Mapping[str, str] = os.environ) -> bool:
        """Whether this process prints: known before, and even if, the processes cannot join."""
        rank = env.get("RANK", "0")
        return rank == "0" or not rank.isdecimal() or env.get("WORLD_SIZE", "1") in ("0", "1")

    def sum_(self, x: Tensor) -> Tensor:
        """Sum over all processes, in place."""
        if self.size > 1:
            dist.all_reduce(x)
        return x

    def sum_shares_(self, x: Tensor) -> Tensor:
        """x (size * n, ...): the sum over all processes, in place, in this process's n only; returns them."""
        share = x.chunk(self.size)[self.rank]
        if self.size > 1:
            getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)(share, x)
        return share

    def agree(self, value: float) -> float:
        """Rank 0's value on every process; through gloo, so that the GPU's queue is not drained."""
        if self.size == 1:
            return value
        box = torch.tensor([value], dtype=torch.float64)
        dist.broadcast(box, src=0)
        return box.item()

    def gather(self, x: Tensor) -> Tensor:
        """(n, ...) on each process -> (size * n, ...) on all, in rank order."""
        if self.size == 1:
            return x
        out = x.new_empty(self.size * x.size(0), *x.shape[1:])
        # torch 2.13 renamed the function and warns of the old name
        getattr(dist, "all_gather_single", dist.all_gather_into_tensor)(out, x.contiguous())
        return out

    def share_bytes(self, data: bytes) -> bytes:
        """Rank 0's bytes on every process (no shared disk needed)."""
        if self.size == 1:
            return data
        size = int(self.agree(len(data)))
        box = torch.frombuffer(bytearray(data), dtype=torch.uint8) if self.is_main else torch.empty(size, dtype=torch.uint8)
        dist.broadcast(box, src=0)
        return box.numpy().tobytes()

    def close(self) -> None:
        if self.size > 1:
            dist.destroy_process_group()


class Clock:
    """Training seconds since the start, without what ran inside `paused()`."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._start = self._now()

    def _now(self) -> float:
        if self._world.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def elapsed(self) -> float:
        """Seconds by the host's clock, without waiting for the GPU (the loop keeps it at most one step ahead)."""
        return time.perf_counter() - self._start

    def finish(self) -> float:
        """Seconds until everything queued so far is done."""
        return self._now() - self._start

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        before = self._now()
        yield
        self._start += self._now() - before


class Log:
    """Rank 0's record: logs/<RUN_ID>.txt and the console. A log that is already there is kept under a numbered name."""

    def __init__(self, cfg: Config, world: World, folder: str = "logs") -> None:
        self._file = None
        self._terminal = world.is_main and sys.stderr.isatty()
        if world.is_main:
            path = Path(folder) / f"{cfg.run_id}.txt"
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.exists():
                number = next(n for n in itertools.count(1) if not path.with_name(f"{cfg.run_id}.{n}.txt").exists())
                path.rename(path.with_name(f"{cfg.run_id}.{number}.txt"))
            self._file = open(path, "w", encoding="utf-8", buffering=1)

    def __call__(self, line: str, console: bool = True) -> None:
        if self._file is None:
            return
        print(line, file=self._file)
        if console:
            self.progress("")
            print(line, flush=True)

    def progress(self, text: str) -> None:
        """One line that is written over, on a terminal only."""
        if self._terminal:
            print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)


def compute_dtype(precision: str, device: torch.device) -> torch.dtype:
    """dtype of activations and matrix products. No autocast: since torch 2.12 it would return float32 from rms_norm."""
    if precision == "auto":
        # before compute capability 8 bfloat16 is emulated; nothing is compiled there, and a graph cannot ask
        recent = torch.compiler.is_compiling() or device.type == "cuda" and torch.cuda.get_device_properties(device).major >= 8
        precision = "fp32" if device.type != "cuda" else "bf16" if recent else "fp16"
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]


def write_whole(path: str | Path, data: bytes) -> None:
    """Write a file whole or not at all: an earlier one survives a full disk or a crash."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def check_writable(path: str) -> None:
    """UserError unless the artifact can be written there: known before training, not after it."""
    target = Path(path)
    if not target.name or target.is_dir():
        raise UserError(f"ARTIFACT_PATH={path!r}: expected the name of a file")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=target.parent):
            pass
    except OSError as error:
        raise UserError(f"ARTIFACT_PATH={path!r}: expected a file that can be written ({error.strerror})") from None


# ---- 3 Data ----------------------------------------------------------------------------------------------------------
# Shards in, (B, T) batches out: each process a disjoint part of the same stream, the next batch ready before it is asked for.
# Shard: 256 little-endian int32 (20240520, 1, token count, zeros), then the tokens as uint16.

SHARD_MAGIC, SHARD_VERSION, SHARD_HEADER_BYTES = 20240520, 1, 1024


def load_shard(path: Path) -> np.ndarray:
    """The tokens of a shard, memory-mapped: (count,) uint16. UserError unless header and length agree."""
    size = path.stat().st_size
    header = np.fromfile(path, dtype="<i4", count=3)
    if len(header) < 3 or header[0] != SHARD_MAGIC or header[1] != SHARD_VERSION:
        expected = f"({SHARD_MAGIC}, {SHARD_VERSION}, count)"
        raise UserError(f"{path}: not a token shard: expected a header {expected}, found {header.tolist()}")
    expected = SHARD_HEADER_BYTES + 2 * int(header[2])
    if header[2] < 1 or size != expected:
        raise UserError(f"{path}: {size} bytes, but its header promises {header[2]} tokens, that is {expected} bytes")
    return np.memmap(path, dtype="<u2", mode="r", offset=SHARD_HEADER_BYTES)


class TokenStream:
    """All shards of a split as one array of tokens, read by position; ids are checked where they are read."""

    def __init__(self, cfg: Config, split: str) -> None:
        self.paths = sorted(Path(cfg.data_path).glob(f"fineweb_{split}_*.bin"))
        if not self.paths:
            raise FileNotFoundError(f"DATA_PATH={cfg.data_path!r}: no fineweb_{split}_*.bin there; see README, section Data")
        self._shards = [load_shard(path) for path in self.paths]
        self._ends = np.cumsum([len(s) for s in self._shards])
        self._vocab_size = cfg.vocab_size
        self.num_tokens = int(self._ends[-1])

    def read(self, position: int, count: int) -> np.ndarray:
        """`count` tokens from `position` on, across shard borders and, past the end, from the start again."""
        parts = []
        while count:
            at = position % self.num_tokens
            shard = int(np.searchsorted(self._ends, at, side="right"))
            start = at - (int(self._ends[shard]) - len(self._shards[shard]))
            part = self._shards[shard][start : start + count]
            if (largest := int(part.max())) >= self._vocab_size:
                where = f"{self.paths[shard]}: token {largest} within {start}..{start + len(part)}"
                raise UserError(f"{where}, but VOCAB_SIZE={self._vocab_size}")
            parts.append(part)
            position, count = position + len(part), count - len(part)
        return np.concatenate(parts)


class Batches:
    """Training batches. A step reads the next B*T tokens of the stream (and one more: the last target), of which each
    process takes an equal run of sequences; the batch is the same whatever the number of processes."""

    def __init__(self, stream: TokenStream, world: World) -> None:
        self._stream, self._world = stream, world
        self._position = 0  # tokens consumed so far
        self._worker = ThreadPoolExecutor(1)
        self._ahead: tuple | None = None  # ((position, sequences, seq_len), future)

    @property
    def epoch(self) -> int:
        """1 while the stream is read for the first time."""
        return 1 + self._position // self._stream.num_tokens

    def state(self) -> dict[str, int]:
        return {"position": self._position}

    def restore(self, state: dict[str, int]) -> None:
        self._position = state["position"]

    def next(self, sequences: int, seq_len: int) -> tuple[Tensor, Tensor]:
        """x, y: (sequences / world size, seq_len) int64 on the device; y is x shifted by one token."""
        wanted = (self._position, sequences, seq_len)
        batch = self._ahead[1].result() if self._ahead and self._ahead[0] == wanted else self._load(*wanted)
        self._position += sequences * seq_len
        ahead = (self._position, sequences, seq_len)
        self._ahead = (ahead, self._worker.submit(self._load, *ahead))
        x, y = (t.to(self._world.device, non_blocking=True) for t in batch)
        return x, y

    def _load(self, position: int, sequences: int, seq_len: int) -> tuple[Tensor, Tensor]:
        # every process reads the whole span: a bad token is then seen, and reported, by all of them at the same step
        tokens = self._stream.read(position, sequences * seq_len + 1)
        share = sequences // self._world.size * seq_len
        mine = torch.from_numpy(tokens[self._world.rank * share :][: share + 1].astype(np.int64))
        pair = mine[:-1].view(-1, seq_len), mine[1:].view(-1, seq_len)
        return tuple(t.pin_memory() for t in pair) if self._world.device.type == "cuda" else pair


# ---- 4 Ternary format ------------------------------------------------------------------------------------------------
# What a stored weight is, and its bytes. Pure functions; training, export, diagnostics and tests call the same ones.


class ScaleFormat(NamedTuple):
    """How a group's scale is computed and stored, and where its codes change."""

    stat: Literal["absmean", "rms", "lstsq"] = "absmean"
    storage: Literal["e4m3", "fp16", "bf16"] = "e4m3"
    threshold: float = 0.5
    binary: bool = False  # codes are the signs, -1 and 1; 0 counts as positive (#641)


def ternarize(w: Tensor, group_size: int, form: ScaleFormat = ScaleFormat()) -> tuple[Tensor, Tensor]:  # noqa: B008
    """BitNet b1.58 (arXiv:2402.17764): codes (groups, G) in {-1, 0, 1} and one scale (groups, 1) per G weights in a row.

    absmean: the mean magnitude, codes are round(w / scale) clipped to 1, written as a comparison. rms: the root mean square
    (#920). lstsq: codes as for absmean, scale with the least squared error, the mean magnitude of what is not 0 (Ternary
    Weight Networks, arXiv:1605.04711). The scale is rounded as it is stored: what is trained is what is stored. With sums in
    float64, whose order the rounding cannot see, CPU, GPU and compiled code get the same bits.
    """
    groups = w.float().reshape(-1, group_size)
    size = groups.abs()
    mean = (size.square() if form.stat == "rms" else size).sum(-1, keepdim=True, dtype=torch.float64) / group_size
    scale = round_scale((mean.sqrt() if form.stat == "rms" else mean).float(), "fp16" if form.stat == "lstsq" else form.storage)
    limit = form.threshold * scale
    codes = 1 - 2 * (groups < 0).float() if form.binary else (groups > limit).float() - (groups < -limit).float()
    if form.stat == "lstsq":
        nonzero = codes.abs()
        total = (size * nonzero).sum(-1, keepdim=True, dtype=torch.float64)
        scale = round_scale((total / nonzero.sum(-1, keepdim=True, dtype=torch.float64).clamp_min(1)).float(), form.storage)
    return codes, scale


# storage -> (mantissa bits dropped from float32's 23, smallest and largest value). A scale has no sign, so a byte holds e4m3's
# three mantissa bits and five exponent bits: no second scale is needed to bring it into range
SCALE_STORAGES = {"fp16": (13, 2.0**-14, 65504.0), "bf16": (16, 2.0**-100, 2.0**100), "e4m3": (20, 2.0**-24, 240.0)}
E4M3_FIRST = (127 - 24) << 3  # the upper bits of float32's 2^-24, code 0


def drop_mantissa(x: Tensor, dropped: int) -> Tensor:
    """float32 rounded to `dropped` mantissa bits fewer (ties to even), in its bits."""
    bits = x.view(torch.int32)
    return ((bits + ((1 << (dropped - 1)) - 1) + ((bits >> dropped) & 1)) & -(1 << dropped)).view(torch.float32)


def round_scale(x: Tensor, storage: str) -> Tensor:
    """Positive float32 values as they will be stored."""
    dropped, smallest, largest = SCALE_STORAGES[storage]
    return drop_mantissa(x, dropped).clamp(smallest, largest)


def round_half(x: Tensor) -> Tensor:
    """float32 rounded to float16's values (ties to even) in its bits: torch.compile drops the pair .half().float()."""
    small = torch.copysign((x.abs() + 0.5) - 0.5, x)  # below 2^-14 values are 2^-24 apart, as they are in float32 above 0.5
    return torch.where(x.abs() < 2.0**-14, small, drop_mantissa(x, 13))


def round_fp8(w: Tensor) -> tuple[Tensor, Tensor]:
    """e4m3 codes (as w) and one scale: the power of two that brings the largest weight just under 448, e4m3's largest.

    A power of two rounds nothing, so codes * scale is exact in bfloat16 too. It is found in the bits of the largest weight,
    the same on every device: 448 = 1.75 * 2^8, so the exponent grows by one where the mantissa is above 1.75.
    """
    bits = w.detach().abs().amax().float().clamp_min(2.0**-100).view(torch.int32)
    scale = ((((bits + 0x1FFFFF) >> 23) - 8) << 23).view(torch.float32)
    return (w.float() / scale).clamp(-448, 448).to(torch.float8_e4m3fn), scale


def round_table(w: Tensor, storage: str) -> Tensor:
    """A table or one of its projections as it comes back from the artifact, float32."""
    if storage == "FP16":
        return round_half(w)
    codes, scale = round_fp8(w) if storage == "FP8" else round_rows(w, storage)
    return codes.float() * scale


class StraightThrough(torch.autograd.Function):
    """Forward: the stored value, exactly. Backward: the gradient as it is, to the latent one (arXiv:1308.3432)."""

    @staticmethod
    def forward(ctx: Any, latent: Tensor, stored: Tensor) -> Tensor:  # noqa: ARG004
        return stored.view_as(stored)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:  # noqa: ARG004
        return g, None


def as_stored(control: Tensor) -> Tensor:
    """A control (gain, scale, bias, mix) at its stored precision, float16."""
    return StraightThrough.apply(control, round_half(control.detach()))


# Entropy coding: interleaved rANS (Duda, arXiv:1311.2540; Giesen, arXiv:1402.3392) with static tables. Each lane has a 32-bit
# state of at least 2^16 and exchanges 16-bit words with one common stream; numpy advances all lanes at once. Probabilities are
# whole numbers of 2^-14. Integers only: the same bytes on every machine.

ANS_BITS, ANS_LOWEST, ANS_SLAB = 14, 1 << 16, 1 << 17
ANS_TOTAL = 1 << ANS_BITS


def ans_lanes(count: int) -> int:
    """Lanes for `count` symbols: more are faster, each costs 4 bytes."""
    return 1 << min(11, max(0, count.bit_length() - 14))


def ans_frequencies(counts: np.ndarray) -> np.ndarray:
    """Counts (256,) -> frequencies that add up to 2^14, at least 1 for what occurs; all 0 if nothing does."""
    total = int(counts.sum())
    if not total:
        return np.zeros(256, np.int64)
    f = np.where(counts > 0, np.maximum(1, counts * ANS_TOTAL // total), 0)
    while excess := int(f.sum()) - ANS_TOTAL:
        f[f.argmax()] -= min(excess, int(f.max()) // 2)  # a lack (excess below 0) goes to the most frequent symbol at once
    return f


def ans_encode(symbols: np.ndarray, contexts: np.ndarray) -> bytes:
    """(n,) uint8 symbols under the tables that `contexts` (n,) names: count and number of tables (uint32, uint16), for each
    table its first and last symbol (uint8) and the frequencies between (below 128 a byte, else two: low seven bits with the
    eighth set, then the rest), the lanes' states, the words."""
    count, lanes = symbols.size, ans_lanes(symbols.size)
    tables, slab = int(contexts.max(initial=0)) + 1, max(lanes, ANS_SLAB)
    counts = np.zeros(tables << 8, np.int64)
    for a in range(0, count, slab):
        counts += np.bincount((contexts[a : a + slab].astype(np.int32) << 8) | symbols[a : a + slab], minlength=tables << 8)
    frequencies = np.stack([ans_frequencies(c) for c in counts.reshape(tables, 256)])
    f_table, start_table = (t.reshape(-1).astype(np.uint32) for t in (frequencies, frequencies.cumsum(1) - frequencies))
    state, words = np.full(lanes, ANS_LOWEST, np.uint32), []
    for a in reversed(range(0, count, slab)):  # last symbol first: the decoder then reads forwards
        index = (contexts[a : a + slab].astype(np.int32) << 8) | symbols[a : a + slab]
        f, start = f_table[index], start_table[index]
        largest = ((f.astype(np.uint64) << (32 - ANS_BITS)) - 1).astype(np.uint32)  # a state above it would overflow
        for i in reversed(range(0, len(f), lanes)):
            f_i, x = f[i : i + lanes], state[: len(f[i : i + lanes])]
            full = x > largest[i : i + lanes]
            words.append(x[full].astype("<u2"))
            x = np.where(full, x >> 16, x)
            quotient = x // f_i
            state[: len(x)] = (quotient << ANS_BITS) + (x - quotient * f_i) + start[i : i + lanes]
    parts = [struct.pack("<IH", count, tables)]
    for f in frequencies:
        used = np.flatnonzero(f)
        first, last = (int(used[0]), int(used[-1])) if used.size else (1, 0)
        numbers = (bytes([n] if n < 128 else [n & 127 | 128, n >> 7]) for n in f[first : last + 1].tolist())
        parts += [bytes([first, last]), *numbers]
    return b"".join([*parts, state.astype("<u4").tobytes(), *(w.tobytes() for w in reversed(words))])


class AnsStream(NamedTuple):
    """The parts of what `ans_encode` wrote."""

    count: int
    frequencies: np.ndarray  # (tables, 256)
    state: np.ndarray  # (lanes,) uint32
    words: np.ndarray  # uint16

    @classmethod
    def parse(cls, data: bytes, count: int) -> AnsStream:
        """ArtifactError unless it is a stream of `count` symbols with enough bits for them; allocates tables only."""
        try:
            found, tables = struct.unpack_from("<IH", data)
            frequencies, at = np.zeros((tables if tables <= 256 else 0, 256), np.int64), 6
            for row in frequencies:
                first, last, at = data[at], data[at + 1], at + 2
                for symbol in range(first, last + 1):
                    wide = data[at] >= 128
                    row[symbol], at = (data[at] & 127 | data[at + 1] << 7, at + 2) if wide else (data[at], at + 1)
            state = np.frombuffer(data, "<u4", ans_lanes(count), at)
            words = np.frombuffer(data, "<u2", -1, at + state.nbytes) if at + state.nbytes < len(data) else np.empty(0, "<u2")
        except (struct.error, ValueError, IndexError):
            raise ArtifactError("a stream is cut off") from None
        sums = frequencies.sum(1)
        if found != count or not sums.size or ((sums != ANS_TOTAL) & (sums != 0)).any() or not sums.any() and count:
            raise ArtifactError(f"a stream is not that of {count} symbols under valid frequencies")
        fewest_bits = count * math.log2(ANS_TOTAL / max(1, frequencies.max()))  # were every symbol the most probable one
        if fewest_bits > 1.01 * (16 * len(words) + 32 * len(state)):
            raise ArtifactError(f"a stream is too short for {count} symbols")
        return cls(count, frequencies, state, words)

    def decode(self, contexts: np.ndarray) -> np.ndarray:
        """(count,) uint8; `contexts` as in ans_encode. ArtifactError unless words and states come out even."""
        lanes, count, words, known = len(self.state), self.count, self.words.astype(np.uint32), self.frequencies.any(1)
        slots = [np.repeat(np.arange(256, dtype=np.uint8), f) for f in self.frequencies]
        symbol_table = np.concatenate([s if s.size else np.zeros(ANS_TOTAL, np.uint8) for s in slots])
        starts = self.frequencies.cumsum(1) - self.frequencies
        f_table, start_table = (t.reshape(-1).astype(np.uint32) for t in (self.frequencies, starts))
        state, out, at, slab = self.state.copy(), np.empty(count, np.uint8), 0, max(lanes, ANS_SLAB)
        for a in range(0, count, slab):
            context = contexts[a : a + slab].astype(np.uint32)
            if int(context.max()) >= len(known) or not known[context].all():
                raise ArtifactError("a stream lacks a table of frequencies")
            by_slot, by_symbol = context << ANS_BITS, context << 8
            for i in range(0, len(context), lanes):
                table = by_slot[i : i + lanes]
                x = state[: len(table)]
                slot = x & (ANS_TOTAL - 1)
                symbol = symbol_table[table | slot]
                index = by_symbol[i : i + lanes] | symbol
                x = f_table[index] * (x >> ANS_BITS) + slot - start_table[index]
                low = np.flatnonzero(x < ANS_LOWEST)
                more = words[at : at + len(low)]
                if len(more) < len(low):
                    raise ArtifactError("a stream is cut off")
                x[low] = (x[low] << 16) | more
                at += len(low)
                state[: len(x)] = x
                out[a + i : a + i + len(x)] = symbol
        if at != len(words) or (state != ANS_LOWEST).any():
            raise ArtifactError("a stream is damaged: it does not end as it began")
        return out


# ---- 5 Model ---------------------------------------------------------------------------------------------------------
# Tokens (B, T) in, nats per token (B, T) out. Every weight enters the forward pass at the precision it is stored in.


def rms_norm(x: Tensor) -> Tensor:
    return F.rms_norm(x, (x.size(-1),), eps=1e-6)  # PyTorch's default eps differs by dtype: 0.0078 in bfloat16


class Rotary(nn.Module):
    """Rotary position embedding, or #640's YaRN variant: a fixed spectrum whose low frequencies are divided by up to
    yarn_max_len / train_seq_len."""

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        i = torch.arange(0, cfg.head_dim, 2, dtype=torch.float64) / cfg.head_dim
        frequency = cfg.rope_base**-i
        if cfg.rope_type == "yarn":
            ramp = ((i - 0.25) / 0.75).clamp(0, 1)
            frequency = frequency / (1 + ramp * (cfg.yarn_max_len / cfg.train_seq_len - 1))
        positions = torch.arange(max(cfg.train_seq_len, cfg.score_window), dtype=torch.float64)
        angle = torch.outer(positions, frequency)[:, None]  # (T, 1, C/2)
        self.register_buffer("cos", angle.cos().float(), persistent=False)
        self.register_buffer("sin", angle.sin().float(), persistent=False)

    def forward(self, x: Tensor, tables: tuple[Tensor, Tensor] | None = None) -> Tensor:
        cos, sin = (t[: x.size(1)].to(x.dtype) for t in tables or (self.cos, self.sin))
        a, b = x.chunk(2, dim=-1)  # (B, T, H, C/2)
        return torch.cat((a * cos + b * sin, b * cos - a * sin), dim=-1)


class Role(NamedTuple):
    """What a parameter's owner decides for it: its optimizer and its form in the artifact."""

    optimizer: Literal["matrix", "table", "control", "head", "correction"]
    storage: Literal["ternary", "table", "control", "none"]


class QuantizedLinear(nn.Module):
    """A bias-free matrix (out, in) that is used as it will be stored. `frozen` (set by load_artifact): it already is."""

    role: Role
    frozen = False

    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_dim, in_dim))
        self.register_buffer("operand", None, persistent=False)  # see `rounded_once`
        self.prepare = nn.Identity()  # what happens to the input first
        self.product = StoredProduct()

    def rounded(self) -> Tensor:
        """The weight as it would come back from the artifact: float32, detached."""
        raise NotImplementedError

    def stored(self, dtype: torch.dtype) -> Tensor:
        """The weight that the matrix product uses."""
        if self.operand is not None:
            return self.operand.to(dtype)
        return (self.weight.detach() if self.frozen else self.rounded()).to(dtype)

    @torch.no_grad()
    def keep_rounded(self, dtype: torch.dtype) -> None:
        """Round once for all uses until the next call."""
        kept, self.operand = self.operand, None
        stored = self.stored(dtype)
        self.operand = stored if kept is None else kept.copy_(stored)
        self.product.refresh(self.operand)

    def forward(self, x: Tensor) -> Tensor:
        return self.product(self.prepare(x), self)


class TernaryLinear(QuantizedLinear):
    role = Role("matrix", "ternary")

    def __init__(self, in_dim: int, out_dim: int, cfg: Config, init_std: float = 0.02) -> None:
        super().__init__(in_dim, out_dim)
        self.group_size = {"group": cfg.bitnet_group_size, "row": in_dim, "tensor": in_dim * out_dim}[cfg.scale_group]
        self.form = ScaleFormat(cfg.scale_stat, cfg.scale_storage, cfg.ternary_threshold, cfg.weight_quant == "binary")
        self.format = (self.group_size, self.form)
        self.product = Fp8Product(in_dim, cfg) if cfg.act_quant == "fp8" else self.product
        nn.init.normal_(self.weight, std=init_std) if init_std else nn.init.zeros_(self.weight)

    def ternarized(self) -> tuple[Tensor, Tensor]:
        """Codes (groups, G) and scales (groups, 1)."""
        return ternarize(self.weight.detach(), *self.format)

    def rounded(self) -> Tensor:
        codes, scale = self.ternarized()
        return codes.mul_(scale).view_as(self.weight)


class TableProjection(QuantizedLinear):
    """A projection between embedding and model width: under Muon like the ternary matrices, stored like the table (#640)."""

    role = Role("matrix", "table")

    def __init__(self, in_dim: int, out_dim: int, fp_storage: str) -> None:
        super().__init__(in_dim, out_dim)
        self.fp_storage = fp_storage
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))  # as torch.nn.Linear

    def rounded(self) -> Tensor:
        return round_table(self.weight.detach(), self.fp_storage)


class Table(TableProjection):
    """The tied embedding (V, E): rows for the input, the same rounded rows for the output."""

    role = Role("table", "table")

    def __init__(self, vocab_size: int, dim: int, fp_storage: str, init_std: float) -> None:
        super().__init__(dim, vocab_size, fp_storage)
        nn.init.normal_(self.weight, std=init_std)

    def rows(self, idx: Tensor, dtype: torch.dtype) -> Tensor:
        """The input side: (...) -> (..., E)."""
        return StoredLookup.apply(idx, self.weight, self.stored(dtype))


ACTIVATIONS = {"relu2": lambda x: F.relu(x).square()}


class Attention(nn.Module):
    """Grouped-query attention with normalized queries and keys and one fused ternary projection."""

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        self.head_dim = cfg.head_dim
        self.qkv = matrix(cfg.model_dim, [n * cfg.head_dim for n in (cfg.num_heads, cfg.num_kv_heads, cfg.num_kv_heads)], cfg)
        self.out = attention_output(cfg) or matrix(cfg.model_dim, [cfg.model_dim], cfg, init_std=0)
        self.q_gain = nn.Parameter(torch.full((cfg.num_heads,), cfg.qk_gain_init))
        self.rotary = rotary_kind(cfg)(cfg)
        self.flash, self.attend, self.norm = flash_attention_3(cfg), banded(attend, cfg.attention_window), output_norm(cfg)

    def forward(self, x: Tensor, tail: int = 0) -> Tensor:
        """(B, T, D) -> (B, T, D); with `tail` only the last `tail` positions attend: (B, tail, D)."""
        qkv = self.qkv(x).unflatten(-1, (-1, self.head_dim))  # (B, T, H + K + K, C)
        q, k, v = qk_norm_rope(qkv, as_stored(self.q_gain), self.rotary)
        return normed_product(self.mix(q[:, -tail:], k, v).flatten(2), self.out, self.norm)

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Causal attention: (B, T, H | K | K, C) -> (B, T, H, C)."""
        return (self.flash if q.is_cuda and self.flash is not None else self.attend)(q, k, v)


class MLP(nn.Module):
    def __init__(self, cfg: Config, groups: int = 1) -> None:
        super().__init__()
        width, hidden = cfg.model_dim // groups, cfg.mlp_dim // groups
        self.up = matrix(width, [hidden * ACTIVATION_INPUTS.get(cfg.activation, 1)], cfg)
        self.down = matrix(hidden, [width], cfg, init_std=0)
        self.activation, self.norm = (ACTIVATIONS | OTHER_ACTIVATIONS)[cfg.activation], output_norm(cfg)

    def forward(self, x: Tensor) -> Tensor:
        return fused_mlp(x, self) if mlp_fuses(x, self) else normed_product(self.activation(self.up(x)), self.down, self.norm)


class Block(nn.Module):
    """Mix in the embedding, then attention and MLP, each on the normalized stream and scaled per channel."""

    def __init__(self, cfg: Config, index: int) -> None:
        super().__init__()
        self.attention, self.mlp = attention_kind(cfg, index)(cfg), mlp_kind(cfg)(cfg)
        self.resid_mix = nn.Parameter(torch.stack((torch.ones(cfg.model_dim), torch.zeros(cfg.model_dim)))[: 2 * cfg.resid_mix])
        self.attn_scale = nn.Parameter(torch.ones(cfg.model_dim))
        self.mlp_scale = nn.Parameter(torch.ones(cfg.model_dim))
        self.smear = Smear(cfg) if cfg.smear else nn.Identity()

    def forward(self, x: Tensor, x0: Tensor, tail: int = 0) -> Tensor:
        mix, attn_scale, mlp_scale = (as_stored(p).to(x.dtype) for p in (self.resid_mix, self.attn_scale, self.mlp_scale))
        x = mix[0] * x + mix[1] * x0 if len(mix) else x
        x = x[:, -tail:] + attn_scale * self.attention(rms_norm(x), tail)
        return self.smear(x + mlp_scale * self.mlp(rms_norm(x)))


def poly_softcap(logits: Tensor, cap: float) -> Tensor:
    """cap * clip(u - u^3/3 + u^5/15, -1, 1), u = clip(logits/cap, -2, 2): #640's (not tanh's series, which ends in 2/15)."""
    u = (logits / cap).clamp(-2, 2)
    u2 = u * u
    return cap * (u * (1 - u2 / 3 + u2 * u2 / 15)).clamp(-1, 1)


SOFTCAPS = {"poly": poly_softcap, "tanh": lambda logits, cap: cap * torch.tanh(logits / cap)}


class GPT(nn.Module):
    """U-Net transformer with a factored tied embedding. `model(x, y)` gives the nats of each target: (B, T), (B, T) -> (B, T)."""

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        self.cfg = cfg
        width, init_std = cfg.embed_dim or cfg.model_dim, cfg.tied_embed_init_std if cfg.tie_embeddings else 1.0
        self.table = table_kind(cfg)(cfg.vocab_size, width, cfg.fp_storage, init_std)
        self.embed_in = TableProjection(width, cfg.model_dim, cfg.fp_storage) if cfg.embed_dim else nn.Identity()
        self.embed_out = projection_kind(cfg)(cfg.model_dim, width, cfg.fp_storage) if cfg.embed_dim else nn.Identity()
        self.output = output_table(cfg, self.table)  # the same table, unless an option unties them
        self.blocks = share_features(nn.ModuleList(block_kind(cfg, i)(cfg, i) for i in range(count_blocks(cfg))), cfg)
        self.skip_weights = nn.Parameter(torch.ones(count_skips(cfg), cfg.model_dim))
        self.vocab_bias = nn.Parameter(torch.zeros(cfg.vocab_size))
        self.position = RadialEncoding(cfg) if cfg.position == "radial" else nn.Identity()
        self.refiner = Refiner(cfg) if cfg.refiner else nn.Identity()
        self.mtp_heads = nn.ModuleList(FutureHead(cfg) for _ in range(cfg.mtp_heads))
        self.softcap = SOFTCAPS[cfg.softcap_type]
        self.register_buffer("temperature", torch.ones(()))  # saved; divides the logits of the sliding score only

    def hidden(self, idx: Tensor, training: bool = False, tail: int = 0) -> Tensor:
        """Final normalized states (B, T, D): the first half of the blocks pushes skips, the second half pops them.

        With `tail` only those of the last `tail` positions, (B, tail, D): the last pass computes no others.
        """
        dtype = compute_dtype(self.cfg.precision, idx.device)
        x = x0 = self.position(rms_norm(self.embed_in(self.table.rows(idx, dtype))))
        skip_weights, skips = as_stored(self.skip_weights).to(dtype), []
        passes, asked = block_order(self.cfg, training), tail
        tail = 0 if self.cfg.smear or self.cfg.refiner else tail  # they look at the positions before
        for i, (block, skip, pushes) in enumerate(passes, 1):
            if skip is not None:
                x = x + skip_weights[skip] * skips.pop()
            x = self.blocks[block](x, x0, tail if i == len(passes) else 0)
            if pushes:
                skips.append(x)
        return self.refiner(rms_norm(x))[:, -asked:]

    def logits(self, h: Tensor) -> Tensor:
        """Softcapped logits, float32: (..., D) -> (..., V)."""
        return self.softcap(self.output(self.embed_out(h)).float() + as_stored(self.vocab_bias), self.cfg.logit_softcap)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return token_nats(self.logits(self.hidden(x)), y)[0]


def token_nats(logits: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Cross entropy of each target and the log-sum-exp behind it, in nats: (..., V), (...) -> (...), (...)."""
    lse = logits.logsumexp(-1)
    return lse - logits.gather(-1, y.unsqueeze(-1)).squeeze(-1), lse


def parameter_owners(model: nn.Module) -> Iterator[tuple[str, nn.Module, nn.Parameter, Role]]:
    """(name, owner, parameter, role) of every parameter, in the order of the artifact. The owner's class decides the role."""
    for prefix, module in model.named_modules():
        for name, p in module.named_parameters(prefix, recurse=False):
            yield name, module, p, getattr(module, "role", Role("control", "control"))


@contextlib.contextmanager
def rounded_once(model: nn.Module) -> Iterator[None]:
    """Within it every matrix is kept as it will be stored, and not rounded at each use; training renews it (`publish`)."""
    layers = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    for layer in layers:
        layer.keep_rounded(compute_dtype(model.cfg.precision, layer.weight.device))
    try:
        yield
    finally:
        for layer in layers:
            layer.operand = None


def zero_fraction(model: nn.Module) -> float:
    """Share of zeros among the ternary codes."""
    owners = [(module, p) for _, module, p, role in parameter_owners(model) if role.storage == "ternary"]
    zeros = sum(int((module.ternarized()[0] == 0).sum()) for module, _ in owners)
    return zeros / max(1, sum(p.numel() for _, p in owners))


# ---- 6 Optimizer -----------------------------------------------------------------------------------------------------
# Matrices under NeoMuon, the embedding table and the controls under Adam; learning rates from one pure schedule.


def orthogonalize(g: Tensor, steps: int) -> Tensor:
    """The nearest (semi-)orthogonal matrix to each of (n, rows, columns), roughly: Newton-Schulz with Muon's quintic.

    Singular values come out between 0.7 and 1.2 after 5 steps; 16 bits on a GPU.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    wide = g.size(-2) <= g.size(-1)
    x = g if wide else g.mT
    x = (x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)).to(compute_dtype("auto", g.device))
    for _ in range(steps):
        s = x @ x.mT
        x = a * x + (b * s + c * s @ s) @ x
    return x if wide else x.mT


def nesterov(g: Tensor, state: dict[str, Tensor], momentum: float) -> Tensor:
    """Momentum as a sum of gradients, seen one step ahead."""
    if "momentum" not in state:
        state["momentum"] = torch.zeros_like(g)
    return g.add(state["momentum"].mul_(momentum).add_(g), alpha=momentum)


class NeoMuon(torch.optim.Optimizer):
    """Muon whose Nesterov update is normalized row by row before it is orthogonalized (#640; MuonEq-R, #1394).

    Parameters are banks' shards (n, rows, columns), each updated in one batch of matrix products.
    """

    def __init__(self, shards: list[nn.Parameter], cfg: Config, world: World) -> None:
        super().__init__(shards, {"lr": cfg.matrix_lr, "base_lr": cfg.matrix_lr, "momentum": cfg.muon_momentum})
        self.cfg, self._rule = cfg, MATRIX_UPDATES.get(cfg.matrix_optimizer)
        self._orthogonalize, self._steps = compiled(orthogonalize, cfg, world), cfg.muon_backend_steps

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                update = self._update(p.grad, self.state[p], group["momentum"])
                if self.cfg.muon_wd:
                    p.mul_(1 - group["lr"] * self.cfg.muon_wd)
                p.add_(update, alpha=-group["lr"])

    def _update(self, g: Tensor, state: dict[str, Tensor], momentum: float) -> Tensor:
        """(n, rows, columns) gradients -> updates; `state` holds their momentum."""
        if self._rule:
            return self._rule(self, g, state, momentum)
        u = nesterov(g, state, momentum)
        # a row without gradient stays 0
        return self.orthogonal(u * u.square().mean(-1, keepdim=True).add_(1e-20).rsqrt_())

    def orthogonal(self, u: Tensor) -> Tensor:
        return self._orthogonalize(u, self._steps).to(u.dtype) * max(1, u.size(-2) / u.size(-1)) ** 0.5


def build_optimizers(model: nn.Module, cfg: Config, world: World, banks: list[Bank]) -> list[torch.optim.Optimizer]:
    """Every parameter in exactly one optimizer, by its role. Groups carry `base_lr`, which the schedule scales."""
    rates = {"table": cfg.tied_embed_lr, "control": cfg.scalar_lr} | output_rates(cfg)
    roles: dict[str, list[nn.Parameter]] = {name: [] for name in ("matrix", *rates)}
    for _, _, p, role in parameter_owners(model):
        roles[role.optimizer].append(p)

    def adam(params: list[nn.Parameter], lr: float, weight_decay: float = 0.0) -> torch.optim.Optimizer:
        group = {"params": params, "lr": lr, "base_lr": lr}
        return torch.optim.AdamW([group], betas=(cfg.beta1, cfg.beta2), eps=cfg.adam_eps, weight_decay=weight_decay, fused=True)

    shards = [bank.shard for bank in banks]
    adamw = cfg.matrix_optimizer == "adamw"
    matrices = adam(shards, cfg.adam_lr, cfg.adam_wd) if adamw else NeoMuon(shards, cfg, world)
    others = [adam(roles[name], rate) for name, rate in rates.items() if roles[name]]
    grouped = [module.weight for bank in banks for module in bank.modules] + [p for name in rates for p in roles[name]]
    assert len(grouped) == len(set(grouped)) and set(grouped) == set(model.parameters())
    return [matrices, *others]


class Stage(NamedTuple):
    """What the schedule sets for a step."""

    lr_scale: float
    momentum: float
    seq_len: int
    batch_tokens: int


def schedule(cfg: Config, step: int, progress: float) -> Stage:
    """Constant learning rates, then linear to 0 over the last warmdown_fraction of the budget; momentum warms up by steps."""
    left = min(1.0, max(0.0, 1 - progress) / cfg.warmdown_fraction) if cfg.warmdown_fraction else 1.0
    warm = min(1.0, step / cfg.muon_momentum_warmup_steps) if cfg.muon_momentum_warmup_steps else 1.0
    momentum = (1 - warm) * cfg.muon_momentum_warmup_start + warm * cfg.muon_momentum
    return Stage(shaped_rate(cfg, step, progress, left), momentum, *step_shape(cfg, step, progress))


def apply_stage(optimizers: list[torch.optim.Optimizer], stage: Stage) -> None:
    for group in (group for opt in optimizers for group in opt.param_groups):
        group["lr"] = group["base_lr"] * stage.lr_scale
        if "momentum" in group:
            group["momentum"] = stage.momentum


# ---- 7 Training ------------------------------------------------------------------------------------------------------
# Batches in, a trained model and the figures of the run out. One flat loop; one progress for clock and step limits.


def batch_layout(cfg: Config, world_size: int, shape: tuple[int, int] | None = None) -> tuple[int, int]:
    """(micro-batches, sequences a micro-batch) of one process: the fewest that fit MICRO_BATCH_TOKENS and divide evenly.
    `shape`: (seq_len, batch_tokens) where a schedule sets others than the config.

    A step has at least two over all processes. One process then adds the same two gradients as two processes do, so that
    their runs agree to the last bit on a CPU; with another order of summation, rounding moves codes over the thresholds of
    `ternarize`, and the losses part by 0.006 within 20 steps (RESULTS.md R004).
    """
    seq_len, batch_tokens = shape or (cfg.train_seq_len, cfg.train_batch_tokens)
    sequences = batch_tokens // seq_len
    if sequences % world_size:
        divisors = [n for n in range(1, sequences + 1) if sequences % n == 0]
        nearest = sorted(sorted(divisors, key=lambda n: abs(n - world_size))[:2])
        raise UserError(
            f"WORLD_SIZE={world_size} must divide the {sequences} sequences of a step (TRAIN_BATCH_TOKENS="
            f"{batch_tokens} / TRAIN_SEQ_LEN={seq_len}); nearest valid: {' and '.join(map(str, nearest))}"
        )
    share, largest = sequences // world_size, max(1, cfg.micro_batch_tokens // seq_len)
    largest = min(largest, share, max(1, sequences // 2))
    micro = max(n for n in range(1, largest + 1) if share % n == 0)
    return share // micro, micro


def training_loss(model: GPT, x: Tensor, y: Tensor, z_loss: float, h: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(what is minimized, cross entropy), both summed over the tokens; `h`: the hidden states, if they are there already."""
    h = model.hidden(x, training=True) if h is None else h
    if (fused := fused_loss(model, h, y, z_loss)) is not None:
        return fused
    nats, lse = token_nats(model.logits(h), y)
    return nats.sum() + z_loss * lse.square().sum(), nats.detach().sum()


class Gradients:
    """All gradients in buffers made once: the matrices' in their banks, the others', and the loss, in a flat one."""

    def __init__(self, model: nn.Module, world: World) -> None:
        self._world, self.banks, self.scale = world, Bank.build(model, model.cfg, world), 1.0  # scale: see LossScaler
        others = [p for p in model.parameters() if p.grad is None]
        self.flat = torch.zeros(sum(p.numel() for p in others) + 1, device=world.device)
        self.loss = self.flat[-1]
        for p, g in zip(others, self.flat[:-1].split([p.numel() for p in others]), strict=True):
            p.grad = g.view_as(p)

    def compute(self, loss_function: Callable, x: Tensor, y: Tensor, micro_batches: int) -> None:
        """Mean gradient and mean loss of the step over the tokens of all processes; of the matrices, in this process's shards."""
        for buffer in self._buffers():
            buffer.zero_()
        tokens = x.numel() * self._world.size
        for micro_x, micro_y in zip(x.chunk(micro_batches), y.chunk(micro_batches), strict=True):
            loss, nats = loss_function(micro_x, micro_y)
            (loss / (tokens / self.scale)).backward()
            self.loss += nats / tokens
        for bank in self.banks:
            self._world.sum_shares_(bank.grads)
        self._world.sum_(self.flat)

    def _buffers(self) -> list[Tensor]:
        return [self.flat, *(bank.grads for bank in self.banks)]


CALIBRATION_TOKENS = 65_536
TEMPERATURES = (0.85, 0.9, 0.95, 1.0, 1.05, 1.1, 1.15)


@torch.no_grad()
def calibrate_temperature(model: GPT, x: Tensor, y: Tensor, world: World) -> float:
    """The logits' best divisor on training tokens, at positions with at least half a window before them, as in the
    sliding score. The grid's minimum, refined by the parabola through its neighbours."""
    nats = torch.zeros(len(TEMPERATURES), dtype=torch.float64, device=x.device)
    for i in range(0, x.size(0), step := max(1, model.cfg.micro_batch_tokens // x.size(1))):
        half = x.size(1) // 2
        logits, targets = model.logits(model.hidden(x[i : i + step])[:, half:]), y[i : i + step, half:]
        nats += torch.stack([token_nats(logits / t, targets)[0].sum(dtype=torch.float64) for t in TEMPERATURES])
    losses = world.sum_(nats).tolist()
    best = min(range(len(losses)), key=losses.__getitem__)
    if best in (0, len(losses) - 1):
        return TEMPERATURES[best]
    left, middle, right = losses[best - 1 : best + 2]
    spacing = TEMPERATURES[1] - TEMPERATURES[0]
    return TEMPERATURES[best] + spacing * (left - right) / max(2 * (left - 2 * middle + right), 1e-12)


def calibration_sequences(cfg: Config, world: World) -> int:
    """Sequences for the temperature over all processes: 65,536 tokens, fewer where a step is small."""
    wanted = min(CALIBRATION_TOKENS, 4 * cfg.train_batch_tokens) // cfg.train_seq_len
    return max(1, wanted // world.size) * world.size


def warm_up(model: GPT, world: World, log: Log, take_step: TrainingStep) -> float:
    """Compile every shape of the loop on random tokens, before the clock starts; weights and optimizers are restored.

    Returns the seconds that the temperature takes, which the loop leaves free at its end.
    """
    cfg = model.cfg
    weights = [p.detach().clone() for p in model.parameters()]
    runs = [shape for shape in step_shapes(cfg) for _ in range(cfg.warmup_steps)]
    for i, (seq_len, tokens) in enumerate(runs):
        x = torch.randint(cfg.vocab_size, (tokens // seq_len // world.size, seq_len), device=world.device)
        untie_when_due(model, i % cfg.warmup_steps / max(1, cfg.warmup_steps - 1))
        take_step.take(x, x)
        log(f"warmup:{i + 1}/{len(runs)}")
    with torch.no_grad():
        for p, w in zip(model.parameters(), weights, strict=True):
            p.copy_(w)
    take_step.restart()
    if not cfg.temp_scaling:
        return 0.0
    x = torch.randint(cfg.vocab_size, (calibration_sequences(cfg, world) // world.size, cfg.train_seq_len), device=world.device)
    for _ in range(2):  # the first call also loads kernels
        clock = Clock(world)
        calibrate_temperature(model, x, x, world)
    return world.agree(clock.finish())


class TrainingStep:
    """What a step computes: gradients of all micro-batches, their sum over the processes, the optimizers, the rounding.

    Used within `rounded_once`; `grads.loss` is the step's cross entropy, a device scalar.
    """

    def __init__(self, model: GPT, cfg: Config, world: World) -> None:
        self.cfg, self.model, self.world = cfg, model, world
        self.grads = gradients_kind(cfg)(model, world)
        self.optimizers = build_optimizers(model, cfg, world, self.grads.banks)
        self.loss_function = compiled(loss_kind(cfg), cfg, world)
        banked = {layer for bank in self.grads.banks for layer in bank.modules}
        self.others = [m for m in model.modules() if isinstance(m, QuantizedLinear) and m not in banked]
        self.restart()

    def restart(self) -> None:
        """As if no step had been taken, with the weights as they are."""
        self.scaler = loss_scaler(self.cfg, self.grads, self.world)
        for opt in self.optimizers:
            opt.state.clear()
        self.publish()

    def take(self, x: Tensor, y: Tensor) -> None:
        """x, y: this process's sequences of the step, (sequences, T) each."""
        micro_batches, _ = batch_layout(self.cfg, self.world.size, (x.size(1), x.numel() * self.world.size))
        self.grads.compute(lambda *micro: self.loss_function(self.model, *micro, self.cfg.z_loss), x, y, micro_batches)
        if not usable_gradients(self):
            return
        for opt in self.optimizers:
            opt.step()
        self.publish()

    def publish(self) -> None:
        """Every matrix as it will be stored, on every process."""
        for bank in self.grads.banks:
            bank.publish()
        for layer in self.others:
            layer.keep_rounded(compute_dtype(self.cfg.precision, layer.weight.device))

    def communication(self, world_size: int) -> list[tuple[str, int]]:
        """(what, bytes of the whole) of every collective of a step among `world_size` processes."""
        banks = [part for bank in self.grads.banks for part in bank.communication(world_size)]
        return [("all-reduce", 4 * self.grads.flat.numel()), *banks]


def train(model: GPT, cfg: Config, world: World, log: Log, val: ValidationSet) -> dict[str, Any]:
    """Train until the wall clock or ITERATIONS ends the run; sets `model.temperature`; returns the figures of the run."""
    with rounded_once(model):
        return training_loop(model, TrainingStep(model, cfg, world), world, log, val)


def training_loop(model: GPT, take_step: TrainingStep, world: World, log: Log, val: ValidationSet) -> dict[str, Any]:
    cfg, grads, optimizers = model.cfg, take_step.grads, take_step.optimizers
    batches = Batches(TokenStream(cfg, "train"), world)
    reserve_s = warm_up(model, world, log, take_step)
    budget_s = cfg.max_wallclock_seconds - reserve_s if cfg.max_wallclock_seconds else math.inf
    if budget_s <= 0:
        wanted = f"0 (no cap), or more than the {reserve_s:.2f} s that TEMP_SCALING takes"
        raise UserError(f"MAX_WALLCLOCK_SECONDS={cfg.max_wallclock_seconds}: expected {wanted}")

    losses, pending, epoch, late_graphs = [], None, 1, 0
    log(f"startup:{1000 * since_launch_s():.0f}ms")
    extras, clock = Extras(model, take_step, log), Clock(world)
    for step in itertools.count():
        # rank 0's clock decides for all, so that every process has the same learning rates and stops at the same step
        progress = world.agree(max(clock.elapsed() / budget_s, step / cfg.iterations))
        untie_when_due(model, progress)
        if progress >= 1 and step:
            break
        if cfg.val_loss_every and step and step % cfg.val_loss_every == 0:
            with clock.paused():
                scores = evaluate(model, val, cfg, world, cfg.train_seq_len)
            log(validation_line(cfg, step, scores, clock.elapsed()))
        if batches.epoch > epoch:
            epoch = batches.epoch
            log(f"epoch:{epoch} begins at step:{step} (the run reads more tokens than DATA_PATH holds)")
        stage = schedule(cfg, step, progress)
        apply_stage(optimizers, stage)
        graphs = graphs_compiled()
        take_step.take(*batches.next(stage.batch_tokens // stage.seq_len, stage.seq_len))
        late_graphs += graphs_compiled() - graphs
        extras.after_step(step, progress)
        # the loss of the step before is on the host by now: waiting for it keeps the GPU's queue at one step
        pending, finished = Reading(grads.loss), pending
        if finished:
            losses.append(finished.get())
            report_step(cfg, log, losses, clock.elapsed(), progress)
    losses.append(pending.get())
    report_step(cfg, log, losses, clock.elapsed(), progress)
    extras.finish()
    tokens = batches.state()["position"]
    if cfg.temp_scaling:
        x, y = batches.next(calibration_sequences(cfg, world), cfg.train_seq_len)
        model.temperature.fill_(calibrate_temperature(model, x, y, world))
    train_time_s = world.agree(clock.finish())
    if step < cfg.iterations:
        log(f"stopping_early: wallclock_cap train_time:{1000 * train_time_s:.0f}ms step:{step}/{cfg.iterations}")
    for bank in grads.banks:
        bank.share_latent()
    check_replicas(model, world)
    return {"steps": step, "tokens": tokens, "train_time_s": train_time_s,
            "ms_per_step": 1000 * train_time_s / step, "late_graphs": late_graphs, "first_losses": losses[:20]}


def report_step(cfg: Config, log: Log, losses: list[float], elapsed_s: float, progress: float) -> None:
    """Log line of the newest loss, if it is its turn; every process stops at a loss that is not finite."""
    step, loss = len(losses), losses[-1]
    if not math.isfinite(loss):
        rates = f"MATRIX_LR={cfg.matrix_lr} or TIED_EMBED_LR={cfg.tied_embed_lr}"
        raise UserError(f"training diverged: loss {loss} at step {step}; try a lower {rates}")
    figures = f"step:{step}/{cfg.iterations} loss:{loss:.4f} t:{1000 * elapsed_s:.0f}ms avg:{1000 * elapsed_s / step:.1f}ms"
    if step <= 5 or step % cfg.train_log_every == 0:
        log(figures)
    log.progress(f"{figures} {100 * progress:.0f}% eta:{elapsed_s * (1 / max(progress, 1e-9) - 1):.0f}s")


def validation_line(cfg: Config, step: int, scores: tuple[float, float], elapsed_s: float) -> str:
    return f"step:{step}/{cfg.iterations} val_loss:{scores[0]:.4f} val_bpb:{scores[1]:.4f} train_time:{1000 * elapsed_s:.0f}ms"


def check_replicas(model: nn.Module, world: World) -> None:
    """Every process must hold the same weights, bit for bit: an integer checksum of each is compared."""
    total = sum(p.detach().view(torch.int32).sum(dtype=torch.int64) for p in model.parameters())
    if len(set(world.gather(total.view(1)).tolist())) > 1:
        raise RuntimeError("the processes' weights have drifted apart")


# ---- 8 Kernels and hardware (kernels) --------------------------------------------------------------------------------
# What a machine does best, and what training computes by hand: the same mathematics as plain PyTorch, and tested against it.


class Reading:
    """A device scalar on its way to the host: `get()` waits for this value, not for what was queued after it."""

    def __init__(self, value: Tensor) -> None:
        self._event = None
        self._value = value.detach().clone()
        if value.is_cuda:
            self._value = torch.empty((), dtype=value.dtype, pin_memory=True).copy_(value.detach(), non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    def get(self) -> float:
        if self._event is not None:
            self._event.synchronize()
        return self._value.item()


def compiled(function: Callable, cfg: Config, world: World) -> Callable:
    """The function, compiled on a GPU (static shapes, one graph) unless COMPILE_MODE=none; as it is on a CPU.

    Nor on GPUs before compute capability 8.9: Triton has no conversion to e4m3 there.
    """
    gpu = world.device.type == "cuda"
    if not gpu or cfg.compile_mode == "none" or torch.cuda.get_device_capability(world.device) < (8, 9):
        return function
    keep_compiled()
    torch._dynamo.config.recompile_limit = 32  # one graph a shape, for the trained and for the reloaded model
    return torch.compile(function, mode=cfg.compile_mode, dynamic=False, fullgraph=True)


def graphs_compiled() -> int:
    """Graphs that torch.compile has made so far: none may be added once the clock runs."""
    dynamo = sys.modules.get("torch._dynamo.utils")  # not loaded: nothing was compiled, and loading it takes a second
    return dynamo.counters["stats"]["unique_graphs"] if dynamo else 0


def since_launch_s() -> float:
    """Seconds since the process was started (Linux; elsewhere 0)."""
    try:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    except OSError:
        return 0.0
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")


def keep_compiled() -> None:
    """Compiled kernels go to data/compile_cache, where the next run finds them (seconds of start-up instead of minutes)."""
    for name in ("TORCHINDUCTOR", "TRITON"):
        os.environ.setdefault(f"{name}_CACHE_DIR", str(Path("data/compile_cache").resolve() / name.lower()))


def keep_freed_memory() -> None:
    """Let glibc keep the blocks it frees: returning them and faulting them in again costs a CPU run 11 % (RESULTS.md R004)."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
        for option, value in ((-3, 1 << 25), (-1, 2**31 - 1), (-2, 1 << 28)):  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD, M_TOP_PAD
            mallopt(ctypes.c_int(option), ctypes.c_int(value))


def flash_attention_3(cfg: Config) -> Callable | None:
    """FlashAttention-3's function where it can run: installed, on a Hopper GPU, in 16 bits, for its head sizes."""
    hopper = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
    fits = cfg.precision != "fp32" and (cfg.head_dim >> cfg.diff_attn) % 8 == 0 and cfg.head_dim <= 256
    if not (flash_attn_func and hopper and fits):
        return None

    def flash(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        y = flash_attn_func(q, k, v, causal=True, window_size=(cfg.attention_window - 1, 0 if cfg.attention_window else -1))
        return y[0] if isinstance(y, tuple) else y  # early releases return the log-sum-exp too

    return flash


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Causal attention by PyTorch: q (B, T, H, C), k and v (B, T, K, C) -> (B, T, H, C). Fewer queries than keys are the last
    ones. A mask (queries, keys) takes the place of causality."""
    if mask is None and q.size(1) < k.size(1):
        mask = torch.ones(q.size(1), k.size(1), dtype=torch.bool, device=q.device).tril(k.size(1) - q.size(1))
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    gqa = q.size(1) != k.size(1)
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, enable_gqa=gqa).transpose(1, 2)


def attention_backends(device: torch.device) -> contextlib.AbstractContextManager:
    """cuDNN's attention first on Hopper, where PyTorch would take the slower FlashAttention-2; elsewhere PyTorch's choice."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device)[0] != 9:
        return contextlib.nullcontext()
    from torch.nn.attention import SDPBackend, sdpa_kernel

    order = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    return sdpa_kernel(order, set_priority=True)


triton = None
if torch.version.cuda or "triton" in sys.modules:  # 0.4 s; without CUDA only tests import it, to run it in its interpreter
    with contextlib.suppress(ImportError):
        import triton
        import triton.language as tl
        from triton.tools.tensor_descriptor import TensorDescriptor

jit = triton.jit if triton else lambda function: function


def kernels_run(x: Tensor) -> bool:
    """Whether Triton's kernels take what is computed from x: 16 bits on Hopper or newer. Tests replace this function."""
    return triton is not None and x.is_cuda and x.element_size() == 2 and torch.cuda.get_device_properties(x.device).major >= 9


def operator(fake: Callable) -> Callable:
    """Decorator: a function with type hints as one operator, which torch.compile calls without a look inside; `fake`, with
    the same arguments, gives empty outputs."""

    def register(function: Callable) -> Callable:
        if triton is None:
            return function
        name = f"{__name__.strip('_')}::{function.__name__}"  # this file may be loaded twice, under two names
        op = torch.library.custom_op(name, function, mutates_args=())
        op.register_fake(fake)
        return op

    return register


class StoredMatmul(torch.autograd.Function):
    """x (..., in), latent and stored weight (out, in) -> x @ stored.T; the stored weight's gradient goes to the latent one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, latent: Tensor, stored: Tensor) -> Tensor:  # noqa: ARG004
        ctx.save_for_backward(x, stored)
        return F.linear(x, stored)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor, None]:
        x, stored = ctx.saved_tensors
        return g @ stored, weight_gradient(g.flatten(0, -2), x.flatten(0, -2)), None


class StoredLookup(torch.autograd.Function):
    """Rows of the stored table (V, E) for idx (...): (..., E); their gradient goes to the latent table, float32."""

    @staticmethod
    def forward(ctx: Any, idx: Tensor, latent: Tensor, stored: Tensor) -> Tensor:  # noqa: ARG004
        ctx.save_for_backward(idx)
        ctx.rows = stored.size(0)
        return F.embedding(idx, stored)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[None, Tensor, None]:
        return None, torch.ops.aten.embedding_dense_backward(g.float(), ctx.saved_tensors[0], ctx.rows, -1, False), None


def weight_gradient(g: Tensor, x: Tensor) -> Tensor:
    """g (N, out), x (N, in) -> g.T @ x, float32: on a GPU as the tensor cores accumulated it, without a rounding between."""
    if (splits := SPLIT_SUMS.get((g.size(1), x.size(1)), 0)) and kernels_run(g):
        return split_weight_gradient(g, x, splits)
    return torch.mm(g.T, x, out_dtype=torch.float32) if g.is_cuda and g.dtype != torch.float32 else g.T @ x


def pack_weights(w: Tensor, group_size: int, form: ScaleFormat) -> tuple[Tensor, Tensor]:
    """Ternary weights in a quarter of a byte each, as processes exchange them: (size / 4,) uint8, (groups, 1) scales."""
    codes, scale = ternarize(w, group_size, form)
    a, b, c, d = (codes + 1).to(torch.uint8).view(-1, 4).unbind(1)
    return a | b << 2 | c << 4 | d << 6, scale


def unpack_weights(out: Tensor, packed: Tensor, scale: Tensor) -> None:
    """Inverse of pack_weights, into `out`."""
    codes = torch.stack([packed >> shift & 3 for shift in (0, 2, 4, 6)], dim=1).view(len(scale), -1)
    out.copy_(((codes.float() - 1) * scale).view_as(out))


class Bank:
    """All matrices of one shape: latent weights and gradients (n, rows, columns) in one piece of memory each, n filled up to a
    multiple of the processes. Each process owns an equal run, the `shard`: it alone sums their gradients, holds their momentum
    and updates them. The others get their codes; `share_latent` is for the end.
    """

    def __init__(self, modules: list[QuantizedLinear], cfg: Config, world: World) -> None:
        self.modules, self._world, weight = modules, world, modules[0].weight
        count = -(-len(modules) // world.size) * world.size
        self.latent, self.grads = weight.new_zeros(2, count, *weight.shape).detach().unbind()
        for module, w, g in zip(modules, self.latent, self.grads, strict=False):
            w.copy_(module.weight.detach())
            module.weight.data, module.weight.grad = w, g
        self.shard = nn.Parameter(self.latent.chunk(world.size)[world.rank])
        self.shard.grad = self.grads.chunk(world.size)[world.rank]
        self._ternary, self._dtype = modules[0].role.storage == "ternary", compute_dtype(cfg.precision, weight.device)
        if self._ternary:
            self._pack, self._unpack = compiled(pack_weights, cfg, world), compiled(unpack_weights, cfg, world)
            self.operand = torch.zeros_like(self.latent, dtype=self._dtype)
            for module, operand in zip(modules, self.operand, strict=False):
                module.operand = operand

    @classmethod
    def build(cls, model: nn.Module, cfg: Config, world: World) -> list[Bank]:
        """A bank for each shape and kind of matrix, the largest first."""
        kinds: dict[Any, list[QuantizedLinear]] = {}
        for _, module, p, role in parameter_owners(model):
            if role.optimizer == "matrix":
                kinds.setdefault((role, p.shape), []).append(module)
        return [cls(kinds[kind], cfg, world) for kind in sorted(kinds, key=lambda kind: -kind[1].numel() * len(kinds[kind]))]

    @torch.no_grad()
    def publish(self) -> None:
        """What the shards' owners made of them, on every process: the latent weights, or of ternary matrices codes and scales."""
        if self._ternary:
            packed = self._pack(self.shard.detach(), *self.modules[0].format)
            self._unpack(self.operand, *(self._world.gather(part) for part in packed))
            for module in self.modules:
                module.product.refresh(module.operand)
            return
        self.share_latent()
        for module in self.modules:
            module.keep_rounded(self._dtype)

    def share_latent(self) -> None:
        if self._world.size > 1:
            self.latent.copy_(self._world.gather(self.shard.detach()))

    def communication(self, world_size: int) -> list[tuple[str, int]]:
        """(what, bytes of the whole) that one step moves among `world_size` processes."""
        weights = -(-len(self.modules) // world_size) * world_size * self.modules[0].weight.numel()
        gathered = weights // 4 + 4 * weights // self.modules[0].group_size if self._ternary else 4 * weights
        return [("reduce-scatter", 4 * weights), ("all-gather", gathered)]


class ChunkedPolyLoss(torch.autograd.Function):
    """Output projection, poly softcap and loss on a CPU: a few rows of logits at a time, which stay in the cache, and their
    gradient at once, so that the (B * T, V) logits never exist. `training_loss` has the same mathematics plainly."""

    @staticmethod
    def forward(ctx: Any, e: Tensor, table: Tensor, bias: Tensor, y: Tensor, cap: float, z_loss: float) -> tuple[Tensor, Tensor]:
        """e (N, E), table (V, E), bias (V,), y (N,) -> what is minimized and cross entropy, summed."""
        de, dtable, dbias = torch.empty_like(e), torch.zeros_like(table), torch.zeros_like(bias)
        loss, total = e.new_zeros(()), e.new_zeros(())
        rows = max(16, 2**19 // table.size(0))
        for e_part, y_part, de_part in zip(e.split(rows), y.split(rows), de.split(rows), strict=True):
            u = torch.addmm(bias, e_part, table.T).div_(cap).clamp_(-2, 2)
            u2 = u.square()
            value = (u2 / 15).sub_(1 / 3).mul_(u2).add_(1).mul_(u)
            slope = (u2 / 3).sub_(1).mul_(u2).add_(1).mul_(value.abs() < 1)  # of the softcap: 0 where it clips
            p = value.clamp_(-1, 1).mul_(cap)
            target = p.gather(1, y_part[:, None]).squeeze(1)
            total_exp = p.exp_().sum(1)  # |logits| <= cap: no maximum needs to be taken out
            lse = total_exp.log()
            nats = (lse - target).sum()
            loss += nats + z_loss * lse.square().sum()
            total += nats
            p.mul_(((1 + 2 * z_loss * lse) / total_exp)[:, None])
            p.scatter_add_(1, y_part[:, None], p.new_full((len(y_part), 1), -1.0)).mul_(slope)
            torch.mm(p, table, out=de_part)
            dtable.addmm_(p.T, e_part)
            dbias += p.sum(0)
        ctx.save_for_backward(de, dtable, dbias)
        ctx.mark_non_differentiable(total)
        return loss, total

    @staticmethod
    def backward(ctx: Any, g: Tensor, _: Tensor) -> tuple:
        return *(t.mul_(g) for t in ctx.saved_tensors), None, None, None


def fused_loss(model: GPT, h: Tensor, y: Tensor, z_loss: float) -> tuple[Tensor, Tensor] | None:
    """`training_loss` from the last hidden states, its gradient computed with it; None: neither kernel nor CPU code fits."""
    cfg, kernel = model.cfg, kernels_run(h) and len(model.vocab_bias) <= 16_384  # a row of logits fits a program's registers
    chunks = not h.is_cuda and h.dtype == torch.float32 and cfg.softcap_type == "poly"
    if cfg.logit_softcap > 60 or not (kernel or chunks) or cfg.logit_head_type != "standard":  # both take exp(logits) as it is
        return None
    e, bias, weight = model.embed_out(h).flatten(0, 1), as_stored(model.vocab_bias), model.output.weight
    stored, last = model.output.stored(e.dtype), (bias, y.flatten(), cfg.logit_softcap, z_loss)
    if not kernel:
        return ChunkedPolyLoss.apply(e, StraightThrough.apply(weight, stored), *last)
    loss, nats = FusedLoss.apply(e, weight, stored, *last, cfg.softcap_type == "poly")
    return loss, nats.detach()  # torch 2.11 does not compile `mark_non_differentiable`


# row kernels: what is computed a row, or a head, at a time


def num_programs(x: Tensor) -> int:
    """Programs that share the rows of x among them: two for each of the GPU's processors."""
    return 2 * torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 4


@jit
def softcapped(logits, cap, POLY: tl.constexpr):  # noqa: N803
    """SOFTCAPS in float32, and their slopes. Comparisons, not minimum and maximum: those would hide a NaN."""
    u = logits / cap
    if POLY:  # beyond |u| = 2 it is clipped whether u is or not: it rises everywhere
        u2 = u * u
        value = u * (1 + u2 * (u2 * (1 / 15) - 1 / 3))
        slope = tl.where(tl.abs(value) < 1, 1 + u2 * (u2 * (1 / 3) - 1), 0.0)
        value = tl.where(value > 1, 1.0, tl.where(value < -1, -1.0, value))
    else:
        value = 2 * tl.sigmoid(2 * u) - 1
        slope = 1 - value * value
    return cap * value, slope


@jit
def loss_kernel(logits, bias, targets, sums, dbias, rows, cap, z_loss, V: tl.constexpr, BLOCK: tl.constexpr, POLY: tl.constexpr):
    """Each row of logits (rows, V), without bias, becomes the loss's gradient; (loss, nats) and dbias (V,) of each program."""
    program, column = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    valid = column < V
    b = tl.load(bias + column, valid, 0.0)
    db = tl.zeros((BLOCK,), tl.float32)
    loss, total_nats = 0.0, 0.0
    for row in tl.range(program, rows, tl.num_programs(0), num_stages=3):  # the next two rows are on their way
        cells = logits + row * V + column
        y = tl.load(targets + row)
        z, slope = softcapped(tl.load(cells, valid, 0.0).to(tl.float32) + b, cap, POLY)
        p = tl.where(valid, tl.exp(z), 0.0)  # z <= cap <= 60: no maximum needs to be taken out
        total = tl.sum(p, 0)
        lse = tl.log(total)
        nats = lse - tl.sum(tl.where(column == y, z, 0.0), 0)
        g = (p * ((1 + 2 * z_loss * lse) / total) - tl.where(column == y, 1.0, 0.0)) * slope
        tl.store(cells, g.to(logits.dtype.element_ty), valid)
        db += g
        loss += nats + z_loss * lse * lse
        total_nats += nats
    tl.store(dbias + program * V + column, db, valid)
    tl.store(sums + 2 * program, loss)
    tl.store(sums + 2 * program + 1, total_nats)


def empty_gradients(e: Tensor, table: Tensor, bias: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    gradients = torch.empty_like(e), torch.empty_like(table, dtype=torch.float32), torch.empty_like(bias)
    return bias.new_empty(()), bias.new_empty(()), *gradients


@operator(empty_gradients)
def loss_and_gradients(
    e: Tensor, table: Tensor, bias: Tensor, y: Tensor, cap: float, z_loss: float, poly: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """e (N, E), table (V, E), bias (V,), y (N,) -> what is minimized, cross entropy, de, dtable float32, dbias."""
    logits, programs, size = e @ table.T, num_programs(e), len(bias)
    block = triton.next_power_of_2(size)
    sums, dbias = bias.new_empty(programs, 2), bias.new_empty(programs, size)
    warps = min(max(block // 512, 4), 32)
    loss_kernel[programs,](logits, bias, y, sums, dbias, len(e), cap, z_loss, size, block, poly, num_warps=warps)
    return sums[:, 0].sum(), sums[:, 1].sum(), logits @ table, weight_gradient(logits, e), dbias.sum(0)


class FusedLoss(torch.autograd.Function):
    """Output projection, softcap and loss on a GPU: the logits are read once, and their gradient takes their place."""

    @staticmethod
    def forward(ctx: Any, e: Tensor, latent: Tensor, *operands: Any) -> tuple[Tensor, Tensor]:  # noqa: ARG004
        """`latent` (V, E) takes the gradient of the stored table, the first of the operands of `loss_and_gradients` after e."""
        loss, nats, *gradients = loss_and_gradients(e, *operands)
        ctx.save_for_backward(*gradients)
        return loss, nats

    @staticmethod
    def backward(ctx: Any, g: Tensor, _: Tensor) -> tuple:
        de, dtable, dbias = (t * g for t in ctx.saved_tensors)
        return de, dtable, None, dbias, None, None, None, None


@jit
def head_tile(ROWS: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr, tokens):
    """This program's tokens (ROWS,), the columns of half a head (BLOCK,), and which (token, column) there are."""
    token, column = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK)
    return token, column, (token < tokens)[:, None] & (column < HALF)[None, :]


@jit
def normed_head(cells, valid, HALF: tl.constexpr):
    """RMS-normalized halves of a head, and 1 / RMS (ROWS, 1), in float32."""
    a = tl.load(cells, valid, 0.0).to(tl.float32)
    b = tl.load(cells + HALF, valid, 0.0).to(tl.float32)
    r = tl.rsqrt(tl.sum(a * a + b * b, 1) / (2 * HALF) + 1e-6)[:, None]
    return a * r, b * r, r


@jit
def rotated_head(source, target, cos, sin, gain, valid, HALF: tl.constexpr):
    a, b, _ = normed_head(source, valid, HALF)
    tl.store(target, ((a * cos + b * sin) * gain).to(target.dtype.element_ty), valid)
    tl.store(target + HALF, ((b * cos - a * sin) * gain).to(target.dtype.element_ty), valid)


@jit
def qk_kernel(qkv, cos, sin, gain, q, k, tokens, T: tl.constexpr, H: tl.constexpr, K: tl.constexpr, HALF: tl.constexpr,
              BLOCK: tl.constexpr, ROWS: tl.constexpr):
    token, column, valid = head_tile(ROWS, HALF, BLOCK, tokens)
    angle = (token % T)[:, None] * HALF + column[None, :]
    c, s = tl.load(cos + angle, valid, 0.0), tl.load(sin + angle, valid, 0.0)
    source = qkv + token[:, None] * ((H + 2 * K) * 2 * HALF) + column[None, :]
    for head in range(H):
        target = q + (token[:, None] * H + head) * (2 * HALF) + column[None, :]
        rotated_head(source + head * 2 * HALF, target, c, s, tl.load(gain + head), valid, HALF)
    for head in range(K):
        target = k + (token[:, None] * K + head) * (2 * HALF) + column[None, :]
        rotated_head(source + (H + head) * 2 * HALF, target, c, s, 1.0, valid, HALF)


@jit
def rotated_head_backward(source, gradient, target, cos, sin, gain, valid, HALF: tl.constexpr):
    """Gradient of a head before norm, rotation and gain, stored; returns the gain's, a scalar."""
    a, b, r = normed_head(source, valid, HALF)
    da = tl.load(gradient, valid, 0.0).to(tl.float32)
    db = tl.load(gradient + HALF, valid, 0.0).to(tl.float32)
    da, db = da * cos - db * sin, da * sin + db * cos
    dot = tl.sum(da * a + db * b, 1)
    mean = dot[:, None] / (2 * HALF)
    tl.store(target, (r * gain * (da - a * mean)).to(target.dtype.element_ty), valid)
    tl.store(target + HALF, (r * gain * (db - b * mean)).to(target.dtype.element_ty), valid)
    return tl.sum(dot, 0)


@jit
def qk_backward_kernel(qkv, cos, sin, gain, dq, dk, dv, dqkv, dgain, dq_stride, dk_stride, dv_stride, tokens, T: tl.constexpr,
                       H: tl.constexpr, K: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    """Gradients of q, k and v, in any layout of (B, T, heads), become the packed one; dgain (programs, H) is summed outside."""
    token, column, valid = head_tile(ROWS, HALF, BLOCK, tokens)
    angle = (token % T)[:, None] * HALF + column[None, :]
    c, s = tl.load(cos + angle, valid, 0.0), tl.load(sin + angle, valid, 0.0)
    packed = token[:, None] * ((H + 2 * K) * 2 * HALF) + column[None, :]
    from_q = dq + (token // T * dq_stride[0] + token % T * dq_stride[1])[:, None] + column[None, :]
    from_k = dk + (token // T * dk_stride[0] + token % T * dk_stride[1])[:, None] + column[None, :]
    from_v = dv + (token // T * dv_stride[0] + token % T * dv_stride[1])[:, None] + column[None, :]
    for head in range(H):
        g, at = tl.load(gain + head), packed + head * 2 * HALF
        part = rotated_head_backward(qkv + at, from_q + head * dq_stride[2], dqkv + at, c, s, g, valid, HALF)
        tl.store(dgain + tl.program_id(0) * H + head, part)
    for head in range(K):
        at = packed + (H + head) * 2 * HALF
        rotated_head_backward(qkv + at, from_k + head * dk_stride[2], dqkv + at, c, s, 1.0, valid, HALF)
        to_v, v = dqkv + at + K * 2 * HALF, from_v + head * dv_stride[2]
        tl.store(to_v, tl.load(v, valid, 0.0), valid)
        tl.store(to_v + HALF, tl.load(v + HALF, valid, 0.0), valid)


def head_tiles(qkv: Tensor, gain: Tensor) -> tuple[int, dict[str, int]]:
    """(programs, sizes) of both kernels for qkv (B, T, H + 2K, C): 2,048 values of half a head in a program."""
    (batch, length, heads, width), queries = qkv.shape, len(gain)
    block = triton.next_power_of_2(width // 2)
    rows, tokens = max(2048 // block, 1), batch * length
    sizes = {"T": length, "H": queries, "K": (heads - queries) // 2, "HALF": width // 2, "BLOCK": block, "ROWS": rows}
    return triton.cdiv(tokens, rows), sizes | {"tokens": tokens}


def empty_qk(qkv: Tensor, cos: Tensor, sin: Tensor, gain: Tensor) -> tuple[Tensor, Tensor]:  # noqa: ARG001
    (batch, length, heads, width), queries = qkv.shape, len(gain)
    return qkv.new_empty(batch, length, queries, width), qkv.new_empty(batch, length, (heads - queries) // 2, width)


@operator(empty_qk)
def normed_rotated(qkv: Tensor, cos: Tensor, sin: Tensor, gain: Tensor) -> tuple[Tensor, Tensor]:
    """qkv (B, T, H + 2K, C), cos and sin (>= T, C/2), gain (H,) -> q (B, T, H, C), k (B, T, K, C)."""
    assert qkv.size(1) <= len(cos)  # the kernel would read on behind the last angle
    q, k = empty_qk(qkv, cos, sin, gain)
    programs, sizes = head_tiles(qkv, gain)
    qk_kernel[programs,](qkv.contiguous(), cos, sin, gain, q, k, **sizes, num_warps=8)
    return q, k


def empty_packed(*operands: Tensor) -> tuple[Tensor, Tensor]:
    return operands[3].new_empty(operands[3].shape), torch.empty_like(operands[6])


@operator(empty_packed)
def normed_rotated_backward(
    dq: Tensor, dk: Tensor, dv: Tensor, qkv: Tensor, cos: Tensor, sin: Tensor, gain: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of q, k and v -> gradients of qkv, packed, and of gain, float32."""
    dq, dk, dv = (g if g.stride(3) == 1 else g.contiguous() for g in (dq, dk, dv))
    (programs, sizes), dqkv = head_tiles(qkv, gain), qkv.new_empty(qkv.shape)
    dgain = gain.new_empty(programs, len(gain))
    strides = (g.stride()[:3] for g in (dq, dk, dv))
    qk_backward_kernel[programs,](qkv.contiguous(), cos, sin, gain, dq, dk, dv, dqkv, dgain, *strides, **sizes, num_warps=8)
    return dqkv, dgain.sum(0)


class QKNormRope(torch.autograd.Function):
    """`qk_norm_rope` by a kernel each way: v stays where it is, and one packed gradient comes back, which nothing copies."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, cos: Tensor, sin: Tensor, gain: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(qkv, cos, sin, gain)
        q, k = normed_rotated(qkv, cos, sin, gain)
        return q, k, qkv[:, :, -k.size(2) :]

    @staticmethod
    def backward(ctx: Any, dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[Tensor, None, None, Tensor]:
        dqkv, dgain = normed_rotated_backward(dq, dk, dv, *ctx.saved_tensors)
        return dqkv, None, None, dgain


def qk_norm_rope(qkv: Tensor, gain: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor, Tensor]:
    """(B, T, H + 2K, C), gain (H,) -> normalized, rotated and, the queries, scaled: q (B, T, H, C), k and v (B, T, K, C)."""
    if kernels_run(qkv) and type(rotary) is Rotary:  # POSITION and NTK_ROPE have others
        return QKNormRope.apply(qkv, rotary.cos, rotary.sin, gain)
    q, k, v = qkv.split((len(gain), *[(qkv.size(2) - len(gain)) // 2] * 2), dim=2)
    return rotary(rms_norm(q)) * gain.to(q.dtype)[:, None], rotary(rms_norm(k)), v


# Matrix kernels. ACT_QUANT=fp8: products with 8-bit operands. Here the rounding of the ternary weights costs nothing: a scale
# with e4m3's mantissa times a code in {-1, 0, 1} is an e4m3 number, forward and (transposed) for the gradient of the input.

# Gradients at the outputs of the ternary layers, in units of a token's own loss, enter e5m2 (2^-14 to 57344 = 2^15.8) times 2^8.
# Measured on 3 and 4 layers of width 256 over 120 steps: root mean square 2^-12.4 (second step) to 2^-5, largest value 2^-0.5,
# 1st percentile of the smallest layer 2^-17.6 (2^-20.9 at the second step). So 2^8 lies 2^8 below saturation and, from the
# second step on, keeps 99 % above the smallest normal number, with 2^1 to spare there and 2^4 later. A batch that is smaller at
# the start of a run takes its ratio out of the former.
FP8_GRADIENT_SCALE = 2.0**8


class StoredProduct(nn.Module):
    """x (..., in) @ the layer's stored weight.T: the plain form."""

    def refresh(self, stored: Tensor) -> None:
        """Take over the weight as it will be used until the next optimizer step."""

    def forward(self, x: Tensor, layer: QuantizedLinear) -> Tensor:
        return StoredMatmul.apply(x, layer.weight, layer.stored(x.dtype))


class Fp8Weight(NamedTuple):
    """codes * scale is the stored weight; `codes_t` is laid out transposed, because 8-bit products want both rows contiguous."""

    codes: Tensor  # (out, in) e4m3
    codes_t: Tensor  # (in, out) e4m3
    scale: Tensor  # (), a power of two
    relu2_scale: Tensor  # (), the power of two that takes relu(x @ stored.T)^2 of any normalized x below 448


def fp8_weight(stored: Tensor) -> Fp8Weight:
    """Exact while the matrix's scales lie within 2^13 of the largest; below, off by at most 2^-17 of the largest."""
    codes, scale = round_fp8(stored)
    # Cauchy and Schwarz: no output exceeds |row| |x|, |x|^2 = in. 1.14: x itself is rounded, by 1/16 at most and to bfloat16
    largest = stored.float().square().sum(1, dtype=torch.float64).amax().float() * (1.14 * stored.size(1))
    return Fp8Weight(codes, codes.t().contiguous(), scale, floor_to_power_of_two(448 / largest.clamp_min(2.0**-100)))


@functools.cache
def fp8_rounding(cfg: Config, device: torch.device) -> Callable[[Tensor], Fp8Weight]:
    """`fp8_weight` in a few kernels on a GPU; UserError where Triton and cuBLAS have no 8-bit numbers."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        raise UserError("ACT_QUANT='fp8': expected a GPU of compute capability 8.9 or newer")
    return compiled(fp8_weight, cfg, World(device=device))


def floor_to_power_of_two(x: Tensor) -> Tensor:
    return (x.view(torch.int32) & 0x7F800000).view(torch.float32)


def to_fp8(x: Tensor, scale: float, dtype: torch.dtype = torch.float8_e4m3fn) -> Tensor:
    """x * scale in 8 bits, rows contiguous; what is out of range saturates."""
    largest = torch.finfo(dtype).max
    return (x.float() * scale).clamp(-largest, largest).to(dtype).contiguous()


def fp8_product(a: Tensor, rows: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """a (N, K) @ rows (M, K).T * scale -> (N, M) in `dtype`, summed in float32."""
    one = torch.ones((), device=a.device)
    # without full accumulation in float32 only where rounding errors meet 3 mantissa bits anyway: forward
    return torch._scaled_mm(a, rows.t(), one, scale, out_dtype=dtype, use_fast_accum=a.dtype == torch.float8_e4m3fn)


class Fp8Matmul(torch.autograd.Function):
    """StoredMatmul with 8-bit operands forward and for the input's gradient; the weight's gradient sees neither rounding."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, latent: Tensor, weight: Fp8Weight, scales: tuple[float, float]) -> Tensor:  # noqa: ARG004
        """`scales`: powers of two that take inputs and gradients into range."""
        ctx.save_for_backward(x, weight.codes_t, weight.scale)
        ctx.g_scale = scales[1]
        y = fp8_product(to_fp8(x.flatten(0, -2), scales[0]), weight.codes, weight.scale / scales[0], x.dtype)
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x, codes_t, scale = ctx.saved_tensors
        rows = g.flatten(0, -2)
        dx = fp8_product(to_fp8(rows, ctx.g_scale, torch.float8_e5m2), codes_t, scale / ctx.g_scale, x.dtype)
        return dx.view_as(x), weight_gradient(rows, x.flatten(0, -2)), None, None


class Fp8Product(StoredProduct):
    """ACT_QUANT=fp8. Its input must have root mean square 1: then no element exceeds sqrt(in), and a fixed scale does."""

    def __init__(self, in_dim: int, cfg: Config) -> None:
        super().__init__()
        for name in Fp8Weight._fields:
            self.register_buffer(name, None, persistent=False)
        self.cfg, x_scale = cfg, 2.0 ** math.floor(math.log2(448 / in_dim**0.5))
        self.scales = x_scale, FP8_GRADIENT_SCALE * 2.0 ** round(math.log2(cfg.train_batch_tokens))

    def refresh(self, stored: Tensor) -> None:
        weight = fp8_rounding(self.cfg, stored.device)(stored)
        for name, new in weight._asdict().items():
            setattr(self, name, new) if getattr(self, name) is None else getattr(self, name).copy_(new)

    def weight(self, layer: QuantizedLinear, dtype: torch.dtype) -> Fp8Weight:
        """As refreshed last, or made for this one use."""
        kept = Fp8Weight(*(getattr(self, name) for name in Fp8Weight._fields))
        return kept if layer.operand is not None else fp8_weight(layer.stored(dtype))

    def forward(self, x: Tensor, layer: QuantizedLinear) -> Tensor:
        return Fp8Matmul.apply(x, layer.weight, self.weight(layer, x.dtype), self.scales)


class NormedMatmul(torch.autograd.Function):
    """rms_norm(x) @ stored.T as rho * (x @ stored.T), rho the norm's factor of the row: the wide input is not written again.

    With y = x @ stored.T and c = rho^3 (g . y) / in, the gradient of x is rho * (g @ stored) - c * x; it needs no sum over `in`.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, latent: Tensor, stored: Tensor) -> Tensor:  # noqa: ARG004
        y, rho = F.linear(x, stored), norm_factor(x.float().square().mean(-1, keepdim=True))
        ctx.save_for_backward(x, y, rho, stored)
        return (rho * y).to(x.dtype, copy=True)  # torch 2.11 compiles a `to` that does nothing to no gradient

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor, None]:
        x, y, rho, stored = ctx.saved_tensors
        dx = rho * (g @ stored) - norm_slope(g, y, rho, x.size(-1)) * x
        return dx.to(x.dtype), weight_gradient((rho * g).to(g.dtype).flatten(0, -2), x.flatten(0, -2)), None


def norm_factor(mean_square: Tensor) -> Tensor:
    return (mean_square + 1e-6).rsqrt()  # as in rms_norm


def norm_slope(g: Tensor, y: Tensor, rho: Tensor, width: int) -> Tensor:
    """c of NormedMatmul, (..., 1) float32."""
    return rho**3 * (g.float() * y.float()).sum(-1, keepdim=True) / width


def normed_product(x: Tensor, layer: nn.Module, norm: Callable[[Tensor], Tensor]) -> Tensor:
    """layer(norm(x)); on a GPU with rms_norm after the product. On a CPU memory is not what limits it."""
    if norm is rms_norm and x.is_cuda and x.dtype != torch.float16 and plain(layer, StoredProduct):  # 65504 might not hold it
        return NormedMatmul.apply(x, layer.weight, layer.stored(x.dtype))
    return layer(norm(x))


def plain(layer: nn.Module, product: type) -> bool:
    """Whether nothing but this product happens to the layer's input."""
    return isinstance(layer, TernaryLinear) and type(layer.prepare) is nn.Identity and type(layer.product) is product


class Tiles(NamedTuple):
    """How a kernel cuts a product (M, K) @ (K, N): the tile of the result, bytes along K, and what shares the work."""

    m: int
    n: int
    k_bytes: int
    warps: int
    stages: int
    persistent: bool  # one program a processor, which loads the next tile while it writes one


TILES = [Tiles(128, 256, 128, 8, 3, True), Tiles(128, 256, 128, 8, 4, True), Tiles(128, 128, 128, 8, 4, True),
         Tiles(128, 256, 128, 8, 3, False), Tiles(128, 128, 128, 4, 4, False)]  # fmt: skip
TUNED: dict[tuple, Tiles] = {}


def tuned(key: tuple, x: Tensor, launch: Callable[[Tiles], None]) -> Tiles:
    """The fastest of TILES for what `key` names, timed when it is first asked for: in the warm-up, before the clock starts."""

    def seconds(tiles: Tiles) -> float:
        try:
            return triton.testing.do_bench(lambda: launch(tiles), warmup=5, rep=25, return_mode="median")
        except Exception:  # too much shared memory, or what this GPU's compiler cannot do; the others may
            return math.inf

    key = (*key, x.dtype, x.device)
    if key not in TUNED:
        TUNED[key] = min(TILES, key=seconds) if x.is_cuda else TILES[0]
    return TUNED[key]


def tile_programs(x: Tensor, tiles: Tiles, count: int) -> int:
    """Programs for `count` tiles of the result."""
    processors = torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 3
    return min(count, processors) if tiles.persistent else count


def described(x: Tensor, rows: int, columns: int) -> Any:
    """x for the tensor memory accelerator, which loads and stores blocks of (rows, columns); outside of x it reads zeros."""
    return TensorDescriptor.from_tensor(x.contiguous(), [rows, columns])


@jit
def tile_product(a, b, i, j, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, SIZE: tl.constexpr, ROWS: tl.constexpr):
    """float32 tile (M, N) at (i, j) of a @ b, K at a time out of SIZE; ROWS: b is given as its columns (N, SIZE)."""
    total = tl.zeros((M, N), tl.float32)
    for k in range(0, SIZE, K):
        if ROWS:
            total = tl.dot(a.load([i, k]), b.load([j, k]).T, total)
        else:
            total = tl.dot(a.load([i, k]), b.load([k, j]), total)
    return total


@jit
def halves(tile, M: tl.constexpr, N: tl.constexpr):
    """(M, N) -> its left and right half: what follows then needs half of the registers and of the shared memory."""
    return tile.reshape(M, 2, N // 2).permute(0, 2, 1).split()


@jit
def store_relu2(tile, h, h8, sums, mask, i, j, scale, EIGHT: tl.constexpr):
    """relu(tile)^2 to h at (i, j), its rows' sums of squares as stored to `sums`; EIGHT: also times `scale`, in 8 bits, to h8."""
    value = tl.where(tile < 0, 0.0, tile)  # a NaN stays one
    value *= value
    kept = value.to(h.dtype)
    h.store([i, j], kept)
    tl.store(sums, tl.sum(kept.to(tl.float32) * kept.to(tl.float32), 1), mask)
    if EIGHT:
        value *= scale
        h8.store([i, j], tl.where(value > 448, 448.0, value).to(h8.dtype))


@jit
def relu2_kernel(
    x, w, h, h8, sums, scales, rows, N: tl.constexpr, SIZE: tl.constexpr, EIGHT: tl.constexpr,
    TILE_M: tl.constexpr, TILE_N: tl.constexpr, TILE_K: tl.constexpr,
):  # fmt: skip
    """h (rows, N) = relu(x @ w.T)^2; sums (2 * tiles across, rows) of squares. scales: of the product, of h8."""
    across: tl.constexpr = (N + TILE_N - 1) // TILE_N
    scale, scale8 = 1.0, 1.0
    if EIGHT:
        scale, scale8 = tl.load(scales), tl.load(scales + 1)
    for tile in tl.range(tl.program_id(0), tl.cdiv(rows, TILE_M) * across, tl.num_programs(0), flatten=True):
        i, j = tile // across * TILE_M, tile % across * TILE_N
        total = tile_product(x, w, i, j, TILE_M, TILE_N, TILE_K, SIZE, True)
        if EIGHT:
            total *= scale
        left, right = halves(total, TILE_M, TILE_N)
        row = i + tl.arange(0, TILE_M)
        cells = sums + (tile % across * 2) * rows + row
        store_relu2(left, h, h8, cells, row < rows, i, j, scale8, EIGHT)
        store_relu2(right, h, h8, cells + rows, row < rows, i, j + TILE_N // 2, scale8, EIGHT)


@jit
def store_gradient(tile, h, g, g8, rho, c, i, j, scale, EIGHT: tl.constexpr):
    """2 sqrt(h) (rho * tile - c * h) to g at (i, j); EIGHT: also times `scale`, in 8 bits, to g8."""
    post = h.load([i, j]).to(tl.float32)
    value = 2 * tl.sqrt(post) * (rho[:, None] * tile - c[:, None] * post)
    g.store([i, j], value.to(g.dtype))
    if EIGHT:
        value *= scale
        value = tl.where(value > 57344, 57344.0, tl.where(value < -57344, -57344.0, value))
        g8.store([i, j], value.to(g8.dtype))


@jit
def relu2_gradient_kernel(
    dy, w, h, rho, c, g, g8, scales, rows, N: tl.constexpr, SIZE: tl.constexpr, EIGHT: tl.constexpr,
    TILE_M: tl.constexpr, TILE_N: tl.constexpr, TILE_K: tl.constexpr,
):  # fmt: skip
    """g (rows, N), the gradient before relu^2, of dy @ w behind the norm. scales: of the product, of g8."""
    across: tl.constexpr = (N + TILE_N - 1) // TILE_N
    scale, scale8 = 1.0, 1.0
    if EIGHT:
        scale, scale8 = tl.load(scales), tl.load(scales + 1)
    for tile in tl.range(tl.program_id(0), tl.cdiv(rows, TILE_M) * across, tl.num_programs(0), flatten=True):
        i, j = tile // across * TILE_M, tile % across * TILE_N
        row = i + tl.arange(0, TILE_M)
        factor, slope = tl.load(rho + row, row < rows, 0.0), tl.load(c + row, row < rows, 0.0)
        total = tile_product(dy, w, i, j, TILE_M, TILE_N, TILE_K, SIZE, EIGHT)
        left, right = halves(total, TILE_M, TILE_N)
        store_gradient(left, h, g, g8, factor * scale, slope, i, j, scale8, EIGHT)
        store_gradient(right, h, g, g8, factor * scale, slope, i, j + TILE_N // 2, scale8, EIGHT)


def empty_relu2(x: Tensor, w: Tensor, scales: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    h = x.new_empty(len(x), len(w), dtype=dtype)
    h8 = torch.empty_like(h, dtype=torch.float8_e4m3fn) if scales is not None else h.new_empty(0)
    return h, h8, x.new_empty(len(x), 1, dtype=torch.float32)


@operator(empty_relu2)
def relu2_product(x: Tensor, w: Tensor, scales: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """x (N, in), w (out, in) -> h = relu(x @ w.T)^2 (N, out) in `dtype`, the same in 8 bits, the sums of h^2 (N, 1).

    `scales` (2,), for 8-bit x and w alone: what the product and then h is multiplied with.
    """
    (h, h8, _), parts = empty_relu2(x, w, scales, dtype), []

    def launch(t: Tiles) -> None:
        k, across = t.k_bytes // x.element_size(), triton.cdiv(len(w), t.n)
        parts[:] = [torch.empty(2 * across, len(x), device=x.device)]
        outputs = described(h, t.m, t.n // 2), described(h if scales is None else h8, t.m, t.n // 2)
        relu2_kernel[tile_programs(x, t, triton.cdiv(len(x), t.m) * across),](
            described(x, t.m, k), described(w, t.n, k), *outputs, parts[0], parts[0] if scales is None else scales,
            len(x), *w.shape, scales is not None, t.m, t.n, k, num_warps=t.warps, num_stages=t.stages,
        )  # fmt: skip

    launch(tuned(("relu2", w.shape), x, launch))
    return h, h8, parts[0].sum(0)[:, None]


def empty_relu2_gradient(dy: Tensor, w: Tensor, h: Tensor, *rest: Tensor | None) -> tuple[Tensor, Tensor]:  # noqa: ARG001
    return torch.empty_like(h), torch.empty_like(h, dtype=torch.float8_e5m2) if rest[-1] is not None else h.new_empty(0)


@operator(empty_relu2_gradient)
def relu2_gradient(dy: Tensor, w: Tensor, h: Tensor, rho: Tensor, c: Tensor, scales: Tensor | None) -> tuple[Tensor, Tensor]:
    """2 sqrt(h) (rho * (dy @ w) - c * h) as h (N, out), and in 8 bits: dy (N, in), w (in, out), rho and c (N, 1).

    `scales` (2,), for 8-bit dy and w alone, w then transposed: what the product and then the gradient is multiplied with.
    """
    (g, g8), eight = empty_relu2_gradient(dy, w, h, rho, c, scales), scales is not None

    def launch(t: Tiles) -> None:
        k, half = t.k_bytes // dy.element_size(), t.n // 2
        weight = described(w, t.n, k) if eight else described(w, k, t.n)
        blocks = described(g, t.m, half), described(g8 if eight else g, t.m, half)
        relu2_gradient_kernel[tile_programs(dy, t, triton.cdiv(len(h), t.m) * triton.cdiv(h.size(1), t.n)),](
            described(dy, t.m, k), weight, described(h, t.m, half), rho, c, *blocks, scales if eight else rho,
            len(h), h.size(1), dy.size(1), eight, t.m, t.n, k, num_warps=t.warps, num_stages=t.stages,
        )  # fmt: skip

    launch(tuned(("relu2 gradient", w.shape), dy, launch))
    return g, g8


class FusedMLP(torch.autograd.Function):
    """down(rms_norm(relu(up(x))^2)): the activation in the epilogue of `up`, the norm as in NormedMatmul, its gradient and the
    activation's in the epilogue of one product. As wide as the hidden layer, one tensor is written forward and one backward.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, up: Tensor, down: Tensor, w_up: Tensor, w_down: Tensor) -> Tensor:  # noqa: ARG004
        """x (N, D), latent matrices, stored matrices (hidden, D) and (D, hidden)."""
        h, _, squares = relu2_product(x, w_up, None, x.dtype)
        y, rho = F.linear(h, w_down), norm_factor(squares / h.size(1))
        ctx.save_for_backward(x, h, y, rho, w_up, w_down)
        return (rho * y).to(x.dtype, copy=True)  # torch 2.11 compiles a `to` that does nothing to no gradient

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        x, h, y, rho, w_up, w_down = ctx.saved_tensors
        c, g = norm_slope(g, y, rho, h.size(1)), g.contiguous()
        d_hidden, _ = relu2_gradient(g, w_down, h, rho, c, None)
        return d_hidden @ w_up, weight_gradient(d_hidden, x), weight_gradient((rho * g).to(g.dtype), h), None, None


class Fp8FusedMLP(torch.autograd.Function):
    """FusedMLP with 8-bit operands as in Fp8Matmul. h is rounded before its norm is known, on a scale that `up` alone bounds.

    The largest h comes to 0.13 to 0.21 of that bound (3 layers of width 256, 120 steps); its rounding is off by 2.63 to 2.67 %
    there, by 2.56 to 2.68 % on the largest h's own scale, by 2.61 to 2.69 % after the norm: e4m3's range takes up the slack.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, up: Tensor, down: Tensor, *operands: Any) -> Tensor:  # noqa: ARG004
        """x (N, D), latent matrices, their Fp8Weights, and the scales of x and of gradients."""
        w_up, w_down, (x_scale, ctx.g_scale) = operands
        scales = torch.stack((w_up.scale / x_scale, w_up.relu2_scale))
        h, h8, squares = relu2_product(to_fp8(x, x_scale), w_up.codes, scales, x.dtype)
        y, rho = fp8_product(h8, w_down.codes, w_down.scale / w_up.relu2_scale, x.dtype), norm_factor(squares / h.size(1))
        ctx.save_for_backward(x, h, y, rho, w_up.codes_t, w_up.scale, w_down.codes_t, w_down.scale)
        return (rho * y).to(x.dtype, copy=True)  # torch 2.11 compiles a `to` that does nothing to no gradient

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None, None]:
        x, h, y, rho, up_t, up_scale, down_t, down_scale = ctx.saved_tensors
        c, g8 = norm_slope(g, y, rho, h.size(1)), to_fp8(g, ctx.g_scale, torch.float8_e5m2)
        scales = torch.stack((down_scale / ctx.g_scale, torch.full_like(down_scale, ctx.g_scale)))
        d_hidden, d8 = relu2_gradient(g8, down_t, h, rho, c, scales)
        dx = fp8_product(d8, up_t, up_scale / ctx.g_scale, x.dtype)
        return dx, weight_gradient(d_hidden, x), weight_gradient((rho * g).to(g.dtype), h), None, None, None


# (out, in) of the matrices whose weight gradients run as `split_weight_gradient`, and into how many sums: where that is faster
# than torch.mm, for which the result's tiles may fill 14 to 55 % of an H100. Empty until bench/gemm.py has run on one.
SPLIT_SUMS: dict[tuple[int, int], int] = {}


@jit
def split_gradient_kernel(
    g, x, parts, rows, splits, OUT: tl.constexpr, IN: tl.constexpr,
    TILE_M: tl.constexpr, TILE_N: tl.constexpr, TILE_K: tl.constexpr,
):  # fmt: skip
    """parts (splits, OUT, IN): g.T @ x over an equal run of the rows each."""
    across: tl.constexpr = (IN + TILE_N - 1) // TILE_N
    tiles: tl.constexpr = (OUT + TILE_M - 1) // TILE_M * across
    share = tl.cdiv(tl.cdiv(rows, splits), TILE_K) * TILE_K
    for work in tl.range(tl.program_id(0), tiles * splits, tl.num_programs(0), flatten=True):
        i, j = work % tiles // across * TILE_M, work % across * TILE_N
        total = tl.zeros((TILE_M, TILE_N), tl.float32)
        for k in range(0, share, TILE_K):  # rows past the end are zeros
            row = work // tiles * share + k
            total = tl.dot(g.load([row, i]).T, x.load([row, j]), total)
        left, right = halves(total, TILE_M, TILE_N)
        row, column = i + tl.arange(0, TILE_M)[:, None], j + tl.arange(0, TILE_N // 2)[None, :]
        cells, beyond = parts + (work // tiles * OUT + row).to(tl.int64) * IN + column, TILE_N // 2
        tl.store(cells, left, (row < OUT) & (column < IN))
        tl.store(cells + beyond, right, (row < OUT) & (column + beyond < IN))


def empty_weight_gradient(g: Tensor, x: Tensor, splits: int) -> Tensor:  # noqa: ARG001
    return g.new_empty(g.size(1), x.size(1), dtype=torch.float32)


@operator(empty_weight_gradient)
def split_weight_gradient(g: Tensor, x: Tensor, splits: int) -> Tensor:
    """g.T @ x in float32 as `splits` sums over the rows, added up in one order: repeatable, unlike atomic additions."""
    parts = g.new_empty(splits, g.size(1), x.size(1), dtype=torch.float32)

    def launch(t: Tiles) -> None:
        k, work = t.k_bytes // g.element_size(), splits * triton.cdiv(g.size(1), t.m) * triton.cdiv(x.size(1), t.n)
        split_gradient_kernel[tile_programs(g, t, work),](
            described(g, k, t.m), described(x, k, t.n), parts, len(g), splits, *parts.shape[1:], t.m, t.n, k,
            num_warps=t.warps, num_stages=t.stages,
        )  # fmt: skip

    launch(tuned(("weight gradient", parts.shape), g, launch))
    return parts.sum(0)


def mlp_fuses(x: Tensor, mlp: MLP) -> bool:
    """Whether the MLP's two products run as one function. Not in float16, where h could overflow before its norm."""
    layers = mlp.up, mlp.down
    aligned = all(size % 8 == 0 for size in mlp.down.weight.shape)  # rows for the memory accelerator; 16 if 8 bits, checked
    same = mlp.norm is rms_norm and any(all(plain(layer, product) for layer in layers) for product in (StoredProduct, Fp8Product))
    return kernels_run(x) and x.dtype != torch.float16 and mlp.activation is ACTIVATIONS["relu2"] and aligned and same


def fused_mlp(x: Tensor, mlp: MLP) -> Tensor:
    """mlp(x) for x (..., D)."""
    rows, layers = x.flatten(0, -2), (mlp.up, mlp.down)
    latent = [layer.weight for layer in layers]
    if isinstance(mlp.up.product, Fp8Product):
        weights = [layer.product.weight(layer, x.dtype) for layer in layers]
        return Fp8FusedMLP.apply(rows, *latent, *weights, mlp.up.product.scales).view_as(x)
    return FusedMLP.apply(rows, *latent, *(layer.stored(x.dtype) for layer in layers)).view_as(x)


# ---- 9 Artifact ------------------------------------------------------------------------------------------------------
# The model as bytes, and back. The model's definition is the schema: streams hold the parameters in its order, without names.
#
#   bytes      what
#   4          magic "TGPT"
#   2          version, uint16 little-endian like every number here
#   2          length of the header text
#   32         SHA-256 of everything after this field
#   ...        header text: one NAME=value line for each model setting, then codec=... and temperature=...
#   4 x 4      length of each stream (uint32)
#   ...        stream trits: code + 1 of every ternary weight; codec ans puts the class of every column before them
#   ...        stream scales: for each ternary matrix its scales: e4m3 a byte each; fp16, bf16: all high bytes, then all low ones
#   ...        stream tables: FP8: exponent of 2 + 128, then e4m3 codes; INTb, FP4: a step a row, codes + 128; FP16: as scales
#   ...        stream controls: float16, for each parameter all high bytes, then all low ones
#
# codec=ans: every stream is entropy-coded by `ans_encode`, the same bytes on every machine. codec=base3 and codec=bitmask, the
# published methods: trits packed, then each stream raw LZMA2. Nothing may follow the last stream.

ARTIFACT_MAGIC, ARTIFACT_VERSION = b"TGPT", 2
ARTIFACT_PREFIX = struct.Struct("<4sHH32s")
STREAMS = ("trits", "scales", "tables", "controls")
STREAM_LENGTHS = struct.Struct("<4I")
# between classes of columns: shares of zeros in 2^-16, .2 apart in log odds
COLUMN_BOUNDS = np.array([round(2**16 / (1 + math.exp(-0.2 * (k + 0.5)))) for k in range(-32, 31)])
LARGEST_EXPANSION = 20_000  # bytes of float32 weights for a byte of artifact: 18 if trained, some 10,000 if all zeros


class ArtifactError(UserError):
    """The bytes are not a whole, valid artifact."""


class Piece(NamedTuple):
    """A run of symbols of one stream that share a probability table."""

    stream: str
    context: Any  # parameters of one shape share their tables
    length: int


def split_bytes(x: np.ndarray) -> list[np.ndarray]:
    """16-bit values -> their high bytes, their low bytes: the former have few values, the latter hardly compress."""
    return list(x.reshape(-1).astype("<u2").view(np.uint8).reshape(-1, 2).T[::-1])


def join_bytes(high: np.ndarray, low: np.ndarray) -> np.ndarray:
    return np.stack((low, high), axis=1).reshape(-1).view("<u2")


def pieces(module: nn.Module, p: Tensor, role: Role) -> list[Piece]:
    """What a parameter puts into the streams, ternary codes apart."""
    shape = tuple(p.shape)
    if role.storage == "ternary":
        count, wide = p.numel() // module.group_size, module.form.storage != "e4m3"
        return [Piece("scales", shape, count), *[Piece("scales", "low", count)] * wide]
    if role.storage == "table" and module.fp_storage != "FP16":
        count, wide = 1 if module.fp_storage == "FP8" else shape[0], module.fp_storage == "FP4"
        return [Piece("tables", "scale", count), *[Piece("tables", "low", count)] * wide, Piece("tables", shape, p.numel())]
    stream = role.storage + "s"
    return [Piece(stream, shape, p.numel()), Piece(stream, "low", p.numel())]


def parameter_symbols(module: nn.Module, p: Tensor, role: Role) -> list[np.ndarray]:
    """The symbols of `pieces`, uint8 each."""
    w = p.detach().float()
    if role.storage == "ternary":
        return scale_symbols(module.ternarized()[1], module.form.storage)
    storage = module.fp_storage if role.storage == "table" else "FP16"
    if storage == "FP16":
        return split_bytes(w.half().view(torch.int16).numpy().view(np.uint16))
    if storage == "FP8":
        codes, scale = round_fp8(w)
        return [np.array([128 + round(math.log2(scale.item()))], np.uint8), codes.view(torch.uint8).numpy().reshape(-1)]
    codes, step = round_rows(w, storage)
    return [*scale_symbols(step, row_scale(storage)), (codes.numpy().reshape(-1) + 128).astype(np.uint8)]


def scale_symbols(scale: Tensor, storage: str) -> list[np.ndarray]:
    """Scales as they are stored: a byte each, or all high bytes and all low ones."""
    bits = scale.view(torch.int32).numpy().reshape(-1)
    if storage == "e4m3":
        return [((bits >> 20) - E4M3_FIRST).astype(np.uint8)]
    return split_bytes(bits >> 16 if storage == "bf16" else bits.view(np.float32).astype(np.float16).view(np.uint16))


def stored_scales(symbols: list[np.ndarray], storage: str) -> Tensor:
    """Inverse of scale_symbols: (groups, 1) float32."""
    if storage == "e4m3":
        return torch.from_numpy((symbols[0].astype(np.int32) + E4M3_FIRST) << 20).view(torch.float32)[:, None]
    bits = join_bytes(*symbols)
    x = (bits.astype(np.uint32) << 16).view(np.float32) if storage == "bf16" else bits.view(np.float16).astype(np.float32)
    return torch.from_numpy(x)[:, None]


def stored_parameter(module: nn.Module, shape: torch.Size, role: Role, symbols: list[np.ndarray]) -> Tensor:
    """Inverse of `parameter_symbols` for tables and controls: float32 of `shape`."""
    storage = module.fp_storage if role.storage == "table" else "FP16"
    if storage == "FP16":
        return torch.from_numpy(join_bytes(*symbols).view(np.float16).astype(np.float32)).view(shape)
    if storage == "FP8":
        codes = torch.from_numpy(symbols[1].copy()).view(torch.float8_e4m3fn).float()
        return codes.view(shape) * 2.0 ** (int(symbols[0][0]) - 128)
    return (torch.from_numpy(symbols[-1].astype(np.float32)) - 128).view(shape) * stored_scales(symbols[:-1], row_scale(storage))


class Layout:
    """What a model puts where: derived from its structure alone, so a model on the meta device will do."""

    def __init__(self, model: GPT) -> None:
        owners = [(module, p, role) for _, module, p, role in saved_parameters(model)]
        self.matrices = [tuple(p.shape) for _, p, role in owners if role.storage == "ternary"]
        self.pieces = [piece for owner in owners for piece in pieces(*owner)]
        self.params = sum(p.numel() for _, p, _ in owners)
        self.count = {s: sum(piece.length for piece in self.pieces if piece.stream == s) for s in STREAMS[1:]}
        self.count["trits"] = sum(rows * columns for rows, columns in self.matrices)

    def contexts(self, stream: str) -> np.ndarray:
        """(count,) number of the probability table of each symbol of the stream."""
        own = [piece for piece in self.pieces if piece.stream == stream]
        number = {context: i for i, context in enumerate(dict.fromkeys(piece.context for piece in own))}
        return np.repeat(np.array([number[piece.context] for piece in own], np.uint16), [piece.length for piece in own])


def column_classes(symbols: np.ndarray, matrices: list[tuple[int, int]]) -> np.ndarray:
    """The class of every column of every matrix, uint8: how many of its codes are 0. Integers only.

    Columns that see small activations keep small weights: their zeros are frequent. On trained weights this takes 2.0 % off
    the trits' entropy, the classes paid for; rows, scales and neighbouring trits add nothing (RESULTS.md R005).
    """
    classes, at = [symbols[:0]], 0
    for rows, columns in matrices:
        zeros = (symbols[at : at + rows * columns].reshape(rows, columns) == 1).sum(0)
        classes.append(np.searchsorted(COLUMN_BOUNDS, (zeros << 16) // rows, side="right").astype(np.uint8))
        at += rows * columns
    return np.concatenate(classes)


def trit_contexts(classes: np.ndarray, matrices: list[tuple[int, int]]) -> np.ndarray:
    """The class of each trit's column, in the order of the trits."""
    ends = itertools.accumulate(columns for _, columns in matrices)
    return np.concatenate([classes[:0], *(np.tile(classes[b - n : b], r) for b, (r, n) in zip(ends, matrices, strict=True))])


def encode_trits(symbols: np.ndarray, matrices: list[tuple[int, int]]) -> bytes:
    """Length of the classes' stream (uint32), the classes, the trits with a table for each class."""
    classes = column_classes(symbols, matrices)
    side = ans_encode(classes, np.zeros(classes.size, np.uint8))
    return struct.pack("<I", len(side)) + side + ans_encode(symbols, trit_contexts(classes, matrices))


class TritStreams(NamedTuple):
    """The parts of what `encode_trits` wrote."""

    classes: AnsStream
    trits: AnsStream

    @classmethod
    def parse(cls, data: bytes, matrices: list[tuple[int, int]]) -> TritStreams:
        length = int.from_bytes(data[:4], "little")
        classes = AnsStream.parse(data[4 : 4 + length], sum(columns for _, columns in matrices))
        return cls(classes, AnsStream.parse(data[4 + length :], sum(rows * columns for rows, columns in matrices)))

    def decode(self, matrices: list[tuple[int, int]]) -> np.ndarray:
        """(count,) uint8 in 0..2; ArtifactError for anything else."""
        classes = self.classes.decode(np.zeros(self.classes.count, np.uint8))
        symbols = self.trits.decode(trit_contexts(classes, matrices))
        if symbols.max(initial=0) > 2:
            raise ArtifactError("stream trits: a code above 2")
        return symbols


def pack_streams(symbols: list[np.ndarray], layout: Layout, codec: str) -> list[bytes]:
    """The streams' bytes under a codec."""
    if codec == "ans":
        others = [ans_encode(s, layout.contexts(name)) for name, s in zip(STREAMS[1:], symbols[1:], strict=True)]
        return [encode_trits(symbols[0], layout.matrices), *others]
    return pack_published(symbols, codec)


def unpack_streams(streams: list[bytes], layout: Layout, codec: str) -> list[np.ndarray]:
    """Inverse of pack_streams; ArtifactError unless each stream holds exactly the layout's symbols."""
    counts = [layout.count[name] for name in STREAMS]
    if codec == "ans":
        trits = TritStreams.parse(streams[0], layout.matrices)  # every stream is found sound before one is decoded
        others = [AnsStream.parse(data, count) for data, count in zip(streams[1:], counts[1:], strict=True)]
        symbols = [stream.decode(layout.contexts(name)) for stream, name in zip(others, STREAMS[1:], strict=True)]
        return [trits.decode(layout.matrices), *symbols]
    return unpack_published(streams, counts, codec)


def model_symbols(model: GPT, cfg: Config) -> list[np.ndarray]:
    """The four streams' symbols, uint8; UserError if a weight is not finite."""
    streams: dict[str, list[np.ndarray]] = {name: [] for name in STREAMS}
    for name, module, p, role in saved_parameters(model):
        w = p.detach().float()
        if not torch.isfinite(w if role == Role("matrix", "ternary") else w.half()).all():
            raise UserError(f"training diverged: {name} is not finite; try a lower MATRIX_LR={cfg.matrix_lr}")
        if role.storage == "ternary":
            streams["trits"].append(module.ternarized()[0].to(torch.uint8).add_(1).flatten().numpy())
        for piece, symbols in zip(pieces(module, p, role), parameter_symbols(module, p, role), strict=True):
            streams[piece.stream].append(symbols)
    return [np.concatenate(streams[name] or [np.empty(0, np.uint8)]) for name in STREAMS]


def save_artifact(model: GPT, cfg: Config) -> bytes:
    """The trained model as bytes; the same weights give the same bytes (codecs base3 and bitmask: with the same liblzma).

    `auto` keeps the codec with the fewest bytes among those whose bytes decode to the same symbols. UserError if a weight is
    not finite.
    """
    model = model if next(model.parameters()).device.type == "cpu" else copy.deepcopy(model).cpu()
    layout, symbols = Layout(model), model_symbols(model, cfg)
    names = list(AUTO_CODECS) if cfg.artifact_codec == "auto" else [cfg.artifact_codec]
    with ThreadPoolExecutor() as pool:  # LZMA and numpy release the interpreter
        packed = dict(zip(names, pool.map(lambda name: pack_streams(symbols, layout, name), names), strict=True))
    for codec in sorted(names, key=lambda name: sum(map(len, packed[name]))):
        back = unpack_streams(packed[codec], layout, codec)
        if all(np.array_equal(a, b) for a, b in zip(symbols, back, strict=True)):
            break
    else:
        raise AssertionError(f"no codec of {names} gives the symbols back")
    settings = stored_settings(cfg) | {"codec": codec, "temperature": repr(model.temperature.item())}
    header = "\n".join(f"{k}={v}" for k, v in settings.items()).encode()
    body = header + STREAM_LENGTHS.pack(*map(len, packed[codec])) + b"".join(packed[codec])
    return ARTIFACT_PREFIX.pack(ARTIFACT_MAGIC, ARTIFACT_VERSION, len(header), hashlib.sha256(body).digest()) + body


class Container(NamedTuple):
    """An artifact's parts, its streams still coded."""

    cfg: Config
    codec: str
    temperature: float
    streams: list[bytes]


def read_container(blob: bytes) -> Container:
    """ArtifactError unless every byte is accounted for."""
    if len(blob) < ARTIFACT_PREFIX.size or blob[:4] != ARTIFACT_MAGIC:
        raise ArtifactError("not an artifact of train_gpt.py (its first bytes are not TGPT)")
    _, version, header_length, digest = ARTIFACT_PREFIX.unpack_from(blob)
    if version != ARTIFACT_VERSION:
        raise ArtifactError(f"artifact version {version}; this train_gpt.py reads version {ARTIFACT_VERSION}")
    body = memoryview(blob)[ARTIFACT_PREFIX.size :]
    if hashlib.sha256(body).digest() != digest:
        raise ArtifactError("the artifact is damaged: its SHA-256 does not match (truncated, extended or changed)")
    try:
        settings = dict(line.split("=", 1) for line in bytes(body[:header_length]).decode().split("\n"))
        codec, temperature = settings.pop("codec"), float(settings.pop("temperature"))
        # how training cut its batches is not stored: any batch and stride that suit the stored window will do
        cfg = Config.from_env(settings | {"TRAIN_BATCH_TOKENS": settings["TRAIN_SEQ_LEN"], "SLIDING_EVAL_STRIDE": "1"})
        lengths = STREAM_LENGTHS.unpack_from(body, header_length)
    except (ValueError, KeyError, struct.error) as error:
        raise ArtifactError(f"the artifact's header is not valid: {error}") from None
    if codec not in CODECS or settings.keys() != stored_settings(cfg).keys():
        raise ArtifactError("the artifact's header is not valid: not the model settings and codec of this version")
    if not 0.5 <= temperature <= 2:
        raise ArtifactError(f"the artifact's temperature is {temperature}: expected 0.5 to 2")
    ends = [header_length + STREAM_LENGTHS.size + n for n in itertools.accumulate((0, *lengths))]
    if ends[-1] != len(body):
        raise ArtifactError("the artifact's stream lengths do not add up")
    return Container(cfg, codec, temperature, [bytes(body[a:b]) for a, b in itertools.pairwise(ends)])


def load_artifact(blob: bytes, precision: str = "auto") -> tuple[GPT, Config]:
    """A fresh, frozen model on the CPU and its config (model settings from the artifact, the rest defaults).

    ArtifactError (a ValueError) for anything that is not a whole, valid artifact; no code in it can run.
    """
    cfg, codec, temperature, streams = read_container(blob)
    cfg = dataclasses.replace(cfg, precision=precision)
    with torch.device("meta"):  # shapes only: what the header claims is checked before anything is allocated
        layout = Layout(GPT(cfg))
    if 4 * layout.params > LARGEST_EXPANSION * len(blob):
        raise ArtifactError(f"the artifact's header claims {layout.params} parameters, more than {len(blob)} bytes can hold")
    symbols = unpack_streams(streams, layout, codec)
    model = GPT(cfg)
    fill_model(model, symbols)
    model.temperature.fill_(temperature)
    return model, cfg


def fill_model(model: GPT, symbols: list[np.ndarray]) -> None:
    """Every parameter from the streams, in order and to the last symbol; values must be finite."""
    streams, at = dict(zip(STREAMS, symbols, strict=True)), dict.fromkeys(STREAMS, 0)

    def take(stream: str, length: int) -> np.ndarray:
        at[stream] += length
        return streams[stream][at[stream] - length : at[stream]]

    for name, module, p, role in parameter_owners(model):
        own = [take(piece.stream, piece.length) for piece in pieces(module, p, role)]
        if role.storage == "ternary":
            w = p.data.view(-1, module.group_size)  # in place: a second copy of the model need not fit
            w.copy_(torch.from_numpy(take("trits", p.numel())).view_as(w)).sub_(1).mul_(stored_scales(own, module.form.storage))
        else:
            p.data.copy_(stored_parameter(module, p.shape, role, own))
        if not torch.isfinite(p).all():
            raise ArtifactError(f"{name} is not finite in the artifact")
        p.requires_grad_(False)
        if isinstance(module, QuantizedLinear):
            module.frozen = True
    assert at == {name: len(stream) for name, stream in streams.items()}


# ---- 10 Published codecs and narrow tables (option) ------------------------------------------------------------------
# Base-3 + LZMA and bitmask + LZMA, the methods of #640 and of others, over the same symbols in the same container; tables of 4
# to 6 bits a weight.

LZMA_FILTERS = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": 1 << 24, "lc": 0, "lp": 0, "pb": 0}]


def pack_base3(codes: np.ndarray) -> bytes:
    """Five trits a byte: sum of (code + 1) * 3^j, j = 0..4; the last byte is filled up with digit 0. 1.6 bits a weight."""
    digits = np.zeros(-(-codes.size // 5) * 5, dtype=np.uint8)
    digits[: codes.size] = codes + 1
    return (digits.reshape(-1, 5) @ np.array([1, 3, 9, 27, 81], dtype=np.uint8)).astype(np.uint8).tobytes()


def unpack_base3(data: bytes, count: int) -> np.ndarray:
    """Inverse of pack_base3: (count,) int8. ValueError unless the bytes are exactly a packing of `count` codes."""
    packed = np.frombuffer(data, dtype=np.uint8)
    if packed.size != -(-count // 5) or (packed.size and packed.max() > 242):
        raise ValueError("not a base-3 packing")
    digits = np.empty((packed.size, 5), dtype=np.uint8)
    for j in range(5):
        packed, digits[:, j] = np.divmod(packed, np.uint8(3))
    digits = digits.reshape(-1)
    if digits[count:].any():
        raise ValueError("not a base-3 packing: padding is not zero")
    return digits[:count].astype(np.int8) - 1


def pack_bitmask(codes: np.ndarray) -> bytes:
    """One bit a weight (is it nonzero?), then one bit a nonzero weight (is it +1?). 2 - zero fraction bits a weight."""
    return np.packbits(codes != 0).tobytes() + np.packbits(codes[codes != 0] > 0).tobytes()


def unpack_bitmask(data: bytes, count: int) -> np.ndarray:
    """Inverse of pack_bitmask: (count,) int8. ValueError unless the bytes are exactly a packing of `count` codes."""
    packed, mask_bytes = np.frombuffer(data, dtype=np.uint8), -(-count // 8)
    mask = np.unpackbits(packed[:mask_bytes])
    nonzero = int(mask.sum())
    signs = np.unpackbits(packed[mask_bytes:])
    if packed.size != mask_bytes + -(-nonzero // 8) or mask[count:].any() or signs[nonzero:].any():
        raise ValueError("not a bitmask packing")
    codes = np.zeros(count, dtype=np.int8)
    codes[mask[:count].astype(bool)] = 2 * signs[:nonzero].astype(np.int8) - 1
    return codes


def pack_2bit(codes: np.ndarray) -> bytes:
    """Four codes a byte, the first in the lowest two bits, as code + 1 (#126); the last byte is filled up with 0."""
    digits = np.zeros(-(-codes.size // 4) * 4, np.uint8)
    digits[: codes.size] = codes + 1
    return (digits.reshape(-1, 4) << np.array([0, 2, 4, 6], np.uint8)).sum(1, dtype=np.uint8).tobytes()


def unpack_2bit(data: bytes, count: int) -> np.ndarray:
    """Inverse of pack_2bit: (count,) int8. ValueError unless the bytes are exactly a packing of `count` codes."""
    packed = np.frombuffer(data, np.uint8)
    digits = ((packed[:, None] >> np.array([0, 2, 4, 6], np.uint8)) & 3).reshape(-1)
    if packed.size != -(-count // 4) or digits.max(initial=0) > 2 or digits[count:].any():
        raise ValueError("not a 2-bit packing")
    return digits[:count].astype(np.int8) - 1


def unpack_int8(data: bytes, count: int) -> np.ndarray:
    """A code a byte, (count,) int8. ValueError unless they are `count` codes."""
    codes = np.frombuffer(data, np.int8)
    if codes.size != count or codes.min(initial=0) < -1 or codes.max(initial=0) > 1:
        raise ValueError("not ternary codes")
    return codes


class Compressor(NamedTuple):
    """`expand(data, most)` gives at most `most` bytes and takes no more memory than that; ArtifactError for anything else."""

    compress: Callable[[bytes], bytes]
    expand: Callable[[bytes, int], bytes]


def compress(raw: bytes) -> bytes:
    return lzma.compress(raw, format=lzma.FORMAT_RAW, filters=LZMA_FILTERS)


def expand(decoder: Any, data: bytes, most: int) -> bytes:
    """One whole stream of a decoder of lzma's or zlib's kind."""
    try:
        raw = decoder.decompress(data, most + 1)
    except (lzma.LZMAError, zlib.error) as error:
        raise ArtifactError(f"a stream does not decompress: {error}") from None
    if len(raw) > most or not decoder.eof or decoder.unused_data:
        raise ArtifactError(f"a stream does not hold what its model has: at most {most} bytes")
    return raw


def zstandard_module(what: str = "an artifact with zstd") -> Any:
    try:
        import zstandard
    except ImportError:
        raise UserError(f"{what} needs the package zstandard (pip install zstandard)") from None
    return zstandard


def expand_zstd(data: bytes, most: int) -> bytes:
    zstd = zstandard_module()
    try:  # a frame of ours says how long its content is, so the memory is known before it is taken
        size = zstd.get_frame_parameters(data).content_size
        if size <= most:
            return zstd.ZstdDecompressor(max_window_size=1 << 27).decompress(data, max_output_size=1, allow_extra_data=False)
    except zstd.ZstdError as error:
        raise ArtifactError(f"a stream does not decompress: {error}") from None
    raise ArtifactError(f"a stream does not hold what its model has: at most {most} bytes")


# zlib's level 9 takes 2 s/MB on a code a byte, level 6 0.1 s/MB for 4 % more bytes; on packed codes they are the same
COMPRESSORS = {
    "lzma": Compressor(compress, lambda *stream: expand(lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=LZMA_FILTERS), *stream)),
    "zlib9": Compressor(lambda raw: zlib.compress(raw, 9), lambda *stream: expand(zlib.decompressobj(), *stream)),
    "zlib6": Compressor(lambda raw: zlib.compress(raw, 6), lambda *stream: expand(zlib.decompressobj(), *stream)),
    "zstd": Compressor(lambda raw: zstandard_module().ZstdCompressor(level=22).compress(raw), expand_zstd),
}
PACKINGS = {"base3": (pack_base3, unpack_base3), "bitmask": (pack_bitmask, unpack_bitmask), "2bit": (pack_2bit, unpack_2bit),
            "int8": (np.ndarray.tobytes, unpack_int8)}
PUBLISHED = {"base3": ("base3", "lzma"), "bitmask": ("bitmask", "lzma"), "2bit": ("2bit", "zlib9"), "int8": ("int8", "zlib6"),
             **{f"{packing}_zstd": (packing, "zstd") for packing in PACKINGS}}
CODECS, AUTO_CODECS = ("ans", *PUBLISHED), ("ans", "base3", "bitmask")


def pack_published(symbols: list[np.ndarray], codec: str) -> list[bytes]:
    """The streams' bytes: packed trits and raw symbols, each compressed."""
    packing, compressor = PUBLISHED[codec]
    raw = (PACKINGS[packing][0](symbols[0].view(np.int8) - 1), *(s.tobytes() for s in symbols[1:]))
    return [COMPRESSORS[compressor].compress(r) for r in raw]


def unpack_published(streams: list[bytes], counts: list[int], codec: str) -> list[np.ndarray]:
    """Inverse of pack_published; ArtifactError unless each stream holds exactly its count of symbols."""
    packing, compressor = PUBLISHED[codec]
    grown = COMPRESSORS[compressor].expand
    others = [np.frombuffer(grown(data, count), np.uint8) for data, count in zip(streams[1:], counts[1:], strict=True)]
    packed = grown(streams[0], counts[0] if packing == "int8" else 2 * -(-counts[0] // 8) + 1)
    try:
        codes = PACKINGS[packing][1](packed, counts[0])
    except ValueError as error:
        raise ArtifactError(f"stream trits: {error}") from None
    symbols = [(codes + 1).view(np.uint8), *others]
    if [s.size for s in symbols] != counts:
        raise ArtifactError("the artifact's streams are not those of the model it describes")
    return symbols


def round_rows(w: Tensor, storage: str) -> tuple[Tensor, Tensor]:
    """Whole-number codes (as w) and a step (rows, 1) for each row. FP4: `round_fp4`. INTb: root mean square / 2^(b - 2).

    A Gaussian row then takes b + .05 bits a weight after entropy coding; codes reach +-127, so nothing near is clipped
    (a uniform quantizer with entropy coding: Gish and Pierce 1968). The step is rounded like a scale. Reciprocal and root
    are taken in float64: the quotient is then the same on every device.
    """
    if storage == "FP4":
        return round_fp4(w.float())
    rms = w.float().square().mean(-1, keepdim=True, dtype=torch.float64).sqrt()
    step = round_scale((rms * 2.0 ** (2 - int(storage[-1]))).float(), "e4m3")
    return (w.float() * step.double().reciprocal().float()).round().clamp(-127, 127), step


def row_scale(storage: str) -> str:
    """How the steps of a table's rows are stored."""
    return "fp16" if storage == "FP4" else "e4m3"


def round_fp4(w: Tensor) -> tuple[Tensor, Tensor]:
    """#640's FP4: codes -7..7 and a float16 scale (rows, 1), the row's largest magnitude / 7."""
    scale = round_scale(w.abs().amax(-1, keepdim=True) / 7, "fp16")
    return (w * scale.double().reciprocal().float()).round().clamp(-7, 7), scale


# ---- 11 Evaluation ---------------------------------------------------------------------------------------------------
# A model and the validation tokens in; nats per token and bits per byte out. One function for every stride.


class ByteTable(NamedTuple):
    """UTF-8 bytes that each token adds to the decoded text of its document; the denominator of bits per byte."""

    size: Tensor  # (V,) bytes of the piece; 0 for control and unknown tokens
    space: Tensor  # (V,) bool: the piece begins with the meta space, which decoding drops at the start of a document
    edge: Tensor  # (V,) bool: a document starts after this token (control and unknown tokens)

    @classmethod
    def load(cls, tokenizer_path: str, vocab_size: int) -> ByteTable:
        """From a SentencePiece model; UserError unless it is one and has `vocab_size` pieces."""
        from sentencepiece import SentencePieceProcessor

        if not Path(tokenizer_path).is_file():
            raise FileNotFoundError(f"TOKENIZER_PATH={tokenizer_path!r}: no such file; expected a SentencePiece model")
        try:
            sp = SentencePieceProcessor(model_file=tokenizer_path)
        except (RuntimeError, OSError):
            raise UserError(f"TOKENIZER_PATH={tokenizer_path!r}: not a SentencePiece model") from None
        if sp.vocab_size() != vocab_size:
            raise UserError(f"TOKENIZER_PATH={tokenizer_path!r} has {sp.vocab_size()} pieces, but VOCAB_SIZE={vocab_size}")
        sizes, spaces, edges = [], [], []
        for i in range(vocab_size):
            piece = sp.id_to_piece(i)
            edges.append(sp.is_control(i) or sp.is_unknown(i) or sp.is_unused(i))
            # a byte piece is spelled <0xE2> but decodes to one byte; the meta space U+2581 has three bytes, a space one
            sizes.append(0 if edges[-1] else 1 if sp.is_byte(i) else len(piece.replace("\u2581", " ").encode()))
            spaces.append(not edges[-1] and piece.startswith("\u2581") and len(sp.decode([i])) < len(piece))
        return cls(torch.tensor(sizes), torch.tensor(spaces), torch.tensor(edges))

    def count(self, previous: Tensor, ids: Tensor) -> Tensor:
        """Bytes of each token given the one before it; both of one shape."""
        return self.size[ids] - (self.space[ids] & self.edge[previous]).long()


class ValidationSet(NamedTuple):
    """The validation split as one stream: target i is tokens[i + 1]."""

    tokens: Tensor  # (num_targets + 1,) int64 on the device
    num_bytes: int  # of all targets

    @classmethod
    def load(cls, cfg: Config, world: World) -> ValidationSet:
        stream = TokenStream(cfg, "val")
        count = min(stream.num_tokens, cfg.val_max_tokens + 1 if cfg.val_max_tokens else stream.num_tokens)
        if count < 2:
            raise UserError(f"DATA_PATH={cfg.data_path!r}: the validation split holds {count} token; expected at least 2")
        tokens = torch.from_numpy(stream.read(0, count).astype(np.int64))
        num_bytes = int(ByteTable.load(cfg.tokenizer_path, cfg.vocab_size).count(tokens[:-1], tokens[1:]).sum())
        return cls(tokens.to(world.device), num_bytes)

    @property
    def num_targets(self) -> int:
        return len(self.tokens) - 1


def window_plan(num_targets: int, seq_len: int, stride: int) -> tuple[np.ndarray, np.ndarray]:
    """(start, first scored position) of each window; the scored spans tile [0, num_targets) exactly once.

    Windows end every `stride` targets, the last one at the last target; each is as long as the text before its end allows.
    """
    ends = np.minimum(np.arange(seq_len, max(num_targets, seq_len) + stride, stride), num_targets)
    ends = ends[: 1 + int(np.searchsorted(ends, num_targets))]  # the first window that reaches the end is the last one
    starts = np.maximum(ends - seq_len, 0)
    return starts, np.concatenate(([0], ends[:-1])) - starts


def score_windows(model: GPT, x: Tensor, y: Tensor, tail: int, temperature: Tensor) -> Tensor:
    """Nats of the last `tail` targets of each window: (B, T), (B, T) -> (B, tail); the last block and the head run on these
    alone."""
    h, y = model.hidden(x, tail=tail), y[:, -tail:]
    rows = len(h) if h.is_cuda else max(1, 2**20 // (tail * model.cfg.vocab_size))  # logits that stay in a CPU's cache
    parts = [token_nats(model.logits(a) / temperature, b)[0] for a, b in zip(h.split(rows), y.split(rows), strict=True)]
    return torch.cat(parts)


@torch.no_grad()
def evaluate(model: GPT, val: ValidationSet, cfg: Config, world: World, stride: int) -> tuple[float, float]:
    """(nats per token, bits per byte) of the validation split, every target scored once.

    stride == train_seq_len: chunked, temperature 1. Another stride: sliding windows, the model's temperature.
    """
    chunked = stride == cfg.train_seq_len
    seq_len = cfg.train_seq_len if chunked else cfg.score_window
    temperature = torch.ones_like(model.temperature) if chunked else model.temperature
    starts, firsts = (torch.from_numpy(a).to(world.device) for a in window_plan(val.num_targets, seq_len, stride))
    per_step = cfg.val_batch_size // world.size if chunked else cfg.sliding_batch_size * seq_len
    per_step = min(per_step, cfg.micro_batch_tokens * (4 if world.device.type == "cuda" else 1))  # no gradients: more fit
    mine = slice(1 + world.rank, None, world.size)
    # the first window scores all its targets, the others at most `stride`; it is not worth a compilation
    jobs = [(starts[:1], firsts[:1], seq_len, score_windows)] * world.is_main
    jobs.append((starts[mine], firsts[mine], stride, compiled(score_windows, cfg, world)))
    totals = torch.zeros(2, dtype=torch.float64, device=world.device)  # nats, targets
    positions = torch.arange(seq_len + 1, device=world.device)
    for job_starts, job_firsts, tail, score in jobs:
        size = min(max(1, per_step // seq_len), len(job_starts))
        for i in range(0, len(job_starts), size or 1):
            start, first = job_starts[i : i + size], job_firsts[i : i + size]
            missing = size - len(start)  # the last batch is filled up, so that shapes stay static
            start, first = F.pad(start, (0, missing)), F.pad(first, (0, missing), value=seq_len)
            index = start[:, None] + positions
            windows = val.tokens[index.clamp_max(val.num_targets)]
            nats = score(model, windows[:, :-1].contiguous(), windows[:, 1:].contiguous(), tail, temperature)
            scored = ((positions[:-1] >= first[:, None]) & (index[:, 1:] <= val.num_targets))[:, -tail:]
            totals += torch.stack((nats.double().mul(scored).sum(), scored.sum()))
    nats, targets = world.sum_(totals).tolist()
    assert targets == val.num_targets
    return nats / targets, nats / math.log(2) / val.num_bytes


# ---- 12 Report -------------------------------------------------------------------------------------------------------
# What the log says about the run besides its losses.


def git_commit() -> str:
    """The commit that the file stands at, "+" if it was changed since; "unknown" outside a repository."""
    git = ["git", "-C", str(Path(__file__).resolve().parent)]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", __file__], check=False).returncode
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head + "+" * bool(changed)


def gpu_name(world: World) -> str:
    return torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else "none"


def log_start(cfg: Config, world: World, log: Log) -> None:
    """The source, the versions and the resolved config: a run is reproduced from its log alone."""
    log(Path(__file__).read_text(encoding="utf-8"), console=False)
    attention = "FlashAttention-3" if world.device.type == "cuda" and flash_attention_3(cfg) else "PyTorch SDPA"
    log(f"python:{platform.python_version()} torch:{torch.__version__} numpy:{np.__version__} device:{world.device.type} "
        f"gpu:{gpu_name(world)} threads:{torch.get_num_threads()} attention:{attention} "
        f"precision:{compute_dtype(cfg.precision, world.device)}")
    log("config " + json.dumps(dataclasses.asdict(cfg)), console=False)


def count_parameters(model: GPT) -> tuple[int, int]:
    """(all, ternary) weights that are trained and saved."""
    sizes = [(p.numel(), role.storage) for _, _, p, role in saved_parameters(model)]
    return sum(n for n, _ in sizes), sum(n for n, storage in sizes if storage == "ternary")


def log_artifact(blob: bytes, model: GPT, log: Log) -> dict[str, Any]:
    """Sizes against the budget: the artifact and the file that ran."""
    code = Path(__file__).read_bytes()
    params, ternary = count_parameters(model)
    container = read_container(blob)
    packed = [len(data) for data in container.streams]
    total = len(blob) + len(code)
    log(f"artifact:{len(blob) / 1e6:.2f}MB ternary:{ternary}({packed[0] + packed[1]}B) "
        f"fp:{params - ternary}({packed[2] + packed[3]}B) code:{len(code)} codec:{container.codec}")
    verdict = "FITS" if total <= BUDGET_BYTES else "OVER"
    log(f"budget:{total}/{BUDGET_BYTES} ({total / 1e6:.2f}/{BUDGET_BYTES / 1e6:.2f}MB) {verdict}")
    return {"params": params, "ternary_params": ternary, "artifact_bytes": len(blob), "code_bytes": len(code),
            "total_bytes": total, "codec": container.codec, "stream_bytes": dict(zip(STREAMS, packed, strict=True)),
            "code_sha256": hashlib.sha256(code).hexdigest(), "artifact_sha256": hashlib.sha256(blob).hexdigest()}


def score_artifact(model: GPT, val: ValidationSet, cfg: Config, world: World, log: Log) -> dict[str, Any]:
    """The reported scores of a reloaded model: chunked, then sliding."""
    result: dict[str, Any] = {"val_tokens": val.num_targets, "val_bytes": val.num_bytes, "stride": cfg.score_stride}
    clock = Clock(world)
    loss, bpb = evaluate(model, val, cfg, world, cfg.train_seq_len)
    log(f"final_ternary_roundtrip val_loss:{loss:.4f} val_bpb:{bpb:.4f} eval_time:{1000 * clock.finish():.0f}ms")
    result |= {"roundtrip_val_loss": loss, "roundtrip_val_bpb": bpb, "sliding_val_loss": None, "sliding_val_bpb": None}
    if cfg.sliding_eval:
        sliding = Clock(world)
        loss, bpb = evaluate(model, val, cfg, world, cfg.score_stride)
        log(f"final_sliding val_loss:{loss:.4f} val_bpb:{bpb:.4f} (stride={cfg.score_stride}, "
            f"T={model.temperature.item():.2f}) eval_time:{1000 * sliding.finish():.0f}ms")
        result |= {"sliding_val_loss": loss, "sliding_val_bpb": bpb}
    return result | {"temperature": model.temperature.item(), "eval_time_s": clock.finish()}


# ---- 13 Optional systems (option) ------------------------------------------------------------------------------------
# Other systems of the field, off in the default run. What the sections above ask for here is a kind of module (`matrix`,
# `..._kind`): the default's own classes unless a setting names another.

# Updates of matrices, by MATRIX_OPTIMIZER: (optimizer, gradients (n, rows, columns), their state, momentum) -> what is
# subtracted after multiplication with the learning rate. Every tensor of the state has n first.


def muon_plain(opt: NeoMuon, g: Tensor, state: dict[str, Tensor], momentum: float) -> Tensor:
    """Muon as first published."""
    return opt.orthogonal(nesterov(g, state, momentum))


def normuon(opt: NeoMuon, g: Tensor, state: dict[str, Tensor], momentum: float) -> Tensor:
    """NorMuon (arXiv:2510.05491, in the form of #78): each row of Muon's update divided by the root of the running mean of
    its square, then the whole brought back to the norm it had."""
    if not state:
        state |= {"momentum": torch.zeros_like(g), "square": torch.zeros_like(g[..., :1])}
    u = opt.orthogonal(g.lerp(state["momentum"].lerp_(g, 1 - momentum), momentum))
    square = state["square"].lerp_(u.square().mean(-1, keepdim=True), 1 - opt.cfg.normuon_beta2)
    scaled = u / (square.sqrt() + 1e-10)
    norm, scaled_norm = (t.norm(dim=(-2, -1), keepdim=True) for t in (u, scaled))
    return scaled * (norm / scaled_norm.clamp_min(1e-10))


def normuon126(opt: NeoMuon, g: Tensor, state: dict[str, Tensor], momentum: float) -> Tensor:
    """What #126 calls NorMuon: rows of unit root mean square after Newton-Schulz, no rescaling. At the same learning rate an
    element moves sqrt(columns) times as far as under Muon: 25 times at its width of 640."""
    u = opt.orthogonal(nesterov(g, state, momentum))
    return u / u.square().mean(-1, keepdim=True).sqrt_().clamp_min_(1e-8)


FRO_RATES = (0.1, 0.01, 0.001)


def fro_resonance(g: Tensor, m: Tensor, agreement: Tensor, least: float) -> Tensor:
    """#435's measure of how steadily gradient and momentum point the same way: (n, 1, 1) in [least, 1].

    rho is their cosine; for each of three rates its running mean, squared, is divided by its running mean square (both in
    `agreement`, (n, 3, 2)); the geometric mean of the three quotients.
    """
    rho = (g * m).sum((-2, -1)) / (g.norm(dim=(-2, -1)) * m.norm(dim=(-2, -1)) + 1e-8)
    agreement.lerp_(torch.stack((rho, rho.square()), -1)[:, None], agreement.new_tensor(FRO_RATES)[:, None])
    mean, square = agreement.unbind(-1)
    quotient = (mean.square() / (square + 1e-8)).clamp(least, 1)
    return (quotient + 1e-8).log().mean(-1).exp().clamp(least, 1)[:, None, None]


def half_unit_rms(u: Tensor, dim: int) -> Tensor:
    """Midway between u and u with unit root mean square along `dim`."""
    return 0.5 * u + 0.5 * u * (u.square().mean(dim, keepdim=True) + 1e-8).rsqrt()


def fro(opt: NeoMuon, g: Tensor, state: dict[str, Tensor], momentum: float) -> Tensor:  # noqa: ARG001
    """#435's optimizer and its stable form: Adam with one second moment a row (uncorrected, as published), slowed down where
    gradients disagree. BETA1 is its momentum. Matrices only: tables and controls stay under Adam."""
    cfg, stable = opt.cfg, opt.cfg.matrix_optimizer == "fro_stable"
    if not state:
        state |= {"momentum": torch.zeros_like(g), "square": torch.zeros_like(g[..., :1]), "step": torch.zeros_like(g[:, :1, :1]),
                  "agreement": g.new_zeros(len(g), len(FRO_RATES), 2)}
    step, m = state["step"].add_(1), state["momentum"].lerp_(g, 1 - cfg.beta1)
    resonance = fro_resonance(g, m, state["agreement"], 0.05 if stable else 0.0)
    u = m / (state["square"].lerp_(g.square().mean(-1, keepdim=True), 1 - cfg.fro_beta2).sqrt() + 1e-8)
    if stable:
        warm = (step / max(1, cfg.fro_warmup_steps)).clamp_max(1)
        resonance = 1 - warm + warm * resonance
        u = half_unit_rms(half_unit_rms(u, -1), -2)
    return u * (cfg.fro_alpha + (1 - cfg.fro_alpha) * cfg.fro_gamma * resonance) / (1 - cfg.beta1**step)


MATRIX_UPDATES = {"muon_plain": muon_plain, "normuon": normuon, "normuon126": normuon126, "fro": fro, "fro_stable": fro}


# Schedules: pure functions of step and progress.


def shaped_rate(cfg: Config, step: int, progress: float, left: float) -> float:
    """The learning rates' factor. `left`: the share of the warmdown still to come, 1 before it."""
    if cfg.warmdown_iters:
        # #139: as many steps as the clock or ITERATIONS allows at the pace so far
        steps = min(cfg.iterations, step / progress) if step and progress else cfg.iterations
        left = min(1.0, max(0.0, steps - step) / cfg.warmdown_iters)
    if cfg.warmdown_shape == "cosine":
        left = 0.5 - 0.5 * math.cos(math.pi * left)
    warm = min(1.0, (step + 1) / cfg.lr_warmup_steps) if cfg.lr_warmup_steps else 1.0
    return warm * (cfg.min_lr_ratio + (1 - cfg.min_lr_ratio) * left)


def ramp(start: int, full: int, p: float) -> int:
    """From start (p = 0) to full (p = 1) by doublings, evenly spread: 2^round(log2 of the geometric interpolation)."""
    return full >> round(math.log2(full / start) * (1 - min(1.0, p)))


def step_shape(cfg: Config, step: int, progress: float) -> tuple[int, int]:
    """(seq_len, batch_tokens) of a step."""
    seq_len, tokens = cfg.train_seq_len, cfg.train_batch_tokens
    if cfg.seq_len_start and progress < cfg.seq_schedule_fraction:
        seq_len = cfg.seq_len_start
    elif cfg.seq_ramp_start:
        seq_len = ramp(cfg.seq_ramp_start, seq_len, progress / cfg.seq_ramp_frac)
    elif cfg.seq_warmup_start:
        seq_len = ramp(cfg.seq_warmup_start, seq_len, step / cfg.seq_warmup_steps)
    if cfg.batch_tokens_start and progress < cfg.batch_schedule_fraction:
        tokens = cfg.batch_tokens_start
    elif cfg.batch_ramp_start:
        tokens = ramp(cfg.batch_ramp_start, tokens, progress / cfg.batch_ramp_frac)
    return seq_len, tokens


def step_shapes(cfg: Config) -> list[tuple[int, int]]:
    """Every (seq_len, batch_tokens) that `step_shape` can ask for, and perhaps some that it does not; the largest first."""

    def values(full: int, jump: int, start: int) -> list[int]:
        doublings = [full >> k for k in range((full // start).bit_length())] if start else []
        return sorted({full, jump or full, *doublings}, reverse=True)

    seq_lens = values(cfg.train_seq_len, cfg.seq_len_start, cfg.seq_ramp_start or cfg.seq_warmup_start)
    return list(itertools.product(seq_lens, values(cfg.train_batch_tokens, cfg.batch_tokens_start, cfg.batch_ramp_start)))


def check_training_options(cfg: Config, need: Callable[[bool, str, str], None]) -> None:
    """Ranges and combinations of the settings above."""
    for name in "ema_decay normuon_beta2 fro_beta2 ema_start_fraction".split():
        need(0 <= getattr(cfg, name) < 1, name, "a number in [0, 1)")
    for name in "min_lr_ratio fro_alpha seq_schedule_fraction batch_schedule_fraction".split():
        need(0 <= getattr(cfg, name) <= 1, name, "a number in [0, 1]")
    for name in "seq_ramp_frac batch_ramp_frac".split():
        need(0 < getattr(cfg, name) <= 1, name, "a number in (0, 1]")
    for name in "lr_warmup_steps warmdown_iters churn_log_every fro_gamma fro_warmup_steps".split():
        need(getattr(cfg, name) >= 0, name, "0 or more")
    need(cfg.seq_warmup_steps >= 1, "seq_warmup_steps", "at least 1")
    for starts in ("seq_len_start seq_ramp_start seq_warmup_start", "batch_tokens_start batch_ramp_start"):
        used = [name for name in starts.split() if getattr(cfg, name)]
        need(len(used) < 2, used[-1] if used else "", f"0 beside {used[0].upper() if used else ''}: one schedule at a time")
        if used and not cfg.eval_only:
            check_start(cfg, used[0], need)
    for fraction, start in (("seq_schedule_fraction", "seq_len_start"), ("batch_schedule_fraction", "batch_tokens_start")):
        used = getattr(cfg, start)
        need(not used or getattr(cfg, fraction) > 0, fraction, f"above 0 with {start.upper()}={used}")


def check_start(cfg: Config, name: str, need: Callable[[bool, str, str], None]) -> None:
    """A schedule's first value must tile what follows, and a ramp must reach it by doublings."""
    start, of_batch = getattr(cfg, name), name.startswith("batch")
    full = cfg.train_batch_tokens if of_batch else cfg.train_seq_len
    limit = f"TRAIN_BATCH_TOKENS={full}" if of_batch else f"TRAIN_SEQ_LEN={full}"
    if name in ("seq_len_start", "batch_tokens_start"):
        need(0 < start <= full, name, f"at most {limit}")
        need(full % start == 0 or of_batch, name, f"a divisor of {limit}")
    else:
        doublings = (full // start).bit_length() - 1 if start > 0 else -1
        need(doublings >= 0 and start << doublings == full, name, f"{limit} divided by a power of two")
    need(start % cfg.train_seq_len == 0 or not of_batch, name, f"a multiple of TRAIN_SEQ_LEN={cfg.train_seq_len}")


def check_layouts(cfg: Config, world_size: int) -> None:
    """UserError unless the processes divide every batch of the schedule."""
    for shape in step_shapes(cfg):
        batch_layout(cfg, world_size, shape)


# Between gradients and optimizers. Float16 needs its loss scaled: gradients of activations would underflow.


def usable_gradients(step: TrainingStep) -> bool:
    """Unscale and clip them as the settings ask; False, on every process, for a step that must be skipped."""
    if step.scaler and not step.scaler.unscale():
        return False
    if step.cfg.grad_clip_norm:
        clip_gradients(step.grads, step.world, step.cfg.grad_clip_norm)
    return True


def clip_gradients(grads: Gradients, world: World, max_norm: float) -> None:
    """Scale all gradients down to a common norm of at most `max_norm`."""
    shards = [bank.shard.grad for bank in grads.banks]
    squares = world.sum_(sum(g.square().sum() for g in shards)) + grads.flat[:-1].square().sum()
    for g in (grads.flat[:-1], *shards):
        g *= (max_norm / (squares.sqrt() + 1e-6)).clamp_max(1)


class LossScaler:
    """Dynamic loss scale (arXiv:1710.03740): doubled after 2,000 good steps; halved where a gradient is not finite, and the
    step is skipped on every process. torch.amp.GradScaler decides for each optimizer and process on its own."""

    GROWTH_STEPS = 2000

    def __init__(self, grads: Gradients, world: World) -> None:
        self._grads, self._world, self.good_steps = grads, world, 0
        grads.scale = 2.0**16

    def unscale(self) -> bool:
        """Divide the step's gradients by the scale; False, on all processes, if one of them is not finite."""
        own = [self._grads.flat[:-1], *(bank.shard.grad for bank in self._grads.banks)]
        finite = not self._world.sum_(sum((~g.isfinite()).sum() for g in own)).item()
        for g in own:
            g.div_(self._grads.scale)
        self.good_steps = (self.good_steps + 1) % self.GROWTH_STEPS if finite else 0
        self._grads.scale *= 0.5 if not finite else 2.0 if self.good_steps == 0 else 1.0
        if self._grads.scale < 1:
            raise UserError("PRECISION=fp16: gradients overflow without any loss scale; expected a precision with more range")
        return finite


def loss_scaler(cfg: Config, grads: Gradients, world: World) -> LossScaler | None:
    return LossScaler(grads, world) if compute_dtype(cfg.precision, world.device) == torch.float16 else None


# Beside the steps.


class Extras:
    """What a run does after its steps when asked to: CHURN_LOG_EVERY, EMA, and float16's loss scale in the log.

    EMA (#641): from EMA_START_FRACTION of the budget on, a running average of the latent weights, each process of those it
    updates. It replaces them at the end and is quantized as they would be: codes and scales of its own.
    """

    def __init__(self, model: GPT, take_step: TrainingStep, log: Log) -> None:
        self._cfg, self._model, self._step, self._log = model.cfg, model, take_step, log
        self._params = [p for opt in take_step.optimizers for group in opt.param_groups for p in group["params"]]
        self._shadow: list[Tensor] = []
        self._scale = take_step.grads.scale
        self._codes = self._ternary_codes() if self._cfg.churn_log_every else []

    @torch.no_grad()
    def after_step(self, step: int, progress: float) -> None:
        cfg = self._cfg
        if cfg.ema and progress >= cfg.ema_start_fraction:
            if self._shadow:
                torch._foreach_lerp_(self._shadow, self._params, 1 - cfg.ema_decay)
            else:
                self._shadow = [p.detach().clone() for p in self._params]
        if cfg.churn_log_every and (step + 1) % cfg.churn_log_every == 0:
            self._log(self._churn_line(step + 1))
        if self._step.grads.scale != self._scale:
            self._scale = self._step.grads.scale
            self._log(f"loss_scale:{self._scale:.0f} step:{step + 1}/{cfg.iterations}")

    @torch.no_grad()
    def finish(self) -> None:
        if self._shadow:
            torch._foreach_copy_(self._params, self._shadow)
            self._step.publish()

    def _ternary_codes(self) -> list[Tensor]:
        matrices = [m for m in self._model.modules() if isinstance(m, TernaryLinear)]
        return [m.stored(torch.float32).sign().to(torch.int8) for m in matrices]  # scales are positive

    def _churn_line(self, step: int) -> str:
        before, self._codes = self._codes, self._ternary_codes()
        total = sum(codes.numel() for codes in before)
        changed = sum(int((a != b).sum()) for a, b in zip(before, self._codes, strict=True))
        zeros = sum(int((codes == 0).sum()) for codes in self._codes)
        return f"churn:{changed / total:.4f} zero_frac:{zeros / total:.4f} step:{step}/{self._cfg.iterations}"


# #640's switches in the model, and parts of the published design that can be switched off


def check_optional(cfg: Config, need: Callable[[bool, str, str], None]) -> None:
    """Ranges and combinations of OptionalSettings; `need` is that of check_config."""
    window, length = cfg.attention_window, cfg.train_seq_len
    free = cfg.attention_free_layers
    need(0 <= free < cfg.num_layers, "attention_free_layers", f"0 or more, below NUM_LAYERS={cfg.num_layers}")
    divides = window == 0 or 0 < window < length and length % window == 0
    need(divides, "attention_window", f"0, or a divisor of TRAIN_SEQ_LEN={length} below it")
    for name in ("training_depth_recurrence", "eval_depth_recurrence"):
        need(0 <= getattr(cfg, name) <= 16, name, "0 to 16")
    need(not cfg.refiner or 2 <= cfg.refiner_kernel <= 64, "refiner_kernel", "2 to 64 with REFINER=1")
    need(0 <= cfg.mlp_groups <= 256, "mlp_groups", "0 to 256")
    width, group = math.gcd(cfg.model_dim, cfg.mlp_dim), cfg.bitnet_group_size if cfg.scale_group == "group" else 1
    expected = f"a divisor of {width} (MODEL_DIM and the MLP's width) that leaves multiples of BITNET_GROUP_SIZE={group}"
    need(not cfg.mlp_groups or width % (cfg.mlp_groups * group) == 0, "mlp_groups", expected)
    check_output(cfg, need)
    check_systems(cfg, need)
    if cfg.act_quant == "fp8":
        check_fp8(cfg, need)


def check_fp8(cfg: Config, need: Callable[[bool, str, str], None]) -> None:
    """What ACT_QUANT=fp8 asks for; `need` is that of check_config."""
    need(cfg.scale_storage == "e4m3", "scale_storage", "e4m3 with ACT_QUANT=fp8, which then holds the stored weights exactly")
    need(cfg.precision != "fp16", "precision", "no fp16 with ACT_QUANT=fp8: its gradients are not on a loss scale")
    need(not cfg.mlp_groups, "mlp_groups", "0 with ACT_QUANT=fp8: a part of a normalized row has no bound of its own")
    sizes = cfg.model_dim % 16 == 0 and cfg.mlp_dim % 16 == 0
    need(sizes, "model_dim", "a multiple of 16 with ACT_QUANT=fp8, like the MLP's width")
    qkv = (cfg.num_heads + 2 * cfg.num_kv_heads) * cfg.head_dim
    need(qkv % 16 == 0, "num_kv_heads", f"a fused projection of a multiple of 16 rows with ACT_QUANT=fp8, not {qkv}")


def check_output(cfg: Config, need: Callable[[bool, str, str], None]) -> None:
    """The settings of heads, ties and Tversky layers."""
    need(0 <= cfg.untie_at_fraction < 1, "untie_at_fraction", "a number in [0, 1)")
    tversky = cfg.logit_head_type == "tversky"
    if cfg.untie_at_fraction:
        need(cfg.tie_embeddings > 0, "untie_at_fraction", "0 with TIE_EMBEDDINGS=0: nothing is tied")
        need(not tversky, "untie_at_fraction", "0 with LOGIT_HEAD_TYPE=tversky: nothing is tied")
        late = not cfg.ema or cfg.ema_start_fraction >= cfg.untie_at_fraction
        need(late, "ema_start_fraction", f"at least UNTIE_AT_FRACTION={cfg.untie_at_fraction}: before it there is no head")
        need(cfg.warmup_steps != 1, "warmup_steps", "0, or at least 2 with UNTIE_AT_FRACTION: one for each output")
    normalized = cfg.act_quant != "fp8" or not tversky and cfg.attn_proj_type == "standard"
    need(normalized, "act_quant", "none with Tversky layers: prototypes are no normalized inputs")
    need(not tversky or cfg.tie_embeddings < 2, "tie_embeddings", "0 or 1 with LOGIT_HEAD_TYPE=tversky: no table is corrected")
    for name in ("embed_lr", "head_lr", "corr_weight_lr"):
        need(getattr(cfg, name) >= 0, name, "0 or more")
    need(0 <= cfg.mtp_heads <= 16, "mtp_heads", "0 to 16")
    if cfg.mtp_heads and not cfg.eval_only:
        shortest = min(seq_len for seq_len, _ in step_shapes(cfg))
        need(cfg.mtp_heads < shortest, "mtp_heads", f"fewer than the {shortest} tokens of the shortest training sequence")
    need(0 <= cfg.tversky_num_features <= 2**16, "tversky_num_features", f"0 to {2**16}")
    users = count_blocks(cfg) - cfg.attention_free_layers
    need(0 <= cfg.tversky_feature_pools <= users, "tversky_feature_pools", f"0 to {users}, the blocks with attention")
    features = cfg.tversky_num_features > 0 or cfg.tversky_feature_pools == 0
    need(features, "tversky_feature_pools", "0 with TVERSKY_NUM_FEATURES=0: prototypes are not shared")


def stored_settings(cfg: Config) -> dict[str, str]:
    """NAME -> text of what an artifact's header holds: the model's settings, those of other systems only where they differ."""
    default = {f.name.upper(): str(f.default) for f in dataclasses.fields(OptionalSettings)}
    return {name: text for name, text in exported(cfg).model_settings().items() if default.get(name) != text}


def exported(cfg: Config) -> Config:
    """The config of the model as it is stored: a run that unties ends untied."""
    return dataclasses.replace(cfg, tie_embeddings=0, untie_at_fraction=0.0) if cfg.untie_at_fraction else cfg


def saved_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Module, nn.Parameter, Role]]:
    """`parameter_owners` without what only training needs."""
    return (owner for owner in parameter_owners(model) if owner[3].storage != "none")


BANDED_ROW = 16  # windows in a row of the single pass; the first of them is context only, 6 % of the work


def banded(attend: Callable, window: int) -> Callable:
    """Attention in which every token sees itself and the `window - 1` tokens before it (Longformer, arXiv:2004.05150).

    `window` queries at a time, against their own and the `window` keys before: linear in the length, no custom kernel. A model
    trained like this is scored in a single pass over long rows, where sliding windows compute every token many times.
    """
    if not window:
        return attend

    def attend_band(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        batch, queries = q.shape[:2]
        k, v = (t[:, max(0, t.size(1) - queries - window + 1) :] for t in (k, v))
        if k.size(1) <= window:
            return attend(q, k, v)
        if queries < k.size(1) or queries % window:  # the tail of a row, or a row of odd length: one mask
            mask = torch.ones(queries, k.size(1), dtype=torch.bool, device=q.device)
            offset = k.size(1) - queries
            return attend(q, k, v, mask.tril(offset).triu(offset - window + 1))
        first = attend(q[:, :window], k[:, :window], v[:, :window])
        mask = torch.ones(window, 2 * window, dtype=torch.bool, device=q.device).tril(window).triu(1)
        blocks = [t.unfold(1, 2 * window, window).movedim(-1, 2).flatten(0, 1) for t in (k, v)]  # (B * (T / W - 1), 2 W, K, C)
        others = attend(q[:, window:].unflatten(1, (-1, window)).flatten(0, 1), *blocks, mask)
        return torch.cat((first, others.view(batch, -1, *first.shape[2:])), dim=1)

    return attend_band


def block_kind(cfg: Config, layer: int) -> type[Block]:
    """The layers without attention are those in the middle."""
    first = (cfg.num_layers - cfg.attention_free_layers) // 2
    free = first <= layer < first + cfg.attention_free_layers
    kind = AttentionFreeBlock if free else ParallelBlock if cfg.parallel_blocks else Block
    return checkpointed(kind) if cfg.gradient_checkpointing else kind


class ParallelBlock(Block):
    """Attention and MLP side by side on one normalized input (GPT-J; #1420 for the last layers): a norm and an addition less."""

    def forward(self, x: Tensor, x0: Tensor, tail: int = 0) -> Tensor:
        mix, attn_scale, mlp_scale = (as_stored(p).to(x.dtype) for p in (self.resid_mix, self.attn_scale, self.mlp_scale))
        x = mix[0] * x + mix[1] * x0 if len(mix) else x
        h = rms_norm(x)
        return self.smear(x[:, -tail:] + attn_scale * self.attention(h, tail) + mlp_scale * self.mlp(h[:, -tail:]))


class AttentionFreeBlock(Block):
    """An MLP alone: attention is half of a layer's time for a quarter of its weights (modded-nanogpt skips it in one layer)."""

    def __init__(self, cfg: Config, index: int) -> None:
        super().__init__(cfg, index)
        del self.attention, self.attn_scale

    def forward(self, x: Tensor, x0: Tensor, tail: int = 0) -> Tensor:
        mix, mlp_scale = (as_stored(p).to(x.dtype) for p in (self.resid_mix, self.mlp_scale))
        x = (mix[0] * x + mix[1] * x0 if len(mix) else x)[:, -tail:]
        return self.smear(x + mlp_scale * self.mlp(rms_norm(x)))


class BlockPass(NamedTuple):
    """One pass through a block."""

    block: int
    skip: int | None  # the row of skip_weights that weighs the popped output, which is added before the block
    pushes: bool  # whether a later pass pops the block's output


def count_skips(cfg: Config) -> int:
    """An odd number of layers makes the decoder the larger half: its last layer takes no skip."""
    return cfg.num_layers // 2 * cfg.unet


def count_blocks(cfg: Config) -> int:
    """Blocks with weights of their own; with #126's recurrence layer i passes through block i mod this."""
    return cfg.num_unique_layers or cfg.num_layers


def block_order(cfg: Config, training: bool) -> list[BlockPass]:
    """The passes of one forward pass. Depth recurrence (#640) repeats each block in a row: a skip is popped before the first
    repeat and pushed after the last."""
    repeats = (not training and cfg.eval_depth_recurrence) or max(1, cfg.training_depth_recurrence)
    n, passes, blocks = count_skips(cfg), itertools.product(range(cfg.num_layers), range(repeats)), count_blocks(cfg)
    return [BlockPass(i % blocks, i - n if r == 0 and n <= i < 2 * n else None, r == repeats - 1 and i < n) for i, r in passes]


# #640's switches in the model. Its script trained some of them in bfloat16, or not at all, or stored other weights than it had
# trained; here each is a module whose parameters have a role, so that all of them are trained and stored like the others.

ACTIVATION_INPUTS = {"swiglu": 2}  # channels that an activation reads for one that it writes


def swiglu(x: Tensor) -> Tensor:
    """arXiv:2002.05202; the first half of the channels is the gate."""
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


OTHER_ACTIVATIONS = {"relu": F.relu, "leaky_relu": F.leaky_relu, "gelu": F.gelu, "swiglu": swiglu}


def mlp_kind(cfg: Config) -> type[nn.Module]:
    return GroupedMLP if cfg.mlp_groups else MLP


class GroupedMLP(nn.Module):
    """Independent MLPs, each on its share of the channels: a block-diagonal MLP with 1/groups of the weights."""

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        self.groups = nn.ModuleList(MLP(cfg, cfg.mlp_groups) for _ in range(cfg.mlp_groups))

    def forward(self, x: Tensor) -> Tensor:
        parts = x.chunk(len(self.groups), dim=-1)
        return torch.cat([mlp(part) for mlp, part in zip(self.groups, parts, strict=True)], dim=-1)


def attention_kind(cfg: Config, index: int) -> type[Attention]:
    last = index >= count_blocks(cfg) - cfg.xsa_last_n
    return DifferentialAttention if cfg.diff_attn else ExclusiveAttention if last else Attention


class DifferentialAttention(Attention):
    """#640's: two attentions on halves of every head, their difference and their sum side by side. Not the published
    Differential Transformer, which learns lambda and normalizes (arXiv:2410.05258)."""

    LAMBDA = 0.5

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        halves = zip(*(t.chunk(2, dim=-1) for t in (q, k, v)), strict=True)
        a, b = (super(DifferentialAttention, self).mix(*half) for half in halves)
        return torch.cat((a - self.LAMBDA * b, a + self.LAMBDA * b), dim=-1)


def table_kind(cfg: Config) -> type[Table]:
    return BigramTable if cfg.bigram_hash else Table


class BigramTable(Table):
    """A second table (V, E) for the token before, added to the row of the token itself (BIGRAM_HASH: nothing is hashed)."""

    def __init__(self, vocab_size: int, dim: int, fp_storage: str, init_std: float) -> None:
        super().__init__(vocab_size, dim, fp_storage, init_std)
        self.previous = Table(vocab_size, dim, fp_storage, 0.0)

    def rows(self, idx: Tensor, dtype: torch.dtype) -> Tensor:
        before = F.pad(idx[:, :-1], (1, 0))  # token 0 stands before the window
        return super().rows(idx, dtype) + self.previous.rows(before, dtype)


class Smear(nn.Module):
    """x + tanh(gate) * (mean of all positions up to this one - x), a gate a channel; sums in float32."""

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.zeros(cfg.model_dim))

    def forward(self, x: Tensor) -> Tensor:
        count = torch.arange(1, x.size(1) + 1, device=x.device)[:, None]
        mean = (x.float().cumsum(1) / count).to(x.dtype)
        return x + as_stored(self.gate).tanh().to(x.dtype) * (mean - x)


class Refiner(nn.Module):
    """x + tanh(gate) * rms_norm(causal convolution over the last `refiner_kernel` positions), all channels by all channels.

    The convolution is one ternary matrix (D, kernel * D) on shifted copies of x, the oldest first.
    """

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        self.kernel = cfg.refiner_kernel
        self.conv = matrix(self.kernel * cfg.model_dim, [cfg.model_dim], cfg)
        self.gate = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        padded = F.pad(x, (0, 0, self.kernel - 1, 0))
        shifted = torch.cat([padded[:, i : i + x.size(1)] for i in range(self.kernel)], dim=-1)
        return x + as_stored(self.gate).tanh().to(x.dtype) * rms_norm(self.conv(shifted))


# Output: TIE_EMBEDDINGS, UNTIE_AT_FRACTION, MTP_HEADS. An output table has `weight` and `stored`, as QuantizedLinear.


class OutputHead(Table):
    """Logits straight from the hidden states: (V, D), 0 at first."""

    role = Role("head", "table")

    def __init__(self, cfg: Config) -> None:
        super().__init__(cfg.vocab_size, cfg.model_dim, cfg.fp_storage, 0.0)


class FutureHead(OutputHead):
    """A head of MTP_HEADS; never stored, so never rounded."""

    role = Role("head", "none")

    def rounded(self) -> Tensor:
        return self.weight.detach()


class Correction(Table):
    role = Role("correction", "table")


def output_rates(cfg: Config) -> dict[str, float]:
    """Learning rates by role; an untied table takes EMBED_LR."""
    return {"head": cfg.head_lr, "correction": cfg.corr_weight_lr} | ({} if cfg.tie_embeddings else {"table": cfg.embed_lr})


def unsaved(module: nn.Module) -> nn.Module:
    """The module, left out of the artifact."""
    module.role = module.role._replace(storage="none")
    return module


def projection_kind(cfg: Config) -> Callable[[int, int, str], nn.Module]:
    """What leads from the hidden states to the output table."""
    if cfg.tie_embeddings == 0 or cfg.logit_head_type == "tversky":
        return nn.Identity
    return (lambda *sizes: unsaved(UntyingProjection(*sizes))) if cfg.untie_at_fraction else TableProjection


def output_table(cfg: Config, table: Table) -> nn.Module:
    if cfg.logit_head_type == "tversky":
        return Tversky(cfg, cfg.vocab_size, cfg.tversky_num_features)
    if cfg.tie_embeddings == 0:
        return OutputHead(cfg)
    tied = CorrectedTable(cfg, table) if cfg.tie_embeddings == 2 else table
    return UntyingOutput(cfg, tied) if cfg.untie_at_fraction else tied


class CorrectedTable(nn.Module):
    """The embedding table and a correction, 0 at first, that the output alone sees."""

    def __init__(self, cfg: Config, table: Table) -> None:
        super().__init__()
        self.table, self.correction = table, Correction(*table.weight.shape, cfg.fp_storage, 0.0)
        self.correction = unsaved(self.correction) if cfg.untie_at_fraction else self.correction

    @property
    def weight(self) -> Tensor:
        return self.table.weight + self.correction.weight

    def stored(self, dtype: torch.dtype) -> Tensor:
        return self.table.stored(dtype) + self.correction.stored(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return StoredMatmul.apply(x, self.weight, self.stored(x.dtype))


class UntyingProjection(TableProjection):
    """`embed_out` until the output is untied, nothing from then on."""

    untied = False

    def forward(self, x: Tensor) -> Tensor:
        return x if self.untied else super().forward(x)


class UntyingOutput(nn.Module):
    """A tied output table, then a head that starts as the product of table and `embed_out`.

    Both are trained parameters from the first step on, so that nothing has to be built or reduced anew at the switch: without
    gradients, Adam leaves the head at 0.
    """

    untied = False

    def __init__(self, cfg: Config, tied: nn.Module) -> None:
        super().__init__()
        self.tied, self.head = tied, OutputHead(cfg)

    @property
    def weight(self) -> Tensor:
        return self.head.weight if self.untied else self.tied.weight

    def stored(self, dtype: torch.dtype) -> Tensor:
        return (self.head if self.untied else self.tied).stored(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return (self.head if self.untied else self.tied)(x)


@torch.no_grad()
def untie_when_due(model: GPT, progress: float) -> None:
    """UNTIE_AT_FRACTION: tied before that progress; at it, the head starts as the tied output is, latent weights as they are."""
    due = progress >= model.cfg.untie_at_fraction > 0
    for module in model.modules():
        if isinstance(module, (UntyingProjection, UntyingOutput)) and module.untied != due:
            module.untied = due
            if due and isinstance(module, UntyingOutput):
                tied, head = module.tied.weight, module.head
                head.weight.copy_(tied @ model.embed_out.weight if model.cfg.embed_dim else tied)
                if head.operand is not None:
                    head.keep_rounded(head.operand.dtype)


def loss_kind(cfg: Config) -> Callable[..., tuple[Tensor, Tensor]]:
    return mtp_training_loss if cfg.mtp_heads else training_loss


def mtp_training_loss(model: GPT, x: Tensor, y: Tensor, z_loss: float) -> tuple[Tensor, Tensor]:
    """`training_loss` and a tenth of the heads' mean cross entropy: head k, from 1, predicts the target k positions on."""
    h = model.hidden(x, training=True)
    loss, nats = training_loss(model, x, y, z_loss, h)
    future = [token_nats(head(h[:, :-k]).float(), y[:, k:])[0].mean() for k, head in enumerate(model.mtp_heads, 1)]
    return loss + 0.1 * x.numel() * torch.stack(future).mean(), nats


# Tversky layers

MEMBERSHIPS = {"sigmoid": lambda t: torch.sigmoid(5 * t), "poly": lambda t: (1.25 * t + 0.5).clamp(0, 1),
               "tanh": lambda t: (torch.tanh(5 * t) + 1) / 2}


class Tversky(nn.Module):
    """Similarity (Tversky 1977, as in #640) of x to `out_dim` ternary prototypes, by what they have in common and what not.

    f are the products of x, or of a prototype, with the features, m(f) their membership and a = f * m(f):
    theta a_x a_p - alpha a_x (1 - m_p) - beta (1 - m_x) a_p, summed over the n features. #640's sum is divided by sqrt(n) here.
    Without that its head of 8192 prototypes starts with every logit between -210 and -280, far beyond the softcap, where the
    gradient is 0: it stayed at ln 8192. With it they start near -2.4.
    """

    def __init__(self, cfg: Config, out_dim: int, features: int) -> None:
        super().__init__()
        self.prototypes = TernaryLinear(cfg.model_dim, out_dim, cfg)
        self.features = TableProjection(cfg.model_dim, features, cfg.fp_storage) if features else nn.Identity()
        self.weights = nn.Parameter(torch.tensor([1.0, 0.5, 0.5]))  # theta, alpha, beta; their magnitudes count
        self.membership = MEMBERSHIPS[cfg.tversky_membership]

    def forward(self, x: Tensor) -> Tensor:
        p = StraightThrough.apply(self.prototypes.weight, self.prototypes.stored(x.dtype))
        features = self.prototypes if isinstance(self.features, nn.Identity) else self.features
        f_x, f_p = features(x), features(p)  # (..., n), (out, n)
        m_x, m_p = self.membership(f_x), self.membership(f_p)
        a_x, a_p = f_x * m_x, f_p * m_p
        theta, alpha, beta = (as_stored(self.weights).abs() / f_p.size(-1) ** 0.5).to(x.dtype)
        return a_x @ (theta * a_p - alpha * (1 - m_p)).T - (1 - m_x) @ (beta * a_p).T


def attention_output(cfg: Config) -> nn.Module | None:
    own = 0 if cfg.tversky_feature_pools else cfg.tversky_num_features
    return Tversky(cfg, cfg.model_dim, own) if cfg.attn_proj_type == "tversky" else None


def share_features(blocks: nn.ModuleList, cfg: Config) -> nn.ModuleList:
    """TVERSKY_FEATURE_POOLS: the blocks with attention take the pools in turn."""
    if cfg.attn_proj_type == "tversky" and cfg.tversky_feature_pools:
        sizes = cfg.model_dim, cfg.tversky_num_features, cfg.fp_storage
        pools = [TableProjection(*sizes) for _ in range(cfg.tversky_feature_pools)]
        for layer, pool in zip((m for m in blocks.modules() if isinstance(m, Tversky)), itertools.cycle(pools), strict=False):
            layer.features = pool
    return blocks


# Model and storage of #139 and #367 (ksang123), #126 (Athenox14), #435 (rthgit) and #641


def check_systems(cfg: Config, need: Callable[[bool, str, str], None]) -> None:
    """Ranges and combinations of these settings."""
    for name in ("mlp_hidden", "xsa_last_n", "num_unique_layers", "ternary_commit_lambda"):
        need(getattr(cfg, name) >= 0, name, "0 or more")
    need(cfg.mlp_hidden <= 2**20 and cfg.mlp_hidden % 4 == 0, "mlp_hidden", f"a multiple of 4, at most {2**20}")
    need(cfg.recurrence_factor >= 1, "recurrence_factor", "at least 1")
    need(cfg.num_unique_layers or cfg.recurrence_factor == 1, "recurrence_factor", "1, or NUM_UNIQUE_LAYERS above 0")
    passes = count_blocks(cfg) * cfg.recurrence_factor
    expected = f"{passes} passes = NUM_UNIQUE_LAYERS={cfg.num_unique_layers} x RECURRENCE_FACTOR={cfg.recurrence_factor}"
    need(passes == cfg.num_layers, "num_layers", expected)
    free = cfg.num_unique_layers and cfg.attention_free_layers
    need(not free, "num_unique_layers", "0 with ATTENTION_FREE_LAYERS, which counts layers of its own")
    need(cfg.xsa_last_n <= count_blocks(cfg), "xsa_last_n", f"at most the {count_blocks(cfg)} blocks")
    need(not cfg.xsa_last_n or not cfg.diff_attn, "xsa_last_n", "0 with DIFF_ATTN=1, whose halves of a head have other values")
    need(1 <= cfg.radial_bits <= 20, "radial_bits", "1 to 20")
    need(0 < cfg.radial_alpha <= 1e3, "radial_alpha", "a number in (0, 1000]")
    need(not cfg.ntk_rope or cfg.position == "rope", "ntk_rope", f"0 with POSITION={cfg.position}")
    need(not cfg.ntk_rope or cfg.rope_type == "rope", "ntk_rope", "0, or ROPE_TYPE=rope: YaRN changes the spectrum another way")
    need(not cfg.ntk_rope or cfg.head_dim > 2, "ntk_rope", "0 with a head of 2 channels")
    quantized, standard = cfg.weight_quant != "none", cfg.attn_proj_type == cfg.logit_head_type == "standard"
    need(quantized or not cfg.ternary_commit_lambda, "ternary_commit_lambda", "0 with WEIGHT_QUANT=none, which has no codes")
    need(quantized or standard, "weight_quant", "not none with Tversky layers, whose prototypes are quantized")
    fits = quantized and cfg.input_norm != "none" and (not cfg.qkv_split or cfg.num_kv_heads * cfg.head_dim % 16 == 0)
    need(cfg.act_quant != "fp8" or fits, "act_quant", "no fp8 without codes, normalized inputs and multiples of 16 rows")
    need(not cfg.attention_window or cfg.position != "radial", "position", "no radial with ATTENTION_WINDOW: rows are longer")
    plain = cfg.scale_stat != "lstsq" and cfg.ternary_threshold == 0.5
    need(cfg.weight_quant != "binary" or plain, "weight_quant", "ternary with SCALE_STAT=lstsq or a TERNARY_THRESHOLD")
    if PUBLISHED.get(cfg.artifact_codec, ("", ""))[1] == "zstd":
        zstandard_module(f"ARTIFACT_CODEC={cfg.artifact_codec!r}")


class HalfLinear(TableProjection):
    """No quantization but float16's, which it is stored in."""

    def __init__(self, in_dim: int, out_dim: int, cfg: Config, init_std: float) -> None:  # noqa: ARG002
        super().__init__(in_dim, out_dim, "FP16")
        nn.init.normal_(self.weight, std=init_std) if init_std else nn.init.zeros_(self.weight)


class SideBySide(nn.Module):
    """Matrices with one input, their outputs joined: the function of one matrix, each with its own optimizer step."""

    def __init__(self, parts: list[nn.Module]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([part(x) for part in self.parts], dim=-1)


def matrix(in_dim: int, out_dims: list[int], cfg: Config, init_std: float = 0.02) -> nn.Module:
    """A matrix of a block, (sum of out_dims, in_dim), and what happens to its input first."""
    if cfg.qkv_split and len(out_dims) > 1:
        return SideBySide([matrix(in_dim, [n], cfg, init_std) for n in out_dims])
    linear = (HalfLinear if cfg.weight_quant == "none" else TernaryLinear)(in_dim, sum(out_dims), cfg, init_std)
    steps = [InputNorm()] * (cfg.input_norm == "all") + [Int8Input()] * (cfg.act_quant == "int8")
    linear.prepare = nn.Sequential(*steps) if steps else linear.prepare
    return linear


class InputNorm(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x)


class Int8Input(nn.Module):
    """Each token's channels on the 255 levels -127..127 of its largest magnitude (#126), the gradient straight through."""

    def forward(self, x: Tensor) -> Tensor:
        level = x.detach().float().abs().amax(-1, keepdim=True).clamp_min(1e-8) / 127
        return StraightThrough.apply(x, ((x.detach() / level).round().clamp(-127, 127) * level).to(x.dtype))


def output_norm(cfg: Config) -> Callable[[Tensor], Tensor]:
    """What stands before the two output matrices of a block. INPUT_NORM=all has it in `prepare` of every matrix instead."""
    return rms_norm if cfg.input_norm == "outputs" else nn.Identity()


class ExclusiveAttention(Attention):
    """XSA (#367): the part of each head's output along the value of its own token is taken out."""

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        y = super().mix(q, k, v).unflatten(2, (v.size(2), -1))  # (B, T, K, H/K, C)
        own = F.normalize(v[:, -y.size(1) :], dim=-1).unsqueeze(3)
        return (y - (y * own).sum(-1, keepdim=True) * own).flatten(2, 3)


@functools.cache
def checkpointed(kind: type[Block]) -> type[Block]:
    """A block that keeps its input alone for the backward pass and computes the rest again."""
    from torch.utils.checkpoint import checkpoint

    class Checkpointed(kind):
        def forward(self, x: Tensor, x0: Tensor, tail: int = 0) -> Tensor:
            return checkpoint(super().forward, x, x0, tail, use_reentrant=False, preserve_rng_state=False)

    return Checkpointed


def rotary_kind(cfg: Config) -> type[nn.Module]:
    if cfg.position != "rope":
        return nn.Identity
    return NTKRotary if cfg.ntk_rope else Rotary


class NTKRotary(Rotary):
    """Rotary whose base follows the length of a training sequence (#126): base * (T / train_seq_len)^(C / (C - 2)) below it.

    Only while gradients are recorded: evaluation has the full base, whatever its windows' length.
    """

    def __init__(self, cfg: Config) -> None:
        super().__init__(cfg)
        self.cfg = cfg

    def forward(self, x: Tensor) -> Tensor:
        cfg, length = self.cfg, x.size(1)
        if not torch.is_grad_enabled() or length >= cfg.train_seq_len:
            return super().forward(x)
        base = cfg.rope_base * (length / cfg.train_seq_len) ** (cfg.head_dim / (cfg.head_dim - 2))
        i = torch.arange(0, cfg.head_dim, 2, dtype=torch.float64, device=x.device) / cfg.head_dim
        angle = torch.outer(torch.arange(length, dtype=torch.float64, device=x.device), base**-i)[:, None]
        return super().forward(x, (angle.cos(), angle.sin()))


class RadialEncoding(nn.Module):
    """Positions as points of a golden spiral (#435), through a matrix (4, D), added to the normalized embedding.

    Bit i of a position is a vector of length alpha * phi^i at the angle 2 pi i / bits; the features are real and imaginary part,
    magnitude and angle of the vectors' sum z. A position has no bits beyond `radial_bits`: with #435's 8, positions 256 apart
    are the same to the model, as they were to it.
    """

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        i = torch.arange(cfg.radial_bits)
        bits = (torch.arange(cfg.train_seq_len)[:, None] >> i & 1).double()
        length, angle = cfg.radial_alpha * ((1 + 5**0.5) / 2) ** i.double(), 2 * math.pi * i.double() / cfg.radial_bits
        z = torch.complex(bits @ (length * angle.cos()), bits @ (length * angle.sin()))
        features = torch.stack((z.real, z.imag, z.abs(), z.angle()), -1).float()  # (T, 4)
        self.register_buffer("features", features, persistent=False)
        self.weight = nn.Parameter(torch.empty(cfg.model_dim, 4))
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))  # as torch.nn.Linear

    def forward(self, x: Tensor) -> Tensor:
        return x + F.linear(self.features[: x.size(1)], as_stored(self.weight)).to(x.dtype)


def gradients_kind(cfg: Config) -> type[Gradients]:
    return CommittedGradients if cfg.ternary_commit_lambda else Gradients


class CommittedGradients(Gradients):
    """With the gradient of #126's commitment loss: lambda * sum over matrices of mean((w / alpha - code)^2).

    Once a step, after the sum over the processes, each in its own shards. alpha is a group's scale before it is rounded; it is
    differentiated, as in #126: the pull changes the shape of a group's weights and not their size.
    """

    def __init__(self, model: GPT, world: World) -> None:
        super().__init__(model, world)
        self._weight = model.cfg.ternary_commit_lambda

    def compute(self, loss_function: Callable, x: Tensor, y: Tensor, micro_batches: int) -> None:
        super().compute(loss_function, x, y, micro_batches)
        for bank in self.banks:
            if bank.modules[0].role.storage == "ternary":
                (self._weight * self.scale * commitment(bank.shard, *bank.modules[0].format)).backward()


def commitment(w: Tensor, group_size: int, form: ScaleFormat) -> Tensor:
    """Mean squared distance of latent weights, in units of their scale, from their codes: w (n, rows, columns), summed over n."""
    codes, groups = ternarize(w.detach(), group_size, form)[0], w.view(-1, group_size)
    if form.stat == "rms":
        alpha = groups.square().mean(-1, keepdim=True).clamp_min(1e-16).sqrt()
    else:
        alpha = groups.abs().mean(-1, keepdim=True).clamp_min(1e-8)
    return (groups / alpha - codes).square().sum() * len(w) / w.numel()


# ---- 14 Main ---------------------------------------------------------------------------------------------------------


def train_and_export(cfg: Config, world: World, log: Log, val: ValidationSet) -> tuple[bytes, dict[str, Any]]:
    """Train, score the model as it is, and turn it into bytes; the trained model ends here."""
    torch.manual_seed(cfg.seed)
    model = GPT(cfg).to(world.device)
    micro_batches, _ = batch_layout(cfg, world.size)
    log(f"params:{count_parameters(model)[0]} L:{cfg.num_layers} d:{cfg.model_dim} h:{cfg.num_heads} kv:{cfg.num_kv_heads} "
        f"ws:{world.size} ga:{micro_batches} s:{cfg.seed}")
    run = train(model, cfg, world, log, val)
    with rounded_once(model):
        scores = evaluate(model, val, cfg, world, cfg.train_seq_len)
    run |= {"val_loss": scores[0], "val_bpb": scores[1], "zero_frac": zero_fraction(model)}
    log(f"{validation_line(cfg, run['steps'], scores, run['train_time_s'])} zero_frac:{run['zero_frac']:.3f}")
    clock = Clock(world)
    blob = b""
    if world.is_main:
        blob = save_artifact(model, cfg)
        write_whole(cfg.artifact_path, blob)
    blob = world.share_bytes(blob)
    return blob, run | log_artifact(blob, model, log) | {"export_time_s": clock.finish()}


def artifact_config(cfg: Config, artifact_cfg: Config) -> Config:
    """The environment's config with the artifact's model settings; UserError where the environment asks for another model."""
    own, default, stored = exported(cfg).model_settings(), Config().model_settings(), artifact_cfg.model_settings()
    for name in own:
        if own[name] != stored[name] and own[name] != default[name]:
            raise UserError(f"{name}={own[name]}, but the model in ARTIFACT_PATH={cfg.artifact_path!r} has {name}={stored[name]}")
    return dataclasses.replace(exported(cfg), **{name.lower(): getattr(artifact_cfg, name.lower()) for name in own})


def read_artifact(cfg: Config) -> tuple[bytes, Config]:
    """EVAL_ONLY: the artifact's bytes, and the config with its model settings."""
    path = Path(cfg.artifact_path)
    if not path.is_file():
        raise FileNotFoundError(f"ARTIFACT_PATH={cfg.artifact_path!r}: no such file; EVAL_ONLY=1 needs an artifact")
    blob = path.read_bytes()
    return blob, artifact_config(cfg, read_container(blob).cfg)


def main() -> None:
    cfg = Config.from_env()
    blob, cfg = read_artifact(cfg) if cfg.eval_only else (b"", cfg)
    world = World.from_env()
    if not cfg.eval_only:
        check_layouts(cfg, world.size)
        check_writable(cfg.artifact_path)
    val = ValidationSet.load(cfg, world)
    log = Log(cfg, world)
    log_start(cfg, world, log)
    result = {"run_id": cfg.run_id, "seed": cfg.seed}
    with attention_backends(world.device):
        if not cfg.eval_only:
            blob, run = train_and_export(cfg, world, log, val)
            result |= run
        model, _ = load_artifact(blob, cfg.precision)  # from here on, only what the bytes hold
        with rounded_once(model.to(world.device)):
            result |= score_artifact(model, val, cfg, world, log)
    result |= {"device": world.device.type, "world_size": world.size, "gpu_name": gpu_name(world),
               "torch_version": torch.__version__, "git_commit": git_commit()}
    log("result " + json.dumps(result))
    world.close()


def run() -> int:
    """main() with a user's errors as one line on stderr and exit code 2."""
    try:
        main()
    except (UserError, OSError) as error:
        if World.speaks():
            print("\r\x1b[K" * sys.stderr.isatty() + f"train_gpt.py: {error}", file=sys.stderr)
        else:
            time.sleep(3)  # torchrun ends every process with the first one that fails: rank 0 must be heard before
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(run())
