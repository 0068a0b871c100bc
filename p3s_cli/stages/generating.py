"""Stage three: images of the tuned subject, wherever the prompt puts it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from p3s_cli import config as settings
from p3s_cli import pictures
from p3s_cli.errors import InputError, P3SError
from p3s_cli.methods import base as methods
from p3s_cli.methods import p3s as _p3s  # noqa: F401  (registers the method)
from p3s_cli.sd import images, sample, text
from p3s_cli.sd.family import Family, load
from p3s_cli.sd.weights import load_tensors
from p3s_cli.stages.progress import Progress, silent
from p3s_cli.subject import Stage, Subject, digest

_BATCH = 4  # images sampled together


@dataclass(frozen=True)
class GenerateResult:
    subject: Path
    prompt: str
    seeds: tuple[int, ...]
    images: tuple[Path, ...]
    grid: Path
    warnings: tuple[str, ...]
    unchanged: bool


def generate(
    subject_dir: Path | str,
    prompt: str,
    n: int = 4,
    seed: int = 0,
    steps: int = 50,
    guidance: float | None = None,
    subject_guidance: float = 1.0,
    scheduler: str = "ddim",
    schedule: str = "quadratic",
    strength: float = 1.0,
    model: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    force: bool = False,
    family: Family | None = None,
    on_progress: Progress | None = None,
) -> GenerateResult:
    """Images of the tuned subject for a prompt with [V] in it; image k has seed `seed + k`, whatever n is.

    `guidance` is the text's strength, `subject_guidance` the subject's. Raises InputError before the
    subject is tuned, after it has changed, for a prompt without [V], and for unknown names.
    """
    report = on_progress or silent
    if n < 1 or steps < 1:
        raise InputError("give at least one image (-n 1) and one step (--steps 1)")
    subject = Subject.open(Path(subject_dir))
    words = text.identify(prompt, subject.manifest.identifier)
    sampling = settings.GenerateConfig(steps, guidance, subject_guidance, scheduler, strength=strength)
    sampling = settings.with_schedule(sampling, schedule)
    sample.check_scheduler(scheduler)
    subject.check_masks()
    tuned = subject.tuned()
    report("loading the models", 0, 1)
    family = family or load(model or tuned.settings["base"], device, dtype, tuned.settings.get("vision"))
    subject.check_control(family.fingerprint())
    sampling = replace(sampling, guidance=family.profile.guidance if guidance is None else guidance)
    text.check_identifier_survives(family.tokenizer, words, subject.manifest.identifier)
    lost = text.lost_words(family.tokenizer, words)
    warnings = (f'the prompt is too long; the text encoder does not see "{lost}"',) if lost else ()
    record = {"prompt": prompt, "text": words, "sampling": settings.as_settings(sampling), "control": tuned.artifacts}
    record["base"] = tuned.settings["base_fingerprint"]
    seeds = tuple(range(seed, seed + n))
    paths, grid = _paths(subject, record, seeds)
    missing = [s for s in seeds if force or images.read_metadata(paths[s]) != record | {"seed": s}]
    for s, picture in _sample(family, subject, words, sampling, missing, report):
        images.save_png(paths[s], images.to_pil(picture), record | {"seed": s})
    if missing or not grid.is_file():
        tiles = [(f"seed {s}", images.load_image(paths[s])) for s in seeds]
        images.save_png(grid, pictures.sheet([(f"{steps} steps, guidance {sampling.guidance:g}", tiles)], prompt))
        _record_generation(subject, record, paths, grid, seed)
    return GenerateResult(subject.root, prompt, seeds, tuple(paths.values()), grid, warnings, not missing)


def _paths(subject: Subject, record: dict, seeds: Sequence[int]) -> tuple[dict[int, Path], Path]:
    """Where the image of each seed and their grid go: the prompt's words, then what the images depend on."""
    slug = re.sub(r"[^a-z0-9]+", "-", record["prompt"].lower()).strip("-")[:48] or "image"
    stem = f"outputs/{slug}-{digest(record)[:8]}"
    paths = {s: subject.path(f"{stem}-{s:04d}.png") for s in seeds}
    return paths, subject.path(f"{stem}-{seeds[0]:04d}x{len(seeds)}.grid.png")


def _sample(
    family: Family,
    subject: Subject,
    words: str,
    sampling: settings.GenerateConfig,
    seeds: Sequence[int],
    report: Progress,
) -> Iterator[tuple[int, Tensor]]:
    """Yield (seed, image (3, H, W)) as each batch is done; nothing is loaded if no seed is asked for."""
    if not seeds:
        return
    tensors, metadata = load_tensors(subject.path("control/control.safetensors"))
    control = settings.ControlConfig(**metadata["config"]["control"])
    latent = (family.unet.config.out_channels, family.unet.config.sample_size, family.unet.config.sample_size)
    with methods.get("p3s").bind(family, subject, tensors, (control, sampling)) as generator:
        states, empty = generator.encode([words, ""]).split(1)
        for first in range(0, len(seeds), _BATCH):
            batch = seeds[first : first + _BATCH]

            def on_step(step: int, total: int, first: int = first, batch: Sequence[int] = batch) -> None:
                report(
                    f"images {first + 1}-{first + len(batch)} of {len(seeds)}",
                    first * total + step * len(batch),
                    len(seeds) * total,
                )

            scheduler = sample.build_scheduler(sampling.scheduler, family.scheduler_config)
            strengths = sampling.guidance, sampling.subject_guidance
            text_states = states.expand(len(batch), -1, -1)
            latents = sample.sample(
                generator.eps, text_states, empty, scheduler, batch, latent, sampling.steps, *strengths, on_step
            )
            yield from zip(batch, _finite(images.decode(family.vae, latents), batch), strict=True)


def _finite(decoded: Tensor, seeds: Sequence[int]) -> Tensor:
    if not torch.isfinite(decoded).all():
        raise P3SError(
            f"the images of seeds {list(seeds)} came out with numbers that are not finite; try --dtype float32"
        )
    return decoded


def _record_generation(subject: Subject, record: dict, paths: dict[int, Path], grid: Path, seed: int) -> None:
    names = [str(p.relative_to(subject.root)) for p in (*paths.values(), grid)]
    stage = Stage(inputs=digest(record), settings=record, seed=seed, artifacts=subject.record(*names))
    others = [g for g in subject.manifest.generated if g.inputs != stage.inputs or g.seed != seed]
    subject.manifest.generated = [*others, stage]
    subject.save()
