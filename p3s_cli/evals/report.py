"""Rows and their means -> a terminal table, and one HTML page with the pictures in it. Opens pictures only."""

from __future__ import annotations

import base64
import io
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

from PIL import Image, ImageOps

from p3s_cli.evals.protocols import Protocol
from p3s_cli.evals.scores import Mean, Row

_THUMB = 128  # pixels
_SHOWN = 4  # images of a method for each subject and prompt
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 92rem; padding: 0 1rem; color: #222 }
h1 { font-size: 1.5rem } h2, summary { font-size: 1.15rem; font-weight: 600; margin: 1.6rem 0 .4rem }
h3 { font-size: 1rem; font-weight: 400; margin: 1.2rem 0 .3rem } summary { cursor: pointer }
.wide { overflow-x: auto } table { border-collapse: collapse }
th, td { padding: .3rem .5rem; text-align: right; border-bottom: 1px solid #ddd; vertical-align: top; white-space: nowrap }
td { font-variant-numeric: tabular-nums } .words td, .words th { text-align: left }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: #fff }
tbody tr:hover { background: #f6f6f6 } small { color: #666; font-size: .75rem } p { margin: .3rem 0; color: #444; font-size: .9rem }
figure { display: inline-block; margin: 0 1rem .5rem 0 } figcaption { color: #666; font-size: .85rem }
.shown { width: 128px; height: 128px; object-fit: cover; margin: 1px; vertical-align: top }
.plot { width: 100%; max-width: 640px } .reference { height: 192px }
"""

Seconds = tuple[float | None, float | None]  # of tuning a subject, of one image; None where it was not seen
_TIMES = ("tuning, s", "image, s")


def columns(means: Mapping[str, Mapping[str, Mean]], protocol: Protocol) -> list[str]:
    """The protocol's columns that hold a number, in its order, a variance behind its metric."""
    order = []
    for metric in protocol.metrics:
        order += [metric.name, *(c for c, of in protocol.variances.items() if of == metric.name)]
    return [c for c in order if any(c in row for row in means.values())]


def lines(
    means: Mapping[str, Mapping[str, Mean]],
    protocol: Protocol,
    seconds: Mapping[str, Seconds] | None = None,
    head: str = "method",
) -> list[str]:
    """A Markdown table; the protocol's name stands above its columns, which end with the times. `head`: of the first."""
    names, times = columns(means, protocol), seconds or {}
    heads = [head, *names, *(_TIMES if times else ())]
    table = [f"protocol {protocol.name}", "", "| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for method, row in means.items():
        cells = [str(row.get(c, "")) for c in names] + _times(times, method)
        table.append(f"| {method} | " + " | ".join(cells) + " |")
    return table


def _times(seconds: Mapping[str, Seconds], method: str) -> list[str]:
    """The cells of a method's times; none where the table has none."""
    return ["" if s is None else f"{s:.1f}" for s in seconds.get(method, (None, None))] if seconds else []


@dataclass(frozen=True)
class Extras:
    """What stands on the page beside the scores.

    `notes`: sentences under the table. `plot`: a picture below them. `references`: subject -> picture of what
    was asked for. `less`: a method, and by how much it scores above each other one.
    """

    seconds: Mapping[str, Seconds] = field(default_factory=dict)
    notes: Sequence[str] = ()
    plot: Path | None = None
    references: Mapping[str, Path] = field(default_factory=dict)
    less: tuple[str, Mapping[str, Mapping[str, Mean]]] | None = None


def html(
    rows: Sequence[Row],
    means: Mapping[str, Mapping[str, Mean]],
    protocol: Protocol,
    title: str,
    extras: Extras | None = None,
) -> str:
    """The page: the table, how each column was made, and the pictures by subject and prompt."""
    rows, extras = [row for row in rows if row.protocol == protocol.name], extras or Extras()
    return "\n".join(
        [
            '<!doctype html><html lang="en"><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width">',
            f"<title>{escape(title)}</title><style>{_STYLE}</style>",
            f"<h1>{escape(title)}</h1>",
            *_table(means, protocol, extras.seconds, "method"),
            *(f"<p>{escape(note)}</p>" for note in extras.notes),
            *(_table(extras.less[1], protocol, {}, f"{extras.less[0]} less") if extras.less else []),
            *([_picture(extras.plot, 960, "plot")] if extras.plot else []),
            *_pictures(rows, extras.references),
            *_provenance(rows),
            "</html>",
        ]
    )


def _table(
    means: Mapping[str, Mapping[str, Mean]], protocol: Protocol, seconds: Mapping[str, Seconds], first: str
) -> list[str]:
    names = columns(means, protocol)
    head = "".join(f"<th>{escape(c)}<br><small>{escape(protocol.name)}</small></th>" for c in names)
    head += "".join(f"<th>{c}</th>" for c in _TIMES if seconds)
    body = []
    for method, row in means.items():
        cells = [_cell(row.get(c)) for c in names] + _times(seconds, method)
        body.append(f"<tr><td>{escape(method)}</td>" + "".join(f"<td>{c}</td>" for c in cells) + "</tr>")
    note = "<p>means over subjects; below them the bootstrap 95 % interval over subjects</p>"
    return [
        f'<div class="wide"><table><thead><tr><th>{escape(first)}</th>{head}</tr></thead><tbody>',
        *body,
        f"</tbody></table></div>{note}",
    ]


def _cell(mean: Mean | None) -> str:
    if mean is None:
        return ""
    interval = "" if mean.low is None else f"<br><small>{mean.low:.3f} – {mean.high:.3f}</small>"
    return f"{mean.value:.3f}{interval}"


def _provenance(rows: Iterable[Row]) -> list[str]:
    made = sorted({(r.metric, r.model, r.fingerprint, r.preprocessing) for r in rows})
    body = ["<tr>" + "".join(f"<td>{escape(part)}</td>" for part in one) + "</tr>" for one in made]
    head = "<tr><th>metric</th><th>model</th><th>fingerprint</th><th>preprocessing</th></tr>"
    return ['<h2>How each number was made</h2><div class="wide"><table class="words">', head, *body, "</table></div>"]


def _pictures(rows: Iterable[Row], references: Mapping[str, Path]) -> list[str]:
    """A section a subject, of which the first is unfolded."""
    files: dict[str, dict[str, dict[str, list[str]]]] = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    for row in rows:
        shown = files[row.subject][row.prompt][row.method]
        if row.file not in shown and len(shown) < _SHOWN:
            shown.append(row.file)
    page = []
    for number, (subject, prompts) in enumerate(files.items()):
        page.append(f"<details{'' if number else ' open'}><summary>{escape(subject)}</summary>")
        if subject in references:
            picture = _picture(references[subject], 384, "reference")
            page.append(f"<figure>{picture}<figcaption>what was asked for</figcaption></figure>")
        for prompt, methods in prompts.items():
            page.append(f'<h3>{escape(prompt)}</h3><div class="wide"><table>')
            for method, shown in methods.items():
                pictures = "".join(_picture(Path(file), _THUMB, "shown") for file in shown)
                page.append(f"<tr><td>{escape(method)}</td><td>{pictures}</td></tr>")
            page.append("</table></div>")
        page.append("</details>")
    return page


def _picture(file: Path, limit: int, kind: str) -> str:
    """The picture itself, inside the page, at most `limit` pixels wide and high."""
    if not file.is_file():
        return f"<small>{escape(file.name)} is gone</small>"
    with Image.open(file) as picture:
        small = ImageOps.exif_transpose(picture).convert("RGB")
    small.thumbnail((limit, limit))
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=85)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img class="{kind}" src="data:image/jpeg;base64,{data}" alt="{escape(file.name, quote=True)}">'
