"""diffusers' safety checker, small and with thresholds that everything or nothing passes."""

import pytest
import tiny
import torch
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from transformers import CLIPConfig, CLIPImageProcessor

from p3s_cli import stages
from p3s_cli.errors import InputError
from p3s_cli.sd import images, safety
from p3s_cli.sd.family import load


@pytest.fixture
def family(tiny_folder, tmp_path):
    """The tiny family in a folder of its own, with a safety checker beside it."""
    for part in tiny_folder.iterdir():
        (tmp_path / part.name).symlink_to(part)
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = small | {"image_size": 32, "patch_size": 8}
    torch.manual_seed(0)
    checker = StableDiffusionSafetyChecker(CLIPConfig(text_config=small, vision_config=vision, projection_dim=8))
    checker.save_pretrained(tmp_path / "safety_checker")
    processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    processor.save_pretrained(tmp_path / "feature_extractor")
    return load(str(tmp_path), device="cpu")


@pytest.mark.parametrize(("threshold", "word"), [(2.0, "passed"), (-2.0, "flagged")])
def test_what_lies_above_a_threshold_becomes_black_and_is_recorded(family, threshold, word):
    """Cosines lie in [-1, 1]: none exceeds 2, all exceed -2."""
    checker, _ = family.safety_checker
    checker.concept_embeds_weights.fill_(threshold)
    checker.special_care_embeds_weights.fill_(2.0)
    images = torch.rand(2, 3, 64, 64)
    checked, verdicts = safety.check(family, images)
    assert verdicts == [word] * 2
    assert torch.equal(checked, images if word == "passed" else torch.zeros_like(images))


def test_a_base_without_a_checker_says_so_and_a_missing_one_names_the_way_out(world, tmp_path):
    assert safety.check(world, torch.rand(1, 3, 32, 32))[1] == ["no checker"]
    with pytest.raises(InputError, match="safety_checker is not on this machine.*--no-safety-checker"):
        safety.ready(load("owner/name"))


def test_an_image_says_what_the_checker_made_of_it(family, tmp_path):
    """In the result, in a warning, in the PNG, and after the same command again; `off` where it was not asked."""
    checker, _ = family.safety_checker
    checker.concept_embeds_weights.fill_(-2.0)
    root = tmp_path / "pet"
    stages.mask(tiny.photo(tmp_path / "photo.png"), [(18, 32)], [(46, 32)], root, "pet", family=family)
    stages.finetune(root, steps=1, family=family)
    made, again = (stages.generate(root, "a [V] pet", n=1, steps=1, family=family) for _ in range(2))
    assert made.safety == again.safety == ("flagged",) and again.unchanged
    assert "flagged the image of seed 0, which is black" in made.warnings[-1]
    assert images.load_image(made.images[0]).getextrema() == ((0, 0),) * 3
    assert images.read_metadata(made.images[0])["safety"] == "flagged"
    off = stages.generate(root, "a [V] pet", n=1, steps=1, safety_checker=False, family=family)
    assert off.safety == ("off",) and images.load_image(off.images[0]).getextrema() != ((0, 0),) * 3
