"""Families by name, and what is said when one cannot be had."""

import copy
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, StableDiffusionPipeline
from safetensors.torch import load_file, save_file

from p3s_cli.errors import InputError
from p3s_cli.sd import controlnet, text
from p3s_cli.sd.family import load
from p3s_cli.sd.pipeline import pipeline
from p3s_cli.sd.sample import build_scheduler, initial_noise, sample


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("nonsense", "no model is called 'nonsense'"),
        ("model.ckpt", "pickle"),
        ("gone.safetensors", "does not exist"),
        (".", "not a diffusers folder"),
    ],
)
def test_bad_names_get_one_sentence(name, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=words):
        load(name)


def test_an_inpainter_is_a_folder_a_single_file_a_hub_id_or_the_classical_filler(tmp_path, monkeypatch):
    """What `load` says it takes; any other name would only be missed once a look-alike is painted over, or never."""
    monkeypatch.chdir(tmp_path)
    Path("own").mkdir()
    Path("own.safetensors").touch()
    for name in ("own", "own.safetensors", "owner/name@v1", "classical", "."):
        load("world", "cpu", inpainter=name)
    for name in ("nowhere", "world", "sd15", "./gone", "~/gone", "a/b/c"):
        with pytest.raises(InputError, match=f"no inpainter is called '{name}'; name a folder"):
            load("world", "cpu", inpainter=name)
    with pytest.raises(InputError, match="gone.safetensors does not exist"):
        load("world", "cpu", inpainter="gone.safetensors")


def test_the_command_in_a_sentence_is_one_that_a_shell_reads_whatever_the_path(tiny_folder, tmp_path):
    base, clip = (str(shutil.copytree(tiny_folder, tmp_path / name)) for name in ("my base", "it's"))
    assert shlex.split(load(base, "cpu", vision=clip).fetch) == ["p3s", "fetch", base, "--vision", clip]
    for option, needed in (
        ("--vision", lambda: load(base, "cpu").mask_tower("not/here")),
        ("--inpainter", lambda: load(base, "cpu", inpainter="not/here").inpaint_unet),
        ("--control", lambda: controlnet.load_net(load(base, "cpu"), "not/here")),
    ):
        with pytest.raises(InputError) as raised:
            needed()
        assert shlex.split(str(raised.value).split("`")[1]) == ["p3s", "fetch", base, option, "not/here"]


def test_without_network_and_cache_the_missing_files_and_the_way_out_are_named(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(InputError, match="stable-diffusion-v1-5/unet is not on this machine.*--model world"):
        _ = load("sd15").unet
    for part in ("unet", "tokenizer", "scheduler_config", "vision", "safety_checker"):
        with pytest.raises(InputError, match="`p3s fetch not/here@v2 --vision not/seen`"):
            getattr(load("not/here@v2", vision="not/seen"), part)


def test_a_diffusers_folder_brings_its_own_profile(world):
    family = load(world.profile.base)
    assert family.profile == world.profile
    assert family.fingerprint == world.fingerprint


@pytest.mark.parametrize("part", ["tokenizer", "vision"])
@pytest.mark.parametrize("left", [(), ("tokenizer_config.json",), ("vocab.json",)])
def test_a_tokenizer_without_a_vocabulary_is_refused_and_not_made_up(tiny_folder, tmp_path, part, left):
    """transformers makes one of two tokens where the files are missing, and cuts words into letters without merges."""
    folder = shutil.copytree(tiny_folder, tmp_path / "family")
    shutil.rmtree(folder / "tokenizer")
    (folder / "tokenizer").mkdir()
    for name in left:
        (folder / "tokenizer" / name).write_text('{"a": 0, "<|startoftext|>": 1, "<|endoftext|>": 2}')
    with pytest.raises(InputError, match="tokenizer has no vocabulary"):
        getattr(load(str(folder)), part)


def test_a_tokenizer_without_a_length_of_its_own_reads_what_clip_reads(tiny_folder, tmp_path):
    folder = shutil.copytree(tiny_folder, tmp_path / "family")
    for file in (folder / "tokenizer").glob("*_*.json"):
        file.unlink()
    assert load(str(folder)).tokenizer.model_max_length == 77


def test_a_folder_saved_under_another_scheduler_draws_as_in_diffusers(tiny_folder, tiny_family, tmp_path):
    """Euler's settings have no `clip_sample`; DDIM's own, true, would clip latents. diffusers' pipelines mend both."""
    folder = shutil.copytree(tiny_folder, tmp_path / "family")
    shutil.rmtree(folder / "scheduler")
    known = {n: tiny_family.scheduler_config[n] for n in ("beta_start", "beta_end", "beta_schedule")}
    EulerDiscreteScheduler(**known).save_pretrained(folder / "scheduler")
    assert "clip_sample" not in (folder / "scheduler/scheduler_config.json").read_text()
    family = load(str(folder))
    theirs = pipeline(
        StableDiffusionPipeline, family, scheduler=DDIMScheduler.from_pretrained(folder, subfolder="scheduler")
    )
    theirs.set_progress_bar_config(disable=True)
    noise, states = initial_noise([3], (4, 8, 8))[0], text.encode(family.tokenizer, family.text_encoder, ["a dog", ""])
    options = {"num_inference_steps": 4, "guidance_scale": 9.0, "latents": noise, "output_type": "latent"}
    expected = theirs("a dog", **options).images
    ours = sample(
        lambda x, t, states, _: family.unet(x, t, states).sample,
        *states.split(1),
        build_scheduler("ddim", family.scheduler_config),
        [3],
        (4, 8, 8),
        steps=4,
        guidance=9.0,
    )
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-4)


