"""Proof of a dataset: whole shards, valid ids, the exact byte count of the validation text, and no text on both sides.

The byte count is the denominator of bits per byte: the UTF-8 bytes of the text that went in, which prepare_data.py
records for each validation document. train_gpt.py also has a table with the bytes of each token. Here the table's sum,
the decoded text and the recorded bytes of every validation document are compared; where they differ, the tokenizer's
model says why.
"""

import hashlib
import re
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from encode_text import META_SPACE, TokenizerKind
from shard_io import MANIFEST, SPLITS, TOKENIZER, UserError, read_manifest, read_shard, sha256_file, shard_paths

PART_TOKENS = 1 << 22  # read at a time: bounds the memory
FINEWEB_VAL_DOCUMENTS, FINEWEB_VAL_BYTES = 50_000, 151_080_891


class SplitSize(NamedTuple):
    """What a split holds; `text_bytes` of the decoded documents, 0 where they were not decoded."""

    shards: int
    tokens: int
    documents: int
    text_bytes: int = 0
    input_bytes: int | None = None  # as recorded when the shards were made
    difference: str = ""  # between the two, in words


def refuse_other_tokenizer(folder, path, model, processor):
    """UserError if the tokenizer is not the one that made the shards, as far as the folder knows that one."""
    manifest = checked_manifest(folder)
    pieces = manifest.get("vocab_size", processor.vocab_size())
    if processor.vocab_size() != pieces:
        found = f"{processor.vocab_size()} pieces, expected {pieces}"
        raise UserError(f"--tokenizer {path}: {found} as {folder / MANIFEST} says")
    known = manifest.get("tokenizer_sha256") or manifest.get("files", {}).get(TOKENIZER)
    source = folder / MANIFEST
    if not known and (folder / TOKENIZER).is_file():
        known, source = sha256_file(folder / TOKENIZER), folder / TOKENIZER
    found = hashlib.sha256(model).hexdigest()
    if known and known != found:
        differ = f"SHA-256 {found[:16]}..., expected {known[:16]}... as in {source}"
        raise UserError(f"--tokenizer {path}: {differ}: not the shards' tokenizer")


def checked_manifest(folder):
    """manifest.json, {} if there is none; UserError unless it has the form that prepare_data.py writes."""
    manifest = read_manifest(folder)
    path = folder / MANIFEST
    if not manifest and path.exists():
        raise UserError(f"{path}: cannot be read, expected a JSON object")
    for name, kind in (("files", dict), ("train", dict), ("val", dict), ("vocab_size", int), ("tokenizer_sha256", str)):
        if not isinstance(manifest.get(name, kind()), kind):
            raise UserError(f"{path}: {name} is {manifest[name]!r:.60}, expected {MANIFEST_KINDS[kind]}")
    sizes = manifest.get("val", {}).get("document_bytes", [])
    if not isinstance(sizes, list) or not all(type(size) is int and size >= 0 for size in sizes):
        raise UserError(f"{path}: document_bytes of val is {sizes!r:.60}, expected a list of whole numbers")
    return manifest


MANIFEST_KINDS = {dict: "an object", int: "a whole number", str: "a string"}


def check_dataset(folder, processor, table, threads=1):
    """Prove the dataset in `folder`; {split: SplitSize}, or UserError about the first thing that is wrong.

    table: `count(previous_ids, ids)` gives the bytes of each token (train_gpt.ByteTable).
    """
    manifest = check_manifest(folder)
    paths = {split: numbered_shards(folder, split) for split in SPLITS}
    tokens = {split: sum(len(read_shard(path)) for path in paths[split]) for split in SPLITS}
    recorded = recorded_bytes(folder, manifest)
    val_documents, text_bytes, difference = check_byte_count(paths["val"], processor, table, threads, recorded)
    hashes = {token_hash(document) for document in read_token_documents(paths["val"], processor)}
    train_documents = check_overlap(paths["train"], processor, hashes)
    return {
        "train": SplitSize(len(paths["train"]), tokens["train"], train_documents),
        "val": SplitSize(
            len(paths["val"]), tokens["val"], val_documents, text_bytes, recorded and sum(recorded), difference
        ),
    }


