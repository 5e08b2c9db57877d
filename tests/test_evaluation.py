"""Every target once, every byte once: against loops that do it the slow way."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from conftest import tiny_config, tiny_model, write_shard
from hypothesis import given
from hypothesis import strategies as st

from train_gpt import (
    ByteTable,
    Ops,
    TokenStream,
    UserError,
    ValidationSet,
    World,
    attend,
    attend_band,
    calibrate_temperature,
    evaluate,
    window_plan,
)


@given(st.integers(1, 400), st.integers(1, 40), st.integers(1, 40))
def test_windows_tile_the_targets_exactly_once(num_targets, seq_len, stride):
    stride = min(stride, seq_len)
    starts, firsts = window_plan(num_targets, seq_len, stride)
    count = np.zeros(num_targets, dtype=int)
    for k, (start, first) in enumerate(zip(starts, firsts, strict=True)):
        end = min(start + seq_len, num_targets)
        count[start + first : end] += 1
        assert 0 <= start and start + first < end
        assert k == 0 or end - (start + first) <= stride  # after the first window at most `stride` are scored
        if k:  # with all the context that the window has room for
            assert end - start == seq_len
    assert (count == 1).all()


def brute_force(model, tokens, seq_len, stride, temperature):
    """Target by target: its window is the earliest of those that end at seq_len + k * stride (or at the last target)."""
    num_targets, total = len(tokens) - 1, 0.0
    for target in range(num_targets):
        steps = max(0, math.ceil((target + 1 - seq_len) / stride))
        end = min(seq_len + steps * stride, num_targets)
        start = max(0, end - seq_len)
        window = tokens[start : target + 1][None]
        with torch.no_grad():
            logits = model.logits(model.hidden(window))[0, -1].double() / temperature
        total += (logits.logsumexp(0) - logits[tokens[target + 1]]).item()
    return total / num_targets


@pytest.mark.parametrize(("length", "stride"), [(20, 8), (33, 32), (33, 0), (34, 8), (150, 8), (150, 32), (150, 0), (131, 5), (97, 1)])
def test_evaluate_equals_a_loop_over_single_targets(length, stride):
    model = tiny_model()
    model.temperature.fill_(1.25)
    torch.manual_seed(1)
    val = ValidationSet(torch.randint(320, (length,)), num_bytes=777)
    loss, bpb = evaluate(model, val, tiny_config(sliding_batch_size=3, val_batch_size=96), World(), stride)
    expected = brute_force(model, val.tokens, 32, stride or 32, 1.25 if stride else 1.0)
    assert loss == pytest.approx(expected, rel=1e-6)
    assert bpb == pytest.approx(expected * (length - 1) / math.log(2) / 777, rel=1e-6)


def test_evaluate_does_not_depend_on_processes_or_batches():
    """Each rank of 3 on its own; their sums together are the score of one process."""

    class Recorder(World):
        def sum_(self, x):
            sums.append(x.clone())
            x[1] = length - 1
            return x

    model, length = tiny_model(), 500
    val = ValidationSet(torch.randint(320, (length,)), num_bytes=1000)
    for stride in (8, 0):
        expected, _ = evaluate(model, val, tiny_config(), World(), stride)
        other, _ = evaluate(model, val, tiny_config(sliding_batch_size=7, val_batch_size=64, micro_batch_tokens=160), World(), stride)
        assert other == pytest.approx(expected, rel=1e-6)
        sums: list[torch.Tensor] = []
        for rank in range(3):
            evaluate(model, val, tiny_config(), Recorder(rank, 3), stride)
        nats, targets = torch.stack(sums).sum(0).tolist()
        assert targets == length - 1 and nats / targets == pytest.approx(expected, rel=1e-6)


def test_temperature_divides_the_sliding_logits_and_nothing_else():
    model = tiny_model()
    val = ValidationSet(torch.randint(320, (200,)), num_bytes=400)
    scores = {}
    for t in (1.0, 1.5):
        model.temperature.fill_(t)
        scores[t] = [evaluate(model, val, tiny_config(), World(), stride)[0] for stride in (8, 32, 0)]
    assert scores[1.0][2] == scores[1.5][2] == scores[1.0][1] != scores[1.5][1] and scores[1.0][0] != scores[1.5][0]


def test_calibration_finds_the_best_temperature():
    """Labels drawn from the model's own distribution at temperature 1.1: a fine grid and the calibration agree."""
    model = tiny_model(scale=3.0)
    torch.manual_seed(2)
    x = torch.randint(320, (64, 32))
    with torch.no_grad():
        logits = model.logits(model.hidden(x))
        y = torch.distributions.Categorical(logits=logits / 1.1).sample()
        grid = np.linspace(0.85, 1.15, 61)
        late, targets = logits[:, 16:].double(), y[:, 16:]
        losses = [torch.nn.functional.cross_entropy((late / t).flatten(0, 1), targets.flatten()).item() for t in grid]
    assert calibrate_temperature(model, x, y, World()) == pytest.approx(grid[int(np.argmin(losses))], abs=0.01)


