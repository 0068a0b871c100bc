"""`p3s eval`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from p3s_cli.cli.app import app
from p3s_cli.cli.shared import Device, Dtype, Json, Seed, run_stage


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
    budget: Annotated[
        list[str] | None,
        typer.Option(
            help="World: how long rivals tune; published (default), equal (P3S's own wall-clock). Repeatable."
        ),
    ] = None,
    quick: Annotated[
        bool,
        typer.Option("--quick", help="World: 3 of 12 subjects, 4 of 12 prompts, 20 steps (those of --fast with it)."),
    ] = False,
    strength: Annotated[
        list[float] | None,
        typer.Option(min=0, help="World: draw at this strength, too, for the trade-off plot. Repeatable."),
    ] = None,
    protocol: Annotated[
        str | None, typer.Option(help="dreambooth, p3s, kosmos-g or world; default the family's.")
    ] = None,
    prompt: Annotated[
        list[str] | None, typer.Option(help="What to draw of a subject, with [V]; default the family's. Repeatable.")
    ] = None,
    subject: Annotated[list[str] | None, typer.Option(help="DreamBench: this subject only. Repeatable.")] = None,
    shard: Annotated[
        str | None,
        typer.Option(
            help="A benchmark's part i/n, every n-th subject; when all parts are done, the same command without --shard has the whole."
        ),
    ] = None,
    points: Annotated[Path | None, typer.Option(help="DreamBench: JSON file of clicks by subject.")] = None,
    check: Annotated[
        bool, typer.Option("--self-check", help="DreamBench: real photos against real photos, nothing is drawn.")
    ] = False,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="A benchmark's working folder; default ./p3s-bench-<name>.")
    ] = None,
    n: Annotated[
        int | None, typer.Option("-n", min=1, help="Images of each prompt; default 4, with --quick 2.")
    ] = None,
    fast: Annotated[
        bool, typer.Option("--fast", help="Draw as `p3s generate --fast` does, every method alike.")
    ] = False,
    seed: Seed = 0,
    model: Annotated[
        str | None, typer.Option(help="Base; default the subject's own, the world's for world, sd15 for dreambench.")
    ] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    as_json: Json = False,
) -> None:
    """Score a subject, or methods on a benchmark. Writes a table, rows and a page; goes on where it stopped."""
    from p3s_cli import benches

    chosen = dict(target=target, bench=bench, names=method, output=output, model=model, n=n, fast=fast, seed=seed)
    chosen |= dict(ablate=ablate, only=only, budgets=budget, quick=quick, strengths=strength)
    chosen |= dict(subjects=subject, shard=shard, points=points, check=check)
    chosen |= dict(protocol=protocol, prompts=prompt, device=device, dtype=dtype)
    run_stage(benches.evaluate, as_json, _show_scores, **chosen)


def _show_scores(result: Any) -> list[str]:
    return [*result.table, f"rows in {result.scores}", f"look at {result.report}"]
