"""The environment becomes a config, or one line that says what is wrong with it."""

from __future__ import annotations

import ast
import dataclasses

import pytest
from conftest import ROOT, TINY, tiny_config

from train_gpt import Config, UserError

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
    assert differ == {"embed_dim", "iterations", "matrix_optimizer", "train_log_every"}  # neomuon is muon's own name here


@pytest.mark.parametrize("typo", ["NUM_LAYER", "NUM_LAYERSS", "MATRX_LR", "SLIDING_EVAL_STRID", "TRIAN_SEQ_LEN", "VOCABSIZE"])
def test_a_misspelt_name_stops_the_run_and_names_the_setting(typo):
    with pytest.raises(UserError, match=f"{typo}='3'.*did you mean [A-Z_]+"):
        Config.from_env({typo: "3"})


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


@pytest.mark.parametrize(
    ("key", "text", "expected"),
    [
        ("NUM_LAYERS", "ten", "a whole number"),
        ("NUM_LAYERS", "0", "at least 1"),
        ("NUM_LAYERS", "2000", "at most 256"),
        ("MATRIX_LR", "fast", "a number"),
        ("MATRIX_LR", "nan", "a finite number"),
        ("MATRIX_LR", "-0.1", "0 or more"),
        ("SLIDING_EVAL", "yes", "0 or 1"),
        ("FP_STORAGE", "fp8", "one of FP8, FP16"),
        ("ACTIVATION", "geglu", "one of relu2"),
        ("SMEAR", "2", "0 or 1"),
        ("TIE_EMBEDDINGS", "3", "one of 0, 1, 2"),
        ("UNTIE_AT_FRACTION", "1.5", "[0, 1)"),
        ("MUON_MOMENTUM", "1", "[0, 1)"),
        ("WARMDOWN_FRACTION", "1.5", "[0, 1]"),
        ("VOCAB_SIZE", "70000", "at most 65536"),
        ("MODEL_DIM", "66", "a multiple of NUM_HEADS=4"),
        ("NUM_KV_HEADS", "3", "a divisor of NUM_HEADS=4"),
        ("BITNET_GROUP_SIZE", "48", "a divisor of MODEL_DIM=64"),
        ("TRAIN_BATCH_TOKENS", "100", "a multiple of TRAIN_SEQ_LEN=32"),
        ("SLIDING_EVAL_STRIDE", "33", "at most TRAIN_SEQ_LEN=32"),
        ("YARN_MAX_LEN", "16", "at least TRAIN_SEQ_LEN=32"),
        ("RUN_ID", "../../etc/x", "letters"),
        ("RUN_ID", "", "letters"),
    ],
)
def test_a_bad_value_names_the_variable_the_value_and_what_was_expected(key, text, expected):
    with pytest.raises(UserError) as error:
        Config.from_env(TINY | {key: text})
    message = str(error.value)
    assert key in message and expected in message and "\n" not in message
    assert text in message or key == "RUN_ID"


def test_booleans_and_the_environment_win_over_defaults():
    assert Config.from_env({"SLIDING_EVAL": "false", "TEMP_SCALING": "1"}).sliding_eval is False
    assert tiny_config(seed=3).seed == 3


def test_every_setting_is_read_somewhere():
    """#640 parsed settings that nothing read. A check alone does not count."""
    tree = ast.parse((ROOT / "train_gpt.py").read_text())
    checks = [f for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) and f.name.startswith("check_")]
    checked = {id(node) for f in checks for node in ast.walk(f)}
    attributes = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)]
    read = {node.attr for node in attributes if id(node) not in checked}
    unread = {f.name for f in dataclasses.fields(Config)} - read
    assert unread == {"recurrence_factor"}  # it must agree with two others, which are read


def test_environment_is_read_in_few_places_only():
    tree = ast.parse((ROOT / "train_gpt.py").read_text())
    users = set()
    for function in ast.walk(tree):
        if isinstance(function, ast.FunctionDef):
            for node in ast.walk(function):
                if isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv"):
                    users.add(function.name)
    assert users <= {"from_env", "speaks", "keep_compiled"}  # the last one names the caches of compiled kernels
