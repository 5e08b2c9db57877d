#!/usr/bin/env python3
"""Text that a trained model writes, from its artifact and its tokenizer alone.

    sample.py ARTIFACT "text to continue"      continue it
    sample.py ARTIFACT                         begin a document
    sample.py ARTIFACT -                       ask for text again and again; without a terminal, all of stdin is the text

The text goes to stdout as it arises; stderr says how fast. It ends after --tokens, after --sentences, or where the model
ends the document. --temperature 1 with neither --top-k nor --top-p draws from the model's own distribution (its logits are
divided by the temperature that the artifact holds, as in the sliding score); 0 takes the likeliest token every time.

The model computes one token at a time and keeps what later ones need of it (keys, values, running sums). When its window is
full, it goes on from the second half of it. The tokenizer is found by itself beside the artifact, or where the run's log has it.
"""

import math
import re
import secrets
import sys
import time
from functools import partial

from command_line import run_command, start
from model_files import load_model, load_tokenizer, shown
from run_logs import OneLineParser
from shard_io import UserError

CHECKED_TOKENS = 6  # on which a model is computed both ways before the cache is trusted
SENTENCE_END = re.compile(r"[.!?][\"')\]]*(?=\s)|[\u3002\uff01\uff1f]")  # ASCII and CJK
LARGEST_SEED = 2**63 - 1


