"""The autoencoder, which has to keep patterns or no method can keep an identity."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from p3s_cli.world import models
from p3s_cli.world.recipe.pool import as_pixels
from p3s_cli.world.recipe.workshop import Workshop
from p3s_cli.world.scenes import SIZE

_CROP = 64


def stage_vae(shop: Workshop) -> None:
    """L1 + MSE + 1e-6 KL on 64 px crops, three of four around a subject, where the patterns are."""
    torch.manual_seed(shop.seed)
    vae = models.build_vae().to(shop.device)

    def corner(index: int, u: float, v: float, w: float) -> tuple[int, int]:
        subjects = shop.pool.scenes[index].subjects
        if w < 0.75:
            at = subjects[int(w / 0.75 * len(subjects))]
            x, y = at.x - _CROP / 2 + 48 * (u - 0.5), at.y - _CROP / 2 + 48 * (v - 0.5)
        else:
            x, y = u * (SIZE - _CROP), v * (SIZE - _CROP)
        return int(min(max(x, 0), SIZE - _CROP)), int(min(max(y, 0), SIZE - _CROP))

    def draw(step: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        index = shop.pool.draw(shop.length("vae").batch, generator)
        chance = torch.rand(len(index), 3, generator=generator).tolist()
        corners = torch.tensor([corner(i, *c) for i, c in zip(index.tolist(), chance, strict=True)])
        noise = shop.noise((len(index), vae.config.latent_channels, _CROP // 8, _CROP // 8), generator)
        return _crops(shop.pool.images, index, corners), noise

    def compute(drawn: tuple[Tensor, Tensor], vae: AutoencoderKL) -> tuple[Tensor, dict[str, Tensor]]:
        x, noise = as_pixels(drawn[0]), drawn[1]
        with shop.autocast():
            posterior = vae.encode(x).latent_dist
            decoded = vae.decode(posterior.mean + posterior.std * noise).sample
        error = decoded.float() - x
        square = error.square().mean()
        return error.abs().mean() + square + 1e-6 * posterior.kl().mean(), {
            "psnr": -10 * torch.log10(square.detach() / 4)
        }

    shop.fit("vae", vae, draw, compute, weight_decay=0.0, ema=0.998)
    with torch.no_grad():
        rows = torch.arange(min(512, len(shop.pool.scenes))).split(32)
        latents = torch.cat([vae.encode(shop.pool.pixels(r)).latent_dist.mean for r in rows])
    vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 5))
    vae.save_pretrained(shop.family / "vae")
    shop.log("vae", {"scaling_factor": vae.config.scaling_factor})


def _crops(images: Tensor, index: Tensor, corners: Tensor) -> Tensor:
    """(B, C, 64, 64) of the images of these indices, from these corners (B, 2), x first."""
    within = torch.arange(_CROP)
    x, y = (corners[:, i, None] + within for i in (0, 1))
    where = (
        index[:, None, None, None],
        torch.arange(images.shape[1])[:, None, None],
        y[:, None, :, None],
        x[:, None, None],
    )
    return images[tuple(i.to(images.device) for i in where)]
