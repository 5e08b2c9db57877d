"""Text files as documents: .txt, .jsonl, .json (each plain or .gz, .xz, .zst) and .parquet, in blocks of bounded size.

A reader cuts a file into blocks at document borders, which is cheap; `parse_block` makes strings of a block, which is
not, and can happen in another process. Neither holds more than a block and one document (of .json: one array).
"""

import contextlib
import gzip
import json
import lzma
import os
import re
import zlib
from collections import Counter, deque
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from shard_io import MANIFEST, UserError

BLOCK_BYTES = 1 << 20
MAX_DOCUMENT_BYTES = 1 << 30  # a document takes up to ten times its size of memory while it is read and encoded
PARQUET_ROWS = 256  # documents of a block: about 1 MiB of web pages
MAX_ZSTD_WINDOW = 1 << 31  # what `zstd --long=31` writes; a frame takes its window of memory
DATA_REQUIREMENTS = "pip install -r requirements-data.txt"
FORMATS = (".txt", ".jsonl", ".json", ".parquet")
COMPRESSIONS = ("", ".gz", ".xz", ".zst")
SUFFIXES = tuple(name + packed for name in FORMATS[:3] for packed in COMPRESSIONS) + FORMATS[3:]
BOM = "\ufeff"
JSON_TYPES = {type(None): "null", bool: "a boolean", float: "a number", list: "an array", dict: "an object"}

# A .txt file without the separator, if it is the only file or a long one, is cut at blank lines into documents.
LONG_TXT_BYTES = 1 << 20
CUT_BYTES = (256, 4096)  # a document's size: a sixteenth of the file within these bounds, up to the next blank line
CUT_STRETCH = 4  # without a blank line before so many times that size: at a line's end, a space, a character
BLANK_LINE = re.compile(rb"\n[ \t\r]*\n")


class Layout(NamedTuple):
    """How documents lie in the files, and what is done with one that is none."""

    field: str = "text"  # of a JSON object, and the column of a parquet file
    separator: str = "<|endoftext|>"  # between the documents of a .txt file
    skip_bad: bool = False  # leave a broken document out and count it as refused, instead of stopping
    alone: frozenset = frozenset()  # file_identity of .txt files that are cut, if no separator is there, at any size


class Block(NamedTuple):
    """Some consecutive whole documents of one file."""

    path: str
    first: int  # number of its first line, row or document
    payload: bytes | list  # the file's bytes; or parsed JSON, rows, (bytes, line) of documents


class Place(NamedTuple):
    """Where a document begins."""

    path: str
    kind: str  # what is counted: line, row, document
    number: int

    def __str__(self):
        return f"{self.path}: {self.kind} {self.number}"


# -------------------------------------------------------------------------------------------------- files


def find_files(paths, option, report=None):
    """The text files among `paths`, folders replaced by the text files in them (recursively, sorted), each file once.

    In a folder what is hidden stays out (.ipynb_checkpoints, macOS's ._files), and what has another suffix.
    report: called with one line for each folder, and for files that were named twice.
    """
    files, seen, again = [], set(), 0
    for path in paths:
        if not path.exists():
            raise UserError(f"{option} {path}: no such file or folder")
        inside, left_out = _files_in(path) if path.is_dir() else ([path], Counter())
        known = [file for file in inside if is_text_file(file)]
        if not known:
            expected = f"expected a file or folder of {', '.join(SUFFIXES)}"
            raise UserError(f"{option} {path}: no text there; {expected}{_found(left_out)}")
        if path.is_dir() and report:
            report(f"{option} {path}: {_kinds(Counter(map(suffix_of, known)))} to read{_found(left_out)}")
        for file in known:
            if (key := file_identity(file)) in seen:
                again += 1
                continue
            seen.add(key)
            files.append(file)
    if again and report:
        report(f"{option}: {again} files are there twice, by another name or a link; each is read once")
    return files


