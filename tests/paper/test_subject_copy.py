"""P3S eq. 6: the copy of the exact SD v1-5 U-Net, on the meta device, and what speaks to what."""

from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel

import p3s_cli.sd.single_file as single_file
from p3s_cli.config import ControlConfig
from p3s_cli.paper.model import P3SControl
from p3s_cli.paper.subject_copy import attention_layers, build_copy, copy_name, frozen_name

SD15 = Path(single_file.__file__).parent / "profiles" / "sd15" / "unet"


def count(module) -> float:
    return sum(p.numel() for p in module.parameters()) / 1e6


@pytest.fixture(scope="module")
def sd15():
    with torch.device("meta"):
        return UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(SD15))


def test_every_key_of_the_copy_has_a_frozen_key_of_its_shape(sd15):
    with torch.device("meta"):
        copy = UNet2DConditionModel.from_config(sd15.config, layers_per_block=1)
    frozen = sd15.state_dict()
    for name, tensor in copy.state_dict().items():
        assert frozen[frozen_name(name, 2)].shape == tensor.shape, name


def test_parameter_counts_of_sd15(sd15):
    with torch.device("meta"):
        control = P3SControl(sd15, vision_width=1024, config=ControlConfig())
    assert count(sd15) == pytest.approx(859.52, abs=0.01)
    assert count(control.copy) == pytest.approx(579.38, abs=0.01)
    # 16 convolutions: 5 of width 320, 5 of 640, 6 of 1280, each c^2 + c
    closed_form = sum(n * (c * c + c) for n, c in ((5, 320), (5, 640), (6, 1280))) / 1e6
    assert count(control.zero_self) == count(control.zero_cross) == pytest.approx(closed_form)
    assert closed_form == pytest.approx(12.4, abs=0.05)
    assert len(control.self_layers) == len(control.cross_layers) == len(control.gates) == 16


def test_sixteen_frozen_layers_speak_to_ten_copied_ones(sd15):
    layers = attention_layers(sd15, "attn1")
    partners = {copy_name(n, 2) for n in layers}
    assert (len(layers), len(partners)) == (16, 10)
    with torch.device("meta"):
        copy = UNet2DConditionModel.from_config(sd15.config, layers_per_block=1)
    assert partners == set(attention_layers(copy, "attn1"))
    for name in layers:
        assert sd15.get_submodule(name).to_q.in_features == copy.get_submodule(copy_name(name, 2)).to_q.in_features


@pytest.mark.parametrize(
    ("frozen", "copied"),
    [
        ("down_blocks.0.attentions.0.x", "down_blocks.0.attentions.0.x"),
        ("down_blocks.2.attentions.1.x", "down_blocks.2.attentions.0.x"),
        ("mid_block.attentions.0.x", "mid_block.attentions.0.x"),
        ("up_blocks.1.attentions.0.x", "up_blocks.1.attentions.0.x"),
        ("up_blocks.1.attentions.1.x", "up_blocks.1.attentions.0.x"),
        ("up_blocks.3.attentions.2.x", "up_blocks.3.attentions.1.x"),
    ],
)
def test_the_written_map(frozen, copied):
    assert copy_name(frozen, 2) == copied


def test_weights_come_from_the_matching_layer(unet):
    copy, frozen = build_copy(unet).state_dict(), unet.state_dict()
    assert torch.equal(
        copy["up_blocks.1.attentions.1.proj_in.weight"], frozen["up_blocks.1.attentions.2.proj_in.weight"]
    )
    assert torch.equal(copy["down_blocks.0.resnets.0.conv1.weight"], frozen["down_blocks.0.resnets.0.conv1.weight"])
    assert (
        copy["conv_in.weight"].data_ptr() != frozen["conv_in.weight"].data_ptr()
    )  # training the copy must not move the base


def test_on_the_meta_device_a_copy_has_shapes_and_no_weights(unet):
    """Of SD v1-5 they are 2.3 GB, to be replaced at once when a tuned subject is bound."""
    with torch.device("meta"):
        bare = build_copy(unet).state_dict()
    assert {n: t.shape for n, t in bare.items()} == {n: t.shape for n, t in build_copy(unet).state_dict().items()}
    assert all(t.is_meta for t in bare.values())


def test_layers_are_listed_in_the_order_of_the_forward_pass(unet):
    names = attention_layers(unet, "attn2")
    assert names[0].startswith("down_blocks.0.attentions.0") and names[-1].startswith("up_blocks.1.attentions.2")
