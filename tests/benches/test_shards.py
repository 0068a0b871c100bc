"""Shards work in one folder at the same time, and the whole then has nothing left to do but count."""

import contextlib

import pytest
import tiny

from p3s_cli import stages
from p3s_cli.benches import run as running
from p3s_cli.benches import shards
from p3s_cli.benches.cases import subject_case
from p3s_cli.benches.entries import rivals
from p3s_cli.errors import P3SError
from p3s_cli.evals.protocols import protocol
from p3s_cli.evals.scoring import Judge
from p3s_cli.lock import writing
from p3s_cli.methods.pace import Pace
from p3s_cli.sd.family import load

PROMPTS = ("a [V] {} on the beach",)


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    return load(str(tiny.build_with_readers(tmp_path_factory.mktemp("family"))), "cpu")


@pytest.fixture(scope="module")
def cases(tmp_path_factory, family):
    folder = tmp_path_factory.mktemp("subjects")
    photo = tiny.photo(folder / "two.png")
    sides = {"left": ["18,32"], "right": ["46,32"]}
    made = [stages.mask(photo, at, (), folder / name, "thing", family=family).subject for name, at in sides.items()]
    return [subject_case(root, family.vision, PROMPTS) for root in made]


@pytest.fixture
def tuned(monkeypatch):
    """Two steps each, whatever was asked for; returns what was asked for, by case, of what was really tuned."""
    asked, tune, draw = {}, stages.finetune, stages.generate

    def tuning(directory, **options):
        made = tune(directory, **options | {"steps": 2})
        if not made.unchanged:
            asked[directory.parent.name.split("-")[0], directory.name] = options["steps"]
        return made

    monkeypatch.setattr(stages, "finetune", tuning)
    monkeypatch.setattr(stages, "generate", lambda *a, **k: draw(*a, **k | {"steps": 2}))
    return asked


def run(work, family, shard=None):
    judge = Judge(protocol("world"), family.folder)
    return running.Run(work, family, judge, running.Plan(1), lambda *_: None, shard)


def test_the_whole_finds_all_that_its_shards_made_with_each_cases_own_steps(
    tmp_path, family, cases, tuned, monkeypatch
):
    entries = rivals(["p3s", "lora"], ["p3s", "lora"], ("equal",))
    with contextlib.ExitStack() as held:
        for which in ("1/2", "2/2"):
            held.enter_context(writing(shards.desk(tmp_path, which), "p3s eval"))  # at the same time
        parts = [run(tmp_path, family, which) for which in ("1/2", "2/2")]
        for number, part in enumerate(parts, 1):
            monkeypatch.setattr(running.pace, "measure", lambda *_, n=number: Pace(setup=0.0, step=1.0 / n))
            monkeypatch.setattr(running._Watch, "seconds", lambda self: 10.0)
            part.evaluate(entries, shards.pick(cases, f"{number}/2"))
    assert tuned == {("p3s", "left"): None, ("p3s", "right"): None, ("lora", "left"): 10, ("lora", "right"): 20}
    tuned.clear()
    monkeypatch.setattr(running.Judge, "_scores", lambda *_: pytest.fail("scored again"))
    whole = run(tmp_path, family)
    steps, given = [], stages.finetune
    monkeypatch.setattr(stages, "finetune", lambda d, **k: (steps.append(k["steps"]), given(d, **k))[1])
    outcome = whole.evaluate(entries, cases)
    assert not tuned and steps == [None, None, 10, 20]
    halves = [part.outcome(entries).means["p3s"]["identity"].value for part in parts]
    assert outcome.means["p3s"]["identity"].value == pytest.approx(sum(halves) / 2)
    assert outcome.means["p3s"]["identity"].subjects == 2 and outcome.budget == 10.0
    whole.rows.gather()
    lines = [(tmp_path / folder / "scores.jsonl").read_text() for folder in ("", "shard-1-of-2", "shard-2-of-2")]
    assert lines[0] and sorted(lines[0].splitlines()) == sorted("".join(lines[1:]).splitlines())


def test_neither_the_whole_nor_a_shard_that_goes_on_counts_steps_anew_where_shards_took_unlike_times(
    tmp_path, family, cases, tuned, monkeypatch
):
    entries, measured = rivals(["p3s", "lora"], ["p3s", "lora"], ("equal",)), []
    monkeypatch.setattr(running.pace, "measure", lambda *_: measured.append(1) or Pace(setup=0.0, step=1.0))
    for number, seconds in ((1, 140.0), (2, 180.0)):
        monkeypatch.setattr(running._Watch, "seconds", lambda self, s=seconds: s)
        run(tmp_path, family, f"{number}/2").evaluate(entries, shards.pick(cases, f"{number}/2"))
    assert len(measured) == 2 and [tuned["lora", side] for side in ("left", "right")] == [140, 180]
    tuned.clear()
    measured.clear()
    run(tmp_path, family, "1/2").evaluate(entries, cases[:1])
    for _ in range(2):
        outcome = run(tmp_path, family).evaluate(entries, cases)
    assert not measured and not tuned
    assert outcome.budget == 160.0 and outcome.equal_steps == {"lora, equal time": 160}


def test_every_item_is_in_one_shard():
    found = [shards.pick("abcdefg", f"{i}/3") for i in (1, 2, 3)]
    assert sorted(sum(found, [])) == list("abcdefg") and shards.pick("abc", None) == list("abc")


def test_the_whole_and_a_shard_are_not_at_work_at_once(tmp_path):
    with shards.at_work(tmp_path, "1/2", "p3s eval"), shards.at_work(tmp_path, "2/2", "p3s eval"):
        with pytest.raises(P3SError, match="shard-2-of-2 is being written by p3s eval, process"):
            with shards.at_work(tmp_path, None, "p3s eval"):
                pass
    with shards.at_work(tmp_path, None, "p3s eval"), pytest.raises(P3SError, match="is being written by p3s eval"):
        with shards.at_work(tmp_path, "1/2", "p3s eval"):
            pass
