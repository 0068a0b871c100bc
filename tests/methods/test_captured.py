"""What a recording replays is what the passes do themselves: here recorded by calling them again, on the CPU."""

import dataclasses
import gc
import itertools
import weakref
from unittest import mock

import pytest
import tiny
import torch
from recordings import again
from torch import nn

from p3s_cli import config as settings
from p3s_cli import stages
from p3s_cli.config import PACES, ControlConfig, FinetuneConfig
from p3s_cli.methods import p3s
from p3s_cli.methods.base import Lesson
from p3s_cli.sd import graphs, images, nested
from p3s_cli.sd.captured import CapturedLoss, Graphed
from p3s_cli.sd.determinism import exact
from p3s_cli.sd.family import load
from p3s_cli.subject import Subject


def refused(work):
    raise RuntimeError("operation not permitted when stream is capturing\nand more")


def lies(spoil, after=0):
    """A recording whose replays, but for the first `after`, leave `spoil(tensor)` in the place of each result."""

    def record(work):
        replay, results = again(work)
        count = itertools.count()

        def lie():
            replay()
            if next(count) >= after:
                for t in nested.tensors(results):
                    if t.is_floating_point() and not isinstance(t, nn.Parameter):  # a gate is the model's own
                        t.detach().copy_(spoil(t.detach()))

        return lie, results

    return record


def stale(work):
    """A recording that never hears of new inputs."""
    replay, results = again(work)
    replay()
    return lambda: None, results


def forgets(work):
    """A recording whose replays leave out to take over what the step before has learnt."""
    taken = graphs.copy

    def copied(into, source):
        if not (into and isinstance(into[0], nn.Parameter)):
            taken(into, source)

    replay, results = again(work)

    def forget():
        with mock.patch.object(graphs, "copy", copied):
            replay()

    return forget, results


WITHOUT = "no CUDA graph here, going on without"
OTHER = f"{WITHOUT}: a replay gave other numbers than its work, apart by "
LIARS = {"nan": lies(lambda t: t * float("nan")), "larger": lies(lambda t: 1.05 * t), "stale": stale}


@pytest.fixture(scope="module")
def lesson(tmp_path_factory):
    folder = tmp_path_factory.mktemp("captured")
    family = load(str(tiny.build(folder / "family")), "cpu")
    made = stages.mask(tiny.photo(folder / "two.png"), ["18,32"], ["46,32"], folder / "it", "thing", family=family)
    return Lesson(family, Subject.open(made.subject), FinetuneConfig(ControlConfig(learned_weight=True), steps=3))


@pytest.fixture
def recorded_by(monkeypatch):
    """Let a way of recording stand in for CUDA's, in training and in sampling."""

    def put(record):
        loss = lambda loss, family, control, config: CapturedLoss(loss, control, family.dtype, record)  # noqa: E731
        monkeypatch.setattr(p3s, "_captured", loss)
        monkeypatch.setattr(graphs, "possible", lambda device, steps: True)
        monkeypatch.setattr(graphs, "_now", lambda: 0.0)  # here a replay takes as long as its work
        for home in ("binding", "p3s"):
            monkeypatch.setattr(f"p3s_cli.methods.{home}.possible", lambda device, steps: True)
        monkeypatch.setattr("p3s_cli.methods.forward.Graphed", lambda function: Graphed(function, record))

    return put


def learn(lesson):
    losses = []
    tensors = p3s.P3S().fit(dataclasses.replace(lesson, on_step=lambda step, total, numbers: losses.append(numbers)))
    return tensors, losses


def heard(monkeypatch, name):
    """A list that grows with every call of this half of the loss."""
    calls, whole = [], getattr(p3s._Loss, name)
    monkeypatch.setattr(p3s._Loss, name, lambda self, *given: calls.append(name) or whole(self, *given))
    return calls


@pytest.mark.parametrize("record", [again, refused])
def test_a_recorded_step_learns_the_same_bits(lesson, recorded_by, record):
    """The same in float32: new draws reach the recording at every step, and so does what the step before has learnt.

    Where a card refuses to record, the eager step goes on with what was drawn already.
    """
    plain, told = learn(lesson)
    recorded_by(record)
    tensors, heard = learn(lesson)
    assert heard == told and len({numbers["loss"] for numbers in heard}) == 3
    assert all(torch.equal(tensors[name], plain[name]) for name in plain)


@pytest.mark.parametrize("liar", [*LIARS.values(), forgets], ids=[*LIARS, "forgets"])
def test_a_step_recorded_wrongly_is_learnt_without(lesson, recorded_by, caplog, liar):
    """The same bits, and one line: its replays are held against the work itself before one of them counts."""
    plain, told = learn(lesson)
    recorded_by(liar)
    tensors, heard = learn(lesson)
    assert heard == told and all(torch.equal(tensors[name], plain[name]) for name in plain)
    (record,) = caplog.records
    assert record.message.startswith(OTHER)


