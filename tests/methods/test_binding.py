"""A bound subject runs its copy as often as it was asked to, and never carries features into another trajectory."""

import pytest
import tiny
import torch

from p3s_cli import stages
from p3s_cli.config import GenerateConfig
from p3s_cli.methods.base import Learnt, SubjectPart
from p3s_cli.methods.binding import Bound
from p3s_cli.paper.model import connected
from p3s_cli.sd.family import load
from p3s_cli.sd.weights import load_tensors
from p3s_cli.subject import Subject


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    folder = tmp_path_factory.mktemp("binding")
    family = load(str(tiny.build(folder / "family")), "cpu")
    made = stages.mask(tiny.photo(folder / "two.png"), ["18,32"], ["46,32"], folder / "it", "thing", family=family)
    stages.finetune(made.subject, steps=1, family=family)
    tensors, metadata = load_tensors(folder / "it/control/control.safetensors")
    return family, SubjectPart(Learnt(Subject.open(folder / "it"), tensors, metadata["config"]))


def trajectory(family, bound: Bound, times: list[int]) -> list[list]:
    side, g = family.unet.config.sample_size, torch.Generator().manual_seed(0)
    with torch.no_grad(), connected(family.unet, bound.control):
        return [
            bound.injections(
                torch.randn(2, 4, side, side, generator=g),
                torch.tensor([t, t]),
                torch.randn(2, 77, 32, generator=g),
                0.5,
            )
            for t in times
        ]


def test_with_reuse_two_every_other_step_has_the_features_of_the_one_before(tuned):
    family, part = tuned
    steps = trajectory(family, Bound.build(family, part, GenerateConfig(reuse=2)), [900, 700, 500, 300])
    features = [next(iter(step[0].features.values())) for step in steps]
    assert features[0] is features[1] and features[2] is features[3] and features[1] is not features[2]
    every = trajectory(family, Bound.build(family, part, GenerateConfig(reuse=1)), [900, 700])
    first, second = (next(iter(step[0].features.values())) for step in every)
    assert first is not second


def test_another_trajectory_begins_with_features_of_its_own(tuned):
    family, part = tuned
    bound = Bound.build(family, part, GenerateConfig(reuse=3))
    first, second = trajectory(family, bound, [100, 900])  # time runs downwards within one
    assert next(iter(first[0].features.values())) is not next(iter(second[0].features.values()))


def test_a_trajectory_of_one_step_has_features_of_its_own_too(tuned):
    family, part = tuned
    first, second = trajectory(family, Bound.build(family, part, GenerateConfig(reuse=2)), [500, 500])
    assert next(iter(first[0].features.values())) is not next(iter(second[0].features.values()))


def test_a_scheduler_that_stays_at_a_time_does_not_begin_another_trajectory_there(tuned):
    """Heun's times: every one but the first comes twice."""
    family, part = tuned
    times = [900, 700, 700, 500, 500, 300, 300, 100, 100]
    steps = trajectory(family, Bound.build(family, part, GenerateConfig(reuse=4)), times)
    features = [next(iter(step[0].features.values())) for step in steps]
    fresh = [i for i, f in enumerate(features) if i == 0 or f is not features[i - 1]]
    assert fresh == [0, 4, 8]


def test_a_subject_binds_to_a_family_of_which_nothing_is_loaded_yet(tuned):
    """The control is made on the meta device, where no model can be read; it ends with the tuned tensors alone."""
    family, part = tuned
    control = Bound.build(load(family.source, "cpu"), part, GenerateConfig()).control
    assert all(torch.equal(control.state_dict()[n], t.float()) for n, t in part.learnt.tensors.items())


def test_times_that_rise_by_rounding_begin_no_other_trajectory(tuned):
    """dpm2_a's, some of which come twice, the second a little later than the first."""
    family, part = tuned
    bound = Bound.build(family, part, GenerateConfig(reuse=4))
    features = [next(iter(s[0].features.values())) for s in trajectory(family, bound, [900, 700, 700.25, 500])]
    assert all(f is features[0] for f in features)
