"""`p3s generate` and `p3s demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from p3s_cli.cli.app import app
from p3s_cli.cli.shared import (
    Compile,
    Deterministic,
    Device,
    Dtype,
    Force,
    Json,
    Memory,
    OtherModel,
    SubjectDir,
    run_stage,
)


@app.command()
def generate(
    subject_dir: SubjectDir,
    prompt: Annotated[str, typer.Argument(help='What to draw, with [V] before the class word: "a [V] dog on beach".')],
    n: Annotated[int, typer.Option("-n", min=1, help="How many images.")] = 4,
    seed: Annotated[
        int, typer.Option(min=0, max=2**53, help="Seed of the first image; the others count up from it.")
    ] = 0,
    steps: Annotated[int | None, typer.Option(min=1, help="Sampling steps; default 50, with --fast 16.")] = None,
    fast: Annotated[
        bool, typer.Option("--fast", help="16 steps of a multistep solver, four of which share as with --reuse.")
    ] = False,
    reuse: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="P3S: how many steps share what its copy made; 1 is exact and slower. Default 2, with --fast 4.",
        ),
    ] = None,
    guidance: Annotated[
        float | None, typer.Option(help="Strength of the text; default the family's (7.5 for sd15).")
    ] = None,
    subject_guidance: Annotated[
        float | None,
        typer.Option(
            help="Strength of the subject; default the family's (1 for sd15). Equal to --guidance: in the conditional half only."
        ),
    ] = None,
    scheduler: Annotated[
        str | None,
        typer.Option(help="ddim (default), ddpm, dpm++ (with --fast), unipc, euler, ... or a scheduler of diffusers."),
    ] = None,
    schedule: Annotated[
        str | None,
        typer.Option(
            help="P3S: how its weight runs over time: quadratic, fixed, increasing, decreasing, off, or learned; default the family's (quadratic for sd15)."
        ),
    ] = None,
    strength: Annotated[float, typer.Option(min=0, help="Multiplies the weight of every subject.")] = 1.0,
    negative_prompt: Annotated[str, typer.Option(help="What to keep out of the images.")] = "",
    also: Annotated[
        list[str] | None,
        typer.Option(help="Another subject's directory[=STRENGTH]; the prompt then says [V1], [V2], ... Repeatable."),
    ] = None,
    control: Annotated[
        list[str] | None,
        typer.Option(help="NAME=PICTURE[=STRENGTH], such as canny=edges.png; or a ControlNet's folder. Repeatable."),
    ] = None,
    lora: Annotated[
        list[str] | None, typer.Option(help="LoRA for the base, a .safetensors file[=STRENGTH]. Repeatable.")
    ] = None,
    references: Annotated[
        int, typer.Option(min=1, help="P3S: how many of a subject's reference photos it is shown.")
    ] = 1,
    size: Annotated[str | None, typer.Option(help="WIDTHxHEIGHT in pixels; default the family's square.")] = None,
    safety_checker: Annotated[bool, typer.Option(help="Blacken what the base's safety checker flags.")] = True,
    metadata: Annotated[bool, typer.Option(help="Put prompt, seed and settings into each PNG.")] = True,
    memory: Memory = "auto",
    model: OtherModel = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    force: Force = False,
    deterministic: Deterministic = False,
    compiled: Compile = False,
    as_json: Json = False,
) -> None:
    """Images of the subject, wherever the prompt puts it."""
    from p3s_cli import stages

    def show(result: Any) -> list[str]:
        state = " (unchanged, nothing to do)" if result.unchanged else ""
        return [
            *(f"warning: {w}" for w in result.warnings),
            *(f"{p}{state}" for p in result.images),
            f"look at {result.grid}",
        ]

    run_stage(
        stages.generate,
        as_json,
        show,
        subject_dir=subject_dir,
        prompt=prompt,
        n=n,
        seed=seed,
        steps=steps,
        fast=fast,
        reuse=reuse,
        guidance=guidance,
        subject_guidance=subject_guidance,
        scheduler=scheduler,
        schedule=schedule,
        strength=strength,
        negative_prompt=negative_prompt,
        also=also,
        control=control,
        lora=lora,
        references=references,
        size=size,
        safety_checker=safety_checker,
        metadata=metadata,
        memory=memory,
        model=model,
        device=device,
        dtype=dtype,
        force=force,
        deterministic=deterministic,
        compiled=compiled,
    )


@app.command()
def demo(
    directory: Annotated[Path, typer.Argument(help="Where to put everything.")] = Path("p3s-demo"),
    seed: Annotated[int, typer.Option(min=0, help="Which scene to draw, and the seed of every stage.")] = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    force: Force = False,
    as_json: Json = False,
) -> None:
    """The whole job on the bundled family, nothing to download. Two look-alikes are drawn, one is chosen and drawn anew."""
    from p3s_cli import story

    run_stage(story.demo, as_json, story.table, directory=directory, seed=seed, device=device, dtype=dtype, force=force)
