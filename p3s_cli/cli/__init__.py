"""The command line: parse, call one library function, print. Torch is imported only by a command that runs."""

from __future__ import annotations

import os
import sys
import warnings

from p3s_cli import signals

# isort: off
# the order in which `p3s --help` lists them
from p3s_cli.cli import mask, tuning, drawing, evaluating, sharing, setting_up  # noqa: F401

# isort: on
from p3s_cli.cli.app import app
from p3s_cli.cli.heap import collecting_late, keep_freed


def run() -> None:
    """Entry point. Hub libraries keep their notices to themselves; SIGINT and SIGTERM end it in good order."""
    keep_freed()
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore", category=UserWarning, module="huggingface_hub")
    try:
        with collecting_late(), signals.raising():
            app()
    except signals.Interrupted as stop:
        print("p3s: interrupted; the same command goes on from what is done", file=sys.stderr)
        sys.exit(stop.exit_code)


__all__ = ["app", "run"]
