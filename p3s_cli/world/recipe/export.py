"""The trained parts as one family folder, small enough to ship; and back, to train further."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer, ResNetForImageClassification, ResNetModel

from p3s_cli.world import models
from p3s_cli.world.recipe.workshop import Workshop
from p3s_cli.world.scenes import SIZE

WEIGHTS = Path(__file__).parents[1] / "weights"


def stage_export(shop: Workshop) -> None:
    """The family as a diffusers folder of fp16 safetensors, with `p3s.json` for what is particular to it."""
    target = shop.work / "export"
    clip = CLIPModel.from_pretrained(shop.family / "clip").half()
    parts = {
        "vae": AutoencoderKL.from_pretrained(shop.family / "vae").half(),
        "unet": UNet2DConditionModel.from_pretrained(shop.family / "unet").half(),
        "text_encoder": clip.text_model,
        "readers/labels": ResNetForImageClassification.from_pretrained(shop.family / "readers/labels").half(),
        "readers/identity": ResNetModel.from_pretrained(shop.family / "readers/identity").half(),
        "clip": clip,  # the whole pair, as openai/clip-vit-large-patch14 has it: towers and both projections
    }
    for name, model in parts.items():
        model.save_pretrained(target / name, max_shard_size="15MB")
        _forget_place(target / name / "config.json")
    CLIPTokenizer.from_pretrained(shop.family / "tokenizer").save_pretrained(target / "tokenizer")
    CLIPImageProcessor(
        size={"shortest_edge": SIZE},
        crop_size={"height": SIZE, "width": SIZE},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    ).save_pretrained(target / "clip")
    models.build_scheduler().save_pretrained(target / "scheduler")
    shutil.copy(WEIGHTS / "p3s.json", target)
    shop.log("export", {name: sum(p.numel() for p in m.parameters()) for name, m in parts.items()})


def stage_reopen(shop: Workshop) -> None:
    """The committed family as the work folder's, in float32: a later round goes on without the run before it."""
    parts = {
        "vae": AutoencoderKL,
        "unet": UNet2DConditionModel,
        "clip": CLIPModel,
        "readers/labels": ResNetForImageClassification,
        "readers/identity": ResNetModel,
    }
    for name, kind in parts.items():
        kind.from_pretrained(WEIGHTS / name).float().save_pretrained(shop.family / name)
    CLIPTokenizer.from_pretrained(WEIGHTS / "tokenizer").save_pretrained(shop.family / "tokenizer")


def _forget_place(config: Path) -> None:
    """Take out of a configuration the folder its model was read from, which is nobody else's."""
    settings = json.loads(config.read_text())
    settings.pop("_name_or_path", None)
    config.write_text(json.dumps(settings, indent=2) + "\n")
