"""The finder knows a subject again where nobody clicked."""

import pytest

from p3s_cli.benches import finding
from p3s_cli.benches.finding import Finder
from p3s_cli.config import MaskConfig
from p3s_cli.evals.metrics import intersection_over_union
from p3s_cli.sd.images import to_pil, to_tensor
from p3s_cli.world.render import render
from p3s_cli.world.scenes import lookalike_scene, solo


def test_it_finds_the_chosen_one_rather_than_the_look_alike_in_the_very_photo(world):
    """Without a click on either: by chance in one half of the cases. Of 40 it does in 34."""
    right = []
    for seed in range(20_000_003, 20_000_011):
        pixels, masks = render([lookalike_scene(seed)])
        photo, masks = to_pil(pixels[0]), masks[0].bool()
        for own, other in ((0, 1), (1, 0)):
            found = Finder(world.vision, to_tensor(photo), masks[own]).mask(photo)
            right.append(intersection_over_union(found, masks[own]) > intersection_over_union(found, masks[other]))
    assert sum(right) >= 12, right


def test_everything_else_is_black_and_the_place_is_the_middle_of_what_is_left(world, pair, monkeypatch):
    photo, masks, _ = pair
    finder = Finder(world.vision, to_tensor(photo), masks[0])
    found, cut = finder.mask(photo), to_tensor(finder.blackened(photo))
    assert cut[:, ~found].max() == 0 and (cut[:, found] == to_tensor(photo)[:, found]).all()
    other, same = (Finder(world.vision, to_tensor(photo), masks[i]).digest for i in (1, 0))
    assert same == finder.digest != other
    monkeypatch.setattr(finding, "_HOW", MaskConfig(rounds=1))  # other masks are found by other settings
    assert Finder(world.vision, to_tensor(photo), masks[0]).digest != same
    x, y = finder.place(photo)
    columns = found.nonzero()[:, 1].float()
    assert x == pytest.approx(columns.mean().item() / 128) and 0 < y < 1


def test_a_mirrored_photo_mirrors_the_place(world):
    instance = lookalike_scene(20_000_007).subjects[0].instance
    pixels, masks = render([solo(instance, 3)])
    finder = Finder(world.vision, pixels[0], masks[0, 0])
    there, mirrored = finder.place(to_pil(pixels[0])), finder.place(to_pil(pixels[0].flip(-1)))
    assert mirrored[0] == pytest.approx(1 - there[0], abs=0.1) and mirrored[1] == pytest.approx(there[1], abs=0.1)
