"""`p3s eval` as library functions: whom to compare on what, and the page that comes of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from p3s_cli import methods, stages
from p3s_cli.atomic import sha256
from p3s_cli.benches import shards, world
from p3s_cli.benches.cases import Case, Prompt, check_photos, first_finder, subject_case
from p3s_cli.benches.ending import PLOT, EvalResult, finish
from p3s_cli.benches.entries import ablations, choose, rivals
from p3s_cli.benches.run import Plan, Run
from p3s_cli.errors import InputError
from p3s_cli.evals import dreambench, plot, protocols
from p3s_cli.evals.scoring import Judge
from p3s_cli.evals.truth import Result, Truth
from p3s_cli.lock import writing
from p3s_cli.sd import images
from p3s_cli.sd.family import Family, load
from p3s_cli.sd.profile import located
from p3s_cli.stages.progress import silent
from p3s_cli.subject import Subject

_WORLD_CASES, _QUICK_CASES = 12, 3
_WORLD_WORK, _DREAMBENCH_WORK = "p3s-bench-world", "p3s-bench-dreambench"


def evaluate(
    target: Path | None = None,
    bench: str | None = None,
    names: Sequence[str] | None = None,
    ablate: bool = False,
    only: Sequence[str] | None = None,
    budgets: Sequence[str] | None = None,
    quick: bool = False,
    strengths: Sequence[float] | None = None,
    protocol: str | None = None,
    prompts: Sequence[str] | None = None,
    subjects: Sequence[str] | None = None,
    shard: str | None = None,
    points: Path | None = None,
    check: bool = False,
    output: Path | None = None,
    model: str | None = None,
    fast: bool = False,
    on_progress: stages.Progress | None = None,
    **common: Any,
) -> EvalResult:
    """One of the evaluations below, as the command line names them. Raises InputError for what does not fit together."""
    _refuse(bench, "world", {"--ablate": ablate, "--only": only, "--budget": budgets})
    _refuse(bench, "world", {"--quick": quick, "--strength": strengths})
    _refuse(bench, "dreambench", {"--subject": subjects, "--points": points, "--self-check": check})
    _refuse(bench, None, {"--prompt": prompts})
    for unheeded, sentence in (
        (shard and not bench, "--shard is a part of a benchmark; leave it out here"),
        (output and not bench, "a subject is scored in its own directory; leave out --output"),
        (output and bench == "world" and target, "--bench world got two folders to work in; leave out --output"),
        (protocol and bench == "world", "--bench world is scored by the family's own protocol; leave out --protocol"),
        (only and not ablate, "--only names rows of --ablate; add that, or choose methods with --method"),
        (ablate and (names or budgets), "--ablate compares P3S with itself; leave out --method and --budget"),
        (
            check and (names or subjects or shard or points or fast),
            "--self-check scores every subject's real photos; leave out --method, --subject, --shard, --points and --fast",
        ),
        (
            check and (common.get("n") or common.get("seed") or common.get("dtype", "auto") != "auto"),
            "--self-check draws nothing, and its readers are in float32; leave out -n, --seed and --dtype",
        ),
    ):
        if unheeded:
            raise InputError(sentence)
    if protocol:
        protocols.protocol(protocol)
    names = methods.NAMES if names and "all" in names else tuple(names or ("p3s",))
    common |= {"fast": fast, "on_progress": on_progress}
    if bench is None:
        if target is None:
            raise InputError("name a subject directory, or a benchmark with --bench world or --bench dreambench PATH")
        return evaluate_subject(target, names, prompts or (), protocol, model=model, **common)
    if bench == "world":
        choice = dict(
            names=only if ablate else names, ablate=ablate, quick=quick, strengths=strengths or (), shard=shard
        )
        choice |= dict(budgets=budgets or ("published",), model=model or "world")
        return evaluate_world(target or output or _WORLD_WORK, **choice, **common)
    if bench != "dreambench":
        raise InputError(f"no benchmark is called {bench!r}; choose world or dreambench")
    if target is None:
        raise InputError("name the DreamBench folder: p3s eval --bench dreambench PATH")
    where = dict(work=output or _DREAMBENCH_WORK, model=model or "sd15", protocol_name=protocol or "dreambooth")
    if check:
        return self_check(target, device=common.get("device", "auto"), on_progress=on_progress, **where)
    return evaluate_dreambench(target, names=names, subjects=subjects, shard=shard, points=points, **where, **common)


def _refuse(bench: str | None, only_for: str | None, options: dict[str, Any]) -> None:
    """Raises InputError for an option that this evaluation would not heed."""
    given = next((name for name, value in options.items() if value), None)
    if given and bench != only_for:
        raise InputError(
            f"{given} belongs to {f'--bench {only_for}' if only_for else 'one subject'}; leave it out here"
        )


def evaluate_subject(
    directory: Path | str,
    names: Sequence[str] = (),
    prompts: Sequence[str] = (),
    protocol_name: str | None = None,
    n: int | None = None,
    fast: bool = False,
    seed: int = 0,
    model: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    family: Family | None = None,
    on_progress: stages.Progress | None = None,
) -> EvalResult:
    """Draw what is missing of one's own subject, score it, and write `eval/` in its directory.

    Raises InputError for a directory without whole masks, and for unknown names.
    """
    root = Path(directory)
    manifest = Subject.open(root).manifest
    tuned = manifest.finetune.settings if manifest.finetune else {}
    base = located(model or tuned.get("base") or manifest.model)
    vision = tuned.get("vision") if base == tuned.get("base") else None  # another base has its own
    family = family or load(base, device, dtype, vision)
    entries = rivals(names or ("p3s",), methods.NAMES, ("published",))
    judge = Judge(protocols.protocol(protocol_name or family.profile.protocol), family.folder, family.device)
    with writing(root, "p3s eval"):
        case = subject_case(root, family.vision, prompts or family.profile.prompts)
        run = Run(root / "eval", family, judge, plan(n, seed, fast), on_progress or silent)
        return finish(run, entries, run.evaluate(entries, [case]), f"p3s eval {root.resolve().name}", [case])


def evaluate_world(
    work: Path | str = _WORLD_WORK,
    names: Sequence[str] | None = None,
    ablate: bool = False,
    budgets: Sequence[str] = ("published",),
    quick: bool = False,
    strengths: Sequence[float] = (),
    shard: str | None = None,
    n: int | None = None,
    fast: bool = False,
    seed: int = 0,
    model: str = "world",
    device: str = "auto",
    dtype: str = "auto",
    on_progress: stages.Progress | None = None,
) -> EvalResult:
    """Held-out look-alikes of the drawn world, judged by its readers; with `ablate`, the paper's ablations.

    Two calibration lines stand beside the methods: true pictures of the chosen subject, and of its look-alike.
    `n` images of each prompt, 4 or with `quick` 2; `fast` as in `generate`, for every method; `shard` i/n takes every n-th scene (`shards.py`). `strengths` beside 1 become points of each method's curve in `trade-off.png`.
    """
    for strength in strengths:
        if not 0 <= strength < math.inf:
            raise InputError(f"{strength} is no strength; give --strength as a number that is 0 or more")
    root, family = Path(work), load(model, device, dtype)
    judge = Judge(protocols.protocol(family.profile.protocol), family.folder, family.device)
    if ablate:
        rows = ablations(family.profile)
        entries = choose(rows, names, lambda e: e.name)
    else:
        entries = rivals(names or ("p3s",), methods.NAMES, budgets)
    entries += [e.at_strength(s) for e in entries if e.method != "untuned" for s in strengths]
    numbers = shards.pick(range(_QUICK_CASES if quick else _WORLD_CASES), shard)
    with shards.at_work(root, shard, "p3s eval"):
        run = Run(root, family, judge, plan(n, seed, fast, quick), on_progress or silent, shard)
        made = world.cases(root / "cases", family, numbers, seed, quick)
        for number, case in zip(numbers, made, strict=True):
            for line, results in world.calibration(case, number, seed, root / "calibration").items():
                run.score(line, case, results)
        outcome = run.evaluate(entries, made)
        curves = {e.name: (e.label, e.strength) for e in entries}
        plot.trade_off(run.desk / PLOT, outcome.means, run.judge.protocol, curves, world.CALIBRATION)
        return finish(run, entries, outcome, "p3s eval --bench world", made)


def evaluate_dreambench(
    path: Path | str,
    work: Path | str = _DREAMBENCH_WORK,
    names: Sequence[str] = (),
    subjects: Sequence[str] | None = None,
    shard: str | None = None,
    points: Path | None = None,
    protocol_name: str = "dreambooth",
    n: int | None = None,
    fast: bool = False,
    seed: int = 0,
    model: str = "sd15",
    device: str = "auto",
    dtype: str = "auto",
    on_progress: stages.Progress | None = None,
) -> EvalResult:
    """DreamBench as published: the first photo of each subject is the reference, all of them are the truth.

    `points` is a JSON file of clicks by subject; without it each first photo is clicked in the middle.
    """
    sitters = dreambench.read(Path(path), subjects)
    sitters = shards.pick(sitters, shard)
    clicks = _clicks(points, sitters)
    entries = rivals(names or ("p3s",), methods.NAMES, ("published",))
    root, family = Path(work), load(model, device, dtype)
    judge = Judge(protocols.protocol(protocol_name), family.folder, family.device)
    with shards.at_work(root, shard, "p3s eval"):
        run = Run(root, family, judge, plan(n, seed, fast), on_progress or silent, shard)
        made = [_sitting(root / "cases", sitter, at, family) for sitter, at in zip(sitters, clicks, strict=True)]
        return finish(run, entries, run.evaluate(entries, made), "p3s eval --bench dreambench", made)


def plan(n: int | None = None, seed: int = 0, fast: bool = False, quick: bool = False) -> Plan:
    """How every method alike is drawn: `n` images of each prompt, where none is given as many as usual."""
    how = Plan(images=2, sampling={"steps": 20}) if quick else Plan()
    return Plan(n or how.images, seed, how.sampled({"fast": True} if fast else {}))


def _sitting(folder: Path, sitter: dreambench.Sitter, at: stages.PhotoClicks, family: Family) -> Case:
    """A sitter's first photo masked, and all its photos as the truth. Raises InputError if another one was masked there."""
    directory, first = folder / sitter.name, sitter.photos[0]
    # a former p3s threw the photo's colour profile away, and `mask` knows it by either
    both = [images.load_image(first), images.load_image(first, managed=False)]
    check_photos(directory, both, f"another photo than {first}")
    stages.mask(first, at.positive, at.negative, directory, sitter.class_word, at.box, family=family)
    photos = tuple(images.load_image(p) for p in sitter.photos)
    finder = first_finder(directory, family.vision)
    truth = Truth(sitter.name, photos, masked=tuple(map(finder.blackened, photos)), finder=finder)
    return Case(directory, tuple(map(Prompt, sitter.prompts)), truth)


