"""LoRAs on the base for a while, by diffusers' own loaders: its layout, kohya's, or a folder that peft wrote."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from diffusers import StableDiffusionPipeline
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from p3s_cli.errors import InputError
from p3s_cli.sd.family import Family
from p3s_cli.sd.pipeline import pipeline

_PEFT = "base_model.model."


@contextlib.contextmanager
def applied(family: Family, loras: Sequence[tuple[Path, float]]) -> Iterator[None]:
    """U-Net and text encoder with these LoRAs, each at its strength; without them, bit for bit, on exit.

    Raises InputError for a file that is no LoRA, or fits no layer of this base.
    """
    if not loras:
        yield
        return
    pipe = pipeline(StableDiffusionPipeline, family)
    try:
        for i, (path, _) in enumerate(loras):
            _load(pipe, path, f"lora{i}", family)
        pipe.set_adapters([f"lora{i}" for i in range(len(loras))], [strength for _, strength in loras])
        yield
    finally:
        pipe.unload_lora_weights()


def _load(pipe: StableDiffusionPipeline, path: Path, name: str, family: Family) -> None:
    sentence = f"{path} holds no LoRA that fits {family.source}; give one made for an SD v1 base, as .safetensors"
    try:
        pipe.load_lora_weights(read(path), adapter_name=name)
    except (ValueError, KeyError, IndexError, RuntimeError) as error:  # diffusers has no error of its own
        raise InputError(sentence) from error
    if not any(name in names for names in pipe.get_list_adapters().values()):
        raise InputError(sentence)


def read(path: Path) -> dict[str, Tensor]:
    """A LoRA's tensors as diffusers reads them: a .safetensors file as it is, a peft folder renamed and scaled.

    Raises InputError for a pickle, a missing or an unreadable file.
    """
    file = path / "adapter_model.safetensors" if path.is_dir() else path
    if file.suffix != ".safetensors":
        raise InputError(f"{path} is neither .safetensors nor a folder that peft wrote; only safetensors are loaded")
    try:
        tensors = load_file(file)
        return _from_peft(tensors, json.loads((path / "adapter_config.json").read_text())) if path.is_dir() else tensors
    except FileNotFoundError as error:
        raise InputError(f"{error.filename or file} does not exist") from error
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, ZeroDivisionError, RecursionError) as error:
        raise InputError(f"{path} is no LoRA that can be read ({error}); give another file") from error


def _from_peft(tensors: dict[str, Tensor], config: dict) -> dict[str, Tensor]:
    """Keys as diffusers has them. The scale alpha / r, which a peft folder keeps beside its tensors, goes into B."""
    rank = config["r"] ** (0.5 if config.get("use_rslora") else 1)
    renamed = {}
    for key, tensor in tensors.items():
        inner = key.removeprefix(_PEFT)
        part = "text_encoder" if "encoder.layers." in inner else "unet"
        scaled = tensor * (config["lora_alpha"] / rank) if "lora_B" in key else tensor
        renamed[f"{part}.{inner}"] = scaled
    return renamed
