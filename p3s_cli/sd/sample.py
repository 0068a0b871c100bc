"""Any diffusers scheduler over any eps: the sampler of every method."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import diffusers
import torch
from torch import Tensor

from p3s_cli.errors import InputError

# (x_t (B, 4, h, w), t (B,), text (B, 77, D), with the subject?) -> eps (B, 4, h, w). Where a ControlNet
# is in play its residuals come as a fifth argument, `residuals`, for the U-Net to add.
Eps = Callable[..., Tensor]
# (x_t, t, text) -> what ControlNets add to the U-Net's down blocks and middle block
Control = Callable[[Tensor, Tensor, Tensor], tuple[list[Tensor], Tensor]]

SCHEDULERS = {
    "ddim": ("DDIMScheduler", {}),
    "ddpm": ("DDPMScheduler", {}),
    "dpm++": ("DPMSolverMultistepScheduler", {}),
    "dpm++_karras": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    "dpm++_sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "unipc": ("UniPCMultistepScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_a": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "pndm": ("PNDMScheduler", {}),
    "lms": ("LMSDiscreteScheduler", {}),
    "deis": ("DEISMultistepScheduler", {}),
    "dpm2": ("KDPM2DiscreteScheduler", {}),
    "dpm2_a": ("KDPM2AncestralDiscreteScheduler", {}),
    "dpm_single": ("DPMSolverSinglestepScheduler", {}),
}


def check_scheduler(name: str) -> None:
    """Raises InputError for a name that no scheduler of SD v1's noise schedule has."""
    if name not in SCHEDULERS and name not in _compatible():
        raise InputError(
            f"no scheduler is called {name!r}; choose one of: {', '.join(SCHEDULERS)}, or a class of diffusers "
            f"that runs on SD's noise schedule: {', '.join(_compatible())}"
        )


def _compatible() -> list[str]:
    """The classes of diffusers that say of themselves that they can stand in for SD's own scheduler.

    One of them, EDM's, scales what the model is given in a way that SD was not trained with.
    """
    names = {kind.__name__ for kind in diffusers.DDIMScheduler.from_config({}).compatibles}
    return sorted(names - {"EDMEulerScheduler"})


def build_scheduler(name: str, config: dict) -> diffusers.SchedulerMixin:
    """The scheduler of this name on the family's own noise schedule. Raises InputError for an unknown name."""
    check_scheduler(name)
    kind, options = SCHEDULERS.get(name, (name, {}))
    try:
        return getattr(diffusers, kind).from_config(config, **options)
    except ImportError as error:
        raise InputError(f"the scheduler {name} needs a library that is missing ({error}); choose another") from error


@dataclass(frozen=True)
class Pass:
    """One forward pass of guidance: its terms' text states (n B, 77, D) and coefficients (n), with the subject or not."""

    states: Tensor
    coefficients: tuple[float, ...]
    with_subject: bool


def passes(text: Tensor, empty: Tensor, guidance: float, subject_guidance: float) -> list[Pass]:
    """The passes of eps_u + s_i (eps_i - eps_u) + s_t (eps_t - eps_i): u knows neither, i the subject, t both.

    s_t is `guidance`, s_i `subject_guidance`. Terms whose coefficient is zero are left out: s_i = 1
    needs no u, s_i = s_t no i. `empty` may hold a negative prompt's states.
    """
    terms = [(1 - subject_guidance, empty, False), (subject_guidance - guidance, empty, True), (guidance, text, True)]
    found = []
    for with_subject in (False, True):
        chosen = [(c, states) for c, states, s in terms if s == with_subject and c != 0]
        if chosen:
            found.append(Pass(torch.cat([s for _, s in chosen]), tuple(c for c, _ in chosen), with_subject))
    return found


class Guided:
    """The noise of `passes`, summed, step by step along one trajectory.

    Where it takes a third term, the pass without the subject is made at every `reuse`-th step and counts as it
    was in between: it changes little from one step to the next, and its coefficient is small.
    """

    def __init__(self, eps: Eps, reuse: int = 1):
        self._eps, self._reuse, self._step, self._kept = eps, reuse, 0, None

    def __call__(self, x: Tensor, t: Tensor, made: Sequence[Pass], control: Control | None = None) -> Tensor:
        """x (B, 4, h, w), t (B,) -> (B, 4, h, w). `control` speaks in every pass, as in diffusers."""
        total = torch.zeros_like(x)
        fresh = self._kept is None or self._step % self._reuse == 0
        for one in made:
            third = not one.with_subject and len(made[-1].coefficients) == 2
            out = self._kept if third and not fresh else self._predict(one, x, t, control)
            self._kept = out if third else self._kept
            total = total + sum(
                c * part for c, part in zip(one.coefficients, out.chunk(len(one.coefficients)), strict=True)
            )
        self._step += 1
        return total

    def _predict(self, one: Pass, x: Tensor, t: Tensor, control: Control | None) -> Tensor:
        n = len(one.coefficients)
        given = x.repeat(n, 1, 1, 1), t.repeat(n), one.states
        return self._eps(*given, one.with_subject, **({"residuals": control(*given)} if control else {}))


def initial_noise(seeds: Sequence[int], shape: tuple[int, int, int]) -> tuple[Tensor, list[torch.Generator]]:
    """x_T for each seed, each from a generator of its own on the CPU, so a seed's image does not depend on its batch."""
    generators = [torch.Generator().manual_seed(s) for s in seeds]
    return torch.stack([torch.randn(shape, generator=g) for g in generators]), generators


def _check_steps(scheduler: diffusers.SchedulerMixin, steps: int) -> None:
    """Raises InputError for steps so many that times lie outside what the base was trained on.

    Left to themselves the schedulers find out after all passes, or draw what is not finite.
    """
    most = scheduler.config.num_train_timesteps - scheduler.config.get("steps_offset", 0) - 1
    if steps > most:
        raise InputError(f"the scheduler cannot take {steps} steps; give at most {most} with --steps")


@torch.no_grad()
def sample(
    eps: Eps,
    text: Tensor,
    empty: Tensor,
    scheduler: diffusers.SchedulerMixin,
    seeds: Sequence[int],
    shape: tuple[int, int, int],
    *,
    steps: int,
    guidance: float,
    subject_guidance: float = 1.0,
    on_step: Callable[[int, int], None] | None = None,
    control: Control | None = None,
    reuse: int = 1,
) -> Tensor:
    """Latents (B, *shape), one for each seed, from text states (B, 77, D) and empty-text states (1, 77, D).

    A negative prompt's states may stand in the place of the empty text's; `reuse` is `Guided`'s. Raises InputError for more steps
    than the scheduler takes.
    """
    device = text.device
    _check_steps(scheduler, steps)
    scheduler.set_timesteps(steps, device=device)
    if hasattr(scheduler, "noise_sampler_seed"):  # DPMSolverSDE's, which takes no generators
        scheduler.noise_sampler_seed = list(seeds)
    noise, generators = initial_noise(seeds, shape)
    x = noise.to(device) * scheduler.init_noise_sigma
    # made once, so that what depends on the text alone is recognised and computed once
    made = passes(text, empty.expand_as(text), guidance, subject_guidance)
    guided = Guided(eps, reuse)
    extra = {"generator": generators} if "generator" in inspect.signature(scheduler.step).parameters else {}
    for i, t in enumerate(scheduler.timesteps):
        scaled = scheduler.scale_model_input(x, t)
        times = t.to(device).expand(len(x))
        x = scheduler.step(guided(scaled, times, made, control), t, x, return_dict=False, **extra)[0]
        if on_step:
            on_step(i + 1, len(scheduler.timesteps))
    return x
