"""The precision of the frozen part, which `--dtype` chooses."""

import pytest
import tiny
import torch

from p3s_cli import methods, stages
from p3s_cli.config import ControlConfig
from p3s_cli.sd import images
from p3s_cli.sd.family import load
from p3s_cli.sd.weights import load_tensors


def test_a_frozen_part_in_bfloat16_tunes_as_one_in_float32_does(tmp_path):
    """What learns is float32 in both; in two steps of the rate, two runs part by no more than twice that."""
    photo, controls = tiny.photo(tmp_path / "photo.png"), {}
    folder = tiny.build(tmp_path / "family")
    for dtype in ("float32", "bfloat16"):
        family = load(str(folder), "cpu", dtype)
        stages.mask(photo, [(18, 32)], [(46, 32)], tmp_path / dtype, "dog", family=family)
        stages.finetune(tmp_path / dtype, steps=2, family=family)
        controls[dtype], _ = load_tensors(tmp_path / dtype / "control/control.safetensors")
        assert not torch.stack([t.isnan().any() for t in controls[dtype].values()]).any()
    config, lr = ControlConfig(), family.profile.finetune["lr"]
    faster = {"gates": config.gate_lr_scale, "word": config.word_lr_scale}
    for name, tensor in controls["float32"].items():
        assert (controls["bfloat16"][name] - tensor).abs().max() <= 2 * 2.01 * lr * faster.get(
            name.split(".")[0], 1.0
        ), name


@pytest.mark.parametrize("method", methods.NAMES)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_what_every_method_learns_in_half_precision_is_drawn_in_it(tmp_path, tiny_folder, method, dtype):
    """They are what `--dtype auto` takes on CUDA. Two steps hardly move the base, and half precision moves it less:
    bfloat16 keeps 8 bits of a number, so pictures in [0, 255] that part by a few levels are of the same numbers."""
    photo, pictures = tiny.photo(tmp_path / "photo.png"), {}
    family = load(str(tiny_folder), "cpu", dtype)
    stages.mask(photo, [(18, 32)], [(46, 32)], tmp_path / "dog", "dog", family=family)
    stages.finetune(tmp_path / "dog", method, steps=2, family=family)
    for name in (dtype, "float32"):
        drawn = stages.generate(tmp_path / "dog", "a [V] dog", n=1, steps=2, family=load(str(tiny_folder), "cpu", name))
        pictures[name] = images.to_tensor(images.load_image(drawn.images[0]))
        (tmp_path / "dog/outputs").rename(tmp_path / name)
    assert (pictures[dtype] - pictures["float32"]).abs().mean() * 255 < 4
