"""Diffusers' models as one state dict in the original layout of SD v1, which A1111 and ComfyUI read."""

from __future__ import annotations

import torch
from torch import Tensor

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_TOP = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}


def unet_key(key: str, layers: int) -> str:
    """A diffusers U-Net key in the original layout; `layers` ResNets per down block."""
    for new, old in _TOP.items():
        if key.startswith(new + "."):
            return old + key.removeprefix(new)
    parts = key.split(".")
    if parts[0] == "mid_block":
        place = {"attentions": "1"}.get(parts[1]) or {"0": "0", "1": "2"}[parts[2]]
        where, kind, rest = f"middle_block.{place}", parts[1], parts[3:]
    else:
        block, kind, layer, rest = int(parts[1]), parts[2], int(parts[3]), parts[4:]
        if kind == "downsamplers":
            return f"input_blocks.{(block + 1) * (layers + 1)}.0.op.{rest[-1]}"
        if kind == "upsamplers":
            return f"output_blocks.{block * (layers + 1) + layers}.2.conv.{rest[-1]}"
        number = 1 + block * (layers + 1) + layer if parts[0] == "down_blocks" else block * (layers + 1) + layer
        where = f"{'input' if parts[0] == 'down_blocks' else 'output'}_blocks.{number}.{int(kind == 'attentions')}"
    if kind == "resnets":
        rest = [_RESNET[rest[0]], *rest[1:]]
    return ".".join([where, *rest])


def vae_key(key: str, blocks: int) -> str:
    """A diffusers VAE key in the original layout."""
    for new, old in (
        ("mid_block.resnets.0", "mid.block_1"),
        ("mid_block.resnets.1", "mid.block_2"),
        ("mid_block.attentions.0.group_norm", "mid.attn_1.norm"),
        ("mid_block.attentions.0.to_out.0", "mid.attn_1.proj_out"),
        ("mid_block.attentions.0.to_", "mid.attn_1."),
        ("conv_norm_out", "norm_out"),
        ("conv_shortcut", "nin_shortcut"),
        ("downsamplers.0", "downsample"),
        ("upsamplers.0", "upsample"),
        (".resnets.", ".block."),
    ):
        key = key.replace(new, old)
    for block in range(blocks):
        key = key.replace(f"down_blocks.{block}.", f"down.{block}.").replace(
            f"up_blocks.{block}.", f"up.{blocks - 1 - block}."
        )
    return key


def original_layout(unet, vae, text_encoder) -> dict[str, Tensor]:
    """Every tensor of a single-file checkpoint."""
    layers, blocks = unet.config.layers_per_block, len(vae.config.block_out_channels)
    state = {"model.diffusion_model." + unet_key(k, layers): v for k, v in unet.state_dict().items()}
    for key, value in vae.state_dict().items():
        attention = "mid_block.attentions" in key and value.ndim == 2
        state["first_stage_model." + vae_key(key, blocks)] = value[:, :, None, None] if attention else value
    for key, value in text_encoder.state_dict().items():
        state["cond_stage_model.transformer.text_model." + key.removeprefix("text_model.")] = value
    state["cond_stage_model.transformer.text_model.embeddings.position_ids"] = torch.arange(77)[None]
    return state
