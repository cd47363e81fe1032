"""What was tested again, as sections: accuracy per class, confusions, episodes as pictures, features in
two dimensions.
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from bomemeta.page import charts, html
from bomemeta.page.examination import Examination, Tested
from bomemeta.page.html import LIGHT, Html
from bomemeta.problems.few_shot_report import Pictures

LISTED = 10  # classes at each end of a long list
IN_MATRIX = 12
CONFUSIONS = 12
WAYS, SUPPORT, QUERIES = 5, 3, 8  # of an episode's pictures
PIXELS = 96  # the longer side of a picture in the page
SHORT = 5  # characters of a class's name that can head a column


def by_class(found: Examination) -> Html:
    """Accuracy of every class, and which is taken for which."""
    counts = found.confusion()
    if counts is None:
        message = (
            "The data set does not say which classes its episodes have (a method `class_names`), and a label "
            "means another class in each episode: there is nothing to count."
        )
        return html.section("Accuracy per class", html.paragraph(message))
    rows = _accuracies(counts)
    header = ("class", "samples", "accuracy", "")
    if len(rows) <= 2 * LISTED:
        lists = html.table(header, rows, "bars")
    else:
        caption = f"{len(rows)} classes came up. The {LISTED} with the lowest accuracy, then the {LISTED} with the highest."
        lists = html.joined(
            [
                html.paragraph(caption, "dim"),
                html.table(header, rows[:LISTED], "bars"),
                Html("<h3>Highest</h3>"),
                html.table(header, rows[-LISTED:], "bars"),
            ]
        )  # fmt: skip
    of = f"{found.episodes} test episodes" if found.episodes else "the test part"
    return html.section(
        "Accuracy per class",
        html.paragraph(f"Of {sum(counts.values())} samples of {of}.", "dim"),
        lists,
    ) + html.section("Confusions", _matrix(counts), _most_frequent(counts))  # type: ignore[return-value]


def episodes(found: Examination) -> Html:
    """The worst and the best test episodes as pictures."""
    if not found.pictures:
        why = "The episodes are not of pictures."
        if not found.episodes:
            why = "There are no episodes: one y is tested on the whole test part."
        return html.section("Worst and best test episodes", html.paragraph(why))
    caption = (
        f"Of {found.episodes} episodes. First the support images of a class, then its queries, wrong ones first and with a dashed "
        f"frame. At most {WAYS} classes, {SUPPORT} support images and {QUERIES} queries of each are shown."
    )
    boxes = [
        _episode(kind, one, found.pictures[one.task])
        for kind, chosen in (("Worst", found.worst), ("Best", found.best))
        for one in chosen
        if one.task in found.pictures
    ]
    grid = Html(f"<div class=episodes>{html.joined(boxes)}</div>")
    return html.section("Worst and best test episodes", html.paragraph(caption, "dim"), grid)


def embedding(found: Examination) -> Html:
    """The features of one test episode's classes, in two dimensions."""
    title = "Test classes in two dimensions"
    if found.embedding is None:
        message = "Features are shown of few-shot image classification alone."
        return html.section(title, html.paragraph(message))
    features, labels, names = found.embedding
    few = min(len(names), len(LIGHT))
    chosen = [row for row, label in enumerate(labels) if label < few]
    points, share = components(features[chosen])
    drawing = charts.scatter(
        "Features of test episode 0", points.numpy(), [labels[row] for row in chosen], names[:few]
    )
    caption = (
        f"Principal components (PCA, torch.linalg.svd) of what the head sees of {len(chosen)} images of "
        f"{few} test classes, support and queries, {features.shape[1]} numbers each. The two components "
        f"hold {100 * share:.0f} % of the variance."
    )
    return html.section(title, html.figure(drawing, caption, True))


def components(features: Tensor) -> tuple[Tensor, float]:
    """The first two principal components `[n, 2]` and their share of the variance."""
    centred = features.double() - features.double().mean(0)
    _, values, directions = torch.linalg.svd(centred, full_matrices=False)
    first = directions[:2]
    # A direction's sign is arbitrary: its largest entry is made positive.
    largest = first.gather(1, first.abs().argmax(1, keepdim=True))
    points = centred @ (first * largest.sign()).mT
    if points.shape[1] < 2:  # one feature, or one image
        points = torch.cat([points, points.new_zeros(len(points), 2 - points.shape[1])], 1)
    whole = float(values.square().sum())
    return points, float(values[:2].square().sum()) / whole if whole > 0 else 1.0


