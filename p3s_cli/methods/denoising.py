"""Plain noise prediction, what every rival learns by: its loss in training, its eps in sampling."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from p3s_cli.config import Timesteps
from p3s_cli.paper.injection import Recording
from p3s_cli.paper.losses import denoising_loss
from p3s_cli.sd import text
from p3s_cli.sd.family import Family
from p3s_cli.sd.libraries import diffusers
from p3s_cli.sd.sample import Eps
from p3s_cli.sd.train import sent

_PATCHES = 0.7  # of the shifts that `astray` makes, how much differs from one part of the picture to another


def alphas_cumprod(family: Family) -> Tensor:
    """The family's cumulative alphas (T,), on its device."""
    return diffusers().DDPMScheduler.from_config(family.scheduler_config).alphas_cumprod.to(family.device)


def add_noise(
    x0: Tensor, alphas_cumprod: Tensor, generator: torch.Generator, timesteps: Timesteps = "uniform"
) -> tuple[Tensor, Tensor, Tensor]:
    """x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) noise at random t. x0 (B, 4, h, w) -> x_t, t (B,), noise.

    `cubic` draws t = T (1 - u^3), so that noisy steps come most often.
    """
    steps, n = len(alphas_cumprod), len(x0)
    if timesteps == "cubic":
        t = (steps * (1 - torch.rand(n, generator=generator) ** 3)).long().clamp(max=steps - 1)
    else:
        t = torch.randint(steps, (n,), generator=generator)
    noise = sent(torch.randn(x0.shape, generator=generator), x0.device)
    t = sent(t, x0.device)
    alpha = alphas_cumprod[t].view(-1, 1, 1, 1)
    return alpha.sqrt() * x0 + (1 - alpha).sqrt() * noise, t, noise


def astray(
    x_t: Tensor, noise: Tensor, alpha: Tensor, generator: torch.Generator, size: float, share: float
) -> tuple[Tensor, Tensor]:
    """Lead a share of the states astray by smooth random shifts, with the same x_0 as their target.

    Noised pictures of the subject hold its colours already, so a control trained on those alone believes the
    state; guided sampling brings it states of other colours, which it has to mend, and grounds that no photo
    has, which it has to leave (input perturbation, arXiv:2301.11706, along what sampling errs in). x_t, noise
    (B, 4, h, w), alpha (B, 1, 1, 1) the cumulative one. `size` is the standard deviation of a channel's shift, as a share of what is weaker in
    x_t, picture or noise. Returns the state and the noise that leads from it to x_0.
    """
    n, channels, *sides = x_t.shape
    patches = F.interpolate(torch.randn(n, channels, 4, 4, generator=generator), size=sides, mode="bilinear")
    shift = torch.randn(n, channels, 1, 1, generator=generator) + _PATCHES * patches
    led = (torch.rand(n, 1, 1, 1, generator=generator) < share).float()
    shift = torch.minimum(alpha.sqrt(), (1 - alpha).sqrt()) * sent(size * led * shift, x_t.device)
    return x_t + shift, noise + shift / (1 - alpha).sqrt()


@dataclass(frozen=True)
class SubBatch:
    """A part of a batch with a weight of its own: latents (n, 4, h, w), states (n, 77, D).

    inside (n, 1, h, w) or None confines its error to some positions, averaged over those.
    """

    latents: Tensor
    states: Tensor
    inside: Tensor | None = None
    weight: float = 1.0


M = TypeVar("M", bound=nn.Module)
Draw = Callable[[torch.Generator], SubBatch]


@dataclass(frozen=True)
class LatentBank:
    """Draws `batch` of the latents (K, 4, h, w), all under the same text states (1, 77, D)."""

    latents: Tensor
    states: Tensor
    batch: int
    weight: float = 1.0

    def __call__(self, generator: torch.Generator) -> SubBatch:
        chosen = torch.randint(len(self.latents), (self.batch,), generator=generator)
        return SubBatch(self.latents[chosen], self.states.expand(self.batch, -1, -1), None, self.weight)


class Denoising:
    """A loss for `train`: the sum over parts of weight x mean ||noise - eps(x_t, t, text)||^2, in one forward pass.

    `watched` names attention layers whose maps `beside` is given along with the parts, for a term to be added; the U-Net
    then has to stand in `attention_seam` as a copy does.
    """

    def __init__(
        self,
        family: Family,
        unet: nn.Module,
        sources: Sequence[Draw],
        watched: frozenset[str] = frozenset(),
        beside: Callable[[Sequence[SubBatch], Mapping[str, Tensor]], Tensor] | None = None,
    ):
        self.unet, self.sources, self.alphas_cumprod = unet, sources, alphas_cumprod(family)
        self.device, self.dtype = family.device.split(":")[0], family.dtype
        self.watched, self.beside = watched, beside

    def __call__(self, step: int, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        parts = [draw(generator) for draw in self.sources]
        x_t, t, noise = add_noise(torch.cat([p.latents for p in parts]), self.alphas_cumprod, generator)
        states = torch.cat([p.states for p in parts])
        seen = Recording(wanted=self.watched)
        options = {"cross_attention_kwargs": {"p3s": seen}} if self.beside else {}
        with torch.autocast(self.device, self.dtype, enabled=self.dtype != torch.float32):
            predicted = self.unet(x_t, t, states, **options).sample
        sizes = [len(p.latents) for p in parts]
        pairs = zip(parts, predicted.split(sizes), noise.split(sizes), strict=True)
        value = sum(part.weight * denoising_loss(guess, truth, part.inside) for part, guess, truth in pairs)
        numbers = {"denoising": value.item()}
        return value + self.beside(parts, seen.maps) if self.beside else value, numbers


def training_copy(model: M) -> M:
    """A frozen float32 copy of a family's model: small steps would be lost in half precision."""
    return copy.deepcopy(model).float().requires_grad_(False)


def partly_trained(model: M, trains: Callable[[str], bool]) -> M:
    """In place: the parameters that `trains` names are float32 and require a gradient, all others are frozen as they are."""
    for name, parameter in model.requires_grad_(False).named_parameters():
        if trains(name):
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)
    return model


@torch.no_grad()
def tuned_copy(model: M, tensors: Mapping[str, Tensor], prefix: str, strength: float) -> M:
    """A copy of a family's model with each trained parameter at base + strength (trained - base).

    tensors by `prefix` + parameter name; parameters without one stay the base's.
    """
    tuned = copy.deepcopy(model)
    for name, parameter in tuned.named_parameters():
        if prefix + name in tensors:
            parameter.lerp_(tensors[prefix + name].to(parameter), strength)
    return tuned


def trainable(model: nn.Module, prefix: str) -> dict[str, nn.Parameter]:
    """The parameters that require a gradient, by `prefix` + name."""
    return {prefix + n: p for n, p in model.named_parameters() if p.requires_grad}


def states_of(family: Family, identifier: str) -> Callable[[Sequence[str]], Tensor]:
    """Text states (B, 77, D) of prompts by the family's own text encoder, the identifier where they say [V]."""
    return lambda prompts: text.encode(
        family.tokenizer, family.text_encoder, [text.fill(p, identifier) for p in prompts]
    )


def noise_of(family: Family, tuned: nn.Module) -> Eps:
    """eps of the tuned U-Net with the subject, of the family's own without."""

    def eps(x_t: Tensor, t: Tensor, states: Tensor, with_subject: bool) -> Tensor:
        unet = tuned if with_subject else family.unet
        return unet(x_t.to(family.dtype), t, states).sample.float()

    return eps
