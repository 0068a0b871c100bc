"""The one training loop: the world's models and every method's control are trained by it.

Everything random in a step comes from a generator seeded by (seed, step), so a run that resumes
from a checkpoint is the run that was never interrupted.
"""

from __future__ import annotations

import collections
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from p3s_cli import signals
from p3s_cli.config import Optimizer
from p3s_cli.errors import P3SError
from p3s_cli.sd import checkpoints
from p3s_cli.sd.graphs import Record
from p3s_cli.sd.update import Update


class Computed(NamedTuple):
    """What a loss makes of a step: the scalar to minimise, and numbers worth logging, which may still be on the device.

    A scalar that requires no gradient says that the gradients are with the parameters already; `norm` is then theirs, all
    taken as one vector, and `record` a way to record what is done with them, where they lie in the same place at every step.
    """

    value: Tensor
    numbers: Mapping[str, float | Tensor]
    norm: Tensor | None = None
    record: Record | None = None


Loss = Callable[[int, torch.Generator], Computed | tuple[Tensor, Mapping[str, float | Tensor]]]
OnStep = Callable[[int, int, dict[str, float]], None]


@dataclass(frozen=True)
class Recipe:
    """How long and how fast to train.

    `lr_scale` multiplies the rate of parameters whose name starts with a key. `half`: some of the forward pass is in
    float16, whose small gradients would be lost; the loss is scaled for them, by half as much after each step that is not
    finite. (`torch.amp.GradScaler` would do it, but cannot unscale bfloat16's gradients on CUDA.)
    """

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
    half: bool = False


@dataclass(frozen=True)
class Checkpoint:
    """The folder in which the state of a run is kept (`checkpoints`), and how often, in seconds.

    `last`: at its end as well, for whoever comes back to a run that is over.
    """

    path: Path
    every: float = 120.0
    last: bool = True


_LOSS_SCALE = 2.0**16  # to begin with, as GradScaler
_SKIPPED_IN_A_ROW = 20  # non-finite steps before a run is given up
_RECENT = 50  # steps over which reported numbers are averaged


def step_generator(seed: int, step: int) -> torch.Generator:
    """The source of all randomness of one step, on the CPU so that devices agree."""
    return torch.Generator().manual_seed((seed * 1_000_003 + step) % (2**63))


