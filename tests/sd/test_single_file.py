"""Single-file checkpoints of the SD v1 layout, on a small twin written by hand in that layout."""

import shutil
import signal
from dataclasses import replace
from functools import partial

import pytest
import tiny
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel

from benchmarks.original_layout import original_layout
from p3s_cli import P3SPipeline, pipeline, signals, stages
from p3s_cli.errors import InputError
from p3s_cli.sd import lora, single_file
from p3s_cli.sd.family import load
from p3s_cli.sd.vocabulary import clip_tokenizer


def interrupted(result):
    """A reader in another language, which says what it likes of an exception that a signal raises inside it."""

    def read(*args, **options):
        try:
            signal.raise_signal(signal.SIGINT)
        except BaseException as error:
            raise ValueError("a header that is too large") from error
        return result

    return read


def test_an_interruption_while_a_file_is_read_is_no_damaged_file(tmp_path, monkeypatch):
    monkeypatch.setattr(AutoencoderKL, "from_single_file", interrupted(torch.nn.Linear(1, 1)))
    monkeypatch.setattr(lora, "load_file", interrupted({}))
    for read in (
        lambda: single_file.load_part(tmp_path / "a.safetensors", "vae"),
        lambda: lora.read(tmp_path / "a.safetensors"),
    ):
        with pytest.raises(signals.Interrupted), signals.raising():
            read()


@pytest.fixture(scope="module")
def twin(tmp_path_factory):
    """(file, configurations, models) of a random small family."""
    folder = tmp_path_factory.mktemp("twin")
    torch.manual_seed(0)
    models = {
        "unet": UNet2DConditionModel(
            sample_size=8,
            down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
            block_out_channels=(32, 64),
            layers_per_block=1,
            cross_attention_dim=16,
            attention_head_dim=4,
        ),
        "vae": AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            block_out_channels=(32, 64),
            latent_channels=4,
            sample_size=16,
        ),
        "text_encoder": CLIPTextModel(
            CLIPTextConfig(
                vocab_size=99, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
            )
        ),
    }
    state = original_layout(models["unet"], models["vae"], models["text_encoder"])
    save_file({k: v.contiguous() for k, v in state.items()}, folder / "twin.safetensors")
    for name, model in models.items():
        model.config.save_pretrained(folder / name) if name == "text_encoder" else model.save_config(folder / name)
    return folder / "twin.safetensors", folder, models


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_every_tensor_arrives(twin, part):
    path, configs, models = twin
    loaded, expected = single_file.load_part(path, part, configs).state_dict(), models[part].state_dict()
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[n], expected[n]) for n in expected)


def test_a_file_of_something_else_is_refused_in_one_sentence(tmp_path):
    save_file({"x": torch.zeros(1)}, tmp_path / "lora.safetensors")
    family = load(str(tmp_path / "lora.safetensors"))
    for part in ("unet", "text_encoder"):
        with pytest.raises(InputError, match="holds no .* of the SD v1 layout"):
            getattr(family, part)


def test_a_file_that_lacks_a_tensor_is_refused_and_not_filled_with_random_numbers(twin, tmp_path):
    path, configs, _ = twin
    whole = load_file(path)
    for part, prefix in (
        ("unet", "model.diffusion_model.middle_block."),
        ("vae", "first_stage_model.decoder.mid."),
        ("text_encoder", "cond_stage_model.transformer.text_model.final_layer_norm."),
    ):
        save_file({k: v for k, v in whole.items() if not k.startswith(prefix)}, tmp_path / "m.safetensors")
        with pytest.raises(InputError, match=f"holds no {part} of the SD v1 layout"):
            single_file.load_part(tmp_path / "m.safetensors", part, configs)


def test_text_keys_of_early_checkpoints_are_known(twin, tmp_path):
    """A1111 reads them too: `cond_stage_model.transformer.encoder...`, without `text_model`."""
    path, configs, models = twin
    early = {k.replace("transformer.text_model.", "transformer."): v for k, v in load_file(path).items()}
    save_file(early, tmp_path / "early.safetensors")
    loaded = single_file.load_part(tmp_path / "early.safetensors", "text_encoder", configs).state_dict()
    assert all(torch.equal(loaded[n], t) for n, t in models["text_encoder"].state_dict().items())


