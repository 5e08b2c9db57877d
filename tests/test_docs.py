"""README and docs/ against the code: every command that stands there is one that its program takes, every error line one that is raised.

A command is parsed by the very parser of its program and its settings by `Config`; what it reads is committed, or made by an
earlier command of the page (or of README). What costs nothing is run: `NEEDS` says what the others need.
"""

from __future__ import annotations

import argparse
import ast
import fnmatch
import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import pytest
from conftest import ROOT, launch

import train_gpt

PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")), ROOT / "configs/README.md"]
PROGRAM = re.compile(r"(?:\w+=\S+ )*(?:bash \S+\.sh|(?:\.venv/bin/)?python3? \S+\.py|torchrun )")
SETTING = re.compile(r"([A-Z][A-Z0-9_]*)=(.*)", re.DOTALL)
# what the reader puts in its place: FILES, OWNER/NAME, A.ptz, DIR, "..."
PLACEHOLDER = re.compile(r"[A-Z]{1,8}(?:\.ptz|/NAME|/submission\.json)?|\.\.\.|book\.txt")
SETTINGS = {field.upper() for field in train_gpt.Config.__dataclass_fields__}
PARTS = {field for field in dir(train_gpt.Config) if not field.startswith("_")}

# The first that fits a command's text says what it needs; what fits none is run by this file.
NEEDS = {
    "a GPU": r"torchrun|nproc_per_node=8|^(?!.*ALLOW_CPU).*run_8xh100\.sh|gpu_queue\.sh|rehearse_gpu\.sh|--full|tiles\.py",
    "the network": r"prepare_data\.py fetch|--data fineweb|--hub|pip install",
    "minutes": r"run_\w+\.sh|setup\.sh|bench/\w+\.py|campaign\.py|prepare_data\.py corpus|report\.py|tour\.py",
    "files of the reader's or of a run": r"\b(?:FILES?|DIR|FOLDER|OUT)\b|[AB]\.ptz|THEIR|demo_sp4096|logs/demo\.|data/(?:mine|bench)/|data/mine|logs/record_|"
                                         r"settings_page\.py|train_gpt\.py$",
}  # fmt: skip
# What a program makes besides its --out, as a pattern; those that stand on a page may be read by later commands there.
MAKES = {
    "run_demo.sh": ("data/demo_sp4096*", "logs/demo.*"), "setup.sh": ("data/demo_sp4096*", ".venv/*"),
    "run_8xh100.sh": ("logs/record_*", "logs/rehearsal*"), "bench/arms.py": ("data/bench/*", "data/bench/free/logs/*.txt"),
}  # fmt: skip


class Command(NamedTuple):
    """One command of a page."""

    page: str
    text: str
    settings: dict[str, str]
    words: tuple[str, ...]  # program first
    presets: tuple[str, ...]

    @property
    def script(self) -> str:
        """The file that runs, relative to the repository; pip and torchrun's module by name."""
        words = [word for word in self.words if word not in ("bash", "python", ".venv/bin/python")]
        return "torchrun" if words[:2] == ["-m", "torch.distributed.run"] else words[0]

    @property
    def arguments(self) -> list[str]:
        return list(self.words[self.words.index(self.script) + 1 :]) if self.script in self.words else list(self.words[3:])

    @property
    def needs(self) -> str:
        return next((need for need, pattern in NEEDS.items() if re.search(pattern, " ".join([*self.settings, self.text]))), "")


def code_of(text: str) -> list[str]:
    """The bash blocks of a page and the commands within its sentences."""
    prose = re.sub(r"^```\w*\n.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    inline = [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", prose)]
    return re.findall(r"^```bash\n(.*?)^```", text, re.MULTILINE | re.DOTALL) + [code for code in inline if PROGRAM.match(code)]


