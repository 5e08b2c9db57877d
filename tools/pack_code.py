#!/usr/bin/env python3
"""Pack train_gpt.py into a file of a quarter of its size that does the same: the code counts towards the 16,000,000 bytes.

    pack_code.py train_gpt.py --out packed.py     what only readers need out, raw LZMA, base 85, a stub in front
    pack_code.py --unpack packed.py               print the program inside

The packed file writes its program to a private folder under the temporary directory and runs it from memory under that name,
since Triton and tracebacks read the source of functions from a file. `__file__` stays the packed file. The same source gives
the same bytes for one version of liblzma.

Out go comments, spare blanks, docstrings (unless the program reads `__doc__`), annotations of functions and of their variables
(unless a decorator may read them), and what train_gpt.py's `setting` says in words: --help then has names, defaults and ranges.
"""

import ast
import base64
import functools
import hashlib
import io
import keyword
import lzma
import re
import sys
import tokenize
from bisect import bisect_left
from pathlib import Path
from typing import NamedTuple

from command_line import run_command, start
from run_logs import OneLineParser
from shard_io import UserError, replacing

# One blank a level and no comments: these lines count too. The names in capitals are filled in.
STUB = '''\
"""train_gpt.py as it ran, packed by tools/pack_code.py; `pack_code.py --unpack FILE` prints the program."""
def _program(data,digest,filters):
 import base64,hashlib,lzma,os,stat,sys,tempfile
 def stop(text):
  print(__file__+": "+text,file=sys.stderr)
  sys.exit(2)
 try:source=lzma.decompress(base64.b85decode(data),lzma.FORMAT_RAW,None,filters)
 except(ValueError,lzma.LZMAError):source=b""
 if hashlib.sha256(source).hexdigest()!=digest:stop("damaged: the program inside does not have its SHA-256")
 try:
  folder=os.path.join(tempfile.gettempdir(),f"train_gpt-{os.getuid()}")
  os.makedirs(folder,0o700,exist_ok=True)
  info=os.lstat(folder)
  mine=stat.S_ISDIR(info.st_mode)and info.st_uid==os.getuid()and not info.st_mode&0o77
  if not mine:raise OSError(0,"not a private folder of this user",folder)
  path=os.path.join(folder,digest+".py")
  try:
   with open(path,"rb")as f:whole=f.read()==source
  except OSError:whole=False
  if not whole:
   handle,partial=tempfile.mkstemp(dir=folder)
   with open(handle,"wb")as f:f.write(source)
   os.replace(partial,path)
 except OSError as error:stop(f"cannot unpack: {error}; set TMPDIR to a writable folder of your own")
 return compile(source,path,"exec",dont_inherit=True)
exec(_program("DATA","DIGEST",FILTERS))
'''
PACKED = re.compile(r'^exec\(_program\("([^"\\\n]*)","([0-9a-f]{64})",(\[\{[^\n]*\}\])\)\)$', re.MULTILINE)

# -------------------------------------------------------------------------------------------------- stripping

LAYOUT = {tokenize.COMMENT, tokenize.NL, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
# Python 3.12 takes f-strings apart (3.14 t-strings, too); here they are copied whole
STRING_STARTS = {getattr(tokenize, name) for name in ("FSTRING_START", "TSTRING_START") if hasattr(tokenize, name)}
# these do not look at a function's annotations
BLIND_DECORATORS = {"staticmethod", "classmethod", "property", "functools.cache", "functools.cached_property", "torch.no_grad()",
                    "contextlib.contextmanager"}  # fmt: skip
STRING_ENDS = {getattr(tokenize, name) for name in ("FSTRING_END", "TSTRING_END") if hasattr(tokenize, name)}


class Inert(NamedTuple):
    """What of a syntax tree only readers need."""

    documented: list  # modules, classes and functions whose docstring goes
    settings: list  # calls of `setting` whose words go
    arguments: list  # these three: whose annotation goes
    functions: list
    assignments: list


def inert_nodes(tree):
    nodes = [*ast.walk(tree)]
    asked = names_and_texts(nodes)
    documented = [] if asked & {"__doc__", "getdoc"} else documented_nodes(nodes)
    return Inert(documented, setting_calls(tree, nodes), *annotated_nodes(tree, asked))


def documented_nodes(nodes):
    """Modules, classes and functions that have a docstring, which is the first statement of their body."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    return [node for node in nodes if isinstance(node, kinds) and ast.get_docstring(node, clean=False) is not None]


def needs_pass(node):
    return len(node.body) == 1 and not isinstance(node, ast.Module)


def names_and_texts(nodes):
    """Names, attributes and strings of a program: by one of these it would have to ask for what it reads of itself."""
    names = {n.id if isinstance(n, ast.Name) else n.attr for n in nodes if isinstance(n, (ast.Name, ast.Attribute))}
    return names | {n.value for n in nodes if isinstance(n, ast.Constant) and isinstance(n.value, str)}


def declares_settings(tree):
    """Whether `setting` is train_gpt.py's: its second argument and its keywords `group` and `of` are for readers alone."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.name == "setting":
            keywords = {a.arg: getattr(d, "value", None) for a, d in zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True)}
            return [a.arg for a in node.args.args] == ["default", "meaning"] and keywords.get("group") == keywords.get("of") == ""
    return False


