"""How much memory P3S needs for a family, and which memory profile a device gets. Counted, not measured.

Parameters are counted on the meta device, from the family's configurations or SD v1-5's. The one
figure that is not a count is SD v1-5's activations in training: 1.43 GB a sample at 512 x 512 in
bfloat16, 0.83 with checkpointing, scaled here by the latent's area and the U-Net's width.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPVisionConfig, CLIPVisionModel

from p3s_cli.config import MEMORY, ControlConfig, MemoryProfile
from p3s_cli.errors import InputError, P3SError
from p3s_cli.paper.model import P3SControl
from p3s_cli.sd import hub, single_file
from p3s_cli.sd.profile import Profile

R = TypeVar("R")
GB = 1e9
_ACTIVATIONS, _CHECKPOINTED = 1.43 * GB, 0.83 * GB
_PASS, _DECODE = 0.2 * GB, 0.6 * GB  # sampling, a sample and pass; decoding, an image; bfloat16, estimated
_SMALL = 2 * GB  # a family that takes less needs no economy anywhere
_RECORDED = 2.1  # times what a step takes: 32.4 and 16.0 GB of SD v1-5's, measured on a card
_RUNTIME = 0.8 * GB  # what CUDA and its libraries take for themselves


@dataclass(frozen=True)
class Sizes:
    """Parameters of the frozen U-Net, of what trains, and of VAE, text encoder and CLIP; `scale`: activations
    relative to SD v1-5's at 512 x 512."""

    unet: int
    control: int
    encoders: int
    scale: float

    @classmethod
    def of(cls, profile: Profile) -> Sizes:
        """From the family's own configurations where they are on this machine, else from SD v1-5's."""
        names = ("unet", "vae", "text_encoder", "clip")
        found = [_config(profile, n) for n in names]
        try:
            return cls._counted(profile.image_size, *(path.read_text() for path in found))
        except (ValueError, TypeError, AttributeError, KeyError, OSError) as error:
            places = ", ".join(str(path) for path in found)
            raise InputError(f"one of {places} is no configuration of its model ({error}); restore it") from error

    @classmethod
    @functools.cache
    def _counted(cls, image_size: int, *texts: str) -> Sizes:
        configs = dict(zip(("unet", "vae", "text_encoder", "clip"), map(json.loads, texts), strict=True))
        vision = configs["clip"].get("vision_config", configs["clip"])
        with torch.device("meta"):
            unet = UNet2DConditionModel.from_config(configs["unet"])
            text = CLIPTextModel(CLIPTextConfig(**configs["text_encoder"]))
            tower = CLIPVisionModel(CLIPVisionConfig(**vision))
            encoders = [AutoencoderKL.from_config(configs["vae"]), text, text, tower]  # the CLIP pair has a text tower
            control = P3SControl(unet, tower.config.hidden_size, ControlConfig())
        width = unet.config.block_out_channels[0]
        scale = (image_size / 512) ** 2 * width / 320
        return cls(count(unet), count(control), sum(count(m) for m in encoders), scale)

    def finetune(self, memory: MemoryProfile, dtype: torch.dtype, batch: int = 1) -> float:
        """Bytes that training takes: masters, their average, gradients, moments, frozen weights, activations."""
        master = 4 if memory.masters == "float32" else 2
        moments = 8 if memory.optimizer == "adamw" else 2
        activations = (_CHECKPOINTED if memory.checkpointing else _ACTIVATIONS) * dtype.itemsize / 2
        encoders = 0 if memory.offload else self.encoders
        return (
            self.control * ((3 if memory.average else 2) * master + moments)
            + (self.unet + encoders) * dtype.itemsize
            + batch * activations * self.scale
        )

    def generate(self, memory: MemoryProfile, dtype: torch.dtype, subjects: int = 1) -> float:
        """Bytes that sampling and decoding take."""
        encoders = 0 if memory.offload else self.encoders
        weights = (self.unet + subjects * self.control + encoders) * dtype.itemsize
        return weights + max(2 * _PASS, _DECODE) * memory.images * self.scale * dtype.itemsize / 2

    def mask(self, dtype: torch.dtype) -> float:
        """Bytes that finding the masks and removing the negative take; the inpainter is as large as the U-Net."""
        return (self.unet + self.encoders) * dtype.itemsize + max(_PASS, _DECODE) * self.scale * dtype.itemsize / 2


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def choose(
    name: str, profile: Profile, device: str, dtype: torch.dtype, tuning: bool = True
) -> tuple[str, MemoryProfile]:
    """A memory profile by name; `auto` is the one named after the device's memory, or the next with which it fits.

    A small family always gets the most generous one, so that its results do not depend on the machine.
    Raises InputError for an unknown name and, where it is for `tuning`, for one that this device cannot tune with.
    """
    usable = _usable(tuning and device.startswith("mps"))
    if name != "auto":
        if name not in MEMORY:
            raise InputError(f"no memory profile is called {name!r}; choose one of: auto, {', '.join(MEMORY)}")
        if name not in usable:
            least = min(usable, key=int)
            raise InputError(f"profile {name} tunes in float8, which {device} does not have; choose --memory {least}")
        return name, MEMORY[name]
    sizes, available = Sizes.of(profile), device_memory(device)
    needs = {key: _need(sizes, memory, dtype, int(profile.finetune["batch"])) for key, memory in MEMORY.items()}
    if available is None or needs["24"] < _SMALL:
        return "24", MEMORY["24"]
    for key, memory in usable.items():
        # a card of 24 GB reports a little less or more, depending on who counts
        if needs[key] + _RUNTIME <= available and memory.gigabytes * 0.92 * GB <= available:
            return key, memory
    return key, memory


