#!/usr/bin/env python3
"""Check the logs of a record run against the rules of Parameter Golf, one rule a line, each with the line that shows it.

    compliance.py logs/record_seed*.txt --code logs/record_train_gpt.py --artifact logs/record_seed42.ternary.ptz ...
    compliance.py logs/*.txt --record-losses 2.9869 2.9871 2.9866     is the gain 0.005 nats at p < 0.01?

Exit code 1 if a rule is broken or not shown to be kept, 2 for a mistake in the command. --non-record: hardware, FineWeb's
validation text and the gain are shown, but do not count. The log of an EVAL_ONLY=1 run among the others is no seed: what it
scored must be the artifact of one of them.

What it cannot see: which machine wrote a log, what a run saw besides its files, whether training used the validation text,
and code reached by a name that the program puts together. The network and test-time training are looked for in the syntax
tree of the program in the log.
"""

import ast
import functools
import hashlib
import json
import math
import re
import statistics
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pack_code
from command_line import run_command, start
from run_logs import BUDGET_BYTES, OneLineParser, check_same, find_artifact, read_run, scored_by
from shard_io import UserError, read_shard, shard_paths

MOST_TRAINING_MS = 600_000
MOST_EVALUATION_S = 600
LEAST_SEEDS = 3
H100_SXM = "NVIDIA H100 80GB HBM3"  # the name its driver gives; the PCIe and NVL cards have others
LEAST_GAIN_NATS, MOST_P = 0.005, 0.01
# FineWeb's first 50,000 documents (parameter-golf #1804). A blank at a document's start may be counted or not: one byte each
FINEWEB_VAL_BYTES, FINEWEB_VAL_DOCUMENTS = 151_080_891, 50_000


@dataclass(frozen=True)
class Finding:
    """Whether a rule is kept, and what shows it. What is not `required` does not count."""

    rule: str
    ok: bool
    evidence: str
    required: bool = True

    @property
    def breach(self):
        return self.required and not self.ok


@dataclass(frozen=True)
class Files:
    """What the logs can be compared with; what is None or empty is not compared."""

    code: Path | None = None  # train_gpt.py as shipped
    artifacts: tuple = ()
    data: Path | None = None  # the folder of the validation shards, instead of the logged data_path


def of_seed(run, rule, ok, evidence):
    return Finding(rule, bool(ok), f"seed {run.seed}: {evidence}")


# -------------------------------------------------------------------------------------------------- the log of one seed


def expected_lines(run):
    """(name, pattern) of the lines that a whole run's log has, in their order."""
    loss = r"val_loss:\d+\.\d+ val_bpb:\d+\.\d+"
    lines = [
        ("versions", r"python:\S+ torch:\S+ .*gpu:"),
        ("config", r"config \{"),
        ("params", r"params:\d+ L:\d+ d:\d+ h:\d+ kv:\d+ ws:\d+ ga:\d+ s:\d+"),
        ("warmup", r"warmup:\d+/\d+$" if run.config.get("warmup_steps") else None),
        ("step loss", r"step:\d+/\d+ loss:\d+\.\d+ t:\d+ms avg:[\d.]+ms"),
        ("stopping_early", r"stopping_early: \w+ train_time:\d+ms step:\d+/\d+" if stopped_early(run) else None),
        ("step val_loss", rf"step:\d+/\d+ {loss} train_time:\d+ms zero_frac:"),
        ("artifact", r"artifact:[\d.]+MB .*code:\d+"),
        ("budget", r"budget:\d+/\d+ .*(FITS|OVER)$"),
        ("final_ternary_roundtrip", rf"final_ternary_roundtrip {loss} eval_time:\d+ms"),
        ("final_sliding", rf"final_sliding {loss} .*eval_time:\d+ms" if run.config.get("sliding_eval", True) else None),
        ("result", r"result \{"),
    ]
    return [(name, pattern) for name, pattern in lines if pattern]


def stopped_early(run):
    return run.result["steps"] < run.config.get("iterations", 0)


def find_lines(run):
    """{name: index of the last line of its kind, or None}"""
    found = {}
    for name, pattern in expected_lines(run):
        matches = re.compile(pattern).match
        found[name] = next((i for i in reversed(range(len(run.lines))) if matches(run.lines[i])), None)
    return found


def line_of(run, name):
    at = find_lines(run).get(name)
    return "" if at is None else run.lines[at]


def check_lines(run):
    """Every line is there, they are in their order, and nothing follows the result."""
    found = find_lines(run)
    missing = [name for name, at in found.items() if at is None]
    order = [at for at in found.values() if at is not None]
    if missing:
        return of_seed(run, "log lines", False, f"{run.log.name} has no line {', '.join(missing)}")
    if order != sorted(order) or order[-1] != len(run.lines) - 1:
        return of_seed(run, "log lines", False, f"{run.log.name} has its lines in another order, or more after the result")
    return of_seed(run, "log lines", True, f"{len(found)} kinds in order: {', '.join(found)}")


def check_figures(run):
    """The result line says what the lines before it said while the run went on."""
    r = run.result
    scores = [("step val_loss", ""), ("final_ternary_roundtrip", "roundtrip_"), ("final_sliding", "sliding_")]
    expected = {name: f"val_loss:{r[f'{prefix}val_loss']:.4f} val_bpb:{r[f'{prefix}val_bpb']:.4f}"
                for name, prefix in scores if r.get(f"{prefix}val_loss") is not None}  # fmt: skip
    expected |= {"params": f"ws:{r['world_size']}", "budget": f"budget:{r['total_bytes']}/{BUDGET_BYTES}"}
    expected["artifact"] = f"code:{r['code_bytes']}"
    differ = [f"{name} lacks {text!r}" for name, text in expected.items() if f"{text} " not in f"{line_of(run, name)} "]
    differ += ["params has another seed"] * (not line_of(run, "params").endswith(f" s:{run.seed}"))
    return of_seed(run, "figures", not differ, "; ".join(differ) or f"the result line repeats {', '.join(expected)}")


