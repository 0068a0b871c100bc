"""`p3s mask`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from p3s_cli.cli.app import app
from p3s_cli.cli.shared import Deterministic, Device, Dtype, Force, Json, Seed, given, run_stage
from p3s_cli.errors import InputError


@app.command()
def mask(
    context: typer.Context,
    photos: Annotated[
        list[Path], typer.Argument(help="JPEG, PNG or WebP with the subject in it; several with --points.")
    ],
    pos: Annotated[
        list[str] | None,
        typer.Option(help="X,Y on the subject: pixels of the upright photo, or fractions such as 0.3,0.5. Repeatable."),
    ] = None,
    neg: Annotated[list[str] | None, typer.Option(help="X,Y on the look-alike you do not mean. Repeatable.")] = None,
    box: Annotated[str | None, typer.Option(help="X0,Y0,X1,Y1 around the subject, with or without points.")] = None,
    points: Annotated[
        Path | None, typer.Option(help="JSON file with the points: of one photo, or by file name for many.")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="Subject directory; default ./<photo>/. An existing one gets another reference. With --grid, the picture.",
        ),
    ] = None,
    class_word: Annotated[
        str | None, typer.Option("--class", help="What the subject is, such as dog; guessed with CLIP if left out.")
    ] = None,
    grid: Annotated[
        bool, typer.Option("--grid", help="Only write the photo under a coordinate grid, with no other option but -o.")
    ] = False,
    maps: Annotated[bool, typer.Option("--maps", help="Also write the similarity maps as a picture.")] = False,
    model: Annotated[
        str | None,
        typer.Option(
            help="sd15, world, a diffusers folder, a hub id or a .safetensors file; default the subject's own, or sd15."
        ),
    ] = None,
    vision: Annotated[
        str, typer.Option(help="What masks are read from: clip, dinov2, or a ViT's folder or hub id.")
    ] = "clip",
    inpainter: Annotated[
        str | None,
        typer.Option(help="Another inpainting U-Net: a folder, a hub id, a .safetensors file; or classical."),
    ] = None,
    preset: Annotated[str, typer.Option(help="default, or paper for the literal recipe.")] = "default",
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    force: Force = False,
    deterministic: Deterministic = False,
    as_json: Json = False,
) -> None:
    """Points on a photo -> masks, the photo without its look-alike."""
    from p3s_cli import stages

    if grid:
        others = given(context, but=("photos", "grid", "output", "as_json"))
        run_stage(_grids, as_json, _show_grids, photos=photos, output=output, others=others)
        return
    common = dict(
        model=model,
        vision=vision,
        inpainter=inpainter,
        preset=preset,
        maps=maps,
        seed=seed,
        device=device,
        dtype=dtype,
        force=force,
        deterministic=deterministic,
    )
    clicks = dict(positive=pos or (), negative=neg or (), box=box, class_word=class_word)
    if points is None and len(photos) == 1:
        run_stage(stages.mask, as_json, _show_mask, photo=photos[0], output=output, **clicks, **common)
    else:
        run_stage(
            stages.mask_many, as_json, _show_masks, photos=photos, points=points, output=output, **clicks, **common
        )


def _grids(photos: list[Path], output: Path | None, others: list[str], on_progress: Any) -> list[Path]:
    from p3s_cli import stages

    if others:
        raise InputError(f"--grid only draws a grid; leave out {' and '.join(others)}, or --grid itself")
    return stages.grid_many(photos, output)


def _show_grids(made: list[Path]) -> list[str]:
    return [f"look at {p}" for p in made]


def _show_masks(results: list[Any]) -> list[str]:
    return [line for result in results for line in _show_mask(result)]


def _show_mask(result: Any) -> list[str]:
    guessed = (
        "" if result.class_score is None else f" (guessed, score {result.class_score:.2f}; correct it with --class)"
    )
    unchanged = "unchanged, " if result.unchanged else ""
    return [
        f"{result.subject}: {unchanged}{result.reference}, class {result.class_word}{guessed}",
        f"subject {result.areas['subject']:.1%} of the photo, negative {result.areas['negative']:.1%}, "
        f"confidence {result.confidence:.2f}, inpainting: {result.filler}",
        *(f"warning: {w}" for w in result.warnings),
        *(f"look at {p}" for p in result.pictures if p.name != "photo.png"),
    ]
