"""tools/inspect_artifact.py: its figures against the model's own, the bits of a text against the trainer's score, its refusals."""

from __future__ import annotations

import math
import os
import pty
import re
import shutil
import subprocess
import sys
from pathlib import Path

import inspect_artifact
import pytest
import torch
from conftest import ROOT, TEXT, fresh_model, tiny_config, tiny_model

import train_gpt


@pytest.fixture(scope="module")
def folder(tmp_path_factory, data_dir):
    """An artifact, another of other weights, one of other sizes, their tokenizer, a text."""
    folder = tmp_path_factory.mktemp("run")
    shutil.copy(data_dir / "tokenizer.model", folder)
    for name, model in (("a", tiny_model()), ("b", tiny_model(1)), ("wide", tiny_model(mlp_mult=3, resid_mix=0)), ("larger", tiny_model(vocab_size=321))):
        (folder / f"{name}.ptz").write_bytes(train_gpt.save_artifact(model, model.cfg))
    (folder / "text.txt").write_text(TEXT * 3)
    return folder


def inspect(folder, *arguments):
    """Exit code of inspect_artifact.py, started in the folder."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        return inspect_artifact.main([str(a) for a in arguments])
    except SystemExit as end:
        return end.code
    finally:
        os.chdir(before)


def cells(out, name):
    """The cells of the line that begins with this."""
    line = next(line for line in out.splitlines() if line.startswith(name + " "))
    return re.split(r"  +", line)


def test_figures_are_those_of_the_model_that_was_stored(folder, capsys):
    model, blob = tiny_model(), (folder / "a.ptz").read_bytes()
    assert inspect(folder, "a.ptz") == 0
    out = capsys.readouterr().out
    container = train_gpt.read_container(blob)
    assert out.startswith(f"a.ptz: {len(blob):,} bytes, version 2, codec {container.codec}, temperature 1.0000\n")
    assert "VOCAB_SIZE=320 NUM_LAYERS=3" in out and "ROPE_BASE" not in out
    for name, data in zip(train_gpt.STREAMS, container.streams, strict=True):
        assert cells(out, name)[1] == f"{len(data):,}"
    params, ternary = train_gpt.count_parameters(model)
    assert cells(out, "all")[1:5] == [f"{len(blob):,}", "100.0 %", f"{params:,}", f"{8 * len(blob) / params:.3f}"]
    assert cells(out, "trits")[3] == f"{ternary:,}"
    layer = model.blocks[1].mlp.down
    codes, scales = layer.ternarized()
    p = torch.stack([(codes == c).double().mean() for c in (-1, 0, 1)])
    name, shape, kind, count, zeros, entropy, scale = cells(out, "blocks.1.mlp.down.weight")
    assert (shape, kind, count) == ("64 x 128", "ternary", "8,192")
    assert zeros == f"{100 * p[1]:.1f} %" and entropy == f"{-(p * p.log2()).sum():.3f}" and float(scale) == pytest.approx(scales.median(), rel=0.06)
    histogram = [line.split() for line in out.partition("from this value on:\n")[2].splitlines()]
    everything = torch.cat([m.ternarized()[1].flatten() for m in model.modules() if isinstance(m, train_gpt.TernaryLinear)])
    assert sum(int(count.replace(",", "")) for _, count, _ in histogram) == len(everything)
    low = float(histogram[1][0])
    assert int(histogram[1][1].replace(",", "")) == int(((everything >= low * 0.999) & (everything < low * 2**0.5 * 0.999)).sum())


@pytest.mark.parametrize("settings", [{"weight_quant": "binary"}, {"weight_quant": "none"}, {"fp_storage": "FP4", "scale_storage": "bf16"},
                                      {"scale_group": "tensor", "tie_embeddings": 0}, {"resid_mix": 0, "mlp_groups": 2}])  # fmt: skip
def test_every_kind_of_artifact_is_shown(settings, tmp_path, capsys):
    """A fresh one too, whose output matrices are zeros without a scale to show."""
    for model in (tiny_model(**settings), fresh_model(tiny_config(**settings))):
        (tmp_path / "m.ptz").write_bytes(train_gpt.save_artifact(model, model.cfg))
        assert inspect(tmp_path, "m.ptz") == 0
        out = capsys.readouterr().out
        assert cells(out, "all")[3] == f"{train_gpt.count_parameters(model)[0]:,}" and ("from this value on" in out) != ("none" in settings.values())


@pytest.mark.parametrize("settings", [{}, {"attention_window": 8}])
def test_the_bits_of_a_text_are_those_that_the_trainer_scores(settings, folder, tmp_path, capsys):
    model = tiny_model(**settings)
    model.temperature.fill_(0.9)
    (tmp_path / "m.ptz").write_bytes(train_gpt.save_artifact(model, model.cfg))
    assert inspect(tmp_path, "m.ptz", "--text", folder / "text.txt", "--tokenizer", folder / "tokenizer.model") == 0
    out, err = capsys.readouterr()
    rows = [line.split("\t") for line in out.splitlines()]
    sp = train_gpt.load_tokenizer(str(folder / "tokenizer.model"))
    ids = [sp.bos_id(), *sp.encode(TEXT * 3)]
    assert [piece for _, piece in rows] == [sp.id_to_piece(i) for i in ids[1:]] and len(ids) > 100
    model, cfg = train_gpt.load_artifact((tmp_path / "m.ptz").read_bytes())
    val = train_gpt.ValidationSet(torch.tensor(ids), len((TEXT * 3).encode()))
    nats, bpb = train_gpt.evaluate(model, val, cfg, train_gpt.World(), cfg.score_stride if settings else cfg.train_seq_len // 4)
    assert sum(float(bits) for bits, _ in rows) / len(rows) == pytest.approx(nats / math.log(2), abs=2e-3)
    assert f"{bpb:.4f} a byte" in err and f"{len(ids) - 1} tokens of {val.num_bytes} bytes" in err
    first = train_gpt.token_nats(model.logits(model.hidden(torch.tensor([ids[:1]]))) / 0.9, torch.tensor([ids[1:2]]))[0] / math.log(2)
    assert float(rows[0][0]) == pytest.approx(first.item(), abs=2e-3)


def test_what_differs_is_shown(folder, capsys):
    assert inspect(folder, "--diff", "a.ptz", "a.ptz") == 0
    assert capsys.readouterr().out.startswith("a.ptz and a.ptz: the same ")
    assert inspect(folder, "--diff", "a.ptz", "b.ptz") == 0
    out = capsys.readouterr().out
    a, b = (train_gpt.load_artifact((folder / f"{name}.ptz").read_bytes())[0].blocks[0].mlp.up.weight for name in "ab")
    share = float((a.sign() != b.sign()).float().mean())
    assert cells(out, "blocks.0.mlp.up.weight")[1:] == [f"{100 * share:.1f} %", f"{float((a - b).norm() / a.norm()):.3f}"]
    assert out.splitlines()[1] == ""  # no setting differs
    assert inspect(folder, "--diff", "a.ptz", "wide.ptz") == 0
    out = capsys.readouterr().out
    assert cells(out, "MLP_MULT")[1:] == ["2", "3"] and cells(out, "RESID_MIX")[1:] == ["True", "False"]
    assert cells(out, "blocks.0.mlp.up.weight")[1] == "128 x 64 and 192 x 64" and cells(out, "vocab_bias")[2] != "-"
    sizes = [len((folder / f"{name}.ptz").read_bytes()) for name in ("a", "wide")]
    assert cells(out, "all")[1:] == [f"{sizes[0]:,}", f"{sizes[1]:,}", f"{sizes[1] - sizes[0]:+,}"]


@pytest.mark.parametrize("arguments, said", [
    (["none.ptz"], "none.ptz: No such file or directory"),
    (["text.txt"], "text.txt: not an artifact of train_gpt.py"),
    (["--diff", "a.ptz", "text.txt"], "text.txt: not an artifact of train_gpt.py"),
    (["a.ptz", "--text", "none.txt"], "--text none.txt: No such file or directory"),
    (["a.ptz", "--text", "."], "--text .: Is a directory"),
    (["a.ptz", "--text", "a.ptz"], "--text a.ptz: not UTF-8 (byte "),
    (["a.ptz", "--text", os.devnull], f"--text {os.devnull}: empty; expected text to score"),
    (["larger.ptz", "--text", "text.txt"], "tokenizer.model: 320 pieces, but larger.ptz has VOCAB_SIZE=321"),
    (["a.ptz", "--tokenizer", "tokenizer.model"], "--tokenizer belongs to --text"),
    (["--diff", "a.ptz", "b.ptz", "--text", "text.txt"], "--text to FILE"),
    (["a.ptz", "--diff", "a.ptz", "b.ptz"], "expected FILE, or --diff A B"),
    ([], "expected FILE, or --diff A B"),
])  # fmt: skip
def test_mistakes_are_one_line(arguments, said, folder, capsys):
    assert inspect(folder, *arguments) == 2
    out, err = capsys.readouterr()
    assert said in err and ": error: " in err and err.count("\n") == 1 and out == ""


@pytest.mark.slow
def test_a_terminal_shows_the_text_in_colours(folder, tmp_path):
    (tmp_path / "t.txt").write_text("the quick lazy \u4e2d dog")
    program = [sys.executable, str(ROOT / "tools/inspect_artifact.py"), str(folder / "a.ptz"), "--text", str(tmp_path / "t.txt")]
    ours, theirs = pty.openpty()
    env = {k: v for k, v in os.environ.items() if k != "NO_COLOR"} | {"OMP_NUM_THREADS": "1"}
    child = subprocess.Popen(program, stdout=theirs, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, env=env, text=True)
    err = child.communicate(timeout=120)[1]
    os.close(theirs)
    seen = os.read(ours, 100_000).decode().replace("\r", "")
    os.close(ours)
    assert child.returncode == 0 and "bits, " in err
    assert set(re.findall(r"\x1b\[[^m]*[a-zA-Z]", seen)) <= {"\x1b[0m"} | {f"\x1b[{where};5;{c}m" for where in (38, 48) for c in range(256)}
    text, legend = re.sub(r"\x1b\[[\d;]*m", "", seen).split("\nbits: ")
    assert text == "the quick lazy \u4e2d dog" and legend.strip().startswith("0..") and seen.count("\x1b[48;5;") > 12


def test_no_character_of_a_text_steers_the_terminal(monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    shown = inspect_artifact.coloured("a\x1b[2J\nb\r\x9b", 7)
    assert re.sub(r"\x1b\[[\d;]+m", "", shown) == "a\\x1b[2J\nb\\r\\x9b"
    assert shown.count("\x1b[0m") == 2  # no colour reaches over the end of a line
