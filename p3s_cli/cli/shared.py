"""Options that several commands have, and the one way a command calls the library."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from p3s_cli.cli.heap import collect_from_now
from p3s_cli.errors import P3SError

Device = Annotated[str, typer.Option(help="auto, cuda, mps or cpu.")]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16; auto is half precision on CUDA.")]
Seed = Annotated[int, typer.Option(min=0, max=2**53, help="Seed of everything random in this stage.")]
Memory = Annotated[str, typer.Option(help="Memory profile: auto, 24, 16, 12 or 8 (GB).")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout, an object or a list.")]
Force = Annotated[bool, typer.Option("--force", help="Do it again although nothing has changed.")]
Deterministic = Annotated[bool, typer.Option("--deterministic", help="The same bits every time on CUDA too; slower.")]
Compile = Annotated[
    bool,
    typer.Option("--compile", help="P3S: compile the model first; minutes, for many subjects or images on a GPU."),
]
SubjectDir = Annotated[Path, typer.Argument(help="Subject directory made by `p3s mask`.")]
OtherModel = Annotated[str | None, typer.Option(help="Another base than the one the subject names.")]


def given(context: typer.Context, but: Sequence[str]) -> list[str]:
    """The options that the command line names, as it may spell them, without these."""
    options = {p.name: p.opts[0] for p in context.command.params if p.name not in but}
    sources = {option: context.get_parameter_source(name or "") for name, option in options.items()}
    return [option for option, source in sources.items() if source is not None and source.name == "COMMANDLINE"]


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


def run_stage(stage: Callable[..., Any], as_json: bool, show: Callable[[Any], list[str]], **arguments: Any) -> Any:
    """Call a library function with a progress bar; print its result, or one sentence and an exit code. Returns it."""
    collect_from_now()  # a command has imported by now what the function needs
    try:
        with _progress() as on_progress:
            result = stage(**arguments, on_progress=on_progress)
    except P3SError as error:
        print(f"p3s: {error}", file=sys.stderr)
        raise typer.Exit(error.exit_code) from None
    except OSError as error:
        print(f"p3s: {error.strerror or error}{f': {error.filename}' if error.filename else ''}", file=sys.stderr)
        raise typer.Exit(1) from None
    except RuntimeError as error:
        if "out of memory" not in str(
            error
        ):  # as every device says it; tuning and drawing go on with less before they do
            raise
        print("p3s: out of memory; free some of the device's, or use another --device", file=sys.stderr)
        raise typer.Exit(1) from None
    _say(json.dumps(_plain(result), default=str) if as_json else "\n".join(show(result)))
    return result


def _say(text: str) -> None:
    """Print the result, now, where a full disk or a closed pipe can still be told of."""
    try:
        print(text, flush=True)
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left of it goes nowhere
        print(f"p3s: it is done, but its result could not be printed ({error.strerror})", file=sys.stderr)
        raise typer.Exit(1) from None


def _plain(result: Any) -> Any:
    if isinstance(result, list):
        return [_plain(r) for r in result]
    return asdict(result) if is_dataclass(result) else result
