"""Scenes that differ in nothing but the pattern, and the batches the U-Net learns the word from."""

from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch.nn.functional import max_pool2d

from p3s_cli.world.recipe import denoiser
from p3s_cli.world.recipe.denoiser import Shelf
from p3s_cli.world.recipe.export import stage_reopen
from p3s_cli.world.recipe.workshop import Workshop
from p3s_cli.world.render import render
from p3s_cli.world.scenes import caption, each_pattern, sample_scene
from p3s_cli.world.shapes import PATTERNS


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


def test_a_batch_of_alike_scenes_shares_noise_and_time(tmp_path: Path, monkeypatch):
    shop = Workshop(tmp_path, "cpu", seed=0, scenes=32)
    latents = torch.arange(32.0).view(32, 1, 1, 1).expand(32, 4, 16, 16).contiguous()
    stage_reopen(shop)
    said = [[caption(s, i, full) for i, s in enumerate(shop.patterns.scenes)] for full in (False, True)]
    ids = torch.stack([shop.tokens(s) for s in said], 1)
    kept = {"latents": latents, "subjects": torch.zeros(32, 1, 16, 16), "ids": ids}
    monkeypatch.setattr(denoiser, "_kept", lambda shop, pool, path: kept)
    batch = Shelf(shop, shop.patterns, "four").draw_alike(8, torch.Generator().manual_seed(5))
    faded = []
    for four in (slice(0, 4), slice(4, 8)):
        rows = batch.latents[four, 0, 0, 0].long().tolist()
        assert rows == list(range(rows[0], rows[0] + 4)) and rows[0] % 4 == 0
        assert (batch.noise[four] == batch.noise[four][0]).all() and (batch.t[four] == batch.t[four][0]).all()
        told = [caption(shop.patterns.scenes[r], 0, full=True) for r in rows]
        assert torch.equal(batch.ids[four], shop.tokens(told))
        means = [x[four].mean() for x in (batch.noised, batch.latents)]
        assert torch.isclose(*means)  # fading keeps the mean of the four
        spread = [x[four, 0, 0, 0].std() for x in (batch.noised, batch.latents)]
        faded.append(float(spread[0] / spread[1]))
    assert (batch.noise[0] != batch.noise[4]).any()
    assert 1.0 in faded and 0 < min(faded) < 1  # seed 5: one as it is, one faded


def test_kept_latents_are_those_of_the_autoencoder_that_is_there(tmp_path: Path):
    shop = Workshop(tmp_path, "cpu", seed=0, scenes=4)
    stage_reopen(shop)
    first = Shelf(shop, shop.pool, "latents").latents
    written = (tmp_path / "latents.safetensors").stat().st_mtime_ns
    assert torch.equal(Shelf(shop, shop.pool, "latents").latents, first)
    assert (tmp_path / "latents.safetensors").stat().st_mtime_ns == written
    vae = AutoencoderKL.from_pretrained(shop.family / "vae")
    torch.nn.init.zeros_(vae.quant_conv.bias)
    vae.save_pretrained(shop.family / "vae")
    assert not torch.equal(Shelf(shop, shop.pool, "latents").latents, first)
