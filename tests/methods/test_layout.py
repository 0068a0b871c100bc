"""A card's layout of convolutions is a matter of speed: here on the CPU, where it is as good as any other."""

import copy
import dataclasses
from unittest import mock

import pytest
import tiny
import torch
from recordings import again
from test_captured import lies
from torch import nn

from p3s_cli import methods, stages
from p3s_cli.config import MEMORY, ControlConfig, FinetuneConfig
from p3s_cli.methods import p3s
from p3s_cli.methods.base import Lesson
from p3s_cli.sd import devices, graphs
from p3s_cli.sd.captured import CapturedLoss
from p3s_cli.sd.family import load
from p3s_cli.sd.train import Checkpoint
from p3s_cli.subject import Subject

HALF = ("cuda", torch.bfloat16)


@pytest.fixture(scope="module")
def lesson(tmp_path_factory):
    folder = tmp_path_factory.mktemp("layout")
    family = load(str(tiny.build(folder / "family")), "cpu")
    made = stages.mask(tiny.photo(folder / "two.png"), ["18,32"], ["46,32"], folder / "it", "thing", family=family)
    return Lesson(family, Subject.open(made.subject), FinetuneConfig(ControlConfig(), steps=4, lr=1e-2, captured=True))


@pytest.fixture
def laid_out(monkeypatch):
    """As if the family were on a card in half precision; the folder of modules it was asked for."""
    real = devices.channels_last
    monkeypatch.setattr(p3s, "channels_last", lambda device, dtype, *modules: real(*HALF, *modules))


def filed(module):
    return all(p.is_contiguous() for p in module.parameters())


def test_weights_are_turned_for_a_while_and_are_the_same_numbers():
    module = nn.Sequential(nn.Conv2d(4, 8, 3), nn.Conv2d(8, 4, 1), nn.Linear(4, 2))
    before = copy.deepcopy(module.state_dict())
    with devices.channels_last(*HALF, module):
        assert module[0].weight.is_contiguous(memory_format=torch.channels_last) and not filed(module)
    assert filed(module) and all(torch.equal(t, before[n]) for n, t in module.state_dict().items())


def test_what_was_so_before_stays_so():
    module = nn.Conv2d(4, 8, 3).to(memory_format=torch.channels_last)
    with devices.channels_last(*HALF, module):
        pass
    assert not filed(module)


@pytest.mark.parametrize("where", [("cpu", torch.bfloat16), ("cuda", torch.float32), ("mps", torch.float16)])
def test_nothing_is_turned_elsewhere(where):
    module = nn.Conv2d(4, 8, 3)
    with devices.channels_last(*where, module):
        assert filed(module)


def test_the_same_is_learnt_but_for_rounding(lesson, laid_out):
    """Sums in another order are the only difference: four steps in float32 leave it below a hundredth of what was learnt."""
    with mock.patch.object(p3s, "channels_last", lambda device, dtype, *modules: devices.channels_last("cpu", dtype)):
        plain = p3s.P3S().fit(lesson)
    turned = p3s.P3S().fit(lesson)
    moved = {n: t for n, t in plain.items() if n.startswith("zero_")}  # from zero
    apart = sum((turned[n] - t).square().sum() for n, t in moved.items())
    assert apart.sqrt() < 1e-2 * sum(t.square().sum() for t in moved.values()).sqrt()
    assert filed(lesson.family.unet)


def test_the_layout_is_left_out_where_seconds_are_compared(lesson):
    """Equal time leaves out recordings, which rivals lack; they lack this as well."""
    how = dataclasses.replace(lesson.config, captured=False, steps=1)
    with mock.patch.object(p3s, "channels_last", side_effect=AssertionError):
        p3s.P3S().fit(dataclasses.replace(lesson, config=how))


def test_a_run_that_goes_on_is_the_run_that_was_not_interrupted(lesson, laid_out, tmp_path):
    """Its checkpoint holds numbers, not their places."""

    class Stop(Exception):
        pass

    def stop(step, total, numbers):
        if step == 2:
            raise Stop

    whole, checkpoint = p3s.P3S().fit(lesson), Checkpoint(tmp_path / "run", every=0.0)
    with pytest.raises(Stop):
        p3s.P3S().fit(dataclasses.replace(lesson, on_step=stop, checkpoint=checkpoint))
    assert filed(lesson.family.unet)  # after a fault as well
    resumed = p3s.P3S().fit(dataclasses.replace(lesson, checkpoint=checkpoint))
    assert all(torch.equal(t, whole[n]) for n, t in resumed.items())


@pytest.mark.parametrize(
    "record", [again, lies(lambda t: t * float("nan"), after=3)], ids=["holds", "later not finite"]
)
def test_recorded_steps_learn_the_same_bits_in_it(lesson, laid_out, monkeypatch, record):
    """The gradients that a recording leaves, and those of a step that is made again, lie as the optimiser wants them."""
    plain = p3s.P3S().fit(lesson)
    monkeypatch.setattr(graphs, "_now", lambda: 0.0)
    recorded = lambda loss, family, control, config: CapturedLoss(loss, control, family.dtype, record)  # noqa: E731
    monkeypatch.setattr(p3s, "_captured", recorded)
    assert all(torch.equal(t, plain[n]) for n, t in p3s.P3S().fit(lesson).items())


@pytest.mark.parametrize("memory", ["16", "8"])
def test_a_small_card_s_optimiser_takes_it(lesson, laid_out, memory):
    """Its moments are packed in blocks, whatever way the weights lie."""
    config = dataclasses.replace(lesson.config, memory=MEMORY[memory])
    learnt = p3s.P3S().fit(dataclasses.replace(lesson, config=config))
    assert all(torch.isfinite(t).all() for t in learnt.values())
    assert any(t.any() for n, t in learnt.items() if n.startswith("zero_"))


def test_a_tuning_leaves_the_caller_s_random_numbers_and_the_family_s_switches(lesson):
    torch.manual_seed(5)
    expected = torch.rand(2)
    torch.manual_seed(5)
    lesson.family.unet.enable_gradient_checkpointing()
    config = dataclasses.replace(lesson.config, memory=MEMORY["8"])
    p3s.P3S().fit(dataclasses.replace(lesson, config=config))
    assert torch.equal(torch.rand(2), expected) and lesson.family.unet.is_gradient_checkpointing
    lesson.family.unet.disable_gradient_checkpointing()
    torch.manual_seed(5)
    methods.get("lora").fit(dataclasses.replace(lesson, config=FinetuneConfig(steps=1)))
    assert torch.equal(torch.rand(2), expected)