def _clicks(points: Path | None, sitters: Sequence[dreambench.Sitter]) -> list[stages.PhotoClicks]:
    if points is None:
        return [stages.PhotoClicks(positive=["0.5,0.5"])] * len(sitters)
    return stages.read_clicks(points, [Path(sitter.name) for sitter in sitters])


def self_check(
    path: Path | str,
    work: Path | str = _DREAMBENCH_WORK,
    protocol_name: str = "dreambooth",
    model: str = "sd15",
    device: str = "auto",
    on_progress: stages.Progress | None = None,
) -> EvalResult:
    """Real photos against the other real photos of each subject: what a perfect generator would score.

    For DreamBench under `dreambooth`, published tables have about 0.774 (DINO) and 0.885 (CLIP-I).
    Raises InputError for a subject of one photo.
    """
    sitters, chosen = dreambench.read(Path(path)), protocols.protocol(protocol_name)
    if alone := next((s for s in sitters if len(s.photos) == 1), None):
        raise InputError(
            f"{alone.photos[0]} is the one photo of {alone.name}, with no other to compare it with; add one, or take its line out of the index"
        )
    family = load(model, device)
    with shards.at_work(Path(work), None, "p3s eval"):
        run = Run(Path(work), family, Judge(chosen, family.folder, family.device), Plan(), on_progress or silent)
        for k, sitter in enumerate(sitters):
            run.report(f"real photos: {sitter.name}", k, len(sitters))
            photos = [images.load_image(p) for p in sitter.photos]
            for i, file in enumerate(sitter.photos):
                others = tuple(photo for j, photo in enumerate(photos) if j != i)
                case = Case(file, (), Truth(sitter.name, others))
                run.score("real photos", case, [Result(file, sha256(file), f"a {sitter.class_word}", i)])
        return finish(run, (), run.outcome(()), "real photos against real photos")
