"""Stage two: the masked references -> this subject's control (P3S eq. 4-9, 11-15)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from p3s_cli import config as settings
from p3s_cli.errors import InputError, P3SError
from p3s_cli.methods import base as methods
from p3s_cli.methods import p3s as _p3s  # noqa: F401  (registers the method)
from p3s_cli.methods.memory import choose
from p3s_cli.sd.family import Family, load
from p3s_cli.sd.train import Checkpoint
from p3s_cli.sd.weights import save_tensors
from p3s_cli.stages.progress import Progress, silent
from p3s_cli.subject import Stage, Subject, digest


@dataclass(frozen=True)
class FinetuneResult:
    subject: Path
    steps: int
    loss: float
    control: Path
    memory: str  # the profile it was tuned with
    unchanged: bool


def finetune(
    subject_dir: Path | str,
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
    family: Family | None = None,
    control: settings.ControlConfig | None = None,
    on_progress: Progress | None = None,
) -> FinetuneResult:
    """Train this subject's control on its masked references (P3S eq. 4-9, 11-15).

    `memory` is a profile's name (24, 16, 12, 8), or `auto` for the device's own.
    `vision` names another CLIP pair than the family's for the control to see the references through.
    Steps and learning rate default to the family's; `control` overrides the preset's settings one by
    one. An interrupted run goes on from its last checkpoint. Raises InputError if masks are missing or stale.
    """
    report = on_progress or silent
    subject = Subject.open(Path(subject_dir))
    subject.check_masks()
    report("loading the models", 0, 1)
    family = family or load(model or subject.manifest.model, device, dtype, vision)
    base = family.fingerprint()
    _check_base(family)
    name, saving = choose(memory, family.profile, family.device, family.dtype)
    config = settings.FinetuneConfig(control or settings.preset(preset)[1], steps, lr, seed=seed, memory=saving)
    config = replace(
        config, steps=steps or int(family.profile.finetune["steps"]), lr=lr or family.profile.finetune["lr"]
    )
    options = {"config": settings.as_settings(config), "base_fingerprint": base, "base": family.source}
    options["vision"] = family.profile.clip
    # which profile a machine gets is no reason to tune again, only which one was asked for
    del options["config"]["memory"]
    options["memory"] = memory
    inputs = subject.finetune_inputs(base)
    done, path = subject.manifest.finetune, "control/control.safetensors"
    if done and not force and done.inputs == inputs and done.settings == options and subject.intact(done):
        return FinetuneResult(subject.root, config.steps, done.result["loss"], subject.path(path), name, True)
    recent: list[float] = []

    def on_step(step: int, total: int, numbers: dict[str, float]) -> None:
        recent[:] = [*recent[-49:], numbers["denoising"]]
        report(f"tuning, loss {sum(recent) / len(recent):.4f}", step, total)

    # the checkpoint's name is what the run depends on, so a run with other settings never resumes from it
    checkpoint = Checkpoint(subject.path(f"control/.{digest(inputs, options, name)[:16]}.safetensors"))
    tensors = methods.get("p3s").fit(family, subject, config, on_step, checkpoint)
    if not all(torch.isfinite(t).all() for t in tensors.values()):
        raise P3SError("the tuned control holds numbers that are not finite and was not saved; lower --lr")
    save_tensors(subject.path(path), {k: t.half() for k, t in tensors.items()}, {"method": "p3s", **options})
    loss = sum(recent) / max(1, len(recent))
    subject.manifest.finetune = Stage(
        inputs=inputs,
        settings=options,
        seed=seed,
        artifacts=subject.record(path),
        result={"loss": loss, "memory": name},
    )
    subject.save()
    checkpoint.path.unlink(missing_ok=True)
    return FinetuneResult(subject.root, config.steps, loss, subject.path(path), name, False)


def _check_base(family: Family) -> None:
    channels = family.unet.config.in_channels
    if channels != family.unet.config.out_channels:
        raise InputError(
            f"{family.source} is an inpainting model ({channels} channels) and draws nothing of its own; "
            "tune on its base, and give this one to p3s mask as --inpainter"
        )