def check_training_time(run):
    """The clock that stopped training, from the lines and from the result; the larger counts. It goes on where an earlier life
    of a run that was killed and resumed had brought it, lost steps included."""
    shown = line_of(run, "stopping_early") or line_of(run, "step val_loss")
    pattern = r"(?:^step:.* t:|^resumed step:.* elapsed:|train_time:)(\d{1,15})ms"
    logged = [int(ms) for line in run.lines for ms in re.findall(pattern, line)]
    most, lives = max([1000 * run.result["train_time_s"], *logged]), run.result.get("restarts") or 0
    resumed = [int(n) for line in run.lines for n in re.findall(r"^resumed step:\d+ elapsed:\d+ms restarts:(\d{1,9})", line)]
    same = lives == (resumed[-1] if resumed else 0)
    ok = most <= MOST_TRAINING_MS and re.search(r"train_time:\d+ms", shown) and same
    said = f"; restarts {lives}, lost_steps {run.result.get('lost_steps')}: the time of every life" if lives else ""
    said += f"; lines say restarts {resumed}, the result {lives}" * (not same)
    return of_seed(run, "training time", ok, f"{shown or 'no line'} (at most {MOST_TRAINING_MS:,} ms; {most:,.1f} ms{said})")


def check_evaluation_time(run):
    """All of the evaluation of the saved artifact: chunked and sliding."""
    shown = line_of(run, "final_sliding") or line_of(run, "final_ternary_roundtrip")
    names = ("final_ternary_roundtrip", "final_sliding")
    logged = sum(int(ms) for name in names for ms in re.findall(r"eval_time:(\d{1,15})ms", line_of(run, name)))
    seconds = max(run.result["eval_time_s"], logged / 1000)
    return of_seed(run, "evaluation time", shown and seconds <= MOST_EVALUATION_S,
                   f"{shown or 'no line'} (at most {MOST_EVALUATION_S} s; in all {seconds:.1f} s)")  # fmt: skip


def check_bytes(run, files):
    """Code and artifact, decimal: the files' true sizes where they are given, else the logged ones."""
    r, notes = run.result, []
    code = files.code.stat().st_size if files.code else r["code_bytes"]
    artifact = find_artifact(run, files.artifacts)  # still there if the check runs where the run ran
    artifact_bytes = artifact.stat().st_size if artifact else r["artifact_bytes"]
    total = code + artifact_bytes
    if files.artifacts and not artifact:
        notes.append("none of the given artifacts has the logged SHA-256")
    if r["total_bytes"] != total or r["code_bytes"] + r["artifact_bytes"] != total:
        notes.append(f"the log says {r['code_bytes']:,} + {r['artifact_bytes']:,} = {r['total_bytes']:,}")
    sources = ["file" if given else "log" for given in (files.code, artifact)]
    measured = f"code ({sources[0]}) {code:,} + artifact ({sources[1]}) {artifact_bytes:,} = {total:,} of {BUDGET_BYTES:,}"
    shown = line_of(run, "budget")
    ok = total <= BUDGET_BYTES and not notes and shown
    return of_seed(run, "bytes", ok, "; ".join([f"{shown or 'no line'} ({measured})", *notes]))


def check_code(run, files):
    """The log begins with the file that ran, byte by byte, which is the file that ships."""
    digest = run.result["code_sha256"]
    what = f"the {run.result['code_bytes']:,} bytes of code_sha256 {digest[:16]}..."
    if not has_digest(run.code, digest):
        windows = run.content.replace(b"\n", b"\r\n")[: run.result["code_bytes"]]
        ends = ", but for its line ends: the file has CRLF, the log LF" * has_digest(windows, digest)
        return of_seed(run, "code", False, f"{run.log.name} does not begin with {what}{ends}")
    if files.code and files.code.read_bytes() != run.code:
        return of_seed(run, "code", False, f"{files.code} is not the file that ran, {what}")
    same = f", the same as {files.code}" if files.code else ""
    return of_seed(run, "code", True, f"the log begins with {what}{same}; {stood_at(run)}")


def has_digest(data, digest):
    return hashlib.sha256(data).hexdigest() == digest


def stood_at(run):
    """The commit of the file that ran, in words. The file itself is in the log: no rule asks for the commit."""
    commit = run.result.get("git_commit") or "unknown"
    if commit == "unknown":
        return "git did not track the file"
    return f"git_commit {commit.rstrip('+')}" + ", changed since" * commit.endswith("+")


def check_validation(run, files):
    """Every token of the validation split is scored; its size comes from the shards, or is FineWeb's known one."""
    limit, tokens, bytes_ = run.config.get("val_max_tokens"), run.result.get("val_tokens"), run.result.get("val_bytes")
    said = f"config val_max_tokens {limit}, result val_tokens {tokens} val_bytes {bytes_}"
    if run.result.get("decoded_bytes", bytes_) != bytes_:
        said += f" decoded_bytes {run.result['decoded_bytes']}"  # the tokenizer changes the text; what went in counts
    folder = files.data or Path(run.config["data_path"])
    if shards := shard_paths(folder, "val") if folder.is_dir() else []:
        targets = sum(len(read_shard(path)) for path in shards) - 1
        ok, size = tokens == targets, f"the shards in {folder} hold {targets} targets"
    else:
        ok, size = is_fineweb(run), f"no shards in {folder}; FineWeb's split has {FINEWEB_VAL_BYTES} bytes"
    return of_seed(run, "full validation", limit == 0 and ok, f"{said}; {size}")


