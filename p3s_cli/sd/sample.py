"""Any diffusers scheduler over any eps: the sampler of every method."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence

import diffusers
import torch
from torch import Tensor

from p3s_cli.errors import InputError

# (x_t (B, 4, h, w), t (B,), text (B, 77, D), with the subject?) -> eps (B, 4, h, w)
Eps = Callable[[Tensor, Tensor, Tensor, bool], Tensor]

SCHEDULERS = {
    "ddim": ("DDIMScheduler", {}),
    "ddpm": ("DDPMScheduler", {}),
    "dpm++": ("DPMSolverMultistepScheduler", {}),
    "unipc": ("UniPCMultistepScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_a": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}),
}


def check_scheduler(name: str) -> None:
    """Raises InputError for a name that no scheduler has."""
    if name not in SCHEDULERS:
        raise InputError(f"no scheduler is called {name!r}; choose one of: {', '.join(SCHEDULERS)}")


def build_scheduler(name: str, config: dict) -> diffusers.SchedulerMixin:
    """The scheduler of this name on the family's own noise schedule. Raises InputError for an unknown name."""
    check_scheduler(name)
    kind, options = SCHEDULERS[name]
    return getattr(diffusers, kind).from_config(config, **options)


def guided_noise(
    eps: Eps, x: Tensor, t: Tensor, text: Tensor, empty: Tensor, guidance: float, subject_guidance: float
) -> Tensor:
    """eps_u + s_i (eps_i - eps_u) + s_t (eps_t - eps_i): u knows neither, i the subject, t subject and text.

    s_t is `guidance`, s_i `subject_guidance`. Passes whose coefficient is zero are not run: s_i = 1
    needs no u, s_i = s_t no i.
    """
    terms = [(1 - subject_guidance, empty, False), (subject_guidance - guidance, empty, True), (guidance, text, True)]
    total = torch.zeros_like(x)
    for with_subject in (False, True):
        chosen = [(c, states) for c, states, s in terms if s == with_subject and c != 0]
        if chosen:
            n = len(chosen)
            out = eps(x.repeat(n, 1, 1, 1), t.repeat(n), torch.cat([states for _, states in chosen]), with_subject)
            total = total + sum(c * part for (c, _), part in zip(chosen, out.chunk(n), strict=True))
    return total


def initial_noise(seeds: Sequence[int], shape: tuple[int, int, int]) -> tuple[Tensor, list[torch.Generator]]:
    """x_T for each seed, each from a generator of its own on the CPU, so a seed's image does not depend on its batch."""
    generators = [torch.Generator().manual_seed(s) for s in seeds]
    return torch.stack([torch.randn(shape, generator=g) for g in generators]), generators


@torch.no_grad()
def sample(
    eps: Eps,
    text: Tensor,
    empty: Tensor,
    scheduler: diffusers.SchedulerMixin,
    seeds: Sequence[int],
    shape: tuple[int, int, int],
    steps: int,
    guidance: float,
    subject_guidance: float = 1.0,
    on_step: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Latents (B, *shape), one for each seed, from text states (B, 77, D) and empty-text states (1, 77, D)."""
    device = text.device
    scheduler.set_timesteps(steps, device=device)
    noise, generators = initial_noise(seeds, shape)
    x = noise.to(device) * scheduler.init_noise_sigma
    empty = empty.expand_as(text)
    extra = {"generator": generators} if "generator" in inspect.signature(scheduler.step).parameters else {}
    for i, t in enumerate(scheduler.timesteps):
        scaled = scheduler.scale_model_input(x, t)
        predicted = guided_noise(eps, scaled, t.to(device).expand(len(x)), text, empty, guidance, subject_guidance)
        x = scheduler.step(predicted, t, x, return_dict=False, **extra)[0]
        if on_step:
            on_step(i + 1, len(scheduler.timesteps))
    return x
