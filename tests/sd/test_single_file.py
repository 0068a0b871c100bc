"""Single-file checkpoints of the SD v1 layout, on a small twin written by hand in that layout."""

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel

from p3s_cli.errors import InputError
from p3s_cli.sd import single_file
from p3s_cli.sd.family import load

LAYERS = 1
RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
TOP = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}


def unet_key(key: str) -> str:
    """A diffusers U-Net key in the original layout."""
    for new, old in TOP.items():
        if key.startswith(new + "."):
            return old + key.removeprefix(new)
    parts = key.split(".")
    if parts[0] == "mid_block":
        place = {"attentions": "1"}.get(parts[1]) or {"0": "0", "1": "2"}[parts[2]]
        where, kind, rest = f"middle_block.{place}", parts[1], parts[3:]
    else:
        block, kind, layer, rest = int(parts[1]), parts[2], int(parts[3]), parts[4:]
        if kind == "downsamplers":
            return f"input_blocks.{(block + 1) * (LAYERS + 1)}.0.op.{rest[-1]}"
        if kind == "upsamplers":
            return f"output_blocks.{block * (LAYERS + 1) + LAYERS}.2.conv.{rest[-1]}"
        number = 1 + block * (LAYERS + 1) + layer if parts[0] == "down_blocks" else block * (LAYERS + 1) + layer
        where = f"{'input' if parts[0] == 'down_blocks' else 'output'}_blocks.{number}.{int(kind == 'attentions')}"
    if kind == "resnets":
        rest = [RESNET[rest[0]], *rest[1:]]
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


@pytest.fixture(scope="module")
def twin(tmp_path_factory):
    """(file, configurations, models) of a random small family."""
    folder = tmp_path_factory.mktemp("twin")
    torch.manual_seed(0)
    models = {
        "unet": UNet2DConditionModel(
            sample_size=8,
            down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
            block_out_channels=(32, 64),
            layers_per_block=LAYERS,
            cross_attention_dim=16,
            attention_head_dim=4,
        ),
        "vae": AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            block_out_channels=(32, 64),
            latent_channels=4,
            sample_size=16,
        ),
        "text_encoder": CLIPTextModel(
            CLIPTextConfig(
                vocab_size=99, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
            )
        ),
    }
    state = {"model.diffusion_model." + unet_key(k): v for k, v in models["unet"].state_dict().items()}
    for key, value in models["vae"].state_dict().items():
        attention = "mid_block.attentions" in key and value.ndim == 2
        state["first_stage_model." + vae_key(key, 2)] = value[:, :, None, None] if attention else value
    for key, value in models["text_encoder"].state_dict().items():
        state["cond_stage_model.transformer.text_model." + key.removeprefix("text_model.")] = value
    state["cond_stage_model.transformer.text_model.embeddings.position_ids"] = torch.arange(77)[None]
    save_file({k: v.contiguous() for k, v in state.items()}, folder / "twin.safetensors")
    for name, model in models.items():
        model.config.save_pretrained(folder / name) if name == "text_encoder" else model.save_config(folder / name)
    return folder / "twin.safetensors", folder, models


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_every_tensor_arrives(twin, part):
    path, configs, models = twin
    loaded, expected = single_file.load_part(path, part, configs).state_dict(), models[part].state_dict()
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[n], expected[n]) for n in expected)


def test_a_file_of_something_else_is_refused_in_one_sentence(tmp_path):
    save_file({"x": torch.zeros(1)}, tmp_path / "lora.safetensors")
    family = load(str(tmp_path / "lora.safetensors"))
    for part in ("unet", "text_encoder"):
        with pytest.raises(InputError, match="holds no .* of the SD v1 layout"):
            getattr(family, part)


def test_nine_input_channels_of_an_inpainting_checkpoint_are_seen_in_the_file(twin, tmp_path):
    path, configs, models = twin
    state = load_file(path)
    first = "model.diffusion_model.input_blocks.0.0.weight"
    state[first] = torch.randn(32, 9, 3, 3)
    save_file(state, tmp_path / "inpainting.safetensors")
    loaded = single_file.load_part(tmp_path / "inpainting.safetensors", "unet", configs)
    assert loaded.config.in_channels == 9 and torch.equal(loaded.conv_in.weight, state[first])


def test_both_layouts_give_the_same_family(twin, tmp_path):
    """The same models written as a diffusers folder and as one file: every tensor of every part agrees."""
    path, configs, models = twin
    for name, model in models.items():
        model.save_pretrained(tmp_path / name)
    folder = load(str(tmp_path))
    for part in models:
        one, other = single_file.load_part(path, part, configs).state_dict(), getattr(folder, part).state_dict()
        assert one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)