def test_a_recording_that_holds_is_kept(lesson, recorded_by, monkeypatch, caplog):
    """Its first step alone is eager: all others are replays."""
    recorded_by(again)
    judged = heard(monkeypatch, "judge")
    learn(lesson)
    assert len(judged) == 1 and not caplog.records


def test_a_step_that_later_goes_wrong_is_made_again(lesson, recorded_by, caplog):
    """Its replays hold on two draws, and at the second step; at the third they are no numbers, where eager ones are."""
    plain, told = learn(lesson)
    recorded_by(lies(lambda t: t * float("nan"), after=3))
    tensors, heard = learn(lesson)
    assert heard == told and all(torch.equal(tensors[name], plain[name]) for name in plain)
    assert [r.message for r in caplog.records] == [f"{WITHOUT}: a replay was not finite where its work is"]


def test_a_step_that_is_not_finite_either_way_is_no_fault_of_the_recording(lesson, recorded_by, monkeypatch, caplog):
    """It is skipped, as without a recording, and the recording stays."""
    whole, steps = p3s._Loss.draw, itertools.count()

    def draw(self, step, generator):
        drawn = whole(self, step, generator)
        return drawn if next(steps) != 2 else dataclasses.replace(drawn, noise=drawn.noise * float("nan"))

    monkeypatch.setattr(p3s._Loss, "draw", draw)
    recorded_by(again)
    judged = heard(monkeypatch, "judge")
    _, numbers = learn(dataclasses.replace(lesson, config=dataclasses.replace(lesson.config, steps=5)))
    assert numbers[-1]["skipped"] == 1 and len(judged) == 2 and not caplog.records


def broken_off(work):
    """As CUDA: what ends the recording says only that something broke it, and that is what tells why."""
    try:
        refused(work)
    finally:
        raise RuntimeError("operation failed due to a previous error during capture")


@pytest.mark.parametrize(
    ("record", "after"),
    [
        (refused, "operation not permitted when stream is capturing"),
        (
            broken_off,
            "operation failed due to a previous error during capture, after: operation not permitted when stream is capturing",
        ),
    ],
)
def test_a_refusal_is_told_in_one_line(lesson, recorded_by, caplog, record, after):
    recorded_by(record)
    learn(lesson)
    assert [r.message for r in caplog.records] == [f"{WITHOUT}: {after}"]


@pytest.mark.parametrize("passes", ["training", "sampling"])
def test_what_was_recorded_goes_with_the_run_and_waits_for_no_collector(lesson, recorded_by, passes):
    """A card has no room for the graphs of runs that are over."""
    works = []

    def record(work):
        works.append(weakref.ref(work))
        return again(work)

    gc.disable()
    try:
        if passes == "training":
            recorded_by(record)
            learn(lesson)
        else:
            graphed = Graphed(doubled([]), record)
            graphed(torch.ones(2), 2)
            del graphed
        assert works and not any(work() for work in works)
    finally:
        gc.enable()


@pytest.mark.parametrize("record", [again, refused, *LIARS.values()], ids=["again", "refused", *LIARS])
@pytest.mark.parametrize("options", [{}, {"references": 2, "subject_guidance": 3.0}, {"fast": True}])
def test_recorded_passes_draw_the_same_picture(lesson, recorded_by, tmp_path, record, options):
    """Two references share a recording whose results the second would overwrite, if they were not the caller's own."""
    family, root = lesson.family, tmp_path / "it"
    for i in range(2):
        stages.mask(tiny.photo(tmp_path / f"{i}.png"), ["18,32"], ["46,32"], root, "thing", family=family)
    stages.finetune(root, steps=2, lr=3e-2, family=family)
    drawn = []
    for way in (None, record):
        if way:
            recorded_by(way)
        made = stages.generate(root, "a [V] thing", n=2, steps=4, force=True, family=family, **options)
        drawn.append([images.to_tensor(images.load_image(path)) for path in made.images])
    assert all(torch.equal(a, b) for a, b in zip(*drawn, strict=True))


class Slopes:
    """A loss linear in what is trained, of as many inputs as the step says; beside it a weight that is not trained."""

    def __init__(self, sizes):
        self.model, self.sizes = nn.Linear(1, 1), sizes
        self.model.bias.requires_grad_(False)

    def draw(self, step, generator):
        return torch.full((self.sizes[step],), step + 1.0)

    def compute(self, drawn, model):
        return (drawn * model.weight[0]).sum() + model.bias.sum(), {}

    def judge(self, drawn):
        return self.compute(drawn, self.model)


