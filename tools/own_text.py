#!/usr/bin/env python3
"""What `run_demo.sh --text` makes of a user's files: the name of their data set, its vocabulary, the share held out.

    own_text.py FILE... [--most-pieces N]

Prints them with blanks between. The name holds a hash of what the files contain, in any order and under any name, so the
same text finds its shards again and a changed one gets its own.
"""

import hashlib
from collections import Counter
from pathlib import Path

from command_line import OneLineParser, run_command, start
from encode_text import read_documents
from shard_io import UserError, sha256_file
from text_files import Layout, file_format, find_files

MOST_PIECES = 4096  # the demo's, for 7.7 MB (RESULTS.md R002: 8,192 are worse after a minute of training)
FEWEST_PIECES = 512  # 256 of them are bytes
BYTES_A_PIECE = 1000  # as in the demo, 1,900; half of it, since a larger vocabulary does little harm
PACKED = 4  # what compression and parquet make of text, roughly
SAMPLE_BYTES = 4 << 20  # of text, whose characters stand for all
COVERAGE = 0.9995  # of the characters are pieces, SentencePiece's default; the others are spelled in bytes
VAL_BYTES, VAL_SHARES = 500_000, (0.01, 0.1)  # held out: about the demo's 600 KB, within these shares


def content_name(files):
    """text_<hash> of what the files hold and of how it is to be read."""
    contents = sorted(f"{sha256_file(path)} {path.suffix} {file_format(path)}" for path in files)
    return f"text_{hashlib.sha256(chr(10).join(contents).encode()).hexdigest()[:12]}"


def text_bytes(files):
    """About how many bytes of text the files hold."""
    return sum(path.stat().st_size * (1 if path.suffix == file_format(path) != ".parquet" else PACKED) for path in files)


def alphabet_size(files):
    """How many characters a tokenizer of the text has as pieces, counted on its beginning."""
    counts, size = Counter(), 0
    for _, text in read_documents(files, Layout()):
        counts.update(text)
        size += len(text.encode())
        if size >= SAMPLE_BYTES:
            break
    left = COVERAGE * counts.total()
    for rank, (_, count) in enumerate(counts.most_common(), 1):
        left -= count
        if left <= 0:
            return rank
    return 0


def choose_pieces(size, alphabet, most):
    """A power of two: as many pieces as the text trains well, at most `most` unless its alphabet needs more."""
    wanted = max(FEWEST_PIECES, min(size // BYTES_A_PIECE, most))
    pieces = 1 << (wanted.bit_length() - 1)
    while pieces < 256 + 2 * alphabet and pieces < 1 << 16:
        pieces *= 2
    return pieces


def choose_val_fraction(size):
    low, high = VAL_SHARES
    return min(high, max(low, VAL_BYTES / max(size, 1)))


def main(argv=None):
    parser = OneLineParser(__doc__)
    parser.add_argument("input", type=Path, nargs="+", metavar="FILE", help="text files, or folders of them")
    parser.add_argument("--most-pieces", type=int, default=MOST_PIECES, metavar="N", help="default: %(default)s")
    args = parser.parse_args(argv)
    return run_command(lambda: show_plan(args), UserError, name="own_text.py")


def show_plan(args):
    files = find_files(args.input, "--text")
    size = text_bytes(files)
    pieces = choose_pieces(size, alphabet_size(files), args.most_pieces)
    print(content_name(files), pieces, f"{choose_val_fraction(size):.4f}")


if __name__ == "__main__":
    start(main)
