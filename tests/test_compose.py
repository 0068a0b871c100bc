"""Several subjects, ControlNet, LoRA and size in one image, and what an image says of itself."""

import json
from unittest import mock

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from p3s_cli import stages
from p3s_cli.config import FinetuneConfig, MemoryProfile
from p3s_cli.errors import InputError
from p3s_cli.manifest import SEEN_BY
from p3s_cli.methods.base import Lesson
from p3s_cli.methods.p3s import P3S
from p3s_cli.sd import a1111, images, text
from p3s_cli.stages.composition import Composition, parse_size
from p3s_cli.subject import Subject


@pytest.fixture(scope="module")
def two(tmp_path_factory, pair, world):
    """Two tuned subjects from one photo, each the other's negative; the first has a second reference."""
    folder = tmp_path_factory.mktemp("two")
    photo, _, (left, right) = pair
    images.save_png(folder / "photo.png", photo)
    images.save_png(folder / "mirror.png", photo.transpose(Image.Transpose.FLIP_LEFT_RIGHT))
    stages.mask(folder / "photo.png", [left], [right], folder / "a", "cat", family=world)
    stages.mask(folder / "mirror.png", [(127 - left[0], left[1])], (), folder / "a", family=world)
    stages.mask(folder / "photo.png", [right], [left], folder / "b", "dog", family=world)
    for name in ("a", "b"):
        stages.finetune(folder / name, steps=2, lr=1e-2, family=world)
    return folder


def make(folder, world, prompt="a [V1] cat and a [V2] dog", **options):
    return stages.generate(folder / "a", prompt, **({"n": 1, "steps": 1, "family": world} | options))


def pixels(result):
    return images.to_tensor(images.load_image(result.images[0]))


def test_everything_joins_in_one_image_of_another_size(two, world):
    from diffusers import ControlNetModel

    ControlNetModel.from_unet(world.unet, conditioning_embedding_out_channels=(8, 8, 16, 16)).save_pretrained(
        two / "net"
    )
    layer = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q.lora"
    save_file(
        {f"{layer}_A.weight": torch.randn(2, 160), f"{layer}_B.weight": torch.randn(160, 2)}, two / "s.safetensors"
    )
    result = make(
        two,
        world,
        also=[f"{two / 'b'}=0.5"],
        control=[f"{two / 'net'}={two / 'photo.png'}=0.8"],
        lora=[f"{two / 's.safetensors'}=0.6"],
        size="160x96",
        references=2,
        negative_prompt="snow",
        scheduler="EulerAncestralDiscreteScheduler",
    )
    known = images.read_metadata(result.images[0])
    assert images.load_image(result.images[0]).size == (160, 96)
    assert known["text"] == "a sks cat and a sks dog" and known["also"][0]["strength"] == 0.5
    assert known["guides"][0]["strength"] == 0.8 and known["loras"][0]["name"] == "s"
    assert known["sampling"]["size"] == [96, 160] and known["sampling"]["negative_prompt"] == "snow"
    assert known["safety"] == result.safety[0] == "no checker"
    written = Image.open(result.images[0]).text["parameters"].splitlines()
    assert written[0] == "a sks cat and a sks dog <lora:s:0.6>" and written[1] == "Negative prompt: snow"
    assert "Seed: 0, Size: 160x96, Model: world" in written[2]


def test_no_strength_is_below_zero(two, world):
    """The logarithm of a weight shifts the logits of eq. 8; below zero it is no number."""
    with pytest.raises(InputError, match="strength cannot be -0.5; give 0 or more"):
        stages.generate(two / "a", "a [V] cat", n=1, steps=1, strength=-0.5, family=world)


def test_a_further_subject_at_strength_zero_is_not_there(two, world):
    alone = pixels(make(two, world, "a [V] cat and a sks dog"))
    none = pixels(make(two, world, also=[f"{two / 'b'}=0"]))
    both = pixels(make(two, world, also=[f"{two / 'b'}"]))
    assert torch.equal(alone, none) and not torch.equal(alone, both)


