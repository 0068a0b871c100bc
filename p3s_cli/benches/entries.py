"""Who takes part in a run: P3S, its rivals, and the ablations of the paper and of our readings."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from p3s_cli.config import PRESETS, ControlConfig
from p3s_cli.errors import InputError
from p3s_cli.subject import digest


@dataclass(frozen=True)
class Entry:
    """One row of a table: a method with its settings.

    `sampling` goes to `generate`. `budget` is the method's published recipe or P3S's own wall-clock.
    """

    name: str
    method: str = "p3s"
    control: ControlConfig | None = None
    steps: int | None = None
    sampling: Mapping[str, Any] = field(default_factory=dict)
    budget: Literal["published", "equal"] = "published"

    @property
    def strength(self) -> float:
        return float(self.sampling.get("strength", 1.0))

    @property
    def label(self) -> str:
        """The name without its strength: whose curve this is a point of."""
        return self.name.rsplit(" x", 1)[0] if "strength" in self.sampling else self.name

    def at_strength(self, strength: float) -> Entry:
        """The same, sampled at another strength."""
        return replace(self, name=f"{self.name} x{strength:g}", sampling={**self.sampling, "strength": strength})

    @property
    def tuning(self) -> str:
        """The folder of the tuned subjects; entries that differ in sampling only share it."""
        control = None if self.control is None else self.control.__dict__
        return f"{self.method}-{digest(control, self.steps, self.budget)[:8]}"


def _control(name: str, **changes: Any) -> Entry:
    return Entry(name, control=replace(ControlConfig(), **changes))


# The paper's Tables II, III and IV and Fig. 5, then our own readings. The first is what all are compared with.
ABLATIONS: tuple[Entry, ...] = (
    Entry("p3s"),
    _control("without RNGR", rngr=False),
    _control("without L_ac", attention_loss="off"),
    _control("L_ac on all layers", attention_layers="all"),
    Entry("weight fixed", sampling={"schedule": "fixed"}),
    Entry("weight increasing", sampling={"schedule": "increasing"}),
    Entry("weight decreasing", sampling={"schedule": "decreasing"}),
    Entry("paper preset", control=PRESETS["paper"][1]),
    _control("literal injection", injection="literal"),
    _control("L_ac as printed", attention_loss="printed"),
    _control("L_ac relative", attention_loss="relative"),
    _control("L_ac moves both maps", attention_gradient="both"),
    _control("injection never dropped", drop_injection=0.0),
    Entry("subject guidance 2", sampling={"subject_guidance": 2.0}),
    _control("joint augmentation", augment="joint"),
    _control("independent augmentation", augment="independent"),
    _control("reference background kept", reference_background="keep"),
    _control("loss over the whole image", background_weight=1.0),
)


def rivals(names: Sequence[str], known: Sequence[str], budgets: Sequence[str]) -> list[Entry]:
    """One entry a method and budget; P3S, and what is not tuned, has one only.

    Raises InputError for a method that does not exist.
    """
    entries = []
    for name in names:
        if name not in known:
            raise InputError(f"no method is called {name!r}; choose from: {', '.join(known)}")
        for budget in budgets if name not in ("p3s", "untuned") else ("published",):
            label = name if budget == "published" else f"{name}, equal time"
            entries.append(Entry(label, method=name, budget=budget))  # type: ignore[arg-type]
    return entries


def choose(entries: Sequence[Entry], wanted: Sequence[str] | None, key: Callable[[Entry], str]) -> list[Entry]:
    """The entries of these names, in their own order. Raises InputError for a name none of them has."""
    if wanted is None:
        return list(entries)
    names = [key(e) for e in entries]
    for name in wanted:
        if name not in names:
            raise InputError(f"nothing here is called {name!r}; choose from: {', '.join(names)}")
    return [e for e in entries if key(e) in wanted]
