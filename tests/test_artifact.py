"""The artifact is the trained model, bit for bit; anything else is refused with one error."""

from __future__ import annotations

import hashlib
import lzma
import pickle
import struct

import numpy as np
import pytest
import torch
from conftest import tiny_config, tiny_model

import train_gpt
from train_gpt import (
    ARTIFACT_PREFIX,
    STREAM_LENGTHS,
    ArtifactError,
    QuantizedLinear,
    load_artifact,
    parameter_owners,
    read_container,
    save_artifact,
)


@pytest.fixture(scope="module")
def model():
    model = tiny_model()
    model.temperature.fill_(1.0625)
    return model


@pytest.fixture(scope="module")
def blob(model):
    return save_artifact(model, model.cfg)


def loss(model):
    torch.manual_seed(5)
    x = torch.randint(320, (4, model.cfg.train_seq_len))
    with torch.no_grad():
        return model(x, x.roll(-1, 1))


@pytest.mark.parametrize("settings", [{}, {"artifact_codec": "bitmask"}, {"artifact_codec": "base3"}, {"fp_storage": "FP16"}, {"embed_dim": 0},
                                      {"num_layers": 1}, {"train_seq_len": 8, "train_batch_tokens": 64}, {"train_seq_len": 48, "train_batch_tokens": 96},
                                      {"precision": "bf16"}, {"softcap_type": "tanh", "rope_type": "rope", "activation": "relu"}])  # fmt: skip
def test_save_and_load_give_the_same_losses_exactly(settings):
    trained = tiny_model(**settings)
    loaded, cfg = load_artifact(save_artifact(trained, trained.cfg), trained.cfg.precision)
    assert torch.equal(loss(trained), loss(loaded))
    assert cfg.model_settings() == trained.cfg.model_settings()


def test_every_stored_value_comes_back_and_nothing_is_left_to_train(model, blob):
    loaded, _ = load_artifact(blob)
    assert loaded.temperature.item() == 1.0625
    for (name, ours, p, role), (_, theirs, q, _) in zip(parameter_owners(model), parameter_owners(loaded), strict=True):
        expected = ours.rounded() if isinstance(ours, QuantizedLinear) else p.detach().half().float()
        assert torch.equal(q, expected), name
        assert not q.requires_grad
        assert getattr(theirs, "frozen", True)
        assert role.storage != "ternary" or set(torch.unique(q.view(-1, 32) / q.view(-1, 32).abs().amax(1, keepdim=True).clamp_min(1e-9)).tolist()) <= {-1, 0, 1}


def test_saving_a_loaded_model_gives_the_codes_back(blob):
    """Not part of the contract (the scale of codes x scale is another one), but the codes must survive."""
    loaded, cfg = load_artifact(blob)
    first, second = (np.frombuffer(train_gpt.decompress(s[0][1], s[0][0]), np.uint8) for s in (read_container(b)[2] for b in (blob, save_artifact(loaded, cfg))))
    assert (first == second).all()


def test_same_weights_same_bytes_and_auto_keeps_the_smaller(model, blob):
    assert save_artifact(model, model.cfg) == blob
    sizes = {codec: len(save_artifact(model, tiny_config(artifact_codec=codec))) for codec in ("base3", "bitmask")}
    assert len(blob) == min(sizes.values())


