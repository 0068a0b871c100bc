"""What the benchmark scripts share: rows as Markdown, and what they ran on."""

from __future__ import annotations

import platform
import time

import torch


def markdown(rows: list[dict]) -> str:
    """Rows as a Markdown table with the columns of the first one."""
    keys = list(rows[0])
    cells = [[f"{r[k]:.3f}" if isinstance(r.get(k), float) else str(r.get(k, "")) for k in keys] for r in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in [keys, ["---"] * len(keys), *cells])


def last_line(rows: list[dict]) -> str:
    """The newest row alone, for a run that is watched."""
    return markdown(rows).splitlines()[-1]


def machine() -> str:
    """Date and machine in one line."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{torch.get_num_threads()} CPU threads"
    return f"{time.strftime('%Y-%m-%d')}, {platform.machine()}, {device}, torch {torch.__version__}"
