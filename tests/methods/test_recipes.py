"""The rivals' recipes: whose they are, what they draw from, how long they take."""

import dataclasses

import pytest
import torch

from p3s_cli import methods
from p3s_cli.config import FinetuneConfig
from p3s_cli.errors import InputError
from p3s_cli.methods import pace
from p3s_cli.methods.base import settled
from p3s_cli.methods.custom_diffusion import rescaled
from p3s_cli.methods.dreambooth import DreamBoothRecipe
from p3s_cli.methods.pace import Pace, measure
from p3s_cli.methods.prior import class_images
from p3s_cli.methods.textual_inversion import TEMPLATES


def test_recipes_are_the_papers_then_the_familys_then_the_users(family):
    published = DreamBoothRecipe()
    profile = dataclasses.replace(family.profile, methods={"dreambooth": {"lr": 1.0, "steps": 7}})
    assert settled(published, "dreambooth", family.profile, FinetuneConfig()) == published
    assert settled(published, "dreambooth", profile, FinetuneConfig(lr=2.0)) == dataclasses.replace(
        published, steps=7, lr=2.0
    )


def test_what_the_bundled_family_recommends_is_for_methods_that_exist_and_settings_they_have(world):
    for name, recommended in world.profile.methods.items():
        recipe = dataclasses.asdict(methods.get(name).recipe(world.profile, FinetuneConfig()))
        assert {n: recipe[n] for n in recommended} == recommended


def test_templates_are_as_many_as_published_and_all_different():
    assert len(set(TEMPLATES)) == 27 and all(t.count("{}") == 1 for t in TEMPLATES)


def test_rescaled_views_are_as_large_as_they_say():
    crop, g = torch.rand(3, 60, 60, generator=torch.Generator().manual_seed(0)), torch.Generator().manual_seed(1)
    views = [rescaled(crop, g) for _ in range(200)]
    shares = [v.inside.mean().item() ** 0.5 for v in views]
    for view, share in zip(views, shares, strict=True):
        assert view.pixels.shape == crop.shape and share >= 0.33
        assert (view.pixels[(view.inside == 0).expand_as(view.pixels)] == 0.5).all()
        assert (view.prefix in ("far away ", "very small ")) == (share < 0.599)
        assert view.prefix not in ("zoomed in ", "close up ") or share == 1
    enlarged = sum(v.prefix in ("zoomed in ", "close up ") for v in views)
    assert 45 <= enlarged <= 90  # a third of 200, give or take three deviations


def test_class_images_depend_on_the_seed_alone(family):
    first, again, other = (class_images(family, "a photo of a dog", 1, 1, seed) for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other) and first.shape == (1, 4, 16, 16)


def test_class_images_have_the_size_that_is_trained_on(family):
    """Whatever a base says of its U-Net: it is the family's size in which references are encoded."""
    side = family.profile.image_size // 8
    config = family.unet.config
    family.unet.register_to_config(sample_size=side // 2)
    try:
        assert class_images(family, "a dog", 1, 1, 0).shape == (1, 4, side, side)
    finally:
        family.unet.register_to_config(sample_size=config.sample_size)


def test_pace_counts_set_up_apart_and_divides_a_budget(family, subject):
    assert Pace(setup=4.0, step=0.5).steps(10.0) == 12 and Pace(4.0, 0.5).steps(1.0) == 1
    pace = measure("textual-inversion", family, subject, warmup=1, steps=1)
    assert pace.step > 0 and pace.setup >= 0
    with pytest.raises(InputError, match="does not train"):
        measure("untuned", family, subject)


def test_the_pace_of_a_method_with_two_halves_is_that_of_both(family, subject, monkeypatch):
    """By a clock that steps of one and of three seconds move, after ten of set-up; what warms up takes longer."""
    now, costs = [0.0], [10 + 2, 1, 1, 1, 1, 7, 3, 3, 3, 3]

    class TwoHalves:
        def recipe(self, profile, config):
            return config

        def fit(self, lesson):
            for step, cost in enumerate(costs[: lesson.config.steps]):
                now[0] += cost
                lesson.on_step(step + 1, len(costs), {})

    monkeypatch.setattr(pace.methods, "get", lambda name: TwoHalves())
    monkeypatch.setattr(pace.time, "perf_counter", lambda: now[0])
    assert measure("two halves", family, subject) == Pace(setup=10.0, step=2.0)


def test_unknown_methods_are_named_with_those_that_exist():
    with pytest.raises(InputError, match="no method is called 'hyper'; choose one of: p3s, dreambooth, .*untuned"):
        methods.get("hyper")