def test_nine_input_channels_of_an_inpainting_checkpoint_are_seen_in_the_file(twin, tmp_path):
    path, configs, models = twin
    state = load_file(path)
    first = "model.diffusion_model.input_blocks.0.0.weight"
    state[first] = torch.randn(32, 9, 3, 3)
    save_file(state, tmp_path / "inpainting.safetensors")
    loaded = single_file.load_part(tmp_path / "inpainting.safetensors", "unet", configs)
    assert loaded.config.in_channels == 9 and torch.equal(loaded.conv_in.weight, state[first])


def test_both_layouts_give_the_same_family(twin, tmp_path):
    """The same models written as a diffusers folder and as one file: every tensor of every part agrees."""
    path, configs, models = twin
    for name, model in models.items():
        model.save_pretrained(tmp_path / name)
    folder = load(str(tmp_path))
    for part in models:
        one, other = single_file.load_part(path, part, configs).state_dict(), getattr(folder, part).state_dict()
        assert one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


def test_the_vocabulary_that_ships_is_clips_own():
    """Ids as CLIP's own repository documents them; every byte is a token, so that nothing is unknown."""
    tokenizer = clip_tokenizer()
    assert len(tokenizer) == 49_408 and tokenizer.model_max_length == 77
    assert tokenizer("a photo of a dog").input_ids == [49406, 320, 1125, 539, 320, 1929, 49407]
    odd = "ﬁ 猫 🐈 \x00"
    assert tokenizer.unk_token_id not in tokenizer(odd).input_ids[1:-1] and tokenizer.pad_token_id == 49407
    assert len(tokenizer(odd * 90, truncation=True).input_ids) == 77
    assert tokenizer.decode(tokenizer("a [V] dog, sks!").input_ids, skip_special_tokens=True) == "a [ v ] dog , sks !"


def test_a_single_file_needs_no_tokenizer_from_elsewhere(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(1)}, path)
    family = load(str(path), "cpu")
    assert len(family.tokenizer) == 49_408 and [p.name for p in family.profile.parts if p.name == "tokenizer"] == []


def test_the_whole_job_runs_on_a_single_file_and_its_pipeline_is_saved_as_a_folder(tiny_folder, tmp_path, monkeypatch):
    """A file of the tiny family's models, but for a text encoder that knows all of CLIP's words."""
    configs = shutil.copytree(tiny_folder, tmp_path / "configs")
    torch.manual_seed(0)
    words = CLIPTextConfig.from_pretrained(configs / "text_encoder", vocab_size=49_408)
    words.save_pretrained(configs / "text_encoder")
    family = load(str(tiny_folder), "cpu")
    state = original_layout(family.unet, family.vae, CLIPTextModel(words))
    save_file({k: v.contiguous() for k, v in state.items()}, tmp_path / "base.safetensors")
    monkeypatch.setattr(single_file, "load_part", partial(single_file.load_part, configs=configs))
    clip, root = str(tiny_folder / "clip"), tmp_path / "pet"

    def single(*_, **__):
        own = load(str(tmp_path / "base.safetensors"), "cpu", vision=clip)
        own.profile = replace(own.profile, image_size=64, inpainter="classical")
        return own

    stages.mask(tiny.photo(tmp_path / "photo.png"), [(18, 32)], [(46, 32)], root, "pet", family=single())
    stages.finetune(root, steps=1, memory="24", family=single())
    made = stages.generate(root, "a [V] pet", n=1, steps=1, memory="24", family=single())
    assert made.safety == ("no checker",) and made.images[0].is_file()

    monkeypatch.setattr(pipeline, "load", single)
    pipe = P3SPipeline.from_pretrained(tmp_path / "base.safetensors", subject=root)
    pipe.save_pretrained(tmp_path / "saved")
    monkeypatch.undo()
    again = P3SPipeline.from_pretrained(tmp_path / "saved")
    options = {"num_inference_steps": 1, "output_type": "latent", "latents": torch.randn(1, 4, 8, 8)}
    assert torch.equal(*(p("a [V] pet", **options).images for p in (pipe, again)))
