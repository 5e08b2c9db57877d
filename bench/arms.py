"""Train variants ("arms") side by side: same corpus, same budget, same tokens scored; one table with its errors.

    python bench/arms.py recipe --proxy P1 --seeds 42,1337,7 --jobs 2          parts of the recipe, against #640
    python bench/arms.py recipe --proxy P2 --only control BETA2=.99 --sliding  two of them, in sliding windows too
    python bench/arms.py recipe --proxy P2 --only control --sliding --whole    finalists, on all of both sets
    python bench/arms.py systems --seconds 150 --seeds 42,1337 --jobs 2        systems of the field, small, equal time
    python bench/arms.py systems --seconds 120 --full                          the same at full size, on one GPU
    python bench/arms.py switches --steps 400 --jobs 2                         switches one at a time, equal steps
    python bench/arms.py band --steps 400 --jobs 2                             banded attention against sliding windows
    python bench/arms.py free --preset configs/demo.env --arm "" --arm "MODEL_DIM=384 MATRIX_LR=.02"
    python bench/arms.py sweep --preset configs/demo.env --set "MATRIX_LR=.01:.08:4log" --set "WARMDOWN_FRACTION=.3,.5"
    python bench/arms.py sweep --preset configs/demo.env --set "MATRIX_LR=.005:.1:log MODEL_DIM=128,192" --draws 8
    python bench/arms.py recipe --proxy P1 --table                             the table again, no run

Length. --steps, --tokens (of training, rounded down to steps) or --seconds (of training). Without one `recipe` has its
proxy's tokens and `free` its preset's budget. Settings that count steps scale with the run, but not in `free`, which
runs a preset as its user would. The environment's settings of the trainer do not reach a run.

Scores. `recipe` scores 500,000 tokens of each of two sets, --whole all of them, --sliding also windows that overlap by
half. Where OUT has the artifact of the same training (--keep), that is scored again and nothing is trained.

Sweep. Each word of --set is a setting and its values; all combinations run, against the preset itself.
    KEY=A,B,C           these values
    KEY=LOW:HIGH:4      4 values, evenly spaced, both ends among them; whole ones where the setting counts something
    KEY=LOW:HIGH:4log   4 values, each by the same factor larger than the one before
    KEY=LOW:HIGH        any value between them, with --draws; LOW:HIGH:log: small ones as often as large ones
--draws N takes N combinations at random instead, the same ones for the same --draw-seed: with a larger N those before
are among them.

Data. --data is what a data folder's path begins with, its vocabulary left out: data/corpus/sp for data/corpus/sp1024,
as `tools/prepare_data.py corpus` makes them; or such a folder itself. `recipe` scores the run's artifact on
<folder>_web too.

Results. OUT/results.jsonl, a line a run: {"arm", "seed", "settings", "result"}, in `recipe` also "web", or "error". A
run that is there with the same settings is not repeated, a failed one is; so a batch that was interrupted goes on where
it stopped. All runs of a folder execute OUT/train_gpt.py, copied there at the first start from the working tree or
--code, since the working tree changes while a batch runs for hours. Logs for tools/plot_logs.py:
OUT/logs/<arm>_seed<seed>.txt. With --jobs N each run has one thread and, from two on, a core of its own, so that all of
them meet the same load. With --gpus 0,1 a run has one of these GPUs (CUDA_VISIBLE_DEVICES) for itself, and as many run
at once. At the end the table stands in OUT/table.md and, where matplotlib is there, its differences in OUT/effects.png.

Table. Bits per byte are means over the seeds; `mean` is that of both sets, and `s.e.` and the differences against the
first arm are of it. A difference is that of the means, with Welch's standard error; "paired by seed" is over the seeds
(their number in brackets) which both arms have.

Ends with code 1 if a run failed or an artifact scored otherwise than its model, with 2 for arguments that cannot
be run.
"""

from __future__ import annotations

import argparse
import dataclasses
import glob
import hashlib
import importlib.util
import itertools
import json
import math
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import threading
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from importlib.machinery import SourceFileLoader
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))

import plot_logs  # noqa: E402
from arm_results import (  # noqa: E402
    Scores,
    append_result,
    estimate,
    failure,
    identity,
    identity_of,
    in_order,
    paired,
    read_results,
    said_of,
    scores_of,
    spread_of_one,
    welch,
)
from command_line import BadArguments, read_preset, start  # noqa: E402

# -------------------------------------------------------------------------------------------------- sizes


class Arm(NamedTuple):
    """What one line of the table runs."""

    settings: str  # KEY=VALUE ..., on top of the preset and the common size
    reason: str = ""  # of these values, or what others found
    preset: str = ""  # configs/<preset>.env; "": the defaults
    published_steps: int = 6530  # of the run that the preset reproduces: settings in steps shrink with it; 0: they stay


# The small size: some 400 steps in 150 s on one core. The same batch for all: what is compared is model, optimizer and
# schedule.
SMALL = """VOCAB_SIZE=1024 TRAIN_SEQ_LEN=256 YARN_MAX_LEN=512 TRAIN_BATCH_TOKENS=2048 MICRO_BATCH_TOKENS=4096
    WARMUP_STEPS=2 TRAIN_LOG_EVERY=5 VAL_MAX_TOKENS=131072 SLIDING_EVAL=1 SLIDING_EVAL_STRIDE=128 TEMP_SCALING=0"""
SMALL_STEPS = 400
# Full size on one GPU: an eighth of the record run's batch, so a step takes about what it takes on eight
FULL = """TRAIN_BATCH_TOKENS=65536 WARMUP_STEPS=3 TRAIN_LOG_EVERY=10 VAL_MAX_TOKENS=2097152 SLIDING_EVAL=1
    SLIDING_EVAL_STRIDE=256 TEMP_SCALING=0"""
FULL_STEPS = 1300
PATHS = "DATA_PATH TOKENIZER_PATH ARTIFACT_PATH".split()  # --data and --out decide
IN_STEPS = "MUON_MOMENTUM_WARMUP_STEPS LR_WARMUP_STEPS WARMDOWN_ITERS SEQ_WARMUP_STEPS".split()

# Widths a sixth, depths two fifths
SHAPE = "NUM_LAYERS=4 MODEL_DIM=128 NUM_HEADS=4 NUM_KV_HEADS=2 BITNET_GROUP_SIZE=64"


class Proxy(NamedTuple):
    """A small stand-in for the full size, on which parts of the recipe are compared."""

    size: str
    tokens: int  # of training
    wide: int  # EMBED_DIM of the wider embedding


