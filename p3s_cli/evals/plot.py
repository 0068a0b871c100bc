"""Fidelity against prompt alignment: one curve a method over its strength setting, calibration as lines."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

from p3s_cli.atomic import replacing
from p3s_cli.evals.protocols import Protocol
from p3s_cli.evals.scores import Mean

Means = Mapping[str, Mapping[str, Mean]]


def axes(protocol: Protocol) -> tuple[str, str]:
    """The columns to plot: prompt alignment (labels where a reader has them, else CLIP-T) and fidelity."""
    prompt = next((m for m in protocol.metrics if m.against == "labels"), None)
    prompt = prompt or next(m for m in protocol.metrics if m.against == "text")
    fidelity = next(m for m in protocol.metrics if m.against == "real" and not m.masked)
    return prompt.name, fidelity.name


def trade_off(
    path: Path,
    means: Means,
    protocol: Protocol,
    curves: Mapping[str, tuple[str, float]],
    calibration: tuple[str, ...] = (),
) -> None:
    """Write a PNG. `curves`: row of the table -> (method, strength); rows in `calibration` become lines."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    prompt, fidelity = axes(protocol)
    points: dict[str, list[tuple[float, float, float]]] = defaultdict(list)
    for row, (method, strength) in curves.items():
        if {prompt, fidelity} <= set(means.get(row, {})):
            points[method].append((strength, means[row][prompt].value, means[row][fidelity].value))
    figure = Figure(figsize=(8.8, 4.8), layout="constrained")
    plane = figure.subplots()
    plane.set_prop_cycle(color=colormaps["tab20"].colors)  # every rival at both budgets has a colour of its own
    for method, found in points.items():
        strengths, x, y = zip(*sorted(found), strict=True)
        plane.plot(x, y, marker="o", label=method)
        for strength, *at in zip(strengths, x, y, strict=True):
            plane.annotate(f"{strength:g}", at, textcoords="offset points", xytext=(4, 4), fontsize=7)
    for style, row in zip(("--", ":", "-."), calibration, strict=False):
        if fidelity in means.get(row, {}):
            plane.axhline(means[row][fidelity].value, linestyle=style, color="grey", label=row)
    plane.set(xlabel=f"{prompt} ({protocol.name})", ylabel=f"{fidelity} ({protocol.name})")
    if plane.get_legend_handles_labels()[0]:
        figure.legend(loc="outside right upper", fontsize=8, frameon=False)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=150, format="png")
