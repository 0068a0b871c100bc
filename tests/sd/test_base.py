"""Bases that would be tuned to no avail: what they are is said before a step is made."""

import json
import shutil

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import save_file

from p3s_cli.errors import InputError
from p3s_cli.sd import single_file
from p3s_cli.sd.base import check_base
from p3s_cli.sd.family import load


@pytest.fixture
def other(tiny_folder, tmp_path):
    """The tiny family with another U-Net of random weights, or another scheduler."""

    def build(prediction="epsilon", **options):
        folder = shutil.copytree(tiny_folder, tmp_path / "family")
        scheduler = folder / "scheduler/scheduler_config.json"
        scheduler.write_text(json.dumps(json.loads(scheduler.read_text()) | {"prediction_type": prediction}))
        config = UNet2DConditionModel.load_config(folder / "unet")
        UNet2DConditionModel.from_config(config, **options).save_pretrained(folder / "unet")
        return load(str(folder), "cpu")

    return build


SDXL = {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 64,
}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"in_channels": 9}, "is an inpainting model .9 channels"),
        ({"prediction": "v_prediction"}, "predicts v_prediction and not noise"),
        (SDXL, "wants text_time beside the prompt, as SDXL's does"),
        ({"cross_attention_dim": 48}, "reads text of width 48 and its text encoder writes 32"),
    ],
)
def test_a_base_of_another_kind_is_refused_by_what_it_is(other, options, words):
    with pytest.raises(InputError, match=words):
        check_base(other(**options))


def test_a_base_built_like_sd_is_not(other, world):
    check_base(world)
    check_base(other(use_linear_projection=True, attention_head_dim=[2, 4]))  # as SD 2 is


@pytest.mark.parametrize("mark", ["key", "metadata"])
def test_a_single_file_says_in_one_of_two_ways_that_it_predicts_v(tmp_path, mark):
    file = tmp_path / "m.safetensors"
    save_file({"a": torch.zeros(1)}, file)
    assert single_file.scheduler_config(file)["prediction_type"] == "epsilon"
    told = {"modelspec.prediction_type": "v"} if mark == "metadata" else {}
    save_file({"a": torch.zeros(1)} | ({"v_pred": torch.zeros(0)} if mark == "key" else {}), file, told)
    assert single_file.scheduler_config(file)["prediction_type"] == "v_prediction"
