"""A run makes what is missing and nothing twice, and its numbers are the same however often it was interrupted."""

import json
from pathlib import Path

import pytest
import tiny

from p3s_cli import benches, stages
from p3s_cli.benches import run as running
from p3s_cli.benches.cases import subject_case
from p3s_cli.benches.ending import finish
from p3s_cli.benches.entries import ablations, choose, rivals
from p3s_cli.benches.evaluate import plan
from p3s_cli.benches.ledger import Ledger
from p3s_cli.config import PACES
from p3s_cli.errors import InputError, P3SError
from p3s_cli.evals.protocols import protocol
from p3s_cli.evals.scoring import Judge
from p3s_cli.lock import writing
from p3s_cli.methods.pace import Pace
from p3s_cli.sd import images
from p3s_cli.sd.family import load
from p3s_cli.sd.profile import find
from p3s_cli.stages.tuning import finetune
from p3s_cli.subject import Subject

PROMPTS = ("a [V] {} on the beach", "a [V] {} in the snow")


@pytest.fixture(scope="module")
def family(tmp_path_factory) -> Path:
    """Random weights but for CLIP's, the readers too: what is tested is who is compared with whom, and how often."""
    return tiny.build_with_readers(tmp_path_factory.mktemp("family"))


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
    metrics = {"selectivity", "identity", "CLIP-I", "CLIP-T", "identity-M", "x", "y"}
    assert {r["metric"] for r in rows} == metrics  # no words for the look-alike, so no CLIP-ES; no labels, no `prompt`
    assert len(rows) == len(metrics) * 2 * 2 and {r["protocol"] for r in rows} == {"world"}
    assert all(Path(r["file"]).is_file() and "[V]" not in r["prompt"] for r in rows)
    for metric in metrics:
        scores = [r["score"] for r in rows if r["metric"] == metric]
        assert result.methods["p3s"][metric] == pytest.approx(sum(scores) / len(scores))
    assert {r["score"] for r in rows if r["metric"] == "selectivity"} <= {0.0, 1.0}
    assert result.report.read_text().count("<img") == 4 + 1  # and what was asked for
    assert Subject.open(subject).manifest.finetune is None  # the user's subject was copied and not touched


def test_the_same_run_twice_makes_nothing_and_says_the_same(subject, monkeypatch):
    first = evaluate(subject)
    before = first.scores.read_bytes()
    monkeypatch.setattr(running.Judge, "_scores", lambda *_: pytest.fail("scored again"))
    second = evaluate(subject)
    assert second.methods == first.methods and second.scores.read_bytes() == before


def test_rows_found_again_name_their_pictures_as_they_are_named_today(subject, monkeypatch):
    monkeypatch.chdir(subject.parent)
    first = evaluate(Path(subject.name))
    monkeypatch.chdir(subject)
    second = evaluate(Path("../thing"))
    assert second.methods == first.methods and second.report.read_text().count("<img") == 4 + 1
    assert " is gone" not in second.report.read_text()


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
    for column in ("selectivity", "identity", "CLIP-I", "CLIP-T"):
        assert resumed[column] == whole[column]


def test_what_the_owner_tuned_is_judged_as_it_is(subject, monkeypatch):
    """Four steps at a rate of their own, which no recipe has; the other method tunes a copy."""
    assert evaluate(subject).methods["p3s"]["seconds"] > 0
    finetune(subject, steps=4, lr=3e-4, device="cpu")
    tuned, heard = stages.finetune, []
    monkeypatch.setattr(stages, "finetune", lambda *a, **k: (heard.append(k["method"]), tuned(*a, **k))[1])
    found = evaluate(subject, names=["p3s", "untuned"])
    assert found.methods["p3s"]["seconds"] is None  # how long that took, nobody measured
    assert heard == ["untuned"]
    (judged,) = (subject / "eval").glob("p3s-*/*/control/control.safetensors")
    assert judged.read_bytes() == (subject / "control/control.safetensors").read_bytes()
    # killed when the copy was decided, and nothing of it in its place
    copy = judged.parent.parent
    (copy / ".p3s-commit/control").mkdir(parents=True)
    judged.rename(copy / ".p3s-commit/control/control.safetensors")
    evaluate(subject, names=["p3s", "untuned"])
    assert judged.read_bytes() == (subject / "control/control.safetensors").read_bytes()
    manifest = Subject.open(subject).manifest.model_copy(update={"class_word": "toy"})
    with Subject(subject, manifest, found=True).changing():
        pass
    with pytest.raises(InputError, match="has changed since it was tuned"):
        evaluate(subject)


def test_no_tuning_of_a_comparison_is_a_recording(subject, monkeypatch):
    """P3S alone has one, and equal time is its own."""
    heard, tune = [], stages.finetune
    monkeypatch.setattr(stages, "finetune", lambda *a, **k: (heard.append(k["captured"]), tune(*a, **k))[1])
    evaluate(subject)
    assert heard == [False]


