"""The main path as library functions: mask() -> finetune() -> generate(). The commands are thin over these.

Each stage reads and writes a subject directory (`subject.py`), does nothing where its inputs have not
changed (unless `force`), and reports through `on_progress(what, done, total)`. Nothing here prints.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from p3s_cli import config as settings
from p3s_cli import masking, pictures
from p3s_cli.errors import InputError, P3SError
from p3s_cli.methods import base as methods
from p3s_cli.methods import p3s as _p3s  # noqa: F401  (registers the method)
from p3s_cli.sd import images, sample, text
from p3s_cli.sd.family import Family, load
from p3s_cli.sd.train import Checkpoint
from p3s_cli.sd.weights import load_tensors, save_tensors
from p3s_cli.subject import Manifest, Reference, Stage, Subject, digest, resolve_points

Progress = Callable[[str, int, int], None]

_BATCH = 4  # images sampled together


@dataclass(frozen=True)
class MaskResult:
    """`areas` are shares of the photo; `filler` is what removed the negative; `pictures` are for the eye."""

    subject: Path
    reference: str
    class_word: str
    class_score: float | None
    areas: dict[str, float]
    filler: str
    warnings: tuple[str, ...]
    pictures: tuple[Path, ...]
    unchanged: bool


@dataclass(frozen=True)
class FinetuneResult:
    subject: Path
    steps: int
    loss: float
    control: Path
    unchanged: bool


@dataclass(frozen=True)
class GenerateResult:
    subject: Path
    prompt: str
    seeds: tuple[int, ...]
    images: tuple[Path, ...]
    grid: Path
    warnings: tuple[str, ...]
    unchanged: bool


def mask(
    photo: Path | str,
    positive: Sequence[str | tuple[float, float]],
    negative: Sequence[str | tuple[float, float]] = (),
    output: Path | str | None = None,
    class_word: str | None = None,
    model: str = "sd15",
    preset: str = "default",
    seed: int = 0,
    device: str = "auto",
    dtype: str = "auto",
    force: bool = False,
    family: Family | None = None,
    on_progress: Progress | None = None,
) -> MaskResult:
    """Points on a photo -> subject and negative masks, and the reference without the negative (P3S eq. 1-3).

    Points are (x, y) pixels of the upright image, or strings "120,88" or "0.3,0.5" (fractions). Makes
    `output` (default `./<stem>/`) or adds a reference to it; the same photo again replaces its points.
    Raises InputError for an unreadable photo, a point outside it, or one place marked both ways.
    """
    report = on_progress or (lambda what, done, total: None)
    photo, root = Path(photo), Path(output) if output else Path(Path(photo).stem)
    mask_config, _ = settings.preset(preset)
    picture = images.load_image(photo)
    points = resolve_points(positive, *picture.size), resolve_points(negative, *picture.size)
    masking.check_points(*points)
    subject = Subject.open(root) if Subject.exists(root) else None
    family = family or load(subject.manifest.model if subject else model, device, dtype)
    report("loading the vision tower", 0, 3)
    if subject is None:
        subject = Subject(root, Manifest(class_word="?", identifier=family.profile.identifier, model=family.source, vision_fingerprint=family.vision.fingerprint))
    reference = _reference_for(subject, picture, points)
    options = asdict(mask_config) | {"preset": preset}
    inputs = subject.mask_inputs(reference, options)
    unchanged = bool(reference.mask and not force and reference.mask.inputs == inputs and reference.mask.seed == seed and subject.intact(reference.mask))
    if not unchanged:
        report("finding the masks", 1, 3)
        made = masking.make(family, picture, points, mask_config, seed)
        report("writing", 2, 3)
        reference.mask = masking.write(subject, reference, picture, made, Stage(inputs=inputs, settings=options, seed=seed, artifacts={}))
    if class_word:
        subject.manifest.class_word, subject.manifest.class_score = class_word, None
    elif subject.manifest.class_word == "?":
        subject.manifest.class_word, subject.manifest.class_score = masking.guess_class(family, picture, subject, reference)
    subject.save()
    report("done", 3, 3)
    result = reference.mask.result
    return MaskResult(
        root, reference.folder, subject.manifest.class_word, subject.manifest.class_score, result["areas"], result["filler"],
        tuple(result["warnings"]), tuple(subject.path(n) for n in reference.mask.artifacts if n.endswith(".png")), unchanged,
    )  # fmt: skip


def _reference_for(subject: Subject, picture: Image.Image, points: tuple[list, list]) -> Reference:
    """The reference with this very photo and these points; a new one if the subject does not have the photo yet."""
    sha = images.pixel_hash(picture)
    for reference in subject.manifest.references:
        if reference.photo_sha256 == sha:
            reference.positive, reference.negative = points
            return reference
    folder = f"references/{len(subject.manifest.references):02d}"
    reference = Reference(folder=folder, photo_sha256=sha, width=picture.width, height=picture.height, positive=points[0], negative=points[1])
    subject.manifest.references.append(reference)
    return reference


def finetune(
    subject_dir: Path | str,
    steps: int | None = None,
    lr: float | None = None,
    preset: str = "default",
    seed: int = 0,
    model: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    force: bool = False,
    family: Family | None = None,
    control: settings.ControlConfig | None = None,
    on_progress: Progress | None = None,
) -> FinetuneResult:
    """Train this subject's control on its masked references (P3S eq. 4-9, 11-15).

    Steps and learning rate default to the family's; `control` overrides the preset's settings one by
    one. An interrupted run goes on from its last checkpoint. Raises InputError if masks are missing or stale.
    """
    report = on_progress or (lambda what, done, total: None)
    subject = Subject.open(Path(subject_dir))
    subject.check_masks()
    report("loading the models", 0, 1)
    family = family or load(model or subject.manifest.model, device, dtype)
    base = family.fingerprint()
    config = settings.FinetuneConfig(control=control or settings.preset(preset)[1], steps=steps, lr=lr, seed=seed)
    config = replace(config, steps=steps or int(family.profile.finetune["steps"]), lr=lr or family.profile.finetune["lr"])
    options = {"config": asdict(config), "base_fingerprint": base, "base": family.source}
    inputs = subject.finetune_inputs(base)
    done, name = subject.manifest.finetune, "control/control.safetensors"
    if done and not force and done.inputs == inputs and done.settings == options and subject.intact(done):
        return FinetuneResult(subject.root, config.steps, done.result["loss"], subject.path(name), True)
    recent: list[float] = []

    def on_step(step: int, total: int, numbers: dict[str, float]) -> None:
        recent[:] = [*recent[-49:], numbers["denoising"]]
        report(f"tuning, loss {sum(recent) / len(recent):.4f}", step, total)

    # the checkpoint's name is what the run depends on, so a run with other settings never resumes from it
    checkpoint = Checkpoint(subject.path(f"control/.{digest(inputs, options)[:16]}.safetensors"))
    tensors = methods.get("p3s").fit(family, subject, config, on_step, checkpoint)
    if not all(torch.isfinite(t).all() for t in tensors.values()):
        raise P3SError("the tuned control holds numbers that are not finite and was not saved; lower --lr")
    save_tensors(subject.path(name), {k: t.half() for k, t in tensors.items()}, {"method": "p3s", **options})
    loss = sum(recent) / max(1, len(recent))
    subject.manifest.finetune = Stage(inputs=inputs, settings=options, seed=seed, artifacts=subject.record(name), result={"loss": loss})
    subject.save()
    checkpoint.path.unlink(missing_ok=True)
    return FinetuneResult(subject.root, config.steps, loss, subject.path(name), False)


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
    report = on_progress or (lambda what, done, total: None)
    subject = Subject.open(Path(subject_dir))
    words = text.identify(prompt, subject.manifest.identifier)
    if n < 1 or steps < 1:
        raise InputError("give at least one image (-n 1) and one step (--steps 1)")
    sampling = settings.GenerateConfig(steps=steps, guidance=guidance, subject_guidance=subject_guidance, scheduler=scheduler, strength=strength)
    sampling = settings.with_schedule(sampling, schedule)
    sample.check_scheduler(scheduler)
    if subject.manifest.finetune is None:
        subject.check_control("")
    subject.check_masks()
    report("loading the models", 0, 1)
    family = family or load(model or subject.manifest.finetune.settings["base"], device, dtype)
    control = subject.check_control(family.fingerprint())
    sampling = replace(sampling, guidance=family.profile.guidance if guidance is None else guidance)
    text.check_identifier_survives(family.tokenizer, words, subject.manifest.identifier)
    lost = text.lost_words(family.tokenizer, words)
    warnings = (f'the prompt is too long; the text encoder does not see "{lost}"',) if lost else ()
    record = {"prompt": prompt, "text": words, "sampling": asdict(sampling), "control": control.artifacts, "base": control.settings["base_fingerprint"]}
    key, seeds = digest(record)[:8], tuple(range(seed, seed + n))
    slug = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:48] or "image"
    paths = {s: subject.path(f"outputs/{slug}-{key}-{s:04d}.png") for s in seeds}
    missing = [s for s in seeds if force or images.read_metadata(paths[s]) != record | {"seed": s}]
    if missing:
        for s, picture in _sample(family, subject, words, sampling, missing, report):
            images.save_png(paths[s], images.to_pil(picture), record | {"seed": s})
    grid = subject.path(f"outputs/{slug}-{key}-{seeds[0]:04d}x{n}.grid.png")
    tiles = [(f"seed {s}", images.load_image(paths[s])) for s in seeds]
    images.save_png(grid, pictures.sheet([(f"{steps} steps, guidance {sampling.guidance:g}", tiles)], prompt))
    _record_generation(subject, record, paths, grid, seed)
    return GenerateResult(subject.root, prompt, seeds, tuple(paths.values()), grid, warnings, not missing)


def _sample(family: Family, subject: Subject, words: str, sampling: settings.GenerateConfig, seeds: Sequence[int], report: Progress):
    """Yield (seed, image (3, H, W)) as each batch is done."""
    tensors, metadata = load_tensors(subject.path("control/control.safetensors"))
    control = settings.ControlConfig(**metadata["config"]["control"])
    latent = (family.unet.config.out_channels, family.unet.config.sample_size, family.unet.config.sample_size)
    with methods.get("p3s").bind(family, subject, tensors, (control, sampling)) as generator:
        states, empty = generator.encode([words, ""]).split(1)
        for first in range(0, len(seeds), _BATCH):
            batch = seeds[first : first + _BATCH]

            def on_step(step: int, total: int, first: int = first, batch: Sequence[int] = batch) -> None:
                report(f"images {first + 1}-{first + len(batch)} of {len(seeds)}", first * total + step * len(batch), len(seeds) * total)

            scheduler = sample.build_scheduler(sampling.scheduler, family.scheduler_config)
            text_states = states.expand(len(batch), -1, -1)
            latents = sample.sample(
                generator.eps, text_states, empty, scheduler, batch, latent, sampling.steps, sampling.guidance, sampling.subject_guidance, on_step
            )
            yield from zip(batch, _finite(images.decode(family.vae, latents), batch), strict=True)


def _finite(decoded: Tensor, seeds: Sequence[int]) -> Tensor:
    if not torch.isfinite(decoded).all():
        raise P3SError(f"the images of seeds {list(seeds)} came out with numbers that are not finite; try --dtype float32")
    return decoded


def _record_generation(subject: Subject, record: dict, paths: dict[int, Path], grid: Path, seed: int) -> None:
    names = [str(p.relative_to(subject.root)) for p in (*paths.values(), grid)]
    stage = Stage(inputs=digest(record), settings=record, seed=seed, artifacts=subject.record(*names))
    others = [g for g in subject.manifest.generated if g.inputs != stage.inputs or g.seed != seed]
    subject.manifest.generated = [*others, stage]
    subject.save()
