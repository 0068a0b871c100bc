"""Scenes that differ in nothing but one word, and the batches the U-Net learns the word from."""

from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from torch.nn.functional import max_pool2d

from p3s_cli.sd.weights import save_tensors
from p3s_cli.world.recipe.denoiser import Shelf, _between_fours
from p3s_cli.world.recipe.workshop import Workshop
from p3s_cli.world.render import render
from p3s_cli.world.scenes import caption, each_pattern, sample_scene, told_apart
from p3s_cli.world.shapes import COLOURS, PATTERNS


def test_only_the_pattern_changes():
    scene = sample_scene(3, counts=(2,))
    four = each_pattern(scene)
    assert four[0] == scene
    for subject in range(2):
        assert {s.subjects[subject].instance.pattern for s in four} == set(PATTERNS)
    pixels, masks = render(four)
    inside = max_pool2d(masks[0].any(0)[None].float(), 3, 1, 1)[0] > 0  # a smooth outline reaches one pixel further
    assert (masks == masks[0]).all()
    assert (pixels[:, :, ~inside] == pixels[:1, :, ~inside]).all()
    assert all((pixels[i] != pixels[j]).any() for i in range(4) for j in range(i))


def test_one_subject_differs_in_one_thing():
    seen = set()
    for seed in range(60):
        scene = sample_scene(seed, counts=(1, 2))
        first, *others = told_apart(scene, seed)
        assert first == scene
        changes = []
        for other in others:
            assert replace(other, subjects=scene.subjects) == scene
            (pair,) = [(a, b) for a, b in zip(scene.subjects, other.subjects, strict=True) if a != b]
            assert replace(pair[1], instance=pair[0].instance) == pair[0]
            of, to = (asdict(placed.instance) for placed in pair)
            changes.append({name for name in of if of[name] != to[name]})
        assert all(c in ({"pattern"}, {"category"}, {"colour", "body"}) and c == changes[0] for c in changes)
        aspect = min(changes[0] - {"body"})
        which = next(k for k, (a, b) in enumerate(zip(scene.subjects, others[0].subjects, strict=True)) if a != b)
        assert len({getattr(s.subjects[which].instance, aspect) for s in (first, *others)}) == 4
        seen.add((aspect, len(scene.subjects)))
    assert len(seen) == 6  # every aspect, alone and beside another


def test_a_colour_keeps_how_far_its_shade_is_from_the_named_one():
    scenes = (told_apart(sample_scene(s, counts=(1,)), s) for s in range(60))
    fours = [[s.subjects[0].instance for s in four] for four in scenes]
    coloured = [four for four in fours if four[0].colour != four[1].colour]
    assert len(coloured) > 5
    for first, *others in coloured:
        away = [b - n for b, n in zip(first.body, COLOURS[first.colour], strict=True)]
        for other in others:
            wanted = [min(1.0, max(0.0, n + a)) for n, a in zip(COLOURS[other.colour], away, strict=True)]
            assert other.body == pytest.approx(wanted)


def test_between_fours_counts_what_they_do_not_share():
    """0, 1, 2, 3 are 1.25 from their mean, squared; what all four have in common adds nothing."""
    values = torch.tensor([0.0, 1, 2, 3, 5, 6, 7, 8]).view(8, 1, 1, 1).expand(8, 4, 2, 2)
    ones = torch.ones(8, 1, 2, 2)
    assert _between_fours(values, ones, torch.ones(8)).item() == pytest.approx(1.25)
    assert _between_fours(values, ones, torch.full((8,), 0.5)).item() == pytest.approx(0.625)
    half = values * torch.tensor([1.0, 0.0])  # differs in its left half only
    left = 1 + 3 * torch.tensor([1.0, 0.0]).expand(8, 1, 2, 2)
    assert _between_fours(half, left, torch.ones(8)).item() == pytest.approx(1.25 * 4 / (4 + 1))


def test_a_batch_of_alike_scenes_shares_noise_and_time(tmp_path: Path):
    shop = Workshop(tmp_path, "cpu", seed=0, scenes=32, steps=None, until=None, compiled=False)
    latents = torch.arange(32.0).view(32, 1, 1, 1).expand(32, 4, 16, 16).contiguous()
    save_tensors(tmp_path / "four.safetensors", {"latents": latents, "subjects": torch.zeros(32, 1, 16, 16)})
    batch = Shelf(shop, shop.patterns, "four").draw_alike(8, 0.5, torch.Generator().manual_seed(5))
    faded = []
    for four in (slice(0, 4), slice(4, 8)):
        rows = batch.latents[four, 0, 0, 0].long().tolist()
        assert rows == list(range(rows[0], rows[0] + 4)) and rows[0] % 4 == 0
        assert (batch.noise[four] == batch.noise[four][0]).all() and (batch.t[four] == batch.t[four][0]).all()
        assert batch.captions[four] == [caption(shop.patterns.scenes[r], 0, full=True) for r in rows]
        means = [x[four].mean() for x in (batch.noised, batch.latents)]
        assert torch.isclose(*means)  # fading keeps the mean of the four
        spread = [x[four, 0, 0, 0].std() for x in (batch.noised, batch.latents)]
        faded.append(float(spread[0] / spread[1]))
    assert (batch.noise[0] != batch.noise[4]).any()
    assert 1.0 in faded and 0 < min(faded) < 1  # seed 5: one as it is, one faded
