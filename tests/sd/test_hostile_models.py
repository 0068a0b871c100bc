"""Models from elsewhere: no pickle is opened, no code of theirs runs, and what is damaged is refused by name."""

import json
import pickle
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from p3s_cli.errors import InputError
from p3s_cli.sd import hub, lora
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


def without_one(tensors, name):
    del tensors[name]


def not_finite(tensors, name):
    tensors[name].view(-1)[-1] = torch.nan


@pytest.mark.parametrize(("change", "words"), [(without_one, "is no whole"), (not_finite, "are not finite")])
@pytest.mark.parametrize("part", PARTS)
def test_weights_that_lack_a_tensor_or_hold_no_number_are_never_made_up(copy, part, change, words):
    """The libraries fill what is missing with random numbers, and say so only where nobody listens."""
    folder, name = PARTS[part]
    path = copy / folder / f"{name}.safetensors"
    tensors = load_file(path)
    largest = max(tensors, key=lambda n: tensors[n].numel())
    change(tensors, largest)
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(InputError, match=f"{words}|holds weights that are not finite"):
        getattr(load(str(copy), "cpu"), part)


def test_a_mask_tower_without_a_tensor_is_refused(copy, world):
    path = copy / "clip/model.safetensors"
    tensors = load_file(path)
    del tensors["vision_model.encoder.layers.1.mlp.fc1.weight"]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(InputError, match="is no whole .*fc1.weight"):
        world.mask_tower(str(copy / "clip"))


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"image_size": "large"}', "[" * 100_000])
def test_a_profile_that_is_none_is_refused_by_name(copy, text):
    path = copy / "p3s.json"
    good = json.loads(path.read_text())
    path.write_text(json.dumps(good | json.loads(text)) if text.startswith('{"') else text)
    with pytest.raises(InputError, match="p3s.json is not the profile of a family"):
        load(str(copy), "cpu")


@pytest.mark.parametrize("text", ["{", "[]", "{}"])
def test_statistics_that_are_none_are_refused_by_name(copy, text):
    (copy / "clip/preprocessor_config.json").write_text(text)
    with pytest.raises(InputError, match="preprocessor_config.json"):
        _ = load(str(copy), "cpu").vision


@pytest.mark.parametrize("text", ["{", "[]", '{"weight_map": 3}', '{"weight_map": {}}'])
def test_an_index_of_shards_that_is_none_makes_a_part_missing(tmp_path, text):
    part = hub.Part("unet", str(tmp_path), "unet", "model")
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet/config.json").write_text("{}")
    (tmp_path / "unet/model.safetensors.index.json").write_text(text)
    assert hub.folder(part) is None


def test_a_lora_or_an_inpainter_that_is_a_pickle_is_refused_unopened(copy, tmp_path):
    for suffix in ("pt", "bin", "ckpt", "safetensors"):
        path = tmp_path / f"m.{suffix}"
        path.write_bytes(pickle.dumps(Payload(tmp_path / "ran")))
        with pytest.raises(InputError, match=path.name):
            lora.read(path)
        if suffix != "safetensors":
            with pytest.raises(InputError, match="is a pickle"):
                load(str(copy), "cpu", inpainter=str(path))
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    (tmp_path / "adapter_model.bin").write_bytes(pickle.dumps(Payload(tmp_path / "ran")))
    with pytest.raises(InputError, match="no LoRA that can be read"):
        lora.read(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_code_beside_the_weights_is_not_run(world, tmp_path):
    classes = {"AutoConfig": "evil.EvilConfig", "AutoModel": "evil.EvilModel"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "evil", "auto_map": classes}))
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(InputError, match="cannot be read"):
        world.mask_tower(str(tmp_path))
    assert not (tmp_path / "ran").exists()
