"""The U-Net, on latents of the trained autoencoder and states of the trained text tower."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPModel, CLIPTokenizer

from p3s_cli.sd.weights import load_tensors, save_tensors
from p3s_cli.world import models
from p3s_cli.world.recipe.workshop import BATCH, Workshop


def stage_unet(shop: Workshop) -> None:
    """Noise prediction from random weights."""
    torch.manual_seed(shop.seed)
    _denoise(shop, "unet", models.build_unet().to(shop.device), subject_weight=1.0)


def stage_unet_long(shop: Workshop) -> None:
    """A second, longer round from the averaged weights of the first, in which subjects weigh three times the ground.

    The first round learns the eight grounds and leaves the categories rough; what is left to learn is in
    the subjects, which cover a fifth of the latents.
    """
    unet = UNet2DConditionModel.from_pretrained(shop.family / "unet").to(shop.device)
    _denoise(shop, "unet_long", unet, subject_weight=3.0)


def stage_unet_detail(shop: Workshop) -> None:
    """A third round for what is small: patterns, hats, which of two is which.

    Subjects weigh six times the ground, half of the captions say everything, and half of the timesteps are
    drawn from the middle (logit-normal, arXiv:2403.03206), where a pattern is decided.
    """
    unet = UNet2DConditionModel.from_pretrained(shop.family / "unet").to(shop.device)
    _denoise(shop, "unet_detail", unet, subject_weight=6.0, detail=0.5)


def _denoise(
    shop: Workshop, stage: str, unet: UNet2DConditionModel, subject_weight: float, detail: float = 0.0
) -> None:
    """Noise prediction with min-SNR weights (arXiv:2303.09556, gamma 5); a tenth of the captions dropped.

    `detail` is the share of captions that say everything, and of timesteps from the middle.
    """
    tokenizer = CLIPTokenizer.from_pretrained(shop.family / "tokenizer")
    text_model = CLIPModel.from_pretrained(shop.family / "clip").text_model.to(shop.device).eval()
    scheduler = models.build_scheduler()
    latents, subjects = _latents(shop)
    alphas = scheduler.alphas_cumprod.to(shop.device)
    predict = torch.compile(unet) if shop.compiled else unet

    @torch.no_grad()
    def encode(captions: list[str]) -> Tensor:
        ids = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
        return text_model(ids.to(shop.device)).last_hidden_state

    def loss(step: int, generator: torch.Generator):
        index = shop.pool.draw(BATCH[stage], generator)
        dropped = torch.rand(len(index), generator=generator) < 0.1
        captions = shop.pool.captions(index, generator, complete=detail)
        captions = ["" if d else c for c, d in zip(captions, dropped.tolist(), strict=True)]
        x0 = latents[index].to(shop.device)
        weight = 1 + (subject_weight - 1) * subjects[index].to(shop.device).float() / 255
        noise = torch.randn(x0.shape, generator=generator).to(shop.device)
        t = _timesteps(len(index), detail, generator).to(shop.device)
        with shop.autocast():
            eps = predict(scheduler.add_noise(x0, noise, t), t, encode(captions)).sample
        snr = alphas[t] / (1 - alphas[t])
        error = (weight * (eps.float() - noise).square()).mean((1, 2, 3)) / weight.mean((1, 2, 3))
        return (error * snr.clamp(max=5) / snr).mean(), {}

    shop.fit(stage, unet, loss, weight_decay=0.01, ema=0.999)
    unet.save_pretrained(shop.family / "unet")


def _timesteps(n: int, from_middle: float, generator: torch.Generator) -> Tensor:
    """(n,) uniform timesteps; a share of them 1000 sigmoid(z), z normal about -0.4, so that the median is 400."""
    t = torch.randint(1000, (n,), generator=generator)
    if not from_middle:
        return t
    middle = (1000 * torch.sigmoid(torch.randn(n, generator=generator) - 0.4)).long()
    return torch.where(torch.rand(n, generator=generator) < from_middle, middle, t)


@torch.no_grad()
def _latents(shop: Workshop) -> tuple[Tensor, Tensor]:
    """Scaled latents (N, 4, 16, 16) of every training scene and how much of each is subject (N, 1, 16, 16), in bytes.

    Kept in a file for the runs that go on from a checkpoint.
    """
    path = shop.work / "latents.safetensors"
    if path.exists():
        kept = load_tensors(path)[0]
        return kept["latents"], kept["subjects"]
    vae = AutoencoderKL.from_pretrained(shop.family / "vae").to(shop.device)
    latents = []
    for i in range(0, len(shop.pool.scenes), 64):
        with shop.autocast():
            latents.append(
                vae.encode(
                    shop.pool.pixels(torch.arange(i, min(i + 64, len(shop.pool.scenes))))
                ).latent_dist.mean.float()
            )
    scaled = torch.cat(latents).cpu() * vae.config.scaling_factor
    save_tensors(path, {"latents": scaled, "subjects": shop.pool.subjects})
    return scaled, shop.pool.subjects
