"""A page of HTML that needs nothing beside it: its style, its frame and its parts. Whatever is text is
escaped here; what is HTML already has the type `Html`.
"""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable, Sequence
from typing import NewType

Html = NewType("Html", str)

# Okabe and Ito's colours, which colour-blind readers tell apart; lighter ones on a dark page.
LIGHT = ("#0072b2", "#d55e00", "#00805e", "#a8477f", "#8f6400", "#2f7fb0", "#5b5b5b")
DARK = ("#56b4e9", "#f0904e", "#2fc79a", "#e39ac6", "#e6b93d", "#8fd0ff", "#b5b5b5")

_STYLE = """
:root {
  color-scheme: light dark;
  --page: #fbfbfa; --box: #ffffff; --ink: #1d2126; --dim: #5c6570; --edge: #dfe2e6; --heat: 0 114 178;
  %(light)s
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif;
}
@media (prefers-color-scheme: dark) { :root {
  --page: #14171a; --box: #1c2024; --ink: #e7eaed; --dim: #a0a9b3; --edge: #343a41; --heat: 86 180 233;
  %(dark)s
} }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 72rem; padding: 1.5rem 1rem 4rem; background: var(--page); color: var(--ink); }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .25rem; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2.5rem 0 .5rem; }
h3 { font-size: 1rem; margin: 1.25rem 0 .4rem; }
p, li { max-width: 46rem; overflow-wrap: anywhere; }
p { margin: .4rem 0; } ul { padding-left: 1.2rem; }
.dim, figcaption, small { color: var(--dim); }
figcaption, small { font-size: .85rem; }
code, pre { font: .85rem/1.5 ui-monospace, "SF Mono", Menlo, Consolas, monospace; }
code { overflow-wrap: anywhere; }
pre { background: var(--box); border: 1px solid var(--edge); border-radius: .5rem; padding: .8rem 1rem; overflow-x: auto; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(9rem, 1fr)); gap: .6rem; margin: 1rem 0; }
.tile { background: var(--box); border: 1px solid var(--edge); border-radius: .5rem; padding: .6rem .8rem; }
.tile b { display: block; font-size: 1.25rem; font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
.tile span { color: var(--dim); font-size: .85rem; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%%, 24rem), 1fr)); gap: .8rem; }
figure { margin: 0; background: var(--box); border: 1px solid var(--edge); border-radius: .5rem; padding: .7rem; min-width: 0; }
figure svg { display: block; width: 100%%; height: auto; color: var(--ink); }
figure svg text { font-family: system-ui, sans-serif !important; }
figure.alone { max-width: 40rem; }
.wide { overflow-x: auto; max-width: 100%%; margin-bottom: .6rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem; }
th, td { padding: .25rem .7rem; text-align: right; border-bottom: 1px solid var(--edge); vertical-align: top; white-space: nowrap; }
th { font-weight: 600; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
td.long { text-align: left; white-space: normal; overflow-wrap: anywhere; min-width: 9rem; }
table.heat td { background: rgb(var(--heat) / calc(var(--share, 0) * .75)); padding: .25rem .5rem; }
table.heat th, table.heat td:first-child { padding: .25rem .5rem; background: none; }
table.pairs th:nth-child(2) { text-align: left; }
table.bars { width: 100%%; max-width: 46rem; }
table.bars td:last-child { width: 40%%; min-width: 5rem; padding-right: 0; }
.bar { display: block; height: .8rem; margin-top: .3rem; border-radius: .2rem; background: var(--c0);
  width: calc(var(--share) * 100%%); min-width: 1px; }
.episodes { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%%, 24rem), 1fr)); gap: .8rem; }
.episode { background: var(--box); border: 1px solid var(--edge); border-radius: .5rem; padding: .7rem; min-width: 0; }
.episode h3 { margin-top: 0; }
.way { display: flex; flex-wrap: wrap; gap: .25rem; align-items: center; margin: .1rem 0 .7rem; }
.way small { flex-basis: 100%%; overflow-wrap: anywhere; }
.way img { width: 2.6rem; height: 2.6rem; object-fit: contain; border: 3px solid transparent; border-radius: .25rem; background: #808080; }
.way img.pixels { image-rendering: pixelated; }
.way img.right { border-color: var(--c2); } .way img.wrong { border-color: var(--c1); border-style: dashed; }
.way .then { color: var(--dim); padding: 0 .2rem; }
@media (max-width: 34rem) {
  th, td { padding: .25rem .35rem; } td.long { min-width: 7rem; } table.bars td:last-child { min-width: 3rem; }
  table.heat td, table.heat th { padding: .2rem .25rem; font-size: .8rem; }
}
details > summary { cursor: pointer; }
"""