def commands_in(text: str, page: str) -> list[Command]:
    """The commands of a page, in their order."""
    found = []
    for code in code_of(text):
        settings, presets = {}, []
        code = re.sub(r"(?<=\S)\n {4,}", "; ", re.sub(r"\\\n\s*", "", code)) if code.startswith("(") else re.sub(r"\\\n\s*", "", code)
        for line in code.splitlines():
            lexer = shlex.shlex(line, posix=True, punctuation_chars=";&()")
            lexer.whitespace_split = True
            words: list[str] = []
            for word in [*lexer, ";"]:
                if not word or word.strip(";&()"):
                    words.append(word)
                    continue
                own = {m[1]: m[2] for m in map(SETTING.fullmatch, words) if m} if words else {}
                own = dict(list(own.items())[: next((i for i, w in enumerate(words) if not SETTING.fullmatch(w)), len(words))])
                rest = words[len(own) :]
                if rest and rest[0] == ".":
                    presets.append(rest[1])
                elif rest and rest[0] != "set":
                    found.append(Command(page, " ".join(words), settings | own, tuple(rest), tuple(presets)))
                elif not rest:
                    settings |= own
                words = []
    return found


COMMANDS = [command for page in PAGES for command in commands_in(page.read_text(), page.relative_to(ROOT).as_posix())]
COMMITTED = set(subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines())


def named(command: Command) -> str:
    return f"{command.page}: {command.text}"[:90]


every_command = pytest.mark.parametrize("command", COMMANDS, ids=named)


class Parsed(Exception):  # noqa: N818
    """A command line that its parser took."""


def parse(script: str, arguments: list[str], monkeypatch) -> argparse.Namespace:
    """What the parser of a program makes of a command line, the program started as a command; SystemExit where it refuses."""
    plain = argparse.ArgumentParser.parse_args

    def parse_args(self, args=None, namespace=None):
        raise Parsed(plain(self, args, namespace))

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    monkeypatch.setattr(sys, "path", [str((ROOT / script).parent), *sys.path])
    with mock.patch.dict(os.environ), pytest.raises(Parsed) as parsed:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    return parsed.value.args[0]


def of_shell(script: str, argument: str) -> bool:
    """Whether the comment at the head of a shell script, its usage, has the argument."""
    head = re.match(r"(?:#.*\n)+", (ROOT / script).read_text())[0]
    return re.search(rf"(?<![\w-]){re.escape(argument)}(?![\w-])", head) is not None


def takes(command: Command, monkeypatch) -> None:
    """AssertionError or SystemExit unless the program takes the command's arguments."""
    script, arguments = command.script, command.arguments
    if script == "torchrun":
        assert arguments[-1] == "train_gpt.py" and all(re.fullmatch("--standalone|--nproc_per_node=[0-9]+", a) for a in arguments[:-1])
        return
    if script == ".venv/bin/pip":
        assert arguments[:1] == ["install"]
        return
    assert script in COMMITTED, f"{script}: no such file"
    if script == "train_gpt.py":
        assert arguments in ([], ["--help"])
    elif script == "run_8xh100.sh":
        parse("tools/make_submission.py", [*arguments, "logs/record_seed42.txt"], monkeypatch)
    elif script.endswith(".sh"):
        assert all(PLACEHOLDER.fullmatch(a) or of_shell(script, a) for a in arguments), arguments
    elif "argparse" in (source := (ROOT / script).read_text()) or "OneLineParser" in source:
        parse(script, arguments, monkeypatch)
    else:
        assert arguments == []


@every_command
def test_the_program_takes_the_commands_options(command, monkeypatch):
    takes(command, monkeypatch)


def settings_in(command: Command) -> dict[str, str]:
    """NAME=value in the environment, and in the arguments that hold settings (arms, ranges)."""
    inside = {m[1]: "" for a in command.arguments for m in map(SETTING.fullmatch, a.split()) if m}
    return inside | command.settings


@every_command
def test_the_commands_settings_are_some_of_its_program(command):
    script = ROOT / command.script
    source = script.read_text() + (ROOT / "tools/common.sh").read_text() if script.is_file() else ""
    for name in settings_in(command).keys() - SETTINGS:
        assert re.search(rf"\b{name}\b", source), f"{name}: neither a setting nor a variable of {command.script}"
    env = {}
    for preset in (*command.presets, *["configs/demo.env"] * (command.script == "run_demo.sh")):
        env |= dict(line.split("=", 1) for line in (ROOT / preset).read_text().splitlines() if line and not line.startswith("#"))
    env |= {name: value for name, value in command.settings.items() if name in SETTINGS and not PLACEHOLDER.fullmatch(value)}
    train_gpt.Config.from_env(env)


