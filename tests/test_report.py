"""tools/report.py: a page of one run and of several, what it says of a model, and that a log's text stays text. The page in a browser: at the end."""

from __future__ import annotations

import html
import html.parser
import json
import math
import re
import shutil
import statistics
import sys

import model_files
import pytest
import report
import report_model
import report_page
import sample
from conftest import ROOT, TINY, launch, tiny_model, write_shard

import train_gpt

LOG = (ROOT / "logs/R018_demo_seed42.txt").read_text(encoding="utf-8")
LINES = LOG[LOG.rindex("\npython:") + 1 :].splitlines()  # without the source


def short_log(path, config=(), result=(), change=lambda text: text):
    """R018's log without the source, and of files that are not there; its config and result changed."""
    lines, gone = [], {"artifact_path": "gone.ptz", "data_path": "gone", "tokenizer_path": "gone/tokenizer.model"}
    for line in LINES:
        kind, _, rest = line.partition(" ")
        more = {"config": config, "result": result}.get(kind)
        lines.append(line if more is None else f"{kind} {json.dumps(json.loads(rest) | gone | dict(more))}")
    path.write_text(change("\n".join(lines) + "\n"), encoding="utf-8")
    return path


class Reader(html.parser.HTMLParser):
    """Elements of a page, its text, and what is not closed in order."""

    VOID = {"meta", "link", "input", "br", "wbr", "rect", "line", "path", "circle", "polyline", "polygon"}

    def __init__(self, text):
        super().__init__()
        self.elements, self.open, self.broken, self.said = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.broken.append(tag)

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "script"):
            self.said.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.said).split())


def make(folder, *arguments):
    """(exit code, the page) of the command."""
    try:
        code = report.main([*map(str, arguments), "--out", str(folder / "page.html")])
    except SystemExit as end:
        code = end.code
    return code, (folder / "page.html").read_text(encoding="utf-8") if (folder / "page.html").exists() else ""


@pytest.fixture(scope="module")
def trained(data_dir, tmp_path_factory):
    """The log of a tiny run whose artifact, tokenizer and data are where it says."""
    folder = tmp_path_factory.mktemp("run")
    env = {"DATA_PATH": str(data_dir), "TOKENIZER_PATH": str(data_dir / "tokenizer.model"), "RUN_ID": "tiny", "ARTIFACT_PATH": "tiny.ptz",
           "VAL_LOSS_EVERY": "8", "CHURN_LOG_EVERY": "6"}  # fmt: skip
    done = launch(TINY | env, folder)
    assert done.returncode == 0, done.stderr
    return folder / "logs/tiny.txt"


@pytest.fixture(scope="module")
def tiny_page(trained, tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report_model.sample, "continuation", lambda *_: iter((" and <b>more</b>", " of it")))
        code, page = make(folder, trained)
    assert code == 0
    return page


def test_the_page_is_whole_and_needs_no_network(tiny_page):
    reader = Reader(tiny_page)
    assert not reader.broken and not reader.open
    ids = [about["id"] for _, about in reader.elements if "id" in about]
    assert len(ids) == len(set(ids))
    for tag, about in reader.elements:
        assert tag not in ("img", "iframe", "object", "form", "base") and "src" not in about
        assert about.get("href", "#").startswith(("#", "data:"))
        assert not [name for name in about if name.startswith("on")]
        assert all(f"#{name}" not in about.values() or name in ids for name in ids)
    assert not re.search(r"https?://|@import|url\((?!#)", tiny_page)
    for name in ("scores", "settings", "machine", "curves", "bytes", "layers", "rules", "samples", "passages"):
        assert name in ids and ("a", {"href": f"#{name}"}) in reader.elements
    assert "Left out" not in reader.text


def test_the_page_says_what_the_log_says(tiny_page, trained):
    run, text = report.read_run(trained), Reader(tiny_page).text
    for name in ("val_bpb", "roundtrip_val_bpb", "sliding_val_bpb"):
        assert f"{run.result[name]:.4f}" in text
    for name in ("steps", "tokens", "artifact_bytes", "total_bytes"):
        assert f"{run.result[name]:,}" in text
    assert all(f"{size:,}" in text for size in run.result["stream_bytes"].values())
    assert run.hardware in text and "FAIL seeds 7" in text  # tools/compliance.py
    settings = tiny_page[tiny_page.index('id="settings"') : tiny_page.index('id="machine"')]
    shown = {
        re.sub("<wbr>", "", name): value for name, value in re.findall(r"<code>(.*?)</code></th>.*?</td><td>(.*?)</td>", settings)
    }
    default = train_gpt.Config()
    differ = {k.upper() for k, v in run.config.items() if v != getattr(default, k)} - {"RUN_ID", "ARTIFACT_PATH", "LOG_DIR"}
    assert shown.keys() == differ and shown["NUM_LAYERS"] == "3"