def is_fineweb(run):
    bytes_ = run.result.get("val_bytes")
    return isinstance(bytes_, int) and abs(bytes_ - FINEWEB_VAL_BYTES) <= FINEWEB_VAL_DOCUMENTS


def check_fineweb(run):
    known = f"FineWeb's {FINEWEB_VAL_DOCUMENTS:,} documents have {FINEWEB_VAL_BYTES}"
    return of_seed(run, "FineWeb", is_fineweb(run), f"result val_bytes {run.result.get('val_bytes')}; {known}")


def check_hardware(run):
    ok = (run.result["device"], run.result["gpu_name"], run.result["world_size"]) == ("cuda", H100_SXM, 8)
    return of_seed(run, "8xH100", ok, f"{line_of(run, 'versions') or 'no line'}; {run.hardware}, expected 8 x {H100_SXM}")


# -------------------------------------------------------------------------------------------------- the program

# What a single-file trainer may import: these packages, and the standard library without its network and dynamic imports.
PACKAGES = {"torch", "numpy", "sentencepiece", "triton", "flash_attn", "flash_attn_interface", "zstandard", "tqdm"}
TRACKERS = {"wandb", "trackio"}  # may send what they are told over the network; imported within functions, for TRACK alone
NETWORK_MODULES = set("""asyncio asyncore asynchat ftplib http imaplib nntplib poplib smtpd smtplib socket socketserver ssl
    telnetlib urllib webbrowser wsgiref xmlrpc""".split())
IMPORT_MODULES = set("builtins code codeop imp importlib pkgutil runpy zipimport pickle marshal shelve".split())
# what starts programs, fetches files, or runs text as code, in whatever module it is; a name ending in . stands for all below
FORBIDDEN = tuple("""os.system os.popen os.exec os.spawn os.posix_spawn os.startfile pty. torch.hub. torch.utils.model_zoo.
    torch.distributed.rpc. torch.utils.cpp_extension. numpy.DataSource numpy.genfromtxt numpy.loadtxt""".split())
FORBIDDEN_BUILTINS = {"exec", "eval", "compile", "__import__", "__builtins__"}
COMMANDS = {"git": {"fetch", "pull", "push", "clone", "remote", "ls-remote", "submodule"}}  # a command: what it must not do
EVALUATION_ENTRIES = ("evaluate", "score_artifact")
CONSTRUCTORS = {"__init__", "__new__", "__post_init__"}
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
CONTAINER_METHODS = {name for kind in (dict, list, set, tuple) for name in dir(kind)}
ASKS = {"getattr": 1, "attrgetter": 0, "methodcaller": 0}  # which argument of these functions is an attribute's name
DEEPEST_CALL = 3  # f(a)(b)(c)
GRADIENTS = {"backward", "enable_grad", "set_grad_enabled", "requires_grad_", "requires_grad"}  # attributes of anything
GRADIENT_CALLS = ("torch.autograd.grad.", "torch.autograd.backward.", "torch.func.", "torch.optim.")


@functools.lru_cache(maxsize=64)
def parse_program(code):
    """Syntax tree of a file that ran; ValueError or SyntaxError if it is no program.

    A packed one is unpacked if nothing but pack_code.py's own stub stands around it. Other bytes are read as Python reads a file,
    with any line ends and a byte order mark.
    """
    text = code.decode()
    return ast.parse(pack_code.unpack(text) if pack_code.has_our_stub(text) else code)


def aliases(tree):
    """{name in the program: full dotted name} of everything imported."""
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for a in node.names:
                names[a.asname or a.name.split(".")[0]] = a.name if a.asname else a.name.split(".")[0]
        elif isinstance(node, ast.ImportFrom):
            names |= {a.asname or a.name: f"{'.' * node.level}{node.module or ''}.{a.name}" for a in node.names}
    return names


def dotted(node, names):
    """Full name of an expression such as `F.pad` ("torch.nn.functional.pad"); "" if it does not start at a plain name."""
    if isinstance(node, ast.Name):
        return names.get(node.id, node.id)
    if isinstance(node, ast.Attribute):
        base = dotted(node.value, names)
        return f"{base}.{node.attr}" if base else ""
    return ""


def imported_modules(nodes):
    """Top-level names of all modules that these nodes import; a relative import is "."."""
    tops = {a.name.split(".")[0] for n in nodes if isinstance(n, ast.Import) for a in n.names}
    return tops | {"." if n.level else n.module.split(".")[0] for n in nodes if isinstance(n, ast.ImportFrom)}


def command_of(call, scope):
    """The words of a subprocess call's literal list; a starred name stands for the list it is given in `scope`."""
    first = call.args[0] if call.args else None
    words = []
    for item in first.elts if isinstance(first, ast.List) else []:
        if isinstance(item, ast.Starred) and isinstance(item.value, ast.Name):
            given = [n.value for n in ast.walk(scope) if isinstance(n, ast.Assign) and item.value.id in
                     [t.id for t in n.targets if isinstance(t, ast.Name)]]  # fmt: skip
            words += given[0].elts if len(given) == 1 and isinstance(given[0], ast.List) else []
        else:
            words.append(item)
    return [word.value if isinstance(word, ast.Constant) else "..." for word in words]


