"""Cases x entries: tune what is not tuned, draw what is not drawn, score what is not scored.

    <work>/<tuning>/<case>/   the case's subject, tuned by an entry, with its images
    <work>/measured.json      what each tuning and each image took when it was made, and steps that fit into a time
    <work>/scores.jsonl       one row per image and metric; a shard's are in a folder of its own (`shards.py`)

Everything is found again by what it was made from, so an interrupted run goes on where it stopped.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from p3s_cli import stages
from p3s_cli.atomic import sha256
from p3s_cli.benches import shards
from p3s_cli.benches.cases import Case
from p3s_cli.benches.entries import Entry
from p3s_cli.benches.ledger import Ledger
from p3s_cli.errors import InputError
from p3s_cli.evals.protocols import Protocol
from p3s_cli.evals.report import Seconds
from p3s_cli.evals.scores import Mean, Row, Rows, table
from p3s_cli.evals.scoring import Judge
from p3s_cli.evals.truth import Result
from p3s_cli.lock import writing
from p3s_cli.methods import pace
from p3s_cli.methods.base import seen_alike
from p3s_cli.sd.family import Family
from p3s_cli.subject import CONTROL, Subject, digest

_SAME_BUDGET = 0.1  # steps are counted anew for a budget that differs by more; P3S's mean moves with every case


@dataclass(frozen=True)
class Plan:
    """How many images of each prompt, from which seed on, and how they are sampled (arguments of `generate`)."""

    images: int = 4
    seed: int = 0
    sampling: dict | None = None

    def sampled(self, entry: Mapping[str, Any]) -> dict[str, Any]:
        """How an entry with such sampling of its own is drawn; `fast` has steps of its own, too."""
        own = dict(self.sampling or {})
        if entry.get("fast"):
            own.pop("steps", None)
        return own | dict(entry)

    @property
    def pace(self) -> str:
        """How everyone is sampled, in a word; none where it is as usual."""
        return f"-{digest(self.sampling)[:8]}" if self.sampling else ""


@dataclass(frozen=True)
class Outcome:
    """`means`: method -> column -> mean. `seconds`: method -> (tuning a subject, one image).

    `budget`: seconds of P3S's tuning, for the methods at equal time; `equal_steps`: those, and the steps that fit.
    """

    means: dict[str, dict[str, Mean]]
    seconds: dict[str, Seconds]
    budget: float | None = None
    equal_steps: dict[str, int] = field(default_factory=dict)


def gather(
    rows: Iterable[Row], entries: Sequence[Entry], ledger: Ledger, protocol: Protocol, pace: str = ""
) -> Outcome:
    """What these rows say of these entries, with the times beside it: an image's at this `Plan.pace`."""
    seconds = {e.name: (ledger.mean(f"tune/{e.tuning}"), ledger.mean(f"image/{e.drawing}{pace}")) for e in entries}
    steps = {e.name: ledger.mean(f"steps/{e.tuning}") for e in entries if e.budget == "equal" and e.name == e.label}
    equal = {name: int(n) for name, n in steps.items() if n is not None}
    return Outcome(table(rows, protocol), seconds, budget_of(ledger) if equal else None, equal)


def budget_of(ledger: Ledger, own: bool = False) -> float | None:
    """Equal time: what P3S's own tuning took, in seconds; with `own`, on this desk."""
    return ledger.mean(f"tune/{Entry('p3s').tuning}", own)


