#!/usr/bin/env python3
"""A page that shows a run, or several beside each other: one HTML file, which needs no network and no other file.

    python tools/report.py logs/demo.txt                                   logs/demo.html
    python tools/report.py logs/R018_demo_seed*.txt --out seeds.html       side by side, with what differs
    python tools/report.py logs/demo.txt --artifact data/demo_sp4096/demo.ternary.ptz --text book.txt --prompt "The sum of"

It has the scores, the settings that differ from the defaults of the program that ran, the machine, the curves (their values on
hover, touch or arrow keys), the bytes by stream, and the rules of the challenge as tools/compliance.py sees them. With a run's
artifact it has the layers too (shape, zeros, scales), and with its tokenizer samples of the model (tools/sample.py) and the
passages of the held-out text that the model finds hardest and easiest, coloured by bits.

Artifact, tokenizer and held-out text are found where the log says they are; an artifact counts only if its SHA-256 is the log's.
What is not there, or is another run's, is left out, and the page says why. Text that logs and models hold is shown as text.
"""

import argparse
import ast
import functools
from pathlib import Path
from typing import Any, NamedTuple

import compliance
import plot_logs
import report_model
from command_line import run_command, start
from model_files import load_model, read_tokenizer
from report_page import esc, histogram, line_chart, name_of, note, number, page, section, stacked_bars, table
from run_logs import BUDGET_BYTES, FREE_SETTINGS, OneLineParser, Run, check_same, find_artifact, places_of, read_run, scored_by
from shard_io import UserError, sha256_file, write_text

PROMPT_TOKENS = 12  # of a held-out passage, that a sample continues
MOST_LOGS = 8
AXES = {"by-time": "time", "by-steps": "steps", "by-tokens": "tokens"}
# Figures of the result line: name, unit and digits; differences are against the first log
FIGURES = {
    "val_bpb": ("before export", "bits per byte", 4), "roundtrip_val_bpb": ("after the round trip", "bits per byte", 4),
    "sliding_val_bpb": ("in sliding windows", "bits per byte", 4), "val_loss": ("validation loss", "nats per token", 4),
    "steps": ("optimizer steps", "", 0), "tokens": ("training tokens", "", 0), "train_time_s": ("training time", "s", 1),
    "ms_per_step": ("time of a step", "ms", 1), "eval_time_s": ("time of the scores", "s", 1), "params": ("parameters", "", 0),
    "ternary_params": ("of them ternary", "", 0), "zero_frac": ("zeros among these", "share", 4),
    "artifact_bytes": ("artifact", "bytes", 0), "code_bytes": ("code", "bytes", 0), "total_bytes": ("together", "bytes", 0),
    "peak_memory_bytes": ("most memory", "bytes", 0), "temperature": ("temperature of the sliding score", "", 4),
}  # fmt: skip
MACHINE = {"python": "Python", "torch": "PyTorch", "numpy": "NumPy", "threads": "threads", "precision": "precision"}


class Subject(NamedTuple):
    """A run as the page shows it."""

    name: str
    run: Run
    curve: Any  # plot_logs.Curve, or None for a run that only scored
    artifact: Path | None = None
    tokenizer: Path | None = None
    why_not: str = ""  # there is no artifact


# -------------------------------------------------------------------------------------------------- what is read


def read_subjects(options):
    """The Subjects of the logs; UserError for a log or an option that is none, or fits none."""
    runs = [read_run(path) for path in options.logs]
    names = [str(run.config.get("run_id", run.log.stem)) for run in runs]
    if len(set(names)) < len(names):
        names = [run.log.stem for run in runs]
    if len(set(names)) < len(names):
        names = [str(run.log) for run in runs]
    if len(set(names)) < len(names):
        raise UserError("a log is given twice; expected different ones")
    given = {sha256_file(path): path for path in options.artifact}
    subjects = [subject_of(name, run, given, options) for name, run in zip(names, runs, strict=True)]
    known = {run.result.get("artifact_sha256") for run in runs}
    for digest, path in given.items():
        if digest not in known:
            raise UserError(f"--artifact {path}: its SHA-256 is {digest[:12]}..., which no log has as its artifact's")
    if options.tokenizer and not any(subject.artifact for subject in subjects):
        raise UserError(f"--tokenizer {options.tokenizer}: of no use without an artifact: {subjects[0].why_not}")
    if options.text and not any(subject.tokenizer for subject in subjects):
        raise UserError(f"--text {options.text}: of no use without an artifact and its tokenizer")
    return subjects


