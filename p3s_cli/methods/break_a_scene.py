"""Break-A-Scene (arXiv:2305.16311) for one subject: a loss inside its mask, first on a new word, then on everything.

With one subject there are no unions of subjects to draw. Beside the masked loss, the word's attention is to cover the
subject and nothing else.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor
from torch.nn import functional as F

from p3s_cli.config import FinetuneConfig, GenerateConfig
from p3s_cli.methods.base import Generator, Heed, Learnt, Lesson, register, settled
from p3s_cli.methods.denoising import Denoising, SubBatch, noise_of, trainable, training_copy, tuned_copy
from p3s_cli.methods.photos import read_originals
from p3s_cli.methods.prior import class_images
from p3s_cli.methods.views import base_view, look_mask
from p3s_cli.methods.words import NewWord
from p3s_cli.paper.injection import attention_seam
from p3s_cli.paper.subject_copy import attention_layers
from p3s_cli.sd import images
from p3s_cli.sd.family import Family, Profile
from p3s_cli.sd.train import OnStep, Recipe
from p3s_cli.subject import Subject

PROMPT = "a photo of a {}"
_SIDE = 16  # queries, of the attention layers that the attention loss reads


@dataclass(frozen=True)
class BreakASceneRecipe:
    """As the authors' `train.py`: half of the steps on the word, half on U-Net and text encoder as well."""

    steps: int = 800
    word_lr: float = 5e-4  # in the first half
    lr: float = 2e-6  # in the second
    batch: int = 1
    weight_decay: float = 0.01
    class_images: int = 100
    class_steps: int = 50
    class_prompt: str = "a photo at the beach"
    prior_weight: float = 1.0
    attention_weight: float = 1e-2


@dataclass(frozen=True)
class Scenes:
    """Draws scenes (K, 4, h, w) under their prompt, as the word and text encoder that are being tuned read it by then.

    With the subject's masks `inside` (K, 1, h, w) the error counts inside alone, and the weight makes it the mean over
    all positions of ||mask (noise - predicted)||^2, the authors' masked loss.
    """

    latents: Tensor
    word: NewWord
    prompt: str
    batch: int
    inside: Tensor | None = None
    weight: float = 1.0

    def __call__(self, generator: torch.Generator) -> SubBatch:
        chosen = torch.randint(len(self.latents), (self.batch,), generator=generator)
        inside = None if self.inside is None else self.inside[chosen]
        share = 1.0 if inside is None else inside.mean().item()
        states = self.word.encode([self.prompt]).expand(self.batch, -1, -1)
        return SubBatch(self.latents[chosen], states, inside, self.weight * share)


