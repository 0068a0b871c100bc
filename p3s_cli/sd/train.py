"""The one training loop: the world's models and every method's control are trained by it.

Everything random in a step comes from a generator seeded by (seed, step), so a run that resumes
from a checkpoint is the run that was never interrupted.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from p3s_cli.config import Optimizer
from p3s_cli.errors import P3SError
from p3s_cli.sd.adamw8 import AdamW8
from p3s_cli.sd.weights import load_tensors, save_tensors

# A loss takes the step and its generator and returns the scalar to minimise and numbers worth logging.
Loss = Callable[[int, torch.Generator], tuple[Tensor, dict[str, float]]]
OnStep = Callable[[int, int, dict[str, float]], None]


@dataclass(frozen=True)
class Recipe:
    """How long and how fast to train. `lr_scale` multiplies the rate of parameters whose name starts with a key."""

    steps: int
    lr: float
    weight_decay: float = 0.0
    warmup: int = 0
    decay: str = "constant"  # constant | cosine
    clip: float = 1.0
    betas: tuple[float, float] = (0.9, 0.999)
    ema: float = 0.0  # decay of the running average of the weights; 0 keeps none
    seed: int = 0
    lr_scale: tuple[tuple[str, float], ...] = ()
    optimizer: Optimizer = "adamw"


@dataclass(frozen=True)
class Checkpoint:
    """Where and how often (in seconds) the state of a run is kept."""

    path: Path
    every: float = 120.0


_MOMENTS = ("step", "exp_avg", "exp_avg_sq", "exp_avg_scale", "root", "root_scale")
_SKIPPED_IN_A_ROW = 20  # non-finite steps before a run is given up


def step_generator(seed: int, step: int) -> torch.Generator:
    """The source of all randomness of one step, on the CPU so that devices agree."""
    return torch.Generator().manual_seed((seed * 1_000_003 + step) % (2**63))


def learning_rate(recipe: Recipe, step: int) -> float:
    """The factor on the learning rate at a step: linear warm-up, then constant or a half cosine to zero."""
    if step < recipe.warmup:
        return (step + 1) / recipe.warmup
    if recipe.decay == "cosine":
        return 0.5 * (1 + math.cos(math.pi * (step - recipe.warmup) / max(1, recipe.steps - recipe.warmup)))
    return 1.0


def train(
    parameters: Mapping[str, nn.Parameter],
    loss: Loss,
    recipe: Recipe,
    on_step: OnStep | None = None,
    checkpoint: Checkpoint | None = None,
    until: int | None = None,
) -> dict[str, Tensor]:
    """Minimise `loss` over the named parameters, in place.

    Resumes from `checkpoint` if its file exists, stops before step `until` (a piece of a longer run)
    or at the recipe's end. Returns the weights to keep: the running average if the recipe has one.
    A step whose loss or gradient is not finite is skipped and counted; P3SError after 20 in a row.
    """
    run = _Run(parameters, recipe)
    if checkpoint and checkpoint.path.exists():
        run.restore(checkpoint.path)
    saved, skipped = time.monotonic(), 0
    end = min(recipe.steps, until if until is not None else recipe.steps)
    while run.step < end:
        value, log = loss(run.step, step_generator(recipe.seed, run.step))
        applied = run.apply(value)
        skipped = 0 if applied else skipped + 1
        if skipped == _SKIPPED_IN_A_ROW:
            raise P3SError(
                f"training stopped at step {run.step}: the loss was not finite {skipped} times in a row; lower the learning rate"
            )
        if on_step:
            on_step(run.step, recipe.steps, {"loss": value.item(), **log})
        if checkpoint and time.monotonic() - saved > checkpoint.every:
            run.save(checkpoint.path)
            saved = time.monotonic()
    if checkpoint:
        run.save(checkpoint.path)
    return run.weights()


class _Run:
    """Parameters, optimiser, running average and step count: what a checkpoint holds."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], recipe: Recipe):
        self.parameters, self.recipe, self.step = dict(parameters), recipe, 0
        groups = [{"params": [p], "lr": recipe.lr * self._scale(name)} for name, p in self.parameters.items()]
        options = {"betas": recipe.betas, "weight_decay": recipe.weight_decay}
        if recipe.optimizer == "adamw8":
            self.optimizer: torch.optim.Optimizer = AdamW8(groups, **options, seed=recipe.seed)
        else:
            fused = next(iter(self.parameters.values())).is_cuda
            self.optimizer = torch.optim.AdamW(groups, **options, fused=fused)
        self.base_rates = [g["lr"] for g in self.optimizer.param_groups]
        self.ema = {n: p.detach().clone() for n, p in self.parameters.items()} if recipe.ema else {}

    def _scale(self, name: str) -> float:
        return next((factor for prefix, factor in self.recipe.lr_scale if name.startswith(prefix)), 1.0)

    def apply(self, value: Tensor) -> bool:
        """One optimiser step. False, with nothing changed but the count, if anything was not finite."""
        self.optimizer.zero_grad(set_to_none=True)
        finite = bool(torch.isfinite(value))
        if finite:
            value.backward()
            norm = nn.utils.clip_grad_norm_(self.parameters.values(), self.recipe.clip)
            finite = bool(torch.isfinite(norm))
        if finite:
            factor = learning_rate(self.recipe, self.step)
            for group, rate in zip(self.optimizer.param_groups, self.base_rates, strict=True):
                group["lr"] = rate * factor
            self.optimizer.step()
            self._average()
        self.step += 1
        return finite

    @torch.no_grad()
    def _average(self) -> None:
        if self.ema:
            decay = min(self.recipe.ema, (1 + self.step) / (10 + self.step))
            torch._foreach_lerp_(list(self.ema.values()), [self.parameters[n].detach() for n in self.ema], 1 - decay)

    def weights(self) -> dict[str, Tensor]:
        return {n: t.detach().clone() for n, t in (self.ema or self.parameters).items()}

    def save(self, path: Path) -> None:
        state = {f"param/{n}": p for n, p in self.parameters.items()} | {f"ema/{n}": t for n, t in self.ema.items()}
        for name, parameter in self.parameters.items():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                state[f"{key}/{name}"] = torch.as_tensor(value)
        save_tensors(path, state, {"step": self.step})

    @torch.no_grad()
    def restore(self, path: Path) -> None:
        state, metadata = load_tensors(path)
        if {k for k in state if k.startswith("param/")} != {f"param/{n}" for n in self.parameters}:
            raise P3SError(f"{path} is a checkpoint of another model; remove it to begin again")
        self.step = int(metadata["step"])
        for name, parameter in self.parameters.items():
            parameter.copy_(state[f"param/{name}"])
            if name in self.ema:
                self.ema[name].copy_(state[f"ema/{name}"])
            moments = {key: state[f"{key}/{name}"] for key in _MOMENTS if f"{key}/{name}" in state}
            if moments:  # the count stays on the CPU, where both optimisers read it
                on_device = {k: v if k == "step" else v.to(parameter.device) for k, v in moments.items()}
                self.optimizer.state[parameter] = on_device