def test_without_metadata_a_png_says_nothing_and_is_still_known(two, world):
    before = make(two, world, "a [V] cat", seed=5)
    after = make(two, world, "a [V] cat", seed=5, metadata=False)
    assert not after.unchanged and before.images == after.images
    data = after.images[0].read_bytes()
    assert b"tEXt" not in data and b"iTXt" not in data and b"sks" not in data
    assert make(two, world, "a [V] cat", seed=5, metadata=False).unchanged
    assert not make(two, world, "a [V] cat", seed=5).unchanged  # and so they come back


def test_fewer_images_of_a_prompt_leave_the_record_of_the_others(two, world):
    four = make(two, world, "a [V] cat", seed=40, n=4, metadata=False)
    make(two, world, "a [V] cat", seed=40, n=2, metadata=False)  # the same images in another grid
    recorded = {n for stage in Subject.open(two / "a").manifest.generated for n in stage.artifacts}
    assert {str(p.relative_to(two / "a")) for p in (*four.images, four.grid)} <= recorded
    assert make(two, world, "a [V] cat", seed=40, n=4, metadata=False).unchanged  # and so they are known


def test_nothing_of_a_photo_but_its_pixels_is_copied(two, world, tmp_path, pair):
    exif = Image.Exif()
    exif[0x010F] = "MARKER-make"
    exif.get_ifd(0x8825)[1] = "MARKER-gps"
    photo = pair[0].copy()
    photo.save(tmp_path / "p.jpg", quality=95, exif=exif, comment=b"MARKER-comment", icc_profile=b"MARKER-icc")
    assert (tmp_path / "p.jpg").read_bytes().count(b"MARKER") >= 4
    made = stages.mask(tmp_path / "p.jpg", [pair[2][0]], (), tmp_path / "subject", "cat", family=world)
    assert len(made.pictures) == 3
    for file in (tmp_path / "subject").rglob("*"):
        assert file.is_dir() or b"MARKER" not in file.read_bytes(), file


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"also": ["gone"]}, "gone is not a subject directory"),
        ({"control": ["canny"]}, "names no picture"),
        ({"control": ["canny=gone.png"]}, "gone.png does not exist"),
        ({"control": ["fog=x.png"]}, "no ControlNet is called"),
        ({"lora": ["gone.safetensors=0.5"]}, "gone.safetensors does not exist"),
        ({"lora": ["a=b"]}, "is no strength"),
        ({"lora": ["a=-1"]}, "is not 0 or more"),
    ],
)
def test_what_cannot_join_is_named_before_anything_is_loaded(options, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=words):
        Composition.read(**({"also": None, "control": None, "lora": None} | options))


def test_what_lies_in_the_folder_of_a_lora_or_a_controlnet_is_part_of_the_record(tmp_path):
    """So an image is made again where its scale or its weights have changed, whatever the folder is called."""
    tensors = {"a": torch.zeros(2, 2)}
    net, lora = tmp_path / "net", tmp_path / "style"
    for folder, weights, settings in (
        (net, "diffusion_pytorch_model.safetensors", "config.json"),
        (lora, "adapter_model.safetensors", "adapter_config.json"),
    ):
        folder.mkdir()
        save_file(tensors, folder / weights)
        (folder / settings).write_text(json.dumps({"lora_alpha": 4}))
    Image.new("RGB", (16, 16)).save(tmp_path / "edges.png")

    def record():
        return Composition.read(None, [f"{net}={tmp_path / 'edges.png'}"], [str(lora)]).record()

    first = record()
    assert record() == first
    (lora / "adapter_config.json").write_text(json.dumps({"lora_alpha": 8}))
    save_file({"a": torch.ones(2, 2)}, net / "diffusion_pytorch_model.safetensors")
    second = record()
    assert first["loras"] != second["loras"] and first["guides"] != second["guides"]


def test_places_in_the_prompt_and_subjects_must_agree():
    assert text.identify("a [V1] dog", "sks") == text.identify("a [V] dog", "sks") == "a sks dog"
    assert text.identify("a [V2] dog, a [V1] cat", "sks", "zwx") == "a zwx dog, a sks cat"
    for prompt, names, words in (
        ("a [V1] dog", ("a", "b"), r"has no \[V2\]"),
        ("a [V] dog", ("a", "b"), "there are 2 subjects"),
        ("a [V] dog and a [V2] cat", ("a",), "is no subject"),
    ):
        with pytest.raises(InputError, match=words):
            text.identify(prompt, *names)


