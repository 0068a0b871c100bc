"""`p3s finetune`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from p3s_cli.cli.app import app
from p3s_cli.cli.shared import (
    Deterministic,
    Device,
    Dtype,
    Force,
    Json,
    Memory,
    OtherModel,
    Seed,
    SubjectDir,
    run_stage,
)
from p3s_cli.methods import NAMES


@app.command()
def finetune(
    subject_dir: SubjectDir,
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
    as_json: Json = False,
) -> None:
    """Teach the model this very subject. An interrupted run goes on where it stopped."""
    from p3s_cli import stages

    def show(result: Any) -> list[str]:
        state = (
            "unchanged since it was tuned"
            if result.unchanged
            else f"tuned for {result.steps} steps (memory profile {result.memory}), last loss {result.loss:.4f}"
        )
        warnings = [f"warning: {w}" for w in result.warnings]
        return [*warnings, f"{result.subject}: {state}", f'now: p3s generate {result.subject} "a [V] ... on the beach"']

    run_stage(
        stages.finetune,
        as_json,
        show,
        subject_dir=subject_dir,
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
    )
