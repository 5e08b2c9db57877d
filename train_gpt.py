"""Train a ternary GPT for OpenAI's Parameter Golf: 600 s on 8xH100, 16,000,000 bytes of code and weights, bits per
byte.

The default is the system of pull request #640 (BitNet b1.58 weights in {-1, 0, 1}, U-Net transformer, NeoMuon) with a
better recipe and without the defects of its script. Not yet run on 8xH100: RESULTS.md says what was measured where.

    torchrun --standalone --nproc_per_node=8 train_gpt.py          the submission: the defaults are the record run
    NUM_LAYERS=4 MAX_WALLCLOCK_SECONDS=60 python train_gpt.py      one process (GPU or CPU); every setting is a variable
    EVAL_ONLY=1 ARTIFACT_PATH=model.ptz python train_gpt.py        score an artifact from its bytes alone
    python train_gpt.py --help                                     every setting with default, range and meaning

The file reads in the order the data flows:
    1 Config    2 Runtime    3 Data    4 Ternary format    5 Model    6 Optimizer    7 Training    8 Artifact
    9 Evaluation    10 Report    11 Hardware    12 Options    13 Main
The default run meets 11 and 12 in three places: `Ops`, how a model is computed (plainly in 5, faster in 11), `Parts`,
what it is made of, and `Hook`, what happens around a step (by default nothing); besides, 11 has the `Machine` and the
banks of matrices that the optimizer works on, and 12 the codecs of the artifact and who follows a run (`View`).

Shapes: B sequences, T tokens, D model_dim, E embed_dim, H query heads, K key/value heads, C head_dim, V vocabulary, G
weights that share a scale. Units are suffixes (_s, _bytes, _tokens, _frac); losses are nats per token; bits per byte
(bpb) are nats / ln 2 / UTF-8 bytes of the text.

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
import errno
import fcntl
import functools
import hashlib
import io
import itertools
import json
import lzma
import math
import operator
import os
import platform
import re
import resource
import shutil
import signal
import stat
import struct
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple, get_args, get_origin, get_type_hints

if __name__ == "__main__":
    # Threads that wait sleep. GNU OpenMP, loaded with torch, lets them spin: on cores shared with other work a step of
    # .66 s took 2.6 s (R017).
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.adamw import adamw

BUDGET_BYTES = 16_000_000  # decimal; code and artifact together

class UserError(ValueError):
    """Something a user can set or supply wrongly; the text names the setting, its value and what was expected."""


# ---- 1 Config --------------------------------------------------------------------------------------------------------
# Environment in, one frozen object out. A setting is the field's name in upper case, no exceptions; names are #640's.

def setting(default: Any, meaning: str, *, group: str = "", model: bool = False, of: str = "", **limits: float) -> Any:
    """A field of Config. `model`: it defines the model, so the artifact holds it. `of`: the system it comes from.

    limits: least, most (allowed themselves), above, below (not). `group` begins a group of --help.
    """
    metadata = {"meaning": meaning, "group": group, "model": model, "of": of, "limits": limits}
    return field(**{"default_factory" if callable(default) else "default": default}, metadata=metadata)

@dataclass(frozen=True, kw_only=True)
class Settings:
    """The default system's settings: the defaults are the submission. `OptionSettings` (section 12) adds the others."""

    run_id: str = setting(lambda: time.strftime("run_%Y%m%d_%H%M%S"), "name of the run and of its log", group="Run")
    seed: int = setting(42, "of the initial weights", least=0, most=2**63 - 1)
    data_path: str = setting("./data/datasets/fineweb10B_sp8192", "folder of fineweb_train_*.bin, fineweb_val_*.bin")
    tokenizer_path: str = setting("./data/tokenizers/fineweb_8192_bpe.model", "SentencePiece model")
    artifact_path: str = setting("final_model.ternary.ptz", "file that the model is written to, or read from")
    log_dir: str = setting("logs", "folder of the log, <RUN_ID>.txt")
    eval_only: bool = setting(False, "score the artifact at ARTIFACT_PATH; train nothing")
    precision: Literal["auto", "fp32", "bf16", "fp16"] = setting("auto", "auto: bf16 where a GPU has it")
    compile_mode: Literal["default", "none", "training", "reduce-overhead", "max-autotune",
                          "max-autotune-no-cudagraphs"] = setting(
        "default", "of torch.compile, on a GPU; training: not the score")  # fmt: skip
    kernels: str = setting("auto", "fast operations: auto: what passes the self-check; off; or names: loss,qk,mlp")
    kernels_strict: bool = setting(False, "a fast operation that fails the self-check ends the run")

    # 599 leaves 1 s for the step that is under way at the end
    max_wallclock_seconds: float = setting(599.0, "of training; 0: no cap", least=0, group="Budget: what ends first")
    iterations: int = setting(20_000, "steps of training", least=1)
    warmup_steps: int = setting(5, "untimed steps that compile every shape; weights are restored", least=0)

    vocab_size: int = setting(8192, "pieces of the tokenizer", model=True, least=1, most=2**16, group="Model")
    num_layers: int = setting(10, "blocks", model=True, least=1, most=256)
    model_dim: int = setting(768, "channels of the residual stream", model=True, least=1, most=2**16)
    num_heads: int = setting(8, "query heads", model=True, least=1)
    num_kv_heads: int = setting(4, "heads of keys and values", model=True, least=1)
    mlp_mult: int = setting(4, "width of the MLP, in MODEL_DIM", model=True, least=1, most=64)
    # #640 has 254: the entropy coder and the narrower FP_STORAGE make room for more. A multiple of 8: rows of 16 bytes
    embed_dim: int = setting(440, "channels of the embedding; 0: MODEL_DIM", model=True, least=0, most=2**16)
    smear_gate: bool = setting(True, "each token's embedding takes up a share of the one before", model=True)
    key_offset: bool = setting(True, "half of each key's channels are those of the token before", model=True)
    activation: Literal["relu2", "relu", "leaky_relu", "leaky_relu2", "gelu", "swiglu"] = setting(
        "relu2", "of the MLP", model=True)  # fmt: skip
    qk_gain_init: float = setting(2.25, "initial gain of each query head", least=0)
    tied_embed_init_std: float = setting(0.005, "standard deviation of the initial embedding table", least=0)
    logit_softcap: float = setting(10.0, "bound of a logit's magnitude", model=True, above=0)
    softcap_type: Literal["poly", "tanh"] = setting("poly", "function that bounds logits", model=True)
    rope_type: Literal["yarn", "rope"] = setting("yarn", "spectrum of the rotary embedding", model=True)
    rope_base: float = setting(5000.0, "of the rotary frequencies", model=True, above=0)
    yarn_max_len: int = setting(2048, "low frequencies are divided by up to this / TRAIN_SEQ_LEN", model=True, least=1)

    bitnet_group_size: int = setting(128, "weights that share a scale", model=True, least=1, group="Weights")
    scale_group: Literal["group", "row", "tensor"] = setting("group", "what shares a scale", model=True)
    scale_stat: Literal["absmean", "rms", "lstsq"] = setting("absmean", "what a scale is computed as", model=True)
    scale_storage: Literal["e4m3", "fp16", "bf16"] = setting("e4m3", "how a scale is stored", model=True)
    ternary_threshold: float = setting(0.5, "share of the scale below which codes are 0", model=True, least=0, most=2)
    fp_storage: Literal["FP8", "FP16", "FP4", "INT6", "INT5", "INT4"] = setting(
        "INT5", "of the embedding table and its projections; INTb: about b bits each", model=True)  # fmt: skip

    train_batch_tokens: int = setting(524_288, "tokens of a step, over all processes", least=1, group="Data")
    train_seq_len: int = setting(1024, "tokens of a sequence", model=True, least=1, most=2**20)
    micro_batch_tokens: int = setting(65_536, "tokens of a process's largest forward pass", least=1)

    matrix_optimizer: Literal[
        "neomuon", "muon", "muon_plain", "normuon", "normuon126", "adamw", "fro", "fro_stable"
    ] = setting("neomuon", "muon: #640's name of neomuon; Muon itself: muon_plain", group="Optimizer")
    matrix_lr: float = setting(0.04, "learning rate of the matrices", least=0)
    scalar_lr: float = setting(0.02, "learning rate of the controls: gains, scales, biases, mixes", least=0)
    tied_embed_lr: float = setting(0.02, "learning rate of the tied embedding table", least=0)
    muon_momentum: float = setting(0.95, "momentum of the matrices", least=0, below=1)
    muon_momentum_warmup_start: float = setting(0.85, "its first value", least=0, below=1)
    muon_momentum_warmup_steps: int = setting(500, "steps from the first value to the last", least=0)
    # 3 reach the loss of 5 at 600 s, 5.7 ms a step faster (#640)
    muon_backend_steps: int = setting(3, "Newton-Schulz iterations", least=1)
    muon_wd: float = setting(0.0025, "weight decay of the matrices, unless MATRIX_OPTIMIZER=adamw", least=0)
    beta1: float = setting(0.9, "of Adam", least=0, below=1)
    beta2: float = setting(0.95, "of Adam", least=0, below=1)
    adam_eps: float = setting(1e-8, "of Adam", above=0)
    warmdown_fraction: float = setting(0.6, "last part of the budget, where rates fall linearly to 0", least=0, most=1)
    z_loss: float = setting(1e-4, "weight of the squared log-sum-exp, in training only", least=0)

    train_log_every: int = setting(0, "steps between two log lines; 0: 5 seconds", least=0, group="Log and evaluation")
    val_loss_every: int = setting(0, "steps between two validations on the way; 0: none", least=0)
    val_batch_size: int = setting(524_288, "tokens that all processes score at a time, chunked", least=1)
    val_max_tokens: int = setting(0, "targets that are scored; 0: the whole validation split", least=0)
    sliding_eval: bool = setting(True, "score sliding windows too")
    sliding_eval_stride: int = setting(16, "targets between two windows", least=1)
    sliding_batch_size: int = setting(256, "windows a process scores at a time, as MICRO_BATCH_TOKENS allows", least=1)
    temp_scaling: bool = setting(True, "fit the temperature of the sliding score on training tokens")
    artifact_codec: Literal["auto", "ans", "base3", "bitmask", "2bit", "int8",
                            "base3_zstd", "bitmask_zstd", "2bit_zstd", "int8_zstd"] = setting(
        "auto", "auto: the smallest of ans, base3, bitmask")  # fmt: skip

    @property
    def head_dim(self) -> int:
        return self.model_dim // self.num_heads

    @property
    def mlp_dim(self) -> int:
        return self.mlp_mult * self.model_dim

    @property
    def score_window(self) -> int:
        """Tokens of a window of the sliding score."""
        return self.train_seq_len

    @property
    def score_stride(self) -> int:
        return self.sliding_eval_stride

    def step_shapes(self) -> list[tuple[int, int]]:
        """(seq_len, batch_tokens) of every shape that training uses, the largest first."""
        return [(self.train_seq_len, self.train_batch_tokens)]

    def exported(self) -> Config:
        """The config of the model as it is stored."""
        return self

    def model_settings(self) -> dict[str, str]:
        """NAME -> text of every setting that defines the model, options first."""
        own = sorted(dataclasses.fields(self), key=lambda f: f.name in Settings.__dataclass_fields__)
        return {f.name.upper(): str(getattr(self, f.name)) for f in own if f.metadata["model"]}

    def stored_settings(self) -> dict[str, str]:
        """What an artifact's header holds: the exported model's settings, those of options only where they are on."""
        options = [f for f in dataclasses.fields(self) if f.name not in Settings.__dataclass_fields__]
        off = UNSAID | {f.name.upper(): str(f.default) for f in options}
        return {name: text for name, text in self.exported().model_settings().items() if off.get(name) != text}

    @classmethod
    def from_env(cls, env: Mapping[str, str] = os.environ) -> Config:
        """Read overrides from the environment. UserError for a bad value, a near-miss of a name, or a name by which
        another script of this field has a setting."""
        names = {f.name.upper(): f.name for f in dataclasses.fields(cls)}
        for key in sorted(env.keys() - names.keys() - ORDINARY.keys()):
            # cutoff .85 catches 97-99 % of one-slip typos without alarming on the names usual environments hold
            close = [FOREIGN[key]] if key in FOREIGN else difflib.get_close_matches(key, names, n=1, cutoff=0.85)
            if close:
                raise UserError(f"{key}={env[key]!r} is not a setting; {meant(close[0])}")
        kinds = setting_kinds(cls)
        return cls(**{name: parse_setting(key, env[key], kinds[name]) for key, name in names.items() if key in env})

    def __post_init__(self) -> None:
        """Every value within its limits, then the rules between settings; UserError names setting and value."""
        for f in dataclasses.fields(self):
            value, limits = getattr(self, f.name), f.metadata["limits"]
            if not all(WITHIN[limit](value, bound) for limit, bound in limits.items()):
                raise UserError(f"{f.name.upper()}={value!r}: expected {range_text(limits)}")
        for name, kept, expected in RULES:
            if not kept(self):
                raise UserError(f"{name.upper()}={getattr(self, name)!r}: expected {named(expected, self)}")

# What artifacts and checkpoints mean that do not say it, for ever, since the setting came later than the first of them
UNSAID = {"SMEAR_GATE": "False", "KEY_OFFSET": "False"}

# Names that other scripts of this field have for the settings behind the colons; behind none: there is nothing like it
FOREIGN = dict(pair.split(":") for pair in """
    EVAL_STRIDE:SLIDING_EVAL_STRIDE EVAL_SEQ_LEN:TRAIN_SEQ_LEN EVAL_BATCH_SEQS:SLIDING_BATCH_SIZE
    TEMP_CALIB:TEMP_SCALING MAX_WALLCLOCK:MAX_WALLCLOCK_SECONDS MAX_STEPS:ITERATIONS MAX_ITERS:ITERATIONS
    NUM_ITERATIONS:ITERATIONS NUM_STEPS:ITERATIONS TRAIN_STEPS:ITERATIONS TOTAL_STEPS:ITERATIONS
    NUM_TRAIN_STEPS:ITERATIONS LEARNING_RATE:MATRIX_LR MUON_LR:MATRIX_LR EMBEDDING_LR:TIED_EMBED_LR
    UNEMBEDDING_LR:HEAD_LR MIN_LR:MIN_LR_RATIO WEIGHT_DECAY:MUON_WD MUON_WEIGHT_DECAY:MUON_WD ADAM_WEIGHT_DECAY:ADAM_WD
    ADAM_BETA1:BETA1 ADAM_BETA2:BETA2 GRAD_CLIP:GRAD_CLIP_NORM MAX_GRAD_NORM:GRAD_CLIP_NORM
    MOMENTUM_WARMUP_START:MUON_MOMENTUM_WARMUP_START MOMENTUM_WARMUP_STEPS:MUON_MOMENTUM_WARMUP_STEPS
    BACKEND_STEPS:MUON_BACKEND_STEPS MUON_NS_STEPS:MUON_BACKEND_STEPS WARMUP_ITERS:LR_WARMUP_STEPS
    LR_DECAY_ITERS:WARMDOWN_ITERS LR_SCHEDULE:WARMDOWN_SHAPE OPTIMIZER:MATRIX_OPTIMIZER N_LAYER:NUM_LAYERS
    N_LAYERS:NUM_LAYERS NUM_HIDDEN_LAYERS:NUM_LAYERS N_HEAD:NUM_HEADS N_HEADS:NUM_HEADS N_KV_HEAD:NUM_KV_HEADS
    NUM_KEY_VALUE_HEADS:NUM_KV_HEADS NUM_ATTENTION_HEADS:NUM_HEADS N_EMBD:MODEL_DIM D_MODEL:MODEL_DIM MLP_RATIO:MLP_MULT
    ROPE_THETA:ROPE_BASE LOGIT_CAP:LOGIT_SOFTCAP XSA_LAYERS:XSA_LAST_N TIE_WORD_EMBEDDINGS:TIE_EMBEDDINGS
    EMA_ENABLED:EMA BIGRAM_VOCAB_SIZE:BIGRAM_HASH BLOCK_SIZE:TRAIN_SEQ_LEN CONTEXT_LENGTH:TRAIN_SEQ_LEN
    MAX_SEQ_LEN:TRAIN_SEQ_LEN TOTAL_BATCH_SIZE:TRAIN_BATCH_TOKENS DEVICE_BATCH_SIZE:MICRO_BATCH_TOKENS
    GRAD_ACCUM_STEPS:MICRO_BATCH_TOKENS EVAL_INTERVAL:VAL_LOSS_EVERY GRADIENT_ACCUMULATION_STEPS:MICRO_BATCH_TOKENS
    EVAL_EVERY:VAL_LOSS_EVERY LOG_INTERVAL:TRAIN_LOG_EVERY LOG_EVERY:TRAIN_LOG_EVERY RANDOM_SEED:SEED
    NO_COMPILE:COMPILE_MODE NUM_LOOPS:RECURRENCE_FACTOR SWA_ENABLED: TTT_ENABLED: TTT_LR:
    QAT_ENABLED: SMEAR_GATE_ENABLED:SMEAR_GATE""".split())  # fmt: skip
# Likewise, but a shell, a container or another program may have set them for its own ends: named, not refused
ORDINARY = dict(pair.split(":") for pair in """
    BATCH_SIZE:TRAIN_BATCH_TOKENS SEQ_LEN:TRAIN_SEQ_LEN LR:MATRIX_LR STEPS:ITERATIONS EPOCHS:ITERATIONS DROPOUT:
    HIDDEN_SIZE:MODEL_DIM DIM:MODEL_DIM DTYPE:PRECISION COMPILE:COMPILE_MODE TORCH_COMPILE:COMPILE_MODE
    OUTPUT_DIR:ARTIFACT_PATH DATA_DIR:DATA_PATH TOKENIZER:TOKENIZER_PATH
    MODEL_PATH:ARTIFACT_PATH""".split())  # fmt: skip

def meant(name: str) -> str:
    return f"did you mean {name}?" if name else "there is nothing like it here"

class Sources(NamedTuple):
    """Who set what: names of settings that the environment holds."""

    user: frozenset[str]
    preset: frozenset[str]  # a launch script set them, out of a preset: PRESET_SETTINGS names them
    foreign: frozenset[str]  # of `ORDINARY`

    @classmethod
    def from_env(cls, env: Mapping[str, str] = os.environ) -> Sources:
        given = env.keys() & {f.name.upper() for f in dataclasses.fields(Config)}
        preset = frozenset(env.get("PRESET_SETTINGS", "").split()) & given
        return cls(frozenset(given) - preset, preset, frozenset(env.keys() & ORDINARY.keys()))

    def lines(self, cfg: Config) -> Iterator[str]:
        """Which settings differ from the defaults and where they come from; then the names that mean nothing here."""
        default, differ = Config(), defaultdict(list)
        for f in dataclasses.fields(cfg):
            name, value = f.name.upper(), getattr(cfg, f.name)
            taken = {"VOCAB_SIZE": "tokenizer", "MICRO_BATCH_TOKENS": "memory"}.get(name, "")  # where nobody says it
            source = "environment" if name in self.user else "preset" if name in self.preset else taken
            source = "artifact" if cfg.eval_only and f.metadata["model"] else source
            if value != getattr(default, f.name) and (f.name != "run_id" or name in self.user):
                differ[source].append(f"{name}={int(value) if isinstance(value, bool) else value}")
        yield "settings " + ("; ".join(f"{k}: {' '.join(v)}" for k, v in sorted(differ.items())) or "defaults")
        for name in sorted(self.foreign):
            yield f"warning: {name} is not a setting, and the run does not use it; {meant(ORDINARY[name])}"

setting_kinds = functools.cache(get_type_hints)  # evaluates this file's annotations, once
WITHIN = {"least": operator.ge, "most": operator.le, "above": operator.gt, "below": operator.lt}

# (setting, whether config c keeps the rule, what was expected); options add theirs
RULES: list[tuple[str, Callable[[Config], Any], str]] = [
    ("run_id", lambda c: re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,79}", c.run_id), "1 to 80 of A-Z a-z 0-9 . _ -"),
    ("model_dim", lambda c: c.model_dim % c.num_heads == 0, "a multiple of NUM_HEADS"),
    ("model_dim", lambda c: c.head_dim % 2 == 0, "an even multiple of NUM_HEADS, for the rotation"),
    ("num_kv_heads", lambda c: c.num_heads % c.num_kv_heads == 0, "a divisor of NUM_HEADS"),
    ("bitnet_group_size",
     lambda c: c.scale_group != "group" or math.gcd(c.model_dim, c.mlp_dim) % c.bitnet_group_size == 0,
     "a divisor of MODEL_DIM and of the MLP's width"),
    ("train_batch_tokens", lambda c: c.eval_only or c.train_batch_tokens % c.train_seq_len == 0,
     "a multiple of TRAIN_SEQ_LEN"),
    ("sliding_eval_stride", lambda c: c.sliding_eval_stride <= c.train_seq_len, "at most TRAIN_SEQ_LEN"),
    ("yarn_max_len", lambda c: c.rope_type == "rope" or c.yarn_max_len >= c.train_seq_len, "at least TRAIN_SEQ_LEN"),
]  # fmt: skip

def named(text: str, cfg: Config) -> str:
    """The text with `=value` behind the names of settings."""
    return re.sub(r"\b[A-Z]+_[A-Z_]+\b(?!=)", lambda m: f"{m[0]}={getattr(cfg, m[0].lower())}", text)

def range_text(limits: dict[str, float]) -> str:
    """Limits in words: "1 to 256", "0 or more, below 1"."""
    if limits.keys() == {"least", "most"}:
        return f"{limits['least']} to {limits['most']}"
    words = {"least": "at least {}" if limits.get("least") else "{} or more", "most": "at most {}"}
    return ", ".join(words.get(limit, limit + " {}").format(bound) for limit, bound in limits.items())

def parse_setting(key: str, text: str, kind: Any) -> Any:
    """The value of one environment variable; UserError names the variable, the value and the choices."""
    if get_origin(kind) is Literal:
        choices = {str(c): c for c in get_args(kind)}
        if text in choices:
            return choices[text]
        raise UserError(f"{key}={text!r}: expected one of {', '.join(choices)}")
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

def describe(f: dataclasses.Field) -> tuple[str, str, str]:
    """(default, what a setting may be, what it means), in words."""
    kind, m = setting_kinds(Config)[f.name], f.metadata
    choices = [str(c) for c in get_args(kind)] or ["0", "1"] * (kind is bool)
    default = "" if f.default is dataclasses.MISSING else str(int(f.default) if kind is bool else f.default)
    allowed = " ".join(choices) or range_text(m["limits"]) or kind.__name__.replace("str", "text")
    return default, allowed, m["meaning"] + f" ({m['of']})" * bool(m["of"])

def help_text() -> str:
    """What `--help` prints: every setting with its default, its range and its meaning."""
    lines = ["python train_gpt.py trains; every setting is an environment variable, NAME=value. [What it may be]"]
    for f in dataclasses.fields(Config):
        default, allowed, meaning = describe(f)
        lines += ["", f.metadata["group"]] if f.metadata["group"] else []
        lines.append(f"  {f.name.upper()}={default}  {meaning} [{allowed}]")
    return "\n".join(lines)


# ---- 2 Runtime -------------------------------------------------------------------------------------------------------
# The processes, the one clock that decides for all of them, and the log.

class World:
    """The processes of the run: one per GPU (nccl) or per CPU process (gloo). A single process runs the same code."""

    watch: Any = None  # over the other processes, once they have joined

    def __init__(self, rank: int = 0, size: int = 1, device: torch.device | None = None) -> None:
        self.rank, self.size, self.device = rank, size, device or torch.device("cpu")
        self.is_main, self.entered = rank == 0, 0  # entered: so many collectives

    @classmethod
    def from_env(cls, env: Mapping[str, str] = os.environ) -> World:
        """Join the processes that torchrun started (RANK, WORLD_SIZE, LOCAL_RANK); alone without them."""
        alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
        if "RANK" not in env and "SLURM_PROCID" in env and env.get("SLURM_NTASKS", "1") != "1":
            found = f"SLURM_PROCID={env['SLURM_PROCID']!r} SLURM_NTASKS={env.get('SLURM_NTASKS')!r} without RANK"
            wanted = "a task a machine, which starts torchrun (srun --ntasks-per-node=1 torchrun --nnodes=...)"
            raise UserError(f"{found}: expected {wanted}, or no SLURM_PROCID for one process alone")
        given = {name: env.get(name, default) for name, default in alone.items()}
        if not all(text.isdecimal() for text in given.values()) or not int(given["RANK"]) < int(given["WORLD_SIZE"]):
            found = f"RANK={given['RANK']!r} WORLD_SIZE={given['WORLD_SIZE']!r}"
            raise UserError(f"{found}: expected what torchrun sets, or nothing")
        rank, size, local_rank, local_size = map(int, given.values())
        device = torch.device("cpu")
        if torch.cuda.is_available():
            gpus = torch.cuda.device_count()
            if max(local_rank + 1, local_size) > gpus:  # every process sees it, so rank 0 can say it
                raise UserError(f"LOCAL_WORLD_SIZE={local_size}: expected at most {gpus}, one process a GPU")
            device = torch.device("cuda", local_rank)  # LOCAL_RANK, never RANK: there may be several machines
            torch.cuda.set_device(device)
        world = cls(rank, size, device)
        if size > 1:
            backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
            try:
                dist.init_process_group(backend, timeout=datetime.timedelta(minutes=10))
            except (ValueError, RuntimeError) as error:
                reason = str(error).splitlines()[0]
                nets = [f"{key}={env[key]!r}" for key in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME") if key in env]
                advice = f"is {' or '.join(nets)} a network interface here?" if nets else "start with torchrun"
                raise UserError(f"WORLD_SIZE={size}: processes cannot join ({reason}); {advice}") from None
            cls.watch = Watch(world, env)
        return world

    @staticmethod
    def speaks(env: Mapping[str, str] = os.environ) -> bool:
        """Whether this process says an error: the first of its machine; it asks no other, which may have died."""
        rank = env.get("LOCAL_RANK", env.get("RANK", "0"))
        return rank == "0" or not rank.isdecimal() or env.get("WORLD_SIZE", "1") in ("0", "1")

    @staticmethod
    def machine(env: Mapping[str, str] = os.environ) -> str:
        """Behind an error: where it was, if that is not rank 0's machine."""
        return f" ({World.name(env)}, on {os.uname().nodename})" if env.get("GROUP_RANK", "0") != "0" else ""

    @staticmethod
    def name(env: Mapping[str, str] = os.environ) -> str:
        """This process among all, for a traceback."""
        return f"rank {env.get('RANK', '0')} of {env.get('WORLD_SIZE', '1')}"

    def sum_(self, x: Tensor) -> Tensor:
        """Sum over all processes, in place."""
        self.entered += 1
        if self.size > 1:
            dist.all_reduce(x)
        return x

    def sum_shares_(self, x: Tensor) -> Tensor:
        """Reduce-scatter of x (size * n, ...): returns this process's (n, ...) of the sum, in place."""
        share = x.chunk(self.size)[self.rank]
        self.entered += 1
        if self.size > 1:
            getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)(share, x)
        return share

    def agree(self, value: float) -> float:
        """Rank 0's value on every process; through gloo, so that the GPU's queue is not drained."""
        self.entered += 1
        if self.size == 1:
            return value
        box = torch.tensor([value], dtype=torch.float64)
        dist.broadcast(box, src=0)
        return box.item()

    def gather(self, x: Tensor) -> Tensor:
        """(n, ...) on each process -> (size * n, ...) on all, in rank order."""
        self.entered += 1
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
        box = torch.frombuffer(bytearray(data if self.is_main else size), dtype=torch.uint8)
        dist.broadcast(box, src=0)
        return box.numpy().tobytes()

    def close(self) -> None:
        if self.size > 1:
            self.watch.close()
            dist.destroy_process_group()

def threads_for(device: torch.device, pieces: int) -> ThreadPoolExecutor | None:
    """On a CPU: threads, each with its share of the cores, to compute so many pieces at once; whole micro-batches keep
    two cores busier than the operations within them (R017). None: one after the other."""
    cores = torch.get_num_threads()
    count = min(cores, pieces) if device.type == "cpu" else 1
    return thread_pool(count, cores // count) if count > 1 else None

@functools.cache
def thread_pool(threads: int, cores_each: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(cores_each,))

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

    def advance(self, seconds: float) -> None:
        """As if so much time had gone by."""
        self._start -= seconds

    def finish(self) -> float:
        """Seconds until everything queued so far is done."""
        return self._now() - self._start

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        before = self._now()
        yield
        self._start += self._now() - before

class Stopped(BaseException):
    """A signal came: the run ends, and what it has half written goes."""

def stop(number: int, frame: Any) -> None:  # noqa: ARG001
    """Handler of a signal; a second one ends the run at once."""
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, signal.SIG_DFL)
    raise Stopped(number)

class StopRequest:
    """Within it, the first of these signals is only noted, so that a step can end. A second one acts as usual, but for
    AGAIN_S: a queue signals every process, and torchrun passes on what it gets. SIGUSR1 only ever warns."""

    SIGNALS, AGAIN_S = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1), 5.0

    def __init__(self) -> None:
        self.number, self._since, self._before = 0, 0.0, {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in self.SIGNALS}
        return self

    def _note(self, number: int, frame: Any) -> None:  # noqa: ARG002
        if self.number in (0, signal.SIGUSR1):
            self.number, self._since = number, time.monotonic()
        elif number != signal.SIGUSR1 and time.monotonic() - self._since > self.AGAIN_S:
            self.__exit__()
            signal.raise_signal(number)

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

def exit_code(signal_number: int) -> int:
    """130 after Ctrl-C, 143 after SIGTERM; 0 after SIGUSR1, by which a queue warns of a time limit."""
    return 0 if signal_number == signal.SIGUSR1 else 128 + signal_number

def nothing(share: float) -> None: ...

class View(contextlib.ExitStack):
    """Who follows a run beside its log: by default nobody. `Follower` (section 12) is a terminal's bar, and TRACK."""

    name = ""  # of the run, where it is tracked

    def phase(self, name: str, *training: Any) -> Callable[[float], None]:  # noqa: ARG002
        """A part of the run begins. Returns what wants to know, now and then, which share of it is done; not of
        training, whose `Loop` and `TrainingStep` are given."""
        return nothing

    def line(self, log: Log, text: str) -> AbstractContextManager:  # noqa: ARG002
        """Within it a line of the log is printed."""
        return contextlib.nullcontext()

    def track(self, log: Log, step: int, figures: dict[str, float]) -> None: ...

class Log:
    """Rank 0's record, LOG_DIR/RUN_ID.txt, and the console. A log that is there is kept under a numbered name; if
    another run is still writing it, this one gets the number. Training never ends because a line cannot be written."""

    def __init__(self, cfg: Config, world: World, view: View | None = None) -> None:
        self.path, self._file, self._console = Path(cfg.log_dir) / f"{cfg.run_id}.txt", None, world.is_main
        self.view = view or View()
        if world.is_main:
            try:
                self.path, self._file = new_log(self.path)
            except OSError as error:
                wanted = f"expected a folder where {self.path.name} can be written ({error.strerror})"
                raise UserError(f"LOG_DIR={cfg.log_dir!r}: {wanted}") from None

    def __call__(self, line: str, console: bool = True) -> None:
        if self._file:
            try:
                self._file.write(f"{line}\n".encode("utf-8", "backslashreplace"))
            except OSError as error:  # the disk is full, a quota is reached
                self._file = None
                self.warn(f"{self.path} ends here ({error.strerror}); the run goes on")
        with self.view.line(self, line):
            if not (console and self._console):
                return
            try:
                print(line, flush=True)
            except OSError as error:  # the reader has gone, as `head` does
                self._console = False
                with contextlib.suppress(OSError, ValueError):  # or Python complains at its exit
                    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
                self.warn(f"standard output cannot be written ({error.strerror}); the run goes on, see {self.path}")

    def warn(self, text: str) -> None:
        with self.view.line(self, ""), contextlib.suppress(OSError):
            print(f"train_gpt.py: warning: {text}", file=sys.stderr, flush=True)

def new_log(path: Path) -> tuple[Path, BinaryIO]:
    """(path, file) of a log of its own, however many runs start at once; it is held as long as this process lives."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open_folder(path.parent) as folder:
        hold(folder, wait=True)
        if path.exists():
            with open(path, "rb") as earlier:
                in_use = not hold(earlier.fileno())
            if in_use:
                path = free_name(path)
            else:
                path.rename(free_name(path))
        file = open(path, "xb", buffering=0)
        hold(file.fileno())
    return path, file

def free_name(path: Path) -> Path:
    """The first of run.1.txt, run.2.txt, ... that is free, for run.txt."""
    names = (path.with_name(f"{path.stem[:200]}.{n}{path.suffix}") for n in itertools.count(1))
    return next(name for name in names if not name.exists())

@contextlib.contextmanager
def open_folder(folder: Path) -> Iterator[int]:
    handle = os.open(folder, os.O_RDONLY)
    try:
        yield handle
    finally:
        os.close(handle)

def hold(handle: int, wait: bool = False) -> bool:
    """Lock an open file or folder until it is closed; False if another process has it. Some file systems cannot."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True

def compute_dtype(precision: str, device: torch.device) -> torch.dtype:
    """dtype of activations and matrix products. No autocast: since torch 2.12 it would return float32 from rms_norm."""
    if precision == "auto":
        gpu = device.type == "cuda"
        # before compute capability 8 bfloat16 is emulated; nothing is compiled there, and a graph cannot ask
        recent = torch.compiler.is_compiling() or gpu and torch.cuda.get_device_properties(device).major >= 8
        precision = "fp32" if not gpu else "bf16" if recent else "fp16"
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]

@contextlib.contextmanager
def readable() -> Iterator[None]:
    """A user's file that cannot be read is a UserError; other errors of the system are not a user's."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{error.filename}: cannot be read ({error.strerror})") from None

def write_whole(path: str | Path, data: bytes | Iterator[bytes], keep: bool = False) -> None:
    """Write a file, given at once or in parts, whole or not at all: an earlier one survives a full disk or a crash.
    `keep`: it stays in any case, under a numbered name unless it is the same."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # short: the file's own name may be as long as names can be
    partial = path.with_name(f".{os.getpid()}.{threading.get_ident()}.partial")
    try:
        with open(partial, "wb") as f:
            hold(f.fileno())
            for part in [data] if isinstance(data, bytes) else data:
                f.write(part)
            f.flush()
            os.fsync(f.fileno())
        with open_folder(path.parent) as folder:
            hold(folder, wait=True)
            if keep and path.exists() and path.read_bytes() != data:
                path.rename(free_name(path))
            os.replace(partial, path)
            with contextlib.suppress(OSError):  # some file systems cannot
                os.fsync(folder)
    finally:
        partial.unlink(missing_ok=True)

def clear_partial(folder: Path) -> None:
    """Remove what `write_whole` left there when it was killed; what is being written now is held."""
    for path in folder.glob(".*.partial"):
        if re.fullmatch(r"\.\d+\.\d+\.partial", path.name):
            with contextlib.suppress(OSError), open(path, "rb") as f:
                if hold(f.fileno()):
                    path.unlink()

def check_writable(path: str, name: str = "ARTIFACT_PATH") -> None:
    """UserError unless a file can be written there: known before training, not after it."""
    target = Path(path)
    try:
        if not target.name or target.is_dir():
            raise UserError(f"{name}={path!r}: expected the name of a file")
        target.parent.mkdir(parents=True, exist_ok=True)
        clear_partial(target.parent)
        with tempfile.TemporaryFile(dir=target.parent):
            pass
        folder = target.parent.stat()
        owners = (folder.st_uid, target.stat().st_uid) if target.exists() else ()
        if folder.st_mode & stat.S_ISVTX and owners and os.geteuid() not in (0, *owners):
            raise PermissionError(errno.EPERM, "a file of another user, in a folder where only its owner replaces it")
    except OSError as error:
        raise UserError(f"{name}={path!r}: expected a file that can be written ({error.strerror})") from None


# ---- 3 Data ----------------------------------------------------------------------------------------------------------
# Shards in, (B, T) batches out: each process a disjoint part of the same stream, the next batch ready before it is
# asked for. Shard: 256 little-endian int32 (20240520, 1, token count, zeros), then the tokens as uint16.

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
        with readable():
            self.paths = sorted(Path(cfg.data_path).glob(f"fineweb_{split}_*.bin"))
        if not self.paths:
            raise UserError(f"DATA_PATH={cfg.data_path!r}: no fineweb_{split}_*.bin there; see docs/data.md")
        with readable():
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
                where = f"{self.paths[shard]}: token id {largest} at a position from {start} to {start + len(part) - 1}"
                raise UserError(f"{where}; expected ids below VOCAB_SIZE={self._vocab_size}")
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
    """BitNet b1.58 (arXiv:2402.17764): codes (groups, G) in {-1, 0, 1}, a scale (groups, 1) for G consecutive weights.

    absmean: the mean magnitude; codes are round(w / scale) clipped to 1 at the default threshold. rms: the root mean
    square (#920). lstsq: codes as for absmean with a float16 scale, then the scale of least squared error, the mean
    magnitude of what is not 0 (arXiv:1605.04711). The scale is rounded as it is stored: what is trained is what is
    stored. Sums are in float64, so that their order cannot change the result on a CPU, a GPU or in compiled code.
    """
    groups = w.float().reshape(-1, group_size)
    size = groups.abs()
    total = lambda x: x.sum(-1, keepdim=True, dtype=torch.float64)
    mean = total(size.square()).div(group_size).sqrt() if form.stat == "rms" else total(size) / group_size
    scale = round_scale(mean.float(), "fp16" if form.stat == "lstsq" else form.storage)
    limit = form.threshold * scale
    codes = 1 - 2 * (groups < 0).float() if form.binary else (groups > limit).float() - (groups < -limit).float()
    if form.stat == "lstsq":
        scale = round_scale((total(size * codes.abs()) / total(codes.abs()).clamp_min(1)).float(), form.storage)
    return codes, scale

