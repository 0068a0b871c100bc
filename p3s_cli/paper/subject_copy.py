"""P3S eq. 6: the trainable copy F of a simplified U-Net, and which of its layers speaks to which frozen one.

The copy has one ResNet (+ transformer) per block; its up blocks, like the frozen ones, hold one more.
Names, never widths, decide every correspondence:

    frozen, L layers per block            copy               why
    down_blocks.i.attentions.0 .. L-1     ... .attentions.0  the block's only transformer
    mid_block.attentions.0                the same
    up_blocks.i.attentions.0 .. L-1       ... .attentions.0  deep skip
    up_blocks.i.attentions.L              ... .attentions.1  shallow skip: its skip width fits only there

For SD v1-5 (L = 2) that sends 6 + 1 + 9 = 16 transformer layers to 3 + 1 + 6 = 10.
"""

from __future__ import annotations

import re

import torch
from diffusers import UNet2DConditionModel

_UP = re.compile(r"^(up_blocks\.\d+\.(?:attentions|resnets))\.(\d+)\.(.*)$")
_DOWN = re.compile(r"^(down_blocks\.\d+\.(?:attentions|resnets))\.(\d+)\.(.*)$")


def frozen_name(copy_name: str, layers: int) -> str:
    """The frozen parameter that initialises this parameter of the copy; `layers` per block of the frozen U-Net."""
    match = _UP.match(copy_name)
    if match and match[2] == "1":
        return f"{match[1]}.{layers}.{match[3]}"
    return copy_name


def copy_name(frozen: str, layers: int) -> str:
    """The copy's layer that speaks to this layer of the frozen U-Net (the table above)."""
    if match := _DOWN.match(frozen):
        return f"{match[1]}.0.{match[3]}"
    if match := _UP.match(frozen):
        return f"{match[1]}.{int(int(match[2]) == layers)}.{match[3]}"
    return frozen


def attention_layers(unet: UNet2DConditionModel, which: str) -> list[str]:
    """Names of the self- (`attn1`) or cross-attention (`attn2`) layers, in the order of the forward pass."""
    names = [n for n, _ in unet.named_modules() if n.endswith(f".{which}")]
    stage = {"down_blocks": 0, "mid_block": 1, "up_blocks": 2}
    return sorted(names, key=lambda n: (stage[n.split(".")[0]], n))


def build_copy(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """The simplified U-Net, initialised from the frozen weights of the matching layers.

    Under `torch.device("meta")` it has shapes alone, for whoever brings the weights.
    """
    layers, bare = unet.config.layers_per_block, torch.get_default_device().type == "meta"
    with torch.device("meta"):  # no random start, which takes seconds at SD v1-5's size
        copy = UNet2DConditionModel.from_config(unet.config, layers_per_block=1)
    if bare:
        return copy.requires_grad_(True)
    frozen = unet.state_dict()
    # a copy in fp32 whatever the base is in; `clone`, because training it must never move the base
    start = {name: frozen[frozen_name(name, layers)].detach().float().clone() for name in copy.state_dict()}
    copy.load_state_dict(start, assign=True)
    return copy.requires_grad_(True)
