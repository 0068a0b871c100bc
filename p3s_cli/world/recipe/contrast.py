"""The tokenizer and the CLIP pair."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPModel, CLIPTokenizer

from p3s_cli.world import models
from p3s_cli.world.recipe.workshop import LENGTH, Workshop
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
    _contrast(shop, "clip", clip, tokenizer, shown, alike=0.0)


def stage_vision(shop: Workshop) -> None:
    """The vision tower alone goes on, towards the locked text tower (LiT, arXiv:2111.07991), which the U-Net reads.

    Half of the batches share one background, so that categories and looks have to be told apart, and at
    the end all patches are shown: from a quarter of them no outline can be learnt.
    """
    tokenizer = CLIPTokenizer.from_pretrained(shop.family / "tokenizer")
    clip = CLIPModel.from_pretrained(shop.family / "clip").to(shop.device)
    clip.text_model.requires_grad_(False)
    shown = _Glimpse(shop, "vision", clip, share=lambda progress: 0.5 if progress < 0.75 else 1.0)
    _contrast(shop, "vision", clip, tokenizer, shown, alike=0.5)


def stage_vision_long(shop: Workshop) -> None:
    """A second round of the vision tower, most of it on captions that name the kind alone, or the place alone.

    Told by whole captions only, the tower leans on colours and grounds, which are easier than outlines.
    """
    tokenizer = CLIPTokenizer.from_pretrained(shop.family / "tokenizer")
    clip = CLIPModel.from_pretrained(shop.family / "clip").to(shop.device)
    clip.text_model.requires_grad_(False)
    shown = _Glimpse(shop, "vision_long", clip, share=lambda progress: 0.5 if progress < 0.8 else 1.0)
    wordings: tuple[Wording, ...] = ("kind", "kind", "full", "full", "place")
    _contrast(shop, "vision_long", clip, tokenizer, shown, alike=0.5, wordings=wordings)


def stage_vision_head(shop: Workshop) -> None:
    """The vision tower's last layer and projection go on alone: what outlines mean is left to learn, not to see.

    Masks read the layers below, which stay as they are.
    """
    tokenizer = CLIPTokenizer.from_pretrained(shop.family / "tokenizer")
    clip = CLIPModel.from_pretrained(shop.family / "clip").to(shop.device).requires_grad_(False)
    for part in (clip.vision_model.encoder.layers[-1], clip.vision_model.post_layernorm, clip.visual_projection):
        part.requires_grad_(True)
    below = _below(shop, clip)

    def look(index: Tensor, step: int, generator: torch.Generator) -> Tensor:
        return last_look(clip, below[index].to(shop.device))

    wordings: tuple[Wording, ...] = ("kind", "kind", "kind", "full", "place")
    _contrast(shop, "vision_head", clip, tokenizer, look, alike=0.5, wordings=wordings)


class _Glimpse:
    """Projected vectors (B, D) of scenes of which a share of the patches is shown, by progress."""

    def __init__(self, shop: Workshop, stage: str, clip: CLIPModel, share: Callable[[float], float]):
        self._shop, self._clip, self._share = shop, clip, share
        self._steps = shop.steps or LENGTH[stage].steps
        self._patches = (SIZE // clip.config.vision_config.patch_size) ** 2

    def __call__(self, index: Tensor, step: int, generator: torch.Generator) -> Tensor:
        shown = round(self._share(step / self._steps) * self._patches)
        order = torch.randperm(self._patches, generator=generator)[:shown] + 1
        keep = torch.cat((torch.zeros(1, dtype=torch.long), order)).to(self._shop.device)
        tower = self._clip.vision_model
        hidden = tower.pre_layrnorm(tower.embeddings(self._shop.pool.pixels(index))[:, keep])
        hidden = tower.encoder(inputs_embeds=hidden).last_hidden_state
        return self._clip.visual_projection(tower.post_layernorm(hidden[:, 0]))


@torch.no_grad()
def _below(shop: Workshop, clip: CLIPModel) -> Tensor:
    """(N, 257, D), what reaches the last layer from every scene of the pool; half precision, for it is gigabytes."""
    found = []
    for rows in torch.arange(len(shop.pool.scenes)).split(64):
        with shop.autocast():
            states = clip.vision_model(shop.pool.pixels(rows), output_hidden_states=True).hidden_states
        found.append(states[-2].half().cpu())
    return torch.cat(found)


def last_look(clip: CLIPModel, below: Tensor) -> Tensor:
    """Projected vectors (B, D) from what reaches the last layer (B, 257, D), computed for the class token alone."""
    tower, layer = clip.vision_model, clip.vision_model.encoder.layers[-1]
    attention, known = layer.self_attn, layer.layer_norm1(below.float())
    query, key, value = (
        projection(x).unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)
        for projection, x in (
            (attention.q_proj, known[:, :1]),
            (attention.k_proj, known),
            (attention.v_proj, known),
        )
    )
    seen = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
    hidden = below[:, :1].float() + attention.out_proj(seen)
    hidden = hidden + layer.mlp(layer.layer_norm2(hidden))
    return clip.visual_projection(tower.post_layernorm(hidden[:, 0]))


def _contrast(
    shop: Workshop,
    stage: str,
    clip: CLIPModel,
    tokenizer: CLIPTokenizer,
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
        index = (shop.pool.draw_alike if one_place else shop.pool.draw)(LENGTH[stage].batch, generator)
        captions = shop.pool.captions(index, generator, wording)
        tokens = tokenizer(captions, padding=True, return_tensors="pt").to(shop.device)
        with shop.autocast():
            image = F.normalize(look(index, step, generator).float(), dim=-1)
            text = clip.text_projection(clip.text_model(**tokens).pooler_output).float()
        logits = clip.logit_scale.clamp(max=4.6).exp() * image @ F.normalize(text, dim=-1).T
        equal = torch.tensor([[float(a == b) for b in captions] for a in captions], device=shop.device)
        target = equal / equal.sum(1, keepdim=True)
        value = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        found = equal.gather(1, logits.argmax(1, keepdim=True)).mean().item()
        return value, {"found": found}

    shop.fit(stage, clip, loss, weight_decay=0.05, ema=0.0)
    clip.save_pretrained(shop.family / "clip")
