"""The page that tools/report.py writes: tables, charts as SVG, and the file around them. It loads nothing, so it needs no network.

This file is no command. Whatever a log says is text here: all of it goes through `esc`, and a chart's data through `embedded`. A
policy in the page's head forbids what it does not need: another file, a frame, a form.
"""

import html
import json
import math
import zlib
from pathlib import Path

import command_line

DASHES = ("", "7 3", "2 3", "9 3 2 3")
MARKS = ("circle", "square", "triangle", "diamond")
COLOURS = 7  # --s0 ... in report.css
WIDTH, HEIGHT = 760, 330
LEFT, RIGHT, TOP, BOTTOM = 78, 16, 12, 52
MOST_POINTS = 600  # of a curve
POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"


def esc(value):
    """Any value as text of the page. What is no character of HTML (controls, half characters) becomes U+FFFD."""
    text = str(value).encode(errors="replace").decode()
    return html.escape("".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text))


def name_of(value):
    """A name of code, which may be broken after its dots and underscores."""
    return f"<code>{esc(value).replace('_', '_<wbr>').replace('.', '.<wbr>')}</code>"


def embedded(value):
    """JSON inside a <script>: nothing in it ends the element or begins a comment."""
    return json.dumps(value, allow_nan=False).replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def number(value, digits=4):
    """A number as a person reads it."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:,.{digits}f}"


def table(columns, rows, caption="", numeric=(), marked=()):
    """HTML of a table. Cells are HTML; the first of each row heads it. `numeric`: columns aligned right; `marked`: rows that differ."""
    kind = lambda i: ' class="number"' if i in numeric else ""
    head = "".join(f'<th scope="col"{kind(i)}>{cell}</th>' for i, cell in enumerate(columns))
    body = "".join(
        f"<tr{' class=differs' if n in marked else ''}><th scope=\"row\">{row[0]}</th>"
        + "".join(f"<td{kind(i)}>{cell}</td>" for i, cell in enumerate(row[1:], 1)) + "</tr>\n"
        for n, row in enumerate(rows)
    )  # fmt: skip
    said = f"<caption>{caption}</caption>" if caption else ""
    whole = f"<table>{said}<thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table>"
    return f'<div class="scroll" tabindex="0" role="region" aria-label="table">{whole}</div>'


def section(name, title, *parts):
    return f'<section id="{name}">\n<h2>{esc(title)}</h2>\n' + "\n".join(part for part in parts if part) + "\n</section>"


def note(text):
    return f'<p class="note">{esc(text)}</p>'


# -------------------------------------------------------------------------------------------------- charts


def ticks(low, high, count=6):
    """Round numbers between low and high."""
    raw = (high - low) / count or 1.0
    step = 10 ** math.floor(math.log10(raw))
    step *= next(m for m in (1, 2, 5, 10) if m * step >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def tick_text(value):
    return f"{value:,.6g}".replace("e-0", "e-").replace("e+0", "e") if value else "0"


def thinned(rows, most=MOST_POINTS):
    """At most so many of the rows, the first and the last among them."""
    return rows if len(rows) <= most else [rows[round(i * (len(rows) - 1) / (most - 1))] for i in range(most)]


def mark(shape, x, y, look, size=4.5):
    """An SVG marker."""
    if shape == "circle":
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{size}" {look}/>'
    corners = {"square": ((-1, -1), (1, -1), (1, 1), (-1, 1)), "triangle": ((0, -1.2), (1.2, 1), (-1.2, 1)),
               "diamond": ((0, -1.4), (1.2, 0), (0, 1.4), (-1.2, 0))}[shape]  # fmt: skip
    return f'<polygon points="{" ".join(f"{x + a * size:.1f},{y + b * size:.1f}" for a, b in corners)}" {look}/>'


def look(i):
    """(colour, dashes, marker) of the i-th run: told apart without colours too."""
    return f"var(--s{i % COLOURS})", DASHES[i % len(DASHES)], MARKS[i % len(MARKS)]


def line_chart(title, x_axis, y_axis, curves, kind="", top=None):
    """A figure of curves: (name, number of the run, [(x, y)], [(x, y) of single scores]). `top`: upper end of the y axis."""
    rows = [(name, i, thinned(points), scores) for name, i, points, scores in curves]
    every = [p for _, _, points, scores in rows for p in (*points, *scores)]
    high_x, low, high = max(x for x, _ in every), min(y for _, y in every), max(y for _, y in every)
    high = min(high, top) if top else high
    margin = 0.05 * (high - low) or abs(high) * 0.05 or 1.0
    low, high = max(low - margin, 0.0) if low >= 0 else low - margin, high + margin
    at_x = lambda x: LEFT + (WIDTH - LEFT - RIGHT) * x / (high_x or 1)
    at_y = lambda y: TOP + (HEIGHT - TOP - BOTTOM) * (high - y) / (high - low)
    inside = f"inside{zlib.crc32(f'{title} {kind}'.encode())}"
    parts = [frame(ticks(0, high_x), ticks(low, high), at_x, at_y, x_axis, y_axis)]
    data = []
    for name, i, points, scores in rows:
        colour, dashes, shape = look(i)
        if points:
            path = " ".join(f"{at_x(x):.1f},{at_y(y):.1f}" for x, y in points)
            parts.append(
                f'<polyline class="curve" clip-path="url(#{inside})" points="{path}" stroke="{colour}" stroke-dasharray="{dashes}"/>'
            )
        parts += [mark(shape, at_x(x), at_y(y), f'class="score" fill="{colour}"') for x, y in scores if y <= high]
        shown = sorted({*points, *scores})
        data.append({"name": name, "x": [x for x, _ in shown], "y": [y for _, y in shown], "px": [round(at_x(x), 1) for x, _ in shown],
                     "py": [round(max(TOP, at_y(y)), 1) for _, y in shown]})  # fmt: skip
        parts.append(f'<circle class="dot" r="5" fill="{colour}"/>')
    parts.append(f'<line class="cross" x1="0" x2="0" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
    clip = f'<clipPath id="{inside}"><rect x="{LEFT}" y="{TOP - 2}" width="{WIDTH - LEFT - RIGHT}" height="{HEIGHT - TOP - BOTTOM + 4}"/></clipPath>'
    words = f"{esc(title)}: {esc(y_axis)} against {esc(x_axis)}; arrow keys show values"
    picture = (f'<svg class="wide" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" tabindex="0" aria-label="{words}">'
               f'{clip}{"".join(parts)}</svg>')  # fmt: skip
    values = embedded({"axis": x_axis, "series": data})
    return (f'<figure class="chart {kind}"><figcaption>{esc(title)}; {esc(y_axis)}</figcaption>{legend(rows)}<div class="scroll">{picture}</div>'
            f'<output aria-live="polite"></output><script type="application/json">{values}</script></figure>')  # fmt: skip


def frame(xs, ys, at_x, at_y, x_axis, y_axis):
    """Grid, axes and their numbers."""
    bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    lines = [f'<line class="grid" x1="{LEFT}" x2="{right}" y1="{at_y(y):.1f}" y2="{at_y(y):.1f}"/>'
             f'<text x="{LEFT - 8}" y="{at_y(y) + 4:.1f}" text-anchor="end">{tick_text(y)}</text>' for y in ys]  # fmt: skip
    lines += [f'<line class="grid" x1="{at_x(x):.1f}" x2="{at_x(x):.1f}" y1="{TOP}" y2="{bottom}"/>'
              f'<text x="{at_x(x):.1f}" y="{bottom + 20}" text-anchor="middle">{tick_text(x)}</text>' for x in xs]  # fmt: skip
    lines.append(f'<path class="axis" fill="none" d="M{LEFT},{TOP}V{bottom}H{right}"/>')
    lines.append(f'<text x="{(LEFT + right) / 2}" y="{HEIGHT - 6}" text-anchor="middle">{esc(x_axis)}</text>')
    middle = (TOP + bottom) / 2
    lines.append(
        f'<text class="vertical" transform="translate(14 {middle}) rotate(-90)" text-anchor="middle">{esc(y_axis)}</text>'
    )
    return "".join(lines)


def legend(rows):
    """The runs' names with their lines; none for a single one."""
    if len(rows) < 2:
        return ""
    items = []
    for name, i, *_ in rows:
        colour, dashes, shape = look(i)
        line = f'<line x1="0" x2="48" y1="7" y2="7" stroke="{colour}" stroke-width="2.5" stroke-dasharray="{dashes}"/>'
        items.append(
            f'<li><svg viewBox="0 0 48 14" aria-hidden="true">{line}{mark(shape, 24, 7, f"""fill="{colour}" """)}</svg> {esc(name)}</li>'
        )
    return f'<ul class="legend">{"".join(items)}</ul>'


