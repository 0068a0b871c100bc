"""LoRAs on the base for a while, by diffusers' own loaders: its layout, kohya's, or a folder that peft wrote."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from diffusers import StableDiffusionPipeline
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from p3s_cli import signals
from p3s_cli.errors import InputError
from p3s_cli.sd.family import Family
from p3s_cli.sd.pipeline import pipeline

_PEFT = "base_model.model."
_PARTS = ("unet", "text_encoder")
_UNREADABLE = (
    SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError, ZeroDivisionError, RecursionError, re.error,
)  # fmt: skip


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
    """A LoRA's tensors as diffusers reads them, a peft folder's renamed, all with their whole scale.

    Raises InputError for a pickle, a missing or an unreadable file.
    """
    file = path / "adapter_model.safetensors" if path.is_dir() else path
    if file.suffix != ".safetensors":
        raise InputError(f"{path} is neither .safetensors nor a folder that peft wrote; only safetensors are loaded")
    try:
        with signals.deferred():  # in the middle of a file, an interruption would pass for damage
            tensors = load_file(file)
        if not path.is_dir():
            return _scaled(tensors, _header(file))
        config = json.loads((path / "adapter_config.json").read_text())
        return _scaled(_renamed(tensors), dict.fromkeys(_PARTS, config))
    except FileNotFoundError as error:
        raise InputError(f"{error.filename or file} does not exist") from error
    except _UNREADABLE as error:
        raise InputError(f"{path} is no LoRA that can be read ({error}); give another file") from error


def _renamed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Keys of a peft folder as diffusers has them."""
    inner = {key.removeprefix(_PEFT): tensor for key, tensor in tensors.items()}
    return {f"{'text_encoder' if 'encoder.layers.' in k else 'unet'}.{k}": tensor for k, tensor in inner.items()}


def _header(file: Path) -> dict[str, dict]:
    """peft's configuration of each part, which diffusers writes into the header; empty where there is none."""
    with safe_open(file, framework="pt") as opened:
        told = json.loads((opened.metadata() or {}).get(LORA_ADAPTER_METADATA_KEY, "{}"))
    configs: dict[str, dict] = {}
    for key, value in told.items():
        part, _, name = key.partition(".")
        configs.setdefault(part, {})[name] = value
    return configs


def _scaled(tensors: Mapping[str, Tensor], configs: Mapping[str, dict]) -> dict[str, Tensor]:
    """The scale alpha / r goes into B (`up` in diffusers' older keys), for peft keeps it beside its tensors."""
    scaled = dict(tensors)
    for key, tensor in tensors.items():
        part, _, inner = key.partition(".")
        if part in configs and ("lora_B" in inner or ".up." in inner):
            scaled[key] = tensor * _scale(inner.split(".lora")[0], configs[part])
    return scaled


def _scale(module: str, config: dict) -> float:
    """alpha / r of a module, each its own where a pattern names the module, as peft matches it."""

    def own(name: str, usual: float) -> float:
        patterns = config.get(name) or {}
        return next((v for k, v in patterns.items() if re.match(rf"(.*\.)?({k})$", module)), usual)

    rank = own("rank_pattern", config["r"])
    return own("alpha_pattern", config["lora_alpha"]) / rank ** (0.5 if config.get("use_rslora") else 1)
