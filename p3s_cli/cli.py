"""The command line: parse, call one library function, print. Torch is imported only by a command that runs."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from p3s_cli import __version__, signals
from p3s_cli.errors import P3SError
from p3s_cli.methods import NAMES

app = typer.Typer(
    name="p3s",
    help="Point at the thing you mean in one photo, then generate that very thing anywhere (P3S-Diffusion).",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Device = Annotated[str, typer.Option(help="auto, cuda, mps or cpu.")]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16; auto is bfloat16 on CUDA.")]
Seed = Annotated[int, typer.Option(min=0, max=2**53, help="Seed of everything random in this stage.")]
Memory = Annotated[str, typer.Option(help="Memory profile: auto, 24, 16, 12 or 8 (GB).")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
Force = Annotated[bool, typer.Option("--force", help="Do it again although nothing has changed.")]
Deterministic = Annotated[bool, typer.Option("--deterministic", help="The same bits every time on CUDA too; slower.")]
SubjectDir = Annotated[Path, typer.Argument(help="Subject directory made by `p3s mask`.")]
OtherVision = Annotated[str | None, typer.Option(help="Another CLIP pair than the family's: a folder or a hub id.")]
OtherModel = Annotated[str | None, typer.Option(help="Another base than the one the subject names.")]


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[str, int, int], None]]:
    """A progress bar on stderr: what is being done, how far it is, time left."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("starting", total=None)
        yield lambda what, done, total: progress.update(task, description=what, completed=done, total=total)


def _run(stage: Callable[..., Any], as_json: bool, show: Callable[[Any], list[str]], **arguments: Any) -> None:
    """Call a library function with a progress bar; print its result, or one sentence and an exit code."""
    try:
        with _progress() as on_progress:
            result = stage(**arguments, on_progress=on_progress)
    except P3SError as error:
        print(f"p3s: {error}", file=sys.stderr)
        raise typer.Exit(error.exit_code) from None
    except OSError as error:
        print(f"p3s: {error.strerror or error}{f': {error.filename}' if error.filename else ''}", file=sys.stderr)
        raise typer.Exit(1) from None
    if as_json:
        print(json.dumps(_plain(result), default=str))
    else:
        print("\n".join(show(result)))


def _plain(result: Any) -> Any:
    if isinstance(result, list):
        return [_plain(r) for r in result]
    return asdict(result) if is_dataclass(result) else result


