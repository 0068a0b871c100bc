"""Tuned P3S subjects on the device, ready to be injected."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from p3s_cli.config import ControlConfig, GenerateConfig, read_control
from p3s_cli.errors import InputError
from p3s_cli.methods.base import Learnt
from p3s_cli.methods.conditioning import condition, reference_view
from p3s_cli.methods.forward import Forward, forward
from p3s_cli.methods.photos import read_photos
from p3s_cli.paper.injection import Injection
from p3s_cli.paper.model import P3SControl
from p3s_cli.paper.schedule import LearnedWeight
from p3s_cli.sd.family import Family
from p3s_cli.sd.weights import check_layout, layout_of
from p3s_cli.subject import Subject


@dataclass(frozen=True)
class Part:
    """One tuned subject's part in an image: its control's tensors and settings, and how strongly it is injected."""

    subject: Subject
    tensors: Mapping[str, Tensor]
    config: ControlConfig
    strength: float = 1.0

    @classmethod
    def of(cls, learnt: Learnt, strength: float = 1.0) -> Part:
        return cls(learnt.subject, learnt.tensors, read_control(learnt.recipe), strength)


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
    _last: float = -1.0

    @classmethod
    def build(cls, family: Family, part: Part, sampling: GenerateConfig) -> Bound:
        """Raises InputError if the control was trained on another shape of base, or lacks the weight to sample by."""
        if sampling.schedule.kind == "learned" and not part.config.learned_weight:
            raise InputError(f"{part.subject.root} was tuned without a learned weight; choose another --schedule")
        unet, width = family.unet, family.vision.width  # read from files here, which may not happen below
        with torch.device("meta"):  # whatever it starts with is replaced
            control = P3SControl(unet, width, part.config)
        try:
            check_layout(layout_of(part.tensors), layout_of(control.state_dict()))
        except ValueError as error:
            raise InputError(
                f"the control of {part.subject.root} does not fit this base ({error}); tune it again"
            ) from error
        control.load_state_dict(part.tensors, assign=True)
        control.to(family.device, family.dtype).eval().requires_grad_(False)
        photos = read_photos(part.subject)[: sampling.references]
        views = [reference_view(p.mask, part.config) for p in photos]
        given = condition(family, photos, views, part.config, sampling.size)
        with torch.no_grad():
            seen = control.see(given.latent.to(family.dtype), given.vision.to(family.dtype))
        identifier = part.subject.manifest.identifier
        learned = control.weighting if sampling.schedule.kind == "learned" else None
        passes = forward(sampling.compiled)
        return cls(control, list(seen.split(1)), part.strength, identifier, sampling.reuse, learned, passes)

    def injections(self, x_t: Tensor, t: Tensor, states: Tensor, weight: float) -> list[Injection]:
        """P3S eq. 6 for each reference; together they take the place of one."""
        weights = torch.full((len(x_t),), weight * self.strength, device=x_t.device)
        if self.learned is not None:
            weights = weights * self.learned(t)
        begins = float(t[0]) >= self._last  # time runs downwards, so this is another trajectory
        if begins or self._age % self.reuse == 0 or len(self._kept[0].weight) != len(x_t):
            self._kept, self._age = [self._inject(x_t, t, states, weights, seen) for seen in self.seen], 0
        self._age, self._last = self._age + 1, float(t[0])
        return [replace(kept, weight=weights) for kept in self._kept]

    def _inject(self, x_t: Tensor, t: Tensor, states: Tensor, weights: Tensor, seen: Tensor) -> Injection:
        injection, _ = self.forward.copy(self.control, x_t, t, states, seen, weights)
        return replace(injection, share=1 / len(self.seen))
