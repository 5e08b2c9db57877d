"""From documents to token shards: the split by hash, tokenizers, and encoding on all cores in a fixed order.

Memory is bounded by a few blocks a worker (text_files.BLOCK_BYTES), whatever the size of the input. What is written
depends on the input, its order and the options, never on the number of workers.
"""

import hashlib
import io
import itertools
import multiprocessing
import os
import re
import signal
import unicodedata
from bisect import bisect_left
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
SAMPLE_PART_CHARS = 1 << 20
KEY_BYTES = 16
IGNORED_IN_KEY = bytes(range(33)) + b"\x7f"  # ASCII control characters and the space
META_SPACE = "\u2581"  # what SentencePiece makes of a space
RARE_SPACE = 0.001  # of the text's characters; from half of it on SentencePiece's own coverage has the space
# SentencePiece's trainer counts a word's characters (spaces, then others) in 16 bits; a longer word ends the process
LONG_RUN = re.compile(r"[^ \u2581]{16384}|[ \u2581]{16384}")
MAX_PIECE_CHARS = 16  # as SentencePiece trains them by default
WINDOW_CHARS, CONTEXT_CHARS = 1 << 18, 1 << 12  # of a long text, encoded in windows that share some of it
# what may hold many combining marks in a row (the halfwidth voiced marks are letters that become some)
MARKS = re.compile(r"(?:[^\w\s\x00-\x7f]|[\uff9e\uff9f]){31,}")
STREAM_SAFE = "\u034f"  # Unicode's stream-safe text has one, a starter, after 30 of them


# -------------------------------------------------------------------------------------------------- tokenizers


def train_tokenizer(documents, vocab_size, coverage=None):
    """Train a BPE model whose decode(encode(text)) is the text; returns the serialized model.

    No normalization, no dummy prefix, spaces and newlines kept ("\\n\\n" and ".\\n" become pieces), rare characters as
    bytes: those beyond `coverage` of the text (default: SentencePiece's). One thread: the model depends on the text and
    the options only. It runs in a process of its own, since a failed check of the library ends the process. UserError if
    the text is too small.
    """
    options = {}
    if coverage is not None:  # SentencePiece itself takes .98 at least
        documents, options["character_coverage"] = without_rare_characters(documents, coverage), 1.0
    sentences = [part for document in documents for part in split_long_runs(document)]
    if sum(sentence.count(" ") for sentence in sentences) < RARE_SPACE * sum(map(len, sentences)):
        # a vocabulary without it spells a space in the three bytes of U+2581; the trainer wants to see what it requires
        options["required_chars"] = META_SPACE
        sentences.append(" ")
    try:
        return run_apart(_train_bpe, sentences, vocab_size, options)
    except ChildProcessError as error:
        fact = f"SentencePiece's trainer {error}; is there enough memory?"
        raise UserError(f"--vocab-size {vocab_size}: {fact}") from None
    except RuntimeError as error:
        reason = re.sub(r"^Internal: \S+ \[.*\] ", "", str(error))
        reason = reason.replace("--character_coverage", "--character-coverage")
        raise UserError(f"--vocab-size {vocab_size}: cannot be trained on this text: {reason}") from None


def split_long_runs(document):
    """The document in parts whose words the trainer can hold; text with a space now and then stays whole."""
    start = 0
    for run in LONG_RUN.finditer(document):
        yield document[start : run.end()]
        start = run.end()
    yield document[start:]


def without_rare_characters(documents, coverage):
    """Parts of the documents without the rarest characters, those that `coverage` of all of the text do not need."""
    counts = Counter()
    for document in documents:
        counts.update(document)
    room, rare = (1 - coverage) * counts.total(), []
    for character, count in sorted(counts.items(), key=lambda item: (item[1], item[0])):
        room -= count
        if room < 0:
            break
        rare.append(character)
    if not rare:
        return documents
    pattern = re.compile(f"[{''.join(map(re.escape, rare))}]+")
    return [part for document in documents for part in pattern.split(document) if part]


def _train_bpe(sentences, vocab_size, options):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
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
        **options,
    )
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
    bos = processor.bos_id()
    if bos < 0 or not processor.is_control(bos) or processor.vocab_size() > MAX_VOCAB_SIZE:
        raise UserError(
            f"{option} {path}: {processor.vocab_size()} pieces and BOS id {bos}; "
            f"expected at most {MAX_VOCAB_SIZE} pieces and a BOS piece, a control piece that no text becomes"
        )
    return model, processor