def check_manifest(folder):
    """The manifest; UserError unless the files that it lists, if there is one, are those that were written."""
    manifest = checked_manifest(folder)
    for name, digest in manifest.get("files", {}).items():
        if not (folder / name).is_file():
            raise UserError(f"{folder / name}: missing, but manifest.json lists it")
        if sha256_file(folder / name) != digest:
            raise UserError(f"{folder / name}: not the file that was written (its SHA-256 differs from manifest.json's)")
    return manifest


def recorded_bytes(folder, manifest):
    """The input's bytes of each validation document, None where the manifest has none; UserError if their sum is wrong."""
    sizes, total = (manifest.get("val", {}).get(name) for name in ("document_bytes", "bytes"))
    if sizes is not None and total is not None and sum(sizes) != total:
        raise UserError(f"{folder / MANIFEST}: document_bytes of val add up to {sum(sizes)}, but bytes is {total}")
    return sizes


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
    held = []
    for part in _read_parts(paths, processor.vocab_size()):
        starts = np.flatnonzero(part == processor.bos_id())
        if len(starts) == 0:
            held.append(part)
            continue
        if held or starts[0]:
            yield np.concatenate([*held, part[: starts[0]]])
        for start, end in pairwise(starts):
            yield part[start:end]
        held = [part[starts[-1] :]]
    if held:
        yield np.concatenate(held)


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


def check_byte_count(val_paths, processor, table, threads=1, recorded=None):
    """(documents, UTF-8 bytes of their decoded text, how these differ from the recorded bytes in words).

    UserError if for a single document the table's sum is not the decoded text's, or the score's count would be wrong:
    text is lost, or the bytes differ in a way that the tokenizer does not explain.
    """
    folder, kind = val_paths[0].parent, TokenizerKind.read(processor)
    documents, total, wrong, first = 0, 0, 0, ""
    differing, difference = 0, ""
    for batch in _batches(read_token_documents(val_paths, processor), PART_TOKENS):
        texts = processor.decode([document[1:].tolist() for document in batch], num_threads=threads)
        for document, text, counted in zip(batch, texts, count_bytes(table, batch), strict=True):
            true = len(text.encode())
            total += true
            size = recorded[documents] if recorded and documents < len(recorded) else None
            fault = _fault(document, text, counted, processor)
            if not fault and (differs := explain(kind, text, size)):
                differing += 1
                difference = difference or f"the first: document {documents}, {differs.sizes}; {differs.reason}"
                fault = differs.fault
            if fault:
                wrong += 1
                first = first or f"the first: document {documents}{fault}"
            documents += 1
    if not documents:
        raise UserError(f"{folder}: the validation split holds no document")
    if wrong:
        raise UserError(f"{folder}: {wrong} of {documents} validation documents fail; {first}")
    if recorded is not None and len(recorded) != documents:
        known = f"manifest.json records the bytes of {len(recorded)}"
        raise UserError(f"{folder}: {documents} validation documents, but {known}")
    return documents, total, differing and f"in {differing:,} of {documents:,} documents ({difference})" or ""


class Difference(NamedTuple):
    """Why a decoded document has not the bytes of the input."""

    sizes: str
    reason: str
    fault: str = ""  # if the score's count would be wrong