def subject_of(name, run, given, options):
    try:
        curve = plot_logs.read_curve(run.log)
    except plot_logs.NoTrainingLog:
        curve = None
    artifact, why_not = given.get(run.result.get("artifact_sha256")), ""
    if not artifact:
        artifact, why_not = look_for_artifact(run)
    tokenizer, digest = options.tokenizer, run.result.get("tokenizer_sha256")
    if artifact and tokenizer and digest and sha256_file(tokenizer) != digest:
        raise UserError(f"--tokenizer {tokenizer}: not the tokenizer of {run.log}: its SHA-256 is another")
    tokenizer = tokenizer or (look_for_tokenizer(run, artifact) if artifact else None)
    return Subject(name, run, curve, artifact, tokenizer, why_not)


def look_for_artifact(run):
    """(the artifact where the log says it is, "") or (None, why there is none)."""
    if path := find_artifact(run):
        return path, ""
    paths = places_of(run, "artifact_path")
    if there := [path for path in paths if path.is_file()]:
        return None, f"{there[0]} is not the artifact of this run: its SHA-256 is another"
    return None, f"there is no artifact at {paths[0]}; --artifact FILE names it" if paths else "the log names no artifact"


def look_for_tokenizer(run, artifact):
    """The tokenizer where the log says it is, or beside the artifact; None unless it is the log's."""
    digest = run.result.get("tokenizer_sha256")
    for path in [*places_of(run, "tokenizer_path"), artifact.parent / "tokenizer.model"]:
        if path.is_file() and (not digest or sha256_file(path) == digest):
            return path
    return None


def program_defaults(code):
    """{setting: default} of the program in a log, read from its syntax tree, so that nothing of it runs; empty for another program."""
    try:
        tree = ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return {}
    found = {}
    for node in (node for part in tree.body if isinstance(part, ast.ClassDef) for node in part.body):
        value = node.value if isinstance(node, ast.AnnAssign) else None
        if (
            isinstance(value, ast.Call)
            and getattr(value.func, "id", "") == "setting"
            and value.args
            and isinstance(node.target, ast.Name)
        ):
            try:
                found[node.target.id] = ast.literal_eval(value.args[0])
            except (ValueError, TypeError, SyntaxError, RecursionError):
                continue  # a name that is made when the program starts
    return found


@functools.cache
def present_defaults():
    """{setting: default} of train_gpt.py as it is now."""
    import dataclasses

    import train_gpt  # slow to import

    return dataclasses.asdict(train_gpt.Config.from_env({}))


# -------------------------------------------------------------------------------------------------- sections


def with_difference(value, first, digits):
    """A figure, and how far it is from the first run's."""
    if value is None:
        return ""
    text = esc(number(value, digits))
    if first is not None and value == first:
        return f'{text} <span class="difference">(=)</span>'
    if first is None or not isinstance(value, (int, float)) or not isinstance(first, (int, float)):
        return text
    return f'{text} <span class="difference">({value - first:+,.{digits}f})</span>'


def scores_section(subjects):
    first, rows = subjects[0].run.result, []
    for key, (label, unit, digits) in FIGURES.items():
        values = [s.run.result.get(key) for s in subjects]
        if any(value is not None for value in values):
            cells = [with_difference(value, first.get(key) if i else None, digits) for i, value in enumerate(values)]
            rows.append([esc(f"{label}, {unit}" if unit else label), *cells])
    best = scored_by([s.run for s in subjects])
    scores = [s.run.result.get(f"{best}_val_bpb") for s in subjects]
    head = ", ".join(f"{s.name}: {number(score)}" for s, score in zip(subjects, scores, strict=True))
    said = "A run of train_gpt.py, which trains a language model with ternary weights and scores what it has stored." if len(subjects) == 1 else \
        f"{len(subjects)} runs of train_gpt.py side by side; in brackets the difference against the first."  # fmt: skip
    return section("scores", "What it is", f"<p>{esc(said)} Bits per byte, {'sliding' if best == 'sliding' else 'after the round trip'}: "
                   f"<strong>{esc(head)}</strong>. Fewer is better.</p>", side_by_side(subjects, "figure", rows))  # fmt: skip


