"""Send a submission's folder and artifacts to a model repository of the Hugging Face hub, in one commit.

The hub's own client does it (mirrors by HF_ENDPOINT, tokens, retries). What is known before is checked before: the repository's
name, the library, the token and what it may do, the artifacts. A repository that is not there is made, for its owner alone to see.
"""

import contextlib
import re

from command_line import not_a_command
from hub_fetch import check_network_variables, import_hub, one_line
from run_logs import find_artifact, places_of
from shard_io import UserError, sha256_file

LONGEST_NAME = 96  # after the slash
CARD_HEAD = """---
license: mit
pipeline_tag: text-generation
tags: [ternary, bitnet, parameter-golf]
---

"""
CARD_ARTIFACTS = """
## The artifacts

| seed | file | bytes | SHA-256 |
|---|---|---|---|
{rows}

An artifact holds the model's settings and its weights, and nothing that could run. With the settings of "How to run" and
`EVAL_ONLY=1 ARTIFACT_PATH=FILE`, `train_gpt.py` scores it. It continues text; it was trained on nothing else, follows no
instructions, and writes what its training text made likely. The licence above is that of the program: the weights come from
the text named under "Data", whose own terms hold for it.
"""


def repository_name(text):
    """The name of a model repository, OWNER/NAME; UserError for anything else."""
    part = "[A-Za-z0-9_](?:[A-Za-z0-9_.-]*[A-Za-z0-9_])?"
    if not re.fullmatch(f"{part}/{part}", text) or re.search(r"--|\.\.|\.git$", text) or len(text.rpartition("/")[2]) > LONGEST_NAME:
        raise UserError(f"--hub {text}: expected OWNER/NAME, as the hub's addresses have it")
    return text


def open_hub(repository):
    """The hub's client, once it is known that it can send: library, network, token. UserError otherwise."""
    check_network_variables()
    hub = import_hub("--hub")
    token = hub.get_token()
    if not token:
        raise UserError("--hub: no access token; set HF_TOKEN, or log in with: hf auth login")
    api = hub.HfApi(token=token)
    with push_errors(hub, repository):
        access = (api.whoami().get("auth") or {}).get("accessToken") or {}
    if access.get("role") == "read":
        raise UserError("--hub: the access token may only read; expected one that may write")
    return hub, api


@contextlib.contextmanager
def push_errors(hub, repository):
    """Turn what can go wrong at the hub or on the way into one line."""
    place = f"--hub {repository} at {hub.constants.ENDPOINT}"
    try:
        yield
    except hub.errors.OfflineModeIsEnabled:
        raise UserError(f"--hub {repository}: HF_HUB_OFFLINE is set, so nothing can be sent") from None
    except hub.errors.HfHubHTTPError as error:
        said = error.server_message or one_line(error)
        refused = {401: "the access token is refused", 403: "the access token may not write there"}
        status = error.response.status_code
        raise UserError(f"{place}: {refused.get(status, f'status {status}')}: {' '.join(said.split())}") from None
    except (hub.errors.HTTPError, OSError, ValueError, RuntimeError) as error:  # RuntimeError: around any other, of one file
        raise UserError(f"{place}: {one_line(error.__cause__ or error)}") from None


def find_artifacts(runs, given):
    """{seed: path} of the runs' artifacts: among the `given`, else where the logs say, by SHA-256; UserError where one is missing."""
    found = {}
    for run in runs:
        found[run.seed] = find_artifact(run, given)
        if found[run.seed] is None:
            logged = next(iter(places_of(run, "artifact_path")), "no path")
            raise UserError(f"--hub: seed {run.seed}: no artifact with the SHA-256 of {run.log} at {logged}; expected --artifact FILE")
    return found


def model_card(readme, artifacts):
    """README.md of the repository: the folder's, what the hub reads at its head, and the artifacts, {seed: (name, bytes, SHA-256)}."""
    rows = "\n".join(f"| {seed} | `{name}` | {size:,} | `{digest}` |" for seed, (name, size, digest) in artifacts.items())
    return CARD_HEAD + readme + CARD_ARTIFACTS.format(rows=rows)


def push(client, repository, files, artifacts, message):
    """Send {name: bytes} and the artifacts, {seed: path}, in one commit; returns its address."""
    hub, api = client
    named = {seed: (f"seed{seed}.ternary.ptz", path) for seed, path in artifacts.items()}
    listed = {seed: (name, path.stat().st_size, sha256_file(path)) for seed, (name, path) in named.items()}
    card = model_card(files["README.md"].decode(), listed).encode()
    sent = files | {"README.md": card} | dict(named.values())
    operations = [hub.CommitOperationAdd(path_in_repo=name, path_or_fileobj=content) for name, content in sent.items()]
    with push_errors(hub, repository):
        api.create_repo(repository, private=True, exist_ok=True)
        return api.create_commit(repository, operations, commit_message=message).commit_url


if __name__ == "__main__":
    not_a_command("tools/make_submission.py")
