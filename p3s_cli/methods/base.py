"""The contract that makes methods comparable, and the registry of those that keep it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol, TypeVar

import torch
from torch import Tensor, nn

from p3s_cli.config import FinetuneConfig, GenerateConfig
from p3s_cli.errors import InputError
from p3s_cli.manifest import SEEN_BY
from p3s_cli.sd.family import Family, Profile
from p3s_cli.sd.sample import Eps
from p3s_cli.sd.train import Checkpoint, Loss, OnStep, Recipe, train
from p3s_cli.sd.weights import load_tensors
from p3s_cli.subject import CONTROL, Subject

R = TypeVar("R")
# a preset, a weight schedule, several references, compiled passes, a memory profile; and what `Joining` adds
Heed = Literal["preset", "schedule", "references", "compiled", "memory", "joined", "vision"]


@dataclass(frozen=True)
class Generator:
    """What a bound method gives the sampler.

    encode: prompts with [V] (or [V1], [V2], ...) where the subject is to text states (B, 77, D). eps: (x_t (B, 4, h, w),
    t (B,), text (B, 77, D), with the subject?) to noise (B, 4, h, w).
    """

    encode: Callable[[Sequence[str]], Tensor]
    eps: Eps


@dataclass(frozen=True)
class Lesson:
    """What a method is given to learn from: a family, a masked subject, and what was asked for.

    `on_step` hears of every step; the state of the run is kept in `checkpoint`, and taken up from there.
    """

    family: Family
    subject: Subject
    config: FinetuneConfig
    on_step: OnStep | None = None
    checkpoint: Checkpoint | None = None

    def train(self, parameters: Mapping[str, nn.Parameter], loss: Loss, recipe: Recipe) -> dict[str, Tensor]:
        """The one loop, heard and kept as asked for, in the family's precision."""
        recipe = replace(recipe, half=self.family.dtype == torch.float16)
        return train(parameters, loss, recipe, self.on_step, self.checkpoint)


@dataclass(frozen=True)
class Learnt:
    """What a method made of a subject, read back from its artifact: the tensors of `fit`, and `recipe` as a dict."""

    subject: Subject
    tensors: Mapping[str, Tensor]
    recipe: Mapping[str, Any]

    @classmethod
    def read(cls, subject: Subject) -> Learnt:
        """Raises InputError if the subject is not tuned, or its artifact is not the one that tuning wrote."""
        with torch.inference_mode(False):  # who keeps them may draw without it as well
            tensors, metadata = load_tensors(subject.path(CONTROL), sha=subject.tuned().artifacts[CONTROL])
        return cls(subject, tensors, metadata["config"])


@dataclass(frozen=True)
class SubjectPart:
    """One tuned subject's part in an image: what was learnt of it, and how strongly it comes in."""

    learnt: Learnt
    strength: float = 1.0


def check_made_for(subject: Subject, family: Family) -> None:
    """Raises InputError unless the control is whole and belongs to the subject's masks, this base and this CLIP pair."""
    subject.check_control(family.fingerprint, family.source)
    if not seen_alike(subject, family):
        raise InputError(
            f"{subject.root} was tuned through another CLIP pair: {family.profile.clip} has changed since; bring that one "
            f"back, or run: {subject.finetune_again()}"
        )


def seen_alike(subject: Subject, family: Family) -> bool:
    """Whether the family's CLIP pair is, by its files, the one of the subject's tuning; also if one of them is not known."""
    theirs = subject.tuned().settings.get(SEEN_BY)
    return theirs is None or family.pair_fingerprint in (theirs, None)


def check_pair(subjects: Sequence[Subject]) -> None:
    """Raises InputError if two see their references through different CLIP pairs, for a family has one."""
    first = subjects[0].tuned().settings
    for s in subjects[1:]:
        theirs = s.tuned().settings
        # by their files, where both were tuned since these are kept
        told_by = SEEN_BY if SEEN_BY in first and SEEN_BY in theirs else "vision"
        if theirs.get(told_by) != first.get(told_by):
            raise InputError(
                f"{s.root} sees its references through another CLIP pair than {subjects[0].root}; tune one of them again with the other's --vision"
            )


class Method(Protocol):
    """A way to teach a family one subject. `fit` returns what it learnt, `bind` uses it for a while.

    Neither changes the family: what trains is a module of the method's own or a copy. `given` is what the
    method sees of a reference, `heeds` what it can be asked for beside steps, rate and strength. `recipe` is every
    setting that `fit` will use, a dataclass with at least `steps`.
    """

    name: str
    given: Literal["points", "mask", "crop", "nothing"]
    heeds: frozenset[Heed]

    def recipe(self, profile: Profile, config: FinetuneConfig) -> Any: ...

    def fit(self, lesson: Lesson) -> dict[str, Tensor]: ...

    def bind(self, family: Family, learnt: Learnt, sampling: GenerateConfig) -> AbstractContextManager[Generator]: ...


class Joining(Method, Protocol):
    """A method that `heeds` "joined": several subjects in one image, and ControlNets and LoRAs beside them."""

    def bind_many(
        self, family: Family, parts: Sequence[SubjectPart], sampling: GenerateConfig
    ) -> AbstractContextManager[Generator]: ...


REGISTRY: dict[str, Method] = {}


def register(method: Method) -> Method:
    REGISTRY[method.name] = method
    return method


def asked(config: FinetuneConfig) -> dict[str, Any]:
    """Steps, rate and batch, as far as they were asked for."""
    return {n: getattr(config, n) for n in ("steps", "lr", "batch") if getattr(config, n) is not None}


def settled(published: R, name: str, profile: Profile, config: FinetuneConfig) -> R:
    """A published recipe, with what the family recommends for the method, then with what was asked for."""
    return replace(published, **(profile.methods.get(name, {}) | asked(config)))
