"""Parts of a self-contained HTML page: its frame and style, tables, lists, and plots as SVG."""

import io
import re
from html import escape
from typing import NamedTuple

BLUE, ORANGE, GREY = "#3b7dd8", "#d9822b", "#8a8a8a"  # readable on white and on black

STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8882; }
body { font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; padding: 1rem; max-width: 60rem; }
h1 { font-size: 1.6rem; margin: 0; overflow-wrap: anywhere; } h2 { font-size: 1.2rem; margin: 2rem 0 .5rem; }
.wide { overflow-x: auto; margin: .5rem 0 1rem; } .plots { display: flex; flex-wrap: wrap; gap: 1rem; }
figure { margin: 0; flex: 1 1 17rem; max-width: 28rem; } figcaption { font-size: .9rem; opacity: .8; }
svg { width: 100%; height: auto; } svg text { fill: currentColor; font-family: inherit; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
caption { text-align: left; opacity: .8; white-space: nowrap; }
th, td { border-bottom: 1px solid var(--line); padding: .2rem .6rem; text-align: left; vertical-align: top; }
td { max-width: 24rem; min-width: 3rem; overflow-wrap: break-word; }
td img { width: 6rem; image-rendering: pixelated; } .words span { padding: .1rem .15rem; border-radius: .2rem; }
.map { display: inline-block; width: 17rem; margin: 0 1rem 1rem 0; } .map image { image-rendering: pixelated; }
td.number, th.number { text-align: right; white-space: nowrap; }
.findings li { margin: .3rem 0; } code { background: var(--soft); padding: .1rem .3rem; overflow-wrap: anywhere; }
@media print { body { max-width: none; font-size: 11pt; } h2 { break-after: avoid; } figure, tr { break-inside: avoid; }
  .wide { overflow: visible; } * { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
}
"""


def page(title: str, introduction: str, sections: list[tuple[str, str]]) -> str:
    """Return a whole page.

    introduction: plain text.  sections: (heading, HTML); those without HTML are left out.
    """
    body = "".join(f"<section><h2>{text(name)}</h2>{content}</section>" for name, content in sections if content)
    return (
        f'<!doctype html><html><head><meta charset="utf-8"><title>{text(title)}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{STYLE}</style></head><body><h1>{text(title)}</h1><p>{text(introduction)}</p>{body}</body></html>\n"
    )


def text(value) -> str:
    return escape(str(value))


def number(value) -> str:
    return "–" if value is None or value != value else f"{value:.4g}"


def bullets(sentences: list[str]) -> str:
    items = "".join(f"<li>{text(sentence)}</li>" for sentence in sentences if sentence)
    return f'<ul class="findings">{items}</ul>' if items else ""


class Picture(NamedTuple):
    """A picture as a cell of a table."""

    url: str  # a data URL


class Link(NamedTuple):
    """A link to a file beside the page, as a cell of a table."""

    label: str
    file: str


def shade(strength: float) -> str:
    """Return a transparent colour: orange up to 1, blue down to -1."""
    red, green, blue = (217, 130, 43) if strength > 0 else (59, 125, 216)
    return f"rgb({red} {green} {blue} / {0.7 * min(1, abs(strength)):.2f})"


def table(rows, header: list[str], caption: str = "") -> str:
    """Return an HTML table. Numbers are rounded and aligned to the right."""

    def cell(value) -> str:
        if isinstance(value, float):
            return f'<td class="number">{number(value)}</td>'
        if isinstance(value, Link):
            return f'<td><a href="{text(value.file)}">{text(value.label)}</a></td>'
        if isinstance(value, Picture):
            return f'<td><img src="{text(value.url)}" alt="" loading="lazy"></td>'
        return f'<td class="number">{value}</td>' if isinstance(value, int) else f"<td>{text(value)}</td>"

    head = "".join(f"<th>{text(name)}</th>" for name in header)
    body = "".join(f"<tr>{''.join(map(cell, row))}</tr>" for row in rows)
    title = f"<caption>{text(caption)}</caption>" if caption else ""
    return f'<div class="wide"><table>{title}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def plots(figures: list[tuple[str, str]]) -> str:
    shown = "".join(f"<figure>{svg}<figcaption>{text(caption)}</figcaption></figure>" for caption, svg in figures)
    return f'<div class="plots">{shown}</div>'


def draw(plot, xlabel: str, ylabel: str, **limits) -> str:
    """Return what `plot(axes)` draws as SVG whose text and axes take the colour of the page."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "report", "font.size": 11}):
        figure = Figure(figsize=(4.2, 3.2), layout="constrained")
        axes = figure.subplots()
        plot(axes)
        axes.set(xlabel=xlabel, ylabel=ylabel, **limits)
        axes.spines[["top", "right"]].set_visible(False)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False)
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = file.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    return svg.replace("#000000", "currentColor")