def test_each_shape_of_what_is_drawn_has_a_recording(monkeypatch):
    """The gradient is the sum of the inputs, whichever recording gave it; what is not trained gets none.

    A shape that comes once, or for the first time, is not recorded; one that comes again finds its recording.
    """
    monkeypatch.setattr(graphs, "_now", lambda: 0.0)
    made, sizes = [], (3, 3, 3, 2, 3, 2, 2, 2, 3)
    loss = Slopes(sizes)
    captured = CapturedLoss(loss, loss.model, torch.float32, lambda work: made.append(work) or again(work))
    for step, size in enumerate(sizes):
        computed = captured(step, torch.Generator())
        if computed.value.requires_grad:
            computed.value.backward()
        assert loss.model.weight.grad.item() == size * (step + 1) and loss.model.bias.grad is None
        assert len(made) == (0, 1, 1, 1, 1, 1, 2, 2, 2)[step]
        loss.model.weight.grad = None


def doubled(calls):
    def double(x, by):
        calls.append(len(x))
        return {"out": x * by}

    return double


def test_a_recording_serves_its_shape_alone(monkeypatch):
    monkeypatch.setattr(graphs, "_now", lambda: 0.0)
    graphed = Graphed(doubled(calls := []), again)
    for number in (1.0, 3.0, 4.0):  # proved twice, then replayed
        assert graphed(torch.full((2,), number), 2)["out"].tolist() == [2 * number] * 2
    assert len(calls) == 1 + 2 * 2 + 1
    for x, by in ((torch.ones(3), 2), (torch.ones(2), 5)):
        calls.clear()
        assert graphed(x, by)["out"].tolist() == [by] * len(x)
        assert len(calls) == 3  # another shape: recorded, run and replayed


@pytest.mark.parametrize("liar", LIARS)
def test_a_pass_recorded_wrongly_is_run_instead(monkeypatch, caplog, liar):
    monkeypatch.setattr(graphs, "_now", lambda: 0.0)
    graphed = Graphed(doubled(calls := []), LIARS[liar])
    found = [graphed(torch.full((2,), number), 2)["out"].tolist() for number in (1.0, 3.0, 4.0)]
    assert found == [[2, 2], [6, 6], [8, 8]] and len(caplog.records) == 1
    calls.clear()
    graphed(torch.ones(2), 2)
    assert len(calls) == 1


def test_a_recording_that_takes_longer_than_its_work_is_dropped(monkeypatch, caplog):
    """Told by the second replay: the first one brings the graph to the card."""
    times = iter([0.0, 0.1, 0.0, 0.9, 0.0, 0.1, 0.0, 0.2])
    monkeypatch.setattr(graphs, "_now", lambda: next(times))
    graphed = Graphed(doubled([]), again)
    assert [graphed(torch.ones(2), 2)["out"].tolist() for _ in range(3)] == [[2, 2]] * 3
    assert [r.message for r in caplog.records] == [f"{WITHOUT}: a replay took 200 ms, its work 100"]


def test_what_must_repeat_its_bits_hangs_on_no_clock(monkeypatch, caplog):
    times = iter([0.0, 0.1, 0.0, 0.9, 0.0, 0.1, 0.0, 0.2])
    monkeypatch.setattr(graphs, "_now", lambda: next(times))
    graphed = Graphed(doubled(calls := []), again)
    with exact(True):
        assert [graphed(torch.ones(2), 2)["out"].tolist() for _ in range(3)] == [[2, 2]] * 3
    assert not caplog.records and len(calls) == 1 + 2 * 2 + 1  # the third is a replay alone


def test_nothing_is_recorded_on_a_cpu_or_for_a_few_steps():
    assert not graphs.possible("cpu", 300)
    assert not graphs.possible("cuda", graphs.LEAST_STEPS - 1)
    assert min(pace.steps for pace in PACES.values()) >= graphs.LEAST_STEPS


def test_how_it_was_computed_is_no_part_of_a_record(lesson, tmp_path):
    """As with --compile: the same is learnt and drawn, but for rounding."""
    options = settings.as_settings(lesson.config)
    assert "captured" in options
    root = tmp_path / "it"
    stages.mask(tiny.photo(tmp_path / "a.png"), ["18,32"], ["46,32"], root, "thing", family=lesson.family)
    stages.finetune(root, steps=1, family=lesson.family)
    stages.generate(root, "a [V] thing", n=1, steps=1, family=lesson.family)
    assert "captured" not in Subject.open(root).manifest.finetune.settings["config"]
    for picture in (root / "outputs").rglob("*.png"):
        if told := images.read_metadata(picture):
            assert "captured" not in told["sampling"]
