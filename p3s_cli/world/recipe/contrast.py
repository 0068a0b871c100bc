"""The tokenizer and the CLIP pair, its towers together."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPModel, CLIPTokenizer

from p3s_cli.world import models
from p3s_cli.world.recipe.pool import as_pixels
from p3s_cli.world.recipe.workshop import Workshop
from p3s_cli.world.scenes import SIZE, caption, sample_scene


def stage_tokenizer(shop: Workshop) -> None:
    texts = [caption(sample_scene(seed), seed) for seed in range(20_000)]
    tokenizer = models.build_tokenizer(texts, shop.family / "tokenizer")
    shop.log("tokenizer", {"tokens": len(tokenizer)})


def stage_clip(shop: Workshop) -> None:
    """Both CLIP towers, by symmetric contrast; most steps show a quarter of the patches (FLIP, arXiv:2212.00794)."""
    torch.manual_seed(shop.seed)
    tokenizer = CLIPTokenizer.from_pretrained(shop.family / "tokenizer")
    clip = models.build_clip(tokenizer).to(shop.device)
    steps, n = shop.length("clip").steps, shop.length("clip").batch
    patches = (SIZE // clip.config.vision_config.patch_size) ** 2

    def draw(step: int, generator: torch.Generator) -> tuple[Pairs, Tensor]:
        index = shop.pool.draw(n, generator)
        kept = torch.randperm(patches, generator=generator)[: patches // 4 if step < 0.94 * steps else patches] + 1
        ids = shop.tokens(shop.pool.captions(index, generator)).to(shop.device).long()
        pairs = Pairs(shop.pool.bytes(index), ids, equal_rows(ids))
        return pairs, F.pad(kept, (1, 0)).to(shop.device)  # the class token comes first, and stays

    def compute(drawn: tuple[Pairs, Tensor], clip: CLIPModel) -> tuple[Tensor, dict[str, Tensor]]:
        pairs, kept = drawn
        tower = clip.vision_model
        with shop.autocast():
            image = clip.visual_projection(pooled(tower, tower.embeddings(as_pixels(pairs.images))[:, kept]))
            text = clip.text_projection(clip.text_model(pairs.text).pooler_output)
        return contrast(image, text, clip.logit_scale, pairs.equal)

    shop.fit("clip", clip, draw, compute, weight_decay=0.05, ema=0.0)
    clip.save_pretrained(shop.family / "clip")


@dataclass(frozen=True)
class Pairs:
    """Images (B, 3, H, W) in bytes; of their captions the token ids (B, 77), or what the text tower made of them (B, D);
    and which captions are equal (B, B)."""

    images: Tensor
    text: Tensor
    equal: Tensor


def contrast(image: Tensor, text: Tensor, scale: Tensor, equal: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Symmetric contrast of vectors (B, D), in which equal captions (B, B) are each other's positives (arXiv:2204.03610)."""
    image, text = (F.normalize(x.float(), dim=-1) for x in (image, text))
    logits, equal = scale.clamp(max=4.6).exp() * image @ text.T, equal.float()
    target = equal / equal.sum(1, keepdim=True)
    value = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
    return value, {"found": equal.gather(1, logits.detach().argmax(1, keepdim=True)).mean()}


def equal_rows(ids: Tensor) -> Tensor:
    """(B, B), true where two rows of (B, L) are the same."""
    return (ids[:, None] == ids[None]).all(-1)


def pooled(tower: nn.Module, embedded: Tensor) -> Tensor:
    """The pooled vector (B, D) of embedded tokens (B, T, D), the class token first, of which the last layer asks alone.

    A sixth of that layer's work: no loss here reads what it makes of the patches.
    """
    return class_token(tower, before_last(tower, embedded))


def before_last(tower: nn.Module, embedded: Tensor) -> Tensor:
    """The tokens (B, T, D) that the last layer is given."""
    hidden = tower.pre_layrnorm(embedded)
    for layer in tower.encoder.layers[:-1]:
        hidden = layer(hidden, attention_mask=None)
    return hidden


def class_token(tower: nn.Module, hidden: Tensor) -> Tensor:
    """The pooled vector (B, D): what the last layer makes of the first of its tokens (B, T, D)."""
    last = tower.encoder.layers[-1]
    attention, tokens = last.self_attn, last.layer_norm1(hidden)

    def heads(states: Tensor) -> Tensor:
        return states.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)

    asked = F.scaled_dot_product_attention(
        heads(attention.q_proj(tokens[:, :1])), heads(attention.k_proj(tokens)), heads(attention.v_proj(tokens))
    )
    first = hidden[:, 0] + attention.out_proj(asked.transpose(1, 2).flatten(1))
    return tower.post_layernorm(first + last.mlp(last.layer_norm2(first)))