def started_programs(tree, names):
    """(commands that subprocess starts, what is wrong with them)"""
    commands, wrong = set(), []
    uses = [n for n in ast.walk(tree) if isinstance(n, (ast.Attribute, ast.Name)) and dotted(n, names).startswith("subprocess.")]
    checked = set()
    for scope in (n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)):
        for call in (n for n in ast.walk(scope) if isinstance(n, ast.Call) and dotted(n.func, names) == "subprocess.run"):
            words = command_of(call, scope)
            shell = any(k.arg == "shell" for k in call.keywords)
            if shell or not words or set(words) & COMMANDS.get(words[0], set(words)):
                wrong.append(f"line {call.lineno}: subprocess.run({' '.join(words) or '?'})")
            commands.add(" ".join(words[:1]))
            checked.add(id(call.func))
    harmless = {"subprocess.CalledProcessError", "subprocess.TimeoutExpired", "subprocess.PIPE", "subprocess.DEVNULL"}
    wrong += [f"line {n.lineno}: {dotted(n, names)}" for n in uses if id(n) not in checked and dotted(n, names) not in harmless]
    return commands, wrong


def forbidden_names(tree, names):
    """What the program mentions that could fetch something, start something or run text as code."""
    wrong = []
    for node in ast.walk(tree):
        if isinstance(node, (ast.Name, ast.Attribute)):
            name = dotted(node, names)
            if name in FORBIDDEN_BUILTINS or f"{name}.".startswith(FORBIDDEN):
                wrong.append(f"line {node.lineno}: {name}")
    libraries = [n for n in ast.walk(tree) if isinstance(n, ast.Call) and dotted(n.func, names).startswith("ctypes.")]
    for call in libraries:  # ctypes.CDLL(None) is the C library that Python itself has loaded
        loads = dotted(call.func, names).rsplit(".")[-1] in ("CDLL", "PyDLL", "WinDLL", "OleDLL")
        if loads and not (call.args and isinstance(call.args[0], ast.Constant) and call.args[0].value is None):
            wrong.append(f"line {call.lineno}: a library loaded by ctypes")
    return wrong


def check_program(run, rule, inspect):
    """A rule that `inspect` (code -> (breaches, what shows that there are none)) finds in the program of the log."""
    try:
        wrong, shown = inspect(run.code)
    except (ValueError, SyntaxError) as error:
        wrong, shown = [f"the source in the log is no program: {error}"], ""
    return of_seed(run, rule, not wrong, "; ".join(wrong) or f"program in the log: {shown}")


def check_network(run):
    finding, track = check_program(run, "no network", inspect_network), run.config.get("track")
    if track:
        finding = replace(finding, ok=False, evidence=f"{finding.evidence}; config track {track}, expected none in a record run")
    return finding


@functools.lru_cache(maxsize=64)
def inspect_network(code):
    """Imports, programs started and dynamic code; joining the run's own processes (torch.distributed) is no download."""
    tree = parse_program(code)
    names, modules = aliases(tree), imported_modules([*ast.walk(tree)])
    within = {n for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) for n in ast.walk(f)}
    trackers = TRACKERS - imported_modules({*ast.walk(tree)} - within)
    wrong = sorted(modules - PACKAGES - trackers - (sys.stdlib_module_names - NETWORK_MODULES - IMPORT_MODULES))
    wrong = [f"imports {module}" for module in wrong]
    commands, bad_commands = started_programs(tree, names)
    wrong += bad_commands + forbidden_names(tree, names)
    foreign = sorted(modules - sys.stdlib_module_names)
    shown = f"imports {len(modules)} modules, {', '.join(foreign)} and the standard library's"
    shown += f"; starts {', '.join(commands) or 'no program'}"
    return wrong, shown