def charts(page):
    """[(title, axis, series)] of the page's charts."""
    found = re.findall(r'<figcaption>([^<]*); [^<]*</figcaption>.*?<script type="application/json">(.*?)</script>', page, re.S)
    return [(title, (data := json.loads(text))["axis"], data["series"]) for title, text in found]


def test_curves_are_the_logs_on_every_axis(tiny_page, trained):
    found = {(title.split(":")[0], axis.split(" (")[0]): series[0] for title, axis, series in charts(tiny_page)}
    assert {name for name, _ in found} == {"Loss", "Validation", "Learning rate", "Zeros among the ternary weights"}
    assert {axis for _, axis in found} == {"training time", "optimizer steps", "training tokens"}
    steps, tokens = (found["Validation", axis] for axis in ("optimizer steps", "training tokens"))
    expected = [
        (int(s), float(b)) for s, b in re.findall(r"^step:(\d+)/24 val_loss:\S+ val_bpb:(\S+)", trained.read_text(), re.M)
    ]
    assert list(zip(steps["x"], steps["y"], strict=True)) == expected and len(expected) == 3
    assert [round(x * 1e6) for x in tokens["x"]] == [256 * step for step, _ in expected]
    for series in found.values():
        assert all(0 <= x <= report_page.WIDTH for x in series["px"]) and all(0 <= y <= report_page.HEIGHT for y in series["py"])


