"""Proof of a dataset: whole shards, valid ids, the exact byte count of the validation text, and no text on both sides.

The byte count is the denominator of bits per byte. train_gpt.py takes it from a table with the bytes of each token; here
the same table is summed over every validation document and compared with the UTF-8 bytes of the decoded document.
"""

import hashlib
import re
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from shard_io import SPLITS, UserError, read_manifest, read_shard, sha256_file, shard_paths

PART_TOKENS = 1 << 22  # read at a time: bounds the memory
FINEWEB_VAL_DOCUMENTS, FINEWEB_VAL_BYTES = 50_000, 151_080_891


class SplitSize(NamedTuple):
    """What a split holds; `text_bytes` of the decoded documents, 0 where they were not decoded."""

    shards: int
    tokens: int
    documents: int
    text_bytes: int = 0


def check_dataset(folder, processor, table, threads=1):
    """Prove the dataset in `folder`; {split: SplitSize}, or UserError about the first thing that is wrong.

    table: `count(previous_ids, ids)` gives the bytes of each token (train_gpt.ByteTable).
    """
    check_manifest(folder)
    paths = {split: numbered_shards(folder, split) for split in SPLITS}
    tokens = {split: sum(len(read_shard(path)) for path in paths[split]) for split in SPLITS}
    val_documents, text_bytes = check_byte_count(paths["val"], processor, table, threads)
    hashes = {token_hash(document) for document in read_token_documents(paths["val"], processor)}
    train_documents = check_overlap(paths["train"], processor, hashes)
    return {
        "train": SplitSize(len(paths["train"]), tokens["train"], train_documents),
        "val": SplitSize(len(paths["val"]), tokens["val"], val_documents, text_bytes),
    }


def check_manifest(folder):
    """UserError unless the files that manifest.json lists, if there is one, are those that were written."""
    for name, digest in read_manifest(folder).get("files", {}).items():
        if not (folder / name).is_file():
            raise UserError(f"{folder / name}: missing, but manifest.json lists it")
        if sha256_file(folder / name) != digest:
            raise UserError(f"{folder / name}: not the file that was written (its SHA-256 differs from manifest.json's)")


def numbered_shards(folder, split):
    """The shards of a split; UserError if one is missing between the first and the last (or, of val, all are)."""
    paths = shard_paths(folder, split)
    if not paths and split == "val":
        raise UserError(f"{folder}: no fineweb_val_*.bin there")
    numbers = [re.fullmatch(r"fineweb_[a-z]+_(\d{6})\.bin", path.name) for path in paths]
    for path, match in zip(paths, numbers, strict=True):
        if match is None:
            raise UserError(f"{path}: expected a name such as fineweb_{split}_000000.bin")
    for before, after in pairwise(numbers):
        if int(after[1]) != int(before[1]) + 1:
            raise UserError(f"{folder}: {after[0]} follows {before[0]}; the shards between them are missing")
    return paths


def read_token_documents(paths, processor):
    """Yield each document's tokens, its BOS first, also where it crosses a shard border; ids are checked on the way."""
    held = np.zeros(0, dtype=np.uint16)
    for part in _read_parts(paths, processor.vocab_size()):
        starts = np.flatnonzero(part == processor.bos_id())
        if len(starts) == 0:
            held = np.concatenate([held, part])
            continue
        if len(held) + starts[0]:
            yield np.concatenate([held, part[: starts[0]]])
        for start, end in pairwise(starts):
            yield part[start:end]
        held = part[starts[-1] :]
    if len(held):
        yield held


def _read_parts(paths, vocab_size):
    """A split's tokens in pieces; UserError for an id that the vocabulary does not have."""
    for path in paths:
        ids = read_shard(path)
        for start in range(0, len(ids), PART_TOKENS):
            part = np.array(ids[start : start + PART_TOKENS])
            if part.max() >= vocab_size:
                at = int(np.argmax(part >= vocab_size))
                raise UserError(f"{path}: token {part[at]} at position {start + at}, expected ids below {vocab_size}")
            yield part


