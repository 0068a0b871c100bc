"""The learned word, the noisy steps and the kept ground: what P3S's default adds to the paper."""

import pytest
import torch

from p3s_cli.config import PAPER_CONTROL, ControlConfig, read_control
from p3s_cli.methods.denoising import diffuse
from p3s_cli.sd import text


def test_the_word_is_added_at_the_identifier_before_its_own_class_word_and_nowhere_else(world, make_control):
    prompts = ["a sks dog and a sks cat on the beach", "a sks thing", "a dog"]
    where = text.positions(world.tokenizer, prompts, "sks", "dog")
    ids = world.tokenizer(prompts, padding="max_length", max_length=77, truncation=True).input_ids
    wanted = world.tokenizer("sks").input_ids[1:-1]
    for row, (mask, line) in enumerate(zip(where, ids, strict=True)):
        marked = [i for i, m in zip(line, mask.tolist(), strict=True) if m]
        assert marked == (wanted if row < 2 else [])  # once: the cat's identifier is not the dog's
    first = int(where[0].nonzero()[0])
    assert world.tokenizer.decode(ids[0][first + len(wanted)]).strip() == "dog"
    control = make_control(learned_word=True)
    with torch.no_grad():
        control.word.fill_(0.5)
    said = control.say(torch.zeros(3, 77, 128), where)
    assert torch.equal(said, 0.5 * where[..., None].float().expand_as(said))


def test_before_training_the_word_changes_nothing_and_the_paper_has_none(make_control):
    states, where = torch.randn(2, 77, 128), torch.ones(2, 77, dtype=torch.bool)
    assert torch.equal(make_control(learned_word=True).say(states, where), states)
    assert make_control(learned_word=False).word is None and not PAPER_CONTROL.learned_word


def test_cubic_steps_have_the_mean_of_their_density_and_uniform_ones_theirs():
    schedule, x0 = torch.linspace(0.999, 0.01, 1000), torch.zeros(4000, 1, 1, 1)
    means = {}
    for kind in ("uniform", "cubic"):
        _, t, _ = diffuse(x0, schedule, torch.Generator().manual_seed(0), kind)
        assert 0 <= t.min() and t.max() < 1000
        means[kind] = t.float().mean().item()
    # E[u] = 1/2, E[1 - u^3] = 3/4; the standard error of 4,000 draws is below 5 steps
    assert means["uniform"] == pytest.approx(500, abs=20) and means["cubic"] == pytest.approx(750, abs=20)


def test_a_control_of_before_these_settings_is_read_as_it_was_made():
    old = {"control": {"injection": "gated", "gamma": 0.1}}
    read = read_control(old)
    assert (read.learned_word, read.reference_view, read.timesteps, read.preserve) == (False, "photo", "uniform", 0.0)
    assert ControlConfig().learned_word
