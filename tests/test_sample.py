"""tools/sample.py: the same logits as the full forward pass, what is drawn from them, and the program as its users start it."""

from __future__ import annotations

import hashlib
import json
import os
import pty
import shutil
import subprocess
import sys
from pathlib import Path

import arms
import pytest
import sample
import speak
import torch
from conftest import ROOT, TINY, tiny_model, tokens
from test_presets import PRESETS, tiny_arm
from test_scripts import CONFIG, RESULT, RESULT_LINE, run_demo, tree  # noqa: F401

import train_gpt

# What looks at other positions in ways of its own, or changes in which order blocks run
SWITCHES = [
    "BIGRAM_HASH=1", "SMEAR_GATE=0", "BIGRAM_HASH=1 SMEAR_GATE=0", "EMBED_DIM=8", "SMEAR=1", "REFINER=1", "REFINER=1 SMEAR=1 REFINER_KERNEL=7", "KEY_OFFSET=0", "DIFF_ATTN=1", "DIFF_ATTN=1 ATTENTION_WINDOW=8",
    "ATTENTION_WINDOW=8 XSA_LAST_N=2", "XSA_LAST_N=3", "POSITION=radial RADIAL_BITS=5", "POSITION=none", "UNET=0", "RESID_MIX=0",
    "NUM_LAYERS=6 NUM_UNIQUE_LAYERS=2 RECURRENCE_FACTOR=3 SMEAR=1", "TRAINING_DEPTH_RECURRENCE=2", "EVAL_DEPTH_RECURRENCE=3",
    "TIE_EMBEDDINGS=0", "TIE_EMBEDDINGS=2", "UNTIE_AT_FRACTION=.5 WARMUP_STEPS=2", "MTP_HEADS=2", "MLP_GROUPS=2", "PARALLEL_BLOCKS=1",
    "ATTENTION_FREE_LAYERS=1", "ATTN_PROJ_TYPE=tversky TVERSKY_NUM_FEATURES=8 TVERSKY_FEATURE_POOLS=1", "ACTIVATION=swiglu",
    "LOGIT_HEAD_TYPE=tversky TVERSKY_NUM_FEATURES=8", "ACT_QUANT=int8", "ACT_QUANT=fp8", "WEIGHT_QUANT=none", "WEIGHT_QUANT=binary",
    "INPUT_NORM=all", "ROPE_TYPE=rope NTK_ROPE=1", "QKV_SPLIT=1",
]  # fmt: skip
SMALL = """VOCAB_SIZE=320 NUM_LAYERS=2 MODEL_DIM=96 NUM_HEADS=3 NUM_KV_HEADS=1 EMBED_DIM=24 BITNET_GROUP_SIZE=32 TRAIN_SEQ_LEN=32
    TRAIN_BATCH_TOKENS=64 SLIDING_EVAL_STRIDE=16"""


def preset_settings(name):
    """A preset at a small size: 320 pieces, windows of 32 or 64 tokens."""
    if name in arms.SYSTEMS:
        return tiny_arm(name, Path("nowhere"))
    return arms.read_preset(ROOT / f"configs/{name}.env") | arms.pairs(SMALL)


def drawn_model(settings):
    """A model with every parameter away from its initial value."""
    torch.manual_seed(0)
    cfg = train_gpt.Config.from_env(settings | {"ARTIFACT_CODEC": "int8"})
    model = train_gpt.GPT(cfg)
    with torch.no_grad():
        for _, _, p, role in train_gpt.parameter_owners(model):
            p.add_(torch.randn_like(p) * (0.1 if role.storage == "control" else 0.03))
    return model


def stored_model(settings):
    """The same as its artifact holds it."""
    model = drawn_model(settings)
    return train_gpt.load_artifact(train_gpt.save_artifact(model, model.cfg), "fp32")[0]


CASES = {name: preset_settings(name) for name in sorted({"default", *PRESETS})} | {text: TINY | arms.pairs(text) for text in SWITCHES}


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_the_cache_gives_the_logits_of_the_full_forward_pass(case):
    """Up to a whole window, in pieces of several lengths and one by one."""
    model = stored_model(CASES[case])
    window = model.cfg.train_seq_len if not model.cfg.attention_window else 5 * model.cfg.attention_window
    ids = tokens(model, 1, window)[0].tolist()
    with train_gpt.rounded_once(model):
        expected = model.logits(model.hidden(torch.tensor([ids])))[0]
        context = sample.Context(model)
        assert context.cached
        pieces = [ids[:5], ids[5:8], *([i] for i in ids[8:14]), ids[14:16], [ids[16]], ids[17:-4], *([i] for i in ids[-4:])]
        found = torch.cat([context.feed(piece, len(piece)) for piece in pieces])
    # a rounding of an activation to 8 bits may fall otherwise, by a level
    within = 1e-4 if model.cfg.act_quant == "none" else 0.05
    assert (found - expected).norm() < within * expected.norm()
    if model.cfg.act_quant == "none":
        assert (found - expected).abs().max() < 1e-3 and expected.std() > 0.02


