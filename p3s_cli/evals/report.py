"""scores.jsonl -> a terminal table, and one HTML page that needs nothing beside it. Reads files only."""

from __future__ import annotations

import base64
import io
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path

from PIL import Image

from p3s_cli.evals.protocols import Protocol
from p3s_cli.evals.scores import Mean, Row

_THUMB = 128  # pixels
_SHOWN = 4  # images of a method for each subject and prompt
_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 76rem; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; margin: 1rem 0 }
th, td { padding: .3rem .7rem; text-align: right; border-bottom: 1px solid #ddd; vertical-align: top }
th:first-child, td:first-child { text-align: left }
small { color: #777 } img { width: 128px; height: 128px; object-fit: cover; margin: 1px }
"""


def columns(means: Mapping[str, Mapping[str, Mean]], protocol: Protocol) -> list[str]:
    """The protocol's columns that hold a number, in its order, a variance behind its metric."""
    order = []
    for metric in protocol.metrics:
        order += [metric.name, *(c for c, of in protocol.variances.items() if of == metric.name)]
    return [c for c in order if any(c in row for row in means.values())]


def lines(means: Mapping[str, Mapping[str, Mean]], protocol: Protocol) -> list[str]:
    """A Markdown table; the protocol's name stands above its columns."""
    names = columns(means, protocol)
    table = [f"protocol {protocol.name}", "", "| method | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for method, row in means.items():
        table.append(f"| {method} | " + " | ".join(str(row.get(c, "")) for c in names) + " |")
    return table


def html(rows: Sequence[Row], means: Mapping[str, Mapping[str, Mean]], protocol: Protocol, title: str) -> str:
    """The page: the table, how each column was made, and the pictures by subject and prompt."""
    rows = [row for row in rows if row.protocol == protocol.name]
    return "\n".join(
        [
            f"<!doctype html><meta charset=utf-8><title>{escape(title)}</title><style>{_STYLE}</style>",
            f"<h1>{escape(title)}</h1>",
            *_table(means, protocol),
            *_provenance(rows),
            *_pictures(rows),
        ]
    )


def _table(means: Mapping[str, Mapping[str, Mean]], protocol: Protocol) -> list[str]:
    names = columns(means, protocol)
    head = "".join(f"<th>{escape(c)}<br><small>{escape(protocol.name)}</small></th>" for c in names)
    body = [
        f"<tr><td>{escape(method)}</td>" + "".join(f"<td>{_cell(row.get(c))}</td>" for c in names) + "</tr>"
        for method, row in means.items()
    ]
    note = "<p><small>Means over subjects; in brackets the bootstrap 95 % interval over subjects.</small></p>"
    return [f"<table><tr><th>method</th>{head}</tr>", *body, "</table>", note]


def _cell(mean: Mean | None) -> str:
    if mean is None:
        return ""
    interval = "" if mean.low is None else f"<br><small>{mean.low:.3f} to {mean.high:.3f}</small>"
    return f"{mean.value:.3f}{interval}"


def _provenance(rows: Iterable[Row]) -> list[str]:
    made = sorted({(r.metric, r.model, r.fingerprint, r.preprocessing) for r in rows})
    body = ["<tr>" + "".join(f"<td>{escape(part)}</td>" for part in one) + "</tr>" for one in made]
    head = "<tr><th>metric</th><th>model</th><th>fingerprint</th><th>preprocessing</th></tr>"
    return ["<h2>How each number was made</h2><table>", head, *body, "</table>"]


def _pictures(rows: Iterable[Row]) -> list[str]:
    files: dict[str, dict[str, dict[str, list[str]]]] = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    for row in rows:
        shown = files[row.subject][row.prompt][row.method]
        if row.file not in shown and len(shown) < _SHOWN:
            shown.append(row.file)
    page = []
    for subject, prompts in files.items():
        page.append(f"<h2>{escape(subject)}</h2>")
        for prompt, methods in prompts.items():
            page.append(f"<h3>{escape(prompt)}</h3><table>")
            for method, shown in methods.items():
                page.append(f"<tr><td>{escape(method)}</td><td>{''.join(map(_thumbnail, shown))}</td></tr>")
            page.append("</table>")
    return page


def _thumbnail(file: str) -> str:
    if not Path(file).is_file():
        return f"<small>{escape(Path(file).name)} is gone</small>"
    with Image.open(file) as picture:
        small = picture.convert("RGB")
    small.thumbnail((_THUMB, _THUMB))
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=85)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img src="data:image/jpeg;base64,{data}" alt="{escape(Path(file).name, quote=True)}">'