def side_by_side(subjects, what, rows, marked=()):
    columns = [what, *(esc(s.name) for s in subjects)]
    return table(columns, rows, numeric=range(1, len(columns)) if what == "figure" else (), marked=marked)


def settings_section(subjects):
    """What differs from the defaults, and what differs between the runs."""
    defaults = [program_defaults(s.run.code) or present_defaults() for s in subjects]
    names = dict.fromkeys(name for s in subjects for name in s.run.config)
    rows, marked = [], []
    for name in names:
        usual = [own.get(name, "") for own in defaults]
        # what an older program does not have is as if it stood at the default of one that has it
        known = next((own[name] for own in defaults if name in own), "")
        values = [s.run.config.get(name, known) for s in subjects]
        differs = len({setting_text(value) for value in values}) > 1
        at_default = all(name not in s.run.config or s.run.config[name] == u for s, u in zip(subjects, usual, strict=True))
        if name in FREE_SETTINGS - {"seed"} or at_default and not differs:
            continue
        if differs:
            marked.append(len(rows))
        shown = [known, *(s.run.config.get(name, "-") for s in subjects)]
        rows.append([name_of(name.upper()), *(esc(setting_text(value)) for value in shown)])
    columns = ["setting", "default", *(esc(s.name) for s in subjects)]
    own = all(program_defaults(s.run.code) for s in subjects)
    said = "Settings that differ from the defaults of " + ("the program that ran." if own else "train_gpt.py as it is now.")
    between = " \u2260 marks what differs between the runs." if len(subjects) > 1 else ""
    return section(
        "settings", "Settings", note(said + between), table(columns, rows, marked=marked) if rows else note("None differs.")
    )


def setting_text(value):
    return str(int(value)) if isinstance(value, bool) else str(value)


def machine_section(subjects):
    versions = [
        dict(word.split(":", 1) for word in s.run.lines[0].split() if ":" in word) if s.run.lines else {} for s in subjects
    ]
    rows = [["hardware", *(esc(s.run.hardware) if not s.run.is_evaluation else "" for s in subjects)]]
    rows += [
        [esc(label), *(esc(v.get(key, "")) for v in versions)]
        for key, label in MACHINE.items()
        if any(key in v for v in versions)
    ]
    for key, label in (("attention", "attention"), ("git_commit", "commit"), ("code_sha256", "SHA-256 of the code"),
                       ("artifact_sha256", "SHA-256 of the artifact")):  # fmt: skip
        values = [str(s.run.result.get(key, ""))[:16] for s in subjects]
        if any(values):
            rows.append([label, *map(esc, values)])
    marked = [i for i, row in enumerate(rows) if len(set(row[1:])) > 1]
    return section("machine", "Machine", side_by_side(subjects, "what", rows, marked))


def curves_section(subjects, smooth):
    """Loss, learning rate and zeros against time, steps and tokens; the radio buttons choose, without a script."""
    subjects = [(i, s) for i, s in enumerate(subjects) if s.curve]
    if not subjects:
        return section("curves", "Curves", note("Nothing was trained: the run only scored an artifact."))
    inputs = "".join(f'<span class="choice"><input type="radio" name="axis" id="{name}"{" checked" if name == "by-time" else ""}>'
                     f'<label for="{name}"> against {axis}</label></span>' for name, axis in AXES.items())  # fmt: skip
    charts, missing = [], {}
    for name, axis in AXES.items():
        charts += [chart for value in plot_logs.CURVES if (chart := curve_chart(subjects, value, axis, name, smooth, missing))]
    return section("curves", "Curves", inputs, *charts, *map(note, missing))


TITLES = {"loss": "Loss: training, smoothed, and validation (marks)", "val_bpb": "Validation", "learning_rate": "Learning rate",
          "zero_fraction": "Zeros among the ternary weights"}  # fmt: skip