def setting_calls(tree, nodes):
    """Calls of `setting` with a literal meaning, where that function is train_gpt.py's."""
    calls = [node for node in nodes if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]
    calls = [node for node in calls if node.func.id == "setting" and len(node.args) == 2 and isinstance(node.args[1], ast.Constant)]
    return calls if declares_settings(tree) else []


def for_readers(call):
    return [keyword for keyword in call.keywords if keyword.arg in ("group", "of")]


def annotated_nodes(tree, asked):
    """(arguments, functions, assignments) whose annotations nothing reads: not a class's, nor those of a function that a decorator
    may read (torch's operators, Triton's kernels), nor any of a program that looks at functions' annotations or evaluates them."""
    late = any(isinstance(n, ast.ImportFrom) and n.module == "__future__" and n.names[0].name == "annotations" for n in tree.body)
    if not late or asked & {"__annotations__", "signature", "getfullargspec"}:
        return [], [], []
    arguments, functions, assignments = [], [], []
    todo = [(child, False) for child in tree.body]
    while todo:
        node, inside = todo.pop()
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            if not all(ast.unparse(d) in BLIND_DECORATORS for d in node.decorator_list):
                continue
            everything = node.args.posonlyargs + node.args.args + node.args.kwonlyargs + [node.args.vararg, node.args.kwarg]
            arguments += [a for a in everything if a is not None and a.annotation is not None]
            functions += [node] if node.returns is not None else []
        elif inside and isinstance(node, ast.AnnAssign) and node.value is not None and not isinstance(node.target, ast.Subscript):
            assignments.append(node)
        inside = not isinstance(node, ast.ClassDef) and (inside or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)))
        todo += [(child, inside) for child in ast.iter_child_nodes(node)]
    return arguments, functions, assignments


def inert_spans(source, inert, tokens):
    """[(start, end, text in its place)] of all that goes, in order; positions are (line, column) as in tokens."""
    lines = [line.encode() for line in source.split("\n")]  # splitlines() would split at form feeds, too

    def position(line, column):
        return line, len(lines[line - 1][:column].decode())

    def start(node):
        return position(node.lineno, node.col_offset)

    def end(node):
        return position(node.end_lineno, node.end_col_offset)

    def last_before(positions, at):
        return positions[bisect_left(positions, at) - 1]

    spans = [(start(n.body[0]), end(n.body[0]), "pass" * needs_pass(n)) for n in inert.documented]
    commas = [position for _, text, position in tokens if text == ","]
    arrows = [position for _, text, position in tokens if text == "->"]
    for call in inert.settings:
        spans.append((start(call.args[1]), end(call.args[1]), '""'))
        spans += [(last_before(commas, start(keyword)), end(keyword), "") for keyword in for_readers(call)]
    spans += [(position(a.lineno, a.col_offset + len(a.arg.encode())), end(a), "") for a in inert.arguments]
    spans += [(last_before(arrows, start(f.returns)), end(f.returns), "") for f in inert.functions]
    spans += [(end(node.target), end(node.annotation), "") for node in inert.assignments]
    return sorted(spans)


def without_inert(tree, inert):
    """The syntax tree without what is inert in it; changes the tree."""
    for node in inert.documented:
        node.body[:1] = [ast.Pass()] * needs_pass(node)
    for call in inert.settings:
        call.args[1] = ast.Constant("")
        call.keywords = [keyword for keyword in call.keywords if keyword not in for_readers(call)]
    for argument in inert.arguments:
        argument.annotation = None
    for function in inert.functions:
        function.returns = None
    plain = {node: ast.Assign([node.target], node.value) for node in inert.assignments}

    class Plain(ast.NodeTransformer):
        def visit_AnnAssign(self, node):  # noqa: N802
            return plain.get(node, node)

    return Plain().visit(tree)


def merged_tokens(source):
    """(kind, text, position) of each token, f-strings as one."""
    lines = io.StringIO(source).readlines()
    depth, start = 0, None
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type in STRING_STARTS:
            depth, start = depth + 1, start or token.start
        elif token.type in STRING_ENDS:
            depth -= 1
            if not depth:
                yield tokenize.STRING, source_between(lines, start, token.end), start
                start = None
        elif not depth:
            yield token.type, token.string, token.start


def source_between(lines, start, end):
    (first, left), (last, right) = start, end
    if first == last:
        return lines[first - 1][left:right]
    return "".join([lines[first - 1][left:], *lines[first : last - 1], lines[last - 1][:right]])


def is_word(character):
    return character.isalnum() or character == "_"


def join_tokens(texts):
    """One logical line, with blanks only where two tokens would run into each other."""
    line, before = "", " "
    for text in texts:
        # a name before a quote would be read as the string's prefix (no keyword is one); '' '' is not ''''
        quotes = text[0] in "'\""
        apart = is_word(before[-1]) and (is_word(text[0]) or (quotes and not keyword.iskeyword(before)))
        line += " " * (apart or (quotes and before[-1] in "'\"")) + text
        before = text
    return line


