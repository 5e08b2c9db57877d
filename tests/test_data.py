"""Shards are checked, and the batches of any number of processes are the stream, once and in order."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import tiny_config, write_shard

from train_gpt import Batches, TokenStream, UserError, ValidationSet, World, load_shard


def shards(folder, *lengths, split="train"):
    """Shards that hold 0, 1, 2, ... modulo 300 across their borders."""
    tokens = np.arange(sum(lengths)) % 300
    for i, part in enumerate(np.split(tokens, np.cumsum(lengths)[:-1])):
        write_shard(folder / f"fineweb_{split}_{i:06d}.bin", part)
    return tokens


@pytest.mark.parametrize(
    ("header", "count", "cut"),
    [((1, 1, 50), 50, 0), ((20240520, 2, 50), 50, 0), ((20240520, 1, 51), 50, 0), ((20240520, 1, 49), 50, 0), ((20240520, 1, 0), 0, 0),
     ((20240520, 1, -5), 50, 0), ((20240520, 1, 50), 50, 1), ((20240520, 1, 50), 50, 1100), ((20240520, 1, 50), 50, 1124)],
)  # fmt: skip
def test_a_bad_header_or_length_is_refused(tmp_path, header, count, cut):
    path = write_shard(tmp_path / "fineweb_train_000000.bin", np.zeros(count, dtype=int), header)
    path.write_bytes(path.read_bytes()[: len(path.read_bytes()) - cut])
    with pytest.raises(UserError, match="fineweb_train_000000.bin") as error:
        load_shard(path)
    assert "\n" not in str(error.value)


def test_no_shards_is_said(tmp_path):
    with pytest.raises(FileNotFoundError, match="DATA_PATH=.*fineweb_train"):
        TokenStream(tiny_config(data_path=tmp_path), "train")


def test_a_token_outside_the_vocabulary_names_the_shard(tmp_path):
    shards(tmp_path, 100, 100)
    write_shard(tmp_path / "fineweb_train_000001.bin", np.full(100, 320))
    stream = TokenStream(tiny_config(data_path=tmp_path), "train")
    stream.read(0, 100)
    with pytest.raises(UserError, match="fineweb_train_000001.bin: token id 320 at a position from .*VOCAB_SIZE=320"):
        stream.read(50, 60)


@pytest.mark.parametrize("lengths", [(1000,), (1, 2, 997), (333, 334, 333)])
def test_reads_cross_borders_and_wrap(tmp_path, lengths):
    tokens = shards(tmp_path, *lengths)
    stream = TokenStream(tiny_config(data_path=tmp_path), "train")
    around = np.concatenate([tokens, tokens, tokens])
    for position, count in ((0, 1000), (1, 5), (990, 30), (999, 1), (1000, 10), (500, 1600), (2345, 7)):
        assert (stream.read(position, count) == around[position % 1000 :][:count]).all()


def test_ranks_share_each_step_and_nothing_is_lost_or_repeated(tmp_path):
    tokens = shards(tmp_path, 700, 700)
    stream = TokenStream(tiny_config(data_path=tmp_path), "train")
    for size in (1, 2, 4):
        ranks = [Batches(stream, World(rank, size)) for rank in range(size)]
        position = 0
        for sequences, seq_len in ((8, 16), (8, 16), (4, 32), (4, 8), (8, 16)):  # the sequence length may change on the way
            parts = [r.next(sequences, seq_len) for r in ranks]
            x, y = (torch.cat(t).flatten().numpy() for t in zip(*parts, strict=True))
            span = tokens[position : position + sequences * seq_len + 1]
            assert (x == span[:-1]).all() and (y == span[1:]).all()
            position += sequences * seq_len


def test_state_and_restore_give_the_exact_position(tmp_path):
    shards(tmp_path, 500)
    stream = TokenStream(tiny_config(data_path=tmp_path), "train")
    one, two = Batches(stream, World()), Batches(stream, World())
    for _ in range(5):
        one.next(4, 16)
    two.restore(one.state())
    assert torch.equal(one.next(4, 16)[0], two.next(4, 16)[0])
    assert one.epoch == 1
    one.next(4, 40)
    assert one.epoch == 2


def test_validation_set_checks_tokenizer_and_counts(tmp_path, data_dir):
    settings = {"data_path": data_dir, "tokenizer_path": data_dir / "tokenizer.model"}
    val = ValidationSet.load(tiny_config(**settings), World())
    assert val.num_targets + 1 == TokenStream(tiny_config(**settings), "val").num_tokens
    assert ValidationSet.load(tiny_config(**settings, val_max_tokens=100), World()).num_targets == 100
    with pytest.raises(UserError, match="has 320 pieces, but VOCAB_SIZE=640"):
        ValidationSet.load(tiny_config(**settings, vocab_size=640), World())
    (tmp_path / "no.model").write_bytes(b"this is no tokenizer")
    with pytest.raises(UserError, match="not a SentencePiece model"):
        ValidationSet.load(tiny_config(data_path=data_dir, tokenizer_path=tmp_path / "no.model"), World())
    with pytest.raises(FileNotFoundError, match="TOKENIZER_PATH"):
        ValidationSet.load(tiny_config(data_path=data_dir, tokenizer_path=tmp_path / "missing.model"), World())