def sent(tensor: Tensor, device: torch.device | str) -> Tensor:
    """What was drawn on the CPU, on its way to the device; nobody waits for it to arrive there."""
    if torch.device(device).type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def rate_factor(recipe: Recipe, step: int) -> float:
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

    Resumes from `checkpoint` if there is one, stops before step `until` (a piece of a longer run) or at
    the recipe's end. `on_step` hears the means over the last 50 steps and how many were `skipped`: those
    whose loss or gradient was not finite. P3SError after 20 of these in a row. SIGINT and SIGTERM wait
    for the step to end and the checkpoint to be written. Returns the weights to keep, on the CPU: the running
    average if the recipe has one.
    """
    run = _Run(parameters, recipe)
    tell = on_step or (lambda step, total, numbers: None)
    if checkpoint:
        checkpoint.path.mkdir(parents=True, exist_ok=True)
        if run.restore(checkpoint.path):
            tell(run.step, recipe.steps, run.numbers())
    saved, end = time.monotonic(), min(recipe.steps, until if until is not None else recipe.steps)
    with signals.deferred() as asked_to_stop:
        while run.step < end and not asked_to_stop():
            run.apply(Computed(*loss(run.step, step_generator(recipe.seed, run.step))))
            if run.in_a_row == _SKIPPED_IN_A_ROW:
                raise P3SError(
                    f"training stopped at step {run.step}: loss or gradient was not finite {run.in_a_row} times in a row; lower the learning rate"
                )
            tell(run.step, recipe.steps, run.numbers())
            if checkpoint and time.monotonic() - saved > checkpoint.every:
                run.save(checkpoint.path)
                saved = time.monotonic()
        if checkpoint and (checkpoint.last or run.step < recipe.steps or asked_to_stop()):
            run.save(checkpoint.path)
    return run.weights()


class _Run:
    """Parameters, optimiser, running average, counts and recent numbers: what a checkpoint holds."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], recipe: Recipe):
        self.parameters, self.recipe, self.step = dict(parameters), recipe, 0
        rates = {name: recipe.lr * self._scale(name) for name in self.parameters}
        options = {"betas": recipe.betas, "weight_decay": recipe.weight_decay}
        self.update = Update(self.parameters, rates, recipe.optimizer, recipe.seed, **options)
        self.loss_scale = _LOSS_SCALE if recipe.half else 1.0
        self.ema = {n: p.detach().clone() for n, p in self.parameters.items()} if recipe.ema else {}
        self.skipped, self.in_a_row = 0, 0  # steps that were not finite
        self.recent: collections.deque[dict[str, float]] = collections.deque(maxlen=_RECENT)

    def _scale(self, name: str) -> float:
        return next((factor for prefix, factor in self.recipe.lr_scale if name.startswith(prefix)), 1.0)

    def apply(self, computed: Computed) -> None:
        """One optimiser step; nothing changes but the counts if anything was not finite."""
        value, finite = computed.value, True
        if value.requires_grad and (finite := bool(torch.isfinite(value))):
            (value * self.loss_scale).backward()
            if self.loss_scale != 1:  # a power of two, so nothing is rounded
                torch._foreach_mul_(self._gradients(), 1 / self.loss_scale)
        if finite:
            norm = nn.utils.get_total_norm(self._gradients()) if computed.norm is None else computed.norm
            # the one wait of a step: what is asked of the device is asked at once
            length, reached = torch.stack([norm.float(), value.detach().to(norm.device).float()]).tolist()
            finite = math.isfinite(length) and math.isfinite(reached)
            if finite and length + 1e-6 > self.recipe.clip:  # below, it would multiply by one
                nn.utils.clip_grads_with_norm_(self.parameters.values(), self.recipe.clip, norm)
            self.loss_scale = self.loss_scale if finite else max(1.0, self.loss_scale / 2)
        if finite:
            # read before there is more to wait for
            self.recent.append({"loss": reached} | {name: float(n) for name, n in computed.numbers.items()})
            self.update.step(rate_factor(self.recipe, self.step), computed.record)
            self._average()
        self.update.clear()  # now, and not before the next backward: the forward pass needs the room
        self.step += 1
        self.skipped, self.in_a_row = self.skipped + (not finite), 0 if finite else self.in_a_row + 1

    def _gradients(self) -> list[Tensor]:
        return [p.grad for p in self.parameters.values() if p.grad is not None]

    def numbers(self) -> dict[str, float]:
        """Means of the recent numbers, and the steps skipped so far."""
        names = self.recent[-1] if self.recent else ()
        means = {n: sum(r[n] for r in self.recent) / len(self.recent) for n in names}
        return means | {"skipped": self.skipped}

    @torch.no_grad()
    def _average(self) -> None:
        if self.ema:
            decay = min(self.recipe.ema, (1 + self.step) / (10 + self.step))
            torch._foreach_lerp_(list(self.ema.values()), [self.parameters[n].detach() for n in self.ema], 1 - decay)

    def weights(self) -> dict[str, Tensor]:
        # off the device, which holds gradients and moments still and has no room for another copy
        return {n: t.detach().to("cpu", copy=True) for n, t in (self.ema or self.parameters).items()}

    def save(self, folder: Path) -> None:
        """Raises P3SError, keeping what is on disk, if a parameter is not finite any more."""
        if not all(torch.isfinite(p).all() for p in self.parameters.values()):
            raise P3SError(
                f"training stopped at step {self.step}: the weights are not finite any more; lower the learning rate"
            )
        state = {f"param/{n}": p for n, p in self.parameters.items()} | {f"ema/{n}": t for n, t in self.ema.items()}
        state |= self.update.moments()
        counts = {"step": self.step, "skipped": self.skipped, "in_a_row": self.in_a_row}
        counts |= {"loss_scale": self.loss_scale} if self.recipe.half else {}
        checkpoints.commit(folder, self.step, state, counts | {"recent": list(self.recent)})

    @torch.no_grad()
    def restore(self, folder: Path) -> bool:
        """Take up the newest whole state in the folder; False if there is none."""
        found = checkpoints.newest(folder)
        if found is None:
            return False
        state, metadata = found
        shapes = {k[6:]: v.shape for k, v in state.items() if k.startswith("param/")}
        if shapes != {n: p.shape for n, p in self.parameters.items()}:
            raise P3SError(f"{folder} is a checkpoint of another model; remove it to begin again")
        self.step, self.skipped, self.in_a_row = (int(metadata[n]) for n in ("step", "skipped", "in_a_row"))
        self.recent.extend(metadata["recent"])
        if self.recipe.half:  # another precision's state has none
            self.loss_scale = float(metadata.get("loss_scale", _LOSS_SCALE))
        for name, parameter in self.parameters.items():
            parameter.copy_(state[f"param/{name}"])
            if name in self.ema:
                self.ema[name].copy_(state[f"ema/{name}"])
        self.update.restore(state)
        return True
