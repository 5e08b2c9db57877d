"""The environment becomes a config, or one line that says what is wrong with it."""

from __future__ import annotations

import ast
import dataclasses
import itertools
import math
import sys
from typing import Literal, get_args, get_origin, get_type_hints

import pytest
from conftest import ROOT, TINY, launch, tiny_config

import train_gpt
from train_gpt import RULES, Config, Sources, UserError, help_text, run

README_640 = """
    DATA_PATH=./data/datasets/fineweb10B_sp8192 TOKENIZER_PATH=./data/tokenizers/fineweb_8192_bpe.model RUN_ID=ternary_run
    ATTN_PROJ_TYPE=standard LOGIT_HEAD_TYPE=standard TVERSKY_MEMBERSHIP=sigmoid TVERSKY_NUM_FEATURES=0 TVERSKY_FEATURE_POOLS=0
    VOCAB_SIZE=8192 BITNET_GROUP_SIZE=128 BIGRAM_HASH=0 EMBED_DIM=254 TRAINING_DEPTH_RECURRENCE=0 EVAL_DEPTH_RECURRENCE=0
    NUM_LAYERS=10 MODEL_DIM=768 NUM_KV_HEADS=4 NUM_HEADS=8 DIFF_ATTN=0 MLP_MULT=4 MLP_GROUPS=0 MATRIX_OPTIMIZER=muon ADAM_LR=0.05
    ADAM_WD=0.05 MUON_BACKEND_STEPS=3 MUON_MOMENTUM=0.95 MUON_MOMENTUM_WARMUP_START=0.85 MUON_MOMENTUM_WARMUP_STEPS=500 MUON_WD=0.0
    MATRIX_LR=0.04 SCALAR_LR=0.02 TIED_EMBED_LR=0.02 WARMDOWN_FRACTION=0.2 LOGIT_SOFTCAP=10 QK_GAIN_INIT=2.25 ROPE_TYPE=yarn
    YARN_MAX_LEN=2048 ROPE_BASE=5000 BATCH_TOKENS_START=0 BATCH_SCHEDULE_FRACTION=0.33 TRAIN_BATCH_TOKENS=524288 SEQ_LEN_START=0
    SEQ_SCHEDULE_FRACTION=0.0 TRAIN_SEQ_LEN=1024 SMEAR=0 ITERATIONS=10000 WARMUP_STEPS=5 MAX_WALLCLOCK_SECONDS=599 VAL_LOSS_EVERY=0
    TRAIN_LOG_EVERY=1000 CHURN_LOG_EVERY=0 VAL_MAX_TOKENS=0 TIE_EMBEDDINGS=1 UNTIE_AT_FRACTION=0.00 HEAD_LR=0.02 CORR_WEIGHT_LR=0.02
    ACTIVATION=relu2 SOFTCAP_TYPE=poly MTP_HEADS=0 REFINER=0 REFINER_KERNEL=3 SLIDING_EVAL=1 SLIDING_EVAL_STRIDE=16
    SLIDING_BATCH_SIZE=256 TEMP_SCALING=1 FP_STORAGE=FP8 SEED=42 COMPILE_MODE=default
"""  # the settings of #640's README command, all 68


def settings_640() -> dict[str, str]:
    return dict(pair.split("=", 1) for pair in README_640.split())


def test_the_published_command_is_read_as_it_stands():
    settings = settings_640()
    assert len(settings) == 68
    cfg = Config.from_env(settings | {"OMP_NUM_THREADS": "1"})
    for key, text in settings.items():
        value = getattr(cfg, key.lower())
        assert str(value) == text or float(text) == float(value), key


def test_defaults_are_the_published_model_but_for_what_the_readme_says():
    published, default = Config.from_env(settings_640()), Config(run_id="ternary_run")
    differ = {f.name for f in dataclasses.fields(Config) if getattr(published, f.name) != getattr(default, f.name)}
    assert differ == {"embed_dim", "fp_storage", "warmdown_fraction", "muon_wd", "iterations", "train_log_every",
                      "matrix_optimizer"}  # of which neomuon is muon's name here