class Program:
    """What evaluation can run of a program, found by name alone.

    Running code may call whatever its names, attributes and calls may give. A name: the functions and classes of that name,
    and what the variable is given, or the parameter is passed, anywhere. An attribute: every method of that name, and what
    the program puts there anywhere, by assignment, as a keyword, as a field's default or its value by position, as an entry
    of a dictionary; so a function that stands in a table is found where the table is asked. A call: what the function
    returns, or what a foreign one was given. A class stands for all its methods. Type annotations do not count.
    """

    def __init__(self, tree):
        self.imported, self.found = aliases(tree), {}
        self.definitions, self.methods = {}, {}  # name: [nodes]
        self.variables, self.attributes, self.put = {}, {}, {}  # (function or None, name), name, name: [what it may hold]
        self.place = {}  # node: the function that it stands in, or None
        self.returned, self.calls, self.hooks = {}, {}, []  # by function, by name of what is called
        self.receivers, self.annotations, self.shared = set(), set(), set()
        self._collect(tree, None, None)
        self._collect_fields()
        self._reach()

    def _collect(self, node, function, parent):
        self.place[node], value, of_class = function, getattr(node, "value", None), isinstance(parent, ast.ClassDef)
        for part in (getattr(node, "annotation", None), getattr(node, "returns", None)):
            self.annotations |= set(ast.walk(part)) if part is not None else set()
        if isinstance(node, DEFINITIONS):
            (self.methods if of_class else self.definitions).setdefault(node.name, []).append(node)
            self.variables.setdefault((function, node.name), []).extend([] if of_class else [node])
            for decorator in node.decorator_list:
                self.calls.setdefault(last_name(decorator), []).append(ast.Call(decorator, [node], []))
        elif isinstance(node, (ast.Assign, ast.AnnAssign, ast.AugAssign, ast.NamedExpr)) and value is not None:
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                self._store(target, value, function, of_class)
        elif isinstance(node, (ast.For, ast.AsyncFor, ast.comprehension)):
            self._store(node.target, node.iter, function)
        elif isinstance(node, ast.withitem) and node.optional_vars is not None:
            self._store(node.optional_vars, node.context_expr, function)
        elif isinstance(node, ast.keyword):
            self.attributes.setdefault(node.arg, []).append(value)
        elif isinstance(node, ast.Dict):
            for key, entry in zip(node.keys, node.values, strict=True):
                self.attributes.setdefault(getattr(key, "value", None), []).append(entry)
        elif isinstance(node, (ast.Return, ast.Yield, ast.YieldFrom)) and value is not None:
            self.returned.setdefault(function, []).append(value)
        elif isinstance(node, (ast.Global, ast.Nonlocal)):
            self.shared |= {(function, name) for name in node.names}
        elif isinstance(node, ast.Attribute):
            self.receivers.add(value)
        elif isinstance(node, ast.Call):
            self._collect_call(node)
        for child in ast.iter_child_nodes(node):
            self._collect(child, node if isinstance(node, FUNCTIONS) else function, node)

    def _collect_call(self, call):
        name, values = last_name(call.func), given_to(call)
        self.calls.setdefault(name, []).append(call)
        if isinstance(call.func, ast.Attribute):  # x.append(f), table.update(...)
            for value in values:
                self._put(call.func.value, value)
        if name == "setattr" and len(call.args) == 3:
            self.attributes.setdefault(getattr(call.args[1], "value", None), []).append(call.args[2])
        if re.fullmatch("register_.*hook", name):
            self.hooks += values

    def _store(self, target, value, function, of_class=False):
        """`target` may hold `value` from here on: a variable or an attribute, each part of a tuple, what is subscripted."""
        if isinstance(target, (ast.Tuple, ast.List)):
            pairs = isinstance(value, (ast.Tuple, ast.List)) and len(value.elts) == len(target.elts)
            for i, part in enumerate(target.elts):
                self._store(part, value.elts[i] if pairs else value, function, of_class)
        elif isinstance(target, ast.Starred):
            self._store(target.value, value, function, of_class)
        elif isinstance(target, ast.Subscript):
            self._put(target.value, value)
        elif isinstance(target, ast.Attribute) or of_class:
            self.attributes.setdefault(last_name(target), []).append(value)
        if isinstance(target, ast.Name):
            self.variables.setdefault((function, target.id), []).append(value)

    def _put(self, container, value):
        while isinstance(container, ast.Subscript):
            container = container.value
        (self.attributes if isinstance(container, ast.Attribute) else self.put).setdefault(last_name(container), []).append(value)

    def _collect_fields(self):
        """What classes with fields, such as named tuples, are given by position."""
        for node in (c for defined in self.definitions.values() for c in defined if isinstance(c, ast.ClassDef)):
            fields = [a.target.id for a in node.body if isinstance(a, ast.AnnAssign) and isinstance(a.target, ast.Name)]
            for call in self.calls.get(node.name, []) + self.calls.get("cls", []):
                starred = any(isinstance(a, ast.Starred) for a in call.args)
                for i, name in enumerate(fields):
                    self.attributes.setdefault(name, []).extend(call.args if starred else call.args[i : i + 1])

    def _reach(self):
        """Fill `found`: the functions and classes that may run, and the attributes that may be called."""
        for function, name in self.shared:
            self.put.setdefault(name, []).extend(self.variables.pop((function, name), []))
        self.found = {d: None for name in EVALUATION_ENTRIES for d in self.definitions.get(name, [])}
        calls = [call for named in self.calls.values() for call in named]
        called, self.held = {call.func for call in calls}, [call for call in calls if self._held(call.func)]
        self.values = {last_name(n) for n in self.place if isinstance(n, (ast.Name, ast.Attribute)) and n not in called}
        special = [name for name in self.methods if re.fullmatch("forward|__.*__", name) and name not in CONSTRUCTORS]
        self.values |= {"", *special, *(d.name for d in self.place if isinstance(d, DEFINITIONS) and d.decorator_list)}
        todo = [(0, node) for node in [*self.found, *self.hooks, *(m for name in special for m in self.methods[name])]]
        todo += [(0, value) for name in EVALUATION_ENTRIES for value in self.variables.get((None, name), [])]
        asked = set()
        while todo:
            if (question := todo.pop()) not in asked and question[0] <= DEEPEST_CALL:
                asked.add(question)
                todo += self._answers(*question)

    def _answers(self, depth, asked):
        """More questions: what may be there (depth 0), what may it give when it is called (1), what may that give (2), and so on?

        Asked is of a node, an attribute's name, a variable (name, where it is bound), an argument (None, position, many).
        """
        if isinstance(asked, ast.AST):
            return self._answers_of(depth, asked)
        if isinstance(asked, str):
            return [(depth, value) for value in self._attribute(asked)]
        return [(depth, value) for value in (self._at(*asked) if asked[0] is None else self._named(*asked))]

    def _answers_of(self, depth, node):
        if isinstance(node, (*DEFINITIONS, ast.Lambda)) and not depth:
            self.found[node] = None
            code = [n for n in ast.walk(node) if isinstance(n, (ast.Name, ast.Attribute, ast.Call)) and n not in self.annotations]
            return [(0, n) for n in code if n not in self.receivers and not of_base(n)]
        if isinstance(node, DEFINITIONS):
            return [(depth - 1, value) for value in self.returned.get(node, [])]
        if isinstance(node, ast.Lambda):
            return [(depth - 1, node.body)]
        if isinstance(node, ast.Name):
            return [(depth, (node.id, self._binding(node.id, self.place[node])))]
        if isinstance(node, ast.Attribute):
            self.found |= {} if depth else {node: None}
            if dotted(node, {}).split(".")[0] in self.imported:
                return []
            whole = node.attr in CONTAINER_METHODS or not self._attribute(node.attr)  # what a foreign attribute may give
            return [(depth, node.attr)] + [(d, node.value) for d in {depth, max(0, depth - 1)} if whole]
        if isinstance(node, ast.Call):
            named = [getattr(a, "value", None) for a in node.args[ASKS.get(last_name(node.func), 9) :][:1]]
            named = [name for name in named if isinstance(name, str)]
            given = [] if self._own(node.func) else given_to(node)
            return [(depth + 1, node.func)] + [(depth, value) for value in named + given]
        if isinstance(node, ast.IfExp):
            return [(depth, node.body), (depth, node.orelse)]
        if isinstance(node, (ast.Subscript, ast.Compare)):
            return [(depth, node.value)] if isinstance(node, ast.Subscript) else []
        return [(depth, child) for child in ast.iter_child_nodes(node) if isinstance(child, ast.expr)]

    def _attribute(self, name):
        """What an attribute may be; a function of the module is one of `sys.modules[__name__]`."""
        return [*self.methods.get(name, []), *self.attributes.get(name, []), *self.definitions.get(name, [])]

    def _own(self, callee):
        """Whether what is called can be nothing but what the program defines under that name."""
        if isinstance(callee, ast.Attribute):
            return callee.attr in self.methods and callee.attr not in {*self.attributes, *CONTAINER_METHODS}
        given = self._given(callee.id, self.place[callee]) if isinstance(callee, ast.Name) else [None]
        return bool(given) and all(isinstance(value, DEFINITIONS) for value in given)

    def _held(self, callee):
        """Whether what is called may be what a variable or an attribute holds."""
        foreign = isinstance(callee, ast.Name) and not self._given(callee.id, self.place[callee])
        return not self._own(callee) and not foreign and dotted(callee, {}).split(".")[0] not in self.imported

    def _given(self, name, function):
        """What a name is given where it is bound, None for what is passed; nothing for what the program does not bind."""
        function = self._binding(name, function)
        passed = [None] if function is not None and name in arguments_of(function) else []
        return self.variables.get((function, name), []) + self.put.get(name, []) + passed

    def _binding(self, name, function):
        """The innermost function around that binds a name, None for the module."""
        while function is not None and (function, name) not in self.variables and name not in arguments_of(function):
            function = self.place[function]
        return function

    def _named(self, name, function):
        """What a name may be that is bound in a function, or in the module."""
        given = self._given(name, function)
        return given if None not in given else [*filter(None, given), *self._passed(function, name)]

    @functools.cache  # noqa: B019
    def _passed(self, function, name):
        """What an argument may be: by default, by keyword, by position (a method's first one is not in the call)."""
        a = function.args
        if name in ("self", "cls"):
            return []
        index, many = arguments_of(function).index(name), a.vararg is not None and name == a.vararg.arg
        by_default = dict(zip([x.arg for x in a.posonlyargs + a.args][::-1], a.defaults[::-1], strict=False))
        by_default |= {x.arg: default for x, default in zip(a.kwonlyargs, a.kw_defaults, strict=True) if default}
        found = [by_default[n] for n in by_default if n == name] + self.attributes.get(name, [])
        own = getattr(function, "name", "")
        for called in [own, *self.definitions] if own in CONSTRUCTORS else [own]:
            found += self._at(called, index, many)
        return found + [(None, index, many)] * (own in self.values)

    @functools.cache  # noqa: B019
    def _at(self, called, index, many):
        """What is passed at a position, or one before it, in calls by a name; None: in calls of what is held."""
        calls = self.held if called is None else self.calls.get(called, [])
        fits = lambda i, value: i in (index - 1, index) or many and i >= index or isinstance(value, ast.Starred)
        return [value for call in calls for i, value in enumerate(call.args) if fits(i, value)]


