"""What the tests of the rivals share: a small family, one subject, and what each rival learns of it."""

import dataclasses

import diffusers
import pytest
import torch
from rivals import RIVALS, looks, state

from p3s_cli import methods, stages
from p3s_cli.config import FinetuneConfig
from p3s_cli.methods.base import Lesson
from p3s_cli.sd import images
from p3s_cli.sd.family import Family
from p3s_cli.subject import Subject

QUICK = {"class_images": 2, "class_steps": 1}


@pytest.fixture(scope="session")
def family(world):
    """The bundled family with a smaller U-Net of random weights; it asks for two quickly drawn class images."""
    table = {n: QUICK for n in ("dreambooth-prior", "custom-diffusion", "break-a-scene")}
    family = Family(world.source, dataclasses.replace(world.profile, methods=table), world.device, world.dtype)
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        sample_size=16,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(16, 32),
        layers_per_block=1,
        cross_attention_dim=128,
        attention_head_dim=4,
        norm_num_groups=8,
    )
    family.__dict__["unet"] = unet.eval().requires_grad_(False)
    return family


@pytest.fixture(scope="session")
def subject(tmp_path_factory, pair, family):
    root = tmp_path_factory.mktemp("rivals")
    images.save_png(root / "two.png", pair[0])
    left, right = pair[2]
    return Subject.open(stages.mask(root / "two.png", [left], [right], root / "pet", "dog", family=family).subject)


@pytest.fixture(scope="session")
def found(family):
    """The family before anything was learnt: weights, processors, kinds of modules, size of the vocabulary."""
    return {n: p.clone() for n, p in state(family).items()}, looks(family)


@pytest.fixture(scope="session")
def learnt(family, subject, found):
    """What each rival learns in two steps at a high rate, so that every part that can move has moved."""
    config = FinetuneConfig(steps=2, lr=1e-3)
    return {n: methods.get(n).fit(Lesson(family, subject, config)) for n in RIVALS}