def stacked_bars(title, rows, unit):
    """A figure of bars: (name, {part: size}); each part has its fill, and a pattern where fills are alike in grey."""
    height, gap, left = 44, 30, 2
    most = max(sum(sizes.values()) for _, sizes in rows) or 1
    across = WIDTH - 2 * left - 110
    parts, names = [], list(rows[0][1])
    for n, (name, sizes) in enumerate(rows):
        y, x = n * (height + gap) + 25, float(left)
        parts.append(f'<text x="{left}" y="{y - 6}">{esc(name)}</text>')
        for i, (part, size) in enumerate(sizes.items()):
            w = across * size / most
            label = f"{part}: {size:,} {unit}"
            parts.append(
                f'<g><title>{esc(label)}</title><rect x="{x:.1f}" y="{y}" width="{w:.1f}" height="{height}" fill="var(--f{i % 5})"/>'
            )
            if i % 5 in (2, 3):
                parts.append(f'<rect x="{x:.1f}" y="{y}" width="{w:.1f}" height="{height}" fill="url(#hatch{i % 5})"/>')
            parts.append(
                f'<rect x="{x:.1f}" y="{y}" width="{w:.1f}" height="{height}" fill="none" stroke="var(--ink)" stroke-width="0.7"/></g>'
            )
            x += w
        parts.append(f'<text x="{x + 6:.1f}" y="{y + height / 2 + 5}">{sum(sizes.values()):,}</text>')
    hatches = ('<pattern id="hatch2" width="7" height="7" patternUnits="userSpaceOnUse" patternTransform="rotate(45)">'
               '<line x1="0" x2="0" y1="0" y2="7" stroke="#000" stroke-width="1.6"/></pattern>'
               '<pattern id="hatch3" width="7" height="7" patternUnits="userSpaceOnUse"><circle cx="3.5" cy="3.5" r="1.2" fill="#000"/></pattern>')  # fmt: skip
    keys = "".join(f'<li><svg viewBox="0 0 48 14" aria-hidden="true"><rect width="48" height="14" fill="var(--f{i % 5})" stroke="var(--ink)"/>'
                   + (f'<rect width="48" height="14" fill="url(#hatch{i % 5})"/>' if i % 5 in (2, 3) else "") + f"</svg> {esc(name)}</li>"
                   for i, name in enumerate(names))  # fmt: skip
    total = len(rows) * (height + gap) + 6
    return (f'<figure><figcaption>{esc(title)}</figcaption><ul class="legend">{keys}</ul><div class="scroll"><svg class="wide part" viewBox="0 0 {WIDTH} {total}" '
            f'role="img" aria-label="{esc(title)}; the table below has the numbers"><defs>{hatches}</defs>{"".join(parts)}</svg></div></figure>')  # fmt: skip


