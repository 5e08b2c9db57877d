"""Train the systems of the field, or the switches of this file, side by side: same corpus, same budget, same tokens scored.

    python bench/systems.py systems --seconds 150 --seeds 42,1337 --jobs 2     # equal wall clock, small, CPU
    python bench/systems.py switches --steps 400 --seeds 42,1337 --jobs 2      # equal steps, small, CPU
    python bench/systems.py band --steps 400 --seeds 42,1337 --jobs 2          # banded attention in one pass against sliding windows
    python bench/systems.py systems --seconds 120 --full                       # full size, one GPU
    python bench/systems.py systems --table                                    # the table again, no run

--data is what a data folder's path begins with, its vocabulary left out: data/corpus/sp for data/corpus/sp1024 (and sp8192 for --full),
as `tools/prepare_data.py corpus` makes them. Results go to OUT/results.jsonl, a line
a run; a run that is there with the same settings is not repeated, so an interrupted bench goes on where it stopped. Each
run's log is OUT/logs/<arm>_seed<seed>.txt, for tools/plot_logs.py. With --jobs N each run has one thread and one core of its own,
so that all of them meet the same load. Ends with code 1 if a run failed or an artifact scored otherwise than its model.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from sweep import read_preset  # noqa: E402

from train_gpt import Config, setting_kinds  # noqa: E402


class Arm(NamedTuple):
    """What one line of the table runs."""

    settings: str  # KEY=VALUE ..., on top of the preset and the common size
    reason: str  # of these values
    preset: str = ""  # configs/<preset>.env; "": the defaults
    published_steps: int = 6530  # of the run that the preset reproduces: settings in steps shrink with the run


# The small size: some 400 steps in 150 s on one core. The same batch for all: what is compared is model, optimizer and schedule.
SMALL = """VOCAB_SIZE=1024 TRAIN_SEQ_LEN=256 YARN_MAX_LEN=512 TRAIN_BATCH_TOKENS=2048 MICRO_BATCH_TOKENS=4096 WARMUP_STEPS=2
    TRAIN_LOG_EVERY=5 VAL_MAX_TOKENS=131072 SLIDING_EVAL=1 SLIDING_EVAL_STRIDE=128 TEMP_SCALING=0"""
SMALL_STEPS = 400
# Full size on one GPU: an eighth of the record run's batch, so a step takes about what it takes on eight
FULL = """TRAIN_BATCH_TOKENS=65536 WARMUP_STEPS=3 TRAIN_LOG_EVERY=10 VAL_MAX_TOKENS=2097152 SLIDING_EVAL=1 SLIDING_EVAL_STRIDE=256
    TEMP_SCALING=0"""
FULL_STEPS = 1300
IN_STEPS = "MUON_MOMENTUM_WARMUP_STEPS LR_WARMUP_STEPS WARMDOWN_ITERS SEQ_WARMUP_STEPS".split()

SHAPE = "NUM_LAYERS=4 MODEL_DIM=128 NUM_HEADS=4 NUM_KV_HEADS=2 BITNET_GROUP_SIZE=64"  # widths a sixth, depths two fifths
SYSTEMS = {
    "default": Arm(f"{SHAPE} EMBED_DIM=48", "10 x 768: two blocks a side of the U, two query heads a KV head, E a third of D"),
    "fast": Arm(f"{SHAPE} EMBED_DIM=48", "as the default; one layer of the four without attention", "fast"),
    "embed448": Arm(f"{SHAPE} EMBED_DIM=80", "an embedding wider by three quarters", "embed448"),
    "pr640": Arm(f"{SHAPE} EMBED_DIM=48", "as the default", "pr640"),
    "pr920": Arm(f"{SHAPE} EMBED_DIM=56", "an embedding wider than #640's", "pr920", 6533),
    "pr641": Arm(f"{SHAPE} NUM_LAYERS=6 EMBED_DIM=48", "half as many layers again as #640", "pr641", 50_000),
    "pr139": Arm(f"{SHAPE} NUM_LAYERS=5 TRAIN_SEQ_LEN=512", "12 layers to #640's 10, twice its context", "pr139", 4713),
    "pr367": Arm(f"{SHAPE} NUM_LAYERS=5 MLP_HIDDEN=448 TRAIN_SEQ_LEN=512", "as #139, a wider MLP, in whole groups", "pr367", 4591),
    "pr126": Arm("NUM_LAYERS=6 NUM_UNIQUE_LAYERS=2 MODEL_DIM=112 NUM_HEADS=4 NUM_KV_HEADS=2 SEQ_WARMUP_START=32",
                 "12 passes of 640: AB AB AB; an eighth of the context at first", "pr126", 10_000),
    "pr126_60m": Arm("NUM_LAYERS=9 NUM_UNIQUE_LAYERS=3 MODEL_DIM=128 NUM_HEADS=4 NUM_KV_HEADS=2 SEQ_WARMUP_START=32",
                     "24 passes of 1,024: ABC ABC ABC; narrower than in proportion, or it would take too few steps", "pr126_60m", 10_000),
    "pr435": Arm("NUM_LAYERS=5 MODEL_DIM=96 NUM_HEADS=6 NUM_KV_HEADS=2 RADIAL_BITS=6 MICRO_BATCH_TOKENS=1024 PRECISION=auto",
                 "12 x 384: half as wide, six heads; positions repeat after a quarter of the window, as there", "pr435", 1250),
}  # fmt: skip

# The switches, each against the small default: #640's own, what the published design consists of, what other systems add.
SWITCHES = {
    "ACTIVATION=relu": "#640: .024 behind relu2",
    "ACTIVATION=leaky_relu": "#640: .022 behind",
    "ACTIVATION=swiglu": "#640: .010 ahead for a third more weights",
    "ACTIVATION=gelu": "#435's",
    "MLP_MULT=3": "#640: 4 is .008 ahead",
    "BIGRAM_HASH=1": "#640: .020 behind, its table under Muon",
    "SMEAR=1": "#640: .001 ahead in long runs",
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
    "banded 128, one pass": Arm("TRAIN_SEQ_LEN=256 ATTENTION_WINDOW=128", "half of a row's tokens see a window that does not begin with the row"),
    "sliding, windows of 256": Arm("TRAIN_SEQ_LEN=256", "what a longer window is worth"),
}


def band_arms() -> dict[str, Arm]:
    size = f"{SYSTEMS['default'].settings} ROPE_TYPE=rope VAL_MAX_TOKENS=65536 SLIDING_EVAL_STRIDE=16"
    return {name: arm._replace(settings=f"{size} {arm.settings}") for name, arm in BAND.items()}


def switch_arms() -> dict[str, Arm]:
    base = SYSTEMS["default"].settings + " TRAIN_BATCH_TOKENS=1024 VAL_MAX_TOKENS=32768 SLIDING_EVAL=0"  # there are many
    return {"base": Arm(base, "the small default")} | {name: Arm(f"{base} {name}", reason) for name, reason in SWITCHES.items()}


GROUPS = {"systems": lambda: SYSTEMS, "switches": switch_arms, "band": band_arms}


class Budget(NamedTuple):
    """How long a run is, and on what."""

    seconds: float  # 0: steps decide
    steps: int  # 0: seconds decide
    full: bool

    def settings(self) -> dict[str, str]:
        if self.steps:
            return {"MAX_WALLCLOCK_SECONDS": "0", "ITERATIONS": str(self.steps)}
        return {"MAX_WALLCLOCK_SECONDS": f"{self.seconds:g}", "ITERATIONS": "1000000"}

    @property
    def expected_steps(self) -> int:
        return self.steps or (FULL_STEPS if self.full else SMALL_STEPS)


def pairs(text: str) -> dict[str, str]:
    return dict(pair.split("=", 1) for pair in text.split())


def in_proportion(settings: dict[str, str], published_steps: int, steps: int) -> dict[str, str]:
    """Settings that count steps, shrunk from the published run's length to this one's."""
    counts = {key: int(settings.get(key, getattr(Config, key.lower(), 0))) for key in IN_STEPS}
    return {key: str(max(1, round(n * steps / published_steps))) for key, n in counts.items() if n}


def arm_settings(arm: Arm, budget: Budget, data: str) -> dict[str, str]:
    """Every setting of a run but seed and file names; ValueError for one that the trainer does not have."""
    settings = read_preset(ROOT / f"configs/{arm.preset}.env") if arm.preset else {}
    own = pairs(arm.settings)
    settings |= {k: v for k, v in in_proportion(settings, arm.published_steps, budget.expected_steps).items() if k not in own}
    settings |= pairs(FULL) if budget.full else pairs(SMALL) | own
    settings |= budget.settings()
    folder = Path(f"{data}{settings.get('VOCAB_SIZE', Config.vocab_size)}").resolve()
    settings |= {"DATA_PATH": str(folder), "TOKENIZER_PATH": str(folder / "tokenizer.model")}
    if foreign := settings.keys() - {name.upper() for name in setting_kinds(Config)}:
        raise ValueError(f"not a setting of train_gpt.py: {', '.join(sorted(foreign))}")
    Config.from_env(settings)
    return settings


class Runner:
    """Runs arms, `jobs` at a time, and keeps their results."""

    def __init__(self, out: Path, jobs: int) -> None:
        self.out, self.jobs, self.file = out, jobs, out / "results.jsonl"
        (out / "logs").mkdir(parents=True, exist_ok=True)
        self.cores = itertools.cycle(sorted(os.sched_getaffinity(0)))

    def take_a_core(self) -> None:
        """Pins the calling thread, and so the processes that it starts; they get one thread each."""
        if self.jobs > 1:
            os.sched_setaffinity(0, {next(self.cores)})

    def run(self, arm: str, seed: int, settings: dict[str, str]) -> dict:
        """One run in a process of its own: {"arm", "seed", "settings", "result" or "error"}."""
        run_id = re.sub(r"[^A-Za-z0-9._-]+", "_", arm)[:70] + f"_seed{seed}"
        artifact = self.out.resolve() / f"{run_id}.ptz"
        own = {"RUN_ID": run_id, "SEED": str(seed), "ARTIFACT_PATH": str(artifact)}
        inherited = {k: v for k, v in os.environ.items() if k.lower() not in setting_kinds(Config)}
        env = inherited | ({"OMP_NUM_THREADS": "1"} if self.jobs > 1 else {}) | settings | own
        done = subprocess.run([sys.executable, str(ROOT / "train_gpt.py")], cwd=self.out, env=env, text=True, capture_output=True)
        artifact.unlink(missing_ok=True)
        record = {"arm": arm, "seed": seed, "settings": settings}
        if done.returncode:
            return record | {"error": (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]}
        return record | {"result": json.loads(done.stdout.rsplit("\nresult ", 1)[1])}

    def run_all(self, arms: dict[str, dict[str, str]], seeds: list[int]) -> list[dict]:
        """Every arm with every seed, what is in the results file already left out; returns the records of all."""
        known = {identity(r): r for r in read_results(self.file) if "result" in r}
        todo = [(arm, seed, settings) for seed in seeds for arm, settings in arms.items()
                if identity({"arm": arm, "seed": seed, "settings": settings}) not in known]  # fmt: skip
        records = [r for r in known.values() if r["seed"] in seeds and r["settings"] == arms.get(r["arm"])]
        with ThreadPoolExecutor(self.jobs, initializer=self.take_a_core) as pool:
            for number, record in enumerate(pool.map(lambda job: self.run(*job), todo), 1):
                with self.file.open("a") as f:
                    print(json.dumps(record), file=f)
                said = record.get("error") or "{val_bpb:.4f} bits per byte, {steps} steps".format(**record["result"])
                print(f"{number}/{len(todo)} {record['arm']} seed {record['seed']}: {said}", file=sys.stderr, flush=True)
                records.append(record)
        return in_order(records, list(arms))


def identity(record: dict) -> tuple:
    return record["arm"], record["seed"], json.dumps(record["settings"], sort_keys=True)


def read_results(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def in_order(records: list[dict], arms: list[str]) -> list[dict]:
    """The newest record of each run, arm by arm in the order of the table."""
    newest = {identity(r): r for r in records if r["arm"] in arms}
    return sorted(newest.values(), key=lambda r: (arms.index(r["arm"]), r["seed"]))


def spread(values: list[float]) -> str:
    """Mean, and half the range where there are several."""
    if None in values:
        return ""
    half = f" ± {(max(values) - min(values)) / 2:.4f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.4f}{half}"


COLUMNS = "arm | val bpb | against the first | round trip | sliding | steps | ms/step | params | artifact | zeros | seeds"


def row(arm: str, results: list[dict], first: list[dict]) -> str:
    """A line of the table: means over the seeds; the difference is that of the seeds which both have."""

    def values(key: str) -> list:
        return [r[key] for r in results]

    base = {r["seed"]: r["val_bpb"] for r in first}
    differences = [r["val_bpb"] - base[r["seed"]] for r in results if r["seed"] in base]
    gap = max(abs(r["roundtrip_val_bpb"] - r["val_bpb"]) for r in results)
    means = [f"{statistics.fmean(values(key)):.0f}" for key in ("steps", "ms_per_step", "params", "artifact_bytes")]
    zeros = f"{statistics.fmean(values('zero_frac')):.3f}"
    against = f"{statistics.fmean(differences):+.4f}" if differences else ""
    return f"| {arm} | {spread(values('val_bpb'))} | {against} | {gap:.2g} | {spread(values('sliding_val_bpb'))} | " + " | ".join(
        [*means, zeros, ", ".join(str(r["seed"]) for r in results)]) + " |"  # fmt: skip


def print_table(records: list[dict]) -> bool:
    """The Markdown table in the order of the arms; False if a run failed or a round trip was not exact."""
    arms = list(dict.fromkeys(r["arm"] for r in records))
    by_arm = {arm: sorted((r["result"] for r in records if r["arm"] == arm and "result" in r), key=lambda r: r["seed"]) for arm in arms}
    failed = [r for r in records if "error" in r]
    done = {arm: results for arm, results in by_arm.items() if results}
    print(f"| {COLUMNS} |\n|" + "---|" * (COLUMNS.count("|") + 1))
    for arm, results in done.items():
        print(row(arm, results, next(iter(done.values()))))
    for r in failed:
        print(f"| {r['arm']} (seed {r['seed']}) | {r['error']} |")
    codes = {result["code_sha256"] for results in done.values() for result in results}
    if len(codes) > 1:
        print(f"\n{len(codes)} versions of train_gpt.py: not one experiment", file=sys.stderr)
    exact = all(r["roundtrip_val_bpb"] == r["val_bpb"] for results in done.values() for r in results)
    return exact and not failed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("group", choices=GROUPS)
    parser.add_argument("--data", default=f"{ROOT}/data/corpus/sp", metavar="PREFIX")
    parser.add_argument("--out", type=Path, help="default: data/bench/<group>")
    parser.add_argument("--seconds", type=float, default=0, help="training time of each run")
    parser.add_argument("--steps", type=int, default=0, help="or its steps")
    parser.add_argument("--seeds", type=lambda text: [int(s) for s in text.split(",")], default=[42])
    parser.add_argument("--jobs", type=int, default=1, help="runs at once, each on a core of its own")
    parser.add_argument("--full", action="store_true", help="the presets at their own size, for a GPU")
    parser.add_argument("--only", nargs="+", metavar="ARM", help="these arms, the first of them as the base")
    parser.add_argument("--table", action="store_true", help="print the results that are there")
    args = parser.parse_args()
    arms, out = GROUPS[args.group](), args.out or ROOT / "data/bench" / args.group
    if args.table:
        return 0 if print_table(in_order(read_results(out / "results.jsonl"), list(arms))) else 1
    if bool(args.seconds) == bool(args.steps) or args.full and args.group == "switches":
        parser.error("expected either --seconds or --steps; --full with systems only")
    if unknown := set(args.only or ()) - arms.keys():
        parser.error(f"--only {' '.join(sorted(unknown))}: expected some of {', '.join(arms)}")
    budget = Budget(args.seconds, args.steps, args.full)
    chosen = {name: arm_settings(arms[name], budget, args.data) for name in args.only or arms}
    return 0 if print_table(Runner(out, args.jobs).run_all(chosen, args.seeds)) else 1


if __name__ == "__main__":
    sys.exit(main())