def paths_in(command: Command) -> list[str]:
    """The arguments and settings that name files to be read."""
    arguments = command.arguments
    after_out = {arguments[i + 1] for i, word in enumerate(arguments[:-1]) if word in ("--out", "--pull-request", "--records")}
    words = [*arguments, *(value for name, value in command.settings.items() if name.endswith(("_PATH", "CORPUS")))]
    words = [word.replace("$DATA_PATH", command.settings.get("DATA_PATH", "")) for word in words if word not in after_out]
    is_path = re.compile(r"[^\s=]*/[^\s=]+|[\w*.-]+\.(?:txt|py|md|png|ptz|jsonl?|env|model|sh)")
    return [*command.presets, *(word for word in words if is_path.fullmatch(word) and not PLACEHOLDER.fullmatch(word))]


def made_before(command: Command) -> set[str]:
    """Patterns of what README's commands and those before this one on its page leave behind."""
    before = COMMANDS[: COMMANDS.index(command)]
    made = set()
    for earlier in (c for c in before if c.page in (command.page, "README.md")):
        made |= set(MAKES.get(earlier.script, ()))
        arguments = earlier.arguments
        made |= {arguments[i + 1] + "*" for i, word in enumerate(arguments[:-1]) if word == "--out"}
    return made


@every_command
def test_what_a_command_reads_is_committed_or_made_before(command):
    for path in paths_in(command):
        there = path in COMMITTED or any(fnmatch.fnmatch(file, path) or file.startswith(f"{path}/") for file in COMMITTED)
        prefix = command.script == "bench/arms.py" and any(made.startswith(path) for made in made_before(command))
        assert there or prefix or any(fnmatch.fnmatch(path, made) for made in made_before(command)), f"{path}: made by none before"


def test_every_need_is_some_commands_and_not_every():
    needs = [command.needs for command in COMMANDS]
    assert set(needs) == {*NEEDS, ""} and len(COMMANDS) > 60


@pytest.mark.slow
@pytest.mark.parametrize("page", sorted({c.page for c in COMMANDS if not c.needs}))
def test_what_needs_nothing_runs(page, tmp_path, monkeypatch):
    """One after the other in a folder that has the repository's files and takes what the commands write."""
    (tmp_path / "docs/pictures").mkdir(parents=True)
    for path in (*ROOT.glob("*.*"), *(ROOT / name for name in ("logs", "configs", "tools", "bench"))):
        if not path.name.startswith("."):
            (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    for command in (c for c in COMMANDS if c.page == page and not c.needs):
        if command.script == "train_gpt.py":  # it takes the signals of its process
            assert launch({}, tmp_path, argv=[command.script, *command.arguments]).returncode == 0
        else:
            assert not exit_code_of(command, monkeypatch), command.text


def exit_code_of(command: Command, monkeypatch) -> object:
    """What a tool ends with, started in this process."""
    arguments = [file for word in command.arguments for file in (sorted(map(str, Path().glob(word))) if "*" in word else [word])]
    monkeypatch.setattr(sys, "argv", [command.script, *arguments])
    monkeypatch.setattr(sys, "path", [str(ROOT / Path(command.script).parent), *sys.path])
    with mock.patch.dict(os.environ), pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / command.script), run_name="__main__")
    return end.value.code