@pytest.mark.parametrize("typo", ["NUM_LAYER", "NUM_LAYERSS", "MATRX_LR", "SLIDING_EVAL_STRID", "TRIAN_SEQ_LEN", "VOCABSIZE"])
def test_a_misspelt_name_stops_the_run_and_names_the_setting(typo):
    with pytest.raises(UserError, match=f"{typo}='3'.*did you mean [A-Z_]+"):
        Config.from_env({typo: "3"})


@pytest.mark.parametrize("name", """EVAL_STRIDE GRAD_CLIP MAX_WALLCLOCK LEARNING_RATE EVAL_SEQ_LEN MUON_LR WEIGHT_DECAY MAX_STEPS N_LAYER
    BLOCK_SIZE TTT_ENABLED LR_SCHEDULE""".split())  # fmt: skip
def test_a_name_of_another_script_is_refused_and_says_what_it_is_here(name):
    with pytest.raises(UserError, match=f"^{name}='8' is not a setting; (did you mean [A-Z_]+\\?|there is nothing like it here)$"):
        Config.from_env({name: "8"})


@pytest.mark.parametrize("name", ["BATCH_SIZE", "SEQ_LEN", "LR", "EPOCHS", "DROPOUT"])
def test_a_name_that_an_environment_may_hold_is_warned_of(name):
    cfg, said = Config.from_env({name: "8"}), Sources.from_env({name: "8"})
    assert dataclasses.asdict(cfg) == dataclasses.asdict(Config(run_id=cfg.run_id))
    warning = [line for line in said.lines(cfg) if line.startswith("warning: ")]
    assert len(warning) == 1 and f"{name} is not a setting" in warning[0] and ("did you mean" in warning[0] or "nothing like it" in warning[0])


def test_the_tables_of_foreign_names_lead_to_settings_and_hold_none():
    names = {f.name.upper() for f in dataclasses.fields(Config)}
    tables = train_gpt.FOREIGN | train_gpt.ORDINARY
    assert len(tables) == len(train_gpt.FOREIGN) + len(train_gpt.ORDINARY)
    assert set(tables.values()) <= names | {""} and not tables.keys() & names


def test_the_log_says_which_settings_differ_and_where_they_come_from():
    env = {"SEED": "7", "EMA": "1", "NUM_LAYERS": "3", "MODEL_DIM": "768", "PRESET_SETTINGS": "NUM_LAYERS MODEL_DIM MATRIX_LR", "MATRIX_LR": "0.04"}
    said = Sources.from_env(env)
    assert (said.user, said.preset) == ({"SEED", "EMA"}, {"NUM_LAYERS", "MODEL_DIM", "MATRIX_LR"})
    assert [*said.lines(Config.from_env(env))] == ["settings environment: SEED=7 EMA=1; preset: NUM_LAYERS=3"]
    taken = dataclasses.replace(Config.from_env(env), vocab_size=320)
    assert [*said.lines(taken)] == ["settings environment: SEED=7 EMA=1; preset: NUM_LAYERS=3; tokenizer: VOCAB_SIZE=320"]
    assert [*Sources.from_env({}).lines(Config())] == ["settings defaults"]


def test_nine_of_ten_slips_are_caught():
    """Every setting, every dropped, doubled and swapped letter: what is missed must stay rare."""
    missed = total = 0
    for name in (f.name.upper() for f in dataclasses.fields(Config)):
        slips = {name[:i] + name[i + 1 :] for i in range(len(name))} | {name[:i] + name[i] + name[i:] for i in range(len(name))}
        slips |= {name[:i] + name[i + 1] + name[i] + name[i + 2 :] for i in range(len(name) - 1)} - {name}
        for slip in slips:
            total += 1
            try:
                Config.from_env({slip: "1"})
                missed += 1
            except UserError:
                pass
    assert missed / total < 0.1


