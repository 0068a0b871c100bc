"""The autoencoder, which has to keep patterns or no method can keep an identity."""

from __future__ import annotations

import torch

from p3s_cli.world import models
from p3s_cli.world.recipe.workshop import Workshop
from p3s_cli.world.scenes import SIZE


def stage_vae(shop: Workshop) -> None:
    """L1 + MSE + 1e-6 KL on 64 px crops, three of four around a subject, where the patterns are."""
    torch.manual_seed(shop.seed)
    vae = models.build_vae().to(shop.device)
    crop = 64

    def corner(index: int, u: float, v: float, w: float) -> tuple[int, int]:
        subjects = shop.pool.scenes[index].subjects
        if w < 0.75:
            at = subjects[int(w / 0.75 * len(subjects))]
            x, y = at.x - crop / 2 + 48 * (u - 0.5), at.y - crop / 2 + 48 * (v - 0.5)
        else:
            x, y = u * (SIZE - crop), v * (SIZE - crop)
        return int(min(max(x, 0), SIZE - crop)), int(min(max(y, 0), SIZE - crop))

    def loss(step: int, generator: torch.Generator):
        index = shop.pool.draw(shop.length("vae").batch, generator)
        chance = torch.rand(len(index), 3, generator=generator).tolist()
        corners = [corner(i, *c) for i, c in zip(index.tolist(), chance, strict=True)]
        pixels = shop.pool.pixels(index)
        x = torch.stack([p[:, b : b + crop, a : a + crop] for p, (a, b) in zip(pixels, corners, strict=True)])
        with shop.autocast():
            posterior = vae.encode(x).latent_dist
            noise = torch.randn(posterior.mean.shape, generator=generator).to(x.device)
            decoded = vae.decode(posterior.mean + posterior.std * noise).sample
        error = decoded.float() - x
        value = error.abs().mean() + error.square().mean() + 1e-6 * posterior.kl().mean()
        psnr = -10 * torch.log10(error.square().mean() / 4)
        return value, {"psnr": psnr.item()}

    shop.fit("vae", vae, loss, weight_decay=0.0, ema=0.998)
    with torch.no_grad():
        latents = torch.cat(
            [vae.encode(shop.pool.pixels(torch.arange(i, i + 32))).latent_dist.mean for i in range(0, 512, 32)]
        )
    vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 5))
    vae.save_pretrained(shop.family / "vae")
    shop.log("vae", {"scaling_factor": vae.config.scaling_factor})
