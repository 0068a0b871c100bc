"""The world: deterministic by seed, with ground truth that means what it says."""

import random

import torch
from torch.nn import functional as F

from p3s_cli.world.render import render
from p3s_cli.world.scenes import (
    BACKGROUNDS,
    PHOTO_SIZE,
    SIZE,
    caption,
    lookalike_scene,
    sample_instance,
    sample_scene,
    solo,
)
from p3s_cli.world.shapes import CATEGORIES, PATTERNS


def test_a_seed_is_a_scene_whatever_batch_it_is_drawn_in():
    scenes = [sample_scene(s) for s in range(12)]
    together, masks = render(scenes)
    alone, mask = render([sample_scene(7)])
    assert torch.equal(together[7], alone[0]) and torch.equal(masks[7], mask[0])
    assert together.min() >= 0 and together.max() <= 1


def test_a_larger_drawing_is_the_same_drawing():
    scenes = [sample_scene(s) for s in range(24)]
    (small, small_masks), (large, large_masks) = render(scenes), render(scenes, size=PHOTO_SIZE)
    assert large.shape[-2:] == large_masks.shape[-2:] == (PHOTO_SIZE, PHOTO_SIZE)
    # reduced, it differs by little: only where a pixel lies across an edge
    assert (F.avg_pool2d(large, PHOTO_SIZE // SIZE) - small).abs().mean() < 0.005
    reduced = F.avg_pool2d(large_masks.float(), PHOTO_SIZE // SIZE)
    assert (reduced - small_masks.float()).abs().mean() < 0.005


def test_masks_are_disjoint_one_for_each_subject_and_hold_its_colours():
    scenes = [sample_scene(s) for s in range(60)]
    images, masks = render(scenes)
    assert (masks.sum(1) <= 1).all()
    for scene, _, mask in zip(scenes, images, masks, strict=True):
        areas = mask.flatten(1).sum(1).tolist()
        assert all(a > 100 for a in areas[: len(scene.subjects)]) and not any(areas[len(scene.subjects) :])
    empty, _ = render([type(s)((), s.background, s.look) for s in scenes])
    changed = (empty - images).abs().amax(1) > 0.02
    outside = changed & ~masks.any(1)
    assert outside.float().mean() < 0.02  # only the anti-aliased rim


def test_look_alikes_share_a_category_and_differ_to_the_eye():
    for seed in range(40):
        a, b = (p.instance for p in lookalike_scene(seed).subjects)
        assert a.category == b.category and a.colour != b.colour and a.pattern != b.pattern


def test_all_categories_backgrounds_and_patterns_occur():
    scenes = [sample_scene(s) for s in range(400)]
    seen = {p.instance.category for s in scenes for p in s.subjects}
    assert seen == set(CATEGORIES) and len(CATEGORIES) >= 8
    assert {s.background for s in scenes} == set(BACKGROUNDS)
    assert {p.instance.pattern for s in scenes for p in s.subjects} == set(PATTERNS)
    assert {len(s.subjects) for s in scenes} == {1, 2, 3}


def test_captions_name_the_category_and_the_place_and_vary_in_the_rest():
    scene = solo(sample_instance(random.Random(1), "robot", "red"), 3, "snow", accessory="red hat")
    captions = {caption(scene, s) for s in range(50)}
    assert all("robot" in c and "snow" in c and "wearing a red hat" in c for c in captions)
    assert len(captions) > 4 and any("red robot" in c for c in captions) and any("red robot" not in c for c in captions)


def test_the_same_individual_keeps_its_look_in_another_scene():
    instance = sample_instance(random.Random(5), "vase")
    assert solo(instance, 1).subjects[0].instance == solo(instance, 2).subjects[0].instance == instance
    assert solo(instance, 1) != solo(instance, 2)
