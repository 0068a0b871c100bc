"""A whole family of SD v1-5's layout with random weights, small enough that a stage takes a fraction of a second.

For tests of what surrounds the numbers: files, locks, signals. `build` writes the same bytes every time
on one machine.
"""

from __future__ import annotations

import json
import shutil
import zlib
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from PIL import Image, ImageDraw
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

import p3s_cli
from p3s_cli.world.readers import build_identity_encoder, build_label_reader

_WORLD = Path(p3s_cli.__file__).parent / "world" / "weights"
SIZE = 64  # pixels


def build(folder: Path) -> Path:
    """Write the family: U-Net, VAE, CLIP pair of width 32, the bundled family's tokenizer. Returns the folder."""
    torch.manual_seed(0)
    words = len(json.loads((_WORLD / "tokenizer" / "tokenizer.json").read_text())["model"]["vocab"])
    blocks = ("CrossAttnDownBlock2D", "DownBlock2D"), ("UpBlock2D", "CrossAttnUpBlock2D")
    UNet2DConditionModel(
        sample_size=SIZE // 8, down_block_types=blocks[0], up_block_types=blocks[1], block_out_channels=(8, 16),
        layers_per_block=2, cross_attention_dim=32, attention_head_dim=2, norm_num_groups=4,
    ).save_pretrained(folder / "unet")  # fmt: skip
    AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4, latent_channels=4,
    ).save_pretrained(folder / "vae")  # fmt: skip
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    clip = CLIPModel(
        CLIPConfig(
            text_config=tower | {"vocab_size": words, "max_position_embeddings": 77},
            vision_config=tower | {"image_size": 32, "patch_size": 8},
            projection_dim=16,
        )
    )
    clip.save_pretrained(folder / "clip")
    clip.text_model.save_pretrained(folder / "text_encoder")
    statistics = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}, **statistics).save_pretrained(
        folder / "clip"
    )
    DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear").save_pretrained(
        folder / "scheduler"
    )
    shutil.copytree(_WORLD / "tokenizer", folder / "tokenizer", dirs_exist_ok=True)
    profile = json.loads((_WORLD / "p3s.json").read_text())
    profile |= {"name": "tiny", "inpainter": None, "image_size": SIZE, "feature_layers": [1], "feature_side": 64}
    (folder / "p3s.json").write_text(json.dumps(profile))
    return folder


def build_with_readers(folder: Path) -> Path:
    """The same family with what `p3s eval` judges by: random readers, and the bundled CLIP, which takes 128 pixels."""
    build(folder)
    shutil.copytree(_WORLD / "clip", folder / "clip", dirs_exist_ok=True)
    torch.manual_seed(0)
    build_label_reader().save_pretrained(folder / "readers/labels")
    build_identity_encoder().save_pretrained(folder / "readers/identity")
    return folder


def photo(path: Path) -> Path:
    """Two unlike shapes on a plain ground, 64 x 64 pixels: a subject at 18,32 and another thing at 46,32.

    A name's photo is the same whenever it is drawn, and another name's has other noise.
    """
    generator = torch.Generator().manual_seed(zlib.crc32(path.name.encode()))
    noise = (128 + 12 * torch.randn(SIZE, SIZE, generator=generator)).clamp(0, 255).byte()
    image = Image.fromarray(noise.numpy()).convert("RGB")
    image = Image.blend(image, Image.new("RGB", image.size, (90, 140, 90)), 0.97)
    draw = ImageDraw.Draw(image)
    draw.ellipse((6, 20, 30, 44), fill=(220, 60, 40))
    draw.rectangle((36, 22, 58, 42), fill=(50, 70, 210))
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, format="PNG")
    return path
