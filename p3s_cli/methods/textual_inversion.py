"""Textual Inversion (arXiv:2208.01618): one new word is all that learns."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from p3s_cli.config import FinetuneConfig, GenerateConfig
from p3s_cli.methods.base import Generator, Heed, Learnt, Lesson, register, settled
from p3s_cli.methods.denoising import Denoising, SubBatch, noise_of
from p3s_cli.methods.photos import crops
from p3s_cli.methods.words import NewWord
from p3s_cli.sd import images
from p3s_cli.sd.family import Family, Profile
from p3s_cli.sd.train import Recipe

_KINDS = ("", "cropped ", "close-up ", "bright ", "dark ", "good ", "bad ", "cool ", "nice ")
# 27 neutral sentences, as many as the paper's, about a photo, a rendition or the thing itself
TEMPLATES = tuple(
    form.format(kind=kind, word="{}")
    for kind in _KINDS
    for form in ("a {kind}photo of a {word}", "a {kind}photo of the {word}", "a {kind}rendition of a {word}")
)


@dataclass(frozen=True)
class TextualInversionRecipe:
    """As diffusers' `examples/textual_inversion`: 5e-4 scaled by a batch of 4, half of the images mirrored."""

    steps: int = 3000
    lr: float = 2e-3
    batch: int = 4
    weight_decay: float = 0.01


class TextualInversion:
    """Contract: `p3s_cli.methods.base.Method`."""

    name = "textual-inversion"
    given: Literal["crop"] = "crop"
    heeds: frozenset[Heed] = frozenset()

    def recipe(self, profile: Profile, config: FinetuneConfig) -> TextualInversionRecipe:
        return settled(TextualInversionRecipe(), self.name, profile, config)

    def fit(self, lesson: Lesson) -> dict[str, Tensor]:
        """Learn one embedding from crops of the references. Returns it as `word` (D,), float32."""
        family, words = lesson.family, lesson.subject.manifest
        r = self.recipe(family.profile, lesson.config)
        word = NewWord(family, words, instead_of_class=True)
        seen = crops(lesson.subject, family.profile.image_size)
        latents = images.encode(family.vae, torch.cat((seen, seen.flip(-1))))
        prompts = [t.format(words.name) for t in TEMPLATES]

        def draw(generator: torch.Generator) -> SubBatch:
            chosen = torch.randint(len(latents), (r.batch,), generator=generator)
            template = torch.randint(len(prompts), (r.batch,), generator=generator)
            return SubBatch(latents[chosen], word.encode([prompts[i] for i in template]))

        loss = Denoising(family, family.unet, [draw])  # through which gradients pass, and which they leave as it is
        recipe = Recipe(r.steps, r.lr, r.weight_decay, seed=lesson.config.seed)
        return lesson.train({"word": word.row}, loss, recipe)

    @contextlib.contextmanager
    def bind(self, family: Family, learnt: Learnt, sampling: GenerateConfig) -> Iterator[Generator]:
        """The family's own U-Net under prompts that say the new word for "identifier class".

        Strength goes from the class word's embedding (0) to the learnt one (1) and beyond.
        """
        word = NewWord(family, learnt.subject.manifest, instead_of_class=True)
        word.learnt(learnt.tensors["word"], sampling.strength, family.dtype)
        yield Generator(word.states, noise_of(family, family.unet))


register(TextualInversion())