def within(
    name: str,
    memory: MemoryProfile,
    work: Callable[[str, MemoryProfile], R],
    heeded: bool = True,
    tuning: bool = True,
) -> tuple[R, str | None]:
    """`work` under a profile and, where the device runs out of memory, once more under the next smaller one.

    Returns what it returned, and a sentence on what happened, or None. Raises P3SError if the second try
    runs out of memory too, there is no smaller profile, or the work is not `heeded`: the same under all of them.
    """
    try:
        return work(name, memory), None
    except RuntimeError as error:
        if not _out_of_memory(error):
            raise
        if not heeded:
            raise P3SError("out of memory, and this method has no way with less; use another --device") from error
        usable = _usable(tuning and "MPS" in str(error))
        less = next((key for key in usable if usable[key].gigabytes < memory.gigabytes), None)
        if less is None:
            raise P3SError(
                f"out of memory with profile {name}, which is the smallest here; use another --device"
            ) from error
    # outside the handler: while it lives, the exception holds on to the tensors of the first try
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    try:
        return work(less, MEMORY[less]), f"out of memory with profile {name}; went on with profile {less}"
    except RuntimeError as error:
        if not _out_of_memory(error):
            raise
        raise P3SError(
            f"out of memory with profile {name} and then with {less}; choose a smaller --memory or another --device"
        ) from error


def room_to_record(profile: Profile, memory: MemoryProfile, device: str, dtype: torch.dtype, batch: int) -> bool:
    """Whether the device holds a training step as a CUDA graph, whose activations keep a place of their own."""
    available = device_memory(device)
    needed = _RECORDED * Sizes.of(profile).finetune(memory, dtype, batch) + _RUNTIME
    return available is None or needed <= available


def _usable(tuning_on_mps: bool) -> dict[str, MemoryProfile]:
    """The profiles that will do, largest first: MPS has no float8, which the 8-bit optimiser keeps its moments in."""
    return {key: memory for key, memory in MEMORY.items() if not (tuning_on_mps and memory.optimizer == "adamw8")}


def _out_of_memory(error: RuntimeError) -> bool:
    """CUDA has a class of its own for it; MPS and the CPU say it in words."""
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error) or "can't allocate" in str(error)


def _need(sizes: Sizes, memory: MemoryProfile, dtype: torch.dtype, batch: int) -> float:
    return max(sizes.finetune(memory, dtype, batch), sizes.generate(memory, dtype))


def device_memory(device: str) -> int | None:
    """Bytes of the device's memory (the machine's, for cpu and mps); None where that cannot be told."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_properties(device).total_memory
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return None


def _config(profile: Profile, name: str) -> Path:
    inside = hub.folder(profile.part(name)) if any(p.name == name for p in profile.parts) else None
    return inside / "config.json" if inside else _bundled(name)


def _bundled(name: str) -> Path:
    return single_file.CONFIGS / {"clip": "vision"}.get(name, name) / "config.json"
