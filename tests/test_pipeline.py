"""The diffusers pipeline with a subject in it against our own sampler, and saved and loaded again."""

import json
import shutil

import numpy as np
import pytest
import tiny
import torch
from PIL import Image

from p3s_cli import P3SPipeline, stages
from p3s_cli.config import GenerateConfig, with_schedule
from p3s_cli.errors import InputError
from p3s_cli.methods.base import Learnt, SubjectPart
from p3s_cli.methods.p3s import P3S
from p3s_cli.sd import images
from p3s_cli.sd.sample import build_scheduler, initial_noise, sample
from p3s_cli.sd.weights import load_tensors
from p3s_cli.subject import Subject


@pytest.fixture(scope="module")
def tuned(tmp_path_factory, pair, world):
    root = tmp_path_factory.mktemp("pipe") / "pet"
    images.save_png(root.parent / "two.png", pair[0])
    stages.mask(root.parent / "two.png", [pair[2][0]], [pair[2][1]], root, "pet", family=world)
    stages.finetune(root, steps=2, lr=1e-2, family=world)
    return root


def test_it_draws_what_the_sampler_draws_calls_back_and_survives_being_saved(tuned, world, tmp_path):
    pipe = P3SPipeline.from_pretrained("world", subject=tuned)
    pipe.set_progress_bar_config(disable=True)
    noise, seen = initial_noise([3], (4, 16, 16))[0], []

    def note(pipe, step, t, values):
        seen.append(step)
        return values

    options = {"num_inference_steps": 2, "guidance_scale": 3.0, "latents": noise, "output_type": "latent"}
    options["subject_guidance"] = 2.0
    theirs = pipe("a [V] pet on beach", callback_on_step_end=note, **options).images
    tensors, metadata = load_tensors(tuned / "control/control.safetensors")
    part = SubjectPart(Learnt(Subject.open(tuned), tensors, metadata["config"]))
    sampling = with_schedule(GenerateConfig(), world.profile.schedule)
    with P3S().bind_many(world, [part], sampling) as generator:
        states, empty = generator.encode(["a [V] pet on beach", ""]).split(1)
        scheduler = build_scheduler("ddim", world.scheduler_config)
        how = {"steps": 2, "guidance": 3.0, "subject_guidance": 2.0, "reuse": sampling.reuse}
        ours = sample(generator.eps, states, empty, scheduler, [3], (4, 16, 16), **how)
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-4)
    assert seen == [0, 1] and type(pipe.unet).__name__ == "UNet2DConditionModel"
    off = pipe("a [V] pet on beach", subject_strength=0.0, **options).images
    assert (off - theirs).abs().max() > 1e-3

    (tuned / "eval").mkdir()  # of p3s eval, which may hold many tunings
    pipe.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved/subjects/00/eval").exists() and (tmp_path / "saved/subjects/00/control").is_dir()
    again = P3SPipeline.from_pretrained(tmp_path / "saved")
    again.set_progress_bar_config(disable=True)
    again.save_pretrained(tmp_path / "saved")  # where it is, as diffusers allows
    with pytest.raises(InputError, match="never pickles; leave out safe_serialization=False"):
        again.save_pretrained(tmp_path / "saved", safe_serialization=False)
    assert not list((tmp_path / "saved").rglob("*.bin"))
    assert torch.equal(again("a [V] pet on beach", **options).images, theirs)