def explain(kind, text, recorded):
    """The Difference between a document's decoded text and its recorded bytes, None if there is none to see.

    The model names the reasons; what they amount to is taken off the text before the sizes are compared again. Where
    nothing is recorded, a difference that shows in the text is a fault: the score would count what the text has.
    """
    reasons, rest = [], text
    spelled = META_SPACE in text  # a space that came as a piece decodes to " "
    if spelled:
        reasons.append("the vocabulary has no piece for U+2581, so spaces are spelled in its three bytes")
        rest = rest.replace(META_SPACE, " ")
    if kind.dummy_prefix and (kind.space_is_suffix or spelled):
        end = "end" if kind.space_is_suffix else "start"
        reasons.append(f"the space added at a document's {end} (add_dummy_prefix) stays in the text")
        rest = rest[:-1] if kind.space_is_suffix else rest[1:]
    size, decoded = len(rest.encode()), len(text.encode())
    if recorded is None:
        if not reasons:
            return None
        sizes = f"{decoded} bytes decoded, {size} in the input, which manifest.json does not record"
        return Difference("", "", f": {'; '.join(reasons)}: {sizes}")
    lost = recorded - size
    if kind.dummy_prefix and kind.space_is_suffix:
        lost -= lost % 2  # decoding takes a space off the start all the same
    if lost and kind.normalization:
        reasons.append(f"the tokenizer normalizes ({kind.normalization})")
    elif 0 < lost <= 2 * rest.count(" ") and lost % 2 == 0:
        reasons.append("no normalization: the input has U+2581, which SentencePiece takes for a space")
    elif lost:
        reasons.append("nothing in the tokenizer's model explains it: are these the shards of manifest.json?")
        return Difference("", "", f": {recorded} bytes of input recorded, {decoded} decoded; {'; '.join(reasons)}")
    if recorded == decoded:
        return None
    return Difference(f"{recorded:,} bytes of input, {decoded:,} decoded", "; ".join(reasons))


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


def _fault(document, text, counted, processor):
    """What is wrong with a validation document by its tokens alone; "" if nothing is."""
    if document[0] != processor.bos_id():
        return f" does not begin with the BOS id {processor.bos_id()}"
    size, unknown = len(text.encode()), int(np.count_nonzero(document == processor.unk_id()))
    if counted == size and not unknown:
        return ""
    fact = f": the byte table gives {counted} bytes, its decoded text has {size}"
    if unknown:
        return f"{fact}; it holds {unknown} unknown pieces, whose text is lost: the tokenizer needs byte fallback"
    if "\ufffd" in text:
        return f"{fact}; its byte pieces are not valid UTF-8"
    return fact


def report(folder, sizes):
    """The lines to print about a dataset that passed."""
    train, val = sizes["train"], sizes["val"]
    return [
        *(f"{folder}: {split} {size.shards} shards, {size.tokens:,} tokens, {size.documents:,} documents"
          for split, size in sizes.items()),
        f"{folder}: the byte table equals the decoded text in each of {val.documents:,} validation documents: "
        f"{val.text_bytes:,} bytes, {val.text_bytes / max(val.tokens, 1):.3f} a token",
        f"{folder}: {input_line(val)}",
        f"{folder}: none of them is among the {train.documents:,} training documents",
        fineweb_line(val),
    ]


def input_line(val):
    """How the decoded text compares with the text that went in."""
    if val.input_bytes is None:
        return "only the decoded text was compared: no manifest.json records the bytes of the text that went in"
    if val.difference:
        fact = f"the text that went in has {val.input_bytes:,} bytes, which the score counts"
        return f"{fact}; it differs {val.difference}"
    return "the decoded text has the bytes of the text that went in, in each document"


def fineweb_line(val):
    """How the validation split compares with the one of the leaderboard."""
    expected = f"FineWeb's {FINEWEB_VAL_DOCUMENTS:,} validation documents have {FINEWEB_VAL_BYTES:,} bytes"
    if (val.documents, val.text_bytes) == (FINEWEB_VAL_DOCUMENTS, FINEWEB_VAL_BYTES):
        return f"{expected}, and so has this split"
    return f"{expected}; this is another text: its bits per byte do not compare with the leaderboard's"


if __name__ == "__main__":
    from command_line import not_a_command

    not_a_command("tools/prepare_data.py")