def curve_chart(subjects, value, axis, name, smooth, missing):
    """A chart of one value; "" where no log has it, or where it is one score for each run. What a log lacks goes into `missing`."""
    curves = []
    for i, s in subjects:
        try:
            x, y = plot_logs.points(s.curve, axis, value, smooth)
            place = plot_logs.place(s.curve, axis)
        except (UserError, TypeError, ValueError, ArithmeticError, AttributeError) as error:  # a log may say anything
            missing[f"{TITLES[value]}: {error}"] = None
            continue
        scores = [(place(*row[:2]), row[2]) for row in s.curve.validation] if value == "loss" else []
        curves.append((s.name, i, list(zip(x, y, strict=True)), scores))
    if value in ("val_bpb", "zero_fraction"):  # scores, whose every point counts
        curves = [(name, i, points, points) for name, i, points, _ in curves if len(points) > 1]
    curves = [curve for curve in curves if curve[2]]
    if not curves:
        return ""
    top = plot_logs.top_of([points[0][1] for *_, points, _ in curves]) if value == "loss" else None
    return line_chart(TITLES[value], plot_logs.AXES[axis], plot_logs.CURVES[value], curves, name, top)


def bytes_section(subjects):
    bars, rows, missing = [], [], []
    for s in subjects:
        try:
            sizes = plot_logs.stream_bytes(plot_logs.Curve(s.name, [], [], result=s.run.result))
        except UserError as error:
            missing.append(note(str(error)))
            continue
        bars.append((s.name, sizes))
        code, total = s.run.result["code_bytes"], s.run.result["total_bytes"]
        share = f"{100 * total / BUDGET_BYTES:.1f} %"
        rows.append(
            [esc(s.name), *(f"{n:,}" for n in sizes.values()), f"{sum(sizes.values()):,}", f"{code:,}", f"{total:,}", share]
        )
    if not bars:
        return section("bytes", "Bytes", *missing)
    columns = ["run", *map(esc, bars[0][1]), "artifact", "code", "together", f"of {BUDGET_BYTES:,}"]
    return section("bytes", "Bytes", stacked_bars("Bytes of the artifact, by stream", bars, "bytes"),
                   table(columns, rows, numeric=range(1, len(columns))), *missing)  # fmt: skip


def rules_section(subjects, options):
    """The findings of tools/compliance.py; runs that are seeds of one experiment are checked together."""
    trained = [s.run for s in subjects if not s.run.is_evaluation]
    if not trained:
        return section("rules", "Rules", note("Nothing was trained: the rules are about runs that train."))
    files = compliance.Files(artifacts=tuple(s.artifact for s in subjects if s.artifact), data=options.data)
    try:
        check_same(trained)
        groups, said = [trained], ""
    except UserError as error:
        groups, said = [[run] for run in trained], f"Checked one by one, since they are not seeds of one experiment: {error}"
    record = all(run.result["device"] == "cuda" and run.result["world_size"] == 8 for run in trained)
    words = {True: '<span class="pass">PASS</span>', False: '<span class="fail">FAIL</span>'}
    rows = []
    for group in groups:
        for f in compliance.check_runs(group, files, None, not record):
            word = words[f.ok] if f.ok or f.required else "no"
            rows.append([esc(f.rule), word, esc(f.evidence)])
    if not record:
        said = f"Not run on 8 GPUs, so hardware, FineWeb and the gain on a record do not count. {said}"
    return section("rules", "Rules of the challenge", note(said) if said else "", table(["rule", "kept", "what shows it"], rows))


# -------------------------------------------------------------------------------------------------- the model's sections