def test_to_confirm_a_guessed_class_word_costs_no_tuning(subject):
    def scored(score):
        manifest = Subject.open(subject).manifest.model_copy(update={"class_score": score})
        with Subject(subject, manifest, found=True).changing():
            pass

    scored(0.9)
    evaluate(subject)
    (control,) = (subject / "eval").glob("p3s-*/*/control/control.safetensors")
    made = control.stat()
    scored(None)
    evaluate(subject)
    assert (control.stat().st_ino, control.stat().st_mtime_ns) == (made.st_ino, made.st_mtime_ns)


def test_another_truth_gives_other_scores_of_the_same_pictures(subject, family):
    """Where the look-alike is meant, the base's own pictures are nearer to what they were farther from, and back."""
    before = evaluate(subject, names=["untuned"]).methods["untuned"]
    photo = subject / "references/00/photo.png"
    stages.mask(photo, ["46,32"], ["18,32"], subject, "thing", model=str(family), device="cpu")
    after = evaluate(subject, names=["untuned"]).methods["untuned"]
    assert after["selectivity"] == pytest.approx(1 - before["selectivity"]) and after["identity"] != before["identity"]


def test_it_is_judged_through_what_it_was_tuned_through(subject, monkeypatch):
    finetune(subject, steps=1, device="cpu")
    manifest = Subject.open(subject).manifest
    manifest.finetune.settings["base"] = str(subject.parent / "base2")
    manifest.finetune.settings["vision"] = "clip2"
    with Subject(subject, manifest, found=True).changing():
        pass

    def asked(*arguments):
        raise InputError(repr(arguments))

    monkeypatch.setitem(benches.evaluate_subject.__globals__, "load", asked)
    with pytest.raises(InputError, match="base2', 'cpu', 'auto', 'clip2'"):
        evaluate(subject)
    (subject.parent / "base2").mkdir()
    monkeypatch.chdir(subject.parent)
    with pytest.raises(InputError, match="base2', 'cpu', 'auto', 'clip2'"):
        evaluate(subject, model="base2")  # the same one, as one names it here


def test_rows_of_earlier_settings_stay_in_the_file_and_out_of_the_means(subject):
    evaluate(subject)
    result = evaluate(subject, seed=5)
    rows = [json.loads(line) for line in result.scores.read_text().splitlines()]
    assert {r["seed"] for r in rows} == {0, 1, 5, 6}
    latest = [r["score"] for r in rows if r["metric"] == "identity" and r["seed"] >= 5]
    assert result.methods["p3s"]["identity"] == pytest.approx(sum(latest) / 4) and len(latest) == 4
    assert result.report.read_text().count('class="shown"') == 4


def test_a_metric_model_that_is_missing_is_said_before_anything_is_tuned(subject):
    with pytest.raises(InputError, match="with `p3s fetch dreambooth`"):
        evaluate(subject, protocol_name="dreambooth")
    assert not (subject / "eval").exists()


@pytest.mark.parametrize("text", ["", "[]", '{"tune/p3s": {"dog": "long"}}', '{"tune/p3s": {"dog": NaN}}'])
def test_measured_seconds_that_are_damaged_are_one_sentence(tmp_path, text):
    (tmp_path / "measured.json").write_text(text)
    with pytest.raises(InputError, match="measured.json is damaged; remove it"):
        Ledger(tmp_path / "measured.json")


def test_of_what_two_files_say_of_one_case_the_run_s_own_counts_and_once(tmp_path):
    for name, seconds in (("other", {"a": 100.0, "b": 20.0}), ("own", {"a": 40.0})):
        (tmp_path / f"{name}.json").write_text(json.dumps({"tune/p3s": seconds}))
    assert Ledger(tmp_path / "own.json", [tmp_path / "other.json"]).mean("tune/p3s") == 30.0


def test_two_evaluations_of_one_subject_do_not_mix(subject):
    with writing(subject, "p3s eval"), pytest.raises(P3SError, match="is being written by p3s eval, process"):
        evaluate(subject)


def test_a_tuning_that_goes_on_counts_as_if_it_had_been_seen_whole(monkeypatch):
    """Steps 6 to 10 in 10 s after 3 s of setup: the five before them took 10 s more."""
    clock = iter([100.0, 103.0, 105.0, 107.0, 109.0, 111.0, 113.0, 114.0])
    monkeypatch.setattr(running.time, "monotonic", lambda: next(clock))
    watch = running._Watch()
    for done in range(5, 11):
        watch("tuning, loss 1", done, 10)
    assert watch.seconds() == pytest.approx(14.0 + 10.0)


def test_a_tuning_whose_second_half_goes_on_counts_so_too(monkeypatch):
    """Of 8 steps the first half's 4 come back at once, then 2 of the second's; the last 2 take 1 s each."""
    clock = iter([0.0, 0.0, 0.0, 1.0, 2.0, 2.0])
    monkeypatch.setattr(running.time, "monotonic", lambda: next(clock))
    watch = running._Watch()
    for done in (4, 6, 7, 8):
        watch("tuning, loss 1", done, 8)
    assert watch.seconds() == pytest.approx(8.0)


