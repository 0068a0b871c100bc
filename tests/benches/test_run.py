"""A run makes what is missing and nothing twice, and its numbers are the same however often it was interrupted."""

import json
import shutil
from pathlib import Path

import pytest
import tiny
import torch

from p3s_cli import benches, stages
from p3s_cli.benches import run as running
from p3s_cli.benches.entries import ablations, choose, rivals
from p3s_cli.errors import InputError, P3SError
from p3s_cli.subject import Subject
from p3s_cli.world.readers import build_identity_encoder, build_label_reader

PROMPTS = ("a [V] {} on the beach", "a [V] {} in the snow")


@pytest.fixture(scope="module")
def family(tmp_path_factory, world) -> Path:
    """Random weights but for CLIP's, the readers too: what is tested is who is compared with whom, and how often."""
    folder = tiny.build(tmp_path_factory.mktemp("family"))
    shutil.copytree(world.folder / "clip", folder / "clip", dirs_exist_ok=True)  # the protocol asks for 128 pixels
    torch.manual_seed(0)
    build_label_reader().save_pretrained(folder / "readers/labels")
    build_identity_encoder().save_pretrained(folder / "readers/identity")
    return folder


@pytest.fixture
def subject(tmp_path, family) -> Path:
    photo = tiny.photo(tmp_path / "two.png")
    made = stages.mask(photo, ["18,32"], ["46,32"], tmp_path / "thing", "thing", model=str(family), device="cpu")
    return made.subject


@pytest.fixture(autouse=True)
def two_steps(monkeypatch):
    """Tuning and sampling of two steps: how good the images are is not the question here."""
    tune, draw = stages.finetune, stages.generate
    monkeypatch.setattr(stages, "finetune", lambda *a, **k: tune(*a, **k | {"steps": 2}))
    monkeypatch.setattr(stages, "generate", lambda *a, **k: draw(*a, **k | {"steps": 2}))


def evaluate(subject: Path, **options):
    return benches.evaluate_subject(subject, prompts=PROMPTS, n=2, device="cpu", **options)


def test_a_subject_gets_rows_for_every_image_and_metric_that_can_be_had(subject):
    result = evaluate(subject)
    rows = [json.loads(line) for line in result.scores.read_text().splitlines()]
    metrics = {"selectivity", "identity", "prompt", "CLIP-I", "CLIP-T", "identity-M", "x", "y"}
    assert {r["metric"] for r in rows} == metrics  # no words for the look-alike, so no CLIP-ES
    assert len(rows) == len(metrics) * 2 * 2 and {r["protocol"] for r in rows} == {"world"}
    assert all(Path(r["file"]).is_file() and "[V]" not in r["prompt"] for r in rows)
    for metric in metrics:
        scores = [r["score"] for r in rows if r["metric"] == metric]
        assert result.methods["p3s"][metric] == pytest.approx(sum(scores) / len(scores))
    assert {r["score"] for r in rows if r["metric"] == "selectivity"} <= {0.0, 1.0}
    assert result.report.read_text().count("<img") == 4
    assert Subject.open(subject).manifest.finetune is None  # the user's subject was copied and not touched


def test_the_same_run_twice_makes_nothing_and_says_the_same(subject, monkeypatch):
    first = evaluate(subject)
    before = first.scores.read_bytes()
    monkeypatch.setattr(running.Judge, "_scores", lambda *_: pytest.fail("scored again"))
    second = evaluate(subject)
    assert second.methods == first.methods and second.scores.read_bytes() == before


def test_interrupted_in_the_middle_it_comes_to_the_same_numbers(subject, tmp_path, monkeypatch):
    draw, calls = stages.generate, []

    def dies(*args, **options):
        calls.append(args)
        if len(calls) == 2:
            raise P3SError("killed here")
        return draw(*args, **options)

    with monkeypatch.context() as patch, pytest.raises(P3SError, match="killed"):
        patch.setattr(stages, "generate", dies)
        evaluate(subject)
    resumed = evaluate(subject).methods["p3s"]
    other = tmp_path / "fresh" / subject.name
    running._copy_masked(subject, other)
    whole = evaluate(other, model=Subject.open(subject).manifest.model).methods["p3s"]
    for column in ("selectivity", "identity", "prompt", "CLIP-I", "CLIP-T"):
        assert resumed[column] == whole[column]


def test_names_that_nobody_has_are_refused(subject):
    with pytest.raises(InputError, match="dreambooth"):
        rivals(["dreamboth"], ["p3s", "dreambooth"], ("published",))
    with pytest.raises(InputError, match="without RNGR"):
        choose(ablations(4.0, 2.0), ["without everything"], lambda e: e.name)
    with pytest.raises(InputError, match=r"\[V\]"):
        benches.evaluate_subject(subject, prompts=["a dog"], device="cpu")
    with pytest.raises(InputError, match="world or dreambench"):
        benches.evaluate(bench="imagenet")


def test_p3s_and_the_untuned_base_have_one_budget_and_rivals_two():
    names = [e.name for e in rivals(["p3s", "lora", "untuned"], ["p3s", "lora", "untuned"], ("published", "equal"))]
    assert names == ["p3s", "lora", "lora, equal time", "untuned"]


def test_an_option_that_would_not_be_heeded_is_refused():
    for options, word in (
        ({"bench": "world", "shard": "1/2"}, "--shard belongs to --bench dreambench"),
        ({"bench": "dreambench", "quick": True}, "--quick belongs to --bench world"),
        ({"bench": "world", "prompts": ["a [V] dog"]}, "--prompt belongs to one subject"),
    ):
        with pytest.raises(InputError, match=word):
            benches.evaluate(**options)