def histogram(counts, what):
    """A small picture of a distribution; `what` says it in words."""
    most, w = max(counts) or 1, 144 / len(counts)
    bars = "".join(
        f'<rect x="{i * w:.1f}" y="{28 - 27 * n / most:.1f}" width="{w - 1:.1f}" height="{27 * n / most + 1:.1f}"/>'
        for i, n in enumerate(counts)
        if n
    )
    return f'<svg class="bars" viewBox="0 0 144 29" role="img" aria-label="{esc(what)}"><title>{esc(what)}</title>{bars}</svg>'


# -------------------------------------------------------------------------------------------------- the file


def page(title, sections):
    """The whole file. sections: {id: (title, HTML of the section)}."""
    here = Path(__file__).resolve().parent
    style, script = ((here / f"report.{kind}").read_text(encoding="utf-8") for kind in ("css", "js"))
    links = "".join(f'<li><a href="#{name}">{esc(text)}</a></li>' for name, (text, _) in sections.items())
    return (f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
            f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>{esc(title)}</title>\n<link rel="icon" href="data:,">\n'
            f'<style>\n{style}</style>\n</head>\n<body>\n<a class="skip" href="#content">to the content</a>\n<header><h1>{esc(title)}</h1></header>\n'
            f'<nav aria-label="sections"><ul>{links}</ul></nav>\n<main id="content">\n'
            + "\n".join(content for _, content in sections.values()) + f"\n</main>\n<script>\n{script}</script>\n</body>\n</html>\n")  # fmt: skip


if __name__ == "__main__":
    command_line.not_a_command("tools/report.py")
