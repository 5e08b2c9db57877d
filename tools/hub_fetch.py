"""Download a published FineWeb export from the Hugging Face hub: shards, the validation split, the tokenizer.

The hub's own client does the transfer (mirrors by HF_ENDPOINT, tokens, resuming). It writes into .fetch beside the
shards; a file gets its final name only when its size, its SHA-256 (where the hub states one) and its header are right. A run that
was cut goes on where it stopped.
"""

import contextlib
import os
import re
import shutil
import ssl
import sys
import time
from pathlib import Path
from typing import NamedTuple

from command_line import not_a_command
from encode_text import load_tokenizer
from shard_io import (
    MANIFEST,
    SPLITS,
    UserError,
    locked_folder,
    read_manifest,
    read_shard,
    replacing,
    sha256_file,
    write_json,
)
from text_files import DATA_REQUIREMENTS

RETRY_WAITS_S = (1, 2, 4)
FULL_RUN_SHARDS = 52  # 599 s at 8.7 million tokens/s read 5.2 billion tokens once, 100 million a shard


class Export(NamedTuple):
    """Where a tokenization of FineWeb is published; the paths inside the repository are found by their endings."""

    repository: str
    dataset: str
    tokenizer: str
    within: str = ""  # the folder of the repository where they are looked for: others hold files of the same names


EXPORTS = {
    "sp8192": Export("sproos/parameter-golf-tokenizers", "fineweb10B_sp8192", "fineweb_8192_bpe.model"),
    "sp1024": Export("willdepueoai/parameter-golf", "fineweb10B_sp1024", "fineweb_1024_bpe.model"),
    # #2086's
    "sp16384": Export(
        "deniskurlov/parameter-golf-fineweb-sp16384", "fineweb10B_sp16384", "fineweb_16384_bpe.model", "canonical/"
    ),
}


class RemoteFile(NamedTuple):
    """A file as the hub lists it, and where it goes."""

    path: str  # in the repository
    size: int
    sha256: str | None
    target: Path


class Repository(NamedTuple):
    """A dataset repository at one commit."""

    name: str
    commit: str


def fetch_export(export, folder, shards, report):
    """Bring `shards` training shards (None: a full run's), the validation split and the tokenizer into `folder`.

    They go to folder/datasets/<dataset> and folder/tokenizers. report: called with each line of progress.
    Returns the manifest; UserError if the export cannot be had in full, and then no half file has a final name.
    """
    dataset = folder / "datasets" / export.dataset
    with no_empty_folders(dataset), locked_folder(dataset, "--out"):
        if is_fetched(dataset, export, shards):
            return read_manifest(dataset)
        check_network_variables()
        hub = import_hub()
        with hub_errors(hub, f"dataset repository {export.repository}"):
            commit = hub.HfApi().repo_info(export.repository, repo_type="dataset").sha
            listed = list(hub.HfApi().list_repo_tree(export.repository, repo_type="dataset", revision=commit, recursive=True))
        files = choose_files(listed, export, folder, shards)
        fetch_files(hub, Repository(export.repository, commit), files, dataset / ".fetch", report)
        manifest = describe(export, commit, files, dataset)
        write_whole(dataset / MANIFEST, manifest)
        shutil.rmtree(dataset / ".fetch", ignore_errors=True)
        return manifest


@contextlib.contextmanager
def no_empty_folders(path):
    """Where the block fails, the folders on the way to `path` that were not there go again, unless something is in them."""
    new = [folder for folder in (path, *path.parents) if not folder.exists()]
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):  # the first that is not empty ends it
            for folder in new:
                folder.rmdir()
        raise


def is_fetched(dataset, export, shards):
    """Whether the dataset is there with at least so many shards, by manifest, headers and lengths: no network needed."""
    manifest = read_manifest(dataset)
    with contextlib.suppress(UserError, OSError, KeyError):
        if manifest["repository"] != export.repository:
            return False
        for name in manifest["files"]:
            read_shard(dataset / name)
        load_tokenizer(dataset / manifest["tokenizer"])
        wanted = min(FULL_RUN_SHARDS, manifest["train"]["published"]) if shards is None else shards
        return manifest["train"]["shards"] >= wanted
    return False


def import_hub(what="fetch"):
    """The hub's client; UserError without it says `what` needs it."""
    # plain HTTP goes on with a half file, in this run and in the next one; the xet transfer does not
    os.environ.setdefault("HF_HUB_DISABLE_XET", "1")
    try:
        import huggingface_hub
        import huggingface_hub.constants
        import huggingface_hub.errors
        import huggingface_hub.utils
    except ImportError:
        raise UserError(f"{what}: needs huggingface_hub ({DATA_REQUIREMENTS})") from None
    if not sys.stderr.isatty():
        huggingface_hub.utils.disable_progress_bars()
    return huggingface_hub


