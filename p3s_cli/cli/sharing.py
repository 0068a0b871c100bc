"""`p3s export` and `p3s import`."""

from __future__ import annotations

from pathlib import Path
from shlex import quote
from typing import Annotated, Any

import typer

from p3s_cli.cli.app import app
from p3s_cli.cli.shared import Device, Json, OtherModel, SubjectDir, run_stage


@app.command()
def export(
    subject_dir: SubjectDir,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="File; default ./<subject>.p3s.safetensors.")
    ] = None,
    rank: Annotated[int, typer.Option(min=1, help="Rank of the difference to the base; 96 is 73 MB on SD v1-5.")] = 96,
    full: Annotated[bool, typer.Option("--full", help="The whole control in fp16 (1.2 GB on SD v1-5).")] = False,
    model: OtherModel = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """A tuned subject as one small file. Holds its control, inpainted references and masks, never the photos."""
    from p3s_cli import stages

    def show(result: Any) -> list[str]:
        kind = f"rank {result.rank}, relative error {result.error:.3f}" if result.rank else "whole, fp16"
        return [f"{result.file}: {result.bytes / 1e6:.1f} MB ({kind})"]

    arguments = dict(subject_dir=subject_dir, output=output, rank=rank, full=full, model=model, device=device)
    run_stage(stages.export_subject, as_json, show, **arguments)


@app.command("import")
def import_(
    file: Annotated[Path, typer.Argument(help="File that `p3s export` wrote.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Subject directory to make; default the file's name.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="Where the base lies here, if not where the file says.")] = None,
    vision: Annotated[
        str | None, typer.Option(help="Where the CLIP pair of its tuning lies here, if not where the file says.")
    ] = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """A subject directory, ready to generate, from an exported file. Refuses another base than it was tuned on."""
    from p3s_cli import stages

    def show(result: Any) -> list[str]:
        prompt = quote(f"a [V] {result.class_word}")
        command = f"p3s generate {quote(str(result.subject))} {prompt}"
        return [f"{result.subject}: class {result.class_word}; now: {command}"]

    arguments = dict(file=file, output=output, model=model, vision=vision, device=device)
    run_stage(stages.import_subject, as_json, show, **arguments)
