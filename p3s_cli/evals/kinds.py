"""What a column compares results with: all that is particular to one way, in one place (`KINDS`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from PIL import Image
from torch import Tensor

from p3s_cli.evals.metrics import nearer
from p3s_cli.evals.models import LabelReader, MetricModel
from p3s_cli.evals.truth import Result, Truth

Pictures = Sequence[Image.Image]


@dataclass(frozen=True)
class Shown:
    """What scores are made from.

    `pictures`, of the `results`, and `real`, of the subject: in a masked column with everything else black. `kept`:
    unit vectors by `model` of the truth's pictures, made once.
    """

    truth: Truth
    results: Sequence[Result]
    pictures: Pictures
    real: Pictures
    model: MetricModel
    kept: Callable[[Pictures], Tensor]
    reader: Callable[[], LabelReader]

    @property
    def vectors(self) -> Tensor:
        """Unit vectors of the results, (B, D)."""
        return self.model.images(self.pictures)


class Kind(Protocol):
    """One way to compare. `reference` names what with: `real` is how the subject's pictures are called, `found` how it was."""

    def available(self, truth: Truth, results: Sequence[Result]) -> bool: ...
    def reference(self, truth: Truth, real: str, found: str) -> str: ...
    def scores(self, shown: Shown) -> list[float]: ...


class Real:
    """Mean cosine with pictures of the subject."""

    def available(self, truth: Truth, results: Sequence[Result]) -> bool:
        return True

    def reference(self, truth: Truth, real: str, found: str) -> str:
        return real

    def scores(self, shown: Shown) -> list[float]:
        return (shown.vectors @ shown.kept(shown.real).T).mean(1).tolist()


class Selective:
    """1 where a result is nearer to the subject than to its look-alike, else 0."""

    def available(self, truth: Truth, results: Sequence[Result]) -> bool:
        return bool(truth.other)

    def reference(self, truth: Truth, real: str, found: str) -> str:
        return f"{real} against {len(truth.other)} of its look-alike"

    def scores(self, shown: Shown) -> list[float]:
        return nearer(shown.vectors, shown.kept(shown.real), shown.kept(shown.truth.other)).float().tolist()


class Text:
    """Cosine with the prompt, without its identifier."""

    def available(self, truth: Truth, results: Sequence[Result]) -> bool:
        return True

    def reference(self, truth: Truth, real: str, found: str) -> str:
        return "the prompt without its identifier"

    def scores(self, shown: Shown) -> list[float]:
        return (shown.vectors * shown.model.texts([r.prompt for r in shown.results])).sum(1).tolist()


class OtherText:
    """Cosine with the look-alike's description (CLIP-ES: lower is better)."""

    def available(self, truth: Truth, results: Sequence[Result]) -> bool:
        return truth.other_text is not None

    def reference(self, truth: Truth, real: str, found: str) -> str:
        return truth.other_text or ""

    def scores(self, shown: Shown) -> list[float]:
        return (shown.vectors @ shown.model.texts([shown.truth.other_text or ""])[0]).tolist()


class Labels:
    """Share of the labels that a prompt asks for which the reader finds on top of their groups."""

    def available(self, truth: Truth, results: Sequence[Result]) -> bool:
        return any(result.labels for result in results)  # else there is nothing that a share could be of

    def reference(self, truth: Truth, real: str, found: str) -> str:
        return "the labels the prompt asks for"

    def scores(self, shown: Shown) -> list[float]:
        groups = {label.split("/")[0] for result in shown.results for label in result.labels}
        read = {group: shown.reader().read(shown.pictures, group) for group in groups}
        return [
            sum(label in read[label.split("/")[0]][i] for label in result.labels) / max(1, len(result.labels))
            for i, result in enumerate(shown.results)
        ]


@dataclass(frozen=True)
class Place:
    """Where the subject's middle is, as a fraction of the picture's width (axis 0) or height (1): a copied reference never moves."""

    axis: Literal[0, 1]

    def available(self, truth: Truth, results: Sequence[Result]) -> bool:
        return truth.finder is not None

    def reference(self, truth: Truth, real: str, found: str) -> str:
        return f"the picture's {('width', 'height')[self.axis]}, {found}"

    def scores(self, shown: Shown) -> list[float]:
        assert shown.truth.finder is not None
        return [shown.truth.finder.place(picture)[self.axis] for picture in shown.pictures]


KINDS: Mapping[str, Kind] = {
    "real": Real(),
    "selective": Selective(),
    "text": Text(),
    "other_text": OtherText(),
    "labels": Labels(),
    "x": Place(0),
    "y": Place(1),
}