def decoded_bytes(sp, ids):
    """UTF-8 bytes of the text that SentencePiece decodes, document by document."""
    documents, current = [], []
    for i in ids:
        if i == sp.bos_id():
            documents.append(current)
            current = []
        else:
            current.append(i)
    return sum(len(sp.decode(d).encode()) for d in [*documents, current])


@pytest.mark.parametrize("options", [{}, {"add_dummy_prefix": True}, {"remove_extra_whitespaces": False, "normalization_rule_name": "identity"}])
def test_byte_table_counts_what_sentencepiece_decodes(tmp_path, options):
    """Spaces at the start of documents, byte fallback, accents, Chinese, emoji, runs of spaces."""
    import io

    import sentencepiece

    texts = ["The cat sat on the mat. " * 3, " leading space", "", "caf\u00e9 na\u00efve", "\u4e2d\u6587\u5b57 and \U0001f600\U0001f680", "two  spaces   three",
             "tab\tand\nnewline", "a", " ", "zzz qqq xxx \u0416\u0416"] * 4  # fmt: skip
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts[:3] * 20), model_writer=out, vocab_size=300, model_type="bpe", byte_fallback=True, pad_id=0, bos_id=1,
        eos_id=2, unk_id=3, minloglevel=2, character_coverage=0.99, hard_vocab_limit=False, **({"add_dummy_prefix": False} | options),
    )  # fmt: skip
    path = tmp_path / "t.model"
    path.write_bytes(out.getvalue())
    sp = sentencepiece.SentencePieceProcessor(model_file=str(path))
    ids = torch.tensor([i for text in texts for i in (sp.bos_id(), *sp.encode(text))])
    table = ByteTable.load(str(path), sp.vocab_size())
    assert int(table.count(ids[:-1], ids[1:]).sum()) == decoded_bytes(sp, ids.tolist())


def test_bits_per_byte_by_brute_force(data_dir):
    """Nats from a loop, bytes from decoded text, on the synthetic validation split."""
    import sentencepiece

    cfg = tiny_config(data_path=data_dir, tokenizer_path=data_dir / "tokenizer.model", val_max_tokens=300)
    model, val = tiny_model(), ValidationSet.load(cfg, World())
    sp = sentencepiece.SentencePieceProcessor(model_file=cfg.tokenizer_path)
    ids = TokenStream(cfg, "val").read(0, 301).tolist()
    text_bytes = decoded_bytes(sp, ids) - decoded_bytes(sp, ids[:1])
    nats = 300 * brute_force(model, torch.tensor(ids), 32, 32, 1.0)
    assert evaluate(model, val, cfg, World())[1] == pytest.approx(nats / math.log(2) / text_bytes, rel=1e-6)


