"""The precision of the frozen part, which `--dtype` chooses."""

import tiny
import torch

from p3s_cli import stages
from p3s_cli.config import ControlConfig
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
