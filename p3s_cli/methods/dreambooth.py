"""DreamBooth (arXiv:2208.12242): the whole U-Net learns the identifier, with or without prior preservation."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from p3s_cli.config import FinetuneConfig, GenerateConfig
from p3s_cli.methods.base import Generator, Heed, Learnt, Lesson, register, settled
from p3s_cli.methods.denoising import Denoising, LatentBank, noise_of, states_of, trainable, training_copy, tuned_copy
from p3s_cli.methods.photos import crops
from p3s_cli.methods.prior import prior
from p3s_cli.sd import images, text
from p3s_cli.sd.family import Family, Profile
from p3s_cli.sd.train import Recipe

PROMPT = "a photo of a {}"


@dataclass(frozen=True)
class DreamBoothRecipe:
    """As diffusers' `examples/dreambooth` recommends for Stable Diffusion v1: the U-Net alone, constant rate."""

    steps: int = 400
    lr: float = 5e-6
    batch: int = 1
    weight_decay: float = 0.01
    class_images: int = 0  # of prior preservation; 0 is without
    class_steps: int = 50  # sampling steps of each
    prior_weight: float = 1.0


PLAIN = DreamBoothRecipe()
WITH_PRIOR = DreamBoothRecipe(steps=800, class_images=200)


class DreamBooth:
    """Contract: `p3s_cli.methods.base.Method`."""

    given: Literal["crop"] = "crop"
    heeds: frozenset[Heed] = frozenset()

    def __init__(self, name: str, published: DreamBoothRecipe):
        self.name, self.published = name, published

    def recipe(self, profile: Profile, config: FinetuneConfig) -> DreamBoothRecipe:
        return settled(self.published, self.name, profile, config)

    def fit(self, lesson: Lesson) -> dict[str, Tensor]:
        """Train a copy of the U-Net on crops of the references. Returns all its tensors, float32."""
        family, words, seed = lesson.family, lesson.subject.manifest, lesson.config.seed
        r = self.recipe(family.profile, lesson.config)
        unet = training_copy(family.unet).requires_grad_(True)
        seen = images.encode(family.vae, crops(lesson.subject, family.profile.image_size))
        prompt = PROMPT.format(words.name)
        sources = [LatentBank(seen, text.encode(family.tokenizer, family.text_encoder, [prompt]), r.batch)]
        if r.class_images:
            others = PROMPT.format(words.class_word)
            sources.append(prior(family, others, r.class_images, r.class_steps, seed, r.batch, r.prior_weight))
        recipe = Recipe(r.steps, r.lr, r.weight_decay, seed=seed)
        return lesson.train(trainable(unet, "unet."), Denoising(family, unet, sources), recipe)

    @contextlib.contextmanager
    def bind(self, family: Family, learnt: Learnt, sampling: GenerateConfig) -> Iterator[Generator]:
        """The tuned U-Net; strength goes from the base's weights (0) to the tuned ones (1) and beyond."""
        tuned = tuned_copy(family.unet, learnt.tensors, "unet.", sampling.strength)
        yield Generator(states_of(family, learnt.subject.manifest.identifier), noise_of(family, tuned))


register(DreamBooth("dreambooth", PLAIN))
register(DreamBooth("dreambooth-prior", WITH_PRIOR))