def dense_band(window):
    """Attention of one query after the other, float64."""

    def attend(q, k, v):
        out, offset, share = torch.zeros(q.shape, dtype=torch.float64), k.size(1) - q.size(1), q.size(2) // k.size(2)
        for i in range(q.size(1)):
            seen = slice(max(0, i + offset - window + 1), i + offset + 1)
            for h in range(q.size(2)):
                keys, values = k[:, seen, h // share].double(), v[:, seen, h // share].double()
                weights = ((keys @ q[:, i, h, :, None].double()).squeeze(-1) / q.size(-1) ** 0.5).softmax(-1)
                out[:, i, h] = (weights[..., None] * values).sum(1)
        return out.to(q.dtype)

    return attend


@pytest.mark.parametrize(("length", "queries"), [(32, 32), (40, 40), (29, 29), (8, 8), (5, 5), (32, 3), (32, 8), (32, 11), (6, 2)])
def test_banded_attention_sees_the_window_before_each_token(length, queries):
    torch.manual_seed(0)
    q, k, v = torch.randn(2, queries, 4, 6), torch.randn(2, length, 2, 6), torch.randn(2, length, 2, 6)
    torch.testing.assert_close(attend_band(q, k, v, 8), dense_band(8)(q, k, v), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(attend(q, k, v), dense_band(length)(q, k, v), rtol=1e-5, atol=1e-5)


def test_a_banded_model_is_scored_in_one_pass_over_long_rows():
    """Rows of 16 windows of 8, of which all but the first window's tokens count; every target once, against dense attention."""
    model = tiny_model(attention_window=8)
    cfg, val = model.cfg, ValidationSet(torch.randint(320, (300,)), num_bytes=777)
    assert (cfg.score_window, cfg.score_stride) == (128, 120)
    score, _ = evaluate(model, val, cfg, World(), cfg.score_stride)
    model.use(Ops(attend=dense_band(8)))
    nats, x, y = [], val.tokens[:-1], val.tokens[1:]
    for start, first, end in ((0, 0, 128), (120, 128, 248), (171, 248, 299)):
        with torch.no_grad():
            nats.append(model(x[None, start:end], y[None, start:end])[0, first - start :])
    assert score == pytest.approx(torch.cat(nats).mean().item(), rel=1e-6) and torch.cat(nats).numel() == 299


def test_the_last_block_computes_the_tail_alone():
    model, x = tiny_model(), torch.randint(320, (2, 32))
    with torch.no_grad():
        whole = model.hidden(x)
        for tail in (1, 5, 32):
            torch.testing.assert_close(model.hidden(x, tail=tail), whole[:, -tail:], rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------------------------------------ the bytes that a score divides by

ENGLISH = [f"The {a} cat sat on the {b} mat." for a in ("old", "grey", "big", "new") for b in ("red", "thin", "long", "wet", "soft")]
KINDS = {  # options of a tokenizer -> (texts it is trained on, texts to validate on)
    "no piece for the space": ({}, ["".join(chr(0x4E00 + i * 7 % 40) for i in range(k, k + 300)) for k in range(100)], ENGLISH),
    "white space behind words": ({"treat_whitespace_as_suffix": True, "add_dummy_prefix": True}, ENGLISH, ENGLISH),
    "normalizes": ({"normalization_rule_name": "nmt_nfkc", "remove_extra_whitespaces": True}, ENGLISH, [f" {t}  \ufb01 \u2460" for t in ENGLISH]),
    "folds case": ({"normalization_rule_name": "nmt_nfkc_cf"}, ENGLISH, [f"{t} \u212a" for t in ENGLISH]),
    "writes U+2581 as a space": ({}, ENGLISH, [f"{t} a\u2581b" for t in ENGLISH]),
    "loses characters": ({"byte_fallback": False}, ENGLISH, [f"{t} \u4e2d\u6587" for t in ENGLISH]),
    "changes nothing": ({}, ENGLISH, ENGLISH),
}


def dataset(folder, kind, **manifest):
    """A folder of validation shards by a tokenizer of this kind: (its settings, UTF-8 bytes of each document)."""
    import json

    import sentencepiece

    options, train, texts = KINDS[kind]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(train), model_prefix=str(folder / "tokenizer"), hard_vocab_limit=False, pad_id=0, bos_id=1, eos_id=2, unk_id=3,
        minloglevel=2, **({"vocab_size": 400, "model_type": "bpe", "byte_fallback": True, "add_dummy_prefix": False, "remove_extra_whitespaces": False,
                           "normalization_rule_name": "identity"} | options),
    )  # fmt: skip
    sp = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    write_shard(folder / "fineweb_val_000000.bin", np.concatenate([[sp.bos_id(), *sp.encode(text)] for text in texts]))
    sizes = [len(text.encode()) for text in texts]
    manifest = {"val": {"document_bytes": sizes}} | manifest
    (folder / "manifest.json").write_text(json.dumps(manifest))
    settings = {"data_path": folder, "tokenizer_path": folder / "tokenizer.model", "vocab_size": sp.vocab_size()}
    return settings, sizes


@pytest.mark.parametrize("kind", KINDS)
def test_bits_are_per_byte_of_the_text_that_went_in(kind, tmp_path):
    """True bytes as the oracle, whatever the tokenizer does to the text; where it changes its length, the log says so."""
    settings, sizes = dataset(tmp_path, kind)
    val = ValidationSet.load(tiny_config(**settings), World())
    assert val.num_bytes == sum(sizes)
    assert (val.decoded_bytes == sum(sizes)) == (kind == "changes nothing") == (not val.notes)
    assert kind == "changes nothing" or f"{sum(sizes)} bytes went in, {val.decoded_bytes} come out" in val.notes[0]


@pytest.mark.parametrize(("kind", "expected"), [
    ("no piece for the space", "the text 'a b' counts as 5 bytes, it has 3"), ("white space behind words", "the text 'a' counts as 2 bytes, it has 1"),
    ("loses characters", "20 validation tokens are unknown pieces"),
])  # fmt: skip
def test_without_noted_bytes_a_tokenizer_that_counts_wrong_is_refused(kind, expected, tmp_path):
    settings, _ = dataset(tmp_path, kind, val={})
    with pytest.raises(UserError, match=expected):
        ValidationSet.load(tiny_config(**settings), World())


def test_without_noted_bytes_the_log_says_what_is_not_known(tmp_path):
    settings, sizes = dataset(tmp_path, "normalizes", val={})
    val = ValidationSet.load(tiny_config(**settings), World())
    assert val.num_bytes == val.decoded_bytes < sum(sizes) and "the tokenizer normalizes" in val.notes[0] and len(val.notes) == 1
    (tmp_path / "manifest.json").unlink()
    assert "no manifest.json" in ValidationSet.load(tiny_config(**settings), World()).notes[0]


@pytest.mark.parametrize("kind", ["changes nothing", "normalizes"])
def test_the_bytes_of_a_part_of_the_split(kind, tmp_path):
    """Whole documents exactly; within one the table's share, which is exact where the tokenizer changes nothing."""
    settings, sizes = dataset(tmp_path, kind)
    whole = ValidationSet.load(tiny_config(**settings), World())
    ids, found = whole.tokens.tolist(), []
    starts = [i for i, token in enumerate(ids) if token == 1]
    for targets in range(2, len(ids)):
        val = ValidationSet.load(tiny_config(**settings, val_max_tokens=targets), World())
        found.append(val.num_bytes)
        if kind == "changes nothing":
            assert val.num_bytes == val.decoded_bytes
        if targets + 1 in starts:  # the cut lies between two documents
            assert val.num_bytes == sum(sizes[: starts.index(targets + 1)])
    assert found == sorted(found) and found[-1] == whole.num_bytes == sum(sizes)


@pytest.mark.parametrize(("manifest", "expected"), [
    ({"val": {"document_bytes": [30] * 19}}, "hold 20 documents, the first at token 0; expected what manifest.json notes, 19"),
    ({"val": {"document_bytes": [30] * 21}}, "hold 20 documents, the first at token 0; expected what manifest.json notes, 21"),
    ({"val": {"document_bytes": [0] * 20}}, "stand for 0 bytes"),
    ({"val": {"document_bytes": [-1] * 20}}, "document_bytes: expected a list of whole numbers"),
    ({"val": {"document_bytes": {"a": 1}}}, "document_bytes: expected a list of whole numbers"),
    ({"tokenizer_sha256": "0" * 64}, "SHA-256 .* were made by 000000000000"),
    ({"files": {"tokenizer.model": "1" * 64}}, "SHA-256 .* were made by 111111111111"),
])  # fmt: skip
def test_a_manifest_that_is_not_the_shards_is_refused(manifest, expected, tmp_path):
    settings, _ = dataset(tmp_path, "changes nothing", **manifest)
    with pytest.raises(UserError, match=expected):
        ValidationSet.load(tiny_config(**settings), World())


@pytest.mark.parametrize(("text", "expected"), [("{", "not JSON"), ("[1]", "expected a JSON object, found list")])
def test_a_damaged_manifest_is_named(text, expected, tmp_path):
    settings, _ = dataset(tmp_path, "changes nothing")
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(UserError, match=f"manifest.json: {expected}"):
        ValidationSet.load(tiny_config(**settings), World())


def test_a_split_without_text_is_refused(tmp_path):
    settings, _ = dataset(tmp_path, "changes nothing", val={})
    write_shard(tmp_path / "fineweb_val_000000.bin", np.ones(9))  # documents without text
    with pytest.raises(UserError, match="the 8 tokens to validate on stand for 0 bytes"):
        ValidationSet.load(tiny_config(**settings), World())
