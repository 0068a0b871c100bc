"""A tuned subject as one small file, and back: what `p3s export` and `p3s import` do.

The file is safetensors with a JSON description. It holds the control, in fp16 or as a low-rank difference
to its base, and of each reference what drawing needs: the inpainted pixels and the mask; never the photo.
Of a model that is a file or folder of the exporter's it has the name only, `./name`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from p3s_cli import config as settings
from p3s_cli.errors import InputError
from p3s_cli.lock import reading, unfinished, writing
from p3s_cli.manifest import SEEN_BY, Manifest, Reference, Stage
from p3s_cli.methods import lowrank
from p3s_cli.methods.base import Learnt, check_made_for
from p3s_cli.methods.photos import mask_tensors
from p3s_cli.paper.model import P3SControl
from p3s_cli.sd.family import Family, load
from p3s_cli.sd.fingerprints import fingerprint
from p3s_cli.sd.weights import save_tensors
from p3s_cli.stages.exported import FORMAT, Exported, Kept, packed, read_description, read_tensors, unpacked
from p3s_cli.stages.progress import Progress, silent
from p3s_cli.subject import CONTROL, Subject, hashes, mask_layout


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
    InputError before the subject is tuned, with another base than it was tuned on, and for a file that is something else.
    """
    report, subject = on_progress or silent, Subject.open(Path(subject_dir))
    if rank < 1:
        raise InputError(f"a difference of rank {rank} holds nothing; give at least --rank 1")
    file = Path(output) if output else Path(f"{subject.root.resolve().name}.p3s.safetensors")
    _check_free(file, subject.root)
    with reading(subject.root, what="p3s export"):
        subject = Subject.open(subject.root)  # as it is now that nobody writes
        subject.check_masks()
        tuned = subject.tuned()
        family = family or load(model or tuned.settings["base"], device, vision=tuned.settings.get("vision"))
        check_made_for(subject, family)
        if subject.method != "p3s":
            raise InputError(f"{subject.root} is tuned by {subject.method}; only what p3s learnt is exported")
        report("factorising", 0, 1)
        tensors = Learnt.read(subject).tensors
        masks = [mask_tensors(subject, reference) for reference in subject.manifest.references]
    parts = dict(tensors) if full else lowrank.split(tensors, family.unet, rank)
    error = lowrank.error(tensors, parts, family.unet)
    for i, mask in enumerate(masks):
        parts |= {f"reference/{i}/{n}": packed(t) if t.dtype == torch.uint8 else t for n, t in mask.items()}
    described = _description(subject, None if full else rank, family.dtype)
    save_tensors(file, parts, described)
    return ExportResult(subject.root, file, file.stat().st_size, described["rank"], error)


def _check_free(file: Path, root: Path) -> None:
    """Raises InputError for a place inside the subject, a directory, and a file that is no export."""
    if file.resolve().is_relative_to(root.resolve()):
        raise InputError(f"{file} lies inside the subject {root}; name a file elsewhere with --output")
    if file.is_dir():
        raise InputError(
            f"{file} is a directory; name a file with --output, such as {file / 'subject.p3s.safetensors'}"
        )
    if file.exists():
        try:
            read_description(file)
        except InputError as error:
            raise InputError(
                f"{file} exists and is no subject that p3s export wrote; name another file with --output"
            ) from error


def _description(subject: Subject, rank: int | None, dtype: torch.dtype) -> dict[str, Any]:
    """What goes beside the tensors; `Exported` reads it. `dtype`: of the base that the control is told from."""
    tuned, references = subject.tuned(), subject.manifest.references
    return {
        "format": FORMAT,
        "rank": rank,
        "base_dtype": str(dtype).removeprefix("torch."),
        "class_word": subject.manifest.class_word,
        "identifier": subject.manifest.identifier,
        "model": _placeless(subject.manifest.model),
        "finetune": _placeless(tuned.settings),
        "seed": tuned.seed,
        "result": tuned.result,
        "references": [
            r.model_dump(exclude={"mask"}) | {"mask": _placeless(r.mask.settings)} for r in references if r.mask
        ],
    }


def _placeless(value: Any) -> Any:
    """The same without the folders of this machine; `./name` is no name of a family, nor of its own CLIP."""
    if isinstance(value, dict):
        return {name: _placeless(each) for name, each in value.items()}
    return f"./{Path(value).name}" if isinstance(value, str) and Path(value).is_absolute() else value