def test_half_precision_alone_is_taken_whole_or_in_shards_and_a_pickle_beside_it_is_not(
    tiny_family, tiny_folder, tmp_path
):
    folder = shutil.copytree(tiny_folder, tmp_path / "family")
    halves = {name: copy.deepcopy(getattr(tiny_family, name)).half() for name in ("unet", "vae", "text_encoder")}
    for name, model in halves.items():
        shutil.rmtree(folder / name)
        small = {} if name == "vae" else {"max_shard_size": "20KB"}
        model.save_pretrained(folder / name, variant="fp16", **small)
        for other in ("diffusion_pytorch_model.bin", "pytorch_model.bin"):
            (folder / name / other).write_bytes(b"never opened")
    assert len(list((folder / "unet").glob("*.fp16-*-of-*.safetensors"))) > 1
    family = load(str(folder), "cpu")
    for name, model in halves.items():
        loaded = getattr(family, name).state_dict()
        assert all(torch.equal(loaded[n], t.float()) for n, t in model.state_dict().items()), name


def test_the_fingerprint_is_that_of_the_files_in_use(tiny_folder, tmp_path):
    """A repository cloned whole and one of which p3s fetched its part are the same base."""
    folder = shutil.copytree(tiny_folder, tmp_path / "family")
    for other in ("non_ema.safetensors", "fp16.safetensors", "bin"):
        (folder / f"unet/diffusion_pytorch_model.{other}").write_bytes(b"of no account")
    own = load(str(tiny_folder), "cpu").fingerprint
    assert load(str(folder), "cpu").fingerprint == own
    (folder / "vae/config.json").write_text((folder / "vae/config.json").read_text() + " ")
    assert load(str(folder), "cpu").fingerprint != own


def test_keys_of_older_files_are_those_of_the_same_tensors(tiny_folder, tiny_family, tmp_path):
    """SD v1-5's text encoder names `text_model` and its safety checker `vision_model` once more than they are saved
    with today, and both carry position ids."""
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
    from transformers import CLIPConfig, CLIPTextModel

    from p3s_cli.sd import hub

    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    checker = StableDiffusionSafetyChecker(
        CLIPConfig(text_config=small, vision_config=small | {"image_size": 32, "patch_size": 8}, projection_dim=8)
    )
    for kind, model, prefix in (
        (CLIPTextModel, tiny_family.text_encoder, "text_model."),
        (StableDiffusionSafetyChecker, checker, "vision_model."),
    ):
        folder = tmp_path / kind.__name__
        model.save_pretrained(folder)
        tensors = load_file(folder / "model.safetensors")
        own = "" if prefix == "text_model." else prefix
        older = {prefix + k if k.startswith(own) else k: v for k, v in tensors.items()}
        older[f"{prefix}{own}embeddings.position_ids"] = torch.arange(77)[None]
        save_file(older, folder / "model.safetensors", {"format": "pt"})
        loaded = hub.load(kind, hub.Part("x", str(folder), weights="model")).state_dict()
        assert all(torch.equal(loaded[n], t) for n, t in model.state_dict().items())


