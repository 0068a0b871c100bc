"""How fast a method trains, so that methods can be compared at equal wall-clock."""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass
from statistics import mean, median

from p3s_cli import methods
from p3s_cli.config import FinetuneConfig
from p3s_cli.errors import InputError
from p3s_cli.methods.base import Lesson
from p3s_cli.sd.family import Family
from p3s_cli.subject import Subject


@dataclass(frozen=True)
class Pace:
    """Seconds before the first step (encoding references, drawing class images) and seconds a step."""

    setup: float
    step: float

    def steps(self, seconds: float) -> int:
        """How many steps fit into this much time, at least one."""
        return max(1, int((seconds - self.setup) / self.step))


def measure(method: str, family: Family, subject: Subject, warmup: int = 2, steps: int = 3) -> Pace:
    """Time a short run of `fit`: the mean of both halves' median steps, for one half of a run may cost more than the other.

    Each half has `warmup` steps that are not counted, then `steps`. Raises InputError for a method without steps or of
    unknown name.
    """
    half = warmup + steps
    chosen, config = methods.get(method), FinetuneConfig(steps=2 * half)
    if chosen.recipe(family.profile, config).steps == 0:
        raise InputError(f"{method} does not train, so it has no pace")
    _ = family.unet, family.vae, family.text_encoder, family.vision  # loaded at first use, which is no part of a run
    clock = [time.perf_counter()]
    chosen.fit(Lesson(family, subject, config, lambda step, total, numbers: clock.append(time.perf_counter())))
    taken = [b - a for a, b in itertools.pairwise(clock)]
    step = mean([median(taken[warmup:half]), median(taken[half + warmup :])])
    return Pace(max(0.0, taken[0] - step), step)
