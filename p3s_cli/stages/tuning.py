"""Stage two: the masked references -> what a method learns of them; for P3S, this subject's control."""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel

from p3s_cli import config as settings
from p3s_cli import methods
from p3s_cli.errors import InputError, P3SError
from p3s_cli.lock import one_writer
from p3s_cli.manifest import SEEN_BY, Stage
from p3s_cli.methods.base import Lesson, Method
from p3s_cli.methods.memory import choose, within
from p3s_cli.methods.photos import read_photos
from p3s_cli.methods.views import base_view
from p3s_cli.sd import images
from p3s_cli.sd.base import check_base
from p3s_cli.sd.determinism import exact
from p3s_cli.sd.family import Family, load
from p3s_cli.sd.train import Checkpoint
from p3s_cli.sd.weights import save_tensors
from p3s_cli.stages.progress import Progress, silent
from p3s_cli.subject import CONTROL, Subject, digest, hashes

_Tensors = dict[str, torch.Tensor]
_CHECKPOINT = "control/.checkpoint-"
_LATENTS = "control/references.safetensors"


@dataclass(frozen=True)
class FinetuneResult:
    """`loss` is the denoising loss, a mean over the last 50 steps; `skipped` counts steps that were not finite and changed nothing."""

    subject: Path
    steps: int
    loss: float
    skipped: int
    control: Path
    unchanged: bool
    method: str
    memory: str  # the profile it was tuned with
    warnings: tuple[str, ...]


@one_writer
def finetune(
    subject_dir: Path | str,
    method: str = "p3s",
    steps: int | None = None,
    lr: float | None = None,
    preset: str = "default",
    seed: int = 0,
    model: str | None = None,
    vision: str = "clip",
    memory: str = "auto",
    device: str = "auto",
    dtype: str = "auto",
    force: bool = False,
    deterministic: bool = False,
    compiled: bool = False,
    captured: bool = True,
    family: Family | None = None,
    control: settings.ControlConfig | None = None,
    on_progress: Progress | None = None,
) -> FinetuneResult:
    """Teach a method this subject; for P3S, train its control on the masked references (P3S eq. 4-9, 11-15).

    Steps and learning rate default to the method's on this family; `preset` and `control`, which overrides
    its settings one by one, are P3S's alone, and so are `memory`, a profile's name (24, 16, 12, 8; `auto` is
    the device's own), and `vision`, another CLIP pair for the control to see the references through. `compiled`
    costs minutes once a process and is for GPUs; what is learnt is the same but for rounding. Without `captured`
    no step of P3S's becomes a CUDA graph, which no other method's is. An
    interrupted run goes on from its last checkpoint. Raises InputError for an unknown method and if masks are
    missing or stale.
    """
    report, teacher = on_progress or silent, methods.get(method)
    if lr is not None and not 0 <= lr < math.inf:
        raise InputError(f"{lr} is no learning rate; give --lr as a number that is 0 or more, such as 1e-4")
    if steps is not None and steps < 1:
        raise InputError(f"{steps} steps teach nothing; give at least one (--steps 1)")
    _check_heeded(teacher, preset != "default" or control is not None, memory != "auto", vision != "clip", compiled)
    subject = Subject.open(Path(subject_dir))
    subject.check_masks()
    report("loading the models", 0, 1)
    family = family or load(model or subject.manifest.model, device, dtype, vision)
    check_base(family)
    profile, saving = choose(memory, family.profile, family.device, family.dtype)
    mixed = (family.device, family.dtype, saving.masters) == ("cpu", torch.float16, "bfloat16")
    if mixed and "memory" in teacher.heeds:
        raise InputError(
            f"memory profile {profile} trains in bfloat16, which a CPU cannot mix with float16; use --dtype bfloat16"
        )
    # whether a CUDA recording counts is judged by the clock, too, and it rounds otherwise than the step itself
    how = dict(memory=saving, compiled=compiled, captured=captured and not deterministic)
    config = settings.FinetuneConfig(control or settings.preset(preset)[1], steps, lr, seed=seed, **how)
    recipe = teacher.recipe(family.profile, config)
    options = _options(teacher, recipe, memory, family)
    inputs = subject.finetune_inputs(family.fingerprint)
    wanted = Stage(inputs=inputs, settings=options, seed=seed, artifacts={})
    masks = f"{_CHECKPOINT}{subject.masks()[:8]}-"
    run = f"{masks}{digest(inputs, options, seed)[:16]}"  # and the memory profile it came to
    if not force and subject.holds(subject.manifest.finetune, _as_told(wanted, subject), _Made, CONTROL):
        return _result(subject, recipe.steps, subject.tuned(), True, _tidy(subject, masks, run))
    numbers: dict[str, float] = {}

    def on_step(step: int, total: int, means: dict[str, float]) -> None:
        numbers.update(means)
        report(f"tuning, loss {numbers.get('denoising', 0):.4f}", step, total)

    # the checkpoint's name is what the run depends on, so a run with other settings never resumes from it
    def fit(profile: str, saving: settings.MemoryProfile) -> tuple[str, _Tensors, _Tensors]:
        checkpoint = Checkpoint(subject.path(f"{run}-{profile}"), last=False)  # 10 GB of SD v1-5, to be removed at once
        with exact(deterministic):
            latents = _latents(family, subject)  # first, as nothing may come between what is learnt and its place
            lesson = Lesson(family, subject, replace(config, memory=saving), on_step, checkpoint)
            return profile, teacher.fit(lesson), latents

    (profile, tensors, latents), trouble = within(profile, saving, fit, heeded="memory" in teacher.heeds)
    halves = _halves(tensors)
    result = {"loss": numbers.get("denoising", 0.0), "skipped": int(numbers.get("skipped", 0)), "memory": profile}
    result["warnings"] = [trouble] if trouble else []
    with subject.changing() as folder:
        save_tensors(folder / CONTROL, halves, options)
        save_tensors(folder / _LATENTS, latents, {"stage": "finetune", "base": family.source})
        made = {"artifacts": hashes(folder, CONTROL, _LATENTS), "result": result}
        subject.manifest.finetune = wanted.model_copy(update=made)
    return _result(subject, recipe.steps, subject.manifest.finetune, False, _tidy(subject, masks, run))


