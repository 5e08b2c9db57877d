"""From documents to token shards: the split by hash, tokenizers, and encoding on all cores in a fixed order.

Memory is bounded by a few blocks a worker (text_files.BLOCK_BYTES), whatever the size of the input. What is written
depends on the input, its order and the options, never on the number of workers.
"""

import hashlib
import io
import itertools
import multiprocessing
import os
import signal
import unicodedata
from collections import Counter, deque
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import NamedTuple

import numpy as np
import sentencepiece
from shard_io import BOS_ID, EOS_ID, MAX_VOCAB_SIZE, PAD_ID, UNK_ID, UserError
from text_files import parse_block, read_blocks

BLOCKS_AHEAD = 3  # a worker, submitted and not yet written
TOKENIZER_SAMPLE_BYTES = 64 << 20
KEY_BYTES = 16
IGNORED_IN_KEY = bytes(range(33)) + b"\x7f"  # ASCII control characters and the space


# -------------------------------------------------------------------------------------------------- tokenizers


def train_tokenizer(documents, vocab_size):
    """Train a BPE model whose decode(encode(text)) is the text; returns the serialized model.

    No normalization, no dummy prefix, spaces and newlines kept ("\\n\\n" and ".\\n" become pieces), rare characters as
    bytes. One thread: the model depends on the text and the vocabulary size only. UserError if the text is too small.
    """
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(documents),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            pad_id=PAD_ID,
            bos_id=BOS_ID,
            eos_id=EOS_ID,
            unk_id=UNK_ID,
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            max_sentence_length=1 << 30,
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise UserError(f"--vocab-size {vocab_size}: cannot be trained on this text: {error}") from None
    return model.getvalue()


def load_tokenizer(path, option="--tokenizer"):
    """(serialized model, processor); UserError unless it is a SentencePiece model that can make shards."""
    try:
        model = path.read_bytes()
        processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    except OSError as error:
        raise UserError(f"{option} {path}: {error.strerror}; expected a SentencePiece model") from None
    except RuntimeError:
        raise UserError(f"{option} {path}: not a SentencePiece model") from None
    if processor.bos_id() < 0 or processor.vocab_size() > MAX_VOCAB_SIZE:
        raise UserError(
            f"{option} {path}: {processor.vocab_size()} pieces and BOS id {processor.bos_id()}; "
            f"expected at most {MAX_VOCAB_SIZE} pieces and a BOS piece"
        )
    return model, processor


def encode_documents(processor, documents):
    """All documents as one uint16 array: BOS, then the pieces, document after document."""
    ids = processor.encode(documents, add_bos=True, num_threads=1)
    return np.fromiter(itertools.chain.from_iterable(ids), dtype=np.uint16, count=sum(map(len, ids)))


# -------------------------------------------------------------------------------------------------- split


class Split(NamedTuple):
    """Which documents are held out: a fraction of them by hash, or a given set (and then no other)."""

    val_fraction: float
    val_keys: frozenset = frozenset()

    def of(self, key):
        """'train' or 'val', or None for a training document that is to be left out."""
        if key in self.val_keys:
            return None
        return "val" if int.from_bytes(key[:8], "big") < self.val_fraction * 2**64 else "train"


ALL_VAL = Split(val_fraction=1.0)


def document_key(text):
    """128-bit hash of a text, the same for texts that differ in white space or Unicode form only.

    Tokenizers make such texts equal; they have to be on the same side of the split.
    """
    if not text.isascii():
        text = unicodedata.normalize("NFKC", text)
    return hashlib.blake2b(text.encode().translate(None, IGNORED_IN_KEY), digest_size=KEY_BYTES).digest()


def read_documents(files, layout):
    """All documents of the files in their order, empty ones left out, as (key, text)."""
    for file in files:
        for block in read_blocks(file, layout):
            for text in parse_block(block, layout):
                if text and not text.isspace():
                    yield document_key(text), text


def tokenizer_sample(documents, split, max_bytes=TOKENIZER_SAMPLE_BYTES):
    """The training texts with the smallest hashes, at most `max_bytes` of UTF-8, in the order of the input.

    All of them if they fit. Which ones depends on the set of documents only; memory stays within a document of twice that.
    """
    bound, sample = 1 << 64, []
    size = 0
    for key, text in documents:
        # the last bytes: the first ones decide the split
        rank = int.from_bytes(key[-8:], "big")
        if rank >= bound or split.of(key) != "train":
            continue
        sample.append((rank, text))
        size += len(text.encode())
        while size > max_bytes:
            bound >>= 1
            sample = [(rank, text) for rank, text in sample if rank < bound]
            size = sum(len(text.encode()) for _, text in sample)
    return [text for _, text in sample]


# -------------------------------------------------------------------------------------------------- encoding


class Encoded(NamedTuple):
    """What a block became: uint16 token ids of each split, and counts such as ('train', 'documents')."""

    ids: dict
    counts: Counter


class Encoder:
    """Turns blocks into tokens; built once in each worker."""

    def __init__(self, model, layout, split):
        self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        self._layout, self._split = layout, split

    def __call__(self, block):
        texts, counts = {"train": [], "val": []}, Counter()
        for text in parse_block(block, self._layout):
            if not text or text.isspace():
                counts["empty"] += 1
                continue
            side = self._split.of(document_key(text))
            if side is None:
                counts["in val"] += 1
                continue
            texts[side].append(text)
            counts[side, "documents"] += 1
            counts[side, "bytes"] += len(text.encode())
        ids = {side: encode_documents(self._processor, some) for side, some in texts.items() if some}
        return Encoded(ids, counts)


_worker = {}  # in a worker process: its Encoder


def _start_worker(*encoder_args):
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process ends the workers
    _worker["encode"] = Encoder(*encoder_args)


def _encode_in_worker(block):
    return _worker["encode"](block)


def encode_blocks(blocks, model, layout, split, workers):
    """Yield an Encoded for each block, in order, encoded by `workers` processes (1: in this one)."""
    if workers == 1:
        yield from map(Encoder(model, layout, split), blocks)
        return
    # spawn: a forked child of a process with threads may hang, and the parent may have imported torch
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, _start_worker, (model, layout, split))
    try:
        yield from _map_in_order(pool, _encode_in_worker, blocks, workers * BLOCKS_AHEAD)
    except BrokenProcessPool:
        raise UserError(f"--workers {workers}: a worker was killed; is there memory for fewer only?") from None
    finally:
        pool.shutdown(cancel_futures=True)


def _map_in_order(pool, function, items, window):
    """pool.map with at most `window` results ahead of the consumer, which bounds the memory."""
    pending = deque()
    for item in items:
        pending.append(pool.submit(function, item))
        if len(pending) == window:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


def usable_cores():
    """The cores this process may run on."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not Linux
        return os.cpu_count() or 1
