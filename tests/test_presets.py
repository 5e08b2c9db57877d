"""The presets are what they say, train, and come back exactly: each system at the small size of bench/arms.py, for a few steps on
the synthetic data.
"""

from __future__ import annotations

import json

import arms
import pytest
import torch
from conftest import ROOT, launch

import train_gpt

PRESETS = sorted(path.stem for path in ROOT.glob("configs/*.env"))

# Published counts, in millions as their authors rounded them: (ternary or binary, all). Ours has a bias for each piece of the
# vocabulary, which only #640's line of systems has
PUBLISHED_MILLIONS = {
    "pr640": (64.88064, 67.394384), "pr920": (64.9, 67.96), "pr641": (97.3, 99.86), "pr139": (63.7, 64.5), "pr367": (67.2, 68),
    "pr126": (11.4688, 12.138272 + 0.001024), "pr126_60m": (58.7, 60), "pr435": (15.3, 15.7),
}  # fmt: skip


def config_of(preset: str, **settings: str) -> train_gpt.Config:
    return train_gpt.Config.from_env(arms.read_preset(ROOT / f"configs/{preset}.env") | settings)


@pytest.mark.parametrize("preset", PRESETS)
def test_every_line_of_a_preset_differs_from_the_default_and_has_a_reason(preset):
    default, cfg, above = train_gpt.Config(run_id="x"), config_of(preset, RUN_ID="x"), ""
    for line in (ROOT / f"configs/{preset}.env").read_text().splitlines():
        if line and line[0] != "#":
            key = line.split("=")[0].lower()
            assert getattr(cfg, key) != getattr(default, key), line
            assert above, f"{line}: no comment above it, nor above the lines that it stands with"
        above = line


def test_presets_mean_what_they_did_before_the_defaults_changed():
    """tests/data/presets.json: every setting of the defaults and of each preset when the defaults were #640's recipe."""
    kept = json.loads((ROOT / "tests/data/presets.json").read_text())
    assert kept.keys() == {"default", *PRESETS}
    changed = {"EMBED_DIM", "FP_STORAGE", "WARMDOWN_FRACTION", "MUON_WD", "SMEAR_GATE", "KEY_OFFSET"}
    for preset in kept.keys() - {"default"}:
        cfg = config_of(preset)
        unused = {"WARMDOWN_FRACTION"} if cfg.warmdown_iters else set()
        for name, text in (kept["default"] | kept[preset]).items():
            assert name in unused or str(getattr(cfg, name.lower())) == text, (preset, name)
    default = train_gpt.Config()
    assert {name for name, text in kept["default"].items() if str(getattr(default, name.lower())) != text} == changed


def test_presets_have_the_published_parameters():
    assert PUBLISHED_MILLIONS.keys() == {p for p in PRESETS if p.startswith("pr")}
    assert arms.SYSTEMS.keys() == {"default", *PRESETS} - {"demo", "demo_gpu"}
    for preset, published in PUBLISHED_MILLIONS.items():
        with torch.device("meta"):
            model = train_gpt.GPT(config_of(preset))
        total, quantized = train_gpt.count_parameters(model)
        for ours, theirs in zip((quantized, total), published, strict=True):
            digits = len(str(theirs).partition(".")[2]) if isinstance(theirs, float) else 0
            assert abs(ours / 1e6 - theirs) <= 0.5 * 10**-digits + 1e-9, (preset, ours, theirs)


def tiny_arm(name: str, data_dir, **settings: object) -> dict[str, str]:
    """A system's small size, for the synthetic data: 6 steps of 8 windows."""
    own = arms.arm_settings(arms.SYSTEMS[name], arms.Plan(arms.pairs(arms.SMALL), steps=6), train_gpt.Config)
    length = int(own["TRAIN_SEQ_LEN"]) // 8  # #139's context stays twice the others'
    start = {"SEQ_WARMUP_START": "8"} if "SEQ_WARMUP_START" in own else {}
    tiny = {"VOCAB_SIZE": "320", "TRAIN_SEQ_LEN": str(length), "YARN_MAX_LEN": "64", "TRAIN_BATCH_TOKENS": str(8 * length),
            "MICRO_BATCH_TOKENS": str(4 * length), "VAL_MAX_TOKENS": "700", "SLIDING_EVAL_STRIDE": "16", "RUN_ID": name, "WARMUP_STEPS": "0",
            "TOKENIZER_PATH": str(data_dir / "tokenizer.model"), "DATA_PATH": str(data_dir), "ARTIFACT_PATH": f"{name}.ptz"}  # fmt: skip
    return own | tiny | start | {k.upper(): str(v) for k, v in settings.items()}


def test_every_system_learns_and_comes_back_exactly(data_dir, tmp_path, monkeypatch):
    """On one process each; then one of them on two: #126's follow-up, which has recurrence, the sequence warm-up, the commitment
    loss, 8-bit activations and checkpointing at once. One test, since two would run on two workers and train everything twice."""
    monkeypatch.chdir(tmp_path)
    world, first_losses = train_gpt.World(), {}
    for name in arms.SYSTEMS:
        cfg = train_gpt.Config.from_env(tiny_arm(name, data_dir))
        val = train_gpt.ValidationSet.load(cfg, world)
        machine, log = train_gpt.Machine(), train_gpt.Log(cfg, world)
        blob, run = train_gpt.train_and_export(machine.check(cfg, world, log), world, machine, log, val)
        first_losses[name] = run["first_losses"]
        assert run["first_losses"][-1] < run["first_losses"][0] - 1, (name, run["first_losses"])
        model, loaded = train_gpt.load_artifact(blob)
        assert loaded.model_settings() == cfg.model_settings(), name
        assert train_gpt.evaluate(model.use(machine.ops), val, cfg, world) == (run["val_loss"], run["val_bpb"]), name
    done = launch(tiny_arm("pr126_60m", data_dir), tmp_path, processes=2)
    assert done.returncode == 0, done.stderr
    two = json.loads(done.stdout.rsplit("\nresult ", 1)[1])
    assert two["world_size"] == 2 and two["roundtrip_val_bpb"] == two["val_bpb"]
    assert two["first_losses"] == pytest.approx(first_losses["pr126_60m"], abs=1e-3)