def test_parts_are_frozen_and_the_family_asks_for_the_classical_filler(world):
    assert world.inpaint_unet is None and load("world", inpainter="classical").inpaint_unet is None
    assert not any(
        p.requires_grad for p in (*world.unet.parameters(), *world.vae.parameters(), *world.text_encoder.parameters())
    )


def test_vision_features_cover_a_wide_image_and_match_transformers_on_a_square_one(world):
    g = torch.Generator().manual_seed(0)
    rows, columns, _ = world.vision.patches(torch.rand(3, 64, 192, generator=g)).shape
    cells = world.profile.feature_side / world.vision.patch
    assert columns / rows == pytest.approx(3, rel=0.1) and rows * columns == pytest.approx(cells**2, rel=0.1)
    square = torch.rand(3, 128, 128, generator=g)
    hidden = world.vision.clip.vision_model(pixel_values=2 * square[None] - 1).last_hidden_state
    torch.testing.assert_close(
        world.vision.native_patches(square).reshape(256, -1), hidden[0, 1:], rtol=1e-4, atol=1e-4
    )


def test_masks_can_be_read_from_any_vit_folder(world, tmp_path):
    from transformers import Dinov2Config, Dinov2Model, ViTConfig, ViTModel

    small = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 32}
    for kind, config in ((ViTModel, ViTConfig), (Dinov2Model, Dinov2Config)):
        folder = tmp_path / kind.__name__
        kind(config(image_size=32, patch_size=8, **small)).save_pretrained(folder)
        (folder / "preprocessor_config.json").write_text(
            '{"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}'
        )
        tower = world.mask_tower(str(folder))
        features = tower.patches(torch.rand(3, 48, 96))
        assert features.shape[2] == 16 and features.shape[1] / features.shape[0] == pytest.approx(2, rel=0.1)
        assert tower.layers == (2, 3, 3)  # the third quarter of four layers
        assert tower.side == 39 * 8  # as many patches as any tower's, whatever their size
        model = kind.from_pretrained(folder)
        model.pooler = None  # as in many a published ViT; transformers then draws one at random
        model.save_pretrained(folder)
        assert world.mask_tower(str(folder)).fingerprint == world.mask_tower(str(folder)).fingerprint
    with pytest.raises(InputError, match="no vision tower is called 'sam'"):
        world.mask_tower("sam")
    assert world.mask_tower("clip") is world.vision
    with pytest.raises(InputError, match="holds a resnet, not a ViT"):
        world.mask_tower(str(world.folder / "readers/identity"))


def test_text_longer_than_the_encoder_reads_is_reported(world):
    from p3s_cli.sd import text

    long = "a sks dog " + "striped " * 90 + "beach"
    assert text.lost_words(world.tokenizer, long).endswith("beach")
    assert text.lost_words(world.tokenizer, "a sks dog on the beach") == ""
    with pytest.raises(InputError, match="lies beyond"):
        text.check_subjects_survive(world.tokenizer, "striped " * 90 + "[V] dog", "sks")
    text.check_subjects_survive(world.tokenizer, "a [V] dog " + "striped " * 90, "sks")
    assert text.identify("a [V] dog", "sks") == "a sks dog"
    with pytest.raises(InputError, match=r"no \[V\]"):
        text.identify("a dog", "sks")


def test_an_inpainter_of_nine_channels_repaints_the_region_alone(world, tmp_path):
    """A random 9-channel sibling, as SD v1-5's inpainter is one, from a folder named by hand."""
    from diffusers import UNet2DConditionModel

    from p3s_cli.sd.inpaint import inpainting_filler

    torch.manual_seed(0)
    sibling = UNet2DConditionModel.from_config(world.unet.config, in_channels=9)
    sibling.save_pretrained(tmp_path / "unet", variant="fp16")
    family = load("world", inpainter=str(tmp_path))
    assert family.inpaint_unet.config.in_channels == 9 and family.unet.config.in_channels == 4
    image, region = torch.rand(3, 64, 96), torch.zeros(64, 96, dtype=torch.bool)
    region[16:48, 32:64] = True
    filled = inpainting_filler(family, steps=2)(image, region, seed=1)
    assert torch.equal(filled[:, ~region], image[:, ~region]) and (filled[:, region] != image[:, region]).any()


