"""What this machine has for p3s and what it lacks (`doctor`), and how it gets it (`fetch`)."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import shlex
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from p3s_cli.config import MEMORY
from p3s_cli.errors import InputError
from p3s_cli.evals.models import MetricModel
from p3s_cli.evals.protocols import PROTOCOLS
from p3s_cli.methods import memory
from p3s_cli.sd import controlnet, fetching, hub, integrity
from p3s_cli.sd import family as families
from p3s_cli.sd import profile as profiles
from p3s_cli.sd.devices import resolve_device, resolve_dtype
from p3s_cli.sd.hub import Part

_FAMILIES = ("world",)  # whose name is a protocol's as well, which has nothing to fetch
_LIBRARIES = ("torch", "diffusers", "transformers", "huggingface_hub", "safetensors", "peft")


@dataclass(frozen=True)
class PartState:
    """A part of a family: where it comes from, where it lies here (None if missing), bytes of its files.

    `why` says why an optional part could not be fetched.
    """

    name: str
    source: str
    folder: Path | None
    bytes: int
    needed: bool
    state: str  # present, fetched, repaired or missing
    why: str | None = None


@dataclass(frozen=True)
class Report:
    """`needs`: bytes that each stage takes here, counted (`methods/memory.py`); `advice`: what to do, in order."""

    versions: dict[str, str]
    device: str
    device_bytes: int | None
    dtype: str
    offline: bool
    model: str
    parts: tuple[PartState, ...]
    memory: str
    needs: dict[str, int]
    advice: tuple[str, ...]


@dataclass(frozen=True)
class Wanted:
    """A family as the stages name it, with their `--vision`, `--inpainter` and `--control`."""

    model: str = "sd15"
    vision: str | None = None
    inpainter: str | None = None
    control: tuple[str, ...] = ()

    @classmethod
    def named(cls, model: str, vision: str | None, inpainter: str | None, control: Sequence[str] | None) -> Wanted:
        """Of the names as they are given, folders by their absolute paths, as the stages find them."""
        found = (name and profiles.located(name) for name in (model, vision, inpainter))
        return cls(*found, tuple(control or ()))

    @property
    def profile(self) -> profiles.Profile:
        # a tower for masks alone comes beside the family's CLIP, and not in its place
        pair = None if self._tower else self.vision
        return profiles.find(self.model, pair, self.inpainter)

    @property
    def _tower(self) -> Part | None:
        """What `vision` names, if that reads masks and nothing else: as far as is known here, for of what the hub has it may be a CLIP pair."""
        if self.vision is None or self.vision == "clip":
            return None
        part = families.tower(self.vision)
        inside = hub.folder(replace(part, also=(), weights=None))
        alone = inside is not None and _model_type(inside) not in (None, "clip")
        return part if alone or self.vision in families.TOWERS else None

    @property
    def parts(self) -> list[Part]:
        """Of the family, and what was named beside it. Raises InputError for a name that is nothing."""
        own = [
            replace(p, optional=p.optional and not (p.name == "inpainter" and self.inpainter))
            for p in self.profile.parts
        ]
        beside = [self._tower] if self._tower else []
        return own + beside + [controlnet.part(n) for n in self.control]

    @property
    def command(self) -> str:
        named = (("--vision", self.vision), ("--inpainter", self.inpainter), *(("--control", n) for n in self.control))
        return shlex.join(["p3s", "fetch", self.model, *(word for pair in named if pair[1] for word in pair)])


def _model_type(folder: Path) -> str | None:
    """What a model's configuration says it is; None where it says nothing."""
    try:
        return json.loads((folder / "config.json").read_text("utf-8"))["model_type"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def doctor(
    model: str = "sd15",
    device: str = "auto",
    dtype: str = "auto",
    vision: str | None = None,
    inpainter: str | None = None,
    control: Sequence[str] | None = None,
    on_progress=None,
) -> Report:
    """What is installed, what would be used, which models are here, what each stage needs, and what to do about it.

    `vision`, `inpainter` and `control` name models as the stages do. Looks at this machine only; nothing is
    fetched. Raises InputError for an unknown model, device or dtype.
    """
    wanted = Wanted.named(model, vision, inpainter, control)
    profile, device = wanted.profile, resolve_device(device)
    kind = resolve_dtype(dtype, device)
    parts = (*_checkpoint(profile), *(_state(p) for p in wanted.parts))
    name, chosen = memory.choose("auto", profile, device, kind)
    sizes, batch = memory.Sizes.of(profile), int(profile.finetune["batch"])
    needs = {
        "mask": int(sizes.mask(kind)),
        "finetune": int(sizes.finetune(chosen, kind, batch)),
        "generate": int(sizes.generate(chosen, kind)),
    }
    available = memory.device_memory(device)
    return Report(
        versions={"python": platform.python_version()} | {n: _version(n) for n in _LIBRARIES},
        device=device,
        device_bytes=available,
        dtype=str(kind).removeprefix("torch."),
        offline=fetching.offline(),
        model=model,
        parts=parts,
        memory=name,
        needs=needs,
        advice=tuple(_advice(wanted, device, parts, needs, available)),
    )


def _advice(wanted: Wanted, device: str, parts: tuple[PartState, ...], needs: dict, available: int | None) -> list[str]:
    advice = []
    missing = [p.name for p in parts if p.state == "missing" and p.needed]
    spared = [p.name for p in parts if p.state == "missing" and not p.needed]
    if missing or spared:
        first = "unset HF_HUB_OFFLINE, then run" if fetching.offline() else "run"
        advice.append(f"{first}: {wanted.command}   (missing: {', '.join(missing + spared)})")
    if "inpainter" in spared:
        advice.append("without the inpainter, p3s mask removes look-alikes with the base's own U-Net")
    if "safety_checker" in spared:
        advice.append("without the safety checker, p3s generate needs --no-safety-checker")
    if device == "cpu" and torch.version.cuda is None and shutil.which("nvidia-smi"):
        advice.append(
            "this machine has an NVIDIA card that torch is built without; install torch with CUDA (pytorch.org)"
        )
    if device == "cpu" and needs["finetune"] > memory.GB:
        advice.append(f"on a CPU {wanted.model} takes hours to tune; use a GPU, or --model world to try things out")
    if available is not None and max(needs.values()) > available:
        worst = max(needs, key=needs.__getitem__)
        advice.append(
            f"{worst} needs about {needs[worst] / memory.GB:.1f} GB and the device has {available / memory.GB:.1f}, "
            f"even with the profile for {min(MEMORY, key=int)} GB; use a larger one"
        )
    return advice


def fetch(
    model: str = "sd15",
    vision: str | None = None,
    inpainter: str | None = None,
    control: Sequence[str] | None = None,
    on_progress=None,
) -> list[PartState]:
    """Bring every part of a family, or a protocol's metric models, into the cache.

    `vision`, `inpainter` and `control` (ControlNets) name further models, as the stages do.

    Each file is held against what the hub says it is; of metric models, configuration and weights.

    Parts that are there are only checked; damaged files are fetched anew. An optional part that cannot
    be had is reported as missing, with the reason. Raises InputError for any other, in one sentence, and for models named beside a protocol.
    """
    report = on_progress or (lambda what, done, total: None)
    if model in PROTOCOLS and model not in _FAMILIES:
        if vision or inpainter or control:
            raise InputError(
                f"{model} names the metric models of a protocol; leave out --vision, --inpainter and --control, or name a family"
            )
        return [_fetch_metric(model, key, report) for key in PROTOCOLS[model].models]
    wanted = Wanted.named(model, vision, inpainter, control)
    hub.lists(wanted.profile.base, "safety_checker", online=True)  # brings the index that says which parts there are
    parts = sorted(wanted.parts, key=lambda p: p.optional)
    states = []
    for i, part in enumerate(parts):
        report(f"fetching and checking {part.name}", i, len(parts))
        try:
            states.append(_fetch(part, wanted.command))
        except InputError as error:
            if not part.optional:
                raise
            states.append(replace(_state(part, "missing"), why=str(error)))
    report("done", len(parts), len(parts))
    return states


def _fetch_metric(protocol: str, key: str, report) -> PartState:
    """One metric model of a protocol: loaded once, which fetches it. Raises InputError if it cannot be had."""
    where, how = PROTOCOLS[protocol].models[key]
    report(f"fetching and checking {where}", 0, 1)
    before = hub.snapshot(*hub.split(where))
    broken = _discard(integrity.damaged(_files(before)))
    MetricModel(where, how, command=f"p3s fetch {protocol}").load()
    found = hub.snapshot(*hub.split(where))
    if wrong := integrity.damaged(_files(found)):
        raise InputError(f"{wrong[0]} did not arrive as the hub says it is; run p3s fetch again")
    size = sum(f.stat().st_size for f in found.rglob("*") if f.is_file()) if found else 0
    return PartState(key, where, found, size, True, "repaired" if broken else "present" if before else "fetched")


def _files(folder: Path | None) -> list[Path]:
    """Configuration and weights; other files of a snapshot may be another program's."""
    return [*folder.glob("config.json"), *folder.glob("*.safetensors")] if folder else []


def _discard(broken: Sequence[Path]) -> bool:
    """Remove damaged files of the hub's cache, so that they come anew. Returns whether there were any.

    Raises InputError for files of a folder, and where the hub cannot be asked.
    """
    for file in broken:
        if not integrity.cached(file):
            raise InputError(f"{file} is damaged; restore it from where it came")
        if fetching.offline():
            raise InputError(f"{file} is damaged and HF_HUB_OFFLINE is set; unset it and run p3s fetch again")
    for file in broken:
        file.resolve().unlink(missing_ok=True)  # two names may have one content
        file.unlink()
    return bool(broken)


def _fetch(part: Part, command: str) -> PartState:
    found, state = hub.folder(part), "present"
    # a damaged index can make a part that is there look incomplete
    if _discard(integrity.damaged(hub.files(found, part) if found else hub.remains(part))):
        found, state = None, "repaired"
    if found is None:
        if Path(part.source).exists():
            raise InputError(f"{part.where} is missing or incomplete; restore the folder")
        found = hub.bring(part, command)
        state = "repaired" if state == "repaired" else "fetched"
        if broken := integrity.damaged(hub.files(found, part)):
            raise InputError(f"{broken[0]} did not arrive as the hub says it is; run p3s fetch again")
    return _state(part, state)


def _state(part: Part, state: str | None = None) -> PartState:
    found = hub.folder(part)
    size = sum(f.stat().st_size for f in hub.files(found, part)) if found else 0
    return PartState(
        part.name, part.where, found, size, not part.optional, state or ("present" if found else "missing")
    )


def _checkpoint(profile: profiles.Profile) -> list[PartState]:
    """A single file as a part of its own, for its U-Net, VAE and text encoder have no folders."""
    file = Path(profile.base)
    size = file.stat().st_size if profile.single else 0
    return [PartState("checkpoint", str(file), file, size, True, "present")] if profile.single else []


def _version(library: str) -> str:
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
