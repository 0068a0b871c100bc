"""The end of an evaluation: the table, the page and the numbers, and the sentences that say what they mean."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from p3s_cli import methods
from p3s_cli.atomic import replacing
from p3s_cli.benches.cases import Case
from p3s_cli.benches.entries import Entry
from p3s_cli.benches.run import Outcome, Run
from p3s_cli.evals import report
from p3s_cli.evals.scores import Mean, differences

PLOT = "trade-off.png"
BASE = "p3s"  # whom all others are compared with


@dataclass(frozen=True)
class EvalResult:
    """`methods`: name -> column -> mean, and `seconds` (tuning a subject) and `seconds_per_image`.

    `intervals`: name -> column -> bootstrap 95 % interval over subjects, where there are several. `differences`:
    the same for what P3S scores above each other method, image by image, with the mean first.
    """

    protocol: str
    methods: dict[str, dict[str, float | None]]
    intervals: dict[str, dict[str, tuple[float, float]]]
    differences: dict[str, dict[str, tuple[float, float | None, float | None]]]
    table: tuple[str, ...]
    scores: Path
    report: Path


def finish(run: Run, entries: Sequence[Entry], outcome: Outcome, title: str, cases: Sequence[Case] = ()) -> EvalResult:
    """The table, the page and the numbers; a whole run's file then has the rows of its shards as well."""
    if run.whole:
        run.rows.gather()
    how, notes = run.judge.protocol, [*_given(entries), *_budgets(outcome)]
    page, drawn = run.desk / "report.html", run.desk / PLOT
    asked = {case.name: case.subject / "references/00/overlay.png" for case in cases}
    drew = {entry.name for entry in entries}  # and no calibration line
    gaps = differences([row for row in run.judged if row.method in drew], how, BASE)
    less = (BASE, gaps) if gaps else None
    extras = report.Extras(outcome.seconds, notes, drawn if drawn.is_file() else None, asked, less)
    with replacing(page) as temporary:
        temporary.write_text(report.html(run.judged, outcome.means, how, title, extras), encoding="utf-8")
    lines = [*report.lines(outcome.means, how, outcome.seconds), "", *notes]
    lines += ["", *report.lines(gaps, how, head=f"{BASE} less")] if gaps else []
    return EvalResult(how.name, *numbers(outcome, gaps), tuple(lines), run.rows.path, page)


def numbers(outcome: Outcome, gaps: Mapping[str, Mapping[str, Mean]]) -> tuple[dict, dict, dict]:
    """`methods`, `intervals` and `differences` of an `EvalResult`."""
    methods, intervals = {}, {}
    for method, row in outcome.means.items():
        tuning, image = outcome.seconds.get(method, (None, None))
        methods[method] = {c: mean.value for c, mean in row.items()} | {"seconds": tuning, "seconds_per_image": image}
        intervals[method] = {c: (mean.low, mean.high) for c, mean in row.items() if mean.low is not None}
    apart = {m: {c: (mean.value, mean.low, mean.high) for c, mean in row.items()} for m, row in gaps.items()}
    return methods, intervals, apart


def _given(entries: Sequence[Entry]) -> list[str]:
    """What each method sees of a reference, in words under the table."""
    seen = {entry.method: methods.get(entry.method).given for entry in entries}
    return [f"{method} was given the reference's {what}" for method, what in seen.items() if what != "nothing"]


def _budgets(outcome: Outcome) -> list[str]:
    """What equal time means, in words under the table."""
    if outcome.budget is None:
        return []
    found = [
        f"{name}: {steps} steps of tuning, as many as fit (setup included) into the {outcome.budget:.1f} s that p3s's tuning took here"
        for name, steps in outcome.equal_steps.items()
    ]
    return [*found, "all other rows are tuned by their published recipe, or by the one the family recommends"]