WRONG = {
    "an option of no script": "bash run_demo.sh --txt FILES",
    "an option of no tool": ".venv/bin/python tools/sample.py docs/x.ptz --token 3 --sede 5",
    "a value that no parser takes": ".venv/bin/python tools/sample.py LICENSE --tokens many",
    "a script that is gone": ".venv/bin/python tools/samples.py LICENSE",
    "a module that torchrun does not start": "torchrun --standalone --nproc_per_node=8 train.py",
    "a misspelt setting": "NUM_LAYER=3 bash run_demo.sh",
    "a value out of range": "NUM_LAYERS=0 bash run_demo.sh",
    "settings that do not go together": "MODEL_DIM=100 bash run_demo.sh",
    "a misspelt setting of an arm": 'bash run_demo.sh; .venv/bin/python bench/arms.py free --arm "MODEL_DIMS=384"',
    "a file that none makes": ".venv/bin/python tools/inspect_artifact.py data/demo/demo.ternary.ptz",
    "a log that is not committed": ".venv/bin/python tools/runs.py compare logs/R018_none.txt",
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_command_is_found_out(case, monkeypatch):
    found = commands_in(f"```bash\n{WRONG[case]}\n```\n", "page.md")
    monkeypatch.setattr(sys.modules[__name__], "COMMANDS", [*COMMANDS, *found])
    checks = (lambda c: takes(c, monkeypatch), test_the_commands_settings_are_some_of_its_program, test_what_a_command_reads_is_committed_or_made_before)
    with pytest.raises((AssertionError, SystemExit, train_gpt.UserError)):
        for command in found:
            for check in checks:
                check(command)


# -------------------------------------------------------------------------------------------------- error lines

# what PyTorch, Python or the system say, not this project
FOREIGN = {"Killed", "[Errno 28] No space left on device"}
HOLE = "\0"


def python_templates(source: str) -> list[str]:
    """The strings of a program, with a hole where an f-string holds a value."""
    found = []
    tree = ast.parse(source)
    inner = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            found.append("".join(part.value if isinstance(part, ast.Constant) else HOLE for part in node.values))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in inner:
            found.append(node.value)
    return found


def shell_templates(source: str) -> list[str]:
    """The lines of a script without its comments, with a hole for each expansion."""
    lines = [line for line in re.sub(r"\\\n\s*", "", source).splitlines() if not line.lstrip().startswith("#")]
    return [re.sub(r"\$\{[^}]*\}|\$\w+|\$\([^)]*\)", HOLE, line) for line in lines]


@pytest.fixture(scope="module")
def templates():
    """The strings of each file of the program, its tools and scripts."""
    sources = [ROOT / "train_gpt.py", *ROOT.glob("tools/*.py"), *ROOT.glob("*.sh"), *ROOT.glob("tools/*.sh")]
    read = {".py": python_templates, ".sh": shell_templates}
    return {path.name: "\n\n".join(read[path.suffix](path.read_text())) for path in sources}


VALUES = re.compile(r"\.\.\.|\b[A-Z][A-Z0-9]*_[A-Z0-9_]+\b(?:=)?|\b\d+\b|[:;] |, but |\bexpected |[='()]")


def raised(message: str, templates: dict[str, str]) -> bool:
    """Whether the constant parts of a message are one file's: what stands between `...`, numbers, settings, colons and the like, whose
    two sides the code may join. A setting's name may be put in by the code."""
    message = message.replace(r"\|", "|")
    names = re.findall(r"\b[A-Z][A-Z0-9]*_[A-Z0-9_]+\b", message)
    parts = [part.strip() for part in VALUES.split(message)]
    parts = [part for part in parts if re.search("[a-zA-Z]{2}", part)]
    known = all(name in SETTINGS or any(re.search(rf"\b{name}\b", text, re.IGNORECASE) for text in templates.values()) for name in names)
    return known and any(all(part in text for part in parts) for text in templates.values())


def messages_of(page: str) -> list[str]:
    """The error lines in a page's tables: what stands first in a row, in code's letters."""
    rows = re.findall(r"^\| (.+?) (?<!\\)\| ", (ROOT / page).read_text(), re.MULTILINE)
    return [message for row in rows for message in re.findall(r"`([^`]+)`", row) if message not in FOREIGN]


@pytest.mark.parametrize("message", messages_of("docs/troubleshooting.md"))
def test_an_error_line_of_the_troubleshooting_page_is_the_codes(message, templates):
    assert raised(message, templates)


def test_an_error_line_that_no_code_has_is_found_out(templates):
    assert raised("TOKENIZER_PATH='...' has ... pieces, but VOCAB_SIZE=...", templates)
    for message in ("TOKENIZER_PATH='...' has ... pieces, but VOCABULARY=...", "TOKENIZER_PATH=...: no such folder at all", "NO_SETTING=..."):
        assert not raised(message, templates)
