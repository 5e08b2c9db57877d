"""`make_submission.py --hub` with the hub's real client against a local server that speaks the hub's endpoints; the pull request's text."""

from __future__ import annotations

import base64
import hashlib
import http.server
import json
import os
import re
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import hub_push
import make_submission
import numpy as np
import pytest
from conftest import write_shard
from shard_io import UserError
from test_submission import GOOD, RECORD, SEEDS, TARGETS, write_run

ROOT = Path(__file__).resolve().parent.parent
TOKEN = "hf_a_token_of_the_tests"
REPOSITORY = "somebody/ternary"


class Hub:
    """What was sent to 127.0.0.1, as the hub would keep it: {name: bytes} of the commit, and whether the repository is private."""

    def __init__(self, role: str = "write") -> None:
        self.role, self.files, self.uploaded, self.private, self.there = role, {}, {}, None, False
        self.requests: list[str] = []
        self.broken: dict[str, tuple[int, str]] = {}  # part of a path: (status, message)
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def _handler(hub) -> type:  # noqa: N805
        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_any(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                if self.headers.get("Transfer-Encoding") == "chunked":
                    body = b"".join(iter(self.chunk, b""))
                hub.requests.append(f"{self.command} {self.path}")
                status, answer = hub.answer(self.path.partition("?")[0], body, self.headers.get("Authorization"))
                data = json.dumps(answer).encode()
                self.send_response(status)
                for name, value in {"Content-Type": "application/json", "Content-Length": str(len(data))}.items():
                    self.send_header(name, value)
                if status >= 400:
                    self.send_header("X-Error-Message", answer["error"])
                self.end_headers()
                self.wfile.write(data)

            def chunk(self) -> bytes:
                data = self.rfile.read(int(self.rfile.readline(), 16))
                self.rfile.readline()
                return data

            do_GET = do_POST = do_PUT = do_any

            def log_message(self, *_: object) -> None:
                pass

        return Handler

    def answer(self, path: str, body: bytes, authorization: str | None) -> tuple[int, dict]:
        for part, (status, message) in self.broken.items():
            if part in path:
                return status, {"error": message}
        if path.startswith("/storage/"):  # as the hub's store: the address is the permission
            self.uploaded[path.rpartition("/")[2]] = body
            return 200, {}
        if authorization != f"Bearer {TOKEN}":
            return 401, {"error": "Invalid username or password."}
        if path == "/api/whoami-v2":
            return 200, {"type": "user", "name": "somebody", "auth": {"type": "access_token", "accessToken": {"role": self.role}}}
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if path == "/api/repos/create":
            if self.there:
                return 409, {"error": "You already created this model repo", "url": f"{self.url}/{REPOSITORY}"}
            self.there, self.private = True, json.loads(body)
            return 200, {"url": f"{self.url}/{REPOSITORY}"}
        if path == f"/api/models/{REPOSITORY}/preupload/main":
            files = json.loads(body)["files"]
            mode = {True: "lfs", False: "regular"}
            return 200, {"files": [{"path": f["path"], "uploadMode": mode[f["path"].endswith((".ptz", ".model"))], "shouldIgnore": False}
                                   for f in files]}  # fmt: skip
        if path == f"/{REPOSITORY}.git/info/lfs/objects/batch":
            objects = json.loads(body)["objects"]
            return 200, {"transfer": "basic", "objects": [
                {**o, "actions": {"upload": {"href": f"{self.url}/storage/{o['oid']}"}}} for o in objects]}  # fmt: skip
        if path == f"/api/models/{REPOSITORY}/commit/main":
            for line in map(json.loads, body.decode().splitlines()):
                if line["key"] == "file":
                    self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                elif line["key"] == "lfsFile":
                    self.files[line["value"]["path"]] = self.uploaded[line["value"]["oid"]]
            return 200, {"commitUrl": f"{self.url}/{REPOSITORY}/commit/0", "commitOid": "0" * 40, "success": True}
        return 404, {"error": f"not found: {path}"}


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub on this machine, and a client that knows no other."""
    constants = pytest.importorskip("huggingface_hub.constants", reason="pip install -r requirements-data.txt")
    hub = Hub()
    for name in [name for name in os.environ if name.startswith(("HF_", "HUGGING")) or name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    # the client reads its variables when it is imported, which another test of this process may have done
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr("huggingface_hub.hf_api.api.endpoint", hub.url)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    for name, file in (("HF_TOKEN_PATH", "token"), ("HF_STORED_TOKENS_PATH", "tokens")):
        monkeypatch.setattr(constants, name, str(tmp_path / file))
    thread = threading.Thread(target=hub.server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield hub
    hub.server.shutdown()
    hub.server.server_close()
    thread.join()


@pytest.fixture
def logs(tmp_path, monkeypatch):
    """Three made-up seeds with their artifacts, in the folder that is worked in."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    write_shard(tmp_path / "data/fineweb_val_000000.bin", np.zeros(TARGETS + 1))
    (tmp_path / "tokenizer.model").write_bytes(b"a tokenizer")
    return [str(write_run(tmp_path, GOOD.encode(), seed).relative_to(tmp_path)) for seed in SEEDS]


def submit(*words: str) -> int:
    who = ["--author", "A. Uthor", "--github-id", "author", "--date", "2026-03-31", "--name", "Ternary U-Net"]
    return make_submission.main([*who, "--records", "records", "--record-losses", *map(str, RECORD), "--force", *words])


def folder_files() -> dict[str, bytes]:
    (folder,) = Path("records/track_10min_16mb").iterdir()
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def error_line(capsys) -> str:
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("make_submission.py: error: ") and TOKEN not in error
    return error


def test_folder_card_and_artifacts_arrive_in_one_commit(hub, logs, capsys):
    assert submit("--hub", REPOSITORY, *logs) == 0
    assert f"sent to {hub.url}/{REPOSITORY}/commit/0" in capsys.readouterr().out
    ours, card = folder_files(), hub.files["README.md"].decode()
    artifacts = {f"seed{seed}.ternary.ptz": Path(f"{seed}.ptz").read_bytes() for seed in SEEDS}
    assert hub.files == ours | artifacts | {"README.md": card.encode()}
    assert hub.private["name"] == "ternary" and hub.private["organization"] == "somebody" and hub.private["visibility"] == "private"
    assert sum("/commit/" in request for request in hub.requests) == 1
    # the card: what the hub reads, the folder's own page, the artifacts
    assert card.startswith("---\nlicense: mit\n") and ours["README.md"].decode() in card
    rows = {f"| {seed} | `seed{seed}.ternary.ptz` | {len(data)} | `{hashlib.sha256(data).hexdigest()}` |"
            for seed, data in zip(SEEDS, artifacts.values(), strict=True)}  # fmt: skip
    assert rows <= set(card.splitlines())
    from huggingface_hub import ModelCard

    assert ModelCard(card).data.to_dict() == {"license": "mit", "pipeline_tag": "text-generation",
                                              "tags": ["ternary", "bitnet", "parameter-golf"]}  # fmt: skip


def test_a_repository_that_is_there_gets_another_commit(hub, logs):
    hub.there = True
    assert submit("--hub", REPOSITORY, *logs) == 0 and "submission.json" in hub.files and hub.private is None


def test_without_the_option_nothing_is_sent(hub, logs, monkeypatch):
    monkeypatch.setattr(hub_push, "import_hub", lambda _: pytest.fail("the client is asked for"))
    assert submit(*logs) == 0 and folder_files() and hub.requests == []


@pytest.mark.usefixtures("logs")
def test_a_check_before_long_runs_asks_who_the_token_is_and_sends_nothing(hub, capsys):
    assert submit("--hub", REPOSITORY, "--check", "3") == 0
    assert hub.requests == ["GET /api/whoami-v2"]
    hub.role = "read"
    assert submit("--hub", REPOSITORY, "--check", "3") == 2
    assert "the access token may only read; expected one that may write" in error_line(capsys)


def no_token(at):
    at.monkeypatch.delenv("HF_TOKEN")


def another_token(at):
    at.monkeypatch.setenv("HF_TOKEN", "hf_another")


def token_that_reads(at):
    at.hub.role = "read"


def no_library(at):
    at.monkeypatch.setitem(sys.modules, "huggingface_hub", None)


def no_network(at):
    import huggingface_hub

    at.monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:1")
    init = huggingface_hub.HfApi.__init__
    at.monkeypatch.setattr(huggingface_hub.HfApi, "__init__", lambda self, **options: init(self, endpoint="http://127.0.0.1:1", **options))


def offline(at):
    import huggingface_hub

    at.monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    at.monkeypatch.setattr("huggingface_hub.utils._http.constants.HF_HUB_OFFLINE", True)
    huggingface_hub.close_session()


def unusable_proxy(at):
    at.monkeypatch.setenv("HTTPS_PROXY", "ftp://127.0.0.1:9")


def artifact_gone(_):
    Path("7.ptz").unlink()


def artifact_of_another_run(_):
    Path("7.ptz").write_bytes(b"artifact of seed 42")


BEFORE = {
    no_token: "--hub: no access token; set HF_TOKEN, or log in with: hf auth login",
    another_token: "the access token is refused: Invalid user",
    token_that_reads: "--hub: the access token may only read",
    no_library: "--hub: needs huggingface_hub (",
    no_network: f"--hub {REPOSITORY} at http://127.0.0.1:1: ",
    offline: f"--hub {REPOSITORY}: HF_HUB_OFFLINE is set, so nothing can be sent",
    unusable_proxy: "HTTPS_PROXY='ftp://127.0.0.1:9': expected http://HOST:PORT",
    artifact_gone: "--hub: seed 7: no artifact with the SHA-256 of record_seed7.txt at 7.ptz; expected --artifact FILE",
    artifact_of_another_run: "--hub: seed 7: no artifact with the SHA-256 of record_seed7.txt at 7.ptz; expected --artifact FILE",
}


@pytest.mark.parametrize("prepare", BEFORE, ids=lambda function: function.__name__)
def test_what_can_be_known_before_is_one_line_and_nothing_is_written_or_sent(hub, logs, monkeypatch, capsys, prepare):
    prepare(SimpleNamespace(hub=hub, monkeypatch=monkeypatch))
    assert submit("--hub", REPOSITORY, *logs) == 2
    assert BEFORE[prepare] in error_line(capsys)
    assert not Path("records").exists() and not [request for request in hub.requests if not request.startswith("GET /api/whoami")]
    if prepare is offline:
        import huggingface_hub

        huggingface_hub.close_session()


@pytest.mark.parametrize("part, status, message, said", [
    ("repos/create", 403, "You don't have the rights to create a model under the namespace somebody", "the access token may not write there: You don't"),
    ("preupload", 403, "Forbidden", "the access token may not write there"), ("commit", 500, "over\nloaded", "status 500: "),
    ("objects/batch", 413, "too large", "status 413: "), ("storage", 403, "expired", "expired"),
])  # fmt: skip
def test_what_the_hub_refuses_is_one_line_and_the_folder_stays(hub, logs, capsys, part, status, message, said):
    hub.broken[part] = status, " ".join(message.split())
    assert submit("--hub", REPOSITORY, *logs) == 2
    line = error_line(capsys)
    assert said in line and "is written, the same command with --force sends it again" in line
    assert hub.files == {} and "submission.json" in folder_files()
    hub.broken.clear()
    assert submit("--hub", REPOSITORY, *logs) == 0 and "submission.json" in hub.files


@pytest.mark.parametrize("name", ["ternary", "a/b/c", "a/", "/b", "a b/c", "a/b..c", "a/b--c", "a/b.git", "-a/b", "a/" + "b" * 97, "https://huggingface.co/a/b"])
def test_a_name_that_no_repository_can_have_is_refused_as_the_client_would(name):
    with pytest.raises(UserError, match=re.escape(f"--hub {name}: expected OWNER/NAME")):
        hub_push.repository_name(name)
    utils = pytest.importorskip("huggingface_hub.utils", reason="pip install -r requirements-data.txt")
    if name.count("/") == 1 and all(name.split("/")):
        with pytest.raises(utils.HFValidationError):
            utils.validate_repo_id(name)


@pytest.mark.parametrize("option", ["--hub", "--pull-request"])
def test_what_is_about_the_folder_needs_one(logs, capsys, option):
    assert make_submission.main(["--author", "A", "--github-id", "a", option, "a/b", *logs]) == 2
    assert f"{option} needs --records DIR" in error_line(capsys) and not Path("submission.json").exists()


def test_given_artifacts_are_matched_by_their_digest(hub, logs):
    for seed, name in zip(SEEDS, "abc", strict=True):
        Path(f"{seed}.ptz").rename(f"{name}.ptz")
    assert submit("--hub", REPOSITORY, "--artifact", "c.ptz", "--artifact", "a.ptz", "--artifact", "b.ptz", *logs) == 0
    assert {seed: hub.files[f"seed{seed}.ternary.ptz"] for seed in SEEDS} == {seed: b"artifact of seed %d" % seed for seed in SEEDS}


def test_the_pull_requests_text_has_the_figures_and_the_rules_of_the_logs(logs, capsys):
    assert submit("--pull-request", "new/pull.md", *logs) == 0
    title, empty, *body = Path("new/pull.md").read_text().splitlines()
    assert title == "Record: Ternary U-Net, 1.1500 bits per byte" and empty == ""
    text = "\n".join(body)
    assert "Adds `records/track_10min_16mb/2026-03-31_Ternary_U-Net`." in text
    readme = folder_files()["README.md"].decode()
    rows = [line for line in readme.splitlines() if re.match(r"\| (seed|\d+|mean|std) \|", line)]
    assert len(rows) == 6 and all(row in body for row in rows)
    shown = dict(re.findall(r"^\| ([^|]+) \| (yes|no) \|", text, re.M))
    printed = re.findall(r"^(PASS|FAIL|no) +(\S.*?)  ", capsys.readouterr().out, re.M)
    assert shown == {rule: "yes" for _, rule in printed} and len(shown) == 14
    assert "p = " in text and "/pull/640)" in text and str(Path.cwd()) not in text


def test_the_pull_requests_text_says_what_is_no_record(logs):
    own = {"device": "cpu", "gpu_name": "none", "world_size": 1, "val_bytes": 615_808}
    for seed in SEEDS:
        write_run(Path.cwd(), GOOD.encode(), seed, **own)
    assert submit("--non-record", "--pull-request", "pull.md", *logs) == 0
    text = Path("pull.md").read_text()
    assert text.startswith("Non-record: Ternary U-Net, 1.1500 bits") and "**Not a leaderboard entry: it ran on 1 x CPU process" in text
    assert re.search(r"^\| 8xH100 \| no \|", text, re.M)
