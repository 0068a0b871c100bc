"""How fast a method trains, so that methods can be compared at equal wall-clock."""

from __future__ import annotations

import time
from dataclasses import dataclass
from statistics import median

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


def measure(method: str, family: Family, subject: Subject, warmup: int = 2, steps: int = 6) -> Pace:
    """Time a short run of `fit`: the median over `steps` steps after `warmup` steps that are not counted.

    Raises InputError for a method without steps or of unknown name.
    """
    chosen, config = methods.get(method), FinetuneConfig(steps=warmup + steps)
    if chosen.recipe(family.profile, config).steps == 0:
        raise InputError(f"{method} does not train, so it has no pace")
    _ = family.unet, family.vae, family.text_encoder, family.vision  # loaded at first use, which is no part of a run
    clock = [time.perf_counter()]
    chosen.fit(Lesson(family, subject, config, lambda step, total, numbers: clock.append(time.perf_counter())))
    step = median(b - a for a, b in zip(clock[warmup:], clock[warmup + 1 :], strict=False))
    return Pace(max(0.0, clock[1] - clock[0] - step), step)