def test_without_its_sibling_a_base_inpaints_with_its_own_four_channels(world, tmp_path):
    from dataclasses import replace

    family = load("world")
    assert family.inpainter_missing is None
    family.profile = replace(family.profile, inpainter="not/here")
    assert family.inpaint_unet is family.unet
    assert "not/here/unet is not on this machine" in family.inpainter_missing
    assert "`p3s fetch world --inpainter not/here`" in family.inpainter_missing
    with pytest.raises(InputError, match="not/here/unet is not on this machine"):
        _ = load("world", inpainter="not/here").inpaint_unet


def test_a_sibling_that_reads_another_text_than_the_base_s_gives_way_to_the_base(tiny_folder, world, tmp_path):
    """SD v1-5's inpainter beside a base of SD 2: widths 768 and 1024 there, 128 and 32 here."""
    from dataclasses import replace

    from p3s_cli.sd.inpaint import inpainting_filler

    world.unet.save_pretrained(tmp_path / "unet", variant="fp16")
    family = load(str(tiny_folder), "cpu")
    family.profile = replace(family.profile, inpainter=str(tmp_path))
    image, region = torch.rand(3, 64, 64), torch.zeros(64, 64, dtype=torch.bool)
    region[16:48, 16:48] = True
    filled = inpainting_filler(family, steps=2)(image, region, seed=1)
    assert (filled[:, region] != image[:, region]).any()
    assert family.inpaint_unet is family.unet
    assert family.inpainter_missing == f"the inpainter {tmp_path} reads text of width 128 and {tiny_folder} writes 32"
    with pytest.raises(InputError, match="reads text of width 128 .* writes 32; name one made for this base"):
        _ = load(str(tiny_folder), "cpu", inpainter=str(tmp_path)).inpaint_unet


@pytest.mark.parametrize("filed", [torch.float32, torch.float16, torch.bfloat16])
def test_a_tower_s_fingerprint_is_that_of_its_files_whatever_precision_it_is_loaded_in(
    tiny_folder, tiny_family, tmp_path, filed
):
    """The family's own pair, and a tower beside it."""
    folder = shutil.copytree(tiny_folder, tmp_path / "family")
    copy.deepcopy(tiny_family.vision.clip).to(filed).save_pretrained(folder / "clip")
    families = [load(str(folder), "cpu", dtype) for dtype in ("float32", "float16", "bfloat16")]
    assert families[2].vision.model.dtype == torch.bfloat16
    assert len({f.vision.fingerprint for f in families}) == 1
    assert len({f.mask_tower(str(folder / "clip")).fingerprint for f in families}) == 1


def test_another_clip_pair_can_take_the_family_s_place(world, tmp_path):
    from transformers import ViTConfig, ViTModel

    world.vision.clip.save_pretrained(tmp_path)
    for name in ("clip/preprocessor_config.json", "tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json"):
        (tmp_path / name.split("/")[1]).write_bytes((Path(world.profile.base) / name).read_bytes())
    family = load("world", vision=str(tmp_path))
    image = torch.rand(1, 3, 96, 128)
    torch.testing.assert_close(family.vision.tokens(image), world.vision.tokens(image))
    assert family.fingerprint == world.fingerprint  # the base is the same
    assert world.mask_tower(str(tmp_path)).width == world.vision.width  # and so it can be for the masks alone
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    ViTModel(ViTConfig(image_size=32, patch_size=8, **small)).save_pretrained(tmp_path / "vit")
    with pytest.raises(InputError, match="holds a vit, not a CLIP pair"):
        _ = load("world", vision=str(tmp_path / "vit")).vision
    with pytest.raises(InputError, match="no CLIP tower is called 'dinov2'"):
        load("world", vision="dinov2")
