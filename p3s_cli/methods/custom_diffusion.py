"""Custom Diffusion (arXiv:2212.04488): keys and values of cross-attention and one new word, with prior preservation."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from p3s_cli.config import FinetuneConfig, GenerateConfig
from p3s_cli.methods.base import Generator, Heed, Learnt, Lesson, register, settled
from p3s_cli.methods.denoising import Denoising, SubBatch, noise_of, partly_trained, trainable, tuned_copy
from p3s_cli.methods.photos import crops
from p3s_cli.methods.prior import prior
from p3s_cli.methods.words import NewWord
from p3s_cli.sd import images
from p3s_cli.sd.family import Family, Profile
from p3s_cli.sd.train import Recipe
from p3s_cli.subject import Subject

PROMPT = "photo of a {}"
_VIEWS = 24  # rescaled views encoded once for each reference


@dataclass(frozen=True)
class CustomDiffusionRecipe:
    """As diffusers' `examples/custom_diffusion` for one object: 1e-5 scaled by a batch of 2 and by 2 for prior preservation.

    Images are mirrored and rescaled, in 24 ways that are encoded once and not in another one at every step. The class's are
    drawn by the base, not retrieved from a collection of photos, and the new word begins as its class word, not as a rare one.
    All latents, here and of every other rival, are the mean of what the autoencoder says, not a sample of it.
    """

    steps: int = 250
    lr: float = 4e-5
    batch: int = 2
    weight_decay: float = 0.01
    class_images: int = 200
    class_steps: int = 50
    prior_weight: float = 1.0


@dataclass(frozen=True)
class _View:
    """A rescaled crop: pixels (3, S, S), where they are the photo's (1, S, S), and the words that say the scale."""

    pixels: Tensor
    inside: Tensor
    prefix: str


def rescaled(crop: Tensor, generator: torch.Generator) -> _View:
    """Mirror by chance, then shrink (2 of 3 times) to 1/3-1 of the side on grey, or enlarge to 1.2-1.4 and cut out.

    crop (3, S, S). Below 0.6 the prompt says so, above 1 too (arXiv:2212.04488, Sec. 3.2).
    """
    size = crop.shape[-1]
    mirrored, shrunk, u, x, y, choice = torch.rand(6, generator=generator).tolist()
    crop = crop.flip(-1) if mirrored < 0.5 else crop
    scale = 1 / 3 + 2 / 3 * u if shrunk < 2 / 3 else 1.2 + 0.2 * u
    side = max(1, round(size * scale))
    scaled = F.interpolate(crop[None], size=side, mode="bilinear", antialias=True, align_corners=False)[0]
    top, left = round(abs(side - size) * y), round(abs(side - size) * x)
    if side > size:
        prefix = ("zoomed in ", "close up ")[choice < 0.5]
        return _View(scaled[:, top : top + size, left : left + size], torch.ones_like(crop[:1]), prefix)
    pixels, inside = torch.full_like(crop, 0.5), torch.zeros_like(crop[:1])
    pixels[:, top : top + side, left : left + side] = scaled
    inside[:, top : top + side, left : left + side] = 1
    return _View(pixels, inside, ("far away ", "very small ")[choice < 0.5] if side < 0.6 * size else "")


class CustomDiffusion:
    """Contract: `p3s_cli.methods.base.Method`."""

    name = "custom-diffusion"
    given: Literal["crop"] = "crop"
    heeds: frozenset[Heed] = frozenset()

    def recipe(self, profile: Profile, config: FinetuneConfig) -> CustomDiffusionRecipe:
        return settled(CustomDiffusionRecipe(), self.name, profile, config)

    def fit(self, lesson: Lesson) -> dict[str, Tensor]:
        """Train to_k and to_v of cross-attention in a copy of the U-Net, and the new word. Returns these, float32."""
        family, words, seed = lesson.family, lesson.subject.manifest, lesson.config.seed
        r = self.recipe(family.profile, lesson.config)
        word = NewWord(family, words, instead_of_class=False)
        unet = partly_trained(copy.deepcopy(family.unet), lambda n: "attn2.to_k" in n or "attn2.to_v" in n)
        own = _Own(family, lesson.subject, word, r.batch, seed)
        others = PROMPT.format(words.class_word)
        kept = prior(family, others, r.class_images, r.class_steps, seed, r.batch, r.prior_weight)
        loss = Denoising(family, unet, [own, kept])
        recipe = Recipe(r.steps, r.lr, r.weight_decay, seed=seed)
        return lesson.train({"word": word.row} | trainable(unet, "unet."), loss, recipe)

    @contextlib.contextmanager
    def bind(self, family: Family, learnt: Learnt, sampling: GenerateConfig) -> Iterator[Generator]:
        """The tuned U-Net under prompts that say the new word for the identifier; strength as in DreamBooth."""
        word = NewWord(family, learnt.subject.manifest, instead_of_class=False)
        word.learnt(learnt.tensors["word"], sampling.strength, family.dtype)
        yield Generator(
            word.states, noise_of(family, tuned_copy(family.unet, learnt.tensors, "unet.", sampling.strength))
        )


class _Own:
    """Draws the subject's own part of a batch: rescaled crops under prompts that say how they were rescaled."""

    def __init__(self, family: Family, subject: Subject, word: NewWord, batch: int, seed: int):
        generator = torch.Generator().manual_seed(seed)
        seen = [c for c in crops(subject, family.profile.image_size) for _ in range(_VIEWS)]
        views = [rescaled(crop, generator) for crop in seen]
        self.latents = images.encode(family.vae, torch.stack([v.pixels for v in views]))
        whole = F.interpolate(torch.stack([v.inside for v in views]), size=self.latents.shape[-2:], mode="area")
        self.inside = (whole == 1).to(self.latents)
        self.prompts = [v.prefix + PROMPT.format(subject.manifest.name) for v in views]
        self.word, self.batch = word, batch

    def __call__(self, generator: torch.Generator) -> SubBatch:
        chosen = torch.randint(len(self.latents), (self.batch,), generator=generator)
        states = self.word.encode([self.prompts[i] for i in chosen])
        # diffusers': the error summed over channels, over each view's own area, then the mean over views
        share = self.inside[chosen] / self.inside[chosen].sum((1, 2, 3), keepdim=True).clamp(min=1)
        return SubBatch(self.latents[chosen], states, share, float(self.latents.shape[1]))


register(CustomDiffusion())
