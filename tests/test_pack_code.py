"""The packed train_gpt.py is the readable one in fewer bytes: the same losses, the same artifact, and hard to fool."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys

import pack_code
import pytest
from conftest import ROOT, TINY, launch

SOURCE = (ROOT / "train_gpt.py").read_text()
TAMPERED = "print('tampered')\n"

# What the stripping has to get right; run as it is, it prints what it is made of.
HARD = '''\
#!/usr/bin/env python3
"""Module docstring."""
from __future__ import annotations  # a comment
import inspect, sys
y = '' '' f"" ""
x = {"a": 1,  # inside brackets
     "b": "#no comment", 'c': """two
    lines # of text""",}
name, wide = "é", 3
class Empty(ValueError):
    """Nothing but a docstring."""
class Pair:
    "implicit" " concatenation"

    left: int = 1  # field
    """Not a docstring: an expression that is compiled away."""
def one_line(): "Only this."
def f(a, *b, k=-1, **rest):
    """Docstring
        of several lines."""
    if a: return f"{name!r:>{wide}} {{x}} {'nested' + f'{a - -1}'}" "# joined"

    for i in range(3):
        # only a comment
        pass
    else:
        return"no blank" if not a else 1 if a in(1,2) else lambda *v: -v[0]
async def g():
    """Async."""
    return [y async for y in x] \\
        if x else None
class Outer:
    def method(self):
        """é: a docstring whose columns are not bytes.""" ; return 1 if self else 2
'''
SHOW = '''
print(__name__, f(1), f(0), one_line(), Outer().method.__name__, Pair.left, Empty.__mro__[1].__name__, x)
print(sys.modules[__name__].f is f, inspect.iscoroutinefunction(g), wide)
'''


def start(path, tmp, *arguments):
    """A packed program as a process of its own, with `tmp` as the temporary directory."""
    environment, pipe = {"PATH": os.environ["PATH"], "TMPDIR": str(tmp)}, subprocess.PIPE
    return subprocess.Popen([sys.executable, str(path), *arguments], stdout=pipe, stderr=pipe, text=True, env=environment)


def outcome(process):
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


@pytest.fixture
def packed(tmp_path):
    """A packed program of one print: (its path, an empty temporary directory)."""
    path, tmp = tmp_path / "small.py", tmp_path / "tmp"
    path.write_bytes(pack_code.pack("print('ran', __file__, f.__name__ if (f := (lambda: 0)) else 0)\n"))
    tmp.mkdir()
    return path, tmp


def cache_of(tmp):
    (folder,) = tmp.iterdir()
    assert folder.stat().st_mode & 0o777 == 0o700
    return folder


# -------------------------------------------------------------------------------------------------- stripping


def test_stripping_keeps_the_program():
    """`strip_source` compares the syntax trees itself; here the results of running both, and that something went."""
    source = HARD.replace(" ; return", "\n        return") + SHOW
    stripped = pack_code.strip_source(source)
    commands = [[sys.executable, "-c", text] for text in (source, stripped)]
    results = [subprocess.run(command, capture_output=True, text=True, timeout=60) for command in commands]
    assert results[0].returncode == 0 and results[0].stdout == results[1].stdout
    assert not re.search("# (a comment|inside|field|only)|ocstring of|Only this", stripped)
    assert "\n\n" not in stripped and "two\n    lines # of text" in stripped


def test_a_program_that_reads_its_docstrings_keeps_them(tmp_path):
    source = '"""What it says."""\ndef f():\n    """And f."""\nprint(__doc__, f.__doc__)\n'
    assert '"""And f."""' in pack_code.strip_source(source)
    (tmp_path / "p.py").write_bytes(pack_code.pack(source))
    assert outcome(start(tmp_path / "p.py", tmp_path)) == (0, "What it says. And f.\n", "")
    assert "And f" not in pack_code.strip_source(source.replace("__doc__", "__name__"))


ANNOTATED = '''\
from __future__ import annotations
import functools, typing
def kept(function): return function
@kept
def f(a: int, b: list[str] = ()) -> dict[str, int]:
    inner: int = 1
    return {}