class TokenizerKind(NamedTuple):
    """What a SentencePiece model does to the lengths of a text, read in the model itself."""

    normalization: str  # "" if a text stays as it is
    dummy_prefix: bool
    space_is_suffix: bool

    @classmethod
    def read(cls, processor):
        """From the model's protocol buffer (sentencepiece_model.proto): 2 is TrainerSpec, 3 NormalizerSpec."""
        model = proto_fields(processor.serialized_model_proto())
        trainer, normalizer = (proto_fields(model.get(field, b"")) for field in (2, 3))
        rules = [normalizer.get(1, b"").decode(errors="replace") or "rules of its own"] if normalizer.get(2) else []
        rules += ["extra spaces removed"] if normalizer.get(4, 1) else []
        return cls(", ".join(rules), bool(normalizer.get(3, 1)), bool(trainer.get(24, 0)))


def proto_fields(data):
    """{number: last value} of a protocol buffer's message: an int, or bytes of what has a length."""
    fields, at = {}, 0

    def varint():
        nonlocal at
        value, shift = 0, 0
        while True:
            byte, at = data[at], at + 1
            value |= (byte & 127) << shift
            if byte < 128:
                return value
            shift += 7

    while at < len(data):
        number, wire = divmod(varint(), 8)
        size = {1: 8, 5: 4}.get(wire, 0) if wire != 2 else varint()
        fields[number] = varint() if wire == 0 else data[at : at + size]
        at += size
    return fields


def encode_documents(processor, documents):
    """All documents as one uint16 array: BOS, then the pieces, document after document."""
    if max(map(len, documents), default=0) <= WINDOW_CHARS:
        ids = processor.encode(documents, add_bos=True, num_threads=1)
    else:
        bos = [processor.bos_id()]
        ids = (part for text in documents for part in itertools.chain([bos], encode_long(processor, text)))
    # at once: an id in a list takes 36 bytes
    parts = [np.array(part, dtype=np.uint16) for part in ids]
    return np.concatenate(parts) if parts else np.zeros(0, dtype=np.uint16)


def encode_long(processor, text):
    """Yield the ids of a text of any length, in lists, from windows of it: SentencePiece takes 95 bytes for one of text.

    Two windows share CONTEXT_CHARS. They join at the place nearest to the middle of what they share where both have a
    border of pieces: so far from a window's ends the pieces are those of the whole text.
    """
    first, start = 0, 0
    window = Window(processor, text, start)
    while start + WINDOW_CHARS < len(text):
        end = start + WINDOW_CHARS
        middle, begins = end - CONTEXT_CHARS // 2, window.begins(end - CONTEXT_CHARS, end)
        for start in range(end - CONTEXT_CHARS, end - CONTEXT_CHARS + MAX_PIECE_CHARS):
            following = Window(processor, text, start)
            if borders := begins & following.begins(start + 1, end):
                break  # else it is one run of, say, spaces, in pieces of another phase; the next start has another
        # without any (an unknown word as long as that is one piece) the middle will do
        border = min(borders, key=lambda begin: (abs(begin - middle), begin), default=middle)
        yield window.ids[first : bisect_left(window, border)]
        window, first = following, bisect_left(following, border)
    yield window.ids[first:]


class Window:
    """A part of a text, its ids, and where in the text its pieces begin."""

    def __init__(self, processor, text, start):
        part = text[start : start + WINDOW_CHARS]
        self.ids = processor.encode(part)
        self._start, self._pieces = start, processor.encode(part, out_type="immutable_proto").pieces

    def begins(self, low, high):
        """Where pieces begin from `low` to `high`."""
        return {self[number] for number in range(bisect_left(self, low), bisect_left(self, high))}

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, number):
        return self._start + self._pieces[number].begin


# -------------------------------------------------------------------------------------------------- split


class Split(NamedTuple):
    """Which documents are held out: a fraction of them by hash, or a given set (and then no other)."""

    val_fraction: float
    val_keys: frozenset = frozenset()
    least: int = 0  # hold out the keys below it in any case

    def of(self, key):
        """'train' or 'val', or None for a training document that is to be left out."""
        if key in self.val_keys:
            return None
        return "val" if int.from_bytes(key[:8], "big") < max(self.val_fraction * 2**64, self.least) else "train"


ALL_VAL = Split(val_fraction=1.0)


def document_key(text):
    """128-bit hash of a text, the same for texts that differ in white space or Unicode form only.

    Tokenizers make such texts equal; they have to be on the same side of the split.
    """
    if not text.isascii():
        # Python sorts a run of combining marks in quadratic time
        text = unicodedata.normalize("NFKC", MARKS.sub(_stream_safe, text))
    text = text.replace(META_SPACE, "")
    return hashlib.blake2b(text.encode().translate(None, IGNORED_IN_KEY), digest_size=KEY_BYTES).digest()