def _version(asked: bool) -> None:
    if asked:
        print(f"p3s {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command()
def mask(
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
            "--output", "-o", help="Subject directory; default ./<photo>/. An existing one gets another reference."
        ),
    ] = None,
    class_word: Annotated[
        str | None, typer.Option("--class", help="What the subject is, such as dog; guessed with CLIP if left out.")
    ] = None,
    grid: Annotated[bool, typer.Option("--grid", help="Only write the photo under a coordinate grid.")] = False,
    maps: Annotated[bool, typer.Option("--maps", help="Also write the similarity maps as a picture.")] = False,
    model: Annotated[
        str, typer.Option(help="sd15, world, a diffusers folder, a hub id or a .safetensors file.")
    ] = "sd15",
    vision: Annotated[
        str, typer.Option(help="What masks are read from: clip, dinov2, or a ViT's folder or hub id.")
    ] = "clip",
    inpainter: Annotated[
        str | None, typer.Option(help="Another inpainting U-Net: a folder, a hub id or a .safetensors file.")
    ] = None,
    preset: Annotated[str, typer.Option(help="default, or paper for the literal recipe.")] = "default",
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    force: Force = False,
    deterministic: Deterministic = False,
    as_json: Json = False,
) -> None:
    """Points on a photo -> the subject's mask, and the photo without its look-alike."""
    from p3s_cli import stages

    if grid:
        _run(lambda on_progress: [stages.grid(p) for p in photos], as_json, lambda made: [f"look at {p}" for p in made])
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
        _run(stages.mask, as_json, _show_mask, photo=photos[0], output=output, **clicks, **common)
    else:
        _run(stages.mask_many, as_json, _show_masks, photos=photos, points=points, output=output, **clicks, **common)


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
        return [f"{result.subject}: {state}", f'now: p3s generate {result.subject} "a [V] ... on the beach"']

    _run(
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


@app.command()
def generate(
    subject_dir: SubjectDir,
    prompt: Annotated[str, typer.Argument(help='What to draw, with [V] before the class word: "a [V] dog on beach".')],
    n: Annotated[int, typer.Option("-n", min=1, help="How many images.")] = 4,
    seed: Annotated[
        int, typer.Option(min=0, max=2**53, help="Seed of the first image; the others count up from it.")
    ] = 0,
    steps: Annotated[int, typer.Option(min=1, help="Sampling steps.")] = 50,
    guidance: Annotated[
        float | None, typer.Option(help="Strength of the text; default the family's (7.5 for sd15).")
    ] = None,
    subject_guidance: Annotated[
        float, typer.Option(help="Strength of the subject; equal to --guidance injects in the conditional half only.")
    ] = 1.0,
    scheduler: Annotated[
        str,
        typer.Option(help="ddim, ddpm, dpm++, dpm++_karras, unipc, euler, euler_a, ... or a scheduler of diffusers."),
    ] = "ddim",
    schedule: Annotated[
        str, typer.Option(help="P3S: weight over time, quadratic, fixed, increasing, decreasing or off.")
    ] = "quadratic",
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
    references: Annotated[int, typer.Option(min=1, help="How many of each subject's references it is shown.")] = 1,
    size: Annotated[str | None, typer.Option(help="WIDTHxHEIGHT in pixels; default the family's square.")] = None,
    safety_checker: Annotated[bool, typer.Option(help="Blacken what the base's safety checker flags.")] = True,
    metadata: Annotated[bool, typer.Option(help="Put prompt, seed and settings into each PNG.")] = True,
    memory: Memory = "auto",
    model: OtherModel = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    force: Force = False,
    deterministic: Deterministic = False,
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

    _run(
        stages.generate,
        as_json,
        show,
        subject_dir=subject_dir,
        prompt=prompt,
        n=n,
        seed=seed,
        steps=steps,
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
    )


@app.command("eval")
def evaluate(
    target: Annotated[
        Path | None,
        typer.Argument(
            help="A subject directory; with --bench dreambench its folder, with --bench world where to work."
        ),
    ] = None,
    bench: Annotated[str | None, typer.Option(help="world or dreambench, instead of one subject.")] = None,
    method: Annotated[
        list[str] | None, typer.Option(help="Who takes part, p3s alone if left out; `all` for everyone. Repeatable.")
    ] = None,
    ablate: Annotated[
        bool, typer.Option("--ablate", help="World: the paper's ablations and our own readings.")
    ] = False,
    only: Annotated[
        list[str] | None, typer.Option(help="Rows of --ablate to make; all if left out. Repeatable.")
    ] = None,
    equal_time: Annotated[
        bool, typer.Option("--equal-time", help="World: rivals also with P3S's own wall-clock for tuning.")
    ] = False,
    quick: Annotated[bool, typer.Option("--quick", help="World: a fixed subset, for ablations.")] = False,
    strength: Annotated[
        list[float] | None, typer.Option(help="World: draw at this strength, too, for the trade-off plot. Repeatable.")
    ] = None,
    protocol: Annotated[
        str | None, typer.Option(help="dreambooth, p3s, kosmos-g or world; default the family's.")
    ] = None,
    prompt: Annotated[
        list[str] | None, typer.Option(help="What to draw of a subject, with [V]; default the family's. Repeatable.")
    ] = None,
    subject: Annotated[list[str] | None, typer.Option(help="DreamBench: this subject only. Repeatable.")] = None,
    shard: Annotated[str | None, typer.Option(help="DreamBench: i/n, every n-th subject from the i-th on.")] = None,
    points: Annotated[Path | None, typer.Option(help="DreamBench: JSON file of clicks by subject.")] = None,
    check: Annotated[
        bool, typer.Option("--self-check", help="DreamBench: real photos against real photos, nothing is drawn.")
    ] = False,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Where a benchmark works.")] = None,
    n: Annotated[int, typer.Option("-n", min=1, help="Images of each prompt.")] = 4,
    seed: Seed = 0,
    model: OtherModel = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    as_json: Json = False,
) -> None:
    """Score a subject or a benchmark: table, rows, and a page with the pictures. Goes on where it stopped."""
    from p3s_cli import benches

    chosen = dict(target=target, bench=bench, names=method, output=output, model=model, n=n, seed=seed)
    chosen |= dict(ablate=ablate, only=only, equal_time=equal_time, quick=quick, strengths=strength)
    chosen |= dict(subjects=subject, shard=shard, points=points, check=check)
    chosen |= dict(protocol=protocol, prompts=prompt, device=device, dtype=dtype)
    _run(benches.evaluate, as_json, _show_scores, **chosen)


def _show_scores(result: Any) -> list[str]:
    return [*result.table, f"rows in {result.scores}", f"look at {result.report}"]


@app.command()
def export(
    subject_dir: SubjectDir,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="File; default ./<subject>.p3s.safetensors.")
    ] = None,
    rank: Annotated[int, typer.Option(min=1, help="Of the difference to the base; 48 is 73 MB on SD v1-5.")] = 48,
    full: Annotated[bool, typer.Option("--full", help="The whole control in fp16 (1.2 GB on SD v1-5).")] = False,
    model: OtherModel = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """A tuned subject as one small file: low-rank control, inpainted references, masks."""
    from p3s_cli import stages

    def show(result: Any) -> list[str]:
        kind = f"rank {result.rank}, relative error {result.error:.3f}" if result.rank else "whole, fp16"
        return [f"{result.file}: {result.bytes / 1e6:.1f} MB ({kind})"]

    arguments = dict(subject_dir=subject_dir, output=output, rank=rank, full=full, model=model, device=device)
    _run(stages.export_subject, as_json, show, **arguments)


@app.command("import")
def import_(
    file: Annotated[Path, typer.Argument(help="File that `p3s export` wrote.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Subject directory to make; default the file's name.")
    ] = None,
    model: OtherModel = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """A subject directory, ready to generate, from an exported file; its base is checked."""
    from p3s_cli import stages

    def show(result: Any) -> list[str]:
        return [f'{result.subject}: class {result.class_word}; now: p3s generate {result.subject} "a [V] ..."']

    _run(stages.import_subject, as_json, show, file=file, output=output, model=model, device=device)


@app.command()
def demo(
    directory: Annotated[Path, typer.Argument(help="Where to put everything.")] = Path("p3s-demo"),
    seed: Annotated[int, typer.Option(min=0, help="Which scene to draw, and the seed of every stage.")] = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    force: Force = False,
    as_json: Json = False,
) -> None:
    """The whole job on the bundled family: a drawn scene with two look-alikes, eight images of the chosen one."""
    from p3s_cli import demo as story

    _run(story.demo, as_json, story.table, directory=directory, seed=seed, device=device, dtype=dtype, force=force)


@app.command()
def doctor(
    model: Annotated[str, typer.Argument(help="Family to look at, as --model names it.")] = "sd15",
    device: Device = "auto",
    dtype: Dtype = "auto",
    vision: OtherVision = None,
    as_json: Json = False,
) -> None:
    """What is installed, which models are here, what each stage needs, and what to do about it. Fetches nothing."""
    from p3s_cli import setup

    _run(setup.doctor, as_json, _show_report, model=model, device=device, dtype=dtype, vision=vision)


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
    note = "" if part.needed else " (optional)"
    return f"  {part.name:<18}{part.state:<9}{size}  {part.source}{note}"


@app.command()
def fetch(
    model: Annotated[str, typer.Argument(help="Family to fetch, as --model names it.")] = "sd15",
    vision: OtherVision = None,
    as_json: Json = False,
) -> None:
    """Bring everything a family needs into the cache, and verify it."""
    from p3s_cli import setup

    _run(setup.fetch, as_json, lambda parts: [_show_part(p) for p in parts], model=model, vision=vision)


def run() -> None:
    """Entry point. Hub libraries keep their notices to themselves; SIGINT and SIGTERM end it in good order."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        with signals.raising():
            app()
    except signals.Interrupted as stop:
        print("p3s: interrupted; the same command goes on from what is done", file=sys.stderr)
        sys.exit(stop.exit_code)


if __name__ == "__main__":
    run()
