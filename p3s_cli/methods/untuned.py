"""No tuning at all: the base model draws some member of the class. The line that every method must leave."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from p3s_cli.config import FinetuneConfig, GenerateConfig
from p3s_cli.methods.base import Generator, Heed, Learnt, Lesson, register
from p3s_cli.methods.denoising import noise_of, states_of
from p3s_cli.sd.family import Family, Profile


@dataclass(frozen=True)
class UntunedRecipe:
    """There is nothing to set."""

    steps: int = 0


class Untuned:
    """Contract: `p3s_cli.methods.base.Method`."""

    name = "untuned"
    given: Literal["nothing"] = "nothing"
    heeds: frozenset[Heed] = frozenset()

    def recipe(self, profile: Profile, config: FinetuneConfig) -> UntunedRecipe:
        return UntunedRecipe()

    def fit(self, lesson: Lesson) -> dict[str, Tensor]:
        """Nothing is learnt."""
        return {}

    @contextlib.contextmanager
    def bind(self, family: Family, learnt: Learnt, sampling: GenerateConfig) -> Iterator[Generator]:
        """The family as it is. The identifier, which means nothing to it, is left out of the prompts."""
        yield Generator(states_of(family, ""), noise_of(family, family.unet))


register(Untuned())