WINDOWS = "TRAIN_SEQ_LEN=512 YARN_MAX_LEN=1024 TRAIN_BATCH_TOKENS=8192 MICRO_BATCH_TOKENS=4096"
PROXIES = {
    # P1's eight tokens a ternary weight, at an eighth and three sevenths of its weights: how effects change with size
    "S1": Proxy(f"{SHAPE} NUM_LAYERS=2 MODEL_DIM=64 VOCAB_SIZE=1024 EMBED_DIM=24 {WINDOWS}", 760_000, 40),
    "S2": Proxy(f"{SHAPE} NUM_LAYERS=3 MODEL_DIM=96 BITNET_GROUP_SIZE=48 VOCAB_SIZE=1024 EMBED_DIM=36 {WINDOWS}",
                2_530_000, 60),
    "P1": Proxy(f"{SHAPE} VOCAB_SIZE=1024 EMBED_DIM=48 {WINDOWS}", 6_000_000, 80),
    "P2": Proxy("NUM_LAYERS=6 MODEL_DIM=192 NUM_HEADS=4 NUM_KV_HEADS=2 BITNET_GROUP_SIZE=64 "
                f"VOCAB_SIZE=8192 EMBED_DIM=96 {WINDOWS}", 4_000_000, 160),
}  # fmt: skip
# The same tokens of each set whatever the arm; nothing is fitted to them
SCORED = "WARMUP_STEPS=1 TRAIN_LOG_EVERY=5 VAL_MAX_TOKENS=500000 SLIDING_EVAL=0 TEMP_SCALING=0"
ONLY_SCORES = "VAL_MAX_TOKENS SLIDING_EVAL SLIDING_EVAL_STRIDE".split()  # settings that no training depends on


# -------------------------------------------------------------------------------------------------- arms

SYSTEMS = {
    "default": Arm(f"{SHAPE} EMBED_DIM=72",
                   "10 x 768: two blocks a side of the U, two query heads a KV head, E four sevenths of D"),
    "ternary_phase": Arm(f"{SHAPE} EMBED_DIM=72", "as the default", "ternary_phase"),
    "fast": Arm(f"{SHAPE} EMBED_DIM=48", "E a third of D; one layer of the four without attention", "fast"),
    "pr640": Arm(f"{SHAPE} EMBED_DIM=48", "as the default, E a third of D", "pr640"),
    "pr920": Arm(f"{SHAPE} EMBED_DIM=56", "an embedding wider than #640's", "pr920", 6533),
    "pr641": Arm(f"{SHAPE} NUM_LAYERS=6 EMBED_DIM=48", "half as many layers again as #640", "pr641", 50_000),
    "pr139": Arm(f"{SHAPE} NUM_LAYERS=5 TRAIN_SEQ_LEN=512", "12 layers to #640's 10, twice its context", "pr139", 4713),
    "pr367": Arm(f"{SHAPE} NUM_LAYERS=5 MLP_HIDDEN=448 TRAIN_SEQ_LEN=512",
                 "as #139, a wider MLP, in whole groups", "pr367", 4591),
    "pr126": Arm("NUM_LAYERS=6 NUM_UNIQUE_LAYERS=2 MODEL_DIM=112 NUM_HEADS=4 NUM_KV_HEADS=2 SEQ_WARMUP_START=32",
                 "12 passes of 640: AB AB AB; an eighth of the context at first", "pr126", 10_000),
    "pr126_60m": Arm("NUM_LAYERS=9 NUM_UNIQUE_LAYERS=3 MODEL_DIM=128 NUM_HEADS=4 NUM_KV_HEADS=2 SEQ_WARMUP_START=32",
                     "24 passes of 1,024: ABC ABC ABC; narrower than in proportion, or it would take too few steps",
                     "pr126_60m", 10_000),
    "pr435": Arm("NUM_LAYERS=5 MODEL_DIM=96 NUM_HEADS=6 NUM_KV_HEADS=2 RADIAL_BITS=6 MICRO_BATCH_TOKENS=1024 "
                 "PRECISION=auto",
                 "12 x 384: half as wide, six heads; positions repeat after a quarter of the window, as there",
                 "pr435", 1250),
}  # fmt: skip