@functools.lru_cache(maxsize=2)
def strip_source(source):
    """The program without comments, spare blanks and what is inert; its syntax tree is checked to be the same else."""
    tree, tokens = ast.parse(source), list(merged_tokens(source))
    inert = inert_nodes(tree)
    spans = inert_spans(source, inert, tokens)[::-1]
    lines, line, depth, skipped_to = [], [], 0, (0, 0)
    for kind, text, position in tokens:
        depth += (kind == tokenize.INDENT) - (kind == tokenize.DEDENT)
        while spans and spans[-1][0] <= position and kind not in LAYOUT:
            _, skipped_to, instead = spans.pop()
            line += [instead] * bool(instead)
        if kind == tokenize.NEWLINE:
            lines += [" " * depth + join_tokens(line)] * bool(line)
            line = []
        elif kind not in LAYOUT and position >= skipped_to:
            line.append(text)
    stripped = "\n".join(lines) + "\n"
    if ast.dump(ast.parse(stripped)) != ast.dump(without_inert(tree, inert)):
        raise ValueError("the stripped program differs from the source in more than comments and what is inert")
    return stripped


# -------------------------------------------------------------------------------------------------- packing


def compress(data):
    """(bytes, filters) of the smallest raw LZMA stream over a few settings; text has no alignment, hence pb = 0."""
    best = None
    for literal_bits in (2, 3, 4):
        for nice_length in (64, 128, 273):
            options = {"id": lzma.FILTER_LZMA1, "dict_size": 1 << 20, "lc": literal_bits, "lp": 0, "pb": 0}
            effort = {"mode": lzma.MODE_NORMAL, "mf": lzma.MF_BT4, "nice_len": nice_length, "depth": 1000}
            packed = lzma.compress(data, lzma.FORMAT_RAW, filters=[options | effort])
            if best is None or len(packed) < len(best[0]):
                best = packed, [options]
    return best


def pack(source):
    """The packed program of a Python source text, as bytes."""
    program = strip_source(source).encode()
    packed, filters = compress(program)
    text = with_stub(base64.b85encode(packed).decode(), hashlib.sha256(program).hexdigest(), repr(filters).replace(" ", ""))
    if unpack(text) != program.decode():
        raise ValueError("the packed program does not unpack to what was packed")
    return text.encode()


def with_stub(data, digest, filters):
    return STUB.replace("FILTERS", filters).replace("DIGEST", digest).replace("DATA", data)


def has_our_stub(text):
    """Whether a text is what this version packs, with nothing before, between or after."""
    match = PACKED.search(text)
    return match is not None and text == with_stub(*match.groups())


def unpack(text):
    """The program inside a packed file's text, or None if it is not a packed file; ValueError if it is damaged."""
    match = PACKED.search(text)
    if match is None:
        return None
    data, digest, filters = match.groups()
    try:
        program = lzma.decompress(base64.b85decode(data), lzma.FORMAT_RAW, None, ast.literal_eval(filters))
    except lzma.LZMAError as error:
        raise ValueError(f"damaged: {error}") from None
    if hashlib.sha256(program).hexdigest() != digest:
        raise ValueError("damaged: the program inside does not have its SHA-256")
    return program.decode()


# -------------------------------------------------------------------------------------------------- command line


def source_text(data):
    """The text of a source file's bytes as Python reads it: no byte order mark, and "\\n" for any line end."""
    return data.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")


def run(args):
    try:
        write_packed(args)
    except (ValueError, SyntaxError) as error:  # ValueError: among others, a file that is not UTF-8
        raise UserError(f"{args.file}: {error}") from None


def write_packed(args):
    data = args.file.read_bytes()
    text = source_text(data)
    program = unpack(text)
    if args.unpack:
        if program is None:
            raise ValueError("not a packed file")
        sys.stdout.buffer.write(program.encode())  # whatever the console's encoding is
        sys.stdout.flush()
        return
    if program is not None:
        raise ValueError("is packed already")
    packed = pack(text)
    with replacing(args.out) as partial:
        partial.write_bytes(packed)
    size = len(data)
    digest = hashlib.sha256(packed).hexdigest()
    print(f"{args.out}: {len(packed):,} bytes, {100 * len(packed) / size:.1f} % of {size:,}, sha256 {digest}")


def main(argv=None):
    parser = OneLineParser(prog="pack_code.py", description=__doc__.split("\n")[0])
    parser.add_argument("file", type=Path, help="the source, or with --unpack the packed file")
    parser.add_argument("--out", type=Path, help="the packed file")
    parser.add_argument("--unpack", action="store_true", help="print the program inside a packed file")
    args = parser.parse_args(argv)
    if args.unpack == (args.out is not None):
        parser.error("--unpack prints the program: expected no --out" if args.unpack else "--out FILE is missing")
    return run_command(lambda: run(args), UserError, name="pack_code.py")


if __name__ == "__main__":
    start(main)