def last_name(node):
    return node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""


def given_to(call):
    return [*call.args, *(keyword.value for keyword in call.keywords)]


def arguments_of(function):
    a = function.args
    return [x.arg for x in (*a.posonlyargs, *a.args, a.vararg, *a.kwonlyargs, a.kwarg) if x is not None]


def of_base(node):
    """Whether it is `super().__init__`: a class's bases are names in it, and so found whole."""
    call = getattr(node, "value", None)
    return isinstance(call, ast.Call) and last_name(call.func) == "super" and last_name(node) in CONSTRUCTORS


def gradient_uses(node, names, harmless):
    """[(line, what makes or follows gradients there)] of a definition or an expression."""
    found = []
    for part in ast.walk(node):
        if isinstance(part, ast.Attribute) and part not in harmless:
            name = dotted(part, names)
            if part.attr in GRADIENTS or f"{name}.".startswith(GRADIENT_CALLS):
                found.append((part.lineno, f"{getattr(node, 'name', 'an expression')} uses {name or part.attr}"))
    return found


def switched_off(tree):
    """`requires_grad_` of all calls `x.requires_grad_(False)`."""
    calls = [n for n in ast.walk(tree) if isinstance(n, ast.Call) and last_name(n.func) == "requires_grad_"]
    return {call.func for call in calls if [getattr(a, "value", None) for a in call.args] == [False]}


def has_no_grad(function, names):
    return any(dotted(d.func if isinstance(d, ast.Call) else d, names) in ("torch.no_grad", "torch.inference_mode")
               for d in function.decorator_list)  # fmt: skip