def _accuracies(counts: Counter[tuple[str, str]]) -> list[Sequence[str | Html]]:
    """Rows of the table, the lowest accuracy first."""
    samples: Counter[str] = Counter()
    for (true, _), number in counts.items():
        samples[true] += number
    shares = {name: counts[name, name] / number for name, number in samples.items()}
    order = sorted(shares, key=lambda name: (shares[name], -samples[name], name))
    return [
        (html.long(name), str(samples[name]), f"{100 * shares[name]:.1f} %", html.bar(shares[name]))
        for name in order
    ]


def _matrix(counts: Counter[tuple[str, str]]) -> Html:
    classes = _sorted({name for pair in counts for name in pair})
    caption = (
        "A row is the true class, a column what it was taken for; shades are shares of the row."
    )
    chosen = classes
    if len(classes) > IN_MATRIX:
        pairs = [name for pair, _ in _wrong(counts).most_common() for name in pair]
        chosen = list(dict.fromkeys(pairs))[:IN_MATRIX]
        caption += f" {len(chosen)} of {len(classes)} classes, those of the most frequent errors."
        if not chosen:
            return html.paragraph("No sample was taken for another class.")
    numbered = any(len(name) > SHORT for name in chosen)  # else the table would be too wide
    rows = []
    for row_number, true in enumerate(chosen, 1):
        row = [counts[true, predicted] for predicted in chosen]
        whole = max(sum(number for (name, _), number in counts.items() if name == true), 1)
        cells = [html.heat(number / whole, str(number) if number else "") for number in row]
        rows.append([html.long(f"{row_number}  {true}" if numbered else true), *cells])
    columns = [str(row_number) for row_number in range(1, len(chosen) + 1)] if numbered else chosen
    table = html.table(["true \\ predicted", *columns], rows, "heat")
    return html.joined([html.paragraph(caption, "dim"), table])


def _wrong(counts: Counter[tuple[str, str]]) -> Counter[tuple[str, str]]:
    return Counter({pair: number for pair, number in counts.items() if pair[0] != pair[1]})


def _most_frequent(counts: Counter[tuple[str, str]]) -> Html:
    wrong = _wrong(counts)
    if not wrong:
        return Html("")
    rows = [
        (html.long(true), html.long(predicted), str(number))
        for (true, predicted), number in wrong.most_common(CONFUSIONS)
    ]
    return html.joined(
        [
            Html("<h3>Most frequent errors</h3>"),
            html.table(("true class", "taken for", "samples"), rows, "pairs"),
        ]
    )


def _episode(kind: str, one: Tested, images: Pictures) -> Html:
    ways = sorted({*one.true})
    names = one.names or [f"class {way}" for way in range(max(ways) + 1)]
    per_way = len(images.support) // len(ways)
    errors = {way: sum(t == way and p != t for t, p in zip(one.true, one.predicted, strict=True)) for way in ways}  # fmt: skip
    parts = [Html(f"<h3>{kind}: episode {one.task}, accuracy {100 * one.accuracy:.1f} %</h3>")]
    for way in sorted(ways, key=lambda way: (-errors[way], way))[:WAYS]:
        support = range(way * per_way, (way + 1) * per_way)
        queries = [row for row, true in enumerate(one.true) if true == way]
        queries.sort(key=lambda row: one.predicted[row] == way)
        right = len(queries) - errors[way]
        shown = [
            Html(f"<small>{html.text(names[way])}: {right} of {len(queries)} right</small>"),
            *(_picture(images.support[row], f"support of {names[way]}") for row in support[:SUPPORT]),
            Html("<span class=then>→</span>"),
            *(
                _picture(
                    images.query[row],
                    f"query of {names[way]}, taken for {names[one.predicted[row]]}",
                    "right" if one.predicted[row] == way else "wrong",
                )
                for row in queries[:QUERIES]
            ),
        ]  # fmt: skip
        parts.append(Html(f"<div class=way>{html.joined(shown)}</div>"))
    return Html(f"<div class=episode>{html.joined(parts)}</div>")


def _picture(image: Tensor, title: str, kind: str = "") -> Html:
    """An image `[C, H, W]` in [0, 1]."""
    from PIL import Image

    pixels = (255 * image).round().to(torch.uint8).movedim(0, -1).cpu().numpy()
    made = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
    small = max(made.size) <= PIXELS
    if not small:
        made.thumbnail((PIXELS, PIXELS))
    out = io.BytesIO()
    made.save(out, "PNG", optimize=True)
    return html.image(out.getvalue(), title, f"{kind} pixels".strip() if small else kind)


def _sorted(names: set[str]) -> list[str]:
    """Numbers by their size, other names by the alphabet."""
    return sorted(names, key=lambda name: (0, int(name), name) if name.isdecimal() and len(name) < 9 else (1, 0, name))  # fmt: skip
