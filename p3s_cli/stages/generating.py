"""Stage three: images of the tuned subject, wherever the prompt puts it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from p3s_cli import __version__, methods
from p3s_cli import config as settings
from p3s_cli.errors import InputError, P3SError
from p3s_cli.lock import one_writer
from p3s_cli.methods.base import Generator, Learnt
from p3s_cli.methods.binding import Part
from p3s_cli.methods.memory import choose, within
from p3s_cli.methods.p3s import P3S
from p3s_cli.sd import a1111, controlnet, images, lora, safety, sample, text
from p3s_cli.sd.determinism import exact
from p3s_cli.sd.family import Family, load
from p3s_cli.sd.weights import load_tensors
from p3s_cli.stages.composition import Composition, parse_size
from p3s_cli.stages.output import Output
from p3s_cli.stages.progress import Progress, silent
from p3s_cli.stages.tuning import CONTROL
from p3s_cli.subject import Subject


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
    schedule: str = "quadratic",
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
    `control`, `lora` and `references` are P3S's alone. Steps and scheduler default to 50 of DDIM; `fast` is
    20 of a multistep solver, the copy running at every other one. `metadata` puts the settings into each PNG. Raises
    InputError before the subject is tuned, after it has changed, for a prompt without [V], and for unknown names.
    """
    report = on_progress or silent
    pace = settings.PACES[fast]
    steps, scheduler = pace[0] if steps is None else steps, scheduler or pace[1]
    if n < 1 or steps < 1 or references < 1:
        raise InputError("give at least one image (-n 1), one step (--steps 1) and one reference (--references 1)")
    subject, joined = Subject.open(Path(subject_dir)), Composition.read(also, control, lora)
    subjects = [subject, *(s for s, _ in joined.also)]
    words = text.identify(prompt, *(s.manifest.identifier for s in subjects))
    sampling = settings.GenerateConfig(
        steps, guidance, subject_guidance, scheduler, strength=strength, negative_prompt=negative_prompt
    )
    sampling = settings.with_schedule(
        replace(sampling, references=references, size=parse_size(size), reuse=pace[2]), schedule
    )
    sample.check_scheduler(scheduler)
    for one in subjects:
        one.check_masks()
        one.tuned()
    tuned = subject.tuned()
    methods.get(subject.method)
    joined.check(subjects)
    report("loading the models", 0, 1)
    family = family or load(model or tuned.settings["base"], device, dtype, tuned.settings.get("vision"))
    for one in subjects:
        one.check_control(family.fingerprint())
    sampling = _settled(sampling, family, subject)
    warnings = _check_words(family, words, sampling.negative_prompt, [s.manifest.identifier for s in subjects])
    record = {"prompt": prompt, "text": words, "sampling": settings.as_settings(sampling), "control": tuned.artifacts}
    record |= {"base": tuned.settings["base_fingerprint"], "safety_checker": safety_checker} | joined.record()
    seeds = tuple(range(seed, seed + n))
    output = Output(subject, record, seeds, metadata)
    missing = [s for s in seeds if force or not output.made(s)]
    parameters = _parameters(family, words, sampling, joined)

    def draw(_: str, saving: settings.MemoryProfile) -> None:
        left = [s for s in missing if not output.saved(s)]
        for s, picture, verdict in _sample(
            family, subject, joined, words, sampling, seeds, left, saving, safety_checker, report
        ):
            output.save(s, images.to_pil(picture), verdict, parameters(s))

    if missing:
        with exact(deterministic):
            _, trouble = within(*choose(memory, family.profile, family.device, family.dtype), draw)
        warnings += [trouble] if trouble else []
    if missing or not output.grid.is_file():
        output.finish(f"{steps} steps, guidance {sampling.guidance:g}")
    verdicts = output.safety()
    flagged = [s for s, verdict in zip(seeds, verdicts, strict=True) if verdict == "flagged"]
    warnings += [f"the safety checker flagged the image of seed {s}, which is black" for s in flagged]
    return GenerateResult(
        subject.root, prompt, seeds, tuple(output.paths.values()), output.grid, tuple(warnings), verdicts, not missing
    )


def _settled(sampling: settings.GenerateConfig, family: Family, subject: Subject) -> settings.GenerateConfig:
    """With the family's strengths where none were asked for; its subject's is P3S's, whose copy it is for."""
    own = family.profile.subject_guidance if subject.method == "p3s" else 1.0
    asked = sampling.guidance, sampling.subject_guidance
    chosen = (d if a is None else a for a, d in zip(asked, (family.profile.guidance, own), strict=True))
    return replace(sampling, **dict(zip(("guidance", "subject_guidance"), chosen, strict=True)))


