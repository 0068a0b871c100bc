"""Rows of scores on disk, and every mean derived from them. No models in here."""

from __future__ import annotations

import json
import random
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, pvariance

from pydantic import ConfigDict, TypeAdapter, ValidationError

from p3s_cli.atomic import append, replacing
from p3s_cli.evals.protocols import Protocol

_RESAMPLES = 2_000
_Scores = defaultdict[tuple[str, str], defaultdict[str, list[float]]]  # (method, metric) -> subject -> numbers


@dataclass(frozen=True)
class Row:
    """One image under one metric, and how the number was made."""

    __pydantic_config__ = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)  # for lines that are read

    method: str
    subject: str
    prompt: str
    seed: int
    file: str
    sha256: str
    reference: str
    metric: str
    protocol: str
    score: float
    model: str
    fingerprint: str
    preprocessing: str

    @property
    def key(self) -> tuple[str, ...]:
        """What the score is a function of; a row with this key need not be made again."""
        return (
            self.method,
            self.subject,
            self.prompt,
            str(self.seed),
            self.sha256,
            self.reference,
            self.metric,
            self.protocol,
            self.fingerprint,
            self.preprocessing,
        )


class Rows:
    """An append-only file of rows, and those that other files hold already.

    A line that a kill cut short, or that is no row, is passed over when it is read.
    """

    def __init__(self, path: Path, others: Iterable[Path] = ()):
        self.path = path
        text = _text(path)
        self._rows = _read(text)
        if text and not text.endswith("\n"):
            with replacing(path) as temporary:
                temporary.write_text(_lines(self._rows.values()), encoding="utf-8")
        self._own = set(self._rows)
        for other in others:
            self._rows |= _read(_text(other))

    def __iter__(self):
        return iter(self._rows.values())

    def __contains__(self, key: tuple[str, ...]) -> bool:
        return key in self._rows

    def add(self, rows: Iterable[Row]) -> None:
        """Raises P3SError if they cannot be written; the rows before them stay."""
        fresh = {row.key: row for row in rows if row.key not in self._rows}
        append(self.path, _lines(fresh.values()))
        self._rows |= fresh
        self._own |= fresh.keys()

    def gather(self) -> None:
        """Write what other files hold into this one as well. Raises P3SError as `add`."""
        append(self.path, _lines(row for key, row in self._rows.items() if key not in self._own))
        self._own = set(self._rows)


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def _read(text: str) -> dict[tuple[str, ...], Row]:
    return {row.key: row for row in filter(None, map(_parse, text.splitlines()))}


def _lines(rows: Iterable[Row]) -> str:
    return "".join(json.dumps(asdict(row), sort_keys=True) + "\n" for row in rows)


_ROW = TypeAdapter(Row)


def _parse(line: str) -> Row | None:
    try:
        return _ROW.validate_json(line)
    except ValidationError:
        return None


@dataclass(frozen=True)
class Mean:
    """A mean over subjects with its bootstrap 95 % interval, None where there is one subject only."""

    value: float
    low: float | None
    high: float | None
    subjects: int
    images: int

    def __str__(self) -> str:
        return f"{self.value:.3f}" if self.low is None else f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def table(rows: Iterable[Row], protocol: Protocol) -> dict[str, dict[str, Mean]]:
    """method -> column -> mean: each subject's images are averaged first, then the subjects."""
    scores: _Scores = defaultdict(lambda: defaultdict(list))
    for row in _of(rows, protocol):
        scores[row.method, row.metric][row.subject].append(row.score)
    found = _means(scores)
    for column, of in protocol.variances.items():
        for (method, metric), by_subject in scores.items():
            if metric == of:
                found[method][column] = summary(by_subject, pvariance)
    return found


def differences(rows: Iterable[Row], protocol: Protocol, one: str) -> dict[str, dict[str, Mean]]:
    """method -> column -> by how much method `one` scores above it, image by image of the same prompt and seed.

    What two methods find hard alike cancels, so these intervals are narrower than those of `table` apart. Where the
    subject stands in the picture is no score, and left out.
    """
    places = {metric.name for metric in protocol.metrics if metric.against in ("x", "y")}
    rows = [row for row in _of(rows, protocol) if row.metric not in places]
    own = {_image(row): row.score for row in rows if row.method == one}
    gaps: _Scores = defaultdict(lambda: defaultdict(list))
    for row in rows:
        if row.method != one and _image(row) in own:
            gaps[row.method, row.metric][row.subject].append(own[_image(row)] - row.score)
    return _means(gaps)


def _of(rows: Iterable[Row], protocol: Protocol) -> list[Row]:
    return [row for row in rows if row.protocol == protocol.name]


def _image(row: Row) -> tuple[str, str, str, int]:
    return row.metric, row.subject, row.prompt, row.seed


def _means(scores: _Scores) -> dict[str, dict[str, Mean]]:
    found: dict[str, dict[str, Mean]] = defaultdict(dict)
    for (method, metric), by_subject in scores.items():
        found[method][metric] = summary(by_subject, fmean)
    return dict(found)


def summary(by_subject: Mapping[str, Sequence[float]], statistic) -> Mean:
    """The mean of a statistic over subjects, its interval by resampling subjects (percentile bootstrap, seed 0)."""
    values = [statistic(scores) for scores in by_subject.values()]
    images = sum(len(scores) for scores in by_subject.values())
    if len(values) < 2:
        return Mean(values[0], None, None, 1, images)
    rng = random.Random(0)
    means = sorted(fmean(rng.choices(values, k=len(values))) for _ in range(_RESAMPLES))
    low, high = means[round(0.025 * _RESAMPLES)], means[round(0.975 * _RESAMPLES) - 1]
    return Mean(fmean(values), low, high, len(values), images)