# ---- the environment's say in how the hub is reached


def check_network_variables():
    """UserError names the variable that the hub's client cannot work with; it would say so in a traceback, or name none."""
    for name in ("HF_HUB_ETAG_TIMEOUT", "HF_HUB_DOWNLOAD_TIMEOUT"):
        if not re.fullmatch(r"\d*", os.environ.get(name, "")):
            refuse_variable(name, "whole seconds")
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        if not os.environ.get(name, "").isascii():
            # a secret: not shown
            raise UserError(f"{name}: a character that is not ASCII in it; expected an access token of the hub")
    try:
        import httpx  # the hub's client works with it
    except ImportError:
        return  # import_hub says what is missing
    check_certificates()
    check_endpoint(httpx)
    check_proxies(httpx)


def refuse_variable(name, expected):
    raise UserError(f"{name}={os.environ[name]!r}: expected {expected}")


def check_certificates():
    name = "SSL_CERT_FILE"
    if os.environ.get(name):
        try:
            ssl.create_default_context(cafile=os.environ[name])
        except OSError:
            refuse_variable(name, "a file of certificates in PEM form; without it the usual ones are taken")


def check_endpoint(httpx):
    name, url = "HF_ENDPOINT", None
    if name in os.environ:
        with contextlib.suppress(httpx.InvalidURL):
            url = httpx.URL(os.environ[name])
        if url is None or url.scheme not in ("http", "https") or not re.fullmatch(r"[^\s%]+", url.host):
            refuse_variable(name, "the address of a hub, such as https://huggingface.co")


def check_proxies(httpx):
    """Each proxy by itself, since the client does not say which one it means; what is left then is the list of exceptions."""
    unusable = (httpx.InvalidURL, ValueError, ImportError)
    names = {name.lower(): name for name in sorted(os.environ) if os.environ[name]}  # of two spellings the lower one counts
    if os.environ.get(names.get("no_proxy", ""), "") != "*":
        for name in (names[key] for key in ("all_proxy", "https_proxy", "http_proxy") if key in names):
            value = os.environ[name]
            try:
                httpx.Client(proxy=value if "://" in value else f"http://{value}", trust_env=False, verify=False).close()
            except unusable as error:
                socks = isinstance(error, ImportError)
                refuse_variable(name, "http://HOST:PORT" + " (or pip install 'httpx[socks]')" * socks)
    try:
        httpx.Client().close()
    except unusable:
        refuse_variable(names.get("no_proxy", "NO_PROXY"), "host names with commas between, ::1 without brackets")


@contextlib.contextmanager
def hub_errors(hub, what):
    """Turn what can go wrong at the hub or on the way into one line."""
    place = f"{what} at {hub.constants.ENDPOINT}"
    try:
        yield
    except hub.errors.OfflineModeIsEnabled:
        raise UserError(f"{what}: HF_HUB_OFFLINE is set, so nothing can be downloaded") from None
    except hub.errors.EntryNotFoundError as error:
        if isinstance(error, hub.errors.LocalEntryNotFoundError) and error.__cause__ is not None:
            raise UserError(f"{place}: {one_line(error.__cause__)}; run it again to go on") from None
        raise UserError(f"{place}: missing there although it is listed") from None
    except hub.errors.RepositoryNotFoundError:
        raise UserError(f"{place}: not found, or not public") from None
    except (hub.errors.HTTPError, OSError) as error:
        raise UserError(f"{place}: {one_line(error)}; run it again to go on") from None


def one_line(error):
    """The first line of an exception's text, or its class."""
    return next(iter(str(error).strip().split("\n"))) or type(error).__name__


def choose_files(listed, export, folder, shards):
    """The tokenizer, the whole validation split and the training shards to have, in the order to fetch them."""
    tokenizer, found = None, {split: {} for split in SPLITS}
    pattern = re.compile(rf"{re.escape(export.within)}(?:.*/)?{re.escape(export.dataset)}/fineweb_(train|val)_(\d{{6}})\.bin")
    for entry in listed:
        if match := pattern.fullmatch(entry.path):
            target = folder / "datasets" / export.dataset / Path(entry.path).name
            other = found[match[1]].setdefault(int(match[2]), remote_file(entry, target))
            if other.path != entry.path:  # of which tokenization?
                raise UserError(f"dataset repository {export.repository}: {other.path} and {entry.path}; expected one of them")
        elif entry.path.startswith(export.within) and Path(entry.path).name == export.tokenizer:
            tokenizer = remote_file(entry, folder / "tokenizers" / export.tokenizer)
    if tokenizer is None or not found["train"] or not found["val"]:
        raise UserError(
            f"dataset repository {export.repository}: {len(found['train'])} training and {len(found['val'])} validation "
            f"shards of {export.dataset} and {0 if tokenizer is None else 1} {export.tokenizer}; expected some of each"
        )
    train = [found["train"][number] for number in sorted(found["train"])]
    if shards is not None and shards > len(train):
        raise UserError(f"--shards {shards}: the repository {export.repository} has {len(train)} training shards")
    val = [found["val"][number] for number in sorted(found["val"])]
    return {"tokenizer": [tokenizer], "val": val, "train": train[: shards or FULL_RUN_SHARDS], "published": len(train)}


