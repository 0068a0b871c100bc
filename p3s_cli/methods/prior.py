"""Prior preservation (DreamBooth, arXiv:2208.12242, eq. 2): the class's own images, so that the class survives."""

from __future__ import annotations

import torch
from torch import Tensor

from p3s_cli.methods.denoising import LatentBank, noise_of
from p3s_cli.sd import sample, text
from p3s_cli.sd.family import Family

_FIRST_SEED = 1_000_000  # far from the seeds that results are made from
_BATCH = 4  # images sampled together


@torch.no_grad()
def class_images(family: Family, prompt: str, n: int, steps: int, seed: int) -> Tensor:
    """Latents (n, 4, h, w) of images that the untuned family draws for `prompt` (DDIM, its own guidance).

    They stay latents: decoding and encoding them again would only add the autoencoder's error.
    """
    states, empty = text.encode(family.tokenizer, family.text_encoder, [prompt, ""]).split(1)
    side = family.profile.image_size // 8  # a base may say another of its U-Net than is trained on here
    eps, guidance = noise_of(family, family.unet), family.profile.guidance
    seeds, made = [_FIRST_SEED + seed * n + k for k in range(n)], []
    for first in range(0, n, _BATCH):
        batch = seeds[first : first + _BATCH]
        scheduler = sample.build_scheduler("ddim", family.scheduler_config)
        states_of = states.expand(len(batch), -1, -1)
        shape = (family.unet.config.in_channels, side, side)
        made.append(sample.sample(eps, states_of, empty, scheduler, batch, shape, steps=steps, guidance=guidance))
    return torch.cat(made).float()


def prior(family: Family, prompt: str, n: int, steps: int, seed: int, batch: int, weight: float) -> LatentBank:
    """What prior preservation draws from: `batch` of n class images under their own prompt, with its weight."""
    states = text.encode(family.tokenizer, family.text_encoder, [prompt])
    return LatentBank(class_images(family, prompt, n, steps, seed), states, batch, weight)
