"""The contract that makes methods comparable, and the registry of those that keep it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol, TypeVar

from torch import Tensor

from p3s_cli.config import FinetuneConfig, GenerateConfig
from p3s_cli.sd.family import Family, Profile
from p3s_cli.sd.sample import Eps
from p3s_cli.sd.train import Checkpoint, OnStep
from p3s_cli.subject import Subject

R = TypeVar("R")


@dataclass(frozen=True)
class Generator:
    """What a bound method gives the sampler.

    encode: prompts, identifier included, to text states (B, 77, D). eps: (x_t (B, 4, h, w), t (B,),
    text (B, 77, D), with the subject?) to noise (B, 4, h, w).
    """

    encode: Callable[[Sequence[str]], Tensor]
    eps: Eps


class Method(Protocol):
    """A way to teach a family one subject. `fit` returns what it learnt, `bind` uses it for a while.

    Neither changes the family: what trains is a module of the method's own or a copy. `given` is what the
    method sees of a reference. `recipe` is every setting that `fit` will use, a dataclass with at least
    `steps`; read back from the artifact as a dict, it comes to `bind`.
    """

    name: str
    given: Literal["points", "mask", "crop", "nothing"]

    def recipe(self, profile: Profile, config: FinetuneConfig) -> Any: ...

    def fit(
        self,
        family: Family,
        subject: Subject,
        config: FinetuneConfig,
        on_step: OnStep | None = None,
        checkpoint: Checkpoint | None = None,
    ) -> dict[str, Tensor]: ...

    def bind(
        self,
        family: Family,
        subject: Subject,
        tensors: Mapping[str, Tensor],
        recipe: Mapping[str, Any],
        sampling: GenerateConfig,
    ) -> AbstractContextManager[Generator]: ...


REGISTRY: dict[str, Method] = {}


def register(method: Method) -> Method:
    REGISTRY[method.name] = method
    return method


def settled(published: R, name: str, profile: Profile, config: FinetuneConfig) -> R:
    """A published recipe, with what the family recommends for the method, then with what was asked for."""
    asked = {n: getattr(config, n) for n in ("steps", "lr", "batch") if getattr(config, n) is not None}
    return replace(published, **(profile.methods.get(name, {}) | asked))
