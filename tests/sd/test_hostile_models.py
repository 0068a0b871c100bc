"""Models from elsewhere: no pickle is opened, no code of theirs runs, and what is damaged is refused by name."""

import json
import pickle
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from p3s_cli.errors import InputError
from p3s_cli.sd.family import load


class Payload:
    """Unpickling it writes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.fixture
def copy(tiny_folder, tmp_path):
    return shutil.copytree(tiny_folder, tmp_path / "family")


PARTS = {
    "unet": ("unet", "diffusion_pytorch_model"),
    "vae": ("vae", "diffusion_pytorch_model"),
    "text_encoder": ("text_encoder", "model"),
    "vision": ("clip", "model"),
}


@pytest.mark.parametrize("part", PARTS)
def test_weights_that_are_only_there_as_a_pickle_are_refused_unopened(copy, tmp_path, part):
    folder, name = PARTS[part]
    (copy / folder / f"{name}.safetensors").unlink()
    for other in (f"{name}.bin", "pytorch_model.bin"):
        (copy / folder / other).write_bytes(pickle.dumps(Payload(tmp_path / "ran")))
    with pytest.raises(InputError, match=folder):
        getattr(load(str(copy), "cpu"), part)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("suffix", ["ckpt", "pt", "bin", "pth", "pkl"])
def test_a_pickle_as_a_model_is_refused_unopened(tmp_path, suffix):
    path = tmp_path / f"m.{suffix}"
    torch.save({}, path)
    with pytest.raises(InputError, match="is a pickle.*never loaded"):
        load(str(path), "cpu")


@pytest.mark.parametrize("part", PARTS)
def test_damaged_weights_are_refused_by_name(copy, part):
    folder, name = PARTS[part]
    path = copy / folder / f"{name}.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(InputError, match=folder):
        getattr(load(str(copy), "cpu"), part)


@pytest.mark.parametrize("part", PARTS)
def test_weights_that_lack_a_tensor_are_refused_and_not_filled_with_random_numbers(copy, part):
    folder, name = PARTS[part]
    path = copy / folder / f"{name}.safetensors"
    tensors = load_file(path)
    lost = sorted(tensors)[-1]
    save_file({k: v for k, v in tensors.items() if k != lost}, path, {"format": "pt"})
    with pytest.raises(InputError, match=f"{folder} is no whole .*lacks 1 tensors .{re.escape(lost)}"):
        getattr(load(str(copy), "cpu"), part)


def test_code_beside_the_weights_is_not_run(world, tmp_path):
    classes = {"AutoConfig": "evil.EvilConfig", "AutoModel": "evil.EvilModel"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "evil", "auto_map": classes}))
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(InputError, match="cannot be read"):
        world.mask_tower(str(tmp_path))
    assert not (tmp_path / "ran").exists()
