"""What the U-Net is rewarded for: the reading of its predictions, in states of its own sampling."""

import math
from dataclasses import replace

import pytest
import torch
from diffusers import UNet2DConditionModel

from p3s_cli.world.readers import GROUPS, LABELS
from p3s_cli.world.recipe.denoiser import Teacher
from p3s_cli.world.recipe.export import stage_reopen
from p3s_cli.world.recipe.readers import misread
from p3s_cli.world.recipe.reward import Walks, clean, named_vectors, one_or_two_kinds
from p3s_cli.world.recipe.workshop import Workshop
from p3s_cli.world.scenes import Scene, sample_scene


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    shop = Workshop(tmp_path_factory.mktemp("reward"), "cpu", seed=0, scenes=0)
    stage_reopen(shop)
    return shop


def _teacher(shop: Workshop) -> Teacher:
    return Teacher(shop, UNet2DConditionModel.from_pretrained(shop.family / "unet"))


def _patterns(scene: Scene, *patterns: str) -> Scene:
    subjects = zip(scene.subjects, patterns, strict=True)
    return replace(scene, subjects=tuple(replace(s, instance=replace(s.instance, pattern=p)) for s, p in subjects))


def test_misreading_is_cross_entropy_in_equal_shares():
    """Logits of zero spread a group evenly: log n where one or two of n are true, nothing where none is."""
    truth = torch.zeros(1, len(LABELS))
    truth[0, [LABELS.index(x) for x in ("category/dog", "category/cat", "colour/red")]] = 1
    losses = dict(zip(GROUPS, misread(torch.zeros(1, len(LABELS)), truth)[0].tolist(), strict=True))
    assert losses["category"] == pytest.approx(math.log(len(GROUPS["category"])))
    assert losses["colour"] == pytest.approx(math.log(len(GROUPS["colour"])))
    assert losses["pattern"] == losses["background"] == losses["accessory"] == 0
    sure = torch.full((1, len(LABELS)), -50.0)
    sure[truth > 0] = 50.0
    assert misread(sure, truth)[0, 0] == pytest.approx(math.log(2))  # two in equal shares: never less than this


def test_a_pattern_counts_only_where_the_caption_names_every_one():
    scene = sample_scene(3, counts=(2,))
    named = named_vectors([_patterns(scene, "striped", "spotted"), _patterns(scene, "striped", "plain")])
    told = [{label for label, x in zip(LABELS, row.tolist(), strict=True) if x} for row in named]
    assert {x for x in told[0] if x.startswith("pattern/")} == {"pattern/striped", "pattern/spotted"}
    assert not {x for x in told[1] if x.startswith("pattern/")}
    assert {x for x in told[0] if not x.startswith("pattern/")} == told[1]


def test_the_true_noise_leads_back_to_the_clean_latent(shop: Workshop):
    generator = torch.Generator().manual_seed(0)
    x0, noise = (torch.randn(3, 4, 16, 16, generator=generator) for _ in range(2))
    t = torch.tensor([150, 500, 900])
    teacher = _teacher(shop)
    back = clean(teacher, teacher.scheduler.add_noise(x0, noise, t), noise, t)
    assert torch.allclose(back, x0, atol=1e-4)


def test_walks_follow_their_own_predictions(shop: Workshop):
    """A state is DDIM's step from the one before, for one guidance an image; each is drawn with its own caption."""
    scenes = [sample_scene(seed) for seed in range(40)]
    teacher = _teacher(shop)
    walks = Walks(teacher, one_or_two_kinds(scenes), torch.Generator().manual_seed(0), prompts=4, steps=4)
    assert walks.states.shape == (4, len(walks.t), 4, 16, 16)
    assert torch.equal(walks.ids, shop.tokens(walks.captions))
    silence = shop.tokens(4 * [""])
    t, after = walks.t[0], teacher.alphas[walks.t[1]]
    with torch.no_grad():
        words, free = (
            teacher.predict(teacher.unet, walks.states[:, 0], t.expand(4), ids) for ids in (walks.ids, silence)
        )
    eps = free + walks.guidance * (words - free)
    x0 = clean(teacher, walks.states[:, 0], eps, t.expand(4))
    expected = after.sqrt() * x0 + (1 - after).sqrt() * eps
    assert torch.allclose(walks.states[:, 1], expected, atol=1e-3 * expected.abs().max())
    own = walks.draw(16, torch.Generator().manual_seed(1))
    for state, level, ids, labels in zip(own.states, own.t, own.ids, own.truth, strict=True):
        who = int((walks.ids == ids).all(1).nonzero()[0])
        assert torch.equal(state, walks.states[who, walks.t.tolist().index(level)])
        assert torch.equal(labels, walks.truth[who])