@functools.cache
def g(a: int, /, b: "text" = 1, *c: int, d: dict[str, tuple[int, ...]] = None, **e: float) -> (
    tuple[int, ...]
):
    x: int = 1; y: int; z: int = 2
    c.z: float = 2.0
    class Inner:
        field: int = 0
    return lambda x: {1: x}
class T(typing.NamedTuple):
    """A class's own stay."""
    a: int = 1
    def method(self, é: float) -> T: return self
top: int = 1
'''


def test_annotations_that_nothing_reads_go():
    """Not a class's, nor those of a decorated function, nor any that are evaluated or asked for."""
    stripped = pack_code.strip_source(ANNOTATED.replace("(\n    tuple[int, ...]\n)", "tuple[int, ...]").replace("c.z", "g.z"))
    for text in ("def f(a:int,b:list[str]=())->dict[str,int]:", "inner:int=1", "def g(a,/,b=1,*c,d=None,**e):", "x=1;y:int;z=2\n",
                 "g.z=2.0\n", "field:int=0", " a:int=1", "def method(self,é):return self", "top:int=1"):  # fmt: skip
        assert text in stripped, text
    with pytest.raises(SyntaxError):
        pack_code.strip_source(ANNOTATED)  # parentheses around an annotation
    for source in (ANNOTATED.replace("from __future__ import annotations\n", ""), ANNOTATED + "print(f.__annotations__)\n"):
        assert "b:\"text\"=1" in pack_code.strip_source(source)


SETTING = '''\
def setting(default, meaning, *, group="", model=False, of="", **limits):
    return default, meaning, group, model, of, limits
