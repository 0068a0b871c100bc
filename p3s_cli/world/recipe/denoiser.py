"""The U-Net, on latents of the trained autoencoder and states of the trained text tower."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPModel, CLIPTokenizer

from p3s_cli.sd.weights import load_tensors, save_tensors
from p3s_cli.world import models
from p3s_cli.world.recipe.workshop import LENGTH, Pool, Workshop
from p3s_cli.world.shapes import PATTERNS


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


def stage_unet_pattern(shop: Workshop) -> None:
    """A fourth round, half of it on scenes that differ in nothing but the pattern, under the same noise.

    What the word changes is a fiftieth of the loss. Between four such scenes all the rest cancels, and the
    gradient says what the word does. Every other four fade into their mean before the noise comes, with the
    target unchanged: guidance, too, leaves states in which no pattern is to be seen, and the word has to bring
    it back (input perturbation, arXiv:2301.11706, along the one direction in which sampling errs).
    """
    unet = UNet2DConditionModel.from_pretrained(shop.family / "unet").to(shop.device)
    _denoise(shop, "unet_pattern", unet, subject_weight=6.0, detail=0.5, alike=0.5)


@dataclass(frozen=True)
class Batch:
    """Scaled latents (B, 4, h, w) to be drawn and those that are noised, the share of each pixel that is subject
    (B, 1, h, w), captions, noise and t (B,)."""

    latents: Tensor
    noised: Tensor
    subjects: Tensor
    captions: list[str]
    noise: Tensor
    t: Tensor

    def __add__(self, other: Batch) -> Batch:
        return Batch(
            torch.cat((self.latents, other.latents)),
            torch.cat((self.noised, other.noised)),
            torch.cat((self.subjects, other.subjects)),
            self.captions + other.captions,
            torch.cat((self.noise, other.noise)),
            torch.cat((self.t, other.t)),
        )


class Shelf:
    """The latents of a pool's scenes, to draw batches from; kept in a file for the runs that go on."""

    def __init__(self, shop: Workshop, pool: Pool, name: str):
        self.pool = pool
        self.latents, self.subjects = _latents(shop, pool, shop.work / f"{name}.safetensors")

    def draw(self, n: int, detail: float, generator: torch.Generator) -> Batch:
        """A tenth of the captions dropped; `detail` is the share of captions that say everything, and of
        timesteps from the middle."""
        index = self.pool.draw(n, generator)
        dropped = torch.rand(n, generator=generator) < 0.1
        captions = self.pool.captions(index, generator, complete=detail)
        captions = ["" if d else c for c, d in zip(captions, dropped.tolist(), strict=True)]
        x0 = self.latents[index]
        noise = torch.randn(x0.shape, generator=generator)
        return Batch(x0, x0, self._inside(index), captions, noise, _timesteps(n, detail, generator))

    def draw_alike(self, n: int, generator: torch.Generator) -> Batch:
        """A `patterns` pool's scenes, all four of each under one noise at one timestep, with all that is to be said;
        half of them faded into their mean, by any share."""
        k = len(PATTERNS)
        first = k * torch.randint(len(self.pool.scenes) // k, (n // k,), generator=generator)
        index = (first[:, None] + torch.arange(k)).flatten()
        captions = self.pool.captions(index, generator, complete=1.0)
        x0 = self.latents[index].unflatten(0, (-1, k))
        fade = torch.rand(n // k, generator=generator) * (torch.rand(n // k, generator=generator) < 0.5)
        noised = torch.lerp(x0, x0.mean(1, keepdim=True).expand_as(x0), fade.view(-1, 1, 1, 1, 1))
        noise = torch.randn(self.latents[first].shape, generator=generator).repeat_interleave(k, 0)
        t = _timesteps(n // k, 1.0, generator).repeat_interleave(k)
        return Batch(x0.flatten(0, 1), noised.flatten(0, 1), self._inside(index), captions, noise, t)

    def _inside(self, index: Tensor) -> Tensor:
        return self.subjects[index].float() / 255


class Teacher:
    """What noise prediction is taught with: the text tower, the schedule, the loss."""

    def __init__(self, shop: Workshop, unet: UNet2DConditionModel):
        self.shop, self.unet = shop, unet
        self.tokenizer = CLIPTokenizer.from_pretrained(shop.family / "tokenizer")
        self.text_model = CLIPModel.from_pretrained(shop.family / "clip").text_model.to(shop.device).eval()
        self.scheduler = models.build_scheduler()
        self.alphas = self.scheduler.alphas_cumprod.to(shop.device)
        self._predict = torch.compile(unet, dynamic=False) if shop.compiled else unet

    @torch.no_grad()
    def encode(self, captions: list[str]) -> Tensor:
        ids = self.tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
        return self.text_model(ids.to(self.shop.device)).last_hidden_state

    def predict(self, x: Tensor, t: Tensor, captions: list[str]) -> Tensor:
        """The predicted noise, in float32."""
        with self.shop.autocast():
            return self._predict(x, t, self.encode(captions)).sample.float()

    def states(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The noisy states x_t of a batch, and the noise that leads from them to its latents."""
        x0, noised, noise, t = (x.to(self.shop.device) for x in (batch.latents, batch.noised, batch.noise, batch.t))
        return self.scheduler.add_noise(noised, noise, t), noise + self.snr(t).sqrt().view(-1, 1, 1, 1) * (noised - x0)

    def loss(self, eps: Tensor, target: Tensor, batch: Batch, subject_weight: float) -> Tensor:
        """Min-SNR weights (arXiv:2303.09556, gamma 5); inside subjects the error weighs so many times more."""
        weight = 1 + (subject_weight - 1) * batch.subjects.to(self.shop.device)
        error = (weight * (eps - target).square()).mean((1, 2, 3)) / weight.mean((1, 2, 3))
        snr = self.snr(batch.t.to(self.shop.device))
        return (error * snr.clamp(max=5) / snr).mean()

    def snr(self, t: Tensor) -> Tensor:
        """The signal-to-noise ratio at t."""
        return self.alphas[t] / (1 - self.alphas[t])


def _denoise(
    shop: Workshop,
    stage: str,
    unet: UNet2DConditionModel,
    subject_weight: float,
    detail: float = 0.0,
    alike: float = 0.0,
) -> None:
    """Noise prediction; `alike` is the share of `draw_alike`."""
    teacher = Teacher(shop, unet)
    shelf = Shelf(shop, shop.pool, "latents")
    fours = Shelf(shop, shop.patterns, "latents_patterns") if alike else None
    together = int(alike * LENGTH[stage].batch)

    def loss(step: int, generator: torch.Generator):
        batch = shelf.draw(LENGTH[stage].batch - together, detail, generator)
        if fours:
            batch = batch + fours.draw_alike(together, generator)
        x, target = teacher.states(batch)
        eps = teacher.predict(x, batch.t.to(shop.device), batch.captions)
        return teacher.loss(eps, target, batch, subject_weight), {}

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
def _latents(shop: Workshop, pool: Pool, path: Path) -> tuple[Tensor, Tensor]:
    """Scaled latents (N, 4, 16, 16) of every scene and how much of each is subject (N, 1, 16, 16), in bytes."""
    if path.exists():
        kept = load_tensors(path)[0]
        return kept["latents"], kept["subjects"]
    vae = AutoencoderKL.from_pretrained(shop.family / "vae").to(shop.device)
    latents = []
    for rows in torch.arange(len(pool.scenes)).split(64):
        with shop.autocast():
            latents.append(vae.encode(pool.pixels(rows)).latent_dist.mean.float())
    scaled = torch.cat(latents).cpu() * vae.config.scaling_factor
    save_tensors(path, {"latents": scaled, "subjects": pool.subjects})
    return scaled, pool.subjects
