"""The U-Net, on latents of the trained autoencoder and states of the trained text tower."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPModel

from p3s_cli.atomic import sha256
from p3s_cli.sd.weights import load_tensors, save_tensors
from p3s_cli.world import models
from p3s_cli.world.recipe.pool import Pool, at_a_time
from p3s_cli.world.recipe.workshop import Workshop
from p3s_cli.world.scenes import caption
from p3s_cli.world.shapes import PATTERNS

_DETAIL = 0.5  # of the captions, those that say everything; of the timesteps, those from the middle
_ALIKE = 0.25  # of a batch, scenes that differ in nothing but the pattern
_SUBJECT = 6.0  # what a subject's error weighs, beside the ground's: it covers a fifth of the latents
_DROPPED = 0.1  # of the captions


def stage_unet(shop: Workshop) -> None:
    """Noise prediction, from random weights, with what is small in mind: patterns, hats, which of two is which.

    Subjects weigh more than the ground, half of the captions say everything, and half of the timesteps are drawn from
    the middle (logit-normal, arXiv:2403.03206), where a pattern is decided. A quarter of a batch shows scenes in all
    four patterns under one noise: what the word changes is a fiftieth of the loss, and between four such scenes all
    the rest cancels. Every other four fade into their mean before the noise comes, with the target unchanged: guidance,
    too, leaves states in which no pattern is to be seen, and the word has to bring it back (input perturbation,
    arXiv:2301.11706, along the one direction in which sampling errs).
    """
    torch.manual_seed(shop.seed)
    teacher = Teacher(shop, models.build_unet())
    shelf, fours = Shelf(shop, shop.pool, "latents"), Shelf(shop, shop.patterns, "latents_patterns")
    n = shop.length("unet").batch
    together = int(_ALIKE * n) // len(PATTERNS) * len(PATTERNS)

    def draw(step: int, generator: torch.Generator) -> Batch:
        return shelf.draw(n - together, _DETAIL, generator) + fours.draw_alike(together, generator)

    def compute(batch: Batch, unet: UNet2DConditionModel) -> tuple[Tensor, dict[str, Tensor]]:
        x, target = teacher.states(batch)
        return teacher.loss(teacher.predict(unet, x, batch.t, batch.ids), target, batch), {}

    shop.fit("unet", teacher.unet, draw, compute, weight_decay=0.01, ema=0.999)
    teacher.unet.save_pretrained(shop.family / "unet")


@dataclass(frozen=True)
class Batch:
    """Scaled latents (B, 4, h, w) to be drawn and those that are noised, the share of each pixel that is subject
    (B, 1, h, w), captions as token ids (B, 77), noise and t (B,); all on the training device."""

    latents: Tensor
    noised: Tensor
    subjects: Tensor
    ids: Tensor
    noise: Tensor
    t: Tensor

    def __add__(self, other: Batch) -> Batch:
        return Batch(*(torch.cat((getattr(self, f.name), getattr(other, f.name))) for f in fields(self)))


class Shelf:
    """The latents and captions of a pool's scenes, on the training device, to draw batches from.

    They are kept in a file for the runs that go on. Each scene has two captions, one that leaves out what it likes
    and one that says everything.
    """

    def __init__(self, shop: Workshop, pool: Pool, name: str):
        self.pool, self.device, self.noise = pool, shop.device, shop.noise
        kept = _kept(shop, pool, shop.work / f"{name}.safetensors")
        self.latents, self.subjects, self.ids = (kept[n].to(shop.device) for n in ("latents", "subjects", "ids"))
        self._silence = shop.tokens([""]).to(shop.device)

    def draw(self, n: int, detail: float, generator: torch.Generator) -> Batch:
        """A tenth of the captions dropped; `detail` is the share of captions that say everything, and of
        timesteps from the middle."""
        index = self.pool.draw(n, generator).to(self.device)
        complete, dropped = (torch.rand(n, generator=generator) < share for share in (detail, _DROPPED))
        ids = self.said(index, complete.long(), dropped)
        x0 = self.latents[index]
        noise, t = self.noise(x0.shape, generator), _timesteps(n, detail, generator).to(self.device)
        return Batch(x0, x0, self._inside(index), ids, noise, t)

    def draw_alike(self, n: int, generator: torch.Generator) -> Batch:
        """A `patterns` pool's scenes, all four of each under one noise at one timestep, with all that is to be said;
        half of them faded into their mean, by any share."""
        k = len(PATTERNS)
        first = k * torch.randint(len(self.pool.scenes) // k, (n // k,), generator=generator)
        index = (first[:, None] + torch.arange(k)).flatten().to(self.device)
        x0 = self.latents[index].unflatten(0, (-1, k))
        fade = torch.rand(n // k, generator=generator) * (torch.rand(n // k, generator=generator) < 0.5)
        noised = torch.lerp(x0, x0.mean(1, keepdim=True).expand_as(x0), fade.view(-1, 1, 1, 1, 1).to(self.device))
        noise = self.noise((n // k, *self.latents.shape[1:]), generator).repeat_interleave(k, 0)
        t = _timesteps(n // k, 1.0, generator).repeat_interleave(k).to(self.device)
        return Batch(x0.flatten(0, 1), noised.flatten(0, 1), self._inside(index), self.ids[index, 1], noise, t)

    def said(self, index: Tensor, complete: Tensor, silent: Tensor) -> Tensor:
        """(B, 77), captions of scenes: the `complete` one (1) or the other (0), or none at all where `silent`."""
        ids = self.ids[index, complete.to(self.device)]
        return torch.where(silent.to(self.device)[:, None], self._silence, ids)

    def _inside(self, index: Tensor) -> Tensor:
        return self.subjects[index].float() / 255


class Teacher:
    """What noise prediction is taught with: the text tower, the schedule, the loss."""

    def __init__(self, shop: Workshop, unet: UNet2DConditionModel):
        self.shop, self.unet = shop, unet.to(shop.device)
        self.text_model = CLIPModel.from_pretrained(shop.family / "clip").text_model.to(shop.device).eval()
        self.scheduler = models.build_scheduler()
        self.alphas = self.scheduler.alphas_cumprod.to(shop.device)
        if shop.compiled:
            self.unet.compile(dynamic=False)

    @torch.no_grad()
    def encode(self, ids: Tensor) -> Tensor:
        """Text states (B, 77, D) of token ids (B, 77)."""
        return self.text_model(ids.to(self.shop.device).long()).last_hidden_state

    def predict(self, unet: UNet2DConditionModel, x: Tensor, t: Tensor, ids: Tensor) -> Tensor:
        """The noise predicted by `unet`, its own or a recording's copy of it, in float32."""
        with self.shop.autocast():
            return unet(x, t, self.encode(ids)).sample.float()

    def states(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The noisy states x_t of a batch, and the noise that leads from them to its latents."""
        x = self.scheduler.add_noise(batch.noised, batch.noise, batch.t)
        return x, batch.noise + self.snr(batch.t).sqrt().view(-1, 1, 1, 1) * (batch.noised - batch.latents)

    def loss(self, eps: Tensor, target: Tensor, batch: Batch) -> Tensor:
        """Min-SNR weights (arXiv:2303.09556, gamma 5); inside subjects the error weighs so many times more."""
        weight = 1 + (_SUBJECT - 1) * batch.subjects
        error = (weight * (eps - target).square()).mean((1, 2, 3)) / weight.mean((1, 2, 3))
        snr = self.snr(batch.t)
        return (error * snr.clamp(max=5) / snr).mean()

    def snr(self, t: Tensor) -> Tensor:
        """The signal-to-noise ratio at t."""
        return self.alphas[t] / (1 - self.alphas[t])


def _timesteps(n: int, from_middle: float, generator: torch.Generator) -> Tensor:
    """(n,) uniform timesteps; a share of them 1000 sigmoid(z), z normal about -0.4, so that the median is 400."""
    t = torch.randint(1000, (n,), generator=generator)
    if not from_middle:
        return t
    middle = (1000 * torch.sigmoid(torch.randn(n, generator=generator) - 0.4)).long()
    return torch.where(torch.rand(n, generator=generator) < from_middle, middle, t)


@torch.no_grad()
def _kept(shop: Workshop, pool: Pool, path: Path) -> dict[str, Tensor]:
    """Of every scene: scaled `latents` (N, 4, 16, 16); how much of each is subject, `subjects` (N, 1, 16, 16), in bytes; both
    captions, `ids` (N, 2, 77)."""
    of = {"scenes": len(pool.scenes), "by": _encoders(shop)}
    if path.exists():
        kept, told = load_tensors(path)
        if all(told.get(name) == value for name, value in of.items()):
            return kept
    vae = AutoencoderKL.from_pretrained(shop.family / "vae").to(shop.device)
    latents = []
    for rows in torch.arange(len(pool.scenes)).split(at_a_time(shop.device)):
        with shop.autocast():
            latents.append(vae.encode(pool.pixels(rows)).latent_dist.mean.float())
    scaled = torch.cat(latents).cpu() * vae.config.scaling_factor
    told = [shop.tokens([caption(s, i, full) for i, s in enumerate(pool.scenes)]) for full in (False, True)]
    kept = {"latents": scaled, "subjects": pool.subjects, "ids": torch.stack(told, 1)}
    save_tensors(path, kept, of)
    return kept


def _encoders(shop: Workshop) -> dict[str, str]:
    """The hashes of what makes latents and tokens, by file."""
    files = sorted(f for name in ("vae", "tokenizer") for f in (shop.family / name).iterdir() if f.is_file())
    return {str(f.relative_to(shop.family)): sha256(f) for f in files}