# storage -> (mantissa bits dropped from float32's 23, smallest and largest value). A scale has no sign, so a byte holds
# e4m3's three mantissa bits and five exponent bits: no second scale is needed to bring it into range
SCALE_STORAGES = {"fp16": (13, 2.0**-14, 65504.0), "bf16": (16, 2.0**-100, 2.0**100), "e4m3": (20, 2.0**-24, 240.0)}
E4M3_FIRST = (127 - 24) << 3  # the upper bits of float32's 2^-24, code 0

def drop_mantissa(x: Tensor, dropped: int) -> Tensor:
    """float32 rounded to `dropped` mantissa bits fewer (ties to even), by integer arithmetic on its bits."""
    bits = x.view(torch.int32)
    return ((bits + ((1 << (dropped - 1)) - 1) + ((bits >> dropped) & 1)) & -(1 << dropped)).view(torch.float32)

def round_scale(x: Tensor, storage: str) -> Tensor:
    """Positive float32 values as they will be stored."""
    dropped, smallest, largest = SCALE_STORAGES[storage]
    return drop_mantissa(x, dropped).clamp(smallest, largest)

def round_half(x: Tensor) -> Tensor:
    """float32 rounded to float16's values (ties to even) by arithmetic on bits: torch.compile drops .half().float()."""
    small = torch.copysign((x.abs() + 0.5) - 0.5, x)  # below 2^-14 values are 2^-24 apart, as in float32 above 0.5
    return torch.where(x.abs() < 2.0**-14, small, drop_mantissa(x, 13))

def split_bytes(x: np.ndarray) -> list[np.ndarray]:
    """16-bit values -> their high bytes, their low bytes: the former have few values, the latter hardly compress."""
    return list(x.reshape(-1).astype("<u2").view(np.uint8).reshape(-1, 2).T[::-1])

def join_bytes(high: np.ndarray, low: np.ndarray) -> np.ndarray:
    return np.stack((low, high), axis=1).reshape(-1).view("<u2")

class Float16:
    """A parameter in float16, symbols all high bytes, then all low ones. This and its likes are the forms that
    artifacts hold: `round` gives what comes back, `counts` the runs of symbols, and what names their table."""

    def round(self, w: Tensor) -> Tensor:
        return round_half(w)

    def counts(self, shape: tuple[int, ...]) -> list[tuple[Any, int]]:
        return [(shape, math.prod(shape)), ("low", math.prod(shape))]

    def symbols(self, w: Tensor) -> list[np.ndarray]:
        return split_bytes(w.half().view(torch.int16).numpy().view(np.uint16))

    def restore(self, symbols: list[np.ndarray], shape: tuple[int, ...]) -> Tensor:
        return torch.from_numpy(join_bytes(*symbols).view(np.float16).astype(np.float32)).view(shape)

class IntegerRows:
    """Whole-number codes and a step for each row, stored like a scale: the row's root mean square / 2^(bits - 2).

    A Gaussian row then takes bits + .05 a weight after entropy coding; codes reach +-127, so nothing near is clipped (a
    uniform quantizer with entropy coding: Gish and Pierce 1968). Reciprocal and root are taken in float64: the quotient
    is then the same on every device.
    """

    steps = "e4m3"  # how they are stored

    def __init__(self, bits: int) -> None:
        self.bits = bits

    def divide(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """Codes (as w, float32) and steps (rows, 1)."""
        rms = w.float().square().mean(-1, keepdim=True, dtype=torch.float64).sqrt()
        step = round_scale((rms * 2.0 ** (2 - self.bits)).float(), self.steps)
        return (w.float() * step.double().reciprocal().float()).round().clamp(-127, 127), step

    def round(self, w: Tensor) -> Tensor:
        codes, step = self.divide(w)
        return codes * step

    def counts(self, shape: tuple[int, ...]) -> list[tuple[Any, int]]:
        return [("scale", shape[0]), (shape, math.prod(shape))]

    def symbols(self, w: Tensor) -> list[np.ndarray]:
        codes, step = self.divide(w)
        return [*scale_symbols(step, self.steps), (codes.numpy().reshape(-1) + 128).astype(np.uint8)]

    def restore(self, symbols: list[np.ndarray], shape: tuple[int, ...]) -> Tensor:
        codes = torch.from_numpy(symbols[-1].astype(np.float32)) - 128
        return codes.view(shape) * stored_scales(symbols[:-1], self.steps)

CONTROL = Float16()  # gains, scales, biases, mixes
TABLE_FORMS: dict[str, Any] = {f"INT{bits}": IntegerRows(bits) for bits in (4, 5, 6)}  # by FP_STORAGE

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


# ---- 5 Model ---------------------------------------------------------------------------------------------------------
# Tokens (B, T) in, nats per token (B, T) out. Every weight is rounded as it is stored before the forward pass uses it.
# First the operations, as plain PyTorch: they are what `Ops` holds unless section 11 knows a faster way, and what that
# is tested by.

def rms_norm(x: Tensor) -> Tensor:
    return F.rms_norm(x, (x.size(-1),), eps=1e-6)  # PyTorch's default eps differs by dtype: 0.0078 in bfloat16

def matmul(x: Tensor, latent: Tensor, stored: Tensor) -> Tensor:
    """x (..., in) @ stored.T; `stored` (out, in) is the rounded latent weight; the gradient goes to `latent`."""
    return F.linear(x, StraightThrough.apply(latent, stored))

def normed_matmul(x: Tensor, latent: Tensor, stored: Tensor) -> Tensor:
    return matmul(rms_norm(x), latent, stored)

def lookup(idx: Tensor, latent: Tensor, stored: Tensor) -> Tensor:
    """Rows of a stored table (V, E): (...) -> (..., E)."""
    return F.embedding(idx, StraightThrough.apply(latent, stored))

def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of (B, T, H, C): channels i and i + C/2 turn by an angle; cos and sin (T, 1, C/2)."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos + b * sin, b * cos - a * sin), dim=-1)

def qk_norm_rope(qkv: Tensor, gain: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(B, T, H + 2K, C), gain (H,), angles -> q (B, T, H, C), k and v (B, T, K, C); q, k normalized and rotated."""
    q, k, v = qkv.split((len(gain), *[(qkv.size(2) - len(gain)) // 2] * 2), dim=2)
    cos, sin = (t[: qkv.size(1)].to(qkv.dtype) for t in (cos, sin))
    return rotate(rms_norm(q), cos, sin) * gain.to(q.dtype)[:, None], rotate(rms_norm(k), cos, sin), v

def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Causal attention by PyTorch: q (B, T, H, C), k and v (B, T, K, C) -> (B, T, H, C). With fewer
    queries than keys they are the last positions. A mask (queries, keys) takes the place of causality."""
    if mask is None and q.size(1) < k.size(1):
        mask = torch.ones(q.size(1), k.size(1), dtype=torch.bool, device=q.device).tril(k.size(1) - q.size(1))
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    gqa = q.size(1) != k.size(1)
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, enable_gqa=gqa).transpose(1, 2)

def relu2_mlp(x: Tensor, up: nn.Module, down: nn.Module) -> Tensor:
    return down(F.relu(up(x)).square())

def token_nats(logits: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Cross entropy of each target and the log-sum-exp behind it, in nats: (..., V), (...) -> (...), (...)."""
    lse = logits.logsumexp(-1)
    return lse - logits.gather(-1, y.unsqueeze(-1)).squeeze(-1), lse

def summed_loss(model: GPT, h: Tensor, y: Tensor, z_loss: float) -> tuple[Tensor, Tensor]:
    """Hidden states (B, T, D), targets (B, T) -> (what is minimized, cross entropy), both summed over the tokens."""
    nats, lse = token_nats(model.logits(h), y)
    return nats.sum() + z_loss * lse.square().sum(), nats.detach().sum()

def target_nats(model: GPT, h: Tensor, y: Tensor, temperatures: Tensor) -> Tensor:
    """Hidden states (B, T, D), targets (B, T) -> the targets' nats with logits divided by each of (n,): (n, B, T)."""
    logits = model.logits(h)
    return torch.stack([token_nats(logits / t, y)[0] for t in temperatures])

class Ops(NamedTuple):
    """How a model is computed: plainly. `fast_ops` (section 11) exchanges what a machine does faster."""

    rms_norm: Callable = rms_norm
    matmul: Callable = matmul
    normed_matmul: Callable = normed_matmul
    lookup: Callable = lookup
    qk_norm_rope: Callable = qk_norm_rope
    attend: Callable = attend
    mlp: Callable = relu2_mlp
    loss: Callable = summed_loss
    nats: Callable = target_nats

class Part(nn.Module):
    """A module that computes through `ops`; see GPT.use."""

    ops = Ops()

class Role(NamedTuple):
    """What a parameter's owner decides for it: the setting that is its learning rate ("matrix_lr": MATRIX_OPTIMIZER
    updates it, any other: Adam), and the stream of the artifact that holds it."""

    rate: str
    storage: Literal["ternary", "table", "control", "none"]

class QuantizedLinear(Part):
    """A bias-free matrix (out, in) used as it will be stored. `frozen` (load_artifact sets it): it is rounded."""

    role: Role
    frozen = False

    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_dim, in_dim))
        self.register_buffer("operand", None, persistent=False)  # the rounded weight, where `rounded_once` keeps it

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
        self.refresh()

    def refresh(self) -> None:
        """`operand` has changed: renew what is made of it."""

    def forward(self, x: Tensor) -> Tensor:
        return self.ops.matmul(x, self.weight, self.stored(x.dtype))

    def draw(self, std: float) -> None:
        """Initial weights, normal. None on the meta device: it would import PyTorch's compiler, 2 s."""
        if not self.weight.is_meta:
            nn.init.normal_(self.weight, std=std)

class TernaryLinear(QuantizedLinear):
    role = Role("matrix_lr", "ternary")

    def __init__(self, in_dim: int, out_dim: int, cfg: Config, init_std: float = 0.02) -> None:
        super().__init__(in_dim, out_dim)
        self.group_size = {"group": cfg.bitnet_group_size, "row": in_dim, "tensor": in_dim * out_dim}[cfg.scale_group]
        self.form = ScaleFormat(cfg.scale_stat, cfg.scale_storage, cfg.ternary_threshold)
        self.draw(init_std) if init_std else nn.init.zeros_(self.weight)

    def ternarized(self) -> tuple[Tensor, Tensor]:
        """Codes (groups, G) and scales (groups, 1)."""
        return ternarize(self.weight.detach(), self.group_size, self.form)

    def rounded(self) -> Tensor:
        codes, scale = self.ternarized()
        return codes.mul_(scale).view_as(self.weight)

class NormedLinear(TernaryLinear):
    """One whose input is normalized first: the two output projections of a block."""

    def forward(self, x: Tensor) -> Tensor:
        return self.ops.normed_matmul(x, self.weight, self.stored(x.dtype))

class TableProjection(QuantizedLinear):
    """A projection between embedding and model width: under Muon like the matrices, stored like the table (#640)."""

    role = Role("matrix_lr", "table")

    def __init__(self, in_dim: int, out_dim: int, fp_storage: str) -> None:
        super().__init__(in_dim, out_dim)
        self.form = TABLE_FORMS[fp_storage]
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))  # as torch.nn.Linear

    def rounded(self) -> Tensor:
        return self.form.round(self.weight.detach())

class Table(TableProjection):
    """The tied embedding (V, E): rows for the input, the same rounded rows for the output."""

    role = Role("tied_embed_lr", "table")

    def __init__(self, vocab_size: int, dim: int, fp_storage: str, init_std: float) -> None:
        super().__init__(dim, vocab_size, fp_storage)
        self.draw(init_std)

    def rows(self, idx: Tensor, dtype: torch.dtype) -> Tensor:
        """The input side: (...) -> (..., E)."""
        return self.ops.lookup(idx, self.weight, self.stored(dtype))

class SmearGated:
    """Rows n_t, normalized, that take up a share of the row before: n_t + amount * sigmoid(w . n_t[:12]) * n_(t-1).

    A token's key then tells what came before it, so that one layer, not two, finds what followed an earlier occurrence
    of the present token. After modded-nanogpt's smear, whose amount is 0 at first; nothing stands before the window.
    """

    def __init__(self, vocab_size: int, dim: int, fp_storage: str, init_std: float) -> None:
        super().__init__(vocab_size, dim, fp_storage, init_std)
        self.smearing = nn.Module()  # its own, since they are controls and the table is not
        self.smearing.gate, self.smearing.amount = nn.Parameter(torch.zeros(min(12, dim))), nn.Parameter(torch.ones(1))

    def rows(self, idx: Tensor, dtype: torch.dtype) -> Tensor:
        n = rms_norm(super().rows(idx, dtype))
        gate, amount = (as_stored(p).to(dtype) for p in (self.smearing.gate, self.smearing.amount))
        share = amount * (n[..., : len(gate)] @ gate).sigmoid().unsqueeze(-1)
        return n + share * F.pad(n[:, :-1], (0, 0, 1, 0))

class SmearedTable(SmearGated, Table):
    """The default's."""

class Rotary(nn.Module):
    """Angles of the rotary embedding, or of #640's YaRN variant: low frequencies divided by up to yarn_max_len / T."""

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        if torch.get_default_device().type != "meta":  # which is for shapes alone; see QuantizedLinear.draw
            angle = self.angles(cfg)
            self.register_buffer("cos", angle.cos().float(), persistent=False)
            self.register_buffer("sin", angle.sin().float(), persistent=False)

    def angles(self, cfg: Config) -> Tensor:
        """(T, 1, C/2) float64."""
        i = torch.arange(0, cfg.head_dim, 2, dtype=torch.float64) / cfg.head_dim
        frequency = cfg.rope_base**-i
        if cfg.rope_type == "yarn":
            ramp = ((i - 0.25) / 0.75).clamp(0, 1)
            frequency = frequency / (1 + ramp * (cfg.yarn_max_len / cfg.train_seq_len - 1))
        positions = torch.arange(max(cfg.train_seq_len, cfg.score_window), dtype=torch.float64)
        return torch.outer(positions, frequency)[:, None]

    def forward(self, length: int) -> tuple[Tensor, Tensor]:  # noqa: ARG002
        """cos and sin (at least `length`, 1, C/2)."""
        return self.cos, self.sin

class Attention(Part):
    """Grouped-query attention with normalized queries and keys and one ternary projection for q, k and v."""

    def __init__(self, cfg: Config, parts: Parts) -> None:
        super().__init__()
        self.head_dim = cfg.head_dim
        self.qkv = parts.qkv(cfg.model_dim, (cfg.num_heads + 2 * cfg.num_kv_heads) * cfg.head_dim, cfg)
        self.out = parts.attention_output(cfg.model_dim, cfg.model_dim, cfg, 0.0)
        self.q_gain = nn.Parameter(torch.full((cfg.num_heads,), cfg.qk_gain_init))
        self.rotary = parts.rotary(cfg)

    def forward(self, x: Tensor, tail: int = 0) -> Tensor:
        """(B, T, D) -> (B, T, D); with `tail` only the last `tail` positions attend: (B, tail, D)."""
        qkv = self.qkv(x).unflatten(-1, (-1, self.head_dim))  # (B, T, H + K + K, C)
        q, k, v = self.ops.qk_norm_rope(qkv, as_stored(self.q_gain), *self.rotary(x.size(1)))
        return self.out(self.mix(q[:, -tail:], self.offset(k), v).flatten(2))

    @staticmethod
    def offset(k: Tensor) -> Tensor:
        """(B, T, K, C) -> (B, T, K, C): slowly turning channels, the upper half of the pairs, are those of the position
        before; the first keeps its own.

        What a query finds by them is the position after the one that it asked for, so one layer, not two, finds what
        followed an earlier occurrence of the present token. modded-nanogpt's, there in the layers with long windows.
        """
        pairs = k.size(-1) // 2
        slow = torch.arange(2 * pairs, device=k.device) % pairs >= (pairs + 1) // 2
        return torch.where(slow, torch.cat((k[:, :1], k[:, :-1]), 1), k)

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Causal attention: (B, T, H | K | K, C) -> (B, T, H, C)."""
        return self.ops.attend(q, k, v)

class MLP(Part):
    inputs = 1  # input channels of the activation for each of its outputs

    def __init__(self, cfg: Config, parts: Parts, width: int, hidden: int) -> None:
        super().__init__()
        self.up = parts.linear(width, self.inputs * hidden, cfg)
        self.down = parts.output(hidden, width, cfg, 0.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.ops.mlp(x, self.up, self.down)

class Block(Part):
    """Mix in the embedding, then attention and MLP, each on the normalized stream and scaled per channel."""

    def __init__(self, cfg: Config, parts: Parts) -> None:
        super().__init__()
        self.attention = parts.attention(cfg, parts)
        self.mlp = parts.mlp(cfg, parts, cfg.model_dim, cfg.mlp_dim)
        self.stream_mix = nn.Parameter(torch.tensor([[1.0] * cfg.model_dim, [0.0] * cfg.model_dim]))
        self.attn_scale = nn.Parameter(torch.ones(cfg.model_dim))
        self.mlp_scale = nn.Parameter(torch.ones(cfg.model_dim))

    def mixed(self, x: Tensor, x0: Tensor) -> Tensor:
        mix = as_stored(self.stream_mix).to(x.dtype)
        return mix[0] * x + mix[1] * x0

    def forward(self, x: Tensor, x0: Tensor, tail: int = 0) -> Tensor:
        """(B, T, D), the normalized embedding -> (B, T, D); with `tail` the last positions alone: (B, tail, D)."""
        attn_scale, mlp_scale = (as_stored(p).to(x.dtype) for p in (self.attn_scale, self.mlp_scale))
        x = self.mixed(x, x0)
        x = x[:, -tail:] + attn_scale * self.attention(self.ops.rms_norm(x), tail)
        return x + mlp_scale * self.mlp(self.ops.rms_norm(x))

def build_blocks(cfg: Config, parts: Parts) -> list[nn.Module]:
    return [parts.block(cfg, parts) for _ in range(cfg.num_layers)]

class Pass(NamedTuple):
    """One pass through a block."""

    block: int
    skip: int | None  # the row of skip_weights that weighs the popped output, which is added before the block
    pushes: bool  # whether a later pass pops the block's output

def u_net(cfg: Config, training: bool) -> list[Pass]:  # noqa: ARG001
    """The passes of one forward pass: the first half of the layers pushes its outputs, the second half pops them in
    reverse. An odd number of layers makes the second half the larger one: its last layer takes no skip."""
    n = cfg.num_layers // 2
    return [Pass(i, i - n if n <= i < 2 * n else None, i < n) for i in range(cfg.num_layers)]

def poly_softcap(logits: Tensor, cap: float) -> Tensor:
    """cap * clip(u - u^3/3 + u^5/15, -1, 1), u = clip(logits/cap, -2, 2): #640's (tanh's series ends in 2/15)."""
    u = (logits / cap).clamp(-2, 2)
    u2 = u * u
    return cap * (u * (1 - u2 / 3 + u2 * u2 / 15)).clamp(-1, 1)

SOFTCAPS = {"poly": poly_softcap}  # by SOFTCAP_TYPE

def training_loss(model: GPT, x: Tensor, y: Tensor, z_loss: float) -> tuple[Tensor, Tensor]:
    """(what is minimized, cross entropy), both summed over the tokens."""
    return model.ops.loss(model, model.hidden(x, training=True), y, z_loss)

class Parts(NamedTuple):
    """What a model is made of: the default's own here. `choose_parts` (section 12) exchanges those that
    settings change."""

    linear: Callable = TernaryLinear  # (in_dim, out_dim, cfg, init_std = .02)
    qkv: Callable = TernaryLinear  # the same, for queries, keys and values
    output: Callable = NormedLinear  # the same, for the last matrix of an MLP, and of attention:
    attention_output: Callable = NormedLinear
    attention: Callable = Attention  # (cfg, parts)
    rotary: Callable = Rotary  # (cfg)
    mlp: Callable = MLP  # (cfg, parts, width, hidden width)
    block: Callable = Block  # (cfg, parts)
    blocks: Callable = build_blocks  # (cfg, parts)
    order: Callable = u_net  # (cfg, training)
    table: Callable = SmearedTable  # (pieces, width, FP_STORAGE, deviation of the initial weights)
    embed_in: Callable = TableProjection  # (in_dim, out_dim, FP_STORAGE)
    embed_out: Callable = TableProjection
    output_table: Callable = lambda cfg, table: table  # noqa: ARG005  the embedding itself
    embed_norm: Callable = lambda cfg: rms_norm  # noqa: ARG005
    final_norm: Callable = lambda cfg: rms_norm  # noqa: ARG005
    complete: Callable = lambda model: None  # noqa: ARG005  adds to a finished model
    loss: Callable = training_loss  # (model, x, y, z_loss)

class GPT(Part):
    """U-Net transformer, its tied embedding factored. `model(x, y)`: nats of the targets, (B, T), (B, T) -> (B, T)."""

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        self.cfg, self.parts = cfg, (parts := choose_parts(cfg))
        width, form = cfg.embed_dim or cfg.model_dim, cfg.fp_storage
        self.table = parts.table(cfg.vocab_size, width, form, cfg.tied_embed_init_std)
        self.embed_in = parts.embed_in(width, cfg.model_dim, form)
        self.embed_out = parts.embed_out(cfg.model_dim, width, form)
        self.output = parts.output_table(cfg, self.table)
        self.blocks = nn.ModuleList(parts.blocks(cfg, parts))
        self.skip_weights = nn.Parameter(torch.ones(sum(step.pushes for step in parts.order(cfg, True)), cfg.model_dim))
        self.vocab_bias = nn.Parameter(torch.zeros(cfg.vocab_size))
        self.embed_norm, self.final_norm = parts.embed_norm(cfg), parts.final_norm(cfg)
        self.softcap = SOFTCAPS[cfg.softcap_type]
        self.register_buffer("temperature", torch.ones(()))  # saved; divides the logits of the sliding score only
        parts.complete(self)

    def use(self, ops: Ops) -> GPT:
        """Compute through these operations from now on."""
        for module in self.modules():
            module.ops = ops
        return self

    def hidden(self, idx: Tensor, training: bool = False, tail: int = 0) -> Tensor:
        """Final normalized states (B, T, D); with `tail` only those of the last `tail` positions, (B, tail, D)."""
        dtype = compute_dtype(self.cfg.precision, idx.device)
        x = x0 = self.embed_norm(self.embed_in(self.table.rows(idx, dtype)))
        skip_weights, skips = as_stored(self.skip_weights).to(dtype), []
        passes = self.parts.order(self.cfg, training)
        for i, (block, skip, pushes) in enumerate(passes, 1):
            if skip is not None:
                x = x + skip_weights[skip] * skips.pop()
            x = self.blocks[block](x, x0, tail if i == len(passes) else 0)
            if pushes:
                skips.append(x)
        return self.final_norm(x)[:, -tail:]

    def logits(self, h: Tensor) -> Tensor:
        """Softcapped logits, float32: (..., D) -> (..., V)."""
        return self.softcap(self.output(self.embed_out(h)).float() + as_stored(self.vocab_bias), self.cfg.logit_softcap)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return token_nats(self.logits(self.hidden(x)), y)[0]

def parameter_owners(model: nn.Module) -> Iterator[tuple[str, nn.Module, nn.Parameter, Role]]:
    """(name, owner, parameter, role) of every parameter, in the artifact's order. The owner decides the role."""
    for prefix, module in model.named_modules():
        for name, p in module.named_parameters(prefix, recurse=False):
            yield name, module, p, getattr(module, "role", Role("scalar_lr", "control"))

def saved_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Module, nn.Parameter, Role]]:
    """`parameter_owners` without what only training needs."""
    return (owner for owner in parameter_owners(model) if owner[3].storage != "none")

@contextlib.contextmanager
def rounded_once(model: nn.Module) -> Iterator[None]:
    """Within it every matrix is kept as it will be stored, not rounded at each use; `publish` renews it."""
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

    Singular values come out between 0.7 and 1.2 after 5 steps, small ones between 0 and 1.2 after 3; 16 bits on a GPU.
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

class Optimizer:
    """Parameters, what the schedule sets for them (`lr` from `base_lr`, `momentum`), and their state. torch.optim's own
    class loads torch.compile: two seconds, which a run on a CPU does not need."""

    def __init__(self, params: list[nn.Parameter], lr: float, **group: float) -> None:
        self.group: dict[str, float] = {"lr": lr, "base_lr": lr, **group}
        self.params, self.state = params, defaultdict(dict)

    def step(self) -> None:
        raise NotImplementedError

class NeoMuon(Optimizer):
    """Muon whose Nesterov update is normalized row by row before it is orthogonalized (#640; MuonEq-R, #1394).

    Parameters are banks' shards (n, rows, columns), each updated in one batch of matrix products.
    """

    def __init__(self, shards: list[nn.Parameter], cfg: Config, world: World) -> None:
        super().__init__(shards, cfg.matrix_lr, momentum=cfg.muon_momentum)
        self.cfg, self._orthogonalize = cfg, compiled(orthogonalize, cfg, world)

    @torch.no_grad()
    def step(self) -> None:
        lr = self.group["lr"]
        for p in self.params:
            update = self.update(p.grad, self.state[p], self.group["momentum"])
            if self.cfg.muon_wd:
                p.mul_(1 - lr * self.cfg.muon_wd)
            p.add_(update, alpha=-lr)

    def update(self, g: Tensor, state: dict[str, Tensor], momentum: float) -> Tensor:
        """(n, rows, columns) gradients -> what is subtracted times the learning rate; `state` has tensors (n, ...)."""
        u = nesterov(g, state, momentum)
        # a row without gradient stays 0
        return self.orthogonal(u * u.square().mean(-1, keepdim=True).add_(1e-20).rsqrt_())

    def orthogonal(self, u: Tensor) -> Tensor:
        return self._orthogonalize(u, self.cfg.muon_backend_steps).to(u.dtype) * max(1, u.size(-2) / u.size(-1)) ** 0.5

MATRIX_OPTIMIZERS: dict[str, Callable] = {"neomuon": NeoMuon, "muon": NeoMuon}  # (shards, cfg, world)

class Adam(Optimizer):
    """AdamW (arXiv:1711.05101), PyTorch's fused one."""

    def __init__(self, params: list[nn.Parameter], cfg: Config, lr: float, weight_decay: float = 0.0) -> None:
        super().__init__(params, lr)
        self.options = {"amsgrad": False, "beta1": cfg.beta1, "beta2": cfg.beta2, "weight_decay": weight_decay,
                        "eps": cfg.adam_eps, "maximize": False}  # fmt: skip

    @torch.no_grad()
    def step(self) -> None:
        for p in self.params:
            if not self.state[p]:
                self.state[p] = {"mean": torch.zeros_like(p), "square": torch.zeros_like(p), "step": p.new_zeros(())}
        means, squares, steps = ([self.state[p][key] for p in self.params] for key in ("mean", "square", "step"))
        gradients = [p.grad for p in self.params]
        adamw(self.params, gradients, means, squares, [], steps, fused=True, lr=self.group["lr"], **self.options)

def build_optimizers(model: nn.Module, cfg: Config, world: World, banks: list[Bank]) -> list[Optimizer]:
    """Every parameter in exactly one optimizer, by its role. Groups carry `base_lr`, which the schedule scales."""
    by_rate: dict[str, list[nn.Parameter]] = {}
    for _, _, p, role in parameter_owners(model):
        by_rate.setdefault(role.rate, []).append(p)
    assert {p for bank in banks for p in bank.parameters()} == set(by_rate.pop("matrix_lr"))
    matrices = MATRIX_OPTIMIZERS[cfg.matrix_optimizer]([bank.shard for bank in banks], cfg, world)
    others = [Adam(params, cfg, getattr(cfg, rate)) for rate, params in by_rate.items()]
    grouped = [p for bank in banks for p in bank.parameters()] + [p for params in by_rate.values() for p in params]
    assert len(grouped) == len(set(grouped)) and set(grouped) == set(model.parameters())
    return [matrices, *others]

class Stage(NamedTuple):
    """What the schedule sets for a step."""

    lr_scale: float
    momentum: float
    seq_len: int
    batch_tokens: int

def schedule(cfg: Config, step: int, progress: float) -> Stage:
    """Constant learning rates, then linear to 0 over the last warmdown_fraction of the budget; momentum warms up."""
    left = min(1.0, max(0.0, 1 - progress) / cfg.warmdown_fraction) if cfg.warmdown_fraction else 1.0
    warm = min(1.0, step / cfg.muon_momentum_warmup_steps) if cfg.muon_momentum_warmup_steps else 1.0
    momentum = (1 - warm) * cfg.muon_momentum_warmup_start + warm * cfg.muon_momentum
    return Stage(left, momentum, cfg.train_seq_len, cfg.train_batch_tokens)

def apply_stage(optimizers: list[Optimizer], stage: Stage) -> None:
    for group in (opt.group for opt in optimizers):
        group["lr"] = group["base_lr"] * stage.lr_scale
        if "momentum" in group:
            group["momentum"] = stage.momentum


# ---- 7 Training ------------------------------------------------------------------------------------------------------
# Batches in, a trained model and the figures of the run out. One flat loop; one progress for clock and step limits.

def batch_layout(cfg: Config, world_size: int, shape: tuple[int, int] | None = None) -> tuple[int, int]:
    """(micro-batches, sequences a micro-batch) of one process: the fewest that fit MICRO_BATCH_TOKENS and divide
    evenly. `shape`: (seq_len, batch_tokens) where a schedule sets others than the config.

    A step has at least two over all processes, if it has two sequences. If two are enough, one process adds the
    same two gradients as two processes do, and their runs agree to the last bit on a CPU; in another order of summation
    rounding moves codes over the thresholds of `ternarize`: losses then differ by 0.006 within 20 steps (R004).
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

class Gradients:
    """All gradients in buffers made once: the matrices' in their banks, the others', and each process's part of the
    loss, in a flat one."""

    def __init__(self, model: nn.Module, world: World) -> None:
        self._world, self.banks, self.scale = world, Bank.build(model, model.cfg, world), 1.0  # the loss's scale
        others = [p for p in model.parameters() if p.grad is None]
        self.flat = torch.zeros(sum(p.numel() for p in others) + world.size, device=world.device)
        self.losses = self.flat[-world.size :]
        for p, g in zip(others, self.flat[: -world.size].split([p.numel() for p in others]), strict=True):
            p.grad = g.view_as(p)
        self._parameters = list(model.parameters())

    def own(self) -> list[Tensor]:
        """What this process's optimizers read: the flat buffer without the losses, and its shards of the banks."""
        return [self.flat[: -self._world.size], *(bank.shard.grad for bank in self.banks)]

    def compute(self, loss_function: Callable, x: Tensor, y: Tensor, micro_batches: int) -> None:
        """Mean gradient and mean loss of the step over the tokens of all processes; the matrices' in its shards."""
        for buffer in (self.flat, *(bank.grads for bank in self.banks)):
            buffer.zero_()
        tokens, mine = x.numel() * self._world.size, self.losses[self._world.rank]

        def gradients(micro: tuple[Tensor, Tensor]) -> tuple[tuple[Tensor | None, ...], Tensor]:
            loss, nats = loss_function(*micro)
            return torch.autograd.grad(loss / (tokens / self.scale), self._parameters, allow_unused=True), nats

        micros = list(zip(x.chunk(micro_batches), y.chunk(micro_batches), strict=True))
        pool = threads_for(x.device, len(micros))
        # not pool.map: tools/compliance.py must see that evaluation cannot come here
        results = Executor.map(pool, gradients, micros) if pool else map(gradients, micros)
        for gradient, nats in results:
            used = [(p.grad, g) for p, g in zip(self._parameters, gradient, strict=True) if g is not None]
            torch._foreach_add_(*zip((mine, nats / tokens), *used, strict=True))
        for bank in self.banks:
            self._world.sum_shares_(bank.grads)
        if self.scale == 1:  # what is not finite in the backward pass reaches the table: it shows in the loss
            mine += 0 * self.flat.sum()
        self._world.sum_(self.flat)
        self.loss = self.losses.sum()

class Hook:
    """What may happen around a step. `choose_hooks` (section 12) gives those that the settings ask for."""

    def __init__(self, step: TrainingStep) -> None:
        self.step = step

    def stage(self, stage: Stage, step: int, progress: float) -> Stage:  # noqa: ARG002
        """What the step shall be, instead of what the schedule says."""
        return stage

    def begin(self, loop: Loop) -> None:
        """Before the first step; may set the loop to where an earlier run was."""

    def before_step(self, progress: float) -> None: ...

    def after_gradients(self) -> bool:
        """Gradients are summed; False, on every process: leave this step's update out."""
        return True

    def after_step(self, step: int, progress: float) -> str:  # noqa: ARG002
        """A line for the log, or nothing."""
        return ""

    def stop(self) -> bool:
        """A signal asks the run to end; True: with what follows training."""
        return False

    def finish(self) -> None: ...

    def figures(self) -> dict[str, Any]:
        """For the result line."""
        return {}

    def state(self) -> dict[str, Any]:
        """What it has beside the settings: numbers, and tensors over all processes."""
        return {}

    def restore(self, state: dict[str, Any]) -> None: ...

class TrainingStep:
    """What a step computes: gradients of all micro-batches, their sum over the processes, the optimizers, the rounding.

    Used within `rounded_once`; `grads.loss` is the step's cross entropy, a device scalar.
    """

    def __init__(self, model: GPT, cfg: Config, world: World) -> None:
        self.cfg, self.model, self.world, self.grads = cfg, model, world, Gradients(model, world)
        self.optimizers = build_optimizers(model, cfg, world, self.grads.banks)
        self.loss_function = compiled(model.parts.loss, cfg, world)
        banked = {layer for bank in self.grads.banks for layer in bank.modules}
        self.others = [m for m in model.modules() if isinstance(m, QuantizedLinear) and m not in banked]
        self.restart()

    def restart(self) -> None:
        """As if no step had been taken, with the weights as they are."""
        for opt in self.optimizers:
            opt.state.clear()
        self.publish()
        self.hooks = choose_hooks(self)

    def take(self, x: Tensor, y: Tensor) -> None:
        """x, y: this process's sequences of the step, (sequences, T) each."""
        micro_batches, _ = batch_layout(self.cfg, self.world.size, (x.size(1), x.numel() * self.world.size))
        self.grads.compute(lambda *micro: self.loss_function(self.model, *micro, self.cfg.z_loss), x, y, micro_batches)
        if not all(hook.after_gradients() for hook in self.hooks):
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

    def share_latent(self) -> None:
        """Every matrix as its owner trained it, on every process."""
        for bank in self.grads.banks:
            bank.share_latent()

    def communication(self, world_size: int) -> list[tuple[str, int]]:
        """(what, bytes of the whole) of every collective of a step among `world_size` processes."""
        banks = [part for bank in self.grads.banks for part in bank.communication(world_size)]
        return [("all-reduce", 4 * self.grads.flat.numel()), *banks]

