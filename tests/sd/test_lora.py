"""LoRAs in three layouts against weights merged by hand: W + strength (alpha / r) B A."""

import json

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import save_file

from p3s_cli.errors import InputError
from p3s_cli.sd import lora, text
from p3s_cli.sd.family import load
from p3s_cli.sd.pipeline import pipeline

LAYER = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
TEXT = "encoder.layers.0.self_attn.out_proj"
RANK, ALPHA, STRENGTH = 4, 2.0, 0.7


@pytest.fixture(scope="module")
def family():
    return load("world", device="cpu")


@pytest.fixture(scope="module")
def pair(family):
    """A and B of the U-Net's layer and of the text encoder's."""
    g = torch.Generator().manual_seed(0)
    widths = family.unet.get_submodule(LAYER).in_features, family.text_encoder.get_submodule(TEXT).in_features
    return [(torch.randn(RANK, w, generator=g), torch.randn(w, RANK, generator=g) * 0.1) for w in widths]


def written(layout: str, pair, folder):
    (a, b), (c, d) = pair
    if layout == "kohya":
        names = "lora_unet_" + LAYER.replace(".", "_"), "lora_te_text_model_" + TEXT.replace(".", "_")
        tensors = {}
        for name, down, up in ((names[0], a, b), (names[1], c, d)):
            tensors |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
            tensors[f"{name}.alpha"] = torch.tensor(ALPHA)
        save_file(tensors, folder / "kohya.safetensors")
        return folder / "kohya.safetensors"
    if layout == "diffusers":
        scale = ALPHA / RANK  # such a file has no alpha of its own
        tensors = {f"unet.{LAYER}.lora_A.weight": a, f"unet.{LAYER}.lora_B.weight": scale * b}
        tensors |= {f"text_encoder.text_model.{TEXT}.lora_A.weight": c}
        tensors |= {f"text_encoder.text_model.{TEXT}.lora_B.weight": scale * d}
        save_file(tensors, folder / "diffusers.safetensors")
        return folder / "diffusers.safetensors"
    keys = f"base_model.model.{LAYER}.lora_A.weight", f"base_model.model.{LAYER}.lora_B.weight"
    save_file(dict(zip(keys, (a, b), strict=True)), folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"r": RANK, "lora_alpha": ALPHA}))
    return folder


def outputs(family):
    states = text.encode(family.tokenizer, family.text_encoder, ["a dog on the beach"])
    x = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        return states, family.unet(x, 500, states).sample


@pytest.mark.parametrize("layout", ["kohya", "diffusers", "peft"])
def test_a_lora_is_its_product_added_to_the_weights_and_gone_afterwards(family, pair, tmp_path, layout):
    path = written(layout, pair, tmp_path)
    base = outputs(family)
    with lora.applied(family, [(path, STRENGTH)]):
        ours = outputs(family)
    weights = [family.unet.get_submodule(LAYER).weight, family.text_encoder.get_submodule(TEXT).weight]
    kept = [w.detach().clone() for w in weights]
    for weight, (a, b) in list(zip(weights, pair, strict=True))[: 1 if layout == "peft" else 2]:
        weight.data += STRENGTH * ALPHA / RANK * b @ a
    merged = outputs(family)
    for weight, before in zip(weights, kept, strict=True):
        weight.data.copy_(before)
    for ours_, merged_ in zip(ours, merged, strict=True):
        torch.testing.assert_close(ours_, merged_, rtol=1e-4, atol=1e-4)
    assert (ours[1] - base[1]).abs().max() > 1e-3
    assert all(torch.equal(a, b) for a, b in zip(outputs(family), base, strict=True))
    assert not [n for n, _ in family.unet.named_parameters() if "lora" in n]


OTHER = "mid_block.attentions.0.transformer_blocks.0.attn1.to_k"


def added(family, path):
    """What a LoRA adds to the two layers of the U-Net, read off the layers themselves."""
    with lora.applied(family, [(path, 1.0)]):
        return [family.unet.get_submodule(name).get_delta_weight("lora0") for name in (LAYER, OTHER)]