def test_sizes():
    assert parse_size("640x448") == (448, 640) and parse_size(None) is None
    for bad in ("640", "641x448", "0x64", "8192x512"):
        with pytest.raises(InputError, match="size"):
            parse_size(bad)


def test_a1111_text_reads_as_its_own_tools_write_it():
    given = {"steps": 20, "sampler": "dpm++_karras", "guidance": 7.5, "seed": 4, "size": (448, 640)}
    line = "Steps: 20, Sampler: DPM++ 2M Karras, CFG scale: 7.5, Seed: 4, Size: 640x448, Model: m, Version: v"
    assert a1111.parameters("a dog", "", **given, model="m", version="v") == f"a dog\n{line}"
    assert json.dumps(a1111.parameters("ä", "b", **given, model="m", version="v")).count("\\n") == 2


def test_every_memory_profile_tunes_and_draws_and_leaves_the_family_as_it_was(two, world, tmp_path):
    """8-bit moments and bfloat16 masters change numbers a little; checkpointing and offloading none (the test below)."""
    import shutil

    from p3s_cli.config import ControlConfig
    from p3s_cli.sd.weights import load_tensors

    controls = {}
    for name in ("24", "12", "8"):
        shutil.copytree(two / "a", tmp_path / name)
        made = stages.finetune(tmp_path / name, steps=3, memory=name, force=True, family=world)
        controls[name], _ = load_tensors(made.control)
        assert made.memory == name
    assert not world.unet.is_gradient_checkpointing and world.vae.device == world.unet.device
    start = controls["24"].keys()
    for name in ("12", "8"):
        assert controls[name].keys() == start
        for k in start:
            apart = (controls[name][k] - controls["24"][k]).float().abs().max()
            # in three steps of about the rate two runs part by no more than twice that, and
            # bfloat16 rounds the start and each step by at most one spacing, 2^-7 of the number itself
            faster = {"gates": ControlConfig().gate_lr_scale, "word": ControlConfig().word_lr_scale}
            rate = world.profile.finetune["lr"] * faster.get(k.split(".")[0], 1.0)
            limit = 3 * 2 * rate + 4 * 2**-7 * controls["24"][k].float().abs().max()
            assert apart <= limit, (name, k)
    drawn = stages.generate(tmp_path / "8", "a [V] cat", n=2, steps=1, memory="8", family=world)
    assert all(p.is_file() for p in drawn.images)


def test_checkpointing_and_offloading_change_no_number(two, world, monkeypatch):
    """What is computed again is the same, and what is not needed is elsewhere meanwhile: it goes to the CPU, and comes back."""
    moved, learnt = [], {}
    monkeypatch.setattr(type(world), "_move", lambda self, device, names: moved.append(device))
    subject = Subject.open(two / "a")
    for saving in (False, True):
        memory = MemoryProfile(24, average=True, checkpointing=saving, offload=saving)
        learnt[saving] = P3S().fit(Lesson(world, subject, FinetuneConfig(steps=2, memory=memory)))
    assert all(torch.equal(learnt[False][name], tensor) for name, tensor in learnt[True].items())
    assert moved == ["cpu", world.device]


def test_subjects_seen_through_different_clip_pairs_do_not_join(two):
    """A pair is known by its files, wherever they lie; by its name where a record is of before these were kept."""
    one, other = (Subject.open(two / name) for name in "ab")
    settings = other.manifest.finetune.settings
    Composition().check([one, other])
    settings["vision"] = "/another/place"
    Composition().check([one, other])
    with pytest.raises(InputError, match="another CLIP pair"), mock.patch.dict(settings, {SEEN_BY: "another"}):
        Composition().check([one, other])
    del settings[SEEN_BY]
    with pytest.raises(InputError, match="another CLIP pair"):
        Composition().check([one, other])