def _files_in(folder):
    """(text files in a folder and the folders below it, sorted; Counter of what else is there by kind)."""
    inside, left_out = [], Counter()

    def stop(error):
        raise error

    for root, folders, names in os.walk(folder, onerror=stop):
        left_out["hidden"] += sum(name.startswith(".") for name in [*folders, *names])
        links = [name for name in folders if os.path.islink(os.path.join(root, name))]
        left_out["links to folders"] += sum(not name.startswith(".") for name in links)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for path in (Path(root, name) for name in names if not name.startswith(".")):
            if path.name == MANIFEST:
                left_out[MANIFEST] += 1  # ours, of a dataset in there
            elif is_text_file(path):
                inside.append(path)
            elif path.is_file():
                left_out[suffix_of(path) or "without suffix"] += 1
            else:
                left_out["no regular files"] += 1
    return sorted(inside), +left_out


def is_text_file(path):
    return path.is_file() and path.name.lower().endswith(SUFFIXES)


def suffix_of(path):
    """'.jsonl.gz' of 'C.v2.JSONL.gz': the name's kind, with the compression."""
    name = Path(path.name.lower())
    return Path(name.stem).suffix + name.suffix if name.suffix in COMPRESSIONS[1:] else name.suffix


def file_identity(path):
    """What is the same for two names of one file."""
    status = path.stat()
    return status.st_dev, status.st_ino


def _kinds(counts):
    return ", ".join(f"{number} {kind}" for kind, number in sorted(counts.items()))


def _found(left_out):
    return f"; left out: {_kinds(left_out)}" if left_out else ""


def file_format(path):
    """'.txt', '.jsonl', '.json' or '.parquet', whatever the file is compressed with."""
    path = Path(str(path).lower())
    return Path(path.stem).suffix if path.suffix in COMPRESSIONS else path.suffix


# -------------------------------------------------------------------------------------------------- blocks


def read_blocks(path, layout):
    """Yield a file's Blocks in their order; UserError names the file if it is damaged or cannot be read."""
    readers = {".parquet": _parquet_blocks, ".json": _json_blocks, ".jsonl": _line_blocks, ".txt": _txt_blocks}
    with _named_errors(path):
        yield from readers[file_format(path)](path, layout)


@contextlib.contextmanager
def _named_errors(path):
    """Errors of reading and unpacking as a UserError that names the file."""
    try:
        yield
    except (EOFError, lzma.LZMAError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path}: damaged or cut short: {error}") from None
    except OSError as error:  # of a read: the system names no file
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None


def _line_blocks(path, _=None):
    yield from _cut_at_borders(path, b"\n")


def _json_blocks(path, _):
    """A .json file is one array, parsed as a whole, or else lines of JSON."""
    start = b""
    for chunk in _chunks(path):
        start = (start + chunk).removeprefix(BOM.encode()).lstrip()
        if start:
            break
    if start[:1] != b"[":
        yield from _line_blocks(path)
        return
    data = bytearray()
    for chunk in _chunks(path):
        data += chunk
        if len(data) > MAX_DOCUMENT_BYTES:
            limit = f"{MAX_DOCUMENT_BYTES >> 20} MiB"
            raise UserError(f"{path}: an array of more than {limit}; expected one object a line (.jsonl)")
    items = _parse_json(bytes(data), str(path))
    for start in range(0, len(items), PARQUET_ROWS):
        yield Block(str(path), 1 + start, items[start : start + PARQUET_ROWS])


def _txt_blocks(path, layout):
    if size := cut_size(path, layout):
        yield from _cut_at_blank_lines(path, size)
    else:
        yield from _cut_at_borders(path, layout.separator.encode())


