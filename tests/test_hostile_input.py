"""The command line, given what nobody would give it: one sentence, exit code 2, and nothing made or changed."""

import json
import os
import re
import shutil

import pytest
import tiny
from typer.testing import CliRunner

from p3s_cli import stages
from p3s_cli.cli import app

runner = CliRunner()
CLICKS = ("--pos", "18,32", "--neg", "46,32")


@pytest.fixture(scope="module")
def made(tmp_path_factory, tiny_folder, tiny_family):
    """A photo and a tuned subject."""
    home = tmp_path_factory.mktemp("home")
    tiny.photo(home / "two.png")
    stages.mask(home / "two.png", [(18, 32)], [(46, 32)], home / "thing", "thing", family=tiny_family)
    stages.finetune(home / "thing", steps=1, family=tiny_family)
    return home


@pytest.fixture
def home(tmp_path, monkeypatch, made):
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    (tmp_path / "loop.png").symlink_to("loop.png")
    (tmp_path / "endless").symlink_to("/dev/zero")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "cut.png").write_bytes((tmp_path / "two.png").read_bytes()[:200])
    (tmp_path / "empty.safetensors").write_bytes(b"")
    (tmp_path / "huge.safetensors").write_bytes(b"\xff" * 7 + b"\x7f{}")
    (tmp_path / "deep.json").write_text('{"positive":' + "[" * 200_000)
    (tmp_path / "odd.json").write_text('{"positive": ["18,32"], "class": "\\ud800"}')
    monkeypatch.chdir(tmp_path)
    return tmp_path


def files(root):
    return {str(p): p.read_bytes() for p in root.rglob("*") if p.is_file() and p.name not in ("endless", ".lock")}


NOT_TEXT = os.fsdecode(b"\xff")
MASK, DRAW = ["mask", "two.png", *CLICKS], ["generate", "thing", "a [V] thing", "-n", "1", "--steps", "1"]
HOSTILE = [
    (["mask", "loop.png", *CLICKS], "loop.png"),
    (["mask", "endless", *CLICKS], "endless is not a file"),
    (["mask", "folder.png", *CLICKS], "folder.png is not a file"),
    (["mask", "cut.png", *CLICKS], "cut.png cannot be read"),
    (["mask", "x" * 300, *CLICKS], "File name too long"),
    (["mask", "empty.safetensors", *CLICKS], "not a JPEG, PNG or WebP"),
    ([*MASK, "-o", "cut.png"], "a file stands in its way"),
    ([*MASK, "-o", "cut.png/below"], "a file stands in its way"),
    ([*MASK, "-o", "loop.png"], "a file stands in its way"),
    ([*MASK, "-o", "thing", "--class", f"a{NOT_TEXT}"], "class word .* is not valid Unicode text"),
    (["mask", "two.png", "--points", "odd.json", "-o", "thing"], "class word .* is not valid Unicode text"),
    (["mask", "two.png", "--points", "deep.json"], "deep.json is not JSON that can be read"),
    (["mask", "two.png", "--points", "endless"], "larger than 50 MB"),
    (["finetune", "loop.png"], "loop.png/subject.json cannot be read"),
    (["finetune", "--jobs", "endless"], "the jobs in endless cannot be read"),
    ([*DRAW[:2], f"[V] {NOT_TEXT}"], "prompt .* is not valid Unicode text"),
    ([*DRAW, "--negative-prompt", NOT_TEXT], "negative prompt .* is not valid Unicode text"),
    ([*DRAW, "--negative-prompt", "x" * 9_999], "the negative prompt has 9,999 characters"),
    ([*DRAW[:-1], "1001"], "cannot take 1001 steps"),
    ([*DRAW, "-n", "1000000000"], "give from 1 to 1000 images"),
    ([*DRAW, "--guidance", "nan"], "nan is no strength"),
    ([*DRAW, "--subject-guidance", "1e400"], "inf is no strength"),
    ([*DRAW, "--lora", "folder.png"], "folder.png holds no adapter_model.safetensors"),
    ([*DRAW, "--lora", "empty.safetensors"], "empty.safetensors is no LoRA that can be read"),
    ([*DRAW, "--lora", "huge.safetensors"], "huge.safetensors is no LoRA that can be read"),
    (["import", "empty.safetensors"], "empty.safetensors is damaged or not made by p3s"),
    (["import", "huge.safetensors"], "its header of .* is longer than"),
    (["import", "folder.png"], "it is no file"),
]


@pytest.mark.parametrize(("arguments", "words"), HOSTILE)
def test_hostile_input_is_one_sentence_and_changes_nothing(home, tiny_folder, arguments, words):
    before = files(home)
    model = ["--model", str(tiny_folder)] if arguments[0] == "mask" else []
    result = runner.invoke(app, [*arguments, *model])
    assert result.exit_code == 2, (result.exception, result.stderr)
    assert result.stderr.count("\n") == 1 and not result.stdout
    assert re.search(words, result.stderr), result.stderr
    assert files(home) == before


def test_names_that_are_no_text_are_shown_as_far_as_they_can_be(home, tiny_folder):
    """A photo may be called anything; a directory is read again by what takes text alone."""
    for name, output in (("dög 🐕\n", ()), (f"x{NOT_TEXT}", ("-o", "x"))):
        shutil.copy("two.png", f"{name}.png")
        how = [*CLICKS, "--class", "thing", "--model", str(tiny_folder)]
        result = runner.invoke(app, ["mask", f"{name}.png", *how, *output])
        assert result.exit_code == 0, result.exception
        assert (home / (output or (name,))[-1] / "subject.json").is_file()
    result = runner.invoke(app, ["mask", f"{name}.png", *how])
    assert result.exit_code == 2 and "the directory 'x\\udcff' is not valid Unicode text" in result.stderr


def without(*path):
    """A change to a manifest: what lies at the path becomes an empty object."""

    def change(data):
        for key in path[:-1]:
            data = data[key]
        data[path[-1]] = {}

    return change


@pytest.mark.parametrize(
    ("change", "refused"),
    [
        (without("finetune", "settings"), "not one that p3s wrote; run: p3s finetune thing --force"),
        (without("finetune", "artifacts"), "not one that p3s wrote; run: p3s finetune thing --force"),
        (without("finetune", "result"), None),
        (without("references", 0, "mask", "artifacts"), "is missing or damaged, or a picture of it is; refresh"),
        (without("references", 0, "mask", "result"), None),
        (without("references", 0, "mask", "settings"), "does not belong to its points any more"),
    ],
)
def test_a_record_that_no_p3s_wrote_is_refused_or_made_again(home, change, refused):
    """Where the control is whole but its record is empty, drawing goes on; tuning and masking make anew."""
    path = home / "thing/subject.json"
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))
    result = runner.invoke(app, DRAW)
    assert result.exit_code == (2 if refused else 0), result.exception
    assert (refused or "") in result.stderr
    for again in ([*MASK, "-o", "thing"], ["finetune", "thing", "--steps", "1"], DRAW):
        result = runner.invoke(app, again)
        assert result.exit_code == 0, (again, result.exception, result.stderr)