@pytest.mark.parametrize(
    ("guidance", "subject_guidance", "printed"),
    [(3.0, None, False), (3.0, 1.0, False), (3.0, 3.0, False), (1.0, 1.5, False), (3.0, None, True)],
)
def test_its_latents_are_those_of_generate_whatever_the_guidance(
    tuned, world, monkeypatch, guidance, subject_guidance, printed
):
    """By default too: both then take the family's subject guidance. (1.0 is no guidance to diffusers.)

    What the preset `paper` tuned is drawn without the third pass, and the copy runs at every step, by both.
    """
    monkeypatch.setattr(Subject, "as_printed", printed)
    decode, seen = images.decode, []
    monkeypatch.setattr(images, "decode", lambda vae, latents, n: (seen.append(latents), decode(vae, latents, n))[1])
    options = {"guidance": guidance, "subject_guidance": subject_guidance, "negative_prompt": "snow" * (guidance > 1)}
    stages.generate(tuned, "a [V] pet on beach", n=1, seed=3, steps=2, family=world, force=True, **options)

    pipe = P3SPipeline.from_pretrained("world", subject=tuned)
    pipe.set_progress_bar_config(disable=True)
    theirs = pipe(
        "a [V] pet on beach",
        num_inference_steps=2,
        guidance_scale=guidance,
        subject_guidance=subject_guidance,
        negative_prompt=options["negative_prompt"],
        latents=initial_noise([3], (4, 16, 16))[0],
        output_type="latent",
    ).images
    torch.testing.assert_close(theirs, seen[0], rtol=0, atol=1e-4)


def test_it_needs_a_subject_and_a_place_for_it(tuned):
    with pytest.raises(InputError, match="needs a tuned subject"):
        P3SPipeline.from_pretrained("world")
    with pytest.raises(InputError, match=r"no \[V\]"):
        P3SPipeline.from_pretrained("world", subject=tuned)("a pet")


def drawn(pipe, prompt, *size, **options):
    return pipe(
        prompt, *size, **({"num_inference_steps": 1, "guidance_scale": 3.0, "output_type": "latent"} | options)
    ).images


@pytest.fixture
def pipe(tuned):
    made = P3SPipeline.from_pretrained("world", subject=tuned)
    made.set_progress_bar_config(disable=True)
    return made


def test_the_usual_arguments_mean_what_they_mean_in_diffusers(pipe):
    """Each image of a list of generators is what its generator draws alone; sizes may stand by position."""
    seeded = [torch.Generator().manual_seed(s) for s in (1, 2)]
    both = drawn(pipe, "a [V] pet", 96, 160, num_images_per_prompt=2, generator=seeded)
    assert both.shape == (2, 4, 12, 20)
    alone = drawn(pipe, ["a [V] pet"], height=96, width=160, generator=torch.Generator().manual_seed(2), clip_skip=None)
    torch.testing.assert_close(both[1:], alone, rtol=0, atol=1e-4)
    array = drawn(pipe, "a [V] pet", output_type="np", generator=torch.Generator().manual_seed(2), return_dict=True)
    picture = drawn(
        pipe, "a [V] pet", output_type="pil", generator=torch.Generator().manual_seed(2), guidance_rescale=0.0
    )
    assert array.shape == (1, 128, 128, 3) and picture[0].size == (128, 128)
    assert abs(array[0] * 255 - np.asarray(picture[0])).max() <= 0.5 + 1e-3  # rounded to whole numbers


def test_one_negative_prompt_serves_all_prompts_and_what_was_learnt_is_read_once(pipe, monkeypatch):
    prompts = ["a [V] pet on beach", "a [V] pet in snow"]
    seeded = lambda: [torch.Generator().manual_seed(s) for s in (1, 2)]  # noqa: E731
    each = drawn(pipe, prompts, negative_prompt=["sand", "sand"], generator=seeded())
    monkeypatch.setattr(Learnt, "read", lambda subject: pytest.fail("read again"))
    assert torch.equal(drawn(pipe, prompts, negative_prompt="sand", generator=seeded()), each)


def test_models_kept_off_the_device_draw_the_same_image_twice(pipe):
    noise = initial_noise([3], (4, 16, 16))[0]
    before = drawn(pipe, "a [V] pet", latents=noise)
    pipe.enable_model_cpu_offload(device="cpu")
    assert all(torch.equal(drawn(pipe, "a [V] pet", latents=noise), before) for _ in range(2))


