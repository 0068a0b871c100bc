"""From pictures to rows: one protocol's metrics over the images of one method on one subject."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Protocol

from PIL import Image
from torch import Tensor

from p3s_cli.evals import protocols
from p3s_cli.evals.metrics import nearer
from p3s_cli.evals.models import LabelReader, MetricModel
from p3s_cli.evals.protocols import Metric
from p3s_cli.evals.scores import Row


@dataclass(frozen=True)
class Truth:
    """What results of one subject are compared with; pictures are PIL images.

    `real`: the chosen subject, the first being the reference that methods were given. `other`: its
    look-alike, empty if it has none. `masked`: `real` with all but the subject black. `other_text`
    describes the look-alike. `finder` tells where the subject is in a result; columns that ask for it
    are left out without one.
    """

    subject: str
    real: tuple[Image.Image, ...]
    other: tuple[Image.Image, ...] = ()
    masked: tuple[Image.Image, ...] = ()
    other_text: str | None = None
    finder: Finder | None = None

    @cached_property
    def digest(self) -> str:
        """Of all pictures: scores against other ones are other scores."""
        made = hashlib.sha256()
        for picture in (*self.real, None, *self.other, None, *self.masked):
            made.update(f"{picture.size}".encode() + picture.tobytes() if picture else b"|")
        return made.hexdigest()[:12]


class Finder(Protocol):
    """Finds one subject in pictures: everything but it black, and its middle as fractions (x, y).

    `digest`: of all that what it finds depends on.
    """

    digest: str

    def blackened(self, picture: Image.Image) -> Image.Image: ...
    def place(self, picture: Image.Image) -> tuple[float, float]: ...


@dataclass(frozen=True)
class Result:
    """One picture to be scored: its prompt without the identifier, and the labels that it asks for."""

    path: Path
    sha256: str
    prompt: str
    seed: int
    labels: frozenset[str] = frozenset()

    def open(self) -> Image.Image:
        with Image.open(self.path) as picture:
            return picture.convert("RGB")


class Judge:
    """A protocol with its models, found in `family_folder` first and by hub id otherwise."""

    def __init__(self, protocol: protocols.Protocol, family_folder: Path | None, device: str = "cpu"):
        self.protocol = protocol
        self._places = {
            key: (str(family_folder / where) if family_folder and (family_folder / where).is_dir() else where, how)
            for key, (where, how) in protocol.models.items()
        }
        self._device = device
        self._kept: dict[tuple, tuple[Tensor, tuple[Image.Image, ...]]] = {}  # vectors of the truth's pictures

    @cached_property
    def models(self) -> dict[str, MetricModel]:
        command = f"p3s fetch {self.protocol.name}"
        return {key: MetricModel(where, how, self._device, command) for key, (where, how) in self._places.items()}

    def load(self) -> None:
        """Load every model now. Raises InputError for one that is not at hand."""
        for model in self.models.values():
            model.load()

    @cached_property
    def reader(self) -> LabelReader:
        return LabelReader(*self._places["labels"], self._device)

    def metrics(self, truth: Truth) -> list[Metric]:
        """The columns that can be had for this subject."""
        found = truth.finder is not None
        needs = {"selective": bool(truth.other), "other_text": truth.other_text is not None, "x": found, "y": found}
        usable = [m for m in self.protocol.metrics if needs.get(m.against, True)]
        return [m for m in usable if not m.masked or (found and truth.masked)]

    def judge(self, method: str, truth: Truth, results: Sequence[Result], known: Callable) -> Iterator[Row]:
        """Rows that are not yet `known` (by key) for these results."""
        asked = any(result.labels for result in results)
        for metric in self.metrics(truth):
            if metric.against == "labels" and not asked:
                continue  # nothing that a share could be of
            reference = self._reference(metric, truth)
            rows = [self._row(method, truth, result, metric, reference) for result in results]
            missing = [i for i, row in enumerate(rows) if not known(row.key)]
            if missing:
                scores = self._scores(metric, truth, [results[i] for i in missing])
                for i, score in zip(missing, scores, strict=True):
                    yield replace(rows[i], score=score)

    def _row(self, method: str, truth: Truth, result: Result, metric: Metric, reference: str) -> Row:
        """All of a row but its score."""
        model, read = self.models[metric.model], metric.against == "labels"
        return Row(
            method=method,
            subject=truth.subject,
            prompt=result.prompt,
            seed=result.seed,
            file=str(result.path),
            sha256=result.sha256,
            reference=reference,
            metric=metric.name,
            protocol=self.protocol.name,
            score=0.0,
            model=model.name,
            fingerprint=(self.reader if read else model).fingerprint,
            preprocessing=str(model.preprocessing),
        )

    def _reference(self, metric: Metric, truth: Truth) -> str:
        if metric.against == "text":
            return "the prompt without its identifier"
        if metric.against == "other_text":
            return truth.other_text or ""
        if metric.against == "labels":
            return "the labels the prompt asks for"
        found = f"{truth.subject} found by {truth.finder.digest}" if truth.finder else ""
        if metric.against in ("x", "y"):
            return f"the picture's {'width' if metric.against == 'x' else 'height'}, {found}"
        count = f"{len(self._real(truth, metric.masked))} pictures of {truth.subject} ({truth.digest})"
        count += f", {found}" if metric.masked else ""
        return count if metric.against == "real" else f"{count} against {len(truth.other)} of its look-alike"

    def _real(self, truth: Truth, masked: bool) -> tuple[Image.Image, ...]:
        pictures = truth.masked if masked else truth.real
        return pictures[:1] if self.protocol.references == "own" else pictures

    def _scores(self, metric: Metric, truth: Truth, results: Sequence[Result]) -> list[float]:
        pictures = [result.open() for result in results]
        if metric.against == "labels":
            return self._found(pictures, results)
        if metric.against in ("x", "y"):
            return [truth.finder.place(p)["xy".index(metric.against)] for p in pictures]  # type: ignore[union-attr]
        model = self.models[metric.model]
        if metric.masked:
            pictures = [truth.finder.blackened(picture) for picture in pictures]  # type: ignore[union-attr]
        vectors = model.images(pictures)
        if metric.against == "text":
            return (vectors * model.texts([r.prompt for r in results])).sum(1).tolist()
        if metric.against == "other_text":
            return (vectors @ model.texts([truth.other_text or ""])[0]).tolist()
        real = self._vectors(model, self._real(truth, metric.masked))
        if metric.against == "real":
            return (vectors @ real.T).mean(1).tolist()
        return nearer(vectors, real, self._vectors(model, truth.other)).float().tolist()

    def _vectors(self, model: MetricModel, pictures: tuple[Image.Image, ...]) -> Tensor:
        """Unit vectors of the truth's pictures, made once."""
        key = (model.where, *map(id, pictures))
        if key not in self._kept:
            self._kept[key] = (model.images(pictures), pictures)  # the pictures are kept so that ids stay theirs
        return self._kept[key][0]

    def _found(self, pictures: Sequence[Image.Image], results: Sequence[Result]) -> list[float]:
        """Share of the asked labels that the reader finds on top of their groups."""
        read: dict[str, list[list[str]]] = {}
        for group in {label.split("/")[0] for result in results for label in result.labels}:
            read[group] = self.reader.read(pictures, group)
        return [
            sum(label in read[label.split("/")[0]][i] for label in result.labels) / max(1, len(result.labels))
            for i, result in enumerate(results)
        ]