def import_subject(
    file: Path | str,
    output: Path | str | None = None,
    model: str | None = None,
    vision: str | None = None,
    device: str = "auto",
    family: Family | None = None,
    on_progress: Progress | None = None,
) -> ImportResult:
    """Make a subject directory, ready to generate, of an exported file; default its name without the ending.

    `model` and `vision` say where the base and the CLIP pair of its tuning lie here, if not where the file says.
    Raises InputError if the file is no export, the directory exists, or base or CLIP pair are not those of the
    tuning, which their fingerprints tell.
    """
    report, file = on_progress or silent, Path(file)
    described = read_description(file)
    root = Path(output) if output else Path(file.name.removesuffix(".safetensors").removesuffix(".p3s"))
    left = root.exists()  # by an import that was killed
    if left and not unfinished(root):
        raise _taken(root)
    report("loading the models", 0, 1)
    family = family or _base(file, described, model, vision, device)
    theirs, ours = described.finetune["base_fingerprint"], family.fingerprint
    if theirs != ours:
        raise InputError(
            f"{file} was made on another base model ({theirs[:12]}, not {ours[:12]}); name that model with --model"
        )
    tuned = described.finetune | {"base": family.source, "vision": family.profile.clip}  # where they lie here
    shapes = _shapes(tuned, family)
    _check_pair(file, described, family)  # now that the pair is here, fetched perhaps
    parts = read_tensors(file, described, shapes)
    control = _joined(described, parts, shapes, family) if described.rank else {n: parts[n] for n in shapes}
    manifest = Manifest(class_word=described.class_word, identifier=described.identifier, model=family.source)
    subject = Subject(root, manifest)
    with writing(root, "p3s import"):
        if Subject.exists(root) and not left:  # made by another process while this one was reading
            raise _taken(root)
        with subject.changing() as folder:
            for i, kept in enumerate(described.references):
                manifest.references.append(_reference(file, subject, folder, parts, i, kept))
            save_tensors(folder / CONTROL, control, tuned)
            manifest.finetune = Stage(
                inputs=subject.finetune_inputs(ours),
                settings=tuned,
                seed=described.seed,
                artifacts=hashes(folder, CONTROL),
                result=described.result | {"imported_rank": described.rank},
            )
    return ImportResult(root, manifest.class_word, tuned["base"])


def _taken(root: Path) -> InputError:
    return InputError(f"{root} exists already; name another directory with --output")


def _base(file: Path, described: Exported, model: str | None, vision: str | None, device: str) -> Family:
    """The family that the file is made on. Raises InputError, with the option, for a model that is not here."""
    base = _place(file, model, described.finetune["base"], "--model")
    pair = _place(file, vision, described.finetune.get("vision"), "--vision")
    return load(base, device, "float32" if described.base_dtype else "auto", pair)  # which rounds to any other


def _check_pair(file: Path, described: Exported, family: Family) -> None:
    """Raises InputError if the CLIP pair here is not the one of the tuning, as far as both are known by their files."""
    theirs, ours = described.finetune.get(SEEN_BY), fingerprint(family.profile, "clip")
    if theirs and ours and theirs != ours:
        raise InputError(
            f"{file} was tuned through another CLIP pair ({theirs[:12]}, not {ours[:12]}); name that one with --vision"
        )


def _place(file: Path, given: str | None, theirs: Any, option: str) -> Any:
    """What is given, and otherwise what the file says, unless that is a place on another machine."""
    path = theirs is not None and (theirs.startswith("./") or Path(theirs).is_absolute())
    if given is None and path and not Path(theirs).exists():
        raise InputError(
            f"{file} was made on a model of its exporter's, {Path(theirs).name}, which is not here; name it with {option}"
        )
    return given or theirs


def _joined(
    described: Exported, parts: dict[str, Tensor], shapes: dict[str, torch.Size], family: Family
) -> dict[str, Tensor]:
    """The control, told from a base of the dtype it was split from; one in another than float32 is loaded for that."""
    if described.base_dtype is None:
        return lowrank.join(parts, shapes, family.unet)
    dtype = getattr(torch, described.base_dtype)
    if family.dtype not in (dtype, torch.float32):
        family = Family(family.source, family.profile, "cpu", torch.float32)
    return lowrank.join(parts, shapes, family.unet, dtype)


def _shapes(tuned: dict, family: Family) -> dict[str, torch.Size]:
    """Of every tensor of a control with these settings on this base, without building one."""
    frozen, width = family.unet, family.vision.width  # loaded before, as nothing can be loaded onto no device
    with torch.device("meta"):
        unet = type(frozen).from_config(frozen.config)
        control = P3SControl(unet, width, settings.read_control(tuned.get("config")))
    return {name: parameter.shape for name, parameter in control.named_parameters()}


def _reference(file: Path, subject: Subject, folder: Path, parts: dict[str, Tensor], i: int, kept: Kept) -> Reference:
    reference = Reference(**kept.model_dump(exclude={"mask"}))
    name, layout = reference.mask_file, mask_layout(reference)
    found = {n: parts[f"reference/{i}/{n}"] for n in layout}
    try:
        tensors = {n: unpacked(t, layout[n][1]) if t.dtype == torch.uint8 else t for n, t in found.items()}
    except Exception as error:  # whatever a parser runs into in a file that anyone may have made
        raise InputError(
            f"{file} holds no readable picture of {reference.folder} ({error}); export it again"
        ) from error
    save_tensors(folder / name, tensors, {"stage": "import"})
    inputs = subject.mask_inputs(reference, kept.mask)
    reference.mask = Stage(inputs=inputs, settings=kept.mask, seed=0, artifacts=hashes(folder, name))
    return reference
