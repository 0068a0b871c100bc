"""The diffusers pipeline with a subject in it against our own sampler, and saved and loaded again."""

import pytest
import torch

from p3s_cli import P3SPipeline, stages
from p3s_cli.config import ControlConfig, GenerateConfig
from p3s_cli.errors import InputError
from p3s_cli.methods.binding import Part
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
    part = Part(Subject.open(tuned), tensors, ControlConfig(**metadata["config"]["control"]))
    with P3S().bind_many(world, [part], GenerateConfig()) as generator:
        states, empty = generator.encode(["a sks pet on beach", ""]).split(1)
        scheduler = build_scheduler("ddim", world.scheduler_config)
        ours = sample(generator.eps, states, empty, scheduler, [3], (4, 16, 16), 2, 3.0, 2.0)
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-4)
    assert seen == [0, 1] and type(pipe.unet).__name__ == "UNet2DConditionModel"
    off = pipe("a [V] pet on beach", subject_strength=0.0, **options).images
    assert (off - theirs).abs().max() > 1e-3

    pipe.save_pretrained(tmp_path / "saved")
    again = P3SPipeline.from_pretrained(tmp_path / "saved")
    again.set_progress_bar_config(disable=True)
    assert torch.equal(again("a [V] pet on beach", **options).images, theirs)


@pytest.mark.parametrize(("guidance", "subject_guidance"), [(3.0, None), (3.0, 1.0), (3.0, 3.0), (1.0, 1.5)])
def test_its_latents_are_those_of_generate_whatever_the_guidance(tuned, world, monkeypatch, guidance, subject_guidance):
    """By default too: both then take the family's subject guidance. (1.0 is no guidance to diffusers.)"""
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