class Run:
    """One folder of work on one family. What it alone writes is on its `desk`; it knows what is on all the others."""

    def __init__(
        self,
        work: Path,
        family: Family,
        judge: Judge,
        plan: Plan,
        report: stages.Progress,
        shard: str | None = None,
    ):
        self.work, self.family, self.judge, self.plan, self.report = work, family, judge, plan, report
        self.desk, self.whole = shards.desk(work, shard), shard is None
        others = [desk for desk in shards.desks(work) if desk != self.desk]
        self.rows = Rows(self.desk / "scores.jsonl", [desk / "scores.jsonl" for desk in others])
        self._ledger = Ledger(self.desk / "measured.json", [desk / "measured.json" for desk in others])
        self._judged: set[tuple[str, ...]] = set()
        self._files: dict[tuple[str, str, str, int, str], str] = {}  # by `_picture`: where it lies today
        judge.load()  # before hours of drawing, not after
        _ = stages.finetune, stages.generate  # imported now, for what is timed is no import

    def evaluate(self, entries: Sequence[Entry], cases: Sequence[Case]) -> Outcome:
        """Every entry on every case. Raises what the stages raise; what was made until then is kept."""
        for number, entry in enumerate(entries):
            for case in cases:
                self.report(f"{entry.name}: {case.name}", number * len(cases), len(entries) * len(cases))
                self.score(entry.name, case, self._results(entry, case))
        return self.outcome(entries)

    def score(self, method: str, case: Case, results: Sequence[Result]) -> None:
        """Rows for these pictures, which an entry made, or none: a calibration line."""

        def known(key: tuple[str, ...]) -> bool:
            self._judged.add(key)
            return key in self.rows

        for r in results:
            self._files[method, case.name, r.prompt, r.seed, r.sha256] = str(r.path)
        self.rows.add(self.judge.judge(method, case.truth, results, known))

    @property
    def judged(self) -> list[Row]:
        """The rows of what took part in this run; the file also keeps those of earlier points, settings and subsets.

        Each names its picture by today's path, wherever the row was made.
        """
        return [replace(row, file=self._files[_picture(row)]) for row in self.rows if row.key in self._judged]

    def outcome(self, entries: Sequence[Entry]) -> Outcome:
        return gather(self.judged, entries, self._ledger, self.judge.protocol, self.plan.pace)

    def _results(self, entry: Entry, case: Case) -> list[Result]:
        subject = self._tuned(entry, case)
        results = []
        for prompt in case.prompts:
            before, started = set((subject / "outputs").glob("*.png")), time.monotonic()
            made = stages.generate(
                subject,
                prompt.text,
                n=self.plan.images,
                seed=self.plan.seed,
                family=self.family,
                safety_checker=False,  # what it blackens by mistake would be scored
                **self.plan.sampled(entry.sampling),
            )
            if drawn := len(set(made.images) - before):  # after a kill, fewer than were asked for
                seconds = (time.monotonic() - started) / drawn
                self._ledger.add(f"image/{entry.drawing}{self.plan.pace}", f"{case.name}: {prompt.text}", seconds)
            results += [
                Result(path, sha256(path), prompt.plain, seed, prompt.labels)
                for path, seed in zip(made.images, made.seeds, strict=True)
            ]
        return results

    def _tuned(self, entry: Entry, case: Case) -> Path:
        directory, source = self.work / entry.tuning / case.name, case.shown(entry.references)
        _copy_masked(source, directory)
        if entry.plain and _copy_control(source, directory, entry.method, self.family):
            self._ledger.drop(f"tune/{entry.tuning}", case.name)  # of a tuning that is not the owner's
            return directory
        steps = entry.steps or self._equal_steps(entry, case, directory)
        _ = self.family.unet, self.family.vae, self.family.text_encoder, self.family.vision  # loading is no tuning
        watch = _Watch()
        made = stages.finetune(
            directory,
            steps=steps,
            method=entry.method,
            control=entry.control,
            seed=self.plan.seed,
            captured=False,  # or equal time would be that of recorded steps against steps that are not
            family=self.family,
            on_progress=watch,
        )
        if not made.unchanged and (seconds := watch.seconds()):
            self._ledger.add(f"tune/{entry.tuning}", case.name, seconds)
        return directory

    def _equal_steps(self, entry: Entry, case: Case, directory: Path) -> int | None:
        """Steps that take this method as long as P3S took on average, its setup included; None for the published recipe.

        A desk's budget is its own mean, which nobody else moves; so what another counted for this case stays as well.
        """
        if entry.budget == "published":
            return None
        kind, of = f"steps/{entry.tuning}", f"budget/{entry.tuning}"
        if (settled := self._ledger.elsewhere(kind, case.name)) is not None:
            return int(settled)
        budget = budget_of(self._ledger, own=True) or budget_of(self._ledger)
        if budget is None:
            raise InputError(
                "equal time is P3S's own, which this run has not measured; let p3s take part, first, and where it has "
                f"tuned already, remove its folders ({self.work}/p3s-*), so that it is timed anew"
            )
        known = self._ledger.of(kind, case.name) or self._ledger.mean(kind)
        then = self._ledger.of(of, case.name) or self._ledger.mean(of) or budget
        if known is None or abs(then / budget - 1) > _SAME_BUDGET:
            known, then = pace.measure(entry.method, self.family, Subject.open(directory)).steps(budget), budget
        for what, value in ((kind, int(known)), (of, then)):  # each case's own, for shards measure apart
            self._ledger.add(what, case.name, value)
        return int(known)


def _picture(row: Row) -> tuple[str, str, str, int, str]:
    """Which picture a row is about."""
    return row.method, row.subject, row.prompt, row.seed, row.sha256


def _copy_masked(source: Path, target: Path) -> None:
    """The references and their masks, without what was tuned on them; not again while they are the same.

    How sure the guess of the class word was changes nothing that is made of them.
    """
    none = {"finetune": None, "generated": [], "class_score": None}
    wanted = Subject.open(source).manifest.model_copy(update=none)
    if Subject.exists(target) and Subject.open(target).manifest.model_copy(update=none) == wanted:
        return
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source / "references", target / "references")
    bare = Subject(target, wanted)
    with bare.changing():  # the references are in place; only the manifest is new
        pass


def _copy_control(source: Path, target: Path, method: str, family: Family) -> bool:
    """What the subject's owner tuned by this method on this family, if anything, is what is judged.

    Raises InputError if it is damaged, or older than the masks.
    """
    owned = Subject.open(source)
    stage = owned.manifest.finetune
    here = {"base_fingerprint": family.fingerprint, "vision": family.profile.clip}
    if stage is None or owned.method != method or not here.items() <= stage.settings.items():
        return False
    if not seen_alike(owned, family):
        return False
    owned.check_control(here["base_fingerprint"])
    with writing(target, "p3s eval"):  # which first ends what a killed run had begun
        subject = Subject.open(target)
        if subject.manifest.finetune != stage or not subject.intact(stage, CONTROL):
            subject.manifest.finetune = stage
            with subject.changing() as folder:
                (folder / CONTROL).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(owned.path(CONTROL), folder / CONTROL)
    return True


class _Watch:
    """Times one tuning by its progress. One that goes on from a checkpoint counts as if all its steps had been seen."""

    def __init__(self):
        self._started, self._first = time.monotonic(), None

    def __call__(self, what: str, done: int, total: int) -> None:
        if what.startswith("tuning"):
            now = (time.monotonic(), done)
            if self._first is None or done > self._last[1] + 1:  # steps at once come from a checkpoint
                self._first = now
            self._last = now

    def seconds(self) -> float | None:
        """None if too few steps were left to tell."""
        whole = time.monotonic() - self._started
        if self._first is None or self._first[1] <= 1:  # nothing to train, or from the first step on
            return whole
        (since, first), (until, last) = self._first, self._last
        return whole + first * (until - since) / (last - first) if last > first else None
