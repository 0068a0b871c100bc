"""`p3s finetune`."""

from __future__ import annotations

import sys
from pathlib import Path
from shlex import quote
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
    Seed,
    run_stage,
)
from p3s_cli.errors import InputError
from p3s_cli.methods import NAMES


@app.command()
def finetune(
    subject_dirs: Annotated[
        list[Path] | None, typer.Argument(help="Subject directory made by `p3s mask`; several share one process.")
    ] = None,
    jobs: Annotated[
        Path | None, typer.Option(help="Text file with a subject directory a line, relative to the file.")
    ] = None,
    method: Annotated[str, typer.Option(help=f"{', '.join(NAMES[:-1])} or {NAMES[-1]}.")] = "p3s",
    steps: Annotated[int | None, typer.Option(min=1, help="Optimiser steps; default the method's.")] = None,
    lr: Annotated[float | None, typer.Option(min=0, help="Learning rate; default the method's.")] = None,
    preset: Annotated[str, typer.Option(help="P3S: default, or paper for the literal recipe.")] = "default",
    seed: Seed = 0,
    model: OtherModel = None,
    vision: Annotated[
        str, typer.Option(help="What the control sees the references through: clip, or a CLIP pair's folder or hub id.")
    ] = "clip",
    memory: Memory = "auto",
    device: Device = "auto",
    dtype: Dtype = "auto",
    force: Force = False,
    deterministic: Deterministic = False,
    compiled: Compile = False,
    as_json: Json = False,
) -> None:
    """Teach the model this very subject. An interrupted run goes on where it stopped."""
    from p3s_cli import stages

    options = dict(
        method=method,
        steps=steps,
        lr=lr,
        preset=preset,
        seed=seed,
        model=model,
        vision=vision,
        memory=memory,
        device=device,
        dtype=dtype,
        force=force,
        deterministic=deterministic,
        compiled=compiled,
    )
    if jobs is None and subject_dirs and len(subject_dirs) == 1:
        run_stage(stages.finetune, as_json, _show, subject_dir=subject_dirs[0], **options)
        return

    def many(**arguments: Any) -> list[Any]:
        named = [*(subject_dirs or ()), *(stages.read_jobs(jobs) if jobs else ())]
        if not named:
            raise InputError("name a subject directory, or a file of them with --jobs")
        return stages.finetune_many(named, **arguments)

    results = run_stage(many, as_json, lambda made: [line for r in made for line in _show_any(r)], **options)
    failed = [r for r in results if isinstance(r, stages.Failed)]
    for one in failed:
        print(f"p3s: {one.subject}: {one.error}", file=sys.stderr)
    if failed:
        raise typer.Exit(min(r.exit_code for r in failed))  # a fault (1) weighs more than bad input (2)


def _show_any(result: Any) -> list[str]:
    return [f"{result.subject}: failed"] if hasattr(result, "error") else _show(result)


def _show(result: Any) -> list[str]:
    skipped = f", {result.skipped} of them skipped, as they were not finite" if result.skipped else ""
    state = (
        "unchanged since it was tuned"
        if result.unchanged
        else f"tuned for {result.steps} steps{skipped} (memory profile {result.memory}), last loss {result.loss:.4f}"
    )
    warnings = [f"warning: {w}" for w in result.warnings]
    return [
        *warnings,
        f"{result.subject}: {state}",
        f'now: p3s generate {quote(str(result.subject))} "a [V] ... on the beach"',
    ]
