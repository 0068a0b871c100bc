"""One family of models: U-Net, VAE, text encoder, CLIP pair, inpainter; found by name, loaded when first used.

    load("sd15") | load("world") | load("some/hub-id") | load("a/diffusers/folder") | load("model.safetensors")

What differs between families is data in a `p3s.json` beside the weights, or in `profiles/sd15.json`
where there is none. Only safetensors are ever loaded.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors import SafetensorError
from transformers import AutoModel, CLIPModel, CLIPTextModel, CLIPTokenizer

from p3s_cli.atomic import sha256
from p3s_cli.errors import InputError
from p3s_cli.sd import single_file
from p3s_cli.sd.vision import ClipPair, VisionTower

_PACKAGE = Path(__file__).parent.parent
_SD15 = _PACKAGE / "sd" / "profiles" / "sd15.json"
_WORLD = _PACKAGE / "world" / "weights"
_TOWERS = {"dinov2": "facebook/dinov2-small"}
_PICKLES = {".ckpt", ".pt", ".pth", ".bin", ".pkl"}

for _library in (diffusers, transformers):
    # their notices and progress bars are for their own users; ours read one sentence
    _library.utils.logging.set_verbosity_error()
    _library.utils.logging.disable_progress_bar()


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
    feature_side: int  # pixels of a square photo as the tower sees it for the masks
    finetune: dict[str, float]
    guidance: float
    nouns: tuple[str, ...]
    protocol: str  # how `p3s eval` scores where nothing else is asked for
    prompts: tuple[str, ...]  # what `p3s eval` draws of a subject: [V] stands for it, {} for its class word
    # settings by method, where this family needs others than a method's published ones
    methods: dict[str, dict[str, float]] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path, **overrides: Any) -> Profile:
        data = json.loads(path.read_text()) | overrides
        return cls(**data | {name: tuple(data[name]) for name in ("nouns", "prompts", "feature_layers")})


class Family:
    """The models of one family on one device; each part is loaded at its first use."""

    def __init__(self, source: str, profile: Profile, device: str, dtype: torch.dtype):
        self.source, self.profile, self.device, self.dtype = source, profile, device, dtype

    @cached_property
    def unet(self) -> UNet2DConditionModel:
        return self._frozen(self._base_part(UNet2DConditionModel, "unet"))

    @cached_property
    def vae(self) -> AutoencoderKL:
        vae = self._frozen(self._base_part(AutoencoderKL, "vae"))
        return vae.float() if self.dtype == torch.float16 else vae  # SD's VAE overflows in fp16

    @cached_property
    def text_encoder(self) -> CLIPTextModel:
        return self._frozen(self._base_part(CLIPTextModel, "text_encoder"))

    @cached_property
    def tokenizer(self) -> CLIPTokenizer:
        # a single-file checkpoint carries no tokenizer; CLIP's own repository has SD v1's
        single = Path(self.profile.base).suffix == ".safetensors"
        where, subfolder = (self._clip, None) if single else (self.profile.base, "tokenizer")
        return _fetch(CLIPTokenizer, where, subfolder)

    @cached_property
    def scheduler_config(self) -> dict:
        if Path(self.profile.base).suffix == ".safetensors":
            return single_file.scheduler_config()
        return dict(_fetch(diffusers.DDIMScheduler, self.profile.base, "scheduler").config)

    @cached_property
    def vision(self) -> ClipPair:
        clip = self._frozen(_fetch(CLIPModel, self._clip, None, use_safetensors=True))
        tokenizer = _fetch(CLIPTokenizer, self._clip_tokenizer, None)
        return ClipPair(
            clip, tokenizer, *_statistics(self._clip), self.profile.feature_layers, self.profile.feature_side
        )

    def mask_tower(self, name: str = "clip") -> VisionTower:
        """What the masks are read from: the family's own CLIP tower, `dinov2`, or any ViT of transformers.

        Raises InputError for a name that is neither, nor a folder or hub id with a ViT in it.
        """
        if name == "clip":
            return self.vision
        where = _TOWERS.get(name, name)
        if not Path(where).is_dir() and where.count("/") != 1:
            raise InputError(
                f"no vision tower is called {name!r}; use clip, {', '.join(_TOWERS)}, a folder or a hub id"
            )
        return VisionTower(
            self._frozen(_fetch(AutoModel, where, None, use_safetensors=True, trust_remote_code=False)),
            *_statistics(where),
        )

    @cached_property
    def inpaint_unet(self) -> UNet2DConditionModel | None:
        """The inpainting sibling's U-Net; the family's own where it is its own sibling; None where none is at hand."""
        if self.profile.inpainter is None:
            return None
        if self.profile.inpainter == ".":
            return self.unet
        try:
            return self._frozen(_fetch(UNet2DConditionModel, self.profile.inpainter, "unet", use_safetensors=True))
        except InputError:
            return None

    @property
    def folder(self) -> Path | None:
        """Where the family lies, if it is a folder: its own metric models are looked for in it."""
        path = Path(self.profile.base)
        return path if path.is_dir() else None

    def fingerprint(self) -> str:
        """sha256 over the files of U-Net, VAE and text encoder: what a trained control belongs to."""
        base = Path(self.profile.base)
        if base.is_file():
            return sha256(base)
        folder = base if base.is_dir() else _snapshot(self.profile.base)
        digest = hashlib.sha256()
        for part in ("unet", "vae", "text_encoder"):
            for file in sorted((folder / part).glob("*")):
                if file.suffix in {".json", ".safetensors"}:
                    digest.update(f"{part}/{file.name}:{sha256(file)}\n".encode())
        return digest.hexdigest()

    @property
    def _clip(self) -> str:
        inside = Path(self.profile.base) / self.profile.clip
        return str(inside) if inside.is_dir() else self.profile.clip

    @property
    def _clip_tokenizer(self) -> str:
        inside = Path(self._clip)
        beside = inside.parent / "tokenizer"
        return (
            str(beside)
            if inside.is_dir() and not (inside / "tokenizer.json").exists() and beside.is_dir()
            else self._clip
        )

    def _base_part(self, kind: Any, part: str) -> Any:
        if Path(self.profile.base).suffix == ".safetensors":
            return single_file.load_part(Path(self.profile.base), part)
        return _fetch(kind, self.profile.base, part, use_safetensors=True)

    def _frozen(self, model: Any) -> Any:
        return model.to(self.device, self.dtype).eval().requires_grad_(False)


def load(model: str = "sd15", device: str = "auto", dtype: str = "auto") -> Family:
    """Find a family by name, folder, single file or hub id; nothing is read but its profile.

    Raises InputError for a name that is none of these, a pickle, an unknown device or dtype.
    """
    where = resolve_device(device)
    return Family(model, _profile(model), where, resolve_dtype(dtype, where))


def _profile(model: str) -> Profile:
    path = Path(model).expanduser()
    if model == "sd15":
        return Profile.read(_SD15)
    if model == "world":
        path = _WORLD
    if path.suffix in _PICKLES:
        raise InputError(
            f"{model} is a pickle, which can run code when opened and is never loaded; convert it to .safetensors first"
        )
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
        if not path.is_file():
            raise InputError(f"{path} does not exist")
        return Profile.read(_SD15, name=path.stem, base=str(path))
    if model.count("/") == 1 and not model.startswith((".", "/", "~")):
        return Profile.read(_SD15, name=model, base=model)
    raise InputError(
        f"no model is called {model!r}; use sd15, world, a diffusers folder, a hub id such as owner/name, or a .safetensors file"
    )


def resolve_device(name: str) -> str:
    """`auto` prefers CUDA, then MPS, then the CPU. Raises InputError where the asked one is absent."""
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        return next(d for d in ("cuda", "mps", "cpu") if available[d])
    if name.split(":")[0] not in available:
        raise InputError(f"no device is called {name!r}; choose one of: auto, cuda, mps, cpu")
    if not available[name.split(":")[0]]:
        raise InputError(f"this machine has no {name} device that torch can use; try --device auto")
    return name


def resolve_dtype(name: str, device: str) -> torch.dtype:
    """`auto` is bfloat16 on CUDA and float32 elsewhere."""
    kinds = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name == "auto":
        return torch.bfloat16 if device.startswith("cuda") else torch.float32
    if name not in kinds:
        raise InputError(f"no dtype is called {name!r}; choose one of: auto, {', '.join(kinds)}")
    return kinds[name]


def _fetch(kind: Any, where: str, subfolder: str | None, **options: Any) -> Any:
    """`from_pretrained`, from the cache if it is there, else from the hub; an InputError that says what is missing."""
    if subfolder is not None:
        options["subfolder"] = subfolder
    try:
        return kind.from_pretrained(where, local_files_only=True, **options)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        if Path(where).exists():
            raise InputError(
                f"{_name(where, subfolder)} cannot be read ({_first_line(error)}); restore the folder"
            ) from error
        return _download(lambda: kind.from_pretrained(where, **options), where, subfolder)


def _statistics(where: str) -> tuple[list[float], list[float]]:
    """Pixel mean and deviation that a vision tower was trained with."""
    settings = transformers.image_processing_base.ImageProcessingMixin.get_image_processor_dict(where)[0]
    return settings["image_mean"], settings["image_std"]


def _download(get: Callable[[], Any], where: str, subfolder: str | None) -> Any:
    sentence = f"{_name(where, subfolder)} is not on this machine and cannot be fetched without a network; --model world needs neither"
    if os.environ.get("HF_HUB_OFFLINE", "").lower() in {"1", "true", "yes", "on"}:
        raise InputError(sentence)
    try:
        return get()
    except (OSError, ValueError) as error:
        raise InputError(sentence) from error


def _snapshot(repo: str) -> Path:
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(repo, local_files_only=True))


def _name(where: str, subfolder: str | None) -> str:
    return f"{where}/{subfolder}" if subfolder else where


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]