def _check_heeded(teacher: Method, preset: bool, memory: bool, vision: bool, compiled: bool) -> None:
    """Raises InputError if the method is asked for what it would not heed."""
    for option, asked in {"preset": preset, "memory": memory, "vision": vision}.items():
        if asked and option not in teacher.heeds:
            raise InputError(f"{teacher.name} has no use for --{option}, which is p3s's; leave that out")
    if compiled and "compiled" not in teacher.heeds:
        raise InputError(f"{teacher.name} has no step to compile; leave out --compile")


def _options(teacher: Method, recipe: Any, memory: str, family: Family) -> dict[str, Any]:
    """Everything that decides what is learnt, as the manifest holds it."""
    config = settings.as_settings(recipe)
    # how a machine got there is no reason to tune again, only which memory profile was asked for
    for how in ("memory", "compiled", "captured"):
        config.pop(how, None)
    base = {"base_fingerprint": family.fingerprint, "base": family.source, "vision": family.profile.clip}
    weights = family.pair_fingerprint if "vision" in teacher.heeds else None
    seen = {SEEN_BY: weights} if weights else {}
    return {"method": teacher.name, "config": config, "memory": memory} | base | seen


def _as_told(wanted: Stage, subject: Subject) -> Stage:
    """The same as far as the subject's record tells: an older one names its CLIP pair, and does not say which weights it had."""
    done = subject.manifest.finetune
    if done is None or SEEN_BY in done.settings:
        return wanted
    return wanted.model_copy(update={"settings": {n: v for n, v in wanted.settings.items() if n != SEEN_BY}})


def _latents(family: Family, subject: Subject) -> _Tensors:
    """Each reference without its look-alike, (4, h, w) of the family's square: for other tools, as methods encode views of their own."""
    photos, size = read_photos(subject), family.profile.image_size
    squares = torch.stack([p.seen(base_view(p.mask), size) for p in photos])
    folders = (reference.folder for reference in subject.manifest.references)
    return dict(zip(folders, images.encode(family.vae, squares), strict=True))


def _halves(tensors: Mapping[str, torch.Tensor]) -> _Tensors:
    """The same in fp16, as they are kept. Raises P3SError if one is not finite in it."""
    halves = {k: t.half() for k, t in tensors.items()}
    if not all(torch.isfinite(t).all() for t in halves.values()):
        raise P3SError("the tuned control holds numbers that are not finite and was not saved; lower --lr")
    return halves


def _tidy(subject: Subject, masks: str, run: str) -> list[str]:
    """Remove checkpoints of this run, which is over, and of other masks, with which none can go on. Sentences on the rest."""
    rest = []
    for folder in sorted(subject.root.glob(f"{_CHECKPOINT}*")):
        of_these, of_this = (folder.name.startswith(Path(prefix).name) for prefix in (masks, run))
        if of_these and not of_this:
            rest.append(
                f"{folder} is kept, of a run with other settings: give its command again to go on, or remove it"
            )
        else:
            shutil.rmtree(folder, ignore_errors=True)
    return rest


def _result(subject: Subject, steps: int, stage: Stage, unchanged: bool, warnings: list[str]) -> FinetuneResult:
    made = stage.told(_Made)
    assert made is not None
    kept = subject.path(CONTROL), unchanged, subject.method, made.memory, (*made.warnings, *warnings)
    return FinetuneResult(subject.root, steps, made.loss, made.skipped, *kept)


class _Made(BaseModel):
    """What a record says of a tuning that is done."""

    loss: float
    skipped: int = 0
    memory: str = "24"
    warnings: list[str] = []
