"""The precision of the frozen part, which `--dtype` chooses."""

import pytest
import tiny
import torch

from p3s_cli import methods, stages
from p3s_cli.errors import InputError
from p3s_cli.sd import images
from p3s_cli.sd.family import load
from p3s_cli.sd.weights import load_tensors


def learnt(path) -> torch.Tensor:
    """What began at nothing: the zero convolutions and the word, as one vector."""
    tensors, _ = load_tensors(path)
    return torch.cat([t.float().flatten() for n, t in sorted(tensors.items()) if n.startswith(("zero_", "word"))])


def test_a_frozen_part_in_half_precision_tunes_as_one_in_float32_does(tmp_path):
    """What learns is float32 in all of them and goes the same way: two steps of unrelated gradients are at right angles."""
    photo, moved = tiny.photo(tmp_path / "photo.png"), {}
    folder = tiny.build(tmp_path / "family")
    for dtype in ("float32", "bfloat16", "float16"):
        family = load(str(folder), "cpu", dtype)
        stages.mask(photo, [(18, 32)], [(46, 32)], tmp_path / dtype, "dog", family=family)
        made = stages.finetune(tmp_path / dtype, steps=2, family=family)
        assert made.skipped == 0
        moved[dtype] = learnt(made.control)
    for dtype in ("bfloat16", "float16"):  # 0.9996 and 1.0000
        assert torch.cosine_similarity(moved["float32"], moved[dtype], dim=0) > 0.99


@pytest.mark.parametrize("method", methods.NAMES)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_what_every_method_learns_in_half_precision_is_drawn_in_it(tmp_path, tiny_folder, method, dtype):
    """They are what `--dtype auto` takes on CUDA. Pictures of one subject in two precisions part by half a level of 255,
    those with it and without by 1.5 (Textual Inversion) to 21."""
    photo, pictures = tiny.photo(tmp_path / "photo.png"), {}
    half, full = (load(str(tiny_folder), "cpu", name) for name in (dtype, "float32"))
    stages.mask(photo, [(18, 32)], [(46, 32)], tmp_path / "dog", "dog", family=half)
    stages.finetune(tmp_path / "dog", method, steps=2, lr=3e-2, family=half)
    for name, family, strength in (("half", half, 1.0), ("full", full, 1.0), ("without", full, 0.0)):
        drawn = stages.generate(tmp_path / "dog", "a [V] dog", n=1, steps=2, strength=strength, family=family)
        assert not drawn.unchanged  # another precision is another picture
        pictures[name] = images.to_tensor(images.load_image(drawn.images[0])) * 255
    assert (pictures["half"] - pictures["full"]).abs().mean() < 1
    assert method == "untuned" or (pictures["full"] - pictures["without"]).abs().mean() > 1


def test_a_cpu_says_that_it_cannot_mix_the_two_kinds_of_half_precision(tmp_path, tiny_folder):
    family = load(str(tiny_folder), "cpu", "float16")
    stages.mask(tiny.photo(tmp_path / "photo.png"), [(18, 32)], [(46, 32)], tmp_path / "dog", "dog", family=family)
    with pytest.raises(InputError, match="profile 8 trains in bfloat16.*use --dtype bfloat16"):
        stages.finetune(tmp_path / "dog", steps=2, memory="8", family=family)