# The switches, each against the small default: #640's own, what the published design consists of, what other systems
# add.
SWITCHES = {
    "ACTIVATION=relu": "#640: .024 behind relu2",
    "ACTIVATION=leaky_relu": "#640: .022 behind",
    "ACTIVATION=swiglu": "#640: .010 ahead for a third more weights",
    "ACTIVATION=gelu": "#435's",
    "MLP_MULT=3": "#640: 4 is .008 ahead",
    "BIGRAM_HASH=1": "#640: .020 behind, its table under Muon",
    "SMEAR=1": "#640: .001 ahead in long runs",
    "SMEAR_GATE=0": "the default's share of the token before",
    "KEY_OFFSET=0": "the default's keys that tell the token before",
    "REFINER=1": "#640: its convolution was in no optimizer",
    "DIFF_ATTN=1": "#640: .022 behind",
    "MLP_GROUPS=2": "#640: .031 behind",
    "MTP_HEADS=1": "#640: .006 behind, it predicted one token too far",
    "ATTN_PROJ_TYPE=tversky": "#640: .027 to .037 behind",
    "LOGIT_HEAD_TYPE=tversky": "#640: did not learn",
    "TIE_EMBEDDINGS=0": "#640: its head's learning rate was 0",
    "TIE_EMBEDDINGS=2": "#640: a correction of the table on its output side",
    "UNTIE_AT_FRACTION=0.66": "#640: its gradients were not reduced over the processes",
    "TRAINING_DEPTH_RECURRENCE=2": "#640: .029 behind at equal steps, twice the time",
    "NUM_UNIQUE_LAYERS=2 RECURRENCE_FACTOR=2": "#126's way: ABAB, half the weights",
    "SEQ_LEN_START=64 SEQ_SCHEDULE_FRACTION=0.33": "#640: .003 ahead, with a loader that started over",
    "SEQ_RAMP_START=64 SEQ_RAMP_FRAC=0.25": "#367's ramp",
    "SEQ_WARMUP_START=32 SEQ_WARMUP_STEPS=80": "#126's warm-up",
    "SEQ_WARMUP_START=32 SEQ_WARMUP_STEPS=80 ROPE_TYPE=rope NTK_ROPE=1": "and its rotary base, against ROPE_TYPE=rope",
    "BATCH_TOKENS_START=512 BATCH_SCHEDULE_FRACTION=0.33": "#640: .001 to .003 behind",
    "BATCH_RAMP_START=512 BATCH_RAMP_FRAC=0.2": "#367's ramp",
    "MATRIX_OPTIMIZER=muon_plain": "without the rows' normalization",
    "MATRIX_OPTIMIZER=normuon": "as published: a second moment a row, the norm restored",
    "MATRIX_OPTIMIZER=normuon126": "#126's: rows of equal length, the norm not restored",
    "MATRIX_OPTIMIZER=adamw ADAM_LR=0.003": "a learning rate for it, not Muon's as there",
    "MATRIX_OPTIMIZER=fro MATRIX_LR=0.001": "#435's",
    "MATRIX_OPTIMIZER=fro_stable MATRIX_LR=0.0009 FRO_ALPHA=0.12 FRO_GAMMA=0.66": "#435's later one",
    "MUON_BACKEND_STEPS=5": "#640: as 3",
    "MUON_WD=0.04": "#640: .003 behind at 10 layers; #367: collapse",
    "GRAD_CLIP_NORM=1": "#367: stalls",
    "EMA=1": "#640: ruin, its shadow was not quantized as it was scored",
    "TERNARY_COMMIT_LAMBDA=0.005": "#126: never measured",
    "WEIGHT_QUANT=binary": "#641",
    "WEIGHT_QUANT=none": "what ternary weights cost",
    "INPUT_NORM=all": "#139's",
    "INPUT_NORM=none": "#126's",
    "ACT_QUANT=int8": "#126's",
    "SCALE_STAT=rms": "#920: .005 behind for fewer bytes",
    "SCALE_STORAGE=bf16": "#920",
    "SCALE_STORAGE=fp16": "#640",
    "FP_STORAGE=FP16": "what FP8 tables cost",
    "FP_STORAGE=FP4": "#640: .026 lost in the round trip",
    "ROPE_TYPE=rope": "without #640's spectrum",
    "POSITION=radial RADIAL_BITS=6": "#435's",
    "POSITION=none": "no position at all",
    "XSA_LAST_N=2": "#367: a plateau",
    "SOFTCAP_TYPE=tanh": "#640: the same",
    "UNET=0": "what the skips are worth",
    "RESID_MIX=0": "what the way back to the embedding is worth",
    "Z_LOSS=0": "what the z-loss is worth",
    "WARMDOWN_SHAPE=cosine": "#126's",
    "ACT_QUANT=fp8": "ours: 8-bit operands on Hopper, the same arithmetic on a CPU",
    "PARALLEL_BLOCKS=1": "configs/fast.env: attention and MLP side by side",
    "ATTENTION_FREE_LAYERS=1": "configs/fast.env: one layer of the four is an MLP alone",
}


# One pass over long rows against sliding windows, at the same reach of attention
BAND = {
    "sliding, windows of 128": Arm("TRAIN_SEQ_LEN=128", "every token is computed 8 times over"),
    "banded 128, one pass": Arm("TRAIN_SEQ_LEN=256 ATTENTION_WINDOW=128",
                                "half of a row's tokens see a window that does not begin with the row"),
    "sliding, windows of 256": Arm("TRAIN_SEQ_LEN=256", "what a longer window is worth"),
}  # fmt: skip

# The recipe's parts, each on top of configs/pr640.env at the proxy's size; {wide}: the proxy's
WIDE = "EMBED_DIM={wide} FP_STORAGE=INT5"
RECIPE = (
    WIDE, "WARMDOWN_FRACTION=.4", "WARMDOWN_FRACTION=.6", "WARMDOWN_FRACTION=.85", "MUON_WD=.0025", "QK_GAIN_INIT=4",
    "BETA2=.99", "MATRIX_OPTIMIZER=normuon", "WEIGHT_QUANT=none", "UNET=0", "RESID_MIX=0", "Z_LOSS=0", "ROPE_TYPE=rope",
    "SOFTCAP_TYPE=tanh", f"{WIDE} WARMDOWN_FRACTION=.6 QK_GAIN_INIT=4 BETA2=.99 MUON_WD=.0025",
    f"{WIDE} WARMDOWN_FRACTION=.6 MUON_WD=.0025", f"{WIDE} WARMDOWN_FRACTION=.6 MUON_WD=.0025 SMEAR_GATE=1",
    f"{WIDE} WARMDOWN_FRACTION=.6 MUON_WD=.0025 SMEAR_GATE=1 KEY_OFFSET=1",
)  # fmt: skip


def band_arms() -> dict[str, Arm]:
    size = f"{SYSTEMS['default'].settings} ROPE_TYPE=rope VAL_MAX_TOKENS=65536 SLIDING_EVAL_STRIDE=16"
    return {name: arm._replace(settings=f"{size} {arm.settings}") for name, arm in BAND.items()}


def switch_arms() -> dict[str, Arm]:
    # there are many of them: half of the others' batch, a quarter of their tokens scored
    base = SYSTEMS["default"].settings + " TRAIN_BATCH_TOKENS=1024 VAL_MAX_TOKENS=32768 SLIDING_EVAL=0"
    switches = {name: Arm(f"{base} {name}", reason) for name, reason in SWITCHES.items()}
    return {"base": Arm(base, "the small default")} | switches


def recipe_arms(proxy: str, more: Iterable[str] = ()) -> dict[str, Arm]:
    """The control and the parts of the recipe, and `more` of them, named by their settings."""
    parts = [*(part.format(wide=PROXIES[proxy].wide) for part in RECIPE), *more]
    return {"control": Arm("", preset="pr640")} | {part: Arm(part, preset="pr640") for part in parts}


def free_arms(arms: Iterable[str]) -> dict[str, Arm]:
    """Arms named by their settings, on top of whatever preset the plan has."""
    return {arm or "(preset)": Arm(arm, published_steps=0) for arm in arms}


# -------------------------------------------------------------------------------------------------- sweeps

MOST_ARMS, MOST_VALUES = 1000, 100
DECIMAL = r"[+-]?(?:\d{1,15}\.?\d{0,15}|\.\d{1,15})(?:e[+-]?\d{1,2})?"
SPAN = re.compile(rf"({DECIMAL}):({DECIMAL})(?::(\d{{0,6}})(log)?)?", re.I)


class Range(NamedTuple):
    """Values between two ends; whole ones of a setting that counts."""

    low: float
    high: float
    log: bool
    whole: bool

    def at(self, share: float) -> str:
        """The value that lies this far between the ends."""
        x = self.low * (self.high / self.low) ** share if self.log else self.low + (self.high - self.low) * share
        return str(round(x)) if self.whole else f"{x:.4g}"


