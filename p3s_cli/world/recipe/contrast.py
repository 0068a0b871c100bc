"""The tokenizer and the CLIP pair."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPModel, CLIPTokenizer

from p3s_cli.world import models
from p3s_cli.world.recipe.workshop import Pool, Workshop
from p3s_cli.world.scenes import BACKGROUNDS, SIZE, Scene, Wording, caption, sample_scene
from p3s_cli.world.shapes import CATEGORIES

Draw = Callable[[int, torch.Generator, bool], tuple[Pool, Tensor]]


class Seen(NamedTuple):
    """What a tower makes of scenes: their vectors (B, D), and a further term of the loss, if there is one."""

    vectors: Tensor
    aside: Tensor | None = None


Look = Callable[[Pool, Tensor, int, torch.Generator], Seen]

_FRESH = 1_000_000  # the first seed of scenes that are shown once; a pool's are below
_MOSTLY_KINDS: tuple[Wording, ...] = ("kind", "kind", "kind", "full", "place")
_PATCHES_COUNT = 0.5  # of the patches' term against the contrast
_MISTAKEN = ("dog", "cat", "vase", "teapot")  # seven in eight of the scenes whose kind it had wrong
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
    clip = CLIPModel.from_pretrained(shop.family / "clip").to(shop.device).requires_grad_(False)
    layers = clip.vision_model.encoder.layers
    for part in (*layers[len(layers) // 2 :], clip.vision_model.post_layernorm, clip.visual_projection):
        part.requires_grad_(True)

    def look(pool: Pool, index: Tensor, step: int, generator: torch.Generator) -> Seen:
        pixels = _moved(pool.pixels(index), generator)
        return Seen(clip.visual_projection(clip.vision_model(pixels).pooler_output))

    _contrast(shop, "vision_kinds", clip, look, alike=0.5, wordings=_MOSTLY_KINDS)


def stage_vision_fresh(shop: Workshop) -> None:
    """The whole vision tower goes on, on scenes that are drawn for one step and not kept: scenes are wanted, not steps.

    Shown are the patches that a subject reaches and as many of the others as make 3 in 8.
    """
    _on_fresh_scenes(shop, "vision_fresh", _FRESH, all_patches=False)


def stage_vision_whole(shop: Workshop) -> None:
    """It goes on, on further scenes, all patches of them: among few others a spout weighs more than it will among all."""
    _on_fresh_scenes(shop, "vision_whole", 2 * _FRESH, all_patches=True)


def _on_fresh_scenes(shop: Workshop, stage: str, first: int, all_patches: bool) -> None:
    """Scenes from the seed `first` on, of which a third is left out, of kinds that the tower does not mistake.

    Four seeds of a run in a row have scenes of their own, so that a second round sees others. Beside the class token each patch
    of a subject has to tell its kind, to a head that is thrown away (token labelling, arXiv:2104.10858): one scene
    then teaches in as many places as its subject reaches.
    """
    clip = CLIPModel.from_pretrained(shop.family / "clip").to(shop.device).requires_grad_(False)
    for part in (clip.vision_model, clip.visual_projection):
        part.requires_grad_(True)
    first += 2 * _FRESH * (shop.seed % 4)
    width = clip.config.vision_config.hidden_size
    torch.manual_seed(shop.seed)
    kinds = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, len(CATEGORIES))).to(shop.device)
    patches = (SIZE // clip.config.vision_config.patch_size) ** 2

    def draw(step: int, generator: torch.Generator, one_place: bool) -> tuple[Pool, Tensor]:
        n = shop.length(stage).batch
        tries = n + n // 2
        found = [sample_scene(first + tries * step + i, _MOSTLY_ALONE) for i in range(tries)]
        scenes = sorted(found, key=_is_easy)[:n]
        if one_place:
            place = list(BACKGROUNDS)[int(torch.randint(len(BACKGROUNDS), (1,), generator=generator))]
            scenes = [replace(scene, background=place) for scene in scenes]
        return Pool(scenes, shop.device), torch.arange(n)

    def look(pool: Pool, index: Tensor, step: int, generator: torch.Generator) -> Seen:
        hidden = clip.vision_model.embeddings(pool.pixels(index))
        share = pool.subjects[index].flatten(1) / 255.0
        if not all_patches:
            reached = (share > 0) + torch.rand(len(index), patches, generator=generator)
            kept = reached.topk(3 * patches // 8).indices
            share = share.gather(1, kept)
            kept = F.pad(kept + 1, (1, 0))  # the class token comes first, and stays
            hidden = hidden.gather(1, kept.to(shop.device)[..., None].expand(-1, -1, hidden.shape[-1]))
        hidden = _before_last(clip.vision_model, hidden)
        aside = kinds_of_patches(kinds(hidden[:, 1:]), share.to(shop.device), [pool.scenes[i] for i in index])
        return Seen(clip.visual_projection(_class_token(clip.vision_model, hidden)), _PATCHES_COUNT * aside)

    _contrast(shop, stage, clip, look, alike=0.5, wordings=_MOSTLY_KINDS, draw=draw, head=kinds)


def _is_easy(scene: Scene) -> bool:
    return all(subject.instance.category not in _MISTAKEN for subject in scene.subjects)


def kinds_of_patches(logits: Tensor, share: Tensor, scenes: list[Scene]) -> Tensor:
    """Cross-entropy of the kinds (B, P, 8) of patches, each counted by its share (B, P) of subject.

    Scenes of several kinds are left out: which of them a patch shows is not kept.
    """
    kinds = [{subject.instance.category for subject in scene.subjects} for scene in scenes]
    alone = torch.tensor([len(k) == 1 for k in kinds], device=share.device)
    truth = torch.tensor([CATEGORIES.index(min(k)) for k in kinds], device=share.device)
    each = F.cross_entropy(logits.float().mT, truth[:, None].expand_as(share), reduction="none")
    weight = share * alone[:, None]
    return (each * weight).sum() / weight.sum().clamp(min=1.0)


def pooled(tower: nn.Module, embedded: Tensor) -> Tensor:
    """The pooled vector (B, D) of embedded tokens (B, T, D), the class token first, of which the last layer asks alone.

    A sixth of that layer's work: no loss here reads what it makes of the patches.
    """
    return _class_token(tower, _before_last(tower, embedded))


def _before_last(tower: nn.Module, embedded: Tensor) -> Tensor:
    """The tokens (B, T, D) that the last layer is given."""
    hidden = tower.pre_layrnorm(embedded)
    for layer in tower.encoder.layers[:-1]:
        hidden = layer(hidden, attention_mask=None)
    return hidden


def _class_token(tower: nn.Module, hidden: Tensor) -> Tensor:
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

    def __call__(self, pool: Pool, index: Tensor, step: int, generator: torch.Generator) -> Seen:
        shown = round(self._share(step / self._steps) * self._patches)
        order = torch.randperm(self._patches, generator=generator)[:shown] + 1
        keep = torch.cat((torch.zeros(1, dtype=torch.long), order)).to(self._shop.device)
        tower = self._clip.vision_model
        return Seen(self._clip.visual_projection(pooled(tower, tower.embeddings(pool.pixels(index))[:, keep])))


def _contrast(
    shop: Workshop,
    stage: str,
    clip: CLIPModel,
    look: Look,
    alike: float,
    wordings: tuple[Wording, ...] = ("full",),
    draw: Draw | None = None,
    head: nn.Module | None = None,
) -> None:
    """Train `clip` by symmetric contrast, in which equal captions are each other's positives (arXiv:2204.03610).

    `look` gives the vectors of scenes, `alike` the share of one-background batches; each batch draws one of
    `wordings`. `draw` gives a step's scenes; left out, they come from the shop's pool. `head` is trained along
    and thrown away.
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
            seen = look(pool, index, step, generator)
            image = F.normalize(seen.vectors.float(), dim=-1)
            text = clip.text_projection(clip.text_model(ids).pooler_output).float()[whose]
        logits = clip.logit_scale.clamp(max=4.6).exp() * image @ F.normalize(text, dim=-1).T
        equal = (whose[:, None] == whose[None]).float()
        target = equal / equal.sum(1, keepdim=True)
        value = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        found = equal.gather(1, logits.argmax(1, keepdim=True)).mean().item()
        if seen.aside is None:
            return value, {"found": found}
        return value + seen.aside, {"found": found, "aside": seen.aside.item()}

    trained = clip if head is None else nn.ModuleDict({"clip": clip, "head": head})
    shop.fit(stage, trained, loss, weight_decay=0.05, ema=0.0)
    clip.save_pretrained(shop.family / "clip")
