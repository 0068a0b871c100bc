"""Many subjects in one process: the bytes of single processes, and one failure is no other's."""

import functools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from typer.testing import CliRunner

import p3s_cli
from p3s_cli import stages
from p3s_cli.cli import app
from p3s_cli.errors import InputError, P3SError
from p3s_cli.methods import forward
from p3s_cli.sd import images
from p3s_cli.sd.weights import load_tensors
from p3s_cli.stages import many

CONTROL = "control/control.safetensors"


@pytest.fixture
def pair_of_subjects(tmp_path, tiny_folder, tiny_family):
    """Two masked subjects that differ, in `one` and `two`."""
    photo = tiny.photo(tmp_path / "photo.png")
    for name, (positive, negative) in {"one": ("18,32", "46,32"), "two": ("46,32", "18,32")}.items():
        stages.mask(photo, [positive], [negative], tmp_path / name, "thing", model=str(tiny_folder), family=tiny_family)
    return tmp_path


def test_two_in_one_process_are_the_bytes_of_two_processes_and_load_the_base_once(pair_of_subjects, monkeypatch):
    home, loads, load = pair_of_subjects, [], many.load
    shutil.copytree(home / "two", home / "alone")
    monkeypatch.setattr(many, "load", lambda *args: loads.append(args) or load(*args))
    results = stages.finetune_many([home / "one", home / "two"], steps=2, device="cpu")
    assert [r.subject.name for r in results] == ["one", "two"] and len(loads) == 1
    command = [sys.executable, "-m", "p3s_cli.cli", "finetune", str(home / "alone"), "--steps", "2", "--device", "cpu"]
    path = {"PYTHONPATH": str(Path(p3s_cli.__file__).parents[1])}
    subprocess.run(command, check=True, capture_output=True, env=os.environ | path)
    assert (home / "two" / CONTROL).read_bytes() == (home / "alone" / CONTROL).read_bytes()
    assert (home / "two" / CONTROL).read_bytes() != (home / "one" / CONTROL).read_bytes()


def test_a_base_named_by_a_relative_path_is_loaded_once_for_all(pair_of_subjects, tiny_folder, monkeypatch):
    loads, load = [], many.load
    monkeypatch.setattr(many, "load", lambda *args: loads.append(args) or load(*args))
    monkeypatch.chdir(tiny_folder.parent)
    named = {"model": f"./{tiny_folder.name}", "device": "cpu"}
    results = stages.finetune_many([pair_of_subjects / "one", pair_of_subjects / "two"], steps=1, **named)
    assert [r.steps for r in results] == [1, 1] and len(loads) == 1


@pytest.fixture
def traced(monkeypatch):
    """Let what is compiled be run by this backend of dynamo, which generates no code unless told to."""

    def by(backend="aot_eager"):
        monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))

    torch.compiler.reset()
    forward._compiled.cache_clear()
    yield by
    forward._compiled.cache_clear()


def test_what_is_compiled_for_one_subject_serves_the_next_and_says_what_the_plain_passes_say(
    pair_of_subjects, tiny_family, traced
):
    homes, prompt = [pair_of_subjects / name for name in ("one", "two")], "a [V] thing on the beach"
    learn = functools.partial(stages.finetune, steps=2, family=tiny_family, force=True)
    draw = functools.partial(stages.generate, prompt=prompt, n=1, steps=2, reuse=1, family=tiny_family, force=True)
    plain = [(load_tensors(learn(h).control)[0], images.load_image(draw(h).images[0])) for h in homes]
    traced()
    compiled = []
    for home, stance in zip(homes, ("default", "fail_on_recompile"), strict=True):
        with torch.compiler.set_stance(stance):
            learnt = load_tensors(learn(home, compiled=True).control)[0]
            compiled.append((learnt, images.load_image(draw(home, compiled=True).images[0])))
    for (tensors, picture), (others, other) in zip(plain, compiled, strict=True):
        for name, tensor in tensors.items():
            torch.testing.assert_close(others[name].float(), tensor.float(), rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(images.to_tensor(other), images.to_tensor(picture), rtol=0, atol=2 / 255)


def test_a_machine_that_cannot_compile_says_so(pair_of_subjects, tiny_family, traced):
    def broken(graph, inputs):
        raise RuntimeError("no compiler here")

    traced(broken)
    with pytest.raises(P3SError, match="no compiler here.*leave out --compile"):
        stages.finetune(pair_of_subjects / "one", steps=1, compiled=True, family=tiny_family)


def test_only_p3s_has_passes_to_compile(pair_of_subjects, tiny_family):
    home = pair_of_subjects / "one"
    with pytest.raises(InputError, match="lora has no step to compile"):
        stages.finetune(home, "lora", steps=1, compiled=True, family=tiny_family)
    stages.finetune(home, "lora", steps=1, family=tiny_family)
    with pytest.raises(InputError, match="lora has no use for --compile"):
        stages.generate(home, "a [V] thing", compiled=True, family=tiny_family)


def test_a_failure_is_told_at_the_end_and_stops_no_other(pair_of_subjects):
    home = pair_of_subjects
    (home / "jobs.txt").write_text("# two of three are there\n\none\nnowhere\ntwo\n")
    result = CliRunner().invoke(app, ["finetune", "--jobs", str(home / "jobs.txt"), "--steps", "1", "--json"])
    assert result.exit_code == 2 and "nowhere is not a subject directory" in result.stderr
    one, nowhere, two = json.loads(result.stdout)
    assert one["steps"] == two["steps"] == 1 and nowhere["exit_code"] == 2
    assert all((home / n / CONTROL).is_file() for n in ("one", "two"))


@pytest.mark.parametrize(("text", "reason"), [("# nothing\n", "names no subject"), (None, "cannot be read")])
def test_jobs_that_name_nothing_are_refused(tmp_path, text, reason):
    if text is not None:
        (tmp_path / "jobs.txt").write_text(text)
    with pytest.raises(InputError, match=reason):
        stages.read_jobs(tmp_path / "jobs.txt")
    assert CliRunner().invoke(app, ["finetune"]).exit_code == 2