def test_two_subjects_each_with_its_own_strength_and_place(pipe, tuned, tmp_path):
    noise = initial_noise([3], (4, 16, 16))[0]
    pair = P3SPipeline.from_pretrained("world", subject=[tuned, tuned])
    pair.set_progress_bar_config(disable=True)
    prompt = "a [V1] pet and a [V2] pet"
    prompts = "a [V] pet and a sks pet", "a sks pet and a [V] pet"
    left, right = (drawn(pipe, p, latents=noise, subject_strength=0.5) for p in prompts)
    first, second, both = (drawn(pair, prompt, latents=noise, subject_strength=s) for s in ([0.5, 0], (0, 0.5), 0.5))
    assert torch.equal(first, left) and torch.equal(second, right) and not torch.equal(both, left)
    with pytest.raises(InputError, match="has 1 numbers for 2 subjects"):
        drawn(pair, prompt, subject_strength=[0.5])
    for saved, subjects in ((pair, ["00", "01"]), (pipe, ["00"])):  # over one another: what is there is what was saved
        saved.save_pretrained(tmp_path)
        assert [p.name for p in sorted((tmp_path / "subjects").iterdir())] == subjects


def test_what_would_have_no_effect_is_refused_and_what_is_cut_off_is_said(pipe, tuned):
    for name, value in (
        ("prompt_embeds", torch.zeros(1, 77, 128)),
        ("guidance_rescale", 0.7),
        ("clip_skip", 1),
        ("cross_attention_kwargs", {"scale": 0.5}),
        ("ip_adapter_image", Image.new("RGB", (8, 8))),
    ):
        with pytest.raises(InputError, match=f"takes no {name}"):
            pipe("a [V] pet", **{name: value})
    with pytest.raises(InputError, match="needs a prompt"):
        pipe()
    with pytest.warns(UserWarning, match="the prompt is too long.*beach"):
        drawn(pipe, "a [V] pet " + "striped " * 90 + "beach")
    with pytest.warns(UserWarning, match="the negative prompt is too long.*snow"):
        drawn(pipe, "a [V] pet", negative_prompt="striped " * 90 + "snow")
    with pytest.raises(InputError, match="lies beyond"):
        pipe("striped " * 90 + "[V] pet")
    with pytest.raises(InputError, match="variant is none.*base@revision"):
        P3SPipeline.from_pretrained("world", subject=tuned, variant="fp16")
    with pytest.raises(InputError, match="has no subject"):
        P3SPipeline(**pipe.components, requires_safety_checker=False)("a [V] pet")


def test_subjects_tuned_with_different_clip_pairs_do_not_join(tiny_folder, tiny_family, tmp_path):
    stages.mask(tiny.photo(tmp_path / "photo.png"), [(18, 32)], [], tmp_path / "pet", "pet", family=tiny_family)
    stages.finetune(tmp_path / "pet", steps=1, family=tiny_family)
    manifest = shutil.copytree(tmp_path / "pet", tmp_path / "other") / "subject.json"
    record = json.loads(manifest.read_text())
    record["finetune"]["settings"]["vision_fingerprint"] = "another"
    manifest.write_text(json.dumps(record))
    with pytest.raises(InputError, match="other sees its references through another CLIP pair than .*pet; tune one"):
        P3SPipeline.from_pretrained(tiny_folder, subject=[tmp_path / "pet", tmp_path / "other"])


def test_in_half_precision_the_decoder_stays_in_single(tiny_folder, tiny_family, tmp_path):
    photo = tiny.photo(tmp_path / "photo.png")
    stages.mask(photo, [(18, 32)], [(46, 32)], tmp_path / "pet", "pet", family=tiny_family)
    stages.finetune(tmp_path / "pet", steps=1, family=tiny_family)
    pipe = P3SPipeline.from_pretrained(tiny_folder, subject=tmp_path / "pet", torch_dtype=torch.float16)
    pipe.set_progress_bar_config(disable=True)
    assert (pipe.unet.dtype, pipe.vae.dtype) == (torch.float16, torch.float32)
    assert np.isfinite(drawn(pipe, "a [V] pet", output_type="np")).all()
    assert type(pipe.vae).__name__ == "AutoencoderKL"
