"""`prepare_data.py fetch` with the hub's real client against a local server that speaks the hub's endpoints."""

from __future__ import annotations

import hashlib
import http.server
import io
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import hub_fetch
import numpy as np
import pytest
import sentencepiece
from shard_io import UserError

pytest.importorskip("huggingface_hub", reason="pip install -r requirements-data.txt")

ROOT = Path(__file__).resolve().parent.parent
REPOSITORY = "sproos/parameter-golf-tokenizers"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
FOLDER = "some/where/fineweb10B_sp8192"
TRAIN = [f"{FOLDER}/fineweb_train_{i:06d}.bin" for i in range(3)]
VAL, TOKENIZER = f"{FOLDER}/fineweb_val_000000.bin", "other/fineweb_8192_bpe.model"


def shard(tokens: int, seed: int) -> bytes:
    header = np.zeros(256, dtype="<i4")
    header[:3] = 20240520, 1, tokens
    return header.tobytes() + np.random.default_rng(seed).integers(1, 300, tokens).astype("<u2").tobytes()


class Hub:
    """A dataset repository on 127.0.0.1, and what goes wrong with it."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {path: shard(1000 + i, i) for i, path in enumerate([*TRAIN, VAL])}
        model = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(["some text to train a tokenizer on"] * 9), model_writer=model, vocab_size=300, minloglevel=2,
            model_type="bpe", byte_fallback=True, pad_id=0, bos_id=1, eos_id=2, unk_id=3, hard_vocab_limit=False,
        )  # fmt: skip
        self.files |= {TOKENIZER: model.getvalue(), "README.md": b"read me", "data/fineweb10B_sp1024/fineweb_val_000000.bin": b"other"}
        self.listed = {path: (len(data), hashlib.sha256(data).hexdigest()) for path, data in self.files.items()}
        self.cuts: dict[str, list[int]] = {}  # path: how many bytes each coming GET sends before the connection breaks
        self.requests: list[tuple[str, str, str | None]] = []  # (method, path, range)
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def _handler(hub) -> type:  # noqa: N805
        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_HEAD(self) -> None:
                hub.answer(self)

            def do_GET(self) -> None:
                hub.answer(self)

            def log_message(self, *_: object) -> None:
                pass

        return Handler

    def answer(self, request: http.server.BaseHTTPRequestHandler) -> None:
        self.requests.append((request.command, request.path, request.headers.get("Range")))
        api, resolve = f"/api/datasets/{REPOSITORY}", f"/datasets/{REPOSITORY}/resolve/{COMMIT}/"
        path, _, query = request.path.partition("?")
        if path == api:
            send_json(request, {"id": REPOSITORY, "sha": COMMIT, "private": False, "tags": [], "siblings": []})
        elif path == f"{api}/tree/{COMMIT}":
            self.send_page(request, path, second="cursor" in query)
        elif path.startswith(resolve) and path.removeprefix(resolve) in self.files:
            self.send_file(request, path.removeprefix(resolve))
        else:
            code = "EntryNotFound" if path.startswith(resolve) else "RepoNotFound"
            send(request, 404, b"", {"X-Error-Code": code, "X-Error-Message": "not found"})

    def send_page(self, request: http.server.BaseHTTPRequestHandler, path: str, second: bool) -> None:
        entries = [
            {"type": "file", "path": name, "size": size, "oid": "0" * 40, "lfs": {"oid": digest, "size": size, "pointerSize": 130}}
            for name, (size, digest) in self.listed.items()
        ]
        folder = {"type": "directory", "path": FOLDER, "oid": "1" * 40}
        if second:
            send_json(request, entries[2:])
        else:
            send_json(request, [folder, *entries[:2]], {"Link": f'<{self.url}{path}?recursive=True&cursor=2>; rel="next"'})

    def send_file(self, request: http.server.BaseHTTPRequestHandler, name: str) -> None:
        data, start = self.files[name], 0
        headers = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        if match := re.fullmatch(r"bytes=(\d+)-", request.headers.get("Range") or ""):
            start = int(match[1])
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        cut = self.cuts[name].pop(0) if request.command == "GET" and self.cuts.get(name) else None
        send(request, 206 if start else 200, data[start:], headers, cut)


def send_json(request: http.server.BaseHTTPRequestHandler, value: object, headers: dict[str, str] | None = None) -> None:
    send(request, 200, json.dumps(value).encode(), {"Content-Type": "application/json"} | (headers or {}))


def send(request: http.server.BaseHTTPRequestHandler, status: int, body: bytes, headers: dict[str, str], cut: int | None = None) -> None:
    request.send_response(status)
    for name, value in {**headers, "Content-Length": str(len(body))}.items():
        request.send_header(name, value)
    request.end_headers()
    if request.command == "GET":
        request.wfile.write(body[:cut])
        request.wfile.flush()
    request.close_connection = cut is not None or request.close_connection


@pytest.fixture
def hub() -> Iterator[Hub]:
    hub = Hub()
    thread = threading.Thread(target=hub.server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield hub
    hub.server.shutdown()
    hub.server.server_close()
    thread.join()


def fetch(out: Path, url: str, *options: str, **variables: str) -> subprocess.CompletedProcess:
    clean = {name: os.environ[name] for name in ("PATH", "LANG", "TMPDIR") if name in os.environ}
    env = clean | {"HF_ENDPOINT": url, "HF_HOME": str(out.parent / "hf"), "HOME": str(out.parent), "NO_PROXY": "127.0.0.1"} | variables
    command = [sys.executable, str(ROOT / "tools" / "prepare_data.py"), "fetch", "sp8192", "--out", str(out), *options]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)


def shards_in(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (out / "datasets" / "fineweb10B_sp8192").glob("*.bin")}


def expected_shards(hub: Hub, *paths: str) -> dict[str, bytes]:
    return {Path(path).name: hub.files[path] for path in paths}


def error_line(result: subprocess.CompletedProcess) -> str:
    """The last line on stderr, an error; before it only lines about progress."""
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr
    *others, line = result.stderr.splitlines()
    assert line.startswith("prepare_data.py: error: ")
    assert not [other for other in others if "error:" in other]
    return line


def test_fetch_brings_the_export_and_needs_no_network_again(tmp_path: Path, hub: Hub) -> None:
    out = tmp_path / "data"
    first = fetch(out, hub.url, "--shards", "1")
    assert first.returncode == 0, first.stderr
    assert shards_in(out) == expected_shards(hub, TRAIN[0], VAL)
    assert (out / "tokenizers" / "fineweb_8192_bpe.model").read_bytes() == hub.files[TOKENIZER]
    assert "train 1 shards 1,000 tokens, val 1 shards 1,003 tokens" in first.stdout
    assert "fineweb_train_000000.bin: 3 of 3 files" in first.stderr
    assert fetch(out, "http://127.0.0.1:1", "--shards", "1").stdout == first.stdout

    hub.requests.clear()
    everything = fetch(out, hub.url)  # three shards are published, fewer than a full run reads
    assert everything.returncode == 0, everything.stderr
    assert shards_in(out) == expected_shards(hub, *TRAIN, VAL)
    fetched = {path.rpartition("/")[2] for method, path, _ in hub.requests if method == "GET" and path.endswith(".bin")}
    assert fetched == {"fineweb_train_000001.bin", "fineweb_train_000002.bin"}  # what is there is not fetched twice
    assert not (out / "datasets" / "fineweb10B_sp8192" / ".fetch").exists()
    assert "parameter-golf-tokenizers has 3 training shards" in error_line(fetch(out, hub.url, "--shards", "4"))


def test_a_damaged_shard_is_fetched_again(tmp_path: Path, hub: Hub) -> None:
    out = tmp_path / "data"
    assert fetch(out, hub.url, "--shards", "1").returncode == 0
    path = out / "datasets" / "fineweb10B_sp8192" / "fineweb_train_000000.bin"
    path.write_bytes(path.read_bytes()[:-2])
    assert fetch(out, hub.url, "--shards", "1").returncode == 0
    assert shards_in(out) == expected_shards(hub, TRAIN[0], VAL)


def test_a_cut_connection_is_resumed_in_the_same_run_and_in_the_next(tmp_path: Path, hub: Hub) -> None:
    hub.files[TRAIN[0]] = shard(12_000_000, 9)  # 24 MB: the client keeps what came in pieces of 10 MiB
    hub.listed[TRAIN[0]] = (len(hub.files[TRAIN[0]]), hashlib.sha256(hub.files[TRAIN[0]]).hexdigest())
    hub.cuts[TRAIN[0]] = [14_000_000]
    assert fetch(tmp_path / "one", hub.url, "--shards", "1").returncode == 0
    assert shards_in(tmp_path / "one") == expected_shards(hub, TRAIN[0], VAL)
    ranges = [wanted for method, path, wanted in hub.requests if method == "GET" and path.endswith(TRAIN[0])]
    assert ranges == [None, f"bytes={10 << 20}-"]

    hub.cuts[TRAIN[0]] = [14_000_000] + [0] * 3  # as often as is tried
    line = error_line(fetch(tmp_path / "two", hub.url, "--shards", "1"))
    assert "fineweb_train_000000.bin" in line and "run it again to go on" in line
    assert shards_in(tmp_path / "two") == expected_shards(hub, VAL)  # no half shard
    hub.requests.clear()
    assert fetch(tmp_path / "two", hub.url, "--shards", "1").returncode == 0
    assert shards_in(tmp_path / "two") == expected_shards(hub, TRAIN[0], VAL)
    ranges = [wanted for method, path, wanted in hub.requests if method == "GET" and path.endswith(TRAIN[0])]
    assert ranges == [f"bytes={10 << 20}-"]


def break_size(hub: Hub) -> None:
    hub.listed[TRAIN[1]] = (5000, hub.listed[TRAIN[1]][1])


def break_content(hub: Hub) -> None:
    hub.files[TRAIN[1]] = hub.files[TRAIN[1]][:-1] + b"\0"


def break_header(hub: Hub) -> None:
    hub.files[TRAIN[1]] = b"\0" * 3024
    hub.listed[TRAIN[1]] = (3024, hashlib.sha256(hub.files[TRAIN[1]]).hexdigest())


def break_file(hub: Hub) -> None:
    del hub.files[TRAIN[1]]


@pytest.mark.parametrize(
    ("break_it", "expected"),
    [
        (break_size, "3026 bytes came, expected the 5000 that the hub lists"),
        (break_content, "its SHA-256 is not the one that the hub lists"),
        (break_header, "header begins with 0, 0, expected 20240520, 1"),
        (break_file, "missing there although it is listed"),
    ],
)
def test_a_wrong_file_never_gets_its_final_name(tmp_path: Path, hub: Hub, break_it: object, expected: str) -> None:
    break_it(hub)
    out = tmp_path / "data"
    line = error_line(fetch(out, hub.url, "--shards", "3"))
    assert "fineweb_train_000001.bin" in line and expected in line
    assert shards_in(out) == expected_shards(hub, TRAIN[0], VAL)  # what came before is whole and stays
    assert not (out / "datasets" / "fineweb10B_sp8192" / "manifest.json").exists()


def test_nothing_there_or_no_network_is_one_line(tmp_path: Path, hub: Hub) -> None:
    line = error_line(fetch(tmp_path / "data", "http://127.0.0.1:1"))
    assert f"{REPOSITORY} at http://127.0.0.1:1: " in line and "onnect" in line
    del hub.files[VAL], hub.listed[VAL]
    assert "3 training and 0 validation shards of fineweb10B_sp8192" in error_line(fetch(tmp_path / "data", hub.url))
    assert "not found, or not public" in error_line(fetch(tmp_path / "data", f"{hub.url}/elsewhere"))
    assert shards_in(tmp_path / "data") == {}


def entries(*paths: str) -> list[SimpleNamespace]:
    return [SimpleNamespace(path=path, size=9, lfs=None) for path in paths]


def test_an_export_is_looked_for_in_its_folder_alone(tmp_path: Path) -> None:
    """The repository of the 16,384 pieces also holds other tokenizations, under the same names."""
    names = ["datasets/fineweb10B_sp16384/fineweb_train_000000.bin", "datasets/fineweb10B_sp16384/fineweb_val_000000.bin"]
    names.append("tokenizers/fineweb_16384_bpe.model")
    listed = entries(*(f"{folder}/{name}" for folder in ("another", "canonical", "more/canonical") for name in names))
    files = hub_fetch.choose_files(listed, hub_fetch.EXPORTS["sp16384"], tmp_path, None)
    chosen = [file.path for part in ("train", "val", "tokenizer") for file in files[part]]
    assert chosen == [f"canonical/{name}" for name in names]
    assert files["train"][0].target == tmp_path / names[0]


def test_two_shards_of_one_name_are_refused(tmp_path: Path) -> None:
    twice = entries("a/fineweb10B_sp8192/fineweb_train_000000.bin", "b/fineweb10B_sp8192/fineweb_train_000000.bin")
    with pytest.raises(UserError, match="a/fineweb10B_sp8192/.* and b/fineweb10B_sp8192/.*; expected one of them"):
        hub_fetch.choose_files(twice, hub_fetch.EXPORTS["sp8192"], tmp_path, None)


UNUSABLE = {
    "socks5": {"ALL_PROXY": "socks5://127.0.0.1:9"},
    "socks": {"all_proxy": "socks://127.0.0.1:9"},
    "ftp": {"HTTPS_PROXY": "ftp://127.0.0.1:9"},
    "proxy with CR": {"http_proxy": "127.0.0.1:9\r"},
    "bracketed host": {"NO_PROXY": "localhost,[::1]"},
    "endpoint with CR": {"HF_ENDPOINT": "http://127.0.0.1:9\r"},
    "endpoint with a blank": {"HF_ENDPOINT": "http://127.0.0.1 "},
    "endpoint without a scheme": {"HF_ENDPOINT": "huggingface.co"},
    "empty endpoint": {"HF_ENDPOINT": ""},
    "certificates gone": {"SSL_CERT_FILE": "/nowhere/ca.pem"},
    "no certificates": {"SSL_CERT_FILE": __file__},
    "timeout": {"HF_HUB_DOWNLOAD_TIMEOUT": "10s"},
}


@pytest.mark.parametrize("variables", UNUSABLE.values(), ids=UNUSABLE.keys())
def test_a_variable_that_the_client_cannot_use_is_named_in_one_line(tmp_path: Path, variables: dict[str, str]) -> None:
    out = tmp_path / "data"
    result = fetch(out, "http://127.0.0.1:9", "--shards", "1", **variables)
    ((name, value),) = variables.items()
    assert f" {name}={value!r}: expected " in error_line(result) and result.stderr.count("\n") == 1
    assert not out.exists()


def test_a_token_that_no_header_can_hold_is_refused_and_not_shown(tmp_path: Path) -> None:
    line = error_line(fetch(tmp_path / "data", "http://127.0.0.1:9", HF_TOKEN="hf_geheim\u00df"))
    assert " HF_TOKEN: " in line and "geheim" not in line


def test_variables_that_the_client_can_use_are_used(tmp_path: Path, hub: Hub) -> None:
    """The proxy answers in the hub's place, the list of exceptions and the lower spelling count, nothing is refused that works."""
    proxied = {"HTTP_PROXY": "socks://ignored:9", "http_proxy": hub.url, "NO_PROXY": "", "HF_HUB_ETAG_TIMEOUT": "9"}
    assert "not found" in error_line(fetch(tmp_path / "one", "http://nowhere.invalid", "--shards", "1", **proxied))
    assert hub.requests and all(path.startswith("http://nowhere.invalid/") for _, path, _ in hub.requests)
    assert fetch(tmp_path / "two", hub.url, "--shards", "1", ALL_PROXY="socks://127.0.0.1:9", NO_PROXY="*").returncode == 0


def test_data_that_is_there_needs_no_usable_network_variable(tmp_path: Path, hub: Hub) -> None:
    assert fetch(tmp_path / "data", hub.url, "--shards", "1").returncode == 0
    assert fetch(tmp_path / "data", hub.url, "--shards", "1", ALL_PROXY="socks://127.0.0.1:9").returncode == 0