def _stream_safe(run):
    """The run with a starter after each 30 characters in a row that are, or become, combining marks."""
    parts, marks = [], 0
    for character in run[0]:
        is_mark = unicodedata.combining(unicodedata.normalize("NFKD", character)[0]) != 0
        marks = marks + 1 if is_mark else 0
        if marks > 30:
            parts.append(STREAM_SAFE)
            marks = 1
        parts.append(character)
    return "".join(parts)


def read_documents(files, layout):
    """All documents of the files in their order, empty ones left out, as (key, text)."""
    for file in files:
        for block in read_blocks(file, layout):
            for text in parse_block(block, layout):
                if text and not text.isspace():
                    yield document_key(text), text


def tokenizer_sample(documents, split, max_bytes=TOKENIZER_SAMPLE_BYTES):
    """The training texts with the smallest hashes, at most `max_bytes` of UTF-8, in the order of the input.

    All of them if they fit; of long documents, parts. Which ones depends on the set of documents only; memory stays
    within a document of twice that.
    """
    bound, sample = 1 << 64, []
    size = 0
    for rank, text in _sample_parts(documents, split):
        if rank >= bound:
            continue
        sample.append((rank, text))
        size += len(text.encode())
        while size > max_bytes:
            bound >>= 1
            sample = [(rank, text) for rank, text in sample if rank < bound]
            size = sum(len(text.encode()) for _, text in sample)
    return [text for _, text in sample]


def _sample_parts(documents, split):
    """(rank, text) of the training documents, the long ones in parts."""
    for key, text in documents:
        if split.of(key) == "train":
            for start in range(0, len(text), SAMPLE_PART_CHARS):
                part_key = key if start == 0 else hashlib.blake2b(key + start.to_bytes(8, "big")).digest()
                # the last bytes: the first ones decide the split
                yield int.from_bytes(part_key[-8:], "big"), text[start : start + SAMPLE_PART_CHARS]


def without_empty_val(split, keys):
    """The split, or one that holds out the document with the smallest key, if it would hold out none of several."""
    lowest, several = None, False
    for key in keys:
        if split.of(key) == "val":
            return split
        several = several or lowest is not None and key != lowest
        lowest = key if lowest is None else min(lowest, key)
    return split._replace(least=int.from_bytes(lowest[:8], "big") + 1) if several else split


# -------------------------------------------------------------------------------------------------- encoding


class Encoded(NamedTuple):
    """What a block became: uint16 ids of each split, counts such as ('train', 'documents'), bytes of val's documents."""

    ids: dict
    counts: Counter
    val_bytes: list


class Encoder:
    """Turns blocks into tokens; built once in each worker."""

    def __init__(self, model, layout, split):
        self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        self._layout, self._split = layout, split

    def __call__(self, block):
        texts, counts, val_bytes = {"train": [], "val": []}, Counter(), []
        for text in parse_block(block, self._layout):
            if text is None:
                counts["refused"] += 1
                continue
            if not text or text.isspace():
                counts["empty"] += 1
                continue
            side = self._split.of(document_key(text))
            if side is None:
                counts["duplicate"] += 1
                continue
            size = len(text.encode())
            texts[side].append(text)
            counts[side, "documents"] += 1
            counts[side, "bytes"] += size
            if side == "val":
                val_bytes.append(size)
        ids = {side: encode_documents(self._processor, some) for side, some in texts.items() if some}
        for some in ids.values():
            counts["unknown"] += int(np.count_nonzero(some == self._processor.unk_id()))
        return Encoded(ids, counts, val_bytes)


_worker = {}  # in a worker process: its Encoder


def _start_worker(*encoder_args):
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process ends the workers
    _worker["encode"] = Encoder(*encoder_args)


def _encode_in_worker(block):
    return _worker["encode"](block)


def run_apart(function, *args):
    """function(*args) in a process of its own. ChildProcessError if that is ended; the function's own RuntimeError."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_run_and_send, args=(sender, function, args), daemon=True)
    child.start()
    sender.close()
    try:
        value, failure = receiver.recv()
    except EOFError:
        child.join()
        raise ChildProcessError(f"ended with exit code {child.exitcode}") from None
    finally:
        child.kill()
        child.join()
    if failure is not None:
        raise RuntimeError(failure)
    return value


def _run_and_send(sender, function, args):
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process ends this one
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # a library's last words, which are not one line
    try:
        sender.send((function(*args), None))
    except RuntimeError as error:
        sender.send((None, str(error)))


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


if __name__ == "__main__":
    from command_line import not_a_command

    not_a_command("tools/prepare_data.py")