USUAL_NAMES = """PATH HOME LANG USER SHELL PWD TERM HOSTNAME RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE GROUP_RANK ROLE_RANK ROLE_NAME
    MASTER_ADDR MASTER_PORT TORCHELASTIC_RUN_ID TORCHELASTIC_MAX_RESTARTS OMP_NUM_THREADS MKL_NUM_THREADS CUDA_VISIBLE_DEVICES CUDA_HOME
    NCCL_DEBUG NCCL_SOCKET_IFNAME NCCL_IB_DISABLE LD_LIBRARY_PATH VIRTUAL_ENV CONDA_PREFIX CONDA_DEFAULT_ENV PYTHONPATH PYTHONUNBUFFERED
    SLURM_JOB_ID SLURM_NTASKS SLURM_NODELIST SLURM_PROCID HF_HOME HF_TOKEN HF_ENDPOINT WANDB_API_KEY WANDB_PROJECT RUNPOD_POD_ID
    RUNPOD_GPU_COUNT TRITON_CACHE_DIR TORCHINDUCTOR_CACHE_DIR TOKENIZERS_PARALLELISM BATCH_SIZE TMPDIR EDITOR DISPLAY SSH_AUTH_SOCK
    KUBERNETES_SERVICE_HOST DEBIAN_FRONTEND LC_ALL XDG_RUNTIME_DIR NVIDIA_VISIBLE_DEVICES GITHUB_TOKEN CI""".split()


def test_usual_environments_are_left_alone():
    Config.from_env(dict.fromkeys(USUAL_NAMES, "x"))


def fields(*kinds: type) -> list[dataclasses.Field]:
    hints = get_type_hints(Config)
    return [f for f in dataclasses.fields(Config) if (get_origin(hints[f.name]) or hints[f.name]) in kinds]


def refusal(env: dict[str, str]) -> str:
    """What the run says before it stops, or nothing."""
    try:
        Config.from_env(TINY | env)
    except UserError as error:
        assert "\n" not in str(error)
        return str(error)
    return ""


def beyond(limit: str, bound: float, direction: float = 1) -> float:
    """The nearest value that a limit refuses, or (direction -1) the last that it allows."""
    outwards = direction * (1 if limit in ("most", "below") else -1)
    if (limit in ("above", "below")) == (direction == 1):
        return bound
    return bound + outwards if isinstance(bound, int) else math.nextafter(bound, outwards * math.inf)


def test_every_number_has_limits_and_refuses_what_lies_outside():
    """Over all settings: each limit as it is declared, on both of its sides. The error names variable, value and every bound."""
    numbers = fields(int, float)
    assert [f.name for f in numbers if not f.metadata["limits"]] == ["refiner_kernel"]  # it has a range with REFINER=1: a rule
    for f in numbers:
        name, limits, kind = f.name.upper(), f.metadata["limits"], type(f.default)
        for limit, bound in limits.items():
            value = beyond(limit, kind(bound))
            message = refusal({name: str(value)})
            assert message.startswith(f"{name}={value!r}: expected "), (name, message)
            assert all(str(other) in message for other in limits.values()), message
            for inside in (f.default, beyond(limit, kind(bound), -1)):  # another rule may refuse it
                assert refusal({name: str(inside)}) != message.replace(repr(value), repr(inside))


def test_every_setting_of_choices_takes_these_alone():
    for f in fields(Literal):
        name, choices = f.name.upper(), get_args(get_type_hints(Config)[f.name])
        assert f.default in choices
        for choice in choices:
            assert f"{name}={str(choice)!r}" not in refusal({name: str(choice)})
        assert refusal({name: "other"}) == f"{name}='other': expected one of {', '.join(map(str, choices))}"
    assert refusal({"FP_STORAGE": "fp8"}).startswith("FP_STORAGE='fp8': expected one of FP8, FP16")
    for f, text in itertools.product(fields(bool), ("2", "yes", "")):
        assert refusal({f.name.upper(): text}) == f"{f.name.upper()}={text!r}: expected 0 or 1"
    for f in fields(int):
        assert refusal({f.name.upper(): "1.5"}) == f"{f.name.upper()}='1.5': expected a whole number"
    for f in fields(float):
        assert refusal({f.name.upper(): "fast"}) == f"{f.name.upper()}='fast': expected a number"
        for text in ("nan", "inf"):
            assert refusal({f.name.upper(): text}) == f"{f.name.upper()}={text!r}: expected a finite number"