@torch.no_grad()
def test_a_full_window_goes_on_from_its_second_half():
    model = stored_model(TINY)
    ids, window = tokens(model, 1, 80)[0].tolist(), model.cfg.train_seq_len
    reference = lambda part: model.logits(model.hidden(torch.tensor([part])))[0, -1]
    expected = [reference(ids[:window]), reference(ids[window + 1 - window // 2 : window + 1]), reference(ids[80 - window :])]
    context = sample.Context(model)
    found = [context.feed(ids[:window])[-1], context.feed([ids[window]])[-1]]
    context.restart()
    found.append(context.feed(ids)[-1])  # a text that is longer than the window
    torch.testing.assert_close(torch.stack(found), torch.stack(expected), atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_a_model_that_no_cache_serves_is_computed_without_one():
    """One whose MLPs see the mean of all positions: nobody has taught the cache that."""
    model = stored_model(TINY)
    mlp = model.blocks[1].mlp
    mlp.forward = lambda x: type(mlp).forward(mlp, x) + x.cumsum(1)
    ids = tokens(model, 1, 20)[0].tolist()
    expected = model.logits(model.hidden(torch.tensor([ids])))[0, -1]
    context = sample.Context(model)
    context.feed(ids[:9])
    for token in ids[9:]:
        found = context.feed([token])[-1]
    assert not context.cached
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def drawn(logits, count=2000, **options):
    """How often each token is chosen."""
    options = sample.parse_arguments(["x", *(f"--{k.replace('_', '-')}={v}" for k, v in options.items())])
    generator = torch.Generator().manual_seed(0)
    return torch.bincount(torch.tensor([sample.choose(logits, options, generator) for _ in range(count)]), minlength=len(logits)) / count


def test_tokens_are_drawn_as_the_options_say():
    p = torch.tensor([0.1, 0.4, 0.3, 0.2])
    close = lambda a, b: torch.testing.assert_close(a, torch.tensor(b), atol=0.04, rtol=0)
    close(drawn(p.log(), temperature=1), [0.1, 0.4, 0.3, 0.2])
    close(drawn(p.log(), temperature=1e-310, count=9), [0.0, 1.0, 0.0, 0.0])
    close(drawn(p.log(), temperature=0.5), (p**2 / (p**2).sum()).tolist())
    close(drawn(p.log(), temperature=1, top_k=2), [0, 4 / 7, 3 / 7, 0])
    close(drawn(p.log(), temperature=1, top_p=0.71), [0, 4 / 9, 3 / 9, 2 / 9])
    close(drawn(p.log(), temperature=1, top_p=0.69), [0, 4 / 7, 3 / 7, 0])
    assert drawn(p.log(), count=5, temperature=0).tolist() == [0, 1, 0, 0]


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory, data_dir):
    """An artifact and its tokenizer, as a run leaves them; and a folder with the artifact and a log that names the tokenizer."""
    folder = tmp_path_factory.mktemp("run")
    blob = train_gpt.save_artifact(tiny_model(), tiny_model().cfg)
    (folder / "model.ptz").write_bytes(blob)
    shutil.copy(data_dir / "tokenizer.model", folder)
    (folder / "apart").mkdir()
    (folder / "apart/model.ptz").write_bytes(blob)
    own = {"artifact_sha256": hashlib.sha256(blob).hexdigest(), "tokenizer_sha256": sha256(folder / "tokenizer.model")}
    config = CONFIG | {"tokenizer_path": str(folder / "tokenizer.model")}
    (folder / "apart/run.txt").write_text(f"config {json.dumps(config)}\nresult {json.dumps(RESULT | own)}\n")
    return folder


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def say(*arguments):
    """Exit code of sample.py."""
    try:
        return sample.main([str(a) for a in arguments])
    except SystemExit as end:
        return end.code


def test_the_same_seed_writes_the_same_text_and_the_tokenizer_is_found(run_folder, capsys):
    texts = []
    for arguments in (["model.ptz", "the", "--seed", 1], ["apart/model.ptz", "the", "--seed", 1], ["model.ptz", "the", "--seed", 2],
                      ["model.ptz", "the", "--seed", 1, "--tokenizer", run_folder / "tokenizer.model"], ["model.ptz"]):  # fmt: skip
        assert say(run_folder / arguments[0], *arguments[1:], "--tokens", 12) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] == texts[3] != texts[2] and texts[0].startswith("the") and len(texts[0]) > 8
    assert texts[4].strip()


def test_text_comes_in_whole_characters_and_ends_with_its_sentences_and_the_document(run_folder, monkeypatch):
    """The tokenizer spells \u00e9 and others in bytes; the model is one that writes a given text."""
    loaded = sample.load_model(run_folder / "model.ptz")
    tokenizer = sample.load_tokenizer(loaded)
    text = " caf\u00e9 \u4e2d. Two\U0001f600! Three? And"
    ids = [*tokenizer.pieces.encode("on" + text)[len(tokenizer.pieces.encode("on")) :], tokenizer.pieces.bos_id()]
    assert tokenizer.pieces.decode(tokenizer.pieces.encode("on") + ids[:-1]) == "on" + text
    monkeypatch.setattr(sample, "generate", lambda *_: iter([*ids, *ids]))
    write = lambda *options: list(sample.continuation(None, tokenizer, "on", sample.parse_arguments(["x", *options]), None))
    assert "".join(write()) == text and all("\ufffd" not in piece for piece in write())
    assert "".join(write("--sentences", "2")) == " caf\u00e9 \u4e2d. Two\U0001f600!"
    assert "".join(write("--tokens", "1")) == tokenizer.pieces.decode(tokenizer.pieces.encode("on") + ids[:1])[2:]


def damaged(blob):
    return blob[:-5] + b"12345"


def other_tokenizer(folder, source):
    """The same pieces in a file of other bytes: a field that SentencePiece passes over stands at the end."""
    (folder / "other.model").write_bytes(source.read_bytes() + b"\xc0\x0c\x01")


@pytest.mark.parametrize("arguments, said", [
    (["none.ptz", "a"], "none.ptz: No such file or directory; expected an artifact"),
    ([".", "a"], ": Is a directory; expected an artifact"),
    (["damaged.ptz", "a"], "damaged.ptz: the artifact is damaged: its SHA-256 does not match"),
    (["tokenizer.model", "a"], "tokenizer.model: not an artifact of train_gpt.py"),
    (["alone/model.ptz", "a"], "model.ptz: no tokenizer.model beside it, and no log that names one; expected --tokenizer MODEL"),
    (["model.ptz", "a", "--tokenizer", "none.model"], "--tokenizer none.model: no such file"),
    (["model.ptz", "a", "--tokenizer", "damaged.ptz"], "--tokenizer damaged.ptz: not a SentencePiece model"),
    (["larger.ptz", "a"], "tokenizer.model: 320 pieces, but larger.ptz has VOCAB_SIZE=321"),
    (["apart/model.ptz", "a", "--tokenizer", "other.model"], "was trained with "),
    (["model.ptz", ""], "TEXT: empty; expected text to continue"),
    (["model.ptz", "a\udcff"], "TEXT: not UTF-8"),
    (["model.ptz", "a", "--temperature", "-1"], "--temperature -1.0: expected 0 to 100"),
    (["model.ptz", "a", "--temperature", "nan"], "--temperature nan: expected 0 to 100"),
    (["model.ptz", "a", "--tokens", "0"], "--tokens 0: expected 1 to 1000000"),
    (["model.ptz", "a", "--top-k", "-1"], "--top-k -1: expected 0 to 65536"),
    (["model.ptz", "a", "--top-p", "0"], "--top-p 0.0: expected above 0, at most 1"),
    (["model.ptz", "a", "--seed", "-3"], "--seed -3: expected 0 to"),
    (["model.ptz", "a", "b"], "unrecognized arguments: b"),
])  # fmt: skip
def test_mistakes_are_one_line(arguments, said, run_folder, tmp_path, monkeypatch, capsys):
    shutil.copytree(run_folder, tmp_path / "run")
    monkeypatch.chdir(tmp_path / "run")
    Path("alone").mkdir()
    shutil.copy("model.ptz", "alone")
    Path("damaged.ptz").write_bytes(damaged(Path("model.ptz").read_bytes()))
    model = tiny_model(vocab_size=321)
    Path("larger.ptz").write_bytes(train_gpt.save_artifact(model, model.cfg))
    if "other.model" in arguments:
        other_tokenizer(Path(), Path("tokenizer.model"))
    assert say(*arguments) == 2
    captured = capsys.readouterr()
    assert said in captured.err and ": error: " in captured.err and captured.err.count("\n") == 1
    assert captured.out == ""


def test_the_manifest_beside_the_artifact_says_which_tokenizer_it_was(run_folder, tmp_path, capsys):
    for name in ("model.ptz", "tokenizer.model"):
        shutil.copy(run_folder / name, tmp_path)
    (tmp_path / "manifest.json").write_text(json.dumps({"tokenizer_sha256": "0" * 64}))
    assert say(tmp_path / "model.ptz", "a") == 2
    assert f"was trained with 000000000000... ({tmp_path / 'manifest.json'})" in capsys.readouterr().err
    (tmp_path / "manifest.json").write_text(json.dumps({"files": {"tokenizer.model": "1" * 64}}))
    assert say(tmp_path / "model.ptz", "a") == 2 and "was trained with 111111111111..." in capsys.readouterr().err
    for none in ("[]", "[" * 100_000):
        (tmp_path / "manifest.json").write_text(none)
        assert say(tmp_path / "model.ptz", "a", "--tokens", 1) == 0


@pytest.mark.campaign
def test_the_prompt_asks_on_a_terminal_and_a_pipe_is_one_text(run_folder):
    program = [sys.executable, str(ROOT / "tools/sample.py"), str(run_folder / "model.ptz"), "-", "--tokens", "4", "--seed", "1"]
    env = os.environ | {"TERM": "dumb", "OMP_NUM_THREADS": "1"}
    piped = subprocess.run(program, input="the\nand\n", capture_output=True, text=True, env=env, timeout=120, check=False)
    assert piped.returncode == 0 and piped.stdout.startswith("the\nand") and piped.stderr.count("tokens, ") == 1
    empty = subprocess.run(program, input="\n", capture_output=True, text=True, env=env, timeout=120, check=False)
    assert empty.returncode == 2 and empty.stderr == "sample.py: error: stdin: empty; expected text to continue, or no TEXT to begin a document\n"
    ours, theirs = pty.openpty()
    child = subprocess.Popen(program, stdin=theirs, stdout=theirs, stderr=subprocess.DEVNULL, env=env)
    os.close(theirs)
    seen = b""
    for answer in (b"the\n", b"\n", b"and\n", b"\x04"):
        while not seen.endswith(b"> "):
            seen += os.read(ours, 1000)
        os.write(ours, answer)
        seen += os.read(ours, 1)
    assert child.wait(timeout=60) == 0
    lines = seen.decode().replace("\r", "").split("\n")
    assert lines[0] == "> the" and lines[1].startswith("the") and "> and" in lines and len(lines) >= 4
    os.close(ours)


@pytest.mark.slow
def test_the_demo_ends_with_two_sentences(tree, run_folder):  # noqa: F811
    """Between the table and the result line; the model is in the place where the stub trainer would have written it."""
    shutil.copy(run_folder / "model.ptz", tree / "own/own.ternary.ptz")
    for tokenizer, sentences in ((run_folder / "tokenizer.model", True), (tree / "own/tokenizer.model", False)):
        done = run_demo(tree, f"echo '{RESULT_LINE}'", DATA_PATH="own", TOKENIZER_PATH=str(tokenizer))
        assert done.returncode == 0 and done.stdout.endswith(f"\n{RESULT_LINE}\n")
        written = done.stdout.split("training  ")[1].split("\n", 2)[2].removesuffix(f"{RESULT_LINE}\n").strip()
        assert bool(written) == sentences and ("tokens/s" in done.stderr) == sentences
        assert ("sample.py: error: " in done.stderr) != sentences


def test_the_bench_times_the_tokens_that_it_draws(monkeypatch):
    """bench/speak.py: as many tokens as asked, behind as many as asked, by a clock that gives each a tenth of a second."""
    fed, now = [], [0.0]
    context = sample.Context(tiny_model())
    feed = context.feed

    def counted(ids, *rest):
        fed.append(len(ids))
        now[0] += 0.1
        return feed(ids, *rest)

    monkeypatch.setattr(context, "feed", counted)
    monkeypatch.setattr(speak.time, "perf_counter", lambda: now[0])
    assert speak.rates(context, 7, 5)[0] == pytest.approx(10) and fed == [7, 1, 1, 1, 1, 1]