def text(value: object) -> Html:
    """A value's text, escaped: what comes from a config, a log or a data set goes through here."""
    return Html(html.escape(str(value), quote=True))


def joined(parts: Iterable[str], between: str = "") -> Html:
    """Parts that are HTML already, one after the other."""
    return Html(between.join(parts))


def paragraph(message: str, kind: str = "") -> Html:
    """A paragraph of plain text."""
    return Html(f"<p{_class(kind)}>{text(message)}</p>")


def section(title: str, *parts: Html) -> Html:
    """A heading and what stands under it."""
    return Html(f"<section><h2>{text(title)}</h2>{joined(parts)}</section>\n")


def tiles(values: Sequence[tuple[str, str]]) -> Html:
    """Pairs of a name and its value, large."""
    each = (f"<div class=tile><b>{text(v)}</b><span>{text(n)}</span></div>" for n, v in values)
    return Html(f"<div class=tiles>{joined(each)}</div>")


def listing(items: Iterable[str]) -> Html:
    """A list of sentences."""
    return Html(f"<ul>{joined(f'<li>{text(item)}</li>' for item in items)}</ul>")


def table(header: Sequence[str], rows: Iterable[Sequence[str | Html]], kind: str = "") -> Html:
    """A table of texts; a cell of `bar` or `cell` is taken as it is."""
    head = joined(f"<th>{text(name)}</th>" for name in header)
    body = joined(f"<tr>{joined(_cell(one) for one in row)}</tr>\n" for row in rows)
    return Html(
        f"<div class=wide><table{_class(kind)}><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def heat(share: float, shown: str) -> Html:
    """A cell of a table of kind `heat`: the darker, the nearer `share` is to 1."""
    return Html(f'<td style="--share:{min(max(share, 0.0), 1.0):.3f}">{text(shown)}</td>')


def bar(share: float) -> Html:
    """A cell with a bar of this share of its width, for a table of kind `bars`."""
    return Html(f'<td><i class=bar style="--share:{min(max(share, 0.0), 1.0):.3f}"></i></td>')


def long(value: object) -> Html:
    """A cell whose text is long and may be broken anywhere."""
    return Html(f"<td class=long>{text(value)}</td>")


def figure(drawing: Html, caption: str = "", alone: bool = False) -> Html:
    """A drawing with the words under it."""
    below = f"<figcaption>{text(caption)}</figcaption>" if caption else ""
    return Html(f"<figure{_class('alone' if alone else '')}>{drawing}{below}</figure>\n")


def figures(drawings: Sequence[Html]) -> Html:
    """Figures side by side, as many as there is room for."""
    return Html(f"<div class=figures>{joined(drawings)}</div>")


def folded(summary: str, content: Html) -> Html:
    """Something that is shown when it is asked for."""
    return Html(f"<details><summary>{text(summary)}</summary>{content}</details>")


def image(png: bytes, title: str, kind: str = "") -> Html:
    """A PNG in the page itself."""
    data = base64.b64encode(png).decode()
    return Html(f'<img{_class(kind)} src="data:image/png;base64,{data}" alt="{text(title)}" title="{text(title)}">')  # fmt: skip


def document(title: str, *parts: Html) -> str:
    """The whole page. It may load nothing, and runs nothing."""
    colours = {
        name: " ".join(f"--c{number}: {colour};" for number, colour in enumerate(of))
        for name, of in (("light", LIGHT), ("dark", DARK))
    }
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{text(title)}</title>
<style>{_STYLE % colours}</style></head>
<body>
{joined(parts)}
</body></html>
"""


def _cell(content: str | Html) -> str:
    return content if content.startswith("<td") else f"<td>{text(content)}</td>"


def _class(kind: str) -> str:
    return f' class="{kind}"' if kind else ""