def token_hash(document):
    """128-bit hash of a document's tokens."""
    return hashlib.blake2b(document.tobytes(), digest_size=16).digest()


def check_overlap(train_paths, processor, val_hashes):
    """Number of training documents; UserError if some of them are validation documents."""
    documents, shared, first = 0, 0, None
    for document in read_token_documents(train_paths, processor):
        if token_hash(document) in val_hashes:
            shared += 1
            first = documents if first is None else first
        documents += 1
    if shared:
        raise UserError(
            f"{train_paths[0].parent}: {shared} of {documents} training documents are validation documents too "
            f"(the first: training document {first}); expected none"
        )
    return documents


def check_byte_count(val_paths, processor, table, threads=1):
    """(documents, UTF-8 bytes of their text); UserError if the table's sum differs for a single document."""
    documents, total, wrong, first = 0, 0, 0, ""
    for batch in _batches(read_token_documents(val_paths, processor), PART_TOKENS):
        texts = processor.decode([document[1:].tolist() for document in batch], num_threads=threads)
        for document, text, counted in zip(batch, texts, count_bytes(table, batch), strict=True):
            true = len(text.encode())
            total += true
            if counted != true or document[0] != processor.bos_id():
                wrong += 1
                first = first or _explain(documents, document, text, counted, processor)
            documents += 1
    if not documents:
        raise UserError(f"{val_paths[0].parent}: the validation split holds no document")
    if wrong:
        raise UserError(f"{val_paths[0].parent}: {wrong} of {documents} validation documents fail; {first}")
    return documents, total


def _batches(documents, tokens):
    """Lists of documents with about `tokens` tokens together."""
    batch, size = [], 0
    for document in documents:
        batch.append(document)
        size += len(document)
        if size >= tokens:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def count_bytes(table, documents):
    """The table's bytes of each document, a list of ints. The tokens go through it as one stream, as in the score."""
    import torch

    ids = torch.from_numpy(np.concatenate(documents).astype(np.int64))
    counts = table.count(torch.cat([ids[:1], ids[:-1]]), ids).numpy()
    starts = np.cumsum([0] + [len(document) for document in documents[:-1]])
    return np.add.reduceat(counts, starts).tolist()


def _explain(number, document, text, counted, processor):
    """What is wrong with the byte count of a validation document."""
    place = f"the first: document {number}"
    if document[0] != processor.bos_id():
        return f"{place} does not begin with the BOS id {processor.bos_id()}"
    fact = f"{place}: the byte table gives {counted} bytes, its decoded text has {len(text.encode())}"
    if processor.unk_id() in document:
        return f"{fact}; it holds unknown pieces, whose text is lost: the tokenizer needs byte fallback"
    if "\ufffd" in text:
        return f"{fact}; its byte pieces are not valid UTF-8"
    return fact


def report(folder, sizes):
    """The lines to print about a dataset that passed."""
    train, val = sizes["train"], sizes["val"]
    raw_bytes = read_manifest(folder).get("val", {}).get("bytes", val.text_bytes)
    normalized = "" if raw_bytes == val.text_bytes else f" (the input had {raw_bytes:,}; the tokenizer normalizes)"
    return [
        *(f"{folder}: {split} {size.shards} shards, {size.tokens:,} tokens, {size.documents:,} documents"
          for split, size in sizes.items()),
        f"{folder}: the byte table equals the decoded text in each of {val.documents:,} validation documents: "
        f"{val.text_bytes:,} bytes, {val.text_bytes / max(val.tokens, 1):.3f} a token{normalized}",
        f"{folder}: none of them is among the {train.documents:,} training documents",
        fineweb_line(val),
    ]


def fineweb_line(val):
    """How the validation split compares with the one of the leaderboard."""
    expected = f"FineWeb's {FINEWEB_VAL_DOCUMENTS:,} validation documents have {FINEWEB_VAL_BYTES:,} bytes"
    if (val.documents, val.text_bytes) == (FINEWEB_VAL_DOCUMENTS, FINEWEB_VAL_BYTES):
        return f"{expected}, and so has this split"
    return f"{expected}; this is another text: its bits per byte do not compare with the leaderboard's"