RANGES = [("NUM_LAYERS", "0", "1 to 256"), ("ITERATIONS", "0", "at least 1"), ("MATRIX_LR", "-0.1", "0 or more"), ("MUON_MOMENTUM", "1", "0 or more, below 1"),
          ("LOGIT_SOFTCAP", "0", "above 0"), ("SEQ_RAMP_FRAC", "0", "above 0, at most 1"), ("SEED", str(2**64), "0 to 9223372036854775807")]  # fmt: skip


@pytest.mark.parametrize(("name", "text", "words"), RANGES)
def test_ranges_in_words(name, text, words):
    assert refusal({name: text}).endswith(f": expected {words}")


# A case for each rule between settings, in the order of RULES: what breaks it, and the error.
BROKEN = [
    ({"run_id": "../../etc/x"}, "RUN_ID='../../etc/x': expected 1 to 80 of A-Z"),
    ({"run_id": ""}, "RUN_ID='': expected 1 to 80 of A-Z"),
    ({"model_dim": 66}, "MODEL_DIM=66: expected a multiple of NUM_HEADS=4"),
    ({"model_dim": 60}, "MODEL_DIM=60: expected an even multiple of NUM_HEADS=4"),
    ({"num_kv_heads": 3}, "NUM_KV_HEADS=3: expected a divisor of NUM_HEADS=4"),
    ({"bitnet_group_size": 48}, "BITNET_GROUP_SIZE=48: expected a divisor of MODEL_DIM=64"),
    ({"mlp_hidden": 100}, "BITNET_GROUP_SIZE=32: expected a divisor of MODEL_DIM=64 and of the MLP's width"),
    ({"train_batch_tokens": 100}, "TRAIN_BATCH_TOKENS=100: expected a multiple of TRAIN_SEQ_LEN=32"),
    ({"sliding_eval_stride": 33}, "SLIDING_EVAL_STRIDE=33: expected at most TRAIN_SEQ_LEN=32"),
    ({"yarn_max_len": 16}, "YARN_MAX_LEN=16: expected at least TRAIN_SEQ_LEN=32"),
    ({"kernels": "qkv"}, "KERNELS='qkv': expected auto, off or some of matmul,norm,qk,attention,mlp,loss,score"),
    ({"checkpoint_every": "10m"}, "CHECKPOINT_EVERY='10m': expected steps, or seconds as 600s"),
    ({"track": "wandb,mlflow"}, "TRACK='wandb,mlflow': expected some of tensorboard,wandb,trackio"),
    ({"ternary_phase": ".4,.2"}, "TERNARY_PHASE='.4,.2': expected 0, or start,end as .2,.3"),
    ({"ternary_phase": ".2,.4", "weight_quant": "none"}, "TERNARY_PHASE='.2,.4': expected 0 with WEIGHT_QUANT=none or ACT_QUANT=fp8"),
    ({"embed_init": "bigram", "tie_embeddings": 0}, "EMBED_INIT='bigram': expected random without a factored, tied table of its own"),
    ({"mlp_hidden": 102, "scale_group": "row"}, "MLP_HIDDEN=102: expected a multiple of 4"),
    ({"recurrence_factor": 2}, "RECURRENCE_FACTOR=2: expected 1 with NUM_UNIQUE_LAYERS=0"),
    ({"num_unique_layers": 2, "recurrence_factor": 3}, "NUM_LAYERS=3: expected NUM_UNIQUE_LAYERS=2 x RECURRENCE_FACTOR=3"),
    ({"num_unique_layers": 3, "attention_free_layers": 1}, "NUM_UNIQUE_LAYERS=3: expected 0 with ATTENTION_FREE_LAYERS=1"),
    ({"attention_free_layers": 3}, "ATTENTION_FREE_LAYERS=3: expected fewer than NUM_LAYERS=3"),
    ({"attention_window": 32}, "ATTENTION_WINDOW=32: expected 0, or a divisor of TRAIN_SEQ_LEN=32 below it"),
    ({"attention_window": 12}, "ATTENTION_WINDOW=12: expected 0, or a divisor of TRAIN_SEQ_LEN=32"),
    ({"position": "radial", "attention_window": 8}, "POSITION='radial': expected not radial with ATTENTION_WINDOW=8"),
    ({"xsa_last_n": 4}, "XSA_LAST_N=4: expected at most the number of blocks"),
    ({"diff_attn": 1, "xsa_last_n": 1}, "XSA_LAST_N=1: expected 0 with DIFF_ATTN=True"),
    ({"ntk_rope": 1, "rope_type": "rope", "position": "none"}, "NTK_ROPE=True: expected 0, or POSITION=rope"),
    ({"ntk_rope": 1}, "NTK_ROPE=True: expected 0, or ROPE_TYPE=rope"),
    ({"ntk_rope": 1, "rope_type": "rope", "num_heads": 32}, "NTK_ROPE=True: expected 0 with a head of 2 channels"),
    ({"refiner": 1, "refiner_kernel": 1}, "REFINER_KERNEL=1: expected 2 to 64 with REFINER=1"),
    ({"mlp_groups": 3}, "MLP_GROUPS=3: expected a number of MLPs that leaves each whole groups of BITNET_GROUP_SIZE=32"),
    ({"mlp_groups": 4}, "MLP_GROUPS=4: expected"),  # 64 / 4 channels are no multiple of 32 weights a scale
    ({"weight_quant": "none", "ternary_commit_lambda": 0.1}, "TERNARY_COMMIT_LAMBDA=0.1: expected 0 with WEIGHT_QUANT=none"),
    ({"weight_quant": "none", "attn_proj_type": "tversky"}, "WEIGHT_QUANT='none': expected not none with Tversky"),
    ({"weight_quant": "binary", "scale_stat": "lstsq"}, "WEIGHT_QUANT='binary': expected not binary with SCALE_STAT=lstsq"),
    ({"weight_quant": "binary", "ternary_threshold": 0.7}, "WEIGHT_QUANT='binary': expected not binary with SCALE_STAT=absmean and TERNARY_THRESHOLD=0.7"),
    ({"tie_embeddings": 0, "untie_at_fraction": 0.5}, "UNTIE_AT_FRACTION=0.5: expected 0 without tied embeddings"),
    ({"untie_at_fraction": 0.5, "warmup_steps": 2, "ema": 1, "ema_start_fraction": 0.4}, "EMA_START_FRACTION=0.4: expected at least UNTIE_AT_FRACTION=0.5"),
    ({"untie_at_fraction": 0.5}, "WARMUP_STEPS=1: expected not 1 with UNTIE_AT_FRACTION=0.5"),
    ({"tie_embeddings": 2, "logit_head_type": "tversky"}, "TIE_EMBEDDINGS=2: expected 0 or 1 with LOGIT_HEAD_TYPE=tversky"),
    ({"mtp_heads": 8, "seq_len_start": 8, "seq_schedule_fraction": 0.5}, "MTP_HEADS=8: expected fewer than the tokens of the shortest"),
    ({"tversky_feature_pools": 4, "tversky_num_features": 8}, "TVERSKY_FEATURE_POOLS=4: expected at most the number of blocks"),
    ({"tversky_feature_pools": 2}, "TVERSKY_FEATURE_POOLS=2: expected 0 with TVERSKY_NUM_FEATURES=0"),
    ({"act_quant": "fp8", "input_norm": "none"}, "ACT_QUANT='fp8': expected not fp8 without codes and normalized inputs"),
    ({"act_quant": "fp8", "scale_storage": "fp16"}, "SCALE_STORAGE='fp16': expected e4m3 with ACT_QUANT=fp8"),
    ({"act_quant": "fp8", "precision": "fp16"}, "PRECISION='fp16': expected not fp16 with ACT_QUANT=fp8"),
    ({"act_quant": "fp8", "mlp_groups": 2}, "MLP_GROUPS=2: expected 0 with ACT_QUANT=fp8"),
    ({"act_quant": "fp8", "model_dim": 72, "bitnet_group_size": 8}, "MODEL_DIM=72: expected a multiple of 16 with ACT_QUANT=fp8"),
    ({"act_quant": "fp8", "num_heads": 8, "num_kv_heads": 1, "qkv_split": 1}, "NUM_KV_HEADS=1: expected projections of a multiple of 16 rows"),
    ({"artifact_codec": "2bit_zstd"}, "ARTIFACT_CODEC='2bit_zstd': expected the package zstandard"),
    ({"seq_len_start": 64, "seq_schedule_fraction": 0.3}, "SEQ_LEN_START=64: expected at most TRAIN_SEQ_LEN=32"),
    ({"seq_len_start": 20, "seq_schedule_fraction": 0.3}, "SEQ_LEN_START=20: expected a divisor of TRAIN_SEQ_LEN=32"),
    ({"seq_len_start": 16}, "SEQ_SCHEDULE_FRACTION=0.0: expected above 0 with SEQ_LEN_START=16"),
    ({"seq_len_start": 16, "seq_schedule_fraction": 0.3, "seq_ramp_start": 8}, "SEQ_RAMP_START=8: expected 0 beside SEQ_LEN_START=16"),
    ({"seq_ramp_start": 12}, "SEQ_RAMP_START=12: expected TRAIN_SEQ_LEN=32 divided by a power of two"),
    ({"seq_len_start": 16, "seq_schedule_fraction": 0.3, "seq_warmup_start": 8}, "SEQ_WARMUP_START=8: expected 0 beside SEQ_LEN_START=16"),
    ({"seq_ramp_start": 8, "seq_warmup_start": 8}, "SEQ_WARMUP_START=8: expected 0 beside SEQ_RAMP_START=8"),
    ({"seq_warmup_start": 12}, "SEQ_WARMUP_START=12: expected TRAIN_SEQ_LEN=32 divided by a power of two"),
    ({"batch_tokens_start": 512}, "BATCH_TOKENS_START=512: expected at most TRAIN_BATCH_TOKENS=256"),
    ({"batch_tokens_start": 64, "batch_schedule_fraction": 0}, "BATCH_SCHEDULE_FRACTION=0.0: expected above 0 with BATCH_TOKENS_START=64"),
    ({"batch_tokens_start": 100}, "BATCH_TOKENS_START=100: expected a multiple of TRAIN_SEQ_LEN=32"),
    ({"batch_tokens_start": 64, "batch_ramp_start": 64}, "BATCH_RAMP_START=64: expected 0 beside BATCH_TOKENS_START=64"),
    ({"batch_ramp_start": 96}, "BATCH_RAMP_START=96: expected TRAIN_BATCH_TOKENS=256 divided by a power of two"),
    ({"batch_ramp_start": 16}, "BATCH_RAMP_START=16: expected a multiple of TRAIN_SEQ_LEN=32"),
]