class BreakAScene:
    """Contract: `p3s_cli.methods.base.Method`."""

    name = "break-a-scene"
    given: Literal["mask"] = "mask"
    heeds: frozenset[Heed] = frozenset()

    def recipe(self, profile: Profile, config: FinetuneConfig) -> BreakASceneRecipe:
        return settled(BreakASceneRecipe(), self.name, profile, config)

    def fit(self, lesson: Lesson) -> dict[str, Tensor]:
        """Learn from photo and mask. Returns the word and all tensors of U-Net and text encoder, float32."""
        family, subject, seed = lesson.family, lesson.subject, lesson.config.seed
        r = self.recipe(family.profile, lesson.config)
        word, unet = NewWord(family, subject.manifest, instead_of_class=True), training_copy(family.unet)
        others = class_images(family, r.class_prompt, r.class_images, r.class_steps, seed)
        kept = Scenes(others, word, r.class_prompt, r.batch, weight=r.prior_weight)
        layers = _layers(unet, family.profile.image_size // 8)
        attends = _Attention(word.place(_prompt(subject)), r.attention_weight)
        loss = Denoising(family, unet, [_scenes(family, subject, word, r.batch), kept], layers, attends)
        first, second = r.steps // 2, r.steps - r.steps // 2
        # beside the run's own checkpoint and under its name, so that it goes when that one goes
        kept_at = lesson.checkpoint
        early = kept_at and replace(kept_at, path=kept_at.path.with_name(f"{kept_at.path.name}-word"), last=True)
        recipe = Recipe(first, r.word_lr, r.weight_decay, seed=seed)
        half = replace(lesson, on_step=_counted(lesson.on_step, 0, r.steps), checkpoint=early)
        with attention_seam(unet, "copy"):
            half.train({"word": word.row}, loss, recipe)
        unet.requires_grad_(True)
        word.text_encoder.requires_grad_(True).get_input_embeddings().known.requires_grad_(False)
        everything = trainable(unet, "unet.") | trainable(word.text_encoder, "text.")
        recipe = replace(recipe, steps=second, lr=r.lr, seed=seed + 1)
        half = replace(lesson, on_step=_counted(lesson.on_step, first, r.steps))
        with attention_seam(unet, "copy"):
            return half.train(everything, loss, recipe)

    @contextlib.contextmanager
    def bind(self, family: Family, learnt: Learnt, sampling: GenerateConfig) -> Iterator[Generator]:
        """The tuned U-Net and text encoder under prompts that say the new word for "identifier class"."""
        word = NewWord(family, learnt.subject.manifest, instead_of_class=True)
        word.text_encoder = tuned_copy(word.text_encoder, learnt.tensors, "text.", sampling.strength).to(family.dtype)
        tuned = tuned_copy(family.unet, learnt.tensors, "unet.", sampling.strength)
        yield Generator(word.states, noise_of(family, tuned))


@dataclass(frozen=True)
class _Attention:
    """The authors' attention loss: weight x mean over scenes of ||mask - map / max map||^2, mean over positions.

    The map is what the word, text state `place`, gets of each query's attention, averaged over layers and heads.
    """

    place: int
    weight: float

    def __call__(self, parts: Sequence[SubBatch], maps: Mapping[str, Tensor]) -> Tensor:
        inside = parts[0].inside
        assert inside is not None
        given = torch.stack([m[: len(inside), ..., self.place].mean(1) for m in maps.values()]).mean(0)  # (n, N)
        side = math.isqrt(given.shape[1])
        mask = F.interpolate(inside, size=(side, side)).flatten(1)
        return self.weight * (mask - given / given.amax(1, keepdim=True)).square().mean()


def _layers(unet: UNet2DConditionModel, latent: int) -> frozenset[str]:
    """The cross-attention layers of down and up blocks with 16 x 16 queries, the authors', or the nearest to that.

    `latent` is the side of what is denoised.
    """
    blocks = len(unet.config.block_out_channels)
    sides = {}
    for name in attention_layers(unet, "attn2"):
        where, number = name.split(".")[:2]
        if where != "mid_block":
            halved = int(number) if where == "down_blocks" else blocks - 1 - int(number)
            sides[name] = latent >> halved
    nearest = min(sides.values(), key=lambda side: abs(side - _SIDE))
    return frozenset(name for name, side in sides.items() if side == nearest)


def _prompt(subject: Subject) -> str:
    return PROMPT.format(subject.manifest.name)


def _scenes(family: Family, subject: Subject, word: NewWord, batch: int) -> Scenes:
    """The largest square of each original photo around the subject and its mirror image, with their masks."""
    size, photos = family.profile.image_size, read_originals(subject)
    pixels = torch.stack([p.seen(base_view(p.mask), size, "border") for p in photos])
    masks = torch.stack([look_mask(p.mask, base_view(p.mask), size) for p in photos])
    latents = images.encode(family.vae, torch.cat((pixels, pixels.flip(-1))))
    masks = F.interpolate(torch.cat((masks, masks.flip(-1))), size=latents.shape[-2:], mode="area")
    return Scenes(latents, word, _prompt(subject), batch, (masks >= 0.5).to(latents))


def _counted(on_step: OnStep | None, before: int, total: int) -> OnStep | None:
    """Report the steps of one half as steps of the whole."""
    return on_step and (lambda step, _, numbers: on_step(before + step, total, numbers))


register(BreakAScene())
