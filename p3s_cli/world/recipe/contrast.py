"""The tokenizer and the CLIP pair."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPModel, CLIPTokenizer

from p3s_cli.world import models
from p3s_cli.world.recipe.workshop import Workshop
from p3s_cli.world.scenes import SIZE, Wording, caption, sample_scene


def stage_tokenizer(shop: Workshop) -> None:
    captions = [caption(sample_scene(seed), seed) for seed in range(20_000)]
    tokenizer = models.build_tokenizer(captions, shop.family / "tokenizer")
    shop.log("tokenizer", {"tokens": len(tokenizer)})


def stage_clip(shop: Workshop) -> None:
    """Both CLIP towers, by symmetric contrast; most steps show a quarter of the patches (FLIP, arXiv:2212.00794)."""
    torch.manual_seed(shop.seed)
    tokenizer = CLIPTokenizer.from_pretrained(shop.family / "tokenizer")
    clip = models.build_clip(tokenizer).to(shop.device)
    shown = _Glimpse(shop, "clip", clip, share=lambda progress: 0.25 if progress < 0.94 else 1.0)
    _contrast(shop, "clip", clip, shown, alike=0.0)


def stage_vision(shop: Workshop) -> None:
    """The vision tower alone goes on, towards the locked text tower (LiT, arXiv:2111.07991), which the U-Net reads.

    Half of the batches share one background, so that categories and looks have to be told apart, and at
    the end all patches are shown: from a quarter of them no outline can be learnt.
    """
    clip = CLIPModel.from_pretrained(shop.family / "clip").to(shop.device)
    clip.text_model.requires_grad_(False)
    shown = _Glimpse(shop, "vision", clip, share=lambda progress: 0.5 if progress < 0.75 else 1.0)
    _contrast(shop, "vision", clip, shown, alike=0.5)


def stage_vision_long(shop: Workshop) -> None:
    """A second round of the vision tower, most of it on captions that name the kind alone, or the place alone.

    Told by whole captions only, the tower leans on colours and grounds, which are easier than outlines.
    """
    clip = CLIPModel.from_pretrained(shop.family / "clip").to(shop.device)
    clip.text_model.requires_grad_(False)
    shown = _Glimpse(shop, "vision_long", clip, share=lambda progress: 0.5 if progress < 0.8 else 1.0)
    wordings: tuple[Wording, ...] = ("kind", "kind", "full", "full", "place")
    _contrast(shop, "vision_long", clip, shown, alike=0.5, wordings=wordings)


def stage_vision_kinds(shop: Workshop) -> None:
    """The vision tower's upper half and projection go on alone: what outlines mean is left to learn, not to see.

    Scenes are shifted and mirrored, for it is kinds it has not seen in this place and size that it mistook.
    """
    clip = CLIPModel.from_pretrained(shop.family / "clip").to(shop.device).requires_grad_(False)
    layers = clip.vision_model.encoder.layers
    for part in (*layers[len(layers) // 2 :], clip.vision_model.post_layernorm, clip.visual_projection):
        part.requires_grad_(True)

    def look(index: Tensor, step: int, generator: torch.Generator) -> Tensor:
        pixels = _moved(shop.pool.pixels(index), generator)
        return clip.visual_projection(clip.vision_model(pixels).pooler_output)

    wordings: tuple[Wording, ...] = ("kind", "kind", "kind", "full", "place")
    _contrast(shop, "vision_kinds", clip, look, alike=0.5, wordings=wordings)


def _moved(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """(B, 3, H, W), all shifted by up to a patch either way, every other time mirrored."""
    dx, dy, mirrored = (int(torch.randint(n, (1,), generator=generator)) for n in (17, 17, 2))
    size = pixels.shape[-1]
    moved = F.pad(pixels, (8, 8, 8, 8), mode="replicate")[..., dy : dy + size, dx : dx + size]
    return moved.flip(-1) if mirrored else moved


class _Glimpse:
    """Projected vectors (B, D) of scenes of which a share of the patches is shown, by progress."""

    def __init__(self, shop: Workshop, stage: str, clip: CLIPModel, share: Callable[[float], float]):
        self._shop, self._clip, self._share = shop, clip, share
        self._steps = shop.length(stage).steps
        self._patches = (SIZE // clip.config.vision_config.patch_size) ** 2

    def __call__(self, index: Tensor, step: int, generator: torch.Generator) -> Tensor:
        shown = round(self._share(step / self._steps) * self._patches)
        order = torch.randperm(self._patches, generator=generator)[:shown] + 1
        keep = torch.cat((torch.zeros(1, dtype=torch.long), order)).to(self._shop.device)
        tower = self._clip.vision_model
        hidden = tower.pre_layrnorm(tower.embeddings(self._shop.pool.pixels(index))[:, keep])
        hidden = tower.encoder(inputs_embeds=hidden).last_hidden_state
        return self._clip.visual_projection(tower.post_layernorm(hidden[:, 0]))


def _contrast(
    shop: Workshop,
    stage: str,
    clip: CLIPModel,
    look: Callable[[Tensor, int, torch.Generator], Tensor],
    alike: float,
    wordings: tuple[Wording, ...] = ("full",),
) -> None:
    """Train `clip` by symmetric contrast, in which equal captions are each other's positives (arXiv:2204.03610).

    `look` gives the vectors of scenes, `alike` the share of one-background batches; each batch draws one of
    `wordings`.
    """

    def loss(step: int, generator: torch.Generator):
        wording = wordings[int(torch.randint(len(wordings), (1,), generator=generator))]
        one_place = wording != "place" and torch.rand(1, generator=generator).item() < alike
        index = (shop.pool.draw_alike if one_place else shop.pool.draw)(shop.length(stage).batch, generator)
        captions = shop.pool.captions(index, generator, wording)
        ids = shop.tokens(captions).to(shop.device).long()
        with shop.autocast():
            image = F.normalize(look(index, step, generator).float(), dim=-1)
            text = clip.text_projection(clip.text_model(ids).pooler_output).float()
        logits = clip.logit_scale.clamp(max=4.6).exp() * image @ F.normalize(text, dim=-1).T
        equal = (ids[:, None] == ids[None]).all(-1).float()
        target = equal / equal.sum(1, keepdim=True)
        value = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        found = equal.gather(1, logits.argmax(1, keepdim=True)).mean().item()
        return value, {"found": found}

    shop.fit(stage, clip, loss, weight_decay=0.05, ema=0.0)
    clip.save_pretrained(shop.family / "clip")
