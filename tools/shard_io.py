"""Dataset files: uint16 token shards, written whole or not at all, and the errors a user can cause.

A shard is a header of 256 little-endian int32 (20240520, 1, number of tokens, zeros) and then that many little-endian
uint16 token ids. Every document starts with the BOS id, which stands for 0 bytes of text. A split is its shards in the
order of their names, read as one stream: a document may begin in one shard and end in the next.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
from pathlib import Path

import numpy as np

SHARD_MAGIC = 20240520
SHARD_VERSION = 1
HEADER_INTS = 256
HEADER_BYTES = HEADER_INTS * 4
MAX_VOCAB_SIZE = 1 << 16  # token ids are stored in 16 bits
SPLITS = ("train", "val")
PAD_ID, BOS_ID, EOS_ID, UNK_ID = 0, 1, 2, 3  # as in the official FineWeb tokenizers
MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.model"
# what flock says on file systems without locks (Lustre, some NFS): then two calls on one folder are the user's to avoid
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


class UserError(Exception):
    """Something the user can put right; the command line prints its text as one line and exits with 2."""


def shard_name(split, number):
    return f"fineweb_{split}_{number:06d}.bin"


def shard_paths(folder, split):
    """The shards of a split in `folder`, in their order."""
    return sorted(Path(folder).glob(f"fineweb_{split}_*.bin"))


def shard_header(tokens):
    """The 1,024 header bytes of a shard of `tokens` tokens."""
    header = np.zeros(HEADER_INTS, dtype="<i4")
    header[:3] = SHARD_MAGIC, SHARD_VERSION, tokens
    return header.tobytes()


def read_shard(path):
    """Memory-map a shard's tokens (uint16); UserError if it is not exactly one whole shard."""
    size = os.path.getsize(path)
    header = np.fromfile(path, dtype="<i4", count=HEADER_INTS)
    if len(header) < HEADER_INTS:
        raise UserError(f"{path}: {size} bytes, expected a shard with a header of {HEADER_BYTES} bytes")
    magic, version, tokens = (int(number) for number in header[:3])
    if (magic, version) != (SHARD_MAGIC, SHARD_VERSION):
        raise UserError(f"{path}: header begins with {magic}, {version}, expected {SHARD_MAGIC}, {SHARD_VERSION}")
    expected = HEADER_BYTES + 2 * tokens
    if size != expected:
        raise UserError(f"{path}: {size} bytes, expected {expected} for the {tokens} tokens that its header states")
    return np.memmap(path, dtype="<u2", mode="r", offset=HEADER_BYTES) if tokens else np.zeros(0, dtype="<u2")


class ShardWriter:
    """Writes one split into a (staged) folder as shards of exactly `shard_tokens` tokens, the last one shorter."""

    def __init__(self, folder, split, shard_tokens):
        self._folder, self._split, self._shard_tokens = Path(folder), split, shard_tokens
        self._file, self._in_shard = None, 0
        self.tokens, self.shards = 0, 0

    def write(self, ids):
        """Append token ids, an integer array below 65,536."""
        ids = np.asarray(ids)
        while len(ids):
            if self._file is None:
                self._open()
            part, ids = np.split(ids, [self._shard_tokens - self._in_shard])
            self._file.write(part.astype("<u2", copy=False).tobytes())
            self._in_shard += len(part)
            self.tokens += len(part)
            if self._in_shard == self._shard_tokens:
                self.close()

    def _open(self):
        self._file = open(self._folder / shard_name(self._split, self.shards), "wb")
        self._file.write(shard_header(0))
        self._in_shard = 0
        self.shards += 1

    def close(self):
        """Put the token count into the open shard's header and bring the file to the disk."""
        if self._file is None:
            return
        with self._file as file:
            file.seek(0)
            file.write(shard_header(self._in_shard))
            sync(file)
        self._file = None


def sync(file):
    """Bring a file to the disk, so that a rename after it never shows half of it."""
    file.flush()
    os.fsync(file.fileno())


@contextlib.contextmanager
def replacing(path):
    """A name to write to: when the block ends, what is there takes the place of `path` at once, and is on the disk. If the
    block raises, `path` is as it was; UserError, naming it, where it cannot be written. Its folder is made."""
    partial = path.with_name(f".partial.{os.getpid()}")  # no longer than any name may be
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        with open(partial, "rb+") as file:
            sync(file)
        os.replace(partial, path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror or error}") from None
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def write_text(path, text):
    """Write a file in UTF-8, whole or not at all."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_bytes(path, data):
    """Write `data` into a staged folder."""
    with open(path, "wb") as file:
        file.write(data)
        sync(file)


def write_json(path, value):
    """Write a JSON file: indented, but a list of numbers (there may be millions) on one line."""
    text = json.dumps(value, indent=1)
    text = re.sub(r"\[\n([\s\d,]+)\]", lambda numbers: f"[{' '.join(numbers[1].split())}]", text)
    write_bytes(path, f"{text}\n".encode())


@contextlib.contextmanager
def locked_folder(path, option):
    """Make the folder and hold it; a second process waits. UserError names the option if it cannot be made.

    If the block raises, the folders that were made for it and hold nothing are removed again.
    """
    path, made = Path(path), []
    try:
        handle = _open_and_lock(path, made)
    except OSError as error:
        _remove_empty(made)
        raise UserError(f"{option} {path}: cannot make the folder: {error.strerror}") from None
    try:
        yield path
    except BaseException:
        _remove_empty(made)  # while it is still locked: a process that waits for it makes it anew
        raise
    finally:
        os.close(handle)


def _open_and_lock(path, made):
    """A handle that holds the folder; `made` gets the folders that did not exist, the innermost first."""
    while True:
        missing = [folder for folder in (path, *path.parents) if not folder.exists()]
        made[:] = missing
        path.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
        # whoever held it may have removed it, having failed
        if path.exists() and os.path.samestat(os.fstat(handle), path.stat()):
            return handle
        os.close(handle)


def _remove_empty(folders):
    for folder in folders:
        with contextlib.suppress(OSError):  # something is in it, or it is gone
            folder.rmdir()


@contextlib.contextmanager
def staged_files(folder):
    """A temporary folder inside `folder` (which must be locked) whose files move into it when the block ends well.

    They replace all shards that were there, so no split is ever a mixture; manifest.json goes first and comes last, so a
    folder that has one is complete. If the block raises, `folder` is as it was.
    """
    stage = folder / ".partial"
    shutil.rmtree(stage, ignore_errors=True)  # of a run that was killed
    stage.mkdir()
    try:
        yield stage
        _publish(stage, folder)
    except OSError as error:  # of a write: the disk is full, and the system names no file
        if error.filename is not None:
            raise
        raise UserError(f"{folder}: cannot be written: {error.strerror or error}") from None
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def _publish(stage, folder):
    names = sorted((path.name for path in stage.iterdir()), key=lambda name: (name == MANIFEST, name))
    (folder / MANIFEST).unlink(missing_ok=True)
    for path in [*shard_paths(folder, "train"), *shard_paths(folder, "val")]:
        if path.name not in names:
            path.unlink()
    for name in names:
        os.replace(stage / name, folder / name)


def read_manifest(folder):
    """The folder's manifest.json, or {} if there is none that can be read."""
    try:
        manifest = json.loads((Path(folder) / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return manifest if isinstance(manifest, dict) else {}


def sha256_file(path):
    """Hex SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


if __name__ == "__main__":
    from command_line import not_a_command

    not_a_command("tools/prepare_data.py")
