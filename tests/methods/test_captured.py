"""What a recording replays is what the passes do themselves: here recorded by calling them again, on the CPU."""

import dataclasses

import pytest
import tiny
import torch

from p3s_cli import config as settings
from p3s_cli import stages
from p3s_cli.config import PACES, ControlConfig, FinetuneConfig
from p3s_cli.methods import captured, p3s
from p3s_cli.methods.base import Lesson
from p3s_cli.methods.captured import CapturedLoss, Graphed
from p3s_cli.sd import images
from p3s_cli.sd.family import load
from p3s_cli.subject import Subject


def photo(path):
    """Two unlike things as `tiny.photo` draws them; that one takes its noise from where the test before left it."""
    pixels = torch.full((3, tiny.SIZE, tiny.SIZE), 0.5) + 0.02 * torch.rand(3, tiny.SIZE, tiny.SIZE)
    pixels[:, 20:44, 6:30] = torch.tensor([0.86, 0.24, 0.16])[:, None, None]
    pixels[:, 22:42, 36:58] = torch.tensor([0.2, 0.27, 0.82])[:, None, None]
    images.save_png(path, images.to_pil(pixels))
    return path


def again(work):
    """As a CUDA graph: the results stay where they are, and a replay changes what is in them."""
    results = work()

    def replay():
        for fixed, new in zip(captured._tensors(results), captured._tensors(work()), strict=True):
            with torch.no_grad():
                fixed.copy_(new)

    return replay, results


def refused(work):
    raise RuntimeError("operation not permitted when stream is capturing\nand more")


@pytest.fixture(scope="module")
def lesson(tmp_path_factory):
    folder = tmp_path_factory.mktemp("captured")
    family = load(str(tiny.build(folder / "family")), "cpu")
    made = stages.mask(photo(folder / "two.png"), ["18,32"], ["46,32"], folder / "it", "thing", family=family)
    return Lesson(family, Subject.open(made.subject), FinetuneConfig(ControlConfig(learned_weight=True), steps=3))


@pytest.fixture
def recorded_by(monkeypatch):
    """Let a way of recording stand in for CUDA's, in training and in sampling."""

    def put(record):
        loss = lambda loss, family, control, config: CapturedLoss(loss, control, family.dtype, record)  # noqa: E731
        monkeypatch.setattr(p3s, "_captured", loss)
        monkeypatch.setattr(captured, "possible", lambda device, steps: True)
        for home in ("binding", "p3s"):
            monkeypatch.setattr(f"p3s_cli.methods.{home}.possible", lambda device, steps: True)
        monkeypatch.setattr("p3s_cli.methods.forward.Graphed", lambda function: Graphed(function, record))

    return put


def learn(lesson):
    losses = []
    tensors = p3s.P3S().fit(dataclasses.replace(lesson, on_step=lambda step, total, numbers: losses.append(numbers)))
    return tensors, losses


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


def test_a_refusal_is_told_in_one_line(lesson, recorded_by, caplog):
    recorded_by(refused)
    learn(lesson)
    assert [r.message for r in caplog.records] == [
        "no CUDA graph here, going on without: operation not permitted when stream is capturing"
    ]


@pytest.mark.parametrize("record", [again, refused])
@pytest.mark.parametrize("options", [{}, {"references": 2}, {"subject_guidance": 3.0}, {"fast": True}])
def test_recorded_passes_draw_the_same_picture(lesson, recorded_by, tmp_path, record, options):
    """Two references share a recording whose results the second would overwrite, if they were not the caller's own."""
    family, root = lesson.family, tmp_path / "it"
    for i in range(2):
        stages.mask(photo(tmp_path / f"{i}.png"), ["18,32"], ["46,32"], root, "thing", family=family)
    stages.finetune(root, steps=2, lr=3e-2, family=family)
    drawn = []
    for way in (None, record):
        if way:
            recorded_by(way)
        made = stages.generate(root, "a [V] thing", n=2, steps=4, force=True, family=family, **options)
        drawn.append([images.to_tensor(images.load_image(path)) for path in made.images])
    assert all(torch.equal(a, b) for a, b in zip(*drawn, strict=True))


def test_a_recording_serves_its_shape_alone():
    calls = []

    def double(x, by):
        calls.append(len(x))
        return {"out": x * by}

    graphed = Graphed(double, again)
    first, second = graphed(torch.ones(2), 2), graphed(torch.full((2,), 3.0), 2)
    assert first["out"].tolist() == [2, 2] and second["out"].tolist() == [6, 6]
    before = len(calls)
    assert graphed(torch.ones(3), 2)["out"].tolist() == [2, 2, 2]
    assert graphed(torch.ones(2), 5)["out"].tolist() == [5, 5]
    assert len(calls) == before + 4  # two shapes more, each recorded once and replayed once


def test_nothing_is_recorded_on_a_cpu_or_for_a_few_steps():
    assert not captured.possible("cpu", 300)
    assert not captured.possible("cuda", captured.LEAST_STEPS - 1)
    assert min(pace.steps for pace in PACES.values()) >= captured.LEAST_STEPS


def test_how_it_was_computed_is_no_part_of_a_record(lesson, tmp_path):
    """As with --compile: the same is learnt and drawn, but for rounding."""
    options = settings.as_settings(lesson.config)
    assert "captured" in options
    root = tmp_path / "it"
    stages.mask(photo(tmp_path / "a.png"), ["18,32"], ["46,32"], root, "thing", family=lesson.family)
    stages.finetune(root, steps=1, family=lesson.family)
    stages.generate(root, "a [V] thing", n=1, steps=1, family=lesson.family)
    assert "captured" not in Subject.open(root).manifest.finetune.settings["config"]
    for picture in (root / "outputs").rglob("*.png"):
        if told := images.read_metadata(picture):
            assert "captured" not in told["sampling"]
