"""The learned word, the noisy steps and the kept ground: what P3S's default adds to the paper."""

import pytest
import torch

from p3s_cli.config import PAPER_CONTROL, ControlConfig, read_control
from p3s_cli.methods.denoising import add_noise
from p3s_cli.sd import text


@pytest.mark.parametrize(
    ("prompt", "after"),
    [
        ("a [V1] dog and a [V2] dog on the beach", (["dog"], ["dog"])),  # one identifier, one class word, two subjects
        ("a [V2] cat behind ([V1]) and [V1]'s hat", ([")", "'"], ["cat"])),
        ("[V1] and a sks dog", (["and"], [])),  # whoever writes the identifier means the word alone
    ],
)
def test_each_subjects_word_is_added_at_its_own_places_and_nowhere_else(world, make_control, prompt, after):
    ids = world.tokenizer(text.fill(prompt, "sks", "sks"), padding="max_length", max_length=77).input_ids
    wanted = world.tokenizer("sks").input_ids[1:-1]
    for which in (0, 1):
        where = text.positions(world.tokenizer, [prompt], ["sks", "sks"], which)
        marked = where[0].nonzero().flatten().tolist()
        assert [ids[i] for i in marked] == wanted * len(after[which])
        ends = marked[len(wanted) - 1 :: len(wanted)]
        assert [world.tokenizer.decode(ids[i + 1]).strip() for i in ends] == after[which]
    control = make_control(learned_word=True)
    with torch.no_grad():
        control.word.fill_(0.5)
    said = control.say(torch.zeros(1, 77, 128), where)
    assert torch.equal(said, 0.5 * where[..., None].float().expand_as(said))


def test_no_place_reaches_beyond_what_the_text_encoder_reads(world):
    where = text.positions(world.tokenizer, ["dog " * 74 + "[V]", "dog " * 75 + "[V]"], ["sks"], 0)
    assert len(world.tokenizer("sks").input_ids) == 4  # two tokens, of which one has room behind 74 dogs
    assert where[0].nonzero().flatten().tolist() == [75] and not where[1].any()  # 76 is the end's


def test_before_training_the_word_changes_nothing_and_the_paper_has_none(make_control):
    states, where = torch.randn(2, 77, 128), torch.ones(2, 77, dtype=torch.bool)
    assert torch.equal(make_control(learned_word=True).say(states, where), states)
    assert make_control(learned_word=False).word is None and not PAPER_CONTROL.learned_word


def test_cubic_steps_have_the_mean_of_their_density_and_uniform_ones_theirs():
    schedule, x0 = torch.linspace(0.999, 0.01, 1000), torch.zeros(4000, 1, 1, 1)
    means = {}
    for kind in ("uniform", "cubic"):
        _, t, _ = add_noise(x0, schedule, torch.Generator().manual_seed(0), kind)
        assert 0 <= t.min() and t.max() < 1000
        means[kind] = t.float().mean().item()
    # E[u] = 1/2, E[1 - u^3] = 3/4; the standard error of 4,000 draws is below 5 steps
    assert means["uniform"] == pytest.approx(500, abs=20) and means["cubic"] == pytest.approx(750, abs=20)


def test_a_control_of_before_these_settings_is_read_as_it_was_made():
    old = {"control": {"injection": "gated", "gamma": 0.1}}
    read = read_control(old)
    assert (read.learned_word, read.reference_view, read.timesteps, read.preserve) == (False, "photo", "uniform", 0.0)
    assert ControlConfig().learned_word
