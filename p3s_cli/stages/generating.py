"""Stage three: images of the tuned subject, wherever the prompt puts it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from p3s_cli import config as settings
from p3s_cli import methods
from p3s_cli.errors import InputError
from p3s_cli.lock import one_writer
from p3s_cli.methods.base import check_made_for
from p3s_cli.methods.memory import choose, within
from p3s_cli.methods.sampling import settled, usual_reuse
from p3s_cli.sd import images, sample, text
from p3s_cli.sd.determinism import exact
from p3s_cli.sd.family import Family, load
from p3s_cli.stages.composition import Composition, parse_size
from p3s_cli.stages.drawing import Order, draw, parameters
from p3s_cli.stages.output import Output
from p3s_cli.stages.progress import Progress, silent
from p3s_cli.subject import CONTROL, Subject

_MOST = 1_000  # images of one call, which share a grid


@dataclass(frozen=True)
class GenerateResult:
    """`safety` has one word for each image: passed, flagged (and black), no checker, or off."""

    subject: Path
    prompt: str
    seeds: tuple[int, ...]
    images: tuple[Path, ...]
    grid: Path
    warnings: tuple[str, ...]
    safety: tuple[str, ...]
    unchanged: bool


@one_writer
def generate(
    subject_dir: Path | str,
    prompt: str,
    n: int = 4,
    seed: int = 0,
    steps: int | None = None,
    guidance: float | None = None,
    subject_guidance: float | None = None,
    scheduler: str | None = None,
    schedule: str | None = None,
    strength: float = 1.0,
    negative_prompt: str = "",
    also: Sequence[str] | None = None,
    control: Sequence[str] | None = None,
    lora: Sequence[str] | None = None,
    references: int = 1,
    size: str | None = None,
    safety_checker: bool = True,
    metadata: bool = True,
    fast: bool = False,
    reuse: int | None = None,
    compiled: bool = False,
    memory: str = "auto",
    model: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    force: bool = False,
    deterministic: bool = False,
    family: Family | None = None,
    on_progress: Progress | None = None,
) -> GenerateResult:
    """Images of the tuned subject for a prompt with [V] in it; image k has seed `seed + k`, whatever n is.

    `guidance` is the text's strength, `subject_guidance` the subject's. `also` names further subjects
    (`cat=0.8`; the prompt then says [V1], [V2], ...), `control` ControlNets (`canny=edges.png=0.7`), `lora`
    LoRAs (`style.safetensors=0.6`), `size` is `WIDTHxHEIGHT`, `references` how many of each subject's
    references are shown to it. They are made by the method the subject was tuned with; `schedule`, `also`,
    `control`, `lora` and `references` are P3S's alone. The copy, and the guidance pass without the subject,
    run at every `reuse`-th step only; 1 runs them at every step. `compiled` (P3S's) costs minutes once a
    process and is for GPUs. Steps, scheduler and `reuse` default to
    `config.PACES`, with `fast` to the quicker one; `schedule` and both strengths to the
    family's; a subject tuned by the preset `paper` has the copy run at every step, s_i = 1 and the quadratic schedule, where
    nothing else is asked for. `metadata` puts the settings into each PNG. Raises
    InputError before the subject is tuned, after it has changed, for a prompt without [V], and for unknown names.
    """
    report = on_progress or silent
    if not 1 <= n <= _MOST:
        raise InputError(f"give from 1 to {_MOST} images with -n, and more by another call with --seed; not {n}")
    subject = Subject.open(Path(subject_dir))
    joined = Composition.read(also, control, lora, held=subject.root)
    subjects = [subject, *(s for s, _ in joined.also)]
    identifiers = [s.manifest.identifier for s in subjects]
    words = text.identify(prompt, *identifiers)
    asked = dict(guidance=guidance, subject_guidance=subject_guidance, strength=strength, references=references)
    asked |= dict(negative_prompt=negative_prompt, size=parse_size(size), compiled=compiled)
    asked |= dict(captured=not deterministic)  # whether a CUDA recording counts is judged by the clock, too
    paced = dict(steps=steps, scheduler=scheduler, reuse=reuse)
    sampling = _sampling(settings.PACES[fast], paced, schedule, asked)
    for one in subjects:
        one.check_masks()
        one.tuned()
    tuned = subject.tuned()
    if reuse is None and not fast:
        sampling = replace(sampling, reuse=usual_reuse(subject))
    joined.check(subjects)
    _check_heeded(subject.method, schedule=schedule is not None, references=references > 1, compiled=compiled)
    if references > (most := max(len(s.manifest.references) for s in subjects)):
        raise InputError(f"{subject.root} has {most} of {references} references; give no more with --references")
    report("loading the models", 0, 1)
    family = family or load(model or tuned.settings["base"], device, dtype, tuned.settings.get("vision"))
    for one in subjects:
        check_made_for(one, family)
    sampling = settled(sampling, family.profile, subject, schedule)
    order = Order(family, subject, joined, prompt, words, sampling, safety_checker)
    warnings = text.check_words(family.tokenizer, prompt, negative_prompt, identifiers)
    if negative_prompt and sampling.guidance == sampling.subject_guidance == 1:
        warnings.append(
            "the negative prompt says nothing at guidance 1, which has no pass to say it in; raise --guidance"
        )
    seeds = tuple(range(seed, seed + n))
    output = Output(subject, _record(order), seeds, metadata)
    missing = [s for s in seeds if force or not output.made(s)]

    def work(_: str, saving: settings.MemoryProfile) -> None:
        left = [s for s in missing if not output.saved(s)]
        for s, picture, verdict in draw(order, seeds, left, saving, report):
            output.save(s, images.to_pil(picture), verdict, parameters(order, s))

    if missing:
        with exact(deterministic):
            chosen = choose(memory, family.profile, family.device, family.dtype, tuning=False)
            _, trouble = within(*chosen, work, tuning=False)
        warnings += [trouble] if trouble else []
    if missing or not output.grid.is_file():
        output.finish(f"{sampling.steps} steps, guidance {order.sampling.guidance:g}")
    verdicts = output.safety()
    flagged = [s for s, verdict in zip(seeds, verdicts, strict=True) if verdict == "flagged"]
    warnings += [f"the safety checker flagged the image of seed {s}, which is black" for s in flagged]
    return GenerateResult(
        subject.root, prompt, seeds, tuple(output.paths.values()), output.grid, tuple(warnings), verdicts, not missing
    )


def _sampling(
    pace: settings.Pace, paced: dict[str, Any], schedule: str | None, asked: dict[str, Any]
) -> settings.GenerateConfig:
    """What was asked for, and the pace's own where nothing was. Raises InputError for what cannot be."""
    own = settings.as_settings(pace) | {name: value for name, value in paced.items() if value is not None}
    config = settings.GenerateConfig(**own, **asked)
    if min(config.steps, config.references, config.reuse) < 1:
        raise InputError("give at least one step (--steps 1), one reference (--references 1) and --reuse 1")
    for value in (config.guidance, config.subject_guidance, config.strength):
        if value is not None and not math.isfinite(value):
            raise InputError(f"{value} is no strength; give --guidance, --subject-guidance and --strength as numbers")
    sample.check_scheduler(config.scheduler)
    return config if schedule is None else settings.with_schedule(config, schedule)


def _check_heeded(method: str, **asked: bool) -> None:
    """Raises InputError if the method is asked for what it would not heed."""
    options = {"schedule": "--schedule", "references": "--references", "compiled": "--compile"}
    given = [options[name] for name, wanted in asked.items() if wanted and name not in methods.get(method).heeds]
    if given:
        raise InputError(f"{method} has no use for {' and '.join(given)}, which only p3s heeds; leave that out")


def _record(order: Order) -> dict[str, Any]:
    """Everything an image depends on but its seed."""
    tuned, sampling = order.subject.tuned(), settings.as_settings(order.sampling)
    for how in ("compiled", "captured"):  # the same image, but for rounding
        del sampling[how]
    return {
        "prompt": order.prompt,
        "text": order.words,
        "sampling": sampling,
        "control": {CONTROL: tuned.artifacts[CONTROL]},
        "base": tuned.settings["base_fingerprint"],
        "dtype": str(order.family.dtype).removeprefix("torch."),
        "safety_checker": order.safety_checker,
    } | order.joined.record()
