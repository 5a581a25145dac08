"""A web page of tables and figures in one file: no network, no script."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from html import escape

from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure

INK = "#010203"  # in a figure: the page's text colour, light or dark
STYLE = {
    "svg.fonttype": "none",  # text stays text
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "grid.color": "#8886",
    "grid.linewidth": 0.5,
    "lines.linewidth": 1.4,
    "lines.markersize": 3.5,
    "legend.frameon": False,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.6,
    "xtick.color": INK,
    "ytick.color": INK,
}
CSS = """
:root { color-scheme: light dark; --ink: #1c2126; --soft: #5b6570;
  --line: #dfe3e8; --page: #fff; --card: #f6f8fa }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e7ea; --soft: #a0a9b3;
  --line: #363d45; --page: #15191d; --card: #1e2429 } }
body { margin: 0 auto; max-width: 66rem; padding: 1.5rem 1rem 4rem;
  font: 1rem/1.5 system-ui, sans-serif; color: var(--ink);
  background: var(--page); overflow-wrap: anywhere }
h1, h2 { line-height: 1.2; margin: 2.5rem 0 .5rem } h1 { margin-top: 0 }
p { max-width: 44rem; margin: .5rem 0 } li { margin: .2rem 0 }
.soft, figcaption, caption { color: var(--soft); font-size: .875rem }
.grid { display: grid; gap: 1rem 2rem; align-items: start;
  grid-template-columns: repeat(auto-fit, minmax(min(20rem, 100%), 1fr)) }
.grid > * { min-width: 0 }
.tiles { gap: 1rem;
  grid-template-columns: repeat(auto-fit, minmax(11rem, 1fr)) }
.tiles > div { background: var(--card); border-radius: .5rem; padding: 1rem;
  height: 100%; box-sizing: border-box; font-size: .875rem }
.tiles b { display: block; font-size: 2rem; line-height: 1.3 }
figure { margin: .75rem 0; max-width: 36rem }
svg { width: 100%; height: auto; color: var(--ink) }
svg text { font-family: system-ui, sans-serif !important }
.scroll { overflow-x: auto; margin: .75rem 0 }
table { border-collapse: collapse; font-size: .875rem; width: 100%;
  font-variant-numeric: tabular-nums }
caption { text-align: left; padding-bottom: .5rem }
th, td { padding: .25rem .75rem .25rem 0; text-align: right;
  border-bottom: 1px solid var(--line); overflow-wrap: normal }
th { font-weight: 600 } th:first-child, .text *, .pairs :nth-child(2) {
  text-align: left }
tbody th { font-weight: 400; overflow-wrap: anywhere }
section > .scroll { max-width: 44rem }
.key { list-style: none; padding: 0; font-size: .875rem; display: grid;
  grid-template-columns: repeat(auto-fill, minmax(8rem, 1fr)) }
.key b { color: #fff; border-radius: .25rem; padding: 0 .3rem }
pre { overflow-x: auto; font-size: .8125rem; background: var(--card);
  padding: 1rem; border-radius: .5rem } summary { cursor: pointer }
"""
# The policy forbids the browser to load or run anything.
PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none';
 style-src 'unsafe-inline'; img-src data:">
<title>{title}</title><style>{css}</style></head>
<body><main><h1>{title}</h1>
{body}
</main></body></html>
"""


def page(title: str, body: str) -> str:
    """The whole file, of a title (plain text) and a body (HTML)."""
    return PAGE.format(title=escape(title), css=CSS, body=body)


def columns(*parts: str) -> str:
    """HTML side by side where the screen is wide enough."""
    return f'<div class="grid">{"".join(parts)}</div>'


def table(
    caption: str, head: list[str], rows: list[list], kind: str = ""
) -> str:
    """A table whose first column names the rows; it scrolls where too wide.

    Arguments
    ---------
    caption, head, rows
        Plain text and numbers.
    kind : str
        "text" aligns all columns to the left, "pairs" the first two.

    Returns
    -------
    str
        HTML.
    """
    top = "".join(f'<th scope="col">{escape(str(cell))}</th>' for cell in head)
    body = "\n".join(
        f'<tr><th scope="row">{escape(str(first))}</th>'
        + "".join(f"<td>{escape(str(cell))}</td>" for cell in rest)
        + "</tr>"
        for first, *rest in rows
    )
    return (
        f'<div class="scroll" tabindex="0" role="region" '
        f'aria-label="{escape(caption)}"><table class="{kind}">'
        f"<caption>{escape(caption)}</caption>"
        f"<thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def figure(
    draw: Callable[[Figure], None],
    alt: str,
    caption: str = "",
    height: float = 2.7,
) -> str:
    """A drawing as SVG; the same arguments give the same bytes.

    Arguments
    ---------
    draw : callable
        Draws on a matplotlib.figure.Figure; without pyplot, and so without
        touching what its caller draws.
    alt : str
        What a screen reader says; no two figures of a page share it.
    caption : str
        Below the figure.
    height : float
        In inches, of a width of 4.6.

    Returns
    -------
    str
        HTML.
    """
    # The salt makes the ids of one figure differ from another's.
    with style.context(STYLE | {"svg.hashsalt": alt}, after_reset=True):
        canvas = Figure(figsize=(4.6, height), layout="constrained")
        draw(canvas)
        named = canvas.axes[0].get_legend_handles_labels()
        canvas.legend(*named, loc="outside upper left", ncols=3)
        file = io.StringIO()
        canvas.savefig(file, format="svg", dpi=200)
    svg = file.getvalue().replace(INK, "currentColor")
    svg = svg[svg.index("<svg") :]
    # The metadata hold the date.
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)  # every figure has these
    svg = re.sub(r' (width|height)="[\d.]+pt"', "", svg, count=2)
    label = f'<svg role="img" aria-label="{escape(alt)}"'
    svg = svg.replace("<svg", label, 1)
    return f"<figure>{svg}<figcaption>{escape(caption)}</figcaption></figure>"


def percent(value: float) -> str:
    """A share, 0 … 1, as people read it."""
    return f"{100 * value:.1f}\N{NO-BREAK SPACE}%"


def percent_ticks(axes: Axes, names: str = "y") -> None:
    """Shows the axes of these names, which hold shares, in per cent."""
    for name in names:
        axis = getattr(axes, f"{name}axis")
        axis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