def test_every_byte_is_accounted_for(model, blob):
    """Sizes worked out by hand from the parameter counts."""
    cfg, codec, streams = read_container(blob)
    ternary = 3 * (64 * 128 + 64 * 64 + 2 * 64 * 128)
    tables = 320 * 24 + 2 * 64 * 24
    controls = 3 * (4 + 4 * 64) + 64 + 320
    assert [raw for raw, _ in streams][1:] == [2 * ternary // 32, tables + 3, 2 * controls + 4]
    assert codec != "base3" or streams[0][0] == -(-ternary // 5)
    header = ARTIFACT_PREFIX.unpack_from(blob)[2]
    assert len(blob) == ARTIFACT_PREFIX.size + header + STREAM_LENGTHS.size + sum(len(data) for _, data in streams)
    assert train_gpt.count_parameters(model) == (ternary + tables + controls, ternary)
    assert str(cfg.data_path) not in blob.decode("latin1") and cfg.run_id not in blob.decode("latin1")


def damaged(blob):
    """Truncated, extended, flipped, foreign: what a disk, a network or a stranger may hand over."""
    rng = np.random.default_rng(0)
    yield from (blob[:n] for n in (0, 3, 4, 39, 40, 41, len(blob) // 2, len(blob) - 1))
    yield from (blob + tail for tail in (b"\0", b"TGPT", blob))
    for position in rng.integers(0, len(blob), 300):
        yield blob[:position] + bytes([blob[position] ^ 1 << int(rng.integers(8))]) + blob[position + 1 :]
    yield from (b"\x80\x04K\x01.", b"PK\x03\x04" + b"\0" * 100, lzma.compress(b"x" * 1000), b"TGPT" + b"\0" * 500, b"TGPT\x02\0" + blob[6:])
    yield pickle.dumps({"weights": [1, 2, 3]})


def test_damaged_and_foreign_bytes_are_refused(blob):
    for bad in damaged(blob):
        with pytest.raises(ArtifactError) as error:
            load_artifact(bad)
        assert "\n" not in str(error.value)


def resealed(blob, header=None, lengths=None, streams=None):
    """The artifact with parts exchanged and a checksum that fits: what a hostile author can send."""
    body = blob[ARTIFACT_PREFIX.size :]
    size = ARTIFACT_PREFIX.unpack_from(blob)[2]
    header = body[:size] if header is None else header
    lengths = body[size : size + STREAM_LENGTHS.size] if lengths is None else lengths
    streams = body[size + STREAM_LENGTHS.size :] if streams is None else streams
    body = header + lengths + streams
    return ARTIFACT_PREFIX.pack(b"TGPT", 1, len(header), hashlib.sha256(body).digest()) + body


def rebuilt(blob, index, raw):
    """The artifact with one stream's content exchanged, lengths and checksum correct."""
    _, _, streams = read_container(blob)
    parts = [(n, data) for n, data in streams]
    parts[index] = (len(raw), train_gpt.compress(raw))
    lengths = STREAM_LENGTHS.pack(*(n for raw_length, data in parts for n in (raw_length, len(data))))
    return resealed(blob, lengths=lengths, streams=b"".join(data for _, data in parts))


def test_a_resealed_artifact_still_loads(blob):
    assert resealed(blob) == blob
    load_artifact(rebuilt(blob, 0, train_gpt.decompress(read_container(blob)[2][0][1], read_container(blob)[2][0][0])))


def test_lying_headers_are_refused_before_anything_is_allocated(blob):
    header = blob[ARTIFACT_PREFIX.size :][: ARTIFACT_PREFIX.unpack_from(blob)[2]]
    for old, new in ((b"NUM_LAYERS=3", b"NUM_LAYERS=1000"), (b"MODEL_DIM=64", b"MODEL_DIM=64000000"), (b"MLP_MULT=2", b"MLP_MULT=100000000000000000000"),
                     (b"TRAIN_SEQ_LEN=32", b"TRAIN_SEQ_LEN=1000000000"), (b"NUM_LAYERS=3", b"NUM_LAYERS=4"),
                     (b"NUM_LAYERS=3", b"NUM_LAYERS=__import__('os')"), (b"VOCAB_SIZE=320\n", b""), (b"codec=", b"kodec="), (b"ACTIVATION=relu2", b"ACTIVATION=exec"),
                     (b"VOCAB_SIZE=320", b"VOCAB_SIZE=320\nRUN_ID=x"), (b"NUM_LAYERS=3", b"\xff\xfe")):  # fmt: skip
        assert old in header
        with pytest.raises(ArtifactError):
            load_artifact(resealed(blob, header=header.replace(old, new)))


def test_a_decompression_bomb_is_refused(blob):
    _, _, streams = read_container(blob)
    bomb = train_gpt.compress(bytes(1 << 28))  # 256 MB in 40 KB
    for index in range(4):
        parts = list(streams)
        parts[index] = (parts[index][0], bomb)
        lengths = STREAM_LENGTHS.pack(*(n for raw, data in parts for n in (raw, len(data))))
        with pytest.raises(ArtifactError):
            load_artifact(resealed(blob, lengths=lengths, streams=b"".join(data for _, data in parts)))


def test_hostile_values_are_refused(blob):
    _, codec, streams = read_container(blob)
    raw = [train_gpt.decompress(data, n) for n, data in streams]
    bad_trits = b"\xff" * len(raw[0])
    nan16, nan8 = struct.pack("<e", float("nan")), b"\x7f"
    hostile = [(0, bad_trits), (0, raw[0] + b"\0"), (1, nan16 + raw[1][2:]), (1, raw[1][:-2]), (2, raw[2][:1] + nan8 + raw[2][2:]), (3, nan16 + raw[3][2:]),
               (3, raw[3][:-4] + struct.pack("<f", 1e9)), (3, raw[3][:-4] + struct.pack("<f", float("nan")))]  # fmt: skip
    for index, content in hostile:
        with pytest.raises(ArtifactError):
            load_artifact(rebuilt(blob, index, content))


def test_weights_that_are_not_finite_are_not_exported():
    model = tiny_model()
    model.blocks[1].mlp.up.weight.data[3, 5] = float("nan")
    with pytest.raises(ValueError, match="blocks.1.mlp.up.weight"):
        save_artifact(model, model.cfg)


def test_write_whole_keeps_the_earlier_file(tmp_path, monkeypatch):
    path = tmp_path / "model.ptz"
    train_gpt.write_whole(path, b"first")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(train_gpt.os, "fsync", full)
    with pytest.raises(OSError):
        train_gpt.write_whole(path, b"second")
    assert path.read_bytes() == b"first" and [p.name for p in tmp_path.iterdir()] == ["model.ptz"]