class Views:
    """The sections that need a run's artifact, each made once."""

    def __init__(self, subject, options):
        self.subject, self.options = subject, options
        self.loaded = load_model(subject.artifact)
        self.model = self.loaded.model

    def layers(self):
        found = report_model.layers_of(self.model)
        rows = []
        for layer in found.matrices:
            zeros = "" if layer.zeros is None else f"{100 * layer.zeros:.1f}"
            what = f"scales of {layer.name}, {found.low:.2g} to {found.high:.2g}: {', '.join(map(str, layer.scales))}; empty groups: {layer.empty}"
            picture = histogram(layer.scales, what) if layer.scales and sum(layer.scales) else ""
            rows.append([name_of(layer.name), " x ".join(map(str, layer.shape)), esc(layer.storage), zeros, picture])
        said = f"Histograms of the groups' scales, {found.low:.2g} to {found.high:.2g}, logarithmic. " * any(
            layer.scales for layer in found.matrices
        )
        others = f"Besides, {found.others} small parameters of {found.other_weights:,} numbers."
        return table(["matrix", "shape", "stored as", "zeros, %", "scales"], rows, numeric=(3,)) + note(said + others)

    @functools.cached_property
    def tokenizer(self):
        if not self.subject.tokenizer:
            raise UserError("its tokenizer is not where the log says; --tokenizer FILE names it")
        return read_tokenizer(self.subject.tokenizer, self.loaded)

    @functools.cached_property
    def held_out(self):
        if self.options.text:
            return report_model.text_tokens(self.options.text, self.tokenizer)
        folders = [self.options.data] if self.options.data else places_of(self.subject.run, "data_path")
        folder = next(
            (path for path in folders if compliance.shard_paths(path, "val")), folders[0] if folders else Path("DATA_PATH")
        )
        return report_model.held_out_tokens(folder)

    def passages(self):
        ids = self.held_out
        if max(ids) >= self.model.cfg.vocab_size:
            raise UserError(
                f"the held-out text has token {max(ids)}, and the model {self.model.cfg.vocab_size}: another tokenizer made it"
            )
        found = report_model.passages_of(ids, report_model.token_bits(self.model, ids), self.tokenizer)
        hardest, easiest = report_model.extremes(found)
        if not hardest:
            raise UserError(
                f"the held-out text has {len(found)} passages of {report_model.LEAST_TOKENS} tokens or more, expected 2"
            )
        steps = "".join(f'<span style="--b:{colour(bits)}">{bits}</span>' for bits in (0, 2, 4, 8, 12, 16))
        said = f"Out of {len(found):,} passages of the first {len(ids) - 1:,} tokens; the colour of a token is its bits:"
        parts = [f'<p class="note">{esc(said)} <span class="scale">{steps}</span></p>']
        for title, chosen in (("Hardest", hardest), ("Easiest", easiest)):
            parts += [f"<h3>{title}</h3>", *map(passage_html, chosen)]
        return "\n".join(parts)

    def samples(self):
        """What the model writes: at a document's start, and on from words of the held-out text."""
        try:
            return "\n".join(map(sample_html, *zip(*report_model.samples_of(self.loaded, self.tokenizer, self.prompts()), strict=True)))
        except (RuntimeError, MemoryError) as error:
            return note(f"No sample: {' '.join(str(error).split()) or type(error).__name__}")

    def prompts(self):
        if self.options.prompt:
            yield from self.options.prompt
            return
        yield ""
        try:
            ids, edges = self.held_out, self.tokenizer.table.edge
        except UserError:
            return
        for begin in (len(ids) // 3, 2 * len(ids) // 3):
            words = [i for i in ids[begin : begin + PROMPT_TOKENS] if i < len(edges) and not edges[i]]
            if text := " ".join(self.tokenizer.pieces.decode(words).replace("\ufffd", "").split()):
                yield text


def sample_html(prompt, text):
    begun = f"<strong>{esc(prompt)}</strong>" if prompt else ""
    return f'<div class="sample" tabindex="0" role="region" aria-label="sample">{begun}{esc(text)}</div>'


def colour(bits):
    """Share of the full colour: half of it at a quarter of SHOWN_BITS, so that small costs differ too."""
    return f"{min(1.0, max(0.0, bits) / report_model.SHOWN_BITS) ** 0.5:.2f}"


def passage_html(passage):
    spans = "".join(
        f'<span style="--b:{colour(unit.bits)}" title="{unit.bits:.1f} bits">{esc(visible(unit.text))}</span>'
        for unit in passage.units
    )
    costly = sorted(passage.units, key=lambda unit: -unit.bits)[:3]
    words = ", ".join(f"\u201c{visible(unit.text).strip()}\u201d {unit.bits:.1f}" for unit in costly)
    return (f'<div class="passage" tabindex="0" role="region" aria-label="passage">{spans}</div>'
            f'<p class="note">{passage.bits_per_byte:.2f} bits per byte; most bits: {esc(words)}</p>')  # fmt: skip


def visible(text):
    return text.replace("\n", "\u21b5\n")


MODEL_SECTIONS = {"layers": "Layers", "samples": "Samples", "passages": "Hardest and easiest passages"}


def model_sections(subjects, options):
    """{id: (title, HTML)} of what needs the artifacts; a run that lacks something says what."""
    parts = {name: [] for name in MODEL_SECTIONS}
    for s in subjects:
        views, problem = None, s.why_not
        if s.artifact:
            try:
                views = Views(s, options)
            except UserError as error:
                problem = str(error)
        for name in MODEL_SECTIONS:
            try:
                body = getattr(views, name)() if views else note(f"Left out: {problem}.")
            except UserError as error:
                body = note(f"Left out: {error}.")
            parts[name].append(f"<div>{f'<h3>{esc(s.name)}</h3>' if len(subjects) > 1 else ''}{body}</div>")
    return {
        name: (title, section(name, title, f'<div class="runs">{"".join(parts[name])}</div>'))
        for name, title in MODEL_SECTIONS.items()
    }


def report(subjects, options):
    """The whole page."""
    fixed = {
        "scores": ("What it is", scores_section(subjects)), "settings": ("Settings", settings_section(subjects)),
        "machine": ("Machine", machine_section(subjects)), "curves": ("Curves", curves_section(subjects, options.smooth)),
        "bytes": ("Bytes", bytes_section(subjects)),
    }  # fmt: skip
    model = model_sections(subjects, options)
    sections = fixed | {"layers": model["layers"], "rules": ("Rules", rules_section(subjects, options))} | model
    return page(options.title or ", ".join(s.name for s in subjects), sections)


# -------------------------------------------------------------------------------------------------- command line


def parse_arguments(argv):
    parser = OneLineParser(prog="report.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("logs", nargs="+", type=Path, metavar="LOG")
    parser.add_argument("--out", type=Path, metavar="HTML", help="default: the first log's name, ending in .html")
    parser.add_argument(
        "--artifact", type=Path, action="append", default=[], metavar="FILE", help="a run's artifact; once for each"
    )
    parser.add_argument("--tokenizer", type=Path, metavar="FILE", help="the SentencePiece model of the runs")
    parser.add_argument(
        "--data", type=Path, metavar="DIR", help="the folder of the validation shards; default: the logs' data_path"
    )
    parser.add_argument("--text", type=Path, metavar="FILE", help="score passages of this text, not of the validation shards")
    parser.add_argument("--prompt", action="append", default=[], metavar="TEXT", help="text that samples continue; once for each")
    parser.add_argument("--smooth", type=int, default=20, metavar="N", help="training losses in a running mean (default 20)")
    parser.add_argument("--title", default="", help="of the page; default: the runs' names")
    options = parser.parse_args(argv)
    if problem := problem_of(options):
        parser.error(problem)
    return options


def problem_of(options):
    """What is wrong with the options, as far as they tell by themselves; "" if nothing is. Sets --out where it is not given."""
    options.out = options.out or options.logs[0].with_suffix(".html")
    if len(options.logs) > MOST_LOGS:
        return f"{len(options.logs)} logs: expected at most {MOST_LOGS} side by side"
    if options.out.suffix not in (".html", ".htm"):
        return f"--out {options.out}: expected a name that ends in .html"
    if not options.out.parent.is_dir():
        return f"--out {options.out}: there is no folder {options.out.parent}"
    if options.out in options.logs:
        return f"--out {options.out}: is one of the logs"
    if not 1 <= options.smooth <= plot_logs.MOST_SMOOTHING:
        return f"--smooth {options.smooth}: expected 1 to {plot_logs.MOST_SMOOTHING}"
    files = [("--artifact", path) for path in options.artifact] + [("--tokenizer", options.tokenizer), ("--text", options.text)]
    for option, path in files:
        if path and not path.is_file():
            return f"{option} {path}: no such file"
    if options.data and not compliance.shard_paths(options.data, "val"):
        return f"--data {options.data}: no fineweb_val_*.bin there"
    if not (options.title.isprintable() and all(prompt.strip() for prompt in options.prompt)):
        return "--title and --prompt: expected text, a title on one line"
    return ""


def main(argv=None):
    options = parse_arguments(argv)
    return run_command(lambda: write_report(options), UserError, name="report.py")


def write_report(options):
    subjects = read_subjects(options)
    write_text(options.out, report(subjects, options))
    print(options.out)


if __name__ == "__main__":
    start(main)
