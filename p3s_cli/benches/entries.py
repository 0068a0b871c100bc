"""Who takes part in a run: P3S, its rivals, and the ablations of the paper and of our readings."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

from p3s_cli.config import PRESETS, ControlConfig, MaskConfig
from p3s_cli.errors import InputError
from p3s_cli.sd.profile import Profile
from p3s_cli.subject import digest

Budget = Literal["published", "equal"]
BUDGETS: tuple[Budget, ...] = get_args(Budget)


@dataclass(frozen=True)
class References:
    """How a case's subject is shown to a method: how many photos, masked how, with the look-alike removed or not."""

    name: str = ""  # of the folders they are in
    photos: int = 1
    true_masks: bool = False
    inpaint: bool = True
    masking: MaskConfig = field(default_factory=MaskConfig)


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
    budget: Budget = "published"
    references: References = field(default_factory=References)

    @property
    def strength(self) -> float:
        return float(self.sampling.get("strength", 1.0))

    @property
    def plain(self) -> bool:
        """Whether its tuning is the method's own, and nothing else is asked of it."""
        return self.control is None and self.steps is None and self.budget == "published"

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
        shown = f"-{self.references.name}" if self.references.name else ""
        return f"{self.method}-{digest(control, self.steps, self.budget)[:8]}{shown}"

    @property
    def drawing(self) -> str:
        """What its images are made from, in a word: the tuning and how it is sampled."""
        return f"{self.tuning}-{digest(dict(self.sampling))[:8]}" if self.sampling else self.tuning


def _control(name: str, **changes: Any) -> Entry:
    return Entry(name, control=replace(ControlConfig(), **changes))


_PRINTED = MaskConfig(recipe="paper")
_PRINTED_MASKS = References("eq2-raw", masking=_PRINTED)
_UNPAINTED = References("unpainted", inpaint=False)
_THREE = References("three", photos=3)
_SCHEDULES = ("quadratic", "fixed", "increasing", "decreasing")


def ablations(profile: Profile) -> tuple[Entry, ...]:
    """The paper's Tables II, III and IV and Fig. 5, then our own readings; the first is what all are compared with.

    s_i is tried at 1 (injection in both halves of guidance), at 2, and at s_t (in the conditional half only), and every
    schedule of Table III, but for what the family does by default.
    """
    strengths = [s for s in dict.fromkeys((1.0, 2.0, profile.guidance)) if s != profile.subject_guidance]
    return (
        Entry("p3s"),
        *(Entry(f"weight {s}", sampling={"schedule": s}) for s in _SCHEDULES if s != profile.schedule),
        *_ABLATIONS,
        *(Entry(f"subject guidance {s:g}", sampling={"subject_guidance": s}) for s in strengths),
    )


_ABLATIONS: tuple[Entry, ...] = (
    _control("without RNGR", rngr=False),
    _control("without L_ac", attention_loss="off"),
    _control("L_ac on all layers", attention_layers="all"),
    replace(_control("weight learned", learned_weight=True), sampling={"schedule": "learned"}),
    Entry("paper preset", control=PRESETS["paper"][1], references=_PRINTED_MASKS),
    _control("literal injection", injection="literal"),
    _control("L_ac as printed", attention_loss="printed"),
    _control("L_ac relative", attention_loss="relative"),
    _control("L_ac moves both maps", attention_gradient="both"),
    _control("injection never dropped", drop_injection=0.0),
    _control("joint augmentation", augment="joint"),
    _control("independent augmentation", augment="independent"),
    _control("reference background kept", reference_background="keep"),
    _control("loss over the whole image", background_weight=1.0),
    _control("nothing preserved", preserve=0.0),
    _control("less preserved", preserve=0.3),
    _control("no learned word", learned_word=False),
    _control("falling rate", decay="cosine"),
    _control("uniform timesteps", timesteps="uniform"),
    _control("no state led astray", astray=0.0),
    _control("the last weights", average=0.0),
    _control("close view", reference_view="close"),
    _control("whole photo", reference_view="photo"),
    Entry("nothing reused", sampling={"reuse": 1}),
    Entry("fast", sampling={"fast": True}),
    Entry("three references", references=_THREE),
    Entry("three references, all shown", references=_THREE, sampling={"references": 3}),
    Entry("true masks", references=References("true", true_masks=True)),
    Entry("masks by eq. 2, raw", references=_PRINTED_MASKS),
    Entry(
        "masks by eq. 2, rescaled",
        references=References("eq2-rescaled", masking=replace(_PRINTED, similarity="rescaled")),
    ),
    Entry("no inpainting", references=_UNPAINTED),
    Entry("paper preset, no inpainting", control=PRESETS["paper"][1], references=_UNPAINTED),
)


def rivals(names: Sequence[str], known: Sequence[str], budgets: Sequence[str]) -> list[Entry]:
    """One entry a method and budget; P3S, and what is not tuned, has one only.

    Raises InputError for a method or a budget that does not exist.
    """
    for budget in budgets:
        if budget not in BUDGETS:
            raise InputError(f"no budget is called {budget!r}; choose from: {', '.join(BUDGETS)}")
    entries = []
    for name in dict.fromkeys(names):
        if name not in known:
            raise InputError(f"no method is called {name!r}; choose from: {', '.join(known)}")
        for budget in dict.fromkeys(budgets) if name not in ("p3s", "untuned") else ("published",):
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
