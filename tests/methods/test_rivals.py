"""Every rival keeps the contract: the family as found, and nothing trained but what its paper trains."""

import shutil

import diffusers
import pytest
import torch
from rivals import RIVALS, bound, looks, noise, state

from p3s_cli import methods, stages
from p3s_cli.config import FinetuneConfig
from p3s_cli.errors import InputError
from p3s_cli.methods.base import Lesson
from p3s_cli.methods.denoising import tuned_copy
from p3s_cli.methods.words import NewWord
from p3s_cli.sd import images, sample, text
from p3s_cli.sd.train import Checkpoint


@pytest.mark.parametrize("name", RIVALS)
def test_the_family_is_as_found_after_fit_and_bind(name, family, subject, found, learnt):
    with bound(name, family, subject, learnt[name]) as generator:
        noise(generator, family)
    before, after = found[0], state(family)
    assert before.keys() == after.keys() and all(torch.equal(before[n], after[n]) for n in before)
    assert looks(family) == found[1]
    assert not any(p.requires_grad for m in (family.unet, family.text_encoder) for p in m.parameters())


def changed(family, tensors, prefix="unet."):
    """Names of U-Net parameters that differ from the base's once the tensors are in."""
    base = dict(family.unet.named_parameters())
    tuned = tuned_copy(family.unet, tensors, prefix, 1.0).named_parameters()
    return {n for n, p in tuned if not torch.equal(p, base[n])}


def test_dreambooth_trains_the_u_net_and_nothing_else(family, learnt):
    names = {n for n, _ in family.unet.named_parameters()}
    for name in ("dreambooth", "dreambooth-prior"):
        assert learnt[name].keys() == {f"unet.{n}" for n in names}
        assert changed(family, learnt[name]) == names


def test_lora_trains_adapters_of_every_attention_layer(family, learnt):
    layers = {n.removesuffix(".to_q") for n, _ in family.unet.named_modules() if n.endswith(".to_q")}
    expected = {
        f"{layer}.{part}.lora_{side}.default.weight"
        for layer in layers
        for part in ("to_q", "to_k", "to_v", "to_out.0")
        for side in "AB"
    }
    assert learnt["lora"].keys() == expected
    assert all(t.any() for n, t in learnt["lora"].items() if "lora_B" in n)


def test_textual_inversion_trains_one_row(family, subject, learnt):
    assert learnt["textual-inversion"].keys() == {"word"}
    row, first = learnt["textual-inversion"]["word"], NewWord(family, subject.manifest, True).first
    assert row.shape == (family.text_encoder.config.hidden_size,) and (row != first).all()


def test_custom_diffusion_trains_keys_and_values_of_cross_attention_and_one_row(family, learnt):
    expected = {n for n, _ in family.unet.named_parameters() if n.endswith(("attn2.to_k.weight", "attn2.to_v.weight"))}
    assert learnt["custom-diffusion"].keys() == {"word"} | {f"unet.{n}" for n in expected}
    assert changed(family, learnt["custom-diffusion"]) == expected


def test_break_a_scene_trains_u_net_text_encoder_and_of_the_vocabulary_one_row(family, learnt):
    names = learnt["break-a-scene"].keys()
    text_names = {n for n, _ in family.text_encoder.named_parameters()}
    vocabulary = {n for n in text_names if "token_embedding" in n}
    expected = {f"text.{n}" for n in text_names - vocabulary} | {"text.embeddings.token_embedding.row"}
    assert {n for n in names if n.startswith("text.")} == expected
    assert changed(family, learnt["break-a-scene"]) == {n for n, _ in family.unet.named_parameters()}


@pytest.mark.parametrize("name", [n for n in RIVALS if n != "untuned"])
def test_strength_zero_and_the_half_without_the_subject_are_the_base(name, family, subject, learnt):
    """Everything learnt is a difference to the base, which strength multiplies; at 1 it is there in full."""
    prompt = "a dog on the beach"
    with bound("untuned", family, subject, {}) as generator:
        base = noise(generator, family, prompt)
    with bound(name, family, subject, learnt[name], strength=0.0) as generator:
        torch.testing.assert_close(noise(generator, family, prompt), base, atol=1e-6, rtol=0)
    with bound(name, family, subject, learnt[name]) as generator:
        prompt = "a [V] dog on the beach"  # says the new word of methods that have one
        tuned, without = (noise(generator, family, prompt, with_subject) for with_subject in (True, False))
    assert (tuned - base).abs().max() > 1e-4
    if name in ("dreambooth", "dreambooth-prior", "lora"):
        states = text.encode(family.tokenizer, family.text_encoder, ["a sks dog on the beach"])
        x_t = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(3))
        assert torch.equal(without, family.unet(x_t, torch.tensor([400]), states).sample)


def test_lora_equals_the_base_before_training(family, subject):
    tensors = methods.get("lora").fit(Lesson(family, subject, FinetuneConfig(steps=1, lr=1e-30)))
    prompt = "a sks dog on the beach"
    states = text.encode(family.tokenizer, family.text_encoder, [prompt])
    x_t = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(3))
    with bound("lora", family, subject, tensors) as generator:
        plain = family.unet(x_t, torch.tensor([400]), states).sample
        torch.testing.assert_close(noise(generator, family, prompt), plain, atol=1e-6, rtol=0)


def test_untuned_is_the_plain_diffusers_pipeline_without_the_identifier(family, subject):
    pipeline = diffusers.StableDiffusionPipeline(
        vae=family.vae,
        text_encoder=family.text_encoder,
        tokenizer=family.tokenizer,
        unet=family.unet,
        scheduler=diffusers.DDIMScheduler.from_config(family.scheduler_config),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    start, _ = sample.initial_noise([5], (4, 16, 16))
    theirs = pipeline("a dog on the beach", latents=start, num_inference_steps=3, guidance_scale=4.0, output_type="pt")
    with bound("untuned", family, subject, {}) as generator:
        states, empty = generator.encode(["a [V] dog on the beach", ""]).split(1)
        scheduler = sample.build_scheduler("ddim", family.scheduler_config)
        latents = sample.sample(generator.eps, states, empty, scheduler, [5], (4, 16, 16), steps=3, guidance=4.0)
    torch.testing.assert_close(images.decode(family.vae, latents), theirs.images, atol=1e-4, rtol=0)


def test_break_a_scene_resumes_in_either_half(family, subject, tmp_path, learnt):
    config, checkpoint = FinetuneConfig(steps=2, lr=1e-3), Checkpoint(tmp_path / "c", every=0.0)

    for stop in (1, 2):

        def killed(step, total, numbers, stop=stop):
            assert total == 2
            if step == stop:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            methods.get("break-a-scene").fit(Lesson(family, subject, config, killed, checkpoint))
    resumed = methods.get("break-a-scene").fit(Lesson(family, subject, config, None, checkpoint))
    assert all(torch.equal(t, learnt["break-a-scene"][n]) for n, t in resumed.items())
    assert {p.name for p in tmp_path.iterdir()} == {"c", "c-word"}  # which `finetune` removes by the first name


@pytest.mark.parametrize(
    ("asked", "option"), [({"schedule": "fixed"}, "--schedule"), ({"references": 2}, "--references")]
)
def test_what_only_p3s_heeds_is_refused_of_a_rival(asked, option, family, subject, tmp_path):
    """It would be recorded with the images as if it had been followed."""
    home = tmp_path / "pet"
    shutil.copytree(subject.root, home)
    stages.finetune(home, "untuned", family=family)
    with pytest.raises(InputError, match=f"untuned has no use for {option}"):
        stages.generate(home, "a [V] dog", family=family, **asked)