def warm_up(model: GPT, world: World, log: Log, take_step: TrainingStep) -> float:
    """Compile every shape of the loop on random tokens, before the clock starts; weights and optimizers are restored.

    Returns the seconds that the temperature takes, which the loop leaves free at its end.
    """
    cfg, weights = model.cfg, [p.detach().clone() for p in model.parameters()]
    runs, done = [shape for shape in cfg.step_shapes() for _ in range(cfg.warmup_steps)], log.view.phase("warm-up")
    for i, (seq_len, tokens) in enumerate(runs):
        x = torch.randint(cfg.vocab_size, (tokens // seq_len // world.size, seq_len), device=world.device)
        for hook in take_step.hooks:
            hook.before_step(i % cfg.warmup_steps / max(1, cfg.warmup_steps - 1))  # from the first progress to the last
        take_step.take(x, x)
        log(f"warmup:{i + 1}/{len(runs)}")
        done((i + 1) / len(runs))
    with torch.no_grad():
        for p, w in zip(model.parameters(), weights, strict=True):
            p.copy_(w)
    take_step.restart()
    if not cfg.temp_scaling:
        return 0.0
    log.view.phase("temperature warm-up")
    sequences = calibration_sequences(cfg, world) // world.size
    x = torch.randint(cfg.vocab_size, (sequences, cfg.train_seq_len), device=world.device)
    for _ in range(1 + x.is_cuda):  # the first call also loads kernels
        clock = Clock(world)
        calibrate_temperature(model, x, x, world)
    return world.agree(clock.finish())

def train(model: GPT, cfg: Config, world: World, log: Log, val: ValidationSet) -> dict[str, Any]:
    """Train until the wall clock or ITERATIONS ends the run; sets `model.temperature`; returns the run's figures."""
    with rounded_once(model):
        return training_loop(model, TrainingStep(model, cfg, world), world, log, val)

class Loop:
    """Where training stands, besides the step's own state."""

    def __init__(self, cfg: Config, world: World, log: Log) -> None:
        self.batches, self.report = Batches(TokenStream(cfg, "train"), world), StepReport(cfg, log)
        self.clock, self.log, self.step, self.progress, self.pending = Clock(world), log, 0, 0.0, []

    def read_losses(self, most: int) -> None:
        """Report the losses that are on their way to the host until `most` are left."""
        while len(self.pending) > most:
            loss, shares = self.pending.pop(0)
            self.report(loss.get(), self.clock.elapsed(), shares.tolist)

def training_loop(model: GPT, take_step: TrainingStep, world: World, log: Log, val: ValidationSet) -> dict[str, Any]:
    cfg = model.cfg
    reserve_s = warm_up(model, world, log, take_step)
    budget_s = cfg.max_wallclock_seconds - reserve_s if cfg.max_wallclock_seconds else math.inf
    if budget_s <= 0:
        wanted = f"0 (no cap), or more than the {reserve_s:.2f} s that TEMP_SCALING takes"
        raise UserError(f"MAX_WALLCLOCK_SECONDS={cfg.max_wallclock_seconds}: expected {wanted}")

    hooks, epoch, late_graphs = take_step.hooks, 1, 0
    log(f"startup:{1000 * since_launch_s():.0f}ms")
    loop = Loop(cfg, world, log)
    batches, clock = loop.batches, loop.clock
    for hook in hooks:
        hook.begin(loop)
    log.view.phase("training", loop, take_step)
    with StopRequest() as request:
        for step in itertools.count(loop.step):
            # rank 0 decides for all, so that every process has the same learning rates and stops at the same step
            spent = max(clock.elapsed() / budget_s, step / cfg.iterations)
            progress = world.agree(math.inf if request.number else spent)
            if progress == math.inf:
                break
            for hook in hooks:
                hook.before_step(progress)
            if progress >= 1 and step:
                break
            if cfg.val_loss_every and step and step % cfg.val_loss_every == 0:
                with clock.paused():
                    scores = evaluate(model, val, cfg, world, done=log.view.phase("validation"))
                log(validation_line(cfg, step, scores, clock.elapsed()))
            if batches.epoch > epoch:
                epoch = batches.epoch
                log(f"epoch:{epoch} begins at step:{step} (the run reads more tokens than DATA_PATH holds)")
            stage, loop.progress = schedule(cfg, step, progress), progress
            for hook in hooks:
                stage = hook.stage(stage, step, progress)
            apply_stage(take_step.optimizers, stage)
            graphs = graphs_compiled()
            take_step.take(*batches.next(stage.batch_tokens // stage.seq_len, stage.seq_len))
            late_graphs += graphs_compiled() - graphs
            loop.step = step + 1
            loop.pending.append((Reading(take_step.grads.loss), take_step.grads.losses.clone()))
            # waiting for the loss of the step before keeps the GPU's queue at one step; a CPU has none
            loop.read_losses(world.device.type == "cuda")
            for hook in hooks:
                if line := hook.after_step(step, progress):
                    log(line)
        loop.read_losses(0)
        if progress == math.inf and not any([hook.stop() for hook in hooks]):
            world.agree(0)  # all end with rank 0, which writes the checkpoint
            raise Stopped(request.number or signal.SIGTERM)
    stopped_by = signal.Signals(request.number).name if request.number else ""
    return end_training(model, take_step, world, loop) | {"late_graphs": late_graphs, "stopped_by": stopped_by}

def end_training(model: GPT, take_step: TrainingStep, world: World, loop: Loop) -> dict[str, Any]:
    """The temperature, and every weight on every process; the run's figures."""
    cfg, log, step, clock = model.cfg, loop.log, loop.step, loop.clock
    steps_s = world.agree(clock.finish())
    for hook in take_step.hooks:
        hook.finish()
    tokens = loop.batches.state()["position"]
    if cfg.temp_scaling:
        log.view.phase("temperature")
        x, y = loop.batches.next(calibration_sequences(cfg, world), cfg.train_seq_len)
        model.temperature.fill_(calibrate_temperature(model, x, y, world))
    train_time_s = world.agree(clock.finish())
    if cfg.max_wallclock_seconds and train_time_s > cfg.max_wallclock_seconds + 1:
        log(f"over: train_time:{1000 * train_time_s:.0f}ms is more than MAX_WALLCLOCK_SECONDS and the second beyond it")
    if step < cfg.iterations:
        log(f"stopping_early: wallclock_cap train_time:{1000 * train_time_s:.0f}ms step:{step}/{cfg.iterations}")
    take_step.share_latent()
    if not (agree := replicas_agree(model, world)):
        log("error: the processes' weights have drifted apart; what is exported is the first one's, and no valid run")
    figures = dict(part for hook in take_step.hooks for part in hook.figures().items())
    return figures | {"steps": step, "tokens": tokens, "train_time_s": train_time_s, "replicas_agree": agree,
                      "ms_per_step": 1000 * steps_s / step, "first_losses": loop.report.first_losses}  # fmt: skip

def replicas_agree(model: nn.Module, world: World) -> bool:
    """Whether every process holds the same weights, bit for bit: an integer checksum of each is compared."""
    total = sum(p.detach().view(torch.int32).sum(dtype=torch.int64) for p in model.parameters())
    return len(set(world.gather(total.view(1)).tolist())) == 1


# ---- 8 Artifact ------------------------------------------------------------------------------------------------------
# The model as bytes, and back. The model's definition is the schema: streams hold the parameters in its order, without
# names.
#
#   bytes      what
#   4          magic "TGPT"
#   2          version, uint16 little-endian like every number here
#   2          length of the header text
#   32         SHA-256 of everything after this field
#   ...        header text: one NAME=value line for each model setting, then codec=... and temperature=...
#   4 x 4      length of each stream (uint32)
#   ...        stream trits: code + 1 of every ternary weight; codec ans puts the class of every column before them
#   ...        stream scales: of each ternary matrix: e4m3 a byte each; fp16, bf16: all high bytes, then all low ones
#   ...        stream tables: INTb, FP4: a step a row, codes + 128; FP8: exponent of 2 + 128, then e4m3 codes; FP16
#   ...        stream controls: float16, for each parameter all high bytes, then all low ones
#
# How a codec turns the symbols of the streams into bytes: section 12. Nothing may follow the last stream.

ARTIFACT_MAGIC, ARTIFACT_VERSION = b"TGPT", 2
ARTIFACT_PREFIX = struct.Struct("<4sHH32s")
STREAMS = ("trits", "scales", "tables", "controls")
STREAM_LENGTHS = struct.Struct("<4I")
LARGEST_EXPANSION = 20_000  # bytes of float32 weights for a byte of artifact: 18 if trained, some 10,000 if all zeros

class ArtifactError(UserError):
    """The bytes are not a whole, valid artifact."""

class Piece(NamedTuple):
    """A run of symbols of one stream that share a probability table."""

    stream: str
    context: Any  # parameters of one shape share their tables
    length: int

def form_of(module: nn.Module, role: Role) -> Any:
    return module.form if role.storage == "table" else CONTROL

def pieces(module: nn.Module, p: Tensor, role: Role) -> list[Piece]:
    """What a parameter puts into the streams, ternary codes apart."""
    if role.storage == "ternary":
        count, wide = p.numel() // module.group_size, module.form.storage != "e4m3"
        return [Piece("scales", tuple(p.shape), count), *[Piece("scales", "low", count)] * wide]
    return [Piece(role.storage + "s", *run) for run in form_of(module, role).counts(tuple(p.shape))]

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
    half = bits.astype(np.uint32) << 16 if storage == "bf16" else bits.view(np.float16)
    return torch.from_numpy(half.view(np.float32) if storage == "bf16" else half.astype(np.float32))[:, None]

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

class Codec(NamedTuple):
    """How the streams' symbols become bytes and come back. CODECS (section 12) has them by ARTIFACT_CODEC."""

    pack: Callable[[list[np.ndarray], Layout], list[bytes]]
    unpack: Callable[[list[bytes], Layout], list[np.ndarray]]  # ArtifactError unless they hold exactly those symbols
    auto: bool = False  # ARTIFACT_CODEC=auto tries it

def model_symbols(model: GPT, cfg: Config) -> list[np.ndarray]:
    """The four streams' symbols, uint8; UserError if a weight is not finite."""
    streams: dict[str, list[np.ndarray]] = {name: [] for name in STREAMS}
    for name, module, p, role in saved_parameters(model):
        w, ternary = p.detach().float(), role.storage == "ternary"
        if not torch.isfinite(w if ternary else w.half()).all():
            raise UserError(f"training diverged: {name} is not finite; try a lower MATRIX_LR={cfg.matrix_lr}")
        if ternary:
            codes, scale = module.ternarized()
            streams["trits"].append(codes.to(torch.uint8).add_(1).flatten().numpy())
        own = scale_symbols(scale, module.form.storage) if ternary else form_of(module, role).symbols(w)
        for piece, symbols in zip(pieces(module, p, role), own, strict=True):
            streams[piece.stream].append(symbols)
    return [np.concatenate(streams[name] or [np.empty(0, np.uint8)]) for name in STREAMS]

def save_artifact(model: GPT, cfg: Config, done: Callable[[float], None] = nothing) -> bytes:
    """The trained model as bytes; the same weights give the same bytes (codecs with LZMA or zstd: with the same
    library).

    `auto` keeps the codec with the fewest bytes among those whose bytes decode to the same symbols. UserError if a
    weight is not finite; ValueError for a model from an artifact, whose groups would get other scales.
    """
    if any(getattr(module, "frozen", False) for module in model.modules()):
        raise ValueError("the model is an artifact's, whose bytes are there: expected one that was trained")
    model = model if next(model.parameters()).device.type == "cpu" else copy.deepcopy(model).cpu()
    layout, symbols, chosen = Layout(model), model_symbols(model, cfg), cfg.artifact_codec
    codecs = {name: codec for name, codec in CODECS.items() if (codec.auto if chosen == "auto" else name == chosen)}
    packed: dict[str, list[bytes]] = {}

    def pack(name: str) -> None:
        packed[name] = codecs[name].pack(symbols, layout)
        done(len(packed) / (len(codecs) + 1))

    with ThreadPoolExecutor() as pool:  # LZMA and numpy release the interpreter
        list(pool.map(pack, codecs))
    for name in sorted(codecs, key=lambda name: sum(map(len, packed[name]))):
        if all(np.array_equal(*two) for two in zip(symbols, codecs[name].unpack(packed[name], layout), strict=True)):
            break
    else:
        raise AssertionError(f"no codec of {[*codecs]} gives the symbols back")
    settings = cfg.stored_settings() | {"codec": name, "temperature": repr(model.temperature.item())}
    header = "\n".join(f"{k}={v}" for k, v in settings.items()).encode()
    body = header + STREAM_LENGTHS.pack(*map(len, packed[name])) + b"".join(packed[name])
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
        batches = {"TRAIN_BATCH_TOKENS": settings["TRAIN_SEQ_LEN"], "SLIDING_EVAL_STRIDE": "1"}
        cfg = Config.from_env(UNSAID | settings | batches)
        lengths = STREAM_LENGTHS.unpack_from(body, header_length)
    except (ValueError, KeyError, struct.error) as error:
        raise ArtifactError(f"the artifact's header is not valid: {error}") from None
    if codec not in CODECS or settings.keys() != cfg.stored_settings().keys():
        raise ArtifactError("the artifact's header is not valid: not the model settings and codec of this version")
    if not 0.5 <= temperature <= 2:
        raise ArtifactError(f"the artifact's temperature is {temperature}: expected 0.5 to 2")
    ends = [header_length + STREAM_LENGTHS.size + n for n in itertools.accumulate((0, *lengths))]
    if ends[-1] != len(body):
        raise ArtifactError("the artifact's stream lengths do not add up")
    return Container(cfg, codec, temperature, [bytes(body[a:b]) for a, b in itertools.pairwise(ends)])

def load_artifact(blob: bytes, precision: str = "auto", compile_mode: str = "default") -> tuple[GPT, Config]:
    """A fresh, frozen model on the CPU, computing as a CPU does best, and its config (model settings from the artifact,
    the rest defaults but for these two).

    ArtifactError (a ValueError) for anything that is not a whole, valid artifact; no code in it can run.
    """
    cfg, codec, temperature, streams = read_container(blob)
    cfg = dataclasses.replace(cfg, precision=precision, compile_mode=compile_mode)
    with torch.device("meta"):  # shapes only: what the header claims is checked before anything is allocated
        layout = Layout(GPT(cfg))
    if 4 * layout.params > LARGEST_EXPANSION * len(blob):
        raise ArtifactError(f"the artifact's header claims {layout.params} parameters: {len(blob)} bytes hold fewer")
    symbols = CODECS[codec].unpack(streams, layout)
    model = GPT(cfg).use(fast_ops(cfg, torch.device("cpu")))
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
            w.copy_(torch.from_numpy(take("trits", p.numel())).view_as(w)).sub_(1)
            w.mul_(stored_scales(own, module.form.storage))
        else:
            p.data.copy_(form_of(module, role).restore(own, p.shape))
        if not torch.isfinite(p).all():
            raise ArtifactError(f"{name} is not finite in the artifact")
        p.requires_grad_(False)
        if isinstance(module, QuantizedLinear):
            module.frozen = True
    assert at == {name: len(stream) for name, stream in streams.items()}


# ---- 9 Evaluation ----------------------------------------------------------------------------------------------------
# A model and the validation tokens in; nats per token and bits per byte out. One function for every stride.

def load_tokenizer(path: str) -> Any:
    """A SentencePieceProcessor; UserError unless the file is a SentencePiece model."""
    from sentencepiece import SentencePieceProcessor

    with readable():
        found = Path(path).is_file()
    if not found:
        raise UserError(f"TOKENIZER_PATH={path!r}: no such file; expected a SentencePiece model")
    try:
        return SentencePieceProcessor(model_file=path)
    except (RuntimeError, OSError):
        raise UserError(f"TOKENIZER_PATH={path!r}: not a SentencePiece model") from None

class ByteTable(NamedTuple):
    """UTF-8 bytes that each token adds to the decoded text of its document."""

    size: Tensor  # (V,) bytes of the piece; 0 for control and unknown tokens
    space: Tensor  # (V,) bool: the piece begins with the meta space, which decoding drops at the start of a document
    edge: Tensor  # (V,) bool: a document starts after this token (control and unknown tokens)

    @classmethod
    def load(cls, tokenizer_path: str, vocab_size: int) -> ByteTable:
        """From a SentencePiece model; UserError unless it is one and has `vocab_size` pieces."""
        sp = load_tokenizer(tokenizer_path)
        if sp.vocab_size() != vocab_size:
            name = f"TOKENIZER_PATH={tokenizer_path!r}"
            raise UserError(f"{name} has {sp.vocab_size()} pieces, but VOCAB_SIZE={vocab_size}")
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

    def count_text(self, sp: Any, text: str) -> int:
        """Bytes of a document of this text, as the tokenizer encodes it."""
        ids = torch.tensor([sp.bos_id(), *sp.encode(text)])
        return int(self.count(ids[:-1], ids[1:]).sum())

def read_manifest(data_path: str) -> dict[str, Any]:
    """What tools/prepare_data.py noted beside the shards; {} where there is no manifest.json. UserError if damaged."""
    path = Path(data_path) / "manifest.json"
    with readable():
        text = path.read_bytes() if path.is_file() else b"{}"
    try:
        manifest = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON ({error})") from None
    if not isinstance(manifest, dict):
        raise UserError(f"{path}: expected a JSON object, found {type(manifest).__name__}")
    return manifest

def check_tokenizer(cfg: Config, manifest: dict[str, Any]) -> str:
    """SHA-256 of the tokenizer; UserError if the shards were made by another one."""
    with readable():
        digest = hashlib.sha256(Path(cfg.tokenizer_path).read_bytes()).hexdigest()
    files = manifest.get("files") if isinstance(manifest.get("files"), dict) else {}
    made_by = manifest.get("tokenizer_sha256") or files.get("tokenizer.model", digest)
    if digest != made_by:
        shards = f"the shards in DATA_PATH={cfg.data_path!r} were made by {ascii(str(made_by)[:12])[1:-1]}..."
        raise UserError(f"TOKENIZER_PATH={cfg.tokenizer_path!r} has the SHA-256 {digest[:12]}..., but {shards}")
    return digest

class ValidationSet(NamedTuple):
    """The validation split as one stream: target i is tokens[i + 1]."""

    tokens: Tensor  # (num_targets + 1,) int64 on the device
    num_bytes: int  # of all targets: of the text that went into the tokenizer
    decoded_bytes: int = 0  # of the text that comes out of it
    tokenizer_sha256: str = ""
    notes: tuple[str, ...] = ()  # what the log says about the bytes

    @classmethod
    def load(cls, cfg: Config, world: World) -> ValidationSet:
        stream = TokenStream(cfg, "val")
        count = min(stream.num_tokens, cfg.val_max_tokens + 1 if cfg.val_max_tokens else stream.num_tokens)
        if count < 2:
            raise UserError(f"DATA_PATH={cfg.data_path!r}: {count} token to validate on; expected at least 2")
        table, manifest = ByteTable.load(cfg.tokenizer_path, cfg.vocab_size), read_manifest(cfg.data_path)
        digest, tokens = check_tokenizer(cfg, manifest), torch.from_numpy(stream.read(0, count).astype(np.int64))
        decoded = int(table.count(tokens[:-1], tokens[1:]).sum())
        if noted := document_bytes(cfg, manifest):
            num_bytes, notes = input_bytes(cfg, stream, table, tokens, noted), []
            if num_bytes != decoded:
                changed = f"{num_bytes} bytes went in, {decoded} come out"
                notes = [f"the tokenizer changes the text: {changed}; bits are per byte that went in"]
        else:
            num_bytes, notes = decoded, unproven_bytes(cfg, table, tokens, manifest)
        if num_bytes < 1:
            raise UserError(f"DATA_PATH={cfg.data_path!r}: the {count - 1} tokens to validate on stand for 0 bytes")
        return cls(tokens.to(world.device), num_bytes, decoded, digest, tuple(notes))

    @property
    def num_targets(self) -> int:
        return len(self.tokens) - 1

def document_bytes(cfg: Config, manifest: dict[str, Any]) -> list[int]:
    """UTF-8 bytes of each validation document before the tokenizer, as noted with the shards; [] if they were not."""
    val = manifest.get("val")
    noted = val.get("document_bytes", []) if isinstance(val, dict) else []
    if not isinstance(noted, list) or not all(type(n) is int and n >= 0 for n in noted):
        where = f"DATA_PATH={cfg.data_path!r}: manifest.json: val.document_bytes"
        raise UserError(f"{where}: expected a list of whole numbers")
    return noted

def input_bytes(cfg: Config, stream: TokenStream, table: ByteTable, tokens: Tensor, noted: list[int]) -> int:
    """Bytes of the text that went into the tokenizer and became `tokens`, the first of the stream; `noted`: of each
    document. Of the document that VAL_MAX_TOKENS cuts, if any, it is the cut's share by the decoded bytes."""
    bos, whole = load_tokenizer(cfg.tokenizer_path).bos_id(), tokens
    while len(whole) < stream.num_tokens and not (whole[len(tokens) :] == bos).any():  # the last document to its end
        more = stream.read(len(whole), min(2**16, stream.num_tokens - len(whole)))
        whole = torch.cat([whole, torch.from_numpy(more.astype(np.int64))])
    starts = (whole == bos).nonzero().flatten().tolist()
    end = next((start for start in starts if start >= len(tokens)), len(whole))
    starts = [start for start in starts if start < len(tokens)]
    cut = len(tokens) < stream.num_tokens
    if not starts or starts[0] or not (len(starts) <= len(noted) if cut else len(starts) == len(noted)):
        found = f"{len(starts)} documents, the first at token {starts[0] if starts else 'none'}"
        expected = f"expected what manifest.json notes, {len(noted)} from token 0 on"
        raise UserError(f"DATA_PATH={cfg.data_path!r}: the validation shards hold {found}; {expected}")
    *complete, last = noted[: len(starts)]
    share = whole[starts[-1] : end]
    decoded, scored = table.count(share[:-1], share[1:]), len(tokens) - starts[-1] - 1
    fraction = int(decoded[:scored].sum()) / max(1, int(decoded.sum())) if scored < len(decoded) else 1
    return sum(complete) + round(last * fraction)

def unproven_bytes(cfg: Config, table: ByteTable, tokens: Tensor, manifest: dict[str, Any]) -> list[str]:
    """What to say where only the decoded text's bytes are known; UserError where they cannot be those of the input."""
    sp, name = load_tokenizer(cfg.tokenizer_path), f"TOKENIZER_PATH={cfg.tokenizer_path!r}"
    wanted = "expected shards whose manifest.json holds document_bytes (tools/prepare_data.py)"
    if sp.unk_id() >= 0 and (unknown := int((tokens == sp.unk_id()).sum())):
        raise UserError(f"{name}: {unknown} validation tokens are unknown pieces, whose bytes nobody knows; {wanted}")
    probes = [text for text in ("a", "a b", "a  b\n \ufb01") if sp.unk_id() not in sp.encode(text)]
    counts = {text: table.count_text(sp, text) for text in probes}
    for text, counted in counts.items():
        if counted != len(text) and text in ("a", "a b"):
            raise UserError(f"{name}: the text {text!r} counts as {counted} bytes, it has {len(text)}; {wanted}")
    notes = [] if manifest else ["warning: no manifest.json beside the shards: is the tokenizer theirs?"]
    if counts.get("a  b\n \ufb01", 9) != 9:
        notes.append("the tokenizer normalizes; bits are per byte that comes out of it, as on the leaderboard")
    return notes

def window_plan(num_targets: int, seq_len: int, stride: int) -> tuple[np.ndarray, np.ndarray]:
    """(start, first scored position) of each window; the scored spans tile [0, num_targets) exactly once.

    Windows end every `stride` targets, the last one at the last target; each is as long as the text before its end
    allows.
    """
    ends = np.minimum(np.arange(seq_len, max(num_targets, seq_len) + stride, stride), num_targets)
    ends = ends[: 1 + int(np.searchsorted(ends, num_targets))]  # the first window that reaches the end is the last one
    starts = np.maximum(ends - seq_len, 0)
    return starts, np.concatenate(([0], ends[:-1])) - starts

def score_windows(model: GPT, x: Tensor, y: Tensor, tail: int, temperature: Tensor) -> Tensor:
    """Nats of the last `tail` targets of each window: (B, T), (B, T) -> (B, tail); the head runs on these alone."""
    return model.ops.nats(model, model.hidden(x, tail=tail), y[:, -tail:], temperature.view(1))[0]

@torch.no_grad()
def evaluate(model: GPT, val: ValidationSet, cfg: Config, world: World, stride: int = 0,
             done: Callable[[float], None] = nothing) -> tuple[float, float]:  # fmt: skip
    """(nats per token, bits per byte) of the validation split, every target scored once.

    Without a stride: chunked, temperature 1. With one: sliding windows, the model's temperature. `done` is told the
    share of this process's windows that is scored; on a GPU, that is queued.
    """
    return within_memory(cfg, lambda cfg: score_targets(model, val, cfg, world, stride, done))

@torch.no_grad()
def score_targets(model: GPT, val: ValidationSet, cfg: Config, world: World, stride: int,
                  done: Callable[[float], None]) -> tuple[float, float]:  # fmt: skip
    """`evaluate`, MICRO_BATCH_TOKENS at a time."""
    chunked = not stride
    seq_len, stride = (cfg.train_seq_len, cfg.train_seq_len) if chunked else (cfg.score_window, stride)
    temperature = torch.ones_like(model.temperature) if chunked else model.temperature
    starts, firsts = (torch.from_numpy(a).to(world.device) for a in window_plan(val.num_targets, seq_len, stride))
    per_step = cfg.val_batch_size // world.size if chunked else cfg.sliding_batch_size * seq_len
    room = 4 if world.device.type == "cuda" else 1  # without gradients more fits
    per_step = min(per_step, cfg.micro_batch_tokens * room)
    mine = slice(1 + world.rank, None, world.size)
    # the first window scores all its targets, the others at most `stride`; it is not worth a compilation
    jobs = [(starts[:1], firsts[:1], seq_len, score_windows)] * world.is_main
    jobs.append((starts[mine], firsts[mine], stride, compiled(score_windows, cfg, world)))
    positions = torch.arange(seq_len + 1, device=world.device)

    @torch.no_grad()  # which holds for its own thread alone
    def nats_and_targets(batch: tuple) -> Tensor:
        start, first, tail, score, size = batch
        missing = size - len(start)  # the last batch is filled up, so that shapes stay static
        start, first = F.pad(start, (0, missing)), F.pad(first, (0, missing), value=seq_len)
        index = start[:, None] + positions
        windows = val.tokens[index.clamp_max(val.num_targets)]
        nats = score(model, windows[:, :-1].contiguous(), windows[:, 1:].contiguous(), tail, temperature)
        scored = ((positions[:-1] >= first[:, None]) & (index[:, 1:] <= val.num_targets))[:, -tail:]
        return torch.stack((nats.double().mul(scored).sum(), scored.sum()))

    batches = []
    for job_starts, job_firsts, *how in jobs:
        size = min(max(1, per_step // seq_len), len(job_starts))
        parts = zip(job_starts.split(size or 1), job_firsts.split(size or 1), strict=True)
        batches += [(*part, *how, size) for part in parts if size]
    totals = torch.zeros(2, dtype=torch.float64, device=world.device)
    pool = threads_for(world.device, len(batches))
    for i, part in enumerate((pool.map if pool else map)(nats_and_targets, batches)):
        totals += part
        done((i + 1) / len(batches))
    nats, targets = world.sum_(totals).tolist()
    assert targets == val.num_targets
    return nats / targets, nats / math.log(2) / val.num_bytes

CALIBRATION_TOKENS = 65_536
TEMPERATURES = (0.85, 0.9, 0.95, 1.0, 1.05, 1.1, 1.15)

@torch.no_grad()
def calibrate_temperature(model: GPT, x: Tensor, y: Tensor, world: World) -> float:
    """The logits' best divisor on training tokens, at positions with at least half a window before them, as in the
    sliding score. The grid's minimum, refined by the parabola through its neighbours."""
    grid = torch.tensor(TEMPERATURES, device=x.device)
    step, half = max(1, model.cfg.micro_batch_tokens // x.size(1)), x.size(1) // 2

    @torch.no_grad()  # which holds for its own thread alone
    def summed_nats(i: int) -> Tensor:
        h, targets = model.hidden(x[i : i + step])[:, half:], y[i : i + step, half:]
        return model.ops.nats(model, h, targets, grid).sum((1, 2), dtype=torch.float64)

    first = range(0, len(x), step)
    pool = threads_for(x.device, len(first))
    nats = sum((pool.map if pool else map)(summed_nats, first))
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


# ---- 10 Report -------------------------------------------------------------------------------------------------------
# What the log says about the run.

def git_commit() -> str:
    """The commit that the file stands at, "+" if it was changed since; "unknown" if git does not track it."""
    git = ["git", "-C", str(Path(__file__).resolve().parent)]
    try:
        subprocess.run([*git, "ls-files", "--error-unmatch", "--", __file__], capture_output=True, check=True)
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", __file__], check=False).returncode
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head + "+" * bool(changed)

def gpu_name(world: World) -> str:
    return torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else "none"

def log_start(cfg: Config, world: World, log: Log, said: Sources, notes: tuple[str, ...]) -> None:
    """The source, the versions and the resolved config: a run is reproduced from its log alone."""
    log(Path(__file__).read_bytes().decode(), console=False)  # bytes: line ends as they are
    log(f"python:{platform.python_version()} torch:{torch.__version__} numpy:{np.__version__} "
        f"device:{world.device.type} gpu:{gpu_name(world)} threads:{torch.get_num_threads()} "
        f"precision:{compute_dtype(cfg.precision, world.device)}")
    log("config " + json.dumps(dataclasses.asdict(cfg)), console=False)
    for line in (*said.lines(cfg), *notes):
        log(line)

def count_parameters(model: GPT) -> tuple[int, int]:
    """(all, ternary) weights that are trained and saved."""
    sizes = [(p.numel(), role.storage) for _, _, p, role in saved_parameters(model)]
    return sum(n for n, _ in sizes), sum(n for n, storage in sizes if storage == "ternary")

def save_bytes(blob: bytes, cfg: Config, log: Log) -> str:
    """Write the artifact. The file that holds it: ARTIFACT_PATH or, where it cannot be written any more, one beside the
    log or in the folder for temporary files."""
    name = f"{log.path.stem}.ternary.ptz"
    for path in (Path(cfg.artifact_path), log.path.with_name(name), Path(tempfile.gettempdir()) / name):
        try:
            write_whole(path, blob, keep=True)
            return str(path)
        except OSError as error:
            log.warn(f"the artifact cannot be written to {path} ({error.strerror})")
    raise UserError(f"ARTIFACT_PATH={cfg.artifact_path!r}: cannot be written, nor can a file elsewhere")

def log_artifact(blob: bytes, path: str, model: GPT, log: Log) -> dict[str, Any]:
    """Sizes against the budget: the artifact and the file that ran."""
    code = Path(__file__).read_bytes()
    params, ternary = count_parameters(model)
    container = read_container(blob)
    packed = [len(data) for data in container.streams]
    total = len(blob) + len(code)
    log(f"artifact:{len(blob) / 1e6:.2f}MB ternary:{ternary}({packed[0] + packed[1]}B) "
        f"fp:{params - ternary}({packed[2] + packed[3]}B) code:{len(code)} codec:{container.codec} path:{path}")
    verdict = "FITS" if total <= BUDGET_BYTES else "OVER"
    log(f"budget:{total}/{BUDGET_BYTES} ({total / 1e6:.2f}/{BUDGET_BYTES / 1e6:.2f}MB) {verdict}")
    return {"params": params, "ternary_params": ternary, "artifact_bytes": len(blob), "code_bytes": len(code),
            "total_bytes": total, "codec": container.codec, "stream_bytes": dict(zip(STREAMS, packed, strict=True)),
            "code_sha256": hashlib.sha256(code).hexdigest(), "artifact_path": path}

class StepReport:
    """The losses so far, and their log lines: the first five steps, then every TRAIN_LOG_EVERY or, if it is 0, one each
    five seconds. Every process stops at a loss that is not finite."""

    def __init__(self, cfg: Config, log: Log) -> None:
        self._cfg, self._log, self._next_s = cfg, log, 0.0
        self.step, self.first_losses, self.saved = 0, [], ""  # saved: the last checkpoint, for a run that diverges
        self.loss, self.logged = math.nan, 0  # the last one, and the step of the last line

    def __call__(self, loss: float, elapsed_s: float, shares: Callable = list) -> None:
        self.step, self.loss = self.step + 1, loss
        if self.step <= 20:
            self.first_losses.append(loss)
        cfg, step, ms = self._cfg, self.step, 1000 * elapsed_s
        if not math.isfinite(loss):
            bad = ", ".join(str(rank) for rank, share in enumerate(shares()) if not math.isfinite(share))
            rates = f"MATRIX_LR={cfg.matrix_lr}, SCALAR_LR={cfg.scalar_lr} or TIED_EMBED_LR={cfg.tied_embed_lr}"
            where = f"at step {step}" + f" on rank {bad}" * (len(shares()) > 1)
            raise UserError(f"training diverged: loss or gradient {loss} {where}; try a lower {rates}{self.saved}")
        if step <= 5 or (step % cfg.train_log_every == 0 if cfg.train_log_every else elapsed_s >= self._next_s):
            self._log(f"step:{step}/{cfg.iterations} loss:{loss:.4f} t:{ms:.0f}ms avg:{ms / step:.1f}ms")
            self._next_s, self.logged = elapsed_s + 5, step

def validation_line(cfg: Config, step: int, scores: tuple[float, float], elapsed_s: float) -> str:
    scored = f"val_loss:{scores[0]:.4f} val_bpb:{scores[1]:.4f}"
    return f"step:{step}/{cfg.iterations} {scored} train_time:{1000 * elapsed_s:.0f}ms"

def score_artifact(model: GPT, val: ValidationSet, cfg: Config, world: World, log: Log) -> dict[str, Any]:
    """The reported scores of a reloaded model: chunked, then sliding."""
    result: dict[str, Any] = {"val_tokens": val.num_targets, "val_bytes": val.num_bytes, "stride": cfg.score_stride,
                              "decoded_bytes": val.decoded_bytes, "tokenizer_sha256": val.tokenizer_sha256}
    clock = Clock(world)
    loss, bpb = evaluate(model, val, cfg, world, done=log.view.phase("chunked score"))
    log(f"final_ternary_roundtrip val_loss:{loss:.4f} val_bpb:{bpb:.4f} eval_time:{1000 * clock.finish():.0f}ms")
    result |= {"roundtrip_val_loss": loss, "roundtrip_val_bpb": bpb, "sliding_val_loss": None, "sliding_val_bpb": None}
    if cfg.sliding_eval:
        sliding = Clock(world)
        loss, bpb = evaluate(model, val, cfg, world, cfg.score_stride, log.view.phase("sliding score"))
        log(f"final_sliding val_loss:{loss:.4f} val_bpb:{bpb:.4f} (stride={cfg.score_stride}, "
            f"T={model.temperature.item():.2f}) eval_time:{1000 * sliding.finish():.0f}ms")
        result |= {"sliding_val_loss": loss, "sliding_val_bpb": bpb}
    return result | {"temperature": model.temperature.item(), "eval_time_s": clock.finish()}


# ---- 11 Hardware (kernels) -------------------------------------------------------------------------------------------
# What a machine does best: the same mathematics as plain PyTorch, and tested against it.

# What KERNELS switches: names of operations of the table
KERNELS = {"matmul": ("matmul", "normed_matmul", "lookup"), "norm": ("rms_norm",), "qk": ("qk_norm_rope",),
           "attention": ("attend",), "mlp": ("mlp",), "loss": ("loss",), "score": ("nats",)}  # fmt: skip
RULES.append(("kernels", lambda c: kernels_wanted(c) <= KERNELS.keys(), f"auto, off or some of {','.join(KERNELS)}"))

def kernels_wanted(cfg: Config) -> set[str]:
    return {"auto": set(KERNELS), "off": set()}.get(cfg.kernels, set(cfg.kernels.split(",")))

def fast_ops(cfg: Config, device: torch.device) -> Ops:
    """How this device computes a model of `cfg`, as far as KERNELS allows."""
    return without(device_ops(cfg, device), KERNELS.keys() - kernels_wanted(cfg))

def without(ops: Ops, names: Collection[str]) -> Ops:
    """With the operations under these names of KERNELS computed plainly."""
    return ops._replace(**{field: getattr(Ops(), field) for name in names for field in KERNELS.get(name, ())})

def device_ops(cfg: Config, device: torch.device) -> Ops:
    """What computes a model of `cfg` fastest here."""
    dtype = compute_dtype(cfg.precision, device)
    ops = Ops(matmul=StoredMatmul.apply, normed_matmul=normed_stored_matmul, lookup=StoredLookup.apply)
    if device.type != "cuda":
        if dtype != torch.float32:
            return ops
        ops = ops._replace(
            rms_norm=RowNorm.apply, normed_matmul=row_normed_matmul, qk_norm_rope=RowQKNormRope.apply,
            attend=attend if cfg.attention_window else block_attend, mlp=row_mlp,
        )  # fmt: skip
        chunks = plain_logits(cfg) and cfg.softcap_type == "poly"
        return ops._replace(loss=chunked_loss, nats=chunked_nats) if chunks else ops
    # PyTorch's attention in slices takes 16 bits and compute capability 8 for keys that several query heads share
    shares = dtype.itemsize == 2 and (bool(torch.version.hip) or capability(device) >= (8, 0))
    ops = ops._replace(attend=flash_attention_3(cfg) or (attend if shares else unshared_attend))
    if dtype != torch.float16:  # whose 65504 might not hold a product before its norm
        ops = ops._replace(normed_matmul=NormedMatmul.apply)
    return kernel_ops(cfg, ops) if kernels_run(device, dtype) else ops

def kernel_ops(cfg: Config, ops: Ops) -> Ops:
    """With what Triton's kernels take over."""
    fits = plain_logits(cfg) and cfg.vocab_size <= 16_384  # a row of logits in a program's registers
    return ops._replace(qk_norm_rope=QKNormRope.apply, mlp=fused_mlp, loss=fused_loss if fits else ops.loss)

def plain_logits(cfg: Config) -> bool:
    """Whether logits come from a table, and their exponentials need no maximum taken out."""
    return cfg.logit_head_type == "standard" and cfg.logit_softcap <= 60

# Before the clock starts, each fast operation is compared here with the plain one, at the run's own shapes: values and
# every gradient. Then the compiled training loss, gradient by gradient, and the compiled score. What raises, hangs or
# differs is switched off alone.

class Bound(NamedTuple):
    """How far an operation may be from the plain one."""

    error: float  # root mean square of the difference, relative
    factor: float  # how far their common factor may be from 1

# Rounding makes some units in the last place of `error`, and hardly any of `factor`, since it goes up as often as down
BOUNDS = {torch.float32: Bound(1e-4, 1e-4), torch.float16: Bound(1e-2, 5e-3), torch.bfloat16: Bound(3e-2, 1e-2)}
EIGHT_BITS = Bound(0.2, 1.5e-2)
DEADLINE_S = 300  # for an operation or a graph, with what it compiles

class Differs(Exception):
    """A fast operation is not the plain one."""

class Checked(NamedTuple):
    """What a run computes with, and why."""

    ops: Ops
    cfg: Config  # KERNELS without what is off; COMPILE_MODE=none where the compiled graph is at fault
    report: dict[str, Any]  # for the result line

class Machine:
    """What a run computes with and within. Made first of all: the seconds up to there are those of the imports."""

    def __init__(self) -> None:
        keep_freed_memory()
        self.imported_s = since_launch_s()

    @staticmethod
    def fit(cfg: Config, world: World, said: Sources) -> Config:
        """On a GPU, unless it is set: the largest MICRO_BATCH_TOKENS of 65,536, 32,768, ... for 4/5 of free memory."""
        if world.device.type != "cuda" or "MICRO_BATCH_TOKENS" in said.user | said.preset:
            return cfg
        with torch.device("meta"):
            params, _ = count_parameters(GPT(cfg))
        free = torch.tensor([torch.cuda.mem_get_info(world.device)[0]], device=world.device)
        room = 0.8 * min(world.gather(free).tolist()) - 20 * params  # weights, gradients and moments in float32
        tokens = cfg.micro_batch_tokens
        while tokens > cfg.train_seq_len and tokens * bytes_per_token(cfg, world.device) > room:
            tokens //= 2
        return dataclasses.replace(cfg, micro_batch_tokens=max(tokens, cfg.train_seq_len))

    def check(self, cfg: Config, world: World, log: Log) -> Config:
        """Chooses `fast_ops` without what fails the self-check, which runs on a GPU and, with KERNELS_STRICT=1, on a
        CPU; says what the start took. Returns the config as it can be kept."""
        loaded_s, clock = since_launch_s(), Clock(world)
        checked = Checked(fast_ops(cfg, world.device), cfg, {"kernels": {}, "kernels_off": {}})
        if world.device.type != "cpu" or cfg.kernels_strict:
            passed = passed_before(cfg, world)
            if world.agree(passed.is_file()):
                log(f"self_check: passed before ({passed})")
                checked = checked._replace(report=json.loads(passed.read_bytes()) if world.is_main else {})
            else:
                checked = SelfCheck(cfg, world, log).run(checked.ops)
                errors = " ".join(f"{name}:{error:.1e}" for name, error in checked.report["kernels"].items())
                log(f"self_check:{1000 * clock.finish():.0f}ms largest differences {errors}")
                if world.is_main and not checked.report["kernels_off"]:
                    with contextlib.suppress(OSError):
                        write_whole(passed, json.dumps(checked.report).encode())
        self.ops, cfg, report = checked
        self.report = report | {"attention": attention_name(cfg, self.ops, world.device)}
        fast = [name for name in KERNELS if without(self.ops, [name]) != self.ops]
        log(f"kernels:{','.join(fast) or 'off'} attention:{self.report['attention']}")
        times = itertools.pairwise([0.0, self.imported_s, loaded_s, since_launch_s()])
        log("setup imports:{:.0f}ms data:{:.0f}ms self_check:{:.0f}ms".format(*(1000 * (b - a) for a, b in times)))
        self.attention = attention_backends(world.device, kernels_wanted(cfg))
        return cfg

    @contextlib.contextmanager
    def training(self, cfg: Config, world: World) -> Iterator[None]:
        """Within it, too little memory is a UserError that names the setting to lower."""
        try:
            yield
        except torch.OutOfMemoryError as error:
            too_much = f"MICRO_BATCH_TOKENS={cfg.micro_batch_tokens}: too much for the memory of {gpu_name(world)}"
            raise UserError(f"{too_much}; expected fewer ({str(error).splitlines()[0]})") from None

    def figures(self, world: World) -> dict[str, Any]:
        """Of the machine, for the result line."""
        return {"device": world.device.type, "world_size": world.size, "gpu_name": gpu_name(world),
                "peak_memory_bytes": peak_memory_bytes(world.device), "torch_version": torch.__version__}  # fmt: skip

def attention_name(cfg: Config, ops: Ops, device: torch.device) -> str:
    """What computes attention; of PyTorch's own, which of them."""
    name = {"flash": "FlashAttention-3", "block_attend": "blocks"}.get(ops.attend.__name__, "PyTorch SDPA")
    if device.type == "cuda" and name == "PyTorch SDPA":
        like = torch.empty(0, dtype=compute_dtype(cfg.precision, device), device=device)
        kv_heads = cfg.num_heads if ops.attend is unshared_attend else cfg.num_kv_heads
        q, k = (like.new_empty(1, n, cfg.train_seq_len, cfg.head_dim) for n in (cfg.num_heads, kv_heads))
        # the question is no public one
        with contextlib.suppress(Exception), attention_backends(device, kernels_wanted(cfg)):
            choice = torch._fused_sdp_choice(q, k, k, is_causal=True, enable_gqa=q.size(1) != k.size(1))
            name += f" {('math', 'FlashAttention-2', 'memory-efficient', 'cuDNN')[choice]}"
    return name

def passed_before(cfg: Config, world: World) -> Path:
    """The file that says that this code has passed with these settings, on this kind of device, with these versions."""
    device = torch.cuda.get_device_properties(world.device) if world.device.type == "cuda" else platform.machine()
    settings = cfg.model_settings(), cfg.kernels, cfg.precision, cfg.compile_mode, cfg.score_stride
    key = Path(__file__).read_bytes(), settings, batch_layout(cfg, world.size), str(device), versions()
    return Path("data/compile_cache") / f"passed_{hashlib.sha256(repr(key).encode()).hexdigest()[:24]}.json"

def versions() -> list[str]:
    """Of libraries and NVIDIA's driver; what cannot be told, as of a cuDNN that PyTorch does not know, is no error."""
    found = [torch.__version__, str(torch.version.cuda), getattr(triton, "__version__", "")]
    for ask in (torch.backends.cudnn.version, Path("/proc/driver/nvidia/version").read_text):
        try:
            found.append(str(ask()))
        except (OSError, RuntimeError) as error:
            found.append(str(error))
    return found

class SelfCheck:
    """Compares the fast operations with the plain ones, on a model of the run's shapes with drawn weights."""

    def __init__(self, cfg: Config, world: World, log: Log) -> None:
        self.cfg, self.world, self.log = cfg, world, log
        self.bound = EIGHT_BITS if cfg.act_quant == "fp8" else BOUNDS[compute_dtype(cfg.precision, world.device)]
        self.errors: dict[str, float] = {}  # the largest of each operation
        self.off: dict[str, str] = {}  # and the reason

    def run(self, ops: Ops) -> Checked:
        torch.manual_seed(0)
        cfg, model = self.cfg, GPT(self.cfg).to(self.world.device)
        draw_zeros(model)
        _, sequences = batch_layout(cfg, self.world.size)
        x = torch.randint(cfg.vocab_size, (sequences, cfg.train_seq_len), device=self.world.device)
        with rounded_once(model):
            x, calls = self.calls(model, x)
            ops = without(self.operations(ops, calls), self.off.keys())
            with self.attempt("compile") as errors:
                errors.append(self.training_graph(model, ops, x, cfg))
            if "compile" in self.off:  # its own fault, or that of what it compiles?
                cfg = dataclasses.replace(cfg, compile_mode="none")
                with self.attempt("all") as errors:
                    errors.append(self.training_graph(model, ops, x, cfg))
            with self.attempt("compiled_score") as errors:
                for tail in {x.size(1), min(cfg.score_stride, x.size(1))}:
                    errors.append(self.score_graph(model, ops, x, cfg, tail))
            if "compiled_score" in self.off and cfg.compile_mode != "none":
                cfg = dataclasses.replace(cfg, compile_mode="training")
        if lost := KERNELS.keys() & self.off.keys() if "all" not in self.off else KERNELS.keys():
            cfg = dataclasses.replace(cfg, kernels=",".join(sorted(kernels_wanted(cfg) - lost)) or "off")
        return Checked(Ops() if "all" in self.off else ops, cfg, {"kernels": self.errors, "kernels_off": self.off})

    def operations(self, ops: Ops, calls: list[tuple[str, list]]) -> Ops:
        """Compares every call of an operation that is not the plain one; `calls` is used up, for the memory's sake.
        Where FlashAttention-3 fails, PyTorch's attention is compared in its place."""
        done, total = self.log.view.phase("self-check"), len(calls) + 3  # and the graphs, which take longest
        while calls:
            done(1 - (len(calls) + 3) / total)
            field, arguments = calls.pop()
            name = next(name for name, fields in KERNELS.items() if field in fields)
            if flash := field == "attend" and ops.attend.__name__ == "flash":
                name = "FlashAttention-3"
            fast = getattr(ops, field) is not getattr(Ops(), field) or field == "attend" and arguments[0].is_cuda
            if fast and name not in self.off:
                with self.attempt(name) as errors:
                    errors.append(self.operation(ops, field, arguments))
            if flash and name in self.off:
                ops = ops._replace(attend=attend)
                calls.append((field, arguments))
        return ops

    def calls(self, model: GPT, x: Tensor) -> tuple[Tensor, list[tuple[str, list]]]:
        """Every operation with the arguments of its first call for each of their shapes; x, or the part of it that the
        plain operations have memory for."""
        while True:
            try:
                return x, first_calls(model, x, min(self.cfg.score_stride, x.size(1)))
            except torch.cuda.OutOfMemoryError:
                if len(x) == 1:
                    raise
                x = x[: len(x) // 2]

    @contextlib.contextmanager
    def attempt(self, name: str) -> Iterator[list[float]]:
        """A check, which lists its errors; all processes together switch off what fails on one of them."""
        reason, errors = "", [self.errors.get(name, 0.0)]
        if not self.world.is_main:
            self.world.agree(0.0)  # waits, and then finds in the cache what rank 0 has compiled
        try:
            with deadline(DEADLINE_S):
                yield errors
            self.errors[name] = max(errors)
        except Exception as error:  # whatever a compiler, a driver or a library raises
            reason = f"{type(error).__name__}: {(str(error).splitlines() or ['?'])[0]}"
        if self.world.is_main:
            self.world.agree(0.0)
        if not self.world.sum_(torch.tensor(float(bool(reason)), device=self.world.device)).item():
            return
        self.off[name] = reason or "it failed on another process"
        self.errors.pop(name, None)
        if self.cfg.kernels_strict:
            raise UserError(f"KERNELS_STRICT=1: {name}: {self.off[name]}")
        what = {"compile": "runs uncompiled, slowly", "compiled_score": "runs uncompiled",
                "FlashAttention-3": "gives way to PyTorch's"}.get(name, "is computed plainly")  # fmt: skip
        self.log(f"warning: self-check: {name} {what}: {self.off[name]}")

    def attention(self, fast: bool) -> AbstractContextManager:
        """What PyTorch's attention runs on: as in the run, or in single operations."""
        device, kernels = self.world.device, kernels_wanted(self.cfg) - self.off.keys()
        return attention_backends(device, kernels) if fast else plain_attention(device)

    def operation(self, ops: Ops, field: str, arguments: list) -> float:
        """The largest error of an operation's values and gradients; Differs where one is beyond its bound."""
        fast = getattr(ops, field)
        if field == "attend":  # what cannot be part of a graph is found here
            fast = compiled(fast, self.cfg, self.world)
        with self.attention(True):
            found = values_and_gradients(fast, arguments, field != "nats")
        with self.attention(False):
            expected = values_and_gradients(getattr(Ops(), field), arguments, field != "nats")
        pairs = itertools.zip_longest(found, expected)
        return max(self.difference(f"{field}, result {i}", *pair) for i, pair in enumerate(pairs))

    def training_graph(self, model: GPT, ops: Ops, x: Tensor, cfg: Config) -> float:
        """The largest error of a parameter's gradient, of the loss compiled against plain and uncompiled."""
        results, y = [], x.roll(-1, 1)
        for kind, function in ((ops, compiled(model.parts.loss, cfg, self.world)), (Ops(), model.parts.loss)):
            with self.attention(kind is ops):
                loss, _ = function(model.use(kind), x, y, self.cfg.z_loss)
                gradients = torch.autograd.grad(loss / x.numel(), list(model.parameters()), allow_unused=True)
            results.append([loss.detach(), *gradients])
        named = zip(["loss", *(name for name, _ in model.named_parameters())], *results, strict=True)
        return max(self.difference(name, a, b, times=4) for name, a, b in named)  # errors of the layers add up

    def score_graph(self, model: GPT, ops: Ops, x: Tensor, cfg: Config, tail: int) -> float:
        """The same of the nats of the last `tail` targets of a window."""
        one, results = torch.ones((), device=x.device), []
        with torch.no_grad():
            for kind, function in ((ops, compiled_graph(score_windows, cfg, self.world)), (Ops(), score_windows)):
                with self.attention(kind is ops):
                    results.append(function(model.use(kind), x, x.roll(-1, 1), tail, one))
        return self.difference("nats of a score", *results)

    def difference(self, what: str, found: Tensor | None, expected: Tensor | None, times: float = 1.0) -> float:
        """Relative error; Differs if it, or the common factor, is beyond `times` the bound. A NaN is."""
        if found is None or expected is None:
            if found is not expected:
                raise Differs(f"{what} is {'missing' if found is None else 'none of the plain one'}")
            return 0.0
        a, b = found.detach().float(), expected.detach().float()
        square = b.square().sum(dtype=torch.float64)
        if not square:
            if not a.any():
                return 0.0
            raise Differs(f"{what} is not 0")
        factor = ((a * b).sum(dtype=torch.float64) / square).item()
        error = ((a - b).square().sum(dtype=torch.float64) / square).sqrt().item()
        if not abs(factor - 1) <= times * self.bound.factor:
            raise Differs(f"{what} is {factor:.4f} times the plain one")
        if not error <= times * self.bound.error:
            raise Differs(f"{what} is off by {100 * error:.2g} %")
        return error

@torch.no_grad()
def draw_zeros(model: nn.Module) -> None:
    """Parameters that start at 0, as output projections do, would hide what feeds them."""
    for p in model.parameters():
        if not p.any():
            p.normal_(0, 0.02)

def first_calls(model: GPT, x: Tensor, tail: int) -> list[tuple[str, list]]:
    """(operation, arguments) of the first call with arguments of these shapes, in a plain training loss and a score."""
    calls: dict[tuple, tuple[str, tuple]] = {}

    def recording(field: str, function: Callable) -> Callable:
        def call(*arguments: Any) -> Any:
            key = field, *(tuple(a.shape) for a in arguments if isinstance(a, Tensor))
            calls.setdefault(key, (field, arguments))
            return function(*arguments)

        return call

    model.use(Ops()._replace(**{field: recording(field, function) for field, function in Ops()._asdict().items()}))
    y, one = x.roll(-1, 1), torch.ones(1, device=x.device)
    with plain_attention(x.device):
        model.parts.loss(model, x, y, model.cfg.z_loss)
        with torch.no_grad():
            model.ops.nats(model, model.hidden(x, tail=tail), y[:, -tail:], one)
    return [(field, [leaf(a) for a in arguments]) for field, arguments in calls.values()]

def leaf(a: Any) -> Any:
    """A tensor without its history; where it had one, or is a parameter, gradients are followed from here."""
    if not isinstance(a, Tensor):
        return a
    own = a.detach()
    own.requires_grad = a.requires_grad
    return own

def values_and_gradients(function: Callable, arguments: list, differentiate: bool) -> list[Tensor | None]:
    """The function's results, then the gradients of a random combination of them with respect to every argument and
    parameter that has one."""
    own = [leaf(a) for a in arguments]
    wanted = [a for a in own if isinstance(a, Tensor) and a.requires_grad]
    wanted += [p for a in own if isinstance(a, nn.Module) for p in a.parameters()]
    with torch.set_grad_enabled(differentiate and bool(wanted)):
        results = function(*own)
    results = list(results) if isinstance(results, tuple) else [results]
    if not (differentiate and wanted):
        return results
    torch.manual_seed(1)
    # not randn_like, which draws in the order of the memory
    ends = [(r, torch.randn(r.shape, dtype=r.dtype, device=r.device)) for r in results if r.requires_grad]
    gradients = torch.autograd.grad([r for r, _ in ends], wanted, [g for _, g in ends], allow_unused=True)
    return [*results, *gradients]

def plain_attention(device: torch.device) -> AbstractContextManager:
    """Attention in single operations, on a GPU."""
    if device.type != "cuda":
        return contextlib.nullcontext()
    from torch.nn.attention import SDPBackend, sdpa_kernel

    return sdpa_kernel(SDPBackend.MATH)

@contextlib.contextmanager
def deadline(seconds: float) -> Iterator[None]:
    """TimeoutError if the block takes longer and runs Python, as it does while it waits for a compiler's process."""

    def late(*_: Any) -> None:
        raise TimeoutError(f"not done after {seconds:g} s")

    previous = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)

def within_memory(cfg: Config, scoring: Callable[[Config], Any]) -> Any:
    """scoring(cfg), on a GPU whose memory is too small for it again with half of MICRO_BATCH_TOKENS."""
    while cfg.micro_batch_tokens > cfg.train_seq_len:
        with contextlib.suppress(torch.OutOfMemoryError):
            return scoring(cfg)
        torch.cuda.empty_cache()
        cfg = dataclasses.replace(cfg, micro_batch_tokens=cfg.micro_batch_tokens // 2)
    return scoring(cfg)

def peak_memory_bytes(device: torch.device) -> int:
    """The most that was held at a time: of the GPU's memory, on a CPU by the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with contextlib.suppress(OSError, ValueError, IndexError):  # getrusage knows what the process was forked from, too
        return 1024 * int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

def bytes_per_token(cfg: Config, device: torch.device) -> int:
    """What the forward pass of training keeps for the backward pass, roughly: compiled, a block's input, qkv, heads and
    hidden layer, and the logits once; uncompiled, what every operation reads (by a tenth less: R018)."""
    size = compute_dtype(cfg.precision, device).itemsize
    plain = cfg.compile_mode == "none" or not compiles(device)
    kept = 5 * cfg.model_dim + 3 * cfg.num_kv_heads * cfg.head_dim + (4 if plain else 2) * cfg.mlp_dim
    logits = 24 * cfg.vocab_size if plain else 2 * size * cfg.vocab_size
    return cfg.num_layers * (2 if plain else 1) * kept * size + logits

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
    """The function, compiled on a GPU (static shapes, one graph) unless COMPILE_MODE leaves it out; as it is on a CPU.

    Nor on GPUs before compute capability 8.9: Triton has no conversion to e4m3 there. A score survives its graph.
    """
    graph = compiled_graph(function, cfg, world)
    survives = function is score_windows and graph is not function and not cfg.kernels_strict
    return surviving(graph, function) if survives else graph

def compiled_graph(function: Callable, cfg: Config, world: World) -> Callable:
    """`compiled`, with the errors of a compiler."""
    left_out = cfg.compile_mode == "none" or cfg.compile_mode == "training" and function is score_windows
    if left_out or not compiles(world.device):
        return function
    keep_compiled()
    torch._dynamo.config.recompile_limit = 32  # one graph a shape, for the trained and for the reloaded model
    mode = cfg.compile_mode if cfg.compile_mode != "training" else "default"
    return torch.compile(function, mode=mode, dynamic=False, fullgraph=True)

def surviving(graph: Callable, plain: Callable) -> Callable:
    """The graph; where it cannot be compiled for some batch, `plain` from then on: a trained model gets its score."""
    broken: list[Exception] = []

    def call(*arguments: Any) -> Any:
        if not broken:
            try:
                return graph(*arguments)
            except torch.OutOfMemoryError:  # `within_memory` has an answer
                raise
            except Exception as error:
                broken.append(error)
                reason = (str(error).splitlines() or ["?"])[0]
                print(f"warning: the score runs uncompiled: {type(error).__name__}: {reason}", file=sys.stderr)
        return plain(*arguments)

    return call

def compiles(device: torch.device) -> bool:
    return device.type == "cuda" and (bool(torch.version.hip) or capability(device) >= (8, 9))

def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability of an NVIDIA GPU, else (0, 0): under ROCm the numbers are AMD's, whose 9 is no Hopper."""
    nvidia = device.type == "cuda" and not torch.version.hip
    return torch.cuda.get_device_capability(device) if nvidia else (0, 0)

def graphs_compiled() -> int:
    """Graphs that torch.compile has made so far: none should be added once the clock runs."""
    dynamo = sys.modules.get("torch._dynamo.utils")  # not loaded: nothing was compiled, and loading it takes a second
    return dynamo.counters["stats"]["unique_graphs"] if dynamo else 0

def since_launch_s() -> float:
    """Seconds since the process was started (Linux; elsewhere 0)."""
    with contextlib.suppress(OSError):
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    return 0.0

def keep_compiled() -> None:
    """Compiled kernels go to data/compile_cache, where the next run finds them: seconds, not minutes."""
    for name in ("TORCHINDUCTOR", "TRITON"):
        os.environ.setdefault(f"{name}_CACHE_DIR", str(Path("data/compile_cache").resolve() / name.lower()))

def keep_freed_memory() -> None:
    """Let glibc keep the blocks it frees: returning them and faulting them in again costs a CPU run 11 % (R004)."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
        for option, value in ((-3, 1 << 25), (-1, 2**31 - 1), (-2, 1 << 28)):  # M_MMAP_THRESHOLD, _TRIM_, M_TOP_PAD
            mallopt(ctypes.c_int(option), ctypes.c_int(value))

def flash_attention_3(cfg: Config) -> Callable | None:
    """FlashAttention-3's function where it can run: installed, on a Hopper GPU, in 16 bits, for its head sizes."""
    hopper = torch.cuda.is_available() and capability(torch.device("cuda"))[0] == 9
    if not (hopper and cfg.precision != "fp32" and (cfg.head_dim >> cfg.diff_attn) % 8 == 0 and cfg.head_dim <= 256):
        return None
    try:
        from flash_attn_interface import flash_attn_func
    except Exception:  # it is not there, or one of its own libraries is not; PyTorch's attention runs
        return None

    def flash(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        y = flash_attn_func(q, k, v, causal=True, window_size=window)
        return y[0] if isinstance(y, tuple) else y  # early releases return the log-sum-exp too

    window = cfg.attention_window - 1, 0 if cfg.attention_window else -1
    return flash

def unshared_attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """`attend` with the keys and values of each query head, where PyTorch would hold all scores of shared ones."""
    k, v = (t.repeat_interleave(q.size(2) // t.size(2), 2) for t in (k, v))
    return attend(q, k, v, mask)

def attention_backends(device: torch.device, kernels: Collection[str] = ("attention",)) -> AbstractContextManager:
    """cuDNN's attention first on Hopper, where PyTorch takes the slower FlashAttention-2; elsewhere its choice."""
    if capability(device)[0] != 9 or "attention" not in kernels:
        return contextlib.nullcontext()
    from torch.nn.attention import SDPBackend, sdpa_kernel

    order = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    return sdpa_kernel(order, set_priority=True)

triton = None
if torch.version.cuda or "triton" in sys.modules:  # 0.4 s; without CUDA only tests import it, for its interpreter
    with contextlib.suppress(ImportError):
        import triton
        import triton.language as tl
        from triton.tools.tensor_descriptor import TensorDescriptor

jit = triton.jit if triton else lambda function: function

@functools.cache
def kernels_run(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether Triton's kernels run: 16 bits on Hopper or newer."""
    return triton is not None and dtype.itemsize == 2 and capability(device)[0] >= 9

def graph_operator(fake: Callable) -> Callable:
    """Decorator: a function with type hints as one operator, which torch.compile calls without a look inside; `fake`,
    with the same arguments, gives empty outputs."""

    def register(function: Callable) -> Callable:
        if triton is None:
            return function
        name = f"{__name__.strip('_')}::{function.__name__}"  # this file may be loaded twice, under two names
        op = torch.library.custom_op(name, function, mutates_args=())
        op.register_fake(fake)
        return op

    return register

class StoredMatmul(torch.autograd.Function):
    """x (..., in), latent and stored weight (out, in) -> x @ stored.T; the latter's gradient goes to the latent one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, latent: Tensor, stored: Tensor) -> Tensor:  # noqa: ARG004
        ctx.save_for_backward(x, stored)
        return F.linear(x, stored)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor, None]:
        x, stored = ctx.saved_tensors
        return g @ stored, weight_gradient(g.flatten(0, -2), x.flatten(0, -2)), None

def normed_stored_matmul(x: Tensor, latent: Tensor, stored: Tensor) -> Tensor:
    return StoredMatmul.apply(rms_norm(x), latent, stored)

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
    """g (N, out), x (N, in) -> g.T @ x, float32: on a GPU as the tensor cores accumulated it, unrounded."""
    if (splits := SPLIT_SUMS.get((g.size(1), x.size(1)), 0)) and kernels_run(g.device, g.dtype):
        return split_weight_gradient(g, x, splits)
    return torch.mm(g.T, x, out_dtype=torch.float32) if g.is_cuda and g.dtype != torch.float32 else g.T @ x

def pack_weights(w: Tensor, group_size: int, form: ScaleFormat) -> tuple[Tensor, Tensor]:
    """Ternary weights in a quarter of a byte each, for an exchange: (size / 4,) uint8, scales (groups, 1)."""
    codes, scale = ternarize(w, group_size, form)
    a, b, c, d = (codes + 1).to(torch.uint8).view(-1, 4).unbind(1)
    return a | b << 2 | c << 4 | d << 6, scale

def unpack_weights(out: Tensor, packed: Tensor, scale: Tensor) -> None:
    """Inverse of pack_weights, into `out`."""
    codes = torch.stack([packed >> shift & 3 for shift in (0, 2, 4, 6)], dim=1).view(len(scale), -1)
    out.copy_(((codes.float() - 1) * scale).view_as(out))

class Bank:
    """All matrices of one shape: latent weights and gradients (n, rows, columns) in one piece of memory each, n filled
    up to a multiple of the processes. Each process owns an equal run, the `shard`: it alone sums their gradients, holds
    their momentum and updates them. The others get their codes; `share_latent` is for the end.
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
        self.ternary, self._dtype = modules[0].role.storage == "ternary", compute_dtype(cfg.precision, weight.device)
        if self.ternary:
            self._pack, self._unpack = compiled(pack_weights, cfg, world), compiled(unpack_weights, cfg, world)
            self.operand = torch.zeros_like(self.latent, dtype=self._dtype)
            for module, operand in zip(modules, self.operand, strict=False):
                module.operand = operand

    @classmethod
    def build(cls, model: nn.Module, cfg: Config, world: World) -> list[Bank]:
        """A bank for each shape and kind of matrix, the largest first."""
        kinds: dict[Any, list[QuantizedLinear]] = {}
        for _, module, p, role in parameter_owners(model):
            if role.rate == "matrix_lr":
                kinds.setdefault((role, p.shape), []).append(module)
        order = sorted(kinds, key=lambda kind: -kind[1].numel() * len(kinds[kind]))
        return [cls(kinds[kind], cfg, world) for kind in order]

    def parameters(self) -> list[nn.Parameter]:
        return [module.weight for module in self.modules]

    @torch.no_grad()
    def publish(self) -> None:
        """What the shards' owners made of them, on every process: latent weights, or codes and scales."""
        if self.ternary:
            packed = self._pack(self.shard.detach(), self.modules[0].group_size, self.modules[0].form)
            self._unpack(self.operand, *(self._world.gather(part) for part in packed))
            for module in self.modules:
                module.refresh()
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
        gathered = weights // 4 + 4 * weights // self.modules[0].group_size if self.ternary else 4 * weights
        return [("reduce-scatter", 4 * weights), ("all-gather", gathered)]

def loss_operands(model: GPT, h: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    """Inputs of the output table (N, E), latent and stored table (V, E), bias (V,), targets (N,)."""
    e, weight = model.embed_out(h).flatten(0, 1), model.output.weight
    return e, weight, model.output.stored(e.dtype), as_stored(model.vocab_bias), y.flatten()

# On a CPU most of the time beside the products goes into memory: rows and queries are taken a few at a time, so that
# what lies between two products stays in the cache, and it is touched as rarely as PyTorch's operations allow.

QUERIES, SCORES = 64, 2**19  # of attention: a block's queries, and its scores at most
KEPT_SCORES = 2**27  # of a layer and micro-batch, 4 bytes each, half of which causality leaves
ROWS, LOGITS = 256, 2**19  # of an MLP's hidden layer; of the loss, at least 128 rows of them
LOG2_E = math.log2(math.e)  # exp(x) = 2^(x log2(e)), which takes PyTorch a third of the time that its exp takes

class RowNorm(torch.autograd.Function):
    """`rms_norm`, its gradient in four passes over memory."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        rho = inverse_rms(x)
        y = x * rho
        ctx.save_for_backward(y, rho)
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        y, rho = ctx.saved_tensors
        along = (g * y).sum(-1, keepdim=True).div_(y.size(-1))
        return torch.addcmul(g, y, along, value=-1).mul_(rho)

def inverse_rms(x: Tensor) -> Tensor:
    """What rms_norm multiplies by: (..., D) -> (..., 1)."""
    return torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.size(-1)).add_(1e-6).rsqrt_()

def row_normed_matmul(x: Tensor, latent: Tensor, stored: Tensor) -> Tensor:
    return StoredMatmul.apply(RowNorm.apply(x), latent, stored)

class RowQKNormRope(torch.autograd.Function):
    """`qk_norm_rope`, q and k together, head by head in memory as BlockAttention reads them."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, gain: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        ctx.heads, turned = len(gain), (len(gain) + qkv.size(2)) // 2
        x, v = qkv.split((turned, qkv.size(2) - turned), dim=2)
        rho, (cos, sin) = inverse_rms(x), (t[: x.size(1)] for t in (cos, sin))
        factor = rho.clone()
        factor[:, :, : ctx.heads] *= gain[:, None]
        y = rotate_into(x.new_empty(len(x), turned, x.size(1), x.size(3)).transpose(1, 2), x, cos, sin).mul_(factor)
        ctx.save_for_backward(qkv, rho, factor, cos, sin)
        return y[:, :, : ctx.heads], y[:, :, ctx.heads :], v

    @staticmethod
    def backward(ctx: Any, dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[Tensor, Tensor, None, None]:
        qkv, rho, factor, cos, sin = ctx.saved_tensors
        heads, turned, dqkv = ctx.heads, rho.size(2), torch.empty_like(qkv)
        x, d = qkv[:, :, :turned], dqkv[:, :, :turned]
        rotate_into(d[:, :, :heads], dq, cos, -sin)
        rotate_into(d[:, :, heads:], dk, cos, -sin)
        dqkv[:, :, turned:] = dv
        along = (d * x).sum(-1, keepdim=True).mul_(rho)
        dgain = along[:, :, :heads].sum((0, 1, 3))
        d.addcmul_(x, along.mul_(rho).div_(x.size(-1)), value=-1).mul_(factor)
        return dqkv, dgain, None, None

def rotate_into(out: Tensor, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`rotate`."""
    (to_a, to_b), (a, b) = out.chunk(2, dim=-1), x.chunk(2, dim=-1)
    torch.mul(a, cos, out=to_a).addcmul_(b, sin)
    torch.mul(b, cos, out=to_b).addcmul_(a, sin, value=-1)
    return out

class BlockAttention(torch.autograd.Function):
    """`attend`, causal: a block of queries of some heads at a time, with all keys up to the block's last one.

    P = exp(q k^T / sqrt(C)) is kept for the gradient; see `block_attend` for why no maximum is taken out. With g' = g /
    P's row sums: dv = P^T g', dS = P (g' v^T - g' . o), dq = dS k, dk = dS^T q. What dS subtracts comes out of the
    product, by one channel more.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q (B, T, H, C), k and v (B, T, K, C) -> (B, T, H, C)."""
        batch, ctx.group = len(q), q.size(2) // k.size(2)
        q, (k, v) = split_heads(q, ctx.group), (split_heads(t, 1).squeeze(1) for t in (k, v))
        kt, causal = k.mT * (LOG2_E * q.size(-1) ** -0.5), k.new_ones(QUERIES, QUERIES).tril()
        o, sums, kept = torch.empty_like(q), q.new_empty(*q.shape[:3], 1), []
        for n, i, j in query_blocks(q):
            p = torch.bmm(q[n, :, i:j].flatten(1, 2), kt[n, :, :j]).exp2_()
            p.unflatten(1, (-1, j - i))[..., i:].mul_(causal[: j - i, : j - i])
            total = p.sum(-1, keepdim=True)
            sums[n, :, i:j] = total.unflatten(1, (-1, j - i))
            o[n, :, i:j] = torch.bmm(p, v[n, :j]).div_(total).unflatten(1, (-1, j - i))
            kept.append(p)
        ctx.save_for_backward(q, k, v, o, sums, *kept)
        return join_heads(o, batch)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v, o, sums, *kept = ctx.saved_tensors
        batch, scale = len(g), g.size(-1) ** -0.5
        g1 = g.new_empty(*q.shape[:3], q.size(3) + 1)  # g' and -g' . o
        g_ = torch.div(split_heads(g, ctx.group), sums, out=g1[..., :-1])
        torch.sum(g_ * o, -1, keepdim=True, out=g1[..., -1:]).neg_()
        v1 = torch.cat((v.mT, v.new_ones(len(v), 1, v.size(1))), 1)
        dq, dk, dv, k = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v), k * scale
        for p, (n, i, j) in zip(kept, query_blocks(q), strict=True):
            g_ = g1[n, :, i:j].flatten(1, 2)
            dv[n, :j].baddbmm_(p.mT, g_[..., :-1])
            ds = torch.bmm(g_, v1[n, :, :j]).mul_(p)
            dq[n, :, i:j] = torch.bmm(ds, k[n, :j]).unflatten(1, (-1, j - i))
            dk[n, :j].baddbmm_(ds.mT, q[n, :, i:j].flatten(1, 2), alpha=scale)
        return join_heads(dq, batch), join_heads(dk.unsqueeze(1), batch), join_heads(dv.unsqueeze(1), batch)

def query_blocks(q: Tensor) -> Iterator[tuple[slice, int, int]]:
    """(entries of the batch, first query, last query and key + 1) of each block of q (N, group, T, C)."""
    entries, group, length, _ = q.shape
    count = max(1, SCORES // (group * QUERIES * length))
    for n, i in itertools.product(range(0, entries, count), range(0, length, QUERIES)):
        yield slice(n, n + count), i, min(i + QUERIES, length)

def split_heads(x: Tensor, group: int) -> Tensor:
    """(B, T, K * group, C) -> (B * K, group, T, C), in one piece."""
    return x.transpose(1, 2).contiguous().unflatten(1, (-1, group)).flatten(0, 1)

def join_heads(x: Tensor, batch: int) -> Tensor:
    """Inverse of split_heads, a view."""
    return x.view(batch, -1, *x.shape[2:]).transpose(1, 2)

def block_attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """BlockAttention for training, where there is room for P and exp cannot overflow: a score is at most |q| |k| /
    sqrt(C), with normalized heads gain sqrt(C). PyTorch's forward pass alone is as fast."""
    small = q.size(0) * q.size(2) * q.size(1) ** 2 <= KEPT_SCORES
    if small and mask is None and q.size(1) == k.size(1) and q.size(3) == v.size(3) and torch.is_grad_enabled():
        largest = math.prod(torch.linalg.vector_norm(t.detach(), dim=-1).amax().item() for t in (q, k))
        if largest * q.size(-1) ** -0.5 < 60:  # else, or where it is not a number
            return BlockAttention.apply(q, k, v)
    return attend(q, k, v, mask)

class RowMLP(torch.autograd.Function):
    """down(rms_norm(relu(up(x))^2)), a few rows at a time. The norm scales the result instead of the hidden layer."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, up: Tensor, down: Tensor, w_up: Tensor, w_down: Tensor) -> Tensor:  # noqa: ARG004
        """x (N, D), latent matrices, stored matrices (hidden, D) and (D, hidden)."""
        u, y, rho = x.new_empty(len(x), len(w_up)), x.new_empty(len(x), len(w_down)), x.new_empty(len(x), 1)
        for x_, u_, y_, rho_ in zip(*(t.split(ROWS) for t in (x, u, y, rho)), strict=True):
            h = torch.mm(x_, w_up.T, out=u_).clamp_min_(0).square()
            torch.mm(h, w_down.T, out=y_).mul_(rho_.copy_(inverse_rms(h)))
        ctx.save_for_backward(x, u, y, rho, w_up, w_down)
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        x, u, y, rho, w_up, w_down = ctx.saved_tensors
        dx, d_up, d_down = torch.empty_like(x), torch.zeros_like(w_up), torch.zeros_like(w_down)
        for x_, u_, y_, rho_, g_, dx_ in zip(*(t.split(ROWS) for t in (x, u, y, rho, g, dx)), strict=True):
            h = u_.square()
            along = (g_ * y_).sum(1, keepdim=True).mul_(rho_.square()).mul_(2 / h.size(1))
            g2 = g_ * rho_ * 2  # the 2 of relu^2's derivative, 2 u
            d_down.addmm_(g2.T, h, alpha=0.5)
            du = torch.addcmul(g2 @ w_down, h, along, value=-1).mul_(u_)
            d_up.addmm_(du.T, x_)
            torch.mm(du, w_up, out=dx_)
        return dx, d_up, d_down, None, None

def row_mlp(x: Tensor, up: nn.Module, down: nn.Module) -> Tensor:
    """`relu2_mlp`: as one function where nothing else happens to the two matrices' inputs."""
    if (type(up).forward, type(down).forward) != (QuantizedLinear.forward, NormedLinear.forward):
        return relu2_mlp(x, up, down)
    y = RowMLP.apply(x.flatten(0, -2), up.weight, down.weight, up.stored(x.dtype), down.stored(x.dtype))
    return y.unflatten(0, x.shape[:-1])

# The poly softcap is cap * clip(f(u), -1, 1) with f(u) = u - u^3/3 + u^5/15. f grows everywhere: it is cap * f of u
# clipped where f is 1. With b = u^2 - 3/2, f' = b^2/3 + 1/4 and f = u (3 + f' - 2/3 b) / 5; with a = u^2 - 5/2,
# f = u (a^2/15 + 7/12): as few passes over memory as it takes.
POLY_LIMIT = 1.6898605928768917

def clip(x: Tensor, limit: float) -> Tensor:
    """Clip x (rows, columns) in place; the rows with something to clip: of a trained model, one in a hundred or so."""
    rows = (torch.maximum(-x.amin(1), x.amax(1)) > limit).nonzero().squeeze(1)  # aminmax is slow along rows
    if len(rows):
        x.clamp_(-limit, limit)
    return rows

def with_bias(e: Tensor, table: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """(N, E), (V, E), (V,) -> (N, E + 1), (E + 1, V), whose product is e @ table.T + bias."""
    return torch.cat((e, e.new_ones(len(e), 1)), 1), torch.cat((table.T, bias[None]))

class ChunkedPolyLoss(torch.autograd.Function):
    """Output projection, poly softcap and loss: a few rows of logits at a time, and their gradient at once, so that the
    (B * T, V) logits never exist. `summed_loss` is the same, plainly."""

    @staticmethod
    def forward(
        ctx: Any, e: Tensor, table: Tensor, bias: Tensor, y: Tensor, cap: float, z_loss: float
    ) -> tuple[Tensor, Tensor]:
        """e (N, E), table (V, E), bias (V,), y (N,) -> what is minimized and cross entropy, summed."""
        e1, table1 = with_bias(e, table, bias)
        de, dtable1, (loss, total) = torch.empty_like(e), torch.zeros_like(table1), e.new_zeros(2).unbind()
        unit, rows = 0.6 * LOG2_E * cap, max(128, LOGITS // len(table))
        table1 *= 0.6 * LOG2_E  # w = unit * u, so that the capped logit is (w + w (slope - 2/3 b) / 3) / log2(e)
        buffers = e.new_empty(3, min(rows, len(e)), len(table))
        for e_, y_, de_ in zip(e1.split(rows), y[:, None].split(rows), de.split(rows), strict=True):
            w, b, slope = buffers[:, : len(e_)]
            clipped = clip(torch.mm(e_, table1, out=w), POLY_LIMIT * unit)
            inside = w[clipped].abs() < POLY_LIMIT * unit
            torch.addcmul(e.new_tensor(-1.5), w, w, value=unit**-2, out=b)
            torch.addcmul(e.new_tensor(0.25), b, b, value=1 / 3, out=slope)
            w.addcmul_(w, torch.add(slope, b, alpha=-2 / 3, out=b), value=1 / 3)
            target = w.gather(1, y_) / LOG2_E
            sums = w.exp2_().sum(1, keepdim=True)  # |logits| <= cap: no maximum needs to be taken out
            lse = sums.log()
            nats = (lse - target).sum()
            loss += nats + z_loss * lse.square().sum()
            total += nats
            share = (1 + 2 * z_loss * lse).div_(sums)  # the logits' gradient is this times w, less 1 at the target
            slope[clipped] *= inside
            w.scatter_add_(1, y_, -1 / share).mul_(slope)
            torch.mm(w, table, out=de_).mul_(share)
            dtable1.addmm_((e_ * share).T, w)
        ctx.save_for_backward(de, dtable1)
        ctx.mark_non_differentiable(total)
        return loss, total

    @staticmethod
    def backward(ctx: Any, g: Tensor, _: Tensor) -> tuple:
        de, dtable1 = (t * g for t in ctx.saved_tensors)
        return de, dtable1[:-1].T, dtable1[-1], None, None, None, None

def chunked_loss(model: GPT, h: Tensor, y: Tensor, z_loss: float) -> tuple[Tensor, Tensor]:
    e, weight, stored, *targets = loss_operands(model, h, y)
    return ChunkedPolyLoss.apply(e, StraightThrough.apply(weight, stored), *targets, model.cfg.logit_softcap, z_loss)

def chunked_nats(model: GPT, h: Tensor, y: Tensor, temperatures: Tensor) -> Tensor:
    """`target_nats` of poly softcapped logits, without a gradient, a few rows of them at a time."""
    e, _, table, bias, targets = loss_operands(model, h, y)
    cap, nats, rows = model.cfg.logit_softcap, e.new_empty(len(temperatures), len(e)), max(128, LOGITS // len(table))
    e1, table1 = with_bias(e, table, bias)
    buffers = e.new_empty(2, min(rows, len(e)), len(table))
    for e_, y_, nats_ in zip(e1.split(rows), targets[:, None].split(rows), nats.split(rows, dim=1), strict=True):
        w, a = buffers[:, : len(e_)]
        clip(torch.mm(e_, table1, out=w), POLY_LIMIT * cap)
        torch.addcmul(e.new_tensor(-2.5), w, w, value=cap**-2, out=a)
        w.mul_(torch.addcmul(e.new_tensor(7 / 12), a, a, value=1 / 15, out=a))
        for t, out in zip(temperatures.tolist(), nats_, strict=True):
            lse = torch.mul(w, LOG2_E / t, out=a).exp2_().sum(1).log_()
            torch.sub(lse, w.gather(1, y_).squeeze(1), alpha=1 / t, out=out)
    return nats.view(-1, *y.shape)

def fused_loss(model: GPT, h: Tensor, y: Tensor, z_loss: float) -> tuple[Tensor, Tensor]:
    cap, poly = model.cfg.logit_softcap, model.cfg.softcap_type == "poly"
    loss, nats = FusedLoss.apply(*loss_operands(model, h, y), cap, z_loss, poly)
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
def loss_kernel(logits, bias, targets, sums, dbias, rows, cap, z_loss, V: tl.constexpr, BLOCK: tl.constexpr,
                POLY: tl.constexpr):
    """Each row of logits (rows, V), without bias, becomes the gradient; each program's (loss, nats), dbias (V,)."""
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

@graph_operator(empty_gradients)
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
        """`latent` (V, E) takes the gradient of the stored table, the first operand."""
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
def qk_backward_kernel(
    qkv, cos, sin, gain, dq, dk, dv, dqkv, dgain, dq_stride, dk_stride, dv_stride, tokens,
    T: tl.constexpr, H: tl.constexpr, K: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Gradients of q, k and v, in any layout of (B, T, heads), become the packed one; dgain (programs, H) is a part."""
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

@graph_operator(empty_qk)
def normed_rotated(qkv: Tensor, cos: Tensor, sin: Tensor, gain: Tensor) -> tuple[Tensor, Tensor]:
    """qkv (B, T, H + 2K, C), cos and sin (>= T, C/2), gain (H,) -> q (B, T, H, C), k (B, T, K, C)."""
    assert qkv.size(1) <= len(cos)  # the kernel would read on behind the last angle
    q, k = empty_qk(qkv, cos, sin, gain)
    programs, sizes = head_tiles(qkv, gain)
    qk_kernel[programs,](qkv.contiguous(), cos, sin, gain, q, k, **sizes, num_warps=8)
    return q, k

def empty_packed(*operands: Tensor) -> tuple[Tensor, Tensor]:
    return operands[3].new_empty(operands[3].shape), torch.empty_like(operands[6])

@graph_operator(empty_packed)
def normed_rotated_backward(
    dq: Tensor, dk: Tensor, dv: Tensor, qkv: Tensor, cos: Tensor, sin: Tensor, gain: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of q, k and v -> gradients of qkv, packed, and of gain, float32."""
    dq, dk, dv = (g if g.stride(3) == 1 else g.contiguous() for g in (dq, dk, dv))
    (programs, sizes), dqkv = head_tiles(qkv, gain), qkv.new_empty(qkv.shape)
    dgain = gain.new_empty(programs, len(gain))
    strides = (g.stride()[:3] for g in (dq, dk, dv))
    tensors = qkv.contiguous(), cos, sin, gain, dq, dk, dv, dqkv, dgain
    qk_backward_kernel[programs,](*tensors, *strides, **sizes, num_warps=8)
    return dqkv, dgain.sum(0)

class QKNormRope(torch.autograd.Function):
    """`qk_norm_rope` by a kernel each way: v stays where it is, and one packed gradient comes back."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, gain: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(qkv, cos, sin, gain)
        q, k = normed_rotated(qkv, cos, sin, gain)
        return q, k, qkv[:, :, -k.size(2) :]

    @staticmethod
    def backward(ctx: Any, dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[Tensor, Tensor, None, None]:
        dqkv, dgain = normed_rotated_backward(dq, dk, dv, *ctx.saved_tensors)
        return dqkv, dgain, None, None

# Matrix kernels. ACT_QUANT=fp8: products with 8-bit operands. Here the rounding of the ternary weights costs nothing: a
# scale with e4m3's mantissa times a code in {-1, 0, 1} is an e4m3 number, forward and (transposed) for the gradient of
# the input.

# Gradients at the outputs of the ternary layers, in units of a token's own loss, enter e5m2 (2^-14 to 57344 = 2^15.8)
# times 2^8. Measured on 3 and 4 layers of width 256 over 120 steps: root mean square 2^-12.4 (second step) to 2^-5,
# largest value 2^-0.5, 1st percentile of the smallest layer 2^-17.6 (2^-20.9 at the second step). So 2^8 lies 2^8 below
# saturation and, from the second step on, keeps 99 % above the smallest normal number, with 2^1 to spare there and 2^4
# later. A batch that is smaller at the start of a run takes its ratio out of the former.
FP8_GRADIENT_SCALE = 2.0**8

class Fp8Weight(NamedTuple):
    """codes * scale is the stored weight; `codes_t` is transposed, since 8-bit products want contiguous rows."""

    codes: Tensor  # (out, in) e4m3
    codes_t: Tensor  # (in, out) e4m3
    scale: Tensor  # (), a power of two
    relu2_scale: Tensor  # (), the power of two that takes relu(x @ stored.T)^2 of any normalized x below 448

def fp8_weight(stored: Tensor) -> Fp8Weight:
    """Exact while the matrix's scales lie within 2^13 of the largest; below, off by at most 2^-17 of the largest."""
    codes, scale = round_fp8(stored)
    # Cauchy and Schwarz: no output exceeds |row| |x|, |x|^2 = in. 1.14: x itself is rounded, by 1/16 at most and to
    # bfloat16
    largest = stored.float().square().sum(1, dtype=torch.float64).amax().float() * (1.14 * stored.size(1))
    return Fp8Weight(codes, codes.t().contiguous(), scale, floor_to_power_of_two(448 / largest.clamp_min(2.0**-100)))

@functools.cache
def fp8_rounding(cfg: Config, device: torch.device) -> Callable[[Tensor], Fp8Weight]:
    """`fp8_weight` in a few kernels on a GPU; UserError in float16, whose loss scale does not reach 8 bits."""
    if compute_dtype(cfg.precision, device) == torch.float16:
        raise UserError(f"PRECISION={cfg.precision!r}: float16 on this GPU; expected fp32 with ACT_QUANT='fp8'")
    return compiled(fp8_weight, cfg, World(device=device))

def floor_to_power_of_two(x: Tensor) -> Tensor:
    return (x.view(torch.int32) & 0x7F800000).view(torch.float32)

def to_fp8(x: Tensor, scale: float, dtype: torch.dtype = torch.float8_e4m3fn) -> Tensor:
    """x * scale in 8 bits, rows contiguous; what is out of range saturates."""
    largest = torch.finfo(dtype).max
    return (x.float() * scale).clamp(-largest, largest).to(dtype).contiguous()

def multiplies_eight_bits(device: torch.device) -> bool:
    """Whether torch._scaled_mm takes these formats. A graph cannot ask; NVIDIA's are made from 8.9 on."""
    nvidia = not torch.version.hip and (torch.compiler.is_compiling() or capability(device) >= (8, 9))
    return device.type != "cuda" or nvidia

def fp8_product(a: Tensor, rows: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """a (N, K) @ rows (M, K).T * scale -> (N, M) in `dtype`, summed in float32."""
    if not multiplies_eight_bits(a.device):  # 16 bits and more hold both operands
        wide = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
        return (a.to(wide) @ rows.to(wide).t() * scale).to(dtype)
    one = torch.ones((), device=a.device)
    # without full accumulation in float32 only where rounding errors meet 3 mantissa bits anyway: forward
    return torch._scaled_mm(a, rows.t(), one, scale, out_dtype=dtype, use_fast_accum=a.dtype == torch.float8_e4m3fn)

class Fp8Matmul(torch.autograd.Function):
    """StoredMatmul with 8-bit operands forward and for the input's gradient; the weight's gradient sees no rounding."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, latent: Tensor, weight: Fp8Weight, scales: tuple) -> Tensor:  # noqa: ARG004
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

class Fp8Linear(TernaryLinear):
    """ACT_QUANT=fp8. Its input must have root mean square 1: no element exceeds sqrt(in); a fixed scale does."""

    def __init__(self, in_dim: int, out_dim: int, cfg: Config, init_std: float = 0.02) -> None:
        super().__init__(in_dim, out_dim, cfg, init_std)
        for name in Fp8Weight._fields:
            self.register_buffer(name, None, persistent=False)
        self.cfg, x_scale = cfg, 2.0 ** math.floor(math.log2(448 / in_dim**0.5))
        self.scales = x_scale, FP8_GRADIENT_SCALE * 2.0 ** round(math.log2(cfg.train_batch_tokens))

    def refresh(self) -> None:
        weight = fp8_rounding(self.cfg, self.operand.device)(self.operand)
        for name, new in weight._asdict().items():
            setattr(self, name, new) if getattr(self, name) is None else getattr(self, name).copy_(new)

    def eight_bit(self, dtype: torch.dtype) -> Fp8Weight:
        """As refreshed last, or made for this one use."""
        kept = Fp8Weight(*(getattr(self, name) for name in Fp8Weight._fields))
        return kept if self.operand is not None else fp8_weight(self.stored(dtype))

    def forward(self, x: Tensor) -> Tensor:
        return Fp8Matmul.apply(x, self.weight, self.eight_bit(x.dtype), self.scales)

class Fp8Output(Fp8Linear):
    """As NormedLinear."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(rms_norm(x))

class NormedMatmul(torch.autograd.Function):
    """rms_norm(x) @ stored.T as rho * (x @ stored.T), rho the norm's factor of the row: the wide input is not written
    again.

    With y = x @ stored.T and c = rho^3 (g . y) / in, the gradient of x is rho * (g @ stored) - c * x; it needs no sum
    over `in`.
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

class Tiles(NamedTuple):
    """How a kernel cuts a product (M, K) @ (K, N): the tile of the result, bytes along K, and what shares the work."""

    m: int
    n: int
    k_bytes: int
    warps: int
    stages: int
    persistent: bool  # one program a processor, which loads the next tile while it writes one

# The last one is for GPUs with 99 KB of shared memory for a program; an H100 has 227
TILES = [Tiles(128, 256, 128, 8, 3, True), Tiles(128, 256, 128, 8, 4, True), Tiles(128, 128, 128, 8, 4, True),
         Tiles(128, 256, 128, 8, 3, False), Tiles(128, 128, 128, 4, 4, False),
         Tiles(128, 128, 128, 8, 2, False)]  # fmt: skip
TUNED: dict[tuple, Tiles] = {}

Launch = Callable[[Tiles], list[Tensor]]

def tuned(key: tuple, x: Tensor, launch: Launch, plain: Callable[[], list[Tensor]]) -> Tiles:
    """The fastest of TILES for what `key` names and x's number of rows, timed when first asked for: in the warm-up, if
    there is one. `launch` gives its results; `plain` what `end_rows` of each should be, in float32."""
    key = (*key, len(x), x.dtype, x.device)
    if key not in TUNED:
        TUNED[key] = fastest_tiles(key[0], launch, plain()) if x.is_cuda else TILES[0]
    return TUNED[key]

def end_rows(x: Tensor) -> Tensor:
    """The first and the last 128 rows, in float32."""
    return torch.cat((x[:128], x[-128:])).float()

def fastest_tiles(name: str, launch: Launch, expected: list[Tensor]) -> Tiles:
    """RuntimeError if there are none that run here and compute what is expected."""
    seconds, refused = {}, []
    for tiles in TILES:
        try:
            errors = [(end_rows(a) - b).norm() / b.norm() for a, b in zip(launch(tiles), expected, strict=True)]
            if not max(errors) < 0.05:  # 8 bits round by .027
                raise Differs(f"off by {100 * max(errors):.2g} %")
            run = functools.partial(launch, tiles)
            seconds[tiles] = triton.testing.do_bench(run, warmup=5, rep=25, return_mode="median")
        except Exception as error:  # too much shared memory, or what this GPU's compiler cannot do; the others may
            refused.append(f"{type(error).__name__}: {error}")
    if not seconds:
        raise RuntimeError(f"{name}: none of {len(TILES)} tiles runs here ({refused[0]})")
    return min(seconds, key=seconds.__getitem__)

def tile_programs(x: Tensor, tiles: Tiles, count: int) -> int:
    """Programs for `count` tiles of the result."""
    processors = torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 3
    return min(count, processors) if tiles.persistent else count

def described(x: Tensor, rows: int, columns: int) -> Any:
    """x for the tensor memory accelerator, which takes blocks of (rows, columns); outside of x it reads zeros."""
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
    """relu(tile)^2 to h at (i, j), its rows' sums of squares as stored to `sums`; EIGHT: times `scale` to h8."""
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

@graph_operator(empty_relu2)
def relu2_product(x: Tensor, w: Tensor, scales: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """x (N, in), w (out, in) -> h = relu(x @ w.T)^2 (N, out) in `dtype`, the same in 8 bits, the sums of h^2 (N, 1).

    `scales` (2,), for 8-bit x and w alone: what the product and then h is multiplied with.
    """
    (h, h8, _), parts = empty_relu2(x, w, scales, dtype), []

    def launch(t: Tiles) -> list[Tensor]:
        k, across = t.k_bytes // x.element_size(), triton.cdiv(len(w), t.n)
        parts[:] = [torch.empty(2 * across, len(x), device=x.device)]
        outputs = described(h, t.m, t.n // 2), described(h if scales is None else h8, t.m, t.n // 2)
        relu2_kernel[tile_programs(x, t, triton.cdiv(len(x), t.m) * across),](
            described(x, t.m, k), described(w, t.n, k), *outputs, parts[0], parts[0] if scales is None else scales,
            len(x), *w.shape, scales is not None, t.m, t.n, k, num_warps=t.warps, num_stages=t.stages,
        )  # fmt: skip
        return [h, parts[0].sum(0)[:, None], *([h8] if scales is not None else [])]

    def plain() -> list[Tensor]:
        product = end_rows(x) @ w.float().T if scales is None else end_rows(x) @ w.float().T * scales[0]
        value = product.relu().square()
        return [value, value.square().sum(1, keepdim=True), *([value * scales[1]] if scales is not None else [])]

    return h, h8, launch(tuned(("relu2", w.shape), x, launch, plain))[1]

def empty_relu2_gradient(*operands: Tensor | None) -> tuple[Tensor, Tensor]:
    h, eight = operands[2], operands[-1] is not None
    return torch.empty_like(h), torch.empty_like(h, dtype=torch.float8_e5m2) if eight else h.new_empty(0)

@graph_operator(empty_relu2_gradient)
def relu2_gradient(
    dy: Tensor, w: Tensor, h: Tensor, rho: Tensor, c: Tensor, scales: Tensor | None
) -> tuple[Tensor, Tensor]:
    """2 sqrt(h) (rho * (dy @ w) - c * h) as h (N, out), and in 8 bits: dy (N, in), w (in, out), rho and c (N, 1).

    `scales` (2,), for 8-bit dy and w alone, w then transposed: what the product and then the gradient is multiplied
    with.
    """
    (g, g8), eight = empty_relu2_gradient(dy, w, h, rho, c, scales), scales is not None

    def launch(t: Tiles) -> list[Tensor]:
        k, half = t.k_bytes // dy.element_size(), t.n // 2
        weight = described(w, t.n, k) if eight else described(w, k, t.n)
        blocks = described(g, t.m, half), described(g8 if eight else g, t.m, half)
        relu2_gradient_kernel[tile_programs(dy, t, triton.cdiv(len(h), t.m) * triton.cdiv(h.size(1), t.n)),](
            described(dy, t.m, k), weight, described(h, t.m, half), rho, c, *blocks, scales if eight else rho,
            len(h), h.size(1), dy.size(1), eight, t.m, t.n, k, num_warps=t.warps, num_stages=t.stages,
        )  # fmt: skip
        return [g]

    def plain() -> list[Tensor]:
        product = end_rows(dy) @ w.float().T * scales[0] if eight else end_rows(dy) @ w.float()
        return [2 * end_rows(h).sqrt() * (end_rows(rho) * product - end_rows(c) * end_rows(h))]

    launch(tuned(("relu2 gradient", w.shape), dy, launch, plain))
    return g, g8

class FusedMLP(torch.autograd.Function):
    """down(rms_norm(relu(up(x))^2)): the activation in the epilogue of `up`, the norm as in NormedMatmul, its gradient
    and the activation's in the epilogue of one product. As wide as the hidden layer, one tensor is written forward and
    one backward.
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
    """FusedMLP with 8-bit operands as in Fp8Matmul. h is rounded before its norm is known, on a scale that `up` alone
    bounds.

    The largest h comes to 0.13 to 0.21 of that bound (3 layers of width 256, 120 steps); its rounding is off by 2.63 to
    2.67 % there, by 2.56 to 2.68 % on the largest h's own scale, by 2.61 to 2.69 % after the norm: e4m3's range takes
    up the slack.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, up: Tensor, down: Tensor, *operands: Any) -> Tensor:  # noqa: ARG004
        """x (N, D), latent matrices, their Fp8Weights, and the scales of x and of gradients."""
        w_up, w_down, (x_scale, ctx.g_scale) = operands
        scales = torch.stack((w_up.scale / x_scale, w_up.relu2_scale))
        h, h8, squares = relu2_product(to_fp8(x, x_scale), w_up.codes, scales, x.dtype)
        y = fp8_product(h8, w_down.codes, w_down.scale / w_up.relu2_scale, x.dtype)
        rho = norm_factor(squares / h.size(1))
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

# (out, in) of the matrices whose weight gradients run as `split_weight_gradient`, and into how many sums: where that is
# faster than torch.mm, for which the result's tiles may fill 14 to 55 % of an H100. Empty until bench/gemm.py has run
# on one.
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

@graph_operator(empty_weight_gradient)
def split_weight_gradient(g: Tensor, x: Tensor, splits: int) -> Tensor:
    """g.T @ x in float32 as `splits` sums over the rows, added up in one order: repeatable, unlike atomic additions."""
    parts = g.new_empty(splits, g.size(1), x.size(1), dtype=torch.float32)

    def launch(t: Tiles) -> list[Tensor]:
        k, work = t.k_bytes // g.element_size(), splits * triton.cdiv(g.size(1), t.m) * triton.cdiv(x.size(1), t.n)
        split_gradient_kernel[tile_programs(g, t, work),](
            described(g, k, t.m), described(x, k, t.n), parts, len(g), splits, *parts.shape[1:], t.m, t.n, k,
            num_warps=t.warps, num_stages=t.stages,
        )  # fmt: skip
        return [parts.sum(0)]

    tiles = tuned(("weight gradient", parts.shape), g, launch, lambda: [end_rows(g.float().T @ x.float())])
    return launch(tiles)[0]

def fused_mlp(x: Tensor, up: nn.Module, down: nn.Module) -> Tensor:
    """`relu2_mlp` for x (..., D): as one function where nothing else happens to the two matrices' inputs. Not in
    float16, where h could overflow before its norm, nor for rows that the memory accelerator does not take."""
    rows, kinds = x.flatten(0, -2), (type(up).forward, type(down).forward)
    if x.dtype == torch.float16 or any(size % 8 for size in down.weight.shape):  # 16 for 8 bits: a rule
        return relu2_mlp(x, up, down)
    if kinds == (Fp8Linear.forward, Fp8Output.forward):
        weights = up.eight_bit(x.dtype), down.eight_bit(x.dtype)
        return Fp8FusedMLP.apply(rows, up.weight, down.weight, *weights, up.scales).view_as(x)
    if kinds == (QuantizedLinear.forward, NormedLinear.forward) and isinstance(up, TernaryLinear):
        return FusedMLP.apply(rows, up.weight, down.weight, up.stored(x.dtype), down.stored(x.dtype)).view_as(x)
    return relu2_mlp(x, up, down)


# ---- 12 Options and codecs (option) ----------------------------------------------------------------------------------
# Other systems of the field and parts of #640 that lost, off in the default run; then the codecs. Their settings, what
# they exchange in `Parts`, what they do around a step, and each of them as a block of its own.

@dataclass(frozen=True, kw_only=True)
class OptionSettings(Settings):
    """Settings that stand at "off" in the default, and what switches off parts of the published design."""

    mlp_hidden: int = setting(0, "width of the MLP; 0: MLP_MULT * MODEL_DIM", model=True, least=0, most=2**20,
                              of="#367", group="Model and storage of other systems")  # fmt: skip
    xsa_last_n: int = setting(0, "last blocks whose attention leaves out its own value", model=True, least=0, of="#367")
    qkv_split: bool = setting(False, "three matrices: Muon and a scale see each alone", model=True, of="#139")
    input_norm: Literal["outputs", "all", "none"] = setting("outputs", "inputs that are normed", model=True, of="#139")
    weight_quant: Literal["ternary", "binary", "none"] = setting("ternary", "none: float16", model=True, of="#641")
    num_unique_layers: int = setting(0, "blocks run RECURRENCE_FACTOR times; 0: off", model=True, least=0, of="#126")
    recurrence_factor: int = setting(1, "passes through the blocks, in turn", model=True, least=1, of="#126")
    position: Literal["rope", "radial", "none"] = setting("rope", "how positions enter", model=True, of="#435")
    radial_bits: int = setting(8, "of a position", model=True, least=1, most=20, of="#435")
    radial_alpha: float = setting(0.25, "length of the first bit's vector", model=True, above=0, most=1000, of="#435")
    ntk_rope: bool = setting(False, "a smaller rotary base for sequences below TRAIN_SEQ_LEN", of="#126")
    ternary_commit_lambda: float = setting(0.0, "pull of latent weights towards their codes", least=0, of="#126")
    gradient_checkpointing: bool = setting(False, "compute blocks again in the backward pass: memory for time")

    tie_embeddings: Literal[0, 1, 2] = setting(1, "0: a head of its own; 2: the table plus a correction", model=True,
                                               group="Switches of #640")  # fmt: skip
    attn_proj_type: Literal["standard", "tversky"] = setting("standard", "output of attention", model=True)
    logit_head_type: Literal["standard", "tversky"] = setting("standard", "output table", model=True)
    bigram_hash: bool = setting(False, "a second table, for the token before", model=True)
    mtp_heads: int = setting(0, "heads for tokens after the next one, in training only", least=0, most=16)
    diff_attn: bool = setting(False, "difference and sum of two attentions", model=True)
    mlp_groups: int = setting(0, "MLPs, each on its share of the channels; 0: one", model=True, least=0, most=256)
    refiner: bool = setting(False, "a causal convolution before the output", model=True)
    smear: bool = setting(False, "mix in the mean of all positions so far", model=True)
    training_depth_recurrence: int = setting(0, "repeats of each block in a row; 0: one", model=True, least=0, most=16)
    eval_depth_recurrence: int = setting(0, "the same in evaluation; 0: as in training", model=True, least=0, most=16)
    untie_at_fraction: float = setting(0.0, "of the budget, from where on TIE_EMBEDDINGS=0; 0: never", least=0, below=1)
    churn_log_every: int = setting(0, "steps between two lines with the share of changed codes; 0: none", least=0)

    act_quant: Literal["none", "int8", "fp8"] = setting("none", "operands of ternary products", model=True,
                                                        group="Architecture and arithmetic")  # fmt: skip
    attention_window: int = setting(0, "tokens that one attends to; then one pass scores; 0: all", model=True, least=0)
    parallel_blocks: bool = setting(False, "attention and MLP side by side", model=True)
    attention_free_layers: int = setting(0, "layers in the middle that are an MLP alone", model=True, least=0)

    tversky_num_features: int = setting(0, "0: the prototypes themselves", model=True, least=0, most=2**16,
                                        group="Companions of #640's switches")  # fmt: skip
    tversky_feature_pools: int = setting(0, "sets of features that blocks share; 0: one each", model=True, least=0)
    tversky_membership: Literal["sigmoid", "poly", "tanh"] = setting("sigmoid", "of features", model=True)
    refiner_kernel: int = setting(3, "positions of the convolution", model=True)
    embed_lr: float = setting(0.6, "learning rate of the table with TIE_EMBEDDINGS=0", least=0)
    head_lr: float = setting(0.02, "learning rate of output heads", least=0)
    corr_weight_lr: float = setting(0.02, "learning rate of the correction", least=0)

    unet: bool = setting(True, "skips from the first half to the second", model=True, group="Published parts")
    resid_mix: bool = setting(True, "mix the embedding into each block's input", model=True)

    seq_len_start: int = setting(0, "tokens until SEQ_SCHEDULE_FRACTION; 0: off", least=0, of="#640", group="Schedules")
    seq_schedule_fraction: float = setting(0.0, "of the budget", least=0, most=1, of="#640")
    batch_tokens_start: int = setting(0, "tokens of a step until BATCH_SCHEDULE_FRACTION; 0: off", least=0, of="#640")
    batch_schedule_fraction: float = setting(0.33, "of the budget", least=0, most=1, of="#640")
    seq_ramp_start: int = setting(0, "first tokens, which double until SEQ_RAMP_FRAC; 0: off", least=0, of="#367")
    seq_ramp_frac: float = setting(0.25, "of the budget", above=0, most=1, of="#367")
    batch_ramp_start: int = setting(0, "first tokens of a step, as SEQ_RAMP_START; 0: off", least=0, of="#367")
    batch_ramp_frac: float = setting(0.2, "of the budget", above=0, most=1, of="#367")
    seq_warmup_start: int = setting(0, "first tokens, which double over SEQ_WARMUP_STEPS; 0: off", least=0, of="#126")
    seq_warmup_steps: int = setting(2000, "steps", least=1, of="#126")
    lr_warmup_steps: int = setting(0, "steps in which the learning rates rise from 0", least=0, of="#126")
    warmdown_iters: int = setting(0, "the warmdown in steps, for WARMDOWN_FRACTION; 0: off", least=0, of="#139")
    warmdown_shape: Literal["linear", "cosine"] = setting("linear", "of the warmdown", of="#126")
    min_lr_ratio: float = setting(0.0, "of every learning rate, at the end of the warmdown", least=0, most=1, of="#126")

    adam_lr: float = setting(0.05, "learning rate of MATRIX_OPTIMIZER=adamw", least=0, of="#640", group="Optimizers")
    adam_wd: float = setting(0.05, "weight decay of MATRIX_OPTIMIZER=adamw", least=0, of="#640")
    grad_clip_norm: float = setting(0.0, "largest norm of all gradients; 0: off", least=0)
    normuon_beta2: float = setting(0.95, "of NorMuon's second moment", least=0, below=1)
    fro_alpha: float = setting(0.1, "least step of FRO; #435's stable form: .12", least=0, most=1, of="#435")
    fro_gamma: float = setting(0.8, "weight of its resonance; #435's stable form: .66", least=0, of="#435")
    fro_beta2: float = setting(0.999, "of its second moment", least=0, below=1, of="#435")
    fro_warmup_steps: int = setting(10, "steps until fro_stable's resonance counts in full", least=0, of="#435")
    ema: bool = setting(False, "export a running average of the weights", of="#641")
    ema_decay: float = setting(0.995, "of the average", least=0, below=1, of="#641")
    ema_start_fraction: float = setting(0.5, "of the budget, where the average begins", least=0, below=1, of="#641")

    embed_init: Literal["random", "bigram"] = setting(
        "random", "bigram: first embeddings predict the next token as counted", group="Starts")  # fmt: skip
    ternary_phase: str = setting("0", "start,end of the budget between which weights go from full precision to ternary")

    checkpoint_every: str = setting("0", "steps or, as 600s, seconds between two; 0: none", group="Checkpoints")
    checkpoint_keep: int = setting(2, "newest ones that stay", least=1)
    checkpoint_dir: str = setting("checkpoints", "their folder")
    resume: str = setting("", "1: go on from the newest; or the path of one")
    export_on_stop: bool = setting(False, "after a signal, export and score what has been trained")
    spike_guard: float = setting(0.0, "deviations above the mean loss that cost a step its update; 0: off", least=0)
    check_replicas_every: int = setting(0, "steps between two comparisons of all processes' weights; 0: none", least=0)

    track: str = setting("", "programs that follow the run: tensorboard,wandb,trackio or some", group="Tracking")

    @property
    def softening(self) -> tuple[float, float]:
        """TERNARY_PHASE: progress up to which weights are used unrounded, and from which they are ternary alone."""
        start, _, end = self.ternary_phase.partition(",")
        return float(start), float(end or start)

    @property
    def mlp_dim(self) -> int:
        return self.mlp_hidden or self.mlp_mult * self.model_dim

    @property
    def passes(self) -> int:
        return self.num_blocks * self.recurrence_factor

    @property
    def num_blocks(self) -> int:
        """Blocks with weights of their own; with #126's recurrence layer i passes through block i mod this."""
        return self.num_unique_layers or self.num_layers

    @property
    def score_window(self) -> int:
        """Long rows for a model whose attention is banded anyway."""
        return BANDED_ROW * self.attention_window or self.train_seq_len

    @property
    def score_stride(self) -> int:
        return (BANDED_ROW - 1) * self.attention_window or self.sliding_eval_stride

    def exported(self) -> Config:
        """A run that unties ends untied."""
        return dataclasses.replace(self, tie_embeddings=0, untie_at_fraction=0.0) if self.untie_at_fraction else self

    def step_shapes(self) -> list[tuple[int, int]]:
        """Every (seq_len, batch_tokens) that `step_shape` can ask for, and perhaps more; the largest first."""

        def values(full: int, jump: int, start: int) -> list[int]:
            doublings = [full >> k for k in range((full // start).bit_length())] if start else []
            return sorted({full, jump or full, *doublings}, reverse=True)

        seq_lens = values(self.train_seq_len, self.seq_len_start, self.seq_ramp_start or self.seq_warmup_start)
        batches = values(self.train_batch_tokens, self.batch_tokens_start, self.batch_ramp_start)
        return list(itertools.product(seq_lens, batches))

def start_rules(name: str, full: str, others: list[str], fraction: str = "") -> Iterator[tuple]:
    """A schedule's first value must tile what follows, a ramp must reach it by doublings; one at a time."""
    start, whole, of_batch = operator.attrgetter(name), operator.attrgetter(full), full == "train_batch_tokens"
    free = lambda c: c.eval_only or not start(c)
    for other in map(str.upper, others):
        alone = lambda c, other=other: not (start(c) and getattr(c, other.lower()))
        yield name, alone, f"0 beside {other}: one schedule at a time"
    if fraction:
        yield name, lambda c: free(c) or start(c) <= whole(c), f"at most {full.upper()}"
        if not of_batch:
            yield name, lambda c: free(c) or whole(c) % start(c) == 0, f"a divisor of {full.upper()}"
        yield fraction, lambda c: not start(c) or getattr(c, fraction) > 0, f"above 0 with {name.upper()}"
    else:
        doubled = lambda c: start(c) << max(0, (whole(c) // start(c)).bit_length() - 1)
        yield name, lambda c: free(c) or doubled(c) == whole(c), f"{full.upper()} divided by a power of two"
    if of_batch:
        yield name, lambda c: free(c) or start(c) % c.train_seq_len == 0, "a multiple of TRAIN_SEQ_LEN"

not_fp8 = lambda c: c.act_quant != "fp8"
quantized = lambda c: c.weight_quant != "none"
standard = lambda c: c.attn_proj_type == c.logit_head_type == "standard"
tied = lambda c: c.tie_embeddings and c.logit_head_type == "standard"
group_width = lambda c: math.gcd(c.model_dim, c.mlp_dim) // (c.bitnet_group_size if c.scale_group == "group" else 1)
qkv_16 = lambda c: (c.num_kv_heads if c.qkv_split else c.num_heads + 2 * c.num_kv_heads) * c.head_dim % 16 == 0

RULES += [
    ("checkpoint_every", lambda c: re.fullmatch(r"\d{1,9}|\d{1,9}(\.\d+)?s", c.checkpoint_every),
     "steps, or seconds as 600s"),
    ("track", lambda c: not c.track or {*c.track.split(",")} <= {*TRACKERS}, "some of tensorboard,wandb,trackio"),
    ("ternary_phase", lambda c: re.fullmatch(r"0|(\d?\.\d+|0),(\d?\.\d+|1)", c.ternary_phase) and
     (c.ternary_phase == "0" or 0 <= c.softening[0] < c.softening[1] <= 1), "0, or start,end as .2,.3"),
    ("ternary_phase", lambda c: c.ternary_phase == "0" or quantized(c) and c.act_quant != "fp8",
     "0 with WEIGHT_QUANT=none or ACT_QUANT=fp8, which have no codes or nothing but codes"),
    ("embed_init", lambda c: c.embed_init == "random" or tied(c) and 0 < c.embed_dim <= 2 * c.model_dim and
     not c.bigram_hash, "random without a factored, tied table of its own: EMBED_DIM, TIE_EMBEDDINGS, BIGRAM_HASH"),
    ("mlp_hidden", lambda c: c.mlp_hidden % 4 == 0, "a multiple of 4"),
    ("recurrence_factor", lambda c: c.num_unique_layers or c.recurrence_factor == 1, "1 with NUM_UNIQUE_LAYERS"),
    ("num_layers", lambda c: c.passes == c.num_layers, "NUM_UNIQUE_LAYERS x RECURRENCE_FACTOR"),
    ("num_unique_layers", lambda c: not (c.attention_free_layers and c.num_unique_layers),
     "0 with ATTENTION_FREE_LAYERS"),
    ("attention_free_layers", lambda c: c.attention_free_layers < c.num_layers, "fewer than NUM_LAYERS"),
    ("attention_window", lambda c: not c.attention_window or c.train_seq_len % c.attention_window == 0 and
     c.attention_window < c.train_seq_len, "0, or a divisor of TRAIN_SEQ_LEN below it"),
    ("position", lambda c: not c.attention_window or c.position != "radial", "not radial with ATTENTION_WINDOW"),
    ("xsa_last_n", lambda c: c.xsa_last_n <= c.num_blocks, "at most the number of blocks"),
    ("xsa_last_n", lambda c: not (c.xsa_last_n and c.diff_attn), "0 with DIFF_ATTN, which halves values"),
    ("ntk_rope", lambda c: not c.ntk_rope or c.position == "rope", "0, or POSITION=rope"),
    ("ntk_rope", lambda c: not c.ntk_rope or c.rope_type == "rope", "0, or ROPE_TYPE=rope"),
    ("ntk_rope", lambda c: not c.ntk_rope or c.head_dim > 2, "0 with a head of 2 channels"),
    ("refiner_kernel", lambda c: not c.refiner or 2 <= c.refiner_kernel <= 64, "2 to 64 with REFINER=1"),
    ("mlp_groups", lambda c: not c.mlp_groups or group_width(c) % c.mlp_groups == 0,
     "a number of MLPs that leaves each whole groups of BITNET_GROUP_SIZE weights"),
    ("ternary_commit_lambda", lambda c: quantized(c) or not c.ternary_commit_lambda, "0 with WEIGHT_QUANT: no codes"),
    ("weight_quant", lambda c: quantized(c) or standard(c), "not none with Tversky layers: prototypes are quantized"),
    ("weight_quant", lambda c: c.weight_quant != "binary" or c.scale_stat != "lstsq" and c.ternary_threshold == 0.5,
     "not binary with SCALE_STAT and TERNARY_THRESHOLD"),
    ("untie_at_fraction", lambda c: not c.untie_at_fraction or tied(c), "0 without tied embeddings (TIE_EMBEDDINGS)"),
    ("ema_start_fraction", lambda c: not (c.ema and c.untie_at_fraction) or c.ema_start_fraction >= c.untie_at_fraction,
     "at least UNTIE_AT_FRACTION: before it there is no head"),
    ("warmup_steps", lambda c: not c.untie_at_fraction or c.warmup_steps != 1, "not 1 with UNTIE_AT_FRACTION"),
    ("tie_embeddings", lambda c: tied(c) or c.tie_embeddings < 2, "0 or 1 with LOGIT_HEAD_TYPE: no table is corrected"),
    ("mtp_heads", lambda c: not c.mtp_heads or c.eval_only or c.mtp_heads < min(t for t, _ in c.step_shapes()),
     "fewer than the tokens of the shortest training sequence"),
    ("tversky_feature_pools", lambda c: c.tversky_feature_pools <= c.num_blocks - c.attention_free_layers,
     "at most the number of blocks with attention"),
    ("tversky_feature_pools", lambda c: not c.tversky_feature_pools or c.tversky_num_features,
     "0 with TVERSKY_NUM_FEATURES: prototypes are not shared"),
    ("act_quant", lambda c: not_fp8(c) or standard(c) and quantized(c) and c.input_norm != "none",
     "not fp8 without codes and normalized inputs everywhere: WEIGHT_QUANT, INPUT_NORM, Tversky layers"),
    ("scale_storage", lambda c: not_fp8(c) or c.scale_storage == "e4m3", "e4m3 with ACT_QUANT, which holds it exactly"),
    ("precision", lambda c: not_fp8(c) or c.precision != "fp16", "not fp16 with ACT_QUANT: no loss scale reaches it"),
    ("mlp_groups", lambda c: not_fp8(c) or not c.mlp_groups, "0 with ACT_QUANT: parts of a row have no bound"),
    ("model_dim", lambda c: not_fp8(c) or c.model_dim % 16 == c.mlp_dim % 16 == 0,
     "a multiple of 16 with ACT_QUANT, like the MLP's width"),
    ("num_kv_heads", lambda c: not_fp8(c) or qkv_16(c), "projections of a multiple of 16 rows with ACT_QUANT"),
    ("artifact_codec", lambda c: not c.artifact_codec.endswith("_zstd") or zstandard(), "the package zstandard"),
    *start_rules("seq_len_start", "train_seq_len", [], "seq_schedule_fraction"),
    *start_rules("seq_ramp_start", "train_seq_len", ["seq_len_start"]),
    *start_rules("seq_warmup_start", "train_seq_len", ["seq_len_start", "seq_ramp_start"]),
    *start_rules("batch_tokens_start", "train_batch_tokens", [], "batch_schedule_fraction"),
    *start_rules("batch_ramp_start", "train_batch_tokens", ["batch_tokens_start"]),
]  # fmt: skip

@functools.cache
def joined(kind: type, *mixins: type) -> type:
    """A subclass of `kind` that the mixins override, the leftmost first."""
    return type("".join(m.__name__ for m in (*mixins, kind)), (*mixins, kind), {}) if mixins else kind

def choose_parts(cfg: Config) -> Parts:
    """What a model of these settings is made of."""
    bits = [Binary] * (cfg.weight_quant == "binary")
    inputs = [Int8Inputs] * (cfg.act_quant == "int8") + bits
    kind = HalfLinear if cfg.weight_quant == "none" else Fp8Linear if cfg.act_quant == "fp8" else TernaryLinear
    linear = joined(kind, *[InputNormed] * (cfg.input_norm == "all"), *inputs)
    normed = joined(Fp8Output if kind is Fp8Linear else NormedLinear, *bits)
    if kind is HalfLinear or inputs != bits:  # nothing is folded into the product
        normed = joined(kind, InputNormed, *inputs)
    output = normed if cfg.input_norm == "outputs" else linear
    p = Parts(linear=linear, qkv=linear, output=output, attention_output=output)
    if cfg.qkv_split:
        heads = cfg.num_heads, cfg.num_kv_heads, cfg.num_kv_heads
        p = p._replace(qkv=lambda in_dim, _, cfg: SideBySide([linear(in_dim, n * cfg.head_dim, cfg) for n in heads]))
    if cfg.attn_proj_type == "tversky":
        own = 0 if cfg.tversky_feature_pools else cfg.tversky_num_features
        tversky = joined(Tversky, *[InputNormed] * (cfg.input_norm == "outputs"))
        p = p._replace(attention_output=lambda _, out_dim, cfg, std: tversky(cfg, out_dim, own))  # noqa: ARG005
    attention = [OwnKeys] * (not cfg.key_offset) + [DifferentialMix] * cfg.diff_attn
    attention += [Banded] * (cfg.attention_window > 0)
    rotary = NTKRotary if cfg.ntk_rope else Rotary if cfg.position == "rope" else NoRotary
    p = p._replace(attention=joined(Attention, *attention), rotary=rotary, block=block_kind(cfg))
    if cfg.num_unique_layers or cfg.xsa_last_n or cfg.attention_free_layers or cfg.tversky_feature_pools:
        p = p._replace(blocks=build_layers)
    if cfg.num_unique_layers or cfg.training_depth_recurrence or cfg.eval_depth_recurrence or not cfg.unet:
        p = p._replace(order=recurrent_order)
    mlp = MLP if cfg.activation == "relu2" else ACTIVATED[cfg.activation]
    p = p._replace(mlp=functools.partial(grouped_mlp, mlp) if cfg.mlp_groups else mlp)
    if cfg.mtp_heads:
        p = p._replace(complete=add_future_heads, loss=mtp_training_loss)
    return output_parts(cfg, p)

def output_parts(cfg: Config, p: Parts) -> Parts:
    """What leads from tokens into the model and out of it."""
    kind = BigramTable if cfg.bigram_hash else SmearedTable if cfg.smear_gate else Table
    smear = [SmearGated] * (cfg.smear_gate and cfg.bigram_hash)
    table = joined(kind, *smear, *[Untied] * (cfg.tie_embeddings == 0))
    untying = lambda *sizes: unsaved(UntyingProjection(*sizes))
    embed_out = untying if cfg.untie_at_fraction else TableProjection
    if cfg.tie_embeddings == 0 or cfg.logit_head_type == "tversky" or not cfg.embed_dim:
        embed_out = nn.Identity
    p = p._replace(table=table, embed_in=TableProjection if cfg.embed_dim else nn.Identity, embed_out=embed_out)
    if cfg.logit_head_type == "tversky":
        p = p._replace(output_table=lambda cfg, _: Tversky(cfg, cfg.vocab_size, cfg.tversky_num_features))
    elif cfg.tie_embeddings == 0:
        p = p._replace(output_table=lambda cfg, _: OutputHead(cfg))
    elif cfg.tie_embeddings == 2 or cfg.untie_at_fraction:
        p = p._replace(output_table=tied_output)
    if cfg.position == "radial":
        p = p._replace(embed_norm=RadialNorm)
    return p._replace(final_norm=lambda cfg: Refiner(cfg, p)) if cfg.refiner else p

def choose_hooks(step: TrainingStep) -> list[Hook]:
    """What happens around a step, in this order."""
    cfg, half = step.cfg, compute_dtype(step.cfg.precision, step.world.device) == torch.float16
    shapes = cfg.step_shapes() != Settings.step_shapes(cfg)
    rates = cfg.lr_warmup_steps or cfg.warmdown_iters or cfg.min_lr_ratio or cfg.warmdown_shape != "linear"
    wanted = {Softening: cfg.ternary_phase != "0",
              Schedules: shapes or rates, Untying: cfg.untie_at_fraction, Commitment: cfg.ternary_commit_lambda,
              LossScaling: half, Clipping: cfg.grad_clip_norm, SpikeGuard: cfg.spike_guard, Averaging: cfg.ema,
              Churn: cfg.churn_log_every, Watching: step.world.watch, Replicas: cfg.check_replicas_every,
              Checkpoints: cfg.checkpoint_every != "0" or cfg.resume not in ("", "0") or cfg.export_on_stop,
              BigramStart: cfg.embed_init == "bigram", Tracking: cfg.track}  # fmt: skip
    return [hook(step) for hook, asked in wanted.items() if asked]

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

def doubling_ramp(start: int, full: int, p: float) -> int:
    """From start (p = 0) to full (p = 1) by doublings, evenly spread: 2^round(log2 of the geometric interpolation)."""
    return full >> round(math.log2(full / start) * (1 - min(1.0, p)))

def step_shape(cfg: Config, step: int, progress: float) -> tuple[int, int]:
    """(seq_len, batch_tokens) of a step."""
    seq_len, tokens = cfg.train_seq_len, cfg.train_batch_tokens
    if cfg.seq_len_start and progress < cfg.seq_schedule_fraction:
        seq_len = cfg.seq_len_start
    elif cfg.seq_ramp_start:
        seq_len = doubling_ramp(cfg.seq_ramp_start, seq_len, progress / cfg.seq_ramp_frac)
    elif cfg.seq_warmup_start:
        seq_len = doubling_ramp(cfg.seq_warmup_start, seq_len, step / cfg.seq_warmup_steps)
    if cfg.batch_tokens_start and progress < cfg.batch_schedule_fraction:
        tokens = cfg.batch_tokens_start
    elif cfg.batch_ramp_start:
        tokens = doubling_ramp(cfg.batch_ramp_start, tokens, progress / cfg.batch_ramp_frac)
    return seq_len, tokens

class Schedules(Hook):
    def stage(self, stage: Stage, step: int, progress: float) -> Stage:
        cfg = self.step.cfg
        return Stage(shaped_rate(cfg, step, progress, stage.lr_scale), stage.momentum, *step_shape(cfg, step, progress))

class Softening(Hook):
    """TERNARY_PHASE: gradients at (1 - a) latent + a rounded weights, a from 0 to 1 between two points of the budget.

    What is published after a step, and thus scored and saved, is ternary throughout."""

    @torch.no_grad()
    def stage(self, stage: Stage, step: int, progress: float) -> Stage:  # noqa: ARG002
        start, end = self.step.cfg.softening
        if progress < end:
            self.step.share_latent()  # other processes have sent codes alone
            for layer in self.step.model.modules():
                if isinstance(layer, TernaryLinear):
                    latent = layer.weight.to(layer.operand.dtype)
                    layer.operand.lerp_(latent, min(1.0, (end - progress) / (end - start)))
        return stage

class BigramStart(Hook):
    """EMBED_INIT=bigram: at the first step the model's logits are what pairs of training tokens say of the next token.

    L = log p(b|a) / p(b) for the token a before b is factored, weighted by how frequent both are, to left factors of a
    and right ones of b (a truncated SVD; Levy and Goldberg, NeurIPS 2014, factor such a matrix). Table columns 0 to
    r - 1 hold the left ones, column r what makes them equally long, so that normalization changes nothing; r + 1 to 2 r
    the right ones. The projections copy the left ones into the model and out of it to the right ones.
    """

    TOKENS = 1 << 25  # that are counted at most
    PRIOR = 100.0  # pseudo-counts of p(b) after each a

    @torch.no_grad()
    def begin(self, loop: Loop) -> None:
        step, model = self.step, self.step.model
        if loop.step:  # a checkpoint holds what became of it
            return
        weights = [model.table.weight, model.embed_in.weight, model.embed_out.weight, model.vocab_bias]
        step.share_latent()
        for w in weights:
            w.zero_()
        if step.world.is_main:
            self.fill(*weights, TokenStream(step.cfg, "train"))
        for w in weights:  # the other processes add zeros
            step.world.sum_(w)
        step.publish()
        loop.log(f"embed_init:bigram t:{1000 * loop.clock.elapsed():.0f}ms")

    def fill(self, table: Tensor, embed_in: Tensor, embed_out: Tensor, bias: Tensor, stream: TokenStream) -> None:
        pieces, rank = len(table), (table.size(1) - 1) // 2
        pairs = self.count(stream, pieces)
        after, p = pairs.sum(1), pairs.sum(0) + 0.1
        p = p / p.sum()
        lift = (pairs.add_(self.PRIOR * p) / (after + self.PRIOR)[:, None]).div_(p).log_()
        rows, columns = ((q + 1e-6).sqrt() for q in (after / after.sum(), p))
        with torch.random.fork_rng([]):
            torch.manual_seed(0)
            u, s, v = torch.svd_lowrank(lift.mul_(rows[:, None]).mul_(columns), min(rank + 16, pieces), niter=3)
        left, right = (f[:, :rank] * s[:rank].sqrt() / q[:, None] for f, q in ((u, rows), (v, columns)))
        rank = left.size(1)
        length = left.norm(dim=1, keepdim=True)
        longest = length.quantile(0.98)
        left = left * (longest / length.clamp_min(longest))
        filler = (longest.square() - left.square().sum(1)).clamp_min(0).sqrt()
        table[:, :rank], table[:, rank], table[:, rank + 1 : 2 * rank + 1] = left / longest, filler / longest, right
        i = torch.arange(rank + 1)
        embed_in[i, i] = 1.0
        embed_out[rank + 1 + i[:-1], i[:-1]] = float(longest) / embed_out.size(1) ** 0.5
        bias.copy_((p.log() - p.log().max() + 3).clamp_min(-9))

    def count(self, stream: TokenStream, pieces: int) -> Tensor:
        """(pieces, pieces) float32: how often token b follows token a among the first TOKENS training tokens."""
        pairs, most = torch.zeros(pieces * pieces), min(self.TOKENS, stream.num_tokens - 1)
        for first in range(0, most, 1 << 22):
            tokens = torch.from_numpy(stream.read(first, min(1 << 22, most - first) + 1).astype(np.int64))
            pairs += torch.bincount(tokens[:-1] * pieces + tokens[1:], minlength=pieces * pieces)
        return pairs.view(pieces, pieces)

class Commitment(Hook):
    """The gradient of #126's commitment loss: lambda * sum over matrices of mean((w / alpha - code)^2).

    Once a step, after the sum over the processes, each in its own shards. alpha is a group's scale before it is
    rounded; it is differentiated, as in #126: the pull changes the shape of a group's weights and not their size.
    """

    def after_gradients(self) -> bool:
        grads, weight = self.step.grads, self.step.cfg.ternary_commit_lambda
        for bank in grads.banks:
            if bank.ternary:
                pull = commitment(bank.shard, bank.modules[0].group_size, bank.modules[0].form)
                (weight * grads.scale * pull).backward()
        return True

def commitment(w: Tensor, group_size: int, form: ScaleFormat) -> Tensor:
    """Mean squared distance of latent weights, in units of their scale, from their codes, summed over w's n. A group
    whose scale is at its lower bound, as one of zeros is, has no pull: 1 / alpha would make it one of 1e8."""
    codes, groups = ternarize(w.detach(), group_size, form)[0], w.view(-1, group_size)
    if form.stat == "rms":
        alpha = groups.square().mean(-1, keepdim=True).clamp_min(1e-16).sqrt()
    else:
        alpha = groups.abs().mean(-1, keepdim=True).clamp_min(1e-8)
    distance = torch.where(alpha > 1e-8, groups / alpha - codes, 0.0)
    return distance.square().sum() * len(w) / w.numel()

class LossScaling(Hook):
    """Dynamic loss scale (arXiv:1710.03740), since in float16 gradients of activations would underflow: doubled after
    2,000 good steps; halved where a gradient is not finite, and the step is skipped on every process.
    torch.amp.GradScaler decides for each optimizer and process on its own."""

    GROWTH_STEPS = 2000

    def __init__(self, step: TrainingStep) -> None:
        super().__init__(step)
        self.good_steps, step.grads.scale, self._logged = 0, 2.0**16, 2.0**16

    def state(self) -> dict[str, Any]:
        return {"good_steps": self.good_steps, "scale": self.step.grads.scale, "logged": self._logged}

    def restore(self, state: dict[str, Any]) -> None:
        self.good_steps, self.step.grads.scale, self._logged = (state[key] for key in ("good_steps", "scale", "logged"))

    def after_gradients(self) -> bool:
        """Divide the step's gradients by the scale; False, on all processes, if one of them is not finite."""
        grads = self.step.grads
        finite = not self.step.world.sum_(sum((~g.isfinite()).sum() for g in grads.own())).item()
        for g in grads.own():
            g.div_(grads.scale)
        self.good_steps = (self.good_steps + 1) % self.GROWTH_STEPS if finite else 0
        grads.scale *= 0.5 if not finite else 2.0 if self.good_steps == 0 else 1.0
        if grads.scale < 1:
            raise UserError("PRECISION=fp16: gradients overflow without any loss scale; expected one with more range")
        return finite

    def after_step(self, step: int, progress: float) -> str:  # noqa: ARG002
        before, self._logged = self._logged, self.step.grads.scale
        changed = self._logged != before
        return f"loss_scale:{self._logged:.0f} step:{step + 1}/{self.step.cfg.iterations}" if changed else ""

class Clipping(Hook):
    """All gradients scaled down to a common norm of at most GRAD_CLIP_NORM."""

    def after_gradients(self) -> bool:
        # float64, so that the order of the sum, and with it the number of processes, does not show
        own = self.step.grads.own()
        flat, *shards = (g.square().sum(dtype=torch.float64) for g in own)
        squares = self.step.world.sum_(sum(shards)) + flat
        for g in own:
            g *= (self.step.cfg.grad_clip_norm / (squares.sqrt() + 1e-6)).clamp_max(1)
        return True

class SpikeGuard(Hook):
    """SPIKE_GUARD: without the update of a step whose loss is that many standard deviations above its running mean.

    The device decides and takes back what it computed, on every process alike; the host reads what came of it a step
    later, as it does with the loss.
    """

    SETTLED, MEMORY, MOST = 20, 0.02, 10  # steps before it judges; weight of the newest loss; updates left out in a row

    def __init__(self, step: TrainingStep) -> None:
        super().__init__(step)
        # mean and variance of the loss, steps that count, updates left out, of them in a row
        self.figures_now, self.pending = torch.zeros(5, device=step.world.device), []

    def state(self) -> dict[str, Any]:
        return {"figures": self.figures_now}

    def restore(self, state: dict[str, Any]) -> None:
        if state:
            self.figures_now.copy_(state["figures"])

    @torch.no_grad()
    def after_gradients(self) -> bool:
        """Does the update, and leaves nothing of it if the loss is a spike."""
        mean, variance, steps, left_out, row = self.figures_now.unbind()
        far = self.step.grads.loss - mean
        spike = (far > self.step.cfg.spike_guard * variance.sqrt()) & (steps >= self.SETTLED)
        kept = self._tensors()
        before = [t.clone() for t in kept]
        for opt in self.step.optimizers:
            opt.step()
        for t, old in zip(kept, before, strict=True):
            t.copy_(torch.where(spike, old, t))
        self.step.publish()
        weight = (1 / (steps + 1)).clamp_min(self.MEMORY)
        usual = (mean + weight * far, (1 - weight) * (variance + weight * far.square()), steps + 1, left_out, 0 * row)
        unusual = mean, variance, steps, left_out + 1, row + 1
        self.figures_now = torch.where(spike, torch.stack(unusual), torch.stack(usual))
        return False

    def _tensors(self) -> list[Tensor]:
        params = [p for opt in self.step.optimizers for p in opt.params]
        return params + [t for opt in self.step.optimizers for p in opt.params for t in opt.state[p].values()]

    def after_step(self, step: int, progress: float) -> str:  # noqa: ARG002
        self.pending.append((step + 1, Reading(self.figures_now[4])))
        return self.look(self.step.world.device.type == "cuda")

    def look(self, most: int) -> str:
        """What there is to say of the steps whose figures have come, all but `most`."""
        lines = []
        while len(self.pending) > most:
            step, row = self.pending.pop(0)
            if count := int(row.get()):
                lines.append(f"spike: the update of step:{step}/{self.step.cfg.iterations} is left out")
            if count >= self.MOST:
                guard = f"SPIKE_GUARD={self.step.cfg.spike_guard}"
                raise UserError(f"{guard}: {count} updates in a row, up to step {step}, left out; expected more, or 0")
        return "\n".join(lines)

    def figures(self) -> dict[str, Any]:
        return {"updates_left_out": int(self.figures_now[3])}

class Averaging(Hook):
    """EMA (#641): from EMA_START_FRACTION of the budget on, a running average of the latent weights; each process
    averages what it updates. It replaces them at the end and is quantized as they would be, to codes of its own."""

    def __init__(self, step: TrainingStep) -> None:
        super().__init__(step)
        self._params = [p for opt in step.optimizers for p in opt.params]
        self._shadow: list[Tensor] = []

    def state(self) -> dict[str, Any]:
        pairs = zip(self._params, self._shadow, strict=False)
        return {str(i): all_parts(self.step, p, t) for i, (p, t) in enumerate(pairs)}

    def restore(self, state: dict[str, Any]) -> None:
        self._shadow = [own_part(self.step, p, state[str(i)]) for i, p in enumerate(self._params) if state]

    @torch.no_grad()
    def after_step(self, step: int, progress: float) -> str:  # noqa: ARG002
        if self._shadow:
            torch._foreach_lerp_(self._shadow, self._params, 1 - self.step.cfg.ema_decay)
        elif progress >= self.step.cfg.ema_start_fraction:
            self._shadow = [p.detach().clone() for p in self._params]
        return ""

    @torch.no_grad()
    def finish(self) -> None:
        if self._shadow:
            torch._foreach_copy_(self._params, self._shadow)
            self.step.publish()

class Churn(Hook):
    """CHURN_LOG_EVERY: the share of ternary codes that changed since the line before."""

    def __init__(self, step: TrainingStep) -> None:
        super().__init__(step)
        self._codes = self._ternary_codes()

    def state(self) -> dict[str, Any]:
        return {str(i): codes for i, codes in enumerate(self._codes)}

    def restore(self, state: dict[str, Any]) -> None:
        self._codes = [state[str(i)].to(codes.device) for i, codes in enumerate(self._codes)]

    def _ternary_codes(self) -> list[Tensor]:
        matrices = [m for m in self.step.model.modules() if isinstance(m, TernaryLinear)]
        return [m.stored(torch.float32).sign().to(torch.int8) for m in matrices]  # scales are positive

    @torch.no_grad()
    def after_step(self, step: int, progress: float) -> str:  # noqa: ARG002
        if (step + 1) % self.step.cfg.churn_log_every:
            return ""
        before, self._codes = self._codes, self._ternary_codes()
        total = sum(codes.numel() for codes in before)
        changed = sum(int((a != b).sum()) for a, b in zip(before, self._codes, strict=True))
        zeros = sum(int((codes == 0).sum()) for codes in self._codes)
        return f"churn:{changed / total:.4f} zero_frac:{zeros / total:.4f} step:{step + 1}/{self.step.cfg.iterations}"

# Checkpoints: everything a run needs to go on, written beside the training and whole or not at all.

CHECKPOINT_MAGIC, CHECKPOINT_VERSION = b"TGCK", 1
CHECKPOINT_PREFIX = struct.Struct("<4sHI")  # magic, version, bytes of the header; the SHA-256 of all ends the file
TENSOR_TYPES = {str(t).removeprefix("torch."): t for t in (torch.float32, torch.float64, torch.int8, torch.uint8)}

def all_parts(step: TrainingStep, p: Tensor, t: Tensor) -> Tensor:
    """State t of a parameter p of an optimizer, over all processes: of a bank's shard that of all its matrices."""
    bank = next((bank for bank in step.grads.banks if bank.shard is p), None)
    return step.world.gather(t)[: len(bank.modules)] if bank and t.dim() else t

def own_part(step: TrainingStep, p: Tensor, t: Tensor) -> Tensor:
    """The other way: what this process holds of it, whatever the number of processes was."""
    bank = next((bank for bank in step.grads.banks if bank.shard is p), None)
    if bank is None or not t.dim():
        return t.to(p.device, copy=True)
    filled = t.new_zeros(len(bank.latent), *t.shape[1:])
    filled[: len(t)] = t
    return filled.chunk(step.world.size)[step.world.rank].to(p.device, copy=True)

def training_state(step: TrainingStep) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, numbers) of weights, optimizers and hooks, over all processes, which must call it together."""
    step.share_latent()
    tensors = {f"weight.{name}": p.detach() for name, p in step.model.named_parameters()}
    for i, opt in enumerate(step.optimizers):
        for k, p in enumerate(opt.params):
            tensors |= {f"optimizer.{i}.{k}.{key}": all_parts(step, p, t) for key, t in opt.state[p].items()}
    numbers = {}
    for hook in step.hooks:
        for key, value in hook.state().items():
            (tensors if isinstance(value, Tensor) else numbers)[f"hook.{type(hook).__name__}.{key}"] = value
    return tensors, numbers

@torch.no_grad()
def restore_training(step: TrainingStep, tensors: dict[str, Tensor], numbers: dict[str, Any]) -> None:
    """As `training_state` was; ArtifactError where a tensor is missing or of another shape."""
    for name, p in step.model.named_parameters():
        saved = tensors.get(f"weight.{name}")
        if saved is None or saved.shape != p.shape:
            raise ArtifactError(f"weight.{name}: expected the shape {tuple(p.shape)} in the checkpoint")
        p.copy_(saved)
    for i, opt in enumerate(step.optimizers):
        for k, p in enumerate(opt.params):
            start = f"optimizer.{i}.{k}."
            opt.state[p] = {key.removeprefix(start): own_part(step, p, t) for key, t in tensors.items()
                            if key.startswith(start)}  # fmt: skip
    for hook in step.hooks:
        start = f"hook.{type(hook).__name__}."
        hook.restore({key.removeprefix(start): value for key, value in (tensors | numbers).items()
                      if key.startswith(start)})  # fmt: skip
    step.publish()

def checkpoint_chunks(header: dict[str, Any], tensors: dict[str, Tensor]) -> Iterator[bytes]:
    """The bytes of a checkpoint: prefix, header (JSON), tensors in its order, SHA-256."""
    described = [[name, str(t.dtype).removeprefix("torch."), list(t.shape)] for name, t in tensors.items()]
    text, digest = json.dumps(header | {"tensors": described}).encode(), hashlib.sha256()
    prefix = CHECKPOINT_PREFIX.pack(CHECKPOINT_MAGIC, CHECKPOINT_VERSION, len(text))
    data = (t.contiguous().numpy().reshape(-1).view(np.uint8).data for t in tensors.values())
    for part in itertools.chain((prefix, text), data):
        digest.update(part)
        yield part
    yield digest.digest()

def read_checkpoint(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(header, tensors); ArtifactError for anything that is not a whole checkpoint. Takes no memory before the header's
    claims agree with the file's size; nothing in it is executed."""
    with readable():
        data = np.memmap(path, np.uint8, "r") if path.stat().st_size else np.zeros(0, np.uint8)
    if len(data) < CHECKPOINT_PREFIX.size + 32 or data[:4].tobytes() != CHECKPOINT_MAGIC:
        raise ArtifactError(f"{path}: not a checkpoint of train_gpt.py")
    _, version, length = CHECKPOINT_PREFIX.unpack(data[: CHECKPOINT_PREFIX.size].tobytes())
    if version != CHECKPOINT_VERSION:
        raise ArtifactError(f"{path}: checkpoint version {version}; this train_gpt.py reads {CHECKPOINT_VERSION}")
    if hashlib.sha256(data[:-32]).digest() != data[-32:].tobytes():
        raise ArtifactError(f"{path}: the checkpoint is damaged: its SHA-256 does not match")
    start = CHECKPOINT_PREFIX.size + length
    try:
        header = json.loads(data[CHECKPOINT_PREFIX.size : start].tobytes())
        plan = [(str(name), TENSOR_TYPES[kind], tuple(map(int, shape))) for name, kind, shape in header["tensors"]]
        sizes = [math.prod(shape) * kind.itemsize for _, kind, shape in plan]
        whole = all(size >= 0 for size in sizes) and start + sum(sizes) == len(data) - 32
        numbers = {key: float(header[key]) for key in ("step", "position", "elapsed_s")}
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError):
        whole, numbers = False, {}
    if not whole or not all(0 <= n < 1e15 for n in numbers.values()):
        raise ArtifactError(f"{path}: the checkpoint's header is not valid")
    ends = [start, *(start + end for end in itertools.accumulate(sizes))]
    try:
        tensors = {name: torch.tensor(data[a:b]).view(kind).view(shape)
                   for (name, kind, shape), a, b in zip(plan, ends, ends[1:], strict=False)}  # fmt: skip
    except (RuntimeError, TypeError):  # no elements, in a shape that no tensor has
        raise ArtifactError(f"{path}: the checkpoint's header is not valid") from None
    if bad := not_finite(tensors):
        raise ArtifactError(f"{path}: {bad!a} is not finite")
    return header, tensors

def not_finite(tensors: dict[str, Tensor]) -> str:
    """The name of the first tensor that is not finite; "" if all are."""
    return next((name for name, t in tensors.items() if not t.isfinite().all()), "")

def data_identity(cfg: Config) -> dict[str, str]:
    """What a run must find again: its training shards and its tokenizer."""
    tokenizer = hashlib.sha256(Path(cfg.tokenizer_path).read_bytes()).hexdigest()
    return {"data": shards_identity(cfg, "train"), "tokenizer": tokenizer}

def shards_identity(cfg: Config, split: str) -> str:
    """The number and the size of a split's shards, and a SHA-256 of their names and sizes and of the manifest, else of
    their beginnings."""
    manifest, digest, total = Path(cfg.data_path) / "manifest.json", hashlib.sha256(), 0
    shards = sorted(Path(cfg.data_path).glob(f"fineweb_{split}_*.bin"))
    if split == "train" and not shards:
        shards = TokenStream(cfg, split).paths  # UserError
    for path in [*shards, *[manifest] * manifest.is_file()]:
        size = path.stat().st_size
        with open(path, "rb") as f:
            text = f.read(-1 if path == manifest else 0 if manifest.is_file() else 2**16)
        digest.update(f"{path.name} {size} ".encode() + text)
        total += size * (path != manifest)
    return f"{len(shards)} shards, {total} bytes, {digest.hexdigest()[:16]}"

class Checkpoints(Hook):
    """CHECKPOINT_EVERY, RESUME and EXPORT_ON_STOP. The training waits for the copy alone; a thread of rank 0 writes."""

    PATIENCE_S, BEAT_S = 5, 1

    def begin(self, loop: Loop) -> None:
        cfg = self.step.cfg
        self.loop, self.folder, self.writer, self.writing = loop, Path(cfg.checkpoint_dir), ThreadPoolExecutor(1), None
        every = cfg.checkpoint_every
        self.every_s, self.every = (float(every[:-1]), 0) if every.endswith("s") else (0.0, int(every))
        self.restarts, self.lost_steps, self.beating = 0, 0, threading.Event()
        self.lineage = cfg.run_id  # of the run that began it
        self.same = cfg.model_settings() | data_identity(cfg)
        if cfg.resume not in ("", "0"):
            self.resume()
        self.saved_s, self.saved_step = loop.clock.elapsed(), loop.step
        if self.step.world.is_main and self.on:
            check_writable(str(self.folder / "heartbeat.json"), "CHECKPOINT_DIR")
            threading.Thread(target=self.beat, daemon=True).start()

    @property
    def on(self) -> bool:
        return bool(self.every or self.every_s)

    def beat(self) -> None:
        """Once a second: how far the clock is, for a run that is killed between two checkpoints."""
        while not self.beating.wait(self.BEAT_S):
            state = {"elapsed_s": self.loop.clock.elapsed(), "step": self.loop.step, "lineage": self.lineage}
            with contextlib.suppress(OSError):
                write_whole(self.folder / "heartbeat.json", json.dumps(state).encode())

    def after_step(self, step: int, progress: float) -> str:  # noqa: ARG002
        due = self.every and self.loop.step - self.saved_step >= self.every
        if self.every_s:
            due = self.step.world.agree(self.loop.clock.elapsed() - self.saved_s >= self.every_s)
        if due and self.step.world.agree(self.written(self.PATIENCE_S)):
            self.save()
        elif due:
            self.saved_s, self.saved_step = self.loop.clock.elapsed(), self.loop.step
            return f"warning: no checkpoint at step:{step + 1}: the one before is still being written"
        return ""

    def written(self, patience_s: float) -> bool:
        """Whether the thread is free; a disk that is slow must not hold the other processes up."""
        return not self.writing or self.writing in wait([self.writing], patience_s).done

    def stop(self) -> bool:
        """A signal asks the run to end: a checkpoint, then the artifact of what has been trained if it is asked for."""
        if self.on and self.loop.step:
            if self.loop.step > self.saved_step:
                self.save()
            self.finish()
        return self.step.cfg.export_on_stop and self.loop.step > 0

    def finish(self) -> None:
        self.beating.set()
        self.finish_writing()

    def figures(self) -> dict[str, Any]:
        return {"restarts": self.restarts, "lost_steps": self.lost_steps}

    def save(self) -> None:
        loop, cfg = self.loop, self.step.cfg
        loop.read_losses(0)
        tensors, numbers = training_state(self.step)
        self.saved_s, self.saved_step = loop.clock.elapsed(), loop.step
        if not self.step.world.is_main:
            return
        self.finish_writing()
        header = {"step": loop.step, **loop.batches.state(), "elapsed_s": self.saved_s, "numbers": numbers,
                  "first_losses": loop.report.first_losses, **self.figures(), "lineage": self.lineage,
                  "same": self.same, "config": dataclasses.asdict(cfg),
                  "code_sha256": hashlib.sha256(Path(__file__).read_bytes()).hexdigest()}  # fmt: skip
        copies = {name: t.detach().to("cpu", copy=True) for name, t in tensors.items()}
        path = self.folder / f"{cfg.run_id}_{loop.step:08d}.ckpt"
        self.writing = self.writer.submit(self.write, path, header, copies)

    def finish_writing(self) -> None:
        if self.writing:
            self.writing.result()

    def write(self, path: Path, header: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """In the thread. What cannot be written, or is not finite, is warned of; the run and the earlier ones stay."""
        if bad := not_finite(tensors):
            self.loop.log(f"warning: no checkpoint at step:{header['step']}: {bad} is not finite")
            return
        try:
            write_whole(path, checkpoint_chunks(header, tensors))
            self.loop.log(f"checkpoint:{path} step:{header['step']}")
            self.loop.report.saved = f"; the last good checkpoint is {path}"
            own = [old for old in newest_first(self.folder) if old.name[:-14] == self.step.cfg.run_id]  # _00000000.ckpt
            for old in own[self.step.cfg.checkpoint_keep :]:
                old.unlink()
        except OSError as error:
            self.loop.log(f"warning: checkpoint {path} cannot be written ({error.strerror}); the run goes on")

    def resume(self) -> None:
        cfg, world, loop = self.step.cfg, self.step.world, self.loop
        found = find_checkpoint(cfg, loop.log)
        found_step = int(found[0]["step"]) if found else 0
        if world.gather(torch.tensor([found_step], device=world.device)).unique().numel() > 1:
            raise UserError(f"RESUME={cfg.resume!r}: the processes find different checkpoints; expected one disk")
        if found is None:
            loop.log(f"RESUME={cfg.resume}: no checkpoint in {self.folder}; the run starts from the beginning")
            return
        try:
            self.go_on(*found)
        except UserError:
            raise
        except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise ArtifactError(f"RESUME={cfg.resume!r}: what the checkpoint holds is not valid ({reason})") from None

    def go_on(self, header: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        cfg, world, loop = self.step.cfg, self.step.world, self.loop
        saved = UNSAID | header["same"]
        for name, value in self.same.items():
            if saved.get(name) != value:
                other = f"the checkpoint has {' '.join(str(saved.get(name)).split()):.80}"
                raise UserError(f"RESUME={cfg.resume!r}: {name}={value}, but {other}; a run goes on with the same")
        restore_training(self.step, tensors, header["numbers"])
        loop.report.saved = "; the last good checkpoint is that of RESUME"
        loop.step = loop.report.step = int(header["step"])
        loop.report.first_losses = list(header["first_losses"])
        loop.batches.restore(header)
        beat = self.heartbeat(header)
        elapsed_s = world.agree(self.charged_s(header, beat))
        loop.clock.advance(elapsed_s)
        self.restarts, self.lineage = int(header["restarts"]) + 1, header["lineage"]
        self.lost_steps = int(header["lost_steps"]) + max(0, int(beat.get("step", 0)) - loop.step)
        loop.log(f"resumed step:{loop.step} elapsed:{1000 * elapsed_s:.0f}ms restarts:{self.restarts} "
                 f"lost_steps:{self.lost_steps}")  # fmt: skip

    def charged_s(self, header: dict[str, Any], beat: dict[str, Any]) -> float:
        """Seconds of training so far, also of steps that were lost; at most one beat more than there were."""
        return max(header["elapsed_s"], beat.get("elapsed_s", -math.inf) + self.BEAT_S)

    def heartbeat(self, header: dict[str, Any]) -> dict[str, Any]:
        """Of the run that wrote the checkpoint; {} without."""
        with contextlib.suppress(OSError, AttributeError, LookupError, RecursionError, TypeError, ValueError):
            beat = json.loads((self.folder / "heartbeat.json").read_bytes())
            if beat.get("lineage") == header["lineage"]:
                return {key: float(beat[key]) for key in ("elapsed_s", "step")}
        return {}

def newest_first(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.ckpt"), key=lambda path: path.stat().st_mtime_ns, reverse=True)

def find_checkpoint(cfg: Config, log: Callable) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
    """The newest whole one in CHECKPOINT_DIR (RESUME=1), or the one that RESUME names."""
    if cfg.resume != "1":
        with readable():
            found = Path(cfg.resume).is_file()
        if not found:
            raise UserError(f"RESUME={cfg.resume!r}: expected 1 or the path of a checkpoint")
        return read_checkpoint(Path(cfg.resume))
    with readable():
        paths = newest_first(Path(cfg.checkpoint_dir))
    for path in paths:
        try:
            return read_checkpoint(path)
        except ArtifactError as error:
            log(f"warning: {error}; the one before is tried")
    return None

# Room, before training.

def check_room(where: list[tuple[str, str, str, int]]) -> None:
    """(setting, its path, what is written there, bytes) of each file: UserError if the disks have not so much left."""
    needed: dict[int, list] = defaultdict(lambda: [0, []])
    for name, path, what, size in where:
        try:
            folder = next(p for p in Path(path).absolute().parents if p.is_dir())
            disk = needed[folder.stat().st_dev]
        except OSError as error:
            raise UserError(f"{name}={path!r}: expected a path that can be written to ({error.strerror})") from None
        disk[0] += size
        disk[1].append(what)
        if (free := shutil.disk_usage(folder).free) < disk[0]:
            wanted = f"{disk[0]:,} for {', '.join(disk[1])}"
            raise UserError(f"{name}={path!r}: {free:,} bytes are free there; expected {wanted}")

def memory_bytes() -> tuple[int, int]:
    """(all, available) of this machine or, where it is less, of its control group; no bound where nothing says it."""
    sizes = []
    for name, pattern in (("/proc/meminfo", r"Mem(?:Total|Available):\s+(\d+) kB"),
                          ("/sys/fs/cgroup/memory.max", r"(\d+)")):  # fmt: skip
        with contextlib.suppress(OSError):
            found = [int(n) for n in re.findall(pattern, Path(name).read_text())]
            sizes += [(1024 * found[0], 1024 * found[1])] if len(found) > 1 else [(n, n) for n in found]
    return (min(all_ for all_, _ in sizes), min(free for _, free in sizes)) if sizes else (2**62, 2**62)

def scoring_bytes(cfg: Config, world: World, targets: int) -> int:
    """What `evaluate` holds of the windows that a CPU's threads score at once: a block's operands and what later layers
    get; measured: .6 to 1.1 of it."""
    kinds = [(cfg.train_seq_len, cfg.train_seq_len, cfg.val_batch_size // world.size),
             (cfg.score_window, cfg.score_stride, cfg.sliding_batch_size * cfg.score_window)]  # fmt: skip
    at_once = lambda length, most: torch.get_num_threads() * max(1, min(cfg.micro_batch_tokens, most) // length)
    tokens = max(n * max(1, min(targets // stride // world.size, at_once(n, most)))
                 for n, stride, most in kinds[: 1 + cfg.sliding_eval])  # fmt: skip
    kept = (12 + cfg.num_layers // 2) * cfg.model_dim + 2 * cfg.mlp_dim
    return tokens * kept * compute_dtype(cfg.precision, world.device).itemsize

def check_resources(model: GPT, world: World, log: Log, targets: int) -> None:
    """UserError where disks or, on a CPU, memory cannot hold the run; a warning where others leave too little."""
    cfg, (params, ternary) = model.cfg, count_parameters(model)
    kept = cfg.checkpoint_keep * (cfg.checkpoint_every != "0")
    size = 4 * params * (3 + cfg.ema)  # weights, two moments, an average
    if world.is_main:
        check_room([("ARTIFACT_PATH", cfg.artifact_path, "the artifact", ternary // 4 + 2 * (params - ternary)),
                    ("LOG_DIR", str(log.path), "the log", 2**20),
                    ("CHECKPOINT_DIR", f"{cfg.checkpoint_dir}/x", f"CHECKPOINT_KEEP={kept} and one being written",
                     size * (kept + 1) if kept else 0)])  # fmt: skip
    if world.device.type == "cpu":
        micro_batches, sequences = batch_layout(cfg, world.size)
        at_once = min(torch.get_num_threads(), micro_batches)
        # logits are made a few rows at a time; measured: .8 to 1 of it
        token_bytes = bytes_per_token(cfg, world.device) - 24 * cfg.vocab_size
        batch, scored = at_once * sequences * cfg.train_seq_len * token_bytes, scoring_bytes(cfg, world, targets)
        setting = "MICRO_BATCH_TOKENS" if max(batch, scored) > 24 * params else "NUM_LAYERS"
        needed, (most, free) = max(batch, scored) + 24 * params + size * (kept > 0), memory_bytes()
        text = f"{setting}={getattr(cfg, setting.lower())}: some {needed / 2**30:.1f} GiB of memory a process"
        if needed > most:
            raise UserError(f"{text}, of {most / 2**30:.1f} GiB that the machine has; expected less")
        if world.is_main and needed * world.size > free:
            log(f"warning: {text}, of which {free / 2**30:.1f} GiB are free; a lower one takes less")

# Several processes: each knows what the others do, so that one which is missing or different is named.

class Watch:
    """A thread tells the other processes once a second, through the store that they met at, how many collectives this
    one has entered, and looks at theirs. It ends this process, and says why, if one of them gives no sign of life, has
    failed, or stays behind while the others wait for it. Seconds are counted in looks: a sleeping machine has none."""

    LOOK_S = 1.0
    SILENT, FAILED, WAITING, TRAINING = 20, 5, 600, 60  # looks

    def __init__(self, world: World, env: Mapping[str, str]) -> None:
        self.world, self.words, self.stopped, self.beats = world, "", threading.Event(), 0
        self.silent, self.patience = self.SILENT, self.WAITING
        first = world.rank - int(env.get("LOCAL_RANK", 0))
        self.here = range(first, first + int(env.get("LOCAL_WORLD_SIZE", 1)))  # the processes of this machine
        self.where = f"{env['MASTER_ADDR']}:{env['MASTER_PORT']}"
        self.stores = [dist.PrefixStore(f"watch{env.get('TORCHELASTIC_RESTART_COUNT', '')}", dist.TCPStore(
            env["MASTER_ADDR"], int(env["MASTER_PORT"]), wait_for_workers=False)) for _ in range(2)]  # fmt: skip
        self.looks = [[-1, -1, "", 0, 0, 0] for _ in range(world.size)]  # beats, calls, words; looks since each changed
        self.say()
        self.thread = threading.Thread(target=self.keep_looking, daemon=True)
        self.thread.start()
        threading.Thread(target=self.keep_reaching, daemon=True).start()

    def say(self, words: str = "") -> None:
        self.words, self.beats = self.words or words, self.beats + 1
        state = [self.beats, self.world.entered, self.words, platform.node()]
        self.stores[0].set(f"state{self.world.rank}", json.dumps(state))

    def keep_looking(self) -> None:
        try:
            while not self.stopped.wait(self.LOOK_S):
                self.say()
                states = self.stores[0].multi_get([f"state{rank}" for rank in range(self.world.size)])
                if missing := self.missing([json.loads(state) for state in states]):
                    self.end(missing)
        except RuntimeError:  # the store is gone
            time.sleep(self.FAILED * self.LOOK_S)  # if all are ending, so is this one
            self.end({0: f"{self.where} cannot be reached: rank 0, or torchrun on its machine, has ended"})

    def keep_reaching(self) -> None:
        """End this process where the store does not answer: behind a cut cable its calls have no time limit."""
        beats, same = -1, 0
        while not self.stopped.wait(self.LOOK_S):
            beats, same = self.beats, same + 1 if self.beats == beats else 0
            if same >= self.SILENT:
                self.end({0: f"{self.where} cannot be reached: no answer for {same * self.LOOK_S:.0f} s"})

    def missing(self, states: list[tuple[int, int, str, str]]) -> dict[int, str]:
        """Rank -> what is the matter with it."""
        for look, state in zip(self.looks, states, strict=True):
            for k in range(3):
                look[k], look[k + 3] = state[k], look[k + 3] + 1 if look[k] == state[k] else 0
        most, found = max(look[1] for look in self.looks), {}
        for rank, (_, calls, words, silent, behind, failed) in enumerate(self.looks):
            name = f"rank {rank} of {self.world.size} on {states[rank][3]}"
            if words == "done" or rank == self.world.rank and words:
                continue
            if words and failed >= self.FAILED:
                found[rank] = f"{name} failed: {words}"
            elif silent >= self.silent and not words:
                found[rank] = f"{name} has ended or stands still: no sign of life for {silent * self.LOOK_S:.0f} s"
            elif calls < most and behind >= self.patience:
                found[rank] = f"{name} hangs: the others have waited for it for {behind * self.LOOK_S:.0f} s"
        return found

    def end(self, missing: dict[int, str]) -> None:
        """End this process; on each machine the first of those that are not missing says why."""
        if self.stopped.is_set():
            return
        if next((rank for rank in self.here if rank not in missing), -1) == self.world.rank:
            print(f"train_gpt.py: {'; '.join(missing.values())}", file=sys.stderr, flush=True)
        else:
            time.sleep(3 * self.LOOK_S)  # torchrun ends every process with the first one that does
        os._exit(1)

    def failed(self, error: Exception, rest: int = 0) -> None:
        """Tell the others of this process's own error. After an error of a collective, another process may have ended:
        then it is named, and this call does not return."""
        with contextlib.suppress(RuntimeError):
            if isinstance(error, dist.DistError) or isinstance(error, RuntimeError) and "gloo" in str(error).lower():
                signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun's, which has seen it too
                self.silent, rest = self.FAILED, 2 * self.FAILED
            else:
                self.say(str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__)
            self.stopped.wait(rest * self.LOOK_S)
        self.leave()

    def leave(self) -> None:
        """Stop looking. Python's end aborts a thread that is inside the store, and with it the process's exit code."""
        self.stopped.set()
        self.thread.join(self.FAILED * self.LOOK_S)

    def close(self) -> None:
        self.leave()
        with contextlib.suppress(RuntimeError):
            self.say("done")

    def compare(self, cfg: Config, artifact: bytes) -> None:
        """UserError, on every process, unless all have the same settings, code, data and torch."""
        self.stores[1].set(f"facts{self.world.rank}", json.dumps(run_identity(cfg, artifact)))
        first, *others = (json.loads(self.stores[1].get(f"facts{rank}")) for rank in range(self.world.size))
        for rank, theirs in enumerate(others, 1):
            if name := next((name for name in first if theirs.get(name) != first[name]), ""):
                both = f"{name}={theirs.get(name)} on rank {rank}, but {first[name]} on rank 0"
                raise UserError(f"{both}; expected the same on all {self.world.size} processes")

def run_identity(cfg: Config, artifact: bytes) -> dict[str, str]:
    """What must be the same on every process; paths may differ from machine to machine."""
    own = ("run_id", "log_dir", "artifact_path", "data_path", "tokenizer_path")
    settings = {key.upper(): str(value) for key, value in dataclasses.asdict(cfg).items() if key not in own}
    code, model = (hashlib.sha256(data).hexdigest() for data in (Path(__file__).read_bytes(), artifact))
    data = {"artifact": model} if cfg.eval_only else data_identity(cfg)
    return {"torch": torch.__version__, "code": code} | settings | data | {"validation": shards_identity(cfg, "val")}

class Watching(Hook):
    """While training, processes wait for each other at most Watch.TRAINING seconds; else one compiles or exports."""

    def begin(self, loop: Loop) -> None:  # noqa: ARG002
        self.step.world.watch.patience = Watch.TRAINING

    def finish(self) -> None:
        self.step.world.watch.patience = Watch.WAITING

    def stop(self) -> bool:
        self.finish()
        return False

class Replicas(Hook):
    """CHECK_REPLICAS_EVERY: whether all processes compute with the same weights, bit for bit."""

    def after_step(self, step: int, progress: float) -> str:  # noqa: ARG002
        if (step + 1) % self.step.cfg.check_replicas_every:
            return ""
        owners = [(name, getattr(module, "operand", p)) for name, module, p, _ in parameter_owners(self.step.model)]
        sums = torch.stack([t.detach().contiguous().view(torch.uint8).sum(dtype=torch.int64) for _, t in owners])
        all_sums = self.step.world.gather(sums[None]).cpu()
        if (differ := (all_sums != all_sums[0]).nonzero()).numel():
            rank, which = differ[0].tolist()
            found = f"{owners[which][0]} of rank {rank} differs from rank 0's at step {step + 1}"
            raise UserError(f"CHECK_REPLICAS_EVERY={self.step.cfg.check_replicas_every}: {found}; see docs/faults.md")
        return ""

# Who follows a run, on rank 0: a person at a terminal, by a bar on stderr, and the programs of TRACK.

# FLOP/s of dense products in 16 bits, as the cards' maker states them
PEAK_FLOPS = {"H100 PCIe": 756e12, "H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "RTX 4090": 165e12}

def flops_a_token(model: GPT) -> float:
    """Forward and backward: 6 a weight, and 12 a channel of a query and a key, half of which causality leaves. 0 where
    layers repeat or differ, or other heads train."""
    cfg, known = model.cfg, model.parts.order is u_net and model.parts.loss is training_loss
    weights = sum(m.weight.numel() for m in model.modules() if isinstance(m, QuantizedLinear))
    attention = cfg.num_layers * cfg.head_dim * cfg.num_heads * cfg.train_seq_len
    return 6.0 * (weights + attention) if known and not (cfg.attention_window or cfg.attention_free_layers) else 0.0

class Phase:
    """A part of the run: which share of it is done, and how that looks on a line."""

    def __init__(self, name: str, peak: float, loop: Loop | None = None, step: TrainingStep | None = None) -> None:
        self.name, self.loop, self.step, self.loss, self.seen = name, loop, step, 0.0, 0
        self.share, self.at = self.first = 0.0, time.perf_counter()  # done, and since when
        if loop:
            self.start = loop.batches.state()["position"], loop.clock.elapsed()
            self.of_peak = flops_a_token(step.model) / peak if peak else 0.0  # a token a second

    def done(self, share: float) -> None:
        self.share, self.at = share, time.perf_counter()

    def training(self, val_bpb: str) -> list[str]:
        loop, (tokens, seconds) = self.loop, self.start
        if loop.progress != self.share:
            self.first = self.first if self.share else (loop.progress, time.perf_counter())  # or where another run was
            self.done(loop.progress)
        if not math.isfinite(loop.report.loss):
            return []
        self.seen += 1
        self.loss += (loop.report.loss - self.loss) / min(self.seen, 50)  # of the last ten seconds
        rate = (loop.batches.state()["position"] - tokens) / max(1e-9, loop.clock.elapsed() - seconds)
        said = [f"loss {self.loss:.3f}", f"{rate / 1e6:.2f}M tok/s" if rate >= 1e6 else f"{rate / 1e3:.1f}k tok/s"]
        said += [f"{self.of_peak * rate:.0%} of peak"] * bool(self.of_peak)
        return [*said, *[f"val {val_bpb}"] * bool(val_bpb), f"lr {self.step.optimizers[0].group['lr']:.2g}"]

    def text(self, columns: int, val_bpb: str, meter: Callable | None) -> str:
        """At most `columns` wide: name, time left, loss; where there is room a bar of 6, too, and the other figures."""
        said, (share, since) = self.training(val_bpb) if self.loop else [], self.first
        clock = lambda seconds: f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
        now, ahead = time.perf_counter(), self.share > share
        left = (self.at - since) * (1 - min(1, self.share)) / (self.share - share) - (now - self.at) if ahead else 0
        said.insert(0, f"{clock(max(0, left))} left" if ahead else clock(now - since))
        room = lambda: columns - len(self.name) - len(", ".join(said))
        while len(said) > 2 and room() < 15:
            said.pop()
        if not (self.share and meter) or room() < 15:
            share = f" {self.share:.0%}" if self.share and room() > 5 else ""
            return f"{self.name}{share} {', '.join(said[: 1 if room() < 1 else None])}"[:columns]
        narrow = not (sys.stderr.encoding or "").lower().startswith("utf")
        return meter(min(self.share, 1.0), 1, 0, ncols=columns, prefix=self.name, ascii=narrow, said=", ".join(said),
                     bar_format="{desc} {percentage:3.0f}%|{bar}| {said}")  # fmt: skip

class Follower(View):
    """The bar is drawn by a thread of its own. The cursor rests at its beginning, from where all below is erased: also
    what a terminal that was narrowed made of it. What a program of TRACK raises ends that program alone."""

    def __init__(self, cfg: Config, shows: bool, trackers: dict[str, Callable], peak_flops: float) -> None:
        super().__init__()
        self.cfg, self.shows, self.starts, self.peak = cfg, shows, trackers, peak_flops
        self.name, self.sends, self.step = f"{cfg.run_id}_{os.urandom(4).hex()}", {}, 0
        self.lock, self.ended, self.val_bpb, self.meter = threading.RLock(), threading.Event(), "", None
        self.interrupted, self.now = None, Phase("setting up", 0)
        self.callback(self.end)
        if shows:
            with contextlib.suppress(ImportError):
                from tqdm import tqdm

                self.meter = tqdm.format_meter
            threading.Thread(target=self.draw, daemon=True).start()

    @classmethod
    def from_env(cls, cfg: Config, world: World, env: Any = os.environ) -> View:
        """UserError where a program of TRACK is not installed."""
        if not world.is_main:
            return View()
        trackers = {}
        for name in filter(None, cfg.track.split(",")):
            try:
                trackers[name] = TRACKERS[name](Path(cfg.log_dir).resolve(), env)
            except ImportError as error:
                wanted = f"expected the package {name} (pip install {name}): {error}"
                raise UserError(f"TRACK={cfg.track!r}: {wanted}") from None
        shows = env.get("TERM", "dumb") != "dumb" and env.get("CI", "") in ("", "0", "false") and sys.stderr.isatty()
        peak = world.size * next((peak for card, peak in PEAK_FLOPS.items() if card in gpu_name(world)), 0)
        return cls(cfg, shows, trackers, peak) if shows or trackers else View()

    def columns(self) -> int:
        with contextlib.suppress(OSError, ValueError):
            return os.get_terminal_size(sys.stderr.fileno()).columns or 80
        return 80

    def write(self, text: str) -> None:
        with contextlib.suppress(OSError, ValueError):
            print(text, end="", file=sys.stderr, flush=True)

    def draw(self) -> None:
        while not self.ended.is_set():
            with self.lock:
                if self.interrupted and self.now.share >= 1:  # a validation has ended
                    self.now, self.interrupted = self.interrupted, None
                if not self.ended.is_set():
                    self.write(f"\r{self.now.text(self.columns() - 1, self.val_bpb, self.meter)}\x1b[J\r")
            self.ended.wait(0.2)

    def phase(self, name: str, *training: Any) -> Callable[[float], None]:
        self.interrupted, self.now = self.now if self.now.loop else None, Phase(name, self.peak, *training)
        return self.now.done

    @contextlib.contextmanager
    def line(self, log: Log, text: str) -> Iterator[None]:
        with self.lock:
            if self.shows:  # the spaces are for notebooks, which know no more
                self.write("\r" + " " * (self.columns() - 1) + "\r\x1b[J")
            yield
        if found := re.match(r"step:(\d+)/\d+ val_loss:(\S+) val_bpb:(\S+)", text):
            self.val_bpb = found[3]
            self.track(log, int(found[1]), {"val/loss": float(found[2]), "val/bpb": float(found[3])})
        elif text.startswith("result {"):
            numbers = {key: x for key, x in json.loads(text[7:]).items() if isinstance(x, (int, float))}
            self.track(log, self.step, {f"result/{key}": float(x) for key, x in numbers.items()})

    def track(self, log: Log, step: int, figures: dict[str, float]) -> None:
        self.step = step
        for name in list(self.starts):
            try:
                with contextlib.redirect_stdout(io.StringIO()):  # the console is the log's
                    if name not in self.sends:
                        self.sends[name] = self.starts[name](self.name, dataclasses.asdict(self.cfg))
                    if figures:
                        self.sends[name][0](step, figures)
            except Exception as error:  # whatever a library raises
                del self.starts[name]
                self.sends.pop(name, None)
                reason = f"{type(error).__name__}: {(str(error).splitlines() or ['?'])[0]}"
                log(f"warning: TRACK={name}: {reason}; it is off from here on, the run goes on")

    def end(self) -> None:
        with self.line(self, ""):
            self.ended.set()
        for _, close in self.sends.values():
            with contextlib.suppress(Exception), contextlib.redirect_stdout(io.StringIO()):
                close()

# By TRACK: imports the library; then (name, settings) begin a run, or go on with it; then (step, figures) go to the
# first of two functions, and the second ends it.

def tensorboard(folder: Path, env: Any) -> Callable:  # noqa: ARG001
    from torch.utils.tensorboard import SummaryWriter

    def start(name: str, settings: dict[str, Any]) -> tuple[Callable, Callable]:
        writer = SummaryWriter(str(folder / "tensorboard" / name))
        writer.add_text("config", json.dumps(settings))
        return lambda step, figures: [writer.add_scalar(*figure, step) for figure in figures.items()], writer.close

    return start

def weights_and_biases(folder: Path, env: Any) -> Callable:
    import wandb

    def start(name: str, settings: dict[str, Any]) -> tuple[Callable, Callable]:
        opened = wandb.init(project=env.get("WANDB_PROJECT", "train_gpt"), name=name, id=name, resume="allow",
                            mode=env.get("WANDB_MODE", "offline"), dir=str(folder), config=settings,
                            settings=wandb.Settings(silent=True, console="off"))  # fmt: skip
        return lambda step, figures: opened.log(figures, step=step), wandb.finish

    return start

def trackio_runs(folder: Path, env: Any) -> Callable:
    env.setdefault("TRACKIO_DIR", str(folder / "trackio"))  # read when it is imported
    import trackio

    def start(name: str, settings: dict[str, Any]) -> tuple[Callable, Callable]:
        trackio.init(project="train_gpt", name=name, config=settings, resume="allow", embed=False,
                     auto_log_cpu=False, auto_log_gpu=False)  # fmt: skip
        return lambda step, figures: trackio.log(figures, step=step), trackio.finish

    return start

TRACKERS = {"tensorboard": tensorboard, "wandb": weights_and_biases, "trackio": trackio_runs}

class Tracking(Hook):
    """TRACK: at steps that log, what goes on in each matrix. Norms are of the gradients that the optimizers read and
    of latent weights, over all processes; on a GPU, whose losses are read late, of the step after the loss's."""

    def __init__(self, step: TrainingStep) -> None:
        super().__init__(step)
        self.names, self.earlier, self.codes = {m: name for name, m in step.model.named_modules()}, "", {}
        banked = {module for bank in step.grads.banks for module in bank.modules}
        self.others = {name: p for name, module, p, _ in parameter_owners(step.model) if module not in banked}
        rates = dict.fromkeys(["matrix_lr", *(role.rate for *_, role in parameter_owners(step.model))])
        self.rates = {f"lr/{rate}": opt for rate, opt in zip(rates, step.optimizers, strict=True)}

    def state(self) -> dict[str, Any]:
        return {"name": self.loop.log.view.name}

    def restore(self, state: dict[str, Any]) -> None:
        self.earlier = str(state.get("name", ""))

    def begin(self, loop: Loop) -> None:
        self.loop, self.sent = loop, loop.step
        loop.log.view.name = self.earlier or loop.log.view.name
        with loop.clock.paused():
            self.matrices()
            loop.log.view.track(loop.log, loop.step, {})  # they start
        self.since = loop.batches.state()["position"], loop.clock.elapsed()

    @torch.no_grad()
    def after_step(self, step: int, progress: float) -> str:  # noqa: ARG002
        loop, world = self.loop, self.step.world
        logged = int(world.agree(loop.report.logged))  # rank 0's clock decides
        if logged <= self.sent:
            return ""
        self.sent, found = logged, self.norms() | self.matrices()
        now, before = (loop.batches.state()["position"], loop.clock.elapsed()), self.since
        figures = dict(zip(found, torch.stack([*found.values()]).tolist(), strict=True))  # one wait for all of them
        figures |= {rate: opt.group["lr"] for rate, opt in self.rates.items()}
        figures |= {"loss": loop.report.loss, "train_time_s": now[1], "memory_bytes": peak_memory_bytes(world.device),
                    "tokens_per_s": (now[0] - before[0]) / (now[1] - before[1])}  # fmt: skip
        self.since = now
        loop.log.view.track(loop.log, logged, figures)
        return ""

    def norms(self) -> dict[str, Tensor]:
        """Of the matrices, each from the process that owns it, of the other parameters, and of all together."""
        found = {}
        for kind, of in (("gradient_norm", operator.attrgetter("grad")), ("weight_norm", torch.detach)):
            own = {f"{kind}/{name}": of(p).norm() for name, p in self.others.items()}
            for bank in self.step.grads.banks:
                norms = self.step.world.gather(of(bank.shard).flatten(1).norm(dim=1))
                own |= {f"{kind}/{self.names[m]}": norm for m, norm in zip(bank.modules, norms, strict=False)}
            found |= own | {kind: torch.stack([*own.values()]).norm()}
        return found

    def matrices(self) -> dict[str, Tensor]:
        """Of the ternary ones: zeros, mean scale of the other codes, and codes that changed since the last time."""
        found = {}
        for module, name in self.names.items():
            if isinstance(module, TernaryLinear):
                w = module.stored(torch.float32)
                before, self.codes[module] = self.codes.get(module), w.sign().to(torch.int8)
                changed = (self.codes[module] != before).float().mean() if before is not None else w.new_zeros(())
                found |= {f"zero_frac/{name}": (w == 0).float().mean(), f"churn/{name}": changed,
                          f"scale/{name}": w.abs().sum() / w.count_nonzero().clamp_min(1)}  # fmt: skip
        return found

# Optimizers of matrices, by MATRIX_OPTIMIZER.

class MuonPlain(NeoMuon):
    """Muon as first published."""

    def update(self, g: Tensor, state: dict[str, Tensor], momentum: float) -> Tensor:
        return self.orthogonal(nesterov(g, state, momentum))

class NorMuon(NeoMuon):
    """NorMuon (arXiv:2510.05491, in the form of #78): each row of Muon's update divided by the root of the running mean
    of its square, then the whole brought back to the norm it had."""

    def update(self, g: Tensor, state: dict[str, Tensor], momentum: float) -> Tensor:
        if not state:
            state |= {"momentum": torch.zeros_like(g), "square": torch.zeros_like(g[..., :1])}
        u = self.orthogonal(g.lerp(state["momentum"].lerp_(g, 1 - momentum), momentum))
        square = state["square"].lerp_(u.square().mean(-1, keepdim=True), 1 - self.cfg.normuon_beta2)
        scaled = u / (square.sqrt() + 1e-10)
        norm, scaled_norm = (t.norm(dim=(-2, -1), keepdim=True) for t in (u, scaled))
        return scaled * (norm / scaled_norm.clamp_min(1e-10))

class NorMuon126(NeoMuon):
    """What #126 calls NorMuon: rows of unit root mean square after Newton-Schulz, no rescaling. At the same learning
    rate an element moves sqrt(columns) times as far as under Muon: 25 times at its width of 640."""

    def update(self, g: Tensor, state: dict[str, Tensor], momentum: float) -> Tensor:
        u = self.orthogonal(nesterov(g, state, momentum))
        return u / u.square().mean(-1, keepdim=True).sqrt_().clamp_min_(1e-8)

FRO_RATES = (0.1, 0.01, 0.001)

def fro_resonance(g: Tensor, m: Tensor, agreement: Tensor, least: float) -> Tensor:
    """#435's measure of how steadily gradient and momentum point the same way: (n, 1, 1) in [least, 1].

    rho is their cosine; for each of three rates its running mean, squared, is divided by its running mean square (both
    in `agreement`, (n, 3, 2)); the geometric mean of the three quotients.
    """
    rho = (g * m).sum((-2, -1)) / (g.norm(dim=(-2, -1)) * m.norm(dim=(-2, -1)) + 1e-8)
    agreement.lerp_(torch.stack((rho, rho.square()), -1)[:, None], agreement.new_tensor(FRO_RATES)[:, None])
    mean, square = agreement.unbind(-1)
    quotient = (mean.square() / (square + 1e-8)).clamp(least, 1)
    return (quotient + 1e-8).log().mean(-1).exp().clamp(least, 1)[:, None, None]

def half_unit_rms(u: Tensor, dim: int) -> Tensor:
    """Midway between u and u with unit root mean square along `dim`."""
    return 0.5 * u + 0.5 * u * (u.square().mean(dim, keepdim=True) + 1e-8).rsqrt()

class Fro(NeoMuon):
    """#435's optimizer and its stable form: Adam with one second moment a row (uncorrected, as published), slowed down
    where gradients disagree. BETA1 is its momentum. Matrices only: tables and controls stay under Adam."""

    def update(self, g: Tensor, state: dict[str, Tensor], momentum: float) -> Tensor:  # noqa: ARG002
        cfg, stable = self.cfg, self.cfg.matrix_optimizer == "fro_stable"
        if not state:
            state |= {"momentum": torch.zeros_like(g), "square": torch.zeros_like(g[..., :1])}
            state |= {"step": torch.zeros_like(g[:, :1, :1]), "agreement": g.new_zeros(len(g), len(FRO_RATES), 2)}
        step, m = state["step"].add_(1), state["momentum"].lerp_(g, 1 - cfg.beta1)
        resonance = fro_resonance(g, m, state["agreement"], 0.05 if stable else 0.0)
        u = m / (state["square"].lerp_(g.square().mean(-1, keepdim=True), 1 - cfg.fro_beta2).sqrt() + 1e-8)
        if stable:
            warm = (step / max(1, cfg.fro_warmup_steps)).clamp_max(1)
            resonance = 1 - warm + warm * resonance
            u = half_unit_rms(half_unit_rms(u, -1), -2)
        return u * (cfg.fro_alpha + (1 - cfg.fro_alpha) * cfg.fro_gamma * resonance) / (1 - cfg.beta1**step)

MATRIX_OPTIMIZERS |= {"muon_plain": MuonPlain, "normuon": NorMuon, "normuon126": NorMuon126,
                      "fro": Fro, "fro_stable": Fro,
                      "adamw": lambda shards, cfg, _: Adam(shards, cfg, cfg.adam_lr, cfg.adam_wd)}  # fmt: skip

# Matrices, and what happens to their inputs

class HalfLinear(TableProjection):
    """No quantization but float16's, which it is stored in."""

    def __init__(self, in_dim: int, out_dim: int, cfg: Config, init_std: float = 0.02) -> None:  # noqa: ARG002
        super().__init__(in_dim, out_dim, "FP16")
        self.draw(init_std) if init_std else nn.init.zeros_(self.weight)

class Binary:
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.form = self.form._replace(binary=True)

class InputNormed:
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(rms_norm(x))

class Int8Inputs:
    """Each token's channels on the 255 levels -127..127 of its largest magnitude (#126), gradient straight through."""

    def forward(self, x: Tensor) -> Tensor:
        level = x.detach().float().abs().amax(-1, keepdim=True).clamp_min(1e-8) / 127
        rounded = ((x.detach() / level).round().clamp(-127, 127) * level).to(x.dtype)
        return super().forward(StraightThrough.apply(x, rounded))

class SideBySide(nn.Module):
    """Matrices with one input, their outputs joined: the function of one matrix, each with its own optimizer step."""

    def __init__(self, parts: list[nn.Module]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([part(x) for part in self.parts], dim=-1)

# Attention

BANDED_ROW = 16  # windows in a row of the single pass; the first of them is context only, 6 % of the work

class Banded:
    """Attention in which every token sees itself and the ATTENTION_WINDOW - 1 tokens before it (arXiv:2004.05150)."""

    def __init__(self, cfg: Config, parts: Parts) -> None:
        super().__init__(cfg, parts)
        self.window = cfg.attention_window

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        faster = self.ops.attend is not attend  # it has the window
        return self.ops.attend(q, k, v) if faster else attend_band(q, k, v, self.window)

def attend_band(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """`attend` of `window` queries at a time to their own and the `window` keys before: linear in the length, no custom
    kernel.

    A model trained like this is scored in a single pass over long rows, where sliding windows compute every token many
    times.
    """
    batch, queries = q.shape[:2]
    k, v = (t[:, max(0, t.size(1) - queries - window + 1) :] for t in (k, v))
    if k.size(1) <= window:
        return attend(q, k, v)
    if queries < k.size(1) or queries % window:  # the tail of a row, or a row of odd length: one mask
        offset = k.size(1) - queries
        mask = torch.ones(queries, k.size(1), dtype=torch.bool, device=q.device)
        return attend(q, k, v, mask.tril(offset).triu(offset - window + 1))
    first = attend(q[:, :window], k[:, :window], v[:, :window])
    mask = torch.ones(window, 2 * window, dtype=torch.bool, device=q.device).tril(window).triu(1)
    # (B * (T / W - 1), 2 W, K, C)
    blocks = [t.unfold(1, 2 * window, window).movedim(-1, 2).flatten(0, 1) for t in (k, v)]
    others = attend(q[:, window:].unflatten(1, (-1, window)).flatten(0, 1), *blocks, mask)
    return torch.cat((first, others.view(batch, -1, *first.shape[2:])), dim=1)

class OwnKeys:
    """KEY_OFFSET=0: every channel of a key is its own position's."""

    @staticmethod
    def offset(k: Tensor) -> Tensor:
        return k

class DifferentialMix:
    """#640's: two attentions on halves of every head, their difference and their sum side by side. Not the published
    Differential Transformer, which learns lambda and normalizes (arXiv:2410.05258)."""

    LAMBDA = 0.5

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        halves = zip(*(t.chunk(2, dim=-1) for t in (q, k, v)), strict=True)
        a, b = [super(DifferentialMix, self).mix(*half) for half in halves]
        return torch.cat((a - self.LAMBDA * b, a + self.LAMBDA * b), dim=-1)

class ExclusiveMix:
    """XSA (#367): the part of each head's output along the value of its own token is taken out."""

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        y = super().mix(q, k, v).unflatten(2, (v.size(2), -1))  # (B, T, K, H/K, C)
        own = F.normalize(v[:, -y.size(1) :], dim=-1).unsqueeze(3)
        return (y - (y * own).sum(-1, keepdim=True) * own).flatten(2, 3)

class NoRotary(Rotary):
    """POSITION other than rope: all angles are 0."""

    def angles(self, cfg: Config) -> Tensor:
        return torch.zeros_like(super().angles(cfg))

class NTKRotary(Rotary):
    """Rotary whose base follows the length of a training sequence (#126): base * (T / train_seq_len)^(C / (C - 2))
    below it.

    Only while gradients are recorded: evaluation has the full base, whatever its windows' length.
    """

    def __init__(self, cfg: Config) -> None:
        super().__init__(cfg)
        self.cfg = cfg

    def forward(self, length: int) -> tuple[Tensor, Tensor]:
        cfg = self.cfg
        if not torch.is_grad_enabled() or length >= cfg.train_seq_len:
            return super().forward(length)
        base = cfg.rope_base * (length / cfg.train_seq_len) ** (cfg.head_dim / (cfg.head_dim - 2))
        i = torch.arange(0, cfg.head_dim, 2, dtype=torch.float64, device=self.cos.device) / cfg.head_dim
        angle = torch.outer(torch.arange(length, dtype=torch.float64, device=self.cos.device), base**-i)[:, None]
        return angle.cos().float(), angle.sin().float()

def swiglu(x: Tensor) -> Tensor:
    """arXiv:2002.05202; the first half of the channels is the gate."""
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up

class ActivatedMLP(MLP):
    activation: Callable

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.activation(self.up(x)))

def activated(activation: Callable, inputs: int = 1) -> type[MLP]:
    return type("ActivatedMLP", (ActivatedMLP,), {"activation": staticmethod(activation), "inputs": inputs})

def leaky_relu2(u: Tensor) -> Tensor:
    """u^2 above 0, a quarter of it below."""
    return torch.where(u >= 0, u, u / 4) * u

ACTIVATED = {"relu": activated(F.relu), "leaky_relu": activated(F.leaky_relu), "gelu": activated(F.gelu),
             "leaky_relu2": activated(leaky_relu2),
             "swiglu": activated(swiglu, 2)}  # by ACTIVATION # fmt: skip

def grouped_mlp(kind: Callable, cfg: Config, parts: Parts, *sizes: int) -> nn.Module:
    return GroupedMLP([kind(cfg, parts, *(n // cfg.mlp_groups for n in sizes)) for _ in range(cfg.mlp_groups)])

class GroupedMLP(nn.Module):
    """Independent MLPs, each on its share of the channels: a block-diagonal MLP with 1/groups of the weights."""

    def __init__(self, mlps: list[nn.Module]) -> None:
        super().__init__()
        self.groups = nn.ModuleList(mlps)

    def forward(self, x: Tensor) -> Tensor:
        parts = x.chunk(len(self.groups), dim=-1)
        return torch.cat([mlp(part) for mlp, part in zip(self.groups, parts, strict=True)], dim=-1)

# Blocks and their order

def build_layers(cfg: Config, parts: Parts) -> list[nn.Module]:
    """Blocks of several kinds: in the middle without attention, the last with exclusive attention; shared features."""
    n, first = cfg.num_blocks, (cfg.num_layers - cfg.attention_free_layers) // 2
    exclusive = parts._replace(attention=joined(parts.attention, ExclusiveMix))
    kinds = [block_kind(cfg, first <= i < first + cfg.attention_free_layers) for i in range(n)]
    blocks = [kind(cfg, exclusive if i >= n - cfg.xsa_last_n else parts) for i, kind in enumerate(kinds)]
    sizes = cfg.model_dim, cfg.tversky_num_features, cfg.fp_storage
    pools = [TableProjection(*sizes) for _ in range(cfg.tversky_feature_pools * (cfg.attn_proj_type == "tversky"))]
    users = (m for block in blocks for m in block.modules() if isinstance(m, Tversky))
    for layer, pool in zip(users, itertools.cycle(pools), strict=False):
        layer.features = pool
    return blocks

def block_kind(cfg: Config, attention_free: bool = False) -> type[Block]:
    around = [Checkpointed] * cfg.gradient_checkpointing + [Smeared] * cfg.smear + [Whole] * cfg.refiner
    inner = [AttentionFree] if attention_free else [Parallel] * cfg.parallel_blocks
    return joined(Block, *around, *inner, *[Unmixed] * (not cfg.resid_mix))

def recurrent_order(cfg: Config, training: bool) -> list[Pass]:
    """`u_net` with the blocks in turn (#126), and each repeated (#640): a skip is popped before, pushed after them."""
    repeats = (not training and cfg.eval_depth_recurrence) or max(1, cfg.training_depth_recurrence)
    n, passes = cfg.num_layers // 2 * cfg.unet, itertools.product(range(cfg.num_layers), range(repeats))
    skip = lambda i, r: i - n if r == 0 and n <= i < 2 * n else None
    return [Pass(i % cfg.num_blocks, skip(i, r), r == repeats - 1 and i < n) for i, r in passes]

class Checkpointed:
    """A block that keeps its input alone for the backward pass and computes the rest again."""

    def forward(self, x: Tensor, x0: Tensor, tail: int = 0) -> Tensor:
        from torch.utils.checkpoint import checkpoint

        return checkpoint(super().forward, x, x0, tail, use_reentrant=False, preserve_rng_state=False)

class Unmixed:
    """RESID_MIX=0."""

    def __init__(self, cfg: Config, parts: Parts) -> None:
        super().__init__(cfg, parts)
        self.stream_mix = nn.Parameter(torch.empty(0, cfg.model_dim))

    def mixed(self, x: Tensor, x0: Tensor) -> Tensor:  # noqa: ARG002
        return x

class Parallel:
    """Attention and MLP side by side on one normalized input (GPT-J; #1420 for the last layers): one norm less."""

    def forward(self, x: Tensor, x0: Tensor, tail: int = 0) -> Tensor:
        attn_scale, mlp_scale = (as_stored(p).to(x.dtype) for p in (self.attn_scale, self.mlp_scale))
        x = self.mixed(x, x0)
        h = rms_norm(x)
        return x[:, -tail:] + attn_scale * self.attention(h, tail) + mlp_scale * self.mlp(h[:, -tail:])

class AttentionFree:
    """An MLP alone: attention is half of a layer's time for a quarter of its weights (modded-nanogpt skips one)."""

    def __init__(self, cfg: Config, parts: Parts) -> None:
        super().__init__(cfg, parts)
        del self.attention, self.attn_scale

    def forward(self, x: Tensor, x0: Tensor, tail: int = 0) -> Tensor:
        x = self.mixed(x, x0)[:, -tail:]
        return x + as_stored(self.mlp_scale).to(x.dtype) * self.mlp(rms_norm(x))

class Whole:
    """A block that never leaves positions out, because what follows looks at earlier ones."""

    def forward(self, x: Tensor, x0: Tensor, tail: int = 0) -> Tensor:  # noqa: ARG002
        return super().forward(x, x0)

class Smeared(Whole):
    """A block followed by x + tanh(gate) * (mean of all positions so far - x), a gate a channel; sums in float32."""

    def __init__(self, cfg: Config, parts: Parts) -> None:
        super().__init__(cfg, parts)
        self.smear = Smear(cfg)

    def forward(self, x: Tensor, x0: Tensor, tail: int = 0) -> Tensor:
        return self.smear(super().forward(x, x0, tail))

class Smear(nn.Module):
    def __init__(self, cfg: Config) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.zeros(cfg.model_dim))

    def forward(self, x: Tensor) -> Tensor:
        count = torch.arange(1, x.size(1) + 1, device=x.device)[:, None]
        mean = (x.float().cumsum(1) / count).to(x.dtype)
        return x + as_stored(self.gate).tanh().to(x.dtype) * (mean - x)

class Refiner(nn.Module):
    """x + tanh(gate) * rms_norm(causal convolution over the last `refiner_kernel` positions), all channels by all
    channels, of the normalized x. The convolution is one ternary matrix (D, kernel * D) on shifted copies of x."""

    def __init__(self, cfg: Config, parts: Parts) -> None:
        super().__init__()
        self.kernel = cfg.refiner_kernel
        self.conv = parts.linear(self.kernel * cfg.model_dim, cfg.model_dim, cfg)
        self.gate = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        x = rms_norm(x)
        padded = F.pad(x, (0, 0, self.kernel - 1, 0))
        shifted = torch.cat([padded[:, i : i + x.size(1)] for i in range(self.kernel)], dim=-1)
        return x + as_stored(self.gate).tanh().to(x.dtype) * rms_norm(self.conv(shifted))

class RadialNorm(nn.Module):
    """Positions as points of a golden spiral (#435), through a matrix (4, D), added to the normalized embedding.

    Bit i of a position is a vector of length alpha * phi^i at the angle 2 pi i / bits; the features are real and
    imaginary part, magnitude and angle of the vectors' sum z. A position has no bits beyond `radial_bits`: with #435's
    8, positions 256 apart are the same to the model, as they were to it.
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
        return rms_norm(x) + F.linear(self.features[: x.size(1)], as_stored(self.weight)).to(x.dtype)

# Tables and outputs: BIGRAM_HASH, TIE_EMBEDDINGS, UNTIE_AT_FRACTION, MTP_HEADS. An output table has `weight` and
# `stored`.

class Untied:
    """The embedding of a model with an output head of its own."""

    role = Role("embed_lr", "table")

    def __init__(self, vocab_size: int, dim: int, fp_storage: str, init_std: float) -> None:  # noqa: ARG002
        super().__init__(vocab_size, dim, fp_storage, 1.0)

class BigramTable(Table):
    """A second table (V, E) for the token before, added to the row of the token itself (nothing is hashed)."""

    def __init__(self, vocab_size: int, dim: int, fp_storage: str, init_std: float) -> None:
        super().__init__(vocab_size, dim, fp_storage, init_std)
        self.previous = Table(vocab_size, dim, fp_storage, 0.0)
        self.previous.role = self.role

    def rows(self, idx: Tensor, dtype: torch.dtype) -> Tensor:
        before = F.pad(idx[:, :-1], (1, 0))  # token 0 stands before the window
        return super().rows(idx, dtype) + self.previous.rows(before, dtype)

class OutputHead(Table):
    """Logits straight from the hidden states: (V, D), 0 at first."""

    role = Role("head_lr", "table")

    def __init__(self, cfg: Config) -> None:
        super().__init__(cfg.vocab_size, cfg.model_dim, cfg.fp_storage, 0.0)

class FutureHead(OutputHead):
    """A head of MTP_HEADS; never stored, so never rounded."""

    role = Role("head_lr", "none")

    def rounded(self) -> Tensor:
        return self.weight.detach()

def add_future_heads(model: GPT) -> None:
    model.mtp_heads = nn.ModuleList(FutureHead(model.cfg) for _ in range(model.cfg.mtp_heads))

def mtp_training_loss(model: GPT, x: Tensor, y: Tensor, z_loss: float) -> tuple[Tensor, Tensor]:
    """`training_loss` and a tenth of the heads' mean cross entropy: head k, from 1, predicts k positions on."""
    h = model.hidden(x, training=True)
    loss, nats = model.ops.loss(model, h, y, z_loss)
    future = [token_nats(head(h[:, :-k]).float(), y[:, k:])[0].mean() for k, head in enumerate(model.mtp_heads, 1)]
    return loss + 0.1 * x.numel() * torch.stack(future).mean(), nats

class Correction(Table):
    role = Role("corr_weight_lr", "table")

def unsaved(module: nn.Module) -> nn.Module:
    """The module, left out of the artifact."""
    module.role = module.role._replace(storage="none")
    return module

def tied_output(cfg: Config, table: Table) -> nn.Module:
    tied = CorrectedTable(cfg, table) if cfg.tie_embeddings == 2 else table
    return UntyingOutput(cfg, tied) if cfg.untie_at_fraction else tied

class CorrectedTable(Part):
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
        return self.ops.matmul(x, self.weight, self.stored(x.dtype))

class UntyingProjection(TableProjection):
    """`embed_out` until the output is untied, nothing from then on."""

    def __init__(self, in_dim: int, out_dim: int, fp_storage: str) -> None:
        super().__init__(in_dim, out_dim, fp_storage)
        self.untied = False  # each one's own from the start: a compiled graph asks where it finds it

    def forward(self, x: Tensor) -> Tensor:
        return x if self.untied else super().forward(x)

class UntyingOutput(nn.Module):
    """A tied output table, then a head that starts as the product of table and `embed_out`.

    Both are trained parameters from the first step on, so that nothing has to be built or reduced anew at the switch:
    without gradients, Adam leaves the head at 0.
    """

    def __init__(self, cfg: Config, tied: nn.Module) -> None:
        super().__init__()
        self.tied, self.head, self.untied = tied, OutputHead(cfg), False

    @property
    def weight(self) -> Tensor:
        return self.head.weight if self.untied else self.tied.weight

    def stored(self, dtype: torch.dtype) -> Tensor:
        return (self.head if self.untied else self.tied).stored(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return (self.head if self.untied else self.tied)(x)

class Untying(Hook):
    """UNTIE_AT_FRACTION: tied before that progress; at it, the head starts as the tied output is."""

    def state(self) -> dict[str, Any]:
        return {"untied": self.step.model.output.untied}

    def restore(self, state: dict[str, Any]) -> None:
        for module in self.step.model.modules():
            if isinstance(module, (UntyingProjection, UntyingOutput)):
                module.untied = state["untied"]

    @torch.no_grad()
    def before_step(self, progress: float) -> None:
        model, due = self.step.model, progress >= self.step.cfg.untie_at_fraction
        for module in model.modules():
            if isinstance(module, (UntyingProjection, UntyingOutput)) and module.untied != due:
                module.untied = due
                if due and isinstance(module, UntyingOutput):
                    tied, head = module.tied.weight, module.head
                    head.weight.copy_(tied @ model.embed_out.weight if model.cfg.embed_dim else tied)
                    if head.operand is not None:
                        head.keep_rounded(head.operand.dtype)

MEMBERSHIPS = {"sigmoid": lambda t: torch.sigmoid(5 * t), "poly": lambda t: (1.25 * t + 0.5).clamp(0, 1),
               "tanh": lambda t: (torch.tanh(5 * t) + 1) / 2}

class Tversky(nn.Module):
    """Similarity (Tversky 1977, as in #640) of x to `out_dim` ternary prototypes, by what they have in common and what
    not.

    f are the products of x, or of a prototype, with the features, m(f) their membership and a = f * m(f): theta a_x a_p
    - alpha a_x (1 - m_p) - beta (1 - m_x) a_p, summed over the n features. #640's sum is divided by sqrt(n) here.
    Without that its head of 8192 prototypes starts with every logit between -210 and -280, far beyond the softcap,
    where the gradient is 0: it stayed at ln 8192. With it they start near -2.4.
    """

    def __init__(self, cfg: Config, out_dim: int, features: int) -> None:
        super().__init__()
        prototypes = joined(TernaryLinear, *[Binary] * (cfg.weight_quant == "binary"))
        self.prototypes = prototypes(cfg.model_dim, out_dim, cfg)
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

SOFTCAPS |= {"tanh": lambda logits, cap: cap * torch.tanh(logits / cap)}

# Other forms of tables, by FP_STORAGE.

def round_fp8(w: Tensor) -> tuple[Tensor, Tensor]:
    """e4m3 codes (as w) and one scale: the power of two that brings the largest weight just under 448, e4m3's largest.

    A power of two rounds nothing, so codes * scale is exact in bfloat16 too. It is found in the bits of the largest
    weight, the same on every device: 448 = 1.75 * 2^8, so the exponent grows by one where the mantissa is above 1.75.
    """
    bits = w.detach().abs().amax().float().clamp_min(2.0**-100).view(torch.int32)
    scale = ((((bits + 0x1FFFFF) >> 23) - 8) << 23).view(torch.float32)
    return (w.float() / scale).clamp(-448, 448).to(torch.float8_e4m3fn), scale

class Float8:
    """e4m3 codes and the exponent of their one scale."""

    def round(self, w: Tensor) -> Tensor:
        codes, scale = round_fp8(w)
        return codes.float() * scale

    def counts(self, shape: tuple[int, ...]) -> list[tuple[Any, int]]:
        return [("scale", 1), (shape, math.prod(shape))]

    def symbols(self, w: Tensor) -> list[np.ndarray]:
        codes, scale = round_fp8(w)
        return [np.array([128 + round(math.log2(scale.item()))], np.uint8), codes.view(torch.uint8).numpy().reshape(-1)]

    def restore(self, symbols: list[np.ndarray], shape: tuple[int, ...]) -> Tensor:
        codes = torch.from_numpy(symbols[1].copy()).view(torch.float8_e4m3fn).float()
        return codes.view(shape) * 2.0 ** (int(symbols[0][0]) - 128)

class FourBitRows(IntegerRows):
    """#640's FP4: codes -7..7 and a float16 step a row, the row's largest magnitude / 7."""

    steps = "fp16"

    def divide(self, w: Tensor) -> tuple[Tensor, Tensor]:
        w = w.float()
        step = round_scale(w.abs().amax(-1, keepdim=True) / 7, self.steps)
        return (w * step.double().reciprocal().float()).round().clamp(-7, 7), step

    def counts(self, shape: tuple[int, ...]) -> list[tuple[Any, int]]:
        return [("scale", shape[0]), ("low", shape[0]), (shape, math.prod(shape))]

TABLE_FORMS |= {"FP8": Float8(), "FP16": CONTROL, "FP4": FourBitRows(4)}

# Codecs: the four streams' symbols as bytes, by ARTIFACT_CODEC. First the default's.

# Entropy coding: interleaved rANS (Duda, arXiv:1311.2540; Giesen, arXiv:1402.3392) with static tables. Each lane has a
# 32-bit state of at least 2^16 and exchanges 16-bit words with one common stream; numpy advances all lanes at once.
# Probabilities are whole numbers of 2^-14. Integers only: the same bytes on every machine.

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
        f[f.argmax()] -= min(excess, int(f.max()) // 2)  # a lack (excess below 0) goes there at once
    return f

def ans_encode(symbols: np.ndarray, contexts: np.ndarray) -> bytes:
    """(n,) uint8 symbols under the tables that `contexts` (n,) names: count and number of tables (uint32, uint16), for
    each table its first and last symbol (uint8) and the frequencies between (below 128 a byte, else two: low seven bits
    with the eighth set, then the rest), the lanes' states, the words."""
    count, lanes = symbols.size, ans_lanes(symbols.size)
    tables, slab = int(contexts.max(initial=0)) + 1, max(lanes, ANS_SLAB)
    counts = np.zeros(tables << 8, np.int64)
    for a in range(0, count, slab):
        index = (contexts[a : a + slab].astype(np.int32) << 8) | symbols[a : a + slab]
        counts += np.bincount(index, minlength=tables << 8)
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

    num_symbols: int
    frequencies: np.ndarray  # (tables, 256)
    lanes: np.ndarray  # (lanes,) uint32: their states
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
            words = np.frombuffer(data[at + state.nbytes :], "<u2")
        except (struct.error, ValueError, IndexError):
            raise ArtifactError("a stream is cut off") from None
        sums = frequencies.sum(1)
        if found != count or not sums.size or ((sums != ANS_TOTAL) & (sums != 0)).any() or not sums.any() and count:
            raise ArtifactError(f"a stream is not that of {count} symbols under valid frequencies")
        fewest_bits = count * math.log2(ANS_TOTAL / max(1, frequencies.max()))  # if all were the most probable one
        if fewest_bits > 1.01 * (16 * len(words) + 32 * len(state)):
            raise ArtifactError(f"a stream is too short for {count} symbols")
        return cls(count, frequencies, state, words)

    def decode(self, contexts: np.ndarray) -> np.ndarray:
        """(count,) uint8; `contexts` as in ans_encode. ArtifactError unless words and states come out even."""
        lanes, count, known = len(self.lanes), self.num_symbols, self.frequencies.any(1)
        words = self.words.astype(np.uint32)
        slots = [np.repeat(np.arange(256, dtype=np.uint8), f) for f in self.frequencies]
        symbol_table = np.concatenate([s if s.size else np.zeros(ANS_TOTAL, np.uint8) for s in slots])
        starts = self.frequencies.cumsum(1) - self.frequencies
        f_table, start_table = (t.reshape(-1).astype(np.uint32) for t in (self.frequencies, starts))
        state, out, at, slab = self.lanes.copy(), np.empty(count, np.uint8), 0, max(lanes, ANS_SLAB)
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

# between classes of columns: shares of zeros in 2^-16, .2 apart in log odds
COLUMN_BOUNDS = np.array([round(2**16 / (1 + math.exp(-0.2 * (k + 0.5)))) for k in range(-32, 31)])

def column_classes(symbols: np.ndarray, matrices: list[tuple[int, int]]) -> np.ndarray:
    """The class of every column of every matrix, uint8: how many of its codes are 0. Integers only.

    Columns that see small activations keep small weights: their zeros are frequent. On trained weights this takes 2.0 %
    off the trits' entropy, the classes paid for; rows, scales and neighbouring trits add nothing (RESULTS.md R005).
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
    rows = [np.tile(classes[end - n : end], r) for end, (r, n) in zip(ends, matrices, strict=True)]
    return np.concatenate([classes[:0], *rows])

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
        classes = self.classes.decode(np.zeros(self.classes.num_symbols, np.uint8))
        symbols = self.trits.decode(trit_contexts(classes, matrices))
        if symbols.max(initial=0) > 2:
            raise ArtifactError("stream trits: a code above 2")
        return symbols

def pack_ans(symbols: list[np.ndarray], layout: Layout) -> list[bytes]:
    others = [ans_encode(s, layout.contexts(name)) for name, s in zip(STREAMS[1:], symbols[1:], strict=True)]
    return [encode_trits(symbols[0], layout.matrices), *others]

def unpack_ans(streams: list[bytes], layout: Layout) -> list[np.ndarray]:
    trits = TritStreams.parse(streams[0], layout.matrices)  # every stream is found sound before one is decoded
    others = [AnsStream.parse(data, layout.count[name]) for data, name in zip(streams[1:], STREAMS[1:], strict=True)]
    symbols = [stream.decode(layout.contexts(name)) for stream, name in zip(others, STREAMS[1:], strict=True)]
    return [trits.decode(layout.matrices), *symbols]

# Published codecs: trits packed, then each stream compressed.

RAW, BEST = lzma.FORMAT_RAW, 9 | lzma.PRESET_EXTREME
LZMA_FILTERS = [{"id": lzma.FILTER_LZMA2, "preset": BEST, "dict_size": 1 << 24, "lc": 0, "lp": 0, "pb": 0}]

def pack_digits(codes: np.ndarray, base: int, count: int) -> bytes:
    """`count` codes a byte: sum of (code + 1) * base^j, the first one lowest; the last byte filled up with digit 0."""
    digits = np.zeros(-(-codes.size // count) * count, dtype=np.uint8)
    digits[: codes.size] = codes + 1
    return (digits.reshape(-1, count) @ base ** np.arange(count, dtype=np.uint8)).tobytes()

def unpack_digits(data: bytes, size: int, base: int, count: int) -> np.ndarray:
    """Inverse of pack_digits: (size,) int8. ValueError unless the bytes are exactly a packing of `size` codes."""
    packed = np.frombuffer(data, dtype=np.uint8)
    digits = packed[:, None] // base ** np.arange(count, dtype=np.uint8) % base
    whole = packed.size == -(-size // count) and packed.max(initial=0) < base**count
    if not whole or digits.max(initial=0) > 2 or digits.reshape(-1)[size:].any():
        raise ValueError(f"not a packing of {count} ternary codes a byte")
    return digits.reshape(-1)[:size].astype(np.int8) - 1

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

def unpack_int8(data: bytes, count: int) -> np.ndarray:
    """A code a byte, (count,) int8. ValueError unless they are `count` codes."""
    codes = np.frombuffer(data, np.int8)
    if codes.size != count or codes.min(initial=0) < -1 or codes.max(initial=0) > 1:
        raise ValueError("not ternary codes")
    return codes

class Compressor(NamedTuple):
    """`expand(data, most)` gives at most `most` bytes and takes no more memory; ArtifactError for all else."""

    compress: Callable[[bytes], bytes]
    expand: Callable[[bytes, int], bytes]

def compress(raw: bytes) -> bytes:
    return lzma.compress(raw, format=RAW, filters=LZMA_FILTERS)

def expand(decoder: Any, data: bytes, most: int) -> bytes:
    """One whole stream of a decoder of lzma's or zlib's kind."""
    try:
        raw = decoder.decompress(data, most + 1)
    except (lzma.LZMAError, zlib.error) as error:
        raise ArtifactError(f"a stream does not decompress: {error}") from None
    if len(raw) > most or not decoder.eof or decoder.unused_data:
        raise ArtifactError(f"a stream does not hold what its model has: at most {most} bytes")
    return raw

def zstandard() -> Any:
    """The package, or None."""
    with contextlib.suppress(ImportError):
        import zstandard

        return zstandard

def expand_zstd(data: bytes, most: int) -> bytes:
    if not (zstd := zstandard()):
        raise UserError("an artifact with zstd needs the package zstandard (pip install zstandard)")
    try:  # a frame of ours says how long its content is, so the memory is known before it is taken
        size = zstd.get_frame_parameters(data).content_size
        if size <= most:
            decompressor = zstd.ZstdDecompressor(max_window_size=1 << 27)
            return decompressor.decompress(data, max_output_size=1, allow_extra_data=False)
    except zstd.ZstdError as error:
        raise ArtifactError(f"a stream does not decompress: {error}") from None
    raise ArtifactError(f"a stream does not hold what its model has: at most {most} bytes")

# zlib's level 9 takes 2 s/MB on a code a byte, level 6 0.1 s/MB for 4 % more bytes; on packed codes they are the same
COMPRESSORS = {
    "lzma": Compressor(compress, lambda *data: expand(lzma.LZMADecompressor(RAW, None, LZMA_FILTERS), *data)),
    "zlib9": Compressor(lambda raw: zlib.compress(raw, 9), lambda *data: expand(zlib.decompressobj(), *data)),
    "zlib6": Compressor(lambda raw: zlib.compress(raw, 6), lambda *data: expand(zlib.decompressobj(), *data)),
    "zstd": Compressor(lambda raw: zstandard().ZstdCompressor(level=22).compress(raw), expand_zstd),
}
BASE3, TWO_BITS = {"base": 3, "count": 5}, {"base": 4, "count": 4}  # 1.6 bits a code (#640), 2 bits (#126)
PACKINGS = {"base3": (functools.partial(pack_digits, **BASE3), functools.partial(unpack_digits, **BASE3)),
            "2bit": (functools.partial(pack_digits, **TWO_BITS), functools.partial(unpack_digits, **TWO_BITS)),
            "bitmask": (pack_bitmask, unpack_bitmask), "int8": (np.ndarray.tobytes, unpack_int8)}  # fmt: skip

def pack_published(symbols: list[np.ndarray], _: Layout, packing: str, compressor: str) -> list[bytes]:
    """The streams' bytes: packed trits and raw symbols, each compressed."""
    raw = (PACKINGS[packing][0](symbols[0].view(np.int8) - 1), *(s.tobytes() for s in symbols[1:]))
    return [COMPRESSORS[compressor].compress(r) for r in raw]

def unpack_published(streams: list[bytes], layout: Layout, packing: str, compressor: str) -> list[np.ndarray]:
    """Inverse of pack_published; ArtifactError unless each stream holds exactly the layout's symbols."""
    counts, grown = [layout.count[name] for name in STREAMS], COMPRESSORS[compressor].expand
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

CODECS = {"ans": Codec(pack_ans, unpack_ans)}
for _packing, _compressor in (("base3", "lzma"), ("bitmask", "lzma"), ("2bit", "zlib9"), ("int8", "zlib6"),
                              *((packing, "zstd") for packing in PACKINGS)):  # fmt: skip
    _how, _name = {"packing": _packing, "compressor": _compressor}, _packing + "_zstd" * (_compressor == "zstd")
    CODECS[_name] = Codec(functools.partial(pack_published, **_how), functools.partial(unpack_published, **_how))
CODECS |= {name: CODECS[name]._replace(auto=True) for name in ("ans", "base3", "bitmask")}


# ---- 13 Main ---------------------------------------------------------------------------------------------------------

class Config(OptionSettings):
    """Every setting: NUM_LAYERS=12 in the environment sets num_layers."""

def train_and_export(cfg: Config, world: World, machine: Machine, log: Log, val: ValidationSet) -> tuple[bytes, dict]:
    """Train, turn the model into bytes, and score it as it is; the trained model ends here."""
    torch.manual_seed(cfg.seed)
    model = GPT(cfg).to(world.device).use(machine.ops)
    micro_batches, _ = batch_layout(cfg, world.size)
    log(f"params:{count_parameters(model)[0]} L:{cfg.num_layers} d:{cfg.model_dim} h:{cfg.num_heads} "
        f"kv:{cfg.num_kv_heads} ws:{world.size} ga:{micro_batches} s:{cfg.seed}")
    check_resources(model, world, log, val.num_targets)
    with machine.training(cfg, world):
        run = train(model, cfg, world, log, val)
    clock, blob, path = Clock(world), b"", cfg.artifact_path
    if world.is_main:  # first of all: whatever a score runs into, the model is saved
        blob = save_artifact(model, cfg, log.view.phase("export"))
        path = save_bytes(blob, cfg, log)
    blob = world.share_bytes(blob)
    run["export_time_s"] = clock.finish()
    with rounded_once(model):
        scores = evaluate(model, val, cfg, world, done=log.view.phase("score"))
    run |= {"val_loss": scores[0], "val_bpb": scores[1], "zero_frac": zero_fraction(model)}
    log(f"{validation_line(cfg, run['steps'], scores, run['train_time_s'])} zero_frac:{run['zero_frac']:.3f}")
    return blob, run | log_artifact(blob, path, model, log)

def artifact_config(cfg: Config, artifact_cfg: Config, said: Collection[str] = ()) -> Config:
    """The environment's config with the artifact's model settings; UserError where the user said another one."""
    own, stored = cfg.exported().model_settings(), artifact_cfg.model_settings()
    for name in own:
        if own[name] != stored[name] and name in said:
            other = f"the model in ARTIFACT_PATH={cfg.artifact_path!r} has {name}={stored[name]}"
            raise UserError(f"{name}={own[name]}, but {other}")
    return dataclasses.replace(cfg.exported(), **{name.lower(): getattr(artifact_cfg, name.lower()) for name in own})

def read_artifact(cfg: Config, said: Sources) -> tuple[bytes, Config]:
    """EVAL_ONLY: the artifact's bytes, and the config with its model settings."""
    path = Path(cfg.artifact_path)
    with readable():
        blob = path.read_bytes() if path.is_file() else None
    if blob is None:
        raise UserError(f"ARTIFACT_PATH={cfg.artifact_path!r}: no such file; EVAL_ONLY=1 needs an artifact")
    return blob, artifact_config(cfg, read_container(blob).cfg, said.user)

def fit_vocabulary(cfg: Config, said: Sources) -> tuple[Config, Sources]:
    """VOCAB_SIZE as the tokenizer has it, unless the user said it."""
    if "VOCAB_SIZE" in said.user or (pieces := load_tokenizer(cfg.tokenizer_path).vocab_size()) == cfg.vocab_size:
        return cfg, said
    return dataclasses.replace(cfg, vocab_size=pieces), said._replace(preset=said.preset - {"VOCAB_SIZE"})

def main() -> int:
    """The exit code: 0, or 1 after a run that is not valid."""
    machine, cfg, said, blob = Machine(), Config.from_env(), Sources.from_env(), b""
    if cfg.eval_only:
        blob, cfg = read_artifact(cfg, said)
    else:
        cfg, said = fit_vocabulary(cfg, said)
    world = World.from_env()
    cfg = machine.fit(cfg, world, said)
    if not cfg.eval_only:
        for shape in cfg.step_shapes():
            batch_layout(cfg, world.size, shape)  # every process gets its share, or the run ends here
    if world.watch:
        world.watch.compare(cfg, blob)
    with Follower.from_env(cfg, world) as view:
        val = ValidationSet.load(cfg, world)
        if not cfg.eval_only:
            check_writable(cfg.artifact_path)
        log = Log(cfg, world, view)
        log_start(cfg, world, log, said, val.notes)
        cfg = machine.check(cfg, world, log)
        result = {"run_id": cfg.run_id, "seed": cfg.seed, "log_path": str(log.path)} | machine.report
        with machine.attention:
            if not cfg.eval_only:
                blob, run = train_and_export(cfg, world, machine, log, val)
                result |= run
            view.phase("reading back")
            result["artifact_sha256"] = hashlib.sha256(blob).hexdigest()
            model, _ = load_artifact(blob, cfg.precision, cfg.compile_mode)  # from here on, only what the bytes hold
            with rounded_once(model.to(world.device).use(machine.ops)):
                result |= score_artifact(model, val, cfg, world, log)
        result |= machine.figures(world) | {"git_commit": git_commit()}
        log("result " + json.dumps(result))
    world.close()
    if stopped_by := result.get("stopped_by"):
        return exit_code(signal.Signals[stopped_by])
    return 0 if result.get("replicas_agree", True) else 1

def tell_torchrun(text: str) -> None:
    """Its own report, thirty lines that come last, quotes what this file holds."""
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        report = {"message": text, "extraInfo": {"timestamp": str(int(time.time()))}}
        with contextlib.suppress(OSError):
            Path(path).write_text(json.dumps({"message": report}), encoding="utf-8")

def run(arguments: list[str]) -> int:
    """main(), with a user's errors as one line on stderr and exit code 2; others keep their traceback."""
    try:
        if arguments in (["-h"], ["--help"]):
            with contextlib.suppress(BrokenPipeError):  # | head
                print(help_text(), flush=True)
            return 0
        if arguments:
            raise UserError(f"{arguments[0]!r}: expected no argument but --help; settings are environment variables")
        return main()
    except UserError as error:
        if World.speaks():
            print("\r\x1b[K" * sys.stderr.isatty() + f"train_gpt.py: {error}{World.machine()}", file=sys.stderr)
            tell_torchrun(f"train_gpt.py: {error}")
        if World.watch:
            World.watch.failed(error, rest=0 if World.speaks() else 12)
        elif not World.speaks():
            time.sleep(3)  # torchrun ends every process with the first one that fails, which must be heard before
            print(f"train_gpt.py: {World.name()}: {error}", file=sys.stderr)
        return 2
    except Exception as error:
        if World.watch:
            World.watch.failed(error)
        print(f"train_gpt.py: {World.name()} failed:", file=sys.stderr, flush=True)
        raise

def run_until_stopped(arguments: list[str]) -> int:
    """run(); after SIGINT and SIGTERM one line and exit code 130 or 143."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # warns of a time limit, which means something to a loop of steps
    for stream in (sys.stdout, sys.stderr):
        if stream:
            stream.reconfigure(errors="backslashreplace")  # for a console that cannot show the characters of a path
    try:
        code = run(arguments)
    except Stopped as reason:
        number = reason.args[0]
        if World.speaks():
            print(f"\ntrain_gpt.py: stopped by {signal.Signals(number).name}", file=sys.stderr, flush=True)
        os._exit(exit_code(number))  # Python itself would end only when its threads have computed all they have queued
    if World.watch:  # torch 2.13's end aborts now and then where gloo was used, and the exit code is lost
        with contextlib.suppress(OSError):
            print(end="", flush=True)
        os._exit(code)
    return code

if __name__ == "__main__":
    sys.exit(run_until_stopped(sys.argv[1:]))