@pytest.mark.parametrize("names", [("lora_A", "lora_B"), ("lora.down", "lora.up")])
@pytest.mark.parametrize("rslora", [False, True])
def test_a_file_whose_header_keeps_the_scales_is_applied_as_diffusers_applies_it(family, tmp_path, names, rslora):
    """As diffusers' own training scripts write it, with a rank and an alpha of its own for one of the layers."""
    g, path = torch.Generator().manual_seed(1), tmp_path / "trained.safetensors"
    width = family.unet.get_submodule(LAYER).in_features
    a, b, c, d = (torch.randn(*s, generator=g) for s in ((4, width), (width, 4), (2, width), (width, 2)))
    down, up = names
    tensors = {f"unet.{LAYER}.{down}.weight": a, f"unet.{LAYER}.{up}.weight": b}
    tensors |= {f"unet.{OTHER}.{down}.weight": c, f"unet.{OTHER}.{up}.weight": d}
    config = {"r": 4, "lora_alpha": 16, "rank_pattern": {OTHER: 2}, "alpha_pattern": {OTHER: 3}}
    config |= {"use_rslora": rslora, "target_modules": [LAYER, OTHER]}
    header = {"lora_adapter_metadata": json.dumps({f"unet.{k}": v for k, v in config.items()}), "format": "pt"}
    save_file(tensors, path, header)
    pipe = pipeline(StableDiffusionPipeline, family)
    pipe.load_lora_weights(tmp_path, weight_name=path.name, adapter_name="theirs")
    theirs = [family.unet.get_submodule(name).get_delta_weight("theirs") for name in (LAYER, OTHER)]
    pipe.unload_lora_weights()
    power = 0.5 if rslora else 1
    torch.testing.assert_close(theirs, [16 / 4**power * b @ a, 3 / 2**power * d @ c], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(added(family, path), theirs, rtol=1e-5, atol=1e-5)


def test_a_peft_folder_with_ranks_and_alphas_by_module_is_applied_as_it_was_trained(tmp_path):
    """Trained by peft on a U-Net of its own kind: what it adds there is what is added here."""
    from peft import LoraConfig, get_peft_model

    family = load("world", device="cpu")
    torch.manual_seed(0)
    config = LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=[LAYER, OTHER],
        rank_pattern={OTHER: 2},
        alpha_pattern={"to_k": 5},
        init_lora_weights=False,
    )
    trained = get_peft_model(load("world", device="cpu").unet, config)
    layers = [trained.get_submodule(f"base_model.model.{name}") for name in (LAYER, OTHER)]
    expected = [layer.get_delta_weight("default").detach() for layer in layers]
    assert [layer.scaling["default"] for layer in layers] == [2, 2.5]
    trained.save_pretrained(tmp_path)
    torch.testing.assert_close(added(family, tmp_path), expected, rtol=1e-5, atol=1e-5)


def test_a_header_that_is_no_configuration_is_refused(family, tmp_path):
    tensors = {f"unet.{LAYER}.lora_A.weight": torch.zeros(2, 8), f"unet.{LAYER}.lora_B.weight": torch.zeros(8, 2)}
    for header in ("[]", "{", '{"unet.r": 0, "unet.lora_alpha": 4}', '{"unet.r": 4}', '{"unet.r": "x"}'):
        save_file(tensors, tmp_path / "x.safetensors", {"lora_adapter_metadata": header})
        with pytest.raises(InputError, match="no LoRA that can be read"):
            lora.read(tmp_path / "x.safetensors")


def test_what_is_no_lora_of_this_base_is_refused_and_leaves_nothing(family, tmp_path):
    save_file({"x.weight": torch.zeros(2)}, tmp_path / "x.safetensors")
    save_file({"unet.nowhere.to_q.lora_A.weight": torch.zeros(2, 8)}, tmp_path / "y.safetensors")
    (tmp_path / "z.pt").write_bytes(b"")
    names = dict(family.unet.named_parameters()).keys()
    for file, words in (("x.safetensors", "holds no LoRA"), ("y.safetensors", "holds no LoRA"), ("z.pt", "neither")):
        with pytest.raises(InputError, match=words), lora.applied(family, [(tmp_path / file, 1.0)]):
            pass
    with (
        pytest.raises(InputError, match="gone.safetensors"),
        lora.applied(family, [(tmp_path / "gone.safetensors", 1)]),
    ):
        pass
    assert dict(family.unet.named_parameters()).keys() == names
