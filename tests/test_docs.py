"""Every page of the docs: its Python runs on the bundled family, its commands have the options it shows."""

import re
import shlex
from pathlib import Path

import pytest
import typer

from p3s_cli.cli import app

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
ORDER = (
    "setup",
    "mask",
    "finetune",
    "generate",
    "compare",
    "compose",
    "share",
    "pipeline",
)  # each goes on where the last ended


def blocks(page: str, kind: str) -> list[str]:
    return re.findall(rf"```{kind}\n(.*?)```", (DOCS / f"{page}.md").read_text(), re.S)


def test_no_page_is_left_out():
    assert {p.stem for p in DOCS.glob("*.md")} == set(ORDER) and all(blocks(p, "python") for p in ORDER)


@pytest.mark.parametrize(
    "page", [*ROOT.glob("*.md"), *DOCS.glob("*.md"), *ROOT.glob("benchmarks/results/*.md")], ids=lambda p: p.stem
)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)", page.read_text()):
        assert target.startswith("https://") or (page.parent / target).exists(), target


def test_the_examples_run_one_after_the_other(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for page in ORDER:
        for code in blocks(page, "python"):
            exec(compile(code, f"docs/{page}.md", "exec"), {})


@pytest.mark.parametrize("line", [c for p in ORDER for b in blocks(p, "bash") for c in b.splitlines()])
def test_the_commands_parse(line):
    _, name, *words = shlex.split(line)
    typer.main.get_command(app).commands[name].make_context(name, words, resilient_parsing=False)
