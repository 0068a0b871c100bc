"""The application that the commands register with, and its global options."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from p3s_cli import __version__

app = typer.Typer(
    name="p3s",
    help="Point at the thing you mean in one photo, then generate that very thing anywhere (P3S-Diffusion).",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


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
    # a path may hold bytes that are no text, and a terminal may know fewer letters than a class word has
    if sys.stdout is not None:  # as where it is closed
        sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
