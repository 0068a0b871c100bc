"""One family of models: U-Net, VAE, text encoder, CLIP pair, inpainter; found by name, loaded when first used.

    load("sd15") | load("world") | load("owner/name@revision") | load("a/diffusers/folder") | load("model.safetensors")

What differs between families is data (`profile.py`). Only safetensors are ever loaded.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shlex
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, CLIPModel, CLIPTextModel, CLIPTokenizer

from p3s_cli.atomic import sha256
from p3s_cli.errors import InputError
from p3s_cli.sd import hub, single_file
from p3s_cli.sd import profile as profiles
from p3s_cli.sd.devices import resolve_device, resolve_dtype
from p3s_cli.sd.fingerprints import fingerprint
from p3s_cli.sd.hub import Part
from p3s_cli.sd.libraries import diffusers
from p3s_cli.sd.profile import CLASSICAL, Profile
from p3s_cli.sd.vision import ClipPair, VisionTower
from p3s_cli.sd.vocabulary import clip_tokenizer, read_tokenizer

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker

_VIT = ("image_size", "patch_size", "hidden_size", "num_hidden_layers")
_ENCODERS = ("text_encoder", "vae", "vision")
TOWERS = {"dinov2": "facebook/dinov2-small@ed25f3a31f01632728cabb09d1542f84ab7b0056"}


class Family:
    """The models of one family on one device; each part is loaded at its first use."""

    def __init__(self, source: str, profile: Profile, device: str, dtype: torch.dtype):
        self.source, self.profile, self.device, self.dtype = source, profile, device, dtype
        self.inpainter_chosen = False  # by name, so that its absence is an error
        self.inpainter_missing: str | None = None  # why the base has taken the inpainter's place, once it has
        self.fetch = self.fetching()  # the command that brings what is missing

    def fetching(self, *options: str) -> str:
        """The command that brings this family, with these options, as a shell reads it."""
        return shlex.join(["p3s", "fetch", self.source, *options])

    @cached_property
    def unet(self) -> UNet2DConditionModel:
        return self._frozen(self._base_part(diffusers().UNet2DConditionModel, "unet"))

    @cached_property
    def vae(self) -> AutoencoderKL:
        vae = self._frozen(self._base_part(diffusers().AutoencoderKL, "vae"))
        return vae.float() if self.dtype == torch.float16 else vae  # SD's VAE overflows in fp16

    @cached_property
    def text_encoder(self) -> CLIPTextModel:
        return self._frozen(self._base_part(CLIPTextModel, "text_encoder"))

    @cached_property
    def tokenizer(self) -> CLIPTokenizer:
        if self.profile.single:
            return clip_tokenizer()
        return read_tokenizer(self.profile.part("tokenizer"), self.fetch)

    @cached_property
    def scheduler_config(self) -> dict:
        """The base's noise schedule. Three settings are SD's whatever the file says or leaves out, two of them as in diffusers' pipelines:
        many a folder was saved under a scheduler that has none, DDIM's own would clip latents as if they were pixels, and PNDM's would
        begin with four passes a step.
        """
        if self.profile.single:
            return single_file.scheduler_config(Path(self.profile.base))
        found = hub.from_pretrained(diffusers().DDIMScheduler, self.profile.base, "scheduler", fetch=self.fetch)
        config = dict(found.config)
        ours = {"clip_sample": False, "steps_offset": 1, "skip_prk_steps": True}
        unsaid = [name for name in config.get("_use_default_values", ()) if name not in ours]
        return config | ours | {"_use_default_values": unsaid}

    @cached_property
    def vision(self) -> ClipPair:
        clip = self._frozen(self._clip_model(self.profile.part("clip")))
        tokenizer = read_tokenizer(self.profile.clip_tokenizer, self.fetch)
        part = self.profile.part("clip")
        return ClipPair(
            clip,
            tokenizer,
            *_statistics(part),
            self.profile.feature_layers,
            self.profile.feature_side,
            as_filed=lambda: self._clip_model(part).vision_model,
        )

    def _clip_model(self, part: Part) -> CLIPModel:
        kind = hub.from_pretrained(AutoConfig, part.source, trust_remote_code=False, fetch=self.fetch).model_type
        if kind != "clip":
            raise InputError(f"{part.source} holds a {kind}, not a CLIP pair; name a CLIP model's folder")
        return hub.load(CLIPModel, part, self.fetch)

    def mask_tower(self, name: str = "clip") -> VisionTower:
        """What the masks are read from: the family's own CLIP tower, `dinov2`, or any ViT (or CLIP) of transformers.

        Raises InputError for a name that is neither, nor a folder or hub id with a ViT in it.
        """
        if name == "clip":
            return self.vision
        part = tower(name)
        fetch = self.fetching("--vision", name)

        def as_filed() -> nn.Module:
            model = hub.load(AutoModel, part, fetch, trust_remote_code=False)
            return getattr(model, "vision_model", model)

        model = as_filed()
        if not all(hasattr(model.config, field) for field in _VIT):
            raise InputError(f"{part.source} holds a {model.config.model_type}, not a ViT; name one, or a CLIP pair")
        return VisionTower(self._frozen(model), *_statistics(part), as_filed=as_filed)

    @cached_property
    def inpaint_unet(self) -> UNet2DConditionModel | None:
        """The inpainting sibling's U-Net (9 channels), or the base's own (4), which diffusers' pipeline takes as well.

        None where the family asks for the classical filler: a base that was never trained to inpaint, and
        knows no picture without a subject, paints another subject. Raises InputError if an inpainter that was asked for by name is not at hand,
        or reads another text than this family's.
        """
        sibling = self.profile.inpainter
        if sibling == CLASSICAL:
            return None
        if sibling in (None, "."):
            return self.unet
        fetch = self.fetching("--inpainter", sibling)
        try:
            found = self._sibling(sibling, fetch)
        except InputError as error:
            if self.inpainter_chosen:
                raise
            self.inpainter_missing = f"{error}; then give the command again with --force"
            return self.unet
        reads, written = found.config.cross_attention_dim, self.text_encoder.config.hidden_size
        if reads == written:
            return found
        # SD v1-5's inpainter beside a base of SD 2, which has none of its own here
        unfit = f"the inpainter {sibling} reads text of width {reads} and {self.source} writes {written}"
        if self.inpainter_chosen:
            raise InputError(f"{unfit}; name one made for this base, or --inpainter {CLASSICAL}")
        self.inpainter_missing = unfit
        return self.unet

    def _sibling(self, source: str, fetch: str) -> UNet2DConditionModel:
        if Path(source).suffix == ".safetensors":
            return self._frozen(single_file.load_part(Path(source), "unet"))
        return self._frozen(hub.load(diffusers().UNet2DConditionModel, self.profile.part("inpainter"), fetch))

    @contextlib.contextmanager
    def resting(self) -> Iterator[None]:
        """Text encoder, VAE and CLIP off the device, if they have been loaded, while the U-Nets work; then back."""
        self._move("cpu", _ENCODERS)
        try:
            yield
        finally:
            self._move(self.device, _ENCODERS)

    def _move(self, device: str, names: Sequence[str]) -> None:
        for name in names:
            if name in self.__dict__:
                getattr(self.__dict__[name], "clip", self.__dict__[name]).to(device)

    @cached_property
    def safety_checker(self) -> tuple[StableDiffusionSafetyChecker, Any] | None:
        """diffusers' safety checker and its preprocessing, where the base has one, as its model_index.json says."""
        if self.profile.single or not hub.lists(self.profile.base, "safety_checker", online=True):
            return None
        diffusers()
        from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
        from transformers import CLIPImageProcessor  # speaks up on import unless told not to, as it is by now

        checker = hub.load(StableDiffusionSafetyChecker, self.profile.part("safety_checker"), self.fetch)
        processor = hub.from_pretrained(CLIPImageProcessor, self.profile.base, "feature_extractor", fetch=self.fetch)
        return self._frozen(checker), processor

    @property
    def folder(self) -> Path | None:
        """Where the family lies, if it is a folder: its own metric models are looked for in it."""
        path = Path(self.profile.base)
        return path if path.is_dir() else None

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over the files of U-Net, VAE and text encoder: what a trained control belongs to."""
        base = Path(self.profile.base)
        if base.is_file():
            return sha256(base)
        digest = hashlib.sha256()
        for name in ("unet", "vae", "text_encoder"):
            part = self.profile.part(name)
            inside = hub.folder(part)
            if inside is None and hub.is_id(part.source):
                inside = hub.bring(part, self.fetch)  # no stage before may have needed it
            if inside is None:
                raise InputError(f"{part.where} is not on this machine yet; fetch it with: {self.fetch}")
            # what else lies there, other precisions and formats, is not loaded and says nothing of the base
            for file in hub.loaded(inside, part):
                digest.update(f"{name}/{file.name}:{sha256(file)}\n".encode())
        return digest.hexdigest()

    @cached_property
    def pair_fingerprint(self) -> str | None:
        """sha256 over the files of the CLIP pair, the same in every precision; None for one that was made in memory."""
        found = fingerprint(self.profile, "clip")
        if found is None:
            _ = self.vision  # is fetched
            found = fingerprint(self.profile, "clip")
        return found

    def _base_part(self, kind: Any, name: str) -> Any:
        if self.profile.single:
            return single_file.load_part(Path(self.profile.base), name)
        return hub.load(kind, self.profile.part(name), self.fetch)

    def _frozen(self, model: Any) -> Any:
        for name, parameter in model.named_parameters():
            if not torch.isfinite(parameter).all():
                raise InputError(
                    f"{self.source} holds weights that are not finite ({type(model).__name__}, {name}); restore it"
                )
        return model.to(self.device, self.dtype).eval().requires_grad_(False)


def load(
    model: str = "sd15",
    device: str = "auto",
    dtype: str = "auto",
    vision: str | None = None,
    inpainter: str | None = None,
) -> Family:
    """Find a family by name, folder, single file or hub id; nothing is read but its profile.

    `vision` is another CLIP pair than the family's, `inpainter` another inpainting U-Net: a folder, a
    hub id, and for the inpainter a single file too. Raises InputError for a name that is none of these,
    a pickle, an unknown device or dtype.
    """
    model, vision, inpainter = (s and profiles.located(s) for s in (model, vision, inpainter))
    where, profile = resolve_device(device), profiles.find(model, vision, inpainter)
    family = Family(model, profile, where, resolve_dtype(dtype, where))
    family.inpainter_chosen = inpainter is not None
    if vision not in (None, "clip"):
        family.fetch = family.fetching("--vision", vision)
    return family


def tower(name: str) -> Part:
    """The files of what masks are read from, other than a family's CLIP: `dinov2`, a folder or a hub id.

    Raises InputError for a name that is none of these.
    """
    where = TOWERS.get(name, name)
    if not Path(where).is_dir() and not hub.is_id(where):
        raise InputError(f"no vision tower is called {name!r}; use clip, {', '.join(TOWERS)}, a folder or a hub id")
    return Part("masks", where, weights="model", also=("preprocessor_config.json",))


def _statistics(part: Part) -> tuple[list[float], list[float]]:
    """Pixel mean and deviation that a vision tower, which is here, was trained with."""
    name, inside = "preprocessor_config.json", hub.folder(part)
    if inside is not None and not (inside / name).is_file() and not Path(part.source).exists():
        inside = hub.bring(part)
    try:
        settings = json.loads(((inside or Path(part.source)) / name).read_text())
        return settings["image_mean"], settings["image_std"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{part.where} has no {name} with image_mean and image_std; restore it, or fetch the model again"
        ) from error
