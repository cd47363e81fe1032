"""Charts as SVG that stands in a page: in the page's own colours, light or dark, without a script."""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from bomemeta.page.html import LIGHT, Html, text

POINTS = 300  # of one curve: what a screen tells apart
LONGEST = 48  # characters of a name in a drawing
SMALL, WIDE = (4.2, 2.7), (5.6, 3.4)  # inches
_INK = (
    "#010203"  # stands for the page's ink, and the others for its colours, until the SVG is there
)
_INKED = (
    "text.color",
    "axes.labelcolor",
    "axes.edgecolor",
    "xtick.color",
    "ytick.color",
    "grid.color",
)
_COLOURS = tuple(f"#0{number}0f0{number}" for number in range(len(LIGHT)))


class Curve(NamedTuple):
    """Values over steps, in order; those that are not finite are left out."""

    steps: Sequence[int]
    values: Sequence[float]


def lines(
    title: str,
    curves: Mapping[str, Curve],
    *,
    half_widths: Curve | None = None,
    per_cent: bool = False,
) -> Html:
    """Curves over the steps of a run. A long curve is drawn as the mean and the range of neighbouring
    steps; numbers above 0 that differ a hundredfold get a logarithmic axis. `half_widths` belong to
    the first curve.
    """

    def draw(axes: Any) -> None:
        scale = 100.0 if per_cent else 1.0
        found = [value for curve in curves.values() for value in curve.values]
        for number, (name, curve) in enumerate(curves.items()):
            steps, low, mean, high = _thinned(curve)
            look = {"color": colour(number), "linestyle": _dash(number)}
            mark = "o" if len(steps) <= 12 else None
            axes.plot(steps, mean * scale, label=shown(name), marker=mark, markersize=3, **look)
            if len(steps) < len(curve.steps):
                axes.fill_between(steps, low * scale, high * scale, color=colour(number), alpha=0.18)  # fmt: skip
            if number == 0 and half_widths is not None and len(half_widths.steps) == len(steps):
                width = np.asarray(half_widths.values)
                axes.fill_between(steps, (mean - width) * scale, (mean + width) * scale, color=colour(0), alpha=0.18)  # fmt: skip
        if found and min(found) > 0 and max(found) > 100 * min(found) and not per_cent:
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(
                lambda value, position: f"{value:g}"
            )  # not as mathematics
            axes.yaxis.set_minor_formatter(lambda value, position: "")
        axes.set_xlabel("step")
        if per_cent:
            axes.set_ylabel("%")

    return drawn(title, draw)


def stacked(title: str, parts: Mapping[str, Curve], unit: str) -> Html:
    """Parts of a whole, one upon the other, over the same steps. What goes far beyond the usual is cut
    off at the top.
    """

    def draw(axes: Any) -> None:
        thinned = {name: _thinned(curve) for name, curve in parts.items()}
        steps = next(iter(thinned.values()))[0]
        colours = [colour(number) for number in range(len(parts))]
        means = [mean for _, _, mean, _ in thinned.values()]
        axes.stackplot(steps, *means, labels=list(map(shown, parts)), colors=colours, alpha=0.85)
        axes.set_xlabel("step")
        axes.set_ylabel(unit)
        whole = np.sum(means, 0)
        axes.set_ylim(0, min(1.05 * float(whole.max()), 3 * float(np.median(whole))) or 1.0)

    return drawn(title, draw)


def scatter(title: str, points: Any, groups: Sequence[int], names: Sequence[str]) -> Html:
    """Points [n, 2] in the colour of their group, and in its shape, for groups of one colour."""

    def draw(axes: Any) -> None:
        for number, name in enumerate(names):
            own = points[np.asarray(groups) == number]
            shape = "osD^vPX"[number % 7]
            axes.scatter(
                *own.T, s=14, marker=shape, color=colour(number), linewidths=0, label=shown(name)
            )
        axes.set_xlabel("first component")
        axes.set_ylabel("second component")

    return drawn(title, draw, WIDE)


def intervals(title: str, rows: Sequence[tuple[str, float, float]], better: str) -> Html:
    """A point with its interval for each row: name, value and half-width."""

    def draw(axes: Any) -> None:
        for height, (_, value, width) in enumerate(reversed(rows)):
            axes.errorbar(value, height, xerr=width, fmt="o", color=colour(0), capsize=3)
        axes.set_yticks(range(len(rows)), [shown(name) for name, _, _ in reversed(rows)])
        axes.set_ylim(-0.6, len(rows) - 0.4)
        axes.set_xlabel(better)

    return drawn(title, draw, (WIDE[0], 1.0 + 0.3 * len(rows)))


def drawn(title: str, draw: Callable[[Any], None], size: tuple[float, float] = SMALL) -> Html:
    """One chart: what `draw` puts on its axes."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    # Text stays text, and a $ in a name is a $.
    settings = {
        "svg.fonttype": "none", "svg.hashsalt": "bomemeta", "text.parse_math": False, "font.size": 8, "legend.fontsize": 7.5,
        "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 9, "axes.titleweight": "bold", "lines.linewidth": 1.4,
        **dict.fromkeys(_INKED, _INK),
    }  # fmt: skip
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # a character that matplotlib's font lacks; the page's has it
        chart = Figure(figsize=size, layout="constrained")
        FigureCanvasSVG(chart)
        axes = chart.add_subplot()
        axes.grid(alpha=0.18)
        draw(axes)
        axes.set_title(shown(title), loc="left")
        handles, labels = axes.get_legend_handles_labels()
        if len(labels) > 1:
            room = max(int(24 * size[0] / (max(map(len, labels)) + 8)), 1)  # names side by side
            chart.legend(
                handles,
                labels,
                loc="outside lower center",
                frameon=False,
                labelcolor=_INK,
                ncols=min(room, len(labels)),
            )
        out = io.StringIO()
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        chart.savefig(out, format="svg", transparent=True, metadata=nothing)
    return _inline(out.getvalue(), title)


def _inline(svg: str, title: str) -> Html:
    svg = svg[svg.index("<svg") :]
    svg = svg.replace(_INK, "currentColor")
    for number, stand_in in enumerate(_COLOURS):
        svg = svg.replace(stand_in, f"var(--c{number})")
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    head, rest = svg.split(">", 1)
    head = re.sub(r' (width|height|version|xmlns(:\w+)?)="[^"]*"', "", head)
    links = re.sub(r"xlink:href", "href", rest)
    return Html(f'{head} role="img" aria-label="{text(title)}">{links}')


def colour(number: int) -> str:
    """The page's colour of this number, for what `drawn` draws."""
    return _COLOURS[number % len(_COLOURS)]


def shown(name: str) -> str:
    """A name as a drawing has room for."""
    one = " ".join(name.split())
    # Matplotlib leaves a label that begins with an underscore out of the legend.
    one = one.lstrip("_") or "_"
    return one if len(one) <= LONGEST else f"{one[: LONGEST - 1]}…"


def _dash(number: int) -> str:
    return ("-", "--", ":")[number // len(_COLOURS) % 3]


def _thinned(curve: Curve) -> tuple[Any, Any, Any, Any]:
    """Steps, lowest, mean and highest value of at most POINTS runs of neighbouring steps."""
    steps, values = np.asarray(curve.steps, float), np.asarray(curve.values, float)
    size = math.ceil(len(steps) / POINTS) or 1
    starts = np.arange(0, len(steps), size)
    count = np.diff([*starts, len(steps)])
    return (
        np.add.reduceat(steps, starts) / count,
        np.minimum.reduceat(values, starts),
        np.add.reduceat(values, starts) / count,
        np.maximum.reduceat(values, starts),
    )
