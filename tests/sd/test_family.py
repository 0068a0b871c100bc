"""Families by name, and what is said when one cannot be had."""

import pytest
import torch

from p3s_cli.errors import InputError
from p3s_cli.sd.family import load, resolve_device


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("nonsense", "no model is called 'nonsense'"),
        ("model.ckpt", "pickle"),
        ("gone.safetensors", "does not exist"),
        (".", "not a diffusers folder"),
    ],
)
def test_bad_names_get_one_sentence(name, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=words):
        load(name)


def test_without_network_and_cache_the_missing_files_and_the_way_out_are_named(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(InputError, match="stable-diffusion-v1-5/unet is not on this machine.*--model world"):
        _ = load("sd15").unet


def test_unknown_device_and_dtype():
    with pytest.raises(InputError, match="auto, cuda, mps, cpu"):
        resolve_device("tpu")
    with pytest.raises(InputError, match="dtype"):
        load("world", dtype="int8")
    if not torch.cuda.is_available():
        with pytest.raises(InputError, match="no cuda device"):
            load("world", device="cuda")


def test_a_diffusers_folder_brings_its_own_profile(world):
    family = load(world.profile.base)
    assert family.profile == world.profile
    assert family.fingerprint() == world.fingerprint()


def test_parts_are_frozen_and_the_family_is_its_own_inpainter(world):
    assert world.inpaint_unet is world.unet
    assert not any(
        p.requires_grad for p in (*world.unet.parameters(), *world.vae.parameters(), *world.text_encoder.parameters())
    )


def test_vision_features_cover_a_wide_image_and_match_transformers_on_a_square_one(world):
    g = torch.Generator().manual_seed(0)
    rows, columns, _ = world.vision.patches(torch.rand(3, 64, 192, generator=g)).shape
    cells = world.profile.feature_side / world.vision.patch
    assert columns / rows == pytest.approx(3, rel=0.1) and rows * columns == pytest.approx(cells**2, rel=0.1)
    square = torch.rand(3, 128, 128, generator=g)
    hidden = world.vision.clip.vision_model(pixel_values=2 * square[None] - 1).last_hidden_state
    torch.testing.assert_close(
        world.vision.native_patches(square).reshape(256, -1), hidden[0, 1:], rtol=1e-4, atol=1e-4
    )


def test_masks_can_be_read_from_any_vit_folder(world, tmp_path):
    from transformers import Dinov2Config, Dinov2Model, ViTConfig, ViTModel

    small = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 32}
    for kind, config in ((ViTModel, ViTConfig), (Dinov2Model, Dinov2Config)):
        folder = tmp_path / kind.__name__
        kind(config(image_size=32, patch_size=8, **small)).save_pretrained(folder)
        (folder / "preprocessor_config.json").write_text(
            '{"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}'
        )
        tower = world.mask_tower(str(folder))
        features = tower.patches(torch.rand(3, 48, 96))
        assert features.shape[2] == 16 and features.shape[1] / features.shape[0] == pytest.approx(2, rel=0.1)
        assert tower.layers == (2, 3, 3)  # the third quarter of four layers
    with pytest.raises(InputError, match="no vision tower is called 'sam'"):
        world.mask_tower("sam")
    assert world.mask_tower("clip") is world.vision


def test_text_longer_than_the_encoder_reads_is_reported(world):
    from p3s_cli.sd import text

    long = "a sks dog " + "striped " * 90 + "beach"
    assert text.lost_words(world.tokenizer, long).endswith("beach")
    assert text.lost_words(world.tokenizer, "a sks dog on the beach") == ""
    with pytest.raises(InputError, match="lies beyond"):
        text.check_identifier_survives(world.tokenizer, "striped " * 90 + "sks dog", "sks")
    text.check_identifier_survives(world.tokenizer, long, "sks")
    assert text.identify("a [V] dog", "sks") == "a sks dog"
    with pytest.raises(InputError, match=r"no \[V\]"):
        text.identify("a dog", "sks")