def axis_of(word: str, config: type) -> tuple[str, list[str] | Range]:
    """(setting, its values or a range to draw from) of a word of --set; BadArguments unless it is one."""
    key, equals, text = word.partition("=")
    if not equals or key not in setting_names(config) - {*PATHS, "SEED", "RUN_ID"}:
        raise BadArguments(f"--set {word!r}: expected a setting of train_gpt.py and its values, such as MATRIX_LR=.01,.02")
    if ":" not in text:
        values = text.split(",")
        if "" in values:
            raise BadArguments(f"--set {word!r}: a value is empty")
        return key, list(dict.fromkeys(values))
    found = SPAN.fullmatch(text)
    if not found or found[3] == "" and not found[4]:
        raise BadArguments(f"--set {word!r}: expected {key}=LOW:HIGH, LOW:HIGH:log, LOW:HIGH:COUNT or LOW:HIGH:COUNTlog")
    low, high, count = float(found[1]), float(found[2]), found[3]
    default = getattr(config, key.lower(), None)
    if isinstance(default, (bool, str)) or default is None:
        raise BadArguments(f"--set {word!r}: {key} is no number; expected {key}=A,B,C")
    if not low < high or found[4] and low <= 0:
        raise BadArguments(f"--set {word!r}: expected LOW below HIGH" + (", and both above 0" if found[4] else ""))
    span = Range(low, high, bool(found[4]), isinstance(default, int))
    if not count:
        return key, span
    if not 2 <= int(count) <= MOST_VALUES:
        raise BadArguments(f"--set {word!r}: {count} values, expected 2 to {MOST_VALUES}")
    return key, list(dict.fromkeys(span.at(i / (int(count) - 1)) for i in range(int(count))))


def grid(axes: dict[str, list[str] | Range]) -> list[str]:
    """The settings of every combination; BadArguments for a range without a count, or too many."""
    for key, values in axes.items():
        if isinstance(values, Range):
            raise BadArguments(f"--set {key}: LOW:HIGH is drawn from, so it needs --draws; LOW:HIGH:COUNT does not")
    if (count := math.prod(map(len, axes.values()))) > MOST_ARMS:
        raise BadArguments(f"--set: {count:,} combinations, expected at most {MOST_ARMS:,}; --draws N takes some of them")
    return [" ".join(map("=".join, zip(axes, values, strict=True))) for values in itertools.product(*axes.values())]


def draw(axes: dict[str, list[str] | Range], count: int, seed: int) -> list[str]:
    """`count` different combinations at random; BadArguments if there are not as many."""
    source, found = random.Random(seed), {}
    for _ in range(100 * count):
        shares = {key: source.random() for key in axes}
        values = {key: v.at(shares[key]) if isinstance(v, Range) else v[int(len(v) * shares[key])] for key, v in axes.items()}
        found[" ".join(map("=".join, values.items()))] = None
        if len(found) == count:
            return list(found)
    raise BadArguments(f"--draws {count}: only {len(found)} different combinations were found")


def sweep_arms(words: Iterable[str], draws: int, seed: int, config: type) -> dict[str, Arm]:
    """The preset itself, and the combinations of a sweep's words."""
    axes: dict[str, list[str] | Range] = {}
    for word in words:
        key, values = axis_of(word, config)
        if key in axes:
            raise BadArguments(f"--set {word!r}: {key} is there already")
        axes[key] = values
    return free_arms(["", *(draw(axes, draws, seed) if draws else grid(axes))])


GROUPS = {"systems": lambda: SYSTEMS, "switches": switch_arms, "band": band_arms}


# -------------------------------------------------------------------------------------------------- settings


class Plan(NamedTuple):
    """What all runs of a batch share: their size and, at most one of them, their steps, tokens or seconds."""

    size: dict[str, str]  # settings between an arm's preset and its own
    steps: int = 0
    tokens: int = 0
    seconds: float = 0
    usual_steps: int = SMALL_STEPS  # that a run is expected to take where seconds decide
    full: bool = False  # the presets at their own size: an arm's own settings, which make it small, are left out
    half_windows: bool = False  # sliding windows, where they are scored, overlap by half whatever their length

    def steps_of(self, settings: dict[str, str], default_batch: int) -> int:
        """Steps of a run with these settings; 0 where its seconds or its preset decide."""
        batch = int(settings.get("TRAIN_BATCH_TOKENS", default_batch))
        if 0 < self.tokens < batch:
            raise BadArguments(f"--tokens {self.tokens}: expected at least those of a step, {batch}")
        return self.steps or self.tokens // batch

    def budget(self, steps: int) -> dict[str, str]:
        if steps:
            return {"MAX_WALLCLOCK_SECONDS": "0", "ITERATIONS": str(steps)}
        return {"MAX_WALLCLOCK_SECONDS": f"{self.seconds:g}", "ITERATIONS": "1000000"} if self.seconds else {}


def pairs(text: str) -> dict[str, str]:
    """KEY -> value of "KEY=VALUE KEY=VALUE"; BadArguments for a word without "="."""
    for word in text.split():
        if "=" not in word:
            raise BadArguments(f"{text!r}: expected KEY=VALUE, found {word!r}")
    return dict(word.split("=", 1) for word in text.split())


def in_proportion(settings: dict[str, str], published_steps: int, steps: int, config: type) -> dict[str, str]:
    """Settings that count steps, shrunk from the published run's length to this one's."""
    counts = {key: int(settings.get(key, getattr(config, key.lower(), 0))) for key in IN_STEPS}
    return {key: str(max(1, round(n * steps / published_steps))) for key, n in counts.items() if n}


def load_config(code: Path) -> type:
    """Config of a trainer's file: which settings it has, and whether it accepts their values; BadArguments if it is none."""
    loaded = sys.modules.get("train_gpt")
    if loaded is None or Path(str(loaded.__file__)).read_bytes() != code.read_bytes():
        before = loaded
        spec = importlib.util.spec_from_loader("train_gpt", SourceFileLoader("train_gpt", str(code)))
        loaded = sys.modules["train_gpt"] = importlib.util.module_from_spec(spec)  # dataclasses look their module up
        try:
            spec.loader.exec_module(loaded)
            loaded.Config.from_env({})
        except (Exception, SystemExit) as error:  # whatever a file that is no trainer does
            sys.modules["train_gpt"] = before
            raise BadArguments(f"--code {code}: not a train_gpt.py: {type(error).__name__}: {error}") from None
    return loaded.Config