def _check_words(family: Family, words: str, negative: str, identifiers: Sequence[str]) -> list[str]:
    """Warnings for what of the prompts the text encoder will not see; InputError if a subject is in it."""
    for identifier in identifiers:
        text.check_identifier_survives(family.tokenizer, words, identifier)
    lost = {"prompt": text.lost_words(family.tokenizer, words)}
    lost["negative prompt"] = text.lost_words(family.tokenizer, negative)
    return [f'the {which} is too long; the text encoder does not see "{tail}"' for which, tail in lost.items() if tail]


def _parameters(
    family: Family, words: str, sampling: settings.GenerateConfig, joined: Composition
) -> Callable[[int], str]:
    """A1111's text for the image of a seed."""
    assert sampling.guidance is not None and sampling.subject_guidance is not None
    return lambda seed: a1111.parameters(
        words,
        sampling.negative_prompt,
        steps=sampling.steps,
        sampler=sampling.scheduler,
        guidance=sampling.guidance,
        seed=seed,
        size=sampling.size or (family.profile.image_size,) * 2,
        model=family.profile.name,
        version=f"p3s {__version__}",
        loras=[(path.stem, strength) for path, strength in joined.lora],
    )


def _sample(
    family: Family,
    subject: Subject,
    joined: Composition,
    words: str,
    sampling: settings.GenerateConfig,
    seeds: Sequence[int],
    missing: Sequence[int],
    memory: settings.MemoryProfile,
    safety_checker: bool,
    report: Progress,
) -> Iterator[tuple[int, Tensor, str]]:
    """Yield (seed, image (3, H, W), safety) of the missing seeds as each batch is done.

    Batches are cut from all seeds, because in a batch of another size a kernel may round otherwise. Raises
    P3SError in the end, naming the seeds, if images came out with numbers that are not finite.
    """
    if safety_checker:
        safety.ready(family)
    height, width = sampling.size or (family.profile.image_size,) * 2
    latent = (family.unet.config.out_channels, height // 8, width // 8)
    guides = [
        controlnet.load_guide(family, name, images.load_image(path), strength, (height, width))
        for name, path, strength in joined.control
    ]
    failed: list[int] = []
    with _bound(family, subject, joined, sampling) as generator, lora.applied(family, joined.lora):
        states, empty = generator.encode([words, sampling.negative_prompt]).split(1)
        for first in range(0, len(seeds), memory.images):
            batch = seeds[first : first + memory.images]
            if not set(batch) & set(missing):
                continue
            with _resting(family, memory.offload):
                latents = sample.sample(
                    generator.eps,
                    states.expand(len(batch), -1, -1),
                    empty,
                    sample.build_scheduler(sampling.scheduler, family.scheduler_config),
                    batch,
                    latent,
                    sampling.steps,
                    sampling.guidance,
                    sampling.subject_guidance,
                    _step_report(report, first, len(batch), len(seeds)),
                    controlnet.speaker(guides),
                )
            decoded = images.decode(family.vae, latents, memory.images)
            finite = torch.isfinite(decoded).flatten(1).all(1)
            failed += [s for s, whole in zip(batch, finite, strict=True) if not whole]
            wanted = [i for i, s in enumerate(batch) if s in missing and finite[i]]
            if wanted:
                checked, verdicts = safety.check(family, decoded[wanted]) if safety_checker else (decoded[wanted], None)
                yield from zip([batch[i] for i in wanted], checked, verdicts or ["off"] * len(wanted), strict=True)
    if failed:
        raise P3SError(f"the images of seeds {failed} came out with numbers that are not finite; try --dtype float32")


def _bound(
    family: Family, subject: Subject, joined: Composition, sampling: settings.GenerateConfig
) -> AbstractContextManager[Generator]:
    """The subject under the method it was tuned with; several, under P3S."""
    if subject.method == "p3s":
        parts = [_part(s, strength) for s, strength in ((subject, 1.0), *joined.also)]
        return P3S().bind_many(family, parts, sampling)
    tensors, metadata = _read(subject)
    return methods.get(subject.method).bind(family, Learnt(subject, tensors, metadata["config"]), sampling)


def _read(subject: Subject) -> tuple[dict[str, Tensor], dict]:
    return load_tensors(subject.path(CONTROL), sha=subject.tuned().artifacts[CONTROL])


def _part(subject: Subject, strength: float) -> Part:
    tensors, metadata = _read(subject)
    return Part(subject, tensors, settings.read_control(metadata["config"]), strength)


@contextlib.contextmanager
def _resting(family: Family, offload: bool) -> Iterator[None]:
    """The encoders off the device while the U-Nets work, if memory is that short."""
    if offload:
        family.rest()
    try:
        yield
    finally:
        if offload:
            family.wake()


def _step_report(report: Progress, first: int, count: int, total: int) -> Callable[[int, int], None]:
    return lambda step, steps: report(
        f"images {first + 1}-{first + count} of {total}", first * steps + step * count, total * steps
    )