def cut_size(path, layout):
    """The size of the documents that a .txt file without separators is cut into; 0 if it is not cut. Reads the file."""
    with _named_errors(path):
        size = _size_without(path, layout.separator.encode())
    if size is None or not (size > LONG_TXT_BYTES or file_identity(path) in layout.alone):
        return 0
    return min(max(size // 16, CUT_BYTES[0]), CUT_BYTES[1])


def _size_without(path, separator):
    """The file's size, decompressed; None if the separator is in it."""
    size, tail = 0, b""
    for chunk in _chunks(path):
        if separator in tail + chunk:
            return None
        size += len(chunk)
        tail = (tail + chunk)[-len(separator) + 1 :] if len(separator) > 1 else b""
    return size


def _cut_at_borders(path, border):
    """Blocks of about BLOCK_BYTES that end after a border, the last one at the end of the file."""
    held, line, searched = bytearray(), 1, 0
    find = re.compile(re.escape(border)).finditer  # from the left: a border may overlap itself
    for chunk in _chunks(path):
        held += chunk
        if last := deque(find(held, searched), maxlen=1):
            end = last[0].end()
            yield Block(str(path), line, bytes(held[:end]))
            line += held.count(b"\n", 0, end)
            del held[:end]
        searched = max(len(held) - len(border) + 1, 0)
        if len(held) > MAX_DOCUMENT_BYTES:
            raise UserError(
                f"{path}: line {line} begins a document of more than {MAX_DOCUMENT_BYTES >> 20} MiB; "
                f"expected {border.decode()!r} between documents (of a .txt: --separator)"
            )
    if held:
        yield Block(str(path), line, bytes(held))


def _cut_at_blank_lines(path, size):
    """Blocks of documents of at least `size` bytes, up to the next blank line; the same whatever BLOCK_BYTES is."""
    held, line = bytearray(), 1
    for chunk in chain(_chunks(path), [None]):
        held += chunk or b""
        documents, start = [], 0
        while end := _cut_end(held, start, size, at_end=chunk is None):
            documents.append((bytes(held[start:end]), line))
            line += held.count(b"\n", start, end)
            start = end
        if documents:
            yield Block(str(path), documents[0][1], documents)
            del held[:start]


def _cut_end(held, start, size, at_end):
    """Where the document that begins at `start` ends; 0 if that is not to be seen yet, or nothing is left."""
    rest = len(held) - start
    if rest > CUT_STRETCH * size:
        return _cut_place(held, start + size, start + CUT_STRETCH * size)
    if not at_end or not rest:
        return 0
    return len(held) if rest <= 2 * size else _cut_place(held, start + size, len(held))


def _cut_place(data, low, high):
    """Where to cut between two places: after a blank line, or the last line, the last space, the last character."""
    if blank := BLANK_LINE.search(data, low - 1, high):
        return blank.end()
    for border in (b"\n", b" "):
        if (at := data.rfind(border, low, high)) >= 0:
            return at + 1
    while low + 1 < high < len(data) and data[high] & 0xC0 == 0x80:
        high -= 1
    return high


def _chunks(path):
    """A file's bytes, decompressed, in chunks of about BLOCK_BYTES."""
    packed = path.suffix.lower()
    if packed == ".zst":
        yield from _zstd_chunks(path)
        return
    opener = {".gz": gzip.open, ".xz": lzma.open}.get(packed, open)
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
                frame = frame or zstandard.ZstdDecompressor(max_window_size=MAX_ZSTD_WINDOW).decompressobj()
                try:
                    yield frame.decompress(packed)
                except zstandard.ZstdError as error:
                    raise UserError(f"{path}: damaged or cut short: {error}") from None
                packed, frame = (frame.unused_data, None) if frame.eof else (b"", frame)
    if frame is not None:
        raise EOFError("the last frame is not complete")


def _parquet_blocks(path, layout):
    """Blocks of rows; the memory this needs is that of one row group of the column."""
    field = layout.field
    parquet, arrow = _optional("pyarrow.parquet", path), _optional("pyarrow", path)
    try:
        # an open file: arrow takes no path that is not UTF-8
        with open(path, "rb") as handle, parquet.ParquetFile(handle) as file:
            if field not in file.schema_arrow.names:
                raise UserError(f"{path}: no column {field!r}; it has {', '.join(file.schema_arrow.names)} (--field)")
            row = 1
            for batch in file.iter_batches(batch_size=PARQUET_ROWS, columns=[field]):
                yield Block(str(path), row, _rows(arrow, batch.column(0)))
                row += len(batch)
    except (arrow.ArrowException, OSError) as error:
        raise UserError(f"{path}: damaged or not a parquet file: {one_line(error)}") from None


def _rows(arrow, column):
    """A column's values; text as bytes, since arrow does not look whether it is UTF-8."""
    if arrow.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if arrow.types.is_string(column.type) or arrow.types.is_large_string(column.type):
        column = column.cast(arrow.large_binary())
    return column.to_pylist()


def one_line(error):
    return " ".join(str(error).split())


def _optional(module, path):
    """Import a package that only some formats need."""
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError:
        raise UserError(f"{path}: reading it needs {module.partition('.')[0]} ({DATA_REQUIREMENTS})") from None


# -------------------------------------------------------------------------------------------------- documents


def parse_block(block, layout):
    """The block's documents as strings that UTF-8 can hold.

    One that is none is a UserError with file and place or, with layout.skip_bad, None in the list.
    """
    name, is_list = file_format(block.path), isinstance(block.payload, list)
    if name == ".txt":
        make, kind = _plain_text, "line"
        items = block.payload if is_list else _separated(block, layout.separator.encode())
    elif is_list:
        make, kind = (_row_text, "row") if name == ".parquet" else (_object_text, "document")
        items = [(item, block.first + i) for i, item in enumerate(block.payload)]
    else:
        make, kind, items = _line_text, "line", _lines(block)
    texts = []
    for item, number in items:
        try:
            texts.append(make(item, layout.field, Place(block.path, kind, number)))
        except UserError as error:
            if not layout.skip_bad:
                raise UserError(f"{error} (--bad-documents skip leaves such documents out)") from None
            texts.append(None)
    return texts


def _lines(block):
    """(line, number) of the lines that are not blank."""
    lines = (line.removeprefix(BOM.encode()) for line in block.payload.split(b"\n"))
    return [(line, block.first + i) for i, line in enumerate(lines) if line and not line.isspace()]


def _separated(block, separator):
    """(document, number of its first line) of a piece of a .txt file; after its last separator the file may end."""
    items, line = [], block.first
    for document in block.payload.split(separator):
        items.append((document, line))
        line += (document + separator).count(b"\n")
    if not items[-1][0].strip(b"\r\n") or block.payload.endswith(separator):
        items.pop()
    return items


def _parse_json(data, place):
    try:
        # floats: int() refuses thousands of digits, and no number is a text
        return json.loads(data.decode("utf-8-sig"), parse_int=float)
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"{place}: not JSON in UTF-8: {error}") from None


def _line_text(line, field, place):
    return _object_text(_parse_json(line, place), field, place)


def _object_text(value, field, place):
    if not isinstance(value, dict) or field not in value:
        raise UserError(f"{place}: expected a JSON object with the field {field!r} (--field)")
    return _checked(value[field], place)


def _row_text(value, _, place):
    return _decoded(value, place) if isinstance(value, bytes) else _checked(value, place)


def _plain_text(document, _, place):
    """A document of a .txt file, without the byte order mark and the line breaks around it."""
    return _decoded(document, place).strip("\r\n").removeprefix(BOM).lstrip("\r\n")


def _decoded(data, place):
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
            raise UserError(f"{place}: UTF-16 by its first bytes, expected UTF-8") from None
        breaks = data.count(b"\n", 0, error.start) if place.kind == "line" else 0
        raise UserError(f"{place._replace(number=place.number + breaks)}: not UTF-8: {error.reason}") from None


def _checked(text, place):
    """The string, lone surrogates (JSON can spell them, UTF-8 cannot) replaced by U+FFFD; null is an empty text."""
    if text is None:
        return ""
    if not isinstance(text, str):
        raise UserError(f"{place}: the text is {JSON_TYPES.get(type(text), type(text).__name__)}, expected a string")
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text


if __name__ == "__main__":
    from command_line import not_a_command

    not_a_command("tools/prepare_data.py")
