"""Every example runs, and the README's commands exist with the options it shows."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from p3s_cli.cli import app

ROOT = Path(__file__).parent.parent


def test_two_look_alikes(tmp_path):
    script = ROOT / "examples/two_look_alikes.py"
    out = subprocess.run(
        [sys.executable, script, "story", "2", "2"], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert "images:" in out.stdout and list((tmp_path / "story/subject/outputs").glob("*.grid.png"))


def readme_commands():
    blocks = re.findall(r"```(?:bash|sh|console)\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    return [line for b in blocks for line in b.splitlines() if line.startswith("p3s ")]


@pytest.mark.parametrize("line", readme_commands())
def test_readme_commands_parse(line):
    """Click accepts the words: the command exists, and so does every option."""
    _, name, *words = shlex.split(line.split("#")[0])
    command = typer.main.get_command(app).commands[name]
    command.make_context(name, words, resilient_parsing=False)