def test_layers_are_the_models(tiny_page, trained):
    run = report.read_run(trained)
    model = train_gpt.load_artifact((trained.parent.parent / "tiny.ptz").read_bytes())[0]
    layers = report_model.layers_of(model)
    ternary = [layer for layer in layers.matrices if layer.storage == "ternary"]
    sizes = [math.prod(layer.shape) for layer in ternary]
    assert sum(sizes) == run.result["ternary_params"]
    assert sum(z * n for z, n in zip([layer.zeros for layer in ternary], sizes, strict=True)) / sum(sizes) == pytest.approx(
        run.result["zero_frac"]
    )
    assert all(sum(layer.scales) + layer.empty == n // 32 for layer, n in zip(ternary, sizes, strict=True))  # BITNET_GROUP_SIZE
    assert all(f"{100 * layer.zeros:.1f}" in tiny_page for layer in ternary)
    assert sum(math.prod(layer.shape) for layer in layers.matrices) + layers.other_weights == run.result["params"]


def tokenizer_of(folder):
    return model_files.read_tokenizer(folder / "tokenizer.model", model_files.Loaded(folder, b"", None, tiny_model().cfg))


def test_bits_of_tokens_are_the_score(data_dir):
    """Windows that overlap by half, at temperature 1: `evaluate` on the same tokens."""
    model = tiny_model().eval()
    cfg = train_gpt.dataclasses.replace(model.cfg, data_path=str(data_dir), tokenizer_path=str(data_dir / "tokenizer.model"))
    val = train_gpt.ValidationSet.load(cfg, train_gpt.World())
    ids = report_model.held_out_tokens(data_dir)
    assert len(ids) == val.num_targets + 1
    bits = report_model.token_bits(model, ids)
    nats, bpb = train_gpt.evaluate(model, val, cfg, train_gpt.World(), cfg.train_seq_len // 2)
    assert statistics.fmean(bits) == pytest.approx(nats / math.log(2), rel=1e-5)
    found = report_model.passages_of(ids, bits, tokenizer_of(data_dir))
    scores = [passage.bits_per_byte for passage in found]
    assert scores == sorted(scores, reverse=True) and scores[0] > bpb > scores[-1]
    short = report_model.token_bits(model, ids[:20])  # less than a window
    assert short == pytest.approx(bits[:19], abs=1e-4)


def test_passages_end_where_documents_do(data_dir):
    """Documents of 60 and 100 tokens: one passage of 48 and two; what remains is too short to say anything."""
    tokenizer = tokenizer_of(data_dir).pieces
    documents = [tokenizer.encode(f"this document has {words} of its own " * 9)[:count] for words, count in (("words", 60), ("sentences", 100))]
    ids = [i for document in documents for i in (tokenizer.bos_id(), *document)]
    found = report_model.passages_of(ids, [1.0] * (len(ids) - 1), tokenizer_of(data_dir))
    text = lambda pieces: "".join(tokenizer.id_to_piece(pieces)).replace("\u2581", " ")
    expected = [text(documents[0][:48]), text(documents[1][:48]), text(documents[1][48:96])]
    shown = ["".join(unit.text for unit in passage.units) for passage in found]
    assert sorted(shown) == sorted(expected)
    for passage, said in zip(found, shown, strict=True):
        assert passage.bits_per_byte == pytest.approx(48 / len(said.encode()))


@pytest.mark.parametrize(("pieces", "units"), [
    (["\u2581a", "b"], [(" a", 1), ("b", 2)]),
    (["<0xC3>", "<0xA9>", "x"], [("\u00e9", 3), ("x", 3)]),
    (["x", "<0x0A>"], [("x", 1), ("\n", 2)]),
    (["<0xFF>"], [("\ufffd", 1)]),
    (["<0xZ>"], [("<0xZ>", 1)]),
])  # fmt: skip
def test_bytes_that_follow_each_other_are_one_unit(pieces, units):
    assert report_model.units_of(pieces, [1.0, 2.0, 3.0][: len(pieces)]) == units


def test_no_passage_is_among_the_hardest_and_the_easiest():
    passages = [report_model.Passage(float(9 - i), []) for i in range(5)]
    hardest, easiest = report_model.extremes(passages)
    assert [p.bits_per_byte for p in hardest] == [9, 8] and [p.bits_per_byte for p in easiest] == [5, 6]


def test_defaults_are_read_from_the_program_in_the_log():
    """Without running it: the same as those that it has when it runs, names made at its start left out."""
    found, real = report.program_defaults((ROOT / "train_gpt.py").read_bytes()), train_gpt.Config()
    assert {k: getattr(real, k) for k in found} == found
    assert set(report.present_defaults()) - set(found) == {"run_id"}
    assert report.program_defaults(b"import os\nos.abort()\n") == {} and report.program_defaults(b"\xff(") == {}


# -------------------------------------------------------------------------------------------------- several logs


def test_several_logs_stand_side_by_side_with_their_differences(tmp_path):
    first = short_log(tmp_path / "a.txt", {"run_id": "one"})
    second = short_log(tmp_path / "b.txt", {"run_id": "two", "matrix_lr": 0.08}, {"val_bpb": 1.9, "steps": 538})
    code, page = make(tmp_path, first, second)
    text = Reader(page).text
    assert code == 0 and "1.9000 (+0.0969)" in text and "538 538 (=)" in text
    assert re.search(r"<tr class=differs><th scope=\"row\"><code>MATRIX_<wbr>LR", page) and page.count("<tr class=differs") == 1
    assert {tuple(s["name"] for s in series) for _, _, series in charts(page)} == {("one", "two")}
    assert "Checked one by one" in text and text.count("three seeds") == 2


def test_seeds_of_one_experiment_are_checked_together(tmp_path):
    logs = [
        short_log(tmp_path / f"{seed}.txt", {"run_id": "same"}, {"seed": seed, "artifact_sha256": f"{seed:064}"})
        for seed in (42, 7, 1)
    ]
    code, page = make(tmp_path, *logs)
    text = Reader(page).text
    assert code == 0 and "one by one" not in text and re.search(r"three seeds PASS", text)
    assert "<h1>42, 7, 1</h1>" in page  # names that are alike say nothing


def test_a_setting_that_an_older_program_lacks_is_no_difference(tmp_path):
    def without(text):
        return text.replace('"kernels": "auto", ', "").replace('"bigram_hash": false', '"bigram_hash": 0')

    code, page = make(tmp_path, short_log(tmp_path / "new.txt"), short_log(tmp_path / "old.txt", change=without))
    assert (
        code == 0 and "KERNELS" not in page and "BIGRAM" not in page and "<tr class=differs" not in page.split('id="machine"')[0]
    )


# -------------------------------------------------------------------------------------------------- what a log may say

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)> \x00\x1b[31m\ud800 \" ' &amp; {0} --><!--"


def test_what_a_log_says_stays_text(tmp_path):
    """The same elements and attributes as the page of a harmless log; no control character, no half one."""
    pages = []
    for name, text in (("a", "harmless"), ("b", HOSTILE)):
        words = {"run_id": text, "matrix_optimizer": text}
        figures = {
            "gpu_name": text,
            "attention": text,
            "git_commit": text,
            "stream_bytes": {"trits": 5, text: 7},
            "artifact_path": text,
        }
        plain = lambda line, text=text: line.replace(
            "precision:torch.float32", f"precision:{'<b>x</b>' if text == HOSTILE else 'plain'}"
        )
        (tmp_path / name).mkdir()
        code, page = make(tmp_path / name, short_log(tmp_path / name / "log.txt", words, figures, plain))
        assert code == 0
        pages.append(page)
    harmless, hostile = map(Reader, pages)
    assert [(tag, sorted(about)) for tag, about in harmless.elements] == [(tag, sorted(about)) for tag, about in hostile.elements]
    assert not hostile.broken and "alert(1)" in hostile.text and "<b>x</b>" in hostile.text
    assert not re.search("[\x00-\x08\x0b-\x1f\ud800-\udfff]", pages[1]) and "\ufffd" in pages[1]
    assert all(json.loads(text) for text in re.findall(r'<script type="application/json">(.*?)</script>', pages[1], re.S))


def test_samples_are_text_and_a_sampler_that_fails_says_why(tiny_page, trained, tmp_path, monkeypatch):
    samples = tiny_page[tiny_page.index('id="samples"') : tiny_page.index('id="passages"')]
    assert samples.count('class="sample"') == 3 and samples.count("&lt;b&gt;more&lt;/b&gt; of it</div>") == 3
    assert len(re.findall(r'aria-label="sample"><strong>[^<]+</strong> and', samples)) == 2  # what it was to continue is told apart

    def fail(*_):
        raise RuntimeError("<no> memory\nat all")

    monkeypatch.setattr(report_model.sample, "continuation", fail)
    code, page = make(tmp_path, trained, "--prompt", "The <end>")
    assert code == 0 and page.count("No sample: &lt;no&gt; memory at all") == 1


def test_samples_are_what_the_sampler_writes_with_the_same_seeds(trained, capsys, monkeypatch):
    """The model is loaded once; afterwards it computes as before."""
    monkeypatch.chdir(trained.parent.parent)  # where its log is found
    loaded = model_files.load_model(trained.parent.parent / "tiny.ptz")
    tokenizer = model_files.load_tokenizer(loaded)
    before = report_model.token_bits(loaded.model, list(range(4, 60)))
    found = list(report_model.samples_of(loaded, tokenizer, ["", "The quick"]))
    for seed, (prompt, text) in enumerate(found, 1):
        assert sample.main([str(loaded.path), *[prompt] * bool(prompt), "--tokens", "80", "--seed", str(seed)]) == 0
        assert capsys.readouterr().out == f"{prompt}{text}\n"
    assert report_model.token_bits(loaded.model, list(range(4, 60))) == before


def test_line_ends_of_a_text_count_as_they_stand(trained, data_dir, tmp_path):
    loaded = model_files.load_model(trained.parent.parent / "tiny.ptz")
    tokenizer = model_files.read_tokenizer(data_dir / "tokenizer.model", loaded)
    (tmp_path / "a.txt").write_bytes(b"one line\r\n" * 20)
    assert report_model.text_tokens(tmp_path / "a.txt", tokenizer) == tokenizer.document("one line\r\n" * 20)


def test_a_text_of_ones_own_is_scored(trained, tmp_path):
    (tmp_path / "own.txt").write_text("fox & <dog> jump over the quick brown box. " * 20)
    code, page = make(tmp_path, trained, "--text", tmp_path / "own.txt")
    passages = html.unescape(re.sub("<[^>]*>", "", page[page.index('id="passages"') :]))
    assert code == 0 and "quick brown box" in passages and "& <dog>" in passages


def test_what_is_not_there_is_left_out_and_said(tmp_path, trained, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, page = make(tmp_path, short_log(tmp_path / "log.txt"))
    assert code == 0 and page.count("Left out: there is no artifact at gone.ptz; --artifact FILE names it.") == 3
    (tmp_path / "gone.ptz").write_bytes(b"another")
    code, page = make(tmp_path, tmp_path / "log.txt")
    assert code == 0 and "gone.ptz is not the artifact of this run: its SHA-256 is another" in page
    digest = report.sha256_file(tmp_path / "gone.ptz")
    code, page = make(tmp_path, short_log(tmp_path / "log.txt", result={"artifact_sha256": digest}), "--artifact", "gone.ptz")
    assert code == 0 and "gone.ptz: not an artifact of train_gpt.py" in page  # as its log says, and none
    older = re.sub(r'"stream_bytes": \{[^}]*\}, ', "", trained.read_text())
    (tmp_path / "tiny.txt").write_text(re.sub(r"^step:.* loss:.*\n", "", older, flags=re.M))
    code, page = make(tmp_path, tmp_path / "tiny.txt")
    assert code == 0 and "its log has no stream_bytes" in page and "Nothing was trained" in page


@pytest.mark.parametrize(("arguments", "said"), [
    (["missing.txt"], "missing.txt: not a readable log: No such file"),
    (["half.txt"], "half.txt: no result line: the run did not finish"),
    (["log.txt", "log.txt"], "a log is given twice"),
    (["log.txt"] * 9, "9 logs: expected at most 8"),
    (["log.txt", "--artifact", "no.ptz"], "--artifact no.ptz: no such file"),
    (["log.txt", "--artifact", "half.txt"], "--artifact half.txt: its SHA-256 is "),
    (["log.txt", "--tokenizer", "half.txt"], "--tokenizer half.txt: of no use without an artifact"),
    (["log.txt", "--text", "half.txt"], "--text half.txt: of no use without an artifact and its tokenizer"),
    (["log.txt", "--data", "."], "--data .: no fineweb_val_*.bin there"),
    (["log.txt", "--smooth", "0"], "--smooth 0: expected 1 to 10000"),
    (["log.txt", "--title", "two\nlines"], "--title and --prompt: expected text"),
    (["log.txt", "--prompt", " "], "--title and --prompt: expected text"),
    (["log.txt", "--out", "page.txt"], "--out page.txt: expected a name that ends in .html"),
    (["log.txt", "--out", "no/page.html"], "--out no/page.html: there is no folder no"),
    (["log.html", "--out", "log.html"], "--out log.html: is one of the logs"),
    (["log.txt", "--foo"], "unrecognized arguments: --foo"),
])  # fmt: skip
def test_mistakes_are_one_line_and_touch_nothing(arguments, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "page.html").write_text("the one before")
    (tmp_path / "half.txt").write_text("step:1/9 loss:8.0 t:5ms\n")
    short_log(tmp_path / "log.txt")
    shutil.copy(tmp_path / "log.txt", tmp_path / "log.html")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(SystemExit) as end:
        sys.exit(report.main(["--out", "page.html", *arguments]))
    complaint = capsys.readouterr().err
    assert end.value.code == 2 and said in complaint and complaint.count("\n") == 1 and complaint.startswith("report.py: error: ")
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_another_tokenizer_of_the_same_size_is_refused(trained, data_dir, tmp_path, capsys):
    (tmp_path / "other.model").write_bytes((data_dir / "tokenizer.model").read_bytes() + b"\x08\x01")
    code, page = make(tmp_path, trained, "--tokenizer", tmp_path / "other.model")
    assert code == 2 and not page and f"--tokenizer {tmp_path / 'other.model'}: not the tokenizer of {trained}" in capsys.readouterr().err
    assert make(tmp_path, trained, "--tokenizer", data_dir / "tokenizer.model")[0] == 0


def test_the_log_of_an_evaluation_has_a_page(tmp_path):
    trained_alone = ("steps", "tokens", "code_bytes", "code_sha256", "first_losses", "train_time_s", "ms_per_step", "val_loss", "val_bpb",
                     "total_bytes", "artifact_bytes", "params", "ternary_params", "stream_bytes", "codec", "zero_frac")  # fmt: skip
    log = short_log(tmp_path / "scored.txt", config={"eval_only": True}.items())
    *before, result = log.read_text().splitlines()
    figures = {key: value for key, value in json.loads(result.removeprefix("result ")).items() if key not in trained_alone}
    log.write_text("\n".join([*before, "result " + json.dumps(figures)]) + "\n")
    code, page = make(tmp_path, log)
    assert code == 0 and "1.7" in page


def test_held_out_text_of_another_tokenizer_is_said(trained, tmp_path):
    import numpy as np

    write_shard(tmp_path / "fineweb_val_000000.bin", np.arange(3000, 3100))
    code, page = make(tmp_path, trained, "--data", tmp_path)
    assert code == 0 and "the held-out text has token 3099, and the model 320: another tokenizer made it" in page


# -------------------------------------------------------------------------------------------------- small parts


@pytest.mark.parametrize(("low", "high", "expected"), [
    (0, 120, [0, 20, 40, 60, 80, 100, 120]), (3.6, 8.5, [4, 5, 6, 7, 8]), (0, 0.042, [0, 0.01, 0.02, 0.03, 0.04]), (5, 5, [5]),
])  # fmt: skip
def test_ticks_are_round_numbers(low, high, expected):
    assert report_page.ticks(low, high) == pytest.approx(expected)


def test_a_long_curve_keeps_its_ends():
    rows = list(range(10_000))
    thin = report_page.thinned(rows)
    assert len(thin) == report_page.MOST_POINTS and (thin[0], thin[-1]) == (0, 9999) and thin == sorted(set(thin))


def test_colours_grow_with_bits():
    shares = [float(report.colour(bits)) for bits in (0, 1, 4, 16, 99)]
    assert shares == sorted(shares) and (shares[0], shares[2], shares[3], shares[4]) == (0, 0.5, 1, 1)


# -------------------------------------------------------------------------------------------------- in a browser

BROWSERS = ("chromium", "chromium-browser", "google-chrome")


@pytest.fixture(scope="module")
def browser():
    """A headless Chromium: the system's, or the one that playwright has installed."""
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install -r requirements-extra.txt")
    system = next((path for path in map(shutil.which, BROWSERS) if path), None)
    with api.sync_playwright() as playwright:
        try:
            started = playwright.chromium.launch(executable_path=system, args=["--no-sandbox"])
        except api.Error as error:
            pytest.skip(f"no Chromium starts here: {str(error).splitlines()[0]}")
        yield started
        started.close()


@pytest.mark.campaign
@pytest.mark.parametrize(("scheme", "width"), [("light", 1200), ("dark", 1200), ("light", 360)], ids=["light", "dark", "narrow"])
def test_a_browser_shows_it_all_without_a_complaint(browser, tiny_page, tmp_path, scheme, width):
    """Text and pictures are there, values come on hover and by keys, axes change, nothing else is loaded, nothing runs over the side."""
    (tmp_path / "page.html").write_text(tiny_page, encoding="utf-8")
    context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)
    page, said, asked = context.new_page(), [], []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto((tmp_path / "page.html").as_uri())
    chart = page.locator("figure.chart.by-time").first
    output, curve = chart.locator("output"), chart.locator("svg.wide")
    curve.focus()
    page.keyboard.press("End")
    by_key = output.text_content()
    page.keyboard.press("ArrowLeft")
    assert by_key.startswith("training time (s) ") and output.text_content() != by_key
    curve.hover()
    assert output.text_content() not in ("", by_key)
    assert page.locator("figure.chart:visible").count() == 4  # loss, validation, learning rate, zeros
    page.get_by_label("against tokens").check()
    assert page.locator("figure.chart.by-tokens:visible").count() == 4 and not chart.is_visible()
    pictures = [box for svg in page.locator("svg:visible").all() if (box := svg.bounding_box())]
    assert len(pictures) > 12 and all(box["width"] > 20 and box["height"] > 5 for box in pictures)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    bright = page.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number).reduce((a, b) => a + b)")
    assert (bright > 600) == (scheme == "light")
    hot = page.locator(".passage span").first.evaluate("e => getComputedStyle(e).backgroundColor")
    assert hot not in ("", "rgba(0, 0, 0, 0)")
    assert said == [] and asked == [(tmp_path / "page.html").as_uri()]
    assert len(page.screenshot(full_page=True)) > 20_000
    context.close()


@pytest.mark.campaign
def test_a_hostile_log_runs_nothing_in_a_browser(browser, tmp_path):
    code, _ = make(tmp_path, short_log(tmp_path / "log.txt", {"run_id": HOSTILE}, {"attention": HOSTILE}))
    page, said = browser.new_page(), []
    for event in ("dialog", "console", "pageerror"):
        page.on(event, lambda about: said.append(str(about)))
    page.goto((tmp_path / "page.html").as_uri())
    assert code == 0 and said == [] and "alert(1)" in page.locator("h1").text_content()
    page.close()
