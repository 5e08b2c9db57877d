"""The presets are what they say, train, and come back exactly; the bench and the plot that set them side by side.

Each system is trained at the size of bench/systems.py, for a few steps on the synthetic data.
"""

from __future__ import annotations

import json
import re

import plot_logs
import pytest
import systems
import torch
from conftest import ROOT, launch
from sweep import read_preset

import train_gpt

PRESETS = sorted(path.stem for path in ROOT.glob("configs/*.env"))

# Published counts, in millions as their authors rounded them: (ternary or binary, all). Ours has a bias for each piece of the
# vocabulary, which only #640's line of systems has
PUBLISHED_MILLIONS = {
    "pr640": (64.88064, 67.394384), "pr920": (64.9, 67.96), "pr641": (97.3, 99.86), "pr139": (63.7, 64.5), "pr367": (67.2, 68),
    "pr126": (11.4688, 12.138272 + 0.001024), "pr126_60m": (58.7, 60), "pr435": (15.3, 15.7),
}  # fmt: skip


def config_of(preset: str, **settings: str) -> train_gpt.Config:
    return train_gpt.Config.from_env(read_preset(ROOT / f"configs/{preset}.env") | settings)


@pytest.mark.parametrize("preset", PRESETS)
def test_every_line_of_a_preset_differs_from_the_default_and_has_a_reason(preset):
    default, cfg, above = train_gpt.Config(run_id="x"), config_of(preset, RUN_ID="x"), ""
    for line in (ROOT / f"configs/{preset}.env").read_text().splitlines():
        if line and line[0] != "#":
            key = line.split("=")[0].lower()
            assert getattr(cfg, key) != getattr(default, key), line
            assert above, f"{line}: no comment above it, nor above the lines that it stands with"
        above = line


def test_presets_have_the_published_parameters():
    assert PUBLISHED_MILLIONS.keys() == {p for p in PRESETS if p.startswith("pr")}
    assert systems.SYSTEMS.keys() == {"default", *PRESETS} - {"demo", "demo_gpu"}
    for preset, published in PUBLISHED_MILLIONS.items():
        with torch.device("meta"):
            model = train_gpt.GPT(config_of(preset))
        total, quantized = train_gpt.count_parameters(model)
        for ours, theirs in zip((quantized, total), published, strict=True):
            digits = len(str(theirs).partition(".")[2]) if isinstance(theirs, float) else 0
            assert abs(ours / 1e6 - theirs) <= 0.5 * 10**-digits + 1e-9, (preset, ours, theirs)


def tiny_arm(name: str, data_dir, **settings: object) -> dict[str, str]:
    """A system's small size, for the synthetic data: 12 steps of 8 windows."""
    own = systems.arm_settings(systems.SYSTEMS[name], systems.Budget(0, 12, False), "data/sp")
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
    for name in systems.SYSTEMS:
        cfg = train_gpt.Config.from_env(tiny_arm(name, data_dir))
        val = train_gpt.ValidationSet.load(cfg, world)
        blob, run = train_gpt.train_and_export(cfg, world, train_gpt.Log(cfg, world), val)
        first_losses[name] = run["first_losses"]
        assert run["first_losses"][-1] < run["first_losses"][0] - 0.2, (name, run["first_losses"])
        model, loaded = train_gpt.load_artifact(blob)
        assert loaded.model_settings() == cfg.model_settings(), name
        assert train_gpt.evaluate(model, val, cfg, world, cfg.train_seq_len) == (run["val_loss"], run["val_bpb"]), name
    done = launch(tiny_arm("pr126_60m", data_dir), tmp_path, processes=2)
    assert done.returncode == 0, done.stderr
    two = json.loads(done.stdout.rsplit("\nresult ", 1)[1])
    assert two["world_size"] == 2 and two["roundtrip_val_bpb"] == two["val_bpb"]
    assert two["first_losses"] == pytest.approx(first_losses["pr126_60m"], abs=1e-3)


@pytest.mark.parametrize(("group", "full"), [("systems", False), ("systems", True), ("switches", False)])
def test_every_arm_of_the_bench_is_accepted(group, full):
    arms = systems.GROUPS[group]()
    settings = {name: systems.arm_settings(arm, systems.Budget(150, 0, full), "data/sp") for name, arm in arms.items()}
    assert len({json.dumps(s, sort_keys=True) for s in settings.values()}) == len(arms)
    with pytest.raises(ValueError, match="NUM_LAYER5"):
        systems.arm_settings(systems.Arm("NUM_LAYER5=3", ""), systems.Budget(150, 0, False), "data/sp")


def test_settings_in_steps_shrink_with_the_run():
    found = systems.in_proportion({"WARMDOWN_ITERS": "1200", "LR_WARMUP_STEPS": "50"}, 4713, 400)
    assert found == {"WARMDOWN_ITERS": "102", "LR_WARMUP_STEPS": "4", "MUON_MOMENTUM_WARMUP_STEPS": "42", "SEQ_WARMUP_STEPS": "170"}


