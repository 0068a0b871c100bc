"""The contract that makes methods comparable, and the registry of those that keep it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from p3s_cli.errors import InputError
from p3s_cli.sd.family import Family
from p3s_cli.sd.sample import Eps
from p3s_cli.sd.train import Checkpoint, OnStep
from p3s_cli.subject import Subject


@dataclass(frozen=True)
class Generator:
    """What a bound method gives the sampler.

    encode: prompts, identifier included, to text states (B, 77, D). eps: (x_t (B, 4, h, w), t (B,),
    text (B, 77, D), with the subject?) to noise (B, 4, h, w).
    """

    encode: Callable[[Sequence[str]], Tensor]
    eps: Eps


class Method(Protocol):
    """A way to teach a family one subject. `fit` returns what it learnt, `bind` uses it for a while."""

    name: str

    def fit(
        self,
        family: Family,
        subject: Subject,
        config,
        on_step: OnStep | None = None,
        checkpoint: Checkpoint | None = None,
    ) -> dict[str, Tensor]: ...

    def bind(
        self, family: Family, subject: Subject, tensors: dict[str, Tensor], config
    ) -> AbstractContextManager[Generator]: ...


REGISTRY: dict[str, Method] = {}


def register(method: Method) -> Method:
    REGISTRY[method.name] = method
    return method


def get(name: str) -> Method:
    """Raises InputError for a name that no method has."""
    if name not in REGISTRY:
        raise InputError(f"no method is called {name!r}; choose one of: {', '.join(REGISTRY)}")
    return REGISTRY[name]
