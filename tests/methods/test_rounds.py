"""Rounds through the same draws: the frozen U-Net is asked once of each, and asking anew would teach the same."""

import pytest
import tiny
import torch

from p3s_cli import stages
from p3s_cli.config import ControlConfig, FinetuneConfig
from p3s_cli.methods import p3s
from p3s_cli.methods.base import Lesson
from p3s_cli.methods.ground import KeptGround
from p3s_cli.sd.family import load
from p3s_cli.sd.train import Checkpoint
from p3s_cli.subject import Subject

STEPS = 4


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rounds")
    family = load(str(tiny.build(folder / "family")), "cpu")
    made = stages.mask(tiny.photo(folder / "two.png"), ["18,32"], ["46,32"], folder / "it", "thing", family=family)
    return family, Subject.open(made.subject)


@pytest.fixture
def asked(monkeypatch):
    """A list that grows with every question to the frozen U-Net what it predicts itself."""
    calls, whole = [], KeptGround._made
    monkeypatch.setattr(KeptGround, "_made", lambda self, *given: calls.append(self) or whole(self, *given))
    return calls


def fit(given, rounds, **more):
    config = FinetuneConfig(ControlConfig(rounds=rounds), steps=STEPS, lr=1e-2)
    return p3s.P3S().fit(Lesson(*given, config, **more))


@pytest.mark.parametrize(("rounds", "draws"), [(1, 4), (2, 2), (3, 2), (4, 1), (9, 1)])
def test_the_frozen_unet_is_asked_once_of_each_draw(given, asked, rounds, draws):
    """Of as many draws as it takes for all steps: steps over rounds, rounded up."""
    fit(given, rounds)
    assert len(asked) == draws


def test_what_is_kept_is_what_asking_again_would_give(given, asked, monkeypatch):
    kept = fit(given, 2)
    asking = KeptGround.__call__
    monkeypatch.setattr(KeptGround, "__call__", lambda self, *given: self._kept.clear() or asking(self, *given))
    again = fit(given, 2)
    assert len(asked) == 2 + STEPS and all(torch.equal(kept[name], again[name]) for name in kept)


def test_a_run_taken_up_in_a_later_round_asks_again_and_ends_with_the_same_bits(given, asked, tmp_path):
    whole = fit(given, 2)

    def stop(step, total, numbers):
        if step == 3:
            raise KeyboardInterrupt

    checkpoint = Checkpoint(tmp_path / "run", every=-1.0)
    with pytest.raises(KeyboardInterrupt):
        fit(given, 2, checkpoint=checkpoint, on_step=stop)
    resumed = fit(given, 2, checkpoint=checkpoint)
    assert len(asked) == 2 + 2 + 2 and all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_nothing_is_asked_where_nothing_is_kept(given, asked):
    p3s.P3S().fit(Lesson(*given, FinetuneConfig(ControlConfig(preserve=0.0), steps=2)))
    assert not asked


@pytest.mark.parametrize("both", [False, True])
def test_a_replay_that_is_not_finite_is_not_kept(caplog, monkeypatch, both):
    """The pass itself is asked, then and from then on; where it is not finite either, the recording is not to blame."""
    asked, given = [], torch.ones(1)
    replay = lambda unet, x, t, states: asked.append("replay") or x * float("nan")  # noqa: E731
    ground = KeptGround(torch.nn.Identity(), replay, again=True)
    itself = lambda unet, x, t, states: asked.append("itself") or (x * float("nan") if both else x)  # noqa: E731
    monkeypatch.setattr("p3s_cli.methods.ground.controlled_noise", itself)
    found = [ground(draw, given, given, given) for draw in (0, 1, 0)]
    assert all(torch.isfinite(f).all() != both for f in found)
    assert asked == ["replay", "itself", *(["replay", "itself"] if both else ["itself"])]
    assert len(caplog.records) == (0 if both else 1)