def remote_file(entry, target):
    return RemoteFile(entry.path, entry.size, entry.lfs.sha256 if entry.lfs else None, target)


def fetch_files(hub, repository, files, stage, report):
    """Download what is not there yet; each file takes its final name once it is proved."""
    wanted = [file for part in ("tokenizer", "val", "train") for file in files[part]]
    missing = [file for file in wanted if not is_right(file)]
    need, free = sum(file.size for file in missing), shutil.disk_usage(stage.parent).free
    if need > free:
        raise UserError(f"--out {stage.parent}: {need / 1e9:.1f} GB to download, {free / 1e9:.1f} GB free")
    done, started = 0, time.monotonic()
    for number, file in enumerate(missing, 1):
        fetch_file(hub, repository, file, stage)
        done += file.size
        rate = done / 1e6 / max(time.monotonic() - started, 1e-3)
        report(f"{file.target.name}: {number} of {len(missing)} files, {done / 1e9:.2f} of {need / 1e9:.2f} GB, {rate:.0f} MB/s")


def is_right(file):
    """Whether the file is there already: its size, and a shard's header."""
    with contextlib.suppress(UserError, OSError):
        prove_shape(file, file.target)
        return True
    return False


def prove_shape(file, path):
    """UserError unless the file at `path` has the size listed and, if it is a shard, is a whole one."""
    size = path.stat().st_size
    if size != file.size:
        raise UserError(f"{file.path}: {size} bytes came, expected the {file.size} that the hub lists; run it again")
    if file.target.suffix == ".bin":
        read_shard(path)
    else:
        load_tokenizer(path, file.path)


def download(hub, repository, file, stage):
    """Path of the file in `stage`. A broken connection is tried again after a while; it goes on from the bytes it has."""
    waits_s = iter(RETRY_WAITS_S)
    while True:
        try:
            return Path(
                hub.hf_hub_download(
                    repository.name, file.path, repo_type="dataset", revision=repository.commit, local_dir=stage
                )
            )
        except (hub.errors.HTTPError, hub.errors.LocalEntryNotFoundError) as error:
            wait_s = next(waits_s, None)
            if wait_s is None or is_refused(error):
                raise
            time.sleep(wait_s)


def is_refused(error):
    """Whether the server answered, and would give the same answer again."""
    response = getattr(error, "response", None)
    return response is not None and response.status_code < 500 and response.status_code != 429


def fetch_file(hub, repository, file, stage):
    """Download one file into `stage`, prove it, and give it its final name."""
    with hub_errors(hub, file.path):
        path = download(hub, repository, file, stage)
    try:
        prove_shape(file, path)
        if file.sha256 is not None and sha256_file(path) != file.sha256:
            raise UserError(f"{file.path}: its SHA-256 is not the one that the hub lists; run it again")
    except UserError:
        path.unlink()
        raise
    file.target.parent.mkdir(parents=True, exist_ok=True)
    os.replace(path, file.target)


def describe(export, commit, files, dataset):
    """The manifest: what is there, its token counts and hashes. Reads every shard once."""
    tokenizer = files["tokenizer"][0].target
    sizes = {
        split: {"shards": len(files[split]), "tokens": sum(len(read_shard(file.target)) for file in files[split])}
        for split in SPLITS
    }
    sizes["train"]["published"] = files["published"]
    hashes = {file.target.name: file.sha256 or sha256_file(file.target) for split in SPLITS for file in files[split]}
    return {
        "corpus": "fineweb",
        "repository": export.repository,
        "commit": commit,
        "tokenizer": os.path.relpath(tokenizer, dataset),
        "tokenizer_sha256": sha256_file(tokenizer),
        "vocab_size": load_tokenizer(tokenizer)[1].vocab_size(),
        **sizes,
        "files": dict(sorted(hashes.items())),
    }


def write_whole(path, value):
    """Write a JSON file, whole or not at all."""
    with replacing(path) as partial:
        write_json(partial, value)


if __name__ == "__main__":
    not_a_command("tools/prepare_data.py")