def first_broken(settings: dict[str, object]) -> tuple[str, str] | None:
    """(setting, what was expected) of the first rule that is not kept, found without the constructor's checks."""
    cfg, plain = object.__new__(Config), tiny_config()
    hints = get_type_hints(Config)
    for f in dataclasses.fields(Config):
        value = settings.get(f.name, getattr(plain, f.name))
        object.__setattr__(cfg, f.name, bool(value) if hints[f.name] is bool else value)
    return next(((name, expected) for name, kept, expected in RULES if not kept(cfg)), None)


def test_what_makes_no_sense_is_one_clear_error_for_every_rule(monkeypatch):
    monkeypatch.setitem(sys.modules, "zstandard", None)  # as where it is not installed
    found = []
    for settings, message in BROKEN:
        assert refusal({name.upper(): str(value) for name, value in settings.items()}).startswith(message), settings
        found.append(first_broken(settings))
    assert [*dict.fromkeys(found)] == [(name, expected) for name, _, expected in RULES]


def test_booleans_and_the_environment_win_over_defaults():
    assert Config.from_env({"SLIDING_EVAL": "false", "TEMP_SCALING": "1"}).sliding_eval is False
    assert tiny_config(seed=3).seed == 3


def test_help_lists_every_setting_in_its_group_with_default_range_and_meaning():
    lines = help_text().splitlines()
    assert [f.name.upper() for f in dataclasses.fields(Config)] == [line.split("=")[0].strip() for line in lines if line.startswith("  ")]
    group = None
    for f in dataclasses.fields(Config):
        group = f.metadata["group"] or group
        line = next(line for line in lines if line.startswith(f"  {f.name.upper()}="))
        assert group in lines[: lines.index(line)] and f.metadata["meaning"]
        default, _, rest = line.strip().removeprefix(f"{f.name.upper()}=").partition("  ")
        assert rest.startswith(f.metadata["meaning"]) and rest.endswith("]")
        assert f.default is dataclasses.MISSING or getattr(Config.from_env({f.name.upper(): default}), f.name) == f.default
        allowed, choices = rest.rpartition("[")[2][:-1], get_args(get_type_hints(Config)[f.name])
        if choices:
            assert allowed.split() == [*map(str, choices)]
        assert allowed and all(str(bound) in allowed for bound in f.metadata["limits"].values())
    assert len({f.metadata["group"] for f in dataclasses.fields(Config)}) > 8 and max(map(len, lines)) < 160


