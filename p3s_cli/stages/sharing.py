"""A tuned subject as one small file, and back: what `p3s export` and `p3s import` do.

The file is safetensors with a JSON description. It holds the control, in fp16 or as a low-rank difference
to its base, and of each reference what drawing needs: the inpainted pixels and the mask; never the photo.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from p3s_cli import config as settings
from p3s_cli.errors import InputError
from p3s_cli.methods import lowrank
from p3s_cli.methods.photos import mask_tensors
from p3s_cli.paper.model import P3SControl
from p3s_cli.sd.family import Family, load
from p3s_cli.sd.weights import load_tensors, save_tensors
from p3s_cli.stages.progress import Progress, silent
from p3s_cli.stages.tuning import CONTROL
from p3s_cli.subject import Manifest, Reference, Stage, Subject, hashes

FORMAT = 1


@dataclass(frozen=True)
class ExportResult:
    """`error`: norm of what the low rank leaves out, relative to the difference it stands for; 0 for `full`."""

    subject: Path
    file: Path
    bytes: int
    rank: int | None
    error: float


@dataclass(frozen=True)
class ImportResult:
    subject: Path
    class_word: str
    model: str


def export_subject(
    subject_dir: Path | str,
    output: Path | str | None = None,
    rank: int = lowrank.RANK,
    full: bool = False,
    model: str | None = None,
    device: str = "auto",
    family: Family | None = None,
    on_progress: Progress | None = None,
) -> ExportResult:
    """Write a tuned subject as one file, `<subject>.p3s.safetensors` by default.

    The control goes in as a difference to its base of rank `rank`, or whole in fp16 with `full`. Raises
    InputError before the subject is tuned, and with another base than it was tuned on.
    """
    report, subject = on_progress or silent, Subject.open(Path(subject_dir))
    tuned = subject.tuned()
    family = family or load(model or tuned.settings["base"], device, vision=tuned.settings.get("vision"))
    subject.check_control(family.fingerprint())
    if subject.method != "p3s":
        raise InputError(f"{subject.root} is tuned by {subject.method}; only what p3s learnt is exported")
    report("factorising", 0, 1)
    tensors, _ = load_tensors(subject.path(CONTROL), sha=tuned.artifacts[CONTROL])
    parts = dict(tensors) if full else lowrank.split(tensors, family.unet, rank)
    error = lowrank.error(tensors, parts, family.unet)
    references = []
    for i, reference in enumerate(subject.manifest.references):
        mask = mask_tensors(subject, reference)
        parts |= {f"reference/{i}/{n}": _packed(t) if t.dtype == torch.uint8 else t for n, t in mask.items()}
        references.append(reference.model_dump(exclude={"mask"}) | {"mask": reference.mask.settings})
    described = {
        "format": FORMAT,
        "rank": None if full else rank,
        "class_word": subject.manifest.class_word,
        "identifier": subject.manifest.identifier,
        "model": subject.manifest.model,
        "finetune": tuned.settings,
        "seed": tuned.seed,
        "result": tuned.result,
        "references": references,
    }
    file = Path(output) if output else Path(f"{Path(subject_dir).name}.p3s.safetensors")
    save_tensors(file, parts, described)
    return ExportResult(subject.root, file, file.stat().st_size, described["rank"], error)


def import_subject(
    file: Path | str,
    output: Path | str | None = None,
    model: str | None = None,
    device: str = "auto",
    family: Family | None = None,
    on_progress: Progress | None = None,
) -> ImportResult:
    """Make a subject directory, ready to generate, of an exported file; default its name without the ending.

    Raises InputError if the file is no export, the directory exists, or the base is not the one the
    subject was tuned on, which its fingerprint tells.
    """
    report, file = on_progress or silent, Path(file)
    parts, described = load_tensors(file)
    if described.get("format") != FORMAT:
        raise InputError(f"{file} is not a subject that p3s export wrote; give such a file")
    root = Path(output) if output else Path(file.name.removesuffix(".safetensors").removesuffix(".p3s"))
    if root.exists():
        raise InputError(f"{root} exists already; name another directory with --output")
    tuned: dict[str, Any] = described["finetune"]
    report("loading the models", 0, 1)
    family = family or load(model or tuned["base"], device, vision=tuned.get("vision"))
    theirs, ours = tuned["base_fingerprint"], family.fingerprint()
    if theirs != ours:
        raise InputError(
            f"{file} was made on another base model ({theirs[:12]}, not {ours[:12]}); name that model with --model"
        )
    control = _control(parts, described, family)
    manifest = Manifest(
        class_word=described["class_word"], identifier=described["identifier"], model=described["model"]
    )
    subject = Subject(root, manifest)
    with subject.changing() as folder:
        for i, kept in enumerate(described["references"]):
            manifest.references.append(_reference(subject, folder, parts, i, kept))
        save_tensors(folder / CONTROL, control, tuned)
        manifest.finetune = Stage(
            inputs=subject.finetune_inputs(ours),
            settings=tuned,
            seed=described["seed"],
            artifacts=hashes(folder, CONTROL),
            result=described["result"] | {"imported_rank": described["rank"]},
        )
    return ImportResult(root, manifest.class_word, tuned["base"])


def _control(parts: dict[str, Tensor], described: dict, family: Family) -> dict[str, Tensor]:
    if described["rank"] is None:
        return {n: t for n, t in parts.items() if not n.startswith("reference/")}
    return lowrank.join(parts, _shapes(described["finetune"], family), family.unet)


def _shapes(tuned: dict, family: Family) -> dict[str, torch.Size]:
    """Of every tensor of a control with these settings on this base, without building one."""
    frozen, width = family.unet, family.vision.width  # loaded before, as nothing can be loaded onto no device
    with torch.device("meta"):
        unet = type(frozen).from_config(frozen.config)
        control = P3SControl(unet, width, settings.read_control(tuned["config"]))
    return {name: parameter.shape for name, parameter in control.named_parameters()}


def _reference(subject: Subject, folder: Path, parts: dict[str, Tensor], i: int, kept: dict) -> Reference:
    reference, prefix = Reference(**kept | {"mask": None}), f"reference/{i}/"
    name = f"{reference.folder}/mask.safetensors"
    found = {n.removeprefix(prefix): t for n, t in parts.items() if n.startswith(prefix)}
    unpacked = {n: _unpacked(t) if t.dtype == torch.uint8 else t for n, t in found.items()}
    save_tensors(folder / name, unpacked, {"stage": "import"})
    inputs = subject.mask_inputs(reference, kept["mask"])
    reference.mask = Stage(inputs=inputs, settings=kept["mask"], seed=0, artifacts=hashes(folder, name))
    return reference


def _packed(pixels: Tensor) -> Tensor:
    """uint8 (3, H, W) or (H, W) as the bytes of a PNG, which loses nothing and is a fraction as large."""
    buffer = io.BytesIO()
    array = pixels.permute(1, 2, 0) if pixels.ndim == 3 else pixels
    Image.fromarray(array.contiguous().numpy()).save(buffer, format="PNG")
    return torch.frombuffer(bytearray(buffer.getvalue()), dtype=torch.uint8)


def _unpacked(data: Tensor) -> Tensor:
    with Image.open(io.BytesIO(data.numpy().tobytes()), formats=("PNG",)) as image:
        array = torch.from_numpy(np.array(image))
    return array.permute(2, 0, 1) if array.ndim == 3 else array
