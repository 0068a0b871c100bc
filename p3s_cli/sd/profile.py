"""What is particular to a family, and which files it is made of: data, by name. No torch in here.

A `p3s.json` beside the weights says it, or `profiles/sd15.json` where there is none.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from p3s_cli.atomic import read_text
from p3s_cli.config import Schedule
from p3s_cli.errors import InputError, first_reason
from p3s_cli.sd import hub
from p3s_cli.sd.hub import Part

_PACKAGE = Path(__file__).parent.parent
_SD15 = _PACKAGE / "sd" / "profiles" / "sd15.json"
_WORLD = _PACKAGE / "world" / "weights"
_WORDS = ("tokenizer.json", "vocab.json")
_TEXT_FILES = ("merges.txt", "tokenizer_config.json", "special_tokens_map.json")
_PICKLES = {".ckpt", ".pt", ".pth", ".bin", ".pkl"}


CLASSICAL = "classical"  # an inpainter that is none: the region takes the blend of its border
NAMES = ("sd15", "world", "clip", "dinov2", CLASSICAL)  # of ours, whatever folders there are


@dataclass(frozen=True)
class Profile:
    """What is particular to a family (`p3s.json`): sources, sizes in pixels, recommended settings."""

    name: str
    base: str
    clip: str
    inpainter: str | None
    image_size: int
    identifier: str
    feature_layers: tuple[int, ...]  # of the vision tower's hidden states, averaged for the masks
    feature_side: int  # pixels of a square photo as the tower sees it for the masks; 0 and () are the tower's own
    finetune: dict[str, int | float]
    guidance: float
    subject_guidance: float
    nouns: tuple[str, ...]
    protocol: str  # how `p3s eval` scores where nothing else is asked for
    prompts: tuple[str, ...]  # what `p3s eval` draws of a subject: [V] stands for it, {} for its class word
    schedule: Schedule = "quadratic"  # of P3S's weight
    # settings by method, where this family needs others than a method's published ones
    methods: dict[str, dict[str, int | float]] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path, **overrides: Any) -> Profile:
        """Raises InputError for a file that does not say what a profile says."""
        try:
            data = json.loads(read_text(path)) | overrides
            return TypeAdapter(cls).validate_python(data)
        except (OSError, ValueError, TypeError, RecursionError) as error:
            raise InputError(f"{path} is not the profile of a family ({first_reason(error)}); restore it") from error

    @property
    def single(self) -> bool:
        return Path(self.base).suffix == ".safetensors"

    @property
    def clip_source(self) -> str:
        inside = Path(self.base) / self.clip
        return str(inside) if inside.is_dir() else self.clip

    @property
    def clip_tokenizer(self) -> Part:
        """The CLIP pair's tokenizer, which may lie beside its folder."""
        inside = Path(self.clip_source)
        beside = inside.parent / "tokenizer"
        apart = inside.is_dir() and not (inside / "tokenizer.json").exists() and beside.is_dir()
        return Part("clip tokenizer", str(beside) if apart else self.clip_source, any_of=_WORDS, also=_TEXT_FILES)

    @cached_property
    def parts(self) -> list[Part]:
        """The folders this family is made of, but for those a single file holds."""
        model, base, clip = "diffusion_pytorch_model", self.base, self.clip_source
        own = [
            Part("unet", base, "unet", model),
            Part("vae", base, "vae", model),
            Part("text_encoder", base, "text_encoder", "model"),
            Part("tokenizer", base, "tokenizer", any_of=_WORDS, also=_TEXT_FILES),
            Part("scheduler", base, "scheduler", any_of=("scheduler_config.json",)),
        ]
        if self.single:  # what such a file does not carry ships with us
            own = []
        vision_files = ("preprocessor_config.json", *_WORDS, *_TEXT_FILES)
        parts = [*own, Part("clip", clip, weights="model", also=vision_files)]
        sibling = self.inpainter
        if sibling not in (None, ".", CLASSICAL) and Path(sibling).suffix != ".safetensors":
            # half precision is enough to fill a region with, and half the download
            parts.append(Part("inpainter", sibling, "unet", model, variants=("fp16", None), optional=True))
        if not self.single and hub.lists(base, "safety_checker"):
            parts.append(Part("safety_checker", base, "safety_checker", "model", optional=True))
            settings = ("preprocessor_config.json",)
            parts.append(Part("feature_extractor", base, "feature_extractor", any_of=settings, optional=True))
        return parts

    def part(self, name: str) -> Part:
        return next(p for p in self.parts if p.name == name)


def located(source: str) -> str:
    """The same source, as an absolute path where it names a file or folder: a subject remembers it wherever it is used."""
    path = Path(source).expanduser()
    return str(path.absolute()) if source not in NAMES and path.exists() else source


def find(model: str, vision: str | None = None, inpainter: str | None = None) -> Profile:
    """The profile of a family by name, folder, single file or hub id; nothing else is read.

    `vision` and `inpainter` put other sources in its place. Raises InputError for a name that is none.
    """
    profile = _named(model)
    if vision not in (None, "clip", profile.clip):
        if not Path(vision).is_dir() and not hub.is_id(vision):
            raise InputError(f"no CLIP tower is called {vision!r}; name a folder or a hub id")
        profile = replace(profile, clip=vision, feature_layers=(), feature_side=0)
    if inpainter is not None:
        if inpainter != CLASSICAL:
            _check_inpainter(inpainter)
        profile = replace(profile, inpainter=inpainter)
    return profile


def _check_inpainter(name: str) -> None:
    _check_source(name)
    path = Path(name).expanduser()
    if not path.is_dir() and path.suffix != ".safetensors" and not hub.is_id(name):
        raise InputError(
            f"no inpainter is called {name!r}; name a folder, a .safetensors file or a hub id, or {CLASSICAL}"
        )


def _check_source(name: str) -> None:
    path = Path(name).expanduser()
    if path.suffix in _PICKLES:
        raise InputError(
            f"{name} is a pickle, which can run code when opened and is never loaded; convert it to .safetensors first"
        )
    if path.suffix == ".safetensors" and not path.is_file():
        raise InputError(f"{path} does not exist")


def _named(model: str) -> Profile:
    path = Path(model).expanduser()
    if model == "sd15":
        return Profile.read(_SD15)
    if model == "world":
        path = _WORLD
    _check_source(model)
    if path.is_dir():
        if not (path / "unet").is_dir():
            raise InputError(
                f"{path} is not a diffusers folder (it has no unet/); give one, or a single .safetensors file"
            )
        own = path / "p3s.json"
        return (
            Profile.read(own, base=str(path)) if own.exists() else Profile.read(_SD15, name=path.name, base=str(path))
        )
    if path.suffix == ".safetensors":
        return Profile.read(_SD15, name=path.stem, base=str(path))
    if hub.is_id(model):
        return Profile.read(_SD15, name=model, base=model)
    raise InputError(
        f"no model is called {model!r}; use sd15, world, a diffusers folder, a hub id such as owner/name, or a .safetensors file"
    )