print(setting(1, "in words, (so) " "to say", group="Run, first"  # a comment
              , least=0), setting("x", "y",
    model=True, of=\'\'\'a system\'\'\'), setting(2, "alone", of="b", group="c", most=3))
'''


def test_what_settings_say_in_words_goes(tmp_path):
    """Where `setting` is declared as in train_gpt.py, and nothing else of its calls."""
    (tmp_path / "p.py").write_bytes(pack_code.pack(SETTING))
    left = "(1, '', '', False, '', {'least': 0}) ('x', '', '', True, '', {}) (2, '', '', False, '', {'most': 3})\n"
    assert outcome(start(tmp_path / "p.py", tmp_path)) == (0, left, "")
    foreign = "from x import setting\nsetting(1, 'say', of='b')\n"
    for other in (SETTING.replace("meaning", "means"), SETTING.replace('of=""', "of=0"), foreign):
        assert "say" in pack_code.strip_source(other)


def test_what_cannot_be_stripped_is_refused():
    with pytest.raises(SyntaxError):
        pack_code.strip_source(HARD)  # a statement after a docstring, on its line
    with pytest.raises(SyntaxError):
        pack_code.strip_source("def f(:\n")


def test_packing_is_deterministic_and_unpacks_to_the_stripped_program(tmp_path, capsys):
    packed = pack_code.pack(SOURCE)
    pack_code.strip_source.cache_clear()
    assert pack_code.pack(SOURCE) == packed and len(packed) < 0.35 * len(SOURCE.encode())
    assert pack_code.unpack(packed.decode()) == pack_code.strip_source(SOURCE)
    out = tmp_path / "new" / "packed.py"
    assert pack_code.main([str(ROOT / "train_gpt.py"), "--out", str(out)]) == 0 and out.read_bytes() == packed
    assert f"{len(packed):,} bytes" in capsys.readouterr().out
    assert pack_code.main(["--unpack", str(out)]) == 0 and capsys.readouterr().out == pack_code.strip_source(SOURCE)
    twice = [str(out), "--out", str(tmp_path / "twice.py")]
    readable, missing = [str(ROOT / "train_gpt.py"), "--unpack"], ["no.py", "--unpack"]
    for arguments in (twice, readable, missing):
        assert pack_code.main(arguments) == 2 and capsys.readouterr().err.count("\n") == 1
    with pytest.raises(SystemExit) as end:
        pack_code.main(["--unpack", str(out), "--out", str(tmp_path / "program.py")])
    assert end.value.code == 2 and "expected no --out" in capsys.readouterr().err and not (tmp_path / "program.py").exists()


@pytest.mark.parametrize("change", [lambda data: b"\xef\xbb\xbf" + data, lambda data: data.replace(b"\n", b"\r\n"),
                                    lambda data: data.replace(b"\n", b"\r")], ids=["mark", "CRLF", "CR"])  # fmt: skip
def test_line_ends_and_a_byte_order_mark_change_nothing_but_the_size_that_is_told(change, tmp_path, capsys):
    source = change(b'# a comment\nx = """two\nlines"""\nprint(repr(x))\n')
    (tmp_path / "p.py").write_bytes(source)
    assert pack_code.main([str(tmp_path / "p.py"), "--out", str(tmp_path / "packed.py")]) == 0
    assert f" of {len(source):,}, sha256" in capsys.readouterr().out
    assert outcome(start(tmp_path / "packed.py", tmp_path)) == (0, "'two\\nlines'\n", "")


def test_unpacking_is_byte_by_byte_whatever_the_console(tmp_path):
    (tmp_path / "p.py").write_bytes(pack_code.pack("print('é中')\n"))
    tool = [sys.executable, str(ROOT / "tools/pack_code.py"), "--unpack", str(tmp_path / "p.py")]
    done = subprocess.run(tool, env=os.environ | {"PYTHONIOENCODING": "ascii"}, capture_output=True, check=False)
    assert (done.returncode, done.stdout.decode(), done.stderr) == (0, "print('é中')\n", b"")


def test_a_packed_file_may_have_the_longest_name(tmp_path):
    (tmp_path / "p.py").write_text("x = 1\n")
    out = tmp_path / ("x" * 252 + ".py")
    assert pack_code.main([str(tmp_path / "p.py"), "--out", str(out)]) == 0 and out.stat().st_size


# -------------------------------------------------------------------------------------------------- the stub


def test_eight_processes_unpack_at_once(packed):
    path, tmp = packed
    results = [outcome(p) for p in [start(path, tmp) for _ in range(8)]]
    assert results == [(0, f"ran {path} <lambda>\n", "")] * 8
    (file,) = cache_of(tmp).iterdir()  # and no half-written ones
    assert hashlib.sha256(file.read_bytes()).hexdigest() == file.stem


@pytest.mark.parametrize("content", [TAMPERED, ""])
def test_a_tampered_cached_file_is_replaced_and_not_run(packed, content):
    path, tmp = packed
    outcome(start(path, tmp))
    (file,) = cache_of(tmp).iterdir()
    good = file.read_bytes()
    file.write_text(content)
    assert outcome(start(path, tmp)) == (0, f"ran {path} <lambda>\n", "")
    assert file.read_bytes() == good


def test_a_damaged_packed_file_does_not_run(packed):
    path, tmp = packed
    text = path.read_text()
    at = text.index('exec(_program("') + 60
    path.write_text(text[:at] + ("A" if text[at] != "A" else "B") + text[at + 1 :])
    code, out, err = outcome(start(path, tmp))
    assert (code, out) == (2, "") and "damaged" in err and err.count("\n") == 1
    with pytest.raises(ValueError):
        pack_code.unpack(path.read_text())


def test_a_folder_that_is_not_private_is_refused(packed):
    path, tmp = packed
    outcome(start(path, tmp))
    folder = cache_of(tmp)
    (file,) = folder.iterdir()
    folder.chmod(0o777)
    code, out, err = outcome(start(path, tmp))
    assert (code, out) == (2, "") and "not a private folder" in err and "set TMPDIR" in err and err.count("\n") == 1
    file.unlink()
    folder.rmdir()
    (tmp / "elsewhere").mkdir(mode=0o700)
    folder.symlink_to(tmp / "elsewhere")
    assert outcome(start(path, tmp))[0] == 2


def test_an_unusable_temporary_directory(packed):
    """One that is not there is passed over, as Python does; one that cannot take the folder ends the run in one line."""
    path, tmp = packed
    assert outcome(start(path, tmp / "missing"))[:2] == (0, f"ran {path} <lambda>\n")
    (tmp / f"train_gpt-{os.getuid()}").write_text("in the way")
    code, out, err = outcome(start(path, tmp))
    assert (code, out) == (2, "") and "cannot unpack" in err and "set TMPDIR" in err and err.count("\n") == 1


# -------------------------------------------------------------------------------------------------- train_gpt.py, packed


@pytest.fixture(scope="module")
def packed_trainer(tmp_path_factory):
    """The packed train_gpt.py in a folder of its own."""
    path = tmp_path_factory.mktemp("packed") / "train_gpt.py"
    path.write_bytes(pack_code.pack(SOURCE))
    return path


IMPORT = """
import contextlib, dataclasses, inspect, linecache, os, sys, torch
with contextlib.suppress(ImportError):
    import triton  # then train_gpt.py has its kernels, and PyTorch reads the hints of its operators
import train_gpt
from pathlib import Path
from typing import get_type_hints
cfg = train_gpt.Config.from_env({key: value for key, value in %r.items()})
assert dataclasses.replace(cfg, seed=8).seed == 8 and get_type_hints(train_gpt.Config)["seed"] is int
source = inspect.getsource(train_gpt.ternarize)
assert source.startswith("def ternarize(")
assert Path(inspect.getsourcefile(train_gpt.ternarize)).parent.parent == Path(os.environ["TMPDIR"])
model = train_gpt.GPT(cfg)
x = torch.randint(320, (2, 32))
nats = torch.compile(model, backend="eager", fullgraph=True)(x, x)
assert torch.equal(nats, model(x, x)) and train_gpt.__file__ == str(Path("train_gpt.py").resolve())
"""


def test_the_packed_trainer_is_a_module_with_sources(packed_trainer, tmp_path):
    done = launch({"TMPDIR": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"}, packed_trainer.parent, argv=["-c", IMPORT % (TINY | {"NUM_LAYERS": "1"})])
    assert done.returncode == 0, done.stderr


def test_the_packed_trainers_help_has_no_words(packed_trainer, tmp_path):
    """Names, defaults and ranges, as the readable one's, without meanings, groups and systems."""
    paths = ROOT / "train_gpt.py", packed_trainer
    helps = [launch({"TMPDIR": str(tmp_path)}, tmp_path, argv=[str(path), "--help"]) for path in paths]
    assert all(done.returncode == 0 and not done.stderr for done in helps)
    readable, bare = (done.stdout.splitlines() for done in helps)
    settings = [line for line in readable if re.match(r"  [A-Z0-9_]+=", line)]
    assert bare[0] == readable[0] and len(settings) == len(bare) - 1 > 100
    for line, left in zip(settings, bare[1:], strict=True):
        name, allowed = re.fullmatch(r"(  [A-Z0-9_]+=\S*  ) \[(.*)\]", left).groups()
        assert line.startswith(name) and line.endswith(f"[{allowed}]") and len(line) > len(left), line


def run_trainer(script, folder, data_dir, processes):
    """A short run; returns (its result, its artifact, its log)."""
    folder.mkdir()
    (folder / "tmp").mkdir()
    data = {"DATA_PATH": str(data_dir), "TOKENIZER_PATH": str(data_dir / "tokenizer.model"), "TMPDIR": str(folder / "tmp")}
    short = {"RUN_ID": "r", "ITERATIONS": "8", "SLIDING_EVAL_STRIDE": "32"}
    done = launch(TINY | short | data, folder, processes, argv=[str(script)])
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.strip().splitlines()[-1].removeprefix("result "))
    return result, (folder / "final_model.ternary.ptz").read_bytes(), (folder / "logs/r.txt").read_text()


@pytest.mark.campaign
def test_the_packed_trainer_trains_to_the_same_bytes(packed_trainer, data_dir, tmp_path):
    readable, artifact, _ = run_trainer(ROOT / "train_gpt.py", tmp_path / "readable", data_dir, 1)
    for processes in (1, 2):
        result, packed_artifact, log = run_trainer(packed_trainer, tmp_path / f"packed{processes}", data_dir, processes)
        assert result["first_losses"] == readable["first_losses"] and len(result["first_losses"]) == 8
        assert result["roundtrip_val_loss"] == readable["roundtrip_val_loss"] and result["world_size"] == processes
        assert packed_artifact == artifact
        code = packed_trainer.read_bytes()
        assert result["code_bytes"] == len(code) and result["code_sha256"] == hashlib.sha256(code).hexdigest()
        assert log.encode().startswith(code)
