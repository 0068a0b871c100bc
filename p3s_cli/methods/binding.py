"""Tuned P3S subjects on the device, ready to be injected."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from p3s_cli.config import GenerateConfig, read_control
from p3s_cli.errors import InputError
from p3s_cli.methods.base import SubjectPart
from p3s_cli.methods.conditioning import condition, reference_view
from p3s_cli.methods.forward import Forward, forward
from p3s_cli.methods.photos import read_photos
from p3s_cli.paper.injection import Injection
from p3s_cli.paper.model import P3SControl
from p3s_cli.paper.schedule import LearnedWeight
from p3s_cli.sd.family import Family
from p3s_cli.sd.graphs import possible
from p3s_cli.sd.weights import check_layout, layout_of


def captures(family: Family, sampling: GenerateConfig) -> bool:
    """Whether the passes are recorded as CUDA graphs: where that was asked for and pays."""
    return sampling.captured and possible(family.device, sampling.steps)


@dataclass
class Bound:
    """A subject's control on the device, and what its copy sees of each reference used: I'' of eq. 5 (1, C, h, w).

    The copy runs at every `reuse`-th step of a trajectory; in between its features are used again.
    """

    control: P3SControl
    seen: list[Tensor]
    strength: float
    identifier: str
    reuse: int = 1
    learned: LearnedWeight | None = None  # where the schedule is left to it
    forward: Forward = Forward()
    _kept: list[Injection] = field(default_factory=list)
    _age: int = 0
    _first: float = -1.0  # where the trajectory began
    _last: float = -1.0

    @classmethod
    def build(cls, family: Family, part: SubjectPart, sampling: GenerateConfig) -> Bound:
        """Raises InputError if the control was trained on another shape of base, or lacks the weight to sample by."""
        subject, tensors, config = part.learnt.subject, part.learnt.tensors, read_control(part.learnt.recipe)
        if sampling.schedule.kind == "learned" and not config.learned_weight:
            raise InputError(f"{subject.root} was tuned without a learned weight; choose another --schedule")
        unet, width = family.unet, family.vision.width  # read from files here, which may not happen below
        with torch.device("meta"):  # whatever it starts with is replaced
            control = P3SControl(unet, width, config)
        try:
            check_layout(layout_of(tensors), layout_of(control.state_dict()))
        except ValueError as error:
            raise InputError(
                f"the control of {subject.root} does not fit this base ({error}); tune it again"
            ) from error
        control.load_state_dict(tensors, assign=True)
        control.to(family.device, family.dtype).eval().requires_grad_(False)
        photos = read_photos(subject, sampling.references)
        views = [reference_view(p.mask, config) for p in photos]
        given = condition(family, photos, views, config, sampling.size)
        with torch.no_grad():
            seen = control.see(given.latent.to(family.dtype), given.vision.to(family.dtype))
        learned = control.weighting if sampling.schedule.kind == "learned" else None
        passes = forward(sampling.compiled, captures(family, sampling))
        return cls(
            control, list(seen.split(1)), part.strength, subject.manifest.identifier, sampling.reuse, learned, passes
        )

    def injections(self, x_t: Tensor, t: Tensor, states: Tensor, weight: float) -> list[Injection]:
        """P3S eq. 6 for each reference; together they take the place of one."""
        weights = torch.full((len(x_t),), weight * self.strength, device=x_t.device)
        if self.learned is not None:
            weights = weights * self.learned(t)
        time = float(t[0])
        # time runs downwards, so this is another trajectory; some schedulers stay at a time, but for rounding, and not at the first
        begins = time >= self._first or time > self._last + 1
        if begins or self._age % self.reuse == 0 or len(self._kept[0].weight) != len(x_t):
            self._kept, self._age = [self._inject(x_t, t, states, weights, seen) for seen in self.seen], 0
        self._first = time if begins else self._first
        self._age, self._last = self._age + 1, time
        return [replace(kept, weight=weights) for kept in self._kept]

    def _inject(self, x_t: Tensor, t: Tensor, states: Tensor, weights: Tensor, seen: Tensor) -> Injection:
        injection, _ = self.forward.copy(self.control, x_t, t, states, seen, weights)
        return replace(injection, share=1 / len(self.seen))
