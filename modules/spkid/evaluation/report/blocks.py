"""What the sections of a report consist of: tables and figures."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from typing import Any, NamedTuple

from markupsafe import Markup
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from spkid.evaluation.scores import PARTS

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


class Table(NamedTuple):
    """A table whose first column names the rows."""

    caption: str
    head: list[str]
    rows: list[list]
    kind: str = ""  # "text": left-aligned; "pairs": the first two columns are


class Drawing(NamedTuple):
    """A figure, what a screen reader says of it, and what is below it."""

    svg: Markup  # without its first characters, "<svg"
    alt: str
    caption: str


def figure(
    draw: Callable[[Figure], None],
    alt: str,
    caption: str = "",
    height: float = 2.7,
) -> Drawing:
    """Draws an SVG; the same arguments give the same bytes.

    Arguments
    ---------
    draw : callable
        Draws on a matplotlib.figure.Figure, without pyplot, so that a caller's
        own figures are left alone.
    alt : str
        Text for a screen reader; no two figures of a page share it.
    caption : str
        Text below the figure.
    height : float
        In inches; the width is 4.6.
    """
    # The salt makes the ids of one figure differ from another's.
    with style.context(STYLE | {"svg.hashsalt": alt}, after_reset=True):
        canvas = Figure(figsize=(4.6, height), layout="constrained")
        draw(canvas)
        named = canvas.axes[0].get_legend_handles_labels()
        canvas.legend(*named, loc="outside upper left", ncols=3)
        file = io.StringIO()
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        canvas.savefig(file, format="svg", dpi=200, metadata=nothing)
    svg = file.getvalue().replace(INK, "currentColor")
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)  # all figures share these ids
    return Drawing(Markup(svg.partition("<svg")[2]), alt, caption)


def curve(part: str, n_points: int) -> dict[str, Any]:
    """How Matplotlib draws a part's curve; a short one has markers."""
    name, colour, marker = PARTS[part]
    marker = marker if n_points < 30 else ""
    return {"color": colour, "label": name, "marker": marker}


def percent(value: float) -> str:
    """A share, 0 … 1, in per cent.

    Example
    -------
    >>> percent(0.5).replace("\N{NO-BREAK SPACE}", " ")
    '50.0 %'
    """
    return f"{100 * value:.1f}\N{NO-BREAK SPACE}%"


def percent_ticks(axes: Axes, names: str = "y") -> None:
    """Labels the axes of these names, which show shares, in per cent."""
    for name in names:
        axis = getattr(axes, f"{name}axis")
        axis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
