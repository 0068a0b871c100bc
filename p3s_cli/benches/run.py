"""Cases x entries: tune what is not tuned, draw what is not drawn, score what is not scored.

    <work>/<tuning>/<case>/   the case's subject, tuned by an entry, with its images
    <work>/seconds.json       what each tuning and each image took when it was made
    <work>/scores.jsonl       one row per image and metric

Everything is found again by what it was made from, so an interrupted run goes on where it stopped.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from p3s_cli import stages
from p3s_cli.atomic import replacing, sha256
from p3s_cli.benches.cases import Case
from p3s_cli.benches.entries import Entry
from p3s_cli.errors import InputError
from p3s_cli.evals.scores import Mean, Rows, table
from p3s_cli.evals.scoring import Judge, Result
from p3s_cli.methods import pace
from p3s_cli.sd.family import Family
from p3s_cli.subject import Subject


@dataclass(frozen=True)
class Plan:
    """How many images of each prompt, from which seed on, and how they are sampled (arguments of `generate`)."""

    images: int = 4
    seed: int = 0
    sampling: dict | None = None


@dataclass(frozen=True)
class Outcome:
    """`means`: method -> column -> mean. `seconds`: method -> (tuning a subject, one image)."""

    means: dict[str, dict[str, Mean]]
    seconds: dict[str, tuple[float | None, float | None]]


class Run:
    """One folder of work on one family."""

    def __init__(self, work: Path, family: Family, judge: Judge, plan: Plan, report: stages.Progress):
        self.work, self.family, self.judge, self.plan, self.report = work, family, judge, plan, report
        self.rows = Rows(work / "scores.jsonl")
        self._ledger = _Ledger(work / "measured.json")

    def evaluate(self, entries: Sequence[Entry], cases: Sequence[Case]) -> Outcome:
        """Every entry on every case. Raises what the stages raise; what was made until then is kept."""
        for number, entry in enumerate(entries):
            for case in cases:
                self.report(f"{entry.name}: {case.name}", number * len(cases), len(entries) * len(cases))
                results = self._results(entry, case)
                self.rows.add(self.judge.judge(entry.name, case.truth, results, self.rows.__contains__))
        return self.outcome(entries)

    def score(self, method: str, case: Case, results: Sequence[Result]) -> None:
        """Rows for pictures that no entry made: a calibration line."""
        self.rows.add(self.judge.judge(method, case.truth, results, self.rows.__contains__))

    def outcome(self, entries: Sequence[Entry]) -> Outcome:
        seconds = {
            e.name: (self._ledger.mean(f"tune/{e.tuning}"), self._ledger.mean(f"image/{e.tuning}")) for e in entries
        }
        return Outcome(table(self.rows, self.judge.protocol), seconds)

    def _results(self, entry: Entry, case: Case) -> list[Result]:
        subject = self._tuned(entry, case)
        results = []
        for prompt in case.prompts:
            started = time.monotonic()
            made = stages.generate(
                subject,
                prompt.text,
                n=self.plan.images,
                seed=self.plan.seed,
                family=self.family,
                **(self.plan.sampling or {}) | dict(entry.sampling),
            )
            if not made.unchanged:
                self._ledger.add(f"image/{entry.tuning}", prompt.text, (time.monotonic() - started) / self.plan.images)
            results += [
                Result(path, sha256(path), prompt.plain, seed, prompt.labels)
                for path, seed in zip(made.images, made.seeds, strict=True)
            ]
        return results

    def _tuned(self, entry: Entry, case: Case) -> Path:
        directory = self.work / entry.tuning / case.name
        _copy_masked(case.shown(entry.references), directory)
        started = time.monotonic()
        made = stages.finetune(
            directory,
            steps=entry.steps or self._equal_steps(entry, directory),
            method=entry.method,
            control=entry.control,
            family=self.family,
        )
        if not made.unchanged:
            self._ledger.add(f"tune/{entry.tuning}", case.name, time.monotonic() - started)
        return directory

    def _equal_steps(self, entry: Entry, directory: Path) -> int | None:
        """Steps that take this method as long as P3S took; None for the published recipe."""
        if entry.budget == "published":
            return None
        budget = self._ledger.mean(f"tune/{Entry('p3s').tuning}")
        if budget is None:
            raise InputError("equal time is P3S's own, which this run has not measured; let p3s take part, first")
        known = self._ledger.mean(f"steps/{entry.tuning}")
        if known is None:
            known = pace.measure(entry.method, self.family, Subject.open(directory)).steps(budget)
            self._ledger.add(f"steps/{entry.tuning}", "measured", known)
        return int(known)


def _copy_masked(source: Path, target: Path) -> None:
    """The references and their masks, without whatever was tuned on them; not again while they are the same."""
    wanted = Subject.open(source).manifest
    if Subject.exists(target) and Subject.open(target).manifest.references == wanted.references:
        return
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source / "references", target / "references")
    bare = Subject(target, wanted.model_copy(update={"finetune": None, "generated": []}))
    with bare.changing():  # the references are in place; only the manifest is new
        pass


class _Ledger:
    """Measured numbers (seconds, and the steps that fit into them) by kind and name, kept in a file, since a run that goes on did not see the first part."""

    def __init__(self, path: Path):
        self.path = path
        self._numbers = json.loads(path.read_text()) if path.is_file() else {}

    def add(self, kind: str, name: str, seconds: float) -> None:
        self._numbers.setdefault(kind, {})[name] = round(seconds, 3)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(self.path) as temporary:
            temporary.write_text(json.dumps(self._numbers, indent=1))

    def mean(self, kind: str) -> float | None:
        values = self._numbers.get(kind, {}).values()
        return sum(values) / len(values) if values else None