def setting_names(config: type) -> set[str]:
    return {f.name.upper() for f in dataclasses.fields(config)}


def arm_settings(arm: Arm, plan: Plan, config: type, preset: Path | None = None) -> dict[str, str]:
    """Every setting of a run but its seed and its paths; ValueError for one that the trainer does not have or accept.

    `preset`: a file in the place of the arm's own preset.
    """
    own = {} if plan.full else pairs(arm.settings)
    path = preset or (ROOT / f"configs/{arm.preset}.env" if arm.preset else None)
    published = read_preset(path) if path else {}
    settings = published | plan.size | own
    check_settings(settings, config)
    steps = plan.steps_of(settings, config.train_batch_tokens)
    if arm.published_steps:
        counts = in_proportion(published, arm.published_steps, steps or plan.usual_steps, config)
        if "SEQ_WARMUP_START" not in settings:
            counts.pop("SEQ_WARMUP_STEPS", None)  # counts nothing
        settings = published | counts | plan.size | own
    settings |= plan.budget(steps)
    if plan.half_windows:
        settings["SLIDING_EVAL_STRIDE"] = str(int(settings.get("TRAIN_SEQ_LEN", config.train_seq_len)) // 2)
    check_settings(settings, config)
    return {k: v for k, v in settings.items() if k not in PATHS}


def check_settings(settings: dict[str, str], config: type) -> None:
    """ValueError for a setting that the trainer does not have or accept."""
    if foreign := settings.keys() - setting_names(config):
        raise ValueError(f"not a setting of train_gpt.py: {', '.join(sorted(foreign))}")
    config.from_env(settings)


# -------------------------------------------------------------------------------------------------- runs


def data_folder(prefix: str, settings: dict[str, str], config: type) -> Path:
    """The folder of a run's shards and tokenizer.model: PREFIX + vocabulary, or PREFIX itself; BadArguments without."""
    vocab = settings.get("VOCAB_SIZE", str(config.vocab_size))
    for folder in (Path(prefix + vocab), Path(prefix)):
        if all(any(folder.glob(f"fineweb_{split}_*.bin")) for split in ("train", "val")):
            return folder.resolve()
    others = [path for path in Path(prefix).parent.glob(f"{glob.escape(Path(prefix).name)}[0-9]*") if any(path.glob("fineweb_val_*.bin"))]
    found = [name for path in others if (name := str(path).removeprefix(str(Path(prefix)))).isdecimal()]
    hint = f"; for what is there, every --arm needs VOCAB_SIZE={' or '.join(sorted(found, key=int))}" if found else ""
    raise BadArguments(f"--data {prefix}: expected fineweb_train_*.bin and fineweb_val_*.bin in {prefix}{vocab}{hint}")


def web_folder(folder: Path) -> Path:
    """Beside a data folder, the one with the shards of the web text held out; BadArguments where it is missing."""
    web = folder.with_name(f"{folder.name}_web")
    if not any(web.glob("fineweb_val_*.bin")):
        raise BadArguments(f"{web}: expected shards (fineweb_val_*.bin) of the web text, which every run is scored on")
    return web


def snapshot(out: Path, code: Path | None) -> Path:
    """The code of the batch in OUT: copied from `code`, else from the working tree, unless it is there.

    BadArguments where OUT has another version than `code`: one folder is one experiment.
    """
    target, source = out / "train_gpt.py", code or ROOT / "train_gpt.py"
    if not target.exists():
        out.mkdir(parents=True, exist_ok=True)
        unfinished = target.with_suffix(".part")
        unfinished.write_bytes(source.read_bytes())
        unfinished.replace(target)  # never half a file, which a resumption would take for the code
    elif code and code.read_bytes() != target.read_bytes():
        raise BadArguments(f"--code {code}: {target} is another version, which its runs go on with; name another --out")
    return target


class Batch(NamedTuple):
    """How runs are executed."""

    out: Path
    data: str  # what the data folders' paths begin with
    code: Path  # the trainer
    config: type  # its Config
    web: bool = False  # score the artifact on the web text too
    keep: bool = False  # the artifacts
    jobs: int = 0  # runs at once, of one thread each; 0: one with all threads
    gpus: tuple[str, ...] = ()  # as CUDA_VISIBLE_DEVICES names them; a run each


class Runner:
    """Runs arms, `jobs` at a time, and keeps their results."""

    def __init__(self, batch: Batch) -> None:
        self.batch, self.file, self.children, self.stopped = batch, batch.out / "results.jsonl", set(), False
        (batch.out / "logs").mkdir(parents=True, exist_ok=True)
        self.cores, self.own = sorted(os.sched_getaffinity(0)), threading.local()
        self.places = itertools.cycle(batch.gpus or self.cores)

    def take_a_place(self) -> None:
        """Gives the calling thread, and so the processes that it starts, a GPU or a core. One job alone may move to an idle
        core."""
        if self.batch.gpus:
            self.own.gpu = next(self.places)
        elif self.batch.jobs > 1:
            os.sched_setaffinity(0, {next(self.places)})

    def share(self) -> dict[str, str]:
        """What tells a run of the calling thread its part of the machine."""
        if self.batch.gpus:
            threads = max(1, len(self.cores) // len(self.batch.gpus))
            return {"CUDA_VISIBLE_DEVICES": self.own.gpu, "OMP_NUM_THREADS": str(threads)}
        return {"OMP_NUM_THREADS": "1"} if self.batch.jobs else {}

    def execute(self, env: dict[str, str]) -> dict[str, Any]:
        """One process of the trainer: its result, or {"error": the last line it said}."""
        if self.stopped:
            return {"error": "stopped"}
        command = [sys.executable, str(self.batch.code.resolve())]
        child = subprocess.Popen(command, cwd=self.batch.out, env=env, text=True, stdout=subprocess.PIPE,
                                 stderr=subprocess.PIPE)  # fmt: skip
        self.children.add(child)
        said, complaint = child.communicate()
        self.children.discard(child)
        if child.returncode:
            return {"error": (complaint.strip().splitlines() or [f"exit code {child.returncode}"])[-1]}
        try:
            return json.loads(f"\n{said}".rsplit("\nresult ", 1)[1])
        except (IndexError, ValueError):
            return {"error": "ended well, but without a result line"}

    def run(self, arm: str, seed: int, settings: dict[str, str]) -> dict[str, Any]:
        """One run: {"arm", "seed", "settings", "result" and in a web batch "web", or "error"}."""
        record, name = {"arm": arm, "seed": seed, "settings": settings}, f"{file_name(arm)}_seed{seed}"
        folder, names = data_folder(self.batch.data, settings, self.batch.config), setting_names(self.batch.config)
        artifact = self.batch.out.resolve() / f"{name}.ptz"
        trained = self.trained_before(arm, seed, settings, artifact)
        env = {k: v for k, v in os.environ.items() if k not in names}  # the shell's settings are no arm's
        # else git, above the out folder, would name a commit that the snapshot does not stand at
        env["GIT_CEILING_DIRECTORIES"] = str(self.batch.out.resolve().parent)
        env |= self.share()
        env |= settings | {"RUN_ID": name, "SEED": str(seed), "ARTIFACT_PATH": str(artifact), "DATA_PATH": str(folder),
                           "TOKENIZER_PATH": str(folder / "tokenizer.model")}  # fmt: skip
        try:
            if trained:
                scores = self.execute(env | {"EVAL_ONLY": "1", "RUN_ID": f"{name}_again"})
                result = scores if "error" in scores else with_scores(trained, scores)
            else:
                result = self.execute(env)
            if "error" in result or not self.batch.web:
                return record | (result if "error" in result else {"result": result})
            web = self.execute(env | {"EVAL_ONLY": "1", "RUN_ID": f"{name}_web", "DATA_PATH": str(web_folder(folder))})
            return record | {"result": result} | ({"error": web["error"]} if "error" in web else {"web": web})
        finally:
            if not self.batch.keep and not trained:
                artifact.unlink(missing_ok=True)

    def trained_before(self, arm: str, seed: int, settings: dict[str, str], artifact: Path) -> dict[str, Any]:
        """The result of the same training with other scores, if its artifact is there, whole, and scored as its model; else {}."""
        digest = hashlib.sha256(artifact.read_bytes()).hexdigest() if artifact.exists() else ""
        for earlier in read_results(self.file) if digest else []:
            result = earlier.get("result", {})
            same = (earlier["arm"], earlier["seed"], training_of(earlier["settings"])) == (arm, seed, training_of(settings))
            if same and result.get("artifact_sha256") == digest and result["val_bpb"] == result["roundtrip_val_bpb"]:
                return result
        return {}

    def run_all(self, arms: dict[str, dict[str, str]], seeds: list[int]) -> list[dict[str, Any]]:
        """Every arm with every seed but what has finished before; returns the records of all, in the table's order."""
        wanted = {identity(arm, seed, settings): (arm, seed, settings)
                  for seed in seeds for arm, settings in arms.items()}  # fmt: skip
        known = {key: r for r in read_results(self.file) if not failure(r) and (key := identity_of(r)) in wanted}
        records, todo = list(known.values()), [job for key, job in wanted.items() if key not in known]
        pool = ThreadPoolExecutor(len(self.batch.gpus) or max(1, self.batch.jobs), initializer=self.take_a_place)
        try:
            runs = [pool.submit(self.run, *job) for job in todo]
            for number, done in enumerate(as_completed(runs), 1):
                records.append(record := done.result())
                append_result(self.file, record)
                print(f"{number}/{len(todo)} {record['arm']} seed {record['seed']}: {said_of(record)}", file=sys.stderr,
                      flush=True)  # fmt: skip
        finally:  # an interrupted batch leaves no process behind
            pool.shutdown(wait=False, cancel_futures=True)
            self.stopped = True
            for child in list(self.children):
                child.kill()
        return in_order(records, list(arms))


def training_of(settings: dict[str, str]) -> dict[str, str]:
    return {key: value for key, value in settings.items() if key not in ONLY_SCORES}


def with_scores(trained: dict[str, Any], scores: dict[str, Any]) -> dict[str, Any]:
    """A training's result with other scores of its artifact. The model itself is gone; it scored as the artifact did."""
    new = {key: value for key, value in scores.items() if "_val_" in key or key in ("val_tokens", "val_bytes", "decoded_bytes", "stride", "eval_time_s")}
    return trained | new | {"val_loss": scores["roundtrip_val_loss"], "val_bpb": scores["roundtrip_val_bpb"]}


def file_name(arm: str) -> str:
    """An arm's name as part of a run's, which may have 80 characters; different arms have different ones."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "_", arm)
    return name if len(name) <= 50 else f"{name[:43]}_{hashlib.sha256(arm.encode()).hexdigest()[:6]}"


# -------------------------------------------------------------------------------------------------- the table


def row(scores: Scores, first: Scores, reason: str) -> dict[str, str]:
    """Column -> text; "" where there is nothing to say."""

    def mean(values: dict[int, float], digits: int = 4) -> str:
        return f"{statistics.fmean(values.values()):.{digits}f}" if values else ""

    def against(values: dict[int, float], base: dict[int, float]) -> tuple[str, str]:
        if scores is first or not values or not base:
            return "", ""
        pair = paired(values, base)
        return str(welch(values.values(), base.values())), f"{pair} ({pair.count})" if pair else ""

    def own(key: str, digits: int = 0) -> str:
        return mean(scores.of("result", key), digits)

    chunked, (difference, by_seed) = scores.chunked, against(scores.chunked, first.chunked)
    sliding_difference, sliding_by_seed = against(scores.sliding, first.sliding)
    web, web_sliding = scores.of("web", "roundtrip_val_bpb"), scores.of("web", "sliding_val_bpb")
    error = estimate(chunked.values()).error
    return {
        "arm": scores.arm, "n": str(len(scores.runs)), "val bpb": own("val_bpb", 4), "web bpb": mean(web),
        "mean": mean(chunked) if web else "", "s.e.": "" if error is None else f"{error:.4f}",
        "against the first": difference, "paired by seed": by_seed, "sliding": own("sliding_val_bpb", 4),
        "web sliding": mean(web_sliding), "sliding against the first": sliding_difference,
        "sliding by seed": sliding_by_seed, "steps": own("steps"), "ms/step": own("ms_per_step"),
        "params": own("params"), "artifact bytes": own("artifact_bytes"), "zeros": own("zero_frac", 3),
        "why, or what others found": reason,
    }  # fmt: skip


def spread_line(first: Scores) -> str:
    """How far one arm's seeds lie apart, and so what a difference of single seeds is worth."""
    values, name = list(first.chunked.values()), first.arm
    if len(values) < 2:
        return f"{name}: one seed, so nothing is known of the spread"
    deviation, low, high = statistics.stdev(values), min(values), max(values)
    return (f"{name}: {len(values)} seeds from {low:.4f} to {high:.4f}, standard deviation {deviation:.4f}; if another "
            f"arm's seeds spread as much, the difference of one has a standard error of {spread_of_one(first):.4f}")  # fmt: skip


def warnings(done: list[Scores]) -> list[str]:
    """What makes the table less than one experiment."""
    found = []
    codes = {str(run["result"].get("code_sha256", "unknown")) for scores in done for run in scores.runs.values()}
    if len(codes) > 1:
        shown = ", ".join(sorted(code[:8] for code in codes))
        found.append(f"Warning: {len(codes)} versions of train_gpt.py ({shown}): not one experiment.")
    for scores in done:
        if len({json.dumps(run["settings"], sort_keys=True) for run in scores.runs.values()}) > 1:
            found.append(f"Warning: {scores.arm}: its seeds ran with different settings.")
    return found


def table_of(records: list[dict[str, Any]], reasons: dict[str, str] | None = None) -> tuple[str, bool]:
    """(the Markdown table of records in their order, False if a run failed or an artifact scored otherwise than its
    model)."""
    lines = []
    good, failed = [r for r in records if not failure(r)], [r for r in records if failure(r)]
    done = scores_of(good)
    if done:
        rows = [row(scores, done[0], (reasons or {}).get(scores.arm, "")) for scores in done]
        columns = [column for column in rows[0] if any(r[column] for r in rows)]
        lines += [spread_line(done[0]) + "\n", f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}"]
        lines += [f"| {' | '.join(cells[column] for column in columns)} |" for cells in rows]
    notes = warnings(done) + [f"FAILED: {r['arm']}, seed {r['seed']}: {failure(r)}" for r in failed]
    inexact = [r for r in good if r["result"]["roundtrip_val_bpb"] != r["result"]["val_bpb"]]
    notes += [f"NOT EXACT: {r['arm']}, seed {r['seed']}: the model scored {r['result']['val_bpb']!r}, its artifact "
              f"{r['result']['roundtrip_val_bpb']!r}" for r in inexact]  # fmt: skip
    return "\n".join([*lines, *[""][: bool(notes)], *notes]), not failed and not inexact


def print_table(records: list[dict[str, Any]], reasons: dict[str, str] | None = None) -> bool:
    text, good = table_of(records, reasons)
    print(text)
    return good


def publish(out: Path, records: list[dict[str, Any]], reasons: dict[str, str]) -> bool:
    """Print the table, and keep it in OUT, with its picture. Returns as `print_table` does."""
    text, good = table_of(records, reasons)
    print(text, flush=True)
    unfinished = out / "table.part"
    unfinished.write_text(text + "\n", encoding="utf-8")
    unfinished.replace(out / "table.md")
    done, files = scores_of(records), [out / "table.md"]
    if len(done) > 1 and plot_logs.has_matplotlib():
        try:
            plot_logs.save(plot_logs.effects_figure(done), out / "effects.png")
            files.append(out / "effects.png")
        except (OSError, ImportError, RuntimeError, ValueError) as error:  # the results are there without it
            print(f"{Path(__file__).name}: no picture: {error}", file=sys.stderr)
    print(f"{Path(__file__).name}: {' and '.join(map(str, files))}", file=sys.stderr)
    return good


# -------------------------------------------------------------------------------------------------- command line


# Of the options that are numbers; a week, and more jobs than any machine has cores
MOST = {"steps": 100_000_000, "tokens": 10**13, "seconds": 604_800, "jobs": 1024, "draws": MOST_ARMS}


class Parser(argparse.ArgumentParser):
    """Says in one line what is wrong."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{Path(__file__).name}: error: {message}\n")


def whole_numbers(text: str) -> list[int]:
    if not re.fullmatch(r"[0-9]{1,18}(,[0-9]{1,18})*", text):
        raise argparse.ArgumentTypeError(f"{text}: expected whole numbers and commas, such as 42,1337,7")
    return list(dict.fromkeys(int(number) for number in text.split(",")))


def devices(text: str) -> tuple[str, ...]:
    """Names of GPUs: numbers, or what `nvidia-smi -L` calls them."""
    names = text.split(",")
    if not all(re.fullmatch(r"\d{1,3}|(?:GPU|MIG)-[A-Za-z0-9/-]{1,80}", name) for name in names) or len(set(names)) < len(names):
        raise argparse.ArgumentTypeError(f"{text}: expected different GPUs and commas, such as 0,1")
    return tuple(names)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("group", choices=(*GROUPS, "recipe", "free", "sweep"))
    parser.add_argument("--proxy", choices=PROXIES, help="recipe: the size")
    parser.add_argument("--preset", type=Path, help="free, sweep: a file of KEY=VALUE lines; without one, the defaults")
    parser.add_argument("--arm", action="append", default=[], metavar="SETTINGS",
                        help='free, recipe: "KEY=VALUE ..." on top of the preset; "": the preset itself')  # fmt: skip
    parser.add_argument("--set", action="append", default=[], metavar="VALUES", help='sweep: "KEY=A,B,C" or "KEY=LOW:HIGH:COUNT"')
    parser.add_argument("--draws", type=int, metavar="N", help="sweep: so many combinations at random; default: all")
    parser.add_argument("--draw-seed", type=int, metavar="N", help="sweep: of the draws; default 0")
    parser.add_argument("--steps", type=int, help="of each run")
    parser.add_argument("--tokens", type=int, help="or tokens that it trains on")
    parser.add_argument("--seconds", type=float, help="or seconds that it trains for")
    parser.add_argument("--seeds", type=whole_numbers, default=[42], metavar="A,B,C")
    parser.add_argument("--jobs", type=int, metavar="N",
                        help="runs at once, a thread each; default: recipe 1, others all threads for one")  # fmt: skip
    parser.add_argument("--gpus", type=devices, default=(), metavar="A,B", help="a run on each of these GPUs at once")
    parser.add_argument("--only", nargs="+", metavar="ARM", help="these arms, the first of them as the base")
    parser.add_argument("--full", action="store_true", help="systems: the presets at their own size, for a GPU")
    parser.add_argument("--sliding", action="store_true", help="recipe: score windows that overlap by half too")
    parser.add_argument("--whole", action="store_true", help="recipe: score all of both sets")
    parser.add_argument("--keep", action="store_true", help="keep every run's artifact: OUT/<arm>_seed<seed>.ptz")
    parser.add_argument("--table", action="store_true", help="print the results that are there")
    parser.add_argument("--data", default=f"{ROOT}/data/corpus/sp", metavar="PREFIX", help="default: data/corpus/sp")
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: data/bench/<group>, recipe: and _<proxy>")
    parser.add_argument("--code", type=Path, metavar="FILE", help="the trainer; default: train_gpt.py as it is now")
    args = parser.parse_args(argv)
    if problem := problem_of(args):
        parser.error(problem)
    return args


def problem_of(args: argparse.Namespace) -> str:
    """What is wrong with the arguments, as far as they tell by themselves; "" if nothing is."""
    lengths = [f"--{name}" for name in ("steps", "tokens", "seconds") if getattr(args, name)]
    own = {"recipe": {"proxy", "sliding", "whole", "arm"}, "free": {"preset", "arm"}, "sweep": {"preset", "set", "draws", "draw_seed"}, "systems": {"full"}}.get(args.group, set())
    foreign = [f"--{name.replace('_', '-')}" for name in ("proxy", "preset", "arm", "full", "sliding", "whole", "set", "draws", "draw_seed")
               if getattr(args, name) and name not in own]  # fmt: skip
    if foreign:
        return f"{args.group} has no {', '.join(foreign)}"
    for name, most in MOST.items():
        value = getattr(args, name)
        if value is not None and not 0 < value <= most:  # false of NaN, too
            return f"--{name} {value:g}: expected more than 0, at most {most:,}"
    if len(lengths) > 1:
        return f"{' and '.join(lengths)}: expected one of them"
    if args.table and (args.out or args.proxy or args.group != "recipe"):
        return ""
    if args.group == "recipe" and not args.proxy:
        return f"recipe: expected --proxy {' or '.join(PROXIES)}" + ", or --out, for its table" * args.table
    if args.group == "free" and not args.arm:
        return 'free: expected at least one --arm "KEY=VALUE ..."'
    if args.group == "sweep" and not any(text.split() for text in args.set):
        return 'sweep: expected at least one --set "KEY=A,B,C"'
    if args.jobs and args.gpus:
        return "--jobs and --gpus: expected one of them"
    if args.group in GROUPS and not lengths:
        return f"{args.group}: expected --steps, --tokens or --seconds"
    return ""


def arms_of(args: argparse.Namespace) -> dict[str, Arm]:
    """The arms that the arguments choose from; BadArguments for an unknown one of --only."""
    if args.group == "recipe":  # a table's folder says its proxy itself
        proxies = [args.proxy] if args.proxy else list(PROXIES)
        arms = {name: arm for proxy in proxies for name, arm in recipe_arms(proxy, args.arm).items()}
    else:
        arms = own_arms(args) if args.group in ("free", "sweep") else GROUPS[args.group]()
    if not args.table and (unknown := [name for name in args.only or () if name not in arms]):
        raise BadArguments(f"--only {' '.join(map(repr, unknown))}: expected some of {', '.join(map(repr, arms))}")
    return arms


def own_arms(args: argparse.Namespace) -> dict[str, Arm]:
    """The arms that the user has made up. Whether a setting counts something, the trainer knows."""
    if args.group == "free":
        return free_arms(args.arm)
    words = [word for text in args.set for word in text.split()]
    return sweep_arms(words, args.draws or 0, args.draw_seed or 0, load_config(code_of(args)))


def out_of(args: argparse.Namespace) -> Path:
    return args.out or ROOT / f"data/bench/{args.group}{f'_{args.proxy}' if args.proxy else ''}"


def code_of(args: argparse.Namespace) -> Path:
    """The trainer of a batch: its own copy once it has begun."""
    if args.code and not args.code.is_file():
        raise BadArguments(f"--code {args.code}: no such file")
    there = out_of(args) / "train_gpt.py"
    return there if there.exists() else args.code or ROOT / "train_gpt.py"


def plan_of(args: argparse.Namespace) -> Plan:
    length = Plan({}, args.steps or 0, args.tokens or 0, args.seconds or 0)
    if args.group in ("free", "sweep"):
        return length
    if args.group == "recipe":
        proxy = PROXIES[args.proxy]
        size = pairs(SCORED) | pairs(proxy.size) | ({"SLIDING_EVAL": "1"} if args.sliding else {}) | ({"VAL_MAX_TOKENS": "0"} if args.whole else {})
        usual = proxy.tokens // int(size["TRAIN_BATCH_TOKENS"])
        own_length = 0 if args.steps or args.tokens or args.seconds else proxy.tokens
        return length._replace(size=size, tokens=args.tokens or own_length, usual_steps=usual, half_windows=True)
    if args.full:
        return length._replace(size=pairs(FULL), usual_steps=FULL_STEPS, full=True)
    return length._replace(size=pairs(SMALL))


def table(args: argparse.Namespace, out: Path, arms: dict[str, Arm]) -> bool:
    """Print what a folder holds; BadArguments if that is nothing. Returns as `print_table` does."""
    records = in_order(read_results(out / "results.jsonl"), args.only or list(arms))
    records = [r for r in records if not args.only or r["arm"] in args.only]
    if not records:
        raise BadArguments(f"{out / 'results.jsonl'}: no results" + " of these arms" * bool(args.only))
    return print_table(records, {name: arm.reason for name, arm in arms.items()})


def run_batch(args: argparse.Namespace, out: Path, arms: dict[str, Arm]) -> bool:
    """Run what has not run, then print the table. Nothing starts before all arguments are known to be good."""
    if args.preset and not args.preset.is_file():
        raise BadArguments(f"--preset {args.preset}: no such file")
    config = load_config(code_of(args))
    plan, chosen = plan_of(args), {}
    for name in args.only or arms:
        try:
            chosen[name] = arm_settings(arms[name], plan, config, args.preset)
        except BadArguments:
            raise
        except ValueError as error:
            raise BadArguments(f"arm {name!r}: {error}") from None
    for settings in chosen.values():
        folder = data_folder(args.data, settings, config)
        if args.group == "recipe":
            web_folder(folder)
    jobs = args.jobs or (1 if args.group == "recipe" else 0)
    batch = Batch(out, args.data, snapshot(out, args.code), config, args.group == "recipe", args.keep, jobs, args.gpus)
    return publish(out, Runner(batch).run_all(chosen, args.seeds), {name: arm.reason for name, arm in arms.items()})


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    out = out_of(args)
    try:
        arms = arms_of(args)
        return 0 if (table if args.table else run_batch)(args, out, arms) else 1
    except BrokenPipeError:
        raise
    except (BadArguments, OSError) as error:
        print(f"{Path(__file__).name}: error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as Ctrl-C: the runs end with the batch
    start(main)
