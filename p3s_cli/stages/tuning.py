"""Stage two: the masked references -> what a method learns of them; for P3S, this subject's control."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from p3s_cli import config as settings
from p3s_cli import methods
from p3s_cli.errors import P3SError
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
    unchanged: bool
    method: str


def finetune(
    subject_dir: Path | str,
    method: str = "p3s",
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
    """Teach a method this subject; for P3S, train its control on the masked references (P3S eq. 4-9, 11-15).

    Steps and learning rate default to the method's on this family; `preset` and `control`, which overrides
    its settings one by one, are P3S's alone. An interrupted run goes on from its last checkpoint. Raises
    InputError for an unknown method and if masks are missing or stale.
    """
    report, teacher = on_progress or silent, methods.get(method)
    subject = Subject.open(Path(subject_dir))
    subject.check_masks()
    report("loading the models", 0, 1)
    family = family or load(model or subject.manifest.model, device, dtype)
    base = family.fingerprint()
    config = settings.FinetuneConfig(control=control or settings.preset(preset)[1], steps=steps, lr=lr, seed=seed)
    recipe = teacher.recipe(family.profile, config)
    options = {"method": method, "config": settings.as_settings(recipe)}
    options |= {"base_fingerprint": base, "base": family.source}
    inputs = subject.finetune_inputs(base)
    done, name = subject.manifest.finetune, "control/control.safetensors"
    if done and not force and done.inputs == inputs and done.settings == options and subject.intact(done):
        return FinetuneResult(subject.root, recipe.steps, done.result["loss"], subject.path(name), True, method)
    recent: list[float] = []

    def on_step(step: int, total: int, numbers: dict[str, float]) -> None:
        recent[:] = [*recent[-49:], numbers["denoising"]]
        report(f"tuning, loss {sum(recent) / len(recent):.4f}", step, total)

    # the checkpoint's name is what the run depends on, so a run with other settings never resumes from it
    checkpoint = Checkpoint(subject.path(f"control/.{digest(inputs, options)[:16]}.safetensors"))
    tensors = teacher.fit(family, subject, config, on_step, checkpoint)
    if not all(torch.isfinite(t).all() for t in tensors.values()):
        raise P3SError("the tuned control holds numbers that are not finite and was not saved; lower --lr")
    save_tensors(subject.path(name), {k: t.half() for k, t in tensors.items()}, options)
    loss = sum(recent) / max(1, len(recent))
    subject.manifest.finetune = Stage(
        inputs=inputs, settings=options, seed=seed, artifacts=subject.record(name), result={"loss": loss}
    )
    subject.save()
    checkpoint.path.unlink(missing_ok=True)
    return FinetuneResult(subject.root, recipe.steps, loss, subject.path(name), False, method)
