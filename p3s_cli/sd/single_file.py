"""Parts of a single-file SD v1 checkpoint (the original layout, as A1111 and ComfyUI use it), without a network.

The configurations such a file lacks are SD v1-5's, shipped in `profiles/sd15/`; diffusers does the
conversion of U-Net and VAE.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

from p3s_cli import signals
from p3s_cli.errors import InputError
from p3s_cli.sd import fetching

CONFIGS = Path(__file__).parent / "profiles" / "sd15"
_FIRST_CONVOLUTION = "model.diffusion_model.input_blocks.0.0.weight"
_TEXT_PREFIX = "cond_stage_model.transformer."


def scheduler_config(path: Path) -> dict:
    """SD v1-5's noise schedule, and what the checkpoint says that its U-Net predicts.

    Two marks of v-prediction are in use: a key `v_pred`, and ModelSpec's metadata. A file without either counts as
    SD v1-5.
    """
    config = json.loads((CONFIGS / "scheduler" / "scheduler_config.json").read_text())
    with safe_open(path, framework="pt") as file:
        told = (file.metadata() or {}).get("modelspec.prediction_type", "epsilon")
        predicts_v = told.startswith("v") or "v_pred" in file.keys()
    return config | {"prediction_type": "v_prediction" if predicts_v else "epsilon"}


def load_part(path: Path, part: str, configs: Path = CONFIGS) -> Any:
    """The `unet`, `vae` or `text_encoder` of the checkpoint. Raises InputError if it is not of the SD v1 layout."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from diffusers.loaders.single_file_utils import SingleFileComponentError

    kinds = {"unet": UNet2DConditionModel, "vae": AutoencoderKL}
    try:
        with signals.deferred():  # in the middle of a file, an interruption would pass for damage
            return _text_encoder(path, configs) if part not in kinds else _converted(kinds[part], path, part, configs)
    except (SingleFileComponentError, SafetensorError, OSError, KeyError, ValueError, RuntimeError) as error:
        raise InputError(
            f"{path} holds no {part} of the SD v1 layout ({fetching.first_line(error)}); give a full SD v1 checkpoint or a diffusers folder"
        ) from error


def _converted(kind: Any, path: Path, part: str, configs: Path) -> nn.Module:
    options = {}
    if part == "unet":  # 4 channels, or 9 of an inpainting model
        options["in_channels"] = _shape(path, _FIRST_CONVOLUTION)[1]
    return _whole(
        kind.from_single_file(str(path), config=str(configs), subfolder=part, local_files_only=True, **options)
    )


def _whole(model: nn.Module) -> nn.Module:
    """Raises KeyError if the file lacked a tensor, which is then on no device."""
    if missing := [name for name, tensor in model.state_dict().items() if tensor.is_meta]:
        raise KeyError(f"{len(missing)} tensors are missing, such as {missing[0]}")
    return model


def _shape(path: Path, key: str) -> list[int]:
    with safe_open(path, framework="pt") as file:
        return file.get_slice(key).get_shape()


def _text_encoder(path: Path, configs: Path) -> CLIPTextModel:
    model = CLIPTextModel(CLIPTextConfig.from_pretrained(configs / "text_encoder"))
    with safe_open(path, framework="pt") as file:
        keys = [k for k in file.keys() if k.startswith(_TEXT_PREFIX)]
        # checkpoints made from an early leak have no `text_model`
        found = {k.removeprefix(_TEXT_PREFIX).removeprefix("text_model."): file.get_tensor(k) for k in keys}
    own = {k.removeprefix("text_model."): k for k in model.state_dict()}  # transformers before 5.6 keeps the prefix
    found = {own.get(k, k): v for k, v in found.items() if not k.endswith("position_ids")}
    model.load_state_dict(found)
    return model
