"""Parts of a single-file SD v1 checkpoint (the original layout, as A1111 and ComfyUI use it), without a network.

The configurations such a file lacks are SD v1-5's, shipped in `profiles/sd15/`; diffusers does the
conversion of U-Net and VAE.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.loaders.single_file_utils import SingleFileComponentError
from safetensors import SafetensorError, safe_open
from transformers import CLIPTextConfig, CLIPTextModel

from p3s_cli.errors import InputError

CONFIGS = Path(__file__).parent / "profiles" / "sd15"
_FIRST_CONVOLUTION = "model.diffusion_model.input_blocks.0.0.weight"
_TEXT_PREFIX = "cond_stage_model.transformer.text_model."


def scheduler_config() -> dict:
    """SD v1-5's noise schedule."""
    return json.loads((CONFIGS / "scheduler" / "scheduler_config.json").read_text())


def load_part(path: Path, part: str, configs: Path = CONFIGS) -> Any:
    """The `unet`, `vae` or `text_encoder` of the checkpoint. Raises InputError if it is not of the SD v1 layout."""
    try:
        if part == "text_encoder":
            return _text_encoder(path, configs)
        kind, options = {"unet": UNet2DConditionModel, "vae": AutoencoderKL}[part], {}
        if part == "unet":  # 4 channels, or 9 of an inpainting model
            options["in_channels"] = _shape(path, _FIRST_CONVOLUTION)[1]
        return kind.from_single_file(str(path), config=str(configs), subfolder=part, local_files_only=True, **options)
    except (SingleFileComponentError, SafetensorError, OSError, KeyError, ValueError, RuntimeError) as error:
        reason = str(error).strip().split("\n")[0]
        raise InputError(
            f"{path} holds no {part} of the SD v1 layout ({reason}); give a full SD v1 checkpoint or a diffusers folder"
        ) from error


def _shape(path: Path, key: str) -> list[int]:
    with safe_open(path, framework="pt") as file:
        return file.get_slice(key).get_shape()


def _text_encoder(path: Path, configs: Path) -> CLIPTextModel:
    model = CLIPTextModel(CLIPTextConfig.from_pretrained(configs / "text_encoder"))
    with safe_open(path, framework="pt") as file:
        found = {k.removeprefix(_TEXT_PREFIX): file.get_tensor(k) for k in file.keys() if k.startswith(_TEXT_PREFIX)}
    own = {k.removeprefix("text_model."): k for k in model.state_dict()}  # transformers before 5.6 keeps the prefix
    found = {own.get(k, k): v for k, v in found.items() if not k.endswith("position_ids")}
    model.load_state_dict(found)
    return model