class Context:
    """A model and the tokens before the next one. `cached`: positions that have been computed are not computed again.

    What a position leaves to later ones is kept in `memory`, under the number of the call within a forward pass: a block
    that runs several times has its own keys each time. Attention, lookup and positions meet it in `Ops` and in the modules
    named in `remember`; all else in a model looks at one position alone. Whether that is so is checked, not believed.
    """

    def __init__(self, model):
        self.model, self.window = model, model.cfg.score_window
        self.cached, self.taught = True, []
        self.restart()
        checked = [i % model.cfg.vocab_size for i in range(1, 1 + min(CHECKED_TOKENS, self.window))]
        expected = whole_logits(model, checked)
        self.remember()
        half = 1 + len(checked) // 2
        for ids in (checked[:half], *([token] for token in checked[half:])):
            logits = self.feed(ids)
        if not agree(logits, expected, model.cfg):
            self.forget()
        self.restart()

    def restart(self):
        """As if no token had been fed."""
        self.ids, self.memory = [], {}

    def feed(self, ids, tail=1):
        """Logits after each of the last `tail` of these further tokens: (tail, V), float32."""
        import torch

        if len(self.ids) + len(ids) > self.window:
            keep = max(1, self.window // 2) if self.ids else self.window
            ids = (self.ids + list(ids))[-keep:]
            self.restart()
        if not self.cached:
            self.ids += ids
            return whole_logits(self.model, self.ids, tail)
        self.calls = 0
        for module, name, whole in self.positions:
            setattr(module, name, whole[len(self.ids) :])
        with torch.no_grad():
            h = self.model.hidden(torch.tensor([ids]), tail=tail)
            logits = self.model.logits(h)[0]
        self.ids += ids
        return logits

    def remember(self):
        """Make the model's parts that look at other positions look into the memory."""
        import train_gpt

        self.model.use(train_gpt.Ops(attend=self.attend))
        buffers = {train_gpt.Rotary: ("cos", "sin"), train_gpt.RadialNorm: ("features",)}
        self.positions = [(m, name, getattr(m, name)) for m in self.model.modules() for kind, names in buffers.items()
                          if isinstance(m, kind) for name in names]  # fmt: skip
        for module in self.model.modules():
            if isinstance(module, (train_gpt.BigramTable, train_gpt.SmearGated)):
                self.teach(module, "rows", partial(self.rows, type(module).rows, module))
            elif isinstance(module, train_gpt.Attention):
                self.teach(module, "offset", partial(self.offset, module.offset))
            elif isinstance(module, train_gpt.Smear):
                self.teach(module, "forward", partial(self.smear, module))
            elif isinstance(module, train_gpt.Refiner):
                self.teach(module, "forward", partial(self.refine, type(module).forward, module))

    def teach(self, module, name, function):
        setattr(module, name, function)
        self.taught.append((module, name))

    def forget(self):
        """Compute the whole context for every token: slow, and right for any model."""
        import train_gpt

        self.cached = False
        self.model.use(train_gpt.Ops())
        for module, name in self.taught:
            delattr(module, name)
        for module, name, whole in self.positions:
            setattr(module, name, whole)

    def key(self):
        """The number of this call within the forward pass."""
        self.calls += 1
        return self.calls

    def extended(self, key, x):
        """x (1, T, ...) behind what earlier passes left under this key; the buffer grows by doubling."""
        done = len(self.ids)
        kept, end = self.memory.get(key), done + x.size(1)
        if kept is None or kept.size(1) < end:
            larger = x.new_empty(1, min(self.window, 2 * end), *x.shape[2:])
            if kept is not None:
                larger[:, :done] = kept[:, :done]
            kept = self.memory[key] = larger
        kept[:, done:end] = x
        return kept[:, :end]

    def attend(self, q, k, v):
        """`Ops.attend` over the new positions' keys and values and all before them."""
        import train_gpt

        key = self.key()
        k, v = self.extended((key, "k"), k), self.extended((key, "v"), v)
        window = self.model.cfg.attention_window
        return train_gpt.attend_band(q, k, v, window) if window else train_gpt.attend(q, k, v)

    def rows(self, plain, table, idx, dtype):
        """`rows` of BigramTable and SmearGated: both look at the token before, so with both two old ones count."""
        import torch

        before = idx.new_tensor([self.ids[-2:]])
        return plain(table, torch.cat((before, idx), dim=1), dtype)[:, before.size(1) :]

    def offset(self, plain, k):
        """`Attention.offset` of the new positions' keys behind the last old one's."""
        new = k.size(1)
        return plain(self.extended(self.key(), k)[:, -new - 1 :])[:, -new:]

    def smear(self, module, x):
        """`Smear.forward` with the sum of all positions so far."""
        import torch

        import train_gpt

        key = self.key()
        count = torch.arange(len(self.ids) + 1, len(self.ids) + 1 + x.size(1))[:, None]
        sums = x.float().cumsum(1) + self.memory.get(key, 0)
        self.memory[key] = sums[:, -1:]
        return x + train_gpt.as_stored(module.gate).tanh().to(x.dtype) * ((sums / count).to(x.dtype) - x)

    def refine(self, plain, module, x):
        """`Refiner.forward`: its kernel reaches over the last positions."""
        import torch

        key = self.key()
        before = self.memory.get(key, x[:, :0])
        joined = torch.cat((before, x), dim=1)
        self.memory[key] = joined[:, 1 - module.kernel :]
        return plain(module, joined)[:, before.size(1) :]


def whole_logits(model, ids, tail=1):
    """Logits (tail, V) after the last tokens, by the forward pass of the whole context."""
    import torch

    with torch.no_grad():
        return model.logits(model.hidden(torch.tensor([ids]), tail=tail))[0]


def agree(logits, expected, cfg):
    """Whether two computations of the same logits differ by rounding alone. A rounding that falls otherwise moves an
    activation of ACT_QUANT by a whole level."""
    error = (logits - expected).norm() / expected.norm().clamp_min(1e-6)
    return bool(error < (1e-3 if cfg.act_quant == "none" else 5e-2))


# -------------------------------------------------------------------------------------------------- drawing


def choose(logits, options, generator):
    """The next token's id, drawn from logits (V,)."""
    import torch

    if options.temperature == 0:
        return int(logits.argmax())
    logits = (logits.double() - logits.max()) / options.temperature  # the largest stays finite however low that is
    if 0 < options.top_k < len(logits):
        logits = logits.masked_fill(logits < logits.topk(options.top_k).values[-1], -math.inf)
    p, order = logits.softmax(-1).sort(descending=True)
    p = p.masked_fill(p.cumsum(-1) - p >= options.top_p, 0)  # the fewest tokens that hold this share together
    return int(order[torch.multinomial(p, 1, generator=generator)])


def generate(context, ids, options, generator):
    """Token ids that continue `ids`, until the caller has enough."""
    logits = context.feed(ids)[-1]
    while True:
        token = choose(logits / context.model.temperature, options, generator)
        yield token
        logits = context.feed([token])[-1]


def continuation(context, tokenizer, text, options, generator):
    """Pieces of text that continue `text`: as many tokens and sentences as the options say, or until the document ends."""
    ids = tokenizer.document(text)
    before, written = tokenizer.pieces.decode(ids), ""
    for _, token in zip(range(options.tokens), generate(context, list(ids), options, generator), strict=False):
        if tokenizer.table.edge[token]:
            break
        ids.append(token)
        # a character of several bytes is there when its last one is; the decoder shows what is not whole as U+FFFD
        text = tokenizer.pieces.decode(ids)[len(before) :].rstrip("\ufffd")
        if options.sentences and len(ends := list(SENTENCE_END.finditer(text))) >= options.sentences:
            yield text[len(written) : ends[options.sentences - 1].end()]
            break
        yield text[len(written) :]
        written = text if len(text) > len(written) else written


# -------------------------------------------------------------------------------------------------- the command


class Voice:
    """Continues texts on stdout, and says on stderr how fast."""

    def __init__(self, context, tokenizer, options):
        import torch

        self.context, self.tokenizer, self.options = context, tokenizer, options
        self.generator = torch.Generator().manual_seed(options.seed)

    def __call__(self, text):
        before, begun, count = time.perf_counter(), None, 0
        self.context.restart()
        print(shown(text), end="", flush=True)
        for piece in continuation(self.context, self.tokenizer, text, self.options, self.generator):
            count, begun = count + 1, begun or time.perf_counter()
            print(shown(piece), end="", flush=True)
        print(flush=True)
        now = time.perf_counter()
        speed = f"{(count - 1) / (now - begun):.1f} tokens/s" if count > 1 else "no speed"
        prompt = f"{(begun or now) - before:.2f} s for the text before them"
        print(f"sample.py: {count} tokens, {speed}, {prompt}; --seed {self.options.seed}", file=sys.stderr)


def prompts(option):
    """The texts to continue."""
    if option != "-":
        yield option or ""
    elif not sys.stdin.isatty():
        yield checked_text(sys.stdin.read().removesuffix("\n"), "stdin")
    else:
        import readline  # noqa: F401  lines can be edited and called back

        while True:
            try:
                line = input("> ")
            except EOFError:
                print()
                return
            if line:
                yield line


def checked_text(text, name):
    """UserError unless there is text to continue, and UTF-8 can hold it."""
    if not text:
        raise UserError(f"{name}: empty; expected text to continue, or no TEXT to begin a document")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(f"{name}: not UTF-8") from None
    return text


def parse_arguments(argv):
    parser = OneLineParser(__doc__)
    parser.add_argument("artifact", metavar="ARTIFACT")
    parser.add_argument("text", metavar="TEXT", nargs="?", help="the text to continue; -: ask for it")
    parser.add_argument("--tokenizer", metavar="MODEL", help="the SentencePiece model (found by itself where the run has it)")
    parser.add_argument("--tokens", type=int, default=100, metavar="N", help="at most so many (default 100)")
    parser.add_argument("--sentences", type=int, default=0, metavar="N", help="end after so many sentences; 0: do not (default)")
    parser.add_argument("--temperature", type=float, default=0.8, metavar="T", help="above 1: wilder, below: tamer (default .8)")
    parser.add_argument("--top-k", type=int, default=0, metavar="K", help="only the K likeliest tokens; 0: all (default)")
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P", help="only the likeliest that hold this share (default 1)")
    parser.add_argument("--seed", type=int, metavar="N", help="the same seed draws the same text (default: another every time)")
    options = parser.parse_args(argv)
    limits = {"tokens": (1, 1_000_000), "sentences": (0, 10_000), "temperature": (0, 100), "top_k": (0, 2**16), "seed": (0, LARGEST_SEED)}
    for name, (least, most) in limits.items():
        value = getattr(options, name)
        if value is not None and not least <= value <= most:
            parser.error(f"--{name.replace('_', '-')} {value}: expected {least} to {most}")
    if not 0 < options.top_p <= 1:
        parser.error(f"--top-p {options.top_p}: expected above 0, at most 1")
    if options.seed is None:
        options.seed = secrets.randbelow(10_000)
    return options


def main(argv=None):
    options = parse_arguments(argv)
    return run_command(lambda: write_text(options), UserError)


def write_text(options):
    if options.text is not None:
        checked_text(options.text, "TEXT")
    loaded = load_model(options.artifact)
    tokenizer = load_tokenizer(loaded, options.tokenizer)
    if options.text is None and not tokenizer.start():
        raise UserError(f"{tokenizer.path}: no piece begins a document; expected TEXT to continue")
    speak(loaded.model, tokenizer, options)


def speak(model, tokenizer, options):
    import train_gpt

    with train_gpt.rounded_once(model):
        context = Context(model)
        if not context.cached:
            print("sample.py: this model is computed anew for every token: its parts look at other positions in a way that no "
                  "cache is known for", file=sys.stderr)  # fmt: skip
        voice = Voice(context, tokenizer, options)
        for text in prompts(options.text):
            voice(text)


if __name__ == "__main__":
    start(main)
