"""The tokenizer and the CLIP pair."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPModel, CLIPTokenizer

from p3s_cli.world import models
from p3s_cli.world.recipe.workshop import Pool, Workshop
from p3s_cli.world.scenes import BACKGROUNDS, SIZE, Wording, caption, sample_scene

Draw = Callable[[int, torch.Generator, bool], tuple[Pool, Tensor]]
Look = Callable[[Pool, Tensor, int, torch.Generator], Tensor]

_FRESH = 1_000_000  # the first seed of scenes that are shown once; a pool's are below
_MOSTLY_KINDS: tuple[Wording, ...] = ("kind", "kind", "kind", "full", "place")
_MOSTLY_ALONE = (1, 1, 1, 1, 1, 1, 1, 1, 2, 2, 3)  # subjects of such a scene


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
    clip = _upper_half(shop)

    def look(pool: Pool, index: Tensor, step: int, generator: torch.Generator) -> Tensor:
        pixels = _moved(pool.pixels(index), generator)
        return clip.visual_projection(clip.vision_model(pixels).pooler_output)

    _contrast(shop, "vision_kinds", clip, look, alike=0.5, wordings=_MOSTLY_KINDS)


def stage_vision_fresh(shop: Workshop) -> None:
    """The same parts go on, on scenes that are drawn for one step and not kept: what is wanted is scenes, not steps.

    Five in six steps show the patches that a subject reaches and as many of the others as make 3 in 8.
    """
    _on_fresh_scenes(shop, "vision_fresh", _FRESH, whole=1 / 6)


def stage_vision_whole(shop: Workshop) -> None:
    """Further scenes, all patches of them: among few others a spout weighs more than it will among all."""
    _on_fresh_scenes(shop, "vision_whole", 2 * _FRESH, whole=1.0)


def _on_fresh_scenes(shop: Workshop, stage: str, first: int, whole: float) -> None:
    """Scenes from the seed `first` on; `whole` is the share of steps that show all patches."""
    clip = _upper_half(shop)
    patches = (SIZE // clip.config.vision_config.patch_size) ** 2

    def draw(step: int, generator: torch.Generator, one_place: bool) -> tuple[Pool, Tensor]:
        n = shop.length(stage).batch
        scenes = [sample_scene(first + n * step + i, _MOSTLY_ALONE) for i in range(n)]
        if one_place:
            place = list(BACKGROUNDS)[int(torch.randint(len(BACKGROUNDS), (1,), generator=generator))]
            scenes = [replace(scene, background=place) for scene in scenes]
        return Pool(scenes, shop.device), torch.arange(n)

    def look(pool: Pool, index: Tensor, step: int, generator: torch.Generator) -> Tensor:
        hidden = clip.vision_model.embeddings(pool.pixels(index))
        if torch.rand(1, generator=generator).item() >= whole:
            reached = (pool.subjects[index].flatten(1) > 0) + torch.rand(len(index), patches, generator=generator)
            keep = F.pad(reached.topk(3 * patches // 8).indices + 1, (1, 0))  # the class token comes first, and stays
            hidden = hidden.gather(1, keep.to(shop.device)[..., None].expand(-1, -1, hidden.shape[-1]))
        return clip.visual_projection(pooled(clip.vision_model, hidden))

    _contrast(shop, stage, clip, look, alike=0.5, wordings=_MOSTLY_KINDS, draw=draw)


def _upper_half(shop: Workshop) -> CLIPModel:
    """The pair, of which the upper half of the vision tower and its projection are free."""
    clip = CLIPModel.from_pretrained(shop.family / "clip").to(shop.device).requires_grad_(False)
    layers = clip.vision_model.encoder.layers
    for part in (*layers[len(layers) // 2 :], clip.vision_model.post_layernorm, clip.visual_projection):
        part.requires_grad_(True)
    return clip


def pooled(tower: nn.Module, embedded: Tensor) -> Tensor:
    """The pooled vector (B, D) of embedded tokens (B, T, D), the class token first, of which the last layer asks alone.

    A sixth of that layer's work: no loss here reads what it makes of the patches.
    """
    hidden = tower.pre_layrnorm(embedded)
    *before, last = tower.encoder.layers
    for layer in before:
        hidden = layer(hidden, attention_mask=None)
    attention, tokens = last.self_attn, last.layer_norm1(hidden)

    def heads(states: Tensor) -> Tensor:
        return states.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)

    asked = F.scaled_dot_product_attention(
        heads(attention.q_proj(tokens[:, :1])), heads(attention.k_proj(tokens)), heads(attention.v_proj(tokens))
    )
    first = hidden[:, 0] + attention.out_proj(asked.transpose(1, 2).flatten(1))
    return tower.post_layernorm(first + last.mlp(last.layer_norm2(first)))


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

    def __call__(self, pool: Pool, index: Tensor, step: int, generator: torch.Generator) -> Tensor:
        shown = round(self._share(step / self._steps) * self._patches)
        order = torch.randperm(self._patches, generator=generator)[:shown] + 1
        keep = torch.cat((torch.zeros(1, dtype=torch.long), order)).to(self._shop.device)
        tower = self._clip.vision_model
        return self._clip.visual_projection(pooled(tower, tower.embeddings(pool.pixels(index))[:, keep]))


def _contrast(
    shop: Workshop,
    stage: str,
    clip: CLIPModel,
    look: Look,
    alike: float,
    wordings: tuple[Wording, ...] = ("full",),
    draw: Draw | None = None,
) -> None:
    """Train `clip` by symmetric contrast, in which equal captions are each other's positives (arXiv:2204.03610).

    `look` gives the vectors of scenes, `alike` the share of one-background batches; each batch draws one of
    `wordings`. `draw` gives a step's scenes; left out, they come from the shop's pool.
    """

    def from_pool(step: int, generator: torch.Generator, one_place: bool) -> tuple[Pool, Tensor]:
        return shop.pool, (shop.pool.draw_alike if one_place else shop.pool.draw)(shop.length(stage).batch, generator)

    def loss(step: int, generator: torch.Generator):
        wording = wordings[int(torch.randint(len(wordings), (1,), generator=generator))]
        one_place = wording != "place" and torch.rand(1, generator=generator).item() < alike
        pool, index = (draw or from_pool)(step, generator, one_place)
        captions = pool.captions(index, generator, wording)
        ids, whose = shop.tokens(captions).to(shop.device).long().unique(dim=0, return_inverse=True)
        with shop.autocast():
            image = F.normalize(look(pool, index, step, generator).float(), dim=-1)
            text = clip.text_projection(clip.text_model(ids).pooler_output).float()[whose]
        logits = clip.logit_scale.clamp(max=4.6).exp() * image @ F.normalize(text, dim=-1).T
        equal = (whose[:, None] == whose[None]).float()
        target = equal / equal.sum(1, keepdim=True)
        value = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        found = equal.gather(1, logits.argmax(1, keepdim=True)).mean().item()
        return value, {"found": found}

    shop.fit(stage, clip, loss, weight_decay=0.05, ema=0.0)
    clip.save_pretrained(shop.family / "clip")
