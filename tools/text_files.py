"""Text files as documents: .txt, .jsonl (each plain or .gz, .xz, .zst) and .parquet, in blocks of bounded size.

A reader cuts a file into blocks at document borders, which is cheap; `parse_block` makes strings of a block, which is
not, and can happen in another process. Neither holds more than a block and one document.
"""

import gzip
import json
import lzma
import zlib
from pathlib import Path
from typing import NamedTuple

from shard_io import UserError

BLOCK_BYTES = 1 << 20
MAX_DOCUMENT_BYTES = 8 << 20  # SentencePiece takes 95 bytes of memory for each
PARQUET_ROWS = 256  # documents of a block: about 1 MiB of web pages
DATA_REQUIREMENTS = "pip install -r requirements-data.txt"
FORMATS = (".txt", ".jsonl", ".parquet")
COMPRESSIONS = ("", ".gz", ".xz", ".zst")
SUFFIXES = tuple(name + packed for name in FORMATS[:2] for packed in COMPRESSIONS) + FORMATS[2:]


class Layout(NamedTuple):
    """How documents lie in the files."""

    field: str = "text"  # of a JSON line, and the column of a parquet file
    separator: str = "<|endoftext|>"  # between the documents of a .txt file


class Block(NamedTuple):
    """Some consecutive whole documents of one file; `payload` is bytes of the file or, of a parquet file, strings."""

    path: str
    first: int  # number of its first line, or row
    payload: bytes | list


def find_files(paths, option):
    """The text files among `paths`, folders replaced by the text files in them (recursively, sorted)."""
    files = []
    for path in paths:
        if not path.exists():
            raise UserError(f"{option} {path}: no such file or folder")
        inside = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
        known = [file for file in inside if file.name.endswith(SUFFIXES)]
        if not known:
            raise UserError(f"{option} {path}: no text there; expected a file or folder of {', '.join(SUFFIXES)}")
        files += known
    return files


def file_format(path):
    """'.txt', '.jsonl' or '.parquet', whatever the file is compressed with."""
    path = Path(path)
    return Path(path.stem).suffix if path.suffix in COMPRESSIONS else path.suffix


def read_blocks(path, layout):
    """Yield a file's Blocks in their order; UserError names the file if it is damaged or cannot be read."""
    try:
        if file_format(path) == ".parquet":
            yield from _parquet_blocks(path, layout.field)
        else:
            border = b"\n" if file_format(path) == ".jsonl" else layout.separator.encode()
            yield from _cut_at_borders(path, border)
    except (EOFError, lzma.LZMAError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path}: damaged or cut short: {error}") from None


def _cut_at_borders(path, border):
    """Blocks of about BLOCK_BYTES that end after a border, the last one at the end of the file."""
    held, line = bytearray(), 1
    for chunk in _chunks(path):
        searched = max(len(held) - len(border) + 1, 0)
        held += chunk
        end = held.rfind(border, searched) + len(border)
        if end >= len(border):
            yield Block(str(path), line, bytes(held[:end]))
            line += held.count(b"\n", 0, end)
            del held[:end]
        if len(held) > MAX_DOCUMENT_BYTES:
            raise UserError(
                f"{path}: line {line} begins a document of more than {MAX_DOCUMENT_BYTES >> 20} MiB; "
                f"expected {border.decode()!r} between documents (of a .txt: --separator)"
            )
    if held:
        yield Block(str(path), line, bytes(held))


def _chunks(path):
    """A file's bytes, decompressed, in chunks of about BLOCK_BYTES."""
    if path.suffix == ".zst":
        yield from _zstd_chunks(path)
        return
    opener = {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix, open)
    with opener(path, "rb") as file:
        while chunk := file.read(BLOCK_BYTES):
            yield chunk


def _zstd_chunks(path):
    """As `_chunks`; the library's own stream reader takes a file that is cut short for a whole one."""
    zstandard = _optional("zstandard", path)
    frame = None
    with open(path, "rb") as file:
        while packed := file.read(BLOCK_BYTES // 8):
            while packed:
                frame = frame or zstandard.ZstdDecompressor().decompressobj()
                try:
                    yield frame.decompress(packed)
                except zstandard.ZstdError as error:
                    raise UserError(f"{path}: damaged or cut short: {error}") from None
                packed, frame = (frame.unused_data, None) if frame.eof else (b"", frame)
    if frame is not None:
        raise EOFError("the last frame is not complete")


def _parquet_blocks(path, field):
    """Blocks of rows; the memory this needs is that of one row group of the column."""
    parquet, arrow = _optional("pyarrow.parquet", path), _optional("pyarrow", path)
    try:
        with parquet.ParquetFile(path) as file:
            if field not in file.schema_arrow.names:
                raise UserError(f"{path}: no column {field!r}; it has {', '.join(file.schema_arrow.names)} (--field)")
            row = 1
            for batch in file.iter_batches(batch_size=PARQUET_ROWS, columns=[field]):
                yield Block(str(path), row, batch.column(0).to_pylist())
                row += len(batch)
    except (arrow.ArrowException, OSError) as error:
        raise UserError(f"{path}: damaged or not a parquet file: {error}") from None


def _optional(module, path):
    """Import a package that only some formats need."""
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError:
        raise UserError(f"{path}: reading it needs {module.partition('.')[0]} ({DATA_REQUIREMENTS})") from None


def parse_block(block, layout):
    """The block's documents as strings that UTF-8 can hold; UserError names file and line of one that is none."""
    if isinstance(block.payload, list):
        texts = [_checked(text, f"{block.path}: row {block.first + i}") for i, text in enumerate(block.payload)]
    elif file_format(block.path) == ".jsonl":
        lines = block.payload.split(b"\n")
        texts = [
            _json_text(line, layout.field, f"{block.path}: line {block.first + i}")
            for i, line in enumerate(lines)
            if line and not line.isspace()
        ]
    else:
        texts = _plain_texts(block, layout.separator)
    return texts


def _json_text(line, field, place):
    try:
        value = json.loads(line.decode("utf-8-sig"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"{place}: not JSON in UTF-8: {error}") from None
    if not isinstance(value, dict) or field not in value:
        raise UserError(f"{place}: expected a JSON object with the field {field!r} (--field)")
    return _checked(value[field], place)


def _checked(text, place):
    """The string, lone surrogates (JSON can spell them, UTF-8 cannot) replaced by U+FFFD."""
    if not isinstance(text, str):
        raise UserError(f"{place}: the text is {type(text).__name__}, expected a string")
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text


def _plain_texts(block, separator):
    """The documents of a piece of a .txt file, without the line breaks next to a separator."""
    try:
        text = block.payload.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = block.first + block.payload.count(b"\n", 0, error.start)
        raise UserError(f"{block.path}: line {line}: not UTF-8: {error.reason}") from None
    return [document.strip("\r\n") for document in text.split(separator)]
