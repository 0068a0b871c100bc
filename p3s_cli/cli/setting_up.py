"""`p3s doctor` and `p3s fetch`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from p3s_cli.cli.app import app
from p3s_cli.cli.shared import Device, Dtype, Json, run_stage

Vision = Annotated[
    str | None, typer.Option(help="Another CLIP pair than the family's, or dinov2 beside it, as in p3s mask.")
]
Inpainter = Annotated[str | None, typer.Option(help="Another inpainting U-Net, as in p3s mask.")]
Control = Annotated[
    list[str] | None, typer.Option(help="A ControlNet as in p3s generate: canny, depth, ... or a hub id. Repeatable.")
]


@app.command()
def doctor(
    model: Annotated[str, typer.Argument(help="Family to look at, as --model names it.")] = "sd15",
    device: Device = "auto",
    dtype: Dtype = "auto",
    vision: Vision = None,
    inpainter: Inpainter = None,
    control: Control = None,
    as_json: Json = False,
) -> None:
    """What is here, what each stage needs, and what to do about it. Fetches nothing."""
    from p3s_cli import setup

    named = dict(model=model, vision=vision, inpainter=inpainter, control=control)
    run_stage(setup.doctor, as_json, _show_report, device=device, dtype=dtype, **named)


def _show_report(report: Any) -> list[str]:
    total = "" if report.device_bytes is None else f" with {report.device_bytes / 1e9:.1f} GB"
    return [
        ", ".join(f"{name} {version}" for name, version in report.versions.items()),
        f"device {report.device}{total}, {report.dtype}{', HF_HUB_OFFLINE is set' if report.offline else ''}",
        f"{report.model}:",
        *(_show_part(p) for p in report.parts),
        f"memory profile {report.memory}: "
        + ", ".join(f"{stage} about {need / 1e9:.1f} GB" for stage, need in report.needs.items()),
        *(f"to do: {line}" for line in report.advice or ("nothing, all is here",)),
    ]


def _show_part(part: Any) -> str:
    size = f"{part.bytes / 1e6:9.1f} MB" if part.folder else " " * 12
    note = "" if part.needed else f" (optional: {part.why})" if part.why else " (optional)"
    return f"  {part.name:<18}{part.state:<9}{size}  {part.source}{note}"


@app.command()
def fetch(
    model: Annotated[
        str, typer.Argument(help="Family to fetch, as --model names it, or a protocol of p3s eval.")
    ] = "sd15",
    vision: Vision = None,
    inpainter: Inpainter = None,
    control: Control = None,
    as_json: Json = False,
) -> None:
    """Bring a family's models into the cache, and verify them. Or the metric models of a protocol."""
    from p3s_cli import setup

    named = dict(model=model, vision=vision, inpainter=inpainter, control=control)
    run_stage(setup.fetch, as_json, lambda parts: [_show_part(p) for p in parts], **named)