def test_help_needs_neither_data_nor_gpu_nor_settings_that_make_sense(tmp_path, capsys):
    done = launch({"NUM_LAYERS": "ten", "CUDA_VISIBLE_DEVICES": ""}, tmp_path, argv=[str(ROOT / "train_gpt.py"), "--help"])
    assert (done.returncode, done.stdout, done.stderr) == (0, help_text() + "\n", "") and not [*tmp_path.iterdir()]
    assert run(["-h"]) == 0 and capsys.readouterr().out == done.stdout


def test_another_argument_is_an_error_of_one_line(capsys):
    for arguments in (["--foo"], ["train"], ["NUM_LAYERS=3"], ["--help", "--foo"]):
        assert run(arguments) == 2
        out, err = capsys.readouterr()
        assert not out and err.count("\n") == 1 and err.startswith(f"train_gpt.py: {arguments[0]!r}: expected ")


def test_every_setting_is_read_somewhere():
    """#640 parsed settings that nothing read. A rule alone does not count, nor a property that rules alone read."""
    tree = ast.parse((ROOT / "train_gpt.py").read_text())
    names = lambda node: {n.id for n in ast.walk(node) if isinstance(n, ast.Name)} | {getattr(node, "name", "")}
    rules = [node for node in tree.body if names(node) & {"RULES", "start_rules"} and not isinstance(node, ast.ClassDef)]
    rules += [node for node in tree.body if isinstance(node, ast.Assign) and isinstance(node.value, ast.Lambda)]  # words of the rules
    properties = {f.name: f for node in tree.body if isinstance(node, ast.ClassDef) and "Settings" in node.name for f in node.body
                  if isinstance(f, ast.FunctionDef) and f.decorator_list and not f.name.startswith("from_")}  # fmt: skip

    def reads(nodes, without):
        skipped = {id(n) for node in without for n in ast.walk(node)}
        found = [n for node in nodes for n in ast.walk(node) if id(n) not in skipped]
        attributes = {n.attr for n in found if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Load)}
        roles = {n.args[0].value for n in found if isinstance(n, ast.Call) and getattr(n.func, "id", "") == "Role" and isinstance(n.args[0], ast.Constant)}
        return attributes | roles

    read = reads([tree], [*rules, *properties.values()])
    read |= reads([f for name, f in properties.items() if name in read], [])
    assert {f.name for f in dataclasses.fields(Config)} - read == {"recurrence_factor"}  # it must agree with two others, which are read