def record(arm: str, seed: int, bpb: float, roundtrip: float | None = None) -> dict:
    result = {"seed": seed, "val_bpb": bpb, "roundtrip_val_bpb": roundtrip or bpb, "sliding_val_bpb": bpb - 0.1, "steps": 400,
              "ms_per_step": 300.4, "params": 1000, "artifact_bytes": 2000, "zero_frac": 0.3, "code_sha256": "c"}  # fmt: skip
    return {"arm": arm, "seed": seed, "settings": {"A": "1"}, "result": result}


def test_the_table_compares_the_same_seeds_and_tells_a_lossy_round_trip(capsys):
    records = [record("base", 7, 2.0), record("base", 42, 2.2), record("new", 42, 2.1)]
    assert systems.print_table(records)
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    assert rows[0][:3] == ["| base", "2.1000 ± 0.1000", "+0.0000"] and rows[1][:4] == ["| new", "2.1000", "-0.1000", "0"]
    assert not systems.print_table([*records, record("lossy", 7, 2.0, 2.0000001)])
    assert not systems.print_table([*records, {"arm": "bad", "seed": 7, "settings": {}, "error": "MODEL_DIM=7: expected more"}])
    assert "MODEL_DIM=7: expected more" in capsys.readouterr().out


def test_the_bench_goes_on_where_it_stopped(tmp_path, monkeypatch):
    ran = []
    monkeypatch.setattr(systems.Runner, "run", lambda _, arm, seed, settings: ran.append((arm, seed)) or record(arm, seed, 2.0) | {"settings": settings})
    arms = {"b": {"A": "1"}, "a": {"A": "2"}}
    first = systems.Runner(tmp_path, 2).run_all(arms, [7, 42])
    assert sorted(ran) == [("a", 7), ("a", 42), ("b", 7), ("b", 42)] and [r["arm"] for r in first] == ["b", "b", "a", "a"]
    assert systems.Runner(tmp_path, 2).run_all(arms, [7, 42]) == first and len(ran) == 4
    systems.Runner(tmp_path, 2).run_all(arms | {"a": {"A": "3"}}, [7])
    assert ran[4:] == [("a", 7)]


# -------------------------------------------------------------------------------------------------- the plot

LOG = """step:{self.n} loss: no number here
step:1/9 loss:8.0000 t:500ms avg:500.0ms
step:2/9 loss:6.0000 t:1000ms avg:500.0ms
step:3/9 loss:5.0000 t:1500ms avg:500.0ms
step:9/9 val_loss:4.0000 val_bpb:2.5000 train_time:4500ms zero_frac:0.333
"""


def test_a_curve_is_read_and_drawn(tmp_path):
    from matplotlib.figure import Figure

    for name, text in (("a_seed7", LOG), ("a_seed42", LOG.replace("2.5", "2.7")), ("b", LOG.replace("2.5", "1.5"))):
        (tmp_path / f"{name}.txt").write_text(text)
    curves = [plot_logs.read_curve(path) for path in sorted(tmp_path.iterdir())]
    assert curves[0] == ("a", [(1, 0.5, 8.0), (2, 1.0, 6.0), (3, 1.5, 5.0)], [(9, 4.5, 4.0, 2.7)])
    axes = Figure().subplots()
    plot_logs.draw(axes, curves, plot_logs.parse_arguments(["x", "--out", "y", "--smooth", "1"]))
    lines, dots = axes.get_lines()[::2], axes.get_lines()[1::2]
    assert [line.get_label() for line in lines if line.get_label()[0] != "_"] == ["b  1.500", "a  2.600"]  # the best first
    assert lines[0].get_xdata().tolist() == [0.5, 1.0, 1.5] and lines[0].get_ydata().tolist() == [8, 6, 5]
    assert {(dot.get_xdata()[0], dot.get_ydata()[0]) for dot in dots} == {(4.5, 4)}
    low, high = axes.get_ylim()
    assert low < 4 and high > 8


def test_smoothing_follows_the_steep_beginning():
    values = [8.0, 6.0, 5.0, 4.0, 3.0, 2.0, 2.0, 2.0, 1.0]
    assert plot_logs.running_mean(values, 2) == [8, 6, 5, 4, 3.5, 2.5, 2, 2, 1.5]


def test_the_picture_is_written_and_a_file_that_is_no_log_is_refused_in_one_line(tmp_path, capsys):
    log, other = tmp_path / "run_seed7.txt", tmp_path / "other.txt"
    log.write_text(LOG)
    other.write_text("nothing\n")
    assert plot_logs.main([str(log), "--out", str(tmp_path / "a.png"), "--value", "val_bpb", "--against", "steps"]) == 0
    assert re.match(rb"\x89PNG\r\n", (tmp_path / "a.png").read_bytes())
    assert plot_logs.main([str(log), str(other), "--out", str(tmp_path / "b.png")]) == 2
    assert capsys.readouterr().err.count("\n") == 1 and not (tmp_path / "b.png").exists()
