"""Rounds through the same states: the frozen U-Net is asked once of each, and what is learnt is what asking anew gives."""

from dataclasses import replace

import pytest
import tiny
import torch

from p3s_cli import methods, stages
from p3s_cli.config import ControlConfig, FinetuneConfig
from p3s_cli.methods import p3s
from p3s_cli.methods.base import Lesson
from p3s_cli.methods.forward import Forward
from p3s_cli.sd.family import load
from p3s_cli.subject import Subject


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rounds")
    family = load(str(tiny.build(folder / "family")), "cpu")
    made = stages.mask(tiny.photo(folder / "two.png"), ["18,32"], ["46,32"], folder / "it", "thing", family=family)
    return family, Subject.open(made.subject)


def fit(given, rounds: int, monkeypatch, forgetful: bool = False) -> tuple[int, dict[str, torch.Tensor]]:
    """Four steps; how many passes of the frozen U-Net they took, and what they learnt."""
    passes = []

    def counting(*arguments):
        passes.append(1)
        return Forward().frozen(*arguments)

    monkeypatch.setattr(p3s, "forward", lambda compiled: Forward(frozen=counting))
    if forgetful:
        call = p3s._Loss.__call__
        monkeypatch.setattr(p3s._Loss, "__call__", lambda self, *a: (self.untouched.clear(), call(self, *a))[1])
    config = FinetuneConfig(replace(ControlConfig(), rounds=rounds), steps=4, lr=1e-2)
    learnt = methods.get("p3s").fit(Lesson(*given, config))
    return len(passes), learnt


def test_the_frozen_unet_is_asked_once_of_each_state(given, monkeypatch):
    """A step passes it once under the control; once more, without, for each state that is new: 4 + 4, 4 + 2, 4 + 1."""
    assert [fit(given, rounds, monkeypatch)[0] for rounds in (1, 2, 4)] == [8, 6, 5]


def test_what_is_kept_is_what_asking_again_would_say(given, monkeypatch):
    kept_passes, kept = fit(given, 2, monkeypatch)
    asked_passes, asked = fit(given, 2, monkeypatch, forgetful=True)
    assert (kept_passes, asked_passes) == (6, 8)
    assert all(torch.equal(kept[name], asked[name]) for name in kept)
