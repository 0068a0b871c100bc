"""Shared fixtures. The bundled family is small enough to be used for real everywhere."""

from __future__ import annotations

import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # no test may reach for a network
if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 0)):  # which share the cores, or they wait for each other
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // workers)))

import pytest
import tiny
import torch
from diffusers import UNet2DConditionModel

from p3s_cli.config import ControlConfig
from p3s_cli.paper.model import P3SControl
from p3s_cli.sd.family import Family, load
from p3s_cli.world.render import click, render
from p3s_cli.world.scenes import lookalike_scene


@pytest.fixture(scope="session")
def world() -> Family:
    return load("world", device="cpu")


@pytest.fixture
def unet():
    """A frozen U-Net of SD v1-5's architecture with two levels and random weights."""
    torch.manual_seed(0)
    model = UNet2DConditionModel(
        sample_size=16,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(64, 128),
        layers_per_block=2,
        cross_attention_dim=128,
        attention_head_dim=4,
        norm_num_groups=16,
    )
    return model.eval().requires_grad_(False)


@pytest.fixture
def make_control(unet):
    """Build a control for `unet`; with `trained`, its zero parts hold random numbers."""

    def make(trained: bool = False, **options) -> P3SControl:
        torch.manual_seed(1)
        control = P3SControl(unet, vision_width=12, config=ControlConfig(**options))
        if trained:
            for name, parameter in control.named_parameters():
                if name.startswith(("zero_", "rngr")):
                    torch.nn.init.normal_(parameter, std=0.2)
        return control

    return make


@pytest.fixture
def batch():
    """One batch of everything the control takes: x_t, t, text, latent, vision."""
    g = torch.Generator().manual_seed(2)
    return (
        torch.randn(2, 4, 16, 16, generator=g),
        torch.tensor([500, 20]),
        torch.randn(2, 77, 128, generator=g),
        torch.randn(2, 4, 16, 16, generator=g),
        torch.randn(2, 5, 12, generator=g),
    )


@pytest.fixture(scope="session")
def pair():
    """A drawn scene with two look-alikes: (PIL image, true masks (2, H, W), a click on each)."""
    from p3s_cli.sd.images import to_pil

    pixels, masks = render([lookalike_scene(20_000_007)])
    return to_pil(pixels[0]), masks[0, :2], (click(masks[0, 0]), click(masks[0, 1]))


@pytest.fixture(scope="session")
def photo_data() -> Path:
    """The folder of real photos (`P3S_DATA`, or `../shared/data`); skips where there is none."""
    folder = Path(os.environ.get("P3S_DATA", Path(__file__).parent.parent.parent / "shared" / "data"))
    if not (folder / "selective_dev/manifest.json").is_file():
        pytest.skip("no real photos here; name their folder in P3S_DATA")
    return folder


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory) -> Path:
    """The folder of `tiny.build`'s family, to be copied before it is changed."""
    return tiny.build(tmp_path_factory.mktemp("family"))


@pytest.fixture(scope="session")
def tiny_family(tiny_folder) -> Family:
    """A family whose stages take a fraction of a second and whose images are noise."""
    return load(str(tiny_folder), device="cpu")
