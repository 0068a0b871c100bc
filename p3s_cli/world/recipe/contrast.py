"""The tokenizer and the CLIP pair."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPModel, CLIPTokenizer

from p3s_cli.world import models
from p3s_cli.world.recipe.workshop import BATCH, STEPS, Workshop
from p3s_cli.world.scenes import SIZE, caption, sample_scene


def stage_tokenizer(shop: Workshop) -> None:
    captions = [caption(sample_scene(seed), seed) for seed in range(20_000)]
    tokenizer = models.build_tokenizer(captions, shop.family / "tokenizer")
    shop.log("tokenizer", {"tokens": len(tokenizer)})


def stage_clip(shop: Workshop) -> None:
    """Both CLIP towers, by symmetric contrast; most steps show a quarter of the patches (FLIP, arXiv:2212.00794)."""
    torch.manual_seed(shop.seed)
    tokenizer = CLIPTokenizer.from_pretrained(shop.family / "tokenizer")
    clip = models.build_clip(tokenizer).to(shop.device)
    _contrast(shop, "clip", clip, tokenizer, shown=lambda progress: 0.25 if progress < 0.94 else 1.0, alike=0.0)


def stage_vision(shop: Workshop) -> None:
    """The vision tower alone goes on, towards the locked text tower (LiT, arXiv:2111.07991), which the U-Net reads.

    Half of the batches share one background, so that categories and looks have to be told apart, and at
    the end all patches are shown: from a quarter of them no outline can be learnt.
    """
    tokenizer = CLIPTokenizer.from_pretrained(shop.family / "tokenizer")
    clip = CLIPModel.from_pretrained(shop.family / "clip").to(shop.device)
    clip.text_model.requires_grad_(False)
    _contrast(shop, "vision", clip, tokenizer, shown=lambda progress: 0.5 if progress < 0.75 else 1.0, alike=0.5)


def _contrast(
    shop: Workshop, stage: str, clip: CLIPModel, tokenizer: CLIPTokenizer, shown: Callable, alike: float
) -> None:
    """Train `clip`; `shown` gives the share of patches by progress, `alike` the share of one-background batches."""
    steps = shop.steps or STEPS[stage]
    patches = (SIZE // clip.config.vision_config.patch_size) ** 2

    def image_vector(pixels: Tensor, keep: Tensor) -> Tensor:
        tower = clip.vision_model
        hidden = tower.pre_layrnorm(tower.embeddings(pixels)[:, keep])
        hidden = tower.encoder(inputs_embeds=hidden).last_hidden_state
        return clip.visual_projection(tower.post_layernorm(hidden[:, 0]))

    def loss(step: int, generator: torch.Generator):
        one_place = alike > 0 and torch.rand(1, generator=generator).item() < alike
        index = (shop.pool.draw_alike if one_place else shop.pool.draw)(BATCH[stage], generator)
        order = torch.randperm(patches, generator=generator)[: round(shown(step / steps) * patches)] + 1
        keep = torch.cat((torch.zeros(1, dtype=torch.long), order)).to(shop.device)
        tokens = tokenizer(shop.pool.captions(index, generator), padding=True, return_tensors="pt").to(shop.device)
        with shop.autocast():
            image = F.normalize(image_vector(shop.pool.pixels(index), keep).float(), dim=-1)
            text = clip.text_projection(clip.text_model(**tokens).pooler_output).float()
        logits = clip.logit_scale.clamp(max=4.6).exp() * image @ F.normalize(text, dim=-1).T
        target = torch.arange(len(index), device=shop.device)
        value = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        return value, {"accuracy": (logits.argmax(1) == target).float().mean().item()}

    shop.fit(stage, clip, loss, weight_decay=0.05, ema=0.0)
    clip.save_pretrained(shop.family / "clip")