def check_test_time_training(run):
    """Nothing that evaluation reaches follows gradients, and training lines do not come after the artifact."""
    finding = check_program(run, "no test-time training", inspect_evaluation)
    if any(line.startswith("step:") for line in run.lines[find_lines(run).get("artifact") or 0 :]):
        return replace(finding, ok=False, evidence=f"seed {run.seed}: training lines after the artifact")
    return finding


@functools.lru_cache(maxsize=64)
def inspect_evaluation(code):
    tree = parse_program(code)
    names, reached, harmless = aliases(tree), Program(tree).found, switched_off(tree)
    named = {node.name for node in reached if isinstance(node, DEFINITIONS)}
    wrong = [f"no function {name}" for name in EVALUATION_ENTRIES if name not in named]
    uses = {}  # a line's once; definitions have names, expressions have none
    for node in sorted(reached, key=lambda node: not hasattr(node, "name")):
        for line, use in gradient_uses(node, names, harmless):
            uses.setdefault(line, use)
    wrong += [f"line {line}: {use}" for line, use in sorted(uses.items())]
    if not all(has_no_grad(node, names) for node in reached if getattr(node, "name", "") == "evaluate"):
        wrong.append("evaluate is not under torch.no_grad")
    return wrong, f"evaluate is under no_grad; of {len(named)} names it can reach none follows gradients"


# -------------------------------------------------------------------------------------------------- all seeds


def check_seeds(runs):
    """Three seeds of one config and one code, which really are different runs."""
    try:
        check_same(runs)
    except UserError as error:
        return Finding("three seeds", False, str(error))
    seeds = sorted(run.seed for run in runs)
    twins = len({run.result["artifact_sha256"] for run in runs}) < len(runs)
    shown = f"seeds {', '.join(map(str, seeds))}; config and code_sha256 the same in {len(runs)} logs"
    return Finding("three seeds", len(runs) >= LEAST_SEEDS and not twins, shown + "; but artifacts are the same" * twins)


def check_tokenizer(runs):
    """All seeds were scored with one tokenizer: bits per byte depend on it."""
    digests = {run.seed: run.result.get("tokenizer_sha256") for run in runs}
    shown = "; ".join(f"seed {seed}: {digest}" for seed, digest in digests.items())
    if not any(digests.values()):
        return Finding("one tokenizer", False, "no tokenizer_sha256 in the logs, whose program is an older one", required=False)
    same = len(set(digests.values())) == 1
    return Finding("one tokenizer", same, f"tokenizer_sha256 {next(iter(digests.values()))}" if same else shown)


def check_evaluations(evaluations, runs):
    """What an EVAL_ONLY run scored is an artifact of these seeds: by its SHA-256, never by its path."""
    seeds, findings = {run.result["artifact_sha256"]: run for run in runs}, []
    for log in evaluations:
        digest = log.result.get("artifact_sha256")
        shown = f"{log.log.name}: artifact_sha256 {digest}, roundtrip_val_loss {log.result['roundtrip_val_loss']:.4f}"
        of = seeds.get(digest)
        origin = f"that of seed {of.seed}, then {of.result['roundtrip_val_loss']:.4f}" if of else "of none of the seeds"
        findings.append(Finding("evaluation", of is not None, f"{shown}; {origin}"))
    return findings


def check_gain(runs, record):
    """Welch's test that our mean loss is below the record's by more than 0.005 nats, one-sided."""
    if record is None:
        return Finding("gain", False, "no record was given (--record, --record-losses)", required=False)
    ours = [run.result[f"{scored_by(runs)}_val_loss"] for run in runs]
    gain = math.fsum(record) / len(record) - math.fsum(ours) / len(ours)
    p = welch_p(ours, [loss - LEAST_GAIN_NATS for loss in record])
    shown = f"{scored_by(runs)}_val_loss {', '.join(f'{x:.4f}' for x in ours)} against {', '.join(f'{x:.4f}' for x in record)}"
    test = f"gain {gain:.5f} nats a token (of the same tokenizer), p = {p:.2g} that it is no more than {LEAST_GAIN_NATS}"
    return Finding("gain", gain >= LEAST_GAIN_NATS and p < MOST_P, f"{shown}: {test}")


def welch_p(ours, theirs):
    """p of Welch's one-sided test that the mean of `ours` is not below that of `theirs`; 1 where it cannot tell."""
    if min(len(ours), len(theirs)) < 2:
        return 1.0
    a, b = (statistics.variance(values) / len(values) for values in (ours, theirs))
    if a + b == 0:
        return 1.0  # no spread, no test
    t = (statistics.fmean(ours) - statistics.fmean(theirs)) / math.sqrt(a + b)
    share = a / (a + b)
    return t_below(t, 1 / (share**2 / (len(ours) - 1) + (1 - share) ** 2 / (len(theirs) - 1)))


def t_below(t, freedom):
    """P(T < t) of Student's t distribution with these degrees of freedom, whole or not (DLMF 8.17: the tail is a beta's)."""
    tail = beta_below(freedom / (freedom + t * t), freedom / 2, 0.5) / 2
    return tail if t < 0 else 1 - tail


def beta_below(x, a, b):
    """The regularized incomplete beta function I_x(a, b) by its continued fraction (DLMF 8.17.22), from its far end."""
    if x <= 0 or x >= 1:
        return float(x >= 1)
    if x > (a + 1) / (a + b + 2):  # there it converges slowly, and the other tail's fast
        return 1 - beta_below(1 - x, b, a)
    fraction = 1.0
    for m in range(500, -1, -1):
        fraction = 1 - (a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1)) / fraction
        fraction = 1 + m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m)) / fraction if m else fraction
    log_beta = math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)
    return math.exp(a * math.log(x) + b * math.log1p(-x) - log_beta) / a / fraction


