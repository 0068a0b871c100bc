"""From pictures to rows: one protocol's metrics over the images of one method on one subject."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path

from torch import Tensor

from p3s_cli.errors import InputError
from p3s_cli.evals import protocols
from p3s_cli.evals.kinds import KINDS, Pictures, Shown
from p3s_cli.evals.models import LabelReader, MetricModel
from p3s_cli.evals.protocols import Metric
from p3s_cli.evals.scores import Row
from p3s_cli.evals.truth import Result, Truth
from p3s_cli.sd import hub


class Judge:
    """A protocol with its models, found in `family_folder` first and by hub id otherwise."""

    def __init__(self, protocol: protocols.Protocol, family_folder: Path | None, device: str = "cpu"):
        self.protocol = protocol
        self._places = {
            key: (str(family_folder / where) if family_folder and (family_folder / where).is_dir() else where, how)
            for key, (where, how) in protocol.models.items()
        }
        self._device = device
        self._kept: dict[tuple, tuple[Tensor, Pictures]] = {}  # vectors of the truth's pictures

    @cached_property
    def models(self) -> dict[str, MetricModel]:
        command = f"p3s fetch {self.protocol.name}"
        return {key: MetricModel(where, how, self._device, command) for key, (where, how) in self._places.items()}

    def load(self) -> None:
        """Load every model now. Raises InputError for one that is not at hand."""
        self._check_own()
        for model in self.models.values():
            model.load()

    def _check_own(self) -> None:
        """Raises InputError if the protocol is another family's: a place in its folder is not to be fetched from anywhere."""
        if all(hub.is_id(hub.split(where)[0]) for where, _ in self.protocol.models.values()):
            return
        absent = next((place for place, _ in self._places.values() if not Path(place).is_dir()), None)
        if absent:
            raise InputError(
                f"the protocol {self.protocol.name} judges by models in its own family's folder, and that of this base has no "
                f"{absent}; choose another --protocol, such as dreambooth"
            )

    @cached_property
    def reader(self) -> LabelReader:
        return LabelReader(*self._places["labels"], self._device)

    def judge(self, method: str, truth: Truth, results: Sequence[Result], known: Callable) -> Iterator[Row]:
        """Rows that are not yet `known` (by key) for these results, of the columns that can be had for this subject."""
        for metric in self.protocol.metrics:
            if not KINDS[metric.against].available(truth, results):
                continue
            if metric.masked and not (truth.finder and truth.masked):
                continue
            rows = [self._row(method, truth, result, metric) for result in results]
            missing = [i for i, row in enumerate(rows) if not known(row.key)]
            if missing:
                scores = self._scores(metric, truth, [results[i] for i in missing])
                for i, score in zip(missing, scores, strict=True):
                    yield replace(rows[i], score=score)

    def _row(self, method: str, truth: Truth, result: Result, metric: Metric) -> Row:
        """All of a row but its score."""
        model, read = self.models[metric.model], metric.against == "labels"
        return Row(
            method=method,
            subject=truth.subject,
            prompt=result.prompt,
            seed=result.seed,
            file=str(result.path),
            sha256=result.sha256,
            reference=self._reference(metric, truth),
            metric=metric.name,
            protocol=self.protocol.name,
            score=0.0,
            model=model.name,
            fingerprint=(self.reader if read else model).fingerprint,
            preprocessing=str(model.preprocessing),
        )

    def _reference(self, metric: Metric, truth: Truth) -> str:
        found = f"{truth.subject} found by {truth.finder.digest}" if truth.finder else ""
        real = f"{len(self._real(metric, truth))} pictures of {truth.subject} ({truth.digest})"
        return KINDS[metric.against].reference(truth, f"{real}, {found}" if metric.masked else real, found)

    def _real(self, metric: Metric, truth: Truth) -> Pictures:
        pictures = truth.masked if metric.masked else truth.real
        return pictures[:1] if self.protocol.references == "own" else pictures

    def _scores(self, metric: Metric, truth: Truth, results: Sequence[Result]) -> list[float]:
        pictures, model = [result.open() for result in results], self.models[metric.model]
        if metric.masked and truth.finder:
            pictures = [truth.finder.blackened(picture) for picture in pictures]

        def kept(real: Pictures) -> Tensor:
            key = (model.where, *map(id, real))
            if key not in self._kept:
                self._kept[key] = (model.images(real), real)  # the pictures are kept so that ids stay theirs
            return self._kept[key][0]

        real = self._real(metric, truth)
        shown = Shown(truth, results, pictures, real, model, kept, lambda: self.reader)
        return KINDS[metric.against].scores(shown)