def test_a_tuning_from_the_first_step_on_is_timed_as_it_was(monkeypatch):
    clock = iter([100.0, 103.0, 114.0])
    monkeypatch.setattr(running.time, "monotonic", lambda: next(clock))
    watch = running._Watch()
    watch("tuning, loss 1", 1, 10)
    assert watch.seconds() == pytest.approx(14.0)


def test_equal_time_is_p3ss_own_tuning_time_and_the_table_says_so(subject, monkeypatch):
    family, heard = load(Subject.open(subject).manifest.model, "cpu"), []
    judge = Judge(protocol("world"), family.folder)
    run = running.Run(subject / "eval", family, judge, running.Plan(1), lambda *_: None)
    monkeypatch.setattr(running.pace, "measure", lambda *_: Pace(setup=1.0, step=0.5))
    tune = stages.finetune
    monkeypatch.setattr(stages, "finetune", lambda *a, **k: (heard.append(k["steps"]), tune(*a, **k | {"steps": 2}))[1])
    monkeypatch.setattr(running._Watch, "seconds", lambda self: 21.0)
    case = subject_case(subject, family.vision, PROMPTS[:1])
    entries = rivals(["p3s", "lora"], ["p3s", "lora"], ("equal",))
    outcome = run.evaluate(entries, [case])
    assert heard == [None, 40]  # (21 - 1) / 0.5
    assert outcome.budget == 21.0 and outcome.equal_steps == {"lora, equal time": 40}
    heard.clear()
    run._ledger.add(f"tune/{entries[0].tuning}", case.name, 22.0)  # a mean that moved a little: the same budget
    run.evaluate(entries[1:], [case])
    run._ledger.add(f"tune/{entries[0].tuning}", case.name, 11.0)  # P3S has become twice as fast
    run.evaluate(entries[1:], [case])
    assert heard == [40, 20]
    run._ledger.add(f"tune/{entries[0].tuning}", case.name, 21.0)
    result = finish(run, entries, outcome, "title", [case])
    said = "lora, equal time: 40 steps of tuning, as many as fit"
    for text in ("\n".join(result.table), result.report.read_text()):
        assert said in text and "21.0 s" in text and "tuning, s" in text and "lora was given the reference" in text


def test_names_that_nobody_has_are_refused(subject):
    with pytest.raises(InputError, match="dreambooth"):
        rivals(["dreamboth"], ["p3s", "dreambooth"], ("published",))
    with pytest.raises(InputError, match="without RNGR"):
        choose(ablations(find("world")), ["without everything"], lambda e: e.name)
    with pytest.raises(InputError, match=r"\[V\]"):
        benches.evaluate_subject(subject, prompts=["a dog"], device="cpu")
    with pytest.raises(InputError, match="world or dreambench"):
        benches.evaluate(bench="imagenet")


def test_p3s_and_the_untuned_base_have_one_budget_and_rivals_two():
    names = [e.name for e in rivals(["p3s", "lora", "untuned"], ["p3s", "lora", "untuned"], ("published", "equal"))]
    assert names == ["p3s", "lora", "lora, equal time", "untuned"]


def test_an_option_that_would_not_be_heeded_is_refused():
    for options, word in (
        ({"shard": "1/2"}, "--shard is a part of a benchmark"),
        ({"bench": "dreambench", "quick": True}, "--quick belongs to --bench world"),
        ({"bench": "world", "prompts": ["a [V] dog"]}, "--prompt belongs to one subject"),
    ):
        with pytest.raises(InputError, match=word):
            benches.evaluate(**options)


def test_fast_has_its_own_steps_and_quick_twenty():
    assert plan(fast=True, quick=True).sampling == plan(fast=True).sampling == {"fast": True}
    quick = plan(quick=True)
    assert quick.sampled({"fast": True}) == {"fast": True}  # the ablation's row
    assert quick.sampled({"guidance": 2.0}) == {"steps": 20, "guidance": 2.0}


def test_fast_is_the_pace_of_every_method(subject):
    result = evaluate(subject, names=("p3s", "untuned", "p3s"), fast=True)
    files = {json.loads(line)["file"] for line in result.scores.read_text().splitlines()}
    paces = [images.read_metadata(Path(f))["sampling"] for f in files]
    assert len(files) == 2 * 2 * 2 and list(result.methods) == ["p3s", "untuned"]  # named twice, it takes part once
    assert {(p["scheduler"], p["reuse"]) for p in paces} == {(PACES[True].scheduler, PACES[True].reuse)}
    gap = result.methods["p3s"]["identity"] - result.methods["untuned"]["identity"]  # as many images of each
    assert result.differences["untuned"]["identity"] == (pytest.approx(gap), None, None)  # one subject: no interval
    assert any(line.startswith("| p3s less |") for line in result.table)
    evaluate(subject)
    measured = json.loads((subject / "eval/measured.json").read_text())
    kinds = [kind for kind in measured if kind.startswith("image/p3s-")]
    assert len(kinds) == 2 and all(len(measured[kind]) == 2 for kind in kinds)  # two prompts at each pace, times apart