def read_record(path):
    """Losses of a record from its submission.json: ours, or one whose seed_results have val_loss."""
    instead = "--record-losses takes the losses of its seeds by hand"
    try:
        record = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--record {path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"--record {path}: not JSON: {error}") from None
    rows = record.get("seed_results") if isinstance(record, dict) else None
    if not isinstance(rows, dict) or not rows:
        raise UserError(f"--record {path}: has no seed_results, a row a seed; {instead}")
    key = f"{record['score']}_val_loss" if "score" in record else "val_loss"
    losses = [row.get(key) if isinstance(row, dict) else None for row in rows.values()]
    return checked_losses(f"--record {path}: {key if key.isprintable() else repr(key)} of its seed_results", losses, f"; {instead}")


def checked_losses(what, losses, instead=""):
    """The losses of a record's seeds; UserError unless the test of the gain can be made with them."""
    for loss in losses:
        if not isinstance(loss, (int, float)) or isinstance(loss, bool) or not 0 < loss < 1e9:
            raise UserError(f"{what}: {loss!r}, expected nats a token{instead}")
    if len(losses) < 2:
        raise UserError(f"{what}: {losses[0]}, expected those of at least 2 seeds, or the gain cannot be tested{instead}")
    return losses


NOT_FOR_NON_RECORD = ("8xH100", "FineWeb", "gain")


def check_runs(runs, files, record=None, non_record=False):
    """The Findings of all rules, rule by rule."""
    findings = []
    for check in (check_training_time, check_evaluation_time):
        findings += [check(run) for run in runs]
    findings += [check_bytes(run, files) for run in runs]
    findings += [check_seeds(runs), check_tokenizer(runs)]
    findings += [check_validation(run, files) for run in runs]
    for check in (check_fineweb, check_hardware):
        findings += [check(run) for run in runs]
    findings += [check_code(run, files) for run in runs]
    for check in (check_network, check_test_time_training, check_lines, check_figures):
        findings += [check(run) for run in runs]
    findings.append(check_gain(runs, record))
    return [replace(f, required=f.required and not (non_record and f.rule in NOT_FOR_NON_RECORD)) for f in findings]


def check_logs(paths, files, record=None, non_record=False):
    """`check_runs` on log files; one that is not the log of a whole run is a breach of "log lines"."""
    read, broken = [], []
    for path in paths:
        try:
            read.append(read_run(path))
        except UserError as error:
            broken.append(Finding("log lines", False, str(error)))
    runs, evaluations = ([run for run in read if run.is_evaluation is kind] for kind in (False, True))
    return broken + (check_runs(runs, files, record, non_record) if runs else []) + check_evaluations(evaluations, runs)


# -------------------------------------------------------------------------------------------------- command line


def table(findings):
    """One line a finding, and a last one that counts."""
    words = [("PASS" if f.ok else "FAIL" if f.required else "no") for f in findings]
    width = max(len(f.rule) for f in findings)
    lines = [f"{word:4}  {f.rule:{width}}  {f.evidence}" for word, f in zip(words, findings, strict=True)]
    breaches = ", ".join(sorted({f.rule for f in findings if f.breach}))
    count = f"compliance: {words.count('PASS')} of {len(words)} PASS"
    return "\n".join([*lines, f"{count}; BREACHES: {breaches}" if breaches else count])


def add_options(parser):
    """The options that make_submission.py shares."""
    parser.add_argument("--code", type=Path, help="the train_gpt.py that ships; default: as the logs have it")
    parser.add_argument("--artifact", type=Path, action="append", default=[], help="a seed's artifact, to count its true bytes")
    parser.add_argument("--data", type=Path, help="folder of the validation shards; default: the logs' data_path")
    parser.add_argument("--record", type=Path, help="submission.json of the record to beat")
    parser.add_argument("--record-losses", type=float, nargs="+", help="its losses, one a seed, in nats a token")
    parser.add_argument("--non-record", action="store_true", help="that track: hardware, FineWeb and gain do not count")


def read_options(args):
    """(Files, the record's losses or None) of parsed options; UserError for a file that is not there."""
    for option, path in [("--code", args.code), *(("--artifact", path) for path in args.artifact)]:
        if path is not None and not path.is_file():
            raise UserError(f"{option} {path}: no such file")
    if args.data is not None and not shard_paths(args.data, "val"):
        raise UserError(f"--data {args.data}: no fineweb_val_*.bin there")
    if args.record and args.record_losses:
        raise UserError("--record and --record-losses: expected one of them")
    record = read_record(args.record) if args.record else None
    if args.record_losses:
        record = checked_losses("--record-losses", args.record_losses)
    return Files(args.code, tuple(args.artifact), args.data), record


def main(argv=None):
    parser = OneLineParser(prog="compliance.py", description=__doc__.split("\n")[0])
    parser.add_argument("logs", nargs="+", type=Path, metavar="LOG", help="the log of one seed")
    add_options(parser)
    args = parser.parse_args(argv)
    return run_command(lambda: show_findings(args), UserError, name="compliance.py")


def show_findings(args):
    """Print the table; 1 for a breach."""
    files, record = read_options(args)
    findings = check_logs(args.logs, files, record, args.non_record)
    print(table(findings))
    return int(any(f.breach for f in findings))


if __name__ == "__main__":
    start(main)
